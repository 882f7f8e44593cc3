"""Works of strategic size, HIGH. Structures that MEDIUM has once and small appear here many times and large."""

import math

import numpy as np

from orion_triage.dataset.sources.synthetic import countryside
from orion_triage.dataset.sources.synthetic.canvas import (
    BIOMES,
    Canvas,
    Colour,
    Layer,
    Point,
    as_array,
    grey,
    offset,
)
from orion_triage.dataset.sources.synthetic.landscapes import paint_coast, shoreline
from orion_triage.dataset.sources.synthetic.settlements import (
    ROOFS,
    main_roads,
    paint_blocks,
    paint_fields,
    paint_houses,
    paint_smallholdings,
)

CONTAINERS: tuple[Colour, ...] = (
    (150, 64, 52), (60, 88, 128), (178, 150, 92), (84, 116, 88), (196, 196, 190), (160, 100, 60), (96, 100, 110),
)  # fmt: skip


def surroundings(canvas: Canvas) -> None:
    """Rough land, fields, bare land or the edge of a city."""
    if not countryside.surroundings(canvas):
        choice = canvas.uniform(0, 1)
        if choice < 0.1:
            paint_smallholdings(canvas)
        elif choice < 0.4:
            paint_fields(canvas)
        else:
            canvas.shade(canvas.ground(), canvas.uniform(0, 1.5))
    if canvas.chance(0.45):
        fringe = np.round(np.clip(canvas.fractal(3.2, 3000) - canvas.uniform(0.2, 0.8), 0, 1))
        if canvas.chance(0.5):
            paint_houses(canvas, fringe, canvas.angle(), curl=80, greenery=0.7)
        else:
            paint_blocks(canvas, fringe, canvas.angle(), block=(140, 90))


def ship(canvas: Canvas, layer: Layer, spot: Point, length: float, heading: float) -> None:
    width = length * 0.16
    hull = [
        offset(spot, -length / 2, -width / 2, heading),
        offset(spot, length * 0.38, -width / 2, heading),
        offset(spot, length / 2, 0, heading),
        offset(spot, length * 0.38, width / 2, heading),
        offset(spot, -length / 2, width / 2, heading),
    ]
    layer.polygon(hull, canvas.pick([(120, 62, 52), (70, 76, 84), (150, 146, 140), (58, 84, 104)]))
    for step in np.arange(-0.38, 0.3, 0.1):
        deck = offset(spot, length * step, 0, heading)
        layer.rectangle(deck, length * 0.07, width * 0.75, heading, canvas.pick(CONTAINERS))
    layer.rectangle(offset(spot, -length * 0.42, 0, heading), length * 0.05, width, heading, grey(225))


def _stacks(canvas: Canvas, layer: Layer, centre: Point, length: float, width: float, angle: float) -> None:
    """Container rows on a paved terminal."""
    lane = 44.0
    for across in np.arange(-width / 2 + lane / 2, width / 2, lane):
        along = -length / 2 + 20
        while along < length / 2 - 30:
            run = canvas.uniform(50, 160)
            if canvas.chance(0.85):
                spot = offset(centre, along + run / 2, across, angle)
                layer.rectangle(spot, run - 12, lane * 0.62, angle, canvas.pick(CONTAINERS))
            along += run


def mega_port(canvas: Canvas) -> None:
    """A deep-water terminal: fingers and basins kilometres long, container stacks, ships alongside."""
    surroundings(canvas)
    angle = canvas.uniform(0, 2 * math.pi)
    field = shoreline(canvas, 0.06, canvas.uniform(0.42, 0.58), angle)
    paint_coast(canvas, field, beach=False)
    along, _ = canvas.rotated(angle)
    edge = float(along[np.abs(field) < 0.05].mean()) if (np.abs(field) < 0.05).any() else 0.0
    paving = grey(canvas.uniform(120, 172), canvas.uniform(0, 8))
    layer = canvas.layer()
    depth = canvas.uniform(600, 1100)
    quay = offset((0, 0), edge - depth * 0.35, 0, angle)
    layer.rectangle(quay, depth, canvas.extent * canvas.uniform(0.75, 1.2), angle, paving)
    fingers = canvas.integer(2, 4)
    finger_length, finger_width = canvas.uniform(900, 1700), canvas.uniform(320, 480)
    spacing = canvas.extent / (fingers + canvas.uniform(0.2, 0.8))
    centres = [
        offset((0, 0), edge + finger_length / 2, (number - (fingers - 1) / 2) * spacing, angle)
        for number in range(fingers)
    ]
    for centre in centres:
        layer.rectangle(centre, finger_length + 200, finger_width, angle, paving)
    for centre in centres:
        _stacks(canvas, layer, centre, finger_length, finger_width - 110, angle)
        for side in (-1, 1):
            for crane in np.arange(-finger_length / 2 + 60, finger_length / 2, 130):
                spot = offset(centre, crane, side * (finger_width / 2 - 16), angle)
                layer.rectangle(spot, 16, 60, angle, canvas.pick([(190, 90, 60), (80, 110, 150), grey(210)]))
            berth = -finger_length / 2 + 200
            while berth < finger_length / 2 - 100:
                if canvas.chance(0.6):
                    spot = offset(centre, berth, side * (finger_width / 2 + 38), angle)
                    ship(canvas, layer, spot, canvas.uniform(220, 390), angle + canvas.pick([0.0, math.pi]))
                berth += 430
    for number in range(canvas.integer(2, 4)):
        yard = offset(quay, 0, (number - 1.5) * 900, angle)
        _stacks(canvas, layer, yard, depth * 0.7, 600, angle)
    if canvas.chance(0.6):
        _tanks(canvas, layer, offset(quay, -depth * 0.6, canvas.uniform(-1500, 1500), angle), 4, 6, angle)
    if canvas.chance(0.6):
        sea = offset((0, 0), edge + finger_length + 500, 0, angle)
        layer.line([offset(sea, 0, -1800, angle), offset(sea, 150, 700, angle)], 40, grey(130, 5))
    layer.paste(built=True)
    main_roads(canvas, 1, 22)


def mega_airport(canvas: Canvas) -> None:
    """An intercontinental airport: several runways of 3-4 km, taxiways, terminals with piers, wide aprons."""
    surroundings(canvas)
    angle = canvas.angle()
    grass: Colour = tuple(
        v * canvas.uniform(0.95, 1.2) for v in canvas.pick([BIOMES[canvas.biome][2], BIOMES[canvas.biome][1]])
    )
    surface = grey(canvas.uniform(78, 175))
    concrete = grey(canvas.uniform(150, 195), 4)
    runways = canvas.integer(2, 4)
    gap = canvas.uniform(1300, 1900)
    offsets = {2: (-0.5, 0.5), 3: (-0.62, 0.38, 0.62), 4: (-0.62, -0.4, 0.4, 0.62)}[runways]
    length = canvas.uniform(3000, 4100)
    layer = canvas.layer()
    layer.rectangle((0, 0), length + 500, gap * 1.24 + 700, angle, grass)
    layer.paste()
    layer = canvas.layer()
    for position in offsets:
        shift = canvas.uniform(-300, 300)
        middle = offset((0, 0), shift, position * gap, angle)
        inward = -1 if position > 0 else 1
        taxi = offset(middle, 0, inward * 190, angle)
        layer.line([offset(taxi, -length / 2, 0, angle), offset(taxi, length / 2, 0, angle)], 26, concrete, road=True)
        for exit_at in np.linspace(-length / 2, length / 2, canvas.integer(5, 9)):
            layer.line([offset(middle, exit_at, 0, angle), offset(taxi, exit_at + 90, 0, angle)], 24, concrete)
        layer.rectangle(middle, length, 62, angle, surface)
        for end in (-1, 1):
            layer.rectangle(offset(middle, end * (length / 2 - 60), 0, angle), 60, 50, angle, grey(215))
    apron_length, apron_width = canvas.uniform(1200, 2100), gap * canvas.uniform(0.36, 0.46)
    layer.rectangle((0, 0), apron_length, apron_width, angle, concrete)
    for position in (-0.3, 0.3):
        tie = apron_length * position
        layer.line([offset((0, 0), tie, -gap * 0.5, angle), offset((0, 0), tie, gap * 0.5, angle)], 26, concrete)
    piers = canvas.integer(2, 5)
    roof = canvas.pick([grey(205), grey(120), (140, 150, 160), (196, 186, 172)])
    for pier in range(piers):
        spot = offset((0, 0), (pier - (piers - 1) / 2) * apron_length / piers, 0, angle)
        layer.rectangle(spot, 55, apron_width * 0.82, angle, roof)
        for stand in np.arange(-apron_width * 0.38, apron_width * 0.38, 75):
            for side in (-1, 1):
                if canvas.chance(0.65):
                    plane = offset(spot, side * 62, stand, angle)
                    layer.rectangle(plane, 52, 9, angle, grey(238))
                    layer.rectangle(plane, 10, 48, angle, grey(232))
    layer.rectangle((0, 0), apron_length * 0.9, 70, angle, roof)
    if canvas.chance(0.5):  # a crossing runway
        layer.rectangle(offset((0, 0), length * 0.4, 0, angle), 2800, 60, angle + canvas.uniform(0.9, 1.5), surface)
    layer.paste(built=True)
    main_roads(canvas, 1, 24, bend=150)


def _tanks(canvas: Canvas, layer: Layer, centre: Point, rows: int, columns: int, angle: float) -> None:
    pitch = canvas.uniform(95, 130)
    radius = pitch * canvas.uniform(0.3, 0.38)
    layer.rectangle(centre, columns * pitch + 60, rows * pitch + 60, angle, grey(128, 8))
    for row in range(rows):
        for column in range(columns):
            spot = offset(centre, (column - (columns - 1) / 2) * pitch, (row - (rows - 1) / 2) * pitch, angle)
            layer.disc((spot[0] + radius * 0.35, spot[1] + radius * 0.35), radius, grey(66))
            layer.disc(spot, radius, grey(canvas.uniform(195, 238), 3))


def energy_dam(canvas: Canvas) -> None:
    """A dam with its reservoir, a power station with cooling towers, or a refinery with its tank farm."""
    kind = canvas.subtype = canvas.pick(["dam", "towers", "refinery"])
    if kind == "dam":
        _dam(canvas)
        return
    surroundings(canvas)
    angle = canvas.angle()
    if canvas.chance(0.5):
        field = shoreline(canvas, 0.15, canvas.uniform(0.12, 0.3), angle + math.pi / 2)
        paint_coast(canvas, field, beach=False)
    layer = canvas.layer()
    if kind == "refinery":
        layer.rectangle(
            (0, 0),
            canvas.uniform(2600, 3600),
            canvas.uniform(1900, 2600),
            angle,
            grey(canvas.uniform(118, 150), 8),
        )
        for spot_along in (-900, 0, 900):
            for spot_across in (-650, 0, 650):
                spot = offset((canvas.uniform(-60, 60), 0), spot_along, spot_across, angle)
                if canvas.chance(0.62):
                    _tanks(canvas, layer, spot, canvas.integer(3, 5), canvas.integer(4, 7), angle)
                else:
                    for _ in range(60):
                        unit = offset(spot, canvas.uniform(-330, 330), canvas.uniform(-230, 230), angle)
                        layer.rectangle(
                            unit,
                            canvas.uniform(15, 90),
                            canvas.uniform(12, 40),
                            angle,
                            canvas.pick([grey(92), grey(180), grey(60), (120, 110, 96)]),
                        )
        layer.paste(built=True)
        main_roads(canvas, 1, 18, bend=100)
        return
    layer.rectangle((0, 0), 2300, 1500, angle, grey(canvas.uniform(125, 160), 6))
    for _ in range(canvas.integer(2, 4)):
        hall = offset((0, 0), canvas.uniform(-600, 600), canvas.uniform(200, 500), angle)
        layer.rectangle((hall[0] + 22, hall[1] + 22), 320, 110, angle, grey(48))
        layer.rectangle(hall, 320, 110, angle, canvas.pick(ROOFS))
    layer.rectangle(offset((0, 0), 820, 350, angle), 430, 520, angle, canvas.pick([grey(38), grey(52), (92, 84, 74)]))
    for _ in range(2):
        switch = offset((0, 0), canvas.uniform(-950, -750), canvas.uniform(100, 600), angle)
        for bar in range(8):
            layer.line([offset(switch, -150, bar * 26, angle), offset(switch, 150, bar * 26, angle)], 6, grey(190))
    towers = canvas.integer(3, 8)
    rows = 2 if towers > 4 else 1
    spots = [
        offset((0, 0), (number // rows - (towers / rows - 1) / 2) * 250, -330 - 230 * (number % rows), angle)
        for number in range(towers)
    ]
    radius = canvas.uniform(66, 92)
    for spot in spots:  # long shadows first, then the rims
        layer.line([spot, (spot[0] + 190, spot[1] + 190)], radius * 1.6, grey(50))
    for spot in spots:
        layer.disc(spot, radius, grey(205, 3))
        layer.disc(spot, radius * 0.68, grey(88))
    layer.paste(built=True)
    drift = canvas.uniform(0, 2 * math.pi)
    plume = canvas.layer()
    for spot in spots:
        if canvas.chance(0.75):
            for step in range(7):
                plume.disc(offset(spot, step * 85, 20 * math.sin(step), drift), 50 + 16 * step, grey(238))
    plume.paste(soft=True)
    main_roads(canvas, 1, 20)


def _dam(canvas: Canvas) -> None:
    canvas.ground()
    angle = canvas.uniform(0, 2 * math.pi)
    along, across = canvas.rotated(angle)
    relief = canvas.fractal(3.0, 2600)
    position = canvas.uniform(-700, 500)
    span = canvas.uniform(700, 1500)
    upstream = along < position
    # The reservoir fills the valley and its side arms as far as the contour lies above the relief.
    valley = (np.abs(across) - span * 0.48) / 650 + 0.75 * np.maximum(relief + 0.2, -0.6)
    far = np.clip((position - along) / 900, 0, 1)
    lake = np.where(far < 0.15, (np.abs(across) < span * 0.5).astype(np.float32) - 0.5, 0.55 * far - valley)
    canvas.shade(np.maximum(relief, -0.5) + np.abs(across) / 900, canvas.uniform(3, 6))
    canvas.flood(np.clip(lake * 6, 0, 1) * upstream)
    layer = canvas.layer()
    bulge = span * canvas.uniform(-0.05, 0.22)
    wall = [
        offset((0, 0), position + bulge * (1 - (2 * t) ** 2) * -1, t * span * 1.12, angle)
        for t in np.linspace(-0.5, 0.5, 15)
    ]
    stream = [
        offset((0, 0), position + s, 90 * (math.sin(s / 420) - 0.0) * min(1, s / 600), angle)
        for s in np.linspace(30, 6000, 40)
    ]
    layer.line(stream, canvas.uniform(60, 130), canvas.water_colour())
    layer.paste(water=True)
    layer = canvas.layer()
    layer.line([(x + 26, y + 26) for x, y in wall], 60, grey(48))
    layer.line(wall, canvas.uniform(55, 90), grey(canvas.uniform(190, 225), 4))
    spill = offset((0, 0), position + 120, canvas.uniform(-0.2, 0.2) * span, angle)
    layer.rectangle(spill, 230, 90, angle, grey(232))
    layer.rectangle(offset((0, 0), position + 190, span * 0.28, angle), 90, 240, angle, grey(160, 4))
    for block in range(5):
        layer.rectangle(offset((0, 0), position + 420, span * 0.3 + block * 70, angle), 120, 45, angle, grey(180))
    zigzag = [
        offset((0, 0), position + 100 + 130 * step, span * (0.62 + 0.12 * (step % 2)), angle) for step in range(14)
    ]
    layer.line(zigzag, 14, grey(185, 8), road=True)
    layer.paste(built=True)


def mega_mine_industry(canvas: Canvas) -> None:
    """An open pit with its terraces and waste heaps, or kilometres of works halls with stockpiles."""
    canvas.subtype = "open_pit" if canvas.chance(0.55) else "works"
    if canvas.subtype == "open_pit":
        _open_pit(canvas)
    else:
        _works(canvas)


def _open_pit(canvas: Canvas) -> None:
    if not countryside.surroundings(canvas):
        canvas.shade(canvas.ground(), canvas.uniform(0.5, 2.5))
    centre = (canvas.uniform(-500, 500), canvas.uniform(-500, 500))
    angle = canvas.angle()
    along, across = canvas.rotated(angle, centre)
    long, short = canvas.uniform(1100, 1900), canvas.uniform(800, 1300)
    wobble = 1 + 0.08 * canvas.fractal(3.2, 2500)
    radius = np.hypot(along / long, across / short) * wobble
    rock, pale = canvas.pick(
        [
            ((112, 98, 84), (176, 160, 140)),
            ((120, 82, 64), (176, 132, 104)),
            ((92, 90, 90), (150, 146, 140)),
            ((130, 118, 96), (196, 184, 158)),
        ]
    )
    layer = canvas.layer()
    for _ in range(canvas.integer(2, 4)):  # waste heaps: lobed fans
        direction = canvas.uniform(0, 2 * math.pi)
        heap = (centre[0] + math.cos(direction) * long * 1.35, centre[1] + math.sin(direction) * long * 1.35)
        size = canvas.uniform(350, 750)
        lobes = canvas.uniform(3, 7)
        points = [
            (
                heap[0] + size * (1 + 0.2 * math.sin(lobes * t)) * math.cos(t),
                heap[1] + size * (1 + 0.2 * math.sin(lobes * t)) * math.sin(t),
            )
            for t in np.linspace(0, 2 * math.pi, 40)
        ]
        layer.polygon(points, tuple(v * canvas.uniform(0.85, 1.1) for v in pale))
        for ring in np.arange(0.3, 1.0, 0.22):
            layer.line(
                [(heap[0] + (x - heap[0]) * ring, heap[1] + (y - heap[1]) * ring) for x, y in points],
                14,
                rock,
            )
    if canvas.chance(0.6):
        pond = offset(centre, canvas.uniform(-1, 1) * long, 1.6 * short, angle)
        layer.rectangle(
            pond,
            canvas.uniform(500, 1100),
            canvas.uniform(350, 700),
            angle,
            canvas.pick([(96, 150, 148), (150, 160, 140), (74, 96, 96), (178, 170, 150)]),
        )
    layer.paste(built=True)
    inside = np.clip((1.04 - radius) * 30, 0, 1)
    terraces = canvas.uniform(8, 14)
    step = np.mod(radius * terraces, 1)
    tone = np.where(step < 0.35, 0.62, 1.0) * (0.55 + 0.45 * radius)
    bank = as_array(rock) * (1 - step)[..., None] + as_array(pale) * step[..., None]
    canvas.blend(inside, bank * tone[..., None])
    light = np.cos(np.arctan2(across, along) + angle - 0.8)
    canvas.rgb *= (1 - 0.18 * light * inside)[..., None]
    if canvas.chance(0.4):
        canvas.flood(np.clip((0.2 - radius) * 20, 0, 1), canvas.pick([(60, 110, 112), (40, 60, 70)]))
    canvas.built = np.maximum(canvas.built, inside)
    layer = canvas.layer()
    turns = np.linspace(0, canvas.uniform(2.2, 3.6) * math.pi, 70)
    spiral = [
        offset(
            centre,
            long * (1.05 - 0.26 * t / math.pi) * math.cos(t),
            short * (1.05 - 0.26 * t / math.pi) * math.sin(t),
            angle,
        )
        for t in turns
    ]
    layer.line(spiral, 30, tuple(min(255, v * 1.15) for v in pale), road=True)
    layer.line([spiral[0], offset(centre, long * 2.5, short * 0.6, angle)], 28, pale, road=True)
    plant = offset(centre, long * 1.4, -short * 0.5, angle)
    for _ in range(12):
        layer.rectangle(
            offset(plant, canvas.uniform(-250, 250), canvas.uniform(-200, 200), angle),
            canvas.uniform(40, 140),
            canvas.uniform(25, 60),
            angle,
            canvas.pick(ROOFS),
        )
    layer.paste(built=True)


def _works(canvas: Canvas) -> None:
    surroundings(canvas)
    angle = canvas.angle()
    layer = canvas.layer()
    layer.rectangle(
        (0, 0),
        canvas.uniform(3600, 4600),
        canvas.uniform(2200, 3200),
        angle,
        grey(canvas.uniform(95, 140), canvas.uniform(2, 14)),
    )
    across = -1150.0
    while across < 1150:
        width = canvas.uniform(70, 190)
        along = -1800.0 + canvas.uniform(0, 300)
        while along < 1700:
            length = canvas.uniform(250, 1200)
            kind = canvas.uniform(0, 1)
            spot = offset((0, 0), along + length / 2, across + width / 2, angle)
            if kind < 0.68:
                layer.rectangle((spot[0] + 14, spot[1] + 14), length, width, angle, grey(44))
                tone = canvas.pick(ROOFS)
                layer.rectangle(spot, length, width, angle, tone)
                for ridge in np.arange(-width / 2 + 20, width / 2, 38):
                    layer.line(
                        [offset(spot, -length / 2, ridge, angle), offset(spot, length / 2, ridge, angle)],
                        8,
                        tuple(v * 0.8 for v in tone),
                    )
            elif kind < 0.85:
                for heap in np.arange(-length / 2 + 60, length / 2, 100):
                    layer.disc(
                        offset(spot, heap, 0, angle),
                        min(55.0, width / 2),
                        canvas.pick([(74, 48, 40), grey(44), (110, 90, 70), (130, 66, 48)]),
                    )
            along += length + canvas.uniform(40, 140)
        across += width + canvas.uniform(50, 110)
    for _ in range(canvas.integer(3, 6)):
        track = canvas.uniform(-1200, 1200)
        layer.line(
            [
                offset((0, 0), -2400, track, angle),
                offset((0, 0), 2400, track + canvas.uniform(-150, 150), angle),
            ],
            12,
            grey(84, 10),
            road=True,
        )
    layer.paste(built=True)
    plume = canvas.layer()
    drift = canvas.uniform(0, 2 * math.pi)
    for _ in range(canvas.integer(0, 4)):
        stack = (canvas.uniform(-1200, 1200), canvas.uniform(-800, 800))
        for puff in range(6):
            plume.disc(offset(stack, puff * 70, 0, drift), 22 + 13 * puff, grey(225))
    plume.paste(soft=True)
