"""results.json: everything a run measured, collected from its stages' receipts and predictions."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from orion_triage.dataset.records import image_path, read_split
from orion_triage.errors import OrionError
from orion_triage.evaluate import features, threshold
from orion_triage.evaluate.baselines import LOGISTIC_REGRESSION, baselines
from orion_triage.evaluate.conditions import CONDITIONS
from orion_triage.evaluate.judgement import judge, value_figures
from orion_triage.evaluate.metrics import Change, Prediction, compare, summarize, under
from orion_triage.evaluate.run import prediction_of, read_predictions
from orion_triage.evaluate.seeds import over_training_seeds
from orion_triage.evaluate.statistics import holm
from orion_triage.imagery.frames import CAMERA_SIZE, is_blank, read_frame
from orion_triage.mission.verdict import CATEGORIES, Category
from orion_triage.pipeline import evaluations, stages
from orion_triage.runs.manifest import Manifest, read_manifest
from orion_triage.runs.run import Run
from orion_triage.settings import overrides

SCHEMA_VERSION = 3
MODELS = ("base", "fine-tuned", "quantized")
DELTAS = {"fine-tuning": ("base", "fine-tuned"), "quantization": ("fine-tuned", "quantized")}
FLIGHT = "flight"  # the constrained answers with the rule for blank frames: what `orion triage` does
SERVER = ("server", "served_model", "server_build")  # in the receipt when someone else's server answered
ARTIFACTS = (
    "orion_lora_weights/adapter_model.safetensors",
    "orion_merged/*.safetensors",
    "gguf/orion-f16.gguf",
    "gguf/orion-mmproj-f16.gguf",
    "gguf/orion-q4_k_m.gguf",
)


def build_results(run: Run) -> dict[str, Any]:
    """The run's results on its split; stages that have not finished are named in `missing`. docs/results.md has the
    schema.
    """
    receipts = {stage.name: read_manifest(stage.folder(run)) for stage in stages(run.settings)}
    finished = {name: receipt for name, receipt in receipts.items() if receipt}
    settings = run.settings
    vision = features.read(run.vision_features) if "vision features" in finished else None
    of_frames = _of_frames(run, finished.get("dataset"), vision)
    predictions = {
        model: [prediction_of(row) for row in read_predictions(stage.folder(run))]
        for model, stage in evaluations(settings).items()
        if stage.name in finished
    }
    if "constrained" in predictions:
        predictions[FLIGHT] = blank_ruled(predictions["constrained"], of_frames["blank_frames"])
    records = read_split(run.dataset, run.split) if predictions else []
    places = {record.name: record.coordinates for record in records if record.coordinates}
    models = {model: summarize(rows) for model, rows in predictions.items()}
    for model, by_condition in models.items():
        for condition, rates in by_condition.items():
            rates |= judge(under(predictions[model], condition), places, settings.mission)
    quantized = finished.get("evaluate quantized")
    server = {key: quantized.figures[key] for key in SERVER if key in quantized.figures} if quantized else {}
    f16 = finished.get("evaluate F16")
    return {
        "schema_version": SCHEMA_VERSION,
        "preset": settings.preset,
        "split": run.split,
        "settings": settings.model_dump(mode="json"),
        "overrides": {key: list(pair) for key, pair in overrides(settings).items()},
        "missing": [name for name, receipt in receipts.items() if receipt is None],
        "frames": {"count": len(records), "places": len(set(places.values()))},
        "models": models,
        "deltas": {
            name: differences(predictions[first], predictions[second])
            for name, (first, second) in DELTAS.items()
            if first in predictions and second in predictions
        },
        "own_eyes": _against_own_eyes(of_frames["baselines"], predictions.get("fine-tuned")),
        "training_seeds": over_training_seeds(run),
        "within": {model: between_conditions(rows) for model, rows in predictions.items()},
        "ladder": ladder(predictions, settings.ladder.quantizations, settings.quantize.type),
        "parity": f16.figures["parity"] if f16 else None,
        "operating_point": _at_operating_point(run, predictions.get(FLIGHT)),
        **of_frames,
        "foreign_server": server,
        "foreign_pair": quantized.figures.get("pair", "") if quantized else "",
        "bytes": {name: size for name in ARTIFACTS if (size := _size(run.folder, name))},
        "seconds": {name: receipt.seconds for name, receipt in finished.items()},
        "figures": {name: receipt.figures for name, receipt in finished.items() if "evaluate" not in name},
        "versions": next((receipt.versions for receipt in finished.values()), {}),
    }


def _against_own_eyes(baselines: dict[str, Any], predictions: list[Prediction] | None) -> dict[str, Any] | None:
    """The fine-tuned model without coordinates (B) against the baseline on the base's frozen vision features."""
    if LOGISTIC_REGRESSION not in baselines or not predictions:
        return None
    said = baselines[LOGISTIC_REGRESSION]["predictions"]
    model = under(predictions, "B")
    return asdict(compare([replace(p, predicted=Category(said[p.name])) for p in model], model))


def _at_operating_point(run: Run, predictions: list[Prediction] | None) -> dict[str, Any] | None:
    """What the run's operating point does to this split's frames, by condition; None where none was chosen."""
    chosen = threshold.read(run.folder, run.gguf) if predictions else None
    if chosen is None or predictions is None:
        return None
    point, temperature = chosen
    by_condition: dict[str, Any] = {
        c: threshold.figures(rows, point, run.settings.mission) | threshold.tempered(rows, temperature)
        for c in CONDITIONS
        if (rows := under(predictions, c))
    }
    return {"low_threshold": point.low_threshold, "temperature": temperature, **by_condition}


def blank_ruled(predictions: list[Prediction], blank_frames: list[str]) -> list[Prediction]:
    """The answers with LOW for every blank frame, whatever the model said of it; noise (C) is not blank."""
    blank = set(blank_frames)
    certain = tuple(float(category == Category.LOW) for category in CATEGORIES)
    return [
        replace(p, predicted=Category.LOW, scores=certain) if p.name in blank and p.condition != "C" else p
        for p in predictions
    ]


def differences(first: list[Prediction], second: list[Prediction]) -> dict[str, dict[str, Any]]:
    """Condition -> how `second` differs from `first`, paired by frame; `holm_p` is corrected for the conditions."""
    return _corrected({c: compare(under(first, c), under(second, c)) for c in CONDITIONS})


def between_conditions(predictions: list[Prediction]) -> dict[str, dict[str, Any]]:
    """What the coordinates (A against B) and a conflict (A, B against D) change for one model."""
    pairs = (("B", "A"), ("A", "D"), ("B", "D"))
    return _corrected({f"{a} to {b}": compare(under(predictions, a), under(predictions, b)) for a, b in pairs})


def _corrected(changes: Mapping[str, Change]) -> dict[str, dict[str, Any]]:
    corrected = holm({name: change.exact_p for name, change in changes.items()})
    return {name: asdict(change) | {"holm_p": corrected[name]} for name, change in changes.items()}


def ladder(predictions: dict[str, list[Prediction]], quantizations: Sequence[str], flown: str) -> list[dict[str, Any]]:
    """The models from base to flight that were evaluated, each with what its step changed from the one before."""
    steps = {
        "base": "the base",
        "adapter-4bit": "training, on 4-bit weights",
        "adapter-16bit": "the adapter on 16-bit weights",
        "fine-tuned": "fusing",
        "F16": "the runtime: llama.cpp",
        **{kind: f"quantization to {kind}" for kind in quantizations},
        "quantized": f"quantization to {flown}",
        "constrained": "the grammar",
        FLIGHT: "the rule for blank frames",
    }
    rungs: list[dict[str, Any]] = []
    for model, step in steps.items():
        if model in predictions:
            before = predictions[rungs[-1]["model"]] if rungs else None
            change = differences(before, predictions[model]) if before else None
            rungs.append({"model": model, "step": step, "change": change})
    return rungs


def results_path(run: Run) -> Path:
    """results.json, or results-val.json: one file a split."""
    return run.folder / f"results{'' if run.split == 'test' else f'-{run.split}'}.json"


def _of_frames(run: Run, dataset: Manifest | None, vision: Mapping[str, Any] | None) -> dict[str, Any]:
    """What is counted from the frames themselves; where 'orion clean' has removed them, as the last report did."""
    if dataset is None:
        return {"baselines": {}, "blank_frames": [], "size_ranking": None}
    if dataset.removed:
        return _of_last_report(run)
    records = sorted(read_split(run.dataset, run.split), key=lambda record: record.name)
    paths = [image_path(run.dataset, record) for record in records]
    truth = np.array([CATEGORIES.index(record.verdict.category) for record in records], dtype=np.int64)
    ranking = np.array([path.stat().st_size for path in paths], dtype=np.float64)
    return {
        "baselines": baselines(run.dataset, run.split, vision),
        "blank_frames": [
            record.name
            for record, path in zip(records, paths, strict=True)
            if is_blank(read_frame(path, CAMERA_SIZE).image)
        ],
        "size_ranking": value_figures(truth, ranking, run.settings.mission),  # the larger PNG first
    }


def _of_last_report(run: Run) -> dict[str, Any]:
    try:
        value = json.loads(results_path(run).read_text(encoding="utf-8"))
        version = value["schema_version"]
        if version != SCHEMA_VERSION:
            raise OrionError(
                f"{results_path(run)} has schema version {version}, not {SCHEMA_VERSION}: its figures are not read.",
                "Make the frames again: 'orion dataset --force'.",
            )
        return {name: value[name] for name in ("baselines", "blank_frames", "size_ranking")}
    except FileNotFoundError:
        raise OrionError(
            f"the baselines need the frames of {run.dataset}, which 'orion clean' removed before a report was made.",
            "Make them again first: 'orion dataset --force'.",
        ) from None
    except (ValueError, KeyError, TypeError):
        raise OrionError(
            f"{results_path(run)} is damaged.", "Make the frames again: 'orion dataset --force'."
        ) from None


def _size(folder: Path, pattern: str) -> int:
    return sum(path.stat().st_size for path in folder.glob(pattern))
