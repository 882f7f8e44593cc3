"""This project's side of benchmarks/speed.py where no command of the package does it alone.

    python benchmarks/ours.py frame --backbone FILE --mmproj FILE --dataset FOLDER --size PIXELS --out FOLDER
    python benchmarks/ours.py random-base PRESET FOLDER
    python benchmarks/ours.py random-run PRESET FOLDER

frame        one frame on the package's own server with its options, as benchmarks/reference.py asks its own
random-base  FOLDER/base: random weights in a preset's published shapes
random-run   FOLDER/base, and FOLDER/run with a dataset and a random adapter, for 'orion fuse' and 'orion quantize'
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import reference  # beside this file

from orion_triage.imagery.frames import Frame
from orion_triage.llama_cpp.server import Server
from orion_triage.llama_cpp.toolchain import find_toolchain
from orion_triage.machine import rehearse
from orion_triage.models.family import turn_of
from orion_triage.runs.run import Run
from orion_triage.settings import load_settings


def frame(backbone: Path, mmproj: Path, dataset: Path, size: int, out: Path) -> dict[str, Any]:
    replies = []
    with Server(find_toolchain(), backbone, mmproj, log=out / "server.log", turn=turn_of(backbone)) as server:
        for image, text, tokens in reference.frame_requests(dataset, size):
            began = time.monotonic()
            png = Frame(image, image.size).png()
            reply = server.client.completion(text, png, tokens, ignore_eos=True, return_tokens=True)
            replies.append((time.monotonic() - began, reply))
        peak = reference.peak_memory_of_children()
    return reference.frame_result(replies, peak)


def random_base(preset: str, folder: Path) -> None:
    if not (folder / "base").exists():
        rehearse.make_base(preset, folder / "base")


def random_run(preset: str, folder: Path) -> None:
    random_base(preset, folder)
    settings = load_settings(preset)
    run = Run(folder / "run", settings)
    if not run.dataset.exists():
        rehearse.make_dataset(run.dataset, rehearse.CHECK_RECORDS)
    if not run.adapter.exists():
        rehearse.make_adapter(folder / "base", run.adapter, settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="worker", required=True)
    command = commands.add_parser("frame")
    for option in ("backbone", "mmproj", "dataset", "out"):
        command.add_argument(f"--{option}", required=True, type=Path)
    command.add_argument("--size", required=True, type=int)
    for name in ("random-base", "random-run"):
        command = commands.add_parser(name)
        command.add_argument("preset")
        command.add_argument("folder", type=Path)
    arguments = vars(parser.parse_args())
    worker = arguments.pop("worker")
    if worker != "frame":
        {"random-base": random_base, "random-run": random_run}[worker](**arguments)
        return
    arguments["out"].mkdir(parents=True, exist_ok=True)
    text = json.dumps(frame(**arguments), indent=1) + "\n"
    (arguments["out"] / "result.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
