"""What only a GPU can show, in one command and within minutes: tests, training, profile, evaluation, fuse.

    python benchmarks/gpu_kit.py build/gpu-kit --cuda 130 --python 3.12   # what the GPU machine lacks, if anything
    python3 benchmarks/gpu.py --kit build/gpu-kit --out gpu.json          # there, nothing installed, no network
    python benchmarks/gpu.py --shapes small                               # the same code on a CPU, in two minutes

Each step is a process of its own with a time limit. The file of --out is written anew after each step and within a step
whenever something more is measured, so a cut loses nothing. A step that fails is recorded with its error, and the next
one begins. A step that the time left (--minutes) is too short for is skipped. Exit status 1 if a step failed.

card                what is there: card, driver, versions, imports, the fastest 16-bit matrix product, a 4-bit layer
tests               tests/test_gpu.py
data                a checkpoint of random weights in the preset's published shapes, and records of drawn frames
training            'orion fine-tune' (train.fine_tune.run), one epoch of a few steps
reference training  the published recipe (benchmarks/reference.py) on the same records
profile             where the time of a training step goes
twins training      the same with fine_tune.twins_together: what two records of a frame share is computed once
evaluation          questions per second with transformers, each question with a picture of its own
fuse                adapter and base to the merged model, with its check
"""

import argparse
import faulthandler
import importlib
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MINUTES = 9
GOAL = 6  # times as fast as the reference, at the shapes of the 1.6B model
RUN_RECORDS, RUN_VALIDATIONS = 1440, 180  # the preset's training: 480 records and 60 validation records, three epochs
LARGEST_LOSS_DIFFERENCE = 1e-2  # of the first loss, between two ways to compute it in 16 bits
PROFILED_STEPS = 2
LAST_WORDS = 3000  # characters of a failed step's error or output that are kept
Figures = dict[str, Any]
Report = Callable[..., None]  # report(name=value, ...): measured so far, written at once


@dataclass(frozen=True)
class Size:
    """How much is done at one choice of --shapes."""

    preset: str
    steps: int = 6  # of each training; the first third is warm-up and not counted
    sets: tuple[str, ...] = ()  # as of --set
    validation_frames: int = 4  # per category
    answer_tokens: int = 40  # random weights do not end an answer; a trained model's answers have 25 to 40 tokens
    batch_sizes: tuple[int, ...] = (1, 8, 32, 64)  # of the evaluation
    check_records: int = 20  # of the fused model

    @property
    def warm_up(self) -> int:
        return self.steps // 3


SIZES = {
    "lfm2.5-vl-1.6b": Size("lfm2.5-vl-1.6b"),
    "lfm2.5-vl-450m": Size("lfm2.5-vl-450m"),
    "small": Size("tiny", 3, ("fine_tune.micro_batch_size=2",), 1, 8, (1, 4), 4),  # whether it runs, not how fast
}


@dataclass(frozen=True)
class Bench:
    """What was asked for on the command line, and where things lie."""

    shapes: str
    folder: Path

    @property
    def size(self) -> Size:
        return SIZES[self.shapes]

    @property
    def base(self) -> Path:
        from orion_triage.models.load import TINY_BASE_FOLDER

        return TINY_BASE_FOLDER if self.shapes == "small" else self.folder / "base"

    @property
    def dataset(self) -> Path:
        return self.folder / "dataset"

    def settings(self, *more_sets: str) -> Any:
        """The preset's; a CPU is asked for by name, which a large base is refused without."""
        import torch

        from orion_triage.settings import load_settings

        sets = [f"base.model={self.base}", "fine_tune.epochs=1", *self.size.sets, *more_sets]
        if not torch.cuda.is_available():
            sets.append("fine_tune.device=cpu")
        return load_settings(self.size.preset, sets)


class Skipped(Exception):  # noqa: N818 - no error
    """A step that cannot be done on this machine, and why."""


def records_a_step(settings: Any) -> int:
    return settings.fine_tune.micro_batch_size * settings.fine_tune.gradient_accumulation_steps


def synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


# --- what is there --------------------------------------------------------------------------------------------------

PACKAGES = (
    "torch", "transformers", "peft", "accelerate", "bitsandbytes", "triton", "numpy", "pydantic", "imagehash",
    "causal-conv1d", "flash-attn", "flash-linear-attention",
)  # fmt: skip
IMPORTS = (
    "bitsandbytes", "pydantic", "imagehash", "tests.conftest", "orion_triage.train.fine_tune",
    "orion_triage.evaluate.backends", "orion_triage.export.fuse", "orion_triage.machine.rehearse",
)  # fmt: skip


def mission() -> Any:
    """The published mission; imported here, because a bare machine sees the packages only later."""
    from orion_triage.mission.mission import default_mission

    return default_mission()


def versions() -> Figures:
    found: Figures = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def card(bench: Bench, report: Report) -> None:
    import torch

    report(versions=versions(), cuda=torch.version.cuda, gpu=gpu(), nvidia_smi=nvidia_smi())
    errors = {}
    for name in IMPORTS:
        try:
            importlib.import_module(name)
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}"[:LAST_WORDS]
    report(imports={name: errors.get(name, "ok") for name in IMPORTS})
    import reference  # beside this file

    device, dtype = ("cuda:0", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    report(peak_operations_per_second=round(reference.peak_operations_per_second(device, dtype)[1]))
    report(four_bit_cosine=four_bit_cosine(device))
    if errors:
        raise ImportError(f"{', '.join(errors)}: see imports")


def gpu() -> Figures | None:
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "count": torch.cuda.device_count(),
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "capability": list(torch.cuda.get_device_capability(0)),
        "bfloat16": torch.cuda.is_bf16_supported(),
    }


def nvidia_smi() -> str | None:
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit", "--format=csv"]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stdout.strip()


def four_bit_cosine(device: str) -> float:
    """Cosine between a layer's outputs with NF4 and with full weights: whether bitsandbytes' library works here."""
    import bitsandbytes
    import torch

    torch.manual_seed(0)
    plain = torch.nn.Linear(256, 256, bias=False)
    packed = bitsandbytes.nn.Linear4bit(256, 256, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    packed.load_state_dict(plain.state_dict())
    inputs = torch.randn(64, 256)
    with torch.no_grad():
        outputs = packed.to(device)(inputs.to(device)).cpu()
        return round(torch.cosine_similarity(outputs.flatten(), plain(inputs).flatten(), dim=0).item(), 6)


# --- tests ----------------------------------------------------------------------------------------------------------


def tests(bench: Bench, report: Report) -> None:
    import pytest
    import torch

    if not torch.cuda.is_available():
        raise Skipped("no GPU")
    results: Figures = {}

    class Recorder:
        """Each test's outcome as soon as it has one; a report in XML would come after the last."""

        @staticmethod
        def pytest_runtest_logreport(report: Any) -> None:
            if report.when == "call" or report.outcome != "passed":
                results[report.nodeid.partition("::")[2]] = {
                    "outcome": report.outcome,
                    "seconds": round(report.duration, 2),
                    **({"error": report.longreprtext[-LAST_WORDS:]} if report.failed else {}),
                }
                record()

    def record() -> None:
        report(tests=results, outcomes=dict(Counter(test["outcome"] for test in results.values())))

    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # the machine's plugins are not ours
    file = HERE.parent / "tests" / "test_gpu.py"
    words = ["-m", "gpu", "-p", "no:cacheprovider", "--rootdir", str(HERE.parent), str(file)]
    status = pytest.main([*words, "--basetemp", str(bench.folder / "tests")], plugins=[Recorder()])
    if status != pytest.ExitCode.OK:
        raise RuntimeError(f"pytest ended with {status!r}; what it printed: log")


# --- what is worked on ----------------------------------------------------------------------------------------------


def data(bench: Bench, report: Report) -> None:
    from orion_triage.machine import rehearse

    began = time.monotonic()
    if not bench.base.exists():
        rehearse.make_base(bench.size.preset, bench.base)
    size = sum(path.stat().st_size for path in bench.base.glob("*.safetensors"))
    report(base_seconds=round(time.monotonic() - began, 1), base_bytes=size)
    began = time.monotonic()
    count = bench.size.steps * records_a_step(bench.settings())
    if not bench.dataset.exists():  # of each category a third of the frames, and of each frame two records
        rehearse.make_dataset(
            bench.dataset, count, train_frames=-(-count // 6), val_frames=bench.size.validation_frames
        )
    report(dataset_seconds=round(time.monotonic() - began, 1), training_records=count)


# --- training -------------------------------------------------------------------------------------------------------


def watch_steps(on_step: Callable[[int], None], on_evaluation: Callable[[Figures], None] | None = None) -> None:
    """Have `on_step` called at the beginning (0) and after each optimizer step of any Trainer in this process."""
    from transformers import TrainerCallback, trainer

    class Watch(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            synchronize()
            on_step(0)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            synchronize()
            on_step(state.global_step)

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Figures, **_: Any) -> None:
            if on_evaluation:
                on_evaluation(metrics)

    trainer.DEFAULT_CALLBACKS.append(Watch())


class Clock:
    """Seconds of each step, and what they come to."""

    def __init__(self, bench: Bench, report: Report) -> None:
        self.bench, self.report = bench, report
        self.times: list[float] = []
        watch_steps(self.step, self.evaluation)

    def step(self, _: int) -> None:
        self.times.append(time.perf_counter())
        seconds = [round(after - before, 4) for before, after in zip(self.times, self.times[1:], strict=False)]
        self.report(step_seconds=seconds)
        if counted := seconds[self.bench.size.warm_up :]:
            a_record = statistics.median(counted) / records_a_step(self.bench.settings())
            self.report(seconds_per_record=round(a_record, 5), steps_counted=len(counted))

    def evaluation(self, metrics: Figures) -> None:
        from orion_triage.dataset.records import read_split

        records = len(read_split(self.bench.dataset, "val", mission()))
        self.report(validation_seconds_per_record=round(metrics["eval_runtime"] / records, 5))


def fine_tune(bench: Bench, name: str, *more_sets: str) -> Figures:
    """This project's training in an empty folder; returns its measurements."""
    from orion_triage.dataset.dataset import Dataset
    from orion_triage.train import fine_tune

    folder, settings = bench.folder / name, bench.settings(*more_sets)
    shutil.rmtree(folder, ignore_errors=True)
    return fine_tune.run(
        bench.base,
        Dataset(bench.dataset, mission()),
        folder / "adapter",
        folder / "work",
        settings.fine_tune,
        settings.base.frame_size,
    )


def training(bench: Bench, report: Report, *more_sets: str) -> None:
    Clock(bench, report)
    figures = fine_tune(bench, "training", *more_sets)
    kept = (
        "first_loss", "last_loss", "eval_losses", "micro_batch_size", "gradient_checkpointing", "precision_used",
        "attention", "short_convolution", "trained_parameters", "steps",
    )  # fmt: skip
    report(**{name: figures.get(name) for name in kept}, peak_gpu_memory_bytes=figures.get("peak_vram_bytes"))


def twins_training(bench: Bench, report: Report) -> None:
    training(bench, report, "fine_tune.twins_together=true")


def reference_training(bench: Bench, report: Report) -> None:
    import reference  # beside this file

    Clock(bench, report)
    folder, settings = bench.folder / "reference", bench.settings()
    shutil.rmtree(folder, ignore_errors=True)
    result = reference.train(bench.base, bench.dataset, settings, folder)
    losses = [entry["loss"] for entry in result["losses"] if "loss" in entry]
    kept = {name: result[name] for name in ("trained_parameters", "peak_gpu_memory_bytes")}
    report(first_loss=losses[0], last_loss=losses[-1], precision_used=reference.precision_of(settings), **kept)
    report(operations=reference.operations(bench.base, bench.dataset, settings))


# --- profile --------------------------------------------------------------------------------------------------------

# Classes of transformers' modules: the innermost of these that runs is the part that an operation belongs to.
PART_OF_CLASS = {
    "Siglip2VisionModel": "vision tower",
    "Lfm2VlMultiModalProjector": "projector",
    "Lfm2Attention": "attention",
    "Lfm2ShortConv": "short convolution",
    "Lfm2MLP": "feed-forward",
    "Lfm2Model": "norms, residuals and masks of the language model",
    "Lfm2VlForConditionalGeneration": "token embedding, head and loss",
}
PART_OF_RANGE = {"Optimizer.step": "optimizer", "enumerate(DataLoader)": "data and collate"}  # named by torch itself
PART_OF_KERNEL = {"equantize": "bitsandbytes dequantization", "ptimizer": "optimizer", "Memcpy HtoD": "copy to the GPU"}
OTHER = "other"
MARK = "part: "


def mark_parts() -> None:
    """Let the profiler see where each module of PART_OF_CLASS begins and ends, also where it is computed again."""
    import torch
    from torch.nn.modules import module as modules

    open_ranges = threading.local()

    def begin(module: Any, inputs: Any) -> None:
        if part := PART_OF_CLASS.get(type(module).__name__):
            mark = torch.profiler.record_function(MARK + part)
            mark.__enter__()
            open_ranges.__dict__.setdefault("stack", []).append(mark)

    def end(module: Any, inputs: Any, output: Any) -> None:
        if type(module).__name__ in PART_OF_CLASS:
            open_ranges.stack.pop().__exit__(None, None, None)

    modules.register_module_forward_pre_hook(begin)
    modules.register_module_forward_hook(end, always_call=True)  # recomputation ends with an exception


def profile(bench: Bench, report: Report) -> None:
    import torch

    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(activities=activities)
    first, last = bench.size.warm_up, bench.size.warm_up + PROFILED_STEPS
    times = []

    def on_step(step: int) -> None:
        if step == first:
            profiler.start()
        if step in (first, last):
            times.append(time.perf_counter())
        if step == last:
            profiler.stop()

    mark_parts()
    watch_steps(on_step)
    fine_tune(bench, "profile")
    report(
        method="torch.profiler over these steps, profiler's own cost included. A GPU kernel (on a CPU: an operation's "
        "own time) belongs to the innermost marked module whose forward launched it, a gradient's kernel to the module "
        "of its forward operation (sequence numbers), recomputation to its module. Kernels of dequantization, of the "
        "optimizer and copies to the GPU are taken out by name. Idle: wall time without any kernel. Data and collate: "
        "the data loader's time on the CPU, which overlaps with kernels.",
        steps=PROFILED_STEPS,
        **shares(list(profiler.events()), times[1] - times[0], torch.cuda.is_available()),
    )


def shares(events: Sequence[Any], wall_seconds: float, on_gpu: bool) -> Figures:
    """Seconds by part and by kernel, out of the profiler's events (whose times are microseconds)."""
    operations = [event for event in events if "CPU" in str(event.device_type)]
    parts = forward_parts(operations)
    by_part: Counter[str] = Counter()
    by_kernel: Counter[str] = Counter()
    for operation in operations:
        for name, microseconds in device_times(operation, on_gpu):
            named = (part for word, part in PART_OF_KERNEL.items() if word in name)
            by_part[next(named, None) or part_of(operation, parts)] += microseconds
            by_kernel[name[:120]] += microseconds
    total = sum(by_part.values())
    loading = sum(
        operation.time_range.elapsed_us() for operation in operations if operation.name.startswith("enumerate(Data")
    )
    idle = wall_seconds - busy_seconds(events) if on_gpu else None
    return {
        "wall_seconds": round(wall_seconds, 4),
        "busy_seconds": round(total / 1e6, 4),
        "idle_seconds": None if idle is None else round(idle, 4),
        "idle_share": None if idle is None else round(idle / wall_seconds, 4),
        "data_and_collate_cpu_seconds": round(loading / 1e6, 4),
        "kernels": sum(len(operation.kernels) for operation in operations),
        "share_of_busy_time": {part: round(value / total, 4) for part, value in by_part.most_common()},
        "largest_kernels": {name: round(value / total, 4) for name, value in by_kernel.most_common(25)},
    }


def device_times(operation: Any, on_gpu: bool) -> Iterator[tuple[str, float]]:
    """(kernel, microseconds) of what this operation itself launched; on a CPU its own name and time."""
    if on_gpu:
        yield from ((kernel.name, kernel.duration) for kernel in operation.kernels)
    else:
        yield operation.name, operation.self_cpu_time_total


def forward_parts(operations: Sequence[Any]) -> dict[tuple[int, int], str]:
    """(thread, sequence number) -> part. The last operation with a number is the one that the gradient belongs to."""
    found = {}
    for operation in sorted(operations, key=lambda operation: operation.time_range.start):
        if operation.sequence_nr >= 0 and not operation.fwd_thread:
            found[operation.thread, operation.sequence_nr] = part_of(operation, {})
    return found


def part_of(operation: Any, parts: dict[tuple[int, int], str]) -> str:
    """Of what encloses the operation, the innermost that has a part."""
    node = operation
    while node is not None:
        if node.name.startswith(MARK):
            return node.name.removeprefix(MARK)
        for word, part in PART_OF_RANGE.items():
            if node.name.startswith(word):
                return part
        if node.fwd_thread:  # computes a gradient; the thread is that of the forward operation
            return parts.get((node.fwd_thread, node.sequence_nr), OTHER)
        node = node.cpu_parent
    return OTHER


def busy_seconds(events: Sequence[Any]) -> float:
    """Seconds in which at least one kernel or copy ran."""
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in events
        if "CUDA" in str(event.device_type) and not getattr(event, "is_user_annotation", False)
        if not event.name.startswith((MARK, *PART_OF_RANGE))
    )
    busy, until = 0.0, float("-inf")
    for start, end in spans:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy / 1e6


# --- evaluation and fuse --------------------------------------------------------------------------------------------


def evaluation(bench: Bench, report: Report) -> None:
    import torch

    from orion_triage.dataset.dataset import Dataset
    from orion_triage.evaluate.backends import TransformersBackend
    from orion_triage.settings import EvaluateSettings

    dataset, frame_size = Dataset(bench.dataset, mission()), bench.settings().base.frame_size
    backend = TransformersBackend.load(
        bench.base, mission(), EvaluateSettings(max_new_tokens=bench.size.answer_tokens), frame_size
    )
    records = dataset.records("train")

    def seconds(count: int, batch_size: int) -> float:
        asked = [records[index % len(records)] for index in range(count)]
        images = [dataset.frame(record, frame_size).copy() for record in asked]  # none is kept from another question
        synchronize()
        began = time.perf_counter()
        for start in range(0, count, batch_size):
            batch = slice(start, start + batch_size)
            backend.answer(images[batch], [record.user_text for record in asked[batch]])
        synchronize()
        return time.perf_counter() - began

    seconds(2, 2)  # the first batch loads kernels
    report(answer_tokens=bench.size.answer_tokens)
    rates = {}
    for batch_size in bench.size.batch_sizes:
        count = max(8, 2 * batch_size)
        rates[str(batch_size)] = round(count / seconds(count, batch_size), 3)
        memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
        report(questions_per_second=rates, peak_gpu_memory_bytes=memory)


def fuse(bench: Bench, report: Report) -> None:
    import torch

    from orion_triage.dataset.dataset import Dataset
    from orion_triage.export import fuse
    from orion_triage.machine import rehearse
    from orion_triage.settings import FuseSettings

    settings, adapter = bench.settings(), bench.folder / "adapter"
    rehearse.make_adapter(bench.base, adapter, settings)
    began = time.monotonic()
    figures = fuse.run(
        bench.base,
        adapter,
        Dataset(bench.dataset, mission()),
        bench.folder / "merged",
        FuseSettings(check_records=bench.size.check_records),
        settings.base.frame_size,
    )
    memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    report(fuse_seconds=round(time.monotonic() - began, 1), peak_gpu_memory_bytes=memory)
    kept = ("check_records", "largest_difference", "allowed_difference", "mean_adapter_effect", "bytes")
    report(**{name: figures[name] for name in kept})
    shutil.rmtree(bench.folder / "merged")


# --- steps, each a process ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    work: Callable[[Bench, Report], None]
    least_seconds: int  # with less time left it is not begun
    most_seconds: int  # then it is ended; more in proportion where --minutes is more than MINUTES


# The most valuable first; `data` makes what all below it need.
STEPS = {
    "card": Step(card, 10, 120),
    "tests": Step(tests, 30, 150),
    "data": Step(data, 20, 120),
    "training": Step(training, 30, 150),
    "reference training": Step(reference_training, 40, 180),
    "profile": Step(profile, 30, 120),
    "twins training": Step(twins_training, 30, 120),
    "evaluation": Step(evaluation, 25, 120),
    "fuse": Step(fuse, 25, 120),
}
FAILED = ("failed", "ended")  # how the status of a step begins that was not done for no good reason


def see_packages(kit: Path | None) -> None:
    """Find this repository's package and, for what the machine lacks, the kit's; also in the processes of the steps.

    They run this file, too. PYTHONPATH would put the kit before the machine's own packages.
    """
    sys.path[:0] = [str(HERE.parent), str(HERE.parent / "src")]
    if kit:
        if not (kit / "packages").is_dir():
            sys.exit(f"{kit} is not a kit. Make one with benchmarks/gpu_kit.py.")
        sys.path.insert(0, str(kit / "newer"))
        sys.path.append(str(kit / "packages"))


def be_step(name: str, bench: Bench, result: Path) -> int:
    """In the process of a step: do it, with what it has measured so far in the file `result`."""
    from orion_triage.safe.files import write_text

    faulthandler.enable()  # when it is ended, and when it crashes, the log says where
    value: Figures = {"status": "begun", "measured": {}}

    def report(**measured: Any) -> None:
        value["measured"] |= measured
        write_text(result, json.dumps(value, indent=1))

    report()
    try:
        STEPS[name].work(bench, report)
        value["status"] = "done"
    except Skipped as reason:
        value["status"] = f"skipped: {reason}"
    except Exception as error:
        traceback.print_exc()
        message = " ".join(str(getattr(error, word)) for word in ("message", "fix") if hasattr(error, word))
        value["status"] = f"failed: {type(error).__name__}: {message or error}"[:LAST_WORDS]
        value["traceback"] = traceback.format_exc()[-LAST_WORDS:]
    report(peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    return int(value["status"].startswith(FAILED))


def run_step(name: str, bench: Bench, limit_seconds: float, update: Callable[[Figures], None]) -> None:
    """Do a step in a process of its own; `update` gets what is known of it, again and again."""
    from orion_triage.safe.children import tied

    result, log = (bench.folder / f"{name.replace(' ', '-')}.{kind}" for kind in ("json", "log"))
    result.unlink(missing_ok=True)
    began = time.monotonic()

    def known() -> Figures:
        read = json.loads(result.read_text(encoding="utf-8")) if result.is_file() else {"status": "begun"}
        return {**read, "seconds": round(time.monotonic() - began, 1)}

    words = ["--shapes", bench.shapes, "--folder", str(bench.folder), "--step", name, "--result", str(result)]
    words += [word for kit in (arguments_of().kit,) if kit for word in ("--kit", str(kit.resolve()))]
    command = tied([sys.executable, str(Path(__file__).resolve()), *words])
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
    ended = ""
    while process.poll() is None:
        if ended:
            process.kill()
        elif time.monotonic() - began > limit_seconds:
            process.send_signal(signal.SIGABRT)
            ended = f"ended after {limit_seconds:.0f} s, which is all the time that it had"
        with suppress(subprocess.TimeoutExpired):
            process.wait(1)
        update(known())
    value = known()
    if value["status"] == "begun":  # ended from outside, or before it could say anything
        value["status"] = ended or f"failed: exit status {process.returncode}"
    if value["status"].startswith(FAILED):
        value["log"] = log.read_text(encoding="utf-8", errors="replace")[-LAST_WORDS:]
    update(value)


def measure(bench: Bench, names: Sequence[str], seconds: float, out: Path) -> int:
    """Do the steps in order; returns the exit status."""
    from orion_triage.machine.describe import describe
    from orion_triage.safe.files import write_text

    deadline = time.monotonic() + seconds
    steps: dict[str, Figures] = {name: {"status": "not begun"} for name in names}
    written = ""

    def update(name: str, value: Figures) -> None:
        nonlocal written
        steps[name] = value
        head = {"what": "gpu", "shapes": bench.shapes, "command": ["python", "benchmarks/gpu.py", *sys.argv[1:]]}
        text = json.dumps({**head, "machine": describe(), "summary": summary(steps), "steps": steps}, indent=1) + "\n"
        if text != written:
            write_text(out, text)
            written = text

    bench.folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        left = deadline - time.monotonic()
        if left < STEPS[name].least_seconds:
            needs = STEPS[name].least_seconds
            update(name, {"status": f"skipped: {max(left, 0):.0f} s are left, and it takes at least {needs}"})
        else:
            limit = min(left, STEPS[name].most_seconds * max(1, seconds / 60 / MINUTES))
            run_step(name, bench, limit, lambda value, name=name: update(name, value))
        print(f"{name}: {steps[name]['status']} ({steps[name].get('seconds', 0)} s)", flush=True)
    found = summary(steps)
    print(json.dumps(found, indent=1), f"figures: {out}", sep="\n", flush=True)
    failed = any(step["status"].startswith(FAILED) for step in steps.values())
    return int(failed or not found.get("same_first_loss", True))


def summary(steps: dict[str, Figures]) -> Figures:
    """What the steps come to together, as far as they are done."""

    def measured(step: str, name: str) -> Any:
        return steps.get(step, {}).get("measured", {}).get(name)

    found: Figures = {}
    sides = {"ours": "training", "reference": "reference training"}
    operations = measured("reference training", "operations") or {}
    for side, step in sides.items():
        a_record, a_validation = measured(step, "seconds_per_record"), measured(step, "validation_seconds_per_record")
        if a_record and operations:
            rate = operations["operations_per_record"] / a_record
            found[f"share_of_peak_{side}"] = round(rate / operations["peak_operations_per_second"], 4)
        if a_record and a_validation:
            seconds = RUN_RECORDS * a_record + RUN_VALIDATIONS * a_validation
            found[f"projected_seconds_for_{RUN_RECORDS}_records_{side}"] = round(seconds, 1)
    rates = [measured(step, "seconds_per_record") for step in sides.values()]
    if all(rates):
        found |= {"times_as_fast_as_the_reference": round(rates[1] / rates[0], 2), "goal": GOAL}
        if twins := measured("twins training", "seconds_per_record"):
            found["times_as_fast_with_twins_together"] = round(rates[1] / twins, 2)
    losses = [measured(step, "first_loss") for step in sides.values()]
    if None not in losses:
        difference = abs(losses[0] - losses[1]) / abs(losses[1])
        found |= {"first_loss_difference": difference, "same_first_loss": difference <= LARGEST_LOSS_DIFFERENCE}
    return found


def arguments_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=SIZES, default="lfm2.5-vl-1.6b", help="small: the shipped base")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"all steps together ({MINUTES})")
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS), metavar="STEP", help="some steps")
    parser.add_argument("--kit", type=Path, help="the folder that benchmarks/gpu_kit.py made")
    parser.add_argument("--folder", type=Path, default=Path("runs/gpu"), help="what is worked in: 10 GB at 1.6B")
    parser.add_argument("--out", type=Path, help="the figures (benchmarks/results/gpu_SHAPES.json)")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)  # these two: the process of a step
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = arguments_of()
    see_packages(arguments.kit)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # each step would compile 5,000 modules again
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    bench = Bench(arguments.shapes, arguments.folder.resolve())
    if arguments.step:
        sys.exit(be_step(arguments.step, bench, arguments.result))
    names = [name for name in STEPS if name in arguments.only]
    out = arguments.out or HERE / "results" / f"gpu_{arguments.shapes}.json"
    sys.exit(measure(bench, names, arguments.minutes * 60, out))


if __name__ == "__main__":
    main()
