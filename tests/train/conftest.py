"""A dataset for trainings of which the number of records does not matter."""

import shutil
from pathlib import Path

import pytest

from orion_triage.dataset.records import read_split, write_split
from tests.conftest import MISSION, made_once


@pytest.fixture(scope="session")
def few(small_dataset: Path) -> Path:
    """Four training targets twice, two to validate."""

    def make(folder: Path) -> None:
        shutil.copytree(small_dataset, folder)
        for split, count in (("train", 8), ("val", 2)):
            write_split(folder, split, read_split(small_dataset, split, MISSION)[:count])

    return made_once("few-records", make)
