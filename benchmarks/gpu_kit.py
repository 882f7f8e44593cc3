"""Gather what a bare GPU machine lacks: the Python packages that benchmarks/gpu.py needs beside torch and transformers.

    python benchmarks/gpu_kit.py build/gpu-kit --cuda 130 --python 3.12
    python3 benchmarks/gpu.py --kit build/gpu-kit          # there

A machine for GPU work often has torch, transformers, peft and accelerate, and no package index to install the rest
from. The kit is a folder of packages as this environment has them, with their .dist-info. bitsandbytes, 129 MB with
libraries for every CUDA and ROCm, comes with the library for --cuda (the digits of torch.version.cuda) and the CPU's.
A package that is compiled for this Python and not for --python is downloaded as a wheel of the same version (pip).
"""

import argparse
import importlib.metadata
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

LARGEST_BYTES = 40_000_000
# imagehash's PyWavelets (9 MB) is left out: only whash imports it. datasets is left out: only 'orion dataset push' and
# tests without a GPU use it.
PACKAGES = (
    "bitsandbytes", "pydantic", "pydantic_core", "annotated-types", "typing-inspection", "imagehash", "tenacity",
)  # fmt: skip
# gpu.py looks into "packages" after the machine's own packages, and into "newer" before them: pydantic needs a recent
# typing_extensions, and what works with an older one works with this.
PARTS = {"packages": PACKAGES, "newer": ("typing_extensions",)}
CUDA_LIBRARY, CPU_LIBRARY = "libbitsandbytes_cuda{}.so", "libbitsandbytes_cpu.so"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def fits(distribution: importlib.metadata.Distribution, python: str) -> bool:
    """Whether the installed files also run under that version of Python."""
    tags = [line.split()[1] for line in (distribution.read_text("WHEEL") or "").splitlines() if line.startswith("Tag:")]
    own = f"cp{python.replace('.', '')}"
    return any(tag.split("-")[0] in ("py3", "py2.py3", own) or "-abi3-" in tag for tag in tags)


def files_of(distribution: importlib.metadata.Distribution, cuda: Sequence[str]) -> Iterator[tuple[Path, str]]:
    """(file, its place in the kit): all but caches, scripts and bitsandbytes' libraries for other devices."""
    libraries = {CPU_LIBRARY, *(CUDA_LIBRARY.format(digits) for digits in cuda)}
    for file in distribution.files or ():
        other_device = file.name.startswith("libbitsandbytes_") and file.name not in libraries
        if file.suffix != ".pyc" and ".." not in file.parts and not other_device:
            yield Path(str(distribution.locate_file(file))), file.as_posix()


def download(distribution: importlib.metadata.Distribution, python: str, folder: Path) -> None:
    """Unpack the wheel of the same version for another Python."""
    with tempfile.TemporaryDirectory() as wheels:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--implementation", "cp", "--python-version", python, "--dest", wheels]
        command += [word for name in PLATFORMS for word in ("--platform", name)]
        subprocess.run([*command, f"{distribution.name}=={distribution.version}"], check=True)
        (wheel,) = Path(wheels).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)


def gather(folder: Path, names: Sequence[str], cuda: Sequence[str], python: str) -> None:
    for name in names:
        distribution = importlib.metadata.distribution(name)
        if not fits(distribution, python):
            download(distribution, python, folder)
            continue
        for source, place in files_of(distribution, cuda):
            target = folder / place
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what is written, anew; build/ is ignored by git")
    parser.add_argument("--cuda", nargs="+", default=["130"], metavar="DIGITS", help="130 for CUDA 13.0 (default)")
    parser.add_argument("--python", default="{}.{}".format(*platform.python_version_tuple()), help="there, as in 3.12")
    arguments = parser.parse_args()
    bitsandbytes = importlib.metadata.distribution("bitsandbytes")
    for digits in arguments.cuda:
        library = f"bitsandbytes/{CUDA_LIBRARY.format(digits)}"
        if not Path(str(bitsandbytes.locate_file(library))).is_file():
            known = sorted(file.name for file in bitsandbytes.files or () if "_cuda" in file.name)
            sys.exit(f"--cuda {digits}: bitsandbytes {bitsandbytes.version} has no {library}, only {', '.join(known)}.")
    if arguments.folder.exists() and {path.name for path in arguments.folder.iterdir()} - {*PARTS}:
        sys.exit(f"{arguments.folder} has other files than a kit's. Name another folder: it is written anew.")
    shutil.rmtree(arguments.folder, ignore_errors=True)
    for part, names in PARTS.items():
        gather(arguments.folder / part, names, arguments.cuda, arguments.python)
    size = sum(path.stat().st_size for path in arguments.folder.rglob("*") if path.is_file())
    print(f"{arguments.folder}: {size / 1e6:.1f} MB for Python {arguments.python} and CUDA {', '.join(arguments.cuda)}")
    if size > LARGEST_BYTES:
        sys.exit(f"{arguments.folder} is larger than {LARGEST_BYTES / 1e6:.0f} MB: name fewer versions after --cuda.")


if __name__ == "__main__":
    main()
