"""Adapt a run to a camera with a few labelled frames: fit a head, and say by cross-validation whether it helps."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from orion_triage.dataset.labelled import Labelled
from orion_triage.evaluate import clusters, head
from orion_triage.evaluate.metrics import Prediction, compare
from orion_triage.evaluate.statistics import Integers
from orion_triage.export.quantize import PAIR
from orion_triage.mission.mission import Mission
from orion_triage.mission.prompt import user_text
from orion_triage.mission.verdict import require_category_alone
from orion_triage.progress import Progress, silent
from orion_triage.runs.run import held
from orion_triage.safe.files import sha256_of_file

if TYPE_CHECKING:
    from PIL import Image

    from orion_triage.runs.run import Run

CURVE = (5, 10, 20, 25, 50, 100)
_FEWEST_LEFT = 4  # frames that a point of the curve is measured on
REPEATS = 100  # of each point of the curve, with other frames
SEED = 42


@dataclass(frozen=True)
class Continued:
    """What continued adapters that have not seen a frame decide about it, and the folds of that cross-validation."""

    answers: Sequence[str | None]
    folds: Sequence[Integers]


def truth_of(frames: Sequence[Labelled], mission: Mission) -> Integers:
    """The index [frames] of each frame's category."""
    return np.array([mission.names.index(frame.category) for frame in frames], dtype=np.int64)


def places_of(frames: Sequence[Labelled]) -> list[str]:
    """A label of each frame's place, by its number: names decide no folds."""
    numbers = {place: index for index, place in enumerate(dict.fromkeys(frame.place for frame in frames))}
    return [f"place {numbers[frame.place]:06d}" for frame in frames]


def folds_of(frames: Sequence[Labelled], mission: Mission, count: int) -> list[Integers]:
    """The frames of each fold of one cross-validation, whole places; see head.folds."""
    return head.folds(truth_of(frames, mission), places_of(frames), SEED, count)


def fitted(
    of: "Run",
    frames: Sequence[Labelled],
    zero_shot: Sequence[str | None],
    progress: Progress = silent,
    continued: Continued | None = None,
) -> head.Head:
    """A head on these frames; its figures: see `figures`.

    `zero_shot` are the decisions of the pair as it flies on the same frames, `continued` those of a continued adapter.
    """
    mission, size = of.settings.mission, of.settings.base.frame_size
    require_category_alone(mission)
    states = states_of(of, [frame.image for frame in frames], progress)
    truth, places, names = truth_of(frames, mission), places_of(frames), [frame.name for frame in frames]
    weights, bias = head.fit(states, truth, len(mission.names))
    measured = figures(states, truth, places, names, zero_shot, mission, progress, continued)
    arrays = weights.astype(np.float32), bias.astype(np.float32)
    return head.Head(mission.names, *arrays, sha256_of_file(of.pair / PAIR), size, measured)


def write(of: "Run", made: head.Head) -> Path:
    """Write the head into the run's folder; returns its path."""
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
    continued: Continued | None = None,
) -> dict[str, Any]:
    """What a head on these frames is worth, each frame judged by a head that has not seen its place.

    `head`, `zero_shot` and `constant` (the commonest category): right answers with their interval over places, and the
    mean recall of the categories that occur. `repeats`: right answers in each division of the frames into folds, of
    which the median one is reported.
    `change`: from zero-shot to the head, and from the constant; paired. `curve`: frames -> mean accuracy and its 10 and
    90 % quantiles over drawn sets of that many frames. `answers`: of each frame, by a head that has not seen its place.

    With `continued`: `continued` and `head_on_its_folds` (right answers on the same division into folds), `chosen`, the
    one of the two that is right more often (the head if they are equal), and `change_of_continued`, from zero-shot, the
    constant and the head.
    """
    count = len(mission.names)
    repeats = head.out_of_fold(states, truth, count, places, SEED)
    right = (repeats.argmax(axis=2) == truth).sum(axis=1)
    # The median division: the mean of all scores would be that of ten heads, which is better than one.
    scores = repeats[int(np.argsort(right, kind="stable")[(len(right) - 1) // 2])]
    said = [mission.names[int(index)] for index in scores.argmax(axis=1)]
    constant = [mission.names[int(np.bincount(truth).argmax())]] * len(truth)
    answers: dict[str, Sequence[str | None]] = {"head": said, "zero_shot": zero_shot, "constant": constant}
    if continued:
        same = [mission.names[index] for index in head.said_out_of_fold(states, truth, count, continued.folds)]
        answers |= {"continued": continued.answers, "head_on_its_folds": same}
    of = {
        name: [
            Prediction("B", frame, mission.names[int(right)], answer, place=place)
            for frame, right, answer, place in zip(names, truth, given, places, strict=True)
        ]
        for name, given in answers.items()
    }
    more: dict[str, Any] = {}
    if continued:
        right_of = {name: sum(p.predicted == p.truth for p in of[name]) for name in ("head_on_its_folds", "continued")}
        changes = ("zero_shot", "constant", "head_on_its_folds")
        more = {
            "change_of_continued": {name: vars(compare(of[name], of["continued"])) for name in changes},
            "folds": len(continued.folds),
            "chosen": "continued" if right_of["continued"] > right_of["head_on_its_folds"] else "head",
            "answers_of_continued": dict(zip(names, continued.answers, strict=True)),
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
        "answers_of_zero_shot": dict(zip(names, zero_shot, strict=True)),
        **more,
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
