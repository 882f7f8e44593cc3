"""mission/: one file says what the categories are, and everything else follows from it."""

import json
import math
import shutil
import threading
import tomllib
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from orion_triage.dataset.records import Record, parse_record
from orion_triage.errors import OrionError, ServerError
from orion_triage.evaluate import threshold
from orion_triage.evaluate.conditions import conflict_pairs
from orion_triage.evaluate.judgement import judge
from orion_triage.evaluate.metrics import Prediction, summarize, under
from orion_triage.evaluate.results import as_flown
from orion_triage.evaluate.run import prediction_of
from orion_triage.evaluate.value import downlink, headline
from orion_triage.llama_cpp.client import Client
from orion_triage.mission.contract import contract_sha256, differences, mission_of, require_mission, write_mission
from orion_triage.mission.decide import Rules, decide, in_words
from orion_triage.mission.load import load_mission
from orion_triage.mission.mission import Mission, default_mission
from orion_triage.mission.preview import preview
from orion_triage.mission.prompt import Coordinates, parse_prompt, render_prompt, user_text
from orion_triage.mission.scoring import Scoring, label_tree
from orion_triage.mission.verdict import (
    Verdict,
    answer_start,
    answer_text,
    answer_tokens,
    category_grammar,
    grammar,
    parse_verdict,
)
from orion_triage.models.load import TINY_BASE_FOLDER, tokenizer_of
from orion_triage.pipeline import DATASET, FINE_TUNE, FUSE, run_stage
from orion_triage.runs.run import Run
from orion_triage.settings import load_settings
from tests.mission.conftest import assert_named

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "src/orion_triage/mission/example.toml"
WATERFRONT = ROOT / "missions/waterfront.toml"
PLACE = Coordinates(-120.62, 34.0)


def mission(*names: str, **changes: Any) -> Mission:
    """A mission of these categories: the first is sent, the last dropped, the others are stored."""
    actions = ["send", *["store"] * (len(names) - 2), "drop"]
    categories = [
        {"name": name, "definition": f"Number {place}.", "action": action, "value": len(names) - place - 1, "prior": 0}
        for place, (name, action) in enumerate(zip(names, actions, strict=True))
    ]
    categories[0]["prior"] = 1
    return Mission.model_validate(
        {
            "name": "test",
            "prompt": "See{coordinates}: {categories}",
            "coordinates": " {longitude} {latitude}",
            "categories": categories,
            **changes,
        }
    )


def letters(text: str) -> list[int]:
    return list(text.encode())


# The published mission


def test_the_published_grammar_is_the_same_to_the_byte() -> None:
    published = default_mission()
    assert grammar(published) == (
        'root ::= "{\\"reason\\": \\"" reason "\\", \\"category\\": \\"" category "\\"}"\n'
        "reason ::= [ !#-\\[\\]-~]{1,160}\n"
        'category ::= "HIGH" | "MEDIUM" | "LOW"\n'
    )
    assert category_grammar(published) == 'root ::= category "\\"}"\ncategory ::= "HIGH" | "MEDIUM" | "LOW"\n'
    assert answer_start(published) == '{"reason": "", "category": "'
    assert answer_tokens(published) == 200


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """The figures of the split as they were; those of the orbit agree with the former shares of `at_prior`."""
    before = expected.pop("at_prior")
    assert [found["orbit"][name]["value"] for name in ("sent", "stored", "dropped", "no_verdict")] == pytest.approx(
        [before[name] for name in ("sent", "stored", "dropped", "no_verdict")]
    )
    precision = {name: one["value"] for name, one in found["orbit"]["precision"].items()}
    assert precision == pytest.approx(before["precision"])
    for name in ("cost", "value_curve"):
        expected.pop(name)
    expected["downlink"].pop("value_density")
    kept = {name: value for name, value in found.items() if name not in ("orbit", "over_blocks", "value_curve")}
    assert kept == expected


def test_the_published_metrics_are_the_same_to_the_last_digit() -> None:
    """`expected` was computed from these answers of a run before categories came from a file.

    But for what is weighted with the mission's prior since then: rates and value curve in orbit.
    """
    stored = json.loads((Path(__file__).parent / "published_metrics.json").read_text(encoding="utf-8"))
    published = default_mission()
    places = {name: Coordinates(*place) for name, place in stored["places"].items()}
    answers = [prediction_of(row, published) for row in stored["rows"]]

    def of(rows: list[Prediction]) -> dict[str, Any]:
        found = summarize(rows, published)
        return {c: rates | judge(under(rows, c), places, published) for c, rates in found.items()}

    flown = as_flown(answers, stored["blank"], Rules(stored["low_threshold"]), published)
    expected = stored["expected"]
    for condition, rates in json.loads(json.dumps(of(answers))).items():
        assert_same(rates, expected["summary"][condition])
    assert_same(json.loads(json.dumps(of(flown)["B"])), expected["flown"])
    assert threshold.lowest_threshold(under(answers, "B"), 0.05, published) == expected["lowest_threshold"]


def test_values_and_priors_can_be_set_as_lists_and_texts_of_before_are_read() -> None:
    """The form of settings.json before version 7, and of --set."""
    before = {"values": [5, 1, 0], "costs": [[0, 1, 2], [1, 0, 3], [1, 1, 0]], "prior": [0.1, 0.2, 0.7]}
    changed = Mission.model_validate(before)
    assert (changed.values, changed.prior, changed.costs[0]) == ((5, 1, 0), (0.1, 0.2, 0.7), (0, 1, 2))
    assert contract_sha256(changed) == contract_sha256(default_mission())
    assert load_settings("tiny", ["mission.prior=[0.1, 0.2, 0.7]"]).mission.prior == (0.1, 0.2, 0.7)
    with pytest.raises(OrionError, match="values needs one number for each of the 3 categories"):
        load_settings("tiny", ["mission.values=[1, 2]"])


# What follows from a file


def test_what_is_not_said_is_derived() -> None:
    four = mission("SHIP", "PORT", "REEF", "SEA")
    assert four.blank == "SEA"
    assert [category.conflict for category in four.categories] == ["SEA", "SEA", "SHIP", "SHIP"]
    assert [category.reason for category in four.categories][:2] == ["Number 0.", "Number 1."]
    assert four.costs == ((0, 0.2 * 3, 3), (1, 0, 2), (1, 0, 1), (1, 0.2, 0))


def test_a_mission_without_dropped_categories_has_no_blank_rule_and_no_threshold() -> None:
    kept = mission("A", "B")
    kept = Mission.model_validate(
        kept.model_dump() | {"blank": "", "categories": [c.model_dump() | {"action": "send"} for c in kept.categories]}
    )
    assert decide(kept, "B", None, blank=True, rules=Rules()).by == "model"
    with pytest.raises(OrionError, match="drops no category: a threshold decides nothing"):
        threshold.lowest_threshold([], 0.05, kept)


@pytest.mark.parametrize("image", ["before the text", "after the text"])
@pytest.mark.parametrize("keys", [["reason", "category"], ["category", "reason"]])
def test_records_come_back_whatever_the_order(image: str, keys: list[str]) -> None:
    own = mission("SHIP", "SEA", image=image, keys=keys)
    record = Record("a.png", PLACE, Verdict('A "ship".', "SHIP"), own)
    assert parse_record(record.to_line(), own) == record
    assert record.answer.startswith(f'{{"{keys[0]}": ')
    alone = record.without_coordinates()
    assert parse_record(alone.to_line(), own) == alone
    if image == "before the text":
        assert record.user_text == f"<image>\n{record.prompt}"
    else:  # all that precedes the coordinates is the same with and without them
        assert alone.user_text == f"{alone.prompt}\n<image>"
        assert record.user_text == alone.user_text + own.coordinates.format(longitude="-120.62", latitude="34.0")
    before, after = answer_text(own, Verdict("", "X")).split("X")
    assert answer_start(own) == before
    assert category_grammar(own).startswith('root ::= category "' + after[:1].replace('"', '\\"'))


def test_reasons_are_written_for_what_is_sent_unless_the_mission_says_otherwise() -> None:
    assert mission("SHIP", "WAKE", "SEA").reasons_for == ("SHIP",)
    assert mission("SHIP", "WAKE", "SEA", reasons_for=["WAKE"]).reasons_for == ("WAKE",)
    assert mission("SHIP", "WAKE", "SEA", reasons_for=[]).reasons_for == ()
    own = mission("SHIP", "SEA", keys=["category", "reason"])
    assert 'category ::= "SHIP"\n' in grammar(own, "SHIP")
    assert differences(own, mission("SHIP", "SEA", keys=["category", "reason"], reasons_for=[])) == []
    text = preview(mission("SHIP", "SEA", image="after the text"), letters)
    assert text["tokens_before_image"] == len(text["prompt"]) - len("<image>")
    assert preview(own, letters)["tokens_before_image"] == 0


def test_a_prompt_of_another_mission_is_refused_by_name() -> None:
    with pytest.raises(OrionError, match="the prompt is not that of the mission test"):
        parse_prompt(mission("A", "B"), render_prompt(default_mission(), PLACE))
    with pytest.raises(OrionError, match="and the coordinates, if any, after it"):
        parse_record(
            Record("a.png", None, Verdict("x", "A"), mission("A", "B")).to_line(),
            mission("A", "B", image="after the text"),
        )


def test_answers_of_other_categories_are_none() -> None:
    own = mission("SHIP", "SEA")
    assert parse_verdict(own, '{"reason": "x", "category": "SHIP"}') == Verdict("x", "SHIP")
    assert parse_verdict(own, '{"reason": "x", "category": "HIGH"}') is None


# Scores of whole names


def test_different_first_tokens_take_one_request() -> None:
    (node,) = label_tree(default_mission(), letters)
    assert (node.text, node.tokens, node.names) == ("", tuple(b"HML"), ((0,), (1,), (2,)))
    assert Scoring(default_mission(), (node,), ()).of_categories([[-1.0, -2.0, -3.0]]) == [-1, -2, -3]


def test_names_that_begin_alike_are_scored_where_they_part() -> None:
    own = mission("WORKS", "WATERFRONT", "SEA")
    root, inner = label_tree(own, letters)
    assert (root.text, root.names) == ("", ((0, 1), (2,)))
    assert (inner.text, inner.tokens, inner.names) == ("W", tuple(b"OA"), ((0,), (1,)))
    found = [[math.log(0.9), math.log(0.1)], [math.log(0.2), math.log(0.8)]]
    scores = Scoring(own, (root, inner), ()).of_categories(found)
    assert scores
    assert [math.exp(score) for score in scores] == pytest.approx([0.18, 0.72, 0.1])


def test_a_name_that_is_another_ones_beginning_ends_with_its_quote() -> None:
    own = mission("SHIP", "SHIPWRECK")
    (node,) = label_tree(own, letters)
    assert (node.text, node.tokens) == ("SHIP", tuple(b'"W'))


def test_names_that_the_tokenizer_joins_with_the_text_before_are_refused() -> None:
    def words(text: str) -> list[int]:
        return [sum(word.encode()) for word in text.split(" ")]

    with pytest.raises(OrionError, match="merges the category HIGH with the text before it"):
        label_tree(default_mission(), words)


def test_a_common_beginning_that_is_tokenized_otherwise_alone_is_refused() -> None:
    """AB is one token where nothing follows it, and two in ABC."""

    def tokenize(text: str) -> list[int]:
        return letters(text) if "ABC" in text or "ABD" in text else letters(text.replace("AB", "\1").replace("A", "\2"))

    with pytest.raises(OrionError, match="ABC and ABD begin with the same tokens"):
        label_tree(mission("ABC", "ABD"), tokenize)


# Decisions


def four() -> Mission:
    return Mission.model_validate(tomllib.loads(WATERFRONT.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    ("scores", "decision"),
    [
        ((0.4, 0.1, 0.3, 0.2), ("SETTLED", "threshold")),  # the two that are dropped have 0.5 together
        ((0.4, 0.2, 0.1, 0.3), ("WATERFRONT", "threshold")),
        ((0.25, 0.25, 0.25, 0.25), ("SETTLED", "threshold")),  # the first of equal ones
    ],
)
def test_what_is_dropped_counts_together(scores: tuple[float, ...], decision: tuple[str, str]) -> None:
    found = decide(four(), "WORKSITE", scores, blank=False, rules=Rules(0.5))
    assert (found.category, found.by) == decision


def test_the_rules_in_words_name_the_categories() -> None:
    words = in_words(four(), Rules(0.5))
    assert words[0] == "A blank frame is WILDLAND. The model is not asked about it."
    assert "the sum of the scores of SETTLED and WILDLAND is at least 0.5" in words[3]
    assert in_words(default_mission(), Rules(0.5))[3] == (
        "With scores: LOW if the score of LOW is at least 0.5 (the threshold, chosen on val); otherwise HIGH or "
        "MEDIUM, whichever has the higher score (HIGH if equal)."
    )


def test_an_answer_without_a_verdict_can_be_given_a_category() -> None:
    own = mission("SHIP", "SEA", unparsable="SHIP")
    assert decide(own, None, None, blank=False, rules=Rules()).category == "SHIP"
    assert decide(mission("SHIP", "SEA"), None, None, blank=False, rules=Rules()).category is None


def test_metrics_count_actions_not_names() -> None:
    """Of two categories that are sent, one for the other is no loss; of two that are dropped, neither."""
    import numpy as np

    truth, guess = np.array([0, 0, 1, 2, 3]), np.array([0, 2, 3, 3, 2])
    found = headline(truth, guess, [str(n) for n in range(len(truth))], four())
    assert (found["high_recall"]["count"], found["high_recall"]["total"]) == (1, 2)
    assert (found["irrecoverable_loss"]["count"], found["irrecoverable_loss"]["total"]) == (2, 3)
    assert downlink(guess, four())["dropped"] == 4 / 5


def test_condition_d_takes_coordinates_from_the_category_that_the_mission_names() -> None:
    own = mission("A", "B", "C")
    own = Mission.model_validate(
        own.model_dump()
        | {"categories": [c.model_dump() | {"conflict": other} for c, other in zip(own.categories, "CAB", strict=True)]}
    )
    records = [Record(f"{n}.png", Coordinates(n, n), Verdict("x", name), own) for n, name in enumerate("ABC")]
    assert {name: donor.category for name, donor in conflict_pairs(records).items()} == {"0": "C", "1": "A", "2": "B"}


# A product belongs to its mission


def test_a_product_of_another_mission_is_refused_and_says_what_differs(tmp_path: Path) -> None:
    own, published = load_mission(WATERFRONT), default_mission()
    write_mission(tmp_path, published)
    assert not list(tmp_path.iterdir())  # products of the published mission stay as they were
    require_mission(tmp_path, published)
    with pytest.raises(OrionError, match="is of the mission orion, and this run is of waterfront") as caught:
        require_mission(tmp_path, own)
    assert "categories: HIGH, MEDIUM, LOW and WATERFRONT, WORKSITE, SETTLED, WILDLAND" in caught.value.message
    write_mission(tmp_path, own)
    require_mission(tmp_path, own)
    assert mission_of(tmp_path).places == ""  # no path of this machine


def test_values_costs_and_actions_do_not_change_the_contract() -> None:
    own = four()
    judged = own.model_copy(update={"costs": ((1.0, 2.0, 3.0),) * 4, "name": "other", "unparsable": "SETTLED"})
    assert differences(own, judged) == []
    assert differences(own, own.model_copy(update={"image": "after the text"}))[0].startswith("prompt: ")


# Mistakes in a file

GOOD = EXAMPLE.read_text(encoding="utf-8")


def test_what_mission_new_writes_is_right() -> None:
    assert load_mission(EXAMPLE).names == ("FIRE", "SMOKE", "CLOUD", "CALM")


@pytest.mark.parametrize(
    ("change", "line", "said"),
    [
        (("\nprompt = ", "\npromt = "), "promt = ", "there is no key promt; did you mean prompt?"),
        (("{categories}\nAnswer", "Answer"), "prompt = ", "prompt has {categories} 0 times; write it once"),
        (("You are a", "<|im_end|> You are a"), "prompt = ", "prompt contains the control token <|im_end|>; remove it"),
        (
            ("{longitude}, Latitude: {latitude}", "{latitude}, {longitude}"),
            "coordinates = ",
            "write {longitude} before",
        ),
        (('name = "SMOKE"', 'name = "Fire"'), 'name = "Fire"', "the category Fire is there twice (as FIRE)"),
        (('name = "SMOKE"', 'name = "SMO KE"'), 'name = "SMO KE"', "categories.2.name"),
        (('action = "store"', ""), "[[categories]]", "categories.2.action is missing"),
        (
            ('action = "store"', 'action = "keep"'),
            'action = "keep"',
            "categories.2.action should be 'send', 'store' or",
        ),
        (("prior = 0.01", "prior = 0.5"), "prior = 0.5", "the priors sum to 1.49; write shares that sum to 1"),
        (("value = 10.0", 'value = "much"'), 'value = "much"', "categories.1.value should be a valid number"),
        (("Grey or brown", "Like FIRE: grey"), 'definition = "Like', "the definition of SMOKE names FIRE"),
        (
            ('# blank = "CALM" ', 'blank = "CLAM" #'),
            "blank = ",
            "blank is 'CLAM', which is no category; did you mean CALM?",
        ),
        (
            ('# conflict = "CALM"', 'conflict = "FIRE" #'),
            "conflict = ",
            "conflict of FIRE is 'FIRE', no other category",
        ),
        (
            ("# costs = [[0.0, 2.0, 10.0], [1.0, 0.0, 2.0], ", "costs = ["),
            "costs = ",
            "costs has 2 rows; write one for",
        ),
        (
            ('# image = "before the text" ', "image = false #"),
            "image = ",
            "image should be 'before the text' or 'after the",
        ),
        (
            ('# reasons_for = ["FIRE"] ', 'reasons_for = ["FIER"] #'),
            "reasons_for = ",
            "reasons_for has 'FIER', which is no category; did you mean FIRE?",
        ),
    ],
)
def test_a_mistake_is_named_with_its_line_and_the_fix(
    change: tuple[str, str], line: str, said: str, tmp_path: Path
) -> None:
    assert change[0] in GOOD
    assert_named(said, line, GOOD.replace(*change, 1), tmp_path)


def test_every_mistake_is_said_at_once(tmp_path: Path) -> None:
    path = tmp_path / "mission.toml"
    wrong = GOOD.replace('action = "send"', 'action = "sned"').replace("prior = 0.04", "prior = -1")
    path.write_text(wrong.replace("{categories}\n", ""), encoding="utf-8")
    with pytest.raises(OrionError) as caught:
        load_mission(path)
    found = caught.value.message.splitlines()
    assert found[0] == f"{path} has {len(found) - 1} mistakes:"
    for said in ("categories.1.action", "categories.2.prior", "prompt has {categories} 0 times"):
        assert any(said in line for line in found), said
    numbers = [int(line.removeprefix(f"{path}:").partition(":")[0]) for line in found[1:]]
    assert numbers == sorted(numbers)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name = [", "is not TOML"),
        ("", "is missing"),
        ('name = "a"\n' + "[[categories]]\n" * 3, "categories.3.definition is missing"),
        ("categories = 1", "categories should be a valid tuple"),
        ("categories = [1, 2]", "categories.1 should be a valid dictionary"),
    ],
)
def test_files_that_are_no_mission(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "mission.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(OrionError, match=said):
        load_mission(path)
    with pytest.raises(OrionError, match="does not exist"):
        load_mission(tmp_path / "other.toml")


# orion mission


def test_the_preview_counts_tokens_and_requests() -> None:
    tokenize = tokenizer_of(TINY_BASE_FOLDER)
    shown = preview(load_mission(WATERFRONT), tokenize)
    assert shown["scoring_requests"] == 2
    assert shown["notes"] == ["WATERFRONT, WORKSITE and WILDLAND begin alike (W): one request more per frame"]
    assert shown["prompt_tokens"] == len(tokenize(user_text(load_mission(WATERFRONT), None)))
    assert preview(default_mission(), tokenize)["scoring_requests"] == 1


def test_new_and_check_through_the_command_line(tmp_path: Path, run_orion: Callable[..., Any]) -> None:
    made = run_orion("mission", "new", "mine.toml", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    again = run_orion("mission", "new", "mine.toml", cwd=tmp_path)
    assert again.returncode == 1
    assert "mine.toml exists" in again.stderr
    checked = run_orion("mission", "check", "mine.toml", cwd=tmp_path)
    assert checked.returncode == 0, checked.stderr
    assert "next: orion dataset check FOLDER --mission mine.toml" in checked.stderr
    for said in ("FIRE", "scores of the categories: 2 requests per frame", "prompt in flight", 'category ::= "FIRE" |'):
        assert said in checked.stdout
    (tmp_path / "mine.toml").write_text("nam = 1\n", encoding="utf-8")
    broken = run_orion("mission", "check", "mine.toml", cwd=tmp_path)
    assert broken.returncode == 1
    assert "mine.toml:1: there is no key nam; did you mean name?" in broken.stderr
    assert "Traceback" not in broken.stderr


@pytest.fixture
def run_orion() -> Callable[..., Any]:
    from tests.conftest import orion

    return orion


# A server


def test_a_server_that_drops_the_grammar_is_refused() -> None:
    """Answered as a build that ignores it does: 200, and the model's own words."""

    class Answers(BaseHTTPRequestHandler):
        keeps = False

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            rule = asked["grammar"].removeprefix('root ::= "').removesuffix('"')
            body = json.dumps({"content": rule if self.keeps else "The sky is blue"}).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        client = Client(f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(ServerError, match="does not keep to a grammar: it answers 'The sky is blue'"):
            client.require_grammar()
        Answers.keeps = True
        client.require_grammar()
        server.shutdown()


def test_a_dataset_of_another_mission_is_refused_before_training(tmp_path: Path, small_dataset: Path) -> None:
    own = Path(shutil.copytree(small_dataset, tmp_path / "run" / "dataset"))
    write_mission(own, load_mission(WATERFRONT))
    run = Run(tmp_path / "run", load_settings("tiny"))
    with pytest.raises(OrionError, match="is of the mission waterfront, and this run is of orion"):
        run_stage(FINE_TUNE, run)


def test_an_adapter_of_another_mission_is_refused_before_the_merge(tmp_path: Path, small_dataset: Path) -> None:
    shutil.copytree(small_dataset, tmp_path / "run" / "dataset")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    write_mission(adapter, load_mission(WATERFRONT))
    with pytest.raises(OrionError, match=r"adapter is of the mission waterfront, .* They differ in categories"):
        run_stage(FUSE, Run(tmp_path / "run", load_settings("tiny"), adapter_from=str(adapter)))


def test_another_mission_repeats_the_stages_and_another_value_does_not() -> None:
    settings = load_settings("tiny")
    valued, other = load_settings("tiny", ["mission.values=[5, 1, 0]"]), load_settings("tiny", (), WATERFRONT)
    assert DATASET.settings_of(valued) == DATASET.settings_of(settings)
    assert DATASET.settings_of(other)["mission"]["name"] == "waterfront"
    assert other.mission.places == str(WATERFRONT.parent / "waterfront.csv")


def test_a_new_run_of_a_dataset_that_carries_a_mission_is_of_it(
    tmp_path: Path, small_dataset: Path, run_orion: Callable[..., Any]
) -> None:
    """As on a training server, which gets the dataset and not the mission's file."""
    write_mission(tmp_path, mission("A", "B"))
    (tmp_path / "train_dataset.jsonl").write_text("{}\n")
    refused = run_orion("dataset", "--dataset", ".", "--run", "run", cwd=tmp_path)
    assert "mission: test, as mission.json says" in refused.stderr
    published = run_orion("dataset", "--dataset", str(small_dataset), "--run", "other", cwd=tmp_path)
    assert (published.returncode, "mission:" in published.stderr) == (0, False)
