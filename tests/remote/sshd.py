"""A training server on 127.0.0.1: OpenSSH's own sshd with keys and a home of its own, behind a wire that can be cut.

The session's home, host key, user key and known_hosts lie in the server's folder; nothing of the account that runs the
tests is read. `tools` comes first on the server's PATH.
"""

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

INSTALL = "apt-get update && apt-get install -y openssh-server openssh-client rsync git zstd"
_SECONDS = 300


def program(name: str, install: str = INSTALL) -> str:
    """The path of a program that the tests cannot do without."""
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
    if found is None:
        pytest.fail(f"{name} is not on PATH. Install it: {install}", pytrace=False)
    return found


def wait_until(is_so: Callable[[], bool]) -> None:
    """Ask again until it is so; raises TimeoutError after five minutes."""
    deadline = time.monotonic() + _SECONDS
    while not is_so():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not so after {_SECONDS} s")
        time.sleep(0.01)


class Wire:
    """A TCP relay to the server that counts bytes both ways and does `at_bytes` to the connection it has counted."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.bytes = 0
        self._lock = threading.Lock()
        self._action: tuple[int, Callable[[], None]] | None = None
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def at_bytes(self, count: int, action: Callable[[], None]) -> None:
        """Start counting, and do it once when so many bytes have passed."""
        with self._lock:
            self.bytes, self._action = 0, (count, action)

    def leave_alone(self) -> None:
        with self._lock:
            self.bytes, self._action = 0, None

    def cut(self) -> None:
        """Every connection breaks off now."""
        with self._lock:
            connections, self._open = self._open, []
        for connection in connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:  # sshd is not up yet
                client.close()
                continue
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._open += [client, server]
            for source, sink in ((client, server), (server, client)):
                threading.Thread(target=self._relay, args=(source, sink), daemon=True).start()

    def _relay(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(8192):
                # An acknowledgement held back costs the sender, who waits for it, 40 ms.
                source.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
                action = None
                with self._lock:
                    self.bytes += len(data)
                    if self._action and self.bytes >= self._action[0]:
                        data = data[: len(data) - (self.bytes - self._action[0])]
                        action, self._action = self._action[1], None
                sink.sendall(data)
                if action:
                    action()
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


class Server:
    """`home` is the session's; `ssh` is the command that reaches it, through `wire`."""

    def __init__(self, folder: Path) -> None:
        sshd, keygen = program("sshd"), program("ssh-keygen")
        for name in ("ssh", "rsync", "git", "zstd"):
            program(name)
        self.folder, self.home, self.tools = folder, folder / "home", folder / "tools"
        self.home.mkdir(parents=True)
        self.tools.mkdir()
        for key in ("host", "user", "other"):
            subprocess.run([keygen, "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)  # sshd gives up its rights there
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        # The tests' own Python is one that `make setup` can use.
        path = f"{self.tools}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        (folder / "sshd_config").write_text(
            f"""
            ListenAddress 127.0.0.1:{port}
            HostKey "{folder}/host"
            AuthorizedKeysFile "{folder}/user.pub"
            PidFile none
            StrictModes no
            UsePAM no
            UseDNS no
            PasswordAuthentication no
            KbdInteractiveAuthentication no
            PermitRootLogin prohibit-password
            MaxStartups 100
            SetEnv "HOME={self.home}" "PATH={path}" HF_HUB_OFFLINE=1
            """
        )
        self._log = (folder / "sshd.log").open("wb")
        self._process = subprocess.Popen(
            [sshd, "-D", "-e", "-f", folder / "sshd_config"], stderr=self._log, stdin=subprocess.DEVNULL
        )
        self.wire = Wire(port)
        self.trust("host")
        self._wait()

    @property
    def address(self) -> str:
        return "127.0.0.1"

    @property
    def ssh(self) -> str:
        return self.ssh_with("user")

    def ssh_with(self, key: str) -> str:
        options = {
            "IdentitiesOnly": "yes",
            "IdentityAgent": "none",
            "BatchMode": "yes",
            "StrictHostKeyChecking": "yes",
            "UserKnownHostsFile": f'"{self.folder}/known_hosts"',
            "LogLevel": "ERROR",
            "KexAlgorithms": "curve25519-sha256",  # the default takes twice the time of a whole connection here
        }
        words = ["ssh", "-F", "none", "-p", str(self.wire.port), "-i", str(self.folder / key)]
        return shlex.join([*words, *(word for item in options.items() for word in ("-o", "{}={}".format(*item)))])

    def trust(self, key: str) -> None:
        """Write down the host key that the client expects: "host" is the server's."""
        kind, text = (self.folder / f"{key}.pub").read_text().split()[:2]
        (self.folder / "known_hosts").write_text(f"[127.0.0.1]:{self.wire.port} {kind} {text}\n")

    def sessions(self) -> list[int]:
        """The processes that serve connections now, with all that they started and did not set apart."""
        return _descendants(self._process.pid)

    def commands(self) -> list[str]:
        """What these processes were started with."""
        found = []
        for process in self.sessions():
            with suppress(OSError):  # gone meanwhile
                found.append(Path(f"/proc/{process}/cmdline").read_text().replace("\0", " "))
        return found

    def kill_sessions(self) -> None:
        """As if the server's power failed: nothing of these sessions gets to do another thing."""
        for _ in range(3):  # what was being started meanwhile
            for process in self.sessions():
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)

    def wait_until_quiet(self) -> None:
        """Return when no session is left, so that a test looks at what the last one left."""
        wait_until(lambda: not self.sessions())

    def log(self) -> str:
        return (self.folder / "sshd.log").read_text(errors="replace")

    def close(self) -> None:
        self.wire.close()
        self.kill_sessions()
        self._process.terminate()
        self._process.wait(_SECONDS)
        self._log.close()

    def _wait(self) -> None:
        deadline = time.monotonic() + _SECONDS
        while subprocess.run([*shlex.split(self.ssh), self.address, "true"], capture_output=True).returncode:
            if time.monotonic() > deadline or self._process.poll() is not None:
                pytest.fail(f"sshd does not answer:\n{self.log()}", pytrace=False)
            time.sleep(0.1)


def _descendants(process: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if fields[0] != "Z":
                children.setdefault(int(fields[1]), []).append(int(folder.name))
    found, ahead = [], [process]
    while ahead:
        ahead = [child for parent in ahead for child in children.get(parent, [])]
        found += ahead
    return found


@contextmanager
def running_server(folder: Path) -> Iterator[Server]:
    server = Server(folder)
    try:
        yield server
    finally:
        server.close()
