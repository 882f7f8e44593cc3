"""A whole run that is small enough to be broken again and again: the shipped base, 36 drawn places, every stage.

What kills.py and disk_faults.py have in common: that run, and what must be equal of two of them.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from orion_triage.dataset.catalogue import load_catalogue
from orion_triage.dataset.collect import csv_text
from orion_triage.pipeline import stages, verify
from orion_triage.runs.manifest import read_manifest
from orion_triage.runs.run import Run
from orion_triage.safe.files import PARTIAL, write_text
from orion_triage.settings import Settings, load_settings

MORPHOLOGIES = ("ocean_water", "urban_grid", "mega_airport")  # one of each category
PLACES_OF_EACH = 12
EPOCHS = 3  # and a checkpoint after each
LARGEST_LOSS_DIFFERENCE = 1e-4  # of the loss, where a training is not the same to the bit
TIMES = {"seconds"}  # what may differ between two answers to one question
ORION = [sys.executable, "-m", "orion_triage.cli"]


def assignments(settings: Settings) -> list[str]:
    """What of the tiny preset is not as shipped, in a run of this size."""
    return [
        f"dataset.catalogue={settings.dataset.catalogue}",
        f"dataset.split_distance_km={settings.dataset.split_distance_km}",
        f"fine_tune.epochs={settings.fine_tune.epochs}",
        f"fine_tune.micro_batch_size={settings.fine_tune.micro_batch_size}",
        f"fuse.check_records={settings.fuse.check_records}",
    ]


def prepare_places(folder: Path) -> Settings:
    """Write the run's catalogue into `folder`; returns the run's settings."""
    rows = []
    for morphology in MORPHOLOGIES:
        for target in [one for one in load_catalogue() if one.morphology == morphology][:PLACES_OF_EACH]:
            assert target.coordinates is not None
            rows.append(
                {
                    "name": target.name,
                    "category": target.category,
                    "morphology": target.morphology,
                    "lon": target.coordinates.lon,
                    "lat": target.coordinates.lat,
                    "reason": target.reason,
                }
            )
    path = folder / "places.csv"
    write_text(path, csv_text(tuple(rows[0]), rows))
    # The distance is so small that so few places fill three splits.
    return load_settings(
        "tiny", [f"dataset.catalogue={path}", "dataset.split_distance_km=20", f"fine_tune.epochs={EPOCHS}"]
    )


def command(name: str, run: Run, *more: str, orion: Sequence[str] = ORION) -> list[str]:
    """`orion NAME` on the run."""
    words = [word for value in assignments(run.settings) for word in ("--set", value)]
    return [*orion, *name.split(), "--run", str(run.folder), *words, *more]


def differences(undisturbed: Run, disturbed: Run) -> list[str]:
    """What a disturbed run made otherwise, damaged or left lying about; empty when nothing was lost."""
    found = [line for lines in verify(disturbed).values() for line in lines]
    for stage in stages(undisturbed.settings):
        before, after = (read_manifest(stage.folder(run)) for run in (undisturbed, disturbed))
        assert before is not None
        if after is None:
            found.append(f"{stage.name} has no manifest")
            continue
        for name in sorted(before.outputs.keys() | after.outputs.keys()):
            paths = [stage.folder(run) / name for run in (undisturbed, disturbed)]
            if before.outputs.get(name) != after.outputs.get(name) and not same_but_for_time(*paths):
                found.append(f"{stage.name}: {name} differs")
    return found + [f"{path} was left behind" for path in leftovers(disturbed.folder)]


def leftovers(folder: Path) -> Iterator[Path]:
    """Temporary files and folders, and the work files of evaluations that have finished."""
    return (path for path in folder.rglob(".*") if path.name != ".lock")


def left_in(temporary: Path) -> list[Path]:
    """What lies where temporary files belong; torch's compiler keeps a cache there on purpose."""
    return [path for path in temporary.iterdir() if not path.name.startswith("torchinductor_")]


def half_written(folder: Path) -> list[Path]:
    return sorted(folder.rglob(f".*{PARTIAL}"))


def same_but_for_time(before: Path, after: Path) -> bool:
    """Whether two files of answers or losses say the same, seconds left out; False for any other file."""
    if not before.is_file() or not after.is_file():
        return False
    if before.suffix == ".jsonl":
        return answers(before) == answers(after)
    if before.name == "loss_log.json":
        logs = [json.loads(path.read_text(encoding="utf-8")) for path in (before, after)]
        if len(logs[0]) != len(logs[1]):
            return False
        pairs = [
            (one[key], other.get(key, float("nan")))
            for one, other in zip(*logs, strict=True)
            for key in ("loss", "eval_loss", "eval_loss_category")
            if key in one
        ]
        return all(abs(one - other) <= LARGEST_LOSS_DIFFERENCE * abs(one) for one, other in pairs)
    return False


def answers(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]
