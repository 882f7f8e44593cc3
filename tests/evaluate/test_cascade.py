"""The cascade: what the first look drops, what that loses, and what it spares."""

from dataclasses import replace

import pytest

from orion_triage.errors import OrionError
from orion_triage.evaluate.cascade import Looks, effect, lowest_threshold
from orion_triage.evaluate.metrics import Prediction
from orion_triage.evaluate.threshold import NEVER
from orion_triage.mission.decide import Decision, Rules, first_look
from tests.conftest import MISSION
from tests.mission.test_fields import SMOKE, mission


def row(name: str, truth: str, low: float, said: str = "", *, blank: bool = False) -> Prediction:
    """A frame with this probability of LOW; the rest is MEDIUM's."""
    scores = (0.0, 1 - low, low)
    return Prediction(
        "B", name, truth, said or ("LOW" if low > 0.5 else "MEDIUM"), scores=scores, blank=blank, place=name
    )


CHEAP = [
    row("sea", "LOW", 0.99),
    row("ice", "LOW", 0.95),
    row("farm", "MEDIUM", 0.9),  # the cheap look is wrong here, and sure
    row("port", "HIGH", 0.3),
    row("dune", "LOW", 0.2),
    row("town", "MEDIUM", 0.1),
]
FULL = [
    row("sea", "LOW", 0.8),
    row("ice", "LOW", 0.2),  # the full look would store it
    row("farm", "MEDIUM", 0.1),
    row("port", "HIGH", 0.0, "HIGH"),
    row("dune", "LOW", 0.9),
    row("town", "MEDIUM", 0.8),  # lost by the full look itself
]


def looks(cheap: list[Prediction] = CHEAP, full: list[Prediction] = FULL) -> Looks:
    return Looks(cheap, full, Rules(), MISSION)


def test_the_first_look_drops_as_much_as_the_limit_allows() -> None:
    assert lowest_threshold(looks(), 0.0) == 0.95
    # One of three valuable frames may be lost: farm. The town is the full look's own loss, and costs nothing here.
    assert lowest_threshold(looks(), 0.34) == 0.9


def test_a_first_look_that_sees_nothing_drops_nothing() -> None:
    blind = [row(one.name, one.truth, 0.5) for one in CHEAP]
    threshold = lowest_threshold(looks(blind), 0.0)
    assert threshold == NEVER
    assert looks(blind).together(threshold) == looks(blind).alone()


def test_the_full_look_decides_the_rest() -> None:
    assert looks().spared(0.95) == [True, True, False, False, False, False]
    assert looks().together(0.95) == ["LOW", "LOW", "MEDIUM", "HIGH", "LOW", "LOW"]
    assert looks().alone() == ["LOW", "MEDIUM", "MEDIUM", "HIGH", "LOW", "LOW"]
    measured = effect(looks(), 0.95, (0.1, 1.0))
    assert measured["spared"] == {"count": 2, "total": 6}
    assert measured["lost"] == 0
    assert measured["alone"]["irrecoverable_loss"] == measured["cascade"]["irrecoverable_loss"]
    # Two of three LOW frames are spared, none of the others.
    in_orbit = MISSION.prior[2] * 2 / 3
    assert measured["spared_in_orbit"]["value"] == pytest.approx(in_orbit)
    assert measured["seconds_per_frame"]["expected"] == pytest.approx(0.1 + 1 - in_orbit)


def test_what_it_loses_is_counted_against_the_full_look_on_everything() -> None:
    measured = effect(looks(), 0.9, None)
    assert measured["lost"] == 1
    assert measured["cascade"]["irrecoverable_loss"]["count"] == measured["alone"]["irrecoverable_loss"]["count"] + 1
    assert measured["p"] == 1.0
    assert measured["difference"]["low"] < 1 / 3 < measured["difference"]["high"]
    assert measured["seconds_per_frame"] is None


def test_a_blank_frame_has_no_first_look() -> None:
    cheap = [row("sea", "LOW", 0.99, blank=True), *CHEAP[1:]]
    full = [row("sea", "LOW", 0.8, blank=True), *FULL[1:]]
    assert looks(cheap, full).spared(0.95)[0] is False
    assert looks(cheap, full).together(0.95)[0] == MISSION.blank


def test_looks_at_different_frames_are_refused() -> None:
    with pytest.raises(OrionError, match="different frames"):
        looks(CHEAP[1:])


def test_a_cheap_look_without_scores_decides_nothing() -> None:
    assert first_look(MISSION, None, 0.0, rules=Rules()) is None


def test_a_frame_that_is_unlike_the_training_gets_the_full_look() -> None:
    """`orion threshold --keep-unlike` promises that it is never dropped by scores."""
    guarded = Rules(0.5, appearance={"dark": [10, 20]})
    cheap, full = ([replace(one, unlike=one.name in ("sea", "farm")) for one in seen] for seen in (CHEAP, FULL))
    kept = Looks(cheap, full, guarded, MISSION)
    assert kept.spared(0.9) == [False, True, False, False, False, False]
    assert kept.together(0.9)[0] == kept.alone()[0] == "MEDIUM"
    assert lowest_threshold(kept, 0.0) == 0.9  # the farm is safe by the rule
    assert Looks(cheap, full, Rules(0.5), MISSION).spared(0.9)[0] is True  # nobody asked for the rule


def test_no_first_look_passes_by_the_rule_of_a_field() -> None:
    """The first look sees no field, so only the full look can know whether the rule holds."""
    ruled, scores = mission(SMOKE | {"when": "yes", "then": "SHIP"}), (0.01, 0.99)
    assert first_look(mission(SMOKE), scores, 0.5, rules=Rules()) == Decision("SEA", "first look")
    assert first_look(ruled, scores, 0.5, rules=Rules()) is None
