"""Checkpoints in the Hub's layout, written tensor by tensor, so that a large model is never completely in memory."""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from orion_triage.errors import OrionError
from orion_triage.models.quantized import refuse_type
from orion_triage.progress import Progress, silent
from orion_triage.safe.files import naming, write_text
from orion_triage.safe.reading import read_object, shown

if TYPE_CHECKING:
    import torch

FILE_BYTES = 1_000_000_000  # of one file, which is in memory while it is written


def write_tensors(
    folder: Path,
    shapes: Mapping[str, Sequence[int]],
    dtype: str,
    tensor_of: "Callable[[str], torch.Tensor]",
    *,
    description: str,
    progress: Progress = silent,
) -> int:
    """Write the tensors named in `shapes` as SafeTensors, with an index if there are several files.

    `tensor_of(name)` returns one tensor of `dtype`; it is called once per name. Returns the number of values.
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


def check_names(folder: Path, landmarks: Sequence[Sequence[str]]) -> None:
    """Raise OrionError unless the tensors in `folder` have the published checkpoints' names, and floats as values.

    `landmarks` are one tensor of each part, by each of its possible names.
    """
    from safetensors import SafetensorError, safe_open

    names: set[str] = set()
    for path in folder.glob("*.safetensors"):
        if not path.is_file():  # opening a pipe would wait for a writer
            raise OrionError(f"{path} is not a regular file.", "Fetch it again.")
        try:
            with safe_open(path, "np") as file:  # reads only the header; "pt" would import torch
                for name in file.keys():  # noqa: SIM118 - not a dictionary
                    refuse_type(folder, path, name, file.get_slice(name).get_dtype())
                    names.add(name)
        except (SafetensorError, OSError) as error:
            raise OrionError(f"{path} is damaged: {error}.", "Fetch it again.") from None
    _check_index(folder)
    for landmark, *other_names in landmarks:
        if names.isdisjoint([landmark, *other_names]):
            end = ".".join(landmark.split(".")[-2:])
            instead = next((f"found {name!r}" for name in sorted(names) if name.endswith(end)), "found no similar name")
            raise OrionError(
                f"{folder} has no tensor {landmark!r}; {instead}. llama.cpp's converter needs the published names.",
                "Use the published checkpoint. If transformers saved this one, save it with the version in "
                "constraints.txt: others rename tensors.",
            )


def count_parameters(folder: Path) -> int:
    """The number of values in the folder's SafeTensors files; only their headers are read."""
    from safetensors import safe_open

    count = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "np") as file:
            count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return count


def _check_index(folder: Path) -> None:
    """Raise OrionError if the index of the shards names anything but SafeTensors files in the folder."""
    path = folder / "model.safetensors.index.json"
    try:
        files = read_object(path).get("weight_map")
    except FileNotFoundError:
        return
    for name in files.values() if isinstance(files, dict) else [files]:
        # transformers would unpickle a file of another format, and would open a file in another folder
        if (
            not isinstance(name, str)
            or not re.fullmatch(r"[\w.-]+\.safetensors", name)
            or not (folder / name).is_file()
        ):
            raise OrionError(
                f"{path} names {shown(name)}, which is not a SafeTensors file in {folder}.", "Fetch the model again."
            )
