"""The harnesses of 'make torture' at a size for every day, and that each can fail: what is planted is found."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from orion_triage.runs.run import Run, open_run
from tests import warm
from tests.conftest import rewrite

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def script(name: str, *words: object, cwd: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(BENCHMARKS / name), *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def small_run() -> ModuleType:
    return load("small_run")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.llama_cpp
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(finished: Path, tmp_path: Path) -> None:
    results = tmp_path / "kills.json"
    killed = ["evaluate quantized", "evaluate constrained", "triage"]  # the last ones: little is done again
    words = ["--run", "runs/small", "--kills", 3, "--only", *killed, "--frames", 9]
    words += ["--orion", warm.shim(tmp_path / "bin")] if warm.is_possible() else []
    done = script("kills.py", *words, "--folder", tmp_path / "work", "--results", results, cwd=finished)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(results.read_text())
    assert figures["losses"] == []
    assert [kill["stage"] for kill in figures["each"]] == killed
    assert figures["kills"] >= 2  # one may come when all is done
    assert figures["rounds_that_ended_as_undisturbed"] == 1


PROPERTIES = """
import hypothesis

@hypothesis.settings(max_examples=7, database=None)
@hypothesis.given(hypothesis.strategies.integers())
def test_one(number):
    pass

@hypothesis.settings(max_examples=11, database=None)
@hypothesis.given(hypothesis.strategies.integers())
def test_another(number):
    pass

def test_that_draws_nothing():
    pass
"""


def test_the_cases_that_hypothesis_draws_are_counted(tmp_path: Path) -> None:
    (tmp_path / "test_drawn.py").write_text(PROPERTIES)
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--hypothesis-show-statistics"]
    said = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert load("torture").generated_cases(said) == [7, 11]


@pytest.mark.slow
@pytest.mark.llama_cpp
def test_what_a_kill_would_have_spoiled_is_found(finished: Path, tmp_path: Path, small_run: ModuleType) -> None:
    run = open_run(finished / "runs" / "small")
    spoiled = Run(tmp_path / "spoiled", run.settings)
    shutil.copytree(run.folder, spoiled.folder)
    assert small_run.differences(run, spoiled) == []
    rows = spoiled.evaluation("quantized") / "predictions.jsonl"
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    lines[0]["seconds"] += 1
    rewrite(rows, lines)
    assert [line for line in small_run.differences(run, spoiled) if "sha256" not in line] == []  # times may differ
    lines[0]["answer"] += "!"
    rewrite(rows, lines)
    (spoiled.gguf / ".half.partial").mkdir()
    (spoiled.merged / "manifest.json").unlink()
    found = "\n".join(small_run.differences(run, spoiled))
    assert "fuse has no manifest" in found
    assert "evaluate quantized: predictions.jsonl differs" in found
    assert ".half.partial was left behind" in found


@pytest.mark.slow
@pytest.mark.llama_cpp
def test_a_long_haul_is_killed_goes_on_and_is_weighed(finished: Path, tmp_path: Path) -> None:
    results = tmp_path / "long_haul.json"
    words = ["--run", "runs/small", "--frames", 20, "--folder", tmp_path / "work", "--results", results]
    done = script("long_haul.py", *words, cwd=finished)
    figures = json.loads(results.read_text())
    lost = [line for line in figures["losses"] if "memory grows" not in line]  # so few frames show a start, no slope
    assert lost == [], done.stdout + done.stderr
    assert 2 <= figures["killed_after_frames"] < 6
    assert figures["asked_again"] == 20
    assert figures["peak_bytes"]["server"] > 50e6
    assert figures["other_bytes_on_disk"] < 100_000


def test_memory_that_grows_is_a_slope(tmp_path: Path) -> None:
    load("small_run")
    long_haul = load("long_haul")
    flat = [{"frames": n, "command_bytes": 100_000_000 + n % 3} for n in range(0, 1000, 10)]
    growing = [{"frames": n, "command_bytes": 100_000_000 + 5000 * n} for n in range(0, 1000, 10)]
    assert abs(long_haul.growth_per_thousand(flat, "command_bytes")) < 1000
    assert long_haul.growth_per_thousand(growing, "command_bytes") == pytest.approx(5_000_000)


def test_the_page_has_a_table_of_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torture = load("torture")
    figures: dict[str, Any] = {
        "kills": {"kills": 5, "by_stage": {"fuse": 5}, "by_signal": {"SIGKILL": 5},
                  "rounds_that_ended_as_undisturbed": 1},
        "disk_faults": {"faults": 7, "operations": 90, "by_stage": {"fuse": 1}, "refused": 6, "harmless": 1,
                        "recoveries": 1},
        "hostile": {"cases": 1234, "tests": 3},
        "fuzz": {"targets": [{"executions": 40}, {"executions": 2}]},
        "servers": {"cases": 9},
        "long_haul": {
            "frames": 100, "killed_after_frames": 20, "seconds_per_frame": 0.08, "other_bytes_on_disk": 2000,
            "peak_bytes": {"command": 1e8, "server": 2e8}, "results_bytes_per_frame": 300,
            "growth_bytes_per_thousand_frames": {"command": -5, "server": 1e6},
        },
    }  # fmt: skip
    for name, value in figures.items():
        (tmp_path / f"{name}.json").write_text(
            json.dumps({**value, "losses": ["x"] * (name == "kills"), "seconds": 120})
        )
    page = tmp_path / "page.md"
    page.write_text(f"before\n{torture.BEGIN}stale\n{torture.END}after\n")
    # Another page than the project's own.
    monkeypatch.setattr(torture, "PAGE", page)
    torture.write_page(torture.table(tmp_path))
    text = page.read_text()
    assert "stale" not in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    kills = "5 in 1 steps (5 SIGKILL) | 1 runs gave the same results as the undisturbed one"
    assert f"| kills at random moments | {kills} | 1 | 2 |" in text
    assert "| 7 of 90 operations in 1 steps | 6 reported in one line, 1 harmless; 1 reruns completed | 0 |" in text
    assert "42 inputs to 2 parsers" in text
    assert "growth per thousand frames 0.0 and 1.0 MB; on disk 300 bytes per frame of results and 2 kB of other" in text
    torture.write_page(torture.table(tmp_path))
    assert page.read_text() == text
