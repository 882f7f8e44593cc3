"""A folder of the user's pictures as an image source.

A picture's id is its path in a-z, 0-9 and _; where that loses letters or is not unique, with a hash of the path. The
user's own name of a picture is the column `file` of frames.csv.
"""

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from orion_triage.dataset.sources.columns import listed
from orion_triage.dataset.sources.contents import Contents, read_contents
from orion_triage.dataset.sources.source import Absent, Picture, Shot
from orion_triage.errors import OrionError
from orion_triage.imagery.geotiff import GEOTIFF_SUFFIXES, locate
from orion_triage.mission.mission import Mission

_NAMED_IN_ERROR = 20


class Directory:
    """The folder as an `ImagerySource`; `targets` are its places.

    Raises OrionError that lists all mistakes.
    """

    name = "directory"
    licence = "unknown"
    attribution = ""
    redistributable = None

    def __init__(self, folder: Path, mission: Mission, contents: Contents | None = None) -> None:
        contents = contents or read_contents(folder, mission)
        if contents.errors:
            raise _refusal(contents)
        self.targets = contents.targets
        self._files = contents.files
        self.left_out = _left_out(contents)
        self.unused_columns = _unused_columns(contents)
        self.warnings = [*self.unused_columns, *_warnings(contents), *self.left_out]

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
                except OrionError:  # unreadable: reported when its picture is read
                    continue
                if located:
                    found.append(located.metres_per_pixel * located.edge)
        return max(found, default=None)


def _refusal(contents: Contents) -> OrionError:
    """One error that names the first mistakes; that of a single mistake has its own fix."""
    said = [
        (f"{error.place}: " if error.place != "." else "") + error.message.removesuffix(".")
        for error in contents.errors[:_NAMED_IN_ERROR]
    ]
    rest = len(contents.errors) - len(said)
    more = f"; and {rest} more" if rest else ""
    fix = f"Correct these lines. 'orion dataset check {shlex.quote(str(contents.folder))}' groups them and lists all."
    if len(contents.errors) == 1:
        fix = contents.errors[0].fix
    return OrionError(f"{contents.folder}: {'; '.join(said)}{more}.", fix)


def _unused_columns(contents: Contents) -> list[str]:
    return [
        f"columns of {table.name} that are not used: {listed(table.columns.unused)}"
        for table in contents.tables
        if table.columns.unused and table.rows
    ]


def _warnings(contents: Contents) -> list[str]:
    """The warnings of the dataset stage: findings of the same kind about single files are one sentence."""
    return [finding.message.removesuffix(".") for finding in contents.findings if finding.check.startswith("no-")]


def _left_out(contents: Contents) -> list[str]:
    """The pictures of the folder that are not used."""
    said = []
    if left := contents.unlisted:
        example = contents.relative(left[0])
        said.append(f"{len(left)} pictures in {contents.folder} are in no row and are not used, for example {example}")
    return said + [finding.message.removesuffix(".") for finding in contents.findings if finding.check == "left-out"]
