"""What a training step costs with its records shuffled, with twins in one micro batch, and with a shared prefix too.

    python benchmarks/twins.py                                    # shipped base, 8 records
    python benchmarks/twins.py --preset lfm2.5-vl-1.6b --records 2 --layers 9 3 2 --repeats 2   # a third of the layers
    python benchmarks/twins.py --preset lfm2.5-vl-1.6b --records 2 --count   # operations only, with all layers

A step is forward and backward of one micro batch, LoRA on attention, without checkpointing. The three take turns.
Weights of a preset with published shapes are random. --layers: of the tower, and convolutions and attention of the
language model. --count counts models of a few layers and extrapolates, which is exact: layers of a kind are equal.
"""

import argparse
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from orion_triage.dataset.catalogue import load_catalogue
from orion_triage.dataset.records import Record
from orion_triage.dataset.sources.synthetic.draw import draw_tile, tile_seed
from orion_triage.imagery.frames import shrink
from orion_triage.machine.rehearse import SHAPES
from orion_triage.mission.prompt import render_prompt
from orion_triage.mission.verdict import Verdict
from orion_triage.models import lfm2_vl
from orion_triage.models.load import TINY_BASE_FOLDER, expand_four_bit, load_model, load_processor
from orion_triage.models.shared_image import Lfm2VlForConditionalGeneration
from orion_triage.settings import FineTuneSettings, load_settings
from orion_triage.train import fine_tune
from orion_triage.train.trainer import collator

WAYS = ("shuffled", "twins", "twins and prefix")


def random_model(preset: str, layers: tuple[int, int, int], folder: Path) -> tuple[Any, Any]:
    """(model, processor) with the preset's widths, and so many tower, convolution and attention layers; in float32."""
    texts = [render_prompt(target.coordinates) for target in load_catalogue()]
    tokenizer = lfm2_vl.train_tokenizer([*texts, *(target.reason for target in load_catalogue())], 2048)
    vision, convolutions, attention = layers
    # A convolution comes first and last, as in the published models.
    types = ("conv", *["full_attention"] * attention, *["conv"] * (convolutions - 1))
    shapes = SHAPES[preset] | {"layer_types": types, "vision_layers": vision}
    torch.manual_seed(0)
    model = Lfm2VlForConditionalGeneration(lfm2_vl.make_config(tokenizer, **shapes))
    size = load_settings(preset).base.frame_size
    lfm2_vl.make_processor(tokenizer, size).save_pretrained(folder)
    return model, load_processor(folder, size)


def tiny_model() -> tuple[Any, Any]:
    model = expand_four_bit(load_model(TINY_BASE_FOLDER, dtype="float32", four_bit=True))
    return model, load_processor(TINY_BASE_FOLDER, 256)


def batches(processor: Any, records: int, size: int) -> dict[str, Any]:
    """The three micro batches; the shuffled one has as many images as records, and no more text than the others."""
    targets = load_catalogue()[:: 360 // records][:records]
    frames = {
        target.name: shrink(draw_tile(target.morphology, tile_seed(0, target.name)).image, size)
        if size < 512
        else draw_tile(target.morphology, tile_seed(0, target.name)).image
        for target in targets
    }
    every = [Record(t.name, t.coordinates, Verdict(t.reason, t.category)) for t in targets]
    halves = [place // 2 for place in range(records)]
    pairs = [every[half].without_coordinates() if place % 2 else every[half] for place, half in enumerate(halves)]
    # The same texts on other images: the difference is then that of the images alone.
    apart = [Record(every[place].image, one.coordinates, one.verdict) for place, one in enumerate(pairs)]
    return {
        "shuffled": collator(processor, frames)(apart),
        "twins": collator(processor, frames)(pairs),
        "twins and prefix": collator(processor, frames, share_prefix=True)(pairs),
    }


def step(model: Any, batch: Any) -> None:
    model(**batch).loss.backward()
    model.zero_grad(set_to_none=True)


def operations(model: Any, batch: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        step(model, batch)
    return int(counter.get_total_flops())


def count_all_layers(preset: str, records: int, folder: Path) -> None:
    """Print the operations of a step with all layers, by part, in 10^12."""
    few = (1, 2, 1)
    found: dict[tuple[int, ...], dict[str, int]] = {}
    for layers in (few, (2, 2, 1), (1, 3, 1), (1, 2, 2)):
        model, processor = random_model(preset, layers, folder)
        three = batches(processor, records, load_settings(preset).base.frame_size)
        model = fine_tune.add_adapter(model, FineTuneSettings())[0].train()
        found[layers] = {name: operations(model, three[name]) for name in WAYS}
    types = SHAPES[preset]["layer_types"]
    more = (SHAPES[preset]["vision_layers"] - 1, types.count("conv") - 2, types.count("full_attention") - 1)
    print(f"{records} records of {three['twins']['input_ids'].shape[1]} tokens, "
          f"{three['twins and prefix']['shared_tokens']} of them shared")  # fmt: skip
    for name in WAYS:
        vision, convolution, attention = (
            found[layers][name] - found[few][name] for layers in ((2, 2, 1), (1, 3, 1), (1, 2, 2))
        )
        all_of_it = found[few][name] + more[0] * vision + more[1] * convolution + more[2] * attention
        tower, text = (more[0] + 1) * vision, (more[1] + 2) * convolution + (more[2] + 1) * attention
        print(
            f"{name:<17} {all_of_it / 1e12:6.2f}: tower's layers {tower / 1e12:5.2f}, "
            f"language model's layers {text / 1e12:5.2f}, the rest {(all_of_it - tower - text) / 1e12:5.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--records", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--layers", type=int, nargs=3, default=(9, 3, 2))
    parser.add_argument("--count", action="store_true")
    arguments = parser.parse_args()
    preset, records = arguments.preset, arguments.records
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.count:
            count_all_layers(preset, records, folder)
            return
        model, processor = tiny_model() if preset == "tiny" else random_model(preset, arguments.layers, folder)
    three = batches(processor, records, load_settings(preset).base.frame_size)
    model = fine_tune.add_adapter(model, FineTuneSettings())[0].train()
    shared = three["twins and prefix"]["shared_tokens"]
    print(f"{records} records of {three['twins']['input_ids'].shape[1]} tokens, {shared} of them shared")
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
    counts = {name: operations(model, three[name]) for name in WAYS}  # and the first round, which allocates
    for _ in range(arguments.repeats):
        for name in WAYS:
            wall, cpu = time.perf_counter(), time.process_time()
            step(model, three[name])
            seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    first = seconds["shuffled"]
    for name, found in seconds.items():
        wall, cpu = (statistics.median(one[kind] for one in found) for kind in (0, 1))
        ratios = [one[1] / other[1] for one, other in zip(found, first, strict=True)]
        print(
            f"{name:<17} {counts[name] / 1e12:6.3f} x 10^12 operations, wall {wall:7.3f} s, CPU {cpu:7.3f} s; CPU "
            f"against shuffled, turn by turn: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB")


if __name__ == "__main__":
    main()
