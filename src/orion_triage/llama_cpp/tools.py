"""Run llama.cpp's tools and measure the seconds and memory that they take."""

import os
import re
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


def quantize_file(
    toolchain: Toolchain, source: Path, target: Path, kind: str, importance: Path | None = None
) -> ToolUse:
    """Quantize an F16 GGUF with llama-quantize, with an importance matrix if there is one (see export/calibrate.py).

    Raises OrionError for a tensor that was quantized without its entry: llama-quantize only mentions it.
    """
    files = [str(source.resolve()), str(target.resolve()), kind]
    # The name of the matrix's file goes into the header of the target: without this machine's folders.
    options, folder = (["--imatrix", importance.name], importance.parent) if importance else ([], None)
    command = [str(toolchain.llama_quantize.resolve()), *options, *files]
    printed, use = _run(command, target, "llama-quantize", folder)
    if importance and (left_out := _LEFT_OUT.search(printed)):
        target.unlink()
        raise OrionError(
            f"llama-quantize did not use the importance matrix {importance} for every tensor: {left_out[0]}.",
            "Run 'orion quantize --force' to measure it again.",
        )
    return use


_LEFT_OUT = re.compile(r"did not find weights for \S+|imatrix size \d+ is different from tensor size \d+ for \S+")


def run_tool(command: list[str], target: Path, name: str) -> ToolUse:
    """Run a tool that writes the file `target`; raises OrionError with its last lines if it fails."""
    return _run(command, target, name)[1]


def _run(command: list[str], target: Path, name: str, folder: Path | None = None) -> tuple[str, ToolUse]:
    environment = children.environment(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        status, use = run_measured(command, environment, output, folder)
        output.seek(0)
        printed = output.read().strip()
        if status or not target.exists():
            if trouble := _disk_trouble(printed, target):
                raise OrionError(f"{name} could not write {target}: {trouble}.", DISK_FIX)
            last = " | ".join(printed.splitlines()[-4:])
            raise OrionError(f"{name} failed (exit status {status}): {last}.", "Read docs/quantization.md.")
    return printed, use


def _disk_trouble(printed: str, target: Path) -> str:
    """The disk error in a failed tool's output, or of a test write; empty if the disks work.

    The output alone is not enough: on a full disk of temporary files, the converter's traceback is lost.
    """
    return words_of_disk(printed) or refusal_of_disk(target.parent) or refusal_of_disk(Path(tempfile.gettempdir()))


def run_measured(
    command: list[str], environment: dict[str, str], output: IO[str], folder: Path | None = None
) -> tuple[int, ToolUse]:
    """Run a program in `folder` with its output in a file; returns its exit status and the cost of it and its children.

    The program ends with this process.
    """
    began = time.monotonic()
    # No input: if the converter's libraries ask whether code of a model's folder may run, they get no answer.
    process = subprocess.Popen(
        tied(command), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=folder
    )
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        process.kill()
        process.wait()
        raise
    process.returncode = os.waitstatus_to_exitcode(status)  # wait4 has reaped the process before subprocess could
    return process.returncode, ToolUse(time.monotonic() - began, usage.ru_maxrss * 1024)
