"""A base, adapter, pair or dataset that is not what it should be: quantized, a pattern, a pointer, other words."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orion_triage import hub
from orion_triage.dataset.catalogue import read_rows
from orion_triage.dataset.check.facts import read_entries
from orion_triage.dataset.records import read_records, read_split, write_split
from orion_triage.errors import OrionError
from orion_triage.export import quantize
from orion_triage.imagery.frames import read_frame
from orion_triage.imagery.geotiff import locate
from orion_triage.machine import doctor
from orion_triage.models import lfm2_vl
from orion_triage.models.adapter import adapter_census, attach_adapter, read_adapter
from orion_triage.models.load import load_model, load_processor, resolve_base, save_processor
from orion_triage.settings import load_settings
from tests.conftest import MISSION, make_base, orion

BITS_AND_BYTES = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
QUANTIZED = [
    ({"quantization": {"group_size": 64, "bits": 4}}, "quantization is MLX, 4 bits"),
    ({"quantization_config": BITS_AND_BYTES}, "quantization_config is bitsandbytes, 4 bits"),
    ({"quantization_config": {"load_in_8bit": True}}, "quantization_config is bitsandbytes, 8 bits"),
    ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, "is fp8:"),
    ({"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}}, "is awq, 4 bits"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4, "sym": True}}, "is gptq, 4 bits"),
    ({"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}}, "compressed-tensors"),
    ({"quantization_config": {"quant_method": "torchao", "quant_type": {"default": {}}}}, "is torchao"),
    ({"quantization_config": {"quant_algo": "NVFP4"}}, "is NVFP4"),
    ({"text_config": {"quantization_config": BITS_AND_BYTES}}, "text_config.quantization_config is bitsandbytes"),
    ({"vision_config": {"quantization": {"bits": 8, "group_size": 64}}}, "vision_config.quantization is MLX, 8 bits"),
    ({"quantization": "a word"}, "quantization is 'a word'"),
]


def changed(base: Path, folder: Path, more: dict[str, Any]) -> Path:
    """A copy of a base whose config.json has `more`."""
    shutil.copytree(base, folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key, value in more.items():
        config[key] = config[key] | value if key.endswith("_config") and key in config else value
    path.write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(("more", "said"), QUANTIZED)
def test_a_quantized_base_is_refused_by_name(more: Any, said: str, small_base: Path, tmp_path: Path) -> None:
    folder = changed(small_base, tmp_path / "base", more)
    with pytest.raises(OrionError, match="the base is already quantized") as refused:
        resolve_base(str(folder))
    assert said in refused.value.message
    assert "16-bit model that it was made from" in refused.value.fix
    finding = doctor._base(load_settings("tiny", [f"base.model={folder}"]))
    assert (finding.state, finding.found, finding.fix) == ("missing", refused.value.message, refused.value.fix)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            {"text_config": {"model_type": "lfm2_moe"}},
            "text_config.model_type is 'lfm2_moe', not lfm2: adapter targets",
        ),
        ({"vision_config": {"model_type": "lfm3_vision"}}, "vision_config.model_type is 'lfm3_vision'"),
        ({"vision_config": {"patch_size": 14}}, "vision_config.patch_size is 14, not 16: a frame of 512 pixels"),
        ({"downsample_factor": 4}, "downsample_factor is 4, not 2: a frame of 512 pixels"),
        ({"text_config": {"layer_types": ["conv", "sliding_attention"]}}, "layer_types has 'sliding_attention'"),
        ({"text_config": {"conv_bias": True}}, "text_config.conv_bias is True, not False: llama.cpp's short conv"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act is 'relu', not gelu: llama.cpp computes GELU"),
        ({"vision_config": {"hidden_act": "quick_gelu"}}, "vision_config.hidden_act is 'quick_gelu', not gelu_py"),
        ({"vision_feature_layer": -2}, "vision_feature_layer is -2, not -1: llama.cpp takes the last layer"),
    ],
)
def test_a_base_that_is_built_otherwise_is_refused_before_training(
    more: Any, said: str, small_base: Path, tmp_path: Path
) -> None:
    folder = changed(small_base, tmp_path / "base", more)
    with pytest.raises(OrionError) as refused:
        resolve_base(str(folder))
    assert said in refused.value.message
    assert doctor._base(load_settings("tiny", [f"base.model={folder}"])).state == "missing"


def test_a_base_with_a_head_of_its_own_is_refused_before_training(small_base: Path, tmp_path: Path) -> None:
    """The merged model and the pair have the token embedding for a head, so they would answer otherwise."""
    from safetensors.torch import load_file, save_file

    folder = changed(small_base, tmp_path / "base", {"tie_word_embeddings": False})
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"] * 1.5
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(OrionError, match=r"lm_head\.weight is not the token embedding") as refused:
        load_model(folder, dtype="float32")
    assert "tie_word_embeddings=true" in refused.value.fix


# Unlike the shipped base's and the 1.6B's: heads, feed-forward and tower in the proportions of the 450M; more and other
# layers, as in the 3B; the projector's LayerNorm of the models before 2.5.
SIBLING: dict[str, Any] = {
    "layer_types": ("conv", "full_attention", "conv", "conv", "full_attention", "full_attention", "conv"),
    "text_width": 512, "two_thirds_of_feed_forward": True, "text_feed_forward": 768, "attention_heads": 8,
    "key_value_heads": 2, "vision_width": 96, "vision_heads": 3, "vision_layers": 4, "projector_width": 320,
    "layernorm": True,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.llama_cpp
def test_a_sibling_of_other_sizes_goes_from_training_to_the_pair(small_dataset: Path, tmp_path: Path) -> None:
    """By its configuration alone: adapter targets, fused model, GGUF pair with the converter's parity checks."""
    base = make_base(tmp_path / "base", seed=3, **SIBLING)
    few = shutil.copytree(small_dataset, tmp_path / "few")
    for split, count in (("train", 8), ("val", 3), ("test", 3)):
        write_split(few, split, read_split(small_dataset, split, MISSION)[:count])
    sets = [
        f"base.model={base}", f"dataset.folder={json.dumps(str(few))}", "fine_tune.epochs=1",
        "fine_tune.learning_rate=1e-2", "fine_tune.micro_batch_size=8", "fine_tune.gradient_accumulation_steps=1",
        "fuse.check_records=4",
    ]  # fmt: skip
    options = ["--run", tmp_path / "run", *(word for value in sets for word in ("--set", value))]
    for command in ("dataset", "fine-tune", "fuse", "quantize"):
        done = orion(command, *options)
        assert done.returncode == 0, done.stderr
    census = json.loads((tmp_path / "run" / "orion_lora_weights" / "census.json").read_text())
    assert census["o_proj"] == {"text": 3, "vision": 4, "projector": 0}
    quantize.check_pair(tmp_path / "run" / "gguf")


@pytest.mark.parametrize("name", ["hf_quant_config.json", "quantize_config.json", "quant_config.json"])
def test_a_file_of_a_quantizer_beside_the_weights_is_refused(name: str, small_base: Path, tmp_path: Path) -> None:
    folder = changed(small_base, tmp_path / "base", {"quantization_config": None, "quantization": {}})
    resolve_base(str(folder))  # an empty entry quantizes nothing
    (folder / name).write_text("{}")
    with pytest.raises(OrionError, match=f"has {name}: the base is already quantized"):
        resolve_base(str(folder))


@pytest.mark.parametrize(("dtype", "said"), [("uint8", "U8"), ("int32", "I32"), ("float8_e4m3fn", "F8_E4M3")])
def test_packed_weights_are_refused_without_a_word_in_the_configuration(
    dtype: str, said: str, small_base: Path, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    folder = changed(small_base, tmp_path / "base", {})
    tensors = load_file(folder / "model.safetensors")
    name = "model.language_model.layers.0.feed_forward.w1.weight"
    tensors[name] = torch.zeros(tensors[name].shape, dtype=getattr(torch, dtype))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "README.md").write_text("---\nbase_model: team/in-16-bit\n---\n")
    with pytest.raises(OrionError, match=rf"w1\.weight has type {said}: .*quantized.*from, team/in-16-bit\."):
        resolve_base(str(folder))


@pytest.mark.slow
def test_every_command_refuses_a_quantized_base_before_it_works(small_base: Path, tmp_path: Path) -> None:
    folder = changed(small_base, tmp_path / "base", {"quantization": {"group_size": 64, "bits": 4}})
    for command in (["doctor"], ["ablation"], ["fine-tune"], ["fuse"], ["run"]):
        result = orion(*command, "--set", f"base.model={folder}", cwd=tmp_path, COLUMNS="400")
        said = result.stdout + result.stderr
        assert result.returncode == 1
        assert "quantization is MLX, 4 bits: the base is already quantized" in said
        assert "Traceback" not in said
    assert not list(tmp_path.glob("runs/*/*/*"))


PATTERN = r"(?:.*?(?:vision|language).*?(?:self_attn|mlp).*?(?:q_proj|k_proj|v_proj|out_proj).*?)|(a+)+$"


@pytest.mark.parametrize("targets", [PATTERN, "all-linear", ["q_proj", "v_proj", "w9"]])
def test_an_adapter_whose_targets_are_a_pattern_was_trained(targets: Any, small_base: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    model = load_model(small_base, dtype="float32")
    tensors = {}
    for name, module in model.named_modules():
        if name.endswith((".q_proj", ".v_proj")):
            key = f"base_model.model.{'_orig_mod.' if targets == 'all-linear' else ''}{name}"  # of a compiled model
            tensors[f"{key}.lora_A.weight"] = torch.ones(2, module.in_features)
            tensors[f"{key}.lora_B.weight"] = torch.ones(module.out_features, 2)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": targets, "task_type": None}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    _, census, warnings = attach_adapter(model, tmp_path, read_adapter(tmp_path))
    if isinstance(targets, str):
        assert warnings == []
        found = {"text": 1, "vision": 3, "projector": 0}
        assert census == {"self_attn.q_proj": found, "self_attn.v_proj": found}
    else:
        assert ["'w9' has no tensors" in warning for warning in warnings] == [True]
    assert adapter_census(None, {}, lfm2_vl) == ({}, [])


def test_an_adapter_in_mlx_form_is_called_that(tmp_path: Path) -> None:
    for name in ("adapter_config.json", "adapters.safetensors"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(OrionError, match=r"adapters\.safetensors is MLX's form"):
        read_adapter(tmp_path)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
READERS: list[tuple[str, Callable[[Path], Any]]] = [
    ("model.safetensors", lambda path: resolve_base(str(path.parent))),
    ("tokenizer.json", lambda path: resolve_base(str(path.parent))),
    ("config.json", lambda path: resolve_base(str(path.parent))),
    ("adapter_model.safetensors", lambda path: read_adapter(path.parent)),
    ("orion-q4_k_m.gguf", lambda path: quantize.check_pair(path.parent)),
    ("some-Q4_K_M.gguf", lambda path: quantize.read_integers(path)),
    ("mmproj-F16.gguf", lambda path: hub.locate(str(path.parent), "GGUF pair")),
    ("train_dataset.jsonl", lambda path: read_records(path, MISSION)),
    ("train_dataset.jsonl", lambda path: hub.locate(str(path.parent), "dataset")),
    ("frame.png", lambda path: read_frame(path, 256)),
    ("frame.raw", lambda path: read_frame(path, 256)),
    ("frame.tif", lambda path: locate(path)),
    ("places.csv", lambda path: list(read_rows(path))),
    ("places.geojson", lambda path: list(read_rows(path))),
]


@pytest.mark.parametrize(("name", "read"), READERS)
def test_a_git_lfs_pointer_is_called_one(name: str, read: Callable[[Path], Any], tmp_path: Path) -> None:
    if name.endswith(".tif"):
        pytest.importorskip("rasterio")
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(OrionError, match=rf"{name} is a Git LFS pointer") as refused:
        read(tmp_path / name)
    assert refused.value.fix.startswith(f"Run 'git lfs pull' in {tmp_path}")


def test_the_dataset_check_and_the_folder_name_the_pointers(tmp_path: Path) -> None:
    names = [f"{split}_dataset.jsonl" for split in ("test", "train", "val")]
    for name in names:
        (tmp_path / name).write_bytes(POINTER)
    _, findings = read_entries(tmp_path, MISSION)
    assert [finding.place for finding in findings] == [names[1], names[2], names[0]]
    assert all("is a Git LFS pointer" in finding.message for finding in findings)
    (tmp_path / "a.csv").write_bytes(POINTER)
    with pytest.raises(OrionError, match=r"a\.csv, .* and 1 more are Git LFS pointers"):
        hub.locate(str(tmp_path), "dataset")
    for name in (*names, "a.csv"):
        (tmp_path / name).write_bytes(POINTER[1:])  # a text of its own
    assert hub.locate(str(tmp_path), "dataset") == tmp_path


def test_tokenizer_files_stay_as_they_came(small_base: Path, tmp_path: Path) -> None:
    base, out = changed(small_base, tmp_path / "base", {}), tmp_path / "out"
    out.mkdir()
    path = base / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config))  # in one line, as no library writes it
    (base / "special_tokens_map.json").write_text('{"eos_token": "<|im_end|>"}')
    (base / "modeling.py").write_text("raise SystemExit")
    settings = json.loads((base / "processor_config.json").read_text())["image_processor"]
    (base / "preprocessor_config.json").write_text(json.dumps(settings | {"max_tiles": 4}))
    save_processor(load_processor(base, 256), base, out)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    assert not (out / "modeling.py").exists()
    changed_settings = json.loads((out / "preprocessor_config.json").read_text())
    assert (changed_settings["tile_size"], changed_settings["do_image_splitting"]) == (256, False)
    path.write_text(json.dumps(config | {"auto_map": {"AutoTokenizer": ["modeling.Own", None]}}))
    save_processor(load_processor(base, 256), base, out)
    assert json.loads((out / "tokenizer_config.json").read_text()) == config


FILES = ["LFM-F16.gguf", "LFM-Q4_K_M.gguf", "LFM-Q8_0.gguf", "mmproj-LFM-BF16.gguf", "mmproj-LFM-F16.gguf"]


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (FILES, ("LFM-Q4_K_M.gguf", "mmproj-LFM-F16.gguf")),
        (["m.gguf", "mmproj.gguf", "config.json"], ("m.gguf", "mmproj.gguf")),
        (["a-q4_k_m.gguf", "mmproj-a-q8_0.gguf", "old/a-q4_k_m.gguf"], ("a-q4_k_m.gguf", "mmproj-a-q8_0.gguf")),
        (["imatrix.gguf", "m-Q4_K_M.gguf", "mmproj-f32.gguf", "mmproj_f16.gguf"], ("m-Q4_K_M.gguf", "mmproj_f16.gguf")),
        (["m-Q3_K_M.gguf", "m-imatrix.gguf", "mmproj-m.gguf"], ("m-Q3_K_M.gguf", "mmproj-m.gguf")),
        (["m-Q4_K_M-00001-of-00002.gguf", "m-Q4_K_M-00002-of-00002.gguf", "mmproj.gguf"], None),
        (["m-Q4_0.gguf", "m-Q8_0.gguf", "mmproj.gguf"], None),
        (["m-Q4_K_M.gguf", "mmproj-BF16.gguf", "mmproj-Q8_0.gguf"], None),
        (["m-Q4_K_M.gguf"], None),
        (["Q4_K_M/m.gguf", "mmproj.gguf"], None),
    ],
)
def test_one_pair_is_chosen_or_the_names_are_listed(names: list[str], chosen: Any) -> None:
    if chosen:
        assert hub.pair_among(names, "x", "fix") == chosen
        return
    with pytest.raises(OrionError, match="not one Q4_K_M backbone and one mmproj") as refused:
        hub.pair_among(names, "x", "fix")
    assert all(name in refused.value.message for name in names if "/" not in name)
