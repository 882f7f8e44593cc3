"""What a file says of its colours: gamma and colour space in a PNG's header, colour profiles."""

import io
import struct
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from orion_triage.errors import FrameError

_SRGB_FIX = "Convert it to sRGB and save it again."
_GAMMA, _GAMMA_TOLERANCE = 1 / 2.2, 0.05  # the tolerance is libpng's (PNG_GAMMA_THRESHOLD_FIXED)
# White point, red, green and blue of sRGB (IEC 61966-2-1), as x and y in a cHRM chunk.
_SRGB_CHROMATICITIES = (0.3127, 0.3290, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
_CHROMATICITY_TOLERANCE = 0.01
_SRGB_CICP = (1, 13, 0, 1)  # primaries of BT.709, transfer of sRGB, RGB, full range (ITU-T H.273)
# Levels of 255 by which two implementations of sRGB differ (rounded matrices, tables instead of the formula).
_SAME_WITHIN = 3


def check_png_colours(name: str, chunks: dict[bytes, bytes]) -> None:
    """Raise FrameError if a PNG says that its values are not sRGB; a colour profile is for `to_srgb`.

    The chunks' precedence is that of the PNG specification, third edition: cICP, iCCP, sRGB, then gAMA and cHRM.
    """
    if cicp := chunks.get(b"cICP"):
        if tuple(cicp) != _SRGB_CICP:
            raise FrameError(
                f"{name} has colours in another coding than sRGB (cICP {'/'.join(map(str, cicp[:8]))}).", _SRGB_FIX
            )
        return
    if b"iCCP" in chunks or b"sRGB" in chunks:
        return
    for gamma in _fractions(chunks.get(b"gAMA", b""), 1):
        if abs(gamma / _GAMMA - 1) > _GAMMA_TOLERANCE:
            raise FrameError(
                f"{name} has a gamma of {gamma:g} (gAMA), not sRGB's {_GAMMA:.5f}.",
                f"{_SRGB_FIX} If its values are sRGB already, save it without the gAMA chunk.",
            )
    if found := _fractions(chunks.get(b"cHRM", b""), 8):
        differences = [abs(a - b) for a, b in zip(found, _SRGB_CHROMATICITIES, strict=True)]
        if max(differences) > _CHROMATICITY_TOLERANCE:
            raise FrameError(
                f"{name} has other primaries or another white than sRGB (cHRM).",
                f"{_SRGB_FIX} If its values are sRGB already, save it without the cHRM chunk.",
            )


def _fractions(data: bytes, count: int) -> tuple[float, ...]:
    """The numbers of a gAMA or cHRM chunk; empty if it has another length (Pillow refuses such a file)."""
    return tuple(n / 100_000 for n in struct.unpack(f">{count}I", data)) if len(data) == 4 * count else ()


def to_srgb(name: str, image: Image.Image, profile: bytes) -> Image.Image | None:
    """The picture (mode L or RGB) in sRGB, relative colorimetric; None if the profile is sRGB already.

    Raises FrameError for a damaged profile and for one of other colours than the picture's.
    """
    transform, same = _transform(profile, image.mode) or (None, False)
    if transform is None:
        kind = "grey" if image.mode == "L" else "RGB"
        raise FrameError(
            f"{name} has a colour profile that is damaged or not for {kind} pictures.",
            f"{_SRGB_FIX} If its values are sRGB already, save it without the profile.",
        )
    return None if same else transform.apply(image)


@lru_cache(maxsize=8)
def _transform(profile: bytes, mode: str) -> tuple[Any, bool] | None:
    """LittleCMS's transform from a profile to sRGB, and whether it changes nothing; None if there is no such one."""
    from PIL import ImageCms

    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        )
        levels = np.arange(0, 256, 15, dtype=np.uint8)
        cube = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(-1, levels.size, 3)
        probe = Image.fromarray(cube) if mode == "RGB" else Image.fromarray(np.arange(256, dtype=np.uint8)[None])
        before, after = (np.asarray(one.convert("RGB"), dtype=int) for one in (probe, transform.apply(probe)))
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    return transform, bool(np.abs(before - after).max() <= _SAME_WITHIN)
