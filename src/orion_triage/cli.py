"""The command line: parse, load settings, call one function, print. The only module that prints or exits."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from orion_triage.errors import OrionError
from orion_triage.progress import Progress

app = typer.Typer(
    name="orion",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fine-tune, quantize and evaluate a vision-language model that triages satellite frames on board.",
)


class SplitName(StrEnum):
    """The splits that an evaluation can ask about."""

    val = "val"
    test = "test"


PresetOption = Annotated[str, typer.Option("--preset", help="A shipped preset, or a TOML file.")]
SetOption = Annotated[list[str], typer.Option("--set", help="Change a setting: stage.key=value. Repeatable.")]
RunOption = Annotated[Path | None, typer.Option("--run", help="Run folder. Default: runs/PRESET.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Do the stage again even if nothing changed.")]
FileOption = Annotated[SplitName, typer.Option("--file", help="The split that is evaluated.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")]


def main() -> None:
    """Entry point: a user's mistake is one clear line and exit status 1, never a traceback."""
    try:
        app()
    except OrionError as error:
        _console().print(f"[bold red]error:[/] {_escape(error.message)}", highlight=False, soft_wrap=True)
        if error.fix:
            _console().print(f"  [bold]fix:[/] {_escape(error.fix)}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        _console().print("interrupted: the same command goes on from here", highlight=False)
        sys.exit(130)


def _console() -> Any:
    from rich.console import Console

    return Console(stderr=True)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


@contextmanager
def _progress() -> Iterator[Progress]:
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
    console = _console()
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def progress(description: str, done: int, total: int) -> None:
            bar.update(task, description=description, completed=done, total=total)

        yield progress


def _run(preset: str, assignments: list[str], folder: Path | None, split: Any = "test") -> Any:
    """The run that a command works on: its settings come from the preset and are written into its folder."""
    from orion_triage.config import load_settings
    from orion_triage.pipeline import Run, prepare

    settings = load_settings(preset, assignments)
    run = Run(folder or Path("runs") / settings.preset, settings, split)
    prepare(run)
    return run


def _finished(folder: Path | None, stage: str, split: Any = "test") -> Any:
    """The run that a command reads: its settings are those it was made with."""
    from orion_triage.pipeline import newest_run, open_run

    return open_run(folder or newest_run(Path("runs"), stage), split)


def _stage(name: str, run: Any, force: bool = False) -> None:
    from orion_triage.pipeline import run_stage, stage_named

    stage = stage_named(name)
    console = _console()
    with _progress() as progress:
        receipt, skipped = run_stage(stage, run, progress=progress, force=force)
    where = stage.folder(run)
    state = "unchanged, skipped" if skipped else f"done in {receipt.seconds:,.1f} s"
    console.print(f"{name}: {state}  ->  {where}", highlight=False, soft_wrap=True)
    if not skipped:
        for line in _notes(receipt.figures):
            console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)


def _notes(figures: dict[str, Any]) -> Iterator[str]:
    """What a stage found that its user should see: the adapter's modules, a precision it changed, warnings."""
    for target, towers in figures.get("census", {}).items():
        counts = ", ".join(f"{count} in {tower}" for tower, count in towers.items() if count)
        yield f"{target}: {counts or 'no module'}"
    for tower, count in figures.get("trained_parameters", {}).items():
        yield f"trained in {tower}: {count:,} parameters"
    if figures.get("precision_note"):
        yield figures["precision_note"]
    for warning in figures.get("warnings", []):
        yield f"warning: {warning}"


@app.command(epilog="Example: orion run --set fine_tune.epochs=4")
def run(preset: PresetOption = "tiny", assignments: SetOption = [], folder: RunOption = None) -> None:  # noqa: B006
    """Do all stages in order; finished ones are skipped."""
    from orion_triage.pipeline import STAGES, check_inputs

    current = _run(preset, assignments, folder)
    check_inputs(current)
    for stage in STAGES:
        _stage(stage.name, current)
    _report(current, as_json=False)


def _single(name: str, command: str, help_text: str) -> None:
    """Register a command that does one stage."""

    @app.command(command, help=help_text, epilog=f"Example: orion {command} --run runs/tiny")
    def stage_command(
        preset: PresetOption = "tiny",
        assignments: SetOption = [],  # noqa: B006
        folder: RunOption = None,
        force: ForceOption = False,
    ) -> None:
        _stage(name, _run(preset, assignments, folder), force)


_single("dataset", "dataset", "Draw the frames and write the three splits.")
_single("fine-tune", "fine-tune", "Train the QLoRA adapter.")
_single("fuse", "fuse", "Merge the adapter into the 16-bit base.")
_single("quantize", "quantize", "Convert to GGUF and quantize.")


@app.command(epilog="Example: orion ablation --file val")
def ablation(
    preset: PresetOption = "tiny",
    assignments: SetOption = [],  # noqa: B006
    folder: RunOption = None,
    file: FileOption = SplitName.test,
    force: ForceOption = False,
) -> None:
    """Evaluate the base model under the four conditions."""
    current = _run(preset, assignments, folder, file.value)
    _stage("evaluate base", current, force)
    _print_rates(current, "evaluate base")


@app.command(epilog="Example: orion evaluate --quantized-model http://127.0.0.1:8080")
def evaluate(
    preset: PresetOption = "tiny",
    assignments: SetOption = [],  # noqa: B006
    folder: RunOption = None,
    file: FileOption = SplitName.test,
    quantized: Annotated[
        bool, typer.Option("--gguf", help="The run's GGUF pair instead: a server is started and stopped here.")
    ] = False,
    server: Annotated[
        str,
        typer.Option(
            "--quantized-model", metavar="URL", help="A running llama.cpp server instead (key: LLAMA_API_KEY)."
        ),
    ] = "",
    force: ForceOption = False,
) -> None:
    """Evaluate the fine-tuned model, or the quantized one, under the four conditions."""
    from orion_triage.pipeline import evaluate_server

    current = _run(preset, assignments, folder, file.value)
    stage = "evaluate quantized" if quantized or server else "evaluate fine-tuned"
    if server:
        with _progress() as progress:
            receipt = evaluate_server(current, server, progress)
        _console().print(f"{stage}: done in {receipt.seconds:,.1f} s", highlight=False)
    else:
        _stage(stage, current, force)
    _print_rates(current, stage)


def _print_rates(run: Any, stage: str) -> None:
    """Accuracy by condition of one evaluation."""
    from orion_triage.evaluate.conditions import CONDITIONS
    from orion_triage.manifest import read_manifest
    from orion_triage.pipeline import stage_named

    receipt = read_manifest(stage_named(stage).folder(run))
    assert receipt is not None
    for condition in CONDITIONS:
        rates = receipt.figures[condition]
        typer.echo(f"{condition}: {rates['right']}/{rates['count']} right, {rates['unparsable']} unparsable")


@app.command(epilog="Example: orion report --json")
def report(
    folder: Annotated[Path | None, typer.Option("--run", help="Run folder. Default: the newest.")] = None,
    file: FileOption = SplitName.test,
    as_json: JsonOption = False,
) -> None:
    """Collect results.json, report.md and report.png from what has finished, and print the table."""
    _report(_finished(folder, "dataset", file.value), as_json=as_json)


def _report(run: Any, *, as_json: bool) -> None:
    from rich.console import Console

    from orion_triage.files import write_text
    from orion_triage.fine_tune import read_losses
    from orion_triage.report import plot
    from orion_triage.report.render import render_markdown, terminal_tables
    from orion_triage.report.results import build_results

    results = build_results(run)
    text = json.dumps(results, indent=2)
    suffix = "" if run.split == "test" else f"-{run.split}"
    write_text(run.folder / f"results{suffix}.json", text + "\n")
    plot.draw(results, read_losses(run.adapter), run.folder / f"report{suffix}.png")
    write_text(run.folder / f"report{suffix}.md", render_markdown(results, f"report{suffix}.png"))
    if as_json:
        typer.echo(text)
        return
    console = Console()
    for table in terminal_tables(results):
        console.print(table)
    console.print(f"report: {run.folder / f'report{suffix}.md'}", highlight=False, soft_wrap=True)


@app.command(epilog="Example: orion triage frames/*.png")
def triage(
    files: Annotated[list[Path], typer.Argument(help="Frames: PNG, JPEG or raw 512x512x3 RGB (.raw).")],
    folder: Annotated[Path | None, typer.Option("--run", help="Run folder. Default: the newest finished.")] = None,
    resize: Annotated[bool, typer.Option("--resize", help="Accept other sizes: cut to a square, scale.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Classify frames with a run's quantized pair."""
    from rich.console import Console
    from rich.table import Table

    from orion_triage import flight

    run = _finished(folder, "quantize")
    outcomes = []
    with _progress() as progress:
        for outcome in flight.triage_with_pair(
            files,
            run.gguf,
            run.settings.base.frame_size,
            log=run.folder / "logs" / "triage-server.log",
            resize=resize,
            progress=progress,
        ):
            outcomes.append(outcome)
            progress("classifying frames", len(outcomes), len(files))
    for outcome in outcomes:
        if outcome.error:
            _console().print(f"[bold red]refused:[/] {_escape(outcome.error)}", highlight=False, soft_wrap=True)
    good = [outcome for outcome in outcomes if outcome.verdict]
    if as_json:
        rows = [{"file": o.file, "category": o.verdict.category, "reason": o.verdict.reason} for o in good if o.verdict]
        typer.echo(json.dumps(rows, indent=2))
    else:
        table = Table("file", "category", "reason", "seconds")
        for outcome in good:
            assert outcome.verdict is not None
            table.add_row(
                outcome.file,
                outcome.verdict.category,
                _escape(outcome.verdict.reason),
                f"{outcome.seconds:.2f}",
            )
        Console().print(table)
    if len(good) < len(outcomes):
        raise typer.Exit(1)


@app.command(epilog="Example: orion toolchain")
def toolchain() -> None:
    """Find or build llama.cpp's tools."""
    from orion_triage import llama_cpp

    with _progress() as progress:
        found = llama_cpp.find_toolchain(progress)
    _console().print(
        f"llama.cpp build {found.build} ({found.origin}): {found.llama_server}",
        highlight=False,
        soft_wrap=True,
    )


@app.command("build-tiny-base", epilog="Example: orion build-tiny-base --work /tmp/tiny")
def build_tiny_base(
    work: Annotated[Path, typer.Option(help="Folder for intermediate state (3 GB); a rerun goes on from it.")] = Path(
        ".cache/tiny-base"
    ),
    out: Annotated[Path, typer.Option(help="Where the checkpoint goes.")] = Path("src/orion_triage/tiny_base/weights"),
) -> None:
    """Rebuild the shipped base model from nothing (about 90 minutes on 2 cores)."""
    from orion_triage.tiny_base.build import build

    with _progress() as progress:
        record = build(work, out, progress=progress)
    typer.echo(json.dumps(record, indent=2))


@app.command(epilog="Example: orion settings --preset tiny")
def settings(preset: PresetOption = "tiny", assignments: SetOption = []) -> None:  # noqa: B006
    """Print every setting with its value."""
    from orion_triage.config import load_settings

    typer.echo(load_settings(preset, assignments).model_dump_json(indent=2))


if __name__ == "__main__":
    main()
