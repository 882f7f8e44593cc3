from pathlib import Path
from typing import Any

import pytest

from orion_triage.errors import OrionError
from orion_triage.models import lfm2_vl
from orion_triage.models.adapter import adapter_census, resolve_targets
from orion_triage.models.load import load_model

RECIPE = ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.fixture(scope="module")
def model(small_base: Path) -> Any:
    return load_model(small_base, dtype="float32")


def test_the_recipes_names_are_the_attention_projections(model: Any) -> None:
    names, census = resolve_targets(model, RECIPE)
    assert census == {name: {"text": 1, "vision": 3, "projector": 0} for name in RECIPE}
    assert len(names) == len(set(names)) == 16
    assert "model.language_model.layers.1.self_attn.out_proj" in names
    assert not [name for name in names if ".conv." in name]  # layer 0 is a short-conv block with its own out_proj


def test_four_bit_layers_count_too(small_base: Path) -> None:
    quantized = load_model(small_base, dtype="float32", four_bit=True)
    assert resolve_targets(quantized, RECIPE)[1]["o_proj"] == {"text": 1, "vision": 3, "projector": 0}


def test_the_full_size_shapes_have_six_and_twenty_seven_of_each(small_base: Path) -> None:
    """LFM2.5-VL-1.6B's layer list on the meta device: no memory, real module names."""
    import torch
    from transformers import Lfm2VlConfig, Lfm2VlForConditionalGeneration

    config = Lfm2VlConfig.from_pretrained(small_base)
    attention = {2, 5, 8, 10, 12, 14}
    config.text_config.layer_types = ["full_attention" if n in attention else "conv" for n in range(16)]
    config.text_config.num_hidden_layers = 16
    config.vision_config.num_hidden_layers = 27
    with torch.device("meta"):
        large = Lfm2VlForConditionalGeneration(config)
    names, census = resolve_targets(large, RECIPE)
    assert census == {name: {"text": 6, "vision": 27, "projector": 0} for name in RECIPE}
    assert len(names) == 4 * 33

    names, census = resolve_targets(large, RECIPE, "language-attention")
    assert census == {name: {"text": 6, "vision": 0, "projector": 0} for name in RECIPE}
    assert len(names) == 4 * 6
    names, census = resolve_targets(large, RECIPE, "language-all")
    assert {name: towers["text"] for name, towers in census.items()} == {
        **dict.fromkeys(RECIPE, 6),
        **dict.fromkeys(("conv.in_proj", "conv.out_proj"), 10),
        **dict.fromkeys(("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"), 16),
    }
    assert len(names) == 4 * 6 + 2 * 10 + 3 * 16
    assert all(name.startswith("model.language_model.") for name in names)


def test_dotted_and_bare_names(model: Any) -> None:
    assert resolve_targets(model, ["conv.in_proj"])[0] == ["model.language_model.layers.0.conv.in_proj"]
    assert resolve_targets(model, ["linear_1"])[1] == {"linear_1": {"text": 0, "vision": 0, "projector": 1}}
    assert resolve_targets(model, ["out_proj"])[1]["out_proj"] == {"text": 2, "vision": 3, "projector": 0}


@pytest.mark.parametrize(
    ("names", "idle"),
    [
        (["q_proj", "qkv_proj"], "qkv_proj"),
        (["lm_head"], "lm_head"),
        ([], "an empty list"),
        (["proj"], "proj"),
    ],
)
def test_a_name_that_matches_nothing_is_refused(model: Any, names: list[str], idle: str) -> None:
    with pytest.raises(OrionError, match=rf"{idle} matches no module.*self_attn\.out_proj"):
        resolve_targets(model, names)


def test_census_of_a_finished_adapter_names_what_was_never_trained() -> None:
    tensors = {
        f"base_model.model.model.{tower}.layers.{layer}.self_attn.{name}.lora_{matrix}.weight": None
        for tower in ("language_model", "vision_tower.vision_model.encoder")
        for layer in range(3)
        for name in ("q_proj", "k_proj", "v_proj")
        for matrix in "AB"
    }
    census, warnings = adapter_census(RECIPE, tensors, lfm2_vl)
    assert census["q_proj"] == {"text": 3, "vision": 3, "projector": 0}
    assert census["o_proj"] == {"text": 0, "vision": 0, "projector": 0}
    assert warnings == [
        "the adapter's target 'o_proj' has no tensors: it is listed in target_modules but was not trained"
    ]
