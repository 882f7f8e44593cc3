"""What one of several processes does that share out a 16-bit base's weights.

accelerate starts FSDP on GPUs only, so this calls what it would call: torch's `fully_shard`, on the classes that
docs/accelerate/fsdp.yaml names.
"""

from collections.abc import Set
from pathlib import Path
from typing import Any

import peft  # noqa: F401  (loaded once, before the processes are forked)
import torch
import torch.distributed
from torch.distributed.fsdp import fully_shard

from orion_triage.dataset.dataset import Dataset
from orion_triage.dataset.records import read_split
from orion_triage.models.load import load_model, load_processor
from orion_triage.progress import silent
from orion_triage.settings import FineTuneSettings
from orion_triage.train import fine_tune
from orion_triage.train.trainer import collator
from tests.conftest import MISSION


def adapted(base: Path) -> Any:
    """LoRA in float32 on a base in bfloat16, moved off its start so that every matrix has a gradient."""
    settings = FineTuneSettings(base_weights="16-bit", dropout=0.0)
    torch.manual_seed(settings.seed)
    model, _ = fine_tune.add_adapter(load_model(base, dtype="bfloat16"), settings)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model.train()


def compare(base: Path, dataset: Path, classes: Set[str], meeting: Path, count: int, rank: int) -> dict[str, Any]:
    """How the loss and the gradients of `count` processes, which meet at a new file, differ from those of one."""
    torch.set_num_threads(1)  # a fork lacks the threads that its parent computed with
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", world_size=count, rank=rank)
    try:
        return _compare(base, dataset, classes, count, rank)
    finally:
        torch.distributed.destroy_process_group()


def _compare(base: Path, dataset: Path, classes: Set[str], count: int, rank: int) -> dict[str, Any]:
    records = read_split(dataset, "train", MISSION)[: 2 * count]
    frames = fine_tune.decode_frames(Dataset(dataset, MISSION), records, 256, silent)
    collate = collator(load_processor(base, 256), frames)
    batches = [collate(records[2 * number : 2 * number + 2]) for number in range(count)]

    whole = adapted(base)
    losses = [whole(**batch).loss for batch in batches]
    torch.stack(losses).mean().backward()
    expected = {name: value.grad for name, value in whole.named_parameters() if value.grad is not None}

    shared = adapted(base)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (count,))
    layers = [module for module in shared.modules() if type(module).__name__ in classes]
    for part in (*layers, shared):
        fully_shard(part, mesh=mesh)
    own = sum(value.to_local().numel() for value in shared.parameters())
    loss = shared(**batches[rank]).loss
    loss.backward()
    found = {name: value.grad.full_tensor() for name, value in shared.named_parameters() if value.grad is not None}
    return {
        "layers": len(layers),
        "share": own / sum(value.numel() for value in whole.parameters()),
        "loss_difference": abs(float(loss) - float(losses[rank])),
        "same_names": found.keys() == expected.keys(),
        "gradients": len(found),
        "gradient_difference": max(float((found[name] - expected[name]).abs().max()) for name in expected),
        "smallest_gradient": min(float(value.abs().max()) for value in expected.values()),
    }
