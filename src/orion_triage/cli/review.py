"""Review commands: make a labelling task of a log, and read the labels back."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from orion_triage.cli.app import app
from orion_triage.cli.terminal import JsonOption, messages, output, progress_bar

review_app = typer.Typer(add_completion=False, no_args_is_help=True)
app.add_typer(
    review_app,
    name="review",
    rich_help_panel="Flight",
    help="Let people label frames of a log: choose which, write the task, read the labels back.",
    epilog="Example: orion review new verdicts.jsonl review\n\n"
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
    from orion_triage.review.choose import choose, read_log
    from orion_triage.review.task import PAGE_FILE, write

    mission = load_mission(mission_file) if mission_file else default_mission()
    chosen = choose(read_log(log, mission), count, random_share=random_share, blind_share=blind_share, seed=seed)
    with progress_bar() as progress:
        counts = write(out, chosen, frames, mission, log.name, progress=progress)
    said = ", ".join(f"{number} {why}" for why, number in sorted(counts.items()))
    messages().print(f"review new: {len(chosen)} frames ({said})  ->  {out}", soft_wrap=True)
    messages().print(f"next: open {out / PAGE_FILE} in a browser; then", soft_wrap=True)
    messages().print(f"  {shlex.join(['orion', 'review', 'read', str(out), 'LABELS.json'])}", soft_wrap=True)


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

    mission = load_mission(mission_file) if mission_file else default_mission()
    task = read_task(folder, mission)
    labels: list[Label] = []
    empty = 0
    for path in files:
        found, none = read_labels(path, task, mission)
        labels, empty = labels + found, empty + none
    merged = merge(labels, task, mission, empty)
    written = write_dataset(dataset, merged, task) if dataset else 0
    if as_json:
        typer.echo(to_json(merged))
        return
    told = merged.figures
    console = output()
    console.print(
        f"{told['labelled']} of {told['frames']} frames labelled by {', '.join(told['labellers']) or 'nobody'}",
        soft_wrap=True,
    )
    for pair, kappa in told["kappa"].items():
        value = "-" if kappa["kappa"] is None else f"{kappa['kappa']:.2f}"
        console.print(f"kappa of {pair}: {value} on {kappa['frames']} frames", soft_wrap=True)
    for name, words in (("seen", "that people saw"), ("blind", "that people did not see")):
        share = told["as_suggested"][name]
        console.print(f"labels equal to a suggestion {words}: {share['count']} of {share['total']}", soft_wrap=True)
    quick, right = told["quick_as_suggested"], told["suggestions_right_on_random"]
    if quick:
        console.print(f"of these, after less than a second: {quick}", soft_wrap=True)
    console.print(
        f"random frames with a suggestion on which people agree: it was right on {right['count']} of {right['total']}"
    )
    if told["conflicts"]:
        where = f", listed in {CONFLICTS}" if dataset else ""
        console.print(
            f"{len(told['conflicts'])} frames on which labellers disagree are left out{where}", soft_wrap=True
        )
    if dataset:
        messages().print(f"review read: {written} frames  ->  {dataset}", soft_wrap=True)
        messages().print(f"next: {shlex.join(['orion', 'adapt', str(dataset)])}", soft_wrap=True)
