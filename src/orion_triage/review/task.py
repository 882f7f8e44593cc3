"""Write a labelling task: a page for the browser, tasks for Label Studio, and what belongs to each frame.

The page needs no other file and no network. Labels are kept in the browser as they are given, and saved as a file.
"""

import base64
import hashlib
import io
import json
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any
from xml.sax.saxutils import quoteattr

from orion_triage import templates
from orion_triage.errors import FrameError, OrionError
from orion_triage.imagery.frames import CAMERA_SIZE, read_frame
from orion_triage.imagery.stretch import Stretch
from orion_triage.mission.mission import Mission, colours
from orion_triage.progress import Progress, silent
from orion_triage.review.choose import Chosen, LeftOut, Logged
from orion_triage.safe.files import replaced_folder, sha256_of_file, write_text

FRAMES_FILE, PAGE_FILE = "frames.json", "review.html"
TASKS_FILE, CONFIG_FILE = "label_studio_tasks.json", "label_studio_config.xml"
JPEG_QUALITY = 92  # of the pictures that people see; the dataset gets the frames themselves

Row = dict[str, Any]  # a frame in frames.json; see `_row`


@dataclass(frozen=True)
class Suggestion:
    """What a source says of a frame; `category` is None if its answer has none. `score` is that of the category."""

    source: str
    category: str | None
    reason: str = ""
    score: float | None = None


Said = Mapping[str, Sequence[Suggestion]]  # id of a frame -> what models said of it beside the task's own log


def require_new(folder: Path) -> None:
    """Raise OrionError if the folder of a new task exists."""
    if folder.exists():
        raise OrionError(f"{folder} exists.", "Name a folder that does not exist yet: labels belong to their task.")


def usable(
    frames: Sequence[Logged], folder: Path | None, left_out: LeftOut, progress: Progress = silent
) -> list[Logged]:
    """The frames that people can look at, with the absolute path of their file; in `folder`, if it is not where logged.

    A file of another hash than the logged one is another picture. Frames that `folder` leads to one file are left out,
    unless a single one has its hash; without a folder, they are one frame under two names, and the newer name counts.
    Raises OrionError if no frame can be used.
    """
    of_file: dict[Path, list[Logged]] = {}  # as logged
    found: list[Logged] = []

    def path_of(frame: Logged) -> Path:
        return found_in(folder, frame.file) if folder else Path(frame.file).absolute()

    for done, frame in enumerate(frames, start=1):
        progress("checking frames", done, len(frames))
        path = path_of(frame)
        if not path.is_file():
            left_out.add("frame", "without a file", f"{path} does not exist")
            continue
        try:
            read_frame(path, CAMERA_SIZE, resize=True)
        except FrameError as error:
            left_out.add("frame", "that cannot be read", error.message)
            continue
        if frame.sha256 and (own := sha256_of_file(path)) != frame.sha256:
            said = f"{path}: its SHA-256 begins with {own[:12]}, in the log with {frame.sha256[:12]}"
            left_out.add("frame", "whose file is not the logged one", said)
            continue
        of_file.setdefault(path.resolve(), []).append(frame)
    for path, logged in of_file.items():
        kept = logged[-1:]
        if folder and len(logged) > 1:
            sure = [frame for frame in logged if frame.sha256]
            kept = sure if len(sure) == 1 else []
            said = f"{logged[0].file} and {logged[1].file}: both would be {path}"
            for _ in range(len(logged) - len(kept)):
                left_out.add("frame", "with the same file as another one, and no hash that decides", said)
        found += [replace(frame, file=str(path_of(frame))) for frame in kept]
    if not found:
        raise OrionError(
            f"no frame of the log can be used: {'; '.join(left_out.in_words())}.",
            "Pass the folder that has these frames with --frames.",
        )
    return found


def write(
    folder: Path,
    chosen: Sequence[Chosen],
    mission: Mission,
    model: str,
    *,
    stretch: Stretch | None = None,
    progress: Progress = silent,
) -> dict[str, int]:
    """Write the task into `folder`, which must not exist; returns the number of frames by why they were chosen.

    `model` names who made the suggestions. Raises OrionError for a frame that cannot be read.
    """
    require_new(folder)
    rows, pictures = [], []
    for done, one in enumerate(chosen, start=1):
        path = Path(one.frame.file).absolute()
        sha256 = sha256_of_file(path) if path.is_file() else ""
        pictures.append(_picture(path, stretch))
        rows.append(_row(done, path, sha256, one, model))
        progress("reading frames", done, len(chosen))
    content = {"review": review_of(rows), "mission": mission.name, "categories": list(mission.names), "frames": rows}
    with replaced_folder(folder) as new:
        write_text(new / FRAMES_FILE, json.dumps(content, indent=1) + "\n")
        _write_pages(new, rows, pictures, mission, {})
        write_text(new / CONFIG_FILE, label_studio_config(mission))
    return dict(Counter(one.why for one in chosen))


def show(folder: Path, rows: Sequence[Row], mission: Mission, said: Said, progress: Progress = silent) -> None:
    """Write the page and the tasks for Label Studio again, with these suggestions beside the task's own.

    Frames keep their ids and the page its name, by which a browser keeps labels: none is lost. Raises OrionError for a
    frame that has changed.
    """
    pictures = []
    for done, row in enumerate(rows, start=1):
        pictures.append(_picture(file_of(row)))
        progress("reading frames", done, len(rows))
    _write_pages(folder, rows, pictures, mission, said)


def _write_pages(folder: Path, rows: Sequence[Row], pictures: Sequence[str], mission: Mission, said: Said) -> None:
    shown = [suggestions(row, said) if not row["blind"] else [] for row in rows]
    write_text(folder / PAGE_FILE, page(rows, pictures, shown, mission))
    tasks = [_task(*of_frame) for of_frame in zip(rows, pictures, shown, strict=True)]
    write_text(folder / TASKS_FILE, json.dumps(tasks, indent=1) + "\n")


def review_of(rows: Sequence[Row]) -> str:
    """The name of a task, by the bytes of its frames."""
    return hashlib.sha256("".join(row["sha256"] for row in rows).encode()).hexdigest()[:12]


def file_of(row: Row) -> Path:
    """The frame's file; raises OrionError if it is not the one of the task."""
    path = Path(row["file"])
    if not path.is_file() or sha256_of_file(path) != row["sha256"]:
        raise OrionError(f"{path} is gone, or is not the picture of the task.", "Put the frame back.")
    return path


def suggestions(row: Row, said: Said) -> list[Suggestion]:
    """All suggestions for a frame that have a category, that of the task's log first."""
    score = (row["scores"] or {}).get(row["suggestion"])
    own = Suggestion(row["suggested_by"], row["suggestion"], row["reason"], score)
    return [one for one in (own, *said.get(row["id"], ())) if one.category is not None]


def _picture(path: Path, stretch: Stretch | None = None) -> str:
    """The frame as people see it, as the address of an image."""
    data = io.BytesIO()
    read_frame(path, CAMERA_SIZE, resize=True, stretch=stretch).image.save(data, "JPEG", quality=JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"


def found_in(folder: Path, logged: str) -> Path:
    """The frame of a log in this folder: by as much of its logged path as is found there, at least its name."""
    parts = PurePosixPath(logged).parts
    candidates = [folder.joinpath(*parts[start:]) for start in range(parts[:1] == ("/",), len(parts))]
    return next((path for path in candidates if path.is_file()), folder.joinpath(*parts[-1:])).absolute()


def _row(number: int, path: Path, sha256: str, chosen: Chosen, model: str) -> Row:
    """A frame of a task. `id` begins with its position, so that a label can be traced."""
    logged = chosen.frame
    return {
        "id": f"{number:04d}-{sha256[:12]}",
        "file": str(path),
        "sha256": sha256,
        "why": chosen.why,
        "blind": chosen.blind,
        "suggestion": logged.category,
        "reason": logged.reason,
        "scores": dict(logged.scores) if logged.scores else None,
        "suggested_by": model,
    }


def page(rows: Sequence[Row], pictures: Sequence[str], shown: Sequence[Sequence[Suggestion]], mission: Mission) -> str:
    """The page: one frame at a time, with keys for the categories. `shown` are the suggestions for each frame."""
    review = review_of(rows)
    frames = [
        {
            "id": row["id"],
            "name": Path(row["file"]).name,
            "picture": picture,
            "suggestions": [{"source": one.source, "category": one.category, "reason": one.reason} for one in said],
        }
        for row, picture, said in zip(rows, pictures, shown, strict=True)
    ]
    return templates.fill(
        "review",
        "page.html.j2",
        review=review,
        nonce=secrets.token_urlsafe(12),
        mission=mission,
        colours=colours(mission),
        longest_reason=mission.longest_reason,
        inline=_inline({"review": review, "categories": list(mission.names), "frames": frames}),
    )


def _inline(value: Any) -> str:
    """JSON for a script element: no name or reason can end it, or a line of it."""
    text = json.dumps(value)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _task(row: Row, picture: str, shown: Sequence[Suggestion]) -> Row:
    """A task of Label Studio. What traces a label to its frame is in `data`: an export has that, and no predictions."""
    saw = [one.source for one in shown]
    data = {"image": picture, "frame": row["id"], "sha256": row["sha256"], "name": Path(row["file"]).name, "saw": saw}
    return {"data": data} | ({"predictions": [_prediction(one) for one in shown]} if shown else {})


def _prediction(said: Suggestion) -> Row:
    choice = {
        "from_name": "category",
        "to_name": "image",
        "type": "choices",
        "value": {"choices": [said.category]},
    }
    return {"model_version": said.source, "result": [choice]} | ({} if said.score is None else {"score": said.score})


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
