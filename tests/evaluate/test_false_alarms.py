"""Frames that are all to be dropped: who is counted how, and what it says about the orbit."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from orion_triage.errors import OrionError
from orion_triage.evaluate.false_alarms import FILE_NAME, figures, rules_in_words
from orion_triage.evaluate.metrics import Prediction
from orion_triage.flight.false_alarms import category_of
from orion_triage.mission.decide import Rules
from tests.conftest import MISSION, orion, structured_picture

H, M, L = MISSION.names


def perfect(count: int = 20) -> list[Prediction]:
    return [
        Prediction("B", f"{truth}{n}", truth, truth, place=f"{truth}{n}") for truth in (H, M, L) for n in range(count)
    ]


def found(answers: dict[str, dict[str, int]], flown: list[Prediction] | None = None) -> dict[str, Any]:
    return figures({"folder": "downlink", "category": L, "answers": answers}, flown or perfect(), MISSION)


def test_counts_and_shares_by_hand() -> None:
    result = found({f"{n}.png": {L: 1} for n in range(96)} | {"a.png": {H: 1}, "b/": {M: 2, "": 1}})
    assert (result["frames"], result["places"], result["stored"], result["no_verdict"]) == (100, 98, 2, 1)
    assert (result["sent"]["count"], result["sent"]["total"]) == (1, 100)


def test_many_frames_without_a_false_alarm_show_what_twenty_cannot() -> None:
    few = found({f"{n}.png": {L: 1} for n in range(20)})["orbit"]["precision"][H]
    many = found({f"{n}.png": {L: 1} for n in range(2000)})["orbit"]["precision"][H]
    assert few["value"] == many["value"] == 1
    assert few["low"] < 0.06
    assert many["low"] > 0.3, "what is left are the MEDIUM frames, of which the split has 20"


def test_frames_of_one_place_say_less() -> None:
    apart = found({f"{n}.png": {L: 1} for n in range(190)} | {f"x{n}.png": {H: 1} for n in range(10)})
    together = found({f"{n}/": {L: 10} for n in range(19)} | {"x/": {H: 10}})
    assert apart["sent"]["rate"] == together["sent"]["rate"] == 0.05
    assert together["sent"]["high"] > 2 * apart["sent"]["high"]
    assert together["orbit"]["sent"]["high"] > 1.5 * apart["orbit"]["sent"]["high"]


def test_the_frames_stand_in_for_those_of_the_split() -> None:
    """All LOW frames of the split were sent; of these, none is."""
    flown = [p if p.truth != L else Prediction("B", p.name, L, H, place=p.place) for p in perfect()]
    assert found({f"{n}.png": {L: 1} for n in range(100)}, flown)["orbit"]["precision"][H]["value"] == 1


def test_a_category_that_is_not_dropped_is_refused() -> None:
    assert category_of(MISSION, "") == category_of(MISSION, L) == L
    with pytest.raises(OrionError, match="'HIGH' is not a category whose frames are dropped"):
        category_of(MISSION, H)


def test_other_rules_have_other_words() -> None:
    said = {rules_in_words(rules) for rules in (
        Rules(), Rules(drop_threshold=0.3), Rules(drop_threshold=0.4), Rules(appearance={"dark": (1.0, 2.0)}),
    )}  # fmt: skip
    assert len(said) == 4


@pytest.mark.parametrize(
    "answers", [{}, {"a": {"FIRE": 1}}, {"a": {H: -1}}, {"a": {H: 1.5}}, {"a": {H: 10**12}}, {"a": {H: True}}]
)
def test_a_damaged_record_is_no_result(answers: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="answers"):
        found(answers)


@pytest.mark.llama_cpp
@pytest.mark.slow
def test_a_folder_is_decided_as_on_board_resumed_and_reported(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    frames = copy / "downlink"
    for scene in ("a", "b"):
        (frames / scene).mkdir(parents=True)
        for number in range(3):
            structured_picture(number + (10 if scene == "b" else 0)).save(frames / scene / f"{number}.png")
    (frames / "alone.png").write_bytes((frames / "a" / "0.png").read_bytes())
    (frames / "notes.txt").write_text("x")
    arguments = ["false-alarms", "downlink", "--recursive", "--run", "runs/small"]
    done = orion(*arguments, cwd=copy)
    assert done.returncode == 0, done.stderr
    assert "Of 7 further LOW frames of downlink," in done.stdout
    assert "left out of downlink: 1 file with other suffixes (1 .txt)" in done.stderr, done.stderr
    record = json.loads((copy / "runs/small" / FILE_NAME).read_text())
    assert sorted(record["answers"]) == ["a/", "alone.png", "b/"]
    triaged = orion("triage", "downlink", "--recursive", "--run", "runs/small", "--json", cwd=copy)
    categories = [row["category"] for row in json.loads(triaged.stdout)]
    assert sum(sum(counts.values()) for counts in record["answers"].values()) == len(categories) == 7
    for name in MISSION.names:
        assert sum(counts.get(name, 0) for counts in record["answers"].values()) == categories.count(name)
    (log,) = (copy / "runs/small/logs").glob("false-alarms-*.jsonl")
    whole = log.read_bytes()
    log.write_bytes(whole[: len(whole) // 2])  # as after an interruption
    again = orion(*arguments, "--json", cwd=copy)
    assert json.loads((copy / "runs/small" / FILE_NAME).read_text()) == record
    result = json.loads(again.stdout)
    report = orion("report", "--run", "runs/small", "--json", cwd=copy)
    assert json.loads(report.stdout)["false_alarms"] == result
    assert "Of 7 further LOW frames of downlink" in (copy / "runs/small/report.md").read_text()
    limit = orion("threshold", "--max-irrecoverable-loss", "50%", "--loosen", "--run", "runs/small", cwd=copy)
    assert limit.returncode == 0, limit.stderr
    assert "of another pair or threshold, and left out" in " ".join(
        (orion("report", "--run", "runs/small", cwd=copy), (copy / "runs/small/report.md").read_text())[1].split()
    )
    for name, first in (("one", 20), ("two", 30)):  # other pictures under the same names
        (copy / name).mkdir()
        for number in range(2):
            structured_picture(first + number).save(copy / name / f"{number}.png")
        told = orion("false-alarms", ".", "--run", "../runs/small", "--json", cwd=copy / name)
        assert told.returncode == 0, told.stderr
    logged = [
        json.loads(line) for path in (copy / "runs/small/logs").glob("false-alarms-*.jsonl") for line in path.open()
    ]
    assert len({row["sha256"] for row in logged if row["file"] == "0.png"}) == 2, "each is asked"
    (frames / "b" / "1.png").write_bytes(b"no picture")
    broken = orion(*arguments, cwd=copy)
    assert (broken.returncode, "Traceback" in broken.stderr) == (1, False)
    assert "1.png" in broken.stderr
