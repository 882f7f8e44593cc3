"""How often intervals, tests and promises are wrong, on simulated splits with known rates: docs/simulations.md.

python benchmarks/simulate.py                  # all tables, an hour on one core
python benchmarks/simulate.py --splits 200     # a first look
python benchmarks/simulate.py --only promises
"""

import argparse
from collections.abc import Iterator, Sequence

import numpy as np

from orion_triage.errors import OrionError
from orion_triage.evaluate import clusters
from orion_triage.evaluate.metrics import Prediction
from orion_triage.evaluate.orbit import orbit
from orion_triage.evaluate.statistics import mcnemar, wilson
from orion_triage.evaluate.threshold import promising
from orion_triage.mission.mission import Mission, default_mission

SEED = 2026
# Shares of answers (columns HIGH, MEDIUM, LOW) to frames of each category (rows), from good to poor.
MODELS = {
    "98 %": [[0.98, 0.01, 0.01], [0.01, 0.98, 0.01], [0.002, 0.018, 0.98]],
    "90 %": [[0.9, 0.08, 0.02], [0.05, 0.85, 0.1], [0.02, 0.08, 0.9]],
    "75 %": [[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.05, 0.2, 0.75]],
}
PRIOR = (0.02, 0.18, 0.8)


def labels(places: int, tiles: int) -> list[str]:
    return [str(place) for place in range(places) for _ in range(tiles)]


def drawn(
    generator: np.random.Generator,
    values: Sequence[int],
    shares: Sequence[float],
    places: int,
    tiles: int,
    alike: float,
) -> np.ndarray:
    """Values [places * tiles] with these shares, and this correlation within a place."""
    of_place = generator.choice(values, size=(places, 1), p=shares)
    own = generator.choice(values, size=(places, tiles), p=shares)
    return np.where(generator.random((places, tiles)) < np.sqrt(alike), of_place, own).ravel()


def over_places(splits: int) -> Iterator[list[str]]:
    """Nominal 5 %: intervals of a rate and of a paired difference, and the paired test, with and without places."""
    yield [
        "places", "tiles", "correlation", "rate", "interval misses", "as independent", "differing", "test alarms",
        "exact alarms", "as independent", "interval misses",
    ]  # fmt: skip
    for places in (20, 60):
        for tiles, alike in ((1, 0.0), (5, 0.0), (5, 0.5), (5, 0.8)):
            for rate, differing in ((0.97, 0.1), (0.9, 0.2), (0.7, 0.4)):
                generator, names = np.random.default_rng(SEED), labels(places, tiles)
                counts = np.zeros(6)
                for _ in range(splits):
                    hits = drawn(generator, [1, 0], [rate, 1 - rate], places, tiles, alike).astype(bool)
                    low, high = clusters.rate_interval(hits, names)
                    naive = wilson(int(hits.sum()), len(hits))
                    shares = [differing / 2, differing / 2, 1 - differing]
                    changes = drawn(generator, [1, -1, 0], shares, places, tiles, alike)
                    test = clusters.paired_test(changes, names)
                    apart = mcnemar(int(np.sum(changes > 0)), int(np.sum(changes < 0)))
                    ends = clusters.paired_interval(changes, names)
                    counts += [
                        not low <= rate <= high, not naive[0] <= rate <= naive[1],
                        test.mid_p < 0.05, test.exact_p < 0.05, apart.mid_p < 0.05, not ends[0] <= 0 <= ends[1],
                    ]  # fmt: skip
                found = [f"{100 * count / splits:.1f} %" for count in counts]
                yield [
                    str(places), str(tiles), f"{alike:g}", f"{rate:.0%}", *found[:2], f"{differing:.0%}", *found[2:],
                ]  # fmt: skip


def in_orbit(splits: int) -> Iterator[list[str]]:
    """Nominal 5 %: how often the true figure in orbit is outside its interval."""
    yield ["frames of each category", "right", "sent", "stored", "dropped", "HIGH among sent", "cost"]
    own = Mission.model_validate({"prior": PRIOR})
    prior, costs = np.array(own.prior), np.array(own.costs)
    for frames in (20, 60, 200):
        for name, rows in MODELS.items():
            generator, answers = np.random.default_rng(SEED), np.array(rows)
            truth, places = np.repeat([0, 1, 2], frames), [str(n) for n in range(3 * frames)]
            true = [*(prior @ answers), prior[0] * answers[0, 0] / (prior @ answers[:, 0])]
            true.append(float(np.sum(prior[:, None] * answers * costs)))
            missed = np.zeros(len(true))
            for _ in range(splits):
                guess = np.concatenate([generator.choice(3, size=frames, p=row) for row in answers])
                found = orbit(truth, guess, places, own)
                assert found is not None
                figures = [found["sent"], found["stored"], found["dropped"], found["precision"]["HIGH"], found["cost"]]
                missed += [
                    one["low"] is None or not one["low"] <= x <= one["high"]
                    for one, x in zip(figures, true, strict=True)
                ]
            yield [str(frames), name, *(f"{100 * count / splits:.1f} %" for count in missed)]


def promises(splits: int) -> Iterator[list[str]]:
    """How many missions lose more than was promised, and how many frames a threshold that promises drops."""
    yield ["places", "tiles", "limit", "confidence", "promised", "broken", "mean loss", "LOW frames dropped"]
    mission = default_mission()
    for places in (40, 60, 120, 300):
        for tiles in (1, 3) if places < 300 else (1,):
            for limit, confidence in ((0.05, 0.95), (0.1, 0.95), (0.1, 0.8)):
                generator = np.random.default_rng(SEED)
                lost: list[float] = []
                dropped: list[float] = []
                for _ in range(splits):
                    # P(LOW) of valuable frames is u^3, of LOW frames 1 - u^3: tiles of a place share half of their u.
                    shared, own = generator.random((places, 1)), generator.random((places, tiles))
                    u = np.where(generator.random((places, tiles)) < 0.5, shared, own).ravel()
                    rows = [
                        Prediction("B", f"{n:05}", "HIGH", "HIGH", scores=(1 - p, 0.0, p), place=str(n // tiles))
                        for n, p in enumerate(u**3)
                    ]
                    try:
                        rules, _ = promising(rows, limit, confidence, mission)
                    except OrionError:
                        continue
                    threshold = min(1.0, rules.drop_threshold or 1.0)
                    lost.append(1 - threshold ** (1 / 3))
                    dropped.append((1 - threshold) ** (1 / 3) if threshold < 1 else 0.0)
                many = len(lost)
                broken = f"{100 * np.mean(np.array(lost) > limit):.1f} %" if many else "-"
                means = [f"{100 * np.mean(x):.1f} %" if many else "-" for x in (lost, dropped)]
                yield [
                    str(places), str(tiles), f"{limit:.0%}", f"{confidence:.0%}", f"{many / splits:.0%}", broken,
                    *means,
                ]  # fmt: skip


TABLES = {"places": over_places, "orbit": in_orbit, "promises": promises}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--splits", type=int, default=2000, help="simulated splits a row (default: %(default)s)")
    parser.add_argument("--only", choices=TABLES, help="one of the tables")
    options = parser.parse_args()
    for name, table in TABLES.items():
        if options.only in (None, name):
            print(f"\n{table.__doc__}\n")
            for number, row in enumerate(table(options.splits)):
                print("|", " | ".join(row), "|", flush=True)
                if number == 0:
                    print("|" + "---:|" * len(row))


if __name__ == "__main__":
    main()
