"""results.json: everything a run measured, collected from its stages' receipts and predictions."""

from pathlib import Path
from typing import Any

from orion_triage.config import Settings, overrides
from orion_triage.evaluate.baselines import baselines
from orion_triage.evaluate.metrics import Prediction, compare, summarize
from orion_triage.evaluate.run import prediction_of, read_predictions
from orion_triage.manifest import read_manifest
from orion_triage.records import Split

SCHEMA_VERSION = 1
MODELS = ("base", "fine-tuned", "quantized")
DELTAS = {"fine-tuning": ("base", "fine-tuned"), "quantization": ("fine-tuned", "quantized")}
ARTIFACTS = (
    "orion_lora_weights/adapter_model.safetensors",
    "orion_merged/model.safetensors",
    "gguf/orion-f16.gguf",
    "gguf/orion-mmproj-f16.gguf",
    "gguf/orion-q4_k_m.gguf",
)


def build_results(run_folder: Path, settings: Settings, split: Split, stage_folders: dict[str, Path]) -> dict[str, Any]:
    """The run's results on one split; stages that have not finished are named in `missing`."""
    receipts = {name: read_manifest(folder) for name, folder in stage_folders.items()}
    predictions = {
        model: [prediction_of(row) for row in read_predictions(stage_folders[f"evaluate {model}"])]
        for model in MODELS
        if receipts.get(f"evaluate {model}")
    }
    dataset = run_folder / "dataset"
    finished = {name: receipt for name, receipt in receipts.items() if receipt}
    return {
        "schema_version": SCHEMA_VERSION,
        "preset": settings.preset,
        "split": split,
        "settings": settings.model_dump(mode="json"),
        "overrides": {key: list(pair) for key, pair in overrides(settings).items()},
        "missing": [name for name, receipt in receipts.items() if receipt is None],
        "models": {model: summarize(rows) for model, rows in predictions.items()},
        "deltas": {
            name: _delta(predictions[first], predictions[second])
            for name, (first, second) in DELTAS.items()
            if first in predictions and second in predictions
        },
        "baselines": baselines(dataset, split) if finished.get("dataset") else {},
        "bytes": {name: (run_folder / name).stat().st_size for name in ARTIFACTS if (run_folder / name).exists()},
        "seconds": {name: receipt.seconds for name, receipt in finished.items()},
        "figures": {name: receipt.figures for name, receipt in finished.items() if "evaluate" not in name},
        "versions": next((receipt.versions for receipt in finished.values()), {}),
    }


def _delta(first: list[Prediction], second: list[Prediction]) -> dict[str, dict[str, float]]:
    """Condition -> difference in points and the exact McNemar p-value, paired by frame."""
    changes = {c: compare(first, second, c) for c in sorted({p.condition for p in first})}
    return {condition: {"points": change.points, "mcnemar_p": change.p_value} for condition, change in changes.items()}
