"""Group the same records per step in larger micro batches to fill a GPU, or in smaller ones to save memory."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from orion_triage.dataset.records import Record
from orion_triage.settings import FineTuneSettings
from orion_triage.train.twins import costliest_first

if TYPE_CHECKING:
    from transformers import BatchFeature


def groupings(settings: FineTuneSettings) -> list[FineTuneSettings]:
    """The settings with the same records per step in larger groups: the fastest first, the given settings last.

    Gradient checkpointing costs a third of the time, and a group of two or more records fills a GPU, so all groups
    without checkpointing come before those with it.
    """
    records = settings.micro_batch_size * settings.gradient_accumulation_steps
    sizes = [size for size in range(records, settings.micro_batch_size - 1, -1) if records % size == 0]
    kinds = (False, True) if settings.gradient_checkpointing else (False,)
    return [
        settings.model_copy(
            update={
                "micro_batch_size": size,
                "gradient_accumulation_steps": records // size,
                "gradient_checkpointing": checkpointing,
            }
        )
        for checkpointing in kinds
        for size in sizes
    ]


_LARGEST_GPU_SHARE = 0.85  # of the GPU's memory in the trial; the rest is for optimizer state and fragmentation


def fill_gpu(
    model: Any,
    collate: "Callable[[list[Record]], BatchFeature]",
    records: list[Record],
    settings: FineTuneSettings,
    precision: str,
) -> FineTuneSettings:
    """The first of `groupings` whose forward and backward pass over the longest records fits the GPU; tries each."""
    import torch

    longest = sorted(records, key=lambda record: -len(record.prompt + record.answer))
    if settings.twins_together:
        longest = costliest_first(longest)
    total = torch.cuda.get_device_properties(model.device).total_memory
    *larger, as_set = groupings(settings)
    model.train()
    for grouping in larger:
        if grouping.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.cuda.reset_peak_memory_stats(model.device)
        try:
            with torch.random.fork_rng([model.device]), torch.autocast("cuda", getattr(torch, precision)):
                batch = collate(longest[: grouping.micro_batch_size]).to(model.device)
                model(**batch).loss.backward()
            fits = torch.cuda.max_memory_allocated(model.device) < _LARGEST_GPU_SHARE * total
        except torch.cuda.OutOfMemoryError:
            fits = False
        finally:
            model.zero_grad(set_to_none=True)
            model.gradient_checkpointing_disable()
            torch.cuda.empty_cache()
        if fits:
            return grouping
    return as_set


CPU_MEMORY_FULL = "can't allocate memory"  # torch's message on a CPU; on a GPU it raises OutOfMemoryError


def advice_for_less_memory(settings: FineTuneSettings) -> str:
    """The next setting that uses less memory with the same records per step."""
    size, count = settings.micro_batch_size, settings.gradient_accumulation_steps
    if size > 1:
        half = next(part for part in range(size // 2, 0, -1) if size % part == 0)
        more = count * size // half
        return (
            f"Set fine_tune.micro_batch_size={half} and fine_tune.gradient_accumulation_steps={more} (same records "
            "per step)."
        )
    if not settings.gradient_checkpointing:
        return "Set fine_tune.gradient_checkpointing=true (a third more time, much less memory)."
    return "Set base.frame_size to 384 or 256, or use a GPU with more memory."
