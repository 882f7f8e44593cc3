"""Greedy answers, log-probabilities and image features of a loaded model."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from transformers import ProcessorMixin
from orion_triage.mission.prompt import IMAGE
from orion_triage.models.encode import IGNORED, EncodedImage, EncodedRow, encode, encode_rows, pad
from orion_triage.models.family import family_of_processor


def vision_features(model: Any, processor: "ProcessorMixin", images: "Sequence[Image.Image]") -> "torch.Tensor":
    """The image features that the language model receives: [images, image tokens, text width], float32 on the CPU."""
    import torch

    # One image at a time: callers pass only a few, and a large tower leaves little memory for activations.
    features = []
    with torch.inference_mode():
        for image in images:
            batch = encode(processor, [image], [IMAGE]).to(model.device)
            features.append(model.look(**{key: batch[key] for key in model.vision_keys})[0].float().cpu())
    return torch.stack(features)


def look(model: Any, image: EncodedImage) -> EncodedImage:
    """The image after the vision tower, on the model's device, for several prompts about it."""
    import torch

    with torch.inference_mode():
        features = model.look(**{key: value.to(model.device) for key, value in image.inputs.items()})
    return EncodedImage(image.tokens, {"image_features": features})


def generate(
    model: Any,
    processor: "ProcessorMixin",
    images: "Sequence[Image.Image]",
    user_texts: Sequence[str],
    max_new_tokens: int,
) -> list[str]:
    """Greedy answers, one per pair of image and user's text, without the final end of the turn.

    A row does not depend on the rest of its batch, except for rounding: left padding is masked in the attention and
    the short-conv layers.
    """
    rows = encode_rows(processor, images, user_texts)
    return [text for text, *_ in generate_and_score(model, processor, rows, max_new_tokens)]


def generate_and_score(
    model: Any,
    processor: "ProcessorMixin",
    rows: Sequence[EncodedRow],
    max_new_tokens: int,
    *,
    cue: str = "",
    after_cue: Sequence[tuple[str, Sequence[int]]] = (),
    further: Mapping[str, Sequence[int]] | None = None,
) -> "list[tuple[str, list[list[float]] | None, dict[str, list[float]]]]":
    """The answers of `generate`, each with the log-probabilities of tokens after its first `cue`.

    `after_cue` are pairs of a text that follows the cue, mostly none, and the tokens that may come next. The
    log-probabilities are None if the answer does not contain the cue or ends with it. `further` are other cues with
    such tokens: the third part has the log-probabilities after each cue that the answer contains.
    """
    import torch

    # Token after a cue -> its column. One [rows, len(columns)] per generated token; all logits of a batch take 0.3 GB.
    steps: list[torch.Tensor] = []
    asked = [following for text, following in after_cue if not text] + list((further or {}).values())
    columns = {token: place for place, token in enumerate(dict.fromkeys(token for one in asked for token in one))}

    def remember(_: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        if columns:
            steps.append(logits.float().log_softmax(-1)[:, list(columns)].cpu())
        return logits

    def at(place: int, row: int, tokens: Sequence[int]) -> list[float]:
        return [float(steps[place][row, columns[token]]) for token in tokens]

    batch = pad(processor, rows).to(model.device)
    end = processor.tokenizer.convert_tokens_to_ids(family_of_processor(processor).END_OF_TURN)
    with torch.inference_mode():
        if "image_features" in batch:
            seen = batch["image_features"]
        else:
            seen = model.look(**{key: batch[key] for key in model.vision_keys})
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
    scores: list[list[list[float]] | None] = [None] * len(decoded)
    more: list[dict[str, list[float]]] = [{} for _ in decoded]

    def place_after(ids: list[int], text: str) -> int | None:
        place = _tokens_up_to(processor.tokenizer, ids, text)
        return place if place is not None and place < len(ids) and ids[place] != end else None

    for row, ids in enumerate(output.tolist() if cue else []):
        if (place := place_after(ids, cue)) is not None:
            scores[row] = [
                _next_log_probabilities(model, processor, rows[row], ids[:place], text, following)
                if text
                else at(place, row, following)
                for text, following in after_cue
            ]
        for other, following in (further or {}).items():
            if (place := place_after(ids, other)) is not None:
                more[row][other] = at(place, row, following)
    return list(zip(decoded, scores, more, strict=True))


def _next_log_probabilities(
    model: Any, processor: "ProcessorMixin", row: EncodedRow, answered: list[int], text: str, tokens: Sequence[int]
) -> list[float]:
    """The log-probabilities of `tokens` after the row's turn, the answered tokens and a text."""
    import torch

    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    batch = pad(processor, [EncodedRow(row.image, [*row.turn, *answered, *ids], [])]).to(model.device)
    with torch.inference_mode():
        logits = model(**batch, logits_to_keep=1, use_cache=False).logits[0, -1]
    return [float(value) for value in logits.float().log_softmax(-1)[list(tokens)].cpu()]


def _tokens_up_to(tokenizer: Any, ids: list[int], cue: str) -> int | None:
    """The number of tokens whose text ends with the first `cue`; None if no token ends there."""
    if cue not in tokenizer.decode(ids):
        return None
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:count])
        if cue in text:
            return count if text.endswith(cue) else None
    return None


def answer_log_probabilities(
    model: Any,
    processor: "ProcessorMixin",
    images: "Sequence[Image.Image]",
    user_texts: Sequence[str],
    answers: Sequence[str],
) -> "list[torch.Tensor]":
    """Per record, the log-probability of each token of answer + end of turn: [tokens], float32 on the CPU."""
    import torch

    result = []
    with torch.inference_mode():
        for image, user_text, answer in zip(images, user_texts, answers, strict=True):
            batch = encode(processor, [image], [user_text], [answer]).to(model.device)
            labels = batch.pop("labels")[0]
            positions = (labels != IGNORED).nonzero()[:, 0]
            logits = model(**batch, logits_to_keep=positions - 1, use_cache=False).logits[0].float()
            scores = logits.log_softmax(-1).gather(-1, labels[positions, None])[:, 0]
            result.append(scores.cpu())
    return result
