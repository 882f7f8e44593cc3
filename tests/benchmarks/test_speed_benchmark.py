"""benchmarks/speed.py at toy size: both sides do the same work, and the files say what they must. Nothing is timed."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orion_triage.errors import OrionError
from tests import warm

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "speed.py"
WHAT = ("training", "evaluation-gguf", "frame-256")  # "evaluation" is the second with another runtime
MEASURES = {
    "training": {"training_seconds", "records_per_second", "process_seconds", "peak_memory_bytes", "share_of_peak"},
    "evaluation-gguf": {"asking_seconds", "process_seconds", "peak_memory_bytes"},
    "frame-256": {"first_seconds", "seconds", "server_peak_memory_bytes"},
}


@pytest.fixture(scope="module")
def results(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The figures of one invocation at toy size, by what was compared."""
    folder = tmp_path_factory.mktemp("speed")
    command = [warm.python(), str(SCRIPT), "--toy", "--only", "training", "evaluation-gguf", "frame"]
    command += ["--run", "runs/small", "--folder", str(folder / "bench"), "--results", str(folder / "results")]
    command += ["--orion", str(warm.shim(folder))] if warm.is_possible() else []
    done = subprocess.run(command, cwd=finished, capture_output=True, text=True, env={**os.environ}, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return {what: json.loads((folder / "results" / f"speed_{what}_tiny.json").read_text()) for what in WHAT}


@pytest.fixture(scope="module")
def speed() -> Any:
    spec = importlib.util.spec_from_file_location("speed", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["speed"] = module  # its data class looks itself up
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.llama_cpp
@pytest.mark.parametrize("what", WHAT)
def test_a_result_says_what_was_measured_on_what(results: dict[str, Any], what: str) -> None:
    result = results[what]
    assert (result["what"], result["preset"], result["repeats"]) == (what, "tiny", 1)
    assert set(result["machine"]) == {"cores", "processor", "memory_bytes", "gpu", "OMP_NUM_THREADS"}
    assert result["versions"]["torch"]
    assert result["versions"]["llama.cpp"].startswith("b")
    assert result["settings"]["base"] == {"model": "orion-tiny", "frame_size": 256}
    assert MEASURES[what] <= set(result["ratio"])
    for name, ratio in result["ratio"].items():
        medians = {side: result["median"][side][name] for side in ("reference", "ours")}
        for side, median in medians.items():
            assert median == result["runs"][side][0][name] > 0
            assert result["spread"][side][name] == [median, median]
        assert ratio["of_medians"] == medians["ours"] / medians["reference"]
        assert ratio["smallest_of_a_pair"] == ratio["largest_of_a_pair"] == ratio["of_medians"]
    assert result["least_peak_memory_that_can_be_measured_bytes"] > 0  # here pytest's own, which it is started from


@pytest.mark.slow
@pytest.mark.llama_cpp
def test_both_sides_train_on_the_same(results: dict[str, Any]) -> None:
    result = results["training"]
    assert (result["records"], result["validation_records"], result["records_a_step"]) == (6, 3, 8)
    assert result["checks"]["first_loss"]["relative_difference"] < 1e-3
    assert result["checks"]["adapted_modules"] == 40
    reference, ours = (result["runs"][side][0] for side in ("reference", "ours"))
    assert reference["losses"] == pytest.approx(ours["losses"], rel=1e-3)
    assert reference["validation_loss"] == pytest.approx(ours["validation_loss"], rel=0.05)
    assert result["device"]["operations_per_record"] > 2 * 7e6 * 300  # forward alone, in parameters and tokens


@pytest.mark.slow
@pytest.mark.llama_cpp
def test_both_sides_answer_alike(results: dict[str, Any]) -> None:
    checks = results["evaluation-gguf"]["checks"]
    assert checks["questions"] == 8
    assert checks["most_differing_verdicts"] == 0
    earlier = checks["ours_against_the_run's_own_evaluation"]
    assert earlier["questions_in_both"] >= 6  # all but condition D's, whose pairs depend on how many are asked
    assert earlier["scored_in_both"] > 0


@pytest.mark.slow
@pytest.mark.llama_cpp
def test_both_sides_say_as_many_tokens_of_a_frame(results: dict[str, Any]) -> None:
    assert results["frame-256"]["checks"]["tokens"] == 40
    assert results["frame-256"]["checks"]["least_equal_tokens"] > 0


TRAINED: dict[str, Any] = {
    "losses": [4.0],
    "learning_rates": [0.004],
    "validation_loss": 3.0,
    "adapted_modules": 40,
    "trained_parameters": 262144,
    "peak_gpu_memory_bytes": None,
}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"losses": [4.01]}, "loss of the first step is 4.00000"),
        ({"losses": [float("nan")]}, "loss of the first step"),
        ({"adapted_modules": 30}, "adapted modules: 40 by the reference, 30 by ours"),
        ({"trained_parameters": 1}, "trained parameters"),
        ({"learning_rates": [0.002]}, "learning rates"),
    ],
)
def test_another_training_is_not_compared(speed: Any, change: dict[str, Any], word: str) -> None:
    assert speed.compare_trainings(TRAINED, TRAINED)["adapted_modules"] == 40
    with pytest.raises(OrionError, match=word):
        speed.compare_trainings(TRAINED, TRAINED | change)


def test_other_answers_are_not_compared(speed: Any) -> None:
    same = [{"id": f"A/{number}", "category": "HIGH", "answer": "yes"} for number in range(40)]
    other = [{**same[0], "category": None}, *same[1:]]
    reworded = [{**same[0], "answer": "oh yes"}, *same[1:]]
    assert speed.compare_answers(same, reworded, True) == {"differing_verdicts": 0, "differing_answers": 1}
    assert speed.compare_answers(same, other, False)["differing_verdicts"] == 1
    with pytest.raises(OrionError, match="1 of 40 verdicts differ, A/0 first"):
        speed.compare_answers(same, other, True)
    with pytest.raises(OrionError, match="3 of 40 verdicts differ"):
        speed.compare_answers(same, [{**row, "category": "LOW"} for row in same[:3]] + same[3:], False)
    with pytest.raises(OrionError, match="1 questions were asked by one side only, A/0 first"):
        speed.compare_answers(same, same[1:], False)


def test_another_frame_is_not_compared(speed: Any) -> None:
    one = {"prompt_tokens": 200, "tokens": [1, 2, 3]}
    assert speed.compare_frames(one, one | {"tokens": [1, 2, 4]}, True) == 2
    assert speed.compare_frames(one, one | {"prompt_tokens": 201}, False) == 3  # of another size on purpose
    with pytest.raises(OrionError, match="prompt_tokens: 200 by the reference, 201 by ours"):
        speed.compare_frames(one, one | {"prompt_tokens": 201}, True)
    with pytest.raises(OrionError, match="tokens: 3 by the reference, 2 by ours"):
        speed.compare_frames(one, one | {"tokens": [1, 2]}, False)


def test_ratios_are_ours_over_the_reference_pair_by_pair(speed: Any) -> None:
    runs = {
        "reference": [{"seconds": value} for value in (2, 4, 4)],
        "ours": [{"seconds": value} for value in (1, 1, 3)],
    }
    summary = speed.summarize(runs)
    assert summary["median"] == {"reference": {"seconds": 4}, "ours": {"seconds": 1}}
    assert summary["spread"]["ours"]["seconds"] == [1, 3]
    ratio = {"of_medians": 0.25, "smallest_of_a_pair": 0.25, "largest_of_a_pair": 0.75}
    assert summary["ratio"] == {"seconds": ratio}


def test_a_program_that_fails_is_named_with_its_last_words(speed: Any, tmp_path: Path) -> None:
    with pytest.raises(OrionError, match=r"failed \(3\): some words"):
        speed.measure([sys.executable, "-c", "print('some words'); exit(3)"], tmp_path / "log")


def test_the_commands_get_the_runs_own_settings(speed: Any) -> None:
    from orion_triage.settings import load_settings

    sets = [
        "base.model=/a folder",
        "fine_tune.epochs=2",
        "fine_tune.target_modules=q_proj,v_proj",
        "evaluate.threads=2",
    ]
    settings = load_settings("tiny", sets)
    assert load_settings("tiny", speed.departures(settings)) == settings
    assert speed.departures(load_settings("lfm2.5-vl-1.6b")) == []
