"""Commands about this machine: llama.cpp tools, requirements, rehearsal at full size."""

import json
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from orion_triage.cli.app import app
from orion_triage.cli.terminal import (
    JsonOption,
    PresetOption,
    SetOption,
    messages,
    output,
    progress_bar,
    styled,
)

command = partial(app.command, rich_help_panel="This machine")


class Purpose(StrEnum):
    """Values of doctor's --for."""

    RUN = "run"
    FINE_TUNE = "fine-tune"


class Tool(StrEnum):
    """The tools whose path `orion toolchain --print` prints."""

    server = "server"
    quantize = "quantize"


@command(epilog="Example: orion toolchain\n\nExample: orion toolchain --print server")
def toolchain(
    printed: Annotated[Tool | None, typer.Option("--print", help="Print only the path of this tool.")] = None,
) -> None:
    """Find the llama.cpp tools, or build them.

    Looks in ORION_LLAMA_CPP, then in PATH.
    Otherwise builds the pinned version once, in the cache folder.
    """
    from orion_triage.llama_cpp.toolchain import find_toolchain

    with progress_bar() as progress:
        found = find_toolchain(progress)
    if printed:
        typer.echo({Tool.server: found.llama_server, Tool.quantize: found.llama_quantize}[printed])
        return
    messages().print(
        f"llama.cpp build {found.build} ({found.origin}): {found.llama_server}",
        soft_wrap=True,
    )


@command(
    epilog="Example: orion rehearse\n\n"
    "Example: orion rehearse --preset lfm2.5-vl-450m --steps 2\n\n"
    "Example: orion rehearse --folder /data/rehearsal --keep --json"
)
def rehearse(
    preset: Annotated[
        str, typer.Option("--preset", help="Preset: lfm2.5-vl-1.6b or lfm2.5-vl-450m.")
    ] = "lfm2.5-vl-1.6b",
    steps: Annotated[
        int, typer.Option("--steps", min=0, help="Optimizer steps of the training. 0: use a random adapter.")
    ] = 0,
    folder: Annotated[
        Path | None, typer.Option("--folder", help="Work folder. Default: runs/rehearsal-PRESET.")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the models. Default: delete them at the end.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure the pipeline at full size with random weights.

    Prints the time, memory and disk space of each stage.
    Downloads no model.
    """
    from orion_triage.machine import rehearse

    where = folder or Path("runs") / f"rehearsal-{preset}"
    with progress_bar() as progress:
        figures = rehearse.run(preset, where, steps=steps, progress=progress)
    if not keep:
        rehearse.remove(where)
    if as_json:
        typer.echo(json.dumps(figures, indent=2))
    else:
        _print_rehearsal(figures)


def _print_rehearsal(figures: dict[str, Any]) -> None:
    from rich.table import Table

    from orion_triage.machine import budgets

    machine = figures["machine"]
    table = Table(
        title=f"{figures['preset']}, {figures['parameters']:,} parameters, on {machine['cores']} cores, "
        f"{machine['memory_bytes'] / 1e9:.0f} GB, {machine['gpu'] or 'no GPU'}",
        caption="Memory: peak of the process and its children, with mapped files. Disk: peak of the run folder, "
        "without the base.",
    )
    table.add_column("stage")
    for name in ("seconds", "memory GB", "disk GB", "GPU GB"):
        table.add_column(name, justify="right")
    for stage in figures["stages"]:
        cells = [stage["peak_memory_bytes"], stage["peak_disk_bytes"], stage["peak_vram_bytes"]]
        shown = [f"{value / 1e9:.2f}" if value is not None else "-" for value in cells]
        table.add_row(stage["stage"], f"{stage['seconds']:.1f}", *shown)
    console = output()
    console.print(table)
    if figures["training_seconds_per_sample"] is not None:
        console.print(f"training with validation: {figures['training_seconds_per_sample']:.2f} s per sample")
    console.print(f"largest log-probability difference, llama.cpp F16 and transformers: {figures['parity']:.4f}")
    console.print(f"total, including random weights and parity check: {figures['seconds']:.0f} s")
    if figures["preset"] == budgets.FULL_SIZE:
        _print_budgets(budgets.budgets(figures))
    else:
        sizes = ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in figures["bytes"].items())
        console.print(f"files: {sizes}")


def _print_budgets(rows: list[Any]) -> None:
    from rich.table import Table

    table = Table("budget", title="Budgets at 1.6B")
    for name in ("limit GB", "measured GB", "result"):
        table.add_column(name, justify="right")
    for row in rows:
        measured = "-" if row.measured is None else f"{row.measured / 1e9:.3f}"
        kept = {None: "", True: "ok", False: styled("red", "not met")}[row.kept]
        table.add_row(row.what, f"{row.limit / 1e9:.3f}", measured, kept)
    output().print(table)


@command(
    epilog="Example: orion doctor\n\n"
    "Example: orion doctor --preset lfm2.5-vl-1.6b\n\n"
    "Example: orion doctor --preset lfm2.5-vl-450m --set base.model=FOLDER --json\n\n"
    "Example: orion doctor --for fine-tune --run runs/mine"
)
def doctor(
    preset: PresetOption = "tiny",
    assignments: SetOption = [],  # noqa: B006
    purpose: Annotated[
        Purpose, typer.Option("--for", help="Stages to run here. fine-tune: only the dataset and the training.")
    ] = Purpose.RUN,
    folder: Annotated[Path, typer.Option("--run", help="Run folder, for the check of its disk.")] = Path("runs"),
    as_json: JsonOption = False,
) -> None:
    """Check GPU, memory, disk and tools for a preset.

    For lfm2.5-vl-1.6b, also compares the last 'orion rehearse' with the budgets.
    Exits with status 1 if something is missing.
    """
    from dataclasses import asdict

    from rich.table import Table

    from orion_triage.machine import budgets, doctor
    from orion_triage.settings import load_settings

    settings = load_settings(preset, assignments)
    findings = doctor.examine(settings, folder, only_fine_tune=purpose == Purpose.FINE_TUNE)
    figures = budgets.last_rehearsal(settings.preset)
    rows = budgets.budgets(figures) if settings.preset == budgets.FULL_SIZE else []
    if as_json:
        value = {
            "findings": [asdict(finding) for finding in findings],
            "budgets": [asdict(row) | {"kept": row.kept} for row in rows],
            "rehearsal": figures,
        }
        typer.echo(json.dumps(value, indent=2))
    else:
        table = Table("check", "state", "found", "what to do")
        colours = {"ok": "green", "note": "yellow", "missing": "red"}
        for finding in findings:
            state = styled(colours[finding.state], finding.state)
            fix = "" if finding.state == "ok" else finding.fix
            table.add_row(finding.what, state, finding.found, fix)
        output().print(table)
        if rows:
            _print_budgets(rows)
        if rows and not figures:
            messages().print(f"No measurements yet. Run 'orion rehearse --preset {preset}'.")
    if any(finding.state == "missing" for finding in findings):
        raise typer.Exit(1)


@command(
    epilog="Example: orion plan\n\n"
    "Example: orion plan --preset lfm2.5-vl-1.6b --gpu rtx-4090 --frames 400\n\n"
    "Example: orion plan --preset lfm2.5-vl-1.6b --gpu none --frames 1000 --json"
)
def plan(
    preset: PresetOption = "tiny",
    assignments: SetOption = [],  # noqa: B006
    gpu: Annotated[str, typer.Option("--gpu", metavar="NAME", help="GPU that you have or rent, or none.")] = "none",
    frames: Annotated[int, typer.Option("--frames", help="Number of labelled frames, all splits together.")] = 360,
    as_json: JsonOption = False,
) -> None:
    """Print the steps from the laptop to the Pi with time, memory and disk.

    Every number is marked: m measured by this project, s from a source, e
    estimated. Runs nothing. docs/from-laptop-to-pi.md explains the steps.
    """
    from dataclasses import asdict

    from rich.table import Table

    from orion_triage.machine.plan import COLUMNS, GPUS, plan, reasons, rows, time_in_words
    from orion_triage.settings import load_settings

    made = plan(load_settings(preset, assignments), gpu, frames)
    low, high = made.seconds
    if as_json:
        typer.echo(json.dumps(asdict(made) | {"seconds": {"low": low, "high": high}}, indent=2))
        return
    split = ", ".join(f"{count:,} {name}" for name, count in made.frames.items())
    table = Table(
        title=f"{made.preset}, GPU {gpu}, {frames:,} frames ({split})",
        caption="m: measured by this project, on another machine. s: from a source. e: estimated. "
        "-: not known, or not needed.",
    )
    for name in COLUMNS:
        table.add_column(name, overflow="fold")
    for row in rows(made):
        table.add_row(*row)
    console = output()
    console.print(table)
    console.print(f"in all, without the steps whose time is not known: {time_in_words(low, high, exact=False)} (e)")
    for title, lines in (
        ("How each number is known:", reasons(made)),
        ("What the last 'orion rehearse' on this machine says instead:", made.rehearsed),
        ("What a frame costs on board:", made.on_board),
        ("What so many frames show:", made.claims),
    ):
        for line in [title, *(f"- {line}" for line in lines)] if lines else []:
            console.print(line, soft_wrap=True)
    if made.gpu is None:
        console.print(f"GPUs for --gpu: {', '.join(GPUS)}", soft_wrap=True)
