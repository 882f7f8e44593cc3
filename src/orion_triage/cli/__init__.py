"""The command line: parse, load settings, call one function, print. The only package that prints or exits."""

import signal
import sys
from typing import Any, NoReturn

from orion_triage import processes
from orion_triage.cli import dataset, evaluation, flight, machine, remote, stages
from orion_triage.cli.app import app
from orion_triage.cli.terminal import escape, messages
from orion_triage.errors import OrionError, obstacle

__all__ = ["app", "dataset", "evaluation", "flight", "machine", "main", "remote", "stages"]

_AGAIN_SECONDS = 5.0  # after which a command that was told to end, and has not heard, is told again
_told: list[int] = []  # the signals that told this process to end


def main() -> None:
    """Entry point: a user's mistake, a full disk or a lost file is one clear line and exit status 1, no traceback."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)
    signal.signal(signal.SIGALRM, _end_again)
    sys.unraisablehook = _lost
    processes.sleep_while_waiting()
    try:
        app()
    except BaseException as error:
        if _told:  # whatever a library made of it
            signal.setitimer(signal.ITIMER_REAL, 0)
            messages().print("interrupted: the same command goes on from here", highlight=False)
            sys.exit(128 + _told[0])
        known = error if isinstance(error, OrionError) else obstacle(error) if isinstance(error, Exception) else None
        if known is None:
            raise
        _say(known)
        sys.exit(1)


def _end(number: int, frame: Any) -> NoReturn:
    """Ctrl-C and SIGTERM alike: what is half-written is deleted, servers are stopped."""
    _told.append(number)
    signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS)
    raise KeyboardInterrupt


def _end_again(number: int, frame: Any) -> None:
    """An exception out of a signal can be lost, in a library's clean-up or import; not while our own is under way."""
    signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS)
    if not isinstance(sys.exception(), KeyboardInterrupt | SystemExit):
        raise KeyboardInterrupt


def _lost(lost: "sys.UnraisableHookArgs") -> None:
    """Of what Python cannot raise where it happens, all but our signals, which come again."""
    if not isinstance(lost.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(lost)


def _say(error: OrionError) -> None:
    messages().print(f"[bold red]error:[/] {escape(error.message)}", highlight=False, soft_wrap=True)
    if error.fix:
        messages().print(f"  [bold]fix:[/] {escape(error.fix)}", highlight=False, soft_wrap=True)
