"""llama.cpp's HTTP server: started on 127.0.0.1 with a key, asked, and always stopped."""

import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from orion_triage import processes
from orion_triage.errors import ServerError
from orion_triage.safe.children import tied

if TYPE_CHECKING:
    from orion_triage.llama_cpp.toolchain import Toolchain
from orion_triage.llama_cpp.client import Client

CONTEXT_TOKENS = 2048  # a frame takes under 600; the model's own 128,000 would cost 1.5 GB
# Evaluation, triage and flight serve alike. Flash attention off and one slot: faster for the tower's head size, and the
# numbers do not depend on load. The slot keeps what questions about one picture share; llama-server's cache of earlier
# prompts beside it holds frames that do not come again: 250 MB, and slower. No page, no slots, and no origin of a web
# page that a browser would let read an answer ("none" is no origin): what was asked is nobody else's business.
# Warnings only: a line a request fills a disk.
OPTIONS = (
    "--parallel", "1", "--ctx-size", str(CONTEXT_TOKENS), "--cache-ram", "0", "--flash-attn", "off",
    "--no-webui", "--no-slots", "--cors-origins", "none", "--no-cors-credentials", "--log-verbosity", "2",
)  # fmt: skip
START_SECONDS = 300


class Server:
    """A llama-server of our own for the length of a `with` block; `client` speaks to it."""

    def __init__(
        self,
        toolchain: "Toolchain",
        model: Path,
        mmproj: Path | None,
        *,
        log: Path,
        threads: int | None = None,
        options: Sequence[str] = OPTIONS,
    ) -> None:
        self._command = [str(toolchain.llama_server), "--model", str(model)]
        if mmproj is not None:
            self._command += ["--mmproj", str(mmproj)]
        if threads:
            self._command += ["--threads", str(threads)]
        self._command += options
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self.client: Client

    def __enter__(self) -> "Server":
        port, key = _free_port(), secrets.token_urlsafe(24)
        command = [*self._command, "--host", "127.0.0.1", "--port", str(port)]
        environment = {**os.environ, "LLAMA_API_KEY": key}  # not on the command line, where others could read it
        # Sleeping threads are for torch: here each token has hundreds of short waits, and decoding takes 2.6 x as long.
        environment.pop(processes.WAIT_POLICY, None)
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("wb") as file:
            # Not in the terminal's process group: Ctrl-C would stop it in the middle of a question, which then never
            # gets its reply, and whoever asked would wait for it before the server is stopped from here.
            self._process = subprocess.Popen(
                tied(command), stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        self.client = Client(f"http://127.0.0.1:{port}", key)
        try:
            self._wait()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        died = self._process is not None and self._process.poll() is not None
        self._stop()
        if died and isinstance(error, ServerError):
            raise ServerError(f"llama-server died: {self._tail()}", f"Its whole log: {self._log}") from None

    def peak_memory_bytes(self) -> int:
        """The most memory that the server's process has held so far, mapped files included."""
        assert self._process is not None
        status = Path(f"/proc/{self._process.pid}/status").read_text(encoding="utf-8")
        (kilobytes,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
        return int(kilobytes) * 1024

    def _wait(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + START_SECONDS
        while not self.client.is_ready():
            if self._process.poll() is not None:
                raise ServerError(f"llama-server did not start: {self._tail()}", f"Its whole log: {self._log}")
            if time.monotonic() > deadline:
                raise ServerError(f"llama-server is not ready after {START_SECONDS} s.", f"See {self._log}")
            time.sleep(0.1)

    def _tail(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return " | ".join(lines[-3:])

    def _stop(self) -> None:
        self.client.close()
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
