"""Model cards and licences: every product says what it was made from, and carries the base's licence along.

A base in the Hub's layout names its licence in README.md's header and has its text in LICENSE. Both go with the
adapter, the merged model and the GGUF pair, since they are derivatives of the base.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from orion_triage.errors import OrionError
from orion_triage.safe.files import write_text

Product = Literal["adapter", "merged", "gguf"]

README = "README.md"
_RELATION: dict[Product, str] = {"adapter": "adapter", "merged": "finetune", "gguf": "quantized"}
_LIBRARY: dict[Product, str] = {"adapter": "peft", "merged": "transformers", "gguf": "gguf"}


@dataclass(frozen=True)
class Licence:
    """A card's fields `license` (an identifier, "other" for one of the owner's own), `license_name`, `license_link`."""

    identifier: str
    name: str | None = None
    link: str | None = None


def licence_of(folder: Path) -> Licence | None:
    """The licence that the folder's card names, or the text beside it; None when there is neither."""
    fields = _header(folder)
    if isinstance(fields.get("license"), str):
        return Licence(fields["license"], fields.get("license_name"), fields.get("license_link"))
    return Licence("other", "the licence of the base", "LICENSE") if licence_files(folder) else None


def base_of(folder: Path) -> str | None:
    """The base model that the folder's card names."""
    name = _header(folder).get("base_model")
    return name if isinstance(name, str) else None


def _header(folder: Path) -> dict[str, Any]:
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    path = folder / README
    try:
        return (metadata_load(path) if path.is_file() else None) or {}
    except (YAMLError, ValueError) as error:
        raise OrionError(f"{path}: its header is not YAML: {error}.", "Correct it, or fetch the model again.") from None


def licence_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("LICENSE*") if path.is_file())


def write_card(product: Product, source: Path, base: str, folder: Path) -> None:
    """Put the card and the licence's text into a product's folder; `source` is what it was made from.

    `base` is the base model's Hub id or name. A source without a licence gives a card that says so, and `orion push`
    refuses to publish it.
    """
    for path in licence_files(source):
        shutil.copyfile(path, folder / path.name)
    write_text(folder / README, render_card(product, base, licence_of(source)))


def render_card(
    product: Product,
    base: str,
    licence: Licence | None,
    results: dict[str, Any] | None = None,
    hashes: Mapping[str, str] | None = None,
) -> str:
    """The card's text: YAML header and Markdown; with `results`, what was measured, and `hashes` of the files."""
    from huggingface_hub import ModelCardData

    from orion_triage.report.render import accuracy_rows, from_template

    header = ModelCardData(
        base_model=base,
        base_model_relation=_RELATION[product],
        library_name=_LIBRARY[product],
        license=licence.identifier if licence else None,
        license_name=licence.name if licence else None,
        license_link=licence.link if licence else None,
        pipeline_tag="image-text-to-text",
        tags=["earth-observation", "satellite", "triage", "lfm2-vl"],
        **(_model_index(product, results) if results else {}),
    )
    return from_template(
        "card.md.j2",
        header=header.to_yaml(),
        product=product,
        base=base,
        licence=licence,
        results=results,
        hashes=hashes,
        rows=accuracy_rows(results) if results else [],
    )


def _model_index(product: Product, results: dict[str, Any]) -> dict[str, Any]:
    """The Hub's form of the product's own figures: accuracy, HIGH recall and irrecoverable loss by condition."""
    from huggingface_hub import EvalResult

    from orion_triage.evaluate.conditions import CONDITIONS

    model = "quantized" if product == "gguf" else "fine-tuned"
    found, frames = [], results["frames"]["count"]
    for condition, meaning in CONDITIONS.items():
        rates = results["models"][model][condition]
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
