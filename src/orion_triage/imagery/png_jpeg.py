"""PNG and JPEG from outside: what their headers say of the pixels, and 8-bit RGB by the rules of `opened.py`."""

import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from warnings import catch_warnings

import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from orion_triage.errors import FrameError, OrionError
from orion_triage.imagery.colours import check_png_colours, to_srgb
from orion_triage.imagery.opened import (
    ALPHA,
    FIRST_OF_SEVERAL,
    GREY,
    NO_DATA,
    ORIENTATION,
    PALETTE,
    PROFILE,
    Opened,
    central_square,
    check_samples,
    check_size,
    without_data,
)
from orion_triage.imagery.stretch import Stretch

PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
_READERS = {PNG: PngImageFile, JPEG: JpegImageFile}
_ORIENTATION, _INTEROPERABILITY = 0x0112, 0xA005  # EXIF tags
_NO_FRAME_HEADERS = (0xC4, 0xC8, 0xCC)  # markers between SOF0 and SOF15 that are not a SOF


@dataclass(frozen=True)
class _Header:
    """Bits per channel, and a PNG's chunks before the pixels."""

    bits: int = 8
    chunks: dict[bytes, bytes] = field(default_factory=dict)


def is_png_or_jpeg(data: bytes) -> bool:
    return data.startswith((PNG, JPEG))


def open_png_or_jpeg(data: bytes, name: str, *, resize: bool, stretch: Stretch | None) -> Opened:
    """Decode the bytes of a PNG or JPEG; raises FrameError that names `name`."""
    if damage := png_damage(data) if data.startswith(PNG) else "":
        raise _damaged(name, damage)
    start, reader = next(one for one in _READERS.items() if data.startswith(one[0]))
    header = _png_header(data) if start == PNG else _jpeg_header(data)
    if header.bits not in (1, 2, 4, 8, 16) or (start == JPEG and header.bits != 8):
        raise FrameError(f"{name} has {header.bits} bits per channel.", "Save it as an 8-bit or 16-bit PNG or TIFF.")
    try:
        # Not Image.open: it prints a warning about large sizes before this function can refuse them.
        with catch_warnings(action="ignore"), reader(io.BytesIO(data)) as picture:
            check_size(name, picture.size, resize)
            _check_form(name, header, picture, stretch)
            picture.load()
            if header.bits == 16:  # Pillow keeps 8 of 16 bits; having loaded it, it has checked that nothing is missing
                from orion_triage.imagery.geotiff import open_deep_png

                return open_deep_png(data, name, stretch, changes=tuple(_notes(picture)))
            return _opened(name, picture, header)
    except OrionError:
        raise
    except Exception as error:  # Pillow's readers raise struct.error, KeyError, MemoryError, ...
        raise _damaged(name, str(error) or type(error).__name__) from None


def png_damage(data: bytes) -> str:
    """What is wrong with the chunks of a PNG, in words; empty if all are there and have the right checksums.

    Pillow checks no checksum of pixels, and reads a file that has lost its last chunk. Bytes after that are no fault.
    """
    view, start = memoryview(data), len(PNG)
    while start + 12 <= len(data):
        length, name = int.from_bytes(view[start : start + 4], "big"), data[start + 4 : start + 8]
        end = start + 8 + length
        if end + 4 > len(data):
            break
        if zlib.crc32(view[start + 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            return f"the checksum of its chunk at byte {start:,} is wrong"
        if name == b"IEND":
            return ""
        start = end + 4
    return f"it is cut: after {len(data):,} bytes, its last chunk (IEND) is missing"


def _damaged(name: str, how: str) -> FrameError:
    return FrameError(f"{name} is damaged: {how[:80]}.", "Fetch the file again.")


def _check_form(name: str, header: _Header, picture: Image.Image, stretch: Stretch | None) -> None:
    """Raise FrameError for bits, colours and sample types that are refused; reads only the header."""
    check_samples(name, "uint16" if header.bits == 16 else "uint8", header.bits, stretch)
    if picture.mode == "CMYK":
        raise FrameError(f"{name} has colours for printing (CMYK).", "Convert it to sRGB and save it again.")
    check_png_colours(name, header.chunks)
    if _exif(picture).get_ifd(_INTEROPERABILITY).get(1) == "R03" and "icc_profile" not in picture.info:
        raise FrameError(
            f"{name} has Adobe RGB colours by its EXIF data (R03), but no colour profile.",
            "Convert it to sRGB and save it again.",
        )


def _opened(name: str, picture: Image.Image, header: _Header) -> Opened:
    native = picture.size
    left, top, edge = central_square(native)
    square = picture.crop((left, top, left + edge, top + edge))
    changes = list(_notes(picture))
    missing = None
    if square.mode in ("LA", "RGBA") or "transparency" in picture.info:
        full = square.convert("RGBA")
        missing = np.asarray(full.getchannel("A")) == 0
        changes.append(ALPHA)
    if square.mode == "P":
        changes.append(PALETTE)
    if header.bits < 8 and square.mode != "P":
        changes.append(f"{header.bits}-bit grey scaled to 8 bits")
    colours = square.convert("L" if square.mode in ("1", "L", "LA") else "RGB")
    if colours.mode == "L":
        changes.append(GREY)
    if profile := picture.info.get("icc_profile"):
        converted = to_srgb(name, colours, profile)
        if converted is not None:
            colours = converted
            changes.append(PROFILE)
    pixels = np.array(colours.convert("RGB"))
    if missing is not None and without_data(name, pixels, missing):
        changes.append(NO_DATA)
    return Opened(pixels, native, tuple(changes))


def _notes(picture: Image.Image) -> Iterator[str]:
    """The statements of a file that are not applied."""
    if getattr(picture, "n_frames", 1) > 1 or "mpoffset" in picture.info:  # the second: JPEGs of several pictures
        yield FIRST_OF_SEVERAL
    if _exif(picture).get(_ORIENTATION, 1) not in (0, 1):
        yield ORIENTATION


def _exif(picture: Image.Image) -> Any:
    """The EXIF data; empty if they are damaged, as many programs write them."""
    try:
        exif = picture.getexif()
        exif.get_ifd(_INTEROPERABILITY)
    except Exception:  # Pillow raises SyntaxError, struct.error, KeyError, ...
        return Image.Exif()
    return exif


def _png_header(data: bytes) -> _Header:
    """The form of a PNG."""
    chunks: dict[bytes, bytes] = {}
    start = len(PNG)
    while start + 8 <= len(data):
        length, name = int.from_bytes(data[start : start + 4], "big"), data[start + 4 : start + 8]
        if name == b"IDAT":
            break
        chunks.setdefault(name, data[start + 8 : start + 8 + length])
        start += 12 + length
    form = chunks.get(b"IHDR", b"")
    if len(form) != 13:
        return _Header(chunks=chunks)
    return _Header(form[8], chunks)


def _jpeg_header(data: bytes) -> _Header:
    """Bits per channel, from the first frame header (SOF) of a JPEG."""
    start = 2
    while start + 5 <= len(data):
        if data[start] != 0xFF:
            break
        marker = data[start + 1]
        if marker == 0xFF:  # fill byte
            start += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in _NO_FRAME_HEADERS:
            return _Header(data[start + 4])
        if marker == 0xDA:
            break
        start += 2 + (0 if 0xD0 <= marker <= 0xD8 else int.from_bytes(data[start + 2 : start + 4], "big"))
    return _Header()
