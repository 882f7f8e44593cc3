"""Progress of long work: stages report it, the command line draws it on a terminal and writes lines elsewhere."""

import time
from collections.abc import Callable
from typing import Protocol


class Progress(Protocol):
    """Called with a description of the work, the steps done so far and the total number of steps."""

    def __call__(self, description: str, done: int, total: int) -> None: ...


def silent(description: str, done: int, total: int) -> None:
    """A Progress that shows nothing: for library callers and scripts."""


LINE_SECONDS = 60.0  # nothing is written before, and no two lines are closer
_LONGEST_SILENCE_SECONDS = 600.0  # of work that reports steps: a tenth of a day's work would be two hours


class Lines:
    """A Progress that writes lines, for a log: at most one a minute, and one in each tenth of the work.

    A line has the stage's `name`, the description, the steps and the time left at the pace since this work began. Other
    work begins with another total or fewer steps done. Nothing is written in the first minute.
    """

    def __init__(self, write: Callable[[str], None], name: str = "", clock: Callable[[], float] = time.monotonic):
        self._write, self._name, self._clock = write, name, clock
        self._last_line = clock()
        self._tenth: int | None = None  # of the last line; None: the work has had none
        self._done, self._total = 0, -1  # of the last report
        self._began, self._first = 0.0, 0  # time and steps of the first report: resumed work does not begin at 0

    def __call__(self, description: str, done: int, total: int) -> None:
        now = self._clock()
        if total != self._total or done < self._done:
            self._began, self._first, self._tenth = now, done, None
        self._done, self._total = done, total
        silence = now - self._last_line
        tenth = 10 * done // max(total, 1)
        if silence < LINE_SECONDS or (tenth == self._tenth and silence < _LONGEST_SILENCE_SECONDS):
            return
        self._last_line, self._tenth = now, tenth
        stage = f"{self._name}: " if self._name else ""
        self._write(f"{stage}{description}, {done:,} of {total:,}{self._left(now, done, total)}")

    def _left(self, now: float, done: int, total: int) -> str:
        if done >= total:
            return ""
        if done == self._first:
            return ", time left not known yet"
        return f", about {in_words((total - done) * (now - self._began) / (done - self._first))} left"


def in_words(seconds: float) -> str:
    """A duration for people: "45 s", "8 min", "3 h 20 min", "2 days 5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    if minutes < 48 * 60:
        hours, minutes = divmod(minutes, 60)
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(round(minutes / 60), 24)
    return f"{days} days {hours} h" if hours else f"{days} days"
