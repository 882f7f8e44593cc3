"""A small finished run for the reports."""

import shutil
from pathlib import Path

import pytest

from orion_triage.dataset.dataset import Dataset
from orion_triage.evaluate.run import run as evaluate
from orion_triage.runs.manifest import write_manifest
from orion_triage.runs.run import Run
from orion_triage.settings import Settings, load_settings
from tests.conftest import ConstantBackend


@pytest.fixture
def run(small_dataset: Path, tmp_path: Path) -> Run:
    """A run of which the dataset, the base's and the fine-tuned model's evaluation are finished."""
    run = Run(tmp_path / "run", load_settings("tiny"))
    shutil.copytree(small_dataset, run.dataset)
    write_manifest(run.dataset, stage="dataset", settings={}, inputs={}, seconds=3)
    dataset = Dataset(run.dataset)
    for model, answer in (("base", "no"), ("fine-tuned", '{"reason": "r", "category": "HIGH"}')):
        folder = run.evaluation(model)
        evaluate(dataset, "test", ConstantBackend(answer), folder, Settings().evaluate, 256, fingerprint=model)
        write_manifest(folder, stage=f"evaluate {model}", settings={}, inputs={}, seconds=1)
    return run
