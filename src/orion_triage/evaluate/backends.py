"""Backends that answer questions: a transformers model in this process, or a llama.cpp server."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from orion_triage.errors import AnswerError
from orion_triage.mission.answer import Answer
from orion_triage.mission.verdict import (
    ANSWER_TOKENS,
    CATEGORIES,
    CATEGORY_CUE,
    CATEGORY_GRAMMAR,
    GRAMMAR,
    VERDICT_START,
    Verdict,
    category_tokens,
)

if TYPE_CHECKING:
    from pathlib import Path

    from PIL import Image

    from orion_triage.llama_cpp.client import Client
    from orion_triage.models.encode import EncodedImage
    from orion_triage.settings import EvaluateSettings


class Backend(Protocol):
    """Answers a batch of (image, prompt) pairs; the answers do not depend on the batch."""

    batch_size: int

    def answer(self, images: "Sequence[Image.Image]", prompts: Sequence[str]) -> list[Answer]: ...


class TransformersBackend:
    """The base, the base with an adapter, or the fused model in transformers, with greedy decoding."""

    def __init__(self, model: Any, processor: Any, *, max_new_tokens: int, batch_size: int) -> None:
        self.batch_size = batch_size
        self._model, self._processor, self._max_new_tokens = model, processor, max_new_tokens
        tokenizer = processor.tokenizer
        self._labels = category_tokens(lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])
        self._seen: dict[int, tuple[Image.Image, EncodedImage]] = {}  # the last batch's images, by identity

    @classmethod
    def load(
        cls,
        folder: "Path",
        settings: "EvaluateSettings",
        frame_size: int,
        *,
        four_bit: bool = False,
        change: "Callable[[Any], Any] | None" = None,
    ) -> "TransformersBackend":
        """The checkpoint in `folder`: in float16 on a GPU, in float32 on a CPU, which is not faster in 16 bits.

        With `four_bit`, the weights are NF4, as in training. `change` is applied to the model after loading.
        """
        from orion_triage import processes
        from orion_triage.models.load import load_model, load_processor

        device = processes.local_device()
        dtype = "float32" if device == "cpu" else "float16"
        model = load_model(folder, dtype=dtype, device=device, four_bit=four_bit)
        return cls(
            change(model) if change else model,
            load_processor(folder, frame_size),
            max_new_tokens=settings.max_new_tokens,
            batch_size=settings.batch_size,
        )

    def answer(self, images: "Sequence[Image.Image]", prompts: Sequence[str]) -> list[Answer]:
        from orion_triage.models.encode import encode_image, encode_row
        from orion_triage.models.generate import generate_and_score, look

        # The tower encodes each image once and separately, so its features do not depend on the batch.
        distinct = {id(image): image for image in images}
        self._seen = {
            key: self._seen.get(key) or (image, look(self._model, encode_image(self._processor, image)))
            for key, image in distinct.items()
        }
        rows = [
            encode_row(self._processor, self._seen[id(image)][1], prompt)
            for image, prompt in zip(images, prompts, strict=True)
        ]
        answers = generate_and_score(
            self._model, self._processor, rows, self._max_new_tokens, cue=CATEGORY_CUE, tokens=self._labels
        )
        return [Answer.scored(text, log_probabilities) for text, log_probabilities in answers]


class LlamaCppBackend:
    """A GGUF pair behind llama.cpp's HTTP server, one request at a time.

    `constrained` answers follow the flight's grammar; `options` are llama.cpp's sampling settings (default: greedy).
    With `primed`, the server encodes the image once for all prompts about it, which saves time from the second prompt
    on. The log-probabilities differ slightly from those of a cold request (0.02 with repacked Q4_K), so an evaluation
    primes every image, also when it resumes.
    """

    batch_size = 1

    def __init__(
        self,
        client: "Client",
        *,
        max_new_tokens: int,
        constrained: bool = False,
        options: Mapping[str, float] | None = None,
        primed: bool = False,
    ) -> None:
        self._primed = primed
        self._packed: tuple[Image.Image, bytes] | None = None  # the last image and its PNG
        self._client, self._constrained, self._options = client, constrained, dict(options or {})
        self._max_new_tokens = ANSWER_TOKENS if constrained else max_new_tokens
        self._labels = category_tokens(client.tokenize)

    def answer(self, images: "Sequence[Image.Image]", prompts: Sequence[str]) -> list[Answer]:
        return [self._answer(image, prompt) for image, prompt in zip(images, prompts, strict=True)]

    def _answer(self, image: "Image.Image", prompt: str) -> Answer:
        from orion_triage.imagery.frames import Frame

        if self._packed is None or self._packed[0] is not image:
            self._packed = (image, Frame(image, image.size).png())
        try:
            text, log_probabilities = self._client.complete_and_score(
                prompt,
                self._packed[1],
                self._max_new_tokens,
                cue=CATEGORY_CUE,
                tokens=self._labels,
                grammars=(GRAMMAR, CATEGORY_GRAMMAR) if self._constrained else ("", ""),
                options=self._options,
                primed=self._primed,
            )
        except AnswerError as error:  # an outcome of the model, counted as unparsable
            return Answer(f"[{error.message}]")
        return Answer.scored(text, log_probabilities)


class VerdictOnlyBackend:
    """The category without a reason, from a GGUF pair behind llama.cpp's HTTP server: one token instead of an answer.

    The request contains the beginning of the answer, up to the category, with an empty reason. With the grammar, the
    first letter of the category decides, so one token is enough.
    """

    batch_size = 1

    def __init__(self, client: "Client") -> None:
        self._client = client
        self._labels = category_tokens(client.tokenize)

    def answer(self, images: "Sequence[Image.Image]", prompts: Sequence[str]) -> list[Answer]:
        return [self._answer(image, prompt) for image, prompt in zip(images, prompts, strict=True)]

    def _answer(self, image: "Image.Image", prompt: str) -> Answer:
        from orion_triage.imagery.frames import Frame
        from orion_triage.llama_cpp.client import first_log_probabilities

        png = Frame(image, image.size).png()
        self._client.prime(png)
        reply = ask_for_category(self._client, prompt, png, cache_prompt=True)
        said = [category for category in CATEGORIES if reply["content"] and category.startswith(reply["content"][0])]
        if not said:  # a server that ignores the grammar
            return Answer(VERDICT_START + reply["content"])
        found = first_log_probabilities(reply, self._labels)
        return Answer.scored(Verdict("", said[0]).to_json(), found)


def ask_for_category(client: "Client", prompt: str, image_png: bytes, *, cache_prompt: bool = False) -> dict[str, Any]:
    """The server's reply with the token that decides the category, after a given beginning of the answer."""
    from orion_triage.llama_cpp.client import CANDIDATES

    more = {"n_probs": CANDIDATES, "grammar": CATEGORY_GRAMMAR, "cache_prompt": cache_prompt}
    return client.completion(prompt, image_png, 1, start=VERDICT_START, **more)
