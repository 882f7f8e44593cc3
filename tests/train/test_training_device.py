"""Which device trains, in which precision, with how many GPUs in the box; why a GPU cannot be used."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from orion_triage import processes
from orion_triage.dataset.dataset import Dataset
from orion_triage.dataset.records import read_split
from orion_triage.errors import OrionError
from orion_triage.models.checkpoint import count_parameters
from orion_triage.models.load import TINY_BASE_FOLDER, load_model, load_processor
from orion_triage.progress import silent
from orion_triage.settings import FineTuneSettings
from orion_triage.train import fine_tune
from orion_triage.train.device import Device, choose_device, driver_fault, gpu_fault, needs_gpu
from orion_triage.train.trainer import collator, fault_of, losses_of, make_trainer
from tests.conftest import MISSION, orion

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*checkpointing.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Paged optimizers:UserWarning"),
]
AUTO = FineTuneSettings()


@pytest.mark.parametrize(
    ("cuda", "driver", "has_devices", "fault", "fix"),
    [
        (
            12040,
            "550.90.07",
            True,
            r"550\.90\.07 serves CUDA 12\.4, .*13\.2 needs driver 580\.65\.06",
            "Update the dri",
        ),
        (13000, "580.65.06", False, r"a driver \(580\.65\.06\), and no GPU in /dev: a container", "--gpus all"),
        (
            0,
            None,
            False,
            r"no NVIDIA driver was found \(torch's CUDA 13\.2 needs driver 580",
            "machine with a CUDA GPU",
        ),
        (13000, "580.65.06", True, r"driver 580\.65\.06 does not start: .", "nvidia-smi"),
    ],
)
def test_the_reason_why_a_gpu_is_not_usable(
    cuda: int, driver: str | None, has_devices: bool, fault: str, fix: str
) -> None:
    import re

    if gpu_fault() is None:
        pytest.skip("the last case asks torch, which has a GPU here")
    found = driver_fault("13.2", cuda, driver, has_devices)
    assert re.search(fault, found[0]), found
    assert fix in found[1]


def test_a_list_of_visible_gpus_that_names_none_is_the_fault_and_not_the_driver() -> None:
    found, fix = driver_fault("13.2", 13000, "595.10", True, "7")
    assert found == "CUDA_VISIBLE_DEVICES=7 names no GPU that can be used"
    assert "nvidia-smi -L" in fix
    assert "driver 550.90.07 serves" in driver_fault("13.2", 12040, "550.90.07", True, "7")[0]  # first of all


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Device]:
    """The device that is chosen with so many GPUs; torch's answers about them are replaced, there are none here."""
    import torch

    monkeypatch.setattr("orion_triage.train.device.gpu_fault", lambda: None)

    def chosen(count: int, bfloat16: bool = True, precision: str = "auto", **launcher: str) -> Device:
        answers = {"is_available": True, "device_count": count, "is_bf16_supported": bfloat16}
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
        for name, value in launcher.items():
            monkeypatch.setenv(name, value)
        return choose_device(AUTO.model_copy(update={"precision": precision}), 1_596_625_904)

    return chosen


def test_idle_gpus_are_named_with_the_way_to_use_them(gpus: Callable[..., Device]) -> None:
    assert gpus(1) == Device("cuda:0", "bfloat16")
    assert gpus(2).notes[0].startswith("cuda:1 is idle: one process trains on one GPU. Use them with accelerate launch")
    assert gpus(3).notes[0].startswith("cuda:1 and cuda:2 are idle: one process")
    assert gpus(8).notes[0].startswith("cuda:1 to cuda:7 are idle: one process")
    two = gpus(8, WORLD_SIZE="4", LOCAL_WORLD_SIZE="2", RANK="3", LOCAL_RANK="1")  # two machines
    assert two.name == "cuda:1"
    assert two.notes[0].startswith("cuda:2 to cuda:7 are idle: 2 processes train on 2 GPUs.")
    assert gpus(2, WORLD_SIZE="4", LOCAL_WORLD_SIZE="2", LOCAL_RANK="1").notes == ()
    with pytest.raises(OrionError, match="process 3 of this machine has no GPU: 2 can be used here") as refused:
        gpus(2, WORLD_SIZE="4", LOCAL_WORLD_SIZE="4", LOCAL_RANK="3")
    assert "at most 2 processes" in refused.value.fix


def test_bfloat16_is_chosen_where_the_gpu_has_it(gpus: Callable[..., Device]) -> None:
    assert gpus(1).precision == "bfloat16"
    assert gpus(1, bfloat16=False).precision == "float16"
    assert gpus(1, precision="float32").precision == "float32"
    by_name = gpus(1, bfloat16=False, precision="bfloat16")
    assert by_name.precision == "bfloat16"
    assert "emulates it: fine_tune.precision=float16 is faster" in by_name.notes[0]


@pytest.mark.parametrize("value", ["two", "-1", "1.5"])
def test_a_number_of_processes_that_is_none_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", value)
    with pytest.raises(OrionError, match=f"WORLD_SIZE={value} is not a number of processes"):
        processes.count()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        refused = orion("settings", **{"RANK": "0", "WORLD_SIZE": "2", name: value})
        assert refused.returncode == 1
        assert f"error: {name}={value} is not a number of processes" in refused.stderr
    monkeypatch.setenv("WORLD_SIZE", "")  # set and empty, as in a script: as if it were not set
    assert processes.count() == 1


def test_a_rank_beyond_the_number_of_processes_is_refused() -> None:
    """Rank 2 alone would train, and write nothing."""
    refused = orion("settings", RANK="2", WORLD_SIZE="2")
    assert refused.returncode == 1
    assert "RANK=2, WORLD_SIZE=2 and LOCAL_WORLD_SIZE=2 do not belong together" in refused.stderr
    alone = orion("settings", RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="2")
    assert "RANK=0, WORLD_SIZE=1 and LOCAL_WORLD_SIZE=2 do not belong together" in alone.stderr


def test_an_error_is_told_by_every_process() -> None:
    for rank, heading in (("0", "error:"), ("1", "process 1: error:")):
        refused = orion("settings", "--preset", "none", WORLD_SIZE="2", RANK=rank)
        assert refused.returncode == 1
        assert refused.stderr.startswith(f"{heading} there is no preset 'none'.\n  fix: "), refused.stderr


def test_a_skipped_step_has_no_gradient_norm_in_the_log() -> None:
    history = [
        {"step": 1, "epoch": 0.5, "loss": 2.0, "grad_norm": float("inf"), "learning_rate": 1e-3},
        {"step": 2, "epoch": 1.0, "loss": 1.5, "grad_norm": 0.5, "learning_rate": 5e-4},
        {"step": 2, "eval_loss": 1.4, "eval_loss_category": 0.3, "eval_runtime": 3.0},
        {"train_runtime": 9.0},
    ]
    log = losses_of(cast(Any, SimpleNamespace(state=SimpleNamespace(log_history=history))))
    assert [entry.get("grad_norm", "none") for entry in log] == [None, 0.5, "none"]
    assert json.loads(json.dumps(log, allow_nan=False)) == log
    assert log[2] == {"step": 2, "eval_loss": 1.4, "eval_loss_category": 0.3}


def test_the_rate_rises_over_the_steps_that_all_processes_make(
    small_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(small_base, dtype="float32")
    records = [None] * 64
    settings = AUTO.model_copy(update={"warmup_fraction": 0.5, "epochs": 2, "micro_batch_size": 2})
    steps = {}
    for count in (1, 2):
        monkeypatch.setattr(processes, "count", lambda count=count: count)
        trainer = make_trainer(
            model, None, cast(Any, None), cast(Any, records), [], settings, Device("cpu", "float32"),
            tmp_path / str(count), silent,
        )  # fmt: skip
        steps[count] = trainer.args.warmup_steps
    assert steps == {1: 2, 2: 1}  # 4 and 2 steps of 16 records times the processes, half of them


def test_a_base_that_takes_days_on_a_cpu_is_not_trained_there_unless_it_is_asked_for() -> None:
    if gpu_fault() is None:
        pytest.skip("there is a GPU")
    small, large = count_parameters(TINY_BASE_FOLDER), 1_596_625_904
    assert 7_000_000 < small < 8_000_000
    assert choose_device(AUTO, small).name == "cpu"
    for settings, parameters in ((AUTO, large), (AUTO, None), (AUTO.model_copy(update={"device": "gpu"}), small)):
        assert needs_gpu(settings, parameters)
        with pytest.raises(OrionError, match="needs a GPU for the training, and none is usable: ") as refused:
            choose_device(settings, parameters)
        assert "fine_tune.device=cpu" in refused.value.fix
    by_name = choose_device(AUTO.model_copy(update={"device": "cpu", "precision": "float16"}), large)
    assert (by_name.name, by_name.precision) == ("cpu", "float32")
    assert by_name.notes == ("trained on the CPU in float32 instead of float16: as fine_tune.device says",)


def test_the_command_refuses_before_it_loads_a_model(small_base: Path, small_dataset: Path, tmp_path: Path) -> None:
    if gpu_fault() is None:
        pytest.skip("there is a GPU")
    options = ["--run", tmp_path / "run", "--set", f"base.model={small_base}"]
    options += ["--set", f"dataset.folder={json.dumps(str(small_dataset))}"]
    assert orion("dataset", *options).returncode == 0
    refused = orion("fine-tune", *options, "--set", "fine_tune.device=gpu", CUDA_VISIBLE_DEVICES="")
    assert refused.returncode == 1
    assert "none is usable: CUDA_VISIBLE_DEVICES= hides all GPUs" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "run" / "orion_lora_weights").exists()


@pytest.mark.slow
def test_the_number_of_gpus_in_the_box_changes_nothing(
    small_base: Path, small_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' count of the visible GPUs is replaced: there is none here. It stays a training on one device."""
    from functools import cached_property

    import torch
    from transformers import TrainingArguments, set_seed

    records = read_split(small_dataset, "train", MISSION)[:16]
    processor = load_processor(small_base, 256)
    collate = collator(processor, fine_tune.decode_frames(Dataset(small_dataset, MISSION), records, 256, silent))
    settings = FineTuneSettings(
        micro_batch_size=2, gradient_accumulation_steps=2, epochs=1, learning_rate=1e-2, gradient_checkpointing=False
    )
    device = TrainingArguments._setup_devices.func
    adapters: dict[int, dict[str, Any]] = {}
    logs: dict[int, list[float]] = {}
    for visible in (1, 2, 8):

        def counted(arguments: Any, visible: int = visible) -> Any:
            found = device(arguments)
            arguments._n_gpu = visible
            return found

        setup = cached_property(counted)
        setup.__set_name__(TrainingArguments, "_setup_devices")
        monkeypatch.setattr(TrainingArguments, "_setup_devices", setup)
        model = load_model(small_base, dtype="float32", four_bit=True)
        set_seed(7)
        model, _ = fine_tune.add_adapter(model, settings)
        trainer = make_trainer(
            model, processor.tokenizer, collate, records, records[:2], settings, Device("cpu", "float32"),
            tmp_path / str(visible), silent,
        )  # fmt: skip
        trainer.train()
        assert trainer.state.global_step == 4
        logs[visible] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        adapters[visible] = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert len(logs[1]) == 4
    for visible in (2, 8):
        assert logs[visible] == pytest.approx(logs[1], rel=1e-5)
        for name, value in adapters[1].items():
            assert torch.allclose(adapters[visible][name], value, atol=1e-6), name


def test_float16_that_overflows_again_and_again_ends_in_a_clear_word() -> None:
    """torch's own scaler, which halves its scale at each overflow."""
    import torch

    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight])
    scaler = torch.amp.GradScaler("cpu")
    assert fault_of({"loss": 2.0, "grad_norm": float("inf")}, scaler) is None  # one skipped step
    skipped, fault = 0, None
    while not (fault := fault_of({"loss": 2.0, "grad_norm": float("nan")}, scaler)) and skipped < 40:
        scaler.scale((weight * float("inf")).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        skipped += 1
    assert skipped == 17
    assert fault is not None
    assert float(weight.detach()) == 1  # every step was left out
    assert fault[0].startswith("the gradients do not fit float16: they overflow even at a loss scale of 0.5")
    assert "fine_tune.precision=bfloat16" in fault[1]


@pytest.mark.parametrize(
    ("figures", "fault"),
    [
        ({"loss": 0.0, "grad_norm": 1.0}, "loss is exactly 0"),
        ({"eval_loss": float("inf")}, "eval_loss is inf"),
        ({"loss": 2.0, "grad_norm": float("nan")}, "the gradient norm is nan"),
        ({"loss": 2.0, "grad_norm": 0.0}, "no gradient reaches the adapter"),
        ({"loss": 2.0, "grad_norm": 0.1}, None),
        ({"learning_rate": 0.0}, None),
    ],
)
def test_figures_that_show_a_lost_training(figures: dict[str, float], fault: str | None) -> None:
    found = fault_of(figures, None)
    assert found is None if fault is None else found is not None and found[0].startswith(fault)


def test_this_machine_says_what_it_lacks() -> None:
    fault = gpu_fault()
    listed = subprocess.run(["sh", "-c", "ls /dev/nvidia[0-9]*"], capture_output=True, text=True, check=False)
    assert (fault is None) <= bool(listed.stdout), "a GPU without a device"
    if fault:
        assert "fine_tune.device=cpu" in fault[1]
