"""The places: name, category, morphology, position, and the reason that a good verdict would give.

Users write catalogues as CSV with a header, JSON lines, or GeoJSON with one point per place. All mistakes in a file
are reported together, each with its line (GeoJSON: feature) and value. The column `split` (train, val, test) is
optional. A decimal comma in a position is read as a decimal point. A mission with further fields adds a column for
each of them.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, NamedTuple

from orion_triage.errors import OrionError
from orion_triage.mission.fields import Fields, value_of
from orion_triage.mission.mission import Mission, default_mission
from orion_triage.mission.prompt import Coordinates
from orion_triage.mission.verdict import reason_fault
from orion_triage.safe.reading import LARGEST_TABLE_BYTES, parse_json, read_bytes, shown
from orion_triage.safe.tables import Faults, csv_rows, decoded, json_lines, keep, number_of
from orion_triage.settings import Split

COLUMNS = ("name", "category", "morphology", "lon", "lat", "reason")
# The morphologies that synthetic tiles can show. Real imagery can have others.
MORPHOLOGIES = (
    "ocean_water", "desert_ice_canopy", "coastline", "geological", "fractal_texture",
    "urban_grid", "suburb", "agriculture", "ordinary_infrastructure", "town",
    "mega_port", "mega_airport", "energy_dam", "mega_mine_industry", "space_military_chokepoint",
)  # fmt: skip

SPLIT_NAMES: dict[str, Split] = {"train": "train", "val": "val", "validation": "val", "valid": "val", "test": "test"}

# A line break or another blank that is not a plain space, with the blanks around it. Spreadsheets put line breaks into
# cells, word processors no-break spaces.
_ODD_BLANKS = re.compile(r"\s*[^\S ]\s*")

Row = tuple[str, dict[str, str]]  # position ("line 3") and cells by column in lower case; a missing cell is empty


class Problem(NamedTuple):
    """A mistake in a row: its kind (label, position, swapped, reason, split, name, morphology, field) and a sentence.

    `field` is the mission's field that has a wrong value.
    """

    kind: str
    text: str
    field: str = ""


@dataclass(frozen=True)
class Target:
    """One place; `coordinates` are None if its position is unknown.

    `split` is the catalogue's, or None; `origin` is the place's line in the catalogue; `file` the user's picture, if
    there is one; `respaced` whether the reason had line breaks or other blanks that became single spaces. `fields` are
    the values of the mission's further fields.
    """

    name: str
    category: str
    morphology: str
    coordinates: Coordinates | None
    reason: str
    split: Split | None = None
    origin: str = field(default="", compare=False)
    file: str = field(default="", compare=False)
    respaced: bool = field(default=False, compare=False)
    fields: Fields = ()


def load_catalogue(path: Path | None = None, mission: Mission | None = None, *, drawable: bool = True) -> list[Target]:
    """The places of a catalogue (by default the shipped one, of the published mission), in the file's order.

    With `drawable`, only morphologies that synthetic tiles can show are allowed. Raises OrionError that lists all
    mistakes in the file.
    """
    source = path or resources.files("orion_triage.dataset") / "catalogue.csv"
    rows = list(read_rows(source))
    columns = columns_of(rows)
    mission = mission or default_mission()
    needed = (*COLUMNS, *(one.name for one in mission.fields))
    if missing := [column for column in needed if rows and column not in columns]:
        raise OrionError(
            f"{source} has no column {', '.join(missing)} (found: {', '.join(columns)[:200]}).",
            f"Use the columns {', '.join(needed)}.",
        )
    return targets_of(rows, str(source), mission, drawable=drawable)


def columns_of(rows: Iterable[Row]) -> list[str]:
    """The columns that rows have, in the order in which they appear: a row of JSON may lack some."""
    return list(dict.fromkeys(column for _, cells in rows for column in cells))


def read_rows(source: Path | Traversable, faults: Faults | None = None) -> Iterator[Row]:
    """The rows of a CSV, JSONL or GeoJSON file, all values as text; raises OrionError if the file is invalid.

    With `faults`, a row that cannot be read, in a file that otherwise can, is added to them and left out.
    """
    name = str(source)
    suffix = Path(name).suffix.lower()
    try:
        if isinstance(source, Path) and suffix in (".jsonl", ".ndjson"):
            yield from _jsonl_rows(source, faults)
            return
        # The shipped catalogue may be in an archive.
        data = read_bytes(source, LARGEST_TABLE_BYTES) if isinstance(source, Path) else source.read_bytes()
    except FileNotFoundError:
        raise OrionError(f"{name} does not exist.", "Pass the path of a CSV, JSONL or GeoJSON catalogue.") from None
    text = decoded(data, name)
    if suffix in (".geojson", ".json"):
        yield from _geojson_rows(text, name, faults)
    else:
        for line, cells in csv_rows(text, name, faults):
            yield f"line {line}", _texts(cells, f"{name}: the header")


def _jsonl_rows(path: Path, faults: Faults | None) -> Iterator[Row]:
    lines = ((f"line {number}", line) for number, line in json_lines(path))
    return _readable(lines, _object_cells, str(path), faults)


def _readable(
    found: Iterable[tuple[str, Any]], cells_of: Callable[[Any, str], dict[str, str]], name: str, faults: Faults | None
) -> Iterator[Row]:
    """The rows of (place, content) in the file `name`, without those that cannot be read."""
    for where, content in found:
        try:
            cells = cells_of(content, f"{name}: {where}")
        except OrionError as error:
            keep(error, faults)
        else:
            yield where, cells


def _object_cells(line: str, place: str) -> dict[str, str]:
    value = _json(line, place)
    if not isinstance(value, dict):
        raise OrionError(f"{place} is not a JSON object.", "Write one object per line.")
    return _texts(value, place)


def _geojson_rows(text: str, name: str, faults: Faults | None) -> Iterator[Row]:
    value = _json(text, name)
    features = value.get("features") if isinstance(value, dict) else None
    if not isinstance(features, list):
        raise OrionError(f"{name} is not a GeoJSON FeatureCollection.", "Write points as its features, or use CSV.")
    found = ((f"feature {number}", feature) for number, feature in enumerate(features, start=1))
    yield from _readable(found, _feature_cells, name, faults)


def _feature_cells(feature: Any, place: str) -> dict[str, str]:
    geometry = feature.get("geometry") if isinstance(feature, dict) else None
    position = geometry.get("coordinates") if isinstance(geometry, dict) else None
    if not isinstance(geometry, dict) or not isinstance(position, list) or geometry.get("type") != "Point":
        raise OrionError(f"{place} is not a Point.", "Use a Point with [longitude, latitude].")
    if len(position) < 2:
        raise OrionError(f"{place} has {len(position)} coordinates, not two.", "Use [longitude, latitude].")
    properties = feature.get("properties")
    cells = properties if isinstance(properties, dict) else {}
    cells = {key: value for key, value in cells.items() if key.lower() not in ("lon", "lat")}
    return _texts(cells | {"lon": position[0], "lat": position[1]}, place)


def _json(text: str, place: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise OrionError(f"{place}: not JSON: {error}.", "Correct it.") from None


def _texts(values: Mapping[str, Any], place: str) -> dict[str, str]:
    """Every value as the text of a table cell, by its key in lower case; lists and objects become empty cells.

    Raises OrionError for two keys that differ only in case.
    """
    texts: dict[str, str] = {}
    for key, value in values.items():
        column = key.strip().lower()
        if column in texts:
            raise OrionError(f"{place} has the column {shown(column)} twice.", "Delete one of them.")
        texts[column] = "" if value is None or isinstance(value, (list, dict)) else str(value).strip()
    return texts


def targets_of(rows: Iterable[Row], source: str, mission: Mission, *, drawable: bool = True) -> list[Target]:
    """The targets of rows; raises OrionError that lists all mistakes."""
    targets: list[Target] = []
    mistakes: list[str] = []
    seen: dict[str, str] = {}
    for where, cells in rows:
        target, problems = target_of(where, cells, seen, mission, drawable=drawable)
        mistakes += [f"{where}: {problem.text}" for problem in problems]
        targets += [target] if target else []
    if mistakes:
        more = f"; and {len(mistakes) - 20} more" if len(mistakes) > 20 else ""
        raise OrionError(f"{source}: {'; '.join(mistakes[:20])}{more}.", "Correct these lines.")
    if not targets:
        raise OrionError(f"{source} has no places.", "Add one line per place.")
    return targets


def target_of(
    where: str,
    cells: Mapping[str, str],
    seen: dict[str, str],
    mission: Mission,
    *,
    drawable: bool = True,
    with_positions: bool = True,
    called: Mapping[str, str] | None = None,
) -> tuple[Target | None, list[Problem]]:
    """The target of one row, or None and the row's mistakes.

    `seen` has the names of earlier rows and their lines, and gets this one's. Without `with_positions`, a row whose lon
    and lat are both empty is a target without coordinates. `called` has the table's own names of our columns, for the
    sentences.
    """
    reason = _ODD_BLANKS.sub(" ", cells.get("reason", ""))
    row = {**cells, "reason": reason}
    names = {column: column for column in (*COLUMNS, "split")} | dict(called or {})
    problems = _problems(row, seen, mission, drawable, names)
    unplaced = not with_positions and not row.get("lon") and not row.get("lat")
    problems += [] if unplaced else _position_problems(row, names)
    seen.setdefault(row.get("name", ""), where)
    values, wrong = _values(mission, row)
    problems += wrong
    if problems:
        return None, problems
    place = None if unplaced else Coordinates(number_of(row["lon"]), number_of(row["lat"]))
    split = SPLIT_NAMES[row["split"].lower()] if row.get("split") else None
    respaced = reason != cells.get("reason", "")
    labels = (row["name"], row["category"], row["morphology"])
    return Target(*labels, place, reason, split, where, respaced=respaced, fields=values), []


def _values(mission: Mission, row: Mapping[str, str]) -> tuple[Fields, list[Problem]]:
    """The values of the mission's further fields in a row, and what is wrong with them."""
    values: Fields = ()
    problems = []
    for one in mission.fields:
        cell = _ODD_BLANKS.sub(" ", row.get(one.name, ""))
        try:
            value = value_of(one, cell)
        except ValueError as error:
            problems.append(Problem("field", str(error), one.name))
            continue
        if isinstance(value, str) and (fault := reason_fault(value)):
            problems.append(Problem("field", f"the {one.name} {fault}", one.name))
        values += ((one.name, value),)
    return values, problems


def _problems(
    row: Mapping[str, str], seen: Mapping[str, str], mission: Mission, drawable: bool, names: Mapping[str, str]
) -> list[Problem]:
    problems = []
    name, category, morphology = (row.get(column, "") for column in ("name", "category", "morphology"))
    if not re.fullmatch(r"[a-z0-9_]+", name):
        problems.append(Problem("name", f"{names['name']} {shown(name)} has characters other than a-z, 0-9 and _"))
    if name in seen:
        problems.append(Problem("name", f"{names['name']} {shown(name)} is already used on {seen[name]}"))
    if category not in mission.names:
        near = get_close_matches(category.upper(), [name.upper() for name in mission.names], 1)
        meant = f" (is {mission.named(near[0])} meant?)" if near else ""
        listed = ", ".join(mission.names)
        problems.append(Problem("label", f"{names['category']} {shown(category)} is not one of {listed}{meant}"))
    elif drawable and morphology not in MORPHOLOGIES:
        text = f"morphology {shown(morphology)} cannot be drawn; supported: {', '.join(MORPHOLOGIES)}"
        problems.append(Problem("morphology", text))
    elif not re.fullmatch(r"[a-z0-9_]+", morphology):
        text = f"morphology {shown(morphology)} has characters other than a-z, 0-9 and _"
        problems.append(Problem("morphology", text))
    if (split := row.get("split", "")) and split.lower() not in SPLIT_NAMES:
        text = f"{names['split']} {shown(split)} is not one of {', '.join(SPLIT_NAMES)}"
        problems.append(Problem("split", text))
    reason = row.get("reason", "")
    if not reason:
        problems.append(Problem("reason", f"the {names['reason']} is empty"))
    if len(reason) > mission.longest_reason:
        text = f"the {names['reason']} has {len(reason)} characters; the limit is {mission.longest_reason}"
        problems.append(Problem("reason", text))
    if fault := reason_fault(reason):
        problems.append(Problem("reason", f"the {names['reason']} {fault}"))
    return problems


def _position_problems(row: Mapping[str, str], names: Mapping[str, str]) -> list[Problem]:
    values = {}
    for column in ("lon", "lat"):
        try:
            values[column] = number_of(row.get(column, ""))
        except ValueError:
            values[column] = math.nan
    lon, lat = values["lon"], values["lat"]
    texts = [
        f"{names[column]} {shown(row.get(column, ''))} "
        + ("is not a number" if math.isnan(values[column]) else f"is outside -{limit}..{limit}")
        for column, limit in (("lon", 180), ("lat", 90))
        if not abs(values[column]) <= limit
    ]
    swapped = abs(lon) <= 90 < abs(lat) <= 180
    if swapped:
        texts[-1] += f" (are {names['lon']} and {names['lat']} swapped?)"
    if 180 < lon <= 360:
        texts[0] += f" (for {lon:g} degrees east, write {lon - 360:g})"
    return [Problem("swapped" if swapped else "position", text) for text in texts]
