"""imagery/stress.py: each stress does what its row of the table says, measured on the frames that come out."""

import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from orion_triage.errors import OrionError
from orion_triage.imagery import stress
from orion_triage.imagery.stress import AIRLIGHT, MID_GREY, READ_NOISE, STRENGTHS, STRESSES, Stress, chosen, stressed
from tests.conftest import structured_picture

SIDE = 512


def named(name: str) -> Stress:
    return next(one for one in STRESSES if one.name == name)


def random() -> np.random.Generator:
    return np.random.default_rng(1)


def flat(level: int) -> stress.Pixels:
    return np.full((SIDE, SIDE, 3), level, dtype=np.uint8)


def linear(pixels: stress.Pixels) -> stress.Light:
    """The definition of sRGB, written again."""
    value = pixels / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


@pytest.mark.parametrize("one", STRESSES, ids=lambda one: one.name)
def test_a_stronger_stress_changes_a_frame_more(one: Stress) -> None:
    frame = structured_picture(3)
    before = np.asarray(frame).astype(int)
    changes = []
    for strength in STRENGTHS:
        after = stressed(frame, one, strength, "harbour")
        assert (after.size, after.mode) == ((SIDE, SIDE), "RGB")
        changes.append(np.abs(np.asarray(after) - before).mean())
    assert changes[0] > 0
    if not one.words:  # the flips are kinds
        assert changes == sorted(changes)
        assert changes[2] > 1.3 * changes[0]
    assert np.array_equal(np.asarray(frame), before)


SCRIPT = """
import hashlib
import numpy as np
from PIL import Image
from orion_triage.imagery.stress import STRESSES, stressed
frame = Image.fromarray(np.random.default_rng(1).integers(0, 256, (512, 512, 3), dtype=np.uint8))
def hashes(name):
    pictures = (stressed(frame, one, "medium", name) for one in STRESSES)
    return {one.name: hashlib.sha256(picture.tobytes()).hexdigest() for one, picture in zip(STRESSES, pictures)}
"""


def test_the_same_bytes_in_every_process_and_others_for_other_names() -> None:
    known: dict[str, object] = {}
    exec(SCRIPT, known)
    hashes: Callable[[str], dict[str, str]] = known["hashes"]  # type: ignore[assignment]
    here, other = hashes("harbour"), hashes("desert")
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    command = [sys.executable, "-c", SCRIPT + "print(hashes('harbour'))"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.stdout.strip() == str(here), result.stderr
    assert {name for name in here if here[name] != other[name]} == {"cloud", "noise", "defects"}
    assert stress.seed_of("a", "noise", "mild") != stress.seed_of("a", "noise", "strong")


@pytest.mark.parametrize("snr", named("noise").values)
def test_a_flat_frame_has_the_stated_signal_to_noise_ratio(snr: float) -> None:
    noisy = stress.noisy(stress.to_linear(flat(128)), snr, random())
    assert noisy.mean() / noisy.std() == pytest.approx(snr, rel=0.02)
    # Rounding to 8 bits adds a variance of 1/12, which is no noise of the sensor.
    pixels = stress.noise(flat(128), snr, random()).astype(float)
    step = linear(np.array([129], dtype=np.uint8)) - linear(np.array([127], dtype=np.uint8))
    of_frame = np.sqrt(pixels.var() - 1 / 12) * step[0] / 2
    assert MID_GREY / of_frame == pytest.approx(snr, rel=0.02)


def test_the_variance_of_noise_is_the_gain_times_the_mean_and_the_read_noise() -> None:
    levels = [flat(level) for level in range(20, 240, 22)]
    found = [stress.noisy(stress.to_linear(level), 20, random()) for level in levels]
    slope, intercept = np.polyfit([one.mean() for one in found], [one.var() for one in found], 1)
    gain = MID_GREY / stress.electrons_at_mid_grey(20)
    assert slope == pytest.approx(gain, rel=0.01)
    assert intercept == pytest.approx((gain * READ_NOISE) ** 2, rel=0.05)


@pytest.mark.parametrize("mtf", named("blur").values)
def test_sinusoids_keep_the_contrast_that_the_mtf_says(mtf: float) -> None:
    for cycles in (0.5, 0.25, 0.125):  # a pixel; Nyquist is 0.5
        wave = 0.5 + 0.45 * np.cos(2 * np.pi * cycles * np.arange(SIDE))
        pixels = stress.to_pixels(np.broadcast_to(wave[:, None, None], (SIDE, SIDE, 3)))
        before, after = (linear(one)[100:-100, 256, 1] for one in (pixels, stress.blur(pixels, mtf, random())))
        contrast = (after.max() - after.min()) / (before.max() - before.min())
        assert contrast == pytest.approx(mtf ** ((cycles / 0.5) ** 2), abs=0.02)  # a Gaussian through (0.5, mtf)


@pytest.mark.parametrize("mtf", named("blur").values)
def test_a_slanted_edge_has_the_stated_mtf_at_nyquist(mtf: float) -> None:
    """As ISO 12233 measures: the edge's profile on a quarter of a pixel, its derivative, its spectrum.

    Before the rounding to 8 bits, which cuts the faint ends of the blur of an edge without noise: 0.23 instead of 0.2.
    """
    rows, columns = np.mgrid[0:SIDE, 0:SIDE]
    distance = (columns - SIDE / 2) - np.tan(np.radians(5)) * (rows - SIDE / 2)
    edge = np.repeat(0.1 + 0.7 * np.clip(distance + 0.5, 0, 1)[..., None], 3, axis=2)  # pixels are boxes

    def at_nyquist(light: stress.Light) -> float:
        near = np.abs(distance) < 128  # a shorter window would mix in frequencies with a higher MTF
        bins = np.floor(4 * (distance[near] + 128)).astype(int)
        profile = np.bincount(bins, light[..., 1][near]) / np.bincount(bins)
        line = np.diff(profile) * np.hanning(len(profile) - 1)
        spectrum = np.abs(np.exp(-2j * np.pi * 0.5 / 4 * np.arange(len(line))) @ line)
        return float(spectrum / line.sum())

    assert at_nyquist(stress.blurred(edge, mtf)) / at_nyquist(edge) == pytest.approx(mtf, abs=0.02)


def test_a_veil_lets_light_through_and_adds_its_own() -> None:
    for level in (0, 60, 255):
        expected = 0.6 * linear(flat(level)) + 0.4 * AIRLIGHT
        assert np.abs(linear(stress.haze(flat(level), 0.6, random())) - expected).max() < 0.005


def test_a_cloud_has_the_stated_mean_optical_depth_and_is_smooth() -> None:
    veiled = linear(stress.cloud(flat(0), 1.0, random()))[..., 1]
    depth = -np.log(1 - veiled / AIRLIGHT)
    assert depth.mean() == pytest.approx(1.0, rel=0.02)
    assert (depth.min(), depth.max()) == (pytest.approx(0, abs=0.05), pytest.approx(2, abs=0.05))
    assert np.abs(np.diff(depth, axis=0)).max() < 0.1


def test_exposure_scales_the_light_and_not_its_code() -> None:
    assert np.abs(linear(stress.exposure(flat(200), 0.25, random())) - 0.25 * linear(flat(200))).max() < 0.003


def test_motion_spreads_a_row_over_its_length_along_the_track_only() -> None:
    dark = flat(0)
    dark[256] = 255
    smeared = linear(stress.motion(dark, 6, random()))[:, 0, 0]
    lit = np.flatnonzero(smeared)
    assert (len(lit), lit.max() - lit.min()) == (6, 5)
    assert smeared[lit] == pytest.approx(1 / 6, abs=0.003)
    across = np.swapaxes(dark, 0, 1).copy()
    assert np.array_equal(stress.motion(across, 6, random()), across)


def test_misregistration_moves_bands_by_whole_pixels_exactly() -> None:
    pixels = np.asarray(structured_picture(5))
    moved = stress.misregistration(pixels, 2, random())
    assert np.array_equal(moved[2:, :, 0], pixels[:-2, :, 0])
    assert np.array_equal(moved[..., 1], pixels[..., 1])
    assert np.array_equal(moved[:-2, :, 2], pixels[2:, :, 2])
    assert (moved[0, :, 0] == moved[2, :, 0]).all()


def test_jpeg_files_shrink_and_the_frame_is_what_they_hold() -> None:
    pixels = np.asarray(structured_picture(5))
    sizes = [len(stress.jpeg_bytes(pixels, quality)) for quality in (95, *named("jpeg").values)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[0] / 3
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=20)
    assert np.array_equal(stress.jpeg(pixels, 20, random()), np.asarray(Image.open(file)))


def test_rotation_turns_about_the_centre() -> None:
    pixels = np.asarray(structured_picture(5))
    turned = stress.rotation(pixels, 90, random()).astype(int)
    assert np.abs(turned - np.rot90(pixels)).max() <= 1
    bar = flat(0)
    bar[254:258] = 255  # a level bar
    rows, columns = np.nonzero(stress.rotation(bar, 15, random())[150:362, 150:362, 0] > 128)
    assert abs(np.degrees(np.arctan(np.polyfit(columns, rows, 1)[0]))) == pytest.approx(15, abs=0.5)


def test_flips_mirror_and_do_nothing_else() -> None:
    pixels = np.asarray(structured_picture(5))
    for kind, expected in ((1, pixels[:, ::-1]), (2, pixels[::-1]), (3, pixels[::-1, ::-1])):
        assert np.array_equal(stress.flip(pixels, kind, random()), expected)


def test_coarser_pixels_are_means_of_areas() -> None:
    pixels = np.asarray(structured_picture(5))
    coarse = stress.ground_sample_distance(pixels, 4, random())
    blocks = coarse.reshape(128, 4, 128, 4, 3)
    assert (blocks == blocks[:, :1, :, :1]).all()
    expected = linear(pixels).reshape(128, 4, 128, 4, 3).mean(axis=(1, 3))
    assert np.abs(linear(blocks[:, 0, :, 0]) - expected).max() < 0.005


@pytest.mark.parametrize("per_mille", named("defects").values)
def test_defects_are_as_many_as_stated(per_mille: float) -> None:
    broken = stress.defects(flat(90), per_mille, random())
    dead = (broken == 0).all(axis=(0, 2))
    assert dead.sum() == max(1, round(per_mille * SIDE / 1000))
    hot = broken[:, ~dead] == 255
    assert 1000 * hot.mean() == pytest.approx(per_mille, rel=0.05)
    assert set(np.unique(broken)) == {0, 90, 255}


@pytest.mark.parametrize("share", named("saturation").values)
def test_the_stated_share_of_samples_saturates(share: float) -> None:
    random_levels = np.random.default_rng(2).integers(10, 200, (SIDE, SIDE, 3), dtype=np.uint8)
    assert (stress.saturation(random_levels, share, random()) == 255).mean() == pytest.approx(share, abs=0.01)
    assert np.array_equal(stress.saturation(flat(0), share, random()), flat(0))


@pytest.mark.parametrize("share", named("partial").values)
def test_the_stated_share_of_a_partial_frame_is_black(share: float) -> None:
    cut = stress.partial(flat(90), share, random())
    assert (cut == 0).mean() == share
    assert (cut[: round((1 - share) * SIDE)] == 90).all()


def test_stresses_are_chosen_by_name_in_the_tables_order() -> None:
    assert [one.name for one in chosen(["noise", "haze"])] == ["haze", "noise"]
    assert chosen([]) == list(STRESSES)
    with pytest.raises(OrionError, match="there is no stress 'hazy'; the nearest name is haze") as refused:
        chosen(["noise", "hazy"])
    assert "misregistration" in refused.value.fix


def test_the_page_has_the_table() -> None:
    page = (Path(__file__).parents[2] / "docs" / "stress.md").read_text()
    rows = {row[0]: row[1] for row in re.findall(r"^\| `([\w-]+)` \|.*?\| ([^|]+?) \|", page, re.MULTILINE)}
    assert rows == {one.name: ", ".join(one.words or [f"{value:g}" for value in one.values]) for one in STRESSES}
