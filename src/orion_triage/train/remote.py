"""Training on a server over ssh: upload, start, follow, download, clean up.

The transfers are scripts/upload_to_server.sh and scripts/download_weights.sh, which can also be used alone. The
server's part is scripts/on_server.sh, which is sent with every call. On the server, the training runs in a separate
session, so a lost connection does not end it. Its folder runs/training-job in the repository contains log, pid and
exit status.
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

from orion_triage import hub
from orion_triage.errors import OrionError
from orion_triage.imagery.camera import SHIPPED
from orion_triage.models.load import TINY_BASE
from orion_triage.settings import Settings, as_assignment, differences, load_settings, preset_names

Report = Callable[[str], None]  # takes one line for the user
Write = Callable[[bytes], None]  # takes a piece of the training's log

SETUP = "make setup"
_SSH = "ssh -o ServerAliveInterval=15 -o ServerAliveCountMax=4 -o ConnectTimeout=30"
_REFUSED = 3  # exit status of on_server.sh after it printed the reason
_NO_CONNECTION = 255  # ssh's exit status without a connection
_RETRY_SECONDS = (1, 5, 15, 30, 60, 60, 60, 60, 60)  # a router restarts in two minutes; six cover most cuts
_HOST = re.compile(r"\w[\w.@%+-]*", re.ASCII)
_ANSWER = "orion: "
_LOG_BEGINS = b"orion: log begins\n"


class ScriptError(OrionError):
    """One of the scripts failed and printed the reason on standard error."""


class ConnectionLostError(OrionError):
    """The server cannot be reached, or the connection was lost."""


@dataclass(frozen=True)
class Server:
    """The host, the ssh command as arguments, absolute paths on the server, and the command that makes .venv."""

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
    """A training: a preset (a shipped name, or the path and text of a TOML file), settings, and the run's name."""

    preset: str
    assignments: tuple[str, ...]
    run_name: str
    preset_text: str = ""
    base_folder: str = ""  # base.model, if it is no name: the server must have it at the same path

    def preset_file(self, server: Server) -> str:
        """The path of a TOML preset on the server; empty for a shipped one."""
        return f"{server.job}/{Path(self.preset).name}" if self.preset_text else ""

    def arguments(self, server: Server) -> list[str]:
        """The arguments of `orion dataset` and `orion fine-tune` on the server."""
        folder = json.dumps(server.data, ensure_ascii=False)  # a TOML string
        sets = [*self.assignments, "dataset.source=directory", f"dataset.folder={folder}"]
        preset = self.preset_file(server) or self.preset
        return ["--preset", preset, "--run", f"runs/{self.run_name}", *(word for s in sets for word in ("--set", s))]

    def identity(self, server: Server) -> str:
        """One line that identifies this training."""
        return json.dumps([*self.arguments(server), self.preset_text])

    def weights(self, server: Server) -> str:
        return f"{server.repository}/runs/{self.run_name}/orion_lora_weights"


@dataclass(frozen=True)
class Job:
    """The training on the server; "lost" means that it ended without an exit status, for example by a restart."""

    state: Literal["none", "running", "ended", "lost"]
    identity: str = ""
    status: int = 0
    pid: int = 0


def scripts_folder() -> Path:
    """The folder scripts/ of the clone that this package runs from; raises OrionError outside a clone."""
    folder = Path(__file__).parents[3] / "scripts"
    if not (folder / "on_server.sh").is_file():
        raise OrionError(
            f"{folder} does not exist: this installation is not a clone of the repository.",
            "Clone the repository, run 'make setup' in it, and use its .venv/bin/orion.",
        )
    return folder


def server_of(host: str, environment: Mapping[str, str], folder: str = "") -> Server:
    """The server `host`, with `folder` there or the paths from the environment, as in the scripts.

    Without either, the folder is `orion` in the login folder, for which the server is asked.
    """
    if not _HOST.fullmatch(host):  # ssh would read other forms as options
        raise OrionError(f"{host!r} is not a host or user@host.", "Pass --server user@host, or set SERVER.")
    ssh = tuple(shlex.split(environment.get("ORION_SSH") or _SSH))
    root = folder or environment.get("ORION_SERVER_HDD_PATH", "")
    repository = environment.get("ORION_SERVER_REPO_PATH") or environment.get("ORION_REPO_DIR")
    data = environment.get("ORION_SERVER_DATA_PATH")
    if root and not root.startswith("/"):
        raise OrionError(
            f"{'--server-folder' if folder else 'ORION_SERVER_HDD_PATH'} {root} is not an absolute path on the server.",
            "Begin it with /; ~ is not expanded there.",
        )
    if not root:
        root = f"{_call(Server(host, ssh, '', ''), 'home')['home'].rstrip('/')}/orion"
    return Server(
        host,
        ssh,
        repository or f"{root}/orion-triage",
        data or f"{root}/orion_data",
        environment.get("ORION_SERVER_SETUP") or SETUP,
    )


def training_of(preset: str, assignments: Sequence[str], run_name: str, settings: Settings) -> Training:
    """The training of a run with these settings; includes the text of a TOML preset.

    `assignments` are those of this command; settings that the run has from earlier ones are added. A camera of the
    dataset is left out: the frames that are sent were seen through it, and would be a second time. Raises OrionError
    for a camera in a file, an adapter to continue, labelled frames, a base in a relative folder, and a preset in a file
    that is not named: the server has none of them.
    """
    preset = preset or settings.preset
    if not preset.endswith(".toml") and preset not in preset_names():
        raise OrionError(f"the run's preset {preset} is not a shipped one.", "Pass its file: --preset FILE.toml.")
    camera = settings.fine_tune.camera
    if camera and camera != SHIPPED:
        raise OrionError(
            f"fine_tune.camera={camera} is a file of this machine.",
            f"Use the shipped camera {SHIPPED!r}, or train on the server itself, with the file beside it.",
        )
    kept = differences(settings, load_settings(preset, assignments), ("base", "fine_tune"))
    sets = [*assignments, *(as_assignment(key, value) for key, (_, value) in kept.items() if value is not None)]
    for one in sets:
        if (key := one.partition("=")[0].strip()) in ("fine_tune.continue_from", "fine_tune.frames"):
            raise OrionError(f"{one} is a folder of this machine.", f"Leave {key} out, or train on the server itself.")
    sets = [one for one in sets if one.partition("=")[0].strip() != "dataset.camera"]
    text = Path(preset).read_text(encoding="utf-8") if preset.endswith(".toml") else ""
    return Training(preset, tuple(sets), run_name, text, _base_folder(settings.base.model))


def _base_folder(model: str) -> str:
    """The folder of a base that is one, as it is written; raises OrionError if it begins in this folder."""
    if model.startswith(("/", "~/")):
        return model
    if model == TINY_BASE or (hub.is_id(model) and not Path(model).is_dir()):
        return ""
    raise OrionError(
        f"base.model={model} is a folder of this machine, or none at all.",
        "Write the path that it has on the server, beginning with / or ~/, or a Hub id.",
    )


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
    """Send `dataset` to the server, train there, and fetch the adapter into `weights`; resumes after an interruption.

    A running training is followed, and a finished one is fetched; `again` starts a new one instead of fetching.
    Raises OrionError if the server has another training, if the training fails, or if a script fails (ScriptError).
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
        report(f"the weights of the last training are on this machine, but {server.host} is not cleaned up yet")
        _run_script("download_weights.sh", environment)
        report("run the same command again to start a new training")
        return
    job = job_on(server)
    if _is_ours(job, server, training, again):
        report(f"{server.host} already has this training: it {'is running' if job.state == 'running' else 'has ended'}")
    else:
        if job.state == "lost":
            report("the last training ended without an exit status; resuming from its last checkpoint")
        if training.base_folder:
            _call(server, "require_base", training.base_folder)
        _run_script("upload_to_server.sh", environment)
        pid = start(server, training)
        report(f"training on {server.host} (to stop it, run on the server: kill -- -{pid})")
    _end_of(server, report, write)
    _run_script("download_weights.sh", environment, *(["--keep-remote"] if keep_remote else []))
    if keep_remote:
        _call(server, "forget", server.job)


def _is_ours(job: Job, server: Server, training: Training, again: bool) -> bool:
    """Whether the server's job is this training.

    Raises OrionError if it is another one that is running or has weights that were not fetched.
    """
    if job.state == "running" or (job.state == "ended" and not again):
        if job.identity == training.identity(server):
            return True
        words = shlex.join(json.loads(job.identity)[:-1])
        if job.state == "running":
            raise OrionError(
                f"another training is running on {server.host}: {words}",
                f"Wait until it ends, or stop it on the server: kill -- -{job.pid}",
            )
        if job.status == 0:
            raise OrionError(
                f"{server.host} has weights of another training that were not fetched: {words}",
                "Run this command with those settings to fetch them, or add --again to discard them.",
            )
    return False


def _end_of(server: Server, report: Report, write: Write) -> None:
    """Follow the log until the training ends; raises OrionError unless it succeeded."""
    try:
        follow(server, report, write)
    except KeyboardInterrupt:
        report(f"the training on {server.host} continues; run the same command again to follow it")
        raise
    job = job_on(server)
    if job.state == "ended" and job.status == 0:
        return
    if job.state == "ended":
        _call(server, "forget", server.job)
        raise OrionError(
            f"the training on {server.host} failed with exit status {job.status}; its last lines are above.",
            "Fix the reported problem, then run the same command again.",
        )
    raise OrionError(
        f"the training on {server.host} ended without an exit status: it was killed, or the server restarted.",
        "Run the same command again; it resumes from the last checkpoint.",
    )


def job_on(server: Server) -> Job:
    """The training on the server; its state is "none" if there is none."""
    answers = _call(server, "job", server.job)
    state: Any = answers.get("state", "none")
    return Job(state, answers.get("command", ""), int(answers.get("status") or 0), int(answers.get("pid") or 0))


def start(server: Server, training: Training) -> int:
    """Start the training in a separate session on the server; returns its process id there."""
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
    """Write the log, each byte once, until the training has ended; reconnects after a lost connection.

    Raises ConnectionLostError if the server stays unreachable.
    """
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
                    f"{server.host} is no longer reachable; the training there continues.",
                    "Run the same command again to follow it.",
                ) from None
            report(f"no connection to {server.host}: next attempt in {_RETRY_SECONDS[failures]} s")
            time.sleep(_RETRY_SECONDS[failures])
            failures += 1


def _follow_once(server: Server, received: int, write: Write) -> tuple[int, bool]:
    """Write the log after `received` bytes; returns the number of bytes, and whether the connection was kept."""
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
    """Run one operation of on_server.sh on the server; returns its answers. Raises OrionError if it fails."""
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
            f"the connection to {server.host} failed or was lost: {reason}",
            f"Check that '{shlex.join(server.ssh)} {server.host} true' works, then run the same command again.",
        )
    if result.returncode == _REFUSED:
        message, _, fix = said.partition("\n  fix: ")
        raise OrionError(message.partition("error: ")[2], fix)
    if result.returncode:
        raise OrionError(
            f"the operation {operation!r} failed on {server.host} (exit status {result.returncode}): {said}",
            "Fix the problem on the server, then run the same command again.",
        )
    lines = result.stdout.decode(errors="replace").splitlines()
    return dict(line.removeprefix(_ANSWER).split(" ", 1) for line in lines if line.startswith(_ANSWER))


def _program(operation: str, *arguments: str) -> bytes:
    """on_server.sh and one call of it, for `sh -s`, so that the login shell does not parse any quoting."""
    call = shlex.join(["operate", operation, *arguments])
    return (scripts_folder() / "on_server.sh").read_bytes() + os.fsencode(f"{call} </dev/null\n")


def _run_script(name: str, environment: dict[str, str], *options: str) -> None:
    status = subprocess.run([scripts_folder() / name, *options], env=environment, check=False).returncode
    if status:
        raise ScriptError(
            f"{name} ended with exit status {status}.",
            "Fix the problem that it reports, then run the same command again.",
        )
