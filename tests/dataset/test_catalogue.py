import itertools
import random
import re
from collections import Counter
from pathlib import Path

import pytest

from orion_triage.dataset.catalogue import (
    COLUMNS,
    MORPHOLOGIES,
    load_catalogue,
)
from orion_triage.dataset.split import great_circle_km, split_targets
from orion_triage.errors import OrionError
from orion_triage.mission.prompt import Coordinates

SIZES = {"train": 240, "val": 60, "test": 60}


def test_the_catalogue_has_24_places_of_every_morphology() -> None:
    targets = load_catalogue()
    counts = Counter((target.category, target.morphology) for target in targets)
    named = zip(["LOW"] * 5 + ["MEDIUM"] * 5 + ["HIGH"] * 5, MORPHOLOGIES, strict=True)
    assert counts == dict.fromkeys(named, 24)
    assert len({target.reason for target in targets}) == len(targets) == 360
    for target in targets:
        assert not set(re.findall(r"\w+", target.reason.upper())) & {"HIGH", "MEDIUM", "LOW"}, target.reason


def test_no_two_places_share_a_tile() -> None:
    for a, b in itertools.combinations(load_catalogue(), 2):
        assert great_circle_km(a.coordinates, b.coordinates) > 8.2, (a.name, b.name)


def test_the_split_is_stratified_distant_and_independent_of_order() -> None:
    targets = load_catalogue()
    splits = split_targets(targets)
    shuffled = targets[:]
    random.Random(1).shuffle(shuffled)
    assert split_targets(shuffled) == splits
    assert split_targets(targets, seed=1) != splits
    assert {name: len(members) for name, members in splits.items()} == SIZES
    for name, members in splits.items():
        assert set(Counter(t.morphology for t in members).values()) == {SIZES[name] // 15}
    for first, second in itertools.combinations(splits.values(), 2):
        assert min(great_circle_km(a.coordinates, b.coordinates) for a in first for b in second) >= 100


def test_an_impossible_distance_is_refused() -> None:
    with pytest.raises(OrionError, match="no split keeps places 5000 km apart"):
        split_targets(load_catalogue(), distance_km=5000)


def test_all_mistakes_are_named_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "places.csv"
    rows = [
        "ok,HIGH,mega_port,1,2,Fine.",
        "ok,HIGH,mega_port,1,2,Twice.",
        "Bad Name,HIGH,moon,400,nan,",
    ]
    path.write_text("\n".join([",".join(COLUMNS), *rows]), encoding="utf-8")
    with pytest.raises(OrionError) as caught:
        load_catalogue(path)
    message = str(caught.value)
    for part in (
        "line 3: name 'ok' is already used on line 2",
        "line 4: name 'Bad Name'",
        "morphology 'moon' cannot be drawn; supported: ocean_water, ",
        "lon '400'",
        "lat 'nan'",
        "reason is empty",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("place", "km"),
    [((0, 0, 0, 1), 111.19), ((179.9, 0, -179.9, 0), 22.24), ((2.35, 48.86, -0.13, 51.51), 343)],
)
def test_great_circle(place: tuple[float, float, float, float], km: float) -> None:
    a, b = Coordinates(*place[:2]), Coordinates(*place[2:])
    assert great_circle_km(a, b) == pytest.approx(km, rel=0.01)
