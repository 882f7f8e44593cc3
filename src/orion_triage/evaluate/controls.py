"""Further controls of one variant: what it says of other noise, of other places' pictures, and of a place alike.

Condition C has one noise image, whose answer may be its own. Here are ten others, and pictures of other places. Under
condition D the coordinates are of another category: an answer that changes may follow them, or be confused by any other
coordinates. Those of another place of the same category tell the two apart.

One folder for each variant, beside the evaluations: `controls/VARIANT`, in the same format.
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from orion_triage.dataset.dataset import Dataset
from orion_triage.dataset.records import Record
from orion_triage.errors import OrionError
from orion_triage.evaluate import clusters, variants
from orion_triage.evaluate.backends import Backend
from orion_triage.evaluate.clusters import place_label
from orion_triage.evaluate.conditions import Donor, Question, usable
from orion_triage.evaluate.metrics import Prediction, compare, places_of, summarize, under
from orion_triage.evaluate.run import Row, ask_all, key_of, predictions_of, read_predictions, store
from orion_triage.evaluate.variants import Variant
from orion_triage.imagery.frames import noise_frame
from orion_triage.mission.mission import Mission
from orion_triage.progress import Progress, silent
from orion_triage.runs import manifest
from orion_triage.runs.run import EVALUATE, Run

if TYPE_CHECKING:
    from PIL import Image

VERSION = 1  # of the questions and their images; increase it if either can change
NOISE_IMAGES = 10
SAME, OTHER, NOISE = "same-category", "other-picture", "noise"
_SEED = 42


@dataclass(frozen=True)
class ControlQuestion(Question):
    """The question about `record`'s place; `control` names what is asked, and `shown` is whose picture is shown.

    Without `shown`, the picture is the noise `control`. `donor` is the place of the coordinates if it is another.
    """

    control: str = ""
    shown: Record | None = None

    @property
    def id(self) -> str:
        return f"{self.control}/{self.record.name}"


def questions(records: Sequence[Record], seed: int = _SEED) -> list[ControlQuestion]:
    """All questions, image by image, so that each image is encoded once; depends on the records and the seed only.

    Raises OrionError if a category has only one place.
    """
    ordered = usable(records)
    donors = _places_alike(ordered, seed)
    pictures = _other_pictures(ordered, seed)
    asked = []
    for shown in ordered:
        donor = donors[shown.name]
        asked.append(ControlQuestion("D", shown, shown.image, donor.coordinates, donor, control=SAME, shown=shown))
        asked += [
            ControlQuestion("C", record, shown.image, record.coordinates, control=OTHER, shown=shown)
            for record in ordered
            if pictures[record.name] is shown
        ]
    return asked + [
        ControlQuestion("C", record, noise, record.coordinates, control=noise)
        for noise in noises()
        for record in ordered
    ]


def noises() -> list[str]:
    """The names of the noise images."""
    return [f"{NOISE}-{number:02d}" for number in range(1, NOISE_IMAGES + 1)]


def _label(record: Record) -> str:
    assert record.coordinates is not None
    return place_label(record.coordinates.lon, record.coordinates.lat)


def _next_places(records: Sequence[Record], seed: str) -> dict[str, list[Record]]:
    """Label of a place -> the records of the place after it, in a shuffled circle."""
    of_place: dict[str, list[Record]] = {}
    for record in records:
        of_place.setdefault(_label(record), []).append(record)
    labels = sorted(of_place)
    random.Random(seed).shuffle(labels)
    return {label: of_place[labels[(index + 1) % len(labels)]] for index, label in enumerate(labels)}


def _places_alike(ordered: Sequence[Record], seed: int) -> dict[str, Donor]:
    """Record name -> another place of its category."""
    donors = {}
    for category in ordered[0].mission.names:
        own = [record for record in ordered if record.verdict.category == category]
        following = _next_places(own, f"{seed}/{SAME}/{category}")
        if len(following) == 1:
            raise OrionError(
                f"the controls need the coordinates of a second {category} place, and the split has one.",
                "Evaluate a split with two places or more of each category.",
            )
        for record in own:
            found = following[_label(record)][0]
            assert found.coordinates is not None
            donors[record.name] = Donor(found.name, category, found.coordinates)
    return donors


def _other_pictures(ordered: Sequence[Record], seed: int) -> dict[str, Record]:
    """Record name -> a record of another place, whatever its category, whose picture is shown instead."""
    following = _next_places(ordered, f"{seed}/{OTHER}")
    seen: dict[str, int] = {}
    pictures = {}
    for record in ordered:
        label = _label(record)
        there = following[label]
        pictures[record.name] = there[seen.get(label, 0) % len(there)]
        seen[label] = seen.get(label, 0) + 1
    return pictures


def name_of(variant: Variant) -> str:
    """The name of the evaluation, as of a variant's: `Run.evaluation` has its folder."""
    return f"controls/{variant.name}"


def stage_name(variant: Variant) -> str:
    return EVALUATE + name_of(variant)


def protocol(variant: Variant, mission: Mission) -> dict[str, Any]:
    """The parts of the code that determine the answers; if they change, finished answers are outdated."""
    return variants.protocol(variant, mission) | {"controls": VERSION}


def evaluate(variant: Variant, run: Run, progress: Progress) -> dict[str, Any]:
    """Ask a variant all questions about the run's split; returns the metrics by control."""
    made_from = {"dataset": run.dataset, **variants.inputs(variant, run)}
    identity = [manifest.hash_inputs(made_from), protocol(variant, run.settings.mission)]
    with variants.opened(variant, run, progress) as (backend, said):
        figures = ask(variant, run, backend, json.dumps(identity), progress)
        return figures | said | variants.lost_servers(backend)


def ask(
    variant: Variant, run: Run, backend: Backend, fingerprint: str, progress: Progress = silent
) -> dict[str, dict[str, Any]]:
    """The same with any backend; `fingerprint` identifies the model and the frames."""
    dataset, settings = Dataset(run.dataset, run.settings.mission), run.settings
    size, out_folder = variants.frame_size(variant, settings), run.evaluation(name_of(variant))
    asked = questions(dataset.records(run.split))
    made = {
        name: noise_frame(settings.evaluate.noise, size, seed=number) for number, name in enumerate(noises(), start=1)
    }

    def picture_of(question: Question) -> "Image.Image":
        assert isinstance(question, ControlQuestion)
        return dataset.frame(question.shown, size) if question.shown else made[question.control]

    def more(question: Question) -> Row:
        assert isinstance(question, ControlQuestion)
        return {"control": question.control, "shown": _shown(question)}

    def named(description: str, done: int, total: int) -> None:
        progress(f"{description} the {variant.name} model, controls", done, total)

    key = key_of(fingerprint, asked, settings.evaluate, size)
    rows = ask_all(asked, picture_of, backend, out_folder, key, named, more)
    metrics: dict[str, Any] = {
        control: next(iter(summarize(predictions, dataset.mission).values()))
        for control, predictions in by_control(rows, dataset.mission).items()
    }
    store(out_folder, rows, metrics, {})
    return metrics


def _shown(question: ControlQuestion) -> dict[str, str] | None:
    """Whose picture is shown, and its category; None for noise."""
    record = question.shown
    return {"name": record.name, "category": record.verdict.category} if record else None


def by_control(rows: Sequence[Row], mission: Mission) -> dict[str, list[Prediction]]:
    """Control -> its answers, with their places."""
    found: dict[str, list[Prediction]] = {}
    for row, prediction in zip(rows, predictions_of(rows, mission), strict=True):
        found.setdefault(row["control"], []).append(prediction)
    return found


def finished(run: Run) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """(Variant -> its figures, the variants whose answers are outdated), of the run's split.

    Outdated are answers of another model, dataset or prompt than those under A to D, with which they are compared.
    """
    found: dict[str, dict[str, Any]] = {}
    outdated = []
    for variant in variants.table(run.settings):
        made = manifest.read_manifest(run.evaluation(name_of(variant)))
        main = manifest.read_manifest(run.evaluation(variant.name))
        if made is None:
            continue
        if main is None or made.inputs != main.inputs or made.settings != _with_controls(main.settings):
            outdated.append(variant.name)
            continue
        found[variant.name] = figures_of(run, variant)
    return found, outdated


def _with_controls(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {**settings, "protocol": settings["protocol"] | {"controls": VERSION}}


def figures_of(run: Run, variant: Variant) -> dict[str, Any]:
    """The figures of a variant whose controls and whose conditions A to D are evaluated."""
    mission = run.settings.mission
    rows = read_predictions(run.evaluation(name_of(variant)), mission)
    main = predictions_of(read_predictions(run.evaluation(variant.name), mission), mission)
    return figures(rows, main, mission)


def figures(rows: Sequence[Row], main: Sequence[Prediction], mission: Mission) -> dict[str, Any]:
    """The controls beside the conditions of the protocol (`main`); the schema is in docs/results.md.

    Changes are paired by frame. `distraction` is that from B to coordinates of the same category: it can only be
    confusion. `trust` is that from there to coordinates of another category (D): what the category adds.
    """
    answers = by_control(rows, mission)
    of_noise = {name: answers[name] for name in noises()}
    every = [prediction for predictions in of_noise.values() for prediction in predictions]
    accuracies = {name: sum(p.predicted == p.truth for p in own) / len(own) for name, own in of_noise.items()}
    pictures = [row for row in rows if row["control"] == OTHER]
    alike = answers[SAME]
    as_picture = np.array([row["category"] == row["shown"]["category"] for row in pictures])
    return {
        NOISE: {
            "images": len(of_noise),
            "accuracy": _right(every),
            "lowest": min(accuracies.values()),
            "highest": max(accuracies.values()),
            "by_image": accuracies,
            "answers": {name: sum(p.predicted == name for p in every) / len(every) for name in mission.names},
        },
        OTHER: {
            "as_coordinates": _right(answers[OTHER]),
            "as_picture": clusters.rate(as_picture, places_of(answers[OTHER])),
        },
        SAME: {
            "accuracy": _right(alike),
            "distraction": asdict(compare(under(main, "B"), alike)),
            "trust": asdict(compare(alike, under(main, "D"))),
        },
        "protocol": {condition: _right(under(main, condition)) for condition in "BCD"},
    }


def _right(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Correct answers with their interval over places."""
    return clusters.rate(np.array([p.predicted == p.truth for p in predictions]), places_of(predictions))
