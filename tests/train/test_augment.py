"""train/augment.py: which frames a training sees changed, and that nothing but frame, epoch and seed decides it."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from orion_triage.dataset.dataset import Dataset
from orion_triage.dataset.records import read_split
from orion_triage.errors import OrionError
from orion_triage.imagery.frames import CAMERA_SIZE, shrink
from orion_triage.imagery.stress import STRENGTHS, chosen, stressed
from orion_triage.models.load import load_processor
from orion_triage.pipeline import FINE_TUNE
from orion_triage.progress import silent
from orion_triage.settings import FineTuneSettings, load_settings
from orion_triage.train import fine_tune
from orion_triage.train.augment import Augmentation
from orion_triage.train.trainer import collator
from tests.conftest import MISSION, structured_picture
from tests.train.trainings import QUICK, InterruptionError, largest_difference, stop_at, tensors_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*checkpointing.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Paged optimizers:UserWarning"),
]
KINDS = chosen(["haze", "exposure", "partial"])
NAMES = [f"frame_{number:03d}" for number in range(80)]


def augmentation(names: list[str], seed: int = 42) -> Augmentation:
    picture = structured_picture(1)
    return Augmentation(dict.fromkeys(names, picture), KINDS, 64, seed)


def test_half_of_the_frames_are_changed_by_each_stress_at_each_strength() -> None:
    changer, picture = augmentation(NAMES), structured_picture(1)
    found = {name: frame for name in NAMES if (frame := changer.frame(name))}
    assert 28 <= len(found) <= 52
    assert {frame.size for frame in found.values()} == {(64, 64)}
    kinds = Counter(
        (stress.name, strength)
        for name, frame in found.items()
        for stress in KINDS
        for strength in STRENGTHS
        if frame.tobytes() == shrink(stressed(picture, stress, strength, f"{name}/42/0"), 64).tobytes()
    )
    assert len(kinds) >= 7, "each stress at each strength, of about 40 frames"
    assert sum(kinds.values()) == len(found), "each is changed by exactly one of them"


def test_frame_epoch_and_seed_alone_decide() -> None:
    first, second = augmentation(NAMES), augmentation(NAMES)
    assert [pixels(first.frame(name)) for name in NAMES] == [pixels(second.frame(name)) for name in NAMES[::-1]][::-1]
    before = [pixels(first.frame(name)) for name in NAMES]
    first.set_epoch(1)
    after = [pixels(first.frame(name)) for name in NAMES]
    changed = sum(one != other for one, other in zip(before, after, strict=True))
    assert changed > 40, "another epoch is another choice"
    first.set_epoch(0)
    assert [pixels(first.frame(name)) for name in NAMES] == before
    assert [pixels(augmentation(NAMES, seed=43).frame(name)) for name in NAMES] != before


def pixels(frame: Image.Image | None) -> bytes:
    return frame.tobytes() if frame else b""


def test_frames_that_are_not_trained_on_stay_as_they_are() -> None:
    changer = augmentation(NAMES)
    assert [changer.frame(f"val_{number}") for number in range(50)] == [None] * 50


def test_a_batch_has_the_changed_frames_and_encodes_each_once(small_base: Path, small_dataset: Path) -> None:
    records = read_split(small_dataset, "train", MISSION)
    dataset, processor = Dataset(small_dataset, MISSION), load_processor(small_base, 256)
    frames = fine_tune.decode_frames(dataset, records, 256, silent)
    camera = fine_tune.decode_frames(dataset, records, CAMERA_SIZE, silent)
    changer = Augmentation(camera, KINDS, 256, 42)
    changed = [record for record in records if changer.frame(record.image)]
    alike = [record for record in records if not changer.frame(record.image)]
    assert changed
    assert alike
    plain, other = collator(processor, frames), collator(processor, frames, None, changer)
    assert (plain(alike)["pixel_values"] == other(alike)["pixel_values"]).all()
    assert (plain(changed)["input_ids"] == other(changed)["input_ids"]).all()
    before, after = plain(changed)["pixel_values"], other(changed)["pixel_values"]
    images = len({record.image for record in changed})
    assert after.shape == before.shape
    assert len(after) == images < len(changed), "the two records of a frame share it"
    assert all((one != two).any() for one, two in zip(before, after, strict=True))
    changer.set_epoch(1)
    assert (other(changed)["pixel_values"] != after).any()


def test_a_resumed_training_sees_what_a_straight_one_sees(
    small_base: Path, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, str]] = []
    frame = Augmentation.frame

    def watched(self: Augmentation, name: str) -> Image.Image | None:
        seen.append((self._epoch, name))  # counted, and done as before
        return frame(self, name)

    monkeypatch.setattr(Augmentation, "frame", watched)
    plain = QUICK.model_copy(update={"micro_batch_size": 4})
    changed = plain.model_copy(update={"augment": ("haze", "partial")})

    def train(out: str, work: str, progress: Any = silent, settings: FineTuneSettings = changed) -> list[float]:
        figures = fine_tune.run(
            small_base, Dataset(few, MISSION), tmp_path / out, tmp_path / work, settings, 256, progress
        )
        return list(figures["eval_losses"])

    straight = train("a", "straight")
    assert {epoch for epoch, _ in seen} == {0, 1}
    of_second = {name for epoch, name in seen if epoch == 1 and name.startswith("orion")}
    with pytest.raises(InterruptionError):
        train("b", "cut", stop_at(3))  # in the second epoch
    seen.clear()
    resumed = train("b", "cut")
    assert {name for epoch, name in seen if epoch == 1} >= of_second
    assert {epoch for epoch, name in seen if name in of_second} <= {0, 1}
    assert resumed == pytest.approx(straight, abs=1e-4)
    train("without", "plain", settings=plain)
    assert largest_difference(tensors_of(tmp_path / "a"), tensors_of(tmp_path / "without")) > 1e-3
    assert largest_difference(tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")) < 1e-4


def test_a_share_of_the_training_prompts_has_the_coordinates_of_another_place(
    small_base: Path, small_dataset: Path
) -> None:
    records = read_split(small_dataset, "train", MISSION)
    places = {record.image: record.coordinates for record in records if record.coordinates}
    told = Augmentation({}, (), 256, 42, None, 0.2, places)
    own = [record for record in records if record.coordinates]
    wrong = 0
    for epoch in range(100):
        told.set_epoch(epoch)
        for record in own:
            asked = told.as_asked(record)
            assert (asked.image, asked.verdict) == (record.image, record.verdict)
            if asked != record:
                wrong += 1
                assert asked.coordinates in places.values()
    assert wrong / (100 * len(own)) == pytest.approx(0.2, abs=0.03)
    assert all(told.as_asked(record) is record for record in records if record.coordinates is None)
    val = read_split(small_dataset, "val", MISSION)
    every = Augmentation({}, (), 256, 42, None, 1.0, places)
    assert all(every.as_asked(record) is record for record in val), "only training records"
    assert all(every.as_asked(record).coordinates != record.coordinates for record in own)
    frames = fine_tune.decode_frames(Dataset(small_dataset, MISSION), records, 256, silent)
    processor = load_processor(small_base, 256)
    asked = [every.as_asked(record) for record in own[:4]]
    found, expected = collator(processor, frames, None, every)(own[:4]), collator(processor, frames)(asked)
    assert (found["input_ids"] == expected["input_ids"]).all()
    assert (found["pixel_values"] == expected["pixel_values"]).all()


def test_a_stress_that_does_not_exist_is_named(small_base: Path, small_dataset: Path, tmp_path: Path) -> None:
    settings = QUICK.model_copy(update={"augment": ("hase",)})
    with pytest.raises(OrionError, match="no stress 'hase'; the nearest name is haze"):
        fine_tune.run(small_base, Dataset(small_dataset, MISSION), tmp_path / "a", tmp_path / "work", settings, 256)
    assert not list(tmp_path.iterdir())


def test_adapters_of_before_the_setting_stay_current() -> None:
    settings = load_settings("tiny")
    assert "augment" not in FINE_TUNE.settings_of(settings)["fine_tune"]
    named = load_settings("tiny", ["fine_tune.augment=haze, partial"])
    assert FINE_TUNE.settings_of(named)["fine_tune"]["augment"] == ["haze", "partial"]
    assert named.fine_tune.augment == ("haze", "partial")


def test_the_noise_of_an_epoch_is_its_own() -> None:
    """A stress with a random part draws another one in each epoch, not that of the evaluation."""
    picture = structured_picture(3)
    changer = Augmentation({"x": picture}, chosen(["noise"]), CAMERA_SIZE, 42)
    frames = []
    for epoch in range(40):
        changer.set_epoch(epoch)
        if frame := changer.frame("x"):
            frames.append(np.asarray(frame).tobytes())
    assert len(set(frames)) == len(frames) > 10
