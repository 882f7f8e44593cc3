"""Strategic chokepoints: launch sites, hardened air bases, ship canals. HIGH, like the megastructures."""

import math

import numpy as np

from orion_triage.dataset.sources.synthetic.canvas import (
    BIOMES,
    Canvas,
    arc,
    grey,
    offset,
)
from orion_triage.dataset.sources.synthetic.landscapes import paint_coast, shoreline
from orion_triage.dataset.sources.synthetic.megastructures import ship, surroundings
from orion_triage.dataset.sources.synthetic.settlements import (
    ROOFS,
)


def space_military_chokepoint(canvas: Canvas) -> None:
    """Launch pads, a hardened air base, or a ship canal."""
    kind = canvas.subtype = canvas.pick(["launch", "base", "canal"])
    if kind == "launch":
        _launch_site(canvas)
    elif kind == "base":
        _air_base(canvas)
    else:
        _canal(canvas)


def _launch_site(canvas: Canvas) -> None:
    canvas.shade(canvas.ground(), 0.8)
    angle = canvas.uniform(0, 2 * math.pi)
    if canvas.chance(0.6):
        paint_coast(canvas, shoreline(canvas, 0.12, canvas.uniform(0.15, 0.32), angle))
    concrete = grey(canvas.uniform(170, 205), 6)
    spine = [offset((0, 0), 150 + 120 * math.sin(s / 900), s, angle) for s in np.linspace(-3500, 3500, 30)]
    layer = canvas.layer()
    layer.line(spine, 34, concrete, road=True)
    pads = canvas.integer(4, 6)
    for number in range(pads):
        at = (number - (pads - 1) / 2) * 4200 / pads
        root = offset((0, 0), 150 + 120 * math.sin(at / 900), at, angle)
        pad = offset((0, 0), canvas.uniform(560, 900), at + canvas.uniform(-120, 120), angle)
        layer.line([root, pad], 44, concrete, road=True)
        radius = canvas.uniform(130, 215)
        layer.ring(pad, radius * 1.5, 16, concrete)
        octagon = arc(pad, radius, 0.39, 0.39 + 2 * math.pi, 9)
        layer.polygon(octagon, concrete)
        layer.line([pad, offset(pad, radius * 1.5, 0, angle + 0.5)], 34, grey(70))
        layer.rectangle(pad, 60, 60, angle, canvas.pick([grey(90), (150, 80, 60)]))
        layer.line([pad, (pad[0] + 160, pad[1] + 160)], 14, grey(40))
        for _ in range(3):
            tank = offset(pad, canvas.uniform(-1.4, 1.4) * radius, canvas.uniform(-1.4, 1.4) * radius, angle)
            layer.disc(tank, 20, grey(238))
    hall = offset((0, 0), -650, canvas.uniform(-900, 900), angle)
    layer.rectangle(hall, 900, 700, angle, concrete)
    layer.rectangle((hall[0] + 70, hall[1] + 70), 210, 170, angle, grey(38))
    layer.rectangle(hall, 210, 170, angle, grey(228))
    for _ in range(8):
        shed = offset(hall, canvas.uniform(-420, 420), canvas.uniform(-330, 330), angle)
        layer.rectangle(shed, canvas.uniform(50, 130), canvas.uniform(30, 60), angle, canvas.pick(ROOFS))
    layer.line([hall, offset((0, 0), 150, 0, angle)], 44, concrete, road=True)
    layer.paste(built=True)


def _air_base(canvas: Canvas) -> None:
    surroundings(canvas)
    angle = canvas.angle()
    concrete = grey(canvas.uniform(140, 190), 4)
    length = canvas.uniform(2900, 3900)
    layer = canvas.layer()
    layer.rectangle((0, 0), length + 500, 2300, angle, canvas.pick([BIOMES[canvas.biome][1], BIOMES[canvas.biome][2]]))
    layer.paste()
    layer = canvas.layer()
    layer.rectangle((0, 0), length, 64, angle, canvas.pick([grey(84), concrete]))
    taxi = offset((0, 0), 0, 240, angle)
    layer.line([offset(taxi, -length / 2, 0, angle), offset(taxi, length / 2, 0, angle)], 30, concrete, road=True)
    for end in (-0.5, -0.2, 0.2, 0.5):
        layer.line([offset((0, 0), length * end, 0, angle), offset(taxi, length * end, 0, angle)], 30, concrete)
    for cluster in (-0.4, 0.4):  # dispersal loops with hardened shelters
        for side in (1, -1):
            loop = offset((0, 0), length * cluster, side * 640, angle)
            ellipse = [
                offset(loop, 430 * math.cos(t), 290 * math.sin(t), angle) for t in np.linspace(0, 2 * math.pi, 41)
            ]
            layer.line(ellipse, 26, concrete, road=True)
            layer.line([loop, offset((0, 0), length * cluster, 0, angle)], 26, concrete)
            for t in np.linspace(0, 2 * math.pi, canvas.integer(9, 13))[:-1]:
                shelter = offset(loop, 520 * math.cos(t), 370 * math.sin(t), angle)
                layer.line([shelter, offset(loop, 430 * math.cos(t), 290 * math.sin(t), angle)], 22, concrete)
                layer.rectangle((shelter[0] + 10, shelter[1] + 10), 52, 40, angle + t, grey(46))
                layer.rectangle(shelter, 52, 40, angle + t, grey(canvas.uniform(110, 200), 6))
    igloo = offset((0, 0), canvas.uniform(-400, 400), -900, angle)
    for row in range(canvas.integer(3, 5)):  # ammunition igloos, evenly spaced against sympathetic blasts
        for column in range(canvas.integer(6, 9)):
            spot = offset(igloo, (column - 4) * 120, (row - 2) * 120, angle)
            layer.disc(spot, 34, tuple(v * 0.75 for v in BIOMES[canvas.biome][2]))
            layer.rectangle(spot, 30, 18, angle, concrete)
        layer.line(
            [
                offset(igloo, -560, (row - 2) * 120 + 55, angle),
                offset(igloo, 560, (row - 2) * 120 + 55, angle),
            ],
            12,
            concrete,
            road=True,
        )
    for _ in range(canvas.integer(10, 20)):
        layer.rectangle(
            offset(taxi, canvas.uniform(-500, 500), canvas.uniform(110, 420), angle),
            canvas.uniform(60, 120),
            canvas.uniform(35, 60),
            angle,
            canvas.pick(ROOFS),
        )
    layer.paste(built=True)


def _canal(canvas: Canvas) -> None:
    surroundings(canvas)
    angle = canvas.angle()
    water = canvas.water_colour()
    width = canvas.uniform(220, 380)
    reach = canvas.extent
    bend = canvas.uniform(-250, 250)
    course = [offset((0, 0), s, bend * math.sin(s / 2600), angle) for s in np.linspace(-reach, reach, 40)]
    layer = canvas.layer()
    layer.line(course, width + 170, canvas.pick([grey(165, 14), BIOMES[canvas.biome][1]]))
    layer.paste()
    layer = canvas.layer()
    layer.line(course, width, water)
    if canvas.chance(0.5):
        basin = offset((0, 0), canvas.pick([-1, 1]) * 1900, 0, angle)
        layer.polygon(
            [offset(basin, 900 * math.cos(t), 620 * math.sin(t), angle) for t in np.linspace(0, 6.283, 30)],
            water,
        )
    layer.paste(water=True)
    layer = canvas.layer()
    for side in (-1, 1):
        bank = [
            offset((0, 0), s, bend * math.sin(s / 2600) + side * (width / 2 + 130), angle)
            for s in np.linspace(-reach, reach, 40)
        ]
        layer.line(bank, 18, grey(190, 8), road=True)
    if canvas.chance(0.6):  # locks: parallel chambers in concrete
        layer.rectangle((0, 0), 1250, width + 240, angle, grey(196, 5))
        for lane in (-1, 1):
            for chamber in (-1, 0, 1):
                spot = offset((0, 0), chamber * 400, lane * (width / 4 + 20), angle)
                layer.rectangle(spot, 350, width * 0.36, angle, water)
        for _ in range(10):
            layer.rectangle(
                offset((0, 0), canvas.uniform(-700, 700), canvas.pick([-1, 1]) * (width / 2 + 210), angle),
                80,
                40,
                angle,
                canvas.pick(ROOFS),
            )
    at = -2400.0 + canvas.uniform(0, 300)
    while at < 2400:
        spot = offset((0, 0), at, bend * math.sin(at / 2600) + canvas.uniform(-0.1, 0.1) * width, angle)
        ship(canvas, layer, spot, canvas.uniform(230, 380), angle)
        at += canvas.uniform(520, 900)
    layer.paste()
