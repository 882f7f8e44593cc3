"""The base's licence, which holds for the adapter, the merged model and the GGUF pair made from it.

A model folder in the Hub's layout names its licence in README.md's header and has its text in LICENSE.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orion_triage.errors import OrionError

README = "README.md"


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
