"""Fetch pictures from a source and write the frames, their table, and the outcome of every place."""

import csv
import hashlib
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orion_triage.dataset.records import FRAMES_TABLE, IMAGES_FOLDER
from orion_triage.dataset.sources.source import Absent, ImagerySource, Picture, Shot
from orion_triage.errors import FrameError, OrionError
from orion_triage.imagery.camera import Camera, through
from orion_triage.imagery.frames import CAMERA_SIZE, LARGEST_BYTES, Frame, decode_frame, is_blank, read_frame
from orion_triage.imagery.png_jpeg import PNG
from orion_triage.imagery.stretch import Stretch
from orion_triage.progress import Progress
from orion_triage.safe.files import write_bytes, write_text
from orion_triage.safe.reading import read_bytes
from orion_triage.settings import SPLITS, Split

ABSENT_TABLE = "absent.csv"
FRAME_COLUMNS = (
    "image", "name", "split", "category", "morphology", "lon", "lat", "source", "native_width", "native_height",
    "metres_per_pixel", "captured_at", "licence", "attribution", "redistributable", "sha256", "file", "conversions",
    "clipped_share",
)  # fmt: skip
ABSENT_COLUMNS = ("name", "split", "category", "outcome", "why", "file")
_FEWEST_MISSING = 3  # fewer missing places never stop a build: one of 20 places is already 5 %
MANY_CLIPPED = 0.05  # of a frame's values outside the limits of the stretch; a usual one cuts 1 or 2 % at each end

Row = dict[str, Any]


@dataclass
class Collected:
    """`taken` are the shots with a frame, `rows` the origin of each frame, `absent` the reasons of missing frames.

    `account` counts the outcomes: fetched, cached, not visible, blank, failed. `conversions` are those of the frames.
    """

    taken: dict[Split, list[Shot]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    rows: list[Row] = field(default_factory=list)
    absent: list[Row] = field(default_factory=list)
    account: Counter[str] = field(default_factory=Counter)
    conversions: "Conversions" = field(default_factory=lambda: Conversions())

    def write_tables(self, folder: Path) -> None:
        write_text(folder / FRAMES_TABLE, csv_text(FRAME_COLUMNS, self.rows))
        if self.absent:
            write_text(folder / ABSENT_TABLE, csv_text(ABSENT_COLUMNS, self.absent))


def collect(
    folder: Path,
    source: ImagerySource,
    asked: Sequence[tuple[Split, Shot]],
    largest_missing_share: float,
    progress: Progress,
    stretch: Stretch | None = None,
    *,
    blank_category: str,
    camera: Camera | None = None,
) -> Collected:
    """Request every shot from the source and write its frame into `folder`; `stretch` is for the user's own files.

    With a `camera`, each frame is as seen through it; whether one is blank is asked of the picture before.

    A blank frame is left out unless it is labelled as the mission labels blank frames (`blank_category`).

    Raises OrionError as soon as more than `largest_missing_share` of the shots have no usable picture.
    """
    collected = Collected()
    blank_pixels: set[bytes] = set()
    most = most_missing(len(asked), largest_missing_share)
    verb = "drawing" if source.name == "synthetic" else "fetching"
    answers = source.pictures([shot for _, shot in asked])
    for done, ((split, shot), answer) in enumerate(zip(asked, answers, strict=True), start=1):
        frame = _usable(answer, shot, blank_pixels, stretch, blank_category)
        if isinstance(frame, Frame) and isinstance(answer, Picture):
            frame = through(frame, camera, shot.name)
            data = stored_bytes(answer.data, frame, PNG)
            write_bytes(folder / image_name(shot), data)
            collected.rows.append(_row(split, shot, source, frame, answer, data))
            collected.conversions.add(str(answer.data) if isinstance(answer.data, Path) else shot.name, frame)
            collected.taken[split].append(shot)
            collected.account["cached" if answer.cached else "fetched"] += 1
        elif isinstance(frame, Absent):
            cells = (shot.name, split, shot.target.category, frame.outcome, frame.why, shot.target.file)
            collected.absent.append(dict(zip(ABSENT_COLUMNS, cells, strict=True)))
            collected.account[frame.outcome] += 1
            if len(collected.absent) > most:
                outcomes = ", ".join(f"{count} {outcome}" for outcome, count in collected.account.items())
                raise OrionError(
                    f"{len(collected.absent)} of {len(asked)} places have no picture, more than "
                    f"dataset.largest_missing_share={largest_missing_share:g} allows. Outcomes of the first {done} "
                    f"places: {outcomes}. Last reason: {frame.why}",
                    "Convert or replace these pictures, or raise dataset.largest_missing_share."
                    if source.name == "directory"
                    else "Fix the source and run the same command again; fetched pictures are kept. "
                    "Or raise the setting.",
                )
        progress(f"{verb} frames", done, len(asked))
    return collected


def most_missing(asked: int, largest_missing_share: float) -> int:
    """How many of the places may have no picture; one more stops the build."""
    return max(_FEWEST_MISSING, int(largest_missing_share * asked))


def useless_blank(pixels: bytes, category: str, blank_category: str, seen: set[bytes]) -> bool:
    """Whether a blank frame is left out; `pixels` is a hash, and `seen` has those of earlier blank frames.

    A blank frame of another category than the mission's for blank frames is useless. Of that one, it may be open water,
    but the same blank pixels a second time are a server's tile for "no imagery".
    """
    before = pixels in seen
    seen.add(pixels)
    return before or category != blank_category


def _usable(
    answer: Picture | Absent, shot: Shot, blank_pixels: set[bytes], stretch: Stretch | None, blank_category: str
) -> Frame | Absent:
    """The frame of an answer, or the reason for its absence; `blank_pixels` has the hashes of earlier blank frames."""
    if isinstance(answer, Absent):
        return answer
    try:
        if isinstance(answer.data, Path):
            frame = read_frame(answer.data, CAMERA_SIZE, resize=True, stretch=stretch)
        else:
            frame = decode_frame(answer.data, shot.name, CAMERA_SIZE, resize=True)
    except FrameError as error:
        return Absent("failed", str(error))
    if is_blank(frame.image):
        pixels = hashlib.sha256(frame.image.tobytes()).digest()
        if useless_blank(pixels, shot.target.category, blank_category, blank_pixels):
            return Absent("blank", f"{shot.name} is blank.")
    return frame


def stored_bytes(received: bytes | Path, frame: Frame, *signatures: bytes) -> bytes:
    """The bytes of a dataset's picture: those received, if they are plain 8-bit RGB of 512x512, else a new PNG.

    `signatures` are those of the formats that can be stored.
    """
    if frame.native_size == (CAMERA_SIZE, CAMERA_SIZE) and not frame.changes:
        data = received if isinstance(received, bytes) else read_bytes(received, LARGEST_BYTES)
        if data.startswith(signatures):
            return data
    return frame.png()


def image_name(shot: Shot) -> str:
    """The record's image path; its prefix is the category, as published."""
    return f"{IMAGES_FOLDER}/{shot.target.category.lower()}_{shot.name}.png"


def _row(split: Split, shot: Shot, source: ImagerySource, frame: Frame, picture: Picture, data: bytes) -> Row:
    target, place = shot.target, shot.target.coordinates
    metres = frame.metres_per_pixel if picture.metres_per_pixel is None else picture.metres_per_pixel
    return {
        "image": image_name(shot),
        "name": target.name,
        "split": split,
        "category": target.category,
        "morphology": target.morphology,
        "lon": place.lon if place else "",
        "lat": place.lat if place else "",
        "source": source.name,
        "native_width": frame.native_size[0],
        "native_height": frame.native_size[1],
        "metres_per_pixel": "" if metres is None else round(metres, 3),
        "captured_at": picture.captured_at,
        "licence": source.licence,
        "attribution": source.attribution,
        "redistributable": {True: "yes", False: "no", None: "unknown"}[source.redistributable],
        "sha256": hashlib.sha256(data).hexdigest(),
        "file": target.file,
        "conversions": "; ".join(frame.changes),
        "clipped_share": "" if frame.clipped_share is None else round(frame.clipped_share, 4),
    }


@dataclass
class Conversions:
    """Which conversions the files of the frames needed: how many, and the first file of each."""

    frames: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    firsts: dict[str, str] = field(default_factory=dict)
    clipped: list[tuple[float, str]] = field(default_factory=list)

    def add(self, name: str, frame: Frame) -> None:
        self.frames += 1
        for change in frame.changes:
            self.counts[change] += 1
            self.firsts.setdefault(change, name)
        if frame.clipped_share is not None:
            self.clipped.append((frame.clipped_share, name))

    def in_words(self) -> list[str]:
        """One sentence per conversion, and one about frames with many values outside the stretch."""
        found = [
            f"{count} of {self.frames} pictures were converted: {change} (for example {self.firsts[change]})"
            for change, count in sorted(self.counts.items())
        ]
        if many := [one for one in self.clipped if one[0] > MANY_CLIPPED]:
            share, name = max(many)
            found.append(
                f"{len(many)} of {self.frames} pictures have more than {MANY_CLIPPED:.0%} of their values outside the "
                f"stretch's limits; most: {share:.1%} in {name}"
            )
        return found


def csv_text(columns: Sequence[str], rows: Iterable[Row]) -> str:
    """Write a CSV table with a header, in the order of the columns."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
