"""settings.py, runs/run.py, runs/manifest.py and safe/files.py."""

import json
from pathlib import Path

import pytest

from orion_triage.cli.terminal import run_of
from orion_triage.errors import OrionError
from orion_triage.runs.manifest import hash_inputs, is_current, read_manifest, write_manifest
from orion_triage.runs.run import SETTINGS_FILE, Run, open_run, prepare, with_its_dataset
from orion_triage.safe.files import replaced_folder, require_free_space, write_text
from orion_triage.settings import Settings, load_settings, overrides


def test_the_defaults_are_the_mission_tables() -> None:
    table = Settings().fine_tune
    assert (table.rank, table.alpha, table.dropout) == (16, 32, 0.05)
    assert table.target_modules == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert (table.micro_batch_size, table.gradient_accumulation_steps, table.epochs) == (1, 16, 3)
    assert (table.learning_rate, table.optimizer, table.precision) == (2e-4, "paged_adamw_8bit", "auto")
    assert table.gradient_checkpointing
    assert overrides(Settings()) == {}


def test_presets_and_assignments_are_listed_as_departures() -> None:
    changed = overrides(load_settings("tiny", ["fine_tune.rank=8", "evaluate.noise=uniform"]))
    assert changed["fine_tune.rank"] == (16, 8)
    assert changed["evaluate.noise"] == ("gaussian", "uniform")
    assert changed["base.model"][1] == "orion-tiny"


def test_a_first_look_has_a_size_that_the_model_can_take() -> None:
    for size in (128, 288, 480):
        assert load_settings("tiny", [f"variants.first_look_size={size}"]).variants.first_look_size == size
    for size in (1, 96, 250, 512):
        with pytest.raises(OrionError, match=r"variants\.first_look_size: input should be "):
            load_settings("tiny", [f"variants.first_look_size={size}"])


def test_all_mistakes_are_named_at_once(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text("[fine_tune]\nepochz = 3\nrank = 0\n[moon]\nphase = 1\n", encoding="utf-8")
    with pytest.raises(OrionError) as caught:
        load_settings(str(path), ["fuse.check_records=0", "evaluate.noise=pink"])
    for part in (
        "own.toml has 5 mistakes",
        "fine_tune.epochz",
        "fine_tune.rank",
        "moon",
        "fuse.check_records",
        "'pink'",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("preset", "assignment", "message"),
    [
        ("huge", "", "there is no preset 'huge'"),
        ("missing.toml", "", "missing.toml does not exist"),
        ("tiny", "epochs=3", "is not stage.key=value"),
        ("tiny", "preset.x=3", "preset is not a stage"),
    ],
)
def test_unusable_settings_are_refused(preset: str, assignment: str, message: str) -> None:
    with pytest.raises(OrionError, match=message):
        load_settings(preset, [assignment] if assignment else [])


def test_a_manifest_holds_until_settings_inputs_or_outputs_change(tmp_path: Path) -> None:
    source, folder = tmp_path / "in.txt", tmp_path / "stage"
    write_text(source, "input")
    write_text(folder / "a" / "out.txt", "output")
    assert read_manifest(folder) is None
    inputs = hash_inputs({"source": source})
    write_manifest(folder, stage="s", settings={"k": (1, 2)}, inputs=inputs, seconds=1.5, figures={"n": 3})
    stage_manifest = read_manifest(folder)
    assert stage_manifest is not None
    assert stage_manifest.figures == {"n": 3}
    assert list(stage_manifest.outputs) == ["a/out.txt"]
    assert is_current(folder, settings={"k": (1, 2)}, inputs=inputs)
    assert not is_current(folder, settings={"k": (1, 3)}, inputs=inputs)
    write_text(source, "changed")
    assert not is_current(folder, settings={"k": (1, 2)}, inputs=hash_inputs({"source": source}))
    write_text(folder / "a" / "out.txt", "tampered")
    assert not is_current(folder, settings={"k": (1, 2)}, inputs=inputs)
    (folder / "manifest.json").write_text("{", encoding="utf-8")
    with pytest.raises(OrionError, match="is damaged"):
        read_manifest(folder)


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "product"
    with replaced_folder(folder) as new:
        write_text(new / "a", "1")
    with pytest.raises(RuntimeError), replaced_folder(folder) as new:
        write_text(new / "a", "2")
        raise RuntimeError
    assert (folder / "a").read_text() == "1"
    with replaced_folder(folder) as new:
        write_text(new / "b", "3")
    assert [path.name for path in tmp_path.rglob("*")] == ["product", "b"]


def test_a_full_disk_is_refused_before_work(tmp_path: Path) -> None:
    require_free_space(tmp_path / "new", 1, "nothing")
    with pytest.raises(OrionError, match=r"the merge needs 1,000,000,000,000 MB"):
        require_free_space(tmp_path / "new", 10**18, "the merge")


def test_settings_survive_json() -> None:
    settings = load_settings("tiny")
    assert Settings.model_validate(json.loads(settings.model_dump_json())) == settings


def test_a_run_of_another_version_is_named_and_its_dataset_kept(tmp_path: Path) -> None:
    settings = load_settings("tiny", ["dataset.source=sentinel2", "dataset.captured_from=2023-05-01"])
    older = settings.model_dump(mode="json") | {"ladder": {"enabled": True}}
    (tmp_path / SETTINGS_FILE).write_text(json.dumps(older))
    with pytest.raises(OrionError, match="changed or written by another version of ORION triage: ladder: ") as caught:
        open_run(tmp_path)
    assert f"'orion run --run {tmp_path}' with version" in caught.value.fix
    assert with_its_dataset(Run(tmp_path, load_settings("tiny"))).settings.dataset == settings.dataset
    (tmp_path / SETTINGS_FILE).write_text(json.dumps(older | {"dataset": {"origin": "sentinel2"}}))
    with pytest.raises(
        OrionError, match="has no valid dataset settings, so the source of the run's dataset is unknown"
    ):
        with_its_dataset(Run(tmp_path, load_settings("tiny")))


def test_limits_that_were_set_once_stay_until_they_are_named_again(tmp_path: Path) -> None:
    def limits(*assignments: str, preset: str = "tiny") -> tuple[float, float, float]:
        settings = run_of(preset, list(assignments), folder).settings
        return (settings.verdict.significance, settings.verdict.largest_irrecoverable_loss, settings.mission.prior[0])

    folder = tmp_path / "run"
    folder.mkdir()
    default = limits()
    strict = (0.01, 0.10, 0.02)
    assert limits("verdict.significance=0.01", "mission.prior=[0.02, 0.08, 0.9]") == strict != default
    assert limits() == limits("fine_tune.epochs=2") == strict
    assert limits("verdict.largest_irrecoverable_loss=0.05") == (0.01, 0.05, 0.02)
    own = tmp_path / "own.toml"
    own.write_text('preset = "tiny"\n[verdict]\nsignificance = 0.03\n')
    assert limits(preset=str(own)) == (0.03, 0.10, 0.005)
    path = folder / "settings.json"
    path.write_text(path.read_text().replace('"significance": 0.03', '"significance": 7'))
    with pytest.raises(OrionError, match=r"no valid mission or verdict settings: .*significance"):
        limits()


def test_of_several_processes_the_first_writes_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Taking the folder deletes half-written files in it: another rank's settings would be among them."""
    run = Run(tmp_path / "run", load_settings("tiny"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    prepare(run)
    assert not run.folder.exists()
    monkeypatch.setenv("RANK", "0")
    prepare(run)
    assert open_run(run.folder).settings == run.settings
