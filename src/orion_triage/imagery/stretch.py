"""The stretch of pictures with more than 8 bits: fixed limits for every frame, on the ground and in flight."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orion_triage.settings import STRETCHED_SAMPLES, DatasetSettings

DEFAULT_SAMPLES = "uint16"  # 12-bit pictures are stored in it, too
SETTINGS = "dataset.stretch_low and dataset.stretch_high"
_SAMPLES_AT_ONCE = 1 << 20  # as float64: 8 MB


@dataclass(frozen=True)
class Stretch:
    """`low` becomes 0 (black) and `high` 255, in the units of the stored values; between them it is linear.

    `samples` is the one sample type that the limits are for, as NumPy calls it.
    """

    low: float
    high: float
    samples: str = DEFAULT_SAMPLES

    def __str__(self) -> str:
        return f"{self.samples} from {self.low:g} to {self.high:g}"

    def apply(self, values: NDArray[Any]) -> NDArray[np.uint8]:
        """8-bit values of the same shape, rounded to the nearest; computed in float64, the same on every machine."""
        flat = values.reshape(-1)
        out = np.empty(flat.shape, dtype=np.uint8)
        for start in range(0, flat.size, _SAMPLES_AT_ONCE):
            part = slice(start, start + _SAMPLES_AT_ONCE)
            scaled = (flat[part].astype(np.float64) - self.low) / (self.high - self.low)
            out[part] = np.floor(np.clip(scaled, 0, 1) * 255 + 0.5)
        return out.reshape(values.shape)


def stretch_of(settings: DatasetSettings) -> Stretch | None:
    """The stretch that the settings of a run name, or None."""
    if settings.stretch_low is None or settings.stretch_high is None:
        return None
    return Stretch(settings.stretch_low, settings.stretch_high, settings.stretch_samples or DEFAULT_SAMPLES)


def fix_without_stretch(samples: str) -> str:
    """What a user does about a picture with more than 8 bits, when no stretch is set."""
    if samples not in STRETCHED_SAMPLES:
        return f"Convert it to one of {', '.join(STRETCHED_SAMPLES)}, or to 8-bit RGB."
    more = "" if samples == DEFAULT_SAMPLES else f" and dataset.stretch_samples={samples}"
    return (
        f"Build the dataset with --set dataset.stretch_low=BLACK --set dataset.stretch_high=WHITE{more}: the values "
        "that become black and white in all frames. Or save it as 8-bit RGB."
    )
