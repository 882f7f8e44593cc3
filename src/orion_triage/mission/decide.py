"""The decision about a frame, shared by flight, report, threshold and bundle."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from orion_triage.mission.mission import FieldOfAnswer, Mission, listed
from orion_triage.mission.scoring import FieldScores

Appearance = Mapping[str, Sequence[float]]  # measure of a frame -> its smallest and largest value among those known

BLANK_REASON = "Blank frame: no image content to judge."


@dataclass(frozen=True)
class Rules:
    """What decides besides the model's answer. Without rules, the answer's category counts.

    `blank`: a blank frame gets the mission's category for it, whatever the model answers. `drop_threshold`: a frame is
    dropped if the probability of the categories that are dropped is at least this value; above 1, scores drop no frame.
    `appearance`: a frame with a measure outside these ranges is never dropped by scores or answer: the model was not
    made for it.
    """

    drop_threshold: float | None = None
    blank: bool = True
    appearance: Appearance | None = None


@dataclass(frozen=True)
class Decision:
    """The category of a frame, which says what happens to it, and what decided it.

    With the category None, the frame is neither sent nor dropped, and counts as without a verdict. `field` is that
    whose rule decided.
    """

    category: str | None
    by: Literal["blank rule", "first look", "field rule", "unlike training", "threshold", "model", "no verdict"]
    field: str = ""


def decide(
    mission: Mission,
    said: str | None,
    scores: Sequence[float] | None,
    *,
    blank: bool,
    rules: Rules,
    field_scores: FieldScores | None = None,
    unlike: bool = False,
) -> Decision:
    """The decision about one frame.

    `said` is the answer's category, None without a verdict; `scores` are the probabilities of the mission's categories,
    or None, and `field_scores` those of its fields' values. `unlike`: whether the frame is outside the ranges of
    `rules.appearance` (`is_unlike`). Steps in this order:

    1. A blank frame gets the mission's category for blank frames, if it has one and the rule is on.
    2. An answer without a verdict decides nothing, whatever its scores; the mission can give it a category.
    3. The first field whose rule holds gives the rule's category.
    4. With a threshold, the scores decide: if the categories that are dropped have it together, the likeliest of them,
       else the likeliest of the others (the first if equal). An answer without scores keeps its category.
    5. An unlike frame that would be dropped by step 4 or by its answer is stored instead, or sent if nothing is stored.
    """
    if blank and rules.blank and mission.blank:
        return Decision(mission.blank, "blank rule")
    if said is None:
        return Decision(mission.unparsable or None, "no verdict")
    for field in mission.fields:
        if field.when and holds(field, field_scores or {}):
            return Decision(field.then, "field rule", field.name)
    if rules.drop_threshold is None or scores is None:
        decision = Decision(said, "model")
    else:
        of = dict(zip(mission.names, scores, strict=True))
        drops = drop_probability(mission, scores) >= rules.drop_threshold
        among = mission.that("drop") if drops else mission.that("send", "store")
        decision = Decision(max(among, key=of.__getitem__), "threshold")
    if unlike and rules.appearance and not mission.kept(decision.category) and (instead := _instead(mission)):
        return Decision(_likeliest(mission, instead, scores), "unlike training")
    return decision


def first_look(
    mission: Mission, scores: Sequence[float] | None, drop_threshold: float, *, rules: Rules, unlike: bool = False
) -> Decision | None:
    """The decision by a cheap look before the full one: dropped, if it is sure enough; else None, for the full look.

    `scores` are the cheap look's probabilities of the mission's categories, `drop_threshold` the probability of the
    categories that are dropped from which no full look is taken. `rules` are those of the full look, which decides
    whatever they speak of: an unlike frame, and every frame of a mission whose fields have a rule, because the cheap
    look sees no field. Without scores, the full look decides.
    """
    if (unlike and rules.appearance) or any(field.when for field in mission.fields):
        return None
    if scores is None or drop_probability(mission, scores) < drop_threshold:
        return None
    return Decision(_likeliest(mission, mission.that("drop"), scores), "first look")


def _instead(mission: Mission) -> tuple[str, ...]:
    """The categories of unlike frames that would be dropped: those that are stored, or else sent."""
    return mission.that("store") or mission.that("send")


def _likeliest(mission: Mission, among: Sequence[str], scores: Sequence[float] | None) -> str:
    """The likeliest of these categories, the first if equal or without scores."""
    of = dict(zip(mission.names, scores or [0.0] * len(mission.names), strict=True))
    return max(among, key=of.__getitem__)


def is_unlike(measures: Mapping[str, float], rules: Rules) -> bool:
    """Whether a measure of a frame is outside its range; never without ranges."""
    return any(not low <= measures[name] <= high for name, (low, high) in (rules.appearance or {}).items())


def holds(field: FieldOfAnswer, field_scores: FieldScores) -> bool:
    """Whether the field's rule holds; it does not in an answer without the field's probabilities."""
    return field_scores.get(field.name, {}).get(field.when, 0.0) >= field.probability


def by_in_words(mission: Mission, decision: Decision, rules: Rules) -> str:
    """What decided a frame, in the flight's log: "threshold 0.162", "smoke is yes", or the decision's own word."""
    if decision.by == "threshold":
        return f"threshold {rules.drop_threshold:.3f}"
    if decision.by == "field rule":
        return next(f"{field.name} is {field.when}" for field in mission.fields if field.name == decision.field)
    return decision.by


def drop_probability(mission: Mission, scores: Sequence[float]) -> float:
    """The probability that a frame is of a category that is dropped."""
    return sum(score for name, score in zip(mission.names, scores, strict=True) if not mission.kept(name))


def as_steps(mission: Mission, rules: Rules, blank_limits: dict[str, Any]) -> list[dict[str, Any]]:
    """The rules as data for programs, in the order of `decide`: the first step that applies decides.

    But for "unlike training", which is for the decisions of the steps after it: what they would drop is kept.

    `blank_limits` are the limits of the blank rule (rows, entropy in bits, gradient in grey levels). The step "no
    answer" is for a frame that was refused or that the model did not answer in time: it is kept and counted. A category
    of None keeps the frame, too.
    """
    steps: list[dict[str, Any]] = []
    if rules.blank and mission.blank:
        steps.append({"step": "blank rule", **blank_limits, "category": mission.blank})
    steps.append({"step": "no answer", "category": None, "action": "store"})
    steps.append({"step": "no verdict", "category": mission.unparsable or None})
    steps += [
        {
            "step": "field rule",
            "field": field.name,
            "value": field.when,
            "probability_at_least": field.probability,
            "category": field.then,
        }
        for field in mission.fields
        if field.when
    ]
    if rules.appearance and _instead(mission):
        steps.append(
            {
                "step": "unlike training",
                "rows": blank_limits["rows"],
                "ranges": {name: list(ends) for name, ends in rules.appearance.items()},
                "dropped": list(mission.that("drop")),
                "instead": list(_instead(mission)),
            }
        )
    if rules.drop_threshold is not None:
        steps.append(
            {
                "step": "threshold",
                "drop_probability_at_least": rules.drop_threshold,
                "dropped": list(mission.that("drop")),
                "kept": list(mission.that("send", "store")),
            }
        )
    return [*steps, {"step": "model"}]


def in_words(mission: Mission, rules: Rules, chosen_on: str = "val") -> list[str]:
    """The rules as text for developers of flight software, one sentence per step, in the order of `decide`.

    `chosen_on` names the frames that the threshold was chosen on.
    """
    words = []
    if rules.blank and mission.blank:
        words.append(f"A blank frame is {mission.blank}. The model is not asked about it.")
    words.append('A frame that is refused, or not answered in time, is stored and counted: decided_by "no answer".')
    if mission.unparsable:
        words.append(f"An answer without a valid verdict is {mission.unparsable}: count it.")
    else:
        words.append("An answer without a valid verdict decides nothing: keep the frame and count it.")
    words += [
        f"If {field.name} is {field.when} with a probability of at least {field.probability:g}, the frame is "
        f"{field.then}, whatever the scores of the categories."
        for field in mission.fields
        if field.when
    ]
    if rules.appearance and _instead(mission):
        words.append(
            'A frame with a measure outside its range (grey levels, entropy, gradient: "ranges" in bundle.json) is '
            f"unlike all frames that the model was made from. If the next steps would drop it, it is "
            f"{listed(_instead(mission), 'or')} instead."
        )
    if rules.drop_threshold is None:
        words.append("Otherwise, use the category in the answer. No threshold was chosen.")
        return words
    dropped, kept = mission.that("drop"), mission.that("send", "store")
    score = f"the score of {dropped[0]}" if len(dropped) == 1 else f"the sum of the scores of {listed(dropped)}"
    which = dropped[0] if len(dropped) == 1 else f"the one of {listed(dropped)} with the highest score"
    other = listed(kept, "or")
    rest = other if len(kept) == 1 else f"{other}, whichever has the higher score ({kept[0]} if equal)"
    words.append(
        f"With scores: {which} if {score} is at least {rules.drop_threshold} (the threshold, chosen on {chosen_on}); "
        f"otherwise {rest}."
    )
    words.append("Without scores: use the category in the answer.")
    return words
