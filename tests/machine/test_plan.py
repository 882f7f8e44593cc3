"""plan.py and 'orion plan': each number is where it is said to come from, and no estimate is called a measurement."""

import json
import math
import re
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from orion_triage.cli import app
from orion_triage.errors import OrionError
from orion_triage.flight.golden_frames import CLEAR, HARD
from orion_triage.machine import plan as planning
from orion_triage.machine.plan import GPUS, Figure, Plan, Step, by_rehearsal, plan, rows, time_in_words
from orion_triage.settings import load_settings

ROOT = Path(__file__).parents[2]
FULL, SMALLER = "lfm2.5-vl-1.6b", "lfm2.5-vl-450m"
PRESETS = (FULL, SMALLER, "tiny")


def plan_of(preset: str = FULL, gpu: str = "rtx-4090", frames: int = 400, *assignments: str) -> Plan:
    return plan(load_settings(preset, assignments), gpu, frames)


def step_of(made: Plan, name: str) -> Step:
    return next(step for step in made.steps if step.name == name)


def figures_of(made: Plan) -> dict[tuple[str, str], Figure]:
    return {
        (step.name, name): figure
        for step in made.steps
        for name, figure in vars(step).items()
        if isinstance(figure, Figure)
    }


def page(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text()


def cells(name: str, first: str) -> list[str]:
    """The cells of the row that begins with `first`, in the first table of the page that has one."""
    row = re.search(rf"^\| {re.escape(first)} \|(.*)\|$", page(name), re.MULTILINE)
    assert row, f"{name}.md has no row {first}"
    return [cell.strip().strip("*") for cell in row[1].split("|")]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("gpu", ["none", "t4", "rtx-4090"])
def test_every_number_says_how_it_is_known(preset: str, gpu: str) -> None:
    made = plan_of(preset, gpu)
    for figure in figures_of(made).values():
        assert figure.known in ("measured", "source", "estimate")
        assert figure.how
        assert 0 < figure.low <= figure.high
    for cell in chain(*(row[3:] for row in rows(made))):
        assert cell in ("-", "impossible") or re.search(r" \([mse]\)$", cell), cell


@pytest.mark.parametrize("preset", PRESETS)
def test_what_depends_on_frames_or_gpu_is_never_called_measured(preset: str) -> None:
    """A measurement was made once, on one machine: it cannot follow the user's own case."""
    one, other = figures_of(plan_of(preset)), figures_of(plan_of(preset, "t4", 1000, "fine_tune.epochs=7"))
    assert one.keys() == other.keys()
    changed = {key for key in one if (one[key].low, one[key].high) != (other[key].low, other[key].high)}
    assert ("fine-tune", "time") in changed
    assert {one[key].known for key in changed} == {"estimate"}


def test_the_missions_limits_are_its_own_for_its_own_base_only() -> None:
    limits = {"memory", "gpu_memory"}

    def known(preset: str, *assignments: str) -> set[str]:
        training = step_of(plan_of(preset, "rtx-4090", 400, *assignments), "fine-tune")
        return {figure.known for name, figure in vars(training).items() if name in limits and figure}

    assert known(FULL) == {"source"}
    assert known(SMALLER) == {"estimate"}
    assert known(FULL, "fine_tune.base_weights=16-bit") == {"source", "estimate"}


def test_a_measurement_of_the_shipped_run_is_one_for_that_run_only() -> None:
    def known(*case: Any) -> str:
        time = step_of(plan_of("tiny", "none", *case), "fine-tune").time
        assert time
        return time.known

    assert known(360) == "measured"
    assert known(361) == "estimate"
    assert known(360, "fine_tune.epochs=6") == "estimate"


def test_measurements_are_those_of_the_pages() -> None:
    made = figures_of(plan_of())
    fuse, quantize = cells("budgets", "fuse"), cells("budgets", "all of quantize, with its checks")
    assert f"{fuse[0]} s with 2 check records" in made["fuse", "time"].how
    assert made["fuse", "memory"].low == float(fuse[1]) * 1e9
    assert made["quantize", "time"].low == float(quantize[0])
    assert made["quantize", "memory"].low == float(quantize[1]) * 1e9
    assert made["rehearse", "time"].low == float(cells("budgets", "everything, including parity and random weights")[0])
    smaller = figures_of(plan_of(SMALLER))
    assert smaller["quantize", "time"].low == 29
    assert smaller["rehearse", "time"].low == 90
    assert "| all of quantize | 29 | 1.74 GB |" in page("budgets")
    assert "| everything | 90 | |" in page("budgets")
    assert f"{planning._CPU_TRAINING_SECONDS} s per\nsample" in page("budgets")
    for words in (
        "The image takes 11 s of a question. A question about a known image takes 2.5 s",
        "45 s are six forward",
    ):
        assert words in page("performance")
    record = cells(
        "performance",
        "a record by itself, activations recomputed (gradient checkpointing): the forward half again, not counted",
    )
    assert float(record[0]) * 1e12 == pytest.approx(planning._RECORD_RECOMPUTED)
    assert float(cells("performance", "nothing recomputed")[0]) * 1e12 == pytest.approx(planning._RECORD)
    measured = json.loads((ROOT / "benchmarks" / "results" / "speed_fuse_lfm2.5-vl-1.6b.json").read_text())
    sizes = measured["checks"]["bytes"]
    assert made["quantize", "disk"].low == pytest.approx(sum(sizes.values()), rel=1e-3)
    pair = sizes["orion-q4_k_m.gguf"] + sizes["orion-mmproj-f16.gguf"]
    assert made["bundle", "disk"].low == pytest.approx(pair, rel=1e-3)
    assert planning._GOLDEN == CLEAR + HARD
    flight = "The published flight took 51 to 82 s per frame and 1,753 MB"
    assert flight in page("raspberry-pi")
    assert "17 to 34 s at 512x512" in page("raspberry-pi")


def test_the_seconds_of_the_shipped_run_are_those_of_the_measurements() -> None:
    names = {
        "dataset": "dataset", "evaluate base": "evaluating the base", "fine-tune": "fine-tuning", "fuse": "fusing",
        "quantize": "quantizing", "evaluate fine-tuned": "evaluating the fine-tuned model",
        "evaluate quantized": "evaluating the quantized model", "the other variants": "the other variants",
    }  # fmt: skip
    assert planning.TINY_SECONDS.keys() == names.keys()
    for stage, (low, high) in planning.TINY_SECONDS.items():
        assert cells("measurements", names[stage])[0] == (f"{low:.0f}" if low == high else f"{low:.0f} to {high:.0f}")
    low, high = (sum(seconds[end] for seconds in planning.TINY_SECONDS.values()) for end in (0, 1))
    assert cells("measurements", "all") == [f"{low:.0f} to {high:.0f}", f"{planning.TINY_SECONDS_AVX2:.0f}"]
    assert cells("training", "with AVX-512") == [time_in_words(low, high, exact=True).replace("min", "minutes")]
    assert cells("training", "with AVX2 only") == [f"{planning.TINY_SECONDS_AVX2 / 60:.0f} minutes"]


def test_a_training_by_hand() -> None:
    """400 frames are 268, 66 and 66; 3 epochs of 2 x 268 records, and as often 2 x 66 of validation."""
    time = step_of(plan_of(), "fine-tune").time
    assert time
    assert time.low == pytest.approx((1608 * 4.15e12 + 396 * 2.05e12) / (0.30 * 165.2e12))
    assert time.high == pytest.approx((1608 + 396 * 2.05 / 6.2) * 2492 / 1440)
    slower = step_of(plan_of(gpu="t4"), "fine-tune").time
    assert slower
    assert slower.high == pytest.approx(time.high * 80.2 / 65)
    assert slower.low == pytest.approx(time.low * 165.2 / 65)
    published = step_of(plan_of(gpu="rtx-4070-ti", frames=360), "fine-tune").time
    assert published
    assert published.high > 2492  # 1,440 records as published, and their validation
    assert "an RTX 4070 Ti" in published.how
    assert "NVIDIA Ada GPU Architecture" in published.how


def test_evaluations_through_llama_cpp_by_hand() -> None:
    evaluating = step_of(plan_of(), "evaluate").time
    asking = step_of(plan_of(), "evaluate the base").time
    assert evaluating
    assert asking
    served = 4 * (67 * 11 + 264 * 2.5)
    assert evaluating.low == pytest.approx(served + 3 * asking.low + 400 * 0.97e12 / (0.30 * 165.2e12))


def test_an_unknown_gpu_is_refused_with_the_list() -> None:
    with pytest.raises(OrionError) as refused:
        plan_of(gpu="rtx-9999")
    assert "'rtx-9999'" in refused.value.message
    assert all(name in refused.value.fix for name in [*GPUS, "none"])
    assert plan_of(gpu=" RTX 4090 ").gpu == GPUS["rtx-4090"]


def test_without_a_gpu_the_training_of_a_large_base_is_impossible() -> None:
    made = plan_of(gpu="none")
    assert [step.name for step in made.steps if step.impossible] == ["fine-tune"]
    training = step_of(made, "fine-tune")
    assert training.time is None
    assert "orion remote train" in training.impossible
    assert "about 22 h (estimate: 1,608 records at 13.9 s" in training.impossible  # times 3.54
    assert "GPU machine" not in {step.where for step in made.steps}
    assert not [step.name for step in plan_of("tiny", "none").steps if step.impossible]


def test_a_gpu_that_is_too_small_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    # No card of the list is too small for the mission's base; another setting needs more, as 'orion doctor' counts.
    small = planning.Gpu("small", 6 * 2**30, 50.0, "nobody")
    monkeypatch.setitem(GPUS, "small", small)
    assert step_of(plan_of(gpu="small"), "fine-tune").impossible == "needs 8.0 GB of GPU memory; small has 6.4"


def test_bases_and_sizes_without_measurements_are_refused() -> None:
    with pytest.raises(OrionError, match="no measurements for the base OWNER/NAME"):
        plan_of(FULL, "t4", 400, "base.model=OWNER/NAME")
    with pytest.raises(OrionError, match="at 512 only"):
        plan_of(FULL, "t4", 400, "base.frame_size=256")
    with pytest.raises(OrionError, match="5 frames are too few"):
        plan_of(frames=5)


def test_more_frames_take_longer_and_show_more() -> None:
    small, large = plan_of(frames=120), plan_of(frames=2400)
    assert all(after > before for before, after in zip(small.seconds, large.seconds, strict=True))
    assert small.claims[1] == "too few for FLY: 360 frames in all are needed"
    assert "44 test frames to be sent or stored, 0 of them lost: the loss is at most 8.0 %" in plan_of().claims[1]
    squared = 1.959964**2  # of Wilson's interval without a success: z^2 / (n + z^2)
    assert f"at most {100 * squared / (266 + squared):.1f} %" in large.claims[1]


def test_a_rehearsal_of_this_machine_is_added() -> None:
    settings, counts = load_settings(FULL), {"train": 268, "val": 66, "test": 66}
    assert by_rehearsal(None, settings, counts) == []
    figures: dict[str, Any] = {
        "machine": {"processor": "AMD EPYC", "cores": 2, "gpu": "NVIDIA L4"},
        "stages": [{"stage": "fuse", "seconds": 107.0}, {"stage": "answer", "seconds": 18.0}],
        "training_seconds_per_sample": None,
    }
    by_fuse = "AMD EPYC, 2 cores, NVIDIA L4 (measured): fuse 2 min, answer 18 s"
    assert by_rehearsal(figures, settings, counts) == [by_fuse]
    figures["training_seconds_per_sample"] = 0.5
    training = "fine-tune 13 min (estimate: 1,608 records at the measured 0.50 s)"
    assert by_rehearsal(figures, settings, counts) == [by_fuse, training]


def test_the_table_and_the_json_are_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ORION_CACHE", str(tmp_path))
    words = ["plan", "--preset", FULL, "--gpu", "rtx-4090", "--frames", "400"]
    shown, value = (CliRunner().invoke(app, [*words, *more]) for more in ([], ["--json"]))
    assert (shown.exit_code, value.exit_code) == (0, 0)
    made = json.loads(value.stdout)
    assert made["frames"] == {"train": 268, "val": 66, "test": 66}
    assert [step["name"] for step in made["steps"]] == [row[0] for row in rows(plan_of())]
    assert math.isclose(made["seconds"]["low"], plan_of().seconds[0])
    for row in rows(plan_of()):
        assert re.search(
            rf"│ {re.escape(row[0])} +│ {re.escape(row[1])} +│ {re.escape(row[2])} +│ {re.escape(row[3])} +│",
            shown.stdout,
        )
    assert "fine-tune (time): estimate: 1,608 records" in shown.stdout
    refused = CliRunner().invoke(app, ["plan", "--gpu", "gtx"])
    assert isinstance(refused.exception, OrionError)


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (60, 60, "60 s"),
        (14, 178, "14 s to 3 min"),
        (202, 360, "3 to 6 min"),
        (32_580, 51_000, "9 h 3 min to 14 h 10 min"),
        (5400, 7300, "1 h 30 min to 2 h 2 min"),
    ],
)
def test_ranges_are_in_words(low: float, high: float, words: str) -> None:
    assert time_in_words(low, high, exact=True) == words


def test_an_estimate_has_two_digits() -> None:
    assert time_in_words(151.4, 3009, exact=False) == "2 to 50 min"
    assert time_in_words(5601, 35_000, exact=False) == "1 h 30 min to 9 h 40 min"
    assert time_in_words(40_000, 79_158, exact=False) == "11 to 22 h"


def test_the_tables_of_the_page_are_those_of_the_program() -> None:
    from docs import plan_table

    text = page("from-laptop-to-pi")
    for words, end, table in ((" frames", "frames", plan_table.frames()), ("", "steps", plan_table.steps())):
        between = re.search(
            rf"<!-- python docs/plan_table.py{words} -->\n\n(.*?)\n<!-- end of {end} -->", text, re.DOTALL
        )
        assert between, end
        assert between[1] == table, f"python docs/plan_table.py{words}"
