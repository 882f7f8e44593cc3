"""Publish a run's products on the Hub: adapter, merged model or flight pair, with card, licence and results."""

import json
from pathlib import Path
from typing import Any

from orion_triage import hub
from orion_triage.errors import OrionError
from orion_triage.evaluate.results import FLIGHT, NO_THRESHOLD, build_results
from orion_triage.evaluate.variants import MODELS
from orion_triage.export import quantize
from orion_triage.models.licence import README, base_of, licence_of
from orion_triage.publish import card
from orion_triage.report import plot
from orion_triage.runs.manifest import FILE_NAME, read_manifest, refuse_damaged
from orion_triage.runs.run import Run
from orion_triage.safe.files import sha256_of_file
from orion_triage.train.fine_tune import read_losses

# Only measurements of the results are published: settings and manifests contain paths of this machine.
_PUBLISHED = (
    "schema_version", "preset", "split", "frames", "models", "deltas", "within", "linear_probe", "variants", "parity",
    "failed_gate", "training_seeds", "baselines", "size_ranking", "operating_point", "stress", "verdict", "seconds",
    "versions",
)  # fmt: skip


def push(run: Run, product: card.Product, repository: str, *, private: bool = True) -> str:
    """Push one finished product of the run; returns the commit's URL.

    Raises OrionError if the product is not finished, was changed since, or the base's licence is unknown.
    """
    folder = {"adapter": run.adapter, "merged": run.merged, "gguf": run.gguf}[product]
    if read_manifest(folder) is None:
        raise OrionError(f"{folder} is not finished.", "Run 'orion run' first, or pass another run with --run.")
    refuse_damaged(folder)
    # Files beside the pair are not published: they can be made from the merged model, and have three times its size.
    pair = quantize.check_pair(folder).names if product == "gguf" else ()
    licence = licence_of(folder)
    if licence is None:
        raise OrionError(
            f"{folder} does not state the base's licence, which also applies to this product.",
            "Copy the base's README.md and LICENSE into its folder, and make the product again.",
        )
    base = base_of(folder) or "its base"
    results = build_results(run, with_others=False)
    complete = all(model in results["models"] for model in MODELS)
    own_files = {
        name: path
        for name, path in _files(folder)
        if product != "gguf" or name in (*pair, quantize.PAIR) or name.startswith("LICENSE")
    }
    hashes = {
        name: sha256_of_file(path) for name, path in own_files.items() if name.endswith((".safetensors", ".gguf"))
    }
    family, measured_results = card.family_or_default(run.merged), results if complete else None
    text = card.render_card(product, base, licence, run.settings.mission, family, measured_results, hashes, pair)
    measured = _measured(run, results) if complete else {}
    return hub.push(
        {**own_files, **measured, README: text.encode()},
        repository,
        message=f"ORION triage {product}, preset {run.settings.preset}",
        private=private,
    )


def _measured(run: Run, results: dict[str, Any]) -> dict[str, Path | bytes]:
    """The files that the card links to: all measurements, all answers, and the chart of the last report."""
    published = {name: results[name] for name in _PUBLISHED}
    files: dict[str, Path | bytes] = {"evaluation/results.json": (json.dumps(published, indent=2) + "\n").encode()}
    for model in results["models"]:
        if model not in (FLIGHT, NO_THRESHOLD):  # computed from the constrained answers
            files[f"evaluation/{model}.jsonl"] = run.evaluation(model) / "predictions.jsonl"
    picture = run.folder / "report.png"
    if not picture.is_file():
        plot.draw(results, read_losses(run.adapter), picture)
    return files | {"evaluation/report.png": picture}


def _files(folder: Path) -> list[tuple[str, Path]]:
    """The files to publish: no manifest (contains paths of this machine), no card (written again), no hidden files."""
    return [
        (path.relative_to(folder).as_posix(), path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.name not in {FILE_NAME, README}
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
