"""The drawing surface of synthetic tiles: coordinates in metres, output in pixels, one random generator per tile.

Positions are metres from the tile's centre, x to the east and y to the south; colours are RGB 0..255.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

T = TypeVar("T")
Array = NDArray[Any]
Mask = NDArray[np.bool_]
Colour = tuple[float, ...]  # red, green, blue
Point = tuple[float, float]

# Ground colours of places anywhere on Earth. Natural and built morphologies draw from the same list, so that
# colour says little about the category: (dark tone, light tone, vegetation).
BIOMES: dict[str, tuple[Colour, Colour, Colour]] = {
    "temperate": ((62, 74, 44), (116, 118, 76), (46, 66, 36)),
    "tropical": ((42, 62, 36), (88, 98, 58), (30, 54, 30)),
    "arid": ((124, 100, 72), (178, 150, 112), (98, 94, 62)),
    "red_soil": ((108, 74, 54), (158, 112, 82), (78, 78, 46)),
    "grey_rock": ((78, 76, 72), (130, 126, 118), (68, 74, 60)),
    "steppe": ((104, 98, 62), (150, 138, 92), (82, 84, 50)),
    "tundra": ((74, 72, 60), (122, 116, 98), (62, 68, 48)),
    "snowy": ((150, 152, 156), (206, 208, 212), (92, 98, 96)),
}
WATERS: tuple[Colour, ...] = (
    (18, 34, 56), (26, 48, 66), (34, 58, 60), (46, 66, 62), (64, 76, 62), (88, 88, 70), (30, 62, 80), (20, 28, 40),
)  # fmt: skip


def as_array(colour: Any) -> Array:
    """Colours as float32, for arithmetic with images."""
    return np.asarray(colour, np.float32)


class Canvas:
    """One tile while it is drawn, and the areas of its contents (`shares`) for its description."""

    def __init__(self, random: np.random.Generator, size: int, metres_per_pixel: float) -> None:
        self.random = random
        self.size = size
        self.metres_per_pixel = metres_per_pixel
        self.extent = size * metres_per_pixel  # metres across
        axis = ((np.arange(size) + 0.5) * metres_per_pixel - self.extent / 2).astype(np.float32)
        self.x, self.y = np.meshgrid(axis, axis)
        self.rgb: Array = np.zeros((size, size, 3), np.float32)
        self.water: Array = np.zeros((size, size), np.float32)  # 0..1
        self.built: Array = np.zeros((size, size), np.float32)  # 0..1: roofs, paving, works
        self.road_metres = 0.0
        self.biome = str(random.choice(list(BIOMES)))
        self.subtype = ""  # the scene, if the morphology has several
        self.rough_land = 0.0  # how often the land around a town or an installation is rough

    # --- random numbers -------------------------------------------------------------------------------

    def uniform(self, low: float, high: float) -> float:
        return float(self.random.uniform(low, high))

    def integer(self, low: int, high: int) -> int:
        """A random integer, both ends included."""
        return int(self.random.integers(low, high + 1))

    def chance(self, probability: float) -> bool:
        return bool(self.random.random() < probability)

    def angle(self) -> float:
        return self.uniform(0, math.pi)

    def pick(self, values: Sequence[T]) -> T:
        return values[int(self.random.integers(len(values)))]

    # --- fields ---------------------------------------------------------------------------------------

    def fractal(self, slope: float = 2.3, largest_metres: float = 4000.0) -> Array:
        """Noise of zero mean and unit deviation; power ~ frequency ** -(slope + 1) below `largest_metres`."""
        return self._spectral(slope, largest_metres, None)

    def streaks(self, angle: float, stretch: float, slope: float, largest_metres: float) -> Array:
        """Like `fractal`, `stretch` times longer along `angle`."""
        return self._spectral(slope, largest_metres, (angle, stretch))

    def _spectral(self, slope: float, largest: float, oriented: tuple[float, float] | None) -> Array:
        from scipy import fft

        size = self.size
        fx = fft.rfftfreq(size, self.metres_per_pixel).astype(np.float32)[None, :]
        fy = fft.fftfreq(size, self.metres_per_pixel).astype(np.float32)[:, None]
        if oriented:
            angle, stretch = oriented
            along = fx * math.cos(angle) + fy * math.sin(angle)
            across = -fx * math.sin(angle) + fy * math.cos(angle)
            squared = (along * stretch) ** 2 + across**2
        else:
            squared = fx**2 + fy**2
        amplitude = (squared + np.float32(1 / largest) ** 2) ** np.float32(-slope / 4 - 0.25)
        amplitude[0, 0] = 0
        white = self.random.standard_normal((size, size // 2 + 1, 2), dtype=np.float32)
        spectrum = white.view(np.complex64)[..., 0] * amplitude
        field = fft.irfft2(spectrum, (size, size))
        return (field / (field.std() + 1e-9)).astype(np.float32)

    def rotated(self, angle: float, centre: Point = (0.0, 0.0)) -> tuple[Array, Array]:
        """The coordinates of every pixel along and across `angle`, from `centre`."""
        dx, dy = self.x - centre[0], self.y - centre[1]
        c, s = math.cos(angle), math.sin(angle)
        return dx * c + dy * s, dy * c - dx * s

    def cell_values(self, column: NDArray, row: NDArray) -> Array:
        """A random number 0..1 for every (column, row) cell; equal cells get equal numbers."""
        table = self.random.random((64, 64), dtype=np.float32)
        return table[np.mod(row, 64).astype(np.int32), np.mod(column, 64).astype(np.int32)]

    # --- painting -------------------------------------------------------------------------------------

    def fill(self, dark: Colour, light: Colour, field: Array, contrast: float = 0.22) -> None:
        """Cover the tile with a blend of dark and light by `field` (unit deviation)."""
        weight = np.clip(0.5 + contrast * field, 0, 1)[..., None]
        self.rgb = as_array(dark) * (1 - weight) + as_array(light) * weight

    def blend(self, mask: Array | Mask, colour: Colour | Array) -> None:
        """Paint `colour` (one colour or an image) with the opacity `mask` (0..1)."""
        weight = np.asarray(mask, np.float32)[..., None]
        self.rgb += (np.asarray(colour, np.float32) - self.rgb) * weight

    def shade(self, height: Array, strength: float) -> None:
        """Light the relief `height` (unit deviation) from the north-west."""
        slope = np.gradient(height)
        light = -(slope[0] + slope[1]) * strength
        self.rgb *= np.clip(1 + light, 0.45, 1.6)[..., None]

    def ground(self, biome: str | None = None) -> Array:
        """Bare land of one biome: soil tones, patches of vegetation, fine grain. Returns the coarse field."""
        self.biome = biome or self.biome
        dark, light, green = BIOMES[self.biome]
        coarse = self.fractal(2.6, self.uniform(1500, 5000))
        fine = self.fractal(1.2, 300)
        self.fill(dark, light, coarse + 0.45 * fine)
        patches = self.fractal(2.0, self.uniform(400, 2000))
        self.blend(np.clip((patches - self.uniform(0.2, 1.4)) * 1.5, 0, 0.8), green)
        return coarse

    def water_colour(self) -> Colour:
        return self.pick(WATERS)

    def flood(self, mask: Array | Mask, colour: Colour | None = None) -> None:
        """Paint water with the opacity `mask` (0..1) and a little swell."""
        weight = np.asarray(mask, np.float32)
        swell = self.streaks(self.angle(), 3, 1.6, 400)
        tone = as_array(colour or self.water_colour()) + (swell * self.uniform(0.8, 2.5))[..., None]
        self.blend(weight, tone)
        self.water = np.maximum(self.water, weight)

    def layer(self) -> "Layer":
        return Layer(self)


class Layer:
    """Shapes drawn at twice the resolution; `paste` adds them to the canvas."""

    SCALE = 2

    def __init__(self, canvas: Canvas) -> None:
        self.canvas = canvas
        side = canvas.size * self.SCALE
        self.image = Image.new("RGBA", (side, side), (0, 0, 0, 0))
        self.pen = ImageDraw.Draw(self.image)

    def _pixels(self, points: Sequence[Point]) -> list[Point]:
        canvas = self.canvas
        factor = self.SCALE / canvas.metres_per_pixel
        half = canvas.extent / 2
        return [((x + half) * factor, (y + half) * factor) for x, y in points]

    def line(self, points: Sequence[Point], width: float, colour: Colour, *, road: bool = False) -> None:
        """A stroke of `width` metres through `points`; `road` counts its length."""
        pixels = max(1, round(width * self.SCALE / self.canvas.metres_per_pixel))
        self.pen.line(self._pixels(points), fill=_rgba(colour), width=pixels, joint="curve" if pixels > 3 else None)
        if road:
            half = self.canvas.extent / 2
            self.canvas.road_metres += sum(
                math.dist(a, b) for a, b in itertools.pairwise(points) if max(map(abs, (*a, *b))) < 1.2 * half
            )

    def polygon(self, points: Sequence[Point], colour: Colour) -> None:
        self.pen.polygon(self._pixels(points), fill=_rgba(colour))

    def rectangle(self, centre: Point, length: float, width: float, angle: float, colour: Colour) -> None:
        """`length` metres along `angle`, `width` across."""
        self.polygon(box(centre, length, width, angle), colour)

    def disc(self, centre: Point, radius: float, colour: Colour) -> None:
        (left, top), (right, bottom) = self._pixels(
            [(centre[0] - radius, centre[1] - radius), (centre[0] + radius, centre[1] + radius)]
        )
        self.pen.ellipse((left, top, right, bottom), fill=_rgba(colour))

    def ring(self, centre: Point, radius: float, width: float, colour: Colour) -> None:
        steps = np.linspace(0, 2 * math.pi, 33)
        points = [(centre[0] + radius * math.cos(t), centre[1] + radius * math.sin(t)) for t in steps]
        self.line(points, width, colour)

    def paste(self, *, built: bool = False, water: bool = False, soft: bool = False) -> Array:
        """Add the shapes to the canvas; returns their coverage 0..1."""
        reduced = np.asarray(self.image.reduce(self.SCALE), np.float32)
        cover = reduced[..., 3] / 255
        if soft:
            cover *= 0.6
        self.canvas.blend(cover, reduced[..., :3])
        if built:
            self.canvas.built = np.maximum(self.canvas.built, cover)
        if water:
            self.canvas.water = np.maximum(self.canvas.water, cover)
        elif not soft:
            self.canvas.water = self.canvas.water * (1 - cover)
        return cover


def _rgba(colour: Colour) -> tuple[int, int, int, int]:
    red, green, blue = (int(min(255, max(0, value))) for value in colour)
    return red, green, blue, 255


def offset(origin: Point, along: float, across: float, angle: float) -> Point:
    """The point `along` metres in direction `angle` from `origin` and `across` metres to its right."""
    c, s = math.cos(angle), math.sin(angle)
    return origin[0] + along * c - across * s, origin[1] + along * s + across * c


def box(centre: Point, length: float, width: float, angle: float) -> list[Point]:
    """The corners of a rectangle."""
    return [offset(centre, a * length / 2, b * width / 2, angle) for a, b in ((-1, -1), (1, -1), (1, 1), (-1, 1))]


def arc(centre: Point, radius: float, start: float, stop: float, steps: int = 24) -> list[Point]:
    return [
        (centre[0] + radius * math.cos(t), centre[1] + radius * math.sin(t)) for t in np.linspace(start, stop, steps)
    ]


def grey(value: float, tint: float = 0.0) -> Colour:
    """A neutral tone; a positive `tint` warms it."""
    return value + tint, value, value - tint
