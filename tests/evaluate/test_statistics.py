"""evaluate/statistics.py and a histogram: published cases, scikit-learn, numpy, and what must hold on any data."""

import math
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, f1_score

from orion_triage.evaluate.baselines import colour_histogram
from orion_triage.evaluate.statistics import (
    Integers,
    balanced_accuracy,
    confusion,
    confusion_bootstrap,
    frames_to_resolve,
    geographic_block,
    holm,
    macro_f1,
    mcnemar,
    smallest_detectable_points,
    wilson,
)


def test_wilson_gives_the_published_interval() -> None:
    assert wilson(35, 60) == pytest.approx((0.457, 0.699), abs=5e-4)
    low, high = wilson(0, 20)
    assert low == 0
    assert high == pytest.approx(0.161, abs=5e-4)


@pytest.mark.parametrize(
    ("gained", "lost", "exact", "mid", "tolerance"),
    [
        (0, 3, 0.25, 0.125, 1e-12),
        (21, 26, 0.56, 0.47, 5e-3),
        (1, 7, 0.0703, 0.0391, 5e-5),  # Fagerland, Lydersen and Laake 2013, airway hyper-responsiveness
        (2, 2, 1.0, 1 - 6 / 16 / 2, 1e-12),  # their rule for an even split
        (0, 0, 1.0, 1.0, 0),
    ],
)
def test_mcnemar_gives_the_published_values_either_way(
    gained: int, lost: int, exact: float, mid: float, tolerance: float
) -> None:
    for test in (mcnemar(gained, lost), mcnemar(lost, gained)):
        assert test.exact_p == pytest.approx(exact, abs=tolerance)
        assert test.mid_p == pytest.approx(mid, abs=tolerance)


def test_mid_p_is_how_often_chance_is_more_uneven_and_half_of_as_uneven() -> None:
    for gained in range(12):
        for lost in range(12):
            differing = gained + lost
            if not differing:
                continue
            splits = [(abs(differing - 2 * k), math.comb(differing, k) / 2**differing) for k in range(differing + 1)]
            more = sum(p for uneven, p in splits if uneven > abs(gained - lost))
            equal = sum(p for uneven, p in splits if uneven == abs(gained - lost))
            assert mcnemar(gained, lost).exact_p == pytest.approx(more + equal)
            assert mcnemar(gained, lost).mid_p == pytest.approx(more + equal / 2)


def test_six_changes_the_same_way_are_the_fewest_that_count() -> None:
    assert min(flips for flips in range(20) if mcnemar(flips, 0).exact_p < 0.05) == 6
    assert smallest_detectable_points(60) == 10
    assert smallest_detectable_points(6) == 100
    assert smallest_detectable_points(5) is None


def test_holm_gives_the_values_counted_by_hand() -> None:
    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert adjusted == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert list(adjusted) == ["a", "b", "c", "d"]
    assert holm({"x": 0.7, "y": 0.6}) == {"x": 1.0, "y": 1.0}
    assert holm({}) == {}


def test_holm_lies_between_the_raw_values_and_bonferroni_and_keeps_their_order() -> None:
    generator = np.random.default_rng(0)
    for count in range(1, 9):
        raw = {str(n): float(p) for n, p in enumerate(generator.random(count) ** 3)}
        adjusted = holm(raw)
        assert all(raw[name] <= adjusted[name] <= min(1, count * raw[name]) for name in raw)
        by_raw = [adjusted[name] for name in sorted(raw, key=lambda name: raw[name])]
        assert by_raw == sorted(by_raw)


def test_frames_to_resolve_gives_the_published_number() -> None:
    # powerandsamplesize.com, McNemar's two-sided test after Connor 1987: shares 0.45 and 0.05, power 0.8.
    assert frames_to_resolve(45, 5, 100) == frames_to_resolve(5, 45, 100) == 23
    assert frames_to_resolve(45, 5, 100, power=0.9) > 23
    assert frames_to_resolve(90, 10, 200) == 23  # the same shares
    assert frames_to_resolve(45, 5, 1000) > 230
    assert frames_to_resolve(7, 7, 100) is None
    assert frames_to_resolve(0, 0, 100) is None


def test_a_split_of_the_size_named_resolves_the_difference_as_often_as_asked() -> None:
    frames = frames_to_resolve(12, 6, 100)
    assert frames is not None
    draws = np.random.default_rng(0).multinomial(frames, [0.12, 0.06, 0.82], size=20_000)
    gained, lost = draws[:, 0], draws[:, 1]
    resolved = np.abs(gained - lost) / np.sqrt(gained + lost) > 1.959964
    assert resolved.mean() == pytest.approx(0.8, abs=0.02)


@pytest.mark.parametrize(
    ("lon", "lat", "name"),
    [
        (13.4, 52.5, "lon 10, lat 50"),
        (-0.1, -0.1, "lon -10, lat -10"),
        (10.0, 50.0, "lon 10, lat 50"),
        (180.0, 90.0, "lon -180, lat 80"),
        (-180.0, -90.0, "lon -180, lat -90"),
        (179.99, 89.99, "lon 170, lat 80"),
    ],
)
def test_a_place_is_in_the_cell_of_its_south_west_corner(lon: float, lat: float, name: str) -> None:
    assert geographic_block(lon, lat) == name


def test_cells_of_another_size() -> None:
    assert geographic_block(13.4, 52.5, degrees=2.5) == "lon 12.5, lat 52.5"
    assert geographic_block(0, 90, degrees=50) == geographic_block(0, 61, degrees=50) == "lon -30, lat 60"


def cluster_bootstrap(
    statistic: Callable[[Integers], float], clusters: Sequence[str], *, seed: int, resamples: int = 2000
) -> tuple[float, float]:
    """`confusion_bootstrap` as the textbook has it, of any statistic: the 95 % percentile interval over clusters.

    `clusters` has one label per row, such as geographic_block. Each resample draws as many whole clusters as there are,
    with replacement; `statistic` gets the indices of their rows. Resamples with a result of NaN are ignored; the
    interval is (NaN, NaN) if none remains. With few clusters, the interval is too narrow; with one, both its ends are
    the estimate. The result depends on the seed and the clusters, not on the order of the rows.
    """
    members: dict[str, list[int]] = {}
    for row, label in enumerate(clusters):
        members.setdefault(label, []).append(row)
    groups = [np.array(members[label], dtype=np.int64) for label in sorted(members)]
    if not groups:
        return math.nan, math.nan
    generator = np.random.default_rng(seed)
    draws = (generator.integers(len(groups), size=len(groups)) for _ in range(resamples))
    found = [statistic(np.concatenate([groups[index] for index in draw])) for draw in draws]
    kept = [value for value in found if not math.isnan(value)]
    if not kept:
        return math.nan, math.nan
    low, high = np.percentile(kept, [2.5, 97.5])
    return float(low), float(high)


VALUES = np.random.default_rng(5).normal(size=200)


def test_the_bootstrap_of_single_frames_is_as_wide_as_the_textbook_says() -> None:
    low, high = cluster_bootstrap(lambda rows: VALUES[rows].mean(), [f"{n:03}" for n in range(200)], seed=0)
    assert low < VALUES.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * VALUES.std() / math.sqrt(200), rel=0.06)


def test_copies_in_a_cluster_widen_the_interval_as_if_there_were_one_frame() -> None:
    copies = np.repeat(VALUES[:50], 4)
    together = cluster_bootstrap(lambda rows: copies[rows].mean(), [str(n // 4) for n in range(200)], seed=0)
    apart = cluster_bootstrap(lambda rows: copies[rows].mean(), [str(n) for n in range(200)], seed=0)
    assert together[0] < copies.mean() < together[1]
    assert (together[1] - together[0]) / (apart[1] - apart[0]) == pytest.approx(2, rel=0.1)


def test_the_bootstrap_depends_on_the_seed_and_not_on_the_order_of_rows() -> None:
    labels = [str(n % 17) for n in range(200)]
    order = np.random.default_rng(1).permutation(200)
    interval = cluster_bootstrap(lambda rows: VALUES[rows].mean(), labels, seed=3)
    assert cluster_bootstrap(lambda rows: VALUES[rows].mean(), labels, seed=3) == interval
    assert cluster_bootstrap(lambda rows: VALUES[rows].mean(), labels, seed=4) != interval
    shuffled = cluster_bootstrap(lambda rows: VALUES[order][rows].mean(), [labels[n] for n in order], seed=3)
    assert shuffled == pytest.approx(interval, abs=1e-12)


def test_whole_clusters_are_drawn_as_many_as_there_are() -> None:
    labels = ["a", "b", "b", "c", "c", "c"]
    seen: list[list[int]] = []

    def note(rows: np.ndarray) -> float:
        seen.append(sorted(rows.tolist()))
        return float(len(rows))

    cluster_bootstrap(note, labels, seed=0, resamples=400)
    assert len(seen) == 400
    for rows in seen:
        times = [rows.count(0), rows.count(1), rows.count(3)]
        assert sum(times) == 3
        assert rows == sorted([0] * times[0] + [1, 2] * times[1] + [3, 4, 5] * times[2])
    assert len({tuple(rows) for rows in seen}) == 10  # every multiset of three of three


def test_undefined_resamples_are_left_out() -> None:
    labels = ["a", "b"]

    def only_with_a(rows: np.ndarray) -> float:
        return 1.0 if 0 in rows else math.nan

    assert cluster_bootstrap(only_with_a, labels, seed=0) == (1.0, 1.0)
    assert all(math.isnan(end) for end in cluster_bootstrap(lambda rows: math.nan, labels, seed=0))
    assert all(math.isnan(end) for end in cluster_bootstrap(lambda rows: 1.0, [], seed=0))


def test_the_confusion_counts_every_frame_once() -> None:
    counts = confusion(np.array([0, 0, 1, 2, 2]), np.array([0, -1, 2, 2, 2]), 3)
    assert counts.tolist() == [[1, 0, 0, 1], [0, 0, 1, 0], [0, 0, 2, 0]]


@pytest.mark.parametrize("truths", [(0, 1, 2), (0, 2), (1,)])
@pytest.mark.parametrize("guesses", [(0, 1, 2), (-1, 0, 1, 2), (2,), (-1,)])
def test_rates_are_those_of_scikit_learn(truths: tuple[int, ...], guesses: tuple[int, ...]) -> None:
    generator = np.random.default_rng(2)
    truth, guess = generator.choice(truths, 50), generator.choice(guesses, 50)
    there = [label for label in range(3) if label in truth or label in guess]
    counts = confusion(truth, guess, 3)
    assert macro_f1(counts) == pytest.approx(f1_score(truth, guess, labels=there, average="macro"))
    with warnings.catch_warnings(action="ignore"):  # answers that are no truth's
        assert balanced_accuracy(counts) == pytest.approx(balanced_accuracy_score(truth, guess))


def test_rates_without_frames_are_undefined() -> None:
    nothing = np.array([], dtype=np.int64)
    assert math.isnan(macro_f1(confusion(nothing, nothing, 3)))
    assert math.isnan(balanced_accuracy(confusion(nothing, nothing, 3)))


@pytest.mark.parametrize("statistic", [macro_f1, balanced_accuracy])
@pytest.mark.parametrize("count", [1, 7, 60])
def test_all_resamples_at_once_are_those_one_by_one(statistic: Callable[..., np.ndarray], count: int) -> None:
    generator = np.random.default_rng(count)
    truth, guess = generator.integers(0, 3, count), generator.integers(-1, 3, count)
    clusters = [f"block {n}" for n in generator.integers(0, 20, count)]
    one_by_one = cluster_bootstrap(
        lambda rows: float(statistic(confusion(truth[rows], guess[rows], 3))), clusters, seed=42
    )
    assert confusion_bootstrap(statistic, truth, guess, 3, clusters, seed=42) == one_by_one
    nothing = np.array([], dtype=np.int64)
    assert all(math.isnan(end) for end in confusion_bootstrap(statistic, nothing, nothing, 3, [], seed=42))


def test_the_histogram_of_colours_has_each_pixel_in_its_bin() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    counts, _ = np.histogramdd(pixels.reshape(-1, 3), bins=8, range=[(0, 256)] * 3)
    assert colour_histogram(pixels) ** 2 * 1200 == pytest.approx(counts.ravel(), abs=1e-9)
