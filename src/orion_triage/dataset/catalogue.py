"""The places: name, category, morphology, position, and the reason that a good verdict would give.

The split is geographic: places closer than `distance_km` stay together, so that no two splits show the
same ground, and every morphology is divided in the same proportions.
"""

import csv
import math
import random
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from orion_triage.errors import OrionError
from orion_triage.records import SPLITS, Split
from orion_triage.triage import CATEGORIES, Category

COLUMNS = ("name", "category", "morphology", "lon", "lat", "reason")
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
SHARES: dict[Split, int] = {"train": 4, "val": 1, "test": 1}  # sixths of every morphology
EARTH_RADIUS_KM = 6371.0
_ATTEMPTS = 2000


@dataclass(frozen=True)
class Target:
    """One place; degrees, east and north positive."""

    name: str
    category: Category
    morphology: str
    lon: float
    lat: float
    reason: str


def load_catalogue(path: Path | None = None) -> list[Target]:
    """The places of a CSV file (the shipped one by default), in the file's order.

    Raises OrionError with every mistake of the file at once, each with its line and value.
    """
    source = path or resources.files("orion_triage.dataset") / "catalogue.csv"
    try:
        text = source.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise OrionError(f"{path} does not exist.", "Give the path of a catalogue CSV.") from None
    except UnicodeDecodeError as error:
        raise OrionError(f"{path} is not UTF-8 (byte {error.start}).", "Save it as UTF-8.") from None
    reader = csv.DictReader(text.splitlines())
    missing = [column for column in COLUMNS if column not in (reader.fieldnames or [])]
    if missing:
        raise OrionError(f"{source} has no column {', '.join(missing)}.", f"The columns are {', '.join(COLUMNS)}.")
    targets: list[Target] = []
    mistakes: list[str] = []
    seen: dict[str, int] = {}
    for row in reader:
        line = reader.line_num
        problems = _problems(row, seen)
        mistakes += [f"line {line}: {problem}" for problem in problems]
        seen.setdefault(row["name"] or "", line)
        if not problems:
            category = Category(row["category"])
            lon, lat = float(row["lon"]), float(row["lat"])
            targets.append(Target(row["name"], category, row["morphology"], lon, lat, row["reason"].strip()))
    if mistakes:
        raise OrionError(f"{source}: {'; '.join(mistakes)}.", "Correct these lines.")
    if not targets:
        raise OrionError(f"{source} has no places.", "Add one line a place.")
    return targets


def _problems(row: Mapping[str, str | None], seen: Mapping[str, int]) -> list[str]:
    problems = []
    name, category, morphology = row["name"] or "", row["category"] or "", row["morphology"] or ""
    if not re.fullmatch(r"[a-z0-9_]+", name):
        problems.append(f"name {name!r} has characters other than a-z, 0-9 and _")
    if name in seen:
        problems.append(f"name {name!r} is already on line {seen[name]}")
    if category not in CATEGORIES:
        problems.append(f"category {category!r} is not one of {', '.join(CATEGORIES)}")
    elif morphology not in MORPHOLOGIES[Category(category)]:
        problems.append(
            f"morphology {morphology!r} is not one of {category}'s: {', '.join(MORPHOLOGIES[Category(category)])}"
        )
    for column, limit in (("lon", 180.0), ("lat", 90.0)):
        try:
            value = float(row[column] or "")
        except ValueError:
            value = math.nan
        if not abs(value) <= limit:
            problems.append(f"{column} {row[column]!r} is not a number within -{limit:.0f}..{limit:.0f}")
    if not (row["reason"] or "").strip():
        problems.append("the reason is empty")
    return problems


def great_circle_km(lon1: float, lat1: float, lon2: float, lat2: float) -> float:
    """Distance on a sphere (haversine), within 0.6 % of the ellipsoid."""
    a, b = math.radians(lat1), math.radians(lat2)
    half = math.sin((b - a) / 2) ** 2 + math.cos(a) * math.cos(b) * math.sin(math.radians(lon2 - lon1) / 2) ** 2
    return 2 * EARTH_RADIUS_KM * math.asin(min(1.0, math.sqrt(half)))


def clusters(targets: list[Target], distance_km: float) -> list[list[Target]]:
    """Groups of places connected by steps shorter than `distance_km`, in order of their first name."""
    ordered = sorted(targets, key=lambda target: target.name)
    group = list(range(len(ordered)))

    def root(index: int) -> int:
        while group[index] != index:
            group[index] = group[group[index]]
            index = group[index]
        return index

    for i, first in enumerate(ordered):
        for j in range(i):
            second = ordered[j]
            if abs(first.lat - second.lat) * 111.2 < distance_km and (
                great_circle_km(first.lon, first.lat, second.lon, second.lat) < distance_km
            ):
                group[root(i)] = root(j)
    members: dict[int, list[Target]] = {}
    for index, target in enumerate(ordered):
        members.setdefault(root(index), []).append(target)
    return list(members.values())


def split_targets(targets: list[Target], *, seed: int = 42, distance_km: float = 100.0) -> dict[Split, list[Target]]:
    """Train, val and test in the proportion 4:1:1 within every morphology, sorted by name.

    Deterministic for `seed` and independent of the order of `targets`. Raises OrionError when the distance
    leaves no exact division.
    """
    groups = clusters(targets, distance_km)
    totals = Counter(target.morphology for target in targets)
    goal = {split: {name: count * SHARES[split] // 6 for name, count in totals.items()} for split in SPLITS}
    for name, count in totals.items():
        goal["train"][name] = count - goal["val"][name] - goal["test"][name]
    for attempt in range(_ATTEMPTS):
        source = random.Random(f"{seed}/{attempt}")
        shuffled = groups[:]
        source.shuffle(shuffled)
        shuffled.sort(key=len, reverse=True)  # the ones that are hard to place go first
        room = {split: dict(goal[split]) for split in SPLITS}
        result: dict[Split, list[Target]] = {split: [] for split in SPLITS}
        for members in shuffled:
            need = Counter(member.morphology for member in members)
            fits = [s for s in SPLITS if all(room[s][name] >= count for name, count in need.items())]
            if not fits:
                break
            weights = [sum(room[s][name] for name in need) for s in fits]
            chosen = source.choices(fits, weights)[0]
            for name, count in need.items():
                room[chosen][name] -= count
            result[chosen] += members
        else:
            return {split: sorted(result[split], key=lambda target: target.name) for split in SPLITS}
    largest = max(groups, key=len)
    raise OrionError(
        f"no split keeps places {distance_km:g} km apart; the largest cluster has {len(largest)} "
        f"({', '.join(target.name for target in largest[:4])}...).",
        "Lower dataset.split_distance_km, or spread the places.",
    )
