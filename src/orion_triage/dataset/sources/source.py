"""Where frames come from: one interface, whatever hands over the pictures.

A source answers every place that it is asked about, in order, with the picture as it was received or with why there
is none. It never decodes for keeps, resizes or drops: `frames.decode_frame` makes the frame, `build` keeps the account.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from orion_triage.dataset.catalogue import Target
from orion_triage.mission.prompt import Coordinates

# "not visible" is for good (the place lies beyond the horizon); "failed" may go better another day; that a picture is
# "blank" no source says, but whoever decodes it.
Outcome = Literal["not visible", "failed", "blank"]


@dataclass(frozen=True)
class Shot:
    """One picture that is asked for: a place, and the number of its tile where a place has several."""

    target: Target
    number: int = 1

    @property
    def name(self) -> str:
        return self.target.name if self.number == 1 else f"{self.target.name}~{self.number}"

    @property
    def place(self) -> Coordinates:
        """Where to look; sources that fetch by position are only asked for targets that have one."""
        assert self.target.coordinates is not None
        return self.target.coordinates


@dataclass(frozen=True)
class Picture:
    """A picture as received: PNG or JPEG bytes that show the place in their centre."""

    data: bytes
    metres_per_pixel: float | None  # ground sample distance once it is 512 pixels wide; None: unknown
    captured_at: str = ""  # ISO 8601, UTC; empty: unknown
    cached: bool = False


@dataclass(frozen=True)
class Absent:
    """No picture, and why, in words that name the place and the answer that was given."""

    outcome: Outcome
    why: str


class ImagerySource(Protocol):
    """`synthetic`, `simsat`, `sentinel2` or `directory`.

    `licence` is what the dataset card says of the pixels (an SPDX identifier or a short name), `attribution` the line
    that must go with them, `redistributable` whether their terms allow handing them on at all (None: not known).
    """

    @property
    def name(self) -> str: ...
    @property
    def licence(self) -> str: ...
    @property
    def attribution(self) -> str: ...
    @property
    def redistributable(self) -> bool | None: ...

    def pictures(self, shots: Sequence[Shot]) -> Iterator[Picture | Absent]:
        """One answer a shot, in the order of `shots`, lazily.

        Raises OrionError when going on is pointless: the server is not there, or refuses the key.
        """
        ...
