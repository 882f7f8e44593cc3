"""Pictures from outside: for each property of a file the right pixels, or a refusal that names it.

GDAL (rasterio) is the judge of the stored values, never Pillow; where GDAL does not apply a rule (a profile, a
palette's colours), the right pixels are computed here from the definition.
"""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from orion_triage.errors import FrameError
from orion_triage.imagery import geotiff, opened
from orion_triage.imagery.frames import Frame, read_frame
from orion_triage.imagery.stretch import Stretch
from tests.conftest import structured_picture

rasterio = pytest.importorskip("rasterio")
from rasterio.enums import ColorInterp  # noqa: E402
from rasterio.transform import from_origin  # noqa: E402
from rasterio.warp import transform as transform_points  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

SIDE = 512
RGB = np.asarray(structured_picture(5))
GREY = RGB[..., 1]
DEEP = RGB.astype(np.uint16) * 14 + 600  # as a camera of 12 bits in 16 records it
STRETCH = Stretch(600, 4170)
Bytes = NDArray[np.uint8]


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(values: NDArray[Any], *before: bytes, bits: int = 8, colour: int = 2, interlaced: bool = False) -> bytes:
    """A PNG written by hand from samples [height, width(, channels)], with chunks before the pixels."""
    height, width = values.shape[:2]
    rows = values.reshape(height, width, -1)

    def packed(block: NDArray[Any]) -> bytes:
        if not block.size:
            return b""
        if bits == 16:
            return b"".join(b"\0" + row.astype(">u2").tobytes() for row in block)
        if bits == 8:
            return b"".join(b"\0" + row.astype(np.uint8).tobytes() for row in block)
        places = 8 // bits
        out = b""
        for row in block[..., 0]:
            padded = np.concatenate([row, np.zeros(-len(row) % places, row.dtype)]).reshape(-1, places).astype(int)
            out += b"\0" + bytes((padded << np.arange(8 - bits, -1, -bits)).sum(axis=1).astype(np.uint8))
        return out

    adam7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    passes = adam7 if interlaced else ((0, 0, 1, 1),)
    pixels = b"".join(packed(rows[top::down, left::right]) for top, left, down, right in passes)
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, int(interlaced))
    data = chunk(b"IDAT", zlib.compress(pixels, 1))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(before) + data + chunk(b"IEND", b"")


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def tiff(path: Path, values: NDArray[Any], colours: str = "", **options: Any) -> Path:
    """A TIFF written by GDAL from samples [height, width(, channels)]; `colours` are names of band colours."""
    bands = np.moveaxis(values.reshape(*values.shape[:2], -1), 2, 0)
    profile = {"driver": "GTiff", "width": bands.shape[2], "height": bands.shape[1], "count": len(bands)}
    tags, mask, colormap = options.pop("tags", {}), options.pop("mask", None), options.pop("colormap", None)
    with rasterio.open(path, "w", dtype=str(bands.dtype), **profile, **options) as file:
        if colours:
            file.colorinterp = [ColorInterp[name] for name in colours.split()]
        if colormap:
            file.write_colormap(1, colormap)
        file.write(bands)
        if mask is not None:
            file.write_mask(mask)
        for namespace, values_of_tags in tags.items():
            file.update_tags(ns=namespace, **values_of_tags)
    return path


def judged(path: Path) -> NDArray[Any]:
    """The stored values by GDAL, of shape [height, width, bands]."""
    with rasterio.open(path) as file:
        return np.moveaxis(file.read(), 0, 2)


def framed(path: Path, data: bytes | None = None, stretch: Stretch | None = None) -> Frame:
    if data is not None:
        path.write_bytes(data)
    return read_frame(path, SIDE, resize=True, stretch=stretch)


def pixels(frame: Frame) -> Bytes:
    return np.asarray(frame.image)


def refused(path: Path, data: bytes | None = None, stretch: Stretch | None = None) -> str:
    with pytest.raises(FrameError) as caught:
        framed(path, data, stretch)
    assert str(path) in caught.value.message
    assert caught.value.fix
    return str(caught.value)


def as_8_bits(values: NDArray[Any], stretch: Stretch = STRETCH) -> Bytes:
    """The stretch by its definition."""
    scaled = (values.astype(float) - stretch.low) / (stretch.high - stretch.low)
    return np.floor(scaled.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def grey(values: Bytes) -> Bytes:
    return np.repeat(values[..., None], 3, axis=2)


# Bit depth


@pytest.mark.parametrize("interlaced", [False, True])
def test_plain_pictures_change_nothing(tmp_path: Path, interlaced: bool) -> None:
    path = tmp_path / "a.png"
    frame = framed(path, png(RGB, interlaced=interlaced))
    assert frame.changes == ()
    assert np.array_equal(pixels(frame), RGB)
    assert np.array_equal(pixels(frame), judged(path))
    frame = framed(tiff(tmp_path / "a.tif", RGB))
    assert (frame.changes, np.array_equal(pixels(frame), RGB)) == ((), True)


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("interlaced", [False, True])
def test_few_bits_are_spread_over_eight(tmp_path: Path, bits: int, interlaced: bool) -> None:
    values = GREY >> (8 - bits)
    path = tmp_path / "a.png"
    frame = framed(path, png(values, bits=bits, colour=0, interlaced=interlaced))
    assert np.array_equal(judged(path)[..., 0], values)
    assert np.array_equal(pixels(frame), grey(values * (255 // (2**bits - 1))))
    assert set(frame.changes) == {f"{bits}-bit grey scaled to 8 bits", opened.GREY}
    frame = framed(tiff(tmp_path / "a.tif", values, nbits=bits))
    assert np.array_equal(pixels(frame), grey(values * (255 // (2**bits - 1))))
    frame = framed(tiff(tmp_path / "b.tif", RGB >> 3, nbits=5, photometric="RGB"))
    assert np.array_equal(pixels(frame), np.floor((RGB >> 3) * (255 / 31) + 0.5))
    assert frame.changes == ("5-bit values scaled to 8 bits",)


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("form", ["rgb", "grey", "rgba", "grey and alpha"])
def test_16_bit_png_is_stretched_from_all_its_bits_or_refused(tmp_path: Path, form: str, interlaced: bool) -> None:
    opaque = np.full((SIDE, SIDE, 1), 65535, np.uint16)
    values, colour = {
        "rgb": (DEEP, 2),
        "grey": (DEEP[..., 1], 0),
        "rgba": (np.concatenate([DEEP, opaque], 2), 6),
        "grey and alpha": (np.concatenate([DEEP[..., 1:2], opaque], 2), 4),
    }[form]
    path = tmp_path / "a.png"
    data = png(values, bits=16, colour=colour, interlaced=interlaced)
    message = refused(path, data)
    assert "has 16 bits per channel (uint16), and dataset.stretch_low and dataset.stretch_high are not set" in message
    stored = judged(path)
    assert np.array_equal(stored.squeeze(), values)
    frame = framed(path, data, STRETCH)
    right = as_8_bits(stored[..., :3] if stored.shape[2] > 2 else np.repeat(stored[..., :1], 3, axis=2))
    assert np.array_equal(pixels(frame), right)
    assert 100 < right.mean() < 130  # not black
    assert frame.clipped_share == 0
    assert "stretched uint16 from 600 to 4170" in frame.changes
    for cut in (1, 20, len(data) // 2):
        assert "damaged" in refused(path, data[:-cut], STRETCH)


@pytest.mark.parametrize("samples", ["uint16", "int16", "uint32", "int32", "float32", "float64"])
def test_a_stretch_covers_one_sample_type(tmp_path: Path, samples: str) -> None:
    values = (DEEP.astype(int) - 1000).clip(0 if samples[0] == "u" else -400, 3000).astype(samples)
    path = tiff(tmp_path / "a.tif", values, photometric="RGB")
    stretch = Stretch(-200.5 if samples[0] != "u" else 10.5, 2500, samples)
    frame = framed(path, stretch=stretch)
    assert np.array_equal(pixels(frame), as_8_bits(judged(path), stretch))
    outside = ((values < stretch.low) | (values > stretch.high)).mean()
    assert frame.clipped_share == pytest.approx(outside)
    assert outside > 0.01
    other = "int16" if samples == "uint16" else "uint16"
    assert f"({samples}), but this run stretches {other} from" in refused(path, stretch=Stretch(0, 9, other))
    more = "" if samples == "uint16" else f" and dataset.stretch_samples={samples}"
    assert f"dataset.stretch_high=WHITE{more}:" in refused(path)


def test_8_bits_are_refused_where_a_run_stretches(tmp_path: Path) -> None:
    for name, data in (("a.png", png(RGB)), ("a.jpg", saved(Image.fromarray(RGB), "JPEG")), ("a.raw", RGB.tobytes())):
        message = refused(tmp_path / name, data, STRETCH)
        assert "has 8 bits per channel, but this run stretches uint16 from 600 to 4170" in message
    assert "has 8 bits" in refused(tiff(tmp_path / "a.tif", RGB), stretch=STRETCH)
    assert "has 1 bits" in refused(tmp_path / "b.png", png(GREY >> 7, bits=1, colour=0), STRETCH)


def test_12_bits_in_16_and_samples_that_no_stretch_covers(tmp_path: Path) -> None:
    path = tiff(tmp_path / "a.tif", (DEEP - 600), photometric="RGB", nbits=12)
    assert "has 12 bits per channel (uint16)" in refused(path)
    stretch = Stretch(0, 4095)
    assert np.array_equal(pixels(framed(path, stretch=stretch)), as_8_bits(judged(path), stretch))
    for samples in ("int8", "complex64", "int64"):
        path = tiff(tmp_path / f"{samples}.tif", (RGB >> 1).astype(samples))
        assert "Convert it to one of uint16, int16" in refused(path)


def test_a_frame_wholly_outside_the_stretch_is_refused_instead_of_blank(tmp_path: Path) -> None:
    """As blank it would be LOW and dropped, for a camera whose gain was changed."""
    path = tiff(tmp_path / "a.tif", DEEP, photometric="RGB")
    assert "none between the limits of the stretch (uint16 from 0 to 500)" in refused(path, stretch=Stretch(0, 500))
    assert "Check dataset.stretch_low" in refused(path, stretch=Stretch(50_000, 60_000))


def test_a_jpeg_of_12_bits_is_refused_by_name(tmp_path: Path) -> None:
    data = bytearray(saved(Image.fromarray(RGB), "JPEG"))
    data[data.index(b"\xff\xc0") + 4] = 12
    assert "has 12 bits per channel" in refused(tmp_path / "a.jpg", bytes(data))


# Bands


@pytest.mark.parametrize("samples", ["uint8", "uint16"])
def test_bands_are_ordered_by_what_the_file_says(tmp_path: Path, samples: str) -> None:
    values = RGB if samples == "uint8" else DEEP
    stretch = None if samples == "uint8" else STRETCH
    right = RGB if stretch is None else as_8_bits(DEEP)
    infrared = values[..., :1] // 2
    path = tmp_path / "a.tif"
    frame = framed(tiff(path, values[..., ::-1], "blue green red"), stretch=stretch)
    assert np.array_equal(pixels(frame), right)
    assert "bands reordered to red, green, blue" in frame.changes
    for colours, order in (
        ("blue green red undefined", (2, 1, 0, 3)),
        ("undefined blue green red", (3, 2, 1, 0)),
        ("green undefined red blue", (1, 3, 0, 2)),
    ):
        four = np.concatenate([values, infrared], axis=2)[..., list(order)]
        frame = framed(tiff(path, four, colours), stretch=stretch)
        assert np.array_equal(pixels(frame), right), colours
        assert "1 more band left out" in frame.changes
    frame = framed(tiff(path, values, "gray undefined undefined"), stretch=stretch)
    assert np.array_equal(pixels(frame), right)
    assert geotiff.UNNAMED in frame.changes


@pytest.mark.parametrize(
    ("count", "colours"),
    [
        (4, "gray undefined undefined undefined"),
        (5, "gray undefined undefined undefined undefined"),
        (2, "gray undefined"),
        (4, "red green undefined undefined"),
        (3, "red red blue"),
        (4, "red green blue blue"),
        (3, "red green cyan"),
    ],
)
def test_unclear_bands_are_refused_with_a_fix_that_works(tmp_path: Path, count: int, colours: str) -> None:
    path = tiff(tmp_path / "a.tif", RGB[..., [0, 1, 2, 0, 1][:count]], colours)
    message = refused(path)
    assert f"has {count} bands ({', '.join(colours.split())})" in message
    if count > 3:
        with rasterio.open(path, "r+") as file:  # as 'rio edit-info --colorinterp' does
            names = message.partition("--colorinterp ")[2].split()[0].split(",")
            file.colorinterp = [ColorInterp[name] for name in names]
        assert np.array_equal(pixels(framed(path)), judged(path)[..., [2, 1, 0]])


def test_grey_and_panchromatic_bands_are_repeated(tmp_path: Path) -> None:
    for colours in ("gray", "pan", "undefined"):
        frame = framed(tiff(tmp_path / "a.tif", GREY, colours))
        assert np.array_equal(pixels(frame), grey(GREY))
        assert frame.changes == (opened.GREY,)
    frame = framed(tiff(tmp_path / "b.tif", GREY, photometric="MINISWHITE"))
    assert np.array_equal(pixels(frame), grey(255 - GREY))
    assert geotiff.INVERTED in frame.changes
    frame = framed(tiff(tmp_path / "c.tif", GREY >> 7, photometric="MINISWHITE", nbits=1))
    assert np.array_equal(pixels(frame), grey(255 * (1 - (GREY >> 7))))
    frame = framed(tmp_path / "d.jpg", saved(Image.fromarray(GREY), "JPEG", quality=95))
    assert np.array_equal(pixels(frame), grey(judged(tmp_path / "d.jpg")[..., 0]))


# No data, masks, transparency


def test_pixels_without_data_are_black_and_counted(tmp_path: Path) -> None:
    some = np.zeros((SIDE, SIDE), bool)
    some[:8, :SIDE] = True  # 1.6 %
    right = np.where(some[..., None], 0, RGB)
    holes = np.where(some[..., None], 255, np.minimum(RGB, 254)).astype(np.uint8)
    alpha = np.where(some, 0, 255).astype(np.uint8)
    white = np.where(some[..., None], 255, RGB).astype(np.uint8)
    forms = {
        "nodata.tif": tiff(tmp_path / "nodata.tif", holes, nodata=255),
        "mask.tif": tiff(tmp_path / "mask.tif", white, mask=~some),
        "alpha.tif": tiff(tmp_path / "alpha.tif", np.dstack([white, alpha]), "red green blue alpha"),
    }
    (tmp_path / "alpha.png").write_bytes(png(np.dstack([white, alpha]), colour=6))
    colour = np.array([255, 0, 254], np.uint8)
    keyed = np.where(some[..., None], colour, RGB)
    (tmp_path / "key.png").write_bytes(png(keyed, chunk(b"tRNS", struct.pack(">HHH", 255, 0, 254))))
    for path in [*forms.values(), tmp_path / "alpha.png", tmp_path / "key.png"]:
        frame = framed(path)
        with rasterio.open(path) as file:
            assert np.array_equal(file.dataset_mask() == 0, some), path.name
        assert np.array_equal(pixels(frame), np.minimum(right, 254) if path.name == "nodata.tif" else right), path.name
        assert opened.NO_DATA in frame.changes
    both = framed(tiff(tmp_path / "both.tif", np.dstack([white, alpha]), "red green blue alpha", nodata=3))
    assert np.array_equal(pixels(both), np.where(right == 3, 0, right))  # GDAL's own mask ignores one of the two
    some[:11] = True  # 2.1 %
    path = tiff(tmp_path / "more.tif", RGB, mask=~some)
    assert "has no data in 2.1% of the frame (nodata value, mask or transparency); the limit is 2%" in refused(path)


@pytest.mark.parametrize("samples", ["float32", "int16"])
def test_values_without_data_are_not_stretched(tmp_path: Path, samples: str) -> None:
    values = DEEP.astype(samples)
    values[:4] = -9999
    values[4:6, :, 1] = -9999  # one band
    if samples == "float32":
        values[6:8] = np.nan
        values[8, :9] = np.inf
    path = tiff(tmp_path / "a.tif", values, photometric="RGB", nodata=-9999)
    stretch = Stretch(600, 4170, samples)
    right = np.where(np.isfinite(values) & (values != -9999), as_8_bits(np.nan_to_num(values), stretch), 0)
    frame = framed(path, stretch=stretch)
    assert np.array_equal(pixels(frame), right)
    assert frame.clipped_share == 0  # -9999 is not a value below the limit


def test_of_transparent_pictures_the_colours_count(tmp_path: Path) -> None:
    """Between 1 and 254 the stored colours are kept: a PNG's are not multiplied by alpha."""
    alpha = np.tile(np.linspace(1, 254, SIDE).astype(np.uint8), (SIDE, 1))
    frame = framed(tmp_path / "a.png", png(np.dstack([RGB, alpha]), colour=6))
    assert np.array_equal(pixels(frame), judged(tmp_path / "a.png")[..., :3])
    assert frame.changes == (opened.ALPHA,)
    frame = framed(tmp_path / "b.png", png(np.dstack([GREY, alpha]), colour=4))
    assert np.array_equal(pixels(frame), grey(judged(tmp_path / "b.png")[..., 0]))
    four = np.dstack([RGB, alpha])
    frame = framed(tiff(tmp_path / "a.tif", four, "red green blue alpha"))
    assert np.array_equal(pixels(frame), RGB)
    path = tiff(tmp_path / "b.tif", four, photometric="RGB", alpha="PREMULTIPLIED")
    assert "colours that are multiplied by its alpha channel" in refused(path)


# Orientation, several pictures, colours


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_orientation_is_not_applied_and_said(tmp_path: Path, orientation: int) -> None:
    """A satellite has no up; the stored rows and columns are those that the flight sees."""
    image = Image.fromarray(RGB)
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name, data in (
        ("a.png", saved(image, "PNG", exif=exif)),
        ("a.jpg", saved(image, "JPEG", exif=exif)),
        ("a.tif", saved(image, "TIFF", tiffinfo={274: orientation})),
    ):
        frame = framed(tmp_path / name, data)
        assert frame.changes == ((opened.ORIENTATION,) if orientation > 1 else ())
        if name != "a.jpg":
            assert np.array_equal(pixels(frame), judged(tmp_path / name))


def test_of_several_pictures_the_first_counts_and_pages_are_refused(tmp_path: Path) -> None:
    image, others = Image.fromarray(RGB), [Image.new("RGB", (SIDE, SIDE), colour) for colour in ("red", "green")]
    frame = framed(tmp_path / "a.png", saved(image, "PNG", save_all=True, append_images=others))
    assert np.array_equal(pixels(frame), judged(tmp_path / "a.png")[..., :3])
    assert opened.FIRST_OF_SEVERAL in frame.changes
    frame = framed(tmp_path / "a.jpg", saved(image, "MPO", save_all=True, append_images=others, quality=90))
    assert np.array_equal(pixels(frame), pixels(framed(tmp_path / "b.jpg", saved(image, "JPEG", quality=90))))
    assert frame.changes == (opened.FIRST_OF_SEVERAL,)
    pages = saved(Image.fromarray(RGB), "TIFF", save_all=True, append_images=[one.copy() for one in others])
    message = refused(tmp_path / "a.tif", pages)
    assert "has 3 pages. Save the page that you want: rio convert GTIFF_DIR:1:a.tif" in message
    overviews = tiff(tmp_path / "b.tif", RGB)
    with rasterio.open(overviews, "r+") as file:
        file.build_overviews([2, 4])
    assert framed(overviews).changes == ()  # smaller copies are no pages


def test_a_palette_gives_its_colours(tmp_path: Path) -> None:
    image = Image.fromarray(RGB).quantize(200)
    numbers, colours = np.asarray(image), np.asarray(image.getpalette(), np.uint8).reshape(-1, 3)
    frame = framed(tmp_path / "a.png", saved(image, "PNG"))
    assert np.array_equal(judged(tmp_path / "a.png")[..., 0], numbers)
    assert np.array_equal(pixels(frame), colours[numbers])
    assert frame.changes == (opened.PALETTE,)
    table = {n: (*map(int, colour), 255) for n, colour in enumerate(colours)}
    frame = framed(tiff(tmp_path / "a.tif", numbers, photometric="PALETTE", colormap=table))
    assert np.array_equal(pixels(frame), colours[numbers])
    counts = np.bincount(numbers.ravel(), minlength=len(colours))
    rare = int(np.where(counts, counts, SIDE**2).argmin())
    transparent = np.full(len(colours), 255, np.uint8)
    transparent[rare] = 0
    frame = framed(tmp_path / "b.png", saved(image, "PNG", transparency=bytes(transparent)))
    assert np.array_equal(pixels(frame), np.where((numbers == rare)[..., None], 0, colours[numbers]))
    assert opened.NO_DATA in frame.changes


def test_colours_for_printing_are_refused(tmp_path: Path) -> None:
    image = Image.fromarray(RGB)
    assert "colours for printing (CMYK)" in refused(tmp_path / "a.jpg", saved(image.convert("CMYK"), "JPEG"))
    assert "has CMYK colours" in refused(tmp_path / "a.tif", saved(image.convert("CMYK"), "TIFF"))
    assert "has CIELAB colours" in refused(tmp_path / "b.tif", saved(image.convert("LAB"), "TIFF"))


def test_ycbcr_tiffs_become_rgb(tmp_path: Path) -> None:
    frame = framed(tiff(tmp_path / "a.tif", RGB, photometric="YCBCR", compress="JPEG", jpeg_quality=95))
    assert np.array_equal(pixels(frame), judged(tmp_path / "a.tif"))
    assert np.abs(pixels(frame).astype(int) - RGB).mean() < 6  # what JPEG loses


def profile(gamma: float, columns: tuple[tuple[float, float, float], ...], space: bytes = b"RGB ") -> bytes:
    """A minimal ICC profile (version 2): three primaries as XYZ columns, or a grey curve, with one exponent."""

    def fixed(value: float) -> bytes:
        return struct.pack(">i", round(value * 65536))

    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    white = b"XYZ " + bytes(4) + b"".join(map(fixed, (0.9642, 1.0, 0.8249)))
    text = b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(8 + 3 + 67)
    tags = [(b"desc", text), (b"cprt", b"text" + bytes(4) + b"none\0" + bytes(3)), (b"wtpt", white)]
    if space == b"GRAY":
        tags.append((b"kTRC", curve))
    else:
        packed = [b"XYZ " + bytes(4) + b"".join(map(fixed, column)) for column in columns]
        tags += list(zip(XYZ_TAGS, packed, strict=True))
        tags += [(name, curve) for name in (b"rTRC", b"gTRC", b"bTRC")]
    start = 128 + 4 + 12 * len(tags)
    index, data = b"", b""
    for name, content in tags:
        content += bytes(-len(content) % 4)
        index += name + struct.pack(">II", start + len(data), len(content))
        data += content
    head = struct.pack(">I4sI4s4s4s", start + len(data), b"none", 0x02100000, b"mntr", space, b"XYZ ")
    head += bytes(12) + b"acsp" + bytes(28) + b"".join(map(fixed, (0.9642, 1.0, 0.8249)))
    return head + bytes(128 - len(head)) + struct.pack(">I", len(tags)) + index + data


XYZ_TAGS = (b"rXYZ", b"gXYZ", b"bXYZ")
# Adapted to D50 (Bradford), as ICC profiles store them: Lindbloom, RGB/XYZ matrices.
ADOBE_RGB = ((0.6097559, 0.3111242, 0.0194811), (0.2052401, 0.6256560, 0.0608902), (0.1492240, 0.0632197, 0.7448387))
SRGB = ((0.4360747, 0.2225045, 0.0139322), (0.3850649, 0.7168786, 0.0971045), (0.1430804, 0.0606169, 0.7141733))


def srgb_of(linear: NDArray[np.float64]) -> NDArray[np.float64]:
    """IEC 61966-2-1, in 0..255."""
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_colour_profiles_are_applied(tmp_path: Path, kind: str) -> None:
    """The right pixels by matrices and exponents, not by a colour library."""
    path = tmp_path / f"a.{kind.lower()}"
    adobe = profile(563 / 256, ADOBE_RGB)
    frame = framed(path, saved(Image.fromarray(RGB), kind, icc_profile=adobe))
    stored = judged(path)[..., :3]
    xyz = (stored / 255) ** (563 / 256) @ np.array(ADOBE_RGB)
    right = srgb_of(xyz @ np.linalg.inv(np.array(SRGB)))
    assert np.abs(pixels(frame) - right).max() < 1.6 if kind != "JPEG" else True
    assert np.abs(pixels(frame) - right).mean() < 1
    assert np.abs(pixels(frame).astype(int) - stored).max() > 20
    assert frame.changes == (opened.PROFILE,)
    exact = profile(2.2, SRGB)  # differs from sRGB's curve by up to 4 levels
    assert framed(path, saved(Image.fromarray(RGB), kind, icc_profile=exact)).changes == (opened.PROFILE,)
    from PIL import ImageCms

    same = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    frame = framed(path, saved(Image.fromarray(RGB), kind, icc_profile=same))
    assert frame.changes == ()
    assert kind == "JPEG" or np.array_equal(pixels(frame), RGB)
    for damaged in (b"nothing", adobe[:200], profile(2.2, SRGB, b"GRAY")):
        message = refused(path, saved(Image.fromarray(RGB), kind, icc_profile=damaged))
        assert "has a colour profile that is damaged or not for RGB pictures" in message


def test_grey_and_transparent_pictures_have_profiles_too(tmp_path: Path) -> None:
    linear = profile(1.0, (), b"GRAY")
    frame = framed(tmp_path / "a.png", saved(Image.fromarray(GREY), "PNG", icc_profile=linear))
    assert np.abs(pixels(frame) - grey(srgb_of(GREY / 255))).max() < 1.6
    assert frame.changes == (opened.GREY, opened.PROFILE)
    alpha = Image.merge("RGBA", [*Image.fromarray(RGB).split(), Image.new("L", (SIDE, SIDE), 9)])
    frame = framed(tmp_path / "b.png", saved(alpha, "PNG", icc_profile=profile(563 / 256, ADOBE_RGB)))
    plain = framed(tmp_path / "c.png", saved(Image.fromarray(RGB), "PNG", icc_profile=profile(563 / 256, ADOBE_RGB)))
    assert np.array_equal(pixels(frame), pixels(plain))
    deep = tiff(tmp_path / "d.tif", DEEP, photometric="RGB")
    import base64

    encoded = base64.b64encode(profile(563 / 256, ADOBE_RGB)).decode()
    with rasterio.open(deep, "r+") as file:
        file.update_tags(ns="COLOR_PROFILE", SOURCE_ICC_PROFILE=encoded)
    assert "colour profile other than sRGB, but this run stretches" in refused(deep, stretch=STRETCH)


@pytest.mark.parametrize(
    ("chunks", "said"),
    [
        ([(b"gAMA", struct.pack(">I", 45455))], ""),
        ([(b"gAMA", struct.pack(">I", 100_000))], "a gamma of 1 (gAMA)"),
        ([(b"gAMA", struct.pack(">I", 55_556))], "a gamma of 0.55556 (gAMA)"),
        ([(b"gAMA", struct.pack(">I", 100_000)), (b"sRGB", b"\0")], ""),
        ([(b"gAMA", struct.pack(">I", 100_000)), (b"cICP", bytes((1, 13, 0, 1)))], ""),
        ([(b"cICP", bytes((9, 16, 0, 1)))], "another coding than sRGB (cICP 9/16/0/1)"),
        ([(b"cICP", bytes((1, 13, 0, 0)))], "another coding than sRGB (cICP 1/13/0/0)"),
        ([(b"cHRM", struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000))], ""),
        ([(b"cHRM", struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000))], "other primaries"),
    ],
)
def test_a_png_says_gamma_and_colour_space(tmp_path: Path, chunks: list[tuple[bytes, bytes]], said: str) -> None:
    data = png(RGB, *[chunk(*one) for one in chunks])
    if said:
        assert said in refused(tmp_path / "a.png", data)
        return
    frame = framed(tmp_path / "a.png", data)
    assert (frame.changes, np.array_equal(pixels(frame), judged(tmp_path / "a.png"))) == ((), True)


def test_adobe_rgb_without_a_profile_is_refused(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA005] = {1: "R03"}
    exif._ifds[0xA005] = {1: "R03"}
    data = saved(Image.fromarray(RGB), "JPEG", exif=exif)
    if b"R03" not in data:
        pytest.fail("the EXIF data were not written")
    assert "Adobe RGB colours by its EXIF data (R03)" in refused(tmp_path / "a.jpg", data)


# The ground


def geodesic(lon: float, lat: float, other_lon: float, other_lat: float) -> float:
    """Metres on WGS84 by Bessel's differential formula (radii of curvature), another way than through the globe."""
    a, e2 = 6_378_137.0, 0.00669437999014
    sine = np.sin(np.radians((lat + other_lat) / 2))
    east = a / np.sqrt(1 - e2 * sine**2) * np.cos(np.radians((lat + other_lat) / 2)) * np.radians(other_lon - lon)
    north = a * (1 - e2) / (1 - e2 * sine**2) ** 1.5 * np.radians(other_lat - lat)
    return float(np.hypot(east, north))


@pytest.mark.parametrize(
    ("crs", "lon", "lat", "unit", "metres"),
    [
        ("EPSG:3857", 25.0, 60.0, 20.0, 10.0),  # Mercator: twice as large at 60 degrees
        ("EPSG:3857", 0.0, 0.0, 10.0, 10.0),
        ("EPSG:2263", -73.9, 40.7, 32.8083, 10.0),  # US survey feet
        ("EPSG:32631", 3.0, 45.15, 20.0, 20.0),
        ("EPSG:32633", 15.0, 0.5, 0.5, 0.5),
        ("EPSG:3413", -45.0, 70.0, 10.0, 10.0),  # polar stereographic, true at 70 degrees
        ("EPSG:3031", 0.0, -90.0, 10.0, 10.275),  # on the pole, true at 71 degrees south
        ("EPSG:3832", 180.0, 0.0, 10.0, 10.0),  # over the antimeridian
    ],
)
def test_ground_sample_distance_is_measured_on_the_ellipsoid(
    tmp_path: Path, crs: str, lon: float, lat: float, unit: float, metres: float
) -> None:
    (x,), (y,) = transform_points("EPSG:4326", crs, [lon], [lat])
    grid = from_origin(x - 256 * unit, y + 256 * unit, unit, unit)
    path = tiff(tmp_path / "a.tif", RGB, crs=crs, transform=grid)
    located = geotiff.locate(path)
    assert located.centre.lat == pytest.approx(lat, abs=1e-6)
    assert abs((located.centre.lon - lon + 180) % 360 - 180) < 1e-6 or abs(lat) == 90
    assert located.metres_per_pixel == pytest.approx(metres, rel=0.004)
    assert framed(path).metres_per_pixel == located.metres_per_pixel


@pytest.mark.parametrize("lat", [0.0, 10.0, 60.0, -84.0])
def test_a_grid_of_degrees_has_two_distances(tmp_path: Path, lat: float) -> None:
    step = 0.0001
    grid = from_origin(100 - 256 * step, lat + 256 * step, step, step)
    located = geotiff.locate(tiff(tmp_path / "a.tif", RGB, crs="EPSG:4326", transform=grid))
    east, north = geodesic(100, lat, 100 + step, lat), geodesic(100, lat - step / 2, 100, lat + step / 2)
    assert located.metres_along_rows == pytest.approx(east, rel=1e-6)
    assert located.metres_along_columns == pytest.approx(north, rel=1e-6)
    assert located.metres_per_pixel == max(located.metres_along_rows, located.metres_along_columns)
    squeezed = "pixels that are not square on the ground kept" in framed(tmp_path / "a.tif").changes
    assert squeezed == (abs(lat) > 20)


def test_the_distance_of_a_frame_is_that_of_its_512_pixels(tmp_path: Path) -> None:
    large = np.repeat(np.repeat(RGB, 2, axis=0), 3, axis=1)  # 1536 x 1024
    grid = from_origin(500000, 5_000_000, 10, 10)
    frame = framed(tiff(tmp_path / "a.tif", large, crs="EPSG:32631", transform=grid))
    assert frame.native_size == (1536, 1024)
    assert frame.metres_per_pixel == pytest.approx(20, rel=0.002)
    square = large[:, 256:1280].reshape(512, 2, 512, 2, 3).mean((1, 3))
    assert np.abs(pixels(frame) - square).max() <= 1


def test_south_up_grids_are_turned_and_files_without_a_position_are_read(tmp_path: Path) -> None:
    south_up = rasterio.Affine(10, 0, 500000, 0, 10, 5_000_000)
    frame = framed(tiff(tmp_path / "a.tif", RGB, crs="EPSG:32631", transform=south_up))
    assert np.array_equal(pixels(frame), RGB[::-1])
    assert frame.changes == (geotiff.MIRRORED,)
    frame = framed(tiff(tmp_path / "b.tif", RGB))
    assert (frame.metres_per_pixel, frame.changes) == (None, ())
    assert geotiff.locate(tmp_path / "b.tif") is None


def test_absent_blocks_of_a_tiff_are_no_data(tmp_path: Path) -> None:
    """GDAL fills them with zeros, without a word; so do files of a program that was stopped."""
    path = tmp_path / "a.tif"
    profile = {"driver": "GTiff", "width": 600, "height": SIDE, "count": 3, "dtype": "uint8", "photometric": "RGB"}
    options = {"tiled": True, "blockxsize": 64, "blockysize": 64, "sparse_ok": True}
    values = np.moveaxis(np.pad(np.maximum(RGB, 1), ((0, 0), (44, 44), (0, 0)), mode="edge"), 2, 0)
    for absent, wanted in (((128, 192), True), ((0, 40), True), ((128, 448), False)):
        with rasterio.open(path, "w", **profile, **options) as file:
            for _, window in file.block_windows(1):
                if window.row_off != 64 or not absent[0] <= window.col_off < absent[1]:
                    rows = slice(window.row_off, window.row_off + window.height)
                    columns = slice(window.col_off, window.col_off + window.width)
                    file.write(values[:, rows, columns], window=window)
        if not wanted:
            assert "has no data in 7.8% of the frame" in refused(path)
            continue
        frame = framed(path)
        assert np.array_equal(pixels(frame), judged(path)[:, 44:556])
        assert (opened.NO_DATA in frame.changes) == bool((pixels(frame) == 0).any())


def test_a_grid_that_is_not_on_earth_is_no_position(tmp_path: Path) -> None:
    local = rasterio.crs.CRS.from_wkt('LOCAL_CS["site",UNIT["metre",1]]')
    path = tiff(tmp_path / "a.tif", RGB, crs=local, transform=from_origin(5, 5, 10, 10))
    assert framed(path).metres_per_pixel is None
    assert geotiff.locate(path) is None
    far = tiff(tmp_path / "b.tif", RGB, crs="EPSG:4326", transform=from_origin(0, 500, 1, 1))
    assert framed(far).metres_per_pixel is None


def test_a_damaged_tile_is_no_black_square(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiff(tmp_path / "a.tif", RGB, tiled=True, blockxsize=128, blockysize=128, compress="deflate")
    with rasterio.open(path) as file:
        start = int(file.get_tag_item("BLOCK_OFFSET_1_1", "TIFF", bidx=1))
    data = bytearray(path.read_bytes())
    data[start : start + 400] = bytes(400)
    path.write_bytes(data)
    monkeypatch.setenv("GTIFF_IGNORE_READ_ERRORS", "YES")
    assert "damaged" in refused(path)
    path.write_bytes(path.read_bytes()[: len(data) // 2])
    assert "damaged" in refused(path)


def test_the_table_in_the_docs_names_every_conversion() -> None:
    text = (Path(__file__).parents[2] / "docs" / "dataset.md").read_text(encoding="utf-8")
    for constant in (
        opened.ALPHA, opened.NO_DATA, opened.GREY, opened.PALETTE, opened.ORIENTATION, opened.FIRST_OF_SEVERAL,
        opened.PROFILE, geotiff.MIRRORED, geotiff.UNNAMED, geotiff.INVERTED,
    ):  # fmt: skip
        assert constant in text, constant
