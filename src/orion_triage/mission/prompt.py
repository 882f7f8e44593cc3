"""The contract between ground and flight: prompt and coordinate format.

Datasets, adapters and deployed flight software use these exact bytes. Only this module makes them, from the mission's
texts. Prompts are rendered from fields; no other code edits a rendered prompt.
"""

import math
import re
from dataclasses import dataclass
from functools import lru_cache

from orion_triage.errors import OrionError
from orion_triage.mission.fields import allowed
from orion_triage.mission.mission import CATEGORIES, COORDINATES, FIELDS, LATITUDE, LONGITUDE, Mission

# The published splits and the reference's flight software have one newline between image and prompt.
IMAGE = "<image>"


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


@lru_cache(16)
def _around(mission: Mission) -> tuple[str, str]:
    """The prompt's text before and after the place of the coordinates."""
    lines = "\n".join(f"- {one.name}: {one.definition}" for one in mission.categories)
    of_fields = "\n".join(f"- {one.name}: {allowed(one)}. {one.definition}" for one in mission.fields)
    text = mission.prompt.replace(CATEGORIES, lines).replace(FIELDS, of_fields)
    before, _, after = text.partition(COORDINATES)
    return before, after


def render_prompt(mission: Mission, coordinates: Coordinates | None) -> str:
    """The user's text of one frame, with or without its coordinates."""
    before, after = _around(mission)
    if coordinates is None:
        return before + after
    clause = mission.coordinates.replace(LONGITUDE, format_degrees(coordinates.lon))
    return before + clause.replace(LATITUDE, format_degrees(coordinates.lat)) + after


def with_image(mission: Mission, prompt: str, image: str = IMAGE) -> str:
    """The prompt with `image` in the place of the image, and one newline between them."""
    return f"{image}\n{prompt}" if mission.image == "before the text" else f"{prompt}\n{image}"


def without_image(mission: Mission, text: str) -> str | None:
    """The prompt in a text of `with_image`; None if the image is not in its place."""
    if mission.image == "before the text":
        return text.removeprefix(f"{IMAGE}\n") if text.startswith(f"{IMAGE}\n") else None
    return text.removesuffix(f"\n{IMAGE}") if text.endswith(f"\n{IMAGE}") else None


def user_text(mission: Mission, coordinates: Coordinates | None) -> str:
    """The user's whole turn: the prompt, with IMAGE in the place of the image."""
    return with_image(mission, render_prompt(mission, coordinates))


@lru_cache(16)
def _with_coordinates(mission: Mission) -> re.Pattern[str]:
    before, after = _around(mission)
    number = r"(-?\d{1,3}\.\d{1,30})"
    clause = re.escape(mission.coordinates)
    for placeholder in (LONGITUDE, LATITUDE):
        clause = clause.replace(re.escape(placeholder), number)
    return re.compile(re.escape(before) + clause + re.escape(after))


def parse_prompt(mission: Mission, prompt: str) -> Coordinates | None:
    """The fields of a rendered prompt; raises OrionError unless they render to the same bytes."""
    if prompt == render_prompt(mission, None):
        return None
    match = _with_coordinates(mission).fullmatch(prompt)
    if match:
        coordinates = Coordinates(float(match[1]), float(match[2]))
        if render_prompt(mission, coordinates) == prompt:
            return coordinates
        raise OrionError(
            f"coordinates {match[1]}, {match[2]} are not in the prompt's two-decimal form",
            f"Write {format_degrees(coordinates.lon)}, {format_degrees(coordinates.lat)}.",
        )
    raise OrionError(
        f"the prompt is not that of the mission {mission.name}: {prompt[:80]!r}...",
        "Use the dataset's own mission (--mission FILE), or write records with orion_triage.dataset.records.",
    )
