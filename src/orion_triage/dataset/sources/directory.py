"""A folder of the user's pictures: with a table (CSV, JSONL or GeoJSON), or sorted into folders by category.

Table: one file in the folder, or `metadata.csv`/`metadata.jsonl` in each of train/, val/ and test/. Columns:
`file_name`, `category`, and optionally `lon`, `lat`, `reason`, `morphology`, `name`, `split`; common synonyms are
accepted. Folders: HIGH/, MEDIUM/ and LOW/, directly in the folder or in train/, val/ and test/. The position of a
GeoTIFF is read from the file.

Hidden files are left out and counted. A picture's id is its path in a-z, 0-9 and _; where that loses letters or is
not unique, with a hash of the path. The user's own name of a picture is the column `file` of frames.csv.
"""

import hashlib
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from orion_triage.dataset.catalogue import SPLIT_NAMES, Row, columns_of, read_rows, targets_of
from orion_triage.dataset.sources.source import Absent, Picture, Shot
from orion_triage.errors import OrionError, one_line
from orion_triage.imagery.frames import PICTURE_SUFFIXES
from orion_triage.imagery.geotiff import GEOTIFF_SUFFIXES, locate
from orion_triage.mission.verdict import CATEGORIES, Category
from orion_triage.safe.folders import composed, is_hidden, listing
from orion_triage.safe.reading import shown

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".geojson")
_SPREADSHEETS = (".xlsx", ".xls", ".ods", ".numbers")
_OTHER_NAMES = {
    "file_name": ("file", "filename", "image", "frame"),
    "category": ("label", "class"),
    "lon": ("longitude", "lng"),
    "lat": ("latitude",),
}
_COLUMNS = (*_OTHER_NAMES, "reason", "morphology", "name", "split")
_LONGEST_ID = 120  # characters; a file's name has at most 255 bytes
# For frames without a reason. A model trained on them gives only these reasons, so the build warns.
STANDARD_REASONS = {
    Category.HIGH: "Structures of extreme scale that a mission wants to see at once.",
    Category.MEDIUM: "Ordinary traces of people: streets, fields or small works.",
    Category.LOW: "Natural ground or water without a trace of people.",
}


class Directory:
    """The folder as an `ImagerySource`; `targets` are its places.

    Raises OrionError that lists all mistakes in the table.
    """

    name = "directory"
    licence = "unknown"
    attribution = ""
    redistributable = None

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._listing = listing(folder, recursive=True)
        self._pictures = _Pictures(folder, [path for path in self._listing.files if _is_picture(path)])
        self.warnings: list[str] = []
        found: list[tuple[str, dict[str, str], Path]] = []
        mistakes: list[str] = []
        origins: dict[str, tuple[Path, str]] = {}
        for origin, row in self._rows():
            try:
                path = self._pictures.named(row["file_name"])
                other, before = origins.setdefault(composed(path.as_posix()), (path, origin))
                if other != path:
                    raise OrionError(
                        f"picture {row['file_name']!r} is there twice, in both Unicode forms (NFC and NFD): rename one"
                    )
                if before != origin:
                    raise OrionError(f"picture {row['file_name']!r} is already on {before}")
                found.append((origin, _completed(row, path), path))
            except OrionError as error:
                mistakes.append(f"{origin}: {error.message}")
        if mistakes:
            more = f"; and {len(mistakes) - 20} more" if len(mistakes) > 20 else ""
            raise OrionError(f"{folder}: {'; '.join(mistakes[:20])}{more}.", "Correct these lines.")
        files = [path.relative_to(folder).as_posix() for _, _, path in found]
        ids = unique_ids([row["name"] for _, row, _ in found], files)
        rows = [(origin, row | {"name": name}) for (origin, row, _), name in zip(found, ids, strict=True)]
        own = {name: one_line(file) for name, file in zip(ids, files, strict=True)}
        targets = targets_of(rows, str(folder), drawable=False, with_positions=False)
        self.targets = [replace(target, file=own[target.name]) for target in targets]
        self._files = {name: path for name, (_, _, path) in zip(ids, found, strict=True)}
        self._warn([row for _, row in rows])

    def pictures(self, shots: Sequence[Shot]) -> Iterator[Picture | Absent]:
        for shot in shots:
            yield Picture(self._files[shot.target.name], None)

    def footprint_metres(self) -> float | None:
        """The widest frame of the folder's GeoTIFFs on the ground, in metres; None if no file has a position."""
        found = []
        for path in self._files.values():
            if path.suffix.lower() in GEOTIFF_SUFFIXES:
                try:
                    located = locate(path)
                except OrionError:  # without a position, or unreadable: reported when its picture is read
                    continue
                found.append(located.metres_per_pixel * located.edge)
        return max(found, default=None)

    def _rows(self) -> Iterator[Row]:
        """The row of every picture, from the table, the tables of the split folders, or the folder names."""
        folder = self._folder
        top = [path for path in self._listing.files if path.parent == folder]
        tables = [path for path in top if path.suffix.lower() in TABLE_SUFFIXES]
        if len(tables) > 1:
            raise OrionError(
                f"{folder} has {len(tables)} tables instead of one: {', '.join(path.name for path in tables)}.",
                "Keep one of them.",
            )
        if tables:
            for origin, row in self._table(tables[0]):
                yield f"{tables[0].name} {origin}", row
            return
        found = False
        by_folder: dict[str, list[Path]] = defaultdict(list)
        for path in self._listing.files:
            by_folder[path.relative_to(folder).parts[0]].append(path)
        for name, files in sorted(by_folder.items()):
            split = SPLIT_NAMES.get(name.lower())
            beside = {path.name.lower(): path for path in files if path.parent == folder / name}
            table = beside.get("metadata.csv") or beside.get("metadata.jsonl")
            if split and table:
                for origin, row in self._table(table):
                    row |= {"file_name": f"{name}/{row['file_name']}" if row["file_name"] else "", "split": split}
                    yield f"{name}/{table.name} {origin}", row
                    found = True
                continue
            for path in files:
                if _is_picture(path) and (category := _category_of(path.relative_to(folder))):
                    file_name = path.relative_to(folder).as_posix()
                    row = {"file_name": file_name, "category": category, "split": split or ""}
                    yield file_name, _named_as_here(row)
                    found = True
        if not found:
            sheets = [path.name for path in top if path.suffix.lower() in _SPREADSHEETS]
            raise OrionError(
                f"{folder} is not a dataset: it has no train_dataset.jsonl, no table, and no folders HIGH, MEDIUM "
                "and LOW with pictures.",
                f"Save {sheets[0]} as CSV." if sheets else "Use one of the three layouts in docs/dataset.md.",
            )

    def _table(self, path: Path) -> Iterator[Row]:
        """The rows of a table with the columns' names as here; raises OrionError once for a column that is missing."""
        rows = list(read_rows(path))
        columns = columns_of(rows)
        chosen = {
            here: next((name for name in (here, *others) if name in columns), "")
            for here, others in _OTHER_NAMES.items()
        }
        for here in ("file_name", "category") if rows else ():
            if not chosen[here]:
                raise OrionError(
                    f"{path} has no column {here} (found: {', '.join(columns)[:200]}).",
                    f"Name the column {here}, or {', '.join(_OTHER_NAMES[here])}. The first line is the header.",
                )
        if bool(chosen["lon"]) != bool(chosen["lat"]):
            there, missing = ("lon", "lat") if chosen["lon"] else ("lat", "lon")
            raise OrionError(f"{path} has the column {chosen[there]}, but not {missing}.", f"Add the column {missing}.")
        if unused := [column for column in columns if column not in (*_COLUMNS, *chosen.values())]:
            more = f" and {len(unused) - 8} more" if len(unused) > 8 else ""
            self.warnings.append(f"columns of {path.name} that are not used: {', '.join(unused[:8])}{more}")
        for origin, cells in rows:
            yield origin, _named_as_here(cells)

    def _warn(self, rows: list[dict[str, str]]) -> None:
        without = sum(row["reason"] == STANDARD_REASONS[Category(row["category"])] for row in rows)
        if without:
            self.warnings.append(
                f"{without} of {len(rows)} frames have no reason and get the standard sentence of their category: "
                "a model trained on them gives only these sentences"
            )
        unplaced = sum(target.coordinates is None for target in self.targets)
        if unplaced:
            self.warnings.append(
                f"{unplaced} of {len(rows)} frames have no position: conditions with coordinates cannot evaluate them, "
                "and the split cannot separate neighbouring places"
            )
        named = {path.resolve() for path in self._files.values()}
        left = [path for path in self._listing.files if _is_picture(path) and path.resolve() not in named]
        if left:
            shown = left[0].relative_to(self._folder).as_posix()
            self.warnings.append(
                f"{len(left)} pictures in {self._folder} are in no row and are not used, for example {shown}"
            )
        self.warnings += [f"left out: {said}" for said in self._listing.left_out((*PICTURE_SUFFIXES, *TABLE_SUFFIXES))]


class _Pictures:
    """The pictures of a folder, found by the names that tables give them."""

    def __init__(self, folder: Path, paths: Sequence[Path]) -> None:
        self._folder = folder
        self._exact = {path.relative_to(folder).as_posix(): path for path in paths}
        self._alike: dict[str, list[str]] = defaultdict(list)
        for name in self._exact:
            self._alike[_alike(name)].append(name)
            self._alike[_alike(name.rpartition(".")[0])].append(name)

    def named(self, file_name: str) -> Path:
        """The picture of a row; raises OrionError for a missing file, several, and one outside the folder.

        Looks for exactly this name, then for one that differs in Unicode form or case. A name without a suffix
        matches every picture format. A backslash is a separator, as Windows writes it.
        """
        posix = PurePosixPath(file_name if file_name in self._exact else file_name.replace("\\", "/"))
        if not file_name or posix.is_absolute() or ".." in posix.parts or "\0" in file_name:
            raise OrionError(f"file_name {shown(file_name)} is not a path in the folder")
        name = str(posix)
        found = [name] if name in self._exact else self._alike.get(_alike(name), [])
        if not found:
            hidden = any(is_hidden(part) for part in posix.parts)
            raise OrionError(
                f"picture {file_name!r} "
                + ("is a hidden file" if hidden else f"does not exist (supported: {', '.join(PICTURE_SUFFIXES)})")
            )
        if len(found) > 1:
            raise OrionError(f"picture {file_name!r} can be {len(found)} files: {', '.join(found)[:200]}")
        path = self._exact[found[0]]
        if not path.is_file():
            raise OrionError(f"picture {file_name!r} does not exist")
        if not path.resolve().is_relative_to(self._folder.resolve()):
            raise OrionError(f"{file_name!r} is outside the folder")
        return path


def _alike(name: str) -> str:
    return composed(composed(name).casefold())


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in PICTURE_SUFFIXES


def _category_of(path: Path) -> str:
    """The category that a picture's folders name, relative to the dataset; empty without one.

    Raises OrionError for two of them, one in the other: LOW/ in HIGH/ may mean a low resolution.
    """
    found = list(dict.fromkeys(part.upper() for part in path.parts[:-1] if part.upper() in CATEGORIES))
    if len(found) > 1:
        raise OrionError(
            f"picture {path.as_posix()!r} is in folders of {len(found)} categories: {', '.join(found)}.",
            "Rename or move one of the folders.",
        )
    return found[0] if found else ""


def unique_ids(names: Sequence[str], files: Sequence[str]) -> list[str]:
    """An id of a-z, 0-9 and _ for each picture: its name (default: its path), if that is ASCII and unique, else a hash.

    The hash is of the path in Unicode's composed form, so that it is the same on every system. Names that are ids
    already stay as they are.
    """
    texts = [name or PurePosixPath(file).with_suffix("").as_posix() for name, file in zip(names, files, strict=True)]
    slugs = [_slug(text) for text in texts]
    count = Counter(slugs)
    ids = []
    for name, file, text, slug in zip(names, files, texts, slugs, strict=True):
        if re.fullmatch(r"[a-z0-9_]+", name):
            ids.append(name)
        elif text.isascii() and slug and count[slug] == 1 and len(slug) <= _LONGEST_ID:
            ids.append(slug)
        else:
            digest = hashlib.sha256(composed(file).encode("utf-8", "surrogateescape")).hexdigest()[:10]
            ids.append(f"{slug[:_LONGEST_ID]}_{digest}".lstrip("_"))
    return ids


def _slug(text: str) -> str:
    """The text in a-z, 0-9 and _: accents are dropped, other letters and signs become one underscore."""
    letters = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return re.sub(r"[^a-z0-9]+", "_", letters.lower()).strip("_")


def _named_as_here(cells: dict[str, str]) -> dict[str, str]:
    row = dict(cells)
    for name, others in _OTHER_NAMES.items():
        if name not in row:
            row[name] = next((row[other] for other in others if other in row), "")
    return row


def _completed(row: dict[str, str], path: Path) -> dict[str, str]:
    """The row, with missing values filled in: a GeoTIFF's position, the morphology and the reason."""
    category = row["category"].upper()
    row = row | {"category": category, "name": row.get("name", "")}
    if path.suffix.lower() in GEOTIFF_SUFFIXES and not row["lon"] and not row["lat"]:
        centre = locate(path).centre
        row |= {"lon": repr(centre.lon), "lat": repr(centre.lat)}
    row["morphology"] = row.get("morphology") or category.lower()
    if not row.get("reason"):
        row["reason"] = STANDARD_REASONS[Category(category)] if category in CATEGORIES else "-"
    return row
