"""Check a folder of the user's own pictures before a dataset is made of it.

Its table and names are read as the dataset stage reads them, and its pictures are decoded with the stage's settings.
Without mistakes, the places are split as in the stage, and the splits are checked as those of a finished dataset: what
training would refuse is found here, at the line of the user's table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from orion_triage.dataset.build import Splits, close_places, footprint_km, records_of, repeated, respaced, splits_of
from orion_triage.dataset.catalogue import Target
from orion_triage.dataset.check.facts import Entry, Finding, Picture, form_findings, looks_at
from orion_triage.dataset.check.leakage import leaks
from orion_triage.dataset.check.soundness import Report, of_any_split, of_the_splits, report_of
from orion_triage.dataset.collect import most_missing, useless_blank
from orion_triage.dataset.records import Record, split_path
from orion_triage.dataset.sources.contents import Contents, read_contents
from orion_triage.dataset.sources.directory import Directory
from orion_triage.dataset.sources.source import Shot
from orion_triage.errors import OrionError, one_line
from orion_triage.imagery.frames import CAMERA_SIZE
from orion_triage.imagery.stretch import stretch_of
from orion_triage.mission.mission import Mission
from orion_triage.mission.prompt import Coordinates
from orion_triage.progress import Progress, silent
from orion_triage.settings import SPLITS, DatasetSettings

_METRES_PER_PIXEL = 10.0  # of pictures that do not say it: what the check of a finished dataset assumes


def check_own_folder(
    folder: Path, settings: DatasetSettings, mission: Mission, *, progress: Progress = silent
) -> Report:
    """The report of a folder in any layout but the published one; each of its labelled pictures is decoded once.

    `settings` are those that the dataset stage would have. Raises OSError for a folder that cannot be read.
    """
    contents = read_contents(folder, mission)
    findings = list(contents.findings)
    pictures, unusable = _decoded(contents, settings, progress)
    blank = _useless_blanks(contents, pictures, mission)
    lost = [*unusable, *blank]
    too_many = len(lost) > most_missing(contents.rows, settings.largest_missing_share)
    for finding in lost:
        said = f"{finding.message} The dataset stage leaves it out."
        if too_many:
            said = f"{finding.message} {len(lost)} of {contents.rows} pictures are of no use: too many."
        findings.append(replace(finding, severity="error" if too_many else "warning", message=said))
    left_out = {finding.place for finding in lost}
    usable = [target for target in contents.targets if target.origin not in left_out]
    looks = {target.file: pictures[contents.files[target.name]] for target in usable}
    if any(finding.severity == "error" for finding in findings):
        entries = _entries({"train": usable, "val": [], "test": []}, mission)
        findings += [*of_any_split(entries, looks), *leaks(entries, looks, metres_per_pixel=1, split_distance_km=1)]
    else:
        more, entries = _of_splits(contents, settings, {target.name for target in usable}, mission)
        metres = Directory(folder, mission, contents).footprint_metres()
        findings += more
        findings += [*of_any_split(entries, looks), *of_the_splits(entries, mission)]
        findings += leaks(
            entries,
            looks,
            metres_per_pixel=metres / CAMERA_SIZE if metres else _METRES_PER_PIXEL,
            split_distance_km=settings.split_distance_km,
        )
    findings += _form(entries, looks)
    report = report_of(folder, _in_own_words(findings, contents), entries, len(pictures), mission)
    tables = [
        {"table": table.name, "rows": table.rows, "columns": dict(table.columns.taken), "unused": table.columns.unused}
        for table in contents.tables
    ]
    return replace(report, recognised=one_line(contents.layout), rows=contents.rows, tables=tables)


def _decoded(
    contents: Contents, settings: DatasetSettings, progress: Progress
) -> tuple[dict[Path, Picture], list[Finding]]:
    """Picture -> its facts, and a finding for each that cannot be used."""
    found: dict[Path, Picture] = {}
    findings = []
    paths = list(contents.looked_at)
    looks = looks_at([str(path) for path in paths], stretch_of(settings))
    for done, (path, look) in enumerate(zip(paths, looks, strict=True), start=1):
        progress("checking pictures", done, len(paths))
        if isinstance(look, Picture):
            found[path] = look
        else:
            message = look[0].replace(str(path), contents.relative(path))
            findings.append(Finding("error", "unusable-image", contents.looked_at[path], message, look[1]))
    return found, findings


def _useless_blanks(contents: Contents, pictures: dict[Path, Picture], mission: Mission) -> list[Finding]:
    seen: set[bytes] = set()
    findings = []
    for target in contents.targets:
        look = pictures.get(contents.files[target.name])
        if look and look.blank and useless_blank(look.pixels, target.category, mission.blank, seen):
            twice = " and the same as another one" if target.category == mission.blank else ""
            message = f"{target.file} is {target.category}, but blank{twice}: one flat colour, white-out or open water."
            fix = "Replace the picture, or delete the row."
            findings.append(Finding("error", "blank-frame", target.origin, message, fix))
    return findings


def _form(entries: Sequence[Entry], looks: Mapping[str, Picture]) -> list[Finding]:
    """What the dataset stage will change in the pictures."""
    fix = "Nothing to do if the middle of the picture is what the label is about."
    first = {entry.image: entry for entry in reversed(entries)}
    return [
        replace(finding, fix=fix) if finding.check == "image-size" else finding
        for image, entry in sorted(first.items())
        if image in looks
        for finding in form_findings(entry, looks[image], resize=True)
    ]


def _in_own_words(findings: Sequence[Finding], contents: Contents) -> list[Finding]:
    """The findings with the names of the user's columns, and without repetitions."""
    taken = contents.tables[0].columns.taken if contents.tables else {}
    lon, lat = taken.get("lon", "longitude"), taken.get("lat", "latitude")
    places = {split_path(Path(), split).name: f"{split} split" for split in SPLITS}
    without_reasons = any(finding.check == "no-reason" for finding in findings)
    own = []
    for finding in findings:
        if finding.check == "single-reason" and without_reasons:
            continue
        if finding.check == "perhaps-swapped":
            message = finding.message.replace("longitude and latitude", f"{lon} and {lat}")
            fix = f"Look at the place on a map. If it is wrong, exchange the cells of {lon} and {lat}."
            finding = replace(finding, message=message, fix=fix)
        own.append(replace(finding, place=places.get(finding.place, finding.place)))
    return own


def _of_splits(
    contents: Contents, settings: DatasetSettings, usable: set[str], mission: Mission
) -> tuple[list[Finding], list[Entry]]:
    """What the dataset stage would say about the places and their split, and the records that it would write."""
    source = Directory(contents.folder, mission, contents)
    try:
        splits = splits_of(source.targets, source, settings)
        repeated(splits["test"], settings)
    except OrionError as error:
        every: Splits = {"train": contents.targets, "val": [], "test": []}
        return [Finding("error", "split", ".", error.message, error.fix)], _entries(every, mission)
    findings = [
        Finding("warning", kind, ".", f"{said}.", fix)
        for kind, fix, messages in (
            (
                "shared-ground",
                "Nothing to do: they stay in one split.",
                close_places(splits, footprint_km(settings, source)),
            ),
            ("respaced-reason", "Nothing to do.", respaced(splits)),
        )
        for said in messages
    ]
    kept = {split: [target for target in splits[split] if target.name in usable] for split in SPLITS}
    for split in SPLITS:
        if not kept[split]:
            message = f"no place of the {split} split has a picture."
            fix = "Add pictures: at least three of each category, so that each split gets one."
            findings.append(Finding("error", "missing-category", f"{split} split", message, fix))
    return findings, _entries(kept, mission)


def _entries(splits: Splits, mission: Mission) -> list[Entry]:
    """The records that the dataset stage would write, with the user's own names of the pictures."""
    return [
        Entry(split, 0, _with_own_name(record, target), target.origin)
        for split in SPLITS
        for target in splits[split]
        for record in records_of(Shot(target), split, mission)
    ]


def _with_own_name(record: Record, target: Target) -> Record:
    """Also with the position as records have it, rounded: two places may then be one."""
    where = record.coordinates
    return replace(
        record, image=target.file, coordinates=where and Coordinates(round(where.lon, 2), round(where.lat, 2))
    )
