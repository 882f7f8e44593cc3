"""How long work reports itself: stages call, the command line draws."""

from typing import Protocol


class Progress(Protocol):
    """Called with what is being done, the steps done so far and the total."""

    def __call__(self, description: str, done: int, total: int) -> None: ...


def silent(description: str, done: int, total: int) -> None:
    """For library callers and scripts."""
