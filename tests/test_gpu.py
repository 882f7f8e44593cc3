"""What only a CUDA device can show. `pytest -m gpu`; without one, every test here is skipped and says so."""

import json
from pathlib import Path
from typing import Any

import pytest

from orion_triage.dataset.dataset import Dataset
from orion_triage.dataset.records import read_split
from orion_triage.evaluate.backends import TransformersBackend
from orion_triage.export import fuse
from orion_triage.mission.prompt import user_text
from orion_triage.models import lfm2_vl
from orion_triage.models.generate import answer_log_probabilities, vision_features
from orion_triage.models.load import load_model, load_processor
from orion_triage.progress import silent
from orion_triage.settings import EvaluateSettings, FineTuneSettings, FuseSettings
from orion_triage.train import fine_tune
from orion_triage.train.checkpoints import CHECKPOINTS
from orion_triage.train.preflight import preflight
from orion_triage.train.trainer import collator
from tests.conftest import MISSION


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not _has_gpu(), reason="gpu: there is no CUDA device")]

SETTINGS = FineTuneSettings(
    micro_batch_size=4, gradient_accumulation_steps=2, epochs=2, learning_rate=1e-2, dropout=0.0
)


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_the_base_in_four_bits_sees_like_the_one_in_sixteen(
    small_base: Path, small_frames: list[Any], precision: str
) -> None:
    import torch

    processor = load_processor(small_base, 256)
    reference_model = load_model(small_base, dtype=precision, device="cuda")
    reference = vision_features(reference_model, processor, small_frames)
    model = load_model(small_base, dtype=precision, four_bit=True, device="cuda")
    figures = preflight(model, reference, processor, small_frames, user_text(MISSION, None))
    assert figures["smallest_vision_cosine"] > 0.999
    tower = model.model.vision_tower
    assert {parameter.dtype for parameter in tower.parameters()} == {getattr(torch, precision)}
    kinds = {type(module).__name__ for module in model.model.language_model.layers.modules()}
    assert "Linear4bit" in kinds
    for part in (model.config.text_config, model.config.vision_config):
        assert part._attn_implementation == "sdpa"  # torch picks the flash kernel where the mask allows it


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_training_learns_and_its_adapter_fuses(
    small_base: Path, small_dataset: Path, tmp_path: Path, precision: str
) -> None:
    settings = SETTINGS.model_copy(update={"precision": precision})
    figures = fine_tune.run(
        small_base, Dataset(small_dataset, MISSION), tmp_path / "adapter", tmp_path / "work", settings, 256
    )
    assert figures["precision_used"] == precision
    assert figures["notes"] == []
    assert figures["last_loss"] < figures["first_loss"]
    assert figures["peak_vram_bytes"] > 0
    assert figures["short_convolution"] == ("causal-conv1d" if lfm2_vl.has_fast_convolution() else "PyTorch")
    merged = fuse.run(
        small_base,
        tmp_path / "adapter",
        Dataset(small_dataset, MISSION),
        tmp_path / "merged",
        FuseSettings(check_records=20),
        256,
    )
    assert merged["largest_difference"] <= merged["allowed_difference"]


def test_the_first_loss_is_the_cpus(small_base: Path, small_dataset: Path, tmp_path: Path) -> None:
    """Before any step, so that only precision and device differ; bfloat16 keeps three digits."""
    losses = {}
    records = read_split(small_dataset, "train", MISSION)[:8]
    frames = fine_tune.decode_frames(Dataset(small_dataset, MISSION), records, 256, silent)
    batch = collator(load_processor(small_base, 256), frames)(records)
    for device, dtype in (("cpu", "float32"), ("cuda", "float16")):
        import torch

        model = load_model(small_base, dtype=dtype, device=device)
        with torch.inference_mode():
            losses[device] = float(model(**batch.to(device)).loss)
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=0.01)


def test_the_optimizer_is_paged(
    small_base: Path, small_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bitsandbytes pages states from 100,000 values on: the rank makes this model's matrices that large."""
    from transformers import TrainerCallback, trainer

    class Catch(TrainerCallback):
        optimizer: Any = None

        def on_step_end(self, *_: Any, optimizer: Any = None, **__: Any) -> None:
            self.optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it

    catch = Catch()
    monkeypatch.setattr(trainer, "DEFAULT_CALLBACKS", [*trainer.DEFAULT_CALLBACKS, catch])
    settings = SETTINGS.model_copy(update={"rank": 512, "alpha": 512, "epochs": 1, "learning_rate": 1e-4})
    fine_tune.run(small_base, Dataset(small_dataset, MISSION), tmp_path / "adapter", tmp_path / "work", settings, 256)
    optimizer = catch.optimizer
    assert type(optimizer).__module__.startswith("bitsandbytes")
    assert optimizer.is_paged
    states = [state for state in optimizer.state.values() if state["state1"].numel() >= 100_000]
    assert states
    assert all(state["state1"].is_paged and state["state2"].is_paged for state in states)


def test_evaluation_answers_like_the_cpu(small_base: Path, small_frames: list[Any]) -> None:
    prompts = [user_text(MISSION, None)] * len(small_frames)
    settings = EvaluateSettings(max_new_tokens=8)
    backend = TransformersBackend.load(small_base, MISSION, settings, 256)
    assert backend._model.device.type == "cuda"
    processor = load_processor(small_base, 256)
    cpu = load_model(small_base, dtype="float32")
    expected = [score[0] for score in answer_log_probabilities(cpu, processor, small_frames, prompts, ["{"] * 8)]
    found = [
        score[0] for score in answer_log_probabilities(backend._model, processor, small_frames, prompts, ["{"] * 8)
    ]
    assert [float(value) for value in found] == pytest.approx([float(value) for value in expected], abs=0.02)
    first, second = (backend.answer(small_frames, prompts) for _ in range(2))
    assert [answer.text for answer in first] == [answer.text for answer in second]


def test_an_interrupted_training_goes_on(small_base: Path, small_dataset: Path, tmp_path: Path) -> None:
    first = fine_tune.run(small_base, Dataset(small_dataset, MISSION), tmp_path / "a", tmp_path / "work", SETTINGS, 256)
    checkpoints = sorted((tmp_path / "work" / CHECKPOINTS).glob("checkpoint-*"))
    state = json.loads((checkpoints[-1] / "trainer_state.json").read_text())
    assert state["global_step"] == first["steps"]
    second = fine_tune.run(
        small_base, Dataset(small_dataset, MISSION), tmp_path / "b", tmp_path / "work", SETTINGS, 256
    )
    assert second["resumed_from_step"] == first["steps"]
    assert second["seconds_per_sample"] is None


def test_a_small_model_takes_a_whole_step_at_once_without_checkpointing(
    small_base: Path, small_dataset: Path, tmp_path: Path
) -> None:
    settings = FineTuneSettings(epochs=1, learning_rate=1e-2, dropout=0.0)  # 1 x 16 with checkpointing
    losses = {}
    for fill in (True, False):
        out, work = tmp_path / f"adapter-{fill}", tmp_path / f"work-{fill}"
        figures = fine_tune.run(
            small_base, Dataset(small_dataset, MISSION), out, work, settings.model_copy(update={"fill_gpu": fill}), 256
        )
        assert (figures["micro_batch_size"], figures["gradient_checkpointing"]) == ((16, False) if fill else (1, True))
        losses[fill] = figures["eval_losses"]
    # The mean over batches of 16 and of 1 weighs the tokens differently (0.1 % here); the rest is 16-bit rounding.
    assert losses[True] == pytest.approx(losses[False], rel=0.02)
