"""review/: which frames people see, the page and the tasks, and what comes back."""

import json
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from sklearn.metrics import cohen_kappa_score

from orion_triage.dataset.labelled import read_labelled
from orion_triage.errors import OrionError
from orion_triage.review.choose import RANDOM, UNLIKE, LeftOut, Logged, choose, margin, read_log, why_of
from orion_triage.review.labels import CONFLICTS, Label, merge, read_labels, read_task, write_dataset
from orion_triage.review.task import CONFIG_FILE, FRAMES_FILE, PAGE_FILE, TASKS_FILE, found_in, usable, write
from orion_triage.safe.files import sha256_of_file
from tests.chromium import Chromium
from tests.conftest import MISSION, orion, structured_picture

H, M, L = MISSION.names
HOSTILE = '</script><script>document.title="x"</script> "quotes" \'and\' & \u2028 a line'


def row(name: str, scores: tuple[float, float, float], **more: Any) -> dict[str, Any]:
    """A line of `orion triage --out`."""
    category = MISSION.names[max(range(3), key=lambda index: scores[index])]
    values = {"file": name, "category": category, "model_category": category, "decided_by": "model", "reason": "Why."}
    return values | {"scores": dict(zip(MISSION.names, scores, strict=True)), "error": "", "pair": "x"} | more


def log_of(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


def frames_in(folder: Path, count: int) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        structured_picture(number).save(folder / f"{number:02d}.png", compress_level=1)
    return [str(folder / f"{number:02d}.png") for number in range(count)]


def logged(number: int, sure: float = 0.9, **changed: Any) -> Logged:
    scores = {H: sure, M: 1 - sure, L: 0.0}
    values = {"category": H, "model_category": H, "reason": "", "scores": scores, "decided_by": "model"}
    return Logged(**({"file": f"{number:04d}"} | values | changed))


def test_a_log_is_read_with_the_last_line_of_each_frame(tmp_path: Path) -> None:
    rows = [row("a.png", (0.8, 0.1, 0.1)), row("b.png", (0.2, 0.7, 0.1)), row("a.png", (0.1, 0.1, 0.8))]
    flight = {"file": "c.raw", "moved_to": "c-1.raw", "category": None, "scores": None, "sha256": "0"}
    found = read_log(log_of(tmp_path / "log", [*rows, flight]), MISSION)
    assert [(frame.file, frame.category) for frame in found] == [("a.png", L), ("b.png", M), ("c-1.raw", None)]
    for line, said in (
        ("no JSON", "log:1 is not a line"), ('{"file": 1}', "log:1"), ('{"category": "HIGH"}', "log:1"),
        ('{"file": "a", "category": "FIRE", "scores": null}', "'FIRE' is not a category of the mission"),
        ("[]", "log:1"), ("", "has no frame"),
        ('{"file": "a", "category": "HIGH", "scores": {"HIGH": 0.5}}', "a number for each category"),
        ('{"file": "a", "category": "LOW", "scores": {"HIGH": NaN, "MEDIUM": 0, "LOW": 0}}', "a number for each"),
    ):  # fmt: skip
        (tmp_path / "log").write_text(line + "\n" if line else "")
        with pytest.raises(OrionError, match=re.escape(said)):
            read_log(tmp_path / "log", MISSION, LeftOut())
    with pytest.raises(OrionError, match="does not exist"):
        read_log(tmp_path / "gone", MISSION)


def test_damaged_lines_of_a_log_are_left_out_and_said(tmp_path: Path) -> None:
    """A power loss may leave one in the middle; the flight client tolerates it."""
    whole = [json.dumps(row(name, (0.8, 0.1, 0.1))).encode() for name in ("a.png", "b.png")]
    for damage in (
        b'{"file": "c.p',
        b"\xff\x00",
        b"[]",
        b'{"file": "c.png"}',
        b'{"file": "c", "category": null, "sha256": 5}',
    ):
        (tmp_path / "log").write_bytes(b"\n".join([whole[0], damage, whole[1], damage]) + b"\n")
        left_out = LeftOut()
        assert [frame.file for frame in read_log(tmp_path / "log", MISSION, left_out)] == ["a.png", "b.png"]
        (said,) = left_out.in_words()
        assert said.startswith(f"left out: 2 lines that cannot be used, for example {tmp_path}/log:2 is not a line")
        with pytest.raises(OrionError, match="log:2 is not a line"):
            read_log(tmp_path / "log", MISSION)
    log_of(tmp_path / "log", [row("a.png", (0.8, 0.1, 0.1)), {"file": "b", "category": "FIRE"}])
    with pytest.raises(OrionError, match="log:2: 'FIRE' is not a category of the mission"):
        read_log(tmp_path / "log", MISSION, LeftOut())


def test_a_frame_is_shown_only_with_its_own_picture(tmp_path: Path) -> None:
    paths = [Path(name) for name in frames_in(tmp_path / "frames", 3)]
    hashes = [sha256_of_file(path) for path in paths]
    frames = [replace(logged(n, file=str(path)), sha256=hashes[n].upper()) for n, path in enumerate(paths)]
    log_of(tmp_path / "log", [row(one.file, (0.8, 0.1, 0.1), sha256=one.sha256) for one in frames])
    for folder in (None, tmp_path / "frames"):
        structured_picture(1).save(paths[1], compress_level=1)
        left_out = LeftOut()
        found = usable(read_log(tmp_path / "log", MISSION, left_out), folder, left_out)
        assert [(one.file, left_out.in_words()) for one in found] == [(str(path), []) for path in paths]
        structured_picture(9).save(paths[1])
        found = usable(read_log(tmp_path / "log", MISSION, left_out), folder, left_out)
        assert [one.file for one in found] == [str(paths[0]), str(paths[2])]
        assert left_out.in_words() == [
            f"left out: 1 frame whose file is not the logged one, for example {paths[1]}: its SHA-256 begins "
            f"with {sha256_of_file(paths[1])[:12]}, in the log with {hashes[1][:12]}"
        ]


def test_two_frames_of_a_log_are_never_one_picture(tmp_path: Path) -> None:
    (own,) = frames_in(tmp_path / "flat", 1)
    (tmp_path / "flat" / "f.png").write_bytes(Path(own).read_bytes())
    sha256 = sha256_of_file(Path(own))
    one, two = (logged(n, file=f"two/{name}/f.png") for n, name in enumerate("ab"))
    other = logged(2, file="00.png")

    def found(*frames: Logged) -> tuple[list[str], list[str]]:
        left_out = LeftOut()
        return [frame.reason for frame in usable(frames, tmp_path / "flat", left_out)], left_out.in_words()

    one, two, other = (replace(frame, reason=name) for frame, name in ((one, "one"), (two, "two"), (other, "other")))
    names, (said,) = found(one, two, other)
    assert names == ["other"]
    assert said == (
        "left out: 2 frames with the same file as another one, and no hash that decides, for example two/a/f.png and "
        f"two/b/f.png: both would be {tmp_path}/flat/f.png"
    )
    assert found(one, replace(two, sha256=sha256), other)[0] == ["two", "other"]
    assert found(replace(one, sha256="0" * 64), two, other)[0] == ["two", "other"]
    assert found(replace(one, sha256=sha256), replace(two, sha256=sha256), other)[0] == ["other"]
    assert found(one)[0] == ["one"], "the only frame of a name"
    left_out = LeftOut()
    again = [replace(other, file=own), replace(other, file=f"{tmp_path}/flat/../flat/00.png", reason="last")]
    assert [frame.reason for frame in usable(again, None, left_out)] == ["last"], "one file under two names"


def test_frames_that_cannot_be_read_do_not_block_the_others(tmp_path: Path) -> None:
    paths = frames_in(tmp_path / "frames", 6)
    Path(paths[1]).write_bytes(Path(paths[1]).read_bytes()[:200])
    Path(paths[2]).unlink()
    rows = [row(path, (0.2, 0.5, 0.3)) for path in paths]
    rows[1] |= {"category": None, "scores": None, "error": "damaged"}
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows) + "half a li\n")
    made = orion("review", "new", "log.jsonl", "task", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert "4 frames (" in made.stderr
    for said in (
        "left out: 1 frame that cannot be read, for example", "frames/01.png",
        "left out: 1 frame without a file, for example", "frames/02.png does not exist",
        "left out: 1 line that cannot be used, for example log.jsonl:7 is not a line",
    ):  # fmt: skip
        assert said in made.stderr
    for path in paths:
        Path(path).unlink(missing_ok=True)
    none = orion("review", "new", "log.jsonl", "other", cwd=tmp_path)
    assert (none.returncode, (tmp_path / "other").exists()) == (1, False)
    assert "no frame of the log can be used: left out: 1 line" in none.stderr
    assert "6 frames without a file" in none.stderr


def test_what_teaches_most_comes_first_beside_an_even_share() -> None:
    frames = [logged(n, 0.95) for n in range(100)]
    frames[7] = logged(7, category=None)
    frames[8] = logged(8, decided_by=UNLIKE, category=M)
    frames[9] = logged(9, category=M, decided_by="threshold 0.2")
    frames[10] = logged(10, 0.51)
    frames[11] = logged(11, 0.55)
    assert [why_of(frames[n]) for n in (7, 8, 9, 10)] == ["no verdict", UNLIKE, "overruled", "uncertain"]
    assert margin(frames[10]) == pytest.approx(0.02)
    chosen = choose(frames, 5, random_share=0, blind_share=0, seed=1)
    assert {int(one.frame.file) for one in chosen} == {7, 8, 9, 10, 11}
    assert choose(frames[::-1], 5, random_share=0, blind_share=0, seed=1) == chosen, "in any order of the log"
    mixed = choose(frames, 10, random_share=0.4, blind_share=0.3, seed=2)
    assert Counter(one.why == RANDOM for one in mixed) == {True: 4, False: 6}
    assert sum(one.blind for one in mixed) == 3
    assert len({one.frame.file for one in mixed}) == 10
    assert len(choose(frames[:4], 10, random_share=0.5, blind_share=0, seed=1)) == 4


def test_the_random_share_is_drawn_from_all_frames_alike() -> None:
    frames = [logged(n, 0.5 + n / 250) for n in range(100)]
    times = Counter(
        one.frame.file
        for seed in range(300)
        for one in choose(frames, 20, random_share=0.5, blind_share=0, seed=seed)
        if one.why == RANDOM
    )
    assert len(times) == 100
    assert min(times.values()) >= 12
    assert max(times.values()) <= 55  # 30 each on average; the most uncertain are no more frequent
    assert abs(sum(times[f"{n:04d}"] for n in range(50)) / 3000 - 0.5) < 0.04


def make_task(folder: Path, count: int) -> Path:
    """A task of so many frames, among them one whose reason is an attack and one whose name is odd."""
    names = frames_in(folder / "frames", count)
    odd = folder / "frames" / 'a "b" <i>&.png'
    Path(names[3]).rename(odd)
    names[3] = str(odd)
    rows = [row(name, (0.2, 0.5, 0.3)) for name in names]
    rows[5]["reason"] = HOSTILE
    frames = read_log(log_of(folder / "log.jsonl", rows), MISSION)
    chosen = choose(frames, count, random_share=0.2, blind_share=0.2, seed=3)
    write(folder / "task", chosen, MISSION, "log.jsonl")
    return folder / "task"


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of 25 frames, which nobody changes."""
    return make_task(tmp_path_factory.mktemp("review"), 25)


def test_a_task_says_what_belongs_to_each_frame(task: Path) -> None:
    rows = read_task(task, MISSION)
    assert len(rows) == 25
    for one in rows.values():
        assert one["sha256"] == sha256_of_file(Path(one["file"]))
        assert (one["suggestion"], one["suggested_by"]) == (M, "log.jsonl")
    assert sum(one["blind"] for one in rows.values()) == 5
    tasks = json.loads((task / TASKS_FILE).read_text())
    assert [one["data"]["frame"] for one in tasks] == list(rows)
    for one in tasks:
        blind = rows[one["data"]["frame"]]["blind"]
        assert ("predictions" not in one) == blind, "a blind frame has no suggestion"
        if not blind:
            assert one["predictions"][0]["result"][0]["value"] == {"choices": [M]}
            assert one["predictions"][0]["score"] == 0.5
    config = (task / CONFIG_FILE).read_text()
    assert all(f'value="{name}"' in config for name in MISSION.names)
    with pytest.raises(OrionError, match="exists"):
        write(task, [], MISSION, "x")


@pytest.mark.parametrize(
    "change", [{"suggestion": "FOO"}, {"suggestion": None, "file": 7}, {"why": None}, {"id": 3}, {"blind": ...}]
)
def test_a_damaged_task_is_refused(task: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    value = json.loads((task / FRAMES_FILE).read_text())
    value["frames"][0] |= {key: one for key, one in change.items() if one is not ...}
    for key in [key for key, one in change.items() if one is ...]:
        del value["frames"][0][key]
    saved(tmp_path / FRAMES_FILE, value)
    with pytest.raises(OrionError, match="is damaged") as error:
        read_task(tmp_path, MISSION)
    assert "orion review new" in error.value.fix


def test_frames_that_were_moved_are_found_by_what_is_left_of_their_path(tmp_path: Path) -> None:
    frames_in(tmp_path / "here" / "pass-3", 2)
    for logged_as in ("/home/other/pass-3/01.png", "pass-3/01.png"):
        assert found_in(tmp_path / "here", logged_as) == tmp_path / "here" / "pass-3" / "01.png"
    assert found_in(tmp_path / "here" / "pass-3", "/x/pass-3/00.png").name == "00.png"
    assert not found_in(tmp_path / "here", "/x/gone.png").exists()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    browser = Chromium(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def press(chromium: Chromium, key: str) -> None:
    for kind in ("keyDown", "keyUp"):
        text = {"text": key} if len(key) == 1 and kind == "keyDown" else {}
        chromium.call("Input.dispatchKeyEvent", type=kind, key=key, **text)


@pytest.mark.browser
def test_25_frames_are_labelled_by_keyboard_and_an_interruption_loses_none(
    task: Path, chromium: Chromium, tmp_path: Path
) -> None:
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    chromium.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(downloads))
    chromium.open(task / PAGE_FILE, width=1280, height=900, dark=False)
    assert chromium.complaints == []
    assert [a for a in chromium.requests if not a.startswith(("file:", "data:"))] == []
    assert chromium.evaluate("document.title").startswith("Review ")
    chromium.picture(tmp_path / "review.png")
    assert Image.open(tmp_path / "review.png").size[0] == 1280
    said = [str(1 + number % 3) for number in range(25)]
    for key in said[:11]:
        press(chromium, key)
    assert chromium.evaluate("document.getElementById('count').textContent") == "11 of 25 labelled"
    chromium.open(task / PAGE_FILE, width=1280, height=900, dark=False)  # closed and opened again
    assert chromium.evaluate("document.getElementById('count').textContent") == "11 of 25 labelled"
    assert chromium.evaluate("document.getElementById('name').textContent").startswith("12 of 25")
    press(chromium, "3")
    press(chromium, "ArrowLeft")
    press(chromium, "u")
    assert chromium.evaluate("document.getElementById('count').textContent") == "11 of 25 labelled"
    for key in said[11:24]:
        press(chromium, key)
    press(chromium, "r")  # the last one with a reason: its text is no key
    chromium.call("Input.insertText", text='Quays 1 2 3 and "cranes".')
    press(chromium, "Escape")
    press(chromium, said[24])
    press(chromium, "s")
    assert chromium.evaluate("document.getElementById('state').textContent") == "Write your name first."
    chromium.call("Input.insertText", text="Anna")
    press(chromium, "Escape")
    press(chromium, "s")
    deadline = time.monotonic() + 300
    while not (files := list(downloads.glob("labels-*-Anna.json"))) and time.monotonic() < deadline:
        time.sleep(0.05)
    labels, empty = read_labels(files[0], read_task(task, MISSION), MISSION)
    assert empty == 0
    assert [label.category for label in labels] == [MISSION.names[int(key) - 1] for key in said]
    assert [label.frame for label in labels] == list(read_task(task, MISSION))
    assert (labels[24].reason, {label.labeller for label in labels}) == ('Quays 1 2 3 and "cranes".', {"Anna"})
    assert all(label.seconds is not None and label.seconds >= 0 for label in labels)
    assert chromium.complaints == []


@pytest.mark.browser
def test_reasons_and_names_are_text_whatever_is_in_them(task: Path, chromium: Chromium) -> None:
    chromium.open(task / PAGE_FILE, width=400, height=800, dark=False)
    assert chromium.evaluate("document.title").startswith("Review "), "the script in a reason did not run"
    frames = chromium.evaluate("task.frames.map((frame) => [frame.name, frame.suggestions.map((one) => one.reason)])")
    rows = list(read_task(task, MISSION).values())
    assert [name for name, _ in frames] == [Path(one["file"]).name for one in rows]
    for (_, reasons), one in zip(frames, rows, strict=True):
        assert reasons == ([] if one["blind"] else [one["reason"]])
    wide, seen = chromium.evaluate("(e => [e.scrollWidth, e.clientWidth])(document.documentElement)")
    assert wide <= seen, "a phone needs no scrolling sideways"


def page_labels(task: Path, who: str, categories: dict[int, str], seconds: float = 5) -> dict[str, Any]:
    ids = list(read_task(task, MISSION))
    labels = [
        {
            "frame": ids[index],
            "category": category,
            "reason": "",
            "at": f"2026-11-29T10:{index:02d}Z",
            "seconds": seconds,
        }
        for index, category in categories.items()
    ]
    return {"review": "x", "labeller": who, "labels": labels}


def saved(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


def annotation(category: str | None, who: Any, **more: Any) -> dict[str, Any]:
    chosen = {"from_name": "category", "to_name": "image", "type": "choices", "value": {"choices": [category]}}
    text = {"from_name": "reason", "to_name": "image", "type": "textarea", "value": {"text": ["A reason."]}}
    result = [chosen, text] if category else []
    base = {"completed_by": who, "created_at": "2026-11-29T11:00:00Z", "was_cancelled": False, "lead_time": 3.5}
    return base | {"result": result} | more


def test_label_studios_exports_are_read(task: Path, tmp_path: Path) -> None:
    tasks = json.loads((task / TASKS_FILE).read_text())
    exported = [
        {"id": 1, "data": tasks[0]["data"], "annotations": [annotation(H, {"email": "a@b.c"})], "predictions": [17]},
        {"id": 2, "data": tasks[1]["data"], "annotations": [annotation(None, 2)], "drafts": [annotation(L, 2)]},
        {"id": 3, "data": tasks[2]["data"], "annotations": [annotation(M, 2, was_cancelled=True)]},
        {"id": 4, "data": tasks[3]["data"], "annotations": [annotation(M, 2), annotation(L, 3)]},
    ]
    labels, empty = read_labels(saved(tmp_path / "export.json", exported), read_task(task, MISSION), MISSION)
    assert [(label.labeller, label.category) for label in labels] == [
        ("a@b.c", H), ("Label Studio user 2", M), ("Label Studio user 3", L),
    ]  # fmt: skip
    assert (empty, labels[0].reason, labels[0].seconds) == (2, "A reason.", 3.5)
    more = {"annotator": 1, "lead_time": 2, "created_at": "2026-11-29T11:00:00.123456Z"}
    short = [
        {**tasks[0]["data"], "id": 1, "category": H, "reason": ["A reason."], **more},
        {**tasks[1]["data"], "id": 2, **more},
    ]
    labels, empty = read_labels(saved(tmp_path / "min.json", short), read_task(task, MISSION), MISSION)
    assert ([(label.category, label.reason) for label in labels], empty) == ([(H, "A reason.")], 1)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (
            {"labels": [{"frame": "no-frame", "category": "HIGH", "at": "", "seconds": 1}], "labeller": "A"},
            "no frame of",
        ),
        ({"labels": 5, "labeller": "A"}, "neither labels of the page nor"),
        ({"labels": [], "labeller": {"x": 1}}, "neither labels of the page nor"),
        ([{"annotations": [{"result": 5}], "data": {}}], "neither labels of the page nor"),
        (7, "neither labels of the page nor"),
    ],
)
def test_other_files_are_refused(task: Path, tmp_path: Path, value: Any, said: str) -> None:
    with pytest.raises(OrionError, match=said):
        read_labels(saved(tmp_path / "labels.json", value), read_task(task, MISSION), MISSION)
    for name in ("\x1b[31mA", "A\nB", " "):
        with pytest.raises(OrionError, match="is no name of a labeller"):
            read_labels(
                saved(tmp_path / "labels.json", page_labels(task, name, {0: H})), read_task(task, MISSION), MISSION
            )
    wrong = page_labels(task, "A", {0: "FIRE"})
    with pytest.raises(OrionError, match="'FIRE' is not a category"):
        read_labels(saved(tmp_path / "labels.json", wrong), read_task(task, MISSION), MISSION)


def test_people_and_suggestions_are_compared(task: Path, tmp_path: Path) -> None:
    rows = read_task(task, MISSION)
    anna = {n: (M if n % 2 else H) for n in range(20)}
    ben = {n: (M if n % 4 else H) for n in range(10, 25)}
    labels = []
    for who, said, seconds in (("Anna", anna, 5.0), ("Ben", ben, 0.4)):
        found, _ = read_labels(saved(tmp_path / f"{who}.json", page_labels(task, who, said, seconds)), rows, MISSION)
        labels += found
    merged = merge(labels, rows, MISSION, 0)
    told = merged.figures
    both = sorted(anna.keys() & ben.keys())
    expected = cohen_kappa_score([anna[n] for n in both], [ben[n] for n in both])
    assert told["kappa"] == {"Anna, Ben": {"frames": 10, "kappa": pytest.approx(expected)}}
    ids = list(rows)
    assert told["conflicts"] == sorted(ids[n] for n in both if anna[n] != ben[n])
    assert (told["labelled"], told["not_labelled"], told["labellers"]) == (25, 0, ["Anna", "Ben"])
    every = [(ids[n], category) for said in (anna, ben) for n, category in said.items()]
    seen = [category == M for frame, category in every if not rows[frame]["blind"]]
    own = told["as_suggested"]["log.jsonl"]
    assert (own["seen"]["count"], own["seen"]["total"]) == (sum(seen), len(seen))
    quick = [category == M for frame, category in ((ids[n], c) for n, c in ben.items()) if not rows[frame]["blind"]]
    assert told["quick_as_suggested"] == sum(quick)
    # A second label of the same person replaces the first.
    again, _ = read_labels(saved(tmp_path / "again.json", page_labels(task, "Anna", {0: L})), rows, MISSION)
    later = [replace(again[0], at="2027-01-01T00:00:00Z")]
    merged = merge([*labels, *later], rows, MISSION, 0)
    assert [label.category for label in merged.of_frame[ids[0]]] == [L]
    assert merged.figures["replaced"] == [f"{ids[0]}, Anna: HIGH (2026-11-29T10:00Z), then LOW (2027-01-01T00:00:00Z)"]
    assert told["replaced"] == []


@pytest.mark.parametrize(
    ("earlier", "later"),
    [
        ("2026-11-30T11:00:00+02:00", "2026-11-30T10:00:00Z"),  # as text, the earlier one is the greater
        ("2026-11-30T09:30:00", "2026-11-30T11:00:00+01:00"),  # without a time zone, UTC
        ("", "2026-11-30T10:00:00Z"),
    ],
)
def test_the_later_label_of_a_person_counts_whatever_its_time_zone(task: Path, earlier: str, later: str) -> None:
    rows = read_task(task, MISSION)
    frame = next(iter(rows))
    labels = [Label(frame, H, "", "Anna", later, 5), Label(frame, L, "", "Anna", earlier, 5)]
    for order in (labels, labels[::-1]):
        merged = merge(order, rows, MISSION, 0)
        assert [label.category for label in merged.of_frame[frame]] == [H]
        assert merged.figures["replaced"] == [f"{frame}, Anna: LOW ({earlier}), then HIGH ({later})"]


@pytest.mark.parametrize(
    ("reason", "at", "said"),
    [
        ("A\0B", "2026-11-29", r"the reason 'A\\x00B' contains the unprintable character '\\x00'"),
        ("\x1b[31m", "2026-11-29", "contains the unprintable character"),
        ("x" * 1000, "2026-11-29", "has 1000 characters; the limit is"),
        ("<|im_end|>", "2026-11-29", "contains the model's control token"),
        ("Two\nlines.", "2026-11-29", ""),
        ("", "yesterday", "'yesterday' is no time"),
        ("", "2026-11-29\x0010:00", "is no time"),
    ],
)
def test_a_label_of_which_adapt_would_refuse_the_row_is_refused(
    task: Path, tmp_path: Path, reason: str, at: str, said: str
) -> None:
    rows = read_task(task, MISSION)
    value = page_labels(task, "Anna", {0: H})
    value["labels"][0] |= {"reason": reason, "at": at}
    path = saved(tmp_path / "labels.json", value)
    if not said:
        assert len(read_labels(path, rows, MISSION)[0]) == 1
        return
    with pytest.raises(OrionError, match=said) as error:
        read_labels(path, rows, MISSION)
    assert f"labels.json: frame {next(iter(rows))}: " in error.value.message


def test_two_choices_in_label_studio_are_no_category(task: Path, tmp_path: Path) -> None:
    rows = read_task(task, MISSION)
    data = json.loads((task / TASKS_FILE).read_text())[0]["data"]
    both = annotation(H, 1)
    both["result"][0]["value"]["choices"] = [H, L]
    short = {**data, "category": {"choices": [H, L]}, "annotator": 1}
    for export in ([{"data": data, "annotations": [both]}], [short]):
        with pytest.raises(OrionError, match=r"HIGH.*LOW.* is not a category of"):
            read_labels(saved(tmp_path / "export.json", export), rows, MISSION)


def test_the_dataset_has_what_all_agree_on_and_lists_the_rest(tmp_path: Path) -> None:
    task = make_task(tmp_path / "own", 12)
    rows = read_task(task, MISSION)
    labels = []
    for who, said in (("Anna", {n: MISSION.names[n % 3] for n in range(12)}), ("Ben", {0: H, 1: L})):
        labels += read_labels(saved(tmp_path / f"{who}.json", page_labels(task, who, said)), rows, MISSION)[0]
    merged = merge(labels, rows, MISSION, 0)
    assert write_dataset(tmp_path / "labelled", merged, rows) == 11
    found, _ = read_labelled(tmp_path / "labelled", MISSION)
    assert Counter(frame.category for frame in found) == {H: 4, M: 3, L: 4}
    conflicts = (tmp_path / "labelled" / CONFLICTS).read_text()
    assert "Anna: MEDIUM; Ben: LOW" in conflicts
    table = (tmp_path / "labelled" / "metadata.csv").read_text()
    assert "Anna; Ben" in table
    with pytest.raises(OrionError, match="exists"):
        write_dataset(tmp_path / "labelled", merged, rows)
    Path(rows[list(rows)[2]]["file"]).write_bytes(b"another picture")
    with pytest.raises(OrionError, match="is not the picture of the task"):
        write_dataset(tmp_path / "other", merged, rows)
    assert not (tmp_path / "other").exists()


def test_the_commands(tmp_path: Path) -> None:
    """On frames of the flight client, which are raw; the dataset has the same pixels with a header."""
    (tmp_path / "frames").mkdir()
    for number in range(9):
        (tmp_path / "frames" / f"{number:02d}.RAW").write_bytes(structured_picture(number).tobytes())
    rows = [row(f"{number:02d}.RAW", (0.2, 0.5, 0.3)) for number in range(9)]
    log_of(tmp_path / "log.jsonl", rows)
    made = orion("review", "new", "log.jsonl", "task", "--frames", "frames", "--count", "8", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert "8 frames (2 random, 6 uncertain)" in made.stderr
    saved(tmp_path / "labels.json", page_labels(tmp_path / "task", "Anna", {n: MISSION.names[n % 3] for n in range(7)}))
    done = orion("review", "read", "task", "labels.json", "--dataset", "labelled", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "7 of 8 frames labelled by Anna" in done.stdout
    assert "7 frames  ->  labelled" in done.stderr
    found, _ = read_labelled(tmp_path / "labelled", MISSION)
    assert len(found) == 7
    assert {one.image.tobytes() for one in found} < {structured_picture(number).tobytes() for number in range(9)}
    told = json.loads(orion("review", "read", "task", "labels.json", "--json", cwd=tmp_path).stdout)
    assert (told["frames"], told["not_labelled"]) == (8, 1)
    again = orion("review", "new", "log.jsonl", "task", cwd=tmp_path)
    assert (again.returncode, "task exists" in again.stderr) == (1, True)
    gone = orion("review", "new", "log.jsonl", "other", cwd=tmp_path)  # without --frames
    assert (gone.returncode, "Traceback" in gone.stderr, (tmp_path / "other").exists()) == (1, False, False)
    assert (tmp_path / "task" / FRAMES_FILE).is_file()
