"""What the answers to a split say about the orbit, where categories have the mission's prior; pure functions.

A split has far more valuable frames than an orbit. The answers to a category's frames come from the split, and the
category's frequency from the prior. Arrays are those of value.py; `places` has one label per frame.

Intervals: each category's rates have Jeffreys intervals at their effective number of frames (clusters.py), which have a
width also at 0 and 100 %. MOVER combines them (Zou and Donner 2008): the distances from a sum to its ends are those of
its terms, squared and added. A bootstrap has no width where no frame of the split was answered wrongly.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orion_triage.evaluate.clusters import effective_frames
from orion_triage.evaluate.statistics import NO_VERDICT, Integers
from orion_triage.evaluate.value import DROP, SEND, STORE, Floats, acted
from orion_triage.mission.mission import Mission

_FRAMES_WITHOUT_ONE = 3  # the rule of three: without an event in n frames, its rate is below 3 / n (95 %)


@dataclass(frozen=True)
class Rate:
    """A category's share of some answer, with its 95 % interval."""

    share: float
    low: float
    high: float


def weights(truth: Integers, mission: Mission) -> Floats | None:
    """Weight of each frame in orbit: its category's prior divided by the category's frames here; they sum to 1.

    None if the split has no frame of a category with a prior above 0.
    """
    prior, frames = np.array(mission.prior), np.bincount(truth, minlength=len(mission.names))
    if (prior[frames == 0] > 0).any():
        return None
    return (prior / np.maximum(frames, 1))[truth] / prior.sum()


def orbit(truth: Integers, guess: Integers, places: Sequence[str], mission: Mission) -> dict[str, Any] | None:
    """Expected shares and cost per frame in orbit, and how sure an answer is there; None as in `weights`.

    `sent`, `stored`, `dropped` and `no_verdict` are shares of all frames, `precision` (by category) the share of the
    frames with this answer that are of the category (value None if the answer never occurs), and `cost` is the expected
    cost per frame; each {value, low, high}. `value_density`: mean value of the sent frames divided by that of all, 1
    for random sending, None if none is sent or has a value. `false_alarms`: see there.
    """
    many = weights(truth, mission)
    if many is None:
        return None
    strata = _Strata(truth, places, mission)
    done = acted(guess, mission)
    actions = {"sent": SEND, "stored": STORE, "dropped": DROP, "no_verdict": NO_VERDICT}
    recall = [strata.rate(done == SEND, index) for index in strata.of("send")]
    return {
        **{name: _figure(*strata.sum(done == action)) for name, action in actions.items()},
        "precision": {name: _precision(strata, guess == index, index) for index, name in enumerate(mission.names)},
        "cost": _figure(*_cost(strata, done, mission)),
        "value_density": _density(np.array(mission.values)[truth], done == SEND, many),
        "false_alarms": false_alarms(
            sum(w * r.share for w, r in zip(strata.prior[strata.of("send")], recall, strict=True)), truth, done, mission
        ),
    }


def _density(worth: Floats, sent: NDArray[np.bool_], many: Floats) -> float | None:
    every, share = float(np.sum(worth * many)), float(np.sum(many[sent]))
    return float(np.sum((worth * many)[sent])) / share / every if every and share else None


def false_alarms(found: float, truth: Integers, done: Integers, mission: Mission) -> dict[str, Any] | None:
    """How many frames to be dropped would show that at most half of what is sent is a false alarm.

    `found` is the share of all frames in orbit that are sent rightly. `largest_rate`: the share of the frames to be
    dropped that may be sent; `frames_needed`: so many without a false alarm show it by the rule of three; `frames` and
    `count`: the split's, and those that are sent. None without frames that are sent rightly or are to be dropped.
    """
    dropped = sum(mission.of(name).prior for name in mission.that("drop"))
    if not found or not dropped:
        return None
    largest = min(1.0, found / dropped)
    low = acted(truth, mission) == DROP
    return {
        "largest_rate": largest,
        "frames_needed": math.ceil(_FRAMES_WITHOUT_ONE / largest),
        "frames": int(low.sum()),
        "count": int((low & (done == SEND)).sum()),
    }


class _Strata:
    """The frames of each category, and its prior."""

    def __init__(self, truth: Integers, places: Sequence[str], mission: Mission) -> None:
        self.prior = np.array(mission.prior)
        self._mission = mission
        self._rows = [np.flatnonzero(truth == index) for index in range(len(mission.names))]
        self._places = [[places[int(row)] for row in rows] for rows in self._rows]

    def of(self, action: str) -> list[int]:
        """The categories that want this action, as indices."""
        return [index for index, one in enumerate(self._mission.categories) if one.action == action]

    def rate(self, hits: NDArray[np.bool_], index: int) -> Rate:
        """The share of a category's frames that are among `hits` [frames]; nothing is known of one without frames."""
        own = hits[self._rows[index]]
        if not len(own):
            return Rate(0.0, 0.0, 1.0)
        return Rate(float(own.mean()), *jeffreys(float(own.mean()), effective_frames(own, self._places[index])))

    def sum(self, hits: NDArray[np.bool_]) -> tuple[float, float, float]:
        """The share of all frames in orbit that are among `hits`, with its interval."""
        known = np.flatnonzero(self.prior)
        value, low, high = mover(self.prior[known], [self.rate(hits, int(index)) for index in known])
        return value, max(0.0, low), min(1.0, high)


def _cost(strata: _Strata, done: Integers, mission: Mission) -> tuple[float, float, float]:
    """The expected cost per frame: in each category, the cost of each action times its share; no verdict costs most.

    The shares of a category's actions exclude each other, which makes the interval a little wide.
    """
    terms, rates = list[float](), list[Rate]()
    for index in np.flatnonzero(strata.prior):
        costs = mission.costs[index]
        for action, each in [*zip((SEND, STORE, DROP), costs, strict=True), (NO_VERDICT, max(costs))]:
            if each and (action != NO_VERDICT or (done == action).any()):  # under a grammar there is always a verdict
                terms.append(float(strata.prior[index]) * each)
                rates.append(strata.rate(done == action, int(index)))
    return mover(terms, rates)


def _precision(strata: _Strata, hits: NDArray[np.bool_], index: int) -> dict[str, float | None]:
    """The share of the frames in orbit with an answer that are of category `index`.

    Its ends are where (1 - t) right - t wrong, with the interval of MOVER, just includes 0.
    """
    known = [int(one) for one in np.flatnonzero(strata.prior)]
    rates = [strata.rate(hits, one) for one in known]
    right = sum(strata.prior[one] * rate.share for one, rate in zip(known, rates, strict=True) if one == index)
    every = sum(strata.prior[one] * rate.share for one, rate in zip(known, rates, strict=True))
    if not every:
        return {"value": None, "low": None, "high": None}

    def end(which: int) -> float:
        def at(share: float) -> float:
            terms = [strata.prior[one] * ((1 - share) if one == index else -share) for one in known]
            return mover(terms, rates)[which]

        from scipy.optimize import brentq

        if at(0.0) <= 0:
            return 0.0
        return 1.0 if at(1.0) >= 0 else float(brentq(at, 0.0, 1.0))

    return _figure(float(right / every), end(1), end(2))


def mover(terms: Sequence[float] | Floats, rates: Sequence[Rate]) -> tuple[float, float, float]:
    """The sum of terms times independent rates, and the ends of its 95 % interval."""
    value = sum(term * rate.share for term, rate in zip(terms, rates, strict=True))
    down = up = 0.0
    for term, rate in zip(terms, rates, strict=True):
        below, above = term * (rate.share - rate.low), term * (rate.high - rate.share)
        down += max(below, -above) ** 2
        up += max(above, -below) ** 2
    return float(value), float(value - math.sqrt(down)), float(value + math.sqrt(up))


def jeffreys(share: float, frames: float) -> tuple[float, float]:
    """The 95 % Jeffreys interval of a share of `frames`, which need not be whole; from 0 if none, to 1 if all."""
    from scipy.stats import beta

    hits = share * frames
    low, high = beta.ppf([0.025, 0.975], hits + 0.5, frames - hits + 0.5)
    return 0.0 if share == 0 else float(low), 1.0 if share == 1 else float(high)


def _figure(value: float, low: float, high: float) -> dict[str, float | None]:
    return {"value": value, "low": low, "high": high}
