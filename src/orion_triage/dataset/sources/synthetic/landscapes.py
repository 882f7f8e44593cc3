"""Natural ground without people: the five LOW morphologies, and the terrain that other morphologies use."""

import math

import numpy as np
from scipy import ndimage

from orion_triage.dataset.sources.synthetic.canvas import (
    BIOMES,
    Array,
    Canvas,
    Colour,
    Layer,
    Point,
    arc,
    as_array,
    offset,
)


def ocean_water(canvas: Canvas) -> None:
    """Open water: swell, current streaks, sun glint, sometimes plankton swirls or sediment."""
    colour = as_array(canvas.water_colour())
    direction = canvas.angle()
    swell = canvas.streaks(direction, canvas.uniform(2, 6), 1.3, canvas.uniform(150, 500))
    currents = canvas.streaks(direction + canvas.uniform(-0.5, 0.5), 4, 2.8, 5000)
    canvas.rgb = np.broadcast_to(colour, canvas.rgb.shape).copy()
    canvas.rgb += (swell * canvas.uniform(1.5, 6) + currents * canvas.uniform(2, 9))[..., None]
    if canvas.chance(0.5):  # plankton or sediment in eddies
        eddies = np.abs(np.sin(canvas.fractal(3.2, 4000) * 3 + currents))
        canvas.blend(eddies**3 * canvas.uniform(0.1, 0.5), canvas.pick([(64, 112, 92), (96, 106, 82), (70, 100, 118)]))
    if canvas.chance(0.45):  # glint brightens one side
        along, _ = canvas.rotated(canvas.uniform(0, 2 * math.pi))
        canvas.rgb += (np.clip(along / canvas.extent + 0.35, 0, 1) ** 2 * canvas.uniform(30, 110))[..., None]
    canvas.water[:] = 1


def desert_ice_canopy(canvas: Canvas) -> None:
    """Sand, ice, scrub or closed forest from edge to edge: one texture without objects."""
    painters = {"dunes": _dunes, "ice": _ice, "canopy": _canopy, "scrub": _scrub}
    canvas.subtype = canvas.pick(list(painters))
    painters[canvas.subtype](canvas)


def _dunes(canvas: Canvas) -> None:
    canvas.biome = canvas.pick(["arid", "red_soil", "steppe"])
    dark, light = canvas.pick(
        [
            ((150, 112, 72), (206, 164, 112)),
            ((160, 140, 104), (208, 190, 150)),
            ((136, 88, 58), (190, 132, 88)),
        ]
    )
    direction = canvas.angle()
    _, across = canvas.rotated(direction)
    wavelength = canvas.uniform(160, 700)
    warp = canvas.streaks(direction, 3, 3.0, 3000) * wavelength * canvas.uniform(0.25, 0.7)
    phase = (across + warp) / wavelength
    crest = np.abs(np.mod(phase, 1) - 0.65) * 2  # sharp crests, a short lee side
    canvas.fill(dark, light, (crest - 0.6) * 2.2 + 0.5 * canvas.fractal(2.2, 3000), 0.3)
    canvas.shade(crest * 2 + 0.3 * canvas.fractal(2.0, 200), canvas.uniform(0.25, 0.6))


def _ice(canvas: Canvas) -> None:
    canvas.biome = "snowy"
    field = canvas.streaks(canvas.angle(), canvas.uniform(2, 5), 2.2, 1500)
    canvas.fill((168, 182, 196), (226, 232, 238), field, 0.2)
    canvas.shade(canvas.streaks(canvas.angle(), 6, 2.0, 300), 0.03)
    if canvas.chance(0.6):  # crevasses or leads
        cracks = np.abs(canvas.streaks(canvas.angle(), 4, 2.6, 2500))
        canvas.blend(
            np.clip(1 - cracks / canvas.uniform(0.03, 0.1), 0, 1) * 0.8,
            canvas.pick([(58, 84, 108), (120, 150, 176)]),
        )


def _canopy(canvas: Canvas) -> None:
    canvas.biome = canvas.pick(["tropical", "temperate"])
    dark, light = canvas.pick(
        [((22, 42, 22), (62, 88, 46)), ((34, 46, 30), (78, 88, 54)), ((40, 52, 26), (96, 98, 52))]
    )
    crowns = canvas.fractal(0.4, 80)
    stands = canvas.fractal(2.4, 3500)
    canvas.fill(dark, light, 0.9 * crowns + 0.8 * stands, 0.24)
    canvas.shade(canvas.fractal(3.2, 3000), canvas.uniform(0.5, 2.5))


def _scrub(canvas: Canvas) -> None:
    """Savanna and heath: bushes on open ground, often with a burn scar."""
    canvas.ground(canvas.pick(["arid", "red_soil", "steppe", "tundra", "temperate"]))
    canvas.shade(canvas.fractal(3.2, 3000), canvas.uniform(0, 2))
    bushes = canvas.fractal(0.5, 100) + 0.8 * canvas.fractal(2.4, 2500)
    canvas.blend(np.clip((bushes - canvas.uniform(0.2, 1.2)) * 1.5, 0, 0.75), BIOMES[canvas.biome][2])
    if canvas.chance(0.4):
        scar = canvas.fractal(2.6, canvas.uniform(1500, 3500)) - canvas.uniform(0.5, 1.2)
        canvas.blend(np.clip(scar * 6, 0, canvas.uniform(0.4, 0.8)), canvas.pick([(52, 46, 44), (70, 58, 52)]))


def shoreline(canvas: Canvas, roughness: float, share: float, angle: float | None = None) -> Array:
    """A signed field, positive on water, with about `share` of the tile under water."""
    along, _ = canvas.rotated(canvas.uniform(0, 2 * math.pi) if angle is None else angle)
    field = along / canvas.extent * 2.5 + roughness * canvas.fractal(3.1, 4000)
    return (field - np.quantile(field, 1 - share)).astype(np.float32)


def paint_coast(canvas: Canvas, field: Array, *, beach: bool = True) -> None:
    """Water where `field` is positive, shallows and a beach or surf along the line."""
    colour = canvas.water_colour()
    shallow: Colour = canvas.pick([(74, 116, 112), (92, 110, 92), (60, 84, 88), (104, 148, 140)])
    slope = np.hypot(*np.gradient(field))
    # Distance from the line, in tens of metres: exact for a plane, approximate near a rough shore.
    depth = field / np.maximum(slope, 0.6 * slope.mean()) * canvas.metres_per_pixel / 10
    canvas.flood(np.clip(depth * 2 + 0.5, 0, 1), colour)
    canvas.blend(np.exp(-np.clip(depth, 0, None) / canvas.uniform(3, 14)) * (depth > 0) * 0.7, shallow)
    if beach:
        width = canvas.uniform(1.0, 5.0)
        canvas.blend(
            np.exp(-((depth + width / 2) ** 2) / width**2) * 0.75,
            canvas.pick([(196, 180, 144), (150, 138, 116), (214, 206, 188)]),
        )
        canvas.blend(np.exp(-((depth - 1.2) ** 2) / 0.8) * canvas.uniform(0, 0.6), (214, 220, 220))


def coastline(canvas: Canvas) -> None:
    """A natural shore: bays, headlands, a lagoon or islands; no harbour, no road."""
    relief = canvas.fractal(3.2, 3500)
    canvas.ground()
    canvas.shade(relief, canvas.uniform(1, 5))
    canvas.subtype = "islands" if canvas.chance(0.3) else "mainland"
    if canvas.subtype == "islands":
        rings = canvas.fractal(3.0, canvas.uniform(1200, 3000))
        field = (canvas.uniform(0.5, 0.9) - rings).astype(np.float32)
        if canvas.chance(0.4):
            field = (np.abs(rings - 0.9) - canvas.uniform(0.15, 0.4)).astype(np.float32)
    else:
        field = shoreline(canvas, canvas.uniform(0.25, 0.7), canvas.uniform(0.35, 0.7))
    paint_coast(canvas, field)


def geological(canvas: Canvas) -> None:
    """Craters, cones, folded beds, ridges: bare rock."""
    kind = canvas.subtype = canvas.pick(["crater", "volcano", "folds", "mountains"])
    canvas.ground(canvas.pick(["arid", "red_soil", "grey_rock", "tundra", "steppe", "snowy"]))
    if kind == "folds":
        direction = canvas.angle()
        _, across = canvas.rotated(direction)
        warp = canvas.streaks(direction, 2.5, 3.4, 5000) * canvas.uniform(500, 1100)
        beds = np.sin((across + warp) / canvas.uniform(45, 110)) + 0.6 * np.sin(
            (across + warp) / canvas.uniform(18, 30)
        )
        canvas.rgb *= (1 + 0.16 * beds)[..., None]
        canvas.shade(beds + 2 * canvas.fractal(3.2, 1500), canvas.uniform(0.1, 0.3))
        return
    if kind == "mountains":
        ridges = -np.abs(canvas.fractal(3.3, 3000)) - 0.3 * np.abs(canvas.fractal(3.0, 1100))
        canvas.shade(ridges, canvas.uniform(6, 11))
        if canvas.chance(0.4):
            canvas.blend(np.clip((ridges + 0.5) * 3, 0, 0.9), (222, 226, 230))
        return
    centre = (canvas.uniform(-600, 600), canvas.uniform(-600, 600))
    radius = canvas.uniform(800, 1900)
    distance = np.hypot(canvas.x - centre[0], canvas.y - centre[1]) / radius
    distance = distance * (1 + 0.07 * canvas.fractal(2.6, 2000))
    bearing = np.arctan2(canvas.y - centre[1], canvas.x - centre[0])
    if kind == "crater":
        height = np.exp(-(((distance - 1) / 0.16) ** 2)) * 1.2 - np.exp(-((distance / 0.8) ** 4)) * 0.9
        canvas.shade(height * 10 + 0.5 * canvas.fractal(3.0, 800), canvas.uniform(0.5, 1.1))
        canvas.blend(
            np.exp(-((distance / 0.7) ** 6)) * 0.4,
            canvas.pick([(180, 168, 140), (70, 66, 62), (110, 100, 84)]),
        )
        return
    gullies = np.sin(bearing * canvas.integer(9, 18) + 1.5 * canvas.fractal(2.6, 1500))
    cone = np.exp(-distance * 1.2) * 40 + gullies * np.clip(1 - distance / 2.0, 0, 1) * 0.9
    canvas.shade(cone, canvas.uniform(0.7, 1.2))
    canvas.blend(np.exp(-((distance / 0.22) ** 4)) * 0.85, (48, 42, 40))
    flows = np.clip(canvas.fractal(2.4, 1200) + gullies - 0.9, 0, 1) * (distance < 2.2) * np.exp(-distance / 2)
    canvas.blend(flows, (46, 44, 44))


def drainage_tree(canvas: Canvas) -> Layer:
    """Channels that split repeatedly into finer ones, on a separate layer."""
    layer = canvas.layer()
    tone = canvas.pick([(52, 62, 44), (84, 72, 54), (60, 68, 68), (186, 170, 140)])
    half = canvas.extent / 2
    segments = 0

    def grow(start: Point, heading: float, length: float, width: float) -> None:
        nonlocal segments
        position, bearing, step = start, heading, max(50.0, length / 14)
        points, travelled = [start], 0.0
        while travelled < length and segments < 2500:
            bearing += canvas.uniform(-0.35, 0.35)
            bearing += (heading - bearing) * 0.15
            position = offset(position, step, 0, bearing)
            points.append(position)
            travelled += step
            segments += 1
            if length > 110 and max(abs(position[0]), abs(position[1])) < half * 1.15 and canvas.chance(0.42):
                side = canvas.pick([-1, 1])
                branch = length * canvas.uniform(0.3, 0.6) * (1 - 0.5 * travelled / length)
                grow(position, bearing + side * canvas.uniform(0.6, 1.15), branch, width * 0.62)
        layer.line(points, max(9.0, width), tone)

    direction = canvas.uniform(0, 2 * math.pi)
    for _ in range(canvas.integer(2, 3)):
        start = offset((0.0, 0.0), -half * 1.25, canvas.uniform(-0.8, 0.8) * half, direction)
        grow(
            start,
            direction + canvas.uniform(-0.2, 0.2),
            half * canvas.uniform(2.0, 2.6),
            canvas.uniform(45, 80),
        )
    return layer


def _meanders(canvas: Canvas) -> None:
    """A winding river in its plain, with oxbows and sand bars."""
    if canvas.chance(0.5):
        _canopy(canvas)
    else:
        canvas.ground(canvas.pick(["temperate", "tropical", "steppe", "tundra"]))
    direction, colour = canvas.angle(), canvas.water_colour()
    sand = canvas.pick([(178, 164, 132), (150, 140, 112)])
    wavelength, width = canvas.uniform(1200, 3200), canvas.uniform(50, 150)
    # The heading oscillates by this angle: a sine-generated curve, like real meanders.
    swing, phase = canvas.uniform(1.0, 1.9), canvas.uniform(0, 6)
    position = offset((0.0, 0.0), -0.9 * canvas.extent, canvas.uniform(-0.25, 0.25) * canvas.extent, direction)
    course = [position]
    for number in range(int(6 * canvas.extent / 40)):
        bearing = direction + swing * (0.75 + 0.25 * math.sin(number / 29)) * math.sin(
            2 * math.pi * number * 40 / wavelength + phase
        )
        bearing += 0.3 * math.sin(number * 40 / 1500 + 2 * phase)
        position = offset(position, 40, 0, bearing)
        course.append(position)
    bars, water = canvas.layer(), canvas.layer()
    for _ in range(canvas.integer(1, 5)):
        centre = course[canvas.integer(20, 300)]
        start = canvas.uniform(0, 6)
        bend = arc(
            offset(centre, 0, canvas.uniform(-700, 700), direction),
            canvas.uniform(130, 320),
            start,
            start + canvas.uniform(2, 4.5),
        )
        water.line(bend, width * canvas.uniform(0.5, 0.9), colour)
    bars.line([(x + 0.3 * width, y + 0.25 * width) for x, y in course], width * canvas.uniform(0.8, 1.1), sand)
    water.line(course, width, colour)
    bars.paste()
    water.paste(water=True)


def fractal_texture(canvas: Canvas) -> None:
    """Self-similar natural patterns: drainage trees, braided or winding rivers, badlands, a maze of small lakes."""
    kind = canvas.subtype = canvas.pick(["drainage", "braided", "meanders", "lakes", "badlands"])
    if kind == "meanders":
        _meanders(canvas)
        return
    canvas.ground()
    if kind == "drainage":
        canvas.shade(canvas.fractal(3.4, 1500), canvas.uniform(1, 4))
        cover = drainage_tree(canvas).paste(soft=canvas.chance(0.5))
        canvas.shade(-ndimage.gaussian_filter(cover, 2.5) * 3, canvas.uniform(0.5, 1.0))
    elif kind == "badlands":
        ridges = -np.abs(canvas.fractal(3.2, 800)) - 0.4 * np.abs(canvas.fractal(3.0, 260))
        canvas.shade(ridges, canvas.uniform(1.8, 3.2))
        canvas.rgb *= (1 + 0.07 * np.sin(canvas.fractal(2.8, 2500) * 9))[..., None]
    elif kind == "lakes":
        field = canvas.streaks(canvas.angle(), canvas.uniform(1.2, 2.5), 2.4, canvas.uniform(500, 1100))
        field = field - canvas.uniform(0.1, 0.7)
        canvas.flood(np.clip(field * 8, 0, 1))
    else:
        direction = canvas.angle()
        _, across = canvas.rotated(direction)
        belt = np.exp(-(((across + 120 * canvas.streaks(direction, 3, 3.8, 5000)) / canvas.uniform(900, 1500)) ** 4))
        canvas.blend(belt * 0.8, canvas.pick([(150, 142, 128), (128, 118, 98), (172, 160, 136)]))
        canvas.rgb += (canvas.streaks(direction, 5, 2.2, 800) * 5 * belt)[..., None]
        layer = canvas.layer()
        colour = canvas.water_colour()
        bank = canvas.uniform(350, 800)
        for _ in range(canvas.integer(9, 16)):
            lane, phases = canvas.uniform(-bank, bank), canvas.random.uniform(0, 6, 3)
            swing = canvas.uniform(60, 220)
            course = [
                offset(
                    (0.0, 0.0),
                    s,
                    lane
                    + swing * math.sin(s / 420 + phases[0])
                    + 0.6 * swing * math.sin(s / 170 + phases[1])
                    + bank * 0.5 * math.sin(s / 1500 + phases[2]),
                    direction,
                )
                for s in np.linspace(-canvas.extent * 0.75, canvas.extent * 0.75, 130)
            ]
            layer.line(course, canvas.uniform(16, 75), colour)
        layer.paste(water=True)
