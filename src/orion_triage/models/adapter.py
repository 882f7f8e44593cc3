"""LoRA adapters: the modules that a target name matches, and attaching a finished adapter to a base."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, assert_never
from warnings import catch_warnings, filterwarnings

from orion_triage.errors import OrionError
from orion_triage.models.family import Family, family_of_model
from orion_triage.models.load import base_name, fingerprint
from orion_triage.safe.reading import read_object, refuse_lfs_pointers, shown

if TYPE_CHECKING:
    import torch

_LARGEST_NUMBER = 1e6  # in an adapter's settings

WEIGHTS_FILE = "adapter_model.safetensors"
BASE_FILE = "base.json"  # beside an adapter: the base and the frame size that it was trained with

Census = dict[str, dict[str, int]]  # matched modules: {target name: {tower: count}}


def tower_of(module: str, family: Family) -> str | None:
    """ "text", "vision" or "projector"; None for a module outside them (the tied head)."""
    return next((tower for part, tower in family.TOWERS.items() if part in module.split(".")), None)


def _count(names: Sequence[str], modules: Sequence[str], family: Family) -> tuple[dict[str, str], Census]:
    matched: dict[str, str] = {}
    census: Census = {}
    for name in names:
        suffixes = tuple("." + end for end in family.TARGETS.get(name, (name,)))
        census[name] = dict.fromkeys(family.TOWERS.values(), 0)
        for module in modules:
            if module.endswith(suffixes) and (tower := tower_of(module, family)):
                matched[module] = name
                census[name][tower] += 1
    return matched, census


Scope = Literal["attention", "language-attention", "language-all"]


def resolve_targets(model: Any, names: Sequence[str], scope: Scope = "attention") -> tuple[list[str], Census]:
    """The full names of the linear modules that `names` match within `scope`, and {name: {tower: count}}.

    A name is a module's last component or a dotted suffix ("conv.in_proj"); `o_proj` is the attention output, whatever
    the family calls it. The scopes that start with "language" exclude the vision tower and the projector; see
    FineTuneSettings.
    Raises OrionError if a name matches nothing: the adapter would silently omit it.
    """
    from torch import nn

    family = family_of_model(model)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    match scope:
        case "attention":
            pass
        case "language-attention":
            linear = [name for name in linear if tower_of(name, family) == "text"]
        case "language-all":
            linear = [name for name in linear if tower_of(name, family) == "text"]
            names = [*names, *family.LANGUAGE_LAYERS]
        case _:
            assert_never(scope)
    matched, census = _count(names, linear, family)
    idle = [name for name, towers in census.items() if not any(towers.values())]
    if idle or not names:
        ends = sorted({".".join(name.split(".")[-2:]) for name in linear if tower_of(name, family)})
        raise OrionError(
            f"fine_tune.target_modules: {', '.join(idle) or 'an empty list'} matches no module of the model.",
            f"Use suffixes of its linear modules: {', '.join(ends)}.",
        )
    return sorted(matched), census


def adapter_census(names: Sequence[str] | None, tensors: Mapping[str, Any], family: Family) -> tuple[Census, list[str]]:
    """The matched modules {name: {tower: count}} of a finished adapter, and a warning per target without a tensor.

    `names` are adapter_config.json's target_modules; a full module name counts as its last two components. None: they
    are a pattern, so the modules that have tensors are counted by their own names, and none can be missed.
    `tensors` is the adapter's state by key.
    """
    modules = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    asked = modules if names is None else names
    asked = sorted({".".join(name.split(".")[-2:]) if tower_of(name, family) else name for name in asked})
    _, census = _count(asked, modules, family)
    warnings = [
        f"the adapter's target {name!r} has no tensors: it is listed in target_modules but was not trained"
        for name, towers in census.items()
        if names is not None and not any(towers.values())
    ]
    return census, warnings


def read_adapter(adapter: Path) -> "dict[str, torch.Tensor]":
    """The adapter's tensors by key; raises OrionError unless it is a plain LoRA in SafeTensors with finite values."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = adapter / WEIGHTS_FILE
    refuse_lfs_pointers(adapter)
    if not (adapter / "adapter_config.json").is_file() or not path.is_file():
        strange = {"adapter_model.bin": "can run code when opened", "adapters.safetensors": "is MLX's form"}
        found = "".join(f"; {name} {what}" for name, what in strange.items() if (adapter / name).is_file())
        raise OrionError(
            f"{adapter} must contain adapter_config.json and adapter_model.safetensors{found}.",
            "Run 'orion fine-tune', or pass the folder of an adapter.",
        )
    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise OrionError(f"{path} is damaged: {error}.", "Fetch it again.") from None
    for key, tensor in tensors.items():
        if not key.endswith((".lora_A.weight", ".lora_B.weight")):
            raise OrionError(f"{path}: {shown(key)} is not a LoRA matrix.", "Use a plain LoRA adapter.")
        if (
            tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
            or tensor.ndim != 2
            or not tensor.numel()
        ):
            raise OrionError(
                f"{path}: {key} is {tensor.dtype} of shape {tuple(tensor.shape)}, not a matrix of floats.",
                "Use a plain LoRA adapter.",
            )
        if not bool(torch.isfinite(tensor).all()):
            raise OrionError(f"{path}: {key} has values that are not finite.", "Fine-tune again.")
    if not tensors:
        raise OrionError(f"{path} has no tensors.", "Fine-tune again.")
    return tensors


# Keys of adapter_config.json without effect on the merged weights: origin, training and initialization.
_WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules", "inference_mode",
    "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core",
    "peft_version", "qalora_group_size", "revision", "runtime_config",
}  # fmt: skip
_PLAIN_NAME = re.compile(r"\^?[\w.]{1,200}")


@dataclass(frozen=True)
class _Arithmetic:
    """The values of adapter_config.json that determine the merged weights.

    `asked` are the target names; None if they are one text: a regular expression, as Unsloth writes it, or PEFT's
    "all-linear". It is not evaluated, because some expressions never finish.
    """

    rank: int
    alpha: float
    alpha_pattern: dict[str, float]
    by_root_of_rank: bool
    ranks_differ: bool
    task: str | None
    asked: list[str] | None


def _read_config(adapter: Path) -> _Arithmetic:
    """Read adapter_config.json without PEFT, because its options can name modules to import and regular expressions.

    Raises OrionError for every option that is not plain LoRA.
    """
    from peft import LoraConfig

    path = adapter / "adapter_config.json"
    config = read_object(path)
    plain = LoraConfig().to_dict()
    supported = {
        "peft_type": config.get("peft_type") == "LORA",
        "task_type": config.get("task_type") in (None, "CAUSAL_LM"),
        "r": _is_number(config.get("r")) and isinstance(config["r"], int) and config["r"] > 0,
        "lora_alpha": _is_number(config.get("lora_alpha")),
        "use_rslora": isinstance(config.get("use_rslora", False), bool),
        "rank_pattern": isinstance(config.get("rank_pattern") or {}, dict),
        "alpha_pattern": _is_pattern(config.get("alpha_pattern") or {}),
        "target_modules": _is_names(config.get("target_modules")),
        # Other initializations also change the base.
        "init_lora_weights": config.get("init_lora_weights") in (None, True, False, "gaussian", "eva"),
    }
    wrong = [name for name, good in supported.items() if not good]
    wrong += [
        name
        for name, value in config.items()
        if name not in supported and name not in _WITHOUT_EFFECT and value and value != plain.get(name)
    ]
    if wrong:
        value = f" ({shown(config[wrong[0]])})" if wrong[0] in config else ""
        raise OrionError(
            f"{path}: {shown(wrong[0])}{value} is not an option of plain LoRA.", "Use a plain LoRA adapter."
        )
    names = config.get("target_modules") or ()
    return _Arithmetic(
        config["r"],
        config["lora_alpha"],
        config.get("alpha_pattern") or {},
        config.get("use_rslora", False),
        bool(config.get("rank_pattern")),
        config.get("task_type"),
        None if isinstance(names, str) else sorted(names),
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _LARGEST_NUMBER


def _is_pattern(value: Any) -> bool:
    """Whether keys are plain module names: PEFT matches them as regular expressions, some of which never finish."""
    return isinstance(value, dict) and all(_PLAIN_NAME.fullmatch(k) and _is_number(v) for k, v in value.items())


def _is_names(value: Any) -> bool:
    return (
        value is None or isinstance(value, str) or (isinstance(value, list) and all(isinstance(v, str) for v in value))
    )


def check_base(base: Path, adapter: Path, frame_size: int) -> list[str]:
    """Warnings about the adapter's origin; raises OrionError if it was trained on another base or frame size."""
    path = adapter / BASE_FILE
    try:
        made_from = read_object(path)
        sha256, trained_size = made_from["sha256"], made_from["frame_size"]
    except FileNotFoundError:
        return [f"{adapter} has no {BASE_FILE}: only the shapes were compared with {base_name(base)}"]
    except KeyError as error:
        raise OrionError(f"{path} is damaged: {error!r}.", "Fine-tune again.") from None
    if sha256 != fingerprint(base):
        raise OrionError(
            f"{adapter} is an adapter of another base ({made_from.get('name')}, weights {str(sha256)[:12]}), "
            f"not of {base_name(base)}.",
            "Use the base that it was trained on, or fine-tune again on this one.",
        )
    if trained_size != frame_size:
        raise OrionError(
            f"{adapter} was trained on frames of {trained_size} px; base.frame_size is {frame_size}.",
            f"Set base.frame_size={trained_size}, or fine-tune again.",
        )
    return []


def attach_adapter(model: Any, adapter: Path, tensors: "dict[str, torch.Tensor]") -> tuple[Any, Census, list[str]]:
    """The model with the adapter attached, its matched modules, and a warning per target without a tensor.

    Modules are found by the tensors' keys, not by name patterns, so every tensor is used. All names that the family's
    modules have had are accepted. Raises OrionError if a tensor does not fit.
    """
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    arithmetic, family = _read_config(adapter), family_of_model(model)
    linear = {name: module for name, module in model.named_modules() if hasattr(module, "in_features")}
    called = {family.plain_name(name): name for name in linear}
    state: dict[str, torch.Tensor] = {}
    targets: set[str] = set()
    ranks: dict[str, int] = {}
    for key, tensor in tensors.items():
        # A compiled model's modules have one more word in their names.
        asked_module, matrix, _ = key.replace("_orig_mod.", "").removeprefix("base_model.model.").rsplit(".", 2)
        module = called.get(family.plain_name(asked_module))
        if module is None:
            raise OrionError(
                f"the adapter's {shown(key)} matches no module of the base.", "Use the base that it was trained on."
            )
        is_a = matrix == "lora_A"
        rank = ranks.setdefault(module, tensor.shape[0 if is_a else -1]) if arithmetic.ranks_differ else arithmetic.rank
        wanted = (rank, linear[module].in_features) if is_a else (linear[module].out_features, rank)
        if tuple(tensor.shape) != wanted:
            raise OrionError(
                f"the adapter's {key} has shape {tuple(tensor.shape)}; the base's module needs {wanted}.",
                "Use the base that it was trained on.",
            )
        own_key = f"base_model.model.{module}.{matrix}.weight"
        if own_key in state:
            raise OrionError(f"the adapter has two tensors for {own_key}; the second is {key}.", "Fetch it again.")
        targets.add(module)
        state[own_key] = tensor
    config = LoraConfig(
        task_type=arithmetic.task,
        r=arithmetic.rank,
        lora_alpha=arithmetic.alpha,
        use_rslora=arithmetic.by_root_of_rank,
        rank_pattern={re.escape(module): rank for module, rank in ranks.items()},
        alpha_pattern=arithmetic.alpha_pattern,
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
            f"the adapter does not fit the base: {(*loaded.unexpected_keys, *missing)[0]} has no counterpart.",
            "Fine-tune again.",
        )
    census, warnings = adapter_census(arithmetic.asked, state, family)
    return adapted.eval(), census, warnings


def load_weights(adapted: Any, adapter: Path, tensors: "dict[str, torch.Tensor]") -> None:
    """Set the LoRA matrices of a model to be trained to those of a finished adapter, to continue its training.

    Raises OrionError that names what differs: rank, scale, or the modules.
    """
    from peft import set_peft_model_state_dict
    from peft.utils import get_peft_model_state_dict

    arithmetic = _read_config(adapter)
    family, own = family_of_model(adapted), adapted.peft_config["default"]

    def plain(key: str) -> str:
        return family.plain_name(key.replace("_orig_mod.", "").removeprefix("base_model.model."))

    called = {plain(key): key for key in get_peft_model_state_dict(adapted)}
    state = {called.get(plain(key), key): tensor for key, tensor in tensors.items()}
    settings = {"rank": (arithmetic.rank, own.r), "alpha": (arithmetic.alpha, own.lora_alpha)}
    wrong = [f"fine_tune.{name} is {now}, and {was:g} there" for name, (was, now) in settings.items() if was != now]
    if arithmetic.by_root_of_rank or arithmetic.ranks_differ or arithmetic.alpha_pattern:
        wrong.append("its modules have ranks or scales of their own")
    here, there = ({key.rsplit(".", 3)[1] for key in keys} for keys in (called.values(), state))
    if state.keys() != set(called.values()):
        more = "" if here != there else ", in other layers"
        wrong.append(f"it is on {', '.join(sorted(there))}, and the settings say {', '.join(sorted(here))}{more}")
    if wrong:
        raise OrionError(
            f"{adapter} cannot be continued: {'; '.join(wrong)}.",
            "Use the settings that it was trained with (--preset, --set), or leave fine_tune.continue_from out.",
        )
    set_peft_model_state_dict(adapted, state)
