"""Checkpoints in the Hub's layout, written tensor by tensor: a large model is never in memory as a whole."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from orion_triage.errors import OrionError
from orion_triage.progress import Progress, silent
from orion_triage.safe.files import naming, write_text
from orion_triage.safe.reading import read_object, shown

if TYPE_CHECKING:
    import torch

FILE_BYTES = 1_000_000_000  # of one file: it is in memory while it is written
# One tensor of each part, as the published checkpoints name it and llama.cpp's converter expects it.
_LANDMARKS = (
    "model.language_model.embed_tokens.weight",
    "model.vision_tower.vision_model.embeddings.patch_embedding.weight",
    "model.multi_modal_projector.linear_1.weight",
)


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
        with naming(folder / file_name):
            save_file(tensors, folder / file_name, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    progress(description, done, len(empty))
    return sum(tensor.numel() for tensor in empty.values())


def check_names(folder: Path) -> None:
    """Raise OrionError unless the tensors of `folder` are named as in the published checkpoints."""
    from safetensors import SafetensorError, safe_open

    names: set[str] = set()
    for path in folder.glob("*.safetensors"):
        if not path.is_file():  # a pipe would be waited for
            raise OrionError(f"{path} is no regular file.", "Fetch it again.")
        try:
            with safe_open(path, "np") as file:  # the header only: "pt" would import torch before anything needs it
                names.update(file.keys())
        except (SafetensorError, OSError) as error:
            raise OrionError(f"{path} is damaged: {error}.", "Fetch it again.") from None
    _check_index(folder)
    for landmark in _LANDMARKS:
        if landmark not in names:
            end = ".".join(landmark.split(".")[-2:])
            instead = next(
                (f"{name!r} in its place" for name in sorted(names) if name.endswith(end)), "nothing like it"
            )
            raise OrionError(
                f"{folder} has no tensor {landmark!r}; there is {instead}.",
                "Use the published checkpoint: llama.cpp's converter knows no other names. One that transformers saved "
                "itself may have been renamed by its version; the tested ones are in constraints.txt.",
            )


def _check_index(folder: Path) -> None:
    """Raise OrionError when the index of the shards names anything but SafeTensors files of the folder."""
    path = folder / "model.safetensors.index.json"
    try:
        files = read_object(path).get("weight_map")
    except FileNotFoundError:
        return
    for name in files.values() if isinstance(files, dict) else [files]:
        # transformers would open a file of another kind by unpickling it, and one of another folder too
        if (
            not isinstance(name, str)
            or not re.fullmatch(r"[\w.-]+\.safetensors", name)
            or not (folder / name).is_file()
        ):
            raise OrionError(
                f"{path} names {shown(name)}, which is no SafeTensors file in {folder}.", "Fetch the model again."
            )


def plain_name(name: str) -> str:
    """One name for a module or tensor that the Hub, older adapters and transformers 5.1 call by a longer one."""
    return name.replace("vision_tower.vision_model.", "vision_tower.")


def hub_name(name: str) -> str:
    """The Hub's name of a parameter in transformers 5, which llama.cpp's converter expects."""
    prefix = "model.vision_tower."
    inside = name.startswith(prefix) and not name.startswith(prefix + "vision_model.")
    return name.replace(prefix, prefix + "vision_model.", 1) if inside else name
