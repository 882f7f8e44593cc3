"""Counts and rates of the four conditions, computed from predictions; pure functions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from orion_triage.errors import OrionError
from orion_triage.evaluate import clusters
from orion_triage.evaluate.statistics import frames_to_resolve
from orion_triage.mission.fields import Fields
from orion_triage.mission.mission import FieldOfAnswer, Mission
from orion_triage.mission.scoring import FieldScores

UNPARSABLE = "unparsable"


@dataclass(frozen=True)
class Prediction:
    """One answer; `predicted` is None if it has no verdict, `blank` is the result of the blank rule, `unlike` that of
    the rule for frames unlike those of the training.

    `place` names the frame's place, which other frames can have too; empty if it is not known.

    `fields` are the values of the mission's further fields (empty without a verdict), `true_fields` the right ones,
    `field_scores` the probabilities of yes/no and choices.
    """

    condition: str
    name: str
    truth: str
    predicted: str | None
    donor_category: str | None = None
    scores: tuple[float, ...] | None = None
    blank: bool = False
    unlike: bool = False
    place: str = ""
    fields: Fields = ()
    true_fields: Fields = ()
    field_scores: FieldScores = field(default_factory=dict)


@dataclass(frozen=True)
class Change:
    """Comparison of two sets of answers to the same frames: frames gained and lost, percentage points, p-values.

    `low` and `high` are the 95 % interval of the difference as a share of the frames. Interval and p-values are over
    places: tiles of one place are alike.

    McNemar's p-values are two-sided: the probability of a split of the differing frames at least this uneven if both
    sets were equally good. The exact test is conservative on few frames, mid-p less so. `frames_to_resolve` is the
    number of frames at which a difference of this size would be significant; None without a difference.
    """

    gained: int
    lost: int
    points: float
    exact_p: float
    mid_p: float
    frames_to_resolve: int | None
    low: float
    high: float


def compare(
    first: Sequence[Prediction], second: Sequence[Prediction], named: str = "the two models under one condition"
) -> Change:
    """Compare two sets of predictions frame by frame, each of one model and condition.

    Raises OrionError, with what is compared (`named`), unless both are of the same frames.
    """
    before, after = ({p.name: p.predicted == p.truth for p in predictions} for predictions in (first, second))
    places = {p.name: p.place or p.name for p in second}
    if set(before) != set(after) or not before:
        alone = sorted(set(before) ^ set(after))
        example = f", the first is {alone[0]}" if alone else ""
        raise OrionError(
            f"the predictions of {named} are of different frames: {len(before)} and {len(after)}; {len(alone)} are of "
            f"one only{example}.",
            "Evaluate both again on the same split.",
        )
    names = sorted(before)
    changes, where = [int(after[name]) - int(before[name]) for name in names], [places[name] for name in names]
    return change_of(changes, where)


def change_of(changes: Sequence[int], places: Sequence[str]) -> Change:
    """The change by `changes` [frames], at least one: 1 gained, -1 lost, 0 alike."""
    gained, lost, total = changes.count(1), changes.count(-1), len(changes)
    test = clusters.paired_test(changes, places)
    low, high = clusters.paired_interval(changes, places)
    independent = clusters.effective_frames(changes, places, (-1.0, 1.0)) / total
    needed = frames_to_resolve(gained, lost, total)
    more = None if needed is None else math.ceil(needed / independent)
    return Change(gained, lost, 100 * (gained - lost) / total, test.exact_p, test.mid_p, more, low, high)


def places_of(predictions: Sequence[Prediction]) -> list[str]:
    """The label of each prediction's place; a frame whose place is not known is its own."""
    return [p.place or p.name for p in predictions]


def under(predictions: Sequence[Prediction], condition: str) -> list[Prediction]:
    """The predictions under one condition, by the frame's name."""
    return sorted((p for p in predictions if p.condition == condition), key=lambda p: p.name)


def summarize(predictions: Sequence[Prediction], mission: Mission) -> dict[str, Any]:
    """Condition -> accuracy, Wilson interval, per-class metrics, confusion matrix; for D also the trusted source.

    A mission with further fields adds `fields`: name -> its metrics (see `_field_rates`).

    An unparsable answer is a separate column of the confusion matrix and counts as wrong in every rate.
    """
    summary: dict[str, Any] = {}
    for condition in sorted({prediction.condition for prediction in predictions}):
        summary[condition] = _rates([p for p in predictions if p.condition == condition], mission)
    if "D" in summary:
        summary["D"] |= _trust(predictions)
    return summary


def _rates(predictions: Sequence[Prediction], mission: Mission) -> dict[str, Any]:
    total = len(predictions)
    right = sum(p.predicted == p.truth for p in predictions)
    confusion = {
        truth: {
            **{guess: sum(p.truth == truth and p.predicted == guess for p in predictions) for guess in mission.names},
            UNPARSABLE: sum(p.truth == truth and p.predicted is None for p in predictions),
        }
        for truth in mission.names
    }
    classes = {category: _class_rates(confusion, category) for category in mission.names}
    recalls = [rates["recall"] for rates in classes.values() if rates["recall"] is not None]
    low, high = clusters.rate_interval(np.array([p.predicted == p.truth for p in predictions]), places_of(predictions))
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
        **({"fields": {one.name: _field_rates(predictions, one) for one in mission.fields}} if mission.fields else {}),
    }


def _field_rates(predictions: Sequence[Prediction], field: FieldOfAnswer) -> dict[str, Any]:
    """How often a field's value is exactly right, with its interval over places; an answer without a verdict is wrong.

    Yes/no and choice: the confusion matrix. Whole number: answers that are at most 1 off, also with an interval, and
    the mean absolute error of the answers that have a value (None without any).
    """
    pairs = [(dict(p.true_fields)[field.name], dict(p.fields).get(field.name)) for p in predictions]
    rates: dict[str, Any] = _share([said == truth for truth, said in pairs], places_of(predictions))
    rates["unparsable"] = sum(said is None for _, said in pairs)
    if words := field.words:
        columns = [*((word, word) for word in words), (UNPARSABLE, None)]
        rates["confusion"] = {word: {name: pairs.count((word, said)) for name, said in columns} for word in words}
    elif field.kind == "whole number":
        off = [abs(int(said) - int(truth)) for truth, said in pairs if said is not None]
        near = [said is not None and abs(int(said) - int(truth)) <= 1 for truth, said in pairs]
        rates["within_one"] = _share(near, places_of(predictions))
        rates["mean_absolute_error"] = sum(off) / len(off) if off else None
    return rates


def _share(right: Sequence[bool], places: Sequence[str]) -> dict[str, Any]:
    found = clusters.rate(np.array(right), places)
    return {
        "right": found["count"],
        "count": found["total"],
        "accuracy": found["rate"],
        "low": found["low"],
        "high": found["high"],
    }


def _class_rates(confusion: dict[str, dict[str, int]], name: str) -> dict[str, float | None]:
    """Recall, precision and F1 of one class; None if the denominator is 0."""
    hit = confusion[name][name]
    actual = sum(confusion[name].values())
    called = sum(row[name] for row in confusion.values())
    recall = hit / actual if actual else None
    precision = hit / called if called else None
    f1 = 2 * hit / (actual + called) if actual + called else None
    return {"recall": recall, "precision": precision, "f1": f1}


def _trust(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Outcomes under D: right despite the coordinates, wrong as the coordinates suggest, or another answer.

    `same_wrong_answer_in_b` counts the frames that also get the donor's category without coordinates: a vision error,
    not trust in the coordinates. `moved_to_coordinates` counts the frames that get it under D but not under B.
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
