"""The published LFM2.5-VL shapes, as configurations: what a rehearsal builds with random weights.

Read from the models' configurations on the Hub; the parameter counts are those of the published weights.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import Lfm2VlConfig

_ATTENTION_LAYERS = frozenset({2, 5, 8, 10, 12, 14})  # of 16; the others are short-conv blocks
VOCABULARY = 65_536


@dataclass(frozen=True)
class Shape:
    """Widths of one model; `feed_forward` is the configuration's value, of which two thirds are used."""

    parameters: int
    text_width: int
    feed_forward: int
    text_heads: int
    key_value_heads: int
    vision_width: int
    vision_layers: int
    vision_heads: int
    vision_feed_forward: int
    projector_width: int


SHAPES = {
    "lfm2.5-vl-1.6b": Shape(1_596_625_904, 2048, 12_288, 32, 8, 1152, 27, 16, 4304, 2048),
    "lfm2.5-vl-450m": Shape(450_816_512, 1024, 6656, 16, 8, 768, 12, 12, 3072, 2560),
}


def make_config(shape: Shape) -> "Lfm2VlConfig":
    """The shape as transformers' configuration, with LFM2's token numbers."""
    from transformers import Lfm2VlConfig

    text: dict[str, Any] = {
        "model_type": "lfm2",
        "architectures": ["Lfm2ForCausalLM"],  # llama.cpp's converter asks for it
        "vocab_size": VOCABULARY,
        "hidden_size": shape.text_width,
        "intermediate_size": shape.feed_forward,
        "block_auto_adjust_ff_dim": True,
        "block_ffn_dim_multiplier": 1.0,
        "block_multiple_of": 256,
        "num_hidden_layers": 16,
        "layer_types": ["full_attention" if layer in _ATTENTION_LAYERS else "conv" for layer in range(16)],
        "num_attention_heads": shape.text_heads,
        "num_key_value_heads": shape.key_value_heads,
        "max_position_embeddings": 128_000,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        "conv_L_cache": 3,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 7,
        "tie_word_embeddings": True,
    }
    vision: dict[str, Any] = {
        "model_type": "siglip2_vision_model",
        "hidden_size": shape.vision_width,
        "intermediate_size": shape.vision_feed_forward,
        "num_hidden_layers": shape.vision_layers,
        "num_attention_heads": shape.vision_heads,
        "num_patches": 256,
        "patch_size": 16,
        "vision_use_head": False,
    }
    return Lfm2VlConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=8,
        projector_hidden_size=shape.projector_width,
        projector_use_layernorm=False,
        downsample_factor=2,
        tie_word_embeddings=True,
    )
