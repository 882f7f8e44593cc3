"""The cascade command: what a cheap first look saves and loses."""

import json
import math
import shlex
from dataclasses import replace
from typing import Annotated, Any

import typer

from orion_triage.cli.app import app
from orion_triage.cli.terminal import FinishedRunOption, JsonOption, do_stage, finished_run, messages, output
from orion_triage.errors import OrionError


@app.command(
    rich_help_panel="Evaluation",
    epilog="Example: orion cascade\n\nExample: orion cascade --first head --max-loss 2% --seconds 0.9,3.6\n\n"
    "Example: orion cascade --run runs/large --first first-look",
)
def cascade(
    first: Annotated[
        str,
        typer.Option(
            "--first", metavar="VARIANT", help="The cheap look: verdict-only, first-look (a smaller frame), or head."
        ),
    ] = "verdict-only",
    limit: Annotated[
        str,
        typer.Option("--max-loss", metavar="SHARE", help="Valuable frames of val that the first look may lose: 2%."),
    ] = "0%",
    seconds: Annotated[
        str,
        typer.Option("--seconds", metavar="CHEAP,FULL", help="Of each look, as 'orion bench-frame' measures them."),
    ] = "",
    folder: FinishedRunOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a cheap first look that drops what is surely to be dropped.

    A measurement on the ground: no bundle can fly a cascade.

    The full look, the flight's, is spent on the other frames. The probability
    from which the first look drops is chosen on val; the effect is shown on val
    and test, against the full look on everything. Evaluates what is missing.
    """
    from orion_triage.evaluate.cascade import effect, lowest_threshold
    from orion_triage.evaluate.threshold import parse_share
    from orion_triage.evaluate.variants import CONSTRAINED, frame_size, named

    largest, both = parse_share(limit), _seconds(seconds)
    if both and both[0] >= both[1]:
        messages().print(
            f"warning: the first look ({_shown(both[0])}) is not faster than the full look ({_shown(both[1])}). "
            "--seconds names the first look first.",
            soft_wrap=True,
        )
    run = finished_run(folder, "quantize", "val")
    looks = {one.split: _looks(one, first) for one in (run, replace(run, split="test"))}
    drop_threshold = lowest_threshold(looks["val"], largest)
    record = {
        "first_look": first,
        "frame_sizes": {
            look: frame_size(named(run.settings, variant), run.settings)
            for look, variant in (("first_look", first), ("full_look", CONSTRAINED))
        },
        "drop_threshold": drop_threshold,
        "chosen_on": {"split": "val", "largest_loss": largest, "frames": len(looks["val"].full)},
        "effects": {split: effect(one, drop_threshold, both) for split, one in looks.items()},
    }
    if as_json:
        typer.echo(json.dumps(record, indent=2))
        return
    _print(record, run.settings.mission)


def _seconds(text: str) -> tuple[float, float] | None:
    if not text:
        return None
    try:
        cheap, full = (float(part) for part in text.split(","))
    except ValueError:
        cheap = full = 0.0
    if not (min(cheap, full) > 0 and math.isfinite(cheap + full)):
        raise OrionError(
            f"--seconds {text} is not two times in seconds.", "Write it as 0.9,3.6: first look, full look."
        )
    return cheap, full


def _shown(seconds: float) -> str:
    """The seconds with three significant digits, or more before the point."""
    return f"{seconds:.{max(0, 2 - math.floor(math.log10(seconds)))}f} s"


def _looks(run: Any, first: str) -> Any:
    """Both looks at the run's split, without coordinates, as in flight; evaluates them if necessary."""
    from orion_triage.evaluate.cascade import Looks
    from orion_triage.evaluate.metrics import Prediction, under
    from orion_triage.evaluate.results import blank_frames, unlike_frames
    from orion_triage.evaluate.run import predictions_in
    from orion_triage.evaluate.threshold import CONDITION, marked_by_rules, rules_of
    from orion_triage.evaluate.variants import CONSTRAINED, FIRST_LOOK, HEAD, VERDICT_ONLY, chosen

    if first not in (VERDICT_ONLY, FIRST_LOOK, HEAD):
        raise OrionError(f"--first {first} is not a cheap look.", f"Use {VERDICT_ONLY}, {FIRST_LOOK} or {HEAD}.")
    chosen(run.settings, [first], shlex.quote(str(run.folder)))
    mission = run.settings.mission
    rules = rules_of(run)
    blank, unlike = blank_frames(run), unlike_frames(run, rules)

    def answers(variant: str) -> list[Prediction]:
        do_stage(f"evaluate {variant}", run)
        return under(marked_by_rules(predictions_in(run.evaluation(variant), mission), blank, unlike), CONDITION)

    return Looks(answers(first), answers(CONSTRAINED), rules, mission)


def _print(record: dict[str, Any], mission: Any) -> None:
    from rich.table import Table

    from orion_triage.mission.mission import listed
    from orion_triage.report.render import rate
    from orion_triage.templates import percent

    dropped, kept = listed(mission.that("drop"), "or"), listed(mission.that("send", "store"))
    threshold = record["drop_threshold"]
    if threshold > 1:
        typer.echo(f"the first look ({record['first_look']}) cannot drop a frame without losing more than allowed")
    else:
        typer.echo(f"first look: {record['first_look']}; drops a frame if P({dropped}) is {threshold:.3f} or more")
    sizes = record["frame_sizes"]
    title = (
        f"first look: {record['first_look']}, frames of {sizes['first_look']} px; full look: {sizes['full_look']} px"
    )
    table = Table("split", "full looks spared", "in orbit*", f"{kept} lost", "without first look", "p", title=title)
    for split, measured in record["effects"].items():
        spared, orbit = measured["spared"], measured["spared_in_orbit"]
        shown = f"{percent(orbit['value'])} ({percent(orbit['low'])} to {percent(orbit['high'])})" if orbit else "-"
        table.add_row(
            split,
            f"{spared['count']} of {spared['total']}",
            shown,
            rate(measured["cascade"]["irrecoverable_loss"]),
            rate(measured["alone"]["irrecoverable_loss"]),
            f"{measured['p']:.2f}",
        )
    output().print(table)
    typer.echo("*: share of the frames in orbit, with the mission's prior")
    if times := record["effects"]["test"]["seconds_per_frame"]:
        typer.echo(
            f"expected per frame in orbit: {_shown(times['expected'])} instead of {_shown(times['full_look'])} "
            f"(the first look alone: {_shown(times['first_look'])})"
        )
