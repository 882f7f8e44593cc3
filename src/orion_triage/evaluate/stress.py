"""The flight pair's answers to stressed frames (imagery/stress.py), compared with those to the frames as they are.

One folder for each stress, beside the evaluations of the variants: `stress/NAME`, in the same format. A question is
that of condition B, because frames have no coordinates in flight. Frames are stressed at the camera's size and then
shrunk; the blank rule sees the stressed frame, as on board.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from orion_triage.dataset.dataset import Dataset
from orion_triage.dataset.records import Record
from orion_triage.evaluate import value, variants
from orion_triage.evaluate.backends import Backend
from orion_triage.evaluate.clusters import place_label
from orion_triage.evaluate.conditions import Condition, Question
from orion_triage.evaluate.judgement import guess_of, headline_of
from orion_triage.evaluate.metrics import Prediction, change_of, places_of, summarize
from orion_triage.evaluate.run import Row, ask_all, key_of, prediction_of, read_predictions, store
from orion_triage.evaluate.statistics import holm
from orion_triage.imagery.frames import CAMERA_SIZE, appearance, looks_blank, shrink
from orion_triage.imagery.stress import STRENGTHS, STRESSES, Strength, Stress, stressed
from orion_triage.mission.mission import Mission
from orion_triage.mission.prompt import Coordinates
from orion_triage.progress import Progress, silent
from orion_triage.runs import manifest
from orion_triage.runs.run import EVALUATE, Run
from orion_triage.settings import Settings

if TYPE_CHECKING:
    from PIL import Image

CONDITION: Condition = "B"  # in flight, the prompt has no coordinates
RATES = ("high_recall", "irrecoverable_loss")
WORST = 3  # that the report names


def name_of(stress: Stress) -> str:
    """The name of its evaluation, as of a variant's: `Run.evaluation` has its folder."""
    return f"stress/{stress.name}"


@dataclass(frozen=True)
class StressedQuestion(Question):
    """The question of condition B about a stressed frame."""

    strength: Strength = "mild"

    @property
    def id(self) -> str:
        return f"{self.strength}/{self.record.name}"


def questions(records: Iterable[Record]) -> list[StressedQuestion]:
    """The frames at each strength, frames in the order of their names."""
    ordered = sorted(records, key=lambda record: record.name)
    return [
        StressedQuestion(CONDITION, record, record.image, None, strength=strength)
        for strength in STRENGTHS
        for record in ordered
    ]


def stage_name(stress: Stress) -> str:
    return EVALUATE + name_of(stress)


def protocol(stress: Stress, settings: Settings) -> dict[str, Any]:
    """The parts of the code that determine the answers; if they change, finished answers are outdated."""
    flown = variants.protocol(variants.named(settings, variants.CONSTRAINED), settings.mission)
    return flown | {"stress": stress.to_json()}


def evaluate(stress: Stress, run: Run, progress: Progress) -> dict[str, Any]:
    """Ask the run's pair about all frames of its split under one stress; returns the metrics by strength."""
    how = {"dataset": run.dataset, "model": run.pair}
    identity = [manifest.hash_inputs(how), protocol(stress, run.settings)]
    flown = variants.named(run.settings, variants.CONSTRAINED)
    with variants.opened(flown, run, progress) as (backend, said):
        figures = ask(stress, run, backend, json.dumps(identity), progress)
        return figures | said | variants.lost_servers(backend)


def ask(
    stress: Stress, run: Run, backend: Backend, fingerprint: str, progress: Progress = silent
) -> dict[str, dict[str, Any]]:
    """The same with any backend; `fingerprint` identifies the model, the frames and the stress."""
    dataset, settings = Dataset(run.dataset, run.settings.mission), run.settings
    size, out_folder = settings.base.frame_size, run.evaluation(name_of(stress))
    asked = questions(dataset.records(run.split))
    seen: dict[str, dict[str, float]] = {}

    def picture_of(question: Question) -> "Image.Image":
        assert isinstance(question, StressedQuestion)
        frame = dataset.frame(question.record, CAMERA_SIZE)
        changed = stressed(frame, stress, question.strength, question.record.name)
        seen[question.id] = appearance(changed)
        return shrink(changed, size)

    def more(question: Question) -> Row:
        assert isinstance(question, StressedQuestion)
        name, strength = stress.name, question.strength
        measures = seen[question.id]
        of_frame = {"blank": looks_blank(measures), "appearance": measures}
        return {"stress": name, "strength": strength, "value": stress.value(strength), **of_frame}

    def named(description: str, done: int, total: int) -> None:
        progress(f"{description} the pair under {stress.name}", done, total)

    key = key_of(fingerprint, asked, settings.evaluate, size)
    rows = ask_all(asked, picture_of, backend, out_folder, key, named, more)
    metrics: dict[str, Any] = {
        strength: summarize([prediction_of(row, dataset.mission) for row in of_strength], dataset.mission)[CONDITION]
        for strength, of_strength in by_strength(rows).items()
    }
    store(out_folder, rows, metrics, {})
    return metrics


def by_strength(rows: Iterable[Row]) -> dict[Strength, list[Row]]:
    """The rows of each strength."""
    rows = list(rows)
    return {strength: [row for row in rows if row["strength"] == strength] for strength in STRENGTHS}


def finished(run: Run, unstressed: manifest.Manifest) -> tuple[dict[str, dict[Strength, list[Row]]], list[str]]:
    """(Stress -> strength -> answers, the stresses whose answers are outdated).

    Outdated are answers of another pair, dataset or prompt than those of `unstressed`, the manifest of the evaluation
    that they are compared with, and those to frames that the stress of today would make otherwise.
    """
    found: dict[str, dict[Strength, list[Row]]] = {}
    outdated = []
    for stress in STRESSES:
        folder = run.evaluation(name_of(stress))
        made = manifest.read_manifest(folder)
        if made is None:
            continue
        expected = unstressed.settings["protocol"] | {"stress": stress.to_json()}
        if made.inputs != unstressed.inputs or made.settings != {**unstressed.settings, "protocol": expected}:
            outdated.append(stress.name)
            continue
        found[stress.name] = by_strength(read_predictions(folder, run.settings.mission))
    return found, outdated


def compare(
    decided: Mapping[str, Mapping[Strength, Sequence[Prediction]]],
    unstressed: Sequence[Prediction],
    places: Mapping[str, Coordinates],
    mission: Mission,
) -> list[dict[str, Any]]:
    """One row for each stress and strength: parameter, blank frames, downlink, the two main rates with their changes.

    `decided` and `unstressed` are the decisions as flown (condition B) on the same frames. A change is paired by frame:
    `more` and `fewer` frames that count for the rate than without the stress, their `difference` as a share with its
    95 % interval, the exact p of McNemar's test, and `holm_p`, corrected for all rows.
    """
    stresses = {stress.name: stress for stress in STRESSES}
    rows: list[dict[str, Any]] = []
    for name, of_strength in decided.items():
        for strength, answers in of_strength.items():
            stress, headline = stresses[name], rates_of(answers, places, mission)
            changes = {rate: paired(rate, unstressed, _placed(answers, places), mission) for rate in RATES}
            rows.append(
                {
                    "stress": name,
                    "strength": strength,
                    "parameter": stress.parameter,
                    "value": stress.value(strength),
                    "shown": stress.shown(strength),
                    "blank": sum(answer.blank for answer in answers),
                    "no_verdict": headline["no_verdict"],
                    "downlink": headline["downlink"],
                    **{rate: headline[rate] | {"change": changes[rate]} for rate in RATES},
                }
            )
    for rate in RATES:
        tested = {str(number): row[rate]["change"] for number, row in enumerate(rows) if row[rate]["change"]}
        corrected = holm({number: change["exact_p"] for number, change in tested.items()})
        for number, change in tested.items():
            change["holm_p"] = corrected[number]
    return rows


def rates_of(answers: Sequence[Prediction], places: Mapping[str, Coordinates], mission: Mission) -> dict[str, Any]:
    """The main rates, and the shares that are sent, stored and dropped: a model that sends everything loses nothing."""
    guess = guess_of([answer.predicted for answer in answers], mission)
    return {**headline_of(_placed(answers, places), mission), "downlink": value.downlink(guess, mission)}


def _placed(answers: Sequence[Prediction], places: Mapping[str, Coordinates]) -> list[Prediction]:
    """The answers with their places, which questions without coordinates do not have."""
    named = {name: place_label(place.lon, place.lat) for name, place in places.items()}
    return [replace(answer, place=named.get(answer.name, "")) for answer in answers]


def paired(
    rate: str, before: Sequence[Prediction], after: Sequence[Prediction], mission: Mission
) -> dict[str, Any] | None:
    """The paired change of a rate over the places of `after`; None if no frame counts for it.

    `before` and `after` have the same frames.
    """

    def counts(answers: Sequence[Prediction]) -> dict[str, bool]:
        if rate == "high_recall":
            wanted = mission.that("send")
            return {p.name: p.predicted in wanted for p in answers if p.truth in wanted}
        return {p.name: p.predicted in mission.that("drop") for p in answers if mission.kept(p.truth)}

    then, now = counts(before), counts(after)
    if not then:
        return None
    places = [place for p, place in zip(after, places_of(after), strict=True) if p.name in now]
    change = change_of([int(now[p.name]) - int(then[p.name]) for p in after if p.name in now], places)
    return {
        "more": change.gained, "fewer": change.lost, "difference": change.points / 100, "low": change.low,
        "high": change.high, "exact_p": change.exact_p,
    }  # fmt: skip


def worst(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with the largest irrecoverable loss, the worst first; none that loses nothing more than without."""
    losing = [row for row in rows if (change := row["irrecoverable_loss"]["change"]) and change["difference"] > 0]
    return sorted(losing, key=lambda row: -row["irrecoverable_loss"]["rate"])[:WORST]


def seconds_per_answer(run: Run) -> float | None:
    """The most that one answer takes: as measured under a stress of this run, or else without one; None before both.

    Without stress, four answers share an image, which each stressed frame has to itself: their seconds by image.
    """
    for stress in STRESSES:
        folder = run.evaluation(name_of(stress))
        if made := manifest.read_manifest(folder):
            rows = read_predictions(folder, run.settings.mission)
            return max(made.seconds, _asked_seconds(rows)) / len(rows)  # a resumed one measured only its last part
    folder = run.evaluation(variants.CONSTRAINED)
    if manifest.read_manifest(folder) is None:
        return None
    rows = read_predictions(folder, run.settings.mission)
    return _asked_seconds(rows) / len({row["image"] for row in rows})


def _asked_seconds(rows: Sequence[Row]) -> float:
    return float(sum(row["seconds"] for row in rows))
