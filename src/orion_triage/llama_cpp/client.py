"""HTTP client of a llama.cpp server."""

import base64
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeGuard
from urllib.parse import quote

from orion_triage.errors import AnswerError, ParameterError, RateLimitError, ServerError
from orion_triage.mission.prompt import IMAGE
from orion_triage.safe.proxies import without_credentials
from orion_triage.safe.reading import parse_json, shown

_NOT_UTF8 = b"does not match the expected Content-only format"  # llama.cpp's message for an answer of invalid bytes
_NOT_TEXT = ("the answer is not UTF-8.", "Decode greedily, or with the grammar.")
LOADING_SECONDS = 60  # how long to retry on 503
RATE_LIMIT_SECONDS = 120  # how long to retry on 429, with the waits that the server asks for, or growing ones
LARGEST_REPLY_BYTES = 20_000_000  # of one reply; the largest measured has 0.2 MB
SHOWN_BYTES = 2000  # of an invalid reply, shown in the error
_ROUNDING = 1e-3  # by which a log-probability may be above 0
_SMALLEST_LOG_PROBABILITY = -700.0  # exp() of less is nearly 0 in 64 bits
# What a server was started with holds for all requests that do not say otherwise: `--repeat-penalty 1.3` alone changes
# verdicts. Below the first three, these values change nothing.
GREEDY = {
    "temperature": 0, "top_k": 1, "seed": 0,
    "repeat_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "dry_multiplier": 0.0,
    "xtc_probability": 0.0, "dynatemp_range": 0.0, "typical_p": 1.0, "top_p": 1.0, "min_p": 0.0, "top_n_sigma": -1.0,
    "mirostat": 0, "n_keep": 0, "ignore_eos": False, "logit_bias": [],
}  # fmt: skip
# What replaces a parameter of a chat that the server refuses, "" for nothing: OpenAI's newer models take neither
# max_tokens nor a temperature of 0 (by reports of 2025 and 2026).
INSTEAD = {"max_tokens": "max_completion_tokens", "temperature": "", "seed": ""}
# Keeps the token after part of a name printable, which an untrained model's is not; the server would answer 500.
PRINTABLE = "root ::= [ -~]+"
_PROBE = "zq7 orion probe"
# A server saves its state at the end of a request, and a few tokens before that: it may continue from either.
CHECKPOINT_TOKENS = 4
CANDIDATES = 100  # candidates per token with probabilities; each costs 9 microseconds and 0.1 kB per token


@dataclass(frozen=True)
class Turn:
    """The text of a user's turn before its content, and after it up to the beginning of the answer.

    It belongs to the family of the model, whose chat template renders the same text.
    """

    before: str
    after: str


class Client:
    """The calls that evaluation and triage need, over a running server.

    `model` is sent with each request: a llama.cpp router passes the request on to the server of that model. `turn` is
    needed for questions, not for tokens and properties.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str = "",
        *,
        model: str = "",
        turn: Turn | None = None,
        timeout_seconds: float = 600,
    ) -> None:
        from orion_triage.safe.bounded_http import BoundedHttp

        # No compression: a few kilobytes, compressed repeatedly, can unpack to terabytes.
        headers = {"Accept-Encoding": "identity"}
        if api_key:
            headers["Authorization"] = f"Bearer {api_key}"
        url = base_url.rstrip("/")
        self.base_url = without_credentials(url)  # for messages
        self._key = api_key
        self.refused: list[str] = []  # parameters of `chat_completion` that the server does not take
        self._model = model
        self._turn = turn
        self._timeout_seconds = timeout_seconds
        self._http = BoundedHttp(url, base_url=url, headers=headers)
        self._marker = ""
        self._primed = b""  # the image whose state the server has
        self._kept, self._kept_tokens = "", 0  # the text before every image, if the server has its state
        self.texts_lost = 0  # how often a reply said that the server had lost that state

    def close(self) -> None:
        self._http.close()

    def ready(self, timeout_seconds: float) -> None:
        """Wait until the server has loaded its model; raises ServerError if it does not answer or after the timeout."""
        import httpx

        deadline = time.monotonic() + timeout_seconds
        while True:
            try:
                status = self._status("/health", timeout_seconds)
            except httpx.HTTPError as error:
                raise self._no_answer(error) from None
            if status == 200:
                return
            if status != 503:
                raise ServerError(
                    f"{self.base_url}/health answered {status} instead of 200.", "Check that it is a llama.cpp server."
                )
            if time.monotonic() > deadline:
                raise ServerError(
                    f"the server at {self.base_url} is still loading its model after {timeout_seconds:g} s.",
                    "Wait until it has loaded, then run the command again.",
                )
            time.sleep(0.2)

    def is_ready(self) -> bool:
        import httpx

        try:
            return self._status("/health", 5) == 200
        except httpx.HTTPError:
            return False

    def _status(self, path: str, timeout_seconds: float) -> int:
        """The HTTP status; the body is not read."""
        with self._http.stream("GET", path, timeout_seconds, timeout=timeout_seconds) as reply:
            return reply.status_code

    def props(self) -> dict[str, Any]:
        """The server's properties: media marker, chat template, build."""
        return self._request("GET", "/props", None)

    def llama_cpp_props(self) -> dict[str, Any] | None:
        """`props` of a llama.cpp server that has loaded a model; None for any other server.

        Other servers have a page of this name too (KoboldCpp), or answer every address with status 200 (LM Studio).
        llama.cpp's names the model's file and its own build. Raises ServerError if nobody answers or the key is wrong.
        """
        status, _, data = self._exchange("GET", "/props", None)
        props: Any = None
        if status in (401, 503):  # a wrong key, and a model that is still loading
            props = self.props()
        elif status == 200:
            with suppress(ValueError):
                props = parse_json(data)
        said = [props.get(name) for name in ("model_path", "build_info")] if isinstance(props, dict) else []
        return props if said and all(isinstance(text, str) and text for text in said) else None

    def served_models(self) -> list[str]:
        """The models that an OpenAI-compatible server lists, in its order."""
        listed = self._request("GET", "/v1/models", None).get("data")
        entries = listed if isinstance(listed, list) else []
        return [entry["id"] for entry in entries if isinstance(entry, dict) and isinstance(entry.get("id"), str)]

    def chat_completion(
        self, model: str, messages: list[dict[str, Any]], max_tokens: int, *, adapt: bool = False
    ) -> tuple[str, tuple[int, int] | None]:
        """The greedy answer through the OpenAI-compatible interface, and its tokens.

        The text is empty if the model ended without one. The tokens are those of prompt and answer as the server counts
        them; None if it does not. With `adapt`, a parameter that the server refuses is left out or replaced, and
        listed in `refused`: the answer may then not be the greedy one.
        """
        settings = {"max_tokens": max_tokens, "temperature": 0, "seed": 0}
        while True:
            named = {INSTEAD[name] if name in self.refused else name: value for name, value in settings.items()}
            body = {"model": model, "messages": messages} | {name: value for name, value in named.items() if name}
            try:
                reply = self._request("POST", "/v1/chat/completions", body)
                break
            except ParameterError as error:
                if not adapt or error.parameter in self.refused or error.parameter not in INSTEAD:
                    raise
                self.refused.append(error.parameter)
        try:
            message = reply["choices"][0]["message"]
            content = "" if message["content"] is None else message["content"]  # null: refused, or out of tokens
        except (KeyError, IndexError, TypeError):
            content = None
        if not isinstance(content, str):
            raise ServerError("the server's reply has no message.", "Check that its model accepts images.")
        _require_utf8(content)
        usage = reply.get("usage")
        counted: Iterable[Any] = (
            map(usage.get, ("prompt_tokens", "completion_tokens")) if isinstance(usage, dict) else ()
        )
        counts = [count for count in counted if _is_count(count)]
        return content, (counts[0], counts[1]) if len(counts) == 2 else None

    def tokenize(self, text: str) -> list[int]:
        """The model's token ids of `text`; special tokens in it are recognized, none are added."""
        body = {"content": text, "add_special": False, "parse_special": True}
        tokens = self._request("POST", "/tokenize", body).get("tokens")
        if not isinstance(tokens, list) or not all(_is_count(token) for token in tokens):
            raise ServerError(
                "the reply of /tokenize has no list of token ids.", "Check that it is a llama.cpp server."
            )
        return tokens

    def hidden_state(self, user_text: str, image_png: bytes) -> list[float]:
        """The last hidden state after the user's turn up to and with the image, not normalized.

        For a server that was started with `--embedding --pooling last`.
        """
        before = self.chat(user_text, self.marker).partition(self.marker)[0]
        prompt = {
            "prompt_string": before + self.marker,
            "multimodal_data": [base64.b64encode(image_png).decode()],
        }
        found = self._value("POST", "/embeddings", {"content": prompt, "embd_normalize": -1})
        try:
            (state,) = found[0]["embedding"]
            values = [float(value) for value in state]
        except (KeyError, IndexError, TypeError, ValueError):
            values = []
        if not values or not all(math.isfinite(value) for value in values):
            raise ServerError("the reply of /embeddings has no hidden state.", "Read the server's log.")
        return values

    def require_grammar(self) -> None:
        """Raise ServerError unless the server keeps to a grammar, with a text that no model would write by itself.

        Some builds accept a grammar and drop it without a word (ggml-org/llama.cpp#24144, #24377). A fine-tuned model
        hides that on most frames.
        """
        body = {"prompt": "The", "n_predict": 24, **GREEDY, "cache_prompt": False, "grammar": f'root ::= "{_PROBE}"'}
        said = self._request("POST", "/completion", body).get("content")
        if said != _PROBE:
            raise ServerError(
                f"the server at {self.base_url} does not keep to a grammar: it answers {shown(said)} where only "
                f"{_PROBE!r} is allowed.",
                "Use the llama.cpp build of this project ('orion toolchain').",
            )

    def keep_text(self, user_text: str) -> bool:
        """Let the server read the text before the image once for all frames; False if there is none.

        The state of short convolutions can only be restored at a saved checkpoint, not at any token. The end of this
        request is such a checkpoint, from which requests with `cache_prompt` continue. Every reply to one says from how
        many tokens it went on. Does nothing while the server has the state; reads the text again when it was lost.
        """
        before = user_text.partition(IMAGE)[0]
        if not before:
            return False
        if before != self._kept:
            text = self.chat(user_text, IMAGE).partition(IMAGE)[0]
            asking = {**GREEDY, "n_predict": 0, "grammar": PRINTABLE, "cache_prompt": True}
            tokens = self._request("POST", "/completion", {"prompt": text, **asking}).get("tokens_evaluated")
            if not isinstance(tokens, int) or not _is_count(tokens):
                raise ServerError("the server's reply has no tokens_evaluated.", "Check that it is a llama.cpp server.")
            self._kept, self._kept_tokens, self._primed = before, tokens, b""
        return True

    @property
    def kept_tokens(self) -> int:
        """The tokens of the text that `keep_text` let the server read; 0 if there is none."""
        return self._kept_tokens

    def prime(self, user_text: str, image_png: bytes) -> None:
        """Let the server encode the image and cache its state for the following prompts about the same image.

        Its checkpoint is after the image, as that of `keep_text` is before it. Does nothing if this client primed the
        same image last.
        """
        if image_png == self._primed:
            return
        self._primed = b""
        self.keep_text(user_text)
        before = self.chat(user_text, self.marker).partition(self.marker)[0]
        self._complete(before + self.marker, image_png, 0, cache_prompt=True)
        self._primed = image_png

    def complete(self, user_text: str, image_png: bytes, max_tokens: int, grammar: str = "") -> str:
        """The greedy answer to one frame; the text has the same tokens as transformers' chat template."""
        answer: str = self.completion(user_text, image_png, max_tokens, grammar=grammar)["content"]
        return answer

    def complete_and_score(
        self,
        user_text: str,
        image_png: bytes,
        max_tokens: int,
        *,
        cue: str,
        after_cue: Sequence[tuple[str, Sequence[int]]],
        grammars: Mapping[str, str] | None = None,
        further: Mapping[str, Sequence[int]] | None = None,
        options: Mapping[str, float] | None = None,
        primed: bool = False,
    ) -> tuple[str, list[list[float]] | None, dict[str, list[float]]]:
        """The answer, and the log-probabilities of tokens after its first `cue`; None without the cue.

        `after_cue` are pairs of a text that follows the cue, mostly none, and the tokens that may come next. `further`
        are other cues with the tokens that may follow: the third result has the log-probabilities after each of them
        that the answer contains.

        One request up to the first cue, and one from each cue on, with its entry of `grammars` ("" for the beginning
        of the answer); and one more for each text that is not empty. The server caches the prompt, so they cost only
        their tokens. A single request does not do: the server holds back text that may be a cue, so its list of
        tokens does not say where a cue ends. Probabilities are the model's before grammar and sampling.
        With `primed`, the cached state of the image is used (see `prime`). Without it, the server encodes the image
        again, as in flight, and only the state of a text before the image is used.
        """
        sampling, cues = dict(options or {}), [cue, *(further or {})]
        if primed:
            self.prime(user_text, image_png)
        cached = primed or self.keep_text(user_text)
        text, parts = self._in_parts(user_text, image_png, max_tokens, cues, grammars or {}, cached, sampling)
        others = {
            other: values
            for other, tokens in (further or {}).items()
            if other in parts and (values := first_log_probabilities(parts[other][1], tokens))
        }
        found = []
        for more, tokens in after_cue if cue in parts else ():
            start, reply = parts[cue]
            if more:
                asking: dict[str, Any] = {"cache_prompt": True, "n_probs": CANDIDATES, **sampling}
                reply = self.completion(user_text, image_png, 1, start=start + more, grammar=PRINTABLE, **asking)
            found.append(first_log_probabilities(reply, tokens))
        return text, [one for one in found if one] if found and all(found) else None, others

    def _in_parts(
        self,
        user_text: str,
        image_png: bytes,
        max_tokens: int,
        cues: Sequence[str],
        grammars: Mapping[str, str],
        cached: bool,
        sampling: Mapping[str, float],
    ) -> tuple[str, dict[str, tuple[str, dict[str, Any]]]]:
        """The answer, and cue -> the answer up to and with it, and the server's reply from there on.

        With `cached`, the server may use what it has of the first prompt.
        """
        waiting, parts = list(cues), dict[str, tuple[str, dict[str, Any]]]()
        text, at, left = "", "", max_tokens
        while True:
            asking: dict[str, Any] = {"cache_prompt": cached or bool(at), "grammar": grammars.get(at, ""), **sampling}
            asking |= ({"stop": waiting} if waiting else {}) | ({"n_probs": CANDIDATES} if at else {})
            reply = self.completion(user_text, image_png, left, start=text, **asking)
            parts[at] = text, reply
            text += reply["content"]
            if not waiting:
                return text, parts
            at, predicted = reply.get("stopping_word", ""), reply.get("tokens_predicted")
            if not isinstance(predicted, int) or not _is_count(predicted):
                raise ServerError("the server's reply has no tokens_predicted.", "Check that it is a llama.cpp server.")
            left -= predicted
            if at not in waiting or left < 1:
                return text, parts
            text += at
            waiting = [other for other in waiting if other != at]

    @property
    def marker(self) -> str:
        """The server's placeholder for the image in a prompt."""
        if not self._marker:
            marker = self.props().get("media_marker") or "<__media__>"
            if not isinstance(marker, str) or not marker.isprintable() or len(marker) > 200:
                raise ServerError(
                    f"the server's media_marker is {shown(marker)}, not a short printable text.",
                    "Check that it is a llama.cpp server.",
                )
            self._marker = marker
        return self._marker

    def chat(self, user_text: str, image: str) -> str:
        """One user turn and the prefix of the answer, with `image` in the place of IMAGE."""
        assert self._turn is not None, "this client was made without the turn of its model's family"
        return f"{self._turn.before}{user_text.replace(IMAGE, image)}{self._turn.after}"

    def completion(
        self, user_text: str, image_png: bytes, max_tokens: int, *, start: str = "", **options: Any
    ) -> dict[str, Any]:
        """The server's complete reply to one frame and text; `start` is the beginning of the answer, if known.

        This method renders the chat text itself, because the chat endpoint would add a thinking block. The server
        adds the start token, and the image start and end tokens around the marker.
        """
        return self._complete(self.chat(user_text, self.marker) + start, image_png, max_tokens, **options)

    def _complete(self, text: str, image_png: bytes, max_tokens: int, **options: Any) -> dict[str, Any]:
        body = {
            "prompt": {"prompt_string": text, "multimodal_data": [base64.b64encode(image_png).decode()]},
            "n_predict": max_tokens,
            **GREEDY,
            "cache_prompt": False,
            **{key: value for key, value in options.items() if value != ""},
        }
        reply = self._request("POST", "/completion", body)
        if not isinstance(reply.get("content"), str):
            raise ServerError("the server's reply has no content.", "Check that it is a llama.cpp server.")
        answered, asked = reply.get("prompt"), text.partition(self.marker)[2]
        # Without spaces: of its tokens, the server makes "a few , all" to "a few, all" (a tokenizer's cleaning up).
        if isinstance(answered, str) and not answered.replace(" ", "").endswith(asked.replace(" ", "")):
            raise ServerError(
                f"the server's reply belongs to another prompt: ...{answered[-60:]!r}.",
                "Connect directly, without a proxy or cache.",
            )
        self._check_kept(reply, cached=bool(body["cache_prompt"]))
        _require_utf8(reply["content"])
        return reply

    def _check_kept(self, reply: dict[str, Any], *, cached: bool) -> None:
        """Forget the kept text if the server had lost its state, or was asked to begin anew."""
        timings = reply.get("timings")
        tokens = timings.get("cache_n") if isinstance(timings, dict) else None
        lost = cached and isinstance(tokens, int) and tokens < self._kept_tokens - CHECKPOINT_TOKENS
        if self._kept and (lost or not cached):
            self.texts_lost += lost
            self._kept, self._primed = "", b""

    def _request(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        """The JSON object in the server's reply; raises ServerError for any other reply."""
        value = self._value(method, path, body)
        if not isinstance(value, dict):
            raise ServerError(
                f"{path} answered {type(value).__name__} instead of a JSON object.",
                "Check that it is a llama.cpp server.",
            )
        return value

    def _value(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        """The JSON value in the server's reply; raises ServerError for a reply that is none."""
        from orion_triage.safe.bounded_http import retry_after_seconds

        began, pause = time.monotonic(), 1.0
        while True:
            status, headers, data = self._exchange(method, path, body)
            waited = time.monotonic() - began
            if status == 503 and waited <= LOADING_SECONDS:
                time.sleep(0.2)  # the server is still loading its model
                continue
            wait = retry_after_seconds(headers.get("retry-after", "")) or pause
            if status != 429 or waited + wait > RATE_LIMIT_SECONDS:
                break
            time.sleep(wait)
            pause *= 2
        text = data[:SHOWN_BYTES].decode("utf-8", "replace")
        if self._key:
            text = text.replace(self._key, "(key)")  # some servers repeat it
        if status == 401:
            raise ServerError("the server refused the key (401).", "Set LLAMA_API_KEY to the server's --api-key.")
        if status == 429:
            raise RateLimitError(
                f"{path} answered 429, too many requests: {text[:200]!r}.",
                "Wait, or raise the account's limit, then run the same command again to resume.",
            )
        if status == 500 and _NOT_UTF8 in data:
            raise AnswerError(*_NOT_TEXT)
        if status != 200:
            wrong = f"{path} answered {status}: {text[:200]!r}.", "Read the server's log."
            raise ParameterError(*wrong, parameter) if (parameter := _parameter_in(data)) else ServerError(*wrong)
        try:
            return parse_json(data)
        except ValueError:
            kind = headers.get("content-type", "no content type")
            raise ServerError(
                f"{path} answered {kind[:80]} instead of a JSON object: {text[:80]!r}.",
                "Check that it is a llama.cpp server.",
            ) from None

    def _no_answer(self, error: Exception) -> ServerError:
        if proxy := self._http.proxy:
            return ServerError(
                f"no server answers at {self.base_url} through the proxy {proxy} ({type(error).__name__}).",
                f"Start the server, correct {proxy.variable}, or add the server to NO_PROXY.",
            )
        return ServerError(
            f"no server answers at {self.base_url} ({type(error).__name__}).",
            "Start llama-server, or check the address.",
        )

    def _exchange(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[int, Mapping[str, str], bytes]:
        """One request: (status, headers, body), limited in bytes and in total seconds."""
        import httpx

        if self._model:
            if body is None:
                path = f"{path}?model={quote(self._model, safe='')}"
            else:
                body = {"model": self._model} | body
        data = bytearray()
        try:
            seconds = self._timeout_seconds
            with self._http.stream(method, path, seconds, json=body, timeout=seconds) as reply:
                if reply.headers.get("content-encoding", "identity") != "identity":
                    raise ServerError(f"the reply of {path} is compressed.", "Turn off compression in the proxy.")
                for part in reply.iter_bytes():
                    data += part
                    if len(data) > LARGEST_REPLY_BYTES:
                        raise ServerError(
                            f"the reply of {path} is larger than {LARGEST_REPLY_BYTES // 1_000_000} MB.",
                            "Check that it is a llama.cpp server.",
                        )
                return reply.status_code, reply.headers, bytes(data)
        except httpx.ConnectError as error:
            raise self._no_answer(error) from None
        except httpx.TimeoutException:
            raise ServerError(
                f"{path} did not finish its reply within {self._timeout_seconds:g} s.", "Read the server's log."
            ) from None
        except httpx.HTTPError as error:
            raise ServerError(
                f"the connection to {self.base_url} broke: {type(error).__name__} {error}.", "Read the server's log."
            ) from None


def _parameter_in(data: bytes) -> str:
    """The parameter that an error of OpenAI's form names; empty without one."""
    try:
        parameter = parse_json(data)["error"]["param"]
    except (ValueError, LookupError, TypeError):
        return ""
    return parameter if isinstance(parameter, str) else ""


def first_log_probabilities(reply: dict[str, Any], tokens: Sequence[int]) -> list[float] | None:
    """The log-probabilities of `tokens` at the reply's first token; None if the reply lists no probabilities.

    They are the model's, before the grammar. A token that is not listed gets the smallest listed value, its upper
    bound. Raises ServerError for values that are not log-probabilities.
    """
    steps = reply.get("completion_probabilities")
    if not steps:
        return None
    try:
        listed = {candidate["id"]: candidate["logprob"] for candidate in steps[0]["top_logprobs"]}
        least = min(listed.values())
        found = [float(listed.get(token, least)) for token in tokens]
    except (LookupError, TypeError, ValueError, OverflowError):
        found = [math.nan]
    # Values above 0 can only come from rounding. If all exp() are 0, there are no scores to compare.
    if not all(value <= _ROUNDING for value in found) or not max(found) > _SMALLEST_LOG_PROBABILITY:
        raise ServerError(
            "the server's reply has no valid log-probabilities in completion_probabilities.", "Read the server's log."
        )
    return found


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _require_utf8(text: str) -> None:
    """Raise AnswerError for half a surrogate pair: JSON allows it, but files and terminals do not."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise AnswerError(*_NOT_TEXT)
