"""Variation between training seeds: accuracies over runs that differ only in the seed."""

from collections.abc import Sequence
from typing import Any

from orion_triage.errors import OrionError
from orion_triage.evaluate import variants
from orion_triage.evaluate.conditions import CONDITIONS
from orion_triage.evaluate.metrics import under
from orion_triage.evaluate.run import predictions_in
from orion_triage.runs.manifest import read_manifest
from orion_triage.runs.run import SETTINGS_FILE, Run, open_run


def evaluated(run: Run) -> list[str]:
    """The variants whose evaluation on the run's split has finished, in the order of the table."""
    names = [variant.name for variant in variants.table(run.settings)]
    return [name for name in names if read_manifest(run.evaluation(name)) is not None]


def spread(runs: Sequence[Run]) -> dict[str, dict[str, list[float]]]:
    """Model -> condition -> accuracies in the order of the runs, for models that all runs evaluated."""
    common = [name for name in evaluated(runs[0]) if all(name in evaluated(run) for run in runs[1:])]
    found: dict[str, dict[str, list[float]]] = {}
    for model in common:
        rows = [predictions_in(run.evaluation(model), run.settings.mission) for run in runs]
        found[model] = {
            c: [sum(p.predicted == p.truth for p in asked) / len(asked) for asked in (under(side, c) for side in rows)]
            for c in CONDITIONS
            if all(under(side, c) for side in rows)
        }
    return found


def over_training_seeds(run: Run) -> dict[str, Any] | None:
    """`seeds` and `accuracies` of this run and of the runs beside it that differ only in `fine_tune.seed`.

    Such a run is in the same parent folder, has the same settings except for the seed, and was evaluated on the same
    dataset. None if there is no other run.
    """
    dataset = _evaluated_dataset(run)
    by_seed = {run.settings.fine_tune.seed: run}
    for path in sorted(run.folder.resolve().parent.glob(f"*/{SETTINGS_FILE}")) if dataset else []:
        try:
            other = open_run(path.parent, run.split)
        except OrionError:
            continue  # written by another version: its settings cannot be compared
        if _without_seed(other) == _without_seed(run) and _evaluated_dataset(other) == dataset:
            by_seed.setdefault(other.settings.fine_tune.seed, other)
    if len(by_seed) < 2:
        return None
    seeds = sorted(by_seed)
    accuracies = spread([by_seed[seed] for seed in seeds])
    # The base and its frozen features do not depend on the training seed.
    return {"seeds": seeds, "accuracies": {model: rows for model, rows in accuracies.items() if model != "base"}}


def _without_seed(run: Run) -> dict[str, Any]:
    settings = run.settings.model_dump()
    settings["fine_tune"].pop("seed")
    return settings


def _evaluated_dataset(run: Run) -> str | None:
    stage_manifest = read_manifest(run.evaluation("fine-tuned"))
    return stage_manifest.inputs.get("dataset") if stage_manifest else None
