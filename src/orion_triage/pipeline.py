"""The stages in order; a stage whose manifest still matches its settings and inputs is skipped."""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orion_triage import hub, processes
from orion_triage.dataset.dataset import Dataset
from orion_triage.errors import OrionError
from orion_triage.evaluate import controls, variants
from orion_triage.evaluate import stress as stresses
from orion_triage.evaluate.variants import Variant
from orion_triage.imagery.camera import camera_file, load_camera
from orion_triage.imagery.stress import STRESSES, Stress, chosen
from orion_triage.machine import rates
from orion_triage.machine.describe import machine_name
from orion_triage.mission.contract import contract_of, contract_sha256, require_mission, write_mission
from orion_triage.mission.mission import Mission, default_mission
from orion_triage.models.load import base_name, resolve_base
from orion_triage.progress import Progress, silent
from orion_triage.runs import manifest
from orion_triage.runs.run import EVALUATE, WORK_FOLDER, Run, adapter_in, running
from orion_triage.safe.files import replaced_folder
from orion_triage.settings import QuantizeSettings, Settings

if TYPE_CHECKING:
    from orion_triage.dataset.labelled import Labelled
    from orion_triage.publish.card import Product

Figures = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """One stage: a change of `settings` or `inputs` makes it run again; `run` fills its folder.

    With `card`, that product's model card and the base's licence are written into the folder.
    """

    name: str
    settings: tuple[str, ...]  # the sections that it depends on
    inputs: Callable[[Run], dict[str, Path]]
    run: Callable[[Run, Progress], Figures]
    card: "Product | None" = None
    protocol: dict[str, Any] | None = None  # of an evaluation: the parts of the code that determine the answers
    in_parallel: bool = False  # whether several launched processes can share the work

    def folder(self, run: Run) -> Path:
        return run.product(self.name)

    def settings_of(self, settings: Settings) -> Figures:
        sections = settings.model_dump(mode="json", include=set(self.settings))
        # Values, costs and actions of a mission change no product; products of before are of the published mission.
        if contract_sha256(settings.mission) != contract_sha256(default_mission()):
            sections["mission"] = contract_of(settings.mission)
        # Settings that are empty leave datasets and adapters current that were made before they existed.
        for section in {"dataset", "fine_tune"} & sections.keys():
            sections[section] = {key: value for key, value in sections[section].items() if value is not None}
        # So do those that came later, at their defaults.
        if "quantize" in sections:
            later = QuantizeSettings().model_dump(exclude={"type"}).items()
            sections["quantize"] = dict(sections["quantize"].items() - later)
        return sections | ({"protocol": self.protocol} if self.protocol else {})


def _dataset(run: Run, progress: Progress) -> Figures:
    from orion_triage.dataset import build

    return build.run(run.dataset, run.settings.dataset, run.settings.mission, progress=progress)


def _fine_tune(run: Run, progress: Progress) -> Figures:
    from orion_triage.dataset.check.soundness import require_sound
    from orion_triage.dataset.labelled import refuse_leaks
    from orion_triage.train import fine_tune

    found = require_sound(run.dataset, run.settings.mission, progress=progress) if processes.is_main() else None
    settings, dataset = run.settings, Dataset(run.dataset, run.settings.mission)
    labelled, notes = labelled_frames(settings)
    refuse_leaks(labelled, dataset)
    figures = fine_tune.run(
        _base(run),
        dataset,
        run.adapter,
        run.folder / WORK_FOLDER,
        settings.fine_tune,
        settings.base.frame_size,
        progress,
        labelled=labelled,
        parent=_parent(run),
    )
    return figures | {"warnings": [*(found.summary() if found else []), *notes]}


def labelled_frames(settings: Settings) -> "tuple[list[Labelled], list[str]]":
    """(The labelled frames that the settings train with, what of their folder is left out or converted in words.)"""
    from orion_triage.dataset.labelled import read_labelled
    from orion_triage.imagery.stretch import stretch_of

    if not settings.fine_tune.frames:
        return [], []
    folder = Path(settings.fine_tune.frames)
    frames, notes = read_labelled(folder, settings.mission, stretch_of(settings.dataset))
    return frames, [f"{folder}: {note}" for note in notes]


def _parent(run: Run) -> Path | None:
    """The adapter that the training continues; raises OrionError if it is the one that it would replace."""
    if not (name := run.settings.fine_tune.continue_from):
        return None
    if (folder := adapter_in(name)).resolve() == run.adapter.resolve():
        raise OrionError(
            f"fine_tune.continue_from={name} is the adapter that this training would replace.",
            "Name another run folder with --run.",
        )
    return folder


def _fuse(run: Run, progress: Progress) -> Figures:
    from orion_triage.export import fuse

    settings, adapter = run.settings, run.adapter_to_fuse
    size = settings.base.frame_size
    return fuse.run(
        _base(run), adapter, Dataset(run.dataset, run.settings.mission), run.merged, settings.fuse, size, progress
    )


def _quantize(run: Run, progress: Progress) -> Figures:
    from orion_triage.export import quantize

    dataset, settings = Dataset(run.dataset, run.settings.mission), run.settings
    texts = sorted({record.user_text for record in dataset.every_record()})
    return quantize.run(
        run.merged,
        run.gguf,
        settings.quantize,
        user_texts=texts,
        training=(dataset, settings.base.frame_size),
        progress=progress,
    )


def _vision_features(run: Run, progress: Progress) -> Figures:
    from orion_triage.evaluate import features

    return features.run(
        _base(run),
        Dataset(run.dataset, run.settings.mission),
        run.vision_features,
        run.settings.base.frame_size,
        progress,
    )


def _base(run: Run) -> Path:
    return resolve_base(run.settings.base.model)


def _write_card(product: "Product", run: Run, folder: Path) -> None:
    """Write the model card into the product's folder; the pair's base and licence are those of the merged model."""
    from orion_triage.models.licence import base_of
    from orion_triage.publish.card import write_card

    mission = run.settings.mission
    write_mission(folder, mission)
    if product == "gguf":
        write_card(product, run.merged, base_of(run.merged) or run.merged.name, folder, mission)
    else:
        write_card(product, _base(run), base_name(_base(run)), folder, mission)


def _dataset_inputs(run: Run) -> dict[str, Path]:
    from importlib import resources

    seen = _camera_input(run.settings.dataset.camera)
    if folder := run.settings.dataset.folder:
        return {"dataset": hub.locate(folder, "dataset"), **seen}
    own = run.settings.dataset.catalogue or run.settings.mission.places
    shipped = Path(str(resources.files("orion_triage.dataset") / "catalogue.csv"))
    return {"catalogue": Path(own) if own else shipped, **seen}


def _camera_input(name: str | None) -> dict[str, Path]:
    return {"camera": camera_file(name)} if name else {}


def _of_base_and_dataset(run: Run) -> dict[str, Path]:
    return {"base": _base(run), "dataset": run.dataset}


def _of_training(run: Run) -> dict[str, Path]:
    folders = {"adapter": _parent(run), "frames": _labelled_folder(run.settings.fine_tune.frames)}
    given = {name: folder for name, folder in folders.items() if folder}
    return _of_base_and_dataset(run) | _camera_input(run.settings.fine_tune.camera) | given


def _labelled_folder(name: str | None) -> Path | None:
    return Path(name) if name else None


def _of_adapter(run: Run) -> dict[str, Path]:
    return {"base": _base(run), "adapter": run.adapter_to_fuse, "dataset": run.dataset}


def _of_merged(run: Run) -> dict[str, Path]:
    return {"merged": run.merged, "dataset": run.dataset}


DATASET = Stage("dataset", ("dataset",), _dataset_inputs, _dataset)
FINE_TUNE = Stage("fine-tune", ("base", "fine_tune"), _of_training, _fine_tune, "adapter", in_parallel=True)
FUSE = Stage("fuse", ("base", "fuse"), _of_adapter, _fuse, "merged")
QUANTIZE = Stage("quantize", ("quantize",), _of_merged, _quantize, "gguf")
VISION_FEATURES = Stage("vision features", ("base",), _of_base_and_dataset, _vision_features)
MAKING = (DATASET, FINE_TUNE, FUSE, QUANTIZE, VISION_FEATURES)


def evaluation(variant: Variant, mission: Mission) -> Stage:
    """The stage that asks one variant all questions of the run's split."""
    return Stage(
        EVALUATE + variant.name,
        ("base", "evaluate"),
        lambda run: variants.inputs(variant, run) | {"dataset": run.dataset},
        partial(variants.evaluate, variant),
        protocol=variants.protocol(variant, mission),
        in_parallel=variant.in_parallel,
    )


def stress_evaluation(stress: Stress, settings: Settings) -> Stage:
    """The stage that asks the pair about the split's frames under one stress."""
    return Stage(
        stresses.stage_name(stress),
        ("base", "evaluate"),
        lambda run: {"gguf": run.pair, "dataset": run.dataset},
        partial(stresses.evaluate, stress),
        protocol=stresses.protocol(stress, settings),
    )


def controls_evaluation(variant: Variant, mission: Mission) -> Stage:
    """The stage that asks a variant the further controls."""
    return replace(
        evaluation(variant, mission),
        name=controls.stage_name(variant),
        run=partial(controls.evaluate, variant),
        protocol=controls.protocol(variant, mission),
    )


def stages(settings: Settings) -> tuple[Stage, ...]:
    """All stages of a run in order; each model is evaluated as soon as it exists."""
    evaluated = [evaluation(variant, settings.mission) for variant in variants.wanted(settings)]
    base, *others = evaluated
    of_the_adapter = [VISION_FEATURES] if settings.variants.all else []
    return (DATASET, base, FINE_TUNE, FUSE, QUANTIZE, *of_the_adapter, *others)


def stage_named(name: str, settings: Settings) -> Stage:
    """A stage by its name; raises OrionError for the evaluation of an unknown variant."""
    if name.startswith(EVALUATE):
        return evaluation(variants.named(settings, name.removeprefix(EVALUATE)), settings.mission)
    return next(stage for stage in MAKING if stage.name == name)


def evaluate_servers(run: Run, urls: Sequence[str], progress: Progress = silent) -> manifest.Manifest:
    """The evaluation of the model of third-party servers, beside those of the run; their key is LLAMA_API_KEY."""
    evaluate, identity = variants.through_servers(urls, run)
    inputs = {"server": identity, **manifest.hash_inputs({"dataset": run.dataset})}
    stage = stage_named(EVALUATE + variants.SERVER, run.settings)
    return _do(replace(stage, run=lambda _, progress: evaluate(progress)), run, inputs, progress)


def is_current(stage: Stage, run: Run) -> bool:
    """Whether the stage is finished, and its product is unchanged and made from the run's current inputs."""
    try:
        inputs = manifest.hash_inputs(stage.inputs(run))
    except OrionError:  # an input is missing
        return False
    return manifest.is_current(stage.folder(run), settings=stage.settings_of(run.settings), inputs=inputs)


@dataclass(frozen=True)
class Forecast:
    """A stage before a run starts: whether it is skipped, or how long it takes as measured (None: not known)."""

    stage: str
    skipped: bool
    measured: rates.Measured | None = None


def forecast(run: Run) -> list[Forecast]:
    """The stages of the run in order, before any of them starts; reads all finished products, and changes nothing.

    A stage is to be done if it is not current or is made from something that will be made again. If that comes out the
    same, the run skips it after all.
    """
    machine = machine_name()
    remade: set[Path] = set()
    counts: rates.Counts | None = None
    planned = []
    for stage in stages(run.settings):
        try:
            skipped = is_current(stage, run) and remade.isdisjoint(stage.inputs(run).values())
        except OrionError:  # a damaged manifest, which the stage reports
            skipped = False
        if stage is DATASET:
            counts = rates.counts_of(run) if skipped else None
        if skipped:
            planned.append(Forecast(stage.name, True))
            continue
        remade.add(stage.folder(run))
        seconds = rates.measured(stage.name, stage.settings_of(run.settings), machine, run, counts)
        planned.append(Forecast(stage.name, False, seconds))
    return planned


def take_dataset(source: Run, target: Run) -> None:
    """Copy the dataset of a run into one with the same settings for it, unless it has one."""
    if not target.dataset.exists():
        with replaced_folder(target.dataset) as folder:
            shutil.copytree(source.dataset, folder, dirs_exist_ok=True)


@processes.naming_lost_peer()
def run_stage(
    stage: Stage, run: Run, *, progress: Progress = silent, force: bool = False
) -> tuple[manifest.Manifest, bool]:
    """Run one stage unless its manifest still matches; returns the manifest and whether it was skipped."""
    folder = stage.folder(run)
    settings = stage.settings_of(run.settings)
    inputs = manifest.hash_inputs(stage.inputs(run))
    current = not force and manifest.is_current(folder, settings=settings, inputs=inputs)
    processes.wait()  # every process must have read the manifest before rank 0 writes
    if current:
        stage_manifest = manifest.read_manifest(folder)
        assert stage_manifest is not None
        return stage_manifest, True
    if processes.count() > 1 and not stage.in_parallel:
        raise OrionError(
            f"stage {stage.name} runs in one process, but {processes.count()} were launched.",
            "Launch several processes only for 'orion fine-tune', 'orion ablation' and 'orion evaluate'.",
        )
    for name, path in stage.inputs(run).items():
        # No stage reads the F16 files after the quantization unless they fly, so a pair without them is complete.
        stage_manifest = manifest.read_manifest(path) if name != "gguf" and path.is_dir() else None
        if (
            stage_manifest
            and stage_manifest.removed
            and not all((path / file).is_file() for file in stage_manifest.removed)
        ):
            raise OrionError(
                f"{stage.name} needs {path}, of which 'orion clean' removed {len(stage_manifest.removed)} files.",
                f"Run 'orion {stage_manifest.stage} --force' first to make it again.",
            )
    return _do(stage, run, inputs, progress), False


def _do(stage: Stage, run: Run, inputs: dict[str, str], progress: Progress) -> manifest.Manifest:
    """Run a stage and write its manifest.

    Every stage replaces its folder when the new one is complete, manifest excepted: a stage that is refused or
    interrupted leaves the finished product of before, with its manifest.
    """
    folder = stage.folder(run)
    with running(run, stage.name):
        began = time.monotonic()
        for name in ("dataset", "adapter", "merged", "gguf") if stage is not DATASET else ():
            if path := stage.inputs(run).get(name):
                require_mission(path, run.settings.mission)
                if name == "dataset":
                    Dataset(path, run.settings.mission).require_as_made()
        figures = stage.run(run, progress)
        if stage.card and processes.is_main():
            _write_card(stage.card, run, folder)
        processes.wait()
        return manifest.write_manifest(
            folder,
            stage=stage.name,
            settings=stage.settings_of(run.settings),
            inputs=inputs,
            seconds=time.monotonic() - began,
            figures=figures,
            machine=machine_name(),
        )


def check_inputs(run: Run) -> None:
    """Check the external inputs (base and places) before the first stage, which takes minutes.

    Raises OrionError.
    """
    from orion_triage.dataset import build

    _base(run)
    chosen(run.settings.fine_tune.augment or ())
    for camera in (run.settings.dataset.camera, run.settings.fine_tune.camera):
        if camera:
            load_camera(camera)
    _parent(run)
    labelled_frames(run.settings)
    if build.published_folder(run.settings.dataset) is None:
        build.plan(run.settings.dataset, run.settings.mission)


def verify(run: Run) -> dict[str, list[str]]:
    """Finished stage -> differences between its files and its manifest; reads all files from the disk."""
    mission, table = run.settings.mission, variants.table(run.settings)
    evaluated = [make(variant, mission) for make in (evaluation, controls_evaluation) for variant in table]
    every = (*MAKING, *evaluated, *(stress_evaluation(stress, run.settings) for stress in STRESSES))
    return {
        stage.name: manifest.damaged(folder)
        for stage in every
        if (folder := stage.folder(run)).is_dir() and manifest.read_manifest(folder)
    }


def clean(run: Run) -> int:
    """Delete large files that the flight does not need and that stages can make again; returns the bytes freed.

    Deletes the frames, the merged weights, F16 files that do not fly and the training's checkpoints. Keeps the flight
    pair, the adapter, and all manifests, splits, answers and reports. A later run skips finished stages.
    """
    from orion_triage.dataset.records import IMAGES_FOLDER
    from orion_triage.export import quantize

    if manifest.read_manifest(run.gguf) is None:
        raise OrionError(f"{run.folder} has no finished flight pair.", "Run 'orion run' first.")
    pair = quantize.check_pair(run.gguf)
    # First delete files that need no change of a manifest: the disk may be too full to write one.
    work = run.folder / WORK_FOLDER / "checkpoints"
    freed = sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
    shutil.rmtree(work, ignore_errors=True)
    freed += manifest.remove_outputs(run.dataset, lambda name: name.startswith(IMAGES_FOLDER))
    freed += manifest.remove_outputs(run.merged, lambda name: name.endswith(".safetensors"))
    made_beside = {quantize.F16, quantize.MMPROJ} - set(pair.names)
    freed += manifest.remove_outputs(run.gguf, lambda name: name in made_beside)
    return freed
