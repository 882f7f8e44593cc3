"""What the commands share: options, the run they work on, and how they speak. Results go to standard output,
all else to standard error.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from orion_triage import processes
from orion_triage.progress import Progress


class SplitName(StrEnum):
    """The splits that an evaluation can ask about."""

    val = "val"
    test = "test"


class SourceName(StrEnum):
    """Where frames can be fetched from; a folder is named by --dataset."""

    synthetic = "synthetic"
    simsat = "simsat"
    sentinel2 = "sentinel2"


PresetOption = Annotated[str, typer.Option("--preset", help="A shipped preset, or a TOML file.")]
SetOption = Annotated[list[str], typer.Option("--set", help="Change a setting: stage.key=value. Repeatable.")]
RunOption = Annotated[Path | None, typer.Option("--run", help="Run folder. Default: runs/PRESET.")]
SourceOption = Annotated[
    SourceName | None, typer.Option("--source", help="Whose pictures of the catalogue's places. Default: synthetic.")
]
DatasetOption = Annotated[
    str,
    typer.Option(
        "--dataset", metavar="FOLDER|ID", help="Your own instead: a folder of pictures, or a dataset as published."
    ),
]
TestSizeOption = Annotated[
    int, typer.Option("--test-size", min=0, help="Test frames; several tiles a place. Default: one a place.")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Do the stage again even if nothing changed.")]
FileOption = Annotated[SplitName, typer.Option("--file", help="The split that is evaluated.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")]


def messages() -> Any:
    """Standard error; of several launched processes, only the first one speaks."""
    from rich.console import Console

    return Console(stderr=True, quiet=not processes.is_main())


WIDE = 10_000  # columns of what goes into a file or a pipe: nothing there has to fit a screen


def output() -> Any:
    """Standard output for tables: as wide as the terminal; into a file or a pipe, as wide as the table."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=WIDE)


def escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar with time left on a terminal, nothing otherwise."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    console = messages()
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def progress(description: str, done: int, total: int) -> None:
            bar.update(task, description=description, completed=done, total=total)

        yield progress


def run_of(
    preset: str,
    assignments: list[str],
    folder: Path | None,
    split: Any = "test",
    *,
    source: SourceName | None = None,
    dataset: str = "",
    test_size: int = 0,
    **sources: str,
) -> Any:
    """The run that a command works on: its settings come from the preset and are written into its folder."""
    from orion_triage.runs.run import Run, prepare, with_its_dataset
    from orion_triage.settings import load_settings

    if source and dataset:
        raise typer.BadParameter("a folder has its own pictures", param_hint="--source with --dataset")
    named = [f"dataset.folder={json.dumps(dataset)}"] if dataset else []
    named += [f"dataset.source={source.value}"] if source else []
    named += [f"dataset.test_size={test_size}"] if test_size else []
    settings = load_settings(preset, [*assignments, *named])
    run = Run(folder or Path("runs") / settings.preset, settings, split, **sources)
    if not named and not any(assignment.startswith("dataset.") for assignment in assignments):
        run = with_its_dataset(run)
    prepare(run)
    return run


def finished_run(folder: Path | None, stage: str, split: Any = "test") -> Any:
    """The run that a command reads: its settings are those it was made with."""
    from orion_triage.runs.run import newest_run, open_run

    return open_run(folder or newest_run(Path("runs"), stage), split)


def do_stage(stage: Any, run: Any, force: bool = False) -> None:
    """Run one stage, given itself or by its name, and say what came of it."""
    from orion_triage.pipeline import run_stage, stage_named

    stage = stage_named(stage, run.settings) if isinstance(stage, str) else stage
    with progress_bar() as progress:
        stage_manifest, skipped = run_stage(stage, run, progress=progress, force=force)
    say(stage_manifest, stage.folder(run), skipped=skipped)


def say(stage_manifest: Any, folder: Path, *, skipped: bool = False) -> None:
    """One line on a finished stage, and what its user should see."""
    console = messages()
    state = "unchanged, skipped" if skipped else f"done in {stage_manifest.seconds:,.1f} s"
    console.print(f"{stage_manifest.stage}: {state}  ->  {folder}", highlight=False, soft_wrap=True)
    for line in () if skipped else notes(stage_manifest.figures):
        console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)


def notes(figures: dict[str, Any]) -> Iterator[str]:
    """What a stage found that its user should see: the adapter's modules, a precision it changed, warnings."""
    for target, towers in figures.get("census", {}).items():
        counts = ", ".join(f"{count} in {tower}" for tower, count in towers.items() if count)
        yield f"{target}: {counts or 'no module'}"
    if account := figures.get("account"):
        yield "places: " + ", ".join(f"{count} {outcome}" for outcome, count in account.items())
    for tower, count in figures.get("trained_parameters", {}).items():
        yield f"trained in {tower}: {count:,} parameters"
    if figures.get("precision_note"):
        yield figures["precision_note"]
    for warning in figures.get("warnings", []):
        yield f"warning: {warning}"
