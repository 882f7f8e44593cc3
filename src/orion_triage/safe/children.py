"""Programs that we start end when we do, whatever ends us: also when this process is killed."""

import ctypes
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context

# Linux sends the signal when the parent is gone; another system leaves the program to the parent's own clean-up. The
# parent may have died before the request was made, so it is looked at again. Then this interpreter becomes the program.
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
    """The command line that runs `command` (an absolute program and its words) and dies with the calling process.

    The request belongs to the thread that starts it: start it from one that lives as long as the program.
    """
    return [sys.executable, "-I", "-S", "-c", _TIE, str(os.getpid()), *command]


MOST_WORKERS = 8
_PR_SET_PDEATHSIG = 1


@contextmanager
def workers() -> Iterator[ProcessPoolExecutor]:
    """A process for each core, at most MOST_WORKERS; they end with this process, however that ends."""
    count = min(len(os.sched_getaffinity(0)), MOST_WORKERS)
    pool = ProcessPoolExecutor(
        count, mp_context=get_context("spawn"), initializer=end_with_parent, initargs=(os.getpid(),)
    )
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)  # after an error, nobody waits for what has not begun


def end_with_parent(parent: int) -> None:
    """In a worker process: end when the process `parent`, which has started it, does."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
