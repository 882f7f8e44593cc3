"""The two records of a frame in one micro batch, and what they share computed once."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orion_triage.dataset.dataset import Dataset
from orion_triage.dataset.records import Record, read_split
from orion_triage.errors import OrionError
from orion_triage.mission.mission import Mission
from orion_triage.mission.prompt import Coordinates
from orion_triage.mission.verdict import Verdict
from orion_triage.models import lfm2_vl
from orion_triage.models.encode import encode_rows, shared_tokens
from orion_triage.models.load import TINY_BASE_FOLDER, load_model, load_processor
from orion_triage.progress import silent
from orion_triage.settings import FineTuneSettings
from orion_triage.train import fine_tune
from orion_triage.train.device import Device
from orion_triage.train.trainer import collator, make_trainer
from orion_triage.train.twins import TwinsSampler, check_shared_prefix, costliest_first, twins_of
from tests.conftest import MISSION
from tests.train.trainings import QUICK, InterruptionError, largest_difference, stop_at, tensors_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*checkpointing.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Paged optimizers:UserWarning"),
]

TOGETHER = QUICK.model_copy(update={"micro_batch_size": 4, "gradient_accumulation_steps": 2, "twins_together": True})


def record(name: str, *, coordinates: bool = True) -> Record:
    where = Coordinates(2.5, 1.25) if coordinates else None
    return Record(f"{name}.png", where, Verdict("Dunes.", "LOW"), MISSION)


def twins(*names: str) -> list[Record]:
    return [record(name, coordinates=coordinates) for name in names for coordinates in (True, False)]


def order(records: list[Record], seed: int = 42, epoch: int = 0) -> list[int]:
    sampler = TwinsSampler(records, seed)
    sampler.set_epoch(epoch)
    assert len(sampler) == len(records)
    return list(sampler)


def cut_pairs(records: list[Record], indices: list[int], size: int) -> int:
    """How many twins are not in one micro batch."""
    batches = [set(indices[start : start + size]) for start in range(0, len(indices), size)]
    return sum(not any(set(pair) <= batch for batch in batches) for pair in twins_of(records) if len(pair) == 2)


def test_an_order_has_every_record_once_and_cuts_no_twins() -> None:
    names = [f"place_{number}" for number in range(30)]
    paired = twins(*names)
    mixed = [*(record(f"alone_{number}") for number in range(7)), *paired, record("last")]
    odd = [record("first"), *paired]
    for records in (paired, mixed, odd, paired[::2], twins("one"), [record("only")]):
        for seed in range(5):
            indices = order(records, seed)
            assert sorted(indices) == list(range(len(records)))
            for size in (2, 4, 8, 16):
                assert cut_pairs(records, indices, size) == 0
    assert cut_pairs(paired, list(range(1, 60)), 2) == 30  # what the count is of, where each is cut
    assert order(odd)[-1] == 0


def test_an_order_depends_on_seed_and_epoch_only() -> None:
    records = [*twins(*map(str, range(30))), *(record(f"alone_{number}") for number in range(6))]
    first = order(records)
    assert first == order(records)
    others = [order(records, epoch=1), order(records, seed=43), order(records, seed=43, epoch=1)]
    assert len({tuple(indices) for indices in (first, *others)}) == 4  # seed 43 is not seed 42 one epoch later
    sampler = TwinsSampler(records, 42)
    assert list(sampler) == list(sampler) == first  # asking again, as a resumed run does, moves nothing
    # Random among each other: neither in the order of the file, nor the same neighbours in the next epoch.
    places = [index // 2 for index in first if index < 60][::2]
    assert places != sorted(places)
    alone = [[index for index in indices if index >= 60] for indices in (first, others[0])]
    assert alone[0] != alone[1]


def test_several_processes_get_whole_pairs() -> None:
    """Through accelerate's own sharding, which is what a launched training uses."""
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler

    records = twins(*map(str, range(10)))
    shards = [
        list(BatchSamplerShard(BatchSampler(TwinsSampler(records, 1), 4, drop_last=False), 2, process))
        for process in range(2)
    ]
    assert [len(shard) for shard in shards] == [3, 3]
    seen = [index for shard in shards for batch in shard for index in batch]
    assert set(seen) == set(range(20))
    for batch in (batch for shard in shards for batch in shard):
        assert all({index, index ^ 1} <= set(batch) for index in batch)


def test_more_records_of_an_image_are_taken_two_by_two() -> None:
    records = [*twins("a"), record("b"), *twins("a"), record("a")]  # as in a rehearsal, which repeats its records
    assert twins_of(records) == [(0, 1), (3, 4), (5,), (2,)]
    assert [one.image for one in costliest_first(records)] == ["a.png", "b.png", "a.png", "a.png", "a.png", "a.png"]


def test_the_shared_tokens_end_at_the_coordinates(small_base: Path, small_frames: list[Any]) -> None:
    processor = load_processor(small_base, 256)
    images = [small_frames[0], small_frames[0], small_frames[1]]

    def common(*prompts: str) -> tuple[int, str]:
        rows = encode_rows(processor, images[: len(prompts)], prompts, ["x"] * len(prompts))
        count = shared_tokens(processor, rows)
        return count, processor.tokenizer.decode(rows[0].turn[:count])

    count, text = common(*(one.user_text for one in (*twins("a"), record("b"))))
    assert count > 64
    assert text.endswith("satellite image")
    assert common(twins("a")[0].user_text) == (0, "")  # one row: nothing to share
    count, text = common("<image>\nThe same.", "<image>\nThe same.")
    assert text.endswith("assistant")  # not the last token of the turn, whose logits are needed
    rows = encode_rows(processor, [small_frames[0]] * 2, ["<image>\nOne", "<image>\nTwo"], ["x", "x"])
    rows[1].turn[1] += 1  # a word before the image differs
    assert shared_tokens(processor, rows) == 0


def adapted(base: Path, settings: FineTuneSettings, *, four_bit: bool) -> Any:
    """The base with LoRA matrices that are not zero, which B is at first."""
    import torch

    model = fine_tune.add_adapter(load_model(base, dtype="float32", four_bit=four_bit), settings)[0]
    generator = torch.Generator().manual_seed(3)
    for name, value in model.named_parameters():
        if ".lora_" in name:
            value.data.normal_(0, 0.02, generator=generator)
    return model


def gradients(model: Any, batch: Any) -> tuple[float, dict[str, Any]]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return float(loss.detach()), {
        name: value.grad for name, value in model.named_parameters() if value.grad is not None
    }


def batch_of(base: Path, dataset: Path, records: list[Record]) -> Any:
    frames = fine_tune.decode_frames(Dataset(dataset, MISSION), records, 256, silent)
    return collator(load_processor(base, 256), frames, share_prefix=True)(records)


def plain(batch: Any) -> dict[str, Any]:
    return {key: value for key, value in batch.items() if key != "shared_tokens"}


@pytest.mark.parametrize(
    ("base", "scope", "four_bit"),
    [("small", "attention", True), ("small", "language-all", False), ("tiny", "attention", False)],
)
def test_a_shared_prefix_gives_the_plain_loss_and_gradients(
    small_base: Path, small_dataset: Path, base: str, scope: Any, four_bit: bool
) -> None:
    """Module by module; the shipped base has a convolution after its attention, as the 1.6B model has."""
    import torch

    folder = small_base if base == "small" else TINY_BASE_FOLDER
    # Images with two rows, one row and two rows, whose lengths differ.
    records = [*read_split(small_dataset, "train", MISSION)[:3], *read_split(small_dataset, "train", MISSION)[4:6]]
    batch = batch_of(folder, small_dataset, records)
    assert batch["image_of_row"].tolist() == [0, 0, 1, 2, 2]
    assert batch["shared_tokens"] > 64
    settings = TOGETHER.model_copy(update={"dropout": 0.0, "scope": scope})
    model = adapted(folder, settings, four_bit=four_bit).train()
    loss, shared = gradients(model, batch)
    expected_loss, expected = gradients(model, plain(batch))
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert shared.keys() == expected.keys()
    assert len(shared) >= 2 * 8
    for name, gradient in shared.items():
        assert float(expected[name].norm()) > 0
        assert float((gradient - expected[name]).norm() / expected[name].norm()) < 1e-4, name

    # The answer hardly depends on what the convolutions keep of the prefix; the first tokens after it do.
    tail = {key: value for key, value in batch.items() if key != "labels"}
    tail["logits_to_keep"] = batch["input_ids"].shape[1] - batch["shared_tokens"]
    model.eval()
    with torch.no_grad():
        assert torch.allclose(model(**tail).logits, model(**plain(tail)).logits, atol=1e-4)

    if base == "small":
        assert float(model(**batch).loss.detach()) == pytest.approx(expected_loss, rel=1e-5)
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        assert gradients(model, batch)[0] == expected_loss  # to the bit: it is the plain path


@pytest.mark.parametrize("base", ["small", "tiny"])
def test_a_text_before_the_image_is_read_once_for_all_rows(small_base: Path, small_dataset: Path, base: str) -> None:
    """Rows of different images, with and without coordinates: loss and gradients are those of the plain path."""
    own = Mission.model_validate(MISSION.model_dump() | {"image": "after the text"})
    records = [replace(one, mission=own) for one in read_split(small_dataset, "train", MISSION)]
    folder = small_base if base == "small" else TINY_BASE_FOLDER
    batch = batch_of(folder, small_dataset, [records[0], records[3], records[4], records[7]])
    assert len(set(batch["image_of_row"].tolist())) == 4
    image = load_processor(folder, 256).image_token_id
    before = batch["input_ids"][:, : batch["shared_tokens"]]
    assert batch["shared_tokens"] > 150
    assert image not in before
    assert (batch["input_ids"][:, batch["shared_tokens"]] == image).all()
    model = adapted(folder, TOGETHER.model_copy(update={"dropout": 0.0}), four_bit=False).train()
    shapes: list[tuple[int, ...]] = []
    hook = model.model.model.language_model.register_forward_pre_hook(
        lambda module, inputs, options: shapes.append(tuple(options["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    loss, shared = gradients(model, batch)
    assert shapes == [(1, before.shape[1]), (4, batch["input_ids"].shape[1] - before.shape[1])]
    hook.remove()
    expected_loss, expected = gradients(model, plain(batch))
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert shared.keys() == expected.keys()
    for name, gradient in shared.items():
        assert float(expected[name].norm()) > 0
        assert float((gradient - expected[name]).norm() / expected[name].norm()) < 1e-4, name
    together = batch_of(folder, small_dataset, records[:2])  # one image: it is read once, too
    assert image in together["input_ids"][0, : together["shared_tokens"]]
    check_shared_prefix(
        model,
        collator(
            load_processor(folder, 256),
            fine_tune.decode_frames(Dataset(small_dataset, MISSION), records, 256, silent),
            share_prefix=True,
        ),
        records[::2],
        "float32",
    )


def test_the_language_model_reads_a_prefix_once_an_image(
    small_base: Path, small_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = read_split(small_dataset, "train", MISSION)[:4]
    batch = batch_of(small_base, small_dataset, records)
    model = load_model(small_base, dtype="float32")
    shapes = []
    model.model.language_model.register_forward_pre_hook(
        lambda module, inputs, options: shapes.append(tuple(options["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    model(**batch)
    tokens = batch["input_ids"].shape[1]
    assert shapes == [(2, batch["shared_tokens"]), (4, tokens - batch["shared_tokens"])]


def test_gradients_pass_in_sixteen_bits_of_autocast(small_base: Path, small_dataset: Path) -> None:
    import torch

    batch = batch_of(small_base, small_dataset, read_split(small_dataset, "train", MISSION)[:4])
    settings = TOGETHER.model_copy(update={"dropout": 0.0})
    model = adapted(small_base, settings, four_bit=False).train()
    _, exact = gradients(model, plain(batch))
    found = []
    for one in (batch, plain(batch)):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(gradients(model, one)[1])
    for name, expected in exact.items():  # as near to those of float32 as the plain path in 16 bits
        shared, own = (float((one[name] - expected).norm() / expected.norm()) for one in found)
        assert shared < max(2 * own, 0.05), name


def forget_convolutions(model: Any, input_ids: Any, seen: Any, image_of_row: Any) -> Any:
    cache = READ(model, input_ids, seen, image_of_row)
    for layer in cache.layers:
        if hasattr(layer, "conv_states"):
            layer.conv_states[0] = layer.conv_states[0].zero_()
    return cache


def lose_a_token(model: Any, input_ids: Any, seen: Any, image_of_row: Any) -> Any:
    return READ(model, input_ids[:, :-1], seen, image_of_row)


def lose_the_image(model: Any, input_ids: Any, seen: Any, image_of_row: Any) -> Any:
    return READ(model, input_ids, 0 * seen, image_of_row)


Lfm2VlForConditionalGeneration = lfm2_vl.model_class()
READ = Lfm2VlForConditionalGeneration.read


@pytest.mark.parametrize("fault", [forget_convolutions, lose_a_token, lose_the_image, None])
def test_a_cache_that_loses_something_is_refused(
    small_dataset: Path, monkeypatch: pytest.MonkeyPatch, fault: Any
) -> None:
    """What another version of transformers could do; none is at hand, so it is done here to what the cache holds."""
    records = read_split(small_dataset, "train", MISSION)[:4]
    frames = fine_tune.decode_frames(Dataset(small_dataset, MISSION), records, 256, silent)
    collate = collator(load_processor(TINY_BASE_FOLDER, 256), frames, share_prefix=True)
    model = load_model(TINY_BASE_FOLDER, dtype="float32")
    if fault is None:
        check_shared_prefix(model, collate, records, "float32")
        check_shared_prefix(model, collate, records[::2], "float32")  # no twins: nothing to check
        return
    monkeypatch.setattr(Lfm2VlForConditionalGeneration, "read", fault)
    with pytest.raises(OrionError, match="changes a token's logits by"):
        check_shared_prefix(model, collate, records, "float32")


@pytest.mark.slow
def test_a_training_of_twins_keeps_its_steps_and_resumes_to_the_same_adapter(
    small_base: Path, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    forward = Lfm2VlForConditionalGeneration.forward

    def watched(model: Any, *arguments: Any, **options: Any) -> Any:  # counted, and done as before
        if model.training:
            asked.append((len(options["input_ids"]), len(options["pixel_values"])))
        return forward(model, *arguments, **options)

    monkeypatch.setattr(Lfm2VlForConditionalGeneration, "forward", watched)

    settings = TOGETHER.model_copy(update={"micro_batch_size": 2})

    def train(name: str, work: str, progress: Any = silent) -> dict[str, Any]:
        return fine_tune.run(
            small_base, Dataset(few, MISSION), tmp_path / name, tmp_path / work, settings, 256, progress
        )

    straight = train("straight", "work")
    assert straight["steps"] == 4
    assert asked == [(2, 1)] * 8
    with pytest.raises(InterruptionError):
        train("resumed", "interrupted", stop_at(3))  # in the middle of the second epoch
    assert train("resumed", "interrupted")["resumed_from_step"] == 2
    assert largest_difference(*(tensors_of(tmp_path / name) for name in ("straight", "resumed"))) < 1e-4
    logs = [json.loads((tmp_path / name / "loss_log.json").read_text()) for name in ("straight", "resumed")]
    assert [entry.get("loss") for entry in logs[0]] == pytest.approx([entry.get("loss") for entry in logs[1]], abs=1e-4)


def test_the_order_of_a_training_is_the_samplers(small_base: Path, small_dataset: Path, tmp_path: Path) -> None:
    """Whatever transformers and accelerate wrap around it: the records of two epochs, as they reach the collator."""
    records, val_records = (
        read_split(small_dataset, "train", MISSION)[:16],
        read_split(small_dataset, "val", MISSION)[:2],
    )
    frames = fine_tune.decode_frames(Dataset(small_dataset, MISSION), [*records, *val_records], 256, silent)
    processor = load_processor(small_base, 256)
    collate = collator(processor, frames, share_prefix=True)
    seen: list[int] = []

    def watched(batch: list[Record]) -> Any:
        seen.extend(records.index(one) for one in batch if one in records)
        return collate(batch)

    model = adapted(small_base, TOGETHER, four_bit=False)
    settings = TOGETHER.model_copy(update={"micro_batch_size": 8, "gradient_accumulation_steps": 1})
    cpu = Device("cpu", "float32")
    make_trainer(model, processor.tokenizer, watched, records, val_records, settings, cpu, tmp_path, silent).train()
    assert seen == [*order(records, epoch=0), *order(records, epoch=1)]
