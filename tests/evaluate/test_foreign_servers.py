"""servers.py: who answers is named. Stand-ins for servers that people run, and the command line in front of them."""

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from orion_triage.errors import OrionError, ServerError
from orion_triage.evaluate.servers import connect, share, split_address
from orion_triage.llama_cpp.server import Server
from orion_triage.llama_cpp.toolchain import Toolchain
from orion_triage.mission.answer import Answer
from orion_triage.mission.scoring import label_tree
from orion_triage.runs.manifest import FILE_NAME, read_manifest
from orion_triage.runs.run import Run
from orion_triage.settings import Settings
from tests.conftest import MISSION, orion

TOKENS = 96
BASE, ADAPTER = "LiquidAI/LFM2.5-VL-1.6B", "orion"
KOBOLD_PROPS = {"chat_template": "", "total_slots": 1, "default_generation_settings": {"n_ctx": 4096}}


@dataclass
class StandIn:
    """A server: its models, pages by path, and what it answers to an unknown address; `asked` are the requests."""

    models: list[str]
    pages: dict[str, Any] = field(default_factory=dict)
    unknown: int = 404
    url: str = ""
    asked: list[tuple[str, Any]] = field(default_factory=list)

    def reply(self, path: str, body: Any) -> tuple[int, Any]:
        if path in self.pages:
            return 200, self.pages[path]
        if path == "/v1/models":
            return 200, {"object": "list", "data": [{"id": name, "object": "model"} for name in self.models]}
        if path == "/v1/chat/completions" and body["model"] in self.models:
            text = json.dumps({"reason": f"Said by {body['model']}.", "category": "HIGH"})
            return 200, {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]}
        return self.unknown, {"error": f"Unexpected endpoint or method. ({path})"}


class Router(StandIn):
    """llama-server with several models: a request that names none of them is refused, as b10605 does."""

    def reply(self, path: str, body: Any) -> tuple[int, Any]:
        page, _, query = path.partition("?model=")
        model = unquote(query) or (body or {}).get("model", "")
        if page == "/health":
            return 200, {"status": "ok"}
        if page == "/v1/models":
            return super().reply(page, None)
        if page == "/props" and not model:
            return 200, {"role": "router", "model_path": "none", "build_info": "b10605", "model_alias": "llama-server"}
        if model not in self.models:
            return 400, {"error": {"message": f"model {model!r} not found"}}
        if page == "/props":
            settings = {"n_ctx": 2048, "params": {"lora": []}}
            return 200, {
                "model_path": f"models/{model}.gguf",
                "model_alias": model,
                "build_info": "b10605",
                "default_generation_settings": settings,
            }
        if page == "/tokenize":
            return 200, {"tokens": list(body["content"].encode())}
        return 200, {"content": f"Said by {model}.", "tokens_predicted": 4, "stopping_word": ""}


@contextmanager
def running(stand_in: StandIn) -> Iterator[StandIn]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else a body waits up to 40 ms for the acknowledgement of its header

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "null")
            stand_in.asked.append((self.path, body))
            status, value = stand_in.reply(self.path, body)
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_POST = do_GET  # noqa: N815 - the name that http.server looks for

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    stand_in.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield stand_in
    finally:
        server.shutdown()
        server.server_close()


def answer_of(address: str, drawn_questions: Any) -> tuple[str, str]:
    """(model, first answer) of the server at an address."""
    images, prompts = drawn_questions(1)
    found = connect(address, "", MISSION, TOKENS)
    return found.model, found.backend.answer(images, prompts)[0].text


def test_lm_studio_which_answers_200_to_every_address_is_used(drawn_questions: Any) -> None:
    with running(StandIn(["orion-lfm2.5-vl-1.6b"], unknown=200)) as server:
        model, text = answer_of(server.url, drawn_questions)
    assert (model, json.loads(text)["reason"]) == ("orion-lfm2.5-vl-1.6b", "Said by orion-lfm2.5-vl-1.6b.")


def test_a_lora_that_vllm_lists_after_its_base_is_chosen_by_name(drawn_questions: Any) -> None:
    with running(StandIn([BASE, ADAPTER], {"/health": {}})) as server:
        with pytest.raises(ServerError, match=rf"lists 2 models: '{BASE}', '{ADAPTER}'\..*#") as refused:
            connect(server.url, "", MISSION, TOKENS)
        assert server.url in refused.value.fix
        with pytest.raises(ServerError, match="has no model 'gone'; it lists"):
            connect(f"{server.url}#gone", "", MISSION, TOKENS)
        assert answer_of(f"{server.url}#{ADAPTER}", drawn_questions)[0] == ADAPTER
        assert "Said by orion." in answer_of(f"{server.url}/v1#{ADAPTER}", drawn_questions)[1]
        assert "Said by LiquidAI" in answer_of(f"{server.url}#{BASE}", drawn_questions)[1]


def test_a_model_that_is_not_listed_is_asked_if_the_server_lists_none(drawn_questions: Any) -> None:
    """`transformers serve FOLDER` lists the models in its cache alone."""
    with running(StandIn(["folder"], {"/v1/models": {"object": "list", "data": []}})) as server:
        with pytest.raises(ServerError, match="lists no model") as refused:
            connect(server.url, "", MISSION, TOKENS)
        assert "#MODEL" in refused.value.fix
        backend, first = share([f"{server.url}#folder"], "", MISSION, TOKENS)
        images, prompts = drawn_questions(1)
        assert "Said by folder." in backend.answer(images, prompts)[0].text
    assert first.model == "folder"


def test_koboldcpp_has_props_and_is_not_llama_cpp(drawn_questions: Any) -> None:
    with running(StandIn(["koboldcpp/orion-q4_k_m"], {"/props": KOBOLD_PROPS})) as server:
        found = connect(server.url, "", MISSION, TOKENS)
    assert (found.model, found.build) == ("koboldcpp/orion-q4_k_m", "OpenAI API")


def test_a_router_is_asked_for_one_of_its_models_in_every_request(drawn_questions: Any) -> None:
    with running(Router(["base", "my orion"])) as server:
        with pytest.raises(ServerError, match="lists 2 models: 'base', 'my orion'"):
            connect(server.url, "", MISSION, TOKENS)
        server.asked.clear()
        backend, first = share([f"{server.url}#my orion"], "", MISSION, TOKENS)
        images, prompts = drawn_questions(1)
        assert backend.answer(images, prompts) == [Answer("Said by my orion.")]
    assert (first.model, first.build) == ("models/my orion.gguf", "llama.cpp b10605")
    assert first.said["context_tokens"] == 2048
    named = [path.partition("?model=")[2] or (body or {}).get("model") for path, body in server.asked]
    assert {(body or {}).get("model") for path, body in server.asked if path == "/completion"} == {"my orion"}
    asked_for = {path: name for (path, _), name in zip(server.asked, named, strict=True) if name}
    assert "/props?model=my%20orion" in asked_for


def test_a_tokenizer_that_gives_a_label_no_token_of_its_own_is_refused() -> None:
    for tokenize in (lambda text: [1, 2, 3], lambda text: []):
        with pytest.raises(OrionError, match="tokenizer merges the category HIGH with the text before it"):
            label_tree(MISSION, tokenize)
    with pytest.raises(OrionError, match="does not tell the categories HIGH and MEDIUM and LOW apart"):
        label_tree(MISSION, lambda text: [1] * len(text))


@pytest.mark.parametrize(
    "form", ["{url}", "{url}/", "{url}/v1", "{url}/v1/", "{url}/v1/chat/completions", "{host}", "{host}/v1"]
)
def test_every_address_that_people_copy_reaches_the_server(form: str) -> None:
    with running(StandIn(["a-model"])) as server:
        found = connect(form.format(url=server.url, host=server.url.removeprefix("http://")), "", MISSION, TOKENS)
    assert (found.url, found.model) == (server.url, "a-model")


def test_an_address_that_is_none_is_refused() -> None:
    assert split_address(" https://gpu.example:8000/llm/v1#a/b ") == ("https://gpu.example:8000/llm", "a/b")
    for wrong in ("", "ftp://x", "http://", "http://x:99999", "http://x:0", "http://[::1", "http://x/?key=1"):
        with pytest.raises(OrionError, match="is not an http"):
            split_address(wrong)


@pytest.mark.parametrize(
    "proxies",
    [
        {"HTTP_PROXY": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"},
        {"ALL_PROXY": "socks5://127.0.0.1:1080"},
        {"HTTP_PROXY": "http://127.0.0.1:9", "NO_PROXY": "localhost,127.0.0.1,::1,[::1]"},
        {"NO_PROXY": "[::1]"},
    ],
)
def test_a_server_on_this_machine_is_asked_without_a_proxy(
    proxies: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in proxies.items():
        monkeypatch.setenv(name, value)
    with running(StandIn(["a-model"])) as server:
        assert connect(server.url, "", MISSION, TOKENS).model == "a-model"
        assert connect(server.url.replace("127.0.0.1", "localhost"), "", MISSION, TOKENS).model == "a-model"


def test_a_proxy_that_cannot_be_used_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ALL_PROXY", "socks5://user:secret@127.0.0.1:1080")
    with pytest.raises(OrionError, match=r"ALL_PROXY=socks5://127\.0\.0\.1:1080") as refused:
        connect("http://gpu.example:8000", "", MISSION, TOKENS)
    assert "secret" not in str(refused.value)
    assert "\n" not in str(refused.value)
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    with pytest.raises(ServerError, match=r"no server answers at http://gpu\.example:8000 through .*ALL_PROXY="):
        connect("http://gpu.example:8000", "", MISSION, TOKENS)


NUMBERS = {"LLAMA_ARG_CACHE_TYPE_K": "q4_0", "GGML_CUDA_FORCE_MMQ": "1", "MTMD_BACKEND_DEVICE": "x", "HF_TOKEN": "hf_x"}


def test_an_own_servers_environment_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for llama-server writes what it gets, and ends."""
    for name, value in (NUMBERS | {"CUDA_VISIBLE_DEVICES": "0", "OMP_NUM_THREADS": "3"}).items():
        monkeypatch.setenv(name, value)
    program = tmp_path / "llama-server"
    program.write_text(f'#!/bin/sh\nenv > "{tmp_path}/environment"\nprintf "%s\\n" "$@" > "{tmp_path}/arguments"\n')
    program.chmod(0o755)
    toolchain = Toolchain(tmp_path, program, program, 1, "a stand-in")
    with pytest.raises(ServerError, match="did not start"), Server(toolchain, tmp_path, None, log=tmp_path / "log"):
        pass
    names = {line.partition("=")[0] for line in (tmp_path / "environment").read_text().splitlines()}
    assert {"PATH", "LLAMA_API_KEY", "CUDA_VISIBLE_DEVICES"} <= names
    assert not set(NUMBERS) & names
    arguments = (tmp_path / "arguments").read_text().splitlines()
    assert arguments[arguments.index("--threads") + 1] == "3"


def test_serve_sh_hands_nothing_on_that_changes_numbers(tmp_path: Path) -> None:
    from orion_triage import templates

    shown = tmp_path / "llama-server"
    shown.write_text("#!/bin/sh\nenv\n")
    shown.chmod(0o755)
    script = tmp_path / "serve.sh"
    script.write_text(
        templates.fill(
            "flight",
            "serve.sh.j2",
            model="m.gguf",
            mmproj="p.gguf",
            tunable="--flash-attn off",
            arguments="--parallel 1",
            head=None,
        )
    )
    own = {"PATH": os.environ["PATH"], "LLAMA_SERVER": str(shown), "LLAMA_API_KEY": "key", "OMP_NUM_THREADS": "3"}
    served = subprocess.run(["sh", str(script)], capture_output=True, text=True, env=own | NUMBERS, check=True)
    names = {line.partition("=")[0] for line in served.stdout.splitlines()}
    assert {"LLAMA_API_KEY", "OMP_NUM_THREADS"} <= names
    assert {name for name in NUMBERS if name != "HF_TOKEN"} & names == set()


@pytest.fixture
def evaluated(small_dataset: Path, tmp_path: Path) -> Callable[..., Any]:
    """runs/x with the dataset, and `orion evaluate` in it."""
    shutil.copytree(small_dataset, tmp_path / "runs" / "x" / "dataset")
    return lambda *words, **changes: orion("evaluate", "--run", "runs/x", *words, cwd=tmp_path, **changes)


@pytest.mark.slow
def test_a_refused_command_leaves_the_finished_evaluations_as_they_were(
    evaluated: Callable[..., Any], tmp_path: Path
) -> None:
    run = Run(tmp_path / "runs" / "x", Settings())
    with running(StandIn([BASE, ADAPTER])) as server:
        done = evaluated("--quantized-model", f"{server.url}/v1#{ADAPTER}")
        assert done.returncode == 0, done.stderr
        assert f"asked: {ADAPTER} (OpenAI API) at {server.url}/v1#{ADAPTER}" in done.stderr
        of_server = run.evaluation("server")
        made = read_manifest(of_server)
        assert made is not None
        assert made.figures["served_model"] == ADAPTER
        answers = [json.loads(line)["answer"] for line in (of_server / "predictions.jsonl").read_text().splitlines()]
        assert len(answers) == 24
        assert all(f"Said by {ADAPTER}." in answer for answer in answers)
        assert not run.evaluation("quantized").exists()
        for other in ("quantized", "other-pair"):
            shutil.copytree(of_server, run.evaluation(other))
        before = {path: path.read_bytes() for path in (run.folder / "evaluation").rglob(FILE_NAME)}
        assert len(before) == 3
        (tmp_path / "empty").mkdir()
        for words, said in (
            (("--quantized-model", server.url), "lists 2 models"),
            (("--quantized-model", f"{server.url}#gone"), "has no model 'gone'"),
            (("--quantized-model", "http://127.0.0.1:9"), "no server answers"),
            (("empty", "--gguf"), "not one Q4_K_M backbone and one mmproj"),
        ):
            refused = evaluated(*words)
            assert refused.returncode == 1
            assert said in refused.stderr
            assert "Traceback" not in refused.stderr
            assert {path: path.read_bytes() for path in before} == before
