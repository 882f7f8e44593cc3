"""Training frames through another camera or under a stress, and wrong coordinates: another choice in each epoch."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from orion_triage.dataset.records import Record
from orion_triage.imagery import camera as cameras
from orion_triage.imagery.camera import Camera, seen_through
from orion_triage.imagery.frames import shrink
from orion_triage.imagery.stress import STRENGTHS, Stress, seed_of, stressed
from orion_triage.mission.prompt import Coordinates

if TYPE_CHECKING:
    from PIL import Image

# Of a frame's epochs, those in which it is seen through the camera, and those in which it is under a stress. With the
# camera "wide" in all of them, the preset tiny is right on 33 of 60 test frames instead of 57 (docs/log.md).
SHARE = 0.5


class Augmentation:
    """Changes training records; the same frame in the same epoch always gets the same pixels and coordinates.

    So neither the order, the twins of a frame, the number of processes nor a resumed training change what is seen.
    """

    def __init__(
        self,
        camera_frames: "Mapping[str, Image.Image]",
        stresses: Sequence[Stress],
        frame_size: int,
        seed: int,
        camera: Camera | None = None,
        wrong_coordinates: float = 0.0,
        places: "Mapping[str, Coordinates] | None" = None,
    ) -> None:
        """`camera_frames`: image name -> frame at the camera's size; only these are changed.

        In half of its epochs, a frame is seen through the `camera`, and in half under one of the `stresses`. Of the
        prompts about images of `places`, a share `wrong_coordinates` has the coordinates of another of these.
        """
        self._frames, self._stresses, self._size, self._seed = camera_frames, stresses, frame_size, seed
        self._camera, self._epoch = camera, 0
        self._wrong, self._places = wrong_coordinates, dict(places or {})
        self._every = sorted(set(self._places.values()), key=lambda place: (place.lon, place.lat))

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def to_json(self) -> dict[str, Any]:
        """What decides the pixels, beside the seed."""
        camera = self._camera.model_dump(mode="json") | {"version": cameras.VERSION} if self._camera else None
        stresses = [stress.to_json() for stress in self._stresses]
        return {"stresses": stresses, "camera": camera, "share": SHARE, "wrong_coordinates": self._wrong}

    def as_asked(self, record: Record) -> Record:
        """The record as it is asked in this epoch: with the coordinates of another place, or as it is."""
        if not self._wrong or record.coordinates is None or record.image not in self._places:
            return record
        random = np.random.default_rng(seed_of(f"{record.image}/{self._seed}/{self._epoch}/coordinates"))
        others = [place for place in self._every if place != record.coordinates]
        if not others or random.random() >= self._wrong:
            return record
        return replace(record, coordinates=others[int(random.integers(len(others)))])

    def frame(self, name: str) -> "Image.Image | None":
        """The changed frame at the model's size; None if this frame is seen as it is in this epoch."""
        if name not in self._frames:
            return None
        seed = f"{name}/{self._seed}/{self._epoch}"
        random, picture = np.random.default_rng(seed_of(seed)), self._frames[name]
        if self._camera and random.random() < SHARE:
            picture = seen_through(picture, self._camera, seed)
        if self._stresses and random.random() < SHARE:
            stress = self._stresses[int(random.integers(len(self._stresses)))]
            strength = STRENGTHS[int(random.integers(len(STRENGTHS)))]
            picture = stressed(picture, stress, strength, seed)
        return None if picture is self._frames[name] else shrink(picture, self._size)
