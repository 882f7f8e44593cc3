"""report/: results.json from what finished, and the documents rendered from it."""

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from orion_triage.dataset.dataset import Dataset
from orion_triage.dataset.records import read_split
from orion_triage.errors import OrionError
from orion_triage.evaluate.baselines import LOGISTIC_REGRESSION
from orion_triage.evaluate.metrics import Prediction
from orion_triage.evaluate.results import as_flown, blank_frames, build_results, current_results, differences, steps
from orion_triage.evaluate.run import read_predictions
from orion_triage.evaluate.seeds import over_training_seeds
from orion_triage.evaluate.variants import table
from orion_triage.mission.decide import Rules
from orion_triage.pipeline import run_stage, stage_named
from orion_triage.report import plot, write
from orion_triage.report.compare import compare_runs
from orion_triage.report.render import (
    accuracy_rows,
    advice,
    render_markdown,
    sentences,
    significant,
    terminal_tables,
    verdict_table,
)
from orion_triage.runs.manifest import hash_inputs, remove_outputs, write_manifest
from orion_triage.runs.run import Run, open_run, prepare
from orion_triage.settings import load_settings
from tests.conftest import MISSION, rewrite

H, M, L = "HIGH", "MEDIUM", "LOW"


def answers(guesses: str, *, scores: bool = False) -> list[Prediction]:
    """Ten HIGH frames, the same guesses under every condition: a letter a frame."""
    said = {"H": (H, (0.8, 0.1, 0.1)), "M": (M, (0.1, 0.8, 0.1)), "L": (L, (0.1, 0.1, 0.8))}
    return [
        Prediction(c, f"f{n}", H, said[letter][0], L, said[letter][1] if scores else None)
        for c in "ABCD"
        for n, letter in enumerate(guesses)
    ]


def test_each_variant_says_what_its_step_gained_and_lost() -> None:
    predictions = {
        "base": answers("LLLLLLLLLL"),
        "adapter-4bit": answers("HHHHHHHHHL"),
        "fine-tuned": answers("HHHHHHHHHH"),
        "Q8_0": answers("HHHHHHHHHH"),
        "quantized": answers("HHHHHHHHLL"),
        "flight": answers("HHHHHHHHLL"),
    }
    rows = steps(predictions, table(load_settings("tiny", ["variants.quantizations=Q8_0,Q6_K"])))
    assert [row["step"] for row in rows] == [
        "the base", "training, on 4-bit weights", "the adapter on 16-bit weights, then fusing",
        "the runtime: llama.cpp, then quantization to Q8_0", "quantization to Q4_K_M",
        "the grammar, then the rule for blank frames",
    ]  # fmt: skip
    assert rows[0]["change"] is None
    changes = [(row["change"]["B"]["gained"], row["change"]["B"]["lost"]) for row in rows[1:]]
    assert changes == [(9, 0), (1, 0), (0, 0), (0, 2), (0, 0)]
    assert significant(rows[1]["change"]) == "A, B, C, D"  # nine of nine: p = 0.004, 0.016 corrected for four
    assert significant(rows[4]["change"]) == "none"
    assert [row["compared_with"] for row in rows] == [
        None, "base", "adapter-4bit", "fine-tuned", "Q8_0", "quantized",
    ]  # fmt: skip


def test_another_decoding_is_compared_with_what_the_table_names() -> None:
    predictions = {"base": answers("LLLLL"), "quantized": answers("HHHHH"), "constrained": answers("HHHHL")}
    rows = steps(predictions | {"verdict-only": answers("HHHLL")}, table(load_settings("tiny")))
    last = rows[-1]
    assert (last["model"], last["compared_with"]) == ("verdict-only", "quantized")
    assert (last["change"]["B"]["gained"], last["change"]["B"]["lost"]) == (0, 2)


def test_evaluations_are_compared_under_the_conditions_that_both_know() -> None:
    older = [answer for answer in answers("HHHHHHHHHL") if answer.condition != "D"]
    assert list(differences(older, answers("HHHHHHHHHH"))) == ["A", "B", "C"]
    assert differences(older, answers("HHHHHHHHHH"))["A"]["holm_p"] == 1.0


def test_a_blank_frame_is_low_by_rule_and_noise_is_none() -> None:
    ruled = as_flown(answers("HHHHHHHHHH", scores=True), ["f3"], Rules(), MISSION)
    changed = [(p.condition, p.predicted, p.scores) for p in ruled if p.predicted != H]
    assert changed == [(condition, L, (0.0, 0.0, 1.0)) for condition in "ABD"]


def test_sentences_say_significant_or_how_many_frames_are_needed() -> None:
    results = {
        "frames": {"count": 10},
        "linear_probe": None,
        "deltas": {"quantization": differences(answers("HHHHHHHHHH"), answers("HHHHHHHHLL"))},
        "within": {"quantized": differences(answers("LLLLLLLLLL"), answers("HHHHHHHHHH"))},
    }
    said = sentences(results)
    assert said[0].startswith(
        "quantization, A: -20.0 points (0 gained, 2 lost), no significant difference (Holm-corrected p = 1, "
        "uncorrected mid-p "
    )
    assert said[0].endswith(", 10 frames); a difference of this size needs about 37 frames.")
    assert said[4] == "quantized, A: +100.0 points (10 gained, 0 lost), significant (Holm-corrected p = 0.0078)."
    results["deltas"]["quantization"] = differences(answers("HHHHH"), answers("HHHHH"))
    assert sentences(results)[0] == "quantization, A; B; C; D: no change, the same frames are correct."


def test_results_are_counted_from_predictions_and_name_what_is_missing(results: dict[str, Any]) -> None:
    assert json.loads(json.dumps(results)) == results
    steps_between = ["evaluate adapter-4bit", "evaluate adapter-16bit", "evaluate F16", "evaluate Q8_0"]
    flown = ["evaluate quantized", "evaluate constrained"]
    assert results["missing"] == ["fine-tune", "fuse", "quantize", "vision features", *steps_between, *flown]
    assert results["models"]["base"]["A"]["unparsable"] == 6
    assert results["models"]["fine-tuned"]["B"]["right"] == 2
    change = results["deltas"]["fine-tuning"]["A"]
    assert (change["points"], change["gained"], change["lost"]) == (pytest.approx(100 / 3), 2, 0)
    assert (change["exact_p"], change["mid_p"], change["holm_p"]) == (0.5, 0.25, 1.0)
    always_high = results["models"]["fine-tuned"]["B"]
    assert always_high["high_recall"]["rate"] == 1
    assert always_high["irrecoverable_loss"] | {"high": 0.49} == {
        "count": 0, "total": 4, "rate": 0.0, "low": pytest.approx(0, abs=1e-9), "high": 0.49,
    }  # fmt: skip
    assert always_high["downlink"]["sent"] == 1
    assert always_high["orbit"]["cost"]["value"] == pytest.approx(0.995)  # one for each frame that is not HIGH
    assert always_high["orbit"]["precision"]["HIGH"]["value"] == pytest.approx(0.005)
    assert always_high["scored"] == 0
    assert "brier" not in always_high
    assert "quantization" not in results["deltas"]
    # HIGH frames are right; LOW and MEDIUM frames get HIGH coordinates and HIGH as the answer, with and without.
    conflict = results["models"]["fine-tuned"]["D"]
    assert (conflict["trusted_vision"], conflict["trusted_coordinates"], conflict["trusted_neither"]) == (2, 4, 0)
    assert conflict["same_wrong_answer_in_b"] == 4
    assert conflict["moved_to_coordinates"] == 0


def test_tables_show_every_model_and_a_dash_for_what_is_missing(results: dict[str, Any]) -> None:
    assert accuracy_rows(results)[0] == ["A full system", "0.0 %", "33.3 %", "-", "+33.3", "-"]
    markdown = render_markdown(results, "report.png")
    assert "Not finished: fine-tune, fuse, quantize, vision features, evaluate adapter-4bit" in markdown
    assert "| A full system | 0.0 % | 33.3 % | - | +33.3 | - |" in markdown
    assert (
        "- fine-tuning, A: +33.3 points (2 gained, 0 lost), no significant difference (Holm-corrected p = 1, "
        "uncorrected mid-p 0.25, 6 frames);" in markdown
    )
    assert "6 frames at 6 places." in markdown
    assert "| fine-tuned | B | 2/2 = 100.0 % (34-100) | 0/4 = 0.0 % (0-49) |" in markdown
    assert "| fine_tune.learning_rate | 0.0002 | 0.004 |" in markdown
    assert "| colour k-NN (k = " in markdown
    console = Console(width=120, record=True, file=io.StringIO())
    for shown_table in terminal_tables(results):
        console.print(shown_table)
    shown = console.export_text()
    assert "unparsable answers" in shown
    assert "majority class" in shown


@pytest.mark.parametrize("width", [80, 101, 102, 160])
def test_the_verdict_is_not_cut_off_and_says_first_what_failed(width: int) -> None:
    rows = [
        ("better than coordinates k-NN", "58/60 against 29/60: +48 points (33 to 61), p < 0.001", "more", "pass", ""),
        ("HIGH and MEDIUM lost", "1 of 40: 2% (0 to 13)", "lower end at least 50%", "open", "More frames."),
        ("looks at the image", "20/60 with it, 20/60 with noise (C)", "more, p < 0.05", "fail", "Look at them."),
    ]
    names = ("name", "measured", "needed", "outcome", "advice")
    verdict = {"criteria": [dict(zip(names, row, strict=True)) for row in rows]}
    console = Console(file=io.StringIO(), width=width)
    console.print(verdict_table(verdict, width))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert {line[-1] for line in lines} <= set("┓┃┩│┘"), "rich has cut off a column"
    assert len(lines) <= 4 + 2 * len(rows)
    assert advice(verdict) == ["looks at the image: Look at them.", "HIGH and MEDIUM lost: More frames."]


def test_losses_are_drawn_and_the_png_is_written(results: dict[str, Any], tmp_path: Path) -> None:
    axes = Figure().subplots()
    plot.loss(axes, [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "eval_loss": 2.5}])
    assert [list(line.get_ydata()) for line in axes.lines] == [[3.0, 2.0], [2.5]]
    for losses in ([], [{"step": 1, "loss": 3.0}]):
        plot.draw(results, losses, tmp_path / "report.png")
        with Image.open(tmp_path / "report.png") as picture:
            assert picture.size[0] > 1000
    assert [path.name for path in tmp_path.glob("*.png")] == ["report.png"]


def test_a_pair_and_a_server_of_someone_elses_are_named(run: Run) -> None:
    shutil.rmtree(run.evaluation("base"))  # a report of fewer models takes less time
    server = {"server": "http://127.0.0.1:9", "served_model": "other.gguf", "server_build": "llama.cpp b1"}
    for name, figures in (("other-pair", {"pair": "team/pair"}), ("server", server)):
        shutil.copytree(run.evaluation("fine-tuned"), run.evaluation(name))
        stage = f"evaluate {name}"
        write_manifest(run.evaluation(name), stage=stage, settings={}, inputs={}, seconds=1, figures=figures)
    results = build_results(run)
    markdown = render_markdown(results, "report.png")
    assert '"other-pair" is the pair team/pair.' in markdown
    assert '"server" is other.gguf, as served by http://127.0.0.1:9 (llama.cpp b1).' in markdown
    assert {"other-pair", "server"} <= set(results["models"])
    assert {"other-pair", "server"}.isdisjoint(build_results(run, with_others=False)["models"])
    # An older version kept such answers as those of the run's own pair.
    shutil.copytree(run.evaluation("server"), run.evaluation("quantized"))
    assert "evaluate quantized" in build_results(run)["missing"]


def test_the_report_says_when_a_linear_probe_is_better(run: Run, results: dict[str, Any]) -> None:
    assert results["linear_probe"] is None
    shutil.rmtree(run.evaluation("base"))  # a report of fewer models takes less time
    folder = run.vision_features
    records = [record for split in ("train", "val", "test") for record in read_split(run.dataset, split, MISSION)]
    seen = {record.image: np.eye(3)[MISSION.names.index(record.verdict.category)] for record in records}
    folder.mkdir()
    np.savez(folder / "features.npz", images=np.array(list(seen)), vectors=np.array(list(seen.values())))
    write_manifest(folder, stage="vision features", settings={}, inputs={}, seconds=1)
    results = build_results(run)
    assert results["baselines"][LOGISTIC_REGRESSION]["right"] == 6  # the vectors say it
    assert (results["linear_probe"]["gained"], results["linear_probe"]["lost"]) == (0, 4)  # the model always says HIGH
    better = "(linear probe) has a higher accuracy than the fine-tuned model without coordinates"
    assert sentences(results)[0].startswith(f"{LOGISTIC_REGRESSION} {better}")
    results["linear_probe"] |= {"gained": 4, "lost": 0}
    assert "does not have a higher accuracy than the fine-tuned model" in sentences(results)[0]


def test_runs_that_differ_in_the_training_seed_only_are_reported_together(run: Run, tmp_path: Path) -> None:
    def beside(name: str, **assignments: Any) -> Path:
        settings = load_settings("tiny", [f"fine_tune.{key}={value}" for key, value in assignments.items()])
        other = Run(tmp_path / name, settings)
        shutil.copytree(run.folder, other.folder)
        prepare(other)
        inputs = hash_inputs({"dataset": other.dataset})
        for stage_manifest in other.folder.rglob("evaluation/*/*/manifest.json"):
            stage_manifest.write_text(json.dumps(json.loads(stage_manifest.read_text()) | {"inputs": inputs}))
        return other.folder

    beside("longer", seed=45, epochs=9)
    first, second = beside("first"), beside("second", seed=44)
    assert over_training_seeds(open_run(first))["seeds"] == [42, 44]
    predictions = second / "evaluation/test/fine-tuned/predictions.jsonl"
    rows = [json.loads(line) for line in predictions.read_text().splitlines()]
    rewrite(predictions, [row | ({"category": row["truth"]} if row["condition"] == "A" else {}) for row in rows])
    results = build_results(open_run(first))
    alone = results["models"]["fine-tuned"]["A"]["accuracy"]
    assert alone < 1
    assert results["training_seeds"]["accuracies"]["fine-tuned"]["A"] == [alone, 1.0]
    assert "base" not in results["training_seeds"]["accuracies"]
    text = render_markdown(results, "report.png")
    assert f"| fine-tuned | A | {100 * alone:.1f} % | {50 * (1 + alone):.1f} % | 100.0 % |" in text
    stage_manifest = second / "evaluation/test/fine-tuned/manifest.json"
    stage_manifest.write_text(json.dumps(json.loads(stage_manifest.read_text()) | {"inputs": {"dataset": "another"}}))
    assert over_training_seeds(open_run(first)) is None


def test_questions_that_differ_are_counted_over_both_runs(run: Run, tmp_path: Path) -> None:
    """Once "280 of 240 differ": the questions of one run were counted, those of both compared."""

    def changed(name: str, change: Callable[[dict[str, Any]], list[dict[str, Any]]]) -> Run:
        other = Run(shutil.copytree(run.folder, tmp_path / name), run.settings)
        shutil.rmtree(other.evaluation("fine-tuned"))
        path = other.evaluation("base") / "predictions.jsonl"
        rows = [row for line in path.read_text().splitlines() for row in change(json.loads(line))]
        rewrite(path, rows)
        return other

    def renamed(row: dict[str, Any]) -> dict[str, Any]:
        return row | {"id": f"{row['condition']}/x-{row['name']}", "name": f"x-{row['name']}"}

    prompts = changed("prompts", lambda row: [row | {"prompt_sha256": "0"} if row["condition"] == "D" else row])
    frames = changed("frames", lambda row: [renamed(row)])
    more = changed("more", lambda row: [row, renamed(row)] if row["condition"] == "B" else [row])
    fewer = changed("fewer", lambda row: [row] if row["condition"] in "AB" else [])
    for other, said in (
        (prompts, r"6 of 24 .* \(0 are of one run only\), the first is D/"),
        (frames, r"48 of 48 .* \(48 are of one run only\)"),
        (more, r"6 of 30 .* \(6 are of one run only\), the first is B/x-"),
    ):
        for pair in ((run, other), (other, run)):
            with pytest.raises(OrionError, match=said):
                compare_runs(*pair)
    assert list(compare_runs(run, fewer)["base"]) == ["A", "B"]


def edit(path: Path, old: str, new: str) -> None:
    """Replace the first `old`, of the same length, and keep the time of change: as bits that changed on a disk."""
    text, state = path.read_text(), path.stat()
    assert len(old) == len(new)
    assert old in text
    path.write_text(text.replace(old, new, 1))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def test_answers_that_changed_after_the_evaluation_are_refused(run: Run, tmp_path: Path) -> None:
    other = Run(shutil.copytree(run.folder, tmp_path / "other"), run.settings)
    write.run(run)
    path = run.evaluation("base") / "predictions.jsonl"
    edit(path, '"truth": "HIGH"', '"truth": "HIGh"')
    for what in (current_results, build_results, write.run, lambda run: compare_runs(other, run)):
        with pytest.raises(OrionError, match=r"base/predictions\.jsonl was changed after the evaluation") as refused:
            what(run)
        assert f"'orion evaluate --variants base --run {run.folder} --force'" in refused.value.fix


@pytest.mark.parametrize(
    ("folder", "command"),
    [
        ("val/F16", "--variants F16 --file val --run {} --force"),
        ("test/stress/haze", "--stress haze --run {} --force"),
        ("test/controls/quantized", "--controls quantized --run {} --force"),
        ("test/server", "--quantized-model URL --run {} --force"),
        ("test/other-pair", "--gguf PAIR --run {} --force"),
    ],
)
def test_the_command_that_repeats_an_evaluation_is_named(folder: str, command: str, tmp_path: Path) -> None:
    path = tmp_path / "evaluation" / folder / "predictions.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("")
    write_manifest(path.parent, stage=f"evaluate {folder.partition('/')[2]}", settings={}, inputs={}, seconds=1)
    assert read_predictions(path.parent, MISSION) == []
    path.write_text("\n")
    with pytest.raises(OrionError) as refused:
        read_predictions(path.parent, MISSION)
    assert f"'orion evaluate {command.format(tmp_path)}'" in refused.value.fix


def test_evaluations_of_other_frames_are_named(run: Run) -> None:
    path = run.evaluation("fine-tuned") / "predictions.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rewrite(path, [row for row in rows if row["id"] != "B/low_place_20"])
    said = r"predictions of base and fine-tuned under B .* 6 and 5; 1 are of one only, the first is low_place_20"
    with pytest.raises(OrionError, match=said):
        build_results(run)


def test_a_dataset_that_changed_after_it_was_made_is_refused(run: Run) -> None:
    write.run(run)
    split = run.dataset / "test_dataset.jsonl"
    kept = split.read_bytes()
    edit(split, r"\"LOW\"", r"\"LoW\"")
    base = stage_named("evaluate base", run.settings)
    for what in (current_results, blank_frames, lambda run: run_stage(base, run)):
        with pytest.raises(OrionError, match=r"test_dataset\.jsonl was changed after the dataset was made") as refused:
            what(run)
        assert f"'orion dataset --run {run.folder} --force'" in refused.value.fix
    split.write_bytes(kept)
    picture = Dataset(run.dataset, MISSION).path(read_split(run.dataset, "test", MISSION)[0])
    Image.new("RGB", (512, 512)).save(picture)
    with pytest.raises(OrionError, match=f"{picture.name} was changed"):
        blank_frames(run)


def test_a_verdict_that_was_edited_is_not_read(run: Run) -> None:
    results, _ = write.run(run)
    assert current_results(run) == (json.loads(json.dumps(results)), True)
    edit(run.folder / "results.json", '"verdict": "NOT ENOUGH EVIDENCE"', '"verdict": "FLY"'.ljust(32))
    found, is_last = current_results(run)
    assert (found["verdict"], is_last) == (results["verdict"], False)


def test_figures_of_another_version_are_not_taken_over(run: Run) -> None:
    shutil.rmtree(run.folder / "evaluation")  # a report without models takes less time
    results = build_results(run)
    remove_outputs(run.dataset, lambda name: name.endswith(".png"))
    path = run.folder / "results.json"
    path.write_text(json.dumps(results))
    assert build_results(run)["baselines"] == results["baselines"]
    path.write_text(json.dumps(results | {"content_sha256": "of others"}))
    with pytest.raises(OrionError, match=r"results\.json was changed"):
        build_results(run)
    path.write_text(json.dumps(results | {"schema_version": 2}))
    with pytest.raises(OrionError, match="schema version 2 instead of 8"):
        build_results(run)
