"""The shipped base: it never met the triage task, and it sees and follows instructions all the same."""

import json
import random
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from orion_triage.dataset.catalogue import MORPHOLOGIES, load_catalogue
from orion_triage.dataset.sources.synthetic import countryside
from orion_triage.dataset.sources.synthetic.draw import SUBTYPES, draw_tile, tile_seed
from orion_triage.dataset.split import split_targets
from orion_triage.imagery.frames import shrink
from orion_triage.mission.prompt import user_text
from orion_triage.mission.verdict import parse_verdict
from orion_triage.models.licence import Licence, licence_of
from orion_triage.models.load import TINY_BASE_FOLDER
from orion_triage.safe.files import sha256_of_file
from orion_triage.settings import DatasetSettings
from tests.conftest import MISSION
from tools.tiny_base import texts
from tools.tiny_base.build import held_out_places
from tools.tiny_base.instruct import AWAY_DEGREES, coordinates_away_from
from tools.tiny_base.tiles import Facts, facts_of, seed_of


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    value: dict[str, Any] = json.loads((TINY_BASE_FOLDER / "record.json").read_text(encoding="utf-8"))
    return value


@pytest.fixture(scope="module")
def facts() -> list[Facts]:
    return [facts_of(draw_tile(name, seed_of(index))) for index, name in enumerate(MORPHOLOGIES)]


def test_the_record_belongs_to_the_weights_and_the_checkpoint_is_small(record: dict[str, Any]) -> None:
    weights = TINY_BASE_FOLDER / "model.safetensors"
    assert record["weights_sha256"] == sha256_of_file(weights)
    assert sum(path.stat().st_size for path in TINY_BASE_FOLDER.iterdir()) <= 16_000_000
    assert not [path.name for path in TINY_BASE_FOLDER.iterdir() if path.suffix in {".bin", ".pt", ".pkl", ".py"}]


def test_it_carries_the_projects_licence() -> None:
    assert licence_of(TINY_BASE_FOLDER) == Licence("apache-2.0")
    assert (TINY_BASE_FOLDER / "LICENSE").read_bytes() == (Path(__file__).parents[2] / "LICENSE").read_bytes()


def test_its_tiles_are_none_of_the_datasets(record: dict[str, Any]) -> None:
    tiles = record["tiles"]
    seen = {seed_of(index) for index in range(tiles["count"])}
    assert len(seen) == tiles["count"]
    assert (tiles["first_seed"], tiles["last_seed"]) == (seed_of(0), seed_of(tiles["count"] - 1))
    drawn = {tile_seed(DatasetSettings().imagery_seed, target.name) for target in load_catalogue()}
    assert len(drawn) == 360
    assert not seen & drawn


def test_its_places_keep_away_from_val_and_test(record: dict[str, Any]) -> None:
    splits = split_targets(load_catalogue())
    held_out = {(target.coordinates.lon, target.coordinates.lat) for name in ("val", "test") for target in splits[name]}  # type: ignore[index]
    assert {tuple(place) for place in record["places"]["kept_away_from_lon_lat"]} == held_out
    assert set(held_out_places()) == held_out
    source = random.Random(1)
    for _ in range(2000):
        there = coordinates_away_from(list(held_out), source)
        assert all(
            abs(there.lat - lat) >= AWAY_DEGREES or abs(there.lon - lon) >= AWAY_DEGREES for lon, lat in held_out
        )


def test_its_texts_are_recorded_and_none_of_the_catalogues(record: dict[str, Any], facts: list[Facts]) -> None:
    assert record["texts"] == json.loads(json.dumps(texts.phrases()))
    source = random.Random(2)
    written = {texts.reason(source, fact) for _ in range(300) for fact in facts}
    reasons = [target.reason for target in load_catalogue()]
    assert not written & set(reasons)
    scenes, measures = record["texts"]["scenes"].values(), record["texts"]["measures"].values()
    phrases = {phrase.lower() for texts in (*scenes, *measures) for phrase in texts if len(phrase.split()) > 3}
    assert len(phrases) > 100
    assert not [(phrase, reason) for phrase in phrases for reason in reasons if phrase in reason.lower()]


def test_every_scene_that_a_tile_can_show_has_its_words() -> None:
    drawn = [*SUBTYPES.values(), *countryside.SCENES.values()]
    assert set(texts.SCENES) == {subtype for subtypes in drawn for subtype in subtypes}
    for what, sights in texts.SCENES.values():
        assert len(set(what)) == len(what) >= 3
        assert len(set(sights)) == len(sights) >= 5


def test_labels_are_never_those_of_triage(facts: list[Facts]) -> None:
    source = random.Random(3)
    assert not texts.FORBIDDEN & {label for _ in range(20_000) for label in texts.labels(source, 3)}
    assert set(MISSION.names) <= texts.FORBIDDEN
    tokenizer_text = "\n".join(texts.corpus(200, facts))
    assert not re.search(r"\b(HIGH|MEDIUM|LOW)\b", tokenizer_text)


def test_no_category_set_groups_the_morphologies_as_triage_does(facts: list[Facts]) -> None:
    """A set that says of every tile what triage says, under other names, would be the task itself."""
    triage = {target.morphology: target.category for target in load_catalogue()}
    source = random.Random(4)
    for topic, definitions, _, classify in texts.MEASURES:
        said = defaultdict(set)
        for fact in facts:
            said[triage[fact.morphology]].add(classify(fact))
        told_apart = [not said[a] & said[b] for a, b in (("HIGH", "MEDIUM"), ("HIGH", "LOW"), ("MEDIUM", "LOW"))]
        assert not all(told_apart), topic
        assert len(definitions) <= 4
    for fact in facts:  # sets of scenes name one scene a category
        prompt, answer = texts.question(source, fact)
        names = re.findall(r"^- ([^:]+):", prompt, re.MULTILINE)
        assert 2 <= len(names) <= 4
        assert json.loads(answer)["category"] in names


@pytest.mark.slow
def test_zero_shot_answers_parse_and_follow_the_image() -> None:
    from orion_triage.models.generate import generate
    from orion_triage.models.load import load_model, load_processor

    model = load_model(TINY_BASE_FOLDER, dtype="float32")
    processor = load_processor(TINY_BASE_FOLDER, 256)
    targets = split_targets(load_catalogue())["test"][::6]
    frames = [shrink(draw_tile(target.morphology, tile_seed(7, target.name)).image, 256) for target in targets]
    answers = generate(model, processor, frames, [user_text(MISSION, None)] * len(frames), 96)
    parsed = [parse_verdict(MISSION, answer) for answer in answers]
    assert sum(verdict is not None for verdict in parsed) >= 0.9 * len(frames)
    assert len({verdict.reason for verdict in parsed if verdict}) > len(frames) / 2
    swapped = answers[1:] + answers[:1]
    assert sum(own != other for own, other in zip(answers, swapped, strict=True)) >= 0.8 * len(frames)
