"""A small finished run for the reports."""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest

from orion_triage.dataset.dataset import Dataset
from orion_triage.evaluate.results import build_results
from orion_triage.evaluate.run import run as evaluate
from orion_triage.runs.manifest import write_manifest
from orion_triage.runs.run import Run
from orion_triage.settings import Settings, load_settings
from tests.conftest import MISSION, ConstantBackend


@pytest.fixture(scope="session")
def made(small_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of which the dataset, the base's and the fine-tuned model's evaluation are finished; nobody changes it."""
    run = Run(tmp_path_factory.mktemp("report") / "run", load_settings("tiny"))
    shutil.copytree(small_dataset, run.dataset)
    write_manifest(run.dataset, stage="dataset", settings={}, inputs={}, seconds=3)
    dataset = Dataset(run.dataset, MISSION)
    for model, answer in (("base", "no"), ("fine-tuned", '{"reason": "r", "category": "HIGH"}')):
        folder = run.evaluation(model)
        evaluate(dataset, "test", ConstantBackend(answer), folder, Settings().evaluate, 256, fingerprint=model)
        write_manifest(folder, stage=f"evaluate {model}", settings={}, inputs={}, seconds=1)
    return run


@pytest.fixture
def run(made: Run, tmp_path: Path) -> Run:
    """A copy of it, to be changed."""
    return Run(shutil.copytree(made.folder, tmp_path / "run"), made.settings)


@pytest.fixture(scope="session")
def built(made: Run) -> dict[str, Any]:
    return build_results(made)


@pytest.fixture
def results(built: dict[str, Any]) -> dict[str, Any]:
    """What `build_results` gives for `run`: with four bootstraps for each model and condition it takes seconds."""
    return copy.deepcopy(built)
