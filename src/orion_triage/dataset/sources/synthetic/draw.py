"""Synthetic tiles: 512x512 RGB drawn in metres, one morphology each, deterministic by seed.

They replace satellite imagery where none is available. First the ground is drawn (`landscapes`, `settlements`,
`megastructures`). Then the effects of air and sensor are added: sun, haze, clouds with shadows, a colour cast, blur and
noise. The statistics follow real 10 m frames: spectrum slope about -2.3, saturation about 0.33, mean RGB near
(93, 96, 75), grey deviation 11..69.
"""

import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from orion_triage.dataset.sources.source import Picture, Shot
from orion_triage.dataset.sources.synthetic import countryside, landscapes, megastructures, settlements
from orion_triage.dataset.sources.synthetic.canvas import Canvas, as_array
from orion_triage.dataset.sources.synthetic.chokepoints import space_military_chokepoint
from orion_triage.errors import OrionError
from orion_triage.imagery.frames import CAMERA_SIZE
from orion_triage.safe.children import workers

PAINTERS: dict[str, Callable[[Canvas], None]] = {
    "ocean_water": landscapes.ocean_water,
    "desert_ice_canopy": landscapes.desert_ice_canopy,
    "coastline": landscapes.coastline,
    "geological": landscapes.geological,
    "fractal_texture": landscapes.fractal_texture,
    "urban_grid": settlements.urban_grid,
    "suburb": settlements.suburb,
    "agriculture": settlements.agriculture,
    "ordinary_infrastructure": settlements.ordinary_infrastructure,
    "town": settlements.town,
    "mega_port": megastructures.mega_port,
    "mega_airport": megastructures.mega_airport,
    "energy_dam": megastructures.energy_dam,
    "mega_mine_industry": megastructures.mega_mine_industry,
    "space_military_chokepoint": space_military_chokepoint,
}

# The scenes of each morphology; a morphology with a single scene has its own name here.
SUBTYPES: dict[str, tuple[str, ...]] = {name: (name,) for name in PAINTERS} | {
    "desert_ice_canopy": ("dunes", "ice", "canopy", "scrub"),
    "coastline": ("islands", "mainland"),
    "geological": ("crater", "volcano", "folds", "mountains"),
    "fractal_texture": ("drainage", "braided", "meanders", "lakes", "badlands"),
    "agriculture": ("mosaic", "smallholdings", "pivots", "strips", "paddies"),
    "ordinary_infrastructure": ("interchange", "airstrip", "solar", "rail_yard", "harbour", "treatment"),
    "energy_dam": ("dam", "towers", "refinery"),
    "mega_mine_industry": ("open_pit", "works"),
    "space_military_chokepoint": ("launch", "base", "canal"),
}


@dataclass(frozen=True)
class Tile:
    """A drawn tile and its contents; shares are fractions of the area, road density is km per km2.

    `subtype` is one of `SUBTYPES[morphology]`, or of `countryside.SCENES[morphology]`.
    """

    image: Image.Image
    morphology: str
    subtype: str
    biome: str
    water_share: float
    built_share: float
    cloud_share: float
    road_density: float


@dataclass(frozen=True)
class Synthetic:
    """Synthetic tiles as an `ImagerySource`, drawn by one process per core, at most eight."""

    seed: int
    metres_per_pixel: float
    rough_land: float = 0.0  # share of rough tiles among those of the morphologies that have some

    name = "synthetic"
    licence = "Apache-2.0"
    attribution = "Drawn by ORION triage: no satellite has seen this."
    redistributable = True

    def pictures(self, shots: Sequence[Shot]) -> Iterator[Picture]:
        jobs = [
            (
                shot.target.morphology,
                tile_seed(self.seed, shot.name),
                self.metres_per_pixel,
                CAMERA_SIZE,
                self.rough_land,
            )
            for shot in shots
        ]
        with workers() as pool:
            for data in pool.map(_draw_png, jobs, chunksize=4):
                yield Picture(data, self.metres_per_pixel)


def _draw_png(job: tuple[str, int, float, int, float]) -> bytes:
    buffer = io.BytesIO()
    draw_tile(*job).image.save(buffer, "PNG", compress_level=3)  # as the default: 9 % larger, in a third of the time
    return buffer.getvalue()


def tile_seed(seed: int, name: str) -> int:
    """The generator seed of the tile `name`: independent of the order in which tiles are drawn."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big")


def draw_tile(
    morphology: str,
    seed: int,
    metres_per_pixel: float = 10.0,
    size: int = CAMERA_SIZE,
    rough_land: float = 0.0,
) -> Tile:
    """Draw one tile. The same arguments give the same pixels on one machine and library version.

    `rough_land` is the share of tiles that show rough land, if the morphology has such scenes (`countryside.SCENES`).
    It is also how often the land around a town or an installation is rough.

    Raises OrionError for an unknown morphology.
    """
    if morphology not in PAINTERS:
        raise OrionError(f"there is no morphology {morphology!r}.", f"Choose one of {', '.join(PAINTERS)}.")
    canvas = Canvas(np.random.default_rng(seed), size, metres_per_pixel)
    canvas.rough_land = rough_land
    rough = countryside.SCENES.get(morphology, {})
    if rough and rough_land and canvas.chance(rough_land):
        canvas.subtype = canvas.pick(list(rough))
        rough[canvas.subtype](canvas)
    else:
        PAINTERS[morphology](canvas)
    cloud = _observe(canvas)
    return Tile(
        image=Image.fromarray(np.clip(canvas.rgb, 0, 255).astype(np.uint8), "RGB"),
        morphology=morphology,
        subtype=canvas.subtype or morphology,
        biome=canvas.biome,
        water_share=float(canvas.water.mean()),
        built_share=float(canvas.built.mean()),
        cloud_share=float(cloud),
        road_density=canvas.road_metres / 1000 / (canvas.extent / 1000) ** 2,
    )


def _observe(canvas: Canvas) -> float:
    """Add the effects of air and sensor; returns the share of the tile under cloud."""
    from scipy import ndimage

    rgb = canvas.rgb
    rgb *= 1 + 0.05 * canvas.fractal(2.4, 3000)[..., None]  # uneven soil, moisture, shadow
    share = 0.0
    if canvas.chance(0.3):
        field = canvas.fractal(3.0, canvas.uniform(900, 3000))
        threshold = canvas.uniform(0.9, 2.2)
        cloud = np.clip((field - threshold) * canvas.uniform(1.0, 2.5), 0, 1)
        reach = int(canvas.uniform(200, 500) / canvas.metres_per_pixel)
        rgb *= (1 - 0.45 * np.roll(cloud, (reach, reach), (0, 1)))[..., None]
        canvas.blend(cloud * 0.94, (232, 234, 236))
        share = float((cloud > 0.5).mean())
    grey = rgb.mean(axis=2, keepdims=True)
    rgb = grey + (rgb - grey) * canvas.uniform(0.7, 1.3)
    rgb *= as_array([canvas.uniform(0.9, 1.12), canvas.uniform(0.92, 1.06), canvas.uniform(0.8, 1.08)])
    gain = canvas.uniform(0.62, 1.05)
    level = float(rgb.mean())
    rgb = (level + (rgb - level) * canvas.uniform(0.8, 1.35)) * gain
    haze = canvas.uniform(0, 0.28) ** 1.3
    rgb = rgb * (1 - haze) + as_array([150, 160, 170]) * haze
    blur = canvas.uniform(0.45, 0.8) * 10 / canvas.metres_per_pixel
    rgb = ndimage.gaussian_filter(rgb, (blur, blur, 0))
    noise = canvas.random.standard_normal(rgb.shape, dtype=np.float32)
    canvas.rgb = rgb + noise * canvas.uniform(0.6, 2.2)
    return share
