"""Write results.json and the reports of a run; what is current is left as it is."""

import json
from typing import Any

from orion_triage.evaluate.results import current_results, results_path
from orion_triage.runs.run import Run
from orion_triage.safe.files import write_text


def run(run: Run) -> tuple[dict[str, Any], bool]:
    """The results, and whether results.json and the reports were current already, so that nothing was written."""
    results, current = current_results(run)
    suffix = "" if run.split == "test" else f"-{run.split}"
    picture, markdown, page = (run.folder / f"report{suffix}.{kind}" for kind in ("png", "md", "html"))
    stressed = run.folder / f"report{suffix}-stress.png"
    drawn = bool(results["stress"] and results["stress"]["rows"])
    written = (picture, markdown, page, *([stressed] if drawn else []))
    if current and all(path.is_file() for path in written):
        return results, True
    from orion_triage.report import html, plot
    from orion_triage.report.render import render_markdown
    from orion_triage.train.fine_tune import read_losses

    plot.draw(results, read_losses(run.adapter), picture)
    if drawn:
        plot.draw_stress(results, stressed)
    else:
        stressed.unlink(missing_ok=True)
    write_text(markdown, render_markdown(results, picture.name, stressed.name))
    write_text(page, html.of_run(run, results))
    # Last: its presence says that the reports are those of these results.
    write_text(results_path(run), json.dumps(results, indent=2) + "\n")
    return results, False
