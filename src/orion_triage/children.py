"""Programs that we start end when we do, whatever ends us: also when this process is killed."""

import os
import sys
from collections.abc import Sequence

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
