"""STAGE: adapter + base -> a 16-bit Hugging Face folder, checked to answer like base + adapter.

The base's files are read tensor by tensor. The adapter's changes are added in float32 and rounded once, to the output
type; other tensors are only cast. The model is therefore never in memory twice, and names and layout stay those of the
Hub. The written folder is then read back, and its verdict log-probabilities are compared with base + adapter.
"""

import gc
import json
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orion_triage.dataset.dataset import Dataset
from orion_triage.dataset.records import Record
from orion_triage.errors import OrionError
from orion_triage.models.adapter import attach_adapter, check_base, read_adapter
from orion_triage.models.checkpoint import write_tensors
from orion_triage.models.family import family_in, family_of_model, read_config
from orion_triage.models.generate import answer_log_probabilities
from orion_triage.models.load import (
    float32_compute,
    load_model,
    load_processor,
    save_processor,
)
from orion_triage.progress import Progress, silent
from orion_triage.safe.files import replaced_folder, require_free_space, write_text
from orion_triage.settings import FuseSettings

if TYPE_CHECKING:
    import torch
    from PIL import Image

# Rounding the merged weights to 16 bits may change a verdict token's log-probability by this much, or by this share of
# the adapter's mean effect, whichever is larger. Measured at 1.6B: 0.0025 in float16.
LARGEST_DIFFERENCE = 0.005
LARGEST_SHARE = 0.05
ENOUGH_RECORDS = 20
# Largest frame size of the check, in pixels. Every weight is used at any size. On 2 cores, the 1.6B model takes 15 s at
# 512 and 7 s at 256, three times per record.
CHECK_FRAME_SIZE = 256


def run(
    base: Path,
    adapter: Path,
    dataset: Dataset,
    out_folder: Path,
    settings: FuseSettings,
    frame_size: int,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write the merged model, processor and chat template into `out_folder`; returns the measurements of the check.

    Computes in float32 with weights stored in 16 bits. Raises OrionError for an adapter of another base, values that
    are not finite, an adapter without effect, or a merge that does not answer like base + adapter; `out_folder` is
    then unchanged.
    """
    import torch

    records = _check_records(dataset, settings.check_records)
    few = [f"the merge was checked on only {len(records)} records"] if len(records) < ENOUGH_RECORDS else []
    weights = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    require_free_space(out_folder, weights + 20_000_000, "the merged model")
    warnings = check_base(base, adapter, frame_size)
    tensors = read_adapter(adapter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    processor = load_processor(base, frame_size)
    check_size = min(frame_size, CHECK_FRAME_SIZE) if family_in(base).TAKES_ANY_FRAME_SIZE else frame_size
    samples = _Samples(base, dataset, records, check_size, progress)

    model = load_model(base, dtype="auto", device=device)
    with float32_compute(model):
        plain = samples.score(model, "scoring the base")
        model, census, idle = attach_adapter(model, adapter, tensors)
        adapted = samples.score(model, "scoring base and adapter")
    effect = (adapted - plain).abs()
    if not float(effect.max()) > 0:
        raise OrionError(
            f"the adapter {adapter} changes no log-probability of {len(records)} verdicts: it was not trained, or only "
            "on modules without effect.",
            "Fine-tune again.",
        )
    changes = _changes(model)
    del model
    gc.collect()  # modules and hooks reference each other; without this, the base stays mapped in memory
    with replaced_folder(out_folder) as folder:
        parameters = _write_weights(base, changes, settings.dtype, folder, progress)
        _write_config(base, settings.dtype, folder)
        save_processor(processor, base, folder)
        result = load_model(folder, dtype="auto", device=device)
        with float32_compute(result):
            merged = samples.score(result, "scoring the merged model")
        difference = float((merged - adapted).abs().max())
        limit = max(LARGEST_DIFFERENCE, LARGEST_SHARE * float(effect.mean()))
        if not difference <= limit:
            raise OrionError(
                "the merged model's verdict log-probabilities differ from base + adapter by up to "
                f"{difference:.4f}; {limit:.4f} is allowed (the adapter's mean effect is "
                f"{float(effect.mean()):.4f}).",
                "Set fuse.dtype=float16, or fine-tune again if the adapter's weights are extreme.",
            )
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return {
        "check_records": len(records),
        "verdict_tokens": effect.numel(),
        "largest_difference": round(difference, 6),
        "allowed_difference": round(limit, 6),
        "mean_adapter_effect": round(float(effect.mean()), 6),
        "largest_adapter_effect": round(float(effect.max()), 6),
        "parameters": parameters,
        "bytes": size,
        "dtype": settings.dtype,
        "census": census,
        "warnings": warnings + idle + few,
    }


def _check_records(dataset: Dataset, count: int) -> list[Record]:
    """`count` records spread over the training and validation splits, with and without coordinates.

    Raises OrionError if the dataset has fewer.
    """
    records = [*dataset.records("train"), *dataset.records("val")]
    if len(records) < count:
        raise OrionError(
            f"{dataset.folder} has {len(records)} training and validation records; the merge check needs {count}.",
            "Add places to the dataset, or lower fuse.check_records.",
        )
    return [records[index * len(records) // count] for index in range(count)]


class _Samples:
    """The frames, prompts and verdicts of the check, decoded once."""

    def __init__(
        self, base: Path, dataset: Dataset, records: Sequence[Record], frame_size: int, progress: Progress
    ) -> None:
        self.processor, self.records, self.progress = load_processor(base, frame_size), records, progress
        self.images: list[Image.Image] = [dataset.frame(record, frame_size) for record in records]

    def score(self, model: Any, description: str) -> "torch.Tensor":
        """Log-probabilities of the tokens of all verdicts, concatenated: [tokens], float32."""
        import torch

        scores = []
        for done, (record, image) in enumerate(zip(self.records, self.images, strict=True), start=1):
            answer = record.answer
            scores += answer_log_probabilities(model, self.processor, [image], [record.user_text], [answer])
            self.progress(description, done, len(self.records))
        return torch.cat(scores)


def _changes(model: Any) -> "dict[str, Callable[[], torch.Tensor]]":
    """Module name -> a function that computes PEFT's change of its weight in float32; releases the base's weights."""
    import torch
    from peft.tuners.lora import Linear

    changes: dict[str, Callable[[], torch.Tensor]] = {}
    plain_name = family_of_model(model).plain_name
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            changes[plain_name(name.removeprefix("base_model.model."))] = partial(module.get_delta_weight, "default")
            module.base_layer = None  # a single bias would keep the whole file of the base mapped
    return changes


def _write_weights(
    base: Path, changes: "dict[str, Callable[[], torch.Tensor]]", dtype: str, folder: Path, progress: Progress
) -> int:
    """Write the merged tensors; returns the number of parameters.

    Raises OrionError if a value is not finite or does not fit `dtype`, or if a change has no matching tensor.
    """
    import torch
    from safetensors import safe_open

    family, has_tied_head = family_in(base), family_in(base).has_tied_head(read_config(base))
    stored: dict[str, tuple[Path, str]] = {}
    shapes: dict[str, list[int]] = {}
    for path in sorted(base.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dictionary
                written = family.file_name(name)
                # llama.cpp's converter does not read a head that is tied to the token embedding.
                if written != "lm_head.weight" or not has_tied_head:
                    stored[written] = path, name
                    shapes[written] = file.get_slice(name).get_shape()
    left = dict(changes)

    def merged(name: str) -> torch.Tensor:
        path, original = stored[name]
        with safe_open(path, "pt") as file:
            tensor = file.get_tensor(original)
        change = left.pop(family.plain_name(name).removesuffix(".weight"), None)
        if change is not None:
            with torch.inference_mode():
                tensor = tensor.float() + change().to("cpu")
            if not bool(torch.isfinite(tensor).all()):
                raise OrionError(f"merged {name} has values that are not finite.", "Fine-tune again.")
        rounded: torch.Tensor = tensor.to(getattr(torch, dtype))
        if not bool(torch.isfinite(rounded).all()):
            raise OrionError(f"merged {name} has values beyond {dtype}'s range.", "Set fuse.dtype=bfloat16.")
        return rounded

    parameters = write_tensors(folder, shapes, dtype, merged, description="merging", progress=progress)
    if left:
        raise OrionError(
            f"the adapter changes {next(iter(left))}, but {base} has no such weight.",
            "Use the base that it was trained on.",
        )
    return parameters


def _write_config(base: Path, dtype: str, folder: Path) -> None:
    """Write the base's configuration with the type of the merged weights and the architecture.

    llama.cpp's converter needs the architecture.
    """
    config = read_config(base)
    for section in (config, config["text_config"], config["vision_config"]):
        section.pop("torch_dtype", None)
        section.pop("auto_map", None)  # see drop_code_names
        section["dtype"] = dtype
    # Do not copy the base's value: for some architectures, the converter runs code from the model's folder.
    family_in(base).name_architectures(config)
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    generation = base / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, folder / generation.name)
