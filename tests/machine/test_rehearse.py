"""rehearse.py, budgets.py and doctor.py: the real commands on a small shape, and the published shapes' counts."""

import json
from pathlib import Path
from typing import Any

import pytest

from orion_triage.errors import OrionError
from orion_triage.machine import budgets, doctor, rehearse
from orion_triage.models.checkpoint import count_parameters
from orion_triage.runs.run import Run
from orion_triage.settings import load_settings
from orion_triage.train.device import gpu_fault
from tests.conftest import MISSION, orion

PUBLISHED = {"lfm2.5-vl-1.6b": 1_596_625_904, "lfm2.5-vl-450m": 450_816_512}
SMALL: dict[str, Any] = {
    "layer_types": ("conv", "full_attention"),
    "vocabulary": 4096,
    "text_width": 256,
    "text_feed_forward": 768,
    "two_thirds_of_feed_forward": True,
    "attention_heads": 4,
    "key_value_heads": 2,
    "vision_width": 64,
    "vision_layers": 3,
    "vision_heads": 2,
    "vision_feed_forward": 128,
    "projector_width": 128,
}


@pytest.mark.parametrize("preset", sorted(PUBLISHED))
def test_the_shapes_have_the_published_number_of_parameters(preset: str) -> None:
    assert rehearse._parameters(preset) == PUBLISHED[preset]


@pytest.mark.slow
@pytest.mark.llama_cpp
def test_a_rehearsal_measures_every_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache_of_its_own: Path, warm_python: None
) -> None:
    preset = "lfm2.5-vl-450m"
    # The same stages at a size of seconds.
    monkeypatch.setitem(rehearse.SHAPES, preset, SMALL)
    figures = rehearse.run(preset, tmp_path / "rehearsal", steps=1)
    stages = {stage["stage"]: stage for stage in figures["stages"]}
    expected = ["fine-tune", "fuse", "convert", "convert mmproj", "quantize", "all of quantize", "answer"]
    assert list(stages) == expected
    for stage in stages.values():
        assert stage["seconds"] > 0
        # Of the process that asks the tests' server; what is counted is tested in test_reliability.py.
        assert stage["peak_memory_bytes"] > 10_000_000
        assert stage["peak_disk_bytes"] > figures["bytes"]["adapter"]
    assert all(size > 0 for size in figures["bytes"].values())
    assert 0 <= figures["parity"] <= 0.01
    assert figures["answer"]["category"] in MISSION.names
    assert figures["answer"]["reason"]
    assert figures["seconds"] > sum(stages[name]["seconds"] for name in ("fuse", "all of quantize", "answer"))
    assert figures["training_seconds_per_sample"] > 0
    assert budgets.last_rehearsal(preset) == figures
    assert json.loads(rehearse.figures_path(preset).read_text()) == figures
    rehearse.remove(tmp_path / "rehearsal")
    assert list((tmp_path / "rehearsal").iterdir()) == []


@pytest.mark.slow
def test_without_steps_a_random_adapter_is_fused_and_a_stage_that_fails_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache_of_its_own: Path, warm_python: None
) -> None:
    from orion_triage.dataset.dataset import Dataset
    from orion_triage.export import fuse

    preset = "lfm2.5-vl-450m"
    monkeypatch.setitem(rehearse.SHAPES, preset, SMALL)
    base, run = tmp_path / "base", tmp_path / "run"
    rehearse.make_base(preset, base)
    weights, elsewhere = base / "model.safetensors", tmp_path / "model.safetensors"
    weights.rename(elsewhere)
    with pytest.raises(OrionError, match=f"^stage fuse of the rehearsal failed: .*{base}"):  # the first one
        rehearse.run(preset, tmp_path, steps=0)
    assert not rehearse.figures_path(preset).exists()
    elsewhere.rename(weights)
    paths = Run(run, load_settings(preset))
    assert not paths.merged.exists()
    settings = paths.settings.fuse.model_copy(update={"check_records": rehearse.CHECK_RECORDS})
    figures = fuse.run(base, paths.adapter, Dataset(paths.dataset, MISSION), paths.merged, settings, 512)
    assert figures
    assert paths.merged.joinpath(weights.name).stat().st_size > 0.9 * weights.stat().st_size


@pytest.fixture
def cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Figures go here; the tools stay where they are."""
    # They lie in the cache, where the tools must stay.
    monkeypatch.setattr(rehearse, "figures_path", lambda preset: tmp_path / f"{preset}.json")
    monkeypatch.setattr(budgets, "figures_path", lambda preset: tmp_path / f"{preset}.json")
    return tmp_path


def test_only_published_shapes_are_rehearsed(tmp_path: Path) -> None:
    with pytest.raises(OrionError, match="'tiny' has no published shapes"):
        rehearse.run("tiny", tmp_path)


def test_a_budget_is_kept_or_exceeded() -> None:
    stage = {"stage": "fuse", "seconds": 1.0, "peak_memory_bytes": 7 * 10**9, "peak_disk_bytes": 10**9}
    figures = {
        "bytes": {"Q4_K_M": 735_000_000, "mmproj": 900_000_000},
        "stages": [{**stage, "peak_vram_bytes": None}],
    }
    kept = {row.what: row.kept for row in budgets.budgets(figures)}
    assert kept["fuse, memory"] is False
    assert kept["Q4_K_M, file"] is True
    assert kept["mmproj, file"] is False
    assert kept["disk beside the base"] is True
    assert kept["convert, memory"] is None
    assert {row.kept for row in budgets.budgets(None)} == {None}


def test_the_doctor_names_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORION_CACHE", str(tmp_path / "empty"))
    monkeypatch.setenv("PATH", str(tmp_path))
    found = {finding.what: finding for finding in doctor.examine(load_settings("tiny"), tmp_path)}
    assert found["bitsandbytes"].state == "ok"
    assert found["base"].state == "ok"
    assert found["llama.cpp"].state == "missing"
    assert "apt install g++" in found["llama.cpp"].fix
    assert found["GPU"].state == "ok"
    training = {
        finding.what: finding for finding in doctor.examine(load_settings("tiny"), tmp_path, only_fine_tune=True)
    }
    assert (training["llama.cpp"].state, training["llama.cpp"].fix) == ("note", found["llama.cpp"].fix)
    assert training.keys() == found.keys()
    too_much = doctor.Needs(10**18, 10**18, None)
    assert doctor._memory(too_much).state == "missing"
    assert doctor._disk(too_much, tmp_path / "not" / "yet").state == "missing"
    full = {finding.what: finding for finding in doctor.examine(load_settings("lfm2.5-vl-1.6b"), tmp_path)}
    assert full["base"].state == "note"
    assert "LiquidAI/LFM2.5-VL-1.6B" in full["base"].found
    assert "3.2 GB" in full["base"].fix
    if gpu_fault():
        assert full["GPU"].state == "missing"
        assert "1,597 M parameters" in full["GPU"].found
        assert orion("doctor", "--preset", "lfm2.5-vl-1.6b").returncode == 1


def test_the_doctor_says_of_a_base_that_it_is_not_here(tmp_path: Path) -> None:
    settings = load_settings("tiny", [f"base.model={tmp_path / 'nowhere'}"])
    found = {finding.what: finding for finding in doctor.examine(settings, tmp_path)}
    assert found["base"].state == "missing"
    assert found["base"].found == f"{tmp_path / 'nowhere'} is neither a folder on this machine nor a Hub id"
    unknown = doctor._base(load_settings("tiny", ["base.model=someone/else"]))
    assert unknown.state == "note"
    assert "its size is not known, and taken as 1,597 M parameters" in unknown.found


def test_a_cached_base_is_counted(small_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    config = str(small_base / "config.json")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: config)
    assert doctor._parameters(load_settings("tiny", ["base.model=someone/else"])) == count_parameters(small_base)


def test_a_gpu_with_too_little_memory_is_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's answers about a GPU are replaced: there is none here."""
    import torch

    monkeypatch.setattr(doctor, "gpu_fault", lambda: None)
    monkeypatch.setattr("orion_triage.train.device.gpu_fault", lambda: None)
    answers = {"is_available": True, "device_count": 1, "is_bf16_supported": True, "get_device_name": "A card"}
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    settings = load_settings("lfm2.5-vl-1.6b")
    needs = doctor.needs_of(settings, doctor._parameters(settings))
    for free, state in ((6_000_000_000, "missing"), (12_000_000_000, "ok")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_, free=free: (free, 16_000_000_000))
        finding = doctor._gpu(settings, doctor._parameters(settings), needs)[0]
        assert (finding.what, finding.state) == ("GPU", state)
        assert ("6.0 GB free of about 8 needed" in finding.found) is (state == "missing")
        assert "trains in bfloat16" in finding.found


def test_what_a_run_needs_follows_from_its_settings_and_not_from_its_presets_name(
    small_base: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text(f'[base]\nmodel = "{small_base}"\nframe_size = 256\n', encoding="utf-8")
    settings = load_settings(str(mine))
    parameters = doctor._parameters(settings)
    assert parameters == count_parameters(small_base)
    assert doctor.needs_of(settings, parameters).gpu_memory is None
    assert {finding.what: finding.state for finding in doctor.examine(settings, tmp_path)}["GPU"] == "ok"

    def gpu_memory(preset: str, *sets: str) -> float:
        settings = load_settings(preset, sets)
        needed = doctor.needs_of(settings, doctor._parameters(settings)).gpu_memory
        assert needed is not None
        return needed / 1e9

    full = gpu_memory("lfm2.5-vl-1.6b")
    assert full == pytest.approx(8)  # the mission document's limit
    assert gpu_memory("lfm2.5-vl-1.6b", "fine_tune.base_weights=16-bit") > full + 1
    assert gpu_memory("lfm2.5-vl-1.6b", "base.frame_size=256") < full - 2
    assert gpu_memory("lfm2.5-vl-450m") < full / 3
    assert gpu_memory("lfm2.5-vl-1.6b", "base.model=someone/else@main") == pytest.approx(8)  # unknown: as the mission's
    assert gpu_memory("lfm2.5-vl-1.6b", "fine_tune.precision=float32") > full * 1.5
    assert gpu_memory("lfm2.5-vl-1.6b", "fine_tune.gradient_checkpointing=false") == pytest.approx(full + 1.85)
    assert full < gpu_memory("lfm2.5-vl-1.6b", "fine_tune.micro_batch_size=4") < full + 1
    many = ("fine_tune.micro_batch_size=16", "fine_tune.gradient_checkpointing=false")
    assert gpu_memory("lfm2.5-vl-1.6b", *many) == pytest.approx(full + 16 * 1.85)

    def needs(*sets: str) -> doctor.Needs:
        settings = load_settings("lfm2.5-vl-1.6b", sets)
        return doctor.needs_of(settings, doctor._parameters(settings))

    assert needs("fine_tune.device=cpu").memory == pytest.approx(10.2e9, rel=0.02)  # measured: docs/performance.md
    assert needs("fine_tune.device=cpu").gpu_memory is None
    checkpoints = 97 * 0.05 * 2 * PUBLISHED["lfm2.5-vl-1.6b"]
    assert needs("fine_tune.epochs=100").disk == pytest.approx(needs().disk + checkpoints, abs=2)
    for preset, count in PUBLISHED.items():
        assert doctor._parameters(load_settings(preset)) == count
