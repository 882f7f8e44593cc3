"""Decode a picture to an RGB frame: the one decoder of training, evaluation and flight.

The camera delivers 512x512 RGB. For a smaller preset, only this module shrinks the frame, so that transformers and
llama.cpp get the same pixels: a PNG of exactly the preset's size. The two runtimes resize and tile other sizes
differently.

Pictures from outside become 8-bit RGB in `png_jpeg.py` and `geotiff.py`, by the rules in `opened.py`.
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from orion_triage.errors import FrameError, OrionError
from orion_triage.imagery.geotiff import GEOTIFF_SUFFIXES, is_tiff, read_tiff
from orion_triage.imagery.opened import CAMERA_SIZE as CAMERA_SIZE
from orion_triage.imagery.opened import LARGEST_BYTES as LARGEST_BYTES
from orion_triage.imagery.opened import Opened, check_samples
from orion_triage.imagery.png_jpeg import is_png_or_jpeg, open_png_or_jpeg
from orion_triage.imagery.stretch import Stretch
from orion_triage.safe.reading import opened, read_bytes

RAW_BYTES = CAMERA_SIZE * CAMERA_SIZE * 3
BLANK_ROWS = (16, 479)  # the first and the last row that the blank rule reads
BLANK_ENTROPY_BITS, BLANK_GRADIENT = 4.0, 1.0  # a frame is blank below both
RAW_SUFFIX = ".raw"  # of the camera's bytes without a header
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", *GEOTIFF_SUFFIXES)  # of pictures with a header
FRAME_SUFFIXES = (*PICTURE_SUFFIXES, RAW_SUFFIX)  # of all that read_frame reads


@dataclass(frozen=True)
class Frame:
    """An RGB picture of the preset's size, and what became of its file.

    `native_size` is the file's (width, height). `changes`, `clipped_share` and `metres_per_pixel` are as in `Opened`,
    the last one of a frame of 512x512 pixels.
    """

    image: Image.Image
    native_size: tuple[int, int]
    changes: tuple[str, ...] = ()
    clipped_share: float | None = None
    metres_per_pixel: float | None = None

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


def decode_frame(data: bytes, name: str, size: int, *, resize: bool = False, stretch: Stretch | None = None) -> Frame:
    """Decode PNG, JPEG or raw 512x512x3 RGB. Content decides the format; raw has no header and needs the suffix .raw.

    `size` is the preset's input size in pixels. With `resize`, a picture that is not 512x512 is cropped to its
    central square and scaled; without it, such a picture is refused. With `stretch`, exactly the pictures that it is
    for are accepted; without it, those with 8 bits or fewer. Raises FrameError that names `name`.
    """
    if name.lower().endswith(RAW_SUFFIX):
        check_samples(name, "uint8", 8, stretch)
        return Frame(shrink(_decode_raw(data, name), size), (CAMERA_SIZE, CAMERA_SIZE))
    if not is_png_or_jpeg(data):
        raise FrameError(f"{name} is not PNG, JPEG or TIFF.", "Convert it to PNG; name raw frames *.raw.")
    return _framed(open_png_or_jpeg(data, name, resize=resize, stretch=stretch), size)


def read_frame(path: Path, size: int, *, resize: bool = False, stretch: Stretch | None = None) -> Frame:
    """Read and decode one file, which may also be a TIFF; raises FrameError that names it. See `decode_frame`."""
    try:
        with opened(path) as file:
            start = file.read(4)
        if is_tiff(start) and not path.name.lower().endswith(RAW_SUFFIX):
            return _framed(read_tiff(path, resize=resize, stretch=stretch), size)
        data = read_bytes(path, LARGEST_BYTES)
    except FileNotFoundError:
        raise FrameError(f"{path} does not exist.", "Check the path.") from None
    except FrameError:
        raise
    except OSError as error:
        raise FrameError(f"{path} cannot be read: {error.strerror}.", "Check the path.") from None
    except OrionError as error:
        raise FrameError(error.message, error.fix) from None
    return decode_frame(data, str(path), size, resize=resize, stretch=stretch)


def _framed(found: Opened, size: int) -> Frame:
    picture = Image.fromarray(found.pixels, "RGB")
    if picture.size != (CAMERA_SIZE, CAMERA_SIZE):
        picture = picture.resize((CAMERA_SIZE, CAMERA_SIZE), Image.Resampling.BOX)
    metres = found.metres_per_pixel and found.metres_per_pixel * len(found.pixels) / CAMERA_SIZE
    return Frame(shrink(picture, size), found.native_size, found.changes, found.clipped_share, metres)


def _decode_raw(data: bytes, name: str) -> Image.Image:
    if len(data) != RAW_BYTES:
        raise FrameError(
            f"{name} has {len(data):,} bytes, not the {RAW_BYTES:,} of a raw {CAMERA_SIZE}x{CAMERA_SIZE} RGB frame.",
            "Fetch it again: the transfer was probably cut.",
        )
    return Image.frombytes("RGB", (CAMERA_SIZE, CAMERA_SIZE), data)


def is_blank(image: Image.Image) -> bool:
    """Whether a 512x512 frame is blank: missing imagery, white-out, or flat open ocean.

    Computed on rows 16..479 in grey levels: blank if the entropy is below 4.0 bits AND mean |dx| + mean |dy| is
    below 1. Correct on all 55 real frames that were tested; each measure alone fails on some.
    """
    return looks_blank(appearance(image))


def looks_blank(measures: Mapping[str, float]) -> bool:
    """Whether a frame with these measures (`appearance`) is blank."""
    return measures["entropy_bits"] < BLANK_ENTROPY_BITS and measures["gradient"] < BLANK_GRADIENT


def appearance(image: Image.Image) -> dict[str, float]:
    """Measures of a 512x512 frame on rows 16..479 in grey levels, by which frames of another kind differ.

    `dark`, `middle` and `bright`: the grey levels that 1, 50 and 99 % of the pixels reach; `contrast`: bright - dark;
    `entropy_bits`; `gradient`: mean |dx| + mean |dy|. The flight computes the same (flight/decide_frame.py): the last
    two are rounded to 6 decimals, which is coarser than what two orders of summation differ by.
    """
    first, last = BLANK_ROWS
    grey = np.asarray(image.convert("L"), dtype=np.float64)[first : last + 1]
    counts = np.bincount(grey.astype(np.uint8).ravel(), minlength=256)
    cumulated = np.cumsum(counts)
    dark, middle, bright = (int(np.searchsorted(100 * cumulated, share * grey.size)) for share in (1, 50, 99))
    shares = counts[counts > 0] / grey.size
    entropy = float(-(shares * np.log2(shares)).sum())
    gradient = float(np.abs(np.diff(grey, axis=1)).mean() + np.abs(np.diff(grey, axis=0)).mean())
    return {
        "dark": dark, "middle": middle, "bright": bright, "contrast": bright - dark,
        "entropy_bits": round(entropy, 6), "gradient": round(gradient, 6),
    }  # fmt: skip


def noise_frame(kind: str, size: int, seed: int = 42) -> Image.Image:
    """Deterministic noise; with seed 42, the image of condition C.

    `gaussian` is the mission document's. It is drawn at the input size, because shrinking would halve its contrast.
    `uniform` is the published reference's. It is drawn at 512 pixels and shrunk like a frame.
    """
    random = np.random.RandomState(seed)  # the legacy generator gives the same bytes as the reference
    values: NDArray[np.uint8]
    if kind == "gaussian":
        normal = random.normal(127.5, 50, (size, size, 3))
        values = np.clip(normal, 0, 255).astype(np.uint8)
        return Image.fromarray(values, "RGB")
    values = random.randint(0, 256, (CAMERA_SIZE, CAMERA_SIZE, 3)).astype(np.uint8)
    return shrink(Image.fromarray(values, "RGB"), size)
