"""Render one chat turn and encode images, turns and answers as batches.

Training, fusing and evaluation share this module, so that they get the same bytes, tokens and labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orion_triage.errors import OrionError
from orion_triage.mission.prompt import IMAGE
from orion_triage.models.family import family_of_processor

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from transformers import BatchFeature, ProcessorMixin

_SHORTEST_TEXT = 32  # tokens before the image: with the image first, 4 of the chat template stand there
IGNORED = -100  # torch's cross entropy ignores these labels


def render_turn(processor: "ProcessorMixin", user_text: str) -> str:
    """The text of one user turn and the prefix of the answer, rendered by the model's chat template.

    `user_text` has IMAGE in the place of the image. The published `<image>\\n` + prompt is an image part and a text
    part that starts with the newline, unless the family's template writes the newline itself.
    """
    return _rendered(processor, [_user_turn(processor, user_text)], add_generation_prompt=True)


def _user_turn(processor: "ProcessorMixin", user_text: str) -> dict[str, Any]:
    before, image, after = user_text.partition(IMAGE)
    assert image, "the user's text has no place for the image"
    family = family_of_processor(processor)
    if before and not after.startswith(family.AFTER_IMAGE):
        raise OrionError(
            f"{family.NAME} writes {family.AFTER_IMAGE!r} after the image, and the mission's prompt has no text there.",
            'Set image = "before the text" in the mission, or choose another base model.',
        )
    after = after.removeprefix(family.AFTER_IMAGE)
    parts: list[dict[str, str]] = [{"type": "text", "text": before}, {"type": "image"}, {"type": "text", "text": after}]
    return {"role": "user", "content": [part for part in parts if part.get("text") != ""]}


def _rendered(processor: "ProcessorMixin", messages: list[dict[str, Any]], **options: bool) -> str:
    """The conversation rendered by the template; raises OrionError for any error of the template."""
    try:
        text: str = processor.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # a template is a program, which can raise any error
        raise OrionError(
            f"the chat template cannot be rendered: {type(error).__name__}: {str(error)[:200]}.",
            f"Use a base model with the {family_of_processor(processor).NAME} chat template.",
        ) from None
    return text


def check_template(processor: "ProcessorMixin", user_text: str, answer: str) -> None:
    """Raise OrionError unless a conversation renders as user turn + answer + end of turn + white space."""
    turn, family = render_turn(processor, user_text), family_of_processor(processor)
    whole = _rendered(
        processor,
        [
            _user_turn(processor, user_text),
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ],
    )
    if whole.rstrip() != turn + answer + family.END_OF_TURN:
        raise OrionError(
            f"the chat template ends a conversation with {whole[-60:]!r} instead of the answer and "
            f"{family.END_OF_TURN}.",
            f"Use a base model with the {family.NAME} chat template.",
        )


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """One image as model input; rows with the same object share one pass of the vision tower.

    `tokens` represent it in a text: start, one placeholder per image token, end. `inputs` are the family's VISION_KEYS,
    [1, ...] each, or image_features [1, image tokens, text width] of a frozen tower.
    """

    tokens: list[int]
    inputs: "dict[str, torch.Tensor]"


@dataclass(frozen=True, eq=False)
class EncodedRow:
    """An image, the token ids of its turn, and those of answer + end of turn (empty without an answer)."""

    image: EncodedImage
    turn: list[int]
    answer: list[int]


def encode_image(processor: "ProcessorMixin", image: "Image.Image") -> EncodedImage:
    """Preprocess one RGB image; raises OrionError unless it has the size that the processor is set to."""
    import torch

    frame_size = processor.image_processor.size["height"]
    if image.size != (frame_size, frame_size) or image.mode != "RGB":
        raise OrionError(
            f"the model needs RGB images of {frame_size}x{frame_size}, and got {image.mode} of "
            f"{image.size[0]}x{image.size[1]}.",
            "Decode frames with orion_triage.imagery.frames at the preset's size.",
        )
    batch = processor(images=[[image]], text=[processor.image_token], add_special_tokens=False)
    inputs = {key: batch[key] for key in family_of_processor(processor).VISION_KEYS}
    return EncodedImage(
        batch["input_ids"][0],
        {key: value if isinstance(value, torch.Tensor) else torch.stack(value) for key, value in inputs.items()},
    )


def encode_row(
    processor: "ProcessorMixin", image: EncodedImage, user_text: str, answer: str | None = None
) -> EncodedRow:
    """Tokenize one turn, and its answer if there is one.

    The answer is tokenized separately, so the ids before it are exactly those that generation starts from. The texts
    before and after the image are tokenized separately too; no token crosses the special tokens between them.
    """
    end = family_of_processor(processor).END_OF_TURN
    before, after = render_turn(processor, user_text).split(processor.image_token)
    texts = [before, after, *([answer + end] if answer is not None else [])]
    first, last, *target = processor.tokenizer(texts, add_special_tokens=False)["input_ids"]
    return EncodedRow(image, [*first, *image.tokens, *last], target[0] if target else [])


def pad(processor: "ProcessorMixin", rows: Sequence[EncodedRow]) -> "BatchFeature":
    """Combine rows into one batch on the CPU.

    Rows without answers are padded on the left, for generation. Rows with answers are padded on the right; their
    `labels` are the ids of answer + end of turn, and -100 everywhere else.

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


def shared_tokens(processor: "ProcessorMixin", rows: Sequence[EncodedRow]) -> int:
    """The number of first tokens that a batch of these rows can compute once per image, or once for all rows.

    They are the same in all rows. They contain the whole image, or only text before it, whichever leaves fewer tokens
    to compute. At least the last token of each turn stays outside, because its logits are those of the answer's first
    token. 0 if no tokens are saved: a few before the image are not worth a pass of their own.
    """
    turns = [row.turn for row in rows]
    shortest, other = min(turns), max(turns)  # in the order of words: all others lie between, and start as both do
    differences = (place for place, (one, two) in enumerate(zip(shortest, other, strict=False)) if one != two)
    length = next(differences, min(map(len, turns)) - 1)
    images, placeholder = len({row.image for row in rows}), processor.image_token_id
    before = min(length, *(turn.index(placeholder) for turn in turns))  # placeholders are the same token in all images
    saved_before = (len(rows) - 1) * before if before >= _SHORTEST_TEXT else 0
    whole = all(placeholder not in turn[length:] for turn in turns)
    saved = (len(rows) - images) * length if whole else 0
    if saved >= saved_before:
        return length if saved else 0
    return before


def encode_rows(
    processor: "ProcessorMixin",
    images: "Sequence[Image.Image]",
    user_texts: Sequence[str],
    answers: Sequence[str] | None = None,
) -> list[EncodedRow]:
    """One row per pair of image and user's text; an image object that appears several times is encoded once."""
    distinct = {id(image): image for image in images}
    encoded = {key: encode_image(processor, image) for key, image in distinct.items()}
    return [
        encode_row(processor, encoded[id(image)], user_text, answers[index] if answers is not None else None)
        for index, (image, user_text) in enumerate(zip(images, user_texts, strict=True))
    ]


def encode(
    processor: "ProcessorMixin",
    images: "Sequence[Image.Image]",
    user_texts: Sequence[str],
    answers: Sequence[str] | None = None,
) -> "BatchFeature":
    """`encode_rows` as one batch; see `pad`."""
    return pad(processor, encode_rows(processor, images, user_texts, answers))
