"""A head: logistic regression on what the flight pair sees in a frame's quarters; the model stays as it is.

A quarter of the camera's frame, at the model's size, gives the last hidden state after the image, by llama.cpp on the
pair that flies (`--embedding --pooling last`). Mean and spread of the four describe the frame: what is there, and how
much its parts differ. They do not depend on what stands after the image, so coordinates change no answer. A head is
some kilobytes: the smallest change of what a model makes of what it sees.
"""

import base64
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from orion_triage.errors import OrionError
from orion_triage.evaluate.statistics import Integers
from orion_triage.export.quantize import PAIR
from orion_triage.llama_cpp.server import OPTIONS, Server
from orion_triage.mission.answer import Answer
from orion_triage.mission.mission import Mission
from orion_triage.mission.prompt import user_text
from orion_triage.mission.verdict import category_alone, require_category_alone
from orion_triage.progress import Progress
from orion_triage.safe.files import sha256_of_file, write_text
from orion_triage.safe.reading import read_object

if TYPE_CHECKING:
    from PIL import Image

    from orion_triage.evaluate.metrics import Prediction
    from orion_triage.llama_cpp.client import Client
    from orion_triage.runs.run import Run

Floats = NDArray[np.float64]
FILE_NAME = "head.json"  # in the run's folder
# Of the server, which otherwise refuses to give hidden states. Only the last chunk's tokens are pooled, so "last" is
# right and a mean would not be the image's.
EMBEDDING = (*OPTIONS, "--embedding", "--pooling", "last")
# scikit-learn's C times the width of a description. Chosen once, on 25 real frames: a cross-validation over so few
# frames picks another value for each fold, and loses 2 to 4 of them that a fixed one gets (docs/log.md).
PENALTY = 1.0
_FOLDS, _REPEATS = 5, 10


@dataclass(frozen=True)
class Head:
    """`weights` [K, width] and `bias` [K]: logits are weights @ description + bias, of the pair with this hash."""

    categories: tuple[str, ...]
    weights: NDArray[np.float32]
    bias: NDArray[np.float32]
    pair_sha256: str
    frame_size: int
    figures: dict[str, Any]

    def scores(self, states: Floats) -> Floats:
        """The probabilities [frames, K] of descriptions [frames, width]."""
        return softmax(states @ self.weights.T.astype(np.float64) + self.bias)


def softmax(logits: Floats) -> Floats:
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True))


def fit(states: Floats, truth: Integers, categories: int) -> tuple[Floats, Floats]:
    """(Weights [K, width], bias [K]) for descriptions as they are: standardization is folded in.

    Categories without a frame get the bias of the rarest one, less what a whole frame is worth: they are possible, and
    nothing is known of them. With frames of a single category, the head always answers it.
    """
    from sklearn.linear_model import LogisticRegression

    mean, spread = states.mean(axis=0), states.std(axis=0)
    spread = np.where(spread > 1e-6 * max(1e-12, float(spread.max())), spread, np.inf)  # a constant says nothing
    seen = np.unique(truth)
    weights, bias = np.zeros((categories, states.shape[1])), np.zeros(categories)
    if len(seen) > 1:
        model = LogisticRegression(C=PENALTY / states.shape[1], max_iter=2000)
        model.fit((states - mean) / spread, truth)
        own, offset = model.coef_, model.intercept_
        if len(seen) == 2:  # one row: of the second category against the first
            own, offset = np.vstack([-own / 2, own / 2]), np.array([-offset[0] / 2, offset[0] / 2])
        weights[seen], bias[seen] = own / spread, offset - (own / spread) @ mean
    typical = weights[seen] @ mean + bias[seen]
    unseen = np.setdiff1d(np.arange(categories), seen)
    bias[unseen] = typical.min() - np.log(2 * len(truth) / max(1, np.bincount(truth)[seen].min()))
    return weights, bias


def log_loss(scores: Floats, truth: Integers) -> float:
    return float(-np.log(np.maximum(scores[np.arange(len(truth)), truth], 1e-9)).mean())


def out_of_fold(states: Floats, truth: Integers, categories: int, groups: Sequence[str], seed: int) -> Floats:
    """The scores [repeats, frames, K] of each frame by heads that have not seen its place, one a repeat.

    One division of 24 frames into five parts is right on 16 to 19 of them by chance, hence several.
    """
    scores = np.zeros((_REPEATS, len(truth), categories))
    for repeat in range(_REPEATS):
        for held_out in folds(truth, groups, seed + repeat):
            kept = np.setdiff1d(np.arange(len(truth)), held_out)
            weights, bias = fit(states[kept], truth[kept], categories)
            scores[repeat, held_out] = softmax(states[held_out] @ weights.T + bias)
    return scores


def said_out_of_fold(states: Floats, truth: Integers, categories: int, held_out: Sequence[Integers]) -> list[int]:
    """The answer [frames] about each frame by the head on all frames that are not in its fold."""
    answers = np.zeros(len(truth), dtype=np.int64)
    for fold in held_out:
        kept = np.setdiff1d(np.arange(len(truth)), fold)
        weights, bias = fit(states[kept], truth[kept], categories)
        answers[fold] = (states[fold] @ weights.T + bias).argmax(axis=1)
    return [int(answer) for answer in answers]


def folds(truth: Integers, groups: Sequence[str], seed: int, count: int = _FOLDS) -> list[Integers]:
    """The frames of each fold, whole places, with about the same share of each category; fewer folds for few places."""
    import warnings

    from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

    places = len(set(groups))
    if places < 2:
        raise OrionError("all labelled frames are of one place.", "Add frames of other places.")
    most = min(count, places, int(np.bincount(truth).max()))
    # With no category twice there is nothing to spread evenly.
    split = StratifiedGroupKFold(most, shuffle=True, random_state=seed) if most > 1 else GroupKFold(min(count, places))
    with warnings.catch_warnings():  # a category with fewer frames than folds is in some of them only
        warnings.simplefilter("ignore", UserWarning)
        return [test for _, test in split.split(np.zeros(len(truth)), truth, groups)]


def path_in(folder: Path) -> Path:
    """The head's file in a run's folder; raises OrionError if there is none."""
    if not (folder / FILE_NAME).is_file():
        raise OrionError(f"{folder / FILE_NAME} does not exist.", "Run 'orion adapt FOLDER' first.")
    return folder / FILE_NAME


def write(folder: Path, head: Head) -> Path:
    """Write head.json, whole or not at all; returns its path."""
    value = asdict(head) | {
        "weights": base64.b64encode(head.weights.astype("<f4").tobytes()).decode(),
        "bias": [float(value) for value in head.bias],
        "width": head.weights.shape[1],
    }
    write_text(folder / FILE_NAME, json.dumps(value, indent=1) + "\n")
    return folder / FILE_NAME


def read(folder: Path, mission: Mission, pair: Path, frame_size: int) -> Head:
    """The head of a run; raises OrionError if there is none, it is damaged, or it is of another pair or mission."""
    path = folder / FILE_NAME
    try:
        value = read_object(path)
        categories, width, size = tuple(value["categories"]), value["width"], value["frame_size"]
        if type(width) is not int or width < 1 or type(size) is not int:
            raise ValueError("width and frame_size should be whole numbers")
        raw = base64.b64decode(value["weights"], validate=True)
        weights = np.frombuffer(raw, dtype="<f4").reshape(len(categories), width)
        with np.errstate(over="ignore"):  # what overflows is not finite, which is asked below
            bias = np.array(value["bias"], dtype=np.float32).reshape(len(categories))
        head = Head(categories, weights, bias, str(value["pair_sha256"]), size, dict(value["figures"]))
        if not np.isfinite(weights).all() or not np.isfinite(bias).all():
            raise ValueError("a weight is not finite")
    except FileNotFoundError:
        raise OrionError(f"{path} does not exist.", "Run 'orion adapt FOLDER' first.") from None
    except OrionError as error:
        raise OrionError(error.message, "Run 'orion adapt FOLDER' again.") from None
    except (KeyError, TypeError, ValueError) as error:
        raise OrionError(f"{path} is damaged: {error!r}.", "Run 'orion adapt FOLDER' again.") from None
    now = (mission.names, sha256_of_file(pair / PAIR), frame_size)
    if (head.categories, head.pair_sha256, head.frame_size) != now:
        raise OrionError(
            f"{path} was fitted on another pair, frame size or mission.", "Run 'orion adapt FOLDER' again."
        )
    return head


def predictions_of(run: "Run") -> "list[Prediction]":
    """The answers of heads that have not seen a frame's place to the labelled frames.

    Raises OrionError as `read`, and for a head of an earlier version, which has no such answers.
    """
    from orion_triage.evaluate.metrics import Prediction

    mission, path = run.settings.mission, run.folder / FILE_NAME
    figures = read(run.folder, mission, run.gguf, run.settings.base.frame_size).figures
    try:
        found = []
        for name, answer in figures["answers"].items():
            scores = tuple(map(float, answer["scores"]))
            if (
                len(scores) != len(mission.names)
                or not np.isfinite(scores).all()
                or answer["truth"] not in mission.names
            ):
                raise ValueError(f"the answer to {name!r} is not of this mission")
            said = mission.names[int(np.argmax(scores))]
            found.append(Prediction("B", name, answer["truth"], said, scores=scores, place=str(answer["place"])))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise OrionError(
            f"{path} does not say what heads answer to frames that they have not seen: {error!r}.",
            "Run 'orion adapt FOLDER' again.",
        ) from None
    return found


@contextmanager
def serving(pair: Path, log: Path, progress: Progress, threads: int | None = None) -> "Iterator[Server]":
    """A server that gives hidden states of this pair."""
    from orion_triage.export import quantize
    from orion_triage.llama_cpp.toolchain import find_toolchain
    from orion_triage.models.family import turn_of

    backbone, mmproj = quantize.find_pair(pair)
    toolchain = find_toolchain(progress)
    with Server(
        toolchain, backbone, mmproj, log=log, turn=turn_of(backbone), threads=threads, options=EMBEDDING
    ) as server:
        yield server


class HeadBackend:
    """The category from a head, without a reason, over a server of `serving`; images are frames of the camera's size.

    Raises OrionError for a mission whose fields must have a value.
    """

    batch_size = 1

    def __init__(self, client: "Client", mission: Mission, head: Head) -> None:
        require_category_alone(mission)
        self._client, self._mission, self._head = client, mission, head
        self._last: tuple[Image.Image, Answer] | None = None  # one answer serves all prompts about an image

    def answer(self, images: "Sequence[Image.Image]", user_texts: Sequence[str]) -> list[Answer]:
        return [self._answer(image) for image in images]

    def _answer(self, image: "Image.Image") -> Answer:
        if self._last is None or self._last[0] is not image:
            described = description(self._client, user_text(self._mission, None), image, self._head.frame_size)
            (scores,) = self._head.scores(described[None])
            category = self._mission.names[int(np.argmax(scores))]
            self._last = image, Answer(category_alone(self._mission, category), tuple(map(float, scores)), 1.0)
        return self._last[1]


def description(client: "Client", user_text: str, image: "Image.Image", size: int) -> Floats:
    """Mean and spread [2 * width] of the states of the four quarters of a frame of the camera's size.

    Quarters have the camera's full resolution, which a whole frame at a model's size of 256 pixels has not.
    """
    states = np.stack([state_of(client, user_text, quarter) for quarter in quarters(image, size)])
    return np.concatenate([states.mean(axis=0), states.std(axis=0)])


def quarters(image: "Image.Image", size: int) -> "list[Image.Image]":
    """The four quarters of a frame, each of `size` x `size` pixels: the model's."""
    from PIL import Image

    half = image.width // 2
    corners = [(left, top) for top in (0, half) for left in (0, half)]
    cut = [image.crop((left, top, left + half, top + half)) for left, top in corners]
    return [one if one.width == size else one.resize((size, size), Image.Resampling.BOX) for one in cut]


def state_of(client: "Client", user_text: str, image: "Image.Image") -> Floats:
    """The state [width] after a frame of the model's size; `user_text` is the turn, of which the rest is not read."""
    from orion_triage.imagery.frames import Frame

    return np.array(client.hidden_state(user_text, Frame(image, image.size).png()), dtype=np.float64)
