"""SimSat on 127.0.0.1, with its habits and with faults that a test scripts place by place.

A habit: a JPEG is announced as image/png; without a picture the answer is 200 with an empty body, and only
the header `mapbox_metadata` tells a place beyond the horizon from a fault of Mapbox's.
"""

import functools
import io
import json
import math
import os
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from PIL import Image

Place = tuple[float, float]  # longitude, latitude
KEY = "pk.secret-of-the-mission"


@dataclass(frozen=True)
class Request:
    """What was asked, and when it arrived."""

    monotonic_seconds: float
    place: Place
    question: dict[str, float]


class SimSatServer:
    """`scripts` gives each place its faults, one a request (see `_Handler._send`); after the last come pictures.

    `itertools.repeat` makes a fault that never ends.
    """

    def __init__(self, jpegs: Sequence[bytes]) -> None:
        self.scripts: dict[Place, Iterator[str]] = {}
        self.requests: list[Request] = []
        self.strays: list[str] = []  # paths that SimSat does not have
        self.url = ""
        self.white = white_jpeg()
        self._jpegs = jpegs
        self._port = 0

    def picture(self, place: Place) -> bytes:
        """The bytes that show a place and no other: a comment in the file names it."""
        jpeg = self._jpegs[hash(place) % len(self._jpegs)]
        comment = f"lon {place[0]} lat {place[1]}".encode()
        return jpeg[:2] + b"\xff\xfe" + struct.pack(">H", len(comment) + 2) + comment + jpeg[2:]

    def counts(self) -> Counter[Place]:
        return Counter(request.place for request in self.requests)

    def start(self) -> None:
        """Listen; once stopped, again at the same address."""
        handler = type("Handler", (_Handler,), {"simsat": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), handler)
        self._port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self._port}"
        self.stopped = threading.Event()
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """From now on connections are refused."""
        self.stopped.set()
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a body waits up to 40 ms for the acknowledgement of its header
    simsat: SimSatServer

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        arrived = time.monotonic()
        address = urlsplit(self.path)
        question = {name: float(value) for name, value in parse_qsl(address.query)}
        if address.path != "/data/image/mapbox":
            self.simsat.strays.append(self.path)
            self._reply(404, {"detail": "Not Found"})
            return
        names = {"lon_target", "lat_target", "lon_satellite", "lat_satellite", "alt_satellite"}
        if question.keys() != names or abs(question["lon_target"]) > 180 or abs(question["lat_target"]) > 90:
            self._reply(422, {"detail": [{"type": "missing or out of range"}]})
            return
        place = question["lon_target"], question["lat_target"]
        self.simsat.requests.append(Request(arrived, place, question))
        with suppress(BrokenPipeError, ConnectionResetError):  # a client may have heard enough
            self._send(next(self.simsat.scripts.get(place, iter(())), "picture"), self.simsat.picture(place))

    def _send(self, fault: str, picture: bytes) -> None:
        kind, _, rest = fault.partition(" after ")
        match kind:
            case "picture":
                self._answer(picture)
            case "white":
                self._answer(self.simsat.white)
            case "bare picture":  # a proxy drops headers with an underscore
                self._answer(picture, metadata=None)
            case "picture that is none":
                self._answer(picture, image_available=False)
            case "empty":
                self._answer(b"", image_available=False)
            case "bare empty":
                self._answer(b"", metadata=None)
            case "not visible":
                self._answer(b"", target_visible=False, image_available=False, zoom_factor=None)
            case "truncated":
                self._answer(picture[: len(picture) * 2 // 3])
            case "page":
                self._answer(b"<html>Please sign in to this network</html>")
            case "huge":
                self._answer(b"", length=10**12)
                while not self.simsat.stopped.is_set():
                    self.wfile.write(bytes(1_000_000))
            case "announces more":
                self._answer(picture, length=len(picture) + 1000)
            case "announces less":
                self._answer(picture, length=len(picture) - 1000)
            case "stall":
                self.close_connection = True
                self.simsat.stopped.wait(30)
            case "stall midway":
                self._answer(picture[: len(picture) // 2], length=len(picture))
                self.simsat.stopped.wait(30)
            case "drip":
                self._answer(picture[:1000], length=len(picture))
                self._drip()
            case "drip of headers":
                self.close_connection = True
                self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Wait: ")
                self._drip()
            case "reset":
                self._reset()
            case "reset midway":
                self._answer(picture[: len(picture) // 2], length=len(picture))
                self._reset()
            case "stop":
                self.simsat.stop()
                self._reset()
            case "elsewhere":
                self._reply(302, {}, Location=f"{self.simsat.url}/other?access_token={KEY}")
            case "key":
                asked = f"/styles/v1/mapbox/satellite-v9/static/0,0,14/1280x1280@2x?access_token={KEY}"
                reason = f"Max retries exceeded with url: {asked} (Caused by ConnectTimeoutError())"
                self._reply(500, {"detail": f"Error fetching Mapbox image: {reason}"})
            case _:  # "429", "429 after 2" (seconds), "503 after date 2"
                if rest.startswith("date "):
                    rest = formatdate(time.time() + float(rest.removeprefix("date ")), usegmt=True)
                headers = {"Retry-After": rest} if rest else {}
                self._reply(int(kind), {"detail": f"the answer of a scripted {kind}"}, **headers)

    def _drip(self) -> None:
        for _ in range(600):
            if not self.simsat.stopped.wait(0.1):
                self.wfile.write(b"0")

    def _answer(self, body: bytes, *, length: int | None = None, metadata: Any = (), **changes: Any) -> None:
        """200, `image/png` whatever the body is."""
        self.send_response(200)
        self.send_header("Content-Type", "image/png")
        self.send_header("Content-Length", str(len(body) if length is None else length))
        if metadata is not None:
            known = {"target_visible": True, "image_available": True, "elevation_degrees": 90.0, "pitch": 0.0}
            zoom = 13.92 + math.log2(560 / 500)
            self.send_header("mapbox_metadata", json.dumps({**known, "zoom_factor": zoom, "bearing": 0.0, **changes}))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = length is not None and length > len(body)

    def _reply(self, status: int, body: Any, **headers: str) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def _reset(self) -> None:
        """RST instead of FIN."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())


@functools.cache
def white_jpeg() -> bytes:
    """What Mapbox sends where it has no imagery: the same near-white tile everywhere."""
    buffer = io.BytesIO()
    Image.new("RGB", (2560, 2560), (249, 250, 250)).save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


@contextmanager
def serve(jpegs: Sequence[bytes]) -> Iterator[SimSatServer]:
    server = SimSatServer(jpegs)
    server.start()
    try:
        yield server
    finally:
        if not server.stopped.is_set():
            server.stop()
