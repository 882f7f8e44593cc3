"""results.json: everything a run measured, collected from its stages' receipts and predictions."""

import json
from pathlib import Path
from typing import Any

from orion_triage.config import overrides
from orion_triage.errors import OrionError
from orion_triage.evaluate.baselines import baselines
from orion_triage.evaluate.metrics import Prediction, compare, summarize
from orion_triage.evaluate.run import prediction_of, read_predictions
from orion_triage.manifest import Manifest, read_manifest
from orion_triage.pipeline import Run, stages

SCHEMA_VERSION = 1
MODELS = ("base", "fine-tuned", "quantized")
DELTAS = {"fine-tuning": ("base", "fine-tuned"), "quantization": ("fine-tuned", "quantized")}
SERVER = ("server", "served_model", "server_build")  # in the receipt when someone else's server answered
ARTIFACTS = (
    "orion_lora_weights/adapter_model.safetensors",
    "orion_merged/*.safetensors",
    "gguf/orion-f16.gguf",
    "gguf/orion-mmproj-f16.gguf",
    "gguf/orion-q4_k_m.gguf",
)


def build_results(run: Run) -> dict[str, Any]:
    """The run's results on its split; stages that have not finished are named in `missing`."""
    receipts = {stage.name: read_manifest(stage.folder(run)) for stage in stages(run.settings)}
    finished = {name: receipt for name, receipt in receipts.items() if receipt}
    settings = run.settings
    predictions = {
        model: [prediction_of(row) for row in read_predictions(run.evaluation(model))]
        for model in MODELS
        if f"evaluate {model}" in finished
    }
    quantized = finished.get("evaluate quantized")
    server = {key: quantized.figures[key] for key in SERVER if key in quantized.figures} if quantized else {}
    return {
        "schema_version": SCHEMA_VERSION,
        "preset": settings.preset,
        "split": run.split,
        "settings": settings.model_dump(mode="json"),
        "overrides": {key: list(pair) for key, pair in overrides(settings).items()},
        "missing": [name for name, receipt in receipts.items() if receipt is None],
        "models": {model: summarize(rows) for model, rows in predictions.items()},
        "deltas": {
            name: _delta(predictions[first], predictions[second])
            for name, (first, second) in DELTAS.items()
            if first in predictions and second in predictions
        },
        "baselines": _baselines(run, finished.get("dataset")),
        "foreign_server": server,
        "foreign_pair": quantized.figures.get("pair", "") if quantized else "",
        "bytes": {name: size for name in ARTIFACTS if (size := _size(run.folder, name))},
        "seconds": {name: receipt.seconds for name, receipt in finished.items()},
        "figures": {name: receipt.figures for name, receipt in finished.items() if "evaluate" not in name},
        "versions": next((receipt.versions for receipt in finished.values()), {}),
    }


def results_path(run: Run) -> Path:
    """results.json, or results-val.json: one file a split."""
    return run.folder / f"results{'' if run.split == 'test' else f'-{run.split}'}.json"


def _baselines(run: Run, dataset: Manifest | None) -> dict[str, Any]:
    """Counted from the frames; where 'orion clean' has removed them, as the last report counted them."""
    if dataset is None:
        return {}
    if not dataset.removed:
        return baselines(run.dataset, run.split)
    try:
        value: dict[str, Any] = json.loads(results_path(run).read_text(encoding="utf-8"))["baselines"]
    except FileNotFoundError:
        raise OrionError(
            f"the baselines need the frames of {run.dataset}, which 'orion clean' removed before a report was made.",
            "Make them again first: 'orion dataset --force'.",
        ) from None
    except (ValueError, KeyError, TypeError):
        raise OrionError(
            f"{results_path(run)} is damaged.", "Make the frames again: 'orion dataset --force'."
        ) from None
    return value


def _size(folder: Path, pattern: str) -> int:
    return sum(path.stat().st_size for path in folder.glob(pattern))


def _delta(first: list[Prediction], second: list[Prediction]) -> dict[str, dict[str, float]]:
    """Condition -> difference in points and the exact McNemar p-value, paired by frame."""
    changes = {c: compare(first, second, c) for c in sorted({p.condition for p in first})}
    return {condition: {"points": change.points, "mcnemar_p": change.p_value} for condition, change in changes.items()}
