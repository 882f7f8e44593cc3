"""Benchmark one frame with a run's GGUF pair on this machine: time of each part, peak memory, and accuracy.

First the flight configuration is measured. Then one thing is changed at a time: input size (with either mmproj),
quantization, flash attention, length of the reason. Each has a separate llama-server, so peak memory is measured per
configuration.
"""

import io
import itertools
import json
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orion_triage.errors import OrionError, ServerError
from orion_triage.evaluate.backends import LlamaCppBackend, ask_for_category
from orion_triage.evaluate.results import BENCH_FILE
from orion_triage.evaluate.variants import CONSTRAINED, VERDICT_ONLY
from orion_triage.export import quantize
from orion_triage.export.convert import convert
from orion_triage.flight import bundle, tune
from orion_triage.flight.check_flight import NoGoError
from orion_triage.flight.server_flags import MMPROJ
from orion_triage.imagery.frames import Frame, shrink
from orion_triage.llama_cpp.server import OPTIONS, Server
from orion_triage.llama_cpp.toolchain import Toolchain, existing_tools, fetch_source, find_toolchain
from orion_triage.llama_cpp.tools import quantize_file
from orion_triage.machine import power
from orion_triage.machine.describe import describe
from orion_triage.mission.fields import examples
from orion_triage.mission.mission import Mission
from orion_triage.mission.prompt import user_text
from orion_triage.mission.verdict import Verdict, answer_text, answer_tokens, can_be_category_alone
from orion_triage.models.family import turn_of
from orion_triage.progress import Progress, silent
from orion_triage.runs import manifest
from orion_triage.safe.files import locked, sha256_of_file, temporary_folder, write_text
from orion_triage.settings import FIRST_LOOK_SIZES

if TYPE_CHECKING:
    from PIL import Image

    from orion_triage.llama_cpp.client import Client
    from orion_triage.runs.run import Run

SIZES = (512, 384, 256)
MMPROJS = ("F16", "Q8_0")
REASON_TOKENS = (20, 40)  # in addition to the model's median length; the catalogue's reasons have 11 to 21
REPEATS, LOG = 3, "bench-frame-server.log"
CONDITIONS = ("A", "B")  # with coordinates, and without (as in flight)
_WORDS = {  # option -> allowed values, and the fix in an error
    "input size": ("|".join(map(str, (*FIRST_LOOK_SIZES, 512))), "Use a multiple of 32 from 128 to 512 (pixels)."),
    "mmproj": (r"F16|Q8_0", "Use F16 or Q8_0."),
    "quantization": (r"F16|[IT]?Q\d[A-Z0-9_]*", "Use F16 or a type of llama-quantize, such as Q8_0 or Q3_K_M."),
    "length": (r"[1-9]\d?\d?", "Use 1 to 999 (tokens of a reason)."),
}
FLIGHT = "flight configuration"  # the change of the first row
_VERBOSITY = "4"  # from which on the server's log has a time stamp before and after each image is encoded
_STAMP = r"^(\d+)\.(\d\d)\.(\d\d\d)\.(\d\d\d) \S .*"  # minutes.seconds.milliseconds.microseconds
_ENCODING, _ENCODED = (re.compile(_STAMP + what) for what in ("encoding mtmd batch", "decoding image batch 1/"))
# Allows any number of tokens: the beginning of an answer, then a reason that does not end.
_OPEN_GRAMMAR = 'root ::= "{\\"reason\\": \\"" [ !#-\\[\\]-~]*\n'
USUAL_REASON_TOKENS = 20  # without an evaluation that shows the model's median length
_FLOWN = (CONSTRAINED, "quantized")  # with the grammar, as in flight; else without


@dataclass(frozen=True)
class Setup:
    """The configuration of a server, and the size of the frames that it gets."""

    frame_size: int
    quantization: str
    mmproj: str = "F16"
    flash_attention: bool = False


@dataclass(frozen=True)
class Row:
    """One measured configuration: medians of the parts of a frame, and its accuracy if it was evaluated.

    `prefill_seconds` is the time of a frame without encoding and decoding: reading the tokens of image and text, the
    PNG, the request. `reason_tokens` is 0 for the verdict alone.
    """

    run: str
    change: str  # against the flight configuration, as text
    frame_size: int
    quantization: str
    mmproj: str
    flash_attention: bool
    reason_tokens: int
    prompt_tokens: int
    tokens_read: int  # of the prompt, per frame; the rest is the text before the image, which is read once
    answer_tokens: int
    encode_seconds: float
    prefill_seconds: float
    decode_seconds: float
    seconds_per_frame: float
    decode_seconds_per_token: float | None
    peak_memory_bytes: int
    evaluation: str | None = None  # the variant's name in the run's evaluations; None: not evaluated
    right: dict[str, int] | None = None  # by condition
    count: dict[str, int] | None = None
    best: bool = False  # no other evaluated row is at least as fast and as accurate (B), and better in one of both

    @property
    def accuracy(self) -> float | None:
        """The accuracy under B, without coordinates, as in flight; None if not evaluated."""
        return self.right["B"] / self.count["B"] if self.right and self.count else None


def parse_list(text: str, what: str) -> list[str]:
    """The values of "a,b,c"; `what` is "input size", "mmproj", "quantization" or "length".

    Raises OrionError for an invalid value.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    pattern, fix = _WORDS[what]
    if unknown := [word for word in words if not re.fullmatch(pattern, word)]:
        raise OrionError(f"{unknown[0]!r} is not a valid {what}.", fix)
    return words


def run(
    runs: Sequence["Run"],
    *,
    sizes: Sequence[int] = (),
    mmprojs: Sequence[str] = MMPROJS,
    quantizations: Sequence[str] = (),
    reason_tokens: Sequence[int] = REASON_TOKENS,
    repeats: int = REPEATS,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measure the runs' pairs; returns `rows` (see Row), the skipped configurations (`left_out`), and the `machine`.

    `same_frames` is false if the runs were evaluated on different frames, so that their accuracies are not comparable.

    The flight configuration of each run is always measured. Without `sizes`, a single run is measured at all of SIZES,
    and several runs at their own size. Without `quantizations`, the run's `variants.quantizations` are made. Raises
    OrionError for a pair that is incomplete or changed, and ServerError if a frame was not encoded exactly once.
    """
    pairs = [quantize.check_pair(one.gguf) for one in runs]
    toolchain = existing_tools() or find_toolchain(progress)
    machine = {**describe(), "busy_cores": round(tune.busy_cores(tune.BUSY_SECONDS), 2)}
    shown = sizes or (SIZES if len(runs) == 1 else ())
    plans = [plan(one, shown, mmprojs, quantizations or one.settings.variants.quantizations) for one in runs]
    board = power.board_of(machine["processor"])
    total, done = sum(map(len, plans)), 0
    rows: list[Row] = []
    left_out: list[str] = []
    in_flight: dict[str, float] = {}
    for one, pair, setups in zip(runs, pairs, plans, strict=True):
        with locked(one.folder, "orion bench-frame"), temporary_folder(one.folder, "bench") as temporary:
            files = _Files(one, pair, toolchain, temporary)
            tokens = 0
            for setup in setups:
                change = changed(setups[0], setup)
                progress(f"{one.folder.name}: {change}", done, total)
                done += 1
                try:
                    backbone, mmproj = files.backbone(setup.quantization), files.mmproj(setup.mmproj)
                except FileNotFoundError as error:
                    left_out.append(f"{one.folder}: {change}: {error}")
                    continue
                except OrionError as error:  # such as a type that llama-quantize does not make
                    left_out.append(f"{one.folder}: {change}: {error.message}")
                    continue
                with serve(one, toolchain, backbone, mmproj, setup) as server:
                    asked = Asked(server, one, setup, repeats)
                    tokens = tokens or _own_answer_tokens(one, server.client)
                    rows.append(asked.with_reason(change, tokens, own=True))
                    if setup == setups[0]:
                        if can_be_category_alone(one.settings.mission):
                            rows.append(asked.without_reason())
                        rows += [
                            asked.with_reason(f"reason of {count} tokens", asked.frame_tokens + count)
                            for count in reason_tokens
                        ]
                        in_flight[str(one.folder)] = asked.in_flight()
            measured = {
                "seconds_per_frame": in_flight[str(one.folder)],
                "processor": machine["processor"],
                "busy_cores": machine["busy_cores"],
                "pair_sha256": sha256_of_file(one.gguf / quantize.PAIR),
            }
            write_text(one.folder / BENCH_FILE, json.dumps(measured, indent=2) + "\n")  # for the verdict
    progress("measuring", total, total)
    return {
        "machine": machine,
        "repeats": repeats,
        "conditions": list(CONDITIONS),
        "rows": [asdict(row) for row in mark_best(rows)],
        "in_flight_seconds_per_frame": in_flight,
        "in_flight_cost": {name: power.cost_of((seconds, seconds), board) for name, seconds in in_flight.items()},
        "same_frames": len({frames for one in runs if (frames := _evaluated_frames(one))}) < 2,
        "left_out": left_out,
    }


def tuned(run: "Run", *, minutes: float = tune.MINUTES, progress: Progress = silent) -> dict[str, Any]:
    """The report of tune.py for a temporary bundle of the run on this machine; its results stay in the run's folder.

    With the vision tower as Q8_0, too, unless that flies already or the merged weights are missing. Raises OrionError
    if the run cannot be bundled, or the default flags already fail on its golden frames.
    """
    toolchain = find_toolchain(progress)
    has_weights = any(run.merged.glob("*.safetensors"))
    has_another = quantize.check_pair(run.gguf).mmproj.name != bundle.SECOND_TOWER
    with locked(run.folder, "orion bench-frame"), temporary_folder(run.folder, "tune") as temporary:
        folder = temporary / "bundle"
        second = has_weights and has_another
        bundle.run(run, folder, progress, accepted_risk="measured, not flown", second_tower=second)
        try:
            results = run.folder / tune.RESULTS
            report = tune.Tuning(folder, toolchain.llama_server, results, minutes=minutes, progress=progress).run()
        except (tune.TuneError, NoGoError) as error:
            raise OrionError(f"{run.folder}: {error}.", "Allow more with --minutes, or make the pair again.") from None
    if has_another and not has_weights:
        why = f"{run.merged.name} has no weights (removed by 'orion clean'?)"
        report["not_measured"].append({"change": f"{MMPROJ} {bundle.SECOND_TOWER}", "why": why})
    return {"run": str(run.folder), **report}


def plan(run: "Run", sizes: Sequence[int], mmprojs: Sequence[str], quantizations: Sequence[str]) -> list[Setup]:
    """The distinct configurations to measure for one run, the flight configuration first."""
    flown = _flown(run)
    of_images = [
        replace(flown, frame_size=size, mmproj=mmproj)
        for size in (flown.frame_size, *sizes)
        for mmproj in (flown.mmproj, *mmprojs)
    ]
    others = [replace(flown, quantization=kind) for kind in quantizations]
    return list(dict.fromkeys([flown, *of_images, *others, replace(flown, flash_attention=True)]))


def _flown(run: "Run") -> Setup:
    """The flight configuration of a run."""
    return Setup(run.settings.base.frame_size, run.settings.quantize.type, run.settings.quantize.tower)


def changed(flown: Setup, setup: Setup) -> str:
    """The differences between `setup` and the flight configuration `flown`, as text."""
    parts = [
        f"{setup.frame_size} px" if setup.frame_size != flown.frame_size else "",
        setup.quantization if setup.quantization != flown.quantization else "",
        f"mmproj {setup.mmproj}" if setup.mmproj != flown.mmproj else "",
        "flash attention" if setup.flash_attention != flown.flash_attention else "",
    ]
    return ", ".join(filter(None, parts)) or FLIGHT


def mark_best(rows: Sequence[Row]) -> list[Row]:
    """The rows with `best` set for the Pareto set of seconds per frame and accuracy under B, of the evaluated rows."""

    def beaten(row: Row, by: Row) -> bool:
        assert row.accuracy is not None
        assert by.accuracy is not None
        no_worse = by.seconds_per_frame <= row.seconds_per_frame and by.accuracy >= row.accuracy
        return no_worse and (by.seconds_per_frame, by.accuracy) != (row.seconds_per_frame, row.accuracy)

    evaluated = [row for row in rows if row.accuracy is not None]
    return [replace(row, best=row in evaluated and not any(beaten(row, by) for by in evaluated)) for row in rows]


# --- files ------------------------------------------------------------------------------------------------------------


class _Files:
    """The GGUF files of one run; missing ones are made once, in a temporary folder.

    Raises FileNotFoundError with a message if this needs files that 'orion clean' has removed.
    """

    def __init__(self, run: "Run", pair: quantize.Pair, toolchain: "Toolchain", temporary: Path) -> None:
        self._run, self._pair, self._toolchain, self._temporary = run, pair, toolchain, temporary

    def backbone(self, kind: str) -> Path:
        if kind == self._pair.type:
            return self._pair.backbone
        f16 = self._run.gguf / quantize.F16
        if not f16.is_file():
            raise FileNotFoundError(
                f"{f16.name} does not exist (removed by 'orion clean'?). Run 'orion quantize --force' to make it again."
            )
        return f16 if kind == "F16" else self._made(kind, lambda path: self._quantize(f16, path, kind))

    def mmproj(self, kind: str) -> Path:
        if kind == self._pair.tower:
            return self._pair.mmproj
        if kind == "F16" and (beside := self._run.gguf / quantize.MMPROJ).is_file():
            return beside
        if not any(self._run.merged.glob("*.safetensors")):
            merged = self._run.merged.name
            raise FileNotFoundError(
                f"{merged} has no weights (removed by 'orion clean'?). Run 'orion fuse --force' to make them again."
            )
        return self._made(f"mmproj-{kind}", lambda path: self._convert(path, kind))

    def _made(self, name: str, make: Callable[[Path], object]) -> Path:
        path = self._temporary / f"{name}.gguf"
        if not path.exists():
            make(path)
        return path

    def _quantize(self, f16: Path, path: Path, kind: str) -> None:
        quantize_file(self._toolchain, f16, path, kind)

    def _convert(self, path: Path, kind: str) -> None:
        fetch_source()  # for the converter; the tools may be the user's
        convert(self._toolchain, self._run.merged, path, mmproj=True, outtype=kind.lower())


# --- asking -----------------------------------------------------------------------------------------------------------


def serve(
    run: "Run", toolchain: "Toolchain", backbone: Path, mmproj: Path, setup: Setup, more: Sequence[str] = ()
) -> "Server":
    """A server with the flight options and the changes of `setup`; its log has time stamps of the image encoding.

    The options `more` come last, and replace others of the same name.
    """
    log, threads = run.folder / "logs" / LOG, run.settings.evaluate.threads
    options = [*_options(setup), *more]
    return Server(toolchain, backbone, mmproj, log=log, turn=turn_of(backbone), threads=threads, options=options)


def _options(setup: Setup) -> list[str]:
    """The options of llama-server, with time stamps in the log."""
    options = [*OPTIONS, "--log-timestamps", "--log-prefix"]
    options[options.index("--flash-attn") + 1] = "on" if setup.flash_attention else "off"
    options[options.index("--log-verbosity") + 1] = _VERBOSITY
    return options


class Asked:
    """Measurements on one server; every frame is new to it, so each is encoded."""

    def __init__(self, server: "Server", run: "Run", setup: Setup, repeats: int) -> None:
        self._server, self._run, self._setup, self._repeats = server, run, setup, repeats
        self._frames = frames_of(setup.frame_size)
        self._mission = run.settings.mission
        self._text = user_text(self._mission, None)
        self.frame_tokens = _tokens(server.client, _empty_answer(self._mission))
        self._peak_memory_bytes = 0
        self._complete(next(self._frames), 4)  # warm-up: the first frame includes one-time costs

    def with_reason(self, change: str, answer_tokens: int, *, own: bool = False) -> Row:
        """Measure answers of exactly `answer_tokens` tokens, so that all rows have equal work."""
        row = self._measure(change, answer_tokens, lambda png: self._complete(png, answer_tokens))
        return _beside_accuracy(row, self._run, self._setup) if own else row

    def without_reason(self) -> Row:
        """Measure answers with only the category."""

        def ask(png: bytes) -> dict[str, Any]:
            kept = self._server.client.keep_text(self._text)
            return ask_for_category(self._server.client, self._mission, self._text, png, cache_prompt=kept)

        row = self._measure(VERDICT_ONLY, 1, ask)
        return _beside_accuracy(row, self._run, self._setup, VERDICT_ONLY)

    def in_flight(self) -> float:
        """Seconds per frame as in 'orion triage': with the grammar and reasons of the model's own length."""
        mission = self._mission
        backend = LlamaCppBackend(self._server.client, mission, max_new_tokens=answer_tokens(mission), constrained=True)
        seconds = []
        for _ in range(self._repeats):
            image = _decoded(next(self._frames))
            began = time.monotonic()
            backend.answer([image], [self._text])
            seconds.append(time.monotonic() - began)
        return round(statistics.median(seconds), 4)

    def _complete(self, png: bytes, tokens: int) -> dict[str, Any]:
        client = self._server.client
        kept = client.keep_text(self._text)
        return client.completion(self._text, png, tokens, grammar=_OPEN_GRAMMAR, ignore_eos=True, cache_prompt=kept)

    def _measure(self, change: str, answer_tokens: int, ask: Callable[[bytes], dict[str, Any]]) -> Row:
        parts: list[tuple[float, float, float, float]] = []
        for _ in range(self._repeats):
            png, log = next(self._frames), self._run.folder / "logs" / LOG
            logged = log.stat().st_size
            began = time.monotonic()
            reply = ask(png)
            whole = time.monotonic() - began
            if reply["tokens_predicted"] != answer_tokens:
                raise ServerError(
                    f"llama-server generated {reply['tokens_predicted']} tokens instead of {answer_tokens}.",
                    f"Read {log}.",
                )
            encode, decode = encode_seconds(log, logged), reply["timings"]["predicted_ms"] / 1000
            parts.append((encode, whole - encode - decode, decode, whole))
        # Measured after the same number of frames on each server, because its cache of images grows.
        self._peak_memory_bytes = self._peak_memory_bytes or self._server.peak_memory_bytes()
        encode, prefill, decode, whole = (round(statistics.median(part), 4) for part in zip(*parts, strict=True))
        return Row(
            run=str(self._run.folder),
            change=change,
            **asdict(self._setup),
            reason_tokens=max(answer_tokens - self.frame_tokens, 0),
            prompt_tokens=reply["tokens_evaluated"],
            tokens_read=reply["timings"]["prompt_n"],
            answer_tokens=answer_tokens,
            encode_seconds=encode,
            prefill_seconds=prefill,
            decode_seconds=decode,
            seconds_per_frame=whole,
            # The first token is part of the prefill.
            decode_seconds_per_token=round(decode / (answer_tokens - 1), 5) if answer_tokens > 1 else None,
            peak_memory_bytes=self._peak_memory_bytes,
        )


def encode_seconds(log: Path, start: int) -> float:
    """Seconds for the encoding of the image that the server logged after the first `start` bytes of its log.

    Raises ServerError unless exactly one image was encoded: a cached image takes no time, and a tiled one too much.
    """
    deadline = time.monotonic() + 2
    while True:  # a separate thread writes the server's log, possibly with a delay
        lines = log.read_bytes()[start:].decode("utf-8", "replace").splitlines()
        began, ended = (
            [_seconds(match) for line in lines if (match := what.match(line))] for what in (_ENCODING, _ENCODED)
        )
        if len(began) == len(ended) == 1:
            return ended[0] - began[0]
        if len(ended) > 1 or time.monotonic() > deadline:
            raise ServerError(
                f"llama-server encoded {len(ended)} images instead of one, according to its log {log}.",
                "Use the pinned build ('orion toolchain'): other builds may have another log format.",
            )
        time.sleep(0.01)


def _seconds(match: "re.Match[str]") -> float:
    minutes, seconds, milliseconds, microseconds = map(int, match.groups())
    return 60 * minutes + seconds + milliseconds / 1e3 + microseconds / 1e6


def frames_of(size: int) -> Iterator[bytes]:
    """Distinct PNGs of synthetic tiles. Their content does not affect the time of the encoder."""
    from orion_triage.dataset.sources.synthetic.draw import draw_tile

    for seed in itertools.count():
        image = shrink(draw_tile("urban_grid", seed).image, size)
        yield Frame(image, image.size).png()


def _decoded(png: bytes) -> "Image.Image":
    from PIL import Image

    return Image.open(io.BytesIO(png)).convert("RGB")


def _tokens(client: "Client", text: str) -> int:
    return len(client.tokenize(text))


# --- what was evaluated -----------------------------------------------------------------------------------------------


def _own_answer_tokens(run: "Run", client: "Client") -> int:
    """Tokens of the flight pair's median answer under condition B; a usual length if it was not evaluated."""
    from orion_triage.evaluate.run import read_predictions

    mission = run.settings.mission
    if model := next((name for name in _FLOWN if _is_of_this_pair(run, name)), ""):
        answers = [row["answer"] for row in read_predictions(run.evaluation(model), mission) if row["condition"] == "B"]
        return int(statistics.median_high([_tokens(client, answer) for answer in answers]))
    return _tokens(client, _empty_answer(mission)) + USUAL_REASON_TOKENS


def _empty_answer(mission: Mission) -> str:
    """An answer without a reason."""
    return answer_text(mission, Verdict("", mission.names[0], examples(mission, "")))


def _beside_accuracy(row: Row, run: "Run", setup: Setup, model: str = "") -> Row:
    """The row with its accuracy if the run has an evaluation of exactly this configuration; else unchanged."""
    flown = _flown(run)
    if replace(setup, quantization=flown.quantization) != flown:
        return row
    if setup != flown and setup.mmproj != "F16":  # of the evaluated variants, only the pair has another tower
        return row
    models = (model,) if model else _FLOWN if setup == flown else (setup.quantization,)
    for name in models:
        if _is_of_this_pair(run, name):
            metrics = json.loads((run.evaluation(name) / "metrics.json").read_text(encoding="utf-8"))
            right, count = ({c: metrics[c][key] for c in CONDITIONS} for key in ("right", "count"))
            return replace(row, evaluation=name, right=right, count=count)
    return row


def _evaluated_frames(run: "Run") -> str | None:
    """The hash of the dataset on which the run's flight pair was evaluated; None without an evaluation."""
    stage_manifests = [manifest.read_manifest(run.evaluation(model)) for model in _FLOWN]
    return next((stage_manifest.inputs["dataset"] for stage_manifest in stage_manifests if stage_manifest), None)


def _is_of_this_pair(run: "Run", model: str) -> bool:
    """Whether the evaluation has finished and used the files that are measured here."""
    stage_manifest = manifest.read_manifest(run.evaluation(model))
    return stage_manifest is not None and manifest.hash_inputs({"gguf": run.gguf})["gguf"] in (
        stage_manifest.inputs.get("gguf"), stage_manifest.inputs.get("F16"),
    )  # fmt: skip
