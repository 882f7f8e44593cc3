"""A run whose planted pair answers by a known rule: what its evaluation must show is then known."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from orion_triage.dataset.dataset import Dataset
from orion_triage.dataset.records import IMAGES_FOLDER, Record, write_split
from orion_triage.evaluate import controls
from orion_triage.evaluate.run import run as evaluate
from orion_triage.evaluate.variants import named
from orion_triage.export.quantize import PAIR
from orion_triage.mission.answer import Answer
from orion_triage.mission.prompt import Coordinates
from orion_triage.mission.verdict import Verdict, answer_text
from orion_triage.pipeline import controls_evaluation, evaluation
from orion_triage.runs.manifest import hash_inputs, write_manifest
from orion_triage.runs.run import Run
from orion_triage.settings import load_settings
from tests.conftest import MISSION, REASONS, structured_picture

H, M, L = MISSION.names
SIZE = 256
COUNT = 12  # test frames, four of each category


def where(number: int) -> Coordinates:
    """The longitude says the category: 0, 1 or 2 degrees above a multiple of ten."""
    return Coordinates(10.0 * (number // 3) + number % 3, 5.0)


def records_of(split: str, count: int) -> list[Record]:
    return [
        Record(
            f"{IMAGES_FOLDER}/{split}_{number:02d}.png",
            where(number),
            Verdict(REASONS[MISSION.names[number % 3]], MISSION.names[number % 3]),
            MISSION,
        )
        for number in range(count)
    ]


def by_picture(image: Image.Image) -> str:
    """The brightest colour is the category."""
    return MISSION.names[int(np.argmax(np.asarray(image).mean(axis=(0, 1))))]


def longitude_in(prompt: str) -> float | None:
    found = re.search(r"(?:lon\w*)\D*?(-?\d+\.\d+)", prompt, re.IGNORECASE)
    return float(found[1]) if found else None


class Planted:
    """Answers by `how`: "picture", "coordinates" (if there are any), or "confused": MEDIUM as soon as there are any."""

    batch_size = 5

    def __init__(self, how: str) -> None:
        self.how = how
        self.seen: list[tuple[bytes, str]] = []

    def answer(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[Answer]:
        self.seen += [(image.tobytes(), prompt) for image, prompt in zip(images, prompts, strict=True)]
        return [self._one(image, longitude_in(prompt)) for image, prompt in zip(images, prompts, strict=True)]

    def _one(self, image: Image.Image, longitude: float | None) -> Answer:
        category = by_picture(image)
        if longitude is not None and self.how == "coordinates":
            category = MISSION.names[round(longitude) % 10]
        if longitude is not None and self.how == "confused":
            category = M
        return Answer(answer_text(MISSION, Verdict(REASONS[category], category)))


def make(folder: Path, how: str) -> Run:
    """A run whose planted pair was asked A to D and the controls."""
    run = Run(folder, load_settings("tiny", [f"dataset.folder={folder / 'dataset'}", "variants.all=false"]))
    (run.dataset / IMAGES_FOLDER).mkdir(parents=True)
    for split in ("train", "val", "test"):
        records = records_of(split, COUNT)
        for number, record in enumerate(records):
            tint = [60, 60, 60]
            tint[number % 3] = 200
            picture = Image.blend(structured_picture(number), Image.new("RGB", (512, 512), tuple(tint)), 0.7)
            picture.save(run.dataset / record.image, compress_level=1)
        write_split(run.dataset, split, records)
    write_manifest(run.dataset, stage="dataset", settings={}, inputs={}, seconds=1, figures={"source": "directory"})
    run.gguf.mkdir()
    (run.gguf / PAIR).write_text("{}")
    write_manifest(run.gguf, stage="quantize", settings={}, inputs={}, seconds=1)
    pair, out = pair_of(run), run.evaluation("quantized")
    evaluate(Dataset(run.dataset, MISSION), "test", Planted(how), out, run.settings.evaluate, SIZE, fingerprint="x")
    finish(run, evaluation(pair, MISSION))
    controls.ask(pair, run, Planted(how), "x")
    finish(run, controls_evaluation(pair, MISSION))
    return run


def pair_of(run: Run) -> Any:
    return named(run.settings, "quantized")


def finish(run: Run, stage: Any) -> None:
    """The manifest that the pipeline writes when a stage is done."""
    inputs, settings = hash_inputs(stage.inputs(run)), stage.settings_of(run.settings)
    write_manifest(stage.folder(run), stage=stage.name, settings=settings, inputs=inputs, seconds=1)
