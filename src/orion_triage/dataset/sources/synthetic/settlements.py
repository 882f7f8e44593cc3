"""Ordinary settled ground: the five MEDIUM morphologies, and the urban fabric that other morphologies use."""

import math

import numpy as np

from orion_triage.dataset.sources.synthetic import countryside
from orion_triage.dataset.sources.synthetic.canvas import (
    BIOMES,
    Array,
    Canvas,
    Colour,
    Point,
    arc,
    as_array,
    grey,
    offset,
)
from orion_triage.dataset.sources.synthetic.landscapes import paint_coast, shoreline

ROOFS: tuple[Colour, ...] = (
    (168, 158, 148), (122, 112, 106), (196, 192, 186), (150, 104, 84), (96, 92, 94), (182, 150, 120), (134, 138, 142),
)  # fmt: skip


def roof_mosaic(canvas: Canvas, along: Array, across: Array, lot: float) -> Array:
    """An image of roofs, one tone per `lot` x `lot` metres."""
    column, row = np.floor(along / lot), np.floor(across / lot)
    pick = canvas.cell_values(column, row)
    tones = as_array(ROOFS)
    main = canvas.integer(0, len(ROOFS) - 1)
    index = np.where(pick < canvas.uniform(0.3, 0.6), main, (pick * 997).astype(np.int32) % len(ROOFS))
    brightness = 0.68 + 0.5 * canvas.cell_values(column + 17, row + 31)
    return tones[index] * brightness[..., None]


def paint_blocks(
    canvas: Canvas, mask: Array, angle: float, *, block: tuple[float, float], centre: Point = (0.0, 0.0)
) -> None:
    """A dense street grid with roofs where `mask` (0..1) says."""
    along, across = canvas.rotated(angle, centre)
    length, width = block
    street = canvas.uniform(14, 22)
    in_street = (np.mod(along, length) < street) | (np.mod(across, width) < street)
    avenue = canvas.integer(4, 8)
    in_avenue = (np.mod(along, length * avenue) < 34) | (np.mod(across, width * avenue) < 34)
    roofs = roof_mosaic(canvas, along, across, canvas.uniform(22, 38))
    if canvas.chance(0.6):  # courtyards and shadows
        inner = (np.abs(np.mod(along, length) - length / 2 - street / 2) < length * 0.18) & (
            np.abs(np.mod(across, width) - width / 2 - street / 2) < width * 0.18
        )
        roofs[inner] *= 0.62
    green = canvas.cell_values(np.floor(along / length), np.floor(across / width))
    roofs = np.where((green < 0.05)[..., None], as_array(BIOMES[canvas.biome][2]), roofs)
    pavement = as_array(grey(canvas.uniform(78, 118), 2))
    fabric = np.where((in_street | in_avenue)[..., None], pavement, roofs)
    fabric[in_avenue] *= 1.15
    canvas.blend(mask, fabric)
    canvas.built = np.maximum(canvas.built, mask * (green >= 0.05))
    canvas.road_metres += float(mask.mean()) * canvas.extent**2 * (1 / length + 1 / width)


def paint_houses(canvas: Canvas, mask: Array, angle: float, *, curl: float, greenery: float) -> None:
    """Detached houses in gardens along bending streets where `mask` (0..1) says."""
    along, across = canvas.rotated(angle)
    if curl:
        along = along + curl * canvas.fractal(5.0, 2500)
        across = across + curl * canvas.fractal(5.0, 2500)
    depth, length = canvas.uniform(85, 115), canvas.uniform(320, 520)
    shift = canvas.cell_values(np.floor(across / (2 * depth)), np.zeros_like(across)) * length
    in_street = (np.mod(across, depth) < 13) | (np.mod(along + shift, length) < 13)
    lot = canvas.uniform(24, 32)
    column, row = np.floor(along / lot), np.floor(across / (depth / 3))
    near = np.hypot(np.mod(along, lot) - lot / 2, np.mod(across, depth / 3) - depth / 6)
    garden = as_array(BIOMES[canvas.biome][2]) * (0.75 + 0.6 * canvas.cell_values(column + 5, row + 3))[..., None]
    soil = as_array(BIOMES[canvas.biome][1])
    woods = np.clip(canvas.fractal(2.8, 900) * 0.1, -0.2, 0.2)[..., None]
    lawn = (garden * greenery + soil * (1 - greenery)) * (1 - woods)
    house = (near < lot * 0.36) & (canvas.cell_values(column + 9, row + 40) < 0.9)
    roofs = roof_mosaic(canvas, along, across, lot)
    image = np.where(house[..., None], roofs * 0.75 + lawn * 0.25, lawn)
    image = np.where(in_street[..., None], as_array(grey(canvas.uniform(110, 150))), image)
    canvas.blend(mask, image)
    canvas.built = np.maximum(canvas.built, mask * 0.6)
    canvas.road_metres += float(mask.mean()) * canvas.extent**2 * (1 / depth + 1 / length)


def main_roads(canvas: Canvas, count: int, width: float, *, bend: float = 300.0, through: Point | None = None) -> None:
    """Roads from edge to edge."""
    layer = canvas.layer()
    reach = canvas.extent * 0.75
    tone = grey(canvas.uniform(120, 175), 4)
    for _ in range(count):
        angle = canvas.uniform(0, math.pi)
        base = through or (canvas.uniform(-1500, 1500), canvas.uniform(-1500, 1500))
        swing, phase = canvas.uniform(-bend, bend), canvas.uniform(0, 6)
        points = [
            offset(base, s, swing * (math.sin(s / 1300 + phase) - math.sin(phase)), angle)
            for s in np.linspace(-reach, reach, 30)
        ]
        layer.line(points, width, tone, road=True)
    layer.paste()


def paint_fields(canvas: Canvas, *, angle: float | None = None, size: tuple[float, float] | None = None) -> None:
    """A mosaic of rectangular fields with hedges or tracks between."""
    angle = canvas.angle() if angle is None else angle
    long, short = size or (canvas.uniform(250, 800), canvas.uniform(120, 420))
    along, across = canvas.rotated(angle)
    along = along + canvas.uniform(0, 60) * canvas.fractal(3.6, 3000)
    row = np.floor(across / short)
    shift = canvas.cell_values(np.zeros_like(row), row) * long
    stretch = 0.6 + 0.8 * canvas.cell_values(np.ones_like(row), row)
    column = np.floor((along + shift) / (long * stretch))
    value = canvas.cell_values(column, row)
    dark, light, green = (as_array(tone) for tone in BIOMES[canvas.biome])
    crops = np.stack([dark, light, green, (dark + light) / 2, light * 1.12, green * 0.8 + light * 0.25, green * 1.3])
    image = crops[(value * 991).astype(np.int32) % len(crops)] * (0.85 + 0.3 * value)[..., None]
    furrow = np.mod(along if canvas.chance(0.5) else across, canvas.uniform(28, 60)) / 60
    image *= (0.96 + 0.08 * furrow)[..., None]
    image += (canvas.fractal(1.4, 250) * 4)[..., None]
    edge = (np.mod(across, short) < 14) | (np.mod(along + shift, long * stretch) < 14)
    image = np.where(edge[..., None], canvas.pick([green * 0.7, light * 1.15]), image)
    canvas.rgb = image.astype(np.float32)


def paint_smallholdings(canvas: Canvas) -> None:
    """A patchwork of small irregular plots between crooked tracks and hedges."""
    from scipy.spatial import cKDTree

    relief = canvas.ground()
    plot = canvas.uniform(60, 190)
    half = canvas.extent / 2 + plot
    count = int((2 * half / plot) ** 2)
    corners = canvas.random.uniform(-half, half, (count, 2))
    # Even out the plots: points closer than half a plot would give slivers.
    tree = cKDTree(corners)
    corners = corners[tree.query(corners, k=2)[0][:, 1] > 0.35 * plot]
    warp = 0.12 * plot
    x = canvas.x + warp * canvas.fractal(2.2, 500)
    y = canvas.y * canvas.uniform(0.6, 1.0) + warp * canvas.fractal(2.2, 500)
    owner = cKDTree(corners).query(np.stack([x.ravel(), y.ravel()], axis=1))[1].reshape(x.shape)
    dark, light, green = (as_array(tone) for tone in BIOMES[canvas.biome])
    crops = np.stack([dark, light, green, (dark + light) / 2, light * 1.08, (green + light) / 2, green * 1.2])
    tone = crops[canvas.random.integers(0, len(crops), len(corners))]
    tone *= canvas.random.uniform(0.85, 1.12, (len(corners), 1)).astype(np.float32)
    image = tone[owner] + (canvas.fractal(1.4, 250) * 4)[..., None]
    edge = np.zeros(owner.shape, bool)
    edge[:, 1:] |= owner[:, 1:] != owner[:, :-1]
    edge[1:] |= owner[1:] != owner[:-1]
    hedge = canvas.pick([green * 0.75, light * 1.1, (dark + green) / 2])
    image = np.where(edge[..., None], 0.5 * image + 0.5 * hedge, image)
    canvas.rgb = image.astype(np.float32)
    canvas.shade(relief, canvas.uniform(0, 1.5))


def hamlets(canvas: Canvas, count: int) -> None:
    """Loose clusters of roofs along the tracks."""
    for _ in range(count):
        centre = (canvas.uniform(-2200, 2200), canvas.uniform(-2200, 2200))
        edge = np.hypot(canvas.x - centre[0], canvas.y - centre[1]) / canvas.uniform(120, 380)
        mask = np.round(np.clip(1.5 - edge - 0.4 * canvas.fractal(2.4, 500), 0, 1))
        paint_houses(canvas, mask, canvas.angle(), curl=canvas.uniform(20, 60), greenery=canvas.uniform(0.3, 0.8))


def farmsteads(canvas: Canvas, count: int) -> None:
    layer = canvas.layer()
    half = canvas.extent / 2
    for _ in range(count):
        centre = (canvas.uniform(-half, half), canvas.uniform(-half, half))
        angle = canvas.angle()
        for _ in range(canvas.integer(2, 5)):
            spot = offset(centre, canvas.uniform(-60, 60), canvas.uniform(-60, 60), angle)
            layer.rectangle(spot, canvas.uniform(25, 70), canvas.uniform(15, 25), angle, canvas.pick(ROOFS))
    layer.paste(built=True)


def river(canvas: Canvas, width: float) -> None:
    """A meandering river from edge to edge."""
    layer = canvas.layer()
    angle, reach = canvas.angle(), canvas.extent * 0.8
    base = (canvas.uniform(-1500, 1500), canvas.uniform(-1500, 1500))
    swing, phase = canvas.uniform(150, 500), canvas.uniform(0, 6)
    points = [
        offset(base, s, swing * math.sin(s / 600 + phase) + 0.6 * swing * math.sin(s / 1700), angle)
        for s in np.linspace(-reach, reach, 60)
    ]
    layer.line(points, width, canvas.water_colour())
    layer.paste(water=True)


def _countryside(canvas: Canvas) -> None:
    """The surroundings of a town or an installation: rough land, fields or bare land."""
    if countryside.surroundings(canvas):
        return
    choice = canvas.uniform(0, 1)
    if choice < 0.15:
        paint_smallholdings(canvas)
    elif choice < 0.55:
        paint_fields(canvas)
        farmsteads(canvas, canvas.integer(0, 10))
    else:
        relief = canvas.ground()
        canvas.shade(relief, canvas.uniform(0, 1.5))
    scrub = canvas.fractal(2.2, 400)
    canvas.blend(np.clip(scrub - 1.4, 0, 0.7), BIOMES[canvas.biome][2])


def urban_grid(canvas: Canvas) -> None:
    """A big city's fabric from edge to edge: blocks, avenues, a park, perhaps a river."""
    canvas.ground()
    everywhere = np.ones((canvas.size, canvas.size), np.float32)
    angle = canvas.angle()
    paint_blocks(canvas, everywhere, angle, block=(canvas.uniform(90, 240), canvas.uniform(70, 140)))
    for _ in range(canvas.integer(0, 2)):  # quarters with another orientation
        part = np.clip(canvas.fractal(3.6, 4500) * 4 - 2, 0, 1)
        paint_blocks(canvas, np.round(part), canvas.angle(), block=(canvas.uniform(90, 200), canvas.uniform(70, 130)))
    if canvas.chance(0.5):
        layer = canvas.layer()
        for _ in range(canvas.integer(1, 3)):
            centre = (canvas.uniform(-2000, 2000), canvas.uniform(-2000, 2000))
            layer.rectangle(centre, canvas.uniform(300, 900), canvas.uniform(200, 500), angle, BIOMES[canvas.biome][2])
        layer.paste()
    if canvas.chance(0.35):
        river(canvas, canvas.uniform(80, 260))
    main_roads(canvas, canvas.integer(0, 2), 36, bend=500)


def suburb(canvas: Canvas) -> None:
    """Detached houses in gardens along bending streets, with a school field or a pond."""
    canvas.ground()
    everywhere: Array = np.ones((canvas.size, canvas.size), np.float32)
    if canvas.chance(0.5):
        everywhere = np.round(np.clip(1.6 + canvas.fractal(3.4, 3000), 0, 1))
    paint_houses(canvas, everywhere, canvas.angle(), curl=canvas.uniform(40, 150), greenery=canvas.uniform(0.35, 1.0))
    layer = canvas.layer()
    for _ in range(canvas.integer(2, 7)):
        centre = (canvas.uniform(-2400, 2400), canvas.uniform(-2400, 2400))
        green = tuple(value * 1.25 for value in BIOMES[canvas.biome][2])
        layer.rectangle(centre, canvas.uniform(120, 420), canvas.uniform(90, 260), canvas.angle(), green)
        layer.rectangle(centre, canvas.uniform(50, 140), 40, canvas.angle(), canvas.pick(ROOFS))
    layer.paste()
    main_roads(canvas, canvas.integer(1, 2), 26, bend=500)
    if canvas.chance(0.3):
        layer = canvas.layer()
        layer.disc(
            (canvas.uniform(-2000, 2000), canvas.uniform(-2000, 2000)),
            canvas.uniform(80, 220),
            canvas.water_colour(),
        )
        layer.paste(water=True)


def agriculture(canvas: Canvas) -> None:
    """Cropland from edge to edge: mosaic, smallholdings, centre pivots, strips or paddies."""
    kind = canvas.subtype = canvas.pick(["mosaic", "smallholdings", "smallholdings", "pivots", "strips", "paddies"])
    if kind == "smallholdings":
        paint_smallholdings(canvas)
        hamlets(canvas, canvas.integer(0, 3))
        main_roads(canvas, canvas.integer(0, 2), 12, bend=400)
        return
    canvas.ground()
    if kind == "mosaic":
        paint_fields(canvas)
    elif kind == "strips":
        paint_fields(canvas, size=(canvas.uniform(1200, 2600), canvas.uniform(50, 110)))
    elif kind == "paddies":
        paint_fields(canvas, size=(canvas.uniform(110, 200), canvas.uniform(60, 110)))
        wet = np.clip(canvas.fractal(3.0, 2500) * 0.8, 0, 0.55)
        canvas.blend(wet, canvas.water_colour())
    else:
        spacing = canvas.pick([400.0, 805.0, 805.0, 1050.0])
        angle = canvas.uniform(-0.1, 0.1)
        shift = (canvas.uniform(0, spacing), canvas.uniform(0, spacing))
        dark, light, green = BIOMES[canvas.biome]
        layer = canvas.layer()
        steps = int(canvas.extent / spacing / 2) + 2
        for row in range(-steps, steps):
            for column in range(-steps, steps):
                if canvas.chance(0.12):
                    continue
                centre = offset(shift, column * spacing, row * spacing, angle)
                tone = canvas.pick([green, dark, light, tuple(v * 1.3 for v in green), tuple(v * 0.8 for v in dark)])
                layer.disc(centre, spacing * 0.48, tone)
                if canvas.chance(0.3):
                    start = canvas.uniform(0, 6)
                    wedge = [centre, *arc(centre, spacing * 0.47, start, start + canvas.uniform(0.6, 3))]
                    layer.polygon(wedge, canvas.pick([dark, light, green]))
        layer.paste()
        canvas.rgb += (canvas.fractal(1.4, 250) * 4)[..., None]
    farmsteads(canvas, canvas.integer(2, 14))
    main_roads(canvas, canvas.integer(0, 2), 14, bend=60)


def town(canvas: Canvas) -> None:
    """One small settlement in open country, roads meeting in its middle."""
    _countryside(canvas)
    if canvas.chance(0.3):
        river(canvas, canvas.uniform(30, 90))
    centre = (canvas.uniform(-700, 700), canvas.uniform(-700, 700))
    radius = canvas.uniform(550, 1250)
    distance = np.hypot(canvas.x - centre[0], canvas.y - centre[1])
    edge = distance / radius + 0.28 * canvas.fractal(2.8, 1200)
    angle = canvas.angle()
    canvas_houses = np.round(np.clip(1.5 - edge, 0, 1))
    paint_houses(canvas, canvas_houses, angle, curl=canvas.uniform(10, 90), greenery=canvas.uniform(0.3, 0.9))
    core = np.round(np.clip(0.95 - edge * 1.3, 0, 1))
    paint_blocks(canvas, core, angle, block=(canvas.uniform(70, 120), canvas.uniform(55, 90)), centre=centre)
    main_roads(canvas, canvas.integer(2, 3), 16, bend=260, through=centre)


def ordinary_infrastructure(canvas: Canvas) -> None:
    """One local installation in its surroundings: interchange, airstrip, solar farm, rail yard, harbour, works."""
    kind = canvas.subtype = canvas.pick(["interchange", "airstrip", "solar", "rail_yard", "harbour", "treatment"])
    _countryside(canvas)
    if kind == "harbour":
        _small_harbour(canvas)
        return
    if canvas.chance(0.4):
        fringe = np.round(np.clip(canvas.fractal(3.2, 2500) - 0.4, 0, 1))
        paint_houses(canvas, fringe, canvas.angle(), curl=90, greenery=0.7)
    centre = (canvas.uniform(-700, 700), canvas.uniform(-700, 700))
    angle = canvas.angle()
    concrete = grey(canvas.uniform(130, 185), 4)
    if kind != "interchange":
        main_roads(canvas, 1, 16, bend=120)
    layer = canvas.layer()
    if kind == "interchange":
        _interchange(canvas, centre, angle)
        return
    if kind == "airstrip":
        length = canvas.uniform(1100, 1800)
        layer.rectangle(centre, length + 160, 170, angle, tuple(v * 1.1 for v in BIOMES[canvas.biome][2]))
        layer.rectangle(centre, length, 36, angle, canvas.pick([grey(92), concrete]))
        apron = offset(centre, canvas.uniform(-300, 300), 190, angle)
        layer.line([apron, offset(centre, length * 0.3, 0, angle)], 18, concrete, road=True)
        layer.rectangle(apron, 220, 110, angle, concrete)
        for step in range(canvas.integer(2, 4)):
            layer.rectangle(offset(apron, -90 + 60 * step, 90, angle), 45, 35, angle, canvas.pick(ROOFS))
    elif kind == "solar":
        rows, columns = canvas.integer(6, 12), canvas.integer(1, 3)
        for column in range(columns):
            for row in range(rows):
                if canvas.chance(0.9):
                    spot = offset(centre, (column - columns / 2) * 420, (row - rows / 2) * 75, angle)
                    layer.rectangle(spot, 390, 50, angle, canvas.pick([(46, 54, 78), (40, 48, 70), (54, 62, 84)]))
    elif kind == "rail_yard":
        bed = canvas.uniform(90, 160)
        layer.rectangle(centre, 1500, bed, angle, grey(canvas.uniform(100, 130), 8))
        for track in np.arange(-bed / 2 + 12, bed / 2, 20):
            spread = canvas.uniform(500, 700)
            layer.line([offset(centre, a * spread, track, angle) for a in (-1, 1)], 6, grey(70, 4))
        reach = canvas.extent
        layer.line([offset(centre, -reach, 0, angle), offset(centre, reach, 0, angle)], 16, grey(92, 6), road=True)
        for _ in range(canvas.integer(2, 5)):
            layer.rectangle(
                offset(centre, canvas.uniform(-600, 600), bed / 2 + 50, angle),
                150,
                45,
                angle,
                canvas.pick(ROOFS),
            )
    else:
        rows, columns = canvas.integer(1, 2), canvas.integer(3, 5)
        layer.rectangle(centre, columns * 95 + 160, rows * 95 + 200, angle, grey(150, 6))
        for row in range(rows):
            for column in range(columns):
                spot = offset(centre, (column - (columns - 1) / 2) * 95, (row - (rows - 1) / 2) * 95, angle)
                layer.disc(spot, 34, (60, 72, 66))
                layer.ring(spot, 34, 8, grey(190))
        layer.rectangle(offset(centre, 0, rows * 55 + 60, angle), columns * 60, 40, angle, canvas.water_colour())
    layer.paste(built=True)


def _interchange(canvas: Canvas, centre: Point, angle: float) -> None:
    layer = canvas.layer()
    reach, tone = canvas.extent, grey(canvas.uniform(140, 185), 4)
    other = angle + canvas.uniform(1.2, 1.9)
    for heading in (angle, other):
        for side in (-22, 22):
            layer.line(
                [offset(centre, -reach, side, heading), offset(centre, reach, side, heading)],
                22,
                tone,
                road=True,
            )
    loop = canvas.uniform(80, 150)
    for quadrant in range(4):
        heading = angle + math.pi / 4 + quadrant * math.pi / 2
        layer.ring(offset(centre, loop * 1.45, 0, heading), loop, 14, tone)
        arm = canvas.uniform(420, 560)
        bend = [
            offset(centre, arm, 30, angle + quadrant * math.pi / 2),
            offset(centre, loop * 2.7, 0, heading),
            offset(centre, arm, -30, angle + (quadrant + 1) * math.pi / 2),
        ]
        layer.line(bend, 14, tone, road=True)
    layer.paste(built=True)


def _small_harbour(canvas: Canvas) -> None:
    angle = canvas.uniform(0, 2 * math.pi)
    field = shoreline(canvas, 0.15, canvas.uniform(0.35, 0.55), angle)
    paint_coast(canvas, field)
    near = np.argwhere((np.abs(field) < 0.03) & (np.hypot(canvas.x, canvas.y) < 1200))
    row, column = near[canvas.integer(0, len(near) - 1)] if len(near) else (canvas.size // 2, canvas.size // 2)
    centre = (float(canvas.x[row, column]), float(canvas.y[row, column]))
    layer = canvas.layer()
    stone = grey(canvas.uniform(120, 165), 5)
    for side in (-1, 1):
        start = offset(centre, -60, side * 230, angle)
        layer.line([start, offset(centre, 190, side * 230, angle), offset(centre, 280, side * 60, angle)], 22, stone)
    for step in range(canvas.integer(2, 4)):
        layer.line(
            [offset(centre, -20, -120 + 80 * step, angle), offset(centre, 110, -120 + 80 * step, angle)],
            10,
            stone,
        )
    for _ in range(canvas.integer(4, 12)):
        spot = offset(centre, canvas.uniform(0, 130), canvas.uniform(-170, 170), angle)
        layer.rectangle(spot, 16, 8, canvas.angle(), grey(225))
    layer.paste(built=True)
    village = np.round(np.clip(1.6 - np.hypot(canvas.x - centre[0], canvas.y - centre[1]) / 500, 0, 1)) * (
        field < -0.05
    )
    paint_houses(canvas, village.astype(np.float32), angle, curl=30, greenery=0.5)
