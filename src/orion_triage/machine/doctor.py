"""Check whether this machine has what a preset needs, before anything is downloaded or trained."""

import importlib.metadata
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from orion_triage import processes
from orion_triage.errors import OrionError
from orion_triage.llama_cpp.toolchain import existing_tools
from orion_triage.settings import Settings

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
    """In bytes: the largest memory of a stage on a CPU, the disk of a run with its base, the GPU's memory."""

    memory: int
    disk: int
    gpu_memory: int | None


# 1.6B: the mission document's table. 450M: scaled by its weights. Small presets run on a laptop's CPU.
_NEEDS = {"lfm2.5-vl-1.6b": Needs(8 * GB, 11 * GB, 8 * GB), "lfm2.5-vl-450m": Needs(4 * GB, 4 * GB, 4 * GB)}
_SMALL = Needs(3 * GB, 1 * GB, None)


def examine(settings: Settings, folder: Path, *, only_fine_tune: bool = False) -> list[Finding]:
    """The findings of all checks; `folder` is where runs are written, `only_fine_tune` leaves out what follows it."""
    needs = _NEEDS.get(settings.preset, _SMALL)
    return [
        *_gpu(needs), _bitsandbytes(), *_tools(only_fine_tune), _memory(needs), _disk(needs, folder), _base(settings),
        *_environment(),
    ]  # fmt: skip


def _gpu(needs: Needs) -> list[Finding]:
    import torch

    if not torch.cuda.is_available():
        if needs.gpu_memory is None:
            return [Finding("GPU", "ok", "none; this preset does not need one")]
        return [
            Finding(
                "GPU",
                "note",
                "none: training would run in float32 on the CPU, which takes days at this size",
                "Train on a machine with a CUDA GPU. Fusing, quantizing and serving run here.",
            )
        ]
    free, total = torch.cuda.mem_get_info()
    name = f"{torch.cuda.get_device_name()}, {total / GB:.1f} GB, driver for CUDA {torch.version.cuda}"
    if needs.gpu_memory and free < needs.gpu_memory:
        return [
            Finding(
                "GPU", "missing", f"{name}; {free / GB:.1f} GB free of {needs.gpu_memory / GB:.0f} needed",
                "Stop other programs on it, or set fine_tune.scope=language-attention.",
            )
        ]  # fmt: skip
    return [Finding("GPU", "ok", name), _short_convolution()]


def _short_convolution() -> Finding:
    from orion_triage.train.fine_tune import has_fast_convolution

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


def _base(settings: Settings) -> Finding:
    """The location of the base, and whether it can be used as one; nothing is fetched."""
    from orion_triage.models.load import TINY_BASE, check_base, check_config

    model = settings.base.model
    if model == TINY_BASE:
        return Finding("base", "ok", "shipped with the project")
    if (folder := Path(model).expanduser()).is_dir():
        return _usable(f"folder {model}", check_base, folder)
    from huggingface_hub import constants, try_to_load_from_cache

    repository, _, revision = model.partition("@")
    cached = try_to_load_from_cache(repository, "config.json", revision=revision or None)
    if isinstance(cached, str):
        return _usable(f"{model} in the cache", check_config, Path(cached).parent)
    size = "3.2 GB" if settings.preset == "lfm2.5-vl-1.6b" else "its weights"
    return Finding(
        "base", "note", f"{model} is not in the cache", f"The first run fetches {size} from {constants.ENDPOINT}."
    )


def _usable(found: str, check: Callable[[Path], None], folder: Path) -> Finding:
    try:
        check(folder)
    except OrionError as error:
        return Finding("base", "missing", error.message, error.fix)
    return Finding("base", "ok", found)
