"""results.json -> report.md and the terminal's tables; pure."""

from typing import TYPE_CHECKING, Any

from orion_triage import templates
from orion_triage.evaluate.baselines import LOGISTIC_REGRESSION
from orion_triage.evaluate.conditions import CONDITIONS
from orion_triage.evaluate.results import DELTAS, FLIGHT
from orion_triage.evaluate.variants import MODELS
from orion_triage.templates import percent

if TYPE_CHECKING:
    from rich.table import Table

SIGNIFICANT = 0.05


def render_markdown(results: dict[str, Any], figure: str) -> str:
    """The report; `figure` is the name of the picture beside it."""
    return from_template("report.md.j2", results=results, rows=accuracy_rows(results), figure=figure)


def from_template(name: str, **values: Any) -> str:
    """A template beside this module, filled in."""
    filters: dict[str, Any] = {
        "number": number,
        "rate": rate,
        "interval": interval,
        "shown": shown,
        "notes": notes,
        "sentences": sentences,
        "resolved": resolved,
        "error_rate_at": error_rate_at,
    }
    return templates.fill("report", name, filters=filters, **values)


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def rate(value: dict[str, Any]) -> str:
    """A rate with its count and interval."""
    if value["rate"] is None:
        return "-"
    bounds = f"{100 * value['low']:.0f}-{100 * value['high']:.0f}"
    return f"{value['count']}/{value['total']} = {percent(value['rate'])} ({bounds})"


def interval(value: dict[str, float | None]) -> str:
    if value["low"] is None or value["high"] is None:
        return percent(value["value"])
    return f"{percent(value['value'])} ({100 * value['low']:.0f}-{100 * value['high']:.0f})"


def error_rate_at(rates: dict[str, Any], kept: float) -> float:
    """The error rate of the surest answers, at the smallest coverage of at least `kept` (0 to 1)."""
    curve = rates["risk_coverage"]
    return next(
        error for coverage, error in zip(curve["coverage"], curve["error_rate"], strict=True) if coverage >= kept
    )


def notes(results: dict[str, Any]) -> list[str]:
    """What a reader must know before any figure: stages not finished, and answers that are not of this run's pair."""
    said = []
    if results["missing"]:
        said.append(f'Not finished: {", ".join(results["missing"])}. Their figures are left out or "-".')
    if server := results["foreign_server"]:
        said.append(
            f"The quantized answers came from the server at {server['server']} ({server['served_model']}, "
            f"{server['server_build']}), not from this run's GGUF pair."
        )
    if results["foreign_pair"]:
        said.append(f"The quantized answers came from the pair {results['foreign_pair']}, not from this run's.")
    return said


def shown(results: dict[str, Any], conditions: str = "AB") -> list[tuple[str, str, dict[str, Any]]]:
    """(model, condition, rates) of the models that a mission chooses between: the three, and what flies."""
    models = results["models"]
    return [
        (model, condition, models[model][condition])
        for model in (*MODELS, FLIGHT)
        if model in models
        for condition in conditions
    ]


def resolved(change: dict[str, dict[str, Any]]) -> str:
    """The conditions under which a step changed more than chance would."""
    found = [condition for condition, difference in change.items() if difference["holm_p"] < SIGNIFICANT]
    return ", ".join(found) if found else "no"


def sentences(results: dict[str, Any]) -> list[str]:
    """Each difference in words: resolved or not, and how many frames would resolve one of its size."""
    named = dict(results["deltas"])
    for model in (*MODELS, FLIGHT):
        if model in results["within"]:
            named[f"{model},"] = results["within"][model]
    said = against_linear_probe(results["linear_probe"])
    for name, by_condition in named.items():
        same = [condition for condition, change in by_condition.items() if not change["gained"] + change["lost"]]
        if same:
            said.append(f"{name} {'; '.join(same)}: {change_in_words(by_condition[same[0]])}.")
        said += [f"{name} {c}: {change_in_words(change)}." for c, change in by_condition.items() if c not in same]
    return said


def against_linear_probe(change: dict[str, Any] | None) -> list[str]:
    """Whether the language model earns its place beside a regression on what its own tower sees."""
    if change is None:
        return []
    beaten = change["lost"] > change["gained"]
    words = change_in_words(change | {"holm_p": change["exact_p"]})
    verdict = "is better than the fine-tuned model" if beaten else "does not beat the fine-tuned model"
    return [f"{LOGISTIC_REGRESSION} {verdict} without coordinates; the model against it: {words}."]


def change_in_words(change: dict[str, Any]) -> str:
    """What was gained and lost, and whether that is resolved."""
    if not change["gained"] + change["lost"]:
        return "the same frames are right"
    counts = f"{change['points']:+.1f} points ({change['gained']} gained, {change['lost']} lost)"
    if change["holm_p"] < SIGNIFICANT:
        return f"{counts}, resolved (p = {change['holm_p']:.2g})"
    if change["frames_to_resolve"] is None:
        return f"{counts}: as many gained as lost"
    needed = f"about {change['frames_to_resolve']:,} frames would resolve a difference of this size"
    return f"{counts}, not to be told from chance (p = {change['holm_p']:.2g}, mid-p {change['mid_p']:.2g}); {needed}"


def accuracy_rows(results: dict[str, Any]) -> list[list[str]]:
    """Condition, one accuracy a model, one difference a delta; '-' where a model is missing."""
    rows = []
    for condition, meaning in CONDITIONS.items():
        cells = [f"{condition} {meaning}"]
        for model in MODELS:
            rates = results["models"].get(model, {}).get(condition)
            cells.append(percent(rates["accuracy"]) if rates else "-")
        for name in DELTAS:
            delta = results["deltas"].get(name, {}).get(condition)
            cells.append(f"{delta['points']:+.1f}" if delta else "-")
        rows.append(cells)
    return rows


def terminal_tables(results: dict[str, Any]) -> "list[Table]":
    """Accuracy by condition and model, the baselines, and sizes and seconds."""
    from rich.table import Table

    accuracy = Table(title=f"Accuracy on {results['split']} (preset {results['preset']})")
    accuracy.add_column("condition")
    for name in (*MODELS, *(f"by {delta}" for delta in DELTAS)):
        accuracy.add_column(name, justify="right")
    for row in accuracy_rows(results):
        accuracy.add_row(*row)
    accuracy.add_section()
    for key, label in (
        ("trusted_coordinates", "D trusted coordinates"),
        ("same_wrong_answer_in_b", "  same answer in B"),
    ):
        cells = [str(results["models"].get(m, {}).get("D", {}).get(key, "-")) for m in MODELS]
        accuracy.add_row(label, *cells, "", "")
    unparsable = [
        str(sum(rates["unparsable"] for rates in results["models"][m].values())) if m in results["models"] else "-"
        for m in MODELS
    ]
    accuracy.add_row("unparsable answers", *unparsable, "", "")
    simple = Table(title="Without a language model")
    simple.add_column("baseline")
    simple.add_column("accuracy", justify="right")
    for name, baseline in results["baselines"].items():
        simple.add_row(name, percent(baseline["accuracy"]))
    work = Table(title="Stages")
    work.add_column("stage")
    work.add_column("seconds", justify="right")
    for stage, seconds in results["seconds"].items():
        work.add_row(stage, f"{seconds:,.1f}")
    work.add_section()
    for name, size in results["bytes"].items():
        work.add_row(name, f"{size / 1e6:,.1f} MB")
    return [accuracy, simple, work]
