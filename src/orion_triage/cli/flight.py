"""Flight commands: build the bundle, classify frames, measure one frame."""

import json
import shlex
from collections import Counter
from dataclasses import replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from orion_triage.cli.app import app
from orion_triage.cli.terminal import (
    FileOption,
    FinishedRunOption,
    JsonOption,
    SplitName,
    cell,
    do_stage,
    finished_run,
    messages,
    output,
    progress_bar,
    styled,
)
from orion_triage.errors import OrionError, one_line

command = partial(app.command, rich_help_panel="Flight")
REST_COLUMNS = 64  # width of the table without the file column: enough to read a reason


@command(
    epilog="Example: orion bundle\n\nExample: orion bundle runs/tiny --out bundle\n\n"
    "Example: orion bundle runs/tiny --accept-risk 'rehearsal on the Pi, not for flight'\n\n"
    "Example: orion bundle --head\n\nExample: orion bundle --both-towers"
)
def bundle(
    folder: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="Run folder. Default: the newest finished run.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder to write. Default: bundle in the run folder.")
    ] = None,
    accepted: Annotated[
        str,
        typer.Option(
            "--accept-risk", metavar="REASON", help="Bundle a model whose verdict is DO NOT FLY. The bundle says why."
        ),
    ] = "",
    headed: Annotated[
        bool,
        typer.Option("--head", help="Let the head of 'orion adapt' decide in flight instead of the language model."),
    ] = False,
    time_out: Annotated[
        float | None,
        typer.Option(
            "--time-out",
            metavar="SECONDS",
            min=1,
            max=86_400,
            help="Most seconds per frame in flight. A frame that takes longer is stored without a decision. "
            "Default: 10 times the slowest golden frame here, in whole minutes.",
        ),
    ] = None,
    verdict_only: Annotated[
        bool,
        typer.Option(
            "--verdict-only",
            help="In flight, decide the category first, in one step, and write a reason only for the mission's "
            "reasons_for. Needs 'orion evaluate --variants verdict-only'.",
        ),
    ] = False,
    both_towers: Annotated[
        bool,
        typer.Option("--both-towers", help="Also put in the vision tower as Q8_0. On board, tune.py measures both."),
    ] = False,
) -> None:
    """Build the flight bundle of a run.

    Contains GGUF pair, prompt, server command, golden frames, go/no-go check and
    flight client, and the verdict of 'orion verdict'. A model that must not fly
    is refused.
    """
    from orion_triage.flight import bundle
    from orion_triage.safe.files import sha256_of_file

    run = finished_run(folder, "quantize")
    where = out or run.folder / "bundle"
    with progress_bar() as progress:
        made = bundle.run(
            run,
            where,
            progress,
            accepted_risk=accepted,
            time_out=time_out,
            head=headed,
            verdict_only=verdict_only,
            second_tower=both_towers,
        )
    console = messages()
    console.print(f"bundle: {made['bytes'] / 1e6:,.1f} MB  ->  {where}", soft_wrap=True)
    console.print(f"  decides: {(now := bundle.decides(made))}", soft_wrap=True)
    if made["decided_before"] not in ("", now):
        said = f"  it replaces a bundle that decided otherwise: {made['decided_before']}"
        console.print(styled("yellow", said), soft_wrap=True)
    console.print(f"  {bundle.verdict_line(made)}", soft_wrap=True)
    for note in made["notes"]:
        console.print(f"  note: {note}", soft_wrap=True)
    console.print(f"  seconds per frame here: {', '.join(f'{took:g}' for took in made['seconds_per_frame'])}")
    console.print(f"  most seconds per frame in flight: {made['seconds_per_frame_at_most']:g} (--time-out)")
    if headed:
        console.print(f"  {bundle.head_line(made)}", soft_wrap=True)
        for note in made["head"]["notes"]:
            console.print(f"  note: {note}", soft_wrap=True)
        took = ", ".join(f"{took:g}" for took in made["seconds_per_frame_of_head"])
        most = made["head"]["seconds_per_frame_at_most"]
        console.print(f"  seconds per frame of the head here: {took}; at most {most:g} in flight")
    console.print(f"  sha256 of bundle.json: {sha256_of_file(where / 'bundle.json')}", soft_wrap=True)


@command(
    epilog="Example: orion triage frame.png\n\n"
    "Example: orion triage frames/ --recursive --out verdicts.jsonl\n\n"
    "Example: orion triage photo.jpg --resize --run runs/tiny --json"
)
def triage(
    files: Annotated[
        list[Path], typer.Argument(help="Frames or folders of frames: PNG, JPEG, TIFF, or raw 512x512x3 RGB (.raw).")
    ],
    folder: FinishedRunOption = None,
    bundle: Annotated[
        Path | None,
        typer.Option(
            "--bundle",
            help="Classify with a flight bundle instead of a run, exactly as on board: by its head, if it has one.",
        ),
    ] = None,
    recursive: Annotated[
        bool, typer.Option("--recursive", help="Also classify the frames in the folders of a folder.")
    ] = False,
    resize: Annotated[
        bool, typer.Option("--resize", help="Accept frames of other sizes: crop to a square and scale.")
    ] = False,
    blank_rule: Annotated[
        bool, typer.Option("--blank-rule/--no-blank-rule", help="Decide blank frames without using the model.")
    ] = True,
    verdict_only: Annotated[
        bool,
        typer.Option(
            "--verdict-only",
            help="Decide the category first, in one step, and write a reason only for the mission's reasons_for.",
        ),
    ] = False,
    headed: Annotated[
        bool, typer.Option("--head", help="Let the head of 'orion adapt' decide instead of the language model.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Append one JSON line per frame. Run the same command again to resume; it reads refused frames again.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Classify frames with the GGUF pair of a run or a flight bundle.

    Applies the threshold from 'orion threshold', if there is one. Shows the
    model's category, the probability of each, the decision, and what decided.
    Lists what it leaves out of a folder: hidden files, other formats, folders.
    Exits with status 1 if a frame is refused.
    """
    from orion_triage.flight import triage
    from orion_triage.safe.files import appending

    if bundle and folder:
        raise typer.BadParameter("cannot be combined with --run. Remove one of them.", param_hint="'--bundle'")
    if verdict_only and (bundle or headed):
        other = "a bundle decides as it was made ('orion bundle --verdict-only')" if bundle else "a head has no reason"
        raise typer.BadParameter(f"{other}. Use it with --run alone.", param_hint="'--verdict-only'")
    flown = (
        triage.of_bundle(bundle, head=headed)
        if bundle
        else triage.of_run(finished_run(folder, "quantize", named=False), head=headed, verdict_only=verdict_only)
    )
    messages().print(f"triage with {flown.name}", soft_wrap=True)
    paths, left_out = triage.frames_in(files, recursive=recursive)
    for said in left_out:
        messages().print(f"left out of {one_line(said)}", soft_wrap=True)
    rules = replace(flown.rules, blank=blank_rule)
    pair = triage.asked_by(flown, rules, resize) if out else ""
    counts: Counter[str] = Counter()
    conversions: Counter[str] = Counter()
    shown: list[Any] = []
    with appending(out) as write:  # before the results are read: another command may be writing them
        earlier = triage.read_earlier(out, pair) if out else triage.Earlier()
        left = earlier.left_of(paths)
        changed = sum(earlier.has_changed(path) for path in left)
        try:
            with progress_bar() as progress:
                outcomes = triage.triage_with_pair(
                    left,
                    flown,
                    keep_log=bundle is None,
                    rules=rules,
                    resize=resize,
                    progress=progress,
                )
                for done, outcome in enumerate(outcomes if left else (), start=len(paths) - len(left) + 1):
                    counts[outcome.verdict.category if outcome.verdict else "refused"] += 1
                    conversions.update(outcome.changes)
                    row = triage.to_row(outcome, flown.mission, pair)
                    if not earlier.says(row):
                        write(row)
                    if outcome.verdict and not out:
                        shown.append(outcome)
                    if outcome.error:
                        messages().print(styled("bold red", "refused:", f" {one_line(outcome.error)}"), soft_wrap=True)
                    progress("classifying frames", done, len(paths))
        finally:  # verdicts that were computed are shown, also if a server dies or the user interrupts
            if out is None and (shown or not left or counts):
                _show_verdicts(shown, flown.mission, as_json)
    for change, count in sorted(conversions.items()):
        messages().print(f"note: {count} of {len(left)} frames: {change}")
    if changed:
        messages().print(f"note: decided again, because their bytes have changed: {changed} of {len(left)} frames")
    if out:
        summary = ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "no new frames"
        skipped = f", {len(paths) - len(left)} already done" if len(left) < len(paths) else ""
        messages().print(f"{summary}{skipped}  ->  {out}", soft_wrap=True)
    if counts["refused"]:
        raise typer.Exit(1)


class How(StrEnum):
    """The ways to adapt a run to a camera."""

    head = "head"
    CONTINUE = "continue"
    both = "both"


@command(
    epilog="Example: orion adapt my-labelled-frames\n\n"
    "Example: orion adapt my-labelled-frames --how both\n\n"
    "Example: orion adapt downlink --run runs/tiny --json"
)
def adapt(
    frames: Annotated[
        Path | None,
        typer.Argument(metavar="[FOLDER]", help="Labelled frames, in any layout of 'orion run --dataset FOLDER'."),
    ] = None,
    named: Annotated[Path | None, typer.Option("--frames", help="The same as FOLDER.")] = None,
    how: Annotated[
        How, typer.Option("--how", help="Fit a head, continue the adapter, or measure both and make the better one.")
    ] = How.head,
    folds: Annotated[
        int, typer.Option("--folds", min=2, max=20, help="Trainings of the cross-validation of a continued adapter.")
    ] = 5,
    folder: FinishedRunOption = None,
    as_json: JsonOption = False,
) -> None:
    """Adapt a run to your camera with a few labelled frames.

    A head is a logistic regression on what the pair sees, fitted in seconds; the
    pair stays as it is. Use it with 'orion triage --head' and 'orion evaluate
    --variants head'. --how continue trains the adapter on with these frames and
    the run's own, and makes a new pair in RUN-continued. Says by cross-validation
    whether it is better than the pair on these frames. Run the same command again
    to resume.
    """
    from orion_triage.dataset.labelled import read_labelled
    from orion_triage.evaluate import adapt as adapting
    from orion_triage.flight import continued, triage
    from orion_triage.mission.verdict import require_category_alone
    from orion_triage.report.render import adapted_in_words, adapted_table

    source = frames or named
    if source is None or (frames and named):
        raise typer.BadParameter("name one folder of labelled frames.", param_hint="'FOLDER'")
    run = finished_run(folder, "quantize")
    before = run.settings.fine_tune
    if folder is None and before.frames and Path(before.frames).resolve() == source.resolve():
        raise OrionError(
            f"the newest run, {run.folder}, was made by continuing {before.continue_from} with the frames of {source}.",
            f"Name the run to adapt: --run {before.continue_from}, or --run {run.folder} to adapt it once more.",
        )
    flown, mission = triage.of_run(run), run.settings.mission
    require_category_alone(mission)  # before anything is trained
    labelled, notes_of_frames = read_labelled(source, mission, flown.stretch)
    for note in notes_of_frames:
        messages().print(one_line(note), soft_wrap=True)
    zero_shot: list[str | None] = []
    answers = None
    with progress_bar("adapt") as progress:
        paths = [frame.path for frame in labelled]
        for done, outcome in enumerate(triage.triage_with_pair(paths, flown, rules=flown.rules, resize=True), start=1):
            zero_shot.append(outcome.verdict.category if outcome.verdict else None)
            progress("classifying frames with the pair", done, len(paths))
        if how is not How.head:
            divided = adapting.folds_of(labelled, mission, folds)
            answers = continued.out_of_fold(run, labelled, divided, progress=progress)
        made = adapting.fitted(run, labelled, zero_shot, progress, answers)
    figures = made.figures
    if as_json:
        typer.echo(json.dumps(figures, indent=2))
    else:
        output().print(adapted_table(figures))
        for line in adapted_in_words(figures):
            output().print(line, soft_wrap=True)
    if how is How.CONTINUE or (how is How.both and figures["chosen"] == "continued"):
        _continue(run, source, figures)
        return
    path = adapting.write(run, made)
    messages().print(f"head: {path.stat().st_size / 1000:.1f} kB  ->  {path}", soft_wrap=True)


def _continue(run: Any, frames: Path, figures: dict[str, Any]) -> None:
    """Make the continued run beside this one, and say what it changes on the run's own test frames."""
    from orion_triage.flight import continued
    from orion_triage.pipeline import take_dataset
    from orion_triage.report.compare import compare_runs
    from orion_triage.report.render import forgotten_in_words
    from orion_triage.safe.files import write_text

    after = continued.run_beside(run, frames)
    take_dataset(run, after)
    for stage in ("fine-tune", "fuse", "quantize", "evaluate quantized"):
        do_stage(stage, after)
    do_stage("evaluate quantized", run)
    compared = compare_runs(run, after)["quantized"]
    write_text(after.folder / continued.FIGURES_FILE, json.dumps(figures | {"forgotten": compared}, indent=1) + "\n")
    messages().print(forgotten_in_words(compared), soft_wrap=True)
    messages().print(
        f"next: {shlex.join(['orion', 'triage', str(frames), '--run', str(after.folder)])}", soft_wrap=True
    )


@command(
    "false-alarms",
    epilog="Example: orion false-alarms empty-ocean/\n\n"
    "Example: orion false-alarms downlink/ --recursive --run runs/tiny",
)
def false_alarms_command(
    frames: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of frames that are all to be dropped.")],
    folder: FinishedRunOption = None,
    category: Annotated[
        str, typer.Option("--category", help="Their category. Default: the mission's only one that is dropped.")
    ] = "",
    recursive: Annotated[
        bool, typer.Option("--recursive", help="Also the frames in its folders; those of one folder are of one place.")
    ] = False,
    resize: Annotated[
        bool, typer.Option("--resize", help="Accept frames of other sizes: crop to a square and scale.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Count the false alarms among many frames that are all to be dropped.

    Decides them as on board, shows how many are sent or stored, and what share of
    the sent frames in orbit is right. Run the same command again to resume. The
    report includes the result.
    """
    from orion_triage.evaluate.results import false_alarms_results
    from orion_triage.flight import false_alarms
    from orion_triage.report.render import false_alarms_found

    run = finished_run(folder, "quantize")
    with progress_bar() as progress:
        record = false_alarms.run(run, frames, category=category, recursive=recursive, resize=resize, progress=progress)
    for said in record["left_out"]:
        messages().print(f"left out of {one_line(said)}", soft_wrap=True)
    do_stage("evaluate constrained", run)  # the answers to the split's other frames; skipped if they are there
    found = false_alarms_results(run)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    output().print(false_alarms_found(found, run.settings.mission), soft_wrap=True)


def _show_verdicts(outcomes: list[Any], mission: Any, as_json: bool) -> None:
    """Print the verdicts as JSON or as a table. No file name is shortened: reasons wrap first, then names."""
    from rich.cells import cell_len
    from rich.table import Table

    from orion_triage.flight.triage import to_json

    if as_json:
        typer.echo(json.dumps([to_json(outcome, mission) for outcome in outcomes], indent=2))
        return
    if not outcomes:
        return
    console = output()
    longest = max(cell_len(cell(outcome.file)) for outcome in outcomes)
    table = Table()
    table.add_column("file", overflow="fold", width=min(longest, max(len("file"), console.width - REST_COLUMNS)))
    table.add_column("decision\nby")
    table.add_column(f"model\nP({' '.join(mission.names)})")
    table.add_column("the model's reason", overflow="fold")
    table.add_column("seconds", justify="right")
    for outcome in outcomes:
        verdict, answered = outcome.verdict, to_json(outcome, mission)
        scores = " ".join(f"{score:.2f}" for score in (answered["scores"] or {}).values())
        fields = ", ".join(f"{name}: {value}" for name, value in verdict.fields)
        table.add_row(
            cell(outcome.file),
            f"{verdict.category}\n{outcome.decided_by}",
            f"{answered['model_category'] or 'not asked'}\n{scores}".strip(),
            "\n".join(cell(text) for text in (verdict.reason, fields) if text),
            f"{outcome.seconds:.2f}",
        )
    console.print(table)


@command(
    "bench-frame",
    epilog="Example: orion bench-frame\n\n"
    "Example: orion bench-frame runs/tiny runs/tiny-384 --repeats 5\n\n"
    "Example: orion bench-frame --sizes 256 --quants Q3_K_M --reasons 10\n\n"
    "Example: orion bench-frame runs/tiny --tune --minutes 5",
)
def bench_frame_command(
    folders: Annotated[
        list[Path] | None, typer.Argument(metavar="RUN", help="Run folders. Default: the newest finished run.")
    ] = None,
    folder: Annotated[Path | None, typer.Option("--run", help="Run folder: same as RUN, for one run.")] = None,
    sizes: Annotated[
        str,
        typer.Option(
            "--sizes",
            metavar="PX,PX",
            help="More input sizes to measure: multiples of 32 from 128 to 512. Default: 512,384,256 for one run, none "
            "for several runs.",
        ),
    ] = "",
    mmprojs: Annotated[
        str, typer.Option("--mmproj", metavar="TYPE,TYPE", help="Types of the vision tower: F16, Q8_0.")
    ] = "F16,Q8_0",
    quantizations: Annotated[
        str,
        typer.Option(
            "--quants",
            metavar="TYPE,TYPE",
            help="More quantizations to measure. Default: variants.quantizations in the run's settings.",
        ),
    ] = "",
    reasons: Annotated[
        str,
        typer.Option("--reasons", metavar="TOKENS,TOKENS", help="More lengths of the reason to measure, in tokens."),
    ] = "20,40",
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Frames per row. Prints the median.")] = 3,
    tuning: Annotated[
        bool,
        typer.Option(
            "--tune",
            help="Search for the fastest flags of llama-server for one run: threads, flash attention, mmproj, batches, "
            "weight repacking, mmap. As tune.py of the bundle does on board. Run the same command again to resume.",
        ),
    ] = False,
    minutes: Annotated[
        float, typer.Option("--minutes", min=0.01, max=1440, help="Most minutes of --tune, beside making a bundle.")
    ] = 10,
    file: FileOption = SplitName.test,
    as_json: JsonOption = False,
) -> None:
    """Measure time and memory per frame on this machine.

    Measures the flight setup first, then one change at a time: input size,
    mmproj, quantization, flash attention, length of the reason.
    Shows accuracy only for setups that were evaluated.
    With --tune, searches for the fastest flags of llama-server instead, among
    those that move no verdict of the bundle's golden frames.
    """
    from orion_triage.flight import bench_frame

    if folders and folder:
        raise typer.BadParameter("cannot be combined with the argument RUN. Remove one of them.", param_hint="'--run'")
    named = [folder] if folder else folders or []
    runs = [finished_run(one, "quantize", file.value) for one in named] or [finished_run(None, "quantize", file.value)]
    if tuning:
        if len(runs) > 1:
            raise typer.BadParameter("is for one run. Name one RUN.", param_hint="'--tune'")
        with progress_bar() as progress:
            report = bench_frame.tuned(runs[0], minutes=minutes, progress=progress)
        _print_tuning(report, as_json)
        return
    with progress_bar() as progress:
        measured = bench_frame.run(
            runs,
            sizes=[int(size) for size in bench_frame.parse_list(sizes, "input size")],
            mmprojs=bench_frame.parse_list(mmprojs, "mmproj"),
            quantizations=bench_frame.parse_list(quantizations, "quantization"),
            reason_tokens=[int(count) for count in bench_frame.parse_list(reasons, "length")],
            repeats=repeats,
            progress=progress,
        )
    if as_json:
        typer.echo(json.dumps(measured, indent=2))
        return
    _print_frames(measured)


def _print_tuning(report: dict[str, Any], as_json: bool) -> None:
    from rich.table import Table

    from orion_triage.flight import tune

    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    table = Table(title=f"{report['run']}: flags of llama-server, the fastest first")
    for place, heading in enumerate(tune.COLUMNS):
        table.add_column(heading, justify="right" if 0 < place < tune.VERDICTS else "left")
    for row in tune.table(report):
        table.add_row(*(cell(value) for value in row))
    output().print(table)
    for line in tune.lines_of(report):
        output().print(cell(line), soft_wrap=True)


def _print_frames(measured: dict[str, Any]) -> None:
    from rich.table import Table

    from orion_triage.evaluate.variants import VERDICT_ONLY
    from orion_triage.flight.tune import BUSY
    from orion_triage.machine import power

    console, conditions, machine = output(), measured["conditions"], measured["machine"]
    everything = measured["rows"]
    digits = 3 if max(row["seconds_per_frame"] for row in everything) < 10 else 2
    for name, seconds in measured["in_flight_seconds_per_frame"].items():
        rows = [row for row in everything if row["run"] == name]
        flown = rows[0]
        table = Table(title=f"{name}, {flown['quantization']} at {flown['frame_size']} px: seconds per frame")
        table.add_column("setup")
        for heading in ("encode", "prefill", "decode", "total", "MB", *conditions):
            table.add_column(heading, justify="right")
        for row in rows:
            parts = (row["encode_seconds"], row["prefill_seconds"], row["decode_seconds"], row["seconds_per_frame"])
            right = [f"{row['right'][c]}/{row['count'][c]}" if row["right"] else "" for c in conditions]
            table.add_row(
                row["change"],
                *(f"{part:.{digits}f}" for part in parts),
                f"{row['peak_memory_bytes'] / 1e6:,.0f}",
                *right[:-1],
                right[-1] + (" *" if row["best"] else ""),
            )
        console.print(table)
        alone = " (verdict-only: 1)" if any(row["change"] == VERDICT_ONLY for row in rows) else ""
        console.print(
            f"Prompt: {flown['prompt_tokens']} tokens, {flown['tokens_read']} of them read per frame. "
            f"Answer: {flown['answer_tokens']} tokens{alone}. 'orion triage': {seconds:.{digits}f} s per frame, "
            f"{power.in_words(measured['in_flight_cost'][name], power.board_of(machine['processor']))}.",
            soft_wrap=True,
        )
    console.print(
        f"Medians of {measured['repeats']} frames on {machine['cores']} cores ({machine['processor']}). "
        f"{' and '.join(conditions)}: correct answers, if this setup was evaluated.",
    )
    if any(row["best"] for row in everything):
        console.print("* Pareto-optimal in seconds and B, among the evaluated rows.")
    notes = [f"not measured: {note}" for note in measured["left_out"]]
    if not all(row["right"] for row in everything if row["change"] == VERDICT_ONLY):
        notes.append("verdict-only has no accuracy yet. Run 'orion evaluate --variants verdict-only'.")
    if not measured["same_frames"]:
        notes.append("warning: the runs were evaluated on different frames. Do not compare their accuracies.")
    if machine["busy_cores"] > BUSY:
        notes.append(f"warning: other programs used {machine['busy_cores']:g} cores. The measured times are too long.")
    for note in notes:
        messages().print(note, soft_wrap=True)
