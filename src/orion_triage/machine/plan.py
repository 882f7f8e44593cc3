"""From the laptop to the Pi: every step with its command, seconds, memory and disk, and how each number is known.

This module is the one place of these numbers. A number is measured by this project, comes from a source that `how`
names, or is estimated by the arithmetic in `how`. docs/from-laptop-to-pi.md has the table (python docs/plan_table.py).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from orion_triage.dataset.split import SHARES
from orion_triage.errors import OrionError
from orion_triage.evaluate.statistics import wilson
from orion_triage.machine import power
from orion_triage.machine.budgets import last_rehearsal
from orion_triage.machine.doctor import needs_of
from orion_triage.progress import in_words
from orion_triage.settings import Settings

GB, GIB = 1_000_000_000, 2**30
Known = Literal["measured", "source", "estimate"]


@dataclass(frozen=True)
class Figure:
    """A number, or a range from `low` to `high`: in seconds or in bytes."""

    low: float
    high: float
    known: Known
    how: str


@dataclass(frozen=True)
class Gpu:
    """`tera_operations`: the most 16-bit tensor operations per second (10^12), dense, summed in 32 bits."""

    name: str
    memory_bytes: int
    tera_operations: float
    source: str


@dataclass(frozen=True)
class Step:
    """One step. A missing figure is not known; with `impossible`, the step cannot be done with this GPU."""

    name: str
    where: str
    command: str
    time: Figure | None = None
    gpu_memory: Figure | None = None
    memory: Figure | None = None
    disk: Figure | None = None  # that the step adds
    impossible: str = ""


@dataclass(frozen=True)
class Plan:
    """The steps for one preset, GPU (None: without one) and number of frames."""

    preset: str
    gpu: Gpu | None
    frames: dict[str, int]  # of each split
    steps: list[Step]
    on_board: list[str] = field(default_factory=list)  # what a frame costs in flight
    claims: list[str] = field(default_factory=list)  # what so many frames can show
    rehearsed: list[str] = field(default_factory=list)  # what the last rehearsal on this machine says instead

    @property
    def seconds(self) -> tuple[float, float]:
        """The sum of the times that are known, as a range."""
        times = [step.time for step in self.steps if step.time and not step.impossible]
        return sum(time.low for time in times), sum(time.high for time in times)


def _gpu(name: str, memory_gib: int, tera_operations: float, source: str) -> Gpu:
    return Gpu(name, memory_gib * GIB, tera_operations, source)


_SPARSE = "half of the figure with sparsity"
GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("rtx-3090", 24, 71.0, "NVIDIA Ampere GA102 GPU Architecture, whitepaper"),
        _gpu("rtx-4070-ti", 12, 80.2, "NVIDIA Ada GPU Architecture, whitepaper"),
        _gpu("rtx-4080", 16, 97.5, "NVIDIA Ada GPU Architecture, whitepaper"),
        _gpu("rtx-4090", 24, 165.2, "NVIDIA Ada GPU Architecture, whitepaper"),
        _gpu("t4", 16, 65.0, "NVIDIA T4, datasheet"),
        _gpu("l4", 24, 121.0, f"NVIDIA L4, datasheet ({_SPARSE})"),
        _gpu("a10", 24, 125.0, "NVIDIA A10, datasheet"),
        _gpu("l40s", 48, 362.0, "NVIDIA L40S, datasheet"),
        _gpu("a100", 40, 312.0, "NVIDIA A100, datasheet"),
        _gpu("h100", 80, 989.0, f"NVIDIA H100 SXM, datasheet ({_SPARSE})"),
        _gpu("h200", 141, 989.0, f"NVIDIA H200, datasheet ({_SPARSE})"),
    )
}
NO_GPU = "none"


# --- what was measured ------------------------------------------------------------------------------------------------

AVX512 = "2 cores of an AMD EPYC with AVX-512, 24 GB, no GPU"
AVX2 = "2 cores of an AMD EPYC with AVX2 only, 24 GB, no GPU"

# `orion run` as shipped (preset tiny, 360 frames, 60 of them test frames) on AVX512, in seconds: docs/measurements.md.
TINY_SECONDS: dict[str, tuple[float, float]] = {
    "dataset": (40, 60),
    "evaluate base": (25, 27),
    "fine-tune": (365, 377),
    "fuse": (8, 8),
    "quantize": (4, 5),
    "evaluate fine-tuned": (14, 15),
    "evaluate quantized": (13, 14),
    "the other variants": (94, 96),
}
TINY_SECONDS_AVX2 = 967.0  # the sum of the stages of one `make run`, 2026-11-29
TINY_FRAMES = 360
_TINY_BYTES_PER_FRAME = 167e6 / 360  # drawn tiles of 512 px as PNG
_LARGEST_BYTES_PER_FRAME = 700_000  # a noisy 512x512 PNG: what `orion dataset` asks for

SETUP = Figure(49, 260, "measured", f"packages of constraints.txt with uv ({AVX2}: 49 s) to pip (260 s), 5 GB fetched")
SETUP_DISK = Figure(7e9, 7e9, "measured", "the libraries of constraints.txt; most of it is torch's CUDA build")
BUILD = Figure(202, 360, "measured", "llama.cpp's two tools compiled on 2 cores; no work if they are already built")
_BESIDE = f"{AVX2}, beside other work, 2026-11-29"
DOCTOR = Figure(24, 24, "measured", _BESIDE)
VERDICT = Figure(24, 24, "measured", f"60 test frames, {_BESIDE}")
_FRAME_SECONDS = 48 / 360  # `orion dataset` and `orion dataset check` on 360 finished PNGs of 512 px
BUILD_DISK = Figure(0.3e9, 0.3e9, "measured", "while it builds; 0.2 GB stay")


@dataclass(frozen=True)
class _Measured:
    """Measured at the shapes of one base with random weights, frames of 512 px, on AVX512."""

    parameters: int
    fuse_seconds: float  # with 2 check records
    fuse_memory: float
    quantize_seconds: float  # with its checks
    quantize_memory: float
    rehearsal_seconds: float
    pair_bytes: float  # Q4_K_M and mmproj
    merged_bytes: float
    gguf_bytes: Figure  # F16, Q4_K_M and mmproj
    image_seconds: Figure  # llama.cpp reads a new image
    question_seconds: Figure  # and answers a question about it


_BUDGETS = f"docs/budgets.md, {AVX512}"
_SPLIT_OF_A_QUESTION = f"docs/performance.md, {AVX512}"
_OF_1600M = _Measured(
    1_596_625_904, 107, 5.06e9, 68, 1.83e9, 244, 0.730e9 + 0.854e9, 3.193e9,
    Figure(3.926e9, 3.926e9, "measured", "F16 2.342, Q4_K_M 0.730 and mmproj 0.854 GB"),
    Figure(11, 11, "measured", _SPLIT_OF_A_QUESTION), Figure(2.5, 2.5, "measured", _SPLIT_OF_A_QUESTION),
)  # fmt: skip
_FIFTH = "as at 1.6B, times 5 s / 18 s (one answer with its start at 450M and at 1.6B, docs/budgets.md)"
_OF_450M = _Measured(
    450_816_512, 34, 2.30e9, 29, 1.74e9, 90, 0.228e9 + 0.193e9, 0.902e9,
    Figure(1.08e9, 1.08e9, "estimate", "Q4_K_M 0.228, mmproj 0.193 GB (measured); F16 as at 1.6B, by parameters"),
    Figure(11 * 5 / 18, 11 * 5 / 18, "estimate", _FIFTH), Figure(2.5 * 5 / 18, 2.5 * 5 / 18, "estimate", _FIFTH),
)  # fmt: skip
_MEASURED = {"LiquidAI/LFM2.5-VL-1.6B": _OF_1600M, "LiquidAI/LFM2.5-VL-450M": _OF_450M}
_TINY = "orion-tiny"

# Counted with torch.utils.flop_counter at 1.6B and 512 px (docs/performance.md), in operations.
_RECORD, _RECORD_RECOMPUTED, _TOWER = 4.15e12, 6.2e12, 0.97e12
_FORWARD = _RECORD_RECOMPUTED - _RECORD  # recomputing the activations is one more pass forward
_CHECK_RECORD_SECONDS = 22.5  # of `orion fuse` at 1.6B on AVX512: 45 s for 2 records (docs/performance.md)
# A question to F16 (2.2) and one to Q8_0 (0.7) take more than two to Q4_K_M: 40 tokens read more weights at 29 GB/s.
_F16_MORE_SECONDS = 2.9
_CPU_OPERATIONS = (104e9, 185e9)  # per second on AVX512: the tower of llama.cpp, and the cores' matrix product
_CPU_TRAINING_SECONDS = 13.9  # per record of the 450M with its validation on AVX512 (docs/budgets.md)

# --- what comes from others -------------------------------------------------------------------------------------------

_PUBLISHED = "the published ORION training: 1,440 records in 2,492 s on an RTX 4070 Ti"
_PUBLISHED_RECORD_SECONDS, _PUBLISHED_GPU = 2492 / 1440, GPUS["rtx-4070-ti"]
_PI_FRAME = Figure(51, 82, "source", "the published ORION flight on a Raspberry Pi 5, per frame of 512 px")
_PI_MEMORY = Figure(1.753e9, 1.753e9, "source", "the published ORION flight, 1.6B")
_PI_FRAME_SIZE = 512
_OUR_PI_FRAME = (17.0, 34.0)  # docs/raspberry-pi.md, from two x86 cores, flash attention off
_GOLDEN = 8  # frames that the check asks about; the blank one takes no time

# --- what is assumed --------------------------------------------------------------------------------------------------

UTILISATION = 0.30  # of the GPU's limit, at best; the published training reached 4 % of its card's
NETWORK = 100e6 / 8  # bytes per second: 100 Mbit/s


def plan(settings: Settings, gpu: str, frames: int) -> Plan:
    """The steps for the preset, the GPU (a name of GPUS, or "none") and the number of labelled frames.

    Raises OrionError for a GPU that is not in the list, a base without measurements, and too few frames.
    """
    card = gpu_named(gpu)
    counts = split_of(frames)
    base = settings.base.model.partition("@")[0]
    if base == _TINY:
        steps = _tiny_steps(settings, counts)
    elif base in _MEASURED:
        if settings.base.frame_size != 512:
            raise OrionError(
                f"base.frame_size={settings.base.frame_size}: the plan has measurements of this base at 512 only.",
                "Plan with 512. A frame of 256 takes a third of the time on board (docs/performance.md).",
            )
        steps = _full_size_steps(settings, _MEASURED[base], card, counts)
    else:
        raise OrionError(
            f"there are no measurements for the base {settings.base.model}.",
            f"Choose a preset with one of {', '.join([*_MEASURED, _TINY])}.",
        )
    rehearsed = by_rehearsal(last_rehearsal(settings.preset), settings, counts)
    flown = on_board() if _MEASURED.get(base) is _OF_1600M else []
    return Plan(settings.preset, card, counts, steps, flown, claims(settings, counts["test"]), rehearsed)


def gpu_named(name: str) -> Gpu | None:
    """The GPU of that name, in any case and with blanks; None for "none"."""
    plain = name.strip().lower().replace(" ", "-")
    if plain != NO_GPU and plain not in GPUS:
        raise OrionError(f"there is no GPU {name!r} in the list.", f"Use one of {', '.join(GPUS)}; or {NO_GPU}.")
    return GPUS.get(plain)


def split_of(frames: int) -> dict[str, int]:
    """The frames of each split, by the shares of the geographic split; raises OrionError for fewer than 6."""
    parts = sum(SHARES.values())
    if frames < parts:
        raise OrionError(f"{frames} frames are too few for three splits.", f"Plan with {parts} or more.")
    val, test = (frames * SHARES[split] // parts for split in ("val", "test"))
    return {"train": frames - val - test, "val": val, "test": test}


def on_board() -> list[str]:
    """Frames per eclipse and energy per frame of the mission's base on a Raspberry Pi 5; how the power is known."""
    said = [
        f"{text}, {_PI_FRAME_SIZE} px, {low:g} to {high:g} s per frame: "
        + power.in_words(power.cost_of((low, high), power.PI_5), power.PI_5)
        for text, (low, high) in (
            ("published flight (source)", (_PI_FRAME.low, _PI_FRAME.high)),
            ("this project (estimate, docs/raspberry-pi.md)", _OUR_PI_FRAME),
        )
    ]
    return [*said, f"power (source): {power.PI_5.source}"]


def claims(settings: Settings, test: int) -> list[str]:
    """What the verdict can decide with so many test frames, if a third of them is of each category."""
    limits = settings.verdict
    each, valuable = test // 3, 2 * (test // 3)
    said = [
        f"{test} test frames, {each} of each category if they are balanced: the verdict asks for "
        f"{limits.smallest_frames_per_category} of each"
    ]
    if each < limits.smallest_frames_per_category:
        needed = limits.smallest_frames_per_category * 3 * sum(SHARES.values()) // SHARES["test"]
        said.append(f"too few for FLY: {needed} frames in all are needed")
    for lost in (0, 1):
        if valuable > lost:
            bound = wilson(lost, valuable)[1]
            shows = "enough" if bound <= limits.largest_irrecoverable_loss else "not enough"
            said.append(
                f"{valuable} test frames to be sent or stored, {lost} of them lost: the loss is at most "
                f"{100 * bound:.1f} % (95 %), {shows} for the limit of {100 * limits.largest_irrecoverable_loss:g} %"
            )
    return said


def by_rehearsal(figures: dict[str, Any] | None, settings: Settings, counts: dict[str, int]) -> list[str]:
    """The times of the last `orion rehearse` of this machine, which are better than any of the table's."""
    if figures is None:
        return []
    machine = figures["machine"]
    where = f"{machine['processor']}, {machine['cores']} cores, {machine['gpu'] or 'no GPU'}"
    stages = ", ".join(f"{stage['stage']} {in_words(stage['seconds'])}" for stage in figures["stages"])
    said = [f"{where} (measured): {stages}"]
    if per_record := figures["training_seconds_per_sample"]:
        records = 2 * counts["train"] * settings.fine_tune.epochs
        total = in_words(rounded(records * per_record))
        said.append(f"fine-tune {total} (estimate: {records:,} records at the measured {per_record:.2f} s)")
    return said


# --- the steps --------------------------------------------------------------------------------------------------------


def _scaled(figure: Figure, factor: float, how: str) -> Figure:
    """An estimate: the figure times `factor`."""
    return Figure(figure.low * factor, figure.high * factor, "estimate", how)


def _sum(parts: Sequence[Figure], how: str) -> Figure:
    return Figure(sum(part.low for part in parts), sum(part.high for part in parts), "estimate", how)


def _transfer(size: float, what: str) -> Figure:
    return Figure(size / NETWORK, size / NETWORK, "estimate", f"{what}, {size / GB:.2f} GB at 100 Mbit/s")


def _exactly(value: float, how: str) -> Figure:
    return Figure(value, value, "measured", how)


def _first_steps(preset: str, rehearsal: Step, frames: int) -> list[Step]:
    return [
        Step("label the frames", "laptop", "your own tool, see docs/dataset.md"),
        *_setting_up(preset),
        rehearsal,
        Step(
            "dataset",
            "GPU machine",
            f"orion dataset --preset {preset} --dataset FOLDER",
            Figure(
                frames * _FRAME_SECONDS,
                frames * _FRAME_SECONDS,
                "estimate",
                f"read, stored and checked: 48 s for 360 PNGs of 512 px (measured, {_BESIDE}); times the frames",
            ),
            disk=Figure(
                frames * _TINY_BYTES_PER_FRAME,
                frames * _LARGEST_BYTES_PER_FRAME,
                "estimate",
                f"{frames:,} frames as PNG: 0.46 MB (drawn tiles) to 0.7 MB (noise)",
            ),
        ),
    ]


def _setting_up(preset: str) -> list[Step]:
    return [
        Step("set up", "GPU machine", "make setup", SETUP, disk=SETUP_DISK),
        Step("check the machine", "GPU machine", f"orion doctor --preset {preset}", DOCTOR),
        Step("build llama.cpp", "GPU machine", "orion toolchain", BUILD, disk=BUILD_DISK),
    ]


def _last_steps(
    settings: Settings, pair_bytes: float, golden: Figure | None, check: Figure | None, is_mission: bool
) -> list[Step]:
    preset, chosen = settings.preset, settings.quantize
    run = f"runs/{preset}"
    copied = Figure(pair_bytes, pair_bytes, "measured", "Q4_K_M and mmproj")
    if (chosen.type, chosen.tower) != ("Q4_K_M", "F16"):
        how = f"as Q4_K_M with a tower in F16; {chosen.type} with one in {chosen.tower} is in docs/quantization.md"
        copied = replace(copied, known="estimate", how=how)
    return [
        Step("verdict", "GPU machine", f"orion verdict {run}", VERDICT),
        Step("bundle", "GPU machine", f"orion bundle {run} --out bundle", golden, disk=copied),
        Step(
            "copy", "laptop", "rsync -a --checksum bundle/ pi@raspberrypi:orion-bundle/",
            _transfer(pair_bytes, "the bundle"), disk=copied,
        ),
        Step("build llama-server", "Raspberry Pi", "step 2 of the bundle's README.txt"),
        Step(
            "check", "Raspberry Pi", "python3 check_flight.py --llama-server PATH", check,
            memory=_PI_MEMORY if is_mission else None,
        ),
        Step(
            "one frame", "Raspberry Pi", "sh serve.sh", _PI_FRAME if is_mission else None,
            memory=_PI_MEMORY if is_mission else None,
        ),
    ]  # fmt: skip


def _tiny_steps(settings: Settings, counts: dict[str, int]) -> list[Step]:
    """The steps of the shipped base, which needs no GPU: the shipped run's seconds, times the frames."""
    preset, frames = settings.preset, sum(counts.values())
    epochs = settings.fine_tune.epochs / 5

    def time(*stages: str, factor: float = frames / TINY_FRAMES) -> Figure:
        low, high = (sum(TINY_SECONDS[stage][end] for stage in stages) for end in (0, 1))
        how = f"{TINY_FRAMES} frames, docs/measurements.md, {AVX512}"
        if factor == 1:
            return Figure(low, high, "measured", how)
        return Figure(low * factor, high * factor, "estimate", f"{in_words(low)} with {how}; times {factor:.2f}")

    variants = ("evaluate fine-tuned", "evaluate quantized", "the other variants")
    memory = _exactly(2.1e9, f"docs/performance.md, {AVX512}")
    drawn = frames * _TINY_BYTES_PER_FRAME
    steps = [
        Step(
            "dataset", "GPU machine", f"orion dataset --preset {preset}", time("dataset"),
            disk=Figure(drawn, drawn, "estimate", f"{frames:,} drawn tiles; 360 take 167 MB"),
        ),
        Step("evaluate the base", "GPU machine", f"orion ablation --preset {preset}", time("evaluate base")),
        Step(
            "fine-tune", "GPU machine", f"orion fine-tune --preset {preset}",
            time("fine-tune", factor=frames / TINY_FRAMES * epochs), memory=memory,
        ),
        Step("fuse", "GPU machine", f"orion fuse --preset {preset}", time("fuse", factor=1)),
        Step("quantize", "GPU machine", f"orion quantize --preset {preset}", time("quantize", factor=1)),
        Step("evaluate", "GPU machine", f"orion run --preset {preset}", time(*variants)),
    ]  # fmt: skip
    every = [*_setting_up(preset), *steps, *_last_steps(settings, 8.2e6, None, None, False)]
    return _at_home(every)


def _full_size_steps(settings: Settings, base: _Measured, gpu: Gpu | None, counts: dict[str, int]) -> list[Step]:
    preset, frames = settings.preset, sum(counts.values())
    share = base.parameters / _OF_1600M.parameters
    needs = needs_of(settings, base.parameters)
    is_mission = base is _OF_1600M
    limit = _limit(needs.memory, is_mission)
    gpu_memory = _limit(needs.gpu_memory, is_mission and settings.fine_tune.base_weights == "nf4")
    too_small = _too_small(gpu, needs.gpu_memory)
    asking = _asking(base, gpu, counts["test"], share)
    rehearsal = Step(
        "rehearse", "GPU machine", f"orion rehearse --preset {preset}",
        _exactly(base.rehearsal_seconds, _BUDGETS), memory=_exactly(base.fuse_memory, _BUDGETS),
        disk=Figure(10 * base.parameters, 10 * base.parameters, "estimate", "what the command asks for, then deletes"),
    )  # fmt: skip
    checkpoints = 0.05 * base.merged_bytes * settings.fine_tune.epochs
    steps = [
        Step(
            "fetch the base", "GPU machine", "part of the next command", _transfer(base.merged_bytes, "the base"),
            disk=Figure(base.merged_bytes, base.merged_bytes, "source", "the published file on the Hub"),
        ),
        Step(
            "evaluate the base", "GPU machine", f"orion ablation --preset {preset}", asking,
            _answering_memory(base, gpu), limit,
        ),
        Step(
            "fine-tune", "GPU machine", f"orion fine-tune --preset {preset}",
            None if gpu is None else _training(settings, gpu, counts, share), gpu_memory, limit,
            Figure(0.02e9 * share, checkpoints, "estimate", "the adapter (rank 16), to what the command asks "
                   "for: 5 % of the base per epoch"),
            too_small or ("" if gpu else _training_on_cpu(settings, base, counts)),
        ),
        Step(
            "fuse", "GPU machine", f"orion fuse --preset {preset}", _fusing(settings, base, gpu, share),
            memory=_exactly(base.fuse_memory, _BUDGETS),
            disk=_exactly(base.merged_bytes, _BUDGETS),
        ),
        Step(
            "quantize", "GPU machine", f"orion quantize --preset {preset}",
            _exactly(base.quantize_seconds, f"{_BUDGETS}; few prompts to check"),
            memory=_exactly(base.quantize_memory, _BUDGETS), disk=base.gguf_bytes,
        ),
        Step(
            "evaluate", "GPU machine", f"orion run --preset {preset}",
            _evaluating(base, gpu, counts, asking, share), _answering_memory(base, gpu), limit,
            Figure(1.25e9 * share, 1.25e9 * share, "estimate", "Q8_0, only meanwhile: 1.17 x 10^9 weights of 8.5 bits"),
        ),
    ]  # fmt: skip
    golden = _scaled(
        _sum([base.image_seconds, base.question_seconds], ""),
        _GOLDEN,
        f"{_GOLDEN} golden frames: image and question, {_SPLIT_OF_A_QUESTION}",
    )
    check = (
        Figure(_GOLDEN * _OUR_PI_FRAME[0], _GOLDEN * _PI_FRAME.high, "estimate", f"{_GOLDEN} golden frames, each "
               f"{_OUR_PI_FRAME[0]:g} s (estimate, docs/raspberry-pi.md) to {_PI_FRAME.high:.0f} s (published flight)")
        if is_mission
        else None
    )  # fmt: skip
    every = [
        *_first_steps(preset, rehearsal, frames),
        *steps,
        *_last_steps(settings, base.pair_bytes, golden, check, is_mission),
    ]
    return every if gpu else _at_home(every)


def _at_home(steps: Sequence[Step]) -> list[Step]:
    return [replace(step, where="laptop") if step.where == "GPU machine" else step for step in steps]


def _limit(needed: int | None, is_missions: bool) -> Figure | None:
    """What `orion doctor` asks for: the mission document's limit, or for another base or weights scaled from it."""
    if needed is None:
        return None
    if is_missions:
        return Figure(needed, needed, "source", "the mission document's limit; not measured on a GPU")
    return Figure(
        needed, needed, "estimate", "the mission document's limit for 1.6B in 4 bits, by parameters and weights"
    )


def _too_small(gpu: Gpu | None, needed: int | None) -> str:
    if gpu is None or not needed or gpu.memory_bytes >= needed:
        return ""
    return f"needs {needed / GB:.1f} GB of GPU memory; {gpu.name} has {gpu.memory_bytes / GB:.1f}"


def _slower(gpu: Gpu) -> float:
    """How much slower than the card of the published training; never faster, since that one did not fill its card."""
    return max(1.0, _PUBLISHED_GPU.tera_operations / gpu.tera_operations)


def _training(settings: Settings, gpu: Gpu, counts: dict[str, int], share: float) -> Figure:
    epochs = settings.fine_tune.epochs
    records, validated = 2 * counts["train"] * epochs, 2 * counts["val"] * epochs
    fast = share * (records * _RECORD + validated * _FORWARD) / (UTILISATION * gpu.tera_operations * 1e12)
    passes = records + validated * _FORWARD / _RECORD_RECOMPUTED
    slow = share * passes * _PUBLISHED_RECORD_SECONDS * _slower(gpu)
    how = (
        f"{records:,} records and {validated:,} of validation. At best 4.15 x 10^12 operations a record (counted, "
        f"docs/performance.md) at {100 * UTILISATION:.0f} % (assumed) of {gpu.tera_operations:g} x 10^12 per second "
        f"({gpu.source}); at the slow end {_PUBLISHED_RECORD_SECONDS:.2f} s a record ({_PUBLISHED})"
    )
    if _slower(gpu) > 1:
        how += f", times {_slower(gpu):.2f} for this card"
    return Figure(fast, slow, "estimate", how + (f"; times {share:.2f} for the parameters" if share < 1 else ""))


def _training_on_cpu(settings: Settings, base: _Measured, counts: dict[str, int]) -> str:
    records = 2 * counts["train"] * settings.fine_tune.epochs
    seconds = records * _CPU_TRAINING_SECONDS * base.parameters / _OF_450M.parameters
    return (
        "refused without a GPU. 'orion remote train --server me@gpu' trains on a rented one. With "
        f"fine_tune.device=cpu about {in_words(rounded(seconds))} (estimate: {records:,} records at "
        f"{_CPU_TRAINING_SECONDS} s, measured for the 450M on {AVX512}, times the parameters)"
    )


def _operations(test: int, share: float) -> float:
    """Of the four conditions: every image once and the noise once, four texts a record."""
    return share * ((test + 1) * _TOWER + 4 * test * (_FORWARD - _TOWER))


def _asking(base: _Measured, gpu: Gpu | None, test: int, share: float) -> Figure:
    """One evaluation in transformers."""
    operations = _operations(test, share)
    what = f"{4 * test:,} questions, {operations / 1e12:,.0f} x 10^12 operations"
    if gpu is None:
        slow, fast = _CPU_OPERATIONS
        how = f"{what} at {slow / 1e9:.0f} to {fast / 1e9:.0f} x 10^9 per second ({AVX512})"
        return Figure(operations / fast, operations / slow, "estimate", how)
    fast_seconds = 2 * operations / (UTILISATION * gpu.tera_operations * 1e12)
    slow_seconds = 2 * operations / _RECORD_RECOMPUTED * _PUBLISHED_RECORD_SECONDS * _slower(gpu)
    how = f"{what}, doubled for the answers (assumed), at the two speeds of the training"
    return Figure(fast_seconds, slow_seconds, "estimate", how)


def _answering_memory(base: _Measured, gpu: Gpu | None) -> Figure | None:
    if gpu is None:
        return None
    return Figure(
        base.merged_bytes, max(8 * GB * base.parameters / _OF_1600M.parameters, base.merged_bytes), "estimate",
        "the weights in 16 bits, to the mission document's limit by parameters",
    )  # fmt: skip


def _fusing(settings: Settings, base: _Measured, gpu: Gpu | None, share: float) -> Figure:
    more = max(0, settings.fuse.check_records - 2)
    high = base.fuse_seconds + more * _CHECK_RECORD_SECONDS * share
    how = (
        f"{base.fuse_seconds:.0f} s with 2 check records (measured, {_BUDGETS}) and "
        f"{_CHECK_RECORD_SECONDS * share:.1f} s for each of {more} more on the CPU"
    )
    if gpu is None:
        return Figure(high, high, "estimate", how)
    low = max(0.0, base.fuse_seconds - 45 * share)
    return Figure(low, high, "estimate", f"{how}; at best without the check's passes, which the GPU makes")


def _evaluating(
    base: _Measured, gpu: Gpu | None, counts: dict[str, int], asking: Figure, share: float
) -> Figure:  # fmt: skip
    """What `orion run` evaluates after the base: three models in transformers, four through llama.cpp on the CPU."""
    test, frames = counts["test"], sum(counts.values())
    low = (test + 1) * base.image_seconds.low + 4 * test * base.question_seconds.low
    served = Figure(4 * low, 4 * low + 4 * test * _F16_MORE_SECONDS * share, "estimate", "")
    tower = frames * _TOWER * share
    if gpu is None:
        features = Figure(tower / _CPU_OPERATIONS[1], tower / _CPU_OPERATIONS[0], "estimate", "")
    else:
        pace = UTILISATION * gpu.tera_operations * 1e12
        slow = tower / _RECORD_RECOMPUTED * _PUBLISHED_RECORD_SECONDS * _slower(gpu)
        features = Figure(tower / pace, slow, "estimate", "")
    words = time_in_words(asking.low, asking.high, exact=False)
    how = (
        f"three evaluations in transformers like that of the base, {words} "
        f"each; four through llama.cpp on 2 CPU cores, {in_words(rounded(served.low / 4))} or more each: "
        f"{test + 1:,} images at {base.image_seconds.low:.1f} s and {4 * test:,} questions at "
        f"{base.question_seconds.low:.1f} s, more for F16 and Q8_0 "
        f"({base.image_seconds.known}: {base.image_seconds.how}); the tower once for {frames:,} frames"
    )
    return _sum([_scaled(asking, 3, ""), served, features], how)


# --- in words ---------------------------------------------------------------------------------------------------------

MARKS: dict[Known, str] = {"measured": "m", "source": "s", "estimate": "e"}
COLUMNS = ("step", "where", "command", "time", "GPU memory", "memory", "disk")


def rows(made: Plan) -> list[tuple[str, ...]]:
    """The table, a row for each step; every number bears its mark, and "-" is not known or not needed."""
    return [
        (
            step.name, step.where, step.command, "impossible" if step.impossible else _cell(step.time, time_in_words),
            *(_cell(figure, _bytes_in_words) for figure in (step.gpu_memory, step.memory, step.disk)),
        )
        for step in made.steps
    ]  # fmt: skip


def reasons(made: Plan) -> list[str]:
    """How each number is known, one line for each reason, and what is impossible."""
    said: dict[str, list[str]] = {}
    for step in made.steps:
        if step.impossible:
            said[f"impossible: {step.impossible}"] = [step.name]
        for name, figure in (
            ("time", step.time), ("GPU memory", step.gpu_memory), ("memory", step.memory), ("disk", step.disk),
        ):  # fmt: skip
            if figure:
                said.setdefault(f"{figure.known}: {figure.how}", []).append(f"{step.name} ({name})")
    return [f"{', '.join(steps)}: {reason}" for reason, steps in said.items()]


def time_in_words(low: float, high: float, *, exact: bool) -> str:
    """A range of seconds, "3 to 6 min"; an estimate has two digits."""
    first, last = (in_words(seconds if exact else rounded(seconds)) for seconds in (low, high))
    if first == last:
        return last
    same_unit = len(last.split()) == 2 and first.split()[1:] == last.split()[1:]
    return f"{first.split()[0] if same_unit else first} to {last}"


def rounded(seconds: float) -> float:
    """To two significant digits, from 90 minutes to ten minutes, and from ten hours to hours."""
    if seconds >= 5400:
        step = 3600 if seconds >= 36_000 else 600
        return round(seconds / step) * step
    return round(seconds, 1 - math.floor(math.log10(seconds))) if seconds > 0 else 0.0


def _bytes_in_words(low: float, high: float, *, exact: bool) -> str:
    texts = [f"{size / GB:.1f}" if size >= 0.1 * GB else f"{size / GB:.2f}" for size in (low, high)]
    return f"{texts[0] if texts[0] == texts[1] else ' to '.join(texts)} GB"


def _cell(figure: Figure | None, in_words_of: Callable[..., str]) -> str:
    if figure is None:
        return "-"
    words = in_words_of(figure.low, figure.high, exact=figure.known == "measured")
    return f"{words} ({MARKS[figure.known]})"
