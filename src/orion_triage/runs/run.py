"""One run: its folder, its settings, and the location of each stage's product in it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from pydantic import ValidationError

from orion_triage import __version__, hub, processes
from orion_triage.errors import OrionError, one_line
from orion_triage.mission.contract import contract_of
from orion_triage.mission.mission import default_mission
from orion_triage.runs import manifest
from orion_triage.safe.files import locked, write_text
from orion_triage.safe.reading import read_object
from orion_triage.settings import DatasetSettings, Settings, Split

SETTINGS_FILE = "settings.json"
WORK_FOLDER = "fine_tune_work"


@dataclass(frozen=True)
class Run:
    """A run folder, its settings, the split that is evaluated, and the location of each stage's product.

    `adapter_from` and `pair_from` (a folder or a Hub id) replace the run's adapter or GGUF pair.
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
        """The output folder of a stage, by the stage's name; "evaluate NAME" is the evaluation of a variant."""
        if stage.startswith(EVALUATE):
            return self.evaluation(stage.removeprefix(EVALUATE))
        return {
            "dataset": self.dataset,
            "fine-tune": self.adapter,
            "fuse": self.merged,
            "quantize": self.gguf,
            "vision features": self.vision_features,
        }[stage]


def adapter_in(name: str) -> Path:
    """The folder of an adapter: of a run, or `name` itself (a folder or a Hub id)."""
    folder = hub.locate(name, "adapter")
    return own if (own := Run(folder, Settings()).adapter).is_dir() else folder


MAKING = ("dataset", "fine-tune", "fuse", "quantize", "vision features")  # the stages that make something, in order
EVALUATE = "evaluate "  # prefix of an evaluation stage's name


def with_seed(run: Run, seed: int) -> Run:
    """The run beside it that differs only in the training's seed: NAME-seed-43."""
    training = run.settings.fine_tune.model_copy(update={"seed": seed})
    settings = run.settings.model_copy(update={"fine_tune": training})
    return replace(run, folder=run.folder.with_name(f"{run.folder.name}-seed-{seed}"), settings=settings)


def held(run: Run, name: str) -> AbstractContextManager[None]:
    """Lock the run's folder for this command; of processes launched together, rank 0 holds the lock."""
    return locked(run.folder, f"orion {name}") if processes.is_main() else nullcontext()


def prepare(run: Run) -> None:
    """Create the run folder and write the settings, unless a finished product was made with others.

    A command that is refused must not leave settings that contradict what is there; `running` writes them when a stage
    begins. Of processes launched together, rank 0 writes: taking the folder clears what others left half-written there,
    which must not be another rank's file.
    """
    if not processes.is_main():
        return
    with held(run, "prepare"):
        if not any(changed_settings(run, made) for made in _finished(run)):
            _write_settings(run)


def _finished(run: Run) -> list[manifest.Manifest]:
    """The manifests in the run's folder; a damaged one is the business of its stage."""
    found = []
    for path in (*run.folder.glob(f"*/{manifest.FILE_NAME}"), *run.folder.glob(f"evaluation/**/{manifest.FILE_NAME}")):
        with suppress(OrionError):
            found.append(manifest.read_manifest(path.parent))
    return [made for made in found if made]


@contextmanager
def running(run: Run, stage: str) -> Iterator[None]:
    """Lock the run and write its settings for a stage that begins.

    If it is refused (OrionError), the settings of what is finished come back. In a run without a finished product they
    stay with what was begun, since an interrupted dataset is resumed with its source; in an empty one they go.
    """
    with held(run, stage):
        path = run.folder / SETTINGS_FILE
        before = path.read_text(encoding="utf-8") if path.is_file() else ""
        if processes.is_main():
            _write_settings(run)
        try:
            yield
        except OrionError:
            if before and processes.is_main() and _finished(run):
                write_text(path, before)
            elif not before and processes.is_main() and not _begun(run):
                path.unlink(missing_ok=True)
            raise


def _begun(run: Run) -> bool:
    """Whether a stage has left anything in the run's folder, finished or not."""
    own = (SETTINGS_FILE, ".lock")
    return any(path.is_file() and path.name not in own for path in run.folder.rglob("*"))


def _write_settings(run: Run) -> None:
    write_text(run.folder / SETTINGS_FILE, run.settings.model_dump_json(indent=2) + "\n")


def with_its_dataset(run: Run) -> Run:
    """The run with the dataset settings stored in its folder, whatever version wrote them.

    A dataset that was built from imagery must not be replaced because a later command does not name it again.
    Raises OrionError if the folder's dataset settings cannot be read.
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
            f"{path} has no valid dataset settings, so the source of the run's dataset is unknown.",
            "Add --dataset FOLDER or --source NAME, or choose another folder with --run.",
        ) from None
    return replace(run, settings=run.settings.model_copy(update={"dataset": dataset}))


def settings_in(folder: Path) -> Settings | None:
    """The settings stored in a run's folder; None if there are none, or those of a version with others."""
    try:
        return Settings.model_validate_json((folder / SETTINGS_FILE).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


JUDGING = ("mission", "verdict")  # the settings that change no answer, only how answers are judged


def with_its_judging(run: Run, named: Sequence[str]) -> Run:
    """The run with the JUDGING settings stored in its folder, except the `named` ones ("verdict.significance").

    A whole section can be named too ("mission"). Limits that were set once would otherwise fall back to the defaults
    with the next command, without a word. Raises OrionError if they cannot be read.
    """
    path, kept = run.folder / SETTINGS_FILE, {}
    try:
        before = read_object(path)
        if before.get("preset") != run.settings.preset:
            return run
        for section in JUDGING:
            now = getattr(run.settings, section)
            keys = [name.partition(".")[2] for name in named if name.startswith(f"{section}.")]
            new = {key: getattr(now, key) for key in keys if hasattr(now, key)}
            kept[section] = now if section in named else type(now).model_validate({**before.get(section, {}), **new})
    except FileNotFoundError:
        return run
    except (ValidationError, TypeError) as error:
        raise OrionError(
            f"{path} has no valid {' or '.join(JUDGING)} settings: {one_line(str(error))[:200]}.",
            "Correct the file, or choose another folder with --run.",
        ) from None
    return replace(run, settings=run.settings.model_copy(update=kept))


def open_run(folder: Path, split: Split = "test") -> Run:
    """An existing run with its stored settings; raises OrionError if they are missing or invalid."""
    path = folder / SETTINGS_FILE
    try:
        settings = Settings.model_validate_json(path.read_bytes())  # bytes: pydantic reports invalid UTF-8
    except FileNotFoundError:
        raise OrionError(f"{path} does not exist.", "Pass the folder of a run: --run FOLDER.") from None
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"]) or "JSON"
        raise OrionError(
            f"{path} was changed or written by another version of ORION triage: {place}: {problem['msg']}.",
            f"Run 'orion run --run {folder}' with version {__version__}. It keeps the dataset and repeats only "
            "stages that no longer match.",
        ) from None
    return Run(folder, settings, split)


def changed_settings(run: Run, made: manifest.Manifest) -> list[str]:
    """The settings that a product was made with and that the run no longer has: "base.frame_size 256, now 128".

    Stages leave out settings at defaults that came later, so a missing one had its default.
    """
    now, default = run.settings.model_dump(mode="json"), Settings().model_dump(mode="json")
    mission, before = run.settings.mission, made.settings.get("mission", contract_of(default_mission()))
    other_mission = before["contract"] != contract_of(mission)["contract"]
    return [f"mission {before['name']}, now {mission.name}"] * other_mission + [
        f"{section}.{key} {before}, now {now[section].get(key)}"
        for section, values in made.settings.items()
        if section in now and section != "mission" and isinstance(values, dict)
        for key, before in {**default[section], **values}.items()
        if before != now[section].get(key)
    ]


def outdated(run: Run, finished: Mapping[str, manifest.Manifest]) -> dict[str, list[str]]:
    """Which of these products are no longer those of the run, and why: other settings, or inputs that were made again.

    An input is known by its own manifest. Its files, gigabytes of the real model, are read only if that differs, once.
    """
    made_from = {"dataset": run.dataset, "merged": run.merged, "gguf": run.gguf, "F16": run.gguf}
    manifests = {folder: manifest.read_manifest(folder) for folder in made_from.values()}

    @cache
    def hash_of(folder: Path) -> str:
        return manifest.hash_inputs({"folder": folder})["folder"]

    def is_another(folder: Path, before: str) -> bool:
        now = manifests[folder]
        return now is not None and manifest.sha256_of_listing(now.outputs) != before and hash_of(folder) != before

    def changes(made: manifest.Manifest) -> list[str]:
        inputs = [(folder, made.inputs[name]) for name, folder in made_from.items() if made.inputs.get(name)]
        others = [f"another {folder.name}" for folder, before in inputs if is_another(folder, before)]
        return [*changed_settings(run, made), *others]

    return {name: why for name, made in finished.items() if (why := changes(made))}


def require_settings_of_pair(run: Run) -> None:
    """Raise OrionError if the run's settings are no longer those of its flight pair.

    A later command may have changed them, and size and stretch of the frames are part of what the model learned.
    """
    products = [made for folder in (run.dataset, run.merged) if (made := manifest.read_manifest(folder))]
    seen = ("base.", "dataset.stretch")  # what decides which pixels the model sees
    if changed := [text for made in products for text in changed_settings(run, made) if text.startswith(seen)]:
        raise OrionError(
            f"the pair in {run.gguf} was made with other settings than {run.folder / SETTINGS_FILE} has now: "
            f"{'; '.join(changed)}.",
            f"Run 'orion run --run {run.folder}' with the settings that you want to fly.",
        )


FLIES = "quantize"  # the stage after which a run has all that flies


def newest_run(runs: Path, stage: str) -> Path:
    """The run in `runs` whose flight pair was finished last; if none has a pair, the one that finished `stage` last.

    Raises OrionError if no run has finished `stage`.
    """
    for needed in (FLIES, stage):
        if finished := _finished_by(runs, needed):
            return finished[-1]
    raise OrionError(f"{runs} has no run with a finished {stage} stage.", "Run 'orion run', or pass --run FOLDER.")


def _finished_by(runs: Path, stage: str) -> list[Path]:
    """The runs that finished this stage, the latest last."""
    product = Run(Path(), Settings()).product(stage) / manifest.FILE_NAME
    folders = runs.iterdir() if runs.is_dir() else []
    found = [((folder / product).stat().st_mtime, folder) for folder in folders if (folder / product).is_file()]
    return [folder for _, folder in sorted(found)]


def newer_unfinished(chosen: Path) -> list[Path]:
    """The runs beside `chosen` that were begun after its flight pair was finished, and have none."""
    product = Run(Path(), Settings()).product(FLIES) / manifest.FILE_NAME
    if not (chosen / product).is_file():
        return []
    since = (chosen / product).stat().st_mtime
    begun = [path.parent for path in sorted(chosen.parent.glob(f"*/{SETTINGS_FILE}")) if path.stat().st_mtime > since]
    return [folder for folder in begun if not (folder / product).is_file()]
