"""Distances on the ground: the size of a pixel on the WGS84 ellipsoid."""

import math
from collections.abc import Sequence

# WGS84: semi-major axis in metres and flattening (NIMA TR8350.2, table 3.1).
SEMI_MAJOR_METRES, FLATTENING = 6_378_137.0, 1 / 298.257223563
_ECCENTRICITY_SQUARED = FLATTENING * (2 - FLATTENING)


def geocentric(lon: float, lat: float) -> tuple[float, float, float]:
    """Earth-centred coordinates in metres of a point on the ellipsoid (EPSG Guidance Note 7-2, section 4.1.1)."""
    longitude, latitude = math.radians(lon), math.radians(lat)
    # The radius of curvature in the prime vertical.
    radius = SEMI_MAJOR_METRES / math.sqrt(1 - _ECCENTRICITY_SQUARED * math.sin(latitude) ** 2)
    return (
        radius * math.cos(latitude) * math.cos(longitude),
        radius * math.cos(latitude) * math.sin(longitude),
        radius * (1 - _ECCENTRICITY_SQUARED) * math.sin(latitude),
    )


def metres_between(first: Sequence[float], second: Sequence[float]) -> float:
    """The straight distance of two points (lon, lat) in degrees; up to 10 km it is the geodesic to 1e-7.

    In geocentric coordinates, poles and antimeridian need no special case.
    """
    return math.dist(geocentric(*first), geocentric(*second))
