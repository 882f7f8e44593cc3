"""Small real things for the tests: a random LFM2-VL base, frames, and a dataset in the published layout."""

import csv
import gc
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest
from PIL import Image

from orion_triage.dataset.catalogue import COLUMNS, Target, load_catalogue
from orion_triage.dataset.dataset import Dataset
from orion_triage.dataset.records import IMAGES_FOLDER, Record, write_split
from orion_triage.imagery.frames import shrink
from orion_triage.mission.answer import Answer
from orion_triage.mission.mission import default_mission
from orion_triage.mission.prompt import Coordinates, render_prompt, user_text
from orion_triage.mission.verdict import Verdict, answer_text
from orion_triage.models.load import TINY_BASE_FOLDER
from orion_triage.runs.manifest import FILE_NAME

from . import warm

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing in the tests may reach a network
if "PYTEST_XDIST_WORKER" in os.environ:  # each has a core of its own: threads that wait for each other spin
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("LLAMA_ARG_THREADS", "1")

MISSION = default_mission()  # of most tests; the mission of one's own is that of test_mission.py

# The published splits and real frames, which are not the project's to copy.
SHARED = Path(__file__).parents[2] / "shared" / "data"


# The workers take a file of tests at a time, so the short ones come last and even out the end. The first ones do not
# need the run of `finished`, which is made meanwhile. All of these are slow: 'make quick' leaves them out.
LONGEST_FIRST = (
    "test_gpu_benchmark", "test_processes", "test_rehearse", "test_upload", "test_hub", "test_whole_run",
    "test_second_family", "test_fine_tune", "test_remote", "test_simsat_build", "test_scripts", "test_download",
    "test_twins", "test_verdict", "test_continue",
    "test_cli", "test_bench_frame", "test_torture", "test_guides", "test_disk_faults", "test_speed_benchmark",
    "test_reliability", "test_html", "test_fuse", "test_bundle", "test_check_flight",
    "test_bundle_with_head", "test_check_faults", "test_triage_on_board", "test_check",
    "test_hostile_weights", "test_sentinel2", "test_simsat", "test_report", "test_hostile_text", "test_directory",
    "test_synthetic",
    "test_share", "test_build", "test_base", "test_tables", "test_own_folder", "test_stretch", "test_refused",
    "test_foreign_servers", "test_under_stress", "test_cleanup", "test_prerequisites", "test_training_device",
    "test_validation",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """The process that all workers share says where they meet; see warm.py."""
    if not hasattr(config, "workerinput"):
        os.environ[warm.OWNER] = str(os.getpid())
        os.environ[warm.SOCKET] = str(Path(tempfile.mkdtemp(prefix="orion-tests-")) / "socket")


def pytest_unconfigure(config: pytest.Config) -> None:
    gc.unfreeze()  # of the freeze below: what is left at the end would count as leaked
    if not hasattr(config, "workerinput"):
        shutil.rmtree(Path(os.environ[warm.SOCKET]).parent, ignore_errors=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The long files first; and without those that read ../shared, where it is not: the project must pass without."""
    for item in items:
        if item.path.stem in LONGEST_FIRST:
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: LONGEST_FIRST.index(item.path.stem) if item.path.stem in LONGEST_FIRST else 99)
    if SHARED.is_dir():
        return
    left_out = [item for item in items if item.get_closest_marker("shared")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


_modules_of_last_freeze = 0


def pytest_runtest_logfinish() -> None:
    """Leave what libraries made while they were loaded out of every later garbage collection, of which a training asks
    for one: each would go through a million objects."""
    global _modules_of_last_freeze
    if len(sys.modules) > _modules_of_last_freeze + 300:
        _modules_of_last_freeze = len(sys.modules)
        gc.collect()
        gc.freeze()


ORION = [sys.executable, "-m", "orion_triage.cli"]
REASONS = {
    "HIGH": "Dense geometric port infrastructure with long quays.",
    "MEDIUM": "Ordinary street grid beside checkerboard fields.",
    "LOW": "Unbroken dunes without any human infrastructure.",
}


class ConstantBackend:
    """The same answer to everything: the smallest real Backend, where what answers is not the test's business."""

    batch_size = 16

    def __init__(self, answer: str) -> None:
        self._answer = answer

    def answer(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[Answer]:
        return [Answer(self._answer)] * len(prompts)


def places_of(*morphologies: str, count: int) -> list[Target]:
    """The first `count` places of each of these morphologies (of all, if none is named) in the shipped catalogue."""
    seen: Counter[str] = Counter()
    targets = []
    for target in load_catalogue():
        seen[target.morphology] += 1
        if seen[target.morphology] <= count and target.morphology in (morphologies or seen):
            targets.append(target)
    return targets


def write_catalogue(path: Path, targets: Iterable[Target]) -> Path:
    """A catalogue file with these places."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for t in targets:
            assert t.coordinates is not None
            writer.writerow([t.name, t.category, t.morphology, t.coordinates.lon, t.coordinates.lat, t.reason])
    return path


def made_once(name: str, make: Callable[[Path], object]) -> Path:
    """A folder that the first worker to need it lets `make` fill, for all workers; nobody changes it."""
    folder = _shared_run().with_name(name)
    with filelock.FileLock(f"{folder}.lock"):
        if not folder.exists():
            begun = Path(tempfile.mkdtemp(dir=folder.parent)) / name
            make(begun)
            begun.rename(folder)
    return folder


@pytest.fixture(scope="session")
def small_base() -> Path:
    """A saved LFM2-VL of 1 M random parameters: one conv and one attention layer, three vision layers."""
    return made_once("small-base", lambda folder: make_base(folder, seed=0))


@pytest.fixture(scope="session")
def other_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same shapes with other weights."""
    return make_base(tmp_path_factory.mktemp("other") / "other-base", seed=1)


def make_base(folder: Path, seed: int, layernorm: bool = False, **other_sizes: Any) -> Path:
    import torch
    from transformers import Lfm2VlForConditionalGeneration

    from orion_triage.models import lfm2_vl_shapes

    texts = [render_prompt(MISSION, Coordinates(lon / 7, lon / 3)) for lon in range(-60, 60, 5)]
    texts += [answer_text(MISSION, Verdict(reason, category)) for category, reason in REASONS.items()]
    tokenizer = lfm2_vl_shapes.train_tokenizer(texts, 704)
    sizes: dict[str, Any] = {
        "layer_types": ("conv", "full_attention"),
        "text_feed_forward": 256,
        "attention_heads": 4,
        "key_value_heads": 2,
        "vision_width": 64,
        "vision_layers": 3,  # the converter takes linear_2 for a block number, which must exist
        "vision_heads": 2,
        "vision_feed_forward": 128,
        "projector_width": 128,
    }
    config = lfm2_vl_shapes.make_config(tokenizer, **(sizes | other_sizes))
    config.projector_use_layernorm = layernorm
    torch.manual_seed(seed)
    model = Lfm2VlForConditionalGeneration(config)
    with torch.no_grad():  # the usual initial scale of 0.02 leaves every effect near the rounding error
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    lfm2_vl_shapes.save_base(model, lfm2_vl_shapes.make_processor(tokenizer, 256), folder)
    return folder


def structured_picture(seed: int) -> Image.Image:
    """512x512 RGB: a smooth background with rectangles, different for every seed."""
    random = np.random.default_rng(seed)
    coarse = random.integers(30, 180, (8, 8, 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(coarse).resize((512, 512), Image.Resampling.BICUBIC)).copy()
    for _ in range(12):
        top, left = random.integers(0, 448, 2)
        height, width = random.integers(8, 64, 2)
        pixels[top : top + height, left : left + width] = random.integers(0, 256, 3)
    return Image.fromarray(pixels)


@pytest.fixture(scope="session")
def small_dataset() -> Path:
    """12 training targets twice (with and without coordinates), 6 to validate, 6 to test."""
    return made_once("small-dataset", make_dataset)


def make_dataset(folder: Path) -> None:
    (folder / IMAGES_FOLDER).mkdir(parents=True)
    number = 0
    for split, count in (("train", 12), ("val", 6), ("test", 6)):
        records = []
        for index in range(count):
            category = MISSION.names[index % 3]
            name = f"{category.lower()}_place_{number:02d}"
            structured_picture(number).save(folder / IMAGES_FOLDER / f"{name}.png", compress_level=1)
            where = Coordinates(round(-170 + 14.17 * number, 2), round(-55 + 4.5 * number, 2))
            record = Record(f"{IMAGES_FOLDER}/{name}.png", where, Verdict(REASONS[category], category), MISSION)
            records += [record, record.without_coordinates()] if split == "train" else [record]
            number += 1
        write_split(folder, split, records)


def as_made(path: Path, folder: Path) -> None:
    """Write a changed file's hash into the manifest of its stage's folder, as if the stage had made it so."""
    stage_manifest = folder / FILE_NAME
    value = json.loads(stage_manifest.read_text())
    value["outputs"][path.relative_to(folder).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    stage_manifest.write_text(json.dumps(value))


def rewrite(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write these lines of an evaluation, and their hash into its manifest."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    as_made(path, path.parent)


@pytest.fixture(scope="session")
def small_frames() -> list[Image.Image]:
    """Eight different frames of 256x256."""
    return [shrink(structured_picture(1000 + seed), 256) for seed in range(8)]


@pytest.fixture(scope="session")
def small_adapter(tmp_path_factory: pytest.TempPathFactory, small_base: Path, small_dataset: Path) -> Path:
    """An adapter trained for six steps on `small_base`: it moves every verdict, and knows nothing."""
    from orion_triage.train import fine_tune
    from tests.train.trainings import QUICK

    work = tmp_path_factory.mktemp("small-adapter")
    return made_once(
        "small-adapter",
        lambda out: fine_tune.run(small_base, Dataset(small_dataset, MISSION), out, work, QUICK, 256),
    )


@pytest.fixture(scope="session")
def drawn_questions() -> Callable[[int], tuple[list[Image.Image], list[str]]]:
    """So many drawn frames of 256x256, every other one with its coordinates, and the user's texts about them."""
    from orion_triage.dataset.catalogue import load_catalogue
    from orion_triage.dataset.sources.synthetic.draw import draw_tile, tile_seed

    def draw(count: int) -> tuple[list[Image.Image], list[str]]:
        images, prompts = [], []
        for target in load_catalogue()[:: 360 // count][:count]:
            images.append(shrink(draw_tile(target.morphology, tile_seed(1, target.name)).image, 256))
            prompts.append(user_text(MISSION, target.coordinates if len(images) % 2 else None))
        return images, prompts

    return draw


def orion(*arguments: object, cwd: Path | None = None, **changes: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    return orion_with({**os.environ, "COLUMNS": "120", **changes}, cwd or Path.cwd(), *arguments)


def orion_with(environment: dict[str, str], cwd: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The same with exactly this environment."""
    words = [str(argument) for argument in arguments]
    if warm.is_possible():
        status, out, err = warm.run(words, str(cwd), environment)
        return subprocess.CompletedProcess([*ORION, *words], status, out, err)
    return subprocess.run([*ORION, *words], capture_output=True, text=True, cwd=cwd, env=environment, check=False)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begin the run of `finished`, once for all workers, while they do what does not need it."""
    first = os.environ.get("PYTEST_XDIST_WORKER", "gw0") == "gw0"
    needed = any("finished" in getattr(item, "fixturenames", ()) for item in session.items)
    if not first or not needed or session.config.option.collectonly:
        return
    folder = _shared_run()
    folder.mkdir()
    write_catalogue(folder / "places.csv", places_of("ocean_water", "urban_grid", "mega_airport", count=12))
    with (folder / "log").open("wb") as log:
        script = '"$@"; echo $? > status.new; mv status.new status'
        command = [sys.executable, warm.__file__, "run", *warm.ORION] if warm.is_possible() else ORION
        subprocess.Popen(["sh", "-c", script, "sh", *command, *run_command()], cwd=folder, stdout=log, stderr=log)


def _shared_run() -> Path:
    return Path(os.environ[warm.SOCKET]).with_name("run")


@pytest.fixture(scope="session")
def two_seeds(small_base: Path, small_dataset: Path) -> Path:
    """A folder with runs/small and runs/small-seed-43, of `small_base` and one epoch, and what the command said."""

    def make(folder: Path) -> None:
        folder.mkdir()
        sets = [f"base.model={small_base}", f"dataset.folder={json.dumps(str(small_dataset))}", "fuse.check_records=4"]
        sets += ["fine_tune.epochs=1", "fine_tune.learning_rate=1e-2", "evaluate.max_new_tokens=16"]
        sets += ["variants.all=false"]
        words = [word for value in sets for word in ("--set", value)]
        made = orion("run", "--run", "runs/small", *words, "--seeds", "2", cwd=folder)
        assert made.returncode == 0, made.stderr
        (folder / "said").write_text(made.stderr)

    return made_once("two-seeds", make)


@pytest.fixture
def warm_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python programs that this process starts, such as llama.cpp's converter, begin with their libraries loaded."""
    monkeypatch.setattr(sys, "executable", warm.python())


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped base as GGUF: F16 and Q4_K_M backbones and the mmproj; a copy of each worker's own."""
    from orion_triage.export import quantize
    from orion_triage.settings import QuantizeSettings

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", warm.python())  # as in warm_python
        shared = made_once(
            "tiny-pair", lambda out: quantize.run(TINY_BASE_FOLDER, out, QuantizeSettings(), user_texts=["<image>\nx"])
        )
    folder = tmp_path_factory.mktemp("tiny") / "gguf"
    shutil.copytree(shared, folder)
    return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs/small: the shipped base, 36 places, two epochs; every stage through the command line."""
    shared = _shared_run()
    said, deadline = "", time.monotonic() + 900  # of silence: on a busy machine it is slow, and says so
    while not (shared / "status").exists():
        before, said = said, (shared / "log").read_text()
        if said != before:
            deadline = time.monotonic() + 900
        assert time.monotonic() < deadline, said
        time.sleep(0.1)
    said = (shared / "log").read_text()
    assert (shared / "status").read_text().strip() == "0", said
    layers = json.loads((TINY_BASE_FOLDER / "config.json").read_text())["text_config"]["layer_types"]
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        assert f"  {name}: {layers.count('full_attention')} in text, 6 in vision\n" in said
    assert "trained on the CPU in float32: there is no usable GPU" in said
    folder = tmp_path_factory.mktemp("cli") / "finished"
    shutil.copytree(shared, folder, ignore=shutil.ignore_patterns("log", "status"))
    return folder


def run_command() -> list[str]:
    """The arguments that make the run of `finished`."""
    sets = ["dataset.catalogue=places.csv", "dataset.split_distance_km=20", "fine_tune.epochs=2"]
    sets += ["fuse.check_records=6"]
    return ["run", "--run", "runs/small", *(word for value in sets for word in ("--set", value))]
