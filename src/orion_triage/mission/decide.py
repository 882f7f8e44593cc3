"""The decision about a frame, shared by flight, report, threshold and bundle."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from orion_triage.mission.verdict import Category

BLANK_REASON = "Blank frame: no image content to judge."


@dataclass(frozen=True)
class Rules:
    """The decision rules of a mission. Without rules, the answer's category counts.

    `blank_is_low`: a blank frame is LOW, whatever the model answers, because it shows nothing and would cost downlink.
    `low_threshold`: a frame is dropped if its P(LOW) is at least this value; above 1, scores drop no frame.
    """

    low_threshold: float | None = None
    blank_is_low: bool = True


@dataclass(frozen=True)
class Decision:
    """What happens to a frame, and what decided it.

    With the category None, the frame is neither sent nor dropped, and counts as without a verdict.
    """

    category: Category | None
    by: Literal["blank rule", "threshold", "model", "no verdict"]


def decide(said: Category | None, scores: Sequence[float] | None, *, blank: bool, rules: Rules) -> Decision:
    """The decision about one frame.

    `said` is the answer's category, None without a verdict; `scores` are the probabilities of HIGH, MEDIUM and LOW, or
    None. Steps in this order:

    1. A blank frame is LOW if `blank_is_low` is set.
    2. An answer without a verdict decides nothing, whatever its scores.
    3. With a threshold, the scores decide: LOW at or above the threshold, else the more likely of HIGH and MEDIUM (HIGH
       if equal). An answer without scores keeps its category.
    """
    if blank and rules.blank_is_low:
        return Decision(Category.LOW, "blank rule")
    if said is None:
        return Decision(None, "no verdict")
    if rules.low_threshold is None or scores is None:
        return Decision(said, "model")
    high, medium, low = scores
    if low >= rules.low_threshold:
        return Decision(Category.LOW, "threshold")
    return Decision(Category.HIGH if high >= medium else Category.MEDIUM, "threshold")


def in_words(rules: Rules) -> list[str]:
    """The rules as text for developers of flight software, one sentence per step, in the order of `decide`."""
    words = []
    if rules.blank_is_low:
        words.append("A blank frame is LOW. The model is not asked about it.")
    words.append("An answer without a valid verdict decides nothing: keep the frame and count it.")
    if rules.low_threshold is None:
        words.append("Otherwise, use the category in the answer. No threshold was chosen.")
    else:
        words.append(
            f"With scores: LOW if the score of LOW is at least {rules.low_threshold} (the threshold, chosen on val); "
            "otherwise HIGH or MEDIUM, whichever has the higher score (HIGH if equal)."
        )
        words.append("Without scores: use the category in the answer.")
    return words
