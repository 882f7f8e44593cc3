"""Several processes: the same training and the same answers as one, through accelerate's launcher."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "docs" / "accelerate" / "cpu.yaml"
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIG), "--main_process_port", "0"]


def orion(cwd: Path, *words: object, launcher: list[str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [*(launcher or [sys.executable]), "-m", "orion_triage.cli", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def words(base: Path, dataset: Path, name: str, accumulation: int) -> list[object]:
    sets = [
        f"base.model={base}",
        f"dataset.folder={json.dumps(str(dataset))}",
        "fine_tune.dropout=0.0",
        "fine_tune.micro_batch_size=4",
        f"fine_tune.gradient_accumulation_steps={accumulation}",
        "fine_tune.epochs=2",
        "fine_tune.learning_rate=1e-3",
    ]
    return ["--run", name, *(word for value in sets for word in ("--set", value))]


@pytest.mark.slow
def test_two_processes_train_and_answer_as_one_does(small_base: Path, small_dataset: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    for name, accumulation, launcher in (("one", 2, None), ("two", 1, LAUNCH)):
        options = words(small_base, small_dataset, name, accumulation)
        assert orion(tmp_path, "dataset", *options).returncode == 0
        result = orion(tmp_path, "fine-tune", *options, launcher=launcher)
        assert result.returncode == 0, result.stderr
        assert result.stderr.count("fine-tune: done") == 1
    logs = [json.loads((tmp_path / name / "orion_lora_weights/loss_log.json").read_text()) for name in ("one", "two")]
    for kind in ("loss", "eval_loss"):
        one, two = ([entry[kind] for entry in log if kind in entry] for log in logs)
        assert len(one) == {"loss": 6, "eval_loss": 2}[kind]
        assert two == pytest.approx(one, rel=1e-3)
    adapters = [load_file(tmp_path / name / "orion_lora_weights/adapter_model.safetensors") for name in ("one", "two")]
    assert adapters[0].keys() == adapters[1].keys()
    receipt = json.loads((tmp_path / "two/orion_lora_weights/manifest.json").read_text())
    assert receipt["figures"]["processes"] == 2

    for name, launcher in (("one", None), ("two", LAUNCH)):
        options = words(small_base, small_dataset, name, 2 if name == "one" else 1)
        result = orion(tmp_path, "ablation", *options, launcher=launcher)
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("right") == 4
    rows = [
        [
            json.loads(line)
            for line in (tmp_path / name / "evaluation/test/base/predictions.jsonl").read_text().splitlines()
        ]
        for name in ("one", "two")
    ]
    assert [row["id"] for row in rows[0]] == [row["id"] for row in rows[1]]
    assert [row["answer"] for row in rows[0]] == [row["answer"] for row in rows[1]]
    assert not list((tmp_path / "two" / "evaluation").rglob("*.work-*"))

    refused = orion(tmp_path, "fuse", *options, launcher=LAUNCH)
    assert refused.returncode != 0
    assert "fuse is for one process, and 2 were launched" in refused.stderr
