"""Reading what strangers made: regular files of bounded size, and JSON that says one thing."""

import json
import os
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from orion_triage.errors import OrionError

LARGEST_TABLE_BYTES = 1_000_000_000  # of records or places: the published train split has 0.6 MB
LARGEST_JSON_BYTES = 64_000_000  # of a configuration; the tokenizer's, the largest, has 5 MB


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """A regular file, open for reading; a pipe, a device or a folder is refused and never waited for.

    Raises FileNotFoundError, whose fix only the caller knows, and OrionError for everything else that is in the way.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # opening a pipe would wait for a writer
    except FileNotFoundError:
        raise
    except OSError as error:
        raise OrionError(f"{path} cannot be read: {error.strerror}.", "Check the path.") from None
    except ValueError as error:  # a name with NUL, or with half of a surrogate pair
        raise OrionError(f"{str(path)!r} is no path: {error}.", "Check the path.") from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OrionError(f"{path} is no regular file.", "Name a file, not a folder, pipe or device.")
        with open(descriptor, "rb", closefd=False) as file:
            yield file
    finally:
        os.close(descriptor)


def read_bytes(path: Path, most: int) -> bytes:
    """The bytes of a file, `opened` as above, of at most `most` bytes; raises OrionError for a larger one."""
    try:
        with opened(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > most:
                raise OrionError(
                    f"{path} has {size:,} bytes, more than the {most:,} that are read.", "Is it the right file?"
                )
            data = file.read(most + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise OrionError(f"{path} cannot be read: {error.strerror}.", "Check the path.") from None
    if len(data) > most:  # it grows, or lies in /proc, where sizes are 0
        raise OrionError(f"{path} has more than the {most:,} bytes that are read.", "Is it the right file?")
    return data


def read_text(path: Path, most: int, encoding: str = "utf-8") -> str:
    """The text of a file as `read_bytes` reads it, with every line end as a newline; OrionError where it is not UTF-8.

    With "utf-8-sig" a byte order mark is passed over.
    """
    data = read_bytes(path, most)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise OrionError(f"{path} is not UTF-8 (byte {error.start}).", "Save it as UTF-8.") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def parse_json(text: str | bytes) -> Any:
    """The value that JSON text means; raises ValueError for everything that is none, or could mean several things.

    Refused beyond json.loads: a key twice in one object, NaN and Infinity, and nesting that the interpreter cannot
    follow.
    """
    try:
        return json.loads(text, object_pairs_hook=_keys_once, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _keys_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (key, _), *_ = (Counter(key for key, _ in pairs) - Counter(found.keys())).items()
        raise ValueError(f"the key {key[:40]!r} stands there twice")
    return found


def _no_number(word: str) -> Any:
    raise ValueError(f"{word} is no number in JSON")


def shown(value: Any, most: int = 80) -> str:
    """`value` for an error text: its first characters, printable, whatever a stranger put there."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of more digits than Python writes out; nested too deeply
        return f"a {type(value).__name__} that cannot be written out"
    return text if len(text) <= most else f"{text[:most]}..."


def read_object(path: Path, most: int = LARGEST_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file; raises FileNotFoundError, and OrionError for everything that is none."""
    try:
        value = parse_json(read_text(path, most))
    except ValueError as error:
        raise OrionError(f"{path} is not JSON: {error}.", "Fetch it again.") from None
    if not isinstance(value, dict):
        raise OrionError(f"{path} is no JSON object.", "Fetch it again.")
    return value
