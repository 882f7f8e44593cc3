"""Remote training: send the dataset to a server, train there, fetch the adapter."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from orion_triage.cli.app import app
from orion_triage.cli.terminal import RunOption, RunPresetOption, SetOption, messages, run_of

remote_app = typer.Typer(add_completion=False, no_args_is_help=True)
app.add_typer(
    remote_app,
    name="remote",
    rich_help_panel="Pipeline",
    epilog="Example: orion remote train --server me@gpu\n\nExample: orion remote train --help",
)


@remote_app.callback()
def remote() -> None:
    """Train on a server over ssh."""


@remote_app.command(
    epilog="Example: orion remote train --server me@gpu\n\n"
    "Example: orion remote train --server me@gpu --preset lfm2.5-vl-1.6b\n\n"
    "Example: orion remote train --server me@gpu --run runs/mine --keep-remote"
)
def train(
    server: Annotated[
        str, typer.Option("--server", metavar="HOST", envvar="SERVER", help="Server: host or user@host, as for ssh.")
    ] = "",
    server_folder: Annotated[
        str,
        typer.Option(
            "--server-folder",
            metavar="PATH",
            envvar="ORION_SERVER_HDD_PATH",
            help="Folder on the server for dataset and repository. Default: orion in your home folder there.",
        ),
    ] = "",
    preset: RunPresetOption = "",
    assignments: SetOption = [],  # noqa: B006
    folder: RunOption = None,
    dataset: Annotated[
        Path | None,
        typer.Option(
            "--dataset",
            metavar="FOLDER",
            envvar="ORION_LOCAL_DATA_DIR",
            help="Dataset folder to send. Default: the run's dataset.",
        ),
    ] = None,
    keep_remote: Annotated[
        bool, typer.Option("--keep-remote", help="Do not delete the repository and dataset on the server.")
    ] = False,
    again: Annotated[
        bool, typer.Option("--again", help="Train again, even if the server has a result that was not fetched.")
    ] = False,
) -> None:
    """Train on a server over ssh and fetch the adapter.

    Sends the repository and the dataset, and deletes both on the server at the
    end. If the connection is lost, the training continues: run the same command
    again to resume.

    docs/environment.md lists the variables.
    """
    from orion_triage.train import remote

    run = run_of(preset, assignments, folder)
    console = messages()

    def write(piece: bytes) -> None:
        sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()

    try:
        remote.train(
            remote.server_of(server, os.environ, server_folder),
            remote.training_of(preset, assignments, run.folder.name, run.settings),
            dataset or run.dataset,
            run.adapter,
            keep_remote=keep_remote,
            again=again,
            report=lambda line: console.print(line, soft_wrap=True),
            write=write,
        )
    except remote.ScriptError as error:
        raise typer.Exit(1) from error
