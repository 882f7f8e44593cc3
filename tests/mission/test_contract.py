"""triage.py and records.py: the bytes that datasets and flight software share."""

import json
from pathlib import Path

import pytest

from orion_triage.dataset.records import parse_record, read_records, read_split, split_path, write_split
from orion_triage.errors import OrionError, RecordError
from orion_triage.mission.prompt import Coordinates, format_degrees, parse_prompt, render_prompt
from orion_triage.mission.verdict import Verdict, parse_verdict
from orion_triage.settings import SPLITS
from tests.conftest import MISSION, SHARED

PUBLISHED = SHARED / "orion-dataset"

# One record of the published layout, written out.
LINE = (
    '{"image": "orion_dataset/images/high_x.png", "conversations": [{"role": "user", "content": "<image>\\nYou are an '
    "autonomous orbital triage assistant. Analyze this high-resolution RGB satellite image captured at Longitude: "
    "-120.62, Latitude: 34.0.\\nStrictly use one of these categories based on visual morphology:\\n- HIGH: Extreme-scale "
    "strategic anomalies, dense geometric cargo/vessel infrastructure, massive cooling towers, sprawling runways, or "
    "distinct geological/artificial chokepoints.\\n- MEDIUM: Standard human civilization. Ordinary urban grids, "
    "low-density suburban sprawl, regular checkerboard agriculture, or localized infrastructure (malls, regional "
    "strips).\\n- LOW: Complete absence of human infrastructure. Featureless deep oceans, unbroken canopy, barren "
    "deserts, or purely natural geological formations (craters, natural cliffs).\\nYou MUST output your response as a "
    'valid JSON object. To ensure accurate visual reasoning, you must output the \\"reason\\" key FIRST, followed by the '
    '\\"category\\" key."}, {"role": "assistant", "content": "{\\"reason\\": \\"Pads.\\", \\"category\\": \\"HIGH\\"}"}]}'
)


@pytest.mark.parametrize(
    ("value", "text"),
    [(33, "33.0"), (-6.5, "-6.5"), (-120.6249, "-120.62"), (-0.001, "0.0"), (12.345678, "12.35")],
)
def test_coordinates_are_the_shortest_form_of_two_decimals(value: float, text: str) -> None:
    assert format_degrees(value) == text


def test_a_record_has_exactly_the_published_bytes() -> None:
    record = parse_record(LINE, MISSION)
    assert record.coordinates == Coordinates(-120.62, 34.0)
    assert record.verdict == Verdict("Pads.", "HIGH")
    assert record.name == "high_x"
    assert record.to_line() == LINE
    assert "satellite image.\nStrictly" in record.without_coordinates().prompt


@pytest.mark.shared
def test_the_published_splits_come_back_byte_for_byte() -> None:
    counts = []
    for split in SPLITS:
        path = split_path(PUBLISHED, split)
        records = read_records(path, MISSION)
        assert "".join(record.to_line() + "\n" for record in records).encode() == path.read_bytes()
        counts.append(len(records))
    assert counts == [480, 60, 60]


def test_prompts_parse_back_and_others_are_refused() -> None:
    for coordinates in (None, Coordinates(1.5, -2.25)):
        assert parse_prompt(MISSION, render_prompt(MISSION, coordinates)) == coordinates
    with pytest.raises(OrionError, match="not in the prompt's two-decimal form"):
        parse_prompt(MISSION, render_prompt(MISSION, Coordinates(1.5, -2.25)).replace("1.5", "1.50"))
    with pytest.raises(OrionError, match="the prompt is not that of the mission orion"):
        parse_prompt(MISSION, render_prompt(MISSION, None).replace("image.\n", "image captured\n"))


@pytest.mark.parametrize(
    ("answer", "category"),
    [
        ('{"reason": "a", "category": "LOW"}', "LOW"),
        ('```json\n{"reason": "a", "category": "HIGH"}\n```', "HIGH"),
        ('{"category": "MEDIUM", "reason": "a"}', "MEDIUM"),
        ('{"reason": "a", "category": "low"}', None),
        ('{"reason": "a", "category": "LOW"', None),
        ('{"reason": "a"}', None),
        ('{"reason": 3, "category": "LOW"}', None),
        ("LOW", None),
        ("", None),
        ("[" * 5000, None),
    ],
)
def test_only_a_whole_verdict_counts(answer: str, category: str | None) -> None:
    verdict = parse_verdict(MISSION, answer)
    assert (verdict.category if verdict else None) == category


def _changed(**changes: object) -> str:
    return json.dumps({**json.loads(LINE), **changes})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[]", "not an object"),
        (_changed(image="../secret.png"), "is outside the dataset folder"),
        (_changed(image="/etc/passwd"), "is outside the dataset folder"),
        (_changed(conversations=[]), "not one user turn"),
        (LINE.replace('\\"HIGH\\"', '\\"URGENT\\"'), "category 'URGENT' is not HIGH, MEDIUM or LOW"),
        (LINE.replace('\\"Pads.\\", ', '\\"Pads.\\",'), "exact form"),
    ],
)
def test_a_bad_line_is_named_with_its_number(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "train_dataset.jsonl"
    path.write_text(f"{LINE}\n{line}\n", encoding="utf-8")
    with pytest.raises(RecordError, match=message) as caught:
        read_records(path, MISSION)
    assert f"{path}:2:" in str(caught.value)


def test_splits_round_trip_and_a_missing_one_is_named(tmp_path: Path) -> None:
    record = parse_record(LINE, MISSION)
    write_split(tmp_path, "val", [record, record.without_coordinates()])
    assert read_split(tmp_path, "val", MISSION) == [record, record.without_coordinates()]
    with pytest.raises(RecordError, match=r"test_dataset\.jsonl does not exist"):
        read_split(tmp_path, "test", MISSION)
