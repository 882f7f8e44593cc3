"""Weights, adapters, templates and model folders of strangers: bounded, refused by name, and nothing in them runs."""

import json
import os
import pickle
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orion_triage.errors import OrionError
from orion_triage.export import fuse, quantize
from orion_triage.llama_cpp.gguf_header import read_integers
from orion_triage.models import chat_template, lfm2_vl
from orion_triage.models.adapter import attach_adapter, read_adapter
from orion_triage.models.checkpoint import check_names
from orion_triage.models.encode import render_turn
from orion_triage.models.lfm2_vl import CHAT_TEMPLATE
from orion_triage.models.load import load_model, load_processor, resolve_base, save_processor

from .hostile import DEEP, mutated, outcome, replaced, to_bytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """The file that exists when something of a stranger's ran."""
    return tmp_path / "marker"


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


# GGUF


def text(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


def gguf(*fields: bytes, count: int | None = None, version: int = 3, magic: bytes = b"GGUF") -> bytes:
    count = len(fields) if count is None else count
    return magic + struct.pack("<IQQ", version, 0, count) + b"".join(fields)


WIDTH = text(b"lfm2.embedding_length") + struct.pack("<II", 4, 192)
NAME = text(b"general.architecture") + struct.pack("<I", 8) + text(b"lfm2")
TOKENS = text(b"tokens") + struct.pack("<IIQ", 9, 8, 2) + text(b"a") + text(b"bc")
SCORES = text(b"scores") + struct.pack("<IIQ", 9, 6, 2) + bytes(8)
GOOD = gguf(NAME, TOKENS, SCORES, WIDTH)
HUGE = 2**60


@given(mutated(GOOD))
def test_a_bent_gguf_is_read_or_named(folder: Path, data: bytes) -> None:
    path = folder / "a.gguf"
    path.write_bytes(data)
    found = outcome(read_integers, path, named=path)
    if not isinstance(found, OrionError):
        assert all(isinstance(value, int) for value in found.values())


@given(st.integers(0, len(GOOD) - 1))
def test_a_cut_gguf_is_refused_at_any_byte(folder: Path, length: int) -> None:
    path = folder / "a.gguf"
    path.write_bytes(GOOD[:length])
    assert isinstance(outcome(read_integers, path, named=path), OrionError)


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1))
def test_announced_sizes_are_not_believed(folder: Path, fields: int, kind: int, inner: int, count: int) -> None:
    path = folder / "a.gguf"
    path.write_bytes(gguf(text(b"a") + struct.pack("<IIQ", kind, inner, count), count=fields))
    outcome(read_integers, path, named=path)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "the header claims 4 bytes, but 0 remain"),
        (gguf(WIDTH, magic=b"GGML"), "the first four bytes are not GGUF"),
        (gguf(WIDTH, version=1), "version is 1"),
        (gguf(WIDTH, version=3 << 24), "version is"),  # big-endian
        (gguf(WIDTH, count=HUGE), "claims 1,152,921,504,606,846,976 fields"),
        (gguf(text(b"a", HUGE)), "bytes, but"),
        (gguf(text(b"a") + struct.pack("<IIQ", 9, 0, HUGE)), "bytes, but"),  # the gguf package fills the memory
        (gguf(text(b"a") + struct.pack("<IIQ", 9, 8, HUGE)), "is an array of"),
        (gguf(text(b"a") + struct.pack("<IIQ", 9, 8, 3_000_000)), "bytes, but"),
        (gguf(text(b"a") + struct.pack("<IIQ", 9, 9, 1)), "is an array of 1 values of type 9"),  # of arrays
        (gguf(text(b"a") + struct.pack("<I", 99)), "unknown type 99"),
        (gguf(WIDTH, WIDTH), "appears twice"),
    ],
)
def test_each_of_these_ggufs_is_refused_by_name(data: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(data)
    found = outcome(read_integers, path, named=path)
    assert isinstance(found, OrionError)
    assert said in found.message


def test_a_header_reads_as_the_gguf_package_reads_it(tmp_path: Path) -> None:
    """Its own writer's, with every type of value."""
    from gguf import GGUFReader, GGUFWriter

    path = tmp_path / "a.gguf"
    writer = GGUFWriter(path, "lfm2")
    for kind in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float32", "float64"):
        getattr(writer, f"add_{kind}")(f"a.{kind}", 7)
    writer.add_bool("a.bool", True)
    writer.add_array("a.texts", ["x", "yz"])
    writer.add_array("a.numbers", [1, 2, 3])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    fields = {name: field.contents() for name, field in GGUFReader(path).fields.items() if not name.startswith("GGUF.")}
    whole = {name: value for name, value in fields.items() if type(value) is int}
    assert read_integers(path) == whole
    assert len(whole) == 8


def test_a_pair_of_strangers_is_judged_by_its_headers(tmp_path: Path) -> None:
    projector = gguf(text(b"clip.vision.projection_dim") + struct.pack("<II", 4, 192))
    backbone, mmproj = tmp_path / "a-q4_k_m.gguf", tmp_path / "mmproj-a.gguf"
    backbone.write_bytes(GOOD)
    mmproj.write_bytes(projector)
    assert quantize.find_pair(tmp_path) == (backbone, mmproj)
    mmproj.write_bytes(gguf(text(b"clip.vision.projection_dim") + struct.pack("<II", 4, 256)))
    with pytest.raises(OrionError, match=r"projects to 256 values, but a-q4_k_m\.gguf takes 192"):
        quantize.find_pair(tmp_path)
    for path in (backbone, mmproj):
        path.write_bytes(gguf(NAME))
    with pytest.raises(OrionError, match="projects to None values"):
        quantize.find_pair(tmp_path)
    mmproj.unlink()
    os.mkfifo(mmproj)
    found = outcome(quantize.find_pair, tmp_path)
    assert isinstance(found, OrionError)
    assert "is not a regular file" in found.message


@given(replaced({"files": {quantize.QUANTIZED: "0", quantize.MMPROJ: "1"}}))
def test_a_pairs_list_proves_it_or_is_named(folder: Path, value: Any) -> None:
    (folder / quantize.PAIR).write_bytes(to_bytes(value))
    found = outcome(quantize.check_pair, folder)
    (folder / quantize.PAIR).unlink()
    assert isinstance(found, OrionError)


# SafeTensors


def safetensors(header: Any, values: int = 4, length: int | None = None) -> bytes:
    data = header if isinstance(header, bytes) else to_bytes(header)
    return struct.pack("<Q", len(data) if length is None else length) + data + bytes(values)


def tensor(start: int = 0, end: int = 4, shape: Any = (2,), dtype: str = "F16") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


BENT = [
    b"",
    b"\0" * 7,
    safetensors({"a": tensor()}, length=2**63),
    safetensors({"a": tensor()}, length=2**64 - 1),
    safetensors({"a": tensor()}, length=10),
    safetensors({"a": tensor()}, values=0),
    safetensors({"a": tensor()}, values=99),
    safetensors({"a": tensor(), "b": tensor()}),  # one lies on the other
    safetensors({"a": tensor(2, 6)}, values=6),  # a gap
    safetensors({"a": tensor(0, 2**62)}),
    safetensors({"a": tensor(4, 0)}),
    safetensors({"a": tensor(shape=(2**32, 2**32))}),
    safetensors({"a": tensor(shape=(-1,))}),
    safetensors({"a": tensor(dtype="F99")}),
    safetensors(DEEP.encode()),
    safetensors(b"\xff\xfe"),
    safetensors([1]),
]


@pytest.mark.parametrize("data", BENT, ids=range(len(BENT)))
def test_a_lying_header_is_damage(data: bytes, tmp_path: Path) -> None:
    for name, read in (
        ("model.safetensors", lambda folder: check_names(folder, lfm2_vl.LANDMARKS)),
        ("adapter_model.safetensors", read_adapter),
    ):
        path = tmp_path / name
        path.write_bytes(data)
        (tmp_path / "adapter_config.json").write_text("{}")
        found = outcome(read, tmp_path, named=path)
        path.unlink()
        assert isinstance(found, OrionError)
        assert "is damaged" in found.message


@given(st.one_of(mutated(safetensors({"a": tensor()})), replaced({"a": tensor()}).map(safetensors)))
def test_a_bent_header_is_named(folder: Path, data: bytes) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(data)
    found = outcome(check_names, folder, lfm2_vl.LANDMARKS, named=folder)
    path.unlink()
    assert isinstance(found, OrionError)  # at best its tensors are not those of a base


def test_a_pickle_is_opened_under_no_name(marker: Path, tmp_path: Path) -> None:
    """As a base, as an adapter, through the index of shards."""
    bomb = pickle.dumps({"weight": Bomb(marker)})
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for place in (base, adapter):
        place.mkdir()
    (base / "config.json").write_text('{"model_type": "lfm2_vl"}')
    (base / "pytorch_model.bin").write_bytes(bomb)
    with pytest.raises(OrionError, match=r"found only pytorch_model\.bin, which can run code"):
        resolve_base(str(base))
    (base / "model.safetensors").write_bytes(bomb)
    with pytest.raises(OrionError, match=r"model\.safetensors is damaged"):
        resolve_base(str(base))
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.bin").write_bytes(bomb)
    with pytest.raises(OrionError, match=r"adapter_model\.bin can run code"):
        read_adapter(adapter)
    (adapter / "adapter_model.safetensors").write_bytes(bomb)
    with pytest.raises(OrionError, match=r"adapter_model\.safetensors is damaged"):
        read_adapter(adapter)
    assert not marker.exists()
    pickle.loads(bomb)  # the bomb is a live one
    assert marker.exists()


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "../model.safetensors", "/etc/passwd", "none.safetensors", 5, None]
)
def test_an_index_names_safetensors_of_its_folder(name: Any, small_base: Path, marker: Path, tmp_path: Path) -> None:
    base = copied(small_base, tmp_path / "base")
    (base / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Bomb(marker)}))
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"weight": name}}))
    with pytest.raises(OrionError, match=r"index\.json names .* which is not a SafeTensors file in"):
        resolve_base(str(base))
    assert not marker.exists()


def test_weights_that_are_no_file_are_refused_at_once(small_base: Path, tmp_path: Path) -> None:
    base = copied(small_base, tmp_path / "base")
    os.mkfifo(base / "more.safetensors")
    found = outcome(resolve_base, str(base))
    assert isinstance(found, OrionError)
    assert "more.safetensors is not a regular file" in found.message


# Model folders


def copied(base: Path, to: Path) -> Path:
    """A base whose texts can be changed."""
    to.mkdir()
    for path in base.iterdir():
        if path.suffix == ".safetensors":
            os.link(path, to / path.name)
        else:
            shutil.copyfile(path, to / path.name)
    return to


@pytest.mark.parametrize("data", ["", "[]", "null", DEEP, "NaN", '{"model_type": []}', '{"model_type": "llama"}', "\0"])
def test_a_config_that_is_none_is_named(data: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(data)
    assert isinstance(outcome(resolve_base, str(tmp_path), named=tmp_path / "config.json"), OrionError)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "processor_config.json"])
@pytest.mark.parametrize("data", ["", "[]", '{"a": ' * 1000, '{"added_tokens": 5}'])
def test_a_processor_that_is_none_is_named(name: str, data: str, small_base: Path, tmp_path: Path) -> None:
    base = copied(small_base, tmp_path / "base")
    (base / name).write_text(data)
    found = outcome(load_processor, base, 256)
    if isinstance(found, OrionError):
        assert str(base) in found.message
    else:  # what a file leaves out has defaults
        assert type(found).__name__ == "Lfm2VlProcessor"


def test_code_that_a_folder_brings_along_does_not_run(
    small_base: Path, marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither is anybody asked whether it may: standard input is at its end."""
    base = copied(small_base, tmp_path / "base")
    for module in ("evil", "configuration_evil", "tokenization_evil"):
        (base / f"{module}.py").write_text(f"import os\nos.mkdir({str(marker)!r})\nclass Evil: pass\n")
    automatic = {
        "AutoConfig": "configuration_evil.Evil",
        "AutoModelForImageTextToText": "evil.Evil",
        "AutoProcessor": "evil.Evil",
        "AutoImageProcessor": "evil.Evil",
        "AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"],
    }
    for name in ("config.json", "tokenizer_config.json", "processor_config.json"):
        value = json.loads((base / name).read_text())
        extra = {"tokenizer_class": "Evil", "processor_class": "Evil"} if name == "tokenizer_config.json" else {}
        (base / name).write_text(json.dumps({**value, **extra, "auto_map": automatic}))
    monkeypatch.chdir(base)
    with Path(os.devnull).open() as nothing:
        # Nobody who could be asked.
        monkeypatch.setattr("sys.stdin", nothing)
        found = outcome(load_processor, resolve_base(str(base)), 256)
        assert isinstance(found, OrionError) or type(found).__name__ == "Lfm2VlProcessor"
        model = load_model(base, dtype="float32")
    assert type(model).__module__.startswith("orion_triage.")
    assert not marker.exists()


def test_the_converter_is_told_nothing_of_a_folders_code(small_base: Path, tmp_path: Path) -> None:
    """For some architectures llama.cpp's converter runs what auto_map names."""
    base, out = copied(small_base, tmp_path / "base"), tmp_path / "out"
    out.mkdir()
    config = json.loads((base / "config.json").read_text())
    config |= {"architectures": ["ChatGLMModel"], "auto_map": {"AutoConfig": "evil.Evil"}}
    config["text_config"] |= {"architectures": ["ChatGLMModel"], "auto_map": {"AutoConfig": "evil.Evil"}}
    (base / "config.json").write_text(json.dumps(config))
    fuse._write_config(base, "float16", out)
    written = (out / "config.json").read_text()
    assert "auto_map" not in written
    assert "ChatGLM" not in written
    path = base / "tokenizer_config.json"
    own = json.loads(path.read_text()) | {"a": "\u00e9"}
    path.write_text(json.dumps(own | {"auto_map": {"AutoTokenizer": ["evil/x--evil.Evil", None]}}))
    save_processor(load_processor(small_base, 256), base, out)
    assert json.loads((out / "tokenizer_config.json").read_text()) == own
    assert json.loads(written)["architectures"] == ["Lfm2VlForConditionalGeneration"]
    assert json.loads(written)["text_config"]["architectures"] == ["Lfm2ForCausalLM"]


# Chat templates

ESCAPES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.mkdir('MARKER') }}",
    "{{ lipsum.__globals__['os'].mkdir('MARKER') }}",
    "{{ ''['__cla' ~ 'ss__'] }}{{ (''|attr('__cla' ~ 'ss__')).mro() }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "{% import 'os' as os %}{{ os.mkdir('MARKER') }}",
    "{% include '/etc/passwd' %}",
    "{{ 1 / 0 }}",
    "{{ raise_exception('no') }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ 'x' * 10 ** 12 }}",  # more memory than there is
    "{{ 'x' * 2000000 }}",  # a turn longer than any
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",  # hours
    "{#" + "x" * 200_000 + "#}",
)


# Each takes a process with transformers in it. The suite has one of each kind, and those that the limits stop.
TRIED = ESCAPES if os.environ.get("HYPOTHESIS_PROFILE") == "torture" else (ESCAPES[1], ESCAPES[4], *ESCAPES[9:])


@pytest.mark.parametrize("template", TRIED)
def test_a_template_that_is_more_than_a_form_is_refused(
    template: str, marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A limit that is reached sooner.
    monkeypatch.setattr(chat_template, "LIMIT_SECONDS", 3)
    found = outcome(chat_template.check, template.replace("MARKER", str(marker)), str(tmp_path), named=tmp_path)
    assert isinstance(found, OrionError)
    assert "the chat template" in found.message
    assert not marker.exists()


def test_templates_that_render_are_taken() -> None:
    chat_template.check(CHAT_TEMPLATE, "the shipped base")
    chat_template.check(CHAT_TEMPLATE + "{# another's #}", "another base")
    chat_template.check("{% generation %}{{ strftime_now('%Y') }}{{ messages | tojson }}{% endgeneration %}", "a third")


def test_a_base_with_such_a_template_is_not_loaded(small_base: Path, marker: Path, tmp_path: Path) -> None:
    base = copied(small_base, tmp_path / "base")
    (base / "chat_template.jinja").write_text(ESCAPES[3].replace("MARKER", str(marker)))
    found = outcome(load_processor, base, 256, named=base)
    assert isinstance(found, OrionError)
    assert "SecurityError" in found.message
    assert not marker.exists()


def test_a_template_that_waits_for_its_prompt_is_an_error_too(small_base: Path, tmp_path: Path) -> None:
    """One that renders in the trial, and not what it is given later."""
    base = copied(small_base, tmp_path / "base")
    (base / "chat_template.jinja").write_text("{{ 1 / (messages[0]['content'][1]['text'] | length - 9) }}")
    processor = load_processor(base, 256)
    found = outcome(render_turn, processor, "<image>\n12345678")
    assert isinstance(found, OrionError)
    assert "ZeroDivisionError" in found.message


# Adapters

PLAIN = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
MODULE = "base_model.model.model.language_model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def model(small_base: Path) -> Any:
    return load_model(small_base, dtype="float32")


def written(folder: Path, tensors: dict[str, Any], config: Any) -> Path:
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    save_file({key: value.clone() for key, value in tensors.items()}, folder / "adapter_model.safetensors")
    data = config if isinstance(config, bytes) else to_bytes(config)
    (folder / "adapter_config.json").write_bytes(data)
    return folder


def matrices(model: Any, rank: int = 2) -> dict[str, Any]:
    import torch

    layer = model.get_submodule(MODULE.removeprefix("base_model.model."))
    return {
        f"{MODULE}.lora_A.weight": torch.ones(rank, layer.in_features),
        f"{MODULE}.lora_B.weight": torch.ones(layer.out_features, rank),
    }


def attached(model: Any, folder: Path) -> Any:
    return attach_adapter(model, folder, read_adapter(folder))


def changed(part: str, change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda tensors: {key: change(value) if part in key else value for key, value in tensors.items()}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (changed("lora_A", lambda t: t * float("nan")), "not finite"),
        (changed("lora_B", lambda t: t / 0), "not finite"),
        (changed("lora_A", lambda t: t.int()), "not a matrix of floats"),
        (changed("lora_A", lambda t: t.bool()), "not a matrix of floats"),
        (changed("lora_A", lambda t: t.sum()), r"shape \(\), not a matrix"),
        (changed("lora_A", lambda t: t[None]), "not a matrix of floats"),
        (changed("lora_A", lambda t: t[:0].contiguous()), "not a matrix of floats"),
        (changed("lora_A", lambda t: t[:, :-1].contiguous()), r"has shape \(2, \d+\); the base's module needs"),
        (changed("lora_B", lambda t: t.T.contiguous()), "the base's module needs"),
        (changed("lora_A", lambda t: t[:1].contiguous()), "the base's module needs"),
        (
            lambda tensors: tensors | {"base_model.model.lm_head.weight": tensors[f"{MODULE}.lora_A.weight"]},
            "is not a LoRA matrix",
        ),
        (lambda tensors: tensors | {"x.lora_A.weight": tensors[f"{MODULE}.lora_A.weight"]}, "matches no module"),
        (lambda tensors: tensors | {".lora_A.weight": tensors[f"{MODULE}.lora_A.weight"]}, "matches no module"),
        (
            lambda tensors: (
                tensors
                | {f"{MODULE}.lora_A.weight".removeprefix("base_model.model."): tensors[f"{MODULE}.lora_A.weight"]}
            ),
            "two tensors for",
        ),
        (lambda tensors: {key: value for key, value in tensors.items() if "lora_A" in key}, "has no counterpart"),
        (lambda tensors: {}, "has no tensors"),
    ],
)
def test_each_of_these_adapters_is_refused(model: Any, change: Any, said: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "adapter", change(matrices(model)), PLAIN)
    found = outcome(attached, model, folder)
    assert isinstance(found, OrionError)
    assert re.search(said, found.message)


@pytest.mark.parametrize(
    "change",
    [
        {"megatron_config": {"a": 1}, "megatron_core": "evil"},  # PEFT imports the module of that name
        {"init_lora_weights": "pissa"},  # changes the base as well
        {"use_dora": True},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"layer_replication": [[0, 2], [0, 2]]},
        {"trainable_token_indices": [1]},
        {"alpha_pattern": {"(a+)+$": 5}},  # a pattern that takes years
        {"alpha_pattern": {"q_proj": float("nan")}},
        {"alpha_pattern": ["q_proj"]},
        {"rank_pattern": 5},
        {"r": 10**9},
        {"r": True},
        {"r": -1},
        {"r": 2.0},
        {"r": None},
        {"lora_alpha": float("inf")},
        {"lora_alpha": "4"},
        {"lora_alpha": 1e300},
        {"target_modules": {"q_proj": 1}},
        {"target_modules": ["q_proj", 5]},
        {"peft_type": "IA3"},
        {"peft_type": None},
        {"task_type": "SEQ_CLS"},
        {"use_rslora": "yes"},
        {"fan_in_fan_out": True},
        {"something_new": {"code": "x"}},
    ],
)
def test_options_beyond_plain_lora_are_refused(
    model: Any, change: dict[str, Any], marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    monkeypatch.syspath_prepend(tmp_path)
    folder = written(tmp_path / "adapter", matrices(model), PLAIN | change)
    found = outcome(attached, model, folder)
    assert isinstance(found, OrionError)
    assert "adapter_config.json" in found.message or "the base's module needs" in found.message
    assert not marker.exists()


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"null", DEEP.encode(), b"\xff", b'{"r": 1, "r": 2}', b'{"r": 1e999}', b"{}"]
)
def test_an_adapters_settings_that_are_none_are_named(model: Any, data: bytes, tmp_path: Path) -> None:
    folder = written(tmp_path / "adapter", matrices(model), data)
    assert isinstance(outcome(attached, model, folder, named=folder / "adapter_config.json"), OrionError)


@given(replaced(PLAIN))
def test_settings_of_any_form_are_plain_or_named(model: Any, folder: Path, value: Any) -> None:
    from orion_triage.models.adapter import _read_config

    (folder / "adapter_config.json").write_bytes(to_bytes(value))
    found = outcome(_read_config, folder, named=folder / "adapter_config.json")
    if not isinstance(found, OrionError):
        assert found.rank > 0


def test_a_plain_adapter_does_what_its_matrices_say(small_base: Path, tmp_path: Path) -> None:
    """alpha / r times B A, by its own pattern where it has one; 1/sqrt(r) under use_rslora; ranks may differ."""
    for settings, rank, factor in (
        ({}, 2, 2.0),
        ({"use_rslora": True}, 2, 4 / 2**0.5),
        ({"alpha_pattern": {"q_proj": 8}}, 2, 4.0),
        ({"rank_pattern": {"q_proj": 3}}, 3, 4 / 3),
        ({"lora_dropout": 0.1, "revision": "x", "peft_version": "0.1", "runtime_config": {"a": 1}}, 2, 2.0),
    ):
        base = load_model(small_base, dtype="float32")
        folder = written(tmp_path / "adapter", matrices(base, rank), PLAIN | settings)
        adapted, census, warnings = attached(base, folder)
        delta = adapted.get_submodule(MODULE).get_delta_weight("default")
        assert delta.unique().tolist() == pytest.approx([factor * rank])
        assert census["q_proj"] == {"text": 1, "vision": 0, "projector": 0}
        assert warnings == []
