"""What a kill, a second run, a flipped bit or a lying server may not do."""

import errno
import hashlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from orion_triage.dataset.dataset import Dataset
from orion_triage.errors import OrionError, ServerError, obstacle
from orion_triage.evaluate.servers import SharedBackend, connect
from orion_triage.export import quantize
from orion_triage.llama_cpp import client
from orion_triage.llama_cpp.client import Client
from orion_triage.llama_cpp.server import Server
from orion_triage.llama_cpp.toolchain import find_toolchain
from orion_triage.models import lfm2_vl
from orion_triage.runs import manifest
from orion_triage.safe import files
from orion_triage.settings import FineTuneSettings
from orion_triage.train import fine_tune
from orion_triage.train.checkpoints import HASHES_FILE
from orion_triage.train.trainer import _watch
from tests.conftest import MISSION

from . import warm

WAIT_SECONDS = 300  # of what takes a moment, on a machine that does a lot else
# A command that has begun to write into the run folder that it is given, and does not end by itself.
WAITING = """
import sys, time
from pathlib import Path
from orion_triage import cli
from orion_triage.safe.files import locked, replaced_folder, temporary_folder
def wait(run: Path):
    with locked(run, "x"), temporary_folder(run, "ladder"), replaced_folder(run / "made") as new:
        (new / "file").write_text("half")
        print("begun", flush=True)
        time.sleep(600)
cli.app.command()(wait)
sys.argv = ["orion", "wait", sys.argv[1]]
cli.main()
"""


def started(code: str, *words: object) -> "subprocess.Popen[str]":
    """A Python process that has printed its first line."""
    command = [sys.executable, "-c", code, *map(str, words)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.first_line = process.stdout.readline().strip()  # type: ignore[attr-defined]
    return process


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def wait_for(what: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + WAIT_SECONDS
    while not what() and time.monotonic() < deadline:
        time.sleep(0.05)
    return what()


# --- kills ----------------------------------------------------------------------------------------------------------


@pytest.mark.llama_cpp
@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM])
def test_a_server_of_ours_dies_with_its_parent(tiny_pair: Path, tmp_path: Path, kill: signal.Signals) -> None:
    code = """
import sys, time
from pathlib import Path
from orion_triage.llama_cpp.server import Server
from orion_triage.llama_cpp.toolchain import find_toolchain
with Server(find_toolchain(), Path(sys.argv[1]), None, log=Path(sys.argv[2])) as server:
    print(server._process.pid, flush=True)
    time.sleep(600)
"""
    parent = started(code, tiny_pair / quantize.QUANTIZED, tmp_path / "server.log")
    server = int(parent.first_line)  # type: ignore[attr-defined]
    assert "llama-server" in str(Path(f"/proc/{server}/exe").readlink())
    parent.send_signal(kill)
    parent.wait(WAIT_SECONDS)
    assert wait_for(lambda: is_gone(server))


def test_a_tool_of_ours_dies_with_its_parent(tmp_path: Path) -> None:
    code = """
import os, sys
from orion_triage.llama_cpp.tools import run_measured
command = [sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(600)"]
with open(sys.argv[1], "w") as output:
    print("begun", flush=True)
    run_measured(command, dict(os.environ), output)
"""
    said = tmp_path / "said.txt"
    parent = started(code, said)
    assert wait_for(lambda: said.exists() and said.read_text().strip().isdigit())
    tool = int(said.read_text())
    assert not is_gone(tool)
    parent.kill()
    parent.wait(WAIT_SECONDS)
    assert wait_for(lambda: is_gone(tool))


def test_the_cost_of_a_tool_is_that_of_its_children_too(tmp_path: Path) -> None:
    """Measured from a small process: what it is started from counts, too (fork), and these tests take a gigabyte."""
    code = """
import json, os, sys
from orion_triage.llama_cpp.tools import run_measured
child = "import time; block = b'x' * 300_000_000; time.sleep(0.3)"
parent = f"import subprocess, sys; subprocess.run([sys.executable, '-I', '-S', '-c', {child!r}], check=True)"
with open(sys.argv[1], "w") as output:
    status, use = run_measured([sys.executable, "-I", "-S", "-c", parent], dict(os.environ), output)
print(json.dumps([status, use.peak_memory_bytes, use.seconds]))
"""
    command = [sys.executable, "-c", code, str(tmp_path / "output")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    status, peak_memory_bytes, seconds = json.loads(said)
    assert status == 0
    assert 300e6 < peak_memory_bytes < 400e6
    assert seconds > 0.3


def test_workers_of_ours_die_with_their_parent(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("""
import os, time
from orion_triage.safe.children import workers
if __name__ == "__main__":
    with workers() as pool:
        print(pool.submit(os.getppid).result(), *pool._processes, flush=True)
        list(pool.map(time.sleep, [600] * 9))
""")
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    of_a_worker, *children = (int(word) for word in parent.stdout.readline().split())
    assert of_a_worker == parent.pid
    assert children
    parent.kill()
    parent.wait(WAIT_SECONDS)
    assert wait_for(lambda: all(is_gone(child) for child in children))


def test_a_folder_that_a_kill_left_between_two_renames_comes_back(tmp_path: Path) -> None:
    folder, old, partial = tmp_path / "made", tmp_path / ".made.old", tmp_path / ".made.partial"
    for place, text in ((old, "before"), (partial, "half")):
        place.mkdir()
        (place / "file").write_text(text)
    with pytest.raises(OrionError), files.replaced_folder(folder):
        assert (folder / "file").read_text() == "before"
        raise OrionError("it fails.")
    assert (folder / "file").read_text() == "before"
    with files.replaced_folder(folder) as new:
        (new / "file").write_text("after")
    assert (folder / "file").read_text() == "after"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_a_second_run_in_a_folder_is_refused_while_the_first_one_lives(tmp_path: Path) -> None:
    code = """
import sys, time
from pathlib import Path
from orion_triage.safe.files import locked
with locked(Path(sys.argv[1]), "orion run"):
    print("held", flush=True)
    time.sleep(600)
"""
    run = tmp_path / "runs" / "tiny"
    first = started(code, run)
    try:
        command = [sys.executable, "-m", "orion_triage.cli", "dataset", "--run", str(run)]
        second = subprocess.run(command, capture_output=True, text=True, check=False)
        assert second.returncode == 1
        assert f"is in use by orion run (process {first.pid})" in second.stderr
        assert "Traceback" not in second.stderr
        assert [path.name for path in run.iterdir()] == [".lock"]
    finally:
        first.kill()
        first.wait()
    with files.locked(run, "this"), files.locked(run, "this, again"):
        pass


@pytest.mark.parametrize("kill", [signal.SIGTERM, signal.SIGINT])
def test_a_command_that_is_ended_leaves_nothing_half_written(tmp_path: Path, kill: signal.Signals) -> None:
    ended = started(WAITING, tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir())[0].startswith(".ladder-")
    ended.send_signal(kill)
    assert ended.wait(WAIT_SECONDS) == 128 + kill
    assert not (tmp_path / "run").exists()  # the folder was new, and nothing is in it


def test_a_signal_that_a_library_loses_ends_the_command_all_the_same() -> None:
    code = """
import sys, time
from orion_triage import cli
cli._REPEAT_SECONDS = 0.5
class Finalized:
    def __del__(self):
        print("begun", flush=True)
        time.sleep(600)
def wait(lost: str):
    if lost == "in a finalizer":
        Finalized()
    try:
        if lost != "in a finalizer":
            print("begun", flush=True)
            time.sleep(600)
    except BaseException:  # as in a finalizer, or where a compiled module is initialized
        if lost == "renamed":
            raise ImportError("initialization failed")
    try:
        time.sleep(600)
    finally:
        time.sleep(1.5)  # a clean-up is not disturbed by being told again
        print("clean", flush=True)
cli.app.command()(wait)
sys.argv = ["orion", "wait", sys.argv[1]]
cli.main()
"""
    cases = [
        (lost, kill) for lost in ("swallowed", "renamed", "in a finalizer") for kill in (signal.SIGTERM, signal.SIGINT)
    ]
    processes = [  # beside each other, since they wait most of the time
        subprocess.Popen([sys.executable, "-c", code, lost], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for lost, _ in cases
    ]
    try:
        for case, process in zip(cases, processes, strict=True):
            assert process.stdout is not None
            assert process.stdout.readline() == "begun\n", case
        for (_, kill), process in zip(cases, processes, strict=True):
            process.send_signal(kill)
        for (lost, kill), process in zip(cases, processes, strict=True):
            said, errors = process.communicate(timeout=WAIT_SECONDS)
            assert process.returncode == 128 + kill, (lost, kill)
            assert said == ("" if lost == "renamed" else "clean\n"), (lost, kill)
            assert errors == "interrupted: run the same command again to resume\n", (lost, kill)
    finally:
        for process in processes:
            process.kill()


def test_whoever_comes_next_clears_what_a_killed_run_left(tmp_path: Path) -> None:
    killed = started(WAITING, tmp_path / "run")
    killed.kill()
    killed.wait(WAIT_SECONDS)
    left = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert len(left) == 3  # the lock's file, the folder that was filled, the temporary one
    with files.locked(tmp_path / "run", "next"):
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


@pytest.mark.llama_cpp
def test_our_server_answers_nobody_else(tiny_pair: Path, tmp_path: Path) -> None:
    tools = find_toolchain()
    with Server(tools, tiny_pair / quantize.QUANTIZED, None, log=tmp_path / "server.log") as server:
        url, process = server.client.base_url, server._process
        assert process is not None
        port = int(url.rpartition(":")[2])
        lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        listening = [line[1] for line in lines if line[3] == "0A" and line[1].endswith(f":{port:04X}")]
        assert listening == [f"0100007F:{port:04X}"]  # 127.0.0.1 and nothing else
        key = server.client._http.headers["Authorization"].removeprefix("Bearer ")
        assert len(key) >= 32
        assert key not in Path(f"/proc/{process.pid}/cmdline").read_text()
        assert key not in (tmp_path / "server.log").read_text()
        page = {"Origin": "https://example.org"}
        body = {"prompt": "x", "n_predict": 1}
        for path in ("/completion", "/v1/chat/completions", "/tokenize", "/props"):
            assert httpx.post(url + path, json=body, headers=page).status_code == 401
        with_key = page | {"Authorization": f"Bearer {key}"}
        answer = httpx.post(url + "/completion", json=body, headers=with_key)
        assert answer.status_code == 200
        assert answer.headers["Access-Control-Allow-Origin"] == "none"
        asked = httpx.request("OPTIONS", url + "/completion", headers=page)
        assert asked.headers["Access-Control-Allow-Origin"] == "none"
        assert asked.headers["Access-Control-Allow-Credentials"] == "false"
        assert httpx.get(url + "/slots", headers=with_key).status_code in (404, 501)
        assert httpx.post(url + "/props", json={}, headers=with_key).status_code in (404, 501)
        assert httpx.get(url + "/", headers=with_key).status_code == 404


@pytest.mark.llama_cpp
def test_threads_that_wait_soon_sleep_in_torch_and_spin_in_llama_cpp(
    tiny_pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    code = """
import os
from orion_triage import cli
cli.app = lambda: print(os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT"), flush=True)
cli.main()
"""
    assert started(code).first_line == "PASSIVE 2000"  # type: ignore[attr-defined]
    monkeypatch.setenv("GOMP_SPINCOUNT", "1000")
    assert started(code).first_line == "None 1000"  # type: ignore[attr-defined]
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    with Server(find_toolchain(), tiny_pair / quantize.QUANTIZED, None, log=tmp_path / "log") as server:
        assert server._process is not None
        environment = Path(f"/proc/{server._process.pid}/environ").read_bytes()
        assert b"OMP_WAIT_POLICY" not in environment
        assert b"GOMP_SPINCOUNT" not in environment


# --- training -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Paged optimizers:UserWarning")
def test_a_loss_that_is_no_number_stops_training_and_names_the_last_good_checkpoint(
    small_base: Path, small_dataset: Path, tmp_path: Path
) -> None:
    sound = FineTuneSettings(micro_batch_size=8, gradient_accumulation_steps=1, epochs=1, gradient_checkpointing=False)
    settings = sound.model_copy(update={"learning_rate": 1e30})
    with pytest.raises(OrionError, match=r"loss is (nan|inf) at step \d of 3; there is no checkpoint yet") as raised:
        fine_tune.run(small_base, Dataset(small_dataset, MISSION), tmp_path / "out", tmp_path / "work", settings, 256)
    assert "Lower fine_tune.learning_rate" in raised.value.fix
    assert not (tmp_path / "out").exists()
    checkpoints = tmp_path / "checkpoints"
    for step, whole in ((3, True), (6, False)):
        (checkpoints / f"checkpoint-{step}").mkdir(parents=True)
        (checkpoints / f"checkpoint-{step}" / "weights").write_bytes(b"")
        hashes = {"weights": hashlib.sha256(b"").hexdigest()}
        (checkpoints / f"checkpoint-{step}" / HASHES_FILE).write_text(json.dumps(hashes) if whole else "")
    watch = _watch(lambda *_: None)
    state = SimpleNamespace(global_step=7, max_steps=9)
    with pytest.raises(OrionError, match=r"eval_loss is nan at step 7 of 9; the last good checkpoint is .*-3\."):
        watch.on_log(SimpleNamespace(output_dir=str(checkpoints)), state, None, {"eval_loss": float("nan")})
    assert (checkpoints / "checkpoint-6").exists()  # only a training that goes on clears up


@pytest.mark.skipif(sys.platform != "linux", reason="limits its own address space")
def test_a_full_memory_says_which_setting_takes_less(small_base: Path, small_dataset: Path, tmp_path: Path) -> None:
    code = """
import resource, sys
from pathlib import Path
from orion_triage.dataset.dataset import Dataset
from orion_triage.mission.mission import default_mission
from orion_triage.train import fine_tune
from orion_triage.settings import FineTuneSettings
from orion_triage.errors import OrionError
base, dataset, out = map(Path, sys.argv[1:])
settings = FineTuneSettings(micro_batch_size=8, gradient_accumulation_steps=1, epochs=1, gradient_checkpointing=False)
make_trainer = fine_tune.make_trainer
def limited(*arguments):
    trainer = make_trainer(*arguments)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 20_000_000,) * 2)
    return trainer
fine_tune.make_trainer = limited
try:
    fine_tune.run(base, Dataset(dataset, default_mission()), out / "out", out / "work", settings, 256)
except OrionError as error:
    print(error.message, "|", error.fix)
"""
    command = [warm.python(), "-c", code, str(small_base), str(small_dataset), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "fine-tuning ran out of memory: " in done.stdout, done.stderr[-2000:]
    assert (
        "| Set fine_tune.micro_batch_size=4 and fine_tune.gradient_accumulation_steps=2 (same records per step)."
        in done.stdout
    )


# --- disks ----------------------------------------------------------------------------------------------------------


def test_what_the_operating_system_refuses_is_one_line(tmp_path: Path) -> None:
    full = obstacle(OSError(errno.ENOSPC, "No space left on device", "/a/b"))
    assert full is not None
    assert full.message == "/a/b: No space left on device."
    assert full.fix.startswith("Free some space")
    nameless = obstacle(OSError(errno.EIO, "Input/output error"))
    assert nameless is not None
    assert nameless.message == "Input/output error."
    with pytest.raises(OSError, match="Not a directory") as raised:
        (tmp_path / "file").touch() or (tmp_path / "file" / "x").read_text()
    locked_out = obstacle(raised.value)
    assert locked_out is not None
    assert locked_out.fix == "Check the path and its permissions."
    rust = obstacle(RuntimeError("I/O error: No space left on device (os error 28)"))
    assert rust is not None
    assert rust.message == "No space left on device."
    torch_ = obstacle(RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"))
    assert torch_ is not None
    assert "a write failed: the disk is full or faulty" in torch_.message
    assert obstacle(ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")) is None
    assert obstacle(ValueError("ours")) is None


# --- bits -----------------------------------------------------------------------------------------------------------


def test_verify_names_a_flipped_bit_a_lost_file_and_a_new_one(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("one")
    (tmp_path / "b").write_text("two")
    manifest.write_manifest(tmp_path, stage="x", settings={}, inputs={}, seconds=0)
    assert manifest.damaged(tmp_path) == []
    (tmp_path / "a").write_text("ona")
    (tmp_path / "b").unlink()
    (tmp_path / "c").write_text("three")
    a, b, c = manifest.damaged(tmp_path)
    assert "a has sha256" in a
    assert "b is missing" in b
    assert "c was added" in c


def test_a_hash_that_is_kept_does_not_outlive_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for text in ("one", "two", "six"):  # of one length, within one tick of the file system's clock
        path.write_text(text)
        assert files.sha256_of_file(path) == files.sha256_of_text(text)
    time.sleep(0.1)
    assert files.sha256_of_file(path) == files.sha256_of_file(path) == files.sha256_of_text("six")
    path.write_text("ten")
    assert files.sha256_of_file(path) == files.sha256_of_text("ten")


# --- servers --------------------------------------------------------------------------------------------------------

PROPS = {"model_path": "a.gguf", "build_info": "b1", "chat_template": "t", "media_marker": "<__media__>"}


class Liar(BaseHTTPRequestHandler):
    """A llama.cpp server as far as /props goes; `how` says what it does to a question."""

    how = ""
    props = PROPS
    asked = 0

    def do_GET(self) -> None:
        if self.path in Liar.how:
            return self.drip(b"HTTP/1.1 200 OK\r\nX-Wait: ")
        return self.say(200, {"status": "ok"} if self.path == "/health" else self.props)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/tokenize":
            return self.say(200, {"tokens": TOKENS.pop(0) if TOKENS else [1]})
        Liar.asked += 1
        good = {"content": "x", "tokens_predicted": 1, "stop_type": "eos"}
        body = json.dumps(good).encode()
        match Liar.how:
            case "login page":
                self.say(200, b"<html>Sign in</html>", "text/html")
            case "cut JSON":
                self.say(200, body[: len(body) // 2])
            case "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                self.connection.close()
            case "reset in the middle":
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[:5])
                self.wfile.flush()
                self.connection.close()
            case "gigabytes":
                self.send_response(200)
                self.end_headers()
                with suppress(OSError):  # hung up on
                    for _ in range(1000):
                        self.wfile.write(b" " * 1_000_000)
            case "drip":
                self.drip(b"HTTP/1.1 200 OK\r\n\r\n")
            case "drip of headers":
                self.drip(b"HTTP/1.1 200 OK\r\nX-Wait: ")
            case "stall":
                time.sleep(60)  # and hangs up, which is told from a limit that was kept
            case "no content":
                self.say(200, {"choices": []})
            case "another's answer":
                self.say(200, good | {"prompt": "user\nAnother question<|im_end|>\n<|im_start|>assistant\n"})
            case "deep":
                self.say(200, b"[" * 100_000)
            case "swapped":
                Liar.props = PROPS | {"model_path": "b.gguf"}
                self.say(200, good)
            case status:
                self.say(int(status), {"error": "no"})
        return None

    def drip(self, start: bytes) -> None:
        with suppress(OSError):  # hung up on
            self.wfile.write(start)
            while True:
                self.wfile.write(b" ")
                time.sleep(0.05)

    def say(self, status: int, value: Any, kind: str = "application/json") -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


TOKENS: list[list[int]] = []


@contextmanager
def liar(how: str) -> Iterator[str]:
    Liar.how, Liar.props, Liar.asked = how, PROPS, 0
    TOKENS[:] = [[9], [9, 1], [9, 2], [9, 3], [9]]  # of the cue, of the three labels after it, and of where they part
    server = ThreadingHTTPServer(("127.0.0.1", 0), Liar)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("login page", "answered text/html instead of a JSON object: '<html>Sign in"),
        ("cut JSON", "instead of a JSON object"),
        ("reset", "the connection to .* broke"),
        ("reset in the middle", "the connection to .* broke"),
        ("gigabytes", "is larger than 20 MB"),
        ("drip", "did not finish its reply within 1 s"),
        ("drip of headers", "did not finish its reply within 1 s"),
        ("stall", "did not finish its reply within 1 s"),
        ("no content", "no content"),
        ("deep", "instead of a JSON object"),
        ("another's answer", "the server's reply belongs to another prompt: .*Another question"),
        ("swapped", r"the server no longer serves a\.gguf"),
        ("400", "answered 400"),
        ("401", r"refused the key \(401\)"),
        ("429", "answered 429"),
        ("500", "answered 500"),
    ],
)
def test_no_lie_of_a_server_is_counted_as_an_answer(
    how: str, said: str, drawn_questions: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, prompts = drawn_questions(1)
    # A limit that is reached sooner: 1 s instead of 10 minutes.
    monkeypatch.setattr(Client.__init__, "__kwdefaults__", {"model": "", "timeout_seconds": 1.0})
    monkeypatch.setattr("orion_triage.llama_cpp.client.RATE_LIMIT_SECONDS", 1.5)  # instead of 2 minutes
    with liar(how) as url:
        shared = SharedBackend([connect(url, "", MISSION, 96)], pause_seconds=0)
        with pytest.raises(ServerError, match=f"no server is left: {url}: .*{said}.*run the same command again"):
            shared.answer(images, prompts)
        # The image and the question, once, where that is noticed after them; 429 is waited out, and not tried again
        # after that; else three tries of what goes wrong.
        assert Liar.asked == {"swapped": 2, "another's answer": 4, "429": 2}.get(how, 3)


def test_a_server_that_drips_before_it_is_asked_is_hung_up_on_too() -> None:
    with liar("/health") as url, pytest.raises(ServerError, match="no server answers"):
        Client(url).ready(1)
    with liar("/props") as url, pytest.raises(ServerError, match="/props did not finish its reply within 1 s"):
        Client(url, timeout_seconds=1).props()


def test_a_server_that_is_still_loading_is_waited_for_and_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    # A limit that is reached sooner.
    monkeypatch.setattr(client, "LOADING_SECONDS", 1)
    with liar("503") as url, pytest.raises(ServerError, match="answered 503"):
        Client(url, turn=lfm2_vl.TURN).completion("x", b"", 1)
    assert Liar.asked > 2
