"""A small STAC API on 127.0.0.1 with cloud-optimized GeoTIFFs behind it, for pystac-client and GDAL to talk to.

It answers as the specification says (root, sorted and paged item search by POST, range requests) and refuses what it
does not know. Faults are queued by request: `faults["GET /a/scl.tif"] = iter(["503", "cut"])`: a status, `cut` in the
middle, `page` (HTML instead), `stall`.
"""

import json
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio import Affine
from rasterio.warp import transform

CONFORMANCE = [f"https://api.stacspec.org/v1.0.0/{part}" for part in ("core", "item-search", "item-search#sort")]
STALL_SECONDS = 120


def positions(side: int) -> NDArray[np.uint8]:
    """A picture (3, side, side) in which every pixel says where it is; `position_of` reads it. No value is 0."""
    rows, columns = np.indices((side, side))
    return np.stack([1 + columns % 250, 1 + rows % 250, 1 + rows // 250 * 15 + columns // 250]).astype(np.uint8)


def position_of(pixel: NDArray[np.uint8]) -> tuple[int, int]:
    """Row and column of a pixel of `positions`."""
    column, row, hundreds = (int(value) - 1 for value in pixel)
    return hundreds // 15 * 250 + row, hundreds % 15 * 250 + column


def write_cog(path: Path, pixels: NDArray[Any], epsg: int, left: float, top: float, metres: int) -> None:
    bands, height, width = pixels.shape
    place = {"crs": f"EPSG:{epsg}", "transform": Affine(metres, 0, left, 0, -metres, top)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(
        path, "w", driver="COG", width=width, height=height, count=bands, dtype=pixels.dtype, blocksize=256, **place
    ) as raster:
        raster.write(pixels)


class Stac:
    """The catalogue's content and what it was asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.items: list[dict[str, Any]] = []
        self.ground: dict[str, tuple[int, float, float, int]] = {}  # item -> EPSG, left, top, side in metres
        self.requests: list[str] = []
        self.bytes_served: Counter[str] = Counter()
        self.faults: dict[str, Iterator[str]] = {}
        self.stalls_waited_for = 0  # by a client that did not give up
        self.conformance = CONFORMANCE
        self.url = ""
        self.stop: Callable[[], None]

    def add(
        self,
        name: str,
        around: tuple[float, float],
        *,
        epsg: int,
        scl: NDArray[np.uint8] | int = 4,
        visual: NDArray[np.uint8] | None = None,
        cloud_cover: float | None = 0.0,
        when: str = "2024-06-01T10:20:30.456Z",
        shift: tuple[int, int] = (0, 0),
        side: int = 640,
    ) -> dict[str, Any]:
        """A scene of `side` pixels of 10 m with the place `around` in its middle, moved by `shift` pixels (x, y).

        `scl` is one class everywhere, or the (side/2, side/2) classes. Returns its item, to be changed at will.
        """
        (x,), (y,) = transform("EPSG:4326", f"EPSG:{epsg}", [around[0]], [around[1]])
        left = round(x / 20) * 20.0 + (shift[0] - side // 2) * 10
        top = round(y / 20) * 20.0 - (shift[1] - side // 2) * 10
        classes = np.full((side // 2, side // 2), scl, np.uint8) if isinstance(scl, int) else scl
        write_cog(self.folder / name / "scl.tif", classes[None], epsg, left, top, 20)
        write_cog(self.folder / name / "visual.tif", positions(side) if visual is None else visual, epsg, left, top, 10)
        self.ground[name] = (epsg, left, top, side * 10)
        properties = {"datetime": when} | ({} if cloud_cover is None else {"eo:cloud_cover": cloud_cover})
        item = {
            "type": "Feature",
            "stac_version": "1.0.0",
            "id": name,
            "collection": "sentinel-2-l2a",
            "geometry": {"type": "Point", "coordinates": list(around)},
            "bbox": [*around, *around],
            "properties": properties,
            "links": [],
            "assets": {asset: {"href": f"{self.url}/{name}/{asset}.tif"} for asset in ("scl", "visual")},
        }
        self.items.append(item)
        return item

    def shows(self, item: dict[str, Any], lon: float, lat: float) -> bool:
        epsg, left, top, side = self.ground[item["id"]]
        (x,), (y,) = transform("EPSG:4326", f"EPSG:{epsg}", [lon], [lat])
        return 0 <= x - left < side and 0 <= top - y < side

    def search(self, asked: dict[str, Any]) -> dict[str, Any]:
        known = {"collections", "intersects", "datetime", "sortby", "limit", "token"}
        if set(asked) - known or asked["intersects"]["type"] != "Point":
            raise ValueError(f"unknown: {asked}")
        start, end = map(datetime.fromisoformat, asked["datetime"].split("/"))
        lon, lat = asked["intersects"]["coordinates"]
        found = [
            item
            for item in self.items
            if item["collection"] in asked["collections"]
            and start <= datetime.fromisoformat(item["properties"]["datetime"] or asked["datetime"][:20]) <= end
            and self.shows(item, lon, lat)
        ]
        for rule in reversed(asked["sortby"]):
            key = rule["field"].removeprefix("properties.")
            # Items without the property come last, as in OpenSearch.
            found.sort(
                key=lambda item: (key not in item | item["properties"], (item | item["properties"]).get(key)),
                reverse=rule["direction"] == "desc",
            )
        first = int(asked.get("token", 0))
        last = first + asked["limit"]
        following = {"rel": "next", "href": f"{self.url}/search", "method": "POST", "body": {**asked, "token": last}}
        links = [following] if last < len(found) else []
        return {"type": "FeatureCollection", "features": found[first:last], "links": links}

    def root(self) -> dict[str, Any]:
        search = {"rel": "search", "href": f"{self.url}/search", "type": "application/geo+json", "method": "POST"}
        return {
            "type": "Catalog",
            "stac_version": "1.0.0",
            "id": "small",
            "description": "A few scenes.",
            "conformsTo": self.conformance,
            "links": [{"rel": "self", "href": f"{self.url}/"}, {"rel": "root", "href": f"{self.url}/"}, search],
        }


@contextmanager
def serve(folder: Path) -> Iterator[Stac]:
    """A running server; `stac.stop()` ends it early, and then nothing listens on its port."""
    stac = Stac(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else a body waits up to 40 ms for the acknowledgement of its header

        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def do_POST(self) -> None:
            self.answer(self.rfile.read(int(self.headers["Content-Length"])))

        def answer(self, body: bytes = b"") -> None:
            request = f"{self.command} {self.path}"
            stac.requests.append(request)
            fault = next(stac.faults.get(request, iter(())), "")
            if fault == "stall":
                stac.stalls_waited_for += not stopping.wait(STALL_SECONDS)
                self.close_connection = True
            elif fault.isdigit():
                self.send(int(fault), b"")
            elif self.path in ("/", "/search"):
                try:
                    answer = stac.search(json.loads(body)) if body else stac.root()
                    self.send(200, json.dumps(answer).encode(), fault)
                except (ValueError, KeyError) as error:
                    self.send(400, str(error).encode())
            elif (path := stac.folder / self.path[1:]).is_file():
                self.send_file(path.read_bytes(), fault)
            else:
                self.send(404, b"")

        def send_file(self, data: bytes, fault: str) -> None:
            asked = self.headers.get("Range")
            if asked is None:
                self.send(200, data, fault)
                return
            first, _, last = asked.removeprefix("bytes=").partition("-")
            end = min(int(last or len(data)), len(data) - 1) + 1
            part = f"bytes {first}-{end - 1}/{len(data)}"
            self.send(206, data[int(first) : end], fault, {"Content-Range": part})

        def send(self, status: int, data: bytes, fault: str = "", headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for key, value in {"Accept-Ranges": "bytes", "Content-Length": str(len(data)), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            if fault == "page":
                data = b"<html>".ljust(len(data))
            if fault == "cut":
                data = data[: len(data) // 2]
                self.close_connection = True
            stac.bytes_served[self.path] += len(data)
            self.wfile.write(data)

    connections: list[socket.socket] = []
    stopping = threading.Event()

    class Server(ThreadingHTTPServer):
        def process_request(self, request: Any, client_address: Any) -> None:
            connections.append(request)
            super().process_request(request, client_address)

        def handle_error(self, *_: Any) -> None:
            """A client that hung up is no fault of the test."""

    server = Server(("127.0.0.1", 0), Handler)
    stac.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()

    def stop() -> None:
        stopping.set()
        server.shutdown()
        for connection in connections:  # clients keep theirs open
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        server.server_close()
        thread.join()

    stac.stop = stop
    try:
        yield stac
    finally:
        if thread.is_alive():
            stop()
