"""evaluate/head.py and adapt.py: a head on the pair's hidden state, from the fit to the commands."""

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from orion_triage.dataset.labelled import read_labelled
from orion_triage.errors import OrionError
from orion_triage.evaluate import adapt, head, threshold
from orion_triage.evaluate.run import read_predictions
from orion_triage.export.quantize import PAIR
from orion_triage.mission.decide import Rules
from orion_triage.mission.mission import Mission
from orion_triage.progress import silent
from orion_triage.report.render import adapted_in_words, adapted_table
from orion_triage.runs.run import Run
from orion_triage.settings import load_settings
from tests.conftest import MISSION, orion, structured_picture

H, M, L = MISSION.names


def planted(count: int, width: int = 32, spread: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """States whose first three numbers say the category, among others that do not, on very different scales."""
    random, truth = np.random.default_rng(0), np.arange(count) % 3
    states = random.normal(0, spread, (count, width))
    states[np.arange(count), truth] += 3
    return states * np.logspace(-3, 2, width) + 7, truth


def test_the_fit_is_scikit_learns_with_the_standardization_folded_in() -> None:
    states, truth = planted(60)
    weights, bias = head.fit(states, truth, 3)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=head.PENALTY / 32, max_iter=2000)).fit(states, truth)
    assert head.softmax(states @ weights.T + bias) == pytest.approx(model.predict_proba(states), abs=1e-6)
    two = truth[truth < 2]
    weights, bias = head.fit(states[truth < 2], two, 2)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=head.PENALTY / 32, max_iter=2000))
    expected = model.fit(states[truth < 2], two).predict_proba(states)
    assert head.softmax(states @ weights.T + bias) == pytest.approx(expected, abs=1e-6)


def test_a_category_without_a_frame_is_possible_and_unlikely() -> None:
    states, truth = planted(40)
    kept = truth > 0
    weights, bias = head.fit(states[kept], truth[kept], 3)
    scores = head.softmax(states @ weights.T + bias)
    assert (scores[:, 0] > 0).all()
    assert scores[:, 0].max() < 0.15
    weights, bias = head.fit(states[truth == 2], truth[truth == 2], 3)
    assert (head.softmax(states @ weights.T + bias).argmax(axis=1) == 2).all()


def test_a_number_that_is_the_same_in_all_frames_decides_nothing() -> None:
    states, truth = planted(30)
    states[:, 5] = 4.0
    weights, bias = head.fit(states, truth, 3)
    assert (weights[:, 5] == 0).all()
    other = states.copy()
    other[:, 5] = 1e6
    assert head.softmax(other @ weights.T + bias) == pytest.approx(head.softmax(states @ weights.T + bias))


def test_a_frame_is_judged_by_a_head_that_has_not_seen_its_place() -> None:
    """Tiles of a place are alike, and the label says nothing else: whoever has seen some knows the others."""
    random = np.random.default_rng(0)
    truth = np.repeat(random.integers(0, 3, 30), 5)
    states = np.repeat(random.normal(0, 1, (30, 256)), 5, axis=0)
    places, frames = [str(n // 5) for n in range(150)], [str(n) for n in range(150)]
    guessed = (head.out_of_fold(states, truth, 3, places, 1).argmax(axis=2) == truth).mean()
    leaked = (head.out_of_fold(states, truth, 3, frames, 1).argmax(axis=2) == truth).mean()
    assert guessed < 0.5
    assert leaked > 0.9


@pytest.mark.parametrize("truth", [[0, 1, 2, 0, 1, 2], [0, 1, 1, 1, 1, 1], [0, 1, 2]])
def test_every_frame_is_in_one_fold(truth: list[int]) -> None:
    found = head.folds(np.array(truth), [str(n) for n in range(len(truth))], 1)
    assert sorted(np.concatenate(found).tolist()) == list(range(len(truth)))
    with pytest.raises(OrionError, match="of one place"):
        head.folds(np.array(truth), ["x"] * len(truth), 1)


def made(pair: Path, **changed: Any) -> head.Head:
    states, truth = planted(30)
    weights, bias = head.fit(states, truth, 3)
    values: dict[str, Any] = {
        "categories": MISSION.names, "weights": weights.astype(np.float32), "bias": bias.astype(np.float32),
        "pair_sha256": head.sha256_of_file(pair / PAIR), "frame_size": 256, "figures": {},
    }  # fmt: skip
    return head.Head(**(values | changed))


def test_a_head_is_read_as_it_was_written_and_only_with_its_pair(tmp_path: Path) -> None:
    (tmp_path / PAIR).write_text("{}")
    own = made(tmp_path)
    head.write(tmp_path, own)
    back = head.read(tmp_path, MISSION, tmp_path, 256)
    assert (back.weights == own.weights).all()
    assert (back.bias == own.bias).all()
    assert (tmp_path / head.FILE_NAME).stat().st_size < 3000
    with pytest.raises(OrionError, match="another pair, frame size or mission"):
        head.read(tmp_path, MISSION, tmp_path, 384)
    (tmp_path / PAIR).write_text('{"other": 1}')
    with pytest.raises(OrionError, match="another pair, frame size or mission"):
        head.read(tmp_path, MISSION, tmp_path, 256)
    with pytest.raises(OrionError, match="Run 'orion adapt FOLDER' first") as error:
        head.read(tmp_path / "gone", MISSION, tmp_path, 256)
    assert "does not exist" in error.value.message


@pytest.mark.parametrize(
    "damage",
    [
        {"weights": "AAAA"},
        {"weights": "no base64!"},
        {"bias": [0, 1]},
        {"width": 31},
        {"width": -1},
        {"frame_size": 256.7},
        {"weights": base64.b64encode(np.full(96, np.nan, "<f4").tobytes()).decode()},
    ],
)
def test_a_damaged_head_is_refused(tmp_path: Path, damage: dict[str, Any]) -> None:
    (tmp_path / PAIR).write_text("{}")
    path = head.write(tmp_path, made(tmp_path))
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    with pytest.raises(OrionError, match=r"head\.json is damaged"):
        head.read(tmp_path, MISSION, tmp_path, 256)


def test_the_figures_say_whether_it_helps() -> None:
    states, truth = planted(45, spread=0.1)
    names = [str(n) for n in range(45)]
    wrong = [MISSION.names[(int(index) + 1) % 3] for index in truth]
    found = adapt.figures(states, truth, names, names, wrong, MISSION)
    assert found["head"]["count"] >= 40
    assert found["zero_shot"]["count"] == 0
    assert found["change"]["zero_shot"]["gained"] == found["head"]["count"]
    likeliest = {name: MISSION.names[int(np.argmax(one["scores"]))] for name, one in found["answers"].items()}
    right = sum(likeliest[name] == one["truth"] for name, one in found["answers"].items())
    assert (list(likeliest), right) == (names, found["head"]["count"])
    assert found["head"]["balanced"] == pytest.approx(found["head"]["rate"]), "as many frames of each"
    assert found["constant"]["rate"] == pytest.approx(1 / 3)
    assert list(found["curve"]) == ["5", "10", "20", "25"]
    assert found["curve"]["5"]["mean"] < found["curve"]["25"]["mean"]
    right = [MISSION.names[int(index)] for index in truth]
    assert adapt.figures(states, truth, names, names, right, MISSION)["change"]["zero_shot"]["gained"] == 0


def test_of_head_and_continued_adapter_the_better_one_in_the_same_folds_is_chosen() -> None:
    states, truth = planted(24, spread=0.1)
    names = [str(n) for n in range(24)]
    right: list[str | None] = [MISSION.names[int(index)] for index in truth]
    wrong = [MISSION.names[(int(index) + 1) % 3] for index in truth]
    folds = head.folds(truth, names, adapt.SEED)
    by_head = [MISSION.names[index] for index in head.said_out_of_fold(states, truth, 3, folds)]
    for answers, chosen in ((right, "continued"), (wrong, "head"), (by_head, "head")):
        found = adapt.figures(states, truth, names, names, wrong, MISSION, silent, adapt.Continued(answers, folds))
        assert found["chosen"] == chosen
        hits = sum(answer == of for answer, of in zip(answers, right, strict=True))
        assert found["continued"]["count"] == hits
        assert found["head_on_its_folds"]["count"] == sum(a == b for a, b in zip(by_head, right, strict=True)) < 24
        change = found["change_of_continued"]
        assert change["zero_shot"]["gained"] - change["zero_shot"]["lost"] == hits
        assert change["head_on_its_folds"]["gained"] == sum(
            a == c != b for a, b, c in zip(answers, by_head, right, strict=True)
        )
        said = adapted_in_words(found)
        which = "the continued adapter" if chosen == "continued" else "the head"
        assert f"simpler if both are right as often: {which}." in said[-1]
        assert said[-2].startswith("It helps" if chosen == "continued" else "It is not shown") or answers is by_head
        assert len(adapted_table(found).columns) == 5
        assert adapted_table(found).row_count == 5


def labelled(folder: Path, *pictures: tuple[str, Image.Image]) -> Path:
    for number, (category, picture) in enumerate(pictures):
        (folder / category).mkdir(parents=True, exist_ok=True)
        picture.save(folder / category / f"{number}.png", compress_level=1)
    return folder


def test_folders_that_teach_nothing_are_refused(tmp_path: Path) -> None:
    few = labelled(tmp_path / "few", *((category, structured_picture(n)) for n, category in enumerate((H, M, L, L))))
    with pytest.raises(OrionError, match="has 4 labelled frames"):
        read_labelled(few, MISSION)
    one = labelled(tmp_path / "one", *((L, structured_picture(n)) for n in range(7)))
    with pytest.raises(OrionError, match="all labelled frames are LOW"):
        read_labelled(one, MISSION)
    both = labelled(tmp_path / "both", (H, structured_picture(0)), (L, structured_picture(0)))
    with pytest.raises(OrionError, match="are the same picture, labelled HIGH and LOW"):
        read_labelled(both, MISSION)


def test_blank_frames_and_copies_are_left_out_and_said(tmp_path: Path) -> None:
    """No head is asked about a blank frame in flight, and a copy would stand on both sides of a fold."""
    pictures = [((H, M, L)[n % 3], structured_picture(n)) for n in range(9)]
    blank = Image.new("RGB", (512, 512), (3, 3, 3))
    folder = labelled(tmp_path / "mine", *pictures, (L, blank), (H, structured_picture(0)))
    frames, notes = read_labelled(folder, MISSION)
    assert len(frames) == 9
    assert notes == [
        "left out: 1 blank frame, which the blank rule decides", "left out: 1 picture that the folder has already",
    ]  # fmt: skip


def test_pictures_that_no_row_names_and_conversions_are_said(tmp_path: Path) -> None:
    folder = labelled(tmp_path / "mine", *(((H, M, L)[n % 3], structured_picture(n)) for n in range(9)))
    structured_picture(20).convert("L").save(folder / H / "grey.png")
    rows = [f"{path.relative_to(folder)},{path.parent.name}" for path in sorted(folder.rglob("*.png"))]
    (folder / "metadata.csv").write_text("file_name,category\n" + "\n".join(rows[:-2]) + "\n")
    frames, notes = read_labelled(folder, MISSION)
    assert len(frames) == 8
    assert any(note.startswith("2 pictures in ") and "are in no row and are not used" in note for note in notes), notes
    assert any("1 of 8 pictures were converted: " in note and "grey.png" in note for note in notes), notes


def test_frames_of_the_test_split_are_left_out_and_splits_and_unused_columns_are_said(tmp_path: Path) -> None:
    """They are for judging. A table says it with a column, category folders with folders of splits around them."""
    splits = ["train", "val", "test", "train", "train"] * 3
    for number, split in enumerate(splits):
        path = tmp_path / "folders" / split / (H, M, L)[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        structured_picture(number).save(path, compress_level=1)
    table = tmp_path / "table"
    shutil.copytree(tmp_path / "folders", table / "images")
    rows = [(path.relative_to(table), path) for path in sorted(table.rglob("*.png"))]
    cells = [f"{name},{path.parent.name},{path.parent.parent.name},me" for name, path in rows]
    (table / "labels.csv").write_text("file_name,category,split,labelled_by\n" + "\n".join(cells) + "\n")
    said = "labelled rows used: 9 of train, 3 of val; left out: 3 of test, which are for judging"
    for folder, more in (
        (tmp_path / "folders", [said]),
        (table, [said, "columns of labels.csv that are not used: labelled_by"]),
    ):
        frames, notes = read_labelled(folder, MISSION)
        assert sorted(int(frame.path.stem) for frame in frames) == [n for n in range(15) if splits[n] != "test"]
        assert notes == more
    (tmp_path / "folders" / "val").rename(tmp_path / "val")
    (tmp_path / "folders" / "train").rename(tmp_path / "train")
    with pytest.raises(OrionError, match="has 0 labelled frames beside 3 of the split test"):
        read_labelled(tmp_path / "folders", MISSION)


def test_plain_tiffs_need_no_position(tmp_path: Path) -> None:
    """As PNGs, the same pictures are the same frames; a TIFF that cannot be read is refused by name."""
    pytest.importorskip("rasterio")
    pictures = [((H, M, L)[n % 3], structured_picture(n)) for n in range(6)]
    folder = labelled(tmp_path / "png", *pictures)
    as_tiff = tmp_path / "tiff"
    for path in folder.rglob("*.png"):
        (as_tiff / path.parent.name).mkdir(parents=True, exist_ok=True)
        Image.open(path).save(as_tiff / path.parent.name / f"{path.stem}.tif")
    (of_png, _), (of_tiff, notes) = read_labelled(folder, MISSION), read_labelled(as_tiff, MISSION)
    assert notes == []
    assert [(one.category, one.image.tobytes()) for one in of_tiff] == [
        (one.category, one.image.tobytes()) for one in of_png
    ]
    assert len({one.place for one in of_tiff}) == 6
    damaged = as_tiff / H / "9.tif"
    damaged.write_bytes((as_tiff / H / "0.tif").read_bytes()[:100])
    with pytest.raises(OrionError, match=r"9\.tif is damaged"):
        read_labelled(as_tiff, MISSION)


def test_it_helps_only_if_it_beats_the_pair_and_the_commonest_category() -> None:
    def said(pair: float, constant: float) -> str:
        change = {"gained": 9, "lost": 0, "points": 30.0, "mid_p": 0.5, "frames_to_resolve": None, "low": 0, "high": 1}
        changes = {"zero_shot": change | {"exact_p": pair}, "constant": change | {"exact_p": constant}}
        more = {"head": {"balanced": 0.5}, "zero_shot": {"balanced": 0.77}, "of_category": {H: 0, M: 5, L: 5}}
        found = adapted_in_words({"change": changes, "curve": {}, "repeats": [5, 6], "frames": 10, **more})
        assert "mean recall falls from 77.0 % to 50.0 %" in found[1]
        return found[0]

    assert said(0.01, 0.01).startswith("It helps")
    assert said(0.01, 0.5).startswith("It is not shown that it helps")
    assert said(0.5, 0.01).startswith("It is not shown that it helps")


def test_a_frame_is_described_by_its_four_quarters_at_full_resolution() -> None:
    picture = structured_picture(3)
    parts = head.quarters(picture, 256)
    pixels = np.asarray(picture)
    assert [np.asarray(part).tobytes() for part in parts] == [
        pixels[top : top + 256, left : left + 256].tobytes() for top in (0, 256) for left in (0, 256)
    ]
    assert [part.size for part in head.quarters(picture, 512)] == [(512, 512)] * 4
    assert (np.asarray(head.quarters(picture, 512)[3])[::2, ::2] == pixels[256:, 256:]).all()


@pytest.mark.llama_cpp
def test_the_state_is_that_of_transformers(tiny_pair: Path, small_frames: list[Image.Image], tmp_path: Path) -> None:
    """The last hidden state after the image, of the same weights in 16 bits."""
    import torch

    from orion_triage.mission.prompt import user_text
    from orion_triage.models.encode import encode_image, encode_row
    from orion_triage.models.load import TINY_BASE_FOLDER, load_model, load_processor

    text = user_text(MISSION, None)
    with head.serving(tiny_pair, tmp_path / "log", silent) as server:
        states = [head.state_of(server.client, text, frame) for frame in small_frames[:3]]
        again = head.state_of(server.client, text, small_frames[0])
        described = head.description(server.client, text, structured_picture(5), 256)
        four = [head.state_of(server.client, text, part) for part in head.quarters(structured_picture(5), 256)]
    assert (again == states[0]).all(), "asked again, it is the same to the last digit"
    assert (described == np.concatenate([np.mean(four, axis=0), np.std(four, axis=0)])).all()
    model, processor = load_model(TINY_BASE_FOLDER, dtype="float32"), load_processor(TINY_BASE_FOLDER, 256)
    end = processor.tokenizer.convert_tokens_to_ids("<|image_end|>")
    for frame, state in zip(small_frames, states, strict=False):
        image = encode_image(processor, frame)
        row = encode_row(processor, image, text)
        ids = torch.tensor([row.turn[: row.turn.index(end) + 1]])
        with torch.inference_mode():
            out = model(input_ids=ids, **image.inputs, output_hidden_states=True)
        expected = out.hidden_states[-1][0, -1].numpy()
        cosine = float(expected @ state / np.linalg.norm(expected) / np.linalg.norm(state))
        assert cosine > 0.98  # Q4_K_M against float32


@pytest.mark.llama_cpp
@pytest.mark.slow
def test_adapt_triage_and_evaluate_through_the_command_line(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    for number in range(9):
        category = MISSION.names[number % 3]
        tint = Image.new("RGB", (512, 512), tuple(200 if band == number % 3 else 60 for band in range(3)))
        (copy / "mine" / category).mkdir(parents=True, exist_ok=True)
        Image.blend(structured_picture(number), tint, 0.7).save(copy / "mine" / category / f"{number}.png")
    nothing = orion("triage", "mine/LOW", "--head", "--run", "runs/small", cwd=copy)
    assert (nothing.returncode, "Run 'orion adapt FOLDER' first" in nothing.stderr) == (1, True)
    done = orion("adapt", "mine", "--run", "runs/small", cwd=copy)
    assert done.returncode == 0, done.stderr
    assert "9 labelled frames: 3 HIGH, 3 MEDIUM, 3 LOW" in done.stdout
    told = json.loads(orion("adapt", "mine", "--run", "runs/small", "--json", cwd=copy).stdout)
    assert (told["frames"], told["places"], list(told["curve"])) == (9, 9, ["5"])
    # On the frames that it was fitted on it is right: colour is in what the tower sees.
    flown = orion("triage", "mine", "--recursive", "--head", "--run", "runs/small", "--json", cwd=copy)
    rows = json.loads(flown.stdout)
    assert len(rows) == 9
    assert all(row["category"] == Path(row["file"]).parent.name for row in rows)
    assert all(sum(row["scores"].values()) == pytest.approx(1) for row in rows)
    evaluated = orion("evaluate", "--variants", "head", "--run", "runs/small", cwd=copy)
    assert evaluated.returncode == 0, evaluated.stderr
    rows = read_predictions(copy / "runs/small/evaluation/test/head", MISSION)
    of = {(row["condition"], row["name"]): row["category"] for row in rows}
    frames = {row["name"] for row in rows}
    assert all(of["A", name] == of["B", name] == of["D", name] for name in frames), "coordinates change nothing"
    assert len({of["C", name] for name in frames}) == 1
    (copy / "runs/small/gguf" / PAIR).write_text("{}")
    other = orion("triage", "mine/LOW", "--head", "--run", "runs/small", cwd=copy)
    assert (other.returncode, "Traceback" in other.stderr) == (1, False)


def test_a_mission_whose_fields_need_a_value_is_refused() -> None:
    from orion_triage.mission.mission import FieldOfAnswer

    field = FieldOfAnswer(name="smoke", kind="yes/no", definition="Smoke.")
    other: Mission = MISSION.model_copy(update={"fields": (field,), "keys": (*MISSION.keys, "smoke")})
    with pytest.raises(OrionError, match="cannot be asked for the category alone"):
        head.HeadBackend(None, other, None)  # type: ignore[arg-type]


def run_with_a_head(folder: Path, frames: int = 45, spread: float = 1.0) -> Run:
    """A run that has nothing but a pair's hash and a head, with what heads answer to frames that they have not seen."""
    run = Run(folder / "run", load_settings("tiny"))
    run.gguf.mkdir(parents=True)
    (run.gguf / PAIR).write_text("{}")
    states, truth = planted(frames, spread=spread)
    names = [str(n) for n in range(frames)]
    scores = head.out_of_fold(states, truth, 3, names, 1)[0]
    answers = {
        name: {"truth": MISSION.names[index], "place": name, "scores": given.tolist()}
        for name, index, given in zip(names, truth, scores, strict=True)
    }
    head.write(run.folder, made(run.gguf, figures={"answers": answers}))
    return run


def test_the_heads_threshold_is_chosen_on_frames_that_it_has_not_seen(tmp_path: Path) -> None:
    """By the code of the pair's: here on the scores of the figures, of which the loss is counted again by hand."""
    run = run_with_a_head(tmp_path, spread=3.0)
    record = threshold.choose(run, 0.1, (), of="head", loosen=True)
    told = head.read(run.folder, MISSION, run.gguf, 256).figures["answers"]
    limit = record["drop_threshold"]
    lost = [one for one in told.values() if one["truth"] != L and one["scores"][2] >= limit]
    more = [one for one in told.values() if one["truth"] != L and one["scores"][2] >= limit - 0.02]
    assert record["chosen_on"] == {"split": "labelled", "condition": "B", "frames": 45}
    assert len(lost) == record["there"]["after"]["irrecoverable_loss"]["count"] <= 3 <= len(more)
    assert threshold.rules_of(run, of="head") == Rules(drop_threshold=limit)
    assert threshold.rules_of(run) == Rules(), "the pair's is another one"
    with pytest.raises(OrionError, match=r"from 30 places with such labelled frames") as error:
        threshold.choose(run, 0.01, (), of="head", confidence=0.95)
    assert "more HIGH and MEDIUM labelled frames of places of their own are needed" in error.value.fix
    assert threshold.undo(run, of="head") is None
    assert threshold.rules_of(run, of="head") == Rules()


def test_the_same_threshold_again_is_no_second_entry(tmp_path: Path) -> None:
    run = run_with_a_head(tmp_path, spread=3.0)
    first = threshold.choose(run, 0.1, (), of="head", loosen=True)
    path = run.folder / threshold.FILES["head"]
    written = path.read_text()
    assert threshold.choose(run, 0.1, (), of="head", loosen=True)["drop_threshold"] == first["drop_threshold"]
    assert path.read_text() == written
    threshold.choose(run, 0.2, (), of="head", loosen=True)
    assert threshold.undo(run, of="head") == first["drop_threshold"]
    assert threshold.undo(run, of="head") is None


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_damaged_threshold_is_chosen_again(tmp_path: Path, text: str) -> None:
    """It is made here, so nothing of it can be fetched."""
    run = run_with_a_head(tmp_path)
    (run.folder / threshold.FILES["head"]).write_bytes(text.encode("latin-1"))
    with pytest.raises(OrionError, match=r"head_operating_point\.json is not ") as error:
        threshold.rules_of(run, of="head")
    assert error.value.fix == "Run 'orion threshold --head' again."


def test_a_threshold_is_of_one_head(tmp_path: Path) -> None:
    run = run_with_a_head(tmp_path)
    threshold.choose(run, 0.1, (), of="head", loosen=True)
    old = json.loads((run.folder / head.FILE_NAME).read_text())
    (run.folder / head.FILE_NAME).write_text(json.dumps(old | {"bias": [0.0, 0.0, 1.0]}))
    with pytest.raises(OrionError, match="was chosen for another head") as error:
        threshold.rules_of(run, of="head")
    assert "orion threshold --head" in error.value.fix
    said = {name: answer["truth"] for name, answer in old["figures"]["answers"].items()}  # as of an earlier version
    old["figures"]["answers"] = said
    (run.folder / head.FILE_NAME).write_text(json.dumps(old))
    with pytest.raises(OrionError, match="does not say what heads answer"):
        threshold.choose(run, 0.1, (), of="head")
