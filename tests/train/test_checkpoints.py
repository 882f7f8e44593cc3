"""Which process deletes, writes and reads the checkpoints, and when: always the first, and never while others read.

The waiting for the other processes is replaced by what they do meanwhile.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from orion_triage import processes
from orion_triage.progress import silent
from orion_triage.runs.manifest import hash_outputs
from orion_triage.train.checkpoints import CHECKPOINTS, HASHES_FILE, prepare_work_folder, settle_checkpoints
from orion_triage.train.trainer import _watch

INPUTS = {"seed": 1}


@pytest.fixture
def be(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], object]], None]:
    """Be this process of two; what the other does is done when this one waits for it."""

    def become(rank: int, meanwhile: Callable[[], object]) -> None:
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setattr(processes, "wait", meanwhile)

    return become


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Checkpoints 2 and 4 are whole, 6 is damaged."""
    prepare_work_folder(tmp_path, INPUTS)
    for step in (2, 4, 6):
        checkpoint = tmp_path / CHECKPOINTS / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "adapter").write_text(f"weights {step}")
        (checkpoint / HASHES_FILE).write_text(json.dumps(hash_outputs(checkpoint)))
    (checkpoint / "adapter").write_text("cut")
    return tmp_path


def names(work: Path) -> list[str]:
    return sorted(path.name for path in (work / CHECKPOINTS).glob("*"))


EVERY = ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


@pytest.mark.parametrize(("inputs", "left"), [(INPUTS, EVERY[:2]), ({"seed": 2}, [])])
def test_the_first_process_deletes_before_it_lets_the_others_go_on(
    work: Path, be: Callable[..., None], inputs: dict[str, int], left: list[str]
) -> None:
    seen: list[list[str]] = []
    be(0, lambda: seen.append(names(work)))
    found = settle_checkpoints(work, inputs)
    assert seen == [left]
    assert (found.name if found else None) == (left[-1] if left else None)


@pytest.mark.parametrize("inputs", [INPUTS, {"seed": 2}])
def test_another_process_deletes_nothing_and_looks_when_the_first_is_ready(
    work: Path, be: Callable[..., None], inputs: dict[str, int]
) -> None:
    seen: list[list[str]] = []

    def meanwhile() -> None:
        seen.append(names(work))
        shutil.rmtree(work / CHECKPOINTS / "checkpoint-4")

    be(1, meanwhile)
    found = settle_checkpoints(work, inputs)
    assert seen == [EVERY]
    assert found is not None
    assert found.name == "checkpoint-2"
    assert names(work) == ["checkpoint-2", "checkpoint-6"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_checkpoint_is_complete_when_every_process_has_written_its_part(
    tmp_path: Path, be: Callable[..., None], rank: int
) -> None:
    checkpoint = tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    (checkpoint / "own").write_text("part")
    complete_before: list[bool] = []

    def meanwhile() -> None:
        complete_before.append((checkpoint / HASHES_FILE).exists())
        (checkpoint / "of_the_other").write_text("part")

    be(rank, meanwhile)
    _watch(silent).on_save(SimpleNamespace(output_dir=str(tmp_path)), SimpleNamespace(global_step=2), None)
    assert complete_before == [False]
    assert (checkpoint / HASHES_FILE).exists() is (rank == 0)
    if rank == 0:
        assert set(json.loads((checkpoint / HASHES_FILE).read_text())) == {"own", "of_the_other"}
