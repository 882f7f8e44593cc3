"""The questions of the four conditions of the protocol; pure functions, independent of the backend.

A full: image and coordinates. B vision only: the image. C blind: noise and coordinates. D conflict: the image
and the coordinates of a place of another category.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from orion_triage.dataset.records import Record
from orion_triage.errors import OrionError
from orion_triage.mission.mission import listed
from orion_triage.mission.prompt import Coordinates, render_prompt, user_text

Condition = Literal["A", "B", "C", "D"]
CONDITIONS: dict[Condition, str] = {
    "A": "full system",
    "B": "vision only",
    "C": "blind on noise",
    "D": "sensor conflict",
}
NOISE = "noise"  # the image key of condition C


@dataclass(frozen=True)
class Donor:
    """The place whose coordinates a record gets under D."""

    name: str
    category: str
    coordinates: Coordinates


@dataclass(frozen=True)
class Question:
    """One inference: `image` is the record's image path, or NOISE."""

    condition: Condition
    record: Record
    image: str
    coordinates: Coordinates | None
    donor: Donor | None = None

    @property
    def id(self) -> str:
        return f"{self.condition}/{self.record.name}"

    @property
    def prompt(self) -> str:
        return render_prompt(self.record.mission, self.coordinates)

    @property
    def user_text(self) -> str:
        """The user's whole turn, as the backends get it."""
        return user_text(self.record.mission, self.coordinates)


def conflict_pairs(records: Sequence[Record], seed: int = 42) -> dict[str, Donor]:
    """Record name -> donor; within a category, the numbers of uses of the donors differ by at most one.

    Depends only on the records and the seed, not on the order. Raises OrionError if a category has no donors, if a
    record has no coordinates, or if two records have the same name.
    """
    ordered = usable(records)
    pairs = {}
    mission = ordered[0].mission
    for category in mission.names:
        takers = [record for record in ordered if mission.of(record.verdict.category).conflict == category]
        donors = [
            Donor(record.name, category, record.coordinates)
            for record in ordered
            if record.verdict.category == category and record.coordinates is not None
        ]
        if takers and not donors:
            raise OrionError(
                f"condition D needs coordinates of a {category} record for {takers[0].name}, but the split has no "
                f"{category} record.",
                f"Evaluate a split with the categories {listed(mission.names)}.",
            )
        # A string seed is hashed by its bytes, so the shuffle is the same in every process.
        random.Random(f"{seed}/{category}").shuffle(donors)
        for index, taker in enumerate(takers):
            pairs[taker.name] = donors[index % len(donors)]
    return {record.name: pairs[record.name] for record in ordered}


def questions(records: Sequence[Record], pairs: dict[str, Donor]) -> list[Question]:
    """All questions: image by image (A, B, D), then condition C, whose only image is encoded once."""
    ordered = usable(records)
    asked = []
    for record in ordered:
        donor = pairs[record.name]
        asked += [
            Question("A", record, record.image, record.coordinates),
            Question("B", record, record.image, None),
            Question("D", record, record.image, donor.coordinates, donor),
        ]
    return asked + [Question("C", record, NOISE, record.coordinates) for record in ordered]


def usable(records: Sequence[Record]) -> list[Record]:
    """The records sorted by name; raises OrionError for missing coordinates and repeated names."""
    ordered = sorted(records, key=lambda record: record.name)
    for record in ordered:
        if record.coordinates is None:
            raise OrionError(
                f"record {record.name} has no coordinates.",
                "Evaluate val or test: half of the training records have no coordinates.",
            )
    name, count = Counter(record.name for record in ordered).most_common(1)[0] if ordered else ("", 0)
    if count != 1:
        raise OrionError(
            f"the split has {count} records with the name {name}." if count else "the split has no records.",
            "Write one record per image in the split, with unique image names.",
        )
    return ordered
