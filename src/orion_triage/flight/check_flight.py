#!/usr/bin/env python3
"""Go or no-go: check that this machine answers a bundle's golden frames like the ground.

`orion bundle` copies this file into every bundle. It needs only Python 3.9 or newer, and writes no files.
Exit status: 0 for GO, 1 for NO-GO (the last line gives the reason), 2 for a wrong command line.
"""

from __future__ import annotations

import argparse
import base64
import ctypes
import hashlib
import http.client
import importlib
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
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Callable, Iterator  # noqa: UP035 - Python 3.9

SCHEMA_VERSION = 4  # of the bundle.json that this file reads
LIST, LIST_HASH = "bundle.json", "bundle.json.sha256"
SERVE = "serve.sh"
PAIR, HEAD = "quantized", "head"  # who decides: the language model of the pair, or the head on what the pair sees
LARGEST_REPLY_BYTES = 16_000_000  # a reply with 500 candidates per token has 0.1 MB
_PROBE = "zq7 orion probe"  # no model writes it by itself
CHECKPOINT_TOKENS = 4  # a server's state is saved at the end of a request and this many tokens before it, or fewer


class NoGoError(Exception):
    """The reason for NO-GO, in one line."""


class OtherVersionError(NoGoError):
    """The bundle was made by another version of orion-triage, for its own check_flight.py."""


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
    """bundle.json, after a check of all files; raises NoGoError that names changed and missing files.

    Raises OtherVersionError for an unchanged bundle of another schema version.
    """
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
    if bundle.get("schema_version") != SCHEMA_VERSION:
        raise OtherVersionError(
            f"{LIST} has schema version {bundle.get('schema_version')} instead of {SCHEMA_VERSION}: use the "
            "check_flight.py of that bundle, or make the bundle again"
        )
    return bundle


def flown(bundle: dict[str, Any], variant: str | None = None) -> dict[str, Any]:
    """The bundle as a variant flies it, "head" or "quantized"; by default the head, if the bundle has one.

    What bundle.json says of the head stands then in the place of what it says of the pair: the decision, the golden
    frames, the tolerances. A bundle without a head stays as it is. Raises NoGoError for a head that it does not have.
    """
    head = bundle.get("head")
    if not head:
        if variant == HEAD:
            raise NoGoError(
                "the bundle has no head: leave --variant out, or make the bundle with 'orion bundle --head'"
            )
        return bundle
    return {**bundle, **(head if variant != PAIR else {}), "variant": variant or HEAD}


def named(bundle: dict[str, Any]) -> dict[str, str]:
    """The variant that decides, for the lines of a log; nothing in a bundle without a head."""
    return {"variant": bundle["variant"]} if "variant" in bundle else {}


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
        value, text = self.value(path, body)
        if not isinstance(value, dict):
            raise NoGoError(f"{path} did not answer with a JSON object: {_short(text)}")
        return value

    def value(self, path: str, body: dict[str, Any] | None = None) -> tuple[Any, str]:
        """The reply's JSON value, None if it is none, and its text."""
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
            return json.loads(text), text
        except (ValueError, RecursionError):
            return None, text

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
    """The bundle's serve.sh with the program `llama_server`, for a variant; it runs during a `with` block.

    With a folder `state`, it saves and restores its state after the prompt there. `flags` are a file in the place of
    the bundle's server_flags.json; "none": serve.sh's own flags.
    """

    def __init__(
        self, folder: Path, llama_server: Path, variant: str = "", state: Path | None = None, flags: str = ""
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        key = secrets.token_urlsafe(24)
        self.program, self.flags = llama_server, flags
        self.connection = Connection(f"http://127.0.0.1:{port}", key)
        self._command = ["/bin/sh", str(folder / SERVE)]
        self._environment = {**os.environ, "LLAMA_SERVER": str(llama_server), "ORION_PORT": str(port)}
        self._environment |= {"ORION_VARIANT": variant, "ORION_STATE": str(state or "")}
        self._environment |= {"LLAMA_API_KEY": key, "ORION_KEY_FILE": "", "ORION_SERVER_FLAGS": flags}
        if flags:  # which have the threads
            self._environment["ORION_THREADS"] = os.environ.get("ORION_THREADS", "") if flags == "none" else ""

    def __enter__(self) -> OwnServer:
        self._log = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env=self._environment,
            preexec_fn=_end_with_parent(),
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

    @property
    def process(self) -> Path:
        """Its folder in /proc; serve.sh becomes the server by `exec`."""
        return Path(f"/proc/{self._process.pid}")

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def check_alive(self) -> None:
        if self._process.poll() is not None:
            self._log.seek(0)
            lines = self._log.read().decode("utf-8", "replace").strip().splitlines()[-3:]
            raise NoGoError(f"llama-server ended ({self._process.returncode}): {' | '.join(lines)}")

    def peak_bytes(self) -> int | None:
        """The server's peak resident memory so far, including mapped files."""
        try:
            status = (self.process / "status").read_text(encoding="utf-8")
        except OSError:
            return None
        match = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
        return int(match[1]) * 1024 if match else None


def _end_with_parent() -> Callable[[], None]:
    """Runs in the server before it starts: Linux ends the server when this process ends, even if it is killed.

    Otherwise, a server that nobody knows would keep its memory, and the next one would find too little.
    """
    if not sys.platform.startswith("linux"):
        return lambda: None
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def tie() -> None:
        prctl(1, int(signal.SIGKILL), 0, 0, 0)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)

    return tie


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


def check_server(
    connection: Connection, folder: Path, bundle: dict[str, Any], own: OwnServer | None = None, strict: bool = False
) -> tuple[str, list[str]]:
    """The image marker of this server's prompts, and notes about acceptable differences from the ground.

    Raises NoGoError if the server has loaded another model or mmproj, or drops grammars. With `strict`, also if
    server_flags.json is not valid, or the server runs without its flags; in flight, serve.sh's own flags are as good.
    """
    props, notes = connection.ask("/props"), []
    match = re.match(r"b(\d+)", str(props.get("build_info")))
    build = int(match[1]) if match else None
    if build != bundle["llama_cpp_build"]:
        notes.append(f"warning: llama.cpp build {build}, but the bundle was made with {bundle['llama_cpp_build']}")
    said = props.get("model_path")
    served = {"model": [Path(said)] if isinstance(said, str) and Path(said).is_absolute() else []}
    # A server does not say which mmproj it loaded. Its command line does, if it runs on this machine. The answers do
    # not: on the tiny preset's test frames, a Q8_0 mmproj changes the log-probabilities of the other categories by
    # 0.023 on average and 0.088 at most, and flash attention with the right mmproj by 0.022 and 0.060.
    process = own.process if own else _process_at(connection.url)
    served["mmproj"] = [*_mmproj_of(process)]
    flags = _beside("server_flags")
    tower, line, fault = flags.used(
        folder, process, own.program if own else None, bundle.get("variant", ""), own.flags if own else ""
    )
    if strict and fault:
        raise NoGoError(fault)
    notes += [line] if line else []
    bundle = {**bundle, "mmproj": tower or bundle["mmproj"]}
    for kind in ("model", "mmproj"):
        seen = [path for path in served[kind] if path.is_file()]
        if not seen:
            notes.append(f"note: the served {kind} cannot be seen from here; only its answers were checked")
        elif not seen[0].samefile(folder / bundle[kind]) and _sha256(seen[0]) != bundle["files"][bundle[kind]]:
            raise NoGoError(
                f"the server has loaded {os.path.realpath(seen[0])}, which is not the bundle's {bundle[kind]}"
            )
    if bundle.get("variant") != HEAD:  # of which no text is asked
        _check_grammar(connection)
    return str(props.get("media_marker") or "<__media__>"), notes


def _process_at(url: str) -> Path | None:
    """The folder in /proc of the process that listens at `url` on this machine; None if it cannot be seen."""
    parts = urllib.parse.urlsplit(url)
    sockets = set()
    for table in ("tcp", "tcp6") if parts.hostname in ("127.0.0.1", "localhost", "::1") else ():
        try:
            lines = Path("/proc/net", table).read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue
        for place, state, inode in ((line.split()[1], line.split()[3], line.split()[9]) for line in lines):
            if state == "0A" and int(place.rpartition(":")[2], 16) == parts.port:  # it listens there
                sockets.add(f"socket:[{inode}]")
    for process in Path("/proc").glob("[0-9]*") if sockets else ():
        with suppress(OSError):  # another user's process, or one that has just ended
            for opened in (process / "fd").iterdir():
                if os.readlink(str(opened)) in sockets:  # noqa: PTH115 - quicker, over some thousand files
                    return process
    return None


def _mmproj_of(process: Path | None) -> Iterator[Path]:
    """The mmproj file of a llama-server's command line, as that process sees it."""
    if process is None:
        return
    try:
        words = [os.fsdecode(word) for word in (process / "cmdline").read_bytes().split(b"\0")]
    except OSError:
        return
    for option, value in zip(words, words[1:]):  # noqa: B905, RUF007 - Python 3.9
        if option in ("--mmproj", "-mm"):
            yield process / "root" / value[1:] if value.startswith("/") else process / "cwd" / value


def _check_grammar(connection: Connection) -> None:
    """Some builds drop a grammar without a word (ggml-org/llama.cpp#24144, #24377); good answers hide it."""
    body = {"prompt": "The", "n_predict": 24, "temperature": 0, "cache_prompt": False}
    said = connection.ask("/completion", {**body, "grammar": f'root ::= "{_PROBE}"'}).get("content")
    if said != _PROBE:
        raise NoGoError(
            f"the server does not keep to a grammar: it answers {_short(str(said))} where only {_PROBE!r} is allowed"
        )


# --- golden frames --------------------------------------------------------------------------------------------


class Questions:
    """The requests of the flight, with the same bodies as those of orion_triage's client."""

    def __init__(self, connection: Connection, folder: Path, bundle: dict[str, Any], marker: str) -> None:
        self._connection, self._request, self._marker = connection, bundle["request"], marker
        self._labels: list[dict[str, Any]] = self._request["labels"]
        self._prompt = (folder / "prompt.txt").read_text(encoding="utf-8")
        self._chat = self._request["chat"].replace("{image}", marker).replace("{prompt}", self._prompt)
        whole, category = self._request["grammars"]
        fields = {one["cue"]: one["grammar"] for one in self._request.get("fields", [])}
        self._verdict_only: dict[str, Any] | None = self._request.get("verdict_only")
        reasons = self._verdict_only["reasons"] if self._verdict_only else {}  # the grammar of an answer, by category
        files = {"": whole, self._request["cue"]: category, **fields, **reasons}  # the grammar from each cue on
        self._grammars = {cue: (folder / name).read_text(encoding="utf-8") for cue, name in files.items()}
        self._until_image = self._chat.partition(marker)[0] + marker
        of_head = bundle.get("variant") == HEAD
        self.head = json.loads((folder / bundle["weights"]).read_text(encoding="utf-8")) if of_head else None
        # Whether the prompt stands before the image, and is read; a head looks at no text.
        self._keeps = "kept_tokens" in self._request and not of_head
        self._kept = False  # whether the server has the state after the prompt
        self.reused_tokens: int | None = None  # of the last frame's prompt; None if its whole prompt is read anew

    def hidden_state(self, image: str, png: bytes) -> list[float]:
        """The last hidden state after the turn up to and with the image; of a server for the head."""
        prompt = {"prompt_string": self._until_image, "multimodal_data": [base64.b64encode(png).decode()]}
        found, text = self._connection.value("/embeddings", {"content": prompt, "embd_normalize": -1})
        try:
            (state,) = found[0]["embedding"]
            values = [float(value) for value in state]
            if not values or not all(math.isfinite(value) for value in values):
                raise ValueError
        except (KeyError, IndexError, TypeError, ValueError):
            raise NoGoError(f"{image}: the reply has no hidden state: {_short(text)}") from None
        return values

    def keep_prompt(self) -> None:
        """Let the server read the prompt before the image once; does nothing while it has that state.

        The requests of a frame go on from it. Raises NoGoError if the server reads another number of tokens.
        """
        if not self._keeps or self._kept:
            return
        more = {"n_predict": 0, "grammar": self._request["printable"], "cache_prompt": True}
        body = {"prompt": self._chat.partition(self._marker)[0], **self._request["sampling"], **more}
        read, wanted = self._connection.ask("/completion", body).get("tokens_evaluated"), self._request["kept_tokens"]
        if read != wanted:
            raise NoGoError(f"the server reads {read} tokens of the prompt instead of {wanted}: the model differs")
        self._kept = True

    def ask_with_fields(self, image: str, png: bytes) -> tuple[str, dict[str, float], dict[str, list[float]]]:
        """The answer to the bytes of a PNG file, and the log-probability of each category where their names differ.

        And the probabilities of the values of each yes/no and choice field, in their order. One request up to the first
        cue, and one from each cue on. `image` names the picture in errors. In a bundle whose verdict comes first, the
        answer has a reason only for the categories that are to have one.
        """
        self.keep_prompt()
        if self._verdict_only:
            return (*self._verdict_first(image, png, self._verdict_only), {})
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
            if not at:
                self._check_tokens(image, reply)
                self._check_kept(reply)
            text, at, left = text + word, word, left - used
            del waiting[word]
        cue = request["cue"]
        return text, self._scores(image, png, starts[cue], replies[cue]), self._of_fields(image, replies)

    def _verdict_first(self, image: str, png: bytes, how: dict[str, Any]) -> tuple[str, dict[str, float]]:
        """The answer and the log-probability of each category, by the token in which their names differ."""
        # The server reads the image once; each of the following requests continues after it.
        self._check_kept(self._completion(png, None, 0, {"cache_prompt": True, "grammar": self._request["printable"]}))
        start, begun = how["start"], self._labels[0]["after"]
        more = {"cache_prompt": True, "n_probs": self._request["candidates"]}
        more["grammar"] = self._request["printable"] if begun else self._grammars[self._request["cue"]]
        reply = self._completion(png, start + begun, 1, more)
        self._check_tokens(image, reply)
        said, scores = str(reply.get("content"))[:1], self._scores(image, png, start, reply)
        names = [name for name in how["answers"] if said and name.startswith(begun + said)]
        if not begun and not names:  # not a category
            return start + str(reply.get("content")), scores
        category = names[0] if len(names) == 1 else max(how["answers"], key=scores.__getitem__)
        if category not in how["reasons"]:
            return how["answers"][category], scores
        rule = {"cache_prompt": True, "grammar": self._grammars[category]}
        answer = str(self._completion(png, "", self._request["answer_tokens"], rule).get("content"))
        return answer if answer.endswith("}") else how["answers"][category], scores

    def _check_tokens(self, image: str, reply: dict[str, Any]) -> None:
        """Raise NoGoError unless the server read as many tokens as on the ground."""
        read, wanted = reply.get("tokens_evaluated"), self._request["prompt_tokens"]
        if read != wanted:
            raise NoGoError(
                f"{image}: the server reads {read} tokens instead of {wanted}: the model or the image settings differ"
            )

    def score_after(self, image: str, png: bytes, answer: str) -> tuple[dict[str, float], dict[str, list[float]]]:
        """The same log-probabilities and probabilities after the words of another answer, that of the ground."""
        cues = [self._request["cue"], *(one["cue"] for one in self._request.get("fields", []))]
        starts = {cue: answer.partition(cue)[0] + cue for cue in cues}
        replies = {cue: self._from(cue, png, start, 1, {}) for cue, start in starts.items()}
        return self._scores(image, png, starts[cues[0]], replies[cues[0]]), self._of_fields(image, replies)

    def _of_fields(self, image: str, replies: dict[str, dict[str, Any]]) -> dict[str, list[float]]:
        """The probabilities of the values of each field, by the replies from their cues on."""
        fields = {}
        for one in self._request.get("fields", []):
            weights = [math.exp(value) for value in self._listed(image, replies[one["cue"]], one["tokens"]).values()]
            fields[one["field"]] = [weight / sum(weights) for weight in weights]
        return fields

    def _from(self, cue: str, png: bytes, start: str, most: int, stop: dict[str, Any]) -> dict[str, Any]:
        """The reply from a cue on, with probabilities; from the beginning of the answer with an empty one."""
        more = {"cache_prompt": True, "n_probs": self._request["candidates"]} if cue else {"cache_prompt": self._keeps}
        return self._completion(png, start, most, {**stop, "grammar": self._grammars[cue], **more})

    @property
    def keeps_prompt(self) -> bool:
        """Whether the server reads the prompt once for all frames."""
        return self._keeps

    @property
    def has_lost_prompt(self) -> bool:
        """Whether the server read the whole prompt for the last frame, though it had its state before."""
        return self.reused_tokens is not None and not self._kept

    def save_prompt(self, name: str) -> None:
        """Let the server write its state after the prompt; raises NoGoError if it cannot."""
        self._kept = False
        self.keep_prompt()  # the state after the prompt, not that after a frame
        self._connection.ask("/slots/0?action=save", {"filename": name})

    def restore_prompt(self, name: str) -> bool:
        """Let the server read a file of `save_prompt`; False if it cannot."""
        with suppress(NoGoError):
            restored = self._connection.ask("/slots/0?action=restore", {"filename": name}).get("n_restored")
            self._kept = restored == self._request["kept_tokens"]
        return self._kept

    def _check_kept(self, reply: dict[str, Any]) -> None:
        """Note how many tokens the server did not read again; if it had lost the prompt, the next frame reads it."""
        if self._keeps:
            timings = reply.get("timings")
            reused = timings.get("cache_n") if isinstance(timings, dict) else None
            self.reused_tokens = reused if isinstance(reused, int) else 0
            self._kept = self.reused_tokens >= self._request["kept_tokens"] - CHECKPOINT_TOKENS

    def _scores(self, image: str, png: bytes, start: str, reply: dict[str, Any]) -> dict[str, float]:
        """The log-probability of each label after `start`, of which `reply` is the continuation, or its first place."""
        found: dict[str, float] = {}
        for place in self._labels:
            asked = reply
            if place["after"] and not (
                self._verdict_only and place is self._labels[0]
            ):  # further places, where names with the same beginning part, take a request each
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

    def _completion(self, png: bytes, start: str | None, most: int, more: dict[str, Any]) -> dict[str, Any]:
        """The reply from this beginning of the answer on; from the end of the image on with None."""
        text = self._chat.partition(self._marker)[0] + self._marker if start is None else self._chat + start
        picture = base64.b64encode(png).decode()
        return self._connection.ask(
            "/completion",
            {
                "prompt": {"prompt_string": text, "multimodal_data": [picture]},
                "n_predict": most,
                "cache_prompt": False,
                **self._request["sampling"],
                **more,
            },
        )


def check_golden(
    questions: Questions,
    folder: Path,
    golden: dict[str, Any],
    bundle: dict[str, Any],
    seconds: float,
    limit: float,
    pictures: Any = None,
) -> dict[str, Any]:
    """The result for one golden frame, by the head or the language model, whichever flies.

    With `pictures`, those of `pictures_of`, the result's seconds are the answer's alone.
    """
    pictures = pictures or (lambda: pictures_of(folder, golden, bundle))
    if bundle.get("variant") == HEAD:
        return check_head_frame(questions, golden, bundle, seconds, pictures)
    return check_frame(questions, golden, bundle, seconds, limit, pictures)


def pictures_of(folder: Path, golden: dict[str, Any], bundle: dict[str, Any]) -> Any:
    """What the model is asked about a golden frame, and whether it is unlike the training (see decide_frame.py)."""
    rules = _rules()
    made = rules.pictures_for if bundle.get("variant") == HEAD else rules.picture_for
    return made(bundle, rules.pixels_of((folder / golden["image"]).read_bytes()))


def ask_head(questions: Questions, image: str, frame: bytes, bundle: dict[str, Any]) -> dict[str, Any]:
    """The outcome of a raw frame of RAW_BYTES by the bundle's head; `image` names it in errors."""
    return _ask_head(questions, image, bundle, *_rules().pictures_for(bundle, frame))


def _ask_head(
    questions: Questions, image: str, bundle: dict[str, Any], pictures: list[bytes] | None, unlike: bool
) -> dict[str, Any]:
    rules = _rules()
    if pictures is None:
        return dict(rules.without_model(bundle, blank=True))
    states = [questions.hidden_state(image, picture) for picture in pictures]
    return dict(rules.with_head(bundle, questions.head, states, unlike=unlike))


def check_head_frame(
    questions: Questions, golden: dict[str, Any], bundle: dict[str, Any], seconds: float, pictures: Callable[[], Any]
) -> dict[str, Any]:
    """The result of `check_frame` for a golden frame of the head.

    A decision is compared where rounding cannot change it, the probabilities always. There are no words to compare.
    """
    image, expected, wanted = golden["image"], golden["decision"], golden.get("log_probabilities")
    began = time.monotonic()
    with time_limit(seconds, image):
        outcome = _ask_head(questions, image, bundle, *pictures())
    scores = outcome["scores"]
    result = {
        **_no_result(golden, time.monotonic() - began),
        "category": outcome["model_category"],
        "decision": {key: outcome[key] for key in ("category", "decided_by")},
    }
    if scores and wanted:
        found = {label: math.log(max(score, 1e-300)) for label, score in scores.items()}
        result |= _differences(found, golden, bundle["tolerances"])
    if not result["why"] and (expected or not scores):
        result["why"] = _other_decision(image, result["decision"], expected or {"category": None, "decided_by": "-"})
    return result


def _no_result(golden: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The result for a golden frame before anything is compared."""
    return {
        "image": golden["image"],
        "expected": golden["category"],
        "same_answer": True,
        "answer": None,
        "log_probabilities": None,
        "off_category": None,
        "off_others": None,
        "seconds": seconds,
        "why": "",
    }


def _differences(found: dict[str, float], golden: dict[str, Any], tolerances: dict[str, float]) -> dict[str, Any]:
    """The differences of the log-probabilities from the ground's, and `why` if one is larger than allowed."""
    wanted = golden["log_probabilities"]
    off = {label: abs(found[label] - wanted[label]) for label in wanted}
    largest = max(off, key=lambda label: off[label] / _allowed(label, golden, tolerances))
    allowed = _allowed(largest, golden, tolerances)
    return {
        "log_probabilities": found,
        "off_category": off[golden["category"]],
        "off_others": max(off[label] for label in off if label != golden["category"]),
        "why": (
            f"{golden['image']}: the log-probability of {largest} is {found[largest]:.4f} instead of "
            f"{wanted[largest]:.4f}; a difference of {allowed:g} is allowed"
            if off[largest] > allowed
            else ""
        ),
    }


def check_frame(
    questions: Questions,
    golden: dict[str, Any],
    bundle: dict[str, Any],
    seconds: float,
    limit: float,
    pictures: Callable[[], Any],
) -> dict[str, Any]:
    """The result for one golden frame, which is decided as in flight, from the camera's pixels on.

    Expected and found decision and answer, differences of log-probabilities, and `why` if NO-GO. Raises NoGoError if
    the frame takes more than `seconds`.
    """
    rules, image, expected = _rules(), golden["image"], golden["decision"]
    began = time.monotonic()
    with time_limit(seconds, image):
        picture, unlike = pictures()
        if picture is not None:
            answer, found, of_fields = questions.ask_with_fields(image, picture)
    result = _no_result(golden, time.monotonic() - began)
    if picture is None:
        outcome = rules.without_model(bundle, blank=True)
    else:
        outcome = rules.with_model(bundle, answer, found, of_fields, unlike=unlike)
    result |= {"category": outcome["model_category"], "decision": {key: outcome[key] for key in expected}}
    if picture is None or golden["answer"] is None:
        result["why"] = _other_decision(image, result["decision"], expected)
        return result
    if outcome["model_category"] is None:
        raise NoGoError(f"{image}: the answer is not a verdict: {_short(answer)}")
    result |= {"answer": answer, "same_answer": answer == golden["answer"]}
    # Only comparable after the same reason. A verdict that comes first does not depend on it.
    if not result["same_answer"] and "verdict_only" not in bundle["request"]:
        with time_limit(limit, f"{image}, after the words of the ground"):
            found, of_fields = questions.score_after(image, picture, golden["answer"])
        result["decision"] = {
            key: rules.with_model(bundle, golden["answer"], found, of_fields, unlike=unlike)[key] for key in expected
        }
    result |= _differences(found, golden, bundle["tolerances"])
    # After other words, a hard frame may get another category, though this machine computes as the ground does: of it,
    # only what follows the words of the ground is compared.
    if result["category"] != golden["category"] and (result["same_answer"] or not golden["hard"]):
        result["why"] = f"{image}: {result['category']} instead of {golden['category']}"
    elif not result["why"]:
        result["why"] = _other_decision(image, result["decision"], expected)
    return result


def _other_decision(image: str, found: dict[str, Any], expected: dict[str, Any]) -> str:
    """Why the decision is not the ground's; empty if it is."""
    if found == expected:
        return ""
    said = [f"{one['category']} (decided by: {one['decided_by']})" for one in (found, expected)]
    return f"{image}: the decision is {said[0]} instead of {said[1]}"


def _rules() -> Any:
    return _beside("decide_frame")


def _beside(name: str) -> Any:
    """The module beside this file; imported only after the hashes of the bundle's files were checked."""
    if __package__:
        return importlib.import_module(f"{__package__}.{name}")
    sys.dont_write_bytecode = True  # the bundle stays as it is
    sys.path.insert(0, str(Path(__file__).resolve().parent))  # with python3 -I, it is not on the path
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


def _allowed(label: str, golden: dict[str, Any], tolerances: dict[str, float]) -> float:
    return tolerances["category_nats" if label == golden["category"] else "other_labels_nats"]


# --- command line ---------------------------------------------------------------------------------------------


def check(options: argparse.Namespace, report: dict[str, Any]) -> None:
    """Run the checks and fill in `report`; raises NoGoError at the first failure.

    For a bundle with a head, started servers are checked for both variants, a running one for the one that it serves.
    """
    folder = options.bundle.resolve()
    with time_limit(options.limit, "reading the bundle's files"):
        bundle = read_bundle(folder)
    report |= {"files": len(bundle["files"]) + 2, "bundle_sha256": _sha256(folder / LIST)}
    report["verdict"] = bundle.get("verdict")
    both = bundle.get("head") and options.llama_server and not options.variant
    for variant in (PAIR, HEAD) if both else (options.variant,):
        check_variant(options, report, folder, flown(bundle, variant))


def check_variant(options: argparse.Namespace, report: dict[str, Any], folder: Path, bundle: dict[str, Any]) -> None:
    """Check the golden frames of one variant."""
    images: list[dict[str, Any]] = []
    with ExitStack() as stack:
        server = OwnServer(folder, options.llama_server, bundle.get("variant", "")) if options.llama_server else None
        own = stack.enter_context(server) if server else None
        connection = own.connection if own else Connection(options.url, options.key)
        try:
            with time_limit(options.limit, "waiting for the server"):
                wait_until_ready(connection, own)
                marker, notes = check_server(connection, folder, bundle, own, strict=True)
            report["notes"] += [note for note in notes if note not in report["notes"]]
            questions = Questions(connection, folder, bundle, marker)
            seconds = options.time_out or bundle["seconds_per_frame_at_most"]
            for golden in bundle["golden"]:
                result = check_golden(questions, folder, golden, bundle, seconds, options.limit)
                images.append(result)
                report["images"].append({**result, **named(bundle)})
        except NoGoError:
            if own:
                time.sleep(1)  # a dying process closes its socket first
                own.check_alive()  # its log gives a better reason
            raise
        peak = own.peak_bytes() if own else None
        report["peak_bytes"] = max(peak or 0, report["peak_bytes"] or 0) or None
    failures = [image["why"] for image in images if image["why"]]
    if failures:
        of = " (head)" if bundle.get("variant") == HEAD else ""
        raise NoGoError(failures[0] + of + (f" (and {len(failures) - 1} more)" if failures[1:] else ""))
    asked = [image for image in images if image["answer"] is not None]
    other_words, most = sum(not image["same_answer"] for image in asked), bundle["tolerances"]["other_words"]
    if other_words > most:
        raise NoGoError(f"{other_words} of {len(asked)} reasons differ in their words; {most} may differ by rounding")


def lines_of(report: dict[str, Any]) -> Iterator[str]:
    """The lines of the printed report: table of golden frames, notes, and GO or NO-GO last."""
    if report["files"]:
        yield f"{report['files']} files are unchanged; {LIST} has sha256 {report['bundle_sha256']}"
    if report["images"]:
        yield from _table(report["images"])
    if report["peak_bytes"]:
        yield f"the server's peak memory: {report['peak_bytes'] / 1e6:.0f} MB"
    yield from report["notes"]
    for image in report["images"]:
        if not image["same_answer"] and not image["why"]:
            yield f"note: {image['image']} has other words, which rounding explains: {image['answer']}"
    if report["verdict"]:
        yield from _verdict_lines(report["verdict"])
    yield "GO" if report["go"] else f"NO-GO: {report['why']}"


def _table(images: list[dict[str, Any]]) -> Iterator[str]:
    """A line per golden frame: the model's category, the decision, the differences, and the seconds."""
    columns = ("image", "model", "decision", "decided by", "off, category", "off, others", "same words", "seconds")
    rows = [columns]
    for image in images:
        off = ("-" if image[key] is None else f"{image[key]:.4f}" for key in ("off_category", "off_others"))
        decision = (str(image["category"] or "-"), str(image["decision"]["category"]), image["decision"]["decided_by"])
        words = "-" if image["answer"] is None else "yes" if image["same_answer"] else "no"
        rows.append(
            (
                image["image"] + (" (head)" if image.get("variant") == HEAD else ""),
                *decision,
                *off,
                words,
                f"{image['seconds']:.2f}",
            )
        )
    widths = [max(len(row[place]) for row in rows) for place in range(len(columns))]
    for row in rows:
        left = "  ".join(f"{cell:{width}}" for cell, width in zip(row[:4], widths))  # noqa: B905 - Python 3.9
        yield left + "".join(f"  {cell:>{width}}" for cell, width in zip(row[4:], widths[4:]))  # noqa: B905


def _verdict_lines(verdict: dict[str, Any]) -> Iterator[str]:
    """What the ground says of the model; GO and NO-GO only say whether this machine answers like the ground."""
    because = f" ({', '.join(verdict['because'])})" if verdict["because"] else ""
    yield f"the ground's verdict on this model: {verdict['verdict']}{because}"
    if verdict.get("measured_on"):
        yield f"that verdict was measured on {verdict['measured_on']}"
    if verdict["accepted_risk"]:
        yield f"risk accepted by the ground: {verdict['accepted_risk']}"
    yield "this installation answers like the ground (GO) or does not (NO-GO):"


def add_time_out(parser: argparse.ArgumentParser) -> None:
    """The option --time-out of the three programs that ask about frames."""
    parser.add_argument(
        "--time-out",
        type=_seconds,
        metavar="SECONDS",
        help=f"most seconds per frame (default: seconds_per_frame_at_most in {LIST})",
    )


def add_variant(parser: argparse.ArgumentParser) -> None:
    """The option --variant of the three programs."""
    parser.add_argument(
        "--variant",
        choices=(HEAD, PAIR),
        help="of a bundle with a head: the head, or the language model of the pair (default: the head; "
        "check_flight.py --llama-server checks both)",
    )


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value <= 86_400:
        raise argparse.ArgumentTypeError(f"{text} is outside 0..86400 seconds")
    return value


def read_server_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Make --llama-server an absolute path of a program, and set `key` to that of --key-file or LLAMA_API_KEY."""
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


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The parsed command line; an invalid one ends the program with status 2."""
    parser = argparse.ArgumentParser(description="Check a flight bundle on this machine: GO or NO-GO.")
    parser.add_argument("--bundle", type=Path, default=Path(__file__).parent, help="the bundle (default: beside this)")
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="a running server (default: %(default)s)")
    parser.add_argument("--key-file", type=Path, help="file with the running server's key (default: LLAMA_API_KEY)")
    parser.add_argument("--llama-server", type=Path, metavar="PATH", help="start serve.sh with this program instead")
    parser.add_argument(
        "--limit", type=_seconds, default=300, metavar="SECONDS", help="limit of every other step (default: 300)"
    )
    add_time_out(parser)
    add_variant(parser)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    options = parser.parse_args(arguments)
    if urllib.parse.urlsplit(options.url).scheme not in ("http", "https"):
        parser.error(f"--url {options.url} is not an http:// URL")
    read_server_options(parser, options)
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
