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


def user_text(mission: Mission, coordinates: Coordinates | None, image: str = IMAGE) -> str:
    """The user's whole turn of one frame, with or without its coordinates; `image` stands for the image.

    With the image after the text, the coordinates follow the image: what precedes them is then the same for every
    frame, so a server reads the text once for all frames, and one image once for all questions about it.
    """
    before, after, clause = *_around(mission), _clause(mission, coordinates)
    if mission.image == "before the text":
        return f"{image}\n{before}{clause}{after}"
    return f"{before}{after}\n{image}{clause}"


def render_prompt(mission: Mission, coordinates: Coordinates | None) -> str:
    """The text of the user's turn without the image and the newline beside it."""
    return user_text(mission, coordinates).replace(place_of_image(mission), "", 1)


def place_of_image(mission: Mission) -> str:
    """IMAGE with the newline between it and the text."""
    return f"{IMAGE}\n" if mission.image == "before the text" else f"\n{IMAGE}"


def _clause(mission: Mission, coordinates: Coordinates | None) -> str:
    if coordinates is None:
        return ""
    clause = mission.coordinates.replace(LONGITUDE, format_degrees(coordinates.lon))
    return clause.replace(LATITUDE, format_degrees(coordinates.lat))


@lru_cache(16)
def _with_coordinates(mission: Mission) -> re.Pattern[str]:
    before, after = _around(mission)
    number = r"(-?\d{1,3}\.\d{1,30})"
    clause = re.escape(mission.coordinates)
    for placeholder in (LONGITUDE, LATITUDE):
        clause = clause.replace(re.escape(placeholder), number)
    inside = mission.image == "before the text"
    return re.compile(re.escape(before) + (clause if inside else "") + re.escape(after) + ("" if inside else clause))


def parse_user_text(mission: Mission, text: str) -> Coordinates | None:
    """The fields of a text of `user_text`; raises OrionError unless they render to the same bytes."""
    place = place_of_image(mission)
    coordinates = parse_prompt(mission, text.replace(place, "", 1)) if place in text else None
    if text == user_text(mission, coordinates):
        return coordinates
    before = mission.image == "before the text"
    raise OrionError(
        f"the user's turn {f'starts with {text[:12]!r}' if before else f'ends with {text[-12:]!r}'}",
        f"It must start with {place!r}."
        if before
        else f"It must have {place!r} after the text, and the coordinates, if any, after it.",
    )


def parse_prompt(mission: Mission, prompt: str) -> Coordinates | None:
    """The fields of a text of `render_prompt`; raises OrionError unless they render to the same bytes."""
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
