"""How much the training seed changes: the whole chain after the dataset, once a seed, and the median.

    python benchmarks/training_seeds.py            # three seeds, about 20 minutes on 2 cores
    python benchmarks/training_seeds.py 1 2 3 4 5

Run folders are kept in runs/seeds/, finished stages are skipped, and figures go to benchmarks/results/.
"""

import argparse
import json
import platform
import statistics
from pathlib import Path
from typing import Any

from orion_triage.evaluate.results import build_results
from orion_triage.pipeline import run_stage, stages
from orion_triage.runs.run import Run, prepare
from orion_triage.safe.files import write_text
from orion_triage.settings import load_settings

RESULTS = Path(__file__).parent / "results" / "training_seeds.json"
MODELS = ("fine-tuned", "quantized")


def run_seed(seed: int, preset: str, folder: Path) -> dict[str, Any]:
    """One run with this training seed; the split and the tiles are the preset's own."""
    run = Run(folder / f"seed-{seed}", load_settings(preset, [f"fine_tune.seed={seed}"]))
    prepare(run)
    for stage in stages(run.settings):
        stage_manifest, skipped = run_stage(stage, run)
        print(f"seed {seed}: {stage.name} {'skipped' if skipped else f'{stage_manifest.seconds:.0f} s'}", flush=True)
    return build_results(run)


def row(results: dict[str, Any], model: str) -> dict[str, Any]:
    rates = results["models"][model]
    figures: dict[str, Any] = {condition: rates[condition]["accuracy"] for condition in "ABCD"}
    for key in ("trusted_coordinates", "same_wrong_answer_in_b", "moved_to_coordinates"):
        figures[key] = rates["D"][key]
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seeds", nargs="*", type=int, default=[42, 43, 44])
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--folder", type=Path, default=Path("runs/seeds"))
    arguments = parser.parse_args()
    results = {seed: run_seed(seed, arguments.preset, arguments.folder) for seed in arguments.seeds}
    first = next(iter(results.values()))
    table = {model: {seed: row(result, model) for seed, result in results.items()} for model in MODELS}
    base = row(first, "base")
    print(f"\n{'model':<12} {'seed':>6}   A      B      C      D      D trusted coordinates (same wrong answer in B)")
    lines = [("base", "-", base), *((model, seed, table[model][seed]) for model in MODELS for seed in table[model])]
    for model in MODELS:
        median = {c: statistics.median(figures[c] for figures in table[model].values()) for c in "ABCD"}
        lines.append((model, "median", median))
    for model, seed, figures in lines:
        rates = "  ".join(f"{100 * figures[c]:4.1f}%" for c in "ABCD")
        trust = f"{figures['trusted_coordinates']} ({figures['same_wrong_answer_in_b']})" if len(figures) > 4 else ""
        print(f"{model:<12} {seed:>6}  {rates}   {trust}")
    for name, baseline in first["baselines"].items():
        print(f"{name:<20} {100 * baseline['accuracy']:4.1f}%")
    value = {
        "machine": f"{platform.machine()}, {platform.processor() or 'unknown CPU'}, Python {platform.python_version()}",
        "preset": arguments.preset,
        "base": base,
        "models": table,
        "baselines": {name: baseline["accuracy"] for name, baseline in first["baselines"].items()},
        "seconds": {seed: result["seconds"] for seed, result in results.items()},
    }
    write_text(RESULTS, json.dumps(value, indent=1) + "\n")
    print(f"figures: {RESULTS}")


if __name__ == "__main__":
    main()
