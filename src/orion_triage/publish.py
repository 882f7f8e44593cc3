"""A run's products to the Hub: the adapter, the merged model or the flight pair, with card, licence and results."""

from pathlib import Path

from orion_triage import card, hub, quantize
from orion_triage.errors import OrionError
from orion_triage.manifest import FILE_NAME, read_manifest
from orion_triage.pipeline import Run
from orion_triage.report.results import MODELS, build_results

# The F16 backbone stays here: it can be made again from the merged model, and is three times the pair's size.
_PAIR = (quantize.QUANTIZED, quantize.MMPROJ, quantize.PAIR)


def push(run: Run, product: card.Product, repository: str, *, private: bool = True) -> str:
    """Push one finished product of the run; returns the commit's address.

    Raises OrionError when the product is not finished, or when nobody can tell under which licence the base stands.
    """
    folder = {"adapter": run.adapter, "merged": run.merged, "gguf": run.gguf}[product]
    if read_manifest(folder) is None:
        raise OrionError(f"{folder} is not finished.", "Run 'orion run' first, or pass another run with --run.")
    if product == "gguf":
        quantize.check_pair(folder)
    licence = card.licence_of(folder)
    if licence is None:
        raise OrionError(
            f"{folder} says nothing about the base's licence, which holds for its derivatives.",
            "Put the base's README.md and LICENSE into its folder, and make the product again.",
        )
    base = card.base_of(folder) or "its base"
    results = build_results(run)
    own = not results["foreign_server"] and not results["foreign_pair"]
    complete = own and all(model in results["models"] for model in MODELS)
    text = card.render_card(product, base, licence, results if complete else None)
    files: dict[str, Path | bytes] = {
        name: path for name, path in _files(folder) if product != "gguf" or name in _PAIR or name.startswith("LICENSE")
    }
    return hub.push(
        files | {card.README: text.encode()},
        repository,
        message=f"ORION triage {product}, preset {run.settings.preset}",
        private=private,
    )


def _files(folder: Path) -> list[tuple[str, Path]]:
    """What can be published: no receipt (it holds paths of this machine), no card (made anew), no hidden file."""
    return [
        (path.relative_to(folder).as_posix(), path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.name not in {FILE_NAME, card.README}
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
