"""The command line as a user meets it: real processes, exit status, both output streams."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from orion_triage.cli import app
from orion_triage.evaluate.seeds import val_loss_of_category
from orion_triage.export import quantize
from orion_triage.llama_cpp.server import Server
from orion_triage.llama_cpp.toolchain import find_toolchain
from orion_triage.models.load import TINY_BASE_FOLDER
from orion_triage.pipeline import is_current, stages
from orion_triage.runs.manifest import read_manifest
from orion_triage.runs.run import open_run
from orion_triage.settings import Settings

from .conftest import ORION, SHARED, orion, rewrite, run_command, structured_picture

STAGES = stages(Settings())
REAL_FRAMES = SHARED / "frames"
COMMANDS = (
    "run", "mission", "dataset", "ablation", "fine-tune", "fuse", "quantize", "evaluate", "threshold",
    "report", "verdict", "compare", "push", "clean", "verify", "triage", "bench-frame", "toolchain", "rehearse",
    "plan", "doctor", "settings", "bundle", "remote", "camera", "review", "adapt", "false-alarms", "cascade",
)  # fmt: skip


def assert_refused(result: subprocess.CompletedProcess[str], *words: str, status: int = 1) -> None:
    assert result.returncode == status, result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr
    if status == 1:
        said = result.stderr.splitlines()
        assert [line for line in said if line.startswith("error: ")], said
        assert "fix: " in result.stderr


def test_starting_up_loads_no_heavy_library() -> None:
    code = "import sys, orion_triage.cli; print({'torch', 'transformers', 'scipy', 'PIL', 'httpx'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_a_run_folder_keeps_where_its_dataset_comes_from(tmp_path: Path) -> None:
    def kept() -> dict[str, object]:
        return json.loads((tmp_path / "runs" / "tiny" / "settings.json").read_text())["dataset"]

    (tmp_path / "own").mkdir()
    begun = tmp_path / "runs" / "tiny" / "dataset_work"
    begun.mkdir(parents=True)
    (begun / "frame.png").write_bytes(b"of a build that was interrupted")
    assert_refused(orion("dataset", "--dataset", "own", cwd=tmp_path), "is not a dataset")
    assert (kept()["source"], kept()["folder"]) == ("directory", "own")
    assert_refused(orion("fine-tune", "--set", "fine_tune.epochs=1", cwd=tmp_path), "dataset does not exist")
    assert (kept()["source"], kept()["folder"]) == ("directory", "own")
    assert_refused(orion("dataset", "--set", "dataset.catalogue=none.csv", cwd=tmp_path), "none.csv does not exist")
    assert (kept()["source"], kept()["folder"]) == ("synthetic", "")


@pytest.mark.parametrize(
    "command",
    [
        *COMMANDS,
        "dataset check",
        "dataset new",
        "dataset view",
        "dataset push",
        "remote train",
        "mission new",
        "mission check",
        "camera new",
        "camera check",
        "camera preview",
        "camera fit",
        "review new",
        "review read",
        "review suggest",
    ],
)
def test_every_command_explains_itself_with_an_example(command: str) -> None:
    result = CliRunner().invoke(app, [*command.split(), "--help"])
    assert result.exit_code == 0
    assert f"Example: orion {command}" in result.stdout


def test_the_list_of_commands_is_complete() -> None:
    listed = re.findall(r"^│ ([a-z][a-z-]+) ", orion("--help").stdout, re.MULTILINE)
    assert set(listed) == set(COMMANDS)


def test_usage_mistakes_have_exit_status_two(tmp_path: Path) -> None:
    assert orion("nothing-of-that-name").returncode == 2
    assert orion("evaluate", "--file", "train", cwd=tmp_path).returncode == 2
    assert orion("triage", cwd=tmp_path).returncode == 2
    assert "Possible options: --preset)" in orion("run", "--prset", "tiny", cwd=tmp_path).stderr
    unlike = orion("run", "--frames", "3", cwd=tmp_path)
    assert "No such option: --frames " in unlike.stderr
    assert "Possible" not in unlike.stderr
    assert not list(tmp_path.iterdir())


def test_mistakes_are_one_line_and_a_fix(tmp_path: Path) -> None:
    assert_refused(orion("run", "--preset", "huge", cwd=tmp_path), "there is no preset 'huge'", "tiny")
    both = orion("run", "--set", "fine_tune.rnak=8", "--set", "fine_tune.epochs=-1", cwd=tmp_path)
    assert_refused(both, "2 mistakes", "fine_tune.rnak: there is no such key", "fine_tune.epochs")
    assert_refused(
        orion("run", "--set", "base.model=nowhere", cwd=tmp_path), "'nowhere' is neither a folder nor a Hub id"
    )
    assert_refused(orion("triage", "x.png", cwd=tmp_path), "no run with a finished quantize stage")
    assert_refused(orion("report", "--run", "gone", cwd=tmp_path), "gone/settings.json does not exist")
    assert_refused(orion("fuse", cwd=tmp_path), "does not exist", "First, run the stage that makes it")
    shutil.rmtree(tmp_path / "runs", ignore_errors=True)
    assert not list(tmp_path.iterdir())


def test_a_bad_dataset_line_is_named_before_training(tmp_path: Path, small_dataset: Path) -> None:
    run = tmp_path / "runs" / "tiny"
    shutil.copytree(small_dataset, run / "dataset")
    path = run / "dataset" / "train_dataset.jsonl"
    path.write_text(path.read_text().replace('\\"LOW\\"', '\\"NONE\\"', 1))
    result = orion("fine-tune", cwd=tmp_path)
    assert_refused(result, "train_dataset.jsonl:", "category 'NONE' is not HIGH, MEDIUM or LOW")
    assert not (run / "orion_lora_weights").exists()


def test_a_dataset_is_checked_and_looked_at(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "runs" / "small" / "dataset", tmp_path / "dataset")
    sound = orion("dataset", "check", "dataset", cwd=tmp_path)
    assert sound.returncode == 0, sound.stdout + sound.stderr
    assert "0 errors, 1 warnings in 36 frames and 48 train, 6 val, 6 test records" in sound.stdout
    shown = orion("dataset", "view", cwd=finished)
    assert shown.returncode == 0, shown.stderr
    assert (finished / "dataset.html").read_text().count("<img") >= 36
    path = tmp_path / "dataset" / "test_dataset.jsonl"
    path.write_text(path.read_text().replace('\\"LOW\\"', '\\"HIGH\\"', 1) + "no record\n")
    faulty = orion("dataset", "check", "dataset", cwd=tmp_path)
    assert faulty.returncode == 1
    assert "error schema: 1" in faulty.stdout
    assert "test_dataset.jsonl:7: not JSON" in faulty.stdout
    assert "fix: " in faulty.stdout
    report = json.loads(orion("dataset", "check", "dataset", "--json", cwd=tmp_path).stdout)
    assert (report["errors"], report["findings"][0]["place"]) == (1, "test_dataset.jsonl:7")
    assert_refused(orion("dataset", "check", "nothing", cwd=tmp_path), "neither a folder nor a Hub id")
    refused = orion("dataset", "--source", "simsat", "--dataset", "dataset", cwd=tmp_path)
    assert_refused(refused, "cannot be combined with --dataset", status=2)


def test_an_interrupted_command_says_so_and_leaves_nothing_half_done(tmp_path: Path) -> None:
    command = [*ORION, "dataset", "--run", "run"]
    # As from a terminal: the signal goes to the workers too, and is not ignored, as a shell's background job would.
    running = subprocess.Popen(
        command,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 600
    while not list(tmp_path.glob("run/*/orion_dataset/images/*.png")) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(running.pid, signal.SIGINT)
    _, said = running.communicate(timeout=600)
    assert running.returncode == 130
    assert "interrupted: run the same command again to resume" in said
    assert "Traceback" not in said
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock", "settings.json"]


@pytest.mark.llama_cpp
@pytest.mark.slow
def test_a_run_leaves_every_product_and_its_manifests(finished: Path) -> None:
    run = finished / "runs" / "small"
    for name in (
        "orion_lora_weights/adapter_model.safetensors",
        "orion_merged/model.safetensors",
        "gguf/orion-f16.gguf",
        "gguf/orion-mmproj-f16.gguf",
        "gguf/orion-q4_k_m.gguf",
        "evaluation/test/base/predictions.jsonl",
        "evaluation/test/fine-tuned/predictions.jsonl",
        "evaluation/test/quantized/predictions.jsonl",
        "report.html",
        "report.md",
        "report.png",
    ):
        assert (run / name).stat().st_size > 0
    for folder, relation in (("orion_lora_weights", "adapter"), ("orion_merged", "finetune"), ("gguf", "quantized")):
        card = (run / folder / "README.md").read_text()
        assert "\nbase_model: orion-tiny\n" in card
        assert f"\nbase_model_relation: {relation}\n" in card
        assert "README.md" in read_manifest(run / folder).outputs  # type: ignore[union-attr]
        assert (run / folder / "LICENSE").read_bytes() == (TINY_BASE_FOLDER / "LICENSE").read_bytes()
    results = json.loads((run / "results.json").read_text())
    assert results["missing"] == []
    steps = ["adapter-4bit", "adapter-16bit", "fine-tuned", "F16", "Q8_0", "quantized", "constrained", "flight"]
    assert [step["model"] for step in results["variants"]] == ["base", *steps]
    assert set(results["models"]) == {"base", *steps}
    assert results["parity"]["largest_difference"] <= 0.01
    assert results["parity"]["agreement"] >= 0.95
    assert all(rates["unparsable"] == 0 for rates in results["models"]["constrained"].values())
    for model in ("base", "fine-tuned", "quantized", "constrained"):
        assert results["models"][model]["A"]["scored"] == 6
    assert set(results["seconds"]) == {stage.name for stage in STAGES}
    for rates in results["models"].values():
        assert {condition: figures["count"] for condition, figures in rates.items()} == dict.fromkeys("ABCD", 6)
    documented = (Path(__file__).parents[1] / "docs" / "results.md").read_text()
    assert [key for key in (*results, *results["models"]["flight"]["D"]) if f"`{key}`" not in documented] == []
    types = read_manifest(run / "gguf").figures["tensor_types"]["orion-q4_k_m.gguf"]  # type: ignore[union-attr]
    assert "Q4_K" in types
    report = (run / "report.md").read_text()
    assert "fine_tune.epochs | 3 | 2" in report
    assert not [path for path in run.rglob("*") if ".partial" in path.name or ".old" in path.name]


@pytest.mark.llama_cpp
@pytest.mark.slow
def test_two_seeds_are_trained_and_the_best_on_val_is_named(two_seeds: Path) -> None:
    said = (two_seeds / "said").read_text()
    runs = [two_seeds / "runs" / name for name in ("small", "small-seed-43")]
    for product, same in (("dataset", True), ("orion_lora_weights", False)):
        first, second = (json.loads((run / product / "manifest.json").read_text())["outputs"] for run in runs)
        assert (first == second) is same, product
    losses = [val_loss_of_category(open_run(run)) for run in runs]
    assert all(losses)
    assert losses[0] != losses[1]
    best = runs[losses.index(min(losses))]
    assert f"runs/{best.name} is best on val. It was chosen there" in said
    results = json.loads((best / "results.json").read_text())["training_seeds"]
    assert results["seeds"] == [42, 43]
    assert results["val_losses_of_category"] == losses
    assert results["best_on_val"] == (42 if best == runs[0] else 43)
    for model, rows in results["accuracies"].items():
        for condition, rates in rows.items():
            low, high = results["intervals"][model][condition]
            assert low <= sum(rates) / 2 <= high, (model, condition)
    assert f"This run (seed {results['best_on_val']}) was the best of 2 on val" in (best / "report.md").read_text()


def test_a_second_run_skips_and_a_changed_setting_redoes_what_follows(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a cleaned run, which flies and says what it lacks."""
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    monkeypatch.chdir(folder)  # the catalogue of the run is places.csv
    run = Path("runs/small")

    def outdated() -> list[str]:
        opened = open_run(run)
        return [stage.name for stage in STAGES if not is_current(stage, opened)]

    assert outdated() == []
    before = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
    for _ in range(2):
        result = orion("clean", run)
        assert result.returncode == 0, result.stderr
    left = {path.name for path in run.rglob("*") if path.is_file() and path.stat().st_size > 1_000_000}
    assert left == {"orion-q4_k_m.gguf", "orion-mmproj-f16.gguf", "adapter_model.safetensors"}
    assert sum(path.stat().st_size for path in run.rglob("*") if path.is_file()) < before / 2

    again = orion(*run_command())
    assert again.returncode == 0, again.stderr
    assert re.findall(r"^(.+): unchanged, skipped", again.stderr, re.MULTILINE) == [stage.name for stage in STAGES]
    assert "fine-tuned" in again.stdout
    names = ", ".join(stage.name for stage in STAGES)
    assert f"to skip, because they are current ({len(STAGES)} of {len(STAGES)}): {names}\n" in again.stderr
    assert "to do (" not in again.stderr
    structured_picture(1).save("good.png")
    assert orion("triage", "good.png").returncode == 0

    refused = orion("fuse", *run_command()[1:], "--force")
    assert_refused(refused, "fuse needs runs/small/dataset", "'orion dataset --force'")
    assert orion("dataset", *run_command()[1:], "--force").returncode == 0
    assert outdated() == []
    config = run / "orion_merged" / "config.json"
    kept = config.read_text()
    config.write_text("{}")
    assert outdated()[0] == "fuse"
    config.write_text(kept)

    changed = orion(*run_command(), "--set", "fuse.dtype=bfloat16", "--set", "variants.all=false")
    assert changed.returncode == 0, changed.stderr
    time = (
        r"\(\d[^)]+\)"  # of the run that is repeated, on this machine; with another dtype, a fusion was never measured
    )
    to_do = rf"fuse \(not known\), quantize {time}, evaluate fine-tuned {time}, evaluate quantized {time}"
    assert re.search(rf"^to do \(4\): {to_do}$", changed.stderr, re.MULTILINE), changed.stderr
    assert re.search(r"^about .+, by the seconds that run small took on this machine$", changed.stderr, re.MULTILINE)
    assert re.search(r"^all 7 stages by their manifests: .+; this command: ", changed.stderr, re.MULTILINE)
    state = re.findall(r"^(.+): (unchanged, skipped|done)", changed.stderr, re.MULTILINE)
    assert state == [
        *((name, "unchanged, skipped") for name in ("dataset", "evaluate base", "fine-tune")),
        *((name, "done") for name in ("fuse", "quantize", "evaluate fine-tuned", "evaluate quantized")),
    ]
    assert outdated() == ["evaluate F16", "evaluate Q8_0", "evaluate constrained"]


@pytest.mark.llama_cpp
@pytest.mark.slow
def test_an_operating_point_is_chosen_on_val_kept_and_flown(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    run = folder / "runs" / "small"
    structured_picture(1).save(folder / "good.png")
    plain = json.loads(orion("triage", "good.png", "--json", cwd=folder).stdout)[0]
    assert sum(plain["scores"].values()) == pytest.approx(1)
    assert plain["category"] == max(plain["scores"], key=plain["scores"].get)
    assert_refused(orion("threshold", "--max-irrecoverable-loss", "140%", cwd=folder), "'140%' is not a share")
    for limit in ("100%", "0"):
        more = ["--json", "--loosen"] if limit != "0" else []
        result = orion("threshold", "--max-irrecoverable-loss", limit, *more, cwd=folder)
        assert result.returncode == 0, result.stderr
        record = json.loads((run / "operating_point.json").read_text())
        assert record["chosen_on"] == {"split": "val", "condition": "B", "frames": 6}
        assert 0.04 < record["temperature"] < 21
        there, drop_threshold = record["there"]["after"], record["drop_threshold"]
        assert there["irrecoverable_loss"]["rate"] <= float(limit.rstrip("%"))
        if limit == "100%":
            printed = json.loads(result.stdout)
            assert printed.pop("on_test")["after"]["downlink"]["dropped"] > 0
            assert printed | {"history": []} == record
            assert there["downlink"]["dropped"] == 1.0
            flown = json.loads(orion("triage", "good.png", "--json", cwd=folder).stdout)[0]
            below = flown["scores"]["LOW"] < drop_threshold
            assert (flown["category"] == "LOW") is not below
            assert flown["decided_by"] == f"threshold {drop_threshold:.3f}"
            assert flown["model_category"] == plain["category"]
        else:
            point = f"a frame is dropped if P(LOW) is {drop_threshold:.3f} or more" if drop_threshold <= 1 else "none; "
            assert result.stdout.startswith(f"threshold: {point}")
            rows = [line.split("│")[1:6] for line in result.stdout.splitlines() if "│ after" in line]
            assert [[cell.strip() for cell in row[:2]] for row in rows] == [["val", "after"], ["test", "after"]]
            assert rows[0][2].strip().startswith("0/4 = 0.0 %")
            assert re.search(r"val: 0 more HIGH and MEDIUM frames lost, [0-4] saved", result.stdout)
    told = orion("cascade", "--max-loss", "100%", "--seconds", "0.5,2", "--json", cwd=folder)
    assert told.returncode == 0, told.stderr
    assert "not faster" not in told.stderr
    cascade = json.loads(told.stdout)
    assert cascade["frame_sizes"] == {"first_look": 256, "full_look": 256}
    assert cascade["chosen_on"] == {"split": "val", "largest_loss": 1.0, "frames": 6}
    assert cascade["effects"]["val"]["spared"] == {"count": 6, "total": 6}  # all may be lost, so all are dropped
    spared = cascade["effects"]["test"]["spared_in_orbit"]["value"]
    assert cascade["effects"]["test"]["seconds_per_frame"]["expected"] == pytest.approx(0.5 + 2 * (1 - spared))
    assert_refused(orion("cascade", "--first", "sampled", cwd=folder), "--first sampled is not a cheap look")
    for seconds in ("2", "nan,1", "inf,inf", "1,-1", "1,2,3"):
        refused = orion("cascade", "--seconds", seconds, cwd=folder)
        assert_refused(refused, f"--seconds {seconds} is not two times")
    swapped = orion("cascade", "--max-loss", "100%", "--seconds", "0.227,0.185", cwd=folder)
    assert "the first look (0.227 s) is not faster than the full look (0.185 s)" in swapped.stderr
    assert "first look: verdict-only, frames of 256 px; full look: 256 px" in swapped.stdout
    line = r"expected per frame in orbit: \d\.\d{2,3} s instead of 0\.185 s \(the first look alone: 0\.227 s\)"
    assert re.search(line, swapped.stdout), swapped.stdout
    refused = orion("cascade", "--first", "first-look", cwd=folder)
    assert_refused(
        refused,
        "a first look at 256 px is not smaller",
        "Run 'orion evaluate --run runs/small --variants first-look --set variants.first_look_size=SIZE'",
    )
    guarded = orion("threshold", "--max-irrecoverable-loss", "100%", "--loosen", "--keep-unlike", cwd=folder)
    assert guarded.returncode == 0, guarded.stderr
    assert re.search(r"frames unlike those of train and val are kept: 0 of val, \d of test\n", guarded.stdout)
    squares = np.indices((512, 512)).sum(axis=0) // 4 % 2 * 255  # stripes of black and white, which no tile has
    Image.fromarray(squares.astype(np.uint8)).convert("RGB").save(folder / "stripes.png")
    told = orion("triage", "good.png", "stripes.png", "--json", cwd=folder)
    assert "unlike frames kept" in told.stderr
    stripes = json.loads(told.stdout)[1]
    limit = json.loads((run / "operating_point.json").read_text())["drop_threshold"]
    would_be_dropped = stripes["scores"]["LOW"] >= limit
    assert (stripes["decided_by"] == "unlike training") is would_be_dropped
    assert stripes["category"] in ("HIGH", "MEDIUM")
    assert orion("threshold", "--undo", cwd=folder).returncode == 0
    promise = orion("threshold", "--confidence", "95%", cwd=folder)
    assert_refused(
        promise, "cannot be promised with 95% confidence from 4 places", "55 more HIGH and MEDIUM val frames"
    )
    refused = orion("threshold", "--max-irrecoverable-loss", "100%", cwd=folder)
    assert_refused(refused, "nothing was changed", "--loosen")
    report = json.loads(orion("report", "--json", cwd=folder).stdout)
    assert report["operating_point"]["drop_threshold"] == record["drop_threshold"]
    assert report["models"].keys() >= {"flight", "no-threshold"}
    again = orion("report", cwd=folder)
    assert "report (unchanged): " in again.stdout
    assert again.stderr == "run: runs/small\n"
    assert report["settings"]["fine_tune"]["epochs"] == 2  # of this run
    (run / "operating_point.json").write_text(json.dumps(record | {"pair_sha256": "0"}))
    assert_refused(orion("triage", "good.png", cwd=folder), "was chosen for another GGUF pair", "orion threshold")
    (run / "operating_point.json").write_text("{")
    damaged = orion("triage", "good.png", cwd=folder)
    assert_refused(damaged, "operating_point.json is not JSON", "fix: Run 'orion threshold' again.")
    (run / "operating_point.json").write_text(json.dumps(record))
    again = orion("threshold", "--max-irrecoverable-loss", "0", cwd=folder)
    assert "This is no promise for other frames: it was chosen on val" in again.stdout
    assert json.loads((run / "operating_point.json").read_text()) == record  # the same choice: no second entry
    assert orion("threshold", "--undo", cwd=folder).stdout.startswith("threshold: a frame is dropped if P(LOW) is ")
    assert orion("threshold", "--undo", cwd=folder).stdout == "threshold: none; the model decides\n"
    assert_refused(orion("threshold", "--undo", cwd=folder), "has no threshold", "orion threshold")
    assert json.loads(orion("triage", "good.png", "--json", cwd=folder).stdout)[0] == plain


@pytest.mark.llama_cpp
@pytest.mark.slow
def test_variants_are_compared_and_the_grammar_always_parses(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    names = ["quantized", "constrained", "sampled", "sampled-constrained", "verdict-only"]
    command = ["evaluate", *run_command()[1:], "--variants", ",".join(names), "--json"]
    result = orion(*command, cwd=folder)
    assert result.returncode == 0, result.stderr
    compared = {row["variant"]: row for row in json.loads(result.stdout)}
    assert list(compared) == names
    assert [row["compared_with"] for row in compared.values()] == ["Q8_0", *["quantized"] * 4]
    conditions = {name: row["conditions"] for name, row in compared.items()}
    assert all(counts["count"] == 6 for rows in conditions.values() for counts in rows.values())
    for name in ("constrained", "sampled-constrained", "verdict-only"):
        assert [counts["parsed"] for counts in conditions[name].values()] == [6, 6, 6, 6]
    assert conditions["sampled"]["A"]["change"]["holm_p"] <= 1
    again = orion("evaluate", *run_command()[1:], "--variants", "sampled", "--json", "--force", cwd=folder)
    assert "evaluate sampled: done" in again.stderr
    assert json.loads(again.stdout) == [compared["sampled"]]  # a fixed seed
    shown = orion(*command[:-1], cwd=folder)
    assert re.search(r"┃ compared with ┃ change", shown.stdout), shown.stdout
    assert re.search(r"│ sampled +│ A .*│ quantized +│", shown.stdout), shown.stdout
    assert_refused(
        orion("evaluate", *run_command()[1:], "--variants", "F17", cwd=folder), "there is no variant 'F17'", "Q8_0"
    )


@pytest.mark.llama_cpp
@pytest.mark.slow
def test_a_llama_cpp_that_computes_otherwise_ends_in_a_verdict(finished: Path, tmp_path: Path) -> None:
    """Planted: a llama-server that divides by another norm than the model was trained with."""
    folder, other = tmp_path / "finished", tmp_path / "tools"
    shutil.copytree(finished, folder)
    other.mkdir()
    ours = find_toolchain()
    epsilon = "--override-kv lfm2.attention.layer_norm_rms_epsilon=float:0.5"
    for tool, more in (
        (ours.llama_quantize, ""),
        (ours.llama_server, f'[ "$1" = --version ] || set -- "$@" {epsilon}'),
    ):
        (other / tool.name).write_text(f'#!/bin/sh\n{more}\nexec "{tool}" "$@"\n')
        (other / tool.name).chmod(0o755)
    run = folder / "runs" / "small"
    shutil.rmtree(run / "evaluation" / "test" / "F16")
    result = orion(*run_command(), cwd=folder, ORION_LLAMA_CPP=str(other))
    assert result.returncode == 0, result.stderr
    assert "evaluate F16: failed. llama.cpp's next-token log-probabilities differ" in result.stderr
    assert re.search(r"^DO NOT FLY: .*llama\.cpp as transformers", result.stdout, re.MULTILINE), result.stdout
    results = json.loads((run / "results.json").read_text())
    rows = {row["name"]: row for row in results["verdict"]["criteria"]}
    assert rows["llama.cpp as transformers"]["measured"].endswith("nats apart")
    assert "F16" not in results["models"]
    assert "The gate at F16 failed" in (run / "report.md").read_text()
    alone = orion("evaluate", *run_command()[1:], "--variants", "F16", cwd=folder, ORION_LLAMA_CPP=str(other))
    assert_refused(alone, "0.01 is allowed")
    again = orion(*run_command(), cwd=folder)
    assert "evaluate F16: done" in again.stderr
    assert "llama.cpp as transformers" not in json.loads((run / "results.json").read_text())["verdict"]["because"]


@pytest.mark.llama_cpp
@pytest.mark.slow
def test_runs_are_compared_frame_by_frame(finished: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(finished / "runs" / "small", other)
    path = other / "evaluation" / "test" / "base" / "predictions.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    before = sum(row["category"] == row["truth"] for row in rows if row["condition"] == "B")
    for row in rows:
        row["category"] = row["truth"] if row["condition"] == "B" else row["category"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changed = orion("compare", "runs/small", other, cwd=finished)
    assert_refused(changed, f"{path} was changed", f"orion evaluate --variants base --run {other} --force")
    rewrite(path, rows)
    result = orion("compare", "runs/small", other, "--json", cwd=finished)
    assert result.returncode == 0, result.stderr
    models = json.loads(result.stdout)["against"][str(other)]
    assert models["base"]["B"]["right"] == [before, 6]
    assert (models["base"]["B"]["gained"], models["base"]["A"]["gained"]) == (6 - before, 0)
    assert list(models) == [
        "base",
        "adapter-4bit",
        "adapter-16bit",
        "fine-tuned",
        "F16",
        "Q8_0",
        "quantized",
        "constrained",
    ]
    assert json.loads(result.stdout)["accuracies"]["base"]["B"] == [before / 6, 1.0]
    shown = orion("compare", "runs/small", other, cwd=finished)
    assert "the same frames are correct" in shown.stdout
    assert "over 3 runs" not in shown.stdout
    assert "Accuracy over 3 runs" in orion("compare", "runs/small", other, other, cwd=finished).stdout
    assert_refused(orion("compare", "runs/small", other, "--file", "val", cwd=finished), "no model evaluated in both")
    assert_refused(orion("compare", "runs/small", cwd=finished), "at least two run folders", status=2)
    rewrite(path, [row | {"prompt_sha256": "0"} for row in rows])
    assert_refused(orion("compare", "runs/small", other, cwd=finished), "24 of 24 questions differ", "A/")


@pytest.mark.llama_cpp
@pytest.mark.slow
def test_triage_answers_good_frames_and_refuses_bad_ones_by_name(finished: Path, tmp_path: Path) -> None:
    structured_picture(1).save(tmp_path / "good.png")
    structured_picture(2).save(tmp_path / "good.jpg", quality=95)
    (tmp_path / "good.raw").write_bytes(structured_picture(3).tobytes())
    (tmp_path / "cut.raw").write_bytes(structured_picture(3).tobytes()[:-481])
    structured_picture(4).resize((640, 600)).save(tmp_path / "large.png")
    (tmp_path / "page.png").write_text("<html>")
    names = ["good.png", "cut.raw", "good.jpg", "page.png", "large.png", "missing.png", "good.raw"]
    result = orion("triage", *(tmp_path / name for name in names), "--json", cwd=finished)
    assert result.returncode == 1
    answers = json.loads(result.stdout)
    assert [Path(answer["file"]).name for answer in answers] == ["good.png", "good.jpg", "good.raw"]
    assert {key for answer in answers for key in answer} == {
        "file", "answer", "category", "model_category", "decided_by", "reason", "scores", "label_mass", "blank",
    }  # fmt: skip
    assert not any(answer["blank"] for answer in answers)
    refused = re.findall(r"refused: \S*/(\S+) ", result.stderr)
    assert refused == ["cut.raw", "page.png", "large.png", "missing.png"]
    assert "785,951 bytes, not the 786,432" in result.stderr
    shutil.copy(tmp_path / "large.png", finished)
    resized = orion("triage", "large.png", "--resize", cwd=finished)
    assert resized.returncode == 0, resized.stderr
    assert "large.png" in resized.stdout


@pytest.mark.llama_cpp
@pytest.mark.slow
def test_no_file_name_is_cut_on_a_narrow_terminal_or_in_a_file(finished: Path, tmp_path: Path) -> None:
    name = f"{'pass-0042-frame-' * 6}0007.png"
    structured_picture(1).save(tmp_path / name)
    into_a_file = orion("triage", tmp_path / name, cwd=finished)
    assert f" {tmp_path / name} " in into_a_file.stdout
    for columns in ("80", "40"):
        on_a_terminal = orion("triage", tmp_path / name, cwd=finished, COLUMNS=columns, FORCE_COLOR="1")
        lines = re.sub(r"\x1b\[[0-9;]*m", "", on_a_terminal.stdout).splitlines()
        assert max(map(len, lines)) <= int(columns)
        if columns == "80":  # rich cuts off what does not fit, without a sign
            assert {line[-1] for line in lines} <= set("┓┃┩│┘")
        cells = [line.split("│")[1].strip() for line in lines if line.startswith("│")]
        assert "".join(cells) == str(tmp_path / name)
    missing = orion("triage", "gone.png", cwd=finished)
    assert (missing.returncode, missing.stdout) == (1, "")
    assert "gone.png" in missing.stderr


@pytest.mark.llama_cpp
@pytest.mark.slow
@pytest.mark.shared
def test_triage_goes_through_the_real_frames(finished: Path) -> None:
    files = sorted(REAL_FRAMES.glob("*.png")) + sorted(REAL_FRAMES.glob("*.raw"))
    result = orion("triage", *files, "--json", cwd=finished)
    assert result.returncode == 1
    assert len(json.loads(result.stdout)) == 25
    assert re.findall(r"refused: \S*/(\S+) has 785,955 bytes", result.stderr) == [
        "UHF_r2_orion_medium_00006.truncated.raw"
    ]


@pytest.mark.llama_cpp
@pytest.mark.slow
def test_a_pair_of_two_runs_is_refused(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "mixed"
    shutil.copytree(finished / "runs" / "small", run)
    data = bytearray((run / "gguf" / "orion-mmproj-f16.gguf").read_bytes())
    data[-1] ^= 1
    (run / "gguf" / "orion-mmproj-f16.gguf").write_bytes(data)
    structured_picture(1).save(tmp_path / "good.png")
    result = orion("triage", tmp_path / "good.png", "--run", run, cwd=tmp_path)
    assert_refused(result, "orion-mmproj-f16.gguf is not the file of this conversion")


@pytest.mark.llama_cpp
@pytest.mark.slow
def test_someone_elses_server_is_evaluated(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "copy")
    folder = tmp_path / "copy"
    gguf = folder / "runs" / "small" / "gguf"
    tools = find_toolchain()
    own = (folder / "runs" / "small" / "evaluation" / "test" / "quantized" / "predictions.jsonl").read_text()
    with Server(tools, gguf / quantize.QUANTIZED, gguf / quantize.MMPROJ, log=tmp_path / "log") as server:
        command = ["evaluate", "--run", "runs/small", *run_command()[3:], "--quantized-model", server.client.base_url]
        wrong_key = orion(*command, cwd=folder, LLAMA_API_KEY="wrong")
        assert_refused(wrong_key, "refused the key (401)", "LLAMA_API_KEY")
        key = str(server.client._http.headers["Authorization"]).removeprefix("Bearer ")
        result = orion(*command, cwd=folder, LLAMA_API_KEY=key)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("correct") == 4
    answered = folder / "runs" / "small" / "evaluation" / "test"
    assert (answered / "quantized" / "predictions.jsonl").read_text() == own  # the run's own stay beside
    again = (answered / "server" / "predictions.jsonl").read_text()
    answers = [[json.loads(line)["answer"] for line in text.splitlines()] for text in (own, again)]
    assert answers[0] == answers[1]
    gone = orion(*command[:-1], "http://127.0.0.1:1", cwd=folder)
    assert_refused(gone, "no server answers at http://127.0.0.1:1")
