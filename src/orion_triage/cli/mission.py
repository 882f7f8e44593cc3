"""Mission commands: write a mission file to start from, and check one."""

import json
import shlex
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import typer

from orion_triage.cli.app import app
from orion_triage.cli.terminal import JsonOption, PresetOption, cell, messages, output, styled

mission_app = typer.Typer(add_completion=False, no_args_is_help=True)
app.add_typer(
    mission_app,
    name="mission",
    rich_help_panel="Pipeline",
    help="Write or check a mission file: categories, prompt, actions and values.",
    epilog="Example: orion mission new mission.toml\n\nExample: orion mission check mission.toml",
)


@mission_app.command(epilog="Example: orion mission new mission.toml")
def new(path: Annotated[Path, typer.Argument(metavar="FILE", help="TOML file to write.")]) -> None:
    """Write a commented mission file to start from.

    Every key is explained in it. Refuses a file that exists.
    """
    from orion_triage.errors import OrionError
    from orion_triage.safe.files import write_text

    if path.exists():
        raise OrionError(f"{path} exists.", "Name a file that does not exist yet.")
    write_text(path, (resources.files("orion_triage.mission") / "example.toml").read_text(encoding="utf-8"))
    messages().print(f"mission new: {path}", soft_wrap=True)
    messages().print(f"next: {shlex.join(['orion', 'mission', 'check', str(path)])}", soft_wrap=True)


@mission_app.command(
    epilog="Example: orion mission check mission.toml\n\n"
    "Example: orion mission check mission.toml --preset lfm2.5-vl-1.6b\n\n"
    "Example: orion mission check missions/waterfront.toml --json"
)
def check(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="Mission file.")],
    preset: PresetOption = "tiny",
    as_json: JsonOption = False,
) -> None:
    """Check a mission file, and show what follows from it.

    Lists every mistake with its line. Without mistakes, shows the categories,
    the prompt and the grammar, with the tokens of the preset's base model.
    Exits with status 1 if there are mistakes.
    """
    from orion_triage.mission.load import load_mission
    from orion_triage.mission.preview import preview
    from orion_triage.models.load import resolve_base, tokenizer_of
    from orion_triage.settings import load_settings

    mission = load_mission(path)
    shown = preview(mission, tokenizer_of(resolve_base(load_settings(preset).base.model)))
    if as_json:
        typer.echo(json.dumps(shown, indent=2))
        return
    _print_mission(shown)
    words = ["orion", "dataset", "check", "FOLDER", "--mission", str(path)]
    if mission.places:
        words = ["orion", "run", "--mission", str(path)]
    messages().print(f"next: {shlex.join(words)}", soft_wrap=True)


def _print_mission(shown: dict[str, Any]) -> None:
    from rich.table import Column, Table

    console = output()
    numbers = [Column(name, justify="right") for name in ("value", "prior", "tokens")]
    table = Table("category", "action", *numbers, "costs: sent, stored, dropped", "D", title=f"Mission {shown['name']}")
    for category in shown["categories"]:
        costs = ", ".join(f"{cost:g}" for cost in category["costs"])
        row = (category["name"], category["action"], f"{category['value']:g}", f"{category['prior']:g}")
        table.add_row(*row, str(shown["name_tokens"][category["name"]]), costs, category["conflict"])
    console.print(table)
    for field in shown["fields"]:
        typer.echo(f"{field['name']}: {field['allowed']}")
    rule = f"a blank frame is {shown['blank']}" if shown["blank"] else "no rule for blank frames"
    unparsable = shown["unparsable"] or "kept, and counted"
    typer.echo(f"{rule}; an answer without a verdict is {unparsable}")
    if kept := shown["tokens_before_image"]:
        typer.echo(f"the text before the image is read once for all frames: {kept} tokens")
    typer.echo(f"with --verdict-only, a reason is written for: {', '.join(shown['reasons_for']) or 'none'}")
    count = shown["scoring_requests"]
    typer.echo(f"scores of the categories: {count} request{'s' if count > 1 else ''} per frame")
    for note in shown["notes"]:
        typer.echo(f"  {note}")
    for title, text, tokens in (
        ("prompt in flight", shown["prompt"], shown["prompt_tokens"]),
        ("prompt with coordinates", shown["prompt_with_coordinates"], shown["prompt_with_coordinates_tokens"]),
    ):
        console.print(styled("bold", f"{title} ({tokens} tokens):"))
        for line in text.splitlines():
            console.print(f"  {cell(line)}", soft_wrap=True)
    console.print(styled("bold", "grammar:"))
    for line in shown["grammar"].splitlines():
        console.print(f"  {cell(line)}", soft_wrap=True)
