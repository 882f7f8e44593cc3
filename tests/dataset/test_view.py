"""The page of a dataset: what it counts, shows and links, that no value becomes markup, and its script in Chromium."""

import base64
import hashlib
import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from importlib import resources
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from orion_triage.dataset import view
from orion_triage.dataset.check.facts import Finding
from orion_triage.dataset.records import IMAGES_FOLDER, Record, read_split, split_path, write_split
from orion_triage.errors import RecordError
from orion_triage.mission.prompt import Coordinates
from orion_triage.mission.verdict import Verdict
from tests.chromium import Chromium
from tests.conftest import MISSION
from tests.report.test_html import HOSTILE, Document, contrast, faults


class Page(Document):
    """The view's document; unlike the report's it has form controls and a script."""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        super().handle_starttag(tag, attrs)
        if tag == "input":
            self._open.pop()

    def cards(self) -> dict[str, dict[str, str]]:
        """Frame's name -> attributes of its card."""
        found = [attributes for _, attributes in self.elements if attributes.get("class", "").startswith("card")]
        return {attributes["data-name"]: attributes for attributes in found if "data-name" in attributes}

    def links(self) -> set[str]:
        return {attributes["href"] for tag, attributes in self.elements if tag == "a"}


def page(folder: Path, findings: list[Finding] | None = None) -> Page:
    text = view.render_view(folder, findings or [])
    text.encode()
    return Page(text)


@pytest.fixture
def dataset(small_dataset: Path, tmp_path: Path) -> Path:
    return shutil.copytree(small_dataset, tmp_path / "run" / "dataset")


def rewrite(folder: Path, name: str, **changes: object) -> None:
    """Change fields of every record of one frame."""
    for split in ("train", "val", "test"):
        records = read_split(folder, split, MISSION)
        write_split(folder, split, [Record(**vars(r) | changes) if r.name == name else r for r in records])


def error(place: str, message: str = "is wrong.", check: str = "blank-frame", fix: str = "Mend it.") -> Finding:
    return Finding("error", check, place, message, fix)


def warning(place: str, message: str = "looks odd.", check: str = "a-warning", fix: str = "Look.") -> Finding:
    return Finding("warning", check, place, message, fix)


def test_it_counts_every_frame_once_and_shows_it(dataset: Path) -> None:
    document = page(dataset)
    assert document.all("title")[0] == "Dataset run/dataset"
    counts = document.section("Counts")
    assert "train 4 4 4 12 val 2 2 2 6 test 2 2 2 6 all 8 8 8 24" in counts
    assert "36 lines: most training frames have two" in counts
    assert "12 lines have no coordinates." in counts
    assert len(document.cards()) == len(document.attributes("src")) == 24
    assert Counter(card["data-split"] for card in document.cards().values()) == {"train": 12, "val": 6, "test": 6}
    assert "train, HIGH 4 frames" in document.all("h3")
    assert "The check has no findings." in document.section("Findings")
    card = next(text for text in document.all("li") if "high_place_00" in text and "HIGH train" in text)
    assert "Dense geometric port infrastructure with long quays. lon -170.0, lat -55.0" in card
    assert "train_dataset.jsonl, lines 1, 2" in card


def test_it_needs_nothing_else_and_allows_only_its_own_script(dataset: Path) -> None:
    text = view.render_view(dataset, [error("train_dataset.jsonl:1")])
    document = Page(text)
    policy = next(a["content"] for _, a in document.elements if a.get("http-equiv") == "Content-Security-Policy")
    for tag in ("script", "style"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy
    assert not document.attributes("style")
    assert all(a.startswith("data:image/jpeg;base64,") for a in document.attributes("src"))
    ids = document.attributes("id")
    assert len(ids) == len(set(ids))
    assert {address[1:] for address in document.attributes("href")} <= set(ids)
    assert all(address.startswith("#") for address in document.attributes("href"))
    assert not [name for _, attributes in document.elements for name in attributes if name.startswith("on")]
    assert "url(" not in text
    assert "@import" not in text


def test_findings_come_errors_first_and_link_their_frames(dataset: Path) -> None:
    findings = [
        warning("test_dataset.jsonl:3", "looks like x (train_dataset.jsonl:5)."),
        warning("train_dataset.jsonl:99", "is no line."),
        error("train_dataset.jsonl:1"),
        error(f"{IMAGES_FOLDER}/low_place_14.png", "is odd.", check="aa-odd"),
    ]
    document = page(dataset, findings)
    section = document.section("Findings")
    assert "2 errors, 2 warnings." in section
    assert [summary.split(" ")[:2] for summary in document.all("summary")] == [
        ["error", "aa-odd"], ["error", "blank-frame"], ["warning", "a-warning"],
    ]  # fmt: skip
    assert section.count("Look.") == 1  # one fix of many findings is said once
    cards = document.cards()
    marked = {name for name, card in cards.items() if "data-findings" in card}
    assert marked == {"high_place_00", "low_place_14", "low_place_20", "low_place_02"}
    assert "has-error" in cards["high_place_00"]["class"]
    assert "has-warning" in cards["low_place_20"]["class"]
    items = {a["id"]: n for n, (_, a) in enumerate(document.elements) if a.get("id", "").startswith("finding-")}
    assert len(items) == 4
    start = items["finding-2"]
    links = [a["href"] for tag, a in document.elements[start : items["finding-3"]] if tag == "a"]
    assert links == [f"#{cards[name]['id']}" for name in ("low_place_20", "low_place_02")]
    assert not [a for tag, a in document.elements[items["finding-3"] : items["finding-3"] + 2] if tag == "a"]
    assert {"#finding-0", "#finding-1", "#finding-2"} <= document.links()


def test_a_long_list_of_one_check_is_cut_and_said(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A limit that few frames reach.
    monkeypatch.setattr(view, "LISTED", 3)
    document = page(dataset, [warning(f"train_dataset.jsonl:{n}") for n in range(1, 11)] + [error("a.png")])
    assert len([i for i in document.attributes("id") if i.startswith("finding-")]) == 4
    assert "The first 3 of 10 are listed. 'orion dataset check' lists all." in document.section("Findings")
    assert "#finding-4" not in document.links()
    assert sum("data-findings" in card for card in document.cards().values()) == 5  # of two lines each


def test_frames_that_are_missing_damaged_or_elsewhere_have_a_placeholder(dataset: Path, tmp_path: Path) -> None:
    images = dataset / IMAGES_FOLDER
    (images / "high_place_00.png").unlink()
    cut = images / "medium_place_01.png"
    cut.write_bytes(cut.read_bytes()[:5000])
    (images / "low_place_02.png").write_text("no picture")
    outside = tmp_path / "outside.png"
    (images / "high_place_03.png").rename(outside)
    (images / "high_place_03.png").symlink_to(outside)
    for name in ("medium_place_04.png", "low_place_05.png"):
        (images / name).unlink()
    (images / "medium_place_04.png").symlink_to("medium_place_04.png")
    os.mkfifo(images / "low_place_05.png")
    Image.new("RGB", (700, 600), "red").save(images / "high_place_06.png")  # of another size: shown all the same
    document = page(dataset)
    assert "6 frames cannot be shown. The placeholder gives the reason." in document.section("Counts")
    gone = [text for text in document.all("button") if text.startswith("No image")]
    assert len(gone) == 6
    for said in (
        "No image orion_dataset/images/high_place_00.png does not exist.",
        "medium_place_01.png is damaged",
        "low_place_02.png is not PNG, JPEG or TIFF.",
        "high_place_03.png is outside",
        "medium_place_04.png is not a valid path",
        "low_place_05.png is not a regular file",
    ):
        assert [text for text in gone if said in text], (said, gone)
    assert len([tag for tag, _ in document.elements if tag == "img"]) == 18
    assert len([tag for tag, _ in Page(view.render_view(dataset, [], root=tmp_path)).elements if tag == "img"]) == 19


def test_lines_that_are_no_record_are_counted(dataset: Path) -> None:
    path = split_path(dataset, "test")
    path.write_bytes(path.read_bytes() + b"{no JSON\n\n\xff\xfe\n")
    split_path(dataset, "val").unlink()
    document = page(dataset, [error("test_dataset.jsonl:7", "not JSON.", check="schema")])
    counts = document.section("Counts")
    assert "2 lines of test_dataset.jsonl are not valid and not shown." in counts
    assert "The val split cannot be read: No such file or directory." in counts
    assert "test 2 2 2 6" in counts
    assert "val 0 0 0 0" in counts
    assert "test_dataset.jsonl:7: not JSON." in document.section("Findings")
    for split in ("train", "test"):
        split_path(dataset, split).write_text("[]\n")
    assert "The dataset has no valid line." in page(dataset).section("Frames")
    for split in ("train", "test"):
        split_path(dataset, split).unlink()
    with pytest.raises(RecordError, match=r"has no train_dataset\.jsonl"):
        view.render_view(dataset, [])


def test_a_large_dataset_is_sampled_evenly_and_says_so(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A limit that few frames reach.
    monkeypatch.setattr(view, "SAMPLE", 12)
    done: list[tuple[int, int]] = []
    findings = [error(f"train_dataset.jsonl:{n}") for n in range(1, 25)]
    document = page(dataset, findings[:6])  # frames 0 to 2, first of their categories and so in the sample
    assert "Sample: 12 of 24 frames are shown, evenly from every split" in document.section("Counts")
    assert "more that have findings" not in document.section("Counts")
    assert "all 8 8 8 24" in document.section("Counts")
    groups = Counter((card["data-split"], card["data-category"]) for card in document.cards().values())
    assert groups == {(s, c): 2 if s == "train" else 1 for s in ("train", "val", "test") for c in MISSION.names}
    assert "train, HIGH 2 frames of 4" in document.all("h3")
    text = view.render_view(dataset, findings, progress=lambda told, at, total: done.append((at, total)))
    document = Page(text)
    assert "Sample: 12 of 24 frames are shown" in document.section("Counts")
    assert "and 6 more that have findings." in document.section("Counts")
    assert len(document.cards()) == 18
    assert done == [(n, 18) for n in range(1, 19)]
    # A limit that few frames reach.
    monkeypatch.setattr(view, "MORE_WITH_FINDINGS", 2)
    document = page(dataset, findings)
    assert len(document.cards()) == 14
    assert "(not shown)" in document.section("Findings")


def test_a_sample_leaves_out_no_group_and_is_spread() -> None:
    def card(split: str, category: str, number: int) -> view.Card:
        return view.Card(split, Record(f"{number}.png", None, Verdict("r", category), MISSION), number=number)  # type: ignore[arg-type]

    cards = [card("train", "HIGH", n) for n in range(9000)]
    cards += [card("test", "LOW", n) for n in range(9000, 9003)]
    shown, extra = view.sampled(cards)
    assert extra == 0
    assert 1990 <= len(shown) <= view.SAMPLE
    assert [c.number for c in shown if c.split == "test"] == [9000]
    numbers = [c.number for c in shown if c.split == "train"]
    assert {after - before for before, after in pairwise(numbers)} == {4, 5}
    assert view.sampled(cards[:2000]) == (cards[:2000], 0)


def test_frames_without_coordinates_are_not_on_the_map_and_counted(dataset: Path) -> None:
    assert len([a for _, a in page(dataset).elements if a.get("class", "").startswith("point")]) == 24
    for name in ("high_place_00", "low_place_20"):
        rewrite(dataset, name, coordinates=None)
    document = page(dataset)
    assert "2 frames have no coordinates and are not on the map." in document.section("Map")
    points = [a for _, a in document.elements if a.get("class", "").startswith("point")]
    assert len(points) == 22
    assert not {document.cards()[name]["id"] for name in ("high_place_00", "low_place_20")} & {
        point["href"][1:] for point in points
    }
    for split in ("train", "val", "test"):
        write_split(dataset, split, [r.without_coordinates() for r in read_split(dataset, split, MISSION)])
    document = page(dataset)
    assert "24 frames have no coordinates and are not on the map." in document.section("Map")
    assert "map-description" not in document.attributes("id")


def test_points_lie_where_the_places_are(dataset: Path) -> None:
    rewrite(dataset, "high_place_00", coordinates=Coordinates(-180.0, 12.5))
    elements = page(dataset).elements
    at = next(n for n, (_, a) in enumerate(elements) if a.get("class") == "point is-HIGH" and a["data-lon"] == "-180.0")
    assert elements[at][1]["data-lat"] == "12.5"
    assert elements[at + 2] == ("use", {"href": "#train", "x": "-180.0", "y": "-12.5"})
    cards = view.read_contents(dataset).cards
    x, y, width, height = view.world(cards)["box"]
    assert (x, y, width, height) == (-182, -87, 364, 149)  # without the Antarctic, where no place is
    rewrite(dataset, "low_place_20", coordinates=Coordinates(0.0, -90.0))
    rewrite(dataset, "low_place_02", coordinates=Coordinates(0.0, 90.0))
    assert view.world(view.read_contents(dataset).cards)["box"] == (-182, -92, 364, 184)


def test_the_rarest_and_high_points_lie_on_top(dataset: Path) -> None:
    points = [
        (card.split, card.record.verdict.category)
        for *_, card in view.world(view.read_contents(dataset).cards)["points"]
    ]
    assert [split for split, _ in points[:12]] == ["train"] * 12
    assert [category for _, category in points[8:12]] == ["HIGH"] * 4
    assert [category for _, category in points[-4:]] == ["HIGH"] * 4


def test_morphologies_come_from_the_table_that_is_there(dataset: Path) -> None:
    document = page(dataset)
    assert "by-morphology" not in document.attributes("id")
    (dataset / "targets.csv").write_text(
        "name,split,category,morphology,lon,lat\nplace_00,train,HIGH,mega_port,0,0\nlow_place_20,test,LOW,coastline,0,0\n"
        "place_01,train,MEDIUM,town\n,,,,,\n"
    )
    rewrite(dataset, "high_place_03", image=f"{IMAGES_FOLDER}/high_place_00~2.png")
    shutil.copy(dataset / IMAGES_FOLDER / "high_place_03.png", dataset / IMAGES_FOLDER / "high_place_00~2.png")
    document = page(dataset)
    given = {name: card["data-morphology"] for name, card in document.cards().items() if card["data-morphology"]}
    assert given == {
        "high_place_00": "mega_port", "high_place_00~2": "mega_port", "low_place_20": "coastline",
        "medium_place_01": "town",
    }  # fmt: skip
    assert document.all("option").count("mega_port") == 1
    assert "mega_port HIGH 2 0 0" in document.section("Counts")
    assert "unknown LOW 4 2 1" in document.section("Counts")
    (dataset / "frames.csv").write_text("name,morphology\nhigh_place_00,from_frames\n")
    assert page(dataset).cards()["high_place_00"]["data-morphology"] == "from_frames"
    (dataset / "frames.csv").write_bytes(b"id;kind\n\xff;2\n")
    assert "by-morphology" not in page(dataset).attributes("id")


def test_a_frame_with_two_labels_or_reasons_shows_both(dataset: Path) -> None:
    records = read_split(dataset, "train", MISSION)
    records[1] = Record(records[1].image, None, Verdict("Another reason.", "HIGH"), MISSION)
    records[3] = Record(records[3].image, None, Verdict("Nothing.", "LOW"), MISSION)
    records[4] = Record(records[4].image, Coordinates(1.0, 2.0), records[4].verdict, MISSION)
    records[5] = Record(records[5].image, Coordinates(3.0, 4.0), records[5].verdict, MISSION)
    write_split(dataset, "train", records)
    contents = view.read_contents(dataset)
    by_name = {(card.record.name, card.record.verdict.category): card for card in contents.cards}
    assert len(by_name) == 25
    assert by_name["high_place_00", "HIGH"].reasons == [records[0].verdict.reason, "Another reason."]
    assert by_name["medium_place_01", "MEDIUM"].lines == [3]
    assert by_name["medium_place_01", "LOW"].lines == [4]
    assert by_name["low_place_02", "LOW"].places == [Coordinates(1.0, 2.0), Coordinates(3.0, 4.0)]
    points = [card.record.name for *_, card in view.world(contents.cards)["points"]]
    assert Counter(points)["low_place_02"] == 2


def test_hostile_text_is_text(dataset: Path) -> None:
    for hostile in HOSTILE:
        said = hostile + "\u202e\ud800"  # as no record may have it
        rewrite(dataset, "high_place_18", verdict=Verdict(hostile, "HIGH"))
        rewrite(dataset, "low_place_20", image=f"{IMAGES_FOLDER}/{hostile.replace('/', '')}.png")
        (dataset / "targets.csv").write_text(f'name,morphology\nplace_00,"{hostile.replace(chr(34), chr(34) * 2)}"\n')
        document = page(dataset, [error("test_dataset.jsonl:1", said, check=hostile, fix=said), error(said)])
        tags = Counter(tag for tag, _ in document.elements)
        assert tags["script"] == 1
        assert tags["img"] == 23  # the renamed frame is missing
        assert not [name for _, attributes in document.elements for name in attributes if name.startswith("on")]
        assert hostile in document.all("p")
        assert hostile in document.all("option")
        assert hostile.replace("/", "").strip() in document.all("p")
        assert document.section("Findings").count("\\u202e") == 3
        rewrite(dataset, hostile.replace("/", ""), image=f"{IMAGES_FOLDER}/low_place_20.png")


def test_the_coastline_is_where_the_land_is() -> None:
    path = resources.files("orion_triage.dataset") / "coastline.json"
    rings = json.loads(path.read_text())
    assert len(path.read_bytes()) <= 40_000
    assert all(ring[0] == ring[-1] and len(ring) >= 4 for ring in rings)
    assert all(abs(lon) <= 180 and abs(lat) <= 90 for ring in rings for lon, lat in ring)

    def on_land(lon: float, lat: float) -> bool:
        crossed = 0
        for ring in rings:
            for (x1, y1), (x2, y2) in pairwise(ring):
                crossed += (y1 > lat) != (y2 > lat) and lon < x1 + (lat - y1) / (y2 - y1) * (x2 - x1)
        return crossed % 2 == 1

    land = {(10, 50), (134, -25), (-100, 40), (-60, -10), (20, 0), (0, -85), (-179, 67.5), (179, 67.5), (-42, 72)}
    sea = {(-30, 0), (-150, 30), (80, -30), (51, 42), (0, 85), (-179, 0), (179, 0), (5, 40), (-90, 25)}
    assert {place for place in land | sea if on_land(*place)} == land


def test_colours_keep_their_contrast(dataset: Path) -> None:
    """WCAG 2.2: 4.5 for text, 3 for what is drawn, in both modes."""
    style = view.render_view(dataset, [], thumbnail_pixels=1)
    blocks = re.findall(r":root \{\n([^}]+)\}", style)
    light, dark = (dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for block in blocks)
    assert set(light) == set(dark)
    for colours in (light, dark):
        for text in ("ink", "quiet", "link"):
            for ground in ("paper", "panel"):
                assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
        for text in ("is-0", "is-1", "is-2", "error", "warning"):
            assert contrast(colours[text], colours["panel"]) >= 4.5, text
        assert contrast(colours["onerror"], colours["error"]) >= 4.5
        assert all(contrast(colours[name], colours["land"]) >= 3 for name in ("is-0", "is-1", "is-2"))


def test_thumbnails_keep_a_page_of_360_frames_under_4_mb(dataset: Path) -> None:
    from orion_triage.dataset.catalogue import load_catalogue
    from orion_triage.dataset.sources.synthetic.draw import draw_tile, tile_seed

    records = read_split(dataset, "test", MISSION)
    for record, target in zip(records, load_catalogue()[::60], strict=True):
        draw_tile(target.morphology, tile_seed(1, target.name)).image.save(dataset / record.image)
    for split in ("train", "val"):
        split_path(dataset, split).unlink()
    small, usual = (len(view.render_view(dataset, [], thumbnail_pixels=size)) for size in (1, 128))
    assert small + 360 * (usual - small) / len(records) < 4e6 - 360 * 2000  # a card's text has less than 2 kB


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    browser = Chromium(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


SHOWN = "[...document.querySelectorAll('.card')].filter(card => card.checkVisibility()).length"
POINTS = "[...document.querySelectorAll('.point')].filter(point => point.checkVisibility()).length"

CONTROLS = "[...document.querySelectorAll('.filters, .zoom, .tip, dialog')].filter(e => e.checkVisibility()).length"


@pytest.fixture
def written(dataset: Path, tmp_path: Path) -> Path:
    """The page of a dataset with hostile reasons, a missing frame, morphologies and three findings."""
    (dataset / IMAGES_FOLDER / "low_place_23.png").unlink()
    rewrite(dataset, "high_place_18", verdict=Verdict("".join(HOSTILE) + "a" * 300, "HIGH"))
    rewrite(dataset, "medium_place_19", coordinates=None)
    names = [f"place_{n:02d}" for n in range(24)]
    rows = [f"{name},{('mega_port', 'town', 'coastline')[n % 3]}" for n, name in enumerate(names)]
    (dataset / "targets.csv").write_text("name,morphology\n" + "\n".join(rows) + "\n")
    findings = [
        error("test_dataset.jsonl:1", "".join(HOSTILE)),
        error("test_dataset.jsonl:6", "is the frame of train_dataset.jsonl:3."),
        warning("val_dataset.jsonl:2", "w" * 400),
    ]
    path = tmp_path / "view.html"
    path.write_text(view.render_view(dataset, findings))
    return path


def choose(chromium: Chromium, **values: str | bool) -> tuple[int, int, str]:
    """Set the filters; (cards shown, points shown, what is said of it)."""
    for name, value in values.items():
        field = "checked" if isinstance(value, bool) else "value"
        chromium.evaluate(
            f"(e => {{ e.{field} = {json.dumps(value)}; e.dispatchEvent(new Event('input', {{bubbles: true}})); }})"
            f"(document.querySelector('#by-{name}'))"
        )
    return chromium.evaluate(SHOWN), chromium.evaluate(POINTS), chromium.evaluate("shown.textContent")


@pytest.mark.browser
def test_a_browser_shows_it_on_a_phone_and_a_desktop_light_and_dark(
    written: Path, chromium: Chromium, tmp_path: Path
) -> None:
    grounds = {}
    for width in (360, 1280):
        for dark in (False, True):
            assert faults(chromium, written, width, dark=dark) == []
            assert chromium.evaluate(SHOWN) == 24
            assert chromium.evaluate("document.images.length") == 23
            assert chromium.evaluate("[...document.images].every(image => image.naturalWidth === 128)")
            assert chromium.evaluate("document.scripts.length") == 1
            picture = tmp_path / f"view-{width}-{dark}.png"
            chromium.picture(picture)
            with Image.open(picture) as shown:
                assert shown.width == width
                grounds[width, dark] = sum(shown.convert("RGB").getpixel((2, 2)))
    assert all((ground < 100) is dark and (ground > 600) is not dark for (_, dark), ground in grounds.items())


@pytest.mark.browser
def test_filters_hide_and_show_cards_and_points(written: Path, chromium: Chromium) -> None:
    assert faults(chromium, written, 1280, dark=False) == []
    assert choose(chromium) == (24, 23, "24 of 24 shown")
    assert choose(chromium, split="test") == (6, 5, "6 of 24 shown")
    assert choose(chromium, category="LOW") == (2, 2, "2 of 24 shown")
    assert chromium.evaluate("[...document.querySelectorAll('.group')].filter(g => g.checkVisibility()).length") == 1
    assert choose(chromium, morphology="town") == (0, 0, "0 of 24 shown")
    assert chromium.evaluate("none.checkVisibility()")
    assert choose(chromium, split="", category="") == (8, 7, "8 of 24 shown")
    chromium.evaluate("reset.click()")
    assert choose(chromium) == (24, 23, "24 of 24 shown")
    assert choose(chromium, findings=True) == (4, 4, "4 of 24 shown")
    assert choose(chromium, findings=False, text="place_1") == (10, 9, "10 of 24 shown")
    assert choose(chromium, text="<SCRIPT>alert") == (1, 1, "1 of 24 shown")
    assert choose(chromium, text="dunes place_20") == (1, 1, "1 of 24 shown")
    assert chromium.evaluate("document.querySelector('.group:not([hidden]) .left').textContent") == "1 of "
    # The link of a finding to a frame that is hidden shows it again.
    chromium.evaluate("document.querySelector('#finding-0 a').click()")
    assert choose(chromium) == (24, 23, "24 of 24 shown")
    assert chromium.evaluate("document.querySelector('.card:target').dataset.name") == "high_place_18"
    assert chromium.complaints == []


@pytest.mark.browser
def test_a_frame_is_enlarged_with_its_facts(written: Path, chromium: Chromium) -> None:
    assert faults(chromium, written, 360, dark=False) == []
    choose(chromium, split="test")
    chromium.evaluate("document.querySelector('[data-name=high_place_18] button').click()")
    inside = "document.querySelector('dialog .facts').innerText"
    assert chromium.evaluate("document.querySelector('dialog').open")
    said = chromium.evaluate(inside)
    assert "high_place_18" in said
    assert said.count("<script>alert(1)</script>") == 2  # the reason and the finding
    assert "test_dataset.jsonl, line 1" in said
    assert chromium.evaluate("document.querySelector('dialog output').textContent") == "1 of 6"
    assert chromium.evaluate("document.querySelector('dialog img').clientWidth") > 250
    for _ in range(9):
        chromium.evaluate("next.click()")
    assert "low_place_23" in chromium.evaluate(inside)
    assert "does not exist" in chromium.evaluate("document.querySelector('dialog .gone').textContent")
    wide = "(e => e.scrollWidth <= e.clientWidth)(document.querySelector('dialog'))"
    assert chromium.evaluate(wide)
    chromium.evaluate("document.querySelector('dialog a').click()")  # to another frame, which closes it
    assert not chromium.evaluate("document.querySelector('dialog').open")
    assert chromium.complaints == []


@pytest.mark.browser
def test_the_map_names_what_is_chosen_and_zooms(written: Path, chromium: Chromium) -> None:
    assert faults(chromium, written, 1280, dark=False) == []
    size = "(box => box.width)(document.querySelector('.point use').getBoundingClientRect())"
    before = chromium.evaluate(size)
    assert 6 < before < 14
    middle = (
        "(e => { e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect();"
        "return [b.x + b.width / 2, b.y + b.height / 2]; })"
    )
    number = chromium.evaluate("document.querySelector('[data-name=low_place_08]').id")
    x, y = chromium.evaluate(f"{middle}(document.querySelector('.point[href=\"#{number}\"] use'))")
    chromium.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    assert chromium.evaluate("document.querySelector('.tip').innerText") == "low_place_08"
    for kind in ("mousePressed", "mouseReleased"):
        chromium.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
    assert chromium.evaluate("document.querySelector('.here').innerText") == "low_place_08 LOW, train"
    assert chromium.evaluate("location.hash") == ""  # choosing does not leave the map
    for _ in range(3):
        chromium.evaluate("nearer.click()")
    _, _, width, _ = (
        float(part) for part in chromium.evaluate("document.querySelector('.map svg').getAttribute('viewBox')").split()
    )
    assert width == pytest.approx(364 / 8)
    assert before < chromium.evaluate(size) < 2 * before
    x, y = chromium.evaluate(f"{middle}(document.querySelector('.point[href=\"#{number}\"] use'))")
    centre = chromium.evaluate(f"{middle}(document.querySelector('.map svg'))")
    assert (x, y) == pytest.approx(centre, abs=3)
    chromium.call("Input.dispatchMouseEvent", type="mousePressed", x=x, y=y, button="left", buttons=1, clickCount=1)
    chromium.call("Input.dispatchMouseEvent", type="mouseMoved", x=x + 60, y=y, button="left", buttons=1)
    chromium.call("Input.dispatchMouseEvent", type="mouseReleased", x=x + 60, y=y, button="left", clickCount=1)
    moved = chromium.evaluate(f"{middle}(document.querySelector('.point[href=\"#{number}\"] use'))")
    assert moved == pytest.approx([x + 60, y], abs=3)
    assert chromium.evaluate("document.querySelector('.here').innerText") == "low_place_08 LOW, train"
    chromium.evaluate("world.click()")
    assert chromium.evaluate(size) == pytest.approx(before, abs=0.5)
    assert chromium.complaints == []


@pytest.mark.browser
def test_without_its_script_everything_is_shown(written: Path, chromium: Chromium) -> None:
    assert faults(chromium, written, 360, dark=False) == []
    assert chromium.evaluate(CONTROLS) == 2
    chromium.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        chromium.call("Page.navigate", url=f"{written.resolve().as_uri()}?again")
        while not chromium.evaluate("location.search === '?again' && document.readyState === 'complete'"):
            time.sleep(0.1)
        assert (chromium.evaluate(SHOWN), chromium.evaluate(POINTS), chromium.evaluate(CONTROLS)) == (24, 23, 0)
        assert chromium.evaluate("document.documentElement.scrollWidth") == 360
    finally:
        chromium.call("Emulation.setScriptExecutionDisabled", value=False)


@pytest.mark.browser
def test_a_script_that_is_not_its_own_does_not_run(written: Path, chromium: Chromium) -> None:
    written.write_text(written.read_text().replace("</main>", "<script>document.title = 'taken over'</script></main>"))
    found = faults(chromium, written, 1280, dark=False)
    assert chromium.evaluate("document.title") == "Dataset run/dataset"
    assert any("Content Security Policy" in fault for fault in found)
