"""What a threshold can promise: with some confidence, the share of valuable frames that it drops is below a limit.

Learn-then-test (Angelopoulos and others 2021) for a loss that falls as the threshold rises: of the thresholds from the
highest down, the last one whose upper confidence bound is within the limit. No correction for several tests is needed,
because the first that fails ends the search. The promise is about frames like those of val, and about the draw of val:
of 100 missions that choose so, at 95 % confidence, at most 5 lose more than the limit.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST = 1_000_000  # places that are asked for


def losses_by_place(lost: Sequence[bool], places: Sequence[str]) -> NDArray[np.float64]:
    """The share of each place's valuable frames that is lost [places]: tiles of one place are not independent."""
    _, number = np.unique(np.asarray(places), return_inverse=True)
    return np.bincount(number, weights=np.asarray(lost, dtype=np.float64)) / np.bincount(number)


def upper_bound(losses: NDArray[np.float64], confidence: float) -> float:
    """The upper bound of the mean of independent losses from 0 to 1 [places], at this confidence.

    Exact (Clopper and Pearson) if every loss is 0 or 1; Hoeffding and Bentkus' bound for shares (Bates and others
    2021). 1 without places.
    """
    from scipy.optimize import brentq
    from scipy.stats import beta

    count, mean, risk = len(losses), float(np.mean(losses)) if len(losses) else 1.0, 1 - confidence
    if mean >= 1:
        return 1.0
    if np.isin(losses, (0.0, 1.0)).all():
        lost = round(mean * count)
        return float(beta.ppf(confidence, lost + 1, count - lost))
    if _p_of_shares(mean, count, 1 - 1e-12) > risk:
        return 1.0
    return float(brentq(lambda limit: _p_of_shares(mean, count, limit) - risk, mean, 1 - 1e-12))


def within(losses: NDArray[np.float64], limit: float, confidence: float) -> bool:
    """Whether `upper_bound` is at most `limit`, without looking for it."""
    from scipy.stats import binom

    count = len(losses)
    if not count:
        return False
    if np.isin(losses, (0.0, 1.0)).all():
        return bool(binom.cdf(round(float(losses.sum())), count, limit) <= 1 - confidence)
    mean = float(losses.mean())
    return mean <= limit and _p_of_shares(mean, count, limit) <= 1 - confidence


def _p_of_shares(mean: float, count: int, limit: float) -> float:
    """The largest probability of a mean loss this small on `count` places if the true mean is `limit`."""
    from scipy.special import rel_entr
    from scipy.stats import binom

    below = min(mean, limit)
    hoeffding = math.exp(-count * float(rel_entr(below, limit) + rel_entr(1 - below, 1 - limit)))
    return min(1.0, hoeffding, math.e * float(binom.cdf(math.ceil(count * mean - 1e-9), count, limit)))


def lowest_within(
    thresholds: Sequence[float],
    losses: Callable[[float], NDArray[np.float64]],
    limit: float,
    confidence: float,
) -> float | None:
    """The lowest of the rising `thresholds` that keeps the limit with this confidence, None if the highest does not.

    `losses` are those by place at a threshold.
    """
    chosen = None
    for threshold in reversed(thresholds):
        if not within(losses(threshold), limit, confidence):
            break
        chosen = threshold
    return chosen


def places_needed(lost: int, limit: float, confidence: float) -> int | None:
    """The fewest places that can keep the limit with this confidence if `lost` of them are lost; None above a million.

    None lost: 59 for 5 % at 95 %.
    """
    from scipy.stats import binom

    if not 0 < limit < 1:
        return None
    # Of n places, a loss of `lost` is within the limit if it is this improbable at the limit.
    low, high = lost + 1, MOST
    if binom.cdf(lost, high, limit) > 1 - confidence:
        return None
    while low < high:
        middle = (low + high) // 2
        if binom.cdf(lost, middle, limit) <= 1 - confidence:
            high = middle
        else:
            low = middle + 1
    return low


def promise(losses: NDArray[np.float64], frames: int, limit: float, confidence: float) -> dict[str, Any]:
    """What was promised and shown: `largest_loss`, `confidence`, `upper_bound`, and the val `frames` and `places`."""
    return {
        "largest_loss": limit,
        "confidence": confidence,
        "upper_bound": upper_bound(losses, confidence),
        "frames": frames,
        "places": len(losses),
    }
