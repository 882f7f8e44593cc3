"""STAGE dataset: catalogue -> split -> frames and records.

Every target gets one 512x512 PNG. Training targets appear twice, with and without coordinates (coordinate
dropout), so that neither prompt is new to the model in flight; val and test always carry coordinates.
"""

import csv
import io
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from orion_triage import hub
from orion_triage.config import DatasetSettings
from orion_triage.dataset.catalogue import Target, load_catalogue, split_targets
from orion_triage.errors import OrionError
from orion_triage.files import replaced_folder, require_free_space, write_bytes, write_text
from orion_triage.frames import CAMERA_SIZE, read_frame
from orion_triage.progress import Progress, silent
from orion_triage.records import IMAGES_FOLDER, SPLITS, Record, Split, image_path, read_split, write_split
from orion_triage.triage import Coordinates, Verdict

_BYTES_PER_FRAME = 700_000  # a noisy 512x512 PNG


def run(out_folder: Path, settings: DatasetSettings, *, progress: Progress = silent) -> dict[str, Any]:
    """Build the dataset folder: three JSONL splits, the frames, and `targets.csv`. Returns counts.

    With `settings.folder`, a dataset in the published layout is checked and copied instead.
    """
    if settings.folder:
        return _copy(hub.locate(settings.folder, "dataset"), out_folder, settings.test_size, progress)
    targets = load_catalogue(Path(settings.catalogue) if settings.catalogue else None)
    splits = split_targets(targets, seed=settings.split_seed, distance_km=settings.split_distance_km)
    more = _repeated(splits["test"], settings.test_size)
    require_free_space(out_folder, _BYTES_PER_FRAME * (len(targets) + len(more)), "the dataset")
    with replaced_folder(out_folder) as folder:
        _draw_all(folder, [*((target, 1) for target in targets), *more], settings, progress)
        for split in SPLITS:
            repeated = (record_of(target, number) for target, number in more if split == "test")
            records = [*records_of(splits[split], split), *repeated]
            write_split(folder, split, records)
        write_text(folder / "targets.csv", _table(splits))
    return {
        "targets": {split: len(splits[split]) for split in SPLITS},
        "records": {
            split: len(list(records_of(splits[split], split))) + len(more) * (split == "test") for split in SPLITS
        },
        "source": settings.source,
        "metres_per_pixel": settings.metres_per_pixel,
    }


def _repeated(targets: list[Target], test_size: int) -> list[tuple[Target, int]]:
    """(place, number of its tile from 2 on) of the test frames beyond one a place: as evenly as they go."""
    if test_size and test_size < len(targets):
        raise OrionError(
            f"dataset.test_size={test_size} is less than the {len(targets)} test places.",
            "Give more, or 0 for one frame a place.",
        )
    return [(targets[n % len(targets)], n // len(targets) + 1) for n in range(len(targets), test_size)]


def _copy(source: Path, out_folder: Path, test_size: int, progress: Progress) -> dict[str, Any]:
    """Copy a finished dataset after decoding every one of its frames; the first bad line or frame stops it.

    A picture of another size than 512x512 (the published generator saved 2560x2560) is cut and scaled as in flight.
    """
    records = {split: read_split(source, split) for split in SPLITS}
    if test_size > len(records["test"]):
        raise OrionError(
            f"dataset.test_size={test_size}: {source} has {len(records['test'])} test records.",
            "Only drawn tiles can be made at will: use a dataset with as many test frames.",
        )
    root = hub.root_of(source)
    paths = {record.image: image_path(source, record, root) for split in SPLITS for record in records[split]}
    if missing := [image for image, path in paths.items() if not path.is_file()]:
        raise OrionError(
            f"{source} lacks {len(missing)} of the {len(paths)} pictures that its records name, {missing[0]} first.",
            f"Put them at these paths, relative to {source}.",
        )
    require_free_space(out_folder, sum(path.stat().st_size for path in paths.values()), "the dataset")
    resized = 0
    with replaced_folder(out_folder) as folder:
        for done, (image, path) in enumerate(sorted(paths.items()), start=1):
            frame = read_frame(path, CAMERA_SIZE, resize=True)
            if frame.native_size == (CAMERA_SIZE, CAMERA_SIZE):
                write_bytes(folder / image, path.read_bytes())
            else:
                write_bytes(folder / image, frame.png())
                resized += 1
            progress("checking and copying frames", done, len(paths))
        for split in SPLITS:
            write_split(folder, split, records[split])
    return {
        "targets": {split: len({record.image for record in records[split]}) for split in SPLITS},
        "records": {split: len(records[split]) for split in SPLITS},
        "source": hub.id_of(source) or str(source),
        "warnings": [f"{resized} of {len(paths)} pictures were not 512x512: cut and scaled"] if resized else [],
    }


def image_name(target: Target, number: int = 1) -> str:
    """The record's image path; the category's prefix keeps files of one class together, as published.

    `number` tells several tiles of one place apart.
    """
    return f"{IMAGES_FOLDER}/{target.category.lower()}_{target.name}{f'~{number}' if number > 1 else ''}.png"


def record_of(target: Target, number: int = 1) -> Record:
    """The line of a place's tile, with its coordinates."""
    where, verdict = Coordinates(target.lon, target.lat), Verdict(target.reason, target.category)
    return Record(image_name(target, number), where, verdict)


def records_of(targets: list[Target], split: Split) -> Iterator[Record]:
    """One record a target with coordinates; in training a second one without."""
    for target in targets:
        record = record_of(target)
        yield record
        if split == "train":
            yield record.without_coordinates()


def _draw_all(folder: Path, tiles: list[tuple[Target, int]], settings: DatasetSettings, progress: Progress) -> None:
    jobs = [
        (
            target.morphology,
            target.name if number == 1 else f"{target.name}~{number}",
            settings.imagery_seed,
            settings.metres_per_pixel,
            str(folder / image_name(target, number)),
        )
        for target, number in tiles
    ]
    workers = min(len(os.sched_getaffinity(0)), 8)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for done, _ in enumerate(pool.map(_draw_one, jobs, chunksize=4), start=1):
            progress("drawing frames", done, len(jobs))


def _draw_one(job: tuple[str, str, int, float, str]) -> None:
    from orion_triage.dataset.synthetic import draw_tile, tile_seed

    morphology, name, seed, metres_per_pixel, path = job
    tile = draw_tile(morphology, tile_seed(seed, name), metres_per_pixel)
    buffer = io.BytesIO()
    tile.image.save(buffer, "PNG")
    write_bytes(Path(path), buffer.getvalue())


def _table(splits: dict[Any, list[Target]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["name", "split", "category", "morphology", "lon", "lat"])
    for split in SPLITS:
        for target in splits[split]:
            writer.writerow([target.name, split, target.category, target.morphology, target.lon, target.lat])
    return text.getvalue()
