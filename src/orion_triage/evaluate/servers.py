"""Servers that somebody else started: llama.cpp's own interface, or OpenAI's with images; several share the work."""

import base64
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orion_triage import manifest
from orion_triage.errors import OrionError, ServerError
from orion_triage.evaluate.backends import Answer, Backend, LlamaCppBackend
from orion_triage.llama_server import Client

if TYPE_CHECKING:
    from PIL import Image

TRIES = 3  # of one question at one server, before the others get it
PAUSE_SECONDS = 2.0


@dataclass(frozen=True)
class Connected:
    """A server that answers; `identity` is a hash of what it says it serves."""

    url: str
    backend: Backend
    identity: str
    model: str
    build: str


def connect(url: str, key: str, max_new_tokens: int) -> Connected:
    """Wait until the server has loaded its model, and find out which interface it speaks.

    Without llama.cpp's /props it is taken for an OpenAI-compatible one (vLLM, LM Studio, Ollama): answers without
    scores. Raises ServerError when nobody answers, or it is neither.
    """
    client = Client(url, key)
    if props := client.props_or_none():
        client.ready(60)
        served = {name: str(props.get(name)) for name in ("model_path", "build_info", "chat_template")}
        backend: Backend = LlamaCppBackend(client, max_new_tokens=max_new_tokens, primed=True)
        identity = manifest.sha256_of_listing(served)
        return Connected(url, backend, identity, served["model_path"], f"llama.cpp {served['build_info']}")
    model = client.served_model()
    identity = manifest.sha256_of_listing({"model": model})
    return Connected(url, OpenAIBackend(client, model, max_new_tokens=max_new_tokens), identity, model, "OpenAI API")


class OpenAIBackend:
    """A server with /v1/chat/completions that takes images; it gives no probabilities, so no scores."""

    batch_size = 1

    def __init__(self, client: Client, model: str, *, max_new_tokens: int) -> None:
        self._client, self._model, self._max_new_tokens = client, model, max_new_tokens

    def answer(self, images: "Sequence[Image.Image]", prompts: Sequence[str]) -> list[Answer]:
        from orion_triage.frames import Frame

        asked = [
            self._messages(Frame(image, image.size).png(), prompt)
            for image, prompt in zip(images, prompts, strict=True)
        ]
        return [Answer(self._client.chat_completion(self._model, messages, self._max_new_tokens)) for messages in asked]

    @staticmethod
    def _messages(png: bytes, prompt: str) -> list[dict[str, Any]]:
        """One image, then one text that starts with the newline between them, as the model was trained."""
        address = f"data:image/png;base64,{base64.b64encode(png).decode()}"
        content = [
            {"type": "image_url", "image_url": {"url": address}},
            {"type": "text", "text": f"\n{prompt}"},
        ]
        return [{"role": "user", "content": content}]


class SharedBackend:
    """Several servers of one model; whichever is free takes the next question.

    One that fails is asked again a few times, then left out, and its question goes to another. Answers do not depend on
    who gave them, as far as the servers compute alike.
    """

    def __init__(self, servers: Sequence[Connected], *, pause_seconds: float = PAUSE_SECONDS) -> None:
        self.batch_size = 4 * len(servers)
        self._free: queue.SimpleQueue[Connected | None] = queue.SimpleQueue()  # None: nobody is left
        for server in servers:
            self._free.put(server)
        self._left = len(servers)
        self._lock = threading.Lock()
        self._pause_seconds = pause_seconds
        self.lost: list[str] = []  # why each server was left out

    def answer(self, images: "Sequence[Image.Image]", prompts: Sequence[str]) -> list[Answer]:
        with ThreadPoolExecutor(max(1, self._left)) as pool:
            return list(pool.map(self._ask, images, prompts))

    def _ask(self, image: "Image.Image", prompt: str) -> Answer:
        while True:
            server = self._free.get()
            if server is None:
                self._free.put(None)  # for the next who waits
                lost = "; ".join(self.lost)
                raise ServerError(f"no server is left: {lost}", "Start one, and go on with the same command.")
            for attempt in range(TRIES):
                try:
                    (answer,) = server.backend.answer([image], [prompt])
                except ServerError as error:
                    failure = error
                    time.sleep(self._pause_seconds * attempt)
                else:
                    self._free.put(server)
                    return answer
            self._leave_out(server, failure)

    def _leave_out(self, server: Connected, failure: ServerError) -> None:
        with self._lock:
            self._left -= 1
            self.lost.append(f"{server.url}: {failure.message}")
            if not self._left:
                self._free.put(None)


def share(urls: Sequence[str], key: str, max_new_tokens: int) -> tuple[Backend, Connected]:
    """The servers as one backend, and the first of them; raises OrionError unless all serve the same model."""
    servers = [connect(url, key, max_new_tokens) for url in urls]
    for server in servers[1:]:
        if server.identity != servers[0].identity:
            raise OrionError(
                f"{server.url} serves {server.model} ({server.build}), {servers[0].url} {servers[0].model} "
                f"({servers[0].build}).",
                "Servers that share an evaluation must serve the same model.",
            )
    return (SharedBackend(servers) if len(servers) > 1 else servers[0].backend), servers[0]
