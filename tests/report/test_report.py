"""report/: results.json from what finished, and the documents rendered from it."""

import io
import json
import shutil
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from orion_triage.config import Settings, load_settings
from orion_triage.evaluate.backends import ConstantBackend
from orion_triage.evaluate.run import run as evaluate
from orion_triage.manifest import write_manifest
from orion_triage.pipeline import Run
from orion_triage.records import read_split
from orion_triage.report import plot
from orion_triage.report.render import accuracy_rows, render_markdown, terminal_tables
from orion_triage.report.results import build_results


@pytest.fixture
def run(small_dataset: Path, tmp_path: Path) -> Run:
    """A run of which the dataset, the base's and the fine-tuned model's evaluation are finished."""
    run = Run(tmp_path / "run", load_settings("tiny"))
    shutil.copytree(small_dataset, run.dataset)
    write_manifest(run.dataset, stage="dataset", settings={}, inputs={}, seconds=3)
    records = read_split(run.dataset, "test")
    for model, answer in (("base", "no"), ("fine-tuned", '{"reason": "r", "category": "HIGH"}')):
        folder = run.evaluation(model)
        evaluate(records, run.dataset, ConstantBackend(answer), folder, Settings().evaluate, 256, fingerprint=model)
        write_manifest(folder, stage=f"evaluate {model}", settings={}, inputs={}, seconds=1)
    return run


def test_results_are_counted_from_predictions_and_name_what_is_missing(run: Run) -> None:
    results = build_results(run)
    assert json.loads(json.dumps(results)) == results
    assert results["missing"] == ["fine-tune", "fuse", "quantize", "evaluate quantized"]
    assert results["models"]["base"]["A"]["unparsable"] == 6
    assert results["models"]["fine-tuned"]["B"]["right"] == 2
    assert results["deltas"]["fine-tuning"]["A"] == {"points": pytest.approx(100 / 3), "mcnemar_p": 0.5}
    assert "quantization" not in results["deltas"]
    # HIGH frames are right; LOW and MEDIUM frames get HIGH coordinates and HIGH as the answer, with and without.
    conflict = results["models"]["fine-tuned"]["D"]
    assert (conflict["trusted_vision"], conflict["trusted_coordinates"], conflict["trusted_neither"]) == (2, 4, 0)
    assert conflict["same_wrong_answer_in_b"] == 4
    assert conflict["moved_to_coordinates"] == 0


def test_tables_show_every_model_and_a_dash_for_what_is_missing(run: Run) -> None:
    results = build_results(run)
    assert accuracy_rows(results)[0] == ["A full system", "0.0 %", "33.3 %", "-", "+33.3", "-"]
    markdown = render_markdown(results, "report.png")
    assert "Not finished: fine-tune, fuse, quantize, evaluate quantized" in markdown
    assert "| A full system | 0.0 % | 33.3 % | - | +33.3 | - |" in markdown
    assert "cannot be told from chance" in markdown
    assert "| fine_tune.learning_rate | 0.0002 | 0.004 |" in markdown
    assert "| colour k-NN (k = " in markdown
    console = Console(width=120, record=True, file=io.StringIO())
    for table in terminal_tables(results):
        console.print(table)
    shown = console.export_text()
    assert "unparsable answers" in shown
    assert "majority class" in shown


def test_the_figure_shows_the_figures(run: Run, tmp_path: Path) -> None:
    results = build_results(run)
    axes = Figure().subplots()
    plot.bars(axes, results)
    heights = [round(bar.get_height(), 6) for bar in axes.patches]
    wanted = [
        results["models"][model][condition]["accuracy"] for model in ("base", "fine-tuned") for condition in "ABCD"
    ]
    assert heights == [round(100 * value, 6) for value in wanted]
    named = axes.get_legend_handles_labels()[1]
    assert set(named) == {"base", "fine-tuned", *results["baselines"]}
    axes = Figure().subplots()
    plot.curves(axes, [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "eval_loss": 2.5}])
    assert [list(line.get_ydata()) for line in axes.lines] == [[3.0, 2.0], [2.5]]
    for losses in ([], [{"step": 1, "loss": 3.0}]):
        plot.draw(results, losses, tmp_path / "report.png")
        with Image.open(tmp_path / "report.png") as picture:
            assert picture.size[0] > 1000
    assert [path.name for path in tmp_path.glob("*.png")] == ["report.png"]


def test_a_pair_of_someone_elses_is_named(run: Run) -> None:
    folder = run.evaluation("quantized")
    shutil.copytree(run.evaluation("base"), folder)
    for own, said in (({"pair": "team/pair"}, True), ({}, False)):
        write_manifest(folder, stage="evaluate quantized", settings={}, inputs={}, seconds=1, figures=own)
        markdown = render_markdown(build_results(run), "report.png")
        assert ("came from the pair team/pair, not from this run's" in markdown) is said


def test_a_server_of_someone_elses_is_named(run: Run) -> None:
    folder = run.evaluation("quantized")
    shutil.copytree(run.evaluation("base"), folder)
    figures = {"server": "http://127.0.0.1:9", "served_model": "other.gguf", "server_build": "b1"}
    for own, said in ((figures, True), ({}, False)):
        write_manifest(folder, stage="evaluate quantized", settings={}, inputs={}, seconds=1, figures=own)
        markdown = render_markdown(build_results(run), "report.png")
        assert ("came from the server at http://127.0.0.1:9\n(other.gguf, llama.cpp b1)" in markdown) is said
