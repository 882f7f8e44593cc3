"""Metrics of one model under one condition for a mission: frames sent and lost, calibration; pure functions."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from orion_triage.evaluate import clusters, orbit, value
from orion_triage.evaluate.metrics import Prediction, places_of
from orion_triage.evaluate.statistics import (
    NO_VERDICT,
    Integers,
    balanced_accuracy,
    confusion,
    confusion_bootstrap,
    geographic_block,
    macro_f1,
)
from orion_triage.mission.mission import Mission
from orion_triage.mission.prompt import Coordinates

BUDGETS = (0.05, 0.10, 0.25)  # shares of the frames that are sent
_SEED = 42


def judge(predictions: Sequence[Prediction], places: Mapping[str, Coordinates], mission: Mission) -> dict[str, Any]:
    """The metrics of one model under one condition; `places` has the true coordinates of each frame, by name.

    Intervals of rates are over places (see clusters.py); `over_blocks` has them over blocks of 10 degrees, because
    frames of one region are not independent either. Those of macro-F1 and balanced accuracy are bootstrapped over these
    blocks. An answer without scores counts as equally likely categories.
    """
    truth = truth_of(predictions, mission)
    guess = guess_of([p.predicted for p in predictions], mission)
    where = [places[p.name] for p in predictions]
    named = [clusters.place_label(place.lon, place.lat) for place in where]
    blocks = [geographic_block(place.lon, place.lat) for place in where]
    in_orbit = orbit.orbit(truth, guess, named, mission)
    constant, constant_cost = value.best_constant(truth, mission, orbit.weights(truth, mission))
    kappa, left_out = value.quadratic_kappa(truth, guess, mission)
    categories = len(mission.names)

    def bootstrapped(statistic: Any) -> dict[str, float | None]:
        low, high = confusion_bootstrap(statistic, truth, guess, categories, blocks, seed=_SEED)
        measured = float(statistic(confusion(truth, guess, categories)))
        return {name: _number(x) for name, x in (("value", measured), ("low", low), ("high", high))}

    headline = value.headline(truth, guess, named, mission)
    over_blocks = value.headline(truth, guess, blocks, mission)
    return {
        "places": len(set(where)),
        "blocks": len(set(blocks)),
        "macro_f1": bootstrapped(macro_f1),
        "balanced_accuracy_interval": bootstrapped(balanced_accuracy),
        **headline,
        "over_blocks": {
            "accuracy": list(clusters.rate_interval(guess == truth, blocks)),
            **{
                name: [over_blocks[name][end] for end in ("low", "high")]
                for name in ("high_recall", "irrecoverable_loss")
            },
        },
        "downlink": value.downlink(guess, mission),
        "orbit": in_orbit
        and in_orbit | {"best_constant": {"category": mission.names[constant], "cost": constant_cost}},
        "quadratic_kappa": kappa,
        "quadratic_kappa_left_out": left_out,
        "scored": sum(p.scores is not None for p in predictions),
        **(_of_scores(predictions, truth, guess, mission) if any(p.scores for p in predictions) else {}),
    }


def headline_of(predictions: Sequence[Prediction], mission: Mission) -> dict[str, Any]:
    """`value.headline` of one model under one condition; intervals are over places."""
    truth, guess = truth_of(predictions, mission), guess_of([p.predicted for p in predictions], mission)
    return value.headline(truth, guess, places_of(predictions), mission)


def truth_of(predictions: Sequence[Prediction], mission: Mission) -> Integers:
    """The true categories [frames], as indices into the mission's."""
    return np.array([mission.names.index(p.truth) for p in predictions], dtype=np.int64)


def guess_of(categories: Sequence[str | None], mission: Mission) -> Integers:
    """The answered categories [frames], as indices into the mission's; NO_VERDICT for None."""
    return np.array([NO_VERDICT if c is None else mission.names.index(c) for c in categories], dtype=np.int64)


def scores_of(predictions: Sequence[Prediction], mission: Mission) -> value.Floats:
    """The scores [frames, K]; an equal share for each category where an answer has none."""
    even = (1 / len(mission.names),) * len(mission.names)
    return np.array([p.scores or even for p in predictions], dtype=np.float64)


def _of_scores(predictions: Sequence[Prediction], truth: Integers, guess: Integers, mission: Mission) -> dict[str, Any]:
    scores = scores_of(predictions, mission)
    kept = value.risk_coverage(truth, guess, scores.max(axis=1))
    return {
        "brier": value.brier(truth, scores),
        "negative_log_likelihood": value.negative_log_likelihood(truth, scores),
        "reliability": value.reliability(truth, scores),
        "expected_calibration_error": value.expected_calibration_error(truth, scores),
        "value_curve": value_figures(truth, expected_value(scores, guess, mission), mission),
        "risk_coverage": {
            "coverage": kept.coverage.tolist(),
            "error_rate": kept.error_rate.tolist(),
            "area": kept.area,
        },
    }


def expected_value(scores: value.Floats, guess: Integers, mission: Mission) -> value.Floats:
    """The value by which frames are ranked for sending [frames]; -1 for one that is dropped: it is deleted on board."""
    return np.where(value.acted(guess, mission) == value.DROP, -1.0, scores @ np.array(mission.values))


def value_figures(truth: Integers, ranking: value.Floats, mission: Mission) -> dict[str, Any] | None:
    """The curve of value against budget in orbit, its normalized area, and the value at each of BUDGETS.

    None if the split has no frame of a category that the orbit has.
    """
    weights = orbit.weights(truth, mission)
    if weights is None:
        return None
    curve = value.value_curve(truth, ranking, mission.values, weights)
    return {
        "budget": curve.budget.tolist(),
        "value": curve.value.tolist(),
        "normalized_area": value.normalized_area(curve, truth, mission.values, weights),
        "at": {f"{budget:.0%}": value.value_at(curve, budget) for budget in BUDGETS},
    }


def ideal_figures(truth: Integers, mission: Mission) -> dict[str, Any] | None:
    """`value_figures` of frames sent in the order of their true value."""
    return value_figures(truth, np.array(mission.values, dtype=np.float64)[truth], mission)


def _number(x: float) -> float | None:
    return None if math.isnan(x) else x
