"""STAGE: QLoRA fine-tuning of the base on the dataset -> adapter.

The base is loaded in NF4, LoRA matrices are added to the attention projections, and only the verdict's tokens
contribute to the loss. The records are used as they are in the file, with and without coordinates.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from orion_triage import processes
from orion_triage.dataset.dataset import Dataset
from orion_triage.dataset.labelled import Labelled, to_train
from orion_triage.dataset.records import Record
from orion_triage.errors import OrionError
from orion_triage.imagery.camera import load_camera
from orion_triage.imagery.frames import CAMERA_SIZE
from orion_triage.imagery.stress import chosen
from orion_triage.mission.fields import examples
from orion_triage.mission.prompt import user_text
from orion_triage.mission.verdict import Verdict, require_category_alone
from orion_triage.models.adapter import (
    BASE_FILE,
    WEIGHTS_FILE,
    Census,
    check_base,
    load_weights,
    read_adapter,
    resolve_targets,
    tower_of,
)
from orion_triage.models.checkpoint import count_parameters
from orion_triage.models.encode import check_template
from orion_triage.models.family import family_in, family_of_model
from orion_triage.models.generate import vision_features
from orion_triage.models.licence import README
from orion_triage.models.load import (
    base_name,
    expand_four_bit,
    fingerprint,
    float32_compute,
    hush_kernel_advice,
    load_model,
    load_processor,
    save_processor,
)
from orion_triage.progress import Progress, silent
from orion_triage.runs.manifest import hash_inputs
from orion_triage.safe.files import (
    naming,
    replaced_folder,
    require_free_space,
    sha256_of_file,
    sha256_of_text,
    write_text,
)
from orion_triage.settings import FineTuneSettings
from orion_triage.train.augment import Augmentation
from orion_triage.train.checkpoints import CHECKPOINT_SHARE, CHECKPOINTS, settle_checkpoints
from orion_triage.train.device import choose_device
from orion_triage.train.grouping import CPU_MEMORY_FULL, advice_for_less_memory, fill_gpu
from orion_triage.train.preflight import preflight
from orion_triage.train.trainer import collator, heard_once, losses_of, make_trainer, stop_charts
from orion_triage.train.twins import check_shared_prefix

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from transformers import ProcessorMixin

CENSUS_FILE = "census.json"
LOSS_FILE = "loss_log.json"
PREFLIGHT_FRAMES = 8


def run(
    base: Path,
    dataset: Dataset,
    out_folder: Path,
    work_folder: Path,
    settings: FineTuneSettings,
    frame_size: int,
    progress: Progress = silent,
    *,
    labelled: Sequence[Labelled] = (),
    parent: Path | None = None,
) -> dict[str, Any]:
    """Train, and write the adapter with its processor, matched modules, base fingerprint and losses to `out_folder`.

    `work_folder` has one checkpoint per epoch: an interrupted run with the same settings and inputs resumes from the
    last one. Which epoch's adapter is kept: validation.chosen_step. Returns the measurements.
    `labelled` frames are trained in their eight orientations beside the dataset's, of which `settings.replay` is the
    share; `parent` is an adapter whose weights the training begins with.
    Raises OrionError for an invalid dataset, a base that ignores images, a target that matches nothing, a loss that is
    not finite, or full memory.
    """
    processes.settle_environment()
    hush_kernel_advice()
    import torch
    from transformers import set_seed

    from orion_triage.train.validation import CHOSEN_BY

    own_records, val_records = dataset.records("train"), dataset.records("val")
    replayed_records = replayed(own_records, settings.replay, settings.seed)
    more_records, more_frames = to_train(labelled, dataset.mission, frame_size)
    train_records = without_reasons([*replayed_records, *more_records], settings.empty_reasons, settings.seed)
    device = choose_device(settings, count_parameters(base))
    if processes.are_sharded():
        _check_sharding(settings, device.precision)
    weights = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    require_free_space(work_folder, int(weights * CHECKPOINT_SHARE * settings.epochs) + 50_000_000, "fine-tuning")
    base_sha256 = fingerprint(base)
    warnings_of_parent = check_base(base, parent, frame_size) if parent else []
    parent_tensors = read_adapter(parent) if parent else {}
    continued = {"continued_from": sha256_of_file(parent / WEIGHTS_FILE)} if parent else {}
    processor = load_processor(base, frame_size)
    first = train_records[0]
    check_template(processor, first.user_text, first.answer)
    frames = decode_frames(dataset, [*replayed_records, *val_records], frame_size, progress) | more_frames
    augmentation = _augmentation(dataset, replayed_records, settings, frame_size, progress)

    progress("loading the base", 0, 2)
    looked_at = _distinct_frames(train_records, frames)
    reference_model = load_model(base, dtype="auto", device=device.name)
    with float32_compute(reference_model):
        reference = vision_features(reference_model, processor, looked_at)
    del reference_model
    progress("loading the base", 1, 2)
    four_bit = settings.base_weights == "nf4"
    model = load_model(base, dtype=device.precision, four_bit=four_bit, device=device.name)
    if processes.are_sharded():
        _check_layers(model)
    sees = preflight(model, reference, processor, looked_at, user_text(dataset.mission, None))
    progress("loading the base", 2, 2)
    looks_once = not settings.trains_tower and augmentation is None
    features = _look_once(model, processor, frames, progress) if looks_once else None
    if four_bit and not device.is_gpu:
        model = expand_four_bit(model)

    checkpoints = work_folder / CHECKPOINTS
    with warnings.catch_warnings(), naming(work_folder), heard_once():
        _filter_warnings(device.is_gpu)
        set_seed(settings.seed)
        model, census = add_adapter(model, settings)
        if parent:
            load_weights(model, parent, parent_tensors)
        # Only here, where base, dataset and targets have proved usable: it deletes checkpoints of another training.
        resume_from = settle_checkpoints(
            work_folder,
            {
                "settings": settings.model_dump(mode="json"),
                "frame_size": frame_size,
                "base": base_sha256,
                "dataset": hash_inputs({"dataset": dataset.folder})["dataset"],
                "precision": device.precision,
                "processes": processes.count(),
                "chosen_by": CHOSEN_BY,  # the best epoch so far is in the checkpoint
                **({"augmentation": augmentation.to_json()} if augmentation else {}),
                **({"labelled": identity(more_records, more_frames)} if labelled else {}),
                **continued,
            },
        )
        resumed_step = int(resume_from.name.rsplit("-", 1)[1]) if resume_from else 0
        trainable = _trainable_by_tower(model)
        # With FSDP not: a layer that runs twice in a pass would be gathered and reduced twice, which was never tried.
        repeats = settings.twins_together or dataset.mission.image == "after the text"  # the prompts of a batch
        share_prefix = repeats and not processes.are_sharded()
        collate = collator(processor, frames, features, augmentation, share_prefix=share_prefix)
        if share_prefix:
            check_shared_prefix(model, collate, train_records, device.precision)
        grouping = settings
        if device.is_gpu and settings.fill_gpu and processes.count() == 1:
            grouping = fill_gpu(model, collate, train_records, settings, device.precision)
        if device.is_gpu:
            torch.cuda.reset_peak_memory_stats(device.name)  # of the training, not of a trial that did not fit
        trainer = make_trainer(
            model, processor.tokenizer, collate, train_records, val_records, grouping, device, checkpoints, progress,
            augmentation,
        )  # fmt: skip
        try:
            trained = trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and CPU_MEMORY_FULL not in str(error):
                raise
            raise OrionError(
                f"fine-tuning ran out of memory: {str(error).splitlines()[0]}", advice_for_less_memory(settings)
            ) from None
        finally:
            stop_charts(trainer)
        weights_of_all = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # with FSDP, gathers all shards
    log = losses_of(trainer)
    state = trainer.state
    kept = checkpoints / f"checkpoint-{state.best_global_step}"
    if Path(state.best_model_checkpoint or "").name != kept.name:
        raise OrionError(
            f"fine-tuning: the checkpoint of the epoch to keep is gone: {kept}.",
            f"Delete {work_folder} and fine-tune again.",
        )

    # A name that is valid on other machines; PEFT writes a local path.
    written = model.peft_config["default"]
    written.base_model_name_or_path = base_name(base)
    written.target_modules = sorted(written.target_modules)  # the order of a set differs between processes
    if processes.is_main():
        with replaced_folder(out_folder) as folder:
            model.save_pretrained(folder, state_dict=weights_of_all, save_embedding_layers=False)
            (folder / README).unlink()  # PEFT's empty model card
            save_processor(processor, base, folder)
            for name, value in (
                (CENSUS_FILE, census),
                (BASE_FILE, {"name": base_name(base), "sha256": base_sha256, "frame_size": frame_size, **continued}),
                (LOSS_FILE, log),
            ):
                write_text(folder / name, json.dumps(value, indent=2) + "\n")
    evaluations = [entry for entry in log if "eval_loss" in entry]
    best = next((entry for entry in evaluations if entry["step"] == state.best_global_step), {})
    return {
        "train_records": len(train_records),
        "val_records": len(val_records),
        **({"labelled_frames": len(labelled), "replayed_records": len(replayed_records)} if labelled else {}),
        **continued,
        "steps": state.global_step,
        "resumed_from_step": resumed_step,
        "epochs": settings.epochs,
        "micro_batch_size": grouping.micro_batch_size,
        "gradient_checkpointing": grouping.gradient_checkpointing,
        "best_step": state.best_global_step,
        "best_eval_loss": best.get("eval_loss"),
        "chosen_by": CHOSEN_BY,
        "first_loss": next((entry["loss"] for entry in log if "loss" in entry), None),
        "last_loss": next((entry["loss"] for entry in reversed(log) if "loss" in entry), None),
        "eval_losses": [entry["eval_loss"] for entry in evaluations],
        "eval_losses_of_category": [entry["eval_loss_category"] for entry in evaluations],
        "skipped_steps": sum("grad_norm" in entry and entry["grad_norm"] is None for entry in log),
        "census": census,
        "trained_parameters": trainable,
        "preflight": sees,
        "precision_used": device.precision,
        "notes": [*device.notes, *warnings_of_parent, *_continued_in_words(parent, continued)],
        "device": torch.cuda.get_device_name(device.name) if device.is_gpu else "cpu",
        "peak_vram_bytes": torch.cuda.max_memory_allocated(device.name) if device.is_gpu else None,
        "processes": processes.count(),
        "seconds_per_sample": _seconds_per_sample(trained.metrics["train_runtime"], state, resumed_step, settings),
        "attention": model.config.text_config._attn_implementation,
        **family_in(base).kernels(device.is_gpu),
    }


def replayed(records: Sequence[Record], share: float | None, seed: int) -> list[Record]:
    """A share (None: all) of the records' frames of each category, drawn by the seed, with all of their records."""
    if share is None:
        return list(records)
    random, of_category = np.random.default_rng(seed), dict[str, list[str]]()
    for record in {record.image: record for record in records}.values():
        of_category.setdefault(record.verdict.category, []).append(record.image)
    kept = {
        images[index]
        for images in of_category.values()
        for index in random.permutation(len(images))[: round(share * len(images))]
    }
    return [record for record in records if record.image in kept]


def without_reasons(records: Sequence[Record], share: float | None, seed: int) -> list[Record]:
    """The records, a share of them with the category alone as the answer, drawn by the seed.

    Raises OrionError if the mission's answers cannot be the category alone.
    """
    if not share:
        return list(records)
    mission = records[0].mission
    require_category_alone(mission)
    drawn = np.random.default_rng((seed, len(records))).permutation(len(records))
    empty = set(drawn[: round(share * len(records))].tolist())
    return [
        replace(record, verdict=Verdict("", record.verdict.category, examples(mission, "")))
        if index in empty
        else record
        for index, record in enumerate(records)
    ]


def identity(records: Sequence[Record], pictures: "dict[str, Image.Image]") -> str:
    """A hash of what is trained beside the dataset."""
    seen = {name: hashlib.sha256(picture.tobytes()).hexdigest() for name, picture in pictures.items()}
    return sha256_of_text(json.dumps([[record.to_line() for record in records], seen]))


def _continued_in_words(parent: Path | None, continued: dict[str, str]) -> list[str]:
    return [f"continued from {parent}, weights {sha256[:12]}" for sha256 in continued.values()]


def _look_once(
    model: Any, processor: "ProcessorMixin", frames: "dict[str, Image.Image]", progress: Progress
) -> "dict[str, torch.Tensor]":
    """The features of every frame from a frozen tower: [image tokens, text width] each, on the CPU."""
    features = {}
    for done, (name, frame) in enumerate(frames.items(), start=1):
        features[name] = vision_features(model, processor, [frame])[0].to(model.dtype)
        progress("encoding frames", done, len(frames))
    return features


def _seconds_per_sample(seconds: float, state: Any, resumed_step: int, settings: FineTuneSettings) -> float | None:
    """Seconds of training and validation per trained record; None if no steps were left."""
    steps = state.global_step - resumed_step
    records = steps * settings.micro_batch_size * settings.gradient_accumulation_steps * processes.count()
    return round(seconds / records, 4) if records else None


def _check_sharding(settings: FineTuneSettings, precision: str) -> None:
    """Raise OrionError for a kind of FSDP that does not train right or was never run, before a model is loaded."""
    if settings.base_weights != "16-bit":
        raise OrionError(
            f"fine_tune.base_weights={settings.base_weights}: FSDP shards 4-bit weights not at all or wrongly.",
            "Set fine_tune.base_weights=16-bit, or use docs/accelerate/ddp.yaml, where each GPU has the 4-bit base.",
        )
    if "8bit" in settings.optimizer or "paged" in settings.optimizer:
        raise OrionError(
            f"fine_tune.optimizer={settings.optimizer}: FSDP cannot shard the optimizer state of bitsandbytes.",
            "Set fine_tune.optimizer=adamw_torch_fused, as in docs/accelerate/fsdp.yaml.",
        )
    if precision == "float16":
        raise OrionError(
            "fine_tune.precision=float16: FSDP with scaled losses was never run.",
            "Set fine_tune.precision=bfloat16 (Ampere and later), or use docs/accelerate/ddp.yaml.",
        )
    for name, value, why in _FSDP:
        if (found := os.environ.get(name, "")).lower() not in value:
            raise OrionError(
                f"{name}={found}: {why}.", f"Set {name.lower()}: {value[0]} in the configuration of accelerate."
            )


def _check_layers(model: Any) -> None:
    """Raise OrionError unless FSDP shards the layers of both towers: accelerate fails on a class that there is not."""
    from torch import nn

    layers = {type(child[0]).__name__ for child in model.modules() if isinstance(child, nn.ModuleList) and len(child)}
    asked = os.environ.get(_FSDP_LAYERS, "")
    if {name.strip() for name in asked.split(",")} != layers:
        raise OrionError(
            f"{_FSDP_LAYERS}={asked}: the layers of this base are {', '.join(sorted(layers))}.",
            f"Set fsdp_transformer_layer_cls_to_wrap: {','.join(sorted(layers))} in the configuration of accelerate.",
        )


_FSDP_LAYERS = "FSDP_TRANSFORMER_CLS_TO_WRAP"
# (accelerate's variable, the values that were run, what another does)
_FSDP = (
    ("FSDP_VERSION", ("2",), "version 1 flattens frozen and trained weights together"),
    ("FSDP_STATE_DICT_TYPE", ("full_state_dict",), "a checkpoint would lack the adapter as one file"),
    ("FSDP_CPU_RAM_EFFICIENT_LOADING", ("false", ""), "all processes but one would check an empty base"),
    ("FSDP_OFFLOAD_PARAMS", ("false", ""), "offloading was never run"),
    ("FSDP_AUTO_WRAP_POLICY", ("transformer_based_wrap",), "other ways to divide the model were never run"),
    ("FSDP_ACTIVATION_CHECKPOINTING", ("false", ""), "fine_tune.gradient_checkpointing does it"),
)


def decode_frames(
    dataset: Dataset, records: Sequence[Record], frame_size: int, progress: Progress
) -> "dict[str, Image.Image]":
    """All frames of the records, each decoded once: 0.2 MB per frame at 256 px, 0.8 MB at 512."""
    frames: dict[str, Image.Image] = {}
    names = sorted({record.image: record for record in records}.items())
    for number, (name, record) in enumerate(names, start=1):
        frames[name] = dataset.frame(record, frame_size)
        progress("decoding frames", number, len(names))
    return frames


def _augmentation(
    dataset: Dataset, records: Sequence[Record], settings: FineTuneSettings, frame_size: int, progress: Progress
) -> Augmentation | None:
    """What changes the training records; None if the settings name no stress, no camera and no wrong coordinates.

    It keeps the frames at the camera's size: 0.8 MB each. Raises OrionError for a stress or camera that there is not.
    """
    if not settings.augment and not settings.camera and not settings.wrong_coordinates:
        return None
    stresses = chosen(settings.augment) if settings.augment else ()
    camera = load_camera(settings.camera) if settings.camera else None
    frames = decode_frames(dataset, records, CAMERA_SIZE, progress) if camera or stresses else {}
    places = {record.image: record.coordinates for record in records if record.coordinates}
    return Augmentation(frames, stresses, frame_size, settings.seed, camera, settings.wrong_coordinates or 0.0, places)


def _distinct_frames(records: Sequence[Record], frames: "dict[str, Image.Image]") -> "list[Image.Image]":
    """The first frames with different pixels, which the preflight swaps."""
    distinct = {frames[record.image].tobytes(): frames[record.image] for record in records}
    if len(distinct) < 2:
        raise OrionError(
            f"all {len(records)} training records have the same picture.",
            "Build the dataset again with 'orion dataset'.",
        )
    return list(distinct.values())[:PREFLIGHT_FRAMES]


def add_adapter(model: Any, settings: FineTuneSettings) -> tuple[Any, Census]:
    """The model with new LoRA matrices on exactly the modules that the names match; all other weights are frozen.

    Raises OrionError if a name matches nothing.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    names, census = resolve_targets(model, settings.target_modules, settings.scope)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=names,
        task_type=TaskType.CAUSAL_LM,
    )
    model.config.text_config.use_cache = False  # training does not use a cache of keys and values
    adapted = get_peft_model(model, config)
    wrapped = sorted(
        name.removeprefix("base_model.model.").removesuffix(".lora_A")
        for name, _ in adapted.named_modules()
        if name.endswith(".lora_A")
    )
    if wrapped != names:
        raise OrionError(
            f"PEFT adapted {len(wrapped)} modules instead of the {len(names)} matched ones.",
            "Report this with the versions of peft and transformers.",
        )
    return adapted, census


def _trainable_by_tower(model: Any) -> dict[str, int]:
    counts: dict[str, int] = {}
    family = family_of_model(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tower = tower_of(name, family) or "head"
            counts[tower] = counts.get(tower, 0) + parameter.numel()
    return counts


def read_losses(adapter: Path) -> list[dict[str, float]]:
    """The losses stored with an adapter, in order; empty if it has none, as for a third-party adapter."""
    path = adapter / LOSS_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def _filter_warnings(on_gpu: bool) -> None:
    """Hide warnings that do not matter to the user; turn one that invalidates the training into an error."""
    warnings.filterwarnings("ignore", message=".*checkpointing.* is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message="mtime may not be reliable")  # checkpoints are ordered by number
    if not on_gpu:  # on a CPU, the paged optimizer is not paged
        warnings.filterwarnings("ignore", message=".*[Pp]aged.*")
    warnings.filterwarnings("error", message=".*autograd kernel was not registered.*")
