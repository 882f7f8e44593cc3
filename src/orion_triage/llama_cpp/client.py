"""llama.cpp's HTTP server: started on 127.0.0.1 with a key, asked, and always stopped."""

import base64
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from orion_triage.errors import AnswerError, ServerError
from orion_triage.safe.reading import parse_json, shown

_NOT_UTF8 = b"does not match the expected Content-only format"  # llama.cpp's word for an answer of broken bytes
_NOT_TEXT = ("the answer is not UTF-8.", "Decode greedily, or under the grammar.")
LOADING_SECONDS = 60  # for which 503 is waited out
LARGEST_REPLY_BYTES = 20_000_000  # of one answer; the largest of ours has 0.2 MB
SHOWN_BYTES = 2000  # of a reply that is no answer, in the error
_ROUNDING = 1e-3  # by which a log-probability may be above 0
_SMALLEST_LOG_PROBABILITY = -700.0  # exp() of less is nearly 0 in 64 bits
CANDIDATES = 100  # next tokens whose probabilities are asked for; each costs 9 microseconds and 0.1 kB a token


class Client:
    """The calls that evaluation and triage need, over a running server."""

    def __init__(self, base_url: str, api_key: str = "", *, timeout_seconds: float = 600) -> None:
        from orion_triage.safe.bounded_http import BoundedHttp

        # Not packed: a few kilobytes can be packed, and packed again, so that they unpack to terabytes.
        headers = {"Accept-Encoding": "identity"}
        if api_key:
            headers["Authorization"] = f"Bearer {api_key}"
        self.base_url = base_url.rstrip("/")
        self._timeout_seconds = timeout_seconds
        self._http = BoundedHttp(base_url=self.base_url, headers=headers)
        self._marker = ""
        self._primed = b""

    def close(self) -> None:
        self._http.close()

    def ready(self, timeout_seconds: float) -> None:
        """Wait while the server loads its model; raises ServerError when nobody answers or it takes too long."""
        import httpx

        deadline = time.monotonic() + timeout_seconds
        while True:
            try:
                status = self._status("/health", timeout_seconds)
            except httpx.HTTPError as error:
                raise ServerError(
                    f"no server answers at {self.base_url} ({type(error).__name__}).",
                    "Start llama-server, or check the address.",
                ) from None
            if status == 200:
                return
            if status != 503:
                raise ServerError(f"/health answered {status} at {self.base_url}.", "Is this a llama.cpp server?")
            if time.monotonic() > deadline:
                raise ServerError(
                    f"the server at {self.base_url} still loads its model after {timeout_seconds:g} s.",
                    "Wait until it has loaded, then try again.",
                )
            time.sleep(0.2)

    def is_ready(self) -> bool:
        import httpx

        try:
            return self._status("/health", 5) == 200
        except httpx.HTTPError:
            return False

    def _status(self, path: str, timeout_seconds: float) -> int:
        """What the server answers with, whatever it goes on to say."""
        with self._http.stream("GET", path, timeout_seconds, timeout=timeout_seconds) as reply:
            return reply.status_code

    def props(self) -> dict[str, Any]:
        """What the server says of itself: media marker, chat template, build."""
        return self._request("GET", "/props", None)

    def props_or_none(self) -> dict[str, Any] | None:
        """`props`, or None from a server that has no such page and so is not llama.cpp's."""
        import httpx

        try:
            status = self._status("/props", 30)
        except httpx.HTTPError as error:
            raise ServerError(
                f"no server answers at {self.base_url} ({type(error).__name__}).",
                "Start llama-server, or check the address.",
            ) from None
        return None if status in (404, 405) else self.props()

    def served_model(self) -> str:
        """The first model that an OpenAI-compatible server lists."""
        listed = self._request("GET", "/v1/models", None).get("data")
        first = listed[0] if isinstance(listed, list) and listed else None
        name = first.get("id") if isinstance(first, dict) else None
        if not isinstance(name, str):
            raise ServerError(f"{self.base_url}/v1/models lists no model.", "Load a model that takes images first.")
        return name

    def chat_completion(self, model: str, messages: list[dict[str, Any]], max_tokens: int) -> str:
        """The greedy answer through OpenAI's interface."""
        body = {"model": model, "messages": messages, "max_tokens": max_tokens, "temperature": 0, "seed": 0}
        reply = self._request("POST", "/v1/chat/completions", body)
        try:
            content = reply["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            content = None
        if not isinstance(content, str):
            raise ServerError("the server's reply has no message.", "Does its model take images?")
        _require_utf8(content)
        return content

    def tokenize(self, text: str) -> list[int]:
        """The model's token ids of `text`, special tokens recognized, none added."""
        body = {"content": text, "add_special": False, "parse_special": True}
        tokens = self._request("POST", "/tokenize", body).get("tokens")
        if not isinstance(tokens, list) or not all(_is_count(token) for token in tokens):
            raise ServerError("/tokenize answered no list of token numbers.", "Is this a llama.cpp server?")
        return tokens

    def prime(self, image_png: bytes) -> None:
        """Have the server read the image and keep what it saw, for every prompt that asks about it from now on.

        LFM2's short convolutions cannot be rolled back to any token, only to a place that the server kept: the end of
        this request. Costs nothing when the last image that this client primed was the same.
        """
        if image_png == self._primed:
            return
        self._primed = b""
        self._complete(
            self.chat("", self.marker).partition(self.marker)[0] + self.marker, image_png, 0, cache_prompt=True
        )
        self._primed = image_png

    def complete(self, prompt: str, image_png: bytes, max_tokens: int, grammar: str = "") -> str:
        """The greedy answer to one frame; the same tokens as transformers' chat template gives."""
        answer: str = self.completion(prompt, image_png, max_tokens, grammar=grammar)["content"]
        return answer

    def complete_and_score(
        self,
        prompt: str,
        image_png: bytes,
        max_tokens: int,
        *,
        cue: str,
        tokens: Sequence[int],
        grammars: tuple[str, str] = ("", ""),
        options: Mapping[str, float] | None = None,
        primed: bool = False,
    ) -> tuple[str, list[float] | None]:
        """The answer, and the log-probabilities of `tokens` right after its first `cue`; None without the cue.

        The answer is asked for in two parts, up to the cue and from it on, each under its own of `grammars`; the
        server keeps what it has read, so the second part costs no more than its tokens. Probabilities are the
        model's own, from before grammar and sampling. With `primed`, what the server keeps of the image is used again:
        see `prime`; without, it looks at the image anew, as in flight.
        """
        sampling: dict[str, Any] = dict(options or {})
        if primed:
            self.prime(image_png)
        first = self.completion(
            prompt, image_png, max_tokens, stop=[cue], cache_prompt=primed, grammar=grammars[0], **sampling
        )
        text: str = first["content"]
        predicted = first.get("tokens_predicted")
        if not isinstance(predicted, int) or not _is_count(predicted):
            raise ServerError("the server's reply has no tokens_predicted.", "Is this a llama.cpp server?")
        left = max_tokens - predicted
        if first.get("stopping_word") != cue or left < 1:
            return text, None
        text += cue
        rest = self.completion(
            prompt, image_png, left, start=text, cache_prompt=True, n_probs=CANDIDATES, grammar=grammars[1], **sampling
        )
        return text + rest["content"], first_log_probabilities(rest, tokens)

    @property
    def marker(self) -> str:
        """What stands for the image in a prompt of this server's."""
        if not self._marker:
            told = self.props().get("media_marker") or "<__media__>"
            if not isinstance(told, str) or not told.isprintable() or len(told) > 200:
                raise ServerError(f"the server's media_marker is {shown(told)}.", "Is this a llama.cpp server?")
            self._marker = told
        return self._marker

    @staticmethod
    def chat(prompt: str, image: str) -> str:
        """One user's turn up to where the answer begins, with `image` where the image is."""
        return f"<|im_start|>user\n{image}\n{prompt}<|im_end|>\n<|im_start|>assistant\n"

    def completion(
        self, prompt: str, image_png: bytes, max_tokens: int, *, start: str = "", **options: Any
    ) -> dict[str, Any]:
        """The server's whole reply to one frame and prompt, from `start` of the answer on.

        The chat string is written out, because the chat endpoint would add a thinking block; the server puts the
        start token in front, and image start and end around the marker.
        """
        return self._complete(self.chat(prompt, self.marker) + start, image_png, max_tokens, **options)

    def _complete(self, text: str, image_png: bytes, max_tokens: int, **options: Any) -> dict[str, Any]:
        body = {
            "prompt": {"prompt_string": text, "multimodal_data": [base64.b64encode(image_png).decode()]},
            "n_predict": max_tokens,
            "temperature": 0,
            "top_k": 1,
            "seed": 0,
            "cache_prompt": False,
            **{key: value for key, value in options.items() if value != ""},
        }
        reply = self._request("POST", "/completion", body)
        if not isinstance(reply.get("content"), str):
            raise ServerError("the server's reply has no content.", "Is this a llama.cpp server?")
        answered, asked = reply.get("prompt"), text.partition(self.marker)[2]
        if isinstance(answered, str) and not answered.endswith(asked):
            raise ServerError(
                f"the server's reply is to another prompt: ...{answered[-60:]!r}.", "Is a proxy between, or a cache?"
            )
        _require_utf8(reply["content"])
        return reply

    def _request(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        """The JSON object that the server answers; raises ServerError for everything that is none."""
        deadline = time.monotonic() + LOADING_SECONDS
        while True:
            status, kind, data = self._exchange(method, path, body)
            if status != 503 or time.monotonic() > deadline:
                break
            time.sleep(0.2)  # still loading its model
        text = data[:SHOWN_BYTES].decode("utf-8", "replace")
        if status == 401:
            raise ServerError("the server refuses the key (401).", "Set LLAMA_API_KEY to the server's --api-key.")
        if status == 500 and _NOT_UTF8 in data:
            raise AnswerError(*_NOT_TEXT)
        if status != 200:
            raise ServerError(f"{path} answered {status}: {text[:200]!r}.", "See the server's log.")
        try:
            value = parse_json(data)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise ServerError(
                f"{path} answered no JSON object but {kind[:80]}: {text[:80]!r}.", "Is this a llama.cpp server?"
            )
        return value

    def _exchange(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[int, str, bytes]:
        """One request: (status, content type, body), bounded in bytes and in seconds however slowly it drips."""
        import httpx

        data = bytearray()
        try:
            seconds = self._timeout_seconds
            with self._http.stream(method, path, seconds, json=body, timeout=seconds) as reply:
                if reply.headers.get("content-encoding", "identity") != "identity":
                    raise ServerError(f"{path} answered with packed bytes.", "Have the proxy before it not pack them.")
                for part in reply.iter_bytes():
                    data += part
                    if len(data) > LARGEST_REPLY_BYTES:
                        raise ServerError(
                            f"{path} answered more than {LARGEST_REPLY_BYTES // 1_000_000} MB.",
                            "Is this a llama.cpp server?",
                        )
                return reply.status_code, reply.headers.get("content-type", "no content type"), bytes(data)
        except httpx.ConnectError:
            raise ServerError(
                f"no server answers at {self.base_url}.", "Start llama-server, or check the address."
            ) from None
        except httpx.TimeoutException:
            raise ServerError(
                f"{path} has not finished its answer after {self._timeout_seconds:g} s.", "See the server's log."
            ) from None
        except httpx.HTTPError as error:
            raise ServerError(
                f"the server at {self.base_url} broke off: {type(error).__name__} {error}.", "See its log."
            ) from None


def first_log_probabilities(reply: dict[str, Any], tokens: Sequence[int]) -> list[float] | None:
    """The log-probabilities of `tokens` where a reply's first token stands; None from a reply that lists none.

    They are the model's own, from before the grammar; a token beyond the list is no likelier than its last.
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
    # Above 0 by rounding at most; and all so small that exp() gives nothing would leave no scores to compare.
    if not all(value <= _ROUNDING for value in found) or not max(found) > _SMALLEST_LOG_PROBABILITY:
        raise ServerError("the server's reply has no log-probabilities where it lists them.", "See the server's log.")
    return found


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _require_utf8(text: str) -> None:
    """JSON can hold half of a surrogate pair, which no file and no terminal takes."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise AnswerError(*_NOT_TEXT)
