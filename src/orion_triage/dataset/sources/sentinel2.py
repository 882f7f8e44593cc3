"""Sentinel-2 chips from a STAC catalogue: free pictures at 10 m, of a size with a frame from 500 km.

A catalogue says how cloudy a whole scene of 110 x 110 km is, which is little help for 5.12 km of it. So the scenes are
only tried in that order; the choice is made by the scene classification (SCL, 20 m) over the chip itself. The chip is
cut from the scene's own UTM grid without resampling; range requests fetch its blocks, not the 10980x10980 pixels.
"""

import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from functools import partial
from json import JSONDecodeError
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from orion_triage.dataset.sources.source import Absent, Picture, Shot
from orion_triage.errors import OrionError
from orion_triage.imagery.frames import CAMERA_SIZE
from orion_triage.safe.files import sha256_of_text, write_bytes

CHIP_METRES = 5120
COVERAGE = 0.98  # share of the chip that must have data
CLEAR = 0.01  # share of cloud at which no better scene is looked for
# SCL: 3 cloud shadow, 8 and 9 cloud of medium and high probability, 10 thin cirrus. Snow (11) is ground.
_CLOUD = (3, 8, 9, 10)

_ATTEMPTS = 4
_PLACES_UNTIL_AWAY = 3
STAC_URL = "https://earth-search.aws.element84.com/v1"
_EXTRA = "pip install 'orion-triage[imagery]'"

_Answer = TypeVar("_Answer")


class _RefusedError(Exception):
    """This scene is of no use for this place, now and later."""


class _AwayError(Exception):
    """A server did not answer as it should; it may do so later."""


@dataclass(frozen=True)
class _Chip:
    """What is known of a scene over one place before its pixels are read."""

    item: str
    captured_at: str
    visual: str
    cloud_share: float


class Sentinel2:
    """The least cloudy Sentinel-2 picture of each place, 512x512 pixels of 10 m with north up, one a place.

    `start` and `end` are days, both included: with them fixed, the same places get the same pictures. Of the scenes
    that show a place, the `max_scenes_per_place` with the least cloud by the catalogue are looked at; a chip with more
    cloud than `max_cloud_share` is not taken. `timeout_seconds` holds for one answer of a server; a question is put
    four times, `retry_delay_seconds` apart at first and twice as long each time.
    """

    name = "sentinel2"
    licence = "Copernicus Sentinel data terms"
    redistributable = True

    def __init__(
        self,
        cache: Path,
        *,
        url: str = STAC_URL,
        collection: str = "sentinel-2-l2a",
        start: str = "2024-01-01",
        end: str = "2025-12-31",
        max_scenes_per_place: int = 20,
        max_cloud_share: float = 0.2,
        timeout_seconds: float = 60.0,
        retry_delay_seconds: float = 1.0,
    ) -> None:
        if not _is_http(url):
            raise OrionError(f"{url} is no address of a STAC API.", "Give one that begins with https://.")
        try:
            first, last = date.fromisoformat(start), date.fromisoformat(end)
        except ValueError as error:
            raise OrionError(f"dates {start} to {end}: {error}.", "Write days as 2024-12-31.") from None
        if last < first:
            raise OrionError(f"dates {start} to {end}: the end is before the start.", "Swap them.")
        years = sorted({str(first.year), str(last.year)})
        self.attribution = f"contains modified Copernicus Sentinel data {'-'.join(years)}"
        self.cache, self.url, self.collection = cache, url, collection
        self.start, self.end = first.isoformat(), last.isoformat()
        self.max_scenes_per_place, self.max_cloud_share = max_scenes_per_place, max_cloud_share
        self.timeout_seconds, self.retry_delay_seconds = timeout_seconds, retry_delay_seconds

    def pictures(self, shots: Sequence[Shot]) -> Iterator[Picture | Absent]:
        """One answer a shot, in order; what is in the cache asks no server.

        Raises OrionError when a library is missing, a shot is a place's second, the catalogue is not there, or
        servers fail for three places in a row.
        """
        try:
            import pystac_client  # noqa: F401
            import rasterio  # noqa: F401
        except ImportError as error:
            raise OrionError(f"Sentinel-2 pictures need {error.name}, which is not installed.", _EXTRA) from None
        if second := next((shot for shot in shots if shot.number > 1), None):
            raise OrionError(
                f"{second.name}: Sentinel-2 gives one picture a place, this asks for number {second.number}.",
                "Set dataset.test_size to 0, or to the number of test places.",
            )
        catalogue: Any = None
        away: list[str] = []
        for shot in shots:
            path = self._cached_at(shot)
            if cached := _from_cache(path):
                yield cached
                continue
            catalogue = catalogue or self._catalogue()
            answer: Picture | Absent
            try:
                answer = self._picture(catalogue, shot, path)
                away = []
            except _AwayError as error:
                away.append(shot.name)
                if len(away) == _PLACES_UNTIL_AWAY:
                    raise OrionError(
                        f"{self.url}, or the store of its pictures, failed for {len(away)} places in a row "
                        f"({', '.join(away)}); at last: {error}.",
                        "Try again later: pictures that are in the cache are not asked for again.",
                    ) from None
                answer = Absent("failed", f"{shot.name}: {error}.")
            yield answer

    def _cached_at(self, shot: Shot) -> Path:
        """One file for a place and all that decides on its picture."""
        settings = (self.url, self.collection, self.start, self.end, self.max_scenes_per_place, self.max_cloud_share)
        key = sha256_of_text(repr((shot.place.lon, shot.place.lat, *settings)))
        return self.cache / f"{shot.name}-{key[:16]}.png"

    def _picture(self, catalogue: Any, shot: Shot, path: Path) -> Picture | Absent:
        scenes = self._patiently(partial(self._search, catalogue, shot))
        span = f"between {self.start} and {self.end}"
        if not scenes:
            where = f"longitude {shot.place.lon}, latitude {shot.place.lat}"
            return Absent("failed", f"{shot.name}: no scene {span} shows {where}.")
        chips: list[_Chip] = []
        refused: list[str] = []
        for scene in scenes:
            try:
                chip = self._patiently(partial(look, scene, shot, self.timeout_seconds))
                if chip.cloud_share <= CLEAR:
                    return self._take(chip, shot, path)
                chips.append(chip)
            except _RefusedError as refusal:
                refused.append(f"{scene.get('id')} {refusal}")
        chips.sort(key=lambda chip: (chip.cloud_share, chip.item))
        for chip in chips:
            if chip.cloud_share > self.max_cloud_share:
                share = f"{chip.cloud_share:.0%} cloud over the place, more than {self.max_cloud_share:.0%}"
                refused.insert(0, f"{chip.item}, the clearest of those left, has {share}")
                break
            try:
                return self._take(chip, shot, path)
            except _RefusedError as refusal:
                refused.append(f"{chip.item} {refusal}")
        reasons = "; ".join(refused[:3]) + ("; ..." if refused[3:] else "")
        return Absent("failed", f"{shot.name}: none of {len(scenes)} scenes {span} will do: {reasons}.")

    def _take(self, chip: _Chip, shot: Shot, path: Path) -> Picture:
        """Read the chip's pixels and keep them as a PNG that names its scene and time."""
        read = partial(read_chip, chip.visual, 10, 3, shot.place.lon, shot.place.lat, self.timeout_seconds)
        pixels = self._patiently(read)
        _require_data(float(pixels.any(axis=0).mean()), "visual")  # 0 is "no data" here, too
        text = PngInfo()
        text.add_text("item", chip.item)
        text.add_text("captured_at", chip.captured_at)
        text.add_text("cloud_share", f"{chip.cloud_share:.4f}")
        text.add_text("attribution", self.attribution)
        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(buffer, "PNG", pnginfo=text)
        write_bytes(path, buffer.getvalue())
        return Picture(buffer.getvalue(), 10.0, chip.captured_at)

    def _catalogue(self) -> Any:
        from pystac_client import Client
        from pystac_client.stac_api_io import StacApiIO

        channel = StacApiIO(max_retries=None)  # _patiently retries, after more faults
        try:  # the timeout is given to `open`, which would set the channel's own back to none
            catalogue = self._patiently(partial(Client.open, self.url, stac_io=channel, timeout=self.timeout_seconds))
        except OrionError:
            raise
        except Exception as error:  # what is no catalogue breaks pystac as ClientTypeError, KeyError, TypeError, ...
            fix = "Check the address and the network."
            raise OrionError(f"{self.url} does not answer as a STAC API: {error}.", fix) from None
        for ability in ("ITEM_SEARCH", "SORT"):  # without SORT, the first scenes of an answer are any scenes
            if not catalogue.conforms_to(ability):
                raise OrionError(f"{self.url} does not offer {ability}.", "Use a STAC API with sorted item search.")
        return catalogue

    def _search(self, catalogue: Any, shot: Shot) -> list[dict[str, Any]]:
        """The items that show the place, least cloud first. A point has no trouble with the antimeridian."""
        search = catalogue.search(
            collections=[self.collection],
            intersects={"type": "Point", "coordinates": [shot.place.lon, shot.place.lat]},
            datetime=f"{self.start}/{self.end}",
            sortby=["+properties.eo:cloud_cover", "+id"],
            limit=min(self.max_scenes_per_place, 100),
            max_items=self.max_scenes_per_place,
        )
        return list(search.items_as_dicts())

    def _patiently(self, ask: Callable[[], _Answer]) -> _Answer:
        """The answer, asked for again while servers fail: one rule for catalogue and pictures.

        The libraries' own retries see a status 503, but neither urllib3's nor GDAL's an answer that breaks off.
        """
        from pystac_client.exceptions import APIError
        from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential, wait_random

        def asked() -> _Answer:
            try:
                return ask()
            except APIError as error:
                status = getattr(error, "status_code", None)  # not there if no answer came
                failure = f"status {status}, {str(error)[:200]!r}" if status else str(error)
                if status and status < 500 and status != 429:
                    fix = "Check the address and the collection."
                    raise OrionError(f"{self.url} refuses a question: {failure}.", fix) from None
                raise _AwayError(failure) from None
            except JSONDecodeError as error:
                raise _AwayError(str(error)) from None

        delay = self.retry_delay_seconds
        return Retrying(
            stop=stop_after_attempt(_ATTEMPTS),
            wait=wait_exponential(multiplier=delay) + wait_random(0, delay / 2),
            retry=retry_if_exception_type(_AwayError),
            reraise=True,
        )(asked)


def look(scene: dict[str, Any], shot: Shot, timeout_seconds: float) -> _Chip:
    """Judge one STAC item by its SCL over the chip; raises _RefusedError if the chip is not all there."""
    try:
        moment = datetime.fromisoformat(scene["properties"]["datetime"])
        hrefs = [str(scene["assets"][asset]["href"]) for asset in ("scl", "visual")]
    except (KeyError, TypeError, ValueError) as error:
        raise _RefusedError(f"lacks its time or picture ({error})") from None
    if strange := next((href for href in hrefs if not _is_http(href)), None):
        raise _RefusedError(f"is at {strange}, which is not http")
    (classes,) = read_chip(hrefs[0], 20, 1, shot.place.lon, shot.place.lat, timeout_seconds)
    _require_data(float((classes != 0).mean()), "scl")
    captured_at = moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return _Chip(str(scene.get("id")), captured_at, hrefs[1], float(np.isin(classes, _CLOUD).mean()))


def read_chip(href: str, metres: int, bands: int, lon: float, lat: float, timeout_seconds: float) -> NDArray[np.uint8]:
    """The chip around a place as (bands, side, side), side = 5120 / `metres`, from a GeoTIFF with pixels of `metres`.

    Raises _RefusedError where the chip leaves the raster, or the raster is another one; _AwayError when reading fails.
    """
    import rasterio
    from rasterio.errors import CRSError, RasterioError
    from rasterio.warp import transform
    from rasterio.windows import Window

    settings = {
        "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",  # look for no files beside the raster
        "CPL_VSIL_CURL_NON_CACHED": "/vsicurl/",  # a second try must not meet the first one's answer
        "GDAL_HTTP_TIMEOUT": timeout_seconds,
        "GDAL_NUM_THREADS": 1,  # with more, a broken connection has left black pixels and no error (OSGeo/gdal#11552)
    }
    try:
        # No other driver: a raster that a server names as it likes could point to files of this machine.
        with rasterio.Env(**settings), rasterio.open(href, driver="GTiff") as raster:
            left, top, epsg = raster.transform.c, raster.transform.f, raster.crs.to_epsg() if raster.crs else None
            utm = (epsg or 0) // 100 in (326, 327)
            square = raster.transform.almost_equals(rasterio.Affine(metres, 0, left, 0, -metres, top))
            if not (square and utm and raster.count >= bands and set(raster.dtypes) == {"uint8"}):
                raise _RefusedError(f"has no 8-bit raster of {metres} m in UTM at {href}")
            try:
                (x,), (y,) = transform("EPSG:4326", raster.crs, [lon], [lat])
            except Exception:  # rasterio hands PROJ's own error on: the place is nowhere near this UTM zone
                raise _RefusedError("shows another part of the Earth") from None
            column, row = chip_corner(left, top, x, y, metres)
            side = CHIP_METRES // metres
            if not (0 <= column <= raster.width - side and 0 <= row <= raster.height - side):
                raise _RefusedError("ends within 2.56 km of the place")
            pixels: NDArray[np.uint8] = raster.read(list(range(1, bands + 1)), window=Window(column, row, side, side))
            return pixels
    except (RasterioError, CRSError) as error:
        cause: BaseException = error
        while cause.__cause__:
            cause = cause.__cause__
        if re.search(r"HTTP response code: 4(03|04|10)\b", str(cause)):
            raise _RefusedError(f"has no file at {href} ({cause})") from None
        raise _AwayError(f"{href} cannot be read: {cause}") from None


def chip_corner(left: float, top: float, x: float, y: float, metres: int) -> tuple[int, int]:
    """Column and row of the chip's upper left pixel in a raster with its corner at (left, top), metres of UTM.

    The chip snaps to 20 m, so that the SCL and the picture of a scene show the same ground; the place is at most 10 m
    from the chip's centre on either axis.
    """
    steps = (math.floor((x - left) / 20 + 0.5), math.floor((top - y) / 20 + 0.5))
    column, row = ((step * 20 - CHIP_METRES // 2) // metres for step in steps)
    return column, row


def _require_data(share: float, asset: str) -> None:
    if share < COVERAGE:
        raise _RefusedError(f"has data on {share:.1%} of the chip ({asset})")


def _is_http(href: str) -> bool:
    return urlsplit(href).scheme in ("http", "https")


def _from_cache(path: Path) -> Picture | None:
    """The picture in a cache file, or None if there is no such file or it is not whole."""
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data), formats=("PNG",)) as picture:
            picture.load()
            captured_at = picture.info["captured_at"]
            if picture.size != (CAMERA_SIZE, CAMERA_SIZE):
                return None
    except (OSError, SyntaxError, KeyError, ValueError):
        return None
    return Picture(data, 10.0, captured_at, cached=True)
