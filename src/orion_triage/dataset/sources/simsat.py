"""SimSat: the mission's orbit simulator, which hands Mapbox pictures through over HTTP.

Its answers are not what their status says: a picture that could not be had is HTTP 200 with an empty body, a JPEG is
announced as PNG, and a fault of Mapbox's looks like a place without imagery. So every answer is judged by its content,
and only a picture that decodes to its last row is kept.
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
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
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
# straight above the equator that is 5.77 km for 500 km, so a linear function of the altitude.
METRES_PER_PIXEL_AT_500_KM = 11.27
SIMSAT_URL = "http://localhost:9005"
LARGEST_BYTES = 32_000_000  # several times a 2560x2560 JPEG
_PLAIN = {"Accept-Encoding": "identity"}  # packed twice, a kilobyte unpacks to a gigabyte
_DETAIL_BYTES = 4096  # of an error's text
_PLACES_WITHOUT_SERVER = 5  # in a row; then it is the server that fails, not the places
_WHOLE_ANSWER = 3  # times the read timeout: a server that sends a byte now and then never runs into that one


@dataclass(frozen=True)
class _Fault:
    """An answer without a usable picture."""

    why: str
    outcome: Outcome = "failed"
    again: bool = True  # another attempt may go better
    unanswered: bool = False  # it says nothing of the place: no whole answer, or one by which the server excuses itself
    unreachable: bool = False  # not even a connection
    wait_seconds: float = 0.0  # the server's own wish


class SimSat:
    """Pictures from straight above each place, one request at a time, through a cache that outlives the process.

    `cache` keeps the bytes of every picture as received, in one file a request. `read_seconds` bounds the wait for
    each piece of an answer. The n-th pause between a place's attempts is backoff_seconds * 2^(n-1), less a random
    share of up to a half (`seed`), or what Retry-After says; neither is longer than `longest_wait_seconds`.

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
        """One answer a shot, in the order of `shots`; see ImagerySource.

        Raises OrionError when a place is asked for more than once, when the server is not there, and when five
        places in a row fail because it does not answer. What was fetched until then is in the cache.
        """
        if several := [shot for shot in shots if shot.number > 1]:
            raise OrionError(
                f"{several[0].name}: SimSat has one picture of a place; asked again, the same one would come.",
                "Set dataset.test_size to 0, or give the catalogue more places.",
            )
        return self._pictures(shots)

    def _pictures(self, shots: Sequence[Shot]) -> Iterator[Picture | Absent]:
        import httpx

        from orion_triage.safe.bounded_http import BoundedHttp

        timeout = httpx.Timeout(self.read_seconds, connect=self.connect_seconds)
        # A connection a request: bytes beyond an answer's announced length would be taken for the next answer.
        limits = httpx.Limits(max_keepalive_connections=0)
        connected, without_server = False, 0
        with _locked(self.cache), closing(BoundedHttp(timeout=timeout, limits=limits, headers=_PLAIN)) as client:
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
                    row = f", as for the {without_server - 1} places before it" if without_server > 1 else ""
                    raise OrionError(
                        f"SimSat at {self.url} does not answer. {_words(shot)}: {answer.why}{row}.",
                        f"Start it or give its address, then repeat the command: it goes on from {self.cache}.",
                    )
                yield Absent(answer.outcome, f"{_words(shot)}: {answer.why}.")

    def _metres_per_pixel(self, shot: Shot) -> float:
        return METRES_PER_PIXEL_AT_500_KM * self.altitude_km / 500 * math.cos(math.radians(shot.place.lat))

    def _question(self, shot: Shot) -> dict[str, float]:
        lon, lat = shot.place.lon + 0.0, shot.place.lat + 0.0  # -0.0 is 0.0
        position = {"lon_target": lon, "lat_target": lat, "lon_satellite": lon, "lat_satellite": lat}
        return {**position, "alt_satellite": self.altitude_km}

    def _path(self, shot: Shot) -> Path:
        question = self._question(shot)
        digest = sha256_of_text(json.dumps([self.url, question]))
        return self.cache / f"lon{question['lon_target']:+.4f}_lat{question['lat_target']:+.4f}_{digest[:16]}.jpeg"

    def _cached(self, shot: Shot) -> bytes | None:
        """The picture as it was received, unless there is none or the disk has spoilt it."""
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
                f"{_words(shot)}: its picture cannot be written to {self.cache}: {error.strerror}.",
                "Make room there, then repeat the command: it goes on from what is there.",
            ) from None

    def _fetch(self, client: "BoundedHttp", shot: Shot) -> bytes | _Fault:
        for attempt in count(1):
            answer = self._ask(client, shot)
            if isinstance(answer, bytes) and (damage := _damage(answer)):
                answer = _Fault(damage)
            if isinstance(answer, bytes) or not answer.again:
                break
            if attempt == self.attempts:
                return replace(answer, why=f"{answer.why} (the last of {attempt} attempts)")
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
            return _Fault(f"no whole answer in time (it may pause for {self.read_seconds:g} s)", unanswered=True)
        except httpx.RequestError as error:
            return _Fault(f"the connection broke off ({error})", unanswered=True)
        finally:
            self._pace.count()
        return _judged(response.status_code, response.headers, body)


class _Pace:
    """At most `requests_per_second` in any second, as the server sees them.

    When a request arrived there is only known to be before its answer: so it counts from the answer's end.
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
    """The picture's bytes, not yet decoded, or why there is none."""
    if status == 429 or status >= 500:
        wait_seconds = _retry_after_seconds(headers.get("retry-after", ""))
        return _Fault(f"HTTP {status}{_detail(body)}", unanswered=True, wait_seconds=wait_seconds)
    if status != 200:
        where = f" to {_said(headers['location'])}, which is not followed" if "location" in headers else ""
        return _Fault(f"HTTP {status}{where}{_detail(body)}", again=False)
    if len(body) > LARGEST_BYTES:
        return _Fault(f"the answer has more than {LARGEST_BYTES:,} bytes", again=False)
    metadata = _object(headers.get("mapbox_metadata", ""))
    if metadata.get("target_visible") is False:
        return _Fault("the place is not visible from the satellite", "not visible", again=False)
    if not body or metadata.get("image_available") is False:
        knows = "the place is visible, but" if metadata.get("target_visible") is True else "without its metadata,"
        return _Fault(f"{knows} SimSat has no picture: Mapbox refused it or was not reached")
    return body


def _read(response: "httpx.Response", most: int) -> bytes:
    """The body, or a little more than `most` bytes of it."""
    data = bytearray()
    for piece in response.iter_raw():  # what is packed against our wish does not decode as a picture
        data += piece
        if len(data) > most:
            break
    return bytes(data)


def _damage(data: bytes) -> str:
    """What is wrong with a picture; empty when all of it decodes."""
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
    """What an error's body says."""
    text = _said(str(_object(body.decode("utf-8", "replace")).get("detail", "")))
    return f": {text}" if text else ""


def _said(text: str) -> str:
    """The beginning of a server's words, without keys and without what a terminal would obey."""
    return printable(_without_key(text[:_DETAIL_BYTES])[:200]).replace("\n", "\\n")


def _without_key(text: str) -> str:
    """SimSat quotes the address that it asked at Mapbox, with the key: that must not reach a log or a dataset."""
    return re.sub(r"(access_token=)[^&\s'\")]+", r"\1...", text)


def _retry_after_seconds(value: str) -> float:
    """Retry-After as seconds or as a date; 0 when it is neither."""
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError, OverflowError):
        return 0.0


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
        raise OrionError(f"SimSat's address {url!r} is no http(s) URL.", "Give one like http://localhost:9005.")
    return url.rstrip("/")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """The cache for this process alone: two at a time would ask the server at twice the rate."""
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise OrionError(f"another run fetches into {folder}.", "Wait for its end, or stop it.") from None
    except OSError as error:
        raise OrionError(f"{folder} cannot hold SimSat's pictures: {error.strerror}.", "Give another folder.") from None
    try:
        for unfinished in folder.glob(".lon*.jpeg.*"):  # of a process that was killed while it wrote
            unfinished.unlink()
        yield
    finally:
        lock.release()
