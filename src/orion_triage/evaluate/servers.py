"""Third-party servers with llama.cpp's interface or an OpenAI-compatible one with images; several share the work."""

import base64
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import PurePath
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_incrementing

from orion_triage.errors import OrionError, RateLimitError, ServerError
from orion_triage.evaluate.backends import Backend, LlamaCppBackend
from orion_triage.llama_cpp.client import Client
from orion_triage.llama_cpp.server import said_of_itself
from orion_triage.mission.answer import Answer
from orion_triage.mission.mission import Mission
from orion_triage.mission.prompt import IMAGE
from orion_triage.mission.verdict import tokens_of_fields
from orion_triage.models.family import DEFAULT
from orion_triage.runs import manifest
from orion_triage.safe.proxies import without_credentials
from orion_triage.safe.reading import shown

if TYPE_CHECKING:
    from PIL import Image

TRIES = 3  # of one question at one server, before another server gets it
PAUSE_SECONDS = 2.0


@dataclass(frozen=True)
class Connected:
    """A connected server; `identity` is a hash of the properties of its model."""

    url: str
    backend: Backend
    identity: str
    model: str
    build: str
    now: Callable[[], str] | None = None  # returns its current identity
    said: Mapping[str, Any] = field(default_factory=dict)  # what it says of itself, for the manifest


def connect(address: str, key: str, mission: Mission, max_new_tokens: int) -> Connected:
    """Wait until the server has loaded its model, and detect its interface.

    `address` is a URL as people copy it (see `split_address`), optionally with `#MODEL`. A server is llama.cpp's if its
    /props names a model's file and a build. Any other is used through the OpenAI-compatible interface (vLLM, LM Studio,
    Ollama, KoboldCpp): answers without scores.

    Raises ServerError if no server answers, if it has neither interface, or if it has several models and none is named:
    which of them comes first says nothing (vLLM lists the base before its adapters).
    """
    url, asked = split_address(address)
    client = Client(url, key, turn=DEFAULT.TURN)  # a server does not say of which family its model is
    props, shown_url = client.llama_cpp_props(), client.base_url
    if props and props.get("role") == "router":  # one llama-server for several models, which each request names
        asked = _chosen(client.served_models(), asked, shown_url)
        client.close()
        client = Client(url, key, model=asked, turn=DEFAULT.TURN)
        props = client.props()  # the model's own; the router loads it now
    if props:
        client.ready(60)
        served = _served(props)
        if asked and asked not in _names_of(props):
            raise ServerError(
                f"{shown_url} serves {_shown(_names_of(props))}, not {asked!r}.",
                f"Pass {shown_url} to ask what it serves.",
            )
        backend: Backend = LlamaCppBackend(client, mission, max_new_tokens=max_new_tokens, primed=True)
        return Connected(
            shown_url,
            backend,
            manifest.sha256_of_listing(served),
            served["model_path"],
            f"llama.cpp {served['build_info']}",
            lambda: manifest.sha256_of_listing(_served(client.props())),
            said_of_itself(props),
        )
    return _through_chat(client, asked, max_new_tokens + tokens_of_fields(mission))


def connect_chat(address: str, key: str, max_new_tokens: int) -> Connected:
    """A server through its OpenAI-compatible interface, also one of llama.cpp: for a model of any family.

    Its chat template is the server's business. Parameters that it refuses are left out, and listed in `said`. Nobody
    asks after each answer whether the server still has the model.
    """
    url, asked = split_address(address)
    client = Client(url, key)
    found = _through_chat(client, asked, max_new_tokens, adapt=True)
    return replace(found, now=None, said={"refused_parameters": client.refused})


def _through_chat(client: Client, asked: str, max_new_tokens: int, *, adapt: bool = False) -> Connected:
    listed = client.served_models()
    model = _chosen(listed, asked, client.base_url)
    identity = manifest.sha256_of_listing({"model": model})
    return Connected(
        client.base_url,
        OpenAIBackend(client, model, max_new_tokens=max_new_tokens, adapt=adapt),
        identity,
        model,
        "OpenAI API",
        lambda: identity if not listed or model in client.served_models() else "",
    )


# Ends of the addresses that people copy from a server's messages or another program's settings.
_ENDS = ("/chat/completions", "/completions", "/completion", "/models", "/props", "/health", "/v1")


def split_address(address: str) -> tuple[str, str]:
    """(URL of the server, model or ""): `localhost:8080`, `http://gpu:8000/v1/` or `http://gpu:8000#my-adapter`.

    Raises OrionError for an address that is none.
    """
    text, _, model = address.strip().partition("#")
    text = text if "://" in text else f"http://{text}"
    try:
        parts = urlsplit(text)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and not parts.query
    except ValueError:
        good = False
    if not good:
        raise OrionError(
            f"{without_credentials(address)!r} is not an http(s) URL.", "Pass a URL like http://127.0.0.1:8080."
        )
    path = parts.path.rstrip("/")
    for end in _ENDS:
        path = path.removesuffix(end).rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{path}", model


def _chosen(models: Sequence[str], asked: str, url: str) -> str:
    """The model that is asked for, or the only one; a server that lists none may know the one that is asked for."""
    if asked and (asked in models or not models):
        return asked
    if not models:
        raise ServerError(
            f"{url}/v1/models lists no model.", f"Load a model that accepts images, or name it: {url}#MODEL"
        )
    named = f"Name one: {url}#{models[0]}"
    if asked:
        raise ServerError(f"{url} has no model {asked!r}; it lists {_shown(models)}.", named)
    if len(models) > 1:
        raise ServerError(f"{url} lists {len(models)} models: {_shown(models)}.", named)
    return models[0]


def _shown(models: Sequence[str]) -> str:
    return ", ".join(map(shown, models))


def _names_of(props: dict[str, Any]) -> list[str]:
    names = [str(props[name]) for name in ("model_alias", "model_path") if props.get(name)]
    return list(dict.fromkeys([*names, *(PurePath(name).name for name in names)]))


def _served(props: dict[str, Any]) -> dict[str, str]:
    return {name: str(props.get(name)) for name in ("model_path", "build_info", "chat_template")}


class OpenAIBackend:
    """A server with /v1/chat/completions that accepts images; it returns no probabilities, so there are no scores."""

    batch_size = 1

    def __init__(self, client: Client, model: str, *, max_new_tokens: int, adapt: bool = False) -> None:
        self._client, self._model, self._max_new_tokens, self._adapt = client, model, max_new_tokens, adapt

    def answer(self, images: "Sequence[Image.Image]", user_texts: Sequence[str]) -> list[Answer]:
        from orion_triage.imagery.frames import Frame

        asked = [
            self._messages(Frame(image, image.size).png(), user_text)
            for image, user_text in zip(images, user_texts, strict=True)
        ]
        replies = [
            self._client.chat_completion(self._model, messages, self._max_new_tokens, adapt=self._adapt)
            for messages in asked
        ]
        return [Answer(text, tokens=tokens) for text, tokens in replies]

    @staticmethod
    def _messages(png: bytes, user_text: str) -> list[dict[str, Any]]:
        """One image and one text, with the newline between them, as in training."""
        before, _, after = user_text.partition(IMAGE)
        address = f"data:image/png;base64,{base64.b64encode(png).decode()}"
        content: list[dict[str, Any]] = [
            {"type": "text", "text": before},
            {"type": "image_url", "image_url": {"url": address}},
            {"type": "text", "text": after},
        ]
        return [{"role": "user", "content": [part for part in content if part.get("text") != ""]}]


class SharedBackend:
    """One or several servers of the same model; a free server takes the next questions.

    A question to a failing server is retried; then the server is left out, and another one gets the question. Answers
    do not depend on the server if all servers compute alike.
    """

    def __init__(self, servers: Sequence[Connected], *, pause_seconds: float = PAUSE_SECONDS) -> None:
        # Two frames per server, with three questions each; the answers of a single server are stored one by one.
        self.batch_size = 6 * len(servers) if len(servers) > 1 else 1
        self._free: queue.SimpleQueue[Connected | None] = queue.SimpleQueue()  # None: no server is left
        for server in servers:
            self._free.put(server)
        self._left = len(servers)
        self._lock = threading.Lock()
        self._pause_seconds = pause_seconds
        self.lost: list[str] = []  # the reason for each server that was left out

    def answer(self, images: "Sequence[Image.Image]", user_texts: Sequence[str]) -> list[Answer]:
        asked = list(zip(images, user_texts, strict=True))
        servers = max(1, self._left)
        with ThreadPoolExecutor(servers) as pool:
            return list(chain.from_iterable(pool.map(self._ask_all, pieces(asked, -(-len(asked) // servers)))))

    def _ask_all(self, asked: "Sequence[tuple[Image.Image, str]]") -> list[Answer]:
        """Ask one server as long as it answers, because it has encoded the image for the first question."""
        answers: list[Answer] = []
        while True:
            server = self._free.get()
            if server is None:
                self._free.put(None)  # for the next waiting thread
                lost = "; ".join(self.lost)
                raise ServerError(
                    f"no server is left: {lost}", "Start a server, then run the same command again to resume."
                )
            try:
                answers += (self._ask(server, image, user_text) for image, user_text in asked[len(answers) :])
            except ServerError as error:
                self._leave_out(server, error)
            else:
                self._free.put(server)
                return answers

    def _ask(self, server: Connected, image: "Image.Image", user_text: str) -> Answer:
        again = Retrying(
            stop=stop_after_attempt(TRIES),
            wait=wait_incrementing(start=0, increment=self._pause_seconds),
            retry=retry_if_exception(_may_pass),
            reraise=True,
        )
        (answer,) = again(server.backend.answer, [image], [user_text])
        if server.now and server.now() != server.identity:
            raise ServerError(f"the server no longer serves {server.model}.", f"Load {server.model} again.")
        return answer

    def _leave_out(self, server: Connected, failure: ServerError) -> None:
        with self._lock:
            self._left -= 1
            self.lost.append(f"{server.url}: {failure.message}")
            if not self._left:
                self._free.put(None)


def _may_pass(error: BaseException) -> bool:
    """Whether the same question may succeed a moment later; after 429, the client has waited already."""
    return isinstance(error, ServerError) and not isinstance(error, RateLimitError)


def pieces(asked: "Sequence[tuple[Image.Image, str]]", most: int) -> "list[list[tuple[Image.Image, str]]]":
    """The questions in order, split where the image changes and after every `most` questions."""
    cut: list[list[tuple[Image.Image, str]]] = []
    for image, prompt in asked:
        if not cut or cut[-1][-1][0] is not image or len(cut[-1]) == most:
            cut.append([])
        cut[-1].append((image, prompt))
    return cut


def share_own(clients: Sequence[Client], backend: Callable[[Client], Backend]) -> Backend:
    """Servers that this process started with one model, each with a backend; a server that dies is left out."""
    if len(clients) == 1:
        return backend(clients[0])
    return SharedBackend([Connected(client.base_url, backend(client), "", "", "") for client in clients])


def share(urls: Sequence[str], key: str, mission: Mission, max_new_tokens: int) -> tuple[Backend, Connected]:
    """The servers as one backend, and the first of them; raises OrionError unless all serve the same model."""
    servers = [connect(url, key, mission, max_new_tokens) for url in urls]
    for server in servers[1:]:
        if server.identity != servers[0].identity:
            raise OrionError(
                f"{server.url} serves {server.model} ({server.build}), but {servers[0].url} serves "
                f"{servers[0].model} ({servers[0].build}).",
                "Load the same model with the same build on all servers.",
            )
    return SharedBackend(servers), servers[0]
