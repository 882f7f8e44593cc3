"""Python programs as processes of their own, without the 5 to 14 s in which Python loads its libraries each time.

A server has imported them and forks for every program: a new process with arguments, folder, environment, and standard
streams of its own, which begins where `python WORDS` begins after its imports, and ends in the usual way. The Python
programs that it starts itself begin so too: its sys.executable is the one of `python()`.
What imports do, what kills do and what memory a program takes is tested with ordinary processes; so is everything on a
machine with a GPU, whose driver does not survive a fork.

    python warm.py serve SOCKET PID    until process PID is gone
    python warm.py call SOCKET WORDS   one program, as `python WORDS`
    python warm.py run WORDS           the same; starts a server if there is none
"""

import array
import atexit
import ctypes
import gc
import hashlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

SOCKET, OWNER = "ORION_TESTS_SOCKET", "ORION_TESTS_PID"
AT_IMPORT = ("HF_", "OMP_", "PYTHON", "TRANSFORMERS_", "TORCH", "MPLBACKEND", "LD_")  # what is read while loading
OF_TORCH = "TORCHINDUCTOR_CACHE_DIR"  # torch sets it itself, in a worker that has trained, and nothing depends on it
GPU = Path("/dev/nvidia0")
ORION = ("-m", "orion_triage.cli")
PYTHON = sys.executable  # as it was when these tests began: some put the program of `python` in its place
_DEATH_SIGNAL = 1
_START_SECONDS = 600  # an import of transformers takes two minutes on a machine with six programs per core


def read_at_import(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that libraries look at while they are loaded."""
    return {name: value for name, value in environment.items() if name.startswith(AT_IMPORT) and name != OF_TORCH}


def is_possible() -> bool:
    return not GPU.exists()


def run(words: Sequence[str], cwd: str, environment: Mapping[str, str]) -> tuple[int, str, str]:
    """`orion WORDS` to its end: exit status (negative: the signal it died of), standard output and error.

    The server is one that was started with the same variables as far as libraries read them while they are loaded.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, Path(os.devnull).open("rb") as empty:
        streams = (empty.fileno(), out.fileno(), err.fileno())
        status = _call(_socket(environment), [*ORION, *words], cwd, environment, streams)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode("utf-8"))
    return status, texts[0], texts[1]


def python() -> str:
    """A program that does what sys.executable does; its libraries have seen this process's variables.

    It asks the server for a module of this project's command line, a script and code (-c), and is Python itself for all
    else. Open files other than the standard streams do not pass.
    """
    return str(_python(_socket(os.environ))) if is_possible() else PYTHON


def shim(folder: Path) -> Path:
    """A program `orion` in `folder`, for a shell's PATH."""
    return _program(folder / "orion", f'exec {python()} {" ".join(ORION)} "$@"')


def _python(path: Path) -> Path:
    return path.with_name(f"{path.name}-bin") / "python"


def _make_python(path: Path) -> Path:
    """The program of `python` for the server at `path`; beside it what lies beside Python itself and is looked for."""
    program = _program(
        _python(path),
        f"""[ "$1" = -u ] && shift  # unbuffered, which torch's launcher asks for
case "$1 $2" in
"{" ".join(ORION)}" | "-c "* | [!-]*.py\\ *) exec {PYTHON} -I -S {__file__} call {path} "$@" ;;
*) exec {PYTHON} "$@" ;;
esac""",
    )
    for name in ("cmake", "ninja"):
        if Path(PYTHON).with_name(name).exists():
            program.with_name(name).symlink_to(Path(PYTHON).with_name(name))
    return program


def _program(path: Path, lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{lines}\n")
    path.chmod(0o755)
    return path


def _socket(environment: Mapping[str, str]) -> Path:
    """The server's socket; the first who needs it starts the server, for all workers of these tests."""
    import filelock

    loaded_with = json.dumps(sorted(read_at_import(environment).items()))
    path = Path(f"{os.environ[SOCKET]}-{hashlib.sha256(loaded_with.encode()).hexdigest()[:8]}")
    with filelock.FileLock(f"{path}.lock"):
        if not path.exists():
            command = [PYTHON, __file__, "serve", str(path), os.environ[OWNER]]
            log = path.with_suffix(".log")
            with log.open("wb") as file:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                    env=dict(environment),
                    start_new_session=True,
                )
            deadline = time.monotonic() + _START_SECONDS
            while not path.exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the tests' server did not start: {log.read_text()}")
                time.sleep(0.05)
    return path


def _call(
    path: Path,
    words: Sequence[str],
    cwd: str,
    environment: Mapping[str, str],
    streams: tuple[int, int, int],
    *,
    hand_on_signals: bool = False,
) -> int:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        request = json.dumps({"words": list(words), "cwd": cwd, "environment": dict(environment)}).encode()
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", streams))]
        connection.sendmsg([len(request).to_bytes(8, "big")], rights)
        connection.sendall(request)
        pid = int.from_bytes(_read(connection, 8), "big")
        if hand_on_signals:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda number, frame: os.kill(pid, number))
        return int.from_bytes(_read(connection, 8), "big", signed=True)


def _read(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise RuntimeError("the tests' server is gone")
        data += part
    return data


def _serve(path: Path, owner: int) -> dict[str, object]:
    """Fork for every caller; returns in a process that has a program to run, and never in the server."""
    listener = socket.socket(socket.AF_UNIX)
    hidden = path.with_name(f".{path.name}")
    listener.bind(str(hidden))
    listener.listen()
    hidden.rename(path)  # it answers from the first moment it is seen
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    gc.collect()
    gc.freeze()  # a collection in a fork would touch, and so copy, every page
    for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        finalizer.atexit = False  # torch takes its operators apart at the end of every fork: half a second
    while True:
        if not select.select([listener], [], [], 1.0)[0]:
            if not Path(f"/proc/{owner}").exists():
                os._exit(0)
            continue
        connection, _ = listener.accept()
        if os.fork():
            connection.close()
            continue
        listener.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return _supervise(connection)


def _supervise(connection: socket.socket) -> dict[str, object]:
    """In a process for one caller: start its command, which ends when the caller goes, and report how it ended."""
    head, ancillary, _, _ = connection.recvmsg(8, socket.CMSG_SPACE(3 * array.array("i").itemsize))
    streams = array.array("i")
    streams.frombytes(ancillary[0][2])
    request: dict[str, object] = json.loads(_read(connection, int.from_bytes(head, "big")))
    supervisor = os.getpid()
    pid = os.fork()
    if pid == 0:
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != supervisor:
            os._exit(1)
        connection.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        return request
    connection.sendall(pid.to_bytes(8, "big"))
    ended = os.pidfd_open(pid)
    ready, _, _ = select.select([ended, connection], [], [])
    if ended not in ready:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    try:
        connection.sendall(os.waitstatus_to_exitcode(status).to_bytes(8, "big", signed=True))
    finally:
        os._exit(0)


def _load() -> None:
    """What the commands import, and nothing that starts a thread or looks for a GPU."""
    import importlib
    import pkgutil

    import orion_triage

    for name in (
        "multiprocessing.spawn",  # which remembers sys.executable: its workers get open files, and begin as ever
        "torch",
        "transformers",
        "peft",
        "bitsandbytes",
        "scipy.stats",
        "sklearn.linear_model",
        "matplotlib.pyplot",
        "matplotlib.backends.backend_agg",
        "matplotlib.backends.backend_svg",
        "rich.progress",
        "imagehash",  # this and the rest: what a training or an evaluation imports on its way
        "peft.tuners.lora.bnb",
        "peft.utils.transformers_weight_conversion",
        "torch.utils.tensorboard",
        "httpcore",
    ):
        importlib.import_module(name)
    from transformers import AutoProcessor, Lfm2VlForConditionalGeneration, Trainer  # noqa: F401

    for module in pkgutil.walk_packages(orion_triage.__path__, "orion_triage."):
        if not module.name.endswith("__main__") and module.name != "orion_triage.flight.check_flight":
            importlib.import_module(module.name)


def _interpret(words: list[str]) -> None:
    """What `python WORDS` does after its start: a module, code, or a script."""
    first, *rest = words
    if first == "-m":
        sys.argv, sys.path[0] = rest, str(Path.cwd())
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    else:
        sys.argv, sys.path[0] = words, str(Path(first).parent)
        runpy.run_path(first, run_name="__main__")


def _run_and_end(words: list[str]) -> NoReturn:
    """The program, and an interpreter's end without taking 5,000 modules apart, which takes a second."""
    status: object = 0
    try:
        _interpret(words)
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 1
    if not isinstance(status, int | None):
        sys.stderr.write(f"{status}\n")
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


if __name__ == "__main__":
    what, where, *rest = sys.argv[1:]
    if what == "run":
        sys.exit(_call(_socket(os.environ), [where, *rest], str(Path.cwd()), os.environ, (0, 1, 2)))
    if what == "call":
        ended = _call(Path(where), rest, str(Path.cwd()), os.environ, (0, 1, 2), hand_on_signals=True)
        if ended < 0:
            signal.signal(-ended, signal.SIG_DFL)
            os.kill(os.getpid(), -ended)
        sys.exit(ended)
    _load()
    own_python = _make_python(Path(where))
    asked = _serve(Path(where), int(rest[0]))
    os.chdir(str(asked["cwd"]))
    os.environ.clear()
    os.environ.update(asked["environment"])  # type: ignore[call-overload]
    tempfile.tempdir = None  # found once, while the libraries were loaded; TMPDIR may be another one now
    # What the server's own streams were, a file or a pipe, is not what the caller's are.
    sys.stdout = open(1, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, encoding=sys.stderr.encoding, errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.executable = str(own_python)
    _run_and_end(asked["words"])  # type: ignore[arg-type]
