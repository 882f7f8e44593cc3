"""Classifying real frames with the quantized pair of a run, as on board: no coordinates, one frame at a time."""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from orion_triage import llama_cpp, quantize
from orion_triage.errors import FrameError
from orion_triage.evaluate.backends import Backend, LlamaCppBackend
from orion_triage.frames import CAMERA_SIZE, is_blank, read_frame, shrink
from orion_triage.progress import Progress, silent
from orion_triage.triage import ANSWER_TOKENS, CATEGORIES, Category, Verdict, parse_verdict, render_prompt

if TYPE_CHECKING:
    from orion_triage.evaluate.value import OperatingPoint

BLANK_REASON = "Blank frame: no image content to judge."


@dataclass(frozen=True)
class FrameVerdict:
    """One file's outcome: a verdict, or `error` when the file was refused."""

    file: str
    verdict: Verdict | None
    seconds: float
    native_size: tuple[int, int] | None = None
    blank: bool = False
    error: str = ""
    scores: tuple[float, ...] | None = None  # of HIGH, MEDIUM and LOW


def triage_files(
    paths: Iterable[Path],
    backend: Backend,
    frame_size: int,
    *,
    point: "OperatingPoint | None" = None,
    resize: bool = False,
    blank_rule: bool = True,
) -> Iterator[FrameVerdict]:
    """Verdicts in the order of `paths`; a refused file becomes an outcome with `error`, and work goes on.

    With an operating point, the scores decide the category, and the reason stays the model's. A blank frame is LOW by
    rule and is not asked about: it would cost downlink and shows nothing, whatever a model makes of it. Without
    `blank_rule` the model is asked about it as about any other.
    """
    prompt = render_prompt(None)
    for path in paths:
        began = time.monotonic()
        try:
            frame = read_frame(path, CAMERA_SIZE, resize=resize)
        except FrameError as error:
            yield FrameVerdict(str(path), None, time.monotonic() - began, error=str(error))
            continue
        if blank_rule and is_blank(frame.image):
            verdict = Verdict(BLANK_REASON, Category.LOW)
            yield FrameVerdict(str(path), verdict, time.monotonic() - began, frame.native_size, blank=True)
            continue
        (answer,) = backend.answer([shrink(frame.image, frame_size)], [prompt])
        said = parse_verdict(answer.text)
        if said and point and answer.scores:
            said = Verdict(said.reason, _decide(answer.scores, point))
        error_text = "" if said else f"{path}: the model gave no verdict. Evaluate the run: its answers should parse."
        seconds = time.monotonic() - began
        yield FrameVerdict(str(path), said, seconds, frame.native_size, error=error_text, scores=answer.scores)


def _decide(scores: Sequence[float], point: "OperatingPoint") -> Category:
    import numpy as np

    from orion_triage.evaluate.value import decide

    return CATEGORIES[int(decide(np.array([scores]), point)[0])]


def triage_with_pair(
    paths: Sequence[Path],
    gguf: Path,
    frame_size: int,
    *,
    log: Path,
    point: "OperatingPoint | None" = None,
    resize: bool = False,
    blank_rule: bool = True,
    progress: Progress = silent,
) -> Iterator[FrameVerdict]:
    """`triage_files` with the GGUF pair in the folder `gguf`, behind a server that lives as long as the iteration."""
    quantize.check_pair(gguf)
    toolchain = llama_cpp.find_toolchain(progress)
    with llama_cpp.Server(toolchain, gguf / quantize.QUANTIZED, gguf / quantize.MMPROJ, log=log) as server:
        backend = LlamaCppBackend(server.client, max_new_tokens=ANSWER_TOKENS, constrained=True)
        yield from triage_files(paths, backend, frame_size, point=point, resize=resize, blank_rule=blank_rule)
