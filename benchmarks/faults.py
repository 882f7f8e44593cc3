"""What three faults of the published recipe cost: the same base and dataset, trained soundly and with each.

    python benchmarks/faults.py                    # five trainings, about 30 minutes on 2 cores
    python benchmarks/faults.py blind o_proj       # only these

blind      the vision tower is loaded in 4 bits with everything else, which turns pixels in [-1, 1] into bytes
loss       the loss falls on image placeholders, prompt and padding as well (labels are the input ids)
o_proj     `o_proj` is handed to PEFT as it stands and matches nothing
all        the three together

The faults are planted here and nowhere in the package. Everything else is the package's own: frames, turns,
Trainer settings, fuse with its check, and the four-condition evaluation of the fused 16-bit model.
"""

import argparse
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from orion_triage.dataset.dataset import Dataset
from orion_triage.dataset.records import Record
from orion_triage.evaluate import run as evaluate
from orion_triage.evaluate.backends import TransformersBackend
from orion_triage.export import fuse
from orion_triage.mission.mission import default_mission
from orion_triage.models.encode import encode
from orion_triage.models.family import family_in
from orion_triage.models.load import (
    _keep_gradients_on_cpu,
    hush_kernel_advice,
    load_model,
    load_processor,
    no_progress_bars,
    resolve_base,
)
from orion_triage.pipeline import DATASET, run_stage
from orion_triage.progress import silent
from orion_triage.runs.run import Run, prepare
from orion_triage.safe.files import write_text
from orion_triage.settings import Settings, load_settings
from orion_triage.train import fine_tune
from orion_triage.train.device import Device
from orion_triage.train.trainer import collator, make_trainer

MISSION = default_mission()

RESULTS = Path(__file__).parent / "results" / "faults.json"


@dataclass(frozen=True)
class Recipe:
    """Which faults a training has."""

    name: str
    blind: bool = False
    loss_everywhere: bool = False
    o_proj_unresolved: bool = False


RECIPES = (
    Recipe("sound"),
    Recipe("blind", blind=True),
    Recipe("loss", loss_everywhere=True),
    Recipe("o_proj", o_proj_unresolved=True),
    Recipe("all", blind=True, loss_everywhere=True, o_proj_unresolved=True),
)


def load_blind(base: Path) -> Any:
    """The base as `load_in_4bit` gives it when nothing is left out: the patch embedding holds bytes."""
    from transformers import BitsAndBytesConfig

    kind: Any = family_in(base).model_class()  # with the arguments of the trainer's batches
    with no_progress_bars():
        model = kind.from_pretrained(
            base,
            dtype=torch.float32,
            device_map={"": "cpu"},
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.float32,
            ),
        )
    weight = model.model.vision_tower.embeddings.patch_embedding.weight
    assert weight.dtype == torch.uint8, "the fault is not there any more"
    _keep_gradients_on_cpu(model)  # a trap of its own, and not one of those measured here
    return model


def add_unresolved_adapter(model: Any, settings: Settings) -> Any:
    """LoRA on the names as the recipe writes them; PEFT is silent as long as one of them matches."""
    from peft import LoraConfig, TaskType, get_peft_model

    tuning = settings.fine_tune
    model.config.text_config.use_cache = False
    return get_peft_model(
        model,
        LoraConfig(
            r=tuning.rank,
            lora_alpha=tuning.alpha,
            lora_dropout=tuning.dropout,
            target_modules=list(tuning.target_modules),
            task_type=TaskType.CAUSAL_LM,
        ),
    )


def loss_everywhere(collate: Callable[[list[Record]], Any], processor: Any, frames: Any) -> Any:
    def with_all_labels(records: list[Record]) -> Any:
        answers = [record.answer for record in records]
        pictures = [frames[record.image] for record in records]
        batch = encode(processor, pictures, [record.user_text for record in records], answers)
        batch["labels"] = batch["input_ids"].clone()
        return batch

    return with_all_labels


def train(recipe: Recipe, run: Run, folder: Path) -> dict[str, Any]:
    """Train with the recipe's faults; leaves an adapter and returns its size and validation losses."""
    from transformers import set_seed

    settings, base = run.settings, resolve_base(run.settings.base.model)
    dataset = Dataset(run.dataset, MISSION)
    train_records, val_records = dataset.records("train"), dataset.records("val")
    processor = load_processor(base, settings.base.frame_size)
    frames = fine_tune.decode_frames(dataset, [*train_records, *val_records], settings.base.frame_size, silent)
    model = load_blind(base) if recipe.blind else load_model(base, dtype="float32", four_bit=True)
    set_seed(settings.fine_tune.seed)
    if recipe.o_proj_unresolved:
        model = add_unresolved_adapter(model, settings)
    else:
        model, _ = fine_tune.add_adapter(model, settings.fine_tune)
    collate = collator(processor, frames)
    if recipe.loss_everywhere:
        collate = loss_everywhere(collate, processor, frames)
    with warnings.catch_warnings():
        fine_tune._filter_warnings(on_gpu=False)
        trainer = make_trainer(
            model,
            processor.tokenizer,
            collate,
            train_records,
            val_records,
            settings.fine_tune,
            Device("cpu", "float32"),
            folder / "checkpoints",
            silent,
        )
        trainer.train()
    model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    adapted = [name for name, _ in model.named_modules() if name.endswith(".lora_A")]
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    return {"adapted_modules": len(adapted), "eval_losses": losses}


def measure(recipe: Recipe, run: Run) -> dict[str, Any]:
    folder = run.folder / recipe.name
    finished = folder / "figures.json"
    if finished.exists():
        value: dict[str, Any] = json.loads(finished.read_text(encoding="utf-8"))
        return value
    figures = train(recipe, run, folder)
    settings, base = run.settings, resolve_base(run.settings.base.model)
    fuse.run(
        base,
        folder / "adapter",
        Dataset(run.dataset, MISSION),
        folder / "merged",
        settings.fuse,
        settings.base.frame_size,
    )
    backend = TransformersBackend.load(folder / "merged", MISSION, settings.evaluate, settings.base.frame_size)
    figures["metrics"] = evaluate.run(
        Dataset(run.dataset, MISSION),
        "test",
        backend,
        folder / "evaluation",
        settings.evaluate,
        settings.base.frame_size,
        fingerprint=recipe.name,
    )
    write_text(finished, json.dumps(figures, indent=1) + "\n")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help="Default: all.")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--folder", type=Path, default=Path("runs/faults"))
    arguments = parser.parse_args()
    known = [recipe.name for recipe in RECIPES]
    if unknown := set(arguments.recipes) - set(known):
        parser.error(f"no such recipe: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    hush_kernel_advice()
    run = Run(arguments.folder, load_settings(arguments.preset))
    prepare(run)
    run_stage(DATASET, run)
    figures: dict[str, Any] = {}
    print("recipe   modules   A      B      C      D      trusted coordinates   eval loss")
    for recipe in RECIPES:
        if arguments.recipes and recipe.name not in arguments.recipes:
            continue
        figures[recipe.name] = value = measure(recipe, run)
        rates = "  ".join(f"{100 * value['metrics'][c]['accuracy']:4.1f}%" for c in "ABCD")
        trusted = value["metrics"]["D"]["trusted_coordinates"]
        print(
            f"{recipe.name:<8} {value['adapted_modules']:>7}  {rates}  {trusted:>19}   "
            f"{min(value['eval_losses']):9.4f}",
            flush=True,
        )
    write_text(RESULTS, json.dumps(figures, indent=1) + "\n")
    print(f"figures: {RESULTS}")


if __name__ == "__main__":
    main()
