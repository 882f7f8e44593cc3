"""The text that the shipped base learns from: descriptions of tiles, and questions with their own categories.

Every question lists two to four categories with definitions and asks for the JSON that triage asks for. The
category sets are about land cover, water, roads, buildings, cloud, ground tone, or a random handful of scene
types; none groups the 15 morphologies as triage does. Labels are neutral words or made-up ones, so that a
label is something to copy from the question and never something to remember.
"""

import json
import random
import re
from collections.abc import Callable
from typing import Any

from orion_triage.tiny_base.tiles import Facts
from orion_triage.triage import CATEGORIES, render_prompt

# How a scene of each morphology is put into words: (noun phrases, what is seen).
SCENES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "ocean_water": (("open water", "an empty sea surface"), ("long swell lines", "faint current streaks", "sun glint on waves")),
    "desert_ice_canopy": (("one unbroken natural surface", "sand, ice, scrub or closed forest"), ("parallel dune crests", "smooth drifted snow", "grainy tree crowns")),
    "coastline": (("a natural shore", "bays and headlands"), ("a pale beach line", "shallow water along the land", "scattered islets")),
    "geological": (("bare rock relief", "craters, cones or folded beds"), ("shaded ridges", "a round rim", "wavy rock bands")),
    "fractal_texture": (("a branching natural pattern", "winding or braided channels, or badlands"), ("gullies that split again and again", "interlaced streams", "a maze of small lakes")),
    "urban_grid": (("a dense city fabric", "tightly packed blocks"), ("crossing avenues", "rows of large roofs", "small parks between blocks")),
    "suburb": (("detached houses in gardens", "a residential quarter"), ("bending streets", "small roofs among trees", "a sports field")),
    "agriculture": (("cropland", "a mosaic of fields"), ("rectangular plots", "small irregular plots", "irrigated circles", "narrow strips and tracks")),
    "ordinary_infrastructure": (("one local installation", "a single small facility in open country"), ("a short airstrip", "a road interchange", "rows of panels or tracks", "a small harbour")),
    "town": (("a small town", "a compact settlement among fields"), ("roads meeting in the middle", "houses around a core", "open country on all sides")),
    "mega_port": (("a container port", "a deep-water terminal"), ("long piers with stacked boxes", "ships alongside", "cranes on the quay")),
    "mega_airport": (("a large airport", "an airfield with several runways"), ("parallel runways", "a terminal with piers", "aircraft on wide aprons")),
    "energy_dam": (("a power or fuel complex", "a dam, cooling towers or tanks"), ("a wall across a valley", "round towers with plumes", "rows of white tanks")),
    "mega_mine_industry": (("a giant mine or works", "an open pit or long factory halls"), ("stepped terraces", "waste heaps and ponds", "kilometres of long roofs")),
    "space_military_chokepoint": (("launch pads, an air base or a ship canal", "a guarded special site"), ("pads joined by wide roads", "loops of hardened shelters", "ships queuing in a channel")),
}  # fmt: skip

_WORDS = """
    ACORN AGATE ALDER AMBER ANCHOR APPLE ARROW ASPEN AZURE BADGER BAMBOO BASALT BEACON BIRCH BISON BRASS BRIDGE
    CANDLE CEDAR CHALK CHERRY CIRCLE CLOVER COBALT COMET COPPER CORAL CRANE CRIMSON CYAN DAHLIA DELTA DIAMOND
    DOLPHIN DRAGON EAGLE EBONY ECHO EMBER FALCON FERN FINCH FLINT FOREST FOXTROT GAMMA GARNET GINGER GOLF GRANITE
    HARBOR HAZEL HERON HOTEL INDIGO IRIS IRON ISLAND IVORY JADE JASMINE JUNIPER KAPPA KESTREL KILO LAGOON LAMBDA
    LEMON LILAC LINDEN LION LOTUS MAGENTA MANGO MAPLE MARBLE MEADOW MERLIN MINT NECTAR NICKEL NOVEMBER OAK OLIVE
    OMEGA ONYX OPAL ORCHID OSCAR OTTER PANDA PEARL PEBBLE PEPPER PINE PLUM POPPY QUARTZ QUILL RAVEN RIVER ROBIN ROSE
    RUBY SAFFRON SAGE SIERRA SIGMA SILVER SLATE SPARROW SPRUCE TANGO TEAL THETA TIGER TOPAZ TULIP UMBER VALLEY
    VELVET VIOLET WALNUT WHISKEY WILLOW WOLF XENON YANKEE ZEBRA ZINC
""".split()

# Never used as labels: the labels of triage and words that mean the same.
FORBIDDEN = frozenset(
    ["HIGH", "MEDIUM", "LOW", "TOP", "MAJOR", "MINOR", "MID", "MIDDLE", "URGENT", "PRIORITY", "CRITICAL", "NORMAL", "IMPORTANT", "AVERAGE", "HI", "LO", "MED"]
)  # fmt: skip
_CAPITALS = re.compile(r"(?<= )[A-Z]\w*|\b[A-Z]{2,}\b")
_CONSONANTS, _VOWELS = "BCDFGHJKLMNPRSTVWZ", "AEIOU"

OPENINGS = (
    "You are an assistant that looks at satellite images. Study this image{where}.",
    "You are an autonomous mapping assistant. Analyze this high-resolution RGB satellite image{where}.",
    "Look at the satellite image{where}.",
    "You are an orbital imaging assistant. Analyze this RGB image{where}.",
)
ASKS = (
    "Strictly use one of these categories based on {topic}:",
    "Use exactly one of these categories for {topic}:",
    "Choose the category that fits {topic}:",
)
FORMATS = (
    'You MUST output your response as a valid JSON object. To ensure accurate visual reasoning, you must output the "reason" key FIRST, followed by the "category" key.',
    'Answer with a JSON object: first the "reason" key, then the "category" key.',
    'Output valid JSON with the keys "reason" and "category", in this order.',
)
_FILLERS = (
    "seen clearly from above", "anywhere in the frame", "over most of the image", "with sharp edges", "in any season",
    "regardless of the light", "(large or small)", "(natural or built)", "with or without haze", "in the whole scene",
)  # fmt: skip


def made_up_label(source: random.Random) -> str:
    """A word of two to four syllables, or of random capitals, that means nothing."""
    while True:
        if source.random() < 0.5:
            word = "".join(source.choice(_CONSONANTS) + source.choice(_VOWELS) for _ in range(source.randint(1, 3)))
            word += source.choice(("", "", *_CONSONANTS))
        else:
            word = "".join(source.choice(_CONSONANTS + _VOWELS) for _ in range(source.randint(3, 7)))
        if len(word) > 2 and word not in FORBIDDEN:
            return word


def labels(source: random.Random, count: int) -> list[str]:
    chosen: list[str] = []
    while len(chosen) < count:
        word = source.choice(_WORDS) if source.random() < 0.4 else made_up_label(source)
        if word not in chosen:
            chosen.append(word)
    return chosen


def _level(value: float, limits: tuple[float, ...]) -> int:
    return sum(value >= limit for limit in limits)


# Topic -> (name in the question, definition of each class, class of a tile).
MEASURES: tuple[tuple[str, tuple[str, ...], Callable[[Facts], int]], ...] = (
    ("water share", ("Dry ground, no water surface at all", "Some water: a river, a pond or a shore", "Water covers most of the scene"),
     lambda f: _level(f.water_share, (0.02, 0.6))),
    ("road density", ("No road or track", "A few roads cross the scene", "A dense network of streets"),
     lambda f: _level(f.road_density, (0.2, 6.0))),
    ("built-up share", ("No roof and no paving", "Buildings or paving on a part of the ground", "Buildings or paving almost everywhere"),
     lambda f: _level(f.built_share, (0.005, 0.5))),
    ("cloud cover", ("A clear sky without cloud", "White clouds with their shadows"), lambda f: _level(f.cloud_share, (0.005,))),
    ("ground tone", ("Green or dark vegetated soil", "Tan, red or yellow dry soil", "Grey rock or stony ground", "White snow and ice"),
     lambda f: {"temperate": 0, "tropical": 0, "arid": 1, "red_soil": 1, "steppe": 1, "grey_rock": 2, "tundra": 2, "snowy": 3}[f.biome]),
)  # fmt: skip


def reason(source: random.Random, facts: Facts) -> str:
    """One sentence on what the tile shows."""
    nouns, sights = SCENES[facts.morphology]
    first, second = source.sample(sights, 2)
    text = source.choice(("{n} with {a}", "{a} and {b} in {n}", "{n}, {a}", "{n} with {a} and {b}"))
    text = text.format(n=source.choice(nouns), a=first, b=second)
    if source.random() < 0.3:
        amount = ("no water", "some water", "much water")[_level(facts.water_share, (0.02, 0.6))]
        text += f", {amount}"
    if facts.cloud_share > 0.02 and source.random() < 0.5:
        text += ", partly under cloud"
    return text[0].upper() + text[1:] + "."


def _categories(source: random.Random, facts: Facts) -> tuple[str, list[str], int]:
    """(topic, definitions, index of the right one), in random order."""
    if source.random() < 0.45:
        topic, definitions, classify = source.choice(MEASURES)
        right = definitions[classify(facts)]
        options = list(definitions)
    else:
        topic = source.choice(("the kind of scene", "visual morphology", "land cover", "what the image shows"))
        others = source.sample([name for name in SCENES if name != facts.morphology], source.randint(1, 3))
        options = [_definition(source, name) for name in (facts.morphology, *others)]
        right = options[0]
    source.shuffle(options)
    return topic, options, options.index(right)


def _definition(source: random.Random, morphology: str) -> str:
    nouns, sights = SCENES[morphology]
    parts = [source.choice(nouns), *source.sample(sights, source.randint(1, 2))]
    text = ", ".join(parts)
    return text[0].upper() + text[1:]


def question(source: random.Random, facts: Facts, where: str = "", *, named: bool = True) -> tuple[str, str]:
    """A question with its own category set, and the right answer as JSON; the tokenizer's corpus has no names."""
    topic, definitions, right = _categories(source, facts)
    names = labels(source, len(definitions)) if named else [""] * len(definitions)
    lines = []
    for name, definition in zip(names, definitions, strict=True):
        for _ in range(source.choice((0, 0, 0, 1, 3))):
            definition += f"{source.choice(('.', ',', ';'))} {source.choice(_FILLERS)}"
        lines.append(f"- {name}: {definition}.")
    prompt = "\n".join(
        [
            source.choice(OPENINGS).format(where=where),
            source.choice(ASKS).format(topic=topic),
            *lines,
            source.choice(FORMATS),
        ]
    )
    return prompt, json.dumps({"reason": reason(source, facts), "category": names[right]})


def description(source: random.Random, facts: Facts) -> tuple[str, str]:
    """A plain request for a description."""
    prompt = source.choice(
        ("Describe this satellite image.", "What does the image show?", "Describe the scene in one sentence.")
    )
    return prompt, reason(source, facts)


def phrases() -> dict[str, Any]:
    """Everything that questions and answers are put together from, for the base's record; labels are made up."""
    return {
        "scenes": {name: [*nouns, *sights] for name, (nouns, sights) in SCENES.items()},
        "measures": {name: list(definitions) for name, definitions, _ in MEASURES},
        "openings": list(OPENINGS),
        "asks": list(ASKS),
        "formats": list(FORMATS),
        "fillers": list(_FILLERS),
        "label_words": _WORDS,
        "never_labels": sorted(FORBIDDEN),
    }


def corpus(count: int, facts: list[Facts], seed: int = 0) -> list[str]:
    """Text for the tokenizer: questions without labels, and the sentences of the triage prompt without its labels.

    Capitalized words behind a space and words in capitals are left out, so that no merge joins a space to a capital
    or two capitals: a label is then the same letters, one by one, in the question's list and in the answer, and
    copying it is copying tokens.
    """
    source = random.Random(seed)
    where = " captured at Longitude: 12.5, Latitude: -3.25"
    texts = ["\n".join(question(source, facts[i % len(facts)], where, named=False)) for i in range(count)]
    contract = render_prompt(None)
    for category in CATEGORIES:
        contract = contract.replace(f"- {category}:", "-")
    return [_CAPITALS.sub("", text) for text in texts + [contract] * (count // 20)]
