"""A dataset and the findings of its check -> one HTML page that needs nothing else: counts, map, contact sheet.

Reasons, names and findings are whatever someone's files say: the template escapes every value.
"""

import base64
import csv
import hashlib
import io
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from orion_triage import templates
from orion_triage.dataset.check.facts import Finding, read_entries
from orion_triage.dataset.land import outline
from orion_triage.dataset.records import Record, image_path, split_path
from orion_triage.errors import OrionError, RecordError, printable
from orion_triage.imagery.frames import CAMERA_SIZE, read_frame, shrink
from orion_triage.mission.prompt import Coordinates
from orion_triage.mission.verdict import CATEGORIES, Category
from orion_triage.progress import Progress, silent
from orion_triage.settings import SPLITS, Split

SAMPLE = 2000  # cards; a page of so many weighs some 14 MB
MORE_WITH_FINDINGS = 500  # cards beside the sample, so that a finding's frame can be looked at
LISTED = 200  # findings of one check

TABLES = ("frames.csv", "targets.csv")  # the first that is there names the morphologies
_LINE = re.compile(r"\b(train|val|test)_dataset\.jsonl:(\d+)\b")


@dataclass
class Card:
    """A frame as one split labels it: in training mostly two lines. Two labels of one frame are two cards."""

    split: Split
    record: Record  # of its first line
    lines: list[int] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)  # without repetitions, as are the places
    places: list[Coordinates] = field(default_factory=list)
    morphology: str = ""
    findings: list["Found"] = field(default_factory=list)
    number: int = 0  # in the order of the page, of all frames
    shown: bool = False
    picture: str = ""  # a data address; empty when there is no picture to show, and then
    absent: str = ""  # why


@dataclass(frozen=True)
class Found:
    """A finding, and the card of each place that it names: in `place` and, as text to link, in its message."""

    number: int
    listed: bool  # whether the list of findings has it: of one check it has the first LISTED
    finding: Finding
    place: list[tuple[str, Card | None]]
    message: list[tuple[str, Card | None]]


@dataclass
class Contents:
    """What the splits of a folder hold: cards in the page's order, lines, and what cannot be shown."""

    cards: list[Card]
    lines: int
    without_coordinates: int  # lines
    bad_lines: Counter[str]  # by file
    faults: list[str]  # of whole files, in words


def render_view(
    folder: Path,
    findings: Sequence[Finding],
    *,
    root: Path | None = None,
    thumbnail_pixels: int = 128,
    progress: Progress = silent,
) -> str:
    """The document, some 6 kB a frame with thumbnails of 128x128.

    Of more than SAMPLE frames an even sample is shown, and said to be one. Bad lines and frames that are missing,
    damaged or outside `root` (the folder, if not given) do not end it; raises RecordError when no split is there.
    """
    contents = read_contents(folder)
    found = linked(folder, contents.cards, findings)
    shown, extra = sampled(contents.cards)
    for done, card in enumerate(_with_pictures(folder, shown, root, thumbnail_pixels), start=1):
        card.shown = True
        progress("making thumbnails", done, len(shown))
    return templates.fill(
        "dataset",
        "view.html.j2",
        filters={"sha256": lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()},
        finalize=lambda value: printable(value) if type(value) is str else value,
        name="/".join(folder.resolve().parts[-2:]),  # mostly RUN/dataset
        contents=contents,
        splits=SPLITS,
        categories=[category.value for category in CATEGORIES],
        counts=Counter((card.split, card.record.verdict.category.value) for card in contents.cards),
        morphologies=_morphology_table(contents.cards),
        shown=shown,
        extra=extra,
        groups=_groups(shown),
        unmapped=sum(not card.places for card in shown),
        unshown=sum(not card.picture for card in shown),
        map=world(shown),
        found=found,
        checks=_checks(found),
        marked=sum(bool(card.findings) for card in shown),
        listed=LISTED,
        parts=lambda name: re.split(r"(?<=[/_])", name),  # where a long name may be broken
    )


def read_contents(folder: Path) -> Contents:
    """Every line of the three splits; a line that is no record is counted, not raised."""
    if not any(split_path(folder, split).is_file() for split in SPLITS):
        names = ", ".join(split_path(Path(), split).name for split in SPLITS)
        raise RecordError(f"{folder} has no {names}.", "Pass a dataset folder, or build one with 'orion dataset'.")
    entries, faults = read_entries(folder)
    morphologies = _morphologies(folder)
    cards: dict[tuple[Split, str, Category], Card] = {}
    for entry in entries:
        record = entry.record
        card = cards.setdefault((entry.split, record.image, record.verdict.category), Card(entry.split, record))
        card.lines.append(entry.line)
        if record.verdict.reason not in card.reasons:
            card.reasons.append(record.verdict.reason)
        if record.coordinates and record.coordinates not in card.places:
            card.places.append(record.coordinates)
        card.morphology = next((morphologies[name] for name in _names(record) if name in morphologies), "")
    ordered = sorted(cards.values(), key=lambda card: (*_group(card), card.morphology, card.record.image))
    for number, card in enumerate(ordered):
        card.number = number
    bad = Counter(fault.place.partition(":")[0] for fault in faults if ":" in fault.place)
    return Contents(
        ordered,
        len(entries) + bad.total(),
        sum(entry.record.coordinates is None for entry in entries),
        bad,
        [fault.message for fault in faults if ":" not in fault.place],
    )


def _group(card: Card) -> tuple[int, int]:
    return SPLITS.index(card.split), CATEGORIES.index(card.record.verdict.category)


def _names(record: Record) -> Iterator[str]:
    """The names under which a table may have it: the file's, the place's, and the place's of a repeated tile."""
    for name in (record.name, record.name.removeprefix(f"{record.verdict.category.lower()}_")):
        yield name
        yield name.rpartition("~")[0]


def _morphologies(folder: Path) -> dict[str, str]:
    """Name -> morphology; nothing where no table is there, or one without these columns."""
    path = next((folder / name for name in TABLES if (folder / name).is_file()), None)
    if path is None:
        return {}
    rows = csv.DictReader(path.read_text(encoding="utf-8", errors="replace").splitlines())
    return {row["name"]: row["morphology"] for row in rows if row.get("name") and row.get("morphology")}


def linked(folder: Path, cards: Sequence[Card], findings: Sequence[Finding]) -> list[Found]:
    """The findings, errors first, then by check; every card that one names gets it."""
    lines: dict[tuple[str, int], Card] = {(card.split, number): card for card in cards for number in card.lines}
    images: dict[str, list[Card]] = defaultdict(list)
    for card in cards:
        images[card.record.image].append(card)

    def places(text: str) -> list[tuple[str, Card | None]]:
        parts = _LINE.split(text)  # text, split, line, text, split, line, ..., text
        result: list[tuple[str, Card | None]] = [(parts[0], None)]
        for split, line, after in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
            result += [(f"{split}_dataset.jsonl:{line}", lines.get((split, int(line)))), (after, None)]
        return [part for part in result if part[0]]

    result: list[Found] = []
    of_check: Counter[tuple[str, str]] = Counter()
    for number, finding in enumerate(sorted(findings, key=lambda f: (f.severity != "error", f.check))):
        where = places(finding.place)
        if pictures := images.get(finding.place.removeprefix(f"{folder}/")):  # a picture can be in several splits
            where = [(finding.place, pictures[0]), *((f" {card.split}", card) for card in pictures[1:])]
        listed = of_check[finding.severity, finding.check] < LISTED
        of_check[finding.severity, finding.check] += 1
        found = Found(number, listed, finding, where, places(finding.message))
        named = {card.number: card for _, card in (*found.place, *found.message) if card}
        for card in named.values():
            card.findings.append(found)
        result.append(found)
    return result


def _checks(found: Iterable[Found]) -> list[tuple[str, str, list[Found]]]:
    """(severity, check, its findings), as they come."""
    grouped = groupby(found, key=lambda one: (one.finding.severity, one.finding.check))
    return [(severity, check, list(members)) for (severity, check), members in grouped]


def sampled(cards: Sequence[Card]) -> tuple[list[Card], int]:
    """The cards to show, and how many of them only for their findings.

    Of more than SAMPLE every split and category gives its share, evenly spaced in the page's order.
    """
    if len(cards) <= SAMPLE:
        return list(cards), 0
    chosen: set[int] = set()
    for _, members in groupby(cards, key=_group):
        group = list(members)
        share = max(1, SAMPLE * len(group) // len(cards))
        chosen |= {group[step * len(group) // share].number for step in range(share)}
    marked = [card for card in cards if card.findings and card.number not in chosen]
    marked.sort(key=lambda card: card.findings[0].number)
    more = {card.number for card in marked[:MORE_WITH_FINDINGS]}
    return [card for card in cards if card.number in chosen | more], len(more)


def _with_pictures(folder: Path, cards: Sequence[Card], root: Path | None, pixels: int) -> Iterator[Card]:
    """The cards with their thumbnails, in order. Threads, because Pillow decodes outside the interpreter's lock."""

    def draw(card: Card) -> Card:
        try:
            path = image_path(folder, card.record, root)
            frame = read_frame(path, CAMERA_SIZE, resize=True)
        except OrionError as error:
            card.absent = error.message.replace(f"{folder}/", "")
        except (OSError, ValueError) as error:  # a name that this file system cannot have
            card.absent = f"{card.record.image} cannot be read: {error}."
        else:
            buffer = io.BytesIO()
            shrink(frame.image, pixels).save(buffer, "JPEG", quality=80, optimize=True)
            card.picture = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
        return card

    with ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), 8)) as pool:
        yield from pool.map(draw, cards)


def _groups(cards: Sequence[Card]) -> list[tuple[str, str, list[Card]]]:
    """(split, category, cards) of the contact sheet."""
    grouped = groupby(cards, key=_group)
    return [(SPLITS[split], CATEGORIES[category].value, list(members)) for (split, category), members in grouped]


def _morphology_table(cards: Iterable[Card]) -> list[tuple[str, str, dict[str, int]]]:
    """(category, morphology, frames by split); empty when no morphology is known."""
    counts: dict[tuple[int, str], Counter[str]] = defaultdict(Counter)
    for card in cards:
        counts[_group(card)[1], card.morphology][card.split] += 1
    if not any(morphology for _, morphology in counts):
        return []
    return [(CATEGORIES[place].value, name, by_split) for (place, name), by_split in sorted(counts.items())]


def world(cards: Sequence[Card]) -> dict[str, Any]:
    """The map in degrees, y down: its `box` (x, y, width, height), the `land` as a path and the `points`.

    Commonest first, so that the rarer lie on top; the far south is left out where no place is.
    """
    points = [(place.lon, -place.lat, card) for card in cards for place in card.places]
    common = Counter(_group(card) for card in cards)
    points.sort(key=lambda point: (-common[_group(point[2])], _group(point[2])[1] == 0, point[2].number))
    top = -90 if any(y < -80 for _, y, _ in points) else -85
    bottom = 90 if any(y > 57 for _, y, _ in points) else 60
    land = "".join("M" + "L".join(f"{lon:g} {-lat:g}" for lon, lat in ring[:-1]) + "Z" for ring in outline())
    return {"box": (-182, top - 2, 364, bottom - top + 4), "land": land, "points": points}
