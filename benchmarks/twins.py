"""What a training step costs with its records shuffled, with twins in one micro batch, and with a shared prefix too.

    python benchmarks/twins.py                                    # shipped base, 8 records
    python benchmarks/twins.py --preset lfm2.5-vl-1.6b --records 2 --layers 9 3 2 --repeats 2   # a third of the layers
    python benchmarks/twins.py --preset lfm2.5-vl-1.6b --records 2 --count   # operations only, with all layers

A step is forward and backward of one micro batch, LoRA on attention, without checkpointing. The three take turns.
Weights of a preset with published shapes are random. --layers: of the tower, and convolutions and attention of the
language model.
"""

import argparse
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers.initialization import no_init_weights

from orion_triage.dataset.catalogue import load_catalogue
from orion_triage.dataset.records import Record
from orion_triage.dataset.sources.synthetic.draw import draw_tile, tile_seed
from orion_triage.imagery.frames import shrink
from orion_triage.machine.rehearse import SHAPES, random_config
from orion_triage.mission.mission import default_mission
from orion_triage.mission.verdict import Verdict
from orion_triage.models import lfm2_vl, lfm2_vl_shapes
from orion_triage.models.load import TINY_BASE_FOLDER, expand_four_bit, load_model, load_processor
from orion_triage.settings import FineTuneSettings, load_settings
from orion_triage.train import fine_tune
from orion_triage.train.trainer import collator

MISSION = default_mission()
WAYS = ("shuffled", "twins", "twins and prefix")


def random_model(preset: str, layers: tuple[int, int, int], folder: Path) -> tuple[Any, Any]:
    """(model, processor) with the preset's widths, and so many tower, convolution and attention layers; in float32."""
    vision, convolutions, attention = layers
    # A convolution comes first and last, as in the published models.
    types = ("conv", *["full_attention"] * attention, *["conv"] * (convolutions - 1))
    tokenizer, config = random_config(preset, layer_types=types, vision_layers=vision)
    torch.manual_seed(0)
    model = lfm2_vl.model_class()(config)
    config.save_pretrained(folder)
    size = load_settings(preset).base.frame_size
    lfm2_vl_shapes.make_processor(tokenizer, size).save_pretrained(folder)
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
    every = [Record(t.name, t.coordinates, Verdict(t.reason, t.category), MISSION) for t in targets]
    halves = [place // 2 for place in range(records)]
    pairs = [every[half].without_coordinates() if place % 2 else every[half] for place, half in enumerate(halves)]
    # The same texts on other images: the difference is then that of the images alone.
    apart = [Record(every[place].image, one.coordinates, one.verdict, MISSION) for place, one in enumerate(pairs)]
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
    """Print the operations of a step in 10^12. Nothing is computed: torch's fake tensors have shapes only.

    Gradients go back to the pixels through frozen weights; LoRA's own products, 2 % of a row at rank 16, are left out.
    """
    shapes = SHAPES[preset]
    types = shapes["layer_types"]
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, no_init_weights():
        model, processor = random_model(
            preset, (shapes["vision_layers"], types.count("conv"), types.count("full_attention")), folder
        )
        model.train().requires_grad_(False)
    three = batches(processor, records, load_settings(preset).base.frame_size)
    print(in_words(three))
    for name in WAYS:
        batch = {
            key: fake.from_tensor(value) if torch.is_tensor(value) else value for key, value in three[name].items()
        }
        images, patches = three[name]["pixel_values"].shape[:2]
        side = int(patches**0.5)
        with fake, FlopCounterMode(display=False) as tower:  # its forward reads the sizes of the images, so by parts
            patched = model.model.vision_tower.embeddings.patch_embedding(batch["pixel_values"]).requires_grad_()
            seen = model.model.vision_tower.encoder(inputs_embeds=patched, attention_mask=None).last_hidden_state
            features = model.model.multi_modal_projector(seen.reshape(images, side, side, -1)).flatten(1, 2)
            features.sum().backward()
        rest = {key: value for key, value in batch.items() if not key.startswith(("pixel", "spatial"))}
        with fake, FlopCounterMode(display=False) as text:
            model(**rest, image_features=features.detach().requires_grad_()).loss.backward()
        parts = [counter.get_total_flops() / 1e12 for counter in (tower, text)]
        print(f"{name:<17} {sum(parts):6.2f}: tower {parts[0]:5.2f}, language model {parts[1]:5.2f}")


def in_words(three: dict[str, Any]) -> str:
    rows, tokens = three["twins"]["input_ids"].shape
    return f"{rows} records of {tokens} tokens, {three['twins and prefix']['shared_tokens']} of them shared"


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
    print(in_words(three))
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
