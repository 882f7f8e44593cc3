"""HTTP replies that end: over after so many seconds, in the head or in the body, however slowly they drip."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import httpx


class BoundedHttp:
    """An httpx client that is asked one thing at a time.

    httpx bounds the wait for each piece of a reply, of which a head alone can have thousands; so all of it is cut from
    outside, from another thread, and raises httpx.ReadTimeout.
    """

    def __init__(self, **options: Any) -> None:
        self._http = httpx.Client(**options)
        self.headers = self._http.headers
        self._socket: socket.socket | None = None

    def close(self) -> None:
        self._http.close()

    @contextmanager
    def stream(self, method: str, url: str, seconds: float, **options: Any) -> Iterator[httpx.Response]:
        """A reply as httpx streams it; `options` are those of httpx.Client.stream."""
        late = httpx.ReadTimeout(f"no whole reply in {seconds:g} s")
        deadline = time.monotonic() + seconds
        cut = threading.Timer(seconds, self._hang_up)
        cut.daemon = True
        cut.start()
        try:
            with self._http.stream(method, url, extensions={"trace": self._remember_socket}, **options) as reply:
                yield reply
        except httpx.TransportError:
            if time.monotonic() >= deadline:
                raise late from None
            raise
        finally:
            cut.cancel()
        if time.monotonic() >= deadline:  # a body without a length ends where it is cut
            raise late

    def _remember_socket(self, event: str, told: dict[str, Any]) -> None:
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            self._socket = told["return_value"].get_extra_info("socket")

    def _hang_up(self) -> None:
        if self._socket is not None:
            with suppress(OSError):  # closed already
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # TLS's own would end the reader otherwise
