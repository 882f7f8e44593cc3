"""What an upstream release could change without a word: the names and the layout between transformers and llama.cpp."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from orion_triage.errors import OrionError
from orion_triage.export import quantize
from orion_triage.export.convert import convert
from orion_triage.llama_cpp.toolchain import find_toolchain
from orion_triage.models.load import TINY_BASE_FOLDER, load_model, load_processor, resolve_base


def tensors_of(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The shipped base, loaded and saved by transformers itself."""
    folder = tmp_path / "saved"
    load_model(TINY_BASE_FOLDER, dtype="auto").save_pretrained(folder)
    load_processor(TINY_BASE_FOLDER, 256).save_pretrained(folder)
    return folder


def test_transformers_keeps_the_published_names(saved: Path) -> None:
    before, after = tensors_of(TINY_BASE_FOLDER), tensors_of(saved)
    assert after.keys() == before.keys()
    assert all(after[name].dtype == before[name].dtype and after[name].equal(before[name]) for name in before)
    config = json.loads((saved / "config.json").read_text())
    assert config["model_type"] == "lfm2_vl"
    assert config["text_config"]["architectures"] == ["Lfm2ForCausalLM"]
    assert resolve_base(str(saved)) == saved


@pytest.mark.llama_cpp
def test_the_converter_reads_what_transformers_saved(
    saved: Path, tiny_pair: Path, tmp_path: Path, warm_python: None
) -> None:
    from gguf import GGUFReader

    tools = find_toolchain()
    for mmproj, of_base in ((False, quantize.F16), (True, quantize.MMPROJ)):
        convert(tools, saved, tmp_path / of_base, mmproj=mmproj)
        contents = [
            {tensor.name: tensor.data.tobytes() for tensor in GGUFReader(folder / of_base).tensors}
            for folder in (tiny_pair, tmp_path)
        ]
        assert contents[0] == contents[1]
        names = [name for name in tensors_of(saved) if name.startswith("model.language_model.") is not mmproj]
        assert len(contents[0]) == len(names)  # none was passed over


@pytest.mark.parametrize(
    ("old", "new", "place"),
    [
        ("vision_tower.vision_model.", "vision_tower.", "'model.vision_tower.embeddings.patch_embedding.weight'"),
        ("model.language_model.", "language_model.model.", "'language_model.model.embed_tokens.weight'"),
        ("multi_modal_projector.linear_1", "projector.first", "no similar name"),
    ],
)
def test_renamed_tensors_are_refused_before_anything_is_trained(
    small_base: Path, tmp_path: Path, old: str, new: str, place: str
) -> None:
    from safetensors.torch import save_file

    folder = tmp_path / "base"
    shutil.copytree(small_base, folder)
    renamed = {name.replace(old, new): tensor for name, tensor in tensors_of(small_base).items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OrionError, match=f"; found {place}.*published checkpoint"):
        resolve_base(str(folder))
