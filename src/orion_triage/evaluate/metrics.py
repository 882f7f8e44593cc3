"""Counts and rates of the four conditions, from predictions alone; pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orion_triage.errors import OrionError
from orion_triage.evaluate.statistics import frames_to_resolve, mcnemar, wilson
from orion_triage.mission.verdict import CATEGORIES, Category

UNPARSABLE = "unparsable"


@dataclass(frozen=True)
class Prediction:
    """One counted answer; `predicted` is None when the answer had no verdict, `blank` says what flight's rule says."""

    condition: str
    name: str
    truth: Category
    predicted: Category | None
    donor_category: Category | None = None
    scores: tuple[float, ...] | None = None
    blank: bool = False


@dataclass(frozen=True)
class Change:
    """Two sets of answers to the same frames: frames gained and lost, percentage points, McNemar's p-values.

    A p-value (two-sided) answers: had neither the edge, how often would the frames on which they differ split at least
    this unevenly? The exact one is cautious on few frames, mid-p less so. `frames_to_resolve` is how many frames a
    difference of this size would need; None where there is none.
    """

    gained: int
    lost: int
    points: float
    exact_p: float
    mid_p: float
    frames_to_resolve: int | None


def compare(first: Sequence[Prediction], second: Sequence[Prediction]) -> Change:
    """How often `second` is right where `first` is not, and the reverse; each is of one model and condition.

    Raises OrionError unless both saw the same frames.
    """
    before, after = ({p.name: p.predicted == p.truth for p in predictions} for predictions in (first, second))
    if set(before) != set(after) or not before:
        raise OrionError(
            "the two models' predictions under one condition are not of the same frames.",
            "Evaluate both again on one split.",
        )
    gained = sum(after[name] and not before[name] for name in before)
    lost = sum(before[name] and not after[name] for name in before)
    test = mcnemar(gained, lost)
    needed = frames_to_resolve(gained, lost, len(before))
    return Change(gained, lost, 100 * (gained - lost) / len(before), test.exact_p, test.mid_p, needed)


def under(predictions: Sequence[Prediction], condition: str) -> list[Prediction]:
    """Those under one condition, by the frame's name."""
    return sorted((p for p in predictions if p.condition == condition), key=lambda p: p.name)


def summarize(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Condition -> accuracy, Wilson interval, per-class figures, confusion; D also whom the model trusted.

    An unparsable answer is an outcome of its own in the confusion and wrong in every rate; none is left out.
    """
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
    """Under D: right in spite of the coordinates, wrong as the coordinates suggest, or anything else.

    `same_wrong_answer_in_b` counts the frames that get the donor's category without any coordinates already: a
    vision error, not trust. `moved_to_coordinates` are those that give it under D but not under B.
    """
    conflicts = [p for p in predictions if p.condition == "D"]
    without = {p.name: p.predicted for p in predictions if p.condition == "B"}
    vision = sum(p.predicted == p.truth for p in conflicts)
    fooled = [p.name for p in conflicts if p.predicted is not None and p.predicted == p.donor_category]
    wrong_in_b = {p.name for p in conflicts if without.get(p.name) is not None and without[p.name] == p.donor_category}
    return {
        "trusted_vision": vision,
        "trusted_coordinates": len(fooled),
        "trusted_neither": len(conflicts) - vision - len(fooled),
        "same_wrong_answer_in_b": len(wrong_in_b),
        "moved_to_coordinates": len(set(fooled) - wrong_in_b),
    }
