"""The machine that measurements belong to: processor, cores and memory, without a host name or a date."""

import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any


def describe() -> dict[str, Any]:
    """`processor`, the `cores` that this process may use, and `memory_bytes`."""
    name = platform.processor() or platform.machine()
    with suppress(OSError, StopIteration):  # a Pi has its name in "Model", a PC its processor in "model name"
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model")))
    return {
        "processor": name,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def kind_of_processor() -> str:
    """avx512 or avx2 (the two kinds that were seen), else the machine's architecture."""
    with suppress(OSError):
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
        if kind := "avx512" if "avx512f" in flags else "avx2" if "avx2" in flags else "":
            return kind
    return platform.machine()


def machine_name() -> str:
    """One line for the machines whose seconds can be compared: "AMD EPYC, avx2, 2 cores, 25 GB".

    With the instruction set, because rented machines hide the processor's model, and with NVIDIA's GPUs.
    """
    found = describe()
    words = [
        found["processor"],
        kind_of_processor(),
        f"{found['cores']} cores",
        f"{found['memory_bytes'] / 1e9:.0f} GB",
    ]
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        with suppress(OSError):
            lines = path.read_text(encoding="utf-8").splitlines()
            words += [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")]
    return ", ".join(words)
