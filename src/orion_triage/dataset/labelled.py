"""A few labelled frames of a camera: read once, to fit a head on them or to train with them."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from orion_triage.dataset.check.facts import Entry, facts_of, looks_at
from orion_triage.dataset.check.facts import Picture as Facts
from orion_triage.dataset.check.leakage import leaks
from orion_triage.dataset.check.soundness import made_with
from orion_triage.dataset.collect import Conversions
from orion_triage.dataset.dataset import Dataset
from orion_triage.dataset.records import Record
from orion_triage.dataset.sources.directory import Directory
from orion_triage.dataset.sources.source import Picture, Shot
from orion_triage.errors import OrionError
from orion_triage.imagery.frames import CAMERA_SIZE, Frame, is_blank, read_frame, shrink
from orion_triage.imagery.stretch import Stretch
from orion_triage.mission.mission import Mission
from orion_triage.mission.prompt import Coordinates
from orion_triage.mission.verdict import Verdict
from orion_triage.settings import Split

if TYPE_CHECKING:
    from PIL import Image

FEWEST = 6  # labelled frames; with fewer, a cross-validation says nothing


@dataclass(frozen=True)
class Labelled:
    """A labelled frame of the camera's size and its file; `place` names those that are alike."""

    name: str
    verdict: Verdict
    coordinates: Coordinates | None
    path: Path
    image: "Image.Image"

    @property
    def category(self) -> str:
        return self.verdict.category

    @property
    def place(self) -> str:
        return f"{self.coordinates.lon} {self.coordinates.lat}" if self.coordinates else self.name


def read_labelled(folder: Path, mission: Mission, stretch: Stretch | None = None) -> tuple[list[Labelled], list[str]]:
    """(The frames of a folder in any layout of `orion run --dataset FOLDER`, what is left out and converted in words.)

    Frames of the split test are left out: they are for judging what is made of the others. So are blank frames if the
    mission has a rule for them: no model is asked about them. The same picture twice counts once. Raises OrionError
    that lists mistakes, and for too few frames or categories.
    """
    source = Directory(folder, mission)
    splits = Counter(target.split for target in source.targets)
    targets = [target for target in source.targets if target.split != "test"]
    found: dict[bytes, Labelled] = {}
    again, conversions = 0, Conversions()
    for target, answer in zip(targets, source.pictures([Shot(one) for one in targets]), strict=True):
        assert isinstance(answer, Picture)
        assert isinstance(answer.data, Path)
        read = read_frame(answer.data, CAMERA_SIZE, resize=True, stretch=stretch)
        conversions.add(str(answer.data), read)
        image = read.image
        verdict = Verdict(target.reason, target.category, target.fields)
        own = Labelled(target.file or target.name, verdict, target.coordinates, answer.data, image)
        first = found.setdefault(hashlib.sha256(image.tobytes()).digest(), own)
        if first.category != own.category:
            raise OrionError(
                f"{first.path} and {own.path} are the same picture, labelled {first.category} and {own.category}.",
                "Keep the one with the right label.",
            )
        again += first is not own
    # In an order of their own, so that the folds do not depend on names and folders.
    ordered = [found[key] for key in sorted(found)]
    frames = [frame for frame in ordered if not (mission.blank and is_blank(frame.image))]
    blank = len(found) - len(frames)
    if len(frames) < FEWEST:
        beside = f" beside {splits['test']} of the split test, which is for judging" if splits["test"] else ""
        raise OrionError(
            f"{folder} has {len(frames)} labelled frames{beside}.", f"Add frames: at least {FEWEST} are needed."
        )
    if len({frame.category for frame in frames}) < 2:
        raise OrionError(f"all labelled frames are {frames[0].category}.", "Add frames of another category.")
    if len({frame.place for frame in frames}) < 2:
        raise OrionError("all labelled frames are of one place.", "Add frames of other places.")
    notes = [_splits_in_words(splits)] if splits.keys() - {None} else []
    notes += [f"left out: {blank} blank frame{'s' * (blank > 1)}, which the blank rule decides"] if blank else []
    notes += [f"left out: {again} picture{'s' * (again > 1)} that the folder has already"] if again else []
    return frames, [*notes, *source.unused_columns, *source.left_out, *conversions.in_words()]


def _splits_in_words(splits: Counter[Split | None]) -> str:
    """How many rows of which split are used, and how many not."""
    used = [f"{splits[split]} of {split or 'no split'}" for split in ("train", "val", None) if splits[split]]
    left = f"; left out: {splits['test']} of test, which are for judging" if splits["test"] else ""
    return f"labelled rows used: {', '.join(used)}{left}"


def turned(image: "Image.Image") -> "list[Image.Image]":
    """The image in its eight orientations: quarter turns and their mirror images, as it is first."""
    from PIL.Image import Transpose

    return [image, *(image.transpose(how) for how in Transpose)]


def to_train(
    frames: Sequence[Labelled], mission: Mission, frame_size: int
) -> "tuple[list[Record], dict[str, Image.Image]]":
    """(Training records, image name -> picture of the model's size) of the frames in their eight orientations.

    Each without coordinates, and with them where the frame has a position, as in a dataset.
    """
    records: list[Record] = []
    pictures: dict[str, Image.Image] = {}
    for number, frame in enumerate(frames):
        for turn, picture in enumerate(turned(shrink(frame.image, frame_size))):
            name = f"labelled/{number}/{turn}"
            record = Record(name, frame.coordinates, frame.verdict, mission)
            records += [record, record.without_coordinates()] if frame.coordinates else [record]
            pictures[name] = picture
    return records, pictures


def refuse_leaks(frames: Sequence[Labelled], dataset: Dataset) -> None:
    """Raise OrionError if a frame, in any orientation, is one of the dataset's val or test splits, or shows its ground.

    The rules are those of `orion dataset check`: equal pixels, pictures that differ only by re-encoding, brightness or
    a shift, and places closer than the width of a frame.
    """
    if not frames:
        return
    metres, distance, _ = made_with(dataset.folder)
    entries, pictures = [], {}
    for number, frame in enumerate(frames):
        for turn, image in enumerate(turned(frame.image)):
            name = f"{frame.path}#{turn}" if turn else str(frame.path)
            entries.append(
                Entry("train", number, Record(name, frame.coordinates, frame.verdict, dataset.mission), name)
            )
            pictures[name] = facts_of(Frame(image, image.size))
    # Both splits as one: what they share with each other is not asked here.
    kept = {record.image: record for split in ("val", "test") for record in dataset.records(split)}
    for record, look in zip(kept.values(), looks_at([str(dataset.path(one)) for one in kept.values()]), strict=True):
        entries.append(Entry("val", 0, record, record.image))
        if isinstance(look, Facts):
            pictures[record.image] = look
    found = leaks(entries, pictures, metres_per_pixel=metres, split_distance_km=distance)
    if wrong := [one for one in found if one.severity == "error" or one.check == "near-identical"]:
        raise OrionError(
            f"{len(wrong)} frames of the val and test splits are among the labelled frames that would be trained: "
            f"{wrong[0].message}",
            "Leave them out of the folder: what is measured on these splits would be too good.",
        )
