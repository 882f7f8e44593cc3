"""benchmarks/fuzz.py finds what is there to be found, and says so."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "fuzz.py"


def fuzz(*words: object, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(SCRIPT), *map(str, words)]
    env = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300, check=False)


def needs_atheris() -> None:
    pytest.importorskip("atheris", reason="there are wheels for Linux on x86-64 alone")


@pytest.mark.slow
def test_a_sound_parser_has_no_findings(tmp_path: Path) -> None:
    needs_atheris()
    # The harness of "llama-server" goes around a constructor, so that it breaks when the client changes.
    done = fuzz("--only", "records", "llama-server", "--seconds", 1, "--results", tmp_path / "fuzz.json")
    assert done.returncode == 0, done.stdout + done.stderr
    targets = json.loads((tmp_path / "fuzz.json").read_text())["targets"]
    assert [(figures["target"], figures["findings"]) for figures in targets] == [("records", []), ("llama-server", [])]
    assert all(figures["executions"] > 2 for figures in targets)  # more than the seeds
    assert all(figures["coverage"] > 20 for figures in targets)  # the parser is watched from within


def test_a_planted_fault_is_found_and_shown(tmp_path: Path) -> None:
    needs_atheris()
    done = fuzz("--only", "planted", "--seconds", 60, "--results", tmp_path / "fuzz.json")  # it takes 0.1 s
    assert done.returncode == 1, done.stdout + done.stderr
    (figures,) = json.loads((tmp_path / "fuzz.json").read_text())["targets"]
    (finding,) = figures["findings"]
    assert finding["kind"] == "crash"
    assert finding["error"] == "KeyError: 'planted'"
    assert bytes.fromhex(finding["input_hex"]).startswith(b"{!")
    assert f"input: {finding['input_hex']}" in done.stdout


def test_without_atheris_it_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "atheris.py").write_text("raise ImportError('no wheel for this platform')")
    done = fuzz("--only", "records", "--seconds", 1, PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path]))
    assert done.returncode == 2
    assert done.stderr.startswith("fuzzing needs atheris, which is not here (no wheel for this platform).")
    assert "Traceback" not in done.stderr
