"""The command line: parse options, load settings, call one function, print. Only this package prints or exits."""

import io
import os
import signal
import sys
from typing import Any, NoReturn

from orion_triage import processes
from orion_triage.cli import camera, cascade, dataset, evaluation, flight, machine, mission, remote, review, stages
from orion_triage.cli.app import app
from orion_triage.cli.terminal import errors, messages, styled
from orion_triage.errors import OrionError, obstacle
from orion_triage.safe import proxies

__all__ = [
    "app",
    "camera",
    "cascade",
    "dataset",
    "evaluation",
    "flight",
    "machine",
    "main",
    "mission",
    "remote",
    "review",
    "stages",
]

_REPEAT_SECONDS = 5.0  # interval of the repeated interrupt: a library can swallow the first one
_signals_received: list[int] = []  # SIGINT and SIGTERM signals of this process


def main() -> None:
    """Entry point. An OrionError, a full disk or a missing file gives a short message and exit status 1."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    signal.signal(signal.SIGALRM, _interrupt_again)
    sys.unraisablehook = _hide_lost_interrupt
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file's name may have letters that the terminal's encoding lacks
            stream.reconfigure(errors="backslashreplace")
    processes.wait_briefly()
    proxies.spare_loopback()
    try:
        processes.require_launcher()
        app()
    except BaseException as error:
        if _signals_received:  # a library may have replaced the KeyboardInterrupt by another exception
            signal.setitimer(signal.ITIMER_REAL, 0)
            messages().print("interrupted: run the same command again to resume")
            sys.exit(128 + _signals_received[0])
        known = error if isinstance(error, OrionError) else obstacle(error) if isinstance(error, Exception) else None
        if known is None:
            raise
        _print_error(known)
        sys.exit(1)


def _interrupt(number: int, frame: Any) -> NoReturn:
    """Handle Ctrl-C and SIGTERM: the exception makes callers delete partial files and stop servers."""
    _signals_received.append(number)
    signal.setitimer(signal.ITIMER_REAL, _REPEAT_SECONDS)
    raise KeyboardInterrupt


def _interrupt_again(number: int, frame: Any) -> None:
    """Raise the interrupt again unless it is being handled: a library's clean-up or import can lose the first one."""
    signal.setitimer(signal.ITIMER_REAL, _REPEAT_SECONDS)
    if not isinstance(sys.exception(), KeyboardInterrupt | SystemExit):
        raise KeyboardInterrupt


def _hide_lost_interrupt(unraisable: "sys.UnraisableHookArgs") -> None:
    """Report exceptions that Python cannot raise, except our interrupt, which `_interrupt_again` repeats."""
    if not isinstance(unraisable.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)


def _print_error(error: OrionError) -> None:
    rank = os.environ.get("RANK") or "0"  # as text: the error may be that it is no number
    heading = "error:" if rank == "0" else f"process {rank}: error:"
    errors().print(styled("bold red", heading, f" {error.message}"), soft_wrap=True)
    if error.fix:
        errors().print(styled("bold", "  fix:", f" {error.fix}"), soft_wrap=True)
