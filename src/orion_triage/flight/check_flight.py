#!/usr/bin/env python3
"""Go or no-go: check that this machine answers a bundle's golden images like the ground.

`orion bundle` copies this file into every bundle. It needs only Python 3.9 or newer, and writes no files.
Exit status: 0 for GO, 1 for NO-GO (the last line gives the reason), 2 for a wrong command line.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import http.client
import json
import math
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Iterator  # noqa: UP035 - Python 3.9

LIST, LIST_HASH = "bundle.json", "bundle.json.sha256"
SERVE = "serve.sh"
LARGEST_REPLY_BYTES = 16_000_000  # a reply with 500 candidates per token has 0.1 MB


class NoGoError(Exception):
    """The reason for NO-GO, in one line."""


@contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Raise NoGoError if the block takes longer than `seconds`; a socket's timeout would apply to each read only."""

    def expired(number: int, frame: Any) -> None:
        raise NoGoError(f"{what} took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# --- files ----------------------------------------------------------------------------------------------------


def read_bundle(folder: Path) -> dict[str, Any]:
    """bundle.json, after a check of all files; raises NoGoError that names changed and missing files."""
    try:
        data, listed = (folder / LIST).read_bytes(), (folder / LIST_HASH).read_bytes()
    except OSError as error:
        raise NoGoError(f"{Path(str(error.filename)).name} cannot be read: {error.strerror}") from None
    if listed != f"{hashlib.sha256(data).hexdigest()}  {LIST}\n".encode():
        raise NoGoError(f"{LIST} and {LIST_HASH} do not match: one of them was changed")
    try:
        bundle: dict[str, Any] = json.loads(data)
        expected: dict[str, str] = bundle["files"]
        changed = [name for name, sha256 in expected.items() if _sha256(folder / name) != sha256]
    except (ValueError, KeyError, AttributeError, TypeError):
        raise NoGoError(f"{LIST} is not the list of a bundle") from None
    if changed:
        states = [f"{name} {'was changed' if (folder / name).exists() else 'is missing'}" for name in changed]
        raise NoGoError(", ".join(states))
    return bundle


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError:
        return ""
    return digest.hexdigest()


# --- server ---------------------------------------------------------------------------------------------------


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follow no redirects: llama-server never redirects, and another server would get the key."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class Connection:
    """A llama.cpp server at `url`; proxies of the environment are not used."""

    def __init__(self, url: str, key: str) -> None:
        self.url = url.rstrip("/")
        self._headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect())

    def status(self) -> int:
        """The status of /health: 200 if ready, 503 while loading; 0 without a reply."""
        try:
            return self._request("/health", None)[0]
        except OSError:
            return 0

    def ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            status, data = self._request(path, body)
        except OSError as error:
            raise NoGoError(f"{self.url}{path} gave no reply: {getattr(error, 'reason', error)}") from None
        if status == 401:
            raise NoGoError("the server refused the key (401): pass its key with --key-file or LLAMA_API_KEY")
        text = data.decode("utf-8", "replace")
        if status != 200:
            raise NoGoError(f"{path} answered {status}: {_short(text)}")
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise NoGoError(f"{path} did not answer with a JSON object: {_short(text)}")
        return value

    def _request(self, path: str, body: dict[str, Any] | None) -> tuple[int, bytes]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, self._headers)
        try:
            with self._opener.open(request) as reply:
                answer = reply.read(LARGEST_REPLY_BYTES)
                if reply.length:
                    raise ConnectionError(f"the reply was cut {reply.length} bytes before its end")
                return int(reply.status), answer
        except urllib.error.HTTPError as error:
            with error:
                return int(error.code), error.read(LARGEST_REPLY_BYTES)
        except http.client.HTTPException as error:  # a truncated reply, or not HTTP
            raise ConnectionError(f"the reply was cut or is not HTTP ({type(error).__name__})") from None


def _short(text: str) -> str:
    return repr(text[:80])


class OwnServer:
    """The bundle's serve.sh with the program `llama_server`; it runs during a `with` block."""

    def __init__(self, folder: Path, llama_server: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        key = secrets.token_urlsafe(24)
        self.connection = Connection(f"http://127.0.0.1:{port}", key)
        self._command = ["/bin/sh", str(folder / SERVE)]
        self._environment = {**os.environ, "LLAMA_SERVER": str(llama_server), "ORION_PORT": str(port)}
        self._environment |= {"LLAMA_API_KEY": key, "ORION_KEY_FILE": ""}

    def __enter__(self) -> OwnServer:
        self._log = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log, env=self._environment
        )
        return self

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def check_alive(self) -> None:
        if self._process.poll() is not None:
            self._log.seek(0)
            lines = self._log.read().decode("utf-8", "replace").strip().splitlines()[-3:]
            raise NoGoError(f"llama-server ended ({self._process.returncode}): {' | '.join(lines)}")

    def peak_bytes(self) -> int | None:
        """The server's peak resident memory so far, including mapped files; serve.sh became the server by `exec`."""
        try:
            status = Path(f"/proc/{self._process.pid}/status").read_text(encoding="utf-8")
        except OSError:
            return None
        match = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
        return int(match[1]) * 1024 if match else None


def wait_until_ready(connection: Connection, own: OwnServer | None) -> None:
    """Return when the model is loaded; raises NoGoError if the server ended or is absent. Use it in a time limit."""
    while (status := connection.status()) != 200:
        if own:
            own.check_alive()
        elif status != 503:
            raise NoGoError(
                f"no llama.cpp server at {connection.url}" + (f": /health answered {status}" if status else "")
            )
        time.sleep(0.2)


def check_server(connection: Connection, folder: Path, bundle: dict[str, Any]) -> tuple[str, list[str]]:
    """The image marker of this server's prompts, and notes about acceptable differences from the ground.

    Raises NoGoError if the server has loaded another model.
    """
    props, notes = connection.ask("/props"), []
    match = re.match(r"b(\d+)", str(props.get("build_info")))
    build = int(match[1]) if match else None
    if build != bundle["llama_cpp_build"]:
        notes.append(f"warning: llama.cpp build {build}, but the bundle was made with {bundle['llama_cpp_build']}")
    served, own = Path(str(props.get("model_path"))), folder / bundle["model"]
    if not served.is_absolute() or not served.is_file():
        notes.append(f"note: the served file {served} is not on this machine; only its answers were checked")
    elif not served.samefile(own) and _sha256(served) != bundle["files"][bundle["model"]]:
        raise NoGoError(f"the server has loaded {served}, which is not the bundle's {bundle['model']}")
    return str(props.get("media_marker") or "<__media__>"), notes


# --- golden images --------------------------------------------------------------------------------------------


class Questions:
    """The requests of the flight, with the same bodies as those of orion_triage's client."""

    def __init__(self, connection: Connection, folder: Path, bundle: dict[str, Any], marker: str) -> None:
        self._connection, self._folder, self._request = connection, folder, bundle["request"]
        self._labels: list[dict[str, Any]] = self._request["labels"]
        self._prompt = (folder / "prompt.txt").read_text(encoding="utf-8")
        self._chat = self._request["chat"].replace("{image}", marker).replace("{prompt}", self._prompt)
        whole, category = self._request["grammars"]
        fields = {one["cue"]: one["grammar"] for one in self._request.get("fields", [])}
        files = {"": whole, self._request["cue"]: category, **fields}  # the grammar from each cue on
        self._grammars = {cue: (folder / name).read_text(encoding="utf-8") for cue, name in files.items()}

    def ask(self, image: str) -> tuple[str, dict[str, float]]:
        """The answer to a golden image, and the log-probability of each category where their names differ."""
        return self.ask_picture(image, (self._folder / image).read_bytes())

    def ask_picture(self, image: str, png: bytes) -> tuple[str, dict[str, float]]:
        """The same for the bytes of a PNG file; `image` names it in errors."""
        return self.ask_with_fields(image, png)[:2]

    def ask_with_fields(self, image: str, png: bytes) -> tuple[str, dict[str, float], dict[str, list[float]]]:
        """The same, and the probabilities of the values of each yes/no and choice field, in their order.

        One request up to the first cue, and one from each cue on.
        """
        request, left = self._request, self._request["answer_tokens"]
        waiting = {request["cue"]: "category", **{one["cue"]: one["field"] for one in request.get("fields", [])}}
        text, at, replies, starts = "", "", {}, {}
        while True:
            starts[at], stop = text, {"stop": list(waiting)} if waiting else {}
            reply = replies[at] = self._from(at, png, text, left, stop)
            text += str(reply.get("content"))
            if not waiting:
                break
            word, used = reply.get("stopping_word"), reply.get("tokens_predicted")
            if not isinstance(word, str) or word not in waiting or not isinstance(used, int):
                raise NoGoError(f"{image}: the answer has no {' and no '.join(waiting.values())}: {_short(text)}")
            if not at and reply.get("tokens_evaluated") != request["prompt_tokens"]:
                raise NoGoError(
                    f"{image}: the server reads {reply.get('tokens_evaluated')} tokens instead of "
                    f"{request['prompt_tokens']}: the model or the image settings differ"
                )
            text, at, left = text + word, word, left - used
            del waiting[word]
        fields = {}
        for one in request.get("fields", []):
            weights = [math.exp(value) for value in self._listed(image, replies[one["cue"]], one["tokens"]).values()]
            fields[one["field"]] = [weight / sum(weights) for weight in weights]
        cue = request["cue"]
        return text, self._scores(image, png, starts[cue], replies[cue]), fields

    def score_after(self, image: str, answer: str) -> dict[str, float]:
        """The log-probability of each label after the reason of the ground's answer."""
        cue = self._request["cue"]
        start, png = answer.partition(cue)[0] + cue, (self._folder / image).read_bytes()
        return self._scores(image, png, start, self._from(cue, png, start, 1, {}))

    def _from(self, cue: str, png: bytes, start: str, most: int, stop: dict[str, Any]) -> dict[str, Any]:
        """The reply from a cue on, with probabilities; from the beginning of the answer with an empty one."""
        more = {"cache_prompt": True, "n_probs": self._request["candidates"]} if cue else {}
        return self._completion(png, start, most, {**stop, "grammar": self._grammars[cue], **more})

    def _scores(self, image: str, png: bytes, start: str, reply: dict[str, Any]) -> dict[str, float]:
        """The log-probability of each label after `start`, of which `reply` is the continuation."""
        found: dict[str, float] = {}
        for place in self._labels:
            asked = reply
            if place["after"]:  # further places, where names with the same beginning part, take a request each
                more = {"cache_prompt": True, "n_probs": self._request["candidates"]}
                rule = {"grammar": self._request["printable"]}
                asked = self._completion(png, start + place["after"], 1, {**more, **rule})
            for token, value in self._listed(image, asked, place["tokens"]).items():
                for label in place["categories"][token]:
                    found[label] = found.get(label, 0.0) + value
        return found

    @staticmethod
    def _listed(image: str, reply: dict[str, Any], tokens: list[int]) -> dict[int, float]:
        """Place in `tokens` -> log-probability of that token as the reply's first one."""
        try:
            listed = {int(c["id"]): float(c["logprob"]) for c in reply["completion_probabilities"][0]["top_logprobs"]}
            if not all(math.isfinite(value) for value in listed.values()):
                raise ValueError
            least = min(listed.values())  # the upper bound of a token that is not listed
            return {place: listed.get(token, least) for place, token in enumerate(tokens)}
        except (KeyError, IndexError, TypeError, ValueError):
            raise NoGoError(f"{image}: the reply has no log-probabilities") from None

    def _completion(self, png: bytes, start: str, most: int, more: dict[str, Any]) -> dict[str, Any]:
        picture = base64.b64encode(png).decode()
        return self._connection.ask(
            "/completion",
            {
                "prompt": {"prompt_string": self._chat + start, "multimodal_data": [picture]},
                "n_predict": most,
                "cache_prompt": False,
                **self._request["sampling"],
                **more,
            },
        )


def check_image(questions: Questions, golden: dict[str, Any], tolerances: dict[str, float]) -> dict[str, Any]:
    """The result for one golden image: expected and found answer, differences of log-probabilities, `why` if NO-GO."""
    image, expected = golden["image"], golden["log_probabilities"]
    began = time.monotonic()
    answer, found = questions.ask(image)
    seconds = time.monotonic() - began
    try:
        category = json.loads(answer)["category"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise NoGoError(f"{image}: the answer is not a verdict: {_short(answer)}") from None
    same = answer == golden["answer"]
    if category == golden["category"] and not same:
        found = questions.score_after(image, golden["answer"])  # only comparable after the same reason
    off = {label: abs(found[label] - expected[label]) for label in expected}
    largest = max(off, key=lambda label: off[label] / _allowed(label, golden, tolerances))
    why = ""
    if category != golden["category"]:
        why = f"{image}: {category} instead of {golden['category']}"
    elif off[largest] > _allowed(largest, golden, tolerances):
        why = (
            f"{image}: the log-probability of {largest} is {found[largest]:.4f} instead of {expected[largest]:.4f}; "
            f"a difference of {_allowed(largest, golden, tolerances):g} is allowed"
        )
    return {
        "image": image,
        "expected": golden["category"],
        "category": category,
        "same_answer": same,
        "answer": answer,
        "log_probabilities": found,
        "off_category": off[golden["category"]],
        "off_others": max(off[label] for label in off if label != golden["category"]),
        "seconds": seconds,
        "why": why,
    }


def _allowed(label: str, golden: dict[str, Any], tolerances: dict[str, float]) -> float:
    return tolerances["category_nats" if label == golden["category"] else "other_labels_nats"]


# --- command line ---------------------------------------------------------------------------------------------


def check(options: argparse.Namespace, report: dict[str, Any]) -> None:
    """Run the checks and fill in `report`; raises NoGoError at the first failure."""
    folder = options.bundle.resolve()
    with ExitStack() as stack:
        with time_limit(options.limit, "reading the bundle's files"):
            bundle = read_bundle(folder)
        report |= {"files": len(bundle["files"]) + 2, "bundle_sha256": _sha256(folder / LIST)}
        report["verdict"] = bundle.get("verdict")
        own = stack.enter_context(OwnServer(folder, options.llama_server)) if options.llama_server else None
        connection = own.connection if own else Connection(options.url, options.key)
        with time_limit(options.limit, "waiting for the server"):
            wait_until_ready(connection, own)
            marker, report["notes"] = check_server(connection, folder, bundle)
        questions = Questions(connection, folder, bundle, marker)
        for golden in bundle["golden"]:
            try:
                with time_limit(options.limit, golden["image"]):
                    report["images"].append(check_image(questions, golden, bundle["tolerances"]))
            except NoGoError:
                if own:
                    time.sleep(1)  # a dying process closes its socket first
                    own.check_alive()  # its log gives a better reason
                raise
        report["peak_bytes"] = own.peak_bytes() if own else None
    failures = [image["why"] for image in report["images"] if image["why"]]
    if failures:
        raise NoGoError(failures[0] + (f" (and {len(failures) - 1} more)" if failures[1:] else ""))
    other_words, most = sum(not image["same_answer"] for image in report["images"]), bundle["tolerances"]["other_words"]
    if other_words > most:
        raise NoGoError(
            f"{other_words} of {len(report['images'])} reasons differ in their words; {most} may differ by rounding"
        )


def lines_of(report: dict[str, Any]) -> Iterator[str]:
    """The lines of the printed report: table of golden images, notes, and GO or NO-GO last."""
    if report["files"]:
        yield f"{report['files']} files are unchanged; {LIST} has sha256 {report['bundle_sha256']}"
    if report["images"]:
        width = max(len(image["image"]) for image in report["images"])
        names = max(8, *(len(str(image[key])) for image in report["images"] for key in ("expected", "category")))
        yield (
            f"{'image':{width}}  {'expected':{names}}  {'answered':{names}}  off, category  off, others  same words  "
            "seconds"
        )
        for image in report["images"]:
            yield (
                f"{image['image']:{width}}  {image['expected']:{names}}  {image['category']!s:{names}}  "
                f"{image['off_category']:13.4f}  {image['off_others']:11.4f}  "
                f"{'yes' if image['same_answer'] else 'no':10}  {image['seconds']:7.2f}"
            )
    if report["peak_bytes"]:
        yield f"the server's peak memory: {report['peak_bytes'] / 1e6:.0f} MB"
    yield from report["notes"]
    for image in report["images"]:
        if not image["same_answer"] and not image["why"]:
            yield f"note: {image['image']} has the right category in other words: {image['answer']}"
    if report["verdict"]:
        yield from _verdict_lines(report["verdict"])
    yield "GO" if report["go"] else f"NO-GO: {report['why']}"


def _verdict_lines(verdict: dict[str, Any]) -> Iterator[str]:
    """What the ground says of the model; GO and NO-GO only say whether this machine answers like the ground."""
    because = f" ({', '.join(verdict['because'])})" if verdict["because"] else ""
    yield f"the ground's verdict on this model: {verdict['verdict']}{because}"
    if verdict["accepted_risk"]:
        yield f"risk accepted by the ground: {verdict['accepted_risk']}"
    yield "this installation answers like the ground (GO) or does not (NO-GO):"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The parsed command line; an invalid one ends the program with status 2."""
    parser = argparse.ArgumentParser(description="Check a flight bundle on this machine: GO or NO-GO.")
    parser.add_argument("--bundle", type=Path, default=Path(__file__).parent, help="the bundle (default: beside this)")
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="a running server (default: %(default)s)")
    parser.add_argument("--key-file", type=Path, help="file with the running server's key (default: LLAMA_API_KEY)")
    parser.add_argument("--llama-server", type=Path, metavar="PATH", help="start serve.sh with this program instead")
    parser.add_argument("--limit", type=float, default=300, metavar="SECONDS", help="limit per step (default: 300)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    options = parser.parse_args(arguments)
    if urllib.parse.urlsplit(options.url).scheme not in ("http", "https"):
        parser.error(f"--url {options.url} is not an http:// URL")
    if not 0 < options.limit <= 86_400:
        parser.error(f"--limit {options.limit:g} is outside 0..86400 seconds")
    if options.llama_server:
        options.llama_server = options.llama_server.resolve()
        if not os.access(options.llama_server, os.X_OK) or options.llama_server.is_dir():
            parser.error(f"--llama-server {options.llama_server} is not a program")
    try:
        key = (
            options.key_file.read_text(encoding="utf-8-sig")
            if options.key_file
            else os.environ.get("LLAMA_API_KEY", "")
        )
    except (OSError, ValueError) as error:
        parser.error(f"--key-file: {error}")
    options.key = key.strip()
    if not options.key.isascii() or not options.key.isprintable():
        parser.error("the key is not one line of printable ASCII")
    return options


def _stopped(number: int, frame: Any) -> None:
    raise NoGoError(f"stopped by signal {number}")


def main(arguments: list[str] | None = None) -> int:
    """Check, print the report, return the exit status."""
    options = parse(arguments)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _stopped)  # so that a started server is stopped too
    report: dict[str, Any] = {"go": False, "why": "", "files": 0, "images": [], "notes": [], "peak_bytes": None}
    report["verdict"] = None  # of the ground, in bundle.json
    try:
        check(options, report)
        report["go"] = True
    except NoGoError as error:
        report["why"] = " ".join(str(error).split())
    except Exception as error:  # an error in the check is a NO-GO
        report["why"] = f"the check itself failed: {type(error).__name__} {error}"
    text = json.dumps(report, indent=2) if options.json else "\n".join(lines_of(report))
    sys.stdout.write(text + "\n")
    return 0 if report["go"] else 1


if __name__ == "__main__":
    sys.exit(main())
