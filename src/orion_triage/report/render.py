"""results.json -> report.md and the terminal's tables; pure."""

from typing import TYPE_CHECKING, Any

from orion_triage.evaluate.conditions import CONDITIONS
from orion_triage.report.results import DELTAS, MODELS

if TYPE_CHECKING:
    from rich.table import Table


def render_markdown(results: dict[str, Any], figure: str) -> str:
    """The report; `figure` is the name of the picture beside it."""
    return from_template("report.md.j2", results=results, rows=accuracy_rows(results), figure=figure)


def from_template(name: str, **values: Any) -> str:
    """A template beside this module, filled in; a value that it misses is an error."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("orion_triage", "report"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown, and every value comes from the run itself
    )
    environment.filters["percent"] = percent
    environment.filters["megabytes"] = lambda size: f"{size / 1e6:,.1f} MB"
    return environment.get_template(name).render(values)


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


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
