"""benchmarks/frame_steps.py: its table, its cascade row and its charts, from figures that are known."""

import importlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))  # it imports its neighbours, as a script does
    return importlib.import_module("frame_steps")


def figures(seconds: float) -> dict[str, Any]:
    parts = {"encode_seconds": seconds / 2, "prefill_seconds": seconds / 4, "decode_seconds": seconds / 4}
    return {"seconds": seconds, **parts, "tokens_read": 78, "peak_memory_bytes": 90_000_000}


def known(lost: int) -> dict[str, Any]:
    return {
        "frames": 60,
        "right": {"A": 57, "B": 56},
        "loss": {"count": lost, "total": 40, "rate": lost / 40, "high": lost / 40 + 0.09},
        "change": {"gained": 1, "lost": 2, "exact_p": 1.0},
    }


def test_each_row_is_compared_with_the_first_and_a_cascade_spares_full_looks(steps: Any) -> None:
    rows = [
        {"step": steps.PUBLISHED, "way": [512, steps.FIRST, True], **figures(24.0), "encode_seconds": None},
        {"step": steps.TODAY, "way": [512, steps.FIRST, True], **figures(12.0)},
        {"step": "+ 256 px", "way": [256, steps.AFTER, False], **figures(2.0)},
    ]
    rows = steps.with_cascade(rows, 0.75)
    assert rows[-1]["seconds"] == 2.0 + 0.25 * 12.0
    published, today, smallest, cascade = steps.table(rows, {(256, steps.AFTER, False): known(1)}).splitlines()[2:]
    assert published.startswith("| published recipe | 24.00 | 1.0 |  | 6.00 | 6.00 | 78 | 90 | 88 |")
    assert today.startswith("| today's default | 12.00 | 2.0 | 6.00 |")
    assert (
        smallest == "| + 256 px | 2.00 | 12.0 | 1.00 | 0.50 | 0.50 | 78 | 90 | 1,050 | 57/60 | 56/60 | 1/40, 12 % | 1 |"
    )
    assert cascade.startswith("| cascade | 5.00 | 4.8 |")


def test_charts_are_drawn_of_what_was_measured_and_evaluated(steps: Any, tmp_path: Path) -> None:
    ways = {(size, order, False): figures(size / 100) for size in (256, 512) for order in (steps.FIRST, steps.AFTER)}
    evaluated = {way: known(0) for way in list(ways)[:3]}
    looks = set()
    for beside in ({}, {way: figures(1.0) for way in ways}):
        steps.charts(ways, beside, evaluated, tmp_path / "charts.png")
        with Image.open(tmp_path / "charts.png") as picture:
            assert picture.size == (1210, 550)
            assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 100
            looks.add(picture.tobytes())
    assert len(looks) == 2, "the points of another preset are drawn"


def test_the_front_is_of_what_nothing_beats(steps: Any) -> None:
    points = [(4.0, 0.1), (2.0, 0.3), (3.0, 0.3), (5.0, 0.1), (9.0, 0.0), (8.0, 0.2)]
    assert steps.front_of(points) == [(2.0, 0.3), (4.0, 0.1), (9.0, 0.0)]
