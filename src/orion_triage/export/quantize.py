"""STAGE quantize: merged model -> F16 GGUF, F16 mmproj and Q4_K_M, checked against the merged model."""

import json
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from orion_triage.errors import OrionError
from orion_triage.export.convert import convert
from orion_triage.hub import pair_among
from orion_triage.llama_cpp.client import Client
from orion_triage.llama_cpp.gguf_header import read_integers
from orion_triage.llama_cpp.server import Server
from orion_triage.llama_cpp.toolchain import find_toolchain
from orion_triage.llama_cpp.tools import quantize_file
from orion_triage.mission.prompt import IMAGE
from orion_triage.models.family import family_in, width_of
from orion_triage.models.load import fingerprint
from orion_triage.progress import Progress, silent
from orion_triage.safe.files import replaced_folder, require_free_space, sha256_of_file, write_text
from orion_triage.safe.reading import read_object, refuse_lfs_pointers
from orion_triage.settings import QuantizeSettings

F16, MMPROJ, QUANTIZED = "orion-f16.gguf", "orion-mmproj-f16.gguf", "orion-q4_k_m.gguf"
PAIR = "pair.json"
_STEPS = 3
# Allowed in Q4_K_M: matrices as Q4_K or Q6_K; norms, biases and short-conv kernels unquantized.
_MATRIX_TYPES = {"Q4_K", "Q6_K"}


def run(
    merged: Path,
    out_folder: Path,
    settings: QuantizeSettings,
    *,
    user_texts: Sequence[str],
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write the three files and `pair.json` into `out_folder`; returns sizes, tensor types and the build.

    Raises OrionError if a tool fails, if a file has unexpected content, or if llama.cpp splits one of `user_texts` into
    other tokens than the model's tokenizer.
    """
    family_in(merged)
    weights = sum(path.stat().st_size for path in merged.glob("*.safetensors"))
    if not weights:
        raise OrionError(f"{merged} has no *.safetensors.", "Run 'orion fuse' first.")
    require_free_space(out_folder, int(1.5 * weights) + 50_000_000, "quantizing")
    toolchain = find_toolchain(progress)
    with replaced_folder(out_folder) as folder:
        with ThreadPoolExecutor(1) as beside:  # in parallel: each converter uses one core and waits for the disk
            tower = beside.submit(convert, toolchain, merged, folder / MMPROJ, mmproj=True)
            progress("converting", 0, _STEPS)
            converted = convert(toolchain, merged, folder / F16, mmproj=False)
            progress("quantizing", 1, _STEPS)
            quantized = quantize_file(toolchain, folder / F16, folder / QUANTIZED, settings.type)
            uses = {"convert": converted, "convert mmproj": tower.result(), "quantize": quantized}
        progress("checking", 2, _STEPS)
        types = {name: check_file(folder / name, merged) for name in (F16, MMPROJ, QUANTIZED)}
        log = out_folder.parent / "logs" / "quantize-server.log"
        with Server(toolchain, folder / QUANTIZED, None, log=log) as server:
            compared = check_tokenization(server.client, merged, user_texts)
        pair = {
            "merged_sha256": fingerprint(merged),
            "llama_cpp_build": toolchain.build,
            "files": {name: sha256_of_file(folder / name) for name in (F16, MMPROJ, QUANTIZED)},
        }
        write_text(folder / PAIR, json.dumps(pair, indent=2) + "\n")
        sizes = {name: (folder / name).stat().st_size for name in (F16, MMPROJ, QUANTIZED)}
        progress("checking", _STEPS, _STEPS)
    return {
        "bytes": sizes,
        "tools": {name: asdict(use) for name, use in uses.items()},
        "tensor_types": types,
        "prompts_tokenized_alike": compared,
        "llama_cpp_build": toolchain.build,
        "llama_cpp_origin": toolchain.origin,
    }


def check_file(path: Path, merged: Path) -> dict[str, int]:
    """Count the tensor types of one of the three files; raises OrionError if its content does not match its name."""
    from gguf import GGUFReader

    family, reader = family_in(merged), GGUFReader(path)
    field = reader.get_field("general.architecture")
    architecture = field.contents() if field else None
    expected = ("clip",) if path.name == MMPROJ else family.GGUF_ARCHITECTURES
    if architecture not in expected:
        raise OrionError(
            f"{path.name} has architecture {architecture!r}, not {' or '.join(map(repr, expected))}.", "Quantize again."
        )
    types = Counter(tensor.tensor_type.name for tensor in reader.tensors)
    if path.name != MMPROJ:
        template = reader.get_field("tokenizer.chat_template")
        own = (merged / "chat_template.jinja").read_text(encoding="utf-8")
        if template is None or template.contents() != own:
            raise OrionError(f"{path.name} does not have the model's chat template.", "Fuse and quantize again.")
    if path.name == QUANTIZED:
        for tensor in reader.tensors:
            is_matrix = len(tensor.shape) == 2 and not any(part in tensor.name for part in family.GGUF_NOT_MATRICES)
            if is_matrix and tensor.tensor_type.name not in _MATRIX_TYPES:
                raise OrionError(
                    f"{path.name}: {tensor.name} is {tensor.tensor_type.name}, not one of {sorted(_MATRIX_TYPES)}.",
                    "Use a base with rows that are multiples of 256, which K-quants need.",
                )
    return dict(sorted(types.items()))


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
        check_pair(folder)
        return folder / QUANTIZED, folder / MMPROJ
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


def check_pair(folder: Path) -> None:
    """Raise OrionError unless backbone and mmproj are the unchanged files of one conversion."""
    path = folder / PAIR
    if folder.is_dir():
        refuse_lfs_pointers(folder)
    try:
        files = read_object(path).get("files")
    except FileNotFoundError:
        raise OrionError(f"{path} does not exist.", "Run 'orion quantize' first.") from None
    if not isinstance(files, dict):
        raise OrionError(f"{path} is damaged: it lists no files.", "Run 'orion quantize' again.")
    for name in (QUANTIZED, MMPROJ):
        if not (folder / name).is_file():  # reading a pipe would never end
            raise OrionError(f"{folder / name} does not exist.", "Run 'orion quantize' again.")
        if sha256_of_file(folder / name) != files.get(name):
            raise OrionError(
                f"{folder / name} is not the file of this conversion: it was changed, or it belongs to another run.",
                "Run 'orion quantize' again.",
            )
