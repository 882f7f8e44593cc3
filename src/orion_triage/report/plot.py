"""Charts of results.json, drawn by Matplotlib: report.png, and inline SVG for report.html."""

import io
import math
import re
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orion_triage.evaluate.conditions import CONDITIONS
from orion_triage.evaluate.judgement import BUDGETS
from orion_triage.evaluate.results import FLIGHT
from orion_triage.evaluate.statistics import wilson
from orion_triage.evaluate.variants import MODELS
from orion_triage.imagery.stress import STRENGTHS
from orion_triage.safe.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT = 340, 300  # of an SVG, in its units: as wide as a phone's column, so that text is not scaled down there
# The colours of the light mode. An SVG has CSS variables of these names instead, which report.html.j2 sets.
COLOURS = {
    "ink": "#18202c",
    "quiet": "#4f5968",
    "grid": "#e2e7ed",
    "base": "#66707f",
    "fine-tuned": "#1558c0",
    "quantized": "#a84605",
    "flight": "#0a6e4d",
    "other": "#7a3e9d",
}
# Markers and line styles differ too, for readers who cannot tell the colours apart.
MARKERS = {"base": "s", "fine-tuned": "^", "quantized": "D", FLIGHT: "o"}
# Curves often coincide. Each is narrower than those drawn before it, so that all of them stay visible.
LINES: dict[str, dict[str, Any]] = {
    "base": {"linestyle": (0, (1, 1.5)), "linewidth": 1.8},
    "fine-tuned": {"linewidth": 6, "alpha": 0.4},
    "quantized": {"linestyle": (0, (3, 1.6)), "linewidth": 3},
    FLIGHT: {"linewidth": 1.4},
}
BASELINE_STYLES = ("-", "--", ":", "-.")
SIGNIFICANT = 0.05  # Holm's p of a change under stress
LEAST_CONFIDENCE = 0.3  # the most probable of three categories has at least a third
LARGEST_RADIUS = 13.0  # points; of a disc that stands for all frames
_STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # Matplotlib has it: text is measured alike on every machine
    "font.size": 11,
    "text.color": COLOURS["ink"],
    "text.parse_math": False,
    "axes.labelcolor": COLOURS["ink"],
    "axes.edgecolor": COLOURS["quiet"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": COLOURS["grid"],
    "xtick.color": COLOURS["quiet"],
    "ytick.color": COLOURS["quiet"],
    "xtick.labelcolor": COLOURS["ink"],
    "ytick.labelcolor": COLOURS["ink"],
    "legend.frameon": False,
    "legend.fontsize": 10,
    "legend.borderaxespad": 0.2,
    "lines.markersize": 4,
    "lines.linewidth": 1.2,
    "errorbar.capsize": 2.5,
    "svg.fonttype": "none",  # <text>, not paths
}


def draw(results: dict[str, Any], losses: list[dict[str, float]], path: Path) -> None:
    """Write report.png; `losses` is the log of the fine-tuning: `loss` per step, `eval_loss` per epoch, or empty."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=(11, 4.6), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        accuracy(left, results)
        loss(right, losses)
        figure.suptitle(f"{results['split']} split, {results['preset']} preset", x=0.01, ha="left")
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=120)
    write_bytes(path, picture.getvalue())


def draw_stress(results: dict[str, Any], path: Path) -> None:
    """Write the chart of the stresses as a PNG."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=(7, stress_height(results) / 72), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        stress(left, right, results)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=120)
    write_bytes(path, picture.getvalue())


def svg(name: str, draw_on: Callable[..., None], *arguments: Any, height: int = HEIGHT, panels: int = 1) -> str:
    """The elements of an inline SVG of WIDTH x `height`, drawn by `draw_on(axes, *arguments)`.

    `panels` axes stand beside each other, with one vertical scale; `draw_on` gets all of them first.
    `name` is unique in the document: ids of markers and clip paths are hashed with it. Equal input gives equal text.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    clear = {"figure.facecolor": "none", "axes.facecolor": "none", "svg.hashsalt": name}
    with rc_context(_STYLE | clear):
        figure = Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")
        draw_on(*figure.subplots(1, panels, sharey=True, squeeze=False)[0], *arguments)
        picture = io.StringIO()
        figure.savefig(picture, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = picture.getvalue()
    # Without the XML header, the <svg> tag and a style sheet that would apply to the whole page.
    text = text[text.index("<g id=") : text.rindex("</svg>")]
    text = re.sub(r'<g id="[^"]*"', "<g", text).replace("<g/>", "")  # figure_1, axes_1, ...: the same in every chart
    variables = {colour: f"var(--{name})" for name, colour in COLOURS.items()}
    return re.sub(r"(?<=: )#[0-9a-f]{6}(?=[;\"])", lambda found: variables[found[0]], text)


def accuracy(axes: "Axes", results: dict[str, Any]) -> None:
    """Accuracy of each model under each condition with its 95 % interval, and the baselines as lines."""
    models = [model for model in (*MODELS, FLIGHT) if model in results["models"]]
    width = 0.8 / max(1, len(models))
    handles: list[Any] = []
    for number, model in enumerate(models):
        asked = [index for index, condition in enumerate(CONDITIONS) if condition in results["models"][model]]
        rates = [results["models"][model][list(CONDITIONS)[index]] for index in asked]
        places = [index + (number - (len(models) - 1) / 2) * width for index in asked]
        heights = [100 * rate["accuracy"] for rate in rates]
        # Matplotlib refuses negative lengths, and rounding can give -1e-17.
        below = [100 * max(0.0, rate["accuracy"] - rate["accuracy_low"]) for rate in rates]
        above = [100 * max(0.0, rate["accuracy_high"] - rate["accuracy"]) for rate in rates]
        colour = COLOURS[model]
        axes.bar(places, heights, 0.92 * width, facecolor=(colour, 0.35), edgecolor=colour, linewidth=1)
        style: dict[str, Any] = {"fmt": MARKERS[model], "color": colour, "ecolor": COLOURS["ink"], "clip_on": False}
        handles.append(axes.errorbar(places, heights, (below, above), label=model, **style))
    named = [name for name in results["baselines"] if not name.startswith("always ")]
    for name, dashes in zip(named, BASELINE_STYLES, strict=False):
        style = {"color": COLOURS["quiet"], "linewidth": 1, "linestyle": dashes, "clip_on": False}
        value = 100 * results["baselines"][name]["accuracy"]
        handles.append(axes.axhline(value, label=textwrap.fill(name, 26), **style))
    labels = [f"{key}\n{meaning.replace(' ', chr(10), 1)}" for key, meaning in CONDITIONS.items()]
    axes.set_xticks(range(len(CONDITIONS)), labels)
    axes.grid(axis="x", visible=False)
    axes.set_ylabel("accuracy, %")
    axes.set_ylim(0, 100)
    _legend(axes, handles)


def value_against_budget(axes: "Axes", results: dict[str, Any], models: Sequence[str]) -> None:
    """Share of all value that is received against the share of frames that are sent, without coordinates (B)."""
    _diagonal(axes, 0, "random order")
    if ideal := results["ideal_ranking"]:
        budget, value = _percent(ideal["budget"]), _percent(ideal["value"])
        axes.plot(budget, value, ":", color=COLOURS["ink"], linewidth=1.2, label="true value (ideal)")
    if ranking := results["size_ranking"]:
        budget, value = _percent(ranking["budget"]), _percent(ranking["value"])
        axes.plot(budget, value, "-.", color=COLOURS["other"], linewidth=1.4, label="larger PNG first")
    for model in models:
        curve = results["models"][model]["B"]["value_curve"]
        _curve(axes, model, curve["budget"], curve["value"])
    axes.set_xticks([100 * budget for budget in (*BUDGETS, 0.5, 0.75, 1)])
    axes.set(xlabel="frames sent, %", ylabel="value received, %", xlim=(0, 100), ylim=(0, 100))
    _legend(axes)


def reliability(axes: "Axes", results: dict[str, Any], model: str) -> None:
    """Accuracy against the probability of the predicted category, in bins, without coordinates (B).

    The area of a disc, and the number beside it, is the number of frames; bars are 95 % intervals.
    """
    rates = results["models"][model]["B"]
    _diagonal(axes, 100 * LEAST_CONFIDENCE)
    for row in rates["reliability"]:
        if not row["count"]:
            continue
        low, high = wilson(round(row["accuracy"] * row["count"]), row["count"])
        radius = max(2.5, LARGEST_RADIUS * math.sqrt(row["count"] / rates["count"]))
        x, y = 100 * row["confidence"], 100 * row["accuracy"]
        error = ([max(0.0, y - 100 * low)], [max(0.0, 100 * high - y)])
        axes.errorbar([x], [y], error, fmt="none", color=COLOURS[model], clip_on=False)
        axes.scatter([x], [y], (2 * radius) ** 2, color=(COLOURS[model], 0.4), linewidth=0, clip_on=False)
        axes.annotate(str(row["count"]), (x, y), (-radius - 3, 0), textcoords="offset points", ha="right", va="center")
    axes.set(xlabel="probability of the predicted category, %", ylabel="accuracy, %")
    axes.set(xlim=(100 * LEAST_CONFIDENCE, 100), ylim=(-4, 104))


def risk_coverage(axes: "Axes", results: dict[str, Any], models: Sequence[str]) -> None:
    """Error rate of the answers that are kept against their share, most confident first, without coordinates (B)."""
    curves = {model: results["models"][model]["B"]["risk_coverage"] for model in models}
    for model, curve in curves.items():
        # Answers of equal confidence are kept in any order, so the curve is level before its first point.
        errors = [curve["error_rate"][0], *curve["error_rate"]]
        _curve(axes, model, [0, *curve["coverage"]], errors)
    worst = max(max(curve["error_rate"]) for curve in curves.values())
    top = next(top for top in (5, 10, 20, 50, 100) if 100 * worst <= top)
    axes.set_yticks([top * share for share in (0, 0.2, 0.4, 0.6, 0.8, 1)])
    axes.set(xlabel="decided on board, %", ylabel="of these wrong, %", xlim=(0, 100), ylim=(0, top))
    _legend(axes)


def stress_height(results: dict[str, Any]) -> int:
    """The height of the chart of the stresses, in the units of an SVG."""
    return 115 + 32 * len(_losses(results))


def _losses(results: dict[str, Any]) -> dict[str, float]:
    """Stress -> its largest irrecoverable loss, the worst first."""
    largest: dict[str, float] = {}
    for row in results["stress"]["rows"]:
        found = row["irrecoverable_loss"]["rate"] or 0.0
        largest[row["stress"]] = max(found, largest.get(row["stress"], 0.0))
    return dict(sorted(largest.items(), key=lambda one: -one[1]))


def stress(left: "Axes", right: "Axes", results: dict[str, Any]) -> None:
    """Irrecoverable loss and recall under each stress at three strengths, with 95 % intervals, the worst stress on top.

    Mild, medium and strong stand below each other. Filled, larger and orange: significantly different from the dashed
    line, the rate without stress (p < 0.05 after Holm).
    """
    names = list(_losses(results))
    for axes, key, label in (
        (left, "irrecoverable_loss", "lost, %"),
        (right, "high_recall", "sent of those\nto be sent, %"),
    ):
        if (plain := results["stress"]["unstressed"][key]["rate"]) is not None:
            axes.axvline(100 * plain, color=COLOURS["quiet"], linewidth=1, linestyle="--", label="without stress")
        seen: set[bool] = set()
        for row in results["stress"]["rows"]:
            rate = row[key]
            if rate["rate"] is None:
                continue
            differs = rate["change"]["holm_p"] < SIGNIFICANT
            colour = COLOURS["quantized" if differs else FLIGHT]
            x, y = 100 * rate["rate"], names.index(row["stress"]) + 0.25 * (STRENGTHS.index(row["strength"]) - 1)
            error = ([max(0.0, x - 100 * rate["low"])], [max(0.0, 100 * rate["high"] - x)])
            style: dict[str, Any] = {"fmt": "o", "color": colour, "capsize": 0, "clip_on": False}
            style |= {"markerfacecolor": colour, "markersize": 5} if differs else {"markerfacecolor": "none"}
            if differs not in seen:
                style["label"] = "significant change" if differs else "no significant change"
            axes.errorbar([x], [y], xerr=error, **style)
            seen.add(differs)
        axes.set(xlabel=label, xlim=(0, 100), xticks=(0, 50, 100))
        axes.grid(axis="y", visible=False)
        for edge in range(1, len(names)):
            axes.axhline(edge - 0.5, color=COLOURS["grid"], linewidth=0.8)
    left.set_yticks(range(len(names)), names)
    left.tick_params(axis="y", length=0)
    left.set_ylim(len(names) - 0.4, -0.6)  # the first name on top
    right.tick_params(axis="y", length=0, labelleft=False)
    found: dict[str, Any] = {}
    for axes in (left, right):
        found = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True)) | found
    title = "of each: mild, medium, strong, from the top"
    style = {"loc": "outside upper left", "title": title, "title_fontsize": 10, "alignment": "left"}
    left.figure.legend(handles=list(found.values()), labels=list(found), **style)


def loss(axes: "Axes", losses: list[dict[str, float]]) -> None:
    """Training and validation loss of the fine-tuning."""
    from matplotlib.ticker import MaxNLocator

    steps = [(entry["step"], entry["loss"]) for entry in losses if "loss" in entry]
    epochs = [(entry["step"], entry["eval_loss"]) for entry in losses if "eval_loss" in entry]
    if steps:
        axes.plot(*zip(*steps, strict=True), color=COLOURS["base"], label="training, per step")
    if epochs:
        axes.plot(*zip(*epochs, strict=True), "o-", color=COLOURS["fine-tuned"], label="validation, per epoch")
    if losses:
        _legend(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0)
    axes.set(xlabel="optimizer step of the fine-tuning", ylabel="loss, nats per verdict token")


def _percent(shares: Sequence[float]) -> list[float]:
    return [100 * share for share in shares]


def _curve(axes: "Axes", model: str, across: Sequence[float], up: Sequence[float]) -> None:
    axes.plot(_percent(across), _percent(up), color=COLOURS[model], label=model, clip_on=False, **LINES[model])


def _diagonal(axes: "Axes", start: float, label: str = "") -> None:
    axes.plot((start, 100), (start, 100), color=COLOURS["quiet"], linewidth=1, linestyle="--", label=label)


def _legend(axes: "Axes", handles: list[Any] | None = None) -> None:
    """Above the axes, in two columns; `handles` gives the order."""
    handles = handles or axes.get_legend_handles_labels()[0]
    axes.legend(handles=handles, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
