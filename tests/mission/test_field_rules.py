"""Rules on fields: a frame whose yes/no or choice has a value with enough probability gets the rule's category."""

from pathlib import Path
from typing import Any

import pytest

from orion_triage.errors import OrionError
from orion_triage.evaluate.metrics import Prediction
from orion_triage.evaluate.results import as_flown
from orion_triage.evaluate.run import prediction_of
from orion_triage.evaluate.threshold import lowest_threshold
from orion_triage.flight import decide_frame
from orion_triage.mission.contract import differences
from orion_triage.mission.decide import Rules, as_steps, by_in_words, decide, in_words
from orion_triage.mission.mission import Mission, default_mission
from orion_triage.mission.preview import preview
from orion_triage.mission.prompt import user_text
from orion_triage.mission.scoring import Scoring, field_cues
from orion_triage.models.encode import EncodedRow, encode_rows
from orion_triage.models.generate import _next_log_probabilities, generate_and_score
from orion_triage.models.load import TINY_BASE_FOLDER, load_model, load_processor
from tests.conftest import structured_picture
from tests.mission.conftest import assert_named
from tests.mission.test_fields import NOTE, SHIPS, SMOKE, SURFACE, mission, written

SENDS = SMOKE | {"when": "yes", "then": "SHIP", "probability": 0.7}
DROPS = SURFACE | {"when": "ice", "then": "SEA"}
YES = {"smoke": {"yes": 0.75, "no": 0.25}, "surface": {"water": 0.5, "ice": 0.5}}
NO = {"smoke": {"yes": 0.69, "no": 0.31}, "surface": {"water": 0.51, "ice": 0.49}}


def letters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def ruled(**changes: Any) -> Mission:
    return mission(SENDS, DROPS, **changes)


def test_rules_come_after_blank_and_no_verdict_and_before_the_threshold() -> None:
    own, low = ruled(unparsable="SHIP"), Rules(drop_threshold=0.1)
    assert decide(own, "SEA", (0.1, 0.9), blank=True, rules=low, field_scores=YES).by == "blank rule"
    assert decide(own, None, None, blank=False, rules=low, field_scores=YES).by == "no verdict"
    first = decide(own, "SEA", (0.1, 0.9), blank=False, rules=low, field_scores=YES)
    assert (first.category, first.by, first.field) == ("SHIP", "field rule", "smoke")
    assert by_in_words(own, first, low) == "smoke is yes"
    second = decide(own, "SHIP", (0.9, 0.1), blank=False, rules=Rules(), field_scores=YES | {"smoke": NO["smoke"]})
    assert (second.category, by_in_words(own, second, Rules())) == ("SEA", "surface is ice")
    for scores in (NO, {}, None):  # no rule holds, or nothing is known
        assert decide(own, "SEA", (0.1, 0.9), blank=False, rules=low, field_scores=scores).by == "threshold"
        assert decide(own, "SEA", None, blank=False, rules=low, field_scores=scores).by == "model"
    assert in_words(own, Rules())[3:5] == [
        "If smoke is yes with a probability of at least 0.7, the frame is SHIP, whatever the scores of the categories.",
        "If surface is ice with a probability of at least 0.5, the frame is SEA, whatever the scores of the categories.",  # noqa: E501
    ]


def test_the_flight_client_decides_alike() -> None:
    own = ruled()
    for said in ("SHIP", "SEA", None):
        for threshold in (None, 0.1, 0.95):
            for field_scores in (YES, NO, {}):
                ground = decide(own, said, (0.1, 0.9), blank=False, rules=Rules(threshold), field_scores=field_scores)
                steps = as_steps(own, Rules(threshold), {})
                flown = decide_frame.decide(steps, said, {"SHIP": 0.1, "SEA": 0.9}, field_scores)
                assert flown == (ground.category, by_in_words(own, ground, Rules(threshold)))


def test_a_rule_is_no_part_of_what_a_model_learns() -> None:
    own = ruled()
    assert differences(own, mission(SMOKE, SURFACE)) == []
    assert Mission.model_validate(own.model_dump(mode="json")) == own
    assert "when" not in mission(SMOKE).model_dump()["fields"][0]


MISTAKES = [
    ([SMOKE | {"when": "yes"}], "when = ", "the rule of smoke has no then; write when and then, or neither"),
    ([SMOKE | {"then": "FIRE"}], "then = ", "the rule of smoke has no when"),
    ([SMOKE | {"probability": 0.7}], "probability = ", "the rule of smoke has no when"),
    ([SENDS | {"when": "Yes", "then": "FIRE"}], "when = ", "when of smoke is 'Yes', which is no value of it; did you"),
    ([DROPS | {"when": "land", "then": "FIRE"}], "when = ", "is no value of it (there are water, ice)"),
    ([SENDS | {"then": "SMOK"}], "then = ", "then of smoke is 'SMOK', which is no category; did you mean SMOKE?"),
    ([SENDS | {"then": "FIRE", "probability": 0}], "probability = ", "probability should be greater than 0"),
    ([SENDS | {"then": "FIRE", "probability": 70}], "probability = ", "probability should be less than or equal to 1"),
    ([SHIPS | {"when": "3", "then": "FIRE"}], "when = ", "when is not for the field ship_count, a whole number"),
    ([NOTE | {"when": "a", "then": "FIRE"}], "when = ", "when is not for the field note, a short text; remove it"),
]  # fmt: skip


@pytest.mark.parametrize(("tables", "line", "said"), MISTAKES, ids=[said for *_, said in MISTAKES])
def test_a_mistake_is_named_with_its_line(tables: list[dict[str, Any]], line: str, said: str, tmp_path: Path) -> None:
    assert_named(said, line, written(*tables), tmp_path)


def test_values_that_begin_alike_have_no_probabilities_and_no_rule() -> None:
    alike = {"name": "cover", "kind": "choice", "choices": ["snow", "sand"], "definition": "Most of the ground."}
    own = mission(SMOKE, alike)
    assert [(one.field, one.cue, one.tokens) for one in field_cues(own, letters)] == [
        ("smoke", '"smoke": "', (ord("y"), ord("n")))
    ]
    assert preview(own, letters)["notes"][-1] == "values of cover begin alike: their probabilities are not read"
    with pytest.raises(OrionError, match="the rule of cover cannot be applied"):
        Scoring.of(mission(alike | {"when": "sand", "then": "SEA"}), letters)


def row(**changes: Any) -> dict[str, Any]:
    return {
        "condition": "B", "name": "a", "truth": "SHIP", "category": "SEA", "donor": None,
        "scores": {"SHIP": 0.2, "SEA": 0.8}, "fields": {"smoke": "no", "surface": "ice"},
        "true_fields": {"smoke": "yes", "surface": "ice"}, "field_scores": YES, **changes,
    }  # fmt: skip


def test_stored_answers_decide_as_in_flight_and_those_of_before_are_refused() -> None:
    own = ruled()
    stored = prediction_of(row(), own)
    assert stored.predicted == "SEA", "the model's own answer stays as it is"
    assert [one.predicted for one in as_flown([stored], [], Rules(), own)] == ["SHIP"]
    assert [one.predicted for one in as_flown([stored], ["a"], Rules(), own)] == ["SEA"], "a blank frame comes first"
    before = row()
    del before["field_scores"]
    with pytest.raises(ValueError, match="field_scores is missing"):
        prediction_of(before, own)
    assert prediction_of(before, mission(SMOKE, SURFACE)).field_scores == {}
    for damage in ({"smoke": {"yes": 1.0}}, {"other": {"yes": 0.5, "no": 0.5}}, {"smoke": {"yes": 2.0, "no": 0.0}}):
        with pytest.raises(ValueError, match="are not those of the mission"):
            prediction_of(row(field_scores=damage), own)


def test_a_threshold_is_chosen_with_the_rules() -> None:
    """What a rule keeps is not lost at any threshold, and what a rule drops is lost at every one."""
    own = ruled()

    def answer(name: str, drop: float, field_scores: Any) -> Prediction:
        return Prediction("B", name, "SHIP", "SHIP", scores=(1 - drop, drop), field_scores=field_scores)

    kept = [answer("a", 0.9, YES), answer("b", 0.2, {})]
    assert lowest_threshold(kept, 0.5, own) == 0.2
    assert lowest_threshold(kept, 0.0, own) == 0.9, "without the rule, 0.9 would lose the first frame"
    lost = [answer("a", 0.1, YES | {"smoke": NO["smoke"]}), answer("b", 0.2, {})]
    with pytest.raises(OrionError, match=r"at any threshold, because .* a field's rule says so"):
        lowest_threshold(lost, 0.4, own)


@pytest.mark.slow
def test_transformers_reads_probabilities_where_the_answer_has_a_cue() -> None:
    """What `further` finds after two cues is what the model says after the same tokens without generating."""
    model, processor = (
        load_model(TINY_BASE_FOLDER, dtype="float32", device="cpu"),
        load_processor(TINY_BASE_FOLDER, 256),
    )
    rows = encode_rows(
        processor, [structured_picture(n).resize((256, 256)) for n in (1, 2)], [user_text(default_mission(), None)] * 2
    )
    ids = tuple(processor.tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in ("HIGH", "Open", "a"))
    cues = {'"reason": "': ids, '"category": "': ids[::-1], '"smoke": "': ids}
    found = generate_and_score(model, processor, rows, 80, cue='"category": "', after_cue=[("", ids)], further=cues)
    for asked, (text, scores, further) in zip(rows, found, strict=True):
        assert [*further] == ['"reason": "', '"category": "'], "a cue that is not there has no probabilities"
        assert scores
        assert further['"category": "'] == scores[0][::-1]
        begun = processor.tokenizer(text.partition('"reason": "')[0] + '"reason": "', add_special_tokens=False)
        alone = EncodedRow(asked.image, [*asked.turn, *begun["input_ids"]], [])
        assert further['"reason": "'] == pytest.approx(
            _next_log_probabilities(model, processor, alone, [], "", ids), abs=1e-3
        )
