import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from orion_triage.errors import OrionError
from orion_triage.mission.prompt import Coordinates, render_prompt, user_text
from orion_triage.mission.verdict import Verdict, answer_text
from orion_triage.models.encode import IGNORED, check_template, encode, render_turn
from orion_triage.models.generate import answer_log_probabilities, generate
from orion_triage.models.load import fingerprint, float32_compute, load_model, load_processor, resolve_base
from tests.conftest import MISSION

VERDICTS = [
    answer_text(MISSION, Verdict("Dense port.", "HIGH")),
    answer_text(MISSION, Verdict("Ordinary street grid beside checkerboard fields.", "MEDIUM")),
]
TEXTS = [user_text(MISSION, None), user_text(MISSION, Coordinates(-120.62, 34.63))]


@pytest.fixture(scope="module")
def processor(small_base: Path) -> Any:
    return load_processor(small_base, 256)


@pytest.fixture(scope="module")
def model(small_base: Path) -> Any:
    return load_model(small_base, dtype="float32")


def test_turn_bytes(processor: Any) -> None:
    assert render_turn(processor, "<image>\nLook.") == (
        "<|startoftext|><|im_start|>user\n<image>\nLook.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_published_line_and_turn_have_the_same_bytes(processor: Any) -> None:
    published = "<image>\n" + render_prompt(MISSION, Coordinates(-120.62, 34.63))
    assert f"user\n{published}<|im_end|>" in render_turn(processor, TEXTS[1])


def test_only_verdict_and_end_of_turn_are_supervised(processor: Any, small_frames: list[Image.Image]) -> None:
    batch = encode(processor, small_frames[:2], TEXTS, VERDICTS)
    tokenizer = processor.tokenizer
    for row in range(2):
        ids, labels, mask = (batch[key][row].tolist() for key in ("input_ids", "labels", "attention_mask"))
        supervised = [label for label in labels if label != IGNORED]
        expected = tokenizer(VERDICTS[row] + "<|im_end|>", add_special_tokens=False)["input_ids"]
        assert supervised == expected
        assert tokenizer.decode(supervised) == VERDICTS[row] + "<|im_end|>"
        first = labels.index(expected[0])
        # Token by token: what is not the verdict is ignored, and labels stand where their tokens stand.
        assert labels == [IGNORED] * first + expected + [IGNORED] * (len(ids) - first - len(expected))
        assert ids[first : first + len(expected)] == expected
        assert tokenizer.decode(ids[:first]).endswith("<|im_start|>assistant\n")
        assert mask == [1] * (first + len(expected)) + [0] * (len(ids) - first - len(expected))
    assert batch["attention_mask"].sum(1).tolist()[0] != batch["attention_mask"].sum(1).tolist()[1]


def test_training_rows_are_what_the_tokenizer_gives_for_the_whole_conversation(
    processor: Any, small_frames: list[Image.Image]
) -> None:
    batch = encode(processor, small_frames[:1], TEXTS[:1], VERDICTS[:1])
    whole = render_turn(processor, TEXTS[0]) + VERDICTS[0] + "<|im_end|>"
    whole = whole.replace("<image>", "<|image_start|>" + "<image>" * 64 + "<|image_end|>")
    assert batch["input_ids"][0].tolist() == processor.tokenizer(whole, add_special_tokens=False)["input_ids"]


def test_generation_rows_are_padded_on_the_left(processor: Any, small_frames: list[Image.Image]) -> None:
    batch = encode(processor, small_frames[:2], TEXTS)
    assert "labels" not in batch
    assert batch["attention_mask"][0, 0] == 0
    assert batch["attention_mask"][:, -1].tolist() == [1, 1]


@pytest.mark.parametrize(("size", "tokens"), [(256, 64), (384, 144), (512, 256)])
def test_frames_are_neither_resized_nor_tiled_nor_padded(small_base: Path, size: int, tokens: int) -> None:
    import numpy as np

    processor = load_processor(small_base, size)
    pixels = np.random.default_rng(size).integers(0, 256, (size, size, 3), dtype=np.uint8)
    batch = encode(processor, [Image.fromarray(pixels)], ["<image>\nx"])
    assert batch["spatial_shapes"].tolist() == [[size // 16, size // 16]]
    assert batch["pixel_values"].shape == (1, (size // 16) ** 2, 3 * 16 * 16)
    assert batch["pixel_attention_mask"].all()
    assert int((batch["input_ids"] == processor.image_token_id).sum()) == tokens
    second_patch = (batch["pixel_values"][0, 1].reshape(16, 16, 3) + 1) * 127.5
    assert np.abs(second_patch.numpy() - pixels[:16, 16:32]).max() < 0.01


def test_other_frame_size_is_refused(processor: Any) -> None:
    with pytest.raises(OrionError, match=r"the model needs RGB images of 256x256, and got RGB of 512x512"):
        encode(processor, [Image.new("RGB", (512, 512))], ["<image>\nx"])


def test_answers_do_not_depend_on_the_batch(model: Any, processor: Any, small_frames: list[Image.Image]) -> None:
    prompts = [user_text(MISSION, Coordinates(-120.62 + 31 * n, 3.5)) if n % 2 else TEXTS[0] for n in range(5)]
    images = [*small_frames[:3], small_frames[0], small_frames[1]]
    together = generate(model, processor, images, prompts, 20)
    alone = [
        generate(model, processor, [image], [prompt], 20)[0] for image, prompt in zip(images, prompts, strict=True)
    ]
    assert together == alone
    assert len(set(together)) > 1


def test_generation_agrees_with_a_plain_forward_pass(
    model: Any, processor: Any, small_frames: list[Image.Image]
) -> None:
    import torch

    answer = generate(model, processor, small_frames[:1], TEXTS[:1], 6)[0]
    batch = encode(processor, small_frames[:1], TEXTS[:1])
    for _ in range(6):
        with torch.no_grad():
            best = model(**batch, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        batch["input_ids"] = torch.cat([batch["input_ids"], best], 1)
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    assert answer == processor.tokenizer.decode(batch["input_ids"][0, -6:], skip_special_tokens=True)


def test_generation_stops_at_the_end_of_turn(processor: Any, small_base: Path, small_frames: Any) -> None:
    import torch

    model = load_model(small_base, dtype="float32")
    model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))  # untied: argmax is 0
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    hidden: list[torch.Tensor] = []
    model.lm_head.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    generate(model, processor, small_frames[:1], TEXTS[:1], 3)
    with torch.no_grad():
        model.lm_head.weight[end] = hidden[0][0, -1]  # now the first token is <|im_end|>
    assert generate(model, processor, small_frames[:1], TEXTS[:1], 50) == [""]


def test_answer_log_probabilities_are_the_labels_own(
    model: Any, processor: Any, small_frames: list[Image.Image]
) -> None:
    import torch

    scores = answer_log_probabilities(model, processor, small_frames[:2], TEXTS, VERDICTS)
    batch = encode(processor, small_frames[:2], TEXTS, VERDICTS)
    with torch.no_grad():
        loss = model(**batch).loss
    assert float(torch.cat(scores).mean()) == pytest.approx(-float(loss), abs=1e-5)


def test_template_check(processor: Any) -> None:
    check_template(processor, TEXTS[0], VERDICTS[0])
    kept = processor.chat_template
    processor.chat_template = kept.replace("<|im_end|>\\n", "<|endoftext|>")
    try:
        with pytest.raises(OrionError, match="chat template ends a conversation with"):
            check_template(processor, TEXTS[0], VERDICTS[0])
    finally:
        processor.chat_template = kept


def test_sixteen_bit_weights_compute_as_if_they_were_wider(small_base: Path, small_frames: list[Any]) -> None:
    """To the bit, with an adapter or without, and the weights are 16-bit again afterwards."""
    import torch

    processor = load_processor(small_base, 256)
    arguments = (processor, small_frames[:3], TEXTS[:1] * 3, VERDICTS[:1] * 3)
    stored, wide = load_model(small_base, dtype="auto"), load_model(small_base, dtype="float32")
    expected = torch.cat(answer_log_probabilities(wide, *arguments))
    with float32_compute(stored):
        found = torch.cat(answer_log_probabilities(stored, *arguments))
    assert {parameter.dtype for parameter in stored.parameters()} == {torch.float16}
    assert found.equal(expected)
    assert not torch.cat(answer_log_probabilities(stored, *arguments)).equal(expected)


def test_four_bit_layers_are_the_language_models_own(small_base: Path) -> None:
    model = load_model(small_base, dtype="float32", four_bit=True)
    quantized = {name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    assert "model.language_model.layers.0.conv.in_proj" in quantized
    assert "model.language_model.layers.1.self_attn.q_proj" in quantized
    assert all(name.startswith("model.language_model.") for name in quantized)


def test_resolve_base_refusals(small_base: Path, tmp_path: Path) -> None:
    assert resolve_base(str(small_base)) == small_base
    with pytest.raises(OrionError, match=r"'LiquidAI/LFM2.5-VL-1.6B' is not in the cache.*HF_HUB_OFFLINE.*hf download"):
        resolve_base("LiquidAI/LFM2.5-VL-1.6B")
    with pytest.raises(OrionError, match=r"has no config\.json"):
        resolve_base(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(OrionError, match="is not JSON"):
        resolve_base(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    with pytest.raises(OrionError, match="model_type is 'llava'"):
        resolve_base(str(tmp_path))
    shutil.copy(small_base / "config.json", tmp_path / "config.json")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(OrionError, match=r"pytorch_model\.bin, which can run code"):
        resolve_base(str(tmp_path))


def test_missing_weights_are_refused(small_base: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "base"
    shutil.copytree(small_base, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.vision_tower.vision_model.embeddings.patch_embedding.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OrionError, match=r"the weights do not match config.json: 1 missing keys, .*patch_embedding"):
        load_model(folder, dtype="float32")


def test_fingerprint_changes_with_the_weights(small_base: Path, other_base: Path) -> None:
    assert fingerprint(small_base) != fingerprint(other_base)
    assert len(fingerprint(small_base)) == 64
