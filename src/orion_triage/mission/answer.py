"""One answer of a model to one frame, and its one form in JSON."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orion_triage.mission.verdict import CATEGORIES, parse_verdict


@dataclass(frozen=True)
class Answer:
    """What was said, and how likely each category was where the category begins.

    The reason is generated first; then the three labels are scored by the token that each begins with. `scores` are
    the three probabilities in the order of CATEGORIES, with a sum of 1; `label_mass` is what they had together before
    that. None where the answer never comes to its category, or the one who answers gives no probabilities.
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

    def to_json(self) -> dict[str, Any]:
        """As predictions.jsonl, the flight's log and a bundle's golden images hold it.

        `answer` (the text), `category` and `reason` (null without a verdict), `scores` by category and `label_mass`
        (null where there are none).
        """
        verdict = parse_verdict(self.text)
        return {
            "answer": self.text,
            "category": verdict.category.value if verdict else None,
            "reason": verdict.reason if verdict else None,
            "scores": dict(zip(CATEGORIES, self.scores, strict=True)) if self.scores else None,
            "label_mass": self.label_mass,
        }
