"""triage_on_board.py: no frame is lost and none is decided twice, whenever the power or the server fails.

The server is a stub: what a model answers is not the matter of these tests, and a hundred starts of a model would take
half an hour. The client, its files and its signals are real.
"""

import ctypes
import hashlib
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from orion_triage.flight import triage_on_board
from orion_triage.flight.bundle import BLANK_LIMITS, PROGRAMS
from orion_triage.flight.check_flight import SCHEMA_VERSION, NoGoError
from orion_triage.flight.decide_frame import RAW_BYTES
from orion_triage.imagery.frames import FRAME_SUFFIXES
from orion_triage.mission.decide import Rules, as_steps
from orion_triage.mission.verdict import CATEGORY_CUE
from orion_triage.safe.files import sha256_of_file
from tests.conftest import MISSION

TOKENS = {"HIGH": 10, "MEDIUM": 11, "LOW": 12}
# A server of one's own for serve.sh: answers as llama-server does; FAULTS says what it does with which request.
_SERVER = """
import http.server, json, os, sys, time
from pathlib import Path
here = Path(__file__).parent
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply({"model_path": "", "build_info": "b1"})
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if isinstance(body["prompt"], str):
            self.reply({"content": "zq7 orion probe"})
            return
        number = len((here / "asked").read_bytes()) + 1
        with (here / "asked").open("ab") as file:
            file.write(b".")
        fault = json.loads((here / "faults").read_text()).get(str(number))
        if fault == "dies":
            os._exit(9)
        if fault == "hangs":
            time.sleep(60)
        cue = \'"category": "\'
        head, tail = \'{"reason": "Sand.", \', \'LOW"}\'
        listed = [{"id": token, "logprob": -1.0} for token in (10, 11, 12)]
        self.reply({"content": head if "stop" in body else tail, "stopping_word": cue, "tokens_predicted": 7,
                    "tokens_evaluated": 30, "completion_probabilities": [{"top_logprobs": listed}]})
    def reply(self, value):
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
    def log_message(self, *args):
        pass
with (here / "started").open("a") as file:
    file.write(f"{os.getpid()}\\n")
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle without weights; its frames are not shrunk, and it has no blank rule: both take time in Python."""
    folder = tmp_path_factory.mktemp("flight") / "my $bundle"
    folder.mkdir()
    for name in PROGRAMS:
        shutil.copyfile(Path(triage_on_board.__file__).with_name(name), folder / name)
    for name in ("prompt.txt", "grammar.gbnf", "category_grammar.gbnf", "model", "mmproj"):
        (folder / name).write_text("x")
    (folder / "serve.sh").write_text('exec "$LLAMA_SERVER" --port "$ORION_PORT"\n')
    write_bundle(folder, as_steps(MISSION, Rules(blank=False), BLANK_LIMITS))
    return folder


def write_bundle(folder: Path, steps: list[dict[str, Any]]) -> None:
    files = [path for path in folder.iterdir() if not path.name.startswith("bundle.json")]
    record = {
        "schema_version": SCHEMA_VERSION,
        "frame_size": 512,
        "mission": MISSION.model_dump(mode="json"),
        "model": "model",
        "mmproj": "mmproj",
        "llama_cpp_build": 1,
        "decision": steps,
        "seconds_per_frame_at_most": 30,
        "request": {
            "chat": "{image}{prompt}",
            "cue": CATEGORY_CUE,
            "answer_tokens": 50,
            "candidates": 100,
            "sampling": {},
            "grammars": ["grammar.gbnf", "category_grammar.gbnf"],
            "labels": [{"after": "", "tokens": [*TOKENS.values()], "categories": [[name] for name in TOKENS]}],
            "prompt_tokens": 30,
        },
        "files": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
    }
    text = json.dumps(record)
    (folder / "bundle.json").write_text(text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    (folder / "bundle.json.sha256").write_text(f"{digest}  bundle.json\n")


def frame(number: int) -> bytes:
    """A raw frame that differs from every other one."""
    return number.to_bytes(4, "big") * (RAW_BYTES // 4)


def put(folder: Path, name: str, data: bytes) -> None:
    """As the camera should: the name appears when the file is complete."""
    (folder / f"{name}.part").write_bytes(data)
    (folder / f"{name}.part").rename(folder / name)


def lines_of(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "triage.jsonl").read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def assert_each_once(folder: Path, frames: dict[str, bytes]) -> None:
    """All frames are among the finished ones with their pixels, and have exactly one line each."""
    lines = lines_of(folder)
    assert sorted(line["file"] for line in lines) == sorted(frames)
    assert {path.name: path.read_bytes() for path in (folder / "done").iterdir()} == frames
    assert list(folder.glob("*.raw")) == []
    for line in lines:
        assert line["sha256"] == hashlib.sha256(frames[line["file"]]).hexdigest()
        assert (line["category"], line["decided_by"], line["action"]) == ("LOW", "model", "drop")


def command(bundle: Path, folder: Path, *more: object) -> list[str]:
    return [sys.executable, "-I", "-S", str(bundle / "triage_on_board.py"), str(folder), *map(str, more)]


def run_once(bundle: Path, folder: Path, *more: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(bundle, folder, "--once", *more), capture_output=True, text=True, timeout=600, check=False, env={}
    )


@contextmanager
def stub() -> Iterator[str]:
    """A running server that answers LOW."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._reply({"model_path": "", "build_info": "b1"})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if isinstance(body["prompt"], str):
                self._reply({"content": "zq7 orion probe"})
                return
            listed = [{"id": token, "logprob": -1.0} for token in TOKENS.values()]
            self._reply(
                {
                    "content": '{"reason": "Sand.", ' if "stop" in body else 'LOW"}',
                    "stopping_word": CATEGORY_CUE,
                    "tokens_predicted": 7,
                    "tokens_evaluated": 30,
                    "completion_probabilities": [{"top_logprobs": listed}],
                }
            )

        def _reply(self, value: dict[str, Any]) -> None:
            data = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            return

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            return

    httpd = Quiet(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}"
    finally:
        httpd.shutdown()
        httpd.server_close()


def test_a_folder_is_emptied_once(bundle: Path, tmp_path: Path) -> None:
    frames = {f"{number}.raw": frame(number) for number in range(3)}
    for name, data in frames.items():
        put(tmp_path, name, data)
    (tmp_path / "notes.txt").write_text("not a frame")
    before = {path.name for path in bundle.iterdir()}
    with stub() as url:
        told = run_once(bundle, tmp_path, "--url", url)
        assert told.returncode == 0, told.stderr
        assert told.stderr.splitlines()[-1] == "3 LOW"
        assert_each_once(tmp_path, frames)
        assert run_once(bundle, tmp_path, "--url", url).stderr.splitlines()[-1] == "no new frame"
        assert_each_once(tmp_path, frames)
        # Another frame under the name of an earlier one is another frame; the same pixels again are not.
        put(tmp_path, "1.raw", frame(7))
        put(tmp_path, "2.raw", frame(2))
        told = run_once(bundle, tmp_path, "--url", url)
    assert told.stderr.splitlines()[-2:] == ["1 in the log already, moved without a new decision", "1 LOW"]
    assert {line["bundle"] for line in lines_of(tmp_path)} == {sha256_of_file(bundle / "bundle.json")}
    assert [line["file"] for line in lines_of(tmp_path)] == ["0.raw", "1.raw", "2.raw", "1.raw"]
    assert lines_of(tmp_path)[-1]["moved_to"] == "1-2.raw"
    finished = {path.name: path.read_bytes() for path in (tmp_path / "done").iterdir()}
    assert finished == {**frames, "1-2.raw": frame(7)}
    assert {path.name for path in bundle.iterdir()} == before  # no __pycache__


def test_an_incomplete_frame_waits_and_one_of_another_size_is_kept(bundle: Path, tmp_path: Path) -> None:
    put(tmp_path, "long.raw", frame(1) + b"x")
    (tmp_path / "short.raw").write_bytes(b"short")
    with stub() as url:
        told = run_once(bundle, tmp_path, "--url", url)
    assert told.returncode == 1
    assert f"incomplete: {tmp_path}/short.raw has 5 of 786432 bytes" in told.stderr
    assert told.stderr.splitlines()[-1] == "1 without a decision"
    (line,) = lines_of(tmp_path)
    assert (line["file"], line["category"], line["decided_by"], line["action"]) == (
        "long.raw", None, "no answer", "store"
    )  # fmt: skip
    assert line["error"] == "the file has 786433 bytes, not 786432 (512x512x3)"
    assert (tmp_path / "done" / "long.raw").exists()
    assert (tmp_path / "short.raw").exists()


def test_names_in_capitals_are_frames_and_what_is_left_out_is_said(bundle: Path, tmp_path: Path) -> None:
    assert {*FRAME_SUFFIXES} <= {*triage_on_board.OTHER_PICTURES, triage_on_board.RAW}  # the ground takes these
    frames = {name: frame(number) for number, name in enumerate(("UPPER.RAW", "Mixed.Raw", "a.raw"))}
    for name, data in frames.items():
        put(tmp_path, name, data)
    for name in ("b.png", "c.png", "d.PNG", "e.TIF", "notes.txt", "f.raw.part"):
        (tmp_path / name).write_bytes(b"x")
    for name, target in (("link.raw", "a.raw"), ("loop.RAW", "loop.RAW"), ("dangling.raw", "gone")):
        (tmp_path / name).symlink_to(target)
    (tmp_path / "folder.raw").mkdir()
    (tmp_path / ".g.raw").write_bytes(frame(9))  # of full length from its start, as a camera may write it
    stay = {path.name for path in tmp_path.iterdir()} - frames.keys()
    with stub() as url:
        told = run_once(bundle, tmp_path, "--url", url)
    assert told.returncode == 0, told.stderr
    assert [line for line in told.stderr.splitlines() if line.startswith("left out")] == [
        "left out: .g.raw: a hidden file may still be written. Rename it when it is complete",
        "left out: b.png and 2 more: .png is not read here. Write raw RGB of 512x512x3 bytes as *.raw",
        "left out: dangling.raw and 2 more: a link is not moved. Move the frame itself into the folder",
        "left out: e.TIF: .tif is not read here. Write raw RGB of 512x512x3 bytes as *.raw",
        "left out: folder.raw: it is not a regular file",
    ]
    assert told.stderr.splitlines()[-1] == "3 LOW"
    assert sorted(line["file"] for line in lines_of(tmp_path)) == sorted(frames)
    assert {path.name: path.read_bytes() for path in (tmp_path / "done").iterdir()} == frames
    assert {path.name for path in tmp_path.iterdir()} == stay | {"done", "triage.jsonl"}


def test_a_kind_is_said_once_however_long_the_folder_is_watched(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(b"x")
    deadline = time.monotonic() + 60
    with stub() as url:
        process = subprocess.Popen(
            command(bundle, tmp_path, "--url", url, "--poll", "0.01"), stderr=subprocess.PIPE, text=True, env={}
        )
        for number in range(1, 4):
            (tmp_path / f"{number}.png").write_bytes(b"x")
            put(tmp_path, f"{number}.raw", frame(number))
            while not (tmp_path / "done" / f"{number}.raw").exists():
                assert time.monotonic() < deadline
                time.sleep(0.02)
        time.sleep(0.2)  # twenty looks at a folder in which nothing happens
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=60)
    assert told.count("left out: ") == told.count("left out: 0.png") == 1


def test_without_a_server_frames_wait(bundle: Path, tmp_path: Path) -> None:
    put(tmp_path, "a.raw", frame(1))
    told = run_once(bundle, tmp_path, "--url", "http://127.0.0.1:1")
    assert (told.returncode, told.stderr) == (1, "error: no llama.cpp server at http://127.0.0.1:1\n")
    assert (tmp_path / "a.raw").exists()
    assert lines_of(tmp_path) == []


def test_a_changed_bundle_decides_nothing(bundle: Path, tmp_path: Path) -> None:
    mine = shutil.copytree(bundle, tmp_path / "bundle")
    (mine / "prompt.txt").write_text("y")
    (tmp_path / "in").mkdir()
    put(tmp_path / "in", "a.raw", frame(1))
    with stub() as url:
        told = run_once(mine, tmp_path / "in", "--url", url)
    assert (told.returncode, told.stderr) == (1, "error: prompt.txt was changed\n")
    assert (tmp_path / "in" / "a.raw").exists()


def test_two_at_a_time_are_refused(tmp_path: Path) -> None:
    first = triage_on_board.Log(tmp_path / "log")
    with pytest.raises(NoGoError, match=r"another triage_on_board\.py writes"):
        triage_on_board.Log(tmp_path / "log")
    first.close()
    triage_on_board.Log(tmp_path / "log").close()
    there = triage_on_board.Frames(tmp_path, tmp_path / "log", tmp_path / "done", "of a bundle")
    with pytest.raises(NoGoError, match=r"another triage_on_board\.py decides the frames in"):
        triage_on_board.Frames(tmp_path, tmp_path / "another log", tmp_path / "done", "of a bundle")
    there.log.close()


def held_by_permissions() -> None:
    """In a new process, before its program begins: root, too, may not read then what permissions do not allow."""
    drop_from_bounding_set, passing_over_all, passing_over_reading = 24, 1, 2
    for capability in (passing_over_all, passing_over_reading):
        ctypes.CDLL(None).prctl(drop_from_bounding_set, capability, 0, 0, 0)


def test_a_frame_that_cannot_be_read_stays_and_holds_up_no_other(bundle: Path, tmp_path: Path) -> None:
    for number in range(3):
        put(tmp_path, f"{number}.raw", frame(number))
    (tmp_path / "0.raw").chmod(0)
    with stub() as url:
        words = command(bundle, tmp_path, "--once", "--url", url)
        told = subprocess.run(
            words, capture_output=True, text=True, timeout=600, check=False, env={}, preexec_fn=held_by_permissions
        )
        assert told.returncode == 1
        said = f"left where it is: {tmp_path}/0.raw cannot be read: Permission denied"
        assert (told.stderr.splitlines()[0], told.stderr.splitlines()[-1]) == (said, "2 LOW")
        assert [line["file"] for line in lines_of(tmp_path)] == ["1.raw", "2.raw"]
        (tmp_path / "0.raw").chmod(0o644)
        assert run_once(bundle, tmp_path, "--url", url).returncode == 0
    assert_each_once(tmp_path, {f"{number}.raw": frame(number) for number in range(3)})


def test_the_longest_names_may_come_twice(bundle: Path, tmp_path: Path) -> None:
    name = "\u00e9" * 125 + "1.raw"  # 255 bytes
    with stub() as url:
        for number in range(2):
            put(tmp_path, "0.raw", frame(number))
            (tmp_path / "0.raw").rename(tmp_path / name)
            assert run_once(bundle, tmp_path, "--url", url).returncode == 0
    names = ["\u00e9" * 125 + "1.raw", "\u00e9" * 124 + "-2.raw"]
    assert [line["moved_to"] for line in lines_of(tmp_path)] == names
    assert [(tmp_path / "done" / name).read_bytes() for name in names] == [frame(0), frame(1)]


def test_another_file_is_not_cut_off_as_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    for text in (b'{"flight plan": 1}', b"key"):
        log.write_bytes(text)
        with pytest.raises(NoGoError, match=r"log is not a log of this program\. Name another file with --log"):
            triage_on_board.Log(log)
        assert log.read_bytes() == text
    for left in (b"", b'{"fi', b'{"file": "a.raw", "sha', b"\0" * 500):  # of a first line, after a power loss
        log.write_bytes(left)
        triage_on_board.Log(log).close()
        assert log.read_bytes() == b""


def test_a_torn_log_is_repaired(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = json.dumps({"file": "a.raw", "sha256": "1", "moved_to": "a.raw"}) + "\n"
    damage = "[" * 200_000  # too deep for a parser
    for tail in ("", '{"file": "b.r', "\0" * 4096):
        (tmp_path / "log").write_text(f"{whole}{damage}\n{whole}{tail}")
        log = triage_on_board.Log(tmp_path / "log")
        assert log.moved_to == {("a.raw", "1"): "a.raw"}
        log.append({"file": "c.raw", "sha256": "3", "moved_to": "c.raw"})
        log.close()
        assert (tmp_path / "log").read_text().splitlines()[:3] == [whole.strip(), damage, whole.strip()]
        assert json.loads((tmp_path / "log").read_text().splitlines()[3])["file"] == "c.raw"
        assert "line 2 of" in capsys.readouterr().err


class PowerLoss(BaseException):
    pass


class Constant:
    """Decides without a server: here, the power fails between the client's own steps."""

    asked = 0

    def outcome_of(self, data: bytes, seconds: float) -> dict[str, Any]:
        self.asked += 1
        return {"category": "LOW", "decided_by": "model", "action": "drop"}


@pytest.mark.parametrize("unsynced_is_lost", [False, True])
def test_power_may_fail_at_every_step(tmp_path: Path, unsynced_is_lost: bool) -> None:
    """Every call that changes a file fails once: before it, in its middle, or after it. Then nothing works any more.

    What was written to the log and not synced is then there, or lost; a rename is on the disk at once.
    """
    steps, ended = 0, False
    while not ended:
        steps += 1
        folder = tmp_path / str(steps)
        folder.mkdir()
        frames = {f"{number}.raw": frame(number) for number in range(2)}
        for name, data in frames.items():
            put(folder, name, data)
        ended = not failing_at(steps, folder, unsynced_is_lost)
        assert run_in_process(folder) <= 2
        assert_each_once(folder, frames)
        shutil.rmtree(folder)
    assert steps > 20


def run_in_process(folder: Path) -> int:
    """Finish the folder; returns how many frames the model was asked about."""
    model, bundle = Constant(), {"decision": as_steps(MISSION, Rules(), {}), "mission": {}}
    frames = triage_on_board.Frames(folder, folder / "triage.jsonl", folder / "done", "of a bundle")
    for path in frames.waiting()[0]:
        frames.finish(path, model, bundle, 1.0)  # type: ignore[arg-type]
    frames.log.close()
    return model.asked


def failing_at(step: int, folder: Path, unsynced_is_lost: bool) -> bool:
    """Whether the power failed at the step of that number; afterwards, the files that were open are closed."""
    calls, opened, synced = 0, [], 0
    real_truncate = os.truncate
    real = {name: getattr(os, name) for name in ("write", "fsync", "replace", "ftruncate", "open")}

    def fails_now() -> bool:
        nonlocal calls
        calls += 1
        return calls >= step

    def planted(name: str) -> Callable[..., Any]:
        def call(*words: Any) -> Any:
            if fails_now():
                raise PowerLoss
            if name == "write" and fails_now():
                real["write"](words[0], bytes(words[1])[: len(words[1]) // 2])
                raise PowerLoss
            found = real[name](*words)
            if name == "open":
                opened.append(found)
            if name == "fsync" and not stat.S_ISDIR(os.fstat(words[0]).st_mode):
                nonlocal synced
                synced = os.fstat(words[0]).st_size
            if fails_now():
                raise PowerLoss
            return found

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in real:
            patch.setattr(triage_on_board.os, name, planted(name))
        try:
            run_in_process(folder)
        except PowerLoss:
            if unsynced_is_lost and (folder / "triage.jsonl").exists():
                real_truncate(folder / "triage.jsonl", synced)
            return True
        finally:
            patch.undo()
            for number in opened:
                try:
                    os.close(number)
                except OSError:
                    continue
    return False


@pytest.mark.slow
def test_fifty_kills_lose_no_frame_and_judge_none_twice(bundle: Path, tmp_path: Path) -> None:
    draw = random.Random(0)
    frames: dict[str, bytes] = {}
    log = tmp_path / "triage.jsonl"
    killed_in_work = killed_before_move = 0
    with stub() as url:
        for round_ in range(50):
            for number in range(3 * round_, 3 * round_ + 3):
                frames[f"{number:03}.raw"] = frame(number)
                put(tmp_path, f"{number:03}.raw", frame(number))
            process = subprocess.Popen(
                command(bundle, tmp_path, "--url", url, "--poll", "0.02"), stderr=subprocess.DEVNULL, env={}
            )
            began, size = time.monotonic(), log.stat().st_size if log.exists() else 0
            # A start takes some tenths of a second, so wait for a line. In half of the rounds, kill at once: while the
            # line is synced to the disk, before the frame moves. In the others, at a random moment.
            random_moment = draw.random() < 0.5
            longest = draw.choice((0.2, 300)) if random_moment else 300
            while time.monotonic() < began + longest:
                if log.exists() and log.stat().st_size > size:
                    break
                time.sleep(0.001)  # the core is the client's
            time.sleep(draw.uniform(0, 0.06) if random_moment else 0)
            process.kill()
            process.wait()
            left = {path.name for path in tmp_path.glob("*.raw")}
            killed_in_work += bool(left)
            text = log.read_text() if log.exists() else ""
            killed_before_move += any(f'"file": "{name}"' in text for name in left)
        told = run_once(bundle, tmp_path, "--url", url)
    assert told.returncode == 0, told.stderr
    assert_each_once(tmp_path, frames)
    assert killed_in_work >= 10
    assert killed_before_move >= 5  # about 40 on two busy cores


# --- a server of one's own --------------------------------------------------------------------------------------


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A program that serves as llama-server does, with what it was asked and how often it was started beside it."""
    (tmp_path / "server").mkdir()
    (tmp_path / "server" / "server.py").write_text(_SERVER)
    (tmp_path / "server" / "asked").write_bytes(b"")
    (tmp_path / "server" / "faults").write_text("{}")
    path = tmp_path / "server" / "llama-server"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "{path.with_name("server.py")}" "$@"\n')
    path.chmod(0o755)
    (tmp_path / "in").mkdir()
    return path


@pytest.mark.parametrize("fault", ["dies", pytest.param("hangs", marks=pytest.mark.slow)])
def test_a_server_that_dies_or_hangs_is_started_again(bundle: Path, program: Path, fault: str) -> None:
    """One frame is answered after a new start; one makes the server fail every time, and is kept."""
    folder, faults = program.parents[1] / "in", program.with_name("faults")
    for number in range(3):
        put(folder, f"{number}.raw", frame(number))
    # Two requests per frame: the first one fails once, the second one (from request 4 on) both times.
    faults.write_text(json.dumps({"1": fault, "4": fault, "5": fault}))
    told = run_once(bundle, folder, "--llama-server", program, "--time-out", "2" if fault == "hangs" else "60")
    assert told.returncode == 1, told.stderr
    lines = lines_of(folder)
    assert [(line["file"], line["decided_by"]) for line in lines] == [
        ("0.raw", "model"), ("1.raw", "no answer"), ("2.raw", "model")
    ]  # fmt: skip
    assert lines[1]["action"] == "store"
    assert ("took longer than 2 s" if fault == "hangs" else "/completion gave no reply") in lines[1]["error"]
    started = program.with_name("started").read_text().split()
    assert len(started) == 4
    assert not any(Path(f"/proc/{pid}").exists() for pid in started)
    assert sorted(path.name for path in (folder / "done").iterdir()) == ["0.raw", "1.raw", "2.raw"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_server_ends_with_the_client(bundle: Path, program: Path, number: signal.Signals) -> None:
    """Otherwise it would keep the memory that the next one needs."""
    folder = program.parents[1] / "in"
    process = subprocess.Popen(
        command(bundle, folder, "--llama-server", program, "--poll", "0.05"), stderr=subprocess.PIPE, text=True, env={}
    )
    put(folder, "a.raw", frame(1))
    deadline = time.monotonic() + 300
    while not (folder / "done" / "a.raw").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    _, told = process.communicate(timeout=300)
    assert process.returncode == (0 if number == signal.SIGTERM else -9), told
    (pid,) = program.with_name("started").read_text().split()
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_server_that_does_not_start_is_said(bundle: Path, tmp_path: Path) -> None:
    program = tmp_path / "llama-server"
    program.write_text("#!/bin/sh\necho out of memory >&2; exit 3\n")
    program.chmod(0o755)
    put(tmp_path, "a.raw", frame(1))
    told = run_once(bundle, tmp_path, "--llama-server", program)
    assert (told.returncode, told.stderr) == (1, "error: llama-server ended (3): out of memory\n")
    assert (tmp_path / "a.raw").exists()
