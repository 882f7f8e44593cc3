"""What a folder of unlabelled frames says of their camera, beside pictures of the same kinds of scenes.

The pictures are those that a model is trained on. What is found is the camera through which they would look like the
frames: light, colour, haze, blur and noise. It is assumed that both folders show about the same mix of scenes, and that
what differs is the camera and the air. Pure functions of arrays.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from orion_triage.errors import OrionError
from orion_triage.imagery.camera import BANDS, Camera
from orion_triage.imagery.frames import CAMERA_SIZE, is_blank
from orion_triage.imagery.stress import AIRLIGHT, MID_GREY, READ_NOISE, electrons_at_mid_grey, to_linear

Floats = NDArray[np.float64]
FEWEST = 8  # frames on either side: with fewer, the scenes decide what is found
_RINGS = 64  # of the radial spectrum, from 0 to half a cycle a pixel
_LOWEST, _HIGHEST = 0.05, 0.48  # cycles a pixel that are compared: below, scenes differ; above, the rings are cut
_WEIGHTS = np.array([0.2126, 0.7152, 0.0722])  # luminance of linear red, green and blue (IEC 61966-2-1)


@dataclass(frozen=True)
class Measured:
    """The statistics of a folder of frames: of each frame, and the mean spectrum.

    `means` and `spreads` [frames, 3]: mean and standard deviation of linear red, green and blue; `spectra` [frames,
    rings]: the power of linear luminance by radial frequency, per pixel; `smoothest` [frames]: the variance of fine
    detail in the smoothest blocks; `clipped` [frames]: share of samples at 0 or 255.
    """

    means: Floats
    spreads: Floats
    spectra: Floats
    smoothest: Floats
    clipped: Floats

    def of(self, rows: NDArray[np.int64]) -> "Measured":
        """Those of these frames, which can occur several times."""
        return Measured(
            self.means[rows], self.spreads[rows], self.spectra[rows], self.smoothest[rows], self.clipped[rows]
        )

    @property
    def spectrum(self) -> Floats:
        """The median power of each ring."""
        return np.asarray(np.median(self.spectra, axis=0))

    @property
    def slope(self) -> float:
        """Of the spectrum's logarithm against that of the frequency, from 0.02 to 0.2 cycles a pixel."""
        used = (frequencies() > 0.02) & (frequencies() < 0.2)
        return float(np.polyfit(np.log(frequencies()[used]), np.log(self.spectrum[used]), 1)[0])


def frequencies() -> Floats:
    """The centres of the rings, in cycles a pixel."""
    return (np.arange(_RINGS) + 0.5) / (2 * _RINGS)


def measure(frames: Sequence[Image.Image]) -> Measured:
    """The statistics of frames of 512x512; blank ones are left out. Raises OrionError for too few."""
    used = [np.asarray(frame) for frame in frames if not is_blank(frame)]
    if len(used) < FEWEST:
        raise OrionError(
            f"{len(used)} frames are not blank; at least {FEWEST} are needed.", "Pass a folder with more frames."
        )
    rows = []
    for pixels in used:
        light = to_linear(pixels)
        clipped = float(np.mean((pixels == 0) | (pixels == 255)))
        grey = light @ _WEIGHTS
        rows.append((light.mean(axis=(0, 1)), light.std(axis=(0, 1)), _radial(grey), _smoothest(grey), clipped))
    return Measured(*(np.array(column) for column in zip(*rows, strict=True)))


def _radial(luminance: Floats) -> Floats:
    """The power per pixel in rings of equal width [rings], of a picture without its mean, under a Hann window."""
    window = np.hanning(CAMERA_SIZE)[:, None] * np.hanning(CAMERA_SIZE)[None, :]
    power = np.abs(np.fft.fft2((luminance - luminance.mean()) * window)) ** 2 / np.sum(window**2)
    cycles = np.fft.fftfreq(CAMERA_SIZE)
    ring = (np.hypot(cycles[:, None], cycles[None, :]) * 2 * _RINGS).astype(int)
    inside = ring < _RINGS
    return np.asarray(
        np.bincount(ring[inside], weights=power[inside], minlength=_RINGS) / np.bincount(ring[inside], minlength=_RINGS)
    )


def _smoothest(luminance: Floats) -> float:
    """The variance of white noise that would leave as much detail as the smoothest 2 % of all blocks have.

    By a mask that removes linear structure (Immerkaer 1996); the smallest of many estimates is too small, by a sixth
    with blocks of 16x16.
    """
    # The mask is 1, -2, 1 along the rows and along the columns; its squares add up to 36.
    detail = np.diff(np.diff(luminance, n=2, axis=0), n=2, axis=1) ** 2 / 36
    size = len(detail) // _BLOCK * _BLOCK
    blocks = detail[:size, :size].reshape(size // _BLOCK, _BLOCK, size // _BLOCK, _BLOCK).mean(axis=(1, 3))
    return float(np.quantile(blocks, 0.02)) / _TOO_SMALL


_BLOCK, _TOO_SMALL = 16, 0.83


@dataclass(frozen=True)
class Fitted:
    """A camera whose ranges are the 90 % intervals of the `estimates`, by a bootstrap over the frames of both folders.

    `residual` is how badly blur and noise explain the spectra: the mean difference of the logarithms.
    """

    camera: Camera
    estimates: dict[str, float]
    residual: float
    notes: tuple[str, ...]


def fit(frames: Measured, pictures: Measured, name: str, *, seed: int = 42, resamples: int = 200) -> Fitted:
    """The camera through which the pictures would look like the frames, with what is not known of it as ranges.

    Light and haze come from the medians of mean and spread over the frames: haze adds light and takes contrast. Blur
    and noise come from the ratio of the two spectra: blur takes high frequencies, noise adds the same power everywhere.
    So does fine texture, but not where a frame is smoothest: what is there is the most that counts as noise.
    """
    estimates, residual, found = _estimates(frames, pictures)
    random = np.random.default_rng(seed)
    drawn = [
        _estimates(
            frames.of(random.integers(len(frames.means), size=len(frames.means))),
            pictures.of(random.integers(len(pictures.means), size=len(pictures.means))),
            (found,),  # a drawn set's is near
        )[0]
        for _ in range(resamples)
    ]
    ranges = {
        key: tuple(float(x) for x in np.quantile([value, *(one[key] for one in drawn)], [0.05, 0.95]))
        for key, value in estimates.items()
    }
    notes = [
        "assumed: both folders show about the same mix of scenes, encoded as sRGB; values are on top of the pictures'"
    ]
    if ranges["mtf_at_nyquist"][1] > _SHARP:
        notes.append("it is not certain that there is any blur beyond that of the pictures")
    if ranges["snr"][1] >= _CLEAN:
        notes.append("it is not certain that there is any noise beyond that of the pictures")
    if (clipped := float(frames.clipped.mean())) > 0.01:
        notes.append(f"{clipped:.1%} of the samples are black or saturated, which says little about exposure")
    if residual > _BAD:
        notes.append(f"blur and noise explain the spectra badly (residual {residual:.2f}): the scenes differ")
    spans: dict[str, Any] = {key: _within(ranges[key], key) for key in _LIMITS}
    spans["gains"] = tuple(_within(ranges[f"gains {band + 1}"], "gains") for band in range(BANDS))
    return Fitted(Camera(name=name, **spans), estimates, residual, tuple(notes))


_SHARP, _CLEAN, _BAD = 0.95, 1e5, 0.5
_LIMITS = {"mtf_at_nyquist": (0.001, 1), "snr": (1, _CLEAN), "exposure": (0.01, 100), "haze_transmission": (0.05, 1)}


def _within(span: tuple[float, ...], key: str) -> tuple[float, float]:
    """A range within the limits of its key, rounded to four digits."""
    low, high = _LIMITS.get(key, (0.05, 20))
    return float(f"{min(high, max(low, span[0])):.4g}"), float(f"{min(high, max(low, span[1])):.4g}")


# Where the least squares begin: sigma of the blur, and the logarithms of the noise's share and of the level.
_STARTS = ((0.1, math.log(0.01), 0.0), (0.1, math.log(0.9), 0.0), (0.7, math.log(0.5), 0.0))


def _estimates(
    frames: Measured, pictures: Measured, starts: Sequence[tuple[float, float, float]] = _STARTS
) -> tuple[dict[str, float], float, tuple[float, float, float]]:
    """(The camera's values, the residual of the spectra, where the least squares ended.)"""
    exposure, haze = _light_and_haze(frames, pictures)
    scale = exposure * haze
    # What a band differs by beyond exposure and haze: white balance.
    seen = np.median(pictures.means, axis=0) * scale + exposure * (1 - haze) * AIRLIGHT
    gains = np.median(frames.means, axis=0) / seen
    gains /= float(gains @ _WEIGHTS)
    mtf, noise, residual, ended = _blur_and_noise(frames.spectrum, pictures.spectrum * scale**2, starts)
    noise = min(noise, float(np.median(frames.smoothest)))
    snr = _snr(noise, float(np.median(frames.means @ _WEIGHTS)), gains)
    values = {"mtf_at_nyquist": mtf, "snr": snr, "exposure": exposure, "haze_transmission": haze}
    return values | {f"gains {band + 1}": float(gains[band]) for band in range(BANDS)}, residual, ended


def _light_and_haze(frames: Measured, pictures: Measured) -> tuple[float, float]:
    """(Exposure, transmission) by which the median mean and spread of the pictures become those of the frames.

    A frame is exposure * (transmission * scene + (1 - transmission) * airlight). A spread that is larger than exposure
    alone explains needs no haze: transmission 1.
    """
    mean, spread = (float(np.median(values @ _WEIGHTS)) for values in (pictures.means, pictures.spreads))
    seen_mean, seen_spread = (float(np.median(values @ _WEIGHTS)) for values in (frames.means, frames.spreads))
    scale = seen_spread / spread  # exposure * transmission
    exposure = scale + (seen_mean - scale * mean) / AIRLIGHT
    if exposure <= scale or scale <= 0:
        return seen_mean / mean, 1.0
    return exposure, max(0.05, scale / exposure)


def _blur_and_noise(
    seen: Floats, expected: Floats, starts: Sequence[tuple[float, float, float]]
) -> tuple[float, float, float, tuple[float, float, float]]:
    """(MTF at Nyquist, noise power per pixel, residual, end): `seen` = `expected` * MTF(f)^2 + noise, least squares."""
    from scipy.optimize import least_squares

    cycles = frequencies()
    used = (cycles >= _LOWEST) & (cycles <= _HIGHEST)
    f, seen, expected = cycles[used], seen[used], expected[used]

    def difference(parameters: Floats) -> Floats:
        sigma, noise, level = parameters
        model = np.exp(level) * expected * np.exp(-4 * (np.pi * sigma * f) ** 2) + np.exp(noise)
        return np.asarray(np.log(model) - np.log(seen))

    found = min(
        (
            least_squares(
                difference,
                [sigma, min(0.0, max(-60.0, float(np.log(seen.min())) + share)), level],
                bounds=([0, -60, -2], [2.0, 0, 2]),
                loss="soft_l1",
                f_scale=0.1,
            )
            for sigma, share, level in starts
        ),
        key=lambda result: float(result.cost),
    )
    sigma, noise = float(found.x[0]), float(np.exp(found.x[1]))
    residual = float(np.mean(np.abs(difference(found.x))))
    # Noise that is less than a fiftieth of the weakest ring is not seen.
    visible = noise if noise > seen.min() / 50 else 0.0
    ended = sigma, float(found.x[1] - np.log(seen.min())), float(found.x[2])
    return float(np.exp(-((np.pi * sigma) ** 2) / 2)), visible, residual, ended


def _snr(noise: float, level: float, gains: Floats) -> float:
    """The signal-to-noise ratio at mid grey whose luminance noise at this level has this power; _CLEAN without noise.

    Bands have independent noise: that of luminance is the sum of the weights' squares times it.
    """
    from scipy.optimize import brentq

    of_band = noise / float(np.sum((_WEIGHTS * gains) ** 2))

    def power(snr: float) -> float:
        gain = MID_GREY / electrons_at_mid_grey(snr)
        return gain * level + (gain * READ_NOISE) ** 2

    if power(_CLEAN) >= of_band:
        return _CLEAN
    return 1.0 if power(1.0) <= of_band else float(brentq(lambda snr: power(snr) - of_band, 1.0, _CLEAN))


def to_toml(fitted: Fitted) -> str:
    """The camera as a file, with the notes as comments."""
    camera = fitted.camera
    lines = [f"# {note}" for note in fitted.notes]
    lines.append(f'name = "{camera.name}"')
    for key in ("mtf_at_nyquist", "snr", "exposure", "haze_transmission"):
        lines.append(f"{key} = {_shown(getattr(camera, key))}")
    lines.append(f"gains = [{', '.join(_shown(camera.gains[band]) for band in range(BANDS))}]")
    return "\n".join(lines) + "\n"


def _shown(span: tuple[float, float]) -> str:
    return f"{span[0]:g}" if span[0] == span[1] else f"[{span[0]:g}, {span[1]:g}]"


def summary(measured: Measured) -> dict[str, Any]:
    """The statistics in short: medians over frames, on linear values but for the grey levels."""
    medians = np.median(measured.means, axis=0)
    spreads = np.median(measured.spreads, axis=0)
    return {
        "frames": len(measured.means),
        "mean": [round(float(x), 4) for x in medians],
        "spread": [round(float(x), 4) for x in spreads],
        "spectrum_slope": round(measured.slope, 2),
        "clipped_share": round(float(measured.clipped.mean()), 4),
    }
