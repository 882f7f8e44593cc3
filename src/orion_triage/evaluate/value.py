"""Metrics of the answers for the downlink, and of their calibration; pure functions.

Arrays share one order of frames, at least one: `truth` int [frames] is the index of the category in the mission,
`guess` int [frames] likewise or NO_VERDICT, `scores` float [frames, K] the probability of each category, rows summing
to 1. `values` are what a frame of each category is worth on the ground, none negative.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orion_triage.errors import OrionError
from orion_triage.evaluate import clusters
from orion_triage.evaluate.statistics import NO_VERDICT, Integers
from orion_triage.mission.mission import ACTIONS, Mission

Floats = NDArray[np.float64]

SEND, STORE, DROP = range(len(ACTIONS))
# Equal probabilities can differ in the last bits between rows of a matrix product, which would break ties.
_DECIMALS_OF_A_RANK = 12
_SMALLEST_PROBABILITY = 1e-12  # one frame costs at most 27.6 nats
# With ten bins, a perfectly calibrated model has an error of 0.05 on 300 frames, and of 0.11 on 60 (simulated).
_FEWEST_FRAMES_FOR_CALIBRATION = 300


def acted(categories: Integers, mission: Mission) -> Integers:
    """What happens to frames of these categories [frames]: SEND, STORE or DROP; NO_VERDICT stays."""
    return np.array([*(ACTIONS.index(category.action) for category in mission.categories), NO_VERDICT])[categories]


def headline(truth: Integers, guess: Integers, places: Sequence[str], mission: Mission) -> dict[str, Any]:
    """The two most important rates for a mission, each {count, total, rate, low, high}, with an interval over `places`.

    `high_recall`: frames that are sent among those that ought to be. `irrecoverable_loss`: frames that are dropped,
    which deletes them on board, among the valuable ones, which ought to be sent or stored. Valuable frames without a
    verdict are not lost; `no_verdict` counts them. A rate is None if its total is 0.
    """
    wanted, done = acted(truth, mission), acted(guess, mission)
    valuable = wanted != DROP
    return {
        "high_recall": _rate(done == SEND, wanted == SEND, places),
        "irrecoverable_loss": _rate(done == DROP, valuable, places),
        "no_verdict": int(np.sum(done[valuable] == NO_VERDICT)),
    }


def _rate(hits: NDArray[np.bool_], among: NDArray[np.bool_], places: Sequence[str]) -> dict[str, Any]:
    return clusters.rate(hits[among], [place for place, counts in zip(places, among, strict=True) if counts])


def downlink(guess: Integers, mission: Mission) -> dict[str, float]:
    """Shares of the split's frames that are sent, stored, dropped, and without a verdict; they sum to 1."""
    done = acted(guess, mission)
    return {
        "sent": float(np.mean(done == SEND)),
        "stored": float(np.mean(done == STORE)),
        "dropped": float(np.mean(done == DROP)),
        "no_verdict": float(np.mean(done == NO_VERDICT)),
    }


@dataclass(frozen=True)
class ValueCurve:
    """Share of the total value received against the share of frames sent; both float [points], from 0 to 1."""

    budget: Floats
    value: Floats


def value_curve(truth: Integers, ranking: Floats, values: Sequence[float], weights: Floats | None = None) -> ValueCurve:
    """The value curve if frames are sent in descending order of `ranking` [frames]; a model's is scores @ values.

    `weights` [frames]: how many frames each one stands for (default: one).
    Frames of equal rank (to 12 decimals) are sent in random order, so the expected curve is a straight line there.
    Raises OrionError if no frame has a value.
    """
    many = np.ones(len(truth)) if weights is None else weights
    worth = np.asarray(values, dtype=np.float64)[truth] * many
    if not worth.any():
        raise OrionError(
            "no frame of the split has a value above 0, so frames cannot be ranked by value.",
            "Set a value above 0 for a category of the split.",
        )
    frames, gained = _cumulated(ranking, many, worth)
    return ValueCurve(np.append(0.0, frames / frames[-1]), np.append(0.0, gained / gained[-1]))


def value_at(curve: ValueCurve, budget: float) -> float:
    """The share of the total value in the first `budget` (0 to 1) of the frames; V(5 %) is at a budget of 0.05."""
    return float(np.interp(budget, curve.budget, curve.value))


def normalized_area(
    curve: ValueCurve, truth: Integers, values: Sequence[float], weights: Floats | None = None
) -> float | None:
    """1 if frames are sent in the order of their true value, 0 for a random order, below 0 for a worse one.

    None if all frames have the same value, because every order is then equally good.
    """
    worth = np.asarray(values, dtype=np.float64)[truth]
    ideal = _area(value_curve(truth, worth, values, weights))
    return (_area(curve) - 0.5) / (ideal - 0.5) if np.ptp(worth) else None


def _area(curve: ValueCurve) -> float:
    return float(np.trapezoid(curve.value, curve.budget))


def _cumulated(ranking: Floats, weights: Floats, amounts: Floats) -> tuple[Floats, Floats]:
    """Cumulative weights of frames, and cumulative amounts, at each distinct rank in descending order."""
    _, tie = np.unique(-np.round(ranking, _DECIMALS_OF_A_RANK), return_inverse=True)
    return np.cumsum(np.bincount(tie, weights=weights)), np.cumsum(np.bincount(tie, weights=amounts))


def best_constant(truth: Integers, mission: Mission, weights: Floats | None = None) -> tuple[int, float]:
    """The category (as an index) with the lowest cost if every frame gets it, and that cost per frame.

    Of equal categories, the first. `weights` [frames]: how many frames each one stands for (default: one).
    """
    per_action = np.average(np.asarray(mission.costs, dtype=np.float64)[truth], axis=0, weights=weights)
    per_category = per_action[acted(np.arange(len(mission.names)), mission)]
    best = int(per_category.argmin())
    return best, float(per_category[best])


def quadratic_kappa(truth: Integers, guess: Integers, mission: Mission) -> tuple[float | None, int]:
    """Cohen's kappa over dropped < stored < sent with quadratic weights, and the number of answers without a verdict.

    Answers without a verdict are excluded. Kappa is None if expected agreement is 1: with only one action.
    """
    from sklearn.metrics import cohen_kappa_score

    answered = guess != NO_VERDICT
    left_out = int((~answered).sum())
    wanted, done = acted(truth[answered], mission), acted(guess[answered], mission)
    if len(np.unique(np.concatenate([wanted, done]))) < 2:
        return None, left_out
    order = range(len(ACTIONS))
    return float(cohen_kappa_score(wanted, done, labels=order, weights="quadratic")), left_out


def brier(truth: Integers, scores: Floats) -> float:
    """Mean over frames of the sum of squared differences over the categories: 0 is best, 2 worst (Brier 1950)."""
    from sklearn.metrics import brier_score_loss

    order = range(scores.shape[1])
    return float(brier_score_loss(truth, scores, labels=order, scale_by_half=False))


def negative_log_likelihood(truth: Integers, scores: Floats) -> float:
    """Mean over frames of -ln of the true category's probability, which is limited to at least 1e-12; in nats.

    scikit-learn's log_loss limits it to 2e-16: one confident mistake would then cost 36 nats instead of 28.
    """
    return float(-np.mean(_logarithms(scores[np.arange(len(truth)), truth])))


def reliability(truth: Integers, scores: Floats, bins: int = 10) -> list[dict[str, Any]]:
    """Bins of a reliability diagram of the most likely category: {low, high, count, confidence, accuracy}.

    Bins have equal width from 0 to 1 and include their lower edge; the last also includes its upper edge. `confidence`
    is the mean probability; it and `accuracy` are None in an empty bin. Of equally likely categories, the first counts.
    """
    confidence, right = scores.max(axis=1), scores.argmax(axis=1) == truth
    place = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    rows = []
    for index in range(bins):
        inside = place == index
        rows.append(
            {
                "low": index / bins,
                "high": (index + 1) / bins,
                "count": int(inside.sum()),
                "confidence": float(confidence[inside].mean()) if inside.any() else None,
                "accuracy": float(right[inside].mean()) if inside.any() else None,
            }
        )
    return rows


def expected_calibration_error(truth: Integers, scores: Floats, bins: int = 10) -> float | None:
    """Mean over frames of |confidence - accuracy| of their bin (Guo et al. 2017); None for fewer than 300 frames.

    On few frames, it is mostly noise of the bins.
    """
    if len(truth) < _FEWEST_FRAMES_FOR_CALIBRATION:
        return None
    rows = [row for row in reliability(truth, scores, bins) if row["count"]]
    return sum(row["count"] * abs(row["confidence"] - row["accuracy"]) for row in rows) / len(truth)


def temper(scores: Floats, temperature: float) -> Floats:
    """softmax(ln(scores) / temperature): above 1 less confident, below 1 more, at 1 unchanged; the order is kept.

    Scores are limited to at least 1e-12, because a 0 would stay 0 at any temperature.
    """
    from scipy.special import softmax

    return softmax(_logarithms(scores) / temperature, axis=1)


def fit_temperature(truth: Integers, scores: Floats) -> float:
    """The temperature with the lowest negative log-likelihood, between e^-3 = 0.05 and e^3 = 20; fit it on val.

    It approaches 0.05 if every answer is right, and 20 if the answers are no better than chance.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax

    logarithms, frames = _logarithms(scores), np.arange(len(truth))

    # Not negative_log_likelihood: its limit caps the cost of confident mistakes, which would favour 0.05.
    def loss(log_temperature: float) -> float:
        return float(-np.mean(log_softmax(logarithms / math.exp(log_temperature), axis=1)[frames, truth]))

    return math.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded").x)


def _logarithms(scores: Floats) -> Floats:
    return np.log(np.maximum(scores, _SMALLEST_PROBABILITY))


@dataclass(frozen=True)
class RiskCoverage:
    """Error rate of the kept answers against the share kept, float [distinct confidences]; `area` under the curve."""

    coverage: Floats
    error_rate: Floats
    area: float


def risk_coverage(truth: Integers, guess: Integers, confidence: Floats) -> RiskCoverage:
    """The risk-coverage curve: answers are kept in descending order of `confidence` [frames], equal ones together.

    Confidences are compared to 12 decimals. An answer without a verdict is an error. `area` is the mean over frames of
    the error rate at the coverage that just includes the frame (Geifman and El-Yaniv 2017). It equals the overall error
    rate if the confidence carries no information.
    """
    kept, errors = _cumulated(confidence, np.ones(len(truth)), (guess != truth).astype(np.float64))
    error_rate = errors / kept
    area = np.sum(np.diff(kept, prepend=0) * error_rate) / len(truth)
    return RiskCoverage(kept / len(truth), error_rate, float(area))
