"""Continuing a finished adapter (fine_tune.continue_from), and training with labelled frames (fine_tune.frames)."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from orion_triage.dataset.dataset import Dataset
from orion_triage.dataset.labelled import Labelled, refuse_leaks, to_train, turned
from orion_triage.errors import OrionError
from orion_triage.imagery.frames import shrink
from orion_triage.mission.prompt import Coordinates
from orion_triage.mission.verdict import Verdict
from orion_triage.models.adapter import WEIGHTS_FILE
from orion_triage.pipeline import FINE_TUNE
from orion_triage.progress import silent
from orion_triage.runs.manifest import hash_inputs
from orion_triage.runs.run import Run
from orion_triage.safe.files import sha256_of_file
from orion_triage.settings import load_settings
from orion_triage.train import fine_tune
from orion_triage.train.remote import training_of
from tests.conftest import MISSION, orion, structured_picture
from tests.train.trainings import QUICK, InterruptionError, largest_difference, stop_at, tensors_of

ONE_EPOCH = QUICK.model_copy(update={"epochs": 1})


def frame(number: int, category: str = "LOW", where: Coordinates | None = None) -> Labelled:
    verdict = Verdict(f"Frame {number}.", category)
    return Labelled(f"{number}.png", verdict, where, Path(f"{number}.png"), structured_picture(500 + number))


def test_a_frame_is_trained_in_its_eight_orientations() -> None:
    picture = structured_picture(1)
    pixels = np.asarray(picture)
    expected = {np.rot90(side, quarter).tobytes() for side in (pixels, pixels[:, ::-1]) for quarter in range(4)}
    assert len(expected) == 8
    assert {one.tobytes() for one in turned(picture)} == expected
    placed = frame(1, where=Coordinates(3.25, 4.5))
    records, pictures = to_train([placed, frame(2, "HIGH")], MISSION, 256)
    assert {name: picture.size for name, picture in pictures.items()} == dict.fromkeys(pictures, (256, 256))
    assert len({picture.tobytes() for picture in pictures.values()}) == len(pictures) == 16
    assert [record.coordinates is None for record in records] == [False, True] * 8 + [True] * 8
    assert pictures[records[0].image].tobytes() == shrink(placed.image, 256).tobytes()
    assert [record.verdict.category for record in records] == ["LOW"] * 16 + ["HIGH"] * 8


def test_replay_draws_frames_of_each_category_with_both_records(small_dataset: Path) -> None:
    records = Dataset(small_dataset, MISSION).records("train")
    assert fine_tune.replayed(records, None, 42) == records
    kept = fine_tune.replayed(records, 0.5, 42)
    assert len(kept) == 12
    assert [record.verdict.category for record in kept].count("HIGH") == 4
    assert {record.image for record in kept if record.coordinates} == {r.image for r in kept if not r.coordinates}
    assert fine_tune.replayed(records, 0.5, 42) == kept != fine_tune.replayed(records, 0.5, 43)
    assert fine_tune.replayed(records, 0.0, 42) == []


def continued(
    base: Path, dataset: Path, out: Path, parent: Path | None, labelled: list[Labelled], **changes: Any
) -> dict[str, Any]:
    settings = ONE_EPOCH.model_copy(update=changes)
    data = Dataset(dataset, MISSION)
    return fine_tune.run(
        base, data, out, out.with_name(f"{out.name}-work"), settings, 256, labelled=labelled, parent=parent
    )


def test_training_goes_on_from_the_weights_of_the_adapter(
    small_base: Path, few: Path, small_adapter: Path, tmp_path: Path
) -> None:
    frames = [frame(0, "HIGH"), frame(1)]
    still = continued(small_base, few, tmp_path / "still", small_adapter, frames, learning_rate=1e-12, replay=0.5)
    assert (still["labelled_frames"], still["replayed_records"], still["train_records"]) == (2, 2, 2 + 16)
    before, after = tensors_of(small_adapter), tensors_of(tmp_path / "still")
    assert before.keys() == after.keys()
    assert max(float((before[key] - after[key]).abs().max()) for key in before) < 1e-6
    sha256 = sha256_of_file(small_adapter / WEIGHTS_FILE)
    assert still["continued_from"] == sha256
    assert f"continued from {small_adapter}, weights {sha256[:12]}" in still["notes"]
    assert json.loads((tmp_path / "still" / "base.json").read_text())["continued_from"] == sha256
    moved = continued(small_base, few, tmp_path / "moved", small_adapter, frames, replay=0.5)
    after = tensors_of(tmp_path / "moved")
    assert min(float((before[key] - after[key]).abs().max()) for key in before) > 1e-4
    assert moved["first_loss"] == pytest.approx(still["first_loss"], abs=1e-3), "the first step sees the same weights"
    anew = continued(small_base, few, tmp_path / "anew", None, frames, replay=0.5)
    assert anew["first_loss"] > moved["first_loss"] + 0.5
    assert "continued_from" not in anew


def test_an_interrupted_continuation_goes_on_from_its_own_checkpoint(
    small_base: Path, few: Path, small_adapter: Path, tmp_path: Path
) -> None:
    frames = [frame(0), frame(1, "HIGH")]

    def train(name: str, progress: Any = silent) -> dict[str, Any]:
        data, work = Dataset(few, MISSION), tmp_path / ("straight" if name == "straight" else "work")
        return fine_tune.run(
            small_base, data, tmp_path / name, work, QUICK.model_copy(update={"replay": 0.5}), 256,
            progress, labelled=frames, parent=small_adapter,
        )  # fmt: skip

    straight = train("straight")
    half = straight["steps"] // 2
    with pytest.raises(InterruptionError):
        train("resumed", stop_at(half + 1))
    assert train("resumed")["resumed_from_step"] == half
    assert largest_difference(*(tensors_of(tmp_path / name) for name in ("straight", "resumed"))) < 1e-4
    frames = frames[:1]
    with pytest.raises(InterruptionError):  # before the first step: other frames are another training
        train("fewer", stop_at(0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 8}, r"fine_tune\.rank is 8, and 16 there"),
        ({"alpha": 16}, r"fine_tune\.alpha is 16, and 32 there"),
        (
            {"target_modules": ("q_proj", "v_proj")},
            "it is on k_proj, out_proj, q_proj, v_proj, and the settings say q_proj, v_proj",
        ),
        ({"scope": "language-attention"}, "in other layers"),
    ],
)
def test_what_differs_from_the_adapter_is_refused_by_name(
    small_base: Path, small_dataset: Path, small_adapter: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(OrionError, match=message):
        continued(small_base, small_dataset, tmp_path / "out", small_adapter, [], **changes)
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_base_or_frame_size_is_refused(
    small_base: Path, other_base: Path, small_dataset: Path, small_adapter: Path, tmp_path: Path
) -> None:
    with pytest.raises(OrionError, match="is an adapter of another base"):
        continued(other_base, small_dataset, tmp_path / "out", small_adapter, [])
    with pytest.raises(OrionError, match=r"must contain adapter_config\.json"):
        continued(small_base, small_dataset, tmp_path / "out", small_dataset, [])
    with pytest.raises(OrionError, match="was trained on frames of 256 px"):
        data = Dataset(small_dataset, MISSION)
        fine_tune.run(small_base, data, tmp_path / "out", tmp_path / "w", ONE_EPOCH, 384, parent=small_adapter)


def test_frames_of_val_and_test_are_refused_in_any_orientation(small_dataset: Path) -> None:
    data = Dataset(small_dataset, MISSION)
    refuse_leaks([frame(0), frame(1)], data)
    own = data.frame(data.records("test")[0], 512)
    turn = Labelled("mine.png", Verdict("x", "LOW"), None, Path("mine.png"), own.transpose(Image.Transpose.ROTATE_90))
    with pytest.raises(OrionError, match=r"place_18\.png has the same pixels as mine\.png"):
        refuse_leaks([frame(0), turn], data)
    darker = Image.fromarray((np.asarray(own) * 0.8).astype(np.uint8))
    with pytest.raises(OrionError, match=r"place_18\.png looks like mine\.png"):
        refuse_leaks([Labelled("mine.png", Verdict("x", "LOW"), None, Path("mine.png"), darker)], data)
    where = data.records("val")[0].coordinates
    assert where is not None
    with pytest.raises(OrionError, match="less than the width of a frame"):
        refuse_leaks([frame(0, where=Coordinates(where.lon, round(where.lat + 0.02, 2)))], data)


def test_settings_name_the_adapter_and_the_frames(small_adapter: Path, tmp_path: Path) -> None:
    """They are inputs of the stage, which runs again if they change; without them it has the inputs of before."""
    run = Run(tmp_path / "run", load_settings("tiny", [f"fine_tune.continue_from={small_adapter}"]))
    run.dataset.mkdir(parents=True)
    assert hash_inputs(FINE_TUNE.inputs(run))["adapter"] == hash_inputs({"x": small_adapter})["x"]
    own = Run(tmp_path / "run", load_settings("tiny", [f"fine_tune.continue_from={tmp_path / 'run'}"]))
    shutil.copytree(small_adapter, own.adapter)
    with pytest.raises(OrionError, match="is the adapter that this training would replace"):
        FINE_TUNE.inputs(own)
    plain = Run(tmp_path / "run", load_settings("tiny"))
    assert set(FINE_TUNE.inputs(plain)) == {"base", "dataset"}
    assert not {"continue_from", "frames", "replay"} & FINE_TUNE.settings_of(plain.settings)["fine_tune"].keys()
    with pytest.raises(OrionError, match="replay=0 leaves nothing to train"):
        load_settings("tiny", ["fine_tune.replay=0"])
    for setting in ("fine_tune.frames=mine", "fine_tune.continue_from=runs/tiny"):
        with pytest.raises(OrionError, match="is a folder of this machine"):
            training_of("tiny", [setting], "run", load_settings("tiny", [setting]))


def with_labelled_frames(two_seeds: Path, copy: Path) -> Path:
    """A copy of a finished run's folder, with six labelled frames in the folder `mine`."""
    shutil.copytree(two_seeds, copy)
    for number in range(6):
        category = MISSION.names[number % 3]
        (copy / "mine" / category).mkdir(parents=True, exist_ok=True)
        structured_picture(700 + number).save(copy / "mine" / category / f"{number}.png", compress_level=1)
    return copy


@pytest.mark.slow
def test_fine_tune_continues_a_run_through_the_command_line(two_seeds: Path, tmp_path: Path) -> None:
    copy = with_labelled_frames(two_seeds, tmp_path / "copy")
    words = ["fine-tune", "--run", "runs/next", "--from", "runs/small", "--frames", "mine"]
    words += ["--set", "fine_tune.replay=0.2"]
    done = orion(*words, cwd=copy)
    assert done.returncode == 0, done.stderr
    assert "continued from runs/small/orion_lora_weights, weights " in done.stderr
    before, now = (json.loads((copy / f"runs/{name}/settings.json").read_text()) for name in ("small", "next"))
    assert now["base"] == before["base"]
    assert now["fine_tune"] == before["fine_tune"] | {"continue_from": "runs/small", "frames": "mine", "replay": 0.2}
    made = json.loads((copy / "runs/next/orion_lora_weights/manifest.json").read_text())
    assert made["figures"]["continued_from"] == sha256_of_file(copy / "runs/small/orion_lora_weights" / WEIGHTS_FILE)
    assert made["figures"]["labelled_frames"] == 6
    assert {"adapter", "frames", "base", "dataset"} == made["inputs"].keys()
    assert "unchanged, skipped" in orion(*words, cwd=copy).stderr
    test = json.loads((copy / "runs/next/dataset/test_dataset.jsonl").read_text().splitlines()[0])["image"]
    shutil.copy(copy / "runs/next/dataset" / test, copy / "mine" / "LOW" / "leak.png")
    refused = orion(*words, cwd=copy)
    assert (refused.returncode, "frames of the val and test splits are among" in refused.stderr) == (1, True)


@pytest.mark.llama_cpp
@pytest.mark.slow
def test_adapt_continues_a_run_and_says_what_it_is_worth(two_seeds: Path, tmp_path: Path) -> None:
    """Two folds and the whole chain on all frames; then the same again, for which nothing is trained."""
    copy = with_labelled_frames(two_seeds, tmp_path / "copy")
    words = ["adapt", "mine", "--run", "runs/small", "--folds", "2"]
    done = orion(*words, "--how", "continue", "--json", cwd=copy)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["folds"] == 2
    assert figures["continued"]["total"] == 6
    assert figures["continued"]["count"] == sum(
        figures["answers_of_continued"][f"{MISSION.names[n % 3]}/{n}.png"] == MISSION.names[n % 3] for n in range(6)
    )
    assert set(figures["change_of_continued"]) == {"zero_shot", "constant", "head_on_its_folds"}
    assert "on the run's own test frames, the quantized pair before and after: A " in done.stderr
    assert not (copy / "runs/small/head.json").exists()
    after = copy / "runs/small-continued"
    assert set(json.loads((after / "adapted.json").read_text())["forgotten"]) >= {"A", "B"}
    made = json.loads((after / "orion_lora_weights/manifest.json").read_text())
    assert made["figures"]["continued_from"] == sha256_of_file(copy / "runs/small/orion_lora_weights" / WEIGHTS_FILE)
    assert made["settings"]["fine_tune"]["continue_from"] == "runs/small"
    triaged = orion("triage", "mine", "--recursive", "--run", "runs/small-continued", "--json", cwd=copy)
    assert len(json.loads(triaged.stdout)) == 6
    again = orion("adapt", "mine", "--how", "continue", cwd=copy)  # the newest run is the one that this made
    assert again.returncode == 1
    assert (
        "the newest run, runs/small-continued, was made by continuing runs/small with the frames of mine"
        in again.stderr
    )
    assert "--run runs/small, or --run runs/small-continued" in again.stderr
    folds = {path: path.stat().st_mtime_ns for path in (copy / "runs/small/adapt_folds").iterdir()}
    assert [path.name for path in sorted(folds)] == ["fold-0.json", "fold-1.json"]
    both = orion(*words, "--how", "both", cwd=copy)
    assert both.returncode == 0, both.stderr
    assert {path: path.stat().st_mtime_ns for path in folds} == folds
    chosen = figures["chosen"] == "continued"
    assert (copy / "runs/small/head.json").exists() != chosen
    assert "From the head to the continued adapter in the same 2 folds, " in both.stdout
