"""One answer of a model to one frame, and its JSON form."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from orion_triage.mission.mission import Mission
from orion_triage.mission.scoring import FieldScores, normalized
from orion_triage.mission.verdict import parse_verdict


@dataclass(frozen=True)
class Answer:
    """The text of an answer, and the probability of each category at the place of the category.

    The names of the categories are scored by the tokens in which they differ (`label_tree`). `scores` are the
    probabilities in the order of the mission's categories, normalized to a sum of 1; `label_mass` is their sum before.
    Both are None if the answer has no category or the backend returns no probabilities. `field_scores` are those of the
    values of yes/no and choice fields. `tokens` are those of prompt and answer, None if nobody counted them.
    """

    text: str
    scores: tuple[float, ...] | None = None
    label_mass: float | None = None
    field_scores: FieldScores = field(default_factory=dict)
    tokens: tuple[int, int] | None = None

    @classmethod
    def scored(
        cls, text: str, log_probabilities: Sequence[float] | None, field_scores: FieldScores | None = None
    ) -> "Answer":
        scores, mass = normalized(log_probabilities) if log_probabilities else (None, None)
        return cls(text, scores, mass, field_scores or {})

    def to_json(self, mission: Mission) -> dict[str, Any]:
        """The form in predictions.jsonl, the flight's log and a bundle's golden frames.

        `answer` (the text), `category` and `reason` (null without a verdict), `scores` by category and `label_mass`
        (null without probabilities). A mission with further fields adds `fields`: name -> value (null without a
        verdict), and `field_scores`: name of a yes/no or choice -> value -> probability.
        """
        verdict = parse_verdict(mission, self.text)
        return {
            "answer": self.text,
            "category": verdict.category if verdict else None,
            "reason": verdict.reason if verdict else None,
            **({"fields": dict(verdict.fields) if verdict else None} if mission.fields else {}),
            "scores": dict(zip(mission.names, self.scores, strict=True)) if self.scores else None,
            "label_mass": self.label_mass,
            **({"field_scores": {n: dict(of) for n, of in self.field_scores.items()}} if mission.fields else {}),
        }
