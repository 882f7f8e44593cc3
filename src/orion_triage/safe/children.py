"""Child processes: they end with this process, even if it is killed (Linux), and get an environment built for them."""

import ctypes
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context

# Linux sends SIGKILL to the child when its parent ends. On other systems, only the parent's clean-up stops the child.
# The parent may have died before prctl was called, so its id is checked afterwards. Then exec starts the program.
_TIE = """
import os, sys
parent, program = int(sys.argv[1]), sys.argv[2:]
if sys.platform == "linux":
    import ctypes, signal
    ctypes.CDLL(None).prctl(1, int(signal.SIGKILL), 0, 0, 0)
if os.getppid() != parent:
    sys.exit(1)
os.execv(program[0], program)
"""


def tied(command: Sequence[str]) -> list[str]:
    """The command line that runs `command` (absolute path and arguments) and ends with the calling process.

    The kernel watches the thread that starts the command, so start it from a thread that lives as long as the command.
    """
    return [sys.executable, "-I", "-S", "-c", _TIE, str(os.getpid()), *command]


# What a program needs to start and to find its files, devices and temporary folder. All else stays here: llama.cpp
# reads about 200 variables (LLAMA_ARG_*, GGML_*, MTMD_*), some of which change its answers, and OpenMP's wait policy
# makes its decoding take 2.6 times as long (sleeping threads; a token has hundreds of short waits).
_HANDED_ON = (
    "PATH", "HOME", "USER", "LOGNAME", "TMPDIR", "TMP", "TEMP", "LANG", "LANGUAGE", "TZ", "LD_LIBRARY_PATH",
    "LD_PRELOAD", "PYTHONPATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER",
    "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES",
)  # fmt: skip
_HANDED_ON_PREFIXES = ("LC_", "ORION_")


def environment(**named: str) -> dict[str, str]:
    """The environment of a program that we start: `named`, and what every program needs; nothing else is inherited."""
    kept = {
        name: value for name, value in os.environ.items() if name in _HANDED_ON or name.startswith(_HANDED_ON_PREFIXES)
    }
    return kept | named


MOST_WORKERS = 8
_PR_SET_PDEATHSIG = 1


@contextmanager
def workers() -> Iterator[ProcessPoolExecutor]:
    """One worker process per core, at most MOST_WORKERS. They end with this process, even if it is killed."""
    count = min(len(os.sched_getaffinity(0)), MOST_WORKERS)
    pool = ProcessPoolExecutor(
        count, mp_context=get_context("spawn"), initializer=end_with_parent, initargs=(os.getpid(),)
    )
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)  # after an error, do not wait for tasks that have not started


def end_with_parent(parent: int) -> None:
    """Let the calling worker process end when the process `parent`, which started it, ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
