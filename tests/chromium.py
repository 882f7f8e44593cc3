"""Headless Chromium for tests: opens a file, reports what it did, measures and pictures it.

It speaks the DevTools protocol over the two pipes of --remote-debugging-pipe (one JSON object, one zero byte), which
needs nothing but the standard library. --screenshot and --dump-dom would need no protocol, but windows under 500
pixels, the dark scheme, network requests and console messages can only be had through it.
"""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

INSTALL = "apt-get update && apt-get install -y chromium"
_SECONDS = 300


class Chromium:
    """One browser with one tab; `requests` are the addresses it asked for, `complaints` what its console said."""

    def __init__(self, profile: Path) -> None:
        program = shutil.which("chromium")
        if program is None:
            pytest.fail(f"chromium is not on PATH. Install it: {INSTALL}", pytrace=False)
        from_us, self._to_it = os.pipe()
        self._from_it, to_us = os.pipe()
        self._read = b""
        self._number = 0
        self.requests: list[str] = []
        self.complaints: list[str] = []
        # The browser reads descriptor 3 and writes 4; copies above 10 cannot be in the way of either.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (from_us, to_us)]
        self._process = subprocess.Popen(
            [
                *("bash", "-c", f'exec "$@" 3<&{ends[0]} 4>&{ends[1]}', "chromium", program),
                *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
                *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars"),
                *("--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"),
            ],
            pass_fds=ends,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (from_us, to_us, *ends):
            os.close(end)
        target = self._ask("Target.createTarget", {"url": "about:blank"}, session=None)["targetId"]
        self._session: str | None = None
        attached = self._ask("Target.attachToTarget", {"targetId": target, "flatten": True}, session=None)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        os.close(self._to_it)  # the browser ends with its pipe
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._from_it)

    def open(self, path: Path, *, width: int, height: int, dark: bool) -> None:
        """Load the file and wait until it has loaded; phones are narrower than 600 pixels."""
        self.requests, self.complaints = [], []
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **screen)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self._loaded = False
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not self._loaded:
            self._hear(self._receive())
        # What the page did at its end is said before the answer to a later question.
        self.evaluate("new Promise(done => requestAnimationFrame(() => setTimeout(done, 100)))")

    def evaluate(self, script: str) -> Any:
        """The value of a script's last expression in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def picture(self, path: Path) -> None:
        """The whole page as a PNG."""
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._ask(method, parameters, self._session)

    def _ask(self, method: str, parameters: dict[str, Any], session: str | None) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        line = json.dumps(message | ({"sessionId": session} if session else {}))
        os.write(self._to_it, line.encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self._hear(answer)

    def _hear(self, event: dict[str, Any]) -> None:
        method, said = event.get("method"), event.get("params", {})
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Network.requestWillBeSent":
            self.requests.append(said["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(said["exceptionDetails"]["text"])
        elif method == "Runtime.consoleAPICalled":
            self.complaints.append(" ".join(str(part.get("value")) for part in said["args"]))
        elif method == "Log.entryAdded":
            self.complaints.append(said["entry"]["text"])

    def _receive(self) -> dict[str, Any]:
        deadline = time.monotonic() + _SECONDS
        while b"\0" not in self._read:
            ready, _, _ = select.select([self._from_it], [], [], max(0, deadline - time.monotonic()))
            part = os.read(self._from_it, 1 << 20) if ready else b""
            assert part, f"chromium {'ended' if ready else f'said nothing for {_SECONDS} s'}"
            self._read += part
        line, _, self._read = self._read.partition(b"\0")
        return json.loads(line)
