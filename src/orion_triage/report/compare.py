"""Answers to the same frames and prompts: two runs, model by model, or one model decoded in several ways."""

from typing import Any

from orion_triage.errors import OrionError
from orion_triage.evaluate.conditions import CONDITIONS
from orion_triage.evaluate.metrics import under
from orion_triage.evaluate.results import differences
from orion_triage.evaluate.run import Row, prediction_of, read_predictions
from orion_triage.evaluate.seeds import evaluated
from orion_triage.pipeline import DECODINGS, VERDICT_ONLY
from orion_triage.runs.run import Run

_ASKED = ("pixels_sha256", "prompt_sha256", "truth")  # what must be the same for an answer to be compared


def compare_runs(first: Run, second: Run) -> dict[str, dict[str, dict[str, Any]]]:
    """Model -> condition -> right answers of each, frames, and the paired tests; of models evaluated in both.

    Raises OrionError when no model was, or when the two were not asked the same.
    """
    both = [name for name in evaluated(first) if name in evaluated(second)]
    if not both:
        raise OrionError(
            f"{first.folder} and {second.folder} have no model evaluated in both on {first.split}.",
            "Evaluate both first: 'orion run', 'orion evaluate' or 'orion ablation'.",
        )
    compared = {}
    for model in both:
        before, after = (read_predictions(run.evaluation(model)) for run in (first, second))
        _check_asked_alike(first, second, before, after)
        rows = [[prediction_of(row) for row in rows] for rows in (before, after)]
        changes = differences(*rows)
        compared[model] = {
            condition: {
                "right": [sum(p.predicted == p.truth for p in under(side, condition)) for side in rows],
                "count": len(under(rows[0], condition)),
                **change,
            }
            for condition, change in changes.items()
        }
    return compared


def compare_decodings(run: Run) -> dict[str, dict[str, dict[str, Any]]]:
    """Decoding -> condition -> frames, answers that parse, right ones, and the paired difference from the first."""
    rows = {
        stage.name.removeprefix("evaluate "): [prediction_of(row) for row in read_predictions(stage.folder(run))]
        for stage in DECODINGS
    }
    names = {"quantized": "greedy", "constrained": "greedy, grammar"}
    names |= {"sampled": "sampled", "sampled-constrained": "sampled, grammar", VERDICT_ONLY: VERDICT_ONLY}
    compared: dict[str, dict[str, dict[str, Any]]] = {}
    for model, name in names.items():
        changes = differences(rows["quantized"], rows[model]) if model != "quantized" else {}
        compared[name] = {
            condition: {
                "count": len(asked := under(rows[model], condition)),
                "parsed": sum(p.predicted is not None for p in asked),
                "right": sum(p.predicted == p.truth for p in asked),
                "change": changes.get(condition),
            }
            for condition in CONDITIONS
        }
    return compared


def _check_asked_alike(first: Run, second: Run, before: list[Row], after: list[Row]) -> None:
    asked = [{row["id"]: tuple(row[key] for key in _ASKED) for row in rows} for rows in (before, after)]
    other = sorted(set(asked[0]) ^ set(asked[1])) or [name for name in asked[0] if asked[0][name] != asked[1][name]]
    if other:
        raise OrionError(
            f"{first.folder} and {second.folder} were not asked the same: {len(other)} of "
            f"{max(map(len, asked))} questions differ in frame, prompt or truth, {other[0]} first.",
            "Only runs on the same dataset, split and frame size can be paired.",
        )
