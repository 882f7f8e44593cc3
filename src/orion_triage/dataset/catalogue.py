"""The places: name, category, morphology, position, and the reason that a good verdict would give.

Users write catalogues as CSV with a header, JSON lines, or GeoJSON with one point per place. All mistakes in a file
are reported together, each with its line (GeoJSON: feature) and value. The column `split` (train, val, test) is
optional.
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
# The morphologies that synthetic tiles can show. Real imagery can have others.
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

Row = tuple[str, dict[str, str]]  # position ("line 3") and cells; a missing cell is empty


@dataclass(frozen=True)
class Target:
    """One place; `coordinates` are None if its position is unknown.

    `split` is the catalogue's, or None; `origin` is the place's line in the catalogue.
    """

    name: str
    category: Category
    morphology: str
    coordinates: Coordinates | None
    reason: str
    split: Split | None = None
    origin: str = field(default="", compare=False)


def load_catalogue(path: Path | None = None, *, drawable: bool = True) -> list[Target]:
    """The places of a catalogue (by default the shipped one), in the file's order.

    With `drawable`, only morphologies that synthetic tiles can show are allowed. Raises OrionError that lists all
    mistakes in the file.
    """
    source = path or resources.files("orion_triage.dataset") / "catalogue.csv"
    rows = list(read_rows(source))
    if missing := [column for column in COLUMNS if rows and column not in rows[0][1]]:
        raise OrionError(
            f"{source} has no column {', '.join(missing)} (found: {', '.join(map(str, rows[0][1]))[:200]}).",
            f"Use the columns {', '.join(COLUMNS)}.",
        )
    return targets_of(rows, str(source), drawable=drawable)


def read_rows(source: Path | Traversable) -> Iterator[Row]:
    """The rows of a CSV, JSONL or GeoJSON file, all values as text; raises OrionError if the file is invalid."""
    name = str(source)
    try:
        if isinstance(source, Path):
            text = read_text(source, LARGEST_TABLE_BYTES, "utf-8-sig")
        else:  # the shipped one
            text = source.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise OrionError(f"{name} does not exist.", "Pass the path of a CSV, JSONL or GeoJSON catalogue.") from None
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
            raise OrionError(f"{name}: the header has the column {shown(repeated[0])} twice.", "Delete one of them.")
        if len(columns) == 1 and ";" in (header := next(iter(columns))):
            raise OrionError(
                f"{name} is separated by semicolons (header: {shown(header)}).", "Separate the columns with commas."
            )
        for row in reader:
            if None in row:
                raise OrionError(
                    f"{name}: line {reader.line_num} has more cells than the header.",
                    "Put cells that contain commas in double quotes.",
                )
            yield f"line {reader.line_num}", {key: (value or "").strip() for key, value in row.items()}
    except csv.Error as error:
        raise OrionError(f"{name}: line {reader.line_num}: not CSV: {error}.", "Correct it.") from None


def _jsonl_rows(text: str, name: str) -> Iterator[Row]:
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            value = _json(line, f"{name}: line {number}")
            if not isinstance(value, dict):
                raise OrionError(f"{name}: line {number} is not a JSON object.", "Write one object per line.")
            yield f"line {number}", _texts(value)


def _geojson_rows(text: str, name: str) -> Iterator[Row]:
    value = _json(text, name)
    features = value.get("features") if isinstance(value, dict) else None
    if not isinstance(features, list):
        raise OrionError(f"{name} is not a GeoJSON FeatureCollection.", "Write points as its features, or use CSV.")
    for number, feature in enumerate(features, start=1):
        geometry = feature.get("geometry") if isinstance(feature, dict) else None
        position = geometry.get("coordinates") if isinstance(geometry, dict) else None
        if not isinstance(geometry, dict) or not isinstance(position, list) or geometry.get("type") != "Point":
            raise OrionError(f"{name}: feature {number} is not a Point.", "Use a Point with [longitude, latitude].")
        if len(position) < 2:
            raise OrionError(
                f"{name}: feature {number} has {len(position)} coordinates, not two.", "Use [longitude, latitude]."
            )
        properties = feature.get("properties")
        cells = properties if isinstance(properties, dict) else {}
        yield f"feature {number}", _texts(cells | {"lon": position[0], "lat": position[1]})


def _json(text: str, place: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise OrionError(f"{place}: not JSON: {error}.", "Correct it.") from None


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    """Every value as the text of a table cell; lists and objects become empty cells."""
    return {
        key: "" if value is None or isinstance(value, (list, dict)) else str(value).strip()
        for key, value in values.items()
    }


def targets_of(rows: Iterable[Row], source: str, *, drawable: bool = True, with_positions: bool = True) -> list[Target]:
    """The targets of rows; raises OrionError that lists all mistakes.

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
        raise OrionError(f"{source} has no places.", "Add one line per place.")
    return targets


def _problems(row: Mapping[str, str], seen: Mapping[str, str], drawable: bool) -> list[str]:
    problems = []
    name, category, morphology = (row.get(column, "") for column in ("name", "category", "morphology"))
    if not re.fullmatch(r"[a-z0-9_]+", name):
        problems.append(f"name {shown(name)} has characters other than a-z, 0-9 and _")
    if name in seen:
        problems.append(f"name {shown(name)} is already used on {seen[name]}")
    if category not in CATEGORIES:
        problems.append(f"category {shown(category)} is not one of {', '.join(CATEGORIES)}")
    elif drawable and morphology not in MORPHOLOGIES[Category(category)]:
        drawn = ", ".join(MORPHOLOGIES[Category(category)])
        problems.append(f"morphology {shown(morphology)} cannot be drawn for {category}; supported: {drawn}")
    elif not re.fullmatch(r"[a-z0-9_]+", morphology):
        problems.append(f"morphology {shown(morphology)} has characters other than a-z, 0-9 and _")
    if (split := row.get("split", "")) and split.lower() not in SPLIT_NAMES:
        problems.append(f"split {shown(split)} is not one of {', '.join(SPLIT_NAMES)}")
    reason = row.get("reason", "")
    if not reason:
        problems.append("the reason is empty")
    if len(reason) > LONGEST_REASON:
        problems.append(f"the reason has {len(reason)} characters; the limit is {LONGEST_REASON}")
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
        f"{column} {shown(row.get(column, ''))} "
        + ("is not a number" if math.isnan(values[column]) else f"is outside -{limit}..{limit}")
        for column, limit in (("lon", 180), ("lat", 90))
        if not abs(values[column]) <= limit
    ]
    if abs(lon) <= 90 < abs(lat) <= 180:
        problems[-1] += " (are lon and lat swapped?)"
    if 180 < lon <= 360:
        problems[0] += f" (for {lon:g} degrees east, write {lon - 360:g})"
    return problems
