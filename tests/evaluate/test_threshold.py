"""mission/decide.py and evaluate/threshold.py: one decision for flight, report, threshold and bundle."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from orion_triage.errors import OrionError
from orion_triage.evaluate.metrics import Prediction
from orion_triage.evaluate.results import as_flown
from orion_triage.evaluate.threshold import decided, lowest_threshold, marked_by_rules, measurements
from orion_triage.flight.triage import triage_files
from orion_triage.mission.answer import Answer
from orion_triage.mission.decide import Rules, decide, in_words
from orion_triage.mission.verdict import Verdict, answer_text, parse_verdict
from tests.conftest import MISSION, structured_picture

H, M, L = MISSION.names
Scores = tuple[float, float, float]


def rows_of(truth: Sequence[str], scores: Sequence[Scores | None]) -> list[Prediction]:
    """Answers that name the likeliest category, LOW where they have no scores."""
    said = [MISSION.names[int(np.argmax(one))] if one else L for one in scores]
    return [
        Prediction("B", f"f{number}", true, guess, scores=one)
        for number, (true, guess, one) in enumerate(zip(truth, said, scores, strict=True))
    ]


def lows(*values: float) -> list[Scores]:
    return [(1 - value, 0.0, value) for value in values]


def test_scores_decide_at_a_threshold_and_the_answer_without_one() -> None:
    scores = [(0.3, 0.3, 0.4), (0.1, 0.3, 0.6), (0.2, 0.39, 0.41), (0.0, 0.0, 1.0)]

    def decisions(threshold: float | None) -> list[str | None]:
        return [decide(MISSION, M, one, blank=False, rules=Rules(threshold)).category for one in scores]

    assert decisions(0.6) == [H, L, M, L]
    assert decisions(0.0) == [L, L, L, L]
    assert decisions(2.0) == [H, M, M, H]
    assert decisions(None) == [M, M, M, M]


def test_the_threshold_drops_most_within_the_limit() -> None:
    rows = rows_of([H, M, H, L, L, L], lows(0.1, 0.5, 0.3, 0.9, 0.4, 0.5))
    for limit, threshold in ((0, 0.9), (0.33, 0.9), (0.34, 0.4), (1, 0.1)):
        assert lowest_threshold(rows, limit, MISSION) == threshold
    unseparable = rows_of([H, M, H, L, L, L], lows(1, 1, 1, 1, 1, 1))
    assert lowest_threshold(unseparable, 0, MISSION) > 1


def test_a_limit_that_is_met_exactly_counts() -> None:
    rows = rows_of([H] * 10, lows(*(number / 20 for number in range(1, 11))))
    for lost in range(11):
        assert decided(rows, Rules(lowest_threshold(rows, lost / 10, MISSION)), MISSION).count(L) == lost


@pytest.mark.parametrize("limit", [0.0, 0.02, 0.1, 0.5, 1.0])
def test_no_threshold_of_the_frames_does_better(limit: float) -> None:
    generator = np.random.default_rng(3)
    scores = [tuple(map(float, row)) for row in generator.dirichlet([1, 1, 1], 150)]
    rows = rows_of([MISSION.names[int(generator.choice(3, p=one))] for one in scores], scores)
    chosen = lowest_threshold(rows, limit, MISSION)

    def loss(threshold: float) -> float:
        return measurements(rows, Rules(threshold), MISSION)["irrecoverable_loss"]["rate"]

    assert loss(chosen) <= limit
    assert all(loss(low) > limit for _, _, low in scores if low < chosen)


def test_frames_that_no_threshold_saves_count_in_its_choice() -> None:
    """A blank frame is LOW at any threshold, and so is an answer that says LOW without scores."""
    rows = rows_of([H, M, H, M, L], [*lows(0.1, 0.2, 0.3), None, (0.0, 0.1, 0.9)])
    assert lowest_threshold(rows, 0.25, MISSION) == 0.9
    with pytest.raises(OrionError, match=r"25\.0% of the valuable frames are LOW at any threshold"):
        lowest_threshold(rows, 0.1, MISSION)
    blank = marked_by_rules(rows, ["f0"])
    with pytest.raises(OrionError, match=r"50\.0% of the valuable frames"):
        lowest_threshold(blank, 0.25, MISSION)
    assert lowest_threshold(blank, 0.5, MISSION) == 0.9


def test_thresholds_that_mean_nothing_are_refused() -> None:
    rows = rows_of([H, L], lows(0.1, 0.2))
    for limit in (-0.01, 1.01, float("nan")):
        with pytest.raises(OrionError, match=r"is outside 0\.\.1"):
            lowest_threshold(rows, limit, MISSION)
    with pytest.raises(OrionError, match="no frame is HIGH or MEDIUM"):
        lowest_threshold(rows_of([L, L], lows(0.1, 0.2)), 0.1, MISSION)


class _Saying:
    """A backend that gives one answer after the other."""

    batch_size = 1

    def __init__(self, answers: Sequence[Answer]) -> None:
        self._answers = list(answers)

    def answer(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[Answer]:
        return [self._answers.pop(0) for _ in images]


@pytest.mark.parametrize("threshold", [None, 0.0, 0.5, 2.0])
def test_flight_and_report_decide_alike_frame_by_frame(threshold: float | None, tmp_path: Path) -> None:
    """Blank, scored, unscored and unparsable frames, through the flight's road and through the report's."""
    saying = {category: answer_text(MISSION, Verdict("Dust.", category)) for category in MISSION.names}
    of_frames: dict[str, Answer] = {
        "blank-said-high": Answer(saying[H], (0.9, 0.05, 0.05)),
        "blank-unscored": Answer(saying[H]),
        "high": Answer(saying[H], (0.5, 0.3, 0.2)),
        "low": Answer(saying[L], (0.3, 0.1, 0.6)),
        "tie": Answer(saying[M], (0.4, 0.4, 0.2)),
        "unscored-high": Answer(saying[H]),
        "unscored-low": Answer(saying[L]),
        "unparsable": Answer("Looks like HIGH."),
        "unparsable-scored": Answer('{"reason": "Du', (0.1, 0.1, 0.8)),
    }
    for number, name in enumerate(of_frames):
        blank = name.startswith("blank")
        picture = Image.new("RGB", (512, 512), (250, 250, 250)) if blank else structured_picture(number)
        picture.save(tmp_path / f"{name}.png")
    rules = Rules(threshold)
    asked = [answer for name, answer in of_frames.items() if not name.startswith("blank")]
    flown = {
        Path(outcome.file).stem: outcome.verdict.category if outcome.verdict else None
        for outcome in triage_files(
            [tmp_path / f"{name}.png" for name in of_frames], _Saying(asked), MISSION, 256, rules=rules
        )
    }
    verdicts = {name: parse_verdict(MISSION, answer.text) for name, answer in of_frames.items()}
    rows = [
        Prediction("B", name, H, verdict.category if (verdict := verdicts[name]) else None, scores=answer.scores)
        for name, answer in of_frames.items()
    ]
    blank_frames = [name for name in of_frames if name.startswith("blank")]
    reported = {row.name: row.predicted for row in as_flown(rows, blank_frames, rules, MISSION)}
    marked = marked_by_rules(rows, blank_frames)
    assert dict(zip(of_frames, decided(marked, rules, MISSION), strict=True)) == reported == flown
    shares = measurements(marked, rules, MISSION)["downlink"]
    assert shares["dropped"] == pytest.approx(list(flown.values()).count(L) / len(flown))
    assert shares["no_verdict"] == pytest.approx(list(flown.values()).count(None) / len(flown))
    assert (flown["blank-said-high"], flown["blank-unscored"], flown["unparsable"]) == (L, L, None)
    assert (flown["unparsable-scored"], flown["unscored-low"], flown["unscored-high"]) == (None, L, H)


def test_the_rules_in_words_name_every_step() -> None:
    assert in_words(MISSION, Rules()) == [
        "A blank frame is LOW. The model is not asked about it.",
        'A frame that is refused, or not answered in time, is stored and counted: decided_by "no answer".',
        "An answer without a valid verdict decides nothing: keep the frame and count it.",
        "Otherwise, use the category in the answer. No threshold was chosen.",
    ]
    assert "at least 0.25 (the threshold" in " ".join(in_words(MISSION, Rules(0.25)))
    assert not any("blank" in sentence for sentence in in_words(MISSION, Rules(blank=False)))
