"""Training batches from records, and transformers' Trainer with the settings of the recipe."""

import json
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orion_triage import processes
from orion_triage.dataset.records import Record
from orion_triage.errors import OrionError
from orion_triage.models.encode import IGNORED, EncodedImage, EncodedRow, encode_image, encode_row, pad, shared_tokens
from orion_triage.progress import Progress
from orion_triage.runs.manifest import hash_outputs
from orion_triage.safe.files import write_text
from orion_triage.settings import FineTuneSettings
from orion_triage.train.augment import Augmentation
from orion_triage.train.checkpoints import HASHES_FILE, last_checkpoint
from orion_triage.train.device import Device
from orion_triage.train.twins import TwinsSampler

# A float16 training starts at a loss scale of 65,536 and halves it whenever gradients overflow: 17 times in a row.
SMALLEST_LOSS_SCALE = 1.0

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from transformers import BatchFeature, ProcessorMixin, Trainer


def collator(
    processor: "ProcessorMixin",
    frames: "dict[str, Image.Image]",
    features: "Mapping[str, torch.Tensor] | None" = None,
    augmentation: Augmentation | None = None,
    *,
    share_prefix: bool = False,
) -> "Callable[[list[Record]], BatchFeature]":
    """A function from records to one training batch: that of `encode.pad`, without work that has no gradient.

    Each frame and text is encoded once and cached (0.8 MB per frame at 256 px, 3.1 MB at 512). Logits and `labels`
    start at the token before the first verdict: same loss, a fifth of the logits (float32 logits of a whole row are
    120 MB at 1.6B). There is no attention mask: the padding is on the right, which causal layers do not attend to.
    `features` [image tokens, text width] by image replace a frozen tower. Frames that `augmentation` changes are
    encoded anew. With `share_prefix`, rows share the computation of what their prompts have in common.
    """

    @cache
    def image(name: str) -> EncodedImage:
        encoded = encode_image(processor, frames[name])
        if features is None:
            return encoded
        return EncodedImage(encoded.tokens, {"image_features": features[name].unsqueeze(0)})

    @cache
    def row(record: Record) -> EncodedRow:
        return encode_row(processor, image(record.image), record.user_text, record.answer)

    def changed(records: list[Record]) -> dict[str, EncodedImage]:
        """The images of this batch that are not as in the dataset; one object for all rows of an image."""
        if augmentation is None:
            return {}
        frames = {name: augmentation.frame(name) for name in {record.image for record in records}}
        return {name: encode_image(processor, frame) for name, frame in frames.items() if frame}

    def collate(records: list[Record]) -> "BatchFeature":
        records = [augmentation.as_asked(record) for record in records] if augmentation else records
        other = changed(records)
        rows = [
            encode_row(processor, other[record.image], record.user_text, record.answer)
            if record.image in other
            else row(record)
            for record in records
        ]
        batch = pad(processor, rows)
        supervised = (batch["labels"] != IGNORED).any(dim=0)
        first = int(supervised.nonzero()[0, 0]) - 1
        batch["logits_to_keep"] = batch["labels"].shape[1] - first
        batch["labels"] = batch["labels"][:, first:].contiguous()
        del batch["attention_mask"]
        if share_prefix:
            batch["shared_tokens"] = shared_tokens(processor, rows)
        return batch

    return collate


def warmup_steps(settings: FineTuneSettings, records: int, processes: int) -> int:
    """The steps in which the learning rate rises: `warmup_fraction` of all steps that so many processes make."""
    micro_batches = math.ceil(math.ceil(records / processes) / settings.micro_batch_size)
    steps = math.ceil(micro_batches / settings.gradient_accumulation_steps) * settings.epochs
    return math.ceil(settings.warmup_fraction * steps)


def make_trainer(
    model: Any,
    tokenizer: Any,
    collate: "Callable[[list[Record]], BatchFeature]",
    train_records: list[Record],
    val_records: list[Record],
    settings: FineTuneSettings,
    device: Device,
    checkpoints: Path,
    progress: Progress,
    augmentation: Augmentation | None = None,
) -> "Trainer":
    from torch.utils.tensorboard import SummaryWriter
    from transformers import TrainingArguments
    from transformers.integrations import TensorBoardCallback
    from transformers.trainer_callback import PrinterCallback

    from orion_triage.train.validation import ValidatingTrainer

    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        per_device_train_batch_size=settings.micro_batch_size,
        per_device_eval_batch_size=settings.micro_batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        learning_rate=settings.learning_rate,
        num_train_epochs=settings.epochs,
        optim=settings.optimizer,
        lr_scheduler_type=settings.learning_rate_schedule,
        warmup_steps=warmup_steps(settings, len(train_records), processes.count()),
        fp16=device.precision == "float16",
        bf16=device.precision == "bfloat16",
        gradient_checkpointing=settings.gradient_checkpointing,
        # Reentrant checkpointing needs inputs that require gradients, which a frozen base does not have.
        gradient_checkpointing_kwargs={"use_reentrant": False},
        seed=settings.seed,
        data_seed=settings.seed,
        use_cpu=not device.is_gpu,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=None,  # a later validation may choose an earlier epoch
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",  # for Trainer; train/validation.py decides
        greater_is_better=False,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,  # the filter would replace NaN and infinite losses by the average; see _watch
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_num_workers=0,
        dataloader_pin_memory=device.is_gpu,
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        report_to="none",
    )
    # Without a launcher, transformers counts all visible GPUs, and multiplies batch, number of tokens and loss by their
    # number, although a 4-bit model stays on one: the number of steps would depend on the box.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    watch = _watch(progress, augmentation)
    trainer = ValidatingTrainer(
        model=model,
        args=arguments,
        data_collator=collate,
        train_dataset=train_records,
        val_records=val_records,
        tokenizer=tokenizer,
        train_order=TwinsSampler(train_records, settings.seed) if settings.twins_together else None,
        callbacks=[watch, TensorBoardCallback(SummaryWriter(str(checkpoints.parent / "tensorboard")))],
    )
    watch.scaler = trainer.accelerator.scaler
    trainer.remove_callback(PrinterCallback)
    return trainer


def _watch(progress: Progress, augmentation: Augmentation | None = None) -> Any:
    """Report each step and epoch; raise OrionError at the first figure that shows that the training is lost."""
    from transformers import TrainerCallback

    def kept(args: Any) -> str:
        folder = last_checkpoint(Path(args.output_dir))
        return f"; the last good checkpoint is {folder}" if folder else "; there is no checkpoint yet"

    class Watch(TrainerCallback):  # type: ignore[misc]
        scaler: Any = None  # torch's GradScaler of a float16 training: it skips steps whose gradients overflow

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            progress("fine-tuning", state.global_step, state.max_steps)

        def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if augmentation:
                augmentation.set_epoch(round(state.epoch or 0))

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            progress("fine-tuning", state.global_step, state.max_steps)

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            processes.wait()  # until every process has written its part
            if processes.is_main():
                folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
                write_text(folder / HASHES_FILE, json.dumps(hash_outputs(folder, without=HASHES_FILE), indent=1) + "\n")

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
            if fault := fault_of(logs or {}, self.scaler):
                raise OrionError(
                    f"fine-tuning: {fault[0]} at step {state.global_step} of {state.max_steps}{kept(args)}.", fault[1]
                )

    return Watch()


def fault_of(figures: Mapping[str, float], scaler: Any) -> tuple[str, str] | None:
    """(What is wrong with a step's or a validation's figures, what to do); None if nothing is.

    With a `scaler` (float16), a step whose gradients overflow is skipped, and the next one is scaled by half as much.
    """
    for name in ("loss", "eval_loss"):
        value = figures.get(name)
        if value is not None and not math.isfinite(value):
            return f"{name} is {value}", "Lower fine_tune.learning_rate, or set fine_tune.precision=bfloat16 on a GPU."
        if value == 0:
            return (
                f"{name} is exactly 0: no token is learned",
                "Report this with the settings and the versions of torch, transformers and accelerate.",
            )
    norm = figures.get("grad_norm")
    if norm == 0:
        return "no gradient reaches the adapter", "Report this with the versions of torch, bitsandbytes and peft."
    if norm is None or math.isfinite(norm):
        return None
    if scaler is None:
        return f"the gradient norm is {norm}", "Lower fine_tune.learning_rate."
    if (scale := scaler.get_scale()) < SMALLEST_LOSS_SCALE:
        return (
            f"the gradients do not fit float16: they overflow even at a loss scale of {scale:.2g}",
            "Set fine_tune.precision=bfloat16 on a GPU that has it (Ampere and later), float32 on another.",
        )
    return None


def stop_charts(trainer: "Trainer") -> None:
    """Stop TensorBoard's thread, which otherwise runs on after an interrupted training."""
    for callback in trainer.callback_handler.callbacks:
        if writer := getattr(callback, "tb_writer", None):
            with suppress(OSError):  # the error that stopped the training is already reported
                writer.close()


@contextmanager
def heard_once() -> Iterator[None]:
    """Do not print the OSError of a write in TensorBoard's thread: the next write of this process raises it."""
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


def losses_of(trainer: "Trainer") -> list[dict[str, float | None]]:
    """The training loss of each step and the validation losses of each epoch, in order.

    The gradient norm of a step that was skipped, because its gradients overflowed float16, is None.
    """
    kept = ("step", "epoch", "loss", "learning_rate", "grad_norm")
    return [
        {
            key: entry[key] if math.isfinite(entry[key]) else None
            for key in (*kept, *(name for name in entry if name.startswith("eval_loss")))
            if key in entry
        }
        for entry in trainer.state.log_history
        if "loss" in entry or "eval_loss" in entry
    ]
