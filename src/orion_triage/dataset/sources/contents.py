"""What a folder of the user's pictures contains: its layout, its rows, and every mistake in them.

Table: one file in the folder, or `metadata.csv`/`metadata.jsonl` in each of train/, val/ and test/. Its columns are
those of `columns.py`; names of pictures are relative to the table's folder, or to pictures/, images/ or frames/ in it.
Folders named after the mission's categories, directly in the folder or in train/, val/ and test/. The position of a
GeoTIFF is read from the file. Hidden files are left out and counted.

The dataset stage (`Directory`) and `orion dataset check` both start from `read_contents`, so that they agree.
"""

import os
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from orion_triage.dataset.catalogue import SPLIT_NAMES, Row, Target, columns_of, read_rows, target_of
from orion_triage.dataset.check.facts import Finding, Severity
from orion_triage.dataset.sources.columns import Columns, choose
from orion_triage.dataset.sources.picture_names import PictureNameError, PictureNames, is_picture, unique_ids
from orion_triage.errors import OrionError, one_line
from orion_triage.imagery.frames import PICTURE_SUFFIXES
from orion_triage.imagery.geotiff import GEOTIFF_SUFFIXES, locate
from orion_triage.mission.fields import allowed
from orion_triage.mission.mission import Mission, listed
from orion_triage.safe.folders import Listing, composed, listing

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".geojson")
_DOCUMENT = re.compile(r"(readme|licen[cs]e)(\.(txt|md|rst))?", re.IGNORECASE)  # belongs to a folder, and is no mistake
_SPREADSHEETS = (".xlsx", ".xls", ".ods", ".numbers")
# Kind of a mistake in a row (catalogue.Problem) -> the finding's kind and the fix.
_FIXES = {
    "label": (
        "label",
        "Write one of {names}, in upper or lower case. If they are those of a mission of your own, name it: "
        "--mission FILE.",
    ),
    "swapped": (
        "swapped-position",
        "Exchange the two cells of these rows, or, if all rows are swapped, the two names in the header. Look at the "
        "other rows, too: where both numbers are below 90, a swap is not always seen.",
    ),
    "position": ("position", "Write degrees with a sign and no letters, or leave both cells empty if unknown."),
    "reason": ("reason", "Write one plain sentence of at most {longest} characters, or leave the cell empty."),
    "split": ("split", "Write train, val or test in every row, or leave all empty for an automatic split."),
    "name": ("name", "Give every row its own name of a-z, 0-9 and _, or leave out the column name."),
    "morphology": ("morphology", "Write one word of a-z, 0-9 and _, or leave the cell empty."),
    "field": ("field", "Write in every row {fields}."),
}


class _Row(NamedTuple):
    """A picture's row: where it stands, its cells under our names, the table's own names, and the table's folder.

    `base` is relative to the dataset, "" for the dataset itself.
    """

    origin: str
    cells: dict[str, str]
    called: Mapping[str, str] = {}
    base: str = ""
    unclear: frozenset[str] = frozenset()  # our names of columns that the table has a fault about


@dataclass(frozen=True)
class Table:
    """A table: its path relative to the dataset, the number of its rows, and what its columns were taken for."""

    name: str
    rows: int
    columns: Columns


@dataclass
class Contents:
    """All that is known of a folder: `layout` in words, the targets of the rows without mistakes, and the findings.

    `files`: name of a target -> its picture. `rows`: number of rows or labelled pictures, also those with mistakes.
    `looked_at`: picture -> where it is labelled, also for rows with other mistakes.
    """

    folder: Path
    mission: Mission
    listing: Listing
    layout: str = ""
    tables: list[Table] = field(default_factory=list)
    rows: int = 0
    targets: list[Target] = field(default_factory=list)
    files: dict[str, Path] = field(default_factory=dict)
    looked_at: dict[Path, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.severity == "error"]

    @property
    def pictures(self) -> list[Path]:
        return [path for path in self.listing.files if is_picture(path)]

    @property
    def unlisted(self) -> list[Path]:
        """The pictures that are in no row, and in no folder of a category."""
        named = {os.path.realpath(path) for path in self.looked_at}  # Path.resolve raises for a link to itself
        return [path for path in self.pictures if os.path.realpath(path) not in named]

    def add(self, severity: Severity, check: str, place: str, message: str, fix: str) -> None:
        self.findings.append(Finding(severity, check, place, message, fix))

    def relative(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()


def read_contents(folder: Path, mission: Mission) -> Contents:
    """Everything in a folder of frames for this mission, with all mistakes as findings; decodes no picture.

    Raises OSError for a folder that cannot be read.
    """
    contents = Contents(folder, mission, listing(folder, recursive=True))
    names = PictureNames(folder, contents.listing.files)
    rows = list(_rows(contents))
    contents.rows = len(rows)
    earlier: dict[str, tuple[Path, str]] = {}
    paths = [_path_of(row, names, earlier, contents) for row in rows]
    files = [contents.relative(path) if path else "" for path in paths]
    # A row without its picture has no id: its other mistakes are found all the same.
    known = [index for index, path in enumerate(paths) if path]
    own_names = [rows[index].cells["name"] for index in known]
    ids = dict(zip(known, unique_ids(own_names, [files[index] for index in known]), strict=True))
    fields = "; ".join(f"{one.name}: {allowed(one)}" for one in mission.fields)
    without_reason = 0
    seen: dict[str, str] = {}
    for index, (row, path) in enumerate(zip(rows, paths, strict=True)):
        cells, has_reason = _completed(row, path, contents)
        name = ids.get(index, f"row_{index}_without_a_picture")
        cells["name"] = name
        target, problems = target_of(
            row.origin, cells, seen, mission, drawable=False, with_positions=False, called=row.called
        )
        for problem in problems:
            if (problem.kind == "label" and "category" in row.unclear) or problem.field in row.unclear:
                continue
            kind, fix = _FIXES[problem.kind]
            fix = fix.format(names=", ".join(mission.names), longest=mission.longest_reason, fields=fields)
            contents.add("error", kind, row.origin, f"{problem.text}.", fix)
        if target and path:
            without_reason += not has_reason
            contents.targets.append(replace(target, file=one_line(files[index])))
            contents.files[name] = path
    _add_warnings(contents, without_reason)
    return contents


def _path_of(row: _Row, names: PictureNames, earlier: dict[str, tuple[Path, str]], contents: Contents) -> Path | None:
    """The row's picture, or None and a finding. `earlier`: name in composed form -> picture and row that has it."""
    file_name = row.cells["file_name"]
    try:
        path = names.named(file_name, row.base)
        other, before = earlier.setdefault(composed(path.as_posix()), (path, row.origin))
        if other != path:
            message = f"picture {file_name!r} is there twice, in both Unicode forms (NFC and NFD): rename one"
            raise PictureNameError("repeated-picture", message, "Rename one of the two files.")
        if before != row.origin:
            message = f"picture {file_name!r} is already on {before}"
            raise PictureNameError("repeated-picture", message, "Keep one row for each picture.")
    except PictureNameError as error:
        contents.add("error", error.kind, row.origin, f"{error.message}.", error.fix)
        return None
    contents.looked_at[path] = row.origin
    return path


def _completed(row: _Row, path: Path | None, contents: Contents) -> tuple[dict[str, str], bool]:
    """The row's cells, with missing values filled in: a GeoTIFF's position, the morphology and the reason.

    Also whether the row itself has a reason.
    """
    mission, written = contents.mission, row.cells["category"]
    category = mission.named(written)
    cells = row.cells | ({"category": category} if category else {})
    if path and path.suffix.lower() in GEOTIFF_SUFFIXES and not cells["lon"] and not cells["lat"]:
        try:
            if located := locate(path):  # a plain TIFF has no position, as a PNG has none
                cells |= {"lon": repr(located.centre.lon), "lat": repr(located.centre.lat)}
        except OrionError as error:
            contents.add("error", "picture-position", row.origin, error.message, error.fix)
    cells["morphology"] = cells["morphology"] or written.lower()
    has_reason = bool(cells["reason"])
    if not has_reason:
        cells["reason"] = mission.of(category).reason if category else "-"
    return cells, has_reason


def _add_warnings(contents: Contents, without_reason: int) -> None:
    count = len(contents.targets)
    place = contents.tables[0].name if len(contents.tables) == 1 else "."
    add = "Add to the table" if contents.tables else "Write a table labels.csv with the columns file_name, category,"
    if without_reason:
        message = (
            f"{without_reason} of {count} frames have no reason and get the standard sentence of their category: "
            "a model trained on them gives only these sentences."
        )
        contents.add("warning", "no-reason", place, message, f"{add} reason: one sentence on what the picture shows.")
    if unplaced := sum(target.coordinates is None for target in contents.targets):
        message = (
            f"{unplaced} of {count} frames have no position: conditions with coordinates cannot evaluate them, "
            "and the split cannot separate neighbouring places."
        )
        contents.add("warning", "no-position", place, message, f"{add} lon and lat, in degrees.")
    # Of rows that could not be read, the pictures are unknown.
    unread = not contents.rows or any(finding.check == "table" for finding in contents.findings)
    for path in () if unread else contents.unlisted:
        where = contents.relative(path)
        fix = "Add their rows, or move them out of the folder."
        if not contents.tables:
            folders = [f"{name}/" for name in contents.mission.names]
            fix = f"Move them into {listed(folders, 'or')}, or out of the folder."
        contents.add("warning", "picture-in-no-row", where, "has no label and is not used.", fix)
    used = [path for path in contents.listing.files if not _DOCUMENT.fullmatch(path.name)]
    for said in replace(contents.listing, files=used).left_out((*PICTURE_SUFFIXES, *TABLE_SUFFIXES)):
        fix = f"Nothing to do, unless pictures are among them: convert these to {', '.join(PICTURE_SUFFIXES)}."
        contents.add("warning", "left-out", ".", f"left out: {said}.", fix)


# What the folder is


def _rows(contents: Contents) -> Iterator[_Row]:
    """The row of every picture, from the table, the tables of the split folders, or the folder names.

    Sets the layout; what cannot be read is a finding.
    """
    folder = contents.folder
    top = [path for path in contents.listing.files if path.parent == folder]
    tables = [path for path in top if path.suffix.lower() in TABLE_SUFFIXES]
    if len(tables) > 1:
        names = ", ".join(path.name for path in tables)
        contents.layout = f"{len(tables)} tables: {names}"
        fix = f"Keep one of them in {folder}, and move the others elsewhere."
        contents.add("error", "layout", ".", f"{len(tables)} tables instead of one: {names}.", fix)
        return
    if tables:
        yield from _table_rows(contents, tables[0])
        contents.layout = f"a table and pictures: {_counted_rows(contents.tables)}, {_pictures_in_words(contents)}"
        return
    by_folder: dict[str, list[Path]] = defaultdict(list)
    for path in contents.listing.files:
        by_folder[path.relative_to(folder).parts[0]].append(path)
    labelled: Counter[str] = Counter()
    for name, files in sorted(by_folder.items()):
        split = SPLIT_NAMES.get(name.lower())
        beside = {path.name.lower(): path for path in files if path.parent == folder / name}
        table = beside.get("metadata.csv") or beside.get("metadata.jsonl")
        if split and table:
            for row in _table_rows(contents, table):
                yield row._replace(cells=row.cells | {"split": split}, base=name)
            continue
        for path in filter(is_picture, files):
            file_name = contents.relative(path)
            named = map(contents.mission.named, Path(file_name).parts[:-1])
            found = list(dict.fromkeys(category for category in named if category))
            if len(found) > 1:  # "low" in "high" may mean a low resolution
                message = f"picture {file_name!r} is in folders of {len(found)} categories: {', '.join(found)}."
                contents.add("error", "two-categories", file_name, message, "Rename or move one of the folders.")
            elif found:
                labelled[f"{split}/{found[0]}" if split else found[0]] += 1
                if contents.mission.fields:  # folders have no values for them
                    continue
                cells = Columns((), {}).renamed({})
                yield _Row(file_name, cells | {"file_name": file_name, "category": found[0], "split": split or ""})
    if labelled and (asked := [one.name for one in contents.mission.fields]):
        message = f"folders label the pictures, but the mission asks for {listed(asked)} too: a table is needed."
        fix = f"Write a table labels.csv with the columns file_name, category, {', '.join(asked)}."
        contents.add("error", "layout", ".", message, fix)
    parts = [_counted_rows(contents.tables)] if contents.tables else []
    parts += [f"{where}/ ({_count(count, 'picture')})" for where, count in sorted(labelled.items())]
    if parts:
        kind = "split folders with tables" if contents.tables else "category folders"
        contents.layout = f"{kind}: {', '.join(parts)}"
    elif contents.findings:
        contents.layout = "category folders"
    else:
        _add_unknown(contents, top)


def _add_unknown(contents: Contents, top: Sequence[Path]) -> None:
    """The finding about a folder of no known layout: what is there instead, and what to do."""
    sheets = [path.name for path in top if path.suffix.lower() in _SPREADSHEETS]
    below = [path for path in contents.listing.files if path.suffix.lower() in TABLE_SUFFIXES]
    parents = {path.parent for path in contents.pictures} - {contents.folder}
    folders = sorted(contents.relative(parent) + "/" for parent in parents)
    categories = listed(contents.mission.names)
    has = _count(len(contents.pictures), "picture") if contents.pictures else "no pictures"
    contents.layout = f"not a dataset: {has} and no labels"
    if sheets:
        contents.layout = f"a spreadsheet ({sheets[0]}) and {has}"
        fix = f"Save {sheets[0]} as CSV."
    elif below:
        contents.layout = f"not a dataset at the top level: the table is {contents.relative(below[0])}"
        fix = f"Pass its folder: {shlex.quote(str(below[0].parent))}. Or move {below[0].name} to {contents.folder}."
    elif folders:
        named = ", ".join(folders[:5])
        fix = f"Rename the folders with pictures ({named}) to {categories}, or add a table labels.csv."
    else:
        fix = "Add a table labels.csv with the columns file_name and category. 'orion dataset new' writes an example."
    message = (
        f"this is not a dataset: it has no train_dataset.jsonl, no table, and no folders {categories} with pictures."
    )
    contents.add("error", "layout", ".", message, fix)


def _count(number: int, name: str) -> str:
    return f"{number} {name}{'' if number == 1 else 's'}"


def _counted_rows(tables: Sequence[Table]) -> str:
    return ", ".join(f"{table.name} ({_count(table.rows, 'row')})" for table in tables)


def _pictures_in_words(contents: Contents) -> str:
    folders = {contents.relative(path.parent) for path in contents.pictures}
    where = f"in {folders.pop()}/" if len(folders) == 1 and "." not in folders else ""
    if not where:
        where = "beside it" if folders <= {"."} else f"in {len(folders)} folders"
    return f"{_count(len(contents.pictures), 'picture')} {where}"


def _table_rows(contents: Contents, path: Path) -> Iterator[_Row]:
    """The rows of a table under our names; a table that cannot be used is a finding for each of its faults."""
    name = contents.relative(path)
    faults: list[OrionError] = []
    rows: list[Row] = []
    try:
        for row in read_rows(path, faults):
            rows.append(row)  # not list(): those before a fault that stops the reading are looked at
    except OrionError as error:
        faults.append(error)
    for fault in faults:
        contents.add("error", "table", name, fault.message.removeprefix(str(path)).removeprefix(":").strip(), fault.fix)
    columns = choose(columns_of(rows), [one.name for one in contents.mission.fields])
    contents.tables.append(Table(name, len(rows), columns))
    if not rows:
        if not faults:
            contents.add("error", "table", name, "has no rows.", "Add one row per picture.")
        return
    for message, fix in columns.faults:
        contents.add("error", "columns", name, f"{message}.", fix)
    if "file_name" in columns.unclear:
        return
    for where, cells in rows:
        clear = {ours: "" if ours in columns.unclear else cell for ours, cell in columns.renamed(cells).items()}
        yield _Row(f"{name} {where}", clear, columns.taken, unclear=columns.unclear)
