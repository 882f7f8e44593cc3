"""Classifying frames as on board."""

import json
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from orion_triage.cli.app import app
from orion_triage.cli.terminal import (
    JsonOption,
    escape,
    finished_run,
    messages,
    progress_bar,
)

command = partial(app.command, rich_help_panel="In flight")


@command(epilog="Example: orion bundle runs/tiny --out bundle")
def bundle(
    folder: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="Run folder. Default: the newest.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Default: bundle in the run's folder.")] = None,
) -> None:
    """Put together what goes to the satellite: the pair, prompt, server line, golden images, a go/no-go checker."""
    from orion_triage import bundle
    from orion_triage.files import sha256_of_file

    run = finished_run(folder, "quantize")
    where = out or run.folder / "bundle"
    with progress_bar() as progress:
        made = bundle.run(run, where, progress)
    console = messages()
    console.print(f"bundle: {made['bytes'] / 1e6:,.1f} MB  ->  {where}", highlight=False, soft_wrap=True)
    for note in made["notes"]:
        console.print(f"  note: {note}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"  sha256 of bundle.json: {sha256_of_file(where / 'bundle.json')}", highlight=False, soft_wrap=True)


@command(epilog="Example: orion triage frames/*.png")
def triage(
    files: Annotated[list[Path], typer.Argument(help="Frames: PNG, JPEG or raw 512x512x3 RGB (.raw).")],
    folder: Annotated[Path | None, typer.Option("--run", help="Run folder. Default: the newest finished.")] = None,
    resize: Annotated[bool, typer.Option("--resize", help="Accept other sizes: cut to a square, scale.")] = False,
    blank_rule: Annotated[
        bool, typer.Option("--blank-rule/--no-blank-rule", help="Call a blank frame LOW without asking the model.")
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Classify frames with a run's quantized pair."""
    from rich.console import Console
    from rich.table import Table

    from orion_triage import flight, operating_point
    from orion_triage.triage import CATEGORIES

    run = finished_run(folder, "quantize")
    chosen = operating_point.read(run.folder, run.gguf)
    outcomes = []
    with progress_bar() as progress:
        for outcome in flight.triage_with_pair(
            files,
            run.gguf,
            run.settings.base.frame_size,
            log=run.folder / "logs" / "triage-server.log",
            point=chosen[0] if chosen else None,
            resize=resize,
            blank_rule=blank_rule,
            progress=progress,
        ):
            outcomes.append(outcome)
            progress("classifying frames", len(outcomes), len(files))
    for outcome in outcomes:
        if outcome.error:
            messages().print(f"[bold red]refused:[/] {escape(outcome.error)}", highlight=False, soft_wrap=True)
    good = [outcome for outcome in outcomes if outcome.verdict]
    if as_json:
        rows = [
            {
                "file": o.file,
                "category": o.verdict.category,
                "reason": o.verdict.reason,
                "blank": o.blank,
                "scores": dict(zip(CATEGORIES, o.scores, strict=True)) if o.scores else None,
            }
            for o in good
            if o.verdict
        ]
        typer.echo(json.dumps(rows, indent=2))
    else:
        table = Table("file", "category", "reason", "seconds")
        for outcome in good:
            assert outcome.verdict is not None
            table.add_row(
                outcome.file,
                outcome.verdict.category,
                escape(outcome.verdict.reason),
                f"{outcome.seconds:.2f}",
            )
        Console().print(table)
    if len(good) < len(outcomes):
        raise typer.Exit(1)
