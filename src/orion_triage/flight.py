"""Classifying real frames with the quantized pair of a run, as on board: no coordinates, one frame at a time."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from orion_triage import llama_cpp, quantize
from orion_triage.errors import FrameError
from orion_triage.frames import CAMERA_SIZE, Frame, is_blank, read_frame, shrink
from orion_triage.progress import Progress, silent
from orion_triage.triage import ANSWER_TOKENS, GRAMMAR, Category, Verdict, parse_verdict, render_prompt

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


def triage_files(
    paths: Iterable[Path],
    ask: Callable[[str, bytes], str],
    frame_size: int,
    *,
    resize: bool = False,
) -> Iterator[FrameVerdict]:
    """Verdicts in the order of `paths`; a refused file becomes an outcome with `error`, and work goes on.

    `ask(prompt, png)` returns the model's answer. A blank frame is LOW by rule and is not asked about: it would
    cost downlink and shows nothing, whatever a model makes of it.
    """
    prompt = render_prompt(None)
    for path in paths:
        began = time.monotonic()
        try:
            frame = read_frame(path, CAMERA_SIZE, resize=resize)
        except FrameError as error:
            yield FrameVerdict(str(path), None, time.monotonic() - began, error=str(error))
            continue
        if is_blank(frame.image):
            verdict = Verdict(BLANK_REASON, Category.LOW)
            yield FrameVerdict(str(path), verdict, time.monotonic() - began, frame.native_size, blank=True)
            continue
        png = Frame(shrink(frame.image, frame_size), frame.native_size).png()
        answer = parse_verdict(ask(prompt, png))
        error_text = "" if answer else f"{path}: the model gave no verdict. Evaluate the run: its answers should parse."
        yield FrameVerdict(str(path), answer, time.monotonic() - began, frame.native_size, error=error_text)


def triage_with_pair(
    paths: Sequence[Path],
    gguf: Path,
    frame_size: int,
    *,
    log: Path,
    resize: bool = False,
    progress: Progress = silent,
) -> Iterator[FrameVerdict]:
    """`triage_files` with the GGUF pair in the folder `gguf`, behind a server that lives as long as the iteration."""
    quantize.check_pair(gguf)
    toolchain = llama_cpp.find_toolchain(progress)
    with llama_cpp.Server(toolchain, gguf / quantize.QUANTIZED, gguf / quantize.MMPROJ, log=log) as server:

        def ask(prompt: str, png: bytes) -> str:
            return server.client.complete(prompt, png, ANSWER_TOKENS, GRAMMAR)

        yield from triage_files(paths, ask, frame_size, resize=resize)
