"""Read a mission file, and say every mistake in it with its line."""

import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from orion_triage.errors import OrionError
from orion_triage.mission.mission import (
    KIND_OF_KEY,
    Category,
    Fault,
    FieldOfAnswer,
    Mission,
    MistakesError,
    Place,
    nearest,
)
from orion_triage.safe.reading import LARGEST_JSON_BYTES, read_object, read_text, shown

_MOST_FAULTS = 100


def read_mission(path: Path) -> dict[str, Any]:
    """The tables of a mission file, not validated; raises OrionError if it is missing or not TOML."""
    try:
        if path.suffix == ".json":  # as products carry it
            return read_object(path)
        return tomllib.loads(read_text(path, LARGEST_JSON_BYTES))
    except FileNotFoundError:
        raise OrionError(f"{path} does not exist.", "Write one with 'orion mission new FILE'.") from None
    except (ValueError, RecursionError) as error:
        line = re.search(r"\(at line (\d+)", str(error))
        where = f"{path}:{line[1]}" if line else str(path)
        raise OrionError(f"{where} is not TOML: {error}.", "Correct the line: texts need quotes.") from None


def load_mission(path: Path) -> Mission:
    """The mission in a file; raises OrionError that lists every mistake with its line."""
    given = read_mission(path)
    mission, faults = checked(given)
    if mission is None:
        text = read_text(path, LARGEST_JSON_BYTES)
        numbered = sorted(((line_of(text, place), sentence) for place, sentence in faults), key=lambda one: one[0])
        lines = [f"{path}:{number}: {sentence}{'' if sentence.endswith('?') else '.'}" for number, sentence in numbered]
        count = f"{len(lines)} mistakes" if len(lines) > 1 else "a mistake"
        raise OrionError("\n".join([f"{path} has {count}:", *lines]), "Correct the file, then check it again.")
    if mission.places:
        mission = mission.model_copy(update={"places": str((path.parent / mission.places).resolve())})
    return mission


# What stands for a value that is wrong, so that the rest can be checked too.
_STAND_INS: dict[str, Any] = {
    "name": "other", "prompt": "{coordinates}{categories}", "coordinates": "{longitude}{latitude}",
    "definition": "-", "action": "store", "kind": "yes/no",
    "fields": [{"name": "other", "kind": "yes/no", "definition": "-"}],
}  # fmt: skip


def checked(given: Mapping[str, Any]) -> tuple[Mission | None, list[Fault]]:
    """The mission of a file's tables, or None with every mistake in them, in the order of the file's keys."""
    given = {"prompt": None, **given}  # a file is whole: nothing comes from the default mission
    try:
        return Mission.model_validate(given), []
    except ValidationError as error:
        problems = error.errors()
    found = [fault for problem in problems for fault in _faults(problem)]
    wrong = [place for place, _ in found]  # a stand-in there may be a mistake of another kind
    tables = json.loads(json.dumps(given, default=str))
    for problem in problems:
        _replace(tables, tuple(problem["loc"]))
    try:  # the mistakes that only show when all keys have a value of the right type
        Mission.model_validate(tables)
    except ValidationError as error:
        found += [fault for problem in error.errors() for fault in _faults(problem) if fault[0] not in wrong]
    return None, found[:_MOST_FAULTS]


def _faults(problem: Any) -> list[Fault]:
    place = tuple(problem["loc"])
    if problem["type"] != "value_error":
        return [(place, _sentence(problem, place))]
    error = problem["ctx"]["error"]
    return error.faults if isinstance(error, MistakesError) else [(place, str(error))]


def _sentence(problem: Any, place: Place) -> str:
    key = ".".join(str(part + 1 if isinstance(part, int) else part) for part in place)
    inside = next((part for part in reversed(place) if isinstance(part, str)), "")
    if problem["type"] == "extra_forbidden":
        models: dict[str | int, type[BaseModel]] = {"categories": Category, "fields": FieldOfAnswer}
        model = models.get(place[0], Mission) if len(place) > 1 else Mission
        known = [field.alias or key for key, field in model.model_fields.items()]
        return f"there is no key {inside}{nearest(inside, known)}"
    if problem["type"] == "missing" or problem["input"] is None:
        return f"{key} is missing"
    said = problem["msg"].partition(", unable to parse")[0].removeprefix("Input ")
    if problem["type"] == "string_pattern_mismatch":
        said = _PATTERNS.get(f"{place[0]}.{inside}", said)
    return f"{key} {said[0].lower()}{said[1:]}, and this is {shown(problem['input'])}"


_PATTERNS = {
    "categories.name": "should have letters, digits, _ and -, at most 32 of them, and begin with a letter",
    "categories.colour": "should be #rrggbb",
    "fields.name": "should have a-z, 0-9 and _, at most 32 of them, and begin with a letter",
}


def _replace(tables: Any, place: Place) -> None:
    """Put a value that is right in the place of a wrong one, or remove it where it can be left out."""
    within, last = tables, ""
    for part in place:
        last = part if isinstance(part, str) else last
        inner = within.get(part) if isinstance(within, dict) else None
        if isinstance(within, list) and isinstance(part, int) and part < len(within):
            inner = within[part]
        if (
            not isinstance(inner, dict | list)
            or part == place[-1]
            or last in ("keys", "costs", "choices", "reasons_for")
        ):
            break
        within = inner
    if place[:1] == ("fields",) and last == "name":
        tables.pop("keys", None)  # they name the field
    if isinstance(within, dict):
        if last == "kind":
            for key in KIND_OF_KEY:
                within.pop(key, None)
        stand_in = _STAND_INS.get(last)
        if stand_in is None:
            within.pop(last, None)
        else:
            within[last] = f"{stand_in}{place[1]}" if last == "name" and len(place) > 1 else stand_in


def line_of(text: str, place: Place) -> int:
    """The line of a key in a TOML file: of the key, or of its table's header where it is missing; else the first."""
    lines, start = text.splitlines(), 0
    if len(place) > 1 and isinstance(place[1], int):
        headers = [n for n, line in enumerate(lines) if re.match(rf"\s*\[\[\s*{place[0]}\s*\]\]", line)]
        start = headers[place[1]] if place[1] < len(headers) else 0
    key = next((part for part in reversed(place) if isinstance(part, str)), "")
    for number in range(start, len(lines)):
        if (
            number > start
            and re.match(r"\s*\[", lines[number])
            and not re.match(r"\s*\[[\s\d.,]*(#.*)?$", lines[number])
        ):
            break
        if re.match(rf"""\s*["']?{re.escape(key)}["']?\s*=""", lines[number]):
            return number + 1
    return start + 1
