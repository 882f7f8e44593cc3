"""STAGE evaluate: ask one model all questions of a split, store every answer, compute metrics.

`predictions.jsonl` has one line per inference. Answers are appended to a work file beside the folder, so an interrupted
evaluation resumes where it stopped.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orion_triage import processes
from orion_triage.dataset.dataset import Dataset
from orion_triage.errors import OrionError
from orion_triage.evaluate.backends import Backend
from orion_triage.evaluate.clusters import place_label
from orion_triage.evaluate.conditions import NOISE, Donor, Question, conflict_pairs, questions
from orion_triage.evaluate.metrics import Prediction, summarize
from orion_triage.imagery.frames import noise_frame
from orion_triage.mission.answer import Answer
from orion_triage.mission.fields import Fields, value_fault
from orion_triage.mission.mission import Mission
from orion_triage.mission.scoring import FieldScores
from orion_triage.progress import Progress, silent
from orion_triage.runs.manifest import change_of, read_manifest
from orion_triage.runs.run import EVALUATE
from orion_triage.safe.files import naming, replaced_folder, sha256_of_text, write_text
from orion_triage.safe.tables import json_lines
from orion_triage.settings import EvaluateSettings, Split

if TYPE_CHECKING:
    from PIL import Image

Row = dict[str, Any]
PREDICTIONS_FILE, METRICS_FILE = "predictions.jsonl", "metrics.json"


def run(
    dataset: Dataset,
    split: Split,
    backend: Backend,
    out_folder: Path,
    settings: EvaluateSettings,
    frame_size: int,
    *,
    fingerprint: str,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write predictions.jsonl, conflict_pairs.json and metrics.json into `out_folder`; returns the metrics.

    `fingerprint` is a hash of the model and the frames. Answers of an interrupted evaluation are reused only with the
    same fingerprint, settings, frame size and questions. Raises OrionError for records that cannot be evaluated, and
    FrameError for a frame that cannot be read: a split is never evaluated partially.
    """
    records = dataset.records(split)
    pairs = conflict_pairs(records)
    asked = questions(records, pairs)
    images = _Images(dataset, frame_size, settings.noise)
    key = key_of(fingerprint, asked, settings, frame_size)
    rows = ask_all(asked, images.of, backend, out_folder, key, progress)
    metrics = summarize(predictions_of(rows, dataset.mission), dataset.mission)
    store(out_folder, rows, metrics, {"conflict_pairs.json": json.dumps(_pairs_json(pairs), indent=1) + "\n"})
    return metrics


def ask_all(
    asked: Sequence[Question],
    picture_of: "Callable[[Question], Image.Image]",
    backend: Backend,
    out_folder: Path,
    key: str,
    progress: Progress,
    more: Callable[[Question], Row] = lambda question: {},
) -> list[Row]:
    """The answers to these questions, in their order, each with what `more` adds to its row.

    They are appended to a work file beside `out_folder`, which `store` deletes; those of an earlier call with the same
    `key` are reused. Several launched processes share the questions, and each returns all answers.
    """
    # Each process writes every n-th batch to its own file; rank 0 merges them.
    works = _works(out_folder)
    work = works[processes.rank()]
    rows = _kept(work, key)
    progress("asking", len(rows), len(asked))
    work.parent.mkdir(parents=True, exist_ok=True)
    with naming(work), work.open("a", encoding="utf-8") as file:
        if file.tell() == 0:
            file.write(json.dumps({"key": key}) + "\n")
        # Batches are cut from all questions, not only the remaining ones. A resumed run therefore has the same batches
        # and adds the same numbers in the same order.
        for number, start in enumerate(range(0, len(asked), backend.batch_size)):
            batch = asked[start : start + backend.batch_size]
            if number % processes.count() != processes.rank() or all(question.id in rows for question in batch):
                continue
            pictures = [picture_of(question) for question in batch]
            began = time.monotonic()
            answers = backend.answer(pictures, [question.user_text for question in batch])
            seconds = (time.monotonic() - began) / len(batch)
            for question, picture, answer in zip(batch, pictures, answers, strict=True):
                row = _row(question, picture, answer, seconds) | more(question)
                rows[question.id] = row
                file.write(json.dumps(row) + "\n")
            file.flush()
            progress("asking", len(rows), len(asked))
    processes.wait()
    rows = {name: row for own in works for name, row in _kept(own, key).items()}
    processes.wait()  # every process must have read the files before rank 0 deletes them
    return [rows[question.id] for question in asked]


def store(out_folder: Path, rows: Sequence[Row], metrics: dict[str, Any], others: Mapping[str, str]) -> None:
    """Write predictions.jsonl, metrics.json and `others` (name -> text), and delete the work files; rank 0 alone."""
    if not processes.is_main():
        return
    with replaced_folder(out_folder) as folder:
        write_text(folder / PREDICTIONS_FILE, "".join(json.dumps(row) + "\n" for row in rows))
        for name, text in others.items():
            write_text(folder / name, text)
        write_text(folder / METRICS_FILE, json.dumps(metrics, indent=1) + "\n")
    for work in _works(out_folder):
        work.unlink()


def _works(out_folder: Path) -> list[Path]:
    """The work file of each process."""
    return [out_folder.with_name(f".{out_folder.name}.work-{number}.jsonl") for number in range(processes.count())]


def read_predictions(folder: Path, mission: Mission) -> list[Row]:
    """The rows of an evaluation; raises OrionError if the file is missing, damaged, or not what its manifest says.

    Without a manifest, the evaluation is being made.
    """
    path = folder / PREDICTIONS_FILE
    _require_as_made(path)
    rows: list[Row] = []
    last = 0
    try:
        for last, line in json_lines(path):  # noqa: B007
            row = json.loads(line)
            prediction_of(row, mission)
            rows.append(row)
    except FileNotFoundError:
        raise OrionError(f"{path} does not exist.", "Run 'orion evaluate' first.") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise OrionError(f"{path}:{last} is damaged: {error!r}.", "Run the evaluation again.") from None
    return rows


def _require_as_made(path: Path) -> None:
    """Raise OrionError if the predictions are not those that the evaluation wrote."""
    made = read_manifest(path.parent)
    if made and (change := change_of(path, made.outputs.get(path.name, "none"))):
        raise OrionError(
            f"{path} was changed after the evaluation: {change}.",
            f"Evaluate again: '{_command_of(path.parent, made.stage)}'. Or put the file back.",
        )


def _command_of(folder: Path, stage: str) -> str:
    """The command that makes the evaluation in RUN/evaluation/SPLIT/NAME again; of controls and stresses, NAME is two.

    A changed file makes the evaluation be repeated without --force, too; with it, the command says what it does.
    """
    kind, _, name = stage.removeprefix(EVALUATE).rpartition("/")
    at = folder.parent if kind else folder
    asked = {"server": "--quantized-model URL", "other-pair": "--gguf PAIR"}.get(name, f"--{kind or 'variants'} {name}")
    split = "" if at.parent.name == "test" else f" --file {at.parent.name}"
    return f"orion evaluate {asked}{split} --run {at.parent.parent.parent} --force"


def predictions_in(folder: Path, mission: Mission) -> list[Prediction]:
    """The counted answers of an evaluation; raises OrionError as `read_predictions`."""
    return predictions_of(read_predictions(folder, mission), mission)


def predictions_of(rows: Sequence[Row], mission: Mission) -> list[Prediction]:
    """The counted answers, with their places: those of the coordinates under A and C, which are the true ones."""
    places = {row["name"]: row["coordinates"] for row in rows if row["condition"] in ("A", "C")}
    named = {name: place_label(**place) for name, place in places.items() if place}
    return [replace(prediction_of(row, mission), place=named.get(row["name"], "")) for row in rows]


def prediction_of(row: Row, mission: Mission) -> Prediction:
    """The counted part of a stored answer; raises ValueError for a category or value that the mission does not have."""
    donor = row["donor"]
    for category in (row["truth"], row["category"], donor and donor["category"]):
        if category and category not in mission.names:
            raise ValueError(f"{category!r} is not a category of the mission {mission.name}")
    fields, true_fields = (_fields_in(row.get(key), mission) for key in ("fields", "true_fields"))
    if mission.fields and not true_fields:
        raise ValueError(f"true_fields is missing, and the mission {mission.name} has fields")
    if any(one.when for one in mission.fields) and "field_scores" not in row:
        raise ValueError(f"field_scores is missing, and the mission {mission.name} has a rule on a field")
    return Prediction(
        condition=row["condition"],
        name=row["name"],
        truth=row["truth"],
        predicted=row["category"] or None,
        donor_category=donor["category"] if donor else None,
        scores=tuple(row["scores"][category] for category in mission.names) if row["scores"] else None,
        fields=fields,
        true_fields=true_fields,
        field_scores=_field_scores_in(row.get("field_scores"), mission),
    )


def _fields_in(stored: Any, mission: Mission) -> Fields:
    """The values of a stored answer, none if it has no verdict; raises ValueError if one is not allowed."""
    if not stored or not mission.fields:
        return ()
    if fault := next((fault for one in mission.fields if (fault := value_fault(one, stored.get(one.name)))), ""):
        raise ValueError(fault)
    return tuple((one.name, stored[one.name]) for one in mission.fields)


def _field_scores_in(stored: Any, mission: Mission) -> FieldScores:
    """The probabilities of a stored answer's values; raises ValueError for fields and values of another mission."""
    words = {one.name: one.words for one in mission.fields}
    for name, scores in (stored or {}).items():
        if tuple(scores) != words.get(name) or not all(0 <= value <= 1 for value in scores.values()):
            raise ValueError(f"field_scores of {name!r} are not those of the mission {mission.name}")
    return stored or {}


class _Images:
    """Decoded frames by question; one object per image, so that a backend can encode it once."""

    def __init__(self, dataset: Dataset, frame_size: int, noise: str) -> None:
        self._dataset, self._size = dataset, frame_size
        self._noise = noise_frame(noise, frame_size)

    def of(self, question: Question) -> "Image.Image":
        return self._noise if question.image == NOISE else self._dataset.frame(question.record, self._size)


def key_of(fingerprint: str, asked: Sequence[Question], settings: EvaluateSettings, frame_size: int) -> str:
    """The key of a work file: answers of another model, of other questions or settings are not reused."""
    parts = [fingerprint, frame_size, settings.model_dump(mode="json"), [[q.id, q.image, q.prompt] for q in asked]]
    return sha256_of_text(json.dumps(parts))


def _row(question: Question, picture: "Image.Image", answer: Answer, seconds: float) -> Row:
    donor = question.donor
    return {
        "id": question.id,
        "condition": question.condition,
        "name": question.record.name,
        "image": question.image,
        "pixels_sha256": hashlib.sha256(picture.tobytes()).hexdigest(),
        "coordinates": asdict(question.coordinates) if question.coordinates else None,
        "donor": {"name": donor.name, "category": donor.category} if donor else None,
        "prompt_sha256": sha256_of_text(question.prompt),
        **answer.to_json(question.record.mission),
        "truth": question.record.verdict.category,
        **({"true_fields": dict(question.record.verdict.fields)} if question.record.mission.fields else {}),
        "seconds": round(seconds, 4),
    }


def _kept(work: Path, key: str) -> dict[str, Row]:
    """Answers of the same evaluation before an interruption; an incomplete last line is removed from the file."""
    try:
        *whole, _ = work.read_bytes().split(b"\n")
        header, *kept = [json.loads(line) for line in whole]
        if header["key"] != key:
            raise ValueError
        rows = {row["id"]: row for row in kept}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, RecursionError):
        work.unlink()  # of another evaluation, or damaged: its questions are asked again
        return {}
    with work.open("r+b") as file:
        file.truncate(sum(len(line) + 1 for line in whole))
    return rows


def _pairs_json(pairs: dict[str, Donor]) -> dict[str, Any]:
    return {
        name: {"donor": donor.name, "category": donor.category, **asdict(donor.coordinates)}
        for name, donor in pairs.items()
    }
