"""Write a labelling task: a page for the browser, tasks for Label Studio, and what belongs to each frame.

The page needs no other file and no network. Labels are kept in the browser as they are given, and saved as a file.
"""

import base64
import hashlib
import io
import json
import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from xml.sax.saxutils import quoteattr

from orion_triage import templates
from orion_triage.errors import OrionError
from orion_triage.imagery.frames import CAMERA_SIZE, read_frame
from orion_triage.imagery.stretch import Stretch
from orion_triage.mission.mission import Mission, colours
from orion_triage.progress import Progress, silent
from orion_triage.review.choose import Chosen
from orion_triage.safe.files import replaced_folder, sha256_of_file, write_text

FRAMES_FILE, PAGE_FILE = "frames.json", "review.html"
TASKS_FILE, CONFIG_FILE = "label_studio_tasks.json", "label_studio_config.xml"
JPEG_QUALITY = 92  # of the pictures that people see; the dataset gets the frames themselves


@dataclass(frozen=True)
class Frame:
    """A frame of a task. `id` begins with its position, so that a label can be traced; `picture` is a JPEG."""

    id: str
    path: Path
    sha256: str
    chosen: Chosen
    picture: bytes


def write(
    folder: Path,
    chosen: Sequence[Chosen],
    frames_folder: Path | None,
    mission: Mission,
    model: str,
    *,
    stretch: Stretch | None = None,
    progress: Progress = silent,
) -> dict[str, int]:
    """Write the task into `folder`, which must not exist; returns the number of frames by why they were chosen.

    `model` names who made the suggestions. Raises OrionError for a frame that cannot be read.
    """
    if folder.exists():
        raise OrionError(f"{folder} exists.", "Name a folder that does not exist yet: labels belong to their task.")
    frames = []
    for done, one in enumerate(chosen, start=1):
        frames.append(_frame(done, one, frames_folder, stretch))
        progress("reading frames", done, len(chosen))
    review = hashlib.sha256("".join(frame.sha256 for frame in frames).encode()).hexdigest()[:12]
    rows = [_row(frame, model) for frame in frames]
    told = {"review": review, "mission": mission.name, "categories": list(mission.names), "frames": rows}
    with replaced_folder(folder) as new:
        write_text(new / FRAMES_FILE, json.dumps(told, indent=1) + "\n")
        write_text(new / PAGE_FILE, page(review, frames, mission))
        tasks = [_task(frame, mission, model) for frame in frames]
        write_text(new / TASKS_FILE, json.dumps(tasks, indent=1) + "\n")
        write_text(new / CONFIG_FILE, label_studio_config(mission))
    return dict(Counter(one.why for one in chosen))


def _frame(number: int, chosen: Chosen, folder: Path | None, stretch: Stretch | None) -> Frame:
    path = found_in(folder, chosen.frame.file) if folder else Path(chosen.frame.file).absolute()
    sha256 = sha256_of_file(path) if path.is_file() else ""
    picture = io.BytesIO()
    read_frame(path, CAMERA_SIZE, resize=True, stretch=stretch).image.save(picture, "JPEG", quality=JPEG_QUALITY)
    return Frame(f"{number:04d}-{sha256[:12]}", path, sha256, chosen, picture.getvalue())


def found_in(folder: Path, logged: str) -> Path:
    """The frame of a log in this folder: by as much of its logged path as is found there, at least its name."""
    parts = PurePosixPath(logged).parts
    candidates = [folder.joinpath(*parts[start:]) for start in range(parts[0] == "/", len(parts))]
    return next((path for path in candidates if path.is_file()), folder / parts[-1]).absolute()


def _row(frame: Frame, model: str) -> dict[str, Any]:
    logged = frame.chosen.frame
    return {
        "id": frame.id,
        "file": str(frame.path),
        "sha256": frame.sha256,
        "why": frame.chosen.why,
        "blind": frame.chosen.blind,
        "suggestion": logged.category,
        "reason": logged.reason,
        "scores": dict(logged.scores) if logged.scores else None,
        "suggested_by": model,
    }


def _address(frame: Frame) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(frame.picture).decode()}"


def page(review: str, frames: Sequence[Frame], mission: Mission) -> str:
    """The page: one frame at a time, with keys for the categories."""
    shown = [
        {
            "id": frame.id,
            "name": frame.path.name,
            "picture": _address(frame),
            "suggestion": None if frame.chosen.blind else frame.chosen.frame.category,
            "reason": "" if frame.chosen.blind else frame.chosen.frame.reason,
        }
        for frame in frames
    ]
    return templates.fill(
        "review",
        "page.html.j2",
        review=review,
        nonce=secrets.token_urlsafe(12),
        mission=mission,
        colours=colours(mission),
        longest_reason=mission.longest_reason,
        inline=_inline({"review": review, "categories": list(mission.names), "frames": shown}),
    )


def _inline(value: Any) -> str:
    """JSON for a script element: no name or reason can end it, or a line of it."""
    text = json.dumps(value)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _task(frame: Frame, mission: Mission, model: str) -> dict[str, Any]:
    """A task of Label Studio. What traces a label to its frame is in `data`: an export has that, and no predictions."""
    row = _row(frame, model)
    data = {"image": _address(frame), "frame": frame.id, "sha256": frame.sha256, "name": frame.path.name}
    if frame.chosen.blind or frame.chosen.frame.category is None:
        return {"data": data}
    choice = {
        "from_name": "category",
        "to_name": "image",
        "type": "choices",
        "value": {"choices": [row["suggestion"]]},
    }
    scores = frame.chosen.frame.scores or {}
    score = scores.get(frame.chosen.frame.category)
    prediction = {"model_version": model, "result": [choice]} | ({"score": score} if score is not None else {})
    return {"data": data, "predictions": [prediction]}


def label_studio_config(mission: Mission) -> str:
    """The labelling interface for Label Studio, with the keys 1, 2, ... for the categories."""
    choices = "\n".join(
        f'    <Choice value={quoteattr(name)} hotkey="{number}"/>' for number, name in enumerate(mission.names, start=1)
    )
    return f"""<View>
  <Image name="image" value="$image"/>
  <Choices name="category" toName="image" choice="single" showInLine="true" required="true">
{choices}
  </Choices>
  <TextArea name="reason" toName="image" rows="2" maxSubmissions="1" placeholder="reason, one plain sentence"/>
</View>
"""
