"""The contract between ground and flight: prompt and coordinate format.

Datasets, adapters and deployed flight software use these exact bytes. Only this module defines them. Prompts are
rendered from fields; no other code edits a rendered prompt.
"""

import math
import re
from dataclasses import dataclass

from orion_triage.errors import OrionError

_OPENING = "You are an autonomous orbital triage assistant. Analyze this high-resolution RGB satellite image"
_TASK = """
Strictly use one of these categories based on visual morphology:
- HIGH: Extreme-scale strategic anomalies, dense geometric cargo/vessel infrastructure, massive cooling \
towers, sprawling runways, or distinct geological/artificial chokepoints.
- MEDIUM: Standard human civilization. Ordinary urban grids, low-density suburban sprawl, regular \
checkerboard agriculture, or localized infrastructure (malls, regional strips).
- LOW: Complete absence of human infrastructure. Featureless deep oceans, unbroken canopy, barren deserts, \
or purely natural geological formations (craters, natural cliffs).
You MUST output your response as a valid JSON object. To ensure accurate visual reasoning, you must output \
the "reason" key FIRST, followed by the "category" key."""
# The published splits and the reference's flight software have one newline between image and prompt.
IMAGE_PLACEHOLDER = "<image>\n"


@dataclass(frozen=True)
class Coordinates:
    """A position in degrees, rounded to two decimals when rendered (1.1 km at the equator)."""

    lon: float
    lat: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.lon) and -180 <= self.lon <= 180):
            raise OrionError(f"longitude {self.lon} is not within -180..180", "Check for swapped lon and lat.")
        if not (math.isfinite(self.lat) and -90 <= self.lat <= 90):
            raise OrionError(f"latitude {self.lat} is not within -90..90", "Check for swapped lon and lat.")


def format_degrees(value: float) -> str:
    """Python's shortest form of the value rounded to two decimals: 33.0, -6.5, -120.62."""
    rounded = round(float(value), 2)
    return repr(rounded if rounded != 0 else 0.0)


def render_prompt(coordinates: Coordinates | None) -> str:
    """The user's text of one frame, with or without its coordinates."""
    if coordinates is None:
        return f"{_OPENING}.{_TASK}"
    where = f"Longitude: {format_degrees(coordinates.lon)}, Latitude: {format_degrees(coordinates.lat)}"
    return f"{_OPENING} captured at {where}.{_TASK}"


_WITH_COORDINATES = re.compile(
    re.escape(_OPENING)
    + r" captured at Longitude: (-?\d{1,3}\.\d{1,30}), Latitude: (-?\d{1,3}\.\d{1,30})\."
    + re.escape(_TASK)
)


def parse_prompt(prompt: str) -> Coordinates | None:
    """The fields of a rendered prompt; raises OrionError unless they render to the same bytes."""
    if prompt == render_prompt(None):
        return None
    match = _WITH_COORDINATES.fullmatch(prompt)
    if match:
        coordinates = Coordinates(float(match[1]), float(match[2]))
        if render_prompt(coordinates) == prompt:
            return coordinates
        raise OrionError(
            f"coordinates {match[1]}, {match[2]} are not in the prompt's two-decimal form",
            f"Write {format_degrees(coordinates.lon)}, {format_degrees(coordinates.lat)}.",
        )
    raise OrionError(
        f"the prompt is not the triage prompt: {prompt[:80]!r}...",
        "Write records with orion_triage.dataset.records, which renders the prompt from its fields.",
    )
