"""Model cards: every product states its origin and includes the licence of the base."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from orion_triage import templates
from orion_triage.errors import OrionError
from orion_triage.evaluate.conditions import CONDITIONS
from orion_triage.export import quantize
from orion_triage.mission.mission import Mission
from orion_triage.models.family import DEFAULT, Family, family_in
from orion_triage.models.licence import README, Licence, licence_files, licence_of
from orion_triage.safe.files import write_text

Product = Literal["adapter", "merged", "gguf"]

_RELATION: dict[Product, str] = {"adapter": "adapter", "merged": "finetune", "gguf": "quantized"}
_LIBRARY: dict[Product, str] = {"adapter": "peft", "merged": "transformers", "gguf": "gguf"}


def write_card(product: Product, source: Path, base: str, folder: Path, mission: Mission) -> None:
    """Write the card and the licence's text into a product's folder; `source` is the folder that it was made from.

    `base` is the base model's Hub id or name. Without a licence in `source`, the card states this, and `orion push`
    refuses to publish the product.
    """
    for path in licence_files(source):
        shutil.copyfile(path, folder / path.name)
    pair = quantize.check_pair(folder).names if product == "gguf" else ()
    family = family_or_default(source)
    write_text(folder / README, render_card(product, base, licence_of(source), mission, family, pair=pair))


def family_or_default(folder: Path) -> Family:
    """The family of the checkpoint in a folder; DEFAULT for a folder without one, as that of someone's adapter."""
    try:
        return family_in(folder)
    except OrionError:
        return DEFAULT


def render_card(
    product: Product,
    base: str,
    licence: Licence | None,
    mission: Mission,
    family: Family,
    results: dict[str, Any] | None = None,
    hashes: Mapping[str, str] | None = None,
    pair: Sequence[str] = (),
) -> str:
    """The text of the card: YAML header and Markdown, with the measurements in `results` and `hashes` of the files.

    `pair` has the names of backbone and mmproj; only the card of a GGUF pair needs them.
    """
    from huggingface_hub import ModelCardData

    from orion_triage.report.render import MET, accuracy_rows, rate, sentences, shown, verdict_in_words, words

    header = ModelCardData(
        base_model=base,
        base_model_relation=_RELATION[product],
        library_name=_LIBRARY[product],
        license=licence.identifier if licence else None,
        license_name=licence.name if licence else None,
        license_link=licence.link if licence else None,
        pipeline_tag="image-text-to-text",
        tags=["earth-observation", "satellite", "triage", family.CARD_TAG],
        **(_model_index(product, results) if results else {}),
    )
    return templates.fill(
        "publish",
        "card.md.j2",
        filters={"sentences": sentences, "shown": shown, "rate": rate, "verdict_in_words": verdict_in_words},
        met=MET,
        **words(mission),
        header=header.to_yaml(),
        product=product,
        loading=family.LOADING,
        base=base,
        licence=licence,
        results=results,
        conditions=list(CONDITIONS),
        hashes=hashes,
        pair=pair,
        rows=accuracy_rows(results) if results else [],
    )


def _model_index(product: Product, results: dict[str, Any]) -> dict[str, Any]:
    """The product's metrics in the Hub's format: accuracy, recall of what is sent, irrecoverable loss."""
    from huggingface_hub import EvalResult

    model = "quantized" if product == "gguf" else "fine-tuned"
    found, frames = [], results["frames"]["count"]
    for condition, meaning in CONDITIONS.items():
        rates = results["models"][model].get(condition)
        if rates is None:  # the model was evaluated before this condition was added
            continue
        values = {"accuracy": rates["accuracy"]}
        if condition != "C":
            values |= {name: rates[name]["rate"] for name in ("high_recall", "irrecoverable_loss")}
        found += [
            EvalResult(
                task_type="image-classification",
                dataset_type=f"orion-triage-{results['figures']['dataset']['source']}",
                dataset_name=f"{results['split']} split, {frames} frames, condition {condition}: {meaning}",
                dataset_split=results["split"],
                dataset_config=condition,
                metric_type=name,
                metric_value=round(value, 4),
            )
            for name, value in values.items()
            if value is not None
        ]
    return {"model_name": "ORION triage", "eval_results": found}
