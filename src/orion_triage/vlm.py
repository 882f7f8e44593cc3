"""The vision-language model: load it, render one chat turn, encode batches, generate, score.

One owner for everything that training, fusing and evaluation must do alike: the bytes of a turn, the
processor that neither resizes nor tiles, the labels, greedy answers and verdict log-probabilities.
"""

import logging
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orion_triage import chat_template, hub
from orion_triage.checkpoint import check_names
from orion_triage.errors import OrionError
from orion_triage.files import sha256_of_file
from orion_triage.manifest import sha256_of_listing
from orion_triage.reading import read_object, shown
from orion_triage.triage import IMAGE_PLACEHOLDER

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from PIL import Image
    from transformers import BatchFeature
    from transformers.models.lfm2_vl import Lfm2VlProcessor

TINY_BASE = "orion-tiny"
TINY_BASE_FOLDER = Path(__file__).parent / "tiny_base" / "weights"

END_OF_TURN = "<|im_end|>"
IGNORED = -100  # torch's cross entropy leaves these labels out

# Names are matched from the start of the module path since transformers 5, so "vision_tower" alone skips
# nothing; without "lm_head" the tied head becomes 4-bit too.
KEPT_IN_16_BIT = ["lm_head", "model.vision_tower", "model.multi_modal_projector"]


def resolve_base(model: str) -> Path:
    """The folder of a base model in the Hub's layout: the shipped one for "orion-tiny", a local one, or a Hub id's.

    Raises OrionError unless it is an LFM2-VL checkpoint with SafeTensors weights under their published names.
    """
    if model != TINY_BASE:
        folder = hub.locate(model, "model")
    elif not (folder := TINY_BASE_FOLDER).is_dir():
        raise OrionError(f"the shipped base is missing from {folder}.", "Install the package again.")
    config_path = folder / "config.json"
    try:
        model_type = read_object(config_path).get("model_type")
    except FileNotFoundError:
        raise OrionError(
            f"{folder} has no config.json.", "Point base.model at a model folder in the Hub's layout."
        ) from None
    if model_type != "lfm2_vl":
        raise OrionError(
            f"{config_path}: model_type is {shown(model_type)}, not 'lfm2_vl'.",
            "The pipeline fine-tunes LFM2-VL models only.",
        )
    if not list(folder.glob("*.safetensors")):
        pickles = [path.name for path in (*folder.glob("*.bin"), *folder.glob("*.pt"))]
        found = f"only {', '.join(pickles)}, which can run code when opened" if pickles else "none"
        raise OrionError(f"{folder} needs weights as *.safetensors; found {found}.", "Fetch the SafeTensors file.")
    check_names(folder)
    return folder


def base_name(folder: Path) -> str:
    """A name that means something on another machine, for adapter_config.json and the report."""
    if folder.resolve() == TINY_BASE_FOLDER.resolve():
        return TINY_BASE
    return hub.id_of(folder) or folder.resolve().name


def fingerprint(folder: Path) -> str:
    """sha256 of `model.safetensors`; of the listing of all shards when there are several."""
    shards = sorted(folder.glob("*.safetensors"))
    if len(shards) == 1:
        return sha256_of_file(shards[0])
    return sha256_of_listing({shard.name: sha256_of_file(shard) for shard in shards})


def load_processor(folder: Path, frame_size: int) -> "Lfm2VlProcessor":
    """The folder's processor, set to frames of exactly `frame_size` x `frame_size` pixels.

    One tile, no resize, no padding patches: (frame_size / 32)^2 image tokens. The padding matters: with
    splitting on, a 256x256 frame is padded to 1024 patches and costs as much as 512x512.
    """
    hush_kernel_advice()
    from transformers.models.lfm2_vl import Lfm2VlProcessor

    if frame_size % 32:
        raise OrionError(f"frame size {frame_size} is not a multiple of 32.", "Use 256, 384 or 512.")
    try:
        # Not left to its default, which asks on the terminal whether code that the folder names may run.
        processor = Lfm2VlProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exception, and a wrong type anywhere in these files a TypeError
        raise OrionError(f"{folder} has no usable processor: {error}.", "Fetch the model again.") from error
    if not processor.chat_template:
        raise OrionError(f"{folder} has no chat template.", "Copy chat_template.jinja from the base model.")
    if not isinstance(processor.chat_template, str):
        raise OrionError(f"{folder} has several chat templates.", "Copy chat_template.jinja from the base model.")
    chat_template.check(processor.chat_template, str(folder))
    image_tokens = (frame_size // 32) ** 2
    images = processor.image_processor
    images.do_image_splitting = False
    images.min_image_tokens = min(64, image_tokens)
    images.max_image_tokens = image_tokens
    images.tile_size = frame_size
    images.size = {"height": frame_size, "width": frame_size}
    images.max_num_patches = image_tokens * images.downsample_factor**2
    return processor


def load_model(
    folder: Path, *, dtype: str, four_bit: bool = False, device: str = "cpu", float_storage: bool = False
) -> Any:
    """The model in evaluation mode on `device`; `dtype` is "float16", "bfloat16", "float32", or "auto": as stored.

    As stored, a CPU maps the file into memory instead of copying it.

    With `four_bit`, the language model's linear layers are NF4 with double quantization and compute in
    `dtype`; tower, projector and head stay in `dtype`. `float_storage` keeps the packed values in tensors of `dtype`,
    which FSDP can cut up as it cannot cut up bytes. Raises OrionError when weights are missing or left over.
    """
    hush_kernel_advice()
    import torch
    from transformers import BitsAndBytesConfig, GenerationConfig

    from orion_triage.shared_image import Lfm2VlForConditionalGeneration

    torch_dtype: torch.dtype | str = dtype if dtype == "auto" else getattr(torch, dtype)
    quantization = None
    if four_bit:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch_dtype,
            bnb_4bit_quant_storage=torch_dtype if float_storage else torch.uint8,
            llm_int8_skip_modules=KEPT_IN_16_BIT,
        )
    with no_progress_bars():
        model, loading = Lfm2VlForConditionalGeneration.from_pretrained(
            folder,
            dtype=torch_dtype,
            quantization_config=quantization,
            device_map={"": device},
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(str(name) for name in loading.get(kind, ())):
            raise OrionError(
                f"{folder}: {len(names)} {kind.replace('_', ' ')} in the weights, {names[0]} first.",
                "The checkpoint does not fit its config.json: fetch it again.",
            )
    own = model.generation_config  # sampling settings left in place would change greedy answers
    model.generation_config = GenerationConfig(
        bos_token_id=own.bos_token_id,
        eos_token_id=own.eos_token_id,
        pad_token_id=own.pad_token_id,
        do_sample=False,
    )
    if device == "cpu":
        _keep_gradients_on_cpu(model)
    return model.eval()


@contextmanager
def float32_compute(model: Any) -> "Iterator[None]":
    """Compute in float32 on weights that stay in 16 bits: a block's are widened while it runs, and no longer.

    The results are those of the model loaded in float32, to the bit, at half its memory: what is widened at once is
    one layer, or the token embedding (0.5 GB at 1.6B).
    """
    import torch

    narrow: dict[int, torch.Tensor] = {}

    def widen(block: Any, inputs: Any) -> None:
        for parameter in block.parameters():
            if parameter.dtype in (torch.float16, torch.bfloat16):
                narrow[id(parameter)] = parameter.data
                parameter.data = parameter.data.float()

    def restore(block: Any, inputs: Any, output: Any) -> None:
        for parameter in block.parameters():
            if id(parameter) in narrow:
                parameter.data = narrow.pop(id(parameter))

    hooks = []
    for block in _blocks(model):
        hooks.append(block.register_forward_pre_hook(widen))
        hooks.append(block.register_forward_hook(restore, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _blocks(model: Any) -> "Iterator[Any]":
    """The layers, and every module with parameters outside them; whole, since some read a child's weight themselves."""
    from torch import nn

    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        elif any(isinstance(inner, nn.ModuleList) for inner in child.modules()):
            yield from _blocks(child)
        elif next(child.parameters(), None) is not None:
            yield child


def _keep_gradients_on_cpu(model: Any) -> None:
    """Stop bitsandbytes from packing 4-bit weights for its inference kernel.

    On CPUs with AVX512-BF16, the first forward pass in evaluation mode (the preflight, or an epoch's
    validation) packs a Linear4bit for good for a kernel without a backward pass: from then on no gradient
    crosses the layer, with one warning and a loss that still falls (bitsandbytes 0.50, Linear4bit.forward).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def expand_four_bit(model: Any) -> Any:
    """The same NF4 values held as floats: a CPU has no 4-bit arithmetic, and would widen them anew in every pass.

    Takes eight times the memory of the language model's 4-bit layers, and 5 % less time at the shipped base's size.
    """
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it says which type it widens to
    try:
        return model.dequantize()
    finally:
        logging.set_verbosity(verbosity)


def hush_kernel_advice() -> None:
    """Drop two notes that advise packages which fetch or build kernels; everything else is still logged.

    Call it before the first import of transformers' models: bitsandbytes speaks while it is imported.
    """
    advice = {
        "transformers.integrations.hub_kernels": "causal_conv1d",
        "bitsandbytes.backends.cpu.ops": "kernels-community",
    }
    for name, word in advice.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, _Without) for known in logger.filters):
            logger.addFilter(_Without(word))


class _Without(logging.Filter):
    def __init__(self, word: str) -> None:
        super().__init__()
        self.word = word

    def filter(self, record: logging.LogRecord) -> bool:
        return self.word not in record.getMessage()


@contextmanager
def no_progress_bars() -> "Iterator[None]":
    """transformers draws bars while it loads and saves; progress goes through orion_triage.progress."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def render_turn(processor: "Lfm2VlProcessor", prompt: str) -> str:
    """The text of one user turn with an image, and the prefix of the answer, by the model's chat template.

    The template puts nothing between image and text, so the published `<image>\\n` + prompt is an image part
    and a text part that starts with the newline.
    """
    text = IMAGE_PLACEHOLDER.removeprefix(processor.image_token) + prompt
    content = [{"type": "image"}, {"type": "text", "text": text}]
    return _rendered(processor, [{"role": "user", "content": content}], add_generation_prompt=True)


def _rendered(processor: "Lfm2VlProcessor", messages: list[dict[str, Any]], **options: bool) -> str:
    """The conversation as the template writes it; whatever the template stumbles over is an OrionError."""
    try:
        text: str = processor.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # a template is a program of the base's author: its errors are of any kind
        raise OrionError(
            f"the chat template cannot be rendered: {type(error).__name__}: {str(error)[:200]}.",
            "Use a base model with the LFM2 chat template.",
        ) from None
    return text


def check_template(processor: "Lfm2VlProcessor", prompt: str, answer: str) -> None:
    """Raise OrionError unless a finished conversation is user's turn + answer + <|im_end|> + white space."""
    turn = render_turn(processor, prompt)
    text = IMAGE_PLACEHOLDER.removeprefix(processor.image_token) + prompt
    whole = _rendered(
        processor,
        [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ],
    )
    if whole.rstrip() != turn + answer + END_OF_TURN:
        raise OrionError(
            f"the chat template ends a conversation with {whole[-60:]!r}, not with answer + {END_OF_TURN}.",
            "Use a base model with the LFM2 chat template.",
        )


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """One image as the model takes it; rows that hold the same object share one look of the tower.

    `tokens` stand for it in a text: start, one placeholder an image token, end. `inputs` are pixel_values [1, patches,
    3 * 16 * 16], pixel_attention_mask [1, patches] and spatial_shapes [1, 2], or the image_features [1, image tokens,
    text width] of a tower that does not change.
    """

    tokens: list[int]
    inputs: "dict[str, torch.Tensor]"


@dataclass(frozen=True, eq=False)
class EncodedRow:
    """An image, the ids of its turn, and those of the answer + <|im_end|>; empty without one."""

    image: EncodedImage
    turn: list[int]
    answer: list[int]


def encode_image(processor: "Lfm2VlProcessor", image: "Image.Image") -> EncodedImage:
    """Raises OrionError for a picture of another size than the processor was set to."""
    frame_size = processor.image_processor.tile_size
    if image.size != (frame_size, frame_size) or image.mode != "RGB":
        raise OrionError(
            f"a {image.mode} picture of {image.size[0]}x{image.size[1]} reached the model, which was set "
            f"to RGB of {frame_size}x{frame_size}.",
            "Decode frames with orion_triage.frames at the preset's size.",
        )
    batch = processor(images=[[image]], text=[processor.image_token], add_special_tokens=False)
    return EncodedImage(batch["input_ids"][0], {key: batch[key] for key in _VISION_KEYS})


def encode_row(processor: "Lfm2VlProcessor", image: EncodedImage, prompt: str, answer: str | None = None) -> EncodedRow:
    """The answer is tokenized by itself, so the ids before it are exactly those that generation starts from.

    So are the texts before and after the image: special tokens part them, across which no token reaches.
    """
    before, after = render_turn(processor, prompt).split(processor.image_token)
    texts = [before, after, *([answer + END_OF_TURN] if answer is not None else [])]
    first, last, *target = processor.tokenizer(texts, add_special_tokens=False)["input_ids"]
    return EncodedRow(image, [*first, *image.tokens, *last], target[0] if target else [])


def pad(processor: "Lfm2VlProcessor", rows: Sequence[EncodedRow]) -> "BatchFeature":
    """Rows -> one batch on the CPU.

    Rows without answers are padded on the left, ready to generate. Rows with answers are padded on the right, and
    `labels` holds the ids of answer + <|im_end|>, and -100 everywhere else.

    Keys: input_ids, attention_mask, labels [rows, tokens]; image_of_row [rows]; and the inputs of each distinct image
    (see EncodedImage), in the order of their first rows.
    """
    import torch
    from transformers import BatchFeature

    with_answers = any(row.answer for row in rows)
    length = max(len(row.turn) + len(row.answer) for row in rows)
    ids = torch.full((len(rows), length), processor.tokenizer.pad_token_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for index, row in enumerate(rows):
        used = len(row.turn) + len(row.answer)
        start = 0 if with_answers else length - used
        ids[index, start : start + used] = torch.tensor(row.turn + row.answer)
        mask[index, start : start + used] = 1
        labels[index, start + len(row.turn) : start + used] = torch.tensor(row.answer, dtype=torch.long)
    images = list(dict.fromkeys(row.image for row in rows))
    place = {image: number for number, image in enumerate(images)}
    batch = {"input_ids": ids, "attention_mask": mask, "image_of_row": torch.tensor([place[row.image] for row in rows])}
    for key in images[0].inputs:
        batch[key] = torch.cat([image.inputs[key] for image in images])
    if with_answers:
        batch["labels"] = labels
    return BatchFeature(batch)


def encode_rows(
    processor: "Lfm2VlProcessor",
    images: "Sequence[Image.Image]",
    prompts: Sequence[str],
    answers: Sequence[str] | None = None,
) -> list[EncodedRow]:
    """One row per image and prompt; an image object that appears several times is encoded once."""
    distinct = {id(image): image for image in images}
    encoded = {key: encode_image(processor, image) for key, image in distinct.items()}
    return [
        encode_row(processor, encoded[id(image)], prompt, answers[index] if answers is not None else None)
        for index, (image, prompt) in enumerate(zip(images, prompts, strict=True))
    ]


def encode(
    processor: "Lfm2VlProcessor",
    images: "Sequence[Image.Image]",
    prompts: Sequence[str],
    answers: Sequence[str] | None = None,
) -> "BatchFeature":
    """`encode_rows` as one batch: see `pad`."""
    return pad(processor, encode_rows(processor, images, prompts, answers))


_VISION_KEYS = ("pixel_values", "spatial_shapes", "pixel_attention_mask")


def vision_features(model: Any, processor: "Lfm2VlProcessor", images: "Sequence[Image.Image]") -> "torch.Tensor":
    """What the language model gets to see: [images, image tokens, text width], float32 on the CPU."""
    import torch

    # One at a time: only a few images are asked for, and a large tower needs its memory for weights.
    features = []
    with torch.inference_mode():
        for image in images:
            batch = encode(processor, [image], [""]).to(model.device)
            features.append(model.look(**{key: batch[key] for key in _VISION_KEYS})[0].float().cpu())
    return torch.stack(features)


def look(model: Any, image: EncodedImage) -> EncodedImage:
    """The image after the tower, for prompts that are asked later; on the model's device."""
    import torch

    with torch.inference_mode():
        features = model.look(**{key: value.to(model.device) for key, value in image.inputs.items()})
    return EncodedImage(image.tokens, {"image_features": features})


def generate(
    model: Any,
    processor: "Lfm2VlProcessor",
    images: "Sequence[Image.Image]",
    prompts: Sequence[str],
    max_new_tokens: int,
) -> list[str]:
    """Greedy answers, one per image and prompt, without the <|im_end|> that stops them.

    Rows are independent of the batch they are in, up to rounding: padding on the left is masked in attention and
    short-conv layers alike.
    """
    rows = encode_rows(processor, images, prompts)
    return [text for text, _ in generate_and_score(model, processor, rows, max_new_tokens)]


def generate_and_score(
    model: Any,
    processor: "Lfm2VlProcessor",
    rows: Sequence[EncodedRow],
    max_new_tokens: int,
    *,
    cue: str = "",
    tokens: Sequence[int] = (),
) -> "list[tuple[str, list[float] | None]]":
    """`generate`'s answers, each with the log-probabilities of `tokens` right after its first `cue`.

    None in their place where the answer never says the cue, or ends with it.
    """
    import torch

    steps: list[
        torch.Tensor
    ] = []  # of each token generated, [rows, len(tokens)]: all logits of a batch would be 0.3 GB

    def remember(_: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        if tokens:
            steps.append(logits.float().log_softmax(-1)[:, list(tokens)].cpu())
        return logits

    batch = pad(processor, rows).to(model.device)
    end = processor.tokenizer.convert_tokens_to_ids(END_OF_TURN)
    with torch.inference_mode():
        if "image_features" in batch:
            seen = batch["image_features"]
        else:
            seen = model.look(**{key: batch[key] for key in _VISION_KEYS})
        output = model.generate(
            inputs_embeds=model.embed(batch["input_ids"], seen, batch["image_of_row"]),
            attention_mask=batch["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=processor.tokenizer.pad_token_id,
            logits_processor=[remember],
        )
    decoded: list[str] = processor.tokenizer.batch_decode(output, skip_special_tokens=True)
    scores: list[list[float] | None] = [None] * len(decoded)
    for row, ids in enumerate(output.tolist() if cue else []):
        place = _tokens_up_to(processor.tokenizer, ids, cue)
        if place is not None and place < len(steps) and ids[place] != end:
            scores[row] = steps[place][row].tolist()
    return list(zip(decoded, scores, strict=True))


def _tokens_up_to(tokenizer: Any, ids: list[int], cue: str) -> int | None:
    """How many tokens it takes until the text ends with the first `cue`; None when no token ends there."""
    if cue not in tokenizer.decode(ids):
        return None
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:count])
        if cue in text:
            return count if text.endswith(cue) else None
    return None


def answer_log_probabilities(
    model: Any,
    processor: "Lfm2VlProcessor",
    images: "Sequence[Image.Image]",
    prompts: Sequence[str],
    answers: Sequence[str],
) -> "list[torch.Tensor]":
    """Per record, the log-probability of each token of answer + <|im_end|>: float32 on the CPU."""
    import torch

    result = []
    with torch.inference_mode():
        for image, prompt, answer in zip(images, prompts, answers, strict=True):
            batch = encode(processor, [image], [prompt], [answer]).to(model.device)
            labels = batch.pop("labels")[0]
            positions = (labels != IGNORED).nonzero()[:, 0]
            logits = model(**batch, logits_to_keep=positions - 1, use_cache=False).logits[0].float()
            scores = logits.log_softmax(-1).gather(-1, labels[positions, None])[:, 0]
            result.append(scores.cpu())
    return result
