"""Third-party servers with llama.cpp's interface or an OpenAI-compatible one with images; several share the work."""

import base64
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_incrementing

from orion_triage.errors import OrionError, ServerError
from orion_triage.evaluate.backends import Backend, LlamaCppBackend
from orion_triage.llama_cpp.client import Client
from orion_triage.mission.answer import Answer
from orion_triage.runs import manifest

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


def connect(url: str, key: str, max_new_tokens: int) -> Connected:
    """Wait until the server has loaded its model, and detect its interface.

    A server without llama.cpp's /props is used as an OpenAI-compatible one (vLLM, LM Studio, Ollama): answers without
    scores. Raises ServerError if no server answers, or if it has neither interface.
    """
    client = Client(url, key)
    if props := client.props_or_none():
        client.ready(60)
        served = _served(props)
        backend: Backend = LlamaCppBackend(client, max_new_tokens=max_new_tokens, primed=True)
        return Connected(
            url,
            backend,
            manifest.sha256_of_listing(served),
            served["model_path"],
            f"llama.cpp {served['build_info']}",
            lambda: manifest.sha256_of_listing(_served(client.props())),
        )
    model = client.served_model()
    return Connected(
        url,
        OpenAIBackend(client, model, max_new_tokens=max_new_tokens),
        manifest.sha256_of_listing({"model": model}),
        model,
        "OpenAI API",
        lambda: manifest.sha256_of_listing({"model": client.served_model()}),
    )


def _served(props: dict[str, Any]) -> dict[str, str]:
    return {name: str(props.get(name)) for name in ("model_path", "build_info", "chat_template")}


class OpenAIBackend:
    """A server with /v1/chat/completions that accepts images; it returns no probabilities, so there are no scores."""

    batch_size = 1

    def __init__(self, client: Client, model: str, *, max_new_tokens: int) -> None:
        self._client, self._model, self._max_new_tokens = client, model, max_new_tokens

    def answer(self, images: "Sequence[Image.Image]", prompts: Sequence[str]) -> list[Answer]:
        from orion_triage.imagery.frames import Frame

        asked = [
            self._messages(Frame(image, image.size).png(), prompt)
            for image, prompt in zip(images, prompts, strict=True)
        ]
        return [Answer(self._client.chat_completion(self._model, messages, self._max_new_tokens)) for messages in asked]

    @staticmethod
    def _messages(png: bytes, prompt: str) -> list[dict[str, Any]]:
        """One image and one text that starts with the newline between them, as in training."""
        address = f"data:image/png;base64,{base64.b64encode(png).decode()}"
        content = [
            {"type": "image_url", "image_url": {"url": address}},
            {"type": "text", "text": f"\n{prompt}"},
        ]
        return [{"role": "user", "content": content}]


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

    def answer(self, images: "Sequence[Image.Image]", prompts: Sequence[str]) -> list[Answer]:
        asked = list(zip(images, prompts, strict=True))
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
                answers += (self._ask(server, image, prompt) for image, prompt in asked[len(answers) :])
            except ServerError as error:
                self._leave_out(server, error)
            else:
                self._free.put(server)
                return answers

    def _ask(self, server: Connected, image: "Image.Image", prompt: str) -> Answer:
        again = Retrying(
            stop=stop_after_attempt(TRIES),
            wait=wait_incrementing(start=0, increment=self._pause_seconds),
            retry=retry_if_exception_type(ServerError),
            reraise=True,
        )
        (answer,) = again(server.backend.answer, [image], [prompt])
        if server.now and server.now() != server.identity:
            raise ServerError(f"the server no longer serves {server.model}.", f"Load {server.model} again.")
        return answer

    def _leave_out(self, server: Connected, failure: ServerError) -> None:
        with self._lock:
            self._left -= 1
            self.lost.append(f"{server.url}: {failure.message}")
            if not self._left:
                self._free.put(None)


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


def share(urls: Sequence[str], key: str, max_new_tokens: int) -> tuple[Backend, Connected]:
    """The servers as one backend, and the first of them; raises OrionError unless all serve the same model."""
    servers = [connect(url, key, max_new_tokens) for url in urls]
    for server in servers[1:]:
        if server.identity != servers[0].identity:
            raise OrionError(
                f"{server.url} serves {server.model} ({server.build}), but {servers[0].url} serves "
                f"{servers[0].model} ({servers[0].build}).",
                "Load the same model with the same build on all servers.",
            )
    return SharedBackend(servers), servers[0]
