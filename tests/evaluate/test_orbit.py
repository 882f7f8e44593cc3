"""Figures in orbit: frames weighted by the mission's prior, with intervals that have a width at 0 and 100 %."""

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from orion_triage.evaluate.judgement import ideal_figures, value_figures
from orion_triage.evaluate.orbit import Rate, jeffreys, mover, orbit, weights
from orion_triage.evaluate.value import downlink
from orion_triage.mission.mission import Mission, default_mission
from tests.evaluate.test_value import COSTS, GUESS, MISSION, TRUTH, VALUES, H, L, M, with_prior

ACTIONS = ("sent", "stored", "dropped", "no_verdict")


def values(found: dict[str, Any]) -> dict[str, float | None]:
    return {name: one["value"] for name, one in found.items()}


def of(truth: np.ndarray, guess: np.ndarray, mission: Mission, places: list[str] | None = None) -> dict[str, Any]:
    found = orbit(truth, guess, places or [str(n) for n in range(len(truth))], mission)
    assert found
    return found


def test_a_prior_reweights_the_answers() -> None:
    rates = of(TRUTH, GUESS, with_prior(0.1, 0.3, 0.6))
    high_sent, medium_sent = 0.1 * 2 / 4, 0.3 * 1 / 3
    assert rates["sent"]["value"] == pytest.approx(high_sent + medium_sent)
    assert rates["stored"]["value"] == pytest.approx(0.3 / 3 + 0.6 / 3)
    assert rates["dropped"]["value"] == pytest.approx(0.1 / 4 + 0.3 / 3 + 0.6 * 2 / 3)
    assert rates["no_verdict"]["value"] == pytest.approx(0.1 / 4)
    precision = {"HIGH": high_sent / 0.15, "MEDIUM": 1 / 3, "LOW": 0.4 / 0.525}
    assert values(rates["precision"]) == pytest.approx(precision)
    for one in (*(rates[name] for name in (*ACTIONS, "cost")), *rates["precision"].values()):
        assert one["low"] < one["value"] < one["high"]


def test_the_splits_own_prior_changes_nothing() -> None:
    own = Mission.model_validate({"values": VALUES, "costs": COSTS, "prior": (0.4, 0.3, 0.3)})
    rates, shares = of(TRUTH, GUESS, own), downlink(GUESS, MISSION)
    assert all(rates[name]["value"] == pytest.approx(shares[name]) for name in ACTIONS)
    assert values(rates["precision"]) == pytest.approx({"HIGH": 2 / 3, "MEDIUM": 1 / 2, "LOW": 2 / 4})
    assert rates["cost"]["value"] == pytest.approx(25 / 10), "10 for each of 2 lost HIGH and none, 3, 1 and 1"
    # Sent: HIGH, HIGH, MEDIUM = 22 / 3; all: (4 * 10 + 3 * 2) / 10.
    assert rates["value_density"] == pytest.approx(22 / 3 / 4.6)
    assert of(TRUTH, np.full(10, H), own)["value_density"] == pytest.approx(1)
    assert of(TRUTH, np.full(10, L), own)["value_density"] is None


def test_what_a_split_cannot_say_about_a_prior_is_undefined() -> None:
    truth, guess = np.array([H, H, L]), np.array([H, L, L])
    assert orbit(truth, guess, ["a", "b", "c"], with_prior(0.1, 0.3, 0.6)) is None
    assert weights(truth, with_prior(0.1, 0.3, 0.6)) is None
    assert value_figures(truth, np.zeros(3), with_prior(0.1, 0.3, 0.6)) is None
    known = of(truth, guess, with_prior(0.5, 0, 0.5))
    assert known["sent"]["value"] == 0.25
    assert values(known["precision"]) == pytest.approx({"HIGH": 1, "MEDIUM": None, "LOW": 0.5 / 0.75})
    with pytest.raises(ValidationError, match=r"the priors sum to 0\.9; write shares that sum to 1"):
        with_prior(0.5, 0, 0.4)
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        with_prior(1.5, 0, -0.5)


def split(*wrong: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Twenty frames of each category, all right but these: (frame, answer)."""
    truth = np.repeat([H, M, L], 20)
    guess = truth.copy()
    for frame, answer in wrong:
        guess[frame] = answer
    return truth, guess


def test_one_false_alarm_of_twenty_frames_is_most_of_what_an_orbit_sends() -> None:
    """With 0.5 % HIGH and 90 % LOW frames, a false alarm in 20 LOW frames makes one in ten sent frames HIGH."""
    own = default_mission()
    perfect, one_wrong = of(*split(), own), of(*split((59, H)), own)
    assert perfect["precision"]["HIGH"]["value"] == 1
    assert perfect["precision"]["HIGH"]["low"] < 0.07, "twenty frames cannot show that there are no false alarms"
    assert one_wrong["precision"]["HIGH"]["value"] == pytest.approx(0.1)
    alarms = perfect["false_alarms"]
    assert alarms["largest_rate"] == pytest.approx(0.005 / 0.9)
    assert (alarms["frames_needed"], alarms["frames"], alarms["count"]) == (540, 20, 0)
    assert one_wrong["false_alarms"]["count"] == 1
    assert of(*split(*((frame, L) for frame in range(20))), own)["false_alarms"] is None, "no HIGH frame is sent"


def test_a_perfect_order_receives_in_orbit_what_the_prior_allows() -> None:
    truth, _ = split()
    ideal = ideal_figures(truth, default_mission())
    assert ideal
    # 0.5 % HIGH frames of value 10 and 9.5 % MEDIUM of value 1: 0.05 + 0.045 of 0.145 in the first 5 %.
    assert ideal["at"]["5%"] == pytest.approx(0.095 / 0.145)
    assert ideal["normalized_area"] == pytest.approx(1)


def test_mover_of_one_rate_is_its_interval_and_jeffreys_ends_at_0_and_1() -> None:
    from scipy.stats import beta

    rate = Rate(0.25, *jeffreys(0.25, 20))
    assert (rate.low, rate.high) == pytest.approx(tuple(beta(5.5, 15.5).ppf([0.025, 0.975])))
    assert mover([1.0], [rate]) == pytest.approx((rate.share, rate.low, rate.high))
    assert mover([-1.0], [rate]) == pytest.approx((-rate.share, -rate.high, -rate.low))
    half = mover([0.5, 0.5], [rate, rate])
    assert half[0] == pytest.approx(0.25)
    assert half[2] - half[1] == pytest.approx((rate.high - rate.low) / np.sqrt(2))
    assert (jeffreys(0, 20)[0], jeffreys(1, 20)[1]) == (0, 1)


ANSWERS = np.array([[0.9, 0.08, 0.02], [0.05, 0.85, 0.1], [0.02, 0.08, 0.9]])  # of truths (rows): shares of answers


@pytest.mark.slow
@pytest.mark.parametrize("frames", [20, 60])
def test_nominal_5_percent_is_kept(frames: int) -> None:
    """Simulated splits with known rates; benchmarks/simulate.py has more of them, docs/simulations.md the figures."""
    own, generator = with_prior(0.02, 0.18, 0.8), np.random.default_rng(7)
    truth, splits = np.repeat([H, M, L], frames), 300
    prior = np.array(own.prior)
    true = {
        **{name: float(prior @ ANSWERS[:, index]) for index, name in enumerate(ACTIONS[:3])},
        "HIGH": float(prior[0] * ANSWERS[0, 0] / (prior @ ANSWERS[:, 0])),
        "cost": float(np.sum(prior[:, None] * ANSWERS * np.array(own.costs))),
    }
    missed = dict.fromkeys(true, 0)
    for _ in range(splits):
        guess = np.concatenate([generator.choice(3, size=frames, p=row) for row in ANSWERS])
        found = of(truth, guess, own)
        figures = {name: found[name] for name in (*ACTIONS[:3], "cost")} | {"HIGH": found["precision"]["HIGH"]}
        for name, one in figures.items():
            missed[name] += one["low"] is None or not one["low"] <= true[name] <= one["high"]
    for name, count in missed.items():
        assert count / splits < 0.095, f"{name} misses {count} of {splits}"
    assert sum(missed.values()) / len(missed) / splits > 0.01, "not simply too wide"
