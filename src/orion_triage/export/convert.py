"""Convert a Hugging Face folder to GGUF with llama.cpp's converter."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from orion_triage.errors import OrionError
from orion_triage.llama_cpp.toolchain import Toolchain
from orion_triage.llama_cpp.tools import ToolUse, run_tool
from orion_triage.models.family import Family, family_in

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

# Runs in the converter's process. The converter does not know the fingerprint of the shipped base's vocabulary. Its
# pre-tokenizer is its family's: `convert` checks this, and quantize compares every prompt afterwards.
# NumPy's tofile ignores the result of its last flush: on a full disk, the end of a tensor would be lost without an
# error.
_LAUNCHER = """
import runpy, sys
source, pre_tokenizer, code, arguments = *sys.argv[1:4], sys.argv[4:]
sys.path[:0] = [source + "/gguf-py", source]
from conversion import base
known = base.TextModel.get_vocab_base_pre
def get_vocab_base_pre(self, tokenizer):
    try:
        return known(self, tokenizer)
    except NotImplementedError:
        return pre_tokenizer
base.TextModel.get_vocab_base_pre = get_vocab_base_pre
import numpy
from gguf.lazy import LazyNumpyTensor
def tofile(self, file):
    file.write(numpy.ascontiguousarray(LazyNumpyTensor.to_eager(self)).reshape(-1).view(numpy.uint8).data)
LazyNumpyTensor.tofile = tofile
exec(code)
sys.argv = ["convert_hf_to_gguf.py", *arguments]
runpy.run_path(source + "/convert_hf_to_gguf.py", run_name="__main__")
"""


def convert(toolchain: Toolchain, model: Path, target: Path, *, mmproj: bool, outtype: str = "f16") -> ToolUse:
    """Write the GGUF of a Hugging Face folder: the language model, or its vision part with `mmproj`.

    `outtype` is the converter's: f16, or q8_0 for a vision part of half the size. llama-quantize cannot make the q8_0
    one: the 1.6B tower has 4304 columns, which is not a multiple of 32. Raises OrionError if the conversion fails.
    """
    family = family_in(model)
    _check_pre_tokenizer(model, family)
    command = [sys.executable, "-c", _LAUNCHER, str(toolchain.source), family.PRE_TOKENIZER, family.CONVERTER_CODE]
    command.append(str(model))
    command += ["--outtype", outtype, "--outfile", str(target), *(["--mmproj"] if mmproj else [])]
    return run_tool(command, target, "llama.cpp's converter")


def matrices(reader: "GGUFReader", family: Family) -> "list[ReaderTensor]":
    """The tensors of a backbone that llama-quantize quantizes; norms, biases and short-conv kernels stay as they are.

    `reader` is a `gguf.GGUFReader`; the first number of a tensor's `shape` is the width of a row.
    """
    return [
        tensor
        for tensor in reader.tensors
        if len(tensor.shape) == 2 and not any(part in tensor.name for part in family.GGUF_NOT_MATRICES)
    ]


def _check_pre_tokenizer(model: Path, family: Family) -> None:
    """Raise OrionError unless the tokenizer splits text like its family, as the label for the converter claims."""
    path = model / "tokenizer.json"
    try:
        tokenizer = json.loads(path.read_text(encoding="utf-8"))
        steps = tokenizer["pre_tokenizer"]["pretokenizers"]
        pattern = steps[0]["pattern"]["Regex"]
    except FileNotFoundError:
        raise OrionError(f"{path} does not exist.", "Run 'orion fuse' again, which writes it.") from None
    except (ValueError, KeyError, TypeError, IndexError):
        pattern = None
    if pattern != family.SPLIT_PATTERN:
        raise OrionError(
            f"{path} does not split text as {family.NAME} does.", f"Use a base of the {family.NAME} family."
        )
