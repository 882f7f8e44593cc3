"""What the tests of trainings share: settings of a training of seconds, and a look at its adapter."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from orion_triage.models.adapter import WEIGHTS_FILE
from orion_triage.settings import FineTuneSettings

QUICK = FineTuneSettings(
    micro_batch_size=8,
    gradient_accumulation_steps=1,
    epochs=2,
    learning_rate=1e-2,
    gradient_checkpointing=False,
)


def tensors_of(adapter: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(adapter / WEIGHTS_FILE)


def largest_difference(first: dict[str, Any], second: dict[str, Any]) -> float:
    assert set(first) == set(second)
    return max(float((first[key] - second[key]).abs().max()) for key in first)


class InterruptionError(Exception):
    pass


def stop_at(step: int) -> Callable[[str, int, int], None]:
    """A progress callback that interrupts the training after this optimizer step."""

    def progress(description: str, done: int, total: int) -> None:
        if (description, done) == ("fine-tuning", step):
            raise InterruptionError

    return progress
