"""Making a model: the whole run, its stages one by one, and what becomes of their products."""

import json
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from orion_triage.cli.app import app
from orion_triage.cli.evaluation import write_report
from orion_triage.cli.terminal import (
    DatasetOption,
    ForceOption,
    JsonOption,
    PresetOption,
    RunOption,
    SetOption,
    SourceOption,
    TestSizeOption,
    do_stage,
    finished_run,
    messages,
    progress_bar,
    run_of,
)

command = partial(app.command, rich_help_panel="A run")


@command(epilog="Example: orion run --preset lfm2.5-vl-1.6b --dataset OWNER/NAME")
def run(
    preset: PresetOption = "tiny",
    assignments: SetOption = [],  # noqa: B006
    folder: RunOption = None,
    source: SourceOption = None,
    dataset: DatasetOption = "",
    test_size: TestSizeOption = 0,
) -> None:
    """Do all stages in order; finished ones are skipped."""
    from orion_triage.llama_cpp.toolchain import built_meanwhile, find_toolchain
    from orion_triage.pipeline import check_inputs, stages
    from orion_triage.safe.files import locked

    current = run_of(preset, assignments, folder, source=source, dataset=dataset, test_size=test_size)
    check_inputs(current)
    dataset_stage, *others = stages(current.settings)
    with locked(current.folder, "orion run"):
        # The first stage alone shares the processor with a compiler: beside one, a training took 690 s instead of 560.
        with built_meanwhile() as building:
            do_stage(dataset_stage, current)
            if building:
                with progress_bar() as progress:
                    find_toolchain(progress)
        for stage in others:
            do_stage(stage, current)
    write_report(current, as_json=False)


def _single(name: str, help_text: str) -> None:
    """Register a command that does one stage."""

    @command(name, help=help_text, epilog=f"Example: orion {name} --run runs/tiny")
    def stage_command(
        preset: PresetOption = "tiny",
        assignments: SetOption = [],  # noqa: B006
        folder: RunOption = None,
        force: ForceOption = False,
    ) -> None:
        do_stage(name, run_of(preset, assignments, folder), force)


_single("fine-tune", "Train the QLoRA adapter.")
_single("quantize", "Convert to GGUF and quantize.")


@command(epilog="Example: orion fuse --adapter OWNER/NAME")
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
    do_stage("fuse", run_of(preset, assignments, folder, adapter_from=adapter), force)


@command(epilog="Example: orion verify runs/tiny")
def verify(
    folder: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="Run folder. Default: the newest.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare every file of a run with the manifest of the stage that made it."""
    from orion_triage.pipeline import verify

    checked = verify(finished_run(folder, "dataset"))
    if as_json:
        typer.echo(json.dumps(checked, indent=2))
    else:
        for stage, lines in checked.items():
            typer.echo(f"{stage}: {'as written' if not lines else f'{len(lines)} differ'}")
            for line in lines:
                typer.echo(f"  {line}")
    if any(checked.values()):
        raise typer.Exit(1)


@command(epilog="Example: orion clean runs/tiny")
def clean(folder: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")]) -> None:
    """Keep of a finished run the flight pair, the adapter, manifests and reports; delete the rest."""
    from orion_triage.pipeline import clean
    from orion_triage.runs.run import open_run

    freed = clean(open_run(folder))
    messages().print(f"freed {freed / 1e6:,.1f} MB in {folder}", highlight=False, soft_wrap=True)


class Product(StrEnum):
    """What can be published of a run."""

    adapter = "adapter"
    merged = "merged"
    gguf = "gguf"


@command(epilog="Example: orion push OWNER/NAME --product adapter")
def push(
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The Hub repository; created if need be.")],
    product: Annotated[Product, typer.Option("--product", help="The flight pair, the adapter or the merged model.")] = (
        Product.gguf
    ),
    folder: Annotated[Path | None, typer.Option("--run", help="Run folder. Default: the newest finished.")] = None,
    public: Annotated[bool, typer.Option("--public", help="A new repository is private otherwise.")] = False,
) -> None:
    """Publish a product of a run on the Hub, with its model card and the base's licence (token: HF_TOKEN)."""
    from orion_triage.publish import push

    stage = {"adapter": "fine-tune", "merged": "fuse", "gguf": "quantize"}[product.value]
    address = push.push(finished_run(folder, stage), product.value, repository, private=not public)
    messages().print(f"pushed: {address}", highlight=False, soft_wrap=True)


@command(epilog="Example: orion settings --preset tiny")
def settings(preset: PresetOption = "tiny", assignments: SetOption = []) -> None:  # noqa: B006
    """Print every setting with its value."""
    from orion_triage.settings import load_settings

    typer.echo(load_settings(preset, assignments).model_dump_json(indent=2))
