"""imagery/camera.py: what a camera file says is what can be measured in the frames; camera_fit.py finds it again."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from orion_triage.dataset import build
from orion_triage.dataset.catalogue import load_catalogue
from orion_triage.dataset.records import image_path, read_split
from orion_triage.dataset.sources.synthetic.draw import draw_tile, tile_seed
from orion_triage.errors import OrionError
from orion_triage.imagery import camera as cameras
from orion_triage.imagery.camera import Camera, drawn, in_words, load_camera, seen_through, shipped_text
from orion_triage.imagery.camera_fit import FEWEST, fit, measure, to_toml
from orion_triage.imagery.camera_sheet import pictures_in, sheet
from orion_triage.imagery.stress import AIRLIGHT, MID_GREY, noisy, to_linear
from orion_triage.pipeline import DATASET, FINE_TUNE
from orion_triage.runs.manifest import hash_inputs
from orion_triage.runs.run import Run
from orion_triage.settings import DatasetSettings, load_settings
from orion_triage.train.augment import Augmentation
from tests.conftest import MISSION, orion, places_of, structured_picture, write_catalogue

SIDE = 512
PICTURE = structured_picture(1)


def flat(level: int) -> Image.Image:
    return Image.new("RGB", (SIDE, SIDE), (level,) * 3)


def seen(picture: Image.Image, name: str = "x", **values: Any) -> np.ndarray:
    return np.asarray(seen_through(picture, Camera(name="test", **values), name))


def test_a_camera_that_does_nothing_changes_nothing_that_can_be_seen() -> None:
    """Twelve bits of linear values are coarser than eight encoded ones in the dark."""
    difference = np.abs(seen(PICTURE).astype(int) - np.asarray(PICTURE))
    assert difference.max() <= 1
    assert np.abs(seen(PICTURE, bits=16).astype(int) - np.asarray(PICTURE)).max() == 0


@pytest.mark.parametrize("snr", [10, 50, 200])
def test_a_flat_frame_has_the_stated_signal_to_noise_ratio(snr: float) -> None:
    """At mid grey, without the rounding of 8 bits, which is a noise of its own at 200."""
    light = to_linear(np.asarray(flat(128)))
    grainy = noisy(light, snr, np.random.default_rng(0))
    assert grainy.mean() / grainy.std() == pytest.approx(snr, rel=0.02)
    frame = to_linear(seen(flat(128), snr=snr))
    assert frame.mean() / frame.std() == pytest.approx(snr, rel=0.04 if snr < 100 else 0.3)


def test_variance_rises_with_light_from_that_of_the_read_noise() -> None:
    """Mean against variance over ten levels: the slope is the gain, the intercept the read noise squared."""
    snr, read_noise = 30, 40.0
    electrons = (snr**2 + np.sqrt(snr**4 + 4 * snr**2 * read_noise**2)) / 2
    gain = MID_GREY / electrons
    levels = np.linspace(0.05, 0.9, 10)
    frames = [
        noisy(np.full((SIDE, SIDE, 3), level), snr, np.random.default_rng(n), read_noise)
        for n, level in enumerate(levels)
    ]
    slope, intercept = np.polyfit([f.mean() for f in frames], [f.var() for f in frames], 1)
    assert slope == pytest.approx(gain, rel=0.03)
    assert intercept == pytest.approx((gain * read_noise) ** 2, rel=0.1)


@pytest.mark.parametrize(("mtf", "spacing"), [(0.1, 10.0), (0.3, 10.0), (0.2, 20.0)])
def test_a_slanted_edge_has_the_stated_mtf_at_the_cameras_nyquist(mtf: float, spacing: float) -> None:
    """As ISO 12233 measures, on linear values, beside the same camera without blur: what is left is the blur's own."""
    rows, columns = np.mgrid[0:SIDE, 0:SIDE]
    distance = (columns - SIDE / 2) - np.tan(np.radians(5)) * (rows - SIDE / 2)
    edge = np.repeat(0.1 + 0.7 * np.clip(distance + 0.5, 0, 1)[..., None], 3, axis=2)
    factor = spacing / 10

    def at_nyquist(value: float) -> float:
        own = Camera(name="x", mtf_at_nyquist=value, ground_sample_distance_m=spacing)
        light = cameras._sampled(edge, own, drawn(own, "x"))
        assert light.shape == (SIDE / factor, SIDE / factor, 3)
        coarse = distance.reshape(len(light), int(factor), len(light), int(factor)).mean(axis=(1, 3)) / factor
        near = np.abs(coarse) < 100
        bins = np.floor(4 * (coarse[near] + 100)).astype(int)
        profile = np.bincount(bins, light[..., 1][near]) / np.bincount(bins)
        line = np.diff(profile) * np.hanning(len(profile) - 1)
        spectrum = np.abs(np.exp(-2j * np.pi * 0.5 / 4 * np.arange(len(line))) @ line)
        return float(spectrum / line.sum())

    assert at_nyquist(mtf) / at_nyquist(1) == pytest.approx(mtf, abs=0.02)


def test_a_coarser_camera_averages_areas_and_repeats_them() -> None:
    frame = seen(PICTURE, ground_sample_distance_m=40, bits=16)
    assert (frame.reshape(128, 4, 128, 4, 3) == frame[::4, ::4][:, None, :, None]).all()
    areas = to_linear(np.asarray(PICTURE)).reshape(128, 4, 128, 4, 3).mean(axis=(1, 3))
    assert np.abs(to_linear(frame[::4, ::4]) - areas).max() < 0.005


def test_noise_comes_after_blur_and_before_gains() -> None:
    noisy = to_linear(seen(flat(128), mtf_at_nyquist=0.01, snr=20))[..., 1]
    left, right = noisy[:, :-1] - noisy.mean(), noisy[:, 1:] - noisy.mean()
    assert abs((left * right).mean() / noisy.var()) < 0.02, "noise of neighbours is independent: it was not blurred"
    bands = to_linear(seen(flat(128), snr=20, gains=[0.5, 1, 1.5])).reshape(-1, 3)
    assert bands.mean(axis=0) / MID_GREY == pytest.approx([0.5, 1, 1.5], rel=0.01)
    assert bands.std(axis=0) / bands.mean(axis=0) == pytest.approx([1 / 20] * 3, rel=0.02)
    # Light that fills the sensor is clipped before the gains: a gain below 1 leaves it grey.
    assert to_linear(seen(flat(255), exposure=3, gains=[0.5, 0.5, 0.5])).mean() == pytest.approx(0.5, abs=0.005)


def test_haze_adds_light_before_the_camera_and_takes_contrast() -> None:
    light = to_linear(seen(PICTURE, haze_transmission=0.6, exposure=0.8, bits=16))
    expected = 0.8 * (0.6 * to_linear(np.asarray(PICTURE)) + 0.4 * AIRLIGHT)
    assert np.abs(light - expected).max() < 0.006


def test_bands_bits_encoding_and_misregistration() -> None:
    grey = seen(PICTURE, band_weights=[[0.3, 0.4, 0.3]] * 3)
    assert (grey == grey[..., :1]).all()
    assert len(np.unique(seen(PICTURE, bits=4))) <= 16
    assert np.abs(seen(PICTURE, encoding=1) / 255 - to_linear(np.asarray(PICTURE))).max() < 0.004
    moved = seen(PICTURE, misregistration_pixels=2, bits=16)
    own = np.asarray(PICTURE)
    assert (moved[2:, :, 0] == own[:-2, :, 0]).all()
    assert (moved[..., 1] == own[..., 1]).all()
    assert (moved[:-2, :, 2] == own[2:, :, 2]).all()
    assert np.abs(seen(PICTURE, jpeg_quality=20).astype(int) - own).mean() > 1


def test_a_camera_without_north_turns_frames_in_eight_ways() -> None:
    camera = Camera(name="test", turned=True, bits=16)
    own = np.asarray(PICTURE)
    ways = {np.rot90(side, turns).tobytes() for side in (own, own[:, ::-1]) for turns in range(4)}
    found = {np.asarray(seen_through(PICTURE, camera, f"frame {n}")).tobytes() for n in range(60)}
    assert found == ways


def test_a_range_has_another_value_for_each_frame_and_the_same_for_the_same_name() -> None:
    camera = Camera(name="test", snr=[20, 320], exposure=[0.5, 2], haze_transmission=[0.4, 1], motion_pixels=[0, 4])
    values = [drawn(camera, str(n)) for n in range(2000)]
    assert values == [drawn(camera, str(n)) for n in range(2000)]
    for key, (low, high), middle in (
        ("snr", (20, 320), 80),
        ("exposure", (0.5, 2), 1),
        ("haze_transmission", (0.4, 1), 0.7),
    ):
        found = np.array([one[key] for one in values])
        assert low <= found.min() < found.max() <= high
        assert np.median(found) == pytest.approx(middle, rel=0.05)
    same = [seen_through(PICTURE, camera, "a").tobytes() for _ in range(2)]
    assert same[0] == same[1] != seen_through(PICTURE, camera, "b").tobytes()


def test_the_shipped_cameras_are_right_and_explained(tmp_path: Path) -> None:
    wide = load_camera("wide")
    assert {key for key, (low, high) in wide.ranges().items() if low < high} >= {"snr", "exposure", "mtf_at_nyquist"}
    (tmp_path / "camera.toml").write_text(shipped_text("example"))
    example = load_camera(str(tmp_path / "camera.toml"))
    explained = shipped_text("example")
    assert all(key in explained for key in Camera.model_fields)
    assert {row[0] for row in in_words(example)} == set(Camera.model_fields) - {
        "name", "ground_sample_distance_m", "jpeg_quality",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("snr = 0", "snr should lie in 1 to 1e+06, the lower end first, and this is 0"),
        ("snr = [90, 40]", "the lower end first"),
        ("snr = [1, 2, 3]", "should be a number, or a range [lowest, highest]"),
        ('snr = "good"', "should be a number, or a range"),
        ("exposure = true", "should be a number, or a range"),
        ("snrs = 50", "there is no key snrs; the nearest name is snr"),
        ("bits = 3", "bits input should be greater than or equal to 4"),
        ("gains = [1, 1]", "gains should have three values in each row"),
        ("band_weights = [[1e30, 0, 0], [0, 1, 0], [0, 0, 1]]", "band_weights should be 0 to 10"),
        ("ground_sample_distance_m = 9000", "leaves fewer than 8 pixels of a picture"),
        ('turned = "yes"', "turned"),
        ("band_weights = [[1, 0, 0]]", "band_weights should have three rows"),
        ("band_weights = [[0, 0, 0], [0, 1, 0], [0, 0, 1]]", "at least one of each row above 0"),
        ("ground_sample_distance_m = 5", "detail that a picture does not have cannot be seen"),
        ('encoding = "BT709"', "encoding"),
        ("mtf_at_nyquist = nan", "should lie in 0.001 to 1"),
    ],
)
def test_a_mistake_is_named_with_its_line(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "camera.toml"
    path.write_text(f'# a camera\nname = "mine"\n{line}\n')
    with pytest.raises(OrionError) as error:
        load_camera(str(path))
    assert f"{path}:3: " in error.value.message
    assert said in error.value.message


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OrionError, match=r"gone\.toml does not exist"):
        load_camera(str(tmp_path / "gone.toml"))
    (tmp_path / "a.toml").write_text("name = mine")
    with pytest.raises(OrionError, match="is not TOML"):
        load_camera(str(tmp_path / "a.toml"))
    (tmp_path / "b.toml").write_text("bits = 8\n")
    with pytest.raises(OrionError, match="name is missing"):
        load_camera(str(tmp_path / "b.toml"))


TILES = 24


@pytest.fixture(scope="module")
def tiles() -> list[Image.Image]:
    """Drawn tiles of places all over the catalogue."""
    targets = load_catalogue()[:: 360 // TILES][:TILES]
    return [draw_tile(target.morphology, tile_seed(1, target.name)).image for target in targets]


# What the frames of a camera say of it, beside the pictures without it: within these shares of the true value.
PLANTED: dict[str, Any] = {"mtf_at_nyquist": 0.2, "snr": 40, "exposure": 0.7, "haze_transmission": 0.7}
ERRORS = {"mtf_at_nyquist": 0.15, "snr": 0.15, "exposure": 0.05, "haze_transmission": 0.05}


@pytest.mark.slow
def test_a_fit_finds_what_was_planted(tiles: Sequence[Image.Image]) -> None:
    camera = Camera(name="planted", gains=[1.1, 1, 0.8], **PLANTED)
    found = fit(measure([seen_through(tile, camera, str(n)) for n, tile in enumerate(tiles)]), measure(tiles), "found")
    for key, error in ERRORS.items():
        assert found.estimates[key] == pytest.approx(PLANTED[key], rel=error), key
    gains = np.array([found.estimates[f"gains {band}"] for band in (1, 2, 3)])
    assert gains / gains[1] == pytest.approx([1.1, 1, 0.8], rel=0.03)
    assert found.residual < 0.1
    low, high = found.camera.mtf_at_nyquist
    assert low < PLANTED["mtf_at_nyquist"] < high
    assert "not certain" not in " ".join(found.notes)


@pytest.mark.slow
def test_a_fit_of_the_same_pictures_is_not_certain_of_anything(tiles: Sequence[Image.Image], tmp_path: Path) -> None:
    found = fit(measure(tiles[::2]), measure(tiles[1::2]), "found")
    assert found.camera.mtf_at_nyquist[1] > 0.95
    assert "not certain that there is any blur" in " ".join(found.notes)
    for key in ("exposure", "haze_transmission"):
        assert getattr(found.camera, key)[0] <= 1 <= getattr(found.camera, key)[1] * 1.15
    (tmp_path / "camera.toml").write_text(to_toml(found))
    assert load_camera(str(tmp_path / "camera.toml")) == found.camera


def test_a_fit_needs_frames_that_are_not_blank() -> None:
    with pytest.raises(OrionError, match=f"7 frames are not blank; at least {FEWEST} are needed"):
        measure([*(structured_picture(n) for n in range(7)), flat(90), flat(30)])


def test_a_dataset_is_seen_through_a_camera_and_says_so(tmp_path: Path) -> None:
    places = write_catalogue(tmp_path / "places.csv", places_of("ocean_water", "agriculture", "mega_airport", count=3))
    path = tmp_path / "camera.toml"
    path.write_text('name = "dim"\nexposure = [0.3, 0.5]\nsnr = 30\n')
    settings = DatasetSettings(catalogue=str(places), split_distance_km=8.0)
    build.run(tmp_path / "plain", settings, MISSION)
    figures = build.run(tmp_path / "seen", settings.model_copy(update={"camera": str(path)}), MISSION)
    assert any("9 of 9 pictures were converted: seen through the camera dim" in said for said in figures["warnings"])
    camera = load_camera(str(path))
    for record in read_split(tmp_path / "plain", "test", MISSION):
        with Image.open(image_path(tmp_path / "plain", record)) as before:
            expected = seen_through(before.convert("RGB"), camera, record.name.partition("_")[2])
        with Image.open(image_path(tmp_path / "seen", record)) as after:
            assert after.tobytes() == expected.tobytes()
    assert "seen through the camera dim" in (tmp_path / "seen" / "frames.csv").read_text()
    again = DatasetSettings(folder=str(tmp_path / "plain"), camera=str(path))
    copied = build.run(tmp_path / "copied", again, MISSION)
    assert any("seen through the camera dim" in said for said in copied["warnings"])


def test_another_camera_file_makes_dataset_and_adapter_again(tmp_path: Path) -> None:
    path = tmp_path / "camera.toml"
    path.write_text('name = "dim"\n')
    sets = [f"dataset.camera={path}", f"fine_tune.camera={path}"]
    run = Run(tmp_path / "run", load_settings("tiny", sets))
    run.dataset.mkdir(parents=True)
    before = [hash_inputs(stage.inputs(run)) for stage in (DATASET, FINE_TUNE)]
    path.write_text('name = "dim"\nexposure = 0.5\n')
    after = [hash_inputs(stage.inputs(run)) for stage in (DATASET, FINE_TUNE)]
    assert [one["camera"] != other["camera"] for one, other in zip(before, after, strict=True)] == [True, True]
    plain = Run(tmp_path / "run", load_settings("tiny"))
    assert all("camera" not in stage.inputs(plain) for stage in (DATASET, FINE_TUNE))
    assert "camera" not in DATASET.settings_of(plain.settings)["dataset"], "datasets of before stay current"


def test_a_training_frame_is_seen_through_the_camera_otherwise_in_every_other_epoch() -> None:
    camera = Camera(name="test", exposure=[0.5, 1.5], turned=True)
    augmentation = Augmentation({"a.png": PICTURE}, (), 256, 42, camera)

    def epochs() -> list[bytes]:
        frames = []
        for epoch in range(20):
            augmentation.set_epoch(epoch)
            frame = augmentation.frame("a.png")
            frames.append(frame.tobytes() if frame else b"")
        return frames

    frames = epochs()
    assert epochs() == frames
    assert 5 <= frames.count(b"") <= 15
    assert all(one != other for one, other in itertools.combinations(filter(None, frames), 2))
    assert augmentation.to_json()["camera"]["exposure"] == [0.5, 1.5]


def test_a_sheet_shows_each_picture_before_and_after(tmp_path: Path) -> None:
    for number in range(5):
        structured_picture(number).save(tmp_path / f"{number}.png")
    assert [path.name for path in pictures_in(tmp_path, 3)] == ["0.png", "1.png", "3.png"]
    picture = sheet(pictures_in(tmp_path, 3), load_camera("wide"))
    pixels = np.asarray(picture)
    assert pixels.shape[1] > 4 * 256
    before, after = pixels[40:280, 8:264], pixels[40:280, 272:528]
    assert before.std() > 20
    assert np.abs(before.astype(int) - after).mean() > 3
    with pytest.raises(OrionError, match="has no picture"):
        (tmp_path / "empty").mkdir()
        pictures_in(tmp_path / "empty", 3)


@pytest.mark.slow
def test_the_commands(tmp_path: Path, tiles: Sequence[Image.Image]) -> None:
    for folder, light in (("mine", 0.5), ("pictures", 1)):
        (tmp_path / folder).mkdir()
        for number, tile in enumerate(tiles[:12]):
            seen_through(tile, Camera(name="x", exposure=light), str(number)).save(tmp_path / folder / f"{number}.png")
    new = orion("camera", "new", "own.toml", cwd=tmp_path)
    assert (new.returncode, orion("camera", "new", "own.toml", cwd=tmp_path).returncode) == (0, 1)
    assert "next: orion camera check own.toml" in new.stderr
    checked = orion("camera", "check", "own.toml", cwd=tmp_path)
    assert "sigma 0.49 to 0.68 pixels" in checked.stdout
    assert json.loads(orion("camera", "check", "wide", "--json", cwd=tmp_path).stdout)["bits"] == 10
    assert orion("camera", "preview", "own.toml", "pictures", cwd=tmp_path).returncode == 0
    assert Image.open(tmp_path / "camera.png").size[0] > 1000
    before = (tmp_path / "pictures" / "0.png").read_bytes()
    inside = orion("camera", "preview", "wide", "pictures", "--out", "pictures/0.png", cwd=tmp_path)
    assert (inside.returncode, "is one of the pictures" in inside.stderr) == (1, True)
    assert (tmp_path / "pictures" / "0.png").read_bytes() == before
    assert orion("camera", "preview", "wide", "pictures", "--out", "sheet.jpg", cwd=tmp_path).returncode == 2
    (tmp_path / "own.toml").write_text('name = "x"\nsnr = 0\n')
    wrong = orion("camera", "check", "own.toml", cwd=tmp_path)
    assert (wrong.returncode, "own.toml:2: snr should lie" in wrong.stderr) == (1, True)
    fitted = orion("camera", "fit", "mine", "--like", "pictures", "--out", "found.toml", "--json", cwd=tmp_path)
    told = json.loads(fitted.stdout)
    assert told["estimates"]["exposure"] == pytest.approx(0.5, rel=0.05)
    assert orion("camera", "check", "found.toml", cwd=tmp_path).returncode == 0
    (tmp_path / "deep").mkdir()
    for path in (tmp_path / "mine").glob("*.png"):  # 16 bits, of which 4000 is white
        grey = np.asarray(Image.open(path).convert("L")).astype(np.uint16) * (4000 / 255)
        Image.fromarray(grey.astype(np.uint16)).save(tmp_path / "deep" / path.name)
    deep = ["camera", "fit", "deep", "--like", "pictures", "--out", "deep.toml"]
    assert "dataset.stretch_low" in orion(*deep, cwd=tmp_path).stderr
    limits = ["--set", "dataset.stretch_low=0", "--set", "dataset.stretch_high=4000"]
    assert orion(*deep, "--set", "base.frame_size=512", cwd=tmp_path).returncode == 2
    assert orion(*deep, *limits, cwd=tmp_path).returncode == 0
    again = orion("camera", "fit", "mine", "--like", "pictures", "--out", "found.toml", cwd=tmp_path)
    assert "found.toml exists" in again.stderr
    assert orion("camera", "fit", "gone", "--like", "pictures", cwd=tmp_path).returncode == 1


def test_a_server_gets_no_camera_that_it_cannot_have_and_applies_none_twice() -> None:
    from orion_triage.train.remote import training_of

    with pytest.raises(OrionError, match=r"fine_tune\.camera=own\.toml is a file of this machine"):
        training_of("tiny", [], "run", load_settings("tiny", ["fine_tune.camera=own.toml"]))
    sets = ["fine_tune.camera=wide", "dataset.camera=own.toml"]
    sent = training_of("tiny", sets, "run", load_settings("tiny", sets))
    assert sent.assignments == ("fine_tune.camera=wide",), "the frames that are sent were seen through it"
