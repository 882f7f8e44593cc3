"""The application that every command registers with, and the order in which the help names them."""

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import typer
from typer.core import TyperGroup

COMMANDS = (
    "run", "dataset", "fine-tune", "fuse", "quantize", "bundle", "verify", "clean", "push", "settings", "remote",
    "ablation", "evaluate", "report", "compare", "threshold",
    "triage", "bench-frame",
    "doctor", "toolchain", "rehearse",
)  # fmt: skip


class _InOrder(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return [*COMMANDS, *(name for name in super().list_commands(ctx) if name not in COMMANDS)]

    def invoke(self, ctx: Any) -> Any:
        """Of the options that are suggested for an unknown one, only those that it may be a misspelling of."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            if possible := getattr(error, "possibilities", None):
                error.possibilities = alike(error.option_name, possible)  # type: ignore[attr-defined]
            raise


def alike(option: str, possible: Sequence[str]) -> list[str]:
    """The options that are `option` but for a slip of the fingers: '--prset' is --preset, '--frames' is not."""
    found = get_close_matches(option.lstrip("-"), [name.lstrip("-") for name in possible], cutoff=0.85)
    return [name for name in possible if name.lstrip("-") in found]


app = typer.Typer(
    name="orion",
    cls=_InOrder,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fine-tune, quantize and evaluate a vision-language model that triages satellite frames on board.",
)
