"""The text that the shipped base learns from: descriptions of tiles, and questions with their own categories.

Every question lists two to four categories with definitions and asks for the JSON that triage asks for. The
category sets are about water, roads, buildings, cloud, ground tone, or a random handful of scene types; none
groups the scenes as triage does. Labels are letters, neutral words or made-up ones, so that a label is
something to copy from the question and never something to remember; the reason before it draws on the right
definition, so that there is something to choose it by.
"""

import json
import random
import re
from collections.abc import Callable
from typing import Any

from orion_triage.mission.mission import default_mission
from orion_triage.mission.prompt import render_prompt
from tools.tiny_base.tiles import Facts

MISSION = default_mission()

# How each scene (`SUBTYPES`) is put into words: (what it is, what is seen in it). Many wordings of the same thing,
# in ordinary words, because fine-tuning spends its few steps on spelling whatever was never written here.
SCENES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "ocean_water": (
        ("open water", "an empty sea", "a wide ocean surface", "deep blue water", "an open sea surface", "dark water far from land", "a smooth stretch of ocean"),
        ("long swell lines", "faint current streaks", "sun glint on the waves", "small even waves", "drifting foam", "soft plankton colours", "no shore in sight", "nothing afloat", "extreme calm"),
    ),
    "dunes": (
        ("a sand sea", "a field of dunes", "an empty desert", "wild sandy ground"),
        ("parallel dune crests", "soft sand ridges", "wind lines in the sand", "no track across it", "the same sand everywhere"),
    ),
    "ice": (
        ("a plain of snow and ice", "an ice sheet", "an even frozen plain", "a white frozen land"),
        ("smooth drifted snow", "wind shaped ice", "cracks in the ice", "blue lines in the snow", "untouched snow on a large scale"),
    ),
    "canopy": (
        ("closed forest", "thick forest canopy", "wild wood land", "one unbroken forest"),
        ("grainy tree crowns", "trees standing close", "dark and light stands of trees", "no gap in the trees", "no trace of a track"),
    ),
    "scrub": (
        ("open dry scrub", "wild empty ground", "a natural plain with bushes", "heath land"),
        ("scattered bushes", "patches of grass and soil", "a dark burn scar", "natural cover everywhere", "untouched ground on a large scale"),
    ),
    "upland": (
        ("open wild land", "a wild plain in patches", "bush and bare ground", "rough grass land", "a natural open country"),
        ("patches of many tones", "a burnt patch in the grass", "darker bush along a dry bed", "bare soil between the bushes", "soft edges between the covers", "a natural cover everywhere"),
    ),
    "hills": (
        ("wild hills", "steep dissected hills", "bare mountain slopes", "wooded hills", "a rough hill land"),
        ("valleys that branch", "light and shaded slopes", "dark woods on the shaded side", "a stony stream bed", "snow on the heights", "sharp ridges and deep valleys", "an untouched slope"),
    ),
    "wetland": (
        ("swamp forest", "wild wet forest", "a natural forest maze", "forest and marsh", "a river forest"),
        ("winding lines in the forest", "lighter green along old streams", "openings that are natural", "still water among the trees", "a maze of green tones", "no straight line"),
    ),
    "islands": (
        ("wild islands", "an island coast", "a group of islands", "an atoll in the sea"),
        ("scattered islets", "shallow water along the land", "a quiet lagoon", "reefs in clear water", "only stone and surf"),
    ),
    "mainland": (
        ("a natural shore", "bays and headlands", "a wild coast", "a rocky shore line", "a sandy coast", "the edge of the land"),
        ("a pale beach line", "white surf on the rocks", "cliffs above the sea", "sand bars in clear water", "a curved bay", "waves along the beach", "an untouched beach"),
    ),
    "crater": (
        ("a round crater", "an old impact crater", "a natural ring of rock"),
        ("a round rim", "a flat crater floor", "shadows inside the rim", "a circle of stone", "steep inner walls"),
    ),
    "volcano": (
        ("a volcanic cone", "an old volcano", "a cone of lava and ash"),
        ("a dark summit", "old lava ground", "gullies down the cone", "lava streams on the slopes", "a round mountain"),
    ),
    "folds": (
        ("folded rock layers", "exposed rock bands", "bare bent strata"),
        ("wavy rock bands", "curved layers of stone", "layers at extreme angles", "stripes of light and dark rock", "natural forms only"),
    ),
    "mountains": (
        ("bare mountain slopes", "bare rock relief", "rough stony hills", "a range of mountains"),
        ("shaded ridges", "sharp shadows on steep slopes", "deep eroded valleys", "bare cliffs", "high snow on the ridges"),
    ),
    "drainage": (
        ("a tree of dry valleys", "a branching natural pattern", "ground cut by water"),
        ("gullies that split again and again", "branches of every size", "a net of natural drainage", "the same forms at every scale", "thin channels between ridges"),
    ),
    "braided": (
        ("a braided river plain", "a wide bed of split channels", "many river arms"),
        ("interlaced streams", "sand banks between the streams", "a pale river bed", "channels that join and part", "only natural lines"),
    ),
    "meanders": (
        ("bends of a free river", "winding river channels", "a river in its wild plain"),
        ("old river bends", "loops left by the river", "sand on the inner bends", "a winding line of water", "lakes cut off from the river"),
    ),
    "lakes": (
        ("a maze of lakes", "wet land with many lakes", "a natural lake land"),
        ("many small lakes", "water in long hollows", "lakes of every size", "land between the lakes", "a wet natural texture"),
    ),
    "badlands": (
        ("badlands", "eroded bare hills", "a maze of dry gullies"),
        ("sharp small ridges", "gullies on every slope", "a rough natural texture", "bands in the bare soil", "no plants on the slopes"),
    ),
    "urban_grid": (
        ("a dense city fabric", "tightly packed blocks", "a large city", "city blocks in rows", "an inner city quarter", "a street grid", "close rows of buildings"),
        ("crossing avenues", "rows of large roofs", "small parks between blocks", "narrow streets in a grid", "tall buildings with shadows", "few open spaces", "standard blocks", "everyday streets", "civilization all over"),
    ),
    "suburb": (
        ("detached houses in gardens", "a residential quarter", "family homes on small plots", "a quiet suburb", "homes along curved streets", "low houses among trees", "a new housing area"),
        ("bending streets", "small roofs among trees", "a sports field", "loops of short streets", "green gardens", "a school with its field", "ordinary homes", "standard plots"),
    ),
    "mosaic": (
        ("a mosaic of fields", "regular crop fields", "a plain of farms", "cropland in large parcels"),
        ("rectangular plots", "green and brown parcels", "farm tracks along the fields", "standard field sizes", "plots ploughed now"),
    ),
    "smallholdings": (
        ("small farm plots", "a land of small holdings", "many little fields"),
        ("small irregular plots", "hedges and farm paths", "a few farm houses", "land in use everywhere", "fields of every shape"),
    ),
    "pivots": (
        ("irrigated fields", "round crop fields", "farms with water arms"),
        ("irrigated circles", "green and brown circles", "rows of round fields", "corners left dry", "wedges of new crop"),
    ),
    "strips": (
        ("long farm strips", "narrow planted fields", "cropland in strips"),
        ("narrow strips and tracks", "long even parcels", "stripes of green and brown", "straight lines of crops", "ditches beside the strips"),
    ),
    "paddies": (
        ("wet crop fields", "flooded rice land", "small paddies"),
        ("water standing in the plots", "low banks around the fields", "wet and dry plots", "even rows of small fields", "straight ditches between fields"),
    ),
    "patchwork": (
        ("a fine patchwork of plots", "a farmed land of tiny plots", "small plots and trees everywhere", "a crowded farm land", "a land of many villages"),
        ("tiny plots of every tone", "trees between the plots", "villages all over", "a grain of small fields", "no large field", "everyday farm life"),
    ),
    "parcels": (
        ("large fields in many directions", "wide farm parcels", "big fields among woods", "open farm land", "a plain of large parcels"),
        ("fields of every direction", "dark ploughed parcels", "bright green parcels", "woods left between the fields", "farm roads along large fields", "ripe and bare fields"),
    ),
    "clearings": (
        ("forest with clearings", "farm plots cut into forest", "newly opened forest land", "a forest settlement", "cleared blocks in the woods"),
        ("straight edges in the forest", "a straight track through trees", "cleared blocks", "houses in a row", "bare plots among trees", "new farm land"),
    ),
    "valley_fields": (
        ("fields between hills", "farmed valleys", "hills with farm land", "valley farm land", "a hill country with fields"),
        ("fields on the valley floors", "a road along the valley", "villages between the hills", "plots that follow the slopes", "steep woods above the fields", "flat land in use"),
    ),
    "hamlets": (
        ("a few hamlets on a road", "villages in wild land", "a rural road with houses", "scattered villages", "a road through open country"),
        ("one road across the land", "a handful of roofs", "plots around the houses", "houses along the road", "a small group of houses", "open land between the villages"),
    ),
    "interchange": (
        ("a road interchange", "a crossing of two main roads", "a motorway junction"),
        ("roads crossing on bridges", "loops of road", "a ramp joining two roads", "everyday traffic", "four curved ramps"),
    ),
    "airstrip": (
        ("a local airstrip", "a small landing strip", "a little airfield for light planes"),
        ("one short runway", "some sheds and a small apron", "grass beside the strip", "a strip for local use", "a few parked light planes"),
    ),
    "solar": (
        ("a solar field", "a small solar plant", "panels on open ground"),
        ("rows of panels", "dark blue rows", "even lines of panels", "open country on all sides", "a few columns of panels"),
    ),
    "rail_yard": (
        ("a modest rail yard", "a local goods station", "tracks at a small yard"),
        ("a few tracks side by side", "sheds along the rails", "parallel rails", "a yard for local trains", "a road beside the rails"),
    ),
    "harbour": (
        ("a small harbour", "a fishing harbour", "a local boat place"),
        ("boats behind a short pier", "small jetties", "a village at the water", "two short stone arms", "little boats"),
    ),
    "treatment": (
        ("a water treatment plant", "one local installation", "a small facility in open country"),
        ("round basins in a row", "a few round pools", "one paved yard", "a small building by the basins", "pools with pale edges"),
    ),
    "town": (
        ("a small town", "a compact settlement among fields", "a village with a centre", "a market town", "a local town in open land", "one small group of streets", "a country town"),
        ("roads meeting in the middle", "houses around a core", "short streets near the centre", "fields beginning behind the houses", "a few larger roofs", "a main road passing through", "human life around one square", "local shops"),
    ),
    "mega_port": (
        ("a container port", "a deep water terminal", "a sea port", "cargo terminals by the sea", "harbour basins", "long quays for ships", "docks with cargo"),
        ("long piers with stacked boxes", "ships alongside", "cranes on the quay", "rows of containers", "vessels at the piers", "wide paved yards", "a straight breakwater", "massive stacks", "cargo to be sent over sea"),
    ),
    "mega_airport": (
        ("a large airport", "an airfield with several runways", "airport runways and terminals", "a wide airport field", "a passenger airport", "long runways", "a busy airfield"),
        ("parallel runways", "a terminal with piers", "aircraft on wide aprons", "long taxiways", "parked jets", "rows of aircraft at the gates", "massive aprons", "immediate access to the gates"),
    ),
    "dam": (
        ("a dam", "a river dam and its lake", "a reservoir", "a water power station"),
        ("a wall across a valley", "water held behind the wall", "a spillway below the lake", "a lake with side arms", "massive concrete"),
    ),
    "towers": (
        ("a power plant", "cooling towers", "generating works", "an energy complex"),
        ("round towers with plumes", "white steam over the towers", "turbine halls", "dark coal stock", "energy sent by wire"),
    ),
    "refinery": (
        ("a refinery", "a tank farm", "a fuel complex", "oil works"),
        ("rows of white tanks", "pipes between the tanks", "paved ground around the works", "blocks of round tanks", "heavy process units"),
    ),
    "open_pit": (
        ("a giant mine", "an open pit", "a deep quarry", "a mining area"),
        ("stepped terraces", "waste heaps and ponds", "haul roads into the pit", "benches cut in the ground", "tailings ponds", "extreme depth", "a dark pit floor"),
    ),
    "works": (
        ("steel works", "long factory halls", "an industrial complex", "heavy industry"),
        ("kilometres of long roofs", "stock piles beside rails", "rows of industrial roofs", "massive halls", "smoke over the halls"),
    ),
    "launch": (
        ("launch pads", "a rocket launch site", "a space port", "pads near the sea"),
        ("pads joined by wide roads", "service roads to the pads", "one tall white hall", "round pads in a line", "no civil traffic"),
    ),
    "base": (
        ("an air base", "a military airfield", "protected shelters", "a guarded special site"),
        ("loops of hardened shelters", "one runway with dispersed stands", "rows of small earth covered stores", "rings of stands", "a long military runway"),
    ),
    "canal": (
        ("a ship canal", "a passage for ships", "a long straight channel", "locks for vessels"),
        ("ships queuing in a channel", "lock chambers side by side", "roads along both banks", "a strategic passage", "ships in one line"),
    ),
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
_CAPITALS = re.compile(r"(?<=[ \"])[A-Z]\w*|\b[A-Z]{2,}\b")
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
    """`count` different labels: single letters for a third of the questions, else words and made-up words."""
    if source.random() < 0.33:
        return source.sample("ABCDEFGHIJKLMNOPQRSTUVWXYZ", count)
    chosen: list[str] = []
    while len(chosen) < count:
        word = source.choice(_WORDS) if source.random() < 0.4 else made_up_label(source)
        if word not in chosen:
            chosen.append(word)
    return chosen


def _level(value: float, limits: tuple[float, ...]) -> int:
    return sum(value >= limit for limit in limits)


# Topic -> (definition of each class, wordings of it in a description, class of a tile).
MEASURES: tuple[tuple[str, tuple[str, ...], tuple[tuple[str, ...], ...], Callable[[Facts], int]], ...] = (
    ("water share",
     ("Dry ground, no water surface at all", "Some water: a river, a pond or a shore", "Water covers most of the scene"),
     (("no water surface at all", "all dry ground", "nothing but dry land"), ("some water beside it", "a river, a pond or a shore in view", "some water in the scene"),
      ("water over most of the scene", "mostly water", "water almost everywhere")),
     lambda f: _level(f.water_share, (0.02, 0.6))),
    ("road density",
     ("No road or track", "A few roads cross the scene", "A dense network of streets"),
     (("no road or track", "without any road", "no road in sight"), ("a few roads across the scene", "a few single roads", "linked by a few roads"),
      ("a dense network of streets", "streets everywhere", "many streets")),
     lambda f: _level(f.road_density, (0.2, 6.0))),
    ("built-up share",
     ("No roof and no paving", "Buildings or paving on a part of the ground", "Buildings or paving almost everywhere"),
     (("no roof and no paving", "without buildings", "nothing built"), ("buildings on a part of the ground", "built on a part only", "some buildings or paving"),
      ("buildings almost everywhere", "built all over", "paving or roofs almost everywhere")),
     lambda f: _level(f.built_share, (0.005, 0.5))),
    ("cloud cover",
     ("A clear sky without cloud", "White clouds with their shadows"),
     (("under a clear sky", "without cloud", "seen in clear light"), ("under white clouds", "partly under cloud", "white clouds and their shadows above")),
     lambda f: _level(f.cloud_share, (0.005,))),
    ("ground tone",
     ("Green or dark vegetated soil", "Tan, red or yellow dry soil", "Grey rock or stony ground", "White snow and ice"),
     (("on green ground", "in green land", "on dark vegetated soil"), ("on dry yellow or red soil", "in tan dry land", "on warm dry ground"),
      ("on grey stony ground", "on grey rock", "in bare grey land"), ("in white snow", "on snow and ice", "in a white winter scene")),
     lambda f: {"temperate": 0, "tropical": 0, "arid": 1, "red_soil": 1, "steppe": 1, "grey_rock": 2, "tundra": 2, "snowy": 3}[f.biome]),
)  # fmt: skip


def reason(source: random.Random, facts: Facts, quoted: tuple[str, ...] = (), topic: str = "") -> str:
    """One sentence on what the tile shows: what it is, what is seen in it, and one measured property.

    `quoted` phrases of the scene and the property `topic` are preferred: those that the right definition names.
    """
    subjects, sights = SCENES[facts.subtype]
    subject = source.choice([phrase for phrase in subjects if phrase in quoted] or subjects)
    sight = source.choice([phrase for phrase in sights if phrase in quoted] or sights)
    measure = source.choice([entry for entry in MEASURES if entry[0] == topic] or MEASURES)
    text = source.choice(("{0} with {1}", "{0} and {1}", "{1} in {0}", "{0}, {1}")).format(subject, sight)
    if topic or source.random() < 0.8:
        text += ", " + source.choice(measure[2][measure[3](facts)])
    return _sentence(text) + "."


def _categories(source: random.Random, facts: Facts) -> tuple[str, list[str], int, str]:
    """(topic, definitions in random order, index of the right one, a reason that draws on it)."""
    if source.random() < 0.45:
        topic, definitions, _, classify = source.choice(MEASURES)
        right = definitions[classify(facts)]
        options = list(definitions)
        why = reason(source, facts, topic=topic)
    else:
        topic = source.choice(("the kind of scene", "visual morphology", "land cover", "what the image shows"))
        others = source.sample([name for name in SCENES if name != facts.subtype], source.choice((1, 1, 2, 3)))
        quoted = [_definition(source, name) for name in (facts.subtype, *others)]
        options = [_sentence(", ".join(parts)) for parts in quoted]
        right = options[0]
        why = reason(source, facts, quoted[0])
    source.shuffle(options)
    return topic, options, options.index(right), why


def _definition(source: random.Random, scene: str) -> tuple[str, ...]:
    subjects, sights = SCENES[scene]
    return source.choice(subjects), *source.sample(sights, source.randint(1, 2))


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def question(source: random.Random, facts: Facts, where: str = "", *, named: bool = True) -> tuple[str, str]:
    """A question with its own category set, and the right answer as JSON; the tokenizer's corpus has no names."""
    topic, definitions, right, why = _categories(source, facts)
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
    return prompt, json.dumps({"reason": why, "category": names[right]})


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
        "measures": {
            name: [*definitions, *(text for wordings in said for text in wordings)]
            for name, definitions, said, _ in MEASURES
        },
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
    contract = render_prompt(MISSION, None)
    for category in MISSION.names:
        contract = contract.replace(f"- {category}:", "-")
    return [_CAPITALS.sub("", text) for text in texts + [contract] * (count // 20)]
