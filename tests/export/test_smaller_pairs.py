"""export/calibrate.py and quantize.py: pairs of other types, what their files are, and the importance matrix."""

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import smaller_pairs
from orion_triage.dataset.dataset import Dataset
from orion_triage.dataset.records import image_path, read_split
from orion_triage.errors import OrionError
from orion_triage.evaluate import variants
from orion_triage.evaluate.metrics import Prediction
from orion_triage.export import calibrate, quantize
from orion_triage.flight import bench_frame, bundle
from orion_triage.llama_cpp.toolchain import Toolchain, find_toolchain
from orion_triage.llama_cpp.tools import quantize_file, run_tool
from orion_triage.machine import plan
from orion_triage.models import lfm2_vl
from orion_triage.models.load import TINY_BASE_FOLDER
from orion_triage.pipeline import QUANTIZE, clean, is_current, run_stage, stage_named
from orion_triage.runs import manifest
from orion_triage.runs.run import Run, changed_settings, prepare
from orion_triage.settings import BackboneType, QuantizeSettings, Settings, load_settings
from tests.conftest import MISSION, orion

IMAGE_TOKENS = 64  # of a frame of 256 px
# The shipped base: 44 matrices; 26 norms and short-conv kernels stay F32.
TYPES: dict[BackboneType, dict[str, int]] = {
    "Q4_K_M": {"F32": 26, "Q4_K": 38, "Q6_K": 6},
    "Q3_K_M": {"F32": 26, "Q3_K": 28, "Q4_K": 13, "Q5_K": 2, "Q6_K": 1},
    "IQ4_XS": {"F32": 26, "IQ4_XS": 43, "Q6_K": 1},
    "Q4_0": {"F32": 26, "Q4_0": 43, "Q6_K": 1},
    "Q8_0": {"F32": 26, "Q8_0": 44},
}


@pytest.fixture(scope="session")
def toolchain() -> Toolchain:
    return find_toolchain()


@pytest.fixture(scope="session")
def matrix(tmp_path_factory: pytest.TempPathFactory, tiny_pair: Path, small_dataset: Path) -> Path:
    """The shipped base's importance matrix from the 12 frames of the training split."""
    out = tmp_path_factory.mktemp("matrix") / quantize.MATRIX
    figures = calibrate.run(TINY_BASE_FOLDER, tiny_pair / quantize.F16, Dataset(small_dataset, MISSION), out, 256)
    assert (figures["records"], figures["entries"]) == (12, 44)
    return out


def tensors(path: Path) -> dict[str, Any]:
    from gguf import GGUFReader

    return {tensor.name: tensor for tensor in GGUFReader(path).tensors}


def field(path: Path, key: str) -> Any:
    from gguf import GGUFReader

    found = GGUFReader(path).get_field(key)
    return found.contents() if found else None


@pytest.mark.llama_cpp
@pytest.mark.parametrize("kind", TYPES)
def test_a_backbone_is_what_its_name_says(
    kind: BackboneType, toolchain: Toolchain, tiny_pair: Path, tmp_path: Path
) -> None:
    path = tmp_path / quantize.backbone_name(kind)
    quantize_file(toolchain, tiny_pair / quantize.F16, path, kind)
    assert quantize.check_file(path, TINY_BASE_FOLDER) == TYPES[kind]
    assert Counter(one.tensor_type.name for one in tensors(path).values()) == TYPES[kind]


@pytest.mark.llama_cpp
def test_a_backbone_under_another_name_or_with_other_types_is_refused(
    toolchain: Toolchain, tiny_pair: Path, tmp_path: Path
) -> None:
    other = tmp_path / quantize.backbone_name("Q3_K_M")
    shutil.copyfile(tiny_pair / quantize.QUANTIZED, other)
    with pytest.raises(OrionError, match=r"orion-q3_k_m\.gguf does not say that it is Q3_K_M"):
        quantize.check_file(other, TINY_BASE_FOLDER)
    # A rule for one tensor that is not in the plan, under a type that allows Q6_K elsewhere.
    mixed = tmp_path / quantize.QUANTIZED
    command = [str(toolchain.llama_quantize), "--tensor-type", "^blk.0.ffn_up=q6_k", str(tiny_pair / quantize.F16)]
    run_tool([*command, str(mixed), "Q4_K_M"], mixed, "llama-quantize")
    with pytest.raises(OrionError, match=r"blk\.0\.ffn_up\.weight is Q6_K, not one of \['Q4_K'\]"):
        quantize.check_file(mixed, TINY_BASE_FOLDER)


@pytest.mark.llama_cpp
def test_every_quantized_matrix_has_its_entry(matrix: Path, tiny_pair: Path) -> None:
    quantized = {
        name: one for name, one in tensors(tiny_pair / quantize.QUANTIZED).items() if one.tensor_type.name != "F32"
    }
    entries = {name.removesuffix(".in_sum2"): one for name, one in tensors(matrix).items() if name.endswith(".in_sum2")}
    assert entries.keys() == quantized.keys()
    short_convolutions = {name for name in entries if "shortconv" in name}
    assert short_convolutions == {
        f"blk.{layer}.shortconv.{part}_proj.weight" for layer in (0, 1, 3) for part in ("in", "out")
    }
    for name, one in entries.items():
        assert int(one.shape[0]) == int(quantized[name].shape[0])
        assert np.isfinite(one.data).all()
        assert (one.data > 0).any()


@pytest.mark.llama_cpp
def test_all_tokens_count_those_of_the_image_too_and_no_padding(
    matrix: Path, small_dataset: Path, tiny_pair: Path
) -> None:
    """Against the inputs of the first layer, computed another way: embeddings and the norm before it."""
    import torch

    from orion_triage.models.encode import encode
    from orion_triage.models.load import load_model, load_processor

    dataset = Dataset(small_dataset, MISSION)
    records = calibrate.training_records(dataset)
    processor, model = load_processor(TINY_BASE_FOLDER, 256), load_model(TINY_BASE_FOLDER, dtype="float32")
    layer, expected, counted, of_images = model.model.language_model.layers[0], 0.0, 0, 0
    for record in records:
        batch = encode(processor, [dataset.frame(record, 256)], [record.user_text], [record.answer])
        with torch.inference_mode():
            seen = model.look(**{key: batch[key] for key in model.vision_keys})
            inputs = layer.operator_norm(model.embed(batch["input_ids"], seen, batch["image_of_row"]))
        expected = expected + inputs[0].double().square().sum(0).numpy()
        counted += batch["input_ids"].shape[1]
        of_images += int((batch["input_ids"] == processor.image_token_id).sum())
    assert of_images == IMAGE_TOKENS * len(records)
    found = tensors(matrix)
    assert {int(one.data.item()) for name, one in found.items() if name.endswith(".counts")} == {counted}
    np.testing.assert_allclose(found["blk.0.shortconv.in_proj.weight.in_sum2"].data[0], expected, rtol=1e-4)


@pytest.mark.llama_cpp
def test_only_training_frames_are_read(matrix: Path, small_dataset: Path, tmp_path: Path) -> None:
    names = {
        split: {one.name for one in read_split(small_dataset, split, MISSION)} for split in ("train", "val", "test")
    }
    _, *read = field(matrix, "imatrix.datasets")
    assert set(read) == names["train"]
    assert not set(read) & (names["val"] | names["test"])
    copy = shutil.copytree(small_dataset, tmp_path / "dataset")
    for record in (*read_split(copy, "val", MISSION), *read_split(copy, "test", MISSION)):
        image_path(copy, record).unlink()
    for path in (*copy.glob("**/val*"), *copy.glob("**/test*")):
        path.unlink()
    dataset = Dataset(copy, MISSION)
    records = calibrate.training_records(dataset, 5)
    assert [record.coordinates is None for record in records] == [False, True, False, True, False]
    assert len({dataset.frame(record, 256).tobytes() for record in records}) == 5


@pytest.mark.llama_cpp
def test_a_tensor_without_an_entry_is_an_error_not_a_line_in_a_log(
    matrix: Path, toolchain: Toolchain, tiny_pair: Path, tmp_path: Path
) -> None:
    name, f16 = "blk.1.shortconv.in_proj.weight", tiny_pair / quantize.F16
    path = rewritten(matrix, tmp_path / quantize.MATRIX, lambda entries: entries.pop(name))
    target = tmp_path / quantize.backbone_name("Q3_K_M")
    with pytest.raises(OrionError, match=f"did not find weights for {name}"):
        quantize_file(toolchain, f16, target, "Q3_K_M", path)
    assert not target.exists()
    quantize_file(toolchain, f16, target, "Q3_K_M", matrix)
    assert field(target, "quantize.imatrix.file") == quantize.MATRIX  # without this machine's folders
    assert field(target, "quantize.imatrix.entries_count") == 44
    plain = tmp_path / "plain.gguf"
    quantize_file(toolchain, f16, plain, "Q3_K_M")
    ours, theirs = tensors(target), tensors(plain)
    same = {one for one in ours if ours[one].data.tobytes() == theirs[one].data.tobytes()}
    assert same == {one for one in ours if ours[one].tensor_type.name == "F32"}  # every matrix is another one


def rewritten(matrix: Path, out: Path, change: Callable[[dict[str, calibrate.Columns]], object]) -> Path:
    """The matrix with changed entries."""
    found = tensors(matrix)
    entries = {
        name.removesuffix(".in_sum2"): calibrate.Columns(
            np.array(one.data[0], dtype=np.float64),
            int(found[name.replace(".in_sum2", ".counts")].data.item()),
        )
        for name, one in found.items()
        if name.endswith(".in_sum2")
    }
    change(entries)
    calibrate.write(out, entries, [], 1)
    return out


@pytest.mark.llama_cpp
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda entries: entries.pop("token_embd.weight"), r"token_embd\.weight has no entry"),
        (lambda entries: entries.update(x=entries["blk.0.ffn_up.weight"]), r"x is not a matrix of orion-f16\.gguf"),
        (
            lambda entries: entries.update({"blk.0.ffn_down.weight": entries["blk.0.ffn_up.weight"]}),
            r"blk\.0\.ffn_down\.weight has 256 values for rows of 512",
        ),
        (lambda entries: setattr(entries["blk.0.ffn_up.weight"], "tokens", 0), r"ffn_up\.weight was never used"),
        (
            lambda entries: entries["blk.0.ffn_up.weight"].sums_of_squares.__setitem__(3, np.nan),
            r"ffn_up\.weight has values that are not finite",
        ),
    ],
)
def test_a_matrix_that_does_not_fit_is_refused(
    change: Callable[[dict[str, calibrate.Columns]], object],
    said: str,
    matrix: Path,
    tiny_pair: Path,
    tmp_path: Path,
) -> None:
    path = rewritten(matrix, tmp_path / quantize.MATRIX, change)
    with pytest.raises(OrionError, match=said):
        calibrate.check(path, tiny_pair / quantize.F16, lfm2_vl)


def test_the_inputs_of_a_default_pair_are_those_of_before_other_pairs_existed() -> None:
    """A finished run is not done again; any other choice is."""
    default = Settings()

    def of(**chosen: str) -> object:
        changed = default.model_copy(update={"quantize": QuantizeSettings.model_validate(chosen)})
        return QUANTIZE.settings_of(changed)["quantize"]

    assert QUANTIZE.settings_of(default) == {"quantize": {"type": "Q4_K_M"}}
    assert of(type="Q3_K_M") == {"type": "Q3_K_M"}
    assert of(tower="Q8_0", calibrate="task") == {"type": "Q4_K_M", "tower": "Q8_0", "calibrate": "task"}
    made = manifest.Manifest("quantize", QUANTIZE.settings_of(default), {}, {}, {}, 0, {})
    assert changed_settings(Run(Path(), default), made) == []
    other = default.model_copy(update={"quantize": QuantizeSettings(tower="Q8_0")})
    assert changed_settings(Run(Path(), other), made) == ["quantize.tower F16, now Q8_0"]
    changes = {variant.name: variant.changes for variant in variants.table(default)}
    assert changes["quantized"] == "quantization to Q4_K_M"
    for settings, said in (
        (QuantizeSettings(type="Q3_K_M", calibrate="task"), "quantization to Q3_K_M with an importance matrix"),
        (QuantizeSettings(type="Q4_0", tower="Q8_0"), "quantization to Q4_0, and of the tower to Q8_0"),
    ):
        changed = default.model_copy(update={"quantize": settings})
        assert variants.named(changed, "quantized").changes == said


def test_what_is_planned_and_measured_is_the_pair_of_the_settings() -> None:
    chosen = ["quantize.type=Q3_K_M", "quantize.tower=Q8_0"]
    flown, *_ = bench_frame.plan(Run(Path("r"), load_settings("tiny", chosen)), (), (), ())
    assert flown == bench_frame.Setup(256, "Q3_K_M", "Q8_0")
    default, other = (
        {step.name: step.disk for step in plan.plan(load_settings("lfm2.5-vl-1.6b", sets), "none", 360).steps}["copy"]
        for sets in ([], chosen)
    )
    assert default
    assert (default.known, default.how) == ("measured", "Q4_K_M and mmproj")
    assert other
    assert other.known == "estimate"
    assert "Q3_K_M with one in Q8_0" in other.how


@pytest.mark.llama_cpp
@pytest.mark.usefixtures("warm_python")
def test_a_smaller_pair_is_made_evaluated_bundled_and_cleaned_under_its_own_names(
    small_dataset: Path, tmp_path: Path
) -> None:
    settings = load_settings(
        "tiny", ["quantize.type=Q3_K_M", "quantize.tower=Q8_0", "quantize.calibrate=task", "evaluate.threads=1"]
    )
    run = Run(tmp_path / "run", settings)
    prepare(run)
    shutil.copytree(small_dataset, run.dataset)
    shutil.copytree(TINY_BASE_FOLDER, run.merged)
    made, _ = run_stage(QUANTIZE, run)
    pair = quantize.check_pair(run.gguf)
    assert pair.names == ("orion-q3_k_m.gguf", "orion-mmproj-q8_0.gguf")
    assert quantize.find_pair(run.gguf) == (pair.backbone, pair.mmproj)
    files = {"orion-f16.gguf", "orion-mmproj-f16.gguf", *pair.names}
    assert {path.name for path in run.gguf.glob("*.gguf")} == files | {quantize.MATRIX}
    recorded = json.loads((run.gguf / quantize.PAIR).read_text())
    assert recorded["files"].keys() == made.figures["bytes"].keys() == files
    assert recorded["calibration"] == made.figures["calibration"]
    assert recorded["calibration"]["sha256"] == made.outputs[quantize.MATRIX]
    assert made.figures["tensor_types"]["orion-q3_k_m.gguf"] == TYPES["Q3_K_M"]
    tower = tensors(pair.mmproj)
    assert {one.tensor_type.name for name, one in tower.items() if ".blk." in name and len(one.shape) == 2} == {"Q8_0"}
    assert "--model orion-q3_k_m.gguf --mmproj orion-mmproj-q8_0.gguf" in (run.gguf / "README.md").read_text()
    # As F16, the converter's tower would be another file.
    shutil.copyfile(run.gguf / quantize.MMPROJ, tmp_path / pair.mmproj.name)
    with pytest.raises(OrionError, match=r"orion-mmproj-q8_0\.gguf does not say that it is Q8_0"):
        quantize.check_file(tmp_path / pair.mmproj.name, run.merged)

    run_stage(stage_named("evaluate quantized", settings), run)
    served = manifest.read_manifest(run.evaluation("quantized"))
    assert served
    assert served.figures["served"]["model_path"] == str(pair.backbone)
    assert served.figures["served"]["mmproj_path"] == str(pair.mmproj)
    made_bundle = bundle.run(run, tmp_path / "bundle", accepted_risk="a test", time_out=60)
    assert (made_bundle["model"], made_bundle["mmproj"]) == pair.names
    assert {path.name for path in (tmp_path / "bundle").glob("*.gguf")} == set(pair.names)
    assert pair.backbone.name in (tmp_path / "bundle" / "serve.sh").read_text()
    with pytest.raises(OrionError, match="default flags were not measured"):  # a tower in Q8_0 is no second one
        bench_frame.tuned(run, minutes=1e-4)

    clean(run)
    assert {path.name for path in run.gguf.glob("*.gguf")} == {*pair.names, quantize.MATRIX}
    assert quantize.check_pair(run.gguf) == pair
    pair.mmproj.write_bytes(b"")
    with pytest.raises(OrionError, match=r"orion-mmproj-q8_0\.gguf is not the file of this conversion"):
        quantize.check_pair(run.gguf)


@pytest.mark.llama_cpp
def test_a_run_of_before_other_pairs_existed_is_finished_and_keeps_its_pair(finished: Path) -> None:
    folder = finished / "runs" / "small"
    kept = json.loads((folder / "settings.json").read_text())
    assert kept["quantize"].keys() == {"type", "tower", "calibrate"}
    settings = load_settings("tiny", ["dataset.catalogue=places.csv"])
    run = Run(folder, settings)
    made = manifest.read_manifest(run.gguf)
    assert made
    assert made.settings == {"quantize": {"type": "Q4_K_M"}}
    assert quantize.check_pair(run.gguf).names == ("orion-q4_k_m.gguf", "orion-mmproj-f16.gguf")
    record = json.loads((run.gguf / quantize.PAIR).read_text())
    assert list(record["files"]) == ["orion-f16.gguf", "orion-mmproj-f16.gguf", "orion-q4_k_m.gguf"]
    assert record.keys() == {"merged_sha256", "llama_cpp_build", "files"}
    assert is_current(QUANTIZE, run)
    other = settings.model_copy(update={"quantize": QuantizeSettings(tower="Q8_0")})
    assert not is_current(QUANTIZE, replace(run, settings=other))


def test_without_training_records_nothing_is_calibrated(tmp_path: Path) -> None:
    merged = shutil.copytree(TINY_BASE_FOLDER, tmp_path / "merged")
    with pytest.raises(OrionError, match="there are no training records to calibrate on"):
        quantize.run(merged, tmp_path / "gguf", QuantizeSettings(calibrate="task"), user_texts=["<image>x"])
    assert not (tmp_path / "gguf").exists()


def test_the_benchmark_compares_a_pair_with_the_merged_model() -> None:
    """Two frames: one flips from right to wrong, with known probabilities."""

    def answers(*rows: tuple[str, tuple[float, float, float]]) -> list[Prediction]:
        return [
            Prediction("B", f"frame {index}", "HIGH", said, scores=scores) for index, (said, scores) in enumerate(rows)
        ]

    merge = answers(("HIGH", (0.5, 0.25, 0.25)), ("HIGH", (0.5, 0.5, 0.0)))
    pair = answers(("HIGH", (0.5, 0.25, 0.25)), ("LOW", (0.25, 0.5, 0.25)))
    found = smaller_pairs.against(merge, pair)
    assert found["divergence"] == pytest.approx(0.5 * np.log(2) / 2)
    assert found["largest_divergence"] == pytest.approx(0.5 * np.log(2))
    assert (found["right"], found["right_of_merge"], found["flips"], found["gained"], found["lost"]) == (1, 2, 1, 0, 1)


def test_a_lower_divergence_is_one_on_the_same_frames() -> None:
    first = {f"{condition} {frame}": 0.004 + frame / 1e5 for condition in "AB" for frame in range(60)}
    second = {name: value - 0.001 for name, value in first.items() if name != "B 7"} | {"B other": 9.0}
    found = smaller_pairs.less_than(first, second)
    assert [found[key] for key in ("lower_by", "low", "high")] == pytest.approx([0.001] * 3)
    noisy = {name: value + (-1) ** int(name[2:]) * 0.002 for name, value in first.items()}
    found = smaller_pairs.less_than(first, noisy)
    assert found["low"] < 0 < found["high"]


@pytest.mark.llama_cpp
@pytest.mark.slow
def test_answers_of_the_pair_before_are_not_those_of_the_new_pair(finished: Path, tmp_path: Path) -> None:
    """Another tower in a copy of a run: its evaluations are left out by name until they are made again."""
    shutil.copytree(finished / "runs" / "small", tmp_path / "old")
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    made = orion("quantize", "--run", "new", "--set", "quantize.tower=Q8_0", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    told = orion("compare", "old", "new", "--json", cwd=tmp_path)
    compared = json.loads(told.stdout)
    stale = {"F16", "Q8_0", "quantized", "constrained"}
    assert compared["left_out"] == {"new": {name: ["another gguf"] for name in stale}}
    assert stale.isdisjoint(compared["against"]["new"])
    assert "left out: constrained of new is outdated (another gguf). 'orion run --run new' renews it" in told.stderr
    evaluated = orion("evaluate", "--gguf", "--run", "new", cwd=tmp_path)
    assert evaluated.returncode == 0, evaluated.stderr
    assert re.search(r'^settings of new, where .*, quantize\.tower="Q8_0"$', evaluated.stderr, re.MULTILINE)
    compared = json.loads(orion("compare", "old", "new", "--json", cwd=tmp_path).stdout)
    assert "quantized" in compared["against"]["new"]
    assert set(compared["left_out"]["new"]) == stale - {"quantized"}
    verdict = json.loads(orion("verdict", "new", "--json", cwd=tmp_path).stdout)
    (row,) = [row for row in verdict["criteria"] if row["name"] == "evaluated as it flies"]
    assert row["outcome"] == "open"
    assert row["measured"].startswith(
        "of other settings or products: evaluate F16, evaluate Q8_0, evaluate constrained"
    )
    assert orion("report", "--run", "new", cwd=tmp_path).returncode == 0
    assert "Outdated (another gguf): " in (tmp_path / "new" / "report.md").read_text()
