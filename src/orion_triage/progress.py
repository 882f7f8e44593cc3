"""Progress of long work: stages report it, the command line draws it."""

from typing import Protocol


class Progress(Protocol):
    """Called with a description of the work, the steps done so far and the total number of steps."""

    def __call__(self, description: str, done: int, total: int) -> None: ...


def silent(description: str, done: int, total: int) -> None:
    """A Progress that shows nothing: for library callers and scripts."""
