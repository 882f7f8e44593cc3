"""Run the whole pipeline on this machine at a preset's published shapes with random weights: does the real run fit?

Every stage is the real command in a separate process, so its peak memory is the operating system's value (including
mapped files). Only seconds, memory, disk and file sizes matter, not the answers.
"""

import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orion_triage.errors import OrionError
from orion_triage.export import quantize
from orion_triage.llama_cpp.server import Server
from orion_triage.llama_cpp.toolchain import find_toolchain
from orion_triage.llama_cpp.tools import run_measured
from orion_triage.machine.describe import describe
from orion_triage.models.family import turn_of
from orion_triage.models.lfm2_vl_shapes import SHAPES, empty_model
from orion_triage.progress import Progress, silent
from orion_triage.runs.manifest import read_manifest
from orion_triage.runs.run import Run
from orion_triage.safe.files import cache_folder, replaced_folder, require_free_space, write_text
from orion_triage.settings import load_settings
from orion_triage.train.device import gpu_fault

CHECK_RECORDS = 2  # of the fused model; a real run checks 24, half a minute each on two cores at 1.6B
_TRAINING_FRAMES = 2  # per category


@dataclass(frozen=True)
class StageUse:
    """The cost of one stage; disk is the peak size of the run folder, without the base, during the stage."""

    stage: str
    seconds: float
    peak_memory_bytes: int
    peak_disk_bytes: int
    peak_vram_bytes: int | None = None


def run(preset: str, folder: Path, *, steps: int = 0, progress: Progress = silent) -> dict[str, Any]:
    """Rehearse `preset` in `folder`; returns and stores the measurements.

    `steps` is the number of optimizer steps of the fine-tuning; with 0, the adapter is random. Raises OrionError for a
    preset without published shapes, too little disk, or a stage that fails.
    """
    if preset not in SHAPES:
        raise OrionError(f"preset {preset!r} has no published shapes.", f"Use one of {', '.join(SHAPES)}.")
    began = time.monotonic()
    settings = load_settings(preset)
    require_free_space(folder, 5 * _parameters(preset) * 2, "a rehearsal")
    base, rehearsal = folder / "base", Run(folder / "run", settings)
    shutil.rmtree(rehearsal.folder, ignore_errors=True)  # finished stages would be skipped and not measured
    parameters = _parameters(preset)
    if not base.exists():
        make_base(preset, base, progress)
    records = max(
        settings.fine_tune.micro_batch_size * settings.fine_tune.gradient_accumulation_steps * steps, CHECK_RECORDS
    )
    make_dataset(rehearsal.dataset, records)
    if not steps:
        make_adapter(base, rehearsal.adapter, settings)
    sets = [f"base.model={base}", f"fuse.check_records={CHECK_RECORDS}", "fine_tune.epochs=1"]
    if gpu_fault():
        sets.append("fine_tune.device=cpu")  # a few steps; a real training of this size would be refused
    options = [
        "--run",
        str(rehearsal.folder),
        "--preset",
        preset,
        *(word for value in sets for word in ("--set", value)),
    ]
    frame = sorted(rehearsal.dataset.rglob("*.png"))[0]
    stages = {
        "fine-tune": ["fine-tune", *options],
        "fuse": ["fuse", *options],
        "quantize": ["quantize", *options],
        "answer": ["triage", str(frame), "--json", "--run", str(rehearsal.folder)],
    }
    if not steps:
        del stages["fine-tune"]
    uses: list[StageUse] = []
    for number, (stage, words) in enumerate(stages.items()):
        progress(f"rehearsing: {stage}", number, len(stages) + 1)
        stage_uses, said = _measure(stage, words, rehearsal)
        uses += stage_uses
    progress("rehearsing: parity", len(stages), len(stages) + 1)
    parity = _parity(rehearsal, frame)
    tuned = read_manifest(rehearsal.adapter)
    value = {
        "preset": preset,
        "parameters": parameters,
        "steps": steps,
        "seconds": round(time.monotonic() - began, 1),
        "training_seconds_per_sample": tuned.figures["seconds_per_sample"] if tuned else None,
        "machine": machine(),
        "stages": [asdict(use) for use in uses],
        "bytes": sizes(rehearsal, base),
        "parity": parity,
        "answer": json.loads(said[said.index("[\n") :])[0],  # of random weights, under the flight grammar
        "fuse_check_records": CHECK_RECORDS,
    }
    write_text(figures_path(preset), json.dumps(value, indent=2) + "\n")
    return value


def figures_path(preset: str) -> Path:
    """The path of the last rehearsal's measurements: in the user's cache, since they belong to the machine."""
    return cache_folder() / "rehearsals" / f"{preset}.json"


def machine() -> dict[str, Any]:
    """Description of this machine and its GPU."""
    import torch

    return {**describe(), "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}


def sizes(run: Run, base: Path) -> dict[str, int]:
    def size(folder: Path, pattern: str) -> int:
        return sum(path.stat().st_size for path in folder.glob(pattern))

    return {
        "base": size(base, "*.safetensors"),
        "adapter": size(run.adapter, "*.safetensors"),
        "merged": size(run.merged, "*.safetensors"),
        "F16": size(run.gguf, quantize.F16),
        run.settings.quantize.type: size(run.gguf, quantize.backbone_name(run.settings.quantize.type)),
        "mmproj": size(run.gguf, quantize.tower_name(run.settings.quantize.tower)),
    }


# --- what is rehearsed on -------------------------------------------------------------------------------------------


def random_config(preset: str, **changes: Any) -> tuple[Any, Any]:
    """(tokenizer, configuration) of the published shapes with `changes`.

    The tokenizer is trained here and replaces the published vocabulary.
    """
    from orion_triage.dataset.catalogue import load_catalogue
    from orion_triage.mission.mission import default_mission
    from orion_triage.mission.prompt import render_prompt
    from orion_triage.models.lfm2_vl_shapes import make_config, train_tokenizer

    texts = [render_prompt(default_mission(), target.coordinates) for target in load_catalogue()]
    texts += [target.reason for target in load_catalogue()]
    tokenizer = train_tokenizer(texts, 2048)
    return tokenizer, make_config(tokenizer, **(SHAPES[preset] | changes))


def _parameters(preset: str) -> int:
    return sum(parameter.numel() for parameter in empty_model(random_config(preset)[1]).parameters())


def make_base(preset: str, folder: Path, progress: Progress = silent) -> None:
    """Write a bfloat16 checkpoint of random weights in the Hub's layout."""
    import torch

    from orion_triage.models.checkpoint import write_tensors
    from orion_triage.models.lfm2_vl import file_name
    from orion_triage.models.lfm2_vl_shapes import make_processor, save_settings

    tokenizer, config = random_config(preset)
    model = empty_model(config)
    shapes = {file_name(name): tensor.shape for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    torch.manual_seed(0)

    def random(name: str) -> torch.Tensor:
        shape = tuple(shapes[name])
        if len(shape) == 1:  # norms are 1, biases 0
            return torch.full(shape, float(name.endswith(".weight")), dtype=torch.bfloat16)
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02)

    with replaced_folder(folder) as new:
        write_tensors(new, shapes, "bfloat16", random, description="making random weights", progress=progress)
        save_settings(model, make_processor(tokenizer, 512), "bfloat16", new)
        write_text(new / "README.md", "---\nlicense: apache-2.0\n---\nRandom weights of a published shape.\n")


def make_dataset(
    folder: Path, train_records: int, *, train_frames: int = _TRAINING_FRAMES, val_frames: int = 1
) -> None:
    """A dataset of synthetic tiles with the catalogue's prompts and reasons: enough records for a rehearsal.

    `train_frames` and `val_frames` are numbers of frames per category. Each training frame has two records; further
    records repeat them.
    """
    from orion_triage.dataset.build import records_of
    from orion_triage.dataset.catalogue import Target, load_catalogue
    from orion_triage.dataset.collect import image_name
    from orion_triage.dataset.records import IMAGES_FOLDER, Record, write_split
    from orion_triage.dataset.sources.source import Shot
    from orion_triage.dataset.sources.synthetic.draw import draw_tile, tile_seed
    from orion_triage.mission.mission import default_mission
    from orion_triage.settings import Split

    mission = default_mission()
    of = {name: [target for target in load_catalogue() if target.category == name] for name in mission.names}
    places: dict[Split, list[Target]] = {
        "train": [target for category in mission.names for target in of[category][:train_frames]],
        "val": [target for category in mission.names for target in of[category][-val_frames:]],
        "test": [of[category][-val_frames - 1] for category in mission.names],
    }
    with replaced_folder(folder) as new:
        (new / IMAGES_FOLDER).mkdir(parents=True)
        for split, targets in places.items():
            records: list[Record] = []
            for shot in map(Shot, targets):
                tile = draw_tile(shot.target.morphology, tile_seed(0, shot.name))
                tile.image.save(new / image_name(shot), compress_level=1)
                records += records_of(shot, split, mission)
            count = max(train_records, len(records)) if split == "train" else len(records)
            write_split(new, split, [records[index % len(records)] for index in range(count)])


def make_adapter(base: Path, folder: Path, settings: Any) -> None:
    """A random adapter of the preset's rank and scope, in PEFT's format."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file
    from transformers import AutoConfig

    from orion_triage.models.adapter import resolve_targets

    tuning = settings.fine_tune
    model = empty_model(AutoConfig.from_pretrained(base))
    names, _ = resolve_targets(model, tuning.target_modules, tuning.scope)
    torch.manual_seed(1)
    tensors = {}
    for name in names:
        linear = model.get_submodule(name)
        key = f"base_model.model.{name}"
        tensors[f"{key}.lora_A.weight"] = torch.empty(tuning.rank, linear.in_features).normal_(0, 0.02)
        tensors[f"{key}.lora_B.weight"] = torch.empty(linear.out_features, tuning.rank).normal_(0, 0.02)
    with replaced_folder(folder) as new:
        save_file(tensors, new / "adapter_model.safetensors", metadata={"format": "pt"})
        LoraConfig(r=tuning.rank, lora_alpha=tuning.alpha, target_modules=names).save_pretrained(new)


# --- measuring ------------------------------------------------------------------------------------------------------


def _measure(stage: str, words: list[str], run: Run) -> tuple[list[StageUse], str]:
    """Run one command; returns the cost of each llama.cpp tool in it and of the whole command, and its output."""
    command = [sys.executable, "-m", "orion_triage.cli", *words]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output, _disk(run.folder) as most:
        status, use = run_measured(command, dict(os.environ), output)
        output.seek(0)
        said = output.read()
        if status:
            last = " | ".join(said.strip().splitlines()[-4:])
            raise OrionError(f"stage {stage} of the rehearsal failed: {last}.", "Fix this, then rehearse again.")
    stage_manifest = read_manifest({"fine-tune": run.adapter, "quantize": run.gguf}.get(stage, run.folder))
    figures = stage_manifest.figures if stage_manifest else {}
    tools = figures.get("tools", {})
    uses = [StageUse(name, tool["seconds"], tool["peak_memory_bytes"], most[0]) for name, tool in tools.items()]
    name = f"all of {stage}" if tools else stage
    uses.append(StageUse(name, use.seconds, use.peak_memory_bytes, most[0], figures.get("peak_vram_bytes")))
    return uses, said


@contextmanager
def _disk(folder: Path) -> Iterator[list[int]]:
    """The peak size of a folder in bytes, measured twice per second."""
    most, stop = [0], threading.Event()

    def look() -> None:
        while True:
            total = 0
            for path in folder.rglob("*"):
                try:
                    total += path.stat().st_size if path.is_file() else 0
                except FileNotFoundError:  # the file was renamed
                    continue
            most[0] = max(most[0], total)
            if stop.wait(0.5):
                return

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield most
    finally:
        stop.set()
        thread.join()


def _parity(run: Run, frame: Path) -> float:
    """Compare the F16 pair with transformers in float32 on one frame."""
    from orion_triage.export import parity
    from orion_triage.imagery.frames import read_frame
    from orion_triage.mission.prompt import user_text
    from orion_triage.models.load import float32_compute, load_model, load_processor

    size = run.settings.base.frame_size
    processor = load_processor(run.merged, size)
    log = run.folder / "logs" / "parity-server.log"
    tools, backbone = find_toolchain(), run.gguf / quantize.F16
    with Server(tools, backbone, run.gguf / quantize.MMPROJ, log=log, turn=turn_of(backbone)) as server:
        model = load_model(run.merged, dtype="auto")
        with float32_compute(model):
            return parity.largest_difference(
                model, processor, server.client, read_frame(frame, size), user_text(run.settings.mission, None)
            )


def remove(folder: Path) -> None:
    """Delete the files of a rehearsal, except its measurements."""
    for name in ("base", "run"):
        shutil.rmtree(folder / name, ignore_errors=True)
