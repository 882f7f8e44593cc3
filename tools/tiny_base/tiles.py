"""The pre-training tiles of the shipped base: drawn once into a cache, 256x256, with what is on them.

Their seeds come from a namespace of their own and no place of the catalogue has any part in them.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from orion_triage.dataset.sources.synthetic.draw import PAINTERS, Tile, draw_tile, tile_seed
from orion_triage.imagery.frames import shrink
from orion_triage.progress import Progress, silent
from orion_triage.safe.children import end_with_parent
from orion_triage.safe.files import write_text

NAMESPACE = "orion-tiny/pre-training"
MORPHOLOGIES = tuple(PAINTERS)
CHUNK = 240  # tiles a file; a multiple of the 15 morphologies
FRAME_SIZE = 256
ROUGH_LAND = 0.4  # 13 % of all tiles: five of the morphologies have such scenes


@dataclass(frozen=True)
class Facts:
    """What is on a tile, for its descriptions; shares are fractions, road density is km per km2."""

    morphology: str
    subtype: str
    biome: str
    water_share: float
    built_share: float
    cloud_share: float
    road_density: float


def seed_of(index: int) -> int:
    return tile_seed(0, f"{NAMESPACE}/{index}")


def _draw_chunk(job: tuple[int, str]) -> int:
    chunk, folder = job
    pixels = np.empty((CHUNK, FRAME_SIZE, FRAME_SIZE, 3), np.uint8)
    facts = []
    for position in range(CHUNK):
        index = chunk * CHUNK + position
        tile = draw_tile(MORPHOLOGIES[index % len(MORPHOLOGIES)], seed_of(index), rough_land=ROUGH_LAND)
        pixels[position] = np.asarray(shrink(tile.image, FRAME_SIZE))
        facts.append(asdict(facts_of(tile)))
    path = Path(folder) / f"{chunk:05d}.npy"
    temporary = path.with_suffix(".partial.npy")
    np.save(temporary, pixels)
    temporary.replace(path)
    write_text(path.with_suffix(".json"), json.dumps(facts))  # last: its presence means the chunk is complete
    return chunk


def facts_of(tile: Tile) -> Facts:
    """What the descriptions may say of a tile, rounded so that the cache's JSON gives it back exactly."""
    return Facts(
        morphology=tile.morphology,
        subtype=tile.subtype,
        biome=tile.biome,
        water_share=round(tile.water_share, 3),
        built_share=round(tile.built_share, 3),
        cloud_share=round(tile.cloud_share, 3),
        road_density=round(tile.road_density, 2),
    )


def draw_tiles(folder: Path, count: int, workers: int, progress: Progress = silent) -> None:
    """Draw the first `count` tiles (rounded up to whole chunks) into `folder`; finished chunks are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    chunks = -(-count // CHUNK)
    todo = [(chunk, str(folder)) for chunk in range(chunks) if not (folder / f"{chunk:05d}.json").exists()]
    done = chunks - len(todo)
    progress("drawing tiles", done * CHUNK, chunks * CHUNK)
    with get_context("spawn").Pool(workers, end_with_parent, (os.getpid(),)) as pool:
        for _ in pool.imap_unordered(_draw_chunk, todo):
            done += 1
            progress("drawing tiles", done * CHUNK, chunks * CHUNK)


def load_tiles(folder: Path, count: int) -> tuple[NDArray[np.uint8], list[Facts]]:
    """Pixels (count, 256, 256, 3) and facts of the first `count` tiles."""
    pixels = np.empty((count, FRAME_SIZE, FRAME_SIZE, 3), np.uint8)
    facts: list[Facts] = []
    for chunk, start in _chunks(count):
        stop = min(count, start + CHUNK)
        pixels[start:stop] = np.load(folder / f"{chunk:05d}.npy", mmap_mode="r")[: stop - start]
        facts += [Facts(**entry) for entry in json.loads((folder / f"{chunk:05d}.json").read_text())[: stop - start]]
    return pixels, facts


def _chunks(count: int) -> Iterator[tuple[int, int]]:
    for chunk in range(-(-count // CHUNK)):
        yield chunk, chunk * CHUNK
