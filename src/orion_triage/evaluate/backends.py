"""Backends that answer questions: a transformers model in this process, or a llama.cpp server."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from orion_triage.errors import AnswerError
from orion_triage.mission.answer import Answer
from orion_triage.mission.mission import Mission
from orion_triage.mission.scoring import Scoring, label_tree
from orion_triage.mission.verdict import (
    CATEGORY_CUE,
    answer_start,
    answer_tokens,
    category_alone,
    category_grammar,
    grammar,
    grammars,
    parse_verdict,
    require_category_alone,
    tokens_of_fields,
)

if TYPE_CHECKING:
    from pathlib import Path

    from PIL import Image

    from orion_triage.llama_cpp.client import Client
    from orion_triage.models.encode import EncodedImage
    from orion_triage.settings import EvaluateSettings


class Backend(Protocol):
    """Answers a batch of (image, user's text) pairs; the answers do not depend on the batch."""

    batch_size: int

    def answer(self, images: "Sequence[Image.Image]", user_texts: Sequence[str]) -> list[Answer]: ...


class TransformersBackend:
    """The base, the base with an adapter, or the fused model in transformers, with greedy decoding."""

    def __init__(self, model: Any, processor: Any, mission: Mission, *, max_new_tokens: int, batch_size: int) -> None:
        self.batch_size = batch_size
        self._model, self._processor = model, processor
        self._max_new_tokens = max_new_tokens + tokens_of_fields(mission)
        tokenizer = processor.tokenizer
        self._scoring = Scoring.of(mission, lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])
        self._seen: dict[int, tuple[Image.Image, EncodedImage]] = {}  # the last batch's images, by identity

    @classmethod
    def load(
        cls,
        folder: "Path",
        mission: Mission,
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
            mission,
            max_new_tokens=settings.max_new_tokens,
            batch_size=settings.batch_size,
        )

    def answer(self, images: "Sequence[Image.Image]", user_texts: Sequence[str]) -> list[Answer]:
        from orion_triage.models.encode import encode_image, encode_row
        from orion_triage.models.generate import generate_and_score, look

        # The tower encodes each image once and separately, so its features do not depend on the batch.
        distinct = {id(image): image for image in images}
        self._seen = {
            key: self._seen.get(key) or (image, look(self._model, encode_image(self._processor, image)))
            for key, image in distinct.items()
        }
        rows = [
            encode_row(self._processor, self._seen[id(image)][1], user_text)
            for image, user_text in zip(images, user_texts, strict=True)
        ]
        answers = generate_and_score(
            self._model,
            self._processor,
            rows,
            self._max_new_tokens,
            cue=CATEGORY_CUE,
            after_cue=self._scoring.after_cue,
            further=self._scoring.further,
        )
        return [scored(self._scoring, *answer) for answer in answers]


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
        mission: Mission,
        *,
        max_new_tokens: int,
        constrained: bool = False,
        options: Mapping[str, float] | None = None,
        primed: bool = False,
    ) -> None:
        self._primed = primed
        self._packed: tuple[Image.Image, bytes] | None = None  # the last image and its PNG
        self._client, self._options = client, dict(options or {})
        self._max_new_tokens = answer_tokens(mission) if constrained else max_new_tokens + tokens_of_fields(mission)
        self._scoring = Scoring.of(mission, client.tokenize)
        self._grammars = grammars(mission) if constrained else {}
        if constrained:
            client.require_grammar()

    def answer(self, images: "Sequence[Image.Image]", user_texts: Sequence[str]) -> list[Answer]:
        return [self._answer(image, text) for image, text in zip(images, user_texts, strict=True)]

    def _answer(self, image: "Image.Image", user_text: str) -> Answer:
        from orion_triage.imagery.frames import Frame

        if self._packed is None or self._packed[0] is not image:
            self._packed = (image, Frame(image, image.size).png())
        try:
            answer = self._client.complete_and_score(
                user_text,
                self._packed[1],
                self._max_new_tokens,
                cue=CATEGORY_CUE,
                after_cue=self._scoring.after_cue,
                further=self._scoring.further,
                grammars=self._grammars,
                options=self._options,
                primed=self._primed,
            )
        except AnswerError as error:  # an outcome of the model, counted as unparsable
            return Answer(f"[{error.message}]")
        return scored(self._scoring, *answer)


def scored(
    scoring: Scoring, text: str, found: Sequence[Sequence[float]] | None, further: Mapping[str, Sequence[float]]
) -> Answer:
    """The answer with the probabilities of what a client found at its cues."""
    return Answer.scored(text, scoring.of_categories(found), scoring.of_fields(further))


class VerdictOnlyBackend:
    """The category without a reason, from a GGUF pair behind llama.cpp's HTTP server: one token instead of an answer.

    The request contains the beginning of the answer, up to the category, with an empty reason. The token in which the
    names differ decides; one request more for each further place where they do. For the categories in `reasons_for`,
    the server then writes the whole answer with this category, so its reason: that costs only the answer's tokens.
    Raises OrionError for a mission whose fields must have a value.
    """

    batch_size = 1

    def __init__(self, client: "Client", mission: Mission, reasons_for: Sequence[str] = ()) -> None:
        require_category_alone(mission)
        client.require_grammar()
        self._client, self._mission, self._reasons_for = client, mission, reasons_for
        self._scoring = Scoring(mission, label_tree(mission, client.tokenize), ())

    def answer(self, images: "Sequence[Image.Image]", user_texts: Sequence[str]) -> list[Answer]:
        return [self._answer(image, text) for image, text in zip(images, user_texts, strict=True)]

    def _answer(self, image: "Image.Image", user_text: str) -> Answer:
        from orion_triage.imagery.frames import Frame
        from orion_triage.llama_cpp.client import first_log_probabilities

        png, names, nodes = Frame(image, image.size).png(), self._mission.names, self._scoring.nodes
        self._client.prime(user_text, png)
        replies = [
            ask_for_category(self._client, self._mission, user_text, png, node.text, cache_prompt=True)
            for node in nodes
        ]
        said, begun = replies[0]["content"], nodes[0].text
        begun_with = [name for name in names if said and name.startswith(begun + said[0])]
        if not begun and not begun_with:  # not a category
            return Answer(answer_start(self._mission) + said)
        found = [first_log_probabilities(reply, node.tokens) for reply, node in zip(replies, nodes, strict=True)]
        scores = self._scoring.of_categories([one for one in found if one] if all(found) else None)
        if len(begun_with) == 1 or scores is None:
            category = (begun_with or names)[0]
        else:
            category = max(names, key=lambda name: scores[names.index(name)])
        return Answer.scored(self._written(user_text, png, category), scores)

    def _written(self, user_text: str, image_png: bytes, category: str) -> str:
        """The answer with this category: with a reason where one is wanted."""
        mission = self._mission
        if category not in self._reasons_for:
            return category_alone(mission, category)
        rule, most = grammar(mission, category), answer_tokens(mission)
        reply = self._client.completion(user_text, image_png, most, grammar=rule, cache_prompt=True)
        text: str = reply["content"]
        return text if parse_verdict(mission, text) else category_alone(mission, category)


def ask_for_category(
    client: "Client",
    mission: Mission,
    user_text: str,
    image_png: bytes,
    begun: str = "",
    *,
    cache_prompt: bool = False,
) -> dict[str, Any]:
    """The server's reply with the token that decides the category, after a given beginning of the answer.

    `begun` is the beginning of the category that several names have.
    """
    from orion_triage.llama_cpp.client import CANDIDATES, PRINTABLE

    rule = PRINTABLE if begun else category_grammar(mission)
    more = {"n_probs": CANDIDATES, "grammar": rule, "cache_prompt": cache_prompt}
    return client.completion(user_text, image_png, 1, start=answer_start(mission) + begun, **more)
