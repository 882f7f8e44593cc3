"""The command line: parse, load settings, call one function, print. The only module that prints or exits."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
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

PresetOption = Annotated[str, typer.Option("--preset", help="A shipped preset, or a TOML file.")]
SetOption = Annotated[list[str], typer.Option("--set", help="Change a setting: stage.key=value. Repeatable.")]
RunOption = Annotated[Path | None, typer.Option("--run", help="Run folder. Default: runs/PRESET.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Do the stage again even if nothing changed.")]
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


def _run(preset: str, assignments: list[str], folder: Path | None) -> Any:
    from orion_triage.config import load_settings
    from orion_triage.pipeline import Run, prepare

    settings = load_settings(preset, assignments)
    run = Run(folder or Path("runs") / settings.preset, settings)
    prepare(run)
    return run


def _stage(name: str, run: Any, force: bool = False) -> None:
    from orion_triage.pipeline import run_stage, stage_named

    stage = stage_named(name)
    console = _console()
    with _progress() as progress:
        receipt, skipped = run_stage(stage, run, progress=progress, force=force)
    where = stage.folder(run)
    state = "unchanged, skipped" if skipped else f"done in {receipt.seconds:,.1f} s"
    console.print(f"{name}: {state}  ->  {where}", highlight=False, soft_wrap=True)


@app.command(epilog="Example: orion run --set fine_tune.epochs=4")
def run(preset: PresetOption = "tiny", assignments: SetOption = [], folder: RunOption = None) -> None:  # noqa: B006
    """Do all stages in order; finished ones are skipped."""
    from orion_triage.pipeline import STAGES

    current = _run(preset, assignments, folder)
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
_single("evaluate base", "ablation", "Evaluate the base model under the four conditions.")
_single("fine-tune", "fine-tune", "Train the QLoRA adapter.")
_single("fuse", "fuse", "Merge the adapter into the 16-bit base.")
_single("quantize", "quantize", "Convert to GGUF and quantize.")


@app.command(epilog="Example: orion evaluate --quantized-model http://127.0.0.1:8080")
def evaluate(
    preset: PresetOption = "tiny",
    assignments: SetOption = [],  # noqa: B006
    folder: RunOption = None,
    file: Annotated[str, typer.Option("--file", help="Split: val or test.")] = "test",
    quantized: Annotated[
        bool, typer.Option("--gguf", help="Evaluate the run's GGUF pair: server started here.")
    ] = False,
    server: Annotated[str, typer.Option("--quantized-model", help="URL of a running llama.cpp server.")] = "",
    force: ForceOption = False,
) -> None:
    """Evaluate the fine-tuned model, or the quantized one, under the four conditions."""
    from orion_triage.pipeline import evaluate_server

    current = _run(preset, [*assignments, f"evaluate.split={file}"], folder)
    if not server:
        _stage("evaluate quantized" if quantized else "evaluate fine-tuned", current, force)
        return
    with _progress() as progress:
        metrics = evaluate_server(current, server, progress)
    for condition, rates in metrics.items():
        typer.echo(f"{condition}: {rates['right']}/{rates['count']}")


@app.command(epilog="Example: orion report --json")
def report(
    preset: PresetOption = "tiny",
    assignments: SetOption = [],  # noqa: B006
    folder: RunOption = None,
    as_json: JsonOption = False,
) -> None:
    """Collect results.json and report.md from what has finished, and print the table."""
    _report(_run(preset, assignments, folder), as_json=as_json)


def _report(run: Any, *, as_json: bool) -> None:
    from rich.console import Console

    from orion_triage.files import write_text
    from orion_triage.pipeline import STAGES
    from orion_triage.report.render import render_markdown, terminal_tables
    from orion_triage.report.results import build_results

    results = build_results(run.folder, run.settings, {stage.name: stage.folder(run) for stage in STAGES})
    text = json.dumps(results, indent=2)
    write_text(run.folder / "results.json", text + "\n")
    write_text(run.folder / "report.md", render_markdown(results))
    if as_json:
        typer.echo(text)
        return
    console = Console()
    for table in terminal_tables(results):
        console.print(table)
    console.print(f"report: {run.folder / 'report.md'}", highlight=False, soft_wrap=True)


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

    from orion_triage import flight, llama_cpp, quantize
    from orion_triage.config import Settings

    run_folder = folder or flight.newest_finished_run(Path("runs"))
    gguf = run_folder / "gguf"
    quantize.check_pair(gguf)
    settings = Settings.model_validate_json((run_folder / "settings.json").read_text(encoding="utf-8"))
    outcomes = []
    with _progress() as progress:
        toolchain = llama_cpp.find_toolchain(progress)
        with llama_cpp.Server(
            toolchain,
            gguf / "orion-q4_k_m.gguf",
            gguf / "orion-mmproj-f16.gguf",
            log=run_folder / "triage-server.log",
        ) as server:

            def ask(prompt: str, png: bytes) -> str:
                return server.client.complete(prompt, png, settings.evaluate.max_new_tokens, flight.GRAMMAR)

            for outcome in flight.triage_files(files, ask, settings.base.frame_size, resize=resize):
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
    work: Annotated[Path, typer.Option(help="Folder for intermediate state (6 GB); a rerun goes on from it.")] = Path(
        ".cache/tiny-base"
    ),
    out: Annotated[Path, typer.Option(help="Where the checkpoint goes.")] = Path("src/orion_triage/tiny_base/weights"),
) -> None:
    """Rebuild the shipped base model from nothing (about 2 hours on 2 cores)."""
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
