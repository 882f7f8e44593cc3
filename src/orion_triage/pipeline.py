"""The stages in order; a stage whose receipt still matches its settings and inputs is skipped."""

import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orion_triage import hub, processes
from orion_triage.errors import OrionError
from orion_triage.evaluate import variants
from orion_triage.progress import Progress, silent
from orion_triage.runs import manifest
from orion_triage.runs.run import SETTINGS_FILE, WORK_FOLDER, Run, open_run
from orion_triage.safe.files import locked, write_text
from orion_triage.settings import Settings

Figures = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """`settings` and `inputs` decide whether the stage has to run again; `run` fills `folder`."""

    name: str
    folder: Callable[[Run], Path]
    settings: Callable[[Settings], Figures]
    inputs: Callable[[Run], dict[str, Path]]
    run: Callable[[Run, Progress], Figures]
    in_parallel: bool = False  # whether several launched processes can share the work


def _dataset(run: Run, progress: Progress) -> Figures:
    from orion_triage.dataset import build

    return build.run(run.dataset, run.settings.dataset, progress=progress)


def _fine_tune(run: Run, progress: Progress) -> Figures:
    from orion_triage.dataset.check.soundness import require_sound
    from orion_triage.train import fine_tune

    found = require_sound(run.dataset, progress=progress) if processes.is_main() else None
    work = run.folder / WORK_FOLDER
    settings = run.settings
    figures = fine_tune.run(
        run.base, run.dataset, run.adapter, work, settings.fine_tune, settings.base.frame_size, progress
    )
    return figures | {"warnings": found.summary() if found else []}


def _fuse(run: Run, progress: Progress) -> Figures:
    from orion_triage.export import fuse

    settings, adapter = run.settings, run.adapter_to_fuse
    return fuse.run(run.base, adapter, run.dataset, run.merged, settings.fuse, settings.base.frame_size, progress)


def _vision_features(run: Run, progress: Progress) -> Figures:
    from orion_triage.evaluate import features

    return features.run(run.base, run.dataset, run.vision_features, run.settings.base.frame_size, progress)


def _quantize(run: Run, progress: Progress) -> Figures:
    from orion_triage.dataset.records import SPLITS, read_split
    from orion_triage.export import quantize

    prompts = sorted({record.prompt for split in SPLITS for record in read_split(run.dataset, split)})
    return quantize.run(run.merged, run.gguf, run.settings.quantize, prompts=prompts, progress=progress)


def evaluate_servers(run: Run, urls: Sequence[str], progress: Progress = silent) -> manifest.Manifest:
    """The quantized model's evaluation by servers that someone else started; their key is LLAMA_API_KEY.

    Its receipt names the servers instead of the run's GGUF pair, so `orion run` would evaluate the pair itself again.
    """
    evaluate, identity = variants.through_servers("quantized", urls, run.settings.evaluate)
    inputs = {"server": identity, **manifest.hash_inputs({"dataset": run.dataset})}
    return _do(replace(stage_named("evaluate quantized"), run=evaluate), run, inputs, progress)


def _sections(*names: str) -> Callable[[Settings], Figures]:
    return lambda settings: {name: settings.model_dump(mode="json")[name] for name in names}


def _evaluation(
    model: str,
    evaluate: Callable[[Run, Progress], Figures],
    inputs: Callable[[Run], dict[str, Path]],
    *,
    in_parallel: bool = False,
) -> Stage:
    return Stage(
        f"evaluate {model}",
        lambda run: run.evaluation(model),
        _sections("base", "evaluate"),
        lambda run: inputs(run) | {"dataset": run.dataset},
        evaluate,
        in_parallel,
    )


def _rung(kind: str) -> Stage:
    """A quantization of the ladder, made from the F16 file."""
    return _evaluation(kind, variants.through_llama_cpp(kind, kind), lambda run: {"F16": run.gguf})


def _base_and_adapter(run: Run) -> dict[str, Path]:
    return {"base": run.base, "adapter": run.adapter_to_fuse}


STAGES: tuple[Stage, ...] = (
    Stage("dataset", lambda run: run.dataset, _sections("dataset"), lambda run: _dataset_inputs(run), _dataset),
    _evaluation(
        "base",
        variants.through_transformers("base", lambda run: run.base),
        lambda run: {"base": run.base},
        in_parallel=True,
    ),
    Stage(
        "fine-tune",
        lambda run: run.adapter,
        _sections("base", "fine_tune"),
        lambda run: {"base": run.base, "dataset": run.dataset},
        _fine_tune,
        in_parallel=True,
    ),
    Stage(
        "fuse",
        lambda run: run.merged,
        _sections("base", "fuse"),
        lambda run: _base_and_adapter(run) | {"dataset": run.dataset},
        _fuse,
    ),
    Stage(
        "quantize",
        lambda run: run.gguf,
        _sections("quantize"),
        lambda run: {"merged": run.merged, "dataset": run.dataset},
        _quantize,
    ),
    _evaluation(
        "fine-tuned",
        variants.through_transformers("fine-tuned", lambda run: run.merged),
        lambda run: {"merged": run.merged},
        in_parallel=True,
    ),
    _evaluation("quantized", variants.through_llama_cpp("quantized", "pair"), lambda run: {"gguf": run.pair}),
)
VISION_FEATURES = Stage(
    "vision features",
    lambda run: run.vision_features,
    _sections("base"),
    lambda run: {"base": run.base, "dataset": run.dataset},
    _vision_features,
)
# The rungs between those three models, from the base up to what flies.
LADDER_BEFORE: tuple[Stage, ...] = (
    _evaluation(
        "adapter-4bit", variants.through_adapter("adapter-4bit", four_bit=True), _base_and_adapter, in_parallel=True
    ),
    _evaluation(
        "adapter-16bit", variants.through_adapter("adapter-16bit", four_bit=False), _base_and_adapter, in_parallel=True
    ),
    _evaluation(
        "F16",
        variants.through_llama_cpp("F16", "F16"),
        lambda run: {"F16": run.gguf, "merged": run.merged, "fine-tuned": run.evaluation("fine-tuned")},
    ),
)
CONSTRAINED = _evaluation(
    "constrained", variants.through_llama_cpp("constrained", "pair", constrained=True), lambda run: {"gguf": run.pair}
)


def stage_named(name: str) -> Stage:
    return next(stage for stage in (*STAGES, VISION_FEATURES, *LADDER_BEFORE, CONSTRAINED) if stage.name == name)


# Other ways of decoding, which 'orion decoding' studies. One has been said to matter for this family: nearly greedy,
# without the unlikely, and without repetition. The other is what a frame costs least with: no reason at all.
VERDICT_ONLY = "verdict-only"
SAMPLING = {"temperature": 0.1, "min_p": 0.15, "repeat_penalty": 1.05, "top_k": 0, "top_p": 1.0}
DECODINGS: tuple[Stage, ...] = (
    stage_named("evaluate quantized"),
    CONSTRAINED,
    *(
        _evaluation(
            name,
            variants.through_llama_cpp(name, "pair", constrained=constrained, options=SAMPLING),
            lambda run: {"gguf": run.pair},
        )
        for name, constrained in (("sampled", False), ("sampled-constrained", True))
    ),
    _evaluation(VERDICT_ONLY, variants.through_verdict_only(VERDICT_ONLY), lambda run: {"gguf": run.pair}),
)


def stages(settings: Settings) -> tuple[Stage, ...]:
    """All stages of a run in order. The ladder's come before the quantized evaluation: its F16 is the gate to that."""
    if not settings.ladder.enabled:
        return STAGES
    *before, quantized = STAGES
    rungs = [_rung(kind) for kind in settings.ladder.quantizations]
    return (*before, VISION_FEATURES, *LADDER_BEFORE, *rungs, quantized, CONSTRAINED)


def evaluations(settings: Settings) -> dict[str, Stage]:
    """Model -> the stage that evaluates it, in order."""
    word = "evaluate "
    return {stage.name.removeprefix(word): stage for stage in stages(settings) if stage.name.startswith(word)}


def _dataset_inputs(run: Run) -> dict[str, Path]:
    from importlib import resources

    if folder := run.settings.dataset.folder:
        return {"dataset": hub.locate(folder, "dataset")}
    own = run.settings.dataset.catalogue
    shipped = Path(str(resources.files("orion_triage.dataset") / "catalogue.csv"))
    return {"catalogue": Path(own) if own else shipped}


def run_stage(
    stage: Stage, run: Run, *, progress: Progress = silent, force: bool = False
) -> tuple[manifest.Manifest, bool]:
    """Run one stage unless its receipt still matches; returns the receipt and whether it was skipped."""
    folder = stage.folder(run)
    settings = stage.settings(run.settings)
    inputs = manifest.hash_inputs(stage.inputs(run))
    current = not force and manifest.is_current(folder, settings=settings, inputs=inputs)
    processes.wait()  # all have looked before the first one writes
    if current:
        receipt = manifest.read_manifest(folder)
        assert receipt is not None
        return receipt, True
    if processes.count() > 1 and not stage.in_parallel:
        raise OrionError(
            f"{stage.name} is for one process, and {processes.count()} were launched.",
            "Launch only 'orion fine-tune', 'orion ablation' and 'orion evaluate' with several.",
        )
    for name, path in stage.inputs(run).items():
        # Nothing reads the F16 backbone after the quantization, so a pair without it is whole.
        receipt = manifest.read_manifest(path) if name != "gguf" and path.is_dir() else None
        if receipt and receipt.removed and not all((path / file).is_file() for file in receipt.removed):
            raise OrionError(
                f"{stage.name} needs {path}, of which 'orion clean' removed {len(receipt.removed)} files.",
                f"Make it again first: 'orion {receipt.stage} --force'.",
            )
    return _do(stage, run, inputs, progress), False


def _do(stage: Stage, run: Run, inputs: dict[str, str], progress: Progress) -> manifest.Manifest:
    """Run a stage and write its receipt; the old receipt goes first, so that an interruption leaves none."""
    folder = stage.folder(run)
    with _to_itself(run, stage.name):
        if processes.is_main():
            (folder / manifest.FILE_NAME).unlink(missing_ok=True)
        began = time.monotonic()
        figures = stage.run(run, progress)
        processes.wait()
        return manifest.write_manifest(
            folder,
            stage=stage.name,
            settings=stage.settings(run.settings),
            inputs=inputs,
            seconds=time.monotonic() - began,
            figures=figures,
        )


def _to_itself(run: Run, name: str) -> AbstractContextManager[None]:
    """The run's folder, for this command alone; of processes launched together, the first one holds it for all."""
    return locked(run.folder, f"orion {name}") if processes.is_main() else nullcontext()


def check_inputs(run: Run) -> None:
    """What a run needs from outside, looked at before the first stage spends minutes: the base and the places."""
    from orion_triage.dataset import build

    _ = run.base
    if build.published_folder(run.settings.dataset) is None:
        build.plan(run.settings.dataset)


def verify(run: Run) -> dict[str, list[str]]:
    """Finished stage -> what of its files is not as its receipt says; read anew from the disk."""
    every = dict.fromkeys((*stages(run.settings), *DECODINGS))
    return {
        stage.name: manifest.damaged(folder)
        for stage in every
        if (folder := stage.folder(run)).is_dir() and manifest.read_manifest(folder)
    }


def clean(run: Run) -> int:
    """Delete what a flight does not need and the stages can make again; returns the bytes freed.

    Gone: the frames, the merged weights, the F16 backbone, the training's checkpoints. The flight pair, the adapter,
    every receipt, split, answer and report stay. A later run skips what is finished.
    """
    from orion_triage.dataset.records import IMAGES_FOLDER
    from orion_triage.export import quantize

    if manifest.read_manifest(run.gguf) is None:
        raise OrionError(f"{run.folder} has no finished flight pair.", "Run 'orion run' to its end before cleaning up.")
    quantize.check_pair(run.gguf)
    # What needs no note in a receipt goes first: a disk may be too full for a note.
    work = run.folder / WORK_FOLDER / "checkpoints"
    freed = sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
    shutil.rmtree(work, ignore_errors=True)
    freed += manifest.remove_outputs(run.dataset, lambda name: name.startswith(IMAGES_FOLDER))
    freed += manifest.remove_outputs(run.merged, lambda name: name.endswith(".safetensors"))
    freed += manifest.remove_outputs(run.gguf, lambda name: name == quantize.F16)
    return freed


def prepare(run: Run) -> None:
    """Create the run folder and write down the settings."""
    with _to_itself(run, "prepare"):
        write_text(run.folder / SETTINGS_FILE, run.settings.model_dump_json(indent=2) + "\n")


def with_its_dataset(run: Run) -> Run:
    """The run with the dataset settings that its folder was last used with.

    Whoever built a dataset from imagery and goes on without naming it again does not want it drawn over.
    """
    try:
        before = open_run(run.folder)
    except OrionError:
        return run
    if before.settings.preset != run.settings.preset:
        return run
    return replace(run, settings=run.settings.model_copy(update={"dataset": before.settings.dataset}))


def newest_run(runs: Path, stage: str) -> Path:
    """The folder in `runs` in which `stage` was finished last."""
    product = stage_named(stage).folder(Run(Path(), Settings()))
    finished = [
        (receipt.stat().st_mtime, folder)
        for folder in (runs.iterdir() if runs.is_dir() else [])
        if (receipt := folder / product / manifest.FILE_NAME).is_file()
    ]
    if not finished:
        raise OrionError(f"{runs} has no run with a finished {stage} stage.", "Run 'orion run' first, or pass --run.")
    return max(finished)[1]
