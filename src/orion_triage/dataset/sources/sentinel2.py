"""Sentinel-2 chips from a STAC catalogue: free images at 10 m, of the size of a frame from 500 km.

The catalogue's cloud cover applies to a whole scene of 110 x 110 km, and a chip has 5.12 km. It therefore only gives
the order in which scenes are tried. The scene classification (SCL, 20 m) over the chip decides. The chip is cut from
the scene's UTM grid without resampling. Range requests fetch only its blocks, not all 10980x10980 pixels.
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
from orion_triage.imagery.png_jpeg import png_damage
from orion_triage.safe.files import sha256_of_text, write_bytes
from orion_triage.safe.proxies import proxy_for

CHIP_METRES = 5120
COVERAGE = 0.98  # share of the chip that must have data
CLEAR = 0.01  # share of cloud below which the search for a better scene stops
# SCL: 3 cloud shadow, 8 and 9 cloud of medium and high probability, 10 thin cirrus. Snow (11) is ground.
_CLOUD = (3, 8, 9, 10)

_ATTEMPTS = 4
_PLACES_UNTIL_AWAY = 3
STAC_URL = "https://earth-search.aws.element84.com/v1"
_EXTRA = "Run pip install 'orion-triage[imagery]'"

_Answer = TypeVar("_Answer")


class _RefusedError(Exception):
    """The scene cannot be used for this place, also not later."""


class _AwayError(Exception):
    """A server failed; the request may succeed later."""


@dataclass(frozen=True)
class _Chip:
    """The facts about a scene over one place that are known before its pixels are read."""

    item: str
    captured_at: str
    visual: str
    cloud_share: float


class Sentinel2:
    """The least cloudy Sentinel-2 picture of each place: 512x512 pixels of 10 m, north up, one per place.

    `start` and `end` are days, both included; with fixed days, the same places get the same pictures. Of the scenes
    that contain a place, the `max_scenes_per_place` with the lowest cloud cover in the catalogue are tried. A chip with
    a larger share of cloud than `max_cloud_share` is refused. `timeout_seconds` applies to one reply of a server. Each
    request is tried four times; the pause is `retry_delay_seconds` at first and doubles each time.
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
            raise OrionError(f"{url} is not the URL of a STAC API.", "Use a URL that begins with https://.")
        try:
            first, last = date.fromisoformat(start), date.fromisoformat(end)
        except ValueError as error:
            raise OrionError(f"dates {start} to {end}: {error}.", "Write days as YYYY-MM-DD.") from None
        if last < first:
            raise OrionError(f"dates {start} to {end}: the end is before the start.", "Swap them.")
        years = sorted({str(first.year), str(last.year)})
        self.attribution = f"contains modified Copernicus Sentinel data {'-'.join(years)}"
        self.cache, self.url, self.collection = cache, url, collection
        self.start, self.end = first.isoformat(), last.isoformat()
        self.max_scenes_per_place, self.max_cloud_share = max_scenes_per_place, max_cloud_share
        self.timeout_seconds, self.retry_delay_seconds = timeout_seconds, retry_delay_seconds

    def pictures(self, shots: Sequence[Shot]) -> Iterator[Picture | Absent]:
        """One answer per shot, in order; cached pictures need no request.

        Raises OrionError if a library is missing, a place has a second shot, the catalogue is unreachable, or servers
        fail for three places in a row.
        """
        try:
            import pystac_client  # noqa: F401
            import rasterio  # noqa: F401
        except ImportError as error:
            raise OrionError(f"Sentinel-2 pictures need {error.name}, which is not installed.", _EXTRA) from None
        if second := next((shot for shot in shots if shot.number > 1), None):
            raise OrionError(
                f"{second.name}: Sentinel-2 has one picture per place, and this is number {second.number}.",
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
                        f"{self.url}, or the server of its pictures, failed for {len(away)} places in a row "
                        f"({', '.join(away)}); last error: {error}.",
                        "Run the same command again later; cached pictures are not fetched again.",
                    ) from None
                answer = Absent("failed", f"{shot.name}: {error}.")
            yield answer

    def _cached_at(self, shot: Shot) -> Path:
        """The cache file of a place and of all settings that determine its picture."""
        settings = (self.url, self.collection, self.start, self.end, self.max_scenes_per_place, self.max_cloud_share)
        key = sha256_of_text(repr((shot.place.lon, shot.place.lat, *settings)))
        return self.cache / f"{shot.name}-{key[:16]}.png"

    def _picture(self, catalogue: Any, shot: Shot, path: Path) -> Picture | Absent:
        scenes = self._patiently(partial(self._search, catalogue, shot))
        span = f"between {self.start} and {self.end}"
        if not scenes:
            where = f"longitude {shot.place.lon}, latitude {shot.place.lat}"
            return Absent("failed", f"{shot.name}: no scene {span} contains {where}.")
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
                share = f"{chip.cloud_share:.0%} cloud over the place; the limit is {self.max_cloud_share:.0%}"
                refused.insert(0, f"{chip.item}, the least cloudy of the others, has {share}")
                break
            try:
                return self._take(chip, shot, path)
            except _RefusedError as refusal:
                refused.append(f"{chip.item} {refusal}")
        reasons = "; ".join(refused[:3]) + ("; ..." if refused[3:] else "")
        return Absent("failed", f"{shot.name}: none of {len(scenes)} scenes {span} is usable: {reasons}.")

    def _take(self, chip: _Chip, shot: Shot, path: Path) -> Picture:
        """Read the chip's pixels and store them in the cache as a PNG that contains its scene and time."""
        read = partial(read_chip, chip.visual, 10, 3, shot.place.lon, shot.place.lat, self.timeout_seconds)
        pixels = self._patiently(read)
        _require_data(float(pixels.any(axis=0).mean()), "visual")  # here, too, 0 is "no data"
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

        proxy_for(self.url, socks_package="socks")  # raises the error that requests would raise in other words
        channel = StacApiIO(max_retries=None)  # _patiently retries after more kinds of faults
        try:  # pass the timeout to `open`, which would reset that of the channel
            catalogue = self._patiently(partial(Client.open, self.url, stac_io=channel, timeout=self.timeout_seconds))
        except OrionError:
            raise
        except Exception as error:  # without a catalogue, pystac raises ClientTypeError, KeyError, TypeError, ...
            fix = "Check the address and the network."
            raise OrionError(f"{self.url} does not answer as a STAC API: {error}.", fix) from None
        for ability in ("ITEM_SEARCH", "SORT"):  # without SORT, the first scenes of a reply are arbitrary
            if not catalogue.conforms_to(ability):
                raise OrionError(f"{self.url} does not support {ability}.", "Use a STAC API with sorted item search.")
        return catalogue

    def _search(self, catalogue: Any, shot: Shot) -> list[dict[str, Any]]:
        """The items that contain the place, least cloud first. A point needs no special case at the antimeridian."""
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
        """The result of a request, with retries while servers fail; the same rule for catalogue and pictures.

        The retries of urllib3 and GDAL handle a status 503, but not a reply that breaks off.
        """
        from pystac_client.exceptions import APIError
        from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential, wait_random

        def asked() -> _Answer:
            try:
                return ask()
            except APIError as error:
                status = getattr(error, "status_code", None)  # missing if no reply came
                failure = f"status {status}, {str(error)[:200]!r}" if status else str(error)
                if status and status < 500 and status != 429:
                    fix = "Check the address and the collection."
                    raise OrionError(f"{self.url} refused a request: {failure}.", fix) from None
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
    """Rate one STAC item by its SCL over the chip; raises _RefusedError if the chip is incomplete."""
    try:
        moment = datetime.fromisoformat(scene["properties"]["datetime"])
        hrefs = [str(scene["assets"][asset]["href"]) for asset in ("scl", "visual")]
    except (KeyError, TypeError, ValueError) as error:
        raise _RefusedError(f"has no time or no picture ({error})") from None
    if strange := next((href for href in hrefs if not _is_http(href)), None):
        raise _RefusedError(f"is at {strange}, which is not an http URL")
    (classes,) = read_chip(hrefs[0], 20, 1, shot.place.lon, shot.place.lat, timeout_seconds)
    _require_data(float((classes != 0).mean()), "scl")
    captured_at = moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return _Chip(str(scene.get("id")), captured_at, hrefs[1], float(np.isin(classes, _CLOUD).mean()))


def read_chip(href: str, metres: int, bands: int, lon: float, lat: float, timeout_seconds: float) -> NDArray[np.uint8]:
    """The chip around a place as (bands, side, side), side = 5120 / `metres`, from a GeoTIFF with pixels of `metres`.

    Raises _RefusedError if the chip leaves the raster or the raster has another format; _AwayError if reading fails.
    """
    import rasterio
    from rasterio.errors import CRSError, RasterioError
    from rasterio.warp import transform
    from rasterio.windows import Window

    settings = {
        "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",  # do not look for files beside the raster
        "CPL_VSIL_CURL_NON_CACHED": "/vsicurl/",  # a second try must not get the first one's cached reply
        "GDAL_HTTP_TIMEOUT": timeout_seconds,
        "GDAL_NUM_THREADS": 1,  # with more, a broken connection can give black pixels and no error (OSGeo/gdal#11552)
    }
    try:
        # Only the GTiff driver: other formats from a server could refer to files of this machine.
        with rasterio.Env(**settings), rasterio.open(href, driver="GTiff") as raster:
            left, top, epsg = raster.transform.c, raster.transform.f, raster.crs.to_epsg() if raster.crs else None
            utm = (epsg or 0) // 100 in (326, 327)
            square = raster.transform.almost_equals(rasterio.Affine(metres, 0, left, 0, -metres, top))
            if not (square and utm and raster.count >= bands and set(raster.dtypes) == {"uint8"}):
                raise _RefusedError(f"has no 8-bit raster of {metres} m in UTM at {href}")
            try:
                (x,), (y,) = transform("EPSG:4326", raster.crs, [lon], [lat])
            except Exception:  # rasterio raises PROJ's error: the place is far outside this UTM zone
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
    """Column and row of the chip's upper left pixel in a raster whose corner is at (left, top), in UTM metres.

    The chip is aligned to 20 m, so that the SCL and the picture of a scene show the same ground. On each axis, the
    place is at most 10 m from the centre of the chip.
    """
    steps = (math.floor((x - left) / 20 + 0.5), math.floor((top - y) / 20 + 0.5))
    column, row = ((step * 20 - CHIP_METRES // 2) // metres for step in steps)
    return column, row


def _require_data(share: float, asset: str) -> None:
    if share < COVERAGE:
        raise _RefusedError(f"has data for only {share:.1%} of the chip ({asset})")


def _is_http(href: str) -> bool:
    return urlsplit(href).scheme in ("http", "https")


def _from_cache(path: Path) -> Picture | None:
    """The picture in a cache file, or None if the file is missing or damaged."""
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data), formats=("PNG",)) as picture:
            picture.load()
            captured_at = picture.info["captured_at"]
            if picture.size != (CAMERA_SIZE, CAMERA_SIZE) or png_damage(data):
                return None
    except (OSError, SyntaxError, KeyError, ValueError):
        return None
    return Picture(data, 10.0, captured_at, cached=True)
