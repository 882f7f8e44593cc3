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
