"""A base whose weights are already quantized is refused: training, merging and the converter need the 16-bit ones."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from orion_triage.errors import OrionError
from orion_triage.models.licence import base_of
from orion_triage.safe.reading import shown

# In config.json: transformers' key (bitsandbytes, FP8, AWQ, GPTQ, compressed-tensors, torchao, ...), and MLX's.
_KEYS = ("quantization_config", "quantization")
# Files of tools that do not change config.json: NVIDIA ModelOpt, AutoGPTQ, AutoAWQ.
_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
_FLOATS = ("F64", "F32", "F16", "BF16")
_INDICES = ("I64", "BOOL")  # positions and masks, as older checkpoints contain them


def refuse_quantized(folder: Path, config: dict[str, Any]) -> None:
    """Raise OrionError if config.json, or a file beside it, says that the weights of the model are quantized."""
    path = folder / "config.json"
    for key, value in _declared(config):
        raise refusal(folder, f"{path}: {key} is {_in_words(value)}")
    for name in _FILES:
        if (folder / name).is_file():
            raise refusal(folder, f"{folder} has {name}")


def refuse_type(folder: Path, path: Path, name: str, dtype: str) -> None:
    """Raise OrionError if a tensor's type in a SafeTensors header is one of packed or 8-bit weights."""
    if dtype not in _FLOATS + _INDICES:
        raise refusal(folder, f"{path}: {name} has type {dtype}")


def refusal(folder: Path, found: str) -> OrionError:
    """The error for a quantized base; the fix names the model that it was made from, if its model card does."""
    origin = None
    with suppress(OrionError):  # a card that cannot be read is not this error's matter
        origin = base_of(folder)
    named = f", {shown(origin)[1:-1]}" if origin else ""
    return OrionError(
        f"{found}: the base is already quantized.",
        f"Set base.model to the 16-bit model that it was made from{named}.",
    )


def _declared(section: dict[str, Any], prefix: str = "", depth: int = 0) -> list[tuple[str, Any]]:
    """(key, value) of every quantization that a configuration declares, also in a nested text or vision part."""
    found = [(prefix + key, section[key]) for key in _KEYS if section.get(key)]
    for name, value in section.items():
        if name not in _KEYS and isinstance(value, dict) and depth < 3:
            found += _declared(value, f"{prefix}{name}.", depth + 1)
    return found


def _in_words(value: Any) -> str:
    """The method and its bits: "bitsandbytes, 4 bits"."""
    if not isinstance(value, dict):
        return shown(value)
    method = value.get("quant_method") or value.get("quant_algo") or value.get("quant_type")
    bits = value.get("bits") or value.get("w_bit")
    if value.get("load_in_4bit") or value.get("load_in_8bit"):
        method, bits = method or "bitsandbytes", 4 if value.get("load_in_4bit") else 8
    if not method and bits and "group_size" in value:
        method = "MLX"
    words = [shown(method)[1:-1] if isinstance(method, str) else "", f"{shown(bits)} bits" if bits else ""]
    return ", ".join(filter(None, words)) or shown(value)
