import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from orion_triage.errors import FrameError
from orion_triage.imagery.frames import RAW_BYTES, decode_frame, is_blank, noise_frame, read_frame, shrink
from tests.conftest import SHARED


def picture(width: int = 512, height: int = 512, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def test_png_and_raw_give_the_same_pixels() -> None:
    image = picture()
    frames = [decode_frame(encoded(image), "a.png", 512), decode_frame(image.tobytes(), "a.raw", 512)]
    assert [frame.image.tobytes() for frame in frames] == [image.tobytes()] * 2
    assert decode_frame(frames[0].png(), "a.png", 512).image.tobytes() == image.tobytes()


def test_shrinking_averages_two_by_two() -> None:
    image = picture()
    small = np.asarray(decode_frame(encoded(image), "a.png", 256).image, float)
    blocks = np.asarray(image, float).reshape(256, 2, 256, 2, 3).mean((1, 3))
    assert np.abs(small - blocks).max() <= 1  # Pillow rounds after each of two passes


@pytest.mark.parametrize(
    ("data", "name", "message"),
    [
        (b"", "a.png", "not PNG, JPEG or TIFF"),
        (b"GIF89a", "a.gif", "not PNG, JPEG or TIFF"),
        (encoded(picture())[:5000], "a.png", "damaged"),
        (encoded(picture(), "JPEG")[:5000], "a.jpg", "damaged"),
        (encoded(picture(256, 512)), "a.png", "256x512, not 512x512"),
        (bytes(785_955), "a.raw", "785,955 bytes, not the 786,432"),
        (bytes(RAW_BYTES + 1), "a.raw", "786,433"),
    ],
)
def test_unusable_frames_are_refused_by_name(data: bytes, name: str, message: str) -> None:
    with pytest.raises(FrameError, match=message) as caught:
        decode_frame(data, name, 256)
    assert name in str(caught.value)


def test_resize_cuts_the_middle_and_records_the_native_size() -> None:
    wide = Image.new("RGB", (1200, 600))
    wide.paste((200, 10, 10), (300, 0, 900, 600))
    frame = decode_frame(encoded(wide), "a.png", 256, resize=True)
    assert frame.native_size == (1200, 600)
    assert frame.image.getextrema() == ((200, 200), (10, 10), (10, 10))
    with pytest.raises(FrameError, match="8x8"):
        decode_frame(encoded(picture(8, 8)), "a.png", 256, resize=True)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FrameError, match=r"nothing\.png does not exist"):
        read_frame(tmp_path / "nothing.png", 256)


def test_blank_needs_both_little_entropy_and_little_gradient() -> None:
    flat = Image.new("RGB", (512, 512), (240, 240, 240))
    ramp = Image.fromarray(np.repeat(np.linspace(0, 255, 512, dtype=np.uint8)[None], 512, 0)).convert("RGB")
    stripes = Image.fromarray(np.tile(np.array([100, 110], np.uint8), (512, 256))).convert("RGB")
    assert is_blank(flat)
    assert not is_blank(ramp)  # smooth, but many grey levels
    assert not is_blank(stripes)  # two grey levels, but structure
    assert not is_blank(picture())


def test_noise_is_the_one_of_the_protocol() -> None:
    expected = np.clip(np.random.RandomState(42).normal(127.5, 50, (256, 256, 3)), 0, 255).astype(np.uint8)
    assert np.array_equal(np.asarray(noise_frame("gaussian", 256)), expected)
    np.random.seed(42)
    uniform = np.random.randint(0, 256, (512, 512, 3)).astype(np.uint8)
    assert np.array_equal(np.asarray(noise_frame("uniform", 512)), uniform)
    assert noise_frame("uniform", 256).tobytes() == shrink(Image.fromarray(uniform), 256).tobytes()


@pytest.mark.parametrize("logo", [False, True])
@pytest.mark.parametrize("form", ["plain", "jpeg", "dithered"])
@pytest.mark.parametrize(
    "colour", [(0, 0, 0), (6, 6, 8), (255, 255, 255), (249, 251, 250), (170, 211, 223), (12, 60, 20)]
)
def test_every_frame_of_one_colour_is_blank(colour: tuple[int, int, int], form: str, logo: bool) -> None:
    """As tile servers send it: as it is, through JPEG, or a grey level up here and there; with their logo or not."""
    pixels = np.full((512, 512, 3), colour, dtype=np.uint8)
    if form == "dithered":
        up = np.random.default_rng(1).random((512, 512)) < 0.2
        pixels[up] = np.minimum(pixels[up].astype(int) + 1, 255)
    if logo:
        pixels[494:508, 8:120] = np.random.default_rng(2).integers(0, 256, (14, 112, 1))
    image = Image.fromarray(pixels, "RGB")
    if form == "jpeg":
        image = Image.open(io.BytesIO(encoded(image, "JPEG"))).convert("RGB")
    assert is_blank(image)


@pytest.mark.shared
def test_of_the_real_frames_only_open_water_is_blank() -> None:
    frames = sorted((SHARED / "frames").glob("*.png"))
    assert len(frames) == 25
    assert [path.name for path in frames if is_blank(read_frame(path, 512).image)] == ["XBand_r1_orion_frame_0001.png"]
