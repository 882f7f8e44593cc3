"""The errors that reach a user: one sentence on what is wrong, one on what to do."""

import errno
import os
from collections.abc import Iterator


def printable(text: str) -> str:
    """`text` with escapes for what a terminal would obey or could not encode; line ends stay."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


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


# How libraries say that the disk failed when they do not raise OSError: Rust (safetensors, tokenizers), torch, C++.
_DISK_WORDS = ("(os error 28)", "(os error 5)", "(os error 122)", "PytorchStreamWriter failed", "iostream error")
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
_DISK_FIX = "Free some space, or look at the disk's health; then the same command goes on."


def obstacle(error: BaseException) -> OrionError | None:
    """What the operating system refused, in the user's words; None for an error that is not of its making."""
    chain = list(_chain(error))
    for one in chain:
        if not isinstance(one, OSError) or one.errno is None:
            continue
        disk = one.errno in _DISK_ERRORS
        if disk or one.filename is not None:  # without a file it is a connection's or a program's
            place = f"{one.filename}: " if one.filename is not None else ""
            what = one.strerror or os.strerror(one.errno)
            return OrionError(f"{place}{what}.", _DISK_FIX if disk else "Check the path and its permissions.")
    for one in chain:
        if any(word in str(one) for word in _DISK_WORDS):
            return OrionError(f"the disk took no more, or failed: {one}.", _DISK_FIX)
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and those that led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
