"""The numbers in a GGUF file's header, read with bounds: what a stranger's file says of its sizes is not believed.

The reader of the `gguf` package follows an array of 2^60 values that are not there until the memory is full.
Format: the specification in the repository ggml-org/ggml, versions 2 and 3, little-endian.
"""

import struct
from pathlib import Path
from typing import IO

from orion_triage.errors import OrionError
from orion_triage.safe.reading import opened

LARGEST_HEADER_BYTES = 256_000_000  # LFM2's has 3 MB, nearly all of it the vocabulary
_MOST_FIELDS = 10_000  # LFM2's has 40
_MOST_STRINGS = 4_000_000  # of one array; the largest vocabularies have 0.3 million
_STRING, _ARRAY = 8, 9
_INTEGERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 10: "<Q", 11: "<q"}
_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


class _BrokenError(Exception):
    """What is wrong with the header."""


def read_integers(path: Path) -> dict[str, int]:
    """Key -> value of the header's whole numbers.

    Raises OrionError for everything that is no GGUF file, or whose header does not hold what it announces.
    """
    try:
        with opened(path) as file:
            return _fields(_Header(file))
    except FileNotFoundError:
        raise OrionError(f"{path} does not exist.", "Check the path.") from None
    except OSError as error:
        raise OrionError(f"{path} cannot be read: {error.strerror}.", "Check the path.") from None
    except _BrokenError as error:
        raise OrionError(f"{path} is no GGUF file: {error}.", "Fetch it again.") from None


class _Header:
    """The file's bytes one after the other; each piece is compared with what is left before it is asked for."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._left = min(file.seek(0, 2), LARGEST_HEADER_BYTES)
        file.seek(0)

    def _take(self, count: int) -> None:
        if count > self._left:
            raise _BrokenError(f"it announces {count:,} bytes where {self._left:,} are left")
        self._left -= count

    def bytes(self, count: int) -> bytes:
        self._take(count)
        data = self._file.read(count)
        if len(data) < count:
            raise _BrokenError("it became shorter while it was read")
        return data

    def skip(self, count: int) -> None:
        self._take(count)
        self._file.seek(count, 1)

    def number(self, form: str) -> int:
        value: int = struct.unpack(form, self.bytes(struct.calcsize(form)))[0]
        return value


def _fields(header: _Header) -> dict[str, int]:
    if header.bytes(4) != b"GGUF":
        raise _BrokenError("it does not begin with GGUF")
    if (version := header.number("<I")) not in (2, 3):
        raise _BrokenError(f"its version is {version}, not 2 or 3")
    header.skip(8)  # how many tensors
    count = header.number("<Q")
    if count > _MOST_FIELDS:
        raise _BrokenError(f"it announces {count:,} fields")
    seen: set[bytes] = set()
    integers: dict[str, int] = {}
    for _ in range(count):
        key, kind = header.bytes(header.number("<Q")), header.number("<I")
        if key in seen:
            raise _BrokenError(f"the field {key[:40]!r} stands there twice")
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
