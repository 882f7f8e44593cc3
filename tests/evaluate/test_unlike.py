"""Frames unlike all those of train and val are kept: measures, ranges, the decision on the ground and in flight."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from orion_triage.dataset.dataset import Dataset
from orion_triage.evaluate.metrics import Prediction
from orion_triage.evaluate.results import as_flown
from orion_triage.evaluate.threshold import lowest_threshold
from orion_triage.flight import decide_frame
from orion_triage.imagery.frames import BLANK_ROWS, appearance, is_blank
from orion_triage.imagery.stress import STRESSES, stressed
from orion_triage.mission.decide import Rules, as_steps, by_in_words, decide, in_words, is_unlike
from tests.conftest import MISSION, structured_picture
from tests.mission.test_field_rules import SENDS, YES
from tests.mission.test_fields import mission

H, M, L = MISSION.names
RANGES = {"dark": (10, 60), "entropy_bits": (5.0, 8.0)}
GUARD = Rules(appearance=RANGES)
LIMITS = {"rows": [*BLANK_ROWS], "entropy_bits_below": 4.0, "gradient_below": 1.0}


def test_measures_are_those_of_the_grey_levels() -> None:
    half = np.zeros((512, 512, 3), dtype=np.uint8)
    half[:, 256:] = 200
    found = appearance(Image.fromarray(half, "RGB"))
    assert (found["dark"], found["middle"], found["bright"], found["contrast"]) == (0, 0, 200, 200)
    assert found["entropy_bits"] == 1
    assert found["gradient"] == pytest.approx(200 / 511, abs=1e-6)


def test_the_flight_measures_the_same() -> None:
    random = np.random.default_rng(0)
    pictures = [structured_picture(number) for number in range(3)]
    pictures += [Image.new("RGB", (512, 512), (7, 80, 250))]
    pictures += [Image.fromarray(random.integers(0, 256, (512, 512, 3), dtype=np.uint8), "RGB")]
    for picture in pictures:
        flown = decide_frame.appearance(picture.tobytes(), [*BLANK_ROWS])
        assert flown == appearance(picture)
        assert decide_frame.is_blank(flown, LIMITS) == is_blank(picture)


def test_an_unlike_frame_is_kept_after_the_rules_before_it() -> None:
    own = MISSION
    dropped = (0.1, 0.2, 0.7)
    assert decide(own, L, dropped, blank=True, rules=GUARD, unlike=True).by == "blank rule"
    assert decide(own, None, None, blank=False, rules=GUARD, unlike=True).by == "no verdict"
    for rules in (GUARD, Rules(0.1, appearance=RANGES)):
        found = decide(own, L, dropped, blank=False, rules=rules, unlike=True)
        assert (found.category, by_in_words(own, found, rules)) == (M, "unlike training")
    assert decide(own, L, None, blank=False, rules=GUARD, unlike=True).category == M, "stored, without scores"
    assert decide(own, L, (0.4, 0.1, 0.5), blank=False, rules=GUARD, unlike=True).category == M, "stored, not sent"
    for scores, said in (((0.5, 0.2, 0.3), H), (None, H), ((0.2, 0.5, 0.3), M)):
        kept = decide(own, said, scores, blank=False, rules=GUARD, unlike=True)
        assert (kept.category, kept.by) == (said, "model"), "what is kept anyway stays as it is"
    assert decide(own, L, dropped, blank=False, rules=Rules(), unlike=True).category == L, "the rule is off"
    assert decide(own, L, dropped, blank=False, rules=GUARD, unlike=False).by == "model"
    ruled = mission(SENDS)
    assert decide(ruled, "SEA", (0.1, 0.9), blank=False, rules=GUARD, field_scores=YES, unlike=True).by == "field rule"
    assert "If the next steps would drop it, it is MEDIUM instead." in " ".join(in_words(own, GUARD))
    two = mission()  # SHIP is sent and SEA is dropped: nothing is stored
    assert decide(two, "SEA", (0.1, 0.9), blank=False, rules=GUARD, unlike=True).category == "SHIP"


def test_a_measure_on_its_limit_is_inside() -> None:
    assert not is_unlike({"dark": 10, "entropy_bits": 8.0}, GUARD)
    assert is_unlike({"dark": 9, "entropy_bits": 7.0}, GUARD)
    assert is_unlike({"dark": 60, "entropy_bits": 8.000001}, GUARD)
    assert not is_unlike({"dark": 0}, Rules())


def test_the_flight_client_decides_alike() -> None:
    for rules in (GUARD, Rules(0.5, appearance=RANGES), Rules(0.5)):
        steps = as_steps(MISSION, rules, LIMITS)
        for said in (*MISSION.names, None):
            for scores in ((0.1, 0.2, 0.7), (0.5, 0.1, 0.4), None):
                for unlike in (True, False):
                    ground = decide(MISSION, said, scores, blank=False, rules=rules, unlike=unlike)
                    named = dict(zip(MISSION.names, scores, strict=True)) if scores else None
                    flown = decide_frame.decide(steps, said, named, unlike=unlike)
                    assert flown == (ground.category, by_in_words(MISSION, ground, rules)), (said, scores, unlike)


def test_ranges_are_those_of_train_and_val_and_haze_is_outside(small_dataset: Path) -> None:
    dataset_of_frames = Dataset(small_dataset, MISSION)
    ranges = dataset_of_frames.appearance()
    rules = Rules(appearance=ranges)
    names = {record.name: record for split in ("train", "val") for record in dataset_of_frames.records(split)}
    found = [appearance(dataset_of_frames.frame(record, 512)) for record in names.values()]
    for name, (low, high) in ranges.items():
        assert (low, high) == (min(one[name] for one in found), max(one[name] for one in found))
    assert dataset_of_frames.unlike_names("train", rules) == dataset_of_frames.unlike_names("val", rules) == []
    assert dataset_of_frames.unlike_names("test", Rules()) == []
    haze = next(stress for stress in STRESSES if stress.name == "haze")
    hazy = [
        is_unlike(appearance(stressed(dataset_of_frames.frame(record, 512), haze, "strong", name)), rules)
        for name, record in names.items()
    ]
    assert all(hazy)


def test_a_threshold_counts_what_the_rule_keeps() -> None:
    rows = [
        Prediction("B", f"{n}", H, H, scores=(1 - p, 0.0, p), unlike=n == 0) for n, p in enumerate((0.9, 0.2, 0.3, 0.4))
    ]
    assert lowest_threshold(rows, 0.0, MISSION) == pytest.approx(2.0)
    assert lowest_threshold(rows, 0.0, MISSION, RANGES) == pytest.approx(0.9), "which drops none of the others"
    flown = as_flown(rows, [], Rules(0.1, appearance=RANGES), MISSION, ["0"])
    assert [row.predicted for row in flown] == [M, L, L, L]
    blind = [Prediction("C", "0", H, L, scores=(0.0, 0.0, 1.0))]
    assert as_flown(blind, [], GUARD, MISSION, ["0"])[0].predicted == L, "the noise image is not the frame"
