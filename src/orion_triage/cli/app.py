"""The application that every command registers with, and the order in which the help names them."""

from typing import Any

import typer
from typer.core import TyperGroup

COMMANDS = (
    "run", "dataset", "fine-tune", "fuse", "quantize", "bundle", "verify", "clean", "push", "settings", "remote",
    "ablation", "evaluate", "ladder", "report", "compare", "operating-point", "decoding",
    "triage", "bench-frame",
    "doctor", "toolchain", "rehearse", "budgets", "build-tiny-base",
)  # fmt: skip


class _InOrder(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return [*COMMANDS, *(name for name in super().list_commands(ctx) if name not in COMMANDS)]


app = typer.Typer(
    name="orion",
    cls=_InOrder,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fine-tune, quantize and evaluate a vision-language model that triages satellite frames on board.",
)
