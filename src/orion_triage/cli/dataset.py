"""Dataset commands: build, check, view, publish."""

from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer

from orion_triage.cli.app import app
from orion_triage.cli.terminal import (
    DatasetOption,
    ForceOption,
    JsonOption,
    NewestRunOption,
    PresetOption,
    RunOption,
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
_PLACES_SHOWN = 5  # findings printed of each kind; --json lists all


@dataset_app.callback(invoke_without_command=True)
def dataset(
    context: typer.Context,
    preset: PresetOption = "tiny",
    assignments: SetOption = [],  # noqa: B006
    folder: RunOption = None,
    source: SourceOption = None,
    dataset: DatasetOption = "",
    test_size: TestSizeOption = 0,
    force: ForceOption = False,
) -> None:
    """Build a dataset, or check and copy an existing one.

    Writes the frames and the train, validation and test splits.
    Use --dataset for your own images or an existing dataset.
    """
    if context.invoked_subcommand is None:
        do_stage(
            "dataset", run_of(preset, assignments, folder, source=source, dataset=dataset, test_size=test_size), force
        )


def _located(name: str) -> tuple[Path, Path]:
    """The dataset's folder, and the folder that its symbolic links may point into."""
    from orion_triage import hub

    folder = hub.locate(name, "dataset") if name else finished_run(None, "dataset").dataset
    return folder, hub.root_of(folder)


def _checked(folder: Path, root: Path) -> Any:
    from orion_triage.dataset.check.soundness import check_dataset

    with progress_bar() as progress:
        return check_dataset(folder, root=root, progress=progress)


@dataset_app.command(
    epilog="Example: orion dataset check\n\n"
    "Example: orion dataset check OWNER/NAME\n\n"
    "Example: orion dataset check runs/tiny/dataset --json"
)
def check(name: FolderArgument = "", as_json: JsonOption = False) -> None:
    """Check a dataset for errors before training.

    Prints a fix for each kind of error.
    Exits with status 1 if there are errors.
    """
    report = _checked(*_located(name))
    if as_json:
        typer.echo(report.to_json())
    else:
        _print_findings(report)
    if report.errors:
        raise typer.Exit(1)


def _print_findings(report: Any) -> None:
    console = output()
    ordered = sorted(report.findings, key=lambda finding: (finding.severity, finding.check))
    for (severity, kind), group in groupby(ordered, key=lambda finding: (finding.severity, finding.check)):
        found = list(group)
        colour = {"error": "bold red", "warning": "yellow"}[severity]
        console.print(styled(colour, severity, f" {kind}: {len(found)}"), soft_wrap=True)
        for finding in found[:_PLACES_SHOWN]:
            console.print(f"  {finding.place}: {finding.message}", soft_wrap=True)
        if len(found) > _PLACES_SHOWN:
            console.print(f"  and {len(found) - _PLACES_SHOWN} more (--json lists all)", soft_wrap=True)
        console.print(styled("bold", "  fix:", f" {found[0].fix}"), soft_wrap=True)
    lines = ", ".join(f"{count} {split}" for split, count in report.lines.items())
    console.print(
        f"{report.folder}: {len(report.errors)} errors, {len(report.warnings)} warnings in {report.frames} frames "
        f"and {lines} records",
        soft_wrap=True,
    )


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
    from orion_triage.runs.manifest import read_manifest

    run = finished_run(folder, "dataset")
    stage_manifest = read_manifest(run.dataset)
    if stage_manifest is None or stage_manifest.removed:
        raise OrionError(
            f"{run.dataset} does not exist, or 'orion clean' deleted its frames.",
            "Build it again: 'orion dataset --force'.",
        )
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
