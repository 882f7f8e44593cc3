"""Make LFM2-VL checkpoints: the shipped base's shape, the published shapes, a matching tokenizer.

The shipped base has short-conv and attention layers, a SigLIP2 NaFlex tower, the pixel-unshuffle projector, and a
byte-level BPE tokenizer with LFM2's special tokens and chat template. Only the sizes differ from LFM2.5-VL.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orion_triage.models.checkpoint import write_tensors
from orion_triage.models.lfm2_vl import (
    CHAT_TEMPLATE,
    END_OF_TURN,
    IMAGE,
    SPLIT_PATTERN,
    START_OF_TEXT,
    START_OF_TURN,
    file_name,
    image_tokens,
)

if TYPE_CHECKING:
    from transformers import Lfm2VlConfig, PreTrainedTokenizerFast
    from transformers.models.lfm2_vl import Lfm2VlProcessor

# In LFM2's order: padding 0, start 1, end 2, chat turns 6 and 7.
SPECIAL_TOKENS = [
    "<|pad|>",
    START_OF_TEXT,
    "<|endoftext|>",
    "<|fim_pre|>",
    "<|fim_mid|>",
    "<|fim_suf|>",
    START_OF_TURN,
    END_OF_TURN,
    IMAGE,
    "<|image_start|>",
    "<|image_end|>",
    "<|img_thumbnail|>",
]

# Parameters at the Hub, so that nothing has to be fetched to know what a run needs (counted on the shapes below).
PUBLISHED = {"LiquidAI/LFM2.5-VL-1.6B": 1_596_625_904, "LiquidAI/LFM2.5-VL-450M": 450_816_512}
# From the published configurations on the Hub. Two thirds of the feed-forward width are used.
_ATTENTION_LAYERS = frozenset({2, 5, 8, 10, 12, 14})
_FAMILY: dict[str, Any] = {
    "layer_types": tuple("full_attention" if layer in _ATTENTION_LAYERS else "conv" for layer in range(16)),
    "two_thirds_of_feed_forward": True,
    "vocabulary": 65_536,
    "positions": 128_000,
}
SHAPES: dict[str, dict[str, Any]] = {
    "lfm2.5-vl-1.6b": _FAMILY
    | {"text_width": 2048, "text_feed_forward": 12_288, "attention_heads": 32, "key_value_heads": 8}
    | {"vision_width": 1152, "vision_layers": 27, "vision_heads": 16, "vision_feed_forward": 4304}
    | {"projector_width": 2048},
    "lfm2.5-vl-450m": _FAMILY
    | {"text_width": 1024, "text_feed_forward": 6656, "attention_heads": 16, "key_value_heads": 8}
    | {"vision_width": 768, "vision_layers": 12, "vision_heads": 12, "vision_feed_forward": 3072}
    | {"projector_width": 2560},
}

# Four of seven layers are attention; in LFM2.5-VL-1.6B, 6 of 16 are. LoRA adapts only attention. With two attention
# layers of six, fine-tuning ended at 3.7 nats per token (the training texts were also poorer: docs/log.md).
LAYER_TYPES = ("conv", "conv", "full_attention", "conv", "full_attention", "full_attention", "full_attention")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> "PreTrainedTokenizerFast":
    """A byte-level BPE tokenizer trained on `texts`, with LFM2's pre-tokenizer and special tokens.

    `vocab_size` includes the special tokens; multiples of 64 suit the kernels. The same texts give the same tokenizer.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START_OF_TEXT} $A",
        pair=f"{START_OF_TEXT} $A {START_OF_TEXT} $B",
        special_tokens=[(START_OF_TEXT, 1)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=START_OF_TEXT,
        eos_token=END_OF_TURN,
        pad_token="<|pad|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
        extra_special_tokens={
            "image_token": IMAGE,
            "image_start_token": "<|image_start|>",
            "image_end_token": "<|image_end|>",
            "image_thumbnail": "<|img_thumbnail|>",
        },
    )


def make_processor(tokenizer: "PreTrainedTokenizerFast", frame_size: int) -> "Lfm2VlProcessor":
    """The processor for square frames of exactly `frame_size` pixels: no resizing, tiling or padding."""
    from transformers.models import lfm2_vl

    tokens = image_tokens(frame_size)
    # Older versions of transformers 5 use the longer name.
    kind = getattr(lfm2_vl, "Lfm2VlImageProcessor", None) or lfm2_vl.Lfm2VlImageProcessorFast
    image_processor = kind(
        do_image_splitting=False,
        min_image_tokens=min(64, tokens),
        max_image_tokens=tokens,
        tile_size=frame_size,
        size={"height": frame_size, "width": frame_size},
    )
    return lfm2_vl.Lfm2VlProcessor(image_processor, tokenizer, chat_template=CHAT_TEMPLATE)


def make_config(
    tokenizer: "PreTrainedTokenizerFast",
    *,
    vocabulary: int | None = None,
    positions: int = 4096,
    text_width: int = 256,
    layer_types: tuple[str, ...] = LAYER_TYPES,
    text_feed_forward: int = 512,
    two_thirds_of_feed_forward: bool = False,
    attention_heads: int = 8,
    key_value_heads: int = 4,
    vision_width: int = 192,
    vision_layers: int = 6,
    vision_heads: int = 3,
    vision_feed_forward: int = 512,
    projector_width: int = 256,
) -> "Lfm2VlConfig":
    """LFM2-VL's configuration; K-quants need text widths that are multiples of 256.

    `two_thirds_of_feed_forward`: as in the published configurations, only two thirds of `text_feed_forward` are used.
    `vocabulary` can be larger than the tokenizer's.
    """
    from transformers import Lfm2VlConfig

    text: dict[str, Any] = {
        "model_type": "lfm2",
        "architectures": ["Lfm2ForCausalLM"],  # llama.cpp's converter needs it
        "vocab_size": vocabulary or len(tokenizer),
        "hidden_size": text_width,
        "intermediate_size": text_feed_forward,
        "block_auto_adjust_ff_dim": two_thirds_of_feed_forward,
        "num_hidden_layers": len(layer_types),
        "layer_types": list(layer_types),
        "num_attention_heads": attention_heads,
        "num_key_value_heads": key_value_heads,
        "max_position_embeddings": positions,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        "conv_L_cache": 3,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "tie_word_embeddings": True,
    }
    vision: dict[str, Any] = {
        "model_type": "siglip2_vision_model",
        "hidden_size": vision_width,
        "intermediate_size": vision_feed_forward,
        "num_hidden_layers": vision_layers,
        "num_attention_heads": vision_heads,
        "num_patches": 256,
        "patch_size": 16,
        "vision_use_head": False,
    }
    return Lfm2VlConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        projector_hidden_size=projector_width,
        projector_use_layernorm=False,
        downsample_factor=2,
        tie_word_embeddings=True,
    )


def empty_model(config: "Lfm2VlConfig") -> Any:
    """The model without memory for its weights."""
    import torch
    from transformers import Lfm2VlForConditionalGeneration

    with torch.device("meta"):
        return Lfm2VlForConditionalGeneration(config)


def save_base(model: Any, processor: "Lfm2VlProcessor", folder: Path) -> None:
    """Write the checkpoint in the Hub's layout, in float16."""
    import torch

    tensors = {file_name(name): tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(
        folder,
        {name: tensor.shape for name, tensor in tensors.items()},  # without the head: tied to the token embedding
        "float16",
        lambda name: tensors[name].detach().to("cpu", torch.float16),
        description="saving",
    )
    save_settings(model, processor, "float16", folder)


def save_settings(model: Any, processor: "Lfm2VlProcessor", dtype: str, folder: Path) -> None:
    """Write all files of a checkpoint except its tensors."""
    from transformers import GenerationConfig

    model.config.architectures = ["Lfm2VlForConditionalGeneration"]
    model.config.dtype = dtype
    model.config.save_pretrained(folder)
    tokenizer = processor.tokenizer
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    ).save_pretrained(folder)
    processor.save_pretrained(folder)
