"""The golden frames of a bundle: camera frames with the answers and decisions that the flight computer must repeat."""

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orion_triage.dataset.dataset import Dataset
from orion_triage.errors import OrionError
from orion_triage.evaluate.backends import VerdictOnlyBackend
from orion_triage.evaluate.head import Head, HeadBackend
from orion_triage.flight import decide_frame
from orion_triage.imagery.frames import CAMERA_SIZE, Frame, appearance, looks_blank, shrink
from orion_triage.llama_cpp.client import CANDIDATES, GREEDY, PRINTABLE, Client
from orion_triage.mission.answer import Answer
from orion_triage.mission.decide import BLANK_REASON, Rules, by_in_words, decide, drop_probability, holds, is_unlike
from orion_triage.mission.mission import Mission
from orion_triage.mission.prompt import render_prompt, user_text
from orion_triage.mission.scoring import FieldScores, Scoring
from orion_triage.mission.verdict import (
    CATEGORY_CUE,
    answer_start,
    answer_tokens,
    category_alone,
    grammars,
    parse_verdict,
)
from orion_triage.progress import Progress
from orion_triage.safe.files import write_bytes

if TYPE_CHECKING:
    from PIL import Image

    from orion_triage.runs.run import Run

CLEAR, HARD = 5, 3  # golden frames that the model is asked about; a blank one comes last
# Measured on the tiny preset's test frames. Differences by rounding: threads change nothing; flash attention, batches
# and the layout of weights change the category's log-probability by up to 0.008, those of the two others by up to
# 0.060, and 6 of 60 reasons; an emulated Cortex-A76 (half-precision sums) 0.002, 0.045 and 2 of 37. Differences that
# must be detected, on five clear frames: Q8_0 weights 0.003 and 0.21; an adapter 5 % weaker 0.005 and 0.36. The
# log-probability of a clear category is near 0 in any model, so those of the others distinguish models. The words of
# the reason also do, if a model decides without the image. A Q8_0 mmproj (0.008 and 0.088) looks like rounding.
CATEGORY_NATS, OTHER_NATS = 0.05, 0.1
# A hard frame tests the decision, not the rounding: with all log-probabilities within the tolerances, the logarithm of
# the ratio of two probabilities, or of two sums of them, moves by at most twice the larger tolerance. The decision of a
# hard frame is further than that from every limit. Otherwise a processor that rounds differently would be NO-GO.
STABLE_NATS = 2 * OTHER_NATS
# Of a head fitted on 24 real frames, tiny preset, on 45 frames: flash attention changes a log-probability by up to
# 0.012, another layout of the weights 0.009, batches nothing, and no category. Q8_0 weights 0.128.
HEAD_NATS = 0.05
_SMALLEST = 1e-300  # instead of a probability of 0


def tolerances(golden: list[dict[str, Any]]) -> dict[str, float]:
    """The differences from the ground that the check allows: in log-probabilities, and in the words of reasons."""
    asked = sum(one["answer"] is not None for one in golden)
    return {"category_nats": CATEGORY_NATS, "other_labels_nats": OTHER_NATS, "other_words": asked // 2}


def margin_nats(mission: Mission, rules: Rules, scores: Mapping[str, float], fields: FieldScores) -> float:
    """The least change of a log-ratio of probabilities that changes the category in the answer, or the decision.

    `scores` are the probabilities of the categories, `fields` those of the fields' values.
    """

    def apart(values: Iterable[float]) -> float:
        *_, second, first = sorted(values)
        return _log(first) - _log(second)

    margins = [apart(scores.values())]
    for field in mission.fields:
        if field.when:
            margins.append(
                abs(_log_odds(fields.get(field.name, {}).get(field.when, 0.0)) - _log_odds(field.probability))
            )
            if holds(field, fields):
                return min(margins)
    if rules.drop_threshold is not None and 0 < rules.drop_threshold <= 1:
        dropped = drop_probability(mission, [scores[name] for name in mission.names])
        margins.append(abs(_log_odds(dropped) - _log_odds(rules.drop_threshold)))
        among = mission.that("drop") if dropped >= rules.drop_threshold else mission.that("send", "store")
        if len(among) > 1:
            margins.append(apart(scores[name] for name in among))
    return min(margins)


def _log(probability: float) -> float:
    return math.log(max(probability, _SMALLEST))


def _log_odds(probability: float) -> float:
    return _log(probability) - _log(1 - probability)


def _margin_of_row(row: dict[str, Any], mission: Mission, rules: Rules) -> float:
    """Of an evaluated answer; 0 without the probabilities of a field that has a rule."""
    fields = row.get("field_scores") or {}
    if any(field.when not in fields.get(field.name, {}) for field in mission.fields if field.when):
        return 0.0
    return margin_nats(mission, rules, row["scores"], fields)


def clearest_first(rows: Iterable[dict[str, Any]], mission: Mission, rules: Rules) -> list[dict[str, Any]]:
    """Candidates for clear frames: right answers, alternating between categories, by falling margin; then wrong ones.

    The margin is that of the score over the second best: a clear answer is stable under the rounding of another
    processor. Frames whose decision is not stable come after all others. Answers without scores are excluded.
    """

    def place(row: dict[str, Any]) -> tuple[float, str]:
        *_, second, first = sorted(row["scores"].values())
        return second - first, row["name"]

    scored = sorted((row for row in rows if row["category"] and row["scores"]), key=place)
    right = [[row for row in scored if row["category"] == row["truth"] == category] for category in mission.names]
    in_turn = [row for row in chain.from_iterable(zip_longest(*right)) if row]
    every = in_turn + [row for row in scored if row["category"] != row["truth"]]
    return sorted(every, key=lambda row: _margin_of_row(row, mission, rules) <= STABLE_NATS)  # keeps the order


def hardest_first(rows: Iterable[dict[str, Any]], mission: Mission, rules: Rules) -> list[dict[str, Any]]:
    """Candidates for hard frames: right answers and decisions with the smallest margin that is stable."""
    found = []
    for row in rows:
        if row["category"] and row["category"] == row["truth"] and row["scores"]:
            margin = _margin_of_row(row, mission, rules)
            scores = [row["scores"][name] for name in mission.names]
            fields = row.get("field_scores") or {}
            decision = decide(mission, row["category"], scores, blank=False, rules=rules, field_scores=fields)
            if margin > STABLE_NATS and decision.category == row["truth"]:
                found.append((margin, row["name"], row))
    return [row for *_, row in sorted(found, key=lambda one: one[:2])]


def ask(
    client: Client,
    run: "Run",
    rows: list[dict[str, Any]],
    rules: Rules,
    folder: Path,
    progress: Progress,
    *,
    verdict_only: bool = False,
) -> tuple[list[dict[str, Any]], dict[str, Any], list[float]]:
    """Write the golden frames into the folder; returns them with what is expected, the requests, and seconds per frame.

    The files have the camera's size, so that the flight's own shrinking is checked, too. `rows` are the evaluated
    answers. With `verdict_only`, the category is decided before a reason is written. Raises OrionError if no answer is
    a verdict.
    """
    mission, dataset = run.settings.mission, Dataset(run.dataset, run.settings.mission)
    records = {record.name: record for record in dataset.records(run.split)}
    client.require_grammar()
    asking = _Asking(client, run, rules, verdict_only=verdict_only)
    golden: list[dict[str, Any]] = []
    candidates = [
        *((row, False) for row in clearest_first(rows, mission, rules)),
        *((row, True) for row in hardest_first(rows, mission, rules)),
    ]
    for row, hard in candidates:
        if sum(one["hard"] == hard for one in golden) == (HARD if hard else CLEAR):
            continue
        if row["name"] in {one["frame"] for one in golden}:
            continue
        progress("answering golden frames", len(golden), CLEAR + HARD)
        path = dataset.path(records[row["name"]])
        if not path.is_file():
            raise OrionError(f"{path} does not exist.", "Run 'orion dataset' to make it again.")
        image = dataset.frame(records[row["name"]], CAMERA_SIZE)
        measures = appearance(image)
        if (mission.blank and looks_blank(measures)) or is_unlike(measures, rules):
            continue  # decided by a rule, whatever the model answers
        found = asking.of(row, image, hard)
        if found:
            name = f"golden/{len(golden) + 1}-{found['category'].lower()}{'-hard' if hard else ''}.png"
            write_bytes(folder / name, decide_frame.png(image.tobytes(), CAMERA_SIZE))
            golden.append({"image": name, **found})
    if not golden:
        raise OrionError(
            f"no answer of the pair to a test frame is a verdict: {run.evaluation('quantized') / 'predictions.jsonl'}.",
            "Train longer (--set fine_tune.epochs=10), or on more frames: only the grammar would make verdicts.",
        )
    if mission.blank and rules.blank:
        name = f"golden/{len(golden) + 1}-blank.png"
        write_bytes(folder / name, decide_frame.png(blank_pixels(), CAMERA_SIZE))
        golden.append(_blank(mission, name))
    return golden, asking.requests(), asking.seconds


def ask_head(
    client: Client, run: "Run", head: Head, rules: Rules, golden: list[dict[str, Any]], folder: Path, progress: Progress
) -> tuple[list[dict[str, Any]], list[float]]:
    """What is expected of a head on the golden frames in the folder, and the seconds per frame.

    A decision that rounding could change is None: of such a frame, only the probabilities are compared.
    """
    mission, backend, seconds = run.settings.mission, HeadBackend(client, run.settings.mission, head), list[float]()
    expected: list[dict[str, Any]] = []
    for done, one in enumerate(golden):
        if one["answer"] is None:
            expected.append(one)  # the blank frame: no head is asked
            continue
        progress("answering golden frames with the head", done, len(golden))
        began = time.monotonic()
        image = _image_of((folder / one["image"]).read_bytes())
        (answer,) = backend.answer([image], [user_text(mission, None)])
        seconds.append(round(time.monotonic() - began, 3))
        said = answer.to_json(mission)
        decision = decide(mission, said["category"], answer.scores, blank=False, rules=rules)
        stable = margin_nats(mission, rules, said["scores"], {}) > 2 * HEAD_NATS
        expected.append(
            {
                **{key: one[key] for key in ("image", "frame", "truth")},
                "category": said["category"],
                "log_probabilities": {name: round(_log(value), 6) for name, value in said["scores"].items()},
                "decision": (
                    {"category": decision.category, "decided_by": by_in_words(mission, decision, rules)}
                    if stable
                    else None
                ),
            }
        )
    return expected, seconds


def head_notes(expected: list[dict[str, Any]]) -> Iterator[str]:
    """What a reader of the bundle should know about what is expected of the head."""
    if close := [one["image"] for one in expected if one["decision"] is None]:
        yield f"The head's decision on {', '.join(close)} is close to another one: only its probabilities are checked."


def _image_of(png: bytes) -> "Image.Image":
    """A golden frame as a picture."""
    from PIL import Image

    return Image.frombytes("RGB", (CAMERA_SIZE, CAMERA_SIZE), decide_frame.pixels_of(png))


def blank_pixels() -> bytes:
    """A drawn frame that is blank, but not uniform: sixteen steps of grey with grain, below both limits of the rule."""
    rows = (
        bytes(96 + row // 64 + (7 * column + 13 * row) % 8 // 7 for column in range(CAMERA_SIZE) for _ in "RGB")
        for row in range(CAMERA_SIZE)
    )
    return b"".join(rows)


def _blank(mission: Mission, name: str) -> dict[str, Any]:
    return {
        "image": name, "frame": "drawn", "truth": mission.blank, "hard": False, "answer": None, "category": None,
        "decision": {"category": mission.blank, "decided_by": "blank rule"}, "reason": BLANK_REASON,
    }  # fmt: skip


class _Asking:
    """Asks about one frame after the other as in flight, and remembers how long each took."""

    def __init__(self, client: Client, run: "Run", rules: Rules, *, verdict_only: bool) -> None:
        self._client, self._mission, self._rules = client, run.settings.mission, rules
        self._size = run.settings.base.frame_size
        self._text, self._scoring = user_text(self._mission, None), Scoring.of(self._mission, client.tokenize)
        self._verdict_first = (
            VerdictOnlyBackend(client, self._mission, self._mission.reasons_for or ()) if verdict_only else None
        )
        self._png = b""
        self.seconds: list[float] = []

    def of(self, row: dict[str, Any], image: "Image.Image", hard: bool) -> dict[str, Any] | None:
        """What is expected of a frame of the camera's size; None if it is not fit for a golden frame.

        That is, if with the grammar the category is not that of the evaluation, or if a hard frame is not stable.
        """
        mission = self._mission
        picture = shrink(image, self._size)
        self._png = Frame(picture, picture.size).png()
        began = time.monotonic()
        scored = self._answer(picture)
        took, verdict = time.monotonic() - began, parse_verdict(mission, scored.text)
        if not scored.scores or not scored.label_mass or verdict is None or verdict.category != row["category"]:
            return None
        answer, field_scores = scored.text, scored.field_scores
        each = [_log(score) + _log(scored.label_mass) for score in scored.scores]
        scores = scored.to_json(mission)["scores"]
        decision = decide(
            mission, verdict.category, scored.scores, blank=False, rules=self._rules, field_scores=field_scores
        )
        if hard and (
            margin_nats(mission, self._rules, scores, field_scores) <= STABLE_NATS or decision.category != row["truth"]
        ):
            return None
        self.seconds.append(round(took, 3))
        return {
            "frame": row["name"],
            "truth": row["truth"],
            "hard": hard,
            "answer": answer,
            "category": verdict.category,
            "log_probabilities": {c: round(value, 6) for c, value in zip(mission.names, each, strict=True)},
            "scores": {c: round(value, 6) for c, value in scores.items()},
            "decision": {
                "category": decision.category,
                "decided_by": by_in_words(mission, decision, self._rules),
            },
        }

    def _answer(self, picture: "Image.Image") -> Answer:
        if self._verdict_first:
            (scored,) = self._verdict_first.answer([picture], [self._text])
            return scored
        mission, scoring = self._mission, self._scoring
        answer, found, further = self._client.complete_and_score(
            self._text,
            self._png,
            answer_tokens(mission),
            cue=CATEGORY_CUE,
            after_cue=scoring.after_cue,
            further=scoring.further,
            grammars=grammars(mission),
        )
        return Answer.scored(answer, scoring.of_categories(found), scoring.of_fields(further))

    def requests(self) -> dict[str, Any]:
        """What the flight's client sends and reads, for a client that knows neither the mission nor the tokenizer."""
        mission, scoring = self._mission, self._scoring
        template = self._text.replace(render_prompt(mission, None), "{prompt}")
        fields = [
            {"field": one.field, "cue": one.cue, "tokens": list(one.tokens), "grammar": f"{one.field}_grammar.gbnf"}
            for one in scoring.field_cues
        ]
        return {
            "chat": self._client.chat(template, "{image}"),
            "cue": CATEGORY_CUE,
            "answer_tokens": answer_tokens(mission),
            **({"kept_tokens": self._client.kept_tokens} if self._client.keep_text(self._text) else {}),
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
            **({"fields": fields} if fields else {}),
            **({"verdict_only": self._verdict_only()} if self._verdict_first else {}),
            "prompt_tokens": self._client.completion(
                self._text, self._png, 1, start=answer_start(mission) if self._verdict_first else "", grammar=PRINTABLE
            )["tokens_evaluated"],
        }

    def _verdict_only(self) -> dict[str, Any]:
        """The beginning of the answer before the category, the answers, and the grammars of those with a reason."""
        mission = self._mission
        return {
            "start": answer_start(mission),
            "answers": {name: category_alone(mission, name) for name in mission.names},
            "reasons": {name: reason_grammar(name) for name in mission.reasons_for or ()},
        }


def reason_grammar(category: str) -> str:
    """The bundle's file with the grammar of the answer of this category."""
    return f"{category}_grammar.gbnf"


def notes(golden: list[dict[str, Any]], mission: Mission) -> Iterator[str]:
    """What a reader of the bundle should know about its golden frames."""
    asked = [one for one in golden if one["answer"] is not None]
    missing = [category for category in mission.names if category not in {one["category"] for one in asked}]
    if missing:
        yield f"No golden frame has the answer {' or '.join(missing)}: the model gives none on the test split."
    if wrong := [one["image"] for one in asked if one["category"] != one["truth"]]:
        yield f"The answers to {', '.join(wrong)} are wrong: too few are right. They still check the computation."
    clear, hard = (sum(one["hard"] == kind for one in asked) for kind in (False, True))
    if clear < CLEAR:
        yield f"{clear} clear golden frames instead of {CLEAR}: the test split has no more verdicts."
    if hard < HARD:
        yield f"{hard} hard golden frames instead of {HARD}: no more right answers are close and yet stable."
