"""Classify frames with the quantized pair of a run, as on board: without coordinates, one frame at a time."""

import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orion_triage.errors import OrionError
from orion_triage.evaluate import threshold
from orion_triage.evaluate.backends import Backend, LlamaCppBackend, VerdictOnlyBackend
from orion_triage.evaluate.head import EMBEDDING, Head, HeadBackend
from orion_triage.evaluate.head import read as read_head
from orion_triage.export import quantize
from orion_triage.flight.triage_on_board import may_be_cut_off
from orion_triage.imagery.frames import (
    CAMERA_SIZE,
    FRAME_SUFFIXES,
    appearance,
    looks_blank,
    read_frame,
    shrink,
)
from orion_triage.imagery.stretch import Stretch, stretch_of
from orion_triage.llama_cpp.server import OPTIONS, Server
from orion_triage.llama_cpp.toolchain import find_toolchain
from orion_triage.mission.answer import Answer
from orion_triage.mission.decide import BLANK_REASON, Rules, by_in_words, decide, is_unlike
from orion_triage.mission.mission import Mission, default_mission
from orion_triage.mission.prompt import user_text
from orion_triage.mission.verdict import Verdict, answer_tokens, parse_verdict, require_category_alone
from orion_triage.models.family import turn_of
from orion_triage.progress import Progress, silent
from orion_triage.safe.files import sha256_of_file, sha256_of_text
from orion_triage.safe.folders import listing

if TYPE_CHECKING:
    from orion_triage.runs.run import Run

RULES = Rules()  # a blank frame has its category; otherwise the answer's category counts
PROMPT_LOST = "the server had lost the prompt, and read it again"


@dataclass(frozen=True)
class FrameVerdict:
    """The outcome for one file: the decided `verdict`, or `error` if the file was refused or nothing was decided.

    `decided_by` is "model", "threshold 0.162", "smoke is yes" (a field's rule), "unlike training", "blank rule" or "no
    verdict"; empty if the file was refused. `answer` is the model's; None if the model was not asked. `changes` are the
    conversions that the file needed, and what else is unusual about it.
    """

    file: str
    verdict: Verdict | None
    seconds: float
    native_size: tuple[int, int] | None = None
    decided_by: str = ""
    blank: bool = False
    error: str = ""
    answer: Answer | None = None
    changes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Flown:
    """What classifies: a GGUF pair, its mission, the size and stretch of its frames, and the rules of the decision.

    With a `head`, it answers instead of the language model. With `verdict_only`, the category is decided before a
    reason is written, and reasons are written for the mission's `reasons_for` only.
    """

    name: str
    gguf: Path
    mission: Mission
    frame_size: int
    stretch: Stretch | None
    rules: Rules
    log: Path
    head: Head | None = None
    verdict_only: bool = False


def of_run(run: "Run", *, head: bool = False, verdict_only: bool = False) -> Flown:
    """A run's pair, its verdict alone, or its head; with the threshold of that, if one was chosen.

    Raises OrionError if the verdict alone is asked for, and the mission's answers cannot be the category alone.
    """
    stretch, log = stretch_of(run.settings.dataset), run.folder / "logs" / "triage-server.log"
    rules = threshold.rules_of(run, "head" if head else "verdict-only" if verdict_only else "pair")
    mission, size = run.settings.mission, run.settings.base.frame_size
    if head:
        own = read_head(run.folder, mission, run.gguf, size)
        return Flown(f"{run.folder} (head, {_rules(rules)})", run.gguf, mission, size, stretch, rules, log, own)
    if verdict_only:
        require_category_alone(mission)
    name = f"{run.folder} ({'verdict only, ' if verdict_only else ''}{_rules(rules)})"
    return Flown(name, run.gguf, mission, size, stretch, rules, log, verdict_only=verdict_only)


def of_bundle(folder: Path, *, head: bool = False) -> Flown:
    """A flight bundle, after a check of all its files; its head decides if it has one, as on board.

    Raises OrionError if a file was changed or is missing, and with `head` for a bundle without one.
    """
    from orion_triage.flight.check_flight import NoGoError, OtherVersionError, flown, read_bundle
    from orion_triage.flight.decide_frame import step_of

    try:
        bundle = flown(read_bundle(folder))
        step, stretch = step_of(bundle, "threshold"), bundle["stretch"]
        unlike = step_of(bundle, "unlike training")
        rules = Rules(
            drop_threshold=float(step["drop_probability_at_least"]) if step else None,
            appearance=unlike["ranges"] if unlike else None,
        )
        limits, size = Stretch(**stretch) if stretch else None, int(bundle["frame_size"])
        mission, verdict_only = Mission.model_validate(bundle["mission"]), "verdict_only" in bundle["request"]
        own = read_head(folder, mission, folder, size) if "variant" in bundle else None
    except OtherVersionError as error:
        raise OrionError(f"{folder}: {error}.", "Run 'orion bundle' again.") from None
    except NoGoError as error:
        raise OrionError(
            f"{folder}: {error}.", "Pass the folder of a bundle; copy it again if it was changed."
        ) from None
    except (KeyError, TypeError, ValueError) as error:
        raise OrionError(
            f"{folder / 'bundle.json'} is of another version: {error!r}.", "Run 'orion bundle' again."
        ) from None
    log = Path(tempfile.gettempdir()) / f"orion-triage-{os.getpid()}.log"
    if head and not own:
        raise OrionError(f"{folder} has no head.", "Leave --head out, or make it with 'orion bundle --head'.")
    how = "head, " if own else "verdict only, " if verdict_only else ""
    named = f"bundle {folder} ({how}{_rules(rules)})"
    return Flown(named, folder, mission, size, limits, rules, log, own, verdict_only=verdict_only)


def _rules(rules: Rules) -> str:
    decided = "no threshold" if rules.drop_threshold is None else f"threshold {rules.drop_threshold:.3f}"
    return f"{decided}, unlike frames kept" if rules.appearance else decided


def frames_in(paths: Iterable[Path], *, recursive: bool = False) -> tuple[list[Path], list[str]]:
    """The files and the pictures of each folder, sorted by path; and what is left out of the folders, in words.

    With `recursive`, also the pictures of their folders. Raises OrionError for a folder without pictures.
    """
    frames: list[Path] = []
    left_out: list[str] = []
    for path in paths:
        if not path.is_dir():
            frames.append(path)
            continue
        content = listing(path, recursive=recursive)
        pictures = [file for file in content.files if file.suffix.lower() in FRAME_SUFFIXES]
        others = content.left_out(FRAME_SUFFIXES)
        if not pictures:
            found = f" Found: {'; '.join(others)}." if others else ""
            raise OrionError(
                f"{path} has no picture ({', '.join(FRAME_SUFFIXES)}).{found}",
                "Add --recursive to read its folders." if content.folders else "Pass picture files or another folder.",
            )
        frames += pictures
        left_out += [f"{path}: {said}" for said in others]
    return frames, left_out


def to_json(outcome: FrameVerdict, mission: Mission) -> dict[str, Any]:
    """The printed and stored outcome of one frame: the answer, with the decided category and what decided it.

    `category` is null if the file was refused or nothing was decided; `model_category` is that of the answer, null if
    the model was not asked. `fields` are the values of the mission's further fields, null without a verdict.
    """
    verdict, answered = outcome.verdict, (outcome.answer or Answer("")).to_json(mission)
    return {
        "file": outcome.file,
        **answered,
        "model_category": answered["category"],
        "category": verdict.category if verdict else None,
        "decided_by": outcome.decided_by or None,
        "reason": verdict.reason if verdict else None,
        "blank": outcome.blank,
    }


def asked_by(flown: Flown, rules: Rules, resize: bool) -> str:
    """A short hash of the model and its settings; it must be the same for all lines of a results file."""
    parts = [sha256_of_file(flown.gguf / quantize.PAIR), flown.frame_size, rules.drop_threshold, resize, rules.blank]
    parts += [str(flown.stretch)] if flown.stretch else []
    parts += [{name: list(ends) for name, ends in rules.appearance.items()}] if rules.appearance else []
    parts += [sha256_of_text(flown.head.weights.tobytes().hex())] if flown.head else []
    parts += [flown.mission.model_dump(mode="json")] if flown.mission != default_mission() else []
    parts += ["verdict only"] if flown.verdict_only else []
    return sha256_of_text(json.dumps(parts))[:12]


@dataclass(frozen=True)
class Earlier:
    """What a results file has: which contents of each file its lines decide, and the last line of each refused file.

    A content is the SHA-256 of the file's bytes; lines of earlier versions have none, and stand for any content.
    Lines are only appended. Of several lines of one file the last one counts, unless the file was named several times.
    """

    decided: dict[str, Counter[str]] = field(default_factory=dict)
    refused: dict[str, dict[str, Any]] = field(default_factory=dict)

    def left_of(self, paths: Iterable[Path]) -> list[Path]:
        """The frames to be decided: without a line, changed since, or refused; a file named twice needs two lines."""
        before = {name: lines.copy() for name, lines in self.decided.items()}
        left = []
        for path in paths:
            lines = before.get(str(path), Counter())
            deciding = _deciding(lines, path) if lines else None
            if deciding is None:
                left.append(path)
            else:
                lines[deciding] -= 1
        return left

    def has_changed(self, path: Path) -> bool:
        """Whether lines decide this file, with other bytes than it has now."""
        lines = self.decided.get(str(path), Counter())
        return bool(lines) and _deciding(lines, path) is None

    def says(self, row: Mapping[str, Any]) -> bool:
        """Whether the row is a refusal that the results have already."""
        return self.refused.get(row["file"]) == row


NO_CONTENT = ""


def content_of(path: Path) -> str:
    """The SHA-256 of a file's bytes; none if it cannot be read, which is said when it is to be decided."""
    try:
        return sha256_of_file(path)
    except OSError:
        return NO_CONTENT


def _deciding(lines: Counter[str], path: Path) -> str | None:
    """The content in a line that decides the file as it is; in any line, if the file cannot be read any more."""
    content = content_of(path)
    contents = (content, NO_CONTENT) if content else tuple(lines)
    return next((one for one in contents if lines[one] > 0), None)


def to_row(outcome: FrameVerdict, mission: Mission, pair: str) -> dict[str, Any]:
    """The line of a results file: the outcome, and what it is about and by whom."""
    return {
        **to_json(outcome, mission),
        "error": outcome.error,
        "sha256": content_of(Path(outcome.file)),
        "pair": pair,
    }


def read_earlier(out: Path, pair: str) -> Earlier:
    """The results of earlier calls in `out`; removes an incomplete last line, so call it in `appending(out)`.

    Raises OrionError if another pair wrote `out`, or if it is not a results file.
    """
    earlier = Earlier()
    whole = 0
    with out.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                if not whole and not may_be_cut_off(line):  # without a line of ours, it may be another file
                    raise OrionError(f"{out} is not a result of 'orion triage'.", "Choose another file with --out.")
                break
            try:
                row = json.loads(line)
                name, other = row["file"], row["pair"]
                is_refused = bool(row.get("error"))
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                raise OrionError(
                    f"{out}:{number} is not a result of 'orion triage'.", "Choose another file with --out."
                ) from None
            if other != pair:
                raise OrionError(
                    f"{out}:{number} was made by another pair or with other settings ({other}, now {pair}).",
                    "Choose another file with --out.",
                )
            if is_refused:
                earlier.refused[name] = row
            else:
                earlier.decided.setdefault(name, Counter())[row.get("sha256", NO_CONTENT)] += 1
                earlier.refused.pop(name, None)
            whole += len(line)
    os.truncate(out, whole)
    return earlier


def triage_files(
    paths: Iterable[Path],
    backend: Backend,
    mission: Mission,
    frame_size: int,
    *,
    rules: Rules = RULES,
    resize: bool = False,
    stretch: Stretch | None = None,
) -> Iterator[FrameVerdict]:
    """Yield outcomes in the order of `paths`; a refused file gives an outcome with `error`.

    `decide` determines the category from the answer and the rules; the reason is the model's. The model is not asked
    about a frame that the blank rule decides.
    """
    text = user_text(mission, None)
    for path in paths:
        began = time.monotonic()
        try:
            frame = read_frame(path, CAMERA_SIZE, resize=resize, stretch=stretch)
        except OrionError as error:
            yield FrameVerdict(str(path), None, time.monotonic() - began, error=str(error))
            continue
        measures = appearance(frame.image)
        blank = looks_blank(measures)
        if by_rule := _by_blank_rule(mission, blank, rules):
            verdict, seconds = Verdict(BLANK_REASON, by_rule), time.monotonic() - began
            yield FrameVerdict(
                str(path), verdict, seconds, frame.native_size, "blank rule", blank=True, changes=frame.changes
            )
            continue
        (answer,) = backend.answer([shrink(frame.image, frame_size)], [text])
        said = parse_verdict(mission, answer.text)
        category = said.category if said else None
        unlike = is_unlike(measures, rules)
        decision = decide(
            mission, category, answer.scores,
            blank=blank, rules=rules, field_scores=answer.field_scores, unlike=unlike,
        )  # fmt: skip
        by = by_in_words(mission, decision, rules)
        decided = replace(said or Verdict("", ""), category=decision.category) if decision.category else None
        error_text = "" if decided else f"{path}: the model gave no verdict. Run 'orion evaluate' to check the run."
        seconds = time.monotonic() - began
        yield FrameVerdict(
            str(path), decided, seconds, frame.native_size, by, error=error_text, answer=answer, changes=frame.changes
        )


def _by_blank_rule(mission: Mission, blank: bool, rules: Rules) -> str | None:
    """The category of a frame about which the model is not asked, or None."""
    decision = decide(mission, None, None, blank=blank, rules=rules)
    return decision.category if decision.by == "blank rule" else None


def triage_with_pair(
    paths: Iterable[Path],
    flown: Flown,
    *,
    keep_log: bool = True,
    rules: Rules = RULES,
    resize: bool = False,
    progress: Progress = silent,
) -> Iterator[FrameVerdict]:
    """`triage_files` with a GGUF pair, on a server that runs during the iteration; `rules` replace its own.

    Its log is kept if the server failed, or with `keep_log`.
    """
    gguf, mission, size = flown.gguf, flown.mission, flown.frame_size
    pair = quantize.check_pair(gguf)
    toolchain = find_toolchain(progress)
    options = EMBEDDING if flown.head else OPTIONS
    with Server(
        toolchain, pair.backbone, pair.mmproj, log=flown.log, turn=turn_of(pair.backbone), options=options
    ) as server:
        backend: Backend
        if flown.head:
            backend = HeadBackend(server.client, mission, flown.head)
        elif flown.verdict_only:
            backend = VerdictOnlyBackend(server.client, mission, mission.reasons_for or ())
        else:
            backend = LlamaCppBackend(server.client, mission, max_new_tokens=answer_tokens(mission), constrained=True)
        shown = CAMERA_SIZE if flown.head else size  # a head divides the camera's frame itself
        lost = 0
        for outcome in triage_files(paths, backend, mission, shown, rules=rules, resize=resize, stretch=flown.stretch):
            again, lost = server.client.texts_lost > lost, server.client.texts_lost
            yield replace(outcome, changes=(*outcome.changes, PROMPT_LOST)) if again else outcome
    if not keep_log:
        flown.log.unlink(missing_ok=True)
