"""dataset/land.py: what lies on land, and which places look exchanged."""

import numpy as np

from orion_triage.dataset.catalogue import load_catalogue
from orion_triage.dataset.land import on_land, perhaps_swapped
from orion_triage.mission.prompt import Coordinates


def test_land_and_sea() -> None:
    land = [(2.3, 48.9), (-98, 39), (134, -25), (25, 0), (179, 67), (-179, 68), (0, -85)]
    sea = [(-30, 30), (-140, 0), (80, -30), (180, 0), (51, 42), (0, 88)]  # the fifth is the Caspian
    lon, lat = np.array([*land, *sea], dtype=float).T
    assert on_land(lon, lat).tolist() == [True] * len(land) + [False] * len(sea)


def test_none_of_the_catalogue_looks_exchanged_and_exchanged_many_do() -> None:
    """Of 140 built places that can be exchanged, 67, of them 30 by lying in Antarctica: a whole file is noticed."""
    places = [t.coordinates for t in load_catalogue() if t.category != "LOW" and t.coordinates]
    assert len(places) == 240
    assert perhaps_swapped(places) == []
    exchanged = [Coordinates(place.lat, place.lon) for place in places if abs(place.lon) <= 90]
    found = [exchanged[index] for index in perhaps_swapped(exchanged)]
    assert len(found) > 0.4 * len(exchanged)
    assert Coordinates(33.64, -84.42) in found  # Atlanta
    assert perhaps_swapped([]) == []
