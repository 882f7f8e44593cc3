"""The facts of a dataset folder: its lines and pictures, read once, and the faults found while reading.

Only 0.7 kB of numbers are kept per picture, so memory does not grow with the pixels.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from orion_triage.dataset.records import IMAGES_FOLDER, EncodingError, Record, image_path, record_of, split_path
from orion_triage.errors import FrameError, OrionError, RecordError
from orion_triage.imagery.frames import CAMERA_SIZE, Frame, is_blank, read_frame, shrink
from orion_triage.imagery.stretch import Stretch
from orion_triage.mission.mission import Mission
from orion_triage.progress import Progress
from orion_triage.safe.children import workers
from orion_triage.safe.folders import composed, listing
from orion_triage.safe.tables import numbered_lines
from orion_triage.settings import SPLITS, Split

Severity = Literal["error", "warning"]
THUMBNAIL_SIZE = 16
_FEWEST_FOR_WORKERS = 64  # starting two workers takes as long as reading this many pictures (1 s)


@dataclass(frozen=True)
class Finding:
    """One fault: `check` is its kind, `place` a split file, a line in it (`train_dataset.jsonl:12`) or a picture."""

    severity: Severity
    check: str
    place: str
    message: str
    fix: str


@dataclass(frozen=True)
class Entry:
    """A record and its line, counted from 1; `origin` is where it stands in a folder that is no dataset yet."""

    split: Split
    line: int
    record: Record
    origin: str = ""

    @property
    def place(self) -> str:
        return self.origin or f"{split_path(Path(), self.split)}:{self.line}"

    @property
    def image(self) -> str:
        return self.record.image

    def finding(self, severity: Severity, check: str, message: str, fix: str) -> Finding:
        return Finding(severity, check, self.place, message, fix)


@dataclass(frozen=True)
class Picture:
    """The facts kept of a decoded 512x512 frame.

    `pixels` is the SHA-256 of its RGB bytes, `perceptual_hash` 64 bits, `thumbnail` the bytes of float16 [256]: grey
    levels of 16x16 with mean 0 and length 1 (all 0 for a single colour). `native_size` is (width, height) in the file,
    `changes` the conversions that it needs.
    """

    native_size: tuple[int, int]
    changes: tuple[str, ...]
    pixels: bytes
    perceptual_hash: int
    thumbnail: bytes
    blank: bool


def read_entries(folder: Path, mission: Mission) -> tuple[list[Entry], list[Finding]]:
    """Every valid line of the three splits; an invalid line, a missing file and an empty file are findings."""
    entries: list[Entry] = []
    findings: list[Finding] = []
    for split in SPLITS:
        path = split_path(folder, split)
        lines = 0
        try:
            for number, line in numbered_lines(path):
                lines += 1
                try:
                    entries.append(Entry(split, number, record_of(line, mission)))
                except RecordError as error:
                    check = "not-utf8" if isinstance(error, EncodingError) else "schema"
                    findings.append(Finding("error", check, f"{path.name}:{number}", error.message, error.fix))
        except OSError as error:
            message = f"the {split} split cannot be read: {error.strerror}."
            findings.append(Finding("error", "missing-file", path.name, message, "Add it: all three are needed."))
        except OrionError as error:
            message = f"the {split} split cannot be read: {error.message}"
            findings.append(Finding("error", "missing-file", path.name, message, error.fix))
        else:
            if not lines:
                message, fix = f"the {split} split has no records.", "Build the dataset again."
                findings.append(Finding("error", "empty-file", path.name, message, fix))
    return entries, findings


def read_pictures(
    folder: Path, entries: Sequence[Entry], *, root: Path | None, resize: bool, progress: Progress
) -> tuple[dict[str, Picture], list[Finding]]:
    """Image -> its facts, each decoded once; an unusable image is a finding at its first line."""
    paths, findings = _paths(folder, entries, root)
    found: dict[str, Picture] = {}
    looks = looks_at([str(path) for _, path in paths])
    for done, ((entry, _), look) in enumerate(zip(paths, looks, strict=True), start=1):
        progress("checking frames", done, len(paths))
        if isinstance(look, Picture):
            found[entry.image] = look
            findings += form_findings(entry, look, resize)
        else:
            findings.append(entry.finding("error", "unusable-image", look[0], look[1]))
    return found, findings


def _paths(folder: Path, entries: Sequence[Entry], root: Path | None) -> tuple[list[tuple[Entry, Path]], list[Finding]]:
    """(first line that names it, file) of every existing picture; the missing ones are one finding per split."""
    paths: list[tuple[Entry, Path]] = []
    findings: list[Finding] = []
    missing: dict[Split, dict[str, Entry]] = {split: {} for split in SPLITS}
    there: dict[str, bool] = {}
    for entry in entries:
        if entry.image not in there:
            try:
                path = image_path(folder, entry.record, root)
                there[entry.image] = path.is_file()
                if there[entry.image]:
                    paths.append((entry, path))
            except RecordError as error:
                there[entry.image] = True
                findings.append(entry.finding("error", "image-outside", error.message, error.fix))
            except (OSError, ValueError, RuntimeError):  # a name too long or not encodable, circular links
                there[entry.image] = False
        if not there[entry.image]:
            missing[entry.split].setdefault(entry.image, entry)
    for lost in missing.values():
        if lost:
            first = next(iter(lost.values()))
            message = f"{len(lost)} pictures of the {first.split} split are missing, for example {first.image}."
            fix = "Copy them to the paths that the records name, relative to the dataset folder."
            findings.append(first.finding("error", "missing-image", message, fix))
    return paths, findings


def looks_at(paths: list[str], stretch: Stretch | None = None) -> Iterator[Picture | tuple[str, str]]:
    """`_look` at each picture, in order; a worker holds one picture at a time."""
    look = partial(_look, stretch=stretch) if stretch else _look
    if len(paths) < _FEWEST_FOR_WORKERS:
        yield from map(look, paths)
        return
    with workers() as pool:
        yield from pool.map(look, paths, chunksize=16)


def _look(path: str, stretch: Stretch | None = None) -> Picture | tuple[str, str]:
    """The picture's facts, or the fault and its fix."""
    try:
        frame = read_frame(Path(path), CAMERA_SIZE, resize=True, stretch=stretch)
    except FrameError as error:
        return error.message, error.fix
    return facts_of(frame)


def facts_of(frame: Frame) -> Picture:
    """The facts of a decoded frame of 512x512 pixels."""
    import imagehash

    grey = np.asarray(shrink(frame.image.convert("L").convert("F"), THUMBNAIL_SIZE), dtype=np.float64).ravel()
    grey -= grey.mean()
    grey /= np.linalg.norm(grey) or 1.0
    return Picture(
        frame.native_size,
        frame.changes,
        hashlib.sha256(frame.image.tobytes()).digest(),
        int(str(imagehash.phash(frame.image)), 16),
        grey.astype(np.float16).tobytes(),
        is_blank(frame.image),
    )


def form_findings(entry: Entry, picture: Picture, resize: bool) -> Iterator[Finding]:
    if picture.native_size != (CAMERA_SIZE, CAMERA_SIZE):
        width, height = picture.native_size
        size = f"{entry.image} is {width}x{height}, not {CAMERA_SIZE}x{CAMERA_SIZE}"
        fix = "Set dataset.folder to this folder: the dataset stage crops the central square and scales it."
        if resize:
            yield entry.finding("warning", "image-size", f"{size}: it will be cropped and scaled.", fix)
        else:
            yield entry.finding("error", "image-size", f"{size}.", fix)
    if picture.changes:
        message = f"{entry.image} is not plain 8-bit RGB: {', '.join(picture.changes)}."
        yield entry.finding("warning", "image-mode", message, "Save it as 8-bit RGB to control the conversion.")


def unused_pictures(folder: Path, entries: Sequence[Entry]) -> list[Finding]:
    """One finding for all files of the images folder that no record names."""
    named = {composed(entry.image) for entry in entries}
    images = folder / IMAGES_FOLDER
    files = listing(images, recursive=True).files if images.is_dir() else []
    unused = [path for path in files if composed(path.relative_to(folder).as_posix()) not in named]
    if not unused:
        return []
    message = f"{len(unused)} pictures are in no record, for example this one."
    place = unused[0].relative_to(folder).as_posix()
    return [Finding("warning", "unused-image", place, message, "Delete them, or write records for them.")]
