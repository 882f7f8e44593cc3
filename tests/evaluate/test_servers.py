"""servers.py: real llama.cpp servers that share the work, and OpenAI's interface."""

import json
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from orion_triage.errors import OrionError, ServerError
from orion_triage.evaluate.backends import LlamaCppBackend
from orion_triage.evaluate.servers import Connected, OpenAIBackend, SharedBackend, connect, share
from orion_triage.export import quantize
from orion_triage.llama_cpp.client import Client
from orion_triage.llama_cpp.server import Server
from orion_triage.llama_cpp.toolchain import find_toolchain
from orion_triage.mission.answer import Answer
from orion_triage.mission.verdict import parse_verdict
from orion_triage.models import lfm2_vl
from tests.conftest import MISSION

TOKENS = 96


@pytest.fixture(scope="module")
def servers(tiny_pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    """Two with the Q4_K_M pair, one with the F16."""
    logs = tmp_path_factory.mktemp("servers")
    tools, backbones = find_toolchain(), (quantize.QUANTIZED, quantize.QUANTIZED, quantize.F16)
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                Server(
                    tools,
                    tiny_pair / backbone,
                    tiny_pair / quantize.MMPROJ,
                    log=logs / f"{number}.log",
                    turn=lfm2_vl.TURN,
                )
            )
            for number, backbone in enumerate(backbones)
        ]


def address(server: Server) -> tuple[str, str]:
    client = server.client
    return client.base_url, client._http.headers["Authorization"].removeprefix("Bearer ")


def connected(server: Server) -> Connected:
    return connect(*address(server), MISSION, TOKENS)


@pytest.mark.llama_cpp
def test_own_servers_share_a_small_pairs_questions(servers: list[Server], drawn_questions: Any) -> None:
    from orion_triage.evaluate import variants
    from orion_triage.evaluate.servers import share_own
    from orion_triage.settings import EvaluateSettings

    images, prompts = drawn_questions(3)
    images, prompts = [image for image in images for _ in range(2)], [prompt for prompt in prompts for _ in range(2)]

    def backend(client: Client) -> LlamaCppBackend:
        return LlamaCppBackend(client, MISSION, max_new_tokens=TOKENS, primed=True)

    shared = share_own([server.client for server in servers[:2]], backend)
    assert isinstance(shared, SharedBackend)
    assert shared.answer(images, prompts) == backend(servers[0].client).answer(images, prompts)
    assert isinstance(share_own([servers[0].client], backend), LlamaCppBackend)
    settings = EvaluateSettings()
    assert variants.how_many_servers(settings, 10**9) == (1, None)
    cores = variants.how_many_servers(settings, 10**6)
    assert cores[1] == (1 if cores[0] > 1 else None)
    all_cores = settings.model_copy(update={"threads": len(os.sched_getaffinity(0))})
    assert variants.how_many_servers(all_cores, 10**6) == (1, all_cores.threads)  # never more threads than cores
    chosen = settings.model_copy(update={"servers": 3, "threads": 4})
    assert variants.how_many_servers(chosen, 10**9) == (3, 4)


@pytest.mark.llama_cpp
def test_servers_share_the_work_and_one_that_dies_loses_nothing(servers: list[Server], drawn_questions: Any) -> None:
    images, prompts = drawn_questions(4)
    # Primed, as `connect` asks: log-probabilities after an image that is read anew for each question differ by up to
    # 0.02, which turns a near-tie on some processors.
    expected = LlamaCppBackend(servers[0].client, MISSION, max_new_tokens=TOKENS, primed=True).answer(images, prompts)
    first, second = connected(servers[0]), connected(servers[1])
    assert first.identity == second.identity
    shared = SharedBackend([first, second], pause_seconds=0.01)
    assert shared.batch_size == 12
    assert [a.text for a in shared.answer(images, prompts)] == [a.text for a in expected]
    assert shared.lost == []

    process = servers[1]._process
    assert process is not None
    process.kill()
    process.wait()
    answers = shared.answer(images, prompts)
    assert [a.text for a in answers] == [a.text for a in expected]
    assert all(a.scores is not None for a in answers)
    assert len(shared.lost) == 1
    assert second.url in shared.lost[0]
    assert [a.text for a in shared.answer(images[:2], prompts[:2])] == [a.text for a in expected[:2]]


def test_pieces_keep_an_images_questions_together_and_are_not_longer_than_a_share() -> None:
    from PIL import Image

    from orion_triage.evaluate.servers import pieces

    first, second = (Image.new("RGB", (2, 2)) for _ in range(2))  # equal, and two
    asked = [(first, "a"), (first, "b"), (second, "c"), (first, "d"), (first, "e"), (first, "f"), (first, "g")]
    cut = pieces(asked, 3)
    assert [[prompt for _, prompt in piece] for piece in cut] == [["a", "b"], ["c"], ["d", "e", "f"], ["g"]]


@pytest.mark.llama_cpp
def test_servers_of_different_models_do_not_share(servers: list[Server], monkeypatch: Any) -> None:
    urls, keys = zip(*(address(server) for server in (servers[0], servers[2])), strict=True)
    by_url = dict(zip(urls, keys, strict=True))
    from orion_triage.evaluate import servers as module

    # Servers of our own have a key each; `share` takes one for all, as a user has it.
    monkeypatch.setattr(module, "connect", lambda url, key, *rest: connect(url, by_url[url], *rest))
    with pytest.raises(OrionError, match=r"orion-f16\.gguf.*Load the same model"):
        share(urls, "", MISSION, TOKENS)
    backend, first = share(urls[:1], "", MISSION, TOKENS)
    assert isinstance(backend, SharedBackend)
    assert first.model.endswith(quantize.QUANTIZED)


def test_without_any_server_left_the_error_names_them_all(drawn_questions: Any) -> None:
    class Dead:
        batch_size = 1

        def answer(self, images: Any, prompts: Any) -> list[Answer]:
            raise ServerError("broke off.")

    shared = SharedBackend([Connected(f"http://{n}", Dead(), "", "", "") for n in range(2)], pause_seconds=0)
    images, prompts = drawn_questions(3)
    with pytest.raises(ServerError, match=r"no server is left: http://\d: broke off\.; http://\d: broke off\."):
        shared.answer(images, prompts)


@pytest.mark.llama_cpp
def test_the_chat_interface_gives_the_same_answers(servers: list[Server], drawn_questions: Any) -> None:
    images, prompts = drawn_questions(2)
    client = servers[2].client
    expected = [
        answer.text for answer in LlamaCppBackend(client, MISSION, max_new_tokens=TOKENS).answer(images, prompts)
    ]
    chat = OpenAIBackend(client, client.served_models()[0], max_new_tokens=TOKENS).answer(images, prompts)
    assert [answer.text for answer in chat] == expected
    assert all(parse_verdict(MISSION, answer.text) and answer.scores is None for answer in chat)


class _OpenAI(BaseHTTPRequestHandler):
    """The two pages of OpenAI's interface, and none of llama.cpp's."""

    asked: list[dict[str, Any]]

    def do_GET(self) -> None:
        self._reply({"data": [{"id": "a-model"}]} if self.path == "/v1/models" else None)

    def do_POST(self) -> None:
        self.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self._reply({"choices": [{"message": {"content": "said"}}]})

    def _reply(self, value: Any) -> None:
        body = json.dumps(value or {}).encode()
        self.send_response(200 if value else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def test_a_server_without_llama_cpps_pages_is_asked_as_openais(drawn_questions: Any) -> None:
    _OpenAI.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), _OpenAI)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        found = connect(f"http://127.0.0.1:{server.server_port}", "", MISSION, TOKENS)
        assert (found.model, found.build) == ("a-model", "OpenAI API")
        images, prompts = drawn_questions(1)
        assert found.backend.answer(images, prompts) == [Answer("said")]
    finally:
        server.shutdown()
        server.server_close()
    (asked,) = _OpenAI.asked
    assert (asked["model"], asked["temperature"], asked["max_tokens"]) == ("a-model", 0, TOKENS)
    picture, text = asked["messages"][0]["content"]
    assert picture["image_url"]["url"].startswith("data:image/png;base64,iVBOR")
    assert text == {"type": "text", "text": prompts[0].removeprefix("<image>")}
    with pytest.raises(ServerError, match="no server answers"):
        connect(f"http://127.0.0.1:{server.server_port}", "", MISSION, TOKENS)
