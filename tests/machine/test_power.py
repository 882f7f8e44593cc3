"""power.py: energy and frames of an eclipse, from seconds per frame and a board's watts."""

import pytest

from orion_triage.machine import power
from orion_triage.machine.plan import plan
from orion_triage.report.render import on_board
from orion_triage.settings import load_settings


def test_energy_is_power_times_seconds_at_both_ends() -> None:
    board = power.Board("b", ("b",), idle_watts=(1, 2), busy_watts=(5, 10), source="")
    cost = power.cost_of((10, 40), board)
    assert cost["joules"] == (50, 400)
    assert cost["frames_per_watt_hour"] == (9, 72)
    assert cost["frames_per_eclipse"] == (52.5, 210)
    assert set(power.cost_of((10, 40), None)) == {"frames_per_eclipse"}


@pytest.mark.parametrize("model", ["Raspberry Pi 5 Model B Rev 1.0", "Raspberry Pi Compute Module 5 Rev 1.0"])
def test_a_board_is_known_by_the_name_it_gives_itself(model: str) -> None:
    assert power.board_of(model) is power.PI_5
    text = on_board({"seconds_per_frame": 20.0, "processor": model})
    assert text == (
        "100 frames in an eclipse of 35 minutes; 170 to 230 J per frame, 16 to 21 frames per watt-hour "
        "(Raspberry Pi 5, all cores busy: 8.5 to 11.5 W)"
    )


def test_of_another_processor_no_energy_is_said() -> None:
    assert power.board_of("AMD EPYC") is power.board_of("Raspberry Pi 4 Model B Rev 1.4") is None
    assert on_board({"seconds_per_frame": 20.0, "processor": "AMD EPYC"}) == "100 frames in an eclipse of 35 minutes"


def test_the_plan_gives_the_published_flight_and_its_source() -> None:
    published, ours, source = plan(load_settings("lfm2.5-vl-1.6b"), "none", 360).on_board
    assert "51 to 82 s per frame: 26 to 41 frames in an eclipse" in published
    assert "17 to 34 s per frame: 62 to 120 frames" in ours
    assert "sbc-reviews" in source
    assert plan(load_settings("tiny"), "none", 360).on_board == []
