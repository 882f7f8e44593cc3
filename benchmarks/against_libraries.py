"""Compare the report's own formulas with those of statsmodels and MAPIE, which are not dependencies.

    pip install statsmodels mapie
    python benchmarks/against_libraries.py

Prints the largest difference of each over all cases; exit status 1 where one is above 1e-9. The result is on
docs/simulations.md.
"""

import sys
import warnings

import numpy as np
from mapie.risk_control.methods import compute_hoeffding_bentkus_p_value
from statsmodels.stats.contingency_tables import mcnemar as their_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from orion_triage.evaluate.clusters import paired_test
from orion_triage.evaluate.orbit import jeffreys
from orion_triage.evaluate.promise import lowest_within, upper_bound, within
from orion_triage.evaluate.statistics import holm, mcnemar, wilson

COUNTS = [(hits, total) for total in (1, 2, 5, 20, 40, 60, 300) for hits in range(total + 1)]
LARGEST = 1e-9


def wilson_intervals() -> float:
    return max(
        abs(one - other)
        for hits, total in COUNTS
        for one, other in zip(wilson(hits, total), proportion_confint(hits, total, method="wilson"), strict=True)
    )


def jeffreys_intervals() -> float:
    """Ours ends at 0 without a hit and at 1 with nothing else, where statsmodels' does not (Brown and others 2001)."""
    return max(
        abs(one - other)
        for hits, total in COUNTS
        if 0 < hits < total
        for one, other in zip(
            jeffreys(hits / total, total), proportion_confint(hits, total, method="jeffreys"), strict=True
        )
    )


def exact_bounds() -> float:
    """The upper bound of whole losses: Clopper and Pearson at twice the risk, one end of two."""
    return max(
        abs(upper_bound(np.array([1.0] * hits + [0.0] * (total - hits)), confidence) - theirs)
        for hits, total in COUNTS
        for confidence in (0.8, 0.95)
        if hits < total
        for theirs in [proportion_confint(hits, total, alpha=2 * (1 - confidence), method="beta")[1]]
    )


def mcnemar_tests() -> float:
    return max(
        max(abs(ours - theirs), abs(over_places - theirs))
        for gained in range(25)
        for lost in range(25)
        if gained + lost
        for ours in [mcnemar(gained, lost).exact_p]
        for over_places in [paired_test([1] * gained + [-1] * lost, [str(n) for n in range(gained + lost)]).exact_p]
        for theirs in [their_mcnemar([[0, gained], [lost, 0]], exact=True).pvalue]
    )


def holm_corrections() -> float:
    random, largest = np.random.default_rng(0), 0.0
    for count in (1, 2, 4, 42):
        for _ in range(50):
            p = random.random(count) ** 3
            ours = list(holm({str(n): float(value) for n, value in enumerate(p)}).values())
            largest = max(largest, float(np.abs(np.array(ours) - multipletests(p, method="holm")[1]).max()))
    return largest


def promises() -> float:
    """The p-value of Hoeffding and Bentkus decides as MAPIE's, for shares of places; the number of other decisions."""
    random, other = np.random.default_rng(0), 0
    for count in (20, 60, 120, 300):
        for limit in (0.05, 0.1, 0.2):
            for confidence in (0.8, 0.95):
                for _ in range(50):
                    losses = random.binomial(3, random.random() * limit, count) / 3
                    if np.isin(losses, (0.0, 1.0)).all():
                        continue
                    p = compute_hoeffding_bentkus_p_value(np.array([losses.mean()]), count, np.array([limit]))
                    other += within(losses, limit, confidence) != (float(np.ravel(p)[0]) <= 1 - confidence)
    return float(other)


def impossible_promises() -> float:
    """Where no threshold is valid, ours is None; the number of finite answers with 18 frames at 5 % and 8 at 10 %."""
    return float(
        sum(
            lowest_within([0.1, 0.5, 0.9, 1.1], lambda _: np.zeros(count), limit, 0.95) is not None  # noqa: B023
            for count, limit in ((18, 0.05), (8, 0.1))
        )
    )


def main() -> int:
    warnings.simplefilter("ignore")
    worst = 0.0
    for name, compare in (
        ("Wilson, statsmodels", wilson_intervals),
        ("Jeffreys, statsmodels", jeffreys_intervals),
        ("Clopper-Pearson bound, statsmodels", exact_bounds),
        ("McNemar exact, on frames and over places of one frame, statsmodels", mcnemar_tests),
        ("Holm, statsmodels", holm_corrections),
        ("Hoeffding-Bentkus, other decisions than MAPIE", promises),
        ("finite thresholds where none is valid", impossible_promises),
    ):
        found = compare()
        worst = max(worst, found)
        sys.stdout.write(f"{name}: {found:.2g}\n")
    return int(worst > LARGEST)


if __name__ == "__main__":
    sys.exit(main())
