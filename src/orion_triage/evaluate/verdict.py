"""May this model fly? The criteria: what was measured on the test frames, what is needed, what to do; pure functions.

A criterion fails if the frames show that it is not met, and is open if there are too few of them to tell. One that
fails makes the verdict DO NOT FLY; without a failure, one that is open makes it NOT ENOUGH EVIDENCE. Every criterion
must be met, so their tests need no correction for their number: a bad model has to pass all of them by chance.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from orion_triage.evaluate.clusters import paired_test
from orion_triage.evaluate.metrics import Change, Prediction, compare, places_of, under
from orion_triage.evaluate.statistics import holm, wilson
from orion_triage.mission.mission import Mission, listed
from orion_triage.settings import VerdictSettings

FLY, DO_NOT_FLY, NOT_ENOUGH = "FLY", "DO NOT FLY", "NOT ENOUGH EVIDENCE"
CONDITION = "B"  # in flight, the prompt has no coordinates
Outcome = Literal["pass", "fail", "open"]
Predictions = Mapping[str, Sequence[Prediction]]  # by model, all conditions
JUDGED_STRENGTH = "medium"  # of stresses; the strong ones may break a model that is good enough
DRAWN = "synthetic"  # the source of frames that no camera took


@dataclass(frozen=True)
class Criterion:
    """One row of the verdict.

    `measured` and `needed` are words; `value`, `low` and `high` are the same as numbers (shares, or seconds), null
    where nothing was measured. `advice` is what to do; empty if it is met.
    """

    name: str
    measured: str
    needed: str
    outcome: Outcome
    advice: str = ""
    value: float | None = None
    low: float | None = None
    high: float | None = None


def assess(
    results: Mapping[str, Any],
    predictions: Predictions,
    needed: VerdictSettings,
    mission: Mission,
    *,
    flight: str,
    seconds_per_frame: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """{verdict, because, criteria}: the verdict on the run that `results` and `predictions` are of.

    `flight` is the name of the model with the decisions that fly; without it, the quantized model is judged. `because`
    names the criteria that decided. `seconds_per_frame` is {seconds_per_frame, processor} as measured by
    `orion bench-frame`, or None.
    """
    criteria = list(_criteria(results, predictions, needed, mission, flight, seconds_per_frame))
    failed, still_open = ([c for c in criteria if c.outcome == outcome] for outcome in ("fail", "open"))
    return {
        "verdict": DO_NOT_FLY if failed else NOT_ENOUGH if still_open else FLY,
        "because": [criterion.name for criterion in failed or still_open],
        "criteria": [asdict(criterion) for criterion in criteria],
    }


def _criteria(
    results: Mapping[str, Any],
    predictions: Predictions,
    needed: VerdictSettings,
    mission: Mission,
    flight: str,
    seconds_per_frame: Mapping[str, Any] | None,
) -> Iterator[Criterion]:
    yield complete(results, flight)
    judged = flight if flight in predictions else "quantized"
    if judged not in predictions:
        return
    answers = predictions[judged]
    rates, flown = results["models"][judged], under(answers, CONDITION)
    yield camera(results["figures"].get("dataset", {}).get("source"))
    yield frames(flown, needed.smallest_frames_per_category, mission)
    baselines = results["baselines"]
    constants = [name for name in baselines if name.startswith("always ")]
    if constants:
        commonest = max(constants, key=lambda name: baselines[name]["right"])
        yield better_than(commonest, flown, baselines[commonest], needed, "The model does not use what it sees.")
    for name, advice in (
        ("colour k-NN", "The model does no better than the colours of the frame: train longer, or on more frames."),
        (
            "coordinates k-NN",
            "The model does no better than a map: it needs more frames of each category in each region.",
        ),
    ):
        if name in baselines:
            yield better_than(name, flown, baselines[name], needed, advice)
    yield several_answers(flown, needed.largest_share_of_one_answer, mission)
    kept, sent = mission.that("send", "store"), mission.that("send")
    if kept:
        yield lost(rates[CONDITION]["irrecoverable_loss"], needed.largest_irrecoverable_loss, listed(kept))
    if sent:
        yield found(rates[CONDITION]["high_recall"], needed.smallest_high_recall, listed(sent))
    if "C" in rates and "A" in rates:
        yield looks(answers, needed)
    if "D" in rates:
        yield trusts_the_image(rates["D"], answers, needed.significance)
    if "quantized" in predictions and "fine-tuned" in predictions:
        yield quantization(predictions, needed)
    yield parity(results["parity"], results["failed_gate"])
    yield blank_rule(flown, judged == flight, needed.largest_irrecoverable_loss, mission)
    if needed.largest_seconds_per_frame is not None:
        yield in_time(seconds_per_frame, needed.largest_seconds_per_frame)
    if needed.largest_loss_under_stress is not None:
        yield under_stress(results["stress"], needed.largest_loss_under_stress, needed.significance)


def complete(results: Mapping[str, Any], flight: str) -> Criterion:
    """Whether the decisions that fly were evaluated, and everything was made with the run's settings."""
    name, wanted = "evaluated as it flies", "all stages"
    if unfinished := list(results["missing"]):
        said = f"not finished: {', '.join(unfinished)}"
    elif outdated := list(results["outdated"]):
        said = f"of other settings or products: {', '.join(outdated)}"
    elif flight not in results["models"]:
        said = "the flight's decoding was not evaluated"
        return Criterion(
            name, said, wanted, "open", "Run 'orion evaluate --variants constrained', then 'orion report'."
        )
    else:
        return Criterion(name, "all stages", wanted, "pass")
    return Criterion(name, said, wanted, "open", "Run 'orion run' again to finish them.")


def camera(source: str | None) -> Criterion:
    """Frames that a program drew cannot show how the model does on those of a camera."""
    if source != DRAWN:
        return Criterion("frames of a camera", f"source: {source}", "a camera's", "pass")
    return Criterion(
        "frames of a camera", "drawn frames (source: synthetic)", "a camera's", "open",
        "Evaluate on frames of your camera: 'orion run --dataset FOLDER'.",
    )  # fmt: skip


def frames(rows: Sequence[Prediction], smallest: int, mission: Mission) -> Criterion:
    """Frames of each category; a blank one shows nothing, so it counts only for the category of blank frames."""
    counts = {
        category: sum(row.truth == category and not (row.blank and category != mission.blank) for row in rows)
        for category in mission.names
    }
    rarest = min(counts, key=lambda category: counts[category])
    enough = counts[rarest] >= smallest
    more = f"The test split needs {smallest - counts[rarest]} more {rarest} frames, and as many of each rare category."
    return Criterion(
        "test frames",
        ", ".join(f"{count} {category}" for category, count in counts.items()),
        f"{smallest} of each",
        "pass" if enough else "open",
        "" if enough else f"{more} Without a column 'split', it gets a sixth of the frames that you label.",
        value=counts[rarest],
    )


def better_than(
    name: str, rows: Sequence[Prediction], baseline: Mapping[str, Any], needed: VerdictSettings, advice: str
) -> Criterion:
    """Whether the model is right on significantly more frames than a baseline, on the frames that the baseline has."""
    said: Mapping[str, str] = baseline["predictions"]
    both = [row for row in rows if row.name in said]
    change = compare([replace(row, predicted=said[row.name]) for row in both], both)
    right = sum(row.predicted == row.truth for row in both)
    counts = f"{right}/{len(both)} against {baseline['right']}/{baseline['count']}"
    return _difference(f"better than {name}", counts, change, len(both), needed, advice)


def _difference(name: str, counts: str, change: Change, total: int, needed: VerdictSettings, advice: str) -> Criterion:
    """A paired difference on `total` frames that must be significantly above 0."""
    gained, dropped, p, low, high = change.gained, change.lost, change.exact_p, change.low, change.high
    difference = (gained - dropped) / total
    p_in_words = "p < 0.001" if p < 0.001 else f"p = {p:.2g}"
    measured = f"{counts}: {_points(difference, low, high)}, {p_in_words}"
    wanted = f"more, p < {needed.significance:g}"
    if gained > dropped and p < needed.significance:
        return Criterion(name, measured, wanted, "pass", "", difference, low, high)
    if gained <= dropped or 100 * high < needed.smallest_gain_points:
        return Criterion(name, measured, wanted, "fail", advice, difference, low, high)
    few = f"A difference of this size takes about {change.frames_to_resolve:,} test frames to show."
    return Criterion(name, measured, wanted, "open", few, difference, low, high)


def _points(difference: float, low: float, high: float) -> str:
    return f"{100 * difference:+.0f} points ({100 * low:.0f} to {100 * high:.0f})"


def several_answers(rows: Sequence[Prediction], largest: float, mission: Mission) -> Criterion:
    """Whether the commonest decision leaves room for others; a split of mostly one category may be answered so."""
    counts = {category: sum(row.predicted == category for row in rows) for category in (*mission.names, None)}
    commonest = max(counts, key=lambda category: counts[category])
    share = counts[commonest] / len(rows)
    true = sum(row.truth == commonest for row in rows) / len(rows)
    name = "several answers"
    measured = f"{commonest or 'no verdict'} for {counts[commonest]} of {len(rows)} frames"
    wanted = f"none for {largest:.0%}"
    if share < max(largest, true + 0.05):
        return Criterion(name, measured, wanted, "pass", "", share)
    advice = "The model gives one answer to almost everything: train longer, or read its answers in the report."
    if commonest is None:
        advice = "Its answers are no verdicts: train longer, or on more frames."
    return Criterion(name, measured, wanted, "fail", advice, share)


def lost(loss: Mapping[str, Any], largest: float, kept: str) -> Criterion:
    """The share of valuable frames (`kept`: their categories) that are dropped, which deletes them on board."""
    name, wanted = f"{kept} lost", f"upper end at most {largest:.0%}"
    if not loss["total"]:
        return Criterion(name, "no such frame", wanted, "open", f"Add {kept} frames to the test split.")
    measured = f"{loss['count']} of {loss['total']}: {_rate(loss)}"
    values = (loss["rate"], loss["low"], loss["high"])
    if loss["high"] <= largest:
        return Criterion(name, measured, wanted, "pass", "", *values)
    if loss["rate"] > largest:
        advice = (
            f"Choose a threshold: 'orion threshold --max-irrecoverable-loss {100 * largest:g}%'; if one was chosen, "
            "'orion threshold --undo'. Read the lost frames in the report."
        )
        return Criterion(name, measured, wanted, "fail", advice, *values)
    more = _frames_to_bound(loss["count"], loss["total"], largest)
    advice = (
        f"About {more:,} {kept} test frames would show it at this loss."
        if more
        else "Reduce the loss first: it is too near the limit for any number of frames to show."
    )
    return Criterion(name, measured, wanted, "open", advice, *values)


def _frames_to_bound(count: int, total: int, largest: float) -> int | None:
    """The number of frames at which the interval of this rate ends at `largest`; None above a million."""
    frames = total
    while frames < 1_000_000:
        if wilson(round(count * frames / total), frames)[1] <= largest:
            return frames
        frames += max(1, frames // 50)
    return None


def found(recall: Mapping[str, Any], smallest: float, sent: str) -> Criterion:
    """The share of the frames to be sent (`sent`: their categories) that are sent."""
    name, wanted = f"{sent} found", f"lower end at least {smallest:.0%}"
    if not recall["total"]:
        return Criterion(name, "no such frame", wanted, "open", f"Add {sent} frames to the test split.")
    measured = f"{recall['count']} of {recall['total']}: {_rate(recall)}"
    values = (recall["rate"], recall["low"], recall["high"])
    if recall["low"] >= smallest:
        return Criterion(name, measured, wanted, "pass", "", *values)
    if recall["rate"] < smallest:
        advice = f"Train on more {sent} frames, and read the missed ones in the report."
        return Criterion(name, measured, wanted, "fail", advice, *values)
    return Criterion(name, measured, wanted, "open", f"Label more {sent} test frames.", *values)


def _rate(value: Mapping[str, Any]) -> str:
    return f"{value['rate']:.0%} ({100 * value['low']:.0f} to {100 * value['high']:.0f})"


def looks(answers: Sequence[Prediction], needed: VerdictSettings) -> Criterion:
    """Whether the image helps: A (image and coordinates) against C (noise and the same coordinates)."""
    with_image, blind = under(answers, "A"), under(answers, "C")
    change = compare(blind, with_image, "the flight's model under C and A")
    right = [sum(row.predicted == row.truth for row in rows) for rows in (with_image, blind)]
    return _difference(
        "looks at the image", f"{right[0]}/{len(blind)} with it, {right[1]}/{len(blind)} with noise (C)",
        change, len(blind), needed,
        "The image does not help the model: check the frames that it was trained on ('orion dataset view').",
    )  # fmt: skip


def trusts_the_image(rates: Mapping[str, Any], answers: Sequence[Prediction], significance: float) -> Criterion:
    """Whether conflicting coordinates (D) leave the answer to the image.

    Frames right under D against those that moved to the category of the coordinates' place; a frame that has the same
    wrong answer without coordinates is an error of vision, and counts for neither. The test is over places.
    """
    kept, moved = rates["trusted_vision"], rates["moved_to_coordinates"]
    name, wanted = "trusts the image (D)", f"more right, p < {significance:g}"
    measured = f"{kept} of {rates['count']} right, {moved} moved to false coordinates"
    rows, without = under(answers, "D"), {p.name: p.predicted for p in under(answers, "B")}
    p = paired_test([_trust(row, without.get(row.name)) for row in rows], places_of(rows)).exact_p
    share = moved / rates["count"]
    if kept > moved and p < significance:
        return Criterion(name, measured, wanted, "pass", "", share)
    if kept <= moved:
        advice = "The model follows the coordinates: train with more places, so that it cannot learn them by heart."
        if not moved:
            advice = "The model is right on no frame here: train longer, or on more frames."
        return Criterion(name, measured, wanted, "fail", advice, share)
    return Criterion(name, measured, wanted, "open", "Label more test frames.", share)


def _trust(row: Prediction, without: str | None) -> int:
    """1 for an answer of the image under D, -1 for one that moved to the category of the coordinates, 0 otherwise."""
    if row.predicted == row.truth:
        return 1
    return -int(row.predicted is not None and row.predicted == row.donor_category != without)


def quantization(predictions: Predictions, needed: VerdictSettings) -> Criterion:
    """The quantized model against the fused one, in flight's condition."""
    before, after = (under(predictions[model], CONDITION) for model in ("fine-tuned", "quantized"))
    change = compare(before, after, f"fine-tuned and quantized under {CONDITION}")
    low, high = change.low, change.high
    limit = needed.largest_quantization_loss_points
    name, wanted = "quantization", f"lower end above -{limit:g}"
    right = [sum(row.predicted == row.truth for row in rows) for rows in (before, after)]
    before_and_after = f"{right[1]}/{len(after)} after {right[0]}/{len(after)}"
    measured = f"{before_and_after}: {_points(change.points / 100, low, high)}"
    values = (change.points / 100, low, high)
    if change.lost > change.gained and change.exact_p < needed.significance:
        advice = "Find the step that loses: 'Accuracy by step' in the report; then docs/quantization.md."
        return Criterion(name, measured, wanted, "fail", advice, *values)
    if 100 * low < -limit:
        return Criterion(name, measured, wanted, "open", "Label more test frames.", *values)
    return Criterion(name, measured, wanted, "pass", "", *values)


def parity(measured: Mapping[str, Any] | None, failed: Mapping[str, Any] | None) -> Criterion:
    """Whether llama.cpp computes what transformers does: the gate at F16, passed with `measured` or `failed`."""
    name, wanted = "llama.cpp as transformers", "gate at F16 passed"
    if failed is not None:
        return Criterion(name, failed["measured"], wanted, "fail", f"{failed['message']} {failed['fix']}")
    if measured is None:
        advice = "Run 'orion evaluate --variants F16': it measures the difference, and says where it is too large."
        return Criterion(name, "not measured", wanted, "open", advice)
    agreement = measured["agreement"]
    said = f"{agreement:.1%} agree, {measured['largest_difference']:.4f} nats apart"
    return Criterion(name, said, wanted, "pass", "", agreement)


def blank_rule(rows: Sequence[Prediction], in_flight: bool, largest: float, mission: Mission) -> Criterion:
    """Blank frames get their category without asking the model, so frames with content must not be among them."""
    name, wanted = "blank rule", f"on; at most {largest:.0%} of those"
    if not mission.blank:
        return Criterion(name, "the mission has none", "-", "pass")
    if not in_flight:
        return Criterion(name, "not evaluated", wanted, "open", "Run 'orion evaluate --variants constrained'.")
    valuable = [row for row in rows if mission.kept(row.truth)]
    dropped = sum(row.blank for row in valuable)
    share = dropped / max(1, len(valuable))
    measured = f"on; {dropped} of {len(valuable)} {listed(mission.that('send', 'store'))} frames are blank"
    if share <= largest:
        return Criterion(name, measured, wanted, "pass", "", share)
    advice = "Look at the blank frames ('orion dataset view'): the pictures or their labels are wrong."
    return Criterion(name, measured, wanted, "fail", advice, share)


def in_time(measured: Mapping[str, Any] | None, largest: float) -> Criterion:
    """Seconds per frame of the flight's setup, on the machine that measured it."""
    name, wanted = "seconds per frame", f"at most {largest:g} s"
    if measured is None:
        advice = "Run 'orion bench-frame' on the flight computer."
        return Criterion(name, "not measured", wanted, "open", advice)
    seconds = float(measured["seconds_per_frame"])
    said = f"{seconds:.2f} s on {measured['processor']}"
    if seconds <= largest:
        return Criterion(name, said, wanted, "pass", "", seconds)
    advice = "Train at a smaller frame size, or take a smaller base: see 'orion bench-frame'."
    return Criterion(name, said, wanted, "fail", advice, seconds)


def under_stress(measured: Mapping[str, Any] | None, largest: float, significance: float) -> Criterion:
    """The irrecoverable loss under each stress of JUDGED_STRENGTH.

    A stress fails if it loses more than `largest`, and significantly more than the same frames without it. These tests
    are corrected for their number: a good model would else fail one of them by chance.
    """
    name, wanted = "loss under stress", f"upper end at most {largest:.0%} at {JUDGED_STRENGTH} strength"
    if measured is None or measured["missing"]:
        said = "not measured" if measured is None else f"not measured: {', '.join(measured['missing'])}"
        return Criterion(name, said, wanted, "open", "Run 'orion evaluate --stress', then 'orion report'.")
    rows = [row for row in measured["rows"] if row["strength"] == JUDGED_STRENGTH]
    losses = {row["stress"]: row["irrecoverable_loss"] for row in rows if row["irrecoverable_loss"]["total"]}
    if not losses:
        return Criterion(name, "no such frame", wanted, "open", "Add frames to be sent or stored to the test split.")
    corrected = holm({stress: loss["change"]["exact_p"] for stress, loss in losses.items()})
    failed = [
        stress
        for stress, loss in losses.items()
        if loss["rate"] > largest and loss["change"]["difference"] > 0 and corrected[stress] < significance
    ]
    worst = max(failed or losses, key=lambda stress: (losses[stress]["rate"], losses[stress]["high"]))
    loss = losses[worst]
    values = (loss["rate"], loss["low"], loss["high"])
    said = f"{worst}: {loss['count']} of {loss['total']}: {_rate(loss)}"
    if failed:
        more = f" (also {', '.join(one for one in failed if one != worst)})" if len(failed) > 1 else ""
        advice = f"Train on frames with {worst}{more}, or see that the camera does not deliver them: docs/stress.md."
        return Criterion(name, said, wanted, "fail", advice, *values)
    if all(one["high"] <= largest for one in losses.values()):
        return Criterion(name, said, wanted, "pass", "", *values)
    return Criterion(name, said, wanted, "open", "Label more test frames, or reduce the loss.", *values)
