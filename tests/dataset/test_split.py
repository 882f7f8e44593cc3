"""dataset/split.py: neighbours on a sphere, groups of them, and splits that a catalogue names itself."""

import itertools
import random
import time
from collections import Counter

import pytest

from orion_triage.dataset.catalogue import Target
from orion_triage.dataset.split import clusters, given_splits, great_circle_km, pairs_within, split_targets
from orion_triage.errors import OrionError
from orion_triage.mission.prompt import Coordinates


def target(name: str, lon: float, lat: float, morphology: str = "fields", split: str | None = None) -> Target:
    return Target(name, "MEDIUM", morphology, Coordinates(lon, lat), "Fields.", split)  # type: ignore[arg-type]


def test_neighbours_are_those_of_the_great_circle_everywhere() -> None:
    """Brute force agrees, with places at the poles and on both sides of the antimeridian."""
    source = random.Random(5)
    places = [Coordinates(source.uniform(-180, 180), source.uniform(-90, 90)) for _ in range(150)]
    places += [Coordinates(lon, lat) for lon in (-180, -179.8, 179.8, 180) for lat in (0, 89.9, -90)]
    for distance in (1.0, 60.0, 700.0, 30_000.0):
        expected = [
            [i, j]
            for i, j in itertools.combinations(range(len(places)), 2)
            if great_circle_km(places[i], places[j]) < distance - 1e-6
        ]
        assert pairs_within(places, distance).tolist() == expected
    assert pairs_within([], 10).shape == (0, 2)


def test_groups_are_chains_and_a_frame_without_a_position_is_alone() -> None:
    chain = [target(f"c{n}", 179.0 + 0.5 * n if n < 3 else -180 + 0.5 * (n - 2), 0) for n in range(5)]
    lost = Target("lost", "LOW", "sea", None, "Sea.")
    far = target("far", 0, 89)
    groups = clusters([far, lost, *chain], 60.0)
    assert [[member.name for member in group] for group in groups] == [
        ["c0", "c1", "c2", "c3", "c4"],
        ["far"],
        ["lost"],
    ]


def test_small_morphologies_reach_every_split() -> None:
    targets = [target(f"{kind}{n}", 10 * n, 20 * row, kind) for row, kind in enumerate("abc") for n in range(3 + row)]
    splits = split_targets(targets)
    for held_out in ("val", "test"):
        assert Counter(t.morphology for t in splits[held_out]) == {"a": 1, "b": 1, "c": 1}  # type: ignore[index]
    assert len(splits["train"]) == 6


def test_twenty_thousand_places_are_divided_in_seconds() -> None:
    source = random.Random(1)
    targets = [
        target(f"p{n}", source.uniform(-180, 180), source.uniform(-85, 85), f"kind{n % 15}") for n in range(20_000)
    ]
    # Of this process alone: what else the machine does is not counted. It is 2 s; all 200 million pairs take minutes.
    began = time.process_time()
    splits = split_targets(targets, distance_km=8)
    assert time.process_time() - began < 30
    assert [len(splits[name]) for name in ("val", "test")] == [3330, 3330]


def test_a_catalogue_may_name_its_splits_for_all_places_or_for_none() -> None:
    named = [target(f"p{n}", n, 0, split=split) for n, split in enumerate(("train", "val", "test", "train"))]
    assert given_splits([target("p", 0, 0)]) is None
    splits = given_splits(named)
    assert splits is not None
    assert [[t.name for t in splits[split]] for split in ("train", "val", "test")] == [["p0", "p3"], ["p1"], ["p2"]]
    with pytest.raises(OrionError, match="4 of 5 places have a split, but extra has none"):
        given_splits([*named, target("extra", 9, 9)])
    with pytest.raises(OrionError, match="no place is in val"):
        given_splits([t for t in named if t.split != "val"])
