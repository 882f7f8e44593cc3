"""Makes the shipped base from nothing: tiles, tokenizer, tower, language. Resumable; about two hours on 2 cores.

The base never sees the triage task: its questions have labels and category sets of their own (`texts`), its
tiles have seeds of their own (`tiles`), and its random coordinates stay 2 degrees away from val and test.
`record.json` beside the weights says what went in.
"""

import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

from orion_triage.progress import Progress, silent
from orion_triage.safe.files import replaced_folder, sha256_of_file, write_text

TILES = 9_600
TOWER_EPOCHS = 10.0
LANGUAGE_STEPS = 1300
SEED = 0
CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---

# orion-tiny

An LFM2-VL of 7.3 M parameters that describes drawn satellite tiles, for trying ORION triage without a GPU.
How it was made and what it cannot do: docs/tiny-base.md of the project; `record.json` has its seeds, places and texts.
"""


def build(
    work: Path,
    out_folder: Path,
    *,
    tiles: int = TILES,
    tower_epochs: float = TOWER_EPOCHS,
    language_steps: int = LANGUAGE_STEPS,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Build the base into `out_folder`, keeping intermediate state in `work`; returns what it measured."""
    import torch
    from transformers import Lfm2VlForConditionalGeneration

    from orion_triage.models.lfm2_vl_shapes import make_config, make_processor, save_base, train_tokenizer
    from orion_triage.models.load import load_model
    from tools.tiny_base.instruct import AWAY_DEGREES, cache_features, measure_language, train_language
    from tools.tiny_base.texts import corpus, phrases
    from tools.tiny_base.tiles import FRAME_SIZE, NAMESPACE, draw_tiles, load_tiles, seed_of
    from tools.tiny_base.tower import HELD_OUT, train_tower

    licence = importlib.metadata.distribution("orion-triage").read_text("licenses/LICENSE")
    assert licence, "the package was installed without its licence"
    work.mkdir(parents=True, exist_ok=True)
    draw_tiles(work / "tiles", tiles, len(os.sched_getaffinity(0)), progress)
    pixels, facts = load_tiles(work / "tiles", tiles)

    tokenizer = train_tokenizer(corpus(4000, facts[:600]), 2048)
    torch.manual_seed(SEED)
    model = Lfm2VlForConditionalGeneration(make_config(tokenizer))
    tower = model.model.vision_tower
    figures = train_tower(
        tower, pixels, facts, epochs=tower_epochs, checkpoint=work / "tower.pt", seed=SEED, progress=progress
    )
    features = cache_features(tower, pixels, work / "features.npy", progress)
    places = held_out_places()
    train_language(
        model,
        tokenizer,
        features,
        facts,
        steps=language_steps,
        places=places,
        checkpoint=work / "language.pt",
        seed=SEED,
        progress=progress,
    )
    processor = make_processor(tokenizer, FRAME_SIZE)
    with replaced_folder(out_folder) as folder:
        save_base(model, processor, folder)
        progress("asking about unseen tiles", 0, 1)
        shipped = load_model(folder, dtype="float32")  # as users load it
        answers = measure_language(shipped, processor, pixels[-HELD_OUT:], facts[-HELD_OUT:])
        record = {
            "tiles": {
                "namespace": NAMESPACE,
                "count": tiles,
                "first_seed": seed_of(0),
                "last_seed": seed_of(tiles - 1),
            },
            "places": {"kept_away_degrees": AWAY_DEGREES, "kept_away_from_lon_lat": places},
            "texts": phrases(),
            "tower": {"epochs": tower_epochs, **figures},
            "language": {"steps": language_steps, **answers},
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "seed": SEED,
            "weights_sha256": sha256_of_file(folder / "model.safetensors"),
        }
        write_text(folder / "README.md", CARD)
        write_text(folder / "LICENSE", licence)
        write_text(folder / "record.json", json.dumps(record, indent=2) + "\n")
    return record


def held_out_places() -> list[tuple[float, float]]:
    """(lon, lat) of the shipped catalogue's val and test places."""
    from orion_triage.dataset.catalogue import load_catalogue
    from orion_triage.dataset.split import split_targets

    splits = split_targets(load_catalogue())
    return [(place.lon, place.lat) for name in ("val", "test") for t in splits[name] if (place := t.coordinates)]
