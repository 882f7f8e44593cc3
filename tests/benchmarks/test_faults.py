"""benchmarks/faults.py: the planted faults are there, and a training with them still runs to its end."""

import importlib
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from orion_triage.runs.run import Run
from orion_triage.settings import load_settings

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("faults")


def test_a_training_with_all_three_faults_ends(
    faults: Any, small_base: Path, small_dataset: Path, tmp_path: Path
) -> None:
    settings = load_settings("tiny", [f"base.model={small_base}", "fine_tune.epochs=1"])
    run = Run(tmp_path, settings)
    shutil.copytree(small_dataset, run.dataset)
    everything = next(recipe for recipe in faults.RECIPES if recipe.name == "all")
    figures = faults.train(everything, run, tmp_path / "all")
    # q, k and v in the attention layer and the three of the tower; o_proj, which is called out_proj there, in none
    assert figures["adapted_modules"] == 12
    assert len(figures["eval_losses"]) == 1
    assert math.isfinite(figures["eval_losses"][0])
    assert (tmp_path / "all" / "adapter" / "adapter_model.safetensors").is_file()
