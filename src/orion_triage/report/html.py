"""results.json and the answers of the flight model -> report.html, one file that needs no other; `of_run` reads files.

Answers are a model's output and names come from a dataset: the template escapes every value.
"""

import base64
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from orion_triage.dataset.records import image_path, read_split
from orion_triage.errors import printable
from orion_triage.evaluate import threshold
from orion_triage.evaluate.conditions import CONDITIONS
from orion_triage.evaluate.judgement import BUDGETS
from orion_triage.evaluate.results import FLIGHT, NO_THRESHOLD, SHOWN, as_flown
from orion_triage.evaluate.run import Row, prediction_of, read_predictions
from orion_triage.evaluate.variants import OTHER_PAIR, SERVER
from orion_triage.imagery.frames import CAMERA_SIZE, read_frame, shrink
from orion_triage.mission.decide import Rules, by_in_words
from orion_triage.mission.mission import ACTIONS, Mission
from orion_triage.mission.prompt import Coordinates, format_degrees, render_prompt
from orion_triage.report import plot
from orion_triage.report.render import (
    MET,
    OUTCOME_OF,
    against_linear_probe,
    field_rows,
    from_template,
    mission_of,
    stress_rows,
    words,
    worst_under_stress,
)

if TYPE_CHECKING:
    from pathlib import Path

    from orion_triage.runs.run import Run

THUMBNAIL_SIZE = 160  # pixels
GALLERY = 12  # answers
Thumbnail = Callable[[str], bytes | None]  # a row's `image` -> JPEG; None if the file no longer exists


@dataclass(frozen=True)
class Chart:
    """`name` is unique in the document; `drawing` is SVG elements, and `description` their text alternative.

    The SVG is plot.WIDTH wide and `height` high.
    """

    name: str
    title: str
    description: str
    drawing: str
    height: int = plot.HEIGHT


@dataclass(frozen=True)
class WrongAnswer:
    """A card of the gallery. `predicted` is None for an answer without a verdict.

    `decided_by` is that of the decision (see mission/decide.py), and `said` the model's own category.
    """

    condition: str
    name: str
    image: str
    place: str
    truth: str
    predicted: str | None
    said: str | None
    decided_by: str
    cost: float
    confidence: float
    scores: dict[str, float]
    answer: str
    prompt: str


def of_run(run: "Run", results: dict[str, Any]) -> str:
    """The report of a run, with those of its frames that still exist."""
    model = flight_model(results)
    if model is None:
        return render_html(results, [], lambda image: None)
    rows = read_predictions(run.evaluation("constrained" if model == FLIGHT else model), run.settings.mission)
    paths = {
        record.image: image_path(run.dataset, record)
        for record in read_split(run.dataset, run.split, run.settings.mission)
    }
    return render_html(results, rows, lambda image: thumbnail(paths[image]))


def thumbnail(path: "Path") -> bytes | None:
    """The frame as a JPEG of 160x160; None if 'orion clean' has removed it."""
    if not path.is_file():
        return None
    picture = io.BytesIO()
    shrink(read_frame(path, CAMERA_SIZE).image, THUMBNAIL_SIZE).save(picture, "JPEG", quality=80)
    return picture.getvalue()


def render_html(results: dict[str, Any], rows: Sequence[Row], thumbnail: Thumbnail) -> str:
    """The document; `rows` are the lines of predictions.jsonl from which the answers of the flight model derive."""
    model, mission = flight_model(results), mission_of(results)
    models = [name for name in SHOWN if name in results["models"]]
    scored = [name for name in models if "brier" in results["models"][name]["B"]]
    ranked = [name for name in scored if results["models"][name]["B"]["value_curve"]]
    calibrated = [name for name in ("quantized", FLIGHT) if name in scored] or scored[-1:]
    drawn = [name for name in models if name != NO_THRESHOLD]  # in the charts it would lie under "flight"
    wrong = wrong_answers(results, rows)
    return from_template(
        "report.html.j2",
        results=results,
        conditions=CONDITIONS,
        **words(mission),
        flight_model=model,
        models=models,
        scored=scored,
        ranked=ranked,
        rates=[(condition, main_rates(results["models"][model][condition], mission)) for condition in "BA"]
        if model
        else [],
        linear_probe=against_linear_probe(results),
        size=(plot.WIDTH, plot.HEIGHT),
        stress=stress_rows(results["stress"]) if results["stress"] else [],
        stress_chart=stress_chart(results) if results["stress"] and results["stress"]["rows"] else None,
        controls=results["controls"] and results["controls"]["of"],
        accuracy_chart=accuracy_chart(results, drawn) if models else None,
        budget_chart=budget_chart(results, [name for name in ranked if name in drawn]) if ranked else None,
        calibration_charts=[reliability_chart(results, name) for name in calibrated]
        + ([coverage_chart(results, calibrated)] if calibrated else []),
        matrices=[
            (name, condition, matrix(results["models"][name][condition]["confusion"], mission))
            for name in models
            for condition in "BA"
        ],
        parts=lambda name: re.split(r"(?<=[/_])|(?<=\.)(?=.*_)", name),  # a long name can wrap between these
        wrong_count=len(wrong),
        asked_count=sum(row["condition"] in "AB" for row in rows),
        gallery=[(answer, _data_address(thumbnail(answer.image))) for answer in wrong[:GALLERY]],
        fields=field_rows(results),
        measurements=flat(results["figures"]),
        met=MET,
        outcome_of=OUTCOME_OF,
    )


def accuracy_chart(results: dict[str, Any], models: Sequence[str]) -> Chart:
    description = (
        f"Bars: accuracy of {', '.join(models)} under conditions A to D, with 95 % intervals. Level lines: the "
        "baselines. The tables beside the chart have the same values."
    )
    drawing = plot.svg("accuracy", plot.accuracy, results)
    return Chart("accuracy-chart", "Accuracy with 95 % intervals", description, drawing)


def budget_chart(results: dict[str, Any], models: Sequence[str]) -> Chart:
    description = (
        f"Curves for {', '.join(models)} under B: the share of all value that is received if only a share of the "
        "frames is sent. A random order and an order by PNG size are drawn for comparison. The table beside the chart "
        f"has the values at {', '.join(f'{budget:.0%}' for budget in BUDGETS)}."
    )
    drawing = plot.svg("budget", plot.value_against_budget, results, models)
    return Chart("budget-chart", "Value received against frames sent", description, drawing)


def reliability_chart(results: dict[str, Any], model: str) -> Chart:
    bins = "; ".join(
        f"{row['count']} frames with probability {row['confidence']:.0%}: {row['accuracy']:.0%} correct"
        for row in results["models"][model]["B"]["reliability"]
        if row["count"]
    )
    description = (
        f"Accuracy of the frames in each bin of the probability of the predicted category. {bins}. A calibrated model "
        "is on the diagonal."
    )
    drawing = plot.svg(f"reliability {model}", plot.reliability, results, model)
    return Chart(f"reliability-chart-{model}", f"Reliability diagram: {model}, B", description, drawing)


def coverage_chart(results: dict[str, Any], models: Sequence[str]) -> Chart:
    description = (
        f"Curves for {', '.join(models)} under B: the error rate of the most confident answers, against the share of "
        "frames that is decided on board with them. The other frames are decided on the ground."
    )
    return Chart(
        "coverage-chart", "Risk-coverage curve", description, plot.svg("coverage", plot.risk_coverage, results, models)
    )


def stress_chart(results: dict[str, Any]) -> Chart:
    description = (
        "For each stress three points, mild, medium and strong from top to bottom: the irrecoverable loss on the left "
        "and the recall of frames to be sent on the right, with 95 % intervals. Filled points differ significantly "
        f"from the dashed lines, the rates without stress. {worst_under_stress(results['stress'])} The table below "
        "has the same values."
    )
    height = plot.stress_height(results)
    drawing = plot.svg("stress", plot.stress, results, height=height, panels=2)
    return Chart("stress-chart", "Loss and recall under stress", description, drawing, height)


def flight_model(results: dict[str, Any]) -> str | None:
    """The last evaluated step from base to flight: "flight" if the run is complete. None before any evaluation."""
    own = [row["model"] for row in results["variants"] if row["model"] not in (OTHER_PAIR, SERVER)]
    return own[-1] if own else None


def main_rates(rates: dict[str, Any], mission: Mission) -> list[tuple[str, dict[str, Any]]]:
    """The three main rates, each {count, total, rate, low, high}."""
    accuracy = {"count": rates["right"], "total": rates["count"], "rate": rates["accuracy"]}
    accuracy |= {"low": rates["accuracy_low"], "high": rates["accuracy_high"]}
    return [
        (f"{words(mission)['sent']} recall", rates["high_recall"]),
        ("Irrecoverable loss", rates["irrecoverable_loss"]),
        ("Accuracy", accuracy),
    ]


def matrix(confusion: dict[str, dict[str, int]], mission: Mission) -> list[tuple[str, list[dict[str, Any]]]]:
    """Truth -> cells {answer, count, share of the row, lost}. The column "unparsable" is left out if it is empty.

    Lost: a frame to be sent or stored that is dropped. It is deleted on board.
    """
    unparsable = any(row["unparsable"] for row in confusion.values())
    return [
        (
            truth,
            [
                {
                    "answer": answer,
                    "count": count,
                    "share": count / max(1, sum(row.values())),
                    "lost": mission.kept(truth) and answer in mission.that("drop"),
                }
                for answer, count in row.items()
                if answer in mission.names or unparsable
            ],
        )
        for truth, row in confusion.items()
    ]


def wrong_answers(results: dict[str, Any], rows: Sequence[Row]) -> list[WrongAnswer]:
    """Wrong answers under A and B, by falling cost, then by falling confidence.

    An answer without a verdict has the largest cost of its truth. With the flight rule, a blank frame is as the mission
    says.
    """
    places = {row["name"]: row["coordinates"] for row in rows if row["condition"] == "A"}
    mission = mission_of(results)
    costs = dict(zip(mission.names, mission.costs, strict=True))
    flown = flight_model(results) == FLIGHT
    blank = results["blank_frames"] if flown else []
    point = results["operating_point"] if flown else None
    rules = Rules(point["drop_threshold"], appearance=point["appearance"]) if point else Rules()
    outside = results["unlike_frames"] if flown else []
    answered = [prediction_of(row, mission) for row in rows]
    wrong = []
    for row, answer, prediction in zip(rows, answered, as_flown(answered, blank, rules, mission, outside), strict=True):
        predicted = prediction.predicted
        if prediction.condition not in "AB" or predicted == prediction.truth:
            continue
        priced = costs[prediction.truth]
        scores = dict(zip(mission.names, prediction.scores or (), strict=False))
        decision = threshold.decision_of(
            replace(answer, blank=prediction.blank, unlike=prediction.unlike), rules, mission
        )
        asked = Coordinates(**row["coordinates"]) if row["coordinates"] else None
        wrong.append(
            WrongAnswer(
                condition=prediction.condition,
                name=prediction.name,
                image=row["image"],
                place=_place(places.get(prediction.name)),
                truth=prediction.truth,
                predicted=predicted,
                said=answer.predicted,
                decided_by=by_in_words(mission, decision, rules),
                cost=priced[ACTIONS.index(mission.actions[predicted])] if predicted else max(priced),
                confidence=scores.get(predicted, 0.0) if predicted else 0.0,
                scores=scores,
                answer=printable(row["answer"]),
                prompt=render_prompt(mission, asked),
            )
        )
    return sorted(wrong, key=lambda answer: (-answer.cost, -answer.confidence, answer.name, answer.condition))


def flat(values: dict[str, Any], above: str = "") -> list[tuple[str, str]]:
    """Nested values as (dotted name, text), a list in one line."""
    rows = []
    for name, value in values.items():
        if isinstance(value, dict):
            rows += flat(value, f"{above}{name}.")
        else:
            shown = ", ".join(str(part) for part in value) if isinstance(value, list) else str(value)
            rows.append((f"{above}{name}", shown))
    return rows


def _place(place: dict[str, float] | None) -> str:
    if place is None:
        return "no coordinates"
    return f"longitude {format_degrees(place['lon'])}, latitude {format_degrees(place['lat'])}"


def _data_address(picture: bytes | None) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(picture).decode() if picture else ""
