"""Suggestions of another model, through an OpenAI-compatible server, for the frames of a task.

They are kept in a file of their own beside the task: no label is ever made of one. Each line is one answer, appended as
it arrives, so the same call resumes; a picture that was answered is not sent again.
"""

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from orion_triage.errors import OrionError
from orion_triage.evaluate.backends import Backend
from orion_triage.evaluate.servers import SharedBackend, connect_chat, split_address
from orion_triage.imagery.frames import CAMERA_SIZE, read_frame
from orion_triage.mission.answer import Answer
from orion_triage.mission.mission import Mission
from orion_triage.mission.prompt import user_text
from orion_triage.mission.verdict import parse_verdict
from orion_triage.progress import Progress, silent
from orion_triage.review.task import Row, Suggestion, file_of
from orion_triage.safe.files import appending, sha256_of_text
from orion_triage.safe.proxies import is_loopback, without_credentials
from orion_triage.safe.reading import LARGEST_TABLE_BYTES, parse_json, read_bytes

SUGGESTIONS_FILE = "suggestions.jsonl"
_TEXTS = ("sha256", "model", "server", "prompt_sha256", "at", "answer")
_COUNTS = ("prompt_tokens", "answer_tokens")  # null if the server counts none


@dataclass(frozen=True)
class Prices:
    """Per million tokens of prompts and of answers, in any currency."""

    prompt: float
    answer: float


@dataclass(frozen=True)
class Source:
    """Who is asked. `backend` is None if nothing is left to ask; `refused` grows with what the server refuses."""

    model: str
    server: str
    backend: Backend | None = None
    refused: Sequence[str] = ()


def source_of(model: str, server: str) -> str:
    """The name of a source, for people."""
    return f"{model} at {server}"


def prompt_hash(mission: Mission) -> str:
    return sha256_of_text(user_text(mission, None))


def read_suggestions(folder: Path) -> list[Row]:
    """The answers beside a task, none without the file; the last line of a killed process is passed over.

    Raises OrionError that names a damaged line.
    """
    path = folder / SUGGESTIONS_FILE
    rows: list[Row] = []
    try:
        *lines, _ = read_bytes(path, LARGEST_TABLE_BYTES).split(b"\n")
    except FileNotFoundError:
        return rows
    for number, line in enumerate(lines, start=1):
        try:
            row = parse_json(line)
            if not all(isinstance(row[key], str) for key in _TEXTS):
                raise ValueError("a value is no text")
            if not all(row[key] is None or (isinstance(row[key], int) and row[key] >= 0) for key in _COUNTS):
                raise ValueError("a number of tokens is none")
        except (ValueError, KeyError, TypeError) as error:
            raise OrionError(
                f"{path}:{number} is damaged: {error!r}.", "Delete this line; its frame is asked about again."
            ) from None
        rows.append(row)
    return rows


def of_source(rows: Sequence[Row], model: str, server: str, mission: Mission) -> dict[str, Row]:
    """Hash of a picture -> the answer of this source to the mission's prompt as it is now."""
    asked = (model, server, prompt_hash(mission))
    return {row["sha256"]: row for row in rows if (row["model"], row["server"], row["prompt_sha256"]) == asked}


def suggestions_of(
    rows: Sequence[Row], task: Mapping[str, Row], mission: Mission
) -> tuple[dict[str, list[Suggestion]], int]:
    """(Id of a frame -> the suggestion of each source, the number of answers to other prompts, which do not count)."""
    now = prompt_hash(mission)
    sources = dict.fromkeys((row["model"], row["server"]) for row in rows if row["prompt_sha256"] == now)
    said: dict[str, list[Suggestion]] = {frame: [] for frame in task}
    for model, server in sources:
        answers = of_source(rows, model, server, mission)
        for frame, own in task.items():
            if row := answers.get(own["sha256"]):
                verdict = parse_verdict(mission, row["answer"])
                category, reason = (verdict.category, verdict.reason) if verdict else (None, "")
                said[frame].append(Suggestion(source_of(model, server), category, reason))
    return said, sum(row["prompt_sha256"] != now for row in rows)


def left_of(task: Mapping[str, Row], answered: Mapping[str, Row]) -> list[Row]:
    """The frames of a task without an answer, each picture once."""
    return list({row["sha256"]: row for row in task.values() if row["sha256"] not in answered}.values())


def connect_source(
    folder: Path,
    task: Mapping[str, Row],
    mission: Mission,
    address: str,
    model: str,
    max_tokens: int,
    *,
    say: Callable[[str], None],
) -> Source:
    """The model behind an address (key: LLAMA_API_KEY); `model` may be "" if the server has only one.

    Says to whom the pictures will go before the first request. Makes none if all frames are answered and the model is
    named.
    """
    url, named = split_address(address)
    if model and named not in ("", model):
        raise OrionError(f"the address names {named!r}, but --model {model!r}.", "Name one of them.")
    asked = model or named
    server = without_credentials(url).partition("://")[2]
    answers = read_suggestions(folder)
    if asked and not left_of(task, of_source(answers, asked, server, mission)):
        say(f"{source_of(asked, server)} has answered all pictures: nothing is sent")
        return Source(asked, server)
    key = os.environ.get("LLAMA_API_KEY", "")
    where = "this machine" if is_loopback(urlsplit(url).hostname or "") else "another machine"
    say(f"server: {server} ({where}; {'key of LLAMA_API_KEY' if key else 'no key'})")
    found = connect_chat(f"{url}#{asked}", key, max_tokens)
    left = left_of(task, of_source(answers, found.model, server, mission))
    say(f"sending {len(left)} pictures and the mission's prompt to {source_of(found.model, server)}")
    return Source(found.model, server, SharedBackend([found]), found.said["refused_parameters"])


def ask(
    folder: Path,
    task: Mapping[str, Row],
    mission: Mission,
    source: Source,
    *,
    prices: Prices | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Ask about each frame without an answer, and store the answers in `folder`; returns `figures`.

    Raises OrionError for a frame that has changed, and ServerError if the server is lost: what was answered stays.
    """
    path, text, began = folder / SUGGESTIONS_FILE, user_text(mission, None), time.monotonic()
    model, server = source.model, source.server
    answered = of_source(read_suggestions(folder), model, server, mission)
    left, kept = left_of(task, answered), len(answered)
    _drop_broken_line(path)
    with appending(path) as write:
        for done, frame in enumerate(left, start=1):
            image = read_frame(file_of(frame), CAMERA_SIZE, resize=True).image
            asked_at = time.monotonic()
            assert source.backend is not None, "nobody was asked to answer what is left"
            (answer,) = source.backend.answer([image], [text])
            row = {
                "sha256": frame["sha256"],
                "frame": frame["id"],
                "model": model,
                "server": server,
                "prompt_sha256": sha256_of_text(text),
                "at": datetime.now(UTC).isoformat(timespec="seconds"),
                "seconds": round(time.monotonic() - asked_at, 3),
                **_said(answer, mission),
            }
            write(row)
            answered[frame["sha256"]] = row
            rate = 60 * done / (time.monotonic() - began)
            cost = cost_of(answered.values(), prices)
            costs = "" if cost is None else f", cost {cost:.4f}"
            progress(f"asking {model}, {rate:.1f} frames a minute{costs}", kept + done, kept + len(left))
    return figures(answered, source, mission, asked=len(left), seconds=time.monotonic() - began, prices=prices)


def _said(answer: Answer, mission: Mission) -> Row:
    """The answer as it is, with its verdict, if it has one."""
    stored = {
        key: value for key, value in answer.to_json(mission).items() if "score" not in key and key != "label_mass"
    }
    return stored | dict(zip(_COUNTS, answer.tokens or (None, None), strict=True))


def _drop_broken_line(path: Path) -> None:
    """Cut off the line that a killed process has begun."""
    if path.exists():
        data = read_bytes(path, LARGEST_TABLE_BYTES)
        os.truncate(path, data.rfind(b"\n") + 1)


def cost_of(rows: Iterable[Row], prices: Prices | None) -> float | None:
    """What these answers cost; None without prices, or if the server has not counted the tokens of one."""
    counts = [[row[key] for key in _COUNTS] for row in rows]
    if prices is None or any(None in pair for pair in counts):
        return None
    return sum(prompt * prices.prompt + answer * prices.answer for prompt, answer in counts) / 1e6


def figures(
    answered: Mapping[str, Row],
    source: Source,
    mission: Mission,
    *,
    asked: int,
    seconds: float,
    prices: Prices | None,
) -> dict[str, Any]:
    """Counts, tokens and cost of all answers of a source, and the rate of this call's requests.

    `no_verdict` are answers that do not parse. Without prices, or with `without_counts` (answers whose tokens nobody
    counted), `cost` is None. `refused_parameters` are those of the request that the server does not take.
    """
    rows = list(answered.values())
    counted = [row for row in rows if None not in [row[key] for key in _COUNTS]]
    verdicts = [parse_verdict(mission, row["answer"]) for row in rows]
    return {
        "source": source_of(source.model, source.server),
        "answered": len(rows),
        "asked_now": asked,
        "of_category": {name: sum(v is not None and v.category == name for v in verdicts) for name in mission.names},
        "no_verdict": sum(verdict is None for verdict in verdicts),
        **{key: sum(row[key] for row in counted) for key in _COUNTS},
        "without_counts": len(rows) - len(counted),
        "cost": cost_of(rows, prices),
        "priced": prices is not None,
        "refused_parameters": list(source.refused),
        "seconds": round(seconds, 3),
        "frames_per_minute": 60 * asked / seconds if asked and seconds else None,
    }
