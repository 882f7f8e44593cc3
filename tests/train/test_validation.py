"""The validation that chooses the epoch: both forms of the question, averages over tokens and records, any batches."""

import statistics
from pathlib import Path
from typing import Any

import pytest

from orion_triage.dataset.dataset import Dataset
from orion_triage.dataset.records import Record, read_split
from orion_triage.mission.prompt import Coordinates
from orion_triage.mission.verdict import Verdict, answer_text
from orion_triage.models.generate import answer_log_probabilities
from orion_triage.models.load import TINY_BASE_FOLDER, load_model, load_processor
from orion_triage.progress import silent
from orion_triage.settings import FineTuneSettings
from orion_triage.train import fine_tune
from orion_triage.train.device import Device
from orion_triage.train.trainer import collator, losses_of, make_trainer
from orion_triage.train.validation import asked_twice, category_place, chosen_step
from tests.conftest import MISSION

pytestmark = pytest.mark.filterwarnings("ignore:.*checkpointing.* is deprecated:FutureWarning")

REASONS = ("", "A reef.", 'It says "category": in words.', "Port. " * 20)


@pytest.mark.parametrize("category", MISSION.names)
@pytest.mark.parametrize("reason", REASONS)
@pytest.mark.parametrize("of", ["shipped", "small"])
def test_the_category_is_found_in_an_answers_tokens(category: str, reason: str, of: str, small_base: Path) -> None:
    tokenizer = load_processor(TINY_BASE_FOLDER if of == "shipped" else small_base, 256).tokenizer
    answer = tokenizer(answer_text(MISSION, Verdict(reason, category)) + "<|im_end|>", add_special_tokens=False)[
        "input_ids"
    ]
    place = category_place(tokenizer, answer)
    spelled = tokenizer.decode([answer[index] for index in place])
    assert category in spelled
    assert spelled.strip('"} ') == category
    assert place.stop < len(answer)


def test_a_record_is_asked_without_and_with_its_coordinates() -> None:
    first = Record("a.png", Coordinates(1, 2), Verdict("", "LOW"), MISSION)
    blind = first.without_coordinates()
    assert asked_twice([first, blind]) == [blind, first, blind]


def epochs(*rows: tuple[float, float, float]) -> list[dict[str, float]]:
    """(loss of the category, its standard error, loss of the verdict) of each epoch, between steps of training."""
    log: list[dict[str, float]] = []
    for number, (category, error, loss) in enumerate(rows, start=1):
        log.append({"step": number, "loss": 9.0})
        log.append(
            {"step": number, "eval_loss_category": category, "eval_loss_category_error": error, "eval_loss": loss}
        )
    return log


def test_the_category_chooses_the_epoch_and_where_it_cannot_the_whole_verdict() -> None:
    assert chosen_step(epochs((0.9, 0.1, 1.6), (0.45, 0.1, 0.94), (0.48, 0.1, 0.77))) == 3  # within one error
    assert chosen_step(epochs((0.9, 0.1, 1.6), (0.45, 0.1, 0.94), (0.56, 0.1, 0.77))) == 2  # beyond it
    assert chosen_step(epochs((0.9, 0.1, 1.6), (0.45, 0.02, 0.94), (0.48, 0.9, 0.77))) == 2  # the best one's error
    assert chosen_step(epochs((0.5, 0.1, 0.7), (0.5, 0.1, 0.7))) == 1  # a tie


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_the_figures_do_not_depend_on_the_batches(
    batch: int, small_base: Path, small_dataset: Path, tmp_path: Path
) -> None:
    """Against `answer_log_probabilities`, one row at a time; the reasons differ in length."""
    records = read_split(small_dataset, "val", MISSION)
    records = [
        Record(
            record.image,
            Coordinates(3.5, 4.5),
            Verdict(record.verdict.reason * (1 + number), record.verdict.category),
            MISSION,
        )
        for number, record in enumerate(records[:3])
    ]
    processor = load_processor(small_base, 256)
    frames = fine_tune.decode_frames(Dataset(small_dataset, MISSION), records, 256, silent)
    settings = FineTuneSettings(micro_batch_size=batch, gradient_checkpointing=False)
    model = load_model(small_base, dtype="float32")
    expected: dict[str, float] = {}
    for form, rows in (("", [r.without_coordinates() for r in records]), ("_with_coordinates", records)):
        answers = [row.answer for row in rows]
        scores = answer_log_probabilities(
            model, processor, [frames[row.image] for row in rows], [row.user_text for row in rows], answers
        )
        expected[f"eval_loss{form}"] = -sum(float(s.sum()) for s in scores) / sum(len(s) for s in scores)
        of_category = []
        for answer, score in zip(answers, scores, strict=True):
            ids = processor.tokenizer(answer + "<|im_end|>", add_special_tokens=False)["input_ids"]
            of_category.append(-sum(float(score[place]) for place in category_place(processor.tokenizer, ids)))
        expected[f"eval_loss_category{form}"] = sum(of_category) / len(rows)
        expected.setdefault("eval_loss_category_error", statistics.stdev(of_category) / len(rows) ** 0.5)
    assert expected["eval_loss"] != pytest.approx(expected["eval_loss_with_coordinates"], rel=1e-6)
    model, _ = fine_tune.add_adapter(model, settings)
    trainer: Any = make_trainer(
        model, processor.tokenizer, collator(processor, frames), records, records, settings, Device("cpu", "float32"),
        tmp_path, silent,
    )  # fmt: skip
    found = trainer.evaluate()
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-5)
    assert {key: losses_of(trainer)[0][key] for key in expected} == pytest.approx(expected, rel=1e-5)
