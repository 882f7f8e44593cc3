"""A threshold that promises: simulated missions, bounds against SciPy, and what val cannot show."""

import numpy as np
import pytest
from scipy.stats import binomtest

from orion_triage.errors import OrionError
from orion_triage.evaluate.metrics import Prediction
from orion_triage.evaluate.promise import losses_by_place, lowest_within, places_needed, upper_bound, within
from orion_triage.evaluate.threshold import decided, parse_confidence, promising
from orion_triage.mission.decide import Rules
from tests.conftest import MISSION

H, M, L = MISSION.names


@pytest.mark.parametrize(("lost", "count"), [(0, 59), (0, 20), (1, 40), (7, 100), (20, 20)])
def test_the_bound_of_whole_losses_is_clopper_and_pearsons(lost: int, count: int) -> None:
    losses = np.array([1.0] * lost + [0.0] * (count - lost))
    expected = binomtest(lost, count, alternative="less").proportion_ci(0.95, method="exact").high
    assert upper_bound(losses, 0.95) == pytest.approx(expected)


def test_the_bound_of_shares_is_above_their_mean_and_falls_with_places() -> None:
    few, many = np.full(20, 0.1), np.full(400, 0.1)
    assert 0.1 < upper_bound(many, 0.95) < upper_bound(few, 0.95) < 1
    assert upper_bound(few, 0.99) > upper_bound(few, 0.95)
    assert (upper_bound(np.zeros(0), 0.95), upper_bound(np.ones(5), 0.95)) == (1, 1)
    assert upper_bound(np.array([0.5, 1.0]), 0.95) > 0.99


def test_within_is_what_the_bound_says() -> None:
    generator = np.random.default_rng(4)
    for whole in (True, False):
        for _ in range(40):
            losses = generator.random(50) * 0.3
            losses = (losses < 0.03).astype(float) if whole else losses
            bound = upper_bound(losses, 0.9)
            assert within(losses, bound + 1e-6, 0.9)
            assert not within(losses, bound - 1e-6, 0.9)
    assert not within(np.zeros(0), 0.5, 0.9)


def test_tiles_of_a_place_are_one_loss() -> None:
    losses = losses_by_place([True, False, False, False, True], ["b", "b", "a", "a", "b"])
    assert losses.tolist() == pytest.approx([0, 2 / 3])


def test_places_needed_is_the_rule_of_three_and_more_for_each_loss() -> None:
    """MAPIE's issue 974: a finite threshold where none is valid. Here it is a number of frames."""
    assert [places_needed(0, limit, 0.95) for limit in (0.05, 0.1, 0.01)] == [59, 29, 299]
    assert places_needed(1, 0.05, 0.95) == 93
    for lost in (0, 1, 4):
        needed = places_needed(lost, 0.05, 0.95)
        assert needed is not None
        for count, kept in ((needed, True), (needed - 1, False)):
            losses = np.array([1.0] * lost + [0.0] * (count - lost))
            assert (upper_bound(losses, 0.95) <= 0.05) is kept
    assert places_needed(0, 0.0, 0.95) is None


def test_the_search_ends_at_the_first_threshold_that_is_not_shown() -> None:
    shown = {0.2: 0, 0.4: 3, 0.6: 0, 0.8: 0, 2.0: 0}  # a loss that is not monotone: 0.2 must not be reached

    def losses(threshold: float) -> np.ndarray:
        return np.array([1.0] * shown[threshold] + [0.0] * (59 - shown[threshold]))

    assert lowest_within(list(shown), losses, 0.05, 0.95) == 0.6
    assert lowest_within(list(shown), losses, 0.01, 0.95) is None


def rows(drop: np.ndarray, tiles: int = 1) -> list[Prediction]:
    """Valuable frames with these probabilities of LOW, and one LOW frame."""
    valuable = [
        Prediction("B", f"{n:04}", H, H, scores=(1 - p, 0.0, p), place=str(n // tiles)) for n, p in enumerate(drop)
    ]
    return [*valuable, Prediction("B", "low", L, L, scores=(0.0, 0.0, 1.0), place="low")]


@pytest.mark.slow
def test_a_threshold_keeps_its_promise() -> None:
    """Scores are uniform, so a threshold t loses 1 - t of all frames: at most 10 of 100 missions may lose more.

    benchmarks/simulate.py has more of them, docs/simulations.md the figures.
    """
    generator, missions, limit = np.random.default_rng(11), 300, 0.1
    for tiles, places in ((1, 60), (3, 60)):
        worse, thresholds = 0, []
        for _ in range(missions):
            # Tiles of a place share a part of their score; the score of each is uniform.
            shared, own = generator.random((places, 1)), generator.random((places, tiles))
            drop = np.where(generator.random((places, tiles)) < 0.5, shared, own).ravel()
            rules, promised = promising(rows(drop, tiles), limit, 0.9, MISSION)
            assert rules.drop_threshold is not None
            assert promised["places"] == places
            assert promised["upper_bound"] <= limit
            thresholds.append(min(1.0, rules.drop_threshold))
            worse += 1 - thresholds[-1] > limit
        assert worse / missions < 0.14, (
            f"{worse} of {missions} break a promise at 90 %"
        )  # 0.1 and three errors of 0.017
        assert np.mean(thresholds) < 0.99, "not simply by dropping nothing"


def test_too_few_frames_are_named_with_the_number_that_is_needed() -> None:
    with pytest.raises(OrionError) as caught:
        promising(rows(np.zeros(40)), 0.05, 0.95, MISSION)
    assert "from 40 places with such val frames." in caught.value.message
    assert "19 more HIGH and MEDIUM val frames of places of their own are needed (59 in all)" in caught.value.fix
    with pytest.raises(OrionError, match="from 20 places"):
        promising(rows(np.zeros(100), tiles=5), 0.05, 0.95, MISSION)
    unscored = [Prediction("B", f"x{n}", H, L) for n in range(2)]
    with pytest.raises(OrionError, match="because 2 of them are lost at any threshold") as caught:
        promising([*rows(np.zeros(60)), *unscored], 0.05, 0.95, MISSION)
    assert "(124 in all)" in caught.value.fix
    with pytest.raises(OrionError, match="by any number of val frames"):
        promising(rows(np.zeros(60)), 0.0, 0.95, MISSION)


def test_scores_that_are_equal_are_dropped_or_kept_together() -> None:
    drop = np.round(np.random.default_rng(2).random(200) * 4) / 4
    rules, _ = promising(rows(drop), 0.3, 0.95, MISSION)
    assert rules.drop_threshold == 1.0
    found = decided(rows(drop), Rules(rules.drop_threshold), MISSION)
    assert found.count(L) == int(np.sum(drop == 1)) + 1


def test_a_confidence_is_a_share_from_a_half() -> None:
    assert parse_confidence("95%") == parse_confidence("0.95") == 0.95
    for wrong in ("100%", "5%", "95"):
        with pytest.raises(OrionError):
            parse_confidence(wrong)
