#!/usr/bin/env python3
"""Choose llama-server's flags by measurement on this machine, and write them to server_flags.json for serve.sh.

`orion bundle` copies this file into every bundle. It needs only Python 3.9 or newer, and Linux.

The default flags (those of serve.sh) are measured first, then one change at a time, the most valuable ones first; each
faster one is kept for the changes after it. Flags are kept only if they are faster by more than the noise, and every
golden frame passes the check before flight with them. Then the flags before the change are measured once more, so that
a machine that became quieter or cooler is not taken for a gain.

Each measurement is in tuning.json before the next one starts. Run the same command again after a power loss to measure
what is missing. Exit status: 0, 1 if nothing could be measured (the last line gives the reason), 2 for a wrong command
line.

While other programs use the cores, no flags are written (--busy-anyway writes them all the same).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterator  # noqa: UP035 - Python 3.9

if TYPE_CHECKING or __package__:
    from orion_triage.flight import check_flight, server_flags
else:
    sys.dont_write_bytecode = True  # the bundle stays as it is
    sys.path.insert(0, str(Path(__file__).resolve().parent))  # with python3 -I, the script's folder is not on the path
    import check_flight
    import server_flags

RESULTS = "tuning.json"
MINUTES = 10.0
TODAY, AGAIN = "default flags", ", again"
PLENTY = 120  # frames that the time allows: with fewer, a measurement has two frames twice instead of three three times
LEAST_GAIN = 0.02  # of the seconds per frame; less is noise whatever the spread
BUSY = 0.5  # busy cores of other programs from which the measured times are not to be used
BUSY_SECONDS = 1.0  # for which they are counted
HOPELESS = 1.25  # times as slow in its first round: the other rounds are left out
START_SECONDS = 300
# After the threads. Flash attention doubles the time of a tower on one processor and costs nothing on another.
CHANGES: tuple[dict[str, str], ...] = (
    {"--batch-size": "1024", "--ubatch-size": "1024"},  # a prompt of more than 512 tokens in one piece
    {"--no-repack": ""},
    {"--batch-size": "512", "--ubatch-size": "256"},
    {"--load-mode": "none"},  # without mmap: memory, not speed
    {"--batch-size": "256", "--ubatch-size": "128"},
)
Progress = Callable[[str, int, int], None]


class TuneError(Exception):
    """Why nothing can be measured, in one line."""


class OutOfTimeError(Exception):
    """The minutes are over."""


# --- plan -----------------------------------------------------------------------------------------------------


def thread_counts(cores: int) -> list[int]:
    """The numbers of threads to try, most first: all of them up to eight, then eighths."""
    return sorted({cores, cores - 1, *(cores * part // 8 for part in range(1, 8))} - {0}, reverse=True)


def changes(today: dict[str, str], cores: int, towers: list[str]) -> list[dict[str, str]]:
    """The changes to try, the most valuable ones first; `towers` are the bundle's, first the default one."""
    threads = [
        {server_flags.THREADS: str(count)}
        for count in thread_counts(cores)
        if str(count) != today[server_flags.THREADS]
    ]
    flash_attention = {server_flags.FLASH_ATTENTION: "off" if today[server_flags.FLASH_ATTENTION] == "on" else "on"}
    return [*threads, flash_attention, *({server_flags.MMPROJ: tower} for tower in towers[1:]), *CHANGES]


def identity(bundle: dict[str, Any], program: Path, variant: str) -> dict[str, Any]:
    """What a measurement belongs to: the pair, the fixed flags, the questions, llama-server and the machine."""
    names = [bundle["model"], *server_flags.mmprojs_of(bundle)]
    asked = [bundle[key] for key in ("golden", "request", "tolerances", "decision", "frame_size")]
    return {
        "pair": {name: bundle["files"][name] for name in names},
        "serve_sha256": bundle["files"]["serve.sh"],
        "frames_sha256": hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest(),
        "variant": variant,
        "server_sha256": server_flags.sha256_of_server(program),
        "machine": server_flags.machine(),
    }


def busy_cores(seconds: float) -> float:
    """The mean number of busy cores over the next `seconds`; the load average would include ended programs."""

    def ticks() -> tuple[int, int]:
        first, *_ = Path("/proc/stat").read_text(encoding="utf-8").splitlines()
        counts = [int(word) for word in first.split()[1:9]]  # user, nice, system, idle, iowait, irq, softirq, steal
        return sum(counts) - counts[3] - counts[4], sum(counts)

    busy, whole = ticks()
    time.sleep(seconds)
    busy_later, whole_later = ticks()
    return (os.cpu_count() or 1) * (busy_later - busy) / max(whole_later - whole, 1)


# --- measure --------------------------------------------------------------------------------------------------


class Tuning:
    """Measures flags of a bundle's server, each once: what is in the results file is not measured again.

    Raises TuneError if the results file cannot be used, and NoGoError if the bundle cannot.
    """

    def __init__(
        self, folder: Path, program: Path, results: Path, *, variant: str | None = None, minutes: float = MINUTES,
        time_out: float | None = None, busy_anyway: bool = False,
        progress: Progress = lambda text, done, total: None,
    ) -> None:  # fmt: skip
        if not sys.platform.startswith("linux"):
            raise TuneError("the server's memory and command line are read from /proc: run this on Linux")
        self._deadline = time.monotonic() + 60 * minutes
        self._folder, self._program, self._results = folder, program, results
        self._budget, self._progress, self._time_out = 60 * minutes, progress, time_out
        self._bundle = check_flight.flown(check_flight.read_bundle(folder), variant)
        self._variant = self._bundle.get("variant", "")
        self._asked = [golden for golden in self._bundle["golden"] if golden.get("log_probabilities")]
        if not self._asked:
            raise TuneError("the bundle has no golden frame that the model answers")
        self._pictures: dict[str, Any] = {}
        self._towers = server_flags.mmprojs_of(self._bundle)
        own = identity(self._bundle, program, self._variant)
        self.notes: list[str] = []
        self._record = self._earlier(own) or {
            "identity": own, "plan": None, "build": None, "busy_cores": 0.0, "measured": {},
        }  # fmt: skip
        if known := len(self._record["measured"]):
            self.notes.append(f"{known} measurements are in {results} already and are not repeated")
        self._busy_anyway, self._measures = busy_anyway, False
        if (busy := busy_cores(BUSY_SECONDS)) > BUSY:
            self.notes.append(f"warning: other programs use {busy:.1f} cores. What is measured now is not to be used")
        self._busy = busy
        self.not_measured: list[dict[str, str]] = []
        self._rows: list[dict[str, Any]] = []

    def _earlier(self, own: dict[str, Any]) -> dict[str, Any] | None:
        """The results file, if it is of the same identity; raises TuneError if it is damaged or was changed."""
        try:
            record = json.loads(self._results.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise TuneError(f"{self._results} cannot be read ({error}): delete it") from None
        if not isinstance(record, dict) or server_flags.sealed(record) != record:
            raise TuneError(f"{self._results} is damaged, or of an earlier version of tune.py: delete it")
        if other := [key for key in own if record["identity"].get(key) != own[key]]:
            self.notes.append(f"{self._results} is of another {', '.join(other)}: everything is measured anew")
            return None
        return dict(record)

    def run(self) -> dict[str, Any]:
        """Search, and return the report: `rows`, fastest first, what was `not_measured`, and the `flags` to use.

        `flags` is None, and `why` says so, if none are faster than the default ones. `usable` is false, and `why` says
        so, if other programs used the cores. Raises TuneError if the default flags cannot be measured, or move a golden
        verdict.
        """
        today = self._measured(TODAY, None, None)
        if today is None:
            raise TuneError(f"the default flags were not measured within {self._budget / 60:g} minutes: allow more")
        if today["why"]:
            raise TuneError(
                f"the default flags fail already: {today['why']}. Every change is rejected. Run check_flight.py"
            )
        best = self._search(today)
        busy = self._busy_since_the_start()
        flags = best["flags"] if best["flags"] != today["flags"] else None
        same = [row for row in self._rows if row["flags"] == today["flags"] and not row["why"]]
        today = min(same, key=lambda row: row["seconds_per_frame"])
        for row in self._rows:
            took = row["seconds_per_frame"]
            row["gain"] = round(1 - took / today["seconds_per_frame"], 4) if took else None
        return {
            **{key: self._record[key] for key in ("identity", "build", "plan")},
            "busy_cores": busy,
            "usable": busy <= BUSY or self._busy_anyway,
            "default_flags": server_flags.words_of(today["flags"]),
            "rows": sorted(self._rows, key=lambda row: (bool(row["why"]), row["seconds_per_frame"])),
            "not_measured": self.not_measured,
            "flags": server_flags.words_of(flags) if flags else None,
            "seconds_per_frame": best["seconds_per_frame"] if flags else today["seconds_per_frame"],
            "seconds_per_frame_before": today["seconds_per_frame"],
            "why": self._why(flags is not None, busy),
            "notes": self.notes,
        }

    def _busy_since_the_start(self) -> float:
        """The most cores that other programs used while one of the rows was measured, in an earlier search, too."""
        if self._measures:
            self._note_busy(busy_cores(BUSY_SECONDS))
        return float(self._record["busy_cores"])

    def _note_busy(self, cores: float) -> None:
        """Keep the number with the results, which are no better when they are read again on an idle machine."""
        self._record["busy_cores"] = max(self._record["busy_cores"], round(cores, 2))
        server_flags.write(self._results, server_flags.sealed(self._record))

    def _why(self, faster: bool, busy: float) -> str:
        """Why the fastest flags are not to be used; empty if they are."""
        if busy > BUSY and not self._busy_anyway:
            return (
                f"not to be used: other programs used {busy:.1f} cores while this was measured. Stop them, delete "
                f"{self._results} and run again"
            )
        return "" if faster else "no change is faster by more than the noise: the default flags stay"

    def _search(self, today: dict[str, Any]) -> dict[str, Any]:
        """The best row by a greedy search along the changes."""
        best, slower_threads = today, 0
        plan = changes(today["flags"], self._record["identity"]["machine"]["cores"], self._towers)
        for number, change in enumerate(plan, start=1):
            name = " ".join(server_flags.words_of(change))
            self._progress(name, number, len(plan) + 1)
            flags = {**best["flags"], **change}
            if server_flags.THREADS in change and int(change[server_flags.THREADS]) < slower_threads:
                why = f"{slower_threads} threads are slower already"
                self.not_measured.append({"change": name, "why": why})
                continue
            row = self._measured(name, flags, best)
            if row is None:
                self.not_measured.append({"change": name, "why": "no time was left (--minutes)"})
                continue
            if not row["why"] and not _is_faster(row, best):
                row["why"] = "slower" if _is_faster(best, row) else "within the noise"
                if server_flags.THREADS in change and row["seconds_per_frame"] > HOPELESS * best["seconds_per_frame"]:
                    slower_threads = int(change[server_flags.THREADS])
            elif not row["why"]:
                best = self._confirmed(row, best)
        best["best"] = True
        return best

    def _confirmed(self, row: dict[str, Any], best: dict[str, Any]) -> dict[str, Any]:
        """The row, if it is also faster than its predecessor measured once more; else the faster one of that."""
        if row["frames_checked"] < len(self._asked):  # measured in another search, in which it was not the best
            row["why"] = "not confirmed: not every golden frame was asked. Delete the results and measure again"
            return best
        name = best["change"].partition(AGAIN)[0]
        key = f"{name}{AGAIN}, after {_text(row['flags'])}"
        again = self._measured(f"{name}{AGAIN}", None if name == TODAY else best["flags"], None, key)
        if again is None or again["why"]:
            row["why"] = f"not confirmed: {again['why'] if again else 'no time was left (--minutes)'}"
            return best
        again["frames_checked"] = max(again["frames_checked"], best["frames_checked"])  # with the same flags
        if _is_faster(row, again):
            return row
        row["why"] = f"within the noise ({name} took {again['seconds_per_frame']:.3g} s the second time)"
        return min(best, again, key=lambda one: float(one["seconds_per_frame"]))

    def _measured(
        self, name: str, flags: dict[str, str] | None, best: dict[str, Any] | None, key: str = ""
    ) -> dict[str, Any] | None:
        """The row of flags, measured now or earlier; None if no time is left. Without flags, the default."""
        key = key or (_text(flags) if flags else TODAY)
        row = self._record["measured"].get(key)
        if row is None:
            try:
                row = self._measure(flags, best)
            except OutOfTimeError:
                return None
            self._record["measured"][key], self._measures = row, True
            self._note_busy(self._busy)
        row = {"change": name, **row}
        self._rows.append(row)
        return row

    def _measure(self, flags: dict[str, str] | None, best: dict[str, Any] | None) -> dict[str, Any]:
        """Start a server with the flags, ask it about a few golden frames, and measure."""
        if best and time.monotonic() + self._cost(best) > self._deadline:
            raise OutOfTimeError
        row: dict[str, Any] = {
            "flags": flags or {}, "seconds_per_frame": 0.0, "spread_seconds": None, "seconds": {},
            "start_seconds": None, "peak_bytes": None, "frames_checked": 0, "why": "",
        }  # fmt: skip
        with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
            file = server_flags.NONE
            if flags:
                file = f"{temporary}/{server_flags.FILE}"
                server_flags.write(Path(file), self._flags_file(flags, 0.0, 0.0))
            own = stack.enter_context(check_flight.OwnServer(self._folder, self._program, self._variant, flags=file))
            try:
                self._fill(row, own, best)
            except check_flight.NoGoError as error:
                if time.monotonic() >= self._deadline:
                    raise OutOfTimeError from None
                time.sleep(1)  # a dying process closes its socket first
                row["why"] = str(error)
                try:
                    own.check_alive()
                except check_flight.NoGoError as ended:
                    row["why"] = str(ended)
        return row

    def _fill(self, row: dict[str, Any], own: check_flight.OwnServer, best: dict[str, Any] | None) -> None:
        """Fill in a row of a started server. Raises NoGoError for a server that is not to fly."""
        began = time.monotonic()
        with check_flight.time_limit(self._within(START_SECONDS), "waiting for the server"):
            check_flight.wait_until_ready(own.connection, own)
            marker, _ = check_flight.check_server(own.connection, self._folder, self._bundle, own, strict=True)
        row["start_seconds"] = round(time.monotonic() - began, 2)
        row["flags"] = row["flags"] or server_flags.served(own.process)
        self._record["build"] = self._record["build"] or own.connection.ask("/props").get("build_info")
        questions = check_flight.Questions(own.connection, self._folder, self._bundle, marker)
        warm_up = self._ask(questions, self._asked[0], row)
        plan = self._record["plan"] = self._record["plan"] or self._plan(warm_up)
        frames = self._asked[: plan["frames"]]
        times: dict[str, list[float]] = {golden["image"]: [] for golden in frames}
        for number in range(plan["rounds"]):
            for golden in frames:
                times[golden["image"]].append(round(self._ask(questions, golden, row), 4))
            if not number and best and _median(times) > HOPELESS * best["seconds_per_frame"]:
                break
        row["seconds"], row["seconds_per_frame"] = times, round(_median(times), 4)
        if min(map(len, times.values())) > 1:
            row["spread_seconds"] = round(statistics.median(max(one) - min(one) for one in times.values()), 4)
        row["peak_bytes"] = own.peak_bytes()
        if best and _is_faster(row, best):
            for golden in self._asked[plan["frames"] :]:
                self._ask(questions, golden, row)
        if (other := row.pop("other_words", 0)) > self._bundle["tolerances"]["other_words"]:
            row["why"] = f"{other} reasons differ in their words"

    def _ask(self, questions: check_flight.Questions, golden: dict[str, Any], row: dict[str, Any]) -> float:
        """Seconds of an answer, which is compared with the ground's; raises NoGoError if it differs too much."""
        image = golden["image"]
        if image not in self._pictures:  # made once: it takes Python as long as a small model takes to answer
            self._pictures[image] = check_flight.pictures_of(self._folder, golden, self._bundle)
        seconds = self._within(self._time_out or self._bundle["seconds_per_frame_at_most"])
        result = check_flight.check_golden(
            questions, self._folder, golden, self._bundle, seconds, seconds, lambda: self._pictures[image]
        )
        if result["why"]:
            raise check_flight.NoGoError(f"verdict moved: {result['why']}")
        first = image not in row.setdefault("images", [])
        if first:
            row["images"].append(image)
            row["frames_checked"] = len(row["images"])
            row["other_words"] = row.get("other_words", 0) + (not result["same_answer"])
        return float(result["seconds"])

    def _plan(self, seconds: float) -> dict[str, int]:
        """How many frames a measurement has, and how often each: fewer on a slow machine."""
        count = 3 if self._budget / max(seconds, 0.001) >= PLENTY else 2
        return {"frames": min(count, len(self._asked)), "rounds": count}

    def _cost(self, best: dict[str, Any]) -> float:
        """Seconds of another measurement and of the one that confirms the best flags."""
        plan = self._record["plan"]
        asked = 1 + plan["frames"] * plan["rounds"]
        one = (best["start_seconds"] or 0) + asked * best["seconds_per_frame"]
        return 2 * float(one)

    def _within(self, seconds: float) -> float:
        """The seconds, or those that are left."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise OutOfTimeError
        return min(seconds, left)

    def _flags_file(self, flags: dict[str, str], seconds: float, before: float) -> dict[str, Any]:
        return server_flags.sealed(
            {
                "schema_version": server_flags.SCHEMA_VERSION,
                "flags": server_flags.words_of(flags),
                "seconds_per_frame": seconds,
                "seconds_per_frame_before": before,
                **server_flags.place(self._folder, self._program, self._variant),
            }
        )

    def write_flags(self, report: dict[str, Any]) -> None:
        """Write the report's flags for serve.sh; without any, remove the file of an earlier tuning.

        Of figures that are not to be used, nothing follows.
        """
        path = self._folder / server_flags.FILE
        if not report["usable"]:
            return
        if report["flags"]:
            seconds = report["seconds_per_frame"], report["seconds_per_frame_before"]
            server_flags.write(path, self._flags_file(server_flags.flags_of(report["flags"]), *seconds))
        elif path.exists():
            path.unlink()
            report["notes"].append(f"{path.name} of an earlier tuning was removed")


def _text(flags: dict[str, str]) -> str:
    return " ".join(server_flags.words_of(flags))


def _median(times: dict[str, list[float]]) -> float:
    return statistics.median(seconds for one in times.values() for seconds in one)


def _is_faster(row: dict[str, Any], best: dict[str, Any]) -> bool:
    """Whether the gain is larger than the noise.

    That is the larger spread of the two between the rounds of a frame. On a busy machine a single slow answer makes it
    huge, so it is also enough if the slowest answer of every frame is faster than its fastest one before.
    """
    gain = best["seconds_per_frame"] - row["seconds_per_frame"]
    apart = all(max(row["seconds"][image]) < min(times) for image, times in best["seconds"].items())
    noise = max(row["spread_seconds"] or 0.0, best["spread_seconds"] or 0.0)
    return bool(gain > LEAST_GAIN * best["seconds_per_frame"] and (gain > noise or apart))


# --- report ---------------------------------------------------------------------------------------------------

COLUMNS = ("setting", "s/frame", "spread", "gain", "MB", "verdicts", "result")
VERDICTS = COLUMNS.index("verdicts")  # the columns between the first and this one are numbers


def table(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """The rows of the printed table, under COLUMNS."""
    return [
        (
            row["change"],
            f"{row['seconds_per_frame']:.3f}" if row["seconds_per_frame"] else "-",
            "-" if row["spread_seconds"] is None else f"{row['spread_seconds']:.3f}",
            f"{100 * row['gain']:+.1f} %" if row["seconds_per_frame"] else "-",
            f"{row['peak_bytes'] / 1e6:.0f}" if row["peak_bytes"] else "-",
            _verdicts(row),
            _result(row, report["usable"]),
        )
        for row in report["rows"]
    ]


def _verdicts(row: dict[str, Any]) -> str:
    """What became of the golden verdicts, in the table."""
    if row["why"].startswith("verdict moved"):
        return "MOVED"
    checked = row["frames_checked"]
    return f"{checked} of {checked} unchanged" if checked else "-"


def _result(row: dict[str, Any], usable: bool) -> str:
    """What the search made of the row, in the table."""
    if row["why"]:
        return str(row["why"])
    if row.get("best"):
        return "best" if usable else "fastest under load"
    return "" if row["change"] == TODAY or row["change"].endswith(AGAIN) else "kept"


def lines_of(report: dict[str, Any]) -> Iterator[str]:
    """The printed report, without the table."""
    for one in report["not_measured"]:
        yield f"not measured: {one['change']}: {one['why']}"
    yield from report["notes"]
    here, plan = report["identity"]["machine"], report["plan"]
    yield (
        f"medians of {plan['frames']} golden frames, each {plan['rounds']} times after a warm-up, on "
        f"{here['processor']} ({here['cores']} cores), llama-server {report['build']}"
    )
    yield f"{TODAY}: {' '.join(report['default_flags'])}"
    if report["flags"] and report["usable"]:
        before, now = report["seconds_per_frame_before"], report["seconds_per_frame"]
        yield f"{now:.3f} s per frame instead of {before:.3f}: {' '.join(report['flags'])}"
    if report["why"]:
        yield report["why"]


def _printed(report: dict[str, Any]) -> Iterator[str]:
    rows = [COLUMNS, *table(report)]
    widths = [max(len(row[number]) for row in rows) for number in range(len(COLUMNS))]
    for row in rows:
        numbers = (f"{cell:>{width}}" for cell, width in zip(row[1:VERDICTS], widths[1:VERDICTS]))  # noqa: B905 - Python 3.9
        yield "  ".join([f"{row[0]:{widths[0]}}", *numbers, f"{row[VERDICTS]:{widths[VERDICTS]}}", row[-1]])
    yield from lines_of(report)


# --- command line ---------------------------------------------------------------------------------------------


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measure llama-server's flags on this machine, and write the fastest that move no golden verdict.",
        epilog="Example: python3 tune.py --llama-server /path/to/llama-server --minutes 30",
    )
    parser.add_argument("--bundle", type=Path, default=Path(__file__).parent, help="the bundle (default: beside this)")
    parser.add_argument(
        "--llama-server",
        default=os.environ.get("LLAMA_SERVER") or "llama-server",
        metavar="PATH",
        help="the program that serve.sh starts (default: LLAMA_SERVER, or llama-server on PATH)",
    )
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help="most minutes; run again to resume (default: %(default)g)"
    )
    parser.add_argument(
        "--busy-anyway", action="store_true", help="write flags although other programs used the cores meanwhile"
    )
    check_flight.add_time_out(parser)
    check_flight.add_variant(parser)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    options = parser.parse_args(arguments)
    if not 0 < options.minutes <= 1440:
        parser.error(f"--minutes {options.minutes:g} is outside 0..1440")
    program = shutil.which(options.llama_server)
    if program is None:
        parser.error(f"--llama-server {options.llama_server} is not a program")
    options.llama_server = Path(program).resolve()
    return options


def _stopped(number: int, frame: Any) -> None:
    raise TuneError(f"stopped by signal {number}; run the same command again to resume")


def _say(text: str, done: int = 0, total: int = 0) -> None:
    sys.stderr.write(f"{f'{done}/{total} ' if total else ''}{text}\n")
    sys.stderr.flush()


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _stopped)  # so that a started server is stopped too
    folder = options.bundle.resolve()
    try:
        tuning = Tuning(
            folder, options.llama_server, folder / RESULTS, variant=options.variant, minutes=options.minutes,
            time_out=options.time_out, busy_anyway=options.busy_anyway, progress=_say,
        )  # fmt: skip
        for note in tuning.notes:
            _say(note)
        report = tuning.run()
        tuning.write_flags(report)
    except (TuneError, check_flight.NoGoError, OSError) as error:
        _say(f"error: {error}")
        return 1
    text = json.dumps(report, indent=2) if options.json else "\n".join(_printed(report))
    sys.stdout.write(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
