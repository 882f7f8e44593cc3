"""What a frame costs on board: energy, and how many frames an eclipse has time for.

A board with all cores busy draws a known power, idle power included. Energy is that power times measured seconds.
"""

from dataclasses import dataclass
from typing import Any

Range = tuple[float, float]

ECLIPSE_SECONDS = 35 * 60  # of a low orbit of 90 to 95 minutes, at most
_JOULES_PER_WATT_HOUR = 3600


@dataclass(frozen=True)
class Board:
    """Power at the wall in watts, from the lowest to the highest of the sources; `busy` is with all cores at work."""

    name: str
    models: tuple[str, ...]  # beginnings of the name that the machine gives itself
    idle_watts: Range
    busy_watts: Range
    source: str


# Two boards with the Pi 5's processor (BCM2712). Busy: stress-ng's matrix product, and Linpack.
PI_5 = Board(
    "Raspberry Pi 5",
    ("Raspberry Pi 5", "Raspberry Pi Compute Module 5"),
    idle_watts=(2.4, 3.1),
    busy_watts=(8.5, 11.5),
    source="Compute Module 5 (2.4 W idle, 8.5 and 9.4 W busy) and Raspberry Pi 500 (3.1 W, 9 and 11.5 W), measured "
    "at the wall: github.com/geerlingguy/sbc-reviews, issues 58 and 60",
)
BOARDS = (PI_5,)


def board_of(processor: str) -> Board | None:
    """The board with this processor, as `describe` names it; None if its power is not known."""
    return next((board for board in BOARDS if processor.startswith(board.models)), None)


def cost_of(seconds: Range, board: Board | None) -> dict[str, Any]:
    """`frames_per_eclipse` for so many seconds per frame; with a board also `joules` and `frames_per_watt_hour`.

    Each is (low, high).
    """
    quick, slow = seconds
    cost: dict[str, Any] = {"frames_per_eclipse": (ECLIPSE_SECONDS / slow, ECLIPSE_SECONDS / quick)}
    if board:
        low, high = (quick * board.busy_watts[0], slow * board.busy_watts[1])
        cost["joules"] = (low, high)
        cost["frames_per_watt_hour"] = (_JOULES_PER_WATT_HOUR / high, _JOULES_PER_WATT_HOUR / low)
    return cost


def in_words(cost: dict[str, Any], board: Board | None) -> str:
    """One line: "25 to 41 frames in an eclipse of 35 minutes; 430 to 940 J a frame, 3.8 to 8.3 frames a Wh (...)"."""
    said = f"{_range(cost['frames_per_eclipse'])} frames in an eclipse of {ECLIPSE_SECONDS // 60} minutes"
    if board:
        watts = "{:g} to {:g} W".format(*board.busy_watts)
        said += (
            f"; {_range(cost['joules'])} J per frame, {_range(cost['frames_per_watt_hour'])} frames per watt-hour "
            f"({board.name}, all cores busy: {watts})"
        )
    return said


def _range(values: Range) -> str:
    low, high = (f"{value:.1f}" if value < 9.95 else f"{float(f'{value:.2g}'):,.0f}" for value in values)
    return low if low == high else f"{low} to {high}"
