"""The decision about a frame, shared by flight, report, threshold and bundle."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from orion_triage.mission.mission import Mission, listed

BLANK_REASON = "Blank frame: no image content to judge."


@dataclass(frozen=True)
class Rules:
    """What decides besides the model's answer. Without rules, the answer's category counts.

    `blank`: a blank frame gets the mission's category for it, whatever the model answers. `drop_threshold`: a frame is
    dropped if the probability of the categories that are dropped is at least this value; above 1, scores drop no frame.
    """

    drop_threshold: float | None = None
    blank: bool = True


@dataclass(frozen=True)
class Decision:
    """The category of a frame, which says what happens to it, and what decided it.

    With the category None, the frame is neither sent nor dropped, and counts as without a verdict.
    """

    category: str | None
    by: Literal["blank rule", "threshold", "model", "no verdict"]


def decide(
    mission: Mission, said: str | None, scores: Sequence[float] | None, *, blank: bool, rules: Rules
) -> Decision:
    """The decision about one frame.

    `said` is the answer's category, None without a verdict; `scores` are the probabilities of the mission's categories,
    or None. Steps in this order:

    1. A blank frame gets the mission's category for blank frames, if it has one and the rule is on.
    2. An answer without a verdict decides nothing, whatever its scores; the mission can give it a category.
    3. With a threshold, the scores decide: if the categories that are dropped have it together, the likeliest of them,
       else the likeliest of the others (the first if equal). An answer without scores keeps its category.
    """
    if blank and rules.blank and mission.blank:
        return Decision(mission.blank, "blank rule")
    if said is None:
        return Decision(mission.unparsable or None, "no verdict")
    if rules.drop_threshold is None or scores is None:
        return Decision(said, "model")
    of = dict(zip(mission.names, scores, strict=True))
    drops = drop_probability(mission, scores) >= rules.drop_threshold
    return Decision(
        max(mission.that("drop") if drops else mission.that("send", "store"), key=of.__getitem__), "threshold"
    )


def drop_probability(mission: Mission, scores: Sequence[float]) -> float:
    """The probability that a frame is of a category that is dropped."""
    return sum(score for name, score in zip(mission.names, scores, strict=True) if not mission.kept(name))


def in_words(mission: Mission, rules: Rules) -> list[str]:
    """The rules as text for developers of flight software, one sentence per step, in the order of `decide`."""
    words = []
    if rules.blank and mission.blank:
        words.append(f"A blank frame is {mission.blank}. The model is not asked about it.")
    if mission.unparsable:
        words.append(f"An answer without a valid verdict is {mission.unparsable}: count it.")
    else:
        words.append("An answer without a valid verdict decides nothing: keep the frame and count it.")
    if rules.drop_threshold is None:
        words.append("Otherwise, use the category in the answer. No threshold was chosen.")
        return words
    dropped, kept = mission.that("drop"), mission.that("send", "store")
    score = f"the score of {dropped[0]}" if len(dropped) == 1 else f"the sum of the scores of {listed(dropped)}"
    which = dropped[0] if len(dropped) == 1 else f"the one of {listed(dropped)} with the highest score"
    other = listed(kept, "or")
    rest = other if len(kept) == 1 else f"{other}, whichever has the higher score ({kept[0]} if equal)"
    words.append(
        f"With scores: {which} if {score} is at least {rules.drop_threshold} (the threshold, chosen on val); "
        f"otherwise {rest}."
    )
    words.append("Without scores: use the category in the answer.")
    return words
