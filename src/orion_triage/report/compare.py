"""Compare the answers of two runs to the same frames and prompts, model by model."""

from typing import Any

from orion_triage.errors import OrionError
from orion_triage.evaluate.metrics import under
from orion_triage.evaluate.results import differences
from orion_triage.evaluate.run import Row, prediction_of, read_predictions
from orion_triage.evaluate.seeds import evaluated
from orion_triage.mission.contract import differences as contract_differences
from orion_triage.runs.run import Run

_ASKED = ("pixels_sha256", "prompt_sha256", "truth")  # must be equal in both runs


def compare_runs(first: Run, second: Run) -> dict[str, dict[str, dict[str, Any]]]:
    """Model -> condition -> correct answers of each run, frames, and paired tests, for models evaluated in both.

    Raises OrionError if there is no such model, or if the frames, prompts or labels differ.
    """
    if differing := contract_differences(first.settings.mission, second.settings.mission):
        raise OrionError(
            f"{first.folder} and {second.folder} are of different missions: {'; '.join(differing)}.",
            "Compare runs of one mission.",
        )
    names, others = evaluated(first), evaluated(second)
    both = [name for name in names if name in others]
    if not both:
        raise OrionError(
            f"no model evaluated in both {first.folder} and {second.folder} on the {first.split} split.",
            "Evaluate both runs first: 'orion run', 'orion evaluate' or 'orion ablation'.",
        )
    compared = {}
    for model in both:
        before, after = (read_predictions(run.evaluation(model), run.settings.mission) for run in (first, second))
        _check_asked_alike(first, second, before, after)
        rows = [[prediction_of(row, first.settings.mission) for row in rows] for rows in (before, after)]
        changes = differences(rows[0], rows[1], f"{model} of {first.folder} and {second.folder}")
        compared[model] = {
            condition: {
                "right": [sum(p.predicted == p.truth for p in under(side, condition)) for side in rows],
                "count": len(under(rows[0], condition)),
                **change,
            }
            for condition, change in changes.items()
        }
    return compared


def _check_asked_alike(first: Run, second: Run, before: list[Row], after: list[Row]) -> None:
    # A condition that only one of them knows is left out.
    known = [{row["condition"] for row in rows} for rows in (before, after)]
    shared = (known[0] & known[1]) or (known[0] | known[1])
    asked = [
        {row["id"]: tuple(row[key] for key in _ASKED) for row in rows if row["condition"] in shared}
        for rows in (before, after)
    ]
    every = sorted(asked[0].keys() | asked[1].keys())
    if other := [name for name in every if asked[0].get(name) != asked[1].get(name)]:
        alone = len(asked[0].keys() ^ asked[1].keys())
        raise OrionError(
            f"{first.folder} and {second.folder} cannot be compared: {len(other)} of {len(every)} questions differ in "
            f"frame, prompt or label ({alone} are of one run only), the first is {other[0]}.",
            "Compare runs on the same dataset, split and frame size.",
        )
