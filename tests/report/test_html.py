"""report.html: one file that needs nothing else, says what results.json says, and lets no answer become markup."""

import copy
import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from PIL import Image

from orion_triage.evaluate.results import build_results
from orion_triage.report import html, plot
from orion_triage.report.render import render_markdown
from orion_triage.runs.manifest import write_manifest
from orion_triage.runs.run import Run, prepare
from tests.chromium import Chromium
from tests.conftest import MISSION, as_made, orion

HOSTILE = ("<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "' onload='alert(1)", "{{ 7 * 7 }}")
BLOCKS = {"td", "th", "tr", "br", "div", "small", "p", "li", "dt", "dd", "caption"}  # apart from the text before them
VOID = {"meta", "br", "img", "wbr", "path", "rect", "use"}
ADDRESSES = {"src", "href", "xlink:href", "srcset", "poster", "action", "formaction", "data", "background"}


class Document(HTMLParser):
    """What a browser would find: balanced elements, their attributes, and the text of each."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []  # (element, its whole text), in order of its end
        self._open: list[tuple[str, list[str]]] = []
        self.feed(text)
        self.close()
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"an attribute twice in {tag}"
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag in BLOCKS:
            self.handle_data(" ")
        if tag not in VOID:
            self._open.append((tag, []))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        assert tag in VOID

    def handle_endtag(self, tag: str) -> None:
        name, parts = self._open.pop()
        assert name == tag, f"</{tag}> ends <{name}>"
        self.texts.append((tag, " ".join("".join(parts).split())))

    def handle_data(self, data: str) -> None:
        for _, parts in self._open:
            parts.append(data)

    def all(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]

    def attributes(self, name: str) -> list[str]:
        return [attributes[name] for _, attributes in self.elements if name in attributes]

    def section(self, start: str) -> str:
        return next(text for text in self.all("section") if text.startswith(start))


def test_a_measured_frame_has_its_cost_on_board(results: dict[str, Any]) -> None:
    assert "One frame" not in html.render_html(results, [], lambda name: None)
    results["seconds_per_frame"] = {"seconds_per_frame": 20.0, "processor": "Raspberry Pi 5 Model B Rev 1.0"}
    said = "100 frames in an eclipse of 35 minutes; 170 to 230 J per frame"
    cells = check(html.render_html(results, [], lambda name: None)).all("td")
    assert any(cell.startswith(said) for cell in cells)
    assert f"One frame took 20 s (Raspberry Pi 5 Model B Rev 1.0): {said}" in render_markdown(results, "x.png")


def check(text: str) -> Document:
    """The document, well-formed, accessible as far as a parser sees it, and without anything from outside."""
    document = Document(text)
    names = {tag for tag, _ in document.elements}
    assert not names & {"script", "link", "iframe", "object", "embed", "form", "base", "audio", "video"}
    for tag, attributes in document.elements:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        for name in ADDRESSES & set(attributes):
            assert attributes[name].startswith(("#", "data:image/jpeg;base64,")), (tag, name, attributes[name])
    styles = " ".join(document.all("style") + document.attributes("style"))
    assert "url(" not in styles
    assert "@import" not in styles
    levels = [int(tag[1]) for tag, _ in document.elements if re.fullmatch("h[1-6]", tag)]
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip([0, *levels], levels, strict=False))
    assert all(attributes.get("scope") in ("row", "col") for tag, attributes in document.elements if tag == "th")
    assert len(document.all("table")) == len(document.all("caption"))
    assert all(attributes.get("alt") for tag, attributes in document.elements if tag == "img")
    assert [attributes["lang"] for tag, attributes in document.elements if tag == "html"] == ["en"]
    ids = document.attributes("id")
    assert len(set(ids)) == len(ids)
    named = {name for value in document.attributes("aria-labelledby") for name in value.split()}
    used = {address[1:] for name in ("href", "xlink:href") for address in document.attributes(name)}
    clipped = {re.fullmatch(r"url\(#(\w+)\)", value)[1] for value in document.attributes("clip-path")}
    assert named | used | clipped <= set(ids)
    assert [tag for tag, _ in document.elements].count("style") == 1
    return document


@pytest.fixture(scope="module")
def all_right(made: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The small run with its constrained answers, all right and 0.9 sure; nobody changes it."""
    run = Run(shutil.copytree(made.folder, tmp_path_factory.mktemp("flown") / "run"), made.settings)
    folder = run.evaluation("constrained")
    shutil.copytree(run.evaluation("fine-tuned"), folder)
    for row in _rows(folder):
        _say(run, row["condition"], row["name"], row["truth"], 0.9)
    return run


@pytest.fixture(scope="module")
def one_wrong(all_right: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same with one HIGH frame called LOW under B; nobody changes it."""
    run = Run(shutil.copytree(all_right.folder, tmp_path_factory.mktemp("wrong") / "run"), all_right.settings)
    _say(run, "B", "high_place_18", "LOW", 0.8)
    return run


@pytest.fixture(scope="module")
def built_wrong(one_wrong: Run) -> dict[str, Any]:
    return build_results(one_wrong)


@pytest.fixture
def wrong_results(built_wrong: dict[str, Any]) -> dict[str, Any]:
    """What `build_results` gives for `one_wrong`. It takes seconds."""
    return copy.deepcopy(built_wrong)


@pytest.fixture
def flown(all_right: Run, tmp_path: Path) -> Run:
    """A copy of `all_right`, to be changed."""
    return Run(shutil.copytree(all_right.folder, tmp_path / "run"), all_right.settings)


def _rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def _say(run: Run, condition: str, name: str, category: str | None, sure: float = 0.0, answer: str = "said") -> None:
    """Let one answer of the constrained evaluation be `category` with probability `sure`; None is no verdict."""
    folder, rows = run.evaluation("constrained"), _rows(run.evaluation("constrained"))
    for row in rows:
        if (row["condition"], row["name"]) == (condition, name):
            rest = dict.fromkeys(MISSION.names, (1 - sure) / 2)
            row["category"], row["scores"] = category, rest | {category: sure} if category else None
            row["answer"] = answer
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_manifest(folder, stage="evaluate constrained", settings={}, inputs={}, seconds=1)


def _document(run: Run) -> Document:
    return check(html.of_run(run, build_results(run)))


def test_the_summary_has_the_flight_model_without_coordinates_and_with_them(
    one_wrong: Run, wrong_results: dict[str, Any]
) -> None:
    document = check(html.of_run(one_wrong, wrong_results))
    summary = document.section("Summary")
    assert "Not finished: fine-tune, fuse, quantize" in summary
    assert 'In flight (quantized model, no threshold, blank rule): the rates of "flight"' in summary
    assert "B vision only A full system HIGH recall 50.0 % 1 of 2 9 to 91 % 100.0 % 2 of 2 34 to 100 %" in summary
    assert "Irrecoverable loss 25.0 % 1 of 4 5 to 70 % 0.0 % 0 of 4 0 to 49 %" in summary
    assert "Accuracy 83.3 % 5 of 6 44 to 97 % 100.0 % 6 of 6 61 to 100 %" in summary
    verdict = document.section("Verdict")
    assert verdict.startswith("Verdict DO NOT FLY The test frames show that the model does not meet: ")
    assert "looks at the image 6/6 with it, " in verdict
    assert "What to do evaluated as it flies: " not in verdict  # what failed comes first
    assert " evaluated as it flies: Run 'orion run' again to finish them." in verdict
    titles = document.all("h2")
    assert titles == [
        "Verdict", "Summary", "Accuracy by condition", "Confusion matrices", "Accuracy by step",
        "Value against downlink budget", "Calibration", "Expected rates in orbit", "Worst errors",
        "Significance and statistical power", "Provenance",
    ]  # fmt: skip
    steps = document.section("Accuracy by step")
    assert "the grammar significant: none 100.0 % +4 \N{MINUS SIGN}0 83.3 % +4 \N{MINUS SIGN}1" in steps
    assert "flight 9.1 %" not in document.section("Value against downlink budget")
    assert "with fewer than 300 frames it is mostly sampling noise" in document.section("Calibration")
    assert "fine_tune.learning_rate 0.0002 0.004" in document.section("Provenance")


def test_the_worst_errors_come_first(flown: Run, wrong_results: dict[str, Any]) -> None:
    """The gallery is made of the answers; of the results it takes costs and blank frames."""
    _say(flown, "A", "low_place_20", "HIGH", 0.99)  # costs 1
    _say(flown, "B", "medium_place_19", "LOW", 0.7)  # 3
    _say(flown, "A", "medium_place_19", "LOW", 0.8)  # 3, surer
    _say(flown, "A", "high_place_18", None)  # 10, the row's most, and not sure of anything
    _say(flown, "B", "high_place_18", "LOW", 0.6)  # 10
    _say(flown, "D", "high_place_21", "LOW", 0.9)  # not asked here
    document = check(html.of_run(flown, wrong_results))
    cards = [title for title in document.all("h3") if "_place_" in title]
    assert cards == [
        "high_place_18, B vision only", "high_place_18, A full system", "medium_place_19, A full system",
        "medium_place_19, B vision only", "low_place_20, A full system",
    ]  # fmt: skip
    gallery = document.section("Worst errors")
    assert "5 of the 12 answers of flight under A and B are wrong. They are sorted by cost" in gallery
    assert "HIGH labelled LOW (lost) HIGH 0.20, MEDIUM 0.20, LOW 0.60; cost 10" in gallery
    assert "HIGH, answer without a verdict no scores; cost 10" in gallery
    assert "orion_dataset/images/high_place_18.png longitude 85.06, latitude 26.0" in gallery
    assert gallery.count("captured at Longitude: 85.06, Latitude: 26.0.") == 1  # under A, and not under B
    pictures = [attributes for tag, attributes in document.elements if tag == "img"]
    assert len(pictures) == 5
    assert pictures[0]["alt"] == "The frame high_place_18, whose true category is HIGH"
    wrong_results["settings"]["mission"]["costs"][2][0] = 11  # this mission minds nothing more than needless sending
    assert html.wrong_answers(wrong_results, _rows(flown.evaluation("constrained")))[0].name == "low_place_20"


def test_the_gallery_shows_at_most_twelve(flown: Run, wrong_results: dict[str, Any]) -> None:
    for row in _rows(flown.evaluation("constrained")):
        if row["condition"] in "AB":
            _say(flown, row["condition"], row["name"], "LOW" if row["truth"] != "LOW" else "HIGH", 0.5)
    rows = [row | {"name": f"{row['name']}{twin}"} for twin in "ab" for row in _rows(flown.evaluation("constrained"))]
    document = check(html.render_html(wrong_results, rows, lambda image: None))
    gallery = document.section("Worst errors")
    assert "24 of the 24 answers of flight under A and B are wrong. The worst 12 are shown." in gallery
    assert len([title for title in document.all("h3") if "_place_" in title]) == 12


def test_no_errors_are_said(all_right: Run, wrong_results: dict[str, Any]) -> None:
    gallery = check(html.of_run(all_right, wrong_results)).section("Worst errors")
    assert gallery == "Worst errors No errors: all 12 answers of flight under A and B are correct."


def test_frames_that_are_gone_are_said(flown: Run, wrong_results: dict[str, Any]) -> None:
    _say(flown, "B", "high_place_18", "LOW", 0.8)
    shutil.rmtree(flown.dataset / "orion_dataset")
    document = check(html.of_run(flown, wrong_results))
    assert "img" not in {tag for tag, _ in document.elements}
    assert "The frame was removed by 'orion clean'." in document.section("Worst errors")


def test_a_blank_frame_is_low_by_rule_in_the_gallery_too(flown: Run) -> None:
    blank = flown.dataset / "orion_dataset/images/high_place_18.png"
    Image.new("RGB", (512, 512), (9, 9, 30)).save(blank)
    as_made(blank, flown.dataset)
    for model in ("base", "fine-tuned"):  # a report of fewer models takes less time
        shutil.rmtree(flown.evaluation(model))
    document = _document(flown)
    gallery = document.section("Worst errors")
    assert gallery.count("HIGH labelled LOW (lost) HIGH 0.00, MEDIUM 0.00, LOW 1.00; cost 10") == 2
    assert gallery.count("LOW by the blank rule, whatever the model answers") == 2
    flown.evaluation("constrained").rename(flown.evaluation("fine-tuned"))  # its answers are taken as they are
    assert "LOW by the blank rule" not in _document(flown).section("Worst errors")


def test_a_run_says_what_it_has_not_evaluated(run: Run, results: dict[str, Any]) -> None:
    document = check(html.of_run(run, results))
    summary = document.section("Summary")
    assert "The flight model has not been evaluated. The last evaluated step is fine-tuned." in summary
    assert "always HIGH 2/6 33.3 %" in document.section("Accuracy by condition")
    assert "No model has answers with scores" in document.section("Value against downlink budget")
    assert "8 of the 12 answers of fine-tuned under A and B are wrong" in document.section("Worst errors")
    shutil.rmtree(run.folder / "evaluation")
    document = _document(run)
    assert "evaluate base" in document.section("Summary")
    for section in ("Summary", "Accuracy by cond", "Confusion", "Expected rates", "Worst errors"):
        assert "No model has been evaluated on this split yet." in document.section(section)
    shutil.rmtree(run.dataset)
    assert "Not finished: dataset" in _document(run).section("Summary")


def test_hostile_text_is_text(one_wrong: Run, wrong_results: dict[str, Any]) -> None:
    """Markup, both quotation marks and a template's braces in every value."""
    hostile = "".join(HOSTILE)
    results = wrong_results
    results |= {"preset": hostile, "split": hostile, "missing": [hostile], "foreign_pair": hostile}
    results["foreign_server"] = {"server": hostile, "served_model": hostile, "server_build": hostile}
    results["overrides"] = results["figures"] = {hostile: [hostile, hostile]}
    results["versions"], results["seconds"], results["bytes"] = {hostile: hostile}, {hostile: 1.0}, {hostile: 1}
    results["baselines"][hostile] = results["baselines"].pop("colour k-NN")
    rows = [
        row | {"name": row["name"] + hostile, "image": hostile, "answer": hostile + "\u202e\x00\ud800"}
        for row in _rows(one_wrong.evaluation("constrained"))
    ]
    text = html.render_html(results, rows, lambda image: b"jpeg")
    document = check(text)
    assert document.all("title")[0] == f"Triage evaluation: orion, {hostile}, {hostile} split"
    (card,) = [answer for answer in document.all("code") if answer.startswith(hostile)]
    assert card == hostile + "\\u202e\\x00\\ud800"
    assert "49" not in card
    assert document.section("Worst errors").count(hostile) == 3
    text.encode()


def test_someone_elses_server_is_named(wrong_results: dict[str, Any]) -> None:
    wrong_results["foreign_server"] = {
        "server": "http://127.0.0.1:9",
        "served_model": "other.gguf",
        "server_build": "llama.cpp b1",
    }
    document = check(html.render_html(wrong_results, [], lambda image: None))
    assert '"server" is other.gguf, as served by http://127.0.0.1:9 (llama.cpp b1)' in document.section("Summary")


def test_the_threshold_has_its_section(wrong_results: dict[str, Any]) -> None:
    results = wrong_results
    rates = {"count": 1, "total": 2, "rate": 0.5, "low": 0.09, "high": 0.91}
    with_it, without = results["models"]["flight"], copy.deepcopy(results["models"]["flight"])
    results["models"]["no-threshold"] = without
    for condition in "AB":
        with_it[condition] |= {"high_recall": rates, "irrecoverable_loss": rates}
        for rates_of, sent, dropped, cost in ((with_it, 0.25, 0.125, 0.5), (without, 0.5, 0.0625, 0.75)):
            figures = {"sent": sent, "dropped": dropped, "cost": cost}
            rates_of[condition]["orbit"] |= {key: {"value": x, "low": x, "high": x} for key, x in figures.items()}
    point = {"negative_log_likelihood": 0.33}
    for threshold, said in ((0.42, "is dropped if P(LOW) is at least 0.42"), (2.0, "drops no frame")):
        results["operating_point"] = {
            "drop_threshold": threshold,
            "temperature": 1.75,
            "promise": None,
            "appearance": None,
            "A": point,
            "B": point,
        }
        document = check(html.render_html(results, [], lambda image: None))
        section = document.section("Threshold")
        assert said in section
        assert "sent in orbit 50.0 % 25.0 % 50.0 % 25.0 % dropped in orbit 6.2 % 12.5 % 6.2 % 12.5 %" in section
        assert "cost per frame in orbit 0.75 0.50 0.75 0.50" in section
        assert re.search(r"scaling with 1\.75, fitted on val, changes the NLL in B from 0\.\d\d to 0\.33\.", section)
        named = "threshold 0.42" if threshold < 1 else "no threshold"
        summary = document.section("Summary")
        assert (
            f'In flight (quantized model, {named}, blank rule): the rates of "flight" in the table below. "no-thr'
            in (summary)
        )
        assert "HIGH recall 50.0 % 1 of 2 9 to 91 %" in summary


def test_confusions_show_what_is_lost_and_what_is_unparsable() -> None:
    confusion = {
        "HIGH": {"HIGH": 3, "MEDIUM": 0, "LOW": 1, "unparsable": 0},
        "MEDIUM": {"HIGH": 0, "MEDIUM": 4, "LOW": 0, "unparsable": 0},
        "LOW": {"HIGH": 0, "MEDIUM": 0, "LOW": 0, "unparsable": 0},
    }
    rows = html.matrix(confusion, MISSION)
    assert [cell["answer"] for cell in rows[0][1]] == ["HIGH", "MEDIUM", "LOW"]
    assert [cell["share"] for cell in rows[0][1]] == [0.75, 0, 0.25]
    assert [[cell["lost"] for cell in cells] for _, cells in rows] == [[False, False, True]] * 2 + [[False] * 3]
    confusion["LOW"]["unparsable"] = 1
    assert [cell["answer"] for cell in html.matrix(confusion, MISSION)[0][1]] == ["HIGH", "MEDIUM", "LOW", "unparsable"]


def test_charts_show_the_values_of_the_results(wrong_results: dict[str, Any]) -> None:
    results = wrong_results
    models = ["base", "fine-tuned", "flight"]
    axes = Figure().subplots()
    plot.accuracy(axes, results)
    rates = [results["models"][model][condition] for model in models for condition in "ABCD"]
    assert [bar.get_height() for bar in axes.patches] == [100 * rate["accuracy"] for rate in rates]
    intervals = [segment[:, 1] for lines in axes.collections for segment in lines.get_segments()]
    expected = [[100 * rate["accuracy_low"], 100 * rate["accuracy_high"]] for rate in rates]
    assert np.array(intervals) == pytest.approx(np.array(expected))
    baselines = ["majority class", "colour k-NN", "coordinates k-NN"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == models + baselines
    level = {line.get_label(): list(line.get_ydata()) for line in axes.lines if line.get_label() in baselines}
    assert level == {name: [100 * results["baselines"][name]["accuracy"]] * 2 for name in baselines}

    axes = Figure().subplots()
    plot.value_against_budget(axes, results, ["flight"])
    curves = {line.get_label(): line.get_xydata() for line in axes.lines}
    assert set(curves) == {"random order", "true value (ideal)", "larger PNG first", "flight"}
    curve = results["models"]["flight"]["B"]["value_curve"]
    assert curves["flight"] == pytest.approx(100 * np.array([curve["budget"], curve["value"]]).T)
    assert curves["flight"][[0, -1]].tolist() == [[0, 0], [100, 100]]

    axes = Figure().subplots()
    plot.reliability(axes, results, "flight")
    discs = [disc for disc in axes.collections if isinstance(disc, PathCollection)]
    less, surer = [(*disc.get_offsets()[0], disc.get_sizes()[0]) for disc in discs]
    assert [text.get_text() for text in axes.texts] == ["1", "5"]
    assert (less[1], surer[1]) == (0, 100)
    assert surer[0] > less[0]
    assert surer[2] == pytest.approx(5 * less[2])  # areas

    axes = Figure().subplots()
    plot.risk_coverage(axes, results, ["flight"])
    assert axes.get_ylim() == (0, 20)  # one of six wrong
    kept = axes.lines[0].get_xydata()
    assert kept[0].tolist() == [0, 0]
    assert kept[-1] == pytest.approx([100, 100 / 6])


def test_charts_are_text_in_the_colours_of_the_page(one_wrong: Run, wrong_results: dict[str, Any]) -> None:
    text = html.of_run(one_wrong, wrong_results)
    style = text[text.index("<style>") : text.index("</style>")]
    charts = re.findall(r'<svg class="chart".*?</svg>', text, re.DOTALL)
    assert len(charts) == 4  # accuracy, budget, reliability, coverage
    for chart in charts:
        assert 'role="img"' in chart
        assert re.search(r"<title id=[^>]+>[^<]+</title>\s*<desc id=[^>]+>[^<]+</desc>", chart)
        assert ">100</text>" in chart
        assert set(re.findall(r"(?:fill|stroke): ([^;\"]+)", chart)) <= {"none", *(f"var(--{n})" for n in plot.COLOURS)}
        assert not re.search(r"<(metadata|style|image)|20\d\d-\d\d", chart)
    light = dict(re.findall(r"--([\w-]+): (#\w{6})", style.partition("@media")[0]))
    assert {name: light[name] for name in plot.COLOURS} == plot.COLOURS


def test_the_command_writes_it_for_each_split_and_names_it(flown: Run) -> None:
    for model in ("base", "fine-tuned"):  # a report of fewer models takes less time
        shutil.rmtree(flown.evaluation(model))
    prepare(flown)
    for split, name in (("test", "report.html"), ("val", "report-val.html")):
        done = orion("report", "--run", flown.folder, "--file", split)
        assert done.returncode == 0, done.stderr
        assert done.stdout.rstrip().splitlines()[-1].endswith(f" and {flown.folder / name}")
        assert f"{split} split" in check((flown.folder / name).read_text()).all("title")[0]
    results = json.loads((flown.folder / "results.json").read_text())
    assert html.of_run(flown, results) == (flown.folder / "report.html").read_text()  # of another process


def test_colours_keep_their_contrast() -> None:
    """WCAG 2.2: 4.5 for text, 3 for what is drawn, in both modes."""
    style = (resources.files("orion_triage.report") / "report.html.j2").read_text()
    blocks = re.findall(r":root \{\n([^}]+)\}", style)
    light, dark = (dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for block in blocks)
    assert set(light) == set(dark)
    for colours in (light, dark):
        for text in ("ink", "quiet", "link"):
            for ground in ("paper", "panel"):
                assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
        assert contrast(colours["ink"], colours["shade"]) >= 4.5
        for drawn in ("base", "fine-tuned", "quantized", "flight", "other", "quiet", "lost"):
            assert contrast(colours[drawn], colours["panel"]) >= 3, drawn
        assert contrast(colours["lost"], colours["shade"]) >= 3


def contrast(first: str, second: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    dark, light = sorted((luminance(first), luminance(second)))
    return (light + 0.05) / (dark + 0.05)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    browser = Chromium(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


CLIPPED = """[...document.querySelectorAll("svg text")].filter(text => {
    const inside = text.getBoundingClientRect(), box = text.closest("svg").getBoundingClientRect();
    return inside.left < box.left - 1 || inside.right > box.right + 1
        || inside.top < box.top - 1 || inside.bottom > box.bottom + 1;
}).map(text => text.textContent)"""


def faults(chromium: Chromium, path: Path, width: int, *, dark: bool) -> list[str]:
    """What is wrong with a page at this width: what it asked for, what it complained of, what sticks out."""
    chromium.open(path, width=width, height=844, dark=dark)
    own = path.resolve().as_uri()
    found = [f"asked for {address[:60]}" for address in chromium.requests if address.split("#")[0] != own]
    found = [fault for fault in found if not fault.startswith("asked for data:")]
    found += [f"said {complaint}" for complaint in chromium.complaints]
    full, shown = chromium.evaluate("(e => [e.scrollWidth, e.clientWidth])(document.documentElement)")
    found += [f"{full} wide instead of {shown}"] if full > shown else []
    return found + [f"clipped: {text}" for text in chromium.evaluate(CLIPPED)]


@pytest.mark.browser
def test_a_browser_shows_it_on_a_phone_and_a_desktop_light_and_dark(
    flown: Run, wrong_results: dict[str, Any], chromium: Chromium, tmp_path: Path
) -> None:
    """Through the DevTools protocol over a pipe (tests/chromium.py): no package is needed for it."""
    _say(flown, "B", "high_place_18", "LOW", 0.8, answer="".join(HOSTILE) + "a" * 300)
    _say(flown, "A", "high_place_18", None, answer="?")
    path = tmp_path / "report.html"
    path.write_text(html.of_run(flown, wrong_results))
    grounds = {}
    for width in (360, 1280):
        for dark in (False, True):
            assert faults(chromium, path, width, dark=dark) == []
            picture = tmp_path / f"report-{width}-{'dark' if dark else 'light'}.png"
            chromium.picture(picture)
            with Image.open(picture) as shown:
                assert shown.width == width
                grounds[width, dark] = sum(shown.convert("RGB").getpixel((2, 2)))
    assert all((ground < 100) is dark and (ground > 600) is not dark for (_, dark), ground in grounds.items())
    assert chromium.evaluate("document.images.length") == 2
    assert chromium.evaluate("[...document.images].every(image => image.naturalWidth === 160)")


@pytest.mark.browser
@pytest.mark.parametrize(
    ("body", "said"),
    [
        ('<img src="http://127.0.0.1:9/frame.png" alt="">', "asked for http://127.0.0.1:9/frame.png"),
        ("<script>console.error('broken')</script>", "said broken"),
        ("<script>undefined.call()</script>", "said Uncaught"),
        ('<p style="width: 1500px">wide</p>', "1508 wide instead of"),
        ('<svg width="50" height="50"><text x="40" y="20">long text</text></svg>', "clipped: long text"),
    ],
)
def test_the_browser_test_sees_a_fault(chromium: Chromium, tmp_path: Path, body: str, said: str) -> None:
    path = tmp_path / "bad.html"
    meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    path.write_text(f"<!DOCTYPE html><html><head>{meta}<title>bad</title></head><body>{body}</body></html>")
    for width in (390, 1280):
        assert [fault for fault in faults(chromium, path, width, dark=False) if fault.startswith(said)]
