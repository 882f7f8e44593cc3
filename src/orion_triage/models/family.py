"""The families of models that can be a base, and what the rest of the project asks of each.

A family is a module that has the names of `Family`. Everything that depends on it is there: module and tensor names,
tokens and the chat turn, image tokens of a frame, what llama.cpp calls it. To add one, write such a module and name it
in `FAMILIES`; mypy lists what it lacks. docs/architecture.md has the checklist and the tests.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from orion_triage.errors import OrionError
from orion_triage.llama_cpp.client import Turn
from orion_triage.llama_cpp.gguf_header import read_integers
from orion_triage.models import internvl, lfm2_vl
from orion_triage.safe.reading import read_object, shown

if TYPE_CHECKING:
    from transformers import ProcessorMixin


class Family(Protocol):
    """What a family's module has. Lengths are in pixels; module names are those of the transformers in use."""

    NAME: str  # in messages
    MODEL_TYPE: str  # of config.json
    PROCESSOR: str  # the name of transformers' class
    CARD_TAG: str  # of the model card
    LOADING: str  # the model card's sentence on loading the merged model

    # Modules.
    TOWERS: dict[str, str]  # a component of a module's name -> "text", "vision" or "projector"
    TARGETS: dict[str, tuple[str, ...]]  # a target name that has another meaning than itself -> the module name's ends
    LANGUAGE_LAYERS: tuple[str, ...]  # what the scope "language-all" adds to the targets
    KEPT_IN_16_BIT: list[str]  # starts of the names of modules that are not quantized to 4 bits
    PATCH_EMBEDDING: str  # component of the name of the module that reads pixels

    # The turn. `TURN` and the template give the same text; `orion rehearse` and the tests compare them.
    TURN: Turn
    END_OF_TURN: str  # the token after an answer
    CHAT_TEMPLATE: str  # one that need not be checked, because it is known; "": none
    AFTER_IMAGE: str  # what the chat template itself writes after an image

    # Image input.
    VISION_KEYS: tuple[str, ...]  # the keys of the processor's batch that the vision tower takes
    TAKES_ANY_FRAME_SIZE: bool  # False: only that of config.json

    # Files.
    LANDMARKS: tuple[tuple[str, ...], ...]  # one tensor of each part, by each of its names in published checkpoints
    SPLIT_PATTERN: str  # the tokenizer's, which llama.cpp's pre-tokenizer PRE_TOKENIZER implements
    PRE_TOKENIZER: str
    GGUF_ARCHITECTURES: tuple[str, ...]  # of the backbone
    GGUF_NOT_MATRICES: tuple[str, ...]  # parts of the names of tensors of two dimensions that K-quants leave out
    CONVERTER_CODE: str  # Python that runs in the converter's process before it, or ""

    def check(self, path: Path, config: dict[str, Any]) -> None:
        """Raise OrionError if the model differs from the family in more than its sizes; `path` is config.json."""

    def set_frame_size(self, processor: "ProcessorMixin", config: dict[str, Any], frame_size: int) -> None:
        """Let the processor take square frames of exactly this size: one tile, no resizing, no padding.

        Raises OrionError for a size that the model cannot take.
        """

    def model_class(self) -> type:
        """transformers' class of the whole model with `models.shared_image.SharedImages`, under the published name."""

    def kernels(self, on_gpu: bool) -> dict[str, str]:
        """{kind of layer: what computes it} of layers that have an own kernel on a GPU, for the training's figures."""

    def plain_name(self, name: str) -> str:
        """One name for a module or tensor, whichever of its names is given."""

    def file_name(self, name: str) -> str:
        """The name that a parameter has in files for llama.cpp's converter, from its name in a base or in a module."""

    def has_tied_head(self, config: dict[str, Any]) -> bool:
        """Whether lm_head is the token embedding, so that files do not contain it."""

    def name_architectures(self, config: dict[str, Any]) -> None:
        """Write the architectures that llama.cpp's converter knows into a config.json."""


FAMILIES: tuple[Family, ...] = (lfm2_vl, internvl)
DEFAULT: Family = lfm2_vl  # for a server or file that does not say of which family its model is
# Known, but not to the pinned llama.cpp: (name, first build whose converter and tools know it).
_TOO_NEW = {"lfm3_vl": ("LFM3-VL", "b12088")}


def family_of(config: Mapping[str, Any], path: Path) -> Family:
    """The family of a config.json; `path` is the file that an error names. Raises OrionError for an unknown one."""
    model_type = config.get("model_type")
    for family in FAMILIES:
        if model_type == family.MODEL_TYPE:
            return family
    known = " or ".join(repr(family.MODEL_TYPE) for family in FAMILIES)
    use = f"Use an {' or '.join(family.NAME for family in FAMILIES)} model as base.model."
    if isinstance(model_type, str) and model_type in _TOO_NEW:
        name, build = _TOO_NEW[model_type]
        raise OrionError(
            f"{path}: model_type is {model_type!r}. {name} needs llama.cpp {build} or newer for its GGUF pair, which "
            "this version of orion-triage does not use.",
            use,
        )
    raise OrionError(f"{path}: model_type is {shown(model_type)}, not {known}.", use)


def family_in(folder: Path) -> Family:
    """The family of the checkpoint in a folder; raises OrionError without a config.json of a known one."""
    return family_of(read_config(folder), folder / "config.json")


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json; raises OrionError if it is missing or damaged."""
    try:
        return read_object(folder / "config.json")
    except FileNotFoundError:
        raise OrionError(
            f"{folder} has no config.json.", "Set base.model to a model folder in the Hub's layout."
        ) from None


def family_of_model(model: Any) -> Family:
    """The family of a loaded model, also with an adapter."""
    return next(family for family in FAMILIES if model.config.model_type == family.MODEL_TYPE)


def family_of_processor(processor: "ProcessorMixin") -> Family:
    return next(family for family in FAMILIES if type(processor).__name__ == family.PROCESSOR)


def width_of(backbone: Path) -> int | None:
    """The width of a GGUF backbone of a known family; None for another file."""
    return _family_and_width(backbone)[1]


def turn_of(backbone: Path) -> Turn:
    """The chat turn of a GGUF backbone. A file of an unknown family gets that of DEFAULT."""
    return _family_and_width(backbone)[0].TURN


def _family_and_width(backbone: Path) -> tuple[Family, int | None]:
    integers = read_integers(backbone)
    for family in FAMILIES:
        for architecture in family.GGUF_ARCHITECTURES:
            if (width := integers.get(f"{architecture}.embedding_length")) is not None:
                return family, width
    return DEFAULT, None
