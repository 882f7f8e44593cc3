"""Shared by the commands: options, opening a run, and printing.

Results go to standard output. Messages and progress go to standard error.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from orion_triage import processes
from orion_triage.errors import one_line
from orion_triage.progress import Lines, Progress


class SplitName(StrEnum):
    """The splits that can be evaluated."""

    val = "val"
    test = "test"


class SourceName(StrEnum):
    """The image sources. A folder of images is given with --dataset instead."""

    synthetic = "synthetic"
    simsat = "simsat"
    sentinel2 = "sentinel2"


DEFAULT_PRESET = "tiny"
PresetOption = Annotated[str, typer.Option("--preset", help="Name of a shipped preset, or path of a TOML file.")]
RunPresetOption = Annotated[
    str,
    typer.Option(
        "--preset",
        help="Name of a shipped preset, or path of a TOML file. Default: the run's settings, or tiny.",
        show_default=False,
    ),
]
SetOption = Annotated[list[str], typer.Option("--set", help="Change one setting: stage.key=value. Repeatable.")]
MissionOption = Annotated[
    Path | None,
    typer.Option(
        "--mission", help="Mission file: categories, prompt, values. Default: the run's, or the published one."
    ),
]
RunOption = Annotated[Path | None, typer.Option("--run", help="Run folder. Default: runs/PRESET.")]
NewestRunOption = Annotated[Path | None, typer.Option("--run", help="Run folder. Default: the newest run.")]
FinishedRunOption = Annotated[Path | None, typer.Option("--run", help="Run folder. Default: the newest finished run.")]
SourceOption = Annotated[
    SourceName | None, typer.Option("--source", help="Image source. Default: the run's last source, or synthetic.")
]
DatasetOption = Annotated[
    str,
    typer.Option(
        "--dataset",
        metavar="FOLDER|ID",
        help="Your own images or dataset instead of --source: a folder or a Hub id.",
    ),
]
TestSizeOption = Annotated[
    int,
    typer.Option("--test-size", min=0, help="Number of test frames. 0: one per place. More needs synthetic images."),
]
ForceOption = Annotated[bool, typer.Option("--force", help="Run the stage again even if nothing changed.")]
FileOption = Annotated[SplitName, typer.Option("--file", help="Dataset split: val (validation) or test.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


# Text comes from files, servers and models: a name such as scene[b04].png is no markup, and :x: no emoji.
_PLAIN: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}


def messages() -> Any:
    """Console for standard error. With several launched processes, only the first one prints."""
    from rich.console import Console

    return Console(stderr=True, quiet=not processes.is_main(), **_PLAIN)


def errors() -> Any:
    """Console for what ends this process, on standard error: every launched process prints its own."""
    from rich.console import Console

    return Console(stderr=True, **_PLAIN)


WIDE = 10_000  # columns of output to a file or a pipe, so that no line is wrapped


def output() -> Any:
    """Console for tables on standard output. In a file or a pipe, a table is never narrowed to a terminal's width."""
    from rich.console import Console

    console = Console(**_PLAIN)
    return console if console.is_terminal else Console(width=WIDE, **_PLAIN)


def cell(text: str) -> str:
    """Text of a third party as a cell of a table: on one line, in characters that standard output can encode."""
    encoding = sys.stdout.encoding or "utf-8"
    return one_line(text).encode(encoding, "backslashreplace").decode(encoding)


def styled(style: str, text: str, rest: str = "") -> Any:
    """`text` in a style of rich, such as "bold red", and `rest` without one."""
    from rich.text import Text

    return Text.assemble((text, style), rest)


@contextmanager
def progress_bar(name: str = "", clock: Callable[[], float] = time.monotonic) -> Iterator[Progress]:
    """Show a progress bar with the remaining time if standard error is a terminal.

    In a file or a pipe, long work writes lines instead, which begin with the stage's `name`; see `Lines`.
    """
    console = messages()
    if not console.is_terminal:
        yield Lines(lambda line: console.print(line, soft_wrap=True), name, clock)
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)

        def progress(description: str, done: int, total: int) -> None:
            bar.update(task, description=description, completed=done, total=total)

        yield progress


def run_of(
    preset: str,
    assignments: list[str],
    folder: Path | None,
    split: Any = "test",
    *,
    source: SourceName | None = None,
    dataset: str = "",
    test_size: int = 0,
    mission: Path | None = None,
    like: Any = None,
    **sources: str,
) -> Any:
    """The run that a command changes, with its settings, which are saved in its folder.

    A run keeps its settings until a command names others; a new one begins with those of `like`. What a command changes
    without naming it, or keeps although the preset has another value, is printed.
    """
    from orion_triage.runs.run import SETTINGS_FILE, Run, prepare, settings_in
    from orion_triage.settings import load_settings

    if source and dataset:
        raise typer.BadParameter("cannot be combined with --dataset. Remove one of them.", param_hint="'--source'")
    named = [f"dataset.folder={json.dumps(dataset)}"] if dataset else []
    named += [f"dataset.source={source.value}"] if source else []
    named += [f"dataset.test_size={test_size}"] if test_size else []
    named = [*assignments, *named]
    before = settings_in(folder) if folder else None
    settings = load_settings(preset or _shipped_preset_of(before), named, mission)
    folder = folder or default_folder(settings)
    before = before or settings_in(folder) or like
    if before is None and (folder / SETTINGS_FILE).is_file():
        said = f"{folder / SETTINGS_FILE} is of another version: its settings are those of the preset {settings.preset}"
        messages().print(said, soft_wrap=True)
    run = Run(folder, settings, split, **sources)
    if before and not preset.endswith(".toml") and preset in ("", before.preset):
        run = _with_own_settings(run, before, named, mission)
    else:
        run = _with_settings_of_preset(run, preset, named, mission)
    if before:
        _say_what_changed(run.settings, before, named)
    if run.folder.exists():  # a command that is refused leaves no new folder
        prepare(run)
    return run


def _shipped_preset_of(before: Any) -> str:
    from orion_triage.settings import preset_names

    return before.preset if before and before.preset in preset_names() else DEFAULT_PRESET


def _with_own_settings(run: Any, before: Any, named: list[str], mission: Path | None) -> Any:
    """The run with its settings of before and what is named. Another source of frames has none of the last one's."""
    from orion_triage.settings import STAGES, as_assignment, changed, differences

    keys, dataset = _keys(named), run.settings.dataset
    asked = {f"dataset.{key}": getattr(dataset, key) != getattr(before.dataset, key) for key in ("source", "folder")}
    asked["dataset.catalogue"] = bool(before.dataset.folder)  # a folder has no use for one
    if any(differs and key in keys for key, differs in asked.items()):
        before = before.model_copy(update={"dataset": type(before.dataset)()})
    settings = changed(before, named, mission)
    kept = differences(settings, run.settings, STAGES) if before.preset == run.settings.preset else {}
    if lines := [as_assignment(key, value) for key, (_, value) in kept.items() if key not in keys]:
        said = f"settings of {run.folder}, where the preset {before.preset} has others: {', '.join(lines)}"
        messages().print(said, soft_wrap=True)
    return replace(run, settings=settings)


def _with_settings_of_preset(run: Any, preset: str, named: list[str], mission: Path | None) -> Any:
    """The run with the preset's settings, except its dataset and how it is judged, unless these are named."""
    from orion_triage.mission.contract import differences
    from orion_triage.runs.run import with_its_dataset, with_its_judging
    from orion_triage.settings import has_section

    settings = run.settings
    if not any(assignment.startswith("dataset.") for assignment in named):
        run = with_its_dataset(run)
    changed = [*_keys(named), *(["mission"] if mission or (preset and has_section(preset, "mission")) else [])]
    own = preset.endswith(".toml")
    kept = with_its_judging(run, [*changed, *(["verdict"] if own else [])])
    # A file of the user's own says its limits and values each time; the mission that a run was made for stays.
    run = run if own and not differences(kept.settings.mission, settings.mission) else kept
    return run if "mission" in changed else _with_mission_of_dataset(run)


def _keys(assignments: list[str]) -> list[str]:
    return [assignment.partition("=")[0].strip() for assignment in assignments]


def _say_what_changed(settings: Any, before: Any, named: list[str]) -> None:
    """A setting that is another one now, although this command does not name it."""
    from orion_triage.settings import STAGES, as_assignment, differences

    keys, found = _keys(named), differences(settings, before, (*STAGES, "dataset"))
    if lines := [f"{as_assignment(key, now)} (was {was})" for key, (was, now) in found.items() if key not in keys]:
        messages().print(f"settings that change although they are not named: {', '.join(lines)}", soft_wrap=True)


def _with_mission_of_dataset(run: Any) -> Any:
    """A new run of a dataset that carries a mission is of that mission, and says so."""
    from orion_triage.mission.contract import FILE_NAME, mission_of
    from orion_triage.runs.run import SETTINGS_FILE

    folder = Path(run.settings.dataset.folder)
    begun = (run.folder / SETTINGS_FILE).exists()
    if begun or not run.settings.dataset.folder or not (folder / FILE_NAME).is_file():
        return run
    found = mission_of(folder)
    messages().print(f"mission: {found.name}, as {folder / FILE_NAME} says", soft_wrap=True)
    return replace(run, settings=run.settings.model_copy(update={"mission": found}))


def default_folder(settings: Any) -> Path:
    """runs/PRESET, and runs/PRESET-MISSION for a mission that is not the published one."""
    from orion_triage.mission.mission import default_mission

    name = settings.mission.name
    own = "" if name == default_mission().name else f"-{name.replace(' ', '-')}"
    return Path("runs") / f"{settings.preset}{own}"


def finished_run(folder: Path | None, stage: str, split: Any = "test", *, named: bool = True) -> Any:
    """The run that a command reads, with its saved settings. Default: see `newest_run`.

    Names the default on standard error (`named`), and newer runs that are not finished.
    """
    from orion_triage.runs.run import newer_unfinished, newest_run, open_run, require_settings_of_pair

    chosen = folder or newest_run(Path("runs"), stage)
    run = open_run(chosen, split)
    if folder is None and named:
        messages().print(f"run: {chosen}", soft_wrap=True)
        for other in newer_unfinished(chosen):
            messages().print(f"note: {other} is newer, but not finished", soft_wrap=True)
    if stage == "quantize":
        require_settings_of_pair(run)
    return run


def do_stage(stage: Any, run: Any, force: bool = False) -> None:
    """Run one stage (a Stage or its name) and print the result."""
    from orion_triage.pipeline import run_stage, stage_named

    stage = stage_named(stage, run.settings) if isinstance(stage, str) else stage
    with progress_bar(stage.name) as progress:
        stage_manifest, skipped = run_stage(stage, run, progress=progress, force=force)
    say(stage_manifest, stage.folder(run), skipped=skipped)


def say(stage_manifest: Any, folder: Path, *, skipped: bool = False) -> None:
    """Print one line about a finished stage, then its notes."""
    console = messages()
    state = "unchanged, skipped" if skipped else f"done in {stage_manifest.seconds:,.1f} s"
    console.print(f"{stage_manifest.stage}: {state}  ->  {folder}", soft_wrap=True)
    for line in () if skipped else notes(stage_manifest.figures):
        console.print(f"  {one_line(line)}", soft_wrap=True)


def notes(figures: dict[str, Any]) -> Iterator[str]:
    """The notes of a stage for the user: matched modules, places, the device, warnings."""
    for target, towers in figures.get("census", {}).items():
        counts = ", ".join(f"{count} in {tower}" for tower, count in towers.items() if count)
        yield f"{target}: {counts or 'no module'}"
    if account := figures.get("account"):
        yield "places: " + ", ".join(f"{count} {outcome}" for outcome, count in account.items())
    for tower, count in figures.get("trained_parameters", {}).items():
        yield f"trained parameters in {tower}: {count:,}"
    yield from figures.get("notes", [])
    for warning in figures.get("warnings", []):
        yield f"warning: {warning}"
