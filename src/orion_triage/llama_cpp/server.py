"""A llama.cpp HTTP server, started on 127.0.0.1 with a key and always stopped."""

import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from orion_triage.errors import ServerError
from orion_triage.safe import children
from orion_triage.safe.children import tied

if TYPE_CHECKING:
    from orion_triage.llama_cpp.toolchain import Toolchain
from orion_triage.llama_cpp.client import Client, Turn

CONTEXT_TOKENS = 2048  # a frame takes fewer than 600; the model's default of 128,000 would cost 1.5 GB
# Evaluation, triage and flight use the same options. Reasons:
# - Flash attention off, one slot: faster for the tower's head size, and the numbers do not depend on the load.
# - No --cache-ram: the slot already caches what questions about one image share. llama-server's additional cache of
#   earlier prompts holds frames that do not come again; it costs 250 MB and is slower.
# - No web page, no /slots, no CORS origin ("none" is not a valid origin): other programs must not read the prompts.
# - Only warnings in the log: one line per request would fill a disk.
OPTIONS = (
    "--parallel", "1", "--ctx-size", str(CONTEXT_TOKENS), "--cache-ram", "0", "--flash-attn", "off",
    "--no-webui", "--no-slots", "--cors-origins", "none", "--no-cors-credentials", "--log-verbosity", "2",
)  # fmt: skip
START_SECONDS = 300


class Server:
    """A llama-server that runs during a `with` block; `client` is connected to it, and asks with `turn`.

    Raises ServerError if it does not start within START_SECONDS or ends during the block.
    """

    def __init__(
        self,
        toolchain: "Toolchain",
        model: Path,
        mmproj: Path | None,
        *,
        log: Path,
        turn: Turn | None = None,
        threads: int | None = None,
        options: Sequence[str] = OPTIONS,
    ) -> None:
        self._command = [str(toolchain.llama_server), "--model", str(model)]
        if mmproj is not None:
            self._command += ["--mmproj", str(mmproj)]
        # The environment is not handed on, so OpenMP's usual variable is passed by name.
        if threads := threads or _threads_of_environment():
            self._command += ["--threads", str(threads)]
        self._command += options
        self._expected: dict[str, Any] = {"model_path": str(model), "vision": mmproj is not None}
        self._expected |= {"context_tokens": CONTEXT_TOKENS, "slots": 1} if options is OPTIONS else {}
        # What the manifest records: this, and what the server says of itself once it runs.
        self.said: dict[str, Any] = {"threads": threads, "mmproj_path": str(mmproj) if mmproj else None}
        self._log, self._turn = log, turn
        self._process: subprocess.Popen[bytes] | None = None
        self.client: Client

    def __enter__(self) -> "Server":
        port, key = _free_port(), secrets.token_urlsafe(24)
        command = [*self._command, "--host", "127.0.0.1", "--port", str(port)]
        environment = children.environment(LLAMA_API_KEY=key)  # a command line can be read by other users
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("wb") as file:
            # Not in the terminal's process group: Ctrl-C would stop the server during a request, and the client would
            # wait for a reply that never comes.
            self._process = subprocess.Popen(
                tied(command), stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        self.client = Client(f"http://127.0.0.1:{port}", key, turn=self._turn)
        try:
            self._wait()
            self._check()
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
            raise ServerError(f"llama-server died: {self._tail()}", f"Read its log: {self._log}") from None

    def peak_memory_bytes(self) -> int:
        """The peak resident memory of the server's process so far, including mapped files."""
        assert self._process is not None
        status = Path(f"/proc/{self._process.pid}/status").read_text(encoding="utf-8")
        (kilobytes,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
        return int(kilobytes) * 1024

    def _wait(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + START_SECONDS
        while not self.client.is_ready():
            if self._process.poll() is not None:
                raise ServerError(f"llama-server did not start: {self._tail()}", f"Read its log: {self._log}")
            if time.monotonic() > deadline:
                address = self.client.base_url.removeprefix("http://")
                raise ServerError(
                    f"llama-server did not answer on {address} within {START_SECONDS} s; last log line: "
                    f"{self._tail(1) or '(the log is empty)'}.",
                    f"Read its log: {self._log}",
                )
            time.sleep(0.1)

    def _check(self) -> None:
        """Compare what the server says of itself with what was asked for."""
        self.said |= said_of_itself(self.client.props())
        for name, expected in self._expected.items():
            if self.said[name] != expected:
                raise ServerError(
                    f"llama-server has {name} {self.said[name]} instead of {expected}.", f"Read its log: {self._log}"
                )

    def _tail(self, count: int = 3) -> str:
        """The last lines of the server's log."""
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return " | ".join(lines[-count:])

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


def said_of_itself(props: dict[str, Any]) -> dict[str, Any]:
    """What a llama.cpp server's /props says of model, build and context, under names of our own."""
    settings = props.get("default_generation_settings")
    settings = settings if isinstance(settings, dict) else {}
    parameters = settings.get("params")
    parameters = parameters if isinstance(parameters, dict) else {}
    modalities = props.get("modalities")
    return {
        "model_path": str(props.get("model_path")),
        "model_type": props.get("model_ftype"),
        "build": props.get("build_info"),
        "context_tokens": settings.get("n_ctx"),
        "slots": props.get("total_slots"),
        "vision": isinstance(modalities, dict) and modalities.get("vision") is True,
        "adapters": parameters.get("lora", []),
    }


def _threads_of_environment() -> int | None:
    """OMP_NUM_THREADS, if it is a number."""
    value = os.environ.get("OMP_NUM_THREADS", "")
    return int(value) if value.isdecimal() and int(value) > 0 else None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
