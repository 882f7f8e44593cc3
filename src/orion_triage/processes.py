"""Several processes of one command (accelerate launch, torchrun): rank, number of processes, barrier, device.

Also the variables that change the numbers of torch, CUDA and accelerate: recorded, taken out or refused.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from orion_triage.errors import OrionError

# Each changes results, by rounding (threads, instruction sets) or by more (TF32 has 10 bits of mantissa); all have
# their uses, so a stage's manifest records those that are set.
RECORDED = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA",
    "ONEDNN_DEFAULT_FPMATH_MODE", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "OPENBLAS_CORETYPE", "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG", "CUDA_VISIBLE_DEVICES", "BNB_CUDA_VERSION",
    "ORION_CPU_FEATURES", "ORION_LLAMA_CPP", "WORLD_SIZE",
)  # fmt: skip
# accelerate lets them override what a training does not set: float32 becomes bfloat16 without a word. `accelerate
# launch` sets them too, from its own configuration; the settings of the run decide instead.
_TAKEN_OUT = ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_DYNAMO_BACKEND")
# Other ways to share out a model, under which nothing here was ever tried.
_REFUSED = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM", "ACCELERATE_USE_PARALLELISM_CONFIG")


def recorded_environment() -> dict[str, str]:
    """The variables of RECORDED that are set."""
    return {name: os.environ[name] for name in RECORDED if name in os.environ}


def settle_environment() -> None:
    """Take out variables that would override settings; raises OrionError for those that cannot be followed."""
    for name in _TAKEN_OUT:
        os.environ.pop(name, None)
    for name in _REFUSED:
        if os.environ.get(name, "").lower() in ("1", "true", "yes", "on", "y", "t"):
            raise OrionError(f"{name}={os.environ[name]}: this way to train is not supported.", f"Unset {name}.")


def count() -> int:
    """Number of processes that run this command together; 1 without a launcher."""
    return _number("WORLD_SIZE", 1)


def rank() -> int:
    return _number("RANK", 0)


def on_this_machine() -> int:
    """Number of the processes that run here."""
    return _number("LOCAL_WORLD_SIZE", count())


def _number(name: str, default: int) -> int:
    """A launcher's variable; raises OrionError if it is no number."""
    text = os.environ.get(name) or str(default)
    if not (text.isascii() and text.isdigit()):
        raise OrionError(f"{name}={text} is not a number of processes.", f"Unset {name}, or start with a launcher.")
    return int(text)


def is_main() -> bool:
    """Whether this is rank 0, the process that writes files and prints."""
    return rank() == 0


def require_launcher() -> None:
    """Raise OrionError if a launcher's variables do not say which of how many processes this is."""
    if rank() >= count() or on_this_machine() > count():
        raise OrionError(
            f"RANK={rank()}, WORLD_SIZE={count()} and LOCAL_WORLD_SIZE={on_this_machine()} do not belong together.",
            "Unset them, or start with a launcher (docs/training.md, More than one GPU).",
        )


# For libgomp, which torch has on Linux, the second takes precedence over the first, which other runtimes follow.
_WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "2000"}


def wait_briefly() -> None:
    """Let torch's threads sleep when they have waited for each other for a moment, unless the environment says how.

    By default they spin for long and take the core from other programs. A training step of the shipped base on two
    cores (medians of three and five runs, 2026-11-30) took 0.97 s alone and 3.0 s with one core busy; if threads sleep
    at once, 1.12 and 1.65 s; with 2,000 turns of the loop before, 1.00 and 1.87 s. Call it before torch is imported.
    Results do not depend on it.
    """
    if not {*_WAITING, "KMP_BLOCKTIME"} & os.environ.keys():
        os.environ |= _WAITING


def local_device() -> str:
    """The torch device of this process: its GPU, or the CPU.

    Raises OrionError if more processes were started here than there are GPUs.
    """
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    number, gpus = _number("LOCAL_RANK", 0), torch.cuda.device_count()
    if number >= gpus:
        raise OrionError(
            f"process {number} of this machine has no GPU: {gpus} can be used here.",
            f"Start at most {gpus} processes on this machine (num_processes in the configuration of accelerate).",
        )
    return f"cuda:{number}"


def are_sharded() -> bool:
    """Whether the launcher configured FSDP: each process then holds a part of every weight."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


# What gloo and NCCL say when the process at the other end is gone.
_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "remote process exited", "Broken pipe")


@contextmanager
def naming_lost_peer() -> Iterator[None]:
    """Turn torch's error for a process that has ended into an OrionError."""
    try:
        yield
    except RuntimeError as error:
        if count() == 1 or not any(words in str(error) for words in _LOST_PEER):
            raise
        raise OrionError(
            f"another process of this command has ended ({str(error).strip().splitlines()[0]}).",
            "Its own error says why. Start all processes again: they resume from what is complete.",
        ) from None


def wait() -> None:
    """Barrier: return when every process has called it."""
    if count() > 1:
        import torch
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available()).wait_for_everyone()
