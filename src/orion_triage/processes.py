"""Several processes of one command (accelerate launch, torchrun): who writes, and waiting for each other."""

import os


def count() -> int:
    """How many processes work on this command together; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this process is the one that writes and speaks."""
    return rank() == 0


WAIT_POLICY = "OMP_WAIT_POLICY"


def sleep_while_waiting() -> None:
    """Have torch's threads sleep while they wait for each other, unless the environment says how they wait.

    They spin otherwise, which takes the core from whatever else runs: beside one busy core of two, a training took
    122 s instead of 72 s (alone: 51 and 53 s). Must be called before torch is loaded. Results do not depend on it.
    """
    if not {WAIT_POLICY, "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
        os.environ[WAIT_POLICY] = "PASSIVE"


def local_device() -> str:
    """This process's GPU, or the CPU."""
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def are_sharded() -> bool:
    """Whether the launcher asked for FSDP: every process then holds a part of each weight."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def wait() -> None:
    """Return when every process is here."""
    if count() > 1:
        import torch
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available()).wait_for_everyone()
