"""evaluate/controls.py: what is asked beside A to D, and what it tells apart.

Planted models answer from the prompt's coordinates or from the pixels, so it is known what each control must show.
"""

import itertools
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from orion_triage.dataset.records import Record
from orion_triage.errors import OrionError
from orion_triage.evaluate import controls
from orion_triage.evaluate.controls import NOISE, OTHER, SAME, figures_of, questions
from orion_triage.evaluate.run import read_predictions
from orion_triage.export.quantize import PAIR
from orion_triage.imagery.frames import noise_frame
from orion_triage.pipeline import evaluation
from orion_triage.report import write
from orion_triage.report.render import controls_rows
from orion_triage.runs.run import Run
from tests.conftest import MISSION, orion
from tests.evaluate.planted import COUNT, SIZE, Planted, finish, make, pair_of, records_of

H, M, L = MISSION.names


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("controls")
    return {how: make(folder / how, how) for how in ("picture", "coordinates", "confused")}


def test_exactly_these_questions_are_asked_in_any_order_of_the_records() -> None:
    records = records_of("test", COUNT)
    asked = questions(records)
    assert [question.id for question in questions(records[::-1])] == [question.id for question in asked]
    assert Counter(question.control.partition("-0")[0].partition("-1")[0] for question in asked) == {
        SAME: COUNT, OTHER: COUNT, NOISE: 10 * COUNT,
    }  # fmt: skip
    truth = {record.name: record for record in records}
    for question in asked:
        own = truth[question.record.name]
        if question.control == SAME:
            assert question.donor is not None
            assert question.donor.category == own.verdict.category
            assert question.coordinates == question.donor.coordinates != own.coordinates
            assert question.image == own.image
        else:
            assert question.coordinates == own.coordinates
            assert question.image != own.image
    shown = [question.image for question in asked if question.control == OTHER]
    assert sorted(shown) == sorted(record.image for record in records), "each picture is shown once"
    images = [question.image for question in asked]
    assert sum(one != other for one, other in itertools.pairwise(images)) == COUNT + 10 - 1, (
        "the questions about one image follow each other: it is encoded once"
    )


def test_tiles_of_one_place_are_not_another_place() -> None:
    tiles = [
        Record(f"{record.image[:-4]}_{tile}.png", record.coordinates, record.verdict, MISSION)
        for record in records_of("test", 6)
        for tile in "ab"
    ]
    place = {record.name: record.coordinates for record in tiles}
    for question in questions(tiles):
        if question.control == SAME:
            assert question.coordinates != place[question.record.name]
        elif question.shown:
            assert place[question.shown.name] != place[question.record.name]


def test_a_category_with_one_place_is_refused() -> None:
    with pytest.raises(OrionError, match="a second HIGH place, and the split has one"):
        questions(records_of("test", 5)[1:])


def test_ten_noise_images_are_shown_and_none_is_that_of_the_protocol(runs: dict[str, Run]) -> None:
    backend = Planted("picture")
    run = Run(runs["picture"].folder.parent / "again", runs["picture"].settings)
    shutil.copytree(runs["picture"].dataset, run.dataset)
    controls.ask(pair_of(run), run, backend, "x")
    noises = {pixels for pixels, _ in backend.seen[2 * COUNT :]}
    assert len(noises) == 10
    assert noise_frame("gaussian", SIZE).tobytes() not in noises
    assert noise_frame("gaussian", SIZE, seed=1).tobytes() in noises
    assert noise_frame("gaussian", SIZE, seed=42).tobytes() == noise_frame("gaussian", SIZE).tobytes()


def test_a_model_that_looks_is_neither_distracted_nor_trusting(runs: dict[str, Run]) -> None:
    found = figures_of(runs["picture"], pair_of(runs["picture"]))
    assert found[SAME]["accuracy"]["count"] == COUNT
    assert found[SAME]["distraction"]["lost"] == found[SAME]["trust"]["lost"] == 0
    assert found[OTHER]["as_picture"]["count"] == COUNT
    assert found["protocol"]["D"]["count"] == COUNT
    # Its answer to noise is that of the noise image, whatever the place: a third of the places are right.
    assert found[NOISE]["accuracy"]["rate"] == pytest.approx(1 / 3)
    assert [found[NOISE][name] for name in ("lowest", "highest")] == pytest.approx([1 / 3, 1 / 3])


def test_trust_in_coordinates_shows_only_where_their_category_is_another(runs: dict[str, Run]) -> None:
    found = figures_of(runs["coordinates"], pair_of(runs["coordinates"]))
    assert (found[SAME]["distraction"]["lost"], found[SAME]["trust"]["lost"]) == (0, COUNT)
    assert found[NOISE]["accuracy"]["count"] == 10 * COUNT
    assert found[OTHER]["as_coordinates"]["count"] == COUNT
    assert found["protocol"]["D"]["count"] == 0


def test_confusion_shows_with_coordinates_of_the_same_category(runs: dict[str, Run]) -> None:
    found = figures_of(runs["confused"], pair_of(runs["confused"]))
    assert (found[SAME]["distraction"]["lost"], found[SAME]["trust"]["lost"]) == (COUNT - COUNT // 3, 0)
    assert found[SAME]["distraction"]["exact_p"] == pytest.approx(2 * 0.5**8)
    assert found[NOISE]["answers"] == {H: 0, M: 1, L: 0}


def test_the_interval_of_noise_is_over_places_not_over_answers(runs: dict[str, Run]) -> None:
    """Ten answers about one place agree here: they say as much as one."""
    noise = figures_of(runs["coordinates"], pair_of(runs["coordinates"]))[NOISE]["accuracy"]
    own = figures_of(runs["coordinates"], pair_of(runs["coordinates"]))["protocol"]["C"]
    assert noise["low"] == pytest.approx(own["low"], abs=1e-9)


def test_the_reports_have_the_controls_and_leave_out_those_of_another_model(
    runs: dict[str, Run], tmp_path: Path
) -> None:
    run = Run(shutil.copytree(runs["confused"].folder, tmp_path / "run"), runs["confused"].settings)
    results, _ = write.run(run)
    assert set(results["controls"]["of"]) == {"quantized"}
    text, page = (run.folder / "report.md").read_text(), (run.folder / "report.html").read_text()
    for row in controls_rows(results["controls"]["of"]["quantized"]):
        assert f"| quantized | {' | '.join(row)} |" in text
        assert row[0] in page
    assert 'href="#controls"' in page
    (run.gguf / PAIR).write_text('{"other": 1}')
    finish(run, evaluation(pair_of(run), MISSION))
    assert controls.finished(run) == ({}, ["quantized"])
    results, _ = write.run(run)
    assert (
        "Controls of another model, dataset or version, and left out: quantized."
        in (run.folder / "report.md").read_text()
    )
    assert 'href="#controls"' not in (run.folder / "report.html").read_text()


@pytest.mark.llama_cpp
@pytest.mark.slow
def test_a_pair_is_asked_through_the_command_line(finished: Path) -> None:
    arguments = ["evaluate", "--controls", "--run", "runs/small"]
    done = orion(*arguments, cwd=finished)
    assert done.returncode == 0, done.stderr
    assert "C: 10 other noise images" in done.stdout
    rows = [
        json.loads(line)
        for line in (finished / "runs/small/evaluation/test/controls/quantized/predictions.jsonl").open()
    ]
    frames = len({row["name"] for row in rows})
    assert Counter(row["control"] for row in rows) == {
        SAME: frames, OTHER: frames, **{f"noise-{n:02d}": frames for n in range(1, 11)},
    }  # fmt: skip
    again = orion(*arguments, "--json", cwd=finished)
    assert "unchanged" in again.stderr
    assert json.loads(again.stdout)["quantized"]["noise"]["images"] == 10
    wrong = orion(*arguments, "--stress", cwd=finished)
    assert (wrong.returncode, "cannot be combined" in wrong.stderr) == (2, True)


def test_the_answers_are_stored_as_of_every_evaluation(runs: dict[str, Run]) -> None:
    rows = read_predictions(runs["picture"].evaluation("controls/quantized"), MISSION)
    assert len(rows) == 12 * COUNT
    other = next(row for row in rows if row["control"] == OTHER)
    assert other["shown"]["name"] in other["image"]
    assert next(row for row in rows if row["control"] == "noise-01")["shown"] is None
