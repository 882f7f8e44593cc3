"""dataset/build.py: several tiles a place, and what that does to the intervals."""

import hashlib
from collections import Counter
from pathlib import Path

import pytest

from orion_triage.dataset import build
from orion_triage.dataset.records import image_path, read_split
from orion_triage.errors import OrionError
from orion_triage.evaluate.judgement import judge
from orion_triage.evaluate.metrics import Prediction
from orion_triage.mission.prompt import Coordinates
from orion_triage.settings import DatasetSettings
from tests.conftest import MISSION, places_of, write_catalogue


@pytest.fixture
def places(tmp_path: Path) -> Path:
    """A catalogue of three places of each of three morphologies: as few as fill three splits."""
    targets = places_of("ocean_water", "agriculture", "mega_airport", count=3)
    return write_catalogue(tmp_path / "places.csv", targets)


def test_several_tiles_a_place_are_all_different_and_only_in_test(places: Path, tmp_path: Path) -> None:
    settings = DatasetSettings(catalogue=str(places), split_distance_km=8.0, test_size=8)
    plain = build.run(tmp_path / "plain", settings.model_copy(update={"test_size": 0}), MISSION)
    figures = build.run(tmp_path / "more", settings, MISSION)
    assert (plain["records"]["test"], figures["records"]["test"]) == (3, 8)
    for split in ("train", "val"):
        assert read_split(tmp_path / "more", split, MISSION) == read_split(tmp_path / "plain", split, MISSION)  # type: ignore[arg-type]
    records = read_split(tmp_path / "more", "test", MISSION)
    assert sorted(Counter(record.coordinates for record in records).values()) == [2, 3, 3]
    hashes = [hashlib.sha256(image_path(tmp_path / "more", record).read_bytes()).hexdigest() for record in records]
    assert len(set(hashes)) == 8
    first = read_split(tmp_path / "plain", "test", MISSION)
    assert [record for record in records if "~" not in record.name] == first
    with pytest.raises(OrionError, match="test_size=2 is less than the 3 test places"):
        build.run(tmp_path / "fewer", settings.model_copy(update={"test_size": 2}), MISSION)
    copied = DatasetSettings(folder=str(tmp_path / "plain"), test_size=4)
    with pytest.raises(OrionError, match="has only 3 test records"):
        build.run(tmp_path / "copied", copied, MISSION)


def test_copies_of_one_place_narrow_no_interval() -> None:
    """Twenty places, ten right: with each of them five times, Wilson's interval would be half as wide."""
    guesses = ["HIGH"] * 10 + ["LOW"] * 10

    def judged(copies: int) -> tuple[dict, dict]:
        predictions, places = [], {}
        for number, guess in enumerate(guesses):
            for copy in range(copies):
                name = f"p{number}~{copy}"
                predictions.append(Prediction("B", name, "HIGH", guess))
                places[name] = Coordinates(number * 11.0 - 110, 0)
        return judge(predictions, places, MISSION), places

    once, five = judged(1)[0], judged(5)[0]
    assert (once["places"], five["places"]) == (20, 20)
    recall = five["high_recall"]
    assert recall["total"] == 100
    assert recall["high"] - recall["low"] > 0.9 * (once["high_recall"]["high"] - once["high_recall"]["low"])
