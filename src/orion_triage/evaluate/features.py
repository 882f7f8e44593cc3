"""STAGE vision features: the features of every frame from the base's frozen tower, for the linear-probe baseline."""

from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from orion_triage.dataset.dataset import Dataset
from orion_triage.errors import OrionError
from orion_triage.progress import Progress, silent
from orion_triage.safe.files import replaced_folder

FILE_NAME = "features.npz"


def run(base: Path, dataset: Dataset, out_folder: Path, frame_size: int, progress: Progress = silent) -> dict[str, Any]:
    """Write features.npz: `images` [frames] paths, `vectors` [frames, text width] float32. Returns their number.

    A vector is the mean of the projector's output over the image tokens.
    """
    from orion_triage import processes
    from orion_triage.models.generate import vision_features
    from orion_triage.models.load import load_model, load_processor

    device = processes.local_device()
    model = load_model(base, dtype="float32" if device == "cpu" else "float16", device=device)
    processor = load_processor(base, frame_size)
    records = {record.image: record for record in dataset.every_record()}
    vectors = []
    for done, record in enumerate(records.values(), start=1):
        vectors.append(vision_features(model, processor, [dataset.frame(record, frame_size)])[0].mean(dim=0).numpy())
        progress("encoding frames", done, len(records))
    with replaced_folder(out_folder) as folder:
        np.savez(folder / FILE_NAME, images=np.array(list(records)), vectors=np.stack(vectors).astype(np.float32))
    return {"frames": len(records), "width": len(vectors[0])}


def read(folder: Path) -> dict[str, np.ndarray]:
    """Image path -> vector; raises OrionError if the file is damaged."""
    path = folder / FILE_NAME
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(zip(file["images"].tolist(), file["vectors"].astype(np.float64), strict=True))
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise OrionError(f"{path} is damaged: {error}.", "Delete its folder and run the command again.") from None
