"""The licence of the base, which also applies to the adapter, the merged model and the GGUF pair made from it.

A model folder in the Hub's layout names its licence in the header of README.md and has the text in LICENSE.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orion_triage.errors import OrionError

README = "README.md"


@dataclass(frozen=True)
class Licence:
    """A model card's fields `license` (an identifier; "other" for a custom licence), `license_name`, `license_link`."""

    identifier: str
    name: str | None = None
    link: str | None = None


def licence_of(folder: Path) -> Licence | None:
    """The licence that the folder's card names, or "other" for a LICENSE file without a name; None without both."""
    fields = _header(folder)
    if isinstance(fields.get("license"), str):
        return Licence(fields["license"], fields.get("license_name"), fields.get("license_link"))
    return Licence("other", "the licence of the base", "LICENSE") if licence_files(folder) else None


def base_of(folder: Path) -> str | None:
    """The base model that the folder's card names; None if it names none."""
    name = _header(folder).get("base_model")
    return name if isinstance(name, str) else None


def _header(folder: Path) -> dict[str, Any]:
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    path = folder / README
    try:
        return (metadata_load(path) if path.is_file() else None) or {}
    except (YAMLError, ValueError) as error:
        raise OrionError(f"{path}: the header is not YAML: {error}.", "Correct it, or fetch the model again.") from None


def licence_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("LICENSE*") if path.is_file())
