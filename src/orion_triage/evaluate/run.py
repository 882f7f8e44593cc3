"""STAGE evaluate: ask one model all questions of a split, keep every answer, count.

`predictions.jsonl` has one line an inference; it grows in the work file as answers come, so an interrupted
evaluation goes on where it stopped.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orion_triage.config import EvaluateSettings
from orion_triage.errors import OrionError
from orion_triage.evaluate.backends import Backend
from orion_triage.evaluate.conditions import NOISE, Donor, Question, conflict_pairs, questions
from orion_triage.evaluate.metrics import Prediction, summarize
from orion_triage.files import replaced_folder, sha256_of_text, write_text
from orion_triage.frames import noise_frame, read_frame
from orion_triage.progress import Progress, silent
from orion_triage.records import Record, image_path
from orion_triage.triage import Category, parse_verdict

if TYPE_CHECKING:
    from PIL import Image


def run(
    records: Sequence[Record],
    dataset: Path,
    backend: Backend,
    out_folder: Path,
    settings: EvaluateSettings,
    frame_size: int,
    *,
    fingerprint: str,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write predictions.jsonl, conflict_pairs.json and metrics.json into `out_folder`; returns the metrics.

    `fingerprint` names the model and inputs: only answers kept under the same one are used again.
    """
    pairs = conflict_pairs(records)
    asked = questions(records, pairs)
    work = out_folder.with_name(f".{out_folder.name}.work.jsonl")
    rows = _kept(work, fingerprint)
    todo = [question for question in asked if question.id not in rows]
    images = _Images(dataset, frame_size, settings.noise)
    progress("asking", len(rows), len(asked))
    work.parent.mkdir(parents=True, exist_ok=True)
    with work.open("a", encoding="utf-8") as file:
        if file.tell() == 0:
            file.write(json.dumps({"fingerprint": fingerprint}) + "\n")
        for batch in _batches(todo, backend.batch_size):
            pictures = [images.of(question) for question in batch]
            began = time.monotonic()
            answers = backend.answer(pictures, [question.prompt for question in batch])
            seconds = (time.monotonic() - began) / len(batch)
            for question, picture, answer in zip(batch, pictures, answers, strict=True):
                row = _row(question, picture, answer, seconds)
                rows[question.id] = row
                file.write(json.dumps(row) + "\n")
            file.flush()
            progress("asking", len(rows), len(asked))
    ordered = [rows[question.id] for question in asked]
    metrics = summarize([prediction_of(row) for row in ordered])
    with replaced_folder(out_folder) as folder:
        write_text(folder / "predictions.jsonl", "".join(json.dumps(row) + "\n" for row in ordered))
        write_text(folder / "conflict_pairs.json", json.dumps(_pairs_json(pairs), indent=1) + "\n")
        write_text(folder / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    work.unlink()
    return metrics


def read_predictions(folder: Path) -> list[dict[str, Any]]:
    """The rows of a finished evaluation."""
    path = folder / "predictions.jsonl"
    if not path.exists():
        raise OrionError(f"{path} does not exist.", "Run the evaluation first.")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def prediction_of(row: dict[str, Any]) -> Prediction:
    donor = row["donor"]
    return Prediction(
        condition=row["condition"],
        name=row["name"],
        truth=Category(row["truth"]),
        predicted=Category(row["category"]) if row["category"] else None,
        donor_category=Category(donor["category"]) if donor else None,
    )


class _Images:
    """Decoded frames by question; one object an image, so that a backend can encode it once."""

    def __init__(self, dataset: Path, frame_size: int, noise: str) -> None:
        self._dataset, self._size = dataset, frame_size
        self._noise = noise_frame(noise, frame_size)
        self._last: tuple[str, Image.Image] | None = None

    def of(self, question: Question) -> "Image.Image":
        if question.image == NOISE:
            return self._noise
        if self._last is None or self._last[0] != question.image:
            frame = read_frame(image_path(self._dataset, question.record), self._size)
            self._last = (question.image, frame.image)
        return self._last[1]


def _batches(todo: Sequence[Question], size: int) -> Iterator[list[Question]]:
    for start in range(0, len(todo), size):
        yield list(todo[start : start + size])


def _row(question: Question, picture: "Image.Image", answer: str, seconds: float) -> dict[str, Any]:
    verdict = parse_verdict(answer)
    return {
        "id": question.id,
        "condition": question.condition,
        "name": question.record.name,
        "image": question.image,
        "pixels_sha256": hashlib.sha256(picture.tobytes()).hexdigest(),
        "coordinates": asdict(question.coordinates) if question.coordinates else None,
        "donor": {"name": question.donor.name, "category": question.donor.category} if question.donor else None,
        "prompt_sha256": sha256_of_text(question.prompt),
        "answer": answer,
        "category": verdict.category if verdict else None,
        "reason": verdict.reason if verdict else None,
        "truth": question.record.verdict.category,
        "seconds": round(seconds, 4),
    }


def _kept(work: Path, fingerprint: str) -> dict[str, dict[str, Any]]:
    """Answers of an interrupted evaluation of the same model; a cut last line is dropped."""
    rows: dict[str, dict[str, Any]] = {}
    if not work.exists():
        return rows
    lines = work.read_text(encoding="utf-8").split("\n")
    whole = [line for line in lines[:-1] if line]
    if not whole or json.loads(whole[0]).get("fingerprint") != fingerprint:
        work.unlink()
        return rows
    if lines[-1]:
        work.write_text("".join(line + "\n" for line in whole), encoding="utf-8")
    for line in whole[1:]:
        row = json.loads(line)
        rows[row["id"]] = row
    return rows


def _pairs_json(pairs: dict[str, Donor]) -> dict[str, Any]:
    return {
        name: {"donor": donor.name, "category": donor.category, **asdict(donor.coordinates)}
        for name, donor in pairs.items()
    }
