"""results.json: all measurements of a run, collected from the manifests and predictions of its stages."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from orion_triage.dataset.dataset import Dataset
from orion_triage.errors import OrionError
from orion_triage.evaluate import features, threshold, variants
from orion_triage.evaluate.baselines import LOGISTIC_REGRESSION, baselines
from orion_triage.evaluate.conditions import CONDITIONS
from orion_triage.evaluate.judgement import judge, value_figures
from orion_triage.evaluate.metrics import Change, Prediction, compare, summarize, under
from orion_triage.evaluate.run import predictions_in
from orion_triage.evaluate.seeds import over_training_seeds
from orion_triage.evaluate.statistics import holm
from orion_triage.evaluate.variants import Variant
from orion_triage.mission.decide import Rules
from orion_triage.mission.verdict import CATEGORIES, Category
from orion_triage.runs.manifest import Manifest, read_manifest
from orion_triage.runs.run import EVALUATE, MAKING, Run, changed_settings
from orion_triage.settings import overrides

SCHEMA_VERSION = 5
DELTAS = {"fine-tuning": ("base", "fine-tuned"), "quantization": ("fine-tuned", "quantized")}
FLIGHT = "flight"  # constrained answers with the blank rule, as in `orion triage`
SERVER_FIGURES = ("server", "served_model", "server_build")  # in the manifest if a third-party server answered
ARTIFACTS = (
    "orion_lora_weights/adapter_model.safetensors",
    "orion_merged/*.safetensors",
    "gguf/orion-f16.gguf",
    "gguf/orion-mmproj-f16.gguf",
    "gguf/orion-q4_k_m.gguf",
)


def build_results(run: Run, *, with_others: bool = True) -> dict[str, Any]:
    """The run's results on its split; `missing` lists unfinished stages. The schema is in docs/results.md.

    `with_others`: also those of a pair or server that the run did not make, if they were evaluated.
    """
    settings, dataset = run.settings, Dataset(run.dataset)
    wanted = [variant.name for variant in variants.wanted(settings)]
    making = [name for name in MAKING if name != "vision features" or settings.variants.all]
    manifests = {name: _made_here(run.product(name)) for name in (*making, *(EVALUATE + name for name in wanted))}
    finished = {name: manifest for name, manifest in manifests.items() if manifest}
    for other in (variants.OTHER_PAIR, variants.SERVER) if with_others else ():
        if of_other := read_manifest(run.evaluation(other)):
            finished[EVALUATE + other] = of_other
            wanted.append(other)
    vision = features.read(run.vision_features) if "vision features" in finished else None
    of_frames = _of_frames(run, dataset, finished.get("dataset"), vision)
    predictions = {name: predictions_in(run.evaluation(name)) for name in wanted if EVALUATE + name in finished}
    if "constrained" in predictions:
        predictions[FLIGHT] = as_flown(predictions["constrained"], of_frames["blank_frames"])
    records = dataset.records(run.split) if predictions else []
    places = {record.name: record.coordinates for record in records if record.coordinates}
    models = {model: summarize(rows) for model, rows in predictions.items()}
    for model, by_condition in models.items():
        for condition, rates in by_condition.items():
            rates |= judge(under(predictions[model], condition), places, settings.mission)
    server, other_pair = (finished.get(EVALUATE + name) for name in (variants.SERVER, variants.OTHER_PAIR))
    f16 = finished.get("evaluate F16")
    return {
        "schema_version": SCHEMA_VERSION,
        "preset": settings.preset,
        "split": run.split,
        "settings": settings.model_dump(mode="json"),
        "overrides": {key: list(pair) for key, pair in overrides(settings).items()},
        "missing": [name for name, manifest in manifests.items() if manifest is None],
        "outdated": {name: changed for name, made in finished.items() if (changed := changed_settings(run, made))},
        "frames": {"count": len(records), "places": len(set(places.values()))},
        "models": models,
        "deltas": {
            name: differences(predictions[first], predictions[second])
            for name, (first, second) in DELTAS.items()
            if first in predictions and second in predictions
        },
        "linear_probe": _against_linear_probe(of_frames["baselines"], predictions.get("fine-tuned")),
        "training_seeds": over_training_seeds(run),
        "within": {model: between_conditions(rows) for model, rows in predictions.items()},
        "variants": steps(predictions, variants.table(settings)),
        "parity": f16.figures["parity"] if f16 else None,
        "operating_point": _at_threshold(run, predictions.get(FLIGHT)),
        **of_frames,
        "foreign_server": {key: server.figures[key] for key in SERVER_FIGURES} if server else {},
        "foreign_pair": other_pair.figures["pair"] if other_pair else "",
        "bytes": {name: size for name in ARTIFACTS if (size := _size(run.folder, name))},
        "seconds": {name: manifest.seconds for name, manifest in finished.items()},
        "figures": {name: manifest.figures for name, manifest in finished.items() if "evaluate" not in name},
        "versions": next((manifest.versions for manifest in finished.values()), {}),
    }


def _made_here(folder: Path) -> Manifest | None:
    """The manifest of the run's own product; older versions stored the answers of other pairs and servers there too."""
    made = read_manifest(folder)
    return None if made is None or {"pair", "server"} & made.figures.keys() else made


def _against_linear_probe(baselines: dict[str, Any], predictions: list[Prediction] | None) -> dict[str, Any] | None:
    """The fine-tuned model without coordinates (B) against the linear probe on the base's frozen vision tower."""
    if LOGISTIC_REGRESSION not in baselines or not predictions:
        return None
    said = baselines[LOGISTIC_REGRESSION]["predictions"]
    model = under(predictions, "B")
    return asdict(compare([replace(p, predicted=Category(said[p.name])) for p in model], model))


def _at_threshold(run: Run, predictions: list[Prediction] | None) -> dict[str, Any] | None:
    """The effect of the run's threshold on this split's frames, by condition; None if none was chosen."""
    chosen = threshold.read(run.folder, run.gguf) if predictions else None
    if chosen is None or predictions is None:
        return None
    low_threshold, temperature = chosen
    rules = Rules(low_threshold=low_threshold)
    by_condition: dict[str, Any] = {
        c: threshold.measurements(rows, rules, run.settings.mission) | threshold.tempered(rows, temperature)
        for c in CONDITIONS
        if (rows := under(predictions, c))
    }
    return {"low_threshold": low_threshold, "temperature": temperature, **by_condition}


def as_flown(predictions: list[Prediction], blank_frames: list[str]) -> list[Prediction]:
    """The answers with the flight's decisions without a threshold; a blank frame is LOW with probability 1."""
    certain = tuple(float(category == Category.LOW) for category in CATEGORIES)
    marked = threshold.with_blank(predictions, blank_frames)
    return [
        replace(p, predicted=category, scores=certain if p.blank else p.scores)
        for p, category in zip(marked, threshold.decided(marked, Rules()), strict=True)
    ]


def differences(first: list[Prediction], second: list[Prediction]) -> dict[str, dict[str, Any]]:
    """Condition -> paired comparison of `second` with `first`; `holm_p` is corrected for the number of conditions.

    Only conditions that both evaluations have are compared, so that older evaluations stay comparable.
    """
    both = {c: (under(first, c), under(second, c)) for c in CONDITIONS}
    return _corrected({c: compare(*rows) for c, rows in both.items() if all(rows)})


def between_conditions(predictions: list[Prediction]) -> dict[str, dict[str, Any]]:
    """The effect of the coordinates (A against B) and of a conflict (A, B against D) on one model."""
    pairs = (("B", "A"), ("A", "D"), ("B", "D"))
    return _corrected({f"{a} to {b}": compare(under(predictions, a), under(predictions, b)) for a, b in pairs})


def _corrected(changes: Mapping[str, Change]) -> dict[str, dict[str, Any]]:
    corrected = holm({name: change.exact_p for name, change in changes.items()})
    return {name: asdict(change) | {"holm_p": corrected[name]} for name, change in changes.items()}


def steps(predictions: dict[str, list[Prediction]], table: Sequence[Variant]) -> list[dict[str, Any]]:
    """The evaluated variants, each with what it `changes` and the effect on the answers (`change`).

    `compared_with` is the variant evaluated before it, unless the table names another; null for the first. Models that
    the run did not make come last.
    """
    rows = [(variant.name, variant.changes, variant.compared_with) for variant in table if variant.role != "other"]
    others = [(variant.name, variant.changes, variant.compared_with) for variant in table if variant.role == "other"]
    found: list[dict[str, Any]] = []
    for name, changes, other in [*rows, (FLIGHT, "the rule for blank frames", ""), *others]:
        if name in predictions:
            against = (other or found[-1]["model"]) if found else None
            change = differences(predictions[against], predictions[name]) if against in predictions else None
            found.append({"model": name, "step": changes, "compared_with": against, "change": change})
    return found


def compare_variants(run: Run, asked: Sequence[Variant], finished: Sequence[Variant]) -> list[dict[str, Any]]:
    """Frames, parsable answers, right answers and the paired change of these variants on the run's split.

    Each is compared, as in `steps`, with one of `finished`: the variants with up-to-date answers, in the table's order.
    The change is null without such a variant.
    """
    predictions = {variant.name: predictions_in(run.evaluation(variant.name)) for variant in finished}
    found = {row["model"]: row for row in steps(predictions, finished)}
    return [
        {
            "variant": variant.name,
            "changes": variant.changes,
            "compared_with": found[variant.name]["compared_with"],
            "conditions": {
                condition: {
                    "count": len(rows),
                    "parsed": sum(row.predicted is not None for row in rows),
                    "right": sum(row.predicted == row.truth for row in rows),
                    "change": (found[variant.name]["change"] or {}).get(condition),
                }
                for condition in CONDITIONS
                if (rows := under(predictions[variant.name], condition))
            },
        }
        for variant in asked
    ]


def results_path(run: Run) -> Path:
    """The path of results.json or results-val.json: one file per split."""
    return run.folder / f"results{'' if run.split == 'test' else f'-{run.split}'}.json"


def _of_frames(run: Run, dataset: Dataset, made: Manifest | None, vision: Mapping[str, Any] | None) -> dict[str, Any]:
    """The measurements made on the frames; from the last report if 'orion clean' removed the frames."""
    if made is None:
        return {"baselines": {}, "blank_frames": [], "size_ranking": None}
    if made.removed:
        return _of_last_report(run)
    records = sorted(dataset.records(run.split), key=lambda record: record.name)
    truth = np.array([CATEGORIES.index(record.verdict.category) for record in records], dtype=np.int64)
    ranking = np.array([dataset.path(record).stat().st_size for record in records], dtype=np.float64)
    return {
        "baselines": baselines(dataset, run.split, vision),
        "blank_frames": dataset.blank_names(run.split),
        "size_ranking": value_figures(truth, ranking, run.settings.mission),  # larger PNG files first
    }


def blank_frames(run: Run) -> list[str]:
    """The names of the split's blank frames; from the last report if 'orion clean' removed the frames."""
    made = read_manifest(run.dataset)
    if made is not None and made.removed:
        return list(_of_last_report(run)["blank_frames"])
    return Dataset(run.dataset).blank_names(run.split)


def _of_last_report(run: Run) -> dict[str, Any]:
    try:
        value = json.loads(results_path(run).read_text(encoding="utf-8"))
        version = value["schema_version"]
        if version != SCHEMA_VERSION:
            raise OrionError(
                f"{results_path(run)} has schema version {version} instead of {SCHEMA_VERSION}.",
                "Run 'orion dataset --force' to make the frames again.",
            )
        return {name: value[name] for name in ("baselines", "blank_frames", "size_ranking")}
    except FileNotFoundError:
        raise OrionError(
            f"the baselines need the frames in {run.dataset}, which 'orion clean' removed before the first report.",
            "Run 'orion dataset --force' to make them again.",
        ) from None
    except (ValueError, KeyError, TypeError):
        raise OrionError(
            f"{results_path(run)} is damaged.", "Run 'orion dataset --force' to make the frames again."
        ) from None


def _size(folder: Path, pattern: str) -> int:
    return sum(path.stat().st_size for path in folder.glob(pattern))
