from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from orion_triage.errors import OrionError
from orion_triage.mission.prompt import user_text
from orion_triage.models import lfm2_vl
from orion_triage.models.generate import vision_features
from orion_triage.models.load import load_model, load_processor
from orion_triage.train.preflight import preflight
from tests.conftest import MISSION


@pytest.fixture(scope="module")
def processor(small_base: Path) -> Any:
    return load_processor(small_base, 256)


@pytest.fixture(scope="module")
def reference(small_base: Path, processor: Any, small_frames: list[Image.Image]) -> Any:
    return vision_features(load_model(small_base, dtype="float16"), processor, small_frames)


def test_a_sound_four_bit_model_passes(small_base: Path, processor: Any, reference: Any, small_frames: Any) -> None:
    model = load_model(small_base, dtype="float32", four_bit=True)
    figures = preflight(model, reference, processor, small_frames, user_text(MISSION, None))
    assert figures["frames"] == 8
    assert figures["smallest_vision_cosine"] > 0.999
    assert figures["smallest_logit_move"] > 0.01


@pytest.mark.parametrize(
    ("skipped", "named"),
    [
        (None, "patch_embedding"),
        (["vision_tower"], "patch_embedding"),  # matches nothing since transformers 5
        (["model.vision_tower", "model.multi_modal_projector"], "lm_head"),
    ],
)
def test_four_bits_where_pixels_or_verdicts_pass_are_refused(
    small_base: Path,
    processor: Any,
    reference: Any,
    small_frames: Any,
    monkeypatch: pytest.MonkeyPatch,
    skipped: list[str] | None,
    named: str,
) -> None:
    # The published recipe's fault, planted.
    monkeypatch.setattr(lfm2_vl, "KEPT_IN_16_BIT", skipped)
    model = load_model(small_base, dtype="float32", four_bit=True)
    with pytest.raises(OrionError, match=rf"quantized, for example \S*{named}: "):
        preflight(model, reference, processor, small_frames, user_text(MISSION, None))


def test_bytes_in_a_floating_type_are_refused_too(
    small_base: Path, processor: Any, reference: Any, small_frames: Any
) -> None:
    import torch
    from transformers import BitsAndBytesConfig, Lfm2VlForConditionalGeneration

    hidden = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage=torch.bfloat16)
    model = Lfm2VlForConditionalGeneration.from_pretrained(
        small_base, dtype=torch.float32, quantization_config=hidden, device_map={"": "cpu"}
    )
    embedding = next(module for name, module in model.named_modules() if name.endswith("patch_embedding"))
    assert embedding.weight.dtype.is_floating_point  # a check of the type alone would pass
    with pytest.raises(OrionError, match=r"for example \S*patch_embedding: "):
        preflight(model, reference, processor, small_frames, user_text(MISSION, None))


def test_other_vision_weights_are_refused(other_base: Path, processor: Any, reference: Any, small_frames: Any) -> None:
    model = load_model(other_base, dtype="float32")
    said = r"frame \d have a cosine of -?0\.\d+ with those of the base in float32; 0\.99 is needed"
    with pytest.raises(OrionError, match=said):
        preflight(model, reference, processor, small_frames, user_text(MISSION, None))


def test_features_that_overflow_are_refused_with_the_precision_that_does_not(
    small_base: Path, processor: Any, reference: Any, small_frames: Any
) -> None:
    import torch

    model = load_model(small_base, dtype="float16")
    with torch.no_grad():
        model.model.multi_modal_projector.linear_2.weight.mul_(60_000)
        model.model.multi_modal_projector.linear_2.weight.mul_(1_000)
    with pytest.raises(OrionError, match="the vision features are not finite in float16") as refused:
        preflight(model, reference, processor, small_frames, user_text(MISSION, None))
    assert "fine_tune.precision=bfloat16" in refused.value.fix


def test_a_model_that_ignores_the_image_is_refused(
    small_base: Path, processor: Any, reference: Any, small_frames: Any
) -> None:
    import torch

    model = load_model(small_base, dtype="float32")
    with torch.no_grad():  # features stay as they are, but attention no longer carries them to the answer
        for layer in model.model.language_model.layers:
            if hasattr(layer, "self_attn"):
                layer.self_attn.out_proj.weight.zero_()
    with pytest.raises(OrionError, match="replacing frame 1 by the next one changes no logit"):
        preflight(model, reference, processor, small_frames, user_text(MISSION, None))
