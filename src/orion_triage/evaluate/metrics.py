"""Counts and rates of the four conditions, from predictions alone; pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orion_triage.triage import CATEGORIES, Category

UNPARSABLE = "unparsable"


@dataclass(frozen=True)
class Prediction:
    """One counted answer; `predicted` is None when the answer had no verdict."""

    condition: str
    name: str
    truth: Category
    predicted: Category | None
    donor_category: Category | None = None


def wilson(successes: int, total: int) -> tuple[float, float]:
    """The 95 % Wilson interval of a rate."""
    from scipy.stats import binomtest

    interval = binomtest(successes, total).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Exact two-sided p-value that two models are right equally often on the same frames."""
    from scipy.stats import binomtest

    gained = sum(b and not a for a, b in zip(first, second, strict=True))
    lost = sum(a and not b for a, b in zip(first, second, strict=True))
    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def summarize(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Condition -> accuracy, Wilson interval, per-class figures, confusion; D also whom the model trusted."""
    summary: dict[str, Any] = {}
    for condition in sorted({prediction.condition for prediction in predictions}):
        summary[condition] = _rates([p for p in predictions if p.condition == condition])
    if "D" in summary:
        summary["D"] |= _trust(predictions)
    return summary


def _rates(predictions: Sequence[Prediction]) -> dict[str, Any]:
    total = len(predictions)
    right = sum(p.predicted == p.truth for p in predictions)
    confusion = {
        truth.value: {
            **{
                guess.value: sum(p.truth == truth and p.predicted == guess for p in predictions) for guess in CATEGORIES
            },
            UNPARSABLE: sum(p.truth == truth and p.predicted is None for p in predictions),
        }
        for truth in CATEGORIES
    }
    classes = {category.value: _class_rates(confusion, category.value) for category in CATEGORIES}
    recalls = [rates["recall"] for rates in classes.values() if rates["recall"] is not None]
    low, high = wilson(right, total)
    return {
        "count": total,
        "right": right,
        "accuracy": right / total,
        "accuracy_low": low,
        "accuracy_high": high,
        "balanced_accuracy": sum(recalls) / len(recalls),
        "unparsable": sum(p.predicted is None for p in predictions),
        "classes": classes,
        "confusion": confusion,
    }


def _class_rates(confusion: dict[str, dict[str, int]], name: str) -> dict[str, float | None]:
    """Recall, precision and F1 of one class; None where nothing is there to count."""
    hit = confusion[name][name]
    actual = sum(confusion[name].values())
    called = sum(row[name] for row in confusion.values())
    recall = hit / actual if actual else None
    precision = hit / called if called else None
    f1 = 2 * hit / (actual + called) if actual + called else None
    return {"recall": recall, "precision": precision, "f1": f1}


def _trust(predictions: Sequence[Prediction]) -> dict[str, Any]:
    conflicts = [p for p in predictions if p.condition == "D"]
    without = {p.name: p.predicted for p in predictions if p.condition == "B"}
    vision = sum(p.predicted == p.truth for p in conflicts)
    coordinates = sum(p.predicted is not None and p.predicted == p.donor_category for p in conflicts)
    return {
        "trusted_vision": vision,
        "trusted_coordinates": coordinates,
        "trusted_neither": len(conflicts) - vision - coordinates,
        # The same wrong answer without any coordinates is a vision error, not trust in the coordinates.
        "same_wrong_answer_in_b": sum(
            without.get(p.name) is not None and without[p.name] == p.donor_category for p in conflicts
        ),
    }
