"""A self-contained HTML page about a dataset and the findings of its check: counts, map, contact sheet.

Reasons, names and findings come from third-party files, so the template escapes every value.
"""

import base64
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
from orion_triage.mission.contract import mission_of
from orion_triage.mission.mission import colours, what_happens
from orion_triage.mission.prompt import Coordinates
from orion_triage.progress import Progress, silent
from orion_triage.safe.tables import read_csv
from orion_triage.settings import SPLITS, Split

SAMPLE = 2000  # cards; a page with this many has about 14 MB
MORE_WITH_FINDINGS = 500  # cards in addition to the sample, so that the frames of findings are shown
LISTED = 200  # findings per check

TABLES = ("frames.csv", "targets.csv")  # the first existing one contains the morphologies
_LINE = re.compile(r"\b(train|val|test)_dataset\.jsonl:(\d+)\b")


@dataclass
class Card:
    """A frame with its label in one split, in training usually from two lines; two labels give two cards."""

    split: Split
    record: Record  # of its first line
    lines: list[int] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)  # and further fields; without repetitions, like the places
    places: list[Coordinates] = field(default_factory=list)
    morphology: str = ""
    findings: list["Found"] = field(default_factory=list)
    number: int = 0  # position among all frames, in the order of the page
    shown: bool = False
    picture: str = ""  # a data URL; empty if there is no picture to show
    absent: str = ""  # the reason, if `picture` is empty


@dataclass(frozen=True)
class Found:
    """A finding and the cards that it names, in `place` and in the text of its message (as links)."""

    number: int
    listed: bool  # whether it is in the list of findings, which has the first LISTED of each check
    finding: Finding
    place: list[tuple[str, Card | None]]
    message: list[tuple[str, Card | None]]


@dataclass
class Contents:
    """The content of a folder's splits: cards in the order of the page, numbers of lines, and faults."""

    cards: list[Card]
    lines: int
    without_coordinates: int  # lines
    bad_lines: Counter[str]  # by file
    faults: list[str]  # messages about whole files


def render_view(
    folder: Path,
    findings: Sequence[Finding],
    *,
    root: Path | None = None,
    thumbnail_pixels: int = 128,
    progress: Progress = silent,
) -> str:
    """The HTML document, about 6 kB per frame with thumbnails of 128x128.

    Of more than SAMPLE frames, an even sample is shown, and the page states this. Bad lines, and frames that are
    missing, damaged or outside `root` (default: the folder), are reported on the page. Raises RecordError if the
    folder has no split.
    """
    mission = mission_of(folder)
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
        name="/".join(folder.resolve().parts[-2:]),  # usually RUN/dataset
        contents=contents,
        splits=SPLITS,
        categories=mission.names,
        colours=colours(mission),
        what_happens=what_happens(mission),
        counts=Counter((card.split, card.record.verdict.category) for card in contents.cards),
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
        parts=lambda name: re.split(r"(?<=[/_])", name),  # where a long name can wrap
    )


def read_contents(folder: Path) -> Contents:
    """Read every line of the three splits; an invalid line is counted and raises nothing."""
    if not any(split_path(folder, split).is_file() for split in SPLITS):
        names = ", ".join(split_path(Path(), split).name for split in SPLITS)
        raise RecordError(f"{folder} has no {names}.", "Pass a dataset folder, or build one with 'orion dataset'.")
    entries, faults = read_entries(folder, mission_of(folder))
    morphologies = _morphologies(folder)
    cards: dict[tuple[Split, str, str], Card] = {}
    for entry in entries:
        record = entry.record
        card = cards.setdefault((entry.split, record.image, record.verdict.category), Card(entry.split, record))
        card.lines.append(entry.line)
        values = ", ".join(f"{name}: {value}" for name, value in record.verdict.fields)
        for said in (record.verdict.reason, *([values] if values else [])):
            if said not in card.reasons:
                card.reasons.append(said)
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
    return SPLITS.index(card.split), card.record.mission.names.index(card.record.verdict.category)


def _names(record: Record) -> Iterator[str]:
    """The names that a table may use for an image: of the file, of the place, and of the place of a repeated tile."""
    for name in (record.name, record.name.removeprefix(f"{record.verdict.category.lower()}_")):
        yield name
        yield name.rpartition("~")[0]


def _morphologies(folder: Path) -> dict[str, str]:
    """Name -> morphology; empty without a table that has these columns."""
    path = next((folder / name for name in TABLES if (folder / name).is_file()), None)
    if path is None:
        return {}
    try:
        rows = [row for _, row in read_csv(path)]
    except OrionError:  # a fault of this table is a finding of the check
        return {}
    return {row["name"]: row["morphology"] for row in rows if row.get("name") and row.get("morphology")}


def linked(folder: Path, cards: Sequence[Card], findings: Sequence[Finding]) -> list[Found]:
    """The findings, errors first, then by check; also attaches each finding to the cards that it names."""
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
        if pictures := images.get(finding.place.removeprefix(f"{folder}/")):  # an image can be in several splits
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
    """(severity, check, its findings), in the given order."""
    grouped = groupby(found, key=lambda one: (one.finding.severity, one.finding.check))
    return [(severity, check, list(members)) for (severity, check), members in grouped]


def sampled(cards: Sequence[Card]) -> tuple[list[Card], int]:
    """The cards to show, and how many of them are shown only because of their findings.

    Of more than SAMPLE cards, every split and category contributes its share, evenly spaced in the order of the page.
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
    """Yield the cards with their thumbnails, in order. Uses threads: Pillow releases the GIL while it decodes."""

    def draw(card: Card) -> Card:
        try:
            path = image_path(folder, card.record, root)
            frame = read_frame(path, CAMERA_SIZE, resize=True)
        except OrionError as error:
            card.absent = error.message.replace(f"{folder}/", "")
        except (OSError, ValueError) as error:  # a name that is invalid in this file system
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
    return [(SPLITS[key[0]], one.record.verdict.category, [one, *rest]) for key, (one, *rest) in grouped]


def _morphology_table(cards: Iterable[Card]) -> list[tuple[str, str, dict[str, int]]]:
    """(category, morphology, frames by split); empty if no morphology is known."""
    counts: dict[tuple[int, str], Counter[str]] = defaultdict(Counter)
    names: dict[int, str] = {}
    for card in cards:
        place = _group(card)[1]
        names[place] = card.record.verdict.category
        counts[place, card.morphology][card.split] += 1
    if not any(morphology for _, morphology in counts):
        return []
    return [(names[place], name, by_split) for (place, name), by_split in sorted(counts.items())]


def world(cards: Sequence[Card]) -> dict[str, Any]:
    """The map in degrees, y down: its `box` (x, y, width, height), the `land` as an SVG path, and the `points`.

    The most frequent category comes first, so that rarer ones are drawn on top. The far south is omitted if it has no
    place.
    """
    points = [(place.lon, -place.lat, card) for card in cards for place in card.places]
    common = Counter(_group(card) for card in cards)
    points.sort(key=lambda point: (-common[_group(point[2])], _group(point[2])[1] == 0, point[2].number))
    top = -90 if any(y < -80 for _, y, _ in points) else -85
    bottom = 90 if any(y > 57 for _, y, _ in points) else 60
    land = "".join("M" + "L".join(f"{lon:g} {-lat:g}" for lon, lat in ring[:-1]) + "Z" for ring in outline())
    return {"box": (-182, top - 2, 364, bottom - top + 4), "land": land, "points": points}
