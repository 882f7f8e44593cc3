"""evaluate/stress.py: stressed frames are asked, resumed, decided and compared as they should be.

Most tests plant a model that answers from the pixels, as those of the verdict do: what it loses under which stress is
then known. The last one asks a real pair through the command line.
"""

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from orion_triage.dataset.dataset import Dataset
from orion_triage.dataset.records import IMAGES_FOLDER, Record, write_split
from orion_triage.evaluate import stress
from orion_triage.evaluate.metrics import Prediction
from orion_triage.evaluate.results import stress_results
from orion_triage.evaluate.run import read_predictions
from orion_triage.evaluate.run import run as evaluate
from orion_triage.evaluate.verdict import under_stress
from orion_triage.export.quantize import PAIR
from orion_triage.imagery.frames import shrink
from orion_triage.imagery.stress import STRENGTHS, STRESSES, chosen, stressed
from orion_triage.mission.answer import Answer
from orion_triage.mission.prompt import Coordinates
from orion_triage.mission.verdict import Verdict, answer_text
from orion_triage.pipeline import evaluation, stress_evaluation
from orion_triage.report import html, plot, write
from orion_triage.report.render import stress_rows, worst_under_stress
from orion_triage.runs.manifest import hash_inputs, write_manifest
from orion_triage.runs.run import Run
from orion_triage.settings import load_settings
from tests.conftest import MISSION, REASONS, as_made, orion, rewrite, structured_picture

H, M, L = MISSION.names
SIZE = 256
COUNT = 24  # test frames, eight of each category
DIM, JPEG, PARTIAL = chosen(["exposure", "jpeg", "partial"])


class AfraidOfTheDark:
    """Knows the category by the brightest colour, and takes every frame that is dark on average for LOW."""

    batch_size = 7

    def __init__(self, batches: int = 10_000) -> None:
        self.left = batches
        self.seen: list[Image.Image] = []

    def answer(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[Answer]:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        self.seen += images
        return [self._one(np.asarray(image).mean(axis=(0, 1))) for image in images]

    def _one(self, colour: Any) -> Answer:
        category = L if colour.max() < 75 else MISSION.names[int(np.argmax(colour))]
        return Answer(answer_text(MISSION, Verdict(REASONS[category], category)))


def tinted(number: int, category: str) -> Image.Image:
    """A frame whose brightest colour is its category; its mean there is about 170."""
    tint = [60, 60, 60]
    tint[MISSION.names.index(category)] = 200
    return Image.blend(structured_picture(number), Image.new("RGB", (512, 512), tuple(tint)), 0.7)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose planted pair was evaluated without stress; nobody changes it."""
    folder = tmp_path_factory.mktemp("stress") / "run"
    run = Run(folder, load_settings("tiny", [f"dataset.folder={folder / 'dataset'}"]))
    (run.dataset / IMAGES_FOLDER).mkdir(parents=True)
    for split in ("train", "val", "test"):
        records = []
        for number in range(COUNT if split == "test" else 3):
            category = MISSION.names[number % 3]
            name = f"{split}_{number:02d}"
            tinted(number, category).save(run.dataset / IMAGES_FOLDER / f"{name}.png", compress_level=1)
            where = Coordinates(round(number * 7.5 - 90, 2), 10.0)
            records.append(
                Record(f"{IMAGES_FOLDER}/{name}.png", where, Verdict(REASONS[category], category), MISSION)
            )  # fmt: skip
        write_split(run.dataset, split, records)
    write_manifest(run.dataset, stage="dataset", settings={}, inputs={}, seconds=1, figures={"source": "directory"})
    run.gguf.mkdir()
    (run.gguf / PAIR).write_text("{}")
    write_manifest(run.gguf, stage="quantize", settings={}, inputs={}, seconds=1)
    plain = run.evaluation("constrained")
    evaluate(
        Dataset(run.dataset, MISSION), "test", AfraidOfTheDark(), plain, run.settings.evaluate, SIZE, fingerprint="x"
    )  # fmt: skip
    finish(run, evaluation(_constrained(run), MISSION))
    for one in (DIM, PARTIAL):
        stress.ask(one, run, AfraidOfTheDark(), "x")
        finish(run, stress_evaluation(one, run.settings))
    return run


def _constrained(run: Run) -> Any:
    from orion_triage.evaluate.variants import named

    return named(run.settings, "constrained")


def finish(run: Run, stage: Any) -> None:
    """The manifest that the pipeline writes when a stage is done."""
    inputs = hash_inputs(stage.inputs(run))
    settings = stage.settings_of(run.settings)
    write_manifest(stage.folder(run), stage=stage.name, settings=settings, inputs=inputs, seconds=1)


@pytest.fixture
def run(made: Run, tmp_path: Path) -> Run:
    """A copy of it, to be changed."""
    return Run(shutil.copytree(made.folder, tmp_path / "run"), made.settings)


@pytest.fixture(scope="module")
def found(made: Run) -> dict[str, Any]:
    results = stress_results(made)
    assert results is not None
    return results


def test_each_frame_is_stressed_at_camera_size_and_asked_without_coordinates(made: Run) -> None:
    rows = read_predictions(made.evaluation("stress/partial"), MISSION)
    assert [row["id"] for row in rows] == [f"{one}/test_{n:02d}" for one in STRENGTHS for n in range(COUNT)]
    assert {(row["condition"], row["coordinates"]) for row in rows} == {("B", None)}
    assert {(row["strength"], row["value"]) for row in rows} == set(zip(STRENGTHS, (0.25, 0.5, 0.75), strict=True))
    backend = AfraidOfTheDark()
    dataset = Dataset(made.dataset, MISSION)
    first = sorted(dataset.records("test"), key=lambda record: record.name)[0]
    camera = Image.open(dataset.path(first)).convert("RGB")
    asked = stress.questions([first])
    # JPEG, which is another one on a frame that was shrunk before.
    expected = [shrink(stressed(camera, JPEG, one, "test_00"), SIZE).tobytes() for one in STRENGTHS]
    other = Run(made.folder.parent / "other", made.settings)
    shutil.copytree(made.dataset, other.dataset)
    stress.ask(JPEG, other, backend, "x")
    assert [backend.seen[COUNT * n].tobytes() for n in range(3)] == expected
    assert [question.id for question in asked] == [f"{one}/test_00" for one in STRENGTHS]


def test_what_the_planted_model_loses_is_found(found: dict[str, Any]) -> None:
    rows = {(row["stress"], row["strength"]): row for row in found["rows"]}
    assert list(rows) == [(one, strength) for one in ("exposure", "partial") for strength in STRENGTHS]
    assert found["unstressed"]["irrecoverable_loss"]["count"] == 0
    assert found["unstressed"]["downlink"]["sent"] == pytest.approx(1 / 3)
    assert rows["partial", "strong"]["downlink"]["sent"] == 0
    strong = rows["exposure", "strong"]
    loss, recall = strong["irrecoverable_loss"], strong["high_recall"]
    assert (loss["count"], loss["total"], recall["count"], recall["total"]) == (16, 16, 0, 8)
    assert (loss["change"]["more"], loss["change"]["fewer"], loss["change"]["difference"]) == (16, 0, 1)
    assert loss["change"]["exact_p"] == pytest.approx(2 * 0.5**16)
    assert (recall["change"]["more"], recall["change"]["fewer"]) == (0, 8)
    assert loss["change"]["low"] < 1 <= loss["change"]["high"]
    assert rows["exposure", "mild"]["irrecoverable_loss"]["count"] == 0
    worst_three = found["worst"]
    assert worst_three[0] in ("exposure strong", "partial strong")
    assert set(found["missing"]) == {one.name for one in STRESSES} - {"exposure", "partial"}


def test_p_values_are_corrected_for_all_stresses(found: dict[str, Any]) -> None:
    changes = [row["irrecoverable_loss"]["change"] for row in found["rows"]]
    smallest = min(changes, key=lambda change: change["exact_p"])
    assert smallest["holm_p"] == pytest.approx(len(changes) * smallest["exact_p"])
    assert all(change["holm_p"] >= change["exact_p"] for change in changes)


def test_the_blank_rule_sees_the_stressed_frame(run: Run) -> None:
    path = run.evaluation("stress/partial") / "predictions.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        if row["strength"] == "mild" and row["truth"] == H:
            row["blank"] = True  # as after a white-out
    rewrite(path, rows)
    results = stress_results(run)
    assert results is not None
    mild = next(row for row in results["rows"] if (row["stress"], row["strength"]) == ("partial", "mild"))
    assert (mild["blank"], mild["high_recall"]["count"], mild["irrecoverable_loss"]["count"]) == (8, 0, 8)


def test_a_white_out_is_blank(tmp_path: Path, made: Run) -> None:
    run = Run(tmp_path / "run", made.settings)
    shutil.copytree(made.dataset, run.dataset)
    for path in (run.dataset / IMAGES_FOLDER).glob("test_*.png"):
        flat = np.full((512, 512, 3), 200, dtype=np.uint8)
        flat[:64] = np.asarray(structured_picture(1))[:64]  # not blank: only rows from 16 on count
        flat[256:] = np.asarray(structured_picture(2))[256:]
        Image.fromarray(flat).save(path, compress_level=1)
        as_made(path, run.dataset)
    stress.ask(PARTIAL, run, AfraidOfTheDark(), "x")
    blank = {row["strength"]: row["blank"] for row in read_predictions(run.evaluation("stress/partial"), MISSION)}
    assert blank == {"mild": False, "medium": True, "strong": True}


def test_an_interrupted_stress_goes_on_where_it_stopped(run: Run) -> None:
    folder = run.evaluation("stress/exposure")
    straight = read_predictions(folder, MISSION)
    shutil.rmtree(folder)
    with pytest.raises(KeyboardInterrupt):
        stress.ask(DIM, run, AfraidOfTheDark(3), "x")
    assert not folder.exists()
    total = -(-len(straight) // AfraidOfTheDark.batch_size)
    rest = AfraidOfTheDark(total - 3)
    stress.ask(DIM, run, rest, "x")
    assert rest.left == 0
    assert without_seconds(read_predictions(folder, MISSION)) == without_seconds(straight)
    assert list(folder.parent.glob(".*")) == []


def without_seconds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_answers_of_another_pair_or_version_are_left_out(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    (run.gguf / PAIR).write_text('{"other": 1}')
    stage = evaluation(_constrained(run), MISSION)
    finish(run, stage)
    results = stress_results(run)
    assert results is not None
    assert (results["rows"], results["outdated"]) == ([], ["exposure", "partial"])
    assert "left out: exposure, partial" in worst_under_stress(results)
    finish(run, stress_evaluation(DIM, run.settings))
    again = stress_results(run)
    assert again is not None
    assert {row["stress"] for row in again["rows"]} == {"exposure"}
    # A change of what a stress does, made as a developer would: the version.
    monkeypatch.setattr("orion_triage.imagery.stress.VERSION", 99)
    assert stress_results(run)["outdated"] == ["exposure", "partial"]  # type: ignore[index]


def measured(rates: dict[str, tuple[int, int, int]], total: int = 40) -> dict[str, Any]:
    """Results with a medium row for each stress: (lost, newly lost, newly saved) of `total` valuable frames."""
    from orion_triage.evaluate.statistics import mcnemar, wilson

    rows = []
    for name, (lost, more, fewer) in rates.items():
        low, high = wilson(lost, total)
        change = {"difference": (more - fewer) / total, "exact_p": mcnemar(more, fewer).exact_p}
        loss = {"count": lost, "total": total, "rate": lost / total, "low": low, "high": high, "change": change}
        rows.append({"stress": name, "strength": "medium", "irrecoverable_loss": loss})
        rows.append({"stress": name, "strength": "strong", "irrecoverable_loss": {**loss, "rate": 1.0}})
    return {"rows": rows, "missing": [], "outdated": []}


@pytest.mark.parametrize(
    ("rates", "outcome", "said"),
    [
        ({"haze": (0, 0, 0), "noise": (1, 1, 0)}, "pass", "noise: 1 of 40"),
        ({"haze": (0, 0, 0), "noise": (20, 20, 0)}, "fail", "noise: 20 of 40"),
        ({"haze": (20, 20, 0), "noise": (12, 12, 0)}, "fail", "haze: 20 of 40"),
        ({"haze": (0, 0, 0), "noise": (7, 7, 0)}, "open", "noise: 7 of 40"),  # below the limit, but not surely
        ({"haze": (20, 2, 0), "noise": (0, 0, 0)}, "open", "haze: 20 of 40"),  # it loses as much without haze
        ({f"s{n}": (9 if n == 0 else 0, 7 if n == 0 else 0, 0) for n in range(14)}, "open", "s0: 9 of 40"),
    ],
)  # fmt: skip
def test_a_run_is_judged_by_its_losses_at_medium_strength(
    rates: dict[str, tuple[int, int, int]], outcome: str, said: str
) -> None:
    criterion = under_stress(measured(rates), 0.2, 0.05)
    assert (criterion.outcome, criterion.measured.startswith(said)) == (outcome, True), criterion
    assert bool(criterion.advice) == (outcome != "pass")
    if "haze" in rates and rates["haze"][0] == 20 and outcome == "fail":
        assert "haze (also noise)" in criterion.advice


def test_an_unmeasured_stress_is_open() -> None:
    assert under_stress(None, 0.2, 0.05).outcome == "open"
    incomplete = measured({"haze": (0, 0, 0)}) | {"missing": ["noise"]}
    assert under_stress(incomplete, 0.2, 0.05).measured == "not measured: noise"


def test_a_change_counts_only_the_frames_of_its_rate() -> None:
    before = [Prediction("B", "a", H, H), Prediction("B", "b", M, L), Prediction("B", "c", L, H)]
    after = [Prediction("B", "a", H, L), Prediction("B", "b", M, None), Prediction("B", "c", L, L)]
    loss = stress.paired("irrecoverable_loss", before, after, MISSION)
    recall = stress.paired("high_recall", before, after, MISSION)
    assert loss is not None
    assert recall is not None
    assert (loss["more"], loss["fewer"], loss["difference"]) == (1, 1, 0)
    assert (recall["more"], recall["fewer"], recall["difference"]) == (0, 1, -1)
    assert stress.paired("high_recall", before[2:], after[2:], MISSION) is None


def test_the_reports_name_the_worst_and_show_all(run: Run, found: dict[str, Any]) -> None:
    limit = load_settings("tiny", ["verdict.largest_loss_under_stress=0.2"]).verdict
    run = replace(run, settings=run.settings.model_copy(update={"verdict": limit}))
    results, _ = write.run(run)
    assert results["stress"] == found
    judged = results["verdict"]["criteria"][-1]
    assert (judged["name"], judged["outcome"]) == ("loss under stress", "open")
    assert judged["measured"].startswith("not measured: haze, cloud, noise,")
    assert {path.name for path in run.folder.glob("report*")} >= {"report-stress.png"}
    text, page = (run.folder / "report.md").read_text(), (run.folder / "report.html").read_text()
    said = worst_under_stress(found)
    assert said.startswith(f"Under stress, the largest irrecoverable losses: {found['worst'][0]} (")
    assert text.index(said) < text.index("## Recall and loss")
    assert page.index(said[:60]) < page.index('id="accuracy"')
    for row in stress_rows(found):
        assert f"| {' | '.join(row)} |" in text
        assert f"{row[0]}, {row[1]}<small>{row[2]}</small>" in page
    assert "](report-stress.png)" in text
    assert 'href="#stress"' in page
    again, unchanged = write.run(run)
    assert (again["stress"], unchanged) == (found, True)
    shutil.rmtree(run.evaluation("stress/x").parent)
    without, _ = write.run(run)
    assert without["stress"] is None
    assert "Under stress" not in (run.folder / "report.md").read_text()
    assert 'id="stress"' not in (run.folder / "report.html").read_text()
    assert not (run.folder / "report-stress.png").exists()


def test_the_chart_has_a_point_with_its_interval_for_each_row(found: dict[str, Any]) -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    left, right = figure.subplots(1, 2)
    plot.stress(left, right, {"stress": found})
    for axes, key in ((left, "irrecoverable_loss"), (right, "high_recall")):
        points = [(box.lines[0].get_xdata()[0], box.lines[0].get_markerfacecolor()) for box in axes.containers]
        assert [x for x, _ in points] == [pytest.approx(100 * row[key]["rate"]) for row in found["rows"]]
        filled = [colour != "none" for _, colour in points]
        assert filled == [row[key]["change"]["holm_p"] < 0.05 for row in found["rows"]]
        assert any(filled)
        assert not all(filled)
    chart = html.stress_chart({"stress": found})
    assert chart.drawing.count("var(--quantized)") > 0
    assert chart.height == 115 + 32 * 2


@pytest.mark.llama_cpp
@pytest.mark.slow
def test_a_real_pair_is_asked_under_two_stresses(
    tiny_pair: Path, small_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = Run(Path("runs/tiny"), load_settings("tiny", [f"dataset.folder={small_dataset}"]))
    shutil.copytree(small_dataset, run.dataset)
    write_manifest(run.dataset, stage="dataset", settings={}, inputs={}, seconds=1, figures={"source": "directory"})
    shutil.copytree(tiny_pair, run.gguf)
    write_manifest(run.gguf, stage="quantize", settings={}, inputs={}, seconds=1)
    (run.folder / "settings.json").write_text(run.settings.model_dump_json())
    refused = orion("evaluate", "--stress", "noise,haxe")
    assert refused.returncode == 1
    assert "there is no stress 'haxe'; the nearest name is haze" in refused.stderr
    assert orion("evaluate", "--stress", "--gguf").returncode == 2
    first = orion("evaluate", "--stress", "partial,jpeg", "--json")
    assert first.returncode == 0, first.stderr
    assert re.search(r"^36 answers: 2 stresses x 3 strengths x 6 frames, at most about \d+ s$", first.stderr, re.M)
    found = json.loads(first.stdout)
    assert [row["stress"] for row in found["rows"]] == ["jpeg"] * 3 + ["partial"] * 3
    again = orion("evaluate", "--stress", "jpeg")
    assert "evaluate stress/jpeg: unchanged, skipped" in again.stderr
    assert "answers: " not in again.stderr
    assert "jpeg" in again.stdout
    assert "partial  " not in again.stdout
    assert orion("verify", "runs/tiny").returncode == 0
    path = run.evaluation("stress/jpeg") / "predictions.jsonl"
    path.write_text(path.read_text().replace('"mild"', '"weak"', 1))
    assert "predictions.jsonl has sha256" in orion("verify", "runs/tiny").stdout
