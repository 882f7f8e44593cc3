"""The places: name, category, morphology, position, and the reason that a good verdict would give.

A catalogue is the user's to write: CSV with a header, JSON lines, or GeoJSON with a point a place. Every mistake of a
file is told at once, each with its line (GeoJSON: its feature) and value. A column
`split` (train, val, test) is optional.
"""

import csv
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from orion_triage.errors import OrionError
from orion_triage.mission.prompt import Coordinates
from orion_triage.mission.verdict import CATEGORIES, LONGEST_REASON, Category, reason_fault
from orion_triage.safe.reading import LARGEST_TABLE_BYTES, parse_json, read_text, shown
from orion_triage.settings import Split

COLUMNS = ("name", "category", "morphology", "lon", "lat", "reason")
# The morphologies that can be drawn. Real imagery may have any others.
MORPHOLOGIES: dict[Category, tuple[str, ...]] = {
    Category.LOW: ("ocean_water", "desert_ice_canopy", "coastline", "geological", "fractal_texture"),
    Category.MEDIUM: ("urban_grid", "suburb", "agriculture", "ordinary_infrastructure", "town"),
    Category.HIGH: (
        "mega_port",
        "mega_airport",
        "energy_dam",
        "mega_mine_industry",
        "space_military_chokepoint",
    ),
}

SPLIT_NAMES: dict[str, Split] = {"train": "train", "val": "val", "validation": "val", "valid": "val", "test": "test"}

Row = tuple[str, dict[str, str]]  # where it stands ("line 3"), and its cells, empty where there is none


@dataclass(frozen=True)
class Target:
    """One place; `coordinates` are None for a frame that nobody knows the position of.

    `split` is what the catalogue says, if it says anything; `origin` is the place's line there.
    """

    name: str
    category: Category
    morphology: str
    coordinates: Coordinates | None
    reason: str
    split: Split | None = None
    origin: str = field(default="", compare=False)


def load_catalogue(path: Path | None = None, *, drawable: bool = True) -> list[Target]:
    """The places of a catalogue (the shipped one by default), in the file's order.

    With `drawable`, the morphologies must be those that synthetic tiles can show. Raises OrionError with every mistake
    of the file at once.
    """
    source = path or resources.files("orion_triage.dataset") / "catalogue.csv"
    rows = list(read_rows(source))
    if missing := [column for column in COLUMNS if rows and column not in rows[0][1]]:
        raise OrionError(f"{source} has no column {', '.join(missing)}.", f"The columns are {', '.join(COLUMNS)}.")
    return targets_of(rows, str(source), drawable=drawable)


def read_rows(source: Path | Traversable) -> Iterator[Row]:
    """The rows of a CSV, JSONL or GeoJSON file, all values as text; raises OrionError where it is none of these."""
    name = str(source)
    try:
        if isinstance(source, Path):
            text = read_text(source, LARGEST_TABLE_BYTES, "utf-8-sig")
        else:  # the shipped one
            text = source.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise OrionError(f"{name} does not exist.", "Give the path of a catalogue: CSV, JSONL or GeoJSON.") from None
    suffix = Path(name).suffix.lower()
    if suffix in (".geojson", ".json"):
        yield from _geojson_rows(text, name)
    elif suffix == ".jsonl":
        yield from _jsonl_rows(text, name)
    else:
        yield from _csv_rows(text, name)


def _csv_rows(text: str, name: str) -> Iterator[Row]:
    reader = csv.DictReader(text.splitlines())
    try:
        columns = Counter(reader.fieldnames or ())
        if repeated := [column for column, count in columns.items() if count > 1]:
            raise OrionError(f"{name}: the header has the column {shown(repeated[0])} twice.", "Leave one of them.")
        for row in reader:
            if None in row:
                raise OrionError(f"{name}: line {reader.line_num} has more cells than the header.", "Quote commas.")
            yield f"line {reader.line_num}", {key: (value or "").strip() for key, value in row.items()}
    except csv.Error as error:
        raise OrionError(f"{name}: line {reader.line_num}: not CSV: {error}.", "Correct it.") from None


def _jsonl_rows(text: str, name: str) -> Iterator[Row]:
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            value = _json(line, f"{name}: line {number}")
            if not isinstance(value, dict):
                raise OrionError(f"{name}: line {number} is no JSON object.", "One object a line.")
            yield f"line {number}", _texts(value)


def _geojson_rows(text: str, name: str) -> Iterator[Row]:
    value = _json(text, name)
    features = value.get("features") if isinstance(value, dict) else None
    if not isinstance(features, list):
        raise OrionError(f"{name} is no GeoJSON FeatureCollection.", "Give points as features, or use CSV.")
    for number, feature in enumerate(features, start=1):
        geometry = feature.get("geometry") if isinstance(feature, dict) else None
        position = geometry.get("coordinates") if isinstance(geometry, dict) else None
        if not isinstance(geometry, dict) or not isinstance(position, list) or geometry.get("type") != "Point":
            raise OrionError(f"{name}: feature {number} is no point.", "Give [longitude, latitude].")
        if len(position) < 2:
            raise OrionError(f"{name}: feature {number} has too few coordinates.", "Give [longitude, latitude].")
        properties = feature.get("properties")
        cells = properties if isinstance(properties, dict) else {}
        yield f"feature {number}", _texts(cells | {"lon": position[0], "lat": position[1]})


def _json(text: str, place: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise OrionError(f"{place}: not JSON: {error}.", "Correct it.") from None


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    """Every value as a cell of a table; a list or an object is none."""
    return {
        key: "" if value is None or isinstance(value, (list, dict)) else str(value).strip()
        for key, value in values.items()
    }


def targets_of(rows: Iterable[Row], source: str, *, drawable: bool = True, with_positions: bool = True) -> list[Target]:
    """The targets that rows mean; raises OrionError with every mistake at once.

    Without `with_positions`, a row whose lon and lat are both empty is a target without coordinates.
    """
    targets: list[Target] = []
    mistakes: list[str] = []
    seen: dict[str, str] = {}
    for where, row in rows:
        problems = _problems(row, seen, drawable)
        unplaced = not with_positions and not row.get("lon") and not row.get("lat")
        problems += [] if unplaced else _position_problems(row)
        mistakes += [f"{where}: {problem}" for problem in problems]
        seen.setdefault(row.get("name", ""), where)
        if not problems:
            place = None if unplaced else Coordinates(float(row["lon"]), float(row["lat"]))
            split = SPLIT_NAMES[row["split"].lower()] if row.get("split") else None
            targets.append(
                Target(row["name"], Category(row["category"]), row["morphology"], place, row["reason"], split, where)
            )
    if mistakes:
        more = f"; and {len(mistakes) - 20} more" if len(mistakes) > 20 else ""
        raise OrionError(f"{source}: {'; '.join(mistakes[:20])}{more}.", "Correct these lines.")
    if not targets:
        raise OrionError(f"{source} has no places.", "Add one line a place.")
    return targets


def _problems(row: Mapping[str, str], seen: Mapping[str, str], drawable: bool) -> list[str]:
    problems = []
    name, category, morphology = (row.get(column, "") for column in ("name", "category", "morphology"))
    if not re.fullmatch(r"[a-z0-9_]+", name):
        problems.append(f"name {shown(name)} has characters other than a-z, 0-9 and _")
    if name in seen:
        problems.append(f"name {shown(name)} is already on {seen[name]}")
    if category not in CATEGORIES:
        problems.append(f"category {shown(category)} is not one of {', '.join(CATEGORIES)}")
    elif drawable and morphology not in MORPHOLOGIES[Category(category)]:
        drawn = ", ".join(MORPHOLOGIES[Category(category)])
        problems.append(f"morphology {shown(morphology)} is not one of those drawn for {category}: {drawn}")
    elif not re.fullmatch(r"[a-z0-9_]+", morphology):
        problems.append(f"morphology {shown(morphology)} has characters other than a-z, 0-9 and _")
    if (split := row.get("split", "")) and split.lower() not in SPLIT_NAMES:
        problems.append(f"split {shown(split)} is not one of {', '.join(SPLIT_NAMES)}")
    reason = row.get("reason", "")
    if not reason:
        problems.append("the reason is empty")
    if len(reason) > LONGEST_REASON:
        problems.append(f"the reason has {len(reason)} characters; an answer has room for {LONGEST_REASON}")
    if fault := reason_fault(reason):
        problems.append(f"the reason {fault}")
    return problems


def _position_problems(row: Mapping[str, str]) -> list[str]:
    values = {}
    for column in ("lon", "lat"):
        try:
            values[column] = float(row.get(column, ""))
        except ValueError:
            values[column] = math.nan
    lon, lat = values["lon"], values["lat"]
    problems = [
        f"{column} {shown(row.get(column, ''))} is not a number within -{limit}..{limit}"
        for column, limit in (("lon", 180), ("lat", 90))
        if not abs(values[column]) <= limit
    ]
    if abs(lon) <= 90 < abs(lat) <= 180:
        problems[-1] += " (lon and lat may be swapped)"
    if 180 < lon <= 360:
        problems[0] += f" (write {lon - 360:g} for {lon:g} degrees east)"
    return problems
