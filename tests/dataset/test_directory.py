"""dataset/directory.py: folders of the user's own pictures, through the whole stage."""

import csv
import functools
import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from orion_triage.dataset import build
from orion_triage.dataset.collect import ABSENT_TABLE
from orion_triage.dataset.records import FRAMES_TABLE, read_split
from orion_triage.errors import OrionError
from orion_triage.imagery.frames import read_frame
from orion_triage.mission.prompt import Coordinates
from orion_triage.settings import SPLITS, DatasetSettings
from tests.conftest import MISSION, SHARED

Dataset = Callable[[Path], dict]


@functools.cache
def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def picture(seed: int, size: tuple[int, int] = (512, 512)) -> Image.Image:
    """Something with detail, different for every seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    return Image.fromarray(coarse, "RGB").resize(size, Image.Resampling.BICUBIC)


def rows(count: int = 18) -> list[dict[str, str]]:
    """Places 20 degrees apart, six a category."""
    return [
        {
            "file_name": f"pictures/p{n}.png",
            "category": MISSION.names[n % 3],
            "lon": str(-170 + 18 * n),
            "lat": str(5 * (n % 9) - 20),
            "reason": f"Reason number {n} in plain words.",
            "morphology": ("port", "fields", "forest")[n % 3],
        }
        for n in range(count)
    ]


def write(folder: Path, table: list[dict[str, str]], name: str = "metadata.csv") -> Path:
    for n, row in enumerate(table):
        path = folder / row["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(n))
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    if name.endswith(".csv"):
        with (folder / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, table[0])
            writer.writeheader()
            writer.writerows(table)
    elif name.endswith(".jsonl"):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in table))
    else:
        features = [
            {
                "type": "Feature",
                "geometry": {"type": "Point", "coordinates": [float(row["lon"]), float(row["lat"])]},
                "properties": {key: value for key, value in row.items() if key not in ("lon", "lat")},
            }
            for row in table
        ]
        (folder / name).write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return folder


def built(folder: Path, out: Path) -> dict:
    return build.run(out, DatasetSettings(folder=str(folder)), MISSION)


def frames_table(out: Path) -> list[dict[str, str]]:
    with (out / FRAMES_TABLE).open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", ["metadata.csv", "places.jsonl", "places.geojson"])
def test_a_table_gives_places_reasons_and_a_split(tmp_path: Path, name: str) -> None:
    figures = built(write(tmp_path / "own", rows(), name), tmp_path / "out")
    assert figures["targets"] == {"train": 12, "val": 3, "test": 3}
    assert figures["account"] == {"fetched": 18}
    assert figures["warnings"] == []
    records = {record.name: record for split in SPLITS for record in read_split(tmp_path / "out", split, MISSION)}
    record = records["high_pictures_p3"] if "high_pictures_p3" in records else records["high_pictures_p0"]
    assert record.verdict.category == "HIGH"
    assert record.verdict.reason.startswith("Reason number")
    found = frames_table(tmp_path / "out")
    assert {row["morphology"] for row in found} == {"port", "fields", "forest"}
    assert {(row["source"], row["redistributable"], row["native_width"]) for row in found} == {
        ("directory", "unknown", "512")
    }
    n = next(n for n, row in enumerate(rows()) if f"pictures_p{n}" == found[0]["name"])
    pixels = read_frame(tmp_path / "out" / found[0]["image"], 512).image
    assert np.array_equal(np.asarray(pixels), np.asarray(picture(n)))


def test_other_column_names_suffixes_and_sizes_are_understood(tmp_path: Path) -> None:
    table = rows()
    folder = tmp_path / "own"
    write(folder, table)
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Image", "Label", "longitude", "latitude"])
        for row in table:
            writer.writerow([row["file_name"].removesuffix(".png"), row["category"].lower(), row["lon"], row["lat"]])
    picture(0, (1024, 768)).save(folder / "pictures" / "p0.jpg", quality=95)
    (folder / "pictures" / "p0.png").unlink()
    figures = built(folder, tmp_path / "out")
    assert "18 of 18 frames have no reason" in figures["warnings"][0]
    first = next(row for row in frames_table(tmp_path / "out") if row["name"] == "pictures_p0")
    assert (first["native_width"], first["native_height"], first["morphology"]) == ("1024", "768", "high")
    assert read_frame(tmp_path / "out" / first["image"], 512).native_size == (512, 512)


def test_folders_of_categories_load_without_positions_and_say_what_that_costs(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    for n in range(18):
        path = folder / MISSION.names[n % 3].lower() / f"p{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(n))
    figures = built(folder, tmp_path / "out")
    assert figures["records"] == {"train": 12, "val": 3, "test": 3}  # no coordinates, so no second record
    assert any("18 of 18 frames have no position" in warning for warning in figures["warnings"])
    assert all(record.coordinates is None for record in read_split(tmp_path / "out", "test", MISSION))


def test_split_folders_with_hugging_face_metadata_keep_their_splits(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    for number, split in enumerate(("train", "validation", "test")):
        table = [row | {"file_name": f"{n}-{number}.png"} for n, row in enumerate(rows()) if n % 3 == number]
        for row in table:
            row["category"] = MISSION.names[int(row["file_name"][0]) % 3]
        write(folder / split, table)
    figures = built(folder, tmp_path / "out")
    assert figures["targets"] == {"train": 6, "val": 6, "test": 6}
    assert all(record.name.split("_")[1] == "validation" for record in read_split(tmp_path / "out", "val", MISSION))


def test_a_half_given_split_is_refused(tmp_path: Path) -> None:
    table = [row | {"split": "train"} for row in rows()]
    with pytest.raises(OrionError, match="no place is in val or test"):
        built(write(tmp_path / "a", table), tmp_path / "out")
    table[3]["split"] = ""
    with pytest.raises(OrionError, match="csv line 5 has none"):
        built(write(tmp_path / "b", table), tmp_path / "out")


def test_every_mistake_of_a_table_is_named_with_its_line(tmp_path: Path) -> None:
    table = rows()
    folder = write(tmp_path / "own", table)
    (folder / "pictures" / "p5.png").unlink()
    (tmp_path / "outside.png").write_bytes((folder / "pictures" / "p0.png").read_bytes())
    (folder / "pictures" / "p8.png").unlink()
    (folder / "pictures" / "p8.png").symlink_to(tmp_path / "outside.png")
    table[2]["file_name"] = "../outside.png"
    table[11]["file_name"] = "/etc/passwd"
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)
    with pytest.raises(OrionError) as caught:
        built(folder, tmp_path / "out")
    for part in (
        "metadata.csv line 7: picture 'pictures/p5.png' does not exist",
        "metadata.csv line 10: 'pictures/p8.png' is outside",
        "metadata.csv line 4: file_name '../outside.png' is not a path",
        "metadata.csv line 13: file_name '/etc/passwd' is not a path",
    ):
        assert part in caught.value.message
    table = [row | {"category": "URGENT"} if n == 1 else row for n, row in enumerate(rows())]
    table[4]["lat"], table[4]["lon"] = "120.5", "30"
    table[6]["lon"] = "200"
    with pytest.raises(OrionError) as caught:
        built(write(tmp_path / "second", table), tmp_path / "out")
    for part in (
        "metadata.csv line 3: category 'URGENT'",
        "metadata.csv line 6: lat '120.5' is outside -90..90 (are lon and lat swapped?)",
        "metadata.csv line 8: lon '200' is outside -180..180 (for 200 degrees east, write -160)",
    ):
        assert part in caught.value.message
    assert not (tmp_path / "out").exists()


def test_damaged_and_blank_pictures_are_left_out_by_name_and_too_many_stop_the_build(tmp_path: Path) -> None:
    folder = write(tmp_path / "own", rows())
    (folder / "pictures" / "p0.png").write_bytes(b"\x89PNG\r\n\x1a\n cut")
    Image.new("RGB", (512, 512), (250, 250, 250)).save(folder / "pictures" / "p1.png")  # MEDIUM
    Image.new("RGB", (512, 512), (250, 250, 250)).save(folder / "pictures" / "p2.png")  # LOW: the same blank tile
    figures = built(folder, tmp_path / "out")
    assert figures["account"] == {"fetched": 15, "failed": 1, "blank": 2}
    with (tmp_path / "out" / ABSENT_TABLE).open(newline="") as file:
        absent = {row["name"]: row["outcome"] for row in csv.DictReader(file)}
    assert absent == {"pictures_p0": "failed", "pictures_p1": "blank", "pictures_p2": "blank"}
    left = {record.image for split in SPLITS for record in read_split(tmp_path / "out", split, MISSION)}
    assert len(left) == 15
    assert left == {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.png")}
    (folder / "pictures" / "p3.png").write_bytes(b"nothing")
    with pytest.raises(OrionError, match="4 of 18 places have no picture"):
        built(folder, tmp_path / "second")
    assert not (tmp_path / "second").exists()
    assert not list(tmp_path.glob(".second*"))


def test_a_lone_blank_low_frame_is_kept(tmp_path: Path) -> None:
    folder = write(tmp_path / "own", rows())
    Image.new("RGB", (512, 512), (20, 30, 60)).save(folder / "pictures" / "p2.png")  # LOW: open water
    assert built(folder, tmp_path / "out")["account"] == {"fetched": 18}


def test_a_geotiff_takes_its_position_from_the_file(tmp_path: Path) -> None:
    rasterio = pytest.importorskip("rasterio")
    from rasterio.transform import from_origin

    table = rows()
    folder = write(tmp_path / "own", table)
    for n, crs, transform, where in (
        (0, "EPSG:32631", from_origin(500000 - 5120, 5_000_000 + 5120, 20, 20), (3.0, 45.15)),
        (1, "EPSG:4326", from_origin(100 - 0.0256, 10 + 0.0256, 0.0001, 0.0001), (100.0, 10.0)),
    ):
        (folder / table[n]["file_name"]).unlink()
        table[n] |= {"file_name": f"pictures/p{n}.tif", "lon": "", "lat": ""}
        pixels = np.moveaxis(np.asarray(picture(n)), 2, 0)
        profile = {"driver": "GTiff", "width": 512, "height": 512, "count": 3, "dtype": "uint8", "crs": crs}
        with rasterio.open(folder / table[n]["file_name"], "w", transform=transform, **profile) as file:
            file.write(pixels)
        table[n]["where"] = json.dumps(where)
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)
    built(folder, tmp_path / "out")
    found = {row["name"]: row for row in frames_table(tmp_path / "out")}
    for n, metres in ((0, 20.0), (1, 11.06)):
        row = found[f"pictures_p{n}"]
        lon, lat = json.loads(table[n]["where"])
        assert float(row["lon"]) == pytest.approx(lon, abs=0.01)
        assert float(row["lat"]) == pytest.approx(lat, abs=0.01)
        assert float(row["metres_per_pixel"]) == pytest.approx(metres, abs=0.05)
        assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / row["image"])), np.asarray(picture(n)))


def test_a_folder_with_nothing_known_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    with pytest.raises(OrionError, match=r"no train_dataset\.jsonl, no table, and no folders"):
        built(tmp_path / "own", tmp_path / "out")
    write(tmp_path / "own", rows())
    (tmp_path / "own" / "more.csv").write_text("a,b\n")
    with pytest.raises(OrionError, match=r"2 tables instead of one: metadata.csv, more.csv"):
        built(tmp_path / "own", tmp_path / "out")


def test_places_of_one_footprint_are_told_and_kept_in_one_split(tmp_path: Path) -> None:
    table = rows()
    for n in (0, 3):
        table[n] |= {"lon": "179.99" if n else "-179.99", "lat": "0.0"}  # 2.2 km apart, over the antimeridian
    figures = built(write(tmp_path / "own", table), tmp_path / "out")
    (warning,) = figures["warnings"]
    assert "1 pairs of places are closer than a frame's diagonal" in warning
    assert "metadata.csv line 2" in warning
    splits = {row["name"]: row["split"] for row in frames_table(tmp_path / "out")}
    assert splits["pictures_p0"] == splits["pictures_p3"]
    near = Counter(record.coordinates for split in SPLITS for record in read_split(tmp_path / "out", split, MISSION))
    assert Coordinates(179.99, 0.0) in near


@pytest.mark.shared
def test_the_real_frames_load_with_their_labels(tmp_path: Path) -> None:
    """Their labels.csv calls the column `frame` and leaves the suffixes out."""
    figures = built(SHARED / "frames", tmp_path / "out")
    assert sum(figures["targets"].values()) == figures["account"]["fetched"] == 25
    assert [warning.split(":")[0] for warning in figures["warnings"]] == [
        "columns of labels.csv that are not used",
        "25 of 25 frames have no reason and get the standard sentence of their category",
        "25 of 25 frames have no position",
        "left out",
    ]
