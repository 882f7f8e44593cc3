"""Sentinel-2 chips, by pystac-client and GDAL themselves, from a STAC API on 127.0.0.1."""

import csv
import io
import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from rasterio.shutil import copy
from rasterio.warp import transform

from orion_triage.dataset import build
from orion_triage.dataset.catalogue import Target
from orion_triage.dataset.records import FRAMES_TABLE
from orion_triage.dataset.sources.sentinel2 import Sentinel2, chip_corner
from orion_triage.dataset.sources.source import Absent, ImagerySource, Picture, Shot
from orion_triage.errors import OrionError
from orion_triage.imagery.frames import decode_frame
from orion_triage.mission.prompt import Coordinates
from orion_triage.settings import DatasetSettings
from tests.conftest import MISSION
from tests.dataset.stac_server import CONFORMANCE, Stac, position_of, positions, serve, write_cog

PRAGUE = (14.42, 50.08)
UTM33N = 32633


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)


@pytest.fixture
def stac(tmp_path: Path) -> Iterator[Stac]:
    with serve(tmp_path / "served") as server:
        yield server


def place(where: tuple[float, float] = PRAGUE, name: str = "prague") -> Shot:
    return Shot(Target(name, "MEDIUM", "urban_grid", Coordinates(*where), "A street grid."))


def source(stac: Stac, **options: Any) -> Sentinel2:
    settings = {
        "cache": stac.folder.parent / "cache",
        "url": stac.url,
        "retry_delay_seconds": 0.01,
        "timeout_seconds": 60.0,
    }
    return Sentinel2(**(settings | options))


def one(stac: Stac, where: tuple[float, float] = PRAGUE, **options: Any) -> Picture | Absent:
    (answer,) = source(stac, **options).pictures([place(where)])
    return answer


def picture(stac: Stac, where: tuple[float, float] = PRAGUE, **options: Any) -> Picture:
    answer = one(stac, where, **options)
    assert isinstance(answer, Picture), answer
    return answer


def why(stac: Stac, **options: Any) -> str:
    answer = one(stac, **options)
    assert isinstance(answer, Absent)
    assert answer.outcome == "failed"
    assert answer.why.startswith("prague: ")
    return answer.why


def item_of(picture: Picture) -> str:
    return Image.open(io.BytesIO(picture.data)).info["item"]


def png(side: int, **texts: str) -> bytes:
    info, buffer = PngInfo(), io.BytesIO()
    for key, text in texts.items():
        info.add_text(key, text)
    Image.new("RGB", (side, side)).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def part(share: float, inside: int, outside: int = 4, side: int = 320) -> np.ndarray:
    """SCL classes with `inside` on that share of the chip's rows, and `outside` elsewhere."""
    classes = np.full((side, side), outside, np.uint8)
    top = (side - 256) // 2
    classes[top : top + round(256 * share)] = inside
    return classes


def asked_for(stac: Stac, scene: str) -> list[str]:
    return [request for request in stac.requests if f"/{scene}/" in request]


# Zones of both hemispheres, a high latitude, and the antimeridian from either side and either zone.
@pytest.mark.parametrize(
    ("where", "epsg"),
    [
        (PRAGUE, UTM33N),
        ((151.2093, -33.8688), 32756),
        ((-68.3, -54.8), 32719),
        ((16.0, 78.2), UTM33N),
        ((-179.995, -16.8), 32701),
        ((-179.995, -16.8), 32760),
        ((179.995, 66.1), 32660),
        ((179.995, 66.1), 32601),
        ((180.0, 51.9), 32601),
    ],
)
def test_the_chip_is_cut_from_the_scenes_own_grid(stac: Stac, where: tuple[float, float], epsg: int) -> None:
    stac.add("scene", where, epsg=epsg, shift=(37, -21), side=700)
    pixels = np.asarray(decode_frame(picture(stac, where).data, "chip", 512).image)
    row, column = position_of(pixels[0, 0])
    assert np.array_equal(pixels, positions(700).transpose(1, 2, 0)[row : row + 512, column : column + 512])
    with rasterio.open(stac.folder / "scene" / "visual.tif") as raster:
        (x,), (y,) = transform("EPSG:4326", raster.crs, [where[0]], [where[1]])
        left, top = raster.transform @ (column + 256, row + 256)
    assert abs(x - left) <= 10
    assert abs(y - top) <= 10


def test_the_chips_of_both_rasters_show_the_same_ground() -> None:
    for x in np.arange(510_000, 510_060, 0.9):
        coarse, fine = (chip_corner(499_980, 4_700_040, x, 4_650_003.7, metres) for metres in (20, 10))
        assert fine == (coarse[0] * 2, coarse[1] * 2)
        assert abs(499_980 + fine[0] * 10 + 2560 - x) <= 10


def test_cloud_is_counted_over_the_chip_not_over_the_scene(stac: Stac) -> None:
    stac.add("clear_elsewhere", PRAGUE, epsg=UTM33N, scl=part(0.4, 9), cloud_cover=1.0)
    stac.add("middling", PRAGUE, epsg=UTM33N, scl=part(0.15, 8), cloud_cover=30.0)
    stac.add("cloudy_elsewhere", PRAGUE, epsg=UTM33N, scl=part(0.05, 3), cloud_cover=80.0)
    assert item_of(picture(stac)) == "cloudy_elsewhere"


def test_which_classes_are_cloud(stac: Stac) -> None:
    stac.add("scene", PRAGUE, epsg=UTM33N)
    path = stac.folder / "scene" / "scl.tif"
    with rasterio.open(path) as raster:
        left, top = raster.transform @ (0, 0)
    cloudy = set()
    for scl in range(1, 12):
        write_cog(path, np.full((1, 320, 320), scl, np.uint8), UTM33N, left, top, 20)
        answer = one(stac, cache=stac.folder.parent / f"cache-{scl}")
        cloudy |= {scl} if isinstance(answer, Absent) else set()
    assert cloudy == {3, 8, 9, 10}


def test_a_clear_chip_ends_the_search(stac: Stac) -> None:
    stac.add("a", PRAGUE, epsg=UTM33N, scl=part(0.05, 9), cloud_cover=0.1)
    stac.add("b", PRAGUE, epsg=UTM33N, scl=part(0.008, 9), cloud_cover=0.2)
    stac.add("c", PRAGUE, epsg=UTM33N, cloud_cover=0.3)
    assert item_of(picture(stac)) == "b"
    assert not asked_for(stac, "c")
    assert asked_for(stac, "a")


def test_equal_clouds_are_settled_by_the_items_name(stac: Stac) -> None:
    for name, cover in (("b", 1.0), ("c", 2.0), ("a", 3.0)):
        stac.add(name, PRAGUE, epsg=UTM33N, scl=part(0.1, 9), cloud_cover=cover)
    assert item_of(picture(stac)) == "a"


def test_only_so_many_scenes_are_looked_at(stac: Stac) -> None:
    for number in range(5):
        stac.add(f"s{number}", PRAGUE, epsg=UTM33N, scl=part(0.9 - number / 5, 9), cloud_cover=float(number))
    assert "none of 3 scenes" in why(stac, max_scenes_per_place=3)
    assert not asked_for(stac, "s3")
    assert item_of(picture(stac, max_scenes_per_place=5)) == "s4"


def test_a_scene_without_cloud_cover_comes_last(stac: Stac) -> None:
    stac.add("a", PRAGUE, epsg=UTM33N, cloud_cover=None)
    stac.add("b", PRAGUE, epsg=UTM33N, cloud_cover=99.0)
    assert item_of(picture(stac)) == "b"


def test_gaps_in_the_data_refuse_a_scene(stac: Stac) -> None:
    stac.add("gap", PRAGUE, epsg=UTM33N, scl=part(0.03, 0), cloud_cover=0.0)
    assert "gap has data for only 96.9% of the chip (scl)" in why(stac)
    stac.add("small_gap", PRAGUE, epsg=UTM33N, scl=part(0.015, 0), cloud_cover=1.0)
    assert item_of(picture(stac)) == "small_gap"


def test_a_black_picture_is_refused_although_scl_has_data(stac: Stac) -> None:
    black = positions(640)
    black[:, 300:330] = 0
    stac.add("black", PRAGUE, epsg=UTM33N, visual=black, cloud_cover=0.0)
    stac.add("whole", PRAGUE, epsg=UTM33N, cloud_cover=1.0)
    assert item_of(picture(stac)) == "whole"
    stac.items.pop()
    assert "black has data for only 94.1% of the chip (visual)" in why(stac, start="2024-02-01")


@pytest.mark.parametrize("shift", [(280, 0), (-280, 0), (0, 280), (0, -280), (66, 0), (0, -66)])
def test_at_a_tiles_edge_the_neighbour_is_taken(stac: Stac, shift: tuple[int, int]) -> None:
    stac.add("clearer", PRAGUE, epsg=UTM33N, shift=shift, cloud_cover=0.0)
    stac.add("neighbour", PRAGUE, epsg=32632, cloud_cover=50.0)
    assert item_of(picture(stac)) == "neighbour"
    stac.items.pop()
    assert "clearer ends within 2.56 km of the place" in why(stac, start="2024-02-01")


@pytest.mark.parametrize("shift", [(64, -64), (-64, 64)])
def test_a_chip_that_just_fits_is_taken(stac: Stac, shift: tuple[int, int]) -> None:
    stac.add("fits", PRAGUE, epsg=UTM33N, shift=shift)
    assert picture(stac)


def test_clouds_everywhere(stac: Stac) -> None:
    stac.add("a", PRAGUE, epsg=UTM33N, scl=part(0.5, 9), cloud_cover=0.0)
    stac.add("b", PRAGUE, epsg=UTM33N, scl=part(0.25, 10), cloud_cover=60.0)
    said = (
        "none of 2 scenes between 2024-01-01 and 2025-12-31 is usable: b, the least cloudy of the others, has 25% cloud"
    )
    assert said in why(stac)
    assert item_of(picture(stac, max_cloud_share=0.3)) == "b"
    assert sorted(path.name[:6] for path in (stac.folder.parent / "cache").iterdir()) == ["prague"]


def test_no_scene(stac: Stac) -> None:
    stac.add("elsewhere", (15.9, 50.08), epsg=UTM33N)
    stac.add("too_old", PRAGUE, epsg=UTM33N, when="2023-12-31T23:59:59.000Z")
    stac.add("too_new", PRAGUE, epsg=UTM33N, when="2026-01-01T00:00:00.000Z")
    stac.add("another", PRAGUE, epsg=UTM33N)["collection"] = "sentinel-2-l1c"
    assert "no scene between 2024-01-01 and 2025-12-31 contains longitude 14.42, latitude 50.08" in why(stac)
    stac.add("last_day", PRAGUE, epsg=UTM33N, when="2025-12-31T23:59:58.000Z")
    assert item_of(picture(stac)) == "last_day"


def test_only_the_chips_bytes_are_read(stac: Stac) -> None:
    noise = np.random.default_rng(0).integers(1, 255, (3, 2048, 2048), dtype=np.uint8)
    classes = np.random.default_rng(1).integers(4, 8, (1024, 1024), dtype=np.uint8)
    stac.add("large", PRAGUE, epsg=UTM33N, visual=noise, scl=classes, side=2048)
    chip = np.asarray(Image.open(io.BytesIO(picture(stac).data)))
    assert np.array_equal(chip, noise.transpose(1, 2, 0)[768:1280, 768:1280])
    for asset in ("visual", "scl"):
        path = f"/large/{asset}.tif"
        assert 0 < stac.bytes_served[path] < 0.3 * (stac.folder / path[1:]).stat().st_size
    assert {request.partition(" ")[2] for request in stac.requests} == {
        "/",
        "/search",
        "/large/scl.tif",
        "/large/visual.tif",
    }


def test_what_a_picture_brings_along(stac: Stac) -> None:
    stac.add("S2A_33UVR_20240601_0_L2A", PRAGUE, epsg=UTM33N, when="2024-06-01T12:20:30.456+02:00", scl=part(0.0, 9))
    answer = picture(stac)
    assert (answer.metres_per_pixel, answer.captured_at, answer.cached) == (10.0, "2024-06-01T10:20:30Z", False)
    assert Image.open(io.BytesIO(answer.data)).info == {
        "item": "S2A_33UVR_20240601_0_L2A",
        "captured_at": "2024-06-01T10:20:30Z",
        "cloud_share": "0.0000",
        "attribution": "contains modified Copernicus Sentinel data 2024-2025",
    }
    interface: ImagerySource = source(stac)
    assert interface.redistributable
    assert source(stac, start="2025-03-01").attribution.endswith("data 2025")


def test_the_second_call_asks_nobody(stac: Stac) -> None:
    stac.add("scene", PRAGUE, epsg=UTM33N)
    first = picture(stac)
    stac.stop()
    second = picture(stac)
    assert second == Picture(first.data, 10.0, first.captured_at, cached=True)
    with pytest.raises(OrionError, match="does not answer as a STAC API"):
        one(stac, max_cloud_share=0.1)
    with pytest.raises(OrionError, match="does not answer as a STAC API"):
        one(stac, (14.43, 50.08))


def test_a_damaged_cache_file_is_fetched_again(stac: Stac) -> None:
    stac.add("scene", PRAGUE, epsg=UTM33N)
    first = picture(stac)
    (path,) = (stac.folder.parent / "cache").iterdir()
    cut = [first.data[:length] for length in (0, 20, len(first.data) // 2, len(first.data) - 6)]
    for damaged in (*cut, png(256, captured_at="2024-06-01T10:20:30Z"), png(512, item="scene")):
        path.write_bytes(damaged)
        assert picture(stac) == first
        assert path.read_bytes() == first.data


# The first two requests are pystac-client's, the others GDAL's: each fault meets both, some meet every request.
REQUESTS = ("GET /", "POST /search", "HEAD /a/scl.tif", "GET /a/scl.tif", "GET /a/visual.tif")
BOTH = (REQUESTS[1], REQUESTS[-1])


@pytest.mark.parametrize(
    ("fault", "requests"),
    [("500", REQUESTS), ("503", BOTH), ("429", BOTH), ("cut", REQUESTS), ("page", REQUESTS), ("stall", BOTH)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_passing_fault_is_asked_again(stac: Stac, fault: str, requests: tuple[str, ...]) -> None:
    stac.add("a", PRAGUE, epsg=UTM33N)
    stac.add("b", PRAGUE, epsg=UTM33N, cloud_cover=1.0)
    for number, request in enumerate(requests):
        stac.faults[request] = iter([fault])
        cache = stac.folder.parent / f"cache-{number}"
        answer = picture(stac, timeout_seconds=1.0 if fault == "stall" else 60.0, cache=cache)
        assert stac.stalls_waited_for == 0, request
        assert item_of(answer) == "a", request
        assert np.array_equal(
            np.asarray(Image.open(io.BytesIO(answer.data))), positions(640).transpose(1, 2, 0)[64:576, 64:576]
        )
        assert next(stac.faults[request], None) is None, request


@pytest.mark.parametrize("fault", ["503", "cut"])
def test_a_lasting_fault_fails_the_place_and_takes_no_second_best(stac: Stac, fault: str) -> None:
    stac.add("a", PRAGUE, epsg=UTM33N)
    stac.add("b", PRAGUE, epsg=UTM33N, cloud_cover=1.0)
    stac.faults["GET /a/visual.tif"] = itertools.repeat(fault)
    assert "/a/visual.tif cannot be read" in why(stac)
    assert not (stac.folder.parent / "cache").exists()
    assert not asked_for(stac, "b")


def test_one_failed_place_does_not_stop_the_others(stac: Stac) -> None:
    places = [(lon, 50.08) for lon in (14.0, 14.5, 15.0, 15.5, 16.0)]
    for number, where in enumerate(places):
        stac.add(f"s{number}", where, epsg=UTM33N)
        if number != 2:
            stac.faults[f"GET /s{number}/scl.tif"] = itertools.repeat("503")
    shots = [place(where, f"p{number}") for number, where in enumerate(places)]
    answers = list(source(stac).pictures(shots))
    assert [type(answer) for answer in answers] == [Absent, Absent, Picture, Absent, Absent]
    stac.faults["GET /s2/scl.tif"] = itertools.repeat("503")
    with pytest.raises(OrionError, match=r"failed for 3 places in a row \(p0, p1, p2\); last error: http.*s2/scl.tif"):
        list(source(stac, start="2024-02-01").pictures(shots))


def test_a_server_that_goes_away_stops_the_build(stac: Stac) -> None:
    stac.add("scene", PRAGUE, epsg=UTM33N)
    answers = source(stac).pictures([place(), *(place((lon, 50.0), f"p{lon}") for lon in (1, 2, 3, 4))])
    assert isinstance(next(answers), Picture)
    stac.stop()
    assert isinstance(next(answers), Absent)
    assert isinstance(next(answers), Absent)
    with pytest.raises(OrionError, match=r"failed for 3 places in a row \(p1, p2, p3\)"):
        next(answers)


def test_a_server_that_is_not_there(stac: Stac) -> None:
    stac.stop()
    with pytest.raises(OrionError, match=f"{stac.url} does not answer as a STAC API: .*refused"):
        one(stac)


def test_a_server_that_is_no_stac_api(stac: Stac, tmp_path: Path) -> None:
    stac.folder.mkdir()
    for name, text in (("page", "<html>"), ("json", "{}"), ("list", "[]"), ("item", '{"type": "Feature"}')):
        (stac.folder / name).write_text(text)
        with pytest.raises(OrionError, match=f"/{name} does not answer as a STAC API"):
            one(stac, url=f"{stac.url}/{name}")
    with pytest.raises(OrionError, match=r"/nothing refused a request: status 404"):
        one(stac, url=f"{stac.url}/nothing")
    for missing, ability in (("item-search", "ITEM_SEARCH"), ("#sort", "SORT")):
        stac.conformance = [uri for uri in CONFORMANCE if missing not in uri]
        with pytest.raises(OrionError, match=f"does not support {ability}"):
            one(stac)


def test_a_search_that_is_refused_stops_the_build(stac: Stac) -> None:
    stac.faults["POST /search"] = itertools.repeat("403")
    with pytest.raises(OrionError, match="refused a request: status 403"):
        one(stac)
    assert stac.requests.count("POST /search") == 1


def test_scenes_that_cannot_be_used_are_named(stac: Stac) -> None:
    secret = stac.folder / "secret.tif"
    for number, href in enumerate([f"file://{secret}", str(secret), "s3://bucket/x.tif", f"{stac.url}/gone.tif"]):
        stac.add(f"s{number}", PRAGUE, epsg=UTM33N, cloud_cover=float(number))["assets"]["visual"]["href"] = href
    write_cog(secret, positions(640), UTM33N, 0, 0, 10)
    del stac.add("s4", PRAGUE, epsg=UTM33N, cloud_cover=4.0)["assets"]["visual"]
    stac.add("s5", PRAGUE, epsg=UTM33N, cloud_cover=5.0)["properties"]["datetime"] = None
    expected = [
        f"s0 is at file://{secret}, which is not an http URL",
        f"s1 is at {secret}, which is not an http URL",
        "s2 is at s3://bucket/x.tif, which is not an http URL",
        f"s3 has no file at {stac.url}/gone.tif (HTTP response code: 404)",
        "s4 has no time or no picture ('visual')",
        "s5 has no time or no picture",
    ]
    every = why(stac)
    assert "none of 6 scenes" in every
    assert "; ..." in every
    for words in expected:
        assert words in why(stac)
        stac.items.pop(0)


@pytest.mark.parametrize(
    ("pixels", "epsg", "metres"),
    [
        (positions(640)[:1], UTM33N, 10),
        (positions(640), UTM33N, 20),
        (positions(640), 3857, 10),
        (positions(640).astype(np.uint16), UTM33N, 10),
    ],
    ids=["grey", "20 m", "web Mercator", "16 bits"],
)
def test_another_raster_is_refused(stac: Stac, pixels: np.ndarray, epsg: int, metres: int) -> None:
    stac.add("a", PRAGUE, epsg=UTM33N)
    (x,), (y,) = transform("EPSG:4326", f"EPSG:{epsg}", [PRAGUE[0]], [PRAGUE[1]])
    write_cog(stac.folder / "a" / "visual.tif", pixels, epsg, x - 320 * metres, y + 320 * metres, metres)
    assert "a has no 8-bit raster of 10 m in UTM" in why(stac)


def test_a_server_that_ignores_the_place(stac: Stac, monkeypatch: pytest.MonkeyPatch) -> None:
    # The server of these tests is told to lie.
    monkeypatch.setattr(stac, "shows", lambda *_: True)
    stac.add("quarter", (105.0, 0.0), epsg=32648, cloud_cover=0.0)  # PROJ has no answer 90 degrees from a zone's middle
    stac.add("south", (15.0, -50.0), epsg=32733, cloud_cover=1.0)
    answer = one(stac, (15.0, 0.0))
    assert isinstance(answer, Absent)
    assert "quarter shows another part of the Earth; south ends within 2.56 km of the place" in answer.why


def test_a_raster_cannot_point_to_files_of_this_machine(stac: Stac) -> None:
    stac.add("a", PRAGUE, epsg=UTM33N)
    hidden = stac.folder.parent / "hidden.tif"
    (stac.folder / "a" / "visual.tif").rename(hidden)
    with rasterio.open(hidden) as raster:
        copy(raster, stac.folder / "a" / "visual.tif", driver="VRT")
    assert "not recognized" in why(stac)


def test_what_is_refused_before_any_question(stac: Stac, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OrionError, match="prague~2: Sentinel-2 has one picture per place"):
        list(source(stac).pictures([place(), Shot(place().target, 2)]))
    with pytest.raises(OrionError, match="end is before the start"):
        source(stac, start="2025-01-01", end="2024-12-31")
    with pytest.raises(OrionError, match="dates 2025 to 2025-12-31: Invalid"):
        source(stac, start="2025")
    with pytest.raises(OrionError, match="not the URL of a STAC API"):
        source(stac, url="/etc/catalogue.json")
    # An installation without the extra.
    monkeypatch.setitem(sys.modules, "rasterio", None)
    said = r"rasterio, which is not installed\. Run pip install 'orion-triage\[imagery\]'"
    with pytest.raises(OrionError, match=said):
        one(stac)
    assert stac.requests == []


def test_the_stage_builds_a_dataset_from_scenes(stac: Stac, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three places of one scene, their splits given; a fourth that no scene shows is in the account."""
    monkeypatch.setenv("ORION_CACHE", str(tmp_path / "cache"))
    stac.add("scene", PRAGUE, epsg=UTM33N, side=1400)
    rows = [
        ("here", "HIGH", PRAGUE[0], PRAGUE[1], "train"),
        ("east", "MEDIUM", PRAGUE[0] + 0.03, PRAGUE[1], "val"),
        ("north", "LOW", PRAGUE[0], PRAGUE[1] + 0.02, "test"),
        ("nowhere", "LOW", -30.0, 0.0, "train"),
    ]
    catalogue = tmp_path / "places.csv"
    lines = [f"{name},{category},any,{lon},{lat},Some reason.,{split}" for name, category, lon, lat, split in rows]
    catalogue.write_text("\n".join(["name,category,morphology,lon,lat,reason,split", *lines]))
    settings = DatasetSettings(source="sentinel2", url=stac.url, catalogue=str(catalogue), captured_from="2020-01-01")
    figures = build.run(tmp_path / "out", settings, MISSION)
    assert figures["account"] == {"fetched": 3, "failed": 1}
    assert "nowhere: no scene between 2020-01-01 and 2024-12-31" in figures["warnings"][-1]
    with (tmp_path / "out" / FRAMES_TABLE).open(newline="") as file:
        found = {row["name"]: row for row in csv.DictReader(file)}
    assert {row["split"] for row in found.values()} == {"train", "val", "test"}
    for row in found.values():
        assert (row["metres_per_pixel"], row["redistributable"]) == ("10.0", "yes")
        assert row["captured_at"].startswith("20")
        assert "Copernicus" in row["attribution"]
        pixels = np.asarray(Image.open(tmp_path / "out" / row["image"]))
        assert pixels.shape == (512, 512, 3)
    assert build.run(tmp_path / "again", settings, MISSION)["account"] == {"cached": 3, "failed": 1}
