"""Training frames under the stresses of imagery/stress.py, another choice in each epoch."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from orion_triage.imagery.frames import shrink
from orion_triage.imagery.stress import STRENGTHS, Stress, seed_of, stressed

if TYPE_CHECKING:
    from PIL import Image

# Of a frame's epochs, those in which it is changed; in the others the model sees it as it is, which is most of flight.
SHARE = 0.5


class Augmentation:
    """Changes training frames; the same frame in the same epoch always gets the same pixels.

    So neither the order, the twins of a frame, the number of processes nor a resumed training change what is seen.
    """

    def __init__(
        self, camera_frames: "Mapping[str, Image.Image]", stresses: Sequence[Stress], frame_size: int, seed: int
    ) -> None:
        """`camera_frames`: image name -> frame at the camera's size; only these are changed."""
        self._frames, self._stresses, self._size, self._seed = camera_frames, stresses, frame_size, seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def frame(self, name: str) -> "Image.Image | None":
        """The changed frame at the model's size; None if this frame is seen as it is in this epoch."""
        told = f"{name}/{self._seed}/{self._epoch}"
        random = np.random.default_rng(seed_of(told))
        if name not in self._frames or random.random() >= SHARE:
            return None
        stress = self._stresses[int(random.integers(len(self._stresses)))]
        strength = STRENGTHS[int(random.integers(len(STRENGTHS)))]
        return shrink(stressed(self._frames[name], stress, strength, told), self._size)
