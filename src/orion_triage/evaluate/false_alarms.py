"""What many frames of one category to be dropped say about the orbit (see flight/false_alarms.py); pure functions."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from orion_triage.evaluate import clusters, orbit
from orion_triage.evaluate.judgement import guess_of, truth_of
from orion_triage.evaluate.metrics import Prediction, places_of
from orion_triage.evaluate.statistics import NO_VERDICT
from orion_triage.evaluate.value import SEND, STORE, acted
from orion_triage.mission.decide import Rules
from orion_triage.mission.mission import Mission

FILE_NAME = "false_alarms.json"  # in the run's folder
_MOST = 10_000_000  # frames of one place


def rules_in_words(rules: Rules) -> str:
    """The rules by which frames were decided; others make the answers outdated."""
    ranges = sorted((name, list(ends)) for name, ends in (rules.appearance or {}).items())
    return f"threshold {rules.drop_threshold}, ranges {ranges}"


def figures(record: Mapping[str, Any], flown: Sequence[Prediction], mission: Mission) -> dict[str, Any]:
    """Counts, the share that is sent with its interval over places, and `orbit` with these frames instead of the
    split's of the same category. `flown` are the decisions on the split's frames under one condition.

    Raises KeyError, TypeError or ValueError for a record of another form.
    """
    category = str(record["category"])
    said: list[str | None] = []
    places: list[str] = []
    for place, counts in record["answers"].items():
        for name, count in counts.items():
            if name not in ("", *mission.names) or type(count) is not int or not 0 < count <= _MOST:
                raise ValueError(f"{count!r} answers {name!r}")
            said += [name or None] * count
            places += [f"{FILE_NAME} {place}"] * count
    if not said:
        raise ValueError("no answers")
    guess = guess_of(said, mission)
    done = acted(guess, mission)
    others = [prediction for prediction in flown if prediction.truth != category]
    truth = np.append(truth_of(others, mission), np.full(len(guess), mission.names.index(category)))
    answers = np.append(guess_of([prediction.predicted for prediction in others], mission), guess)
    return {
        "folder": str(record["folder"]),
        "category": category,
        "frames": len(guess),
        "places": len(set(places)),
        "stored": int((done == STORE).sum()),
        "no_verdict": int((guess == NO_VERDICT).sum()),
        "sent": clusters.rate(done == SEND, places),
        "orbit": orbit.orbit(truth, answers, [*places_of(others), *places], mission),
    }
