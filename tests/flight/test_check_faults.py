"""check_flight.py and the flight client with a stub server that misbehaves, and with planted faults."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from orion_triage.errors import OrionError
from orion_triage.export import quantize
from orion_triage.flight import check_flight
from orion_triage.flight.triage import of_bundle
from orion_triage.llama_cpp.client import Client
from orion_triage.llama_cpp.server import Server
from orion_triage.llama_cpp.toolchain import find_toolchain
from orion_triage.llama_cpp.tools import quantize_file
from orion_triage.mission.prompt import user_text
from orion_triage.mission.verdict import CATEGORY_CUE, answer_tokens, grammars
from orion_triage.models import lfm2_vl
from tests.conftest import MISSION, structured_picture
from tests.flight.bundles import LABELS, Stub, assert_no_go, check, checked, key_of, sign, stub


@pytest.mark.llama_cpp
def test_the_stub_itself_is_go_with_a_warning_about_its_build(stubbed: Path) -> None:
    with stub() as url:
        result = check(stubbed, "--url", url)
    assert (result.returncode, result.stdout.splitlines()[-1]) == (0, "GO"), result.stdout
    assert "warning: llama.cpp build 1, but the bundle was made with 10605" in result.stdout
    for says, build in (("b99999-newer", "99999"), ("main", "None")):
        with stub(build_info=says) as url:
            result = checked(stubbed, "--url", url)
        assert f"warning: llama.cpp build {build}, but the bundle was made with 10605" in result.stdout
    with stub(build_info="b10605-same") as url:
        assert "warning" not in checked(stubbed, "--url", url).stdout


@pytest.mark.llama_cpp
def test_other_words_are_scored_after_the_words_of_the_ground(for_stub: Path) -> None:
    ground = '{"reason": "Dust.", "category": "LOW"}'
    sign(for_stub, lambda record: record["golden"][0].update(answer=ground))
    seen: list[tuple[str, dict[str, Any]]] = []
    with stub(seen=seen) as url:
        result = checked(for_stub, "--url", url)
    assert result.returncode == 0
    rows = [line.split() for line in result.stdout.splitlines() if line.startswith("golden/")]
    assert [row[-2] for row in rows] == ["no", "yes", "yes", "-"]  # same words
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
            assert len(result.stdout.splitlines()[-1]) < 200  # of a long reply, the beginning
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
@pytest.mark.parametrize("tokens", [29, 31])
def test_other_image_settings_are_noticed_by_the_tokens_read(for_stub: Path, tokens: int) -> None:
    sign(for_stub, lambda record: record["request"].update(prompt_tokens=tokens))
    with stub() as url:
        assert_no_go(checked(for_stub, "--url", url), f"reads 30 tokens instead of {tokens}")
        as_json = checked(for_stub, "--url", url, "--json")
    report = json.loads(as_json.stdout)
    assert (as_json.returncode, report["go"]) == (1, False)
    assert f"reads 30 tokens instead of {tokens}" in report["why"]


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


def verdict_first(record: dict[str, Any]) -> None:
    """As in a bundle of --verdict-only: the category comes first, and no category has a reason."""
    answers = {label: f'{{"category": "{label}", "reason": ""}}' for label in LABELS}
    record["request"]["verdict_only"] = {"start": '{"category": "', "answers": answers, "reasons": {}}
    for image in record["golden"][:3]:
        image["answer"] = answers["LOW"]


@pytest.mark.llama_cpp
def test_other_image_settings_are_noticed_where_the_verdict_comes_first(for_stub: Path) -> None:
    sign(for_stub, verdict_first)
    with stub() as url:
        result = checked(for_stub, "--url", url)
        assert (result.returncode, result.stdout.splitlines()[-1]) == (0, "GO"), result.stdout
        sign(for_stub, lambda record: record["request"].update(prompt_tokens=29))
        assert_no_go(checked(for_stub, "--url", url), "golden/1-low.png: the server reads 30 tokens instead of 29")


def text_first(tokens: int) -> Callable[[dict[str, Any]], None]:
    """As in a bundle whose prompt of so many tokens stands before the image, so that the server keeps its state."""
    return lambda record: record["request"].update(kept_tokens=tokens, printable='root ::= "x"')


@pytest.mark.llama_cpp
def test_a_prompt_of_another_length_is_no_go(for_stub: Path) -> None:
    sign(for_stub, text_first(29))
    with stub() as url:
        assert_no_go(checked(for_stub, "--url", url), "the server reads 30 tokens of the prompt instead of 29")


@pytest.mark.llama_cpp
def test_a_prompt_that_the_server_loses_is_read_again_before_each_frame(for_stub: Path) -> None:
    """This one says of no token that it kept it."""
    sign(for_stub, text_first(30))
    seen: list[tuple[str, dict[str, Any]]] = []
    with stub(seen=seen) as url:
        assert checked(for_stub, "--url", url).returncode == 0
    texts = [body["prompt"] for _, body in seen if isinstance(body["prompt"], str)]
    assert texts[0] == "The"  # whether it keeps to a grammar
    assert len(texts) == 1 + 3


@pytest.mark.parametrize(("reply", "restored"), [({"n_restored": 29}, True), ({"n_restored": 28}, False), ({}, False)])
def test_a_saved_state_of_another_length_is_not_restored(reply: dict[str, Any], restored: bool) -> None:
    class Restoring(check_flight.Connection):
        def _request(self, path: str, body: dict[str, Any] | None) -> tuple[int, bytes]:
            return 200, json.dumps(reply).encode()

    questions = check_flight.Questions.__new__(check_flight.Questions)
    questions._connection, questions._request = Restoring("http://127.0.0.1:1", ""), {"kept_tokens": 29}
    questions._kept = False
    assert questions.restore_prompt("prompt.bin") is restored


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
def other_ranges(folder: Path, tmp_path: Path) -> Iterator[str]:
    """As if no frame were like those of the training: what would be dropped is kept."""
    step = {"step": "unlike training", "ranges": {"dark": [255, 255]}, "dropped": ["LOW"], "instead": ["MEDIUM"]}
    sign(folder, lambda record: record["decision"].insert(-1, step))
    with stub() as url:
        yield url


@contextmanager
def unknown_step(folder: Path, tmp_path: Path) -> Iterator[str]:
    """An error of the check itself."""
    sign(folder, lambda record: record["decision"].insert(0, {"step": "guess"}))
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
        (
            other_ranges,
            "golden/1-low.png: the decision is MEDIUM (decided by: unlike training) instead of LOW (decided by: model)",
        ),
        (unknown_step, "the check itself failed: ValueError the step guess is not known"),
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
@pytest.mark.parametrize("version", [3, 5])
def test_a_bundle_of_another_version_is_refused(for_stub: Path, version: int) -> None:
    sign(for_stub, lambda record: record.update(schema_version=version))
    said = f"has schema version {version} instead of 4"
    assert_no_go(checked(for_stub), f"bundle.json {said}: use the check_flight.py of that")
    with pytest.raises(OrionError, match=rf"{said}.*Run 'orion bundle' again"):
        of_bundle(for_stub)


@pytest.mark.llama_cpp
def test_a_file_that_takes_too_long_to_read_is_no_go(for_stub: Path) -> None:
    os.truncate(for_stub / "prompt.txt", 16 << 30)  # it takes no place on the disk
    assert_no_go(checked(for_stub, "--limit", "0.5"), "reading the bundle's files took longer than 0.5 s")


def test_no_alarm_is_left_after_a_limit_that_was_kept() -> None:
    """It would end the program later, in the middle of something else."""
    with check_flight.time_limit(100, "this"):
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.llama_cpp
def test_a_relative_path_of_a_server_is_not_looked_up_from_here(stubbed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(stubbed)
    with stub(model_path=quantize.QUANTIZED) as url:
        result = checked(stubbed, "--url", url)
    assert "the served model cannot be seen from here; only its answers were checked" in result.stdout


def test_a_server_on_another_machine_is_not_looked_for_on_this_one() -> None:
    with stub() as url:
        assert check_flight._process_at(url) == Path(f"/proc/{os.getpid()}")
        assert check_flight._process_at(url.replace("127.0.0.1", "192.0.2.1")) is None


@pytest.mark.parametrize("option", ["--mmproj", "-mm"])
@pytest.mark.parametrize("relative", [True, False])
def test_the_mmproj_is_that_of_the_servers_command_line(option: str, relative: bool, tmp_path: Path) -> None:
    (tmp_path / "tower.gguf").write_text("tower")
    words = [option, "tower.gguf" if relative else str(tmp_path / "tower.gguf")]
    command = [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)", *words]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout
            process.stdout.readline()  # it runs
            found = [path.read_text() for path in check_flight._mmproj_of(Path(f"/proc/{process.pid}"))]
        finally:
            process.kill()
    assert found == ["tower"]


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
        sign(for_stub, lambda record: record["golden"][0].update(hard=True, answer=Stub.answer))
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
