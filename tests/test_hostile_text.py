"""Records, catalogues, settings, verdicts and the replies of servers, as somebody would write them who means harm."""

import json
import math
import os
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from orion_triage.dataset.catalogue import COLUMNS, load_catalogue
from orion_triage.dataset.records import Record, image_path, parse_record, read_records, read_split
from orion_triage.dataset.sources import simsat
from orion_triage.dataset.sources.contents import read_contents
from orion_triage.dataset.sources.directory import Directory
from orion_triage.errors import AnswerError, OrionError, RecordError, ServerError
from orion_triage.evaluate import threshold
from orion_triage.evaluate.backends import LlamaCppBackend
from orion_triage.evaluate.run import read_predictions
from orion_triage.export import quantize
from orion_triage.llama_cpp.client import Client, first_log_probabilities
from orion_triage.mission.prompt import Coordinates, parse_prompt, render_prompt
from orion_triage.mission.verdict import Verdict, answer_text, parse_verdict, reason_fault
from orion_triage.models import lfm2_vl
from orion_triage.runs import manifest
from orion_triage.runs.run import SETTINGS_FILE, open_run
from orion_triage.safe.bounded_http import retry_after_seconds
from orion_triage.safe.reading import parse_json, read_text
from orion_triage.safe.tables import json_lines, numbered_lines, read_csv
from orion_triage.settings import Settings, load_settings
from tests.conftest import MISSION

from .conftest import SHARED
from .hostile import CONTROL_TOKENS, DEEP, NUMBERS, WAYS_OUT, json_values, mutated, outcome, replaced, texts, to_bytes

SAID = Verdict("Long quays with cranes.", "HIGH")
RECORD = Record("orion_dataset/images/a.png", Coordinates(1.5, -2.25), SAID, MISSION)
LINE = RECORD.to_line()
PLACE = {"name": "a", "category": "HIGH", "morphology": "mega_port", "lon": 1.5, "lat": 2.0, "reason": "Long quays."}
FEATURE = {"type": "Feature", "geometry": {"type": "Point", "coordinates": [1.5, 2.0]}, "properties": PLACE}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all the inputs that are drawn: each overwrites the last."""
    return tmp_path_factory.mktemp("hostile")


# Records


@given(st.one_of(mutated(LINE.encode()), replaced(json.loads(LINE)).map(to_bytes)))
def test_a_line_is_a_record_or_named(folder: Path, line: bytes) -> None:
    path = folder / "train_dataset.jsonl"
    path.write_bytes(LINE.encode() + b"\n" + line)
    found = outcome(read_records, path, MISSION, named=path)
    if isinstance(found, OrionError):
        assert isinstance(found, RecordError)
        assert re.search(rf"{re.escape(str(path))}(:\d+: | is not UTF-8 \(byte \d+\))", found.message)
        return
    for record in found:
        assert parse_record(record.to_line(), MISSION) == record
        assert not reason_fault(record.verdict.reason)
        assert (folder / record.image).resolve().is_relative_to(folder.resolve())


@given(texts, st.one_of(st.none(), st.floats(-180, 180)), st.sampled_from(MISSION.names))
def test_what_is_written_is_read_or_refused(reason: str, lon: float | None, category: str) -> None:
    place = None if lon is None else Coordinates(round(lon, 2), round(lon / 2, 2))
    record = Record("a.png", place, Verdict(reason, category), MISSION)
    found = outcome(parse_record, record.to_line(), MISSION)
    if reason_fault(reason):
        assert isinstance(found, RecordError)
        assert "the reason" in found.message
    else:
        assert found == record


@pytest.mark.parametrize("token", CONTROL_TOKENS)
def test_a_control_token_is_taught_to_no_model(token: str, tmp_path: Path) -> None:
    """Trained on, <|im_end|> in a reason would end answers in the middle."""
    line = Record("a.png", None, Verdict(f"Quays. {token}", "HIGH"), MISSION).to_line()
    with pytest.raises(RecordError, match="control token"):
        parse_record(line, MISSION)
    path = tmp_path / "places.jsonl"
    path.write_text(json.dumps(PLACE | {"reason": f"Quays. {token}"}))
    with pytest.raises(OrionError, match=r"places\.jsonl: line 1: the reason contains the model's control token"):
        load_catalogue(path)


def as_line(**parts: Any) -> str:
    turns = json.loads(LINE)["conversations"]
    user, assistant = parts.pop("user", turns[0]["content"]), parts.pop("assistant", turns[1]["content"])
    said = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return json.dumps({"image": RECORD.image, "conversations": said} | parts)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        *((as_line(image=way), "is outside the dataset folder") for way in WAYS_OUT),
        (as_line(image="\x1b[2J.png"), "unprintable"),
        (as_line(image="\ud800.png"), "unprintable"),
        (as_line(image="a" * 300), "is longer than 1024 characters or 255 bytes per component"),
        (as_line(image="a/" * 600), "is longer than 1024 characters or 255 bytes per component"),
        (as_line(image=10**4000), "image is 1000"),
        (as_line(assistant='{"reason": "x", "category": "LOW", "category": "HIGH"}'), "exact form"),
        (as_line(assistant='{"reason": "x", "category": ' + DEEP), "not a verdict"),
        (as_line(assistant='{"reason": "x", "category": ' + "1" * 4000 + "}"), "category 1111"),
        (LINE.replace("-2.25", "-2." + "9" * 9999), "the prompt is not that of the mission orion"),
        (as_line(assistant=answer_text(MISSION, Verdict("a\nb", "LOW"))), r"unprintable character '\\n'"),
        (as_line(assistant=answer_text(MISSION, Verdict("a\ud800b", "LOW"))), r"unprintable character '\\ud800'"),
        *(
            (as_line(user=f"<image>\n{render_prompt(MISSION, None)}".replace("image captured", n)), "")
            for n in NUMBERS[:1]
        ),
        ('{"image": "a.png", ' + LINE[1:], "the key 'image' appears twice"),
        ("\ufeff" + LINE, "BOM"),
        (DEEP, "nested too deeply"),
        ('{"image": ' * 50_000, "nested too deeply"),
        ("9" * 100_000, "Exceeds the limit"),
        ("NaN", "NaN is not a JSON number"),
        ("[1e999]", "not an object"),
        (LINE.replace(":", "\0", 1), "not JSON"),
    ],
)
def test_each_of_these_lines_is_refused_by_name(line: str, said: str) -> None:
    if not said:  # the one that is right
        assert parse_record(line, MISSION)
        return
    found = outcome(parse_record, line, MISSION)
    assert isinstance(found, RecordError)
    assert re.search(said, found.message)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_prompt_has_no_other_numbers(number: str) -> None:
    found = outcome(parse_prompt, MISSION, render_prompt(MISSION, Coordinates(1.5, 2.5)).replace("1.5", number))
    assert isinstance(found, OrionError)


@given(st.floats(allow_nan=True), st.floats(allow_nan=True))
@example(math.nan, 0.0)
@example(0.0, math.inf)
@example(-0.0, -90.0)
def test_coordinates_are_on_the_globe(lon: float, lat: float) -> None:
    where = outcome(Coordinates, lon, lat)
    if isinstance(where, Coordinates):
        assert abs(where.lon) <= 180
        assert abs(where.lat) <= 90
        again = parse_prompt(MISSION, render_prompt(MISSION, where))
        assert again is not None
        assert abs(again.lon - where.lon) <= 0.0051


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    dataset = tmp_path / "dataset"
    dataset.mkdir()
    (tmp_path / "secret.png").write_bytes(b"secret")
    for name, target in (("out.png", tmp_path / "secret.png"), ("up", tmp_path), ("round.png", dataset / "round.png")):
        (dataset / name).symlink_to(target)
    for image, said in (
        ("out.png", "is outside"),
        ("up/secret.png", "is outside"),
        ("round.png", "is not a valid path"),
    ):
        with pytest.raises(RecordError, match=said):
            image_path(dataset, Record(image, None, SAID, MISSION))


# Files that are none


@pytest.mark.parametrize("name", ["train_dataset.jsonl", "places.csv", "places.jsonl", "places.geojson", "own.toml"])
@pytest.mark.parametrize("what", ["pipe", "endless", "folder", "huge", "not UTF-8", "link to itself"])
def test_a_table_that_is_no_file_is_refused_at_once(name: str, what: str, tmp_path: Path) -> None:
    path = tmp_path / name
    match what:
        case "pipe":
            os.mkfifo(path)
        case "endless":
            path.symlink_to("/dev/zero")
        case "folder":
            path.mkdir()
        case "huge":
            with path.open("wb") as file:
                file.truncate(2**40)
        case "not UTF-8":
            path.write_bytes(b'{"a": "\xff"}')
        case _:
            path.symlink_to(path)
    read: Any = {
        "train_dataset.jsonl": lambda path: read_records(path, MISSION),
        "own.toml": lambda path: load_settings(str(path)),
    }
    found = outcome(read.get(name, load_catalogue), path, named=path)
    said = {"huge": "the limit is", "not UTF-8": "is not UTF-8", "link to itself": "cannot be read"}
    assert said.get(what, "is not a regular file") in found.message


def test_a_file_in_proc_is_read_to_its_bound() -> None:
    """Sizes are 0 there, so only reading shows what there is."""
    with pytest.raises(OrionError, match="more than 10 bytes, the limit"):
        read_text(Path("/proc/self/status"), 10)


@given(json_values)
@example({"a": 1})
def test_json_is_read_as_it_was_written(value: Any) -> None:
    """Or refused, when it is more than JSON: NaN, infinities."""
    text = json.dumps(value)
    if re.search("NaN|Infinity", re.sub(r'"(?:[^"\\]|\\.)*"', "", text)):
        with pytest.raises(ValueError, match="is not a JSON number"):
            parse_json(text)
    else:
        assert parse_json(text) == value


# Catalogues


@given(st.lists(st.lists(texts, min_size=1, max_size=7), min_size=1, max_size=3), st.booleans())
def test_cells_are_places_or_named(folder: Path, rows: list[list[str]], header: bool) -> None:
    lines = [",".join(COLUMNS)] if header else []
    lines += [",".join(cells) for cells in rows]
    check_places(folder / "places.csv", "\n".join(lines).encode("utf-8", "surrogatepass"))


SPREADSHEET = 'sep=;\r\n"a";b;c\r\n"1\r\n2";48,85;\u5317\r\n'


@given(
    st.one_of(mutated(SPREADSHEET.encode("utf-8-sig")), mutated(SPREADSHEET.encode("utf-16"))),
    st.sampled_from([read_csv, lambda path: list(json_lines(path)), lambda path: list(numbered_lines(path))]),
)
def test_a_table_is_rows_or_named(folder: Path, data: bytes, read: Any) -> None:
    path = folder / "table"
    path.write_bytes(data)
    found = outcome(read, path, named=path)
    for line, cells in [] if isinstance(found, OrionError) else found:
        assert 1 <= line <= data.count(b"\n") + data.count(b"\r") + 1
        assert isinstance(cells, (str, bytes)) or all(isinstance(cell, str) for cell in cells.values())


@given(st.one_of(mutated(to_bytes(PLACE)), replaced(PLACE).map(to_bytes)))
def test_a_json_line_is_a_place_or_named(folder: Path, line: bytes) -> None:
    check_places(folder / "places.jsonl", to_bytes(PLACE | {"name": "b"}) + b"\n" + line)


@given(replaced({"type": "FeatureCollection", "features": [FEATURE, FEATURE]}))
def test_a_feature_is_a_place_or_named(folder: Path, value: Any) -> None:
    check_places(folder / "places.geojson", to_bytes(value))


@given(st.sampled_from(sorted(PLACE)), st.one_of(texts, json_values))
def test_one_wrong_value_is_named(folder: Path, column: str, value: Any) -> None:
    check_places(folder / "places.jsonl", to_bytes(PLACE | {column: value}))


def check_places(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    found = outcome(load_catalogue, path, drawable=False, named=path)
    for target in [] if isinstance(found, OrionError) else found:
        assert re.fullmatch(r"[a-z0-9_]+", target.name)  # it becomes a file's name
        assert target.coordinates is not None
        assert math.isfinite(target.coordinates.lon + target.coordinates.lat)
        assert not reason_fault(target.reason)
        assert target.reason


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.csv", "name,name\na,b", "column 'name' twice"),
        ("a.csv", ",".join(COLUMNS) + "\n" + "x" * 200_000, "line 2: not CSV: field larger"),
        ("a.csv", ",".join(COLUMNS) + '\n"a,HIGH', "line 2: not CSV: a double quote is opened and not closed"),
        ("a.csv", ",".join(COLUMNS) + "\n../../a,HIGH,mega_port,1,2,Quays.", "characters other than a-z"),
        ("a.csv", ",".join(COLUMNS) + "\na,HIGH,mega_port,nan,inf,Quays.", "lon 'nan' is not a number"),
        ("a.csv", ",".join(COLUMNS) + "\na,HIGH,mega_port,1,2,Qu\x1bays.", r"unprintable character '\\x1b'"),
        ("a.csv", ",".join(COLUMNS) + 2 * ("\n" + "x" * 9999 + ",HIGH"), "name 'x{79}... is already used on line 2"),
        ("a.csv", "", "no places"),
        ("a.csv", "\0", "line 1 has a NUL character"),
        ("a.jsonl", DEEP, "line 1: not JSON: nested too deeply"),
        ("a.jsonl", '{"name": "a", "name": "b"}', "the key 'name' appears twice"),
        ("a.jsonl", '{"lon": ' + "9" * 5000 + "}", "Exceeds the limit"),
        ("a.jsonl", json.dumps(PLACE | {"lon": math.nan}), "NaN is not a JSON number"),
        ("a.jsonl", json.dumps(PLACE | {"lon": 0}).replace("0", "1e999"), "lon 'inf' is not a number"),
        ("a.jsonl", json.dumps(PLACE | {"reason": ["Quays."]}), "the reason is empty"),
        ("a.jsonl", json.dumps(PLACE | {"name": json.loads("[" * 900 + "]" * 900)}), "name '' has"),
        ("a.geojson", "[]", "is not a GeoJSON"),
        ("a.geojson", DEEP, "nested too deeply"),
        ("a.geojson", '{"features": [null]}', "feature 1 is not a Point"),
    ],
)
def test_each_of_these_catalogues_is_refused_by_name(name: str, data: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(data, encoding="utf-8")
    found = outcome(load_catalogue, path, drawable=False, named=path)
    assert isinstance(found, OrionError)
    assert re.search(said, found.message)


TABLE = 'file;Label;lon;lat;caption;x\np0.png;HIGH;1,5;2;"Long\nquays.";1\npictures/P1;low;;;Forest.;\n'


@given(
    st.one_of(
        mutated(TABLE.encode()), st.tuples(texts, texts).map(lambda cells: "\n".join(cells).encode(errors="replace"))
    )
)
def test_a_table_of_pictures_is_read_or_each_mistake_is_named(own: Path, data: bytes) -> None:
    (own / "labels.csv").write_bytes(data)
    contents = outcome(read_contents, own, MISSION, named=own)
    assert contents.layout
    assert all(finding.place and finding.message and finding.fix for finding in contents.findings)
    found = outcome(Directory, own, MISSION, named=own)
    assert isinstance(found, OrionError) == bool(contents.errors)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    (folder / "pictures").mkdir()
    for name in ("p0.png", "pictures/p1.png"):
        (folder / name).touch()
    return folder


@pytest.mark.parametrize("name", [way for way in WAYS_OUT if "C:" not in way])
def test_a_table_of_pictures_stays_in_its_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "table.jsonl").write_text(json.dumps({"file_name": name, "category": "HIGH"}))
    found = outcome(Directory, tmp_path, MISSION, named=tmp_path)
    assert isinstance(found, OrionError)
    assert "table.jsonl line 1" in found.message


def test_the_shipped_catalogue_has_only_reasons_that_can_be_taught() -> None:
    assert not [target.name for target in load_catalogue() if reason_fault(target.reason)]


@pytest.mark.shared
def test_the_published_splits_have_only_reasons_that_can_be_taught() -> None:
    assert {name: len(read_split(SHARED / "orion-dataset", name, MISSION)) for name in ("train", "val", "test")}  # type: ignore[arg-type]


# Settings

PRESET = b'preset = "own"\n[fine_tune]\nrank = 8\nlearning_rate = 2e-4\n[mission]\nprior = [0.1, 0.2, 0.7]\n'


@given(mutated(PRESET))
def test_a_preset_is_settings_or_named(folder: Path, data: bytes) -> None:
    path = folder / "own.toml"
    path.write_bytes(data)
    check_settings(outcome(load_settings, str(path), named=path))


@given(
    st.sampled_from(["fine_tune", "base", "dataset", "mission", "preset", "variants", "x", ""]),
    st.sampled_from(["rank", "learning_rate", "prior", "values", "url", "captured_from", "quantizations", "y", ""]),
    st.one_of(texts, json_values.map(json.dumps), st.text(alphabet="[]{}\"'=.\n-0123456789einfax", max_size=30)),
)
def test_an_assignment_is_a_setting_or_named(section: str, key: str, value: str) -> None:
    check_settings(outcome(load_settings, "tiny", [f"{section}.{key}={value}"]))


def check_settings(found: Any) -> None:
    if isinstance(found, OrionError):
        return
    assert isinstance(found, Settings)
    json.dumps(found.model_dump(mode="json"), allow_nan=False)  # raises where a number is not finite


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("x = " + DEEP, "is not TOML"),
        ("x = " + "9" * 5000, "is not TOML"),
        ("[fine_tune]\nrank = 0x" + "f" * 5000, r"fine_tune\.rank: .*that cannot be printed"),
        ("[fine_tune]\nlearning_rate = inf", r"fine_tune\.learning_rate: input should be a finite number"),
        ("[fine_tune]\ndropout = nan", r"fine_tune\.dropout: input should be a finite number"),
        ("[mission]\nprior = [nan, 0.5, 0.5]", r"mission\.categories\.0\.prior: input should be a finite number"),
        ("[fine_tune]\nrank = 1\nrank = 2", "is not TOML"),
        ('"\\u001b[2J" = 1', r"\\x1b\[2J: there is no such key"),
        ("base = 1", "base: "),
        ("\n".join(f"k{number} = 1" for number in range(500)), "has 500 mistakes: .*; and 480 more"),
    ],
)
def test_each_of_these_presets_is_refused_by_name(data: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text(data, encoding="utf-8")
    found = outcome(load_settings, str(path), named=path)
    assert isinstance(found, OrionError)
    assert re.search(said, found.message)


# Verdicts

FENCE = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.DOTALL)


@given(
    st.one_of(
        texts, mutated(answer_text(MISSION, SAID).encode()).map(lambda data: data.decode("utf-8", "surrogateescape"))
    )
)
def test_an_answer_is_a_verdict_or_none(answer: str) -> None:
    found = outcome(parse_verdict, MISSION, answer)
    assert found is None or found.category in MISSION.names


@given(st.text(alphabet="`json \n{}x\t\u2003", max_size=24), st.booleans())
@example("``````", False)
@example("```json```", False)
@example("```jsonjson```", True)
def test_fences_are_taken_off_as_their_pattern_does(inside: str, fenced: bool) -> None:
    """Put around a verdict: the fence by hand and the pattern agree on every short text."""
    said = answer_text(MISSION, SAID)
    answer = f"```{inside}{said}{inside}```" if fenced else f"{inside}{said}{inside}"
    text = answer.strip()
    match = FENCE.fullmatch(text)
    try:
        plain = json.loads(match[1] if match else text) == json.loads(said)
    except ValueError:
        plain = False
    assert (parse_verdict(MISSION, answer) is not None) == plain


@pytest.mark.parametrize(
    "answer",
    [
        "```" + " " * 1_000_000 + "x",
        "```json" + "\n" * 1_000_000 + "`",
        DEEP,
        '{"reason": "x", "category": ' * 50_000,
        '{"reason": "x", "category": ' + "9" * 100_000 + "}",
        '{"reason": "x", "category": NaN}',
        '{"reason": "x", "category": ["HIGH"]}',
        '{"reason": null, "category": "HIGH"}',
        '\ufeff{"reason": "x", "category": "HIGH"}',
        '{"reason": "x\0", "category": "HIGH"}',
    ],
)
def test_an_answer_without_a_verdict_is_none_in_no_time(answer: str) -> None:
    assert outcome(parse_verdict, MISSION, answer) is None


# A run folder's own files, spoilt

SPOILT = ["", "[]", "null", "1", '"x"', "{}", DEEP, '{"files": 1}', '{"files": {}}', "\0", "\ud800", "9" * 5000, "NaN"]


@pytest.mark.parametrize("data", SPOILT)
def test_a_spoilt_file_of_a_run_is_named(data: str, tmp_path: Path) -> None:
    for name, read in (
        (quantize.PAIR, quantize.check_pair),
        (threshold.FILE_NAME, lambda folder: threshold.read(folder, folder)),
        (manifest.FILE_NAME, manifest.read_manifest),
        (SETTINGS_FILE, open_run),
        ("predictions.jsonl", lambda folder: read_predictions(folder, MISSION)),
    ):
        (tmp_path / name).write_bytes(data.encode("utf-8", "surrogatepass"))
        found = outcome(read, tmp_path, named=tmp_path)
        if isinstance(found, OrionError):
            continue
        assert (name, data) in {("predictions.jsonl", ""), (SETTINGS_FILE, "{}")}


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x"])
def test_a_manifest_names_nothing_outside_its_folder(name: str, tmp_path: Path) -> None:
    """`orion clean` deletes what a manifest names."""
    (tmp_path / "x").write_text("keep")
    run = tmp_path / "run"
    run.mkdir()
    fields = {"stage": "fuse", "settings": {}, "inputs": {}, "versions": {}, "seconds": 1.0}
    (run / manifest.FILE_NAME).write_text(json.dumps(fields | {"outputs": {name: "0"}}))
    with pytest.raises(OrionError, match="is outside the folder"):
        manifest.remove_outputs(run, lambda output: True)
    assert (tmp_path / "x").read_text() == "keep"


@given(replaced({"stage": "a", "settings": {}, "inputs": {}, "outputs": {"b": "0"}, "versions": {}, "seconds": 1}))
def test_a_manifest_is_one_or_named(folder: Path, value: Any) -> None:
    path = folder / manifest.FILE_NAME
    path.write_bytes(to_bytes(value))
    found = outcome(manifest.read_manifest, folder, named=path)
    path.unlink()
    if isinstance(found, manifest.Manifest):
        assert all(isinstance(name, str) for name in found.outputs)


# Replies of a llama.cpp server

REPLY = {
    "content": '{"reason": "x',
    "stopping_word": '"category": "',
    "tokens_predicted": 3,
    "tokens": [5, 6],
    "media_marker": "<__media__>",
    "data": [{"id": "model"}],
    "choices": [{"message": {"content": "x"}}],
    "completion_probabilities": [
        {"bytes": list(b"ab"), "top_logprobs": [{"id": 1, "logprob": -0.2}, {"id": 2, "logprob": -3.5}]},
        {"bytes": list(b"c"), "top_logprobs": [{"id": 1, "logprob": -0.3}, {"id": 2, "logprob": -2.5}]},
    ],
}


class Parrot(BaseHTTPRequestHandler):
    """Says the same to everything, after the labels were tokenized."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a body waits up to 40 ms for the acknowledgement of its header
    body = b""
    encoding = ""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(self.body)))
        if self.encoding:
            self.send_header("Content-Encoding", self.encoding)
        self.end_headers()
        self.wfile.write(self.body)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Parrot)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    found = Client(f"http://127.0.0.1:{server.server_port}", turn=lfm2_vl.TURN)
    yield found
    found.close()
    server.shutdown()
    server.server_close()


@given(st.one_of(replaced(REPLY).map(to_bytes), mutated(to_bytes(REPLY))))
def test_a_reply_is_an_answer_or_no_answer(client: Client, body: bytes) -> None:
    Parrot.body = body
    client._marker, client._primed = "", b""
    for ask in (client.served_models, lambda: client.tokenize("x"), lambda: client.chat_completion("x", [], 1)[0]):
        found = outcome(ask)
        assert isinstance(found, (str, list, ServerError, AnswerError))
    asked: dict[str, Any] = {"cue": '"category": "', "after_cue": [("", [1, 2, 3])], "grammars": {"": "a"}}
    found = outcome(client.complete_and_score, "<image>\nx", b"", 9, **asked, further={"ab": [1, 2]}, primed=True)
    if isinstance(found, OrionError):
        assert isinstance(found, (ServerError, AnswerError))
        return
    text, log_probabilities, further = found
    text.encode()
    assert all(value <= 0.001 for value in further.get("ab", []))
    assert log_probabilities is None or all(value <= 0.001 for value in log_probabilities[0])


@given(replaced(REPLY["completion_probabilities"]))
@example([{"top_logprobs": []}])
@example([{"top_logprobs": [{"id": 1, "logprob": math.nan}]}])
@example([{"top_logprobs": [{"id": 1, "logprob": None}]}])
@example([{"top_logprobs": [{"id": [], "logprob": 0}]}])
@example([{"top_logprobs": [{"id": 1, "logprob": 1e999}]}])
@example([{"top_logprobs": [{"id": 1, "logprob": -1e300}]}])
@example([{"top_logprobs": [{"id": 1, "logprob": 10**400}]}])
@example({"0": 1})
def test_probabilities_are_numbers_or_no_answer(listed: Any) -> None:
    from orion_triage.mission.answer import Answer

    found = outcome(first_log_probabilities, {"completion_probabilities": listed}, [1, 2, 3])
    if isinstance(found, OrionError) or found is None:
        return
    scores = Answer.scored("x", found).scores
    assert scores is not None
    assert sum(scores) == pytest.approx(1)
    assert all(0 <= score <= 1 for score in scores)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokens": [1.5]}, "has no list of token ids"),
        ({"tokens": [True]}, "has no list of token ids"),
        ({"tokens": [2**40]}, "has no list of token ids"),
        ({"tokens": {"0": 1}}, "has no list of token ids"),
    ],
)
def test_token_numbers_are_numbers(client: Client, change: dict[str, Any], said: str) -> None:
    Parrot.body = to_bytes(REPLY | change)
    with pytest.raises(ServerError, match=said):
        LlamaCppBackend(client, MISSION, max_new_tokens=9)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"media_marker": 5}, "media_marker is 5"),
        ({"media_marker": "\x1b[2J"}, "media_marker is"),
        ({"tokens_predicted": None}, "no tokens_predicted"),
        ({"tokens_predicted": 1e300}, "no tokens_predicted"),
        ({"content": ["x"]}, "no content"),
        ({"content": "\ud800"}, "not UTF-8"),
        ({"completion_probabilities": [{}]}, "no valid log-probabilities"),
    ],
)
def test_each_of_these_replies_is_no_answer(client: Client, change: dict[str, Any], said: str) -> None:
    Parrot.body = json.dumps(REPLY | change).encode()
    client._marker, client._primed = "", b""
    asked: dict[str, Any] = {"cue": '"category": "', "after_cue": [("", [1])]}
    found = outcome(client.complete_and_score, "<image>\nx", b"", 9, **asked, primed=False)
    assert isinstance(found, (ServerError, AnswerError))
    assert said in found.message


@pytest.mark.parametrize("encoding", ["gzip", "gzip, gzip", "deflate", "br", "x"])
def test_packed_replies_are_not_unpacked(client: Client, encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice packed, 64 kB become 64 GB, in one piece."""
    monkeypatch.setattr(Parrot, "encoding", encoding)
    Parrot.body = to_bytes(REPLY)
    with pytest.raises(ServerError, match="is compressed"):
        client.props()


# Replies of SimSat


@given(st.integers(100, 599), texts, texts, texts, st.binary(max_size=64))
def test_a_simsat_reply_is_bytes_or_a_reason(status: int, told: str, later: str, place: str, body: bytes) -> None:
    headers = {"mapbox_metadata": told, "retry-after": later, "location": place}
    answer = simsat._judged(status, headers, body)
    if isinstance(answer, bytes):
        assert status == 200
        assert simsat._damage(answer)
        return
    assert answer.why.isprintable()
    assert len(answer.why) < 400
    assert answer.wait_seconds >= 0


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("nan", 0),
        ("-5", 0),
        ("1e999", math.inf),  # the caller's longest wait bounds it
        ("Mon, 01 Jan 99999 00:00:00 GMT", 0),
        ("Mon, 01 Jan 2001 00:00:00 +99999999999999", 0),
        ("Mon, 01 Jan 2001 00:00:00 -0000", 0),
        ("9" * 5000, math.inf),
    ],
)
def test_a_wish_to_wait_is_a_number(value: str, seconds: float) -> None:
    assert retry_after_seconds(value) == seconds


def test_a_key_is_cut_out_of_what_simsat_says() -> None:
    answer = simsat._judged(502, {}, json.dumps({"detail": "\x1b[2Jhttps://x/?access_token=pk.secret&y"}).encode())
    assert not isinstance(answer, bytes)
    assert "secret" not in answer.why
    assert answer.why == r"HTTP 502: \x1b[2Jhttps://x/?access_token=...&y"
