"""benchmarks/expected.py: results that left their tolerance are named."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.expected import HERE, differences

FILES = sorted(HERE.glob("*.json"))


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def expected(request: pytest.FixtureRequest) -> dict[str, Any]:
    path: Path = request.param
    value: dict[str, Any] = json.loads(path.read_text())
    return value


def test_a_run_as_expected_has_no_difference(expected: dict[str, Any]) -> None:
    assert differences(expected, copy.deepcopy(expected)) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda found: found["records_sha256"].update(test="0"), "records_sha256: "),
        (lambda found: found["baselines_right"].update({"colour k-NN": 0}), "baselines_right: "),
        (lambda found: found["right"]["base"].update(A=found["right"]["base"]["A"] + 1), "base A: "),
        (lambda found: found["right"]["quantized"].update(B=found["right"]["quantized"]["B"] - 6), "quantized B: "),
        (lambda found: found["right"].pop("flight"), "flight A: None right"),
        (lambda found: found.update(best_validation_loss=9.0), "best validation loss: 9.0"),
    ],
)
def test_what_is_out_of_tolerance_is_named(expected: dict[str, Any], change: Any, said: str) -> None:
    found = copy.deepcopy(expected)
    change(found)
    assert differences(expected, found)[0].startswith(said)


def test_trained_models_may_differ_by_a_few_frames(expected: dict[str, Any]) -> None:
    found = copy.deepcopy(expected)
    found["right"]["quantized"]["B"] -= 5
    found["best_validation_loss"] += 0.09
    assert differences(expected, found) == []
