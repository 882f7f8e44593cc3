"""Training on a server over ssh: upload, start, follow, download, clean up.

Both directions are scripts/upload_to_server.sh and scripts/download_weights.sh, which also work by themselves. What
runs on the server is scripts/on_server.sh, sent anew with every call. The training is a session of its own there, so a
lost connection does not end it; its folder runs/training-job in the repository holds log, pid and exit status.
"""

import io
import json
import os
import re
import shlex
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from orion_triage.errors import OrionError

Report = Callable[[str], None]  # takes one line for the user
Write = Callable[[bytes], None]  # takes a piece of the training's log

SETUP = "make setup"
_SSH = "ssh -o ServerAliveInterval=15 -o ServerAliveCountMax=4 -o ConnectTimeout=30"
_REFUSED = 3  # exit status of on_server.sh when it has named the reason
_NO_CONNECTION = 255  # ssh's own exit status
_RETRY_SECONDS = (1, 5, 15, 30, 60, 60, 60, 60, 60)  # a router restarts in two minutes; six cover most cuts
_HOST = re.compile(r"\w[\w.@%+-]*", re.ASCII)
_ANSWER = "orion: "
_LOG_BEGINS = b"orion: log begins\n"


class ScriptError(OrionError):
    """One of the scripts failed, and has said why on standard error."""


class ConnectionLostError(OrionError):
    """The server cannot be reached, or no longer."""


@dataclass(frozen=True)
class Server:
    """`host` and the words of the `ssh` command that reaches it; absolute paths there; `setup` makes .venv."""

    host: str
    ssh: tuple[str, ...]
    repository: str
    data: str
    setup: str = SETUP

    @property
    def job(self) -> str:
        return f"{self.repository}/runs/training-job"


@dataclass(frozen=True)
class Training:
    """What is trained: a preset (a shipped name, or the path and text of a TOML file), settings, and the run's name."""

    preset: str
    assignments: tuple[str, ...]
    run_name: str
    preset_text: str = ""

    def preset_file(self, server: Server) -> str:
        """Where the server keeps a preset that it does not have; empty for a shipped one."""
        return f"{server.job}/{Path(self.preset).name}" if self.preset_text else ""

    def arguments(self, server: Server) -> list[str]:
        """Of `orion dataset` and `orion fine-tune` on the server."""
        folder = json.dumps(server.data, ensure_ascii=False)  # as TOML reads it
        sets = [*self.assignments, "dataset.source=directory", f"dataset.folder={folder}"]
        preset = self.preset_file(server) or self.preset
        return ["--preset", preset, "--run", f"runs/{self.run_name}", *(word for s in sets for word in ("--set", s))]

    def identity(self, server: Server) -> str:
        """One line that tells this training from another one."""
        return json.dumps([*self.arguments(server), self.preset_text])

    def weights(self, server: Server) -> str:
        return f"{server.repository}/runs/{self.run_name}/orion_lora_weights"


@dataclass(frozen=True)
class Job:
    """The server's training: "lost" means that it is gone without an exit status, as after a restart."""

    state: Literal["none", "running", "ended", "lost"]
    identity: str = ""
    status: int = 0
    pid: int = 0


def scripts_folder() -> Path:
    """scripts/ of the clone that this package runs from."""
    folder = Path(__file__).parents[3] / "scripts"
    if not (folder / "on_server.sh").is_file():
        raise OrionError(
            f"{folder} does not exist: this installation is not a clone of the repository.",
            "Clone it, run 'make setup' there, and use its .venv/bin/orion.",
        )
    return folder


def server_of(host: str, environment: Mapping[str, str]) -> Server:
    """The server `host` with the paths that the environment gives, by the scripts' variables and defaults."""
    if not _HOST.fullmatch(host):  # ssh would take others for options
        raise OrionError(f"{host!r} names no server.", "Pass --server user@host, or set SERVER.")
    root = environment.get("ORION_SERVER_HDD_PATH", "")
    repository = environment.get("ORION_SERVER_REPO_PATH") or environment.get("ORION_REPO_DIR")
    data = environment.get("ORION_SERVER_DATA_PATH")
    if not root.startswith("/"):
        raise OrionError(
            f"ORION_SERVER_HDD_PATH={root} is not an absolute path.",
            "Set it to the server's folder for dataset and repository.",
        )
    return Server(
        host,
        tuple(shlex.split(environment.get("ORION_SSH") or _SSH)),
        repository or f"{root}/orion-triage",
        data or f"{root}/orion_data",
        environment.get("ORION_SERVER_SETUP") or SETUP,
    )


def training_of(preset: str, assignments: Sequence[str], run_name: str) -> Training:
    """The training with these settings; a TOML file's text travels along."""
    text = Path(preset).read_text(encoding="utf-8") if preset.endswith(".toml") else ""
    return Training(preset, tuple(assignments), run_name, text)


def train(
    server: Server,
    training: Training,
    dataset: Path,
    weights: Path,
    *,
    keep_remote: bool = False,
    again: bool = False,
    report: Report,
    write: Write,
) -> None:
    """Bring `dataset` to the server, train there, and put the adapter into `weights`; goes on wherever it was cut off.

    A training that runs already is followed, one that has ended is fetched; `again` starts a new one instead of
    fetching. Raises OrionError when another training is in the way, when it fails, or when a script does (ScriptError).
    """
    environment = {
        **os.environ,
        "SERVER": server.host,
        "ORION_SSH": shlex.join(server.ssh),
        "ORION_REPO_DIR": server.repository,
        "ORION_SERVER_REPO_PATH": server.repository,
        "ORION_SERVER_DATA_PATH": server.data,
        "ORION_SERVER_WEIGHTS_PATH": training.weights(server),
        "ORION_LOCAL_DATA_DIR": str(dataset.absolute()),
        "ORION_LOCAL_WEIGHTS_DIR": str(weights.absolute()),
    }
    if weights.with_name(f".{weights.name}.cleanup").exists() and not keep_remote:
        report(f"the last training's weights are here, and {server.host} is not cleaned up yet")
        _run_script("download_weights.sh", environment)
        report("the same command trains anew")
        return
    job = job_on(server)
    if _is_ours(job, server, training, again):
        report(f"{server.host} has this training already: {'it runs' if job.state == 'running' else 'it has ended'}")
    else:
        if job.state == "lost":
            report("the last training is gone without an exit status; it goes on from its last checkpoint")
        _run_script("upload_to_server.sh", environment)
        pid = start(server, training)
        report(f"training on {server.host} (to stop it there: kill -- -{pid})")
    _end_of(server, report, write)
    _run_script("download_weights.sh", environment, *(["--keep-remote"] if keep_remote else []))
    if keep_remote:
        _call(server, "forget", server.job)


def _is_ours(job: Job, server: Server, training: Training, again: bool) -> bool:
    """Whether the server's job is the one to follow; raises OrionError when it is another one, and worth keeping."""
    if job.state == "running" or (job.state == "ended" and not again):
        if job.identity == training.identity(server):
            return True
        words = shlex.join(json.loads(job.identity)[:-1])
        if job.state == "running":
            raise OrionError(
                f"another training runs on {server.host}: {words}",
                f"Wait for it, or stop it there: kill -- -{job.pid}",
            )
        if job.status == 0:
            raise OrionError(
                f"{server.host} has the weights of another training, which were not fetched: {words}",
                "Run this command with its settings to fetch them, or with --again to train anew.",
            )
    return False


def _end_of(server: Server, report: Report, write: Write) -> None:
    """Follow the log to the end of the training; raises OrionError unless that was a success."""
    try:
        follow(server, report, write)
    except KeyboardInterrupt:
        report(f"the training goes on on {server.host}; the same command follows it again")
        raise
    job = job_on(server)
    if job.state == "ended" and job.status == 0:
        return
    if job.state == "ended":
        _call(server, "forget", server.job)
        raise OrionError(
            f"the training on {server.host} failed with exit status {job.status}; its last lines are above.",
            "Mend what they say; the same command starts it again.",
        )
    raise OrionError(
        f"the training on {server.host} is gone without an exit status: killed, or the server restarted.",
        "The same command starts it again; it goes on from its last checkpoint.",
    )


def job_on(server: Server) -> Job:
    """The training that the server has, if any."""
    answers = _call(server, "job", server.job)
    state: Any = answers.get("state", "none")
    return Job(state, answers.get("command", ""), int(answers.get("status") or 0), int(answers.get("pid") or 0))


def start(server: Server, training: Training) -> int:
    """Start the training in a session of its own on the server; returns its process id there."""
    answers = _call(
        server,
        "start",
        server.job,
        server.repository,
        server.setup,
        training.identity(server),
        training.preset_file(server),
        training.preset_text,
        *training.arguments(server),
    )
    return int(answers["pid"])


def follow(server: Server, report: Report, write: Write) -> None:
    """Hand on the log, each byte once, until the training has ended; a lost connection is taken up again."""
    received, failures = 0, 0
    while True:
        try:
            running = job_on(server).state == "running"
            count, held = _follow_once(server, received, write)
            received += count
            if held and not running:
                return
            failures = 0
        except ConnectionLostError:
            if failures == len(_RETRY_SECONDS):
                raise ConnectionLostError(
                    f"{server.host} cannot be reached any more; the training goes on there.",
                    "The same command follows it again.",
                ) from None
            report(f"no connection to {server.host}: trying again in {_RETRY_SECONDS[failures]} s")
            time.sleep(_RETRY_SECONDS[failures])
            failures += 1


def _follow_once(server: Server, received: int, write: Write) -> tuple[int, bool]:
    """Hand on the log after `received` bytes; returns how many those were, and whether the connection held."""
    process = subprocess.Popen([*server.ssh, server.host, "sh -s"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert isinstance(process.stdout, io.BufferedReader)
    count, before = 0, b""
    with process, suppress(BrokenPipeError):
        process.stdin.write(_program("follow", server.job, str(received)))
        process.stdin.close()
        while _LOG_BEGINS not in before:
            piece = process.stdout.read1()
            if not piece:
                break
            before += piece
        piece = before.partition(_LOG_BEGINS)[2] or process.stdout.read1()
        while piece:
            write(piece)
            count += len(piece)
            piece = process.stdout.read1()
    return count, process.returncode != _NO_CONNECTION


def _call(server: Server, operation: str, *arguments: str) -> dict[str, str]:
    """Do one operation of on_server.sh there; returns its answers."""
    result = subprocess.run(
        [*server.ssh, server.host, "sh -s"],
        input=_program(operation, *arguments),
        capture_output=True,
        check=False,
    )
    said = result.stderr.decode(errors="replace").strip()
    if result.returncode == _NO_CONNECTION:
        reason = said.splitlines()[-1] if said else "no reason given"
        raise ConnectionLostError(
            f"the connection to {server.host} failed or was cut: {reason}",
            f"See that '{shlex.join(server.ssh)} {server.host} true' works, then run the same command again.",
        )
    if result.returncode == _REFUSED:
        message, _, fix = said.partition("\n  fix: ")
        raise OrionError(message.partition("error: ")[2], fix)
    if result.returncode:
        raise OrionError(
            f"{server.host} could not do {operation!r} (exit status {result.returncode}): {said}",
            "Mend that there, then run the same command again.",
        )
    lines = result.stdout.decode(errors="replace").splitlines()
    return dict(line.removeprefix(_ANSWER).split(" ", 1) for line in lines if line.startswith(_ANSWER))


def _program(operation: str, *arguments: str) -> bytes:
    """on_server.sh and one call of it, for `sh -s`: no login shell has to understand any quoting."""
    call = shlex.join(["operate", operation, *arguments])
    return (scripts_folder() / "on_server.sh").read_bytes() + os.fsencode(f"{call} </dev/null\n")


def _run_script(name: str, environment: dict[str, str], *options: str) -> None:
    status = subprocess.run([scripts_folder() / name, *options], env=environment, check=False).returncode
    if status:
        raise ScriptError(f"{name} ended with exit status {status}.", "Do what it says, then run the same command.")
