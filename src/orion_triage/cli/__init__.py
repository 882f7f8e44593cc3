"""The command line: parse, load settings, call one function, print. The only package that prints or exits."""

import sys

from orion_triage.cli import dataset, evaluation, flight, machine, remote, stages
from orion_triage.cli.app import app
from orion_triage.cli.terminal import escape, messages
from orion_triage.errors import OrionError

__all__ = ["app", "dataset", "evaluation", "flight", "machine", "main", "remote", "stages"]

_INTERRUPTED = 130  # typer's own exit status for Ctrl-C, which it does not speak of


def main() -> None:
    """Entry point: a user's mistake is one clear line and exit status 1, never a traceback."""
    try:
        app()
    except OrionError as error:
        messages().print(f"[bold red]error:[/] {escape(error.message)}", highlight=False, soft_wrap=True)
        if error.fix:
            messages().print(f"  [bold]fix:[/] {escape(error.fix)}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except SystemExit as exit_:
        if exit_.code == _INTERRUPTED:
            messages().print("interrupted: the same command goes on from here", highlight=False)
        raise
