"""STAGE quantize: merged model -> F16 GGUF, F16 mmproj and the pair that flies, checked against the merged model.

The settings choose the pair's types. Each file is named after its type, and pair.json lists the files.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orion_triage.dataset.dataset import Dataset
from orion_triage.errors import OrionError
from orion_triage.export import calibrate
from orion_triage.export.calibrate import HEAD, TOKEN_EMBEDDING
from orion_triage.export.convert import convert, matrices
from orion_triage.hub import pair_among
from orion_triage.llama_cpp.client import Client
from orion_triage.llama_cpp.gguf_header import read_integers
from orion_triage.llama_cpp.server import Server
from orion_triage.llama_cpp.toolchain import find_toolchain
from orion_triage.llama_cpp.tools import quantize_file
from orion_triage.mission.prompt import IMAGE
from orion_triage.models.family import Family, family_in, width_of
from orion_triage.models.load import fingerprint
from orion_triage.progress import Progress, silent
from orion_triage.safe.files import replaced_folder, require_free_space, sha256_of_file, write_text
from orion_triage.safe.reading import read_object, refuse_lfs_pointers
from orion_triage.settings import BackboneType, QuantizeSettings, TowerType

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

F16, MATRIX, PAIR = "orion-f16.gguf", "orion-imatrix.gguf", "pair.json"
_STEPS = 3
# What llama-quantize makes of the matrices of a backbone: first the type of most, then those of the token embedding and
# of a few sensitive matrices (src/llama-quant.cpp). Norms, biases and short-conv kernels are not quantized.
_MATRIX_TYPES: dict[BackboneType, tuple[str, ...]] = {
    "Q4_K_M": ("Q4_K", "Q6_K"),
    "Q3_K_M": ("Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    "IQ4_XS": ("IQ4_XS", "Q5_K", "Q6_K"),
    "Q4_0": ("Q4_0", "Q4_1", "Q6_K"),
    "Q8_0": ("Q8_0",),
}
_TOWERS: tuple[TowerType, ...] = ("Q8_0", "F16")  # the first that is there flies; the steps before it need F16
_ROW_OF_Q8_0 = 32  # a matrix with rows of another multiple stays F16


def backbone_name(kind: BackboneType) -> str:
    return f"orion-{kind.lower()}.gguf"


def tower_name(kind: TowerType) -> str:
    return f"orion-mmproj-{kind.lower()}.gguf"


_BACKBONES = {backbone_name(kind): kind for kind in _MATRIX_TYPES}
# With the default settings. Others have other names: `check_pair` returns those of a folder.
MMPROJ, QUANTIZED = tower_name("F16"), backbone_name("Q4_K_M")


@dataclass(frozen=True)
class Pair:
    """The two files of `folder` that fly."""

    folder: Path
    type: BackboneType
    tower: TowerType

    @property
    def backbone(self) -> Path:
        return self.folder / backbone_name(self.type)

    @property
    def mmproj(self) -> Path:
        return self.folder / tower_name(self.tower)

    @property
    def names(self) -> tuple[str, str]:
        return self.backbone.name, self.mmproj.name


def run(
    merged: Path,
    out_folder: Path,
    settings: QuantizeSettings,
    *,
    user_texts: Sequence[str],
    training: tuple[Dataset, int] | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write the GGUF files and `pair.json` into `out_folder`; returns sizes, tensor types and the build.

    `training` is the dataset that the model was trained on and the size of its frames, for `settings.calibrate`.
    Raises OrionError if a tool fails, if a file has unexpected content, or if llama.cpp splits one of `user_texts` into
    other tokens than the model's tokenizer.
    """
    family_in(merged)
    if settings.calibrate != "none" and training is None:
        raise OrionError("there are no training records to calibrate on.", "Set quantize.calibrate=none.")
    weights = sum(path.stat().st_size for path in merged.glob("*.safetensors"))
    if not weights:
        raise OrionError(f"{merged} has no *.safetensors.", "Run 'orion fuse' first.")
    require_free_space(out_folder, int(1.5 * weights) + 50_000_000, "quantizing")
    toolchain = find_toolchain(progress)
    calibration: dict[str, Any] = {}
    with replaced_folder(out_folder) as folder:
        pair = Pair(folder, settings.type, settings.tower)
        with ThreadPoolExecutor(1) as beside:  # in parallel: each converter uses one core and waits for the disk
            towers = {
                name: beside.submit(convert, toolchain, merged, folder / name, mmproj=True, outtype=outtype)
                for name, outtype in {MMPROJ: "f16", pair.mmproj.name: settings.tower.lower()}.items()
            }
            progress("converting", 0, _STEPS)
            uses = {"convert": convert(toolchain, merged, folder / F16, mmproj=False)}
            matrix = folder / MATRIX if settings.calibrate != "none" else None
            if matrix and training:
                measured = calibrate.run(merged, folder / F16, training[0], matrix, training[1], progress)
                calibration = {"calibration": {**measured, "sha256": sha256_of_file(matrix)}}
            progress("quantizing", 1, _STEPS)
            quantized = quantize_file(toolchain, folder / F16, pair.backbone, settings.type, matrix)
            uses["convert mmproj"] = towers[pair.mmproj.name].result()
            uses["quantize"] = quantized
            names = (F16, *towers, pair.backbone.name)
        progress("checking", 2, _STEPS)
        types = {name: check_file(folder / name, merged) for name in names}
        log = out_folder.parent / "logs" / "quantize-server.log"
        with Server(toolchain, pair.backbone, None, log=log) as server:
            compared = check_tokenization(server.client, merged, user_texts)
        record = {
            "merged_sha256": fingerprint(merged),
            "llama_cpp_build": toolchain.build,
            "files": {name: sha256_of_file(folder / name) for name in names},
            **calibration,
        }
        write_text(folder / PAIR, json.dumps(record, indent=2) + "\n")
        sizes = {name: (folder / name).stat().st_size for name in names}
        progress("checking", _STEPS, _STEPS)
    return calibration | {
        "bytes": sizes,
        "tools": {name: asdict(use) for name, use in uses.items()},
        "tensor_types": types,
        "prompts_tokenized_alike": compared,
        "llama_cpp_build": toolchain.build,
        "llama_cpp_origin": toolchain.origin,
    }


def check_file(path: Path, merged: Path) -> dict[str, int]:
    """Count the tensor types of a GGUF file; raises OrionError if its content does not match its name."""
    from gguf import GGUFReader, LlamaFileType

    family, reader = family_in(merged), GGUFReader(path)
    is_tower = path.name in map(tower_name, _TOWERS)
    architecture = _value(reader, "general.architecture")
    expected = ("clip",) if is_tower else family.GGUF_ARCHITECTURES
    if architecture not in expected:
        raise OrionError(
            f"{path.name} has architecture {architecture!r}, not {' or '.join(map(repr, expected))}.", "Quantize again."
        )
    kind = path.name.removeprefix("orion-").removeprefix("mmproj-").removesuffix(".gguf").upper()
    if _value(reader, "general.file_type") != LlamaFileType[f"MOSTLY_{kind}"]:
        raise OrionError(f"{path.name} does not say that it is {kind}.", "Quantize again.")
    if not is_tower and _value(reader, "tokenizer.chat_template") != (merged / "chat_template.jinja").read_text(
        "utf-8"
    ):
        raise OrionError(f"{path.name} does not have the model's chat template.", "Fuse and quantize again.")
    for tensor, allowed in _plan(path.name, reader, family):
        if tensor.tensor_type.name not in allowed:
            raise OrionError(
                f"{path.name}: {tensor.name} is {tensor.tensor_type.name}, not one of {sorted(allowed)}.",
                "Use a base with rows that are multiples of 256, which K-quants need.",
            )
    return dict(sorted(Counter(tensor.tensor_type.name for tensor in reader.tensors).items()))


def _plan(name: str, reader: "GGUFReader", family: Family) -> "Iterator[tuple[ReaderTensor, tuple[str, ...]]]":
    """The matrices of a file of this name, each with the types that it may have."""
    if kind := _BACKBONES.get(name):
        for tensor in matrices(reader, family):
            # Only embedding, head, attention and the last matrix of a feed-forward have better types than the rest.
            is_better = tensor.name in (TOKEN_EMBEDDING, HEAD) or any(p in tensor.name for p in ("ffn_down", "attn_"))
            yield tensor, _MATRIX_TYPES[kind] if is_better else _MATRIX_TYPES[kind][:1]
    elif name == tower_name("Q8_0"):
        for tensor in reader.tensors:
            if ".blk." in tensor.name and len(tensor.shape) == 2:
                yield tensor, ("F16",) if int(tensor.shape[0]) % _ROW_OF_Q8_0 else ("Q8_0",)
    elif name == F16:
        yield from ((tensor, ("F16",)) for tensor in matrices(reader, family))


def _value(reader: "GGUFReader", key: str) -> Any:
    field = reader.get_field(key)
    return field.contents() if field else None


def check_tokenization(client: Client, merged: Path, user_texts: Sequence[str]) -> int:
    """Compare the tokens of every user's text between llama.cpp and transformers; returns their number.

    Raises OrionError at the first difference.
    """
    from transformers import AutoTokenizer

    family = family_in(merged)
    tokenizer = AutoTokenizer.from_pretrained(merged, trust_remote_code=False)
    for user_text in user_texts:
        text = f"{family.TURN.before}{user_text.replace(IMAGE, '')}{family.TURN.after}"
        theirs, ours = client.tokenize(text), tokenizer(text, add_special_tokens=False)["input_ids"]
        if theirs != ours:
            place = next((i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), 0)
            pieces = [tokenizer.decode(tokens[place : place + 3]) for tokens in (theirs, ours)]
            raise OrionError(
                f"llama.cpp splits a prompt differently from token {place} on: {pieces[0]!r} instead of "
                f"{pieces[1]!r}. The tokenizer is not that of {family.NAME}.",
                f"Do not deploy this pair; use a base of the {family.NAME} family.",
            )
    return len(user_texts)


def find_pair(folder: Path) -> tuple[Path, Path]:
    """(backbone, mmproj) of a folder: made by this project and checked by pair.json, or two third-party GGUF files.

    Without pair.json, only the widths can be compared: the projector's output must be as wide as the backbone's input.
    Raises OrionError if the files are not a pair.
    """
    if (folder / PAIR).exists():
        pair = check_pair(folder)
        return pair.backbone, pair.mmproj
    backbone, projector = pair_among(
        [path.name for path in folder.iterdir()],
        str(folder),
        "Run 'orion quantize', or pass a folder or a Hub id with the two files.",
    )
    width, projected = (
        width_of(folder / backbone),
        read_integers(folder / projector).get("clip.vision.projection_dim"),
    )
    if width is None or width != projected:
        raise OrionError(
            f"{projector} projects to {projected} values, but {backbone} takes {width}.",
            "Use a backbone and an mmproj of the same model.",
        )
    return folder / backbone, folder / projector


def check_pair(folder: Path) -> Pair:
    """The pair that pair.json names; raises OrionError unless both are the unchanged files of one conversion."""
    path = folder / PAIR
    if folder.is_dir():
        refuse_lfs_pointers(folder)
    try:
        files = read_object(path).get("files")
    except FileNotFoundError:
        raise OrionError(f"{path} does not exist.", "Run 'orion quantize' first.") from None
    if not isinstance(files, dict):
        raise OrionError(f"{path} is damaged: it lists no files.", "Run 'orion quantize' again.")
    backbones = [kind for name, kind in _BACKBONES.items() if name in files]
    towers = [kind for kind in _TOWERS if tower_name(kind) in files]
    if len(backbones) != 1 or not towers:
        raise OrionError(f"{path} is damaged: it lists no pair.", "Run 'orion quantize' again.")
    pair = Pair(folder, backbones[0], towers[0])
    for name in pair.names:
        if not (folder / name).is_file():  # reading a pipe would never end
            raise OrionError(f"{folder / name} does not exist.", "Run 'orion quantize' again.")
        if sha256_of_file(folder / name) != files.get(name):
            raise OrionError(
                f"{folder / name} is not the file of this conversion: it was changed, or it belongs to another run.",
                "Run 'orion quantize' again.",
            )
    return pair
