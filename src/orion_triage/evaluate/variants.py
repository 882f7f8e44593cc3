"""The models that a run is evaluated with: each is loaded, asked all questions of the split, and let go.

From the base to what flies they make a ladder with one change a step, all decoding alike (free, greedy, without the
rule for blank frames), so that a loss has an address: training, 4-bit training, fusing, the runtime, quantization.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orion_triage.errors import OrionError
from orion_triage.progress import Progress
from orion_triage.runs import manifest

if TYPE_CHECKING:
    from orion_triage.evaluate.backends import Backend
    from orion_triage.llama_cpp.client import Client
    from orion_triage.runs.run import Run
    from orion_triage.settings import EvaluateSettings

Figures = dict[str, Any]
Evaluation = Callable[["Run", Progress], Figures]

SMALL_PAIR_BYTES = 100_000_000  # measured: 0.050 s a question with 2 servers of 1 thread, 0.075 to 0.09 with 1 of 2
SMALLEST_AGREEMENT = 0.95  # of verdicts between transformers and llama.cpp on the same 16-bit weights


def through_transformers(model: str, folder: "Callable[[Run], Path]") -> Evaluation:
    """A checkpoint as it lies in `folder`: the base, or the merged model."""

    def evaluate(run: "Run", progress: Progress) -> Figures:
        from orion_triage.evaluate.backends import TransformersBackend

        backend = TransformersBackend.load(folder(run), run.settings.evaluate, run.settings.base.frame_size)
        return ask(run, model, backend, {"model": folder(run)}, progress)

    return evaluate


def through_adapter(model: str, *, four_bit: bool) -> Evaluation:
    """The adapter on its base, before any merge: on 4-bit weights as it was trained, or on the base's own 16 bits."""

    def evaluate(run: "Run", progress: Progress) -> Figures:
        from orion_triage.evaluate.backends import TransformersBackend
        from orion_triage.models.adapter import attach_adapter, read_adapter

        def attach(base: Any) -> Any:
            return attach_adapter(base, run.adapter_to_fuse, read_adapter(run.adapter_to_fuse))[0]

        settings = run.settings
        backend = TransformersBackend.load(
            run.base, settings.evaluate, settings.base.frame_size, four_bit=four_bit, change=attach
        )
        return ask(run, model, backend, {"base": run.base, "adapter": run.adapter_to_fuse}, progress)

    return evaluate


def through_llama_cpp(
    model: str, kind: str, *, constrained: bool = False, options: Mapping[str, float] | None = None
) -> Evaluation:
    """The GGUF pair behind a server of our own: `kind` is "pair" for what flies, or a quantization of the F16 file.

    `constrained` answers are under the flight's grammar; `options` are llama.cpp's sampling settings, greedy without.
    """

    def evaluate(run: "Run", progress: Progress) -> Figures:
        from orion_triage.evaluate.backends import LlamaCppBackend
        from orion_triage.evaluate.servers import share_own

        with _served(run, kind, progress) as clients:
            gate = check_parity(run, clients[0]) if kind == "F16" else {}
            backend = share_own(
                clients,
                lambda client: LlamaCppBackend(
                    client,
                    max_new_tokens=run.settings.evaluate.max_new_tokens,
                    constrained=constrained,
                    options=options,
                    primed=True,
                ),
            )
            variant = json.dumps([kind, constrained, dict(options or {})])
            figures = ask(run, model, backend, {"model": run.pair}, progress, variant) | lost_servers(backend)
        if kind == "F16":
            gate["agreement"] = check_agreement(run, model)
            figures |= {"parity": gate}
        return figures | {"pair": run.pair_from} if run.pair_from else figures

    return evaluate


def through_verdict_only(model: str) -> Evaluation:
    """What flies, asked for the category alone: the answer is begun with an empty reason."""

    def evaluate(run: "Run", progress: Progress) -> Figures:
        from orion_triage.evaluate.backends import VerdictOnlyBackend
        from orion_triage.evaluate.servers import share_own

        with _served(run, "pair", progress) as clients:
            figures = ask(run, model, share_own(clients, VerdictOnlyBackend), {"model": run.pair}, progress, model)
        return figures | {"pair": run.pair_from} if run.pair_from else figures

    return evaluate


@contextmanager
def _served(run: "Run", kind: str, progress: Progress) -> "Iterator[list[Client]]":
    """Servers with the pair, or with a quantization that is made for the occasion and deleted after it."""
    from orion_triage.export import quantize
    from orion_triage.llama_cpp.server import Server
    from orion_triage.llama_cpp.toolchain import find_toolchain
    from orion_triage.llama_cpp.tools import quantize_file
    from orion_triage.safe.files import temporary_folder

    toolchain = find_toolchain(progress)
    logs = run.folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    with temporary_folder(run.folder, "ladder") as temporary:
        if kind == "pair":
            backbone, mmproj = quantize.find_pair(run.pair)
        else:
            quantize.check_pair(run.gguf)
            backbone, mmproj = run.gguf / quantize.F16, run.gguf / quantize.MMPROJ
            if kind != "F16":
                target = temporary / f"{kind}.gguf"
                progress(f"quantizing to {kind}", 0, 1)
                quantize_file(toolchain, backbone, target, kind)
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


def through_servers(model: str, urls: Sequence[str], settings: "EvaluateSettings") -> tuple[Evaluation, str]:
    """Servers that somebody else started (key: LLAMA_API_KEY), and a hash of what they say they serve."""
    from orion_triage.evaluate import servers

    backend, first = servers.share(urls, os.environ.get("LLAMA_API_KEY", ""), settings.max_new_tokens)

    def evaluate(run: "Run", progress: Progress) -> Figures:
        figures = ask(run, model, backend, {}, progress, first.identity)
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
    from orion_triage.dataset.records import image_path, read_split
    from orion_triage.export import parity
    from orion_triage.imagery.frames import read_frame
    from orion_triage.models.load import float32_compute, load_model, load_processor

    size, count = run.settings.base.frame_size, run.settings.ladder.parity_records
    records = read_split(run.dataset, run.split)
    spread = [records[index * len(records) // count] for index in range(min(count, len(records)))]
    processor, model = load_processor(run.merged, size), load_model(run.merged, dtype="auto")
    differences: dict[str, float] = {}
    with float32_compute(model):
        for record in spread:
            frame = read_frame(image_path(run.dataset, record), size)
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
    from orion_triage.dataset.records import read_split
    from orion_triage.evaluate.run import run as evaluate

    settings = run.settings
    hashes = manifest.hash_inputs(inputs | {"dataset": run.dataset})
    more = {"settings": json.dumps(settings.evaluate.model_dump()), "variant": variant}

    def named(description: str, done: int, total: int) -> None:
        progress(f"{description} the {model} model", done, total)

    return evaluate(
        read_split(run.dataset, run.split),
        run.dataset,
        backend,
        run.evaluation(model),
        settings.evaluate,
        settings.base.frame_size,
        fingerprint=manifest.sha256_of_listing(hashes | more),
        progress=named,
    )
