"""Who answers: a transformers model in this process, or a llama.cpp server."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    from PIL import Image

    from orion_triage.config import EvaluateSettings
    from orion_triage.llama_cpp import Client


class Backend(Protocol):
    """Answers a batch of (image, prompt) pairs, greedily; answers do not depend on the batch."""

    batch_size: int

    def answer(self, images: "Sequence[Image.Image]", prompts: Sequence[str]) -> list[str]: ...


class ConstantBackend:
    """The same answer to everything: a baseline, and the tests' stand-in for a model."""

    batch_size = 16

    def __init__(self, answer: str) -> None:
        self._answer = answer

    def answer(self, images: "Sequence[Image.Image]", prompts: Sequence[str]) -> list[str]:
        return [self._answer] * len(prompts)


class TransformersBackend:
    """The base or the fused model through transformers."""

    def __init__(self, model: Any, processor: Any, *, max_new_tokens: int, batch_size: int) -> None:
        self.batch_size = batch_size
        self._model, self._processor, self._max_new_tokens = model, processor, max_new_tokens

    @classmethod
    def load(cls, folder: "Path", settings: "EvaluateSettings", frame_size: int) -> "TransformersBackend":
        """The checkpoint in `folder`: in float16 on a GPU, in float32 on a CPU, which is no faster in 16 bits."""
        from orion_triage import processes, vlm

        device = processes.local_device()
        dtype = "float32" if device == "cpu" else "float16"
        return cls(
            vlm.load_model(folder, dtype=dtype, device=device),
            vlm.load_processor(folder, frame_size),
            max_new_tokens=settings.max_new_tokens,
            batch_size=settings.batch_size,
        )

    def answer(self, images: "Sequence[Image.Image]", prompts: Sequence[str]) -> list[str]:
        from orion_triage import vlm

        return vlm.generate(self._model, self._processor, images, prompts, self._max_new_tokens)


class LlamaCppBackend:
    """A GGUF pair behind llama.cpp's HTTP server, one request at a time."""

    batch_size = 1

    def __init__(self, client: "Client", *, max_new_tokens: int) -> None:
        self._client, self._max_new_tokens = client, max_new_tokens

    def answer(self, images: "Sequence[Image.Image]", prompts: Sequence[str]) -> list[str]:
        from orion_triage.frames import Frame

        return [
            self._client.complete(prompt, Frame(image, image.size).png(), self._max_new_tokens)
            for image, prompt in zip(images, prompts, strict=True)
        ]
