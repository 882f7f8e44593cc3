"""The checkpoints of a training: resume from a complete one, remove damaged ones."""

import json
import shutil
from pathlib import Path

from orion_triage import processes
from orion_triage.runs.manifest import hash_inputs, hash_outputs
from orion_triage.safe.files import sha256_of_text, write_text
from orion_triage.settings import FineTuneSettings

CHECKPOINTS = "checkpoints"
HASHES_FILE = "sha256.json"  # hashes of a checkpoint's files; written last


def prepare_work_folder(
    work_folder: Path,
    settings: FineTuneSettings,
    frame_size: int,
    base_sha256: str,
    dataset: Path,
    precision: str,
) -> None:
    """Delete the checkpoints in the folder unless they come from the same settings and inputs."""
    inputs = {
        "settings": settings.model_dump(mode="json"),
        "frame_size": frame_size,
        "base": base_sha256,
        "dataset": hash_inputs({"dataset": dataset})["dataset"],
        "precision": precision,
        "processes": processes.count(),
    }
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
    """Whether every file has the hash in HASHES_FILE, which was written last."""
    try:
        hashes = json.loads((checkpoint / HASHES_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(hashes == hash_outputs(checkpoint, without=HASHES_FILE))


def last_checkpoint(checkpoints: Path) -> Path | None:
    return next((folder for folder in reversed(_checkpoints_in(checkpoints)) if _is_whole(folder)), None)


def remove_damaged(checkpoints: Path) -> None:
    """Delete incomplete checkpoints and those with changed bits; their steps are trained again."""
    for folder in _checkpoints_in(checkpoints):
        if not _is_whole(folder):
            shutil.rmtree(folder)
