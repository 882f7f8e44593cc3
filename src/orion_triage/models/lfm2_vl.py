"""The shape of the small base: LFM2-VL's classes with about 7 M parameters, and a matching tokenizer.

Short-conv and attention layers, a SigLIP2 NaFlex tower, the pixel-unshuffle projector, and a byte-level BPE tokenizer
with LFM2's special tokens and chat template. Only the sizes differ from LFM2.5-VL.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orion_triage.models.checkpoint import hub_name, write_tensors

if TYPE_CHECKING:
    from transformers import Lfm2VlConfig, PreTrainedTokenizerFast
    from transformers.models.lfm2_vl import Lfm2VlProcessor

# In LFM2's order: padding 0, start 1, end 2, chat turns 6 and 7.
SPECIAL_TOKENS = [
    "<|pad|>",
    "<|startoftext|>",
    "<|endoftext|>",
    "<|fim_pre|>",
    "<|fim_mid|>",
    "<|fim_suf|>",
    "<|im_start|>",
    "<|im_end|>",
    "<image>",
    "<|image_start|>",
    "<|image_end|>",
    "<|img_thumbnail|>",
]

# LFM2 splits text like Llama 3; llama.cpp calls this pre-tokenizer `lfm2`.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

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
        single="<|startoftext|> $A",
        pair="<|startoftext|> $A <|startoftext|> $B",
        special_tokens=[("<|startoftext|>", 1)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|startoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
        extra_special_tokens={
            "image_token": "<image>",
            "image_start_token": "<|image_start|>",
            "image_end_token": "<|image_end|>",
            "image_thumbnail": "<|img_thumbnail|>",
        },
    )


def make_processor(tokenizer: "PreTrainedTokenizerFast", frame_size: int) -> "Lfm2VlProcessor":
    """The processor for square frames of exactly `frame_size` pixels: no resizing, tiling or padding."""
    from transformers.models import lfm2_vl

    image_tokens = (frame_size // 32) ** 2
    # Older versions of transformers 5 use the longer name.
    kind = getattr(lfm2_vl, "Lfm2VlImageProcessor", None) or lfm2_vl.Lfm2VlImageProcessorFast
    image_processor = kind(
        do_image_splitting=False,
        min_image_tokens=min(64, image_tokens),
        max_image_tokens=image_tokens,
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
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        projector_hidden_size=projector_width,
        projector_use_layernorm=False,
        downsample_factor=2,
        tie_word_embeddings=True,
    )


def save_base(model: Any, processor: "Lfm2VlProcessor", folder: Path) -> None:
    """Write the checkpoint in the Hub's layout, in float16."""
    import torch

    tensors = {hub_name(name): tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
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
