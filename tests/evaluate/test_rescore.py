"""evaluate/rescore.py: stored answers that an earlier parser read otherwise are noticed, and read again by name."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from orion_triage.evaluate.rescore import rescore
from orion_triage.evaluate.run import METRICS_FILE, PREDICTIONS_FILE, read_predictions
from orion_triage.pipeline import controls_evaluation, evaluation, is_current
from orion_triage.report import write
from orion_triage.runs import manifest
from orion_triage.runs.run import Run
from tests.conftest import MISSION, orion
from tests.evaluate.planted import COUNT, finish, make, pair_of


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make(tmp_path_factory.mktemp("rescore") / "run", "picture")


@pytest.fixture
def run(made: Run, tmp_path: Path) -> Run:
    """A copy of it, to be changed."""
    return Run(shutil.copytree(made.folder, tmp_path / "run"), made.settings)


def as_an_older_parser_read(folder: Path, ids: set[str]) -> None:
    """The evaluation as a version wrote it whose parser found no verdict in these answers."""
    path = folder / PREDICTIONS_FILE
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    none = {"category": None, "reason": None}
    path.write_text("".join(json.dumps(row | (none if row["id"] in ids else {})) + "\n" for row in rows))
    made = manifest.read_manifest(folder)
    assert made is not None
    now = replace(made, outputs=manifest.hash_outputs(folder))
    (folder / manifest.FILE_NAME).write_text(json.dumps(asdict(now)))


def test_answers_that_are_read_otherwise_now_are_counted_as_stored_and_named(run: Run) -> None:
    ids = {"B/test_00", "B/test_03", "A/test_01"}
    as_an_older_parser_read(run.evaluation("quantized"), ids)
    results, _ = write.run(run)
    assert results["read_otherwise"] == {"quantized": 3}
    assert results["models"]["quantized"]["B"]["right"] == COUNT - 2
    text = (run.folder / "report.md").read_text()
    assert "otherwise than they are counted here (3 of quantized). 'orion report --rescore'" in text


def test_rescoring_gives_back_what_this_version_would_have_stored(made: Run, run: Run) -> None:
    folder = run.evaluation("quantized")
    as_an_older_parser_read(folder, {"B/test_00", "A/test_01"})
    before = manifest.read_manifest(folder)
    assert before is not None
    assert rescore(run) == {"quantized": {"A/test_01": ["None", "MEDIUM"], "B/test_00": ["None", "HIGH"]}}
    for name in (PREDICTIONS_FILE, METRICS_FILE, "conflict_pairs.json"):
        assert (folder / name).read_bytes() == (made.evaluation("quantized") / name).read_bytes(), name
    after = manifest.read_manifest(folder)
    assert after is not None
    assert (after.figures["rescored"], after.figures["B"]["right"]) == (2, COUNT)
    assert (after.versions, after.machine, after.seconds, after.settings) == (
        before.versions, before.machine, before.seconds, before.settings,
    )  # fmt: skip
    assert manifest.damaged(folder) == []
    assert is_current(evaluation(pair_of(run), MISSION), run)
    assert rescore(run) == {}
    results, _ = write.run(run)
    assert (results["read_otherwise"], results["models"]["quantized"]["B"]["right"]) == ({}, COUNT)


def test_controls_are_read_again_too(made: Run, run: Run) -> None:
    folder = run.evaluation("controls/quantized")
    as_an_older_parser_read(folder, {"noise-03/test_00", "same-category/test_02"})
    assert set(rescore(run)["controls/quantized"]) == {"noise-03/test_00", "same-category/test_02"}
    assert (folder / PREDICTIONS_FILE).read_bytes() == (
        made.evaluation("controls/quantized") / PREDICTIONS_FILE
    ).read_bytes()
    assert (folder / METRICS_FILE).read_bytes() == (made.evaluation("controls/quantized") / METRICS_FILE).read_bytes()
    assert is_current(controls_evaluation(pair_of(run), MISSION), run)


def test_the_gate_at_f16_compares_the_answers_as_they_are_read_now(run: Run) -> None:
    for name in ("fine-tuned", "F16"):
        shutil.copytree(run.evaluation("quantized"), run.evaluation(name))
        (run.evaluation(name) / manifest.FILE_NAME).unlink()
    as_finished(run, "fine-tuned", {})
    as_an_older_parser_read(run.evaluation("fine-tuned"), {"B/test_00"})
    inputs = manifest.hash_inputs({"fine-tuned": run.evaluation("fine-tuned")})
    as_finished(run, "F16", {"parity": {"frames": 1, "agreement": 0.98}}, inputs)
    assert set(rescore(run)) == {"fine-tuned"}
    gate = manifest.read_manifest(run.evaluation("F16"))
    assert gate is not None
    assert gate.figures["parity"] == {"frames": 1, "agreement": 1.0}
    assert gate.inputs == manifest.hash_inputs({"fine-tuned": run.evaluation("fine-tuned")}) != inputs


def as_finished(run: Run, name: str, figures: dict[str, Any], inputs: dict[str, str] | None = None) -> None:
    manifest.write_manifest(
        run.evaluation(name), stage=f"evaluate {name}", settings={}, inputs=inputs or {}, seconds=1, figures=figures
    )


def test_an_interruption_leaves_the_answers_of_before_or_those_of_now(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run.evaluation("quantized")
    as_an_older_parser_read(folder, {"B/test_00"})
    before = (folder / PREDICTIONS_FILE).read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest, "write_again", full)  # the last write fails, as on a full disk
    with pytest.raises(Exception, match="No space left"):
        rescore(run)
    monkeypatch.undo()
    assert (folder / PREDICTIONS_FILE).read_bytes() == before
    assert manifest.damaged(folder) == []
    assert len(read_predictions(folder, MISSION)) == 4 * COUNT
    finish(run, evaluation(pair_of(run), MISSION))


@pytest.mark.slow
@pytest.mark.llama_cpp
def test_the_command_line_says_what_changed(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "copy")
    folder = tmp_path / "copy/runs/small/evaluation/test/quantized"
    rows = [json.loads(line) for line in (folder / PREDICTIONS_FILE).read_text().splitlines()]
    row = next(row for row in rows if row["category"])
    as_an_older_parser_read(folder, {row["id"]})
    plain = orion("report", "--run", "runs/small", "--json", cwd=tmp_path / "copy")
    assert json.loads(plain.stdout)["read_otherwise"] == {"quantized": 1}
    done = orion("report", "--run", "runs/small", "--rescore", "--json", cwd=tmp_path / "copy")
    said = f"quantized: 1 answers read otherwise, for example {row['id']}: None, now {row['category']}"
    assert said in done.stderr
    assert json.loads(done.stdout)["read_otherwise"] == {}
    again = orion("report", "--run", "runs/small", "--rescore", cwd=tmp_path / "copy")
    assert "rescored: this version reads every stored answer as before" in again.stderr
    assert "(unchanged)" in again.stdout
