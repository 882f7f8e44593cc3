"""The common interface of all image sources.

A source answers every requested place, in order, with the picture as received or with the reason for its absence. It
does not resize or drop pictures: `frames.decode_frame` makes the frame, and `build` counts the outcomes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from orion_triage.dataset.catalogue import Target
from orion_triage.mission.prompt import Coordinates

# "not visible" is permanent (the place is beyond the horizon). "failed" may succeed later. Sources do not return
# "blank": the build sets it after decoding.
Outcome = Literal["not visible", "failed", "blank"]


@dataclass(frozen=True)
class Shot:
    """One requested picture: a place, and the number of its tile if the place has several."""

    target: Target
    number: int = 1

    @property
    def name(self) -> str:
        return self.target.name if self.number == 1 else f"{self.target.name}~{self.number}"

    @property
    def place(self) -> Coordinates:
        """The position; sources that fetch by position only get targets that have one."""
        assert self.target.coordinates is not None
        return self.target.coordinates


@dataclass(frozen=True)
class Picture:
    """A picture as received, with the place in the centre: PNG or JPEG bytes, or the user's own file."""

    data: bytes | Path
    metres_per_pixel: float | None  # ground sample distance after scaling to 512 pixels; None: unknown, or in the file
    captured_at: str = ""  # ISO 8601, UTC; empty: unknown
    cached: bool = False


@dataclass(frozen=True)
class Absent:
    """No picture; `why` names the place and the server's reply."""

    outcome: Outcome
    why: str


class ImagerySource(Protocol):
    """`synthetic`, `simsat`, `sentinel2` or `directory`.

    `licence` is the licence of the pixels for the dataset card (an SPDX identifier or a short name), `attribution` the
    required credit line, `redistributable` whether the terms allow redistribution (None: unknown).
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
        """One answer per shot, in the order of `shots`, lazily.

        Raises OrionError if no further answer is possible: the server is unreachable or refuses the key.
        """
        ...
