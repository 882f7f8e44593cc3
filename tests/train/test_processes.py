"""Several processes: the same training and the same answers as one, over gloo.

Trainings are started by `accelerate launch` with the configurations in docs/accelerate, which on a machine without GPUs
starts CPU processes. Where processes end at different moments, which a launcher does not allow, and where several
commands follow each other, the tests set the variables that the launcher gives its processes.
"""

import functools
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from orion_triage.dataset.records import read_split, write_split
from orion_triage.train.checkpoints import HASHES_FILE
from tests import warm
from tests.conftest import MISSION, orion_with

HERE = Path(__file__).parents[1]
CONFIGURATIONS = HERE.parent / "docs" / "accelerate"


def orion(cwd: Path, *words: object, processes: int = 1) -> list[subprocess.CompletedProcess[str]]:
    """The command in this many processes that know of each other, by rank."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if processes == 1:
        return [orion_with(environment, cwd, *words)]
    environment |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with ThreadPoolExecutor(processes) as threads:
        started = [
            threads.submit(orion_with, {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}, cwd, *words)
            for rank in range(processes)
        ]
    return [one.result() for one in started]


def accelerate_launch(
    cwd: Path, configuration: str, program: Sequence[str], words: Sequence[object]
) -> subprocess.CompletedProcess[str]:
    """The program with these words in the two processes of a shipped configuration, and what both said."""
    command = [warm.python(), "-c", "from accelerate.commands.accelerate_cli import main; main()", "launch"]
    command += ["--config_file", str(CONFIGURATIONS / configuration), "--main_process_port", "0", *program]
    return subprocess.run(
        [*command, *map(str, words)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def words(base: Path, dataset: Path, name: str, accumulation: int) -> list[object]:
    sets = [
        f"base.model={base}",
        f"dataset.folder={json.dumps(str(dataset))}",
        "fine_tune.dropout=0.0",
        "fine_tune.micro_batch_size=4",
        f"fine_tune.gradient_accumulation_steps={accumulation}",
        "fine_tune.epochs=2",
        "fine_tune.learning_rate=1e-3",
        "fuse.check_records=8",
        "evaluate.batch_size=4",  # so that there are several, for the processes to share
        "evaluate.max_new_tokens=24",
    ]
    return ["--run", name, *(word for value in sets for word in ("--set", value))]


@pytest.fixture(scope="module")
def few(small_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight training targets twice: two steps an epoch; four to validate; three to test, whose 12 questions are three
    batches."""
    folder = shutil.copytree(small_dataset, tmp_path_factory.mktemp("few") / "dataset")
    for split, count in (("train", 16), ("val", 4), ("test", 3)):
        write_split(folder, split, read_split(small_dataset, split, MISSION)[:count])
    return folder


@pytest.fixture(scope="module")
def begun(small_base: Path, few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose dataset is there; nobody changes it."""
    folder = tmp_path_factory.mktemp("begun")
    done = orion(folder, "dataset", *words(small_base, few, "run", 1))[0]
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.mark.slow
def test_two_processes_train_and_answer_as_one_does(small_base: Path, few: Path, begun: Path, tmp_path: Path) -> None:
    """With a resume and a fused model, both from the adapter of two processes."""
    from safetensors.torch import load_file

    for name in ("one", "two"):
        shutil.copytree(begun, tmp_path / name)
    straight = orion(tmp_path, "fine-tune", *words(small_base, few, "one", 2))[0]
    assert straight.returncode == 0, straight.stderr
    options = words(small_base, few, "two", 1)
    module = ["-m", "orion_triage.cli", "fine-tune"]
    launched = accelerate_launch(tmp_path, "ddp.yaml", module, options)
    assert launched.returncode == 0, launched.stdout
    assert launched.stdout.count("fine-tune: done") == 1
    logs = [json.loads((tmp_path / name / "orion_lora_weights/loss_log.json").read_text()) for name in ("one", "two")]
    for kind, count, tolerance in (("loss", 4, 1e-3), ("eval_loss", 2, 1e-4), ("eval_loss_category", 2, 1e-4)):
        one, two = ([entry[kind] for entry in log if kind in entry] for log in logs)
        assert len(one) == count
        assert two == pytest.approx(one, rel=tolerance)
    adapters = [load_file(tmp_path / name / "orion_lora_weights/adapter_model.safetensors") for name in ("one", "two")]
    assert adapters[0].keys() == adapters[1].keys()
    for key, tensor in adapters[0].items():
        assert float((tensor - adapters[1][key]).abs().max()) < 5e-3, key  # a step moves a value by 1e-3
    assert figures_of(tmp_path / "two")["processes"] == 2

    shutil.rmtree(tmp_path / "two/orion_lora_weights")
    shutil.rmtree(tmp_path / "two/fine_tune_work/checkpoints/checkpoint-4")
    again = accelerate_launch(tmp_path, "ddp.yaml", module, options)
    assert again.returncode == 0, again.stdout
    assert (figures_of(tmp_path / "two")["resumed_from_step"], figures_of(tmp_path / "two")["steps"]) == (2, 4)
    resumed = load_file(tmp_path / "two/orion_lora_weights/adapter_model.safetensors")
    assert resumed.keys() == adapters[1].keys()
    for key, tensor in adapters[1].items():
        assert float((tensor - resumed[key]).abs().max()) < 1e-6, key

    for name, accumulation, processes in (("one", 2, 1), ("two", 1, 2)):
        options = words(small_base, few, name, accumulation)
        results = orion(tmp_path, "ablation", *options, processes=processes)
        assert [result.returncode for result in results] == [0] * processes, [result.stderr for result in results]
        assert [result.stdout.count("correct") for result in results] == [4, 0][:processes]
    rows = [
        [
            json.loads(line)
            for line in (tmp_path / name / "evaluation/test/base/predictions.jsonl").read_text().splitlines()
        ]
        for name in ("one", "two")
    ]
    assert [row["id"] for row in rows[0]] == [row["id"] for row in rows[1]]
    assert [row["answer"] for row in rows[0]] == [row["answer"] for row in rows[1]]
    assert not list((tmp_path / "two" / "evaluation").rglob("*.work-*"))

    refused = orion(tmp_path, "fuse", *options, processes=2)
    assert all(result.returncode != 0 for result in refused)
    assert "fuse runs in one process, but 2 were launched" in refused[0].stderr
    assert not list(tmp_path.glob("two/orion_merged*"))
    fused = orion(tmp_path, "fuse", *options)[0]
    assert fused.returncode == 0, fused.stderr


def figures_of(run: Path) -> dict[str, Any]:
    """The figures of a finished training."""
    figures: dict[str, Any] = json.loads((run / "orion_lora_weights" / "manifest.json").read_text())["figures"]
    return figures


def launched(path: Path) -> tuple[Any, dict[str, str]]:
    """(Arguments, environment of the processes) of `accelerate launch` with this configuration, by its own parser."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    line = ["--config_file", str(path), "--main_process_port", "0", "-m", "orion_triage.cli", "fine-tune"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(line))
    return arguments, prepare_multi_gpu_env(arguments)


@pytest.mark.parametrize("path", sorted(CONFIGURATIONS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_each_configuration_as_it_is_meant(path: Path) -> None:
    arguments, environment = launched(path)
    assert arguments.num_processes == (4 if path.stem == "nodes" else 2)
    assert arguments.num_machines == (2 if path.stem == "nodes" else 1)
    assert (environment.get("ACCELERATE_USE_FSDP") == "true") is (path.stem == "fsdp")
    if path.stem == "fsdp":
        assert environment["FSDP_VERSION"] == "2"
        assert environment["FSDP_STATE_DICT_TYPE"] == "FULL_STATE_DICT"
        named = environment["FSDP_TRANSFORMER_CLS_TO_WRAP"].split(",")
        assert set(named) == _layer_classes()


SHARDED = ["--set", "fine_tune.base_weights=16-bit", "--set", "fine_tune.optimizer=adamw_torch_fused"]


def two_that_share_a_base(cwd: Path, words: Sequence[object], **of_second: str) -> "list[subprocess.Popen[str]]":
    """`orion fine-tune` with FSDP in two processes that nobody ends; the second has these variables besides."""
    _, of_launcher = launched(CONFIGURATIONS / "fsdp.yaml")
    fsdp = {n: v for n, v in of_launcher.items() if n.startswith(("FSDP_", "ACCELERATE_USE_FSDP"))}
    environment = {**os.environ, **fsdp, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        subprocess.Popen(
            [warm.python(), str(HERE / "fsdp_on_cpu.py"), "fine-tune", *map(str, words)],
            cwd=cwd,
            env={**environment, "RANK": rank, "LOCAL_RANK": rank, **more},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, more in (("0", {}), ("1", of_second))
    ]


@pytest.mark.slow
def test_a_shared_out_base_trains_is_killed_goes_on_and_fuses(
    small_base: Path, few: Path, begun: Path, tmp_path: Path
) -> None:
    """FSDP2 end to end on a bfloat16 base: the adapter is that of one process, although one of two was killed after the
    first epoch."""
    import torch
    from safetensors.torch import load_file

    sharded = [*SHARDED, "--set", "fine_tune.learning_rate=1e-2"]
    program = [str(HERE / "fsdp_on_cpu.py"), "fine-tune"]
    shutil.copytree(begun, tmp_path / "one")
    straight = subprocess.run(
        [warm.python(), *program, *map(str, words(small_base, few, "one", 2)), *sharded],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert straight.returncode == 0, straight.stderr

    options = [*words(small_base, few, "two", 1), *sharded]
    shutil.copytree(begun, tmp_path / "two")
    first, second = two_that_share_a_base(tmp_path, options)
    whole = tmp_path / "two" / "fine_tune_work" / "checkpoints" / "checkpoint-2" / HASHES_FILE
    while not whole.exists():
        assert first.poll() is None, first.stdout and first.stdout.read()
        time.sleep(0.02)
    second.kill()
    second.communicate()
    said, _ = first.communicate(timeout=600)  # without a launcher that would end it
    assert first.returncode == 1, said
    assert "another process of this command has ended" in said
    assert "Traceback" not in said
    assert not (tmp_path / "two" / "orion_lora_weights").exists()

    again = accelerate_launch(tmp_path, "fsdp.yaml", program, options)
    assert again.returncode == 0, again.stdout
    assert again.stdout.count("fine-tune: done") == 1
    figures = figures_of(tmp_path / "two")
    assert figures["resumed_from_step"] == 2
    assert figures["processes"] == 2
    assert figures["precision_used"] == figures_of(tmp_path / "one")["precision_used"] == "bfloat16"
    adapters = [tmp_path / name / "orion_lora_weights" for name in ("one", "two")]
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in adapters)
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        assert tensor.shape == two[key].shape, key  # whole, not one process's part
        assert float(two[key].abs().max()) > 0, key
    # Sums in another order round bfloat16 (8 bits) otherwise, and Adam enlarges it where a gradient is near 0. Measured
    # 0.022; with both processes on the same records 0.61, with the optimizer's state lost at the resume 0.55.
    names = [name for name in one if "lora_B" in name]  # from 0: lora_A is mostly what it began with
    difference, size = (
        torch.stack(values).norm()
        for values in ([(one[name] - two[name]).norm() for name in names], [one[name].norm() for name in names])
    )
    assert float(difference / size) < 0.05
    logs = [json.loads((folder / "loss_log.json").read_text()) for folder in adapters]
    # Measured 0.0023, 0.0005 and 0.0010; accelerate rounds a step's loss to bfloat16, by up to 0.002 here.
    for kind, tolerance in (("loss", 5e-3), ("eval_loss", 2e-3), ("eval_loss_category", 3e-3)):
        losses = [[entry[kind] for entry in log if kind in entry] for log in logs]
        assert losses[1] == pytest.approx(losses[0], rel=tolerance)
    fused = orion(tmp_path, "fuse", *options)[0]
    assert fused.returncode == 0, fused.stderr


@pytest.mark.slow
def test_a_process_that_is_refused_ends_the_other_and_both_say_why(
    small_base: Path, few: Path, begun: Path, tmp_path: Path
) -> None:
    """Before the training, where no launcher ends the one that waits."""
    shutil.copytree(begun, tmp_path / "two")
    options = [*words(small_base, few, "two", 1), *SHARDED]
    first, second = two_that_share_a_base(tmp_path, options, FSDP_TRANSFORMER_CLS_TO_WRAP="Qwen2DecoderLayer")
    said, _ = second.communicate(timeout=600)
    assert second.returncode == 1, said
    assert "process 1: error: FSDP_TRANSFORMER_CLS_TO_WRAP=Qwen2DecoderLayer: the layers of this base are" in said
    assert "Traceback" not in said
    said, _ = first.communicate(timeout=60)
    assert first.returncode == 1, said
    assert "another process of this command has ended" in said
    assert "Traceback" not in said
    assert not (tmp_path / "two" / "orion_lora_weights").exists()


@pytest.mark.slow
def test_a_base_that_is_shared_out_gives_the_same_loss_and_gradients(
    small_base: Path, small_dataset: Path, tmp_path: Path
) -> None:
    from tests import fsdp_worker

    work = functools.partial(fsdp_worker.compare, small_base, small_dataset, _layer_classes(), tmp_path / "meeting", 2)
    start = multiprocessing.get_context("fork" if warm.is_possible() else "spawn")  # forks have all libraries loaded
    with ProcessPoolExecutor(2, mp_context=start) as processes:
        of_each = list(processes.map(work, range(2)))
    for figures in of_each:
        assert figures["layers"] == 2 + 3
        assert figures["share"] == pytest.approx(0.5, abs=0.02)
        assert figures["same_names"]
        assert figures["gradients"] == 2 * 4 * (1 + 3)
        assert figures["smallest_gradient"] > 1e-4
        assert figures["loss_difference"] < 1e-3
        assert figures["gradient_difference"] < 1e-6


def _layer_classes() -> set[str]:
    """The layers of both towers, as transformers calls them."""
    from orion_triage.models.load import TINY_BASE_FOLDER, load_model

    model = load_model(TINY_BASE_FOLDER, dtype="auto")
    return {type(model.get_submodule(name)).__name__ for name, _ in model.named_modules() if name.endswith("layers.0")}
