"""Check before the training that the loaded model uses its images."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from orion_triage.errors import OrionError
from orion_triage.models.adapter import tower_of
from orion_triage.models.encode import encode
from orion_triage.models.family import family_of_model
from orion_triage.models.generate import vision_features

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from transformers import ProcessorMixin

SMALLEST_COSINE = 0.99  # between an image's features and those of the base in float32; a quantized tower gives 0.06
SMALLEST_MOVE = 1e-3  # change of any logit if the image is swapped; exactly 0 if the model ignores the image


def preflight(
    model: Any,
    reference: "torch.Tensor",
    processor: "ProcessorMixin",
    frames: "Sequence[Image.Image]",
    user_text: str,
) -> dict[str, Any]:
    """Three checks that the model to be trained uses its images.

    `reference` is `vision_features` of the unquantized base in float32 for the same frames. LFM2-VL's patch embedding
    is a linear layer: loaded in 4 bits, it casts pixels in [-1, 1] to bytes without an error, and the training would
    ignore the images. Raises OrionError that names the check and its value; returns the values.
    """
    import torch

    fix = "Load it with models.load.load_model, which quantizes only the layers of the language model."
    if quantized := _quantized_vision_modules(model):
        raise OrionError(
            f"preflight: {len(quantized)} vision or head modules are quantized, for example {quantized[0]}: pixels "
            "would be cast to integers.",
            fix,
        )
    features = vision_features(model, processor, frames)
    if not bool(features.isfinite().all()):
        raise OrionError(
            f"preflight: the vision features are not finite in {str(model.dtype).removeprefix('torch.')}.",
            "Set fine_tune.precision=bfloat16, or float32 on a GPU without it.",
        )
    cosines = torch.cosine_similarity(features.flatten(1), reference.flatten(1), dim=1).tolist()
    if not min(cosines) >= SMALLEST_COSINE:
        worst = cosines.index(min(cosines))
        raise OrionError(
            f"preflight: the vision features of frame {worst + 1} have a cosine of {min(cosines):.3f} with those of "
            f"the base in float32; {SMALLEST_COSINE} is needed.",
            fix,
        )
    last_logits = []
    with torch.inference_mode():
        for frame in frames:
            batch = encode(processor, [frame], [user_text]).to(model.device)
            last_logits.append(model(**batch, logits_to_keep=1, use_cache=False).logits[0, -1].float().cpu())
    moves = [
        float((logits - last_logits[(index + 1) % len(frames)]).abs().max()) for index, logits in enumerate(last_logits)
    ]
    if not min(moves) > SMALLEST_MOVE:
        still = moves.index(min(moves))
        raise OrionError(
            f"preflight: replacing frame {still + 1} by the next one changes no logit by more than "
            f"{min(moves):.2g} ({SMALLEST_MOVE} is needed): the model ignores the image.",
            "Check that the frames differ and that the base was trained with images.",
        )
    return {
        "frames": len(frames),
        "smallest_vision_cosine": round(min(cosines), 6),
        "smallest_logit_move": round(min(moves), 6),
    }


def _quantized_vision_modules(model: Any) -> list[str]:
    """The vision and head modules that are quantized, the patch embedding first."""
    from torch import nn

    bad, family = [], family_of_model(model)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or tower_of(name, family) == "text":
            continue
        # Linear4bit can store its bytes in a floating dtype (bnb_4bit_quant_storage), so check the module's type.
        if type(module).__module__.startswith("bitsandbytes") or not module.weight.dtype.is_floating_point:
            bad.append(name)
    return sorted(bad, key=lambda name: family.PATCH_EMBEDDING not in name)
