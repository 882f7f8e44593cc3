"""Everything that is LFM2-VL's (LFM2-VL and LFM2.5-VL); see `models.family.Family` for what each name means.

The language model has short-conv and attention layers (LFM2), the vision tower is SigLIP2 NaFlex, and the projector
merges 2x2 patches of 16 pixels: a frame of 512 pixels is 1,024 patches and 256 image tokens.
"""

import importlib.util
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orion_triage.errors import OrionError
from orion_triage.llama_cpp.client import Turn
from orion_triage.safe.reading import shown

if TYPE_CHECKING:
    import torch
    from transformers import ProcessorMixin

NAME = "LFM2-VL"
MODEL_TYPE = "lfm2_vl"
PROCESSOR = "Lfm2VlProcessor"
CARD_TAG = "lfm2-vl"
LOADING = (
    "Load it with `Lfm2VlForConditionalGeneration` of transformers 5.1 or newer. Older versions load LFM2.5-VL without "
    "an error and with another\nprojector."
)

TOWERS = {"language_model": "text", "vision_tower": "vision", "multi_modal_projector": "projector"}
# The attention output is called `out_proj` in LFM2 and SigLIP2, and so is a module of LFM2's short-conv blocks. The
# recipe's `o_proj` means only the attention output.
TARGETS: dict[str, tuple[str, ...]] = {"o_proj": ("self_attn.out_proj",)}
LANGUAGE_LAYERS: tuple[str, ...] = (
    "conv.in_proj",
    "conv.out_proj",
    "feed_forward.w1",
    "feed_forward.w2",
    "feed_forward.w3",
)
# Since transformers 5, names are matched from the start of the module path, so "vision_tower" alone matches nothing.
# Without "lm_head", the tied head would become 4-bit too.
KEPT_IN_16_BIT = ["lm_head", "model.vision_tower", "model.multi_modal_projector"]
PATCH_EMBEDDING = "patch_embedding"

START_OF_TEXT, START_OF_TURN, END_OF_TURN, IMAGE = "<|startoftext|>", "<|im_start|>", "<|im_end|>", "<image>"
TURN = Turn(f"{START_OF_TURN}user\n", f"{END_OF_TURN}\n{START_OF_TURN}assistant\n")
# ChatML with the image token in the place of the image part, and nothing between the parts.
CHAT_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
    "{%- if message['content'] is string -%}"
    "{{- message['content'] -}}"
    "{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{- '<image>' -}}"
    "{%- elif part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{{- '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
AFTER_IMAGE = ""
VISION_KEYS: tuple[str, ...] = ("pixel_values", "spatial_shapes", "pixel_attention_mask")
TAKES_ANY_FRAME_SIZE = True

LANDMARKS: tuple[tuple[str, ...], ...] = (
    ("model.language_model.embed_tokens.weight",),
    ("model.vision_tower.vision_model.embeddings.patch_embedding.weight",),
    ("model.multi_modal_projector.linear_1.weight",),
)
# LFM2 splits text like Llama 3; llama.cpp calls this pre-tokenizer `lfm2`.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZER = "lfm2"
GGUF_ARCHITECTURES: tuple[str, ...] = ("lfm2",)
GGUF_NOT_MATRICES: tuple[str, ...] = ("shortconv.conv",)
CONVERTER_CODE = ""

# What is written into this project beside the sizes: other models of the family have other sizes, and work by them.
# (part of config.json, key, values, what depends on it)
_FIXED: tuple[tuple[str, str, tuple[Any, ...], str], ...] = (
    ("text_config", "model_type", ("lfm2",), "adapter targets and llama.cpp's file are those of LFM2's dense layers"),
    ("vision_config", "model_type", ("siglip2_vision_model",), "llama.cpp's mmproj is that of SigLIP2"),
    ("vision_config", "patch_size", (16,), "a frame of 512 pixels is 1,024 patches and 256 image tokens"),
    ("", "downsample_factor", (2,), "a frame of 512 pixels is 1,024 patches and 256 image tokens"),
    ("vision_config", "num_channels", (3,), "frames are RGB"),
    # llama.cpp reads no such key: it would compute as usual, and answer otherwise than transformers without an error
    # (ReLU in the projector: 0.11 of a token's log-probability; the pair's files say nothing).
    ("", "projector_hidden_act", ("gelu",), "llama.cpp computes GELU there"),
    ("", "projector_bias", (True,), "llama.cpp adds biases there"),
    ("", "vision_feature_layer", (-1,), "llama.cpp takes the last layer"),
    ("vision_config", "hidden_act", ("gelu_pytorch_tanh",), "llama.cpp computes GELU by its tanh form there"),
    ("text_config", "conv_bias", (False,), "llama.cpp's short convolutions have no biases"),
)
_LAYERS = ("conv", "full_attention")
_PIXELS_PER_TOKEN = 32  # of each side: patches of 16 pixels, merged 2x2


def check(path: Path, config: dict[str, Any]) -> None:
    """See `Family.check`; a missing key is as usual."""
    for part, key, known, reason in _FIXED:
        section = config.get(part, {}) if part else config
        value = section.get(key) if isinstance(section, dict) else None
        if value is not None and value not in known:
            name = f"{part}.{key}" if part else key
            raise OrionError(
                f"{path}: {name} is {shown(value)}, not {known[0]}: {reason}.",
                "Use a model with the architecture of LFM2.5-VL (450M, 1.6B, 3B).",
            )
    text = config.get("text_config")
    layers = text.get("layer_types") if isinstance(text, dict) else None
    if isinstance(layers, list) and (odd := next((kind for kind in layers if kind not in _LAYERS), None)) is not None:
        raise OrionError(
            f"{path}: text_config.layer_types has {shown(odd)}; known are {' and '.join(_LAYERS)}.",
            "Use a model with the architecture of LFM2.5-VL (450M, 1.6B, 3B).",
        )


def image_tokens(frame_size: int) -> int:
    return (frame_size // _PIXELS_PER_TOKEN) ** 2


def set_frame_size(processor: "ProcessorMixin", config: dict[str, Any], frame_size: int) -> None:
    """See `Family.set_frame_size`.

    With splitting on, a 256x256 frame would be padded to 1024 patches and cost as much as 512x512.
    """
    if frame_size % _PIXELS_PER_TOKEN:
        raise OrionError(f"frame size {frame_size} is not a multiple of {_PIXELS_PER_TOKEN}.", "Use 256, 384 or 512.")
    tokens = image_tokens(frame_size)
    images = processor.image_processor
    images.do_image_splitting = False
    images.min_image_tokens = min(64, tokens)
    images.max_image_tokens = tokens
    images.tile_size = frame_size
    images.size = {"height": frame_size, "width": frame_size}
    images.max_num_patches = tokens * images.downsample_factor**2


@cache
def model_class() -> type:
    """See `Family.model_class`."""
    import torch
    import transformers

    from orion_triage.models.shared_image import SharedImages

    class Lfm2VlForConditionalGeneration(SharedImages, transformers.Lfm2VlForConditionalGeneration):  # type: ignore[misc]
        vision_keys = VISION_KEYS

        def look(
            self, pixel_values: "torch.Tensor", spatial_shapes: "torch.Tensor", pixel_attention_mask: "torch.Tensor"
        ) -> "torch.Tensor":
            features = self.get_image_features(
                pixel_values=pixel_values, spatial_shapes=spatial_shapes, pixel_attention_mask=pixel_attention_mask
            )
            return torch.stack(list(features.pooler_output))

    return Lfm2VlForConditionalGeneration


def has_fast_convolution() -> bool:
    """Whether causal-conv1d is installed, whose GPU kernel transformers uses for LFM2's short convolutions."""
    return importlib.util.find_spec("causal_conv1d") is not None


def kernels(on_gpu: bool) -> dict[str, str]:
    return {"short_convolution": "causal-conv1d" if on_gpu and has_fast_convolution() else "PyTorch"}


def plain_name(name: str) -> str:
    """The short name of a module or tensor; the Hub, older adapters and transformers 5.1 use a longer one."""
    return name.replace("vision_tower.vision_model.", "vision_tower.")


def file_name(name: str) -> str:
    """The Hub's name of a parameter in transformers 5, which llama.cpp's converter expects."""
    prefix = "model.vision_tower."
    inside = name.startswith(prefix) and not name.startswith(prefix + "vision_model.")
    return name.replace(prefix, prefix + "vision_model.", 1) if inside else name


def has_tied_head(config: dict[str, Any]) -> bool:
    return True


def name_architectures(config: dict[str, Any]) -> None:
    config["architectures"] = ["Lfm2VlForConditionalGeneration"]
    config["text_config"]["architectures"] = ["Lfm2ForCausalLM"]
