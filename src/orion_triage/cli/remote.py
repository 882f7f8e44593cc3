"""A training server: send the dataset, train there, fetch the adapter."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from orion_triage.cli.app import app
from orion_triage.cli.terminal import PresetOption, RunOption, SetOption, messages, run_of

remote_app = typer.Typer(add_completion=False, no_args_is_help=True)
app.add_typer(remote_app, name="remote", rich_help_panel="A run", epilog="Example: orion remote train --server me@gpu")


@remote_app.callback()
def remote() -> None:
    """Train on a server over ssh: send, start, follow, fetch, clean up."""


@remote_app.command(epilog="Example: orion remote train --server me@gpu --preset lfm2.5-vl-1.6b")
def train(
    server: Annotated[
        str, typer.Option("--server", metavar="HOST", envvar="SERVER", help="host or user@host, as ssh knows it.")
    ] = "",
    preset: PresetOption = "tiny",
    assignments: SetOption = [],  # noqa: B006
    folder: RunOption = None,
    dataset: Annotated[
        Path | None,
        typer.Option(
            "--dataset", metavar="FOLDER", envvar="ORION_LOCAL_DATA_DIR", help="To be sent. Default: the run's own."
        ),
    ] = None,
    keep_remote: Annotated[
        bool, typer.Option("--keep-remote", help="Do not delete repository and dataset on the server at the end.")
    ] = False,
    again: Annotated[
        bool, typer.Option("--again", help="Train anew although the server has a training that was not fetched.")
    ] = False,
) -> None:
    """Send the dataset, train on the server, fetch the adapter, delete repository and dataset there.

    The training goes on when the connection is lost; the same command follows it again, and fetches it once it has
    ended. ORION_SERVER_HDD_PATH names the server's folder; scripts/upload_to_server.sh --help lists what else can be
    set, and ORION_SERVER_SETUP is the command that makes .venv there (make setup).
    """
    from orion_triage.train import remote

    run = run_of(preset, assignments, folder)
    console = messages()

    def write(piece: bytes) -> None:
        sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()

    try:
        remote.train(
            remote.server_of(server, os.environ),
            remote.training_of(preset, assignments, run.folder.name),
            dataset or run.dataset,
            run.adapter,
            keep_remote=keep_remote,
            again=again,
            report=lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True),
            write=write,
        )
    except remote.ScriptError as error:
        raise typer.Exit(1) from error
