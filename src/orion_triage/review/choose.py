"""Which frames of a log people should look at first; pure functions of the log's rows.

A share is drawn evenly from all frames, so that rates measured on it are those of the whole log. The others are those
from which a model learns most: without a verdict, unlike the training, decided otherwise than the model said, and the
least certain ones.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from orion_triage.errors import OrionError
from orion_triage.mission.mission import Mission
from orion_triage.safe.reading import shown
from orion_triage.safe.tables import numbered_lines

RANDOM, NO_VERDICT, UNLIKE, OVERRULED, UNCERTAIN = "random", "no verdict", "unlike training", "overruled", "uncertain"
_OTHER_LOG = "Pass such a log, with --mission for a mission of your own."


@dataclass(frozen=True)
class Logged:
    """A frame of a log: its file, what was said of it, and the SHA-256 of the file; empty if the log has none."""

    file: str
    category: str | None
    model_category: str | None
    reason: str
    scores: Mapping[str, float] | None
    decided_by: str
    sha256: str = ""


@dataclass(frozen=True)
class Chosen:
    """A frame to be labelled, why, and whether people see it without the suggestion."""

    frame: Logged
    why: str
    blind: bool


@dataclass
class LeftOut:
    """What of a log is not used: (what it is, why) -> an example of each."""

    examples: dict[tuple[str, str], list[str]] = field(default_factory=dict)

    def add(self, what: str, why: str, example: str) -> None:
        self.examples.setdefault((what, why), []).append(example.removesuffix("."))

    def in_words(self) -> list[str]:
        """A sentence for each reason, with the number and the first example."""
        return [
            f"left out: {len(found)} {what}{'s' * (len(found) > 1)} {why}, for example {found[0]}"
            for (what, why), found in self.examples.items()
        ]


def read_log(path: Path, mission: Mission, left_out: LeftOut | None = None) -> list[Logged]:
    """The frames of a log of `orion triage --out` or of the flight client, each once: the last line of a file counts.

    Damaged lines are added to `left_out`. Raises OrionError for a line of another mission, for a log without a line
    that can be used, and for a damaged line if nobody collects them.
    """
    found: dict[str, Logged] = {}
    faults: list[OrionError] = []
    try:
        for number, line in numbered_lines(path):
            try:
                frame = _logged(json.loads(line.decode()), mission, f"{path}:{number}")
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                kinds = "'orion triage --out' or of the flight's log"
                faults.append(OrionError(f"{path}:{number} is not a line of {kinds}: {error}.", _OTHER_LOG))
                continue
            found[frame.file] = frame
    except FileNotFoundError:
        raise OrionError(f"{path} does not exist.", "Make one with 'orion triage FOLDER --out FILE'.") from None
    if faults and (left_out is None or not found):
        raise faults[0]
    if not found:
        raise OrionError(f"{path} has no frame.", "Pass a log with frames.")
    for fault in faults:
        assert left_out is not None
        left_out.add("line", "that cannot be used", fault.message)
    return list(found.values())


def _logged(row: Mapping[str, Any], mission: Mission, where: str) -> Logged:
    """The frame of a line; raises OrionError for a category of another mission, other errors for a damaged line."""
    scores, sha256 = row.get("scores"), row.get("sha256") or ""
    said = row["category"], row.get("model_category", row["category"])
    if wrong := [one for one in (*said, *(scores or ())) if one is not None and one not in mission.names]:
        raise OrionError(f"{where}: {shown(wrong[0])} is not a category of the mission {mission.name}.", _OTHER_LOG)
    values = {str(key): float(value) for key, value in scores.items()} if scores else None
    if values and (len(values) != len(mission.names) or not all(map(math.isfinite, values.values()))):
        raise ValueError("scores should have a number for each category")
    if not isinstance(sha256, str):
        raise TypeError("sha256 should be text")
    name, reason, by = str(row.get("moved_to") or row["file"]), str(row.get("reason") or ""), row.get("decided_by")
    return Logged(name, *said, reason, values, str(by or ""), sha256.lower())


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
