"""Continue a run's adapter with a few labelled frames, and say by cross-validation what the new pair is worth.

The labelled frames are trained in their eight orientations beside the run's own training records, so that nothing is
forgotten. A fold is a whole chain: training, fusing, quantizing, and the pair's decisions as in flight.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orion_triage.dataset.dataset import Dataset
from orion_triage.dataset.labelled import Labelled, refuse_leaks, to_train
from orion_triage.evaluate.adapt import Continued
from orion_triage.evaluate.statistics import Integers
from orion_triage.export import fuse, quantize
from orion_triage.flight.triage import RULES, Flown, triage_with_pair
from orion_triage.imagery.stretch import stretch_of
from orion_triage.models.adapter import WEIGHTS_FILE
from orion_triage.models.load import resolve_base
from orion_triage.progress import Progress, silent
from orion_triage.safe.files import sha256_of_file, sha256_of_text, temporary_folder, write_text
from orion_triage.safe.reading import read_object
from orion_triage.settings import FineTuneSettings, Settings
from orion_triage.train import fine_tune

if TYPE_CHECKING:
    from orion_triage.runs.run import Run

# Of the run's own learning rate, which its training had at the beginning, and no longer at the end.
LEARNING_RATE_SHARE = 0.5
EPOCHS = 1
# All of the run's own frames. A quarter of them takes a third of the time, and forgets: on 24 real frames the shipped
# run fell from 57 to 45 of its own 60 test frames, and with all of them stayed at 58 (docs/camera.md).
REPLAY = 1.0
CHECK_RECORDS = 6  # of a fold's merge; that of the continued run is checked like any other
FOLDS_FOLDER = "adapt_folds"
FIGURES_FILE = "adapted.json"  # in the folder of the continued run


def settings_of(before: FineTuneSettings, changes: Mapping[str, Any] | None = None) -> FineTuneSettings:
    """The settings of a training that continues one with the settings `before`: shorter, and slower."""
    rate = LEARNING_RATE_SHARE * before.learning_rate
    default = {"learning_rate": rate, "epochs": EPOCHS, "replay": REPLAY}
    own = before.model_dump() | default | {"continue_from": None, "frames": None} | dict(changes or {})
    return FineTuneSettings.model_validate(own)


def run_beside(run: "Run", frames: Path) -> "Run":
    """The run NAME-continued beside it, which continues its adapter with the frames of this folder."""
    changes = {"continue_from": str(run.folder), "frames": str(frames)}
    settings = run.settings.model_copy(update={"fine_tune": settings_of(run.settings.fine_tune, changes)})
    return replace(run, folder=run.folder.with_name(f"{run.folder.name}-continued"), settings=settings)


def _trained_pair(
    run: "Run",
    dataset: Dataset,
    frames: Sequence[Labelled],
    folder: Path,
    settings: FineTuneSettings,
    progress: Progress,
) -> Path:
    """The GGUF pair, in `folder`, of the run's adapter continued with these frames; of the run's opened dataset."""
    base, size = resolve_base(run.settings.base.model), run.settings.base.frame_size
    adapter, merged = folder / "adapter", folder / "merged"
    fine_tune.run(
        base, dataset, adapter, folder / "work", settings, size, progress, labelled=frames, parent=run.adapter
    )
    fusing = run.settings.fuse.model_copy(update={"check_records": CHECK_RECORDS})
    fuse.run(base, adapter, dataset, merged, fusing, size, progress)
    texts = sorted({record.user_text for record in dataset.every_record()})
    quantize.run(
        merged,
        folder / "gguf",
        run.settings.quantize,
        user_texts=texts,
        training=(dataset, size),
        progress=progress,
    )
    return folder / "gguf"


def decided(pair: Path, settings: Settings, frames: Sequence[Labelled], log: Path) -> list[str | None]:
    """What the pair decides about each frame, as in flight; no threshold, which is another pair's."""
    flown = Flown(str(pair), pair, settings.mission, settings.base.frame_size, stretch_of(settings.dataset), RULES, log)
    outcomes = triage_with_pair([frame.path for frame in frames], flown, resize=True)
    return [outcome.verdict.category if outcome.verdict else None for outcome in outcomes]


def out_of_fold(
    run: "Run",
    frames: Sequence[Labelled],
    folds: Sequence[Integers],
    settings: FineTuneSettings | None = None,
    progress: Progress = silent,
    name: str = "fold",
) -> Continued:
    """What pairs that have not seen a frame decide about it: one training per fold, from the run's adapter.

    None about a frame that is in no fold. A finished fold leaves a file in the run's folder, so that an interrupted
    cross-validation can be resumed.
    """
    settings, folder = settings or settings_of(run.settings.fine_tune), run.folder / FOLDS_FOLDER
    dataset = Dataset(run.dataset, run.settings.mission)  # one for all folds: frames are decoded once
    refuse_leaks(frames, dataset)
    said: list[str | None] = [None] * len(frames)
    for number, held_out in enumerate(folds):
        shown = set(held_out.tolist())
        known = [frame for index, frame in enumerate(frames) if index not in shown]
        asked = [frames[int(index)] for index in held_out]
        path, identity = folder / f"{name}-{number}.json", _identity(run, known, asked, settings)
        if not path.is_file() or read_object(path).get("of") != identity:
            folder.mkdir(parents=True, exist_ok=True)
            with temporary_folder(folder, "fold") as temporary:
                pair = _trained_pair(run, dataset, known, temporary, settings, progress)
                answers = decided(pair, run.settings, asked, temporary / "server.log")
            write_text(path, json.dumps({"of": identity, "answers": answers}) + "\n")
        for index, answer in zip(held_out, read_object(path)["answers"], strict=True):
            said[int(index)] = answer
        progress("trainings of the cross-validation", number + 1, len(folds))
    return Continued(said, folds)


def _identity(run: "Run", known: Sequence[Labelled], asked: Sequence[Labelled], settings: FineTuneSettings) -> str:
    """A hash of all that decides a fold's answers."""
    mission, size = run.settings.mission, run.settings.base.frame_size
    return sha256_of_text(
        json.dumps(
            [
                sha256_of_file(run.adapter / WEIGHTS_FILE),
                settings.model_dump(mode="json"),
                fine_tune.identity(*to_train(known, mission, size)),
                fine_tune.identity(*to_train(asked, mission, size)),
            ]
        )
    )
