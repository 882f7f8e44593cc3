"""evaluate/verdict.py: models with one planted fault each, evaluated as any other; each gets the verdict it deserves.

What is planted is a model (what it answers from), the pictures or the labels. Everything after is the product's own:
questions, answers on disk, baselines, threshold, results. Weights that do as the planted models do would take hours of
training each.
"""

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from orion_triage.dataset.dataset import Dataset
from orion_triage.dataset.records import IMAGES_FOLDER, Record, write_split
from orion_triage.errors import OrionError, ParityError
from orion_triage.evaluate import features, threshold, variants
from orion_triage.evaluate.metrics import Prediction
from orion_triage.evaluate.results import BENCH_FILE, as_flown, build_results, seconds_per_frame
from orion_triage.evaluate.run import predictions_in
from orion_triage.evaluate.run import run as evaluate
from orion_triage.evaluate.seeds import evaluated
from orion_triage.evaluate.variants import wanted
from orion_triage.evaluate.verdict import (
    DO_NOT_FLY,
    FLY,
    NOT_ENOUGH,
    assess,
    better_than,
    camera,
    lost,
    trusts_the_image,
)
from orion_triage.export.quantize import PAIR
from orion_triage.mission.answer import Answer
from orion_triage.mission.decide import Rules
from orion_triage.mission.prompt import Coordinates, render_prompt
from orion_triage.mission.verdict import Verdict, answer_text
from orion_triage.report.render import notes
from orion_triage.runs.manifest import write_manifest
from orion_triage.runs.run import Run
from orion_triage.safe.files import sha256_of_file
from orion_triage.settings import load_settings
from tests.conftest import MISSION, REASONS

H, M, L = MISSION.names
SIZE = 256
TINTS = {H: (200, 60, 60), M: (60, 200, 60), L: (60, 60, 200)}
Thought = Callable[[Image.Image, Coordinates | None], tuple[str, float]]  # -> category, P(LOW) of a valuable frame


@dataclass
class Model:
    """Answers as `thought` says; the scores agree with the category."""

    thought: Thought
    batch_size = 16

    def answer(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[Answer]:
        return [self._one(image, _coordinates(prompt)) for image, prompt in zip(images, prompts, strict=True)]

    def _one(self, image: Image.Image, where: Coordinates | None) -> Answer:
        category, low = self.thought(image, where)
        scores = {H: (0.99 - low, 0.01, low), M: (0.01, 0.99 - low, low), L: (0.02, 0.03, 0.95)}[category]
        return Answer(answer_text(MISSION, Verdict(REASONS[category], category)), scores)


def _coordinates(prompt: str) -> Coordinates | None:
    found = re.search(r"Longitude: (-?[\d.]+), Latitude: (-?[\d.]+)\.", prompt)
    return Coordinates(float(found[1]), float(found[2].rstrip("."))) if found else None


def scene(number: int, category: str) -> Image.Image:
    """A frame whose colours say nothing of its category. Squares are drawn, written and read in a moment."""
    squares = np.random.default_rng(number).integers(20, 230, (16, 16, 3), dtype=np.uint8)
    return Image.fromarray(squares).resize((512, 512), Image.Resampling.NEAREST)


def tinted(number: int, category: str) -> Image.Image:
    """A frame whose category is its colour."""
    return Image.blend(scene(number, category), Image.new("RGB", (512, 512), TINTS[category]), 0.7)


def white(number: int, category: str) -> Image.Image:
    return Image.new("RGB", (512, 512), (250, 250, 250 - number % 3))


def anywhere(number: int, category: str) -> Coordinates:
    lon, lat = np.random.default_rng(number).uniform((-179, -80), (179, 80))
    return Coordinates(round(lon, 2), round(lat, 2))


def by_region(number: int, category: str) -> Coordinates:
    """Each category has a part of the world of its own."""
    return Coordinates(round(-150 + 120 * MISSION.names.index(category) + number / 10, 2), round(-60 + number / 2, 2))


@dataclass
class Frames:
    """A drawn dataset; `pixels` has what a model gets to see of each frame of a split, in the order of the records."""

    folder: Path
    records: dict[str, list[Record]]
    pixels: dict[str, list[bytes]]


def draw(
    folder: Path,
    test: int,
    picture: Callable[[int, str], Image.Image],
    place: Callable[[int, str], Coordinates],
) -> Frames:
    """30 frames for training, 30 for val, `test` for test, of each category by turns."""
    (folder / IMAGES_FOLDER).mkdir(parents=True)
    number, drawn = 0, Frames(folder, {}, {})
    for split, count in (("train", 30), ("val", 30), ("test", test)):
        records = []
        for index in range(count):
            category = MISSION.names[index % 3]
            name = f"{category.lower()}_{number:03d}"
            picture(number, category).save(folder / IMAGES_FOLDER / f"{name}.png", compress_level=1)
            verdict = Verdict(REASONS[category], category)
            record = Record(f"{IMAGES_FOLDER}/{name}.png", place(number, category), verdict, MISSION)
            records += [record, record.without_coordinates()] if split == "train" else [record]
            number += 1
        write_split(folder, split, records)
        drawn.records[split] = records
        opened = Dataset(folder, MISSION)
        drawn.pixels[split] = [opened.frame(record, SIZE).tobytes() for record in records] if split != "train" else []
    write_manifest(folder, stage="dataset", settings={}, inputs={}, seconds=1, figures={"source": "directory"})
    return drawn


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Frames]:
    """Datasets by (picture, place, number of test frames), each drawn once."""
    made: dict[Any, Frames] = {}

    def dataset(picture: Any = scene, place: Any = anywhere, test: int = 60) -> Frames:
        key = picture, place, test
        if key not in made:
            made[key] = draw(tmp_path_factory.mktemp("planted") / "dataset", test, picture, place)
        return made[key]

    return dataset


def looking(frames: Frames, wrong: int = 0, low: float = 0.02, uncertain: int = 0) -> Thought:
    """A model that knows the frames by their pixels, except `wrong` LOW frames of the test split; noise is HIGH to it.

    The first `uncertain` HIGH frames of val and of test have a P(LOW) of 0.4.
    """
    known, doubt = {}, set()
    for split in ("val", "test"):
        seen = list(zip(frames.records[split], frames.pixels[split], strict=True))
        mistaken = [pixels for record, pixels in seen if record.verdict.category == L][
            : wrong if split == "test" else 0
        ]
        doubt |= set([pixels for record, pixels in seen if record.verdict.category == H][:uncertain])
        known |= {pixels: M if pixels in mistaken else record.verdict.category for record, pixels in seen}
    return lambda image, where: (known.get(image.tobytes(), H), 0.4 if image.tobytes() in doubt else low)


def always_high(image: Image.Image, where: Coordinates | None) -> tuple[str, float]:
    return H, 0.02


def by_colour(image: Image.Image, where: Coordinates | None) -> tuple[str, float]:
    mean = np.asarray(image).mean(axis=(0, 1))
    return MISSION.names[int(np.argmax(mean))], 0.02


def by_map(image: Image.Image, where: Coordinates | None) -> tuple[str, float]:
    """The region's category; without coordinates the image does not help it."""
    return (MISSION.names[round((where.lon + 145) / 120)], 0.02) if where else (M, 0.02)


def blind(image: Image.Image, where: Coordinates | None) -> tuple[str, float]:
    """As good as by chance, whatever it is shown."""
    return MISSION.names[int(where.lat * 100) % 3 if where else 1], 0.02


def by_other_tower(frames: Frames) -> Thought:
    """What the language model was trained on reaches it in another form: it takes each frame for the next one."""
    records, pixels = frames.records["test"], frames.pixels["test"]
    known = {seen: other.verdict.category for seen, other in zip(pixels, [*records[1:], records[0]], strict=True)}
    return lambda image, where: (known.get(image.tobytes(), H), 0.02)


# What a model that is in every run answers to a dataset, asked once.
_ANSWERS: dict[tuple[Thought, Path], Path] = {}


def run_of(folder: Path, frames: Frames, thought: Thought, quantized: Thought | None = None) -> Run:
    """A finished run of a planted model; `quantized` is what it thinks from the quantization on."""
    run = Run(folder, load_settings("tiny", ["evaluate.batch_size=16", f"dataset.folder={frames.folder}"]))
    folder.mkdir()
    run.dataset.symlink_to(frames.folder)
    for stage in ("fine-tune", "fuse", "quantize"):
        product = run.product(stage)
        product.mkdir(parents=True)
        (product / PAIR).write_text("{}")
        write_manifest(product, stage=stage, settings={}, inputs={}, seconds=1)
    images = sorted({record.image for record in Dataset(run.dataset, MISSION).every_record()})
    run.vision_features.mkdir()
    vectors = np.random.default_rng(1).normal(size=(len(images), 4))
    np.savez(run.vision_features / features.FILE_NAME, images=np.array(images), vectors=vectors)
    write_manifest(run.vision_features, stage="vision features", settings={}, inputs={}, seconds=1)
    of_models = {"base": always_high, "quantized": quantized or thought, "constrained": quantized or thought}
    parity = {"parity": {"frames": 4, "largest_difference": 0.003, "agreement": 1.0}}
    for variant in wanted(run.settings):
        thinks, out = of_models.get(variant.name, thought), run.evaluation(variant.name)
        if known := _ANSWERS.get((thinks, frames.folder)):
            shutil.copytree(known, out, ignore=shutil.ignore_patterns("manifest.json"))
        else:
            ask(run, thinks, out)
            kept = frames.folder.with_name(f"answers-{len(_ANSWERS)}")
            _ANSWERS[thinks, frames.folder] = shutil.copytree(out, kept)
        measured = parity if variant.name == "F16" else {}
        write_manifest(out, stage=f"evaluate {variant.name}", settings={}, inputs={}, seconds=1, figures=measured)
    return run


def ask(run: Run, thought: Thought, out: Path) -> None:
    evaluate(
        Dataset(run.dataset, MISSION), run.split, Model(thought), out, run.settings.evaluate, SIZE, fingerprint="x"
    )


def outcome(verdict: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """The verdict, and the outcome of each criterion that is not met."""
    for row in verdict["criteria"]:
        assert bool(row["advice"]) == (row["outcome"] != "pass"), row
    return verdict["verdict"], {row["name"]: row["outcome"] for row in verdict["criteria"] if row["outcome"] != "pass"}


def verdict_of(run: Run) -> tuple[str, dict[str, str]]:
    return outcome(build_results(run)["verdict"])


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, frames: Callable[..., Frames]) -> Run:
    """A model that knows all frames but three LOW ones; it is unsure of six HIGH frames."""
    return run_of(tmp_path_factory.mktemp("good") / "run", frames(), looking(frames(), wrong=3, uncertain=6))


@pytest.fixture(scope="module")
def good_results(good: Run) -> dict[str, Any]:
    return build_results(good)


def test_a_good_model_flies(good_results: dict[str, Any]) -> None:
    assert outcome(good_results["verdict"]) == (FLY, {})
    assert len(good_results["verdict"]["criteria"]) == 14


@pytest.mark.parametrize("name", ["constant", "colour", "map", "blind"])
def test_a_model_that_does_not_look_does_not_fly(name: str, tmp_path: Path, frames: Callable[..., Frames]) -> None:
    thought = {"constant": always_high, "colour": by_colour, "map": by_map, "blind": blind}[name]
    drawn = {"colour": frames(tinted), "map": frames(place=by_region)}.get(name) or frames()
    verdict, outcomes = verdict_of(run_of(tmp_path / "run", drawn, thought))
    failed = {criterion for criterion, how in outcomes.items() if how == "fail"}
    assert verdict == DO_NOT_FLY
    expected = {
        "constant": {"better than always HIGH", "several answers", "looks at the image"},
        "colour": {"better than colour k-NN"},
        "map": {"better than coordinates k-NN", "several answers", "looks at the image", "trusts the image (D)"},
        "blind": {"looks at the image", "several answers"},
    }[name]
    assert expected <= failed, outcomes
    if name == "colour":  # it is right everywhere, but so is the histogram
        assert failed == expected


@pytest.mark.parametrize("fault", ["quantization", "tower"])
def test_a_pair_that_lost_what_was_learned_does_not_fly(
    fault: str, tmp_path: Path, frames: Callable[..., Frames]
) -> None:
    broken = blind if fault == "quantization" else by_other_tower(frames())
    verdict, outcomes = verdict_of(run_of(tmp_path / "run", frames(), looking(frames()), quantized=broken))
    assert (verdict, outcomes["quantization"]) == (DO_NOT_FLY, "fail")


def test_ten_frames_are_not_enough(tmp_path: Path, frames: Callable[..., Frames]) -> None:
    drawn = frames(test=10)
    verdict, outcomes = verdict_of(run_of(tmp_path / "run", drawn, looking(drawn)))
    assert verdict == NOT_ENOUGH
    assert {"test frames", "HIGH and MEDIUM lost", "quantization"} <= outcomes.keys()
    assert set(outcomes.values()) == {"open"}


def test_blank_frames_with_valuable_labels_do_not_fly(tmp_path: Path, frames: Callable[..., Frames]) -> None:
    verdict, outcomes = verdict_of(run_of(tmp_path / "run", frames(white), always_high))
    assert verdict == DO_NOT_FLY
    assert outcomes["blank rule"] == outcomes["HIGH and MEDIUM lost"] == "fail"
    assert outcomes["test frames"] == "open"


def test_a_threshold_that_loses_frames_does_not_fly_until_it_is_undone(
    good: Run, good_results: dict[str, Any], tmp_path: Path, frames: Callable[..., Frames]
) -> None:
    run = Run(shutil.copytree(good.folder, tmp_path / "run", symlinks=True), good.settings)
    on_val = replace(run, split="val")
    ask(on_val, looking(frames(), uncertain=6), on_val.evaluation("constrained"))
    assert threshold.lowest_threshold(
        predictions_in(on_val.evaluation("constrained"), MISSION), 0.4, MISSION
    ) == pytest.approx(0.4)
    with pytest.raises(OrionError, match="loses 0 of 20 HIGH and MEDIUM frames of val, within the limit of 40"):
        threshold.choose(on_val, 0.4, [])
    chosen = threshold.choose(on_val, 0.4, [], loosen=True)["there"]
    assert (chosen["lost"], chosen["saved"]) == (6, 0)
    results = build_results(run)
    assert outcome(results["verdict"]) == (
        DO_NOT_FLY, {"HIGH and MEDIUM lost": "fail", "HIGH found": "open"}
    )  # fmt: skip
    before, after = (results["models"][model]["B"] for model in ("no-threshold", "flight"))
    assert before == good_results["models"]["flight"]["B"]
    assert (before["irrecoverable_loss"]["count"], after["irrecoverable_loss"]["count"]) == (0, 6)
    assert after["value_curve"]["at"]["25%"] < before["value_curve"]["at"]["25%"]  # what is dropped is not sent
    assert [(row["model"], row["step"]) for row in results["variants"][-2:]] == [
        ("no-threshold", "the rule for blank frames"), ("flight", "the threshold"),
    ]  # fmt: skip
    assert threshold.undo(run) is None
    assert outcome(build_results(run)["verdict"]) == (FLY, {})


def test_what_was_not_measured_is_open(good: Run, tmp_path: Path) -> None:
    run = Run(shutil.copytree(good.folder, tmp_path / "run", symlinks=True), good.settings)
    shutil.rmtree(run.evaluation("F16"))
    expected = {"evaluated as it flies": "open", "llama.cpp as transformers": "open"}
    assert verdict_of(run) == (NOT_ENOUGH, expected)
    assert (camera("synthetic").outcome, camera("sentinel2").outcome) == ("open", "pass")


def test_a_failed_gate_does_not_fly_and_its_answers_do_not_count(good: Run, tmp_path: Path) -> None:
    run = Run(shutil.copytree(good.folder, tmp_path / "run", symlinks=True), good.settings)
    with pytest.raises(ParityError), variants._failure_recorded(run):  # as it is asked of a real llama.cpp in test_cli
        raise ParityError("They differ.", "Use another build.", "0.5 nats apart")
    results = build_results(run)
    assert outcome(results["verdict"]) == (DO_NOT_FLY, {"llama.cpp as transformers": "fail"})
    assert results["verdict"]["because"] == ["llama.cpp as transformers"]
    row = next(row for row in results["verdict"]["criteria"] if row["name"] == "llama.cpp as transformers")
    assert (row["measured"], row["advice"]) == ("0.5 nats apart", "They differ. Use another build.")
    assert "F16" not in results["models"]
    assert "F16" not in evaluated(run)
    assert (results["missing"], results["parity"]) == ([], None)
    assert any("The gate at F16 failed: They differ." in note for note in notes(results))


def judged(run: Run, results: dict[str, Any], *settings: str) -> tuple[str, dict[str, str]]:
    """The verdict on the same answers with other limits, and with the frame time that was measured last."""
    answers = {
        model: predictions_in(run.evaluation(model), MISSION) for model in ("fine-tuned", "quantized", "constrained")
    }
    answers["flight"] = as_flown(answers["constrained"], results["blank_frames"], Rules(), MISSION)
    needed = load_settings("tiny", settings).verdict
    measured = seconds_per_frame(run)
    return outcome(assess(results, answers, needed, MISSION, flight="flight", seconds_per_frame=measured))


def test_seconds_per_frame_count_where_a_budget_is_given(good: Run, good_results: dict[str, Any]) -> None:
    measured, pair = (
        '{"seconds_per_frame": %s, "processor": "A76", "pair_sha256": "%s"}',
        sha256_of_file(good.gguf / PAIR),
    )
    path = good.folder / BENCH_FILE
    for text, expected in (
        ("", (NOT_ENOUGH, {"seconds per frame": "open"})),
        (measured % (9.5, pair), (DO_NOT_FLY, {"seconds per frame": "fail"})),
        (measured % (1.5, pair), (FLY, {})),
        (measured % (1.5, "of another pair"), (NOT_ENOUGH, {"seconds per frame": "open"})),
    ):
        path.write_text(text) if text else path.unlink(missing_ok=True)
        assert judged(good, good_results, "verdict.largest_seconds_per_frame=2") == expected
    assert judged(good, good_results) == (FLY, {})
    path.unlink()


def test_the_limits_are_the_missions(good: Run, good_results: dict[str, Any]) -> None:
    for setting, name in (
        ("largest_irrecoverable_loss=0.05", "HIGH and MEDIUM lost"),
        ("smallest_frames_per_category=21", "test frames"),
        ("smallest_high_recall=0.9", "HIGH found"),
        ("largest_quantization_loss_points=2", "quantization"),
    ):
        assert judged(good, good_results, f"verdict.{setting}") == (NOT_ENOUGH, {name: "open"})
    _, outcomes = judged(good, good_results, "verdict.largest_share_of_one_answer=0.3")
    assert outcomes == {"several answers": "fail"}


def rate(count: int, total: int) -> dict[str, Any]:
    from orion_triage.evaluate.value import headline

    truth = np.zeros(total, dtype=np.int64)
    guess = np.array([2] * count + [0] * (total - count))
    found: dict[str, Any] = headline(truth, guess, [str(n) for n in range(len(truth))], MISSION)["irrecoverable_loss"]
    return found


@pytest.mark.parametrize(
    ("count", "total", "outcome", "advised"),
    [
        (0, 35, "pass", ""), (0, 34, "open", "About 35"), (1, 40, "open", "About"), (1, 60, "pass", ""),
        (5, 40, "fail", "orion threshold"), (4, 40, "open", "too near the limit"),
    ],
)  # fmt: skip
def test_a_loss_is_judged_by_its_upper_bound(count: int, total: int, outcome: str, advised: str) -> None:
    criterion = lost(rate(count, total), 0.10, "HIGH and MEDIUM")
    assert (criterion.outcome, advised in criterion.advice) == (outcome, True), criterion
    if advised == "About":  # at the advised number of frames, the same loss is shown
        more = int(criterion.advice.split()[1].replace(",", ""))
        assert lost(rate(round(count * more / total), more), 0.10, "HIGH and MEDIUM").outcome == "pass"


def test_a_baseline_is_beaten_failed_against_or_undecided() -> None:
    from orion_triage.evaluate.metrics import Prediction

    def compared(gained: int, dropped: int, same: int) -> str:
        said = {}
        rows = []
        for number in range(gained + dropped + same):
            right = number < gained or number >= gained + dropped
            rows.append(Prediction("B", f"f{number}", H, H if right else L))
            said[f"f{number}"] = "LOW" if number < gained else "HIGH"
        baseline = {"predictions": said, "right": dropped + same, "count": gained + dropped + same}
        return better_than("x", rows, baseline, load_settings("tiny").verdict, "advice").outcome

    assert compared(6, 0, 4) == "pass"
    assert compared(5, 0, 5) == "open"  # p = 0.06
    assert compared(15, 11, 34) == "open"
    assert compared(11, 11, 38) == "fail"
    assert compared(30, 20, 950) == "fail"  # at most 2.5 points better: not worth the seconds


def test_trust_in_coordinates_is_judged_over_places() -> None:
    """Six frames that stay right show it if they are of six places, and not if they are tiles of two."""

    def outcome(tiles: int, kept: int = 6, moved: int = 0, wrong_in_b: int = 0) -> str:
        said = ["HIGH"] * kept + ["LOW"] * (moved + wrong_in_b)
        rows = []
        for number, answer in enumerate(said):
            place, without = str(number // tiles), "LOW" if number >= kept + moved else "HIGH"
            rows.append(Prediction("D", f"{number}", "HIGH", answer, donor_category="LOW", place=place))
            rows.append(Prediction("B", f"{number}", "HIGH", without, place=place))
        rates = {"count": len(said), "trusted_vision": kept, "moved_to_coordinates": moved}
        return trusts_the_image(rates, rows, 0.05).outcome

    assert (outcome(1), outcome(3)) == ("pass", "open")
    assert outcome(1, kept=6, wrong_in_b=6) == "pass", "an error of vision counts for neither"
    assert outcome(1, kept=6, moved=6) == "fail"
    assert outcome(1, kept=6, moved=2) == "open"


def test_prompts_are_read_as_the_product_writes_them() -> None:
    assert _coordinates(render_prompt(MISSION, Coordinates(-120.62, 34.0))) == Coordinates(-120.62, 34.0)
    assert _coordinates(render_prompt(MISSION, None)) is None
