"""Compile llama.cpp's two tools from the pinned source for one kind of processor.

The folder of a build is named after the processor features that the build uses. If the cache moves to another
processor, that processor gets its own build instead of an illegal instruction.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from orion_triage.errors import OrionError
from orion_triage.progress import Progress
from orion_triage.safe.children import tied
from orion_triage.safe.files import replaced_folder, sha256_of_text, write_text

TOOLS = ("llama-quantize", "llama-server")
COMPILER_HINT = "Install a C++ compiler ('apt install g++ make'), or set ORION_LLAMA_CPP to a folder with a build."
BUILD_BYTES = 300_000_000  # of object files, deleted after the build
LOG = "build.log"

# ggml's option -> the features that /proc/cpuinfo must list for it.
_X86_OPTIONS = {
    "SSE42": ("sse4_2",),
    "AVX": ("avx",),
    "AVX2": ("avx2",),
    "BMI2": ("bmi2",),
    "FMA": ("fma",),
    "F16C": ("f16c",),
    "AVX_VNNI": ("avx_vnni",),
    "AVX512": ("avx512f", "avx512cd", "avx512vl", "avx512dq", "avx512bw"),
    "AVX512_VBMI": ("avx512_vbmi", "avx512vbmi"),
    "AVX512_VNNI": ("avx512_vnni",),
    "AVX512_BF16": ("avx512_bf16",),
    "AMX_TILE": ("amx_tile",),
    "AMX_INT8": ("amx_int8",),
    "AMX_BF16": ("amx_bf16",),
}
_EITHER = {"AVX512_VBMI"}  # the kernel has used two spellings


@dataclass(frozen=True)
class Target:
    """The processor of a build: `name` lists the features that the build uses, `options` are ggml's."""

    name: str
    options: dict[str, str]


def target(features: frozenset[str] | None = None, machine: str = "") -> Target:
    """The build for this processor; `features` and `machine` override what the system reports.

    On x86, every ggml option is set explicitly, so the name lists all features that the build needs. On other
    machines, ggml detects the features (GGML_NATIVE), and the name contains a hash of all features.
    """
    machine = machine or platform.machine()
    features = processor_features() if features is None else features
    if machine not in ("x86_64", "AMD64"):
        return Target(f"{machine}-{sha256_of_text(' '.join(sorted(features)))[:8]}", {"GGML_NATIVE": "ON"})
    used = [
        option
        for option, needed in _X86_OPTIONS.items()
        if (any if option in _EITHER else all)(feature in features for feature in needed)
    ]
    options = {f"GGML_{option}": "ON" if option in used else "OFF" for option in _X86_OPTIONS}
    return Target("-".join(["x86_64", *(option.lower() for option in used)]), {"GGML_NATIVE": "OFF", **options})


def processor_features() -> frozenset[str]:
    """The features of this processor that the system reports, limited to ORION_CPU_FEATURES if it is set.

    The variable gives a build that also runs on an older machine, and that machine's numeric results.
    Raises OrionError if it names a feature that this processor does not have.
    """
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    found = frozenset(match[1].split() if match else ())
    if chosen := os.environ.get("ORION_CPU_FEATURES"):
        named = set(chosen.replace(",", " ").split())
        if unknown := sorted(named - found):
            raise OrionError(
                f"ORION_CPU_FEATURES names {', '.join(unknown)}, which this processor does not have.",
                "Use only features that /proc/cpuinfo lists, or unset the variable.",
            )
        return found & named
    return found


def tools_in(folder: Path) -> tuple[Path, Path] | None:
    """The paths of llama-quantize and llama-server in a folder; None unless both exist and are executable."""
    paths = tuple(folder / name for name in TOOLS)
    return (paths[0], paths[1]) if all(os.access(path, os.X_OK) for path in paths) else None


def build(source: Path, binaries: Path, wanted: Target, number: int, progress: Progress) -> None:
    """Compile into the folder `binaries`; object files of an interrupted build are reused.

    `number` is the build number that the tools will print. The compiler's output goes into build.log beside the
    source. Raises OrionError if a program is missing or the build fails.
    """
    cmake, ninja = _programs()
    log = source.parent / LOG
    folder = source.parent / f"build-{wanted.name}"
    write_text(folder / "source" / "CMakeLists.txt", _cmake_text())
    options = {
        "LLAMA_CPP": str(source),
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_MAKE_PROGRAM": ninja,
        "BUILD_SHARED_LIBS": "OFF",
        "LLAMA_BUILD_NUMBER": str(number),  # the default is that of any git repository around the cache
        "LLAMA_BUILD_COMMIT": "pinned",
        **dict.fromkeys(
            ("LLAMA_CURL", "LLAMA_OPENSSL", "LLAMA_BUILD_TESTS", "LLAMA_BUILD_EXAMPLES", "LLAMA_BUILD_UI"), "OFF"
        ),
        "LLAMA_USE_PREBUILT_UI": "OFF",
        **wanted.options,
    }
    configure = [cmake, "--fresh", "-S", str(folder / "source"), "-B", str(folder), "-G", "Ninja"]
    configure += [f"-D{key}={value}" for key, value in options.items()]
    with log.open("w", encoding="utf-8") as file:
        for command in (configure, [ninja, "-C", str(folder), *TOOLS]):
            process = subprocess.Popen(tied(command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            assert process.stdout is not None
            for line in process.stdout:
                file.write(line)
                file.flush()
                if step := re.match(r"\[(\d+)/(\d+)\]", line):
                    progress("building llama.cpp", int(step[1]), int(step[2]))
            if process.wait():
                last = " | ".join(log.read_text(encoding="utf-8").strip().splitlines()[-3:])
                raise OrionError(f"building llama.cpp failed: {last} (log: {log}).", COMPILER_HINT)
    with replaced_folder(binaries) as new:
        for name in TOOLS:
            shutil.copy2(folder / "bin" / name, new / name)
    shutil.rmtree(folder, ignore_errors=True)


def last_step(folder: Path) -> tuple[int, int]:
    """Progress of the build that writes build.log in `folder`: (files compiled, files in total)."""
    try:
        text = (folder / LOG).read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    steps = re.findall(r"^\[(\d+)/(\d+)\]", text, re.MULTILINE)
    return (int(steps[-1][0]), int(steps[-1][1])) if steps else (0, 1)


def _programs() -> tuple[str, str]:
    """The paths of cmake and ninja, those of the environment first.

    Raises OrionError if one of them or the compiler is missing.
    """
    beside = str(Path(sys.executable).parent)
    cmake, ninja = (shutil.which(name, path=beside) or shutil.which(name) for name in ("cmake", "ninja"))
    name = os.environ.get("CXX") or "c++"
    if shutil.which(name) is None:
        raise OrionError(f"building llama.cpp needs a C++ compiler; {name} was not found.", COMPILER_HINT)
    if not cmake or not ninja:
        raise OrionError("building llama.cpp needs cmake and ninja.", "Run pip install cmake ninja")
    return cmake, ninja


def _cmake_text() -> str:
    return (resources.files("orion_triage.llama_cpp") / "build.cmake").read_text(encoding="utf-8")
