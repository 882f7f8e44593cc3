"""Evaluation commands: evaluate models, report and compare results, choose the threshold."""

import json
import re
import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from orion_triage import processes
from orion_triage.cli.app import app
from orion_triage.cli.terminal import (
    FileOption,
    FinishedRunOption,
    ForceOption,
    JsonOption,
    NewestRunOption,
    RunOption,
    RunPresetOption,
    SetOption,
    SplitName,
    do_stage,
    finished_run,
    messages,
    output,
    progress_bar,
    run_of,
    say,
    styled,
)

command = partial(app.command, rich_help_panel="Evaluation")


@command(
    epilog="Example: orion ablation\n\n"
    "Example: orion ablation --file val\n\n"
    "Example: orion ablation --preset lfm2.5-vl-450m --set evaluate.batch_size=8"
)
def ablation(
    preset: RunPresetOption = "",
    assignments: SetOption = [],  # noqa: B006
    folder: RunOption = None,
    file: FileOption = SplitName.test,
    force: ForceOption = False,
) -> None:
    """Evaluate the base model under the four conditions.

    A: image with coordinates. B: image without coordinates. C: noise with
    coordinates. D: image with the coordinates of a place of another category.
    """
    current = run_of(preset, assignments, folder, file.value)
    do_stage("evaluate base", current, force)
    _print_rates(current, "evaluate base")


@command(
    epilog="Example: orion evaluate\n\n"
    "Example: orion evaluate --gguf OWNER/NAME\n\n"
    "Example: orion evaluate --quantized-model http://127.0.0.1:8000#my-adapter\n\n"
    "Example: orion evaluate --variants Q8_0,quantized --file val\n\n"
    "Example: orion evaluate --stress\n\n"
    "Example: orion evaluate --stress haze,noise\n\n"
    "Example: orion evaluate --controls fine-tuned,quantized"
)
def evaluate(
    pair: Annotated[
        str,
        typer.Argument(
            metavar="[FOLDER|ID|NAMES]",
            help="With --gguf, a GGUF pair: folder or Hub id (default: the run's pair). With --stress, NAME,NAME "
            "(default: all). With --controls, variants (default: quantized).",
        ),
    ] = "",
    preset: RunPresetOption = "",
    assignments: SetOption = [],  # noqa: B006
    folder: RunOption = None,
    file: FileOption = SplitName.test,
    quantized: Annotated[
        bool, typer.Option("--gguf", help="Evaluate the GGUF pair. Starts and stops llama-server.")
    ] = False,
    servers: Annotated[
        list[str],
        typer.Option(
            "--quantized-model",
            metavar="URL",
            help="Evaluate a running llama.cpp or OpenAI-compatible server (key: LLAMA_API_KEY). URL#MODEL names one "
            "of its models. Repeatable.",
        ),
    ] = [],  # noqa: B006
    names: Annotated[
        str,
        typer.Option(
            "--variants",
            metavar="NAME,NAME",
            help="Evaluate these variants and print the changes between them. Names: base, adapter-4bit, "
            "adapter-16bit, fine-tuned, F16, a quantization such as Q8_0, quantized, constrained, sampled, "
            "sampled-constrained, verdict-only, first-look (a smaller frame), head (after 'orion adapt'); or all.",
        ),
    ] = "",
    stressed: Annotated[
        bool,
        typer.Option(
            "--stress",
            help="Evaluate the flight's decisions on frames with haze, noise, blur and other faults, and compare them "
            "with those on the same frames without.",
        ),
    ] = False,
    controlled: Annotated[
        bool,
        typer.Option(
            "--controls",
            help="Ask further controls: ten other noise images, pictures of other places, and coordinates of another "
            "place of the same category.",
        ),
    ] = False,
    as_json: JsonOption = False,
    force: ForceOption = False,
) -> None:
    """Evaluate the fine-tuned model under the four conditions.

    Use --gguf, --quantized-model or --variants to evaluate another model,
    --stress to evaluate the flight's decisions on frames of a worse camera, and
    --controls to find out what the conditions C and D show.
    Answers of a pair or server of someone else's are kept beside the run's own.
    'orion ablation --help' explains the conditions.
    """
    from orion_triage.evaluate.variants import OTHER_PAIR, SERVER
    from orion_triage.pipeline import evaluate_servers
    from orion_triage.runs.run import EVALUATE

    for asked, option, study in (
        (stressed, "--stress", _evaluate_stress),
        (controlled, "--controls", _evaluate_controls),
    ):
        if asked:
            if servers or quantized or names or (stressed and controlled):
                raise typer.BadParameter("cannot be combined with another option for models.", param_hint=f"'{option}'")
            study(pair, preset, assignments, folder, file, as_json, force)
            return
    if pair and (servers or not quantized):
        raise typer.BadParameter("use it with --gguf and without --quantized-model.", param_hint=f"'{pair}'")
    if names and (servers or quantized):
        raise typer.BadParameter("cannot be combined with --gguf or --quantized-model.", param_hint="'--variants'")
    if names:
        _evaluate_variants(names, preset, assignments, folder, file, as_json, force)
        return
    current = run_of(preset, assignments, folder, file.value, pair_from=pair)
    name = SERVER if servers else OTHER_PAIR if pair else "quantized" if quantized else "fine-tuned"
    stage = EVALUATE + name
    if servers:
        with progress_bar() as progress:
            manifest = evaluate_servers(current, servers, progress)
        said = manifest.figures
        typer.echo(f"asked: {said['served_model']} ({said['server_build']}) at {said['server']}", err=True)
        say(manifest, current.evaluation(name))
    else:
        do_stage(stage, current, force)
    _print_rates(current, stage, as_json)


def _evaluate_variants(
    names: str, preset: str, assignments: list[str], folder: Path | None, file: SplitName, as_json: bool, force: bool
) -> None:
    """Evaluate the named variants, and print the change of each from the variant it is compared with."""
    from rich.table import Table

    from orion_triage.evaluate.results import compare_variants
    from orion_triage.evaluate.variants import chosen, table
    from orion_triage.pipeline import evaluation, is_current
    from orion_triage.report.render import change_in_words
    from orion_triage.templates import percent

    words = [word.strip() for word in names.split(",") if word.strip()]
    if quantizations := [word for word in words if re.fullmatch(r"[IT]?Q[0-9][A-Z0-9_]*", word)]:
        assignments = [*assignments, f"variants.quantizations={','.join(quantizations)}"]
    current = run_of(preset, assignments, folder, file.value)
    asked = chosen(current.settings, words)
    for variant in asked:
        do_stage(evaluation(variant, current.settings.mission), current, force)
    if not processes.is_main():
        return
    finished = [
        one
        for one in table(current.settings)
        if one in asked or is_current(evaluation(one, current.settings.mission), current)
    ]
    rows = compare_variants(current, asked, finished)
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    shown = Table("variant", "", title=f"{current.folder}, {file.value} split, conditions A to D")
    for heading in ("parsed", "correct"):
        shown.add_column(heading, justify="right")
    shown.add_column("compared with")
    shown.add_column("change")
    for row in rows:
        for condition, counts in row["conditions"].items():
            shares = [percent(counts[key] / counts["count"]) for key in ("parsed", "right")]
            change = change_in_words(counts["change"]) if counts["change"] else ""
            shown.add_row(row["variant"], condition, *shares, row["compared_with"] or "", change)
        shown.add_section()
    output().print(shown)


def _evaluate_stress(
    names: str, preset: str, assignments: list[str], folder: Path | None, file: SplitName, as_json: bool, force: bool
) -> None:
    """Evaluate the flight's decisions under the named stresses, and print the rates and their changes."""
    from orion_triage.dataset.dataset import Dataset
    from orion_triage.evaluate.results import stress_results
    from orion_triage.evaluate.stress import seconds_per_answer
    from orion_triage.imagery.stress import STRENGTHS, chosen
    from orion_triage.pipeline import is_current, stress_evaluation
    from orion_triage.progress import in_words
    from orion_triage.report.render import stress_table, worst_under_stress

    asked = chosen([word.strip() for word in names.split(",") if word.strip()])
    current = run_of(preset, assignments, folder, file.value)
    do_stage("evaluate constrained", current)  # the answers to compare with; skipped if they are there
    stages = [stress_evaluation(stress, current.settings) for stress in asked]
    if waiting := [stage for stage in stages if force or not is_current(stage, current)]:
        frames = len(Dataset(current.dataset, current.settings.mission).records(current.split))
        count, each = len(waiting) * len(STRENGTHS) * frames, seconds_per_answer(current)
        time_needed = f", at most about {in_words(count * each)}" if each else ""
        messages().print(
            f"{count:,} answers: {len(waiting)} stresses x {len(STRENGTHS)} strengths x {frames} frames{time_needed}",
            soft_wrap=True,
        )
    for stage in stages:
        do_stage(stage, current, force)
    if not processes.is_main():
        return
    found = stress_results(current)
    assert found is not None
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    console = output()
    console.print(stress_table(found, [stress.name for stress in asked]))
    console.print(worst_under_stress(found))


def _evaluate_controls(
    names: str, preset: str, assignments: list[str], folder: Path | None, file: SplitName, as_json: bool, force: bool
) -> None:
    """Ask the named variants the further controls, and print them beside the conditions B, C and D."""
    from orion_triage.evaluate.controls import figures_of
    from orion_triage.evaluate.variants import chosen
    from orion_triage.pipeline import controls_evaluation, evaluation
    from orion_triage.report.render import controls_table

    current = run_of(preset, assignments, folder, file.value)
    mission = current.settings.mission
    asked = chosen(current.settings, [word.strip() for word in names.split(",") if word.strip()] or ["quantized"])
    for variant in asked:
        do_stage(evaluation(variant, mission), current)  # the conditions to compare with; skipped if they are there
        do_stage(controls_evaluation(variant, mission), current, force)
    if not processes.is_main():
        return
    found = {variant.name: figures_of(current, variant) for variant in asked}
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    for name, figures in found.items():
        output().print(controls_table(name, figures))


def _print_rates(run: Any, stage: str, as_json: bool = False) -> None:
    """Print the accuracy of one evaluation, by condition."""
    from orion_triage.evaluate.conditions import CONDITIONS
    from orion_triage.runs.manifest import read_manifest

    if not processes.is_main():
        return
    manifest = read_manifest(run.product(stage))
    assert manifest is not None
    figures = {condition: manifest.figures[condition] for condition in CONDITIONS if condition in manifest.figures}
    if as_json:
        typer.echo(json.dumps(figures, indent=2))
        return
    for condition, rates in figures.items():
        typer.echo(f"{condition}: {rates['right']}/{rates['count']} correct, {rates['unparsable']} unparsable")


@command(
    epilog="Example: orion report\n\nExample: orion report --rescore\n\n"
    "Example: orion report --file val\n\nExample: orion report --run runs/tiny --json"
)
def report(
    folder: NewestRunOption = None,
    file: FileOption = SplitName.test,
    rescored: Annotated[
        bool,
        typer.Option("--rescore", help="First read all stored answers again with this version; no model is asked."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write the report of a run and print its tables.

    Writes results.json, report.html, report.md and report.png.
    Includes every finished evaluation that 'orion run' makes, and those of
    other pairs and servers. For other decodings, see 'orion evaluate --variants'.
    """
    run = finished_run(folder, "dataset", file.value)
    if rescored:
        _rescore(run)
    write_report(run, as_json=as_json)


def _rescore(run: Any) -> None:
    """Read the stored answers again, and say which of them count otherwise now."""
    from orion_triage.evaluate.rescore import rescore

    changed = rescore(run)
    for name, answers in changed.items():
        first, (before, now) = next(iter(answers.items()))
        said = f"{name}: {len(answers)} answers read otherwise, for example {first}: {before}, now {now}"
        messages().print(said, soft_wrap=True)
    if not changed:
        messages().print("rescored: this version reads every stored answer as before")


def write_report(run: Any, *, as_json: bool) -> None:
    """Write the report if something changed, and print its tables; for the test split, the verdict last."""
    from orion_triage.report import write
    from orion_triage.report.render import terminal_tables, worst_under_stress

    results, unchanged = write.run(run)
    if as_json:
        typer.echo(json.dumps(results, indent=2))
        return
    console = output()
    for table in terminal_tables(results):
        console.print(table)
    if results["stress"]:
        console.print(worst_under_stress(results["stress"]))
    if results["verdict"]:
        print_verdict(results["verdict"])
    suffix = "" if run.split == "test" else f"-{run.split}"
    names = f"{run.folder / f'report{suffix}.md'} and {run.folder / f'report{suffix}.html'}"
    console.print(f"report{' (unchanged)' if unchanged else ''}: {names}", soft_wrap=True)


def print_verdict(verdict: dict[str, Any]) -> None:
    """Print the verdict, its criteria, and what to do."""
    from orion_triage.report.render import OUTCOME_OF, advice, verdict_in_words, verdict_table

    colour = {"pass": "bold green", "fail": "bold red", "open": "bold yellow"}[OUTCOME_OF[verdict["verdict"]]]
    console = output()
    console.print(verdict_table(verdict, console.width))
    console.print(styled(colour, verdict["verdict"], f": {verdict_in_words(verdict)}"))
    for line in advice(verdict):
        console.print(f"- {line}")


@command(
    "verdict",
    epilog="Example: orion verdict\n\nExample: orion verdict runs/tiny --json\n\n"
    "Example: orion verdict runs/tiny --require && orion bundle runs/tiny",
)
def verdict_command(
    folder: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="Run folder. Default: the newest finished run.")
    ] = None,
    required: Annotated[bool, typer.Option("--require", help="Exit with status 1 unless the verdict is FLY.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Say whether a run's model may fly: FLY, DO NOT FLY or NOT ENOUGH EVIDENCE.

    Prints each criterion with what was measured on the test frames, what is
    needed, and what to do. Change the limits with --set verdict.NAME=VALUE in
    'orion run'.
    """
    from orion_triage.evaluate.results import current_results
    from orion_triage.evaluate.verdict import FLY

    run = finished_run(folder, "quantize")
    results, _ = current_results(run)
    verdict = results["verdict"]
    if as_json:
        typer.echo(json.dumps({"run": str(run.folder), **verdict}, indent=2))
    else:
        print_verdict(verdict)
    if required and verdict["verdict"] != FLY:
        raise typer.Exit(1)


@command(
    epilog="Example: orion compare runs/tiny runs/other\n\n"
    "Example: orion compare runs/seed-42 runs/seed-43 runs/seed-44\n\n"
    "Example: orion compare runs/tiny runs/other --file val --json"
)
def compare(
    folders: Annotated[
        list[Path], typer.Argument(metavar="RUN RUN...", help="Run folders. Each is compared with the first.")
    ],
    file: FileOption = SplitName.test,
    as_json: JsonOption = False,
) -> None:
    """Compare runs frame by frame with the first one (paired test).

    All runs must have been evaluated on the same frames and prompts. Leaves out
    and names evaluations of another pair or of other settings than a run's own.
    With three runs or more, also prints the lowest, median and highest accuracy.
    """
    from rich.table import Table

    from orion_triage.evaluate.seeds import outdated_evaluations, spread
    from orion_triage.report.compare import compare_runs
    from orion_triage.report.render import change_in_words
    from orion_triage.runs.run import open_run
    from orion_triage.templates import percent

    if len(folders) < 2:
        raise typer.BadParameter("give at least two run folders.", param_hint="'RUN RUN...'")
    first, *others = runs = [open_run(folder, file.value) for folder in folders]
    outdated = {str(one.folder): found for one in runs if (found := outdated_evaluations(one))}
    for name, found in outdated.items():
        for variant, why in found.items():
            said = f"left out: {variant} of {name} is outdated ({'; '.join(why)}). 'orion run --run {name}' renews it"
            messages().print(styled("yellow", said), soft_wrap=True)
    compared = {str(other.folder): compare_runs(first, other) for other in others}
    accuracies = spread(runs)
    if as_json:
        value = {"first": str(first.folder), "split": file.value, "against": compared, "accuracies": accuracies}
        typer.echo(json.dumps({**value, "left_out": outdated}, indent=2))
        return
    for name, models in compared.items():
        table = Table("model", "", title=f"{name} compared with {first.folder}, {file.value} split")
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


@command(
    "threshold",
    epilog="Example: orion threshold\n\n"
    "Example: orion threshold --max-irrecoverable-loss 2%\n\n"
    "Example: orion threshold --max-irrecoverable-loss 10% --confidence 95%\n\n"
    "Example: orion threshold --keep-unlike\n\n"
    "Example: orion threshold --head\n\n"
    "Example: orion threshold --undo --run runs/tiny",
)
def threshold_command(
    limit: Annotated[
        str,
        typer.Option(
            "--max-irrecoverable-loss",
            metavar="SHARE",
            help="Largest share of the frames to be sent or stored that may be dropped: 5% or 0.05.",
        ),
    ] = "5%",
    folder: FinishedRunOption = None,
    confidence: Annotated[
        str,
        typer.Option(
            "--confidence",
            metavar="SHARE",
            help="Promise the limit with this confidence, for frames like those of val: 95%. Needs enough val frames.",
        ),
    ] = "",
    keep_unlike: Annotated[
        bool,
        typer.Option("--keep-unlike", help="Never drop a frame that looks unlike all frames of train and val."),
    ] = False,
    headed: Annotated[
        bool,
        typer.Option("--head", help="Of the head of 'orion adapt', on its labelled frames instead of val."),
    ] = False,
    verdict_only: Annotated[
        bool,
        typer.Option(
            "--verdict-only", help="Of the category decided without a reason ('orion triage --verdict-only')."
        ),
    ] = False,
    loosen: Annotated[
        bool,
        typer.Option("--loosen", help="Drop more frames, although the decisions of now are within the limit."),
    ] = False,
    undo: Annotated[bool, typer.Option("--undo", help="Put back the threshold before the last one, or none.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Choose the probability above which a frame is dropped.

    Uses the validation split. Shows the frames before and after, on val and on
    test; evaluates both if necessary. 'orion triage', report and bundle apply
    the threshold. With --head, uses what heads answer to the labelled frames of
    places that they have not seen.
    """
    from orion_triage.dataset.dataset import Dataset
    from orion_triage.evaluate import threshold
    from orion_triage.evaluate.results import blank_frames, unlike_frames
    from orion_triage.mission.decide import Rules

    share = threshold.parse_share(limit)
    sure = threshold.parse_confidence(confidence) if confidence else None
    if headed and verdict_only:
        raise typer.BadParameter("cannot be combined with --head: a head has no reason.", param_hint="'--verdict-only'")
    of: threshold.Of = "head" if headed else "verdict-only" if verdict_only else "pair"
    if verdict_only and keep_unlike:
        raise typer.BadParameter(
            "cannot be combined with --verdict-only. Without --verdict-only, it holds for both.",
            param_hint="'--keep-unlike'",
        )
    if headed and keep_unlike:
        raise typer.BadParameter(
            "cannot be combined with --head: a head is for frames unlike those of train and val. "
            "Without --head, it holds for the head, too.",
            param_hint="'--keep-unlike'",
        )
    run = finished_run(folder, "quantize", "val")
    if undo:
        back = threshold.undo(run, of)
        if as_json:
            typer.echo(json.dumps({"drop_threshold": back}))
        else:
            typer.echo("threshold: none; the model decides" if back is None else _drops(back, run.settings.mission))
        return
    if headed:
        record = threshold.choose(run, share, (), loosen=loosen, confidence=sure, of="head")
        if as_json:
            typer.echo(json.dumps(record, indent=2))
            return
        _print_threshold(record, {threshold.LABELLED: record["there"]}, run.settings.mission)
        typer.echo(f"'{threshold.command_of(of)} --undo' takes the threshold back.")
        return
    test = replace(run, split="test")
    for one in (run, test):
        do_stage(f"evaluate {threshold.VARIANTS[of]}", one)
    before = threshold.current_rules(run, of)
    ranges = before.appearance if verdict_only else None
    if keep_unlike:
        ranges = Dataset(run.dataset, run.settings.mission).appearance()
    outside = [unlike_frames(one, Rules(appearance=ranges)) for one in (run, test)]
    record = threshold.choose(
        run, share, blank_frames(run),
        loosen=loosen, confidence=sure, appearance=ranges, unlike_frames=outside[0], of=of,
    )  # fmt: skip
    on_test = threshold.effect_on(test, before, blank_frames(test), outside[1], of)
    if as_json:
        typer.echo(json.dumps(record | {"on_test": on_test}, indent=2))
        return
    _print_threshold(record, {"val": record["there"], "test": on_test}, run.settings.mission)
    if keep_unlike:
        typer.echo(
            f"frames unlike those of train and val are kept: {len(outside[0])} of val, {len(outside[1])} of test"
        )
    typer.echo(f"'{threshold.command_of(of)} --undo' takes the threshold back.")


def _print_threshold(record: dict[str, Any], effects: dict[str, dict[str, Any]], mission: Any) -> None:
    """The threshold, its effects by split, and what it promises."""
    from orion_triage.report.render import promised

    typer.echo(_drops(record["drop_threshold"], mission))
    _print_effects(effects, mission)
    typer.echo(promised(record["promise"], mission, "val" if "val" in effects else "the labelled frames"))


def _drops(drop_threshold: float, mission: Any) -> str:
    from orion_triage.mission.mission import listed

    dropped = listed(mission.that("drop"), "or")
    if drop_threshold <= 1:
        return f"threshold: a frame is dropped if P({dropped}) is {drop_threshold:.3f} or more"
    return f"threshold: none; P({dropped}) drops no frame"


def _print_effects(effects: dict[str, dict[str, Any]], mission: Any) -> None:
    """A table of the decisions before and after, by split, and the frames that change."""
    from rich.table import Table

    from orion_triage.mission.mission import listed
    from orion_triage.report.render import rate
    from orion_triage.templates import percent

    kept, sent = listed(mission.that("send", "store")), listed(mission.that("send")) or "to be sent"
    table = Table("split", "", f"{kept} lost", f"{sent} found", "sent*", "dropped*", title="Before and after")
    for split, effect in effects.items():
        for when in ("before", "after"):
            values = effect[when]
            shares = [
                percent(values["orbit"][name]["value"]) if values["orbit"] else "-" for name in ("sent", "dropped")
            ]
            table.add_row(split, when, rate(values["irrecoverable_loss"]), rate(values["high_recall"]), *shares)
        table.add_section()
    output().print(table)
    typer.echo("*: shares of the frames in orbit, with the mission's prior")
    for split, effect in effects.items():
        typer.echo(f"{split}: {effect['lost']} more {kept} frames lost, {effect['saved']} saved")
