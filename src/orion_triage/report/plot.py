"""results.json -> report.png: accuracy with its intervals beside the baselines, and the losses of the fine-tuning."""

import io
from pathlib import Path
from typing import Any

from orion_triage.evaluate.conditions import CONDITIONS
from orion_triage.evaluate.variants import MODELS
from orion_triage.safe.files import write_bytes

COLOURS = ("#9aa5b1", "#1f6feb", "#e07b39")  # base, fine-tuned, quantized


def draw(results: dict[str, Any], losses: list[dict[str, float]], path: Path) -> None:
    """Write the figure; `losses` is the fine-tuning's log: `loss` a step, `eval_loss` an epoch, or nothing."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    accuracy, training = figure.subplots(1, 2, width_ratios=(3, 2))
    bars(accuracy, results)
    curves(training, losses)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_bytes(path, picture.getvalue())


def bars(axes: Any, results: dict[str, Any]) -> None:
    shown = [model for model in MODELS if model in results["models"]]
    width = 0.8 / max(1, len(shown))
    for number, model in enumerate(shown):
        rates = [results["models"][model][condition] for condition in CONDITIONS]
        places = [index + (number - (len(shown) - 1) / 2) * width for index in range(len(rates))]
        heights = [100 * rate["accuracy"] for rate in rates]
        below = [100 * (rate["accuracy"] - rate["accuracy_low"]) for rate in rates]
        above = [100 * (rate["accuracy_high"] - rate["accuracy"]) for rate in rates]
        axes.bar(places, heights, width * 0.92, color=COLOURS[MODELS.index(model)], label=model)
        axes.errorbar(places, heights, (below, above), fmt="none", ecolor="#333333", elinewidth=1, capsize=2)
    named = [name for name in results["baselines"] if not name.startswith("always ")]
    for name, style in zip(named, ("-", "--", ":", "-."), strict=False):
        value = 100 * results["baselines"][name]["accuracy"]
        axes.axhline(value, color="#555555", linewidth=1, linestyle=style, label=name.replace("_", " "))
    axes.set_xticks(range(len(CONDITIONS)), [f"{key} {meaning}" for key, meaning in CONDITIONS.items()])
    axes.set_ylim(0, 100)
    axes.set_ylabel("accuracy, %, with 95 % interval")
    axes.set_title(f"{results['split']} split, {results['preset']} preset", loc="left", fontsize=10)
    axes.legend(fontsize=8, ncols=2, frameon=False, loc="upper right", bbox_to_anchor=(1, 1.2))
    axes.spines[["top", "right"]].set_visible(False)


def curves(axes: Any, losses: list[dict[str, float]]) -> None:
    steps = [(entry["step"], entry["loss"]) for entry in losses if "loss" in entry]
    epochs = [(entry["step"], entry["eval_loss"]) for entry in losses if "eval_loss" in entry]
    if steps:
        axes.plot(*zip(*steps, strict=True), color=COLOURS[0], linewidth=1, label="training, a step")
    if epochs:
        axes.plot(*zip(*epochs, strict=True), "o-", color=COLOURS[1], label="validation, an epoch")
        axes.legend(fontsize=8, frameon=False)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss, nats a token of the verdict")
    axes.set_title("fine-tuning", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
