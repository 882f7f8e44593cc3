"""The further fields of an answer: their words in the prompt, their rules in grammar and schema, and their values.

Values are strings, except whole numbers: those are integers.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from orion_triage.mission.mission import PLAIN, FieldOfAnswer, Mission, listed
from orion_triage.safe.reading import shown

Value = str | int
Fields = tuple[tuple[str, Value], ...]  # names and values, in the mission's order


def bounds(field: FieldOfAnswer) -> tuple[int, int]:
    """The smallest and the largest value of a whole number."""
    assert field.from_ is not None
    assert field.to is not None
    return field.from_, field.to


def longest(field: FieldOfAnswer) -> int:
    """The most characters of a short text."""
    assert field.longest is not None
    return field.longest


def allowed(field: FieldOfAnswer) -> str:
    """What the field can be, in words: "yes or no", "a whole number from 0 to 9"."""
    if field.kind == "whole number":
        low, high = bounds(field)
        return f"a whole number from {low} to {high}"
    if field.kind == "short text":
        return f"a text of at most {longest(field)} characters"
    return listed(field.words, "or")


def value_fault(field: FieldOfAnswer, value: Any) -> str:
    """Why a JSON value is not one of the field, as text; empty if it is. A short text may be empty."""
    if field.kind == "whole number":
        low, high = bounds(field)
        right = type(value) is int and low <= value <= high
    elif field.kind == "short text":
        right = isinstance(value, str) and len(value) <= longest(field)
    else:
        right = isinstance(value, str) and value in field.words
    return "" if right else f"{field.name} is {shown(value)}, not {allowed(field)}"


def value_of(field: FieldOfAnswer, cell: str) -> Value:
    """The value in a table's cell; raises ValueError that says what is wrong with it.

    Upper and lower case are the same for yes, no and choices. An empty cell is no value.
    """
    value: Value = cell
    if field.kind == "whole number" and re.fullmatch(r"[+-]?[0-9]{1,9}", cell):
        value = int(cell)
    elif field.kind in ("yes/no", "choice"):
        value = next((word for word in field.words if word.casefold() == cell.casefold()), cell)
    if not cell:
        raise ValueError(f"{field.name} is empty: write {allowed(field)}")
    if fault := value_fault(field, value):
        raise ValueError(fault)
    return value


def examples(mission: Mission, text: str) -> Fields:
    """One value of each field, where any is right; `text` stands for texts."""
    return tuple((field.name, _example(field, text)) for field in mission.fields)


def longest_values(mission: Mission) -> Fields:
    """The value of each field that has the most characters."""
    return tuple((field.name, max(_extremes(field), key=lambda value: len(str(value)))) for field in mission.fields)


def _example(field: FieldOfAnswer, text: str) -> Value:
    return text if field.kind == "short text" else next(_extremes(field))


def _extremes(field: FieldOfAnswer) -> Iterator[Value]:
    if field.kind == "whole number":
        yield from bounds(field)
    elif field.kind == "short text":
        yield "x" * longest(field)
    else:
        yield from field.words


def schema(field: FieldOfAnswer) -> dict[str, Any]:
    """The field's JSON Schema."""
    if field.kind == "whole number":
        low, high = bounds(field)
        return {"type": "integer", "minimum": low, "maximum": high, "description": field.definition}
    if field.kind == "short text":
        return {"type": "string", "maxLength": longest(field), "description": field.definition}
    return {"enum": list(field.words), "description": field.definition}


def gbnf(field: FieldOfAnswer) -> str:
    """The field's value in llama.cpp's GBNF, without the quotes of a string."""
    if field.kind == "whole number":
        return _numbers(*bounds(field))
    if field.kind == "short text":
        return f"{PLAIN}{{1,{longest(field)}}}"
    return " | ".join(json.dumps(word) for word in field.words)


def _numbers(low: int, high: int) -> str:
    """The whole numbers from `low` to `high` as JSON writes them: no sign before 0, no zeros in front."""
    parts = []
    if low < 0:
        parts.append(f'"-" ({_numbers(max(1, -high), -low)})')
    for count in range(len(str(max(low, 0))), len(str(high)) + 1) if high >= 0 else ():
        least = max(low, 10 ** (count - 1) if count > 1 else 0)
        parts.append(_digits(str(least), str(min(high, 10**count - 1))))
    return " | ".join(parts)


def _digits(low: str, high: str) -> str:
    """The numbers from `low` to `high`, which have equally many digits."""
    if len(low) == 1:
        return f"[{low}-{high}]"
    rest = len(low) - 1
    if low[0] == high[0]:
        return f"[{low[0]}] ({_digits(low[1:], high[1:])})"
    first, last, parts = int(low[0]), int(high[0]), []
    if low[1:] != "0" * rest:
        parts.append(f"[{first}] ({_digits(low[1:], '9' * rest)})")
        first += 1
    above = high[1:] != "9" * rest
    if first <= last - above:
        parts.append(f"[{first}-{last - above}] [0-9]{{{rest}}}")
    if above:
        parts.append(f"[{last}] ({_digits('0' * rest, high[1:])})")
    return " | ".join(parts)
