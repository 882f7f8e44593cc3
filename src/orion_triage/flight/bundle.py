"""The flight bundle: the GGUF pair, its launch script, golden images and a go/no-go checker."""

import json
import platform
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orion_triage import __version__, templates
from orion_triage.dataset.dataset import Dataset
from orion_triage.errors import OrionError, one_line
from orion_triage.evaluate import threshold
from orion_triage.evaluate.results import current_results
from orion_triage.evaluate.verdict import DO_NOT_FLY
from orion_triage.export import quantize
from orion_triage.imagery.frames import CAMERA_SIZE, Frame, is_blank, shrink
from orion_triage.imagery.stretch import stretch_of
from orion_triage.llama_cpp.client import CANDIDATES, GREEDY, PRINTABLE, Client
from orion_triage.llama_cpp.server import OPTIONS, Server
from orion_triage.llama_cpp.toolchain import PINNED_BUILD, WHEEL, WHEEL_SHA256, Toolchain, find_toolchain
from orion_triage.mission.answer import Answer
from orion_triage.mission.contract import portable
from orion_triage.mission.decide import Rules, in_words
from orion_triage.mission.mission import Mission
from orion_triage.mission.prompt import render_prompt, user_text, with_image
from orion_triage.mission.scoring import Scoring
from orion_triage.mission.verdict import (
    CATEGORY_CUE,
    answer_tokens,
    category_grammar,
    cue_of,
    grammar,
    grammars,
    parse_verdict,
)
from orion_triage.models.family import turn_of
from orion_triage.models.licence import base_of, licence_files
from orion_triage.progress import Progress, silent
from orion_triage.runs import manifest
from orion_triage.safe.files import locked, replaced_folder, require_free_space, sha256_of_file, write_bytes, write_text

if TYPE_CHECKING:
    from orion_triage.runs.run import Run

SCHEMA_VERSION = 3
LIST, LIST_HASH = "bundle.json", "bundle.json.sha256"
CHECKER, CLIENT = "check_flight.py", "ask_frame.py"
GOLDEN_IMAGES = 5
CONDITION = "B"  # in flight, the prompt has no coordinates
# Measured on the tiny preset's test frames. Differences by rounding: threads change nothing; flash attention, batches
# and the layout of weights change the category's log-probability by up to 0.008, those of the two others by up to
# 0.054, and 6 of 60 reasons; an emulated Cortex-A76 (half-precision sums) 0.002, 0.045 and 2 of 37. Differences that
# must be detected, on the five golden images: Q8_0 weights 0.003 and 0.21; an adapter 5 % weaker 0.005 and 0.36. The
# log-probability of a clear category is near 0 in any model, so those of the others distinguish models. The words of
# the reason also do, if a model decides without the image.
TOLERANCES = {"category_nats": 0.05, "other_labels_nats": 0.1, "other_words": GOLDEN_IMAGES // 2}


def run(run: "Run", out: Path, progress: Progress = silent, *, accepted_risk: str = "") -> dict[str, Any]:
    """Write the bundle of a run's GGUF pair into the folder `out`.

    Returns its bundle.json, its size in `bytes`, and the `seconds_per_frame` of the golden images, which are not in the
    bundle: two bundles of one run are equal to the byte. The golden images are frames of the test split; their expected
    answers come from a server with the flight options.

    Raises OrionError if the pair is incomplete, changed or not evaluated, if its verdict is DO NOT FLY and
    `accepted_risk` does not say why it flies nevertheless, if the frames are missing, or if `out` is a folder that is
    not a bundle.
    """
    out = out.resolve()
    if out.exists() and not (out / LIST).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise OrionError(f"{out} exists and is not a bundle.", "Choose another folder with --out.")
    quantize.check_pair(run.gguf)
    point = threshold.read(run.folder, run.gguf)
    rows = clearest_first(_evaluated(run), run.settings.mission)
    verdict = _may_fly(run, accepted_risk)
    names = (quantize.QUANTIZED, quantize.MMPROJ, quantize.PAIR)
    require_free_space(out.parent, sum((run.gguf / name).stat().st_size for name in names) + 20_000_000, "the bundle")
    toolchain = find_toolchain(progress)
    with locked(run.folder, "orion bundle"), replaced_folder(out) as folder:
        for path in [*(run.gguf / name for name in names), *licence_files(run.gguf)]:
            shutil.copyfile(path, folder / path.name)
        quantize.check_pair(folder)
        pair = (folder / quantize.QUANTIZED, folder / quantize.MMPROJ)
        log, threads = run.folder / "logs" / "bundle-server.log", run.settings.evaluate.threads
        with Server(toolchain, *pair, log=log, turn=turn_of(pair[0]), threads=threads) as server:
            golden, request, seconds = _ask(server.client, run, rows, folder, progress)
        _write_texts(folder, run, toolchain, point, verdict)
        record = {
            "schema_version": SCHEMA_VERSION,
            "preset": run.settings.preset,
            "base": base_of(run.gguf) or run.settings.base.model,
            "frame_size": run.settings.base.frame_size,
            "stretch": _stretch(run),
            "mission": portable(run.settings.mission).model_dump(mode="json"),
            "model": quantize.QUANTIZED,
            "mmproj": quantize.MMPROJ,
            "llama_cpp_build": toolchain.build,
            "versions": {"orion-triage": __version__, **_manifest(run.gguf, "quantize").versions},
            "made_on": platform.machine(),
            "operating_point": {"drop_threshold": point[0], "temperature": point[1]} if point else None,
            "verdict": verdict,
            "request": request,
            "tolerances": TOLERANCES,
            "golden": golden,
            "notes": list(_notes(golden, run.settings.mission)),
            "files": manifest.hash_outputs(folder),
        }
        write_text(folder / LIST, json.dumps(record, indent=2) + "\n")
        write_text(folder / LIST_HASH, f"{sha256_of_file(folder / LIST)}  {LIST}\n")
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return record | {"bytes": size, "seconds_per_frame": seconds}


def verdict_line(bundle: dict[str, Any]) -> str:
    """The ground's verdict on the bundle's model, and the reason for flying it nevertheless."""
    verdict = bundle["verdict"]
    because = f" ({', '.join(verdict['because'])})" if verdict["because"] else ""
    risk = f"; risk accepted: {verdict['accepted_risk']}" if verdict["accepted_risk"] else ""
    return f"the ground's verdict: {verdict['verdict']}{because}{risk}"


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


def _evaluated(run: "Run") -> list[dict[str, Any]]:
    """The answers of exactly this pair to the test frames with the flight prompt; raises OrionError without them."""
    from orion_triage.evaluate.run import read_predictions

    folder = run.evaluation("quantized")
    stage_manifest = _manifest(folder, "evaluate --gguf")
    if stage_manifest.inputs.get("gguf") != manifest.hash_inputs({"gguf": run.gguf})["gguf"]:
        raise OrionError(f"{folder} is the evaluation of another pair.", "Run 'orion evaluate --gguf' again.")
    return [row for row in read_predictions(folder, run.settings.mission) if row["condition"] == CONDITION]


def clearest_first(rows: Iterable[dict[str, Any]], mission: Mission) -> list[dict[str, Any]]:
    """Candidates for golden images: right answers, alternating between categories, by falling margin; then wrong ones.

    The margin is that of the score over the second best: a clear answer is stable under the rounding of another
    processor. Answers without scores are excluded.
    """

    def place(row: dict[str, Any]) -> tuple[float, str]:
        *_, second, first = sorted(row["scores"].values())
        return second - first, row["name"]

    scored = sorted((row for row in rows if row["category"] and row["scores"]), key=place)
    right = [[row for row in scored if row["category"] == row["truth"] == category] for category in mission.names]
    in_turn = [row for row in chain.from_iterable(zip_longest(*right)) if row]
    return in_turn + [row for row in scored if row["category"] != row["truth"]]


def _ask(
    client: Client, run: "Run", rows: list[dict[str, Any]], folder: Path, progress: Progress
) -> tuple[list[dict[str, Any]], dict[str, Any], list[float]]:
    """Write the golden images into the folder; returns them with their expected answers, the requests, and seconds."""
    dataset = Dataset(run.dataset, run.settings.mission)
    records = {record.name: record for record in dataset.records(run.split)}
    mission = run.settings.mission
    client.require_grammar()
    text, scoring, most = user_text(mission, None), Scoring.of(mission, client.tokenize), answer_tokens(mission)
    golden: list[dict[str, Any]] = []
    seconds: list[float] = []
    for row in rows:
        if len(golden) == GOLDEN_IMAGES:
            break
        progress("answering golden images", len(golden), GOLDEN_IMAGES)
        record = records[row["name"]]
        path = dataset.path(record)
        if not path.is_file():
            raise OrionError(f"{path} does not exist.", "Run 'orion dataset' to make it again.")
        image = dataset.frame(record, CAMERA_SIZE)
        if mission.blank and is_blank(image):
            continue  # decided by the blank rule: in flight, the model is not asked
        image = shrink(image, run.settings.base.frame_size)
        png = Frame(image, image.size).png()
        began = time.monotonic()
        answer, found, further = client.complete_and_score(
            text,
            png,
            most,
            cue=CATEGORY_CUE,
            after_cue=scoring.after_cue,
            further=scoring.further,
            grammars=grammars(mission),
        )
        took, verdict = time.monotonic() - began, parse_verdict(mission, answer)
        if found is None or verdict is None or verdict.category != row["category"]:
            continue  # with the grammar, the category is another one
        each = scoring.of_categories(found) or []
        scored = Answer.scored(answer, each, scoring.of_fields(further)).to_json(mission)
        name = f"golden/{len(golden) + 1}-{verdict.category.lower()}.png"
        write_bytes(folder / name, png)
        golden.append(
            {
                "image": name,
                "frame": row["name"],
                "truth": row["truth"],
                **{key: scored[key] for key in ("answer", "category")},
                "log_probabilities": {c: round(value, 6) for c, value in zip(mission.names, each, strict=True)},
                "scores": {c: round(value, 6) for c, value in scored["scores"].items()},
            }
        )
        seconds.append(round(took, 3))
    if not golden:
        raise OrionError(
            f"no answer of the pair to a test frame is a verdict: {run.evaluation('quantized') / 'predictions.jsonl'}.",
            "Train longer (--set fine_tune.epochs=10), or on more frames: only the grammar would make verdicts.",
        )
    request = {
        "chat": client.chat(with_image(mission, "{prompt}"), "{image}"),
        "cue": CATEGORY_CUE,
        "answer_tokens": most,
        "candidates": CANDIDATES,
        "sampling": GREEDY,
        "grammars": ["grammar.gbnf", "category_grammar.gbnf"],
        "printable": PRINTABLE,
        "labels": [
            {
                "after": node.text,
                "tokens": list(node.tokens),
                "categories": [[mission.names[index] for index in indices] for indices in node.names],
            }
            for node in scoring.nodes
        ],
        **(
            {
                "fields": [
                    {
                        "field": one.field,
                        "cue": one.cue,
                        "tokens": list(one.tokens),
                        "grammar": f"{one.field}_grammar.gbnf",
                    }
                    for one in scoring.field_cues
                ]
            }
            if scoring.field_cues
            else {}
        ),
        "prompt_tokens": client.completion(text, png, 1, grammar=grammar(mission))["tokens_evaluated"],
    }
    return golden, request, seconds


def _stretch(run: "Run") -> dict[str, Any] | None:
    """The limits that make 8-bit frames of the camera's values, or None if the run's pictures have 8 bits."""
    stretch = stretch_of(run.settings.dataset)
    return asdict(stretch) if stretch else None


def _notes(golden: list[dict[str, Any]], mission: Mission) -> Iterator[str]:
    missing = [category for category in mission.names if category not in {image["category"] for image in golden}]
    if missing:
        yield f"No golden image has the answer {' or '.join(missing)}: the model gives none on the test split."
    if wrong := [image["image"] for image in golden if image["category"] != image["truth"]]:
        yield f"The answers to {', '.join(wrong)} are wrong: too few are right. They still check the computation."
    if len(golden) < GOLDEN_IMAGES:
        yield f"{len(golden)} golden images instead of {GOLDEN_IMAGES}: the test split has no more verdicts."


def _write_texts(
    folder: Path, run: "Run", toolchain: Toolchain, point: tuple[float, float] | None, verdict: dict[str, Any]
) -> None:
    """Prompt, grammars, launch script, checker and the operator's README."""
    mission = run.settings.mission
    write_text(folder / "prompt.txt", render_prompt(mission, None))
    write_text(folder / "grammar.gbnf", grammar(mission))
    write_text(folder / "category_grammar.gbnf", category_grammar(mission))
    for field in mission.fields:
        if field.words:
            write_text(folder / f"{field.name}_grammar.gbnf", grammars(mission)[cue_of(field.name)])
    for name in (CHECKER, CLIENT):
        shutil.copyfile(Path(__file__).with_name(name), folder / name)
    values: dict[str, Any] = {
        "model": quantize.QUANTIZED,
        "mmproj": quantize.MMPROJ,
        "arguments": " ".join(OPTIONS),
        "frame_size": run.settings.base.frame_size,
        "build": toolchain.build,
        "pinned": toolchain.build == PINNED_BUILD,
        "wheel": WHEEL,
        "wheel_sha256": WHEEL_SHA256,
        "tolerances": TOLERANCES,
        "decision": in_words(mission, Rules(point[0] if point else None)),
        "mission": mission,
        "temperature": point[1] if point else None,
        "verdict": verdict,
        "stretch": _stretch(run),
    }
    for template, name in (("serve.sh.j2", "serve.sh"), ("bundle_readme.txt.j2", "README.txt")):
        write_text(folder / name, templates.fill("flight", template, **values))
    for name in (CHECKER, CLIENT, "serve.sh"):
        (folder / name).chmod(0o755)
