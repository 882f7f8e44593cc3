"""How long a stage takes on this machine: seconds from the manifests of earlier runs, per unit of their work."""

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orion_triage import processes
from orion_triage.errors import OrionError
from orion_triage.runs import manifest
from orion_triage.runs.manifest import Manifest
from orion_triage.runs.run import EVALUATE, SETTINGS_FILE, Run

# Settings that change what comes out, or how much work there is, but not the seconds per unit of work.
_SAME_SECONDS = frozenset(
    {"seed", "epochs", "learning_rate", "learning_rate_schedule", "warmup_fraction", "alpha", "noise"}
    | {"catalogue", "split_seed", "imagery_seed", "split_distance_km", "test_size", "largest_missing_share"}
)
_WITHOUT_COUNTS = ("fuse", "quantize")  # their seconds depend on the base


@dataclass(frozen=True)
class Counts:
    """How much a dataset gives the stages to do."""

    frames: int
    train_records: int
    test_records: int


@dataclass(frozen=True)
class Measured:
    """`seconds` that a stage will take, by an earlier one in the run folder `folder`."""

    seconds: float
    folder: Path


def counts_of(run: Run) -> Counts | None:
    """The counts of the run's finished dataset; None if it has none."""
    with suppress(OrionError, KeyError, TypeError):
        made = manifest.read_manifest(run.dataset)
        if made:
            targets, records = made.figures["targets"], made.figures["records"]
            frames = targets["train"] + targets["val"] + records["test"]
            return Counts(frames, records["train"], records["test"])
    return None


def measured(stage: str, settings: dict[str, Any], machine: str, run: Run, counts: Counts | None) -> Measured | None:
    """The seconds of the `stage` for `counts` (None: as many as in the earlier run), by the newest comparable run.

    Comparable is a manifest in the same runs folder, of the same `machine` with the same variables, whose `settings`
    differ only in what does not change the seconds per unit of work. None if there is no such manifest.
    """
    for folder, made in _newest_first(stage, run):
        if made.machine != machine or made.environment != processes.recorded_environment():
            continue
        if _without(made.settings) != _without(settings) or (stage == "quantize" and not _same_base(folder, run)):
            continue
        earlier = counts_of(Run(folder, run.settings))
        if earlier is None and stage not in _WITHOUT_COUNTS:
            continue
        with suppress(OrionError, AttributeError, KeyError, TypeError, ZeroDivisionError):  # figures are not checked
            seconds, epochs, share = _whole(stage, folder, made, run)
            if not share:  # resumed when only the end was left, or fetched from a cache
                continue
            now = _units(stage, counts or earlier, run.settings.fine_tune.epochs)
            return Measured(seconds / share * now / _units(stage, earlier, epochs), folder)
    return None


def _newest_first(stage: str, run: Run) -> Iterator[tuple[Path, Manifest]]:
    """(Run folder, manifest of the stage) of the runs beside this one and of itself."""
    runs = run.folder.resolve().parent
    found = []
    with suppress(OSError):
        for folder in runs.iterdir():
            product = Run(folder, run.settings, run.split).product(stage)
            if (folder / SETTINGS_FILE).is_file() and (product / manifest.FILE_NAME).is_file():
                found.append(((product / manifest.FILE_NAME).stat().st_mtime, folder, product))
    for _, folder, product in sorted(found, reverse=True):
        with suppress(OrionError):  # a damaged one is the business of its stage
            if made := manifest.read_manifest(product):
                yield runs / folder.name, made


def _without(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings as a manifest stores them, without those that do not change the seconds."""
    settings = json.loads(json.dumps(settings))
    return {
        section: {key: value for key, value in values.items() if key not in _SAME_SECONDS}
        for section, values in settings.items()
        if isinstance(values, dict)
    }


def _same_base(folder: Path, run: Run) -> bool:
    """Whether the merged model in that run is of this run's base: the quantization's own settings do not say."""
    with suppress(OrionError):
        made = manifest.read_manifest(Run(folder, run.settings).merged)
        return made is not None and made.settings.get("base") == run.settings.base.model_dump(mode="json")
    return False


def _whole(stage: str, folder: Path, made: Manifest, run: Run) -> tuple[float, int, float]:
    """(seconds, epochs, share of the work that these seconds did): a resumed stage measured only its last part."""
    if stage == "dataset":
        cached = made.figures.get("account", {}).get("cached", 0)
        return made.seconds, 1, 0.0 if cached else 1.0
    if stage == "fine-tune":
        steps = made.figures["steps"]
        return made.seconds, made.figures["epochs"], (steps - made.figures["resumed_from_step"]) / steps
    if stage.startswith(EVALUATE):
        from orion_triage.evaluate.run import read_predictions

        answers = read_predictions(Run(folder, run.settings, run.split).product(stage), run.settings.mission)
        return max(made.seconds, sum(answer["seconds"] for answer in answers)), 1, 1.0
    return made.seconds, 1, 1.0


def _units(stage: str, counts: Counts | None, epochs: int) -> float:
    """The work of a stage, in a unit that only a ratio of two needs."""
    if counts is None or stage in _WITHOUT_COUNTS:
        return 1.0
    if stage == "fine-tune":
        return float(counts.train_records * epochs)
    return float(counts.test_records if stage.startswith(EVALUATE) else counts.frames)
