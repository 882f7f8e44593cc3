"""Which frames of a log people should look at first; pure functions of the log's rows.

A share is drawn evenly from all frames, so that rates measured on it are those of the whole log. The others are those
from which a model learns most: without a verdict, unlike the training, decided otherwise than the model said, and the
least certain ones.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from orion_triage.errors import OrionError
from orion_triage.mission.mission import Mission
from orion_triage.safe.tables import json_lines

RANDOM, NO_VERDICT, UNLIKE, OVERRULED, UNCERTAIN = "random", "no verdict", "unlike training", "overruled", "uncertain"


@dataclass(frozen=True)
class Logged:
    """A frame of a log: its file as the log names it, and what was said of it."""

    file: str
    category: str | None
    model_category: str | None
    reason: str
    scores: Mapping[str, float] | None
    decided_by: str


@dataclass(frozen=True)
class Chosen:
    """A frame to be labelled, why, and whether people see it without the suggestion."""

    frame: Logged
    why: str
    blind: bool


def read_log(path: Path, mission: Mission) -> list[Logged]:
    """The frames of a log of `orion triage --out` or of the flight client, each once: the last line of a file counts.

    Raises OrionError for a line that is none of theirs, or of another mission.
    """
    found: dict[str, Logged] = {}
    number = 0
    try:
        for number, line in json_lines(path):  # noqa: B007
            row = json.loads(line)
            name = str(row.get("moved_to") or row["file"])
            scores = row.get("scores")
            said = row["category"], row.get("model_category", row["category"])
            if any(one is not None and one not in mission.names for one in (*said, *(scores or ()))):
                raise ValueError(f"{said[0]!r} is not a category of the mission {mission.name}")
            values = {str(key): float(value) for key, value in scores.items()} if scores else None
            if values and (len(values) != len(mission.names) or not all(map(math.isfinite, values.values()))):
                raise ValueError("scores should have a number for each category")
            found[name] = Logged(name, *said, str(row.get("reason") or ""), values, str(row.get("decided_by") or ""))
    except FileNotFoundError:
        raise OrionError(f"{path} does not exist.", "Make one with 'orion triage FOLDER --out FILE'.") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise OrionError(
            f"{path}:{number} is not a line of 'orion triage --out' or of the flight's log: {error}.",
            "Pass such a log, with --mission for a mission of your own.",
        ) from None
    if not found:
        raise OrionError(f"{path} has no frame.", "Pass a log with frames.")
    return list(found.values())


def choose(frames: Sequence[Logged], count: int, *, random_share: float, blind_share: float, seed: int) -> list[Chosen]:
    """`count` of the frames (all, if there are fewer) in an order that says nothing; the same for the same seed.

    Of these, `random_share` are drawn from all frames, and `blind_share` are shown without the suggestion.
    """
    random = np.random.default_rng(seed)
    ordered = sorted(frames, key=lambda frame: frame.file)
    count = min(count, len(ordered))
    drawn = [ordered[index] for index in random.permutation(len(ordered))[: round(random_share * count)]]
    chosen = {frame.file: (frame, RANDOM) for frame in drawn}
    for frame in sorted(ordered, key=_urgency):
        if len(chosen) < count:
            chosen.setdefault(frame.file, (frame, why_of(frame)))
    pairs = list(chosen.values())
    order = random.permutation(len(pairs))
    blind = set(random.permutation(len(pairs))[: round(blind_share * len(pairs))].tolist())
    return [Chosen(pairs[index][0], pairs[index][1], int(index) in blind) for index in order]


def why_of(frame: Logged) -> str:
    """Why a frame is worth a look."""
    if frame.category is None:
        return NO_VERDICT
    if frame.decided_by == UNLIKE:
        return UNLIKE
    if frame.model_category not in (None, frame.category):
        return OVERRULED
    return UNCERTAIN


def margin(frame: Logged) -> float:
    """How much the likeliest category is likelier than the next; 1 for a frame without scores, such as a blank one."""
    if not frame.scores:
        return 1.0
    first, second = sorted(frame.scores.values(), reverse=True)[:2]
    return first - second


def _urgency(frame: Logged) -> tuple[int, float, str]:
    return (NO_VERDICT, UNLIKE, OVERRULED, UNCERTAIN).index(why_of(frame)), margin(frame), frame.file
