"""Tables that people bring: CSV in its dialects, JSON lines, encodings; and names of files in every script."""

import json
import os
import re
import subprocess
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from orion_triage.dataset import build
from orion_triage.dataset.catalogue import COLUMNS, load_catalogue
from orion_triage.dataset.check.soundness import check_dataset
from orion_triage.dataset.records import FRAMES_TABLE, IMAGES_FOLDER, read_split, split_path
from orion_triage.dataset.sources.directory import Directory
from orion_triage.dataset.sources.picture_names import unique_ids
from orion_triage.errors import OrionError, RecordError
from orion_triage.evaluate.run import read_predictions
from orion_triage.mission.prompt import Coordinates
from orion_triage.safe.tables import csv_rows, number_of, read_csv
from orion_triage.settings import SPLITS, DatasetSettings, load_settings
from tests.conftest import MISSION, ORION

HEADER = "file_name,category,lon,lat,reason"
LINES = ("p0.png,HIGH,1.5,48.25,Long quays.", "p1.png,LOW,-60.5,-3.25,Dense forest.")
PLACES = [Coordinates(1.5, 48.25), Coordinates(-60.5, -3.25)]


def folder_with(folder: Path, table: str | bytes, name: str = "metadata.csv", files: tuple[str, ...] = ()) -> Path:
    """A folder with a table and empty pictures: reading a table decodes none."""
    folder.mkdir(exist_ok=True)
    for file in files or ("p0.png", "p1.png"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    (folder / name).write_bytes(table.encode() if isinstance(table, str) else table)
    return folder


def refusal(folder: Path) -> OrionError:
    with pytest.raises(OrionError) as caught:
        Directory(folder, MISSION)
    assert "\n" not in caught.value.message
    return caught.value


COMMAS = "\n".join((HEADER, *LINES)) + "\n"
SEMICOLONS = COMMAS.replace(",", ";")


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("metadata.csv", COMMAS.encode()),
        ("metadata.csv", COMMAS.encode("utf-8-sig")),
        ("metadata.csv", COMMAS.replace("\n", "\r\n").encode()),
        ("metadata.csv", COMMAS.replace("\n", "\r").encode()),  # Excel's "CSV (Macintosh)"
        ("METADATA.CSV", SEMICOLONS.encode()),
        ("metadata.csv", SEMICOLONS.replace(".5", ",5").replace(".25", ",25").encode("utf-8-sig")),
        ("metadata.csv", SEMICOLONS.replace("-", "\u2212").encode()),
        ("metadata.csv", ("sep=;\r\n" + SEMICOLONS).encode("utf-8-sig")),
        ("metadata.csv", ('"sep=|"\n' + COMMAS.replace(",", "|")).encode()),
        ("metadata.tsv", COMMAS.replace(",", "\t").encode()),
        ("metadata.csv", COMMAS.replace(",", "\t").encode("utf-16")),  # Excel's "Unicode text", PowerShell
        ("metadata.csv", (b"\xfe\xff" + COMMAS.encode("utf-16-be"))),
        ("metadata.csv", ("\n\n" + COMMAS.replace(",", " , ") + ",,,,\n\n").encode()),
        ("metadata.csv", re.sub(r"^", "7,", COMMAS.strip(), flags=re.M).replace("7,file", ",file").encode()),  # pandas
        ("metadata.csv", re.sub(r"$", ",", COMMAS.strip(), flags=re.M).encode()),
        ("metadata.csv", COMMAS.replace("file_name", "File_Name").replace("lon", "Longitude").encode()),
    ],
)
def test_the_same_table_in_many_dialects(tmp_path: Path, name: str, data: bytes) -> None:
    source = Directory(folder_with(tmp_path / "own", data, name), MISSION)
    assert [target.coordinates for target in source.targets] == PLACES
    assert [target.reason for target in source.targets] == ["Long quays.", "Dense forest."]
    assert source.warnings == []


@pytest.mark.parametrize(
    ("table", "said", "fix"),
    [
        (COMMAS.replace("category", "kind"), "has no column category (found: file_name, kind, lon", "label, class"),
        (
            "\n".join(LINES),
            "has no column file_name and no column category (found: p0.png, high",
            "The first line is the header",
        ),
        (COMMAS.replace(",lat", ",y"), "has the column lon, but not lat", "Add the column lat"),
        (COMMAS.replace("reason", "Category"), "the header has the column 'category' twice", "Delete one"),
        (COMMAS.replace("48.25", "48,25"), "line 2 has more cells than the header: 6 instead of 5", "decimal comma"),
        (COMMAS.replace("Long", '"Long'), "line 2: not CSV: a double quote is opened and not closed", "written twice"),
        (COMMAS.replace("Long quays.", r'"A \"long\" quay."'), "line 2: not CSV: ',' expected after '\"'", "double"),
        (COMMAS.encode().replace(b"Dense", b"For\xeat"), "line 3 is not UTF-8: byte 0xea", "CSV UTF-8"),
        (COMMAS.encode("utf-16-le"), "line 1 has a NUL character", "UTF-8"),
        (COMMAS.replace("48.25", "1_0"), "metadata.csv line 2: lat '1_0' is not a number", "Write degrees"),
        (COMMAS.replace("p1", "p0"), "line 3: picture 'p0.png' is already on metadata.csv line 2", "one row"),
    ],
)
def test_a_table_that_cannot_be_read_is_named_once(tmp_path: Path, table: str | bytes, said: str, fix: str) -> None:
    error = refusal(folder_with(tmp_path / "own", table))
    assert said in error.message
    assert "metadata.csv" in error.message
    assert error.message.count("metadata.csv") <= 2
    assert fix in error.fix


def test_a_quoted_line_break_stays_in_its_cell_and_becomes_one_space(tmp_path: Path) -> None:
    table = COMMAS.replace("Long quays.", '"Long \r\nquays."').replace("Dense forest", "Dense\u00a0forest  here")
    source = Directory(folder_with(tmp_path / "own", table), MISSION)
    assert [target.reason for target in source.targets] == ["Long quays.", "Dense forest  here."]
    assert [target.respaced for target in source.targets] == [True, True]
    assert [target.origin for target in source.targets] == ["metadata.csv line 2", "metadata.csv line 4"]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x1c", "\x0c"])
def test_json_lines_end_at_the_newline_only(tmp_path: Path, separator: str) -> None:
    rows = [{"file_name": f"p{n}.png", "category": "LOW", "reason": f"One{separator}two {n}."} for n in range(2)]
    lines = [json.dumps(row, ensure_ascii=separator < " ") for row in rows]
    source = Directory(folder_with(tmp_path / "own", "\ufeff" + "\r\n".join(lines), "metadata.jsonl"), MISSION)
    assert [target.reason for target in source.targets] == ["One two 0.", "One two 1."]
    assert [target.origin[-6:] for target in source.targets] == ["line 1", "line 2"]
    (tmp_path / "own" / "metadata.jsonl").write_text("\n".join([*lines, "{"]), encoding="utf-8")
    assert "metadata.jsonl: line 3: not JSON" in refusal(tmp_path / "own").message


def test_unused_columns_and_a_spreadsheet_are_said(tmp_path: Path) -> None:
    table = COMMAS.replace("reason", "reasons")
    source = Directory(folder_with(tmp_path / "own", table), MISSION)
    assert source.warnings[0] == "columns of metadata.csv that are not used: reasons"
    (tmp_path / "sheet").mkdir()
    (tmp_path / "sheet" / "labels.xlsx").touch()
    assert refusal(tmp_path / "sheet").fix == "Save labels.xlsx as CSV."


def test_a_catalogue_follows_the_same_rules(tmp_path: Path) -> None:
    path = tmp_path / "places.csv"
    row = 'quay;HIGH;mega_port;1,5;48,25;"Long\nquays."'
    path.write_bytes(("sep=;\n" + ";".join(COLUMNS) + "\n" + row + "\n" + row + "\n").encode("utf-8-sig"))
    with pytest.raises(OrionError, match="line 5: name 'quay' is already used on line 3"):
        load_catalogue(path)
    path.write_text(";".join(COLUMNS) + "\n" + row + "\n")
    (target,) = load_catalogue(path)
    assert (target.coordinates, target.reason) == (Coordinates(1.5, 48.25), "Long quays.")


def test_a_preset_with_a_mark_is_read(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_bytes('preset = "own"\r\n'.encode("utf-8-sig"))
    assert load_settings(str(tmp_path / "own.toml")).preset == "own"


def test_numbers_are_plain_numbers() -> None:
    assert [number_of(text) for text in ("1.5", "1,5", " \u22121.5", "+2", ".5", "1e2")] == [
        1.5,
        1.5,
        -1.5,
        2,
        0.5,
        100,
    ]
    for text in ("", "1_0", "nan", "inf", "1,234,567", "1.5 N", "\u0661", "0x1"):
        with pytest.raises(ValueError, match="is not a number"):
            number_of(text)


# Splits and the tables of a finished dataset


def test_a_mark_and_line_separators_do_not_move_the_lines_of_a_split(small_dataset: Path, tmp_path: Path) -> None:
    lines = split_path(small_dataset, "val").read_bytes().splitlines()
    lines[1] = lines[1].replace(b"Ordinary street", "Ordinary\u2028street".encode())
    for split in SPLITS:
        data = split_path(small_dataset, split).read_bytes() if split != "val" else b"\xef\xbb\xbf" + b"\n".join(lines)
        split_path(tmp_path, split).write_bytes(data if split == "val" else b"\xef\xbb\xbf" + data)
    assert len(read_split(tmp_path, "train", MISSION)) == 24
    with pytest.raises(RecordError, match=r"val_dataset.jsonl:2: the answer is not in the exact form"):
        read_split(tmp_path, "val", MISSION)
    (tmp_path / IMAGES_FOLDER).parent.mkdir()
    (tmp_path / IMAGES_FOLDER).symlink_to(small_dataset / IMAGES_FOLDER)
    found = check_dataset(tmp_path, root=small_dataset.parent.parent).findings
    assert [finding.place for finding in found if finding.check == "schema"] == ["val_dataset.jsonl:2"]
    split_path(tmp_path, "val").write_bytes(b"\n".join(lines[:1]).decode().encode("utf-16"))
    assert len(read_split(tmp_path, "val", MISSION)) == 1


def test_predictions_are_read_with_any_text_in_an_answer(tmp_path: Path) -> None:
    row = {"condition": "A", "name": "a", "truth": "LOW", "category": "LOW", "donor": None, "scores": None}
    line = json.dumps(row | {"answer": "one\u2028two"}, ensure_ascii=False)
    (tmp_path / "predictions.jsonl").write_text(f"\ufeff{line}\n\n{line}\n", encoding="utf-8")
    assert [row["answer"] for row in read_predictions(tmp_path, MISSION)] == ["one\u2028two"] * 2
    (tmp_path / "predictions.jsonl").write_text(f"{line}\n\n{{\n", encoding="utf-8")
    with pytest.raises(OrionError, match=r"predictions\.jsonl:3 is damaged"):
        read_predictions(tmp_path, MISSION)


def test_a_frames_table_that_a_spreadsheet_saved_is_read_and_a_broken_one_is_a_finding(
    small_dataset: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "dataset"
    folder.mkdir()
    for path in small_dataset.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / FRAMES_TABLE).write_bytes("image;metres_per_pixel\r\na.png;10,96\r\n".encode("utf-8-sig"))
    assert read_csv(folder / FRAMES_TABLE) == [(2, {"image": "a.png", "metres_per_pixel": "10,96"})]
    report = check_dataset(folder, root=small_dataset.parent.parent)
    assert not [finding for finding in report.findings if finding.check == "frames-table"]
    (folder / FRAMES_TABLE).write_text("image,metres_per_pixel\na.png,ten\n")
    report = check_dataset(folder, root=small_dataset.parent.parent)
    (finding,) = (finding for finding in report.findings if finding.check == "frames-table")
    assert finding.message.startswith("line 2: metres_per_pixel 'ten' is not a number. The check assumes 10 m")


# Names of files


NAMES = (
    "北京",
    "上海",
    "東京",
    "서울",
    "Москва",
    "القاهرة",
    "Αθήνα",
    "חיפה",
    "ภูเก็ต",
    "São_Tomé",
    "Sao_Tome",
    "🚀",
    "a b",
    "a_b",
    "A-b",
)


def test_ids_are_unique_in_every_script_and_the_same_on_every_system() -> None:
    files = [f"HIGH/{name}.png" for name in NAMES]
    ids = unique_ids([""] * len(files), files)
    assert len(set(ids)) == len(files)
    assert all(re.fullmatch(r"[a-z0-9_]{1,140}", name) for name in ids)
    assert unique_ids([""] * len(files), [unicodedata.normalize("NFD", file) for file in files]) == ids
    assert ids[NAMES.index("São_Tomé")].startswith("high_sao_tome_")
    assert unique_ids(["", ""], ["pictures/p0.png", "x/Y-1.tif"]) == ["pictures_p0", "x_y_1"]
    for file, name in zip(files, ids, strict=True):  # an id does not depend on the other files, if a letter is lost
        assert file.isascii() or unique_ids([""], [file]) == [name]
    (long,) = unique_ids([""], ["a/" * 300 + "b.png"])
    assert len(long) < 140
    assert unique_ids(["given_1", "New York"], ["a.png", "b.png"]) == ["given_1", "new_york"]


@pytest.mark.parametrize(("of_file", "of_table"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_both_unicode_forms_of_a_name_meet(tmp_path: Path, of_file: str, of_table: str) -> None:
    files = tuple(unicodedata.normalize(of_file, name) for name in ("Tomé/São.png", "p1.png"))
    table = unicodedata.normalize(of_table, COMMAS.replace("p0.png", "Tomé/São.png"))
    source = Directory(folder_with(tmp_path / "own", table, files=files), MISSION)
    assert source.targets[0].file == files[0]
    (tmp_path / "own" / "Tomé").mkdir(exist_ok=True)
    for form in ("NFC", "NFD"):
        folder = tmp_path / "own" / unicodedata.normalize(form, "Tomé")
        folder.mkdir(exist_ok=True)
        (folder / unicodedata.normalize(form, "São.png")).touch()
    wanted = unicodedata.normalize(of_table, "Tomé/São.png")
    assert Directory(tmp_path / "own", MISSION).targets[0].file == wanted  # exactly this name comes first
    for form in ("NFC", "NFD"):
        path = tmp_path / "twins" / "HIGH" / unicodedata.normalize(form, "São.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert "is there twice, in both Unicode forms" in refusal(tmp_path / "twins").message


def test_a_record_finds_its_picture_in_the_other_unicode_form(small_dataset: Path, tmp_path: Path) -> None:
    (tmp_path / IMAGES_FOLDER).mkdir(parents=True)
    for split in SPLITS:
        text = split_path(small_dataset, split).read_text().replace("_place_", r"_pl\u00e1ce_")
        split_path(tmp_path, split).write_text(text)
    for path in (small_dataset / IMAGES_FOLDER).iterdir():
        name = unicodedata.normalize("NFD", path.name.replace("_place_", "_pl\u00e1ce_"))
        (tmp_path / IMAGES_FOLDER / name).write_bytes(path.read_bytes())
    (tmp_path / IMAGES_FOLDER / "._x.png").touch()
    report = check_dataset(tmp_path)
    assert not report.errors
    assert report.frames == 24
    assert not [finding for finding in report.findings if finding.check == "unused-image"]


def test_names_that_fit_two_files_or_none_are_refused(tmp_path: Path) -> None:
    table = COMMAS.replace("p0.png", "P0").replace("p1.png", r"in\P1.PNG")
    source = Directory(folder_with(tmp_path / "a", table, files=("p0.jpg", "in/p1.png")), MISSION)
    assert [target.file for target in source.targets] == ["p0.jpg", "in/p1.png"]
    (tmp_path / "a" / "p0.PNG").touch()
    assert "line 2: picture 'P0' can be 2 files: p0.PNG, p0.jpg" in refusal(tmp_path / "a").message
    error = refusal(folder_with(tmp_path / "b", COMMAS.replace("p0", "._p0"), files=("._p0.png", "p1.png")))
    assert "picture '._p0.png' is a hidden file" in error.message


def test_hidden_files_are_no_pictures_and_no_tables_and_are_counted(tmp_path: Path) -> None:
    files = ("p0.png", "p1.png", "._p0.png", ".ipynb_checkpoints/p0.png", "__MACOSX/p1.png", "Thumbs.db", "notes.md")
    folder = folder_with(tmp_path / "own", COMMAS, files=files)
    (folder / "._metadata.csv").write_bytes(bytes.fromhex("0005160700020000"))
    source = Directory(folder, MISSION)
    assert [target.name for target in source.targets] == ["p0", "p1"]
    assert source.warnings == [
        "left out: 1 file with other suffixes (1 .md)",
        "left out: 5 hidden or system files or folders, for example ._metadata.csv",
    ]
    for n, category in enumerate(MISSION.names):
        for name in (f"p{n}.PNG", f"._p{n}.PNG"):
            path = tmp_path / "HIGH" / category / name  # the folder above is no category
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    source = Directory(tmp_path / "HIGH", MISSION)
    assert [(target.category, target.file) for target in source.targets] == [
        (category, f"{category}/p{n}.PNG") for n, category in sorted(enumerate(MISSION.names), key=lambda pair: pair[1])
    ]
    (tmp_path / "HIGH" / "HIGH" / "low").mkdir()
    (tmp_path / "HIGH" / "HIGH" / "low" / "p.png").touch()
    assert "'HIGH/low/p.png' is in folders of 2 categories" in refusal(tmp_path / "HIGH").message


def on_an_ascii_terminal(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command in an interpreter that begins as usual: this variable is read at its start."""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "120"}
    command = [*ORION, *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_the_stage_keeps_the_users_own_names(tmp_path: Path) -> None:
    """Through the command line with an ASCII terminal. One name is not UTF-8."""
    names = [
        *(name for name in NAMES if not name.isascii()),
        *"大阪 부산 Казань دبي Πάτρα ภูเก็ต Київ".split(),
        "p\udcff",
    ]
    for n, name in enumerate(names):
        path = tmp_path / "own" / MISSION.names[n % 3] / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = np.random.default_rng(n).integers(0, 256, (16, 16, 3)).astype(np.uint8)
        Image.fromarray(coarse, "RGB").resize((512, 512), Image.Resampling.BICUBIC).save(path, compress_level=1)
    (tmp_path / "own" / "HIGH" / "[b04].webp").touch()
    result = on_an_ascii_terminal("dataset", "--run", "run", "--dataset", "own", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "left out: 1 file with other suffixes (1 .webp)" in result.stderr
    found = [row for _, row in read_csv(tmp_path / "run" / "dataset" / FRAMES_TABLE)]
    assert len({row["image"] for row in found}) == len(names)
    own = {f"{MISSION.names[n % 3]}/{name}.png".replace("\udcff", r"\udcff") for n, name in enumerate(names)}
    assert {row["file"] for row in found} == own
    (tmp_path / "own" / "HIGH" / "北京.png").write_bytes(b"broken")
    settings = DatasetSettings(folder=str(tmp_path / "own"))
    figures = build.run(tmp_path / "again", settings, MISSION)
    assert figures["account"]["failed"] == 1
    ((_, absent),) = read_csv(tmp_path / "again" / "absent.csv")
    assert absent["file"] == "HIGH/北京.png"


def test_text_from_files_is_never_markup(small_dataset: Path, tmp_path: Path) -> None:
    """Findings name files; the console takes neither [b04] nor :x: for its own."""
    for split in SPLITS:
        split_path(tmp_path, split).write_bytes(split_path(small_dataset, split).read_bytes())
    (tmp_path / IMAGES_FOLDER).mkdir(parents=True)
    for path in (small_dataset / IMAGES_FOLDER).iterdir():
        (tmp_path / IMAGES_FOLDER / path.name).write_bytes(path.read_bytes())
    (tmp_path / IMAGES_FOLDER / "[b04]:x:[bold]北京.png").touch()
    result = on_an_ascii_terminal("dataset", "check", tmp_path, cwd=tmp_path)
    assert rf"{IMAGES_FOLDER}/[b04]:x:[bold]\u5317\u4eac.png: 1 pictures are in no record" in result.stdout


def test_csv_rows_name_the_line_where_a_row_starts() -> None:
    text = 'a,b\n"1\n1",2\n\n3,"4\r\n5\n6"\n7,8,9\n'
    rows = csv_rows(text, "t.csv")
    assert next(rows) == (2, {"a": "1\n1", "b": "2"})
    assert next(rows) == (5, {"a": "3", "b": "4\r\n5\n6"})
    with pytest.raises(OrionError, match="line 8 has more cells"):
        next(rows)
