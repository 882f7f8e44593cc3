"""flight.py: what happens to each file of a triage, whoever answers."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from orion_triage.errors import OrionError
from orion_triage.flight.triage import appending, frames_in, left_to_do, triage_files
from orion_triage.mission.answer import Answer
from orion_triage.mission.decide import BLANK_REASON, Rules
from orion_triage.mission.prompt import render_prompt
from orion_triage.mission.verdict import Category, Verdict

from .conftest import structured_picture

HIGH = Verdict("Long quays.", Category.HIGH)


class Saying:
    """A backend that gives one answer after the other."""

    batch_size = 1

    def __init__(self, *texts: str, scores: tuple[float, ...] | None = None) -> None:
        self.answers = [Answer(text, scores) for text in texts]
        self.asked: list[tuple[tuple[int, int], str]] = []

    def answer(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[Answer]:
        self.asked += [(image.size, prompt) for image, prompt in zip(images, prompts, strict=True)]
        return [self.answers.pop(0) for _ in images]


def test_a_threshold_decides_by_the_scores_and_keeps_the_reason(tmp_path: Path) -> None:
    structured_picture(1).save(tmp_path / "a.png")
    low = Verdict("Long quays.", Category.LOW).to_json()
    for threshold, category in ((0.5, Category.LOW), (0.7, Category.MEDIUM), (2.0, Category.MEDIUM)):
        backend = Saying(low, scores=(0.1, 0.3, 0.6))
        (outcome,) = triage_files([tmp_path / "a.png"], backend, 256, rules=Rules(threshold))
        assert outcome.verdict == Verdict("Long quays.", category)
        assert outcome.answer is not None
        assert outcome.answer.scores == (0.1, 0.3, 0.6)
    (plain,) = triage_files([tmp_path / "a.png"], Saying(low, scores=(0.1, 0.3, 0.6)), 256)
    assert plain.verdict == Verdict("Long quays.", Category.LOW)


def test_each_file_has_an_outcome_and_only_pictures_are_asked_about(tmp_path: Path) -> None:
    structured_picture(1).save(tmp_path / "a.png")
    (tmp_path / "b.raw").write_bytes(b"short")
    Image.new("RGB", (512, 512), (250, 250, 250)).save(tmp_path / "c.png")
    structured_picture(2).save(tmp_path / "d.png")
    backend = Saying(HIGH.to_json(), "I think it is HIGH")
    a, b, c, d = triage_files([tmp_path / f"{name}" for name in ("a.png", "b.raw", "c.png", "d.png")], backend, 256)
    assert a.verdict == HIGH
    assert (b.verdict, "b.raw has 5 bytes" in b.error) == (None, True)
    assert c.verdict == Verdict(BLANK_REASON, Category.LOW)
    assert c.blank
    assert d.verdict is None
    assert "d.png: the model gave no verdict" in d.error
    assert backend.asked == [((256, 256), render_prompt(None))] * 2
    asked = Saying(HIGH.to_json())
    (without,) = triage_files([tmp_path / "c.png"], asked, 256, rules=Rules(blank_is_low=False))
    assert (without.verdict, without.blank, len(asked.asked)) == (HIGH, False, 1)


def test_the_native_size_of_a_resized_frame_is_kept(tmp_path: Path) -> None:
    structured_picture(1).resize((700, 600)).save(tmp_path / "a.png")
    (refused,) = triage_files([tmp_path / "a.png"], Saying(HIGH.to_json()), 256)
    assert "--resize" in refused.error
    (outcome,) = triage_files([tmp_path / "a.png"], Saying(HIGH.to_json()), 256, resize=True)
    assert (outcome.verdict, outcome.native_size) == (HIGH, (700, 600))


def test_a_folder_means_its_pictures_by_name(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "c.raw", "notes.txt", ".hidden"):
        (tmp_path / name).touch()
    (tmp_path / "deeper").mkdir()
    assert [path.name for path in frames_in([tmp_path, tmp_path / "notes.txt"])] == [
        "a.JPG", "b.png", "c.raw", "notes.txt",
    ]  # fmt: skip
    with pytest.raises(OrionError, match=r"deeper has no picture"):
        list(frames_in([tmp_path / "deeper"]))


def test_what_a_stopped_triage_wrote_is_not_done_again(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    asked = [Path(name) for name in ("a.png", "b.png", "a.png", "c.png", "a.png")]
    assert left_to_do(asked, out, "p") == asked
    whole = '{"file": "a.png", "pair": "p"}\n{"file": "b.png", "pair": "p"}\n{"file": "a.png", "pair": "p"}\n'
    out.write_text(whole + '{"file": "c.p')
    assert [path.name for path in left_to_do(asked, out, "p")] == ["c.png", "a.png"]  # two lines, asked three times
    assert out.read_text() == whole
    with pytest.raises(OrionError, match=r"out\.jsonl:1 was made by another pair"):
        left_to_do(asked, out, "q")
    out.write_text(whole + "x\n")
    with pytest.raises(OrionError, match=r"out\.jsonl:4 is not a result of 'orion triage'"):
        left_to_do(asked, out, "p")
    assert out.read_text() == whole + "x\n"
    out.write_text(whole)
    with appending(out) as write:
        write({"file": "c.png", "pair": "p"})
        assert out.read_text().endswith('{"file": "c.png", "pair": "p"}\n')  # at once
