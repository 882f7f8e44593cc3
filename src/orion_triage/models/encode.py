"""The vision-language model: load it, render one chat turn, encode batches, generate, score.

One owner for everything that training, fusing and evaluation must do alike: the bytes of a turn, the
processor that neither resizes nor tiles, the labels, greedy answers and verdict log-probabilities.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orion_triage.errors import OrionError
from orion_triage.mission.prompt import IMAGE_PLACEHOLDER

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from transformers import BatchFeature
    from transformers.models.lfm2_vl import Lfm2VlProcessor
from orion_triage.models.load import END_OF_TURN

IGNORED = -100  # torch's cross entropy leaves these labels out


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
            "Decode frames with orion_triage.imagery.frames at the preset's size.",
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
