"""STAGE: QLoRA fine-tuning of the base on the dataset -> adapter.

The base is loaded in NF4, LoRA matrices go beside the attention projections, and the loss falls on the
verdict's tokens only. The records are trained on as they stand in the file, with and without coordinates.
"""

import importlib.util
import json
import math
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orion_triage import processes
from orion_triage.dataset.records import Record, image_path, read_split
from orion_triage.errors import OrionError
from orion_triage.imagery.frames import read_frame
from orion_triage.mission.prompt import render_prompt
from orion_triage.models.adapter import BASE_FILE, Census, resolve_targets, tower_of
from orion_triage.models.encode import IGNORED, EncodedImage, EncodedRow, check_template, encode_image, encode_row, pad
from orion_triage.models.generate import vision_features
from orion_triage.models.licence import README
from orion_triage.models.load import (
    base_name,
    expand_four_bit,
    fingerprint,
    hush_kernel_advice,
    load_model,
    load_processor,
)
from orion_triage.progress import Progress, silent
from orion_triage.runs.manifest import hash_inputs, hash_outputs
from orion_triage.safe.files import naming, replaced_folder, require_free_space, sha256_of_text, write_text
from orion_triage.settings import FineTuneSettings
from orion_triage.train.preflight import preflight

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from transformers import BatchFeature, Trainer, TrainerCallback
    from transformers.models.lfm2_vl import Lfm2VlProcessor

CENSUS_FILE = "census.json"
LOSS_FILE = "loss_log.json"
CHECKPOINTS = "checkpoints"
HASHES_FILE = "sha256.json"  # of a checkpoint's files; it is written last
PREFLIGHT_FRAMES = 8
# An adapter of rank 16 is about 1 % of the model; a checkpoint adds two optimizer states and three are kept.
_CHECKPOINT_SHARE = 0.15


def run(
    base: Path,
    dataset: Path,
    out_folder: Path,
    work_folder: Path,
    settings: FineTuneSettings,
    frame_size: int,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Train and write the adapter with its processor, census, base fingerprint and losses into `out_folder`.

    `work_folder` keeps one checkpoint an epoch: an interrupted run with the same settings and inputs goes on
    from the last one. The adapter of the epoch with the lowest validation loss is kept. Returns the figures.
    Raises OrionError for a bad dataset, a base that cannot see, a target that matches nothing, or a loss
    that is not finite.
    """
    hush_kernel_advice()
    import torch
    from transformers import set_seed

    train_records, val_records = read_split(dataset, "train"), read_split(dataset, "val")
    if processes.are_sharded():
        _check_sharding(settings)
    device, precision, note = _device_and_precision(settings)
    weights = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    require_free_space(work_folder, int(weights * _CHECKPOINT_SHARE) + 50_000_000, "fine-tuning")
    base_sha256 = fingerprint(base)
    if processes.is_main():
        _prepare_work_folder(work_folder, settings, frame_size, base_sha256, dataset, precision)
    processes.wait()
    checkpoints = work_folder / CHECKPOINTS

    processor = load_processor(base, frame_size)
    first = train_records[0]
    check_template(processor, first.prompt, first.verdict.to_json())
    frames = decode_frames(dataset, [*train_records, *val_records], frame_size, progress)

    progress("loading the base", 0, 2)
    looked_at = _distinct_frames(train_records, frames)
    reference_model = load_model(base, dtype=precision, device=device)
    reference = vision_features(reference_model, processor, looked_at)
    del reference_model
    progress("loading the base", 1, 2)
    four_bit = settings.base_weights == "nf4"
    model = load_model(base, dtype=precision, four_bit=four_bit, device=device, float_storage=processes.are_sharded())
    sees = preflight(model, reference, processor, looked_at, render_prompt(None))
    progress("loading the base", 2, 2)
    features = None if settings.trains_tower else _look_once(model, processor, frames, progress)
    if four_bit and device == "cpu":
        model = expand_four_bit(model)

    _remove_damaged(checkpoints)
    resume_from = _last_checkpoint(checkpoints)
    resumed_step = int(resume_from.name.rsplit("-", 1)[1]) if resume_from else 0
    with warnings.catch_warnings(), naming(work_folder), _heard_once():
        _filter_warnings(device)
        set_seed(settings.seed)
        model, census = add_adapter(model, settings)
        trainable = _trainable_by_tower(model)
        collate = collator(processor, frames, features)
        grouping = settings
        if device != "cpu" and settings.fill_gpu and processes.count() == 1:
            grouping = fill_gpu(model, collate, train_records, settings, precision)
        trainer = make_trainer(
            model, collate, train_records, val_records, grouping, device, precision, checkpoints, progress
        )
        try:
            trained = trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and _CPU_MEMORY_FULL not in str(error):
                raise
            raise OrionError(f"fine-tuning: memory is full: {str(error).splitlines()[0]}", _smaller(settings)) from None
        finally:
            _stop_charts(trainer)
        weights_of_all = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # with FSDP, all put theirs together
    log = _losses(trainer)

    # A name that means something elsewhere; PEFT puts in this machine's path.
    written = model.peft_config["default"]
    written.base_model_name_or_path = base_name(base)
    written.target_modules = sorted(written.target_modules)  # a set's order is another in every process
    if processes.is_main():
        with replaced_folder(out_folder) as folder:
            model.save_pretrained(folder, state_dict=weights_of_all, save_embedding_layers=False)
            (folder / README).unlink()  # PEFT's unfilled form
            processor.save_pretrained(folder)
            for name, value in (
                (CENSUS_FILE, census),
                (BASE_FILE, {"name": base_name(base), "sha256": base_sha256, "frame_size": frame_size}),
                (LOSS_FILE, log),
            ):
                write_text(folder / name, json.dumps(value, indent=2) + "\n")
    state = trainer.state
    evaluations = [entry for entry in log if "eval_loss" in entry]
    return {
        "train_records": len(train_records),
        "val_records": len(val_records),
        "steps": state.global_step,
        "resumed_from_step": resumed_step,
        "epochs": settings.epochs,
        "micro_batch_size": grouping.micro_batch_size,
        "gradient_checkpointing": grouping.gradient_checkpointing,
        "best_step": state.best_global_step,
        "best_eval_loss": state.best_metric,
        "first_loss": next((entry["loss"] for entry in log if "loss" in entry), None),
        "last_loss": next((entry["loss"] for entry in reversed(log) if "loss" in entry), None),
        "eval_losses": [entry["eval_loss"] for entry in evaluations],
        "census": census,
        "trained_parameters": trainable,
        "preflight": sees,
        "precision_used": precision,
        "precision_note": note,
        "device": "cpu" if device == "cpu" else torch.cuda.get_device_name(device),
        "peak_vram_bytes": None if device == "cpu" else torch.cuda.max_memory_allocated(device),
        "processes": processes.count(),
        "seconds_per_sample": _seconds_per_sample(trained.metrics["train_runtime"], state, resumed_step, settings),
        "attention": model.config.text_config._attn_implementation,
        "short_convolution": "causal-conv1d" if device != "cpu" and has_fast_convolution() else "PyTorch",
    }


def _look_once(
    model: Any, processor: "Lfm2VlProcessor", frames: "dict[str, Image.Image]", progress: Progress
) -> "dict[str, torch.Tensor]":
    """What a tower that is not trained shows of every frame: [image tokens, text width] each, on the CPU."""
    features = {}
    for done, (name, frame) in enumerate(frames.items(), start=1):
        features[name] = vision_features(model, processor, [frame])[0].to(model.dtype)
        progress("looking at frames", done, len(frames))
    return features


def groupings(settings: FineTuneSettings) -> list[FineTuneSettings]:
    """The settings with the same records a step in larger groups, the fastest first, as they are last.

    Recomputing costs a third of the time, and a group of two or more fills a GPU, so all groups without checkpointing
    come before those with it.
    """
    records = settings.micro_batch_size * settings.gradient_accumulation_steps
    sizes = [size for size in range(records, settings.micro_batch_size - 1, -1) if records % size == 0]
    kinds = (False, True) if settings.gradient_checkpointing else (False,)
    return [
        settings.model_copy(
            update={
                "micro_batch_size": size,
                "gradient_accumulation_steps": records // size,
                "gradient_checkpointing": checkpointing,
            }
        )
        for checkpointing in kinds
        for size in sizes
    ]


_LARGEST_GPU_SHARE = 0.85  # of its memory, in the trial; the optimizer's state comes on top, and fragments


def fill_gpu(
    model: Any,
    collate: "Callable[[list[Record]], BatchFeature]",
    records: list[Record],
    settings: FineTuneSettings,
    precision: str,
) -> FineTuneSettings:
    """The first of `groupings` whose forward and backward pass over the longest records fits the GPU, by trying."""
    import torch

    longest = sorted(records, key=lambda record: -len(record.prompt + record.verdict.to_json()))
    total = torch.cuda.get_device_properties(model.device).total_memory
    *larger, as_set = groupings(settings)
    model.train()
    for grouping in larger:
        if grouping.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.cuda.reset_peak_memory_stats(model.device)
        try:
            with torch.random.fork_rng([model.device]), torch.autocast("cuda", getattr(torch, precision)):
                batch = collate(longest[: grouping.micro_batch_size]).to(model.device)
                model(**batch).loss.backward()
            fits = torch.cuda.max_memory_allocated(model.device) < _LARGEST_GPU_SHARE * total
        except torch.cuda.OutOfMemoryError:
            fits = False
        finally:
            model.zero_grad(set_to_none=True)
            model.gradient_checkpointing_disable()
            torch.cuda.empty_cache()
        if fits:
            return grouping
    return as_set


_CPU_MEMORY_FULL = "can't allocate memory"  # torch's word; on a GPU it has an error of its own


def _smaller(settings: FineTuneSettings) -> str:
    """Which setting takes less memory next, with the same records a step."""
    size, count = settings.micro_batch_size, settings.gradient_accumulation_steps
    if size > 1:
        half = next(part for part in range(size // 2, 0, -1) if size % part == 0)
        more = count * size // half
        return (
            f"Set fine_tune.micro_batch_size={half} and fine_tune.gradient_accumulation_steps={more}: the same steps."
        )
    if not settings.gradient_checkpointing:
        return "Set fine_tune.gradient_checkpointing=true: a third more time, far less memory."
    return "Set base.frame_size to 384 or 256, or take a GPU with more memory."


def has_fast_convolution() -> bool:
    """Whether the package is there whose GPU kernel transformers takes for LFM2's short convolutions."""
    return importlib.util.find_spec("causal_conv1d") is not None


def _seconds_per_sample(seconds: float, state: Any, resumed_step: int, settings: FineTuneSettings) -> float | None:
    """Training with its validations, by record trained on; None when nothing was left to train."""
    steps = state.global_step - resumed_step
    records = steps * settings.micro_batch_size * settings.gradient_accumulation_steps * processes.count()
    return round(seconds / records, 4) if records else None


def _check_sharding(settings: FineTuneSettings) -> None:
    """What FSDP cannot cut up is refused before a model is loaded."""
    if "8bit" in settings.optimizer or "paged" in settings.optimizer:
        raise OrionError(
            f"fine_tune.optimizer={settings.optimizer} cannot be shared out by FSDP (bitsandbytes' state).",
            "Set fine_tune.optimizer=adamw_torch_fused; see docs/accelerate/fsdp.yaml.",
        )


def _device_and_precision(settings: FineTuneSettings) -> tuple[str, str, str]:
    """(device, precision, note): 16-bit training needs a GPU; a CPU trains in float32 and the run says so."""
    import torch

    if torch.cuda.is_available():
        return processes.local_device(), settings.precision, ""
    if settings.precision == "float32":
        return "cpu", "float32", ""
    return "cpu", "float32", f"no GPU: trained in float32 instead of {settings.precision}"


def _prepare_work_folder(
    work_folder: Path,
    settings: FineTuneSettings,
    frame_size: int,
    base_sha256: str,
    dataset: Path,
    precision: str,
) -> None:
    """Empty the folder of the checkpoints unless they come from the same settings and inputs."""
    inputs = {
        "settings": settings.model_dump(mode="json"),
        "frame_size": frame_size,
        "base": base_sha256,
        "dataset": hash_inputs({"dataset": dataset})["dataset"],
        "precision": precision,
        "processes": processes.count(),
    }
    fingerprint = sha256_of_text(json.dumps(inputs, sort_keys=True))
    stage_manifest, checkpoints = work_folder / "fingerprint.txt", work_folder / CHECKPOINTS
    if not stage_manifest.is_file() or stage_manifest.read_text(encoding="utf-8") != fingerprint:
        shutil.rmtree(checkpoints, ignore_errors=True)
        shutil.rmtree(work_folder / "tensorboard", ignore_errors=True)
        write_text(stage_manifest, fingerprint)


def _checkpoints_in(checkpoints: Path) -> list[Path]:
    """Oldest first."""
    return sorted(checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))


def _is_whole(checkpoint: Path) -> bool:
    """Whether every file has the hash that was written last."""
    try:
        hashes = json.loads((checkpoint / HASHES_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(hashes == hash_outputs(checkpoint, without=HASHES_FILE))


def _last_checkpoint(checkpoints: Path) -> Path | None:
    return next((folder for folder in reversed(_checkpoints_in(checkpoints)) if _is_whole(folder)), None)


def _remove_damaged(checkpoints: Path) -> None:
    """A checkpoint that a kill cut, or whose bits changed: its steps are done again, into an empty folder."""
    for folder in _checkpoints_in(checkpoints):
        if not _is_whole(folder):
            shutil.rmtree(folder)


def decode_frames(
    dataset: Path, records: Sequence[Record], frame_size: int, progress: Progress
) -> "dict[str, Image.Image]":
    """Every frame of the records, decoded once: 0.2 MB each at 256 px, 0.8 MB at 512."""
    frames: dict[str, Image.Image] = {}
    names = sorted({record.image: record for record in records}.items())
    for number, (name, record) in enumerate(names, start=1):
        frames[name] = read_frame(image_path(dataset, record), frame_size).image
        progress("decoding frames", number, len(names))
    return frames


def _distinct_frames(records: Sequence[Record], frames: "dict[str, Image.Image]") -> "list[Image.Image]":
    """The first frames that differ in their pixels, for the preflight's swaps."""
    distinct = {frames[record.image].tobytes(): frames[record.image] for record in records}
    if len(distinct) < 2:
        raise OrionError(
            f"all {len(records)} training records show the same picture.",
            "Build the dataset again with 'orion dataset'.",
        )
    return list(distinct.values())[:PREFLIGHT_FRAMES]


def add_adapter(model: Any, settings: FineTuneSettings) -> tuple[Any, Census]:
    """The model with fresh LoRA matrices on exactly the modules that the names mean; all else is frozen."""
    from peft import LoraConfig, TaskType, get_peft_model

    from orion_triage.train.cpu_dropout import draw_faster

    names, census = resolve_targets(model, settings.target_modules, settings.scope)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=names,
        task_type=TaskType.CAUSAL_LM,
    )
    model.config.text_config.use_cache = False  # a cache of keys and values is of no use in training
    adapted = get_peft_model(model, config)
    if model.device.type == "cpu":
        draw_faster(adapted)
    wrapped = sorted(
        name.removeprefix("base_model.model.").removesuffix(".lora_A")
        for name, _ in adapted.named_modules()
        if name.endswith(".lora_A")
    )
    if wrapped != names:
        raise OrionError(
            f"PEFT adapted {len(wrapped)} modules instead of the {len(names)} that were resolved.",
            "Report this with the versions of peft and transformers.",
        )
    return adapted, census


def _trainable_by_tower(model: Any) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tower = tower_of(name) or "head"
            counts[tower] = counts.get(tower, 0) + parameter.numel()
    return counts


def collator(
    processor: "Lfm2VlProcessor",
    frames: "dict[str, Image.Image]",
    features: "Mapping[str, torch.Tensor] | None" = None,
) -> "Callable[[list[Record]], BatchFeature]":
    """Records -> one training batch: `vlm.pad`'s, without work that moves no gradient.

    Each frame and text is encoded once and kept (0.8 MB a frame at 256 px, 3.1 MB at 512). Logits are computed from the
    token before the first verdict on, and `labels` start there too: same loss, a fifth of the logits (float32 logits of
    a whole row are 120 MB at 1.6B). No attention mask: the padding is on the right, where causal layers never look.
    `features` [image tokens, text width] by image take the tower's place where it is not trained.
    """

    @cache
    def image(name: str) -> EncodedImage:
        encoded = encode_image(processor, frames[name])
        if features is None:
            return encoded
        return EncodedImage(encoded.tokens, {"image_features": features[name].unsqueeze(0)})

    @cache
    def row(record: Record) -> EncodedRow:
        return encode_row(processor, image(record.image), record.prompt, record.verdict.to_json())

    def collate(records: list[Record]) -> "BatchFeature":
        batch = pad(processor, [row(record) for record in records])
        supervised = (batch["labels"] != IGNORED).any(dim=0)
        first = int(supervised.nonzero()[0, 0]) - 1
        batch["logits_to_keep"] = batch["labels"].shape[1] - first
        batch["labels"] = batch["labels"][:, first:].contiguous()
        del batch["attention_mask"]
        return batch

    return collate


def make_trainer(
    model: Any,
    collate: "Callable[[list[Record]], BatchFeature]",
    train_records: list[Record],
    val_records: list[Record],
    settings: FineTuneSettings,
    device: str,
    precision: str,
    checkpoints: Path,
    progress: Progress,
) -> "Trainer":
    from torch.utils.tensorboard import SummaryWriter
    from transformers import Trainer, TrainingArguments
    from transformers.integrations import TensorBoardCallback
    from transformers.trainer_callback import PrinterCallback

    steps_an_epoch = math.ceil(
        math.ceil(len(train_records) / settings.micro_batch_size) / settings.gradient_accumulation_steps
    )
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        per_device_train_batch_size=settings.micro_batch_size,
        per_device_eval_batch_size=settings.micro_batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        learning_rate=settings.learning_rate,
        num_train_epochs=settings.epochs,
        optim=settings.optimizer,
        lr_scheduler_type=settings.learning_rate_schedule,
        warmup_steps=math.ceil(settings.warmup_fraction * steps_an_epoch * settings.epochs),
        fp16=device != "cpu" and precision == "float16",
        bf16=device != "cpu" and precision == "bfloat16",
        gradient_checkpointing=settings.gradient_checkpointing,
        # The reentrant kind needs inputs that require gradients, which a frozen base does not have.
        gradient_checkpointing_kwargs={"use_reentrant": False},
        seed=settings.seed,
        data_seed=settings.seed,
        use_cpu=device == "cpu",
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=3,  # should the newest be damaged, there is one before it
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        prediction_loss_only=True,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would replace a broken loss by the average; see _watch
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_num_workers=0,
        dataloader_pin_memory=device != "cpu",
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        report_to="none",
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        data_collator=collate,
        train_dataset=train_records,
        eval_dataset=val_records,
        callbacks=[
            _watch(progress),
            TensorBoardCallback(SummaryWriter(str(checkpoints.parent / "tensorboard"))),
        ],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _watch(progress: Progress) -> "TrainerCallback":
    """Report each step, and stop at the first loss that is not a number."""
    from transformers import TrainerCallback

    def kept(args: Any) -> str:
        folder = _last_checkpoint(Path(args.output_dir))
        return f"; the last good checkpoint is {folder}" if folder else "; there is no checkpoint yet"

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            progress("fine-tuning", state.global_step, state.max_steps)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            progress("fine-tuning", state.global_step, state.max_steps)

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if processes.is_main():
                folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
                write_text(folder / HASHES_FILE, json.dumps(hash_outputs(folder, without=HASHES_FILE), indent=1) + "\n")

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
            for name in ("loss", "eval_loss"):
                value = (logs or {}).get(name)
                if value is not None and not math.isfinite(value):
                    raise OrionError(
                        f"fine-tuning: {name} is {value} at step {state.global_step} of {state.max_steps}{kept(args)}.",
                        "Lower fine_tune.learning_rate, or set fine_tune.precision=bfloat16 on a GPU.",
                    )

    return Watch()


def _stop_charts(trainer: "Trainer") -> None:
    """Let TensorBoard's thread end, which a training that broke off leaves running."""
    for callback in trainer.callback_handler.callbacks:
        if writer := getattr(callback, "tb_writer", None):
            with suppress(OSError):  # what broke the training off is said
                writer.close()


@contextmanager
def _heard_once() -> Iterator[None]:
    """TensorBoard's thread keeps the OSError of a write, for our next one to raise: it need not print it as well."""
    before = threading.excepthook

    def speak(arguments: threading.ExceptHookArgs) -> None:
        ours = type(arguments.thread).__module__.startswith("tensorboard.")
        if not (ours and isinstance(arguments.exc_value, OSError)):
            before(arguments)

    threading.excepthook = speak
    try:
        yield
    finally:
        threading.excepthook = before


def _losses(trainer: "Trainer") -> list[dict[str, float]]:
    """The training loss of every step and the validation loss of every epoch, in order."""
    kept = ("step", "epoch", "loss", "eval_loss", "learning_rate", "grad_norm")
    return [
        {key: entry[key] for key in kept if key in entry}
        for entry in trainer.state.log_history
        if "loss" in entry or "eval_loss" in entry
    ]


def read_losses(adapter: Path) -> list[dict[str, float]]:
    """The losses written beside an adapter, in order; empty if it has none, as one made elsewhere."""
    path = adapter / LOSS_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def _filter_warnings(device: str) -> None:
    """Hide notes that change nothing for a user; make one that voids the training an error."""
    warnings.filterwarnings("ignore", message=".*checkpointing.* is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message="mtime may not be reliable")  # checkpoints are told apart by number
    if device == "cpu":  # there, the paged optimizer is not paged
        warnings.filterwarnings("ignore", message=".*[Pp]aged.*")
    warnings.filterwarnings("error", message=".*autograd kernel was not registered.*")
