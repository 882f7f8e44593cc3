"""The geographic split: places closer than a distance are in the same split, so no two splits show the same ground."""

import math
import random
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from orion_triage.dataset.catalogue import Target
from orion_triage.errors import OrionError
from orion_triage.mission.prompt import Coordinates
from orion_triage.settings import SPLITS, Split

SHARES: dict[Split, int] = {"train": 4, "val": 1, "test": 1}  # sixths of every morphology
EARTH_RADIUS_KM = 6371.0
_ATTEMPTS = 2000


def great_circle_km(a: Coordinates, b: Coordinates) -> float:
    """Distance in km on a sphere (haversine), within 0.6 % of the ellipsoid."""
    lat_a, lat_b = math.radians(a.lat), math.radians(b.lat)
    half = (
        math.sin((lat_b - lat_a) / 2) ** 2
        + math.cos(lat_a) * math.cos(lat_b) * math.sin(math.radians(b.lon - a.lon) / 2) ** 2
    )
    return 2 * EARTH_RADIUS_KM * math.asin(min(1.0, math.sqrt(half)))


def unit_vectors(places: Sequence[Coordinates]) -> NDArray[np.float64]:
    """Points on the unit sphere, of shape (places, 3): distances need no special case at poles and antimeridian."""
    lon, lat = np.radians([(place.lon, place.lat) for place in places]).T
    return np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], axis=1)


def pairs_within(places: Sequence[Coordinates], distance_km: float) -> NDArray[np.int64]:
    """All pairs (i < j) of places closer than `distance_km`, as an array of shape (pairs, 2), sorted.

    The search uses points on a sphere, so the antimeridian and the poles need no special case.
    """
    from scipy.spatial import KDTree

    if not places:
        return np.empty((0, 2), dtype=np.int64)
    chord = 2 * math.sin(min(math.pi, distance_km / EARTH_RADIUS_KM) / 2)
    found = KDTree(unit_vectors(places)).query_pairs(chord, output_type="ndarray").astype(np.int64)
    found.sort(axis=1)
    return found[np.lexsort((found[:, 1], found[:, 0]))]


def clusters(targets: list[Target], distance_km: float) -> list[list[Target]]:
    """Groups of places connected by steps shorter than `distance_km`, in the order of their first name.

    A target without a position forms a group with one member.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    ordered = sorted(targets, key=lambda target: target.name)
    placed = [index for index, target in enumerate(ordered) if target.coordinates]
    positions = [target.coordinates for target in ordered if target.coordinates]
    pairs = np.array(placed, dtype=np.int64)[pairs_within(positions, distance_km)]
    ones = np.ones(len(pairs), dtype=np.int8)
    _, labels = connected_components(coo_array((ones, (pairs[:, 0], pairs[:, 1])), (len(ordered), len(ordered))), False)
    members: dict[int, list[Target]] = {}
    for label, target in zip(labels, ordered, strict=True):
        members.setdefault(int(label), []).append(target)
    return list(members.values())


def given_splits(targets: list[Target]) -> dict[Split, list[Target]] | None:
    """The splits that the catalogue names, or None if it names none.

    Raises OrionError if some places or some of the three splits are missing.
    """
    unnamed = [target for target in targets if target.split is None]
    if len(unnamed) == len(targets):
        return None
    splits: dict[Split, list[Target]] = {split: [t for t in targets if t.split == split] for split in SPLITS}
    empty = [split for split in SPLITS if not splits[split]]
    if unnamed or empty:
        missing = f"no place is in {' or '.join(empty)}"
        what = f"{unnamed[0].origin or unnamed[0].name} has none" if unnamed else missing
        raise OrionError(
            f"{len(targets) - len(unnamed)} of {len(targets)} places have a split, but {what}.",
            "Set train, val or test in every row and use all three, or leave all empty for an automatic split.",
        )
    return splits


def _goals(targets: list[Target]) -> dict[Split, dict[str, int]]:
    """Split -> morphology -> number of places: a sixth each for val and test, at least one if there are three."""
    totals = Counter(target.morphology for target in targets)
    held_out = {name: max(count // 6, int(count >= 3)) for name, count in totals.items()}
    train = {name: count - 2 * held_out[name] for name, count in totals.items()}
    return {"train": train, "val": held_out, "test": dict(held_out)}


def split_targets(targets: list[Target], *, seed: int = 42, distance_km: float = 100.0) -> dict[Split, list[Target]]:
    """Train, val and test in the proportion 4:1:1 within every morphology, sorted by name.

    Deterministic for `seed` and independent of the order of `targets`. Raises OrionError if no exact division keeps
    the distance.
    """
    groups = clusters(targets, distance_km)
    goal = _goals(targets)
    for attempt in range(_ATTEMPTS):
        source = random.Random(f"{seed}/{attempt}")
        shuffled = groups[:]
        source.shuffle(shuffled)
        shuffled.sort(key=len, reverse=True)  # large groups are hard to place, so they go first
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
        f"no split keeps places {distance_km:g} km apart; the largest cluster has {len(largest)} places "
        f"({', '.join(target.name for target in largest[:4])}...).",
        "Lower dataset.split_distance_km, or spread the places.",
    )
