import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orion_triage.dataset.dataset import Dataset
from orion_triage.dataset.records import image_path, read_split
from orion_triage.errors import OrionError
from orion_triage.export import fuse
from orion_triage.imagery.frames import read_frame
from orion_triage.models import checkpoint
from orion_triage.models.adapter import attach_adapter, read_adapter
from orion_triage.models.generate import answer_log_probabilities
from orion_triage.models.load import fingerprint, load_model, load_processor, resolve_base
from orion_triage.settings import FineTuneSettings, FuseSettings
from orion_triage.train import fine_tune
from tests.conftest import MISSION

SETTINGS = FuseSettings(check_records=6)


@pytest.fixture(scope="module")
def merged(
    small_base: Path, small_adapter: Path, small_dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """The merge of base and adapter, and its figures; nobody changes it."""
    out = tmp_path_factory.mktemp("fuse") / "merged"
    return out, fused(small_base, small_adapter, small_dataset, out, check_records=20)


def fused(base: Path, adapter: Path, dataset: Path, out: Path, **changes: Any) -> dict[str, Any]:
    return fuse.run(base, adapter, Dataset(dataset, MISSION), out, SETTINGS.model_copy(update=changes), 256)


def log_probabilities(model: Any, base: Path, dataset: Path) -> Any:
    import torch

    records = read_split(dataset, "test", MISSION)  # other records than the stage's own check
    scores = answer_log_probabilities(
        model,
        load_processor(base, 256),
        [read_frame(image_path(dataset, record), 256).image for record in records],
        [record.user_text for record in records],
        [record.answer for record in records],
    )
    return torch.cat(scores)


def changed_adapter(adapter: Path, folder: Path, change: Callable[[str, Any], tuple[str, Any]]) -> Path:
    """A copy of the adapter with `change` applied to each (key, tensor)."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(adapter, folder)
    path = folder / "adapter_model.safetensors"
    save_file(dict(change(key, tensor) for key, tensor in load_file(path).items()), path)
    return folder


def test_the_merged_folder_answers_like_the_adapter_and_not_like_the_base(
    small_base: Path, small_adapter: Path, small_dataset: Path, merged: tuple[Path, dict[str, Any]]
) -> None:
    out, figures = merged
    assert figures["check_records"] == 20
    assert figures["verdict_tokens"] > 20 * 10
    assert 0 < figures["largest_difference"] <= 0.005
    assert figures["mean_adapter_effect"] > 0.1
    assert figures["warnings"] == []
    assert figures["census"]["self_attn.out_proj"] == {"text": 1, "vision": 3, "projector": 0}

    base = load_model(small_base, dtype="float32")
    plain = log_probabilities(base, small_base, small_dataset)
    adapted_model, _, _ = attach_adapter(base, small_adapter, read_adapter(small_adapter))
    adapted = log_probabilities(adapted_model, small_base, small_dataset)
    of_folder = log_probabilities(load_model(out, dtype="float32"), out, small_dataset)
    assert float((of_folder - adapted).abs().max()) < 0.005
    assert float((adapted - plain).abs().max()) > 0.5


def test_the_merged_folder_has_the_hub_layout(small_base: Path, merged: tuple[Path, dict[str, Any]]) -> None:
    import torch
    from safetensors.torch import load_file

    out, figures = merged
    tensors, original = (load_file(folder / "model.safetensors") for folder in (out, small_base))
    assert {key: value.shape for key, value in tensors.items()} == {k: v.shape for k, v in original.items()}
    assert {value.dtype for value in tensors.values()} == {torch.float16}
    assert "lm_head.weight" not in tensors
    assert sum(value.numel() for value in tensors.values()) == figures["parameters"]
    changed = {key for key in tensors if not tensors[key].equal(original[key])}
    assert changed == {key for key in original if "self_attn" in key and key.endswith("proj.weight")}
    config, of_base = (json.loads((folder / "config.json").read_text()) for folder in (out, small_base))
    assert config["text_config"]["architectures"] == ["Lfm2ForCausalLM"]
    assert config["architectures"] == ["Lfm2VlForConditionalGeneration"]
    assert {config["dtype"], config["text_config"]["dtype"], config["vision_config"]["dtype"]} == {"float16"}
    assert config["text_config"].get("use_cache", True)
    assert "quantization_config" not in config
    del config["text_config"]["dtype"], config["vision_config"]["dtype"]
    assert config == of_base
    for name in ("chat_template.jinja", "generation_config.json", "processor_config.json"):
        assert (out / name).read_bytes() == (small_base / name).read_bytes()
    resolve_base(str(out))


def test_a_large_model_is_written_and_read_in_parts(
    small_base: Path,
    small_adapter: Path,
    small_dataset: Path,
    merged: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from safetensors.torch import load_file

    whole, parts = merged[0], tmp_path / "parts"
    # A limit that a small model reaches.
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 400_000)
    fused(small_base, small_adapter, small_dataset, parts)
    files = sorted(parts.glob("*.safetensors"))
    assert len(files) > 2
    together = {key: value for file in files for key, value in load_file(file).items()}
    expected = load_file(whole / "model.safetensors")
    assert together.keys() == expected.keys()
    assert all(together[key].equal(expected[key]) for key in expected)
    assert fingerprint(parts) != fingerprint(whole)
    fused(parts, changed_base(small_adapter, tmp_path / "adapter", parts), small_dataset, tmp_path / "again")


def changed_base(adapter: Path, folder: Path, base: Path) -> Path:
    """A copy of the adapter that says it was trained on `base`."""
    shutil.copytree(adapter, folder)
    value = {"name": base.name, "sha256": fingerprint(base), "frame_size": 256}
    (folder / "base.json").write_text(json.dumps(value))
    return folder


def test_bfloat16_output_and_nothing_printed(
    small_base: Path, small_adapter: Path, small_dataset: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    figures = fused(small_base, small_adapter, small_dataset, tmp_path / "merged", dtype="bfloat16")
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")
    assert figures["dtype"] == "bfloat16"
    assert figures["largest_difference"] <= figures["allowed_difference"]


def test_an_adapter_of_another_base_is_refused(
    other_base: Path, small_adapter: Path, small_dataset: Path, tmp_path: Path
) -> None:
    with pytest.raises(OrionError, match=r"adapter of another base \(small-base.*not of other-base"):
        fused(other_base, small_adapter, small_dataset, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.filterwarnings("ignore:.*checkpointing.* is deprecated:FutureWarning")
def test_an_adapter_that_asked_for_o_proj_as_published_loads_and_fuses(
    small_base: Path, small_dataset: Path, tmp_path: Path
) -> None:
    """As PEFT itself makes it from the published recipe: `o_proj` is in the configuration and in no tensor."""
    import torch
    from peft import LoraConfig, get_peft_model

    adapter = tmp_path / "adapter"
    torch.manual_seed(3)
    asked = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = LoraConfig(r=16, lora_alpha=32, target_modules=asked, task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(load_model(small_base, dtype="float16"), config)
    model.save_pretrained(adapter)
    expected = log_probabilities(model.eval().float(), small_base, small_dataset)
    assert set(json.loads((adapter / "adapter_config.json").read_text())["target_modules"]) == set(asked)

    figures = fused(small_base, adapter, small_dataset, tmp_path / "merged")
    assert figures["census"]["q_proj"] == {"text": 1, "vision": 3, "projector": 0}
    assert figures["census"]["o_proj"] == {"text": 0, "vision": 0, "projector": 0}
    assert [text for text in figures["warnings"] if "'o_proj' has no tensors" in text]
    merged = log_probabilities(load_model(tmp_path / "merged", dtype="float32"), small_base, small_dataset)
    assert float((merged - expected).abs().max()) < 0.02  # of a random adapter that moves them by several


def test_the_widest_scope_fuses(small_base: Path, small_dataset: Path, tmp_path: Path) -> None:
    """What the adapter changed is what the merge changed, and a tower that was left alone stays to the byte."""
    from safetensors.torch import load_file

    settings = FineTuneSettings(
        scope="language-all", micro_batch_size=8, gradient_accumulation_steps=1, epochs=1, learning_rate=1e-2
    )
    fine_tune.run(small_base, Dataset(small_dataset, MISSION), tmp_path / "adapter", tmp_path / "work", settings, 256)
    figures = fused(small_base, tmp_path / "adapter", small_dataset, tmp_path / "merged", dtype="float16")
    assert figures["largest_difference"] <= figures["allowed_difference"]
    before, after = (load_file(folder / "model.safetensors") for folder in (small_base, tmp_path / "merged"))
    changed = {key for key in after if not after[key].equal(before[key].half())}
    assert len(changed) == 12
    assert all("language_model" in key for key in changed)


def test_an_adapter_without_its_base_file_and_with_older_names_gives_the_same_model(
    small_base: Path, small_adapter: Path, small_dataset: Path, merged: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    def older(key: str, tensor: Any) -> tuple[str, Any]:
        return key.replace("vision_tower.encoder", "vision_tower.vision_model.encoder"), tensor

    adapter = changed_adapter(small_adapter, tmp_path / "adapter", older)
    assert any("vision_model" in key for key in read_adapter(adapter))
    (adapter / "base.json").unlink()
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["target_modules"] = ["q_proj", "k_proj", "v_proj", "out_proj", "o_proj_"]
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    figures = fused(small_base, adapter, small_dataset, tmp_path / "merged")
    assert [text for text in figures["warnings"] if "no base.json" in text]
    assert [text for text in figures["warnings"] if "'o_proj_' has no tensors" in text]
    assert fingerprint(tmp_path / "merged") == fingerprint(merged[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda key, tensor: (key, tensor * float("nan")), "values that are not finite"),
        (lambda key, tensor: (key, tensor * (0 if "lora_B" in key else 1)), "changes no log-probability"),
        (lambda key, tensor: (key.replace("lora_A", "lora_magnitude_vector"), tensor), "is not a LoRA matrix"),
        (lambda key, tensor: (key.replace("layers.1", "layers.7"), tensor), "matches no module of the base"),
        (
            lambda key, tensor: (key, tensor[:8] if "lora_A" in key else tensor[:, :8]),
            r"has shape \(8, \d+\)",
        ),
        (lambda key, tensor: (key, tensor * 1e3), "values beyond float16's range"),
    ],
)
def test_unusable_adapters_are_refused(
    small_base: Path, small_adapter: Path, small_dataset: Path, tmp_path: Path, change: Any, message: str
) -> None:
    adapter = changed_adapter(small_adapter, tmp_path / "adapter", lambda key, tensor: _contiguous(change(key, tensor)))
    with pytest.raises(OrionError, match=message):
        fused(small_base, adapter, small_dataset, tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def _contiguous(pair: tuple[str, Any]) -> tuple[str, Any]:
    return pair[0], pair[1].contiguous()


def test_a_merge_that_answers_otherwise_leaves_nothing(
    small_base: Path,
    small_adapter: Path,
    small_dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write = fuse._write_weights
    # A fault, planted: nothing of the adapter is added.
    monkeypatch.setattr(fuse, "_write_weights", lambda base, changes, *rest: write(base, {}, *rest))
    with pytest.raises(OrionError, match=r"differ from base \+ adapter by up to \d"):
        fused(small_base, small_adapter, small_dataset, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_another_frame_size_is_refused(
    small_base: Path, small_adapter: Path, small_dataset: Path, tmp_path: Path
) -> None:
    with pytest.raises(OrionError, match=r"trained on frames of 256 px; base\.frame_size is 512"):
        fuse.run(small_base, small_adapter, Dataset(small_dataset, MISSION), tmp_path / "merged", SETTINGS, 512)


def test_too_few_records_and_missing_files_are_named(
    small_base: Path, small_adapter: Path, small_dataset: Path, tmp_path: Path
) -> None:
    with pytest.raises(OrionError, match="has 30 training and validation records; the merge check needs 31"):
        fused(small_base, small_adapter, small_dataset, tmp_path / "merged", check_records=31)
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(OrionError, match=r"adapter_model\.bin can run code"):
        fused(small_base, tmp_path, small_dataset, tmp_path / "merged")
