"""Review commands: make a labelling task of a log, and read the labels back."""

import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from orion_triage.cli.app import app
from orion_triage.cli.terminal import JsonOption, cell, messages, output, progress_bar
from orion_triage.errors import one_line

review_app = typer.Typer(add_completion=False, no_args_is_help=True)
app.add_typer(
    review_app,
    name="review",
    rich_help_panel="Flight",
    help="Let people label frames of a log: choose which, write the task, read the labels back.",
    epilog="Example: orion review new verdicts.jsonl review\n\n"
    "Example: orion review suggest review --server http://127.0.0.1:8000\n\n"
    "Example: orion review read review labels.json --dataset labelled",
)
MissionOption = Annotated[
    Path | None, typer.Option("--mission", metavar="FILE", help="Mission file. Default: the published mission.")
]


@review_app.command(
    epilog="Example: orion review new verdicts.jsonl review\n\n"
    "Example: orion review new triage.jsonl review --frames downlink/done --count 100"
)
def new(
    log: Annotated[Path, typer.Argument(metavar="LOG", help="Log of 'orion triage --out', or of the flight client.")],
    out: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder to write: the task.")],
    frames: Annotated[
        Path | None, typer.Option("--frames", help="Folder of the frames, if they are not where the log says.")
    ] = None,
    count: Annotated[int, typer.Option("--count", min=1, help="Frames to be labelled.")] = 50,
    random_share: Annotated[
        float, typer.Option("--random-share", min=0, max=1, help="Of these, drawn from all frames of the log.")
    ] = 0.2,
    blind_share: Annotated[
        float, typer.Option("--blind-share", min=0, max=1, help="Of these, shown without the model's suggestion.")
    ] = 0.2,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the draw.")] = 42,
    mission_file: MissionOption = None,
) -> None:
    """Choose frames of a log and write a labelling task.

    First frames without a verdict, unlike the training, overruled by a rule, or
    uncertain; and a random share. Writes review.html, which needs no network,
    and tasks for Label Studio.
    """
    from orion_triage.mission.load import load_mission
    from orion_triage.mission.mission import default_mission
    from orion_triage.review.choose import LeftOut, choose, read_log
    from orion_triage.review.task import PAGE_FILE, require_new, usable, write

    mission = load_mission(mission_file) if mission_file else default_mission()
    require_new(out)  # before the frames are read
    left_out = LeftOut()
    logged = read_log(log, mission, left_out)
    with progress_bar() as progress:
        found = usable(logged, frames, left_out, progress)
        chosen = choose(found, count, random_share=random_share, blind_share=blind_share, seed=seed)
        counts = write(out, chosen, mission, log.name, progress=progress)
    for text in left_out.in_words():
        _say(text)
    said = ", ".join(f"{number} {why}" for why, number in sorted(counts.items()))
    messages().print(f"review new: {len(chosen)} frames ({said})  ->  {out}", soft_wrap=True)
    messages().print(f"next: open {out / PAGE_FILE} in a browser; then", soft_wrap=True)
    messages().print(
        f"  {shlex.join(['orion', 'review', 'read', str(out), 'LABELS.json', '--dataset', 'labelled'])}", soft_wrap=True
    )


@review_app.command(
    epilog="Example: orion review suggest review --server http://127.0.0.1:8000\n\n"
    "Example: LLAMA_API_KEY=... orion review suggest review --server https://models.example --model NAME "
    "--price-in 0.25 --price-out 2\n\n"
    "Example: orion review suggest review --show"
)
def suggest(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The task of 'orion review new'.")],
    server: Annotated[
        str,
        typer.Option(
            "--server",
            metavar="URL",
            help="An OpenAI-compatible server that accepts images (key: LLAMA_API_KEY). The pictures of the task are "
            "sent to it.",
        ),
    ] = "",
    model: Annotated[
        str, typer.Option("--model", metavar="NAME", help="One of the server's models. Default: its only one.")
    ] = "",
    price_in: Annotated[
        float | None, typer.Option("--price-in", min=0, help="Price of a million tokens of prompts, for the cost.")
    ] = None,
    price_out: Annotated[
        float | None, typer.Option("--price-out", min=0, help="Price of a million tokens of answers.")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, help="Most tokens of an answer. A model that thinks needs more.")
    ] = 1024,
    shown: Annotated[
        bool,
        typer.Option(
            "--show",
            help="Show all stored suggestions to people: write the page and the tasks for Label Studio again. Labels "
            "are kept. Blind frames stay blind.",
        ),
    ] = False,
    mission_file: MissionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Ask another model about the frames of a task.

    Its answers are stored beside the task, apart from people's labels, and
    'orion review read' compares them. They never become labels. Run the same
    command again to resume: no picture that was answered is sent again.
    """
    from orion_triage.mission.load import load_mission
    from orion_triage.mission.mission import default_mission
    from orion_triage.review import suggest as suggesting
    from orion_triage.review.labels import read_task
    from orion_triage.review.task import PAGE_FILE, show
    from orion_triage.safe.files import locked

    if not server and not shown:
        raise typer.BadParameter("name a server, or add --show for the stored suggestions.", param_hint="'--server'")
    if (price_in is None) != (price_out is None):
        raise typer.BadParameter("give both prices, or none.", param_hint="'--price-in'")
    prices = None if price_in is None or price_out is None else suggesting.Prices(price_in, price_out)
    mission = load_mission(mission_file) if mission_file else default_mission()
    task = read_task(folder, mission)
    with locked(folder, "orion review suggest"):
        if server:
            source = suggesting.connect_source(folder, task, mission, server, model, max_tokens, say=_say)
            with progress_bar() as progress:
                figures = suggesting.ask(folder, task, mission, source, prices=prices, progress=progress)
            typer.echo(json.dumps(figures, indent=2)) if as_json else _print_suggested(figures)
        if shown:
            said, _ = suggesting.suggestions_of(suggesting.read_suggestions(folder), task, mission)
            with progress_bar() as progress:
                show(folder, list(task.values()), mission, said, progress)
            names = ["the log", *sorted({one.source for of in said.values() for one in of})]
            _say(f"page and tasks with suggestions of {', '.join(names)}  ->  {folder / PAGE_FILE}")


def _say(text: str) -> None:
    messages().print(one_line(text), soft_wrap=True)  # with names that a server gives


def _print_suggested(figures: dict[str, Any]) -> None:
    console = output()
    counts = ", ".join(f"{number} {name}" for name, number in figures["of_category"].items())
    console.print(
        f"{cell(figures['source'])}: {figures['answered']} frames, {counts}, {figures['no_verdict']} without a verdict"
    )
    rate = figures["frames_per_minute"]
    console.print(
        f"requests answered now: {figures['asked_now']}" + (f", {rate:.1f} frames a minute" if rate is not None else "")
    )
    missing = f" ({figures['without_counts']} answers not counted by the server)" if figures["without_counts"] else ""
    console.print(f"tokens: {figures['prompt_tokens']:,} of prompts, {figures['answer_tokens']:,} of answers{missing}")
    if figures["cost"] is not None:
        console.print(f"cost of all answers: {figures['cost']:.4f}, in the currency of the prices")
    else:
        why = "the server does not count all tokens" if figures["priced"] else "give --price-in and --price-out"
        console.print(f"cost of all answers: unknown ({why})")
    if refused := figures["refused_parameters"]:
        console.print(f"asked without {', '.join(refused)}, which the server refused: its answers may vary")


@review_app.command(
    epilog="Example: orion review read review labels.json --dataset labelled\n\n"
    "Example: orion review read review anna.json export-from-label-studio.json --json"
)
def read(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The task of 'orion review new'.")],
    files: Annotated[
        list[Path], typer.Argument(metavar="LABELS...", help="Labels saved in the page, or exports of Label Studio.")
    ],
    dataset: Annotated[
        Path | None, typer.Option("--dataset", help="Folder to write: the frames on which all labellers agree.")
    ] = None,
    mission_file: MissionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read labels back, and say how far people and suggestions agree.

    With --dataset, writes a folder for 'orion adapt' and 'orion run --dataset'.
    Frames on which labellers disagree are left out of it and listed.
    """
    from orion_triage.mission.load import load_mission
    from orion_triage.mission.mission import default_mission
    from orion_triage.review.labels import CONFLICTS, Label, merge, read_labels, read_task, to_json, write_dataset
    from orion_triage.review.suggest import read_suggestions, suggestions_of

    mission = load_mission(mission_file) if mission_file else default_mission()
    task = read_task(folder, mission)
    labels: list[Label] = []
    empty = 0
    for path in files:
        found, none = read_labels(path, task, mission)
        labels, empty = labels + found, empty + none
    said, others = suggestions_of(read_suggestions(folder), task, mission)
    if others:
        _say(f"left out: {others} suggestions that answer another prompt than that of the mission {mission.name}")
    merged = merge(labels, task, mission, empty, said)
    written = write_dataset(dataset, merged, task) if dataset else 0
    if as_json:
        typer.echo(to_json(merged))
        return
    figures = merged.figures
    labellers = ", ".join(figures["labellers"]) or "nobody"
    console = output()
    console.print(f"{figures['labelled']} of {figures['frames']} frames labelled by {labellers}", soft_wrap=True)
    if figures["empty_in_export"]:
        console.print(f"left out: {figures['empty_in_export']} tasks of exports without a category", soft_wrap=True)
    if replaced := figures["replaced"]:
        console.print(
            f"labels replaced by a later one of the same name with another category: {len(replaced)}, for example "
            f"{cell(replaced[0])}. If two people have this name, give them two.",
            soft_wrap=True,
        )
    for pair, kappa in figures["kappa"].items():
        value = "-" if kappa["kappa"] is None else f"{kappa['kappa']:.2f}"
        console.print(f"kappa of {pair}: {value} on {kappa['frames']} frames", soft_wrap=True)
    for source, of in figures["as_suggested"].items():
        for name, words in (
            ("seen", "labels equal to its suggestion, which people saw"),
            ("blind", "labels equal to its suggestion, which people did not see"),
            ("random", "right on random frames on which people agree"),
        ):
            console.print(f"{cell(source)}: {words}: {_share_in_words(of[name])}", soft_wrap=True)
        if of["without"]:
            console.print(f"{cell(source)}: labelled frames without its suggestion: {of['without']}", soft_wrap=True)
    if figures["quick_as_suggested"]:
        console.print(f"labels as a suggestion that was seen, in less than a second: {figures['quick_as_suggested']}")
    if figures["conflicts"]:
        where = f", listed in {CONFLICTS}" if dataset else ""
        console.print(
            f"{len(figures['conflicts'])} frames on which labellers disagree are left out{where}", soft_wrap=True
        )
    if dataset:
        messages().print(f"review read: {written} frames  ->  {dataset}", soft_wrap=True)
        messages().print(f"next: {shlex.join(['orion', 'adapt', str(dataset)])}", soft_wrap=True)


def _share_in_words(share: dict[str, Any]) -> str:
    if not share["total"]:
        return "0 of 0"
    kappa = "" if share["kappa"] is None else f", kappa {share['kappa']:.2f}"
    ends = f"{100 * share['low']:.0f} to {100 * share['high']:.0f}"
    return f"{share['count']} of {share['total']} = {100 * share['rate']:.0f} % ({ends}){kappa}"
