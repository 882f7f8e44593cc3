"""STAGE dataset: places -> split -> pictures from a source -> frames and records.

Every place gets one 512x512 PNG. Training places have two records, with and without coordinates (coordinate dropout),
so that the model has seen both prompts before the flight. Val and test records always have coordinates. A place
without a picture is left out and listed; too many of them stop the build.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any, assert_never

from orion_triage import hub
from orion_triage.dataset.catalogue import Target, load_catalogue
from orion_triage.dataset.collect import ABSENT_TABLE, Conversions, collect, image_name, stored_bytes
from orion_triage.dataset.land import perhaps_swapped
from orion_triage.dataset.records import FRAMES_TABLE, Record, image_path, is_published, read_split, write_split
from orion_triage.dataset.sources.directory import Directory
from orion_triage.dataset.sources.simsat import METRES_PER_PIXEL_AT_500_KM, SIMSAT_URL, SimSat
from orion_triage.dataset.sources.source import ImagerySource, Shot
from orion_triage.dataset.split import given_splits, pairs_within, split_targets
from orion_triage.errors import OrionError
from orion_triage.imagery.camera import Camera, load_camera, through
from orion_triage.imagery.frames import CAMERA_SIZE, read_frame
from orion_triage.imagery.png_jpeg import JPEG, PNG
from orion_triage.imagery.stretch import stretch_of
from orion_triage.mission.contract import require_mission, write_mission
from orion_triage.mission.mission import Mission, listed
from orion_triage.mission.verdict import Verdict
from orion_triage.progress import Progress, silent
from orion_triage.safe.files import cache_folder, replaced_folder, require_free_space, write_bytes
from orion_triage.safe.reading import shown
from orion_triage.settings import SPLITS, DatasetSettings, Split

_BYTES_PER_FRAME = 700_000  # a noisy 512x512 PNG

Splits = dict[Split, list[Target]]


def run(
    out_folder: Path, settings: DatasetSettings, mission: Mission, *, progress: Progress = silent
) -> dict[str, Any]:
    """Build the dataset folder: three JSONL splits, the frames, `frames.csv`, and `absent.csv` if places are missing.

    A folder in the published layout is checked and copied instead. Returns counts, the outcomes of all places, and
    warnings. Raises OrionError for a mistake in the catalogue or the settings, and if too many places are missing.
    """
    if published := published_folder(settings):
        return _copy(published, out_folder, settings, mission, progress)
    source, splits = plan(settings, mission)
    more = repeated(splits["test"], settings)
    asked: list[tuple[Split, Shot]] = [(split, Shot(target)) for split in SPLITS for target in splits[split]]
    asked += [("test", shot) for shot in more]
    require_free_space(out_folder, _BYTES_PER_FRAME * len(asked), "the dataset")
    with replaced_folder(out_folder) as folder:
        share, stretch = settings.largest_missing_share, stretch_of(settings)
        collected = collect(
            folder, source, asked, share, progress, stretch, blank_category=mission.blank, camera=_camera(settings)
        )
        taken = collected.taken
        counts = {}
        for split in SPLITS:
            records = [record for shot in taken[split] for record in records_of(shot, split, mission)]
            if not records:
                raise OrionError(f"no place of the {split} split has a picture.", "Add places to the catalogue.")
            write_split(folder, split, records)
            counts[split] = len(records)
        collected.write_tables(folder)
        write_mission(folder, mission)
    named = any(target.split for members in splits.values() for target in members)
    return {
        "targets": {split: len({shot.target.name for shot in taken[split]}) for split in SPLITS},
        "records": counts,
        "source": source.name,
        "metres_per_pixel": settings.metres_per_pixel if source.name == "synthetic" else None,
        "split_distance_km": None if named else settings.split_distance_km,
        "account": dict(collected.account),
        "warnings": [
            *close_places(splits, footprint_km(settings, source)),
            *_far_out(splits, mission),
            *respaced(splits),
            *getattr(source, "warnings", []),
            *collected.conversions.in_words(),
            *_missing_in_words(collected.absent),
        ],
        **_stretch_of_record(settings),
    }


def _camera(settings: DatasetSettings) -> Camera | None:
    """The camera through which the frames are seen; None if the settings name none."""
    return load_camera(settings.camera) if settings.camera else None


def published_folder(settings: DatasetSettings) -> Path | None:
    """The folder of a dataset that is already in the published layout, or None."""
    if settings.source != "directory":
        return None
    folder = hub.locate(settings.folder, "dataset")
    return folder if is_published(folder) else None


def plan(settings: DatasetSettings, mission: Mission) -> tuple[ImagerySource, Splits]:
    """The source that the settings name, and the places by split; fetches nothing.

    Raises OrionError for mistakes in the catalogue, the split or the options.
    """
    source: ImagerySource
    if settings.source == "directory":
        folder = Directory(hub.locate(settings.folder, "dataset"), mission)
        source, targets = folder, folder.targets
    else:
        given = settings.catalogue or mission.places
        own = Path(given) if given else None
        targets = load_catalogue(own, mission, drawable=settings.source == "synthetic")
        source = _source(settings)
    return source, splits_of(targets, source, settings)


def splits_of(targets: list[Target], source: ImagerySource, settings: DatasetSettings) -> Splits:
    """The places by split: as they say themselves, else by distance. Raises OrionError for what cannot be split."""
    if given := given_splits(targets):
        return given
    footprint = footprint_km(settings, source)
    if settings.split_distance_km < footprint:
        raise OrionError(
            f"dataset.split_distance_km={settings.split_distance_km:g} is less than a frame's diagonal of "
            f"{footprint:.1f} km: two splits could show the same ground.",
            f"Set it to at least {math.ceil(footprint)}.",
        )
    return split_targets(targets, seed=settings.split_seed, distance_km=settings.split_distance_km)


def _source(settings: DatasetSettings) -> ImagerySource:
    cache = cache_folder() / "imagery" / settings.source
    match settings.source:
        case "simsat":
            return SimSat(cache=cache, altitude_km=settings.altitude_km, url=settings.url or SIMSAT_URL)
        case "sentinel2":
            from orion_triage.dataset.sources.sentinel2 import STAC_URL, Sentinel2

            return Sentinel2(
                cache=cache,
                url=settings.url or STAC_URL,
                start=settings.captured_from.isoformat(),
                end=settings.captured_to.isoformat(),
                max_cloud_share=settings.largest_cloud_share,
            )
        case "synthetic":
            from orion_triage.dataset.sources.synthetic.draw import Synthetic

            return Synthetic(settings.imagery_seed, settings.metres_per_pixel, settings.rough_land or 0.0)
        case "directory":
            raise ValueError("plan() handles a folder: its places come with it")
        case _:
            assert_never(settings.source)


def footprint_km(settings: DatasetSettings, source: ImagerySource) -> float:
    """The diagonal of a frame on the ground, in km: two places closer than that can show the same ground.

    In a folder, the widest GeoTIFF counts; without GeoTIFFs, `metres_per_pixel` of the settings.
    """
    match settings.source:
        case "simsat":
            metres = METRES_PER_PIXEL_AT_500_KM * settings.altitude_km / 500
        case "sentinel2":
            metres = 10.0
        case "directory":
            width = source.footprint_metres() if isinstance(source, Directory) else None
            metres = width / CAMERA_SIZE if width else settings.metres_per_pixel
        case "synthetic":
            metres = settings.metres_per_pixel
        case _:
            assert_never(settings.source)
    return CAMERA_SIZE * math.sqrt(2) * metres / 1000


def close_places(splits: Splits, diagonal_km: float) -> list[str]:
    """A warning about pairs of places that share ground."""
    placed = [target for split in SPLITS for target in splits[split] if target.coordinates]
    pairs = pairs_within([target.coordinates for target in placed if target.coordinates], diagonal_km)
    if not len(pairs):
        return []
    first, second = (placed[index] for index in pairs[0])
    return [
        f"{len(pairs)} pairs of places are closer than a frame's diagonal ({diagonal_km:.1f} km) and can show the "
        f"same ground, for example {first.name} ({first.origin}) and {second.name} ({second.origin})"
    ]


def _far_out(splits: Splits, mission: Mission) -> list[str]:
    """A warning about places to be sent or stored that are at sea, but on land with longitude and latitude swapped."""
    built = [
        (target, target.coordinates)
        for split in SPLITS
        for target in splits[split]
        if target.coordinates and mission.kept(target.category)
    ]
    found = [built[index][0] for index in perhaps_swapped([place for _, place in built])]
    if not found:
        return []
    return [
        f"{len(found)} of {len(built)} {listed(mission.that('send', 'store'))} places are far out at sea or in "
        "Antarctica, but on other land "
        f"if longitude and latitude are swapped, for example {found[0].name} ({found[0].origin})"
    ]


def respaced(splits: Splits) -> list[str]:
    """A warning about reasons whose line breaks and other odd blanks became spaces."""
    found = [target for split in SPLITS for target in splits[split] if target.respaced]
    if not found:
        return []
    return [
        f"{len(found)} reasons have line breaks, no-break spaces or tabs, each now one space, for example "
        f"{found[0].name} ({found[0].origin}): {shown(found[0].reason)}"
    ]


def repeated(targets: list[Target], settings: DatasetSettings) -> list[Shot]:
    """The test frames in addition to one per place, spread evenly over the places."""
    size = settings.test_size
    if size and size < len(targets):
        raise OrionError(
            f"dataset.test_size={size} is less than the {len(targets)} test places.",
            f"Set it to {len(targets)} or more, or to 0 for one frame per place.",
        )
    if size > len(targets) and settings.source != "synthetic":
        raise OrionError(
            f"dataset.test_size={size}, but the catalogue has only {len(targets)} test places, and only synthetic "
            "tiles can repeat a place.",
            f"Use a catalogue of about {6 * size} places.",
        )
    return [Shot(targets[n % len(targets)], n // len(targets) + 1) for n in range(len(targets), size)]


def _missing_in_words(absent: list[dict[str, Any]]) -> list[str]:
    if not absent:
        return []
    named = "; ".join(row["why"] for row in absent[:3])
    return [f"{len(absent)} places have no picture and are left out ({ABSENT_TABLE} lists them): {named}"]


def _copy(
    source: Path, out_folder: Path, settings: DatasetSettings, mission: Mission, progress: Progress
) -> dict[str, Any]:
    """Decode every frame of a finished dataset and copy it; raises OrionError for the first bad line or frame.

    A picture that is not 512x512 (the published generator saved 2560x2560) is cropped and scaled as in flight. One that
    is not plain 8-bit RGB is converted.
    """
    require_mission(source, mission)
    test_size, stretch, conversions = settings.test_size, stretch_of(settings), Conversions()
    camera = _camera(settings)
    records = {split: read_split(source, split, mission) for split in SPLITS}
    if test_size > len(records["test"]):
        raise OrionError(
            f"dataset.test_size={test_size}, but {source} has only {len(records['test'])} test records.",
            "Lower it, or use a dataset with more test frames.",
        )
    root = hub.root_of(source)
    paths = {record.image: image_path(source, record, root) for split in SPLITS for record in records[split]}
    if missing := [image for image, path in paths.items() if not path.is_file()]:
        raise OrionError(
            f"{source}: {len(missing)} of the {len(paths)} pictures that the records name are missing, for example "
            f"{missing[0]}.",
            f"Copy them to these paths, relative to {source}.",
        )
    require_free_space(out_folder, sum(path.stat().st_size for path in paths.values()), "the dataset")
    resized = 0
    with replaced_folder(out_folder) as folder:
        for done, (image, path) in enumerate(sorted(paths.items()), start=1):
            frame = read_frame(path, CAMERA_SIZE, resize=True, stretch=stretch)
            frame = through(frame, camera, PurePosixPath(image).stem)
            write_bytes(folder / image, stored_bytes(path, frame, PNG, JPEG))
            resized += frame.native_size != (CAMERA_SIZE, CAMERA_SIZE)
            conversions.add(str(path), frame)
            progress("checking and copying frames", done, len(paths))
        for split in SPLITS:
            write_split(folder, split, records[split])
        for table in (FRAMES_TABLE, ABSENT_TABLE):
            if (source / table).is_file():
                write_bytes(folder / table, (source / table).read_bytes())
        write_mission(folder, mission)
    return {
        "targets": {split: len({record.image for record in records[split]}) for split in SPLITS},
        "records": {split: len(records[split]) for split in SPLITS},
        "source": hub.id_of(source) or str(source),
        "warnings": [
            *([f"{resized} of {len(paths)} pictures were not 512x512: cropped and scaled"] if resized else []),
            *conversions.in_words(),
        ],
        **_stretch_of_record(settings),
    }


def _stretch_of_record(settings: DatasetSettings) -> dict[str, Any]:
    """The stretch for the figures of the stage's manifest; nothing without one."""
    stretch = stretch_of(settings)
    return {"stretch": asdict(stretch)} if stretch else {}


def records_of(shot: Shot, split: Split, mission: Mission) -> Iterator[Record]:
    """The record of a shot with its coordinates; for training, also one without."""
    target = shot.target
    record = Record(
        image_name(shot), target.coordinates, Verdict(target.reason, target.category, target.fields), mission
    )
    yield record
    if split == "train" and target.coordinates:
        yield record.without_coordinates()
