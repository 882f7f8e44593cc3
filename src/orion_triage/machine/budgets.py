"""The mission's budgets at full size, compared with the last rehearsal on this machine."""

import json
from dataclasses import dataclass
from typing import Any

from orion_triage.errors import OrionError
from orion_triage.machine.rehearse import figures_path

GB, MIB = 1_000_000_000, 1_048_576
FULL_SIZE = "lfm2.5-vl-1.6b"


@dataclass(frozen=True)
class Budget:
    """`limit` in bytes; a size may differ from it by `tolerance` in both directions, a need must not exceed it."""

    what: str
    limit: int
    measured: int | None
    tolerance: float | None = None

    @property
    def kept(self) -> bool | None:
        if self.measured is None:
            return None
        if self.tolerance is None:
            return self.measured <= self.limit
        return abs(self.measured / self.limit - 1) <= self.tolerance


# The mission document's values for the 1.6B model: file sizes, and limits for each stage.
_SIZES = {
    "base": (int(3.2 * GB), 0.02),
    "merged": (int(3.2 * GB), 0.02),
    "Q4_K_M": (730_000_000, 0.02),
    "mmproj": (814 * MIB, 0.02),
}
_MEMORY = {"fuse": 6 * GB, "convert": 2 * GB, "convert mmproj": 2 * GB, "quantize": 2 * GB}
_ANY_STAGE_MEMORY = 8 * GB
_DISK = int(7.5 * GB)  # without the base; 11 GB with it
_VRAM = 8 * GB


def budgets(figures: dict[str, Any] | None) -> list[Budget]:
    """The rows of the table for the 1.6B model; `figures` are the measurements of a rehearsal."""
    sizes = figures["bytes"] if figures else {}
    stages = {stage["stage"]: stage for stage in figures["stages"]} if figures else {}
    rows = [Budget(f"{name}, file", limit, sizes.get(name), tolerance) for name, (limit, tolerance) in _SIZES.items()]
    for stage in dict.fromkeys([*_MEMORY, *stages]):
        limit = _MEMORY.get(stage, _ANY_STAGE_MEMORY)
        rows.append(Budget(f"{stage}, memory", limit, stages.get(stage, {}).get("peak_memory_bytes")))
    disk = max((stage["peak_disk_bytes"] for stage in stages.values()), default=None)
    rows.append(Budget("disk beside the base", _DISK, disk))
    video = [stage["peak_vram_bytes"] for stage in stages.values() if stage["peak_vram_bytes"] is not None]
    rows.append(Budget("GPU memory", _VRAM, max(video, default=None)))
    return rows


def last_rehearsal(preset: str) -> dict[str, Any] | None:
    """The measurements of the preset's last rehearsal; None if there was none."""
    path = figures_path(preset)
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise OrionError(f"{path} is damaged: {error}.", "Run 'orion rehearse' again.") from None
    return value
