"""Pipeline commands: run all stages or one stage, then verify, clean or publish the results."""

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orion_triage.cli.app import app
from orion_triage.cli.evaluation import write_report
from orion_triage.cli.terminal import (
    DatasetOption,
    FinishedRunOption,
    ForceOption,
    JsonOption,
    MissionOption,
    PresetOption,
    RunOption,
    RunPresetOption,
    SetOption,
    SourceOption,
    TestSizeOption,
    do_stage,
    finished_run,
    messages,
    progress_bar,
    run_of,
    styled,
)

if TYPE_CHECKING:
    from orion_triage.pipeline import Forecast
    from orion_triage.runs.run import Run

command = partial(app.command, rich_help_panel="Pipeline")


@command(
    epilog="Example: orion run\n\n"
    "Example: orion run --preset lfm2.5-vl-1.6b --dataset OWNER/NAME\n\n"
    "Example: orion run --seeds 3"
)
def run(
    preset: RunPresetOption = "",
    assignments: SetOption = [],  # noqa: B006
    folder: RunOption = None,
    source: SourceOption = None,
    dataset: DatasetOption = "",
    test_size: TestSizeOption = 0,
    mission: MissionOption = None,
    seeds: Annotated[
        int,
        typer.Option("--seeds", min=1, max=20, help="Train so many times, with seeds that follow each other."),
    ] = 1,
) -> None:
    """Run all stages in order, from the dataset to the report.

    Skips finished stages. Run the same command again to resume. Says first what
    it will do and about how long, by earlier runs on this machine.
    With --seeds N, trains and evaluates N runs on the same dataset, and names
    the one that is best on val.
    """
    first = run_of(preset, assignments, folder, source=source, dataset=dataset, test_size=test_size, mission=mission)
    _run(first)
    if seeds > 1:
        _run_other_seeds(first, seeds)


def _run_other_seeds(first: "Run", seeds: int) -> None:
    """Runs beside the first with the next seeds and its dataset; then the report of the one that is best on val."""
    from orion_triage.evaluate.seeds import val_loss_of_category
    from orion_triage.pipeline import take_dataset
    from orion_triage.runs.run import with_seed

    runs = [first, *(with_seed(first, first.settings.fine_tune.seed + more) for more in range(1, seeds))]
    for other in runs[1:]:
        take_dataset(first, other)
        _run(other)
    losses = {str(one.folder): loss for one in runs if (loss := val_loss_of_category(one)) is not None}
    best = min(runs, key=lambda one: losses.get(str(one.folder), float("inf")))
    messages().print(f"loss of the category on val: {', '.join(f'{name} {loss:.4f}' for name, loss in losses.items())}")
    said = f"{best.folder} is best on val. It was chosen there, so its own figures on val are too good."
    messages().print(styled("bold", said), soft_wrap=True)
    write_report(best, as_json=False)


def _run(current: "Run") -> None:
    """All stages of one run, and its report."""
    from orion_triage.errors import ParityError
    from orion_triage.llama_cpp.toolchain import built_meanwhile, find_toolchain
    from orion_triage.pipeline import check_inputs, forecast, stages
    from orion_triage.progress import in_words
    from orion_triage.runs.manifest import read_manifest
    from orion_triage.safe.files import locked

    began = time.monotonic()
    check_inputs(current)
    dataset_stage, *others = stages(current.settings)
    with locked(current.folder, "orion run"):
        for line in announcement(current, forecast(current)):
            messages().print(line, soft_wrap=True)
        # llama.cpp is compiled only during the first stage: in parallel, a training took 690 s instead of 560 s.
        with built_meanwhile() as building:
            do_stage(dataset_stage, current)
            if building:
                with progress_bar() as progress:
                    find_toolchain(progress)
        for stage in others:
            try:
                do_stage(stage, current)
            except ParityError as error:  # recorded for the verdict, which is then DO NOT FLY
                failed = f" {error.message} Its answers do not count."
                messages().print(styled("bold red", f"{stage.name}: failed.", failed), soft_wrap=True)
    made = [one for stage in (dataset_stage, *others) if (one := read_manifest(stage.folder(current)))]
    how_many = "all" if len(made) == len(others) + 1 else f"{len(made)} of"
    stages_took = in_words(sum(one.seconds for one in made))
    this_took = in_words(time.monotonic() - began)
    said = f"{how_many} {len(others) + 1} stages by their manifests: {stages_took}; this command: {this_took}"
    messages().print(said)
    write_report(current, as_json=False)


def announcement(current: Any, planned: "list[Forecast]") -> Iterator[str]:
    """What a run will do and about how long, by what was measured on this machine, if anything was."""
    from orion_triage.llama_cpp.toolchain import existing_tools
    from orion_triage.machine import plan
    from orion_triage.models.load import TINY_BASE
    from orion_triage.progress import in_words

    to_do = [stage for stage in planned if not stage.skipped]
    skipped = ", ".join(stage.stage for stage in planned if stage.skipped)
    yield f"to skip, because they are current ({len(planned) - len(to_do)} of {len(planned)}): {skipped or 'none'}"
    if not to_do:
        return
    times = [in_words(stage.measured.seconds) if stage.measured else "not known" for stage in to_do]
    listed = (f"{stage.stage} ({time})" for stage, time in zip(to_do, times, strict=True))
    yield f"to do ({len(to_do)}): {', '.join(listed)}"
    measured = [stage.measured for stage in to_do if stage.measured]
    if measured:
        runs = ", ".join(sorted({one.folder.name for one in measured}))
        rest = "" if len(measured) == len(to_do) else ", without the stages whose time is not known"
        total = in_words(sum(one.seconds for one in measured))
        yield f"about {total}{rest}, by the seconds that run {runs} took on this machine"
    else:
        yield f"how long: not known yet, no run like this one in {current.folder.parent} was measured here"
    if len(measured) < len(to_do):
        if current.settings.base.model == TINY_BASE:
            low, high = (sum(seconds[end] for seconds in plan.TINY_SECONDS.values()) for end in (0, 1))
            yield (
                f"  for orientation, not measured here: all stages of the preset tiny took "
                f"{plan.time_in_words(low, high, exact=True)} on {plan.AVX512}, and "
                f"{in_words(plan.TINY_SECONDS_AVX2)} on {plan.AVX2}"
            )
        else:
            preset = current.settings.preset
            yield f"  for orientation, estimates: orion plan --preset {preset} --gpu NAME --frames N"
    if existing_tools() is None:
        built = plan.time_in_words(plan.BUILD.low, plan.BUILD.high, exact=True)
        yield f"llama.cpp is built meanwhile, once: {built} on 2 cores of another machine, and longer beside other work"


def _single(name: str, help_text: str, odd_example: str) -> None:
    """Register a command that runs one stage."""
    options = ("", " --preset lfm2.5-vl-1.6b", f" {odd_example}")

    @command(name, help=help_text, epilog="\n\n".join(f"Example: orion {name}{words}" for words in options))
    def stage_command(
        preset: RunPresetOption = "",
        assignments: SetOption = [],  # noqa: B006
        folder: RunOption = None,
        force: ForceOption = False,
    ) -> None:
        do_stage(name, run_of(preset, assignments, folder), force)


@command(
    "fine-tune",
    epilog="Example: orion fine-tune\n\n"
    "Example: orion fine-tune --preset lfm2.5-vl-1.6b\n\n"
    "Example: orion fine-tune --run runs/seed-43 --set fine_tune.seed=43\n\n"
    "Example: orion fine-tune --run runs/mine --from runs/tiny --frames my-frames --set fine_tune.epochs=1",
)
def fine_tune(
    preset: RunPresetOption = "",
    assignments: SetOption = [],  # noqa: B006
    folder: RunOption = None,
    parent: Annotated[
        str,
        typer.Option("--from", metavar="RUN|ADAPTER", help="Adapter to continue (fine_tune.continue_from)."),
    ] = "",
    frames: Annotated[
        str,
        typer.Option("--frames", metavar="FOLDER", help="Labelled frames to train, too (fine_tune.frames)."),
    ] = "",
    force: ForceOption = False,
) -> None:
    """Train the LoRA adapter on the dataset.

    Resumes from the last complete checkpoint. With --from, training begins with
    the weights of a finished adapter; a new run takes the settings and the dataset
    of the run that it continues. With --frames, labelled frames are trained in their eight
    orientations beside the dataset's ('orion adapt' does both, and measures).
    """
    from orion_triage.pipeline import take_dataset
    from orion_triage.runs.run import SETTINGS_FILE, open_run

    named = {"continue_from": parent, "frames": frames}
    sets = [f"fine_tune.{key}={json.dumps(value)}" for key, value in named.items() if value]
    before = open_run(Path(parent)) if parent and (Path(parent) / SETTINGS_FILE).is_file() else None
    like = None
    if before:  # but for what that run was trained with in addition
        training = before.settings.fine_tune.model_copy(update={"continue_from": None, "frames": None})
        like = before.settings.model_copy(update={"fine_tune": training})
    current = run_of(preset, [*assignments, *sets], folder, like=like)
    if before and not current.dataset.exists():
        take_dataset(before, current)
        dataset = {"dataset": before.settings.dataset}
        current = replace(current, settings=current.settings.model_copy(update=dataset))
    do_stage("fine-tune", current, force)


_single("quantize", "Convert the merged model to a GGUF pair and quantize it.", "--run runs/tiny --force")


@command(
    epilog="Example: orion fuse\n\n"
    "Example: orion fuse --adapter OWNER/NAME\n\n"
    "Example: orion fuse --run runs/tiny --set fuse.dtype=bfloat16"
)
def fuse(
    preset: RunPresetOption = "",
    assignments: SetOption = [],  # noqa: B006
    folder: RunOption = None,
    adapter: Annotated[
        str,
        typer.Option("--adapter", metavar="FOLDER|ID", help="Adapter to merge: folder or Hub id. Default: the run's."),
    ] = "",
    force: ForceOption = False,
) -> None:
    """Merge the adapter into the 16-bit base model."""
    do_stage("fuse", run_of(preset, assignments, folder, adapter_from=adapter), force)


@command(epilog="Example: orion verify\n\nExample: orion verify runs/tiny --json")
def verify(
    folder: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="Run folder. Default: the newest run.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Check the files of a run against its manifests (sha256).

    Exits with status 1 if a file was changed, added or deleted.
    """
    from orion_triage.pipeline import verify

    checked = verify(finished_run(folder, "dataset"))
    if as_json:
        typer.echo(json.dumps(checked, indent=2))
    else:
        for stage, lines in checked.items():
            typer.echo(f"{stage}: {'ok' if not lines else f'{len(lines)} files differ from the manifest'}")
            for line in lines:
                typer.echo(f"  {line}")
    if any(checked.values()):
        raise typer.Exit(1)


@command(epilog="Example: orion clean runs/tiny\n\nExample: orion clean runs/seed-43")
def clean(folder: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")]) -> None:
    """Delete the large intermediate files of a finished run.

    Keeps the GGUF pair, the adapter, manifests and reports.
    """
    from orion_triage.pipeline import clean
    from orion_triage.runs.run import open_run

    freed = clean(open_run(folder))
    messages().print(f"freed {freed / 1e6:,.1f} MB in {folder}", soft_wrap=True)


class Product(StrEnum):
    """The products of a run that can be published."""

    adapter = "adapter"
    merged = "merged"
    gguf = "gguf"


@command(
    epilog="Example: orion push OWNER/NAME\n\n"
    "Example: orion push OWNER/NAME --product adapter\n\n"
    "Example: orion push OWNER/NAME --product merged --run runs/tiny --public"
)
def push(
    repository: Annotated[
        str, typer.Argument(metavar="OWNER/NAME", help="Hub repository. Created if it does not exist.")
    ],
    product: Annotated[Product, typer.Option("--product", help="Adapter, merged model or GGUF pair.")] = Product.gguf,
    folder: FinishedRunOption = None,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public. Default: private.")] = False,
) -> None:
    """Publish a model of a run on the Hugging Face Hub.

    Adds the model card and the base model's licence.
    Needs a token: run 'hf auth login' or set HF_TOKEN.
    """
    from orion_triage.publish import push

    stage = {"adapter": "fine-tune", "merged": "fuse", "gguf": "quantize"}[product.value]
    address = push.push(finished_run(folder, stage), product.value, repository, private=not public)
    messages().print(f"pushed: {address}", soft_wrap=True)


@command(
    epilog="Example: orion settings\n\n"
    "Example: orion settings --preset lfm2.5-vl-1.6b\n\n"
    "Example: orion settings --preset my-preset.toml --set fine_tune.epochs=5"
)
def settings(
    preset: PresetOption = "tiny",
    assignments: SetOption = [],  # noqa: B006
    mission: MissionOption = None,
) -> None:
    """Print all settings of a preset as JSON."""
    from orion_triage.settings import load_settings

    typer.echo(load_settings(preset, assignments, mission).model_dump_json(indent=2))
