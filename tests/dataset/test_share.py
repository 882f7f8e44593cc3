"""dataset/share.py through the command line and a Hub on 127.0.0.1: what is pushed loads with the library datasets."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from orion_triage.dataset import build
from orion_triage.dataset.catalogue import load_catalogue
from orion_triage.dataset.records import FRAMES_TABLE, read_split
from orion_triage.dataset.split import given_splits
from orion_triage.runs.manifest import read_manifest, write_manifest
from orion_triage.runs.run import Run, prepare
from orion_triage.settings import SPLITS, DatasetSettings, load_settings
from tests.conftest import MISSION
from tests.dataset.test_directory import rows, write
from tests.hub_server import TOKEN, Hub, serve


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with a dataset of 18 frames of the user's own, their terms unknown."""
    folder = tmp_path_factory.mktemp("share")
    run = Run(folder / "runs" / "own", load_settings("tiny"))
    prepare(run)
    settings = DatasetSettings(folder=str(write(folder / "own", rows())))
    figures = build.run(run.dataset, settings, MISSION)
    write_manifest(run.dataset, stage="dataset", settings={}, inputs={}, seconds=1, figures=figures)
    return run


def push(hub: Hub, run: Run, *arguments: str) -> subprocess.CompletedProcess[str]:
    home = run.folder.parent / "hf"
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "COLUMNS": "200"}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "orion_triage.cli", "dataset", "push", "me/frames", "--run", str(run.folder)]
    return subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def shared(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the Hub has when the dataset was pushed."""
    with serve() as hub:
        result = push(hub, run, "--licence", "cc-by-4.0")
        assert result.returncode == 0, result.stderr
        assert "me/frames/commit/" in result.stderr
        return pushed(hub, tmp_path_factory.mktemp("pushed"))


def pushed(hub: Hub, folder: Path) -> Path:
    """The repository's content, laid out in a folder."""
    repository = hub.repositories["me/frames"]
    assert repository.kind == "datasets"
    for name, data in repository.commits[repository.resolve("main") or ""].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def test_a_pushed_dataset_loads_with_datasets_and_runs_again(
    shared: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    # It has read its environment already.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    loaded = datasets.load_dataset(str(shared), cache_dir=str(tmp_path / "cache"))
    assert {name: len(part) for name, part in loaded.items()} == {"train": 12, "validation": 3, "test": 3}
    records = {record.image.rpartition("/")[2]: record for record in read_split(run.dataset, "test", MISSION)}
    for row in loaded["test"]:
        record = next(r for r in records.values() if r.verdict.reason == row["reason"])
        assert (row["category"], row["lon"], row["lat"]) == (
            record.verdict.category,
            record.coordinates.lon,  # type: ignore[union-attr]
            record.coordinates.lat,  # type: ignore[union-attr]
        )
        assert np.array_equal(np.asarray(row["image"]), np.asarray(Image.open(run.dataset / record.image)))
    again = build.run(tmp_path / "again", DatasetSettings(folder=str(shared)), MISSION)
    assert again["records"] == {"train": 24, "val": 3, "test": 3}
    for split in SPLITS:
        ours = [(r.coordinates, r.verdict) for r in read_split(run.dataset, split, MISSION)]
        assert [(r.coordinates, r.verdict) for r in read_split(tmp_path / "again", split, MISSION)] == ours
    assert (tmp_path / "again" / FRAMES_TABLE).is_file()


def test_card_and_croissant_say_what_is_in_it(shared: Path) -> None:
    import mlcroissant
    from huggingface_hub import DatasetCard

    card = DatasetCard.load(shared / "README.md")
    assert card.data.license == "cc-by-4.0"
    for part in (
        "| train | 4 | 4 | 4 |",
        "| validation | 1 | 1 | 1 |",
        "| 18 | directory | unknown |",
        "places less than 100 km apart are in the same split",
        "warning: few-test-frames",
    ):
        assert part in card.text, part
    croissant = mlcroissant.Dataset(jsonld=shared / "croissant.json")
    found = list(croissant.records("test"))
    assert len(found) == 3
    value = json.loads((shared / "test" / "metadata.jsonl").read_text().splitlines()[0])
    assert found[0]["test/reason"].decode() == value["reason"]


def test_pixels_of_unknown_terms_or_mapboxs_stay_here_and_their_places_can_go(run: Run, tmp_path: Path) -> None:
    run = Run(shutil.copytree(run.folder, tmp_path / "runs" / "own"), run.settings)
    made = read_manifest(run.dataset)
    assert made is not None
    with serve() as hub:
        refused = push(hub, run)
        assert refused.returncode == 1
        assert "the licence of 18 of 18 frames is unknown" in refused.stderr
        table = run.dataset / FRAMES_TABLE
        text = table.read_text().replace(",directory,", ",simsat,")
        table.write_text(text.replace(",unknown,,unknown,", ",Mapbox,© Mapbox,no,"))
        refused = push(hub, run, "--licence", "cc-by-4.0")  # a table in which another hand could write "yes"
        assert refused.returncode == 1
        assert f"{FRAMES_TABLE} has sha256 " in refused.stderr
        write_manifest(run.dataset, stage="dataset", settings={}, inputs={}, seconds=1, figures=made.figures)
        refused = push(hub, run, "--licence", "cc-by-4.0")
        assert refused.returncode == 1
        assert "18 of 18 frames come from simsat (Mapbox), whose terms forbid" in refused.stderr
        assert not hub.repositories
        result = push(hub, run, "--catalogue-only")
        assert result.returncode == 0, result.stderr
        folder = pushed(hub, tmp_path / "pushed")
    assert sorted(path.name for path in folder.rglob("*") if path.is_file()) == [
        "README.md",
        "catalogue.csv",
        "croissant.json",
    ]
    splits = given_splits(load_catalogue(folder / "catalogue.csv", drawable=False))
    assert splits is not None
    with table.open(newline="") as file:
        expected = {row["name"]: row["split"] for row in csv.DictReader(file)}
    assert {target.name: split for split in SPLITS for target in splits[split]} == expected
