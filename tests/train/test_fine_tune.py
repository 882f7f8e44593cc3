import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orion_triage.dataset.dataset import Dataset
from orion_triage.dataset.records import read_split, split_path
from orion_triage.errors import OrionError
from orion_triage.mission.mission import FieldOfAnswer
from orion_triage.mission.verdict import category_alone
from orion_triage.models.encode import IGNORED, encode
from orion_triage.models.load import expand_four_bit, fingerprint, load_model, load_processor
from orion_triage.progress import silent
from orion_triage.runs.manifest import hash_outputs
from orion_triage.settings import FineTuneSettings
from orion_triage.train import fine_tune
from orion_triage.train.checkpoints import HASHES_FILE, last_checkpoint, remove_damaged
from orion_triage.train.device import Device
from orion_triage.train.grouping import groupings
from orion_triage.train.trainer import collator, make_trainer, warmup_steps
from tests.conftest import MISSION
from tests.train.trainings import QUICK, InterruptionError, largest_difference, stop_at, tensors_of

# Spoken by PEFT and by a CPU's paged optimizer; `run` filters them, its parts do not.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*checkpointing.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Paged optimizers:UserWarning"),
]


def test_a_share_of_the_records_is_trained_without_a_reason(
    small_base: Path, small_dataset: Path, few: Path, tmp_path: Path
) -> None:
    records = Dataset(small_dataset, MISSION).records("train")
    assert fine_tune.without_reasons(records, None, 42) == records
    drawn = fine_tune.without_reasons(records, 0.25, 42)
    empty = [record for record in drawn if not record.verdict.reason]
    assert len(empty) == round(0.25 * len(records))
    assert all(record.answer == category_alone(MISSION, record.verdict.category) for record in empty)
    for record, before in zip(drawn, records, strict=True):
        assert record == before or (record in empty and record.verdict.category == before.verdict.category)
    assert fine_tune.without_reasons(records, 0.25, 42) == drawn != fine_tune.without_reasons(records, 0.25, 43)
    field = FieldOfAnswer(name="smoke", kind="yes/no", definition="Smoke.")
    mission = MISSION.model_copy(update={"fields": (field,)})
    needing = [replace(record, mission=mission) for record in records]
    with pytest.raises(OrionError, match="cannot be asked for the category alone"):
        fine_tune.without_reasons(needing, 0.25, 42)
    losses = {
        share: fine_tune.run(
            small_base, Dataset(few, MISSION), tmp_path / f"{share}", tmp_path / f"work-{share}",
            QUICK.model_copy(update={"epochs": 1, "empty_reasons": share}), 256,
        )["first_loss"]
        for share in (None, 1.0)
    }  # fmt: skip
    assert abs(losses[1.0] - losses[None]) > 0.05, "other answers are learned"


def test_a_run_leaves_an_adapter_with_its_papers(
    small_base: Path, small_dataset: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[str, int, int]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        figures = fine_tune.run(
            small_base,
            Dataset(small_dataset, MISSION),
            tmp_path / "adapter",
            tmp_path / "work",
            QUICK,
            256,
            lambda *call: seen.append(call),
        )
    assert figures["steps"] == 6
    assert figures["train_records"] == 24
    assert figures["last_loss"] < figures["first_loss"]
    assert figures["best_step"] in (3, 6)
    assert figures["best_eval_loss"] == figures["eval_losses"][figures["best_step"] // 3 - 1]
    assert figures["trained_parameters"] == {"text": 28672, "vision": 24576}
    assert figures["preflight"]["smallest_vision_cosine"] > 0.99
    if figures["device"] == "cpu":
        assert figures["precision_used"] == "float32"
        assert figures["notes"] == ["trained on the CPU in float32: there is no usable GPU"]
    assert ("fine-tuning", 6, 6) in seen

    folder = tmp_path / "adapter"
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "processor_config.json", "tokenizer.json",
            "chat_template.jinja", "census.json", "base.json", "loss_log.json"} <= names  # fmt: skip
    assert "README.md" not in names  # PEFT's unfilled form; the pipeline writes ours
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "small-base"
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (16, 32, 0.05)
    assert config["task_type"] == "CAUSAL_LM"
    assert json.loads((folder / "base.json").read_text()) == {
        "name": "small-base",
        "sha256": fingerprint(small_base),
        "frame_size": 256,
    }
    census = json.loads((folder / "census.json").read_text())
    assert census["o_proj"] == {"text": 1, "vision": 3, "projector": 0}
    log = json.loads((folder / "loss_log.json").read_text())
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [3, 6]
    assert list((tmp_path / "work" / "tensorboard").glob("events.*"))
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err == ""


def make_adapted(base: Path, settings: FineTuneSettings) -> Any:
    from transformers import set_seed

    model = load_model(base, dtype="float32", four_bit=True)
    set_seed(settings.seed)
    return fine_tune.add_adapter(model, settings)[0]


@pytest.mark.parametrize(
    ("scope", "modules", "tower"),
    [
        ("attention", 4 * (1 + 3), ""),
        ("language-attention", 4, "language_model"),
        ("language-all", 12, "language_model"),
    ],
)
def test_only_adapter_weights_move_and_all_of_them(
    small_base: Path, small_dataset: Path, tmp_path: Path, scope: str, modules: int, tower: str
) -> None:
    model = make_adapted(small_base, QUICK.model_copy(update={"scope": scope}))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    records = read_split(small_dataset, "train", MISSION)[:8]
    frames = fine_tune.decode_frames(Dataset(small_dataset, MISSION), records, 256, silent)
    processor = load_processor(small_base, 256)
    collate = collator(processor, frames)
    settings = QUICK.model_copy(update={"epochs": 1, "micro_batch_size": 4})
    trainer = make_trainer(
        model, processor.tokenizer, collate, records, records[:2], settings, Device("cpu", "float32"), tmp_path, silent
    )
    trainer.train()
    assert trainer.state.global_step == 2
    moved = {name for name, value in model.named_parameters() if not value.equal(before[name])}
    assert moved == {name for name in before if ".lora_" in name}
    assert len(moved) == 2 * modules
    assert all(tower in name for name in moved)


def test_gradients_cross_the_four_bit_layers_even_after_an_evaluation(small_base: Path, small_dataset: Path) -> None:
    """bitsandbytes packs weights at the first evaluation on some CPUs; then nothing behind them learns."""
    import torch

    processor = load_processor(small_base, 256)
    records = read_split(small_dataset, "train", MISSION)[:2]
    frames = fine_tune.decode_frames(Dataset(small_dataset, MISSION), records, 256, silent)
    batch = collator(processor, frames)(records)

    def gradients(model: Any) -> dict[str, Any]:
        with torch.no_grad():
            model.eval()(**batch)
        model.train()
        model(**batch).loss.backward()
        return {name: value.grad for name, value in model.named_parameters() if "lora_B" in name}

    settings = QUICK.model_copy(update={"dropout": 0.0})
    four_bit = make_adapted(small_base, settings)
    exact = load_model(small_base, dtype="float32")
    for name, module in four_bit.base_model.model.named_modules():  # the same weights, without bitsandbytes
        weight = getattr(module, "weight", None)
        if type(module).__name__ == "Linear4bit":
            from bitsandbytes.functional import dequantize_4bit

            plain = exact.get_submodule(name.removesuffix(".base_layer"))
            plain.weight.data = dequantize_4bit(weight.data, weight.quant_state).to(torch.float32)
    torch.manual_seed(settings.seed)
    exact = fine_tune.add_adapter(exact, settings)[0]
    exact.load_state_dict({k: v for k, v in four_bit.state_dict().items() if ".lora_" in k}, strict=False)
    expected = gradients(exact)
    for name, gradient in gradients(four_bit).items():
        assert float(gradient.norm()) > 0.001
        assert torch.allclose(gradient, expected[name], rtol=1e-3, atol=1e-5), name


def test_loss_of_a_training_batch_is_the_loss_of_the_whole_rows(small_base: Path, small_dataset: Path) -> None:
    import torch

    processor = load_processor(small_base, 256)
    records = read_split(small_dataset, "train", MISSION)[:6]  # rows of different lengths
    frames = fine_tune.decode_frames(Dataset(small_dataset, MISSION), records, 256, silent)
    whole = encode(
        processor,
        [frames[record.image] for record in records],
        [record.user_text for record in records],
        [record.answer for record in records],
    )
    model = load_model(small_base, dtype="float32")
    cut = collator(processor, frames)(records)
    with torch.no_grad():
        first, second = model(**whole), model(**cut)
    assert float(second.loss) == pytest.approx(float(first.loss), abs=1e-5)
    assert second.logits.shape[1] < first.logits.shape[1] / 3


def test_gradients_are_those_of_the_plain_recipe(small_base: Path, small_dataset: Path) -> None:
    """One record at a time through transformers' own model: its own image, a mask, logits and loss of the whole row."""
    import torch
    from transformers import Lfm2VlForConditionalGeneration

    processor = load_processor(small_base, 256)
    every = read_split(small_dataset, "train", MISSION)
    images = sorted({record.image for record in every})[:3]
    records = [record for record in every if record.image in images]  # each with and without coordinates
    assert len(records) == 6
    frames = fine_tune.decode_frames(Dataset(small_dataset, MISSION), records, 256, silent)
    settings = QUICK.model_copy(update={"dropout": 0.0})
    ours = make_adapted(small_base, settings)
    plain = Lfm2VlForConditionalGeneration.from_pretrained(small_base, dtype=torch.float32)
    plain.load_state_dict(expand_four_bit(load_model(small_base, dtype="float32", four_bit=True)).state_dict())
    plain = fine_tune.add_adapter(plain, settings)[0]
    generator = torch.Generator().manual_seed(3)
    for (name, value), (_, other) in zip(ours.named_parameters(), plain.named_parameters(), strict=True):
        if ".lora_" in name:  # B too, which starts at 0 and would leave A without a gradient
            value.data.normal_(0, 0.02, generator=generator)
            other.data.copy_(value.data)

    batch = collator(processor, frames)(records)
    assert len(batch["pixel_values"]) == 3  # of six rows
    (ours.train()(**batch).loss).backward()
    tokens = 0
    for record in records:
        whole = encode(processor, [frames[record.image]], [record.user_text], [record.answer])
        del whole["image_of_row"]
        count = int((whole["labels"] != IGNORED).sum())
        (plain.train()(**whole).loss * count).backward()
        tokens += count
    compared = 0
    for (name, value), (_, other) in zip(ours.named_parameters(), plain.named_parameters(), strict=True):
        if ".lora_" in name:
            expected = other.grad / tokens
            assert float(expected.norm()) > 0
            assert float((value.grad - expected).norm() / expected.norm()) < 1e-4, name
            compared += 1
    assert compared == 2 * 4 * (1 + 3)


def test_a_tower_that_is_not_trained_is_asked_once_a_frame(
    small_base: Path, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orion_triage.models import lfm2_vl

    looks: list[int] = []
    kind = lfm2_vl.model_class()
    look = kind.look
    # Counted, and done as before.
    monkeypatch.setattr(kind, "look", lambda model, **pixels: looks.append(1) or look(model, **pixels))
    runs = {}

    def progress(description: str, done: int, total: int) -> None:
        if (description, done) == ("loading the base", 2):  # the preflight's looks do not count
            looks.clear()

    for kept in (True, False):
        settings = QUICK.model_copy(update={"scope": "language-attention"})
        if not kept:
            # The same training without the shortcut.
            monkeypatch.setattr(FineTuneSettings, "trains_tower", property(lambda self: True))
        out, work = tmp_path / f"{kept}", tmp_path / f"work-{kept}"
        figures = fine_tune.run(small_base, Dataset(few, MISSION), out, work, settings, 256, progress)
        runs[kept] = (len(looks), figures["eval_losses"])
    images = {record.image for split in ("train", "val") for record in read_split(few, split, MISSION)}
    assert runs[True][0] == len(images)
    assert runs[False][0] == 4  # two steps and two validations
    assert runs[True][1] == pytest.approx(runs[False][1], abs=1e-5)


def test_the_warm_up_counts_the_steps_of_all_processes() -> None:
    """480 records in steps of 16: 30 an epoch, by one process of 16 micro batches or two of 8."""
    settings = FineTuneSettings(warmup_fraction=0.1)
    assert warmup_steps(settings, 480, 1) == 9
    assert warmup_steps(settings.model_copy(update={"gradient_accumulation_steps": 8}), 480, 2) == 9
    assert warmup_steps(FineTuneSettings(), 480, 1) == 0


def test_a_file_that_comes_late_does_not_damage_a_checkpoint(tmp_path: Path) -> None:
    """As another process writes it; the listed files decide."""
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    (folder / "weights").write_bytes(b"weights")
    assert last_checkpoint(tmp_path) is None  # without a listing
    (folder / HASHES_FILE).write_text("{}")
    assert last_checkpoint(tmp_path) is None  # that lists nothing
    (folder / HASHES_FILE).write_text(json.dumps(hash_outputs(folder, without=HASHES_FILE)))
    (folder / "rng_state_1.pth").write_bytes(b"late")
    remove_damaged(tmp_path)
    assert last_checkpoint(tmp_path) == folder
    (folder / "weights").write_bytes(b"Weights")
    remove_damaged(tmp_path)
    assert not folder.exists()


def test_groupings_keep_the_records_of_a_step() -> None:
    settings = FineTuneSettings()  # 1 x 16 with checkpointing
    found = [(g.micro_batch_size, g.gradient_accumulation_steps, g.gradient_checkpointing)
             for g in groupings(settings)]  # fmt: skip
    assert found == [(16, 1, False), (8, 2, False), (4, 4, False), (2, 8, False), (1, 16, False),
                     (16, 1, True), (8, 2, True), (4, 4, True), (2, 8, True), (1, 16, True)]  # fmt: skip
    assert [g.gradient_checkpointing for g in groupings(QUICK)] == [False]


def test_batch_two_by_one_equals_one_by_two(small_base: Path, few: Path, tmp_path: Path) -> None:
    results = []
    for micro, accumulated in ((2, 1), (1, 2)):
        settings = QUICK.model_copy(
            update={
                "micro_batch_size": micro,
                "gradient_accumulation_steps": accumulated,
                "epochs": 1,
                "dropout": 0.0,
                "optimizer": "adamw_torch",
                "learning_rate": 1e-3,
            }
        )
        out = tmp_path / f"adapter-{micro}"
        fine_tune.run(small_base, Dataset(few, MISSION), out, tmp_path / f"work-{micro}", settings, 256)
        results.append(tensors_of(out))
    assert largest_difference(*results) < 2e-4  # four steps of 1e-3 each


@pytest.mark.slow
def test_gradient_checkpointing_changes_no_result(small_base: Path, few: Path, tmp_path: Path) -> None:
    results = []
    for on in (False, True):
        settings = QUICK.model_copy(update={"gradient_checkpointing": on, "epochs": 1, "micro_batch_size": 4})
        out = tmp_path / f"adapter-{on}"
        fine_tune.run(small_base, Dataset(few, MISSION), out, tmp_path / f"work-{on}", settings, 256)
        results.append(tensors_of(out))
    assert largest_difference(*results) < 1e-4


def test_a_base_in_sixteen_bits_trains_too(
    small_base: Path, small_adapter: Path, small_dataset: Path, tmp_path: Path
) -> None:
    settings = QUICK.model_copy(update={"base_weights": "16-bit", "epochs": 1})
    figures = fine_tune.run(
        small_base, Dataset(small_dataset, MISSION), tmp_path / "adapter", tmp_path / "work", settings, 256
    )
    assert figures["preflight"]["smallest_vision_cosine"] == pytest.approx(1)
    assert figures["last_loss"] < figures["first_loss"]
    assert figures["trained_parameters"] == {"text": 28672, "vision": 24576}
    of_four_bits, of_sixteen = (losses(folder, "loss")[0] for folder in (small_adapter, tmp_path / "adapter"))
    assert of_sixteen != of_four_bits


def losses(adapter: Path, name: str) -> list[float]:
    log = json.loads((adapter / "loss_log.json").read_text())
    return [entry[name] for entry in log if name in entry]


def test_ways_to_share_out_a_base_that_do_not_train_right_are_refused_by_name(
    small_base: Path, small_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variables that accelerate's launcher sets from a configuration."""
    layers = "FSDP_TRANSFORMER_CLS_TO_WRAP"
    right = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
    right["FSDP_AUTO_WRAP_POLICY"] = "TRANSFORMER_BASED_WRAP"
    sharded = QUICK.model_copy(update={"base_weights": "16-bit", "optimizer": "adamw_torch_fused"})
    for settings, more, said in (
        (QUICK, {}, "base_weights=nf4: FSDP shards 4-bit weights not"),
        (sharded.model_copy(update={"optimizer": "paged_adamw_8bit"}), {}, "optimizer=paged_adamw_8bit: FSDP cannot"),
        (sharded, {"FSDP_VERSION": "1"}, "FSDP_VERSION=1: version 1 flattens"),
        (sharded, {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}, "SHARDED_STATE_DICT: a checkpoint would lack"),
        (sharded, {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "LOADING=true: all processes but one would check"),
        (sharded, {"FSDP_OFFLOAD_PARAMS": "true"}, "OFFLOAD_PARAMS=true: offloading was never run"),
        (sharded, {"FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}, "WRAP_POLICY=NO_WRAP: other ways to divide the model were"),
        (sharded, {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "ING=true: fine_tune.gradient_checkpointing does it"),
        (sharded, {layers: "Qwen2DecoderLayer"}, "=Qwen2DecoderLayer: the layers of this base are Lfm2D.*, Siglip2E"),
        (sharded, {layers: "Lfm2DecoderLayer"}, "=Lfm2DecoderLayer: the layers of this base are Lfm2D.*, Siglip2E"),
    ):
        for name, value in (right | more).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(OrionError, match=said):
            fine_tune.run(
                small_base, Dataset(small_dataset, MISSION), tmp_path / "adapter", tmp_path / "work", settings, 256
            )
        for name in more:
            monkeypatch.delenv(name)
    assert not list(tmp_path.iterdir())
    with pytest.raises(OrionError, match="precision=float16: FSDP with scaled losses was never run"):
        fine_tune._check_sharding(sharded, "float16")  # a precision of GPUs
    fine_tune._check_sharding(sharded, "bfloat16")


@pytest.mark.slow
def test_an_interrupted_run_ends_like_a_straight_one(
    small_base: Path, small_adapter: Path, small_dataset: Path, tmp_path: Path
) -> None:
    """`small_adapter` is from a straight one. What goes on afterwards goes on from the last whole checkpoint."""
    work = tmp_path / "work"

    def train(out: str, settings: FineTuneSettings = QUICK, progress: Any = silent) -> dict[str, Any]:
        return fine_tune.run(small_base, Dataset(small_dataset, MISSION), tmp_path / out, work, settings, 256, progress)

    with pytest.raises(InterruptionError):
        train("a", progress=stop_at(5))  # in the second epoch
    assert not (tmp_path / "a").exists()
    half_written = work / "checkpoints" / "checkpoint-5"  # as if the power had gone while saving
    half_written.mkdir()
    (half_written / "adapter_model.safetensors").write_bytes(b"cut")
    resumed = train("a")
    assert (resumed["resumed_from_step"], resumed["steps"]) == (3, 6)
    assert resumed["eval_losses"] == pytest.approx(losses(small_adapter, "eval_loss"), abs=1e-4)
    assert largest_difference(tensors_of(small_adapter), tensors_of(tmp_path / "a")) < 1e-4

    finished = train("b")
    assert finished["resumed_from_step"] == 6
    assert largest_difference(tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")) == 0

    assert sorted(path.name for path in (work / "checkpoints").iterdir()) == ["checkpoint-3", "checkpoint-6"]
    newest = work / "checkpoints" / "checkpoint-6" / "adapter_model.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    again = train("c")
    assert again["resumed_from_step"] == 3
    assert again["eval_losses"] == pytest.approx(resumed["eval_losses"], rel=1e-4)

    with pytest.raises(InterruptionError):  # other settings begin at their first step
        train("d", QUICK.model_copy(update={"learning_rate": 5e-3}), stop_at(1))


def test_mistakes_are_named_before_a_model_is_loaded(small_base: Path, small_dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(OrionError, match=r"train_dataset\.jsonl does not exist"):
        fine_tune.run(small_base, Dataset(tmp_path, MISSION), tmp_path / "a", tmp_path / "work", QUICK, 256)
    broken = tmp_path / "dataset"
    shutil.copytree(small_dataset, broken)
    record = read_split(broken, "val", MISSION)[0]
    (broken / record.image).unlink()
    with pytest.raises(OrionError, match=rf"{record.name}\.png does not exist"):
        fine_tune.run(small_base, Dataset(broken, MISSION), tmp_path / "a", tmp_path / "work", QUICK, 256)


def test_a_dataset_of_one_picture_is_refused(small_base: Path, small_dataset: Path, tmp_path: Path) -> None:
    flat = tmp_path / "dataset"
    shutil.copytree(small_dataset, flat)
    images = sorted((flat / "orion_dataset" / "images").glob("*.png"))
    for image in images[1:]:
        shutil.copy(images[0], image)
    with pytest.raises(OrionError, match="have the same picture"):
        fine_tune.run(small_base, Dataset(flat, MISSION), tmp_path / "a", tmp_path / "work", QUICK, 256)


def test_an_unknown_target_is_refused(small_base: Path, small_dataset: Path, tmp_path: Path) -> None:
    settings = QUICK.model_copy(update={"target_modules": ("q_proj", "c_proj")})
    with pytest.raises(OrionError, match="c_proj matches no module"):
        fine_tune.run(small_base, Dataset(small_dataset, MISSION), tmp_path / "a", tmp_path / "work", settings, 256)


def test_every_line_of_the_file_is_trained_on(small_dataset: Path, small_base: Path) -> None:
    records = read_split(small_dataset, "train", MISSION)
    lines = split_path(small_dataset, "train").read_text().splitlines()
    frames = fine_tune.decode_frames(Dataset(small_dataset, MISSION), records, 256, silent)
    batch = collator(load_processor(small_base, 256), frames)(records)
    tokenizer = load_processor(small_base, 256).tokenizer
    for line, ids in zip(lines, batch["input_ids"], strict=True):
        user, assistant = (turn["content"] for turn in json.loads(line)["conversations"])
        text = tokenizer.decode(ids[ids != tokenizer.pad_token_id]).replace(
            "<|image_start|>" + "<image>" * 64, "<image>"
        )
        assert text == (
            "<|startoftext|><|im_start|>user\n"
            + user.replace("<image>", "<image><|image_end|>")
            + "<|im_end|>\n<|im_start|>assistant\n"
            + assistant
            + "<|im_end|>"
        )
