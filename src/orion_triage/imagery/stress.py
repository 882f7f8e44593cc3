"""What goes wrong in flight, done to a frame: haze, noise, blur, defects and others, each at three strengths.

Pure functions of a camera frame (512x512 RGB) to another of the same size. Light adds up on linear values, so optics
and sensor work on these: decode, change, then clip, encode and round once. Frames count as encoded by the sRGB curve.
Each stress is applied alone, to a picture that already has the blur and noise of its own camera.
"""

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from orion_triage.errors import OrionError

Pixels = NDArray[np.uint8]  # [rows, columns, 3]
Light = NDArray[np.float64]  # the same as linear values: 0 is black, 1 is where the sensor saturates
Apply = Callable[[Pixels, float, np.random.Generator], Pixels]
Strength = Literal["mild", "medium", "strong"]
STRENGTHS: tuple[Strength, ...] = get_args(Strength)

# Version of what the stresses do and of what is stored of a frame. Increase it if a change can give a frame other
# pixels or measures: finished answers are outdated.
VERSION = 2
AIRLIGHT = 0.8  # linear; of thick haze and of cloud, as bright as sunlit cloud beside a saturation of 1
CLOUD_SCALE = 40.0  # pixels, sigma of the field's smoothing: patches of a quarter of the frame
_NO_SHOT_NOISE = 1e12  # electrons, of which shot noise is a millionth
READ_NOISE = 10.0  # electrons; of an industrial CMOS sensor at high gain it is 2 to 10
_STEP = np.arange(256) / 255
_LINEAR = np.where(_STEP <= 0.04045, _STEP / 12.92, ((_STEP + 0.055) / 1.055) ** 2.4)  # IEC 61966-2-1
MID_GREY = float(_LINEAR[128])  # 0.22


@dataclass(frozen=True)
class Stress:
    """One row of the table. `values` are the parameter's at the STRENGTHS; where they are kinds, `words` name them."""

    name: str
    parameter: str
    unit: str
    values: tuple[float, float, float]
    meaning: str
    source: str
    apply: Apply
    words: tuple[str, ...] = ()

    def value(self, strength: Strength) -> float:
        return self.values[STRENGTHS.index(strength)]

    def shown(self, strength: Strength) -> str:
        """The parameter's value in words, with its unit."""
        if self.words:
            return self.words[STRENGTHS.index(strength)]
        return f"{self.value(strength):g} {self.unit}".strip()

    def to_json(self) -> dict[str, Any]:
        """What decides the pixels, for a manifest."""
        return {"version": VERSION, "name": self.name, "parameter": self.parameter, "values": list(self.values)}


def stressed(frame: Image.Image, stress: Stress, strength: Strength, name: str) -> Image.Image:
    """The camera frame under a stress: the same bytes in every process for the same frame `name`."""
    random = np.random.default_rng(seed_of(name, stress.name, strength))
    return Image.fromarray(stress.apply(np.asarray(frame), stress.value(strength), random), "RGB")


def seed_of(*parts: str) -> int:
    """A seed from names; Python's own hash of a text differs from process to process."""
    return int.from_bytes(hashlib.sha256("/".join(parts).encode()).digest()[:8], "big")


def chosen(names: Sequence[str]) -> list[Stress]:
    """The stresses with these names, in the table's order; all without a name. Raises OrionError for another name."""
    known = [stress.name for stress in STRESSES]
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, 1, cutoff=0)[0]
            raise OrionError(
                f"there is no stress {name!r}; the nearest name is {near}.", f"Use one or more of {', '.join(known)}."
            )
    return [stress for stress in STRESSES if not names or stress.name in names]


def to_linear(pixels: Pixels) -> Light:
    """The linear values of a frame, 0 to 1."""
    return _LINEAR[pixels]


def to_pixels(light: Light) -> Pixels:
    """Linear values of any size, clipped to 0..1, encoded and rounded: the last step of every stress of light."""
    clipped = np.clip(light, 0, 1)
    encoded = np.where(clipped <= 0.0031308, 12.92 * clipped, 1.055 * clipped ** (1 / 2.4) - 0.055)
    return np.rint(255 * encoded).astype(np.uint8)


def haze(pixels: Pixels, transmission: float, random: np.random.Generator) -> Pixels:
    return to_pixels(behind(to_linear(pixels), transmission))


def cloud(pixels: Pixels, optical_depth: float, random: np.random.Generator) -> Pixels:
    depth = optical_depth * cloud_field(pixels.shape[0], pixels.shape[1], random)
    return to_pixels(behind(to_linear(pixels), np.exp(-depth)[..., None]))


def cloud_field(rows: int, columns: int, random: np.random.Generator) -> Light:
    """A smooth field [rows, columns] from 0 to 2 with a mean of about 1, each value as frequent as any other."""
    from scipy.special import ndtr

    smooth = _filtered(random.standard_normal((rows, columns)), _gaussian(CLOUD_SCALE), (0, 1))
    return np.asarray(2 * ndtr((smooth - smooth.mean()) / smooth.std()))


def behind(light: Light, transmission: float | Light) -> Light:
    """Light seen through a veil: what it lets through, and what it scatters instead."""
    return np.asarray(light * transmission + AIRLIGHT * (1 - transmission))


def exposure(pixels: Pixels, factor: float, random: np.random.Generator) -> Pixels:
    return to_pixels(factor * to_linear(pixels))


def noise(pixels: Pixels, snr: float, random: np.random.Generator) -> Pixels:
    return to_pixels(noisy(to_linear(pixels), snr, random))


def noisy(light: Light, snr: float, random: np.random.Generator, read_noise: float = READ_NOISE) -> Light:
    """Linear values with shot noise (Poisson) and read noise (Gaussian, `read_noise` electrons), neither clipped.

    The sensor collects as many electrons at mid grey, n, as give this signal-to-noise ratio there:
    snr = n / sqrt(n + read_noise^2). The variance is gain * value + (gain * read_noise)^2, with gain = MID_GREY / n.
    """
    many = electrons_at_mid_grey(snr, read_noise)
    gain = MID_GREY / many
    caught = random.poisson(np.maximum(light, 0) / gain) if many < _NO_SHOT_NOISE else light / gain
    return np.asarray(gain * (caught + random.normal(0, read_noise, light.shape)))


def electrons_at_mid_grey(snr: float, read_noise: float = READ_NOISE) -> float:
    """The positive root of n^2 = snr^2 (n + read_noise^2)."""
    return float((snr**2 + np.sqrt(snr**4 + 4 * snr**2 * read_noise**2)) / 2)


def blur(pixels: Pixels, mtf_at_nyquist: float, random: np.random.Generator) -> Pixels:
    return to_pixels(blurred(to_linear(pixels), mtf_at_nyquist))


def blurred(light: Light, mtf_at_nyquist: float, pixel: float = 1.0) -> Light:
    """Linear values under a Gaussian blur with this MTF at Nyquist of pixels of this size; not clipped."""
    return _filtered(light, _gaussian(pixel * sigma_of(mtf_at_nyquist)), (0, 1))


def sigma_of(mtf_at_nyquist: float) -> float:
    """The sigma in pixels of the Gaussian whose MTF at Nyquist, half a cycle a pixel, is this.

    The MTF is that of the blur alone: the pixel's own sinc (0.64) and the optics are in the picture already.
    """
    return float(np.sqrt(-2 * np.log(mtf_at_nyquist)) / np.pi)


def _gaussian(sigma: float) -> Callable[[Light], Light]:
    return lambda cycles: np.exp(-2 * (np.pi * sigma * cycles) ** 2)


def _filtered(values: Light, transfer: Callable[[Light], Light], axes: tuple[int, ...]) -> Light:
    """`values` with each frequency (cycles a pixel) of these axes multiplied by `transfer`; the edges are mirrored.

    A sampled Gaussian kernel of less than a pixel has another MTF than its sigma says: twice as much at Nyquist, where
    two of its copies meet. The cosine transform has no kernel, so the MTF is as stated at every frequency.
    """
    from scipy.fft import dctn, idctn

    spectrum = dctn(values, axes=axes)
    for axis in axes:
        count = values.shape[axis]
        shape = [count if index == axis else 1 for index in range(values.ndim)]
        spectrum *= transfer(np.arange(count) / (2 * count)).reshape(shape)
    return np.asarray(idctn(spectrum, axes=axes))


def motion(pixels: Pixels, length: float, random: np.random.Generator) -> Pixels:
    from scipy.ndimage import uniform_filter1d

    return to_pixels(uniform_filter1d(to_linear(pixels), round(length), axis=0, mode="mirror"))


def misregistration(pixels: Pixels, shift: float, random: np.random.Generator) -> Pixels:
    return misregistered(pixels, shift)


def misregistered(values: Any, shift: float) -> Any:
    """Red moved down and blue up by whole pixels; the edges are repeated."""
    rows, moved = np.arange(len(values)), values.copy()
    for band, offset in ((0, round(shift)), (2, -round(shift))):
        moved[..., band] = values[np.clip(rows - offset, 0, len(rows) - 1), :, band]
    return moved


def jpeg(pixels: Pixels, quality: float, random: np.random.Generator) -> Pixels:
    with Image.open(io.BytesIO(jpeg_bytes(pixels, quality))) as picture:
        return np.array(picture)


def jpeg_bytes(pixels: Pixels, quality: float) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels, "RGB").save(file, "JPEG", quality=round(quality))
    return file.getvalue()


def rotation(pixels: Pixels, degrees: float, random: np.random.Generator) -> Pixels:
    from scipy.ndimage import rotate

    return to_pixels(rotate(to_linear(pixels), degrees, reshape=False, order=1, mode="mirror"))


def flip(pixels: Pixels, kind: float, random: np.random.Generator) -> Pixels:
    columns, rows = (-1 if kind in (1, 3) else 1), (-1 if kind in (2, 3) else 1)
    return np.ascontiguousarray(pixels[::rows, ::columns])


def ground_sample_distance(pixels: Pixels, factor: float, random: np.random.Generator) -> Pixels:
    step = round(factor)
    rows, columns = pixels.shape[0] // step, pixels.shape[1] // step
    areas = to_linear(pixels).reshape(rows, step, columns, step, 3).mean(axis=(1, 3))
    # Repeated, as the decoder enlarges a picture that is smaller than the camera's.
    return to_pixels(areas).repeat(step, axis=0).repeat(step, axis=1)


def defects(pixels: Pixels, per_mille: float, random: np.random.Generator) -> Pixels:
    broken = pixels.copy()
    samples = broken.reshape(-1)
    samples[random.choice(samples.size, round(per_mille * samples.size / 1000), replace=False)] = 255
    columns = pixels.shape[1]
    broken[:, random.choice(columns, max(1, round(per_mille * columns / 1000)), replace=False)] = 0
    return broken


def saturation(pixels: Pixels, share: float, random: np.random.Generator) -> Pixels:
    light = to_linear(pixels)
    brightest = float(np.quantile(light, 1 - share))
    return to_pixels(light / brightest) if brightest > 0 else pixels


def partial(pixels: Pixels, share: float, random: np.random.Generator) -> Pixels:
    cut = pixels.copy()
    cut[len(cut) - round(share * len(cut)) :] = 0
    return cut


# The whole table. One row: name, parameter, unit, mild / medium / strong, what it does, where it comes from.
STRESSES = (
    Stress(
        "haze", f"transmission (airlight {AIRLIGHT:g})", "", (0.8, 0.6, 0.4),
        "a uniform veil: transmission * scene + (1 - transmission) * airlight",
        "Koschmieder 1924; He, Sun and Tang 2011", haze,
    ),
    Stress(
        "cloud", "mean optical depth", "", (0.1, 0.3, 1),
        "thin cloud: the same veil with a transmission of exp(-optical depth), from 0 to twice the mean over the frame",
        "Beer-Lambert; thin cirrus is below 3.6 (ISCCP: Rossow and Schiffer 1999)", cloud,
    ),
    Stress(
        "exposure", "factor of the light", "", (0.5, 0.25, 0.1),
        "less light, shorter exposure or lower gain, without more noise", "linear sensor of EMVA 1288", exposure,
    ),
    Stress(
        "noise", "SNR at mid grey", "", (50, 20, 10),
        f"shot noise (Poisson) and read noise ({READ_NOISE:g} electrons) of a sensor that collects fewer electrons",
        "EMVA 1288; Janesick 2007", noise,
    ),
    Stress(
        "blur", "MTF at Nyquist of the added blur", "", (0.2, 0.05, 0.001),
        "defocus or other optics: a Gaussian with sigma = sqrt(-2 ln MTF) / pi pixels (0.57, 0.78, 1.18)",
        "Boreman 2001", blur,
    ),
    Stress(
        "motion", "length", "pixels", (3, 6, 12),
        "smear along the track during the exposure: the mean of as many rows", "Boreman 2001", motion,
    ),
    Stress(
        "misregistration", "shift", "pixels", (1, 2, 4),
        "red moves down and blue up by the shift; edges are repeated",
        "bands of a push-broom camera; Sentinel-2 needs 0.3 pixels (Gascon et al. 2017)", misregistration,
    ),
    Stress(
        "jpeg", "quality", "", (50, 20, 8),
        "lossy compression before the model, 4:2:0", "ITU-T T.81; Hendrycks and Dietterich 2019", jpeg,
    ),
    Stress(
        "rotation", "angle", "degrees", (5, 15, 45),
        "another heading of the satellite; the corners are mirrored", "Marcos et al. 2018", rotation,
    ),
    Stress(
        "flip", "axis", "", (1, 2, 3),
        "another order of readout; kinds, not strengths", "Marcos et al. 2018", flip,
        ("left-right", "up-down", "both"),
    ),
    Stress(
        "gsd", "factor of the ground sample distance", "", (2, 4, 8),
        "coarser pixels of the same ground: the mean of areas, repeated to the camera's size",
        "Shermeyer and Van Etten 2019", ground_sample_distance,
    ),
    Stress(
        "defects", "dead columns, and hot samples", "per mille", (2, 10, 50),
        "columns that read 0, and single samples of a band that read full scale", "defect pixels of EMVA 1288", defects,
    ),
    Stress(
        "saturation", "share of saturated samples", "", (0.05, 0.2, 0.5),
        "too much light: a gain that saturates this share of the frame", "saturation capacity of EMVA 1288", saturation,
    ),
    Stress(
        "partial", "share that is black", "", (0.25, 0.5, 0.75),
        "readout or transfer broke off: the lower rows are missing", "lost segments, CCSDS 122.0", partial,
    ),
)  # fmt: skip
