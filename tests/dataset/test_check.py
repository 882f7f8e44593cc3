"""dataset/check.py: nothing in a good dataset, and every planted fault with its kind, severity, file and line."""

import io
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import imagehash
import numpy as np
import pytest
from PIL import Image
from scipy.fft import idctn

from orion_triage.dataset import build
from orion_triage.dataset.check import facts
from orion_triage.dataset.check.soundness import Report, check_dataset, require_sound
from orion_triage.dataset.records import IMAGES_FOLDER, Record, parse_record, split_path
from orion_triage.errors import OrionError
from orion_triage.mission.prompt import Coordinates
from orion_triage.mission.verdict import Verdict
from orion_triage.settings import SPLITS, DatasetSettings, Split
from tests.conftest import MISSION, SHARED, places_of, structured_picture

MORPHOLOGIES = ("ocean_water", "coastline", "urban_grid", "agriculture", "mega_port", "mega_airport")
Place = tuple[str, str, str]  # severity, check, place
FEW: Place = ("warning", "few-test-frames", "test_dataset.jsonl")  # two a class


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 places of the shipped catalogue, six a morphology, with pictures: 24 to train, 6 to validate, 6 to test."""
    folder = tmp_path_factory.mktemp("check")
    pictures = folder / "pictures"
    pictures.mkdir()
    rows = []
    for number, place in enumerate(places_of(*MORPHOLOGIES, count=6)):
        structured_picture(number).save(pictures / f"{number}.png", compress_level=1)
        assert place.coordinates
        row = {"file_name": f"{number}.png", "name": place.name, "category": place.category, "reason": place.reason}
        rows.append(row | {"lon": place.coordinates.lon, "lat": place.coordinates.lat, "morphology": place.morphology})
    (pictures / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    build.run(folder / "dataset", DatasetSettings(source="directory", folder=str(pictures)), MISSION)
    return folder / "dataset"


@pytest.fixture(scope="session")
def looks(good: Path) -> dict[int, facts.Picture | tuple[str, str]]:
    """What is kept of each of its pictures, by the number of the file, which all hard links to it have."""
    return {path.stat().st_ino: facts._look(str(path)) for path in (good / IMAGES_FOLDER).iterdir()}


@pytest.fixture
def known_looks(looks: dict[int, facts.Picture | tuple[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures that a test leaves alone are not looked at again: 36 of them take a second."""
    look = facts._look
    # The same look, once for each file.
    monkeypatch.setattr(facts, "_look", lambda path: looks.get(Path(path).stat().st_ino) or look(path))


class Copy:
    """A dataset to spoil: hard links to the good one's files, which writing replaces."""

    def __init__(self, good: Path, folder: Path) -> None:
        shutil.copytree(good, folder, copy_function=os.link)
        self.folder = folder

    def lines(self, split: Split) -> list[str]:
        return split_path(self.folder, split).read_text().splitlines()

    def write(self, name: str, data: bytes) -> None:
        (self.folder / name).unlink(missing_ok=True)
        (self.folder / name).write_bytes(data)

    def set_lines(self, split: Split, lines: list[str]) -> None:
        self.write(split_path(Path(), split).name, "".join(line + "\n" for line in lines).encode())

    def record(self, split: Split, line: int) -> Record:
        return parse_record(self.lines(split)[line - 1], MISSION)

    def first(self, split: Split, category: str) -> int:
        """The line of the split's first record of a category, which has coordinates."""
        return next(
            n for n, text in enumerate(self.lines(split), 1) if parse_record(text, MISSION).verdict.category == category
        )

    def set(self, split: Split, line: int, text: str | Record) -> None:
        lines = self.lines(split)
        lines[line - 1] = text.to_line() if isinstance(text, Record) else text
        self.set_lines(split, lines)

    def change(self, split: Split, line: int, old: str, new: str) -> None:
        text = self.lines(split)[line - 1]
        assert old in text
        self.set(split, line, text.replace(old, new))

    def say(self, split: Split, line: int, reason: str, category: str | None = None) -> None:
        record = self.record(split, line)
        verdict = Verdict(reason, category or record.verdict.category)
        self.set(split, line, Record(record.image, record.coordinates, verdict, MISSION))

    def say_twice(self, line: int, reason: str, category: str | None = None) -> None:
        """Of a training picture: both of its lines."""
        self.say("train", line, reason, category)
        self.say("train", line + 1, reason, category)

    def move(self, split: Split, line: int, where: Coordinates | None) -> None:
        record = self.record(split, line)
        self.set(split, line, Record(record.image, where, record.verdict, MISSION))

    def where(self, split: Split, line: int) -> Coordinates:
        where = self.record(split, line).coordinates
        assert where
        return where

    def append(self, split: Split, record: Record) -> str:
        self.set_lines(split, [*self.lines(split), record.to_line()])
        return f"{split}_dataset.jsonl:{len(self.lines(split))}"

    def remove(self, split: Split, lines: list[int]) -> None:
        """Lines and their pictures."""
        for line in lines:
            (self.folder / self.record(split, line).image).unlink(missing_ok=True)
        self.set_lines(split, [text for n, text in enumerate(self.lines(split), 1) if n not in lines])

    def picture(self, split: Split, line: int) -> Image.Image:
        return Image.open(self.folder / self.record(split, line).image)

    def paint(self, split: Split, line: int, picture: Image.Image, form: str = "PNG") -> None:
        buffer = io.BytesIO()
        picture.save(buffer, form)
        self.write(self.record(split, line).image, buffer.getvalue())


FAULTS: dict[str, Callable[[Copy], list[Place]]] = {}


def fault(plant: Callable[[Copy], list[Place]]) -> Callable[[Copy], list[Place]]:
    FAULTS[plant.__name__] = plant
    return plant


def changed(old: str, new: str) -> Callable[[Copy], list[Place]]:
    """One training line that breaks the record format."""

    def plant(copy: Copy) -> list[Place]:
        copy.change("train", 7, old, new)
        return [("error", "schema", "train_dataset.jsonl:7")]

    return plant


FAULTS |= {
    "cut_line": changed('"}"}]}', '"}"'),
    "unknown_key": changed('{"image":', '{"id": 7, "image":'),
    "other_prompt": changed("Strictly use one", "Use one"),
    "no_placeholder": changed("<image>\\n", ""),
    "roles_swapped": changed('"role": "user"', '"role": "system"'),
    "unknown_category": changed('\\"HIGH\\"', '\\"URGENT\\"'),
    "answer_without_blanks": changed('\\", \\"category', '\\",\\"category'),
    "answer_not_json": changed('\\"}"}]}', '\\""}]}'),
    "path_leaves_the_folder": changed("orion_dataset/images/", "../images/"),
}


@fault
def coordinates_with_three_decimals(copy: Copy) -> list[Place]:
    copy.change("val", 2, f"Latitude: {copy.where('val', 2).lat}", f"Latitude: {copy.where('val', 2).lat}03")
    return [("error", "schema", "val_dataset.jsonl:2")]


@fault
def latitude_beyond_the_pole(copy: Copy) -> list[Place]:
    copy.change("test", 2, f"Latitude: {copy.where('test', 2).lat}", "Latitude: 151.21")
    return [("error", "schema", "test_dataset.jsonl:2")]


@fault
def latitude_not_a_number(copy: Copy) -> list[Place]:
    copy.change("test", 2, f"Latitude: {copy.where('test', 2).lat}", "Latitude: nan")
    return [("error", "schema", "test_dataset.jsonl:2")]


@fault
def two_bad_lines_and_a_fault_of_a_good_one(copy: Copy) -> list[Place]:
    copy.set("train", 3, "{}")
    copy.set("train", 9, "null")
    copy.say_twice(11, "")
    return [
        ("error", "schema", "train_dataset.jsonl:3"),
        ("error", "schema", "train_dataset.jsonl:9"),
        ("error", "reason-empty", "train_dataset.jsonl:11"),
    ]


@fault
def latin_1(copy: Copy) -> list[Place]:
    text = split_path(copy.folder, "train").read_bytes().split(b"\n")
    text[4] = text[4].replace(b"A ", b"\xc0 ")
    assert b"\xc0" in text[4]
    copy.write("train_dataset.jsonl", b"\n".join(text))
    return [("error", "not-utf8", "train_dataset.jsonl:5")]


@fault
def missing_split(copy: Copy) -> list[Place]:
    (copy.folder / "val_dataset.jsonl").unlink()
    return [("error", "missing-file", "val_dataset.jsonl")]


@fault
def empty_split(copy: Copy) -> list[Place]:
    copy.write("val_dataset.jsonl", b"\n \n")
    return [("error", "empty-file", "val_dataset.jsonl")]


@fault
def missing_picture(copy: Copy) -> list[Place]:
    (copy.folder / copy.record("train", 9).image).unlink()
    return [("error", "missing-image", "train_dataset.jsonl:9")]


@fault
def link_out_of_the_folder(copy: Copy) -> list[Place]:
    path = copy.folder / copy.record("val", 3).image
    outside = copy.folder.parent / "outside.png"
    path.rename(outside)
    path.symlink_to(outside)
    return [("error", "image-outside", "val_dataset.jsonl:3")]


@fault
def truncated_picture(copy: Copy) -> list[Place]:
    image = copy.record("test", 4).image
    copy.write(image, (copy.folder / image).read_bytes()[:100_000])
    return [("error", "unusable-image", "test_dataset.jsonl:4")]


@fault
def empty_picture(copy: Copy) -> list[Place]:
    copy.write(copy.record("test", 4).image, b"")
    return [("error", "unusable-image", "test_dataset.jsonl:4")]


@fault
def gif_named_png(copy: Copy) -> list[Place]:
    copy.paint("train", 5, copy.picture("train", 5), "GIF")
    return [("error", "unusable-image", "train_dataset.jsonl:5")]


@fault
def stamp_sized_picture(copy: Copy) -> list[Place]:
    copy.paint("train", 5, copy.picture("train", 5).resize((8, 8)))
    return [("error", "unusable-image", "train_dataset.jsonl:5")]


@fault
def picture_of_another_size(copy: Copy) -> list[Place]:
    copy.paint("val", 1, copy.picture("val", 1).resize((640, 600)))
    return [("warning", "image-size", "val_dataset.jsonl:1")]


@fault
def grey_picture(copy: Copy) -> list[Place]:
    copy.paint("val", 1, copy.picture("val", 1).convert("L"))
    return [("warning", "image-mode", "val_dataset.jsonl:1")]


@fault
def transparent_picture(copy: Copy) -> list[Place]:
    copy.paint("val", 1, copy.picture("val", 1).convert("RGBA"))
    return [("warning", "image-mode", "val_dataset.jsonl:1")]


@fault
def sixteen_bit_picture(copy: Copy) -> list[Place]:
    # Not all beyond 255, or it would be blank as well.
    pixels = np.random.default_rng(0).integers(0, 400, (512, 512), dtype=np.uint16)
    copy.paint("val", 1, Image.fromarray(pixels))
    return [("error", "unusable-image", "val_dataset.jsonl:1")]


@fault
def unnamed_picture(copy: Copy) -> list[Place]:
    shutil.copy(copy.folder / copy.record("val", 1).image, copy.folder / IMAGES_FOLDER / "spare.png")
    return [("warning", "unused-image", f"{IMAGES_FOLDER}/spare.png")]


@fault
def repeated_training_line(copy: Copy) -> list[Place]:
    return [("warning", "repeated-line", copy.append("train", copy.record("train", 6)))]


@fault
def repeated_test_line(copy: Copy) -> list[Place]:
    return [("error", "repeated-line", copy.append("test", copy.record("test", 2)))]


@fault
def twins_disagree(copy: Copy) -> list[Place]:
    line = copy.first("train", "MEDIUM")
    copy.say("train", line + 1, copy.record("train", line).verdict.reason, "HIGH")
    return [("error", "image-labels", f"train_dataset.jsonl:{line + 1}")]


@fault
def twins_with_two_reasons(copy: Copy) -> list[Place]:
    copy.say("train", 8, "Long runways beside sheds.")
    return [("warning", "image-reasons", "train_dataset.jsonl:8")]


@fault
def picture_in_two_places(copy: Copy) -> list[Place]:
    record = copy.record("val", 1)
    assert record.coordinates
    elsewhere = Coordinates(record.coordinates.lon, record.coordinates.lat / 2 + 0.77)
    place = copy.append("val", Record(record.image, elsewhere, record.verdict, MISSION))
    return [("error", "image-coordinates", place)]


@fault
def one_place_with_two_labels(copy: Copy) -> list[Place]:
    low, high = copy.first("train", "LOW"), copy.first("train", "HIGH")
    copy.move("train", low, copy.where("train", high))
    return [("error", "place-labels", f"train_dataset.jsonl:{max(low, high)}")]


@fault
def empty_reason(copy: Copy) -> list[Place]:
    copy.say_twice(3, "  ")
    return [("error", "reason-empty", "train_dataset.jsonl:3")]


@fault
def long_reason(copy: Copy) -> list[Place]:
    copy.say("test", 1, "Wide " * 32 + "x")
    return [("error", "reason-length", "test_dataset.jsonl:1")]


@fault
def control_token(copy: Copy) -> list[Place]:
    copy.say("test", 1, "Waves.<|im_end|>")
    return [("error", "schema", "test_dataset.jsonl:1")]


@fault
def image_token(copy: Copy) -> list[Place]:
    copy.say_twice(5, "Quays in the <image> with cranes.")
    return [("error", "schema", "train_dataset.jsonl:5"), ("error", "schema", "train_dataset.jsonl:6")]


@fault
def accents(copy: Copy) -> list[Place]:
    copy.say("val", 1, "Channels near a caf\u00e9.")
    return [("warning", "reason-characters", "val_dataset.jsonl:1")]


@fault
def quotation_mark(copy: Copy) -> list[Place]:
    copy.say("val", 1, 'A "grid" of streets.')
    return [("warning", "reason-characters", "val_dataset.jsonl:1")]


@fault
def reason_names_the_answer(copy: Copy) -> list[Place]:
    line = copy.first("train", "MEDIUM")
    copy.say_twice(line, "Rows of low homes with gardens.")
    return [("warning", "reason-names-answer", f"train_dataset.jsonl:{line}")]


def own_name(copy: Copy, split: Split, line: int) -> str:
    return copy.record(split, line).name.split("_")[-1].capitalize()


@fault
def reason_names_the_place(copy: Copy) -> list[Place]:
    line = copy.first("train", "HIGH")
    copy.say_twice(line, f"The runways of {own_name(copy, 'train', line)} in a plain.")
    return [("warning", "reason-names-place", f"train_dataset.jsonl:{line}")]


@fault
def reason_begins_with_the_place(copy: Copy) -> list[Place]:
    line = copy.first("val", "HIGH")
    copy.say("val", line, f"{own_name(copy, 'val', line)} has many quays.")
    return [("warning", "reason-names-place", f"val_dataset.jsonl:{line}")]


@fault
def capital_within_a_sentence(copy: Copy) -> list[Place]:
    """As in "the High Dam": a proper noun, though many names have the word."""
    line = copy.first("train", "HIGH")
    word = copy.record("train", line).name.split("_")[1]
    assert sum(word in text for text in copy.lines("train")) > 2
    copy.say_twice(line, f"Paved ground of the {word.capitalize()} in a plain.")
    return [("warning", "reason-names-place", f"train_dataset.jsonl:{line}")]


@fault
def reason_gives_the_position(copy: Copy) -> list[Place]:
    copy.say("val", 2, f"Quays at {abs(copy.where('val', 2).lat)} degrees.")
    return [("warning", "reason-names-place", "val_dataset.jsonl:2")]


@fault
def one_reason_for_two_categories(copy: Copy) -> list[Place]:
    low, high = copy.first("train", "LOW"), copy.first("train", "HIGH")
    copy.say_twice(low, copy.record("train", high).verdict.reason)
    return [("warning", "reason-in-two-categories", f"train_dataset.jsonl:{low}")]


@fault
def one_reason_for_a_category(copy: Copy) -> list[Place]:
    lines = [
        n for n, text in enumerate(copy.lines("train"), 1) if parse_record(text, MISSION).verdict.category == "LOW"
    ]
    for line in lines:
        copy.say("train", line, "Waves without ships.")
    return [("warning", "single-reason", f"train_dataset.jsonl:{lines[0]}")]


@fault
def category_missing_in_test(copy: Copy) -> list[Place]:
    lines = enumerate(copy.lines("test"), 1)
    copy.remove("test", [n for n, text in lines if parse_record(text, MISSION).verdict.category == "HIGH"])
    return [("error", "missing-category", "test_dataset.jsonl")]


@fault
def category_rare_in_training(copy: Copy) -> list[Place]:
    lines = [
        n for n, text in enumerate(copy.lines("train"), 1) if parse_record(text, MISSION).verdict.category == "HIGH"
    ]
    copy.remove("train", lines[4:])
    return [("warning", "imbalance", "train_dataset.jsonl")]


@fault
def picture_in_two_splits(copy: Copy) -> list[Place]:
    return [("error", "image-in-two-splits", copy.append("test", copy.record("train", 1)))]


def nearby(copy: Copy, lon: float, lat: float, *, line: int = 1) -> None:
    """Move a test picture so many degrees from the training picture of its category."""
    category = copy.record("test", line).verdict.category
    where = copy.where("train", copy.first("train", category))
    copy.move("test", line, Coordinates(where.lon + lon, where.lat + lat))


@fault
def place_within_the_footprint(copy: Copy) -> list[Place]:
    nearby(copy, 0, 0.04)  # 4.4 km
    return [("error", "same-place", "test_dataset.jsonl:1")]


@fault
def place_just_beyond_the_footprint(copy: Copy) -> list[Place]:
    nearby(copy, 0, 0.05)  # 5.6 km
    return [("warning", "close-places", "test_dataset.jsonl:1")]


@fault
def place_within_the_split_distance(copy: Copy) -> list[Place]:
    nearby(copy, 0, -0.87)  # 97 km
    return [("warning", "close-places", "test_dataset.jsonl:1")]


@fault
def place_across_the_antimeridian(copy: Copy) -> list[Place]:
    copy.move("train", 3, Coordinates(179.99, -44.0))
    copy.move("val", 2, Coordinates(-179.99, -44.0))
    return [("error", "same-place", "val_dataset.jsonl:2")]


@fault
def place_across_the_pole(copy: Copy) -> list[Place]:
    copy.move("val", 3, Coordinates(10.0, 89.98))
    copy.move("test", 3, Coordinates(-170.0, 89.98))
    return [("error", "same-place", "test_dataset.jsonl:3")]


@fault
def same_pixels_in_two_splits(copy: Copy) -> list[Place]:
    copy.paint("test", 2, copy.picture("train", 1))
    return [("error", "identical-pixels", "test_dataset.jsonl:2")]


@fault
def same_pixels_within_a_split(copy: Copy) -> list[Place]:
    copy.paint("train", 3, copy.picture("train", 1))
    return [("warning", "identical-pixels", "train_dataset.jsonl:3")]


@fault
def same_pixels_with_two_labels(copy: Copy) -> list[Place]:
    low, high = copy.first("train", "LOW"), copy.first("train", "HIGH")
    copy.paint("train", low, copy.picture("train", high))
    return [("error", "identical-pixels", f"train_dataset.jsonl:{low}")]


@fault
def compressed_copy_in_two_splits(copy: Copy) -> list[Place]:
    copy.paint("test", 1, copy.picture("train", 1).convert("RGB"), "JPEG")
    return [("warning", "near-identical", "test_dataset.jsonl:1")]


@fault
def brighter_copy_in_two_splits(copy: Copy) -> list[Place]:
    copy.paint("val", 1, copy.picture("train", 5).point(lambda value: int(value * 1.15 + 5)))
    return [("warning", "near-identical", "val_dataset.jsonl:1")]


@fault
def training_without_twin(copy: Copy) -> list[Place]:
    copy.set_lines("train", [text for n, text in enumerate(copy.lines("train"), 1) if n not in (4, 8)])
    return [("warning", "coordinate-twin", "train_dataset.jsonl:3")]


@fault
def training_without_coordinates(copy: Copy) -> list[Place]:
    copy.set_lines("train", [text for n, text in enumerate(copy.lines("train"), 1) if n != 5])
    return [("warning", "coordinate-twin", "train_dataset.jsonl:5")]


@fault
def unlocated_test_picture(copy: Copy) -> list[Place]:
    copy.move("test", 3, None)
    return [("warning", "no-coordinates", "test_dataset.jsonl:3")]


@fault
def null_island(copy: Copy) -> list[Place]:
    copy.move("val", 4, Coordinates(0, 0))
    return [("warning", "null-island", "val_dataset.jsonl:4")]


@fault
def longitude_and_latitude_exchanged(copy: Copy) -> list[Place]:
    """A city of Brazil in the South Atlantic. Ice out there is nothing to wonder at."""
    line = copy.first("val", "MEDIUM")
    copy.move("val", line, Coordinates(-10.2, -48.3))
    copy.move("val", copy.first("val", "LOW"), Coordinates(-12.2, -50.3))
    return [("warning", "perhaps-swapped", f"val_dataset.jsonl:{line}")]


@fault
def white_frame_called_high(copy: Copy) -> list[Place]:
    line = copy.first("train", "HIGH")
    copy.paint("train", line, Image.new("RGB", (512, 512), (250, 250, 252)))
    return [("error", "blank-frame", f"train_dataset.jsonl:{line}")]


@fault
def black_frame_called_medium(copy: Copy) -> list[Place]:
    line = copy.first("test", "MEDIUM")
    copy.paint("test", line, Image.new("RGB", (512, 512)))
    return [("error", "blank-frame", f"test_dataset.jsonl:{line}")]


@fault
def white_frame_called_low(copy: Copy) -> list[Place]:
    line = copy.first("train", "LOW")
    copy.paint("train", line, Image.new("RGB", (512, 512), "white"))
    return [("warning", "blank-frame", f"train_dataset.jsonl:{line}")]


@fault
def blank_frame_in_two_splits(copy: Copy) -> list[Place]:
    lines: list[tuple[Split, int]] = [("train", copy.first("train", "LOW")), ("test", copy.first("test", "LOW"))]
    for split, line in lines:
        copy.paint(split, line, Image.new("RGB", (512, 512), "white"))
    places = [f"{split}_dataset.jsonl:{line}" for split, line in lines]
    return [("error", "identical-pixels", places[1]), *(("warning", "blank-frame", place) for place in places)]


def found(report: Report) -> list[Place]:
    return [(finding.severity, finding.check, finding.place) for finding in report.findings]


def test_a_good_dataset_has_no_fault_but_its_size(good: Path) -> None:
    calls: list[tuple[int, int]] = []
    report = check_dataset(good, progress=lambda _, done, total: calls.append((done, total)))
    assert found(report) == [FEW]
    assert "1 of 2 right has the 95 % interval 9..91 %" in report.findings[0].message
    assert report.lines == {"train": 48, "val": 6, "test": 6}
    assert report.pictures["train"] == {"HIGH": 8, "MEDIUM": 8, "LOW": 8}
    assert report.pictures["test"] == {"HIGH": 2, "MEDIUM": 2, "LOW": 2}
    assert report.frames == 36
    assert calls == [(done, 36) for done in range(1, 37)]
    assert require_sound(good, MISSION) == report
    assert json.loads(report.to_json())["findings"][0]["check"] == "few-test-frames"


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.usefixtures("known_looks")
def test_every_planted_fault_is_found_and_nothing_else(name: str, good: Path, tmp_path: Path) -> None:
    copy = Copy(good, tmp_path / "dataset")
    expected = FAULTS[name](copy)
    report = check_dataset(copy.folder)
    size = [] if name == "category_missing_in_test" else [FEW]
    assert sorted(found(report)) == sorted([*expected, *size])
    assert all(finding.message and finding.fix for finding in report.findings)
    assert report.errors == [finding for finding in report.findings if finding not in report.warnings]


def test_enough_faults_are_planted() -> None:
    assert len(FAULTS) >= 30


@pytest.mark.usefixtures("known_looks")
def test_errors_come_first_and_the_refusal_names_three(good: Path, tmp_path: Path) -> None:
    copy = Copy(good, tmp_path / "dataset")
    copy.say("val", 1, "Low hills.")
    for line in (2, 10, 5, 6):
        copy.set("train", line, "{}")
    report = check_dataset(copy.folder)
    places = [f"train_dataset.jsonl:{line}" for line in (2, 5, 6, 10)]
    assert found(report) == [
        *(("error", "schema", place) for place in places),
        ("warning", "reason-names-answer", "val_dataset.jsonl:1"),
        FEW,
    ]
    with pytest.raises(OrionError, match="has 4 errors") as caught:
        require_sound(copy.folder, MISSION)
    assert all(place in caught.value.message for place in places[:3])
    assert places[3] not in caught.value.message
    assert "And 1 more." in caught.value.message


def waves(share: np.ndarray, seed: int) -> Image.Image:
    """A picture of 512x512 with these 8x8 lowest frequencies, on noise that keeps it from being blank."""
    spectrum = np.zeros((512, 512))
    spectrum[:8, :8] = share * 60 * 512 / np.linalg.norm(share)
    pixels = 128 + idctn(spectrum, norm="ortho") * 0.6 + np.random.default_rng(seed).normal(0, 8, (512, 512))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).convert("RGB")


@pytest.mark.usefixtures("known_looks")
def test_what_is_alike_by_one_measure_only_is_not_reported(good: Path, tmp_path: Path) -> None:
    copy = Copy(good, tmp_path / "dataset")
    random = np.random.default_rng(5)
    signs = random.choice([-1.0, 1.0], (8, 8))
    signs[0, 0] = 0
    one, other = signs.copy(), signs.copy()
    one[0, 1] *= 40  # the same signs, so the same hash, but another wave stands out
    other[3, 2] *= 40
    pictures = waves(one, 1), waves(other, 2)
    assert imagehash.phash(pictures[0]) - imagehash.phash(pictures[1]) <= 8
    copy.paint("train", 1, pictures[0])
    copy.paint("test", 1, pictures[1])
    haze = np.zeros((8, 8))
    haze[0, 1] = 1  # one gradient for both, and nothing else but noise
    pictures = waves(haze, 3), waves(haze, 4)
    assert np.corrcoef(*(np.asarray(picture.resize((16, 16))).ravel() for picture in pictures))[0, 1] > 0.99
    copy.paint("train", 3, pictures[0])
    copy.paint("test", 2, pictures[1])
    assert found(check_dataset(copy.folder)) == [FEW]
    copy.paint("test", 2, waves(one, 6))  # alike by both
    assert found(check_dataset(copy.folder)) == [FEW, ("warning", "near-identical", "test_dataset.jsonl:2")]


@pytest.mark.usefixtures("known_looks")
def test_training_takes_no_other_size(good: Path, tmp_path: Path) -> None:
    copy = Copy(good, tmp_path / "dataset")
    copy.paint("val", 1, copy.picture("val", 1).resize((640, 600)))
    assert not check_dataset(copy.folder).errors
    with pytest.raises(OrionError, match=r"val_dataset.jsonl:1: .* is 640x600, not 512x512"):
        require_sound(copy.folder, MISSION)


@pytest.mark.usefixtures("known_looks")
def test_the_footprint_follows_the_ground_sample_distance(good: Path, tmp_path: Path) -> None:
    copy = Copy(good, tmp_path / "dataset")
    nearby(copy, 0, 0.05)  # 5.6 km
    assert not check_dataset(copy.folder).errors
    assert [f.check for f in check_dataset(copy.folder, metres_per_pixel=11.3).errors] == ["same-place"]
    assert found(check_dataset(copy.folder, split_distance_km=6)) == [FEW]  # 4.4: two roundings less


@pytest.mark.usefixtures("known_looks")
def test_swapped_coordinates_of_a_picture_are_told(good: Path, tmp_path: Path) -> None:
    copy = Copy(good, tmp_path / "dataset")
    line = next(n for n in range(1, 49, 2) if abs(copy.where("train", n).lon) < 85)
    where = copy.where("train", line)
    copy.append(
        "train",
        Record(
            copy.record("train", line).image,
            Coordinates(where.lat, where.lon),
            copy.record("train", line).verdict,
            MISSION,
        ),
    )
    (error,) = check_dataset(copy.folder).errors
    assert (error.check, error.place) == ("image-coordinates", "train_dataset.jsonl:49")
    assert error.message.endswith("swapped.")


def test_many_pictures_are_looked_at_by_workers(good: Path, tmp_path: Path) -> None:
    """Three names for every training picture make 84 of them, enough for a pool."""
    copy = Copy(good, tmp_path / "dataset")
    records = [parse_record(text, MISSION) for text in copy.lines("train")]
    more = [*records]
    for number in (2, 3):
        for record in records:
            image = record.image.replace(".png", f"~{number}.png")
            if not (copy.folder / image).exists():
                os.link(copy.folder / record.image, copy.folder / image)
            more.append(Record(image, record.coordinates, record.verdict, MISSION))
    copy.set_lines("train", [record.to_line() for record in more])
    copy.write(more[99].image, b"GIF89a")
    report = check_dataset(copy.folder)
    assert report.frames == 83
    assert [(f.check, f.place) for f in report.errors] == [("unusable-image", "train_dataset.jsonl:99")]
    assert Counter(f.check for f in report.warnings) == {"identical-pixels": 24, "few-test-frames": 1}


@pytest.mark.usefixtures("known_looks")
def test_hostile_names_are_findings_too(good: Path, tmp_path: Path) -> None:
    copy = Copy(good, tmp_path / "dataset")
    names = ["\ud800", "x" * 300, "a\x1b[31mb", "loop.png", "folder", "~" * 5000, "\udcff.png"]
    (copy.folder / IMAGES_FOLDER / "loop.png").symlink_to("loop.png")
    (copy.folder / IMAGES_FOLDER / "folder").mkdir()
    for number, name in enumerate(names, 1):
        record = copy.record("val", 1)
        assert record.coordinates
        where = Coordinates(record.coordinates.lon, -record.coordinates.lat / 2)
        verdict = Verdict(f"Quays number {number}.", record.verdict.category)
        copy.append("val", Record(f"{IMAGES_FOLDER}/{name}", where, verdict, MISSION))
    copy.say("val", 1, "Quays \x1b[2J of stone.")
    report = check_dataset(copy.folder)
    first = len(copy.lines("val")) - len(names) + 1
    assert [(error.check, error.place) for error in report.errors] == [
        ("schema", "val_dataset.jsonl:1"),
        *(("schema", f"val_dataset.jsonl:{first + number}") for number in (0, 1, 2)),
        ("image-outside", f"val_dataset.jsonl:{first + 3}"),  # the link that leads to itself
        ("missing-image", f"val_dataset.jsonl:{first + 4}"),  # the folder
        *(("schema", f"val_dataset.jsonl:{first + number}") for number in (5, 6)),
    ]
    assert all((finding.place + finding.message).isprintable() for finding in report.findings)
    report.to_json().encode("ascii")


@pytest.mark.usefixtures("known_looks")
def test_a_snapshot_may_link_into_its_repository(good: Path, tmp_path: Path) -> None:
    copy = Copy(good, tmp_path / "snapshots" / "commit")
    image = copy.folder / copy.record("train", 1).image
    (tmp_path / "blobs").mkdir()
    image.rename(tmp_path / "blobs" / "1")
    image.symlink_to(tmp_path / "blobs" / "1")
    assert [finding.check for finding in check_dataset(copy.folder).errors] == ["image-outside"]
    assert found(check_dataset(copy.folder, root=tmp_path)) == [FEW]


@pytest.mark.parametrize("name", ["nothing", "empty"])
def test_no_dataset_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(OrionError, match="has no train_dataset"):
        check_dataset(tmp_path / name)


@pytest.mark.shared
def test_the_published_splits_leak() -> None:
    """No pair shares ground; 31 of their 120 val and test places lie within 100 km of an earlier split."""
    report = check_dataset(SHARED / "orion-dataset")
    assert [finding.check for finding in report.errors] == ["missing-image"] * 3
    assert [finding.place for finding in report.errors] == [f"{split}_dataset.jsonl:1" for split in SPLITS]
    close = {finding.place: finding.message for finding in report.warnings if finding.check == "close-places"}
    assert sorted(close) == [
        f"{place}" for place in ("test_dataset.jsonl:48", "test_dataset.jsonl:49", "val_dataset.jsonl:44")
    ]
    assert "18 of 60 places of the val split are within 100 km of the train split" in close["val_dataset.jsonl:44"]
    assert "10 of 60 places of the test split are within 100 km of the train split" in close["test_dataset.jsonl:49"]
    assert "med_town_alpine.png, 10.4 km from" in close["test_dataset.jsonl:49"]
    others = Counter(f.check for f in report.warnings if f.check != "close-places")
    assert others == {"reason-names-answer": 35, "reason-names-place": 3, "reason-characters": 1}
