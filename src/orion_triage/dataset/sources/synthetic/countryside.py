"""Land as most frames show it: rough ground without a clear subject, wild or worked, often both in one tile.

The wild scenes (LOW) and the worked ones (MEDIUM) share relief, covers and colours, so that roughness, contrast and
green say nothing about the category: only fields, tracks and houses do. What they follow are the differences between
drawn and real frames that docs/camera.md names: mixed scenes, roughness, fields, relief, colour.
"""

import math
from collections.abc import Callable

import numpy as np

from orion_triage.dataset.sources.synthetic.canvas import BIOMES, Array, Canvas, Colour, Mask, Point, as_array, offset

GREENS: tuple[Colour, ...] = ((34, 56, 34), (46, 66, 36), (58, 74, 44), (40, 62, 50), (70, 82, 48), (30, 46, 28))
SOILS: tuple[Colour, ...] = (
    (168, 132, 92), (186, 150, 108), (150, 104, 74), (176, 120, 86), (128, 112, 84), (196, 170, 132), (112, 92, 70),
    (150, 142, 126),
)  # fmt: skip
TRACKS: tuple[Colour, ...] = ((190, 160, 122), (206, 186, 152), (168, 140, 110), (176, 172, 164), (150, 120, 92))


# --- relief and cover -------------------------------------------------------------------------------------------


def relief(canvas: Canvas) -> Array:
    """Heights of dissected land, zero mean and unit deviation: valleys branch where smooth noise changes its sign."""
    valley = canvas.uniform(600, 2600)
    roughness = canvas.uniform(0.28, 0.5)  # of each octave beside the one before, which is 2.2 times longer
    height = np.zeros((canvas.size, canvas.size), np.float32)
    sharp = canvas.chance(0.35)  # ridges instead of valleys
    for octave in range(5):
        field = np.abs(canvas.fractal(5.0, valley / 2.2**octave))
        height += (-field if sharp else field) * roughness**octave
    height += canvas.uniform(0.2, 1.2) * canvas.fractal(4.5, 5000)
    return np.asarray((height - height.mean()) / (height.std() + 1e-6), np.float32)


def light_on(height: Array, bearing: float) -> Array:
    """How much each slope faces the sun, unit deviation."""
    south, east = np.gradient(height)
    facing = east * math.cos(bearing) + south * math.sin(bearing)
    return np.asarray(facing / (facing.std() + 1e-6), np.float32)


def rough_ground(canvas: Canvas, *, strength: float, green_share: float) -> Array:
    """Relief under a cover of soil and plants that follows it; returns the heights.

    `strength` is the deviation of the light on the slopes. Plants keep to valleys, to the shaded side, or to neither.
    """
    height = relief(canvas)
    facing = light_on(height, canvas.pick([0.8, -2.4, -0.8]))
    dark, light, _ = (as_array(tone) for tone in BIOMES[canvas.biome])
    soil = as_array(canvas.pick(SOILS)) if canvas.chance(0.6) else light
    tone = 0.5 + 0.22 * (canvas.fractal(2.4, 3000) + 0.6 * canvas.fractal(1.4, 600))
    weight = np.clip(tone, 0, 1)[..., None]
    canvas.rgb = (dark * (1 - weight) + soil * weight).astype(np.float32)
    wetness = (
        -height * canvas.uniform(0, 1) - facing * canvas.uniform(0, 1) + canvas.fractal(2.2, canvas.uniform(600, 2500))
    )
    wetness += canvas.uniform(0.2, 0.8) * canvas.fractal(0.8, 150)
    share = float(np.quantile(wetness, 1 - min(0.98, max(0.02, green_share))))
    green = as_array(canvas.pick(GREENS))
    crowns = 1 + canvas.uniform(0.04, 0.16) * canvas.fractal(0.5, 90)
    canvas.blend(
        np.clip((wetness - share) * canvas.uniform(1.2, 5), 0, canvas.uniform(0.75, 1)), green * crowns[..., None]
    )
    canvas.rgb *= np.clip(1 + strength * facing, 0.3, 1.7)[..., None]
    return height


def stream(canvas: Canvas, height: Array, colour: Colour, width: float) -> None:
    """A pale or wet bed along the deepest lines of `height`."""
    low = np.clip((np.quantile(height, 0.06) - height) * canvas.uniform(4, 12), 0, 1)
    canvas.blend(low * width, colour)


# --- what people add ---------------------------------------------------------------------------------------------


def nearest(canvas: Canvas, spacing: float, *, squeeze: float = 1.0, warp: float = 0.1) -> tuple[Array, int, Mask]:
    """Cells of about `spacing` metres: each pixel's cell, their number, and where cells meet."""
    from scipy.spatial import cKDTree

    half = canvas.extent / 2 + spacing
    corners = canvas.random.uniform(-half, half, (max(4, int((2 * half / spacing) ** 2)), 2))
    corners = corners[cKDTree(corners).query(corners, k=2)[0][:, 1] > 0.3 * spacing]
    x = canvas.x + warp * spacing * canvas.fractal(2.2, 6 * spacing)
    y = canvas.y * squeeze + warp * spacing * canvas.fractal(2.2, 6 * spacing)
    cell = cKDTree(corners).query(np.stack([x.ravel(), y.ravel()], axis=1))[1].reshape(x.shape)
    edge = np.zeros(cell.shape, bool)
    edge[:, 1:] |= cell[:, 1:] != cell[:, :-1]
    edge[1:] |= cell[1:] != cell[:-1]
    return cell, len(corners), edge


def crop_tones(canvas: Canvas, count: int) -> Array:
    """`count` colours of a season's crops, (count, 3): some fields bare, some green, some ripe or burnt."""
    dark, light, green = (as_array(tone) for tone in BIOMES[canvas.biome])
    soil = as_array(canvas.pick(SOILS))
    season = [light, soil, soil * 1.12, soil * 0.85, (soil + light) / 2, (soil + green) / 2, green * 1.15, green, dark]
    if canvas.chance(0.4):
        season += [as_array(canvas.pick([(44, 130, 48), (70, 120, 50), (96, 128, 60)]))]
    if canvas.chance(0.3):
        season += [as_array((62, 58, 54)), as_array((84, 80, 74))]
    weights = canvas.random.dirichlet(np.full(len(season), canvas.uniform(0.3, 1.5)))
    tones = np.stack(season)[canvas.random.choice(len(season), count, p=weights)]
    return np.asarray(tones * canvas.random.uniform(0.85, 1.15, (count, 1)), np.float32)


def field_blocks(canvas: Canvas, long: float, short: float, block: float) -> Array:
    """An image of fields of `long` by `short` metres, in blocks of about `block` metres, each in its own direction."""
    cell, count, between = nearest(canvas, block, warp=0.05)
    lead = canvas.angle()
    angles = lead + canvas.random.normal(0, canvas.uniform(0, 0.6), count)
    angles += (math.pi / 2) * (canvas.random.random(count) < 0.4)
    c, s = np.cos(angles)[cell], np.sin(angles)[cell]
    along, across = canvas.x * c + canvas.y * s, canvas.y * c - canvas.x * s
    size = canvas.random.uniform(0.6, 1.6, (2, count))
    length, width = long * size[0][cell], short * size[1][cell]
    row = np.floor(across / width)
    column = np.floor(along / length + canvas.cell_values(row, cell))
    tones = crop_tones(canvas, 97)
    pick = (canvas.cell_values(column + 13 * (cell % 31), row + 7 * (cell % 29)) * 9973).astype(np.int64)
    image = tones[pick % len(tones)]
    image = image * (1 + 0.05 * canvas.fractal(1.6, 400))[..., None]
    border = (np.mod(across, width) < canvas.uniform(6, 14)) | between
    hedge = as_array(canvas.pick(GREENS)) if canvas.chance(0.6) else as_array(canvas.pick(TRACKS)) * 0.9
    return np.asarray(np.where(border[..., None], 0.45 * image + 0.55 * hedge, image), np.float32)


def plots(canvas: Canvas, plot: float) -> Array:
    """An image of small irregular plots of about `plot` metres, in neighbourhoods of one use."""
    cell, count, edge = nearest(canvas, plot, squeeze=canvas.uniform(0.5, 1.0), warp=0.15)
    tones = crop_tones(canvas, count)
    image = tones[cell] * (1 + 0.07 * canvas.fractal(1.2, 200))[..., None]
    hedge = as_array(canvas.pick(GREENS)) if canvas.chance(0.5) else image * 0.85
    return np.asarray(np.where(edge[..., None], 0.5 * image + 0.5 * hedge, image), np.float32)


def trees(canvas: Canvas, share: float) -> None:
    """Single trees and groves over everything, `share` of the ground."""
    crowns = canvas.fractal(0.5, canvas.uniform(60, 160)) + canvas.uniform(0.3, 1.2) * canvas.fractal(2.0, 1500)
    limit = np.quantile(crowns, 1 - share)
    canvas.blend(np.clip((crowns - limit) * 4, 0, canvas.uniform(0.6, 0.95)), canvas.pick(GREENS))


def settle(canvas: Canvas, centre: Point, radius: float) -> None:
    """A village: roofs and yards as bright grains around `centre`."""
    distance = np.hypot(canvas.x - centre[0], canvas.y - centre[1]) / radius
    near = np.clip(1.4 - distance - 0.45 * canvas.fractal(2.4, 500), 0, 1)
    lot = canvas.uniform(18, 30)
    along, across = canvas.rotated(canvas.angle())
    value = canvas.cell_values(np.floor(along / lot), np.floor(across / lot))
    roofs = (value < canvas.uniform(0.25, 0.6)) & (near > 0.15)
    yard = as_array(canvas.pick([(150, 138, 124), (166, 150, 140), (140, 132, 120), (176, 160, 138)]))
    canvas.blend(near * canvas.uniform(0.3, 0.6), yard)
    tone = as_array(canvas.pick([(190, 188, 190), (172, 160, 150), (206, 200, 190), (150, 150, 168)]))
    canvas.blend(roofs * np.clip(near * 1.5, 0, 1), tone * (0.7 + 0.5 * value)[..., None])
    canvas.built = np.maximum(canvas.built, near * 0.6)


def track(canvas: Canvas, width: float, *, bend: float, through: Point | None = None) -> list[Point]:
    """One dirt track or road from edge to edge, counted as a road; returns its course."""
    layer = canvas.layer()
    reach, angle = canvas.extent * 0.75, canvas.angle()
    base = through or (canvas.uniform(-2000, 2000), canvas.uniform(-2000, 2000))
    swings = [(bend * canvas.uniform(0.4, 1), canvas.uniform(500, 2200), canvas.uniform(0, 6)) for _ in range(2)]
    course = [
        offset(base, s, sum(w * (math.sin(s / k + p) - math.sin(p)) for w, k, p in swings), angle)
        for s in np.linspace(-reach, reach, 60)
    ]
    layer.line(course, width, canvas.pick(TRACKS), road=True)
    layer.paste()
    return course


def villages(canvas: Canvas, count: int, course: list[Point] | None = None) -> None:
    """`count` villages, along `course` where there is one, with tracks between them."""
    for _ in range(count):
        on_road = course is not None and canvas.chance(0.7)
        centre = (
            course[canvas.integer(12, len(course) - 13)]
            if on_road and course is not None
            else (canvas.uniform(-2300, 2300), canvas.uniform(-2300, 2300))
        )
        if canvas.chance(0.5):
            track(canvas, canvas.uniform(6, 12), bend=canvas.uniform(50, 400), through=centre)
        settle(canvas, centre, canvas.uniform(60, 320))


# --- the scenes ---------------------------------------------------------------------------------------------------


def hills(canvas: Canvas) -> None:
    """Dissected hills and mountains, bare to wooded, with snow or a stony stream; no field, no track."""
    height = rough_ground(canvas, strength=canvas.uniform(0.12, 0.42), green_share=canvas.uniform(0, 0.9))
    if canvas.chance(0.35):
        stream(canvas, height, canvas.pick([(176, 164, 144), (140, 130, 112), (96, 104, 96)]), canvas.uniform(0.4, 0.9))
    if canvas.chance(0.25):
        snow = height + 0.6 * canvas.fractal(1.6, 700) - canvas.uniform(0.2, 1.4)
        canvas.blend(np.clip(snow * 4, 0, 0.95), (226, 230, 234))


def upland(canvas: Canvas) -> None:
    """Open wild land in patches: grass, bush, bare soil, burnt ground, greener along dry beds."""
    height = rough_ground(canvas, strength=canvas.uniform(0.02, 0.14), green_share=canvas.uniform(0.1, 0.6))
    for _ in range(canvas.integer(1, 3)):  # patches of another cover, with soft or sharp edges
        patch = canvas.fractal(canvas.uniform(1.8, 2.8), canvas.uniform(600, 3500)) - canvas.uniform(0, 1.2)
        tone = canvas.pick([*SOILS, *GREENS, (56, 50, 46)])
        canvas.blend(np.clip(patch * canvas.uniform(1, 8), 0, canvas.uniform(0.25, 0.8)), tone)
    if canvas.chance(0.6):
        stream(canvas, height, canvas.pick(GREENS), canvas.uniform(0.3, 0.9))
    if canvas.chance(0.5):
        trees(canvas, canvas.uniform(0.03, 0.3))
    canvas.rgb *= (1 + canvas.uniform(0.02, 0.09) * canvas.fractal(1.0, 200))[..., None]


def wetland(canvas: Canvas) -> None:
    """Forest and swamp in a maze: winding greener lines, clearings that nobody made, old river arms."""
    canvas.biome = canvas.pick(["tropical", "temperate", "steppe", "tundra"])
    rough_ground(canvas, strength=canvas.uniform(0.01, 0.08), green_share=canvas.uniform(0.6, 0.97))
    lines = np.abs(canvas.fractal(3.0, canvas.uniform(1500, 4500))) + 0.2 * np.abs(canvas.fractal(2.6, 700))
    green = tuple(value * canvas.uniform(1.2, 1.8) for value in canvas.pick(GREENS))
    canvas.blend(np.clip(1 - lines / canvas.uniform(0.08, 0.3), 0, 1) * canvas.uniform(0.4, 0.9), green)
    if canvas.chance(0.6):
        open_ground = canvas.fractal(2.2, canvas.uniform(800, 2500)) - canvas.uniform(0.6, 1.3)
        canvas.blend(np.clip(open_ground * 5, 0, 0.8), canvas.pick([*SOILS, *GREENS]))
    if canvas.chance(0.5):
        water = np.abs(canvas.fractal(3.4, canvas.uniform(2500, 5000))) - canvas.uniform(0.01, 0.05)
        canvas.flood(np.clip(-water * 40, 0, 0.9), canvas.pick([(66, 60, 44), (94, 84, 62), (34, 44, 40)]))
    canvas.rgb *= (1 + canvas.uniform(0.02, 0.1) * canvas.fractal(0.6, 120))[..., None]


def patchwork(canvas: Canvas) -> None:
    """Fine smallholder land over rough ground: plots, trees and villages everywhere, nothing large."""
    rough_ground(canvas, strength=canvas.uniform(0, 0.1), green_share=canvas.uniform(0.1, 0.6))
    image = (
        plots(canvas, canvas.uniform(40, 150))
        if canvas.chance(0.6)
        else field_blocks(canvas, canvas.uniform(70, 260), canvas.uniform(35, 110), canvas.uniform(250, 900))
    )
    worked = canvas.fractal(2.2, canvas.uniform(900, 3000)) + 0.5 * canvas.fractal(1.4, 400)
    canvas.blend(np.clip((worked + canvas.uniform(0.2, 1.6)) * 3, 0, canvas.uniform(0.75, 1)), image)
    trees(canvas, canvas.uniform(0.05, 0.45))
    if canvas.chance(0.25):
        track_of_water(canvas)
    villages(canvas, canvas.integer(1, 9))


def parcels(canvas: Canvas) -> None:
    """Large fields in many directions and shapes, between woods, dry beds or bare land."""
    rough_ground(canvas, strength=canvas.uniform(0, 0.1), green_share=canvas.uniform(0.1, 0.8))
    image = field_blocks(canvas, canvas.uniform(250, 900), canvas.uniform(90, 500), canvas.uniform(700, 2600))
    worked = canvas.fractal(2.8, canvas.uniform(1500, 4500))
    canvas.blend(np.clip((worked + canvas.uniform(0, 2)) * canvas.uniform(4, 12), 0, 1), image)
    if canvas.chance(0.3):
        layer = canvas.layer()
        for _ in range(canvas.integer(1, 8)):
            place = (canvas.uniform(-2400, 2400), canvas.uniform(-2400, 2400))
            layer.disc(place, canvas.uniform(150, 420), canvas.pick([(44, 130, 48), *GREENS, *SOILS]))
        layer.paste()
    trees(canvas, canvas.uniform(0.01, 0.15))
    course = track(canvas, canvas.uniform(8, 18), bend=canvas.uniform(0, 400)) if canvas.chance(0.7) else None
    villages(canvas, canvas.integer(0, 4), course)


def clearings(canvas: Canvas) -> None:
    """Forest that is being opened: straight tracks, cleared blocks, some houses in a row."""
    canvas.biome = canvas.pick(["tropical", "temperate", "red_soil"])
    rough_ground(canvas, strength=canvas.uniform(0.02, 0.15), green_share=canvas.uniform(0.85, 0.98))
    image = field_blocks(canvas, canvas.uniform(200, 800), canvas.uniform(120, 500), canvas.uniform(1500, 4000))
    cell, count, _ = nearest(canvas, canvas.uniform(350, 1100), warp=0.02)
    opened = (canvas.random.random(count) < canvas.uniform(0.12, 0.5))[cell]
    canvas.blend(opened * canvas.uniform(0.6, 1.0), image)
    course = track(canvas, canvas.uniform(8, 16), bend=canvas.uniform(0, 120))
    for _ in range(canvas.integer(0, 3)):
        track(canvas, canvas.uniform(6, 12), bend=canvas.uniform(0, 80), through=course[canvas.integer(15, 44)])
    villages(canvas, canvas.integer(1, 4), course)
    trees(canvas, canvas.uniform(0.02, 0.15))


def valley_fields(canvas: Canvas) -> None:
    """Hills with fields in the valleys or on the flat tops, a road and villages among them."""
    height = rough_ground(canvas, strength=canvas.uniform(0.1, 0.32), green_share=canvas.uniform(0.2, 0.95))
    share = canvas.uniform(0.15, 0.5)
    flat = -height if canvas.chance(0.75) else height
    limit = np.quantile(flat, 1 - share)
    image = (
        plots(canvas, canvas.uniform(50, 140))
        if canvas.chance(0.5)
        else field_blocks(canvas, canvas.uniform(120, 400), canvas.uniform(50, 160), canvas.uniform(400, 1200))
    )
    canvas.blend(np.clip((flat - limit) * 6, 0, 1), image)
    course = track(canvas, canvas.uniform(8, 16), bend=canvas.uniform(200, 500))
    villages(canvas, canvas.integer(1, 6), course)
    trees(canvas, canvas.uniform(0.02, 0.2))


def hamlets(canvas: Canvas) -> None:
    """Open or wooded land with one road and a few villages, fields only around them."""
    canvas.pick([upland, wetland, hills])(canvas)
    course = track(canvas, canvas.uniform(10, 22), bend=canvas.uniform(0, 350))
    places = [course[canvas.integer(14, 45)] for _ in range(canvas.integer(1, 4))]
    image = plots(canvas, canvas.uniform(50, 160))
    for place in places:
        distance = np.hypot(canvas.x - place[0], canvas.y - place[1]) / canvas.uniform(300, 1100)
        canvas.blend(np.clip((1.2 - distance - 0.4 * canvas.fractal(2.2, 800)) * 3, 0, 0.95), image)
        settle(canvas, place, canvas.uniform(80, 350))
        if canvas.chance(0.6):
            track(canvas, canvas.uniform(6, 12), bend=canvas.uniform(50, 300), through=place)


def track_of_water(canvas: Canvas) -> None:
    """A winding river through worked land."""
    line = np.abs(canvas.fractal(3.4, 5000)) - canvas.uniform(0.01, 0.04)
    canvas.flood(np.clip(-line * 40, 0, 0.9), canvas.water_colour())


def surroundings(canvas: Canvas) -> bool:
    """Rough land around something else, as often as the canvas asks for it; False if there is none."""
    if not (canvas.rough_land and canvas.chance(canvas.rough_land)):
        return False
    canvas.pick([upland, hills, wetland, patchwork, parcels, valley_fields])(canvas)
    return True


# The rough scenes of the morphologies that have some, by name.
SCENES: dict[str, dict[str, Callable[[Canvas], None]]] = {
    "geological": {"hills": hills},
    "desert_ice_canopy": {"upland": upland},
    "fractal_texture": {"wetland": wetland},
    "agriculture": {
        "patchwork": patchwork,
        "parcels": parcels,
        "clearings": clearings,
        "valley_fields": valley_fields,
    },
    "town": {"hamlets": hamlets},
}
