"""Several processes of one command (accelerate launch, torchrun): rank, number of processes, barrier, device."""

import os


def count() -> int:
    """Number of processes that run this command together; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this is rank 0, the process that writes files and prints."""
    return rank() == 0


WAIT_POLICY = "OMP_WAIT_POLICY"


def sleep_while_waiting() -> None:
    """Let torch's threads sleep while they wait for each other, unless the environment sets a wait policy.

    By default they spin and take the core from other programs: with one of two cores busy, a training took 122 s
    with spinning and 72 s with sleeping (alone: 51 s and 53 s). Call it before torch is imported. Results do not
    depend on it.
    """
    if not {WAIT_POLICY, "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
        os.environ[WAIT_POLICY] = "PASSIVE"


def local_device() -> str:
    """The torch device of this process: its GPU, or the CPU."""
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def are_sharded() -> bool:
    """Whether the launcher configured FSDP: each process then holds a part of every weight."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def wait() -> None:
    """Barrier: return when every process has called it."""
    if count() > 1:
        import torch
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available()).wait_for_everyone()
