"""check_flight.py with real servers: go, and every changed file, other model and dying server is no-go."""

import ast
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from orion_triage.export import quantize
from orion_triage.flight import bundle, check_flight, decide_frame
from orion_triage.llama_cpp.client import Client
from orion_triage.llama_cpp.server import Server
from orion_triage.llama_cpp.toolchain import Toolchain
from orion_triage.llama_cpp.tools import quantize_file
from orion_triage.runs.run import Run
from orion_triage.safe.files import sha256_of_file
from tests.flight.bundles import RISK, assert_no_go, check, checked, key_of, program_at, sign, stub

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
def test_go_with_a_server_of_its_own(copied: Path, toolchain: Toolchain, tmp_path: Path) -> None:
    before = {path.name for path in copied.iterdir()}
    # A proxy in the environment must not see the frames, nor a key of the user's be used.
    (tmp_path / "key").write_text("mine as well")
    elsewhere = {"http_proxy": "http://127.0.0.1:1", "LLAMA_API_KEY": "mine", "ORION_KEY_FILE": str(tmp_path / "key")}
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
    assert f"the server's peak memory: {report['peak_bytes'] / 1e6:.0f} MB" in check_flight.lines_of(report)
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
    program = program_at(tmp_path, f"touch {started}")
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
    dead = program_at(tmp_path, "seq 9; echo out of memory >&2; exit 3")
    assert_no_go(check(copied, "--llama-server", dead), "llama-server ended (3): 8 | 9 | out of memory")
    another = program_at(tmp_path, "echo version 1")  # a program that serves nothing, and ends well
    assert_no_go(check(copied, "--llama-server", another, "--limit", "60"), "llama-server ended (0): version 1")
    script = tmp_path / "dies.py"
    script.write_text(_DIES)
    midway = program_at(tmp_path, f'exec {sys.executable} {script} "$@"')
    assert_no_go(check(copied, "--llama-server", midway), "llama-server ended (7): killed by the kernel")
    hanging = program_at(tmp_path, f"echo $$ > {tmp_path}/pid; exec sleep 60")
    result = check(copied, "--llama-server", hanging, "--limit", "2")
    assert_no_go(result, "waiting for the server took longer than 2 s")  # after 60 s it would have ended by itself
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()


@pytest.mark.llama_cpp
def test_a_server_that_ignores_its_end_is_killed(copied: Path, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    program = program_at(tmp_path, f"trap '' TERM; echo $$ > {pid}; exec sleep 60")
    with check_flight.OwnServer(copied, program) as own:
        while not (pid.exists() and pid.read_text().strip()):
            assert own.is_alive()
            time.sleep(0.05)
    assert not Path(f"/proc/{pid.read_text().strip()}").exists()


@pytest.mark.llama_cpp
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_check_stops_its_server(copied: Path, tmp_path: Path, number: signal.Signals) -> None:
    pid = tmp_path / "pid"
    program = program_at(tmp_path, f"echo $$ > {pid}; exec sleep 60")
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
