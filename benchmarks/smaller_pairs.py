"""Smaller flight pairs, with and without an importance matrix: bytes, memory, seconds, and what the answers lose.

    python benchmarks/smaller_pairs.py runs/tiny              # 20 minutes on 2 cores
    python benchmarks/smaller_pairs.py --shapes 1.6b          # random weights: bytes, memory, seconds; 11 GB of disk

With a finished run, each pair is made and evaluated by the package's own stages in a folder of its own (below
--folder), so the same command goes on after a stop. The best two types by divergence, and Q4_K_M,
are then made with a tower in Q8_0. A pair is compared with the merged 16-bit model on the same test frames:

KL     mean over frames of the Kullback-Leibler divergence of the categories' probabilities, in nats: 0 is the same.
       They are those after the reason that each model wrote, so another word in a reason counts too
less   how much lower the KL is than that of the first pair, on the same answers
flips  frames with another category than the 16-bit model's; gained and lost count the right ones; McNemar's exact p

With --shapes, a checkpoint of random weights has no answers. Its pairs show bytes, memory and seconds of the real size.
"""

import argparse
import json
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.stats import bootstrap, entropy

from orion_triage.dataset.dataset import Dataset
from orion_triage.dataset.sources.synthetic.draw import draw_tile
from orion_triage.evaluate.metrics import Prediction, compare, under
from orion_triage.evaluate.run import predictions_in
from orion_triage.export import calibrate, quantize
from orion_triage.imagery.frames import Frame, shrink
from orion_triage.llama_cpp.server import Server
from orion_triage.llama_cpp.toolchain import Toolchain, find_toolchain
from orion_triage.llama_cpp.tools import quantize_file
from orion_triage.machine import rehearse
from orion_triage.machine.describe import describe
from orion_triage.mission.prompt import user_text
from orion_triage.models.family import turn_of
from orion_triage.pipeline import QUANTIZE, run_stage, stage_named
from orion_triage.runs.run import Run, open_run
from orion_triage.safe.files import sha256_of_file, write_text
from orion_triage.settings import BackboneType, QuantizeSettings, Settings, load_settings

HERE = Path(__file__).parent
SHAPES = {"1.6b": "lfm2.5-vl-1.6b", "450m": "lfm2.5-vl-450m"}
KINDS: tuple[BackboneType, ...] = ("Q4_K_M", "Q3_K_M", "IQ4_XS", "Q4_0")
HOWS: tuple[Literal["none", "task"], ...] = ("none", "task")
CONDITIONS = ("A", "B")
FRAMES, TOKENS, REPEATS = 10, 40, 3  # frames that are timed, the length of their answers, and how often
SHAPES_FRAME_SIZE = 256  # a frame of 512 px takes three to five times as long, with any of the pairs
FEW_RECORDS = 2  # of a calibration at the real size, whose time is then known for all of them
Figures = dict[str, Any]


def name_of(settings: QuantizeSettings) -> str:
    parts = [settings.type, "matrix" if settings.calibrate == "task" else "", f"tower {settings.tower}"]
    return ", ".join(filter(None, parts))


# --- a finished run ---------------------------------------------------------------------------------------------------


def run_of(run: Run, settings: QuantizeSettings, folder: Path) -> Run:
    """The run of one pair, in a folder of its own."""
    return replace(
        run,
        folder=(folder / name_of(settings).replace(", ", "_").replace(" ", "-")).resolve(),
        settings=run.settings.model_copy(update={"quantize": settings}),
    )


def measured(run: Run, settings: QuantizeSettings, folder: Path) -> Figures:
    """One pair of the run's merged model: made, evaluated, timed, and compared with the merged model."""
    own = run_of(run, settings, folder)
    own.folder.mkdir(parents=True, exist_ok=True)
    for source, link in ((run.dataset, own.dataset), (run.merged, own.merged)):
        if not link.exists():
            link.symlink_to(source.resolve())
    made, _ = run_stage(QUANTIZE, own)
    run_stage(stage_named("evaluate quantized", own.settings), own)
    path, pair = own.folder / "row.json", sha256_of_file(own.gguf / quantize.PAIR)
    if path.is_file() and (kept := json.loads(path.read_text(encoding="utf-8")))["pair_sha256"] == pair:
        return dict(kept)
    files = quantize.check_pair(own.gguf)
    cost = cost_of_frames(find_toolchain(), files.backbone, files.mmproj, own.settings, own.folder)
    mission = run.settings.mission
    merge, answers = (
        predictions_in(one, mission) for one in (run.evaluation("fine-tuned"), own.evaluation("quantized"))
    )
    row: Figures = {
        "pair": name_of(settings),
        **settings.model_dump(),
        "pair_sha256": pair,
        "tensor_types": made.figures["tensor_types"][files.backbone.name],
        "backbone_bytes": files.backbone.stat().st_size,
        "tower_bytes": files.mmproj.stat().st_size,
        "pair_bytes": files.backbone.stat().st_size + files.mmproj.stat().st_size,
        **cost,
        "conditions": {c: against(under(merge, c), under(answers, c)) for c in CONDITIONS},
    }
    write_text(path, json.dumps(row, indent=1) + "\n")
    return row


def against(merge: Sequence[Prediction], pair: Sequence[Prediction]) -> Figures:
    """The pair's answers beside those of the merged model to the same frames."""
    change = compare(merge, pair)
    by_frame = divergences(merge, pair)
    divergence = np.array(list(by_frame.values()))
    return {
        "count": len(pair),
        "right": sum(one.predicted == one.truth for one in pair),
        "right_of_merge": sum(one.predicted == one.truth for one in merge),
        "divergence": float(divergence.mean()),
        "largest_divergence": float(divergence.max()),
        "scored": len(by_frame),
        "flips": sum(m.predicted != p.predicted for m, p in zip(merge, pair, strict=True)),
        "gained": change.gained,
        "lost": change.lost,
        "exact_p": change.exact_p,
    }


def divergences(merge: Sequence[Prediction], pair: Sequence[Prediction]) -> dict[str, float]:
    """Frame -> divergence of the pair's probabilities from the merged model's; without answers that have no verdict."""
    return {
        m.name: float(entropy(m.scores, p.scores)) for m, p in zip(merge, pair, strict=True) if m.scores and p.scores
    }


def less_than(first: Mapping[str, float], second: Mapping[str, float]) -> Figures:
    """How much lower the second divergences are, with the 95 % interval of a bootstrap over frames.

    Names are "CONDITION FRAME"; the conditions of a frame are drawn together.
    """
    by_frame: dict[str, list[float]] = {}
    for name in first.keys() & second.keys():
        by_frame.setdefault(name.partition(" ")[2], []).append(first[name] - second[name])
    lower = [float(np.mean(by_frame[frame])) for frame in sorted(by_frame)]
    found = bootstrap((lower,), np.mean, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    return {"lower_by": float(np.mean(lower)), "low": float(found.low), "high": float(found.high)}


def of_run(folder: Path, work: Path) -> Figures:
    run = open_run(folder)
    rows: list[Figures] = []
    merge = predictions_in(run.evaluation("fine-tuned"), run.settings.mission)
    default: dict[str, float] = {}

    def add(settings: QuantizeSettings) -> None:
        print(f"{name_of(settings)} ...", flush=True)
        row = measured(run, settings, work)
        answers = predictions_in(run_of(run, settings, work).evaluation("quantized"), run.settings.mission)
        found = {
            f"{condition} {name}": value
            for condition in CONDITIONS
            for name, value in divergences(under(merge, condition), under(answers, condition)).items()
        }
        default.update({} if default else found)  # the first pair is the default one
        rows.append(row | ({"divergence": less_than(default, found)} if rows else {}))

    for kind in KINDS:
        for how in HOWS:
            add(QuantizeSettings(type=kind, calibrate=how))
    best = sorted(rows, key=lambda row: sum(row["conditions"][c]["divergence"] for c in CONDITIONS))[:2]
    chosen = {(row["type"], row["calibrate"]) for row in best} | {("Q4_K_M", "none")}
    for kind in KINDS:
        for how in HOWS:
            if (kind, how) in chosen:
                add(QuantizeSettings(type=kind, calibrate=how, tower="Q8_0"))
    return {"preset": run.settings.preset, "machine": describe(), "rows": rows}


def table_of_run(figures: Figures) -> list[str]:
    lines = [
        "| pair | MB | memory, MB | CPU s a frame | right A, B | KL A, B (10^-3) | less than the first (95 %) "
        "| flips A, B | p A, B |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in figures["rows"]:
        a, b = (row["conditions"][condition] for condition in CONDITIONS)
        cells = [
            row["pair"],
            f"{row['pair_bytes'] / 1e6:.2f}",
            f"{row['peak_memory_bytes'] / 1e6:.0f}",
            f"{row['cpu_seconds_per_frame']:.4f}",
            f"{a['right']}, {b['right']} of {b['count']}",
            ", ".join(f"{1000 * one['divergence']:.1f}{_left_out(one)}" for one in (a, b)),
            _lower(row["divergence"]) if "divergence" in row else "",
            f"{a['flips']}, {b['flips']}",
            f"{a['exact_p']:.2f}, {b['exact_p']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _left_out(figures: Figures) -> str:
    missing = figures["count"] - figures["scored"]
    return f" without {missing}" if missing else ""


def _lower(figures: Figures) -> str:
    return f"{1000 * figures['lower_by']:+.1f} ({1000 * figures['low']:+.1f} to {1000 * figures['high']:+.1f})"


# --- what a frame costs -----------------------------------------------------------------------------------------------


def cost_of_frames(
    toolchain: Toolchain, backbone: Path, mmproj: Path, settings: Settings, folder: Path, *, few: bool = False
) -> Figures:
    """CPU seconds per frame and peak memory of a server with one thread, for answers of TOKENS tokens.

    CPU seconds are those of the server's process, so other programs on the machine add little; the lowest of several
    measurements counts. The first frame and the loading are subtracted: they are the cost of a server that was asked
    about one frame.
    """
    text, size = user_text(settings.mission, None), SHAPES_FRAME_SIZE if few else settings.base.frame_size
    more = 1 if few else FRAMES
    seconds, peak = [], 0
    for count in (1, 1 + more) * (1 if few else REPEATS):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        log = folder / "logs" / "cost-server.log"
        with Server(toolchain, backbone, mmproj, log=log, turn=turn_of(backbone), threads=1) as server:
            for seed in range(count):
                image = shrink(draw_tile("urban_grid", seed).image, size)
                png, grammar = Frame(image, image.size).png(), "root ::= [a-z]+"
                reply = server.client.completion(text, png, TOKENS, grammar=grammar, ignore_eos=True)
                assert reply["tokens_predicted"] == TOKENS
            peak = server.peak_memory_bytes()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return {
        "cpu_seconds_per_frame": (min(seconds[1::2]) - min(seconds[::2])) / more,
        "peak_memory_bytes": peak,
        "answer_tokens": TOKENS,
    }


# --- random weights at a published shape ------------------------------------------------------------------------------


def of_shapes(preset: str, work: Path) -> Figures:
    base, settings = work / "base", QuantizeSettings(tower="Q8_0")
    run = Run((work / "run").resolve(), load_settings(preset).model_copy(update={"quantize": settings}))
    if not base.exists():
        print("random weights ...", flush=True)
        rehearse.make_base(preset, base)
    if not run.dataset.exists():
        rehearse.make_dataset(run.dataset, rehearse.CHECK_RECORDS)
    if not run.merged.exists():
        run.merged.symlink_to(base.resolve())
    if not run.gguf.exists():
        print("converting ...", flush=True)
        quantize.run(run.merged, run.gguf, settings, user_texts=[user_text(run.settings.mission, None)])
    toolchain, f16, matrix = find_toolchain(), run.gguf / quantize.F16, work / quantize.MATRIX
    towers = {kind: run.gguf / quantize.tower_name(kind) for kind in ("F16", "Q8_0")}

    def calibration() -> Figures:
        with ProcessPoolExecutor(1, get_context("spawn")) as beside:
            return beside.submit(calibrated, run, f16, matrix).result()

    def quantized(kind: BackboneType, importance: Path | None) -> Figures:
        path = work / quantize.backbone_name(kind)
        use = quantize_file(toolchain, f16, path, kind, importance)
        size = path.stat().st_size
        if importance:
            path.unlink()
        return {"type": kind, "matrix": bool(importance), "bytes": size, "quantize": asdict(use)}

    def asked(kind: BackboneType, tower: str) -> Figures:
        path = work / quantize.backbone_name(kind)
        if not path.is_file():
            quantize_file(toolchain, f16, path, kind)
        return cost_of_frames(toolchain, path, towers[tower], run.settings, work, few=True)

    made = once(work / "calibration.json", f"calibrating with {FEW_RECORDS} records", calibration)
    rows = []
    for importance in (matrix, None):
        for kind in KINDS:
            name = f"{kind}, matrix" if importance else kind
            rows.append(once(work / f"{name}.json", name, partial(quantized, kind, importance)))
    # The matrix changes neither the work of a frame nor the memory; the tower's type is the same for all types.
    costs = {
        f"{kind}, tower {tower}": once(
            work / f"cost {kind} {tower}.json", f"{kind}, tower {tower}: frames", partial(asked, kind, tower)
        )
        for kind, tower in [*((kind, "F16") for kind in KINDS), (KINDS[0], "Q8_0")]
    }
    return {
        "preset": preset,
        "machine": describe(),
        "calibration": made,
        "backbones": rows,
        "costs": costs,
        "frame_size": SHAPES_FRAME_SIZE,
        "tower_bytes": {kind: path.stat().st_size for kind, path in towers.items()},
    }


def once(path: Path, what: str, measure: Callable[[], Figures]) -> Figures:
    """What was measured, from its file if there is one."""
    if not path.is_file():
        print(f"{what} ...", flush=True)
        write_text(path, json.dumps(measure(), indent=1) + "\n")
    return dict(json.loads(path.read_text(encoding="utf-8")))


def calibrated(run: Run, f16: Path, matrix: Path) -> Figures:
    """The cost of a calibration; in a process of its own, for its memory."""
    dataset, size = Dataset(run.dataset, run.settings.mission), run.settings.base.frame_size
    began, processors_began = time.monotonic(), time.process_time()
    figures = calibrate.run(run.merged, f16, dataset, matrix, size, count=FEW_RECORDS)
    return figures | {
        "seconds": time.monotonic() - began,
        "cpu_seconds": time.process_time() - processors_began,
        "peak_memory_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


def table_of_shapes(figures: Figures) -> list[str]:
    lines = ["| backbone | MB | pair with tower F16, Q8_0 | s to quantize |", "|---|---:|---:|---:|"]
    for row in figures["backbones"]:
        both = ", ".join(f"{(row['bytes'] + of_tower) / 1e6:,.0f}" for of_tower in figures["tower_bytes"].values())
        name = f"{row['type']}{', matrix' if row['matrix'] else ''}"
        lines.append(f"| {name} | {row['bytes'] / 1e6:,.0f} | {both} | {row['quantize']['seconds']:.0f} |")
    lines += ["", f"| pair | memory, GB | CPU s a frame of {figures['frame_size']} px |", "|---|---:|---:|"]
    for name, cost in figures["costs"].items():
        lines.append(f"| {name} | {cost['peak_memory_bytes'] / 1e9:.2f} | {cost['cpu_seconds_per_frame']:.1f} |")
    one = figures["calibration"]
    lines += [
        "",
        f"calibration: {one['cpu_seconds']:.0f} CPU s for {one['records']} records, "
        f"{one['peak_memory_bytes'] / 1e9:.2f} GB",
    ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", help="folder of a finished run")
    parser.add_argument("--shapes", choices=SHAPES, help="random weights instead of a run")
    parser.add_argument("--folder", type=Path, default=Path("build/smaller-pairs"), help="where the pairs are made")
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    arguments = parser.parse_args()
    if (arguments.run is None) == (arguments.shapes is None):
        parser.error("give either the folder of a run or --shapes")
    if arguments.shapes:
        figures = of_shapes(SHAPES[arguments.shapes], arguments.folder / arguments.shapes)
    else:
        figures = of_run(arguments.run, arguments.folder)
    out = arguments.out or HERE / "results" / f"smaller_pairs_{figures['preset']}.json"
    write_text(out, json.dumps(figures, indent=1) + "\n")
    print("\n".join((table_of_shapes if arguments.shapes else table_of_run)(figures)))


if __name__ == "__main__":
    main()
