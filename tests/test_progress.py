"""progress.py and the progress bar where standard error is no terminal: what a log shows of long work.

The clock is an argument that the tests turn on, because an hour of work cannot be waited for.
"""

from itertools import pairwise

import pytest

from orion_triage.cli.terminal import progress_bar
from orion_triage.progress import Lines, in_words


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def lines_of(seconds_per_step: float, steps: int, *, first: int = 0) -> list[tuple[float, str]]:
    """(seconds since the start, line) of work whose steps take so long each, resumed at `first`."""
    clock, written = Clock(), []
    began = clock.now
    progress = Lines(lambda line: written.append((clock.now - began, line)), "fine-tune", clock)
    progress("fine-tuning", first, steps)
    for done in range(first + 1, steps + 1):
        clock.now += seconds_per_step
        progress("fine-tuning", done, steps)
    return written


def gaps_of(written: list[tuple[float, str]]) -> list[float]:
    """The seconds before each line."""
    return [after - before for before, after in pairwise([0.0, *(seconds for seconds, _ in written)])]


def test_work_of_less_than_a_minute_writes_nothing() -> None:
    assert lines_of(0.59, 100) == []
    assert lines_of(0.19, 300) == []


@pytest.mark.parametrize(("seconds_per_step", "steps"), [(1.0, 300), (7.3, 1000), (59.0, 100), (130.0, 40)])
def test_there_is_a_line_in_each_tenth_or_once_a_minute_if_that_is_later(seconds_per_step: float, steps: int) -> None:
    written = lines_of(seconds_per_step, steps)
    gaps = gaps_of(written)
    tenth = seconds_per_step * steps / 10
    assert min(gaps) >= 60
    assert max(gaps) <= max(tenth, 60 + tenth) + seconds_per_step
    assert max(gaps) <= max(600 + seconds_per_step, 60 + tenth)
    assert written[-1][0] > seconds_per_step * steps - max(tenth, 120) - seconds_per_step


def test_a_tenth_of_two_hours_is_not_silent_for_two_hours() -> None:
    assert max(gaps_of(lines_of(30.0, 2400))) <= 630


def test_a_line_has_stage_steps_and_time_left() -> None:
    written = lines_of(2.0, 300)
    assert written[0] == (60.0, "fine-tune: fine-tuning, 30 of 300, about 9 min left")
    assert written[-1] == (600.0, "fine-tune: fine-tuning, 300 of 300")


def test_the_time_left_of_a_resumed_work_counts_the_steps_of_this_process() -> None:
    assert lines_of(2.0, 300, first=240)[0][1] == "fine-tune: fine-tuning, 270 of 300, about 60 s left"


def test_one_work_after_another_is_timed_by_itself() -> None:
    clock, written = Clock(), []
    progress = Lines(written.append, "", clock)
    progress("decoding frames", 0, 10)
    clock.now += 1000
    progress("decoding frames", 10, 10)
    progress("asking", 0, 10)
    clock.now += 60
    progress("asking", 1, 10)
    clock.now += 60
    progress("checking", 2, 10)  # other words for the next step of the same work
    clock.now += 60
    progress("asking the next model", 0, 10)
    assert written == [
        "decoding frames, 10 of 10",
        "asking, 1 of 10, about 9 min left",
        "checking, 2 of 10, about 8 min left",
        "asking the next model, 0 of 10, time left not known yet",
    ]


def test_a_log_gets_the_lines_and_short_work_leaves_it_empty(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with progress_bar("evaluate base", clock) as progress:
        progress("asking the base model", 0, 240)
        clock.now += 59
        progress("asking the base model", 60, 240)
        assert capsys.readouterr().err == ""
        clock.now += 1
        progress("asking the base model", 61, 240)
        assert capsys.readouterr() == ("", "evaluate base: asking the base model, 61 of 240, about 3 min left\n")
        progress("asking the base model", 240, 240)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_the_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes standard error for a terminal
    clock = Clock()
    with progress_bar("evaluate base", clock) as progress:
        clock.now += 1000
        progress("asking", 120, 240)
    shown = capsys.readouterr().err
    assert "120/240" in shown
    assert "evaluate base: " not in shown


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "0 s"),
        (89.4, "89 s"),
        (90, "2 min"),
        (479, "8 min"),
        (5369, "89 min"),
        (5400, "1 h 30 min"),
        (7200, "2 h"),
        (47.99 * 3600, "47 h 59 min"),
        (172_800, "2 days"),
        (190_800, "2 days 5 h"),
    ],
)
def test_durations_are_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words
