"""hub.py, card.py and publish.py: huggingface_hub itself against a Hub of the tests' own, over HTTP."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from orion_triage.dataset.records import image_path, read_split, split_path
from orion_triage.errors import OrionError
from orion_triage.export import quantize
from orion_triage.models.licence import README, licence_of
from orion_triage.publish.card import write_card
from orion_triage.runs.manifest import read_manifest
from orion_triage.settings import SPLITS, load_settings, overrides
from tests.conftest import MISSION

from .conftest import orion_with, structured_picture
from .hub_server import TOKEN, Hub, serve

LOCATE = """
import json, sys
from orion_triage import hub
from orion_triage.errors import OrionError
kind, *names = sys.argv[1:]
for name in names:
    try:
        folder = hub.locate(name, kind)
        answer = " ".join([str(hub.id_of(folder)), *sorted(path.name for path in folder.iterdir())])
    except OrionError as error:
        answer = f"{error.message} FIX {error.fix}"
    print(json.dumps(answer))
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve() as server:
        yield server


def environment(hub: Hub, home: Path, **changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return {
        **kept,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "COLUMNS": "200",
        **changes,
    }


def locate(hub: Hub, home: Path, *names: str, kind: str = "model", **changes: str) -> list[str]:
    """What a process of its own finds under these names: id and files, or the error."""
    command = [sys.executable, "-c", LOCATE, kind, *names]
    result = subprocess.run(command, env=environment(hub, home, **changes), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A repository's content: data, and a pickle and code that nobody may fetch."""
    path = tmp_path / "content"
    path.mkdir()
    for name in ("config.json", "LICENSE", "pytorch_model.bin", "modeling.py"):
        (path / name).write_text(name)
    (path / "model.safetensors").write_bytes(bytes(range(256)) * 400)
    (path / "onnx").mkdir()
    (path / "onnx" / "config.json").write_text("of another runtime")
    return path


def test_only_data_is_fetched_and_a_pinned_commit_needs_the_network_once(
    hub: Hub, folder: Path, tmp_path: Path
) -> None:
    first = hub.add("team/base", folder)
    (folder / "config.json").write_text("changed")
    hub.add("team/base", folder)
    pinned = f"team/base@{first}"
    found = ["team/base LICENSE config.json model.safetensors"]
    assert locate(hub, tmp_path / "hf", pinned) == found
    snapshot = tmp_path / "hf/hub/models--team--base/snapshots" / first
    assert (snapshot / "config.json").read_text() == "config.json"
    assert (snapshot / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    hub.requests.clear()
    assert locate(hub, tmp_path / "hf", pinned) == found
    assert not [request for request in hub.requests if "team/base" in request]
    assert locate(hub, tmp_path / "hf", pinned, HF_HUB_OFFLINE="1") == found


def test_a_download_that_was_cut_goes_on(hub: Hub, folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").write_bytes(os.urandom(12_000_000))
    commit = hub.add("team/base", folder)
    hub.cut_after = 11_000_000  # huggingface_hub keeps whole chunks of 10 MiB
    assert locate(hub, tmp_path / "hf", f"team/base@{commit}")[0].startswith("team/base ")
    snapshot = tmp_path / "hf/hub/models--team--base/snapshots" / commit
    assert (snapshot / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert any(asked.startswith("bytes=10485760-") for asked in hub.ranges)


def test_every_refusal_says_what_to_do(hub: Hub, folder: Path, tmp_path: Path) -> None:
    hub.add("team/base", folder)
    hub.add("team/gated", folder, gated=True)
    hub.add("team/private", folder, private=True)
    home = tmp_path / "hf"
    malformed = ("nowhere", "./gone", "/gone/too", "a/b/c", "team/base@")
    private, other, *answers = locate(hub, home, "team/private", "team/base@v9", *malformed)
    assert "neither a local folder nor a repository" in private
    assert "set HF_TOKEN" in private
    assert "no revision 'v9'" in other
    assert ["neither a folder nor a Hub id" in answer for answer in answers] == [True] * len(malformed)
    gated, nothing, private = locate(hub, home, "team/gated", "team/nothing", "team/private", HF_TOKEN=TOKEN)
    assert "is gated" in gated
    assert f"Accept its terms at {hub.url}/team/gated" in gated
    assert "neither a local folder nor a repository" in nothing
    assert private.startswith("team/private ")
    (wrong,) = locate(hub, home, "team/base", HF_TOKEN="hf_wrong")
    assert "answered 401" in wrong
    assert "hf_wrong" not in wrong
    (offline,) = locate(hub, home, "team/base", HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set" in offline
    (unreachable,) = locate(hub, home, "team/base", HF_ENDPOINT="http://127.0.0.1:9")
    assert "cannot be reached" in unreachable
    assert "hf download team/base --local-dir FOLDER" in unreachable


def test_only_the_pair_is_fetched_of_many_quantizations(hub: Hub, tmp_path: Path) -> None:
    """Names as on the Hub; the folder below and the other 14 files stay there."""
    folder = tmp_path / "many"
    (folder / "UD").mkdir(parents=True)
    kinds = ("BF16", "F16", "Q4_0", "Q4_K_M", "Q5_K_M", "Q8_0")
    wanted = ("LFM-Q4_K_M.gguf", "mmproj-LFM-F16.gguf")
    for name in (*(f"LFM-{kind}.gguf" for kind in kinds), "mmproj-LFM-BF16.gguf", wanted[1], "UD/LFM-Q4_K_M.gguf"):
        (folder / name).write_bytes(name.encode())
    (folder / "README.md").write_text("# A card")
    commit = hub.add("team/many", folder)
    expected = f"team/many {wanted[0]} README.md {wanted[1]}"
    assert locate(hub, tmp_path / "hf", "team/many", kind="GGUF pair") == [expected]
    fetched = {request.rsplit("/", 1)[1] for request in hub.requests if "/resolve/" in request}
    assert fetched == {*wanted, "README.md"}
    for offline in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        assert locate(hub, tmp_path / "hf", f"team/many@{commit}", kind="GGUF pair", **offline) == [expected]
    (folder / wanted[0]).unlink()
    hub.add("team/many", folder)
    (refused,) = locate(hub, tmp_path / "hf2", "team/many", kind="GGUF pair")
    assert "LFM-Q5_K_M.gguf" in refused
    assert "hf download team/many FILE FILE --local-dir FOLDER" in refused
    assert not (tmp_path / "hf2/hub/models--team--many/snapshots").exists()


def orion(hub: Hub, cwd: Path, *arguments: object, **changes: str) -> subprocess.CompletedProcess[str]:
    return orion_with(environment(hub, cwd / "hf", HF_TOKEN=TOKEN, **changes), cwd, *arguments)


def licensed(base: Path, folder: Path) -> Path:
    shutil.copytree(base, folder)
    (folder / "README.md").write_text(
        "---\nlicense: other\nlicense_name: lfm1.0\nlicense_link: LICENSE\n---\n# A base\n"
    )
    (folder / "LICENSE").write_text("The text of the licence.\n")
    return folder


@pytest.mark.slow
@pytest.mark.llama_cpp
def test_a_whole_run_by_hub_ids(hub: Hub, small_base: Path, small_dataset: Path, tmp_path: Path) -> None:
    """Base and dataset come from the Hub; adapter, merged model and pair go there, and come back by id."""
    commit = hub.add("team/base", licensed(small_base, tmp_path / "base"))
    hub.add("team/data", small_dataset, kind="datasets")
    settings = tmp_path / "small.toml"
    settings.write_text(
        f"""
        [base]
        model = "team/base@{commit}"
        frame_size = 256
        [fine_tune]
        learning_rate = 1e-2
        epochs = 1
        micro_batch_size = 8
        gradient_accumulation_steps = 1
        gradient_checkpointing = false
        [fuse]
        check_records = 4
        [evaluate]
        max_new_tokens = 40
        """
    )
    own = ("--preset", settings)
    for command in (("dataset", "--dataset", "team/data"), ("fine-tune",), ("fuse",), ("quantize",)):
        result = orion(hub, tmp_path, *command, *own)
        assert result.returncode == 0, result.stderr
    run = tmp_path / "runs" / "small"
    for split in SPLITS:
        assert split_path(run / "dataset", split).read_bytes() == split_path(small_dataset, split).read_bytes()
    assert json.loads((run / "orion_lora_weights/base.json").read_text())["name"] == "team/base"

    refused = orion(hub, tmp_path, "push", "someone-else/x", "--product", "adapter")
    assert refused.returncode == 1
    assert "answered 403" in refused.stderr
    weights = run / "orion_lora_weights" / "adapter_model.safetensors"
    as_made = weights.read_bytes()
    for path, content, found in (
        (weights, as_made[:-1] + b"x", "adapter_model.safetensors has sha256 "),
        (run / "orion_lora_weights" / "notes.txt", b"mine", "notes.txt was added after the stage finished"),
    ):
        path.write_bytes(content)
        refused = orion(hub, tmp_path, "push", "me/adapter", "--product", "adapter")
        assert refused.returncode == 1
        assert found in refused.stderr
        assert "orion fine-tune --run" in refused.stderr
        assert "me/adapter" not in hub.repositories
        path.unlink()
        weights.write_bytes(as_made)
    for product in ("adapter", "merged", "gguf"):
        if product == "gguf":  # a card with figures, from here on
            for command in (("ablation",), ("evaluate",), ("evaluate", "--gguf")):
                assert orion(hub, tmp_path, *command, *own).returncode == 0
        result = orion(hub, tmp_path, "push", f"me/{product}", "--product", product)
        assert result.returncode == 0, result.stderr
        assert TOKEN not in result.stderr + result.stdout
        files = hub.repositories[f"me/{product}"].commits[hub.repositories[f"me/{product}"].resolve("main") or ""]
        assert hub.repositories[f"me/{product}"].private
        assert files["LICENSE"] == b"The text of the licence.\n"
        assert b"license_name: lfm1.0" in files["README.md"]
        assert b"base_model: team/base" in files["README.md"]
        assert not {"manifest.json", quantize.F16} & set(files)
        assert str(tmp_path).encode() not in b"".join(files.values())
    models = ("base", "fine-tuned", "quantized")
    evaluation = {f"evaluation/{name}" for name in ("results.json", "report.png", *(f"{m}.jsonl" for m in models))}
    assert {quantize.QUANTIZED, quantize.MMPROJ, quantize.PAIR, "LICENSE", "README.md"} | evaluation == set(files)
    assert len(files["evaluation/quantized.jsonl"].splitlines()) == 4 * 6
    header = ModelCard(files["README.md"].decode()).data
    assert header.eval_results is not None
    measured = {(result.dataset_config, result.metric_type): result.metric_value for result in header.eval_results}
    figures = json.loads(files["evaluation/results.json"])["models"]["quantized"]
    assert measured["A", "accuracy"] == round(figures["A"]["accuracy"], 4)
    assert measured["B", "irrecoverable_loss"] == round(figures["B"]["irrecoverable_loss"]["rate"], 4)
    assert hashlib.sha256(files[quantize.MMPROJ]).hexdigest() in files["README.md"].decode()
    assert "6 frames at 6 places" in files["README.md"].decode()

    other = ("--run", "runs/other", *own)
    assert orion(hub, tmp_path, "dataset", "--dataset", "team/data", *other).returncode == 0
    result = orion(hub, tmp_path, "fuse", "--adapter", "me/adapter", *other)
    assert result.returncode == 0, result.stderr
    merged = [folder / "orion_merged" / "model.safetensors" for folder in (run, tmp_path / "runs/other")]
    assert merged[0].read_bytes() == merged[1].read_bytes()
    result = orion(hub, tmp_path, "evaluate", "--gguf", "me/gguf", *other)
    assert result.returncode == 0, result.stderr
    stage_manifest = read_manifest(tmp_path / "runs/other/evaluation/test/other-pair")
    assert stage_manifest is not None
    assert stage_manifest.figures["pair"] == "me/gguf"
    assert stage_manifest.figures["A"]["count"] == 6

    assert orion(hub, tmp_path, "evaluate", "me/gguf", *other).returncode == 2


def test_a_base_without_a_licence_gives_nothing_to_publish(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    assert licence_of(base) is None
    write_card("adapter", base, "base", tmp_path, MISSION)
    assert "Not known" in (tmp_path / README).read_text()
    (tmp_path / "README.md").write_text("---\n: [\n---\n")
    with pytest.raises(OrionError, match="the header is not YAML"):
        licence_of(tmp_path)


def test_a_dataset_is_checked_before_it_is_taken(small_dataset: Path, tmp_path: Path) -> None:
    from orion_triage.dataset import build
    from orion_triage.settings import DatasetSettings

    source = tmp_path / "source"
    shutil.copytree(small_dataset, source)
    first = image_path(source, read_split(source, "train", MISSION)[0])
    structured_picture(5).resize((640, 512)).save(first)
    figures = build.run(tmp_path / "out", DatasetSettings(folder=str(source)), MISSION)
    assert figures["warnings"] == ["1 of 24 pictures were not 512x512: cropped and scaled"]
    first.unlink()
    with pytest.raises(OrionError, match="1 of the 24 pictures that the records name are missing"):
        build.run(tmp_path / "out", DatasetSettings(folder=str(source)), MISSION)
    outside = tmp_path / "outside.png"
    structured_picture(5).save(outside)
    first.symlink_to(outside)
    with pytest.raises(OrionError, match="is outside"):
        build.run(tmp_path / "out", DatasetSettings(folder=str(source)), MISSION)


def test_two_files_that_are_no_pair_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OrionError, match=r"has no \*\.gguf, not one Q4_K_M backbone and one mmproj"):
        quantize.find_pair(tmp_path)
    for name in ("mmproj-x.gguf", "model-Q4_K_M.gguf"):
        (tmp_path / name).write_bytes(b"GGUX" + bytes(64))
    with pytest.raises(OrionError, match="is not a valid GGUF file"):
        quantize.find_pair(tmp_path)


def test_the_full_size_presets_are_the_missions_tables_with_pinned_weights() -> None:
    full, small = load_settings("lfm2.5-vl-1.6b"), load_settings("lfm2.5-vl-450m")
    assert overrides(full) == {}
    assert set(overrides(small)) == {"base.model"}
    for settings in (full, small):
        assert len(settings.base.model.partition("@")[2]) == 40
