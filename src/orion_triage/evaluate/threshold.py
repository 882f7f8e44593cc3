"""How sure of LOW a model must be before a frame is dropped: chosen on val, kept with the run, used in flight."""

import json
import math
from typing import TYPE_CHECKING, Any

from orion_triage.errors import OrionError
from orion_triage.safe.files import sha256_of_file, write_text
from orion_triage.safe.reading import read_object

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from orion_triage.evaluate.metrics import Prediction
    from orion_triage.evaluate.value import OperatingPoint
    from orion_triage.runs.run import Run
    from orion_triage.settings import MissionSettings

FILE_NAME = "operating_point.json"
CONDITION = "B"  # in flight a frame is asked about without coordinates


def parse_share(text: str) -> float:
    """ "5%" or "0.05"; raises OrionError unless it is a share of 0 to 1."""
    number, percent, rest = text.strip().partition("%")
    try:
        share = float(number) / (100 if percent else 1)
    except ValueError:
        share = -1
    if rest or not 0 <= share <= 1:
        raise OrionError(f"{text!r} is no share of the frames.", "Write it as 5% or 0.05.")
    return share


def choose(run: "Run", max_irrecoverable_loss: float) -> dict[str, Any]:
    """Choose the point on the val evaluation of `run` (a Run of that split) and write it into the run's folder.

    Returns what was written: the threshold, what it does to the frames it was chosen on, and the temperature that fits
    the scores there best (it changes no order, so no decision).
    """
    from orion_triage.evaluate import value
    from orion_triage.evaluate.judgement import scores_of, truth_of
    from orion_triage.evaluate.metrics import under
    from orion_triage.evaluate.run import prediction_of, read_predictions

    rows = under([prediction_of(row) for row in read_predictions(run.evaluation("constrained"))], CONDITION)
    truth = truth_of(rows)
    point = value.choose_operating_point(truth, scores_of(rows), max_irrecoverable_loss)
    record = {
        "max_irrecoverable_loss": max_irrecoverable_loss,
        "low_threshold": point.low_threshold,
        "temperature": value.fit_temperature(truth, scores_of(rows)),  # that would make the scores honest
        "chosen_on": {"split": run.split, "condition": CONDITION, "frames": len(rows)},
        "pair_sha256": _pair(run.gguf),
        "there": figures(rows, point, run.settings.mission),
    }
    write_text(run.folder / FILE_NAME, json.dumps(record, indent=2) + "\n")
    return record


def figures(rows: "Sequence[Prediction]", point: "OperatingPoint", mission: "MissionSettings") -> dict[str, Any]:
    """What deciding by the point does to frames of one condition: headline, downlink and cost."""
    import numpy as np

    from orion_triage.evaluate import value
    from orion_triage.evaluate.judgement import scores_of, truth_of

    truth, guess = truth_of(rows), value.decide(scores_of(rows), point)
    return {
        **value.headline(truth, guess),
        "downlink": value.downlink(truth, guess, mission.values),
        "cost": value.expected_cost(truth, guess, np.array(mission.costs)),
    }


def tempered(rows: "Sequence[Prediction]", temperature: float) -> dict[str, float]:
    """Negative log-likelihood and Brier score of one condition's scores, softened by the temperature of val."""
    from orion_triage.evaluate import value
    from orion_triage.evaluate.judgement import scores_of, truth_of

    truth, scores = truth_of(rows), value.temper(scores_of(rows), temperature)
    return {
        "negative_log_likelihood": value.negative_log_likelihood(truth, scores),
        "brier": value.brier(truth, scores),
    }


def read(folder: "Path", gguf: "Path") -> "tuple[OperatingPoint, float] | None":
    """The run's point and temperature, None if none was chosen; raises OrionError for one of another pair."""
    from orion_triage.evaluate.value import OperatingPoint

    path = folder / FILE_NAME
    try:
        record = read_object(path)
        point, pair = OperatingPoint(float(record["low_threshold"])), record["pair_sha256"]
        temperature = float(record["temperature"])
        if not (0 <= point.low_threshold < math.inf and 0 < temperature < math.inf):
            raise ValueError("out of range")
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise OrionError(f"{path} is damaged: {error!r}.", "Choose it again: 'orion operating-point'.") from None
    if pair != _pair(gguf):
        raise OrionError(
            f"{path} was chosen for another GGUF pair.", "Choose it again ('orion operating-point'), or delete it."
        )
    return point, temperature


def _pair(gguf: "Path") -> str:
    from orion_triage.export.quantize import PAIR

    return sha256_of_file(gguf / PAIR)
