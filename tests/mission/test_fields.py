"""Further fields of the answer: yes/no, choice, whole number and short text, declared in the mission's file."""

import csv
import dataclasses
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orion_triage.dataset.build import records_of
from orion_triage.dataset.catalogue import COLUMNS, load_catalogue
from orion_triage.dataset.check.facts import Entry
from orion_triage.dataset.check.reasons import text_findings
from orion_triage.dataset.records import IMAGES_FOLDER, Record, parse_record, write_split
from orion_triage.dataset.share import catalogue_files, croissant
from orion_triage.dataset.sources.contents import read_contents
from orion_triage.dataset.sources.source import Shot
from orion_triage.errors import OrionError, RecordError
from orion_triage.evaluate.metrics import Prediction, summarize
from orion_triage.evaluate.results import as_flown
from orion_triage.evaluate.run import prediction_of
from orion_triage.evaluate.variants import Decoding, chosen, named
from orion_triage.export import quantize
from orion_triage.flight import bundle
from orion_triage.flight.decide_frame import fits
from orion_triage.imagery.frames import Frame
from orion_triage.llama_cpp.server import Server
from orion_triage.llama_cpp.toolchain import find_toolchain
from orion_triage.mission.answer import Answer
from orion_triage.mission.contract import differences, mission_of, write_mission
from orion_triage.mission.decide import Rules
from orion_triage.mission.fields import gbnf, value_fault, value_of
from orion_triage.mission.load import checked, load_mission
from orion_triage.mission.mission import FieldOfAnswer, Mission, default_mission
from orion_triage.mission.preview import preview
from orion_triage.mission.prompt import Coordinates, parse_prompt, render_prompt, user_text
from orion_triage.mission.scoring import label_tree
from orion_triage.mission.verdict import (
    Verdict,
    answer_schema,
    answer_start,
    answer_text,
    answer_tokens,
    category_alone,
    category_grammar,
    grammar,
    parse_verdict,
    tokens_of_fields,
)
from orion_triage.models.family import turn_of
from orion_triage.models.load import TINY_BASE_FOLDER
from orion_triage.pipeline import evaluation, run_stage, stage_named
from orion_triage.report import write as report
from orion_triage.runs.run import Run, prepare
from orion_triage.settings import load_settings
from tests.conftest import orion, places_of, structured_picture
from tests.mission.conftest import assert_named

EXAMPLE = Path(__file__).parents[2] / "src/orion_triage/mission/example.toml"
PLACE = Coordinates(-120.62, 34.0)
SMOKE = {"name": "smoke", "kind": "yes/no", "definition": "Whether a plume is visible."}
SURFACE = {"name": "surface", "kind": "choice", "choices": ["water", "ice"], "definition": "Most of the ground."}
SHIPS = {"name": "ship_count", "kind": "whole number", "from": 0, "to": 12, "definition": "How many ships."}
NOTE = {"name": "note", "kind": "short text", "longest": 20, "definition": "What else matters."}
VALUES = (("smoke", "yes"), ("surface", "ice"), ("ship_count", 7), ("note", "a hull"))


def mission(*fields: dict[str, Any], **changes: Any) -> Mission:
    return Mission.model_validate(
        {
            "name": "fields",
            "prompt": "See{coordinates}: {categories}" + ("\n{fields}" if fields else ""),
            "coordinates": " {longitude} {latitude}",
            "categories": [
                {"name": "SHIP", "definition": "A hull.", "action": "send", "value": 1, "prior": 1},
                {"name": "SEA", "definition": "Water.", "action": "drop"},
            ],
            "fields": fields,
            **changes,
        }
    )


def four(**changes: Any) -> Mission:
    return mission(SMOKE, SURFACE, SHIPS, NOTE, **changes)


def one(**keys: Any) -> FieldOfAnswer:
    return FieldOfAnswer.model_validate({"name": "one", "definition": "-", **keys})


def number(low: int, high: int) -> FieldOfAnswer:
    return one(**{"kind": "whole number", "from": low, "to": high})


# What follows from the file


def test_prompt_answer_and_grammar_follow_from_the_fields() -> None:
    own = four()
    assert render_prompt(own, None) == (
        "See: - SHIP: A hull.\n- SEA: Water.\n"
        "- smoke: yes or no. Whether a plume is visible.\n"
        "- surface: water or ice. Most of the ground.\n"
        "- ship_count: a whole number from 0 to 12. How many ships.\n"
        "- note: a text of at most 20 characters. What else matters."
    )
    assert parse_prompt(own, render_prompt(own, PLACE)) == PLACE
    answer = answer_text(own, Verdict("A ship.", "SHIP", VALUES))
    assert answer == (
        '{"reason": "A ship.", "smoke": "yes", "surface": "ice", "ship_count": 7, "note": "a hull", "category": "SHIP"}'
    )
    assert parse_verdict(own, answer) == Verdict("A ship.", "SHIP", VALUES)
    assert grammar(own) == (
        'root ::= "{\\"reason\\": \\"" reason "\\", \\"smoke\\": \\"" field-smoke "\\", \\"surface\\": \\"" '
        'field-surface "\\", \\"ship_count\\": " field-ship-count ", \\"note\\": \\"" field-note "\\", \\"category\\": '
        '\\"" category "\\"}"\n'
        "reason ::= [ !#-\\[\\]-~]{1,160}\n"
        'field-smoke ::= "yes" | "no"\n'
        'field-surface ::= "water" | "ice"\n'
        "field-ship-count ::= [0-9] | [1] ([0-2])\n"
        "field-note ::= [ !#-\\[\\]-~]{1,20}\n"
        'category ::= "SHIP" | "SEA"\n'
    )
    assert category_grammar(own) == 'root ::= category "\\"}"\ncategory ::= "SHIP" | "SEA"\n'


def test_a_number_at_the_end_and_after_the_category() -> None:
    own = mission(SHIPS, keys=["category", "ship_count", "reason"])
    assert category_grammar(own).startswith(
        'root ::= category "\\", \\"ship_count\\": " field-ship-count ", \\"reason\\": \\"" reason "\\"}"\n'
    )
    last = mission(SHIPS, keys=["reason", "category", "ship_count"])
    assert category_grammar(last).startswith('root ::= category "\\", \\"ship_count\\": " field-ship-count "}"\n')
    answer = answer_text(last, Verdict("x", "SEA", (("ship_count", 12),)))
    assert answer == '{"reason": "x", "category": "SEA", "ship_count": 12}'
    assert parse_verdict(last, answer) == Verdict("x", "SEA", (("ship_count", 12),))


def as_python(rule: str) -> re.Pattern[str]:
    """A GBNF rule of literals, character classes, groups and counts as a regular expression."""
    return re.compile(re.sub(r'"([^"]*)"', lambda match: re.escape(match[1]), rule.replace(" ", "")))


@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 0), (0, 9), (0, 12), (3, 7), (7, 103), (99, 101), (100, 999), (-5, 5), (-120, -7), (-1, 0), (-1200, 1150),
     (0, 1000), (1, 1), (190, 210), (-10, 999)],
)  # fmt: skip
def test_the_grammar_of_a_number_has_exactly_its_values(low: int, high: int) -> None:
    rule = as_python(gbnf(number(low, high)))
    found = [value for value in range(-1300, 1300) if rule.fullmatch(str(value))]
    assert found == list(range(low, high + 1))
    assert not any(rule.fullmatch(text) for text in ("-0", "00", "01", "007", "+1", "", "1.0", "-01"))


@pytest.mark.parametrize(
    "wrong",
    [
        '"smoke": "maybe"', '"smoke": true', '"smoke": "YES"', '"surface": "land"', '"ship_count": 13',
        '"ship_count": -1', '"ship_count": "7"', '"ship_count": 7.0', '"ship_count": true', '"note": "%s"' % ("x" * 21),
        '"note": null', '"smoke": ["yes"]',
    ],
)  # fmt: skip
def test_a_value_that_is_not_allowed_is_no_verdict(wrong: str) -> None:
    own = four()
    key = wrong.partition(":")[0]
    right = answer_text(own, Verdict("A ship.", "SHIP", VALUES))
    answer = re.sub(rf'{key}: ("[^"]*"|\d+)', lambda _: wrong, right)
    assert answer != right
    assert parse_verdict(own, answer) is None
    with pytest.raises(RecordError, match=rf"{json.loads(key)} is .*, not "):
        parse_record(_line(own, answer), own)


def test_missing_and_further_keys_are_no_verdict() -> None:
    own = four()
    answer = answer_text(own, Verdict("A ship.", "SHIP", VALUES))
    assert parse_verdict(own, answer.replace('"smoke": "yes", ', "")) is None
    assert parse_verdict(own, answer.replace("}", ', "more": 1}')) is None
    assert parse_verdict(default_mission(), answer) is None


def _line(own: Mission, answer: str) -> str:
    line = json.loads(Record("a.png", PLACE, Verdict("A ship.", "SHIP", VALUES), own).to_line())
    line["conversations"][1]["content"] = answer
    return json.dumps(line)


def test_records_come_back_with_their_values_in_any_order_of_keys() -> None:
    for keys in ([], ["note", "category", "surface", "reason", "ship_count", "smoke"]):
        own = four(keys=keys)
        record = Record("a.png", PLACE, Verdict('A "ship".', "SHIP", VALUES), own)
        assert parse_record(record.to_line(), own) == record
    with pytest.raises(RecordError, match=r"the note 'a<\|im_end\|>' contains the model's control token"):
        verdict = Verdict("x", "SHIP", (*VALUES[:3], ("note", "a<|im_end|>")))
        parse_record(Record("a.png", None, verdict, own).to_line(), own)


def test_the_longest_answer_fits_the_tokens() -> None:
    own = four()
    longest = Verdict(
        "x" * 160, "SHIP", (("smoke", "yes"), ("surface", "water"), ("ship_count", 12), ("note", "x" * 20))
    )
    assert answer_tokens(own) == len(answer_text(own, longest)) + 4
    assert tokens_of_fields(own) >= len(answer_text(own, longest)) - len(
        answer_text(mission(), Verdict("x" * 160, "SHIP"))
    )
    assert tokens_of_fields(default_mission()) == 0


def test_the_schema_describes_the_answer() -> None:
    found = answer_schema(four())
    assert (
        found["required"] == ["reason", "smoke", "surface", "ship_count", "note", "category"] == [*found["properties"]]
    )
    assert found["additionalProperties"] is False
    assert found["properties"]["ship_count"] | {"description": ""} == {
        "type": "integer", "minimum": 0, "maximum": 12, "description": "",
    }  # fmt: skip
    assert found["properties"]["smoke"]["enum"] == ["yes", "no"]
    assert preview(four(), lambda text: list(text.encode()))["json_schema"] == found


def test_scores_are_read_after_the_fields() -> None:
    (node,) = label_tree(mission(SHIPS, SMOKE), lambda text: [ord(letter) for letter in text])
    assert (node.text, node.tokens) == ("S", (ord("H"), ord("E")))


def test_the_category_alone_is_refused_where_a_field_must_have_a_value() -> None:
    texts = mission(NOTE)
    assert answer_start(texts) == '{"reason": "", "note": "", "category": "'
    assert parse_verdict(texts, category_alone(texts, "SEA")) == Verdict("", "SEA", (("note", ""),))
    for refused in (answer_start, lambda own: category_alone(own, "SEA")):
        with pytest.raises(OrionError, match=r"verdict-only.*smoke, surface and ship_count"):
            refused(four())
    settings = load_settings("tiny", [])
    assert "verdict-only" in [variant.name for variant in chosen(settings, ["all"])]
    own = settings.model_copy(update={"mission": four()})
    assert "verdict-only" not in [variant.name for variant in chosen(own, ["all"])]
    with pytest.raises(OrionError, match="cannot be asked for the category alone"):
        chosen(own, ["quantized", "verdict-only"])


def test_a_mission_with_fields_comes_back_and_has_another_contract(tmp_path: Path) -> None:
    own = four()
    assert Mission.model_validate(own.model_dump()) == own
    assert Mission.model_validate(own.model_dump(mode="json")) == own
    assert own.model_dump()["fields"][2] == SHIPS
    write_mission(tmp_path, own)
    assert mission_of(tmp_path) == own
    assert [part.partition(":")[0] for part in differences(own, mission())] == [
        "prompt", "prompt with coordinates", "answer",
    ]  # fmt: skip
    other = four(keys=["reason", "category", "smoke", "surface", "ship_count", "note"])
    assert [part.partition(":")[0] for part in differences(own, other)] == ["answer"]


def test_the_published_mission_has_no_fields() -> None:
    own = default_mission()
    assert own.model_dump()["fields"] == ()
    assert "fields" not in Answer('{"reason": "x", "category": "LOW"}').to_json(own)


def test_the_flight_client_takes_the_same_values() -> None:
    """decide_frame.py needs only Python, so it has the rule of `value_fault` once more."""
    candidates = ["yes", "no", "Yes", "", "ice", "x" * 20, "x" * 21, 0, 7, 12, 13, -1, 7.0, True, None, ["yes"], {}]
    for field in four().fields:
        dumped = field.model_dump(mode="json")
        found = [fits(dumped, value) for value in candidates]
        assert found == [not value_fault(field, value) for value in candidates], field.name
        assert any(found)
        assert not all(found)


# Tables


@pytest.mark.parametrize(
    ("field", "cell", "value"),
    [
        (one(kind="yes/no"), "Yes", "yes"),
        (one(kind="choice", choices=["open water", "ice"]), "OPEN WATER", "open water"),
        (number(-5, 5), "-3", -3),
        (number(-5, 5), "+3", 3),
        (one(kind="short text", longest=5), "hulls", "hulls"),
    ],
)
def test_cells_are_read(field: FieldOfAnswer, cell: str, value: str | int) -> None:
    assert value_of(field, cell) == value


@pytest.mark.parametrize(
    ("field", "cell", "said"),
    [
        (one(kind="yes/no"), "true", "one is 'true', not yes or no"),
        (one(kind="yes/no"), "", "one is empty: write yes or no"),
        (one(kind="choice", choices=["a", "b", "c"]), "d", "one is 'd', not a, b or c"),
        (number(0, 9), "10", "one is 10, not a whole number from 0 to 9"),
        (number(0, 9), "3.0", "one is '3.0', not a whole number from 0 to 9"),
        (number(0, 9), "9" * 5000, "not a whole number from 0 to 9"),
        (one(kind="short text", longest=5), "hulls!", "one is 'hulls!', not a text of at most 5 characters"),
    ],
)
def test_wrong_cells_say_what_is_allowed(field: FieldOfAnswer, cell: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        value_of(field, cell)


TABLE = "file_name,category,reason,smoke,surface,ship_count,note\n"


def folder_of(path: Path, table: str) -> Path:
    """A folder with a table and the pictures a.png to d.png, which are not looked at."""
    path.mkdir(exist_ok=True)
    for name in "abcd":
        (path / f"{name}.png").write_bytes(b"")
    (path / "labels.csv").write_text(table, encoding="utf-8")
    return path


def test_a_table_has_a_column_for_each_field(tmp_path: Path) -> None:
    rows = "a.png,ship,A hull.,YES,ice,7,a\u00a0hull\nb.png,sea,Water.,no,Water,0,nothing\n"
    contents = read_contents(folder_of(tmp_path, TABLE.replace("ship_count", "Ship count") + rows), four())
    assert contents.errors == []
    assert contents.targets[0].fields == VALUES
    assert contents.targets[1].fields == (("smoke", "no"), ("surface", "water"), ("ship_count", 0), ("note", "nothing"))
    assert contents.tables[0].columns.unused == []
    (record,) = records_of(Shot(contents.targets[0]), "test", four())
    assert parse_record(record.to_line(), four()) == record


def test_wrong_cells_and_missing_columns_are_named_with_line_and_fix(tmp_path: Path) -> None:
    rows = "a.png,ship,A hull.,perhaps,ice,7,x\nb.png,sea,Water.,no,water,,\nc.png,sea,Water.,no,ice,3,x<|im_end|>\n"
    found = read_contents(folder_of(tmp_path, TABLE + rows), four()).errors
    assert [(error.place, error.message) for error in found] == [
        ("labels.csv line 2", "smoke is 'perhaps', not yes or no."),
        ("labels.csv line 3", "ship_count is empty: write a whole number from 0 to 12."),
        ("labels.csv line 3", "note is empty: write a text of at most 20 characters."),
        ("labels.csv line 4", "the note contains the model's control token '<|im_end|>'."),
    ]
    assert "smoke: yes or no; surface: water or ice" in found[0].fix
    less = "file_name,category,reason,surface,ship_count,note\na.png,ship,A hull.,ice,7,x\n"
    (error,) = read_contents(folder_of(tmp_path, less), four()).errors
    assert error.message.startswith("has no column smoke, a field of the mission (found: file_name, category")
    assert error.fix == "Add the column smoke."


def test_a_fields_column_is_not_taken_for_another_one(tmp_path: Path) -> None:
    own = mission({**NOTE, "name": "description"})
    table = "file_name,category,description\na.png,ship,two masts\n"
    contents = read_contents(folder_of(tmp_path, table), own)
    (target,) = contents.targets
    assert (target.fields, target.reason) == ((("description", "two masts"),), own.of("SHIP").reason)


def test_texts_that_the_grammar_cannot_give_are_findings() -> None:
    own = mission(NOTE)
    texts = ("a hull", "", 'a "hull"', "a hüll", "a hull")
    records = [Record("a.png", PLACE, Verdict("x", "SHIP", (("note", text),)), own) for text in texts]
    found = list(text_findings([Entry("train", line, record) for line, record in enumerate(records)], own))
    assert [(one.severity, one.check, one.message) for one in found] == [
        ("error", "field-empty", "note is empty."),
        (
            "warning",
            "field-characters",
            "note 'a \"hull\"' has characters that the flight grammar does not allow: '\"'.",
        ),
        (
            "warning",
            "field-characters",
            "note 'a hüll' has characters that the flight grammar does not allow: '\\xfc'.",
        ),
    ]
    assert list(text_findings([], own)) == []


def test_folders_without_a_table_are_refused(tmp_path: Path) -> None:
    for name in ("ship", "sea"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(b"")
    assert read_contents(tmp_path, mission()).errors == []
    (error,) = read_contents(tmp_path, mission(SMOKE, NOTE)).errors
    assert "the mission asks for smoke and note too: a table is needed" in error.message
    assert error.fix == "Write a table labels.csv with the columns file_name, category, smoke, note."


def test_a_catalogue_has_the_columns_of_the_fields(tmp_path: Path) -> None:
    path = tmp_path / "places.csv"
    path.write_text("name,category,morphology,lon,lat,reason\na,SHIP,town,1,2,A hull.\n", encoding="utf-8")
    with pytest.raises(OrionError, match="has no column smoke, ship_count"):
        load_catalogue(path, mission(SMOKE, SHIPS))
    text = "name,category,morphology,lon,lat,reason,smoke,ship_count\na,SHIP,town,1,2,A hull.,no,{}\n"
    path.write_text(text.format(3), encoding="utf-8")
    (target,) = load_catalogue(path, mission(SMOKE, SHIPS))
    assert target.fields == (("smoke", "no"), ("ship_count", 3))
    path.write_text(text.format(30), encoding="utf-8")
    with pytest.raises(OrionError, match="line 2: ship_count is 30, not a whole number from 0 to 12"):
        load_catalogue(path, mission(SMOKE, SHIPS))


def test_a_shared_catalogue_and_table_have_the_fields(tmp_path: Path) -> None:
    own = four()
    record = Record("images/a.png", PLACE, Verdict("A hull.", "SHIP", VALUES), own)
    origin = {"name": "a", "morphology": "town", "source": "", "metres_per_pixel": "", "captured_at": "", "licence": ""}
    frames = [{"record": record, "split": "train", **origin}]
    files = catalogue_files(frames)
    path = tmp_path / "catalogue.csv"
    path.write_bytes(bytes(files["catalogue.csv"]))
    assert [target.fields for target in load_catalogue(path, own)] == [VALUES]
    shared = croissant(files, frames, {"repository": "a/b", "catalogue_only": True, "licence": "other"})
    columns = {column["name"]: column["dataType"] for column in shared["recordSet"][0]["field"]}
    assert (columns["smoke"], columns["ship_count"]) == ("sc:Text", "sc:Integer")


# Metrics


def prediction(said: dict[str, Any] | None, true: dict[str, Any], own: Mission, name: str = "a") -> Prediction:
    fields = tuple(said.items()) if said else ()
    text = answer_text(own, Verdict("x", "SHIP", fields)) if said else "no"
    row = {"condition": "B", "name": name, "truth": "SHIP", "donor": None, "true_fields": true}
    return prediction_of(row | Answer(text).to_json(own), own)


def test_metrics_of_the_fields() -> None:
    own = mission(SMOKE, SHIPS, NOTE)
    true = {"smoke": "yes", "ship_count": 4, "note": "a"}
    said: list[dict[str, Any] | None] = [
        true,
        {"smoke": "no", "ship_count": 5, "note": "b"},
        {"smoke": "yes", "ship_count": 9, "note": "a"},
        None,
    ]
    found = summarize([prediction(values, true, own, str(n)) for n, values in enumerate(said)], own)["B"]["fields"]
    assert (found["smoke"]["right"], found["smoke"]["count"], found["smoke"]["accuracy"]) == (2, 4, 0.5)
    assert (round(found["smoke"]["low"], 4), round(found["smoke"]["high"], 4)) == (0.15, 0.85)  # Wilson, by hand
    assert found["smoke"]["confusion"] == {
        "yes": {"yes": 2, "no": 1, "unparsable": 1},
        "no": {"yes": 0, "no": 0, "unparsable": 0},
    }
    assert found["ship_count"]["right"] == 1
    assert found["ship_count"]["within_one"]["right"] == 2
    assert found["ship_count"]["mean_absolute_error"] == 2  # of 0, 1 and 5; the one without a verdict has none
    assert set(found["note"]) == {"right", "count", "accuracy", "low", "high", "unparsable"}
    assert found["note"]["unparsable"] == 1
    assert "fields" not in summarize([Prediction("B", "a", "SHIP", "SHIP")], mission())["B"]


def test_a_blank_frame_in_flight_has_no_values() -> None:
    own = mission(SMOKE)
    both = [prediction({"smoke": "yes"}, {"smoke": "yes"}, own, name) for name in "ab"]
    flown = as_flown(both, ["a"], Rules(), own)
    assert [(one.predicted, one.fields) for one in flown] == [("SEA", ()), ("SHIP", (("smoke", "yes"),))]


@pytest.mark.parametrize(
    "change", [{"fields": {"smoke": "maybe"}}, {"true_fields": {}}, {"true_fields": {"smoke": 1}}, {"fields": {"x": 1}}]
)
def test_stored_values_that_are_not_allowed_are_damage(change: dict[str, Any]) -> None:
    own = mission(SMOKE)
    row = {"condition": "B", "name": "a", "truth": "SHIP", "donor": None, "true_fields": {"smoke": "yes"}}
    row |= Answer(answer_text(own, Verdict("x", "SHIP", (("smoke", "no"),)))).to_json(own)
    assert prediction_of(row, own).fields == (("smoke", "no"),)
    with pytest.raises(ValueError, match=r"smoke|true_fields"):
        prediction_of(row | change, own)


# Mistakes


def written(*tables: dict[str, Any], **changes: Any) -> str:
    """The example's mission with these fields, as a file."""
    text = EXAMPLE.read_text(encoding="utf-8").replace("{categories}\n", "{categories}\n{fields}\n")
    head = "".join(f"{key} = {json.dumps(value)}\n" for key, value in changes.items())
    rows = ["\n".join(f"{key} = {json.dumps(value)}" for key, value in table.items()) for table in tables]
    return head + text + "".join(f"\n[[fields]]\n{row}\n" for row in rows)


MISTAKES = [
    ([SMOKE, SMOKE], {}, "name = ", "the field smoke is there twice; rename one"),
    ([SMOKE | {"name": "reason"}], {}, "name = ", "the name reason has another meaning"),
    ([SMOKE | {"name": "file_name"}], {}, "name = ", "the name file_name has another meaning"),
    ([SMOKE | {"name": "Smoke"}], {}, "name = ", "fields.1.name should have a-z, 0-9 and _"),
    ([SMOKE | {"kind": "boolean"}], {}, "kind = ", "fields.1.kind should be 'yes/no', 'choice'"),
    ([SMOKE | {"choices": ["a", "b"]}], {}, "choices = ", "choices is not for the field smoke, a yes/no; remove it"),
    ([SMOKE | {"longest": 5}], {}, "longest = ", "longest is not for the field smoke"),
    ([SMOKE | {"definition": "a\nb"}], {}, "definition = ", "the definition of smoke is not one line"),
    ([SMOKE | {"definition": "See {fields}"}], {}, "definition = ", "contains the placeholder {fields}; remove it"),
    ([SMOKE | {"definition": "a <image>"}], {}, "definition = ", "contains the control token <image>; remove it"),
    ([SMOKE | {"definiton": "a"}], {}, "definiton = ", "there is no key definiton; did you mean definition?"),
    ([SURFACE | {"choices": []}], {}, "choices = ", "surface has 0 choices; write 2 to 16"),
    ([SURFACE | {"choices": ["a"]}], {}, "choices = ", "surface has 1 choices; write 2 to 16"),
    ([SURFACE | {"choices": ["a", "A"]}], {}, "choices = ", "the choice 'A' of surface is there twice"),
    ([SURFACE | {"choices": ["a", ""]}], {}, "choices = ", "the choice '' of surface is empty"),
    ([SURFACE | {"choices": ["a", " b"]}], {}, "choices = ", "the choice ' b' of surface is empty, longer"),
    ([SURFACE | {"choices": ["a", 'b"']}], {}, "choices = ", "of surface has a quote"),
    ([SURFACE | {"choices": ["a", "b\n"]}], {}, "choices = ", "of surface is empty, longer"),
    ([SURFACE | {"choices": ["a", "b\x07c"]}], {}, "choices = ", "of surface has a quote"),
    ([SURFACE | {"choices": ["a", "<|b|>"]}], {}, "choices = ", "contains the control token <|b|>"),
    ([SURFACE | {"choices": "water"}], {}, "choices = ", "fields.1.choices should be a valid tuple"),
    ([SHIPS | {"from": 20}], {}, "to = ", "ship_count goes from 20 to 12; write the smaller number as from"),
    ([SHIPS | {"from": 0.5}], {}, "from = ", "fields.1.from should be a valid integer"),
    ([SHIPS | {"to": 10_000_000}], {}, "to = ", "fields.1.to should be less than or equal to 1000000"),
    ([{key: SHIPS[key] for key in SHIPS if key != "to"}], {}, "[[fields]]", "to of ship_count is missing: a whole"),
    ([{key: NOTE[key] for key in NOTE if key != "longest"}], {}, "[[fields]]", "longest of note is missing: a short"),
    ([NOTE | {"longest": 0}], {}, "longest = ", "fields.1.longest should be greater than or equal to 1"),
    ([], {}, "prompt = ", "prompt has {fields}, but there are no [[fields]]; remove it"),
    ([SMOKE], {"keys": ["reason", "category"]}, "keys = ", "keys leaves out smoke; list every key of the answer"),
    ([SMOKE], {"keys": ["reason", "smok", "category"]}, "keys = ", "keys has 'smok', which is no key of"),
    ([SMOKE], {"keys": ["reason", "smoke", "category", "smoke"]}, "keys = ", "keys has smoke twice"),
    ([SMOKE | {"name": f"f{n}"} for n in range(9)], {}, 'name = "f8"', "there are 9 fields; write at most 8"),
]  # fmt: skip


@pytest.mark.parametrize(("tables", "changes", "line", "said"), MISTAKES, ids=[said for *_, said in MISTAKES])
def test_a_mistake_is_named_with_its_line(
    tables: list[dict[str, Any]], changes: dict[str, Any], line: str, said: str, tmp_path: Path
) -> None:
    message = assert_named(said, line, written(*tables, **changes), tmp_path)
    expected = 2 if "smok'" in said else 1
    assert len(message) == 1 + expected, message


def test_the_prompt_needs_the_placeholder_once() -> None:
    for prompt, times in (("{coordinates}{categories}", 0), ("{coordinates}{categories}{fields}{fields}", 2)):
        _, faults = checked({**four().model_dump(), "prompt": prompt})
        assert faults == [
            (("prompt",), f"prompt has {{fields}} {times} times; write it once, because there are [[fields]]")
        ]


def test_the_commented_example_is_right(tmp_path: Path) -> None:
    """example.toml shows one field of each kind behind '#'."""
    head, _, shown = EXAMPLE.read_text(encoding="utf-8").partition("# [[fields]]")
    shown = re.sub(r"(?m)^# ?", "", "# [[fields]]" + shown)
    path = tmp_path / "mission.toml"
    path.write_text(head.replace("{categories}\n", "{categories}\n{fields}\n") + shown, encoding="utf-8")
    assert [one.kind for one in load_mission(path).fields] == ["yes/no", "choice", "whole number", "short text"]


# A run

# Of the morphologies of the drawn tiles: built, ground, crossings.
LABELS: dict[str, tuple[str | int, ...]] = {
    "ocean_water": ("no", "sea", 0), "urban_grid": ("yes", "town", 3), "mega_airport": ("yes", "works", 1),
}  # fmt: skip
# The rule holds in all answers but those that are surer than any model here.
BUILT = {
    "name": "built", "kind": "yes/no", "definition": "Whether people have built here.",
    "when": "yes", "then": "HIGH", "probability": 0.001,
}  # fmt: skip
GROUND = {
    "name": "ground", "kind": "choice", "choices": ["sea", "town", "works"], "definition": "What covers most of it.",
}  # fmt: skip
CROSSINGS = {"name": "crossings", "kind": "whole number", "from": 0, "to": 9, "definition": "How many streets cross."}


def mission_of_places(**changes: Any) -> Mission:
    """The published mission with three further fields, for drawn tiles of LABELS."""
    published = default_mission()
    own = {
        "name": "built", "keys": ["reason", "built", "ground", "crossings", "category"],
        "prompt": published.prompt + "\n{fields}", "fields": [BUILT, GROUND, CROSSINGS],
    }  # fmt: skip
    return Mission.model_validate(published.model_dump() | own | changes)


def assert_fields_are_measured(run: Path) -> dict[str, Any]:
    """Compare the metrics of the fields in results.json with the stored answers; returns the results."""
    results: dict[str, Any] = json.loads((run / "results.json").read_text(encoding="utf-8"))
    lines = (run / "evaluation" / "test" / "constrained" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["condition"] == "B"]
    assert {tuple(row["true_fields"].values()) for row in rows} == set(LABELS.values())
    assert all(row["fields"] for row in rows), "the grammar gives every field a value"
    assert {tuple(row["field_scores"]) for row in rows} == {("built", "ground")}, "in every answer"
    assert all(row["field_scores"]["built"]["yes"] >= BUILT["probability"] for row in rows)
    flown = results["models"]["flight"]["B"]["confusion"]
    assert sum(answers["HIGH"] for answers in flown.values()) == len(rows) - len(results["blank_frames"])
    found = results["models"]["constrained"]["B"]["fields"]
    assert [*found] == ["built", "ground", "crossings"]
    for name, rates in found.items():
        pairs = [(row["true_fields"][name], row["fields"][name]) for row in rows]
        assert (rates["right"], rates["count"]) == (sum(a == b for a, b in pairs), len(rows))
        assert rates["low"] <= rates["accuracy"] <= rates["high"]
    off = [abs(row["true_fields"]["crossings"] - row["fields"]["crossings"]) for row in rows]
    assert found["crossings"]["mean_absolute_error"] == sum(off) / len(off)
    assert sum(sum(row.values()) for row in found["ground"]["confusion"].values()) == len(rows)
    assert results["models"]["flight"]["B"]["fields"]["built"]["unparsable"] == len(results["blank_frames"])
    for name in ("report.md", "report.html"):
        assert "Further fields" in (run / name).read_text(encoding="utf-8"), name
    return results


@pytest.fixture(scope="module")
def run_with_fields(small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs/small of a mission with three fields; one epoch of random weights, all by the command line."""
    folder = tmp_path_factory.mktemp("fields")
    with (folder / "places.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow([*COLUMNS, "built", "ground", "crossings"])
        for one in places_of(*LABELS, count=4):
            assert one.coordinates is not None
            where = (one.coordinates.lon, one.coordinates.lat)
            table.writerow([one.name, one.category, one.morphology, *where, one.reason, *LABELS[one.morphology]])
    own = mission_of_places(places="places.csv")
    (folder / "mission.json").write_text(own.model_dump_json(), encoding="utf-8")
    sets = [f"base.model={small_base}", "dataset.split_distance_km=20", "fine_tune.epochs=1", "variants.all=false"]
    sets += ["fuse.check_records=6"]
    words = [word for value in sets for word in ("--set", value)]
    for command in (
        ("run", "--mission", "mission.json", "--run", "runs/small", *words),
        ("evaluate", "--run", "runs/small", "--variants", "constrained", *words),
        ("report", "--run", "runs/small"),
    ):
        made = orion(*command, cwd=folder)
        assert made.returncode == 0, made.stderr
    return folder


@pytest.mark.slow
@pytest.mark.llama_cpp
def test_a_run_learns_and_measures_the_fields(run_with_fields: Path, tmp_path: Path) -> None:
    run = run_with_fields / "runs" / "small"
    assert_fields_are_measured(run)
    split = (run / "dataset" / "test_dataset.jsonl").read_text(encoding="utf-8")
    assert '\\"ground\\": \\"town\\", \\"crossings\\": 3, \\"category\\"' in split
    structured_picture(1234).save(tmp_path / "a.png")
    told = orion("triage", tmp_path / "a.png", "--run", run, "--json", cwd=tmp_path)
    assert told.returncode == 0, told.stderr
    (outcome,) = json.loads(told.stdout)
    assert [*outcome["fields"]] == ["built", "ground", "crossings"]
    assert (outcome["category"], outcome["decided_by"]) == ("HIGH", "built is yes")


@pytest.mark.slow
@pytest.mark.llama_cpp
def test_verdict_only_is_refused_by_name(run_with_fields: Path) -> None:
    asked = orion("evaluate", "--run", "runs/small", "--variants", "verdict-only", cwd=run_with_fields)
    assert asked.returncode == 1
    assert "cannot be asked for the category alone (verdict-only)" in asked.stderr
    assert "Traceback" not in asked.stderr


def bundle_of(folder: Path, pair: Path) -> Path:
    """A run and its bundle of a mission with fields: the pair as it is, under the grammar, on three frames.

    The pair was not trained for the mission: only the grammar makes its answers verdicts, so the free decoding that a
    bundle is made from is under the grammar here, too.
    """
    own = mission_of_places()
    settings = load_settings("tiny", ["evaluate.threads=1"]).model_copy(update={"mission": own})
    run = Run(folder / "run", settings)
    prepare(run)
    (run.dataset / IMAGES_FOLDER).mkdir(parents=True)
    number = 0
    for split, count in (("train", 3), ("val", 3), ("test", 3)):
        records = []
        for index in range(count):
            name, category = f"{IMAGES_FOLDER}/place_{number}.png", own.names[index % 3]
            structured_picture(number).save(run.dataset / name, compress_level=1)
            values = tuple(zip(("built", "ground", "crossings"), [*LABELS.values()][2 - index % 3], strict=True))
            where = Coordinates(round(-170 + 14.17 * number, 2), round(-55 + 4.5 * number, 2))
            records.append(Record(name, where, Verdict("What is seen.", category, values), own))
            number += 1
        write_split(run.dataset, split, records)  # type: ignore[arg-type]
    shutil.copytree(TINY_BASE_FOLDER, run.merged)
    for product in (run.dataset, run.merged):
        write_mission(product, own)

    def take(run: Run, progress: object) -> dict[str, Any]:
        shutil.copytree(pair, run.gguf, ignore=shutil.ignore_patterns("manifest.json"))
        return {}

    run_stage(dataclasses.replace(stage_named("quantize", settings), run=take), run)
    under_grammar = dataclasses.replace(named(settings, "quantized"), decoding=Decoding(constrained=True))
    for variant in (under_grammar, named(settings, "constrained")):
        run_stage(evaluation(variant, own), run)
    report.run(run)
    bundle.run(run, folder / "bundle", accepted_risk="a test of fields")
    return folder


@pytest.mark.slow
@pytest.mark.llama_cpp
def test_ground_and_bundle_give_a_frame_the_same_fields(tiny_pair: Path, tmp_path: Path) -> None:
    check_bundle(bundle_of(tmp_path, tiny_pair))


def check_bundle(folder: Path) -> None:
    results = assert_fields_are_measured(folder / "run")
    assert results["settings"]["mission"]["fields"] == [BUILT, GROUND, CROSSINGS]
    files = [folder / "bundle" / name for name in (quantize.QUANTIZED, quantize.MMPROJ)]
    frame = structured_picture(1234)
    (folder / "a.raw").write_bytes(frame.tobytes())
    (folder / "white.raw").write_bytes(bytes([250]) * (512 * 512 * 3))
    told = orion("triage", "a.raw", "white.raw", "--bundle", "bundle", "--json", cwd=folder)
    assert told.returncode == 0, told.stderr
    ground, blank = json.loads(told.stdout)
    assert ground["fields"] == {name: json.loads(ground["answer"])[name] for name in ("built", "ground", "crossings")}
    assert (ground["fields"]["built"] in ("yes", "no"), type(ground["fields"]["crossings"])) == (True, int)
    assert blank["fields"] is None
    every = mission(SMOKE, SURFACE, NOTE, SHIPS | {"from": -120, "to": 1150})
    with Server(find_toolchain(), *files, log=folder / "log", turn=turn_of(files[0]), threads=1) as server:
        url, key = server.client.base_url, str(server.client._http.headers["Authorization"]).removeprefix("Bearer ")
        start = ground["answer"].partition('"built": "')[0] + '"built": "'
        asked = server.client.completion(
            user_text(mission_of_places(), None), Frame(frame, frame.size).png(), 1, start=start, n_probs=100
        )
        begun = len(server.client.tokenize(start))
        yes, no = (server.client.tokenize(start + word)[begun] for word in ("yes", "no"))
        said = server.client.completion("<image>", Frame(frame, frame.size).png(), 300, grammar=grammar(every))
        flown = subprocess.run(
            [sys.executable, "-I", "-S", folder / "bundle" / "ask_frame.py", "a.raw", "white.raw", "--url", url],
            capture_output=True, text=True, cwd=folder, check=False, env={"LLAMA_API_KEY": key},
        )  # fmt: skip
        checked = subprocess.run(
            [sys.executable, "-I", "-S", folder / "bundle" / "check_flight.py", "--url", url],
            capture_output=True, text=True, check=False, env={"LLAMA_API_KEY": key},
        )  # fmt: skip
        (folder / "in").mkdir()
        for name in ("a.raw", "white.raw"):
            shutil.copyfile(folder / name, folder / "in" / name)
        on_board = subprocess.run(
            [sys.executable, "-I", folder / "bundle" / "triage_on_board.py", folder / "in", "--once", "--url", url],
            capture_output=True, text=True, check=False, env={"LLAMA_API_KEY": key},
        )  # fmt: skip
    assert (checked.returncode, checked.stdout.splitlines()[-1]) == (0, "GO"), checked.stdout
    assert (on_board.returncode, on_board.stderr.splitlines()[-1]) == (0, f"1 HIGH, 1 {blank['category']}")
    assert parse_verdict(every, said["content"]), "llama.cpp reads the grammar of every kind"
    assert (flown.returncode, flown.stderr) == (0, "")
    lines = [json.loads(line) for line in flown.stdout.splitlines()]
    of_folder = [json.loads(line) for line in (folder / "in" / "triage.jsonl").read_text().splitlines()]
    for flown_line, line in zip(lines, of_folder, strict=True):
        assert {key: line[key] for key in flown_line if key not in ("scores", "label_mass", "field_scores")} == {
            key: value for key, value in flown_line.items() if key not in ("scores", "label_mass", "field_scores")
        }
    assert [line["fields"] for line in lines] == [ground["fields"], None]
    assert lines[0]["answer"] == ground["answer"]
    assert {ground["decided_by"], lines[0]["decided_by"]} == {"built is yes"}
    assert {ground["category"], lines[0]["category"]} == {"HIGH"}
    for name, scores in ground["field_scores"].items():
        assert lines[0]["field_scores"][name] == pytest.approx(scores, abs=0.01), name
    odds = {one["id"]: math.exp(one["logprob"]) for one in asked["completion_probabilities"][0]["top_logprobs"]}
    least = min(odds.values())  # of a word that the untrained pair would not write
    by_request = odds.get(yes, least) / (odds.get(yes, least) + odds.get(no, least))
    assert ground["field_scores"]["built"]["yes"] == pytest.approx(by_request, abs=0.05), (
        "what a request of its own gives"
    )
