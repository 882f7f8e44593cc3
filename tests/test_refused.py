"""What a refused command leaves: a finished run is the same to the last byte, and still flies."""

import os
import shutil
from pathlib import Path

import pytest

from orion_triage import pipeline
from orion_triage.runs import run as runs
from orion_triage.runs.manifest import read_manifest, write_manifest
from orion_triage.runs.run import SETTINGS_FILE, Run, changed_settings, open_run, prepare
from orion_triage.safe.files import sha256_of_file
from orion_triage.settings import load_settings

from .conftest import orion, places_of, run_command, structured_picture, write_catalogue


def tree(folder: Path) -> dict[str, str]:
    """Path -> sha256 of the run's files; not the lock, which names the last command, and not the logs."""
    return {
        path.relative_to(folder).as_posix(): sha256_of_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock" and path.parent.name != "logs"
    }


@pytest.mark.llama_cpp
@pytest.mark.slow
def test_a_refused_command_leaves_a_finished_run_as_it_was(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    for name in ("empty", "bad/orion_dataset/images"):
        (folder / name).mkdir(parents=True)
    (folder / "bad" / "train_dataset.jsonl").write_text("no record\n")
    run, own = folder / "runs" / "small", run_command()[1:]
    before = tree(run)
    for command in (
        ("evaluate", "empty", "--gguf"),
        ("evaluate", "empty", "--gguf", "--set", "base.frame_size=384"),
        ("evaluate", "--quantized-model", "http://127.0.0.1:1"),
        ("evaluate", "--variants", "F17"),
        ("ablation", "--set", "base.model=nowhere", "--set", "base.frame_size=384"),
        ("dataset", "--dataset", "empty"),
        ("dataset", "--dataset", "bad"),
        ("dataset", "--set", "dataset.catalogue=gone.csv"),
        ("fine-tune", "--set", "fine_tune.target_modules=of_no_layer"),
        ("fuse", "--adapter", "empty"),
        ("run", "--set", "base.model=nowhere"),
    ):
        result = orion(command[0], *own, *command[1:], cwd=folder)
        assert result.returncode == 1, (command, result.stderr)
        assert result.stderr.startswith("error: "), (command, result.stderr)
        assert tree(run) == before, command
    structured_picture(1).save(folder / "frame.png")
    assert orion("triage", "frame.png", cwd=folder).returncode == 0


@pytest.mark.llama_cpp
@pytest.mark.slow
def test_a_pair_flies_only_with_the_settings_that_it_was_made_with(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    path = folder / "runs" / "small" / SETTINGS_FILE
    path.write_text(path.read_text().replace('"frame_size": 256', '"frame_size": 384'))
    structured_picture(1).save(folder / "frame.png")
    refused = orion("triage", "frame.png", cwd=folder)
    assert refused.returncode == 1
    assert "base.frame_size 256, now 384" in refused.stderr
    assert orion("report", cwd=folder).returncode == 0
    report = (folder / "runs" / "small" / "report.md").read_text()
    assert "Outdated (base.frame_size 256, now 384): fine-tune, fuse," in report


def test_settings_of_an_unfinished_run_are_those_of_the_last_command(tmp_path: Path) -> None:
    """A dataset that was interrupted goes on with its source, although nothing is finished yet."""
    write_catalogue(tmp_path / "places.csv", places_of("ocean_water", "agriculture", "mega_airport", count=4))
    sets = ("--set", "dataset.catalogue=places.csv", "--set", "dataset.split_distance_km=20")
    begun = tmp_path / "runs" / "tiny" / "dataset_work"
    begun.mkdir(parents=True)
    (begun / "frame.png").write_bytes(b"of a build that was interrupted")
    assert orion("dataset", "--dataset", "gone", cwd=tmp_path).returncode == 1
    assert open_run(tmp_path / "runs" / "tiny").settings.dataset.folder == "gone"
    assert orion("dataset", *sets, cwd=tmp_path).returncode == 0
    assert orion("dataset", "--dataset", "gone", cwd=tmp_path).returncode == 1
    run = open_run(tmp_path / "runs" / "tiny")
    assert run.settings.dataset.catalogue == "places.csv"
    made = read_manifest(run.dataset)
    assert made is not None
    assert changed_settings(run, made) == []


@pytest.mark.parametrize(
    "command",
    [
        ("dataset", "--dataset", "gone"), ("run", "--dataset", "gone"), ("run", "--set", "base.model=nowhere"),
        ("fine-tune", "--set", "base.model=nowhere"), ("evaluate", "--variants", "F17"), ("ablation",),
    ],
)  # fmt: skip
def test_a_refused_command_leaves_no_new_run_folder(command: tuple[str, ...], tmp_path: Path) -> None:
    result = orion(*command, cwd=tmp_path)
    assert (result.returncode, result.stderr[:7]) == (1, "error: ")
    assert list(tmp_path.glob("runs/*")) == []


def test_the_default_is_the_newest_finished_run_and_a_newer_unfinished_one_is_named(tmp_path: Path) -> None:
    for number, name in enumerate(("old", "new", "begun")):
        run = Run(tmp_path / "runs" / name, load_settings("tiny"))
        run.dataset.mkdir(parents=True)
        prepare(run)
        times = (1_700_000_000 + number,) * 2
        for stage in ("dataset", "quantize")[: 1 if name == "begun" else 2]:
            run.product(stage).mkdir(exist_ok=True)
            write_manifest(run.product(stage), stage=stage, settings={}, inputs={}, seconds=1)
            os.utime(run.product(stage) / "manifest.json", times)
        os.utime(run.folder / SETTINGS_FILE, times)
    for command in ("verify", "report"):
        result = orion(command, cwd=tmp_path)
        assert result.stderr.splitlines()[:2] == ["run: runs/new", "note: runs/begun is newer, but not finished"]
    for name in ("old", "new"):
        shutil.rmtree(tmp_path / "runs" / name)
    assert orion("verify", cwd=tmp_path).stderr.splitlines()[0] == "run: runs/begun"


def test_the_stages_that_make_something_are_named_alike_where_runs_and_pipeline_know_them() -> None:
    assert tuple(stage.name for stage in pipeline.MAKING) == runs.MAKING
