"""How fast and how large this project is beside the published recipe, on the same machine, records and weights.

    make bench                                       # all five on the shipped base and the newest finished run
    python benchmarks/speed.py --only training frame # some of them
    python benchmarks/speed.py --only training --preset lfm2.5-vl-1.6b --records 64   # random weights; on a GPU, say
    python benchmarks/speed.py --only frame fuse --preset lfm2.5-vl-1.6b              # 25 GB of disk
    python benchmarks/speed.py --only evaluation-gguf --preset lfm2.5-vl-1.6b --records 2
    python benchmarks/speed.py --only training --set fine_tune.twins_together=true
    python benchmarks/speed.py --toy                 # minutes less: is everything equal that has to be?

training         two epochs with their validations: benchmarks/reference.py against 'orion fine-tune'
evaluation       the four conditions on the merged model with transformers, against 'orion evaluate'
evaluation-gguf  the same on the flight pair with llama.cpp, against 'orion evaluate --gguf'
frame            one frame on a started server, 40 tokens: llama-server's default flags against the package's
fuse             adapter to Q4_K_M: merge, two conversions, quantization, against 'orion fuse' and 'orion quantize'

The two sides take turns (reference, ours, reference, ours, ...), each in processes of its own. Seconds and peak memory
of a process are the operating system's; the peak is the largest of the process and those that it waited for. A ratio is
ours / reference. What is compared in time has to be equal first, or this stops: the loss of the first step, the number
of trained parameters and the learning rates in training, verdicts in evaluations, merged weights in fuse.
Figures: benchmarks/results/speed_WHAT_PRESET.json, of the last invocation.
"""

import argparse
import functools
import importlib.metadata
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orion_triage.dataset.records import Record, image_path, read_split, write_split
from orion_triage.errors import OrionError
from orion_triage.export import quantize

# No torch in here: a child's peak memory counts from its parent's at the moment it was started.
from orion_triage.export.convert import convert
from orion_triage.llama_cpp.toolchain import existing_tools, find_toolchain
from orion_triage.llama_cpp.tools import quantize_file, run_measured
from orion_triage.machine.describe import describe
from orion_triage.mission.mission import default_mission
from orion_triage.models.load import base_name, resolve_base
from orion_triage.runs.manifest import read_manifest
from orion_triage.runs.run import Run, newest_run, open_run, prepare
from orion_triage.safe.files import write_text
from orion_triage.settings import Settings, load_settings, preset_names

MISSION = default_mission()

HERE = Path(__file__).parent
ORION = [sys.executable, "-m", "orion_triage.cli"]
TRAINING_RECORDS, VALIDATION_RECORDS, TEST_RECORDS = 120, 12, 60
TRAINING_EPOCHS = 2  # the published recipe has 3, the shipped base's preset 5; what a side keeps between epochs counts
FEWEST_RECORDS = 3  # to train on and validate: one target of each category
FEWEST_TEST_RECORDS = 2  # a frame to keep and one to drop, which is what condition D needs
RANDOM_ANSWER_TOKENS = 40  # random weights do not end; a trained model's answers have 25 to 40
RANDOM_CHECK_RECORDS = 2  # of 'orion fuse' on random weights, as in 'orion rehearse'
FRAME_SIZES = (512, 384, 256)
LARGEST_VERDICT_SHARE = 0.05  # of verdicts that may differ: rounding decides where two labels are equally likely
LARGEST_WEIGHT_SHARE = 0.002  # of the largest weight: two roundings to 16 bits
LARGEST_HEADER_DIFFERENCE = 4096  # bytes of a GGUF file: the model's name and licence, not a tensor
SMALLER_IS_BETTER = (
    "training_seconds", "asking_seconds", "seconds", "first_seconds", "merge_seconds", "quantize_seconds",
    "process_seconds", "peak_memory_bytes", "server_peak_memory_bytes", "peak_gpu_memory_bytes",
)  # fmt: skip
LARGER_IS_BETTER = ("records_per_second", "share_of_peak")

Figures = dict[str, Any]
Side = Callable[[int], Figures]


@dataclass(frozen=True)
class Bench:
    """What was asked for on the command line."""

    preset: str
    folder: Path
    results: Path
    repeats: int
    toy: bool
    records: int | None
    validation_records: int | None
    run: Path | None
    base: Path | None
    orion: str | None
    sets: tuple[str, ...] = ()

    @property
    def asks_random_weights(self) -> bool:
        """Whether there is no finished run to ask: no model of another preset than the shipped base's is at hand."""
        return self.run is None and self.preset != "tiny"

    @property
    def random_folder(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}-full") / self.preset


# --- processes ------------------------------------------------------------------------------------------------------


def measure(command: Sequence[object], log: Path) -> Figures:
    """Run a command to its end with its output in `log`; raises OrionError with the last of it when it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w+", encoding="utf-8", errors="replace") as output:
        status, use = run_measured([str(word) for word in command], dict(os.environ), output)
        if status:
            output.seek(0)
            last = " | ".join(output.read().strip().splitlines()[-4:])
            raise OrionError(f"{' '.join(map(str, command[:4]))} ... failed ({status}): {last}.", f"Its log: {log}.")
    return {"process_seconds": use.seconds, "peak_memory_bytes": use.peak_memory_bytes}


def work(script: str, worker: str, out: Path, **options: object) -> tuple[Figures, Figures]:
    """One worker of reference.py or ours.py in an empty folder: (what the process took, its result)."""
    shutil.rmtree(out, ignore_errors=True)
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    use = measure([sys.executable, HERE / script, worker, *words, "--out", out], out.with_suffix(".log"))
    return use, json.loads((out / "result.json").read_text(encoding="utf-8"))


def orion(bench: Bench, command: str, run: Run, *flags: str) -> Figures:
    """One command of the package on a run's folder, with the run's settings."""
    settings = [word for value in departures(run.settings) for word in ("--set", value)]
    words = [*command.split(), "--run", run.folder, "--preset", run.settings.preset, *settings, *flags]
    program = [bench.orion] if bench.orion else ORION
    return measure([*program, *words], run.folder / "logs" / f"{command.replace(' ', '')}.log")


def departures(settings: Settings) -> list[str]:
    """What --set has to say so that a command uses these settings; the dataset's are kept in the run folder."""
    plain, own = (value.model_dump(mode="json") for value in (load_settings(settings.preset), settings))
    found = []
    for section in ("base", "fine_tune", "fuse", "quantize", "evaluate"):
        for key, value in own[section].items():
            if value == plain[section][key]:
                continue
            if value is None:
                raise OrionError(
                    f"{section}.{key} is empty in the run and {plain[section][key]} in preset {settings.preset}.",
                    "Take a run of that preset: the command line cannot empty a setting.",
                )
            text = ",".join(value) if isinstance(value, list) else json.dumps(value)
            found.append(f"{section}.{key}={text}")
    return found


def alternate(repeats: int, reference: Side, ours: Side) -> dict[str, list[Figures]]:
    """reference, ours, reference, ours, ...; each call gets the repeat's number."""
    runs: dict[str, list[Figures]] = {"reference": [], "ours": []}
    for number in range(repeats):
        for name, side in (("reference", reference), ("ours", ours)):
            runs[name].append(side(number))
            shown = {key: value for key, value in runs[name][-1].items() if key in SMALLER_IS_BETTER and value}
            print(f"  {number + 1}/{repeats} {name}: {in_words(shown)}", flush=True)
    return runs


def in_words(figures: Figures) -> str:
    return ", ".join(
        f"{key.removesuffix('_bytes')} {value / 1e6:,.0f} MB"
        if key.endswith("_bytes")
        else f"{key.removesuffix('_seconds')} {value:.2f} s"
        for key, value in figures.items()
    )


# --- figures --------------------------------------------------------------------------------------------------------


def summarize(runs: dict[str, list[Figures]]) -> Figures:
    """Medians, spread and ours / reference, of every measure that both sides have."""
    median: dict[str, Figures] = {"reference": {}, "ours": {}}
    spread: dict[str, Figures] = {"reference": {}, "ours": {}}
    ratio = {}
    for measure_name in (*SMALLER_IS_BETTER, *LARGER_IS_BETTER):
        values = {name: [row.get(measure_name) for row in rows] for name, rows in runs.items()}
        if any(value is None for row in values.values() for value in row):
            continue
        for name, row in values.items():
            median[name][measure_name] = statistics.median(row)
            spread[name][measure_name] = [min(row), max(row)]
        pairs = [ours / reference for reference, ours in zip(values["reference"], values["ours"], strict=True)]
        ratio[measure_name] = {
            "of_medians": median["ours"][measure_name] / median["reference"][measure_name],
            "smallest_of_a_pair": min(pairs),
            "largest_of_a_pair": max(pairs),
        }
    return {"median": median, "spread": spread, "ratio": ratio}


def machine() -> Figures:
    """What the figures belong to."""
    gpu = None
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
        listed = subprocess.run(command, capture_output=True, text=True, check=False)
        gpu = listed.stdout.strip().splitlines() or None
    return {**describe(), "gpu": gpu, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS")}


def versions() -> Figures:
    names = ("orion-triage", "torch", "transformers", "peft", "bitsandbytes", "accelerate")
    tools = existing_tools()
    found: Figures = {name: importlib.metadata.version(name) for name in names}
    return found | {"llama.cpp": f"b{tools.build} ({tools.origin})" if tools else None}


def name_of_base(bench: Bench, settings: Settings) -> str:
    """What the weights are called elsewhere: a result does not name this machine's folders."""
    folder = Path(settings.base.model)
    if folder.is_relative_to(bench.random_folder.resolve()):
        return "random weights"
    return base_name(folder) if folder.is_dir() else settings.base.model


def write(
    bench: Bench, what: str, settings: Settings, runs: dict[str, list[Figures]], checks: Figures, **more: Any
) -> Path:
    summary = summarize(runs)
    own_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    kept = settings.model_dump(mode="json", include={"base", "fine_tune", "fuse", "quantize", "evaluate"})
    kept["base"]["model"] = name_of_base(bench, settings)
    value = {
        "what": what,
        "preset": bench.preset,
        "command": ["python", "benchmarks/speed.py", *sys.argv[1:]],
        "machine": machine(),
        "versions": versions(),
        "settings": kept,
        "repeats": bench.repeats,
        **more,
        "checks": checks,
        "ratio_is": "ours / reference",
        **summary,
        "least_peak_memory_that_can_be_measured_bytes": own_peak,
        "runs": runs,
    }
    path = bench.results / f"speed_{what}_{bench.preset}.json"
    write_text(path, json.dumps(value, indent=1) + "\n")
    for name, ratio in summary["ratio"].items():
        print(
            f"  {name}: ours / reference {ratio['of_medians']:.3f} "
            f"({ratio['smallest_of_a_pair']:.3f} to {ratio['largest_of_a_pair']:.3f})"
        )
    print(f"  figures: {path}", flush=True)
    return path


# --- what is worked on ----------------------------------------------------------------------------------------------


@functools.cache
def finished_run(bench: Bench) -> Run:
    """The run that is asked, or fused again: --run, the newest, or one of random weights at a preset's shapes."""
    if not bench.asks_random_weights:
        run = open_run(bench.run or newest_run(Path("runs"), "quantize"))
        if run.settings.preset != bench.preset:
            raise OrionError(
                f"{run.folder} is a run of preset {run.settings.preset}, not {bench.preset}.",
                f"Pass --preset {run.settings.preset}, or another --run.",
            )
        quantize.check_pair(run.gguf)
        return run
    print("making a run of random weights, if there is none", flush=True)
    folder = bench.random_folder
    measure([sys.executable, HERE / "ours.py", "random-run", bench.preset, folder], folder / "random-run.log")
    sets = [
        f"base.model={(folder / 'base').resolve()}",
        f"fuse.check_records={RANDOM_CHECK_RECORDS}",
        f"evaluate.max_new_tokens={RANDOM_ANSWER_TOKENS}",
    ]
    run = Run((folder / "run").resolve(), load_settings(bench.preset, sets))
    prepare(run)
    orion(bench, "fuse", run)
    orion(bench, "quantize", run)
    return run


def base_to_train(bench: Bench) -> Path:
    if bench.base:
        return resolve_base(str(bench.base)).resolve()
    if bench.preset == "tiny":
        return resolve_base(load_settings("tiny").base.model)
    folder = bench.random_folder
    measure([sys.executable, HERE / "ours.py", "random-base", bench.preset, folder], folder / "random-base.log")
    return (folder / "base").resolve()


def dataset_to_train_on(bench: Bench) -> Path:
    """Drawn tiles, built once by the package; the finished run's own at toy size."""
    if bench.toy:
        return finished_run(bench).dataset
    run = Run(bench.folder / "dataset_run", load_settings("tiny"))
    orion(bench, "dataset", run)
    return run.dataset


def in_turn(records: Sequence[Record], count: int, least: int, what: str) -> list[Record]:
    """`count` records, categories in turn, HIGH and LOW first."""
    if not least <= count <= len(records):
        raise OrionError(f"{count} {what} were asked for.", f"Give {least} to {len(records)}.")
    order = ("HIGH", "LOW", "MEDIUM")
    turns = [[record for record in records if record.verdict.category == category] for category in order]
    ordered = [turn[place] for place in range(len(records)) for turn in turns if place < len(turn)]
    return ordered[:count]


def training_subset(dataset: Path, count: int, validation: int, folder: Path) -> None:
    """A dataset of `count` training records, each target with its twin without coordinates."""
    records = read_split(dataset, "train", MISSION)
    targets = list({record.name: record for record in records}.values())
    a_target = len(records) // len(targets)
    chosen = {record.name for record in in_turn(targets, count // a_target, 3, "training targets")}
    train = [record for record in records if record.name in chosen]
    if len(train) != count:
        raise OrionError(f"{count} records cut a target in two.", f"Give --records a multiple of {a_target}.")
    val = in_turn(read_split(dataset, "val", MISSION), validation, 3, "validation records")
    test = in_turn(
        read_split(dataset, "test", MISSION), 3, 3, "test records"
    )  # the dataset's check wants every category
    write_dataset(dataset, {"train": train, "val": val, "test": test}, folder)


def write_dataset(source: Path, splits: dict[Any, list[Record]], folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for split, records in splits.items():
        for record in records:
            target = folder / record.image
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(image_path(source, record), target)
        write_split(folder, split, records)


def clear(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    target.symlink_to(source.resolve(), target_is_directory=True)


# --- training -------------------------------------------------------------------------------------------------------


def training(bench: Bench) -> None:
    base = base_to_train(bench)
    sets = [f"base.model={base}", f"fine_tune.epochs={TRAINING_EPOCHS}", *bench.sets]
    if not machine()["gpu"]:
        sets.append("fine_tune.device=cpu")  # by name: a base that takes days is only measured here
    settings = load_settings(bench.preset, sets)
    dataset = dataset_to_train_on(bench)
    a_step = settings.fine_tune.micro_batch_size * settings.fine_tune.gradient_accumulation_steps
    count = 2 * FEWEST_RECORDS if bench.toy else bench.records or TRAINING_RECORDS
    validation = FEWEST_RECORDS if bench.toy else bench.validation_records or VALIDATION_RECORDS
    folder = bench.folder / f"training_{bench.preset}"
    checked = None
    if count > a_step:  # with all records in one step, their order does not matter
        reference, ours = training_sides(bench, dataset, a_step, FEWEST_RECORDS, settings, folder / "check")
        checked = compare_trainings(reference(0), ours(0))
    reference, ours = training_sides(bench, dataset, count, validation, settings, folder)
    # The base of a preset with published shapes is random, so its share of the device is as good as a trained one's.
    _, least = work(
        "reference.py", "operations", folder / "operations",
        base=base, dataset=folder / "dataset", settings=folder / "settings.json",
    )  # fmt: skip
    runs = alternate(bench.repeats, reference, ours)
    checks = checked or compare_trainings(runs["reference"][0], runs["ours"][0])
    for row in (*runs["reference"], *runs["ours"]):
        row["share_of_peak"] = (
            row["records_per_second"] * least["operations_per_record"] / least["peak_operations_per_second"]
        )
    write(
        bench, "training", settings, runs, checks,
        records=count, validation_records=validation, records_a_step=a_step, device=least,
    )  # fmt: skip


def training_sides(
    bench: Bench, dataset: Path, count: int, validation: int, settings: Settings, folder: Path
) -> tuple[Side, Side]:
    run = Run(folder.resolve(), settings)
    training_subset(dataset, count, validation, run.dataset)
    prepare(run)  # settings.json, which the reference reads

    def reference(number: int) -> Figures:
        use, result = work(
            "reference.py", "train", run.folder / "reference",
            base=settings.base.model, dataset=run.dataset, settings=run.folder / "settings.json",
        )  # fmt: skip
        seconds, records = result["training_seconds"], result["records"]
        figures = trained(result["losses"], seconds, records, result["peak_gpu_memory_bytes"])
        return use | figures | {name: result[name] for name in ("adapted_modules", "trained_parameters")}

    def ours(number: int) -> Figures:
        clear(run.adapter, run.folder / "fine_tune_work")  # a finished or begun training would be gone on with
        use = orion(bench, "fine-tune", run)
        stage_manifest = read_manifest(run.adapter)
        assert stage_manifest is not None
        figures = stage_manifest.figures
        a_step = settings.fine_tune.micro_batch_size * settings.fine_tune.gradient_accumulation_steps
        seconds = figures["seconds_per_sample"] * figures["steps"] * a_step
        losses = json.loads((run.adapter / "loss_log.json").read_text(encoding="utf-8"))
        counts = {
            "adapted_modules": sum(sum(towers.values()) for towers in figures["census"].values()),
            "trained_parameters": sum(figures["trained_parameters"].values()),
        }
        return (
            use
            | trained(losses, seconds, figures["train_records"] * settings.fine_tune.epochs, figures["peak_vram_bytes"])
            | counts
        )

    return reference, ours


def trained(losses: list[Figures], seconds: float, records: int, gpu_memory: int | None) -> Figures:
    steps = [entry for entry in losses if "loss" in entry]
    return {
        "training_seconds": seconds,
        "records_per_second": records / seconds,
        "peak_gpu_memory_bytes": gpu_memory,
        "losses": [entry["loss"] for entry in steps],
        "learning_rates": [entry["learning_rate"] for entry in steps],
        "validation_loss": next(entry["eval_loss"] for entry in reversed(losses) if "eval_loss" in entry),
    }


def compare_trainings(reference: Figures, ours: Figures) -> Figures:
    """What two trainings of one step must have in common; raises OrionError with what they have not.

    Fresh LoRA matrices change nothing, so the loss of the first step does not depend on dropout or their values.
    """
    largest = 1e-2 if reference["peak_gpu_memory_bytes"] else 1e-3  # 16 bits on a GPU, 32 on a CPU
    first = reference["losses"][0], ours["losses"][0]
    difference = abs(first[0] - first[1]) / first[0]
    if not difference <= largest:
        raise OrionError(
            f"the loss of the first step is {first[0]:.5f} by the reference and {first[1]:.5f} by ours.",
            "They do not train on the same: compare benchmarks/reference.py with 'orion fine-tune'.",
        )
    for name in ("adapted_modules", "trained_parameters", "learning_rates"):
        if reference[name] != ours[name]:
            raise OrionError(
                f"{name.replace('_', ' ')}: {reference[name]} by the reference, {ours[name]} by ours.",
                "They do not train alike: compare benchmarks/reference.py with 'orion fine-tune'.",
            )
    return {
        "first_loss": {"reference": first[0], "ours": first[1], "relative_difference": difference},
        "validation_loss_after_it": {"reference": reference["validation_loss"], "ours": ours["validation_loss"]},
        "adapted_modules": ours["adapted_modules"],
        "trained_parameters": ours["trained_parameters"],
    }


# --- evaluation -----------------------------------------------------------------------------------------------------


def evaluation(bench: Bench) -> None:
    evaluate(bench, "evaluation", "fine-tuned", "evaluate")


def evaluation_gguf(bench: Bench) -> None:
    evaluate(bench, "evaluation-gguf", "quantized", "evaluate --gguf")


def evaluate(bench: Bench, what: str, model: str, command: str) -> None:
    source = finished_run(bench)
    records = read_split(source.dataset, "test", MISSION)
    if bench.asks_random_weights:  # they have learned from no split
        records = [*records, *read_split(source.dataset, "val", MISSION)]
    usual = TEST_RECORDS if bench.preset == "tiny" else FEWEST_TEST_RECORDS
    count = FEWEST_TEST_RECORDS if bench.toy else bench.records or min(usual, len(records))
    run = Run((bench.folder / f"{what}_{bench.preset}").resolve(), source.settings)
    write_dataset(source.dataset, {"test": in_turn(records, count, FEWEST_TEST_RECORDS, "test records")}, run.dataset)
    link(source.merged, run.merged)
    link(source.gguf, run.gguf)
    prepare(run)
    files: Figures = {"model": run.merged}
    if model == "quantized":
        files = {"backbone": run.gguf / quantize.QUANTIZED, "mmproj": run.gguf / quantize.MMPROJ}
    asked: dict[str, list[Figures]] = {}

    def reference(number: int) -> Figures:
        use, result = work(
            "reference.py", what.replace("evaluation", "evaluate"), run.folder / "reference",
            **files, dataset=run.dataset, settings=run.folder / "settings.json",
        )  # fmt: skip
        asked["reference"] = read_lines(run.folder / "reference" / "answers.jsonl")
        return use | result

    def ours(number: int) -> Figures:
        use = orion(bench, command, run, "--force")
        rows = asked["ours"] = read_lines(run.evaluation(model) / "predictions.jsonl")
        seconds = sum(row["seconds"] for row in rows)  # opening and drawing pictures not counted
        compared = compare_answers(asked["reference"], rows, bench.toy)
        return use | {"asking_seconds": seconds, "questions": len(rows)} | compared

    runs = alternate(bench.repeats, reference, ours)
    checks: Figures = {"questions": len(asked["ours"])}
    for name in ("differing_verdicts", "differing_answers"):
        checks[f"most_{name}"] = max(row[name] for row in runs["ours"])
    earlier = source.evaluation(model) / "predictions.jsonl"
    if earlier.is_file():
        checks["ours_against_the_run's_own_evaluation"] = against_earlier(read_lines(earlier), asked["ours"])
    write(bench, what, run.settings, runs, checks, records=count)


def read_lines(path: Path) -> list[Figures]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def compare_answers(reference: list[Figures], ours: list[Figures], strictly: bool) -> Figures:
    """How many verdicts and texts differ; raises OrionError when too many do, with `strictly` when one does."""
    theirs, own = ({row["id"]: row for row in rows} for rows in (reference, ours))
    if theirs.keys() != own.keys():
        odd = sorted(theirs.keys() ^ own.keys())
        raise OrionError(f"{len(odd)} questions were asked by one side only, {odd[0]} first.", "Compare the sides.")
    verdicts = [name for name in own if theirs[name]["category"] != own[name]["category"]]
    if len(verdicts) > (0 if strictly else LARGEST_VERDICT_SHARE * len(own)):
        name = verdicts[0]
        raise OrionError(
            f"{len(verdicts)} of {len(own)} verdicts differ, {name} first: {theirs[name]['answer']!r} by the "
            f"reference, {own[name]['answer']!r} by ours.",
            "They do not ask the same: compare benchmarks/reference.py with the evaluation.",
        )
    texts = sum(theirs[name]["answer"] != own[name]["answer"] for name in own)
    return {"differing_verdicts": len(verdicts), "differing_answers": texts}


def against_earlier(earlier: list[Figures], now: list[Figures]) -> Figures:
    """The same questions in the evaluation that the run already had: verdicts, and scores where both have them."""
    before = {row["id"]: row for row in earlier}
    # Condition D pairs other places when fewer records are asked.
    both = [(a, row) for row in now if (a := before.get(row["id"])) and a["donor"] == row["donor"]]
    scored = [(a["scores"], b["scores"]) for a, b in both if a["scores"] and b["scores"]]
    differences = [abs(a[category] - b[category]) for a, b in scored for category in a]
    return {
        "questions_in_both": len(both),
        "differing_verdicts": sum(a["category"] != b["category"] for a, b in both),
        "scored_in_both": len(scored),
        "largest_score_difference": max(differences, default=None),
    }


# --- one frame ------------------------------------------------------------------------------------------------------


def frame(bench: Bench) -> None:
    run = finished_run(bench)
    own_size = run.settings.base.frame_size
    sizes = [size for size in FRAME_SIZES if size <= own_size]
    for size in sizes:
        compare_on_frames(bench, run, f"frame-{size}", size, size, run.gguf / quantize.MMPROJ)
    if bench.toy or len(sizes) == 1:
        return
    # Other ways to fly, against the reference at the preset's own size.
    smaller = bench.folder / f"mmproj_{bench.preset}.gguf"
    convert(find_toolchain(), run.merged, smaller, mmproj=True, outtype="q8_0")
    for size in dict.fromkeys((sizes[0], sizes[-1])):
        if size != own_size:
            compare_on_frames(bench, run, f"frame-{own_size}-at-{size}", own_size, size, run.gguf / quantize.MMPROJ)
        compare_on_frames(bench, run, f"frame-{own_size}-at-{size}-mmproj-Q8_0", own_size, size, smaller)
    smaller.unlink()


def compare_on_frames(bench: Bench, run: Run, what: str, reference_size: int, our_size: int, our_mmproj: Path) -> None:
    folder = bench.folder / f"{what}_{bench.preset}"
    dataset = folder / "dataset"
    write_dataset(
        run.dataset, {"test": in_turn(read_split(run.dataset, "test", MISSION), 2, 2, "test records")}, dataset
    )
    backbone, mmproj = run.gguf / quantize.QUANTIZED, run.gguf / quantize.MMPROJ

    def side(script: str, name: str, mmproj: Path, size: int) -> Side:
        def once(number: int) -> Figures:
            return work(script, "frame", folder / name, backbone=backbone, mmproj=mmproj, dataset=dataset, size=size)[1]

        return once

    print(what, flush=True)
    runs = alternate(
        bench.repeats,
        side("reference.py", "reference", mmproj, reference_size),
        side("ours.py", "ours", our_mmproj, our_size),
    )
    same_image = reference_size == our_size
    checks = [compare_frames(*both, same_image) for both in zip(runs["reference"], runs["ours"], strict=True)]
    write(
        bench, what, run.settings, runs, {"least_equal_tokens": min(checks), "tokens": len(runs["ours"][0]["tokens"])}
    )


def compare_frames(reference: Figures, ours: Figures, same_image: bool) -> int:
    """How many tokens are equal up to the first that is not; raises OrionError when the work is not the same."""
    for name in ("prompt_tokens", "tokens") if same_image else ("tokens",):
        counts = [len(row[name]) if isinstance(row[name], list) else row[name] for row in (reference, ours)]
        if counts[0] != counts[1]:
            raise OrionError(f"{name}: {counts[0]} by the reference, {counts[1]} by ours.", "Ask both sides alike.")
    pairs = list(zip(reference["tokens"], ours["tokens"], strict=True))
    return next((place for place, (theirs, own) in enumerate(pairs) if theirs != own), len(pairs))


# --- adapter to flight pair -----------------------------------------------------------------------------------------


def fuse(bench: Bench) -> None:
    source = finished_run(bench)
    settings = source.settings.model_copy(
        update={
            "base": source.settings.base.model_copy(
                update={"model": str(resolve_base(source.settings.base.model).resolve())}
            )
        }
    )
    run = Run((bench.folder / f"fuse_{bench.preset}").resolve(), settings)
    run.folder.mkdir(parents=True, exist_ok=True)
    link(source.dataset, run.dataset)
    link(source.adapter, run.adapter)
    prepare(run)
    theirs = run.folder / "reference"
    tools = find_toolchain()

    def reference(number: int) -> Figures:
        merge, _ = work(
            "reference.py", "merge", theirs,
            base=resolve_base(source.settings.base.model), adapter=run.adapter, settings=run.folder / "settings.json",
        )  # fmt: skip
        merged, backbone, mmproj = theirs / "merged", theirs / quantize.F16, theirs / quantize.MMPROJ
        uses = {
            "convert": convert(tools, merged, backbone, mmproj=False),
            "convert mmproj": convert(tools, merged, mmproj, mmproj=True),
            "quantize": quantize_file(tools, backbone, theirs / quantize.QUANTIZED, settings.quantize.type),
        }
        return fused(merge, sum(use.seconds for use in uses.values())) | {
            "peak_memory_bytes": max(merge["peak_memory_bytes"], *(use.peak_memory_bytes for use in uses.values())),
            "peak_memory_bytes_of": {"merge": merge["peak_memory_bytes"]}
            | {name: use.peak_memory_bytes for name, use in uses.items()},
        }

    def ours(number: int) -> Figures:
        clear(run.merged, run.gguf)
        merge, rest = orion(bench, "fuse", run), orion(bench, "quantize", run)
        peaks = {"orion fuse": merge["peak_memory_bytes"], "orion quantize": rest["peak_memory_bytes"]}
        return fused(merge, rest["process_seconds"]) | {
            "peak_memory_bytes": max(peaks.values()),
            "peak_memory_bytes_of": peaks,
        }

    runs = alternate(bench.repeats, reference, ours)
    _, weights = work(
        "reference.py", "compare-weights", run.folder / "weights", first=theirs / "merged", second=run.merged
    )
    write(bench, "fuse", settings, runs, compare_products(weights, theirs, run.gguf))
    clear(theirs, run.merged, run.gguf)


def fused(merge: Figures, quantize_seconds: float) -> Figures:
    merge_seconds = merge["process_seconds"]
    return {
        "merge_seconds": merge_seconds,
        "quantize_seconds": quantize_seconds,
        "process_seconds": merge_seconds + quantize_seconds,
    }


def compare_products(weights: Figures, reference: Path, ours: Path) -> Figures:
    """The merged weights may differ by rounding, the files by names in their headers; raises OrionError otherwise."""
    if not weights["largest_difference"] <= LARGEST_WEIGHT_SHARE * weights["largest_weight"]:
        raise OrionError(
            f"the merged weights differ by up to {weights['largest_difference']:.2e}.", "Compare the two merges."
        )
    sizes = {name: (ours / name).stat().st_size for name in (quantize.F16, quantize.MMPROJ, quantize.QUANTIZED)}
    for name, size in sizes.items():
        other = (reference / name).stat().st_size
        if abs(other - size) > LARGEST_HEADER_DIFFERENCE:
            raise OrionError(f"{name} has {other} bytes by the reference and {size} by ours.", "Compare their tensors.")
    return {"merged_weights": weights, "bytes": sizes}


# --- command line ---------------------------------------------------------------------------------------------------

BENCHMARKS: dict[str, Callable[[Bench], None]] = {
    "training": training,
    "evaluation": evaluation,
    "evaluation-gguf": evaluation_gguf,
    "frame": frame,
    "fuse": fuse,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS), metavar="WHAT")
    parser.add_argument("--preset", choices=preset_names(), default="tiny", help="others than tiny: random weights")
    parser.add_argument("--run", type=Path, help="a finished run (default: the newest in runs/, or random weights)")
    parser.add_argument("--base", type=Path, help="weights to train in place of random ones")
    parser.add_argument(
        "--records", type=int, help="training records, or test records (120, 60; random weights: 120, 2)"
    )
    parser.add_argument("--val-records", type=int, dest="validation_records", help="validation records (12)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--toy", action="store_true", help="once and smallest, and every verdict must be equal")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench"), help="what is worked in")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--orion", metavar="PROGRAM", help="the command that is measured (default: this Python's)")
    parser.add_argument(
        "--set", action="append", default=[], dest="sets", metavar="STAGE.KEY=VALUE", help="a setting of the training"
    )
    arguments = vars(parser.parse_args())
    if arguments["repeats"] < 1:
        parser.error("--repeats must be 1 or more")
    arguments["repeats"] = 1 if arguments["toy"] else arguments["repeats"]
    arguments["sets"] = tuple(arguments["sets"])  # finished_run is cached by what was asked
    names = arguments.pop("only")
    bench = Bench(**arguments)
    try:
        for name in names:
            print(f"{name}, preset {bench.preset}", flush=True)
            BENCHMARKS[name](bench)
    except OrionError as error:
        sys.exit(f"{error.message} {error.fix}")


if __name__ == "__main__":
    main()
