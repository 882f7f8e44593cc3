"""flight.py: what happens to each file of a triage, whoever answers."""

from pathlib import Path

from PIL import Image

from orion_triage.flight import BLANK_REASON, triage_files
from orion_triage.triage import Category, Verdict, render_prompt

from .conftest import structured_picture

HIGH = Verdict("Long quays.", Category.HIGH)


def test_each_file_has_an_outcome_and_only_pictures_are_asked_about(tmp_path: Path) -> None:
    structured_picture(1).save(tmp_path / "a.png")
    (tmp_path / "b.raw").write_bytes(b"short")
    Image.new("RGB", (512, 512), (250, 250, 250)).save(tmp_path / "c.png")
    structured_picture(2).save(tmp_path / "d.png")
    asked = []

    def ask(prompt: str, png: bytes) -> str:
        asked.append((prompt, png[:4]))
        return HIGH.to_json() if len(asked) == 1 else "I think it is HIGH"

    a, b, c, d = triage_files([tmp_path / f"{name}" for name in ("a.png", "b.raw", "c.png", "d.png")], ask, 256)
    assert a.verdict == HIGH
    assert (b.verdict, "b.raw has 5 bytes" in b.error) == (None, True)
    assert c.verdict == Verdict(BLANK_REASON, Category.LOW)
    assert c.blank
    assert d.verdict is None
    assert "d.png: the model gave no verdict" in d.error
    assert asked == [(render_prompt(None), b"\x89PNG")] * 2


def test_the_native_size_of_a_resized_frame_is_kept(tmp_path: Path) -> None:
    structured_picture(1).resize((700, 600)).save(tmp_path / "a.png")
    (refused,) = triage_files([tmp_path / "a.png"], lambda prompt, png: HIGH.to_json(), 256)
    assert "--resize" in refused.error
    (outcome,) = triage_files([tmp_path / "a.png"], lambda prompt, png: HIGH.to_json(), 256, resize=True)
    assert (outcome.verdict, outcome.native_size) == (HIGH, (700, 600))
