"""What happens to a frame: the one decision that flight, report, threshold and bundle share."""

from collections.abc import Sequence
from dataclasses import dataclass

from orion_triage.mission.verdict import Category

BLANK_REASON = "Blank frame: no image content to judge."


@dataclass(frozen=True)
class Rules:
    """How a mission decides. Without any, an answer's own category counts.

    `blank_is_low`: a blank frame is LOW, whatever a model says of it: it would cost downlink and shows nothing.
    `low_threshold`: a frame is dropped when its P(LOW) is at least this; above 1 the scores drop none.
    """

    low_threshold: float | None = None
    blank_is_low: bool = True


def decide(said: Category | None, scores: Sequence[float] | None, *, blank: bool, rules: Rules) -> Category | None:
    """The frame's category, or None: then the frame is neither sent nor dropped, and counts as without a verdict.

    `said` is the category that the answer names, None where the answer has no verdict; `scores` are the probabilities
    of HIGH, MEDIUM and LOW, None where the answer has none. In this order:

    1. A blank frame is LOW, if the rules say so.
    2. An answer without a verdict decides nothing, whatever its scores.
    3. With a threshold, scores decide: LOW from the threshold on, else HIGH or MEDIUM, whichever is likelier (HIGH of
       equals). An answer without scores keeps its own category.
    """
    if blank and rules.blank_is_low:
        return Category.LOW
    if said is None or rules.low_threshold is None or scores is None:
        return said
    high, medium, low = scores
    if low >= rules.low_threshold:
        return Category.LOW
    return Category.HIGH if high >= medium else Category.MEDIUM


def in_words(rules: Rules) -> list[str]:
    """The rules for whoever writes or checks flight software: one sentence a step, in the order of `decide`."""
    words = []
    if rules.blank_is_low:
        words.append("A blank frame is LOW. The model is not asked about it.")
    words.append("An answer that is no verdict decides nothing: keep the frame, and count it.")
    if rules.low_threshold is None:
        words.append("Else the category that the answer names. No threshold was chosen.")
    else:
        words.append(
            f"With scores: LOW when the score of LOW is at least {rules.low_threshold} (the threshold, chosen on val); "
            "else HIGH or MEDIUM, whichever scores higher (HIGH of equals)."
        )
        words.append("Without scores: the category that the answer names.")
    return words
