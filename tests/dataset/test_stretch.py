"""Pictures of more than 8 bits and GeoTIFFs, from the folder through the run's settings to the flight."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from orion_triage.dataset import build
from orion_triage.dataset.check.soundness import check_dataset
from orion_triage.dataset.collect import ABSENT_TABLE
from orion_triage.dataset.records import FRAMES_TABLE
from orion_triage.errors import OrionError
from orion_triage.flight.triage import Flown, asked_by, triage_files
from orion_triage.imagery.frames import read_frame
from orion_triage.imagery.stretch import Stretch, stretch_of
from orion_triage.mission.verdict import Verdict, answer_text
from orion_triage.pipeline import DATASET, is_current, run_stage
from orion_triage.runs.run import Run, open_run, prepare
from orion_triage.settings import DatasetSettings, Settings, load_settings, overrides
from tests.conftest import MISSION, ConstantBackend, orion, structured_picture

rasterio = pytest.importorskip("rasterio")
from rasterio.enums import ColorInterp  # noqa: E402
from rasterio.transform import from_origin  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
LIMITS = {"stretch_low": 600.0, "stretch_high": 4170.0}


def deep(seed: int) -> np.ndarray:
    """What a camera of 12 bits in 16 records of a picture: values 600 to 4170."""
    return np.asarray(structured_picture(seed)).astype(np.uint16) * 14 + 600


def write(path: Path, values: np.ndarray, driver: str = "PNG", **options: Any) -> Path:
    colours = options.pop("colours", "")
    bands = np.moveaxis(values, 2, 0)
    profile = {"driver": driver, "width": bands.shape[2], "height": bands.shape[1], "count": len(bands)}
    with rasterio.open(path, "w", dtype=str(bands.dtype), **profile, **options) as file:
        file.write(bands)
        if colours:
            file.colorinterp = [ColorInterp[name] for name in colours.split()]
    path.with_name(path.name + ".aux.xml").unlink(missing_ok=True)
    return path


def folder_of(folder: Path, count: int = 18) -> Path:
    """Pictures of 16 bits with a table; six a category."""
    folder.mkdir()
    with (folder / "metadata.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "category", "lon", "lat", "reason"])
        for n in range(count):
            write(folder / f"p{n}.png", deep(n))
            table.writerow(
                [f"p{n}.png", MISSION.names[n % 3], -170 + 18 * n, 5 * (n % 9) - 20, f"Reason {n} in words."]
            )
    return folder


def right(seed: int) -> np.ndarray:
    """The 8-bit pixels by the stretch's definition: here exactly those of before."""
    return np.asarray(structured_picture(seed))


def rows(dataset: Path) -> list[dict[str, str]]:
    with (dataset / FRAMES_TABLE).open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("deep") / "own")


@pytest.fixture(scope="module")
def run(own: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose dataset was made with a stretch, on the command line."""
    folder = tmp_path_factory.mktemp("run") / "run"
    limits = [f"dataset.{key}={value:g}" for key, value in LIMITS.items()]
    done = orion("dataset", "--run", folder, "--dataset", own, "--set", limits[0], "--set", limits[1], cwd=own.parent)
    assert done.returncode == 0, done.stderr
    assert "18 of 18 pictures were converted: stretched uint16 from 600 to 4170" in done.stderr
    return open_run(folder)


def test_without_a_stretch_the_build_names_file_depth_and_setting(own: Path, tmp_path: Path) -> None:
    done = orion("dataset", "--run", tmp_path / "run", "--dataset", own, cwd=tmp_path)
    assert done.returncode == 1
    said = " ".join(done.stderr.split())
    for part in (".png has 16 bits per channel (uint16)", "--set dataset.stretch_low=BLACK", "dataset.stretch_high"):
        assert part in said, said
    assert not (tmp_path / "run" / "dataset").exists()


def test_a_stretch_gives_the_right_pixels_and_is_recorded(run: Run) -> None:
    found = rows(run.dataset)
    assert len(found) == 18
    for row in found:
        assert np.array_equal(np.asarray(Image.open(run.dataset / row["image"])), right(int(row["name"][1:])))
        assert (row["conversions"], row["clipped_share"]) == ("stretched uint16 from 600 to 4170", "0.0")
    manifest = json.loads((run.dataset / "manifest.json").read_text())
    assert manifest["figures"]["stretch"] == {"low": 600.0, "high": 4170.0, "samples": "uint16"}
    assert json.loads((run.folder / "settings.json").read_text())["dataset"]["stretch_high"] == 4170
    assert not check_dataset(run.dataset).errors


def test_values_are_rounded_to_the_nearest_level() -> None:
    values = np.arange(2**16, dtype=np.uint16)
    exact = np.clip((values.astype(np.float64) - 1000) * 255 / 60_000, 0, 255)
    off = Stretch(1000, 61_000).apply(values) - exact
    assert np.abs(off).max() <= 0.5
    assert abs(off.mean()) < 1e-3, "darker or brighter on average"


def test_the_flight_stretches_like_the_dataset(run: Run, own: Path, tmp_path: Path) -> None:
    """Through what 'orion triage' calls: the model is asked about the pixels that training saw."""
    stretch = stretch_of(run.settings.dataset)
    assert stretch == Stretch(600, 4170)

    class Keeping(ConstantBackend):
        seen: list[np.ndarray] = []  # noqa: RUF012

        def answer(self, images: Any, prompts: Any) -> Any:
            self.seen += [np.asarray(image) for image in images]
            return super().answer(images, prompts)

    backend = Keeping(answer_text(MISSION, Verdict("Long quays.", "HIGH")))
    structured_picture(1).save(tmp_path / "eight.png")
    write(tmp_path / "float.tif", deep(2).astype(np.float32), "GTiff")
    paths = [own / "p4.png", tmp_path / "eight.png", tmp_path / "float.tif"]
    first, eight, floats = triage_files(paths, backend, MISSION, 512, stretch=stretch)
    stored = next(row for row in rows(run.dataset) if row["name"] == "p4")
    assert np.array_equal(backend.seen[0], np.asarray(read_frame(run.dataset / stored["image"], 512).image))
    assert len(backend.seen) == 1
    assert first.changes == ("stretched uint16 from 600 to 4170",)
    assert "eight.png has 8 bits per channel, but this run stretches uint16 from 600 to 4170" in eight.error
    assert "float.tif has 32 bits per channel (float32), but this run stretches uint16" in floats.error
    (without,) = triage_files(paths[:1], backend, MISSION, 512)
    assert "p4.png has 16 bits per channel (uint16), and dataset.stretch_low" in without.error


def test_triage_takes_the_stretch_of_the_run(
    run: Run, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from orion_triage.cli.app import app
    from orion_triage.flight import triage

    answer = answer_text(MISSION, Verdict("Long quays.", "HIGH"))

    def without_server(paths: Any, flown: Flown, *, keep_log: bool, progress: Any, **options: Any) -> Any:
        backend = ConstantBackend(answer)
        return triage_files(paths, backend, flown.mission, flown.frame_size, stretch=flown.stretch, **options)

    # Only the server is left out: the run has no weights.
    monkeypatch.setattr(triage, "triage_with_pair", without_server)
    structured_picture(1).save(tmp_path / "eight.png")
    asked = ["triage", str(own / "p4.png"), str(tmp_path / "eight.png"), "--run", str(run.folder), "--json"]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 1
    assert [row["category"] for row in json.loads(done.stdout)] == ["HIGH"]
    said = " ".join(done.stderr.split())
    assert "eight.png has 8 bits per channel, but this run stretches uint16 from 600 to 4170" in said
    assert "note: 1 of 2 frames: stretched uint16 from 600 to 4170" in said


def test_the_operators_readme_has_the_formula() -> None:
    from orion_triage import templates

    values: dict[str, Any] = {
        "build": 1,
        "frame_size": 512,
        "pinned": False,
        "tolerances": dict.fromkeys(("category_nats", "other_labels_nats", "other_words"), 1),
        "decision": [],
        "mission": MISSION,
        "temperature": 1.5,
        "promise": None,
        "time_out": 60,
        "time_out_factor": 10,
        "blank_limits": {"rows": [16, 479], "entropy_bits_below": 4.0, "gradient_below": 1.0},
        "verdict": {"verdict": "FLY", "because": [], "accepted_risk": ""},
        "head": None,
        "reasons": None,
        "towers": 1,
        "allowed": [],
    }
    said = templates.fill(
        "flight", "bundle_readme.txt.j2", **values, stretch={"low": 6.5, "high": 9, "samples": "int16"}
    )
    assert "(int16) become 8 bits" in said
    assert "floor(255 * clip((value - 6.5) / (9 - 6.5), 0, 1) + 0.5)" in said
    assert "to the power of 1 / 1.5000" in said
    assert "Stretch" not in templates.fill("flight", "bundle_readme.txt.j2", **values, stretch=None)


def test_a_results_file_belongs_to_one_stretch(tmp_path: Path) -> None:
    from orion_triage.export import quantize
    from orion_triage.mission.decide import Rules

    (tmp_path / quantize.PAIR).write_text("{}")
    flown = [
        Flown("", tmp_path, MISSION, 512, one, Rules(), tmp_path / "log")
        for one in (None, Stretch(0, 9), Stretch(0, 8))
    ]
    asked = {asked_by(one, Rules(), False) for one in flown}
    assert len(asked) == 3


def test_a_published_dataset_is_stretched_and_plain_pictures_stay_as_they_are(
    small_dataset: Path, tmp_path: Path
) -> None:
    import shutil

    eight = tmp_path / "eight"
    build.run(eight, DatasetSettings(folder=str(small_dataset)), MISSION)
    for path in sorted((small_dataset / "orion_dataset" / "images").iterdir()):
        assert (eight / "orion_dataset" / "images" / path.name).read_bytes() == path.read_bytes()
    sixteen = tmp_path / "sixteen"
    shutil.copytree(small_dataset, sixteen)
    before = {}
    for path in sorted((sixteen / "orion_dataset" / "images").iterdir()):
        before[path.name] = np.asarray(Image.open(path))
        write(path, before[path.name].astype(np.uint16) * 14 + 600)
    with pytest.raises(OrionError, match="has 16 bits per channel"):
        build.run(tmp_path / "out", DatasetSettings(folder=str(sixteen)), MISSION)
    figures = build.run(tmp_path / "out", DatasetSettings(folder=str(sixteen), **LIMITS), MISSION)
    assert "24 of 24 pictures were converted: stretched uint16" in figures["warnings"][0]
    for name, pixels in before.items():
        assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "orion_dataset" / "images" / name)), pixels)
    kinds = {(finding.check, finding.severity) for finding in check_dataset(sixteen).findings}
    assert ("unusable-image", "error") in kinds


def test_frames_with_many_values_outside_the_limits_are_said(own: Path, tmp_path: Path) -> None:
    figures = build.run(tmp_path / "out", DatasetSettings(folder=str(own), stretch_low=600, stretch_high=2000), MISSION)
    (said,) = [warning for warning in figures["warnings"] if "outside the stretch's limits" in warning]
    shares = {row["name"]: float(row["clipped_share"]) for row in rows(tmp_path / "out")}
    assert said.startswith(f"{sum(share > 0.05 for share in shares.values())} of 18 pictures have more than 5%")
    assert shares["p0"] == pytest.approx((deep(0) > 2000).mean(), abs=1e-4)


@pytest.mark.parametrize(
    ("assignments", "said"),
    [
        (["stretch_low=1"], "need each other"),
        (["stretch_low=9", "stretch_high=9"], "stretch_low=9 is not below stretch_high=9"),
        (["stretch_samples=int16"], "stretch_samples needs stretch_low and stretch_high"),
        (["stretch_low=1", "stretch_high=2", "stretch_samples=int8"], "stretch_samples"),
    ],
)
def test_limits_that_make_no_stretch_are_refused(assignments: list[str], said: str) -> None:
    with pytest.raises(OrionError, match=said):
        load_settings("tiny", ["dataset.folder=x", *(f"dataset.{one}" for one in assignments)])
    with pytest.raises(OrionError, match="pictures of your own"):
        load_settings("tiny", ["dataset.stretch_low=1", "dataset.stretch_high=2"])


def test_datasets_of_runs_without_these_settings_stay_current(own: Path, small_dataset: Path, tmp_path: Path) -> None:
    settings = Settings(dataset=DatasetSettings(folder=str(small_dataset)))
    made = Run(tmp_path / "run", settings)
    prepare(made)
    manifest, _ = run_stage(DATASET, made)
    assert not [key for key in manifest.settings["dataset"] if key.startswith("stretch")]
    assert is_current(DATASET, made)
    other = Settings(dataset=DatasetSettings(folder=str(small_dataset), **LIMITS))
    assert not is_current(DATASET, Run(made.folder, other))
    assert overrides(other)["dataset.stretch_low"] == (None, 600.0)


def test_geotiffs_of_a_folder_give_places_distances_and_bands(tmp_path: Path) -> None:
    """The case of the report: Mercator at 60 degrees, feet, and bands in the order blue, green, red."""
    from rasterio.warp import transform

    folder = tmp_path / "own"
    folder.mkdir()
    (x,), (y,) = transform("EPSG:4326", "EPSG:3857", [25.0], [60.0])
    (feet_x,), (feet_y,) = transform("EPSG:4326", "EPSG:2263", [-73.9], [40.7])
    grids = {
        0: ("EPSG:3857", from_origin(x - 5120, y + 5120, 20, 20), "red green blue"),
        1: ("EPSG:2263", from_origin(feet_x - 8399, feet_y + 8399, 32.8083, 32.8083), "red green blue"),
        2: ("EPSG:32631", from_origin(500000, 5_000_000, 10, 10), "blue green red"),
    }
    with (folder / "metadata.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "category", "lon", "lat", "reason"])
        for n in range(18):
            place = ("", "") if n < 3 else (-170 + 18 * n, -5 * (n % 9))
            name = f"p{n}.tif"
            table.writerow([name, MISSION.names[n % 3], *place, f"Reason {n} in words."])
            crs, grid, colours = grids.get(n, (None, None, "red green blue"))
            options = {"crs": crs, "transform": grid} if crs else {}
            values = right(n)[..., ::-1] if colours.startswith("blue") else right(n)
            write(folder / name, values, "GTiff", colours=colours, **options)
    figures = build.run(tmp_path / "out", DatasetSettings(folder=str(folder)), MISSION)
    assert figures["account"] == {"fetched": 18}  # without a position in the file, that of the table counts
    found = {int(row["name"][1:]): row for row in rows(tmp_path / "out")}
    for n in range(18):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / found[n]["image"])), right(n)), n
        metres = found[n]["metres_per_pixel"]
        assert metres == "" if n > 2 else float(metres) == pytest.approx(10, rel=0.005)
    assert found[2]["conversions"] == "bands reordered to red, green, blue"
    assert "1 of 18 pictures were converted: bands reordered" in " ".join(figures["warnings"])
    assert (float(found[0]["lat"]), float(found[1]["lon"])) == pytest.approx((60.0, -73.9), abs=1e-4)
    write(folder / "p0.tif", right(0), "GTiff", crs="EPSG:32635", transform=from_origin(500000, 6_600_000, 200, 200))
    settings = DatasetSettings(folder=str(folder), split_distance_km=100)
    with pytest.raises(OrionError, match=r"is less than a frame's diagonal of 14\d\.\d km"):
        build.plan(settings, MISSION)


def test_a_picture_that_no_rule_covers_is_absent_with_the_fix(own: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "own"
    shutil.copytree(own, folder)
    write(folder / "p5.png", right(5))
    figures = build.run(tmp_path / "out", DatasetSettings(folder=str(folder), **LIMITS), MISSION)
    assert figures["account"] == {"fetched": 17, "failed": 1}
    with (tmp_path / "out" / ABSENT_TABLE).open(newline="") as file:
        (absent,) = csv.DictReader(file)
    assert "p5.png has 8 bits per channel, but this run stretches" in absent["why"]
    assert "Pass the picture as the camera recorded it" in absent["why"]
