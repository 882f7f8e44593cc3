"""First stage of the shipped base: the vision tower learns to see before any language is attached.

Captions alone do not teach a small tower to look at the image (the caption prior is an easier optimum), so
it gets its own objective: the scene (48 subtypes of 15 morphologies), the ground's biome, and the measured
shares of each tile.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.transforms import v2

from orion_triage.dataset.sources.synthetic import countryside
from orion_triage.dataset.sources.synthetic.canvas import BIOMES
from orion_triage.dataset.sources.synthetic.draw import SUBTYPES
from orion_triage.progress import Progress, silent
from tools.tiny_base.optimize import descend, load_state, make_optimizers, save_state, set_learning_rates
from tools.tiny_base.tiles import FRAME_SIZE, Facts

BATCH = 24
HELD_OUT = 480  # the last tiles, on which both stages are measured
_BIOMES = tuple(BIOMES)
_ANOTHER_LOOK = v2.Compose(
    [
        v2.RandomHorizontalFlip(),
        v2.RandomResizedCrop(FRAME_SIZE, scale=(0.64, 1.0), ratio=(0.9, 1.1)),
        v2.RandomApply([v2.GaussianBlur(5, (0.3, 1.6))], p=0.4),
        v2.ColorJitter(brightness=0.3, contrast=0.5, saturation=0.7, hue=0.04),
    ]
)
_SCENES = [
    (morphology, subtype)
    for morphology, subtypes in SUBTYPES.items()
    for subtype in (*subtypes, *countryside.SCENES.get(morphology, ()))
]


def patches(pixels: torch.Tensor) -> torch.Tensor:
    """(batch, 256, 256, 3) bytes -> (batch, 256 patches, 768) in [-1, 1], as LFM2-VL's processor lays them out."""
    batch, height, width, channels = pixels.shape
    scaled = pixels.to(torch.float32) / 127.5 - 1
    grid = scaled.view(batch, height // 16, 16, width // 16, 16, channels)
    return grid.permute(0, 1, 3, 2, 4, 5).reshape(batch, -1, 16 * 16 * channels)


def vision_inputs(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    batch = len(pixels)
    return {
        "pixel_values": patches(pixels),
        "pixel_attention_mask": torch.ones(batch, 256, dtype=torch.int32),
        "spatial_shapes": torch.full((batch, 2), 16),
    }


def augment(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(256, 256, 3) bytes -> the same ground by another camera, season or height; random by torch's generator.

    One of the square's eight symmetries, a zoom of up to 1.25, blur, and wide changes of brightness, contrast and
    colour: drawn tiles have one renderer's look, and what the tower may lean on must outlast a change of it.
    """
    turned = torch.rot90(torch.from_numpy(pixels).permute(2, 0, 1), int(torch.randint(4, ())), (1, 2))
    return np.asarray(_ANOTHER_LOOK(turned).permute(1, 2, 0))


def targets_of(facts: list[Facts]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scene and biome indices (n,), and (n, 4) shares: water, built, cloud, roads / 20."""
    scene = torch.tensor([_SCENES.index((fact.morphology, fact.subtype)) for fact in facts])
    biome = torch.tensor([_BIOMES.index(fact.biome) for fact in facts])
    shares = torch.tensor([[f.water_share, f.built_share, f.cloud_share, min(f.road_density, 20) / 20] for f in facts])
    return scene, biome, shares


@dataclass(frozen=True)
class Batches:
    """The batch of a step: indices of its tiles (24,) and their pixels (24, 256, 256, 3), each tile varied."""

    pixels: NDArray[np.uint8]
    seed: int

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        epoch, position = divmod(step * BATCH, len(self.pixels))
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.pixels))
        chosen = np.take(order, range(position, position + BATCH), mode="wrap")
        with torch.random.fork_rng():
            torch.manual_seed((self.seed << 32) + step)  # a resumed run draws what an uninterrupted one would
            return torch.from_numpy(chosen), torch.from_numpy(np.stack([augment(self.pixels[i]) for i in chosen]))


def in_advance(batches: Batches, steps: range) -> Any:
    """The batches of `steps`, made in another process while the tower learns (0.12 s of a step of 0.8 s)."""
    return torch.utils.data.DataLoader(
        batches,  # type: ignore[arg-type]
        batch_size=None,
        sampler=steps,
        num_workers=1,
        multiprocessing_context="fork",
    )


class TowerWithHeads(torch.nn.Module):
    """The tower, its pooled features and three linear heads that are thrown away afterwards.

    The maximum over the patches stands beside their mean: an airstrip fills 3 of 256 patches, and is lost in a mean.
    """

    def __init__(self, tower: Any, width: int) -> None:
        super().__init__()
        self.tower = tower
        self.scene = torch.nn.Linear(2 * width, len(_SCENES))
        self.biome = torch.nn.Linear(2 * width, len(_BIOMES))
        self.shares = torch.nn.Linear(2 * width, 4)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            features = self.tower(**vision_inputs(pixels)).last_hidden_state
        pooled = torch.cat([features.float().mean(1), features.float().amax(1)], dim=1)
        return self.scene(pooled), self.biome(pooled), self.shares(pooled)


def train_tower(
    tower: Any,
    pixels: NDArray[np.uint8],
    facts: list[Facts],
    *,
    epochs: float,
    checkpoint: Path,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, float]:
    """Train `tower` in place; the last `HELD_OUT` tiles are not trained on. Returns its accuracies there.

    State is saved to `checkpoint` every 200 steps, so an interrupted run continues.
    """
    usable = len(pixels) - HELD_OUT
    steps = int(usable * epochs) // BATCH
    model = TowerWithHeads(tower, tower.config.hidden_size)
    optimizers = make_optimizers(model, weight_decay=0.05)
    labels = targets_of(facts)
    start = load_state(checkpoint, model, optimizers)
    loss_of = torch.nn.functional.cross_entropy
    running, began = 0.0, time.monotonic()
    batches = Batches(pixels[:usable], seed)
    for step, (chosen, batch) in enumerate(in_advance(batches, range(start, steps)), start):
        set_learning_rates(optimizers, step, steps)
        scene, biome, shares = model(batch)
        loss = (
            loss_of(scene, labels[0][chosen], label_smoothing=0.05)
            + 0.3 * loss_of(biome, labels[1][chosen])
            + 3.0 * torch.nn.functional.mse_loss(shares, labels[2][chosen])
        )
        descend(loss, model, optimizers)
        running = loss.item() if step == start else 0.97 * running + 0.03 * loss.item()
        if (step + 1) % 200 == 0 or step + 1 == steps:
            save_state(checkpoint, model, optimizers, step + 1)
            seconds = (time.monotonic() - began) / (step + 1 - start)
            progress(f"tower: loss {running:.3f}, {seconds:.2f} s a step", step + 1, steps)
    return measure(model, pixels[usable:], facts[usable:])


def measure(model: TowerWithHeads, pixels: NDArray[np.uint8], facts: list[Facts]) -> dict[str, float]:
    model.eval()
    labels = targets_of(facts)
    morphology_of = torch.tensor([list(SUBTYPES).index(morphology) for morphology, _ in _SCENES])
    right = {"scene": 0, "morphology": 0, "biome": 0}
    with torch.no_grad():
        for start in range(0, len(pixels), BATCH):
            window = slice(start, start + BATCH)
            scene, biome, _ = model(torch.from_numpy(pixels[window]))
            said = scene.argmax(1)
            right["scene"] += int((said == labels[0][window]).sum())
            right["morphology"] += int((morphology_of[said] == morphology_of[labels[0][window]]).sum())
            right["biome"] += int((biome.argmax(1) == labels[1][window]).sum())
    model.train()
    return {f"{name}_accuracy": count / len(pixels) for name, count in right.items()}
