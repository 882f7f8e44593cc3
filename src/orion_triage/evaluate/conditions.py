"""The four conditions of the protocol, as questions; pure, and independent of who answers.

A full: image and coordinates. B vision only: the image. C blind: noise and coordinates. D conflict: the image
and the coordinates of a place of the opposite category.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from orion_triage.errors import OrionError
from orion_triage.records import Record
from orion_triage.triage import Category, Coordinates, render_prompt

Condition = Literal["A", "B", "C", "D"]
CONDITIONS: dict[Condition, str] = {
    "A": "full system",
    "B": "vision only",
    "C": "blind on noise",
    "D": "sensor conflict",
}
# Whose coordinates a frame gets under D.
OPPOSITE = {Category.HIGH: Category.LOW, Category.LOW: Category.HIGH, Category.MEDIUM: Category.HIGH}
NOISE = "noise"  # the image key of condition C


@dataclass(frozen=True)
class Donor:
    """The place whose coordinates a record gets under D."""

    name: str
    category: Category
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
        return render_prompt(self.coordinates)


def conflict_pairs(records: Sequence[Record], seed: int = 42) -> dict[str, Donor]:
    """Record name -> donor, every donor used about equally often; independent of the order of `records`."""
    ordered = sorted(records, key=lambda record: record.name)
    pairs = {}
    for category, opposite in OPPOSITE.items():
        takers = [record for record in ordered if record.verdict.category == category]
        donors = [r for r in ordered if r.verdict.category == opposite and r.coordinates is not None]
        if takers and not donors:
            raise OrionError(
                f"condition D needs {opposite} records for the {category} ones, and the split has none.",
                "Evaluate a split with all three categories.",
            )
        random.Random(f"{seed}/{category}").shuffle(donors)
        for index, taker in enumerate(takers):
            donor = donors[index % len(donors)]
            assert donor.coordinates is not None
            pairs[taker.name] = Donor(donor.name, donor.verdict.category, donor.coordinates)
    return pairs


def questions(records: Sequence[Record], pairs: dict[str, Donor]) -> list[Question]:
    """All questions, image by image (A, B, D), and condition C last: its one image is encoded once."""
    ordered = sorted(records, key=lambda record: record.name)
    missing = [record.name for record in ordered if record.coordinates is None]
    if missing:
        raise OrionError(
            f"record {missing[0]} has no coordinates.", "Evaluate val or test: training records drop them."
        )
    asked = []
    for record in ordered:
        donor = pairs[record.name]
        asked += [
            Question("A", record, record.image, record.coordinates),
            Question("B", record, record.image, None),
            Question("D", record, record.image, donor.coordinates, donor),
        ]
    return asked + [Question("C", record, NOISE, record.coordinates) for record in ordered]
