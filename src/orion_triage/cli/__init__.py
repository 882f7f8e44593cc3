"""The command line: parse, load settings, call one function, print. The only package that prints or exits."""

import signal
import sys
from typing import Any, NoReturn

from orion_triage.cli import dataset, evaluation, flight, machine, remote, stages
from orion_triage.cli.app import app
from orion_triage.cli.terminal import escape, messages
from orion_triage.errors import OrionError, obstacle

__all__ = ["app", "dataset", "evaluation", "flight", "machine", "main", "remote", "stages"]

_INTERRUPTED = 130  # typer's own exit status for Ctrl-C, which it does not speak of
_TERMINATED = 128 + signal.SIGTERM


def main() -> None:
    """Entry point: a user's mistake, a full disk or a lost file is one clear line and exit status 1, no traceback."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        app()
    except OrionError as error:
        _say(error)
        sys.exit(1)
    except SystemExit as exit_:
        if exit_.code in (_INTERRUPTED, _TERMINATED):
            messages().print("interrupted: the same command goes on from here", highlight=False)
        raise
    except Exception as error:
        known = obstacle(error)
        if known is None:
            raise
        _say(known)
        sys.exit(1)


def _terminate(number: int, frame: Any) -> NoReturn:
    """End like an interrupt does: what is half-written is deleted, servers are stopped."""
    raise SystemExit(128 + number)


def _say(error: OrionError) -> None:
    messages().print(f"[bold red]error:[/] {escape(error.message)}", highlight=False, soft_wrap=True)
    if error.fix:
        messages().print(f"  [bold]fix:[/] {escape(error.fix)}", highlight=False, soft_wrap=True)
