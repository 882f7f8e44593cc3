"""One run: its folder, its settings, and where each stage's product lies in it."""

import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ValidationError

from orion_triage import __version__, hub, processes
from orion_triage.errors import OrionError
from orion_triage.runs import manifest
from orion_triage.safe.files import locked, write_text
from orion_triage.safe.reading import read_object
from orion_triage.settings import DatasetSettings, Settings, Split

SETTINGS_FILE = "settings.json"
WORK_FOLDER = "fine_tune_work"


@dataclass(frozen=True)
class Run:
    """A run folder, its settings, the split that is evaluated, and where each stage's product lies.

    `adapter_from` and `pair_from` stand in for the run's own adapter or GGUF pair: a folder or a Hub id.
    """

    folder: Path
    settings: Settings
    split: Split = "test"
    adapter_from: str = ""
    pair_from: str = ""

    @property
    def dataset(self) -> Path:
        return self.folder / "dataset"

    @property
    def adapter(self) -> Path:
        return self.folder / "orion_lora_weights"

    @property
    def adapter_to_fuse(self) -> Path:
        return hub.locate(self.adapter_from, "adapter") if self.adapter_from else self.adapter

    @property
    def merged(self) -> Path:
        return self.folder / "orion_merged"

    @property
    def gguf(self) -> Path:
        return self.folder / "gguf"

    @property
    def pair(self) -> Path:
        return hub.locate(self.pair_from, "GGUF pair") if self.pair_from else self.gguf

    @property
    def vision_features(self) -> Path:
        return self.folder / "vision_features"

    def evaluation(self, variant: str) -> Path:
        return self.folder / "evaluation" / self.split / variant

    def product(self, stage: str) -> Path:
        """The folder that a stage fills, by the stage's name; "evaluate NAME" is the evaluation of a variant."""
        if stage.startswith(EVALUATE):
            return self.evaluation(stage.removeprefix(EVALUATE))
        return {
            "dataset": self.dataset,
            "fine-tune": self.adapter,
            "fuse": self.merged,
            "quantize": self.gguf,
            "vision features": self.vision_features,
        }[stage]


EVALUATE = "evaluate "  # what the name of an evaluation's stage begins with


def held(run: Run, name: str) -> AbstractContextManager[None]:
    """The run's folder, for this command alone; of processes launched together, the first one holds it for all."""
    return locked(run.folder, f"orion {name}") if processes.is_main() else nullcontext()


def prepare(run: Run) -> None:
    """Create the run folder and write down the settings."""
    with held(run, "prepare"):
        write_text(run.folder / SETTINGS_FILE, run.settings.model_dump_json(indent=2) + "\n")


def with_its_dataset(run: Run) -> Run:
    """The run with the dataset settings that its folder was last used with, whatever version wrote them.

    Whoever built a dataset from imagery and goes on without naming it again does not want it drawn over. Raises
    OrionError when the folder's dataset settings cannot be read.
    """
    path = run.folder / SETTINGS_FILE
    try:
        before = read_object(path)
        if before.get("preset") != run.settings.preset:
            return run
        dataset = DatasetSettings.model_validate_json(json.dumps(before["dataset"]))
    except FileNotFoundError:
        return run
    except (KeyError, ValidationError):
        raise OrionError(
            f"{path} does not say where the run's dataset comes from.",
            "Name it (--dataset FOLDER, or --source NAME), or choose another folder with --run.",
        ) from None
    return replace(run, settings=run.settings.model_copy(update={"dataset": dataset}))


def open_run(folder: Path, split: Split = "test") -> Run:
    """A run that exists, with the settings it was made with."""
    path = folder / SETTINGS_FILE
    try:
        settings = Settings.model_validate_json(path.read_bytes())  # which need not be UTF-8
    except FileNotFoundError:
        raise OrionError(f"{path} does not exist.", "Pass the folder of a run: --run FOLDER.") from None
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"]) or "JSON"
        raise OrionError(
            f"{path} was written by another version of ORION triage, or changed: {place}: {problem['msg']}.",
            f"Run 'orion run --run {folder}' with version {__version__}: it keeps the dataset and repeats only "
            "stages that no longer match.",
        ) from None
    return Run(folder, settings, split)


def newest_run(runs: Path, stage: str) -> Path:
    """The folder in `runs` in which `stage` was finished last."""
    product = Run(Path(), Settings()).product(stage)
    finished = [
        (stage_manifest.stat().st_mtime, folder)
        for folder in (runs.iterdir() if runs.is_dir() else [])
        if (stage_manifest := folder / product / manifest.FILE_NAME).is_file()
    ]
    if not finished:
        raise OrionError(f"{runs} has no run with a finished {stage} stage.", "Run 'orion run' first, or pass --run.")
    return max(finished)[1]
