"""GeoTIFF frames: position, ground sample distance and RGB pixels (the extra `orion-triage[imagery]`)."""

import io
import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from orion_triage.errors import FrameError, OrionError
from orion_triage.imagery.frames import LARGEST_PIXELS
from orion_triage.mission.prompt import Coordinates
from orion_triage.safe.reading import opened

GEOTIFF_SUFFIXES = (".tif", ".tiff")


def _refuse_what_is_no_file(path: Path) -> None:
    """Raise FrameError for a pipe, which would never end, and for a Git LFS pointer."""
    try:
        with suppress(FileNotFoundError), opened(path):  # rasterio's own message for a missing file
            pass
    except OrionError as error:
        raise FrameError(error.message, error.fix) from None


@dataclass(frozen=True)
class GeoTiff:
    """`pixels` are RGB, uint8, of shape (height, width, 3); `metres_per_pixel` is that of the file's grid."""

    pixels: NDArray[np.uint8]
    centre: Coordinates
    metres_per_pixel: float

    @classmethod
    def read(cls, path: Path) -> "GeoTiff":
        """Raises OrionError if rasterio is missing, and FrameError for a file without a position or 8-bit RGB."""
        try:
            import rasterio
            from rasterio.errors import CRSError, RasterioError
            from rasterio.warp import transform
        except ImportError:
            raise OrionError(
                f"{path} is a GeoTIFF; reading it needs rasterio, which is not installed.",
                "Run pip install 'orion-triage[imagery]', or convert the file to PNG.",
            ) from None
        _refuse_what_is_no_file(path)
        try:
            # Only the GTiff driver: a VRT file with this suffix could refer to other files and URLs.
            with rasterio.open(path, driver="GTiff") as raster:
                if raster.crs is None or raster.transform.is_identity:
                    raise FrameError(f"{path} has no position.", "Add the columns lon and lat to the table.")
                if raster.count < 3 or raster.dtypes[0] != "uint8":
                    raise FrameError(
                        f"{path} has {raster.count} bands of {raster.dtypes[0]}, not three of uint8.",
                        "Convert it to 8-bit RGB with a contrast stretch of your choice.",
                    )
                if raster.width * raster.height > LARGEST_PIXELS:
                    raise FrameError(
                        f"{path} is {raster.width}x{raster.height}; the limit is {LARGEST_PIXELS / 1e6:g} megapixels.",
                        "Crop it.",
                    )
                x, y = raster.xy(raster.height / 2, raster.width / 2, offset="ul")
                (lon,), (lat,) = transform(raster.crs, "EPSG:4326", [x], [y])
                metres = math.hypot(raster.transform.a, raster.transform.d)
                if raster.crs.is_geographic:
                    metres *= 111_320 * math.cos(math.radians(lat))
                pixels = np.moveaxis(raster.read([1, 2, 3]), 0, 2)
            centre = Coordinates((lon + 180) % 360 - 180, lat)
        except FrameError:
            raise
        except OrionError as error:
            raise FrameError(f"{path}: {error.message}.", "Add the columns lon and lat to the table.") from None
        except (RasterioError, CRSError, ValueError) as error:
            raise FrameError(f"{path} is damaged: {error}.", "Fetch the file again.") from None
        return cls(pixels, centre, metres)

    def png(self) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(self.pixels, "RGB").save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()
