"""Stored answers read again, without asking a model: after a change of the parser of answers or of the metrics.

Costs, prior, values, threshold and rules of a mission are applied to stored answers by every report. What is stored of
an answer itself is its text, and what the parser made of it when it was asked.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from orion_triage.evaluate import controls, stress, variants
from orion_triage.evaluate.metrics import summarize
from orion_triage.evaluate.run import METRICS_FILE, PREDICTIONS_FILE, Row, predictions_of, read_predictions
from orion_triage.imagery.stress import STRESSES
from orion_triage.mission.answer import Answer
from orion_triage.mission.mission import Mission
from orion_triage.runs import manifest
from orion_triage.runs.run import Run, held
from orion_triage.safe.files import replaced_folder, write_text

READ = ("category", "reason", "fields")  # of a stored answer: what the parser made of its text


def read_otherwise(rows: Sequence[Row], mission: Mission) -> list[str]:
    """The ids of the answers of which this version's parser makes something else than is stored."""
    return [row["id"] for row in rows if _again(row, mission) != row]


def rescore(run: Run) -> dict[str, dict[str, list[str]]]:
    """Read all stored answers of the run's split again, and write those evaluations anew of which some changed.

    Returns evaluation -> id -> [category as stored, as read now], of the answers that changed. Everything else stays:
    the text, the scores, and the manifest's versions, machine and seconds.
    """
    changed: dict[str, dict[str, list[str]]] = {}
    with held(run, "rescore"):
        for name in _evaluations(run):
            if found := _rescored(run, name):
                changed[name] = found
        if "fine-tuned" in changed or "F16" in changed:
            _compare_again(run)
    return changed


def _evaluations(run: Run) -> Iterator[str]:
    """The names of the finished evaluations of the run's split."""
    table = variants.table(run.settings)
    names = [variant.name for variant in table]
    names += [controls.name_of(variant) for variant in table] + [stress.name_of(one) for one in STRESSES]
    yield from (name for name in names if manifest.read_manifest(run.evaluation(name)))


def _rescored(run: Run, name: str) -> dict[str, list[str]]:
    folder, mission = run.evaluation(name), run.settings.mission
    before = read_predictions(folder, mission)
    rows = [_again(row, mission) for row in before]
    changed = {
        now["id"]: [str(row["category"]), str(now["category"])]
        for row, now in zip(before, rows, strict=True)
        if now != row
    }
    if changed:
        made = manifest.read_manifest(folder)
        assert made is not None
        metrics = _metrics(rows, mission)
        texts = {
            PREDICTIONS_FILE: "".join(json.dumps(row) + "\n" for row in rows),
            METRICS_FILE: json.dumps(metrics, indent=1) + "\n",
        }
        _write(folder, texts, made, made.figures | metrics | {"rescored": len(changed)}, made.inputs)
    return changed


def _again(row: Row, mission: Mission) -> Row:
    """The row with what this version's parser makes of its answer."""
    read = Answer(row["answer"]).to_json(mission)
    return {key: read[key] if key in READ else value for key, value in row.items()}


def _metrics(rows: Sequence[Row], mission: Mission) -> dict[str, Any]:
    """As the evaluation stores them: by condition; of controls and stresses by control and strength."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.get("strength") or row.get("control") or "", []).append(row)
    of_groups = {name: summarize(predictions_of(own, mission), mission) for name, own in groups.items()}
    if list(of_groups) == [""]:
        return of_groups[""]
    return {name: next(iter(by_condition.values())) for name, by_condition in of_groups.items()}


def _compare_again(run: Run) -> None:
    """The gate at F16 compares two evaluations: its agreement with the answers as they are read now."""
    folder = run.evaluation("F16")
    made = manifest.read_manifest(folder)
    if made is None or manifest.read_manifest(run.evaluation("fine-tuned")) is None:
        return
    inputs = made.inputs | manifest.hash_inputs({"fine-tuned": run.evaluation("fine-tuned")})
    parity = made.figures["parity"] | {"agreement": variants.check_agreement(run, "F16")}
    _write(folder, {}, made, made.figures | {"parity": parity}, inputs)


def _write(
    folder: Path, texts: Mapping[str, str], made: manifest.Manifest, figures: dict[str, Any], inputs: dict[str, str]
) -> None:
    """Replace the folder by one with these files and its other files; the answers are never without a manifest."""
    with replaced_folder(folder) as new:
        for path in folder.iterdir():
            if path.name not in texts and path.name != manifest.FILE_NAME and path.is_file():
                shutil.copyfile(path, new / path.name)
        for name, text in texts.items():
            write_text(new / name, text)
        manifest.write_again(new, made, figures=figures, inputs=inputs)
