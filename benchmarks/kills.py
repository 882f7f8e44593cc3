"""Kill the pipeline at random moments of every stage, and see that nothing is lost.

    python benchmarks/kills.py                       # 70 kills, 20 minutes on 2 cores
    python benchmarks/kills.py --kills 3 --only fuse  # some of them

The whole pipeline runs on the shipped base and 36 drawn places. Then it runs again and again, with SIGKILL, SIGTERM or
SIGINT (in turn, the moments drawn with the seed) in each stage, after which the same command is given again. At the end
of each round every file must be the undisturbed run's, byte for byte; of predictions all but the seconds. After a kill
no process of the run may be alive, after SIGTERM and SIGINT nothing half-written be there, and after a finished round
no temporary file at all. A training must have gone on from the newest checkpoint that it had when it was killed.
Figures: benchmarks/results/kills.json.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import small_run

from orion_triage.dataset.records import IMAGES_FOLDER
from orion_triage.pipeline import stages
from orion_triage.runs.manifest import read_manifest
from orion_triage.runs.run import WORK_FOLDER, Run, open_run
from orion_triage.safe.files import write_text
from orion_triage.train.checkpoints import CHECKPOINTS, HASHES_FILE

RESULTS = Path(__file__).parent / "results" / "kills.json"
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
TRIAGE = "triage"
MARK = f"kills-{os.getpid()}"  # in the environment of every process that is to be gone
START_SECONDS = 300  # within which a step must begin
GONE_SECONDS = 5  # within which a killed run's processes must be gone
EXIT_SECONDS = 60  # within which a command must have ended that was told to


@dataclass(frozen=True)
class Step:
    """A part of the pipeline: the command that does it, the line that its predecessor ends with, its usual seconds."""

    name: str
    words: list[str]
    begins_after: str
    seconds: float


@dataclass(frozen=True)
class Kill:
    """One signal: `moment_seconds` after the stage began; `signal` is empty when the command was done before that."""

    stage: str
    signal: str
    moment_seconds: float


def alive() -> list[int]:
    """Processes that were started by a command of this harness, by the command itself or by one of its children."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            marked = entry.name.isdigit() and MARK.encode() in (entry / "environ").read_bytes()
            dead = marked and (entry / "stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
        except OSError:  # gone meanwhile, or somebody else's
            continue
        if marked and not dead:
            found.append(int(entry.name))
    return found


def wait_until(what: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not what():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def newest_checkpoint(run: Run) -> int:
    """The step of the newest whole checkpoint; 0 without one."""
    whole = (run.folder / WORK_FOLDER / CHECKPOINTS).glob(f"checkpoint-*/{HASHES_FILE}")
    return max((int(path.parent.name.rsplit("-", 1)[1]) for path in whole), default=0)


class Torture:
    """One folder to work in, one undisturbed run to compare with, and what was found."""

    def __init__(
        self,
        folder: Path,
        undisturbed: Run,
        seed: int,
        environment: dict[str, str],
        orion: Sequence[str],
        frames: int | None,
    ) -> None:
        self.folder, self.environment, self.undisturbed, self.orion = folder, environment, undisturbed, orion
        self.frames = frames
        self.choice, self.signals = random.Random(seed), cycle(SIGNALS)
        self.settings = undisturbed.settings
        self.kills: list[Kill] = []
        self.losses: list[str] = []
        self.rounds = 0

    def make_undisturbed(self) -> None:
        self._complete(small_run.command("run", self.undisturbed, orion=self.orion))

    def begin(self) -> None:
        """The undisturbed run's verdicts, and how long they take."""
        verdicts, began = self.folder / "verdicts.jsonl", time.monotonic()
        self._complete(self._triage_words(self.undisturbed, verdicts))
        self.triage_seconds = time.monotonic() - began

    def steps(self, run: Run) -> list[Step]:
        words = small_run.command("run", run, orion=self.orion)
        steps, before = [], ""
        for stage in stages(self.settings):
            stage_manifest = read_manifest(stage.folder(self.undisturbed))
            assert stage_manifest is not None
            steps.append(Step(stage.name, words, before, stage_manifest.seconds))
            before = f"\n{stage.name}: "
        return [*steps, Step(TRIAGE, self._triage_words(run, run.folder / "verdicts.jsonl"), "", self.triage_seconds)]

    def round(self, most: int, only: list[str]) -> None:
        """Kill each step once, let each finish, and compare; `most` kills."""
        before, run = len(self.losses), Run(self.folder / "disturbed", self.settings)
        shutil.rmtree(run.folder, ignore_errors=True)
        self._begin_at(run, only)
        had: int | None = None
        for step in self.steps(run):
            if step.name == TRIAGE:
                self._complete(small_run.command("run", run, orion=self.orion))
                if had is not None:
                    self._compare_training(run, had)
            if most and step.name in (only or [step.name]):
                self._kill(step, run)
                most -= 1
                if step.name == "fine-tune" and read_manifest(run.adapter) is None:
                    had = newest_checkpoint(run)
        verdicts = run.folder / "verdicts.jsonl"
        self._complete(self._triage_words(run, verdicts))
        self.losses += small_run.differences(self.undisturbed, run)
        if not small_run.same_but_for_time(self.folder / "verdicts.jsonl", verdicts):
            self.losses.append(f"{TRIAGE}: {verdicts} differs")
        self.losses += [f"{path} was left behind" for path in small_run.left_in(self.folder / "tmp")]
        self.rounds += 1
        print(f"round {self.rounds}: {len(self.losses)} losses", *self.losses[before:], sep="\n  ", flush=True)

    def _begin_at(self, run: Run, only: list[str]) -> None:
        """What comes before the first step that is killed, as the undisturbed run made it."""
        for stage in stages(self.settings):
            if not only or stage.name in only:
                return
            shutil.copytree(stage.folder(self.undisturbed), stage.folder(run))

    def _kill(self, step: Step, run: Run) -> None:
        """Run until the step has begun, wait a random part of its time, and send a signal."""
        log = self.folder / "killed.log"
        with log.open("wb") as file:
            process = subprocess.Popen(step.words, stdout=file, stderr=file, env=self.environment)

        def begun() -> bool:
            return process.poll() is not None or step.begins_after in "\n" + log.read_text(errors="replace")

        if not wait_until(begun, START_SECONDS):
            raise SystemExit(f"{step.name} did not begin within {START_SECONDS} s; see {log}.")
        moment = self.choice.uniform(0, step.seconds)
        wait_until(lambda: process.poll() is not None, moment)
        kind = next(self.signals)
        if process.poll() is None:
            process.send_signal(kind)
        else:
            kind = None
        try:
            process.wait(EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self.losses.append(f"{step.name}: still runs {EXIT_SECONDS} s after {kind}")
            process.kill()
        self.kills.append(Kill(step.name, kind.name if kind else "", round(moment, 2)))
        print(f"{len(self.kills)} {step.name}: {kind.name if kind else 'done before'} at {moment:.1f} s", flush=True)
        if not wait_until(lambda: not alive(), GONE_SECONDS):
            self.losses.append(f"{step.name}: processes {alive()} outlived {kind}")
        if kind in (signal.SIGTERM, signal.SIGINT):
            self.losses += [f"{step.name}: {path} is there after {kind}" for path in small_run.half_written(run.folder)]
        said = log.read_text(errors="replace")
        if "Traceback" in said:
            self.losses.append(f"{step.name}: a traceback after {kind}: {said[-300:]!r}")

    def _compare_training(self, run: Run, had: int) -> None:
        stage = next(stage for stage in stages(self.settings) if stage.name == "fine-tune")
        stage_manifest = read_manifest(stage.folder(run))
        went_on_from = stage_manifest.figures["resumed_from_step"] or 0 if stage_manifest else 0
        if went_on_from != had:
            self.losses.append(f"fine-tune had a checkpoint of step {had} and went on from {went_on_from}")

    def _complete(self, words: list[str]) -> None:
        done = subprocess.run(words, capture_output=True, text=True, env=self.environment, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(words[2:6])} failed: {done.stderr[-1000:]}")

    def _triage_words(self, run: Run, out: Path) -> list[str]:
        """Of the undisturbed run's frames in both, so that the lines are the same."""
        frames = sorted((self.undisturbed.dataset / IMAGES_FOLDER).iterdir())[: self.frames]
        return [*self.orion, TRIAGE, *map(str, frames), "--run", str(run.folder), "--out", str(out)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=70)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--only", nargs="+", default=[], metavar="STAGE", help="fuse, 'evaluate base', triage, ...")
    parser.add_argument("--frames", type=int, help="how many frames triage answers (default: all of the run's)")
    parser.add_argument("--run", type=Path, help="an undisturbed run of this size to compare with (default: made here)")
    parser.add_argument("--folder", type=Path, default=Path("runs/kills"), help="what is worked in; emptied first")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--orion", metavar="PROGRAM", help="the command that is killed (default: this Python's)")
    arguments = parser.parse_args()
    folder: Path = arguments.folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "tmp").mkdir(parents=True)
    began = time.monotonic()
    if arguments.run:
        undisturbed = open_run(arguments.run)
    else:
        undisturbed = Run(folder / "undisturbed", small_run.prepare_places(folder))
    environment = {**os.environ, "TMPDIR": str(folder / "tmp"), "ORION_KILLS": MARK}
    orion = [arguments.orion] if arguments.orion else small_run.ORION
    torture = Torture(folder, undisturbed, arguments.seed, environment, orion, arguments.frames)
    if not arguments.run:
        torture.make_undisturbed()
    torture.begin()
    print(f"undisturbed: {time.monotonic() - began:.0f} s", flush=True)
    while len(torture.kills) < arguments.kills:
        torture.round(arguments.kills - len(torture.kills), arguments.only)
    sent = [kill for kill in torture.kills if kill.signal]
    value: dict[str, Any] = {
        "seed": arguments.seed,
        "kills": len(sent),
        "by_signal": {kind.name: sum(kill.signal == kind.name for kill in sent) for kind in SIGNALS},
        "by_stage": {name: sum(kill.stage == name for kill in sent) for name in dict.fromkeys(k.stage for k in sent)},
        "done_before_the_signal": len(torture.kills) - len(sent),
        "rounds_that_ended_as_undisturbed": torture.rounds,
        "losses": torture.losses,
        "seconds": round(time.monotonic() - began),
        "each": [asdict(kill) for kill in torture.kills],
    }
    write_text(arguments.results, json.dumps(value, indent=1) + "\n")
    print(f"{len(sent)} kills, {torture.rounds} rounds, {len(torture.losses)} losses -> {arguments.results}")
    sys.exit(bool(torture.losses))


if __name__ == "__main__":
    main()
