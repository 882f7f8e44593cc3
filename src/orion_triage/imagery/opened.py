"""A picture from outside as 8-bit RGB, and the rules that all file formats share.

docs/dataset.md lists the rules as one table: every property of a file either changes nothing, or is converted by a
stated rule and named in `Opened.changes`, or makes the picture be refused by name.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orion_triage.errors import FrameError
from orion_triage.imagery.stretch import SETTINGS, Stretch, fix_without_stretch
from orion_triage.mission.prompt import Coordinates

CAMERA_SIZE = 512
# The largest picture that --resize accepts: SimSat's native frame is 2560x2560.
LARGEST_PIXELS = 64_000_000
LARGEST_BYTES = 3 * LARGEST_PIXELS  # of a file: the largest picture, uncompressed
LARGEST_MISSING_SHARE = 0.02  # of a frame's pixels without data; the same rule as for Sentinel-2 chips

ALPHA = "alpha channel left out"
NO_DATA = "pixels without data set to black"
GREY = "grey repeated in three channels"
PALETTE = "palette replaced by its colours"
ORIENTATION = "orientation tag not applied: stored rows and columns kept"
FIRST_OF_SEVERAL = "only the first of several pictures used"
PROFILE = "colour profile converted to sRGB"


@dataclass(frozen=True)
class Opened:
    """The central square of a picture, at the file's resolution.

    `pixels` are RGB, uint8, of shape (edge, edge, 3); `native_size` is the (width, height) of the whole file. `changes`
    names each conversion that the file needed beyond decoding; empty for plain 8-bit RGB. `clipped_share` is the share
    of values outside the stretch's limits; None without a stretch. `centre` and `metres_per_pixel` (of the file's
    grid) are those of a GeoTIFF with a position.
    """

    pixels: NDArray[np.uint8]
    native_size: tuple[int, int]
    changes: tuple[str, ...] = ()
    clipped_share: float | None = None
    centre: Coordinates | None = None
    metres_per_pixel: float | None = None


def central_square(size: tuple[int, int]) -> tuple[int, int, int]:
    """(left, top, edge) of the central square of a picture of (width, height)."""
    edge = min(size)
    return (size[0] - edge) // 2, (size[1] - edge) // 2, edge


def check_size(name: str, native: tuple[int, int], resize: bool) -> None:
    """Raise FrameError for a picture of an unsupported size."""
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


def check_samples(name: str, samples: str, bits: int, stretch: Stretch | None) -> None:
    """Raise FrameError if a picture of this sample type needs a stretch and has none, or has one for another type."""
    if samples == "uint8":
        if stretch:
            raise FrameError(
                f"{name} has {bits} bits per channel, but this run stretches {stretch}.",
                "Pass the picture as the camera recorded it, before it was stretched to 8 bits.",
            )
        return
    if not stretch:
        raise FrameError(
            f"{name} has {bits} bits per channel ({samples}), and {SETTINGS} are not set.", fix_without_stretch(samples)
        )
    if samples != stretch.samples:
        raise FrameError(
            f"{name} has {bits} bits per channel ({samples}), but this run stretches {stretch}.",
            f"Convert its values to {stretch.samples}, in the same units as those of the other pictures.",
        )


def without_data(name: str, pixels: NDArray[np.uint8], missing: NDArray[np.bool_]) -> bool:
    """Set the `missing` pixels (height, width) of an RGB picture to black; returns whether there are any.

    Raises FrameError if their share is too large to judge the frame.
    """
    share = float(missing.mean())
    if share > LARGEST_MISSING_SHARE:
        raise FrameError(
            f"{name} has no data in {share:.1%} of the frame (nodata value, mask or transparency); the limit is "
            f"{LARGEST_MISSING_SHARE:.0%}.",
            "Crop it to the part with data. If all pixels are data, save it without nodata value, mask and alpha.",
        )
    if share:
        pixels[missing] = 0
    return share > 0


def stretched(
    name: str, values: NDArray[Any], valid: NDArray[np.bool_], stretch: Stretch
) -> tuple[NDArray[np.uint8], float]:
    """The 8-bit values of a stretched picture, and the share of valid values beyond the limits.

    Raises FrameError if no value lies between the limits: a frame of one colour would count as blank.
    """
    known = values[valid]
    outside = int(np.count_nonzero((known < stretch.low) | (known > stretch.high)))
    if known.size and not ((known > stretch.low) & (known < stretch.high)).any():
        raise FrameError(
            f"{name} has values from {known.min():g} to {known.max():g}, none between the limits of the stretch "
            f"({stretch}).",
            f"Check {SETTINGS}, and the camera's gain and units.",
        )
    return stretch.apply(values), outside / known.size if known.size else 0.0
