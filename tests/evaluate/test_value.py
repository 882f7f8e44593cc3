"""evaluate/value.py: cases counted by hand, scikit-learn, and what must hold on any data."""

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss, cohen_kappa_score, log_loss

from orion_triage.errors import OrionError
from orion_triage.evaluate.statistics import wilson
from orion_triage.evaluate.value import (
    best_constant,
    brier,
    downlink,
    expected_calibration_error,
    fit_temperature,
    headline,
    negative_log_likelihood,
    normalized_area,
    quadratic_kappa,
    reliability,
    risk_coverage,
    temper,
    value_at,
    value_curve,
)
from orion_triage.mission.mission import Mission

H, M, L, NONE = 0, 1, 2, -1
VALUES = (10.0, 2.0, 0.0)
COSTS = [[0.0, 2.0, 10.0], [1.0, 0.0, 3.0], [4.0, 1.0, 0.0]]
MISSION = Mission.model_validate({"values": VALUES, "costs": COSTS})


def with_prior(*shares: float) -> Mission:
    return Mission.model_validate({"prior": shares})


TRUTH = np.array([H, H, H, H, M, M, M, L, L, L])
GUESS = np.array([H, H, L, NONE, M, L, H, L, M, L])
APART = [str(number) for number in range(len(TRUTH))]  # each frame is of a place of its own


def some_scores(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Truths drawn with exactly the probabilities that the scores say."""
    generator = np.random.default_rng(seed)
    scores = generator.dirichlet([1, 1, 1], count)
    truth = (generator.random((count, 1)) > scores.cumsum(axis=1)).sum(axis=1).clip(0, 2)
    return truth, scores


def test_the_headline_counts_what_is_deleted_for_good() -> None:
    rates = headline(TRUTH, GUESS, APART, MISSION)
    recall, loss = rates["high_recall"], rates["irrecoverable_loss"]
    assert (recall["count"], recall["total"], recall["rate"]) == (2, 4, 0.5)
    assert (recall["low"], recall["high"]) == wilson(2, 4)
    assert (loss["count"], loss["total"], loss["rate"]) == (2, 7, 2 / 7)
    assert (loss["low"], loss["high"]) == wilson(2, 7)
    assert rates["no_verdict"] == 1


def test_the_headline_of_a_split_without_valuable_frames_is_undefined() -> None:
    rates = headline(np.array([L, L]), np.array([L, NONE]), ["a", "b"], MISSION)
    undefined = {"count": 0, "total": 0, "rate": None, "low": None, "high": None}
    assert rates == {"high_recall": undefined, "irrecoverable_loss": undefined, "no_verdict": 0}


def test_the_downlink_takes_what_is_called_high() -> None:
    assert downlink(GUESS, MISSION) == pytest.approx({"sent": 0.3, "stored": 0.2, "dropped": 0.4, "no_verdict": 0.1})


def test_the_value_curve_is_the_one_drawn_by_hand() -> None:
    truth = np.array([L, H, M, M])
    curve = value_curve(truth, np.array([0.1, 0.9, 0.5, 0.4]), (6, 2, 0))
    assert curve.budget.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert curve.value.tolist() == pytest.approx([0, 0.6, 0.8, 1, 1])
    assert value_at(curve, 0.05) == pytest.approx(0.12)
    assert value_at(curve, 0.375) == pytest.approx(0.7)
    assert value_at(curve, 1) == 1


def test_equal_ranks_share_their_value_evenly_in_any_order() -> None:
    truth = np.array([H, L, M, H])
    ranking = np.array([0.5, 0.5 + 1e-15, 0.5, 0.2])  # the second differs by rounding only
    curve = value_curve(truth, ranking, (6, 3, 0))
    assert curve.budget.tolist() == [0, 0.75, 1]
    assert curve.value.tolist() == pytest.approx([0, 0.6, 1])
    orders = [value_curve(truth[order], ranking[order], (6, 3, 0)) for order in ([3, 2, 1, 0], [1, 0, 3, 2])]
    assert all(other.value.tolist() == curve.value.tolist() for other in orders)


def test_normalized_area_is_one_for_the_best_order_and_zero_without_any() -> None:
    truth, scores = some_scores(200)
    worth = np.array(VALUES)[truth]

    def area(ranking: np.ndarray) -> float:
        found = normalized_area(value_curve(truth, ranking, VALUES), truth, VALUES)
        assert found is not None
        return found

    assert area(worth) == pytest.approx(1)
    assert area(np.zeros(200)) == pytest.approx(0)
    assert area(-worth) == pytest.approx(-1)
    assert 0.1 < area(scores @ np.array(VALUES)) < 0.95
    # Two frames of which one has all value: sent second, the curve rises on the second half only.
    pair = np.array([H, L])
    assert normalized_area(value_curve(pair, np.array([0, 1]), VALUES), pair, VALUES) == pytest.approx(-1)


def test_orders_of_equal_or_no_value_are_undefined() -> None:
    same = np.array([M, M, M])
    assert normalized_area(value_curve(same, np.array([1, 2, 3]), VALUES), same, VALUES) is None
    with pytest.raises(OrionError, match="no frame of the split has a value"):
        value_curve(np.array([L, L]), np.array([0.1, 0.2]), VALUES)


def test_costs_are_those_of_the_matrix_and_no_verdict_costs_most() -> None:
    # H: 0, 0, 10, no verdict 10; M: 0, 3, 1; L: 0, 1, 0.
    # All HIGH: 0 + 3 * 1 + 3 * 4 = 15; all MEDIUM: 4 * 2 + 0 + 3 = 11; all LOW: 40 + 9.
    assert best_constant(TRUTH, MISSION) == (M, pytest.approx(1.1))
    assert best_constant(TRUTH, Mission.model_validate({"costs": [[1.0, 1.0, 1.0]] * 3})) == (H, 1)


@pytest.mark.parametrize("seed", range(5))
def test_kappa_is_that_of_scikit_learn(seed: int) -> None:
    generator = np.random.default_rng(seed)
    truth = generator.integers(0, 3, 60)
    guess = np.where(generator.random(60) < 0.6, truth, generator.integers(-1, 3, 60))
    answered = guess >= 0
    kappa, left_out = quadratic_kappa(truth, guess, MISSION)
    assert kappa == pytest.approx(cohen_kappa_score(truth[answered], guess[answered], weights="quadratic"))
    assert left_out == np.sum(~answered) > 0


def test_kappa_of_one_category_or_no_answer_is_undefined() -> None:
    assert quadratic_kappa(np.array([M, M]), np.array([M, M]), MISSION) == (None, 0)
    assert quadratic_kappa(np.array([H, L]), np.array([NONE, NONE]), MISSION) == (None, 2)
    assert quadratic_kappa(np.array([H, L]), np.array([L, H]), MISSION) == (-1.0, 0)


def test_losses_are_those_of_scikit_learn() -> None:
    truth, scores = some_scores(100)
    assert negative_log_likelihood(truth, scores) == pytest.approx(log_loss(truth, scores, labels=[H, M, L]))
    one_against_rest = [brier_score_loss(truth == category, scores[:, category]) for category in (H, M, L)]
    assert brier(truth, scores) == pytest.approx(sum(one_against_rest))


def test_losses_counted_by_hand() -> None:
    scores = np.array([[0.5, 0.3, 0.2], [0.0, 0.0, 1.0]])
    assert brier(np.array([H, H]), scores) == pytest.approx((0.25 + 0.09 + 0.04 + 2) / 2)
    assert negative_log_likelihood(np.array([H, L]), scores) == pytest.approx(np.log(2) / 2)
    assert negative_log_likelihood(np.array([H]), scores[1:]) == pytest.approx(12 * np.log(10))


def test_reliability_puts_each_frame_in_the_bin_of_its_top_probability() -> None:
    scores = np.array([[0.5, 0.3, 0.2], [0.1, 0.55, 0.35], [0, 0, 1.0], [0.4, 0.4, 0.2]])
    rows = reliability(np.array([H, H, L, M]), scores)
    assert [row["count"] for row in rows] == [0, 0, 0, 0, 1, 2, 0, 0, 0, 1]
    assert rows[5] == {"low": 0.5, "high": 0.6, "count": 2, "confidence": pytest.approx(0.525), "accuracy": 0.5}
    assert (rows[9]["confidence"], rows[9]["accuracy"]) == (1, 1)
    assert rows[4]["accuracy"] == 0  # equally likely: HIGH counts, MEDIUM is true
    assert (rows[0]["confidence"], rows[0]["accuracy"]) == (None, None)
    assert len(reliability(np.array([H, H, L, M]), scores, bins=4)) == 4


def test_calibration_error_is_the_gap_and_is_not_given_on_few_frames() -> None:
    sure = np.tile([0.75, 0.15, 0.1], (200, 1))
    unsure = np.tile([0.25, 0.3, 0.45], (100, 1))
    truth = np.array([H] * 100 + [M] * 100 + [L] * 100)
    error = expected_calibration_error(truth, np.vstack([sure, unsure]))
    assert error == pytest.approx((200 * abs(0.75 - 0.5) + 100 * abs(0.45 - 1)) / 300)
    assert expected_calibration_error(truth[:299], np.vstack([sure, unsure])[:299]) is None


def test_the_temperature_that_was_put_in_is_found() -> None:
    truth, scores = some_scores(4000)
    assert fit_temperature(truth, scores) == pytest.approx(1, abs=0.06)
    assert fit_temperature(truth, temper(scores, 1 / 3)) == pytest.approx(3, rel=0.06)
    assert fit_temperature(truth, temper(scores, 2.5)) == pytest.approx(0.4, rel=0.06)


def test_the_fitted_temperature_is_the_best_of_a_grid() -> None:
    truth, scores = some_scores(300, seed=1)
    surer = temper(scores, 0.2)
    best = negative_log_likelihood(truth, temper(surer, fit_temperature(truth, surer)))
    grid = np.exp(np.linspace(-3, 3, 61))
    assert best <= min(negative_log_likelihood(truth, temper(surer, temperature)) for temperature in grid) + 1e-9


def test_the_temperature_stays_in_its_range() -> None:
    scores = np.tile([0.5, 0.3, 0.2], (20, 1))
    assert fit_temperature(np.full(20, H), scores) == pytest.approx(np.exp(-3), rel=1e-3)
    assert fit_temperature(np.full(20, L), scores) == pytest.approx(np.exp(3), rel=1e-3)


@pytest.mark.parametrize("nothing", [0.0, 1e-250])
def test_answers_of_full_certainty_are_softened_to_how_often_they_are_right(nothing: float) -> None:
    scores = np.tile([1.0, nothing, nothing], (20, 1))
    truth = np.array([H] * 18 + [M, L])
    softer = temper(scores, fit_temperature(truth, scores))
    assert softer == pytest.approx(np.tile([0.9, 0.05, 0.05], (20, 1)), abs=1e-4)


def test_two_sure_mistakes_are_not_capped_away_by_sharpening() -> None:
    scores = np.array([[0.6, 0.2, 0.2]] * 100 + [[1.0, 0.0, 0.0]] * 2)
    truth = np.array([H] * 100 + [L] * 2)
    # With x = 1 / temperature: 100 ln(1 + 2 * 3**-x) + 2 ln(2 + 1e12**x).
    inverse = np.linspace(0.05, 20, 100_000)
    by_hand = 100 * np.log1p(2 * 3**-inverse) + 2 * np.logaddexp(np.log(2), inverse * np.log(1e12))
    assert fit_temperature(truth, scores) == pytest.approx(1 / inverse[by_hand.argmin()], rel=1e-3)


def test_temper_keeps_the_order() -> None:
    scores = np.array([[0.2, 0.5, 0.3], [0.0, 0.0, 1.0]])
    assert temper(scores, 1) == pytest.approx(scores, abs=1e-11)
    assert temper(scores, 0.5)[0] == pytest.approx(np.array([0.04, 0.25, 0.09]) / 0.38)
    assert temper(scores, 2)[1] == pytest.approx([0, 0, 1], abs=1e-5)
    assert temper(scores, 1e6)[0] == pytest.approx([1 / 3] * 3, abs=1e-5)


def test_risk_coverage_counted_by_hand() -> None:
    truth = np.array([H, M, L, L, H])
    guess = np.array([H, L, L, H, NONE])
    found = risk_coverage(truth, guess, np.array([0.9, 0.8, 0.7, 0.7, 0.1]))
    assert found.coverage.tolist() == [0.2, 0.4, 0.8, 1]
    assert found.error_rate.tolist() == [0, 0.5, 0.5, 0.6]
    assert found.area == pytest.approx(0.2 * 0 + 0.2 * 0.5 + 0.4 * 0.5 + 0.2 * 0.6)


def test_confidence_that_says_nothing_gives_the_overall_error_rate() -> None:
    truth, scores = some_scores(500)
    guess = scores.argmax(axis=1)
    overall = np.mean(guess != truth)
    assert risk_coverage(truth, guess, np.ones(500)).area == pytest.approx(overall)
    assert risk_coverage(truth, guess, scores.max(axis=1)).area < overall - 0.1
    # Without ties it is the mean over k of the error rate of the first k.
    order = np.argsort(-scores.max(axis=1))
    first = np.cumsum((guess != truth)[order]) / np.arange(1, 501)
    assert risk_coverage(truth, guess, scores.max(axis=1)).area == pytest.approx(first.mean())
