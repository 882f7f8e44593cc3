"""Find pictures, pixels and ground that two splits share. Pure functions: facts of a dataset -> findings.

A finding is at the line of the later split (train, val, test), because that is the one to remove.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from orion_triage.dataset.check.facts import Entry, Finding, Picture
from orion_triage.dataset.split import EARTH_RADIUS_KM, unit_vectors
from orion_triage.imagery.frames import CAMERA_SIZE
from orion_triage.settings import SPLITS, Split

# Both positions are rounded to 0.01 degrees (at most 0.79 km each), so a distance can appear this much too small.
_ROUNDING_KM = 1.6
# Of the 64,620 pairs of the shipped catalogue's tiles, the pair with the fewest different bits has 8 bits and a
# correlation of 0.77; the pair with the highest correlation has 26 bits and 0.89. JPEG at quality 30, noise, blur, half
# as many pixels or a shift by two pixels stay within 6 bits and 0.99. Both limits must hold: flat frames under the same
# haze correlate, and the bits can agree by chance.
_MOST_BITS = 12
_LEAST_CORRELATION = 0.93
_BLOCK = 128  # pictures compared at once with all of another split: 30 MB for 20,000


def leaks(
    entries: Sequence[Entry], pictures: Mapping[str, Picture], *, metres_per_pixel: float, split_distance_km: float
) -> Iterator[Finding]:
    """Every leak between the splits; a pair of pictures is reported once, with its most specific fault."""
    firsts: dict[tuple[Split, str], Entry] = {}
    for entry in entries:
        firsts.setdefault((entry.split, entry.image), entry)
    by_image: dict[str, list[Entry]] = defaultdict(list)
    for entry in firsts.values():
        by_image[entry.image].append(entry)
    for image, (first, *others) in by_image.items():
        for entry in others:
            message = f"{image} is also in the {first.split} split ({first.place})."
            yield entry.finding("error", "image-in-two-splits", message, "Keep it in one split.")
    shown = [first for first, *_ in by_image.values()]
    yield from _same_pixels(shown, pictures)
    yield from _similar_pixels(shown, pictures)
    # The line with the coordinates is not always a picture's first line.
    located = [e for e in entries if e.record.coordinates and e.split == by_image[e.image][0].split]
    yield from _same_ground(located, CAMERA_SIZE * metres_per_pixel / 1000, split_distance_km)


def _same_pixels(shown: Sequence[Entry], pictures: Mapping[str, Picture]) -> Iterator[Finding]:
    """Pictures with different names and the same pixels; one finding per group."""
    groups: dict[bytes, list[Entry]] = defaultdict(list)
    for entry in shown:
        if entry.image in pictures:
            groups[pictures[entry.image].pixels].append(entry)
    for first, *others in groups.values():
        if not others:
            continue
        last = others[-1]
        message = f"{last.image} has the same pixels as {first.image} ({first.place})"
        message += f" and {len(others) - 1} more" if len(others) > 1 else ""
        if last.split != first.split:
            message += f": the {last.split} split contains a picture of the {first.split} split."
            yield last.finding("error", "identical-pixels", message, "Keep one of them.")
        elif len({entry.record.verdict.category for entry in (first, *others)}) > 1:
            fix = "Keep the one with the right category."
            yield last.finding("error", "identical-pixels", f"{message}, but another category.", fix)
        else:
            yield last.finding("warning", "identical-pixels", f"{message}.", "Keep one: copies add no information.")


def _similar_pixels(shown: Sequence[Entry], pictures: Mapping[str, Picture]) -> Iterator[Finding]:
    """Pictures of two splits that differ only by re-encoding, brightness or a shift by a few pixels."""
    numbers: dict[bytes, int] = {}
    members: dict[Split, list[Entry]] = {split: [] for split in SPLITS}
    for entry in shown:
        if entry.image in pictures:
            numbers.setdefault(pictures[entry.image].pixels, len(numbers))
            members[entry.split].append(entry)

    facts = {
        split: _stacked([pictures[entry.image] for entry in found], numbers)
        for split, found in members.items()
        if found
    }
    for earlier, later in combinations(facts, 2):
        known, asked = facts[earlier], facts[later]
        for start in range(0, len(members[later]), _BLOCK):
            block = slice(start, start + _BLOCK)
            bits = np.bitwise_count(asked.hashes[block, None] ^ known.hashes)
            correlation = asked.thumbnails[block] @ known.thumbnails.T
            correlation[(bits > _MOST_BITS) | (asked.pixels[block, None] == known.pixels)] = -1
            best = correlation.argmax(axis=1)
            for row in np.flatnonzero(correlation.max(axis=1) >= _LEAST_CORRELATION):
                entry, twin = members[later][start + row], members[earlier][best[row]]
                message = (
                    f"{entry.image} looks like {twin.image} ({twin.place}): {bits[row, best[row]]} of 64 bits of their "
                    f"perceptual hashes differ, and their thumbnails have a correlation of "
                    f"{correlation[row, best[row]]:.2f}."
                )
                fix = "Compare both pictures. If they show the same ground, keep them in one split."
                yield entry.finding("warning", "near-identical", message, fix)


class _Stacked(NamedTuple):
    """The pictures of a split: ids of their pixels [n] (equal ids: equal pixels), hashes [n], thumbnails [n, 256]."""

    pixels: NDArray[np.int64]
    hashes: NDArray[np.uint64]
    thumbnails: NDArray[np.float32]


def _stacked(pictures: Sequence[Picture], numbers: Mapping[bytes, int]) -> _Stacked:
    thumbnails = np.frombuffer(b"".join(picture.thumbnail for picture in pictures), dtype=np.float16)
    return _Stacked(
        np.array([numbers[picture.pixels] for picture in pictures], dtype=np.int64),
        np.array([picture.perceptual_hash for picture in pictures], dtype=np.uint64),
        thumbnails.astype(np.float32).reshape(len(pictures), -1),
    )


def _same_ground(located: Sequence[Entry], footprint_km: float, split_distance_km: float) -> Iterator[Finding]:
    """Places of two splits that are closer than the width of a frame, or than the split distance."""
    from scipy.spatial import cKDTree

    members: dict[Split, dict[str, Entry]] = {split: {} for split in SPLITS}
    for entry in located:
        members[entry.split].setdefault(entry.image, entry)
    entries = {split: list(found.values()) for split, found in members.items() if found}
    # Straight lines through the globe: poles and antimeridian need no special case.
    points = {
        split: unit_vectors([entry.record.coordinates for entry in found if entry.record.coordinates])
        for split, found in entries.items()
    }
    for earlier, later in combinations(entries, 2):
        chords, nearest = cKDTree(points[earlier]).query(points[later])
        distances = 2 * EARTH_RADIUS_KM * np.arcsin(np.minimum(chords / 2, 1))
        for index in np.flatnonzero(distances < footprint_km):
            entry, twin = entries[later][index], entries[earlier][nearest[index]]
            message = (
                f"{entry.image} is {distances[index]:.1f} km from {twin.image} of the {earlier} split ({twin.place}), "
                f"less than the width of a frame ({footprint_km:.1f} km)."
            )
            yield entry.finding("error", "same-place", message, "Move both into one split.")
        close = np.flatnonzero((distances >= footprint_km) & (distances < split_distance_km - _ROUNDING_KM))
        if len(close):
            index = close[distances[close].argmin()]
            entry, twin = entries[later][index], entries[earlier][nearest[index]]
            message = (
                f"{len(close)} of {len(distances)} places of the {later} split are within {split_distance_km:g} km of "
                f"the {earlier} split; nearest: {entry.image}, {distances[index]:.1f} km from {twin.image} "
                f"({twin.place})."
            )
            yield entry.finding("warning", "close-places", message, "Split by region: neighbouring places look alike.")
