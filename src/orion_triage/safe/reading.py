"""Reading third-party files: regular files of limited size, no Git LFS pointers, and unambiguous JSON."""

import json
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from orion_triage.errors import OrionError

LARGEST_TABLE_BYTES = 1_000_000_000  # of a table of records or places; the published train split has 0.6 MB
LARGEST_JSON_BYTES = 64_000_000  # of a configuration file; the largest, the tokenizer's, has 5 MB
# 'git clone' without git-lfs, and "Download ZIP", leave such a text of about 130 bytes in the place of each large file.
_LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"
_LARGEST_LFS_POINTER = 1024  # bytes, by its specification


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """A regular file, open for reading; pipes, devices and folders are refused without waiting.

    Raises FileNotFoundError, since only the caller knows the fix, and OrionError for every other obstacle, also for a
    Git LFS pointer in the place of the file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # opening a pipe would wait for a writer
    except FileNotFoundError:
        raise
    except OSError as error:
        raise OrionError(f"{path} cannot be read: {error.strerror}.", "Check the path.") from None
    except ValueError as error:  # a name with NUL, or with half of a surrogate pair
        raise OrionError(f"{str(path)!r} is not a valid path: {error}.", "Check the path.") from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OrionError(f"{path} is not a regular file.", "Pass a file, not a folder, pipe or device.")
        if _is_lfs_pointer(descriptor):
            raise _pointers(path.parent, [path.name])
        with open(descriptor, "rb", closefd=False) as file:
            yield file
    finally:
        os.close(descriptor)


def refuse_lfs_pointers(folder: Path) -> None:
    """Raise OrionError that names the Git LFS pointers in the folder, not in folders below it.

    For files that a library opens: it would call a pointer a damaged file. `opened` checks its file itself.
    """
    found = []
    for path in sorted(folder.glob("*")):
        if path.is_file() and path.stat().st_size <= _LARGEST_LFS_POINTER:
            with suppress(OSError), path.open("rb") as file:
                found += [path.name] if _is_lfs_pointer(file.fileno()) else []
    if found:
        raise _pointers(folder, found)


def _is_lfs_pointer(descriptor: int) -> bool:
    """Whether the open file, whose position is left as it is, starts as a pointer."""
    try:
        return os.pread(descriptor, len(_LFS_POINTER), 0) == _LFS_POINTER
    except OSError:  # the caller's own reading reports it
        return False


def _pointers(folder: Path, names: Sequence[str]) -> OrionError:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    listed = ", ".join(str(folder / name) for name in names[:3]) + more
    verb = "is a Git LFS pointer, not the file itself" if len(names) == 1 else "are Git LFS pointers, not the files"
    return OrionError(f"{listed} {verb}.", f"Run 'git lfs pull' in {folder}, or fetch the files again.")


def read_bytes(path: Path, most: int) -> bytes:
    """The content of a regular file of at most `most` bytes.

    Raises FileNotFoundError, and OrionError for a larger or unreadable file.
    """
    try:
        with opened(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > most:
                raise OrionError(
                    f"{path} has {size:,} bytes; the limit is {most:,}.", "Check that it is the right file."
                )
            data = file.read(most + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise OrionError(f"{path} cannot be read: {error.strerror}.", "Check the path.") from None
    if len(data) > most:  # the file is growing, or it is in /proc, where sizes are 0
        raise OrionError(f"{path} has more than {most:,} bytes, the limit.", "Check that it is the right file.")
    return data


def read_text(path: Path, most: int) -> str:
    """The text of a file with every line end as a newline, without a byte order mark.

    Raises as `read_bytes`, and OrionError if it is not UTF-8.
    """
    data = read_bytes(path, most)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise OrionError(f"{path} is not UTF-8 (byte {error.start}).", "Save it as UTF-8.") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text; raises ValueError for invalid or ambiguous JSON.

    Stricter than json.loads: refuses duplicate keys in an object, NaN and Infinity, and nesting beyond the
    interpreter's recursion limit.
    """
    try:
        return json.loads(text, object_pairs_hook=_keys_once, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _keys_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (key, _), *_ = (Counter(key for key, _ in pairs) - Counter(found.keys())).items()
        raise ValueError(f"the key {key[:40]!r} appears twice")
    return found


def _no_number(word: str) -> Any:
    raise ValueError(f"{word} is not a JSON number")


def shown(value: Any, most: int = 80) -> str:
    """The first `most` characters of the repr of an untrusted value, printable, for an error message."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number with more digits than Python prints; nested too deeply
        return f"a {type(value).__name__} that cannot be printed"
    return text if len(text) <= most else f"{text[:most]}..."


def read_object(path: Path, most: int = LARGEST_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file; raises FileNotFoundError, and OrionError for any other content."""
    try:
        value = parse_json(read_text(path, most))
    except ValueError as error:
        raise OrionError(f"{path} is not JSON: {error}.", "Fetch it again.") from None
    if not isinstance(value, dict):
        raise OrionError(f"{path} is not a JSON object.", "Fetch it again.")
    return value
