"""The command line: parse, load settings, call one function, print. The only module that prints or exits."""

import json
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from orion_triage import processes
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
DatasetOption = Annotated[
    str,
    typer.Option("--dataset", metavar="FOLDER|ID", help="A dataset in the published layout instead of drawn tiles."),
]
TestSizeOption = Annotated[
    int, typer.Option("--test-size", min=0, help="Test frames; several tiles a place. Default: one a place.")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Do the stage again even if nothing changed.")]
FileOption = Annotated[SplitName, typer.Option("--file", help="The split that is evaluated.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")]


_INTERRUPTED = 130  # typer's own exit status for Ctrl-C, which it does not speak of


def main() -> None:
    """Entry point: a user's mistake is one clear line and exit status 1, never a traceback."""
    try:
        app()
    except OrionError as error:
        _console().print(f"[bold red]error:[/] {_escape(error.message)}", highlight=False, soft_wrap=True)
        if error.fix:
            _console().print(f"  [bold]fix:[/] {_escape(error.fix)}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except SystemExit as exit_:
        if exit_.code == _INTERRUPTED:
            _console().print("interrupted: the same command goes on from here", highlight=False)
        raise


def _console() -> Any:
    """Standard error; of several launched processes, only the first one speaks."""
    from rich.console import Console

    return Console(stderr=True, quiet=not processes.is_main())


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


def _run(
    preset: str,
    assignments: list[str],
    folder: Path | None,
    split: Any = "test",
    *,
    dataset: str = "",
    test_size: int = 0,
    **sources: str,
) -> Any:
    """The run that a command works on: its settings come from the preset and are written into its folder."""
    from orion_triage.config import load_settings
    from orion_triage.pipeline import Run, prepare

    named = [f"dataset.folder={json.dumps(dataset)}"] if dataset else []
    named += [f"dataset.test_size={test_size}"] if test_size else []
    settings = load_settings(preset, [*assignments, *named])
    run = Run(folder or Path("runs") / settings.preset, settings, split, **sources)
    prepare(run)
    return run


def _finished(folder: Path | None, stage: str, split: Any = "test") -> Any:
    """The run that a command reads: its settings are those it was made with."""
    from orion_triage.pipeline import newest_run, open_run

    return open_run(folder or newest_run(Path("runs"), stage), split)


def _stage(stage: Any, run: Any, force: bool = False) -> None:
    """Run one stage, given itself or by its name, and say what came of it."""
    from orion_triage.pipeline import run_stage, stage_named

    stage = stage_named(stage) if isinstance(stage, str) else stage
    with _progress() as progress:
        receipt, skipped = run_stage(stage, run, progress=progress, force=force)
    _say(receipt, stage.folder(run), skipped=skipped)


def _say(receipt: Any, folder: Path, *, skipped: bool = False) -> None:
    """One line on a finished stage, and what its user should see."""
    console = _console()
    state = "unchanged, skipped" if skipped else f"done in {receipt.seconds:,.1f} s"
    console.print(f"{receipt.stage}: {state}  ->  {folder}", highlight=False, soft_wrap=True)
    for line in () if skipped else _notes(receipt.figures):
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


@app.command(epilog="Example: orion run --preset lfm2.5-vl-1.6b --dataset OWNER/NAME")
def run(
    preset: PresetOption = "tiny",
    assignments: SetOption = [],  # noqa: B006
    folder: RunOption = None,
    dataset: DatasetOption = "",
    test_size: TestSizeOption = 0,
) -> None:
    """Do all stages in order; finished ones are skipped."""
    from orion_triage.pipeline import check_inputs, stages

    current = _run(preset, assignments, folder, dataset=dataset, test_size=test_size)
    check_inputs(current)
    for stage in stages(current.settings):
        _stage(stage, current)
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


_single("fine-tune", "fine-tune", "Train the QLoRA adapter.")
_single("quantize", "quantize", "Convert to GGUF and quantize.")


@app.command("dataset", epilog="Example: orion dataset --dataset OWNER/NAME")
def dataset_command(
    preset: PresetOption = "tiny",
    assignments: SetOption = [],  # noqa: B006
    folder: RunOption = None,
    dataset: DatasetOption = "",
    test_size: TestSizeOption = 0,
    force: ForceOption = False,
) -> None:
    """Draw the frames and write the three splits, or check and copy a dataset that exists."""
    _stage("dataset", _run(preset, assignments, folder, dataset=dataset, test_size=test_size), force)


@app.command(epilog="Example: orion fuse --adapter OWNER/NAME")
def fuse(
    preset: PresetOption = "tiny",
    assignments: SetOption = [],  # noqa: B006
    folder: RunOption = None,
    adapter: Annotated[
        str, typer.Option("--adapter", metavar="FOLDER|ID", help="Another adapter than the run's own.")
    ] = "",
    force: ForceOption = False,
) -> None:
    """Merge the adapter into the 16-bit base."""
    _stage("fuse", _run(preset, assignments, folder, adapter_from=adapter), force)


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


@app.command(epilog="Example: orion evaluate --gguf OWNER/NAME")
def evaluate(
    pair: Annotated[
        str, typer.Argument(metavar="[FOLDER|ID]", help="With --gguf: another GGUF pair than the run's own.")
    ] = "",
    preset: PresetOption = "tiny",
    assignments: SetOption = [],  # noqa: B006
    folder: RunOption = None,
    file: FileOption = SplitName.test,
    quantized: Annotated[
        bool, typer.Option("--gguf", help="The GGUF pair instead: a server is started and stopped here.")
    ] = False,
    servers: Annotated[
        list[str],
        typer.Option(
            "--quantized-model",
            metavar="URL",
            help="A running server instead, llama.cpp's or OpenAI-compatible (key: LLAMA_API_KEY). Repeatable.",
        ),
    ] = [],  # noqa: B006
    force: ForceOption = False,
) -> None:
    """Evaluate the fine-tuned model, or the quantized one, under the four conditions."""
    from orion_triage.pipeline import evaluate_servers

    if pair and (servers or not quantized):
        raise typer.BadParameter("goes with --gguf", param_hint=f"'{pair}'")
    current = _run(preset, assignments, folder, file.value, pair_from=pair)
    stage = "evaluate quantized" if quantized or servers else "evaluate fine-tuned"
    if servers:
        with _progress() as progress:
            receipt = evaluate_servers(current, servers, progress)
        _say(receipt, current.evaluation("quantized"))
    else:
        _stage(stage, current, force)
    _print_rates(current, stage)


@app.command(epilog="Example: orion ladder --quants Q8_0,Q5_K_M")
def ladder(
    preset: PresetOption = "tiny",
    assignments: SetOption = [],  # noqa: B006
    folder: RunOption = None,
    file: FileOption = SplitName.test,
    quantizations: Annotated[
        str, typer.Option("--quants", metavar="TYPE,TYPE", help="Quantizations between F16 and the flight's.")
    ] = "",
    force: ForceOption = False,
) -> None:
    """Evaluate every step between base and flight, so that a loss has an address; finished ones are skipped."""
    from orion_triage.pipeline import evaluations

    asked = [f"ladder.quantizations={quantizations}"] if quantizations else []
    current = _run(preset, [*assignments, "ladder.enabled=true", *asked], folder, file.value)
    for stage in evaluations(current.settings).values():
        _stage(stage, current, force)
    _report(current, as_json=False)


@app.command(epilog="Example: orion decoding --file val")
def decoding(
    preset: PresetOption = "tiny",
    assignments: SetOption = [],  # noqa: B006
    folder: RunOption = None,
    file: FileOption = SplitName.test,
    as_json: JsonOption = False,
    force: ForceOption = False,
) -> None:
    """Greedy against nearly greedy decoding, free and under the grammar: what parses, and what is right."""
    from rich.console import Console
    from rich.table import Table

    from orion_triage.pipeline import DECODINGS
    from orion_triage.report.compare import compare_decodings
    from orion_triage.report.render import change_in_words, percent

    current = _run(preset, assignments, folder, file.value)
    for stage in DECODINGS:
        _stage(stage, current, force)
    compared = compare_decodings(current)
    if as_json:
        typer.echo(json.dumps(compared, indent=2))
        return
    table = Table("decoding", "", title=_escape(f"{current.folder}, {file.value} split"))
    for heading in ("parse", "right"):
        table.add_column(heading, justify="right")
    table.add_column("against greedy and free")
    for name, by_condition in compared.items():
        for condition, row in by_condition.items():
            parsed = percent(row["parsed"] / row["count"])
            against = change_in_words(row["change"]) if row["change"] else ""
            table.add_row(name, condition, parsed, percent(row["right"] / row["count"]), against)
        table.add_section()
    Console().print(table)


def _print_rates(run: Any, stage: str) -> None:
    """Accuracy by condition of one evaluation."""
    from orion_triage.evaluate.conditions import CONDITIONS
    from orion_triage.manifest import read_manifest
    from orion_triage.pipeline import stage_named

    if not processes.is_main():
        return
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
    """Collect results.json, report.html, report.md and report.png from what has finished, and print the table."""
    _report(_finished(folder, "dataset", file.value), as_json=as_json)


def _report(run: Any, *, as_json: bool) -> None:
    from rich.console import Console

    from orion_triage.files import write_text
    from orion_triage.fine_tune import read_losses
    from orion_triage.report import html, plot
    from orion_triage.report.render import render_markdown, terminal_tables
    from orion_triage.report.results import build_results, results_path

    results = build_results(run)
    text = json.dumps(results, indent=2)
    suffix = "" if run.split == "test" else f"-{run.split}"
    write_text(results_path(run), text + "\n")
    plot.draw(results, read_losses(run.adapter), run.folder / f"report{suffix}.png")
    write_text(run.folder / f"report{suffix}.md", render_markdown(results, f"report{suffix}.png"))
    write_text(run.folder / f"report{suffix}.html", html.of_run(run, results))
    if as_json:
        typer.echo(text)
        return
    console = Console()
    for table in terminal_tables(results):
        console.print(table)
    names = f"{run.folder / f'report{suffix}.md'} and {run.folder / f'report{suffix}.html'}"
    console.print(f"report: {names}", highlight=False, soft_wrap=True)


@app.command(epilog="Example: orion compare runs/tiny runs/other")
def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="Run folders; the first is the measure.")],
    file: FileOption = SplitName.test,
    as_json: JsonOption = False,
) -> None:
    """Compare runs on the same frames: what each gained and lost against the first, and what chance would."""
    from rich.console import Console
    from rich.table import Table

    from orion_triage.pipeline import open_run
    from orion_triage.report.compare import compare_runs
    from orion_triage.report.render import change_in_words, percent
    from orion_triage.report.seeds import spread

    if len(folders) < 2:
        raise typer.BadParameter("give two runs or more", param_hint="'RUN RUN...'")
    first, *others = runs = [open_run(folder, file.value) for folder in folders]
    compared = {str(other.folder): compare_runs(first, other) for other in others}
    accuracies = spread(runs)
    if as_json:
        value = {"first": str(first.folder), "split": file.value, "against": compared, "accuracies": accuracies}
        typer.echo(json.dumps(value, indent=2))
        return
    for name, models in compared.items():
        table = Table("model", "", title=_escape(f"{first.folder} against {name}, {file.value} split"))
        for heading in ("first", "second"):
            table.add_column(heading, justify="right")
        table.add_column("difference")
        for model, by_condition in models.items():
            for condition, change in by_condition.items():
                rates = [percent(right / change["count"]) for right in change["right"]]
                table.add_row(model, condition, *rates, change_in_words(change))
            table.add_section()
        Console().print(table)
    if len(runs) > 2:
        table = Table("model", "", "lowest", "median", "highest", title=f"Accuracy over {len(runs)} runs")
        for model, rows in accuracies.items():
            for condition, rates_of_runs in rows.items():
                figures = (min(rates_of_runs), statistics.median(rates_of_runs), max(rates_of_runs))
                table.add_row(model, condition, *(percent(figure) for figure in figures))
            table.add_section()
        Console().print(table)


@app.command(epilog="Example: orion clean runs/tiny")
def clean(folder: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")]) -> None:
    """Keep of a finished run the flight pair, the adapter, receipts and reports; delete the rest."""
    from orion_triage.pipeline import clean, open_run

    freed = clean(open_run(folder))
    _console().print(f"freed {freed / 1e6:,.1f} MB in {folder}", highlight=False, soft_wrap=True)


class Product(StrEnum):
    """What can be published of a run."""

    adapter = "adapter"
    merged = "merged"
    gguf = "gguf"


@app.command(epilog="Example: orion push OWNER/NAME --product adapter")
def push(
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The Hub repository; created if need be.")],
    product: Annotated[Product, typer.Option("--product", help="The flight pair, the adapter or the merged model.")] = (
        Product.gguf
    ),
    folder: Annotated[Path | None, typer.Option("--run", help="Run folder. Default: the newest finished.")] = None,
    public: Annotated[bool, typer.Option("--public", help="A new repository is private otherwise.")] = False,
) -> None:
    """Publish a product of a run on the Hub, with its model card and the base's licence (token: HF_TOKEN)."""
    from orion_triage import publish

    stage = {"adapter": "fine-tune", "merged": "fuse", "gguf": "quantize"}[product.value]
    address = publish.push(_finished(folder, stage), product.value, repository, private=not public)
    _console().print(f"pushed: {address}", highlight=False, soft_wrap=True)


@app.command("operating-point", epilog="Example: orion operating-point --max-irrecoverable-loss 2%")
def operating_point_command(
    limit: Annotated[
        str, typer.Option("--max-irrecoverable-loss", metavar="SHARE", help="Of the valuable frames, dropped as LOW.")
    ] = "5%",
    folder: Annotated[Path | None, typer.Option("--run", help="Run folder. Default: the newest finished.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Choose on val how sure of LOW the model must be before a frame is dropped; 'orion triage' then keeps to it."""
    from orion_triage import operating_point

    share = operating_point.parse_share(limit)
    run = _finished(folder, "quantize", "val")
    _stage("evaluate constrained", run)
    record = operating_point.choose(run, share)
    if as_json:
        typer.echo(json.dumps(record, indent=2))
        return
    there, threshold = record["there"], record["low_threshold"]
    dropped = f"P(LOW) of at least {threshold:.3f}" if threshold <= 1 else "no P(LOW): nothing is dropped"
    typer.echo(f"a frame is dropped at {dropped}")
    loss, recall, count = there["irrecoverable_loss"], there["high_recall"], record["chosen_on"]["frames"]
    typer.echo(
        f"on the {count} val frames it was chosen on: {loss['count']} of {loss['total']} valuable frames lost, "
        f"{recall['count']} of {recall['total']} HIGH found, {there['downlink']['dropped']:.0%} dropped"
    )
    typer.echo("its loss on other frames is larger than on these: 'orion report' gives it on test")


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

    from orion_triage import flight, operating_point
    from orion_triage.triage import CATEGORIES

    run = _finished(folder, "quantize")
    chosen = operating_point.read(run.folder, run.gguf)
    outcomes = []
    with _progress() as progress:
        for outcome in flight.triage_with_pair(
            files,
            run.gguf,
            run.settings.base.frame_size,
            log=run.folder / "logs" / "triage-server.log",
            point=chosen[0] if chosen else None,
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
        rows = [
            {
                "file": o.file,
                "category": o.verdict.category,
                "reason": o.verdict.reason,
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


@app.command(epilog="Example: orion rehearse --preset lfm2.5-vl-1.6b --steps 2")
def rehearse(
    preset: Annotated[str, typer.Option("--preset", help="lfm2.5-vl-1.6b or lfm2.5-vl-450m.")] = "lfm2.5-vl-1.6b",
    steps: Annotated[int, typer.Option("--steps", min=0, help="Optimizer steps; 0: a random adapter instead.")] = 0,
    folder: Annotated[Path | None, typer.Option("--folder", help="Default: runs/rehearsal-PRESET.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the files; they are deleted otherwise.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Run every stage at a preset's full size with random weights, and print what it took."""
    from orion_triage import rehearse

    where = folder or Path("runs") / f"rehearsal-{preset}"
    with _progress() as progress:
        figures = rehearse.run(preset, where, steps=steps, progress=progress)
    if not keep:
        rehearse.remove(where)
    if as_json:
        typer.echo(json.dumps(figures, indent=2))
    else:
        _print_rehearsal(figures)


@app.command(epilog="Example: orion budgets --json")
def budgets(
    preset: Annotated[str, typer.Option("--preset", help="Whose last rehearsal is shown.")] = "lfm2.5-vl-1.6b",
    as_json: JsonOption = False,
) -> None:
    """Print the mission's budgets beside the last rehearsal's figures."""
    from dataclasses import asdict

    from orion_triage import budgets

    figures = budgets.last_rehearsal(preset)
    if as_json:
        rows = [asdict(row) | {"kept": row.kept} for row in budgets.budgets(figures)]
        typer.echo(json.dumps({"rehearsal": figures, "budgets": rows}, indent=2))
        return
    if figures:
        _print_rehearsal(figures)
    else:
        _print_budgets(budgets.budgets(None))
        _console().print(f"nothing measured yet: orion rehearse --preset {preset}", highlight=False)


def _print_rehearsal(figures: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from orion_triage import budgets

    machine = figures["machine"]
    table = Table(
        title=f"{figures['preset']}, {figures['parameters']:,} parameters, on {machine['cores']} cores, "
        f"{machine['memory_bytes'] / 1e9:.0f} GB, {machine['gpu'] or 'no GPU'}",
        caption="Peaks: of a process and its children, mapped files included; of the run folder, base not counted.",
    )
    table.add_column("stage")
    for name in ("seconds", "memory GB", "disk GB", "GPU GB"):
        table.add_column(name, justify="right")
    for stage in figures["stages"]:
        cells = [stage["peak_memory_bytes"], stage["peak_disk_bytes"], stage["peak_vram_bytes"]]
        shown = [f"{value / 1e9:.2f}" if value is not None else "-" for value in cells]
        table.add_row(stage["stage"], f"{stage['seconds']:.1f}", *shown)
    console = Console()
    console.print(table)
    if figures["training_seconds_per_sample"] is not None:
        console.print(f"training, with its validation: {figures['training_seconds_per_sample']:.2f} s per sample")
    console.print(f"llama.cpp F16 against transformers, next-token log-probabilities: {figures['parity']:.4f}")
    console.print(f"all of it, random weights and parity included: {figures['seconds']:.0f} s", highlight=False)
    if figures["preset"] == budgets.FULL_SIZE:
        _print_budgets(budgets.budgets(figures))
    else:
        sizes = ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in figures["bytes"].items())
        console.print(f"files: {sizes}")


def _print_budgets(rows: list[Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("budget", title="Budgets at 1.6B")
    for name in ("allowed GB", "measured GB", ""):
        table.add_column(name, justify="right")
    for row in rows:
        measured = "-" if row.measured is None else f"{row.measured / 1e9:.3f}"
        kept = {None: "", True: "kept", False: "[red]exceeded[/]"}[row.kept]
        table.add_row(row.what, f"{row.limit / 1e9:.3f}", measured, kept)
    Console().print(table)


@app.command(epilog="Example: orion doctor --preset lfm2.5-vl-1.6b")
def doctor(preset: PresetOption = "tiny", assignments: SetOption = [], as_json: JsonOption = False) -> None:  # noqa: B006
    """Check GPU, memory, disk and tools against what a preset needs."""
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from orion_triage import doctor
    from orion_triage.config import load_settings

    findings = doctor.examine(load_settings(preset, assignments), Path("runs"))
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        table = Table("", "", "found", "what to do")
        colours = {"ok": "green", "note": "yellow", "missing": "red"}
        for finding in findings:
            state = f"[{colours[finding.state]}]{finding.state}[/]"
            fix = "" if finding.state == "ok" else finding.fix
            table.add_row(finding.what, state, _escape(finding.found), _escape(fix))
        Console().print(table)
    if any(finding.state == "missing" for finding in findings):
        raise typer.Exit(1)


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
