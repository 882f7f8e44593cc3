"""results.json: all measurements of a run, collected from the manifests and predictions of its stages."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from orion_triage.dataset.dataset import Dataset
from orion_triage.errors import OrionError
from orion_triage.evaluate import controls, false_alarms, features, stress, threshold, variants, verdict
from orion_triage.evaluate.baselines import LOGISTIC_REGRESSION, baselines
from orion_triage.evaluate.conditions import CONDITIONS
from orion_triage.evaluate.judgement import ideal_figures, judge, value_figures
from orion_triage.evaluate.metrics import Change, Prediction, compare, summarize, under
from orion_triage.evaluate.rescore import read_otherwise
from orion_triage.evaluate.run import prediction_of, predictions_in, predictions_of, read_predictions
from orion_triage.evaluate.seeds import over_training_seeds
from orion_triage.evaluate.statistics import holm
from orion_triage.evaluate.variants import Variant
from orion_triage.export.quantize import PAIR
from orion_triage.imagery.stress import STRESSES
from orion_triage.mission.decide import Rules, is_unlike
from orion_triage.mission.mission import Mission
from orion_triage.runs.manifest import Manifest, read_manifest
from orion_triage.runs.run import EVALUATE, MAKING, SETTINGS_FILE, WORK_FOLDER, Run, outdated
from orion_triage.safe.files import sha256_of_file, sha256_of_text
from orion_triage.safe.reading import read_object
from orion_triage.settings import overrides

SCHEMA_VERSION = 8
DELTAS = {"fine-tuning": ("base", "fine-tuned"), "quantization": ("fine-tuned", "quantized")}
FLIGHT = "flight"  # constrained answers with the blank rule and the threshold if one was chosen, as in `orion triage`
NO_THRESHOLD = "no-threshold"  # the same without the threshold; only if one was chosen
SHOWN = (*variants.MODELS, NO_THRESHOLD, FLIGHT)  # in the tables of the report, as far as they were evaluated
BENCH_FILE = "bench_frame.json"  # of `orion bench-frame`, in the run's folder
CONTENT = "content_sha256"  # key of the results with the hash of the others
SERVER_FIGURES = ("server", "served_model", "server_build")  # in the manifest if a third-party server answered
_NO_PRODUCTS = ("logs", "bundle", WORK_FOLDER)  # in the run's folder, without effect on the results
ARTIFACTS = (
    "orion_lora_weights/adapter_model.safetensors",
    "orion_merged/*.safetensors",
)


def build_results(run: Run, *, with_others: bool = True) -> dict[str, Any]:
    """The run's results on its split; `missing` lists unfinished stages. The schema is in docs/results.md.

    `with_others`: also those of a pair or server that the run did not make, if they were evaluated.
    """
    settings, dataset = run.settings, Dataset(run.dataset, run.settings.mission)
    wanted = [variant.name for variant in variants.wanted(settings)]
    if variants.CONSTRAINED not in wanted and read_manifest(run.evaluation(variants.CONSTRAINED)):
        wanted.append(variants.CONSTRAINED)  # 'orion threshold' evaluates it in any run
    making = [name for name in MAKING if name != "vision features" or settings.variants.all]
    manifests = {name: _made_here(run.product(name)) for name in (*making, *(EVALUATE + name for name in wanted))}
    finished = {name: manifest for name, manifest in manifests.items() if manifest}
    for other in (variants.OTHER_PAIR, variants.SERVER) if with_others else ():
        if of_other := read_manifest(run.evaluation(other)):
            finished[EVALUATE + other] = of_other
            wanted.append(other)
    vision = features.read(run.vision_features) if "vision features" in finished else None
    of_pair = [f"gguf/{path.name}" for path in sorted(run.gguf.glob("*.gguf"))]
    mission = settings.mission
    # Before the baselines, which take seconds: a changed file is refused.
    answers = {name: read_predictions(run.evaluation(name), mission) for name in wanted if EVALUATE + name in finished}
    of_frames = _of_frames(run, dataset, finished.get("dataset"), vision)
    predictions = {name: predictions_of(rows, mission) for name, rows in answers.items()}
    rules = threshold.rules_of(run) if "constrained" in predictions else Rules()
    of_frames["unlike_frames"] = unlike_frames(run, rules)
    if "constrained" in predictions:
        outside = of_frames["unlike_frames"]
        predictions[FLIGHT] = as_flown(predictions["constrained"], of_frames["blank_frames"], rules, mission, outside)
        if rules.drop_threshold is not None:
            blank = of_frames["blank_frames"]
            predictions[NO_THRESHOLD] = as_flown(predictions["constrained"], blank, Rules(), mission)
    records = dataset.records(run.split) if predictions else []
    places = {record.name: record.coordinates for record in records if record.coordinates}
    models = {model: summarize(rows, mission) for model, rows in predictions.items()}
    for model, by_condition in models.items():
        for condition, rates in by_condition.items():
            rates |= judge(under(predictions[model], condition), places, mission)
    server, other_pair = (finished.get(EVALUATE + name) for name in (variants.SERVER, variants.OTHER_PAIR))
    f16, failed = finished.get("evaluate F16"), variants.failed_gate(run)
    results: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "preset": settings.preset,
        "split": run.split,
        "settings": settings.model_dump(mode="json"),
        "overrides": {key: list(pair) for key, pair in overrides(settings).items()},
        "missing": [n for n, made in manifests.items() if made is None and not (failed and n == "evaluate F16")],
        "outdated": outdated(run, finished),
        "read_otherwise": {n: len(ids) for n, rows in answers.items() if (ids := read_otherwise(rows, mission))},
        "frames": {"count": len(records), "places": len(set(places.values()))},
        "models": models,
        "deltas": {
            name: differences(predictions[first], predictions[second], f"{first} and {second}")
            for name, (first, second) in DELTAS.items()
            if first in predictions and second in predictions
        },
        "linear_probe": _against_linear_probe(of_frames["baselines"], predictions.get("fine-tuned")),
        "training_seeds": over_training_seeds(run),
        "within": {model: between_conditions(rows, model) for model, rows in predictions.items()},
        "variants": steps(predictions, variants.table(settings)),
        "parity": f16.figures["parity"] if f16 else None,
        "failed_gate": failed,
        "operating_point": _at_threshold(run, predictions.get(FLIGHT)),
        "stress": _under_stress(run, predictions.get(FLIGHT), rules),
        "controls": _controls(run),
        "false_alarms": _false_alarms(run, predictions.get(FLIGHT), rules),
        **of_frames,
        "foreign_server": {key: server.figures[key] for key in SERVER_FIGURES} if server else {},
        "foreign_pair": other_pair.figures["pair"] if other_pair else "",
        "bytes": {name: size for name in (*ARTIFACTS, *of_pair) if (size := _size(run.folder, name))},
        "seconds": {name: manifest.seconds for name, manifest in finished.items()},
        "figures": {name: manifest.figures for name, manifest in finished.items() if "evaluate" not in name},
        "versions": next((manifest.versions for manifest in finished.values()), {}),
    }
    # On val the checkpoint and the threshold were chosen: what a model shows there says too much.
    judged = run.split == "test"
    measured = results["seconds_per_frame"] = seconds_per_frame(run)
    results["verdict"] = (
        verdict.assess(results, predictions, settings.verdict, mission, flight=FLIGHT, seconds_per_frame=measured)
        if judged
        else None
    )
    return results


def seconds_per_frame(run: Run) -> dict[str, Any] | None:
    """{seconds_per_frame, processor} of the run's pair as `orion bench-frame` measured it last; None if it did not."""
    try:
        measured = read_object(run.folder / BENCH_FILE)
        if measured["pair_sha256"] != sha256_of_file(run.gguf / PAIR):
            return None
        return {"seconds_per_frame": float(measured["seconds_per_frame"]), "processor": str(measured["processor"])}
    except FileNotFoundError:
        return None
    except (KeyError, TypeError, ValueError) as error:
        path = run.folder / BENCH_FILE
        raise OrionError(f"{path} is damaged: {error!r}.", "Run 'orion bench-frame' again.") from None


def _made_here(folder: Path) -> Manifest | None:
    """The manifest of the run's own product; older versions stored the answers of other pairs and servers there too."""
    made = read_manifest(folder)
    return None if made is None or {"pair", "server"} & made.figures.keys() else made


def _against_linear_probe(baselines: dict[str, Any], predictions: list[Prediction] | None) -> dict[str, Any] | None:
    """The fine-tuned model without coordinates (B) against the linear probe on the base's frozen vision tower."""
    if LOGISTIC_REGRESSION not in baselines or not predictions:
        return None
    said = baselines[LOGISTIC_REGRESSION]["predictions"]
    model = under(predictions, "B")
    return asdict(compare([replace(p, predicted=said[p.name]) for p in model], model))


def _at_threshold(run: Run, predictions: list[Prediction] | None) -> dict[str, Any] | None:
    """The threshold that decides `flight`, with the temperature and its effect on the scores; None without one."""
    chosen = threshold.read(run.folder, run.gguf) if predictions else None
    if chosen is None or predictions is None:
        return None
    drop_threshold, temperature = chosen
    tempered: dict[str, Any] = {
        c: threshold.tempered(rows, temperature, run.settings.mission)
        for c in CONDITIONS
        if (rows := under(predictions, c))
    }
    promised = threshold.promise_of(run)
    ranges = threshold.rules_of(run).appearance
    return {
        "drop_threshold": drop_threshold,
        "temperature": temperature,
        "promise": promised,
        "appearance": ranges,
        **tempered,
    }


def stress_results(run: Run) -> dict[str, Any] | None:
    """`stress` of the run's results, without the rest of them; None without an evaluation under stress."""
    return _under_stress(run, *_flown(run))


def false_alarms_results(run: Run) -> dict[str, Any] | None:
    """`false_alarms` of the run's results, without the rest of them."""
    return _false_alarms(run, *_flown(run))


def _flown(run: Run) -> tuple[list[Prediction], Rules]:
    """The decisions as flown on the run's split, and their rules."""
    mission, rules = run.settings.mission, threshold.rules_of(run)
    answers = predictions_in(run.evaluation(variants.CONSTRAINED), mission)
    return as_flown(answers, blank_frames(run), rules, mission, unlike_frames(run, rules)), rules


def _false_alarms(run: Run, flown: list[Prediction] | None, rules: Rules) -> dict[str, Any] | None:
    """What `orion false-alarms` found; {"outdated": True} if another pair or threshold decided; None without it."""
    path, mission = run.folder / false_alarms.FILE_NAME, run.settings.mission
    try:
        record = read_object(path)
        same = (
            record["pair_sha256"] == sha256_of_file(run.gguf / PAIR),
            record["rules"] == false_alarms.rules_in_words(rules),
        )
        if not flown or not all(same) or record["category"] not in mission.that("drop"):
            return {"outdated": True}
        return {"outdated": False, **false_alarms.figures(record, under(flown, "B"), mission)}
    except FileNotFoundError:
        return None
    except OrionError as error:
        raise OrionError(error.message, "Run 'orion false-alarms' again.") from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise OrionError(f"{path} is damaged: {error!r}.", "Run 'orion false-alarms' again.") from None


def _controls(run: Run) -> dict[str, Any] | None:
    """The further controls by variant, and the variants whose answers to them are outdated; None without any."""
    found, outdated = controls.finished(run)
    return {"of": found, "outdated": outdated} if found or outdated else None


def _under_stress(run: Run, flown: list[Prediction] | None, rules: Rules) -> dict[str, Any] | None:
    """The decisions on stressed frames, each compared with that on the frame as it is (`flown`, condition B)."""
    made, mission = _made_here(run.evaluation(variants.CONSTRAINED)), run.settings.mission
    if made is None or not flown:
        return None
    answered, outdated = stress.finished(run, made)
    if not answered and not outdated:
        return None
    decided = {
        name: {
            strength: as_flown(
                under([prediction_of(row, mission) for row in rows], stress.CONDITION),
                [row["name"] for row in rows if row["blank"]],
                rules,
                mission,
                [row["name"] for row in rows if is_unlike(row["appearance"], rules)],
            )
            for strength, rows in by_strength.items()
        }
        for name, by_strength in answered.items()
    }
    records = Dataset(run.dataset, mission).records(run.split)
    places = {record.name: record.coordinates for record in records if record.coordinates}
    unstressed = under(flown, stress.CONDITION)
    rows = stress.compare(decided, unstressed, places, mission)
    return {
        "unstressed": stress.rates_of(unstressed, places, mission),
        "rows": rows,
        "worst": [f"{row['stress']} {row['strength']}" for row in stress.worst(rows)],
        "missing": [one.name for one in STRESSES if one.name not in answered],
        "outdated": outdated,
    }


def as_flown(
    predictions: list[Prediction],
    blank_frames: list[str],
    rules: Rules,
    mission: Mission,
    unlike_frames: Sequence[str] = (),
) -> list[Prediction]:
    """The answers with the decisions of these rules; a blank frame has the category of the rule with probability 1.

    The model is not asked about it, so it has no values of further fields.
    """
    certain = tuple(float(category == mission.blank) for category in mission.names)
    marked = threshold.marked_by_rules(predictions, blank_frames, unlike_frames)
    return [
        replace(p, predicted=category, scores=certain, fields=(), field_scores={})
        if p.blank and mission.blank
        else replace(p, predicted=category)
        for p, category in zip(marked, threshold.decided(marked, rules, mission), strict=True)
    ]


def differences(
    first: list[Prediction], second: list[Prediction], named: str = "the two models"
) -> dict[str, dict[str, Any]]:
    """Condition -> paired comparison of `second` with `first`; `holm_p` is corrected for the number of conditions.

    Only conditions that both evaluations have are compared, so that older evaluations stay comparable. `named` are the
    two in an error.
    """
    both = {c: (under(first, c), under(second, c)) for c in CONDITIONS}
    return _corrected({c: compare(*rows, f"{named} under {c}") for c, rows in both.items() if all(rows)})


def between_conditions(predictions: list[Prediction], model: str = "the model") -> dict[str, dict[str, Any]]:
    """The effect of the coordinates (A against B) and of a conflict (A, B against D) on one model."""
    pairs = (("B", "A"), ("A", "D"), ("B", "D"))
    return _corrected(
        {
            f"{a} to {b}": compare(under(predictions, a), under(predictions, b), f"{model} under {a} and {b}")
            for a, b in pairs
        }
    )


def _corrected(changes: Mapping[str, Change]) -> dict[str, dict[str, Any]]:
    corrected = holm({name: change.exact_p for name, change in changes.items()})
    return {name: asdict(change) | {"holm_p": corrected[name]} for name, change in changes.items()}


def steps(predictions: dict[str, list[Prediction]], table: Sequence[Variant]) -> list[dict[str, Any]]:
    """The evaluated variants, each with what it `changes` and the effect on the answers (`change`).

    `compared_with` is the variant evaluated before it, unless the table names another; null for the first. Models that
    the run did not make come last.
    """
    rows = [(variant.name, variant.changes, variant.compared_with) for variant in table if variant.role != "other"]
    others = [(variant.name, variant.changes, variant.compared_with) for variant in table if variant.role == "other"]
    blank_rule = "the rule for blank frames"
    flown = [
        (NO_THRESHOLD, blank_rule, ""),
        (FLIGHT, "the threshold" if NO_THRESHOLD in predictions else blank_rule, ""),
    ]
    found: list[dict[str, Any]] = []
    # What the variants that were not evaluated change for those after them: other quantizations change nothing there.
    cumulative = {one.name for one in table if not one.compared_with and one.weights != "quantized F16"}
    skipped: list[str] = []
    for name, changes, other in [*rows, *flown, *others]:
        if name not in predictions:
            skipped += [changes] if found and name in cumulative else []
            continue
        step = changes if other else ", then ".join([*skipped, changes])
        skipped = []
        against = (other or found[-1]["model"]) if found else None
        change = (
            differences(predictions[against], predictions[name], f"{against} and {name}")
            if against in predictions
            else None
        )
        found.append({"model": name, "step": step, "compared_with": against, "change": change})
    return found


def compare_variants(run: Run, asked: Sequence[Variant], finished: Sequence[Variant]) -> list[dict[str, Any]]:
    """Frames, parsable answers, right answers and the paired change of these variants on the run's split.

    Each is compared, as in `steps`, with one of `finished`: the variants with up-to-date answers, in the table's order.
    The change is null without such a variant.
    """
    predictions = {
        variant.name: predictions_in(run.evaluation(variant.name), run.settings.mission) for variant in finished
    }
    found = {row["model"]: row for row in steps(predictions, finished)}
    return [
        {
            "variant": variant.name,
            "changes": variant.changes,
            "compared_with": found[variant.name]["compared_with"],
            "conditions": {
                condition: {
                    "count": len(rows),
                    "parsed": sum(row.predicted is not None for row in rows),
                    "right": sum(row.predicted == row.truth for row in rows),
                    "change": (found[variant.name]["change"] or {}).get(condition),
                }
                for condition in CONDITIONS
                if (rows := under(predictions[variant.name], condition))
            },
        }
        for variant in asked
    ]


def current_results(run: Run) -> tuple[dict[str, Any], bool]:
    """The run's results, and whether they are those of the last report because nothing changed since.

    Computing them takes half a minute, most of it for the baselines on the frames and the bootstraps.
    """
    key, path = made_from(run), results_path(run)
    if path.is_file():
        with suppress(OrionError, FileNotFoundError):
            last = read_object(path)
            if last.get("made_from") == key and last.get(CONTENT) == _content_sha256(last):
                return last, True
    results = build_results(run) | {"made_from": key}
    return results | {CONTENT: _content_sha256(results)}, False


def _content_sha256(results: Mapping[str, Any]) -> str:
    """A hash of the results: who edits the file does not change the verdict by it."""
    return sha256_of_text(json.dumps({key: value for key, value in results.items() if key != CONTENT}))


def made_from(run: Run) -> str:
    """A hash of all that the results depend on: this code, the settings, the run's products, and runs of other seeds.

    Of a product's small files (JSON: answers, splits, manifests), the content counts; of its others, sizes and times of
    change. 'orion verify' compares all bytes with the manifests.
    """
    code, own = Path(str(resources.files("orion_triage"))), run.folder.resolve()
    products = [path for path in own.glob("*/*") if path.parent.name not in _NO_PRODUCTS]
    others = [path.parent for path in own.parent.glob(f"*/{SETTINGS_FILE}") if path.parent != own]
    files = {
        code: [path for path in code.rglob("*") if path.suffix in (".py", ".j2")],
        own: [
            *(file for path in products for file in (path.rglob("*") if path.is_dir() else [path])),
            *(own / name for name in (threshold.FILE_NAME, BENCH_FILE, false_alarms.FILE_NAME)),
        ],
        own.parent: [file for other in others for file in other.glob(f"evaluation/{run.split}/*/*")],
    }
    parts = [run.split, run.settings.model_dump_json()]
    for folder, found in files.items():  # without the folder: a copy that keeps the times is current
        for path in sorted({path for path in found if path.is_file()}):
            state = path.stat()
            is_read = path.suffix in (".json", ".jsonl")
            content = sha256_of_file(path) if is_read else f"{state.st_size} {state.st_mtime_ns}"
            parts.append(f"{path.relative_to(folder)} {content}")
    parts += [(other / SETTINGS_FILE).read_text(encoding="utf-8", errors="replace") for other in sorted(others)]
    return sha256_of_text("\n".join(parts))


def results_path(run: Run) -> Path:
    """The path of results.json or results-val.json: one file per split."""
    return run.folder / f"results{'' if run.split == 'test' else f'-{run.split}'}.json"


def _of_frames(run: Run, dataset: Dataset, made: Manifest | None, vision: Mapping[str, Any] | None) -> dict[str, Any]:
    """The measurements made on the frames; from the last report if 'orion clean' removed the frames."""
    if made is None:
        return {"baselines": {}, "blank_frames": [], "size_ranking": None, "ideal_ranking": None}
    if made.removed:
        return _of_last_report(run)
    records = sorted(dataset.records(run.split), key=lambda record: record.name)
    truth = np.array([dataset.mission.names.index(record.verdict.category) for record in records], dtype=np.int64)
    ranking = np.array([dataset.path(record).stat().st_size for record in records], dtype=np.float64)
    return {
        "baselines": baselines(dataset, run.split, vision),
        "blank_frames": dataset.blank_names(run.split),
        "size_ranking": value_figures(truth, ranking, run.settings.mission),  # larger PNG files first
        "ideal_ranking": ideal_figures(truth, run.settings.mission),
    }


def blank_frames(run: Run) -> list[str]:
    """The names of the split's blank frames; from the last report if 'orion clean' removed the frames."""
    made = read_manifest(run.dataset)
    if made is not None and made.removed:
        return list(_of_last_report(run)["blank_frames"])
    return Dataset(run.dataset, run.settings.mission).blank_names(run.split)


def unlike_frames(run: Run, rules: Rules) -> list[str]:
    """The names of the split's frames outside the ranges of these rules; as `blank_frames` after 'orion clean'."""
    made = read_manifest(run.dataset)
    if not rules.appearance or made is None:
        return []
    if made.removed:
        return list(_of_last_report(run)["unlike_frames"])
    return Dataset(run.dataset, run.settings.mission).unlike_names(run.split, rules)


def _of_last_report(run: Run) -> dict[str, Any]:
    try:
        value = json.loads(results_path(run).read_text(encoding="utf-8"))
        version = value["schema_version"]
        if version != SCHEMA_VERSION:
            raise OrionError(
                f"{results_path(run)} has schema version {version} instead of {SCHEMA_VERSION}.",
                "Run 'orion dataset --force' to make the frames again.",
            )
        if value.get(CONTENT, _content_sha256(value)) != _content_sha256(value):  # older ones have none
            raise OrionError(
                f"{results_path(run)} was changed after 'orion report' wrote it.",
                "Put the file back, or run 'orion dataset --force' to make the frames again.",
            )
        names = ("baselines", "blank_frames", "unlike_frames", "size_ranking", "ideal_ranking")
        return {name: value[name] for name in names}
    except FileNotFoundError:
        raise OrionError(
            f"the baselines need the frames in {run.dataset}, which 'orion clean' removed before the first report.",
            "Run 'orion dataset --force' to make them again.",
        ) from None
    except (ValueError, KeyError, TypeError):
        raise OrionError(
            f"{results_path(run)} is damaged.", "Run 'orion dataset --force' to make the frames again."
        ) from None


def _size(folder: Path, pattern: str) -> int:
    return sum(path.stat().st_size for path in folder.glob(pattern))
