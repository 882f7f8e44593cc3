"""Checkpoints in the Hub's layout, written tensor by tensor: a large model is never in memory as a whole."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from orion_triage.files import write_text
from orion_triage.progress import Progress, silent

if TYPE_CHECKING:
    import torch

FILE_BYTES = 1_000_000_000  # of one file: it is in memory while it is written


def write_tensors(
    folder: Path,
    shapes: Mapping[str, Sequence[int]],
    dtype: str,
    tensor_of: "Callable[[str], torch.Tensor]",
    *,
    description: str,
    progress: Progress = silent,
) -> int:
    """Write the tensors named in `shapes` as SafeTensors, with an index when there are several files.

    `tensor_of` makes a tensor of `dtype` when its turn comes. Returns the number of values.
    """
    import torch
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    empty = {
        name: torch.empty(tuple(shape), dtype=getattr(torch, dtype), device="meta") for name, shape in shapes.items()
    }
    plan = split_torch_state_dict_into_shards(empty, max_shard_size=FILE_BYTES)
    done = 0
    for file_name, names in plan.filename_to_tensors.items():
        tensors = {}
        for name in names:
            progress(description, done, len(empty))
            tensors[name] = tensor_of(name).contiguous()
            done += 1
        save_file(tensors, folder / file_name, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    progress(description, done, len(empty))
    return sum(tensor.numel() for tensor in empty.values())


def plain_name(name: str) -> str:
    """One name for a module or tensor that the Hub, older adapters and transformers 5.1 call by a longer one."""
    return name.replace("vision_tower.vision_model.", "vision_tower.")


def hub_name(name: str) -> str:
    """The Hub's name of a parameter in transformers 5, which llama.cpp's converter expects."""
    prefix = "model.vision_tower."
    inside = name.startswith(prefix) and not name.startswith(prefix + "vision_model.")
    return name.replace(prefix, prefix + "vision_model.", 1) if inside else name
