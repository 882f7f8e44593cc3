"""Prints the tables of docs/from-laptop-to-pi.md, which stand there between two comments.

python docs/plan_table.py            the table of `orion plan`, and how each number is known
python docs/plan_table.py frames     what how many frames can show
"""

import sys

from orion_triage.evaluate.statistics import wilson
from orion_triage.machine.plan import COLUMNS, plan, reasons, rows, split_of, time_in_words
from orion_triage.settings import load_settings

EXAMPLE = ("lfm2.5-vl-1.6b", "rtx-4090", 400)
PROGRAMS = ("make ", "orion ", "rsync ", "python3 ", "sh ")
FRAMES = (120, 360, 400, 480, 660, 2400)


def markdown(columns: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    every = [columns, ("---",) * len(columns), *lines]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in every)


def steps() -> str:
    """The table of the example, and the reasons."""
    preset, gpu, frames = EXAMPLE
    made = plan(load_settings(preset), gpu, frames)
    lines = [tuple(f"`{cell}`" if cell.startswith(PROGRAMS) else cell for cell in row) for row in rows(made)]
    total = f"In all, without the steps whose time is not known: {time_in_words(*made.seconds, exact=False)} (e).\n"
    return markdown(COLUMNS, lines) + f"\n{total}\n" + "".join(f"- {line}\n" for line in reasons(made))


def frames() -> str:
    """What a number of frames can show, if a third of the test frames is of each category."""
    columns = ("frames in all", "test frames", "of each category", "loss at most, none lost", "loss at most, one lost")
    lines = []
    for count in FRAMES:
        test = split_of(count)["test"]
        valuable = 2 * (test // 3)
        bounds = (f"{100 * wilson(lost, valuable)[1]:.1f} % (e)" for lost in (0, 1))
        lines.append((f"{count:,}", str(test), str(test // 3), *bounds))
    return markdown(columns, lines)


if __name__ == "__main__":
    sys.stdout.write(frames() if sys.argv[1:] == ["frames"] else steps())
