"""The dataset stage with SimSat as its source: the account of the whole catalogue, the stop, the kills."""

import csv
import functools
import io
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from itertools import chain, repeat
from pathlib import Path

import pytest
from PIL import Image

from orion_triage.dataset import build
from orion_triage.dataset.catalogue import Target
from orion_triage.dataset.collect import ABSENT_TABLE
from orion_triage.dataset.records import FRAMES_TABLE, read_split
from orion_triage.dataset.sources.simsat import SimSat
from orion_triage.errors import OrionError
from orion_triage.settings import SPLITS, DatasetSettings
from tests.conftest import MISSION, places_of, write_catalogue
from tests.dataset.simsat_server import Place, SimSatServer, serve
from tests.dataset.test_simsat import ATTEMPTS, READ_SECONDS, jpegs

__all__ = ["jpegs"]

SOME_PLACES = places_of("ocean_water", "coastline", "urban_grid", "mega_port", "energy_dam", count=3)


@pytest.fixture
def server(jpegs: list[bytes]) -> Iterator[SimSatServer]:
    with serve(jpegs) as running:
        yield running


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, and a SimSat that is asked without pause."""
    monkeypatch.setenv("ORION_CACHE", str(tmp_path / "cache"))
    fast = {"requests_per_second": 1000, "read_seconds": READ_SECONDS, "attempts": ATTEMPTS, "backoff_seconds": 0.01}
    # The same client, faster than it may ask a real SimSat.
    monkeypatch.setattr(build, "SimSat", functools.partial(SimSat, **fast))
    return tmp_path / "cache" / "imagery" / "simsat"


def settings(server: SimSatServer, **changes: object) -> DatasetSettings:
    return DatasetSettings.model_validate({"source": "simsat", "url": server.url, **changes})


def where(target: Target) -> Place:
    assert target.coordinates is not None
    return target.coordinates.lon, target.coordinates.lat


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_a_catalogue_through_every_fault(server: SimSatServer, cache: Path, tmp_path: Path) -> None:
    """The account of 60 places, four of every morphology, to the last request."""
    targets = places_of(count=4)
    by_name = {target.name: target for target in targets}
    places = str(write_catalogue(tmp_path / "places.csv", targets))
    mix: dict[str, tuple[int, str, int]] = {  # fault: places, outcome, requests of each
        "empty": (3, "fetched", 2),
        "500": (3, "fetched", 2),
        "429 after 0": (2, "fetched", 2),
        "stall": (1, "fetched", 2),
        "drip": (1, "fetched", 2),
        "announces more": (2, "fetched", 2),
        "announces less": (2, "fetched", 2),
        "reset": (2, "fetched", 2),
        "reset midway": (2, "fetched", 2),
        "truncated": (2, "fetched", 2),
        "empty, empty": (2, "fetched", 3),
        "empty forever": (2, "failed", ATTEMPTS),
        "500 forever": (2, "failed", ATTEMPTS),
        "truncated forever": (1, "failed", ATTEMPTS),
        "stall forever": (1, "failed", ATTEMPTS),
        "reset forever": (1, "failed", ATTEMPTS),
        "404": (1, "failed", 1),
        "not visible": (2, "not visible", 1),
        "white": (1, "blank", 1),
    }
    faulty = random.Random(5).sample(
        [target for target in targets if target.category != "LOW"], sum(count for count, _, _ in mix.values())
    )
    expected = {target.name: ("fetched", 1) for target in targets}
    for name, (count, outcome, requests) in mix.items():
        for _ in range(count):
            target = faulty.pop()
            kind = name.removesuffix(" forever")
            server.scripts[where(target)] = repeat(kind) if kind != name else iter(kind.split(", "))
            expected[target.name] = outcome, requests

    figures = build.run(tmp_path / "out", settings(server, catalogue=places, largest_missing_share=0.2), MISSION)
    assert figures["account"] == Counter(outcome for outcome, _ in expected.values())
    assert figures["account"] == {"fetched": 49, "failed": 8, "not visible": 2, "blank": 1}
    requests = server.counts()
    assert {target.name: requests[where(target)] for target in targets} == {
        name: count for name, (_, count) in expected.items()
    }
    absent = {row["name"]: row for row in table(tmp_path / "out" / ABSENT_TABLE)}
    assert {name: row["outcome"] for name, row in absent.items()} == {
        name: outcome for name, (outcome, _) in expected.items() if outcome != "fetched"
    }
    assert all(row["why"] for row in absent.values())
    assert "11 places have no picture and are left out" in figures["warnings"][0]
    frames = table(tmp_path / "out" / FRAMES_TABLE)
    assert len(frames) == 49
    named = {record.image for split in SPLITS for record in read_split(tmp_path / "out", split, MISSION)}
    assert named == {row["image"] for row in frames}
    assert named == {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.png")}
    assert {(row["source"], row["redistributable"]) for row in frames} == {("simsat", "no")}
    widths = {row["name"]: Image.open(io.BytesIO(server.picture(where(by_name[row["name"]])))).width for row in frames}
    assert {row["name"]: int(row["native_width"]) for row in frames} == widths
    assert set(widths.values()) == {2560, 640}

    assert not list(cache.glob(".lon*"))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []

    # The same again asks only for what is missing, and a smaller share stops it: what is there stays.
    asked = len(server.requests)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with pytest.raises(OrionError, match=r"4 of 60 places have no picture, more than .*largest_missing_share=0.05"):
        build.run(tmp_path / "out", settings(server, catalogue=places), MISSION)
    assert not {request.place for request in server.requests[asked:]} & {
        where(target) for target in targets if expected[target.name][0] == "fetched"
    }
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


def test_a_permanent_outage_stops_the_build_and_the_next_goes_on(
    server: SimSatServer, cache: Path, tmp_path: Path
) -> None:
    asked = settings(server, catalogue=str(small_catalogue(tmp_path)), largest_missing_share=0.4)
    order = [target for members in build.plan(asked, MISSION)[1].values() for target in members]
    server.scripts[where(order[10])] = iter(["stop"])
    with pytest.raises(OrionError, match=r"SimSat at http://127.0.0.1:\d+ does not answer") as caught:
        build.run(tmp_path / "out", asked, MISSION)
    assert "it resumes from" in caught.value.fix
    assert not (tmp_path / "out").exists()
    assert len(list(cache.glob("*.jpeg"))) == 10
    server.start()
    figures = build.run(tmp_path / "out", asked, MISSION)
    assert figures["account"] == {"cached": 10, "fetched": 5}


BUILD = """
import functools, sys
from pathlib import Path
from orion_triage.settings import DatasetSettings
from orion_triage.dataset import build
from orion_triage.dataset.collect import ABSENT_TABLE
from orion_triage.dataset.sources.simsat import SimSat
from orion_triage.mission.mission import default_mission

url, places, out = sys.argv[1:]
build.SimSat = functools.partial(SimSat, requests_per_second=1000, backoff_seconds=0.01)
build.run(Path(out), DatasetSettings(source="simsat", url=url, catalogue=places), default_mission())
"""


def small_catalogue(folder: Path) -> Path:
    """Fifteen places: as few as fill three splits."""
    return write_catalogue(folder / "places.csv", SOME_PLACES)


def test_a_build_that_is_killed_again_and_again_goes_on(server: SimSatServer, cache: Path, tmp_path: Path) -> None:
    places = small_catalogue(tmp_path)
    out = tmp_path / "work" / "dataset"
    command = [sys.executable, "-c", BUILD, server.url, str(places), str(out)]
    known = 0
    for pictures, fault in ((2, "stall midway"), (0, "stall"), (5, "stall")):
        asked = len(server.requests)
        answers = chain(repeat("picture", pictures), repeat(fault))
        server.scripts = {where(target): answers for target in SOME_PLACES}
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while len(server.requests) <= asked + pictures:  # it waits for the next one when it is killed
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.kill()
        process.communicate()
        known += pictures
        assert not out.exists()
        assert len(list(cache.glob("*.jpeg"))) == known
    server.scripts = {}
    subprocess.run(command, capture_output=True, check=True)
    assert len(list(cache.glob("*.jpeg"))) == 15
    assert len(table(out / FRAMES_TABLE)) == 15
    assert [path.name for path in out.parent.iterdir()] == ["dataset"]
    assert not list(cache.glob(".lon*"))
    undisturbed = tmp_path / "undisturbed"
    build.run(undisturbed, settings(server, catalogue=str(places)), MISSION)
    for path in (path for path in undisturbed.rglob("*") if path.is_file()):
        assert (out / path.relative_to(undisturbed)).read_bytes() == path.read_bytes()
