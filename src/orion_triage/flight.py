"""Classifying real frames with the quantized pair of a run, as on board: no coordinates, one frame at a time."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from orion_triage.errors import FrameError, OrionError
from orion_triage.frames import CAMERA_SIZE, Frame, is_blank, read_frame, shrink
from orion_triage.manifest import read_manifest
from orion_triage.triage import CATEGORIES, Category, Verdict, parse_verdict, render_prompt

BLANK_REASON = "Blank frame: no image content to judge."

# Exactly the bytes of a verdict: printable ASCII without quote and backslash, at most 160 characters of reason.
# The evaluation goes without it, so that unparsable answers are counted instead of prevented.
GRAMMAR = (
    'root ::= "{\\"reason\\": \\"" reason "\\", \\"category\\": \\"" category "\\"}"\n'
    "reason ::= [ !#-\\[\\]-~]{1,160}\n"
    "category ::= " + " | ".join(f'"{category}"' for category in CATEGORIES) + "\n"
)


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
        error_text = "" if answer else "the model's answer has no verdict"
        yield FrameVerdict(str(path), answer, time.monotonic() - began, frame.native_size, error=error_text)


def newest_finished_run(runs: Path) -> Path:
    """The run folder whose GGUF pair was finished last."""
    finished = [
        folder
        for folder in (runs.iterdir() if runs.is_dir() else [])
        if folder.is_dir() and read_manifest(folder / "gguf") is not None
    ]
    if not finished:
        raise OrionError(f"{runs} has no finished run.", "Run 'orion run' first, or pass --run FOLDER.")
    return max(finished, key=lambda folder: (folder / "gguf" / "manifest.json").stat().st_mtime)
