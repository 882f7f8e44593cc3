"""Everything that is InternVL's (InternVL3 with a Qwen2 language model, in the checkpoints of transformers, "-hf").

The vision tower has learned positions for one image size, so frames have exactly this size: 448 pixels are 1,024
patches of 14 pixels, merged 2x2 to 256 image tokens. See `models.family.Family` for what each name means.
"""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orion_triage.errors import OrionError
from orion_triage.llama_cpp.client import Turn
from orion_triage.safe.reading import shown

if TYPE_CHECKING:
    import torch
    from transformers import ProcessorMixin

NAME = "InternVL"
MODEL_TYPE = "internvl"
PROCESSOR = "InternVLProcessor"
CARD_TAG = "internvl"
LOADING = "Load it with `InternVLForConditionalGeneration` of transformers 5.1 or newer."

TOWERS = {"language_model": "text", "vision_tower": "vision", "multi_modal_projector": "projector"}
TARGETS: dict[str, tuple[str, ...]] = {"o_proj": ("self_attn.o_proj", "attention.projection_layer")}
LANGUAGE_LAYERS: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
KEPT_IN_16_BIT = ["lm_head", "model.vision_tower", "model.multi_modal_projector"]
PATCH_EMBEDDING = "patch_embeddings"

END_OF_TURN = "<|im_end|>"
TURN = Turn("<|im_start|>user\n", f"{END_OF_TURN}\n<|im_start|>assistant\n")
CHAT_TEMPLATE = ""
AFTER_IMAGE = "\n"
VISION_KEYS: tuple[str, ...] = ("pixel_values",)
TAKES_ANY_FRAME_SIZE = False

LANDMARKS: tuple[tuple[str, ...], ...] = (
    ("model.language_model.embed_tokens.weight", "language_model.model.embed_tokens.weight",
     "language_model.embed_tokens.weight"),
    ("model.vision_tower.embeddings.patch_embeddings.projection.weight",
     "vision_tower.embeddings.patch_embeddings.projection.weight"),
    ("model.multi_modal_projector.linear_1.weight", "multi_modal_projector.linear_1.weight"),
)  # fmt: skip
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZER = "qwen2"
GGUF_ARCHITECTURES: tuple[str, ...] = ("qwen2",)
GGUF_NOT_MATRICES: tuple[str, ...] = ()
# llama.cpp b10605 appends the class token to the patches (tools/mtmd/models/internvl.cpp), but adds the positions in
# the checkpoint's order, where the class token's is the first: each patch would get its neighbour's (as in llava,
# ggml-org/llama.cpp#25814). Attention does not depend on the order, so moving the first position to the end is exact.
CONVERTER_CODE = """
import torch
from conversion.internvl import InternVisionModel
as_published = InternVisionModel.modify_tensors
def modify_tensors(self, data_torch, name, bid):
    if "position_embedding" in name:
        data_torch = torch.cat([data_torch[:, 1:], data_torch[:, :1]], dim=1)
    yield from as_published(self, data_torch, name, bid)
InternVisionModel.modify_tensors = modify_tensors
"""

# (part of config.json, key, value, what depends on it)
_FIXED: tuple[tuple[str, str, Any, str], ...] = (
    ("text_config", "model_type", "qwen2", "adapter targets and llama.cpp's file are those of Qwen2"),
    ("vision_config", "model_type", "internvl_vision", "llama.cpp's mmproj is that of InternVL"),
    ("vision_config", "norm_type", "layer_norm", "llama.cpp has RMS norms only in the tower of 6 billion parameters"),
    ("vision_config", "use_qk_norm", False, "llama.cpp has it only in the tower of 6 billion parameters"),
    ("vision_config", "use_absolute_position_embeddings", True, "llama.cpp needs the table of positions"),
    ("", "downsample_ratio", 0.5, "four patches are one image token"),
    ("", "vision_feature_layer", -1, "llama.cpp takes the last layer"),
)


def check(path: Path, config: dict[str, Any]) -> None:
    """See `Family.check`; a missing key is as usual."""
    for part, key, known, reason in _FIXED:
        section = config.get(part, {}) if part else config
        value = section.get(key, known) if isinstance(section, dict) else known
        if value != known:
            name = f"{part}.{key}" if part else key
            raise OrionError(
                f"{path}: {name} is {shown(value)}, not {known}: {reason}.",
                "Use a model with the architecture of InternVL3-1B-hf.",
            )


def set_frame_size(processor: "ProcessorMixin", config: dict[str, Any], frame_size: int) -> None:
    """See `Family.set_frame_size`."""
    vision = config.get("vision_config", {})
    size, patch = _side(vision.get("image_size", 448)), _side(vision.get("patch_size", 14))
    if frame_size != size:
        raise OrionError(
            f"base.frame_size is {frame_size}, but the model takes frames of {size} pixels.",
            f"Set base.frame_size={size}.",
        )
    images = processor.image_processor
    images.size = {"height": size, "width": size}
    images.crop_to_patches, images.min_patches, images.max_patches = False, 1, 1
    processor.image_seq_length = (size // patch // 2) ** 2


def _side(value: Any) -> int:
    return int(value[0] if isinstance(value, (list, tuple)) else value)


@cache
def model_class() -> type:
    """See `Family.model_class`."""
    import transformers

    from orion_triage.models.shared_image import SharedImages

    class InternVLForConditionalGeneration(SharedImages, transformers.InternVLForConditionalGeneration):  # type: ignore[misc]
        vision_keys = VISION_KEYS

        @classmethod
        def is_custom_code(cls) -> bool:
            """Let transformers translate the head's name in checkpoints, as it does for its own class only."""
            return False

        def look(self, pixel_values: "torch.Tensor") -> "torch.Tensor":
            features: torch.Tensor = self.get_image_features(pixel_values=pixel_values).pooler_output
            return features

    return InternVLForConditionalGeneration


def kernels(on_gpu: bool) -> dict[str, str]:
    return {}


def plain_name(name: str) -> str:
    """The name in transformers 5, whichever version saved the checkpoint or the adapter."""
    name = name.removeprefix("model.")
    name = name.replace("language_model.lm_head", "lm_head").replace("language_model.model.", "language_model.")
    return name if name.startswith("lm_head") else f"model.{name}"


file_name = plain_name  # llama.cpp's converter knows the same


def has_tied_head(config: dict[str, Any]) -> bool:
    return bool(config.get("tie_word_embeddings", True))


def name_architectures(config: dict[str, Any]) -> None:
    config["architectures"] = ["InternVLForConditionalGeneration"]
    config["text_config"]["architectures"] = ["Qwen2ForCausalLM"]
    config["vision_config"]["architectures"] = ["InternVisionModel"]  # the converter's name for the tower
