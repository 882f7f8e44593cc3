"""Dataset commands: build, check, view, publish, and an example to start from."""

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from orion_triage.cli.app import app
from orion_triage.cli.terminal import (
    DatasetOption,
    ForceOption,
    JsonOption,
    MissionOption,
    NewestRunOption,
    RunOption,
    RunPresetOption,
    SetOption,
    SourceOption,
    TestSizeOption,
    do_stage,
    finished_run,
    messages,
    output,
    progress_bar,
    run_of,
    styled,
)

dataset_app = typer.Typer(add_completion=False)
app.add_typer(
    dataset_app,
    name="dataset",
    rich_help_panel="Pipeline",
    epilog="Example: orion dataset\n\n"
    "Example: orion dataset --dataset my-frames --run runs/mine\n\n"
    "Example: orion dataset --source sentinel2 --run runs/sentinel2",
)

FolderArgument = Annotated[
    str,
    typer.Argument(metavar="[FOLDER|ID]", help="Dataset folder or Hub id. Default: the dataset of the newest run."),
]
_PLACES_SHOWN = 3  # findings printed of each kind, so that all kinds fit a screen; --json lists all


@dataset_app.callback(invoke_without_command=True)
def dataset(
    context: typer.Context,
    preset: RunPresetOption = "",
    assignments: SetOption = [],  # noqa: B006
    folder: RunOption = None,
    source: SourceOption = None,
    dataset: DatasetOption = "",
    test_size: TestSizeOption = 0,
    mission: MissionOption = None,
    force: ForceOption = False,
) -> None:
    """Build a dataset, or check and copy an existing one.

    Writes the frames and the train, validation and test splits.
    Use --dataset for your own images or an existing dataset.
    """
    if context.invoked_subcommand is None:
        asked: dict[str, Any] = {"source": source, "dataset": dataset, "test_size": test_size, "mission": mission}
        do_stage("dataset", run_of(preset, assignments, folder, **asked), force)


def _located(name: str) -> tuple[Path, Path]:
    """The dataset's folder, and the folder that its symbolic links may point into."""
    from orion_triage import hub

    folder = hub.locate(name, "dataset") if name else finished_run(None, "dataset").dataset
    return folder, hub.root_of(folder)


def _checked(folder: Path, root: Path, mission: Any = None) -> Any:
    from orion_triage.dataset.check.soundness import check_dataset

    with progress_bar() as progress:
        return check_dataset(folder, mission, root=root, progress=progress)


@dataset_app.command(epilog="Example: orion dataset new my-frames")
def new(folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder to make.")]) -> None:
    """Write a small example of a folder of your own images.

    Twelve drawn pictures, a table labels.csv and a README.txt. Replace them by
    your own. Refuses a folder that is not empty.
    """
    from orion_triage.dataset.example import TABLE, write_example

    count = write_example(folder)
    messages().print(f"dataset new: {folder} ({count} pictures, {TABLE}, README.txt)", soft_wrap=True)
    messages().print(f"next: {shlex.join(['orion', 'dataset', 'check', str(folder)])}", soft_wrap=True)


@dataset_app.command(
    epilog="Example: orion dataset check\n\n"
    "Example: orion dataset check my-frames\n\n"
    "Example: orion dataset check OWNER/NAME --json"
)
def check(
    name: FolderArgument = "",
    assignments: SetOption = [],  # noqa: B006
    mission: MissionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check a dataset, or a folder of your own images, for errors before training.

    Prints what the folder is, each kind of error with its fix, and the next command.
    Exits with status 1 if there are errors.
    """
    from orion_triage.dataset.records import is_published

    folder, root = _located(name)
    published = is_published(folder)
    if published and assignments:
        raise typer.BadParameter("has no effect on a finished dataset. Remove it.", param_hint="'--set'")
    report = _checked(folder, root, _mission(mission)) if published else _checked_own(folder, assignments, mission)
    report = replace(report, next=_next(report, name, folder, assignments, mission))
    if as_json:
        typer.echo(report.to_json())
    else:
        _print_findings(report, name or str(folder))
    if report.errors:
        raise typer.Exit(1)


def _mission(path: Path | None) -> Any:
    from orion_triage.mission.load import load_mission

    return load_mission(path) if path else None


def _checked_own(folder: Path, assignments: list[str], mission: Path | None) -> Any:
    from orion_triage.dataset.check.own_folder import check_own_folder
    from orion_triage.settings import load_settings

    named = f"dataset.folder={json.dumps(str(folder))}"
    settings = load_settings("tiny", [*assignments, named], mission)
    with progress_bar() as progress:
        return check_own_folder(folder, settings.dataset, settings.mission, progress=progress)


def _next(report: Any, name: str, folder: Path, assignments: list[str], mission: Path | None) -> str:
    """The command that comes next, or what to correct before it."""
    sets = [word for assignment in assignments for word in ("--set", assignment)]
    sets += ["--mission", str(mission)] if mission else []
    if report.errors:
        again = shlex.join(["orion", "dataset", "check", *([name] if name else []), *sets])
        return f"correct the errors, then run: {again}"
    if folder.name == "dataset" and (run := _run_around(folder)):
        preset = ["--preset", run.settings.preset] if run.settings.preset != "tiny" else []
        default = Path("runs") / run.settings.preset
        return shlex.join(
            ["orion", "fine-tune", *preset, *(["--run", str(run.folder)] if run.folder != default else [])]
        )
    words = ["orion", "run", "--dataset", name or str(folder), "--run", f"runs/{_short(folder)}"]
    return shlex.join([*words, *sets])


def _run_around(folder: Path) -> Any:
    """The run that the dataset in `folder` belongs to, or None."""
    from orion_triage.errors import OrionError
    from orion_triage.runs.run import open_run

    try:
        return open_run(folder.parent)
    except OrionError:
        return None


def _short(folder: Path) -> str:
    """The last part of a folder's path or of a Hub id, for the name of a run."""
    from orion_triage import hub

    return (hub.id_of(folder) or str(folder.resolve())).rpartition("/")[2] or "mine"


def _print_findings(report: Any, name: str) -> None:
    console = output()
    console.print(f"{name}: {report.recognised}", soft_wrap=True)
    for table in report.tables[:_PLACES_SHOWN]:
        console.print(f"columns of {table['table']}: {_columns_in_words(table)}", soft_wrap=True)
    for severity, kind, found in report.groups():
        colour = {"error": "bold red", "warning": "yellow"}[severity]
        console.print(styled(colour, severity, f" {kind}: {len(found)}"), soft_wrap=True)
        for finding in found[:_PLACES_SHOWN]:
            place = "" if finding.place == "." else f"{finding.place}: "
            console.print(f"  {place}{finding.message}", soft_wrap=True)
        if len(found) > _PLACES_SHOWN:
            console.print(f"  and {len(found) - _PLACES_SHOWN} more (--json lists all)", soft_wrap=True)
        console.print(styled("bold", "  fix:", f" {found[0].fix}"), soft_wrap=True)
    lines = ", ".join(f"{count} {split}" for split, count in report.lines.items())
    of_what = f"{report.frames} frames and {lines} records"
    if report.rows is not None:
        of_what = f"{report.rows} labelled pictures"
    console.print(f"{name}: {len(report.errors)} errors, {len(report.warnings)} warnings in {of_what}", soft_wrap=True)
    console.print(styled("bold", "next:", f" {report.next}"), soft_wrap=True)


def _columns_in_words(table: dict[str, Any]) -> str:
    taken = [ours if ours == theirs else f"{ours} from {theirs}" for ours, theirs in table["columns"].items()]
    unused = f"; not used: {', '.join(table['unused'])}" if table["unused"] else ""
    return (", ".join(taken) or "none") + unused


@dataset_app.command(
    epilog="Example: orion dataset view\n\n"
    "Example: orion dataset view OWNER/NAME\n\n"
    "Example: orion dataset view runs/tiny/dataset --out sheet.html"
)
def view(
    name: FolderArgument = "",
    out: Annotated[Path, typer.Option("--out", help="HTML file to write.")] = Path("dataset.html"),
) -> None:
    """Write an HTML page that shows the frames of a dataset.

    The page is one file. It also shows a map of the places and the findings of
    'orion dataset check'.
    """
    from orion_triage.dataset.view import render_view
    from orion_triage.safe.files import write_text

    folder, root = _located(name)
    report = _checked(folder, root)
    with progress_bar() as progress:
        page = render_view(folder, report.findings, root=root, progress=progress)
    write_text(out, page)
    messages().print(f"dataset view: {out} ({len(page) / 1e6:.1f} MB)", soft_wrap=True)


@dataset_app.command(
    epilog="Example: orion dataset push OWNER/NAME\n\n"
    "Example: orion dataset push OWNER/NAME --licence cc-by-4.0 --public\n\n"
    "Example: orion dataset push OWNER/NAME --run runs/simsat --catalogue-only"
)
def push(
    repository: Annotated[
        str, typer.Argument(metavar="OWNER/NAME", help="Hub repository. Created if it does not exist.")
    ],
    folder: NewestRunOption = None,
    licence: Annotated[
        str, typer.Option("--licence", help="Licence of images without a stated licence, such as cc-by-4.0.")
    ] = "",
    catalogue_only: Annotated[
        bool, typer.Option("--catalogue-only", help="Publish places, labels and splits without images.")
    ] = False,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public. Default: private.")] = False,
) -> None:
    """Publish the dataset of a run on the Hugging Face Hub.

    Adds a dataset card and Croissant metadata.
    Needs a token: run 'hf auth login' or set HF_TOKEN.
    """
    from orion_triage.dataset import share
    from orion_triage.errors import OrionError
    from orion_triage.runs.manifest import read_manifest, refuse_damaged

    run = finished_run(folder, "dataset")
    stage_manifest = read_manifest(run.dataset)
    if stage_manifest is None or stage_manifest.removed:
        raise OrionError(
            f"{run.dataset} does not exist, or 'orion clean' deleted its frames.",
            "Build it again: 'orion dataset --force'.",
        )
    refuse_damaged(run.dataset)
    report = _checked(run.dataset, run.dataset)
    if report.errors:
        raise OrionError(
            f"{run.dataset} has {len(report.errors)} errors and cannot be published. "
            f"First error: {report.errors[0].place}: {report.errors[0].message}",
            f"Run 'orion dataset check {run.dataset}' and fix the errors it lists.",
        )
    address = share.push(
        run.dataset,
        repository,
        stage_manifest.figures,
        report.findings,
        licence=licence,
        catalogue_only=catalogue_only,
        private=not public,
    )
    messages().print(f"pushed: {address}", soft_wrap=True)
