"""conditions.py, metrics.py, run.py and baselines.py."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from orion_triage.dataset.dataset import Dataset
from orion_triage.dataset.records import Record, read_split, write_split
from orion_triage.errors import OrionError
from orion_triage.evaluate import features
from orion_triage.evaluate.baselines import LOGISTIC_REGRESSION, baselines, logistic_regression
from orion_triage.evaluate.conditions import NOISE, conflict_pairs, questions
from orion_triage.evaluate.metrics import Prediction, compare, summarize
from orion_triage.evaluate.run import read_predictions, run
from orion_triage.evaluate.statistics import wilson
from orion_triage.mission.prompt import Coordinates, render_prompt
from orion_triage.mission.verdict import Verdict
from orion_triage.settings import EvaluateSettings
from tests.conftest import MISSION, ConstantBackend

H, M, L = "HIGH", "MEDIUM", "LOW"
OPPOSITE = {H: L, L: H, M: H}


def some_records(count: int = 9) -> list[Record]:
    return [
        Record(f"orion_dataset/images/r{n}.png", Coordinates(n, -n), Verdict("Why.", (H, M, L)[n % 3]), MISSION)
        for n in range(count)
    ]


def test_conflicts_come_from_the_opposite_category_evenly_and_in_any_order() -> None:
    records = some_records(18)
    pairs = conflict_pairs(records)
    assert conflict_pairs(records[::-1]) == pairs
    truth = {record.name: record for record in records}
    for name, donor in pairs.items():
        assert donor.category == OPPOSITE[truth[name].verdict.category]
        assert donor.coordinates == truth[donor.name].coordinates
    used = Counter(donor.name for name, donor in pairs.items() if truth[name].verdict.category == M)
    assert set(used.values()) == {1}


def test_a_split_without_donors_is_refused() -> None:
    with pytest.raises(OrionError, match="condition D needs coordinates of a LOW record"):
        conflict_pairs([record for record in some_records() if record.verdict.category != L])


def test_the_four_conditions_ask_exactly_this() -> None:
    records = some_records()
    pairs = conflict_pairs(records)
    asked = {question.id: question for question in questions(records, pairs)}
    assert len(asked) == 36
    record = records[0]
    assert asked["A/r0"].prompt == render_prompt(MISSION, record.coordinates)
    assert asked["B/r0"].prompt == render_prompt(MISSION, None)
    assert asked["C/r0"].prompt == asked["A/r0"].prompt
    assert asked["D/r0"].prompt == render_prompt(MISSION, pairs["r0"].coordinates) != asked["A/r0"].prompt
    assert [asked[f"{c}/r0"].image for c in "ABCD"] == [record.image, record.image, NOISE, record.image]


def test_rates_of_a_case_counted_by_hand() -> None:
    guesses = [(H, H), (H, L), (M, M), (M, None), (L, L), (L, L)]
    predictions = [Prediction("A", str(n), truth, guess) for n, (truth, guess) in enumerate(guesses)]
    rates = summarize(predictions, MISSION)["A"]
    assert (rates["right"], rates["count"], rates["unparsable"]) == (4, 6, 1)
    assert rates["classes"]["HIGH"] == {"recall": 0.5, "precision": 1.0, "f1": pytest.approx(2 / 3)}
    assert rates["classes"]["LOW"] == {
        "recall": 1.0,
        "precision": pytest.approx(2 / 3),
        "f1": pytest.approx(0.8),
    }
    assert rates["balanced_accuracy"] == pytest.approx((0.5 + 0.5 + 1) / 3)
    assert rates["confusion"]["MEDIUM"] == {"HIGH": 0, "MEDIUM": 1, "LOW": 0, "unparsable": 1}


def test_conflict_counts_whom_the_model_trusted() -> None:
    predictions = [
        Prediction("B", "x", H, L),
        Prediction("B", "y", H, H),
        Prediction("B", "z", L, L),
        Prediction("D", "x", H, L, L),
        Prediction("D", "y", H, None, L),
        Prediction("D", "z", L, L, H),
    ]
    trust = summarize(predictions, MISSION)["D"]
    assert [trust[f"trusted_{who}"] for who in ("vision", "coordinates", "neither")] == [1, 1, 1]
    assert trust["same_wrong_answer_in_b"] == 1


def test_published_statistics_are_reproduced() -> None:
    assert wilson(35, 60) == pytest.approx((0.457, 0.699), abs=5e-4)
    wrong_then_right = [[Prediction("A", str(n), H, guess) for n in range(3)] for guess in (L, H)]
    change = compare(*wrong_then_right)
    assert (change.gained, change.lost, change.points, change.exact_p) == (3, 0, 100, pytest.approx(0.25))
    assert change.mid_p == pytest.approx(0.125)
    same = compare(wrong_then_right[0], wrong_then_right[0])
    assert (same.exact_p, same.frames_to_resolve) == (1.0, None)
    with pytest.raises(OrionError, match="are of different frames"):
        compare(wrong_then_right[0], wrong_then_right[1][:2])


class Interrupted(ConstantBackend):
    batch_size = 5

    def __init__(self, answer: str, batches: int) -> None:
        super().__init__(answer)
        self.left = batches

    def answer(self, images, prompts):  # type: ignore[no-untyped-def]
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        return super().answer(images, prompts)


def test_an_interrupted_evaluation_goes_on_where_it_stopped(small_dataset: Path, tmp_path: Path) -> None:
    records = read_split(small_dataset, "test", MISSION)
    answer = '{"reason": "r", "category": "LOW"}'
    arguments = (Dataset(small_dataset, MISSION), "test")
    rest = (EvaluateSettings(), 256)
    straight = run(*arguments, ConstantBackend(answer), tmp_path / "straight", *rest, fingerprint="f")
    total = -(-4 * len(records) // 5)
    with pytest.raises(KeyboardInterrupt):
        run(*arguments, Interrupted(answer, 1), tmp_path / "cut", *rest, fingerprint="f")
    assert not (tmp_path / "cut").exists()
    second = Interrupted(answer, total - 1)
    assert run(*arguments, second, tmp_path / "cut", *rest, fingerprint="f") == straight
    assert second.left == 0
    rows = [read_predictions(tmp_path / name, MISSION) for name in ("straight", "cut")]
    for row in [*rows[0], *rows[1]]:
        del row["seconds"]
    assert rows[0] == rows[1]
    with pytest.raises(KeyboardInterrupt):
        run(*arguments, Interrupted(answer, 1), tmp_path / "other", *rest, fingerprint="f")
    anew = Interrupted(answer, total)
    run(*arguments, anew, tmp_path / "other", *rest, fingerprint="another model")
    assert anew.left == 0  # nothing of another model's answers was used


def test_unparsable_answers_are_kept_and_counted(small_dataset: Path, tmp_path: Path) -> None:
    records = read_split(small_dataset, "test", MISSION)
    metrics = run(
        Dataset(small_dataset, MISSION),
        "test",
        ConstantBackend("no"),
        tmp_path / "e",
        EvaluateSettings(),
        256,
        fingerprint="f",
    )
    assert {c: rates["unparsable"] for c, rates in metrics.items()} == dict.fromkeys("ABCD", len(records))
    assert all(rates["accuracy"] == 0 for rates in metrics.values())
    stored = json.loads((tmp_path / "e" / "conflict_pairs.json").read_text())
    assert set(stored) == {record.name for record in records}


def test_baselines_of_a_small_dataset(small_dataset: Path, tmp_path: Path) -> None:
    from sklearn.neighbors import KNeighborsClassifier

    folder = shutil.copytree(small_dataset, tmp_path / "dataset")
    random = np.random.default_rng(49)
    placed: dict[str, list[Record]] = {}
    for split in ("train", "val", "test"):
        records = {record.image: record for record in read_split(folder, split, MISSION) if record.coordinates}
        placed[split] = []
        for image in sorted(records):
            verdict = records[image].verdict
            where = Coordinates(round(random.uniform(-180, 180), 2), round(random.uniform(-85, 85), 2))
            if split == "val":  # where training knows the answer, so that one neighbour is the best choice
                where = next(known.coordinates for known in placed["train"] if known.verdict == verdict)
            placed[split].append(Record(image, where, verdict, MISSION))
        write_split(folder, split, placed[split])
    result = baselines(Dataset(folder, MISSION), "test")
    always = {f"always {category}" for category in "HIGH MEDIUM LOW".split()}
    assert set(result) == {"majority class", "colour k-NN", "coordinates k-NN", *always}
    assert all(result[name]["right"] == 2 for name in always)
    # On places, beside scikit-learn's own; with one neighbour there are no ties, which it breaks otherwise.
    labels = {split: [record.verdict.category for record in records] for split, records in placed.items()}
    angles = {
        split: np.radians([[record.coordinates.lat, record.coordinates.lon] for record in records])
        for split, records in placed.items()
    }
    on_globe, on_map = (
        KNeighborsClassifier(1, metric=metric).fit(angles["train"], labels["train"]).predict(angles["test"]).tolist()
        for metric in ("haversine", "euclidean")
    )
    assert set(on_globe) == set(labels["train"])
    assert on_globe != on_map
    found = result["coordinates k-NN"]
    assert found["k"] == 1
    assert found["predictions"] == dict(zip([record.name for record in placed["test"]], on_globe, strict=True))
    assert found["right"] == sum(one == other for one, other in zip(on_globe, labels["test"], strict=True))


def test_logistic_regression_has_the_least_loss_with_its_penalty() -> None:
    """No weights near the fitted ones have less mean negative log-likelihood plus half the penalty of their squares."""
    from scipy.special import log_softmax

    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 90)
    vectors = random.normal(0, 1, (90, 7)) * 5 + labels[:, None] + 3
    scaled = (vectors - vectors.mean(0)) / vectors.std(0)

    def loss(weights: np.ndarray, intercepts: np.ndarray, penalty: float) -> float:
        logarithms = log_softmax(scaled @ weights.T + intercepts, axis=1)
        return float(-logarithms[np.arange(90), labels].mean() + penalty / 2 * np.sum(weights**2))

    for penalty in (0.01, 1.0):
        fitted = logistic_regression(vectors, labels, penalty)[-1]
        least = loss(fitted.coef_, fitted.intercept_, penalty)
        for _ in range(50):
            step = random.normal(0, 0.02, fitted.coef_.shape), random.normal(0, 0.02, 3)
            assert loss(fitted.coef_ + step[0], fitted.intercept_ + step[1], penalty) > least
        assert loss(fitted.coef_, fitted.intercept_, 10 * penalty) > least  # the penalty counts


def test_a_linear_probe_is_a_baseline(small_dataset: Path, small_base: Path, tmp_path: Path) -> None:
    figures = features.run(small_base, Dataset(small_dataset, MISSION), tmp_path / "features", 256)
    assert figures == {"frames": 24, "width": 256}
    vision = features.read(tmp_path / "features")
    result = baselines(Dataset(small_dataset, MISSION), "test", vision)[LOGISTIC_REGRESSION]
    assert result["count"] == 6
    assert result["penalty"] in (0.001, 0.01, 0.1, 1.0)
    test = {record.image: record.verdict.category for record in read_split(small_dataset, "test", MISSION)}
    known = {image: vector + 100 * (test[image] == H) if image in test else vector for image, vector in vision.items()}
    cheated = baselines(Dataset(small_dataset, MISSION), "test", known)[LOGISTIC_REGRESSION]
    assert cheated["predictions"] != result["predictions"]  # it looks at the vectors it is given
    (tmp_path / "features" / "features.npz").write_bytes(b"")
    with pytest.raises(OrionError, match="is damaged"):
        features.read(tmp_path / "features")
