"""A folder of the user's pictures: with a table (CSV, JSONL or GeoJSON), or sorted into folders by category.

Table: one file in the folder, or `metadata.csv`/`metadata.jsonl` in each of train/, val/ and test/. Columns:
`file_name`, `category`, and optionally `lon`, `lat`, `reason`, `morphology`, `name`, `split`; common synonyms are
accepted. Folders: HIGH/, MEDIUM/ and LOW/, directly in the folder or in train/, val/ and test/. The position of a
GeoTIFF is read from the file.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from orion_triage.dataset.catalogue import SPLIT_NAMES, Row, read_rows, targets_of
from orion_triage.dataset.sources.source import Absent, Picture, Shot
from orion_triage.errors import OrionError
from orion_triage.imagery.frames import PICTURE_SUFFIXES
from orion_triage.imagery.geotiff import GEOTIFF_SUFFIXES, locate
from orion_triage.mission.verdict import CATEGORIES, Category
from orion_triage.safe.reading import shown

TABLE_SUFFIXES = (".csv", ".jsonl", ".geojson")
_OTHER_NAMES = {
    "file_name": ("file", "filename", "image", "frame"),
    "category": ("label", "class"),
    "lon": ("longitude", "lng"),
    "lat": ("latitude",),
}
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
        self._files: dict[str, Path] = {}
        self.warnings: list[str] = []
        rows, mistakes = [], []
        for origin, cells in self._rows(folder):
            row = _named_as_here(cells)
            try:
                path = _picture(folder, row.get("file_name", ""))
                row = _completed(row, path, folder)
            except OrionError as error:
                mistakes.append(f"{origin}: {error.message}")
                continue
            rows.append((origin, row))
            self._files[row["name"]] = path
        if mistakes:
            more = f"; and {len(mistakes) - 20} more" if len(mistakes) > 20 else ""
            raise OrionError(f"{folder}: {'; '.join(mistakes[:20])}{more}.", "Correct these lines.")
        self.targets = targets_of(rows, str(folder), drawable=False, with_positions=False)
        self._warn(folder, [row for _, row in rows])

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

    def _rows(self, folder: Path) -> Iterator[Row]:
        """The row of every picture, from the table, the tables of the split folders, or the folder names."""
        tables = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in TABLE_SUFFIXES]
        if len(tables) > 1:
            raise OrionError(
                f"{folder} has {len(tables)} tables instead of one: {', '.join(path.name for path in tables)}.",
                "Keep one of them.",
            )
        if tables:
            for origin, cells in read_rows(tables[0]):
                yield f"{tables[0].name} {origin}", cells
            return
        found = False
        for sub in sorted(path for path in folder.iterdir() if path.is_dir()):
            split = SPLIT_NAMES.get(sub.name.lower())
            table = next((sub / name for name in ("metadata.csv", "metadata.jsonl") if (sub / name).is_file()), None)
            if split and table:
                for origin, cells in read_rows(table):
                    named = _named_as_here(cells)
                    yield (
                        f"{sub.name}/{table.name} {origin}",
                        named | {"file_name": f"{sub.name}/{named.get('file_name', '')}", "split": split},
                    )
                    found = True
                continue
            for path in sorted(sub.rglob("*")):
                category = next((part.upper() for part in path.parts[::-1] if part.upper() in CATEGORIES), "")
                if category and path.suffix.lower() in PICTURE_SUFFIXES:
                    file_name = path.relative_to(folder).as_posix()
                    yield file_name, {"file_name": file_name, "category": category, "split": split or ""}
                    found = True
        if not found:
            raise OrionError(
                f"{folder} is not a dataset: it has no train_dataset.jsonl, no table, and no folders HIGH, MEDIUM "
                "and LOW with pictures.",
                "Use one of the three layouts in docs/dataset.md.",
            )

    def _warn(self, folder: Path, rows: list[dict[str, str]]) -> None:
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
        left = [
            path
            for path in sorted(folder.rglob("*"))
            if path.suffix.lower() in PICTURE_SUFFIXES and path.resolve() not in named
        ]
        if left:
            shown = left[0].relative_to(folder).as_posix()
            self.warnings.append(
                f"{len(left)} pictures in {folder} are in no row and are not used, for example {shown}"
            )


def _named_as_here(cells: dict[str, str]) -> dict[str, str]:
    row = {key.lower(): value for key, value in cells.items() if key}
    for name, others in _OTHER_NAMES.items():
        if name not in row:
            row[name] = next((row[other] for other in others if other in row), "")
    return row


def _picture(folder: Path, file_name: str) -> Path:
    """The row's file; a name without a suffix matches every picture format.

    Raises OrionError for a missing file and for one outside the folder.
    """
    posix = PurePosixPath(file_name)
    if not file_name or posix.is_absolute() or ".." in posix.parts or "\0" in file_name:
        raise OrionError(f"file_name {shown(file_name)} is not a path in the folder")
    path = folder / posix
    candidates = (
        [path]
        if path.suffix.lower() in PICTURE_SUFFIXES
        else [path.with_name(path.name + suffix) for suffix in PICTURE_SUFFIXES]
    )
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    if found is None:
        raise OrionError(f"picture {file_name!r} does not exist (supported: {', '.join(PICTURE_SUFFIXES)})")
    if not found.resolve().is_relative_to(folder.resolve()):
        raise OrionError(f"{file_name!r} is outside the folder")
    return found


def _completed(row: dict[str, str], path: Path, folder: Path) -> dict[str, str]:
    """The row, with missing values filled in: the name, a GeoTIFF's position, the morphology and the reason."""
    stem = path.relative_to(folder).with_suffix("").as_posix().lower()
    category = row["category"].upper()
    row = row | {"category": category, "name": row.get("name") or re.sub(r"[^a-z0-9]+", "_", stem).strip("_")}
    if path.suffix.lower() in GEOTIFF_SUFFIXES and not row["lon"] and not row["lat"]:
        centre = locate(path).centre
        row |= {"lon": repr(centre.lon), "lat": repr(centre.lat)}
    row["morphology"] = row.get("morphology") or category.lower()
    if not row.get("reason"):
        row["reason"] = STANDARD_REASONS[Category(category)] if category in CATEGORIES else "-"
    return row
