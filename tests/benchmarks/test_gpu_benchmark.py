"""benchmarks/gpu.py and gpu_kit.py on a CPU: every step runs, nothing measured is lost, a bare machine can import."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests import warm
from tests.benchmarks.test_speed_benchmark import SCRIPT as BESIDE

GPU, KIT = (BESIDE.with_name(name) for name in ("gpu.py", "gpu_kit.py"))
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # two tests at a time on two cores
STEPS = ["card", "tests", "data", "training", "reference training", "profile", "twins training", "evaluation", "fuse"]


def command(folder: Path, *words: str) -> list[str]:
    # Without the limits of nine minutes: a test does not depend on what else the machine does.
    options = ["--shapes", "small", "--folder", str(folder / "work"), "--out", str(folder / "gpu.json")]
    return [warm.python(), str(GPU), *options, "--minutes", "60", *words]  # each step begins with its libraries loaded


def run(folder: Path, *words: str) -> tuple[int, Any]:
    """The exit status and the figures."""
    done = subprocess.run(command(folder, *words), capture_output=True, text=True, check=False, env=ONE_THREAD)
    return done.returncode, read(folder)


def read(folder: Path) -> Any:
    return json.loads((folder / "gpu.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every step was done."""
    folder = tmp_path_factory.mktemp("gpu")
    status, figures = run(folder)
    assert status == 0, json.dumps(figures, indent=1)
    return folder


@pytest.fixture
def gpu() -> Any:
    sys.path.insert(0, str(GPU.parent))
    try:
        import gpu

        return gpu
    finally:
        sys.path.remove(str(GPU.parent))


@pytest.mark.slow
def test_every_step_is_measured(measured: Path) -> None:
    steps = read(measured)["steps"]
    assert list(steps) == STEPS
    no_gpu = steps.pop("tests")["status"]
    assert no_gpu == "skipped: no GPU"
    assert {step["status"] for step in steps.values()} == {"done"}
    values = {name: step["measured"] for name, step in steps.items()}
    assert set(values["card"]["imports"].values()) == {"ok"}
    assert values["card"]["four_bit_cosine"] > 0.99
    assert values["data"]["training_records"] == 6
    for side in ("training", "reference training", "twins training"):
        seconds = values[side]["step_seconds"]
        assert len(seconds) == 3
        assert values[side]["steps_counted"] == 2  # the first is warm-up
        assert values[side]["seconds_per_record"] == pytest.approx(sum(seconds[1:]) / 2 / 2, abs=1e-4)
        assert values[side]["validation_seconds_per_record"] > 0
    assert values["reference training"]["operations"]["operations_per_record"] > 2 * 7e6 * 300
    assert set(values["evaluation"]["questions_per_second"]) == {"1", "4"}
    assert values["fuse"]["largest_difference"] <= values["fuse"]["allowed_difference"]
    assert all(value["peak_memory_bytes"] > 1e8 for value in values.values())


@pytest.mark.slow
def test_the_profile_finds_the_part_of_nearly_everything(measured: Path) -> None:
    profile = read(measured)["steps"]["profile"]["measured"]
    shares = profile["share_of_busy_time"]
    assert sum(shares.values()) == pytest.approx(1, abs=0.01)
    assert shares["other"] < 0.05
    for part in ("vision tower", "attention", "feed-forward", "short convolution", "projector", "optimizer"):
        assert shares[part] > 0.001
    assert profile["busy_seconds"] <= profile["wall_seconds"] * 1.05
    assert profile["data_and_collate_cpu_seconds"] > 0


@pytest.mark.slow
def test_both_sides_are_compared(measured: Path) -> None:
    figures = read(measured)
    ours, reference = (figures["steps"][name]["measured"] for name in ("training", "reference training"))
    summary = figures["summary"]
    assert summary["same_first_loss"] is True
    assert summary["first_loss_difference"] < 1e-3
    ratio = reference["seconds_per_record"] / ours["seconds_per_record"]
    assert summary["times_as_fast_as_the_reference"] == pytest.approx(ratio, abs=0.01)
    twins = figures["steps"]["twins training"]["measured"]["seconds_per_record"]
    with_twins = reference["seconds_per_record"] / twins
    assert summary["times_as_fast_with_twins_together"] == pytest.approx(with_twins, abs=0.01)
    seconds = 1440 * ours["seconds_per_record"] + 180 * ours["validation_seconds_per_record"]
    assert summary["projected_seconds_for_1440_records_ours"] == pytest.approx(seconds, abs=0.1)
    assert 0 < summary["share_of_peak_reference"] < 1


@pytest.mark.slow
def test_a_step_that_fails_is_recorded_and_the_next_one_begins(measured: Path, tmp_path: Path) -> None:
    shutil.copytree(measured / "work" / "dataset", tmp_path / "work" / "dataset")
    split = tmp_path / "work" / "dataset" / "val_dataset.jsonl"
    split.write_text("no record\n")
    status, figures = run(tmp_path, "--only", "training", "evaluation")  # the second reads no validation records
    assert status == 1
    steps = figures["steps"]
    assert steps["training"]["status"].startswith("failed: ")
    assert split.name in steps["training"]["status"]
    assert "Traceback" in steps["training"]["traceback"]
    assert steps["evaluation"]["status"] == "done"


@pytest.mark.slow
def test_a_cut_leaves_what_was_measured(tmp_path: Path) -> None:
    with subprocess.Popen(command(tmp_path, "--only", "card", "data", "training"), env=ONE_THREAD) as process:
        deadline = time.monotonic() + 600
        while not (tmp_path / "gpu.json").exists() or read(tmp_path)["steps"]["data"]["status"] != "begun":
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.1)
        process.kill()
    steps = read(tmp_path)["steps"]
    assert steps["card"]["status"] == "done"
    assert steps["card"]["measured"]["peak_operations_per_second"] > 0
    assert [steps[name]["status"] for name in ("data", "training")] == ["begun", "not begun"]
    deadline = time.monotonic() + 300
    while processes_with(str(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not processes_with(str(tmp_path))  # the step's own process has ended with it


def processes_with(word: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes().decode(errors="replace"))
        except (FileNotFoundError, ProcessLookupError):  # ended meanwhile
            continue
    return [line for line in found if word in line]


def test_without_time_every_step_is_skipped_by_name(tmp_path: Path) -> None:
    status, figures = run(tmp_path, "--minutes", "0.05")
    assert status == 0
    assert list(figures["steps"]) == STEPS
    for name, step in figures["steps"].items():
        assert step["status"].startswith("skipped: "), name
        assert "s are left, and it takes at least" in step["status"]


@pytest.mark.slow
def test_a_step_is_not_begun_when_too_little_time_is_left(tmp_path: Path) -> None:
    _, figures = run(tmp_path, "--only", "card", "training", "--minutes", "0.3")
    card, training = (figures["steps"][name]["status"] for name in ("card", "training"))
    assert card == "done" or card.startswith("ended after 18 s")
    assert training.startswith("skipped: ")


# --- what the profile makes of a GPU's events -----------------------------------------------------------------------


def test_kernels_belong_to_the_module_that_launched_them(gpu: Any) -> None:
    """A GPU's events are made here, of torch's own class, since no GPU is: two modules, an optimizer, two streams."""
    from torch.autograd import DeviceType
    from torch.autograd.profiler_util import FunctionEvent

    def event(name: str, start: float, end: float, parent: Any = None, **more: Any) -> Any:
        made = FunctionEvent(len(events), name, more.pop("thread", 1), start, end, **more)
        made.cpu_parent = parent
        events.append(made)
        return made

    events: list[Any] = []
    attention = event("part: attention", 0, 20)
    event("aten::mm", 1, 2, attention, sequence_nr=5).append_kernel("gemm", 0, 300)
    event("aten::linear", 3, 9, attention, sequence_nr=6).append_kernel("kDequantizeBlockwise", 0, 100)
    backward = event("autograd::engine::evaluate_function: MmBackward0", 30, 40, thread=2, fwd_thread=1, sequence_nr=5)
    event("aten::mm", 31, 32, backward, thread=2).append_kernel("gemm", 0, 500)
    again = event("part: feed-forward", 33, 36, backward, thread=2)
    event("aten::mul", 34, 35, again, thread=2).append_kernel("elementwise", 0, 50)
    optimizer = event("Optimizer.step#AdamW.step", 41, 45)
    event("aten::add_", 42, 43, optimizer).append_kernel("elementwise", 0, 40)
    event("aten::fill_", 46, 47).append_kernel("fill", 0, 10)
    for start, end in ((1000, 1600), (1500, 1700), (1550, 1560), (1900, 2000)):
        event("gemm", start, end, device_type=DeviceType.CUDA)
    event("part: attention", 900, 5000, device_type=DeviceType.CUDA)  # a range, which the profiler repeats there

    found = gpu.shares(events, 0.004, on_gpu=True)
    assert found["share_of_busy_time"] == {
        "attention": 0.8, "bitsandbytes dequantization": 0.1, "feed-forward": 0.05, "optimizer": 0.04, "other": 0.01,
    }  # fmt: skip
    assert found["largest_kernels"]["gemm"] == 0.8
    assert found["kernels"] == 6
    assert found["idle_seconds"] == pytest.approx(0.0032)  # 4 ms less 700 and 100 microseconds
    assert found["idle_share"] == pytest.approx(0.8)


def test_another_first_loss_and_a_missing_side_are_said(gpu: Any) -> None:
    def step(**measured: Any) -> dict[str, Any]:
        return {"status": "done", "measured": measured}

    ours, reference = step(first_loss=11.0, seconds_per_record=0.05), step(first_loss=11.2, seconds_per_record=0.4)
    found = gpu.summary({"training": ours, "reference training": reference})
    assert (found["times_as_fast_as_the_reference"], found["same_first_loss"]) == (8, False)
    assert gpu.summary({"training": ours, "reference training": {"status": "not begun"}}) == {}


# --- the kit --------------------------------------------------------------------------------------------------------


def make_kit(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(KIT), str(folder), *words], capture_output=True, text=True, check=False)


ABSENT = ("datasets", "gguf", "hypothesis", "rasterio", "ruff")  # in neither a bare machine nor the kit
# An interpreter that sees the standard library and links to every installed package but those of the kit and some more.
BARE = """
import importlib, importlib.metadata, importlib.util, sys
site, benchmarks, kit, *absent = sys.argv[1:]
sys.path.append(site)
missing = ("bitsandbytes", "pydantic", "pydantic_core", "annotated_types", "typing_inspection", "imagehash", "tenacity")
assert not any(map(importlib.util.find_spec, (*absent, *missing)))
sys.path.insert(0, benchmarks)
import gpu
from pathlib import Path
gpu.see_packages(Path(kit))
for name in (*gpu.IMPORTS, *missing):
    importlib.import_module(name)
for name in missing:
    assert sys.modules[name].__file__.startswith(kit), name
assert sys.modules["torch"].__file__.startswith(site)
assert importlib.metadata.version("bitsandbytes")
assert gpu.four_bit_cosine("cpu") > 0.99
print("all there")
"""


@pytest.mark.slow
def test_with_the_kit_a_machine_without_its_packages_can_train(tmp_path: Path) -> None:
    made = make_kit(tmp_path / "kit")
    assert made.returncode == 0, made.stderr
    size = sum(path.stat().st_size for path in (tmp_path / "kit").rglob("*") if path.is_file())
    assert 5e6 < size < 40e6
    assert f"{size / 1e6:.1f} MB" in made.stdout
    (tmp_path / "site").mkdir()
    left_out = {path.name for path in (tmp_path / "kit" / "packages").iterdir()}
    left_out.update(ABSENT)
    site = Path(str(importlib.metadata.distribution("torch").locate_file("")))
    for path in site.iterdir():
        if path.name not in left_out and path.suffix != ".pth":
            (tmp_path / "site" / path.name).symlink_to(path)
    words = [str(tmp_path / "site"), str(GPU.parent), str(tmp_path / "kit"), *ABSENT]
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", BARE, *words], capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.stdout.strip().endswith("all there"), done.stderr


def test_a_kit_says_what_it_cannot_be(tmp_path: Path) -> None:
    unknown = make_kit(tmp_path / "kit", "--cuda", "999")
    assert unknown.returncode == 1
    assert "no bitsandbytes/libbitsandbytes_cuda999.so, only libbitsandbytes_cuda" in unknown.stderr
    assert not (tmp_path / "kit").exists()
    (tmp_path / "mine").write_text("keep")
    foreign = make_kit(tmp_path)
    assert foreign.returncode == 1
    assert "has other files than a kit's" in foreign.stderr
    assert (tmp_path / "mine").read_text() == "keep"
    large = make_kit(tmp_path / "kit", "--cuda", "118", "124")
    assert large.returncode == 1
    assert "is larger than 40 MB" in large.stderr
