"""The variants that a run is evaluated with: the models between base and flight, and other ways to decode what flies.

A row of the table says what answers and how. From the base to what flies each row changes one thing against the row
before it, all decoding alike (free, greedy, without the rule for blank frames): this shows which step loses accuracy.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, assert_never

from orion_triage.errors import OrionError
from orion_triage.mission.prompt import IMAGE_PLACEHOLDER, Coordinates, render_prompt
from orion_triage.mission.verdict import CATEGORY_GRAMMAR, GRAMMAR
from orion_triage.progress import Progress
from orion_triage.runs import manifest
from orion_triage.safe.files import sha256_of_text
from orion_triage.settings import Settings

if TYPE_CHECKING:
    from orion_triage.evaluate.backends import Backend, TransformersBackend
    from orion_triage.llama_cpp.client import Client
    from orion_triage.runs.run import Run
    from orion_triage.settings import EvaluateSettings

Figures = dict[str, Any]

MODELS = ("base", "fine-tuned", "quantized")  # what every run evaluates
# Of how answers are parsed and scored, frames prepared and questions made; the prompt's and grammar's bytes count by
# themselves. Raise it when a change of those can give the same model another answer.
PROTOCOL_VERSION = 1
CONSTRAINED, VERDICT_ONLY = "constrained", "verdict-only"
SMALL_PAIR_BYTES = 100_000_000  # measured: 0.050 s a question with 2 servers of 1 thread, 0.075 to 0.09 with 1 of 2
SMALLEST_AGREEMENT = 0.95  # of verdicts between transformers and llama.cpp on the same 16-bit weights


@dataclass(frozen=True)
class Decoding:
    """How llama.cpp is asked: `constrained` to the flight's grammar, with sampling `options` (greedy without).

    With `verdict_only` the answer is begun with an empty reason, and the category alone is asked for.
    """

    constrained: bool = False
    options: Mapping[str, float] = field(default_factory=dict)
    verdict_only: bool = False


FREE = Decoding()
# Said to matter for this family: nearly greedy, without the unlikely, and without repetition.
SAMPLING = {"temperature": 0.1, "min_p": 0.15, "repeat_penalty": 1.05, "top_k": 0, "top_p": 1.0}

Weights = Literal["base", "adapter on the 4-bit base", "adapter on the base", "merged", "F16", "quantized F16", "pair"]
# model: every run evaluates it. step: between those, and what flies; with `variants.all`. decoding: when asked by name.
Role = Literal["model", "step", "decoding"]


@dataclass(frozen=True)
class Variant:
    """One row: a name, the weights that answer, how they decode, and what `changes` against `compared_with`.

    The table's order decides what a row without `compared_with` is compared with: the one evaluated before it.
    """

    name: str
    weights: Weights
    changes: str
    role: Role
    decoding: Decoding = FREE
    compared_with: str = ""

    @property
    def in_parallel(self) -> bool:
        """Whether several launched processes can share the work: transformers' models can, servers cannot."""
        return self.weights in ("base", "adapter on the 4-bit base", "adapter on the base", "merged")


def table(settings: Settings) -> tuple[Variant, ...]:
    """All variants that a run with these settings knows, from the base to what flies; then the other decodings."""
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
        Variant("quantized", "pair", f"quantization to {settings.quantize.type}", "model"),
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
    )


def wanted(settings: Settings) -> tuple[Variant, ...]:
    """What `orion run` evaluates: the three models, and with `variants.all` the steps between them."""
    roles = ("model", "step") if settings.variants.all else ("model",)
    return tuple(variant for variant in table(settings) if variant.role in roles)


def named(settings: Settings, name: str) -> Variant:
    """Raises OrionError, with the names that there are, for one that is not in the table."""
    for variant in table(settings):
        if variant.name == name:
            return variant
    names = ", ".join(variant.name for variant in table(settings))
    raise OrionError(f"{name!r} is no variant.", f"Name some of {names}; or all.")


def chosen(settings: Settings, names: Sequence[str]) -> list[Variant]:
    """Those of these names, in the table's order; of "all", every one. Raises OrionError for an unknown name."""
    if "all" in names:
        return list(table(settings))
    asked = [named(settings, name) for name in names]
    return [variant for variant in table(settings) if variant in asked]


def protocol(variant: Variant) -> dict[str, Any]:
    """What of the code decides a variant's answers: another value means that finished answers are not ours any more.

    Conditions are not part of it: answers to the questions that were asked stay what they are when more are asked.
    """
    asked = [render_prompt(None), render_prompt(Coordinates(-120.625, 0.0)), IMAGE_PLACEHOLDER]
    grammars = [GRAMMAR, CATEGORY_GRAMMAR] if variant.decoding.constrained or variant.decoding.verdict_only else []
    return {
        "version": PROTOCOL_VERSION,
        "prompt_sha256": sha256_of_text("\n".join(asked)),
        "grammar_sha256": sha256_of_text("\n".join(grammars)) if grammars else None,
        "decoding": asdict(variant.decoding),
    }


def inputs(variant: Variant, run: "Run") -> dict[str, Path]:
    """What the answers are made from, besides the dataset: name -> file or folder."""
    from orion_triage.models.load import resolve_base

    match variant.weights:
        case "base":
            return {"base": resolve_base(run.settings.base.model)}
        case "adapter on the 4-bit base" | "adapter on the base":
            return {"base": resolve_base(run.settings.base.model), "adapter": run.adapter_to_fuse}
        case "merged":
            return {"merged": run.merged}
        case "F16":  # compared with the merged model, weight by weight and answer by answer
            return {"F16": run.gguf, "merged": run.merged, "fine-tuned": run.evaluation("fine-tuned")}
        case "quantized F16":
            return {"F16": run.gguf}
        case "pair":
            return {"gguf": run.pair}
        case _:
            assert_never(variant.weights)


def evaluate(variant: Variant, run: "Run", progress: Progress) -> Figures:
    """Load what answers, ask it all questions of the run's split, and let it go; returns the evaluation's metrics."""
    if variant.in_parallel:
        return ask(run, variant.name, _load(variant, run), inputs(variant, run), progress)
    with _served(run, variant, progress) as clients:
        gate = check_parity(run, clients[0]) if variant.weights == "F16" else {}
        backend = _backend(variant, run, clients)
        decoding = variant.decoding
        how = json.dumps([variant.weights, variant.name, decoding.constrained, dict(decoding.options)])
        figures = ask(run, variant.name, backend, {"model": run.pair}, progress, how) | lost_servers(backend)
    if variant.weights == "F16":
        gate["agreement"] = check_agreement(run, variant.name)
        figures |= {"parity": gate}
    return figures | {"pair": run.pair_from} if run.pair_from else figures


def _load(variant: Variant, run: "Run") -> "TransformersBackend":
    """A checkpoint through transformers; the adapter without merging, on 4-bit weights as it was trained or on 16."""
    from orion_triage.evaluate.backends import TransformersBackend
    from orion_triage.models.adapter import attach_adapter, read_adapter
    from orion_triage.models.load import resolve_base

    def attach(base: Any) -> Any:
        return attach_adapter(base, run.adapter_to_fuse, read_adapter(run.adapter_to_fuse))[0]

    folder = run.merged if variant.weights == "merged" else resolve_base(run.settings.base.model)
    return TransformersBackend.load(
        folder,
        run.settings.evaluate,
        run.settings.base.frame_size,
        four_bit=variant.weights == "adapter on the 4-bit base",
        change=attach if "adapter" in variant.weights else None,
    )


def _backend(variant: Variant, run: "Run", clients: "Sequence[Client]") -> "Backend":
    from orion_triage.evaluate.backends import LlamaCppBackend, VerdictOnlyBackend
    from orion_triage.evaluate.servers import share_own

    if variant.decoding.verdict_only:
        return share_own(clients, VerdictOnlyBackend)
    return share_own(
        clients,
        lambda client: LlamaCppBackend(
            client,
            max_new_tokens=run.settings.evaluate.max_new_tokens,
            constrained=variant.decoding.constrained,
            options=variant.decoding.options,
            primed=True,
        ),
    )


@contextmanager
def _served(run: "Run", variant: Variant, progress: Progress) -> "Iterator[list[Client]]":
    """Servers with the pair, or with a quantization that is made for the occasion and deleted after it."""
    from orion_triage.export import quantize
    from orion_triage.llama_cpp.server import Server
    from orion_triage.llama_cpp.toolchain import find_toolchain
    from orion_triage.llama_cpp.tools import quantize_file
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
        count, threads = how_many_servers(run.settings.evaluate, backbone.stat().st_size + mmproj.stat().st_size)
        with ExitStack() as stack:
            yield [
                stack.enter_context(
                    Server(toolchain, backbone, mmproj, log=logs / f"evaluate-server-{number}.log", threads=threads)
                ).client
                for number in range(count)
            ]


def how_many_servers(settings: "EvaluateSettings", pair_bytes: int) -> tuple[int, int | None]:
    """(servers, threads of each or llama.cpp's own choice)."""
    cores = len(os.sched_getaffinity(0))
    shared = max(1, cores // (settings.threads or 1)) if pair_bytes < SMALL_PAIR_BYTES else 1
    count = settings.servers or shared
    return count, settings.threads or (1 if count > 1 else None)


def through_servers(urls: Sequence[str], run: "Run") -> tuple[Callable[[Progress], Figures], str]:
    """The quantized model behind servers that somebody else started (key: LLAMA_API_KEY).

    Returns what evaluates it, and a hash of what the servers say they serve.
    """
    from orion_triage.evaluate import servers

    settings = run.settings.evaluate
    backend, first = servers.share(urls, os.environ.get("LLAMA_API_KEY", ""), settings.max_new_tokens)

    def evaluate(progress: Progress) -> Figures:
        figures = ask(run, "quantized", backend, {}, progress, first.identity)
        served = {"server": ", ".join(urls), "served_model": first.model, "server_build": first.build}
        return figures | served | lost_servers(backend)

    return evaluate, first.identity


def lost_servers(backend: "Backend") -> Figures:
    """A warning for each server that was left out while others went on."""
    lost = [f"left out: {why}" for why in getattr(backend, "lost", [])]
    return {"warnings": lost} if lost else {}


def check_parity(run: "Run", client: "Client") -> Figures:
    """llama.cpp on the F16 pair against transformers on the merged weights: prompt, tokens, log-probabilities.

    Raises OrionError naming what differs: then no quantized result of this run means what it says.
    """
    from orion_triage.dataset.dataset import Dataset
    from orion_triage.export import parity
    from orion_triage.imagery.frames import Frame
    from orion_triage.models.load import float32_compute, load_model, load_processor

    size, count = run.settings.base.frame_size, run.settings.variants.parity_records
    dataset = Dataset(run.dataset)
    records = dataset.records(run.split)
    spread = [records[index * len(records) // count] for index in range(min(count, len(records)))]
    processor, model = load_processor(run.merged, size), load_model(run.merged, dtype="auto")
    differences: dict[str, float] = {}
    with float32_compute(model):
        for record in spread:
            frame = Frame(dataset.frame(record, size), (size, size))
            for prompt in (record.prompt, record.without_coordinates().prompt):
                difference = parity.largest_difference(model, processor, client, frame, prompt)
                differences[record.name] = max(difference, differences.get(record.name, 0.0))
    worst = max(differences, key=lambda name: differences[name])
    if differences[worst] > parity.LARGEST_DIFFERENCE:
        raise OrionError(
            f"llama.cpp's next-token log-probabilities differ from transformers' by {differences[worst]:.4f} on "
            f"{worst}; {parity.LARGEST_DIFFERENCE} is allowed.",
            "The runtime does not compute this model: try another build (ORION_LLAMA_CPP); see docs/quantization.md.",
        )
    return {"frames": len(differences), "largest_difference": round(differences[worst], 6)}


def check_agreement(run: "Run", model: str) -> float:
    """The share of questions with the same category from `model` as from the merged model; raises below 95 %."""
    from orion_triage.evaluate.run import read_predictions

    ours = {row["id"]: row["category"] for row in read_predictions(run.evaluation("fine-tuned"))}
    theirs = {row["id"]: row["category"] for row in read_predictions(run.evaluation(model))}
    other = [name for name in ours if ours[name] != theirs[name]]
    share = 1 - len(other) / len(ours)
    if share < SMALLEST_AGREEMENT:
        raise OrionError(
            f"llama.cpp's F16 answers {len(other)} of {len(ours)} questions otherwise than transformers, {other[0]} "
            f"first ({theirs[other[0]]} instead of {ours[other[0]]}); {SMALLEST_AGREEMENT:.0%} must agree.",
            "Compare the two predictions.jsonl; see docs/quantization.md.",
        )
    return round(share, 6)


def ask(
    run: "Run", model: str, backend: "Backend", inputs: dict[str, Path], progress: Progress, variant: str = ""
) -> Figures:
    """All questions of the run's split to one model; `inputs` and `variant` say which bytes answer."""
    from orion_triage.dataset.dataset import Dataset
    from orion_triage.evaluate.run import run as evaluate

    settings = run.settings
    hashes = manifest.hash_inputs(inputs | {"dataset": run.dataset})
    more = {"settings": json.dumps(settings.evaluate.model_dump()), "variant": variant}

    def named(description: str, done: int, total: int) -> None:
        progress(f"{description} the {model} model", done, total)

    return evaluate(
        Dataset(run.dataset),
        run.split,
        backend,
        run.evaluation(model),
        settings.evaluate,
        settings.base.frame_size,
        fingerprint=manifest.sha256_of_listing(hashes | more),
        progress=named,
    )
