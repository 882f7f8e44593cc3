"""What a few labelled frames of another camera are worth to a run: a head, a continued adapter, a linear probe.

    python benchmarks/few_labels.py FOLDER --run runs/tiny            # about 20 minutes on 2 free cores
    python benchmarks/few_labels.py FOLDER --run runs/tiny --no-training

FOLDER is any that `orion adapt` takes. First `orion adapt --how continue`: zero-shot, always the commonest category,
head and continued adapter by cross-validation, and the run's own test frames before and after. Then the published
protocol for few labels (OPS-SAT's): so many labels of each class are drawn, the rest of these classes is the test,
several times. Head and continued adapter are scored on the quantized pair, the probe on the base in float32. Finished
trainings are kept beside the run, figures go to benchmarks/results/, and the tables are printed.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from orion_triage.cli import app
from orion_triage.dataset.labelled import Labelled, read_labelled
from orion_triage.evaluate import adapt, head
from orion_triage.evaluate.baselines import logistic_regression
from orion_triage.evaluate.metrics import change_of
from orion_triage.evaluate.statistics import wilson
from orion_triage.flight import continued
from orion_triage.imagery.frames import shrink
from orion_triage.imagery.stretch import stretch_of
from orion_triage.models.load import base_name, resolve_base
from orion_triage.runs.run import Run, open_run
from orion_triage.safe.files import sha256_of_file, write_text
from orion_triage.safe.reading import read_object

RESULTS = Path(__file__).parent / "results" / "few_labels.json"
PENALTY = 0.1  # of the probe; the one that val mostly chooses on drawn tiles
FEWEST_LEFT = 3  # frames of a class that the test needs
DRAWS = 100  # of the ways that train nothing
SEED = 42

Answer = Callable[[Sequence[int], Sequence[int]], list[str | None]]  # (frames known, frames asked) -> decisions


def probe_features(run: Run, frames: Sequence[Labelled]) -> np.ndarray:
    """The mean [frames, width] of what the base's frozen tower gives the language model about the whole frame."""
    from orion_triage.models.generate import vision_features
    from orion_triage.models.load import load_model, load_processor

    base, size = resolve_base(run.settings.base.model), run.settings.base.frame_size
    model, processor = load_model(base, dtype="float32"), load_processor(base, size)
    images = [shrink(frame.image, size) for frame in frames]
    return vision_features(model, processor, images).mean(dim=1).numpy().astype(np.float64)


def draws_of(truth: np.ndarray, labels: int, count: int) -> tuple[list[int], list[tuple[list[int], list[int]]]]:
    """(Classes with enough frames, draws of (known, asked): `labels` frames of each class, and its others)."""
    random = np.random.default_rng(SEED)
    classes = [index for index, found in enumerate(np.bincount(truth)) if found >= labels + FEWEST_LEFT]
    drawn = []
    for _ in range(count):
        orders = [random.permutation(np.flatnonzero(truth == one)).tolist() for one in classes]
        drawn.append(([i for order in orders for i in order[:labels]], [i for order in orders for i in order[labels:]]))
    return classes, drawn


def protocol(
    names: Sequence[str], truth: np.ndarray, drawn: Sequence[tuple[list[int], list[int]]], answer: Answer
) -> dict[str, Any]:
    """The mean accuracy and mean recall over draws, and how far they spread."""
    accuracies, recalls = [], []
    for known, asked in drawn:
        right = np.array([names[truth[i]] == said for i, said in zip(asked, answer(known, asked), strict=True)])
        of = truth[asked]
        accuracies.append(float(right.mean()))
        recalls.append(float(np.mean([right[of == one].mean() for one in np.unique(of)])))
    spread = statistics.stdev(accuracies) if len(accuracies) > 1 else None
    return {
        "draws": len(drawn),
        "asked": len(drawn[0][1]),
        "accuracy": statistics.mean(accuracies),
        "deviation": spread,
        "mean_recall": statistics.mean(recalls),
        "accuracies": accuracies if len(accuracies) <= 10 else None,
    }


def few_labels(
    run: Run, frames: Sequence[Labelled], states: np.ndarray, features: np.ndarray, labels: int, trainings: int,
    zero_shot: Sequence[str | None],
) -> dict[str, Any]:  # fmt: skip
    """The published protocol: each way of adapting, in the same draws; the continued adapter in the first of them."""
    mission = run.settings.mission
    names, truth = mission.names, adapt.truth_of(frames, mission)
    classes, drawn = draws_of(truth, labels, DRAWS)
    left_out = {name: int((truth == i).sum()) for i, name in enumerate(names) if i not in classes}
    found: dict[str, Any] = {"labels_of_a_class": labels, "classes": [names[i] for i in classes], "left_out": left_out}
    if len(classes) < 2:
        return found | {"why": f"fewer than two classes have {labels} labels and {FEWEST_LEFT} frames to test"}

    def by_head(known: Sequence[int], asked: Sequence[int]) -> list[str | None]:
        weights, bias = head.fit(states[known], truth[known], len(names))
        return [names[i] for i in (states[asked] @ weights.T + bias).argmax(axis=1)]

    def by_probe(known: Sequence[int], asked: Sequence[int]) -> list[str | None]:
        fit = logistic_regression(features[known], truth[known], PENALTY)
        return [names[i] for i in fit.predict(features[asked])]

    def by_continuing(known: Sequence[int], asked: Sequence[int]) -> list[str | None]:
        picked = [frames[i] for i in [*known, *asked]]
        fold = [np.arange(len(known), len(picked), dtype=np.int64)]
        return list(continued.out_of_fold(run, picked, fold, name=f"draw-{known[0]}-{known[-1]}").answers[len(known) :])

    ways: dict[str, tuple[Answer, int]] = {
        "zero_shot": (lambda known, asked: [zero_shot[i] for i in asked], DRAWS),
        "head": (by_head, DRAWS),
        "linear_probe": (by_probe, DRAWS),
    }
    if trainings:
        ways |= {"head_in_the_same_draws": (by_head, trainings), "continued": (by_continuing, trainings)}
    return found | {name: protocol(names, truth, drawn[:count], way) for name, (way, count) in ways.items()}


def with_probe(figures: dict[str, Any], run: Run, frames: Sequence[Labelled], features: np.ndarray, folds: int) -> None:
    """Add the linear probe in the same division into folds as the continued adapter."""
    mission = run.settings.mission
    truth, places = adapt.truth_of(frames, mission), adapt.places_of(frames)
    said = np.zeros(len(truth), dtype=np.int64)
    for fold in adapt.folds_of(frames, mission, folds):
        known = np.setdiff1d(np.arange(len(truth)), fold)
        said[fold] = logistic_regression(features[known], truth[known], PENALTY).predict(features[fold])
    right = said == truth
    low, high = wilson(int(right.sum()), len(right))
    recalls = [float(right[truth == one].mean()) for one in np.unique(truth)]
    rates = {"count": int(right.sum()), "total": len(right), "rate": float(right.mean()), "low": low, "high": high}
    figures["linear_probe"] = rates | {"balanced": float(np.mean(recalls))}
    if "continued" in figures:
        other = [figures["answers_of_continued"][frame.name] == frame.category for frame in frames]
        changes = [int(b) - int(a) for a, b in zip(right, other, strict=True)]
        figures["change_of_continued"]["linear_probe"] = vars(change_of(changes, places))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("frames", type=Path)
    parser.add_argument("--run", type=Path, default=Path("runs/tiny"))
    parser.add_argument("--folds", type=int, default=5, help="trainings of the cross-validation")
    parser.add_argument("--labels", type=int, nargs="*", default=[10, 5], help="labels of a class in the protocol")
    parser.add_argument("--draws", type=int, default=2, help="trainings of the protocol, for each number of labels")
    parser.add_argument("--no-training", action="store_true", help="only what takes seconds")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()

    run, how = open_run(arguments.run), "head" if arguments.no_training else "continue"
    words = [str(arguments.frames), "--how", how, "--folds", str(arguments.folds), "--run", str(arguments.run)]
    app(["adapt", *words], standalone_mode=False)
    beside = continued.run_beside(run, arguments.frames).folder / continued.FIGURES_FILE
    figures = read_object(run.folder / head.FILE_NAME)["figures"] if arguments.no_training else read_object(beside)
    frames, notes = read_labelled(arguments.frames, run.settings.mission, stretch_of(run.settings.dataset))
    features = probe_features(run, frames)
    with_probe(figures, run, frames, features, arguments.folds)
    states = adapt.states_of(run, [frame.image for frame in frames])
    zero_shot = [figures["answers_of_zero_shot"][frame.name] for frame in frames]
    trainings = 0 if arguments.no_training else arguments.draws
    value = {
        "run": {
            "preset": run.settings.preset,
            "base": base_name(resolve_base(run.settings.base.model)),
            "adapter_sha256": sha256_of_file(run.adapter / "adapter_model.safetensors"),
        },
        "frames": len(frames),
        "notes": notes,
        "continuation": {
            "learning_rate_share": continued.LEARNING_RATE_SHARE, "epochs": continued.EPOCHS,
            "replay": continued.REPLAY,
        },
        "cross_validation": figures,
        "few_labels": [few_labels(run, frames, states, features, n, trainings, zero_shot) for n in arguments.labels],
    }  # fmt: skip
    write_text(arguments.out, json.dumps(value, indent=1) + "\n")
    print("\n".join(table(value)))
    print(f"figures: {arguments.out}")


def table(value: dict[str, Any]) -> list[str]:
    """The figures as the Markdown tables of docs/camera.md."""
    figures = value["cross_validation"]
    labels = {
        "zero_shot": "the pair as it flies", "constant": "always the commonest category", "head": "the head",
        "head_on_its_folds": "the head, in the same five folds", "linear_probe": "a linear probe on the base's tower",
        "continued": "the continued adapter",
    }  # fmt: skip
    lines = [f"| who decides | right of {figures['frames']} | mean recall |", "|---|---:|---:|"]
    for key, label in labels.items():
        if one := figures.get(key):
            rates = f"{one['count']} = {one['rate']:.0%} ({100 * one['low']:.0f} to {100 * one['high']:.0f})"
            lines.append(f"| {label} | {rates} | {one['balanced']:.0%} |")
    for name, change in figures.get("change_of_continued", {}).items():
        interval = f"{100 * change['low']:+.0f} to {100 * change['high']:+.0f} points, p = {change['exact_p']:.2g}"
        lines.append(f"- {name} -> continued: {change['gained']} gained, {change['lost']} lost ({interval})")
    for condition, of in figures.get("forgotten", {}).items():
        lines.append(f"- run's test frames, {condition}: {of['right'][0]} -> {of['right'][1]} of {of['count']}")
    for one in value["few_labels"]:
        lines.append(f"- {one['labels_of_a_class']} labels of {one['classes']} (left out: {one['left_out']})")
        for name in ("zero_shot", "linear_probe", "head", "head_in_the_same_draws", "continued"):
            if rates := one.get(name):
                spread = "" if rates["deviation"] is None else f" +- {rates['deviation']:.0%}"
                lines.append(f"  - {name}: {rates['accuracy']:.0%}{spread} of {rates['asked']}, {rates['draws']} draws")
    return lines


if __name__ == "__main__":
    main()
