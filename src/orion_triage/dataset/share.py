"""Share a dataset on the Hub.

The repository has one folder per split with its pictures and a metadata.jsonl, for `load_dataset` and the Hub's
viewer. It also has the published split files, for `orion run --dataset OWNER/NAME`, a dataset card and Croissant
metadata.

Pixels are shared only if the terms of every frame allow redistribution. Mapbox's do not. The places can then be
shared instead; users with access to the imagery can build the dataset from them.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from orion_triage import hub, templates
from orion_triage.dataset.catalogue import COLUMNS
from orion_triage.dataset.collect import csv_text
from orion_triage.dataset.records import FRAMES_TABLE, Record, image_path, read_split, split_path
from orion_triage.errors import OrionError
from orion_triage.mission.contract import mission_of
from orion_triage.mission.mission import DONE
from orion_triage.safe.files import sha256_of_file, sha256_of_text
from orion_triage.safe.tables import read_csv
from orion_triage.settings import SPLITS, Split

_HUB_SPLITS: dict[Split, str] = {"train": "train", "val": "validation", "test": "test"}
Files = dict[str, Path | bytes]
Frame = dict[str, Any]


def push(
    folder: Path,
    repository: str,
    figures: Mapping[str, Any],
    findings: Sequence[Any],
    *,
    licence: str = "",
    catalogue_only: bool = False,
    private: bool = True,
) -> str:
    """Push the dataset in `folder` to the Hub; returns the commit's URL.

    `figures` are those of its manifest, `findings` those of its check. `licence` is the licence of pixels of unknown
    origin. Raises OrionError if the pixels must not be redistributed.
    """
    frames = read_frames(folder)
    if not catalogue_only:
        licence = _licence(frames, licence)
    files = catalogue_files(frames) if catalogue_only else picture_files(folder, frames)
    about = {
        "repository": repository,
        "figures": figures,
        "findings": Counter(f"{finding.severity}: {finding.check}" for finding in findings),
        "licence": licence or "other",
        "catalogue_only": catalogue_only,
    }
    files["README.md"] = _card(frames, about).encode()
    files["croissant.json"] = (json.dumps(croissant(files, frames, about), indent=2) + "\n").encode()
    what = "catalogue" if catalogue_only else "dataset"
    return hub.push(files, repository, message=f"ORION triage {what}", private=private, kind="dataset")


def read_frames(folder: Path) -> list[Frame]:
    """One entry per frame: the fields of its record and of frames.csv ("" if missing there)."""
    table: dict[str, dict[str, str]] = {}
    if (folder / FRAMES_TABLE).is_file():
        table = {row.get("image", ""): row for _, row in read_csv(folder / FRAMES_TABLE)}
    frames: dict[str, Frame] = {}
    for split in SPLITS:
        for record in read_split(folder, split, mission_of(folder)):
            known = table.get(record.image, {})
            frame = frames.setdefault(record.image, {"record": record, "split": split, **_origin(known)})
            if record.coordinates:
                frame["record"] = record
    return list(frames.values())


def _origin(row: Mapping[str, str]) -> Frame:
    keys = ("name", "morphology", "source", "metres_per_pixel", "captured_at", "licence", "attribution")
    return {key: row.get(key, "") for key in keys} | {"redistributable": row.get("redistributable", "unknown")}


def _licence(frames: Sequence[Frame], given: str) -> str:
    """The licence of the pixels; raises OrionError if a frame's terms forbid redistribution or are unknown."""
    forbidden = [frame for frame in frames if frame["redistributable"] == "no"]
    if forbidden:
        raise OrionError(
            f"{len(forbidden)} of {len(frames)} frames come from {forbidden[0]['source']} ({forbidden[0]['licence']}), "
            "whose terms forbid redistribution of the pixels.",
            "Share only the places: --catalogue-only.",
        )
    unknown = sum(frame["redistributable"] != "yes" for frame in frames)
    if unknown and not given:
        raise OrionError(
            f"the licence of {unknown} of {len(frames)} frames is unknown.",
            "If they may be redistributed, add their licence (--licence cc-by-4.0). Else share only the places "
            "(--catalogue-only).",
        )
    found = sorted({frame["licence"].lower() for frame in frames if frame["redistributable"] == "yes"})
    return given or (found[0] if len(found) == 1 else "other")


def picture_files(folder: Path, frames: Sequence[Frame]) -> Files:
    """Name in the repository -> picture, metadata or split file."""
    root = hub.root_of(folder)
    moved = {frame["record"].image: _name(frame) for frame in frames}
    files: Files = {_name(frame): image_path(folder, frame["record"], root) for frame in frames}
    for split, hub_split in _HUB_SPLITS.items():
        rows = [json.dumps(_metadata(frame)) + "\n" for frame in frames if frame["split"] == split]
        files[f"{hub_split}/metadata.jsonl"] = "".join(rows).encode()
        records = [
            replace(record, image=moved[record.image]) for record in read_split(folder, split, mission_of(folder))
        ]
        files[split_path(Path(), split).name] = "".join(record.to_line() + "\n" for record in records).encode()
    if (folder / FRAMES_TABLE).is_file():
        known = [row for _, row in read_csv(folder / FRAMES_TABLE)]
        table = [row | {"image": moved[row["image"]]} for row in known if row.get("image") in moved]
        if table:
            files[FRAMES_TABLE] = csv_text(list(table[0]), table).encode()
    return files


def catalogue_files(frames: Sequence[Frame]) -> Files:
    """The places with labels and splits, as a catalogue for `orion dataset --set dataset.catalogue=...`."""
    rows = []
    for frame in frames:
        record: Record = frame["record"]
        if record.coordinates is None:
            raise OrionError(f"{record.image} has no coordinates, so its place cannot be shared.", "Add them.")
        rows.append(
            {
                "name": frame["name"] or record.name.lower(),
                "category": record.verdict.category,
                "morphology": frame["morphology"] or record.verdict.category.lower(),
                "lon": record.coordinates.lon,
                "lat": record.coordinates.lat,
                "reason": record.verdict.reason,
                **dict(record.verdict.fields),
                "split": frame["split"],
            }
        )
    once = list({row["name"]: row for row in rows}.values())
    of_fields = [one.name for one in frames[0]["record"].mission.fields]
    return {"catalogue.csv": csv_text([*COLUMNS, *of_fields, "split"], once).encode()}


def _name(frame: Frame) -> str:
    return f"{_HUB_SPLITS[frame['split']]}/{Path(frame['record'].image).name}"


def _metadata(frame: Frame) -> Frame:
    """A row of metadata.jsonl; Hugging Face's ImageFolder matches it to the picture by `file_name`."""
    record: Record = frame["record"]
    return {
        "file_name": Path(record.image).name,
        "category": record.verdict.category,
        "reason": record.verdict.reason,
        **dict(record.verdict.fields),
        "lon": record.coordinates.lon if record.coordinates else None,
        "lat": record.coordinates.lat if record.coordinates else None,
        "morphology": frame["morphology"],
        "source": frame["source"],
        "metres_per_pixel": float(frame["metres_per_pixel"]) if frame["metres_per_pixel"] else None,
        "captured_at": frame["captured_at"],
        "licence": frame["licence"],
    }


def _card(frames: Sequence[Frame], about: Mapping[str, Any]) -> str:
    from huggingface_hub import DatasetCardData

    configs = [
        {
            "config_name": "default",
            "data_files": [{"split": name, "path": f"{name}/*"} for name in _HUB_SPLITS.values()],
        }
    ]
    if about["catalogue_only"]:
        configs = [{"config_name": "default", "data_files": "catalogue.csv"}]
    header = DatasetCardData(
        license=about["licence"],
        task_categories=["image-classification", "image-text-to-text"],
        tags=["earth-observation", "satellite", "triage"],
        size_categories="n<1K" if len(frames) < 1000 else "1K<n<10K" if len(frames) < 10_000 else "10K<n<100K",
        configs=configs,
    )
    counts = Counter((frame["split"], frame["record"].verdict.category) for frame in frames)
    mission = frames[0]["record"].mission
    return templates.fill(
        "dataset",
        "dataset_card.md.j2",
        header=header.to_yaml(),
        about=about,
        splits=_HUB_SPLITS,
        categories=mission.names,
        labels=mission.categories,
        done=DONE,
        counts={split: [counts[split, category] for category in mission.names] for split in SPLITS},
        sources=Counter(
            (frame["source"] or "unknown", frame["licence"] or "unknown", frame["attribution"]) for frame in frames
        ),
        metres=sorted({frame["metres_per_pixel"] for frame in frames if frame["metres_per_pixel"]}),
        captured=sorted(frame["captured_at"] for frame in frames if frame["captured_at"]),
        count=len(frames),
    )


def croissant(files: Files, frames: Sequence[Frame], about: Mapping[str, Any]) -> dict[str, Any]:
    """Croissant 1.0 (JSON-LD) of the repository: its tables as files, and one record set per split or of the places."""
    tables = sorted(name for name in files if name.endswith(("metadata.jsonl", "catalogue.csv")))
    columns = {"category": "sc:Text", "reason": "sc:Text", "lon": "sc:Float", "lat": "sc:Float"}
    kinds = {"whole number": "sc:Integer"}
    columns |= {one.name: kinds.get(one.kind, "sc:Text") for one in frames[0]["record"].mission.fields}
    columns = {"name" if about["catalogue_only"] else "file_name": "sc:Text", **columns}
    return {
        "@context": {
            "@language": "en",
            "@vocab": "https://schema.org/",
            "sc": "https://schema.org/",
            "cr": "http://mlcommons.org/croissant/",
            "dct": "http://purl.org/dc/terms/",
            "conformsTo": "dct:conformsTo",
            "column": "cr:column",
            "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
            "extract": "cr:extract",
            "field": "cr:field",
            "fileObject": "cr:fileObject",
            "recordSet": "cr:recordSet",
            "source": "cr:source",
        },
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": about["repository"].rpartition("/")[2],
        "description": f"{len(frames)} satellite frames with a triage category, the reason, and the place.",
        "license": about["licence"],
        "url": f"https://huggingface.co/datasets/{about['repository']}",
        "distribution": [
            {
                "@type": "cr:FileObject",
                "@id": name,
                "name": name,
                "contentUrl": name,
                "encodingFormat": "text/csv" if name.endswith(".csv") else "application/jsonlines",
                "sha256": _sha256(files[name]),
            }
            for name in tables
        ],
        "recordSet": [
            {
                "@type": "cr:RecordSet",
                "@id": name.split("/")[0].removesuffix(".csv"),
                "name": name.split("/")[0].removesuffix(".csv"),
                "field": [
                    {
                        "@type": "cr:Field",
                        "@id": f"{name.split('/')[0].removesuffix('.csv')}/{column}",
                        "name": column,
                        "dataType": kind,
                        "source": {"fileObject": {"@id": name}, "extract": {"column": column}},
                    }
                    for column, kind in columns.items()
                ],
            }
            for name in tables
        ],
    }


def _sha256(content: Path | bytes) -> str:
    return sha256_of_file(content) if isinstance(content, Path) else sha256_of_text(content.decode())
