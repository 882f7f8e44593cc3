"""How the tests of the scripts cut them off: the connection, the script or its half on the server, anywhere."""

import os
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from tests.remote.place import Place
from tests.remote.sshd import program

EVERYWHERE = os.environ.get("HYPOTHESIS_PROFILE") == "torture"  # else at some places, spread over the whole
CUTS = 21 if EVERYWHERE else 4  # of each script: every side once, and one that may come too late
INTERRUPTIONS = 99 if EVERYWHERE else 3  # of each script, before a rename or within a deletion
SIDES = ("connection", "client", "server")


def run_and_cut(place: Place, script: str, at_bytes: int, side: str, delay_seconds: float) -> bool:
    """Run a script; once so many bytes have passed, and a moment later, its connection breaks, or it or the server's
    half is killed. Returns whether it had finished before."""
    process = place.popen(script)

    def cut() -> None:
        if side == "connection":
            place.server.wire.cut()
        elif side == "server":
            place.server.kill_sessions()
        else:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(delay_seconds, cut)
    place.server.wire.at_bytes(at_bytes, timer.start)
    process.communicate(timeout=600)
    if timer.is_alive():
        timer.join()
    place.server.wire.leave_alone()
    place.server.wait_until_quiet()
    return process.returncode == 0


def cuts(place: Place, script: str, seed: int) -> Iterator[tuple[int, str, float]]:
    """Where, which side, and how many seconds later; the whole script passes `place.server.wire.bytes` bytes.

    Each in a part of its own of these bytes.
    """
    source = random.Random(seed)
    total = place.server.wire.bytes
    for number in range(CUTS):
        at_bytes = int(total * (number + source.random()) / CUTS)
        yield at_bytes, SIDES[number % 3], source.choice((0, 0, 0.02, 0.05, 0.1))


def interrupt_before(folder: Path, call: int) -> None:
    """Put `mv` and `rm` into `folder` that kill their caller before the so-many-th call of either; the 0th never comes.

    A deletion is interrupted in its middle instead: it has taken one file when its caller dies.
    """
    (folder / "calls").write_text("0")
    for name in ("mv", "rm"):
        real = program(name)
        path = folder / name
        path.write_text(
            f"""#!/bin/bash
read -r calls <{folder}/calls
echo $((++calls)) >{folder}/calls
if ((calls == {call})); then
    if [[ ${{0##*/}} == rm ]]; then
        find "${{@: -1}}" -type f -print0 2>/dev/null | head -z -n 1 | xargs -0 -r {real} -f --
    fi
    kill -9 $PPID
    exit 1
fi
exec {real} "$@"
"""
        )
        path.chmod(0o755)


def calls_to_interrupt(place: Place, script: str, folder: Path, first_on_path: Path | None = None) -> list[int]:
    """Run `script` with the tools of `interrupt_before` in `folder`: which of its calls to interrupt, from 1."""
    interrupt_before(folder, 0)
    status, output = place.call(script, first_on_path=first_on_path)
    assert status == 0, output
    calls = int((folder / "calls").read_text())
    parts = min(calls, INTERRUPTIONS)
    chosen = [1 + (2 * part + 1) * calls // (2 * parts) for part in range(parts)]  # the middle one of each part
    assert 5 < max(chosen) <= calls
    return chosen
