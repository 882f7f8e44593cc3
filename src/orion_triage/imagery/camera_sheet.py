"""Pictures of a folder before and after a camera, on one sheet."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from orion_triage.errors import OrionError
from orion_triage.imagery.camera import Camera, drawn, seen_through
from orion_triage.imagery.frames import CAMERA_SIZE, FRAME_SUFFIXES, read_frame, shrink
from orion_triage.imagery.stretch import Stretch
from orion_triage.progress import Progress, silent
from orion_triage.safe.folders import listing

MOST_FITTED = 400  # pictures that are measured: the estimates hardly change with more
_SIDE, _DETAIL, _GAP, _LINE = 256, 128, 8, 18  # pixels: of a cell, of the part that it shows enlarged, between, of text


def pictures_in(folder: Path, most: int) -> list[Path]:
    """At most so many pictures of a folder and the folders in it, spread evenly over their sorted names."""
    if not folder.is_dir():
        raise OrionError(f"{folder} is not a folder.", "Pass a folder with pictures.")
    found = [path for path in listing(folder, recursive=True).files if path.suffix.lower() in FRAME_SUFFIXES]
    if not found:
        raise OrionError(f"{folder} has no picture ({', '.join(FRAME_SUFFIXES)}).", "Pass another folder.")
    count = min(most, len(found))
    return [found[index * len(found) // count] for index in range(count)]


def frames_of(
    paths: Sequence[Path], *, resize: bool = False, stretch: Stretch | None = None, progress: Progress = silent
) -> list[Image.Image]:
    """The frames in these files, 512x512; raises FrameError for one that cannot be read."""
    frames = []
    for done, path in enumerate(paths, start=1):
        frames.append(read_frame(path, CAMERA_SIZE, resize=resize, stretch=stretch).image)
        progress("reading pictures", done, len(paths))
    return frames


def sheet(
    paths: Sequence[Path], camera: Camera, progress: Progress = silent, stretch: Stretch | None = None
) -> Image.Image:
    """One row for each picture: before and after, whole and enlarged, with the values that the camera has there."""
    row_height = _SIDE + 3 * _LINE + _GAP
    picture = Image.new("RGB", (4 * (_SIDE + _GAP) + _GAP, _LINE + _GAP + len(paths) * row_height), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    for column, title in enumerate(("before", f"after: {camera.name}", "before, 2 x", "after, 2 x")):
        draw.text((_GAP + column * (_SIDE + _GAP), _GAP // 2), title, "black", font)
    for row, path in enumerate(paths):
        before = read_frame(path, CAMERA_SIZE, resize=True, stretch=stretch).image
        after = seen_through(before, camera, path.stem)
        top = _LINE + _GAP + row * row_height
        for column, cell in enumerate(
            [shrink(before, _SIDE), shrink(after, _SIDE), _enlarged(before), _enlarged(after)]
        ):
            picture.paste(cell, (_GAP + column * (_SIDE + _GAP), top))
        values = {key: value for key, value in drawn(camera, path.stem).items() if _varies(camera, key)}
        said = [f"{key.replace('_', ' ')} {value:.3g}" for key, value in values.items()]
        half = (len(said) + 1) // 2
        for line, text in enumerate([path.name, "   ".join(said[:half]), "   ".join(said[half:])]):
            draw.text((_GAP, top + _SIDE + 1 + line * _LINE), text, "black" if line == 0 else "#555555", font)
        progress("drawing pictures", row + 1, len(paths))
    return picture


def _varies(camera: Camera, key: str) -> bool:
    span = camera.ranges().get(key)
    return camera.turned if span is None else span[0] != span[1]


def _enlarged(frame: Image.Image) -> Image.Image:
    """The middle of a frame, each pixel as four."""
    start = (CAMERA_SIZE - _DETAIL) // 2
    middle = frame.crop((start, start, start + _DETAIL, start + _DETAIL))
    return middle.resize((_SIDE, _SIDE), Image.Resampling.NEAREST)
