"""A run keeps its settings: what one command named with --set counts for the next ones, and what changes is printed."""

import json
from pathlib import Path

import pytest

from orion_triage.cli.terminal import run_of
from orion_triage.errors import OrionError
from orion_triage.runs.run import SETTINGS_FILE, open_run
from orion_triage.settings import Settings, load_settings
from orion_triage.train.remote import training_of


def settings(folder: Path, *sets: str, preset: str = "") -> Settings:
    """Those of a command on this run."""
    folder.mkdir(exist_ok=True)
    found = run_of(preset, list(sets), folder).settings
    assert open_run(folder).settings == found
    return found


def test_a_setting_of_one_command_counts_for_the_next_and_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    settings(run, "base.frame_size=512", "fine_tune.target_modules=q_proj,v_proj")
    assert capsys.readouterr().err == ""
    later = settings(run, "fine_tune.epochs=2")
    assert (later.base.frame_size, later.fine_tune.epochs) == (512, 2)
    assert later.fine_tune.target_modules == ("q_proj", "v_proj")
    said = capsys.readouterr().err
    assert f"settings of {run}, where the preset tiny has others: base.frame_size=512, " in said
    assert "fine_tune.target_modules=q_proj,v_proj\n" in said
    assert settings(run, preset="tiny") == later, "naming the same preset changes nothing"
    back = settings(run, "base.frame_size=256", "fine_tune.epochs=5")
    assert (back.base.frame_size, back.fine_tune.epochs) == (256, 5)


def test_without_a_preset_a_run_stays_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = settings(tmp_path / "run", "fine_tune.rank=8", preset="lfm2.5-vl-450m")
    assert settings(tmp_path / "run") == first
    capsys.readouterr()
    other = settings(tmp_path / "run", preset="tiny")
    assert other.fine_tune.rank == load_settings("tiny").fine_tune.rank
    said = capsys.readouterr().err
    assert said.startswith("settings that change although they are not named: base.model=")
    assert "fine_tune.rank=16 (was 8)" in said


def test_a_preset_file_counts_each_time_and_what_it_changes_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own.toml"
    own.write_text("[fine_tune]\nepochs = 4\n")
    settings(tmp_path / "run", "fine_tune.rank=8", preset=str(own))
    own.write_text("[fine_tune]\nepochs = 6\n")
    capsys.readouterr()
    again = settings(tmp_path / "run", preset=str(own))
    assert (again.fine_tune.epochs, again.fine_tune.rank) == (6, 16)
    said = capsys.readouterr().err
    assert (
        said
        == "settings that change although they are not named: fine_tune.rank=16 (was 8), fine_tune.epochs=6 (was 4)\n"
    )
    assert settings(tmp_path / "run", "fuse.dtype=bfloat16").fine_tune.epochs == 6, "the file need not be named again"


def test_another_source_of_frames_has_no_settings_of_the_last_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    settings(run, "dataset.source=sentinel2", "dataset.split_distance_km=20")
    kept = settings(run, "dataset.split_seed=7").dataset
    assert (kept.source, kept.split_distance_km, kept.split_seed) == ("sentinel2", 20, 7)
    assert settings(run, "dataset.source=sentinel2").dataset == kept, "the same source again"
    capsys.readouterr()
    other = settings(run, "dataset.source=synthetic").dataset
    assert (other.split_distance_km, other.split_seed) == (100, 42)
    said = capsys.readouterr().err
    assert "not named: dataset.split_seed=42 (was 7), dataset.split_distance_km=100.0 (was 20.0)\n" in said


def test_a_catalogue_is_of_another_source_than_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    settings(run, "dataset.folder=mine", "dataset.source=directory")
    found = settings(run, "dataset.catalogue=places.csv").dataset
    assert (found.source, found.folder, found.catalogue) == ("synthetic", "", "places.csv")
    assert 'dataset.source="synthetic" (was directory)' in capsys.readouterr().err


def test_settings_of_another_version_are_not_kept_without_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    older = load_settings("tiny", ["fine_tune.epochs=9"]).model_dump(mode="json") | {"ladder": {}}
    (tmp_path / "run" / SETTINGS_FILE).write_text(json.dumps(older))
    assert settings(tmp_path / "run").fine_tune.epochs == 5
    assert "is of another version: its settings are those of the preset tiny\n" in capsys.readouterr().err


def test_the_server_trains_with_the_settings_of_earlier_commands(tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings(run, "base.frame_size=512", "fine_tune.scope=language-attention")
    kept = settings(run, "fine_tune.epochs=2")
    sent = training_of("", ["fine_tune.epochs=2"], "run", kept)
    assert sent.preset == "tiny"
    assert set(sent.assignments) == {
        "fine_tune.epochs=2", "base.frame_size=512", 'fine_tune.scope="language-attention"',
    }  # fmt: skip
    there = load_settings(sent.preset, sent.assignments)
    assert (there.base, there.fine_tune) == (kept.base, kept.fine_tune)
    with pytest.raises(OrionError, match="preset own is not a shipped one"):
        training_of("", [], "run", kept.model_copy(update={"preset": "own"}))
