"""One frame, from the published recipe to everything that this project changes, and what each step leaves of accuracy.

    python benchmarks/frame_steps.py                                    # 1.6B shapes, random weights; 25 GB of disk
    python benchmarks/frame_steps.py --run RUN                          # the pair of a finished run instead
    python benchmarks/frame_steps.py --accuracy runs/tiny runs/text-first    # beside it what these runs answered
    python benchmarks/frame_steps.py --accuracy ... --spared 0.8             # and a cascade that spares such a share
    python benchmarks/frame_steps.py --preset lfm2.5-vl-450m --results build/450m
    python benchmarks/frame_steps.py --measured FILE --beside build/450m/frame_steps.json --accuracy ...  # no new times
    python benchmarks/frame_steps.py --measured FILE --tune                  # only the flags are measured

Each row adds one step to the row before: llama-server's default flags and the published order; the package's flags; the
text before the image, read once; the verdict without a reason; smaller frames. Then a cascade's expected seconds: a
verdict alone at the smallest size on every frame, the full look of the package on the share that it does not drop.
Further rows measure every frame size in every way of asking, for the charts. Medians of a few frames, each new to the
server, on a machine that does nothing else.

An accuracy is that of a run trained and evaluated in this way (order, size, reason or not), paired with the first run
of --accuracy (McNemar), with the loss's upper bound (95 %). Figures: benchmarks/results/frame_steps.json, and charts.
"""

import argparse
import io
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import reference  # beside this file
import speed
from PIL import Image

from orion_triage.evaluate.judgement import headline_of
from orion_triage.evaluate.metrics import Prediction, summarize, under
from orion_triage.evaluate.results import differences
from orion_triage.evaluate.run import prediction_of, read_predictions
from orion_triage.evaluate.variants import CONSTRAINED, VERDICT_ONLY
from orion_triage.export import quantize
from orion_triage.flight import bench_frame, server_flags, tune
from orion_triage.flight.bundle import SECOND_TOWER
from orion_triage.llama_cpp.toolchain import find_toolchain
from orion_triage.machine import power
from orion_triage.mission.prompt import user_text
from orion_triage.runs.run import Run, open_run
from orion_triage.safe.files import write_bytes, write_text

RESULTS = Path(__file__).parent / "results"
FIRST, AFTER = "before the text", "after the text"  # mission.image
ANSWER_TOKENS = 40  # of an answer with its reason
SIZES = (512, 384, 256)
PUBLISHED, TODAY, TUNED, CASCADE = "published recipe", "today's default", "+ flags of this machine", "cascade"

Figures = dict[str, Any]
Ways = dict[tuple[int, str, bool], Figures]  # by frame size, image before or after the text, with a reason or not


def published(run: Run, size: int, repeats: int, log: Path) -> Figures:
    """llama-server with no flag but its files; a frame is asked as the published program asks it."""
    text, frames = user_text(run.settings.mission, None), bench_frame.frames_of(size)
    pair = quantize.find_pair(run.gguf)
    seconds, replies = [], []
    with reference.default_server(*pair, log) as ask:
        ask(opened(next(frames)), text, reference.WARM_UP_TOKENS, ignore_eos=True).raise_for_status()
        for _ in range(repeats):
            image = opened(next(frames))
            began = time.monotonic()
            reply = ask(image, text, ANSWER_TOKENS, ignore_eos=True)
            seconds.append(time.monotonic() - began)
            reply.raise_for_status()
            replies.append(reply.json()["timings"])
        memory = reference.peak_memory_of_children()
    decode = statistics.median(one["predicted_ms"] for one in replies) / 1000
    whole = statistics.median(seconds)
    return {
        "seconds": whole,
        "encode_seconds": None,  # its log does not say
        "prefill_seconds": whole - decode,
        "decode_seconds": decode,
        "tokens_read": replies[-1]["prompt_n"],
        "peak_memory_bytes": memory,
    }


def opened(png: bytes) -> Image.Image:
    return Image.open(io.BytesIO(png)).convert("RGB")


def ours(run: Run, size: int, order: str, repeats: int) -> dict[bool, Figures]:
    """The package's server and way of asking, with the reason (True) and without (False)."""
    with asked_of(run, size, order, repeats) as asked:
        return {True: figures_of(asked.with_reason("", ANSWER_TOKENS)), False: figures_of(asked.without_reason())}


@contextmanager
def asked_of(
    run: Run, size: int, order: str, repeats: int, tower: str | None = None, flags: Sequence[str] = ()
) -> Iterator[bench_frame.Asked]:
    mission = run.settings.mission.model_copy(update={"image": order})
    turned = replace(run, settings=run.settings.model_copy(update={"mission": mission}))
    setup = bench_frame.Setup(size, run.settings.quantize.type, run.settings.quantize.tower)
    backbone, mmproj = quantize.find_pair(run.gguf)
    mmproj = mmproj.with_name(tower) if tower else mmproj
    with bench_frame.serve(turned, find_toolchain(), backbone, mmproj, setup, flags) as server:
        yield bench_frame.Asked(server, turned, setup, repeats)


def figures_of(row: bench_frame.Row) -> Figures:
    return {
        "seconds": row.seconds_per_frame,
        "encode_seconds": row.encode_seconds,
        "prefill_seconds": row.prefill_seconds,
        "decode_seconds": row.decode_seconds,
        "tokens_read": row.tokens_read,
        "peak_memory_bytes": row.peak_memory_bytes,
    }


def tuned(run: Run, repeats: int) -> Figures:
    """The last row's way with the fastest flags of this machine, found one after the other as tune.py does.

    Nothing is flown here, so no verdict is checked and no gain confirmed. A tower in Q8_0 is tried if the pair has one.
    """
    way = (SIZES[-1], AFTER, False)
    towers = [path.name for path in (quantize.find_pair(run.gguf)[1], run.gguf / SECOND_TOWER) if path.exists()]
    cores = len(os.sched_getaffinity(0))
    flags, best = {"--threads": str(cores), "--flash-attn": "off"}, None
    tried: dict[str, float] = {}
    for change in [{}, *tune.changes(flags, cores, towers)]:
        words = flags | change
        tower = words.get("--mmproj")
        command = server_flags.words_of({name: value for name, value in words.items() if name != "--mmproj"})
        with asked_of(run, *way[:2], repeats, tower, command) as asked:
            figures = figures_of(asked.without_reason())
        name = " ".join(server_flags.words_of(change)) or tune.TODAY
        tried[name] = figures["seconds"]
        say(name, figures)
        if best is None or figures["seconds"] < (1 - tune.LEAST_GAIN) * best["seconds"]:
            flags, best = words, figures
    return {"step": TUNED, "way": list(way), "flags": " ".join(server_flags.words_of(flags)), "tried": tried, **best}


def way_of(run: Run, reason: bool) -> tuple[int, str, bool]:
    return run.settings.base.frame_size, run.settings.mission.image, reason


def accuracies(runs: Sequence[Run]) -> Ways:
    """By (size, order, reason): right answers under A and B, the loss under B, and both paired with the first run's."""
    found: Ways = {}
    first: list[Prediction] = []
    for run in runs:
        mission = run.settings.mission
        for reason, name in ((True, CONSTRAINED), (False, VERDICT_ONLY)):
            if not (run.evaluation(name) / "predictions.jsonl").exists():
                continue
            rows = [prediction_of(row, mission) for row in read_predictions(run.evaluation(name), mission)]
            first = first or rows
            rates, change = summarize(rows, mission), differences(first, rows)["B"]
            found[way_of(run, reason)] = {
                "run": str(run.folder),
                "frames": rates["B"]["count"],
                "right": {condition: rates[condition]["right"] for condition in rates},
                "loss": headline_of(under(rows, "B"), mission)["irrecoverable_loss"],
                "change": {key: change[key] for key in ("gained", "lost", "exact_p")},
            }
    return found


def measured(run: Run, repeats: int) -> tuple[list[Figures], Ways]:
    """(The rows of the table, each step on top of the one before; the figures of every way)."""
    log = run.folder / "logs" / "frame-steps-server.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    first = published(run, SIZES[0], repeats, log)
    say(PUBLISHED, first)
    ways: Ways = {}
    for size in SIZES:
        for order in (FIRST, AFTER):
            for reason, figures in ours(run, size, order, repeats).items():
                ways[size, order, reason] = figures
                say(f"{size} px, image {order}, {'with reason' if reason else 'verdict only'}", figures)
    largest, smallest = SIZES[0], SIZES[-1]
    steps = [
        (TODAY, (largest, FIRST, True)),
        ("+ text first", (largest, AFTER, True)),
        ("+ verdict only", (largest, AFTER, False)),
        *((f"+ {size} px", (size, AFTER, False)) for size in SIZES[1:]),
    ]
    rows = [{"step": PUBLISHED, "way": [largest, FIRST, True], **first}]
    rows += [{"step": step, "way": list(way), **ways[way]} for step, way in steps]
    assert rows[-1]["way"][0] == smallest
    return rows, ways


def say(what: str, figures: Figures) -> None:
    print(f"  {what}: {figures['seconds']:.2f} s", flush=True)


def with_cascade(rows: list[Figures], spared: float) -> list[Figures]:
    """A row more: the look of the last step at every frame, and today's default at the share that it does not drop."""
    steps = {row["step"]: row["seconds"] for row in rows if row["step"] != TUNED}
    *_, cheap = steps.values()
    return [*rows, {"step": CASCADE, "spared": spared, "seconds": cheap + (1 - spared) * steps[TODAY]}]


def table(rows: Sequence[Figures], known: Ways) -> str:
    """Markdown."""
    lines = [
        "| step | s | times faster | tower | read | answer | tokens read | MB | frames per eclipse | A | B "
        "| loss, at most | p |",
        "|---|" + "---:|" * 12,
    ]
    for row in rows:
        seconds = row["seconds"]
        frames = power.ECLIPSE_SECONDS / seconds
        cells = [row["step"], f"{seconds:.2f}", f"{rows[0]['seconds'] / seconds:.1f}"]
        if row["step"] == CASCADE:
            lines.append(f"| {' | '.join(cells)} | | | | | | {frames:,.0f} | | | | |")
            continue
        parts = [row["encode_seconds"], row["prefill_seconds"], row["decode_seconds"]]
        cells += ["" if part is None else f"{part:.2f}" for part in parts]
        cells += [str(row["tokens_read"]), f"{row['peak_memory_bytes'] / 1e6:,.0f}", f"{frames:,.0f}"]
        one = known.get(tuple(row["way"]))
        if one is None or row["step"] == PUBLISHED:
            cells += [""] * 4
        else:
            cells += [f"{one['right'][c]}/{one['frames']}" for c in "AB"]
            loss = one["loss"]
            cells += [f"{loss['count']}/{loss['total']}, {100 * loss['high']:.0f} %", f"{one['change']['exact_p']:.2g}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


LOOKS = {  # colour, marker, name and place of the labels of a way of asking
    (FIRST, True): ("#66707f", "s", "image first, reason", (7, -3)),
    (FIRST, False): ("#a84605", "D", "image first, verdict only", (-8, -14)),
    (AFTER, True): ("#1558c0", "^", "text first, reason", (4, 8)),
    (AFTER, False): ("#0a6e4d", "o", "text first, verdict only", (-6, -15)),
}


def charts(ways: Ways, beside: Ways, known: Ways, path: Path) -> None:
    """Loss against seconds, and against frames of an eclipse; a way of asking has a colour, a size its label.

    The line is the front: no way is faster and loses less. The points of `beside`, of another preset, are hollow.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    axes_and_values = ((left, float), (right, lambda seconds: power.ECLIPSE_SECONDS / seconds))
    for axes, value in axes_and_values:
        for way in [way for way in known if way in ways]:
            colour, marker, label, place = LOOKS[way[1:]]
            loss, at = known[way]["loss"], value(ways[way]["seconds"])
            axes.plot([at, at], [loss["rate"], loss["high"]], color=colour, alpha=0.3, lw=1.2)
            axes.plot(at, loss["rate"], marker, color=colour, ms=7, label=label)
            axes.annotate(str(way[0]), (at, loss["rate"]), textcoords="offset points", xytext=place, color=colour)
            if way in beside:
                axes.plot(value(beside[way]["seconds"]), loss["rate"], marker, color=colour, ms=7, mfc="none")
        front = front_of([(ways[way]["seconds"], known[way]["loss"]["rate"]) for way in known if way in ways])
        axes.plot([value(at) for at, _ in front], [loss for _, loss in front], color="black", lw=0.8, ls=":", zorder=0)
        if axes is left:
            axes.set_xlim(0, 1.12 * axes.get_xlim()[1])
        else:
            axes.set_xscale("log")
        axes.set_ylim(bottom=-0.02)
        axes.set_yticks([0, 0.05, 0.1, 0.15, 0.2], ["0 %", "5 %", "10 %", "15 %", "20 %"])
        axes.grid(alpha=0.3)
    left.set_ylabel("valuable frames dropped, of 40 (bar: at most, 95 %)")
    left.set_xlabel("seconds per frame; numbers: frame size in pixels")
    right.set_xlabel(f"frames in an eclipse of {power.ECLIPSE_SECONDS // 60} minutes")
    right.set_xticks([100, 200, 500, 1000, 2000, 5000], ["100", "200", "500", "1,000", "2,000", "5,000"])
    right.minorticks_off()
    handles, labels = left.get_legend_handles_labels()
    named = dict(zip(labels, handles, strict=True))
    figure.legend(named.values(), named.keys(), loc="outside upper center", ncols=len(named), frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    write_bytes(path, picture.getvalue())


def front_of(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one beats in both numbers, of which less is better."""
    found: list[tuple[float, float]] = []
    for point in sorted(set(points)):
        if not found or point[1] < found[-1][1]:
            found.append(point)
    return found


def run_of(asked: argparse.Namespace) -> Run:
    """The run of --run, or one of random weights."""
    if asked.run:
        return open_run(asked.run)
    bench = speed.Bench(
        preset=asked.preset, folder=asked.folder, results=asked.results, repeats=asked.repeats, toy=False,
        records=None, validation_records=None, run=None, base=None, orion=None,
    )  # fmt: skip
    return speed.finished_run(bench)


def ways_of(written: Figures) -> Ways:
    """The ways of a written file."""
    found = {}
    for figures in written["ways"]:
        size, order, reason = figures["way"]
        found[size, order, reason] = figures
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="finished run; default: random weights of --preset")
    parser.add_argument("--preset", default="lfm2.5-vl-1.6b")
    parser.add_argument("--folder", type=Path, default=Path(".bench"), help="for the random weights")
    parser.add_argument(
        "--accuracy", type=Path, nargs="*", default=[], help="finished runs; the first is compared with"
    )
    parser.add_argument(
        "--spared", type=float, help="share of frames that a cascade's first look drops ('orion cascade')"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tune", action="store_true", help="also the last step with the fastest flags of this machine")
    parser.add_argument("--measured", type=Path, help="figures of an earlier call, instead of measuring anew")
    parser.add_argument("--beside", type=Path, help="figures of another preset, for the charts")
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    known = accuracies([open_run(folder) for folder in asked.accuracy])
    if asked.measured:
        written = json.loads(asked.measured.read_text(encoding="utf-8"))
        rows = [row for row in written["rows"] if row["step"] not in (CASCADE, TUNED)]
    else:
        rows, ways = measured(run_of(asked), asked.repeats)
        written = {
            "command": ["python", "benchmarks/frame_steps.py", *sys.argv[1:]],
            "machine": speed.machine(),
            "versions": speed.versions(),
            "weights": str(asked.run) if asked.run else f"random, {asked.preset}",
            "repeats": asked.repeats,
            "ways": [{"way": list(way), **figures} for way, figures in ways.items()],
        }
    if asked.tune:
        rows.append(tuned(run_of(asked), asked.repeats))
    if asked.spared is not None:
        rows = with_cascade(rows, asked.spared)
    written |= {"rows": rows, "accuracies": [{"way": list(way), **figures} for way, figures in known.items()]}
    asked.results.mkdir(parents=True, exist_ok=True)
    write_text(asked.results / "frame_steps.json", json.dumps(written, indent=1) + "\n")
    if known:
        beside = json.loads(asked.beside.read_text(encoding="utf-8")) if asked.beside else {"ways": []}
        charts(ways_of(written), ways_of(beside), known, asked.results / "frame_steps.png")
    print(table(rows, known))


if __name__ == "__main__":
    main()
