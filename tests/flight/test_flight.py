"""flight.py: what happens to each file of a triage, whoever answers."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from orion_triage.errors import OrionError
from orion_triage.export.quantize import PAIR
from orion_triage.flight.triage import frames_in, read_earlier, triage_files
from orion_triage.mission.answer import Answer
from orion_triage.mission.decide import BLANK_REASON, Rules
from orion_triage.mission.prompt import user_text
from orion_triage.mission.verdict import Verdict, answer_text
from orion_triage.review.choose import read_log
from orion_triage.safe.files import appending
from tests.conftest import MISSION, structured_picture

HIGH = Verdict("Long quays.", "HIGH")

# 'orion triage' on a run whose server dies after argv[1] answers. Only who answers and the run are replaced: starting
# a real server takes a finished run.
DYING = """
import sys
from pathlib import Path
from types import SimpleNamespace
from orion_triage import cli
from orion_triage.errors import ServerError
from orion_triage.evaluate import threshold
from orion_triage.flight import triage
from orion_triage.mission.answer import Answer
from orion_triage.settings import load_settings

class Dying:
    batch_size, left = 1, int(sys.argv.pop(1))
    def answer(self, images, prompts):
        if not self.left:
            raise ServerError("the server died.", "Start it again.")
        self.left -= 1
        return [Answer('{"reason": "Long [bold]quays[/] :x:.", "category": "HIGH"}')]

run = SimpleNamespace(
    folder=Path("."), gguf=Path("."), settings=load_settings("tiny")
)
triage.triage_with_pair = lambda paths, flown, **_: triage.triage_files(
    paths, Dying(), flown.mission, flown.frame_size
)
threshold.read = lambda *_: None
cli.flight.finished_run = lambda *_, **__: run
cli.main()
"""


class Saying:
    """A backend that gives one answer after the other."""

    batch_size = 1

    def __init__(self, *texts: str, scores: tuple[float, ...] | None = None) -> None:
        self.answers = [Answer(text, scores) for text in texts]
        self.asked: list[tuple[tuple[int, int], str]] = []
        self.pictures: list[Image.Image] = []

    def answer(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[Answer]:
        self.pictures += images
        self.asked += [(image.size, prompt) for image, prompt in zip(images, prompts, strict=True)]
        return [self.answers.pop(0) for _ in images]


def test_a_threshold_decides_by_the_scores_and_keeps_the_reason(tmp_path: Path) -> None:
    structured_picture(1).save(tmp_path / "a.png")
    low = answer_text(MISSION, Verdict("Long quays.", "LOW"))
    for threshold, category in ((0.5, "LOW"), (0.7, "MEDIUM"), (2.0, "MEDIUM")):
        backend = Saying(low, scores=(0.1, 0.3, 0.6))
        (outcome,) = triage_files([tmp_path / "a.png"], backend, MISSION, 256, rules=Rules(threshold))
        assert outcome.verdict == Verdict("Long quays.", category)
        assert outcome.answer is not None
        assert outcome.answer.scores == (0.1, 0.3, 0.6)
    (plain,) = triage_files([tmp_path / "a.png"], Saying(low, scores=(0.1, 0.3, 0.6)), MISSION, 256)
    assert plain.verdict == Verdict("Long quays.", "LOW")


def test_each_file_has_an_outcome_and_only_pictures_are_asked_about(tmp_path: Path) -> None:
    structured_picture(1).save(tmp_path / "a.png")
    (tmp_path / "b.raw").write_bytes(b"short")
    Image.new("RGB", (512, 512), (250, 250, 250)).save(tmp_path / "c.png")
    structured_picture(2).save(tmp_path / "d.png")
    backend = Saying(answer_text(MISSION, HIGH), "I think it is HIGH")
    a, b, c, d = triage_files(
        [tmp_path / f"{name}" for name in ("a.png", "b.raw", "c.png", "d.png")], backend, MISSION, 256
    )
    assert a.verdict == HIGH
    assert (b.verdict, "b.raw has 5 bytes" in b.error) == (None, True)
    assert c.verdict == Verdict(BLANK_REASON, "LOW")
    assert c.blank
    assert d.verdict is None
    assert "d.png: the model gave no verdict" in d.error
    assert backend.asked == [((256, 256), user_text(MISSION, None))] * 2
    asked = Saying(answer_text(MISSION, HIGH))
    (without,) = triage_files([tmp_path / "c.png"], asked, MISSION, 256, rules=Rules(blank=False))
    assert (without.verdict, without.blank, len(asked.asked)) == (HIGH, False, 1)


def test_the_native_size_of_a_resized_frame_is_kept(tmp_path: Path) -> None:
    structured_picture(1).resize((700, 600)).save(tmp_path / "a.png")
    (refused,) = triage_files([tmp_path / "a.png"], Saying(answer_text(MISSION, HIGH)), MISSION, 256)
    assert "--resize" in refused.error
    (outcome,) = triage_files([tmp_path / "a.png"], Saying(answer_text(MISSION, HIGH)), MISSION, 256, resize=True)
    assert (outcome.verdict, outcome.native_size) == (HIGH, (700, 600))


def test_a_folder_means_its_pictures_by_name_and_what_is_left_out_is_said(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "c.raw", "d.TIF", "notes.txt", "e.webp", ".hidden", "._b.png", "Thumbs.db"):
        (tmp_path / name).touch()
    (tmp_path / "deeper" / ".ipynb_checkpoints").mkdir(parents=True)
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "b.png").touch()
    frames, left_out = frames_in([tmp_path, tmp_path / "notes.txt"])
    assert [path.name for path in frames] == ["a.JPG", "b.png", "c.raw", "d.TIF", "notes.txt"]
    assert left_out == [
        f"{tmp_path}: 1 folder (--recursive), for example deeper",
        f"{tmp_path}: 2 files with other suffixes (1 .webp, 1 .txt)",
        f"{tmp_path}: 4 hidden or system files or folders, for example ._b.png",
    ]
    with pytest.raises(OrionError, match=r"deeper has no picture .*Found: 1 hidden"):
        frames_in([tmp_path / "deeper"])
    (tmp_path / "deeper" / "f.png").touch()
    (tmp_path / "deeper" / "loop").symlink_to(tmp_path)
    frames, left_out = frames_in([tmp_path], recursive=True)
    assert [path.name for path in frames] == ["a.JPG", "b.png", "c.raw", "d.TIF", "f.png"]
    assert [said.split()[1] for said in left_out] == ["2", "5"]
    (tmp_path / "above" / "f").mkdir(parents=True)
    (tmp_path / "above" / "f" / "x.png").touch()
    with pytest.raises(OrionError, match="no picture") as caught:
        frames_in([tmp_path / "above"])
    assert "--recursive" in caught.value.fix


@pytest.mark.parametrize("recursive", [False, True])
def test_a_link_that_cannot_be_followed_is_refused_alone(tmp_path: Path, recursive: bool) -> None:
    structured_picture(1).save(tmp_path / "a.png")
    (tmp_path / "here").mkdir()
    links = {"b.png": "b.png", "c.png": "gone.png", "d.png": "a.png/x", "e.png": "here/e", "loop": "loop"}
    for name, target in (*links.items(), ("here/e", "../e.png")):
        (tmp_path / name).symlink_to(target)
    frames, left_out = frames_in([tmp_path], recursive=recursive)
    assert f"{tmp_path}: {2 if recursive else 1} file" in left_out[-1]
    said = [outcome.error for outcome in triage_files(frames, Saying(answer_text(MISSION, HIGH)), MISSION, 256)]
    reasons = ["does not exist", "cannot be read: Not a directory", "cannot be read: Too many levels of symbolic links"]
    expected = ["", reasons[2], reasons[0], reasons[1], reasons[2]]
    assert [path.name for path in frames] == ["a.png", "b.png", "c.png", "d.png", "e.png"]
    assert all(reason in error for reason, error in zip(expected, said, strict=True)), said
    assert said[0] == ""


def test_a_geotiff_is_read_as_the_dataset_reads_it(tmp_path: Path) -> None:
    rasterio = pytest.importorskip("rasterio")
    from rasterio.transform import from_origin

    picture = structured_picture(1)
    profile = {"driver": "GTiff", "width": 512, "height": 512, "count": 3, "dtype": "uint8", "crs": "EPSG:32631"}
    with rasterio.open(tmp_path / "a.TIF", "w", transform=from_origin(5e5, 5e6, 10, 10), **profile) as file:
        file.write(np.moveaxis(np.asarray(picture), 2, 0))
    (tmp_path / "b.tif").write_bytes(b"no TIFF")
    picture.save(tmp_path / "c.png")
    backend = Saying(answer_text(MISSION, HIGH), answer_text(MISSION, HIGH))
    a, b, c, gone = triage_files(
        [tmp_path / name for name in ("a.TIF", "b.tif", "c.png", "gone.tif")], backend, MISSION, 512
    )
    assert a.verdict == c.verdict == HIGH
    assert "b.tif is not PNG, JPEG or TIFF" in b.error
    assert "gone.tif does not exist" in gone.error
    first, second = backend.pictures
    assert np.array_equal(np.asarray(first), np.asarray(second))


def test_computed_verdicts_are_printed_when_a_later_frame_fails(tmp_path: Path) -> None:
    """In a process whose terminal knows ASCII only; names look like markup, emoji and control sequences."""
    names = ["scene[b04].png", "a:x:b.png", "e\x1b[31m.png", "\u5317\u4eac.png", "last.png"]
    for name in names:
        structured_picture(1).save(tmp_path / name)
    for options in ((), ("--json",)):
        result = subprocess.run(
            [sys.executable, "-c", DYING, str(len(names) - 1), "triage", *options, *names],
            cwd=tmp_path,
            env={**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "120"},
            capture_output=True,
            check=False,
        )
        assert result.returncode == 1, result.stderr
        assert b"error: the server died." in result.stderr
        assert b"Traceback" not in result.stderr
        if options:
            assert [answer["file"] for answer in json.loads(result.stdout)] == names[:-1]
            continue
        said = result.stdout.decode("ascii")
        for name in ("scene[b04].png", "a:x:b.png", r"e\x1b[31m.png", r"\u5317\u4eac.png"):
            assert f" {name} " in said
        assert said.count("Long [bold]quays[/] :x:.") == len(names) - 1
        assert len({len(line) for line in said.splitlines()}) == 1  # the columns are in line


def left_of(asked: list[Path], out: Path, pair: str) -> list[str]:
    return [path.name for path in read_earlier(out, pair).left_of(asked)]


def test_what_a_stopped_triage_wrote_is_not_done_again(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.touch()
    asked = [Path(name) for name in ("a.png", "b.png", "a.png", "c.png", "a.png")]
    assert left_of(asked, out, "p") == [path.name for path in asked]
    whole = '{"file": "a.png", "pair": "p"}\n{"file": "b.png", "pair": "p"}\n{"file": "a.png", "pair": "p"}\n'
    out.write_text(whole + '{"file": "c.p')
    assert left_of(asked, out, "p") == ["c.png", "a.png"]  # two lines, asked three times
    assert out.read_text() == whole
    with pytest.raises(OrionError, match=r"out\.jsonl:1 was made by another pair"):
        read_earlier(out, "q")
    for other in ("x", "[]", '{"file": "a.png"}'):
        out.write_text(f"{whole}{other}\n")
        with pytest.raises(OrionError, match=r"out\.jsonl:4 is not a result of 'orion triage'"):
            read_earlier(out, "p")
        assert out.read_text() == f"{whole}{other}\n"
    for another in ('{"flight plan": 1}', "key", '{"file": 3}'):
        out.write_text(another)
        with pytest.raises(OrionError, match=r"out\.jsonl is not a result of 'orion triage'"):
            read_earlier(out, "p")
        assert out.read_text() == another
    for left in ("", '{"fi', '{"file": "a.png", "pa', "\0" * 99):  # of a first line, after a kill or a power loss
        out.write_text(left)
        read_earlier(out, "p")
        assert out.read_text() == ""
    out.write_text(whole)
    with appending(out) as write:
        write({"file": "c.png", "pair": "p"})
        assert out.read_text().endswith('{"file": "c.png", "pair": "p"}\n')  # at once


def test_a_frame_with_other_bytes_is_decided_again(tmp_path: Path) -> None:
    out, names = tmp_path / "out.jsonl", ("a.png", "b.png")
    for number, name in enumerate(names):
        structured_picture(number).save(tmp_path / name)
    assert triage_into(out, *names).returncode == 0
    hashes = [hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in names]
    assert [row["sha256"] for row in map(json.loads, out.read_text().splitlines())] == hashes
    structured_picture(2).save(tmp_path / "a.png")
    result = triage_into(out, *names)
    assert "note: decided again, because their bytes have changed: 1 of 1 frames" in result.stderr
    assert "1 HIGH, 1 already done" in result.stderr
    (tmp_path / "b.png").unlink()  # moved away since: its line stays
    for _ in range(2):
        assert "no new frames, 2 already done" in triage_into(out, *names).stderr
    assert states(out) == [("a.png", "HIGH"), ("b.png", "HIGH"), ("a.png", "HIGH")]


def triage_into(out: Path, *names: str, answers: int = 99) -> subprocess.CompletedProcess[str]:
    """'orion triage --out' in the folder of `out`, with a model that says HIGH to each frame."""
    (out.parent / PAIR).touch()
    return subprocess.run(
        [sys.executable, "-c", DYING, str(answers), "triage", "--out", out.name, *names],
        cwd=out.parent,
        capture_output=True,
        text=True,
        check=False,
    )


def states(out: Path) -> list[tuple[str, str | None]]:
    """File and category of each line."""
    return [(row["file"], row["category"]) for row in map(json.loads, out.read_text().splitlines())]


def test_a_refused_frame_is_asked_about_again_until_it_is_decided(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    for name in ("a.png", "b.png", "c.png"):
        structured_picture(1).save(tmp_path / name)
    whole = (tmp_path / "b.png").read_bytes()
    (tmp_path / "b.png").write_bytes(whole[:-6])
    names = ("a.png", "b.png", "c.png", "gone.png")
    assert triage_into(out, *names, answers=1).returncode == 1  # the server dies at c.png
    assert states(out) == [("a.png", "HIGH"), ("b.png", None)]
    refused = [("b.png", None), ("gone.png", None)]
    for done in (1, 2, 2):
        result = triage_into(out, *names)
        assert result.returncode == 1
        assert "refused: b.png is damaged" in result.stderr
        assert "refused: gone.png does not exist" in result.stderr
        assert f"2 refused, {done} already done" in result.stderr
        # A refusal that the file has already is not written again.
        assert states(out) == [("a.png", "HIGH"), refused[0], ("c.png", "HIGH"), refused[1]]
    (tmp_path / "b.png").write_bytes(whole)
    structured_picture(2).save(tmp_path / "gone.png")
    result = triage_into(out, *names)
    assert (result.returncode, "2 HIGH, 2 already done" in result.stderr) == (0, True), result.stderr
    assert states(out)[4:] == [("b.png", "HIGH"), ("gone.png", "HIGH")]
    result = triage_into(out, *names)
    assert (result.returncode, "no new frames, 4 already done" in result.stderr) == (0, True)
    assert len(states(out)) == 6
    # People choose frames by the newest line of each.
    assert [(frame.file, frame.category) for frame in read_log(out, MISSION)] == [
        (name, "HIGH") for name in ("a.png", "b.png", "c.png", "gone.png")
    ]


def test_a_second_triage_into_the_same_file_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    structured_picture(1).save(tmp_path / "a.png")
    (tmp_path / "link.jsonl").symlink_to(out)
    with appending(out) as write:
        write({"file": "other.png", "category": "LOW", "pair": "p"})
        for name in (out.name, "link.jsonl"):
            result = triage_into(tmp_path / name, "a.png")
            assert result.returncode == 1
            assert f"error: {name} is in use by another command.\n" in result.stderr
            assert "Wait until it ends, or write to another file." in result.stderr
    assert states(out) == [("other.png", "LOW")]
    out.unlink()
    assert triage_into(out, "a.png").returncode == 0
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "out.jsonl", "link.jsonl", PAIR}
