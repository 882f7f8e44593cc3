"""One answer of a model to one frame, and its JSON form."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orion_triage.mission.mission import Mission
from orion_triage.mission.verdict import parse_verdict


@dataclass(frozen=True)
class Answer:
    """The text of an answer, and the probability of each category at the place of the category.

    The names of the categories are scored by the tokens in which they differ (`label_tree`). `scores` are the
    probabilities in the order of the mission's categories, normalized to a sum of 1; `label_mass` is their sum before.
    Both are None if the answer has no category or the backend returns no probabilities.
    """

    text: str
    scores: tuple[float, ...] | None = None
    label_mass: float | None = None

    @classmethod
    def scored(cls, text: str, log_probabilities: Sequence[float] | None) -> "Answer":
        if log_probabilities is None:
            return cls(text)
        weights = [math.exp(value) for value in log_probabilities]
        mass = sum(weights)
        return cls(text, tuple(weight / mass for weight in weights), mass)

    def to_json(self, mission: Mission) -> dict[str, Any]:
        """The form in predictions.jsonl, the flight's log and a bundle's golden images.

        `answer` (the text), `category` and `reason` (null without a verdict), `scores` by category and `label_mass`
        (null without probabilities). A mission with further fields adds `fields`: name -> value (null without a
        verdict).
        """
        verdict = parse_verdict(mission, self.text)
        return {
            "answer": self.text,
            "category": verdict.category if verdict else None,
            "reason": verdict.reason if verdict else None,
            **({"fields": dict(verdict.fields) if verdict else None} if mission.fields else {}),
            "scores": dict(zip(mission.names, self.scores, strict=True)) if self.scores else None,
            "label_mass": self.label_mass,
        }
