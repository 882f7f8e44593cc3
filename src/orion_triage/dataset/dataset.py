"""An opened dataset: its records by split and its frames, each read and decoded once."""

from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from orion_triage.dataset.records import Record, image_path, read_split, split_path
from orion_triage.errors import OrionError
from orion_triage.imagery.frames import CAMERA_SIZE, appearance, is_blank, looks_blank, read_frame
from orion_triage.mission.decide import Rules, is_unlike
from orion_triage.mission.mission import Mission
from orion_triage.runs.manifest import change_of, read_manifest
from orion_triage.settings import SPLITS, Split

if TYPE_CHECKING:
    from PIL import Image

KEPT_FRAMES = 512  # decoded frames in the cache (least recently used go): 0.4 GB at 512 px; a run has 360


class Dataset:
    """The dataset of a mission in a folder. Each split is read at its first use and cached.

    Raises the errors of `read_split`, `image_path` and `read_frame`, which name the file and line, and OrionError for a
    split or a frame that was changed after the dataset was made.
    """

    def __init__(self, folder: Path, mission: Mission) -> None:
        self.folder, self.mission = folder, mission
        self._records: dict[Split, list[Record]] = {}
        self._frame = lru_cache(KEPT_FRAMES)(self._read_frame)

    def records(self, split: Split) -> list[Record]:
        """The split's records, in the file's order."""
        if split not in self._records:
            self._require_as_made(split_path(self.folder, split))
            self._records[split] = read_split(self.folder, split, self.mission)
        return self._records[split]

    def every_record(self) -> list[Record]:
        """The records of train, val and test, in this order."""
        return [record for split in SPLITS for record in self.records(split)]

    @cached_property
    def _made(self) -> dict[str, str]:
        """Path in the folder -> sha256, as the stage wrote it; empty for a dataset that no stage made."""
        made = read_manifest(self.folder)
        return made.outputs if made else {}

    def _require_as_made(self, path: Path) -> None:
        expected = self._made.get(path.relative_to(self.folder).as_posix())
        if expected and (change := change_of(path, expected)):
            raise OrionError(
                f"{path} was changed after the dataset was made: {change}.",
                f"Put the file back, or make the dataset again: 'orion dataset --run {self.folder.parent} --force'. "
                "Correct labels and pictures in what the dataset is made from.",
            )

    def require_as_made(self) -> None:
        """Raise OrionError for a split that was changed after the dataset was made, before a stage costs time."""
        for split in SPLITS:
            self._require_as_made(split_path(self.folder, split))

    def _read_frame(self, path: Path, size: int) -> "Image.Image":
        image = read_frame(path, size).image
        self._require_as_made(path)
        return image

    def path(self, record: Record) -> Path:
        """The record's image file."""
        return image_path(self.folder, record)

    def frame(self, record: Record, size: int) -> "Image.Image":
        """The RGB frame of `size` x `size` pixels; cached, so do not modify it."""
        return self._frame(self.path(record), size)

    def appearance(self) -> dict[str, tuple[float, float]]:
        """The range of each measure of a frame (imagery/frames.py) over the frames of train and val that are not blank.

        Raises OrionError if all of them are blank.
        """
        names = {record.name: record for split in ("train", "val") for record in self.records(split)}
        every = [appearance(self.frame(record, CAMERA_SIZE)) for record in names.values()]
        found = [measures for measures in every if not looks_blank(measures)]
        if not found:
            raise OrionError(f"all frames of train and val in {self.folder} are blank.", "Add frames with content.")
        return {name: (min(one[name] for one in found), max(one[name] for one in found)) for name in found[0]}

    def unlike_names(self, split: Split, rules: Rules) -> list[str]:
        """The sorted names of the split's frames that are outside the ranges of these rules."""
        named = {record.name: record for record in self.records(split)}
        return [
            name
            for name in sorted(named)
            if rules.appearance and is_unlike(appearance(self.frame(named[name], CAMERA_SIZE)), rules)
        ]

    def blank_names(self, split: Split) -> list[str]:
        """The sorted names of the split's frames that are blank by the blank rule."""
        named = {record.name: record for record in self.records(split)}
        return [name for name in sorted(named) if is_blank(self.frame(named[name], CAMERA_SIZE))]
