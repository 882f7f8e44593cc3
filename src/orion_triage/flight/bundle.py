"""The flight bundle: the GGUF pair, its launch script, golden frames and a go/no-go checker."""

import json
import math
import platform
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orion_triage import __version__, templates
from orion_triage.errors import OrionError, one_line
from orion_triage.evaluate import head as heads
from orion_triage.evaluate import threshold
from orion_triage.evaluate.metrics import compare
from orion_triage.evaluate.results import current_results
from orion_triage.evaluate.run import prediction_of
from orion_triage.evaluate.variants import VERDICT_ONLY
from orion_triage.evaluate.verdict import DO_NOT_FLY
from orion_triage.export import quantize
from orion_triage.export.convert import convert
from orion_triage.flight import golden_frames, server_flags, tune
from orion_triage.flight.check_flight import SCHEMA_VERSION
from orion_triage.flight.server_flags import ALLOWED, FLASH_ATTENTION
from orion_triage.imagery.frames import BLANK_ENTROPY_BITS, BLANK_GRADIENT, BLANK_ROWS
from orion_triage.imagery.stretch import stretch_of
from orion_triage.llama_cpp.server import OPTIONS, Server
from orion_triage.llama_cpp.toolchain import (
    PINNED_BUILD,
    WHEEL,
    WHEEL_SHA256,
    Toolchain,
    find_toolchain,
)
from orion_triage.mission.contract import portable
from orion_triage.mission.decide import Rules, as_steps, in_words
from orion_triage.mission.mission import listed
from orion_triage.mission.prompt import render_prompt
from orion_triage.mission.verdict import category_grammar, cue_of, grammar, grammars, require_category_alone
from orion_triage.models.family import turn_of
from orion_triage.models.licence import base_of, licence_files
from orion_triage.progress import Progress, silent
from orion_triage.runs import manifest
from orion_triage.safe.files import locked, replaced_folder, require_free_space, sha256_of_file, write_text
from orion_triage.safe.reading import read_object

if TYPE_CHECKING:
    from orion_triage.runs.run import Run

LIST, LIST_HASH = "bundle.json", "bundle.json.sha256"
SECOND_TOWER = quantize.tower_name("Q8_0")
_SHOWN = 5  # names of files in an error
CONDITION = "B"  # in flight, the prompt has no coordinates
# These need only Python's standard library.
PROGRAMS = ("check_flight.py", "decide_frame.py", "ask_frame.py", "triage_on_board.py", "server_flags.py", "tune.py")
BLANK_LIMITS = {"rows": [*BLANK_ROWS], "entropy_bits_below": BLANK_ENTROPY_BITS, "gradient_below": BLANK_GRADIENT}
# The time-out ends a frame that hangs; it must not end one on a slower computer. The published flight took up to 82 s
# per frame on a Raspberry Pi 5, six times the 14 s of two x86 cores; a hot or busy Pi is slower still.
TIME_OUT_FACTOR, SHORTEST_TIME_OUT = 10, 60


def run(
    run: "Run",
    out: Path,
    progress: Progress = silent,
    *,
    accepted_risk: str = "",
    time_out: float | None = None,
    head: bool = False,
    verdict_only: bool = False,
    second_tower: bool = False,
) -> dict[str, Any]:
    """Write the bundle of a run's GGUF pair into the folder `out`.

    Returns its bundle.json, its size in `bytes`, the `seconds_per_frame` of the golden frames, and what decided in the
    bundle that it replaces (`decided_before`; empty without one). These three are not in the bundle: two bundles of one
    run are equal to the byte as long as they have the same time-out. The golden frames are of the test split; their
    expected answers come from a server with the flight options. `time_out` are the most seconds per frame in flight; by
    default, it is derived from the golden frames' (`time_out_of`). A bundle in `out` is replaced, with the flags that
    tune.py measured for it.

    With `head`, the run's head decides in flight. What it needs is under `head` in bundle.json, with names that stand
    for the pair's beside it: whoever flies the head takes them instead (`flown` in check_flight.py).
    With `verdict_only`, the flight decides the category first, with the threshold of the verdict alone, and writes a
    reason only for the mission's `reasons_for`. The notes compare it with reason-first answers.
    With `second_tower`, the vision tower is in it as Q8_0, too, for tune.py to measure.

    Raises OrionError if the pair is incomplete, changed or not evaluated, if its verdict is DO NOT FLY and
    `accepted_risk` does not say why it flies nevertheless, if the frames are missing, or if `out` is a folder that is
    not a bundle, or has files that are not the bundle's: frames and logs of a flight.
    """
    out = out.resolve()
    if out.exists() and not (out / LIST).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise OrionError(f"{out} exists and is not a bundle.", "Choose another folder with --out.")
    _require_no_others(out)
    before = _decided_before(out)
    flown = quantize.check_pair(run.gguf)
    if head and verdict_only:
        raise OrionError("a head has no reason to leave out.", "Leave out one of --head and --verdict-only.")
    of: threshold.Of = "verdict-only" if verdict_only else "pair"
    point, rules = threshold.read(run.folder, run.gguf, of), threshold.rules_of(run, of)
    promised, size = threshold.promise_of(run, of), run.settings.base.frame_size
    if head or verdict_only:
        require_category_alone(run.settings.mission)
    own = heads.read(run.folder, run.settings.mission, run.gguf, size) if head else None
    of_head = threshold.rules_of(run, "head") if own else None
    rows = _evaluated(run, VERDICT_ONLY if verdict_only else "quantized")
    verdict = _may_fly(run, accepted_risk)
    if verdict_only:
        verdict["measured_on"] = "answers with the reason first; this bundle decides before a reason is written"
    if second_tower and not any(run.merged.glob("*.safetensors")):
        raise OrionError(
            f"{run.merged} has no weights, of which a Q8_0 vision tower is made.",
            "Run 'orion fuse --force' to make them again.",
        )
    if second_tower and SECOND_TOWER in flown.names:
        raise OrionError("the pair's vision tower is Q8_0 already.", "Leave --both-towers out.")
    names = (*flown.names, quantize.PAIR)
    require_free_space(out.parent, sum((run.gguf / name).stat().st_size for name in names) + 20_000_000, "the bundle")
    toolchain = find_toolchain(progress)
    with locked(run.folder, "orion bundle"), replaced_folder(out) as folder:
        for path in [*(run.gguf / name for name in names), *licence_files(run.gguf)]:
            shutil.copyfile(path, folder / path.name)
        quantize.check_pair(folder)
        if second_tower:
            progress("converting the vision tower to Q8_0", 0, 1)
            convert(toolchain, run.merged, folder / SECOND_TOWER, mmproj=True, outtype="q8_0")
        pair = tuple(folder / name for name in flown.names)
        log, threads = run.folder / "logs" / "bundle-server.log", run.settings.evaluate.threads
        with Server(toolchain, *pair, log=log, turn=turn_of(pair[0]), threads=threads) as server:
            golden, request, seconds = golden_frames.ask(
                server.client, run, rows, rules, folder, progress, verdict_only=verdict_only
            )
        limit = time_out or time_out_of(seconds)
        tolerances = golden_frames.tolerances(golden)
        flown_head: dict[str, Any] | None = None
        of_its_frames: list[float] = []
        if own and of_head:
            shutil.copyfile(heads.path_in(run.folder), folder / heads.FILE_NAME)
            with Server(
                toolchain, *pair, log=log, turn=turn_of(pair[0]), threads=threads, options=heads.EMBEDDING
            ) as server:
                expected, of_its_frames = golden_frames.ask_head(
                    server.client, run, own, of_head, golden, folder, progress
                )
            flown_head = _head(run, own, of_head, expected, time_out or time_out_of(of_its_frames))
        reasons = request["verdict_only"]["reasons"] if verdict_only else None
        for category, name in (reasons or {}).items():
            write_text(folder / name, grammar(run.settings.mission, category))
        more = {"time_out": limit, "tolerances": tolerances, "promise": promised, "reasons": reasons}
        _write_texts(folder, run, flown, toolchain, point, verdict, rules, more, flown_head)
        record = {
            "schema_version": SCHEMA_VERSION,
            "preset": run.settings.preset,
            "base": base_of(run.gguf) or run.settings.base.model,
            "frame_size": size,
            "stretch": _stretch(run),
            "mission": portable(run.settings.mission).model_dump(mode="json"),
            "model": flown.backbone.name,
            "mmproj": flown.mmproj.name,
            "llama_cpp_build": toolchain.build,
            "versions": {"orion-triage": __version__, **_manifest(run.gguf, "quantize").versions},
            "made_on": platform.machine(),
            "decision": as_steps(run.settings.mission, rules, BLANK_LIMITS),
            "seconds_per_frame_at_most": limit,
            "temperature": point[1] if point else None,
            "promise": promised,
            "verdict": verdict,
            "request": request,
            "tolerances": tolerances,
            "golden": golden,
            "notes": [
                *golden_frames.notes(golden, run.settings.mission),
                *([_against_reason_first(run, rows)] if verdict_only else []),
            ],
            **({"head": flown_head} if flown_head else {}),
            "files": manifest.hash_outputs(folder),
        }
        write_text(folder / LIST, json.dumps(record, indent=2) + "\n")
        write_text(folder / LIST_HASH, f"{sha256_of_file(folder / LIST)}  {LIST}\n")
        total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        _require_no_others(out)  # a flight may have begun there in the meantime
    made = {"bytes": total, "seconds_per_frame": seconds, "seconds_per_frame_of_head": of_its_frames}
    return record | made | {"decided_before": before}


def _head(run: "Run", head: heads.Head, rules: Rules, golden: list[dict[str, Any]], limit: float) -> dict[str, Any]:
    """What bundle.json says of the head; all but the last key have the names of what they stand for."""
    heads_own = (heads.EMBEDDING[place] for place in range(len(OPTIONS), len(heads.EMBEDDING)))
    return {
        "weights": heads.FILE_NAME,
        "decision": as_steps(run.settings.mission, rules, BLANK_LIMITS),
        "seconds_per_frame_at_most": limit,
        "promise": threshold.promise_of(run, "head"),
        "tolerances": {
            "category_nats": golden_frames.HEAD_NATS, "other_labels_nats": golden_frames.HEAD_NATS, "other_words": 0,
        },
        "golden": golden,
        "notes": list(golden_frames.head_notes(golden)),
        "server_options": list(heads_own),
        "labelled": {key: head.figures[key] for key in ("frames", "head", "zero_shot", "change")},
    }  # fmt: skip


def time_out_of(seconds_per_frame: Sequence[float]) -> int:
    """The most seconds of a frame in flight: TIME_OUT_FACTOR times the slowest golden frame's, in whole minutes.

    Whole minutes, at least SHORTEST_TIME_OUT: two bundles of one run mostly have the same one.
    """
    return max(SHORTEST_TIME_OUT, math.ceil(TIME_OUT_FACTOR * max(seconds_per_frame) / 60) * 60)


def verdict_line(bundle: dict[str, Any]) -> str:
    """The ground's verdict on the bundle's model, and the reason for flying it nevertheless."""
    verdict = bundle["verdict"]
    because = f" ({', '.join(verdict['because'])})" if verdict["because"] else ""
    measured = f", measured on {verdict['measured_on']}" if "measured_on" in verdict else ""
    risk = f"; risk accepted: {verdict['accepted_risk']}" if verdict["accepted_risk"] else ""
    return f"the ground's verdict: {verdict['verdict']}{because}{measured}{risk}"


def decides(bundle: dict[str, Any]) -> str:
    """What decides in flight, in words, to compare a new bundle with the one that it replaces."""
    first = "verdict_only" in bundle["request"]
    who = "the head" if "head" in bundle else "the pair, verdict first" if first else "the pair, reason first"
    decision = bundle["head"]["decision"] if "head" in bundle else bundle["decision"]
    at = (f" {step['drop_probability_at_least']:.3f}" if step["step"] == "threshold" else "" for step in decision)
    return ", ".join([who, *(step["step"] + value for step, value in zip(decision, at, strict=True))])


def _require_no_others(out: Path) -> None:
    """Raise OrionError if the bundle in `out` has files besides its own, which a new bundle would delete.

    Its own are those in its list, and what tune.py measured for it, which another bundle does not use.
    """
    own = {LIST, LIST_HASH}
    for name in (server_flags.FILE, tune.RESULTS):
        own |= {name, f"{name}.part"}
    try:
        own |= read_object(out / LIST)["files"].keys()
    except FileNotFoundError:
        return
    except (OrionError, KeyError, AttributeError):
        pass  # a damaged list names no file
    found = {path.relative_to(out) for path in out.rglob("*") if path.is_symlink() or not path.is_dir()}
    others = sorted(path.as_posix() for path in found if path.as_posix() not in own and "__pycache__" not in path.parts)
    if others:
        more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
        raise OrionError(
            f"{out} has files that are not of the bundle in it, and a new bundle would delete them: "
            f"{', '.join(others[:_SHOWN])}{more}.",
            "Move them to another folder, or choose another folder with --out.",
        )


def _decided_before(out: Path) -> str:
    """What decides in the bundle that is in `out`; empty without one, or for one of another version."""
    try:
        return decides(read_object(out / LIST))
    except (OrionError, FileNotFoundError, KeyError, TypeError):
        return ""


def head_line(bundle: dict[str, Any]) -> str:
    """What is known of the bundle's head, from the labelled frames that it was fitted on."""
    labelled = bundle["head"]["labelled"]
    right, pair = labelled["head"], labelled["zero_shot"]
    return (
        f"the head decides: right on {right['count']} of {right['total']} labelled frames that it had not seen, "
        f"the pair on {pair['count']} (p = {labelled['change']['zero_shot']['exact_p']:.2g})"
    )


def _may_fly(run: "Run", accepted_risk: str) -> dict[str, Any]:
    """The verdict on the run with `accepted_risk` (one line, or empty)."""
    verdict = current_results(run)[0]["verdict"]
    reason = one_line(accepted_risk).strip()
    if verdict["verdict"] == DO_NOT_FLY and not reason:
        raise OrionError(
            f"the verdict on {run.folder} is {DO_NOT_FLY}: {', '.join(verdict['because'])}.",
            "Run 'orion verdict' to read what to do. To bundle it nevertheless, say why: --accept-risk \"REASON\".",
        )
    return {**verdict, "accepted_risk": reason}


def _manifest(folder: Path, stage: str) -> manifest.Manifest:
    stage_manifest = manifest.read_manifest(folder)
    if stage_manifest is None:
        raise OrionError(f"{folder} is not finished.", f"Run 'orion {stage}' first, or pass another run.")
    return stage_manifest


def _evaluated(run: "Run", variant: str) -> list[dict[str, Any]]:
    """The answers of exactly this pair to the test frames with the flight prompt; raises OrionError without them."""
    from orion_triage.evaluate.run import read_predictions

    folder = run.evaluation(variant)
    command = "evaluate --gguf" if variant == "quantized" else f"evaluate --variants {variant}"
    command += f" --run {run.folder}"
    stage_manifest = _manifest(folder, command)
    if stage_manifest.inputs.get("gguf") != manifest.hash_inputs({"gguf": run.gguf})["gguf"]:
        raise OrionError(f"{folder} is the evaluation of another pair.", f"Run 'orion {command}' again.")
    return [row for row in read_predictions(folder, run.settings.mission) if row["condition"] == CONDITION]


def _against_reason_first(run: "Run", rows: list[dict[str, Any]]) -> str:
    """The right answers of the category alone beside those with the reason first, on the same frames."""
    reason_first = {row["name"]: row for row in _evaluated(run, "quantized")}
    pairs = [(reason_first[row["name"]], row) for row in rows]
    first, second = ([prediction_of(pair[side], run.settings.mission) for pair in pairs] for side in (0, 1))
    change = compare(first, second, f"quantized and {VERDICT_ONLY}")
    before, after = (sum(pair[side]["category"] == pair[side]["truth"] for pair in pairs) for side in (0, 1))
    return (
        f"Verdict only: {after} of {len(pairs)} test frames are right without coordinates; with the reason first, "
        f"{before} (McNemar's exact p = {change.exact_p:.2f})."
    )


def _stretch(run: "Run") -> dict[str, Any] | None:
    """The limits that make 8-bit frames of the camera's values, or None if the run's pictures have 8 bits."""
    stretch = stretch_of(run.settings.dataset)
    return asdict(stretch) if stretch else None


def _write_texts(
    folder: Path,
    run: "Run",
    pair: quantize.Pair,
    toolchain: Toolchain,
    point: tuple[float, float] | None,
    verdict: dict[str, Any],
    rules: Rules,
    more: dict[str, Any],
    head: dict[str, Any] | None,
) -> None:
    """Prompt, grammars, launch script, checker, flight clients and the operator's README; `more` is for the latter."""
    mission = run.settings.mission
    write_text(folder / "prompt.txt", render_prompt(mission, None))
    write_text(folder / "grammar.gbnf", grammar(mission))
    write_text(folder / "category_grammar.gbnf", category_grammar(mission))
    for field in mission.fields:
        if field.words:
            write_text(folder / f"{field.name}_grammar.gbnf", grammars(mission)[cue_of(field.name)])
    for name in PROGRAMS:
        shutil.copyfile(Path(__file__).with_name(name), folder / name)
    place = OPTIONS.index(FLASH_ATTENTION)
    tunable, fixed = OPTIONS[place : place + 2], OPTIONS[:place] + OPTIONS[place + 2 :]
    values: dict[str, Any] = {
        "model": pair.backbone.name,
        "mmproj": pair.mmproj.name,
        "arguments": " ".join(fixed),
        "tunable": " ".join(tunable),
        "allowed": list(ALLOWED),
        "towers": 1 + (pair.mmproj.name != SECOND_TOWER and (folder / SECOND_TOWER).exists()),
        "frame_size": run.settings.base.frame_size,
        "build": toolchain.build,
        "pinned": toolchain.build == PINNED_BUILD,
        "wheel": WHEEL,
        "wheel_sha256": WHEEL_SHA256,
        "time_out_factor": TIME_OUT_FACTOR,
        "blank_limits": BLANK_LIMITS,
        "decision": in_words(mission, rules),
        "kept": listed(mission.that("send", "store")),
        "mission": mission,
        "temperature": point[1] if point else None,
        "verdict": verdict,
        "stretch": _stretch(run),
        "head": head,
        "head_line": head_line({"head": head}) if head else "",
        "of_head": in_words(mission, threshold.rules_of(run, "head"), "the labelled frames") if head else [],
        **more,
    }
    for template, name in (("serve.sh.j2", "serve.sh"), ("bundle_readme.txt.j2", "README.txt")):
        write_text(folder / name, templates.fill("flight", template, **values))
    for name in (*PROGRAMS, "serve.sh"):
        (folder / name).chmod(0o755)
