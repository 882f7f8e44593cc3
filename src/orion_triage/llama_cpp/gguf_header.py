"""Read the integers in a GGUF file's header with bounds checks: sizes in third-party files are not trusted.

The reader of the `gguf` package fills the memory for an array that claims 2^60 values but does not contain them.
Format: the specification in the repository ggml-org/ggml, versions 2 and 3, little-endian.
"""

import struct
from pathlib import Path
from typing import IO

from orion_triage.errors import OrionError
from orion_triage.safe.reading import opened

LARGEST_HEADER_BYTES = 256_000_000  # a model of 1.6 billion has 3 MB, mostly the vocabulary
_MOST_FIELDS = 10_000  # a model of 1.6 billion has 40
_MOST_STRINGS = 4_000_000  # of one array; the largest vocabularies have 0.3 million
_STRING, _ARRAY = 8, 9
_INTEGERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 10: "<Q", 11: "<q"}
_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


class _BrokenError(Exception):
    """An invalid header; the message states what is wrong."""


def read_integers(path: Path) -> dict[str, int]:
    """Key -> value of the header's integer fields.

    Raises OrionError for a missing file, a file that is not GGUF, and an inconsistent header.
    """
    try:
        with opened(path) as file:
            return _fields(_Header(file))
    except FileNotFoundError:
        raise OrionError(f"{path} does not exist.", "Check the path.") from None
    except OSError as error:
        raise OrionError(f"{path} cannot be read: {error.strerror}.", "Check the path.") from None
    except _BrokenError as error:
        raise OrionError(f"{path} is not a valid GGUF file: {error}.", "Fetch it again.") from None


class _Header:
    """Sequential reader of the file; checks each size against the remaining bytes before it reads."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._left = min(file.seek(0, 2), LARGEST_HEADER_BYTES)
        file.seek(0)

    def _take(self, count: int) -> None:
        if count > self._left:
            raise _BrokenError(f"the header claims {count:,} bytes, but {self._left:,} remain")
        self._left -= count

    def bytes(self, count: int) -> bytes:
        self._take(count)
        data = self._file.read(count)
        if len(data) < count:
            raise _BrokenError("the file became shorter while it was read")
        return data

    def skip(self, count: int) -> None:
        self._take(count)
        self._file.seek(count, 1)

    def number(self, form: str) -> int:
        value: int = struct.unpack(form, self.bytes(struct.calcsize(form)))[0]
        return value


def _fields(header: _Header) -> dict[str, int]:
    if header.bytes(4) != b"GGUF":
        raise _BrokenError("the first four bytes are not GGUF")
    if (version := header.number("<I")) not in (2, 3):
        raise _BrokenError(f"the version is {version}, not 2 or 3")
    header.skip(8)  # number of tensors
    count = header.number("<Q")
    if count > _MOST_FIELDS:
        raise _BrokenError(f"the header claims {count:,} fields; the limit is {_MOST_FIELDS:,}")
    seen: set[bytes] = set()
    integers: dict[str, int] = {}
    for _ in range(count):
        key, kind = header.bytes(header.number("<Q")), header.number("<I")
        if key in seen:
            raise _BrokenError(f"the field {key[:40]!r} appears twice")
        seen.add(key)
        if kind in _INTEGERS:
            integers[key.decode("utf-8", "replace")] = header.number(_INTEGERS[kind])
        elif kind == _ARRAY:
            _skip_array(header, key)
        else:
            _skip(header, kind, key)
    return integers


def _skip(header: _Header, kind: int, key: bytes) -> None:
    if kind == _STRING:
        header.skip(header.number("<Q"))
    elif kind in _BYTES:
        header.skip(_BYTES[kind])
    else:
        raise _BrokenError(f"the field {key[:40]!r} has the unknown type {kind}")


def _skip_array(header: _Header, key: bytes) -> None:
    kind, count = header.number("<I"), header.number("<Q")
    if kind in _BYTES:
        header.skip(count * _BYTES[kind])
        return
    if kind != _STRING or count > _MOST_STRINGS:
        raise _BrokenError(f"the field {key[:40]!r} is an array of {count:,} values of type {kind}")
    for _ in range(count):
        _skip(header, kind, key)
