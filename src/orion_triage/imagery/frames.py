"""Decode bytes to an RGB frame: the one decoder of training, evaluation and flight.

The camera delivers 512x512 RGB. For a smaller preset, only this module shrinks the frame, so that transformers and
llama.cpp get the same pixels: a PNG of exactly the preset's size. The two runtimes resize and tile other sizes
differently.

Metadata is ignored: EXIF rotation, colour profiles and transparency. An animation gives its still picture. 16-bit
colours lose their lower byte, CMYK is converted to RGB, and 16-bit greyscale is refused.
"""

import io
from dataclasses import dataclass
from pathlib import Path
from warnings import catch_warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from orion_triage.errors import FrameError, OrionError
from orion_triage.safe.reading import read_bytes

CAMERA_SIZE = 512
RAW_BYTES = CAMERA_SIZE * CAMERA_SIZE * 3
# The largest picture that --resize accepts: SimSat's native frame is 2560x2560.
LARGEST_PIXELS = 64_000_000
LARGEST_BYTES = 3 * LARGEST_PIXELS  # of a file: the largest picture, uncompressed
_SIXTEEN_BIT_GREYS = ("I", "I;16", "I;16B", "F")  # converting these to RGB clips every value above 255 to 255
_SIGNATURES = {b"\x89PNG\r\n\x1a\n": PngImageFile, b"\xff\xd8\xff": JpegImageFile}


@dataclass(frozen=True)
class Frame:
    """An RGB picture of the preset's size; `native_size` (width, height) and Pillow's `mode` are those of its file."""

    image: Image.Image
    native_size: tuple[int, int]
    mode: str = "RGB"

    def png(self) -> bytes:
        """The bytes sent to a llama.cpp server: lossless, so both runtimes see the same pixels."""
        buffer = io.BytesIO()
        self.image.save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()


def shrink(image: Image.Image, size: int) -> Image.Image:
    """Average pixel areas down to `size` x `size` pixels; unchanged if the image already has this size.

    A box filter models a sensor with a coarser ground sample distance, and is exact for 512 -> 256.
    """
    if image.size == (size, size):
        return image
    return image.resize((size, size), Image.Resampling.BOX)


def decode_frame(data: bytes, name: str, size: int, *, resize: bool = False) -> Frame:
    """Decode PNG, JPEG or raw 512x512x3 RGB. Content decides the format; raw has no header and needs the suffix .raw.

    `size` is the preset's input size in pixels. With `resize`, a picture that is not 512x512 is cropped to its
    central square and scaled; without it, such a picture is refused. Raises FrameError that names `name`.
    """
    if name.lower().endswith(".raw"):
        return Frame(shrink(_decode_raw(data, name), size), (CAMERA_SIZE, CAMERA_SIZE))
    reader = next((reader for start, reader in _SIGNATURES.items() if data.startswith(start)), None)
    if reader is None:
        raise FrameError(f"{name} is neither PNG nor JPEG.", "Convert it to PNG; name raw frames *.raw.")
    try:
        # Not Image.open: it prints a warning about large sizes before this function can refuse them.
        with catch_warnings(action="ignore"), reader(io.BytesIO(data)) as opened:
            native, mode = opened.size, opened.mode
            _check_form(name, native, mode, resize)
            opened.load()
            picture = opened.convert("RGB")
    except FrameError:
        raise
    except Exception as error:  # Pillow's readers raise struct.error, KeyError, MemoryError, ...
        raise FrameError(
            f"{name} is damaged: {str(error)[:80] or type(error).__name__}.", "Fetch the file again."
        ) from None
    if native != (CAMERA_SIZE, CAMERA_SIZE):
        edge = min(native)
        left, top = (native[0] - edge) // 2, (native[1] - edge) // 2
        picture = picture.crop((left, top, left + edge, top + edge))
        picture = picture.resize((CAMERA_SIZE, CAMERA_SIZE), Image.Resampling.BOX)
    return Frame(shrink(picture, size), native, mode)


def _check_form(name: str, native: tuple[int, int], mode: str, resize: bool) -> None:
    """Raise FrameError for a picture of an unsupported size or mode; reads only its header."""
    if native != (CAMERA_SIZE, CAMERA_SIZE):
        if not resize:
            raise FrameError(
                f"{name} is {native[0]}x{native[1]}, not {CAMERA_SIZE}x{CAMERA_SIZE}.",
                "Add --resize to crop and scale it.",
            )
        if native[0] * native[1] > LARGEST_PIXELS or min(native) < 16:
            raise FrameError(
                f"{name} is {native[0]}x{native[1]}; supported are 16 pixels or more per side and "
                f"{LARGEST_PIXELS / 1e6:g} megapixels or fewer.",
                "Crop it.",
            )
    if mode in _SIXTEEN_BIT_GREYS:
        raise FrameError(
            f"{name} is 16-bit greyscale (Pillow mode {mode}), not 8-bit RGB.",
            "Scale it to 8 bits per channel and save it as RGB.",
        )


def _decode_raw(data: bytes, name: str) -> Image.Image:
    if len(data) != RAW_BYTES:
        raise FrameError(
            f"{name} has {len(data):,} bytes, not the {RAW_BYTES:,} of a raw {CAMERA_SIZE}x{CAMERA_SIZE} RGB frame.",
            "Fetch it again: the transfer was probably cut.",
        )
    return Image.frombytes("RGB", (CAMERA_SIZE, CAMERA_SIZE), data)


def read_frame(path: Path, size: int, *, resize: bool = False) -> Frame:
    """Read and decode one file; raises FrameError that names it. See `decode_frame`."""
    try:
        data = read_bytes(path, LARGEST_BYTES)
    except FileNotFoundError:
        raise FrameError(f"{path} does not exist.", "Check the path.") from None
    except OrionError as error:
        raise FrameError(error.message, error.fix) from None
    return decode_frame(data, str(path), size, resize=resize)


def is_blank(image: Image.Image) -> bool:
    """Whether a 512x512 frame is blank: missing imagery, white-out, or flat open ocean.

    Computed on rows 16..479 in grey levels: blank if the entropy is below 4.0 bits AND mean |dx| + mean |dy| is
    below 1. Correct on all 55 real frames that were tested; each measure alone fails on some.
    """
    grey = np.asarray(image.convert("L"), dtype=np.float64)[16:480]
    counts = np.bincount(grey.astype(np.uint8).ravel(), minlength=256) / grey.size
    entropy = float(-(counts[counts > 0] * np.log2(counts[counts > 0])).sum())
    gradient = float(np.abs(np.diff(grey, axis=1)).mean() + np.abs(np.diff(grey, axis=0)).mean())
    return entropy < 4.0 and gradient < 1.0


def noise_frame(kind: str, size: int) -> Image.Image:
    """The image of condition C: deterministic noise, seed 42.

    `gaussian` is the mission document's. It is drawn at the input size, because shrinking would halve its contrast.
    `uniform` is the published reference's. It is drawn at 512 pixels and shrunk like a frame.
    """
    random = np.random.RandomState(42)  # the legacy generator gives the same bytes as the reference
    values: NDArray[np.uint8]
    if kind == "gaussian":
        normal = random.normal(127.5, 50, (size, size, 3))
        values = np.clip(normal, 0, 255).astype(np.uint8)
        return Image.fromarray(values, "RGB")
    values = random.randint(0, 256, (CAMERA_SIZE, CAMERA_SIZE, 3)).astype(np.uint8)
    return shrink(Image.fromarray(values, "RGB"), size)
