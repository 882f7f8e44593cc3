"""All that may go wrong, done on purpose: kills, failing disks, hostile input, lying servers, ten thousand frames.

    make torture                                    # within an hour on 2 cores
    python benchmarks/torture.py --only kills disk  # some of it
    python benchmarks/torture.py --short            # a seeded subset of everything: minutes, and no page is written

Each part is a program or a set of tests of its own and leaves its figures in benchmarks/results/. With all parts there,
the table in docs/reliability.md is written anew. Exit status 1 if anything was lost, left behind or not noticed.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orion_triage.safe.files import write_text

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "reliability.md"
BEGIN, END = "<!-- figures of 'make torture' -->\n", "<!-- end of figures -->\n"
Figures = dict[str, Any]


@dataclass(frozen=True)
class Script:
    """A program in this folder that takes --seed and --results, and ends with 1 when something was lost."""

    name: str
    short: Sequence[str]

    def run(self, results: Path, seed: int, short: bool) -> bool:
        words = [sys.executable, str(HERE / self.name), "--seed", str(seed), "--results", str(results)]
        return subprocess.run([*words, *(self.short if short else ())], check=False).returncode == 0


@dataclass(frozen=True)
class Tests:
    """Tests whose figures are pytest's own: how many there were, and what hypothesis generated for them."""

    names: Sequence[str]

    def run(self, results: Path, seed: int, short: bool) -> bool:
        report = results.with_suffix(".xml")
        words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *self.names, f"--junitxml={report}"]
        words += [f"--hypothesis-seed={seed}"]
        profile = {"HYPOTHESIS_PROFILE": "suite" if short else "torture"}
        done = subprocess.run(
            [*words, "--hypothesis-show-statistics"],
            cwd=HERE.parent, env={**os.environ, **profile}, stdout=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
        last = done.stdout.strip().splitlines()[-20 if done.returncode else -1 :]
        print(*(line[:200] for line in last), sep="\n", flush=True)  # a failing example may be as long as it likes
        cases = list(ElementTree.parse(report).iter("testcase"))
        report.unlink()
        generated = generated_cases(done.stdout)
        failed = [
            case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None
        ]
        value = {
            "tests": len(cases),
            "generated_cases": sum(generated),
            "cases": len(cases) - len(generated) + sum(generated),
            "losses": failed,
            "seconds": round(sum(float(case.get("time", 0)) for case in cases)),
        }
        write_text(results, json.dumps(value, indent=1) + "\n")
        return done.returncode == 0


def generated_cases(said: str) -> list[int]:
    """How many cases hypothesis drew for each property, out of pytest's output with --hypothesis-show-statistics."""
    return [int(count) for count in re.findall(r"^ +- (\d{1,9}) passing, ", said, re.MULTILINE)]


PARTS: dict[str, Script | Tests] = {
    "kills": Script("kills.py", ("--kills", "6")),
    "disk_faults": Script("disk_faults.py", ("--faults-per-stage", "1", "--only", "dataset", "quantize")),
    "hostile": Tests(
        ("tests/test_hostile_text.py", "tests/imagery/test_hostile_pictures.py", "tests/test_hostile_weights.py")
    ),
    "fuzz": Script("fuzz.py", ("--seconds", "3")),
    "servers": Tests(
        ("tests/test_reliability.py", *(f"tests/remote/test_{n}.py" for n in ("upload", "download", "scripts")))
    ),
    "long_haul": Script("long_haul.py", ("--frames", "200")),
}


def table(results: Path) -> str:
    """The Markdown table of the tests, their amounts and their results."""
    figures = {name: json.loads((results / f"{name}.json").read_text(encoding="utf-8")) for name in PARTS}
    kills, disk, long_haul = figures["kills"], figures["disk_faults"], figures["long_haul"]
    hostile, fuzz, servers = figures["hostile"], figures["fuzz"], figures["servers"]
    signals = ", ".join(f"{count} {name}" for name, count in kills["by_signal"].items())
    memory = {name: long_haul["peak_bytes"][name] / 1e6 for name in ("command", "server")}
    growth = {name: max(0, long_haul["growth_bytes_per_thousand_frames"][name]) / 1e6 for name in memory}
    rows = [
        ("kills at random moments", f"{kills['kills']} in {len(kills['by_stage'])} steps ({signals})",
         f"{kills['rounds_that_ended_as_undisturbed']} runs gave the same results as the undisturbed one", kills),
        ("failing disks", f"{disk['faults']} of {disk['operations']:,} operations in {len(disk['by_stage'])} steps",
         f"{disk['refused']} reported in one line, {disk['harmless']} harmless; "
         f"{disk['recoveries']} reruns completed", disk),
        ("hostile input, generated", f"{hostile['cases']:,} cases in {hostile['tests']} tests", "refused or harmless",
         hostile),
        ("hostile input, found by coverage",
         f"{sum(target['executions'] for target in fuzz['targets']):,} inputs to {len(fuzz['targets'])} "
         "parsers", "refused or harmless", fuzz),
        ("faulty servers, kills, changed bits, full memory, interrupted jobs on a server", f"{servers['cases']} tests",
         "reported; finished work kept; no wrong answer counted", servers),
        (f"{long_haul['frames']:,} frames through `orion triage`",
         f"killed after {long_haul['killed_after_frames']:,}, then resumed to the end",
         f"{long_haul['seconds_per_frame'] * 1000:.0f} ms per frame; peak memory {memory['command']:.0f} MB (command) "
         f"and {memory['server']:.0f} MB (server), growth per thousand frames {growth['command']:.1f} and "
         f"{growth['server']:.1f} MB; on disk {long_haul['results_bytes_per_frame']} bytes per frame of results and "
         f"{long_haul['other_bytes_on_disk'] / 1000:.0f} kB of other files", long_haul),
    ]  # fmt: skip
    lines = ["| test | amount | result | losses | minutes |", "|---|---|---|---:|---:|"]
    for what, count, outcome, of_part in rows:
        lines.append(f"| {what} | {count} | {outcome} | {len(of_part['losses'])} | {of_part['seconds'] / 60:.0f} |")
    return "\n".join(lines) + "\n"


def write_page(lines: str) -> None:
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    write_text(PAGE, before + BEGIN + "\n" + lines + "\n" + END + rest.split(END)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--short", action="store_true", help="a subset, whose figures are not kept")
    arguments = parser.parse_args()
    began = time.monotonic()
    failed = []
    with tempfile.TemporaryDirectory() as temporary:
        results = Path(temporary) if arguments.short else HERE / "results"
        for name in arguments.only:
            print(f"--- {name}", flush=True)
            (results / f"{name}.json").unlink(missing_ok=True)  # a part that breaks leaves no old figures
            if not PARTS[name].run(results / f"{name}.json", arguments.seed, arguments.short):
                failed.append(name)
            print(f"{name}: {(time.monotonic() - began) / 60:.1f} minutes in all", flush=True)
        if all((results / f"{name}.json").exists() for name in PARTS):
            lines = table(results)
            print(lines)
            if not arguments.short:
                write_page(lines)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
