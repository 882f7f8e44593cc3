"""results.json -> report.md and the tables in the terminal; pure."""

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any

from orion_triage import templates
from orion_triage.evaluate.baselines import LOGISTIC_REGRESSION
from orion_triage.evaluate.conditions import CONDITIONS
from orion_triage.evaluate.controls import NOISE, OTHER, SAME
from orion_triage.evaluate.results import DELTAS, SHOWN
from orion_triage.evaluate.variants import MODELS
from orion_triage.evaluate.verdict import DO_NOT_FLY, FLY, NOT_ENOUGH
from orion_triage.machine import power
from orion_triage.mission.mission import Mission, listed, what_happens
from orion_triage.templates import percent

if TYPE_CHECKING:
    from rich.table import Table

SIGNIFICANT = 0.05
MET = {"pass": "yes", "fail": "NO", "open": "open"}  # a criterion's outcome
STRESSED = ("high_recall", "irrecoverable_loss")  # the rates that are compared under stress
OUTCOME_OF = {FLY: "pass", DO_NOT_FLY: "fail", NOT_ENOUGH: "open"}


def render_markdown(results: dict[str, Any], figure: str, stress_figure: str = "") -> str:
    """The report; `figure` and `stress_figure` are the file names of the charts in the same folder."""
    return from_template(
        "report.md.j2",
        results=results,
        rows=accuracy_rows(results),
        fields=field_rows(results),
        figure=figure,
        stress=stress_rows(results["stress"]) if results["stress"] else [],
        stress_figure=stress_figure,
        conditions=list(CONDITIONS),
        met=MET,
        **words(mission_of(results)),
    )


def mission_of(results: dict[str, Any]) -> Mission:
    """The mission that the results are of."""
    return Mission.model_validate(results["settings"]["mission"])


def words(mission: Mission) -> dict[str, Any]:
    """What the templates say of a mission: names by action, `kept` (not dropped), and what happens to each."""
    return {
        "mission": mission,
        "categories": mission.names,
        "sent": listed(mission.that("send")) or "sent",
        "precise": [f"{name} among sent" for name in mission.that("send")],
        "dropped": listed(mission.that("drop"), "or") or "dropped",
        "kept": listed(mission.that("send", "store")),
        "what_happens": what_happens(mission),
    }


def from_template(name: str, **values: Any) -> str:
    """A template beside this module, filled in."""
    filters: dict[str, Any] = {
        "number": number,
        "rate": rate,
        "interval": interval,
        "share": share,
        "ends": ends,
        "cost": cost,
        "columns_of_orbit": columns_of_orbit,
        "false_alarms": false_alarms,
        "false_alarms_found": false_alarms_found,
        "best_seed": best_seed,
        "promised": promised,
        "shown": shown,
        "notes": notes,
        "sentences": sentences,
        "significant": significant,
        "error_rate_at": error_rate_at,
        "verdict_in_words": verdict_in_words,
        "advice": advice,
        "unbroken": unbroken,
        "worst_under_stress": worst_under_stress,
        "controls_rows": controls_rows,
        "on_board": on_board,
    }
    return templates.fill("report", name, filters=filters, **values)


def on_board(measured: dict[str, Any]) -> str:
    """Frames per eclipse for a measured {seconds_per_frame, processor}, and the energy of a frame if it is known."""
    seconds, board = measured["seconds_per_frame"], power.board_of(measured["processor"])
    return power.in_words(power.cost_of((seconds, seconds), board), board)


def unbroken(text: str) -> str:
    """`text` for a narrow table in HTML: "k-NN" and "p < 0.05" keep on one line."""
    return text.replace("k-NN", "k\N{NON-BREAKING HYPHEN}NN").replace(" < ", "\N{NO-BREAK SPACE}<\N{NO-BREAK SPACE}")


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def rate(value: dict[str, Any]) -> str:
    """A rate with its counts and 95 % interval."""
    if value["rate"] is None:
        return "-"
    bounds = f"{100 * value['low']:.0f}-{100 * value['high']:.0f}"
    return f"{value['count']}/{value['total']} = {percent(value['rate'])} ({bounds})"


def share(value: dict[str, float | None]) -> str:
    """A share with its 95 % interval, in percent."""
    return f"{percent(value['value'])} ({ends(value)})" if value["value"] is not None else "-"


def cost(value: dict[str, float | None]) -> str:
    """A cost per frame with its 95 % interval."""
    return f"{number(value['value'])} ({number(value['low'])} to {number(value['high'])})"


def ends(value: dict[str, float | None]) -> str:
    """The 95 % interval of a share, in percent; with a decimal below 10 %."""
    low, high = value["low"], value["high"]
    if low is None or high is None:
        return ""
    decimals = 1 if high < 0.1 else 0
    return f"{100 * low:.{decimals}f}-{100 * high:.{decimals}f}"


def columns_of_orbit(orbit: dict[str, Any], mission: Mission) -> list[dict[str, float | None]]:
    """Sent, the precision of each category that is sent, stored and dropped, in the order of the tables."""
    return [
        orbit["sent"],
        *(orbit["precision"][name] for name in mission.that("send")),
        orbit["stored"],
        orbit["dropped"],
    ]


def promised(promise: dict[str, Any] | None, mission: Mission, split: str = "val") -> str:
    """What a threshold that was chosen on a split promises, in a sentence."""
    if promise is None:
        return f"This is no promise for other frames: it was chosen on {split}, and looks better there than elsewhere."
    return (
        f"Promise, with {promise['confidence']:.0%} confidence, for frames like those of {split}: at most "
        f"{promise['largest_loss']:.1%} of the {listed(mission.that('send', 'store'))} frames are dropped (upper bound "
        f"{promise['upper_bound']:.1%}, from {promise['frames']} frames of {promise['places']} places)."
    )


def best_seed(over_seeds: dict[str, Any], own: int) -> str:
    """Which of the seeds is best on val, and whether it is this run's."""
    best = over_seeds["best_on_val"]
    if best is None:
        return "Which of them is best on val is not known: a training of before has no loss of the category."
    losses = dict(zip(over_seeds["seeds"], over_seeds["val_losses_of_category"], strict=True))
    if best == own:
        return (
            f"This run (seed {own}) was the best of {len(losses)} on val (loss of the category {losses[own]:.4f}). Its "
            "own figures on val are therefore too good; those on test are not, as long as test chose nothing."
        )
    lowest, ours = f"{losses[best]:.4f}", f"{losses[own]:.4f}"
    return f"Best on val is seed {best} (loss of the category {lowest}), not this run (seed {own}, {ours})."


def false_alarms(results: dict[str, Any]) -> str:
    """What the frames to be dropped show about false alarms in orbit, without coordinates (B); empty if not known."""
    judged = [rates for _, condition, rates in shown(results, "B")]
    found = (judged[-1]["orbit"] or {}).get("false_alarms") if judged else None
    if not found:
        return ""
    mission = mission_of(results)
    dropped, sent = (listed(mission.that(action), "or") for action in ("drop", "send"))
    limit, needed = f"{100 * found['largest_rate']:.2g} %", f"{found['frames_needed']:,}"
    return (
        f"At most half of what is sent is a false alarm if at most {limit} of the {dropped} frames are sent. It takes "
        f"{needed} {dropped} test frames without a false alarm to show that (rule of three); this split has "
        f"{found['frames']}, of which {found['count']} were sent as {sent}."
    )


def false_alarms_found(found: dict[str, Any] | None, mission: Mission) -> str:
    """What `orion false-alarms` found, and what it says about the sent frames; empty without it."""
    if not found:
        return ""
    if found["outdated"]:
        return "What 'orion false-alarms' found is of another pair or threshold, and left out."
    sent = f"{found['category']} frames of {found['folder']}, {rate(found['sent'])} were sent"
    text = f"Of {found['frames']:,} further {sent}, {found['stored']:,} stored."
    if found["orbit"] is None:
        return text
    precise = ", ".join(f"{share(found['orbit']['precision'][name])} are {name}" for name in mission.that("send"))
    return f"{text} With these instead of the split's {found['category']} frames, of what is sent in orbit {precise}."


def interval(value: dict[str, float | None]) -> str:
    if value["low"] is None or value["high"] is None:
        return percent(value["value"])
    return f"{percent(value['value'])} ({100 * value['low']:.0f}-{100 * value['high']:.0f})"


def error_rate_at(rates: dict[str, Any], kept: float) -> float:
    """The error rate of the most confident answers, at the smallest coverage of at least `kept` (0 to 1)."""
    curve = rates["risk_coverage"]
    return next(
        error for coverage, error in zip(curve["coverage"], curve["error_rate"], strict=True) if coverage >= kept
    )


def verdict_in_words(verdict: dict[str, Any]) -> str:
    """What the verdict means, and the criteria that decided it."""
    because = ", ".join(verdict["because"])
    return {
        FLY: "All criteria are met on the test frames.",
        DO_NOT_FLY: f"The test frames show that the model does not meet: {because}.",
        NOT_ENOUGH: f"No criterion is failed, but these are not shown yet: {because}.",
    }[verdict["verdict"]]


def verdict_table(verdict: dict[str, Any], width: int) -> "Table":
    """The criteria of a verdict for a terminal of `width` columns; the cells wrap, so that it fits 80."""
    from rich.table import Column, Table

    # Rich would narrow this column most, to three lines a row. A `min_width` would push "met" off the screen.
    measured = Column("measured (95 % interval)", width=31 if 80 <= width < 102 else None)
    table = Table("criterion", measured, "needed", "met")
    for row in verdict["criteria"]:
        style = {"pass": "", "fail": "bold red", "open": "yellow"}[row["outcome"]]
        table.add_row(row["name"], row["measured"], row["needed"], MET[row["outcome"]], style=style)
    return table


def advice(verdict: dict[str, Any]) -> list[str]:
    """What to do about each criterion that is not met; first about those that are failed, which decide."""
    rows = sorted(verdict["criteria"], key=lambda row: row["outcome"] != "fail")
    return [f"{row['name']}: {row['advice']}" for row in rows if row["advice"]]


def notes(results: dict[str, Any]) -> list[str]:
    """Notes for the top of a report: unfinished stages, and models that the run did not make."""
    found = []
    if gate := results["failed_gate"]:
        found.append(
            f"The gate at F16 failed: {gate['message']} The answers at F16 are left out. Those of the quantized models "
            "come from llama.cpp, too: do not rely on them."
        )
    if results["missing"]:
        found.append(f'Not finished: {", ".join(results["missing"])}. Their values are left out or shown as "-".')
    by_change: dict[str, list[str]] = {}
    for stage, changed in results["outdated"].items():
        by_change.setdefault("; ".join(changed), []).append(stage)
    for changes, stages in by_change.items():
        found.append(f"Outdated ({changes}): {', '.join(stages)}. 'orion run' makes them again.")
    if server := results["foreign_server"]:
        found.append(
            f'"server" is {server["served_model"]}, as served by {server["server"]} ({server["server_build"]}).'
        )
    if results["foreign_pair"]:
        found.append(f'"other-pair" is the pair {results["foreign_pair"]}.')
    if others := results["read_otherwise"]:
        counts = ", ".join(f"{count} of {name}" for name, count in others.items())
        found.append(
            f"This version reads some stored answers otherwise than they are counted here ({counts}). "
            "'orion report --rescore' reads all of them again; no model is asked."
        )
    if results["stress"]:
        found.append(worst_under_stress(results["stress"]))
    if results["controls"] and results["controls"]["outdated"]:
        names = ", ".join(results["controls"]["outdated"])
        found.append(f"Controls of another model, dataset or version, and left out: {names}.")
    return found


def shown(results: dict[str, Any], conditions: Iterable[str] = "AB") -> list[tuple[str, str, dict[str, Any]]]:
    """(model, condition, rates) of base, fine-tuned, quantized, and flight with and without its threshold."""
    models = results["models"]
    return [
        (model, condition, models[model][condition])
        for model in SHOWN
        if model in models
        for condition in conditions
        if condition in models[model]
    ]


def significant(change: dict[str, dict[str, Any]]) -> str:
    """The conditions under which a change is significant."""
    found = [condition for condition, difference in change.items() if difference["holm_p"] < SIGNIFICANT]
    return ", ".join(found) if found else "none"


def sentences(results: dict[str, Any]) -> list[str]:
    """Each difference with its significance, and the number of frames that would make it significant."""
    named = dict(results["deltas"])
    for model in SHOWN:
        if model in results["within"]:
            named[model] = results["within"][model]
    frames = results["frames"]["count"]
    found = against_linear_probe(results)
    for name, by_condition in named.items():
        same = [condition for condition, change in by_condition.items() if not change["gained"] + change["lost"]]
        if same:
            found.append(f"{name}, {'; '.join(same)}: {change_in_words(by_condition[same[0]])}.")
        different = ((c, change) for c, change in by_condition.items() if c not in same)
        found += [f"{name}, {c}: {change_in_words(change, frames)}." for c, change in different]
    return found


def against_linear_probe(results: dict[str, Any]) -> list[str]:
    """Whether the fine-tuned model is better than a linear probe on the vision features of its base."""
    change = results["linear_probe"]
    if change is None:
        return []
    verdict = "has a higher" if change["lost"] > change["gained"] else "does not have a higher"
    words = change_in_words(change, results["frames"]["count"], corrected=False)
    return [
        f"{LOGISTIC_REGRESSION} (linear probe) {verdict} accuracy than the fine-tuned model without coordinates (B). "
        f"Change from the probe to the model: {words}."
    ]


def change_in_words(change: dict[str, Any], frames: int | None = None, *, corrected: bool = True) -> str:
    """Frames gained and lost, and the significance of the difference; `frames` is the number compared.

    With `corrected`, p is that after Holm's correction for several comparisons; without, the change is the only one.
    """
    if not change["gained"] + change["lost"]:
        return "no change, the same frames are correct"
    counts = f"{change['points']:+.1f} points ({change['gained']} gained, {change['lost']} lost)"
    p, name = (change["holm_p"], "Holm-corrected p") if corrected else (change["exact_p"], "uncorrected p")
    if p < SIGNIFICANT:
        return f"{counts}, significant ({name} = {p:.2g})"
    compared = f", {frames:,} frames" if frames else ""
    words = f"{counts}, no significant difference ({name} = {p:.2g}, uncorrected mid-p {change['mid_p']:.2g}{compared})"
    if change["frames_to_resolve"] is None:
        return words
    return f"{words}; a difference of this size needs about {change['frames_to_resolve']:,} frames"


def accuracy_rows(results: dict[str, Any]) -> list[list[str]]:
    """Condition, accuracy of each model, change by each step; '-' if a model is missing."""
    rows = []
    for condition, meaning in CONDITIONS.items():
        cells = [f"{condition} {meaning}"]
        for model in MODELS:
            rates = results["models"].get(model, {}).get(condition)
            cells.append(percent(rates["accuracy"]) if rates else "-")
        for name in DELTAS:
            delta = results["deltas"].get(name, {}).get(condition)
            cells.append(f"{delta['points']:+.1f}" if delta else "-")
        rows.append(cells)
    return rows


def field_rows(results: dict[str, Any]) -> list[list[str]]:
    """Each further field's metrics under B and A: exactly right, at most 1 off, mean absolute error ('-': neither)."""
    return [
        [
            name,
            model,
            condition,
            _share(rates),
            _share(rates["within_one"]) if "within_one" in rates else "-",
            number(rates.get("mean_absolute_error")),
        ]
        for field in mission_of(results).fields
        for model, condition, every in shown(results, "BA")
        for name, rates in every["fields"].items()
        if name == field.name
    ]


def _share(rates: dict[str, Any]) -> str:
    """Counts, share and 95 % interval."""
    bounds = f"{100 * rates['low']:.0f}-{100 * rates['high']:.0f}"
    return f"{rates['right']}/{rates['count']} = {percent(rates['accuracy'])} ({bounds})"


def worst_under_stress(stress: dict[str, Any]) -> str:
    """The stresses with the largest irrecoverable loss, and those that were not evaluated."""
    rows = {f"{row['stress']} {row['strength']}": row for row in stress["rows"]}
    worst = [
        f"{name} ({rows[name]['shown']}) {rate(loss)}, {change_under_stress(loss['change'])}"
        for name in stress["worst"]
        for loss in [rows[name]["irrecoverable_loss"]]
    ]
    said = "Under stress, the largest irrecoverable losses: " + "; ".join(worst) + "."
    if not worst:
        said = "Under no evaluated stress are more frames lost than without it."
    if stress["outdated"]:
        said += f" Of another pair, dataset or version, and left out: {', '.join(stress['outdated'])}."
    if missing := [name for name in stress["missing"] if name not in stress["outdated"]]:
        said += f" Not evaluated: {', '.join(missing)}."
    return said


def change_under_stress(change: dict[str, Any] | None) -> str:
    """The paired change of a rate in points with its interval, and Holm's p."""
    if change is None:
        return "-"
    points = "{difference:+.0f} points ({low:.0f} to {high:.0f})".format(
        **{name: 100 * change[name] for name in ("difference", "low", "high")}
    )
    p = change["holm_p"]
    return f"{points}, {'p < 0.001' if p < 0.001 else f'p = {p:.2g}'}"


def stress_rows(stress: dict[str, Any], names: Collection[str] = ()) -> list[list[str]]:
    """Stress, strength, parameter, recall and loss with the change of each, frames sent and blank; of these, or all."""
    return [
        [
            row["stress"],
            row["strength"],
            row["shown"],
            *(text for key in STRESSED for text in (rate(row[key]), change_under_stress(row[key]["change"]))),
            percent(row["downlink"]["sent"]),
            str(row["blank"]),
        ]
        for row in stress["rows"]
        if not names or row["stress"] in names
    ]


def stress_table(stress: dict[str, Any], names: Collection[str] = ()) -> "Table":
    """The rows of these stresses for a terminal; the first row is without stress."""
    from rich.table import Table

    table = Table("stress", "", "", "recall", "change", "irrecoverable loss", "change", title="Under stress (B)")
    for heading in ("sent", "blank"):
        table.add_column(heading, justify="right")
    plain = stress["unstressed"]
    table.add_row(
        "none", "", "", rate(plain[STRESSED[0]]), "", rate(plain[STRESSED[1]]), "", percent(plain["downlink"]["sent"])
    )
    before = ""
    for row in stress_rows(stress, names):
        if row[0] != before:
            table.add_section()
        table.add_row(row[0] if row[0] != before else "", *row[1:])
        before = row[0]
    return table


def controls_rows(controls: dict[str, Any]) -> list[list[str]]:
    """Control, correct answers, and what they are compared with: conditions of the protocol first."""
    noise, other, alike = (controls[name] for name in (NOISE, OTHER, SAME))
    own = {condition: rate(controls["protocol"][condition]) for condition in "BCD"}
    said = ", ".join(f"{name} {percent(part)}" for name, part in noise["answers"].items())
    bounds = f"{percent(noise['lowest'])} to {percent(noise['highest'])}"
    return [
        ["C: the noise image of the protocol", own["C"], ""],
        [f"C: {noise['images']} other noise images", rate(noise["accuracy"]), f"by image {bounds}; answers: {said}"],
        [
            "C: pictures of other places",
            rate(other["as_coordinates"]),
            f"as the picture's place: {rate(other['as_picture'])}",
        ],
        ["B: no coordinates", own["B"], ""],
        [
            "D: another place of the same category",
            rate(alike["accuracy"]),
            f"distraction, from B: {change_of_control(alike['distraction'])}",
        ],
        [
            "D: a place of another category",
            own["D"],
            f"trust, from the same category: {change_of_control(alike['trust'])}",
        ],
    ]


def change_of_control(change: dict[str, Any]) -> str:
    """A paired change between two conditions, not corrected for others."""
    return change_in_words(change, corrected=False)


def adapted_table(figures: dict[str, Any]) -> "Table":
    """The head, the continued adapter, the pair as it flies and the commonest category on the labelled frames."""
    from rich.table import Table

    labelled = ", ".join(f"{count} {name}" for name, count in figures["of_category"].items())
    table = Table("who decides", "correct", title=f"{figures['frames']} labelled frames: {labelled}")
    table.add_column("mean recall", justify="right")
    table.add_column("change to the head")
    of_continued = figures.get("change_of_continued", {})
    if of_continued:
        table.add_column("change to the continued adapter")
    for key, label in (
        ("head", "the head, on frames that it has not seen"),
        ("head_on_its_folds", "the head, in the division of the continued adapter"),
        ("continued", "the continued adapter, on frames that it has not seen"),
        ("zero_shot", "the pair as it flies"),
        ("constant", "always the commonest category"),
    ):
        if key in figures:
            changes = [_points(changes.get(key)) for changes in (figures["change"], of_continued)]
            table.add_row(
                label, rate(figures[key]), percent(figures[key]["balanced"]), *changes[: len(table.columns) - 3]
            )
    return table


def _points(change: dict[str, Any] | None) -> str:
    return f"{change['points']:+.0f} points ({change['gained']} gained, {change['lost']} lost)" if change else ""


def adapted_in_words(figures: dict[str, Any]) -> list[str]:
    """Whether the head and the continued adapter help, and what fewer frames would have given."""
    found = [_whether_it_helps("the head", figures["change"])]
    before, after = (figures[key]["balanced"] for key in ("zero_shot", "head"))
    if after < before:
        found.append(
            f"With the head, the mean recall falls from {percent(before)} to {percent(after)}: it finds less of the "
            "categories with few frames."
        )
    low, high = figures["repeats"][0], figures["repeats"][-1]
    times, frames = len(figures["repeats"]), figures["frames"]
    found.append(
        f"In {times} divisions of the frames into folds, {low} to {high} of {frames} are right; the median is shown."
    )
    if absent := [name for name, count in figures["of_category"].items() if not count]:
        found.append(
            f"No frame is {listed(absent, 'or')}: the head hardly ever says so, and the mean recall is without it."
        )
    if curve := figures["curve"]:
        points = ", ".join(
            f"{size} frames {percent(point['mean'])} ({percent(point['low'])} to {percent(point['high'])})"
            for size, point in curve.items()
        )
        found.append(f"Learning curve, accuracy on the other frames (80 % of the draws): {points}.")
    if changes := figures.get("change_of_continued"):
        found.append(_whether_it_helps("the continued adapter", changes))
        between = changes["head_on_its_folds"]
        chosen = "the continued adapter" if figures["chosen"] == "continued" else "the head"
        found.append(
            f"Right more often, or simpler if both are right as often: {chosen}. From the head to the continued "
            f"adapter in the same {figures['folds']} folds, {change_of_control(between)}."
        )
    return found


def _whether_it_helps(name: str, changes: dict[str, dict[str, Any]]) -> str:
    """Whether something is better than the pair as it flies and than the commonest category, by `changes` to it."""
    asked = [changes[key] for key in ("zero_shot", "constant")]
    better = all(change["exact_p"] < SIGNIFICANT and change["points"] > 0 for change in asked)
    answer = "It helps" if better else "It is not shown that it helps"
    before, always = (f"{change_of_control(one)} ({_interval_of(one)})" for one in asked)
    return f"{answer}: from the pair to {name}, {before}; from the commonest category, {always}."


def _interval_of(change: dict[str, Any]) -> str:
    return f"95 % interval {100 * change['low']:+.0f} to {100 * change['high']:+.0f} points"


def forgotten_in_words(compared: dict[str, dict[str, Any]]) -> str:
    """What continuing changed on the run's own test frames, with coordinates (A) and without (B)."""
    parts = []
    for condition in ("A", "B"):
        if of := compared.get(condition):
            before, after = of["right"]
            parts.append(
                f"{condition} {before} -> {after} of {of['count']} ({_interval_of(of)}, p = {of['exact_p']:.2g})"
            )
    return f"on the run's own test frames, the quantized pair before and after: {'; '.join(parts)}"


def controls_table(name: str, controls: dict[str, Any]) -> "Table":
    """The controls of one variant for a terminal."""
    from rich.table import Table

    table = Table("control", "correct", "", title=f"Controls of {name}")
    for row in controls_rows(controls):
        table.add_row(*row)
    return table


def terminal_tables(results: dict[str, Any]) -> "list[Table]":
    """Accuracy by condition and model; baselines; seconds of the stages and sizes of the files."""
    from rich.table import Table

    accuracy = Table(title=f"Accuracy on the {results['split']} split (preset {results['preset']})")
    accuracy.add_column("condition")
    for name in (*MODELS, *(f"by {delta}" for delta in DELTAS)):
        accuracy.add_column(name, justify="right")
    for row in accuracy_rows(results):
        accuracy.add_row(*row)
    accuracy.add_section()
    for key, label in (
        ("trusted_coordinates", "D trusted coordinates"),
        ("same_wrong_answer_in_b", "  same wrong answer in B"),
    ):
        cells = [str(results["models"].get(m, {}).get("D", {}).get(key, "-")) for m in MODELS]
        accuracy.add_row(label, *cells, "", "")
    unparsable = [
        str(sum(rates["unparsable"] for rates in results["models"][m].values())) if m in results["models"] else "-"
        for m in MODELS
    ]
    accuracy.add_row("unparsable answers", *unparsable, "", "")
    simple = Table(title="Baselines (no language model)")
    simple.add_column("baseline")
    simple.add_column("accuracy", justify="right")
    for name, baseline in results["baselines"].items():
        simple.add_row(name, percent(baseline["accuracy"]))
    work = Table(title="Stages and files")
    work.add_column("stage")
    work.add_column("seconds", justify="right")
    for stage, seconds in results["seconds"].items():
        work.add_row(stage, f"{seconds:,.1f}")
    work.add_section()
    for name, size in results["bytes"].items():
        work.add_row(name, f"{size / 1e6:,.1f} MB")
    return [accuracy, simple, work]
