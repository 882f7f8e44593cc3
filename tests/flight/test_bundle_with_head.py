"""A bundle with a head: the pair's hidden state decides, on the ground as in flight."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orion_triage.errors import OrionError
from orion_triage.evaluate import head, threshold
from orion_triage.export import quantize
from orion_triage.flight import bundle, check_flight, decide_frame
from orion_triage.flight.triage import of_bundle
from orion_triage.llama_cpp.server import Server
from orion_triage.llama_cpp.toolchain import Toolchain
from orion_triage.runs.run import Run
from orion_triage.safe.files import sha256_of_file
from tests.conftest import orion, structured_picture
from tests.flight.bundles import RISK, assert_no_go, check, checked, key_of, program_at, sign, stub, tinted


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
    server = program_at(tmp_path, f'echo "$*" >>{tmp_path}/started; exec {toolchain.llama_server} "$@"')
    told = check(headed, "--llama-server", server, "--json")
    report = json.loads(told.stdout)
    assert ["--embedding" in line for line in (tmp_path / "started").read_text().splitlines()] == [False, True]
    assert (told.returncode, report["why"], report["notes"]) == (0, "", [])
    assert [image["variant"] for image in report["images"]] == ["quantized"] * 6 + ["head"] * 6
    assert report["images"][-1]["decision"] == {"category": "LOW", "decided_by": "blank rule"}
    assert max(image["off_category"] for image in report["images"] if image["log_probabilities"]) < 1e-4
    assert any(line.startswith("golden/1-low.png (head)") for line in check_flight.lines_of(report))
    told = check(headed, "--llama-server", server, "--variant", "quantized", "--json")
    assert {image["variant"] for image in json.loads(told.stdout)["images"]} == {"quantized"}

    pair = (headed / quantize.QUANTIZED, headed / quantize.MMPROJ)
    with Server(toolchain, *pair, log=tmp_path / "log", threads=1) as server:
        at = ("--url", server.client.base_url)
        assert_no_go(check(headed, *at, LLAMA_API_KEY=key_of(server.client)), "/embeddings answered 501")
        assert check(headed, *at, "--variant", "quantized", LLAMA_API_KEY=key_of(server.client)).returncode == 0
    with Server(toolchain, *pair, log=tmp_path / "log", options=head.EMBEDDING, threads=1) as server:
        key, at = key_of(server.client), ("--url", server.client.base_url)
        go = check(headed, *at, "--json", LLAMA_API_KEY=key)
        assert (go.returncode, {image["variant"] for image in json.loads(go.stdout)["images"]}) == (0, {"head"})
        # As if no frame were like those of the training.
        step = {"step": "unlike training", "ranges": {"dark": [255, 255]}, "instead": ["MEDIUM"]}
        step["dropped"] = ["HIGH", "MEDIUM", "LOW"]
        sign(headed, lambda record: record["head"]["decision"].insert(-2, step))
        assert_no_go(
            check(headed, *at, LLAMA_API_KEY=key), "the decision is MEDIUM (decided by: unlike training)", "(head)"
        )
        sign(headed, lambda record: record["head"]["decision"].remove(step))
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


@pytest.mark.llama_cpp
def test_a_frame_that_is_blank_here_alone_is_no_go_of_the_head(headed: Path) -> None:
    """Though on the ground its decision was too close to another one to be compared."""

    def blank(record: dict[str, Any]) -> None:
        golden = record["head"]["golden"][0]
        record["head"]["golden"] = [golden | {"image": "golden/6-blank.png", "decision": None}]

    sign(headed, blank)
    with stub() as url:
        assert_no_go(checked(headed, "--url", url), "the decision is LOW (decided by: blank rule) instead of None")


@pytest.mark.llama_cpp
def test_a_server_that_stalls_is_no_go_of_the_head_within_the_limit(headed: Path) -> None:
    with stub(broken="/embeddings", how="stalls") as url:
        assert_no_go(checked(headed, "--url", url, "--time-out", "2"), "golden/1-low.png took longer than 2 s")


NO_NUMBER = (b'[{"embedding": [[1, NaN]]}]', b'[{"embedding": [[-Infinity]]}]', b'[{"embedding": [["x"]]}]')


@pytest.mark.parametrize("reply", [b"{}", b"[]", b'[{"embedding": [[]]}]', *NO_NUMBER, b"html"])
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
