"""The pictures of a folder by the names that tables give them, and the ids that datasets give to pictures."""

import hashlib
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from orion_triage import hub
from orion_triage.errors import OrionError
from orion_triage.imagery.frames import PICTURE_SUFFIXES
from orion_triage.safe.folders import composed, is_hidden
from orion_triage.safe.reading import shown

PICTURE_FOLDERS = ("pictures", "images", "frames")  # beside a table whose names of files leave the folder out
_LONGEST_ID = 120  # characters; a file's name has at most 255 bytes


class PictureNameError(OrionError):
    """A name of a picture that is of no use; `kind` is that of the finding."""

    def __init__(self, kind: str, message: str, fix: str) -> None:
        super().__init__(message, fix)
        self.kind = kind


class PictureNames:
    """The pictures of a folder, found by the names that tables give them."""

    def __init__(self, folder: Path, files: Sequence[Path]) -> None:
        self._folder = folder
        self._root = hub.root_of(folder).resolve()  # what its links may point into
        self._others = {path.relative_to(folder).as_posix() for path in files if not is_picture(path)}
        self._exact = {path.relative_to(folder).as_posix(): path for path in files if is_picture(path)}
        self._alike: dict[str, list[str]] = defaultdict(list)
        for name in self._exact:
            self._alike[_alike(name)].append(name)
            self._alike[_alike(name.rpartition(".")[0])].append(name)
        self._folders = {_alike(parent.as_posix()) for name in self._exact for parent in PurePosixPath(name).parents}

    def named(self, file_name: str, base: str = "") -> Path:
        """The picture of a row; raises PictureNameError for a missing file, several, and one outside the folder.

        Looks in `base` (relative to the dataset), then in the PICTURE_FOLDERS there; for exactly this name, then for
        one that differs in Unicode form or case. A name without a suffix matches every picture format. A backslash is
        a separator, as Windows writes it.
        """
        exact = str(PurePosixPath(base, file_name))
        posix = PurePosixPath(file_name if exact in self._exact else file_name.replace("\\", "/"))
        if not file_name or posix.is_absolute() or ".." in posix.parts or "\0" in file_name:
            fix = "Write the picture's path relative to the table's folder, without '..'."
            raise PictureNameError("unusable-name", f"file_name {shown(file_name)} is not a path in the folder", fix)
        found = self._found(base, posix)
        if not found:
            raise self._missing(file_name, base, posix)
        if len(found) > 1:
            listed = ", ".join(found)[:200]
            fix = "Write the full name of the one that is meant."
            raise PictureNameError("unusable-name", f"picture {file_name!r} can be {len(found)} files: {listed}", fix)
        path = self._exact[found[0]]
        if not path.is_file():
            raise self._missing(file_name, base, posix)
        if not path.resolve().is_relative_to(self._root):
            fix = "Copy the picture into the folder."
            raise PictureNameError("unusable-name", f"{file_name!r} is outside the folder", fix)
        return path

    def _found(self, base: str, posix: PurePosixPath) -> list[str]:
        name = str(base / posix)
        if name in self._exact:
            return [name]
        if alike := self._alike.get(_alike(name)):
            return alike
        inner = [str(PurePosixPath(base, folder) / posix) for folder in self._searched_below(base)]
        return [one for like in inner for one in ([like] if like in self._exact else self._alike.get(_alike(like), []))]

    def _searched_below(self, base: str) -> list[str]:
        """The PICTURE_FOLDERS that there are in `base`."""
        return [name for name in PICTURE_FOLDERS if _alike(str(PurePosixPath(base, name))) in self._folders]

    def _missing(self, file_name: str, base: str, posix: PurePosixPath) -> PictureNameError:
        """The error about a picture that is not there: hidden, in another format, or nowhere."""
        if any(is_hidden(part) for part in posix.parts):
            fix = "Rename it: names that start with a dot are hidden."
            return PictureNameError("hidden-picture", f"picture {file_name!r} is a hidden file", fix)
        places = [PurePosixPath(base), *(PurePosixPath(base, name) for name in self._searched_below(base))]
        supported = ", ".join(PICTURE_SUFFIXES)
        if other := next((str(place / posix) for place in places if str(place / posix) in self._others), ""):
            fix = f"Convert it to PNG, and write the new name. Supported: {supported}."
            return PictureNameError("picture-format", f"picture {other!r} is not in a supported format", fix)
        searched = " and ".join(str(self._folder / place) for place in places)
        fix = f"Add the file, correct the name, or delete the row. Searched: {searched} ({supported})."
        return PictureNameError("missing-picture", f"picture {file_name!r} does not exist", fix)


def _alike(name: str) -> str:
    return composed(composed(name).casefold())


def is_picture(path: Path) -> bool:
    return path.suffix.lower() in PICTURE_SUFFIXES


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
