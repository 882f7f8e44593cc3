"""The proof, before any training, that the loaded model sees its images."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from orion_triage.errors import OrionError
from orion_triage.models.adapter import tower_of
from orion_triage.models.encode import encode
from orion_triage.models.generate import vision_features
from orion_triage.models.load import KEPT_IN_16_BIT

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from transformers.models.lfm2_vl import Lfm2VlProcessor

SMALLEST_COSINE = 0.99  # of an image's features against the 16-bit base; blind training gives 0.06
SMALLEST_MOVE = 1e-3  # of any logit when the image is swapped; exactly 0 when the image is ignored


def preflight(
    model: Any,
    reference: "torch.Tensor",
    processor: "Lfm2VlProcessor",
    frames: "Sequence[Image.Image]",
    prompt: str,
) -> dict[str, Any]:
    """Prove that the model to be trained sees: three checks, before any training.

    `reference` is `vision_features` of the 16-bit base for the same frames. SigLIP2's patch embedding is a
    linear layer: loaded in 4 bits it casts pixels in [-1, 1] to bytes, silently, and training goes on blind.
    Raises OrionError naming the check and its figure; returns the figures.
    """
    import torch

    fix = f"Load it with vlm.load_model, which keeps {', '.join(KEPT_IN_16_BIT)} out of the 4-bit layers."
    if quantized := _quantized_vision_modules(model):
        raise OrionError(
            f"preflight: {len(quantized)} vision or head modules are quantized, {quantized[0]} first: pixels "
            "would be cast to integers.",
            fix,
        )
    features = vision_features(model, processor, frames)
    cosines = torch.cosine_similarity(features.flatten(1), reference.flatten(1), dim=1).tolist()
    if not min(cosines) >= SMALLEST_COSINE:
        worst = cosines.index(min(cosines))
        raise OrionError(
            f"preflight: the vision features of frame {worst + 1} have cosine {min(cosines):.3f} with the "
            f"16-bit base's, under {SMALLEST_COSINE}.",
            fix,
        )
    last_logits = []
    with torch.inference_mode():
        for frame in frames:
            batch = encode(processor, [frame], [prompt]).to(model.device)
            last_logits.append(model(**batch, logits_to_keep=1, use_cache=False).logits[0, -1].float().cpu())
    moves = [
        float((logits - last_logits[(index + 1) % len(frames)]).abs().max()) for index, logits in enumerate(last_logits)
    ]
    if not min(moves) > SMALLEST_MOVE:
        still = moves.index(min(moves))
        raise OrionError(
            f"preflight: swapping frame {still + 1} for the next one moves no logit by more than "
            f"{min(moves):.2g} (floor {SMALLEST_MOVE}): the model does not look at the image.",
            "Check that the frames differ and that the base was trained with images.",
        )
    return {
        "frames": len(frames),
        "smallest_vision_cosine": round(min(cosines), 6),
        "smallest_logit_move": round(min(moves), 6),
    }


def _quantized_vision_modules(model: Any) -> list[str]:
    """Modules that must compute on real numbers and do not, the patch embedding first."""
    from torch import nn

    bad = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or tower_of(name) == "text":
            continue
        # Linear4bit can hide its bytes in a floating dtype (bnb_4bit_quant_storage): the type decides.
        if type(module).__module__.startswith("bitsandbytes") or not module.weight.dtype.is_floating_point:
            bad.append(name)
    return sorted(bad, key=lambda name: "patch_embedding" not in name)
