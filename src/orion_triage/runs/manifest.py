"""A stage's manifest: inputs, outputs, settings, library versions and duration.

The stage writes `manifest.json` last, so its presence means that the stage finished. A later run compares settings
and hashes with the manifest. It skips the stage if they match, and repeats the stage if anything changed.
"""

import importlib.metadata
import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from orion_triage import processes
from orion_triage.errors import OrionError
from orion_triage.safe.files import sha256_of_file, write_text

FILE_NAME = "manifest.json"
_SHOWN = 200  # characters of the reason in an error message
_LIBRARIES = (
    "orion-triage",
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "numpy",
    "pillow",
)


@dataclass(frozen=True)
class Manifest:
    """`inputs` and `outputs` map a name or relative path to a sha256; `figures` are the stage's measurements.

    `environment` has the variables that were set and can change numbers (see processes.RECORDED), and `machine` names
    the machine that `seconds` belong to (empty: written by an earlier version).

    `removed` lists outputs that `orion clean` deleted. They count as unchanged, since only their hashes are needed.
    """

    stage: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    outputs: dict[str, str]
    versions: dict[str, str]
    seconds: float
    figures: dict[str, Any] = field(default_factory=dict)
    removed: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    machine: str = ""


def hash_inputs(inputs: dict[str, Path]) -> dict[str, str]:
    """Name -> sha256 of the file, or of the listing of the folder's files and of the outputs that were removed.

    Raises OrionError for a path that does not exist.
    """
    return {name: _hash_path(path) for name, path in inputs.items()}


def _hash_path(path: Path) -> str:
    if path.is_file():
        return sha256_of_file(path)
    if not path.is_dir():
        raise OrionError(f"{path} does not exist.", "First, run the stage that makes it.")
    return sha256_of_listing(_outputs_of(path, read_manifest(path)))


def _outputs_of(folder: Path, manifest: Manifest | None) -> dict[str, str]:
    """{relative path: sha256} of the files in the folder and of those that the manifest lists as removed."""
    removed = {name: manifest.outputs[name] for name in manifest.removed} if manifest else {}
    return removed | hash_outputs(folder)


def sha256_of_listing(hashes: dict[str, str]) -> str:
    """One sha256 of a folder's {relative path: sha256}."""
    import hashlib

    return hashlib.sha256(json.dumps(sorted(hashes.items())).encode()).hexdigest()


def hash_outputs(folder: Path, without: str = FILE_NAME) -> dict[str, str]:
    """Relative POSIX path -> sha256 of every file in `folder`, except hidden files and files named `without`."""
    return {
        path.relative_to(folder).as_posix(): sha256_of_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.name != without
        and not any(part.startswith((".", "__pycache__")) for part in path.relative_to(folder).parts)
    }


def write_manifest(
    folder: Path,
    *,
    stage: str,
    settings: dict[str, Any],
    inputs: dict[str, str],
    seconds: float,
    figures: dict[str, Any] | None = None,
    machine: str = "",
) -> Manifest:
    """Hash all files in `folder` and write its manifest; the last step of a stage.

    `seconds` is the duration of the stage on `machine`. Only rank 0 writes; every process gets the manifest.
    """
    versions = {"python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    manifest = Manifest(
        stage=stage,
        settings=settings,
        inputs=inputs,
        outputs=hash_outputs(folder),
        versions=versions,
        seconds=round(seconds, 3),
        figures=figures or {},
        environment=processes.recorded_environment(),
        machine=machine,
    )
    if not processes.is_main():
        return manifest
    write_text(folder / FILE_NAME, json.dumps(asdict(manifest), indent=2) + "\n")
    return manifest


def write_again(folder: Path, made: Manifest, *, figures: dict[str, Any], inputs: dict[str, str]) -> None:
    """The manifest `made` for changed files in `folder`: their hashes, and these figures and inputs; the rest stays."""
    now = replace(made, outputs=hash_outputs(folder), figures=figures, inputs=inputs)
    write_text(folder / FILE_NAME, json.dumps(asdict(now), indent=2) + "\n")


def read_manifest(folder: Path) -> Manifest | None:
    """The folder's manifest, or None if the stage has not finished there; raises OrionError if it is damaged."""
    path = folder / FILE_NAME
    try:
        return _checked(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, RecursionError, OSError) as error:
        why = str(error)[:_SHOWN]
        raise OrionError(f"{path} is damaged: {why}.", "Delete the folder and run the command again.") from None


def _checked(value: Any) -> Manifest:
    """Raises ValueError or TypeError if the value is not a valid manifest; the content of `figures` is not checked."""
    manifest = Manifest(**value)
    maps = ("settings", "inputs", "outputs", "versions", "figures", "environment")
    others = isinstance(manifest.removed, list) and isinstance(manifest.machine, str)
    if not others or not all(isinstance(getattr(manifest, name), dict) for name in maps):
        raise ValueError("a field has the wrong type")
    # `orion clean` deletes these paths
    for name in (*manifest.outputs, *manifest.removed):
        if not isinstance(name, str) or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ValueError(f"{name!r} is outside the folder")
    if strange := [name for name in manifest.removed if name not in manifest.outputs]:
        raise ValueError(f"{strange[0]!r} is listed as removed but not as an output")
    return manifest


def is_current(folder: Path, *, settings: dict[str, Any], inputs: dict[str, str]) -> bool:
    """Whether the stage's outputs are complete and unchanged, and were made from these settings and inputs."""
    manifest = read_manifest(folder)
    return (
        manifest is not None
        and manifest.settings == json.loads(json.dumps(settings))
        and manifest.inputs == inputs
        and manifest.outputs == _outputs_of(folder, manifest)
    )


def damaged(folder: Path) -> list[str]:
    """Differences between the folder and its manifest, one line per file; empty without a manifest."""
    manifest = read_manifest(folder)
    if manifest is None:
        return []
    found, lines = _outputs_of(folder, manifest), []
    for name in sorted(manifest.outputs.keys() | found.keys()):
        expected, actual = manifest.outputs.get(name), found.get(name)
        if expected == actual:
            continue
        if expected is None:
            lines.append(f"{folder / name} was added after the stage finished")
        elif actual is None:
            lines.append(f"{folder / name} is missing")
        else:
            lines.append(f"{folder / name} has sha256 {actual[:12]} instead of {expected[:12]}")
    return lines


def refuse_damaged(folder: Path) -> None:
    """Raise OrionError for files of a run's stage that were changed, added or lost after it finished."""
    made = read_manifest(folder)
    if made and (lines := damaged(folder)):
        more = f", and {len(lines) - 1} more (orion verify)" if len(lines) > 1 else ""
        raise OrionError(
            f"{lines[0]}{more}.",
            f"Put the files back, move away what was added, or run 'orion {made.stage} --run {folder.parent} --force'.",
        )


def change_of(path: Path, expected: str) -> str:
    """How a file differs from its sha256 in a manifest, in words; empty if it does not, or is not there."""
    if not path.is_file() or (found := sha256_of_file(path)) == expected:
        return ""
    return f"its sha256 is {found[:12]}, in {FILE_NAME} it is {expected[:12]}"


def remove_outputs(folder: Path, unwanted: Callable[[str], bool]) -> int:
    """Delete the outputs whose relative path is `unwanted` and list them in the manifest; returns the bytes freed.

    The manifest is written first, so that an interrupted removal can be repeated and no file counts as missing.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return 0
    names = sorted({*manifest.removed, *filter(unwanted, manifest.outputs)})
    write_text(folder / FILE_NAME, json.dumps(asdict(replace(manifest, removed=names)), indent=2) + "\n")
    freed = 0
    for name in names:
        path = folder / name
        if path.is_file():
            freed += path.stat().st_size
            path.unlink()
    return freed
