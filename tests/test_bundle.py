"""bundle.py and check_flight.py: what flies, and whether a machine computes it, with real servers and broken ones."""

import ast
import io
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from orion_triage.dataset.labelled import Labelled
from orion_triage.errors import OrionError
from orion_triage.evaluate import adapt, head, threshold
from orion_triage.export import quantize
from orion_triage.flight import bundle, check_flight, decide_frame, golden_frames
from orion_triage.flight.triage import of_bundle
from orion_triage.imagery.frames import appearance, is_blank, shrink
from orion_triage.llama_cpp.client import Client
from orion_triage.llama_cpp.server import Server
from orion_triage.llama_cpp.toolchain import WHEEL_SHA256, Toolchain, find_toolchain
from orion_triage.llama_cpp.tools import quantize_file
from orion_triage.mission.answer import Answer
from orion_triage.mission.decide import Rules, as_steps, decide
from orion_triage.mission.prompt import render_prompt, user_text
from orion_triage.mission.verdict import (
    CATEGORY_CUE,
    Verdict,
    answer_tokens,
    category_grammar,
    grammar,
    grammars,
    parse_verdict,
)
from orion_triage.models import lfm2_vl
from orion_triage.models.load import TINY_BASE_FOLDER
from orion_triage.pipeline import run_stage, stage_named
from orion_triage.runs.run import Run, prepare
from orion_triage.safe.files import sha256_of_file
from orion_triage.settings import load_settings
from tests.conftest import MISSION, orion, structured_picture

Check = Callable[..., subprocess.CompletedProcess[str]]
LABELS = {"HIGH": 10, "MEDIUM": 11, "LOW": 12}  # of the stub


def check(folder: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """The bundle's own checker in an isolated interpreter: no site-packages, no environment, another directory."""
    command = [sys.executable, "-I", "-S", str(folder / "check_flight.py"), *map(str, arguments)]
    # One thread: llama.cpp's wait for each other actively, which is slow beside other work; the numbers are the same.
    environment = {"PATH": os.environ["PATH"], "ORION_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/", timeout=600, check=False)


def checked(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The same checker in this process: what takes longest of a check of a stub is an interpreter's start."""
    out, err = io.StringIO(), io.StringIO()
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    words = ["--bundle", str(folder), *map(str, arguments)]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            status = check_flight.main(words)
    except SystemExit as end:
        status = int(end.code or 0)
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())


def assert_no_go(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode == 1, result.stdout + result.stderr
    assert result.stderr == ""
    last = result.stdout.rstrip("\n").splitlines()[-1]
    assert last.startswith("NO-GO: ")
    for word in words:
        assert word in last


def sign(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change bundle.json as if it had been made so."""
    path = folder / "bundle.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    (folder / "bundle.json.sha256").write_text(f"{sha256_of_file(path)}  bundle.json\n")


# --- a small run: the shipped base itself, quantized and evaluated on six frames -------------------------------


RISK = "rehearsal: the base is not fine-tuned"


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory, small_dataset: Path, tiny_pair: Path) -> Run:
    def take(run: Run, progress: object) -> dict[str, Any]:
        shutil.copytree(tiny_pair, run.gguf)
        return {}

    run = Run(tmp_path_factory.mktemp("bundle") / "run", load_settings("tiny", ["evaluate.threads=1"]))
    prepare(run)
    shutil.copytree(small_dataset, run.dataset)
    shutil.copytree(TINY_BASE_FOLDER, run.merged)
    # The files of this conversion are there already.
    run_stage(replace(stage_named("quantize", run.settings), run=take), run)
    run_stage(stage_named("evaluate quantized", run.settings), run)
    return run


@pytest.fixture(scope="session")
def made(small_run: Run) -> Path:
    out = small_run.folder.parent / "bundle"
    with pytest.raises(
        OrionError, match=r"is DO NOT FLY: .*several answers"
    ):  # the base gives one answer to everything
        bundle.run(small_run, out)
    assert not out.exists()
    bundle.run(small_run, out, accepted_risk=RISK, time_out=60)
    return out


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    """A copy of the bundle under a name that a shell could stumble over."""
    return shutil.copytree(made, tmp_path / "my $bundle")


@pytest.fixture(scope="session")
def toolchain() -> Toolchain:
    return find_toolchain()


@pytest.fixture(scope="session")
def running(toolchain: Toolchain, made: Path) -> Iterator[Client]:
    log = made.parent / "server.log"
    pair = (made / quantize.QUANTIZED, made / quantize.MMPROJ)
    with Server(toolchain, *pair, log=log, turn=lfm2_vl.TURN, threads=1) as server:
        yield server.client


def key_of(client: Client) -> str:
    return str(client._http.headers["Authorization"]).removeprefix("Bearer ")


@pytest.mark.llama_cpp
def test_a_bundle_has_all_that_flies_and_says_what_it_is(made: Path, small_run: Run) -> None:
    record = json.loads((made / "bundle.json").read_text())
    files = {path.relative_to(made).as_posix() for path in made.rglob("*") if path.is_file()}
    golden = [image["image"] for image in record["golden"]]
    assert files == {
        quantize.QUANTIZED, quantize.MMPROJ, quantize.PAIR, "LICENSE", "README.txt", "bundle.json",
        "bundle.json.sha256", "check_flight.py", "decide_frame.py", "ask_frame.py", "triage_on_board.py", "serve.sh",
        "server_flags.py", "tune.py",
        "prompt.txt", "grammar.gbnf", "category_grammar.gbnf", *golden,
    }  # fmt: skip
    assert record["files"] == {
        name: sha256_of_file(made / name) for name in sorted(files - {"bundle.json", "bundle.json.sha256"})
    }
    assert (made / "prompt.txt").read_text() == render_prompt(MISSION, None)
    assert (made / "grammar.gbnf").read_text() == grammar(MISSION)
    assert (made / "category_grammar.gbnf").read_text() == category_grammar(MISSION)
    assert (record["frame_size"], record["preset"], record["llama_cpp_build"]) == (256, "tiny", 10605)
    assert golden[5:] == ["golden/6-blank.png"]
    for name in golden:
        with Image.open(made / name) as picture:
            assert (picture.format, picture.size, picture.mode) == ("PNG", (512, 512), "RGB")
            assert decide_frame.pixels_of((made / name).read_bytes()) == picture.tobytes()
            assert is_blank(picture) == (name == "golden/6-blank.png")
    *asked, blank = record["golden"]
    assert blank["decision"] == {"category": "LOW", "decided_by": "blank rule"}
    for image in asked:
        assert image["decision"] == {"category": "LOW", "decided_by": "model"}
        verdict = parse_verdict(MISSION, image["answer"])
        assert verdict is not None
        assert verdict.category == image["category"]
        values = [image["log_probabilities"][category] for category in MISSION.names]
        scores = Answer.scored("", values).scores
        assert scores is not None
        assert [image["scores"][category] for category in MISSION.names] == pytest.approx(scores, abs=1e-5)
    # The shipped base is not fine-tuned: it calls every such frame LOW, of which two of the six are.
    assert {image["category"] for image in asked} == {"LOW"}
    # Answers that no rounding can change come first, and of each kind the right ones. Which are stable depends on the
    # processor: margins here are 0.14 to 0.48 nats, and 0.2 is the limit.
    order = [
        (
            golden_frames.margin_nats(MISSION, Rules(), image["scores"], {}) > golden_frames.STABLE_NATS,
            image["truth"] == "LOW",
        )
        for image in asked
    ]
    assert order == sorted(order, reverse=True)
    assert "No golden frame has the answer HIGH or MEDIUM" in record["notes"][0]
    wrong = ", ".join(image["image"] for image in asked if image["truth"] != "LOW")
    assert f"The answers to {wrong} are wrong" in record["notes"][1]
    assert record["notes"][2].startswith("0 hard golden frames instead of 3")
    assert record["tolerances"]["other_words"] == 2
    assert record["seconds_per_frame_at_most"] == 60
    readme = (made / "README.txt").read_text()
    assert "A slower computer: a frame has 60 s" in readme
    assert "build 10605" in readme
    assert WHEEL_SHA256 in readme
    assert "No threshold was chosen" in readme
    assert record["verdict"]["verdict"] == "DO NOT FLY"
    assert "The ground's verdict on this model: DO NOT FLY (" in readme
    assert f"Risk accepted by the ground: {RISK}\n" in readme


@pytest.mark.llama_cpp
def test_a_run_bundled_again_differs_in_its_operating_point_only(made: Path, small_run: Run, tmp_path: Path) -> None:
    promise = {"largest_loss": 0.05, "confidence": 0.95, "upper_bound": 0.0495, "frames": 300, "places": 59}
    ranges = {"dark": [0, 255], "gradient": [0.0, 300.0]}
    point = {
        "drop_threshold": 0.25, "temperature": 1.5, "promise": promise, "appearance": ranges,
        "pair_sha256": sha256_of_file(small_run.gguf / quantize.PAIR),
    }  # fmt: skip
    path, again = small_run.folder / threshold.FILE_NAME, tmp_path / "again"
    path.write_text(json.dumps(point))
    try:
        record = bundle.run(small_run, again, accepted_risk=RISK, time_out=60)
        path.write_text(json.dumps({**point, "pair_sha256": "another"}))
        with pytest.raises(OrionError, match="chosen for another GGUF pair"):
            bundle.run(small_run, again, accepted_risk=RISK)
    finally:
        path.unlink()
    one, two = (json.loads((folder / "bundle.json").read_text()) for folder in (made, again))
    assert record["golden"] == two["golden"]  # the refused bundle has not replaced it
    assert (one.pop("temperature"), two.pop("temperature")) == (None, 1.5)
    assert (one.pop("promise"), two.pop("promise")) == (None, promise)
    without, with_threshold = one.pop("decision"), two.pop("decision")
    unlike, step = [step for step in with_threshold if step not in without]
    assert unlike == {
        "step": "unlike training", "rows": [16, 479], "ranges": ranges, "dropped": ["LOW"], "instead": ["MEDIUM"],
    }  # fmt: skip
    assert step == {
        "step": "threshold", "drop_probability_at_least": 0.25, "dropped": ["LOW"], "kept": ["HIGH", "MEDIUM"]
    }  # fmt: skip
    decided = [[image.pop("decision") for image in record["golden"][:-1]] for record in (one, two)]
    assert {image["decided_by"] for image in decided[0]} == {"model"}
    assert {image["decided_by"] for image in decided[1]} == {"threshold 0.250"}
    first, second = ((folder / "README.txt").read_text().splitlines() for folder in (made, again))
    *calibrated, kept, decision, unscored = [line for line in second if line not in first]
    assert "unlike all frames that the model was made from. If the next steps would drop it, it is MEDIUM" in kept
    assert "the scores to the power of 1 / 1.5000" in calibrated[0]
    assert [line.strip() for line in calibrated[1:]] == [
        "The decision takes the scores without it.",
        "Promise of the threshold, with 95 % confidence, for frames like those of val: at most 5.0 % of the",
        "HIGH and MEDIUM frames are dropped (from 300 frames of 59 places).",
    ]
    assert "LOW if the score of LOW is at least 0.25" in decision
    assert unscored.strip() == "- Without scores: use the category in the answer."
    for record in (one, two):
        del record["files"]["README.txt"]
    assert one == two  # hashes of all other files among it


@pytest.mark.llama_cpp
def test_two_bundles_of_one_run_are_equal_to_the_byte(made: Path, small_run: Run, tmp_path: Path) -> None:
    record = bundle.run(small_run, tmp_path / "again", accepted_risk=RISK, time_out=60)
    assert len(record["seconds_per_frame"]) == 5
    one, two = (
        {p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in (made, tmp_path / "again")
    )
    assert one == two


@pytest.mark.llama_cpp
def test_a_half_made_bundle_is_never_left(
    small_run: Run, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("all of it")
    with pytest.raises(OrionError, match="exists and is not a bundle"):
        bundle.run(small_run, mine, accepted_risk=RISK)
    run = Run(shutil.copytree(small_run.folder, tmp_path / "run"), small_run.settings)
    data = bytearray((run.gguf / quantize.MMPROJ).read_bytes())
    data[1000] ^= 1
    (run.gguf / quantize.MMPROJ).write_bytes(data)
    with pytest.raises(OrionError, match="is not the file of this conversion"):
        bundle.run(run, tmp_path / "out", accepted_risk=RISK)
    shutil.copyfile(small_run.gguf / quantize.MMPROJ, run.gguf / quantize.MMPROJ)
    (run.gguf / quantize.PAIR).write_text((run.gguf / quantize.PAIR).read_text() + "\n")
    with pytest.raises(OrionError, match="evaluation of another pair"):
        bundle.run(run, tmp_path / "out", accepted_risk=RISK)
    shutil.copyfile(small_run.gguf / quantize.PAIR, run.gguf / quantize.PAIR)
    shutil.rmtree(run.dataset / "orion_dataset")
    kept = shutil.copytree(made, tmp_path / "kept")
    with pytest.raises(OrionError, match="does not exist"):
        bundle.run(run, kept, accepted_risk=RISK)  # after the server has started
    assert check_flight.read_bundle(kept)
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "run", "kept"}
    assert (mine / "thesis.txt").read_text() == "all of it"


@pytest.mark.parametrize("size", [256, 384, 512])
def test_a_head_looks_at_the_same_quarters_in_flight(size: int) -> None:
    noise = np.random.default_rng(size).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    of_ground = [part.tobytes() for part in head.quarters(Image.fromarray(noise), size)]
    assert decide_frame.quarters(noise.tobytes(), size) == of_ground


@pytest.mark.parametrize("size", [256, 384, 512])
def test_the_flight_client_shrinks_as_the_ground_does(size: int) -> None:
    noise = np.random.default_rng(size).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    assert decide_frame.shrink(picture.tobytes(), size) == shrink(picture, size).tobytes()
    with Image.open(io.BytesIO(decide_frame.png(shrink(picture, size).tobytes(), size))) as read:
        assert read.tobytes() == shrink(picture, size).tobytes()


def test_the_flight_client_calls_blank_what_the_ground_does() -> None:
    ramp = np.linspace(90, 90 + 14, 512 * 512 * 3).reshape(512, 512, 3)  # entropy just below 4 bits
    frames = {
        "white": np.full((512, 512, 3), 250.0),
        "ramp": ramp,
        "wider": 90 + (ramp - 90) * 1.5,
        "grain": ramp + np.random.default_rng(1).integers(0, 2, ramp.shape),
        "scene": np.asarray(structured_picture(3), dtype=np.float64),
    }
    pictures = {name: Image.fromarray(values.astype(np.uint8)) for name, values in frames.items()}
    for name, picture in pictures.items():
        assert b"".join(decide_frame.grey(picture.tobytes())) == picture.convert("L").tobytes(), name
    of_ground = {name: is_blank(picture) for name, picture in pictures.items()}
    rule = as_steps(MISSION, Rules(), bundle.BLANK_LIMITS)[0]
    measures = {name: decide_frame.appearance(picture.tobytes(), rule["rows"]) for name, picture in pictures.items()}
    assert measures == {name: appearance(picture) for name, picture in pictures.items()}
    assert {name: decide_frame.is_blank(measures[name], rule) for name in pictures} == of_ground
    assert (of_ground["ramp"], of_ground["wider"], of_ground["scene"]) == (True, False, False)


@pytest.mark.parametrize("threshold", [None, 0.0, 0.3, 0.5, 2.0])
def test_the_flight_client_decides_as_the_ground_does(threshold: float | None) -> None:
    scores = [(0.3, 0.3, 0.4), (0.1, 0.3, 0.6), (0.2, 0.39, 0.41), (0.0, 0.0, 1.0), (0.5, 0.2, 0.3), None]
    for said in ("HIGH", "MEDIUM", "LOW", None):
        for one in scores:
            named = dict(zip(("HIGH", "MEDIUM", "LOW"), one, strict=True)) if one else None
            expected = decide(MISSION, said if said else None, one, blank=False, rules=Rules(threshold))
            category, by = decide_frame.decide(as_steps(MISSION, Rules(threshold), {}), said, named)
            assert (category, by.split()[0]) == (expected.category, expected.by.split()[0])


@pytest.mark.llama_cpp
def test_the_flight_client_answers_as_the_ground_does(
    small_run: Run, copied: Path, running: Client, tmp_path: Path
) -> None:
    frame, before = structured_picture(1234), {path.name for path in copied.iterdir()}
    (tmp_path / "a.raw").write_bytes(frame.tobytes())
    (tmp_path / "white.raw").write_bytes(bytes([250]) * (512 * 512 * 3))
    ground = json.loads(orion("triage", "a.raw", "white.raw", "--bundle", copied, "--json", cwd=tmp_path).stdout)
    told = subprocess.run(
        [sys.executable, "-I", "-S", copied / "ask_frame.py", "a.raw", "white.raw", "--url", running.base_url],
        capture_output=True, text=True, cwd=tmp_path, check=False, env={"LLAMA_API_KEY": key_of(running)},
    )  # fmt: skip
    assert (told.returncode, told.stderr) == (0, "")
    flown = [json.loads(line) for line in told.stdout.splitlines()]
    assert flown[1]["decided_by"] == ground[1]["decided_by"] == "blank rule"
    for key in ("answer", "category", "decided_by", "model_category", "reason", "blank"):
        assert flown[0][key] == ground[0][key], key
    assert flown[0]["scores"] == pytest.approx(ground[0]["scores"], abs=1e-6)
    (tmp_path / "a.raw").write_bytes(b"short")
    told = subprocess.run(
        [sys.executable, copied / "ask_frame.py", "a.raw", "--url", running.base_url],
        capture_output=True, text=True, cwd=tmp_path, check=False, env={"LLAMA_API_KEY": key_of(running)},
    )  # fmt: skip
    said = "the frame has 5 bytes, not 786432 (512x512x3). Give it raw RGB: PNG and JPEG are not read here."
    assert (told.returncode, told.stderr) == (1, f"error: a.raw: {said}\n")
    refused = json.loads(told.stdout)
    assert (refused["category"], refused["decided_by"], refused["action"]) == (None, "no answer", "store")
    assert refused["error"] == said
    assert {path.name for path in copied.iterdir()} == before


@pytest.mark.llama_cpp
def test_a_bundle_triages_as_its_run_does(small_run: Run, copied: Path, tmp_path: Path) -> None:
    frame = next((small_run.dataset / "orion_dataset" / "images").glob("*.png"))
    results = [
        orion("triage", frame, where, folder, "--json", cwd=tmp_path)
        for where, folder in (("--run", small_run.folder), ("--bundle", copied))
    ]
    assert [result.returncode for result in results] == [0, 0], results[1].stderr
    of_run, of_bundle = (json.loads(result.stdout)[0] for result in results)
    assert of_run == of_bundle
    assert (of_bundle["category"], of_bundle["decided_by"]) == ("LOW", "model")
    assert f"triage with bundle {copied} (no threshold)" in results[1].stderr
    (copied / "prompt.txt").write_text("What is this?")
    refused = orion("triage", frame, "--bundle", copied, cwd=tmp_path)
    assert refused.returncode == 1
    assert "prompt.txt was changed" in refused.stderr


def _row(name: str, truth: str, category: str | None, *scores: float) -> dict[str, Any]:
    named = dict(zip(MISSION.names, scores, strict=True)) if scores else None
    return {"name": name, "truth": truth, "category": category, "scores": named}


def test_golden_images_take_the_categories_in_turn_clearest_first() -> None:
    rows = [
        _row("h1", "HIGH", "HIGH", 0.6, 0.2, 0.2),
        _row("h2", "HIGH", "HIGH", 0.9, 0.1, 0.0),
        _row("h3", "HIGH", "HIGH", 0.7, 0.2, 0.1),
        _row("m1", "MEDIUM", "MEDIUM", 0.3, 0.5, 0.2),
        _row("wrong", "LOW", "HIGH", 1.0, 0.0, 0.0),
        _row("l2", "LOW", "LOW", 0.0, 0.0, 1.0),
        _row("l1", "LOW", "LOW", 0.0, 0.0, 1.0),
        _row("silent", "LOW", None),
        _row("unscored", "LOW", "LOW"),
    ]
    expected = ["h2", "m1", "l1", "h3", "l2", "h1", "wrong"]
    assert [row["name"] for row in golden_frames.clearest_first(rows, MISSION, Rules())] == expected
    assert [row["name"] for row in golden_frames.clearest_first(reversed(rows), MISSION, Rules())] == expected
    # The decision of h1 is too close to the threshold: P(LOW) = 0.2.
    late = golden_frames.clearest_first(rows, MISSION, Rules(0.21))
    assert [row["name"] for row in late] == ["h2", "l1", "h3", "l2", "wrong", "m1", "h1"]


def test_hard_frames_are_right_and_as_close_as_rounding_allows() -> None:
    rows = [
        _row("clear", "HIGH", "HIGH", 0.9, 0.1, 0.0),
        _row("close", "HIGH", "HIGH", 0.5, 0.4, 0.1),
        _row("closer", "MEDIUM", "MEDIUM", 0.37, 0.46, 0.17),
        _row("too close", "HIGH", "HIGH", 0.45, 0.4, 0.15),
        _row("wrong", "HIGH", "MEDIUM", 0.4, 0.5, 0.1),
        _row("silent", "LOW", None),
        _row("unscored", "LOW", "LOW"),
    ]

    def names(threshold: float | None) -> list[str]:
        return [row["name"] for row in golden_frames.hardest_first(rows, MISSION, Rules(threshold))]

    assert names(None) == ["closer", "close", "clear"]
    assert names(0.19) == ["close", "clear"]  # closer would be at the threshold
    assert names(0.12) == ["close", "clear"]  # closer would be dropped, which is wrong


@pytest.mark.parametrize("threshold", [None, 0.1, 0.5, 0.9, 1.0])
def test_no_difference_that_the_check_allows_changes_a_stable_decision(threshold: float | None) -> None:
    draw, rules, moved = random.Random(1), Rules(threshold), {True: 0, False: 0}
    own = MISSION.names
    for _ in range(600):
        logs = [draw.uniform(-4, 0) for _ in own]
        stable = None
        for number in range(20):
            # The largest differences are the worst ones.
            off = [draw.choice((-1, 1)) * golden_frames.OTHER_NATS * bool(number) for _ in own]
            scores = Answer.scored("", [a + b for a, b in zip(logs, off, strict=True)]).scores
            assert scores is not None
            named = dict(zip(own, scores, strict=True))
            said = max(own, key=named.__getitem__)
            decided = said, decide(MISSION, said, scores, blank=False, rules=rules).category
            if stable is None:
                stable = golden_frames.margin_nats(MISSION, rules, named, {}) > golden_frames.STABLE_NATS
                first = decided
            moved[stable] += decided != first
    assert moved[True] == 0
    assert moved[False] > 0


def test_a_time_out_is_in_whole_minutes() -> None:
    assert [bundle.time_out_of(seconds) for seconds in ([0.1, 0.2], [6.0], [6.1, 2.0], [13.5])] == [60, 60, 120, 180]


# --- go ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", bundle.PROGRAMS)
def test_what_flies_is_python_3_9_and_the_standard_library(name: str) -> None:
    tree = ast.parse(Path(bundle.__file__).with_name(name).read_text(), feature_version=(3, 9))
    modules = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [str(node.module)]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    own = {program.partition(".")[0] for program in bundle.PROGRAMS}
    assert modules <= sys.stdlib_module_names | own | {"orion_triage"}


@pytest.mark.llama_cpp
def test_go_with_a_server_of_its_own(copied: Path, toolchain: Toolchain) -> None:
    before = {path.name for path in copied.iterdir()}
    # A proxy in the environment must not see the frames, nor a key of the user's be used.
    elsewhere = {"http_proxy": "http://127.0.0.1:1", "LLAMA_API_KEY": "mine"}
    told = check(copied, "--llama-server", toolchain.llama_server, "--json", **elsewhere)
    assert told.stderr == ""
    report = json.loads(told.stdout)
    assert (told.returncode, report["go"], report["why"], report["notes"]) == (0, True, "", [])
    # The same program on the same machine computes the same.
    *asked, blank = report["images"]
    assert max(image["off_category"] for image in asked) < 1e-4
    assert (blank["category"], blank["decision"]["decided_by"]) == (None, "blank rule")
    assert all(image["same_answer"] and image["seconds"] > 0 for image in report["images"])
    assert report["peak_bytes"] > 10_000_000
    assert any("peak memory" in line for line in check_flight.lines_of(report))
    assert {path.name for path in copied.iterdir()} == before


@pytest.mark.llama_cpp
def test_go_with_a_server_that_runs(copied: Path, running: Client, tmp_path: Path) -> None:
    key = tmp_path / "key.txt"
    key.write_text(key_of(running) + "\n")
    result = check(copied, "--url", running.base_url + "/", "--key-file", key)
    assert (result.returncode, result.stderr) == (0, ""), result.stdout
    lines = result.stdout.splitlines()
    assert lines[-4].startswith("the ground's verdict on this model: DO NOT FLY (several answers, ")
    assert lines[-3:] == [
        f"risk accepted by the ground: {RISK}",
        "this installation answers like the ground (GO) or does not (NO-GO):",
        "GO",
    ]
    assert sha256_of_file(copied / "bundle.json") in lines[0]
    assert sum(line.startswith("golden/") for line in lines) == 6
    assert check(copied, "--url", running.base_url, LLAMA_API_KEY=key_of(running)).returncode == 0
    assert_no_go(check(copied, "--url", running.base_url), "refused the key (401)")


@pytest.mark.llama_cpp
def test_serve_sh_serves_as_the_evaluation_did(copied: Path, toolchain: Toolchain, tmp_path: Path) -> None:
    shown = tmp_path / "bin" / "show"
    shown.parent.mkdir()
    shown.write_text('#!/bin/sh\nprintf "%s\\n" "$@" "key=$LLAMA_API_KEY"\n')
    shown.chmod(0o755)
    (tmp_path / "key").write_text("secret\n")
    environment = {"PATH": os.environ["PATH"], "LLAMA_SERVER": "bin/show", "ORION_KEY_FILE": str(tmp_path / "key")}
    command = ["sh", str(copied / "serve.sh")]
    served = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=True)
    *flags, key = served.stdout.splitlines()
    assert key == "key=secret"
    with Server(
        toolchain, copied / quantize.QUANTIZED, copied / quantize.MMPROJ, log=tmp_path / "log", threads=os.cpu_count()
    ) as server:
        assert server._process is not None
        ours = Path(f"/proc/{server._process.pid}/cmdline").read_bytes().decode().split("\0")[1:-1]
    ours[ours.index("--port") + 1] = "8080"
    assert _options(flags) == _options(ours)
    refused = subprocess.run(
        command, capture_output=True, text=True, env={"PATH": os.environ["PATH"], "LLAMA_SERVER": "true"}, check=False
    )
    assert (refused.returncode, "no key" in refused.stderr) == (2, True)


def _options(arguments: list[str]) -> set[tuple[str, ...]]:
    """Options with their values, in no order."""
    starts = [place for place, word in enumerate(arguments) if word.startswith("--")]
    return {tuple(arguments[a:b]) for a, b in zip(starts, [*starts[1:], len(arguments)], strict=True)}


@pytest.mark.llama_cpp
def test_other_words_for_the_same_category_are_noted(copied: Path, running: Client) -> None:
    record = json.loads((copied / "bundle.json").read_text())
    connection = check_flight.Connection(running.base_url, key_of(running))
    questions = check_flight.Questions(connection, copied, record, running.marker)
    image = record["golden"][0]["image"]
    answer = '{"reason": "Nothing but bare ground and sand.", "category": "LOW"}'

    picture, unlike = decide_frame.picture_for(record, decide_frame.pixels_of((copied / image).read_bytes()))
    assert picture is not None
    assert not unlike

    def other_words(record: dict[str, Any]) -> None:
        after, _ = questions.score_after(image, picture, answer)
        record["golden"][0] |= {"answer": answer, "log_probabilities": after}

    sign(copied, other_words)
    result = check(copied, "--url", running.base_url, LLAMA_API_KEY=key_of(running))
    assert (result.returncode, result.stdout.splitlines()[-1]) == (0, "GO"), result.stdout
    assert f"note: {image} has other words, which rounding explains" in result.stdout


# --- no-go ------------------------------------------------------------------------------------------------------


@pytest.mark.llama_cpp
def test_every_changed_byte_and_missing_file_is_named(copied: Path) -> None:
    """The first byte and the last one, and some between them; under the profile 'torture' more."""
    draw, every = random.Random(0), os.environ.get("HYPOTHESIS_PROFILE") == "torture"
    assert check_flight.read_bundle(copied)
    for path in sorted(path for path in copied.rglob("*") if path.is_file()):
        name, data = path.relative_to(copied).as_posix(), path.read_bytes()
        count = (4 if len(data) > 1_000_000 else 25) if every else 1
        for place in {0, len(data) - 1, *(draw.randrange(len(data)) for _ in range(count))}:
            path.write_bytes(data[:place] + bytes([data[place] ^ (1 << draw.randrange(8))]) + data[place + 1 :])
            with pytest.raises(check_flight.NoGoError, match=name.replace(".", r"\.")):
                check_flight.read_bundle(copied)
        for changed in (data[:-1], data + b"\n", b""):
            path.write_bytes(changed)
            with pytest.raises(check_flight.NoGoError, match=name.replace(".", r"\.")):
                check_flight.read_bundle(copied)
        path.unlink()
        with pytest.raises(check_flight.NoGoError, match=name.replace(".", r"\.")):
            check_flight.read_bundle(copied)
        path.write_bytes(data)
    assert check_flight.read_bundle(copied)


@pytest.mark.llama_cpp
def test_a_changed_bundle_is_not_even_started(copied: Path, tmp_path: Path) -> None:
    started = tmp_path / "started"
    program = _program(tmp_path, f"touch {started}")
    (copied / "golden" / "2-low.png").unlink()
    assert_no_go(check(copied, "--llama-server", program), "golden/2-low.png is missing")
    with (copied / "serve.sh").open("a") as file:
        file.write("# harmless\n")
    assert_no_go(check(copied, "--llama-server", program), "serve.sh was changed")
    (copied / "bundle.json").write_text("{")
    assert_no_go(check(copied, "--llama-server", program), "bundle.json")
    assert not started.exists()
    # Right hashes of a list that is none.
    for text in ("{", "[]", '{"files": 3}', '{"files": {"x": 1}}'):
        (copied / "bundle.json").write_text(text)
        (copied / "bundle.json.sha256").write_text(f"{sha256_of_file(copied / 'bundle.json')}  bundle.json\n")
        assert_no_go(checked(copied))


@pytest.mark.llama_cpp
def test_another_model_is_noticed_by_its_file_and_by_its_answers(
    copied: Path, toolchain: Toolchain, small_run: Run, tmp_path: Path
) -> None:
    """The same shapes and tokenizer with other weights."""
    import numpy as np
    from gguf import GGUFReader

    other = shutil.copytree(small_run.gguf, tmp_path / "other")
    for name in (quantize.F16, quantize.MMPROJ):
        generator = np.random.default_rng(0)
        for tensor in GGUFReader(other / name, "r+").tensors:
            if tensor.data.ndim == 2:
                noise = generator.normal(0, 0.5 * float(tensor.data.std(dtype=np.float32)), tensor.data.shape)
                tensor.data[:] += noise.astype(tensor.data.dtype)
    quantize_file(toolchain, other / quantize.F16, other / quantize.QUANTIZED, small_run.settings.quantize.type)
    assert sha256_of_file(other / quantize.QUANTIZED) != sha256_of_file(copied / quantize.QUANTIZED)
    with stub(model_path=str(other / quantize.QUANTIZED)) as url:
        result = checked(copied, "--url", url)
    assert_no_go(result, "has loaded", "which is not the bundle's orion-q4_k_m.gguf")
    # Behind names that cannot be seen from here, only the answers tell. The base calls all of these LOW unseen.
    backbone_alone = (other / quantize.QUANTIZED, copied / quantize.MMPROJ)
    mmproj_alone = (copied / quantize.QUANTIZED, other / quantize.MMPROJ)
    for pair in (backbone_alone, mmproj_alone):
        hidden = [shutil.copyfile(path, tmp_path / f"hidden-{path.name}") for path in pair]
        with Server(toolchain, hidden[0], hidden[1], log=tmp_path / "log", threads=1) as server:
            for path in hidden:
                path.unlink()
            result = check(copied, "--url", server.client.base_url, LLAMA_API_KEY=key_of(server.client))
            for kind in ("model", "mmproj"):
                assert f"the served {kind} cannot be seen from here; only its answers were checked" in result.stdout
            assert_no_go(result)


def _program(folder: Path, line: str) -> Path:
    path = folder / "llama-server"
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)
    return path


# Answers what is asked before the first image, and dies of that.
_DIES = """
import http.server, os, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{}")
    def do_POST(self):
        print("killed by the kernel", flush=True)
        os._exit(7)
    def log_message(self, *args):
        pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.mark.llama_cpp
def test_a_server_that_dies_or_never_loads_is_stopped_and_said(copied: Path, tmp_path: Path) -> None:
    dead = _program(tmp_path, "echo out of memory >&2; exit 3")
    assert_no_go(check(copied, "--llama-server", dead), "llama-server ended (3): out of memory")
    script = tmp_path / "dies.py"
    script.write_text(_DIES)
    midway = _program(tmp_path, f'exec {sys.executable} {script} "$@"')
    assert_no_go(check(copied, "--llama-server", midway), "llama-server ended (7): killed by the kernel")
    hanging = _program(tmp_path, f"echo $$ > {tmp_path}/pid; exec sleep 60")
    result = check(copied, "--llama-server", hanging, "--limit", "2")
    assert_no_go(result, "waiting for the server took longer than 2 s")  # after 60 s it would have ended by itself
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()


@pytest.mark.llama_cpp
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_check_stops_its_server(copied: Path, tmp_path: Path, number: signal.Signals) -> None:
    pid = tmp_path / "pid"
    program = _program(tmp_path, f"echo $$ > {pid}; exec sleep 60")
    command = [sys.executable, "-I", str(copied / "check_flight.py"), "--llama-server", str(program)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (pid.exists() and pid.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err, out.splitlines()[-1]) == (1, "", f"NO-GO: stopped by signal {int(number)}")
    assert not Path(f"/proc/{pid.read_text().strip()}").exists()


@pytest.mark.llama_cpp
def test_usage_mistakes_have_exit_status_two(copied: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("two\nlines\n")
    for arguments in (
        ("--url", "file:///etc/passwd"),
        ("--llama-server", tmp_path / "gone"),
        ("--key-file", tmp_path / "gone"),
        ("--key-file", tmp_path / "key"),
        ("--limit", "0"),
        ("--what",),
    ):
        result = checked(copied, *arguments)
        assert (result.returncode, "usage:" in result.stderr) == (2, True), arguments


# --- a stub server that misbehaves, or records ------------------------------------------------------------------


class _Stub(BaseHTTPRequestHandler):
    """Answers as llama-server would, but at the path `broken` as `how` does."""

    broken, how = "", ""
    answer = '{"reason": "Sand.", "category": "LOW"}'
    log_probabilities: object = -1.0
    model_path = "stub.gguf"
    keeps_to_grammars, broken_picture = True, False
    seconds = 0.0  # of a request about a picture
    seen: list[tuple[str, dict[str, Any]]]

    def do_GET(self) -> None:
        self._reply({})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).seen.append((self.path, body))
        self._reply(body)

    def _reply(self, body: dict[str, Any]) -> None:
        if self.path == self.broken:
            self._break()
            return
        head, _, tail = self.answer.partition(CATEGORY_CUE)
        if "prompt" in body and isinstance(body["prompt"], str):  # whether the server keeps to a grammar
            head = tail = str(body["grammar"]).split('"')[1] if self.keeps_to_grammars else "The quick brown fox"
        elif "prompt" in body:
            time.sleep(self.seconds)
            if self.broken_picture:
                self._break()
                return
        listed = [{"id": token, "logprob": self.log_probabilities} for token in LABELS.values()]
        value: dict[str, Any] = {
            "content": head if "stop" in body else tail,
            "tokens_predicted": 7,
            "tokens_evaluated": 30,
            "stopping_word": CATEGORY_CUE,
            "completion_probabilities": [{"top_logprobs": listed}],
            "build_info": "b1-stub",
            "media_marker": "<__media_x__>",
            "model_path": self.model_path,
        }
        self._send(200, json.dumps(value).encode())

    def _send(self, status: int, data: bytes, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length or len(data)))
        for name, text in headers.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(data)

    def _break(self) -> None:
        if self.how == "stalls":
            time.sleep(60)  # and hangs up, which is told from a limit that was kept
        elif self.how == "drips":
            self._send(200, b"", 1000)
            for _ in range(120):
                self.wfile.write(b" ")
                time.sleep(0.5)
        elif self.how == "hangs up":
            self.connection.shutdown(socket.SHUT_RDWR)
        elif self.how == "no HTTP":
            self.wfile.write(b"SSH-2.0-OpenSSH_9.2\r\n")
        elif self.how == "cut":
            self._send(200, b'{"content": "{', 5000)
        elif self.how == "moved":
            self._send(302, b"", Location="http://127.0.0.1:1/")
        elif self.how == "html":
            self._send(200, b"<html><body>log in</body></html>")
        elif self.how == "half":
            self._send(200, b'{"content": "{')
        elif self.how == "nested":
            self._send(200, b'{"content": ' + b"[" * 100_000)
        elif self.how == "empty":
            self._send(200, b"{}")
        else:
            self._send(int(self.how), b"no")

    def log_message(self, format: str, *args: object) -> None:
        return


@contextmanager
def stub(**attributes: object) -> Iterator[str]:
    handler = type("_Configured", (_Stub,), {**attributes, "seen": attributes.get("seen", [])})

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            return

    httpd = Quiet(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=httpd.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}"
    finally:
        httpd.shutdown()
        httpd.server_close()


@pytest.fixture(scope="session")
def stubbed(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle with what the stub answers as its expectation; nobody changes it."""

    def expect(record: dict[str, Any]) -> None:
        place = {"after": "", "tokens": list(LABELS.values()), "categories": [[label] for label in LABELS]}
        record["request"] |= {"labels": [place], "prompt_tokens": 30}
        record["frame_size"] = 512  # shrinking in Python takes most of a check's time
        record["golden"] = [*record["golden"][:3], record["golden"][-1]]
        for image in record["golden"][:3]:
            image |= {"answer": _Stub.answer, "category": "LOW", "log_probabilities": dict.fromkeys(LABELS, -1.0)}

    folder = shutil.copytree(made, tmp_path_factory.mktemp("stub") / "my $bundle")
    sign(folder, expect)
    return folder


@pytest.fixture
def for_stub(stubbed: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return shutil.copytree(stubbed, tmp_path / "bundle")


@pytest.mark.llama_cpp
def test_the_stub_itself_is_go_with_a_warning_about_its_build(stubbed: Path) -> None:
    with stub() as url:
        result = check(stubbed, "--url", url)
    assert (result.returncode, result.stdout.splitlines()[-1]) == (0, "GO"), result.stdout
    assert "warning: llama.cpp build 1, but the bundle was made with 10605" in result.stdout


@pytest.mark.llama_cpp
def test_other_words_are_scored_after_the_words_of_the_ground(for_stub: Path) -> None:
    ground = '{"reason": "Dust.", "category": "LOW"}'
    sign(for_stub, lambda record: record["golden"][0].update(answer=ground))
    seen: list[tuple[str, dict[str, Any]]] = []
    with stub(seen=seen) as url:
        assert checked(for_stub, "--url", url).returncode == 0
    assert [body["prompt"] for _, body in seen[:1]] == ["The"]
    starts = [body["prompt"]["prompt_string"].partition("assistant\n")[2] for _, body in seen[1:]]
    said, of_ground = '{"reason": "Sand.", "category": "', '{"reason": "Dust.", "category": "'
    assert starts == ["", said, of_ground, *["", said] * 2]
    sign(for_stub, lambda record: [image.update(answer=ground) for image in record["golden"][:3]])
    with stub() as url:
        result = checked(for_stub, "--url", url)
    assert_no_go(result, "3 of 3 reasons differ in their words; 2 may differ by rounding")


@pytest.mark.llama_cpp
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("stalls", "took longer than 0.5 s"),
        ("drips", "took longer than 0.5 s"),
        ("503", "503"),
        ("500", "500"),
        ("404", "404"),
        ("401", "refused the key"),
        ("hangs up", "/completion gave no reply"),
        ("no HTTP", "the reply was cut or is not HTTP (BadStatusLine)"),
        ("cut", "the reply was cut 4986 bytes before its end"),
        ("moved", "answered 302"),
        ("html", "did not answer with a JSON object: '<html>"),
        ("half", "did not answer with a JSON object"),
        ("nested", "did not answer with a JSON object"),
        ("empty", "does not keep to a grammar"),
    ],
)
def test_a_broken_server_is_no_go_within_the_limit(stubbed: Path, how: str, words: str) -> None:
    slow = how in ("stalls", "drips")  # until it hangs up, after 60 s
    for broken in ("/completion", "/props", "/health"):
        with stub(broken=broken, how=how) as url:
            result = checked(
                stubbed, "--url", url, "--limit", "0.5" if slow or (how, broken) == ("503", "/health") else "300"
            )
        if broken == "/completion":
            assert_no_go(result, words)
        elif how == "503" and broken == "/health":
            assert_no_go(result, "took longer than 0.5 s")  # it is waited for
        elif how == "empty" or (how in ("html", "half", "nested") and broken == "/health"):
            assert result.returncode == 0  # of /health only the status counts, and /props may have none of its fields
        else:
            assert_no_go(result, *["took longer than 0.5 s"] * slow)


@pytest.mark.llama_cpp
def test_nobody_there_is_no_go(stubbed: Path) -> None:
    assert_no_go(checked(stubbed, "--url", "http://127.0.0.1:1"), "no llama.cpp server at http://127.0.0.1:1")
    assert_no_go(checked(stubbed, "--url", "http://"), "no llama.cpp server at")


@pytest.mark.llama_cpp
@pytest.mark.parametrize(
    ("says", "words"),
    [
        ({"answer": '{"reason": "Sand.", "category": "HIGH"}'}, "golden/1-low.png: HIGH instead of LOW (and 2 more)"),
        ({"answer": '{"reason": "Sand.", "category": "LOW'}, "golden/1-low.png: the answer is not a verdict"),
        (
            {"log_probabilities": -1.06},
            "log-probability of LOW is -1.0600 instead of -1.0000; a difference of 0.05 is allowed",
        ),
        ({"log_probabilities": "many"}, "the reply has no log-probabilities"),
        ({"log_probabilities": float("nan")}, "the reply has no log-probabilities"),
    ],
)
def test_a_wrong_answer_is_no_go(stubbed: Path, says: dict[str, Any], words: str) -> None:
    with stub(**says) as url:
        assert_no_go(checked(stubbed, "--url", url), words)


@pytest.mark.llama_cpp
def test_other_image_settings_are_noticed_by_the_tokens_read(for_stub: Path) -> None:
    sign(for_stub, lambda record: record["request"].update(prompt_tokens=31))
    with stub() as url:
        assert_no_go(checked(for_stub, "--url", url), "reads 30 tokens instead of 31")


@pytest.mark.llama_cpp
def test_the_checker_asks_with_the_bytes_of_the_flight(stubbed: Path) -> None:
    record = json.loads((stubbed / "bundle.json").read_text())
    image = record["golden"][0]["image"]
    seen: list[tuple[str, dict[str, Any]]] = []
    with stub(seen=seen) as url:
        client = Client(url, turn=lfm2_vl.TURN)
        picture = (stubbed / image).read_bytes()
        flown = client.complete_and_score(
            user_text(MISSION, None),
            picture,
            answer_tokens(MISSION),
            cue=CATEGORY_CUE,
            after_cue=[("", list(LABELS.values()))],
            grammars=grammars(MISSION),
        )
        questions = check_flight.Questions(check_flight.Connection(url, ""), stubbed, record, "<__media_x__>")
        asked = questions.ask_with_fields(image, picture)
    assert flown == (asked[0], [list(asked[1].values())], {})
    assert len(seen) == 4
    assert seen[:2] == seen[2:]


# --- planted faults: each is NO-GO, with its reason --------------------------------------------------------------


@contextmanager
def changed_file(folder: Path, tmp_path: Path) -> Iterator[str]:
    with (folder / "decide_frame.py").open("a") as file:
        file.write("# harmless\n")
    with stub() as url:
        yield url


@contextmanager
def missing_file(folder: Path, tmp_path: Path) -> Iterator[str]:
    (folder / "golden" / "2-low.png").unlink()
    with stub() as url:
        yield url


@contextmanager
def foreign_mmproj(folder: Path, tmp_path: Path) -> Iterator[str]:
    """A Q8_0 tower beside the right model: its answers are within the tolerances."""
    toolchain, mmproj = find_toolchain(), tmp_path / "mmproj-q8_0.gguf"
    quantize_file(toolchain, folder / quantize.MMPROJ, mmproj, "Q8_0")
    with Server(toolchain, folder / quantize.QUANTIZED, mmproj, log=tmp_path / "log", threads=1) as server:
        os.environ["LLAMA_API_KEY"] = key_of(server.client)
        try:
            yield server.client.base_url
        finally:
            del os.environ["LLAMA_API_KEY"]


@contextmanager
def foreign_model(folder: Path, tmp_path: Path) -> Iterator[str]:
    other = tmp_path / "other.gguf"
    other.write_bytes((folder / quantize.QUANTIZED).read_bytes() + b"\0")
    with stub(model_path=str(other)) as url:
        yield url


@contextmanager
def other_image_size(folder: Path, tmp_path: Path) -> Iterator[str]:
    """As if the server had other image settings: it reads another number of tokens."""
    sign(folder, lambda record: record["request"].update(prompt_tokens=258))
    with stub() as url:
        yield url


@contextmanager
def grammar_dropped(folder: Path, tmp_path: Path) -> Iterator[str]:
    with stub(keeps_to_grammars=False) as url:
        yield url


@contextmanager
def slow_frame(folder: Path, tmp_path: Path) -> Iterator[str]:
    sign(folder, lambda record: record.update(seconds_per_frame_at_most=1))
    with stub(seconds=5) as url:
        yield url


@contextmanager
def other_threshold(folder: Path, tmp_path: Path) -> Iterator[str]:
    """A changed threshold in bundle.json, with consistent hashes: the golden frames say what was decided."""
    step = {"step": "threshold", "drop_probability_at_least": 0.9, "dropped": ["LOW"], "kept": ["HIGH", "MEDIUM"]}
    sign(folder, lambda record: record["decision"].insert(-1, step))
    with stub() as url:
        yield url


@contextmanager
def wrong_key(folder: Path, tmp_path: Path) -> Iterator[str]:
    with stub(broken="/props", how="401") as url:
        yield url


@pytest.mark.llama_cpp
@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (changed_file, "decide_frame.py was changed"),
        (missing_file, "golden/2-low.png is missing"),
        (foreign_mmproj, "mmproj-q8_0.gguf, which is not the bundle's orion-mmproj-f16.gguf"),
        (foreign_model, "other.gguf, which is not the bundle's orion-q4_k_m.gguf"),
        (other_image_size, "reads 30 tokens instead of 258"),
        (grammar_dropped, "does not keep to a grammar: it answers 'The quick brown fox'"),
        (slow_frame, "golden/1-low.png took longer than 1 s"),
        (
            other_threshold,
            "golden/1-low.png: the decision is HIGH (decided by: threshold 0.900) instead of LOW (decided by: model)",
        ),
        (wrong_key, "refused the key (401)"),
    ],
)
def test_each_planted_fault_is_no_go(
    plant: Callable[[Path, Path], Any], words: str, for_stub: Path, tmp_path: Path
) -> None:
    with plant(for_stub, tmp_path) as url:
        assert_no_go(checked(for_stub, "--url", url), words)


@pytest.mark.llama_cpp
def test_a_changed_blank_rule_is_no_go(for_stub: Path) -> None:
    sign(for_stub, lambda record: record["decision"][0].update(gradient_below=0.01))
    with stub() as url:
        result = checked(for_stub, "--url", url)
    assert_no_go(result, "golden/6-blank.png: the decision is LOW (decided by: model) instead of LOW (decided by: bl")


@pytest.mark.llama_cpp
def test_a_frame_may_take_longer_where_the_operator_says_so(for_stub: Path) -> None:
    sign(for_stub, lambda record: record.update(seconds_per_frame_at_most=1, golden=record["golden"][:1]))
    with stub(seconds=0.7) as url:
        assert_no_go(checked(for_stub, "--url", url), "took longer than 1 s")  # two requests
        assert checked(for_stub, "--url", url, "--time-out", "30").returncode == 0
        assert checked(for_stub, "--url", url, "--time-out", "0").returncode == 2


@pytest.mark.llama_cpp
def test_a_bundle_of_another_version_is_refused(for_stub: Path) -> None:
    sign(for_stub, lambda record: record.update(schema_version=3))
    assert_no_go(checked(for_stub), "bundle.json has schema version 3 instead of 4: use the check_flight.py of that")
    with pytest.raises(OrionError, match=r"has schema version 3 instead of 4.*Run 'orion bundle' again"):
        of_bundle(for_stub)


@pytest.mark.llama_cpp
def test_after_other_words_a_hard_frame_is_compared_after_the_words_of_the_ground(for_stub: Path) -> None:
    """Another category after other words is rounding in a hard frame, and a fault in a clear one."""

    def hard(record: dict[str, Any]) -> None:
        ground = '{"reason": "Dust.", "category": "HIGH"}'
        decision = {"category": "HIGH", "decided_by": "model"}
        record["golden"][0] |= {"answer": ground, "category": "HIGH", "decision": decision, "hard": True}

    sign(for_stub, hard)
    with stub() as url:
        result = checked(for_stub, "--url", url)
        assert (result.returncode, result.stdout.splitlines()[-1]) == (0, "GO"), result.stdout
        sign(for_stub, lambda record: record["golden"][0].update(hard=False))
        assert_no_go(checked(for_stub, "--url", url), "golden/1-low.png: LOW instead of HIGH")
        # The same words with another category are no rounding.
        sign(for_stub, lambda record: record["golden"][0].update(hard=True, answer=_Stub.answer))
        assert_no_go(checked(for_stub, "--url", url), "golden/1-low.png: LOW instead of HIGH")


@pytest.mark.llama_cpp
@pytest.mark.parametrize("how", ["500", "hangs up", "empty", "slow"])
def test_the_flight_client_keeps_a_frame_without_an_answer(for_stub: Path, tmp_path: Path, how: str) -> None:
    """It goes on with the next frame, too."""
    sign(for_stub, lambda record: record.update(seconds_per_frame_at_most=1 if how == "slow" else 60))
    (tmp_path / "a.raw").write_bytes(structured_picture(1).tobytes())
    (tmp_path / "white.raw").write_bytes(bytes([250]) * (512 * 512 * 3))
    attributes = {"seconds": 5} if how == "slow" else {"broken_picture": True, "how": how}
    with stub(**attributes) as url:
        told = subprocess.run(
            [sys.executable, "-I", "-S", for_stub / "ask_frame.py", "a.raw", "gone.raw", "white.raw", "--url", url],
            capture_output=True, text=True, cwd=tmp_path, check=False, env={},
        )  # fmt: skip
    lines = [json.loads(line) for line in told.stdout.splitlines()]
    assert told.returncode == 1
    assert [(line["category"], line["decided_by"], line["action"]) for line in lines] == [
        (None, "no answer", "store"), (None, "no answer", "store"), ("LOW", "blank rule", "drop")
    ]  # fmt: skip
    assert lines[0]["error"] in told.stderr
    said = {"slow": "the answer took longer than 1 s", "empty": "the answer has no category"}
    assert said.get(how, "/completion") in lines[0]["error"]


# --- a head -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def run_with_head(small_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same run with a head that says which colour prevails, and a threshold of that head."""
    run = Run(shutil.copytree(small_run.folder, tmp_path_factory.mktemp("head") / "run"), small_run.settings)
    frames = [
        Labelled(f"{number}.png", Verdict("", MISSION.names[number % 3]), None, Path(), tinted(number))
        for number in range(9)
    ]
    adapt.write(run, adapt.fitted(run, frames, ["LOW"] * len(frames)))
    threshold.choose(run, 0.34, (), of="head", loosen=True)
    return run


def tinted(number: int) -> Image.Image:
    tint = Image.new("RGB", (512, 512), tuple(200 if band == number % 3 else 60 for band in range(3)))
    return Image.blend(structured_picture(number), tint, 0.7)


@pytest.fixture(scope="session")
def made_with_head(run_with_head: Run) -> Path:
    out = run_with_head.folder.parent / "my $bundle"
    bundle.run(run_with_head, out, accepted_risk=RISK, time_out=60, head=True)
    return out


@pytest.fixture
def headed(made_with_head: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return shutil.copytree(made_with_head, tmp_path / "my $bundle")


@pytest.mark.llama_cpp
def test_a_bundle_has_a_head_beside_all_that_it_has_without_one(
    made: Path, made_with_head: Path, run_with_head: Run
) -> None:
    one, two = (json.loads((folder / "bundle.json").read_text()) for folder in (made, made_with_head))
    of_head = two.pop("head")
    changed = [name for name, sha256 in two.pop("files").items() if one["files"].get(name) != sha256]
    del one["files"]
    assert one == two
    assert changed == ["README.txt", "head.json", "serve.sh"]
    assert (made_with_head / "head.json").read_bytes() == (run_with_head.folder / "head.json").read_bytes()
    assert "ORION_VARIANT" not in (made / "serve.sh").read_text()
    assert [image["image"] for image in of_head["golden"]] == [image["image"] for image in one["golden"]]
    assert of_head["labelled"]["frames"] == 9
    step = decide_frame.step_of(of_head, "threshold")
    assert step is not None
    assert step["drop_probability_at_least"] == threshold.rules_of(run_with_head, of="head").drop_threshold
    readme = (made_with_head / "README.txt").read_text()
    assert "A head decides in flight instead of the language model (step 7)" in readme
    assert "(the threshold, chosen on the labelled frames)" in readme
    without = (made / "README.txt").read_text().lower().replace("head -c ", "")  # the program of steps 4 and 5
    assert "head" not in without.split()


@pytest.mark.llama_cpp
def test_flight_run_and_bundle_decide_alike_by_the_head(
    run_with_head: Run, headed: Path, toolchain: Toolchain, tmp_path: Path
) -> None:
    """Through the front doors: on the ground by the run and by the bundle, in flight by the client of a folder."""
    (tmp_path / "in").mkdir()
    pictures = {f"{number}.raw": tinted(number + 3).tobytes() for number in range(4)}
    pictures |= {"scene.raw": structured_picture(77).tobytes(), "white.raw": bytes([250]) * (512 * 512 * 3)}
    for name, data in pictures.items():
        (tmp_path / "in" / name).write_bytes(data)
    results = [
        orion("triage", "in", *words, "--json", cwd=tmp_path)
        for words in (("--run", run_with_head.folder, "--head"), ("--bundle", headed))
    ]
    assert [result.returncode for result in results] == [0, 0], results[0].stderr + results[1].stderr
    of_run, of_bundle = (json.loads(result.stdout) for result in results)
    assert of_run == of_bundle
    assert "(head, threshold 0." in results[1].stderr
    words = [headed / "triage_on_board.py", tmp_path / "in", "--once", "--llama-server", toolchain.llama_server]
    told = subprocess.run(
        [sys.executable, "-I", "-S", *map(str, words)],
        capture_output=True, text=True, check=False, env={"PATH": os.environ["PATH"], "ORION_THREADS": "1"},
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    assert "the head decides: its answers have no reason" in told.stderr
    flown = [json.loads(line) for line in (tmp_path / "in" / "triage.jsonl").read_text().splitlines()]
    assert [line["file"] for line in flown] == [Path(row["file"]).name for row in of_run] == [*pictures]
    assert {line["variant"] for line in flown} == {"head"}
    assert flown[-1]["decided_by"] == of_run[-1]["decided_by"] == "blank rule"
    for line, row in zip(flown[:-1], of_run[:-1], strict=True):
        for key in ("answer", "category", "decided_by", "model_category", "reason", "blank", "label_mass"):
            assert line[key] == row[key], key
        assert line["scores"] == pytest.approx(row["scores"], abs=1e-6)
        assert line["decided_by"].startswith("threshold 0.")
        assert line["reason"] == ""
    assert len({line["model_category"] for line in flown[:4]}) == 3, "it tells the colours apart"


@pytest.mark.llama_cpp
def test_the_check_is_of_the_pair_and_of_the_head(headed: Path, toolchain: Toolchain, tmp_path: Path) -> None:
    told = check(headed, "--llama-server", toolchain.llama_server, "--json")
    report = json.loads(told.stdout)
    assert (told.returncode, report["why"], report["notes"]) == (0, "", [])
    assert [image["variant"] for image in report["images"]] == ["quantized"] * 6 + ["head"] * 6
    assert report["images"][-1]["decision"] == {"category": "LOW", "decided_by": "blank rule"}
    assert max(image["off_category"] for image in report["images"] if image["log_probabilities"]) < 1e-4
    assert any(line.startswith("golden/1-low.png (head)") for line in check_flight.lines_of(report))

    pair = (headed / quantize.QUANTIZED, headed / quantize.MMPROJ)
    with Server(toolchain, *pair, log=tmp_path / "log", threads=1) as server:
        at = ("--url", server.client.base_url)
        assert_no_go(check(headed, *at, LLAMA_API_KEY=key_of(server.client)), "/embeddings answered 501")
        assert check(headed, *at, "--variant", "quantized", LLAMA_API_KEY=key_of(server.client)).returncode == 0
    with Server(toolchain, *pair, log=tmp_path / "log", options=head.EMBEDDING, threads=1) as server:
        key, at = key_of(server.client), ("--url", server.client.base_url)
        go = check(headed, *at, "--json", LLAMA_API_KEY=key)
        assert (go.returncode, {image["variant"] for image in json.loads(go.stdout)["images"]}) == (0, {"head"})
        value = json.loads((headed / "head.json").read_text())
        other = value | {"bias": [value["bias"][0] + 0.2, *value["bias"][1:]]}
        (headed / "head.json").write_text(json.dumps(other))
        assert_no_go(check(headed, *at, LLAMA_API_KEY=key), "head.json was changed")
        sign(headed, lambda record: record["files"].update({"head.json": sha256_of_file(headed / "head.json")}))
        assert_no_go(check(headed, *at, LLAMA_API_KEY=key), "the log-probability of", "(head)")


@pytest.mark.llama_cpp
def test_a_head_is_asked_for_by_name(made: Path, small_run: Run, tmp_path: Path) -> None:
    """No run's head gets into a bundle by itself, and no bundle without one is taken for one with it."""
    with pytest.raises(OrionError, match=r"head\.json does not exist") as error:
        bundle.run(small_run, tmp_path / "out", accepted_risk=RISK, head=True)
    assert "orion adapt" in error.value.fix
    assert not (tmp_path / "out").exists()
    with pytest.raises(OrionError, match="has no head"):
        of_bundle(made, head=True)
    assert_no_go(checked(made, "--variant", "head"), "the bundle has no head")


@pytest.mark.parametrize("reply", [b"{}", b"[]", b'[{"embedding": [[]]}]', b'[{"embedding": [["x"]]}]', b"html"])
def test_a_reply_without_a_hidden_state_is_refused(reply: bytes) -> None:
    class Odd(check_flight.Connection):
        def _request(self, path: str, body: dict[str, Any] | None) -> tuple[int, bytes]:
            return 200, reply

    questions = check_flight.Questions.__new__(check_flight.Questions)
    questions._connection, questions._until_image = Odd("http://127.0.0.1:1", ""), "x"
    with pytest.raises(check_flight.NoGoError, match="the frame: the reply has no hidden state"):
        questions.hidden_state("the frame", b"")


def test_a_head_of_another_width_decides_nothing() -> None:
    value = {"categories": ["HIGH", "LOW"], "width": 4, "weights": "", "bias": [0, 0]}
    with pytest.raises(ValueError, match="a hidden state has 3 numbers, of which the head takes 2"):
        decide_frame.head_scores(value, [[1.0, 2.0, 3.0]] * 4)
