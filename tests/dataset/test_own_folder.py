"""'orion dataset check' and 'orion dataset new' for a folder of the user's own: recognised, diagnosed, built alike."""

import csv
import errno
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from orion_triage.cli import app
from orion_triage.dataset import build, example
from orion_triage.dataset.check.own_folder import check_own_folder
from orion_triage.dataset.check.soundness import require_sound
from orion_triage.dataset.labelled import read_labelled
from orion_triage.dataset.records import split_path
from orion_triage.dataset.sources.columns import choose
from orion_triage.dataset.sources.directory import Directory
from orion_triage.errors import OrionError
from orion_triage.mission.prompt import Coordinates
from orion_triage.settings import SPLITS, DatasetSettings
from tests.conftest import MISSION
from tests.dataset.test_directory import picture, png, rows, write

Table = list[dict[str, str]]


def check(*words: object) -> Result:
    return CliRunner().invoke(app, ["dataset", "check", *map(str, words)])


def table_text(path: Path, table: Table) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)


def kinds(folder: Path, severity: str = "error") -> dict[str, int]:
    report = check_own_folder(folder, DatasetSettings(folder=str(folder)), MISSION)
    return dict(Counter(finding.check for finding in report.findings if finding.severity == severity))


# What a folder is


def touched(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


HEADER = "file_name,category\n"
LAYOUTS: dict[str, tuple[tuple[str, ...], dict[str, str], str, str]] = {
    "table": (
        ("p0.png", "p1.png"),
        {"labels.csv": HEADER + "p0.png,LOW\n"},
        "a table and pictures: labels.csv (1 row), 2 pictures beside it",
        "correct the errors",
    ),
    "pictures beside a table": (
        ("pictures/p0.png",),
        {"labels.tsv": "image\tlabel\np0.png\tLOW\n"},
        "a table and pictures: labels.tsv (1 row), 1 picture in pictures/",
        "correct the errors",
    ),
    "categories": (
        ("HIGH/p0.png", "MEDIUM/p1.png", "low/p2.png", "low/p3.png"),
        {},
        "category folders: HIGH/ (1 picture), LOW/ (2 pictures), MEDIUM/ (1 picture)",
        "correct the errors",
    ),
    "split folders": (
        ("train/p0.png", "val/p0.png", "test/LOW/p0.png"),
        {
            "train/metadata.csv": HEADER + "p0.png,LOW\n",
            "val/metadata.jsonl": '{"file_name": "p0.png", "label": "LOW"}',
        },
        "split folders with tables: train/metadata.csv (1 row), val/metadata.jsonl (1 row), test/LOW/ (1 picture)",
        "correct the errors",
    ),
    "spreadsheet": (("p0.png", "labels.xlsx"), {}, "a spreadsheet (labels.xlsx) and 1 picture", "Save labels.xlsx"),
    "table below": (
        ("mine/p0.png",),
        {"mine/labels.csv": HEADER},
        "not a dataset at the top level: the table is mine/labels.csv",
        "Pass its folder",
    ),
    "other folders": (("ports/p0.png",), {}, "not a dataset: 1 picture and no labels", "(ports/) to HIGH, MEDIUM"),
    "nothing": ((), {}, "not a dataset: no pictures and no labels", "'orion dataset new' writes an example"),
    "two tables": ((), {"a.csv": HEADER, "b.csv": HEADER}, "2 tables: a.csv, b.csv", "Keep one of them"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_first_line_says_what_the_folder_is(layout: str, tmp_path: Path) -> None:
    files, texts, recognised, then = LAYOUTS[layout]
    folder = tmp_path / "my frames"
    folder.mkdir()
    touched(folder, *files)
    for name, text in texts.items():
        (folder / name).write_text(text)
    result = check(folder)
    first, *_, last = result.stdout.splitlines()
    assert first == f"{folder}: {recognised}"
    assert then in result.stdout
    assert last == f"next: correct the errors, then run: orion dataset check '{folder}'"
    assert result.exit_code == 1  # the pictures are empty files


def test_a_finished_dataset_is_recognised_too(small_dataset: Path, tmp_path: Path) -> None:
    result = check(small_dataset)
    assert result.stdout.startswith(f"{small_dataset}: a dataset in the published layout\n")
    assert (
        result.stdout.splitlines()[-1] == f"next: orion run --dataset {small_dataset} --run runs/{small_dataset.name}"
    )
    assert check(small_dataset, "--set", "dataset.split_seed=1").exit_code == 2
    for split in ("val", "test"):  # without train_dataset.jsonl, the stage takes it for the same
        shutil.copy(split_path(small_dataset, split), tmp_path)
    assert "train_dataset.jsonl: the train split cannot be read" in check(tmp_path).stdout
    with pytest.raises(OrionError, match=r"train_dataset\.jsonl does not exist"):
        build.run(tmp_path / "out", DatasetSettings(folder=str(tmp_path)), MISSION)


def test_a_table_instead_of_its_folder_is_refused_with_the_folder(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text(HEADER)
    error = check(tmp_path / "labels.csv").exception
    assert isinstance(error, OrionError)
    assert error.fix == f"Pass its folder: {tmp_path}."


# What is wrong with it


def newcomer(folder: Path) -> Table:
    """Twelve pictures with a table in words of its own."""
    table = []
    for n, row in enumerate(rows(12)):
        touched(folder, f"pictures/scene {n}.png")
        (folder / "pictures" / f"scene {n}.png").write_bytes(png(n))
        table.append(
            {
                "Image": f"scene {n}.png",
                "Label": row["category"].lower(),
                "Latitude": row["lat"],
                "Longitude": row["lon"],
                "Caption": row["reason"],
                "Sensor": "cam-2",
            }
        )
    return table


def test_three_ordinary_mistakes_fit_one_screen_and_name_the_users_columns(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    table = newcomer(folder)
    right = [dict(row) for row in table]
    table[4]["Label"] = "meduim"
    for n in (0, 1, 2, 3):
        table[n]["Latitude"], table[n]["Longitude"] = table[n]["Longitude"], table[n]["Latitude"]
    for n in (8, 11):
        (folder / "pictures" / f"scene {n}.png").rename(folder / f"lost {n}.png")
    table_text(folder / "labels.csv", table)
    result = check(folder)
    assert result.exit_code == 1
    said = result.stdout.splitlines()
    assert len(said) <= 40
    assert said[1] == (
        "columns of labels.csv: file_name from image, category from label, lon from longitude, lat from latitude, "
        "reason from caption; not used: sensor"
    )
    errors = [line for line in said if line.startswith("error ")]
    assert errors == ["error label: 1", "error missing-picture: 2", "error swapped-position: 4"]
    assert "  labels.csv line 6: label 'meduim' is not one of HIGH, MEDIUM, LOW (is MEDIUM meant?)." in said
    assert "  labels.csv line 10: picture 'scene 8.png' does not exist." in said
    assert any(f"Searched: {folder} and {folder / 'pictures'} (.png" in line for line in said)
    swapped = [line for line in said if "swapped?" in line]
    assert swapped[0] == (
        "  labels.csv line 2: latitude '-170' is outside -90..90 (are longitude and latitude swapped?)."
    )
    assert len(swapped) == 3
    assert "  and 1 more (--json lists all)" in said
    assert "warning picture-in-no-row: 2" in said
    assert "  lost 11.png: has no label and is not used." in said
    report = json.loads(check(folder, "--json").stdout)
    assert sum(finding["check"] == "swapped-position" for finding in report["findings"]) == 4
    assert report["tables"][0]["columns"]["lat"] == "latitude"
    assert report["tables"][0]["unused"] == ["sensor"]
    assert report["recognised"].startswith("a table and pictures")
    with pytest.raises(OrionError) as caught:  # the stage finds the same
        Directory(folder, MISSION)
    for finding in report["findings"][: report["errors"]]:
        assert f"{finding['place']}: {finding['message'].removesuffix('.')}" in caught.value.message
    assert f"orion dataset check {folder}" in caught.value.fix
    for n in (8, 11):
        (folder / f"lost {n}.png").rename(folder / "pictures" / f"scene {n}.png")
    table_text(folder / "labels.csv", right)
    result = check(folder)
    assert (result.exit_code, result.stdout.count("\nerror ")) == (0, 0)
    assert result.stdout.splitlines()[-1] == f"next: orion run --dataset {folder} --run runs/own"
    figures = build.run(tmp_path / "out", DatasetSettings(folder=str(folder)), MISSION)
    assert figures["account"] == {"fetched": 12}
    require_sound(tmp_path / "out", MISSION)


MISTAKES: dict[str, tuple[Callable[[Path, Table], None], dict[str, int]]] = {}


def mistake(**found: int) -> Callable[[Callable[[Path, Table], None]], Callable[[Path, Table], None]]:
    def planted(plant: Callable[[Path, Table], None]) -> Callable[[Path, Table], None]:
        MISTAKES[plant.__name__] = plant, {kind.replace("_", "-"): count for kind, count in found.items()}
        return plant

    return planted


@mistake()
def none(folder: Path, table: Table) -> None:
    pass


@mistake(position=2)
def positions_that_are_no_numbers(folder: Path, table: Table) -> None:
    table[3]["lat"] = "48.1 N"
    table[5]["lon"] = "200"


@mistake(reason=1, split=1, label=1, morphology=1)
def four_mistakes_in_one_table(folder: Path, table: Table) -> None:
    for row in table:
        row["split"] = "train"
    table[0]["reason"] = "long " * 40
    table[1]["split"] = "dev"
    table[2]["category"] = ""
    table[3]["morphology"] = "a port"


@mistake(split=1)
def half_of_the_splits(folder: Path, table: Table) -> None:
    for n, row in enumerate(table):
        row["split"] = SPLITS[n % 3] if n else ""


@mistake(split=1)
def a_split_that_keeps_no_distance(folder: Path, table: Table) -> None:
    for n, row in enumerate(table):
        row |= {"lon": str(n / 10), "lat": "0"}


@mistake(repeated_picture=1, picture_format=1, hidden_picture=1, unusable_name=1)
def names_of_no_use(folder: Path, table: Table) -> None:
    touched(folder, "pictures/p1.webp")
    table[0]["file_name"] = table[4]["file_name"]
    table[1]["file_name"] = "pictures/p1.webp"
    table[2]["file_name"] = "pictures/.p2.png"
    table[3]["file_name"] = "../p3.png"


@mistake(columns=1, label=1)
def two_columns_for_the_reason(folder: Path, table: Table) -> None:
    for row in table:
        row["caption"] = row["description"] = row.pop("reason")
    table[1]["category"] = "URGENT"


@mistake(columns=1, missing_picture=1)
def a_longitude_without_a_latitude(folder: Path, table: Table) -> None:
    for row in table:
        del row["lat"]
    (folder / table[7]["file_name"]).unlink()


@mistake(unusable_image=4)
def damaged_pictures(folder: Path, table: Table) -> None:
    for n in range(4):
        (folder / table[n]["file_name"]).write_bytes(b"\x89PNG\r\n\x1a\n cut")


@mistake(missing_category=3)  # nothing in val and in test, and only HIGH in train
def pictures_of_one_category_too_few(folder: Path, table: Table) -> None:
    table[:] = [table[0], table[3]]
    for path in sorted((folder / "pictures").iterdir()):
        if path.name not in ("p0.png", "p3.png"):
            path.unlink()


@pytest.mark.parametrize("name", MISTAKES)
def test_the_check_and_the_stage_agree(name: str, tmp_path: Path) -> None:
    plant, found = MISTAKES[name]
    folder = tmp_path / "own"
    table = rows(9)
    write(folder, table)
    plant(folder, table)
    table_text(folder / "metadata.csv", table)
    assert kinds(folder) == found
    if found:
        with pytest.raises(OrionError):
            build.run(tmp_path / "out", DatasetSettings(folder=str(folder)), MISSION)
        assert not (tmp_path / "out").exists()
    else:
        build.run(tmp_path / "out", DatasetSettings(folder=str(folder)), MISSION)
        require_sound(tmp_path / "out", MISSION)


def test_what_only_the_training_would_refuse_is_found_at_the_users_line(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    table = rows(9)
    write(folder, table)
    shutil.copy(folder / "pictures" / "p0.png", folder / "pictures" / "p1.png")  # HIGH and MEDIUM
    table[5] |= {"lon": table[3]["lon"], "lat": table[3]["lat"]}  # LOW and HIGH
    table_text(folder / "metadata.csv", table)
    report = check_own_folder(folder, DatasetSettings(folder=str(folder)), MISSION)
    found = {finding.check: finding for finding in report.errors}
    assert set(found) >= {"identical-pixels", "place-labels"}
    assert "pictures/p1.png" in found["identical-pixels"].message
    assert {found["identical-pixels"].place, found["place-labels"].place} <= {
        f"metadata.csv line {n}" for n in range(20)
    }
    build.run(tmp_path / "out", DatasetSettings(folder=str(folder)), MISSION)
    with pytest.raises(OrionError, match="2 errors"):
        require_sound(tmp_path / "out", MISSION)


def test_a_swap_that_only_a_map_shows_is_a_warning_with_the_users_columns(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    table = rows(9)
    write(folder, table)
    table[0] |= {"lon": "-8.05", "lat": "-34.9"}  # Recife, swapped: in the South Atlantic
    table = [
        {"x" if key == "lon" else "y" if key == "lat" else key: cell for key, cell in row.items()} for row in table
    ]
    table_text(folder / "metadata.csv", table)
    report = check_own_folder(folder, DatasetSettings(folder=str(folder)), MISSION)
    (finding,) = (
        finding for finding in report.warnings if finding.check == "perhaps-swapped" and "p0" in finding.message
    )
    assert finding.place == "metadata.csv line 2"
    assert finding.message.endswith("on other land if x and y are swapped.")
    assert "exchange the cells of x and y" in finding.fix


def test_rows_that_cannot_be_read_do_not_hide_the_others(tmp_path: Path) -> None:
    touched(tmp_path, "p0.png", "p1.png")
    table = 'file_name,category,lon,lat\np0.png,NONE,1,2\np1.png,LOW,48,5,2,5\np2.png,LOW,1,2\np3.png,"LOW\n'
    (tmp_path / "labels.csv").write_text(table)
    assert kinds(tmp_path) == {"table": 2, "label": 1, "missing-picture": 1}
    assert "picture-in-no-row" not in kinds(tmp_path, "warning")  # p1.png is in the row that cannot be read
    (tmp_path / "labels.csv").unlink()
    lines = ['{"file_name": "p0.png", "category": "NONE"}', "{", "[]", '{"file_name": "p9.png", "category": "LOW"}']
    (tmp_path / "labels.jsonl").write_text("\n".join(lines))
    assert kinds(tmp_path) == {"table": 2, "label": 1, "missing-picture": 1}


def test_damaged_and_blank_pictures_are_warnings_until_they_stop_the_stage(tmp_path: Path) -> None:
    folder = write(tmp_path / "own", rows())
    (folder / "pictures" / "p0.png").write_bytes(b"\x89PNG\r\n\x1a\n cut")
    flat = Image.new("RGB", (512, 512), (250, 250, 250))
    flat.save(folder / "pictures" / "p1.png")  # MEDIUM
    flat.save(folder / "pictures" / "p2.png")  # LOW: the same blank tile
    picture(3, (1024, 768)).save(folder / "pictures" / "p3.png", compress_level=1)
    assert kinds(folder) == {}
    warned = kinds(folder, "warning")
    assert (warned["unusable-image"], warned["blank-frame"], warned["image-size"]) == (1, 2, 1)
    (folder / "pictures" / "p4.png").write_bytes(b"nothing")
    assert kinds(folder) == {"unusable-image": 2, "blank-frame": 2}


def test_folders_of_categories_pass_and_the_fix_for_positions_is_a_table(tmp_path: Path) -> None:
    for n in range(9):
        touched(tmp_path, f"own/{MISSION.names[n % 3]}/p{n}.png")
        (tmp_path / "own" / MISSION.names[n % 3] / f"p{n}.png").write_bytes(png(n))
    touched(tmp_path, "own/p9.png", "own/README.md")
    result = check(tmp_path / "own")
    assert result.exit_code == 0
    assert "9 of 9 frames have no position" in result.stdout
    assert (
        "fix: Write a table labels.csv with the columns file_name, category, lon and lat, in degrees." in result.stdout
    )
    assert "  p9.png: has no label and is not used.\n  fix: Move them into HIGH/, MEDIUM/ or LOW/" in result.stdout
    assert [line for line in result.stdout.splitlines() if line.startswith("warning ")] == [
        "warning few-test-frames: 1",
        "warning no-position: 1",
        "warning no-reason: 1",
        "warning picture-in-no-row: 1",
    ]


def test_settings_of_the_stage_are_those_of_the_check_and_stay_in_the_next_command(tmp_path: Path) -> None:
    table = rows(9)
    for n, row in enumerate(table):
        row |= {"lon": str(n / 2), "lat": "0"}  # 55 km apart
    folder = write(tmp_path / "own", table)
    assert "Lower dataset.split_distance_km" in check(folder).stdout
    result = check(folder, "--set", "dataset.split_distance_km=20")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1].endswith("--run runs/own --set dataset.split_distance_km=20")


# Columns


@pytest.mark.parametrize(
    ("found", "taken"),
    [
        ("file_name category lon lat reason", "file_name category lon lat reason"),
        ("name class y x caption", "name class x y caption"),
        ("path priority latitude lng description id", "path priority lng latitude description"),
        ("image_path label long lat rationale", "image_path label long lat rationale"),
        ("file_name path category label longitude lon lat reason notes", "file_name category lon lat reason"),
    ],
)
def test_columns_are_known_by_many_names(found: str, taken: str) -> None:
    columns = choose(found.split())
    assert columns.faults == []
    ours = ("file_name", "category", "lon", "lat", "reason")
    assert [columns.taken[name] for name in ours] == taken.split()
    assert sorted([*columns.unused, *columns.taken.values()]) == sorted(found.split())


def test_names_marked_by_ruless_and_an_id_beside_the_file() -> None:
    columns = choose(["image path", "file-name", "name", "category"])
    assert dict(columns.taken) == {"file_name": "file-name", "category": "category", "name": "name"}
    assert "lon" not in choose(["file", "label", "x"]).taken
    assert choose(["file", "label", "lon", "lat", "x", "y"]).unused == ["x", "y"]


@pytest.mark.parametrize(
    ("found", "said", "fix"),
    [
        ("file label class", "has the columns label and class: each of them can be category", "Rename the right one"),
        ("file image path label", "has the columns file, image and path: each", "to file_name"),
        ("file label caption description", "has the columns caption and description: each", "to reason"),
        ("file file-name label lat", "has the column lat, but not lon", "Add the column lon."),
        ("kind title", "has no column file_name and no column category (found: kind, title)", "label, class, priority"),
        ("label lon lng", "has no column file_name (found: label, lon, lng)", "picture"),
    ],
)
def test_a_table_that_can_be_read_in_two_ways_is_refused_with_both(found: str, said: str, fix: str) -> None:
    faults = choose(found.split()).faults
    (message,) = (message for message, its_fix in faults if said in message and fix in its_fix)
    assert message


def test_names_of_pictures_may_leave_their_folder_out(tmp_path: Path) -> None:
    touched(tmp_path, "p0.png", "images/p0.png", "Images2/p1.png", "images/in/P2.png")
    (tmp_path / "labels.csv").write_text(HEADER + "p0.png,LOW\nimages/p0.png,LOW\nin/p2,HIGH\n")
    assert [target.file for target in Directory(tmp_path, MISSION).targets] == [
        "p0.png",
        "images/p0.png",
        "images/in/P2.png",
    ]
    touched(tmp_path, "frames/in/P2.png")
    with pytest.raises(OrionError, match=r"picture 'in/p2' can be 2 files: images/in/P2.png, frames/in/P2.png"):
        Directory(tmp_path, MISSION)


def test_a_snapshot_of_the_hub_links_into_its_repository(tmp_path: Path) -> None:
    folder = tmp_path / "datasets--me--mine" / "snapshots" / "0123"
    touched(folder, "../../blobs/abc")
    (folder / "p0.png").symlink_to("../../blobs/abc")
    (folder / "labels.csv").write_text(HEADER + "p0.png,LOW\n")
    assert len(Directory(folder, MISSION).targets) == 1
    touched(tmp_path, "blobs/abc")
    with pytest.raises(OrionError, match="is outside the folder"):
        Directory(shutil.copytree(folder, tmp_path / "plain" / "0123", symlinks=True), MISSION)


def test_a_link_to_itself_is_a_missing_picture_as_a_dangling_link_is(tmp_path: Path) -> None:
    touched(tmp_path, "HIGH/p0.png", "LOW/p1.png")
    for name, target in (("loop.png", "loop.png"), ("dangling.png", "gone.png"), ("of-a-file.png", "p1.png/x")):
        (tmp_path / "LOW" / name).symlink_to(target)
    (tmp_path / "loop").symlink_to("loop")
    missing = [f"LOW/{name}.png: picture 'LOW/{name}.png' does not exist" for name in ("dangling", "loop", "of-a-file")]
    for read in (Directory, read_labelled):
        with pytest.raises(OrionError) as caught:
            read(tmp_path, MISSION)
        assert all(said in str(caught.value) for said in missing)
    checked = check(tmp_path)
    assert checked.exit_code == 1
    assert all(said in checked.output for said in missing)
    assert "1 file with other suffixes (1 no suffix)" in checked.output


def test_a_link_to_itself_that_no_row_names_is_not_used(tmp_path: Path) -> None:
    touched(tmp_path, "p0.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "labels.csv").write_text(HEADER + "p0.png,LOW\n")
    assert len(Directory(tmp_path, MISSION).targets) == 1
    assert kinds(tmp_path, "warning")["picture-in-no-row"] == 1


# An example to start from


def test_the_example_passes_the_check_and_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    (tmp_path / "empty").mkdir()
    write_bytes = example.write_bytes
    # A fault: the disk is full at the second picture.
    monkeypatch.setattr(example, "write_bytes", lambda path, data: full_disk(path, write_bytes, data))
    for name in ("full", "empty"):
        assert runner.invoke(app, ["dataset", "new", name]).exception is not None
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["empty"]
    monkeypatch.setattr(example, "write_bytes", write_bytes)
    result = runner.invoke(app, ["dataset", "new", "empty"])
    assert result.exit_code == 0, result.output
    assert "next: orion dataset check empty" in result.output
    result = check("empty")
    assert result.exit_code == 0, result.output
    assert "empty: a table and pictures: labels.csv (12 rows), 12 pictures in pictures/" in result.output
    assert "warning few-test-frames: 1" in result.output
    assert "0 errors, 1 warnings" in result.output
    assert {path.name for path in (tmp_path / "empty").iterdir()} == {"labels.csv", "pictures", "README.txt"}
    before = sorted(tmp_path.rglob("*"))
    for name in ("empty", "empty/labels.csv"):
        error = runner.invoke(app, ["dataset", "new", name]).exception
        assert isinstance(error, OrionError)
        assert "exists and is not an empty folder" in error.message
    assert sorted(tmp_path.rglob("*")) == before
    targets = Directory(tmp_path / "empty", MISSION).targets
    assert Counter(target.category for target in targets) == dict.fromkeys(MISSION.names, 4)
    assert targets[0].coordinates == Coordinates(4.33, 51.28)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert "working folder" in str(runner.invoke(app, ["dataset", "new", "."]).exception)


def full_disk(path: Path, write_bytes: Callable[[Path, bytes], None], data: bytes) -> None:
    if any(path.parent.glob("*")):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    write_bytes(path, data)
