"""The Typer application that every command registers with, and the order of the commands in the help."""

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import typer
from typer.core import TyperGroup

COMMANDS = (
    "run", "mission", "camera", "dataset", "fine-tune", "fuse", "quantize", "bundle", "verify", "clean", "push",
    "settings", "remote",
    "ablation", "evaluate", "report", "verdict", "compare", "threshold", "false-alarms", "adapt",
    "triage", "review", "bench-frame",
    "plan", "doctor", "toolchain", "rehearse",
)  # fmt: skip


class _InOrder(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return [*COMMANDS, *(name for name in super().list_commands(ctx) if name not in COMMANDS)]

    def invoke(self, ctx: Any) -> Any:
        """For an unknown option, suggest only options with a similar name."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            if possible := getattr(error, "possibilities", None):
                error.possibilities = alike(error.option_name, possible)  # type: ignore[attr-defined]
            raise


def alike(option: str, possible: Sequence[str]) -> list[str]:
    """The options that `option` is probably a misspelling of: --preset for '--prset', none for '--frames'."""
    found = get_close_matches(option.lstrip("-"), [name.lstrip("-") for name in possible], cutoff=0.85)
    return [name for name in possible if name.lstrip("-") in found]


app = typer.Typer(
    name="orion",
    cls=_InOrder,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fine-tune, quantize and evaluate a vision-language model that triages satellite frames on board.",
    epilog="Example: orion run\n\nExample: orion triage frames/ --out verdicts.jsonl\n\nExample: orion evaluate --help",
)
