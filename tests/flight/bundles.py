"""A bundle's checker run for the tests, and a stub of the server that it asks."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from PIL import Image

from orion_triage.flight import check_flight
from orion_triage.llama_cpp.client import Client
from orion_triage.mission.verdict import CATEGORY_CUE
from orion_triage.safe.files import sha256_of_file
from tests.conftest import structured_picture

LABELS = {"HIGH": 10, "MEDIUM": 11, "LOW": 12}  # of the stub


def check(folder: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """The bundle's own checker in an isolated interpreter: no site-packages, no environment, another directory."""
    command = [sys.executable, "-I", "-S", str(folder / "check_flight.py"), *map(str, arguments)]
    # One thread: llama.cpp's wait for each other actively, which is slow beside other work; the numbers are the same.
    environment = {"PATH": os.environ["PATH"], "ORION_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/", timeout=600, check=False)


def checked(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The same checker in this process: what takes longest of a check of a stub is an interpreter's start."""
    out, err = io.StringIO(), io.StringIO()
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    words = ["--bundle", str(folder), *map(str, arguments)]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            status = check_flight.main(words)
    except SystemExit as end:
        status = int(end.code or 0)
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())


def assert_no_go(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode == 1, result.stdout + result.stderr
    assert result.stderr == ""
    last = result.stdout.rstrip("\n").splitlines()[-1]
    assert last.startswith("NO-GO: ")
    for word in words:
        assert word in last


def sign(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change bundle.json as if it had been made so."""
    path = folder / "bundle.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    (folder / "bundle.json.sha256").write_text(f"{sha256_of_file(path)}  bundle.json\n")


RISK = "rehearsal: the base is not fine-tuned"


def key_of(client: Client) -> str:
    return str(client._http.headers["Authorization"]).removeprefix("Bearer ")


def program_at(folder: Path, line: str) -> Path:
    path = folder / "llama-server"
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)
    return path


class Stub(BaseHTTPRequestHandler):
    """Answers as llama-server would, but at the path `broken` as `how` does."""

    broken, how = "", ""
    answer = '{"reason": "Sand.", "category": "LOW"}'
    log_probabilities: object = -1.0
    model_path, build_info = "stub.gguf", "b1-stub"
    keeps_to_grammars, broken_picture = True, False
    seconds = 0.0  # of a request about a picture
    seen: list[tuple[str, dict[str, Any]]]

    def do_GET(self) -> None:
        self._reply({})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).seen.append((self.path, body))
        self._reply(body)

    def _reply(self, body: dict[str, Any]) -> None:
        if self.path == self.broken:
            self._break()
            return
        head, _, tail = self.answer.partition(CATEGORY_CUE)
        if "prompt" in body and isinstance(body["prompt"], str):  # whether the server keeps to a grammar
            head = tail = str(body["grammar"]).split('"')[1] if self.keeps_to_grammars else "The quick brown fox"
        elif "prompt" in body:
            time.sleep(self.seconds)
            if self.broken_picture:
                self._break()
                return
        listed = [{"id": token, "logprob": self.log_probabilities} for token in LABELS.values()]
        value: dict[str, Any] = {
            "content": head if "stop" in body else tail,
            "tokens_predicted": 7,
            "tokens_evaluated": 30,
            "stopping_word": CATEGORY_CUE,
            "completion_probabilities": [{"top_logprobs": listed}],
            "build_info": self.build_info,
            "media_marker": "<__media_x__>",
            "model_path": self.model_path,
        }
        self._send(200, json.dumps(value).encode())

    def _send(self, status: int, data: bytes, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length or len(data)))
        for name, text in headers.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(data)

    def _break(self) -> None:
        if self.how == "stalls":
            time.sleep(60)  # and hangs up, which is told from a limit that was kept
        elif self.how == "drips":
            self._send(200, b"", 1000)
            for _ in range(120):
                self.wfile.write(b" ")
                time.sleep(0.5)
        elif self.how == "hangs up":
            self.connection.shutdown(socket.SHUT_RDWR)
        elif self.how == "no HTTP":
            self.wfile.write(b"SSH-2.0-OpenSSH_9.2\r\n")
        elif self.how == "cut":
            self._send(200, b'{"content": "{', 5000)
        elif self.how == "moved":
            self._send(302, b"", Location="http://127.0.0.1:1/")
        elif self.how == "html":
            self._send(200, b"<html><body>log in</body></html>")
        elif self.how == "half":
            self._send(200, b'{"content": "{')
        elif self.how == "nested":
            self._send(200, b'{"content": ' + b"[" * 100_000)
        elif self.how == "empty":
            self._send(200, b"{}")
        else:
            self._send(int(self.how), b"no")

    def log_message(self, format: str, *args: object) -> None:
        return


@contextmanager
def stub(**attributes: object) -> Iterator[str]:
    handler = type("_Configured", (Stub,), {**attributes, "seen": attributes.get("seen", [])})

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            return

    httpd = Quiet(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=httpd.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}"
    finally:
        httpd.shutdown()
        httpd.server_close()


def tinted(number: int) -> Image.Image:
    tint = Image.new("RGB", (512, 512), tuple(200 if band == number % 3 else 60 for band in range(3)))
    return Image.blend(structured_picture(number), tint, 0.7)
