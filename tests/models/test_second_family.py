"""models/family.py: another family than LFM2-VL, from a random base to an evaluated pair; refused families."""

import json
from pathlib import Path
from typing import Any

import pytest

from orion_triage.dataset.dataset import Dataset
from orion_triage.errors import OrionError
from orion_triage.evaluate import run as evaluation
from orion_triage.evaluate.backends import LlamaCppBackend, TransformersBackend
from orion_triage.export import fuse, parity, quantize
from orion_triage.imagery.frames import read_frame
from orion_triage.llama_cpp.server import Server
from orion_triage.llama_cpp.toolchain import find_toolchain
from orion_triage.mission.prompt import Coordinates, render_prompt, user_text
from orion_triage.mission.verdict import Verdict, answer_text
from orion_triage.models import internvl
from orion_triage.models.family import FAMILIES, turn_of
from orion_triage.models.load import check_base, load_model, load_processor
from orion_triage.settings import EvaluateSettings, FineTuneSettings, FuseSettings, QuantizeSettings
from orion_triage.train import fine_tune
from tests.conftest import MISSION, REASONS

SIZE, LAYERS = 256, 2
VISION_LAYERS = 4  # the converter takes mlp1.3, a part of the projector, for a block number, which must exist
SPECIAL_TOKENS = {
    "eos_token": internvl.END_OF_TURN, "pad_token": "<|endoftext|>", "start_image_token": "<img>",
    "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>",
}  # fmt: skip
# As in the published checkpoints of transformers: it writes a newline after the image.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "{{ '<IMG_CONTEXT>\n' }}{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{'<|im_end|>\n'}}{% endfor %}{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)


def make_internvl(folder: Path) -> Path:
    """A saved InternVL of 1 M random parameters, as transformers saves it, with a head of its own."""
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import (
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        PreTrainedTokenizerFast,
    )
    from transformers.models.got_ocr2 import GotOcr2ImageProcessor
    from transformers.models.internvl import InternVLVideoProcessor

    texts = [render_prompt(MISSION, Coordinates(lon / 7, lon / 3)) for lon in range(-60, 60, 5)]
    texts += [answer_text(MISSION, Verdict(reason, category)) for category, reason in REASONS.items()]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(internvl.SPLIT_PATTERN), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", *(set(SPECIAL_TOKENS.values()) - {"<|endoftext|>"})]
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=704,
            special_tokens=sorted(special),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    named = {name: token for name, token in SPECIAL_TOKENS.items() if name not in ("eos_token", "pad_token")}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=internvl.END_OF_TURN,
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        extra_special_tokens=named,
    )
    config = InternVLConfig(
        text_config={
            "model_type": "qwen2", "vocab_size": len(tokenizer), "hidden_size": 256, "intermediate_size": 512,
            "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 4096, "tie_word_embeddings": False,
            "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "model_type": "internvl_vision", "hidden_size": 64, "intermediate_size": 128, "attention_bias": True,
            "num_hidden_layers": VISION_LAYERS, "num_attention_heads": 2, "image_size": SIZE, "patch_size": 16,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=64,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = InternVLForConditionalGeneration(config)
    with torch.no_grad():  # the initial values leave effects near the rounding error, and positions at 0
        for name, parameter in model.named_parameters():
            if name.endswith(("cls_token", "position_embeddings")):
                parameter.normal_(0, 0.5)
            elif parameter.ndim == 2:
                parameter.mul_(4)
    model.half().save_pretrained(folder)
    images = GotOcr2ImageProcessor(
        size={"height": SIZE, "width": SIZE}, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]
    )
    processor = InternVLProcessor(images, tokenizer, InternVLVideoProcessor(), 64, CHAT_TEMPLATE)
    processor.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return folder


@pytest.mark.slow
@pytest.mark.llama_cpp
def test_internvl_is_trained_fused_quantized_and_evaluated(
    tmp_path: Path, small_dataset: Path, warm_python: None
) -> None:
    """Two steps; llama.cpp gives the probabilities of transformers; both answer, the pair under the flight grammar."""
    base, dataset = make_internvl(tmp_path / "base"), Dataset(small_dataset, MISSION)
    check_base(base)
    settings = FineTuneSettings(
        micro_batch_size=12, gradient_accumulation_steps=1, epochs=1, learning_rate=1e-2, gradient_checkpointing=False
    )
    tuned = fine_tune.run(base, dataset, tmp_path / "adapter", tmp_path / "work", settings, SIZE)
    everywhere = {"text": LAYERS, "vision": VISION_LAYERS, "projector": 0}
    assert tuned["census"] == dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), everywhere)
    assert tuned["steps"] == 2
    merged, gguf = tmp_path / "merged", tmp_path / "gguf"
    fused = fuse.run(base, tmp_path / "adapter", dataset, merged, FuseSettings(check_records=4), SIZE)
    own_name = {"text": 0, "vision": VISION_LAYERS, "projector": 0}  # PEFT writes the modules' own names
    assert fused["census"] == tuned["census"] | {"projection_layer": own_name}
    texts = [user_text(MISSION, None), user_text(MISSION, Coordinates(-120.62, 34.0))]
    calibrated = QuantizeSettings(calibrate="task")
    quantized = quantize.run(merged, gguf, calibrated, user_texts=texts, training=(dataset, SIZE))
    # Seven a layer, the head, and the token embedding, which this model does not share with the head.
    assert quantized["calibration"]["entries"] == 7 * LAYERS + 2
    assert quantized["prompts_tokenized_alike"] == 2

    evaluate = EvaluateSettings(max_new_tokens=8, batch_size=8)
    toolchain, log = find_toolchain(), tmp_path / "server.log"
    mmproj = gguf / quantize.MMPROJ
    model, processor = load_model(merged, dtype="float32"), load_processor(merged, SIZE)
    with Server(toolchain, gguf / quantize.F16, mmproj, log=log, turn=turn_of(gguf / quantize.F16)) as server:
        for record in dataset.records("test")[:2]:
            frame = read_frame(dataset.path(record), SIZE)
            difference = parity.largest_difference(model, processor, server.client, frame, record.user_text)
            assert difference <= parity.LARGEST_DIFFERENCE
    asked: list[dict[str, Any]] = [
        evaluation.run(
            dataset,
            "test",
            TransformersBackend.load(merged, MISSION, evaluate, SIZE),
            tmp_path / "of transformers",
            evaluate,
            SIZE,
            fingerprint="merged",
        )
    ]
    pair = gguf / quantize.QUANTIZED
    with Server(toolchain, pair, mmproj, log=log, turn=turn_of(pair)) as server:
        backend = LlamaCppBackend(server.client, MISSION, max_new_tokens=8, constrained=True, primed=True)
        asked.append(
            evaluation.run(dataset, "test", backend, tmp_path / "of the pair", evaluate, SIZE, fingerprint="pair")
        )
    assert [set(figures) >= {"A", "B", "C", "D"} for figures in asked] == [True, True]
    rows = [json.loads(line) for line in (tmp_path / "of the pair" / "predictions.jsonl").read_text().splitlines()]
    assert all(row["category"] and row["scores"] for row in rows)


def test_a_family_that_the_pinned_llama_cpp_does_not_know_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "lfm3_vl"}')
    for refuse in (
        lambda: check_base(tmp_path),
        lambda: quantize.run(tmp_path, tmp_path / "gguf", QuantizeSettings(), user_texts=["<image>x"]),
    ):
        with pytest.raises(OrionError, match=r"'lfm3_vl'\. LFM3-VL needs llama\.cpp b12088 or newer"):
            refuse()
    assert not (tmp_path / "gguf").exists()


def test_an_unknown_family_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(OrionError, match=r"model_type is 'llava', not 'lfm2_vl' or 'internvl'") as refused:
        check_base(tmp_path)
    assert all(family.NAME in refused.value.fix for family in FAMILIES)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"text_config": {"model_type": "qwen3"}}, "text_config.model_type is 'qwen3', not qwen2"),
        ({"vision_config": {"use_qk_norm": True}}, "vision_config.use_qk_norm is True, not False"),
        ({"downsample_ratio": 0.25}, "downsample_ratio is 0.25, not 0.5: four patches"),
    ],
)
def test_an_internvl_that_llama_cpp_computes_otherwise_is_refused(more: Any, said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "internvl", **more}))
    with pytest.raises(OrionError) as refused:
        check_base(tmp_path)
    assert said in refused.value.message
