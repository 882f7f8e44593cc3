"""What can be had without a language model: the majority class, colour alone, coordinates alone."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orion_triage.frames import CAMERA_SIZE, read_frame
from orion_triage.records import Record, Split, image_path, read_split
from orion_triage.triage import CATEGORIES

NEIGHBOURS = (1, 3, 5, 9, 25)


def baselines(dataset: Path, split: Split) -> dict[str, dict[str, Any]]:
    """Name -> {accuracy, k, val_accuracy}: majority class of train, colour k-NN, coordinates k-NN.

    k is chosen on val (smallest among equals), so on the val split itself these figures are optimistic.
    """
    train = [record for record in read_split(dataset, "train") if record.coordinates]
    val, asked = read_split(dataset, "val"), read_split(dataset, split)
    majority = Counter(record.verdict.category for record in train).most_common(1)[0][0]
    hits = sum(record.verdict.category == majority for record in asked)
    result: dict[str, dict[str, Any]] = {"majority class": {"accuracy": hits / len(asked), "answer": majority.value}}
    groups = (train, val, asked)
    colour = [np.stack([colour_histogram(dataset, r) for r in group]) for group in groups]
    position = [np.stack([unit_vector(r) for r in group]) for group in groups]
    labels = [np.array([CATEGORIES.index(r.verdict.category) for r in group]) for group in groups]
    # Both spaces have unit vectors: nearest in Hellinger or great-circle distance is the largest dot product.
    for name, features in (("colour k-NN", colour), ("coordinates k-NN", position)):
        on_val = {k: accuracy(features[0], labels[0], features[1], labels[1], k) for k in NEIGHBOURS}
        best = max(NEIGHBOURS, key=lambda k: (on_val[k], -k))
        result[name] = {
            "accuracy": accuracy(features[0], labels[0], features[2], labels[2], best),
            "k": best,
            "val_accuracy": on_val[best],
        }
    return result


def colour_histogram(dataset: Path, record: Record) -> NDArray[np.float64]:
    """Square roots of the 8x8x8 RGB histogram, (512,), of unit length."""
    image = read_frame(image_path(dataset, record), CAMERA_SIZE).image
    bins = (np.asarray(image) >> 5).reshape(-1, 3).astype(np.int64)
    counts = np.bincount(bins @ np.array([64, 8, 1]), minlength=512)
    return np.sqrt(counts / counts.sum())


def unit_vector(record: Record) -> NDArray[np.float64]:
    """The place on the unit sphere, (3,)."""
    assert record.coordinates is not None
    lon, lat = np.radians(record.coordinates.lon), np.radians(record.coordinates.lat)
    return np.array([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)])


def accuracy(
    known: NDArray[np.float64],
    known_labels: NDArray[np.int64],
    asked: NDArray[np.float64],
    asked_labels: NDArray[np.int64],
    k: int,
) -> float:
    """Share of `asked` whose k nearest in `known` vote for the right label; ties go to the nearer one's."""
    order = np.argsort(-(asked @ known.T), axis=1, kind="stable")[:, :k]
    votes = [_vote(known_labels[row]) for row in order]
    return float(np.mean(np.array(votes) == asked_labels))


def _vote(labels: Sequence[int] | NDArray[np.int64]) -> int:
    counts = Counter(int(label) for label in labels)
    most = max(counts.values())
    return next(int(label) for label in labels if counts[int(label)] == most)
