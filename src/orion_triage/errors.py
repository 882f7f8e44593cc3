"""The errors that reach a user: one sentence on what is wrong, one on what to do."""

import errno
import os
from collections.abc import Iterator


def printable(text: str) -> str:
    """`text` with escapes for what a terminal would obey or could not encode; line ends stay."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def one_line(text: str) -> str:
    """`printable`, with line ends as escapes too: file names and what stands in files can hold any."""
    return printable(text).replace("\n", "\\n")


class OrionError(Exception):
    """A mistake or an obstacle that the user can act on.

    `message` names the file, line and value; `fix` says what to do about it. The command line prints
    both and exits with status 1; library callers catch this one class. What files and servers of others put into
    it is made printable, so that no terminal obeys it.
    """

    def __init__(self, message: str, fix: str = "") -> None:
        message, fix = printable(message), printable(fix)
        super().__init__(message if not fix else f"{message} {fix}")
        self.message = message
        self.fix = fix


class FrameError(OrionError):
    """A frame that cannot be used: missing, damaged or of another size. Callers refuse it and go on."""


class RecordError(OrionError):
    """A dataset line that breaks the record format."""


class AnswerError(OrionError):
    """The server has an answer that it cannot hand over: its bytes are no UTF-8. The next question may go well."""


class ServerError(OrionError):
    """The llama.cpp server did not answer as it must."""


DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
DISK_FIX = "Free some space, or look at the disk's health; then the same command goes on."
# How torch (twice), C++ and Python tell of a write that failed without the system's words for it.
_DISK_WORDS = ("PytorchStreamWriter failed", ". unexpected pos ", "iostream error", "No usable temporary directory")


def words_of_disk(text: str) -> str:
    """What a library or a program says of a disk in trouble, in the system's words if they are there; else empty."""
    for number in DISK_ERRORS:
        if f"(os error {number})" in text or os.strerror(number) in text:  # the first is Rust's
            return os.strerror(number)
    line = next((line for line in text.splitlines() if any(word in line for word in _DISK_WORDS)), "")
    return f"the disk took no more, or failed ({line.strip().rstrip('.')})" if line else ""


def disk_words_of(error: BaseException) -> str:
    """`words_of_disk` of an error and those that led to it."""
    return words_of_disk("\n".join(str(one) for one in _chain(error)))


def obstacle(error: BaseException) -> OrionError | None:
    """What the operating system refused, in the user's words; None for an error that is not of its making."""
    chain = list(_chain(error))
    for one in chain:
        if not isinstance(one, OSError) or one.errno is None:
            continue
        disk = one.errno in DISK_ERRORS
        file = one.filename if one.filename2 is None else one.filename2  # the second one is what was to be written
        if disk or file is not None:  # without a file it is a connection's or a program's
            place = f"{os.fsdecode(file)}: " if file is not None and not isinstance(file, int) else ""
            what = one.strerror or os.strerror(one.errno)
            return OrionError(f"{place}{what}.", DISK_FIX if disk else "Check the path and its permissions.")
    said = disk_words_of(error)
    return OrionError(f"{said}.", DISK_FIX) if said else None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and those that led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
