"""Check whether this machine has what a run's settings need, before anything is downloaded or trained."""

import importlib.metadata
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from orion_triage import hub, processes
from orion_triage.errors import OrionError
from orion_triage.llama_cpp.toolchain import existing_tools
from orion_triage.models.lfm2_vl_shapes import PUBLISHED
from orion_triage.settings import Settings
from orion_triage.train.checkpoints import CHECKPOINT_SHARE
from orion_triage.train.device import (
    choose_device,
    driver_version,
    gpu_fault,
    in_millions,
    needs_gpu,
    takes_days_on_cpu,
)

State = Literal["ok", "note", "missing"]
GB = 1_000_000_000


@dataclass(frozen=True)
class Finding:
    """The result of one check; `fix` states what to do if it is not "ok"."""

    what: str
    state: State
    found: str
    fix: str = ""


@dataclass(frozen=True)
class Needs:
    """In bytes: the largest memory of a stage on a CPU, the disk of a run with its base, the GPU's memory if needed."""

    memory: int
    disk: int
    gpu_memory: int | None


_MISSION = PUBLISHED["LiquidAI/LFM2.5-VL-1.6B"]  # parameters of the model of the mission document's limits
_LAYERS_SHARE = 0.65  # of a base's parameters are in the language model's layers, which NF4 stores in 0.55 bytes each
# What one more record in a micro batch keeps for the backward pass at the 1.6B's shapes and 512 pixels, in values:
# every activation (counted with torch's saved_tensors_hooks: 3.7 GB in float32), or the layers' inputs and one layer.
_VALUES_OF_A_RECORD, _VALUES_WITH_CHECKPOINTING = 3.7e9 / 4, 0.3e9 / 4


def needs_of(settings: Settings, parameters: int | None) -> Needs:
    """What a run with these settings needs, for a base of so many parameters (None: unknown, taken as the mission's).

    From the mission document's limits for the 1.6B in 4 bits at 512 pixels (8 GB of memory, 8 GB on the GPU, 11 GB of
    disk for 3 epochs): the weights are counted, and the rest grows with parameters, pixels, records at a time and the
    bytes of a value. Nothing was measured on a GPU. On a CPU, in float32, a training of these shapes took 10.2 GB. The
    limits are those of one record at a time with checkpointing.
    """
    tuning, count = settings.fine_tune, parameters or _MISSION
    share = count / _MISSION
    pixels = (settings.base.frame_size / 512) ** 2
    more = _VALUES_WITH_CHECKPOINTING * (tuning.micro_batch_size - 1)
    if not tuning.gradient_checkpointing:
        more = _VALUES_OF_A_RECORD * tuning.micro_batch_size
    width = 4 if tuning.precision == "float32" else 2  # bytes of a value
    layers = 0.55 if tuning.base_weights == "nf4" else width
    rest = ((8 * GB - _MISSION * _bytes_per_parameter(0.55, 2)) * width / 2 + more * width) * share * pixels
    gpu = max(count * _bytes_per_parameter(layers, width) + rest, 2.0 * count)  # 16 bits once, for the preflight
    memory = 2.5 * GB + 5.5 * GB * share
    if tuning.device == "cpu":
        memory = max(memory, 4.0 * count + (3.8 * GB + more * 4) * share * pixels)
    checkpoints = max(0, tuning.epochs - 3) * CHECKPOINT_SHARE * 2 * count
    return Needs(
        memory=int(memory),
        disk=int(1 * GB + 10 * GB * share + checkpoints),
        gpu_memory=int(gpu) if needs_gpu(tuning, parameters) else None,
    )


def _bytes_per_parameter(of_layers: float, of_others: float) -> float:
    return _LAYERS_SHARE * of_layers + (1 - _LAYERS_SHARE) * of_others


def examine(settings: Settings, folder: Path, *, only_fine_tune: bool = False) -> list[Finding]:
    """The findings of all checks; `folder` is where runs are written, `only_fine_tune` leaves out what follows it."""
    parameters = _parameters(settings)
    needs = needs_of(settings, parameters)
    return [
        *_gpu(settings, parameters, needs), _bitsandbytes(), *_tools(only_fine_tune), _memory(needs),
        _disk(needs, folder), _base(settings), *_environment(),
    ]  # fmt: skip


def _gpu(settings: Settings, parameters: int | None, needs: Needs) -> list[Finding]:
    import torch

    tuning = settings.fine_tune
    if tuning.device == "cpu":
        found = "not used: fine_tune.device=cpu"
        if not takes_days_on_cpu(parameters):
            return [Finding("GPU", "ok", found)]
        return [
            Finding("GPU", "note", f"{found}, which takes days at this size", "Train on a machine with a CUDA GPU.")
        ]
    if fault := gpu_fault():
        if not needs_gpu(tuning, parameters):
            return [Finding("GPU", "ok", f"not needed for a base of {in_millions(parameters)}; {fault[0]}")]
        return [
            Finding(
                "GPU", "missing",
                f"needed to train a base of {in_millions(parameters)}, and none is usable: {fault[0]}",
                f"{fault[1]} Fusing, quantizing and serving run without one.",
            )
        ]  # fmt: skip
    device = choose_device(tuning, parameters)
    free, total = torch.cuda.mem_get_info(device.name)
    driver = driver_version()
    name = f"{torch.cuda.get_device_name(device.name)}, {total / GB:.1f} GB, {f'driver {driver}, ' if driver else ''}"
    name += f"CUDA {torch.version.cuda}, trains in {device.precision}"
    findings = [Finding("training", "note", note) for note in device.notes]  # with what to do
    if needs.gpu_memory and free < needs.gpu_memory:
        return [
            Finding(
                "GPU", "missing", f"{name}; {free / GB:.1f} GB free of about {needs.gpu_memory / GB:.0f} needed",
                "Stop other programs on it, or set fine_tune.scope=language-attention, fine_tune.base_weights=nf4 or a "
                "smaller base.frame_size.",
            ),
            *findings,
        ]  # fmt: skip
    return [Finding("GPU", "ok", name), *findings, _short_convolution()]


def _short_convolution() -> Finding:
    from orion_triage.models.lfm2_vl import has_fast_convolution

    if has_fast_convolution():
        return Finding("causal-conv1d", "ok", "installed: the language model's short convolutions use it")
    return Finding(
        "causal-conv1d", "note", "not installed: short convolutions run in PyTorch, with the same results",
        "For speed, run pip install --no-build-isolation causal-conv1d (compiles; needs nvcc).",
    )  # fmt: skip


def _bitsandbytes() -> Finding:
    """Quantize to 4 bits and back on the device that would train."""
    import torch

    from orion_triage.models.load import hush_kernel_advice

    hush_kernel_advice()
    version = importlib.metadata.version("bitsandbytes")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        values = torch.linspace(-1, 1, 4096, device=device).reshape(64, 64)
        again = dequantize_4bit(*quantize_4bit(values, quant_type="nf4"))
        error = float((again - values).abs().max())
    except Exception as problem:
        return Finding(
            "bitsandbytes", "missing", f"{version} fails on {device}: {problem}", "Run pip install -U bitsandbytes"
        )
    return Finding("bitsandbytes", "ok" if error < 0.2 else "missing", f"{version}, NF4 on {device}")


def _tools(only_fine_tune: bool) -> list[Finding]:
    tools = existing_tools()
    if tools:
        return [Finding("llama.cpp", "ok", f"build {tools.build} ({tools.origin})")]
    compiler = shutil.which(os.environ.get("CXX") or "c++")
    found = "not built yet" + ("" if compiler else ", and no C++ compiler was found")
    fix = "Run orion toolchain" if compiler else "Run apt install g++ make, then orion toolchain"
    if only_fine_tune:
        return [Finding("llama.cpp", "note", f"{found}; not needed for fine-tuning", fix)]
    return [Finding("llama.cpp", "note" if compiler else "missing", found, fix)]


def _memory(needs: Needs) -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = f"{total / GB:.1f} GB, {needs.memory / GB:.0f} needed"
    return Finding("memory", "ok" if total >= needs.memory else "missing", found, "Use a machine with more memory.")


def _disk(needs: Needs, folder: Path) -> Finding:
    existing = folder.resolve()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    found = f"{free / GB:.1f} GB free in {existing}, {needs.disk / GB:.0f} needed"
    return Finding("disk", "ok" if free >= needs.disk else "missing", found, "Free some space, or use --run elsewhere.")


def _environment() -> list[Finding]:
    """The variables that change numbers; each is also recorded in the manifests of the stages."""
    found = [f"{name}={value}" for name, value in processes.recorded_environment().items()]
    if not found:
        return []
    fix = "Unset those that you did not set on purpose (docs/environment.md)."
    return [Finding("environment", "note", f"set, and may change results: {', '.join(found)}", fix)]


def _parameters(settings: Settings) -> int | None:
    """The number of the base's parameters; None if it is not here and not a published one. Nothing is fetched."""
    from orion_triage.models.checkpoint import count_parameters
    from orion_triage.models.load import TINY_BASE, TINY_BASE_FOLDER

    model = settings.base.model
    folder = TINY_BASE_FOLDER if model == TINY_BASE else Path(model).expanduser()
    if not folder.is_dir():
        if published := PUBLISHED.get(model.partition("@")[0]):
            return published
        if (cached := _cached_config(model)) is None:
            return None
        folder = cached.parent
    try:
        return count_parameters(folder) or None
    except Exception:  # a damaged file, which `_base` reports
        return None


def _base(settings: Settings) -> Finding:
    """The location of the base, and whether it can be used as one; nothing is fetched."""
    from orion_triage.models.load import TINY_BASE, check_base, check_config

    model = settings.base.model
    if model == TINY_BASE:
        return Finding("base", "ok", "shipped with the project")
    if (folder := Path(model).expanduser()).is_dir():
        return _usable(f"folder {model}", check_base, folder)
    if not hub.is_id(model):
        return Finding(
            "base", "missing", f"{model} is neither a folder on this machine nor a Hub id",
            "Set base.model to a folder that is here, or to owner/name or owner/name@revision.",
        )  # fmt: skip
    from huggingface_hub import constants

    if cached := _cached_config(model):
        return _usable(f"{model} in the cache", check_config, cached.parent)
    published = PUBLISHED.get(model.partition("@")[0])
    size = f"{2 * published / GB:.1f} GB" if published else "its weights"
    as_mission = "" if published else f"; its size is not known, and taken as {in_millions(_MISSION)}"
    return Finding(
        "base", "note", f"{model} is not in the cache{as_mission}",
        f"The first run fetches {size} from {constants.ENDPOINT}.",
    )  # fmt: skip


def _cached_config(model: str) -> Path | None:
    """config.json of a Hub id in the user's cache, if it is there."""
    from huggingface_hub import try_to_load_from_cache

    if not hub.is_id(model):
        return None
    repository, _, revision = model.partition("@")
    cached = try_to_load_from_cache(repository, "config.json", revision=revision or None)
    return Path(cached) if isinstance(cached, str) else None


def _usable(found: str, check: Callable[[Path], object], folder: Path) -> Finding:
    try:
        check(folder)
    except OrionError as error:
        return Finding("base", "missing", error.message, error.fix)
    return Finding("base", "ok", found)
