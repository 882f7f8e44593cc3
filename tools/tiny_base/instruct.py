"""Second stage of the shipped base: the language model learns to read the tower and to answer questions.

The tower is frozen here, so its output for every tile is computed once and cached; what trains is the
projector and the language model, on several questions about one image in one sequence.
"""

import json
import math
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from orion_triage.mission.prompt import IMAGE, Coordinates, format_degrees
from orion_triage.progress import Progress, silent
from tools.tiny_base.optimize import descend, load_state, make_optimizers, save_state, set_learning_rates
from tools.tiny_base.texts import description, question
from tools.tiny_base.tiles import Facts
from tools.tiny_base.tower import HELD_OUT, vision_inputs

BATCH = 16
LONGEST = 640  # tokens of one sequence, image included
AWAY_DEGREES = 2.0  # of the coordinates in its questions from every val and test place
PROMPT_SHARE = 0.25  # of the questions' own tokens carry loss: they teach the language, and cost the head's time
PROMPT_WEIGHT = 0.2
LABEL_WEIGHT = 4.0  # of the category's letters: few among many, and the only ones that must be read off the question


def cache_features(
    tower: Any, pixels: NDArray[np.uint8], path: Path, progress: Progress = silent
) -> NDArray[np.float16]:
    """Tower output of every tile, (count, 256, width) in half precision, kept in `path`."""
    width = tower.config.hidden_size
    if path.exists():
        return np.load(path, mmap_mode="r")
    partial = path.with_suffix(".partial.npy")
    features = np.lib.format.open_memmap(partial, "w+", np.float16, (len(pixels), 256, width))
    tower.eval()
    with torch.no_grad():
        for start in range(0, len(pixels), 64):
            batch = torch.from_numpy(pixels[start : start + 64])
            features[start : start + 64] = tower(**vision_inputs(batch)).last_hidden_state.numpy()
            progress("caching the tower's output", start, len(pixels))
    features.flush()
    partial.replace(path)
    return np.load(path, mmap_mode="r")


def coordinates_away_from(places: list[tuple[float, float]], source: random.Random) -> Coordinates:
    """A random position at least 2 degrees (222 km) from every one of `places` (lon, lat): those of val and test."""
    while True:
        lon, lat = round(source.uniform(-180, 180), 2), round(source.uniform(-75, 75), 2)
        near = any(
            abs(lat - b) < AWAY_DEGREES and abs(lon - a) < AWAY_DEGREES / max(0.1, math.cos(math.radians(b)))
            for a, b in places
        )
        if not near:
            return Coordinates(lon, lat)


def conversation(
    tokenizer: Any, facts: Facts, source: random.Random, places: list[tuple[float, float]], turns: int
) -> tuple[list[int], list[float]]:
    """Token ids of `turns` questions about one image (64 image tokens in front), each token's weight in the loss."""
    ids: list[int] = []
    weights: list[float] = []

    def add(text: str, weight: float, share: float = 1.0) -> None:
        new = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids.extend(new)
        weights.extend(weight if share == 1 or source.random() < share else 0.0 for _ in new)

    add("<|startoftext|>", 0)
    for turn in range(turns):
        add("<|im_start|>user\n" if turn == 0 else "\n<|im_start|>user\n", 0)
        if turn == 0:
            add("<|image_start|>" + "<image>" * 64 + "<|image_end|>\n", 0)
        where = ""
        if source.random() < 0.5:
            position = coordinates_away_from(places, source)
            where = f" captured at Longitude: {format_degrees(position.lon)}, Latitude: {format_degrees(position.lat)}"
        prompt, answer = description(source, facts) if source.random() < 0.1 else question(source, facts, where)
        add(prompt, PROMPT_WEIGHT, PROMPT_SHARE)
        add("<|im_end|>\n<|im_start|>assistant\n", 0)
        # The label has pre-tokens of its own, so the parts give the tokens of the whole.
        head, key, label = answer.partition('"category": "')
        add(head + key, 1.0)
        if label:
            add(label.removesuffix('"}'), LABEL_WEIGHT)
            add('"}', 1.0)
        add("<|im_end|>", 1.0)
    return ids[:LONGEST], weights[:LONGEST]


def train_language(
    model: Any,
    tokenizer: Any,
    features: NDArray[np.float16],
    facts: list[Facts],
    *,
    steps: int,
    places: list[tuple[float, float]],
    checkpoint: Path,
    seed: int = 0,
    progress: Progress = silent,
) -> None:
    """Train projector and language model of `model` in place; state is kept every 100 steps."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "vision_tower" not in name
    optimizers = make_optimizers(model, weight_decay=0.02)
    start = load_state(checkpoint, model, optimizers)
    image_id, pad_id = model.config.image_token_id, tokenizer.pad_token_id
    usable = len(facts) - HELD_OUT
    running, running_label, began = 0.0, 0.0, time.monotonic()
    for step in range(start, steps):
        set_learning_rates(optimizers, step, steps)
        source = random.Random(f"{seed}/{step}")
        chosen = [source.randrange(usable) for _ in range(BATCH)]
        turns = source.choice((1, 1, 2, 3))  # the same for a whole batch: less padding
        rows = [conversation(tokenizer, facts[index], source, places, turns) for index in chosen]
        longest = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([row + [pad_id] * (longest - len(row)) for row, _ in rows])
        weights = torch.tensor([row + [0.0] * (longest - len(row)) for _, row in rows])
        seen = torch.from_numpy(np.stack([features[index] for index in chosen]).astype(np.float32))
        with torch.autocast("cpu", torch.bfloat16):
            image = model.model.multi_modal_projector(seen.view(BATCH, 16, 16, -1)).reshape(
                -1, model.config.text_config.hidden_size
            )
            embedded = model.model.language_model.embed_tokens(ids)
            embedded = embedded.masked_scatter((ids == image_id)[..., None], image.to(embedded.dtype))
            # No mask: the padding stands on the right, where a causal model's other tokens cannot see it.
            hidden = model.model.language_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
            wanted = weights[:, 1:] > 0
            logits = model.lm_head(hidden[:, :-1][wanted])
        losses = torch.nn.functional.cross_entropy(logits.float(), ids[:, 1:][wanted], reduction="none")
        scale = weights[:, 1:][wanted]
        loss = (losses * scale).sum() / scale.sum()
        descend(loss, model, optimizers)
        answer_loss = float(losses.detach()[scale == 1].mean())
        label_loss = float(losses.detach()[scale == LABEL_WEIGHT].mean())
        running = answer_loss if step == start else 0.97 * running + 0.03 * answer_loss
        running_label = label_loss if step == start else 0.97 * running_label + 0.03 * label_loss
        if (step + 1) % 100 == 0 or step + 1 == steps:
            save_state(checkpoint, model, optimizers, step + 1)
            seconds = (time.monotonic() - began) / (step + 1 - start)
            losses_now = f"answer loss {running:.3f}, label loss {running_label:.3f}"
            progress(f"language: {losses_now}, {seconds:.2f} s a step", step + 1, steps)


def measure_language(
    model: Any, processor: Any, pixels: NDArray[np.uint8], facts: list[Facts], questions: int = 120
) -> dict[str, float]:
    """Shares of answers to questions on unseen tiles that parse and that are right, and right about another tile.

    The last is what a model that does not look at the image would score on all.
    """
    from PIL import Image

    from orion_triage.models.generate import generate

    source = random.Random("measure")
    images = [Image.fromarray(pixels[index], "RGB") for index in range(questions)]
    asked = [question(source, fact) for fact in facts[:questions]]
    figures = {}
    for name, shown in (("own", images), ("another", images[7:] + images[:7])):
        answers = []
        for start in range(0, questions, 12):
            window = slice(start, start + 12)
            answers += generate(
                model, processor, shown[window], [f"{IMAGE}\n{prompt}" for prompt, _ in asked[window]], 96
            )
        categories = [_category(answer) for answer in answers]
        wanted = [_category(answer) for _, answer in asked]
        figures[f"right_on_{name}_tile"] = sum(a == b for a, b in zip(categories, wanted, strict=True)) / questions
        figures[f"parsed_on_{name}_tile"] = sum(category is not None for category in categories) / questions
    return figures


def _category(answer: str) -> str | None:
    try:
        value = json.loads(answer)
        return str(value["category"])
    except (ValueError, KeyError, TypeError):
        return None
