"""Intervals and tests of frames that are not independent: tiles of one place are alike; pure functions.

A cluster is a place, or a block of 10 degrees (`geographic_block`). Arrays share one order of frames; `clusters` has
one label per frame. With one frame in each cluster, all results are those of independent frames.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from orion_triage.evaluate.statistics import McNemar, difference_interval, wilson_of_share

# Clusters of equal values at either end that are added, a quarter of one each, before the similarity within clusters is
# estimated. With none, an interval misses 14 % of the time where a single cluster has errors; with a tenth 8 %, with a
# quarter 5 %, with a half 5 % but 1 to 2 % where frames are independent (benchmarks/simulate.py).
_ADDED = 0.25


def place_label(lon: float, lat: float) -> str:
    """The label of a place."""
    return f"{lon} {lat}"


def effective_frames(values: ArrayLike, clusters: Sequence[str], extremes: tuple[float, float] = (0.0, 1.0)) -> float:
    """The number of independent frames that would say as much about the mean of `values` [frames], at least one frame.

    Frames divided by Kish's design effect 1 + (m - 1) r: m is the mean size of a frame's cluster, and r the correlation
    within clusters by one-way analysis of variance, between 0 and 1. `extremes` are the smallest and the largest
    possible value. If all values are equal, a cluster counts as one frame.
    """
    x = np.asarray(values, dtype=np.float64)
    _, number = np.unique(np.asarray(clusters), return_inverse=True)
    sizes = np.bincount(number).astype(np.float64)
    total, count = len(x), len(sizes)
    if count in (1, total):
        return float(count)
    means = np.bincount(number, weights=x) / sizes
    within = float(np.sum((x - means[number]) ** 2))
    own_size = float(np.sum(sizes**2)) / total
    # One row per cluster and one for each end, with the size of a mean cluster.
    weights = np.append(np.ones(count), [_ADDED, _ADDED])
    sizes, means = np.append(sizes, [total / count] * 2), np.append(means, extremes)
    frames, groups = float(np.sum(weights * sizes)), float(np.sum(weights))
    centre = float(np.sum(weights * sizes * means)) / frames
    between = float(np.sum(weights * sizes * (means - centre) ** 2)) / (groups - 1)
    within /= float(np.sum(weights * (sizes - 1)))
    size = (frames - float(np.sum(weights * sizes**2)) / frames) / (groups - 1)
    alike = (between - within) / (between + (size - 1) * within)
    return total / (1 + (own_size - 1) * min(1.0, max(0.0, alike)))


def rate(hits: NDArray[np.bool_], clusters: Sequence[str]) -> dict[str, Any]:
    """{count, total, rate, low, high} of a share of frames: Wilson's 95 % interval at the effective number of frames.

    The rate and its ends are None without frames.
    """
    count, total = int(hits.sum()), len(hits)
    if not total:
        return {"count": 0, "total": 0, "rate": None, "low": None, "high": None}
    low, high = rate_interval(hits, clusters)
    return {"count": count, "total": total, "rate": count / total, "low": low, "high": high}


def rate_interval(hits: NDArray[np.bool_], clusters: Sequence[str]) -> tuple[float, float]:
    """The interval of `rate`, of at least one frame."""
    return wilson_of_share(int(hits.sum()) / len(hits), effective_frames(hits, clusters))


def paired_test(differences: ArrayLike, clusters: Sequence[str]) -> McNemar:
    """P-values of `differences` [frames], 1 gained, -1 lost, 0 alike: McNemar's test over clusters, two-sided.

    If two models are equally good, each cluster's sum could as well have the other sign: the p-value is the share of
    all sign patterns with a total at least this far from 0, counted exactly. With one frame in each cluster, it is
    McNemar's exact test. Mid-p counts totals as far by half.
    """
    d = np.asarray(differences, dtype=np.int64)
    _, number = np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.bincount(number, weights=d).astype(np.int64) if len(d) else d
    steps, seen = np.abs(sums[sums != 0]), abs(int(sums.sum()))
    share = np.ones(1)  # of totals -reach, -reach + 2, ... reach: each cluster moves up or down by its step
    for step in steps:
        up, down = np.pad(share, (int(step), 0)), np.pad(share, (0, int(step)))
        share = (up + down) / 2
    if not len(steps):
        return McNemar(1.0, 1.0)
    totals = np.abs(2 * np.arange(len(share)) - int(steps.sum()))
    equal, further = float(share[totals == seen].sum()), float(share[totals > seen].sum())
    return McNemar(min(1.0, further + equal), further + equal / 2)


def paired_interval(differences: ArrayLike, clusters: Sequence[str]) -> tuple[float, float]:
    """The 95 % interval of the mean of `differences` [frames] (see `paired_test`) at the effective number of frames."""
    d = np.asarray(differences, dtype=np.int64)
    kept = effective_frames(d, clusters, (-1.0, 1.0)) / len(d)
    return difference_interval(kept * int(np.sum(d > 0)), kept * int(np.sum(d < 0)), kept * len(d))
