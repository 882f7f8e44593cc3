"""SimSat: the mission's orbit simulator, which serves Mapbox pictures over HTTP.

The status and headers of its replies are not reliable. A missing picture is HTTP 200 with an empty body, a JPEG has the
content type PNG, and a failure of Mapbox looks like a place without imagery. Every reply is therefore checked by its
content, and only a picture that decodes to its last row is stored.
"""

import json
import math
import random
import re
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from orion_triage.dataset.sources.source import Absent, Outcome, Picture, Shot
from orion_triage.errors import FrameError, OrionError, printable
from orion_triage.imagery.frames import CAMERA_SIZE, decode_frame
from orion_triage.safe.files import sha256_of_text, write_bytes
from orion_triage.safe.reading import parse_json

if TYPE_CHECKING:
    import httpx

    from orion_triage.safe.bounded_http import BoundedHttp

# SimSat asks Mapbox for zoom 13.92 + log2(560 / distance in km) and 1280 points of 40,075 km * cos(lat) / 2^(zoom + 9):
# at nadir on the equator, that is 5.77 km from 500 km, and it is a linear function of the altitude.
METRES_PER_PIXEL_AT_500_KM = 11.27
SIMSAT_URL = "http://localhost:9005"
LARGEST_BYTES = 32_000_000  # several times the size of a 2560x2560 JPEG
_PLAIN = {"Accept-Encoding": "identity"}  # a kilobyte that was compressed twice unpacks to a gigabyte
_DETAIL_BYTES = 4096  # of an error's text
_PLACES_WITHOUT_SERVER = 5  # failures in a row after which the server is the cause, not the place
_WHOLE_ANSWER = 3  # times the read timeout, which never expires if a server sends a byte now and then


@dataclass(frozen=True)
class _Fault:
    """A reply without a usable picture, or no reply."""

    why: str
    outcome: Outcome = "failed"
    again: bool = True  # another attempt may succeed
    unanswered: bool = False  # the server failed: no complete reply, or a status such as 429 or 503
    unreachable: bool = False  # no connection
    wait_seconds: float = 0.0  # the server's Retry-After


class SimSat:
    """Nadir pictures of each place, one request at a time, with a persistent cache.

    `cache` stores the bytes of every picture as received, one file per request. `read_seconds` limits the wait for
    each piece of a reply. The n-th pause between the attempts for a place is backoff_seconds * 2^(n-1), reduced by a
    random share of up to a half (`seed`), or the Retry-After header. Both are limited to `longest_wait_seconds`.

    Raises OrionError for a url that is not http(s).
    """

    name = "simsat"
    licence = "Mapbox Terms of Service"
    attribution = "© Mapbox, © Maxar"
    redistributable = False

    def __init__(
        self,
        *,
        url: str = SIMSAT_URL,
        cache: Path,
        altitude_km: float = 500.0,
        requests_per_second: float = 2.0,
        connect_seconds: float = 5.0,
        read_seconds: float = 60.0,
        attempts: int = 4,
        backoff_seconds: float = 1.0,
        longest_wait_seconds: float = 60.0,
        seed: int = 42,
    ) -> None:
        self.url = _checked(url)
        self.cache = cache
        self.altitude_km = altitude_km
        self.connect_seconds = connect_seconds
        self.read_seconds = read_seconds
        self.attempts = attempts
        self.backoff_seconds = backoff_seconds
        self.longest_wait_seconds = longest_wait_seconds
        self._random = random.Random(seed)
        self._pace = _Pace(requests_per_second)

    def pictures(self, shots: Sequence[Shot]) -> Iterator[Picture | Absent]:
        """One answer per shot, in the order of `shots`; see ImagerySource.

        Raises OrionError if a place has more than one shot, if the server is unreachable, and if it fails for five
        places in a row. Pictures fetched before the error are in the cache.
        """
        if several := [shot for shot in shots if shot.number > 1]:
            raise OrionError(
                f"{several[0].name}: SimSat has only one picture per place.",
                "Set dataset.test_size to 0, or add places to the catalogue.",
            )
        return self._pictures(shots)

    def _pictures(self, shots: Sequence[Shot]) -> Iterator[Picture | Absent]:
        import httpx

        from orion_triage.safe.bounded_http import BoundedHttp

        timeout = httpx.Timeout(self.read_seconds, connect=self.connect_seconds)
        # One connection per request: bytes beyond the announced length would be read as the next reply.
        limits = httpx.Limits(max_keepalive_connections=0)
        connected, without_server = False, 0
        with (
            _locked(self.cache),
            closing(BoundedHttp(self.url, timeout=timeout, limits=limits, headers=_PLAIN)) as client,
        ):
            for shot in shots:
                if (data := self._cached(shot)) is not None:
                    yield Picture(data, self._metres_per_pixel(shot), cached=True)
                    continue
                answer = self._fetch(client, shot)
                if isinstance(answer, bytes):
                    connected, without_server = True, 0
                    self._keep(shot, answer)
                    yield Picture(answer, self._metres_per_pixel(shot))
                    continue
                connected = connected or not answer.unreachable
                without_server = without_server + 1 if answer.unanswered else 0
                if not connected or without_server == _PLACES_WITHOUT_SERVER:
                    row = f" (so did the {without_server - 1} places before it)" if without_server > 1 else ""
                    raise OrionError(
                        f"SimSat at {self.url} does not answer. {_words(shot)} failed: {answer.why}{row}.",
                        "Start SimSat or correct dataset.url, then run the same command again; it resumes from "
                        f"{self.cache}.",
                    )
                yield Absent(answer.outcome, f"{_words(shot)}: {answer.why}.")

    def _metres_per_pixel(self, shot: Shot) -> float:
        return METRES_PER_PIXEL_AT_500_KM * self.altitude_km / 500 * math.cos(math.radians(shot.place.lat))

    def _question(self, shot: Shot) -> dict[str, float]:
        lon, lat = shot.place.lon + 0.0, shot.place.lat + 0.0  # -0.0 becomes 0.0
        position = {"lon_target": lon, "lat_target": lat, "lon_satellite": lon, "lat_satellite": lat}
        return {**position, "alt_satellite": self.altitude_km}

    def _path(self, shot: Shot) -> Path:
        question = self._question(shot)
        digest = sha256_of_text(json.dumps([self.url, question]))
        return self.cache / f"lon{question['lon_target']:+.4f}_lat{question['lat_target']:+.4f}_{digest[:16]}.jpeg"

    def _cached(self, shot: Shot) -> bytes | None:
        """The cached bytes of a picture, or None if they are missing or damaged."""
        path = self._path(shot)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        if _damage(data):
            path.unlink()
            return None
        return data

    def _keep(self, shot: Shot, data: bytes) -> None:
        try:
            write_bytes(self._path(shot), data)
        except OSError as error:
            raise OrionError(
                f"{_words(shot)}: the picture cannot be written to {self.cache}: {error.strerror}.",
                "Free some space there, then run the same command again to resume.",
            ) from None

    def _fetch(self, client: "BoundedHttp", shot: Shot) -> bytes | _Fault:
        for attempt in count(1):
            answer = self._ask(client, shot)
            if isinstance(answer, bytes) and (damage := _damage(answer)):
                answer = _Fault(damage)
            if isinstance(answer, bytes) or not answer.again:
                break
            if attempt == self.attempts:
                return replace(answer, why=f"{answer.why} (last of {attempt} attempts)")
            pause = self.backoff_seconds * 2 ** (attempt - 1) * self._random.uniform(0.5, 1)
            time.sleep(min(max(pause, answer.wait_seconds), self.longest_wait_seconds))
        return answer

    def _ask(self, client: "BoundedHttp", shot: Shot) -> bytes | _Fault:
        """One request."""
        import httpx

        self._pace.wait()
        seconds = _WHOLE_ANSWER * self.read_seconds
        try:
            address = f"{self.url}/data/image/mapbox"
            with client.stream("GET", address, seconds, params=self._question(shot)) as response:
                body = _read(response, LARGEST_BYTES if response.status_code == 200 else _DETAIL_BYTES)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            return _Fault(f"no connection ({error})", unanswered=True, unreachable=True)
        except httpx.TimeoutException:
            return _Fault(f"the reply timed out (read timeout {self.read_seconds:g} s)", unanswered=True)
        except httpx.RequestError as error:
            return _Fault(f"the connection broke ({error})", unanswered=True)
        finally:
            self._pace.count()
        return _judged(response.status_code, response.headers, body)


class _Pace:
    """At most `requests_per_second` in any second, measured at the server.

    The arrival time of a request is only known to be before its reply, so a request counts from the end of its reply.
    """

    def __init__(self, requests_per_second: float) -> None:
        self._window_seconds = max(1.0, 1 / requests_per_second)
        self._ends: deque[float] = deque(maxlen=max(1, int(requests_per_second)))

    def wait(self) -> None:
        if len(self._ends) == self._ends.maxlen:
            time.sleep(max(0.0, self._ends[0] + self._window_seconds - time.monotonic()))

    def count(self) -> None:
        self._ends.append(time.monotonic())


def _judged(status: int, headers: Mapping[str, str], body: bytes) -> bytes | _Fault:
    """The picture's bytes, not yet decoded, or the fault."""
    if status == 429 or status >= 500:
        from orion_triage.safe.bounded_http import retry_after_seconds

        wait_seconds = retry_after_seconds(headers.get("retry-after", ""))
        return _Fault(f"HTTP {status}{_detail(body)}", unanswered=True, wait_seconds=wait_seconds)
    if status != 200:
        where = f" to {_said(headers['location'])}, which is not followed" if "location" in headers else ""
        return _Fault(f"HTTP {status}{where}{_detail(body)}", again=False)
    if len(body) > LARGEST_BYTES:
        return _Fault(f"the reply has more than {LARGEST_BYTES:,} bytes", again=False)
    metadata = _object(headers.get("mapbox_metadata", ""))
    if metadata.get("target_visible") is False:
        return _Fault("the place is not visible from the satellite", "not visible", again=False)
    if not body or metadata.get("image_available") is False:
        knows = (
            "the place is visible, but" if metadata.get("target_visible") is True else "the reply has no metadata, and"
        )
        return _Fault(f"{knows} SimSat has no picture: Mapbox refused it or was not reached")
    return body


def _read(response: "httpx.Response", most: int) -> bytes:
    """The body, cut after a little more than `most` bytes."""
    data = bytearray()
    for piece in response.iter_raw():  # raw: a body that is compressed anyway does not decode as a picture
        data += piece
        if len(data) > most:
            break
    return bytes(data)


def _damage(data: bytes) -> str:
    """The fault of a picture; empty if it decodes completely."""
    try:
        decode_frame(data, "the picture", CAMERA_SIZE, resize=True)
    except FrameError as error:
        return error.message.rstrip(".")
    return ""


def _object(text: str) -> dict[str, object]:
    try:
        value = parse_json(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _detail(body: bytes) -> str:
    """The message in an error's body."""
    text = _said(str(_object(body.decode("utf-8", "replace")).get("detail", "")))
    return f": {text}" if text else ""


def _said(text: str) -> str:
    """The beginning of a server's message, without keys and control characters."""
    return printable(_without_key(text[:_DETAIL_BYTES])[:200]).replace("\n", "\\n")


def _without_key(text: str) -> str:
    """Remove keys: SimSat quotes the Mapbox URL with the access token, which must not reach a log or a dataset."""
    return re.sub(r"(access_token=)[^&\s'\")]+", r"\1...", text)


def _words(shot: Shot) -> str:
    return f"{shot.name} (lon {shot.place.lon:g}, lat {shot.place.lat:g})"


def _checked(url: str) -> str:
    import httpx

    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and not parts.query
        httpx.URL(url)
    except (ValueError, httpx.InvalidURL):
        good = False
    if not good:
        raise OrionError(f"SimSat's address {url!r} is not an http(s) URL.", "Use a URL like http://localhost:9005.")
    return url.rstrip("/")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock the cache for this process: two processes would send requests at twice the rate."""
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise OrionError(f"another run is fetching into {folder}.", "Wait until it ends, or stop it.") from None
    except OSError as error:
        raise OrionError(
            f"{folder} cannot be used as the cache: {error.strerror}.", "Set ORION_CACHE to another folder."
        ) from None
    try:
        for unfinished in folder.glob(".lon*.jpeg.*"):  # from a process that was killed during a write
            unfinished.unlink()
        yield
    finally:
        lock.release()
