"""Adapt a run to a camera with a few labelled frames: fit a head, and say by cross-validation whether it helps."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from orion_triage.errors import OrionError
from orion_triage.evaluate import clusters, head
from orion_triage.evaluate.metrics import Prediction, compare
from orion_triage.evaluate.statistics import Integers
from orion_triage.export.quantize import PAIR
from orion_triage.imagery.stretch import Stretch
from orion_triage.mission.mission import Mission
from orion_triage.mission.prompt import user_text
from orion_triage.mission.verdict import require_category_alone
from orion_triage.progress import Progress, silent
from orion_triage.runs.run import held
from orion_triage.safe.files import sha256_of_file

if TYPE_CHECKING:
    from PIL import Image

    from orion_triage.runs.run import Run

FEWEST = 6  # labelled frames; with fewer, a cross-validation says nothing
CURVE = (5, 10, 20, 25, 50, 100)
_FEWEST_LEFT = 4  # frames that a point of the curve is measured on
REPEATS = 100  # of each point of the curve, with other frames
SEED = 42


@dataclass(frozen=True)
class Labelled:
    """A labelled frame of the camera's size and its file; `place` names those that are alike."""

    name: str
    category: str
    place: str
    path: Path
    image: "Image.Image"


def read_labelled(folder: Path, mission: Mission, stretch: Stretch | None = None) -> tuple[list[Labelled], list[str]]:
    """(The frames of a folder in any layout of `orion run --dataset FOLDER`, what is left out in words.)

    Blank frames are left out if the mission has a rule for them: no head is asked about them. The same picture twice
    counts once. Raises OrionError that lists mistakes, and for too few frames or categories.
    """
    from orion_triage.dataset.sources.directory import Directory
    from orion_triage.dataset.sources.source import Picture, Shot
    from orion_triage.imagery.frames import CAMERA_SIZE, is_blank, read_frame

    source = Directory(folder, mission)
    found: dict[bytes, Labelled] = {}
    again = 0
    for target, answer in zip(source.targets, source.pictures([Shot(one) for one in source.targets]), strict=True):
        assert isinstance(answer, Picture)
        assert isinstance(answer.data, Path)
        where = target.coordinates
        place = clusters.place_label(where.lon, where.lat) if where else target.name
        image = read_frame(answer.data, CAMERA_SIZE, resize=True, stretch=stretch).image
        own = Labelled(target.file or target.name, target.category, place, answer.data, image)
        first = found.setdefault(hashlib.sha256(image.tobytes()).digest(), own)
        if first.category != own.category:
            raise OrionError(
                f"{first.path} and {own.path} are the same picture, labelled {first.category} and {own.category}.",
                "Keep the one with the right label.",
            )
        again += first is not own
    # In an order of their own, so that the folds do not depend on names and folders.
    ordered = [found[key] for key in sorted(found)]
    frames = [frame for frame in ordered if not (mission.blank and is_blank(frame.image))]
    blank = len(found) - len(frames)
    if len(frames) < FEWEST:
        raise OrionError(f"{folder} has {len(frames)} labelled frames.", f"Add frames: at least {FEWEST} are needed.")
    if len({frame.category for frame in frames}) < 2:
        raise OrionError(f"all labelled frames are {frames[0].category}.", "Add frames of another category.")
    if len({frame.place for frame in frames}) < 2:
        raise OrionError("all labelled frames are of one place.", "Add frames of other places.")
    told = [f"{blank} blank frames, which the blank rule decides"] if blank else []
    return frames, told + ([f"{again} pictures that are there already"] if again else [])


def run(of: "Run", frames: Sequence[Labelled], zero_shot: Sequence[str | None], progress: Progress = silent) -> Path:
    """Fit a head on these frames, write it into the run's folder, and return its path.

    `zero_shot` are the decisions of the pair as it flies on the same frames. The head's figures: see `figures`.
    """
    mission, size = of.settings.mission, of.settings.base.frame_size
    require_category_alone(mission)
    states = states_of(of, [frame.image for frame in frames], progress)
    truth = np.array([mission.names.index(frame.category) for frame in frames], dtype=np.int64)
    numbers = {place: index for index, place in enumerate(dict.fromkeys(frame.place for frame in frames))}
    places = [f"place {numbers[frame.place]:06d}" for frame in frames]  # not by their names: see read_labelled
    count = len(mission.names)
    weights, bias = head.fit(states, truth, count)
    told = figures(states, truth, places, [frame.name for frame in frames], zero_shot, mission, progress)
    made = head.Head(
        mission.names,
        weights.astype(np.float32),
        bias.astype(np.float32),
        sha256_of_file(of.pair / PAIR),
        size,
        told,
    )
    with held(of, "adapt"):
        return head.write(of.folder, made)


def states_of(of: "Run", images: "Sequence[Image.Image]", progress: Progress = silent) -> head.Floats:
    """The descriptions [frames, width] of frames of the camera's size, by the run's pair."""
    mission, size = of.settings.mission, of.settings.base.frame_size
    text = user_text(mission, None)
    found = []
    with head.serving(of.pair, of.folder / "logs" / "adapt-server.log", progress) as server:
        for done, image in enumerate(images, start=1):
            found.append(head.description(server.client, text, image, size))
            progress("looking at frames", done, len(images))
    return np.stack(found)


def figures(
    states: head.Floats,
    truth: Integers,
    places: Sequence[str],
    names: Sequence[str],
    zero_shot: Sequence[str | None],
    mission: Mission,
    progress: Progress = silent,
) -> dict[str, Any]:
    """What a head on these frames is worth, each frame judged by a head that has not seen its place.

    `head`, `zero_shot` and `constant` (the commonest category): right answers with their interval over places, and the
    mean recall of the categories that occur. `repeats`: right answers in each division of the frames into folds, of
    which the median one is reported.
    `change`: from zero-shot to the head, and from the constant; paired. `curve`: frames -> mean accuracy and its 10 and
    90 % quantiles over drawn sets of that many frames. `answers`: of each frame, by a head that has not seen its place.
    """
    count = len(mission.names)
    repeats = head.out_of_fold(states, truth, count, places, SEED)
    right = (repeats.argmax(axis=2) == truth).sum(axis=1)
    # The median division: the mean of all scores would be that of ten heads, which is better than one.
    scores = repeats[int(np.argsort(right, kind="stable")[(len(right) - 1) // 2])]
    said = [mission.names[int(index)] for index in scores.argmax(axis=1)]
    constant = [mission.names[int(np.bincount(truth).argmax())]] * len(truth)
    answers: Mapping[str, Sequence[str | None]] = {"head": said, "zero_shot": zero_shot, "constant": constant}
    of = {
        name: [
            Prediction("B", frame, mission.names[int(right)], answer, place=place)
            for frame, right, answer, place in zip(names, truth, given, places, strict=True)
        ]
        for name, given in answers.items()
    }
    return {
        "frames": len(truth),
        "places": len(set(places)),
        "of_category": {name: int((truth == index).sum()) for index, name in enumerate(mission.names)},
        **{name: _rates(predictions) for name, predictions in of.items()},
        "change": {name: vars(compare(of[name], of["head"])) for name in ("zero_shot", "constant")},
        "repeats": sorted(int(count) for count in right),
        "log_loss": head.log_loss(scores, truth),
        "curve": _curve(states, truth, places, count, progress),
        "answers": {
            name: {"truth": mission.names[int(of_frame)], "place": place, "scores": [round(float(s), 6) for s in given]}
            for name, of_frame, place, given in zip(names, truth, places, scores, strict=True)
        },
    }


def _rates(predictions: Sequence[Prediction]) -> dict[str, Any]:
    hits = np.array([p.predicted == p.truth for p in predictions])
    recalls = [
        float(np.mean([p.predicted == p.truth for p in predictions if p.truth == name]))
        for name in sorted({p.truth for p in predictions})
    ]
    rate = clusters.rate(hits, [p.place for p in predictions])
    return rate | {"balanced": float(np.mean(recalls))}


def _curve(
    states: head.Floats, truth: Integers, places: Sequence[str], count: int, progress: Progress
) -> dict[str, dict[str, float]]:
    """Frames that a head is fitted on -> its accuracy on the frames of the other places, over drawn sets."""
    random, own = np.random.default_rng(SEED), np.array(places)
    names = sorted(set(places))
    sizes = [size for size in CURVE if size <= len(truth) - _FEWEST_LEFT]
    found = {}
    for done, size in enumerate(sizes, start=1):
        accuracies = []
        for _ in range(REPEATS):
            order = random.permutation(len(names))
            inside = np.array([], dtype=np.int64)
            for index in order:
                if len(inside) >= size:
                    break
                inside = np.append(inside, np.flatnonzero(own == names[index]))
            outside = np.setdiff1d(np.arange(len(truth)), inside)
            if not len(outside):
                continue
            weights, bias = head.fit(states[inside], truth[inside], count)
            guess = (states[outside] @ weights.T + bias).argmax(axis=1)
            accuracies.append(float((guess == truth[outside]).mean()))
        low, high = np.quantile(accuracies, [0.1, 0.9])
        found[str(size)] = {"mean": float(np.mean(accuracies)), "low": float(low), "high": float(high)}
        progress("learning curve", done, len(sizes))
    return found
