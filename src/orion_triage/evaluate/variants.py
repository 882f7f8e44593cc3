"""The variants that a run evaluates: the models between base and flight, and other decodings of the flight pair.

A row of the table defines the weights and the decoding. From the base to the flight pair, each row changes one thing
against the row before it, with the same decoding (free, greedy, without the blank rule). This shows which step loses
accuracy.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, assert_never

from orion_triage.errors import OrionError, ParityError
from orion_triage.evaluate import head
from orion_triage.imagery.frames import CAMERA_SIZE
from orion_triage.mission.mission import Mission
from orion_triage.mission.prompt import Coordinates, place_of_image, render_prompt
from orion_triage.mission.verdict import can_be_category_alone, grammars, require_category_alone
from orion_triage.progress import Progress
from orion_triage.runs import manifest
from orion_triage.safe.files import sha256_of_text, write_text
from orion_triage.safe.proxies import without_credentials
from orion_triage.safe.reading import read_object
from orion_triage.settings import FIRST_LOOK_SIZES, Settings

if TYPE_CHECKING:
    from orion_triage.evaluate.backends import Backend, TransformersBackend
    from orion_triage.llama_cpp.client import Client
    from orion_triage.llama_cpp.server import Server
    from orion_triage.runs.run import Run
    from orion_triage.settings import EvaluateSettings

Figures = dict[str, Any]

MODELS = ("base", "fine-tuned", "quantized")  # every run evaluates these
# Version of the code that prepares frames, makes questions and takes scores from answers. Increase it if a change can
# give the same model another answer. Changes of the prompt and the grammar are detected by their hashes; after a change
# of the parser, the report says which stored answers it reads otherwise ('orion report --rescore').
PROTOCOL_VERSION = 1
CONSTRAINED, VERDICT_ONLY, FIRST_LOOK, HEAD = "constrained", "verdict-only", "first-look", "head"
OTHER_PAIR, SERVER = "other-pair", "server"
SMALL_PAIR_BYTES = 100_000_000  # measured: 0.050 s per question with 2 servers of 1 thread, 0.075 to 0.09 with 1 of 2
SMALLEST_AGREEMENT = 0.95  # of verdicts between transformers and llama.cpp on the same 16-bit weights
FAILED_GATE = "failed_gate.json"  # in the folder of the F16 evaluation, instead of its manifest


@dataclass(frozen=True)
class Decoding:
    """How llama.cpp decodes: `constrained` by the flight's grammar, with sampling `options` (default: greedy).

    With `verdict_only`, the answer starts with an empty reason, and only the category is generated. With `head`, a head
    on the hidden state answers instead of the language model (see head.py). `frame_size`: pixels of the frame that is
    shown; 0: those of the model.
    """

    constrained: bool = False
    options: Mapping[str, float] = field(default_factory=dict)
    verdict_only: bool = False
    head: bool = False
    frame_size: int = 0

    def to_json(self) -> dict[str, Any]:
        """For a manifest; without a head and a frame size where there is none, as before these existed."""
        return {key: value for key, value in asdict(self).items() if key not in ("head", "frame_size") or value}


FREE = Decoding()
# Recommended for this family: nearly greedy, without unlikely tokens, with a repetition penalty.
SAMPLING = {"temperature": 0.1, "min_p": 0.15, "repeat_penalty": 1.05, "top_k": 0, "top_p": 1.0}

Weights = Literal[
    "base", "adapter on the 4-bit base", "adapter on the base", "merged", "F16", "quantized F16", "pair", "server"
]
# model: every run evaluates it. step: between models, and the flight pair; with `variants.all`. decoding: only by name.
# other: not made by this run; with `orion evaluate --gguf PAIR` and `--quantized-model URL`.
Role = Literal["model", "step", "decoding", "other"]


@dataclass(frozen=True)
class Variant:
    """One row: name, weights, decoding, and what it `changes` against `compared_with`.

    A row without `compared_with` is compared with the variant evaluated before it, in the order of the table.
    """

    name: str
    weights: Weights
    changes: str
    role: Role
    decoding: Decoding = FREE
    compared_with: str = ""

    @property
    def in_parallel(self) -> bool:
        """Whether several launched processes can share the work: possible with transformers, not with servers."""
        return self.weights in ("base", "adapter on the 4-bit base", "adapter on the base", "merged")


def table(settings: Settings) -> tuple[Variant, ...]:
    """All variants of a run with these settings, from the base to the flight pair; then the other decodings."""
    return (
        Variant("base", "base", "the base", "model"),
        Variant("adapter-4bit", "adapter on the 4-bit base", "training, on 4-bit weights", "step"),
        Variant("adapter-16bit", "adapter on the base", "the adapter on 16-bit weights", "step"),
        Variant("fine-tuned", "merged", "fusing", "model"),
        Variant("F16", "F16", "the runtime: llama.cpp", "step"),
        *(
            Variant(kind, "quantized F16", f"quantization to {kind}", "step")
            for kind in settings.variants.quantizations
        ),
        Variant("quantized", "pair", _quantization(settings), "model"),
        Variant(CONSTRAINED, "pair", "the grammar", "step", Decoding(constrained=True)),
        Variant("sampled", "pair", "sampling", "decoding", Decoding(options=SAMPLING), "quantized"),
        Variant(
            "sampled-constrained",
            "pair",
            "sampling, under the grammar",
            "decoding",
            Decoding(True, SAMPLING),
            "quantized",
        ),
        Variant(
            VERDICT_ONLY, "pair", "no reason: the category alone", "decoding", Decoding(verdict_only=True), "quantized"
        ),
        Variant(
            FIRST_LOOK,
            "pair",
            f"the category alone, of a frame of {settings.variants.first_look_size} px",
            "decoding",
            Decoding(verdict_only=True, frame_size=settings.variants.first_look_size),
            "quantized",
        ),
        Variant(HEAD, "pair", "a head instead of the language model", "decoding", Decoding(head=True), "quantized"),
        Variant(OTHER_PAIR, "pair", "another GGUF pair", "other", compared_with="quantized"),
        Variant(SERVER, "server", "a third-party server", "other", compared_with="quantized"),
    )


def _quantization(settings: Settings) -> str:
    """What quantization changes, in words."""
    chosen = settings.quantize
    matrix = "" if chosen.calibrate == "none" else " with an importance matrix"
    tower = "" if chosen.tower == "F16" else f", and of the tower to {chosen.tower}"
    return f"quantization to {chosen.type}{matrix}{tower}"


def wanted(settings: Settings) -> tuple[Variant, ...]:
    """The variants that `orion run` evaluates: the three models, and with `variants.all` the steps between them."""
    roles = ("model", "step") if settings.variants.all else ("model",)
    return tuple(variant for variant in table(settings) if variant.role in roles)


def named(settings: Settings, name: str) -> Variant:
    """The variant with this name; raises OrionError that lists the names if there is none."""
    for variant in table(settings):
        if variant.name == name:
            return variant
    names = ", ".join(variant.name for variant in table(settings))
    raise OrionError(f"there is no variant {name!r}.", f"Use one or more of {names}, or all.")


def chosen(settings: Settings, names: Sequence[str], folder: str = "RUN") -> list[Variant]:
    """The variants of the run with these names ("all": each), in the table's order; raises OrionError for others.

    `folder` is the run's, for the command in an error. "all" leaves the head out, which a run has only after 'orion
    adapt', the category alone where the mission's fields must have a value, and the first look where it is not smaller
    than the model's. By name, these are then refused.
    """
    own = [variant for variant in table(settings) if variant.role != "other"]
    if any(variant.name in names for variant in own if variant.decoding.verdict_only):
        require_category_alone(settings.mission)
    if not can_be_category_alone(settings.mission):
        own = [variant for variant in own if not variant.decoding.verdict_only]
    size, first = settings.base.frame_size, settings.variants.first_look_size
    if first >= size:
        if FIRST_LOOK in names:
            raise OrionError(
                f"a first look at {first} px is not smaller than the model's frames of {size} px.",
                f"Run 'orion evaluate --run {folder} --variants {FIRST_LOOK} --set variants.first_look_size=SIZE' with "
                f"a SIZE of {min(FIRST_LOOK_SIZES)} to {size - 32}, a multiple of 32 (below 256, it costs no less), "
                "or train with a larger base.frame_size.",
            )
        own = [variant for variant in own if variant.name != FIRST_LOOK]
    asked = (
        [variant for variant in own if not variant.decoding.head]
        if "all" in names
        else [named(settings, name) for name in names]
    )
    if strange := [variant.name for variant in asked if variant not in own]:
        raise OrionError(
            f"{strange[0]} is not a model of this run.",
            "Run 'orion evaluate --gguf PAIR' or 'orion evaluate --quantized-model URL' instead.",
        )
    return [variant for variant in own if variant in asked]


def protocol(variant: Variant, mission: Mission) -> dict[str, Any]:
    """The parts of the code that determine a variant's answers; if they change, finished answers are outdated.

    The conditions are not included: more conditions do not change the answers to the other questions.
    """
    prompts = [render_prompt(mission, None), render_prompt(mission, Coordinates(-120.625, 0.0))]
    asked = [*prompts, place_of_image(mission)]
    uses_grammar = variant.decoding.constrained or variant.decoding.verdict_only
    rules = [*grammars(mission).values()] if uses_grammar else []
    return {
        "version": PROTOCOL_VERSION,
        "prompt_sha256": sha256_of_text("\n".join(asked)),
        "grammar_sha256": sha256_of_text("\n".join(rules)) if rules else None,
        "decoding": variant.decoding.to_json(),
    }


def inputs(variant: Variant, run: "Run") -> dict[str, Path]:
    """The inputs of a variant's evaluation in addition to the dataset: name -> file or folder."""
    from orion_triage.models.load import resolve_base

    match variant.weights:
        case "base":
            return {"base": resolve_base(run.settings.base.model)}
        case "adapter on the 4-bit base" | "adapter on the base":
            return {"base": resolve_base(run.settings.base.model), "adapter": run.adapter_to_fuse}
        case "merged":
            return {"merged": run.merged}
        case "F16":  # compared with the merged model: log-probabilities and answers
            return {"F16": run.gguf, "merged": run.merged, "fine-tuned": run.evaluation("fine-tuned")}
        case "quantized F16":
            return {"F16": run.gguf}
        case "pair":
            return {"gguf": run.pair} | ({"head": head.path_in(run.folder)} if variant.decoding.head else {})
        case "server":
            return {}  # known by what it says of itself; see `through_servers`
        case _:
            assert_never(variant.weights)


def evaluate(variant: Variant, run: "Run", progress: Progress) -> Figures:
    """Load the variant, ask it all questions of the run's split, and release it; returns the metrics."""
    how = json.dumps([variant.weights, protocol(variant, run.settings.mission)])
    if variant.in_parallel:
        made_from = inputs(variant, run)
        return ask(run, variant.name, _load(variant, made_from, run.settings), made_from, progress, how)
    with _served(run, variant, progress) as servers:
        clients = [server.client for server in servers]
        with _failure_recorded(run):
            gate = check_parity(run, clients[0]) if variant.weights == "F16" else {}
        backend = _backend(variant, run, clients)
        made_from = {"model": run.pair} | ({"head": run.folder / head.FILE_NAME} if variant.decoding.head else {})
        figures = ask(run, variant.name, backend, made_from, progress, how) | lost_servers(backend)
        figures |= {"served": servers[0].said | {"servers": len(servers)}}
    if variant.weights == "F16":
        with _failure_recorded(run):
            gate["agreement"] = check_agreement(run, variant.name)
        figures |= {"parity": gate}
    return figures | {"pair": run.pair_from} if run.pair_from else figures


@contextmanager
def opened(variant: Variant, run: "Run", progress: Progress) -> "Iterator[tuple[Backend, Figures]]":
    """The variant, loaded or behind started servers, and what these servers report about themselves."""
    if variant.in_parallel:
        yield _load(variant, inputs(variant, run), run.settings), {}
        return
    with _served(run, variant, progress) as servers:
        backend = _backend(variant, run, [server.client for server in servers])
        yield backend, {"served": servers[0].said | {"servers": len(servers)}}


@contextmanager
def _failure_recorded(run: "Run") -> "Iterator[None]":
    """Record a failed gate at F16 for the verdict; without a manifest, the answers in the folder do not count.

    An evaluation that passes the gate replaces the folder, and the record with it.
    """
    try:
        yield
    except ParityError as error:
        folder = run.evaluation("F16")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / manifest.FILE_NAME).unlink(missing_ok=True)
        record = {"message": error.message, "fix": error.fix, "measured": error.measured}
        write_text(folder / FAILED_GATE, json.dumps(record, indent=2) + "\n")
        raise


def failed_gate(run: "Run") -> Figures | None:
    """{message, fix, measured} of the gate at F16 if it failed the last time; None if it passed or did not run."""
    try:
        return read_object(run.evaluation("F16") / FAILED_GATE)
    except FileNotFoundError:
        return None


def _load(variant: Variant, made_from: Mapping[str, Path], settings: Settings) -> "TransformersBackend":
    """A checkpoint in transformers; an unmerged adapter is on 4-bit weights, as trained, or on 16-bit ones."""
    from orion_triage.evaluate.backends import TransformersBackend
    from orion_triage.models.adapter import attach_adapter, read_adapter

    adapter = made_from.get("adapter")
    match variant.weights:
        case "base" | "merged" as folder:
            four_bit = False
        case "adapter on the 4-bit base" | "adapter on the base":
            folder, four_bit = "base", variant.weights == "adapter on the 4-bit base"
        case "F16" | "quantized F16" | "pair" | "server":
            raise AssertionError(f"{variant.name} is not loaded with transformers")
        case _:
            assert_never(variant.weights)
    return TransformersBackend.load(
        made_from[folder],
        settings.mission,
        settings.evaluate,
        settings.base.frame_size,
        four_bit=four_bit,
        change=(lambda base: attach_adapter(base, adapter, read_adapter(adapter))[0]) if adapter else None,
    )


def _backend(variant: Variant, run: "Run", clients: "Sequence[Client]") -> "Backend":
    from orion_triage.evaluate.backends import LlamaCppBackend, VerdictOnlyBackend
    from orion_triage.evaluate.servers import share_own

    if variant.decoding.head:
        mission = run.settings.mission
        own = head.read(run.folder, mission, run.pair, run.settings.base.frame_size)
        return share_own(clients, lambda client: head.HeadBackend(client, mission, own))
    if variant.decoding.verdict_only:
        return share_own(clients, lambda client: VerdictOnlyBackend(client, run.settings.mission))
    return share_own(
        clients,
        lambda client: LlamaCppBackend(
            client,
            run.settings.mission,
            max_new_tokens=run.settings.evaluate.max_new_tokens,
            constrained=variant.decoding.constrained,
            options=variant.decoding.options,
            primed=True,
        ),
    )


@contextmanager
def _served(run: "Run", variant: Variant, progress: Progress) -> "Iterator[list[Server]]":
    """Servers for the pair, or for a temporary quantization that is deleted afterwards."""
    from orion_triage.export import quantize
    from orion_triage.llama_cpp.server import OPTIONS, Server
    from orion_triage.llama_cpp.toolchain import find_toolchain
    from orion_triage.llama_cpp.tools import quantize_file
    from orion_triage.models.family import turn_of
    from orion_triage.safe.files import temporary_folder

    toolchain = find_toolchain(progress)
    logs = run.folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    with temporary_folder(run.folder, "variant") as temporary:
        if variant.weights == "pair":
            backbone, mmproj = quantize.find_pair(run.pair)
        else:
            quantize.check_pair(run.gguf)
            backbone, mmproj = run.gguf / quantize.F16, run.gguf / quantize.MMPROJ
            if variant.weights != "F16":
                target = temporary / f"{variant.name}.gguf"
                progress(f"quantizing to {variant.name}", 0, 1)
                quantize_file(toolchain, backbone, target, variant.name)
                backbone = target
        turn = turn_of(backbone)
        count, threads = how_many_servers(run.settings.evaluate, backbone.stat().st_size + mmproj.stat().st_size)
        with ExitStack() as stack:
            yield [
                stack.enter_context(
                    Server(
                        toolchain,
                        backbone,
                        mmproj,
                        log=logs / f"evaluate-server-{number}.log",
                        turn=turn,
                        threads=threads,
                        options=head.EMBEDDING if variant.decoding.head else OPTIONS,
                    )
                )
                for number in range(count)
            ]


def how_many_servers(settings: "EvaluateSettings", pair_bytes: int) -> tuple[int, int | None]:
    """(number of servers, threads per server or None for llama.cpp's default)."""
    cores = len(os.sched_getaffinity(0))
    shared = max(1, cores // (settings.threads or 1)) if pair_bytes < SMALL_PAIR_BYTES else 1
    count = settings.servers or shared
    return count, settings.threads or (1 if count > 1 else None)


def through_servers(urls: Sequence[str], run: "Run") -> tuple[Callable[[Progress], Figures], str]:
    """The model of third-party servers (key: LLAMA_API_KEY).

    Returns a function that evaluates it, and a hash of the model's properties from the servers.
    """
    from orion_triage.evaluate import servers

    settings, key = run.settings.evaluate, os.environ.get("LLAMA_API_KEY", "")
    backend, first = servers.share(urls, key, run.settings.mission, settings.max_new_tokens)

    def evaluate(progress: Progress) -> Figures:
        figures = ask(run, SERVER, backend, {}, progress, first.identity)
        served = {
            "server": ", ".join(map(without_credentials, urls)),
            "served_model": first.model,
            "server_build": first.build,
        }
        return figures | served | {"served": dict(first.said)} | lost_servers(backend)

    return evaluate, first.identity


def frame_size(variant: Variant, settings: Settings) -> int:
    """The size of the frames that a variant is shown: the model's, or that of a first look.

    A head divides the camera's frame itself.
    """
    return CAMERA_SIZE if variant.decoding.head else variant.decoding.frame_size or settings.base.frame_size


def lost_servers(backend: "Backend") -> Figures:
    """A warning for each server that was left out while others continued."""
    lost = [f"left out: {why}" for why in getattr(backend, "lost", [])]
    return {"warnings": lost} if lost else {}


def check_parity(run: "Run", client: "Client") -> Figures:
    """Compare llama.cpp on the F16 pair with transformers on the merged weights: prompt, tokens, log-probabilities.

    Raises ParityError that names the difference.
    """
    from orion_triage.dataset.dataset import Dataset
    from orion_triage.export import parity
    from orion_triage.imagery.frames import Frame
    from orion_triage.models.load import float32_compute, load_model, load_processor

    size, count = run.settings.base.frame_size, run.settings.variants.parity_records
    dataset = Dataset(run.dataset, run.settings.mission)
    records = dataset.records(run.split)
    spread = [records[index * len(records) // count] for index in range(min(count, len(records)))]
    processor, model = load_processor(run.merged, size), load_model(run.merged, dtype="auto")
    differences: dict[str, float] = {}
    with float32_compute(model):
        for record in spread:
            frame = Frame(dataset.frame(record, size), (size, size))
            for text in (record.user_text, record.without_coordinates().user_text):
                difference = parity.largest_difference(model, processor, client, frame, text)
                differences[record.name] = max(difference, differences.get(record.name, 0.0))
    worst = max(differences, key=lambda name: differences[name])
    if differences[worst] > parity.LARGEST_DIFFERENCE:
        raise ParityError(
            f"llama.cpp's next-token log-probabilities differ from transformers' by {differences[worst]:.4f} on "
            f"{worst}; {parity.LARGEST_DIFFERENCE} is allowed.",
            "Use another llama.cpp build (ORION_LLAMA_CPP, see docs/quantization.md).",
            f"{differences[worst]:.4f} nats apart",
        )
    return {"frames": len(differences), "largest_difference": round(differences[worst], 6)}


def check_agreement(run: "Run", model: str) -> float:
    """The share of questions with the same category from `model` and the merged model.

    Raises ParityError below 95 %.
    """
    from orion_triage.evaluate.run import read_predictions

    ours = {row["id"]: row["category"] for row in read_predictions(run.evaluation("fine-tuned"), run.settings.mission)}
    theirs = {row["id"]: row["category"] for row in read_predictions(run.evaluation(model), run.settings.mission)}
    other = [name for name in ours if ours[name] != theirs[name]]
    share = 1 - len(other) / len(ours)
    if share < SMALLEST_AGREEMENT:
        raise ParityError(
            f"llama.cpp's F16 model gives another category than transformers for {len(other)} of {len(ours)} "
            f"questions, for example {other[0]} ({theirs[other[0]]} instead of {ours[other[0]]}); "
            f"{SMALLEST_AGREEMENT:.0%} must agree.",
            "Compare the predictions.jsonl of both variants, and read docs/quantization.md.",
            f"{share:.1%} agree",
        )
    return round(share, 6)


def ask(
    run: "Run", model: str, backend: "Backend", inputs: dict[str, Path], progress: Progress, variant: str = ""
) -> Figures:
    """Ask one model all questions of the run's split; `inputs` and `variant` identify its bytes."""
    from orion_triage.dataset.dataset import Dataset
    from orion_triage.evaluate.run import run as evaluate

    settings = run.settings
    hashes = manifest.hash_inputs(inputs | {"dataset": run.dataset})
    more = {"settings": json.dumps(settings.evaluate.model_dump()), "variant": variant}

    def of_the_model(description: str, done: int, total: int) -> None:
        progress(f"{description} the {model} model", done, total)

    return evaluate(
        Dataset(run.dataset, run.settings.mission),
        run.split,
        backend,
        run.evaluation(model),
        settings.evaluate,
        frame_size(named(settings, model), settings),
        fingerprint=manifest.sha256_of_listing(hashes | more),
        progress=of_the_model,
    )
