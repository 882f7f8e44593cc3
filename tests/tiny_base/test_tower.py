"""The tower's tiles: the same ground in other looks, and the same look again for the same seed."""

import numpy as np
import torch

from orion_triage.dataset.sources.synthetic.draw import draw_tile
from orion_triage.imagery.frames import shrink
from tools.tiny_base.tower import augment


def test_a_tile_is_shown_in_other_looks_and_a_seed_repeats_them() -> None:
    pixels = np.array(shrink(draw_tile("mega_port", 1).image, 256))

    def looks(seed: int) -> list[np.ndarray]:
        torch.manual_seed(seed)
        return [augment(pixels) for _ in range(24)]

    first = looks(0)
    assert all(look.shape == (256, 256, 3) and look.dtype == np.uint8 for look in first)
    assert all(np.array_equal(one, other) for one, other in zip(first, looks(0), strict=True))
    assert not any(np.array_equal(one, other) for one, other in zip(first, looks(1), strict=True))
    grey = np.stack([look.mean(axis=2) for look in first])
    brightness, contrast = grey.mean(axis=(1, 2)), grey.std(axis=(1, 2))
    own = pixels.mean(axis=2)
    assert brightness.min() < 0.85 * own.mean() < 1.15 * own.mean() < brightness.max()
    assert contrast.min() < 0.8 * own.std() < 1.2 * own.std() < contrast.max()
    sharpness = np.abs(np.diff(grey, axis=2)).mean(axis=(1, 2)) / contrast
    assert sharpness.min() < 0.6 * sharpness.max()  # some are blurred
