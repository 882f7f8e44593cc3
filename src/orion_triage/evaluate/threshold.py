"""The probability from which a frame is dropped: stored with the run, used in flight.

The pair's is chosen on val: one on its scores after a reason, another on those of the verdict alone. A head's is chosen
on the frames that it was fitted on, each scored by a head that has not seen its place: val is of the pair's camera, and
a head is for another one.
"""

import json
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from orion_triage.errors import OrionError
from orion_triage.evaluate import head as heads
from orion_triage.evaluate import orbit, promise, value
from orion_triage.evaluate.judgement import guess_of, scores_of, truth_of
from orion_triage.evaluate.metrics import Prediction, places_of, under
from orion_triage.evaluate.run import predictions_in
from orion_triage.evaluate.variants import CONSTRAINED, VERDICT_ONLY
from orion_triage.export.quantize import PAIR
from orion_triage.mission.decide import Appearance, Decision, Rules, decide, drop_probability
from orion_triage.mission.mission import Mission, listed
from orion_triage.runs.run import Run
from orion_triage.safe.files import sha256_of_file, write_text
from orion_triage.safe.reading import read_object

Of = Literal["pair", "verdict-only", "head"]  # what gives the scores: the pair after a reason or without, or the head
FILE_NAME = "operating_point.json"
FILES: dict[Of, str] = {
    "pair": FILE_NAME,
    "verdict-only": f"verdict_only_{FILE_NAME}",
    "head": f"head_{FILE_NAME}",
}
LABELLED = "labelled"  # a head's frames, in the place of a split
VARIANTS: dict[Of, str] = {"pair": CONSTRAINED, "verdict-only": VERDICT_ONLY}  # evaluated on val for the choice
CONDITION = "B"  # in flight, the prompt has no coordinates
NEVER = 2.0  # above 1 by more than rounding: scores drop no frame


def parse_share(text: str) -> float:
    """The share in a text such as "5%" or "0.05"; raises OrionError unless it is from 0 to 1."""
    number, percent, rest = text.strip().partition("%")
    try:
        share = float(number) / (100 if percent else 1)
    except ValueError:
        share = -1
    if rest or not 0 <= share <= 1:
        raise OrionError(f"{text!r} is not a share from 0 to 1 (0% to 100%).", "Write it as 5% or 0.05.")
    return share


def parse_confidence(text: str) -> float:
    """The confidence in a text such as "95%"; raises OrionError unless it is from 50% to below 100%."""
    confidence = parse_share(text)
    if not 0.5 <= confidence < 1:
        raise OrionError(f"--confidence {text} is not from 50% to below 100%.", "Write --confidence 95%.")
    return confidence


def choose(
    run: Run,
    max_irrecoverable_loss: float,
    blank_frames: Sequence[str],
    *,
    loosen: bool = False,
    confidence: float | None = None,
    appearance: Appearance | None = None,
    unlike_frames: Sequence[str] = (),
    of: Of = "pair",
) -> dict[str, Any]:
    """Choose the threshold on the val evaluation of `run` (a Run of that split) and write it into the run's folder.

    That of a head is chosen on its labelled frames; blank ones are not among them.

    Returns the written values: the threshold, its effect on the frames of val with the decisions before beside it, the
    temperature that calibrates the scores best (it keeps their order, so it changes no decision). The file also has
    the thresholds before it (`history`, the latest first); it stays as it is if the same was chosen last.
    `blank_frames` are the names of the split's blank frames.

    With `appearance`, frames outside these ranges are kept from then on; `unlike_frames` are those of the split.

    With a `confidence`, the threshold promises the limit for frames like those of val (see promise.py), and `promise`
    says what it rests on; without one, the limit is only kept on the frames of val themselves.

    Raises OrionError if the decisions of now are within the limit and the threshold would lose more frames, unless
    `loosen` is set or a promise is asked for; and if val has too few valuable frames for the promise.
    """
    mission, split = run.settings.mission, LABELLED if of == "head" else run.split
    rows = under(marked_by_rules(_answered(run, of), blank_frames, unlike_frames), CONDITION)
    if confidence is None:
        lowest, promised = lowest_threshold(rows, max_irrecoverable_loss, mission, appearance), None
        rules = Rules(drop_threshold=lowest, appearance=appearance)
    else:
        rules, promised = promising(rows, max_irrecoverable_loss, confidence, mission, appearance, split)
    earlier, before = _of_this_pair(run, of), current_rules(run, of)
    change = effect(rows, before, rules, mission)
    lost, lost_before = (change[when]["irrecoverable_loss"] for when in ("after", "before"))
    if (
        not loosen
        and confidence is None
        and lost["count"] > lost_before["count"]
        and lost_before["rate"] <= max_irrecoverable_loss
    ):
        raise OrionError(
            f"nothing was changed: {_name(before)} loses {lost_before['count']} of {lost_before['total']} "
            f"{listed(mission.that('send', 'store'))} frames of {split}, within the limit of "
            f"{max_irrecoverable_loss:.1%}. The threshold {rules.drop_threshold:.3f} would lose {lost['count']}.",
            "Keep it as it is, set a smaller --max-irrecoverable-loss, or add --loosen to drop more frames.",
        )
    record = {
        "max_irrecoverable_loss": max_irrecoverable_loss,
        "promise": promised,
        "appearance": {name: list(ends) for name, ends in appearance.items()} if appearance else None,
        "drop_threshold": rules.drop_threshold,
        "temperature": value.fit_temperature(
            truth_of(rows, mission), scores_of(rows, mission)
        ),  # calibrates the scores
        "chosen_on": {"split": split, "condition": CONDITION, "frames": len(rows)},
        **_made_for(run, of),
        "there": change,
    }
    if not (earlier and _is_same_choice(record, earlier[0])):  # else --undo would put the same threshold back
        _write(run, [record, *earlier], of)
    return record


def _is_same_choice(record: dict[str, Any], earlier: dict[str, Any]) -> bool:
    """Whether two thresholds differ at most in `there`, the effect against what decided before."""
    one, other = ({key: kept for key, kept in each.items() if key != "there"} for each in (record, earlier))
    return bool(json.loads(json.dumps(one)) == other)


def _answered(run: Run, of: Of) -> list[Prediction]:
    if of == "head":
        return heads.predictions_of(run)
    return predictions_in(run.evaluation(VARIANTS[of]), run.settings.mission)


def undo(run: Run, of: Of = "pair") -> float | None:
    """Put back the threshold before the last one; returns it, or None if the model alone decides from now on.

    Raises OrionError if no threshold was chosen.
    """
    records = _of_this_pair(run, of)
    if not records:
        owner = {"pair": "its pair", "verdict-only": "the verdict alone", "head": "its head"}[of]
        raise OrionError(f"{run.folder} has no threshold of {owner}.", f"Choose one with '{command_of(of)}'.")
    _write(run, records[1:], of)
    return float(records[1]["drop_threshold"]) if records[1:] else None


def command_of(of: Of) -> str:
    return "orion threshold" if of == "pair" else f"orion threshold --{of}"


def _made_for(run: Run, of: Of) -> dict[str, str]:
    """What a threshold is of: the pair, and the head if it is of that."""
    return {"pair_sha256": _pair(run.gguf)} | ({"head_sha256": _head(run.folder)} if of == "head" else {})


def _of_this_pair(run: Run, of: Of) -> list[dict[str, Any]]:
    """The thresholds chosen so far, the latest first; none if the file is of another pair or damaged."""
    path = run.folder / FILES[of]
    if not path.is_file():
        return []
    try:
        _read(path, run.gguf, of)
    except OrionError:  # a new threshold replaces it
        return []
    latest = _renamed(read_object(path))
    return [{key: kept for key, kept in latest.items() if key != "history"}, *latest.get("history", [])]


def _write(run: Run, records: Sequence[dict[str, Any]], of: Of) -> None:
    """The file with these thresholds, the latest first; no file without one."""
    path = run.folder / FILES[of]
    if not records:
        path.unlink(missing_ok=True)
        return
    write_text(path, json.dumps(records[0] | {"history": list(records[1:])}, indent=2) + "\n")


def current_rules(run: Run, of: Of = "pair") -> Rules:
    """The rules with the run's threshold; without one if the file is of another pair or damaged.

    Unlike frames are kept if the threshold of the pair keeps them, whatever the scores are of.
    """
    of_pair = _of_this_pair(run, "pair")
    chosen = of_pair if of == "pair" else _of_this_pair(run, of)
    appearance = of_pair[0].get("appearance") if of_pair else None
    return Rules(drop_threshold=chosen[0]["drop_threshold"] if chosen else None, appearance=appearance)


def rules_of(run: Run, of: Of = "pair") -> Rules:
    """The rules that fly: with the run's threshold, if one was chosen; raises OrionError as `read` does."""
    read(run.folder, run.gguf)
    if of != "pair":
        read(run.folder, run.gguf, of)
    return current_rules(run, of)


def promise_of(run: Run, of: Of = "pair") -> dict[str, Any] | None:
    """What the run's threshold promises; None without one, or if it was chosen without a confidence."""
    records = _of_this_pair(run, of)
    return records[0].get("promise") if records else None


def effect_on(
    run: Run, before: Rules, blank_frames: Sequence[str], unlike_frames: Sequence[str] = (), of: Of = "pair"
) -> dict[str, Any]:
    """The effect of the run's threshold on the frames of its split, which was evaluated in the threshold's way."""
    rows = under(marked_by_rules(_answered(run, of), blank_frames, unlike_frames), CONDITION)
    return effect(rows, before, rules_of(run, of), run.settings.mission)


def _name(rules: Rules) -> str:
    return "the model without a threshold" if rules.drop_threshold is None else f"threshold {rules.drop_threshold:.3f}"


def effect(rows: Sequence[Prediction], before: Rules, after: Rules, mission: Mission) -> dict[str, Any]:
    """The measurements `before` and `after`, and the valuable frames `lost` and `saved` by the change."""
    valuable = [row for row in rows if mission.kept(row.truth)]
    dropped = [[is_dropped(c, mission) for c in decided(valuable, rules, mission)] for rules in (before, after)]
    pairs = list(zip(*dropped, strict=True))
    return {
        "before": measurements(rows, before, mission),
        "after": measurements(rows, after, mission),
        "lost": sum(now and not then for then, now in pairs),
        "saved": sum(then and not now for then, now in pairs),
    }


def marked_by_rules(
    rows: Sequence[Prediction], blank_frames: Sequence[str], unlike_frames: Sequence[str] = ()
) -> list[Prediction]:
    """The answers, with `blank` and `unlike` set for these frames; not for the noise image of condition C."""
    blank, unlike = set(blank_frames), set(unlike_frames)
    return [
        row if row.condition == "C" else replace(row, blank=row.name in blank, unlike=row.name in unlike)
        for row in rows
    ]


def decided(rows: Sequence[Prediction], rules: Rules, mission: Mission) -> list[str | None]:
    """The decision for each frame under the rules."""
    return [decision_of(row, rules, mission).category for row in rows]


def decision_of(row: Prediction, rules: Rules, mission: Mission) -> Decision:
    return decide(
        mission,
        row.predicted,
        row.scores,
        blank=row.blank,
        rules=rules,
        field_scores=row.field_scores,
        unlike=row.unlike,
    )


def is_dropped(category: str | None, mission: Mission) -> bool:
    return category is not None and not mission.kept(category)


def lowest_threshold(
    rows: Sequence[Prediction], max_irrecoverable_loss: float, mission: Mission, appearance: Appearance | None = None
) -> float:
    """The threshold that drops the most frames with at most this irrecoverable loss (a share) on these frames.

    The loss is the share of valuable frames (to be sent or stored) that are dropped. Choose the threshold on val,
    because the loss is underestimated on the frames used for the choice. Raises OrionError for a limit outside 0..1, if
    no frame is valuable, if the mission has no categories to choose between, or if no threshold keeps the limit.
    """
    valuable = valuable_frames(rows, max_irrecoverable_loss, mission)

    def loss(threshold: float) -> float:
        return sum(_lost(valuable, Rules(threshold, appearance=appearance), mission)) / len(valuable)

    thresholds = candidates(rows, mission)
    # The loss falls as the threshold rises.
    place = bisect_left(thresholds, True, key=lambda threshold: loss(threshold) <= max_irrecoverable_loss)
    if place == len(thresholds):
        raise OrionError(
            f"{loss(NEVER):.1%} of the valuable frames are {listed(mission.that('drop'), 'or')} at any threshold, "
            "because they are blank, have such an answer without scores, or a field's rule says so.",
            "Set a larger --max-irrecoverable-loss, or inspect these frames.",
        )
    return thresholds[place]


def promising(
    rows: Sequence[Prediction],
    limit: float,
    confidence: float,
    mission: Mission,
    appearance: Appearance | None = None,
    split: str = "val",
) -> tuple[Rules, dict[str, Any]]:
    """The rules with the lowest threshold that keeps the limit with this confidence, and the promise.

    The loss is the share of a place's valuable frames that are dropped, averaged over places. Raises OrionError as
    `lowest_threshold`, and if the split has too few places for the promise.
    """
    valuable = valuable_frames(rows, limit, mission)
    places = places_of(valuable)

    def losses(threshold: float) -> NDArray[np.float64]:
        rules = Rules(threshold, appearance=appearance)
        return promise.losses_by_place(_lost(valuable, rules, mission), places)

    chosen = promise.lowest_within(candidates(rows, mission), losses, limit, confidence)
    if chosen is not None:
        rules = Rules(chosen, appearance=appearance)
        return rules, promise.promise(losses(chosen), len(valuable), limit, confidence)
    have, lost = len(losses(NEVER)), math.ceil(float(losses(NEVER).sum()))
    needed = promise.places_needed(lost, limit, confidence)
    kept = listed(mission.that("send", "store"))
    despite = f", because {lost} of them are lost at any threshold" if lost else ""
    asked = (
        f"that at most {limit:.1%} of the {kept} frames are dropped cannot be promised with {confidence:.0%} confidence"
    )
    if needed is None:
        raise OrionError(f"{asked} by any number of {split} frames.", "Set a larger --max-irrecoverable-loss.")
    raise OrionError(
        f"{asked} from {have} places with such {split} frames{despite}.",
        f"{needed - have} more {kept} {split} frames of places of their own are needed ({needed} in all). Or set "
        "a larger --max-irrecoverable-loss, a smaller --confidence, or leave --confidence out.",
    )


def valuable_frames(rows: Sequence[Prediction], max_irrecoverable_loss: float, mission: Mission) -> list[Prediction]:
    """The valuable frames; raises OrionError as `lowest_threshold`."""
    if not 0 <= max_irrecoverable_loss <= 1:
        raise OrionError(
            f"--max-irrecoverable-loss {max_irrecoverable_loss} is outside 0..1.",
            "Write it as a share: 0.02 allows the loss of two of a hundred valuable frames.",
        )
    kept, dropped = mission.that("send", "store"), mission.that("drop")
    if not kept or not dropped:
        raise OrionError(
            f"the mission {mission.name} drops {'every' if dropped else 'no'} category: a threshold decides nothing.",
            "Set the action of a category to drop, and of another to send or store, in the mission's file.",
        )
    valuable = [row for row in rows if mission.kept(row.truth)]
    if not valuable:
        raise OrionError(
            f"no frame is {listed(kept, 'or')}, so the loss of a threshold cannot be measured.",
            "Choose the threshold on a split with all categories.",
        )
    return valuable


def _lost(valuable: Sequence[Prediction], rules: Rules, mission: Mission) -> list[bool]:
    return [is_dropped(c, mission) for c in decided(valuable, rules, mission)]


def candidates(rows: Sequence[Prediction], mission: Mission) -> list[float]:
    """The thresholds at which a decision changes, rising; the last drops nothing by its scores."""
    return [*sorted({drop_probability(mission, row.scores) for row in rows if row.scores}), NEVER]


def measurements(rows: Sequence[Prediction], rules: Rules, mission: Mission) -> dict[str, Any]:
    """The effect of the rules on the frames of one condition: headline, downlink, and what it means in orbit."""
    truth, guess = truth_of(rows, mission), guess_of(decided(rows, rules, mission), mission)
    return {
        **value.headline(truth, guess, places_of(rows), mission),
        "downlink": value.downlink(guess, mission),
        "orbit": orbit.orbit(truth, guess, places_of(rows), mission),
    }


def tempered(rows: Sequence[Prediction], temperature: float, mission: Mission) -> dict[str, float]:
    """Negative log-likelihood and Brier score of one condition's scores, scaled by the temperature chosen on val."""
    truth, scores = truth_of(rows, mission), value.temper(scores_of(rows, mission), temperature)
    return {
        "negative_log_likelihood": value.negative_log_likelihood(truth, scores),
        "brier": value.brier(truth, scores),
    }


def read(folder: Path, gguf: Path, of: Of = "pair") -> tuple[float, float] | None:
    """The run's threshold and temperature, or None; raises OrionError if it is damaged or of another GGUF pair."""
    return _read(folder / FILES[of], gguf, of)


def _read(path: Path, gguf: Path, of: Of) -> tuple[float, float] | None:
    """The same of one file; that of a head is also refused if it is of another head."""
    command = command_of(of)
    try:
        record = _renamed(read_object(path))
        threshold, pair = float(record["drop_threshold"]), record["pair_sha256"]
        of_head = record["head_sha256"] if of == "head" else None
        temperature, history = float(record["temperature"]), record.get("history", [])
        if not (0 <= threshold < math.inf and 0 < temperature < math.inf):
            raise ValueError("out of range")
        if not isinstance(history, list) or not all(
            isinstance(one, dict) and "drop_threshold" in one for one in history
        ):
            raise ValueError("history is not a list of thresholds")
    except FileNotFoundError:
        return None
    except OrionError as error:
        raise OrionError(error.message, f"Run '{command}' again.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise OrionError(f"{path} is damaged: {error!r}.", f"Run '{command}' again.") from None
    if pair != _pair(gguf):
        raise OrionError(f"{path} was chosen for another GGUF pair.", f"Run '{command}' again, or delete the file.")
    if of == "head" and of_head != _head(path.parent):
        raise OrionError(f"{path} was chosen for another head.", f"Run '{command}' again, or delete the file.")
    return threshold, temperature


def _renamed(record: dict[str, Any]) -> dict[str, Any]:
    """The record with the key's name of now; before version 7 of the results it was low_threshold."""
    now = {"drop_threshold" if key == "low_threshold" else key: kept for key, kept in record.items()}
    history = now.get("history")
    if isinstance(history, list):
        now["history"] = [_renamed(one) if isinstance(one, dict) else one for one in history]
    return now


def _pair(gguf: Path) -> str:
    return sha256_of_file(gguf / PAIR)


def _head(folder: Path) -> str:
    return sha256_of_file(heads.path_in(folder))
