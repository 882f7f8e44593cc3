"""Find and load a base model and its processor, which neither resizes nor tiles."""

import json
import logging
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orion_triage import hub
from orion_triage.errors import OrionError
from orion_triage.models import chat_template
from orion_triage.models.checkpoint import check_names
from orion_triage.models.family import Family, family_in, family_of, read_config
from orion_triage.models.quantized import refuse_quantized
from orion_triage.runs.manifest import sha256_of_listing
from orion_triage.safe.files import sha256_of_file, write_bytes, write_text
from orion_triage.safe.reading import LARGEST_JSON_BYTES, read_bytes, read_object, refuse_lfs_pointers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import ProcessorMixin

TINY_BASE = "orion-tiny"
TINY_BASE_FOLDER = Path(__file__).parents[1] / "tiny_base" / "weights"


def resolve_base(model: str) -> Path:
    """The folder of a base model in the Hub's layout: the shipped one for "orion-tiny", a local folder, or a Hub id.

    Raises OrionError for a folder that is not such a base; see `check_base`.
    """
    if model != TINY_BASE:
        folder = hub.locate(model, "model")
    elif not (folder := TINY_BASE_FOLDER).is_dir():
        raise OrionError(f"the shipped base is missing from {folder}.", "Install the package again.")
    check_base(folder)
    return folder


def check_base(folder: Path) -> None:
    """Raise OrionError unless the folder is a checkpoint of a known family with unquantized SafeTensors weights.

    The tensors must have the published names. Only configuration and headers are read.
    """
    refuse_lfs_pointers(folder)
    family = check_config(folder)
    if not list(folder.glob("*.safetensors")):
        pickles = [path.name for path in (*folder.glob("*.bin"), *folder.glob("*.pt"))]
        found = f"only {', '.join(pickles)}, which can run code when opened" if pickles else "none"
        raise OrionError(f"{folder} needs weights as *.safetensors; found {found}.", "Fetch the SafeTensors file.")
    check_names(folder, family.LANDMARKS)


def check_config(folder: Path) -> Family:
    """The family of config.json; raises OrionError if it is unknown, differs from its family, or is quantized."""
    config = read_config(folder)
    family = family_of(config, folder / "config.json")
    refuse_quantized(folder, config)
    family.check(folder / "config.json", config)
    return family


def base_name(folder: Path) -> str:
    """A name of the base that is valid on other machines, for adapter_config.json and the report."""
    if folder.resolve() == TINY_BASE_FOLDER.resolve():
        return TINY_BASE
    return hub.id_of(folder) or folder.resolve().name


def fingerprint(folder: Path) -> str:
    """sha256 of `model.safetensors`, or of the listing of all shards if there are several."""
    shards = sorted(folder.glob("*.safetensors"))
    if len(shards) == 1:
        return sha256_of_file(shards[0])
    return sha256_of_listing({shard.name: sha256_of_file(shard) for shard in shards})


def load_processor(folder: Path, frame_size: int) -> "ProcessorMixin":
    """The folder's processor, set to frames of exactly `frame_size` x `frame_size` pixels.

    One tile, no resizing, no padding. Raises OrionError for an unusable processor.
    """
    hush_kernel_advice()
    import transformers

    config = read_config(folder)
    family = family_of(config, folder / "config.json")
    try:
        # The default of trust_remote_code asks on the terminal whether the folder's code may run.
        kind = getattr(transformers, family.PROCESSOR)
        processor = kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises a bare Exception; a wrong type in these files raises TypeError
        raise OrionError(f"{folder} has no usable processor: {error}.", "Fetch the model again.") from error
    if not processor.chat_template:
        raise OrionError(f"{folder} has no chat template.", "Copy chat_template.jinja from the base model.")
    if not isinstance(processor.chat_template, str):
        raise OrionError(
            f"{folder} has several chat templates instead of one.", "Copy chat_template.jinja from the base model."
        )
    if processor.chat_template != family.CHAT_TEMPLATE:
        chat_template.check(processor.chat_template, str(folder))
    family.set_frame_size(processor, config, frame_size)
    return processor


# A base's own files, which its saved processor replaces by others in the words of the transformers that runs here.
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja",
)  # fmt: skip
_NEEDED = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")  # written if the base has none


def save_processor(processor: "ProcessorMixin", base: Path, folder: Path) -> None:
    """Write the settings of the processor and the base's tokenizer files, unchanged, into `folder`.

    transformers 5 writes "tokenizer_class": "TokenizersBackend" for any tokenizer, which version 4 cannot load. The
    image settings do change: one frame of the run's size, not split. References to remote code are removed.
    """
    processor.save_pretrained(folder)
    if (base / "preprocessor_config.json").is_file():  # where version 4 looks for the image settings
        processor.image_processor.save_pretrained(folder)
    for name in _TOKENIZER_FILES:
        if (base / name).is_file():
            write_bytes(folder / name, read_bytes(base / name, LARGEST_JSON_BYTES))
        elif name not in _NEEDED:
            (folder / name).unlink(missing_ok=True)
    drop_code_names(folder)


def drop_code_names(folder: Path) -> None:
    """Remove references to remote code, so that users of this folder are not asked to run it."""
    for path in folder.glob("*_config.json"):
        value = read_object(path)
        if value.pop("auto_map", None) is not None:
            write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def tokenizer_of(folder: Path) -> "Callable[[str], list[int]]":
    """Text -> token ids of a checkpoint, without special tokens of its own; fast, because it imports no model."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # tokenizers raises a bare Exception
        raise OrionError(f"{folder / 'tokenizer.json'} cannot be read: {error}.", "Fetch the model again.") from None
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)


def load_model(folder: Path, *, dtype: str, four_bit: bool = False, device: str = "cpu") -> Any:
    """The model in evaluation mode on `device`; `dtype` is "float16", "bfloat16", "float32", or "auto" (as stored).

    With "auto", a CPU maps the file into memory instead of copying it.

    With `four_bit`, the language model's linear layers are NF4 with double quantization and compute in `dtype`;
    tower, projector and head stay in `dtype`. Raises OrionError if weights are missing or unexpected, or if the model
    has a head of its own where its family has the token embedding.
    """
    hush_kernel_advice()
    import torch
    from transformers import BitsAndBytesConfig, GenerationConfig

    family = family_in(folder)
    torch_dtype: torch.dtype | str = dtype if dtype == "auto" else getattr(torch, dtype)
    quantization = None
    if four_bit:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch_dtype,
            llm_int8_skip_modules=family.KEPT_IN_16_BIT,
        )
    with no_progress_bars():
        kind: Any = family.model_class()
        model, loading = kind.from_pretrained(
            folder,
            dtype=torch_dtype,
            quantization_config=quantization,
            device_map={"": device},
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(str(name) for name in loading.get(kind, ())):
            raise OrionError(
                f"{folder}: the weights do not match config.json: {len(names)} {kind.replace('_', ' ')}, "
                f"for example {names[0]}.",
                "Fetch the checkpoint again.",
            )
    if family.has_tied_head(read_config(folder)) and not _has_tied_head(model):
        raise OrionError(
            f"{folder}: lm_head.weight is not the token embedding, which is the head of {family.NAME}; the merged "
            "model and llama.cpp's file would have the wrong one.",
            "Use a base with tie_word_embeddings=true and without an lm_head.weight of its own.",
        )
    own = model.generation_config  # its sampling settings would change greedy answers
    model.generation_config = GenerationConfig(
        bos_token_id=own.bos_token_id,
        eos_token_id=own.eos_token_id,
        pad_token_id=own.pad_token_id,
        do_sample=False,
    )
    if device == "cpu":
        _keep_gradients_on_cpu(model)
    return model.eval()


def _has_tied_head(model: Any) -> bool:
    head, embedding = (module.weight for module in (model.get_output_embeddings(), model.get_input_embeddings()))
    return bool(head is embedding or head.data_ptr() == embedding.data_ptr())


@contextmanager
def float32_compute(model: Any) -> "Iterator[None]":
    """Compute in float32 with weights stored in 16 bits: the weights of a block are float32 only while it runs.

    The results are bit-identical to those of the model loaded in float32, with half the memory. Only one layer, or
    the token embedding (0.5 GB at 1.6B), is in float32 at a time.
    """
    import torch

    narrow: dict[int, torch.Tensor] = {}

    def widen(block: Any, inputs: Any) -> None:
        for parameter in block.parameters():
            if parameter.dtype in (torch.float16, torch.bfloat16):
                narrow[id(parameter)] = parameter.data
                parameter.data = parameter.data.float()

    def restore(block: Any, inputs: Any, output: Any) -> None:
        for parameter in block.parameters():
            if id(parameter) in narrow:
                parameter.data = narrow.pop(id(parameter))

    hooks = []
    for block in _blocks(model):
        hooks.append(block.register_forward_pre_hook(widen))
        hooks.append(block.register_forward_hook(restore, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _blocks(model: Any) -> "Iterator[Any]":
    """The layers, and every module with parameters outside them; not split, as some read a child's weight directly."""
    from torch import nn

    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        elif any(isinstance(inner, nn.ModuleList) for inner in child.modules()):
            yield from _blocks(child)
        elif next(child.parameters(), None) is not None:
            yield child


def _keep_gradients_on_cpu(model: Any) -> None:
    """Prevent bitsandbytes from packing 4-bit weights for its inference kernel.

    On CPUs with AVX512-BF16, the first forward pass in evaluation mode (the preflight, or an epoch's validation)
    packs a Linear4bit permanently for a kernel without a backward pass. After that, no gradient passes the layer.
    There is only one warning, and the loss still falls (bitsandbytes 0.50, Linear4bit.forward).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def expand_four_bit(model: Any) -> Any:
    """Store the same NF4 values as floats: a CPU has no 4-bit arithmetic and would expand them in every pass.

    Takes eight times the memory of the language model's 4-bit layers, and 12 % less time per step at the shipped
    base's size (5 % of 'make run'). Losses are bit-identical.
    """
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it logs the type that it expands to
    try:
        return model.dequantize()
    finally:
        logging.set_verbosity(verbosity)


def hush_kernel_advice() -> None:
    """Suppress two log messages that recommend packages which fetch or build kernels; all others are still logged.

    Call it before the first import of transformers' models: bitsandbytes logs during its import.
    """
    advice = {
        "transformers.integrations.hub_kernels": "causal_conv1d",
        "bitsandbytes.backends.cpu.ops": "kernels-community",
    }
    for name, word in advice.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, _Without) for known in logger.filters):
            logger.addFilter(_Without(word))


class _Without(logging.Filter):
    def __init__(self, word: str) -> None:
        super().__init__()
        self.word = word

    def filter(self, record: logging.LogRecord) -> bool:
        return self.word not in record.getMessage()


@contextmanager
def no_progress_bars() -> "Iterator[None]":
    """Turn off transformers' progress bars for loading and saving; progress goes through orion_triage.progress."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
