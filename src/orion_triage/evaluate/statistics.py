"""Statistics: intervals, tests of paired answers, statistical power, rates over K categories; pure functions.

Answers are integer arrays [frames]: the index of the category in the mission, or NO_VERDICT.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]

NO_VERDICT = -1  # as an index, the last column of the confusion matrix
_FEWEST_FRAMES = 6  # 2 * 0.5**6 = 0.03 < 0.05 < 2 * 0.5**5


def wilson(successes: int, total: int) -> tuple[float, float]:
    """The 95 % Wilson interval of a rate; `total` is at least 1."""
    return wilson_of_share(successes / total, total)


def wilson_of_share(share: float, frames: float) -> tuple[float, float]:
    """The same for a share of `frames` above 0, which need not be whole: an effective number of frames.

    SciPy's binomtest, which has the same formula, takes whole numbers only.
    """
    from scipy.special import ndtri

    z = float(ndtri(0.975))
    scale = 2 * (frames + z**2)
    centre = (2 * frames * share + z**2) / scale
    margin = z / scale * math.sqrt(4 * frames * share * (1 - share) + z**2)
    return 0.0 if share == 0 else centre - margin, 1.0 if share == 1 else centre + margin


@dataclass(frozen=True)
class McNemar:
    """Two-sided p-values of a paired comparison."""

    exact_p: float
    mid_p: float


def mcnemar(gained: int, lost: int) -> McNemar:
    """McNemar's p-values: the probability of a split of the differing frames at least this uneven between equal models.

    The exact test never exceeds its nominal error rate, and is far below it on few frames. Mid-p counts splits as
    uneven as the observed one by half, which is closer to the nominal 5 % (Fagerland, Lydersen and Laake 2013). Both
    are 1 if no frame differs.
    """
    from scipy.stats import binom, binomtest

    differing = gained + lost
    if not differing:
        return McNemar(1.0, 1.0)
    exact = float(binomtest(gained, differing).pvalue)
    seen = float(binom.pmf(gained, differing, 0.5))
    # The mirrored split is as likely and as uneven, so half of both is one of them; an even split is its own mirror.
    return McNemar(exact, exact - (seen / 2 if gained == lost else seen))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Name -> p-value adjusted for the number of tests (Holm 1979), in the given order.

    With a level of 0.05, at most 5 % of families of tests have a false positive, whatever the number of tests.
    """
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def difference_interval(gained: float, lost: float, total: float) -> tuple[float, float]:
    """The 95 % interval of a paired difference of two shares, (gained - lost) / total; `total` is above 0.

    Wald's interval with one frame added to each way of differing (Bonett and Price 2012), which keeps its level on few
    frames, also if all frames differ in one way or none does.
    """
    from scipy.stats import norm

    up, down = (gained + 1) / (total + 2), (lost + 1) / (total + 2)
    margin = float(norm.ppf(0.975)) * math.sqrt((up + down - (up - down) ** 2) / (total + 2))
    return max(-1.0, up - down - margin), min(1.0, up - down + margin)


def frames_to_resolve(gained: float, lost: float, total: float, power: float = 0.8) -> int | None:
    """The number of frames at which McNemar's test finds the difference observed on `total` (p < 0.05, two-sided).

    `power` is the probability that it does. The observed shares are used as the true ones (Connor 1987). They are as
    uncertain as the difference itself, so the result is an order of magnitude. None if gained == lost.
    """
    from scipy.stats import norm

    if gained == lost:
        return None
    differing, difference = (gained + lost) / total, (gained - lost) / total
    by_chance = norm.ppf(0.975) * math.sqrt(differing)
    by_size = norm.ppf(power) * math.sqrt(differing - difference**2)
    return math.ceil(((by_chance + by_size) / difference) ** 2)


def smallest_detectable_points(count: int) -> float | None:
    """The smallest significant difference of accuracy on `count` frames by McNemar's test (p < 0.05).

    In percentage points, for the best case that all changed frames changed in the same direction: six frames. Models
    that also differ in the other direction need more. None if `count` is below six.
    """
    return 100 * _FEWEST_FRAMES / count if count >= _FEWEST_FRAMES else None


def geographic_block(lon: float, lat: float, degrees: float = 10.0) -> str:
    """The name of the place's cell: its south-west corner. Cells have `degrees` in both directions from 180 W, 90 S.

    180 E counts as 180 W, and the north pole belongs to the northernmost cells.
    """
    west = (lon + 180) % 360 // degrees * degrees - 180
    south = min((lat + 90) // degrees, math.ceil(180 / degrees) - 1) * degrees - 90
    return f"lon {west:g}, lat {south:g}"


def confusion_bootstrap(
    statistic: Callable[[Integers], NDArray[np.float64]],
    truth: Integers,
    guess: Integers,
    categories: int,
    clusters: Sequence[str],
    *,
    seed: int,
    resamples: int = 2000,
) -> tuple[float, float]:
    """The 95 % percentile interval of a statistic of confusion matrices [resamples, K, K + 1] by a bootstrap.

    `clusters` has one label per frame, such as geographic_block. Each resample draws as many whole clusters as there
    are, with replacement. Resamples with a result of NaN are ignored; the interval is (NaN, NaN) if none remains. With
    few clusters, the interval is too narrow; with one, both its ends are the estimate. The result depends on the seed
    and the clusters, not on the order of the frames. All resamples are counted at once: 0.01 s for 60 frames, and 0.5 s
    with one call of a statistic each.
    """
    names = sorted(set(clusters))
    if not names:
        return math.nan, math.nan
    number = {name: index for index, name in enumerate(names)}
    shape = categories, categories + 1
    of_cluster = np.zeros((len(names), *shape), dtype=np.int64)
    np.add.at(of_cluster, (np.array([number[name] for name in clusters]), truth, guess), 1)
    counts = _times_drawn(len(names), resamples, seed) @ of_cluster.reshape(len(names), -1)
    found = statistic(counts.astype(np.int64).reshape(resamples, *shape))
    kept = found[~np.isnan(found)]
    if not len(kept):
        return math.nan, math.nan
    low, high = np.percentile(kept, [2.5, 97.5])
    return float(low), float(high)


@lru_cache(maxsize=4)  # a report asks for the same draws of each model, condition and statistic: half of its time
def _times_drawn(clusters: int, resamples: int, seed: int) -> NDArray[np.float64]:
    """How often each resample has each cluster [resamples, clusters]; nobody changes it.

    As float64, which is exact for counts and ten times as fast as numpy's product of integers.
    """
    draws = np.random.default_rng(seed).integers(clusters, size=(resamples, clusters))
    of_resample = draws + clusters * np.arange(resamples)[:, None]  # a number for each resample and cluster
    times = np.bincount(of_resample.ravel(), minlength=resamples * clusters).reshape(resamples, -1)
    return times.astype(np.float64)


def confusion(truth: Integers, guess: Integers, categories: int) -> Integers:
    """The confusion matrix [K, K + 1]: rows are truths, columns answers, in the mission's order; last no verdict."""
    counts = np.zeros((categories, categories + 1), dtype=np.int64)
    np.add.at(counts, (truth, guess), 1)
    return counts


def macro_f1(counts: Integers) -> NDArray[np.float64]:
    """The mean F1 of the classes that occur as truth or answer, of confusions [..., K, K + 1]; NaN without frames.

    An answer without a verdict is a miss of its frame's class, not a separate class. Checked against scikit-learn,
    which takes 4 ms for one matrix.
    """
    both = counts.sum(axis=-1) + counts.sum(axis=-2)[..., :-1]
    return _mean_share(2 * _right(counts), both)


def balanced_accuracy(counts: Integers) -> NDArray[np.float64]:
    """The mean recall of the classes that occur as truth, of confusion matrices [..., K, K + 1]; NaN without frames.

    No verdict counts as a miss.
    """
    return _mean_share(_right(counts), counts.sum(axis=-1))


def _right(counts: Integers) -> Integers:
    return np.diagonal(counts, axis1=-2, axis2=-1)


def _mean_share(part: Integers, whole: Integers) -> NDArray[np.float64]:
    """The mean of part / whole over the last axis, without the places where `whole` is 0; NaN if that is everywhere."""
    there = whole > 0
    shares = np.divide(part, whole, out=np.zeros(whole.shape), where=there)
    number = there.sum(axis=-1)
    return np.divide(shares.sum(axis=-1), number, out=np.full(number.shape, np.nan), where=number > 0)
