"""The contract between ground and flight: the answer and its grammar.

Datasets, adapters and deployed flight software use these exact bytes. Only this module makes them, from the mission's
categories.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orion_triage.errors import OrionError
from orion_triage.mission.fields import Fields, examples, gbnf, longest_values, schema, value_fault
from orion_triage.mission.mission import CONTROL, PLAIN, Mission, listed


@dataclass(frozen=True)
class Verdict:
    """The model's verdict on one frame; `fields` are the further fields' names and values, in the mission's order."""

    reason: str
    category: str
    fields: Fields = ()


def answer_text(mission: Mission, verdict: Verdict) -> str:
    """The answer's bytes: the mission's keys in their order, one space after each colon and comma."""
    values = {"reason": verdict.reason, "category": verdict.category, **dict(verdict.fields)}
    return json.dumps({key: values[key] for key in mission.keys})


def cue_of(key: str) -> str:
    """The text after which the value of a key that is a string begins in the answer."""
    return f'{json.dumps(key)}: "'


CATEGORY_CUE = cue_of("category")  # what follows it in the answer determines the category


def answer_start(mission: Mission) -> str:
    """The beginning of an answer without a reason; the model continues it with the category.

    Raises OrionError for a mission with fields that must have a value.
    """
    require_category_alone(mission)
    return around(mission, "")[0]


def category_alone(mission: Mission, category: str) -> str:
    """The answer that has only the category: its reason and its short texts are empty."""
    require_category_alone(mission)
    return answer_text(mission, Verdict("", category, examples(mission, "")))


def require_category_alone(mission: Mission) -> None:
    """Raise OrionError if the category alone is not an answer: if a field must have a value."""
    if names := _needing_a_value(mission):
        raise OrionError(
            f"the mission {mission.name} cannot be asked for the category alone (verdict-only): its answers need "
            f"a value of {listed(names)}.",
            "Leave verdict-only out.",
        )


def can_be_category_alone(mission: Mission) -> bool:
    return not _needing_a_value(mission)


def _needing_a_value(mission: Mission) -> list[str]:
    """The fields that cannot be empty."""
    return [field.name for field in mission.fields if field.kind != "short text"]


def around(mission: Mission, text: str) -> tuple[str, str]:
    """The answer with this text as the reason and in text fields, before and after the name of the category."""
    before, _, after = answer_text(mission, Verdict(text, "", examples(mission, text))).partition(CATEGORY_CUE)
    return before + CATEGORY_CUE, after


def answer_tokens(mission: Mission) -> int:
    """Tokens that are enough for every answer of the grammar: a token has at least one character."""
    longest = Verdict("x" * mission.longest_reason, max(mission.names, key=len), longest_values(mission))
    return len(answer_text(mission, longest)) + 4


def tokens_of_fields(mission: Mission) -> int:
    """Tokens that are enough for the further fields of every answer; 0 without such fields."""
    return sum(len(json.dumps({name: value})) for name, value in longest_values(mission))


def grammar(mission: Mission, category: str = "") -> str:
    """The answer in llama.cpp's GBNF; with a `category`, that of this category.

    Exactly the bytes of `answer_text`, so the answer has the tokens of training: one space after colon and comma,
    printable ASCII without quote and backslash in the reason.
    """
    return f"root ::= {_rule(mission, mission.keys)}\n{_rules(mission, mission.keys, category)}"


def category_grammar(mission: Mission) -> str:
    """The grammar of the text after the cue: the category, and what follows it."""
    return _grammar_from(mission, "category")


def grammars(mission: Mission) -> dict[str, str]:
    """The grammar from each cue on: "" is the beginning of the answer, then the category, yes/no and choices."""
    cued = ["category", *(field.name for field in mission.fields if field.words)]
    return {"": grammar(mission), **{cue_of(key): _grammar_from(mission, key) for key in cued}}


def _grammar_from(mission: Mission, key: str) -> str:
    keys = mission.keys[mission.keys.index(key) :]
    return f"root ::= {_rule(mission, keys, inside=True)}\n{_rules(mission, keys)}"


def _rule(mission: Mission, keys: Sequence[str], *, inside: bool = False) -> str:
    """The keys in their order; `inside`: from the first value on."""
    numbers = [field.name for field in mission.fields if field.kind == "whole number"]
    parts: list[str] = []
    for place, key in enumerate(keys):
        before = "{" if place == 0 else ", "
        quote, last = "" if key in numbers else '\\"', place == len(keys) - 1
        opening = "" if inside and place == 0 else f'"{_quoted(f"{before}{json.dumps(key)}: ")}{quote}"'
        closing = f'"{quote}{"}" if last else ""}"'
        parts += [part for part in (opening, _rule_name(key), closing) if part not in ("", '""')]
    return " ".join(parts).replace('" "', "")


def _rule_name(key: str) -> str:
    """GBNF has no underscores in names; "field-" keeps a field named root from being the grammar's root."""
    return key if key in ("reason", "category") else f"field-{key.replace('_', '-')}"


def _quoted(text: str) -> str:
    return text.replace('"', '\\"')


def _rules(mission: Mission, keys: Sequence[str], category: str = "") -> str:
    names = (category,) if category else mission.names
    rules = {
        "reason": f"reason ::= {PLAIN}{{1,{mission.longest_reason}}}\n",
        "category": f"category ::= {' | '.join(json.dumps(name) for name in names)}\n",
        **{field.name: f"{_rule_name(field.name)} ::= {gbnf(field)}\n" for field in mission.fields},
    }
    return "".join(rules[key] for key in sorted(keys, key=lambda key: key == "category"))


def answer_schema(mission: Mission) -> dict[str, Any]:
    """The answer's JSON Schema, its keys in their order. A server that enforces it may still write other blanks."""
    properties = {
        "reason": {"type": "string", "maxLength": mission.longest_reason},
        "category": {"enum": list(mission.names)},
        **{field.name: schema(field) for field in mission.fields},
    }
    return {
        "type": "object",
        "properties": {key: properties[key] for key in mission.keys},
        "required": list(mission.keys),
        "additionalProperties": False,
    }


def reason_fault(reason: str) -> str:
    """The fault of a reason that must not be used in training, as text; empty if it has none."""
    if found := CONTROL.search(reason):
        return f"contains the model's control token {found[0][:40]!r}"
    if odd := next((character for character in reason if not character.isprintable()), ""):
        return f"contains the unprintable character {odd!a}"
    return ""


_FENCE = "```"


def parse_verdict(mission: Mission, answer: str) -> Verdict | None:
    """The verdict in a model's answer, or None.

    Accepted: one JSON object with a string `reason`, a `category` that is exactly one of the mission's, and a value of
    each of its fields, alone or in a Markdown code fence, which instruction-tuned bases often add. A verdict-only
    answer has an empty reason. If a key appears twice, the last value counts, as usual in JSON. Any other text,
    including a truncated object, is unparsable and counted as such by the evaluation.
    """
    text = answer.strip()
    # Not a regular expression: its time would grow with the square of the number of blanks in a server's answer.
    if len(text) >= 2 * len(_FENCE) and text.startswith(_FENCE) and text.endswith(_FENCE):
        text = text[len(_FENCE) : -len(_FENCE)].removeprefix("json").strip()
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or set(value) != set(mission.keys):
        return None
    reason, category = value["reason"], value["category"]
    if not isinstance(reason, str) or not isinstance(category, str) or category not in mission.names:
        return None
    if any(value_fault(field, value[field.name]) for field in mission.fields):
        return None
    return Verdict(reason, category, tuple((field.name, value[field.name]) for field in mission.fields))
