"""Read labels back: from the page, and from Label Studio's export; and make a dataset of what people agree on.

A label counts for the frame of its id, whose hash is in the task. Labellers are compared by Cohen's kappa, and labels
with the suggestions of each source: a label equal to one that was seen, after less than a second, says little. A
suggestion is never a label.
"""

import itertools
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from orion_triage.dataset.collect import csv_text
from orion_triage.errors import OrionError
from orion_triage.evaluate import clusters
from orion_triage.imagery.frames import CAMERA_SIZE, RAW_SUFFIX, read_frame
from orion_triage.mission.mission import Mission
from orion_triage.mission.verdict import reason_fault
from orion_triage.review.choose import RANDOM
from orion_triage.review.task import FRAMES_FILE, Said, Suggestion, file_of, suggestions
from orion_triage.safe.files import replaced_folder, write_text
from orion_triage.safe.reading import LARGEST_TABLE_BYTES, parse_json, read_bytes, read_object, shown

COLUMNS = (
    "file_name", "category", "reason", "labelled_by", "labelled_at", "why", "blind", "suggestion", "suggested_by",
    "labels", "sha256",
)  # fmt: skip
CONFLICTS = "conflicts.json"  # no second table
QUICK_SECONDS = 1.0
_LONGEST_NAME = 200


@dataclass(frozen=True)
class Label:
    """What one person said of one frame; `seconds` is how long it took, None if it is not known.

    `at` is a time in ISO 8601, empty if it is not known. `saw` are the sources whose suggestions were shown; None if
    the file does not say.
    """

    frame: str
    category: str
    reason: str
    labeller: str
    at: str
    seconds: float | None
    saw: tuple[str, ...] | None = None

    @property
    def time(self) -> datetime:
        """`at`, in UTC if it has no time zone; an unknown one is the earliest. Raises ValueError if it is no time."""
        if not self.at.isprintable():  # fromisoformat takes any character between date and time
            raise ValueError("not printable")
        time = datetime.fromisoformat(self.at) if self.at else datetime.min
        return time if time.tzinfo else time.replace(tzinfo=UTC)


def read_task(folder: Path, mission: Mission) -> dict[str, dict[str, Any]]:
    """Id -> the task's row of a frame; raises OrionError if the folder is no task of this mission."""
    path = folder / FRAMES_FILE
    again = "Write the task again with 'orion review new'."
    try:
        rows = read_object(path)["frames"]
        for row in rows:
            texts = [row[key] for key in ("id", "file", "sha256", "why", "suggested_by", "reason")]
            if not all(isinstance(text, str) for text in texts) or row["suggestion"] not in (None, *mission.names):
                raise ValueError(f"the frame {row['id']!r}")
            if not all(isinstance(value, int | float) for value in (row["scores"] or {}).values()):
                raise ValueError(f"the scores of the frame {row['id']!r}")
            bool(row["blind"])
        return {row["id"]: row for row in rows}
    except FileNotFoundError:
        raise OrionError(f"{path} does not exist.", "Pass the folder that 'orion review new' wrote.") from None
    except OrionError as error:
        raise OrionError(error.message, again) from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise OrionError(f"{path} is damaged: {error!r}.", again) from None


def read_labels(path: Path, task: Mapping[str, Any], mission: Mission) -> tuple[list[Label], int]:
    """(The labels in a file, the tasks in it that nobody labelled): of the page, or of Label Studio (JSON, JSON-MIN).

    Raises OrionError for a file that is neither, for labels of another task, and for a label that cannot be used: with
    two categories or one that there is not, a time that is none, or a reason that no training takes.
    """
    try:
        value = parse_json(read_bytes(path, LARGEST_TABLE_BYTES))
    except FileNotFoundError:
        raise OrionError(f"{path} does not exist.", "Pass a file with labels.") from None
    except ValueError as error:
        raise OrionError(f"{path} is not JSON: {error}.", "Export the labels again.") from None
    try:
        if isinstance(value, dict):
            found, empty = list(_of_page(value)), 0
        else:
            found, empty = _of_label_studio(value)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise OrionError(
            f"{path} has neither labels of the page nor an export of Label Studio: {error!r}.",
            "Save the labels in the page, or export JSON in Label Studio.",
        ) from None
    for label in found:
        if not label.labeller.strip() or not label.labeller.isprintable() or len(label.labeller) > _LONGEST_NAME:
            raise OrionError(f"{path}: {shown(label.labeller)} is no name of a labeller.", "Write a plain name.")
        if label.frame not in task:
            raise OrionError(f"{path}: {shown(label.frame)} is no frame of this task.", "Pass the labels of this task.")
        where = f"{path}: frame {label.frame}"
        if label.category not in mission.names:
            message = f"{where}: {shown(label.category)} is not a category of {mission.name}."
            raise OrionError(message, "Give the frame one category of the mission.")
        try:
            label.time  # noqa: B018
        except ValueError:
            raise OrionError(f"{where}: {shown(label.at)} is no time.", "Write it as 2026-11-29T10:00:00Z.") from None
        if fault := _reason_fault(label.reason, mission):
            raise OrionError(f"{where}: the reason {shown(label.reason)} {fault}.", "Correct the reason.")
    return found, empty


def _reason_fault(reason: str, mission: Mission) -> str:
    """Why a dataset with this reason would be refused; empty if it would not. Line breaks become blanks there."""
    if (length := len(reason.strip())) > mission.longest_reason:
        return f"has {length} characters; the limit is {mission.longest_reason}"
    return reason_fault(" ".join(reason.split()))


def _of_page(value: Mapping[str, Any]) -> Iterator[Label]:
    if not isinstance(value["labeller"], str):
        raise TypeError("labeller is no text")
    for row in value["labels"]:
        if not isinstance(row["at"], str):
            raise TypeError("at is no text")
        yield Label(
            str(row["frame"]), str(row["category"]), str(row.get("reason") or ""), value["labeller"].strip(),
            row["at"], float(row["seconds"]), _sources(row),
        )  # fmt: skip


def _of_label_studio(tasks: Any) -> tuple[list[Label], int]:
    """Labels of an export. An annotation that was skipped or has no category is none; drafts are elsewhere in it."""
    found, empty = [], 0
    if not isinstance(tasks, list):
        raise TypeError("an export is a list")
    for task in tasks:
        if "annotations" not in task:  # JSON-MIN: one row for each annotation
            label = _of_row(task)
            found += [label] if label else []
            empty += label is None
            continue
        labels = [label for one in task["annotations"] if (label := _of_annotation(task["data"], one))]
        found += labels
        empty += not labels
    return found, empty


def _of_row(row: Mapping[str, Any]) -> Label | None:
    if not row.get("category"):
        return None
    reason = row.get("reason") or ""
    text = reason[0] if isinstance(reason, list) else reason
    return Label(
        str(row["frame"]), str(row["category"]), str(text), f"Label Studio user {row.get('annotator', '')}".strip(),
        str(row.get("created_at") or ""), _number(row.get("lead_time")), _sources(row),
    )  # fmt: skip


def _of_annotation(data: Mapping[str, Any], annotation: Mapping[str, Any]) -> Label | None:
    if annotation.get("was_cancelled"):
        return None
    said = {one["from_name"]: one["value"] for one in annotation["result"]}
    choices = said.get("category", {}).get("choices")
    if not choices:
        return None
    who = annotation.get("completed_by")
    name = who.get("email") if isinstance(who, dict) else f"Label Studio user {who}"
    texts = said.get("reason", {}).get("text") or [""]
    return Label(
        str(data["frame"]), ", ".join(map(str, choices)), str(texts[0] if isinstance(texts, list) else texts),
        str(name), str(annotation.get("created_at") or ""), _number(annotation.get("lead_time")), _sources(data),
    )  # fmt: skip


def _sources(row: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The sources that a label's row names; None in a file of a page that did not write them."""
    return tuple(map(str, row["saw"])) if isinstance(row.get("saw"), list) else None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


@dataclass(frozen=True)
class Merged:
    """Frame -> the labels on it, the last of each labeller; and what is to be said of them."""

    of_frame: dict[str, list[Label]]
    figures: dict[str, Any]


def merge(
    labels: Sequence[Label], task: Mapping[str, dict[str, Any]], mission: Mission, empty: int, said: Said | None = None
) -> Merged:
    """The labels by frame, with the figures: agreement of the labellers, and of the labels with the suggestions.

    `said` are suggestions beside those of the task's log.
    """
    last: dict[tuple[str, str], Label] = {}
    replaced: list[str] = []
    for label in sorted(labels, key=lambda label: label.time):
        before = last.get((label.frame, label.labeller), label)
        if before.category != label.category:
            replaced.append(
                f"{label.frame}, {label.labeller}: {before.category} ({before.at}), then {label.category} ({label.at})"
            )
        last[label.frame, label.labeller] = label
    of_frame: dict[str, list[Label]] = {}
    for label in last.values():
        of_frame.setdefault(label.frame, []).append(label)
    conflicts = [frame for frame, own in of_frame.items() if not agreed(own)]
    said = said or {}
    compared = [
        _Compared(label, one, one.source in _seen(label, task[label.frame]))
        for label in last.values()
        for one in suggestions(task[label.frame], said)
    ]
    named = [row["suggested_by"] for row in task.values()] + [one.source for of in said.values() for one in of]
    sure = {own[0] for frame, own in of_frame.items() if frame not in conflicts and task[frame]["why"] == RANDOM}
    figures = {
        "frames": len(task),
        "labelled": len(of_frame),
        "not_labelled": len(task) - len(of_frame),
        "empty_in_export": empty,
        "labellers": sorted({label.labeller for label in last.values()}),
        "replaced": replaced,
        "conflicts": sorted(conflicts),
        "kappa": _kappas(list(last.values()), mission),
        "as_suggested": {
            source: _of_source([one for one in compared if one.said.source == source], sure, len(of_frame), mission)
            for source in dict.fromkeys(named)
        },
        "quick_as_suggested": sum(
            one.seen and one.agrees and one.label.seconds is not None and one.label.seconds < QUICK_SECONDS
            for one in compared
        ),
    }
    return Merged(of_frame, figures)


def agreed(labels: Sequence[Label]) -> str:
    """The category on which all labellers of a frame agree; empty if they do not."""
    categories = {label.category for label in labels}
    return categories.pop() if len(categories) == 1 else ""


@dataclass(frozen=True)
class _Compared:
    """A label and a suggestion for its frame, and whether the labeller saw it."""

    label: Label
    said: Suggestion
    seen: bool

    @property
    def agrees(self) -> bool:
        return self.label.category == self.said.category


def _seen(label: Label, row: Mapping[str, Any]) -> tuple[str, ...]:
    """The sources whose suggestions a labeller saw; without a word of it, that of the task's log unless it is blind."""
    if label.saw is not None:
        return label.saw
    return () if row["blind"] else (row["suggested_by"],)


def _of_source(
    compared: Sequence[_Compared], sure: Set[Label], labelled: int, mission: Mission
) -> dict[str, dict[str, Any] | int]:
    """The agreement of labels with the suggestions of a source: seen, not seen (blind), and on the random frames.

    For the random frames, one label counts for all labellers, who agree (`sure`). `without` are labelled frames for
    which the source has no category.
    """
    return {
        "seen": _agreement([one for one in compared if one.seen], mission),
        "blind": _agreement([one for one in compared if not one.seen], mission),
        "random": _agreement([one for one in compared if one.label in sure], mission),
        "without": labelled - len({one.label.frame for one in compared}),
    }


def _agreement(compared: Sequence[_Compared], mission: Mission) -> dict[str, Any]:
    """{count, total, rate, low, high, kappa} of labels equal to their suggestion; the interval is over frames."""
    kappa = _kappa([one.label.category for one in compared], [str(one.said.category) for one in compared], mission)
    equal = np.array([one.agrees for one in compared], dtype=np.bool_)
    return clusters.rate(equal, [one.label.frame for one in compared]) | {"kappa": kappa}


def _kappas(labels: Sequence[Label], mission: Mission) -> dict[str, dict[str, Any]]:
    """Cohen's kappa of each two labellers, on the frames that both labelled; None if chance would agree as well."""
    of_labeller: dict[str, dict[str, str]] = {}
    for label in labels:
        of_labeller.setdefault(label.labeller, {})[label.frame] = label.category
    found = {}
    for first, second in itertools.combinations(sorted(of_labeller), 2):
        both = sorted(of_labeller[first].keys() & of_labeller[second].keys())
        if len(both) < 2:
            continue
        said = [[of_labeller[name][frame] for frame in both] for name in (first, second)]
        found[f"{first}, {second}"] = {"frames": len(both), "kappa": _kappa(said[0], said[1], mission)}
    return found


def _kappa(first: Sequence[str], second: Sequence[str], mission: Mission) -> float | None:
    """Cohen's kappa of two lists of categories of the same frames; None if chance would agree as well."""
    from sklearn.metrics import cohen_kappa_score

    if len({*first, *second}) < 2:
        return None
    kappa = float(cohen_kappa_score(first, second, labels=list(mission.names)))
    return None if math.isnan(kappa) else kappa


def write_dataset(folder: Path, merged: Merged, task: Mapping[str, dict[str, Any]]) -> int:
    """Write the frames on which all labellers agree, with a table; returns their number. The others: conflicts.json.

    Raises OrionError if the folder exists, or if a frame is not the one that was shown.
    """
    if folder.exists():
        raise OrionError(f"{folder} exists.", "Name a folder that does not exist yet.")
    rows: list[dict[str, Any]] = []
    conflicts: list[dict[str, Any]] = []
    for frame, labels in sorted(merged.of_frame.items()):
        cells = _cells(frame, labels, task[frame], file_of(task[frame]))
        (rows if agreed(labels) else conflicts).append(cells)
    with replaced_folder(folder) as new:
        (new / "pictures").mkdir()
        for cells in rows:
            _copy_picture(cells.pop("path"), new / "pictures" / cells["file_name"])
        write_text(new / "metadata.csv", csv_text(COLUMNS, rows))
        if conflicts:
            as_text = [{key: str(value) for key, value in cells.items()} for cells in conflicts]
            write_text(new / CONFLICTS, json.dumps(as_text, indent=1) + "\n")
    return len(rows)


def _is_raw(path: Path) -> bool:
    return path.suffix.lower() == RAW_SUFFIX


def _copy_picture(path: Path, out: Path) -> None:
    """The same bytes; a raw frame of the flight client as a PNG of the same pixels, which every reader takes."""
    if _is_raw(path):
        read_frame(path, CAMERA_SIZE).image.save(out, "PNG", compress_level=1)
    else:
        shutil.copyfile(path, out)


def _cells(frame: str, labels: Sequence[Label], row: Mapping[str, Any], path: Path) -> dict[str, Any]:
    said = [f"{label.labeller}: {label.category}" for label in labels]
    reason = next((label.reason for label in labels if label.reason), "")
    return {
        "path": path,
        "file_name": f"{frame}{'.png' if _is_raw(path) else path.suffix.lower()}",
        "category": agreed(labels),
        "reason": reason,
        "labelled_by": "; ".join(label.labeller for label in labels),
        "labelled_at": max(labels, key=lambda label: label.time).at,
        "why": row["why"],
        "blind": "yes" if row["blind"] else "no",
        "suggestion": row["suggestion"] or "",
        "suggested_by": row["suggested_by"],
        "labels": "; ".join(said),
        "sha256": row["sha256"],
    }


def to_json(merged: Merged) -> str:
    return json.dumps(merged.figures, indent=2)
