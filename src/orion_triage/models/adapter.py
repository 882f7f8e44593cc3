"""LoRA adapters: which modules a target name means, and a finished adapter put back on a base."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, assert_never
from warnings import catch_warnings, filterwarnings

from orion_triage.errors import OrionError
from orion_triage.models.checkpoint import plain_name
from orion_triage.safe.reading import read_object, shown

if TYPE_CHECKING:
    import torch

_TOWERS = {"language_model": "text", "vision_tower": "vision", "multi_modal_projector": "projector"}
# LFM2 and SigLIP2 call the attention's output `out_proj`, and so do LFM2's short-conv blocks: the recipe's
# `o_proj` means the first two only.
_MEANING = {"o_proj": "self_attn.out_proj"}

# What the scope "language-all" adds to the attention's names.
_LANGUAGE_LAYERS = ("conv.in_proj", "conv.out_proj", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")

_LARGEST_NUMBER = 1e6  # of an adapter's settings

BASE_FILE = "base.json"  # beside an adapter: which base it was trained on, and at which frame size

Census = dict[str, dict[str, int]]


def tower_of(module: str) -> str | None:
    """text, vision or projector; None outside them (the tied head)."""
    return next((tower for part, tower in _TOWERS.items() if part in module.split(".")), None)


def _count(names: Sequence[str], modules: Sequence[str]) -> tuple[dict[str, str], Census]:
    matched: dict[str, str] = {}
    census: Census = {}
    for name in names:
        suffix = "." + _MEANING.get(name, name)
        census[name] = dict.fromkeys(_TOWERS.values(), 0)
        for module in modules:
            if module.endswith(suffix) and (tower := tower_of(module)):
                matched[module] = name
                census[name][tower] += 1
    return matched, census


Scope = Literal["attention", "language-attention", "language-all"]


def resolve_targets(model: Any, names: Sequence[str], scope: Scope = "attention") -> tuple[list[str], Census]:
    """The full names of the linear modules that `names` mean within `scope`, and {name: {tower: count}}.

    A name is a module's last component or a dotted end ("conv.in_proj"); `o_proj` is the attention's output. The
    scopes that start with "language" leave vision tower and projector alone; see FineTuneSettings.
    Raises OrionError when any name matches nothing: an adapter would silently leave it out.
    """
    from torch import nn

    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    match scope:
        case "attention":
            pass
        case "language-attention":
            linear = [name for name in linear if tower_of(name) == "text"]
        case "language-all":
            linear = [name for name in linear if tower_of(name) == "text"]
            names = [*names, *_LANGUAGE_LAYERS]
        case _:
            assert_never(scope)
    matched, census = _count(names, linear)
    idle = [name for name, towers in census.items() if not any(towers.values())]
    if idle or not names:
        ends = sorted({".".join(name.split(".")[-2:]) for name in linear if tower_of(name)})
        raise OrionError(
            f"fine_tune.target_modules: {', '.join(idle) or 'an empty list'} matches no module of the model.",
            f"Its linear modules end in {', '.join(ends)}.",
        )
    return sorted(matched), census


def adapter_census(names: Sequence[str], tensors: Mapping[str, Any]) -> tuple[Census, list[str]]:
    """{name: {tower: count}} of a finished adapter's tensors, and a warning per requested name without any.

    `names` are adapter_config.json's target_modules, where full module names count as their last two parts;
    `tensors` is the adapter's state, by key.
    """
    names = sorted({".".join(name.split(".")[-2:]) if tower_of(name) else name for name in names})
    modules = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    _, census = _count(names, modules)
    warnings = [
        f"the adapter's target {name!r} changed no module: it was asked for and never trained"
        for name, towers in census.items()
        if not any(towers.values())
    ]
    return census, warnings


def read_adapter(adapter: Path) -> "dict[str, torch.Tensor]":
    """The adapter's tensors by key; raises OrionError unless it is a finite, plain LoRA in SafeTensors."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = adapter / "adapter_model.safetensors"
    if not (adapter / "adapter_config.json").is_file() or not path.is_file():
        found = "; adapter_model.bin can run code when opened" if (adapter / "adapter_model.bin").is_file() else ""
        raise OrionError(
            f"{adapter} needs adapter_config.json and adapter_model.safetensors{found}.",
            "Fine-tune with 'orion fine-tune', or pass the right folder.",
        )
    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise OrionError(f"{path} is damaged: {error}.", "Fetch it again.") from None
    for key, tensor in tensors.items():
        if not key.endswith((".lora_A.weight", ".lora_B.weight")):
            raise OrionError(f"{path}: {shown(key)} is no LoRA matrix.", "Only plain LoRA adapters can be merged.")
        if (
            tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
            or tensor.ndim != 2
            or not tensor.numel()
        ):
            raise OrionError(
                f"{path}: {key} is {tensor.dtype} of shape {tuple(tensor.shape)}, no matrix of floats.",
                "Only plain LoRA adapters can be merged.",
            )
        if not bool(torch.isfinite(tensor).all()):
            raise OrionError(f"{path}: {key} has values that are not finite.", "Fine-tune again.")
    if not tensors:
        raise OrionError(f"{path} has no tensors.", "Fine-tune again.")
    return tensors


# What adapter_config.json says beside the arithmetic: where the adapter comes from, how it was trained and begun.
_SAID_ONLY = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules", "inference_mode",
    "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core",
    "peft_version", "qalora_group_size", "revision", "runtime_config",
}  # fmt: skip
_PLAIN_NAME = re.compile(r"\^?[\w.]{1,200}")


@dataclass(frozen=True)
class _Arithmetic:
    """What of adapter_config.json decides what the matrices do; `asked` are the target names, for the census."""

    rank: int
    alpha: float
    alpha_pattern: dict[str, float]
    by_root_of_rank: bool
    ranks_differ: bool
    task: str | None
    asked: list[str]


def _read_config(adapter: Path) -> _Arithmetic:
    """PEFT's own reader is not asked: options of a stranger can name modules to import and regular expressions.

    Raises OrionError for every option by which this would not be plain LoRA.
    """
    from peft import LoraConfig

    path = adapter / "adapter_config.json"
    said = read_object(path)
    plain = LoraConfig().to_dict()
    kept = {
        "peft_type": said.get("peft_type") == "LORA",
        "task_type": said.get("task_type") in (None, "CAUSAL_LM"),
        "r": _is_number(said.get("r")) and isinstance(said["r"], int) and said["r"] > 0,
        "lora_alpha": _is_number(said.get("lora_alpha")),
        "use_rslora": isinstance(said.get("use_rslora", False), bool),
        "rank_pattern": isinstance(said.get("rank_pattern") or {}, dict),
        "alpha_pattern": _is_pattern(said.get("alpha_pattern") or {}),
        "target_modules": _is_names(said.get("target_modules")),
        # Other ways to begin change the base as well.
        "init_lora_weights": said.get("init_lora_weights") in (None, True, False, "gaussian", "eva"),
    }
    wrong = [name for name, good in kept.items() if not good]
    wrong += [
        name
        for name, value in said.items()
        if name not in kept and name not in _SAID_ONLY and value and value != plain.get(name)
    ]
    if wrong:
        value = f" ({shown(said[wrong[0]])})" if wrong[0] in said else ""
        raise OrionError(
            f"{path}: {shown(wrong[0])}{value} is not plain LoRA's.", "Only plain LoRA adapters can be merged."
        )
    names = said.get("target_modules") or ()
    return _Arithmetic(
        said["r"],
        said["lora_alpha"],
        said.get("alpha_pattern") or {},
        said.get("use_rslora", False),
        bool(said.get("rank_pattern")),
        said.get("task_type"),
        [names] if isinstance(names, str) else sorted(names),
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _LARGEST_NUMBER


def _is_pattern(value: Any) -> bool:
    """Module names with numbers; PEFT takes the names for regular expressions, and some of those never end."""
    return isinstance(value, dict) and all(_PLAIN_NAME.fullmatch(k) and _is_number(v) for k, v in value.items())


def _is_names(value: Any) -> bool:
    return (
        value is None or isinstance(value, str) or (isinstance(value, list) and all(isinstance(v, str) for v in value))
    )


def attach_adapter(model: Any, adapter: Path, tensors: "dict[str, torch.Tensor]") -> tuple[Any, Census, list[str]]:
    """The model with the adapter on, its census, and a warning per requested name that changed nothing.

    Modules are taken from the tensors' keys, not from name patterns, so that every tensor lands somewhere.
    transformers dropped `vision_model.` from the tower's module names: both forms are understood.
    """
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    said = _read_config(adapter)
    linear = {name: module for name, module in model.named_modules() if hasattr(module, "in_features")}
    called = {plain_name(name): name for name in linear}
    state: dict[str, torch.Tensor] = {}
    targets: set[str] = set()
    ranks: dict[str, int] = {}
    for key, tensor in tensors.items():
        asked_module, matrix, _ = key.removeprefix("base_model.model.").rsplit(".", 2)
        module = called.get(plain_name(asked_module))
        if module is None:
            raise OrionError(
                f"the adapter's {shown(key)} matches no module of the base.", "Use the base it was trained on."
            )
        is_a = matrix == "lora_A"
        rank = ranks.setdefault(module, tensor.shape[0 if is_a else -1]) if said.ranks_differ else said.rank
        wanted = (rank, linear[module].in_features) if is_a else (linear[module].out_features, rank)
        if tuple(tensor.shape) != wanted:
            raise OrionError(
                f"the adapter's {key} has shape {tuple(tensor.shape)}; the base's module needs {wanted}.",
                "Use the base it was trained on.",
            )
        own_key = f"base_model.model.{module}.{matrix}.weight"
        if own_key in state:
            raise OrionError(f"the adapter has two tensors for {own_key}, {key} the second.", "Fetch it again.")
        targets.add(module)
        state[own_key] = tensor
    config = LoraConfig(
        task_type=said.task,
        r=said.rank,
        lora_alpha=said.alpha,
        use_rslora=said.by_root_of_rank,
        rank_pattern={re.escape(module): rank for module, rank in ranks.items()},
        alpha_pattern=said.alpha_pattern,
        target_modules=targets,
        inference_mode=True,
    )
    with catch_warnings():
        filterwarnings("ignore", message=".*checkpointing.* is deprecated", category=FutureWarning)
        adapted = get_peft_model(model, config)
    loaded = set_peft_model_state_dict(adapted, state)
    missing = [key for key in loaded.missing_keys if ".lora_" in key]
    if loaded.unexpected_keys or missing:
        raise OrionError(
            f"the adapter does not fit: {(*loaded.unexpected_keys, *missing)[0]} has no counterpart.",
            "Fine-tune again.",
        )
    census, warnings = adapter_census(said.asked, state)
    return adapted.eval(), census, warnings
