"""How much of the device training uses: seconds a record, memory, and the share of its fastest matrix product.

    orion rehearse --preset lfm2.5-vl-1.6b --keep       # leaves a base of random weights
    python benchmarks/device_share.py --preset lfm2.5-vl-1.6b --base runs/rehearsal-lfm2.5-vl-1.6b/base

Floating-point operations are counted by PyTorch in one forward and backward pass of one micro-batch, recomputation
included where checkpointing is on. The peak is measured, not read from a data sheet: a large square matrix product
in bfloat16 on a GPU, in float32 on a CPU.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from orion_triage import processes
from orion_triage.dataset.catalogue import load_catalogue
from orion_triage.dataset.records import Record
from orion_triage.dataset.sources.synthetic.draw import draw_tile, tile_seed
from orion_triage.imagery.frames import shrink
from orion_triage.machine.rehearse import machine
from orion_triage.mission.verdict import Verdict
from orion_triage.models.load import load_model, load_processor, resolve_base
from orion_triage.settings import load_settings
from orion_triage.train import fine_tune
from orion_triage.train.trainer import collator


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def median_seconds(work, repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        synchronize()
        began = time.perf_counter()
        work()
        synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def peak_operations_per_second(device: str) -> float:
    size, dtype = (8192, torch.bfloat16) if device != "cpu" else (2048, torch.float32)
    first, second = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    first @ second
    return 2 * size**3 / median_seconds(lambda: first @ second, 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--base", type=Path, help="default: the preset's")
    parser.add_argument("--precision", default=None, help="default: the preset's, float32 on a CPU")
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args()

    settings = load_settings(arguments.preset)
    base = arguments.base or resolve_base(settings.base.model)
    device = processes.local_device()
    precision = "float32" if device == "cpu" else arguments.precision or settings.fine_tune.precision
    size = settings.base.frame_size
    processor = load_processor(base, size)
    model = load_model(base, dtype=precision, four_bit=True, device=device)
    model, _ = fine_tune.add_adapter(model, settings.fine_tune)
    if settings.fine_tune.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()

    records, frames = [], {}
    for target in load_catalogue()[: settings.fine_tune.micro_batch_size]:
        records.append(Record(target.name, target.coordinates, Verdict(target.reason, target.category)))
        frames[target.name] = shrink(draw_tile(target.morphology, tile_seed(0, target.name)).image, size)
    batch = collator(processor, frames)(records).to(device)

    def step() -> None:
        with torch.autocast(device.split(":")[0], getattr(torch, precision), enabled=precision != "float32"):
            loss = model(**batch).loss
        loss.backward()
        model.zero_grad(set_to_none=True)

    step()  # the first one packs, allocates and compiles
    with FlopCounterMode(display=False) as counter:
        step()
    operations = counter.get_total_flops()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    seconds = median_seconds(step, arguments.steps)
    peak = peak_operations_per_second(device)
    print(
        json.dumps(
            {
                "preset": settings.preset,
                "machine": machine(),
                "precision": precision,
                "micro_batch_size": len(records),
                "tokens": batch["input_ids"].numel(),
                "seconds_per_record": round(seconds / len(records), 4),
                "operations_per_record": operations // len(records),
                "peak_operations_per_second": round(peak),
                "share_of_peak": round(operations / seconds / peak, 4),
                "peak_vram_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
