"""Run llama.cpp's tools and measure the seconds and memory that they take."""

import os
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from orion_triage.errors import DISK_FIX, OrionError, words_of_disk
from orion_triage.llama_cpp.toolchain import Toolchain
from orion_triage.safe import children
from orion_triage.safe.children import tied
from orion_triage.safe.files import refusal_of_disk

# --- tools ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ToolUse:
    """Cost of one call of a tool; the peak resident memory includes mapped files."""

    seconds: float
    peak_memory_bytes: int


def quantize_file(toolchain: Toolchain, source: Path, target: Path, kind: str) -> ToolUse:
    """Quantize an F16 GGUF with llama-quantize."""
    return run_tool([str(toolchain.llama_quantize), str(source), str(target), kind], target, "llama-quantize")


def run_tool(command: list[str], target: Path, name: str) -> ToolUse:
    environment = children.environment(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        status, use = run_measured(command, environment, output)
        if status or not target.exists():
            output.seek(0)
            printed = output.read().strip()
            if trouble := _disk_trouble(printed, target):
                raise OrionError(f"{name} could not write {target}: {trouble}.", DISK_FIX)
            last = " | ".join(printed.splitlines()[-4:])
            raise OrionError(f"{name} failed (exit status {status}): {last}.", "Read docs/quantization.md.")
    return use


def _disk_trouble(printed: str, target: Path) -> str:
    """The disk error in a failed tool's output, or of a test write; empty if the disks work.

    The output alone is not enough: on a full disk of temporary files, the converter's traceback is lost.
    """
    return words_of_disk(printed) or refusal_of_disk(target.parent) or refusal_of_disk(Path(tempfile.gettempdir()))


def run_measured(command: list[str], environment: dict[str, str], output: IO[str]) -> tuple[int, ToolUse]:
    """Run a program with its output in a file; returns its exit status and the cost of it and its children.

    The program ends with this process.
    """
    began = time.monotonic()
    # No input: if the converter's libraries ask whether code of a model's folder may run, they get no answer.
    process = subprocess.Popen(
        tied(command), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment
    )
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        process.kill()
        process.wait()
        raise
    process.returncode = os.waitstatus_to_exitcode(status)  # wait4 has reaped the process before subprocess could
    return process.returncode, ToolUse(time.monotonic() - began, usage.ru_maxrss * 1024)
