"""Geometry of report.html's charts: results -> lines and dots in SVG units, for the template to draw; pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from orion_triage.evaluate.conditions import CONDITIONS
from orion_triage.evaluate.judgement import BUDGETS
from orion_triage.evaluate.results import FLIGHT
from orion_triage.evaluate.statistics import wilson

# As wide as a phone's column, so that text is not shrunk there.
WIDTH, HEIGHT = 340, 250
LEFT, RIGHT, TOP, BOTTOM = 44, 16, 16, 42
# Model -> class in the style sheet (colour, dashes) and marker: a shape each, because colour alone tells nothing.
STYLES = {"base": "base", "fine-tuned": "tuned", "quantized": "quantized", FLIGHT: "flight"}
OTHER = "other"
SHAPES = {
    "base": "M-4-4H4V4H-4Z",
    "tuned": "M0-5L5 4H-5Z",
    "quantized": "M0-5.5L5.5 0L0 5.5L-5.5 0Z",
    "flight": "M-4.5 0A4.5 4.5 0 1 0 4.5 0A4.5 4.5 0 1 0-4.5 0Z",
    OTHER: "M-5-4H5L0 5Z",
}
LEAST_CONFIDENCE = 0.3  # the likeliest of three categories has at least a third
LARGEST_DOT = 13.0  # radius of a dot that stands for all frames


@dataclass(frozen=True)
class Tick:
    """A grid line at `place` on its axis, and its label in one line or several."""

    place: float
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Line:
    """`style` is its class; `points` as SVG's polyline takes them."""

    style: str
    points: str


@dataclass(frozen=True)
class Dot:
    """A marker of shape SHAPES[style], or a disc where it has a `radius`; `low`, `high` end its interval."""

    style: str
    x: float
    y: float
    low: float
    high: float
    radius: float = 0.0
    label: str = ""


@dataclass(frozen=True)
class Key:
    """One line of a legend."""

    style: str
    text: str
    line: bool = False
    dot: bool = False


@dataclass(frozen=True)
class Chart:
    """`name` is unique in the document; `description` says in words what is drawn."""

    name: str
    title: str
    description: str
    across: str
    up: str
    across_ticks: list[Tick]
    up_ticks: list[Tick]
    lines: list[Line] = field(default_factory=list)
    dots: list[Dot] = field(default_factory=list)
    keys: list[Key] = field(default_factory=list)
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def style_of(model: str) -> str:
    return STYLES.get(model, OTHER)


def shape_of(style: str) -> str:
    return SHAPES[style]


def accuracies(results: dict[str, Any], models: Sequence[str]) -> Chart:
    """Accuracy of each model under each condition with its interval, and the baselines as lines."""
    width = (WIDTH - LEFT - RIGHT) / len(CONDITIONS)
    step = min(14.0, 0.8 * width / max(1, len(models)))
    dots, ticks = [], []
    for place, (condition, meaning) in enumerate(CONDITIONS.items()):
        middle = LEFT + (place + 0.5) * width
        ticks.append(Tick(round(middle, 1), (condition, *meaning.split(" ", 1))))
        for number, model in enumerate(models):
            rates = results["models"][model][condition]
            x = round(middle + (number - (len(models) - 1) / 2) * step, 1)
            ends = (_up(rates["accuracy_low"]), _up(rates["accuracy_high"]))
            dots.append(Dot(style_of(model), x, _up(rates["accuracy"]), *ends))
    baselines = [name for name in results["baselines"] if not name.startswith("always ")]
    lines = [
        _curve(f"baseline-{number % 4}", (0, 1), [results["baselines"][name]["accuracy"]] * 2)
        for number, name in enumerate(baselines)
    ]
    return Chart(
        "accuracy",
        "Accuracy by condition",
        f"Accuracy of {_listed(models)} under the conditions A to D with 95 % intervals, and of the baselines as "
        "level lines. The table below has the same figures.",
        "",
        "accuracy, %",
        ticks,
        _percent_ticks(),
        lines,
        dots,
        [Key(style_of(model), model, dot=True) for model in models]
        + [Key(f"baseline-{number % 4}", name, line=True) for number, name in enumerate(baselines)],
    )


def value_against_budget(results: dict[str, Any], models: Sequence[str]) -> Chart:
    """Share of all value on the ground against share of frames sent, without coordinates (B)."""
    lines, keys = [_curve("diagonal", (0, 1), (0, 1))], [Key("diagonal", "random order", line=True)]
    if ranking := results["size_ranking"]:
        lines.append(_curve("size", ranking["budget"], ranking["value"]))
        keys.append(Key("size", "the larger PNG first", line=True))
    for model in models:
        curve = results["models"][model]["B"]["value_curve"]
        lines.append(_curve(style_of(model), curve["budget"], curve["value"]))
        keys.append(Key(style_of(model), model, line=True))
    return Chart(
        "budget",
        "Value on the ground against frames sent",
        f"For {_listed(models)} under B: the share of all value that reaches the ground when only a share of the "
        "frames is sent, beside a random order and the size of the PNG. The table below has the value at "
        f"{_listed([f'{budget:.0%}' for budget in BUDGETS])}.",
        "frames sent, %",
        "value received, %",
        [Tick(_across(budget), (f"{100 * budget:.0f}",)) for budget in (*BUDGETS, 0.5, 0.75, 1)],
        _percent_ticks(),
        lines,
        keys=keys,
    )


def reliability(results: dict[str, Any], model: str) -> Chart:
    """How often the likeliest category is right against how likely it was held, without coordinates (B)."""

    def across(confidence: float) -> float:
        return _across((confidence - LEAST_CONFIDENCE) / (1 - LEAST_CONFIDENCE))

    rates = results["models"][model]["B"]
    bins = [row for row in rates["reliability"] if row["count"]]
    dots = []
    for row in bins:
        low, high = wilson(round(row["accuracy"] * row["count"]), row["count"])
        radius = round(max(2.5, LARGEST_DOT * math.sqrt(row["count"] / rates["count"])), 1)
        place = (across(row["confidence"]), _up(row["accuracy"]))
        dots.append(Dot(style_of(model), *place, _up(low), _up(high), radius, str(row["count"])))
    said = "; ".join(f"{row['count']} at {row['confidence']:.0%}: {row['accuracy']:.0%} right" for row in bins)
    return Chart(
        f"reliability-{style_of(model)}",
        f"Reliability: {model}, B",
        f"Frames by the probability of their likeliest category, and how many of them were right: {said}. On the "
        "diagonal a model is as sure as it is right.",
        "probability of the likeliest category, %",
        "of these right, %",
        [Tick(across(share), (f"{100 * share:.0f}",)) for share in (0.4, 0.6, 0.8, 1)],
        _percent_ticks(),
        [Line("diagonal", f"{LEFT},{_up(LEAST_CONFIDENCE)} {_across(1)},{_up(1)}")],
        dots,
    )


def risk_coverage(results: dict[str, Any], models: Sequence[str]) -> Chart:
    """Error rate of the answers that are kept against their share, the surest first, without coordinates (B)."""
    curves = {model: results["models"][model]["B"]["risk_coverage"] for model in models}
    worst = max(max(curve["error_rate"]) for curve in curves.values())
    top = next(top for top in (0.05, 0.1, 0.2, 0.5, 1.0) if worst <= top)
    return Chart(
        "coverage",
        "Asking the ground: errors among the answers kept",
        f"For {_listed(models)} under B: the error rate among the surest answers, by the share of the frames that "
        "is decided on board; the rest would be asked of the ground.",
        "decided on board, the surest first, %",
        "of these wrong, %",
        [Tick(_across(share), (f"{100 * share:.0f}",)) for share in (0, 0.25, 0.5, 0.75, 1)],
        _percent_ticks(top),
        # Equally sure answers are kept in any order, so left of its first point a curve is level.
        [
            _curve(style_of(model), [0, *curve["coverage"]], [curve["error_rate"][0], *curve["error_rate"]], top)
            for model, curve in curves.items()
        ],
        keys=[Key(style_of(model), model, line=True) for model in models],
    )


def _across(share: float) -> float:
    return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)


def _up(share: float, top: float = 1.0) -> float:
    return round(HEIGHT - BOTTOM - share / top * (HEIGHT - TOP - BOTTOM), 1)


def _curve(style: str, across: Sequence[float], up: Sequence[float], top: float = 1.0) -> Line:
    return Line(style, " ".join(f"{_across(x)},{_up(y, top)}" for x, y in zip(across, up, strict=True)))


def _percent_ticks(top: float = 1.0) -> list[Tick]:
    return [Tick(_up(share * top, top), (f"{100 * share * top:g}",)) for share in (0, 0.2, 0.4, 0.6, 0.8, 1)]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)
