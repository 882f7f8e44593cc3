"""Pictures that are cut, bent, boundless or of another kind; what a file says beside its pixels changes nothing."""

import io
import json
import os
import shutil
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from orion_triage.dataset.build import run as build_dataset
from orion_triage.errors import FrameError, OrionError
from orion_triage.flight.triage import triage_files
from orion_triage.imagery.frames import Frame, decode_frame, read_frame
from orion_triage.imagery.stretch import Stretch
from orion_triage.mission.verdict import Verdict, answer_text
from orion_triage.settings import DatasetSettings
from tests.conftest import MISSION, ConstantBackend, structured_picture
from tests.hostile import mutated, outcome

PIXELS = structured_picture(3)
LARGE, SMALL = (512, 512), (64, 64)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(size: tuple[int, int], depth: int, colour: int, packed: bytes, *before: bytes) -> bytes:
    """A PNG written by hand: colour 0 grey, 2 RGB, 3 palette, 4 grey with alpha, 6 RGB with alpha."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(before) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def zeros(count: int) -> bytes:
    """So many zeros, packed a thousandfold."""
    packer = zlib.compressobj(1)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(count >> 20)) + packer.flush()


WHOLE_PNG, WHOLE_JPEG = encoded(PIXELS), encoded(PIXELS, "JPEG", quality=90)
DEEP_PNG = encoded(Image.fromarray(np.asarray(PIXELS.resize(SMALL).convert("L"), np.uint16) * 16))
SMALL_TIFF = encoded(PIXELS.resize(SMALL), "TIFF")
SMALL_PNG, SMALL_JPEG = (encoded(PIXELS.resize(SMALL), kind) for kind in ("PNG", "JPEG"))


def frame_of(data: bytes, *, resize: bool = True) -> Frame | FrameError:
    """A frame that is one, or a FrameError that names the file."""
    found = outcome(decode_frame, data, "a.png", 256, resize=resize, named="a.png")
    if isinstance(found, Frame):
        assert (found.image.size, found.image.mode) == ((256, 256), "RGB")
        return found
    assert isinstance(found, FrameError)
    return found


@given(st.integers(0, max(len(WHOLE_PNG), len(WHOLE_JPEG)) - 1), st.sampled_from([WHOLE_PNG, WHOLE_JPEG]))
def test_a_cut_picture_is_refused_unless_every_pixel_is_there(length: int, whole: bytes) -> None:
    found = frame_of(whole[: length % len(whole)])
    if isinstance(found, Frame):
        assert found.image.tobytes() == decode_frame(whole, "a.png", 256).image.tobytes()


@pytest.mark.parametrize("missing", [1, 2, 4, 8, 12, 13, 100])
def test_the_last_bytes_of_a_jpeg_may_not_be_missing_unseen(missing: int) -> None:
    found = frame_of(WHOLE_JPEG[:-missing])
    assert isinstance(found, FrameError) or found.image.tobytes() == decode_frame(WHOLE_JPEG, "", 256).image.tobytes()


MOVING_PNG = encoded(PIXELS, save_all=True, append_images=[PIXELS.rotate(90), PIXELS.rotate(180)])
PLAIN_PNG = encoded(PIXELS, compress_level=0)  # a changed byte is a changed pixel, which no decoder notices


def chunks_of(data: bytes) -> list[tuple[bytes, int, int]]:
    """Name, start and end of each chunk of a PNG."""
    found, start = [], 8
    while start < len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        found.append((data[start + 4 : start + 8], start, end))
        start = end
    return found


@pytest.mark.parametrize("whole", [PLAIN_PNG, MOVING_PNG, WHOLE_PNG[:-12] + chunk(b"tEXt", b"a\0b") + WHOLE_PNG[-12:]])
def test_a_png_with_a_changed_byte_in_any_chunk_is_damaged(whole: bytes) -> None:
    assert isinstance(frame_of(whole), Frame)
    for name, start, end in chunks_of(whole):
        for place in (start + 4, (start + 8 + end - 4) // 2, end - 1):  # its name, its middle, its checksum
            found = frame_of(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            assert isinstance(found, FrameError), name
            assert found.message == f"a.png is damaged: the checksum of its chunk at byte {start:,} is wrong."
            assert found.fix == "Fetch the file again."


def test_a_16_bit_png_with_a_wrong_checksum_is_damaged() -> None:
    _, start, end = chunks_of(DEEP_PNG)[1]
    changed = DEEP_PNG[: end - 1] + bytes([DEEP_PNG[end - 1] ^ 1]) + DEEP_PNG[end:]
    found = outcome(decode_frame, changed, "a.png", 256, resize=True, stretch=Stretch(0, 4095), named="a.png")
    assert isinstance(found, FrameError)
    assert f"is damaged: the checksum of its chunk at byte {start:,}" in found.message


@pytest.mark.parametrize("missing", [1, 6, 11, 12, 13, 5000])
def test_a_png_without_its_end_is_damaged_and_bytes_after_it_are_no_fault(missing: int) -> None:
    for whole in (PLAIN_PNG, MOVING_PNG):
        found = frame_of(whole[:-missing])
        assert isinstance(found, FrameError)
        assert f"a.png is damaged: it is cut: after {len(whole) - missing:,} bytes" in found.message
        assert same(whole + bytes(missing), PIXELS)


@given(mutated(SMALL_PNG))
def test_a_bent_png_is_a_frame_or_refused(data: bytes) -> None:
    frame_of(data)


@given(mutated(SMALL_JPEG))
def test_a_bent_jpeg_is_a_frame_or_refused(data: bytes) -> None:
    frame_of(data)


@given(
    st.tuples(*[st.one_of(st.integers(0, 600), st.sampled_from([8000, 65535, 2**31 - 1, 2**32 - 1]))] * 2),
    st.sampled_from([0, 1, 2, 4, 8, 16, 255]),
    st.integers(0, 7),
    st.binary(max_size=64),
    st.sampled_from(b"tRNS iCCP zTXt iTXt tEXt gAMA cHRM sRGB pHYs PLTE acTL fcTL fdAT eXIf".split()),
    st.binary(max_size=16),
)
def test_a_png_of_any_header_is_a_frame_or_refused(
    size: tuple[int, int], depth: int, colour: int, pixels: bytes, name: bytes, data: bytes
) -> None:
    found = frame_of(png(size, depth, colour, zlib.compress(pixels), chunk(name, data)))
    if isinstance(found, Frame):
        assert found.native_size == size


@pytest.mark.parametrize("size", [(1, 1), (15, 4000), (10_000, 10_000), (20_000, 20_000), (2**31 - 1, 2**31 - 1)])
@pytest.mark.parametrize("resize", [False, True])
def test_sizes_are_refused_from_the_header(size: tuple[int, int], resize: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = frame_of(png(size, 8, 2, zlib.compress(b"")), resize=resize)
    assert isinstance(found, FrameError)
    assert f"a.png is {size[0]}x{size[1]}" in found.message


def test_a_picture_without_width_is_damaged() -> None:
    assert "damaged" in str(frame_of(png((0, 512), 8, 2, zlib.compress(b""))))


BOMBS = """
import json, resource, sys, time
resource.setrlimit(resource.RLIMIT_AS, (1_500_000_000,) * 2)
from pathlib import Path
from orion_triage.errors import FrameError
from orion_triage.imagery.frames import read_frame
for name in sys.argv[1:]:
    began = time.process_time()
    try:
        said = f"frame of {read_frame(Path(name), 512, resize=True).native_size}"
    except FrameError as error:
        said = error.message
    print(json.dumps([said, time.process_time() - began]), flush=True)
"""


def test_bombs_take_neither_memory_nor_time(tmp_path: Path) -> None:
    """In a process that may have 1.5 GB of addresses: each would need more, or be read for ever."""
    inflated = zeros(1 << 29)  # half a gigabyte in half a megabyte
    row = b"\0" + bytes(3 * 512)
    pixels = zlib.compress(row * 512)
    files: dict[str, bytes] = {
        "idat.png": png(LARGE, 8, 2, inflated),
        "ztxt.png": png(LARGE, 8, 2, pixels, chunk(b"zTXt", b"a\0\0" + inflated)),
        "itxt.png": png(LARGE, 8, 2, pixels, chunk(b"iTXt", b"a\0\1\0\0\0" + inflated)),
        "iccp.png": png(LARGE, 8, 2, pixels, chunk(b"iCCP", b"a\0\0" + inflated)),
        "texts.png": png(LARGE, 8, 2, pixels, *[chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 20)))] * 200),
        "100-megapixel.png": png((10_000, 10_000), 8, 2, inflated),
        "largest.png": png((8000, 8000), 8, 0, zeros(8000 * 8001 + (1 << 20))),
    }
    expected = {
        "idat.png": "frame of (512, 512)",  # what is beyond the last row is not unpacked
        "ztxt.png": "damaged",
        "itxt.png": "damaged",
        "iccp.png": "damaged",
        "texts.png": "damaged",
        "100-megapixel.png": "is 10000x10000",
        "largest.png": "frame of (8000, 8000)",
        "huge.png": "the limit is 192,000,000",
        "huge.raw": "the limit is 192,000,000",
        "pipe.png": "is not a regular file",
        "folder.png": "is not a regular file",
        "endless.png": "is not a regular file",
        "endless.raw": "is not a regular file",
        "round.png": "cannot be read",
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    for name in ("huge.png", "huge.raw"):
        with (tmp_path / name).open("wb") as file:
            file.write(WHOLE_PNG)
            file.truncate(2**40)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    for name, target in (("endless.png", "/dev/zero"), ("endless.raw", "/dev/zero"), ("round.png", "round.png")):
        (tmp_path / name).symlink_to(target)
    done = subprocess.run(
        [sys.executable, "-c", BOMBS, *(str(tmp_path / name) for name in expected)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # each thread takes addresses of its own
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    told = dict(zip(expected, map(json.loads, done.stdout.splitlines()), strict=True))
    for name, (said, seconds) in told.items():
        assert expected[name] in said, name
        assert str(tmp_path / name) in said or said.startswith("frame")
        assert seconds < 5, name


# Kinds of pictures: what each becomes


def same(data: bytes, pixels: Image.Image) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return decode_frame(data, "a.png", 512).image.tobytes() == pixels.tobytes()


def test_exif_rotates_nothing() -> None:
    """A camera in orbit has no up; the pixels are those that training saw."""
    exif = Image.Exif()
    for orientation in range(1, 9):
        exif[0x0112] = orientation
        for kind, whole in (("PNG", WHOLE_PNG), ("JPEG", WHOLE_JPEG)):
            turned = encoded(PIXELS, kind, exif=exif, **({"quality": 90} if kind == "JPEG" else {}))
            assert turned != whole
            assert same(turned, decode_frame(whole, "a", 512).image)


def test_of_an_animation_the_still_picture_counts() -> None:
    others = [Image.new("RGB", LARGE, colour) for colour in ("red", "green")]
    moving = encoded(PIXELS, save_all=True, append_images=others)
    assert Image.open(io.BytesIO(moving)).n_frames == 3  # type: ignore[attr-defined]
    assert same(moving, PIXELS)
    stereo = io.BytesIO()
    PIXELS.save(stereo, "MPO", save_all=True, append_images=others, quality=90)
    assert same(stereo.getvalue(), decode_frame(WHOLE_JPEG, "a", 512).image)


def test_transparency_hides_nothing() -> None:
    alpha = Image.linear_gradient("L").resize(LARGE).point(lambda value: max(value, 1))  # 0 means no data
    assert same(encoded(Image.merge("RGBA", [*PIXELS.split(), alpha])), PIXELS)
    grey = PIXELS.convert("L")
    assert same(encoded(Image.merge("LA", [grey, alpha])), grey.convert("RGB"))
    palette = PIXELS.quantize(256)
    assert same(encoded(palette, transparency=bytes(range(1, 256)) + b"\1"), palette.convert("RGB"))
    assert same(encoded(PIXELS, transparency=(1, 2, 3)), PIXELS)


def test_other_colours_become_rgb() -> None:
    bits = PIXELS.convert("1")
    assert same(encoded(bits), bits.convert("RGB"))


def test_sixteen_bits_are_refused() -> None:
    """Of grey, every value over 255 would be white: a blank frame, LOW by rule. Of RGB, 12 bits would be black."""
    values = np.random.default_rng(0).integers(0, 2**12, (512, 512, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    grey = Image.fromarray(values[..., 0].astype(np.uint16))
    for data in (encoded(grey), png(LARGE, 16, 2, zlib.compress(rows, 1))):
        found = frame_of(data)
        assert isinstance(found, FrameError)
        assert "has 16 bits per channel" in found.message


@given(mutated(DEEP_PNG))
def test_a_bent_16_bit_png_is_a_frame_or_refused(data: bytes) -> None:
    found = outcome(decode_frame, data, "a.png", 256, resize=True, stretch=Stretch(0, 4095), named="a.png")
    assert isinstance(found, FrameError) or found.image.size == (256, 256)


@pytest.fixture(scope="session")
def a_tiff(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that bent TIFFs are written to."""
    return tmp_path_factory.mktemp("tiff") / "a.tif"


@given(mutated(SMALL_TIFF))
def test_a_bent_tiff_is_a_frame_or_refused(a_tiff: Path, data: bytes) -> None:
    a_tiff.write_bytes(data)
    found = outcome(read_frame, a_tiff, 256, resize=True, named=a_tiff)
    assert isinstance(found, FrameError) or found.image.size == (256, 256)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "WEBP", "ICO", "PPM"])
def test_other_formats_are_not_even_opened(kind: str) -> None:
    assert "not PNG, JPEG or TIFF" in str(frame_of(encoded(PIXELS, kind)))


# Through triage and dataset


def test_triage_refuses_what_is_no_picture_and_goes_on(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "1.png")
    (tmp_path / "2.png").mkdir()
    (tmp_path / "3.png").symlink_to("/dev/zero")
    (tmp_path / "4.png").write_bytes(WHOLE_PNG)
    answer = Verdict("Long quays.", "HIGH")
    backend = ConstantBackend(answer_text(MISSION, answer))
    outcomes = outcome(lambda: list(triage_files(sorted(tmp_path.iterdir()), backend, MISSION, 256)))
    assert [found.verdict for found in outcomes] == [None, None, None, answer]
    assert [found.error.partition("is not a")[2] for found in outcomes[:3]] == [
        " regular file. Pass a file, not a folder, pipe or device."
    ] * 3


def test_a_table_of_sources_is_no_geotiff(tmp_path: Path) -> None:
    """GDAL would follow it to other files of this machine, and to addresses."""
    from orion_triage.imagery.geotiff import locate

    (tmp_path / "secret.png").write_bytes(WHOLE_PNG)
    bands = "".join(
        f'<VRTRasterBand dataType="Byte" band="{band}"><SimpleSource><SourceFilename relativeToVRT="1">secret.png'
        f"</SourceFilename><SourceBand>{band}</SourceBand></SimpleSource></VRTRasterBand>"
        for band in (1, 2, 3)
    )
    (tmp_path / "a.tif").write_text(
        '<VRTDataset rasterXSize="512" rasterYSize="512"><SRS>EPSG:32633</SRS>'
        f"<GeoTransform>500000, 10, 0, 5000000, 0, -10</GeoTransform>{bands}</VRTDataset>"
    )
    found = outcome(locate, tmp_path / "a.tif", named=tmp_path / "a.tif")
    assert isinstance(found, FrameError)
    assert "is damaged" in found.message
    found = outcome(read_frame, tmp_path / "a.tif", 256, named=tmp_path / "a.tif")
    assert isinstance(found, FrameError)
    assert "not PNG, JPEG or TIFF" in found.message


def test_a_dataset_that_links_outside_leaves_nothing_behind(tmp_path: Path, small_dataset: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "run" / "dataset"
    shutil.copytree(small_dataset, source)
    image = next((source / "orion_dataset" / "images").iterdir())
    (tmp_path / "secret.png").write_bytes(image.read_bytes())
    image.unlink()
    image.symlink_to(tmp_path / "secret.png")
    with pytest.raises(OrionError, match="is outside"):
        build_dataset(out, DatasetSettings(source="directory", folder=str(source)), MISSION)
    assert not out.exists()
    assert {path.name for path in tmp_path.iterdir()} - {"run"} == {"secret.png", "source"}


def test_a_good_file_is_read(tmp_path: Path) -> None:
    """The bounds above let through what they must."""
    (tmp_path / "a.png").write_bytes(WHOLE_PNG)
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    assert read_frame(tmp_path / "link.png", 512).image.tobytes() == PIXELS.tobytes()
