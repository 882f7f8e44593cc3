"""rates.py and pipeline.forecast: what `orion run` says before it starts, by what this machine has measured."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from orion_triage.cli.stages import announcement
from orion_triage.machine import plan
from orion_triage.machine.describe import machine_name
from orion_triage.machine.rates import Counts, counts_of
from orion_triage.pipeline import DATASET, Forecast, forecast, run_stage, stages
from orion_triage.runs.manifest import hash_inputs, read_manifest, write_manifest
from orion_triage.runs.run import SETTINGS_FILE, Run
from orion_triage.settings import Settings, load_settings

SECONDS = {"dataset": 36.0, "fine-tune": 300.0, "fuse": 5.0, "quantize": 4.0, "vision features": 10.0}
FIGURES: dict[str, dict[str, Any]] = {
    "dataset": {"targets": {"train": 240, "val": 60, "test": 60}, "records": {"train": 480, "val": 60, "test": 60}},
    "fine-tune": {"steps": 300, "resumed_from_step": 0, "epochs": 5},
}


def settings_of(*assignments: str) -> Settings:
    return load_settings("tiny", assignments)


def earlier_run(folder: Path, settings: Settings, **changes: Any) -> Run:
    """A run as it looks when all its stages have finished, to what forecasts read: manifests, settings, answers."""
    run = Run(folder, settings)
    for stage in stages(settings):
        product = stage.folder(run)
        product.mkdir(parents=True)
        if stage.name.startswith("evaluate"):
            answers = [answer_row(number) for number in range(240)]
            (product / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
        written: dict[str, Any] = {
            "stage": stage.name,
            "settings": stage.settings_of(settings),
            "inputs": {},
            "seconds": SECONDS.get(stage.name, 20.0),
            "figures": FIGURES.get(stage.name, {}),
            "machine": machine_name(),
        }
        write_manifest(product, **written | changes.get(stage.name.replace(" ", "_").replace("-", "_"), {}))
    (folder / SETTINGS_FILE).write_text(settings.model_dump_json())
    return run


def answer_row(number: int) -> dict[str, Any]:
    condition, name = "ABCD"[number % 4], f"place-{number // 4}"
    row = {"id": str(number), "condition": condition, "name": name, "truth": "LOW", "category": "LOW", "scores": None}
    return row | {"donor": None, "seconds": 0.05}


def seconds_of(run: Run) -> dict[str, float | None]:
    return {stage.stage: stage.measured.seconds if stage.measured else None for stage in forecast(run)}


def test_a_fresh_machine_knows_nothing_and_says_so(tmp_path: Path) -> None:
    run = Run(tmp_path / "runs" / "tiny", settings_of())
    planned = forecast(run)
    assert [stage.stage for stage in planned] == [stage.name for stage in stages(run.settings)]
    assert all(not stage.skipped and stage.measured is None for stage in planned)
    said = "\n".join(announcement(run, planned))
    assert "to skip, because they are current (0 of 13): none" in said
    assert "to do (13): dataset (not known), evaluate base (not known)" in said
    assert f"how long: not known yet, no run like this one in {tmp_path / 'runs'} was measured here" in said
    assert (
        f"for orientation, not measured here: all stages of the preset tiny took 9 to 10 min on {plan.AVX512}" in said
    )
    assert not (tmp_path / "runs").exists()
    large = replace(run, settings=load_settings("lfm2.5-vl-1.6b"))
    said = "\n".join(announcement(large, [Forecast("fuse", False)]))
    assert "orion plan --preset lfm2.5-vl-1.6b" in said
    assert "preset tiny" not in said


def test_a_run_takes_as_long_as_the_last_one_on_this_machine(tmp_path: Path) -> None:
    earlier_run(tmp_path / "seed-42", settings_of())
    run = Run(tmp_path / "seed-43", settings_of("fine_tune.seed=43"))
    expected = {stage.name: SECONDS.get(stage.name, 20.0) for stage in stages(run.settings)}
    assert seconds_of(run) == pytest.approx(expected)
    said = list(announcement(run, forecast(run)))
    assert said[1].startswith("to do (13): dataset (36 s), evaluate base (20 s), fine-tune (5 min), fuse (5 s)")
    assert not any("orientation" in line for line in said)
    assert said[2] == "about 9 min, by the seconds that run seed-42 took on this machine"  # 355 and 8 times 20


def test_the_seconds_grow_with_the_work(tmp_path: Path) -> None:
    earlier_run(tmp_path / "seed-42", settings_of())
    assert seconds_of(Run(tmp_path / "long", settings_of("fine_tune.epochs=10")))["fine-tune"] == pytest.approx(600)


def test_the_counts_of_a_finished_dataset_are_used(tmp_path: Path, small_dataset: Path) -> None:
    settings = settings_of(f"dataset.folder={small_dataset}")
    run = Run(tmp_path / "mine", settings)
    made, _ = run_stage(DATASET, run)
    assert made.machine == machine_name()
    assert counts_of(run) == Counts(frames=24, train_records=24, test_records=6)
    earlier_run(tmp_path / "seed-42", settings)
    now = seconds_of(run)
    assert forecast(run)[0] == Forecast("dataset", skipped=True)
    assert now["fine-tune"] == pytest.approx(300 * 24 / 480)
    assert now["evaluate base"] == pytest.approx(20 * 6 / 60)
    assert now["vision features"] == pytest.approx(10 * 24 / 360)
    assert (now["fuse"], now["quantize"]) == (5, 4)
    (run.dataset / "frames.csv").write_text("another file")
    assert not forecast(run)[0].skipped


def test_what_is_made_from_a_stage_that_is_repeated_is_not_promised_to_be_skipped(
    tmp_path: Path, small_dataset: Path
) -> None:
    settings = settings_of(f"dataset.folder={small_dataset}", "variants.all=false")
    run = Run(tmp_path / "mine", settings)
    run_stage(DATASET, run)
    base = stages(settings)[1]
    product = base.folder(run)
    product.mkdir(parents=True)
    inputs = hash_inputs(base.inputs(run))
    write_manifest(product, stage=base.name, settings=base.settings_of(settings), inputs=inputs, seconds=1)
    assert [stage.skipped for stage in forecast(run)[:3]] == [True, True, False]
    other = replace(run, settings=settings_of("variants.all=false"))
    assert [stage.skipped for stage in forecast(other)[:3]] == [False, False, False]


@pytest.mark.parametrize(
    "change",
    [
        {"machine": "another machine, 2 cores, 25 GB"},
        {"machine": ""},
        {"settings": {"base": {"model": "another"}, "fine_tune": {}}},
    ],
)
def test_what_cannot_be_compared_is_not_used(tmp_path: Path, change: dict[str, Any]) -> None:
    earlier_run(tmp_path / "seed-42", settings_of(), fine_tune=change)
    run = Run(tmp_path / "seed-43", settings_of())
    found = seconds_of(run)
    assert found["fine-tune"] is None
    assert found["dataset"] == 36
    said = list(announcement(run, forecast(run)))
    assert "fine-tune (not known)" in said[1]
    assert said[2].startswith(
        "about 4 min, without the stages whose time is not known, by the seconds that run seed-42"
    )
    assert said[3].startswith("  for orientation, not measured here: ")


@pytest.mark.parametrize(
    "assignment", ["fine_tune.rank=8", "fine_tune.micro_batch_size=4", "fine_tune.scope=language-all"]
)
def test_settings_that_change_the_pace_are_compared(tmp_path: Path, assignment: str) -> None:
    earlier_run(tmp_path / "seed-42", settings_of())
    assert seconds_of(Run(tmp_path / "other", settings_of(assignment)))["fine-tune"] is None


def test_another_number_of_threads_is_another_pace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    earlier_run(tmp_path / "seed-42", settings_of())
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert set(seconds_of(Run(tmp_path / "other", settings_of())).values()) == {None}


def test_the_quantization_of_another_base_is_not_used(tmp_path: Path) -> None:
    earlier_run(tmp_path / "seed-42", settings_of(), fuse={"settings": {"base": {"model": "another"}}})
    found = seconds_of(Run(tmp_path / "seed-43", settings_of()))
    assert (found["fuse"], found["quantize"]) == (None, None)


@pytest.mark.parametrize(("resumed", "seconds"), [(0, 300.0), (240, 1500.0), (300, None)])
def test_a_resumed_training_measured_only_its_end(tmp_path: Path, resumed: int, seconds: float | None) -> None:
    figures = FIGURES["fine-tune"] | {"resumed_from_step": resumed}
    earlier_run(tmp_path / "seed-42", settings_of(), fine_tune={"figures": figures})
    assert seconds_of(Run(tmp_path / "seed-43", settings_of()))["fine-tune"] == pytest.approx(seconds)


def test_a_resumed_evaluation_counts_the_answers_of_before(tmp_path: Path) -> None:
    earlier_run(tmp_path / "seed-42", settings_of(), evaluate_base={"seconds": 3.0})
    assert seconds_of(Run(tmp_path / "seed-43", settings_of()))["evaluate base"] == pytest.approx(240 * 0.05)


def test_pictures_from_the_cache_say_nothing_about_fetching_them(tmp_path: Path) -> None:
    figures = FIGURES["dataset"] | {"account": {"fetched": 10, "cached": 350}}
    earlier_run(tmp_path / "seed-42", settings_of(), dataset={"figures": figures})
    assert seconds_of(Run(tmp_path / "seed-43", settings_of()))["dataset"] is None


def test_without_the_counts_of_its_dataset_a_run_says_only_what_does_not_depend_on_them(
    tmp_path: Path, small_dataset: Path
) -> None:
    settings = settings_of(f"dataset.folder={small_dataset}")
    earlier = earlier_run(tmp_path / "seed-42", settings)
    (earlier.dataset / "manifest.json").unlink()
    run = Run(tmp_path / "mine", settings)
    run_stage(DATASET, run)
    assert {stage for stage, seconds in seconds_of(run).items() if seconds} == {"fuse", "quantize"}


@pytest.mark.parametrize("figures", [{}, {"steps": "x", "resumed_from_step": 0, "epochs": 5}, {"steps": 0}])
def test_figures_that_make_no_sense_are_left_out(tmp_path: Path, figures: dict[str, Any]) -> None:
    earlier_run(tmp_path / "seed-42", settings_of(), fine_tune={"figures": figures}, dataset={"figures": figures})
    assert seconds_of(Run(tmp_path / "seed-43", settings_of()))["fine-tune"] is None


def test_the_newest_run_counts_and_a_damaged_one_is_left_out(tmp_path: Path) -> None:
    old = earlier_run(tmp_path / "old", settings_of(), fuse={"seconds": 50.0})
    new = earlier_run(tmp_path / "new", settings_of(), fuse={"seconds": 7.0})
    for run, time in ((old, 1000), (new, 2000)):
        os.utime(run.merged / "manifest.json", (time, time))
    run = Run(tmp_path / "now", settings_of())
    assert seconds_of(run)["fuse"] == 7
    (new.merged / "manifest.json").write_text("{")
    assert seconds_of(run)["fuse"] == 50
    (tmp_path / "notes.txt").write_text("no run")
    (tmp_path / "empty").mkdir()
    assert seconds_of(run)["fuse"] == 50


def test_a_manifest_of_an_earlier_version_has_no_machine(tmp_path: Path) -> None:
    made = write_manifest(tmp_path, stage="s", settings={}, inputs={}, seconds=1, machine="here")
    before = {key: value for key, value in asdict(made).items() if key != "machine"}
    assert read_manifest(tmp_path) == made
    (tmp_path / "manifest.json").write_text(json.dumps(before))
    read = read_manifest(tmp_path)
    assert read is not None
    assert read.machine == ""
