"""One line of a dataset split in the published layout: an image, a prompt and the right verdict.

{"image": "orion_dataset/images/NAME.png",
 "conversations": [{"role": "user", "content": "<image>\\n" + prompt},
                   {"role": "assistant", "content": verdict as JSON}]}

A dataset folder contains `train_dataset.jsonl`, `val_dataset.jsonl`, `test_dataset.jsonl`, and the images at the paths
that the lines name.
"""

import contextlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from orion_triage.errors import OrionError, RecordError
from orion_triage.mission.fields import value_fault
from orion_triage.mission.mission import Mission, listed
from orion_triage.mission.prompt import Coordinates, parse_user_text, render_prompt, user_text
from orion_triage.mission.verdict import Verdict, answer_text, parse_verdict, reason_fault
from orion_triage.safe.files import write_text
from orion_triage.safe.folders import existing
from orion_triage.safe.reading import parse_json, shown
from orion_triage.safe.tables import numbered_lines
from orion_triage.settings import SPLITS, Split

IMAGES_FOLDER = "orion_dataset/images"
_LONGEST_PATH, _LONGEST_NAME = 1024, 255  # characters, and bytes of one component: limits of file systems
FRAMES_TABLE = "frames.csv"  # origin of every frame; third-party datasets may not have it


class EncodingError(RecordError):
    """A dataset line that is not UTF-8."""


@dataclass(frozen=True)
class Record:
    """One frame of a split: `image` is relative to the dataset folder, POSIX style."""

    image: str
    coordinates: Coordinates | None
    verdict: Verdict
    mission: Mission = field(repr=False)

    @property
    def name(self) -> str:
        """The target's name: the image's file name without its suffix."""
        return PurePosixPath(self.image).stem

    @property
    def prompt(self) -> str:
        return render_prompt(self.mission, self.coordinates)

    @property
    def user_text(self) -> str:
        """The user's whole turn: the prompt, with `<image>` in the place of the image."""
        return user_text(self.mission, self.coordinates)

    @property
    def answer(self) -> str:
        """The right answer's bytes."""
        return answer_text(self.mission, self.verdict)

    def without_coordinates(self) -> "Record":
        return replace(self, coordinates=None)

    def to_line(self) -> str:
        """The record's JSON, without the line end."""
        return json.dumps(
            {
                "image": self.image,
                "conversations": [
                    {"role": "user", "content": self.user_text},
                    {"role": "assistant", "content": self.answer},
                ],
            }
        )


def split_path(dataset: Path, split: Split) -> Path:
    return dataset / f"{split}_dataset.jsonl"


def is_published(dataset: Path) -> bool:
    """Whether the folder has at least one of the three splits."""
    return any(split_path(dataset, split).is_file() for split in SPLITS)


def parse_record(line: str, mission: Mission) -> Record:
    """The record in one line of a dataset of this mission; raises RecordError that states how to correct it."""
    try:
        value = parse_json(line)
    except ValueError as error:
        raise RecordError(f"not JSON: {error}.", "Write one JSON object per line.") from None
    if not isinstance(value, dict) or set(value) != {"image", "conversations"}:
        raise RecordError(
            "the line is not an object with exactly the keys image and conversations.",
            "Use the published layout in docs/dataset.md.",
        )
    image = _checked_image(value["image"])
    user, assistant = _turns(value["conversations"])
    try:
        coordinates = parse_user_text(mission, user)
    except OrionError as error:
        raise RecordError(error.message + ".", error.fix) from None
    return Record(image, coordinates, _checked_verdict(assistant, mission), mission)


def record_of(line: bytes, mission: Mission) -> Record:
    """`parse_record` of one line of a split file as read; raises RecordError also for bytes that are not UTF-8."""
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise EncodingError(
            f"the line is not UTF-8: byte 0x{line[error.start]:02x}.", "Save the file as UTF-8."
        ) from None
    return parse_record(text, mission)


def _checked_image(image: Any) -> str:
    if not isinstance(image, str) or not image:
        raise RecordError(f"image is {shown(image)}, not a path.", "Use the path of a file in the dataset folder.")
    path = PurePosixPath(image)
    if path.is_absolute() or ".." in path.parts or "\\" in image or "\0" in image:
        raise RecordError(
            f"image {shown(image)} is outside the dataset folder.", "Use a path relative to the folder, without '..'."
        )
    if not image.isprintable():  # terminals interpret control characters; half a surrogate pair is not a file name
        raise RecordError(f"image {shown(image)} has unprintable characters.", "Rename the file.")
    if len(image) > _LONGEST_PATH or max(len(part.encode()) for part in path.parts or ("",)) > _LONGEST_NAME:
        raise RecordError(
            f"image {shown(image)} is longer than {_LONGEST_PATH} characters or {_LONGEST_NAME} bytes per component.",
            "Rename the file.",
        )
    return image


def _turns(conversations: Any) -> tuple[str, str]:
    shape = [
        (turn.get("role"), isinstance(turn.get("content"), str)) if isinstance(turn, dict) else None
        for turn in (conversations if isinstance(conversations, list) else [])
    ]
    if shape != [("user", True), ("assistant", True)]:
        raise RecordError(
            "conversations is not one user turn followed by one assistant turn, each with role and content.",
            "Use the published layout in docs/dataset.md.",
        )
    return conversations[0]["content"], conversations[1]["content"]


def _checked_verdict(answer: str, mission: Mission) -> Verdict:
    verdict = parse_verdict(mission, answer)
    if verdict is None:
        category = None
        with contextlib.suppress(ValueError, AttributeError, RecursionError):
            category = json.loads(answer).get("category")
        if category is not None and category not in mission.names:
            names = listed(mission.names, "or")
            raise RecordError(f"category {shown(category)} is not {names}.", "Correct it, or name the mission's file.")
        if fault := _fault_of_fields(answer, mission):
            raise RecordError(f"{fault}.", "Correct the value, or name the mission's file.")
        wanted = ", ".join(f'"{key}": ...' for key in mission.keys)
        raise RecordError(f"the answer is not a verdict: {answer[:80]!r}.", f"Write {{{wanted}}}.")
    exact = answer_text(mission, verdict)
    if exact != answer:
        raise RecordError(
            f"the answer is not in the exact form of a verdict: {answer[:80]!r}.",
            f"Write {exact[:80]}... ({mission.keys[0]} first, one space after each colon and comma).",
        )
    for what, text in (("reason", verdict.reason), *verdict.fields):
        if isinstance(text, str) and (fault := reason_fault(text)):
            raise RecordError(f"the {what} {shown(text)} {fault}.", f"Remove it from the {what}.")
    return verdict


def _fault_of_fields(answer: str, mission: Mission) -> str:
    """The first value of a further field that is not allowed, in words; empty if there is none."""
    with contextlib.suppress(ValueError, AttributeError, RecursionError):
        given = json.loads(answer)
        faults = [value_fault(field, given[field.name]) for field in mission.fields if field.name in given]
        return next(filter(None, faults), "")
    return ""


def read_records(path: Path, mission: Mission) -> list[Record]:
    """All records of one split file; raises RecordError that names the first bad line as `file:line`."""
    records = []
    try:
        for number, line in numbered_lines(path):
            try:
                records.append(record_of(line, mission))
            except RecordError as error:
                raise RecordError(f"{path}:{number}: {error.message}", error.fix) from None
    except FileNotFoundError:
        raise RecordError(
            f"{path} does not exist.", "Build a dataset with 'orion dataset', or pass the folder of a dataset."
        ) from None
    except RecordError:
        raise
    except OrionError as error:
        raise RecordError(error.message, error.fix) from None
    if not records:
        raise RecordError(f"{path} has no records.", "Build the dataset again.")
    return records


def read_split(dataset: Path, split: Split, mission: Mission) -> list[Record]:
    return read_records(split_path(dataset, split), mission)


def write_split(dataset: Path, split: Split, records: Iterable[Record]) -> None:
    write_text(split_path(dataset, split), "".join(record.to_line() + "\n" for record in records))


def image_path(dataset: Path, record: Record, root: Path | None = None) -> Path:
    """The record's file; raises RecordError for a circular link or one out of `root` (default: the dataset folder).

    A file whose name has the other Unicode form (NFC, NFD) is the same file.
    """
    path = dataset / record.image
    try:
        path = existing(dataset, record.image)
        inside = path.resolve().is_relative_to((root or dataset).resolve())
    except (OSError, RuntimeError, ValueError) as error:
        raise RecordError(f"{path} is not a valid path: {error}.", "Replace it by the image file.") from None
    if not inside:
        raise RecordError(f"{path} is outside {dataset}.", "Copy the image into the dataset folder.")
    return path
