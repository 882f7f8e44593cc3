"""Baselines without a language model: majority class, colour, coordinates, and vision features."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orion_triage.dataset.dataset import Dataset
from orion_triage.dataset.records import Record
from orion_triage.imagery.frames import CAMERA_SIZE
from orion_triage.mission.mission import Mission
from orion_triage.settings import Split

NEIGHBOURS = (1, 3, 5, 9, 25)
PENALTIES = (0.001, 0.01, 0.1, 1.0)
LOGISTIC_REGRESSION = "logistic regression on the base's vision features"

Vectors = NDArray[np.float64]  # one row per record, each of unit length


def baselines(dataset: Dataset, split: Split, vision: Mapping[str, Vectors] | None = None) -> dict[str, dict[str, Any]]:
    """Name -> accuracy, right, count, predictions (record name -> category), and the hyperparameter chosen on val.

    Baselines: "always CATEGORY"; "majority class", "colour k-NN" and "coordinates k-NN" of the training targets; and
    LOGISTIC_REGRESSION with `vision` (image path -> vector). k and the penalty are chosen on val, the smallest of
    equals, so the results on val are optimistic. Every target counts once. The coordinates k-NN uses only records with
    coordinates.
    """
    mission = dataset.mission
    train, val, asked = (_distinct(dataset.records(name)) for name in ("train", "val", split))
    counts = Counter(record.verdict.category for record in train)
    majority = max(mission.names, key=lambda category: counts[category])
    result = {"majority class": _score(asked, [majority] * len(asked))}
    result |= {f"always {category}": _score(asked, [category] * len(asked)) for category in mission.names}
    for name, features in (("colour k-NN", _colours), ("coordinates k-NN", _places)):
        known, tried, scored = features(dataset, train), features(dataset, val), features(dataset, asked)
        if not known.vectors.size or not tried.vectors.size or not scored.vectors.size:
            continue
        on_val = {k: _right(tried, nearest(known.vectors, known.labels, tried.vectors, k)) for k in NEIGHBOURS}
        best = max(NEIGHBOURS, key=lambda k: (on_val[k], -k))
        votes = nearest(known.vectors, known.labels, scored.vectors, best)
        result[name] = _score(scored.records, [mission.names[vote] for vote in votes]) | {
            "k": best,
            "val_accuracy": on_val[best],
        }
    if vision is not None:
        known, tried, scored = (
            _Features(r, [vision[record.image] for record in r], mission) for r in (train, val, asked)
        )
        fits = {penalty: logistic_regression(known.vectors, known.labels, penalty) for penalty in PENALTIES}
        right_on_val = {penalty: _right(tried, fit.predict(tried.vectors)) for penalty, fit in fits.items()}
        best_penalty = max(PENALTIES, key=lambda penalty: (right_on_val[penalty], penalty))
        votes = fits[best_penalty].predict(scored.vectors)
        result[LOGISTIC_REGRESSION] = _score(asked, [mission.names[vote] for vote in votes]) | {
            "penalty": best_penalty,
            "val_accuracy": right_on_val[best_penalty],
        }
    return result


def logistic_regression(vectors: Vectors, labels: NDArray[np.int64], penalty: float) -> Any:
    """A fitted multinomial logistic regression on standardized vectors; `predict` returns one label per row.

    The objective is the mean loss plus `penalty` times half the sum of squared coefficients; scikit-learn's C weights
    the summed loss instead.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    regression = LogisticRegression(C=1 / (penalty * len(vectors)), max_iter=1000)
    return make_pipeline(StandardScaler(), regression).fit(vectors, labels)


def colour_histogram(pixels: NDArray[np.uint8]) -> Vectors:
    """Square roots of the 8x8x8 RGB histogram of [height, width, 3] pixels: shape (512,), unit length."""
    red, green, blue = np.moveaxis((pixels >> 5).astype(np.int16), -1, 0)
    counts = np.bincount((red << 6 | green << 3 | blue).ravel(), minlength=512)
    return np.sqrt(counts / counts.sum())


def unit_vector(lon: float, lat: float) -> Vectors:
    """The point of a place (in degrees) on the unit sphere: shape (3,)."""
    lon, lat = np.radians(lon), np.radians(lat)
    return np.array([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)])


def nearest(known: Vectors, labels: NDArray[np.int64], asked: Vectors, k: int) -> list[int]:
    """The most frequent label of the k nearest rows in `known`, per row of `asked`; in a tie, that of the nearest.

    Rows are unit vectors, so the nearest row by Hellinger or great-circle distance has the largest dot product.
    scikit-learn's classifier resolves a tie by the order of the classes, not by distance.
    """
    order = np.argsort(-np.round(asked @ known.T, 12), axis=1, kind="stable")[:, :k]
    votes = []
    for row in labels[order]:
        counts = Counter(row.tolist())  # in order of first appearance, that is by distance
        votes.append(max(counts, key=lambda label: counts[label]))
    return votes


class _Features:
    """Records that have the feature, their vectors, and their classes as indices of the mission."""

    def __init__(self, records: Sequence[Record], vectors: Sequence[Vectors], mission: Mission) -> None:
        self.records = records
        self.vectors: Vectors = np.array(vectors, dtype=np.float64)
        self.labels = np.array([mission.names.index(record.verdict.category) for record in records], dtype=np.int64)


def _colours(dataset: Dataset, records: Sequence[Record]) -> _Features:
    images = (dataset.frame(record, CAMERA_SIZE) for record in records)
    return _Features(records, [colour_histogram(np.asarray(image)) for image in images], dataset.mission)


def _places(dataset: Dataset, records: Sequence[Record]) -> _Features:
    placed = [record for record in records if record.coordinates is not None]
    vectors = [unit_vector(r.coordinates.lon, r.coordinates.lat) for r in placed if r.coordinates]
    return _Features(placed, vectors, dataset.mission)


def _distinct(records: Sequence[Record]) -> list[Record]:
    """One record per image, by name; of a target's two training records, the one with coordinates."""
    first: dict[str, Record] = {}
    for record in sorted(records, key=lambda record: (record.name, record.coordinates is None)):
        first.setdefault(record.image, record)
    return list(first.values())


def _right(features: "_Features", votes: Sequence[int]) -> float:
    return float(np.mean(np.array(votes) == features.labels))


def _score(records: Sequence[Record], answers: Sequence[Any]) -> dict[str, Any]:
    right = sum(record.verdict.category == answer for record, answer in zip(records, answers, strict=True))
    return {
        "accuracy": right / len(records),
        "right": right,
        "count": len(records),
        "predictions": {record.name: str(answer) for record, answer in zip(records, answers, strict=True)},
    }
