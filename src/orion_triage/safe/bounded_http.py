"""HTTP requests with a limit on the total time of the reply, headers and body, however slowly the bytes arrive."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from orion_triage.safe.proxies import proxy_for


class BoundedHttp:
    """An httpx client of the server at `url`, for one request at a time; `proxy` is the one that it goes through.

    Raises OrionError if the environment names a proxy for `url` that cannot be used.

    httpx limits only the wait for each piece of a reply, and the headers alone can arrive in thousands of pieces. A
    timer thread therefore closes the socket at the deadline; the request then raises httpx.ReadTimeout.
    """

    def __init__(self, url: str, **options: Any) -> None:
        self.proxy = proxy_for(url)
        # trust_env would read the proxies of the environment once more, and apply them to 127.0.0.1 too.
        self._http = httpx.Client(
            proxy=self.proxy.url if self.proxy else None,
            verify=httpx.create_ssl_context(),  # with SSL_CERT_FILE and SSL_CERT_DIR
            trust_env=False,
            **options,
        )
        self.headers = self._http.headers
        self._socket: socket.socket | None = None

    def close(self) -> None:
        self._http.close()

    @contextmanager
    def stream(self, method: str, url: str, seconds: float, **options: Any) -> Iterator[httpx.Response]:
        """The streamed reply, limited to `seconds` in total; `options` are those of httpx.Client.stream.

        Raises httpx.TransportError, and httpx.ReadTimeout after `seconds`.
        """
        late = httpx.ReadTimeout(f"the reply was not complete after {seconds:g} s")
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
        if time.monotonic() >= deadline:  # a cut body without Content-Length looks complete to httpx
            raise late

    def _remember_socket(self, event: str, info: dict[str, Any]) -> None:
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            self._socket = info["return_value"].get_extra_info("socket")

    def _hang_up(self) -> None:
        if self._socket is not None:
            with suppress(OSError):  # already closed
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # SSLSocket.shutdown would break the reader


def retry_after_seconds(value: str) -> float:
    """Seconds to wait by Retry-After, which is a number or a date; 0 if it is neither."""
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError, OverflowError):
        return 0.0
