"""Variation between training seeds: accuracies over runs that differ only in the seed."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from orion_triage.errors import OrionError
from orion_triage.evaluate import variants
from orion_triage.evaluate.conditions import CONDITIONS
from orion_triage.evaluate.metrics import Prediction, places_of, under
from orion_triage.evaluate.run import predictions_in
from orion_triage.runs.manifest import Manifest, read_manifest
from orion_triage.runs.run import SETTINGS_FILE, Run, open_run, outdated

Answers = dict[str, dict[str, list[list[Prediction]]]]  # model -> condition -> those of each run
_SEED = 42


def evaluated(run: Run) -> list[str]:
    """The variants whose evaluation on the run's split is finished and up to date, in the order of the table."""
    finished = _finished(run)
    left_out = outdated(run, finished)
    return [name for name in finished if name not in left_out]


def outdated_evaluations(run: Run) -> dict[str, list[str]]:
    """Variant -> why its finished evaluation is not that of the run as it is now."""
    return outdated(run, _finished(run))


def _finished(run: Run) -> dict[str, Manifest]:
    made = {variant.name: read_manifest(run.evaluation(variant.name)) for variant in variants.table(run.settings)}
    return {name: one for name, one in made.items() if one}


def spread(runs: Sequence[Run]) -> dict[str, dict[str, list[float]]]:
    """Model -> condition -> accuracies in the order of the runs, for models that all runs evaluated."""
    return _accuracies(_answers(runs))


def _accuracies(answers: Answers) -> dict[str, dict[str, list[float]]]:
    return {
        model: {
            c: [sum(p.predicted == p.truth for p in rows) / len(rows) for rows in sides]
            for c, sides in by_condition.items()
        }
        for model, by_condition in answers.items()
    }


def _answers(runs: Sequence[Run]) -> Answers:
    """The answers of these runs, for models that all of them evaluated and conditions that all have."""
    names, *others = (evaluated(run) for run in runs)
    common = [name for name in names if all(name in other for other in others)]
    found: Answers = {}
    for model in common:
        sides = [predictions_in(run.evaluation(model), run.settings.mission) for run in runs]
        by_condition = {c: [under(side, c) for side in sides] for c in CONDITIONS}
        found[model] = {c: rows for c, rows in by_condition.items() if all(rows)}
    return found


def over_training_seeds(run: Run) -> dict[str, Any] | None:
    """`seeds` and `accuracies` of this run and of the runs beside it that differ only in `fine_tune.seed`.

    Such a run is in the same parent folder, has the same settings except for the seed, and was evaluated on the same
    dataset. `intervals`, like `accuracies`: the 95 % interval of the mean accuracy, over seeds and places.
    `val_losses_of_category`: the category's loss on val by seed, of the epoch that was kept; `best_on_val` is the seed
    with the lowest. None if there is no other run.
    """
    runs = runs_of_seeds(run)
    if len(runs) < 2:
        return None
    answers, losses = _answers(runs), [val_loss_of_category(one) for one in runs]
    seeds = [one.settings.fine_tune.seed for one in runs]
    known = [(loss, seed) for loss, seed in zip(losses, seeds, strict=True) if loss is not None]
    # The base and its frozen features do not depend on the training seed.
    trained = {model: by_condition for model, by_condition in answers.items() if model != "base"}
    return {
        "seeds": seeds,
        "accuracies": _accuracies(trained),
        "intervals": {
            model: {c: over_seeds_and_places(sides) for c, sides in by_condition.items()}
            for model, by_condition in trained.items()
        },
        "val_losses_of_category": losses,
        "best_on_val": min(known)[1] if len(known) == len(seeds) else None,
    }


def val_loss_of_category(run: Run) -> float | None:
    """The loss of the category on val of the epoch that was kept; None if the run's manifest does not have it."""
    made = read_manifest(run.adapter)
    figures = made.figures if made else {}
    try:
        return float(figures["eval_losses_of_category"][figures["eval_losses"].index(figures["best_eval_loss"])])
    except (KeyError, ValueError, IndexError):
        return None


def over_seeds_and_places(answered: Sequence[Sequence[Prediction]], resamples: int = 2000) -> list[float]:
    """The 95 % interval of the mean accuracy of a training with any seed: seeds and places are drawn again.

    `answered` are the answers of each run to the same frames.
    """
    hits = np.array([[p.predicted == p.truth for p in rows] for rows in answered], dtype=np.float64)
    names, number = np.unique(places_of(answered[0]), return_inverse=True)
    of_place = np.stack([np.bincount(number, weights=row) for row in hits])  # right answers [runs, places]
    frames, generator = np.bincount(number), np.random.default_rng(_SEED)
    found = []
    for _ in range(resamples):
        drawn = generator.integers(len(names), size=len(names))
        who = generator.integers(len(answered), size=len(answered))
        found.append(of_place[who][:, drawn].sum() / (len(answered) * frames[drawn].sum()))
    low, high = np.percentile(found, [2.5, 97.5])
    return [float(low), float(high)]


def runs_of_seeds(run: Run) -> list[Run]:
    """This run and those beside it that differ only in the training's seed, by seed."""
    dataset = _evaluated_dataset(run)
    by_seed = {run.settings.fine_tune.seed: run}
    for path in sorted(run.folder.resolve().parent.glob(f"*/{SETTINGS_FILE}")) if dataset else []:
        try:
            other = open_run(path.parent, run.split)
        except OrionError:
            continue  # written by another version: its settings cannot be compared
        if _without_seed(other) == _without_seed(run) and _evaluated_dataset(other) == dataset:
            by_seed.setdefault(other.settings.fine_tune.seed, other)
    return [by_seed[seed] for seed in sorted(by_seed)]


def _without_seed(run: Run) -> dict[str, Any]:
    settings = run.settings.model_dump()
    settings["fine_tune"].pop("seed")
    return settings


def _evaluated_dataset(run: Run) -> str | None:
    stage_manifest = read_manifest(run.evaluation("fine-tuned"))
    return stage_manifest.inputs.get("dataset") if stage_manifest else None
