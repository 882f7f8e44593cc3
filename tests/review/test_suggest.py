"""review/suggest.py: another model's suggestions over real HTTP, apart from people's labels."""

import base64
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from sklearn.metrics import cohen_kappa_score

from orion_triage.errors import OrionError, ServerError
from orion_triage.evaluate.servers import connect
from orion_triage.evaluate.statistics import wilson
from orion_triage.export import quantize
from orion_triage.imagery.frames import read_frame
from orion_triage.llama_cpp.server import Server as LlamaServer
from orion_triage.llama_cpp.toolchain import find_toolchain
from orion_triage.mission.prompt import IMAGE, user_text
from orion_triage.models import lfm2_vl
from orion_triage.review.choose import choose, read_log
from orion_triage.review.labels import merge, read_labels, read_task
from orion_triage.review.suggest import (
    SUGGESTIONS_FILE,
    ask,
    connect_source,
    left_of,
    of_source,
    read_suggestions,
    suggestions_of,
)
from orion_triage.review.task import FRAMES_FILE, PAGE_FILE, TASKS_FILE, Suggestion, show, write
from tests.chromium import Chromium
from tests.conftest import MISSION, orion
from tests.review.test_review import chromium, frames_in, log_of, page_labels, press, row, saved

__all__ = ["chromium"]  # the browser of tests/review/test_review.py, as a fixture
H, M, L = MISSION.names
KEY = "sk-a-secret-key-0123456789"
COUNT = 10
Reply = tuple[int, dict[str, str], Any]  # status, headers, value; status 0: the connection is cut


def verdict(category: str, reason: str = "A stronger model's reason.") -> str:
    return json.dumps({"reason": reason, "category": category})


@dataclass
class Server:
    """An OpenAI-compatible server. `reply(n)` answers the n-th question; `asked`: hash of a picture, body."""

    reply: Callable[[int], Reply]
    models: list[str] = field(default_factory=lambda: ["strong/model"])
    asked: list[tuple[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    url: str = ""

    @property
    def host(self) -> str:
        return self.url.removeprefix("http://")


def said(text: str | None, usage: bool = True) -> Reply:
    counts = {"usage": {"prompt_tokens": 400, "completion_tokens": 20}} if usage else {}
    return 200, {}, {"choices": [{"message": {"role": "assistant", "content": text}}], **counts}


@contextmanager
def serving(reply: Callable[[int], Reply], **more: Any) -> Iterator[Server]:
    own, lock = Server(reply, **more), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            self.send((200, {}, {"data": [{"id": name} for name in own.models]}))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            (picture,) = [one for one in body["messages"][0]["content"] if one["type"] == "image_url"]
            png = base64.b64decode(picture["image_url"]["url"].partition("base64,")[2])
            with lock:
                own.asked.append((hashlib.sha256(png).hexdigest(), body))
                own.keys.append(self.headers.get("Authorization", ""))
                number = len(own.asked)
            self.send(own.reply(number))

        def send(self, reply: Reply) -> None:
            status, headers, value = reply
            if not status:  # half an answer, then nothing
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b'{"choices"')
                self.close_connection = True
                return
            data = json.dumps(value).encode()
            self.send_response(status)
            for name, text in headers.items():
                self.send_header(name, text)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    own.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield own
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A task of 10 frames with suggestions of a log, three of them blind, and two random ones."""
    rows = [row(name, (0.2, 0.5, 0.3)) for name in frames_in(tmp_path / "frames", COUNT)]
    frames = read_log(log_of(tmp_path / "log.jsonl", rows), MISSION)
    chosen = choose(frames, COUNT, random_share=0.2, blind_share=0.3, seed=3)
    write(tmp_path / "task", chosen, MISSION, "log.jsonl")
    return tmp_path / "task"


def suggest(task: Path, *words: str, **changes: str) -> subprocess.CompletedProcess[str]:
    return orion("review", "suggest", task, *words, cwd=task.parent, **changes)


def test_each_frame_is_asked_once_with_the_missions_prompt(task: Path) -> None:
    answers = [verdict(H), "no JSON at all", verdict(L), None]
    with serving(lambda n: said(answers[n % 4], usage=n != 5)) as server:
        done = suggest(task, "--server", server.url, "--price-in", "0.5", "--price-out", "2", LLAMA_API_KEY=KEY)
        assert done.returncode == 0, done.stderr
        assert server.keys == [f"Bearer {KEY}"] * COUNT
        assert f"server: {server.host} (this machine; key of LLAMA_API_KEY)" in done.stderr
        assert f"sending 10 pictures and the mission's prompt to strong/model at {server.host}" in done.stderr
        rows = list(read_task(task, MISSION).values())
        for (picture, body), one in zip(server.asked, rows, strict=True):
            assert picture == hashlib.sha256(read_frame(Path(one["file"]), 512).png()).hexdigest()
            assert (body["model"], body["temperature"]) == ("strong/model", 0)
            assert body["messages"][0]["content"][1]["text"] == user_text(MISSION, None).removeprefix(IMAGE)
        told = f"strong/model at {server.host}: 10 frames, 2 HIGH, 0 MEDIUM, 3 LOW, 5 without a verdict"
        assert told in done.stdout
        assert "requests answered now: 10, " in done.stdout
        assert "tokens: 3,600 of prompts, 180 of answers (1 answers not counted by the server)" in done.stdout
        assert "cost of all answers: unknown (the server does not count all tokens)" in done.stdout
        again = suggest(task, "--server", server.url, "--model", "strong/model", "--json")
        assert json.loads(again.stdout)["asked_now"] == 0
        assert "nothing is sent" in again.stderr
        assert len(server.asked) == COUNT
    stored = (task / SUGGESTIONS_FILE).read_text()
    assert KEY not in stored + done.stdout + done.stderr
    first = json.loads(stored.splitlines()[0])
    assert (first["answer"], first["category"], first["server"]) == ("no JSON at all", None, server.host)
    assert (first["prompt_tokens"], first["answer_tokens"], first["frame"]) == (400, 20, rows[0]["id"])


def test_cost_is_that_of_the_tokens_and_unknown_without_prices(task: Path) -> None:
    with serving(lambda n: said(verdict(M)), models=["a", "b"]) as server:
        refused = suggest(task, "--server", server.url)
        assert (refused.returncode, "lists 2 models: 'a', 'b'" in refused.stderr) == (1, True)
        words = ("--server", server.url, "--model", "b", "--json")
        without = json.loads(suggest(task, *words).stdout)
        assert (without["cost"], without["prompt_tokens"], without["answer_tokens"]) == (None, 4000, 200)
        assert without["frames_per_minute"] > 0
        told = json.loads(suggest(task, *words, "--price-in", "0.25", "--price-out", "2").stdout)
        assert told["cost"] == pytest.approx((4000 * 0.25 + 200 * 2) / 1e6)
        assert len(server.asked) == COUNT
        only = suggest(task, "--server", server.url, "--model", "b", "--price-in", "1")
        assert (only.returncode, "give both prices" in only.stderr) == (2, True)
        both = suggest(task, "--server", f"{server.url}#a", "--model", "b")
        assert "the address names 'a', but --model 'b'" in both.stderr


def test_a_rate_limit_is_waited_out_and_a_cut_connection_asked_again(task: Path) -> None:
    faults: dict[int, Reply] = {2: (429, {"Retry-After": "0.2"}, {"error": "slow down"}), 4: (0, {}, None)}
    with serving(lambda n: faults.get(n) or said(verdict(L))) as server:
        done = suggest(task, "--server", server.url)
        assert done.returncode == 0, done.stderr
        assert len(server.asked) == COUNT + 2
    assert Counter(one["category"] for one in read_suggestions(task)) == {L: COUNT}
    assert len({one["sha256"] for one in read_suggestions(task)}) == COUNT


def test_a_server_that_stays_busy_or_fails_loses_nothing_that_was_answered(task: Path) -> None:
    """Nobody waits an hour; the error repeats the server's words, without the key that some put into them."""
    limit: Reply = (429, {"Retry-After": "3600"}, {"error": {"message": f"quota of {KEY} is used up"}})
    with serving(lambda n: said(verdict(H)) if n <= 3 else limit) as server:
        began = time.monotonic()
        busy = suggest(task, "--server", server.url, LLAMA_API_KEY=KEY)
        assert time.monotonic() - began < 60
        assert (busy.returncode, len(server.asked)) == (1, 4)
        assert "answered 429, too many requests" in busy.stderr
        assert "quota of (key) is used up" in busy.stderr
        assert "run the same command again to resume" in busy.stderr
        assert KEY not in busy.stderr + busy.stdout
    assert len(read_suggestions(task)) == 3
    with serving(lambda n: (400, {}, {"error": "no images"})) as server:
        other = suggest(task, "--server", server.url.replace("//", "//user:pass-word@"))
        assert (other.returncode, "no images" in other.stderr, "Traceback" in other.stderr) == (1, True, False)
        assert "pass-word" not in other.stderr
    gone = suggest(task, "--server", "http://127.0.0.1:9")
    assert (gone.returncode, "no server answers" in gone.stderr) == (1, True)
    assert len(read_suggestions(task)) == 3


def test_a_server_that_refuses_parameters_is_asked_without_them(task: Path) -> None:
    """As OpenAI's newer models do: none of max_tokens, and no temperature of 0."""

    def reply(number: int) -> Reply:
        body = server.asked[number - 1][1]
        for name in ("max_tokens", "temperature"):
            if name in body:
                error = {"message": f"'{name}' is not supported with this model.", "param": name}
                return 400, {}, {"error": error | {"type": "invalid_request_error", "code": "unsupported_parameter"}}
        return said(verdict(L))

    with serving(reply) as server:
        done = suggest(task, "--server", server.url, "--max-tokens", "77")
        assert done.returncode == 0, done.stderr
        assert "asked without max_tokens, temperature, which the server refused" in done.stdout
        assert len(server.asked) == COUNT + 2, "it is told once"
        assert {body.get("max_completion_tokens") for _, body in server.asked[2:]} == {77}
        # An evaluation has to be greedy.
        images, texts = [read_frame(task.parent / "frames" / "00.png", 512).image], [user_text(MISSION, None)]
        with pytest.raises(ServerError, match=r"max_tokens\W+ is not supported"):
            connect(server.url, "", MISSION, 64).backend.answer(images, texts)


def test_a_killed_command_resumes_without_a_second_request(task: Path) -> None:
    reached, go_on = threading.Event(), threading.Event()

    def reply(number: int) -> Reply:
        if number == 5:
            reached.set()
            go_on.wait(60)
        return said(verdict(H))

    with serving(reply) as server:
        words = [sys.executable, "-m", "orion_triage.cli", "review", "suggest", str(task), "--server", server.url]
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        assert reached.wait(120)
        second = suggest(task, "--server", server.url)
        assert (second.returncode, "is in use by orion review suggest" in second.stderr) == (1, True)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        go_on.set()
        path = task / SUGGESTIONS_FILE
        assert len(read_suggestions(task)) == 4
        path.write_bytes(path.read_bytes() + b'{"sha256": "half a li')  # killed in the middle of a line
        assert len(read_suggestions(task)) == 4
        done = suggest(task, "--server", server.url, "--json")
        assert json.loads(done.stdout)["asked_now"] == COUNT - 4
        times = Counter(picture for picture, _ in server.asked)
        assert sorted(times.values()) == [1] * (COUNT - 1) + [2], "only the frame in flight is asked again"
        assert times[server.asked[4][0]] == 2
    assert len({one["sha256"] for one in read_suggestions(task)}) == COUNT


def test_another_prompt_or_model_is_another_suggestion_and_damage_is_named(task: Path) -> None:
    with serving(lambda n: said(verdict(H))) as server:
        suggest(task, "--server", server.url)
    rows, frames = read_suggestions(task), read_task(task, MISSION)
    other = MISSION.model_copy(update={"prompt": MISSION.prompt + " Be brief."})
    assert not left_of(frames, of_source(rows, "strong/model", server.host, MISSION))
    assert len(left_of(frames, of_source(rows, "strong/model", server.host, other))) == COUNT
    assert len(left_of(frames, of_source(rows, "another", server.host, MISSION))) == COUNT
    assert suggestions_of(rows, frames, other) == ({frame: [] for frame in frames}, COUNT)
    path = task / SUGGESTIONS_FILE
    whole = path.read_text()
    for damage in ("no JSON", "[]", '{"sha256": 1}', json.dumps(rows[0] | {"prompt_tokens": -1})):
        path.write_text(f"{whole}{damage}\n")
        with pytest.raises(OrionError, match=rf"{SUGGESTIONS_FILE}:{COUNT + 1} is damaged"):
            read_suggestions(task)
    path.write_text("")
    Path(next(iter(frames.values()))["file"]).write_bytes(b"another picture")
    with serving(lambda n: said(verdict(H))) as server:
        refused = suggest(task, "--server", server.url)
        assert (refused.returncode, server.asked) == (1, [])
        assert "is not the picture of the task" in refused.stderr


def suggested(task: Path, *categories: str | None) -> str:
    """Let a model say these categories of the frames in their order, None for no verdict; returns its name."""
    with serving(lambda n: said(verdict(str(categories[n - 1])) if categories[n - 1] else "no idea")) as server:
        frames = read_task(task, MISSION)
        source = connect_source(task, frames, MISSION, server.url, "", 64, say=lambda text: None)
        return str(ask(task, frames, MISSION, source)["source"])


def labels_of(task: Path, who: str, categories: dict[int, str], saw: dict[int, list[str]] | None = None) -> list[Any]:
    value = page_labels(task, who, categories)
    for one, number in zip(value["labels"], categories, strict=True):
        one |= {"saw": saw[number]} if saw else {}
    return read_labels(saved(task.parent / f"{who}.json", value), read_task(task, MISSION), MISSION)[0]


def test_people_are_compared_with_each_source_seen_and_not_seen_apart(task: Path) -> None:
    source = suggested(task, H, H, L, L, M, M, H, L, H, None)
    frames = read_task(task, MISSION)
    said_of, others = suggestions_of(read_suggestions(task), frames, MISSION)
    assert others == 0
    people = dict(enumerate([H, M, L, M, M, M, H, H, H, L]))
    saw = {n: [source, "log.jsonl"] if n < 6 else [] for n in people}
    merged = merge(labels_of(task, "Anna", people, saw), frames, MISSION, 0, said_of)
    told = merged.figures["as_suggested"]
    assert list(told) == ["log.jsonl", source]
    model = [H, H, L, L, M, M, H, L, H]
    for name, numbers in (("seen", range(6)), ("blind", range(6, 9))):
        equal = sum(people[n] == model[n] for n in numbers)
        own = told[source][name]
        assert (own["count"], own["total"]) == (equal, len(numbers))
        assert (own["low"], own["high"]) == pytest.approx(wilson(equal, len(numbers)))
        expected = cohen_kappa_score([people[n] for n in numbers], [model[n] for n in numbers])
        assert own["kappa"] == pytest.approx(expected)
    assert (told[source]["without"], told["log.jsonl"]["without"]) == (1, 0)
    assert told["log.jsonl"]["seen"]["count"] == sum(people[n] == M for n in range(6))
    random = [n for n, one in enumerate(frames.values()) if one["why"] == "random" and n < 9]
    assert told[source]["random"]["count"] == sum(people[n] == model[n] for n in random)
    # A file that does not say what was seen: the log's suggestion on frames that are not blind, and no other.
    old = merge(labels_of(task, "Ben", people), frames, MISSION, 0, said_of).figures["as_suggested"]
    assert (old[source]["seen"]["total"], old[source]["blind"]["total"]) == (0, 9)
    assert (old["log.jsonl"]["seen"]["total"], old["log.jsonl"]["blind"]["total"]) == (7, 3)


def test_an_interval_is_over_frames_however_many_people_label_them(task: Path) -> None:
    source = suggested(task, *[H] * COUNT)
    frames = read_task(task, MISSION)
    said_of, _ = suggestions_of(read_suggestions(task), frames, MISSION)
    people = dict(enumerate([H, L] * (COUNT // 2)))
    labels = [label for who in ("Anna", "Ben", "Cleo") for label in labels_of(task, who, people)]
    told = merge(labels, frames, MISSION, 0, said_of).figures["as_suggested"][source]["blind"]
    assert (told["count"], told["total"]) == (15, 30)
    assert (told["low"], told["high"]) == pytest.approx(wilson(5, 10))


def test_a_suggestion_never_becomes_a_label(task: Path) -> None:
    source = suggested(task, *[H] * COUNT)
    saved(task.parent / "anna.json", page_labels(task, "Anna", dict.fromkeys(range(4), L)))
    done = orion("review", "read", task, "anna.json", "--dataset", "labelled", cwd=task.parent)
    assert done.returncode == 0, done.stderr
    assert "4 of 10 frames labelled by Anna" in done.stdout
    assert f"{source}: labels equal to its suggestion, which people did not see: 0 of 4 = 0 % (0 to 49)" in done.stdout
    table = (task.parent / "labelled" / "metadata.csv").read_text()
    assert len(table.splitlines()) == 5
    assert H not in table
    assert source not in table


def test_the_page_and_the_tasks_show_suggestions_only_if_asked_and_blind_frames_stay_blind(task: Path) -> None:
    page = (task / PAGE_FILE).read_text()
    source = suggested(task, *[H] * (COUNT - 1), None)
    assert (task / PAGE_FILE).read_text() == page
    done = suggest(task, "--show")
    assert done.returncode == 0, done.stderr
    assert f"with suggestions of the log, {source}  ->" in done.stderr
    frames = list(read_task(task, MISSION).values())
    (line,) = [one for one in (task / PAGE_FILE).read_text().splitlines() if '<script id="task"' in one]
    inline = json.loads(line.partition(">")[2].removesuffix("</script>"))
    before = json.loads((task / FRAMES_FILE).read_text())
    assert inline["review"] == before["review"], "a browser finds its labels by this name"
    tasks = json.loads((task / TASKS_FILE).read_text())
    for number, (own, on_page, of_studio) in enumerate(zip(frames, inline["frames"], tasks, strict=True)):
        expected = [] if own["blind"] else [("log.jsonl", M)] + [(source, H)] * (number < COUNT - 1)
        assert [(one["source"], one["category"]) for one in on_page["suggestions"]] == expected
        assert on_page["id"] == own["id"] == of_studio["data"]["frame"]
        assert of_studio["data"]["saw"] == [name for name, _ in expected]
        found = [
            (one["model_version"], one["result"][0]["value"]["choices"]) for one in of_studio.get("predictions", [])
        ]
        assert found == [(name, [category]) for name, category in expected]
    assert sum(own["blind"] for own in frames) == 3
    nothing = suggest(task)
    assert (nothing.returncode, "name a server" in nothing.stderr) == (2, True)


@pytest.mark.browser
def test_labels_in_the_browser_outlive_a_page_with_suggestions(task: Path, chromium: Chromium, tmp_path: Path) -> None:
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    chromium.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(downloads))
    chromium.open(task / PAGE_FILE, width=1280, height=900, dark=False)
    for key in "1231":
        press(chromium, key)
    source = suggested(task, *[H] * COUNT)
    frames = read_task(task, MISSION)
    said_of, _ = suggestions_of(read_suggestions(task), frames, MISSION)
    said_of[list(frames)[5]] = [Suggestion(source, H, "</script><b>bold</b> & \u2028")]
    show(task, list(frames.values()), MISSION, said_of)
    chromium.open(task / PAGE_FILE, width=1280, height=900, dark=False)
    assert chromium.evaluate("document.getElementById('count').textContent") == "4 of 10 labelled"
    for number in range(4, COUNT):
        shown = chromium.evaluate("document.getElementById('suggestions').innerText")
        blind = list(frames.values())[number]["blind"]
        assert (shown == "Without a suggestion.") == blind
        assert (f"{source} says HIGH." in shown) != blind
        press(chromium, "3")
    assert chromium.complaints == []
    press(chromium, "s")
    chromium.call("Input.insertText", text="Anna")
    press(chromium, "Escape")
    press(chromium, "s")
    deadline = time.monotonic() + 20
    while not (files := list(downloads.glob("labels-*-Anna.json"))) and time.monotonic() < deadline:
        time.sleep(0.05)
    labels, _ = read_labels(files[0], frames, MISSION)
    assert [label.category for label in labels] == [H, M, L, H] + [L] * 6
    for number, (label, own) in enumerate(zip(labels, frames.values(), strict=True)):
        both = ("log.jsonl",) if number < 4 else ("log.jsonl", source)
        assert label.saw == (() if own["blind"] else both)


@pytest.mark.llama_cpp
def test_a_llama_server_is_asked_through_its_chat_interface(task: Path, tiny_pair: Path) -> None:
    """As another model is: with the server's own template, and tokens that it counts."""
    with LlamaServer(
        find_toolchain(),
        tiny_pair / quantize.QUANTIZED,
        tiny_pair / quantize.MMPROJ,
        log=task / "log",
        turn=lfm2_vl.TURN,
    ) as server:
        key = server.client._http.headers["Authorization"].removeprefix("Bearer ")
        done = suggest(task, "--server", server.client.base_url, "--max-tokens", "96", "--json", LLAMA_API_KEY=key)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["answered"], told["without_counts"]) == (COUNT, 0)
    assert told["prompt_tokens"] > 100 * COUNT
    assert told["answer_tokens"] > 5 * COUNT
