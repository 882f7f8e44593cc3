"""A coarse land outline, to detect swapped longitude and latitude.

The outline is Natural Earth's at 1:110 million, rounded to 0.1 degrees. It has no islands below about 20 km.
"""

import json
from collections.abc import Sequence
from functools import cache
from importlib import resources

import numpy as np
from numpy.typing import NDArray

from orion_triage.mission.prompt import Coordinates

OUTLINE = "coastline.json"
_ANTARCTIC_LATITUDE = -60.0
_MARGIN_DEGREES = 2.0  # ports, platforms and small islands can be off the outline, but not 220 km on all sides


@cache
def outline() -> list[list[list[float]]]:
    """Closed rings of [longitude, latitude] in degrees, cut at the antimeridian."""
    rings: list[list[list[float]]] = json.loads((resources.files("orion_triage.dataset") / OUTLINE).read_text())
    return rings


def on_land(lon: NDArray[np.float64], lat: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether points (two arrays of shape [n], degrees) are inside the outline."""
    from matplotlib.path import Path

    points = np.stack([lon, lat], axis=1)
    inside = np.zeros(len(points), dtype=np.bool_)
    for ring in outline():
        inside ^= Path(np.array(ring)).contains_points(points)  # a ring inside a ring is a sea
    return inside


def perhaps_swapped(places: Sequence[Coordinates]) -> list[int]:
    """Indices of places that are far out at sea or in Antarctica, but on other land if the two numbers are swapped.

    Use it only for places that show something built: a third of the open sea would be on land when swapped. Antarctica
    has a few stations, but much of America lies there when swapped (longitudes of -60 to -90).
    """
    if not places:
        return []
    lon, lat = np.array([(place.lon, place.lat) for place in places]).T
    steps = (-_MARGIN_DEGREES, 0.0, _MARGIN_DEGREES)
    near = np.zeros(len(places), dtype=np.bool_)
    for east in steps:
        for north in steps:
            near |= on_land((lon + east + 180) % 360 - 180, np.clip(lat + north, -90, 90))
    near &= lat > _ANTARCTIC_LATITUDE
    swapped = (np.abs(lon) <= 90) & (lon > _ANTARCTIC_LATITUDE) & on_land(lat, np.clip(lon, -90, 90))
    return [int(index) for index in np.flatnonzero(~near & swapped)]
