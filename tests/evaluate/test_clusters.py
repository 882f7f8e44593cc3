"""Intervals and paired tests over places: tiles of one place are alike."""

import itertools

import numpy as np
import pytest
from scipy.stats import permutation_test

from orion_triage.evaluate import clusters
from orion_triage.evaluate.metrics import Prediction, change_of, compare
from orion_triage.evaluate.run import predictions_of
from orion_triage.evaluate.statistics import difference_interval, mcnemar, wilson
from orion_triage.mission.mission import default_mission


def labels(places: int, tiles: int) -> list[str]:
    return [str(place) for place in range(places) for _ in range(tiles)]


def drawn(
    generator: np.random.Generator, values: list[int], shares: list[float], places: int, tiles: int, alike: float
) -> np.ndarray:
    """Values [places * tiles] with these shares, and this correlation within a place."""
    of_place = generator.choice(values, size=(places, 1), p=shares)
    own = generator.choice(values, size=(places, tiles), p=shares)
    return np.where(generator.random((places, tiles)) < np.sqrt(alike), of_place, own).ravel()


def test_one_frame_a_place_is_independent_frames() -> None:
    hits = np.array([True] * 35 + [False] * 25)
    apart = labels(60, 1)
    assert clusters.effective_frames(hits, apart) == 60
    assert clusters.rate_interval(hits, apart) == wilson(35, 60)
    for gained, lost in ((5, 1), (3, 3), (0, 0), (6, 0), (10, 2)):
        changes = [1] * gained + [-1] * lost + [0] * 20
        apart = labels(len(changes), 1)
        found, expected = clusters.paired_test(changes, apart), mcnemar(gained, lost)
        assert (found.exact_p, found.mid_p) == pytest.approx((expected.exact_p, expected.mid_p))
        assert clusters.paired_interval(changes, apart) == difference_interval(gained, lost, len(changes))


def test_copies_of_a_frame_add_nothing() -> None:
    """Five equal tiles of each place are nearly as few frames as the places, and all of them if nothing is wrong."""
    hits = np.repeat(np.array([True] * 14 + [False] * 6), 5)
    assert clusters.effective_frames(hits, labels(20, 5)) == pytest.approx(20)
    right = np.ones(100, dtype=bool)
    assert clusters.effective_frames(right, labels(20, 5)) == pytest.approx(20)
    low, high = clusters.rate_interval(right, labels(20, 5))
    assert (low, high) == pytest.approx(wilson(20, 20))
    assert high == 1
    lost, nothing = clusters.rate_interval(~right, labels(20, 5)), wilson(0, 20)
    assert lost == pytest.approx(nothing)
    assert clusters.effective_frames(hits, ["one place"] * 100) == pytest.approx(1)
    gained = np.repeat([1, 1, 1, 1, 1, 1, 0, 0, 0, 0], 5)
    assert clusters.paired_test(gained, labels(10, 5)).exact_p == pytest.approx(mcnemar(6, 0).exact_p)


def test_an_empty_rate_is_undefined_and_order_does_not_matter() -> None:
    empty = clusters.rate(np.zeros(0, dtype=bool), [])
    assert empty == {"count": 0, "total": 0, "rate": None, "low": None, "high": None}
    generator = np.random.default_rng(0)
    hits, places = generator.random(100) < 0.8, labels(20, 5)
    order = generator.permutation(100)
    assert clusters.rate_interval(hits[order], [places[n] for n in order]) == pytest.approx(
        clusters.rate_interval(hits, places)
    )


def test_the_paired_test_is_scipys_permutation_test() -> None:
    """SciPy flips the sign of each cluster's sum in all ways, too."""
    generator = np.random.default_rng(1)
    for _ in range(5):
        changes = drawn(generator, [1, -1, 0], [0.2, 0.1, 0.7], 10, 4, 0.5)
        sums = changes.reshape(10, 4).sum(axis=1)
        expected = permutation_test(
            (sums, np.zeros(10)), lambda a, b, axis: np.sum(a - b, axis=axis), permutation_type="samples",
            vectorized=True, n_resamples=np.inf,
        )  # fmt: skip
        assert clusters.paired_test(changes, labels(10, 4)).exact_p == pytest.approx(expected.pvalue)


CASES = [(1, 0.0), (5, 0.0), (5, 0.5), (5, 0.8)]


@pytest.mark.slow
@pytest.mark.parametrize(("tiles", "alike"), CASES)
def test_nominal_5_percent_is_kept(tiles: int, alike: float) -> None:
    """Simulated splits of 60 places; benchmarks/simulate.py has more of them, docs/simulations.md the figures."""
    generator, splits, places = np.random.default_rng(3), 500, labels(60, tiles)
    missed, alarms, off, naive = 0, 0, 0, 0
    for _ in range(splits):
        hits = drawn(generator, [1, 0], [0.8, 0.2], 60, tiles, alike).astype(bool)
        low, high = clusters.rate_interval(hits, places)
        missed += not low <= 0.8 <= high
        low, high = wilson(int(hits.sum()), len(hits))
        naive += not low <= 0.8 <= high
        changes = drawn(generator, [1, -1, 0], [0.15, 0.15, 0.7], 60, tiles, alike)
        alarms += clusters.paired_test(changes, places).mid_p < 0.05
        low, high = clusters.paired_interval(changes, places)
        off += not low <= 0 <= high
    for count in (missed, alarms, off):
        assert count / splits < 0.085, (missed, alarms, off)  # at 5 %, 3.1 to 6.9 % of 500 splits in 19 cases of 20
    assert (missed + alarms + off) / 3 / splits > 0.015, "not simply too wide"
    assert alike == 0 or naive / splits > 0.15, "frames taken as independent would be wrong this often"


def test_predictions_know_their_places() -> None:
    """B has no coordinates and D false ones: the place is that of the same frame under A."""
    own = default_mission()
    base = {"truth": "LOW", "category": "LOW", "donor": None, "scores": None}
    rows = [
        {**base, "condition": condition, "name": name, "coordinates": place}
        for name, condition, place in (
            ("a", "A", {"lon": 1.5, "lat": 2.0}), ("a", "B", None), ("a", "D", {"lon": 9.0, "lat": 9.0}),
            ("b", "A", {"lon": 1.5, "lat": 2.0}), ("c", "B", None),
        )
    ]  # fmt: skip
    assert [p.place for p in predictions_of(rows, own)] == ["1.5 2.0"] * 4 + [""]


def test_a_change_is_over_places() -> None:
    def rows(right: list[bool]) -> list[Prediction]:
        return [
            Prediction("B", f"{n:03}", "LOW", "LOW" if hit else "HIGH", place=str(n // 5))
            for n, hit in enumerate(right)
        ]

    before, after = rows([False] * 10 + [True] * 90), rows([True] * 100)
    change = compare(before, after)
    assert (change.gained, change.lost, change.exact_p) == (10, 0, 0.5), "two places, not ten frames"
    apart = change_of([1] * 10 + [0] * 90, labels(100, 1))
    assert apart.exact_p < 0.01
    assert (change.low, change.high) != (apart.low, apart.high)
    assert change.low < 0 < change.high
    assert apart.frames_to_resolve is not None
    assert change.frames_to_resolve is not None
    assert change.frames_to_resolve > 2 * apart.frames_to_resolve


def test_all_sign_patterns_are_counted() -> None:
    sums = [3, -1, 2]
    changes = [1, 1, 1, -1, 1, 1]
    places = ["a", "a", "a", "b", "c", "c"]
    totals = [
        abs(sum(sign * step for sign, step in zip(signs, sums, strict=True)))
        for signs in itertools.product((1, -1), repeat=3)
    ]
    assert clusters.paired_test(changes, places).exact_p == sum(total >= 4 for total in totals) / 8
