"""Frames that are all of one category to be dropped, decided as on board: how many are sent or stored all the same.

Almost all frames in orbit are to be dropped, so false alarms decide what is sent. A balanced split has a few dozen such
frames; of a downlink, thousands are known to be empty, and need no other label. The report reads the file written here.
"""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orion_triage.errors import OrionError
from orion_triage.evaluate.false_alarms import FILE_NAME, rules_in_words
from orion_triage.export import quantize
from orion_triage.flight import triage
from orion_triage.mission.mission import Mission, listed
from orion_triage.progress import Progress, silent
from orion_triage.safe.files import appending, sha256_of_file, write_text

if TYPE_CHECKING:
    from orion_triage.runs.run import Run


def category_of(mission: Mission, asked: str) -> str:
    """The category of all frames: the one that is dropped, unless there are several; raises OrionError otherwise."""
    dropped = mission.that("drop")
    if asked and asked not in dropped:
        raise OrionError(
            f"{asked!r} is not a category whose frames are dropped.",
            f"Use {listed(dropped, 'or') or 'another mission'}.",
        )
    if not asked and len(dropped) != 1:
        raise OrionError(
            f"the mission {mission.name} drops frames of {len(dropped)} categories.",
            f"Name that of these frames with --category {' or '.join(dropped)}." if dropped else "Use another mission.",
        )
    return asked or dropped[0]


def run(
    of: "Run",
    folder: Path,
    *,
    category: str = "",
    recursive: bool = False,
    resize: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Decide all pictures of a folder and write false_alarms.json into the run's folder; returns its content.

    The decisions are appended to a log beside it, so that the same command resumes. Frames of one folder count as of
    one place; those directly in `folder` are of places of their own. Raises OrionError if a frame is refused.
    """
    flown = triage.of_run(of)
    category = category_of(flown.mission, category)
    paths, left_out = triage.frames_in([folder], recursive=recursive)
    hashes = {path: sha256_of_file(path) for path in paths}
    pair = triage.asked_by(flown, flown.rules, resize)
    log = of.folder / "logs" / f"false-alarms-{pair}.jsonl"
    with appending(log) as write:
        triage.read_earlier(log, pair)  # checks the log, and removes an incomplete last line
        before = _decided(log)
        # By its bytes: another downlink has other pictures under the same names.
        left = list({hashes[path]: path for path in paths if hashes[path] not in before}.values())
        outcomes = triage.triage_with_pair(left, flown, rules=flown.rules, resize=resize, progress=progress)
        for done, (path, outcome) in enumerate(zip(left, outcomes if left else (), strict=True), start=1):
            if outcome.error and not outcome.answer:
                raise OrionError(outcome.error, "Remove the frame or correct it; what is decided stays decided.")
            write(triage.to_row(outcome, flown.mission, pair) | {"sha256": hashes[path]})
            progress("classifying frames", done, len(left))
    decided = _decided(log)
    record = {
        "folder": str(folder),
        "category": category,
        "answers": _by_place({path: decided[hashes[path]] for path in paths}, folder),
        "left_out": left_out,
        "pair_sha256": sha256_of_file(of.gguf / quantize.PAIR),
        "rules": rules_in_words(flown.rules),
    }
    write_text(of.folder / FILE_NAME, json.dumps(record, indent=1) + "\n")
    return record


def _decided(log: Path) -> dict[str, str]:
    """Hash of a picture -> the decided category; empty without one."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    rows = (json.loads(line) for line in lines)
    return {row["sha256"]: row["category"] or "" for row in rows if "sha256" in row}


def _by_place(decided: Mapping[Path, str], folder: Path) -> dict[str, dict[str, int]]:
    """Place -> decided category -> frames."""
    counts: dict[str, Counter[str]] = {}
    for path, category in decided.items():
        inside = path.relative_to(folder)
        place = inside.as_posix() if len(inside.parts) == 1 else inside.parent.as_posix() + "/"
        counts.setdefault(place, Counter())[category] += 1
    return {place: dict(sorted(count.items())) for place, count in sorted(counts.items())}
