"""A disk that is full or fails: what is said of it, what is left, and that benchmarks/disk_faults.py would notice."""

import errno
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from orion_triage.errors import OrionError, obstacle
from orion_triage.runs.run import WORK_FOLDER, open_run
from orion_triage.safe.files import naming
from tests.conftest import ORION, orion, places_of, write_catalogue

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FULL, FAILED_ONCE = (errno.ENOSPC, True), (errno.EIO, False)
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which(os.environ.get("CC", "cc")) is None, reason="needs Linux and a C compiler"
)


@pytest.fixture(scope="module")
def disk_faults() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHMARKS))  # it imports the script beside it
    spec = importlib.util.spec_from_file_location("disk_faults", BENCHMARKS / "disk_faults.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["disk_faults"] = module
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def built(disk_faults: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The library, compiled once, in front of an empty folder."""
    folder = tmp_path_factory.mktemp("failing")
    return disk_faults.Disk(folder / "disk", folder / "work")


@pytest.fixture
def disk(built: Any) -> Any:
    shutil.rmtree(built.folder)
    built.folder.mkdir()
    return built


def python(code: str, *words: object) -> list[object]:
    return [sys.executable, "-c", code, *words]


# --- the library ----------------------------------------------------------------------------------------------------

WORK = """
import os, shutil, subprocess, sys
from pathlib import Path
folder = Path(sys.argv[1])
(folder / "made").mkdir()
(folder / "made").mkdir(exist_ok=True)
with open(folder / "one.txt", "w") as file:
    file.write("1")
    file.flush()
    os.fsync(file.fileno())
os.replace(folder / "one.txt", folder / "two.txt")
open(folder / "two.txt", "a").close()
os.truncate(folder / "two.txt", 0)
os.symlink("two.txt", folder / "link")
os.chdir(folder / "made")
Path("relative").touch()
(folder.parent / "work" / "outside").write_text("x")
Path("/dev/null").write_text("x")
subprocess.run(["sh", "-c", "echo x > from_shell"])
"""


def test_what_changes_the_disk_is_counted_in_every_process_and_nothing_else(disk: Any) -> None:
    done, operations = disk.run(python(WORK, disk.folder))
    assert done.returncode == 0, done.stderr
    assert operations == [
        "mkdir made",
        "open one.txt",
        "write one.txt",
        "sync one.txt",
        "rename two.txt",
        "resize two.txt",
        "link link",
        "open made/relative",
        "open made/from_shell",
        "write made/from_shell",
    ]
    assert int.from_bytes(disk.counter.read_bytes()[:8], sys.byteorder) == len(operations)


def test_c_s_own_buffered_writes_are_counted_when_they_reach_the_system(disk: Any) -> None:
    code = """
import sys, numpy
with open(sys.argv[1] + "/numbers", "wb") as file:
    numpy.arange(3000, dtype=numpy.uint8).tofile(file)
    numpy.arange(3000, dtype=numpy.float64).tofile(file)
"""
    done, operations = disk.run(python(code, disk.folder))
    assert done.returncode == 0, done.stderr
    assert operations == ["open numbers", *3 * ["write numbers"]]  # 3 kB at its end, of 24 kB the whole blocks at once


WRITE_THREE = """
import os, sys
for name in ("1", "2", "3"):
    try:
        with open(os.path.join(sys.argv[1], name), "wb", buffering=0) as file:
            file.write(b"x")
        print("written")
    except OSError as error:
        print(error.errno)
"""


@pytest.mark.parametrize(
    ("manner", "said"),
    [(FULL, ["written", str(errno.ENOSPC), str(errno.ENOSPC)]), (FAILED_ONCE, ["written", str(errno.EIO), "written"])],
)
def test_the_chosen_write_fails_and_on_a_full_disk_all_after_it(
    disk_faults: ModuleType, disk: Any, manner: tuple[int, bool], said: list[str]
) -> None:
    done, failed = disk.run(python(WRITE_THREE, disk.folder), disk_faults.Fault("write *", 2, *manner))
    assert done.stdout.split() == said
    assert failed == (["write 2", "open 3"] if manner == FULL else ["write 2"])
    assert (disk.folder / "1").read_text() == "x"
    assert (disk.folder / "2").read_text() == ""


def test_a_full_disk_is_full_for_other_processes_too_and_for_programs_in_c(disk_faults: ModuleType, disk: Any) -> None:
    (disk.folder / "old").write_text("old")
    code = """
import subprocess, sys
subprocess.run(["sh", "-c", "echo x > first"], cwd=sys.argv[1])
print(subprocess.run(["cp", "old", "copy"], cwd=sys.argv[1]).returncode, flush=True)
"""
    done, failed = disk.run(python(code, disk.folder), disk_faults.Fault("write first", 1, *FULL))
    assert done.stdout.strip() == "1"
    assert "cp: cannot create regular file 'copy': No space left on device" in done.stderr
    assert failed[:2] == ["write first", "open copy"]


def test_faults_meet_each_kind_of_operation_first_and_none_twice(disk_faults: ModuleType) -> None:
    operations = [
        "open run/dataset/.a_1.png.abcd12_9.partial",
        "write run/dataset/.a_1.png.abcd12_9.partial",
        "open run/dataset/.b_2.png.xyzw0000.partial",
        "write run/dataset/.b_2.png.xyzw0000.partial",
        "write run/evaluation/test/.quantized.work-0.jsonl",
    ]
    kinds = [
        "open run/dataset/*.png.*.partial",
        "write run/dataset/*.png.*.partial",
        "write run/evaluation/test/.quantized.work-*.jsonl",
    ]
    assert [disk_faults.kind_of(operation) for operation in operations] == [*kinds[:2], *kinds]
    seen: set[str] = set()
    faults = disk_faults.draw_faults(operations, 5, seen, random.Random(1))
    assert [(fault.like, fault.at) for fault in faults] == [
        (kinds[0], 1), (kinds[1], 1), (kinds[0], 2), (kinds[1], 2), (kinds[2], 1)
    ]  # fmt: skip
    assert {(fault.number, fault.stays) for fault in faults} == {FULL, FAILED_ONCE}
    assert seen == {*kinds[:2], "write run/evaluation/test/MODEL.work-*.jsonl"}
    other = ["write run/evaluation/test/.constrained.work-0.jsonl", "open run/new"]
    assert [fault.like for fault in disk_faults.draw_faults(other, 1, seen, random.Random(1))] == ["open run/new"]


# --- what the package says and leaves -------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", ["mkdir", "open", "write", "sync", "rename"])
def test_a_file_that_cannot_be_written_is_named_and_is_as_before(
    disk_faults: ModuleType, disk: Any, operation: str
) -> None:
    path = disk.folder / "made" / "file"
    code = """
import sys
from pathlib import Path
from orion_triage.errors import obstacle
from orion_triage.safe.files import write_text
try:
    write_text(Path(sys.argv[1]), "new")
except OSError as error:
    print(obstacle(error).message)
"""
    if operation != "mkdir":
        path.parent.mkdir()
        path.write_text("old")
    like = f"{operation} made" if operation == "mkdir" else f"{operation} made/*"
    done, failed = disk.run(python(code, path), disk_faults.Fault(like, 1, *FULL))
    assert failed[0].startswith(operation)
    assert done.stdout.strip() == f"{path if operation != 'mkdir' else path.parent}: No space left on device."
    assert [one.name for one in disk.folder.rglob("*")] == ([] if operation == "mkdir" else ["made", "file"])
    assert operation == "mkdir" or path.read_text() == "old"


@pytest.mark.parametrize(("manner", "kept"), [(FULL, "old"), (FAILED_ONCE, "old"), ((errno.EINVAL, False), "new")])
def test_a_folder_that_cannot_be_replaced_is_as_before(
    disk_faults: ModuleType, disk: Any, manner: tuple[int, bool], kept: str
) -> None:
    """EINVAL is for a file system that cannot exchange two names: there it takes two renames."""
    folder = disk.folder / "made"
    code = """
import sys
from pathlib import Path
from orion_triage.safe.files import replaced_folder
with replaced_folder(Path(sys.argv[1])) as new:
    (new / "file").write_text("new")
"""
    folder.mkdir()
    (folder / "file").write_text("old")
    done, failed = disk.run(python(code, folder), disk_faults.Fault("rename *", 1, *manner))
    assert done.returncode == (1 if kept == "old" else 0)
    assert failed[0] == "rename made"
    assert [(path.name, (path / "file").read_text()) for path in disk.folder.iterdir()] == [("made", kept)]


def test_a_library_s_words_for_a_full_disk_become_the_system_s() -> None:
    for error in (RuntimeError("Error while serializing: I/O error: some words (os error 28)"),
                  RuntimeError("open file failed with strerror: No space left on device")):  # fmt: skip
        with pytest.raises(OrionError) as raised, naming(Path("a/model.safetensors")):
            raise error
        assert raised.value.message == "a/model.safetensors: No space left on device."
        assert "Free some space" in raised.value.fix
    known = obstacle(RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 576 vs 534\nframe #0"))
    assert known is not None
    assert known.message.startswith("a write failed: the disk is full or faulty ([enforce fail at")
    assert "frame" not in known.message
    copying = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "from", None, "to")
    known = obstacle(copying)
    assert known is not None
    assert known.message == "to: No space left on device."
    with pytest.raises(ConnectionResetError) as lost, naming(Path("a")):
        raise ConnectionResetError(errno.ECONNRESET, "reset")
    assert lost.value.filename is None
    assert obstacle(lost.value) is None


@pytest.mark.slow
@pytest.mark.llama_cpp
def test_a_full_disk_can_be_cleaned(disk_faults: ModuleType, disk: Any, finished: Path) -> None:
    run = disk.folder / "run"
    shutil.copytree(finished / "runs" / "small", run)
    checkpoints = run / "fine_tune_work" / "checkpoints"
    assert any(checkpoints.iterdir())
    done, failed = disk.run([*ORION, "clean", run], disk_faults.Fault("", 1, *FULL))
    assert failed
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    assert not checkpoints.exists()  # which makes room for the notes on what is deleted after them
    assert disk_faults.start([*ORION, "verify", run]).returncode == 0
    assert disk_faults.start([*ORION, "clean", run]).returncode == 0
    assert not list((run / "orion_merged").glob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.llama_cpp
def test_the_converter_does_not_lose_the_end_of_a_tensor_unseen(
    disk_faults: ModuleType, disk: Any, finished: Path
) -> None:
    code = """
import sys
from pathlib import Path
from orion_triage.export.convert import convert
from orion_triage.llama_cpp.toolchain import find_toolchain
from orion_triage.errors import OrionError
try:
    convert(find_toolchain(), Path(sys.argv[1]), Path(sys.argv[2]), mmproj=True)
except OrionError as error:
    print(error.message)
"""
    command = python(code, finished / "runs" / "small" / "orion_merged", disk.folder / "mmproj.gguf")
    done, operations = disk.run(command)
    assert done.stdout == "", done.stdout + done.stderr
    writes = operations.count("write mmproj.gguf")
    assert writes > 10
    (disk.folder / "mmproj.gguf").unlink()
    done, failed = disk.run(command, disk_faults.Fault("write mmproj.gguf", writes, *FAILED_ONCE))
    assert failed == ["write mmproj.gguf"]
    assert done.stdout.startswith(f"llama.cpp's converter could not write {disk.folder / 'mmproj.gguf'}: Input/output")


# --- the harness ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.llama_cpp
def test_stages_refuse_a_failing_disk_and_complete_when_it_is_well(finished: Path, tmp_path: Path) -> None:
    run, results = tmp_path / "run", tmp_path / "disk_faults.json"
    shutil.copytree(finished / "runs" / "small", run, ignore=shutil.ignore_patterns(WORK_FOLDER))
    # Frames that are drawn quickly, and as few of them as fill three splits.
    places = write_catalogue(tmp_path / "places.csv", places_of("ocean_water", "agriculture", "mega_airport", count=3))
    sets = [f"dataset.catalogue={places}", "dataset.split_distance_km=20", "fine_tune.epochs=2"]
    done = orion("dataset", "--run", run, *(word for value in sets for word in ("--set", value)))
    assert done.returncode == 0, done.stderr
    command = [sys.executable, str(BENCHMARKS / "disk_faults.py"), "--run", str(run), "--results", str(results)]
    # Two steps that start in a second; 'make torture' does all sixteen. The seed: a full disk when the first frame is
    # written, and an error when the verdicts are opened.
    command += ["--only", "dataset", "triage", "--faults-per-stage", "1", "--seed", "33"]
    command += ["--folder", str(tmp_path / "work")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(results.read_text())
    assert figures["losses"] == []
    assert figures["faults"] == 2
    assert figures["refused"] + figures["harmless"] == 2
    assert figures["recoveries"] == 2
    assert figures["by_stage"]["dataset"]["operations"] > 4 * 9  # a frame is opened, written, flushed and renamed
    errors = [fault["said"] for stage in figures["by_stage"].values() for fault in stage["faults"] if fault["said"]]
    assert all(error.startswith("error: ") for error in errors)


def test_an_error_that_does_not_say_enough_is_a_loss(disk_faults: ModuleType) -> None:
    def wrong(status: int, stderr: str) -> list[str]:
        lines = disk_faults.untold(subprocess.CompletedProcess([], status, "", stderr))
        return [line.partition(":")[0] if not line.startswith("no '") else line[:10] for line in lines]

    assert wrong(1, "error: a/b: No space left on device.\n  fix: Free some space.\n") == []
    assert wrong(0, "error: a/b: Input/output error.\n  fix: Free some space.\n") == ["exit status 0"]
    assert wrong(1, "error: llama-quantize failed (1): .\n  fix: See the page.\n") == [
        "the error does not name the disk's trouble"
    ]
    assert len(wrong(1, "OSError: [Errno 28] No space left on device\n")) == 2  # neither error nor fix


@pytest.mark.slow
@pytest.mark.llama_cpp
def test_what_a_failing_disk_would_have_spoiled_is_found(
    disk_faults: ModuleType, built: Any, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished)
    undisturbed = disk_faults.prepare(tmp_path / "work", finished / "runs" / "small")
    steps = {step.name: step for step in disk_faults.steps(open_run(finished / "runs" / "small").settings)}
    trial = disk_faults.Trial(steps["quantize"], undisturbed, built)
    trial.reset()
    run = trial.run
    assert not run.gguf.exists()
    assert trial.whole() == []
    assert "quantize has no manifest" in trial.finished()
    shutil.copytree(undisturbed.gguf, run.gguf)
    assert trial.finished() == []
    (run.gguf / "orion-q4_k_m.gguf").write_bytes(b"half")
    (run.gguf / ".half.partial").mkdir()
    (trial.temporary / "tmp1").touch()
    (run.dataset / "train.jsonl").unlink(missing_ok=True)
    (run.merged / "manifest.json").unlink()
    found = "\n".join([*trial.finished(), *trial.whole()])
    for line in (
        "orion-q4_k_m.gguf has sha256", "run/gguf/.half.partial was left behind", "tmp/tmp1 was left behind",
        "fuse has lost its manifest",
    ):  # fmt: skip
        assert line in found
    done = subprocess.CompletedProcess([], 0, "", "Exception in thread\nTraceback (most recent call last):\n")
    assert any("a traceback" in line for line in trial.judge(done))
