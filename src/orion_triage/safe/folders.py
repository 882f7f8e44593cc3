"""What a folder that people bring contains: its files, and what is left out of it.

Hidden and system files are never frames or tables: macOS writes `._NAME.png` beside every NAME.png on foreign disks,
and notebooks keep old copies in `.ipynb_checkpoints`.
"""

import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

_SYSTEM = {"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information", "@eadir"}
_KINDS_NAMED = 5  # suffixes in one line of a report


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is hidden, a system's own, or the lock file of an office program."""
    return name.startswith((".", "~$")) or name.casefold() in _SYSTEM


@dataclass(frozen=True)
class Listing:
    """A folder's content: `files` sorted by path, and what was not entered: `hidden` (files and folders), `folders`."""

    folder: Path
    files: list[Path]
    hidden: list[Path]
    folders: list[Path]

    def left_out(self, suffixes: Sequence[str]) -> list[str]:
        """What is not used, in words: folders, files with suffixes other than `suffixes` (lower case), hidden files."""
        others = [path for path in self.files if path.suffix.lower() not in suffixes]
        kinds = Counter(path.suffix.lower() or "no suffix" for path in others).most_common()
        named = ", ".join(f"{count} {kind}" for kind, count in kinds[:_KINDS_NAMED])
        more = f" and {len(kinds) - _KINDS_NAMED} other kinds" if len(kinds) > _KINDS_NAMED else ""
        said = []
        if self.folders:
            said.append(f"{_counted(self.folders, 'folder')} (--recursive), for example {self._shown(self.folders)}")
        if others:
            said.append(f"{_counted(others, 'file')} with other suffixes ({named}{more})")
        if self.hidden:
            said.append(
                f"{_counted(self.hidden, 'hidden or system file')} or folder, for example {self._shown(self.hidden)}"
                if len(self.hidden) == 1
                else f"{len(self.hidden)} hidden or system files or folders, for example {self._shown(self.hidden)}"
            )
        return said

    def _shown(self, paths: Sequence[Path]) -> str:
        return paths[0].relative_to(self.folder).as_posix()


def _counted(things: Sequence[object], name: str) -> str:
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"


def listing(folder: Path, *, recursive: bool) -> Listing:
    """The content of a folder, with `recursive` also of its folders; links to folders are followed, each folder once.

    A link that leads nowhere, or to itself, is one of the files: reading it fails, which names it. Raises OSError for a
    folder that cannot be read.
    """
    files: list[Path] = []
    hidden: list[Path] = []
    folders: list[Path] = []
    entered = {folder.resolve()}
    waiting = [folder]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
        for entry in found:
            path = Path(entry.path)
            if is_hidden(entry.name):
                hidden.append(path)
            elif not _is_folder(entry):
                files.append(path)
            elif not recursive:
                folders.append(path)
            elif (real := path.resolve()) not in entered:
                entered.add(real)
                waiting.append(path)
    return Listing(folder, _sorted(files), _sorted(hidden), folders)


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # of a link: a loop, a file taken for a folder, a folder without permission
        return False


def _sorted(paths: Iterable[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: path.as_posix())


def composed(name: str) -> str:
    """The name in Unicode's composed form (NFC): Macs write decomposed names (NFD), tables and Linux composed ones."""
    return unicodedata.normalize("NFC", name)


def existing(folder: Path, name: str) -> Path:
    """The file `name` (a relative POSIX path) of the folder, found also under the other Unicode form of its name.

    Returns the path as named if there is no such file, or more than one.
    """
    path = folder / name
    if name.isascii() or path.exists():
        return path
    found = folder
    for part in Path(name).parts:
        if (found / part).exists():
            found /= part
            continue
        try:
            names = _composed_names(found, found.stat().st_mtime_ns).get(composed(part), [])
        except OSError:
            return path
        if len(names) != 1:
            return path
        found /= names[0]
    return found


@lru_cache(maxsize=16)
def _composed_names(folder: Path, changed: int) -> dict[str, list[str]]:
    """NFC name -> the names in a folder; `changed` (its time in ns) makes a changed folder be read again."""
    names: dict[str, list[str]] = {}
    for path in folder.iterdir():
        names.setdefault(composed(path.name), []).append(path.name)
    return names
