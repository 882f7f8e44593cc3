"""The camera that flies: what it does to light on the way to a frame, as a file, and frames seen through it.

Every value may be a range: each frame then has its own, drawn from the frame's name. Wide ranges are the domain
randomisation of a training. Pictures already have the blur and noise of their own camera; this one comes on top.

Order: air, band weights, exposure, blur and smear, sampling, misregistration, photon and read noise, clip, steps of the
sensor, gains, clip, encoding, 8 bits, compression. All but the last three work on linear values.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from PIL import Image
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, ValidationError, model_validator

from orion_triage.errors import OrionError
from orion_triage.imagery.frames import CAMERA_SIZE, Frame
from orion_triage.imagery.stress import (
    Light,
    Pixels,
    behind,
    blurred,
    jpeg,
    misregistered,
    noisy,
    seed_of,
    sigma_of,
    to_linear,
    to_pixels,
)
from orion_triage.mission.load import line_of
from orion_triage.safe.reading import LARGEST_JSON_BYTES, read_text, shown

VERSION = 1  # of what a camera does to pixels; in the manifest of a dataset that was seen through one
SHIPPED = "wide"
BANDS = 3
_LARGEST_BITS, _LARGEST_WEIGHT, _FEWEST_PIXELS = 16, 10, 8

Span = tuple[float, float]


def _checked_range(low: float, high: float) -> Any:
    """A type: a range within these limits, both included."""

    def check(value: Any) -> Any:
        span = (value, value) if _is_number(value) else value  # a number is a range of one value
        if not isinstance(span, list | tuple) or len(span) != 2 or not all(_is_number(end) for end in span):
            raise ValueError("should be a number, or a range [lowest, highest]")
        if not low <= span[0] <= span[1] <= high:
            raise ValueError(f"should lie in {low:g} to {high:g}, the lower end first")
        return tuple(float(end) for end in span)

    return Annotated[Span, BeforeValidator(check)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_Gain = _checked_range(0.05, 20)


class Camera(BaseModel):
    """The keys of a camera file; a value that is a range is drawn anew for each frame."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,31}$")]
    # Metres per pixel, and that of the pictures that it is applied to: a coarser camera averages areas of the same
    # ground. Empty: as fine as the pictures.
    ground_sample_distance_m: _checked_range(0.01, 10_000) | None = None  # type: ignore[valid-type]
    picture_sample_distance_m: Annotated[float, Field(ge=0.01, le=10_000)] = 10.0
    # MTF at Nyquist of optics, detector and attitude together, on top of the picture's own; 1: no blur.
    mtf_at_nyquist: _checked_range(0.001, 1) = (1.0, 1.0)  # type: ignore[valid-type]
    motion_pixels: _checked_range(0, 64) = (0.0, 0.0)  # type: ignore[valid-type]  # smear along the columns
    # Signal-to-noise ratio at mid grey (18 % would be 0.18 linear; 128 of 255 encoded is 0.22) with an exposure of 1.
    snr: _checked_range(1, 1_000_000) = (1_000_000.0, 1_000_000.0)  # type: ignore[valid-type]
    read_noise_electrons: Annotated[float, Field(ge=0, le=10_000)] = 10.0
    bits: Annotated[int, Field(ge=4, le=_LARGEST_BITS)] = 12  # of the sensor's steps, on linear values
    exposure: _checked_range(0.01, 100) = (1.0, 1.0)  # type: ignore[valid-type]  # factor of the light
    # Factors of red, green and blue after the sensor: white balance and its spread.
    gains: tuple[_Gain, _Gain, _Gain] = ((1.0, 1.0), (1.0, 1.0), (1.0, 1.0))  # type: ignore[valid-type]
    # Rows: the camera's red, green, blue; columns: what each takes of the picture's. Spectral response.
    band_weights: tuple[tuple[float, float, float], ...] = ((1, 0, 0), (0, 1, 0), (0, 0, 1))
    misregistration_pixels: _checked_range(0, 32) = (0.0, 0.0)  # type: ignore[valid-type]
    # Transmission of the air between ground and camera: 1 is none of it, lower values are haze.
    haze_transmission: _checked_range(0.05, 1) = (1.0, 1.0)  # type: ignore[valid-type]
    # How 8 bits encode linear values: "sRGB", or the exponent of a power law (1: linear, 2.2: as many displays).
    encoding: Literal["sRGB"] | Annotated[float, Field(ge=1, le=4)] = "sRGB"
    jpeg_quality: _checked_range(1, 100) | None = None  # type: ignore[valid-type]  # empty: no loss
    # Flips and quarter turns at random: a camera without a fixed north.
    turned: StrictBool = False

    @model_validator(mode="after")
    def _three_rows(self) -> Self:
        if len(self.band_weights) != BANDS:
            raise ValueError("band_weights should have three rows: red, green and blue")
        weights = [weight for row in self.band_weights for weight in row]
        if not all(0 <= weight <= _LARGEST_WEIGHT for weight in weights) or any(not sum(r) for r in self.band_weights):
            raise ValueError(f"band_weights should be 0 to {_LARGEST_WEIGHT}, and at least one of each row above 0")
        return self

    @model_validator(mode="after")
    def _not_finer_than_the_picture(self) -> Self:
        spacing = self.ground_sample_distance_m
        if spacing and spacing[0] < self.picture_sample_distance_m:
            raise ValueError(
                f"ground_sample_distance_m {spacing[0]:g} is finer than picture_sample_distance_m "
                f"{self.picture_sample_distance_m:g}: detail that a picture does not have cannot be seen"
            )
        if spacing and CAMERA_SIZE * self.picture_sample_distance_m / spacing[1] < _FEWEST_PIXELS:
            raise ValueError(
                f"ground_sample_distance_m {spacing[1]:g} leaves fewer than {_FEWEST_PIXELS} pixels of a picture"
            )
        return self

    def ranges(self) -> dict[str, Span]:
        """The keys whose value is drawn for each frame, with their ranges; those of a band as `gains 1` and so on."""
        found: dict[str, Span] = {}
        for key in type(self).model_fields:
            value = getattr(self, key)
            if key == "gains":
                found |= {f"gains {band + 1}": span for band, span in enumerate(value)}
            elif isinstance(value, tuple) and key != "band_weights":
                found[key] = value
        return found


def load_camera(name: str) -> Camera:
    """The camera in a TOML file, or the shipped one of this name.

    Raises OrionError that lists all mistakes, each with its line.
    """
    if name == SHIPPED:
        text, where = shipped_text(SHIPPED), SHIPPED
    else:
        where = name
        try:
            text = read_text(Path(name), LARGEST_JSON_BYTES)
        except FileNotFoundError:
            raise _absent(name) from None
    try:
        given = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise OrionError(f"{where} is not TOML: {error}.", "Correct the line: texts need quotes.") from None
    try:
        return Camera.model_validate(given)
    except ValidationError as error:
        by_key: dict[str, Any] = {}  # one mistake a key: a value that may be of two kinds has two errors
        for problem in error.errors():
            by_key.setdefault(str(problem["loc"][:1]), problem)
        lines = [f"{where}:{line_of(text, _key_of(problem))}: {_sentence(problem)}." for problem in by_key.values()]
        count = f"{len(lines)} mistakes" if len(lines) > 1 else "a mistake"
        raise OrionError(
            "\n".join([f"{where} has {count}:", *lines]), "Correct the file, then check it again."
        ) from None


def camera_file(name: str) -> Path:
    """The file of a camera, for the inputs of a stage: the shipped one of this name, or the file."""
    path = (
        Path(str(resources.files("orion_triage.imagery") / "cameras" / f"{name}.toml"))
        if name == SHIPPED
        else Path(name)
    )
    if not path.is_file():
        raise _absent(name)
    return path


def _absent(name: str) -> OrionError:
    return OrionError(
        f"{name} does not exist.", f"Write one with 'orion camera new FILE', or use the shipped {SHIPPED!r}."
    )


def shipped_text(name: str) -> str:
    """The text of a shipped camera file: "wide", or the commented "example"."""
    return (resources.files("orion_triage.imagery") / "cameras" / f"{name}.toml").read_text(encoding="utf-8")


def _key_of(problem: Any) -> tuple[str]:
    """The key that a problem is about; a sentence about several keys begins with it."""
    return (str(problem["loc"][0]) if problem["loc"] else str(problem["ctx"]["error"]).partition(" ")[0],)


def _sentence(problem: Any) -> str:
    key = str(problem["loc"][0]) if problem["loc"] else ""
    if problem["type"] == "extra_forbidden":
        from difflib import get_close_matches

        near = get_close_matches(key, Camera.model_fields, 1, cutoff=0.6)
        return f"there is no key {key}" + (f"; the nearest name is {near[0]}" if near else "")
    if problem["type"] == "missing":
        return f"{key} is missing" if len(problem["loc"]) == 1 else f"{key} should have three values in each row"
    said = str(problem["ctx"]["error"]) if problem["type"] == "value_error" else problem["msg"]
    if not key:
        return said
    return f"{key} {said[0].lower()}{said[1:]}, and this is {shown(problem['input'])}"


# What a value means, for people.
_MEANINGS = {
    "ground_sample_distance_m": "metres per pixel",
    "picture_sample_distance_m": "metres per pixel of the pictures",
    "mtf_at_nyquist": "MTF at Nyquist, on top of the pictures' own",
    "motion_pixels": "smear along the columns, in pixels",
    "snr": "signal-to-noise ratio at mid grey",
    "read_noise_electrons": "of which read noise, in electrons",
    "bits": "of the sensor",
    "exposure": "factor of the light",
    "gains": "factors of red, green, blue after the sensor",
    "band_weights": "red, green, blue of the pictures in each band",
    "misregistration_pixels": "red down and blue up, in pixels",
    "haze_transmission": "of the air; 1: none",
    "encoding": "of 8 bits",
    "jpeg_quality": "of the compression on board",
    "turned": "flips and quarter turns at random",
}


def in_words(camera: Camera) -> list[tuple[str, str, str]]:
    """(Key, value, meaning) of everything that is set or varies; a Gaussian blur also with its sigma."""
    rows = []
    for key, meaning in _MEANINGS.items():
        value = getattr(camera, key)
        if value is None:
            continue
        if key == "gains":
            said = ", ".join(_span_in_words(span) for span in value)
        elif key == "band_weights":
            said = "; ".join(" ".join(f"{weight:g}" for weight in row) for row in value)
        elif isinstance(value, tuple):
            said = _span_in_words(value)
        else:
            said = {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)
        if key == "mtf_at_nyquist" and value[0] < 1:
            meaning += f"; sigma {abs(sigma_of(value[1])):.2f} to {sigma_of(value[0]):.2f} pixels"
        rows.append((key, said, meaning))
    return rows


def _span_in_words(span: Span) -> str:
    return f"{span[0]:g}" if span[0] == span[1] else f"{span[0]:g} to {span[1]:g}"


def drawn(camera: Camera, name: str) -> dict[str, float]:
    """The values of one frame: each of `ranges` evenly between its ends (factors in their logarithm), and `turn`.

    They depend on the camera's name and `name` only; `turn` is 0 to 7, 0 as it is.
    """
    random = np.random.default_rng(seed_of("camera", camera.name, name))
    values = {}
    for key, (low, high) in camera.ranges().items():
        at = random.random()
        in_logarithm = key not in ("motion_pixels", "misregistration_pixels", "haze_transmission", "jpeg_quality")
        values[key] = float(low * (high / low) ** at) if in_logarithm else float(low + (high - low) * at)
    return values | {"turn": float(random.integers(8)) if camera.turned else 0.0}


def seen_through(picture: Image.Image, camera: Camera, name: str) -> Image.Image:
    """The 512x512 RGB picture as this camera would deliver it: the same bytes for the same picture and `name`."""
    values = drawn(camera, name)
    random = np.random.default_rng(seed_of("noise", camera.name, name))
    pixels = _turned(np.asarray(picture), int(values["turn"]))
    light = to_linear(pixels)
    light = behind(light, values["haze_transmission"])
    light = values["exposure"] * (light @ np.array(camera.band_weights, dtype=np.float64).T)
    light = _sampled(light, camera, values)
    light = misregistered(light, values["misregistration_pixels"])
    light = _digitized(noisy(light, values["snr"], random, camera.read_noise_electrons), camera.bits)
    light = light * np.array([values[f"gains {band + 1}"] for band in range(BANDS)])
    encoded = _whole(_encoded(light, camera.encoding))
    if "jpeg_quality" in values:
        encoded = jpeg(encoded, values["jpeg_quality"], random)
    return Image.fromarray(encoded, "RGB")


def through(frame: Frame, camera: Camera | None, name: str) -> Frame:
    """The decoded frame as the camera would deliver it, which its `changes` say; as it is without a camera."""
    if camera is None:
        return frame
    seen = seen_through(frame.image, camera, name)
    return replace(frame, image=seen, changes=(*frame.changes, f"seen through the camera {camera.name}"))


def _turned(pixels: Pixels, turn: int) -> Pixels:
    """One of the eight orientations of a square."""
    flipped = pixels[:, ::-1] if turn >= 4 else pixels
    return np.ascontiguousarray(np.rot90(flipped, turn % 4))


def _sampled(light: Light, camera: Camera, values: Mapping[str, float]) -> Light:
    """Blur and smear in the camera's pixels, on the picture's finer grid; then the mean of each of its pixels."""
    from scipy.ndimage import uniform_filter1d

    spacing = values.get("ground_sample_distance_m")
    factor = spacing / camera.picture_sample_distance_m if spacing else 1.0
    if values["mtf_at_nyquist"] < 1:
        light = blurred(light, values["mtf_at_nyquist"], factor)
    if (smear := round(values["motion_pixels"] * factor)) > 1:
        light = uniform_filter1d(light, smear, axis=0, mode="mirror")
    if (size := round(CAMERA_SIZE / factor)) < CAMERA_SIZE:
        bands = [Image.fromarray(light[..., band].astype(np.float32), "F") for band in range(BANDS)]
        coarse = [np.asarray(band.resize((size, size), Image.Resampling.BOX), dtype=np.float64) for band in bands]
        light = np.stack(coarse, axis=-1)
    return light


def _digitized(light: Light, bits: int) -> Light:
    """Clipped to full scale and rounded to the steps of the sensor."""
    largest = 2**bits - 1
    return np.asarray(np.rint(np.clip(light, 0, 1) * largest) / largest)


def _encoded(light: Light, encoding: str | float) -> Pixels:
    if isinstance(encoding, str):
        return to_pixels(light)
    return np.rint(255 * np.clip(light, 0, 1) ** (1 / encoding)).astype(np.uint8)


def _whole(pixels: Pixels) -> Pixels:
    """A coarser frame repeated to 512x512, as the decoder enlarges it."""
    if len(pixels) == CAMERA_SIZE:
        return pixels
    return np.asarray(Image.fromarray(pixels, "RGB").resize((CAMERA_SIZE, CAMERA_SIZE), Image.Resampling.BOX))
