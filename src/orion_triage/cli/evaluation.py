"""Asking models and judging answers."""

import json
import re
import statistics
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from orion_triage import processes
from orion_triage.cli.app import app
from orion_triage.cli.terminal import (
    FileOption,
    ForceOption,
    JsonOption,
    PresetOption,
    RunOption,
    SetOption,
    SplitName,
    do_stage,
    escape,
    finished_run,
    output,
    progress_bar,
    run_of,
    say,
)

command = partial(app.command, rich_help_panel="Judging models")


@command(epilog="Example: orion ablation --file val")
def ablation(
    preset: PresetOption = "tiny",
    assignments: SetOption = [],  # noqa: B006
    folder: RunOption = None,
    file: FileOption = SplitName.test,
    force: ForceOption = False,
) -> None:
    """Evaluate the base model under the four conditions."""
    current = run_of(preset, assignments, folder, file.value)
    do_stage("evaluate base", current, force)
    _print_rates(current, "evaluate base")


@command(
    epilog="Example: orion evaluate --gguf OWNER/NAME\n\nExample: orion evaluate --variants Q8_0,quantized --file val"
)
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
    names: Annotated[
        str,
        typer.Option(
            "--variants",
            metavar="NAME,NAME",
            help="These variants instead, and a table of what each changed: base, adapter-4bit, adapter-16bit, "
            "fine-tuned, F16, a quantization as Q8_0, quantized, constrained, sampled, sampled-constrained, "
            "verdict-only; or all.",
        ),
    ] = "",
    as_json: JsonOption = False,
    force: ForceOption = False,
) -> None:
    """Evaluate the fine-tuned model, the quantized one or any variant under the four conditions."""
    from orion_triage.pipeline import evaluate_servers

    if pair and (servers or not quantized):
        raise typer.BadParameter("goes with --gguf", param_hint=f"'{pair}'")
    if names and (servers or quantized):
        raise typer.BadParameter("goes without --gguf and --quantized-model", param_hint="--variants")
    if names:
        _evaluate_variants(names, preset, assignments, folder, file, as_json, force)
        return
    current = run_of(preset, assignments, folder, file.value, pair_from=pair)
    stage = "evaluate quantized" if quantized or servers else "evaluate fine-tuned"
    if servers:
        with progress_bar() as progress:
            manifest = evaluate_servers(current, servers, progress)
        say(manifest, current.evaluation("quantized"))
    else:
        do_stage(stage, current, force)
    _print_rates(current, stage, as_json)


def _evaluate_variants(
    names: str, preset: str, assignments: list[str], folder: Path | None, file: SplitName, as_json: bool, force: bool
) -> None:
    """Evaluate what is named, and print what each changed against the one it is compared with."""
    from rich.table import Table

    from orion_triage.evaluate.results import compare_variants
    from orion_triage.evaluate.variants import chosen
    from orion_triage.pipeline import evaluation
    from orion_triage.report.render import change_in_words
    from orion_triage.templates import percent

    words = [word.strip() for word in names.split(",") if word.strip()]
    if quantizations := [word for word in words if re.fullmatch(r"[IT]?Q[0-9][A-Z0-9_]*", word)]:
        assignments = [*assignments, f"variants.quantizations={','.join(quantizations)}"]
    current = run_of(preset, assignments, folder, file.value)
    asked = chosen(current.settings, words)
    for variant in asked:
        do_stage(evaluation(variant), current, force)
    if not processes.is_main():
        return
    rows = compare_variants(current, asked)
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table("variant", "", title=escape(f"{current.folder}, {file.value} split"))
    for heading in ("parse", "right"):
        table.add_column(heading, justify="right")
    table.add_column("against")
    table.add_column("change")
    for row in rows:
        for condition, counts in row["conditions"].items():
            shares = [percent(counts[key] / counts["count"]) for key in ("parsed", "right")]
            change = change_in_words(counts["change"]) if counts["change"] else ""
            table.add_row(row["variant"], condition, *shares, row["compared_with"] or "", change)
        table.add_section()
    output().print(table)


def _print_rates(run: Any, stage: str, as_json: bool = False) -> None:
    """Accuracy by condition of one evaluation."""
    from orion_triage.evaluate.conditions import CONDITIONS
    from orion_triage.runs.manifest import read_manifest

    if not processes.is_main():
        return
    manifest = read_manifest(run.product(stage))
    assert manifest is not None
    if as_json:
        typer.echo(json.dumps({condition: manifest.figures[condition] for condition in CONDITIONS}, indent=2))
        return
    for condition in CONDITIONS:
        rates = manifest.figures[condition]
        typer.echo(f"{condition}: {rates['right']}/{rates['count']} right, {rates['unparsable']} unparsable")


@command(epilog="Example: orion report --json")
def report(
    folder: Annotated[Path | None, typer.Option("--run", help="Run folder. Default: the newest.")] = None,
    file: FileOption = SplitName.test,
    as_json: JsonOption = False,
) -> None:
    """Collect results.json, report.html, report.md and report.png from what has finished, and print the table."""
    write_report(finished_run(folder, "dataset", file.value), as_json=as_json)


def write_report(run: Any, *, as_json: bool) -> None:
    from orion_triage.evaluate.results import build_results, results_path
    from orion_triage.report import html, plot
    from orion_triage.report.render import render_markdown, terminal_tables
    from orion_triage.safe.files import write_text
    from orion_triage.train.fine_tune import read_losses

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
    console = output()
    for table in terminal_tables(results):
        console.print(table)
    names = f"{run.folder / f'report{suffix}.md'} and {run.folder / f'report{suffix}.html'}"
    console.print(f"report: {names}", highlight=False, soft_wrap=True)


@command(epilog="Example: orion compare runs/tiny runs/other")
def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="Run folders; the first is the measure.")],
    file: FileOption = SplitName.test,
    as_json: JsonOption = False,
) -> None:
    """Compare runs on the same frames: what each gained and lost against the first, and what chance would."""
    from rich.table import Table

    from orion_triage.evaluate.seeds import spread
    from orion_triage.report.compare import compare_runs
    from orion_triage.report.render import change_in_words
    from orion_triage.runs.run import open_run
    from orion_triage.templates import percent

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
        table = Table("model", "", title=escape(f"{first.folder} against {name}, {file.value} split"))
        for heading in ("first", "second"):
            table.add_column(heading, justify="right")
        table.add_column("difference")
        for model, by_condition in models.items():
            for condition, change in by_condition.items():
                rates = [percent(right / change["count"]) for right in change["right"]]
                table.add_row(model, condition, *rates, change_in_words(change))
            table.add_section()
        output().print(table)
    if len(runs) > 2:
        table = Table("model", "", "lowest", "median", "highest", title=f"Accuracy over {len(runs)} runs")
        for model, rows in accuracies.items():
            for condition, rates_of_runs in rows.items():
                figures = (min(rates_of_runs), statistics.median(rates_of_runs), max(rates_of_runs))
                table.add_row(model, condition, *(percent(figure) for figure in figures))
            table.add_section()
        output().print(table)


@command("threshold", epilog="Example: orion threshold --max-irrecoverable-loss 2%")
def threshold_command(
    limit: Annotated[
        str, typer.Option("--max-irrecoverable-loss", metavar="SHARE", help="Of the valuable frames, dropped as LOW.")
    ] = "5%",
    folder: Annotated[Path | None, typer.Option("--run", help="Run folder. Default: the newest finished.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Choose on val how sure of LOW the model must be before a frame is dropped; 'orion triage' then keeps to it."""
    from orion_triage.evaluate import threshold
    from orion_triage.evaluate.results import blank_frames

    share = threshold.parse_share(limit)
    run = finished_run(folder, "quantize", "val")
    do_stage("evaluate constrained", run)
    record = threshold.choose(run, share, blank_frames(run))
    if as_json:
        typer.echo(json.dumps(record, indent=2))
        return
    there, low_threshold = record["there"], record["low_threshold"]
    dropped = f"P(LOW) of at least {low_threshold:.3f}" if low_threshold <= 1 else "no P(LOW): the scores drop nothing"
    typer.echo(f"a frame is dropped at {dropped}")
    loss, recall, count = there["irrecoverable_loss"], there["high_recall"], record["chosen_on"]["frames"]
    typer.echo(
        f"on the {count} val frames it was chosen on: {loss['count']} of {loss['total']} valuable frames lost, "
        f"{recall['count']} of {recall['total']} HIGH found, {there['downlink']['dropped']:.0%} dropped"
    )
    typer.echo("its loss on other frames is larger than on these: 'orion report' gives it on test")
