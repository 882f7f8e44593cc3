"""Check a finished dataset folder and report all faults together, each with its file, line and fix.

Errors stop training, warnings do not.
"""

import contextlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from orion_triage.dataset.check.facts import (
    Entry,
    Finding,
    Picture,
    Severity,
    read_entries,
    read_pictures,
    unused_pictures,
)
from orion_triage.dataset.check.leakage import leaks
from orion_triage.dataset.check.reasons import reason_findings, text_findings
from orion_triage.dataset.land import perhaps_swapped
from orion_triage.dataset.records import FRAMES_TABLE, is_published, split_path
from orion_triage.errors import OrionError, one_line
from orion_triage.mission.contract import mission_of
from orion_triage.mission.mission import Mission
from orion_triage.mission.prompt import Coordinates
from orion_triage.progress import Progress, silent
from orion_triage.runs.manifest import read_manifest
from orion_triage.safe.reading import shown
from orion_triage.safe.tables import number_of, read_csv
from orion_triage.settings import SPLITS, Split

_FEWEST_TEST_FRAMES = 10  # per class
_LARGEST_RATIO = 3.0  # of the most frequent category to the rarest
_NAMED_IN_ERROR = 3
_METRES_PER_PIXEL, _SPLIT_DISTANCE_KM = 10.0, 100.0  # for a dataset that does not specify them


@dataclass(frozen=True)
class Report:
    """The findings of the check, errors first, in the order of the files.

    `lines` counts the valid records by split, `pictures` the distinct pictures that they name by split and category,
    `frames` the pictures that could be decoded. `recognised` says what the folder is. Of a folder of the user's own,
    `rows` is the number of its labelled pictures, and `tables` has the columns; `next` is the command that comes next.
    """

    folder: str
    findings: list[Finding]
    lines: dict[Split, int]
    pictures: dict[Split, dict[str, int]]
    frames: int
    recognised: str = "a dataset in the published layout"
    rows: int | None = None
    tables: list[dict[str, Any]] = field(default_factory=list)
    next: str = ""

    @property
    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.severity == "error"]

    @property
    def warnings(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.severity == "warning"]

    def groups(self) -> list[tuple[Severity, str, list[Finding]]]:
        """The findings by severity and kind, errors first."""
        kinds: dict[tuple[Severity, str], list[Finding]] = defaultdict(list)
        for finding in self.findings:
            kinds[finding.severity, finding.check].append(finding)
        return [(severity, check, kinds[severity, check]) for severity, check in sorted(kinds)]

    def summary(self) -> list[str]:
        """One line that counts the warnings; empty without warnings."""
        if not self.warnings:
            return []
        counts = Counter(finding.check for finding in self.warnings)
        listed = ", ".join(f"{count} {check}" for check, count in counts.items())
        return [f"the dataset check warns: {listed} (details: 'orion dataset check {self.folder}')"]

    def to_json(self) -> str:
        totals = {"errors": len(self.errors), "warnings": len(self.warnings)}
        return json.dumps({**totals, **asdict(self)}, indent=1)


def check_dataset(
    folder: Path,
    mission: Mission | None = None,
    *,
    metres_per_pixel: float | None = None,
    split_distance_km: float | None = None,
    root: Path | None = None,
    resize: bool = True,
    progress: Progress = silent,
) -> Report:
    """Check every line and every picture of a dataset in the published layout; each picture is decoded once.

    `mission` is the dataset's own by default.

    The width of a frame on the ground is 512 * `metres_per_pixel`. Without arguments, this value and the distance
    between splits come from the dataset's tables, else they are 10 m and 100 km. `root` is as in records.image_path.
    With `resize`, pictures that are not 512x512 are warnings, because the dataset stage scales them; without, they
    are errors. Raises OrionError only if `folder` is not a folder with at least one of the three splits.
    """
    if not is_published(folder):
        raise OrionError(
            f"{folder} has no {', '.join(split_path(Path(), split).name for split in SPLITS)}.",
            "Pass a finished dataset, such as RUN/dataset. 'orion dataset --dataset FOLDER' makes one of a folder.",
        )
    mission = mission or mission_of(folder)
    known_metres, known_distance, of_table = made_with(folder)
    entries, findings = read_entries(folder, mission)
    # The picture of an invalid line is unknown, so pictures may only seem to be unused or to have no second record.
    of_all_lines = [] if findings else [*unused_pictures(folder, entries), *_twins(entries)]
    pictures, more = read_pictures(folder, entries, root=root, resize=resize, progress=progress)
    findings += [
        *more,
        *of_table,
        *of_all_lines,
        *_repeated_lines(entries),
        *_without_coordinates(entries),
        *of_any_split(entries, pictures),
        *of_the_splits(entries, mission),
        *leaks(
            entries,
            pictures,
            metres_per_pixel=metres_per_pixel or known_metres,
            split_distance_km=split_distance_km or known_distance,
        ),
    ]
    return report_of(folder, findings, entries, len(pictures), mission)


def of_any_split(entries: Sequence[Entry], pictures: Mapping[str, Picture]) -> list[Finding]:
    """The findings about records and pictures that do not depend on their splits."""
    return [*_contradictions(entries), *_odd_positions(entries), *_blanks(entries, pictures)]


def of_the_splits(entries: Sequence[Entry], mission: Mission) -> list[Finding]:
    """The findings about reasons, and about how many pictures each split has."""
    return [*reason_findings(entries, mission), *text_findings(entries, mission), *_balance(_counts(entries, mission))]


def report_of(
    folder: Path, findings: Sequence[Finding], entries: Sequence[Entry], frames: int, mission: Mission
) -> Report:
    """The report, with the findings in order and each on one line."""
    plain = [replace(f, place=one_line(f.place), message=one_line(f.message)) for f in findings]
    lines = Counter(entry.split for entry in entries)
    of_splits = {split: lines[split] for split in SPLITS}
    return Report(str(folder), sorted(plain, key=_order), of_splits, _counts(entries, mission), frames)


def require_sound(
    folder: Path,
    mission: Mission,
    *,
    root: Path | None = None,
    progress: Progress = silent,
) -> Report:
    """The report of a dataset without errors; raises OrionError that names the first errors."""
    report = check_dataset(folder, mission, root=root, resize=False, progress=progress)
    if report.errors:
        named = [f"{finding.place}: {finding.message}" for finding in report.errors[:_NAMED_IN_ERROR]]
        if rest := len(report.errors) - len(named):
            named.append(f"And {rest} more.")
        raise OrionError(
            f"{folder} has {len(report.errors)} errors. {' '.join(named)}",
            f"Run 'orion dataset check {folder}' to list all of them, each with its fix.",
        )
    return report


def made_with(folder: Path) -> tuple[float, float, list[Finding]]:
    """The largest metres per pixel in frames.csv, and the distance between splits (km) in the stage's manifest.

    A frames.csv that cannot be read is a finding: the width of a frame decides which pictures share ground.
    """
    metres = 0.0
    findings = []
    try:
        for line, row in read_csv(folder / FRAMES_TABLE):
            if cell := row.get("metres_per_pixel"):
                try:
                    metres = max(metres, number_of(cell))
                except ValueError:
                    message = f"metres_per_pixel {shown(cell)} is not a number"
                    raise OrionError(f"line {line}: {message}.", "Correct it.") from None
    except FileNotFoundError:
        pass
    except OrionError as error:
        message = error.message.removeprefix(f"{folder / FRAMES_TABLE}: ")
        message = f"{message} The check assumes {metres or _METRES_PER_PIXEL:g} m per pixel."
        findings.append(Finding("warning", "frames-table", FRAMES_TABLE, message, error.fix))
    distance = _SPLIT_DISTANCE_KM
    with contextlib.suppress(OrionError):
        stage_manifest = read_manifest(folder)
        if stage_manifest and stage_manifest.figures.get("split_distance_km"):
            distance = float(stage_manifest.figures["split_distance_km"])
    return metres or _METRES_PER_PIXEL, distance, findings


def _order(finding: Finding) -> tuple[bool, int, int, str]:
    """Sort key: errors first, then by file, line and kind."""
    match = re.fullmatch(rf"({'|'.join(SPLITS)})_dataset\.jsonl(?::(\d+))?", finding.place)
    file, line = (SPLITS.index(match[1]), int(match[2] or 0)) if match else (len(SPLITS), 0)
    return finding.severity != "error", file, line, finding.check


def _counts(entries: Sequence[Entry], mission: Mission) -> dict[Split, dict[str, int]]:
    named = {(entry.split, entry.image): entry.record.verdict.category for entry in entries}
    counted = Counter((split, category) for (split, _), category in named.items())
    return {split: {category: counted[split, category] for category in mission.names} for split in SPLITS}


def _by_image(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    found: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        found[entry.image].append(entry)
    return found


def _repeated_lines(entries: Sequence[Entry]) -> Iterator[Finding]:
    seen: dict[tuple[Split, object], Entry] = {}
    for entry in entries:
        first = seen.setdefault((entry.split, entry.record), entry)
        if first is entry:
            continue
        if entry.split == "train":
            message = f"the line repeats the record of line {first.line}: training weights it twice."
            yield entry.finding("warning", "repeated-line", message, "Delete the line, unless this is intended.")
        else:
            message = f"the line repeats the record of line {first.line}: confidence intervals become too narrow."
            yield entry.finding("error", "repeated-line", message, "Delete the line.")


def _contradictions(entries: Sequence[Entry]) -> Iterator[Finding]:
    """One picture or one pair of coordinates with two answers, and one picture at two positions."""
    by_place: dict[Coordinates, dict[str, Entry]] = defaultdict(dict)
    for image, (first, *others) in _by_image(entries).items():
        verdict = first.record.verdict
        for other in (e for e in others if e.record.verdict.category != verdict.category):
            message = f"{image} is {other.record.verdict.category} here and {verdict.category} in {first.place}."
            yield other.finding("error", "image-labels", message, "Keep the right category in all of its records.")
        if len({e.record.verdict.category for e in (first, *others)}) == 1:
            for other in (e for e in others if e.record.verdict.fields != verdict.fields):
                message = f"{image} has other values of the mission's fields in {first.place}."
                yield other.finding("error", "image-labels", message, "Keep the right values in all of its records.")
            for other in (e for e in others if e.record.verdict.reason != verdict.reason):
                message = f"{image} has another reason in {first.place}."
                yield other.finding("warning", "image-reasons", message, "Give its records one reason.")
        located = [(entry, where) for entry in (first, *others) if (where := entry.record.coordinates)]
        for entry, where in located:
            home, there = located[0]
            by_place[where].setdefault(image, entry)
            if where != there:
                message = f"{image} is at {_text(where)} here and at {_text(there)} in {home.place}"
                message += ": swapped." if (where.lon, where.lat) == (there.lat, there.lon) else "."
                yield entry.finding("error", "image-coordinates", message, "Correct the wrong one.")
    for where, named in by_place.items():
        home, *rest = named.values()
        for other in (e for e in rest if e.record.verdict.category != home.record.verdict.category):
            message = (
                f"{_text(where)} is {other.record.verdict.category} here and {home.record.verdict.category} in "
                f"{home.place}: the same prompt has two answers."
            )
            yield other.finding("error", "place-labels", message, "Correct the category or the coordinates.")


def _text(where: Coordinates) -> str:
    return f"({where.lon}, {where.lat})"


def _balance(counts: Mapping[Split, Mapping[str, int]]) -> Iterator[Finding]:
    for split, by_category in counts.items():
        name = split_path(Path(), split).name
        if not sum(by_category.values()):  # reported as another error
            continue
        counted = ", ".join(f"{count} {category}" for category, count in by_category.items())
        if missing := [category for category, count in by_category.items() if not count]:
            message = f"the {split} split has no {' and no '.join(missing)} picture ({counted})."
            yield Finding("error", "missing-category", name, message, "Add pictures of every category.")
            continue
        if max(by_category.values()) > _LARGEST_RATIO * min(by_category.values()):
            message = f"the {split} split is unbalanced: {counted}."
            yield Finding("warning", "imbalance", name, message, "Add pictures of the rare category.")
        if split == "test" and (fewest := min(by_category.values())) < _FEWEST_TEST_FRAMES:
            yield Finding("warning", "few-test-frames", name, _few(counted, fewest), "Add test pictures.")


def _few(counted: str, fewest: int) -> str:
    from scipy.stats import binomtest

    right = (fewest + 1) // 2
    interval = binomtest(right, fewest).proportion_ci(method="wilson")
    bounds = f"{100 * interval.low:.0f}..{100 * interval.high:.0f} %"
    return f"the test split has few pictures ({counted}): {right} of {fewest} right has the 95 % interval {bounds}."


def _twins(entries: Sequence[Entry]) -> Iterator[Finding]:
    """Training pictures without a record with, or without, coordinates: one finding for each of the two kinds."""
    shown: dict[bool, dict[str, Entry]] = {True: {}, False: {}}
    for entry in (entry for entry in entries if entry.split == "train"):
        shown[entry.record.coordinates is not None].setdefault(entry.image, entry)
    for has, lacks, condition in ((True, "without", "B"), (False, "with", "A")):
        if lone := [entry for image, entry in shown[has].items() if image not in shown[not has]]:
            message = f"{len(lone)} training pictures have no record {lacks} coordinates, for example {lone[0].image}: "
            message += f"condition {condition} uses prompts that training has not shown."
            fix = "Write two records per training picture, with and without coordinates."
            yield lone[0].finding("warning", "coordinate-twin", message, fix)


def _without_coordinates(entries: Sequence[Entry]) -> Iterator[Finding]:
    for split in ("val", "test"):
        if bare := [entry for entry in entries if entry.split == split and not entry.record.coordinates]:
            message = f"{len(bare)} records of the {split} split have no coordinates, for example {bare[0].image}."
            fix = "Add coordinates: conditions that need them skip these records."
            yield bare[0].finding("warning", "no-coordinates", message, fix)


def _odd_positions(entries: Sequence[Entry]) -> Iterator[Finding]:
    if null := [entry for entry in entries if entry.record.coordinates == Coordinates(0.0, 0.0)]:
        message = f"{len(null)} records are at (0, 0), for example {null[0].image}: often a missing position."
        yield null[0].finding("warning", "null-island", message, "Write the true position, or remove it.")
    kept = [e for e in entries if e.record.mission.kept(e.record.verdict.category)]
    once = list({entry.image: entry for entry in kept if entry.record.coordinates}.values())
    for index in perhaps_swapped([entry.record.coordinates for entry in once if entry.record.coordinates]):
        category = once[index].record.verdict.category
        message = (
            f"{once[index].image} is {category} and far out at sea or in Antarctica, but on other land if "
            "longitude and latitude are swapped."
        )
        yield once[index].finding("warning", "perhaps-swapped", message, "Check the order: longitude, then latitude.")


def _blanks(entries: Sequence[Entry], pictures: Mapping[str, Picture]) -> Iterator[Finding]:
    for image, (first, *_) in _by_image(entries).items():
        if image in pictures and pictures[image].blank:
            category = first.record.verdict.category
            severity: Severity = "warning" if category == first.record.mission.blank else "error"
            message = f"{image} is {category}, but blank: one flat colour, white-out or open water."
            yield first.finding(severity, "blank-frame", message, "Replace the picture, or leave the place out.")
