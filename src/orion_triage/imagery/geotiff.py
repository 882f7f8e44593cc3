"""TIFF, and PNG of 16 bits per channel, through rasterio (the extra `orion-triage[imagery]`).

Gives 8-bit RGB by the rules of `opened.py`, and a GeoTIFF's position and ground sample distance.
"""

import base64
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from warnings import catch_warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from orion_triage.errors import FrameError, OrionError
from orion_triage.imagery.colours import to_srgb
from orion_triage.imagery.ground import metres_between
from orion_triage.imagery.opened import (
    ALPHA,
    GREY,
    NO_DATA,
    ORIENTATION,
    PALETTE,
    PROFILE,
    Opened,
    central_square,
    check_samples,
    check_size,
    stretched,
    without_data,
)
from orion_triage.imagery.stretch import Stretch
from orion_triage.mission.prompt import Coordinates
from orion_triage.safe.reading import opened

GEOTIFF_SUFFIXES = (".tif", ".tiff")
TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two: BigTIFF
MIRRORED = "rows from south to north turned: north is up"
UNNAMED = "three bands without colours taken as red, green, blue"
INVERTED = "inverted: in this file 0 is white"
_RGB = ("red", "green", "blue")
_ORIENTATION, _EXTRA_SAMPLES = 274, 338  # TIFF tags
_PREMULTIPLIED = 1  # of _EXTRA_SAMPLES: "associated alpha"
_SQUARE_WITHIN = 1.05  # ratio of a pixel's sides on the ground; more is reported
# Of these, one from a user's environment would change pixels: damaged tiles as black, JPEG's YCbCr as RGB.
_GDAL_OPTIONS = {"GDAL_NUM_THREADS": 1, "GTIFF_IGNORE_READ_ERRORS": "NO", "CONVERT_YCBCR_TO_RGB": "YES"}


def _refuse_what_is_no_file(path: Path) -> None:
    """Raise FrameError for a pipe, which would never end, and for a Git LFS pointer."""
    try:
        with suppress(FileNotFoundError), opened(path):  # rasterio's own message for a missing file
            pass
    except OrionError as error:
        raise FrameError(error.message, error.fix) from None


@dataclass(frozen=True)
class Located:
    """The centre of a GeoTIFF, and the size of a pixel there along rows and columns, in metres on the ellipsoid.

    `edge` is the number of pixels along the central square.
    """

    centre: Coordinates
    edge: int
    metres_along_rows: float
    metres_along_columns: float

    @property
    def metres_per_pixel(self) -> float:
        """The coarser of the two: frames this wide and high that do not overlap show different ground."""
        return max(self.metres_along_rows, self.metres_along_columns)


@dataclass(frozen=True)
class _Bands:
    """Band numbers (from 1) of the colours, what they are, and the conversions that this choice means."""

    numbers: tuple[int, ...]
    palette: bool
    changes: tuple[str, ...]


def is_tiff(start: bytes) -> bool:
    return start.startswith(TIFF_SIGNATURES)


def locate(path: Path) -> Located | None:
    """The position of a GeoTIFF; None for a TIFF without one on Earth.

    Raises OrionError without rasterio, and FrameError for a damaged file.
    """
    _refuse_what_is_no_file(path)
    with _raster(str(path.absolute()), str(path), "GTiff") as raster:
        return _located(raster)


def read_tiff(path: Path, *, resize: bool, stretch: Stretch | None) -> Opened:
    """The central square of a TIFF; raises OrionError without rasterio, and FrameError that names the file.

    Only the GTiff driver reads it: a VRT file with this suffix could refer to other files and URLs.
    """
    name = str(path)
    _refuse_what_is_no_file(path)
    with _raster(str(path.absolute()), name, "GTiff") as raster:
        check_size(name, (raster.width, raster.height), resize)
        if raster.subdatasets:
            raise FrameError(
                f"{name} has {len(raster.subdatasets)} pages.",
                f"Save the page that you want: rio convert GTIFF_DIR:1:{path.name} page-1.tif",
            )
        located = _located(raster)
        tags = _tiff_tags(path)
        notes = (ORIENTATION,) if (tags.get(_ORIENTATION) or 1) != 1 else ()
        premultiplied = _PREMULTIPLIED in (tags.get(_EXTRA_SAMPLES) or ())
        return _opened(raster, name, stretch, located, notes, premultiplied)


def open_deep_png(data: bytes, name: str, stretch: Stretch | None, *, changes: tuple[str, ...]) -> Opened:
    """A PNG of 16 bits per channel, of which Pillow reads 8; `changes` are those that the caller has found."""
    with _raster(data, name, "PNG") as raster:
        return _opened(raster, name, stretch, None, changes, premultiplied=False)


@contextmanager
def _raster(source: str | bytes, name: str, driver: str) -> Iterator[Any]:
    """A raster opened by one driver. Errors of GDAL and PROJ become a FrameError that names the file."""
    try:
        import rasterio
        from rasterio.errors import CRSError, RasterioError
        from rasterio.io import MemoryFile
    except ImportError:
        kind = "TIFF" if driver == "GTiff" else "16-bit PNG"
        raise OrionError(
            f"{name} is a {kind}; reading it needs rasterio, which is not installed.",
            "Run pip install 'orion-triage[imagery]', or convert the file to 8-bit PNG.",
        ) from None
    try:
        with rasterio.Env(**_GDAL_OPTIONS), catch_warnings(action="ignore"):  # a raster without a position warns
            if isinstance(source, bytes):
                with MemoryFile(source) as file, file.open(driver=driver) as raster:
                    yield raster
            else:
                with rasterio.open(source, driver=driver) as raster:
                    yield raster
    except (RasterioError, CRSError, ValueError, MemoryError) as error:
        raise FrameError(f"{name} is damaged: {error or type(error).__name__}.", "Fetch the file again.") from None


def _located(raster: Any) -> Located | None:
    """The position, or None if the file has none on Earth: no georeference, a local grid, or one far off."""
    if raster.crs is None or raster.transform.is_identity:
        return None
    from rasterio.warp import transform

    row, column = raster.height / 2, raster.width / 2
    cells = [(0, 0), (0, -0.5), (0, 0.5), (-0.5, 0), (0.5, 0)]  # (down, right) of the centre, in pixels
    try:
        xs, ys = raster.xy([row + down for down, _ in cells], [column + right for _, right in cells], offset="ul")
        lons, lats = transform(raster.crs, "EPSG:4326", xs, ys)
        centre, left, right, above, below = zip(lons, lats, strict=True)
        place = Coordinates((centre[0] + 180) % 360 - 180, centre[1])
    except Exception:  # PROJ's errors, which rasterio does not translate; OrionError for degrees that are none
        return None
    if not all(map(math.isfinite, (*lons, *lats))):
        return None
    edge = min(raster.width, raster.height)
    return Located(place, edge, metres_between(left, right), metres_between(above, below))


def _opened(
    raster: Any,
    name: str,
    stretch: Stretch | None,
    located: Located | None,
    notes: tuple[str, ...],
    premultiplied: bool,
) -> Opened:
    from rasterio.windows import Window

    bands = _bands(raster, name)
    samples, bits = _samples(raster, bands.numbers[0])
    if bands.palette:
        samples = "uint8"  # the numbers are places in the palette, whose colours have 8 bits
    check_samples(name, samples, bits, stretch)
    left, top, edge = central_square((raster.width, raster.height))
    window = Window(left, top, edge, edge)
    values: NDArray[Any] = raster.read(list(bands.numbers), window=window)
    valid = _valid(raster, name, bands.numbers, values, window, premultiplied)
    changes = [*notes, *bands.changes]
    clipped = None
    if bands.palette:
        colours, opaque = _from_palette(raster, name, values[0])
        valid &= opaque
    elif samples == "uint8":
        colours = values if bits == 8 else _scaled(name, values, bits)
        if bits < 8:
            changes.append(f"{bits}-bit values scaled to 8 bits")
    else:
        assert stretch is not None  # check_samples refuses it otherwise
        colours, clipped = stretched(name, values, valid, stretch)
        changes.append(f"stretched {stretch}")
    if raster.tags(ns="IMAGE_STRUCTURE").get("MINISWHITE") == "YES" and not bands.palette:
        colours = 255 - colours
        changes.append(INVERTED)
    colours, converted = _in_srgb(raster, name, colours, stretch)
    changes += [PROFILE] if converted else []
    colours = colours * np.broadcast_to(valid, colours.shape)
    pixels = np.array(np.moveaxis(np.broadcast_to(colours, (3, edge, edge)), 0, 2))
    missing = np.asarray(~valid.any(axis=0))
    if without_data(name, pixels, missing):
        changes.append(NO_DATA)
    if located and raster.transform.determinant > 0:
        pixels = np.ascontiguousarray(pixels[::-1])
        changes.append(MIRRORED)
    if located and not 1 / _SQUARE_WITHIN < located.metres_along_rows / located.metres_along_columns < _SQUARE_WITHIN:
        changes.append("pixels that are not square on the ground kept")
    return Opened(
        pixels,
        (raster.width, raster.height),
        tuple(changes),
        clipped,
        located.centre if located else None,
        located.metres_per_pixel if located else None,
    )


def _bands(raster: Any, name: str) -> _Bands:
    """Which bands are red, green and blue, by the file's colour interpretation; raises FrameError if it is unclear."""
    colour_space = raster.tags(ns="IMAGE_STRUCTURE").get("SOURCE_COLOR_SPACE", "YCbCr")
    if colour_space != "YCbCr":  # GDAL converts CMYK and CIELAB to RGB by formulas without a profile
        raise FrameError(f"{name} has {colour_space} colours.", "Convert it to sRGB and save it again.")
    names = [colour.name for colour in raster.colorinterp]
    found = [names.index(colour) + 1 for colour in _RGB if names.count(colour) == 1]
    changes = [ALPHA] if "alpha" in names else []
    colours = [colour for colour in names if colour != "alpha"]
    if len(found) == 3:
        if extra := len(colours) - 3:
            changes.append(f"{extra} more band{'s' if extra > 1 else ''} left out")
        if found != sorted(found):
            changes.append("bands reordered to red, green, blue")
        return _Bands(tuple(found), False, tuple(changes))
    if len(colours) == 1 and colours[0] in ("palette", "gray", "undefined", "pan"):
        palette = colours[0] == "palette"
        number = names.index(colours[0]) + 1
        return _Bands((number,), palette, (*changes, PALETTE if palette else GREY))
    if len(colours) == 3 and set(colours) <= {"gray", "undefined"}:
        numbers = tuple(n for n, colour in enumerate(names, start=1) if colour != "alpha")
        return _Bands(numbers, False, (*changes, UNNAMED))
    example = ",".join(["blue", "green", "red", *["undefined"] * (len(names) - 3)][: len(names)])
    raise FrameError(
        f"{name} has {len(names)} bands ({', '.join(names)}), and does not say which one is red, green and blue.",
        f"Say it in the file, for example: rio edit-info --colorinterp {example} {name}",
    )


def _samples(raster: Any, band: int) -> tuple[str, int]:
    """The sample type as NumPy names it, and the bits in use."""
    samples = raster.dtypes[band - 1]
    used = raster.tags(band, ns="IMAGE_STRUCTURE").get("NBITS")
    return samples, int(used) if used else np.dtype(samples).itemsize * 8


def _valid(
    raster: Any, name: str, numbers: tuple[int, ...], values: NDArray[Any], window: Any, premultiplied: bool
) -> NDArray[np.bool_]:
    """Which values are data, of the shape of `values`: by nodata value, mask, alpha 0 and not-a-number."""
    valid: NDArray[np.bool_] = raster.read_masks(list(numbers), window=window) != 0
    if raster.driver == "GTiff":
        _without_absent_blocks(raster, numbers, valid, window)
    names = [colour.name for colour in raster.colorinterp]
    if "alpha" in names:
        number = names.index("alpha") + 1
        alpha = raster.read(number, window=window)
        valid &= alpha != 0
        partly = (alpha != 0) & (alpha != alpha.max())
        if premultiplied and partly.any():
            raise FrameError(
                f"{name} has colours that are multiplied by its alpha channel.", "Save it without an alpha channel."
            )
    if values.dtype.kind == "f":
        valid &= np.isfinite(values)
    return valid


def _without_absent_blocks(raster: Any, numbers: tuple[int, ...], valid: NDArray[np.bool_], window: Any) -> None:
    """Clear `valid` where the file has no block (a sparse TIFF, or one cut by its writer): GDAL reads zeros there."""
    left, top, edge = int(window.col_off), int(window.row_off), int(window.width)
    for index, number in enumerate(numbers):
        for (row, column), block in raster.block_windows(number):
            if raster.get_tag_item(f"BLOCK_OFFSET_{column}_{row}", "TIFF", bidx=number) is None:
                rows = slice(max(block.row_off - top, 0), max(min(block.row_off + block.height - top, edge), 0))
                columns = slice(max(block.col_off - left, 0), max(min(block.col_off + block.width - left, edge), 0))
                valid[index, rows, columns] = False


def _from_palette(raster: Any, name: str, values: NDArray[Any]) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """The colours (3, height, width) of palette numbers, and which of them are opaque."""
    entries = raster.colormap(1)
    table = np.zeros((max(entries) + 1, 4), dtype=np.uint8)
    for number, colour in entries.items():
        table[number] = colour
    if int(values.max()) >= len(table):
        raise FrameError(f"{name} has values beyond its palette.", "Save it as RGB.")
    found = table[values]
    return np.moveaxis(found[..., :3], 2, 0), found[..., 3] != 0


def _scaled(name: str, values: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Values of fewer than 8 bits, spread over 0..255 as the PNG specification does."""
    most = 2**bits - 1
    if int(values.max()) > most:
        raise FrameError(f"{name} has values beyond its {bits} bits.", "Save it as 8-bit RGB.")
    return ((values.astype(np.uint16) * 255 * 2 + most) // (2 * most)).astype(np.uint8)


def _in_srgb(
    raster: Any, name: str, colours: NDArray[np.uint8], stretch: Stretch | None
) -> tuple[NDArray[np.uint8], bool]:
    """The colours (1 or 3, height, width) by the file's colour profile, and whether that changed them."""
    encoded = raster.tags(ns="COLOR_PROFILE").get("SOURCE_ICC_PROFILE")
    if not encoded:
        return colours, False
    grey = len(colours) == 1
    image = Image.fromarray(colours[0] if grey else np.ascontiguousarray(np.moveaxis(colours, 0, 2)))
    converted = to_srgb(name, image, base64.b64decode(encoded))
    if converted is None:
        return colours, False
    if stretch:
        raise FrameError(
            f"{name} has a colour profile other than sRGB, but this run stretches measured values ({stretch}).",
            "Save it without the profile if its values are measurements, or as 8-bit sRGB.",
        )
    return np.moveaxis(np.asarray(converted), 2, 0), True


def _tiff_tags(path: Path) -> dict[int, Any]:
    """The TIFF tags of the first page, for those that GDAL does not report; empty if Pillow cannot read the form."""
    try:
        with TiffImageFile(path) as picture:
            return {tag: picture.tag_v2.get(tag) for tag in (_ORIENTATION, _EXTRA_SAMPLES)}
    except Exception:  # Pillow raises SyntaxError, struct.error, KeyError, ...; the pixels are GDAL's
        return {}
