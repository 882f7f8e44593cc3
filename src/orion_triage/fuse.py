"""STAGE: adapter + base -> a 16-bit Hugging Face folder, proven to answer like the adapter.

The adapter is merged in float32 into the base's 16-bit weights and rounded once, to the output's type. The
written folder is then read back and its verdict log-probabilities are compared with those of base + adapter.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orion_triage import vlm
from orion_triage.adapter import attach_adapter, read_adapter
from orion_triage.card import write_card
from orion_triage.config import FuseSettings
from orion_triage.errors import OrionError
from orion_triage.files import replaced_folder, require_free_space
from orion_triage.fine_tune import BASE_FILE
from orion_triage.frames import read_frame
from orion_triage.progress import Progress, silent
from orion_triage.records import Record, image_path, read_split

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from transformers.models.lfm2_vl import Lfm2VlProcessor

# Rounding the merged weights to 16 bits may move a verdict token's log-probability by this much, or by this
# share of what the adapter itself moves on average, whichever is more. Measured at 1.6B: 0.0025 in float16.
LARGEST_DIFFERENCE = 0.005
LARGEST_SHARE = 0.05


def run(
    base: Path,
    adapter: Path,
    dataset: Path,
    out_folder: Path,
    settings: FuseSettings,
    frame_size: int,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write the merged model, processor and chat template into `out_folder`; returns the check's figures.

    Raises OrionError for an adapter of another base, values that are not finite, an adapter without effect,
    or a merge that does not answer like base + adapter; `out_folder` is untouched then. Computes in float32:
    4 bytes of memory a parameter, 6.4 GB for the 1.6B.
    """
    import torch

    records = _check_records(dataset, settings.check_records)
    weights = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    require_free_space(out_folder, weights + 20_000_000, "the merged model")
    warnings = _check_base(base, adapter, frame_size)
    tensors = read_adapter(adapter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    processor = vlm.load_processor(base, frame_size)
    samples = _Samples(processor, dataset, records, frame_size, progress)

    model = vlm.load_model(base, dtype="float32", device=device)
    plain = samples.score(model, "scoring the base")
    model, census, idle = attach_adapter(model, adapter, tensors)
    adapted = samples.score(model, "scoring base and adapter")
    effect = (adapted - plain).abs()
    if not float(effect.max()) > 0:
        raise OrionError(
            f"the adapter {adapter} changes no log-probability of {len(records)} verdicts.",
            "It was not trained, or on other modules: fine-tune again.",
        )
    progress("merging", 0, 2)
    try:
        model = model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise OrionError(f"merging {adapter} gives values that are not finite: {error}.", "Fine-tune again.") from None
    _round(model, settings.dtype)
    progress("merging", 1, 2)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    with replaced_folder(out_folder) as folder:
        _save(model, processor, base, folder)
        write_card("merged", base, vlm.base_name(base), folder)
        del model
        progress("merging", 2, 2)
        merged = samples.score(vlm.load_model(folder, dtype="float32", device=device), "scoring the merged model")
        difference = float((merged - adapted).abs().max())
        limit = max(LARGEST_DIFFERENCE, LARGEST_SHARE * float(effect.mean()))
        if not difference <= limit:
            raise OrionError(
                "the merged model's verdict log-probabilities differ from base + adapter by up to "
                f"{difference:.4f}; {limit:.4f} is allowed (the adapter's own mean effect is "
                f"{float(effect.mean()):.4f}).",
                "Use fuse.dtype=float16, or fine-tune again if the adapter's weights are extreme.",
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
        "warnings": warnings + idle,
    }


def _check_records(dataset: Path, count: int) -> list[Record]:
    """`count` records spread over the training and validation splits, with and without coordinates."""
    records = [*read_split(dataset, "train"), *read_split(dataset, "val")]
    if len(records) < count:
        raise OrionError(
            f"{dataset} has {len(records)} training and validation records; the merge's check needs {count}.",
            "Add places to the dataset, or lower fuse.check_records (20 or more).",
        )
    return [records[index * len(records) // count] for index in range(count)]


class _Samples:
    """The check's frames, prompts and verdicts, decoded once."""

    def __init__(
        self,
        processor: "Lfm2VlProcessor",
        dataset: Path,
        records: Sequence[Record],
        frame_size: int,
        progress: Progress,
    ) -> None:
        self.processor, self.records, self.progress = processor, records, progress
        self.images: list[Image.Image] = [
            read_frame(image_path(dataset, record), frame_size).image for record in records
        ]

    def score(self, model: Any, description: str) -> "torch.Tensor":
        """Log-probabilities of all verdict tokens, one after the other: [tokens], float32."""
        import torch

        scores = []
        for done, (record, image) in enumerate(zip(self.records, self.images, strict=True), start=1):
            answer = record.verdict.to_json()
            scores += vlm.answer_log_probabilities(model, self.processor, [image], [record.prompt], [answer])
            self.progress(description, done, len(self.records))
        return torch.cat(scores)


def _check_base(base: Path, adapter: Path, frame_size: int) -> list[str]:
    """Warnings about where the adapter comes from; raises OrionError when it was trained on another base."""
    path = adapter / BASE_FILE
    try:
        made_from = json.loads(path.read_text(encoding="utf-8"))
        sha256, trained_size = made_from["sha256"], made_from["frame_size"]
    except FileNotFoundError:
        return [f"{adapter} has no {BASE_FILE}: only the shapes show that it belongs to {vlm.base_name(base)}"]
    except (ValueError, KeyError, TypeError) as error:
        raise OrionError(f"{path} is damaged: {error!r}.", "Fine-tune again.") from None
    if sha256 != vlm.fingerprint(base):
        raise OrionError(
            f"{adapter} is an adapter of another base ({made_from.get('name')}, weights {str(sha256)[:12]}), "
            f"not of {vlm.base_name(base)}.",
            "Use the base that it was trained on, or fine-tune again on this one.",
        )
    if trained_size != frame_size:
        raise OrionError(
            f"{adapter} was trained on frames of {trained_size} px; base.frame_size is {frame_size}.",
            f"Set base.frame_size={trained_size}, or fine-tune again.",
        )
    return []


def _round(model: Any, dtype: str) -> None:
    """Round every parameter to the output's type, in place; raises OrionError when one does not fit it."""
    import torch

    torch_dtype = getattr(torch, dtype)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch_dtype)
        if not bool(torch.isfinite(parameter.data).all()):
            raise OrionError(f"merged {name} has values beyond {dtype}'s range.", "Use fuse.dtype=bfloat16.")
    for config in (model.config, model.config.text_config, model.config.vision_config):
        config.dtype = torch_dtype


def _save(model: Any, processor: "Lfm2VlProcessor", base: Path, folder: Path) -> None:
    """The Hub's layout, which llama.cpp's converter reads: see the checks at the end."""
    from safetensors import safe_open

    if not getattr(model.config.text_config, "architectures", None):
        model.config.text_config.architectures = ["Lfm2ForCausalLM"]
    model.config.text_config.use_cache = True
    with vlm.no_progress_bars():
        model.save_pretrained(folder)
    processor.save_pretrained(folder)
    generation = base / "generation_config.json"  # loading left only the token ids of it
    if generation.is_file():
        shutil.copyfile(generation, folder / generation.name)
    names: list[str] = []
    for shard in folder.glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            names += file.keys()
    bare = [name for name in names if "vision_tower." in name and "vision_tower.vision_model." not in name]
    if bare or "lm_head.weight" in names:
        raise OrionError(
            f"the saved model has {[*bare, 'lm_head.weight'][0]}; llama.cpp's converter does not read it.",
            "Fetch the base again in the Hub's layout, or install a tested version of transformers.",
        )
