"""Bytes to an RGB frame: the one decode function of training, evaluation and flight.

A frame leaves the camera as 512x512 RGB. A smaller preset shrinks it here, and nowhere else, so that
Hugging Face and llama.cpp always see the same pixels as a PNG of exactly the preset's size (any other
size would be resized or tiled differently by the two runtimes).

What a file says beside its pixels changes nothing: no rotation by EXIF, no colour profile, no transparency; of an
animation the still picture counts. 16-bit colours lose their lower byte, CMYK becomes RGB; 16-bit greys are refused.
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
LARGEST_BYTES = 3 * LARGEST_PIXELS  # of a file: such a picture that nothing could compress
_SIXTEEN_BIT_GREYS = ("I", "I;16", "I;16B", "F")  # every value over 255 becomes 255 when such a picture is made RGB
_SIGNATURES = {b"\x89PNG\r\n\x1a\n": PngImageFile, b"\xff\xd8\xff": JpegImageFile}


@dataclass(frozen=True)
class Frame:
    """An RGB picture of the preset's size, and the size (width, height) and Pillow's mode that it had in its file."""

    image: Image.Image
    native_size: tuple[int, int]
    mode: str = "RGB"

    def png(self) -> bytes:
        """The bytes sent to a llama.cpp server: lossless, so both runtimes see the same pixels."""
        buffer = io.BytesIO()
        self.image.save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()


def shrink(image: Image.Image, size: int) -> Image.Image:
    """Average pixel areas down to size x size; the identity at the same size.

    A box filter is the sensor's own behaviour at a coarser ground sample distance, and exact for 512 -> 256.
    """
    if image.size == (size, size):
        return image
    return image.resize((size, size), Image.Resampling.BOX)


def decode_frame(data: bytes, name: str, size: int, *, resize: bool = False) -> Frame:
    """The frame in `data`: PNG, JPEG or raw 512x512x3 RGB (chosen by content; raw has no header).

    `size` is the preset's input size in pixels. With `resize`, a picture of another size than 512x512 is
    cut to its central square and scaled; without, it is refused. Raises FrameError naming `name`.
    """
    if name.lower().endswith(".raw"):
        return Frame(shrink(_decode_raw(data, name), size), (CAMERA_SIZE, CAMERA_SIZE))
    reader = next((reader for start, reader in _SIGNATURES.items() if data.startswith(start)), None)
    if reader is None:
        raise FrameError(f"{name} is neither PNG nor JPEG.", "Raw frames need the suffix .raw.")
    try:
        # Not Image.open: it warns of sizes, on the terminal, before this function has refused them.
        with catch_warnings(action="ignore"), reader(io.BytesIO(data)) as opened:
            native, mode = opened.size, opened.mode
            _check_form(name, native, mode, resize)
            opened.load()
            picture = opened.convert("RGB")
    except FrameError:
        raise
    except Exception as error:  # whatever Pillow's readers stumble over: struct.error, KeyError, MemoryError, ...
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
    """Raise FrameError for a picture that is not worth decoding: known from its header alone."""
    if native != (CAMERA_SIZE, CAMERA_SIZE):
        if not resize:
            raise FrameError(
                f"{name} is {native[0]}x{native[1]}, not {CAMERA_SIZE}x{CAMERA_SIZE}.",
                "Frames of another size need --resize.",
            )
        if native[0] * native[1] > LARGEST_PIXELS or min(native) < 16:
            raise FrameError(f"{name} is {native[0]}x{native[1]}.", "Cut it to a sensible size.")
    if mode in _SIXTEEN_BIT_GREYS:
        raise FrameError(
            f"{name} has 16-bit greys, which turn white as RGB.", "Scale it to 8 bits a channel and save it as RGB."
        )


def _decode_raw(data: bytes, name: str) -> Image.Image:
    if len(data) != RAW_BYTES:
        raise FrameError(
            f"{name} has {len(data):,} bytes, not the {RAW_BYTES:,} of a raw {CAMERA_SIZE}x{CAMERA_SIZE} RGB frame.",
            "The transfer was probably cut: fetch it again.",
        )
    return Image.frombytes("RGB", (CAMERA_SIZE, CAMERA_SIZE), data)


def read_frame(path: Path, size: int, *, resize: bool = False) -> Frame:
    """Read and decode one file; raises FrameError naming it."""
    try:
        data = read_bytes(path, LARGEST_BYTES)
    except FileNotFoundError:
        raise FrameError(f"{path} does not exist.", "Check the path.") from None
    except OrionError as error:
        raise FrameError(error.message, error.fix) from None
    return decode_frame(data, str(path), size, resize=resize)


def is_blank(image: Image.Image) -> bool:
    """Whether a 512x512 frame shows nothing: missing imagery, white-out, or flat open ocean.

    Rows 16..479 in grey levels; blank if the entropy is under 4.0 bits AND mean |dx| + mean |dy| is under 1.
    Right on all 55 real frames it was tried on; either measure alone fails.
    """
    grey = np.asarray(image.convert("L"), dtype=np.float64)[16:480]
    counts = np.bincount(grey.astype(np.uint8).ravel(), minlength=256) / grey.size
    entropy = float(-(counts[counts > 0] * np.log2(counts[counts > 0])).sum())
    gradient = float(np.abs(np.diff(grey, axis=1)).mean() + np.abs(np.diff(grey, axis=0)).mean())
    return entropy < 4.0 and gradient < 1.0


def noise_frame(kind: str, size: int) -> Image.Image:
    """Condition C's picture: one deterministic noise image, seed 42.

    `gaussian` is the one the mission document names, drawn at the input size because shrinking would halve
    its contrast; `uniform` is the one the published reference used, drawn at 512 and shrunk like a frame.
    """
    random = np.random.RandomState(42)  # the legacy generator, so that the bytes match the reference's
    values: NDArray[np.uint8]
    if kind == "gaussian":
        normal = random.normal(127.5, 50, (size, size, 3))
        values = np.clip(normal, 0, 255).astype(np.uint8)
        return Image.fromarray(values, "RGB")
    values = random.randint(0, 256, (CAMERA_SIZE, CAMERA_SIZE, 3)).astype(np.uint8)
    return shrink(Image.fromarray(values, "RGB"), size)
