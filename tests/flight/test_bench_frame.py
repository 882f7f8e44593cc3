"""bench_frame.py: what a frame costs, and that an accuracy stands only beside what was evaluated."""

import hashlib
import json
import os
import re
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from gguf import GGUFReader
from PIL import Image

from orion_triage import pipeline
from orion_triage.dataset.records import image_path, read_split, write_split
from orion_triage.errors import OrionError, ServerError
from orion_triage.evaluate.results import seconds_per_frame
from orion_triage.evaluate.run import read_predictions
from orion_triage.evaluate.variants import VERDICT_ONLY, chosen
from orion_triage.export import quantize
from orion_triage.export.convert import convert
from orion_triage.flight import bench_frame, bundle, triage, tune
from orion_triage.flight.bench_frame import Row, Setup, changed, encode_seconds, mark_best, parse_list, plan
from orion_triage.imagery.frames import Frame, read_frame, shrink
from orion_triage.llama_cpp.server import Server
from orion_triage.llama_cpp.toolchain import find_toolchain
from orion_triage.mission.prompt import user_text
from orion_triage.models import lfm2_vl
from orion_triage.runs import manifest
from orion_triage.runs.run import Run, open_run, prepare
from orion_triage.settings import FIRST_LOOK_SIZES, load_settings
from tests.conftest import MISSION, orion, structured_picture


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Run:
    """A copy of the finished run, served by one thread: two wait for each other when the machine is busy."""
    shutil.copytree(finished / "runs" / "small", tmp_path / "small")
    settings = json.loads((tmp_path / "small" / "settings.json").read_text())
    settings["evaluate"]["threads"] = 1
    (tmp_path / "small" / "settings.json").write_text(json.dumps(settings))
    return open_run(tmp_path / "small")


def by_change(measured: dict) -> dict[str, dict]:
    return {row["change"]: row for row in measured["rows"]}


@pytest.mark.llama_cpp
@pytest.mark.slow
def test_each_row_is_one_change_and_has_an_accuracy_where_that_was_evaluated(run: Run, warm_python: None) -> None:
    pipeline.run_stage(pipeline.stage_named("evaluate verdict-only", run.settings), run)
    answers = read_predictions(run.evaluation(VERDICT_ONLY), MISSION)
    assert {row["reason"] for row in answers} == {""}
    assert {row["category"] for row in answers} <= {"HIGH", "MEDIUM", "LOW"}
    assert all(max(row["scores"], key=row["scores"].get) == row["category"] for row in answers)

    measured = bench_frame.run([run], sizes=[384], reason_tokens=[20], repeats=1)
    rows = by_change(measured)
    assert list(rows) == [
        "flight configuration", "verdict-only", "reason of 20 tokens", "mmproj Q8_0", "384 px", "384 px, mmproj Q8_0",
        "Q8_0", "flash attention",
    ]  # fmt: skip
    evaluations = {change: row["evaluation"] for change, row in rows.items() if row["evaluation"]}
    assert evaluations == {"flight configuration": "constrained", "verdict-only": VERDICT_ONLY, "Q8_0": "Q8_0"}
    for change, model in evaluations.items():
        metrics = json.loads((run.evaluation(model) / "metrics.json").read_text())
        assert rows[change]["right"] == {condition: metrics[condition]["right"] for condition in "AB"}
    assert rows["384 px"]["prompt_tokens"] - rows["flight configuration"]["prompt_tokens"] == 12 * 12 - 8 * 8
    flown, without = rows["flight configuration"], rows["verdict-only"]
    assert (without["answer_tokens"], without["reason_tokens"]) == (1, 0)
    assert rows["reason of 20 tokens"]["reason_tokens"] == 20
    assert {rows[change]["answer_tokens"] for change in ("384 px", "Q8_0")} == {flown["answer_tokens"]}
    assert without["prompt_tokens"] > flown["prompt_tokens"]  # what the answer begins with is read, not written
    for row in measured["rows"]:
        parts = [row[f"{part}_seconds"] for part in ("encode", "prefill", "decode")]
        assert sum(parts) == pytest.approx(row["seconds_per_frame"], abs=0.001)
        assert min(parts[:2]) > 0.001
        assert row["peak_memory_bytes"] > 20e6
    assert measured["left_out"] == []
    assert measured["same_frames"]
    seconds = measured["in_flight_seconds_per_frame"][str(run.folder)]
    assert measured["in_flight_cost"][str(run.folder)]["frames_per_eclipse"] == (2100 / seconds, 2100 / seconds)
    assert not list(run.folder.glob(".bench-*"))


@pytest.mark.llama_cpp
@pytest.mark.slow
def test_what_a_cleaned_run_lacks_is_said_and_the_rest_measured(run: Run) -> None:
    pipeline.clean(run)
    folder = run.evaluation("constrained")
    stage_manifest = json.loads((folder / manifest.FILE_NAME).read_text())
    stage_manifest["inputs"]["gguf"] = "another pair's"
    (folder / manifest.FILE_NAME).write_text(json.dumps(stage_manifest))
    measured = bench_frame.run([run], sizes=[256], quantizations=["Q8_0"], reason_tokens=[], repeats=1)
    rows = by_change(measured)
    assert list(rows) == ["flight configuration", "verdict-only", "flash attention"]
    assert rows["flight configuration"]["evaluation"] == "quantized"  # the other of this pair
    assert [note.partition(": ")[2] for note in measured["left_out"]] == [
        "mmproj Q8_0: orion_merged has no weights (removed by 'orion clean'?). Run 'orion fuse --force' to make them "
        "again.",
        "Q8_0: orion-f16.gguf does not exist (removed by 'orion clean'?). Run 'orion quantize --force' to make it "
        "again.",
    ]


@pytest.mark.llama_cpp
@pytest.mark.slow
def test_a_type_that_cannot_be_made_costs_no_other_row(run: Run) -> None:
    """IQ1_S needs an importance matrix; there is no Q9_Z."""
    measured = bench_frame.run(
        [run], sizes=[288], mmprojs=["F16"], quantizations=["IQ1_S", "Q9_Z"], reason_tokens=[], repeats=1
    )
    rows = by_change(measured)
    assert list(rows) == ["flight configuration", "verdict-only", "288 px", "flash attention"]
    assert rows["288 px"]["prompt_tokens"] - rows["flight configuration"]["prompt_tokens"] == 9 * 9 - 8 * 8
    notes = [note.partition(": ")[2] for note in measured["left_out"]]
    assert [note.partition(": llama-quantize failed (exit status 1): ")[0] for note in notes] == ["IQ1_S", "Q9_Z"]


@pytest.mark.llama_cpp
@pytest.mark.slow
def test_the_table_fits_a_terminal_and_json_is_alone_on_standard_output(run: Run) -> None:
    own, few = ("--sizes", "256", "--reasons", ""), ("--mmproj", "F16", "--quants", "Q4_K_M", "--repeats", "1")
    shown = orion("bench-frame", "--run", run.folder, *own, *few, COLUMNS="80")
    assert shown.returncode == 0, shown.stderr
    assert re.search(r"│ flight configuration .*│ +\d/6 │ +\d/6 \* │", shown.stdout)
    assert max(len(line) for line in shown.stdout.splitlines() if line[:1] in "┏│└") <= 80
    assert "Run 'orion evaluate --variants verdict-only'." in shown.stderr
    assert re.search(r"[0-9,]+ frames in an eclipse of 35 minutes", shown.stdout)
    printed = orion("bench-frame", run.folder, *few, "--json")
    assert printed.returncode == 0, printed.stderr
    assert list(by_change(json.loads(printed.stdout))) == [
        "flight configuration", "verdict-only", "reason of 20 tokens", "reason of 40 tokens", "512 px", "384 px",
        "flash attention",
    ]  # fmt: skip


@pytest.mark.llama_cpp
@pytest.mark.slow
def test_a_run_trains_and_flies_at_another_size(small_dataset: Path, tmp_path: Path, warm_python: None) -> None:
    sets = ["base.frame_size=384", "fine_tune.epochs=1", "fuse.check_records=3", "evaluate.threads=1"]
    run = Run(tmp_path / "run", load_settings("tiny", sets))
    prepare(run)
    shutil.copytree(small_dataset, run.dataset)
    for split, count in (("train", 6), ("val", 3), ("test", 3)):  # a place of each category
        write_split(run.dataset, split, read_split(run.dataset, split, MISSION)[:count])
    for stage in ("fine-tune", "fuse", "quantize", "evaluate quantized"):
        pipeline.run_stage(pipeline.stage_named(stage, run.settings), run)
    record = read_split(run.dataset, "test", MISSION)[0]
    frame = read_frame(image_path(run.dataset, record), 384)
    asked = [row for row in read_predictions(run.evaluation("quantized"), MISSION) if row["name"] == record.name]
    seen = {row["condition"]: row["pixels_sha256"] for row in asked}
    assert seen["A"] == seen["B"] == hashlib.sha256(frame.image.tobytes()).hexdigest()
    pipeline.run_stage(pipeline.stage_named("evaluate first-look", run.settings), run)
    smaller = read_frame(image_path(run.dataset, record), 256)
    first = [row for row in read_predictions(run.evaluation("first-look"), MISSION) if row["name"] == record.name]
    seen = {row["condition"]: row["pixels_sha256"] for row in first}
    assert seen["B"] == hashlib.sha256(smaller.image.tobytes()).hexdigest()
    assert {row["reason"] for row in first} == {""}
    with pytest.raises(OrionError, match=r"first look at 256 px is not smaller than the model's frames of 256 px"):
        chosen(load_settings("tiny"), ["first-look"])
    assert "first-look" not in [variant.name for variant in chosen(load_settings("tiny"), ["all"])]
    with pytest.raises(OrionError, match=r"was trained on frames of 384 px; base\.frame_size is 256"):
        pipeline.run_stage(pipeline.FUSE, replace(run, settings=load_settings("tiny", sets[1:])))
    made = bundle.run(run, tmp_path / "bundle", accepted_risk="three test frames")
    assert made["frame_size"] == 384
    assert made["seconds_per_frame_at_most"] == bundle.time_out_of(made["seconds_per_frame"])
    with Image.open(tmp_path / "bundle" / made["golden"][0]["image"]) as golden:
        assert golden.size == (512, 512)
    assert seconds_per_frame(run) is None
    measured = bench_frame.run([run], quantizations=["Q4_K_M"], mmprojs=["F16"], sizes=[384], repeats=1)
    kept = seconds_per_frame(run)
    assert kept is not None
    assert kept["seconds_per_frame"] == measured["in_flight_seconds_per_frame"][str(run.folder)]
    (row, *_) = measured["rows"]
    assert (row["frame_size"], row["prompt_tokens"], row["evaluation"]) == (
        384,
        made["request"]["prompt_tokens"],
        "quantized",
    )
    outcomes = list(triage.triage_with_pair([image_path(run.dataset, record)], triage.of_run(run)))
    assert outcomes[0].verdict is not None


@pytest.mark.llama_cpp
def test_an_image_out_of_the_cache_is_not_taken_for_an_encoded_one(finished: Path, tmp_path: Path) -> None:
    gguf, log = finished / "runs" / "small" / "gguf", tmp_path / "server.log"
    image = shrink(structured_picture(1), 256)
    png, text = Frame(image, image.size).png(), user_text(MISSION, None)
    options = bench_frame._options(bench_frame.Setup(256, "Q4_K_M"))
    tools = find_toolchain()
    with Server(
        tools,
        gguf / quantize.QUANTIZED,
        gguf / quantize.MMPROJ,
        log=log,
        turn=lfm2_vl.TURN,
        threads=1,
        options=options,
    ) as server:
        server.client.completion(text, png, 1, cache_prompt=True)
        assert 0.001 < encode_seconds(log, 0) < 60
        logged = log.stat().st_size
        server.client.completion(text, png, 1, cache_prompt=True)
        with pytest.raises(ServerError, match="encoded 0 images instead of one"):
            encode_seconds(log, logged)
        assert server.peak_memory_bytes() > 20e6


@pytest.mark.llama_cpp
def test_a_vision_tower_is_converted_to_eight_bits(finished: Path, tmp_path: Path, warm_python: None) -> None:
    run, path = finished / "runs" / "small", tmp_path / "q8_0.gguf"
    convert(find_toolchain(), run / "orion_merged", path, mmproj=True, outtype="q8_0")
    for file, expected in ((run / "gguf" / quantize.MMPROJ, "F16"), (path, "Q8_0")):
        (kind,) = {t.tensor_type.name for t in GGUFReader(file).tensors if "attn_q.weight" in t.name}
        assert kind == expected


def test_the_encoder_is_timed_by_the_stamps_of_one_image(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    began = "0.59.900.000 I slot process_mtmd: id  0 | task 8 | encoding mtmd batch from idx = 7, n_chunks = 1\n"
    ended = "1.01.150.500 I decoding image batch 1/1, n_tokens_batch = 64\n"
    log.write_text("older\n" + began + ended)
    assert encode_seconds(log, 6) == pytest.approx(1.2505)
    log.write_text(began + ended + began + ended)
    with pytest.raises(ServerError, match="encoded 2 images"):
        encode_seconds(log, 0)


ROW = Row(
    run="r", change="x", frame_size=256, quantization="Q4_K_M", mmproj="F16", flash_attention=False, reason_tokens=0,
    prompt_tokens=1, tokens_read=1, answer_tokens=1, encode_seconds=0, prefill_seconds=0, decode_seconds=0,
    seconds_per_frame=1,
    decode_seconds_per_token=None, peak_memory_bytes=1,
)  # fmt: skip


def test_the_best_are_beaten_by_none_and_what_was_not_evaluated_takes_no_part() -> None:
    def row(seconds: float, right: int | None) -> Row:
        counts = {"A": 0, "B": 10}
        evaluated = {} if right is None else {"right": {"A": 0, "B": right}, "count": counts}
        return replace(ROW, seconds_per_frame=seconds, **evaluated)

    rows = [row(3, 9), row(2, 8), row(2.5, 8), row(1, 5), row(0.1, None), row(4, 9), row(2, 7)]
    assert [row.best for row in mark_best(rows)] == [True, True, False, True, False, False, False]


def test_cores_that_others_keep_busy_are_counted() -> None:
    idle = tune.busy_cores(0.3)
    measured = threading.Event()
    thread = threading.Thread(target=lambda: [hashlib.sha256(bytes(1 << 20)) for _ in iter(measured.is_set, True)])
    thread.start()
    busy = tune.busy_cores(1.0)
    measured.set()
    thread.join()
    assert 0 <= idle <= os.cpu_count()
    assert 0.4 < busy <= os.cpu_count() + 0.1


def test_what_flies_comes_first_and_each_setup_once() -> None:
    run = Run(Path("r"), load_settings("tiny"))
    setups = plan(run, (512, 256), ("F16", "Q8_0"), ("Q8_0", "Q4_K_M"))
    flown = Setup(256, "Q4_K_M")
    assert setups[0] == flown
    assert [changed(flown, setup) for setup in setups] == [
        "flight configuration", "mmproj Q8_0", "512 px", "512 px, mmproj Q8_0", "Q8_0", "flash attention",
    ]  # fmt: skip
    assert plan(run, (), (), ()) == [flown, replace(flown, flash_attention=True)]


@pytest.mark.parametrize(
    ("text", "what", "message"),
    [
        ("512,300", "input size", "'300' is not a valid input size"),
        ("Q4_0", "mmproj", "'Q4_0' is not a valid mmproj"),
        ("q8", "quantization", "'q8' is not a valid quantization"),
        ("0", "length", "'0' is not a valid length"),
    ],
)
def test_what_cannot_be_measured_is_refused(text: str, what: str, message: str) -> None:
    with pytest.raises(OrionError, match=message):
        parse_list(text, what)
    assert parse_list("", what) == []
    assert parse_list("Q8_0, F16", "mmproj") == ["Q8_0", "F16"]
    every_first_look = ",".join(map(str, FIRST_LOOK_SIZES))  # whatever a first look can be, its seconds are measured
    assert len(parse_list(every_first_look, "input size")) == len(FIRST_LOOK_SIZES) == 12
