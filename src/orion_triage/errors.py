"""The errors that reach a user: one sentence states what is wrong, one states what to do."""

import errno
import os
from collections.abc import Iterator


def printable(text: str) -> str:
    """`text` with control characters and characters that a terminal cannot encode escaped; line ends are kept."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def one_line(text: str) -> str:
    """`printable`, with line ends escaped too: file names and file contents can contain any character."""
    return printable(text).replace("\n", "\\n")


class OrionError(Exception):
    """An error that the user can act on.

    `message` names the file, line and value; `fix` states what to do. The command line prints both and exits with
    status 1; library callers catch this one class. Control characters are escaped, because messages quote
    third-party files and servers.
    """

    def __init__(self, message: str, fix: str = "") -> None:
        message, fix = printable(message), printable(fix)
        super().__init__(message if not fix else f"{message} {fix}")
        self.message = message
        self.fix = fix


class ParityError(OrionError):
    """llama.cpp does not compute what transformers does; `measured` says in a few words what was found."""

    def __init__(self, message: str, fix: str, measured: str) -> None:
        super().__init__(message, fix)
        self.measured = printable(measured)


class FrameError(OrionError):
    """A frame that cannot be used: missing, damaged or of the wrong size. Callers report it and continue."""


class RecordError(OrionError):
    """A dataset line that does not follow the record format."""


class AnswerError(OrionError):
    """The model's answer is not valid UTF-8, so the server cannot return it. The next question may succeed."""


class ServerError(OrionError):
    """The llama.cpp server is unreachable or its reply is invalid."""


class ParameterError(ServerError):
    """The server does not take a parameter of the request, or its value."""

    def __init__(self, message: str, fix: str, parameter: str) -> None:
        super().__init__(message, fix)
        self.parameter = parameter


class RateLimitError(ServerError):
    """The server still answers "too many requests" (429) after the wait that it asked for."""


DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
DISK_FIX = "Free some space or check the disk, then run the same command again to resume."
# Messages of torch (two), C++ and Python about a failed write, which do not contain the system's error message.
_DISK_WORDS = ("PytorchStreamWriter failed", ". unexpected pos ", "iostream error", "No usable temporary directory")


def words_of_disk(text: str) -> str:
    """The disk error that a library's or program's output reports, as the system's message if possible; else empty."""
    for number in DISK_ERRORS:
        if f"(os error {number})" in text or os.strerror(number) in text:  # the first form is Rust's
            return os.strerror(number)
    line = next((line for line in text.splitlines() if any(word in line for word in _DISK_WORDS)), "")
    return f"a write failed: the disk is full or faulty ({line.strip().rstrip('.')})" if line else ""


def disk_words_of(error: BaseException) -> str:
    """`words_of_disk` for an error and its causes."""
    return words_of_disk("\n".join(str(one) for one in _chain(error)))


def obstacle(error: BaseException) -> OrionError | None:
    """An operating system error as an OrionError; None for any other error."""
    chain = list(_chain(error))
    for one in chain:
        if not isinstance(one, OSError) or one.errno is None:
            continue
        disk = one.errno in DISK_ERRORS
        file = one.filename if one.filename2 is None else one.filename2  # the second is the target of a write
        if disk or file is not None:  # an error without a file comes from a connection or a program
            place = f"{os.fsdecode(file)}: " if file is not None and not isinstance(file, int) else ""
            what = one.strerror or os.strerror(one.errno)
            return OrionError(f"{place}{what}.", DISK_FIX if disk else "Check the path and its permissions.")
    reason = disk_words_of(error)
    return OrionError(f"{reason}.", DISK_FIX) if reason else None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and its causes."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
