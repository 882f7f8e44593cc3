"""The checkpoints of a training: resume from a complete one, remove damaged ones."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orion_triage import processes
from orion_triage.runs.manifest import hash_outputs
from orion_triage.safe.files import sha256_of_text, write_text

CHECKPOINTS = "checkpoints"
# An adapter of rank 16 has about 1 % of the model's size. A checkpoint adds two optimizer states; all are kept.
CHECKPOINT_SHARE = 0.05
HASHES_FILE = "sha256.json"  # hashes of a checkpoint's files; written last


def settle_checkpoints(work_folder: Path, inputs: Mapping[str, Any]) -> Path | None:
    """The last checkpoint of a training with these inputs, None without; damaged ones and those of others are deleted.

    The main process deletes, while the other processes wait: one that looks into a folder while it is deleted fails.
    """
    checkpoints = work_folder / CHECKPOINTS
    if processes.is_main():
        prepare_work_folder(work_folder, inputs)
        remove_damaged(checkpoints)
    processes.wait()
    return last_checkpoint(checkpoints)


def prepare_work_folder(work_folder: Path, inputs: Mapping[str, Any]) -> None:
    """Delete the checkpoints in the folder unless they come from the same inputs (values that JSON can hold)."""
    fingerprint = sha256_of_text(json.dumps(inputs, sort_keys=True))
    fingerprint_file, checkpoints = work_folder / "fingerprint.txt", work_folder / CHECKPOINTS
    if not fingerprint_file.is_file() or fingerprint_file.read_text(encoding="utf-8") != fingerprint:
        shutil.rmtree(checkpoints, ignore_errors=True)
        shutil.rmtree(work_folder / "tensorboard", ignore_errors=True)
        write_text(fingerprint_file, fingerprint)


def _checkpoints_in(checkpoints: Path) -> list[Path]:
    """The checkpoint folders, oldest first."""
    return sorted(checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))


def _is_whole(checkpoint: Path) -> bool:
    """Whether every file that HASHES_FILE lists, which was written last, has its hash; later files do not matter."""
    try:
        hashes = json.loads((checkpoint / HASHES_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return (
        isinstance(hashes, dict)
        and bool(hashes)
        and hashes.items() <= hash_outputs(checkpoint, without=HASHES_FILE).items()
    )


def last_checkpoint(checkpoints: Path) -> Path | None:
    return next((folder for folder in reversed(_checkpoints_in(checkpoints)) if _is_whole(folder)), None)


def remove_damaged(checkpoints: Path) -> None:
    """Delete incomplete checkpoints and those with changed bits; their steps are trained again."""
    for folder in _checkpoints_in(checkpoints):
        if not _is_whole(folder):
            shutil.rmtree(folder)
