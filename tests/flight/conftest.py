"""A small run of the shipped base, its bundle, and a bundle of it with a head; made once for all workers."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orion_triage.dataset.labelled import Labelled
from orion_triage.errors import OrionError
from orion_triage.evaluate import adapt, threshold
from orion_triage.export import quantize
from orion_triage.flight import bundle
from orion_triage.llama_cpp.client import Client
from orion_triage.llama_cpp.server import Server
from orion_triage.llama_cpp.toolchain import Toolchain, find_toolchain
from orion_triage.mission.verdict import Verdict
from orion_triage.models import lfm2_vl
from orion_triage.models.load import TINY_BASE_FOLDER
from orion_triage.pipeline import run_stage, stage_named
from orion_triage.runs.run import Run, open_run, prepare
from orion_triage.settings import load_settings
from tests.conftest import MISSION, made_once
from tests.flight.bundles import LABELS, RISK, Stub, sign, tinted


@pytest.fixture(scope="session")
def made_folder(tmp_path_factory: pytest.TempPathFactory, small_dataset: Path, tiny_pair: Path) -> Path:
    """A folder with `run`, the shipped base itself, quantized and evaluated on six frames, and its `bundle`.

    A copy of each worker's own.
    """

    def make(folder: Path) -> None:
        def take(run: Run, progress: object) -> dict[str, Any]:
            shutil.copytree(tiny_pair, run.gguf)
            return {}

        run, out = Run(folder / "run", load_settings("tiny", ["evaluate.threads=1"])), folder / "bundle"
        prepare(run)
        shutil.copytree(small_dataset, run.dataset)
        shutil.copytree(TINY_BASE_FOLDER, run.merged)
        # The files of this conversion are there already.
        run_stage(replace(stage_named("quantize", run.settings), run=take), run)
        run_stage(stage_named("evaluate quantized", run.settings), run)
        # The base gives one answer to everything.
        with pytest.raises(OrionError, match=r"is DO NOT FLY: .*several answers"):
            bundle.run(run, out)
        assert not out.exists()
        bundle.run(run, out, accepted_risk=RISK, time_out=60)

    return shutil.copytree(made_once("bundled", make), tmp_path_factory.mktemp("bundled") / "made")


@pytest.fixture(scope="session")
def small_run(made_folder: Path) -> Run:
    return open_run(made_folder / "run")


@pytest.fixture(scope="session")
def made(made_folder: Path) -> Path:
    return made_folder / "bundle"


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    """A copy of the bundle under a name that a shell could stumble over."""
    return shutil.copytree(made, tmp_path / "my $bundle")


@pytest.fixture(scope="session")
def toolchain() -> Toolchain:
    return find_toolchain()


@pytest.fixture(scope="session")
def running(toolchain: Toolchain, made: Path) -> Iterator[Client]:
    log = made.parent / "server.log"
    pair = (made / quantize.QUANTIZED, made / quantize.MMPROJ)
    with Server(toolchain, *pair, log=log, turn=lfm2_vl.TURN, threads=1) as server:
        yield server.client


@pytest.fixture(scope="session")
def stubbed(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle with what the stub answers as its expectation; nobody changes it."""

    def expect(record: dict[str, Any]) -> None:
        place = {"after": "", "tokens": list(LABELS.values()), "categories": [[label] for label in LABELS]}
        record["request"] |= {"labels": [place], "prompt_tokens": 30}
        record["frame_size"] = 512  # shrinking in Python takes most of a check's time
        record["golden"] = [*record["golden"][:3], record["golden"][-1]]
        for image in record["golden"][:3]:
            image |= {"answer": Stub.answer, "category": "LOW", "log_probabilities": dict.fromkeys(LABELS, -1.0)}

    folder = shutil.copytree(made, tmp_path_factory.mktemp("stub") / "my $bundle")
    sign(folder, expect)
    return folder


@pytest.fixture
def for_stub(stubbed: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return shutil.copytree(stubbed, tmp_path / "bundle")


@pytest.fixture(scope="session")
def run_with_head(small_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same run with a head that says which colour prevails, and a threshold of that head."""
    run = Run(shutil.copytree(small_run.folder, tmp_path_factory.mktemp("head") / "run"), small_run.settings)
    frames = [
        Labelled(f"{number}.png", Verdict("", MISSION.names[number % 3]), None, Path(), tinted(number))
        for number in range(9)
    ]
    adapt.write(run, adapt.fitted(run, frames, ["LOW"] * len(frames)))
    threshold.choose(run, 0.34, (), of="head", loosen=True)
    return run


@pytest.fixture(scope="session")
def made_with_head(run_with_head: Run) -> Path:
    out = run_with_head.folder.parent / "my $bundle"
    bundle.run(run_with_head, out, accepted_risk=RISK, time_out=60, head=True)
    return out


@pytest.fixture
def headed(made_with_head: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return shutil.copytree(made_with_head, tmp_path / "my $bundle")
