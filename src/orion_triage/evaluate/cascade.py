"""A cheap first look drops what is surely to be dropped; the full look is spent on the rest.

Both looks are evaluated variants of a run. The probability from which the first look drops a frame is chosen on val,
and its effect measured on test, frame by frame against the full look on everything.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from orion_triage.errors import OrionError
from orion_triage.evaluate import clusters, orbit, value
from orion_triage.evaluate.judgement import guess_of, truth_of
from orion_triage.evaluate.metrics import Prediction, places_of
from orion_triage.evaluate.statistics import NO_VERDICT
from orion_triage.evaluate.threshold import candidates, decided, is_dropped, valuable_frames
from orion_triage.mission.decide import Decision, Rules, first_look
from orion_triage.mission.mission import Mission


@dataclass(frozen=True)
class Looks:
    """The same frames of one split under the flight's condition, seen by the cheap and by the full look.

    `rules` are those of the full look. Raises OrionError if the looks are of different frames.
    """

    cheap: Sequence[Prediction]
    full: Sequence[Prediction]
    rules: Rules
    mission: Mission

    def __post_init__(self) -> None:
        if [row.name for row in self.cheap] != [row.name for row in self.full]:
            raise OrionError(
                "the two looks of the cascade are of different frames.", "Evaluate both again on the same split."
            )

    def alone(self) -> list[str | None]:
        """The decisions of the full look on everything."""
        return decided(self.full, self.rules, self.mission)

    def early(self, drop_threshold: float) -> list[Decision | None]:
        """For each frame the first look's decision; None where a full look is taken, and for a blank frame: neither."""

        def look(row: Prediction) -> Decision | None:
            return first_look(self.mission, row.scores, drop_threshold, rules=self.rules, unlike=row.unlike)

        return [None if row.blank else look(row) for row in self.cheap]

    def spared(self, drop_threshold: float) -> list[bool]:
        """For each frame whether the first look drops it, so that no full look is taken."""
        return [decision is not None for decision in self.early(drop_threshold)]

    def together(self, drop_threshold: float) -> list[str | None]:
        """The decisions of the cascade."""
        return [
            decision.category if decision else category
            for decision, category in zip(self.early(drop_threshold), self.alone(), strict=True)
        ]


def lowest_threshold(looks: Looks, largest_loss: float) -> float:
    """The probability from which the first look drops the most frames, with at most this loss on these frames.

    The loss is the share of valuable frames (to be sent or stored) that the first look drops and the full look would
    have kept. Raises OrionError if no frame is valuable, or if the mission has no categories to choose between.
    """
    mission = looks.mission
    valuable = len(valuable_frames(looks.full, largest_loss, mission))
    kept_alone = [
        index
        for index, (row, category) in enumerate(zip(looks.full, looks.alone(), strict=True))
        if mission.kept(row.truth) and not is_dropped(category, mission)
    ]

    def loss(threshold: float) -> float:
        spared = looks.spared(threshold)
        return sum(spared[index] for index in kept_alone) / valuable

    thresholds = candidates(looks.cheap, mission)
    # The loss falls as the threshold rises; at the last it is 0.
    return thresholds[bisect_left(thresholds, True, key=lambda threshold: loss(threshold) <= largest_loss)]


def effect(looks: Looks, drop_threshold: float, seconds: tuple[float, float] | None) -> dict[str, Any]:
    """What the cascade does to these frames against the full look on everything.

    `seconds`: of the cheap and of the full look at one frame; None if not measured. Returns the frames `spared` a full
    look (count, total), their share in orbit with the mission's prior ({value, low, high}; None if the split lacks a
    category), the headline rates `alone` and `cascade`, the valuable frames `lost` by the first look, with
    the paired p-value and the 95 % interval of the difference as a share of them, and the expected seconds per frame.
    """
    mission, rows = looks.mission, looks.full
    spared = np.array(looks.spared(drop_threshold))
    alone, together = looks.alone(), looks.together(drop_threshold)
    truth, places = truth_of(rows, mission), places_of(rows)
    dropped = mission.names.index(mission.that("drop")[0])
    in_orbit = orbit.orbit(truth, np.where(spared, dropped, NO_VERDICT), places, mission)
    share = in_orbit["dropped"] if in_orbit else None
    valuable = [
        (place, int(is_dropped(after, mission)) - int(is_dropped(before, mission)))
        for row, place, before, after in zip(rows, places, alone, together, strict=True)
        if mission.kept(row.truth)
    ]
    where, more = [place for place, _ in valuable], [change for _, change in valuable]
    low, high = clusters.paired_interval(more, where)
    return {
        "spared": {"count": int(spared.sum()), "total": len(rows)},
        "spared_in_orbit": share,
        "alone": value.headline(truth, guess_of(alone, mission), places, mission),
        "cascade": value.headline(truth, guess_of(together, mission), places, mission),
        "lost": sum(more),
        "p": clusters.paired_test(more, where).exact_p,
        "difference": {"low": low, "high": high},
        "seconds_per_frame": _seconds(seconds, share),
    }


def _seconds(seconds: tuple[float, float] | None, spared: dict[str, Any] | None) -> dict[str, float] | None:
    """Seconds of each look, and those expected in orbit for a frame that is not blank; None if one is not known."""
    if seconds is None or spared is None:
        return None
    cheap, full = seconds
    return {"first_look": cheap, "full_look": full, "expected": cheap + (1 - float(spared["value"])) * full}
