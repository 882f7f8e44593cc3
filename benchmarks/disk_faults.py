"""Fail the disk at writes of every stage, and see that it is said, that nothing is lost, and that a rerun completes.

    python benchmarks/disk_faults.py                       # 64 faults, about 12 minutes on 2 cores
    python benchmarks/disk_faults.py --only fine-tune fuse --faults-per-stage 40 --seed 7
    python benchmarks/disk_faults.py --run runs/small      # a finished run to start from

The whole pipeline runs on the shipped base and 36 drawn places, undisturbed. Then each of its stages, 'orion bundle',
'orion triage --out' and 'orion report' is done again, alone, with benchmarks/failing_disk.c between it and the disk of
the run's folder and of its temporary files. The first time every call that changes the disk is noted: open, write,
sync, rename, mkdir, resize, copy, link, of all processes. From then on one of them fails: in turn with ENOSPC, and then
so does every later one (a full disk), and with EIO, once. Which ones is drawn with the seed: two thirds of the faults
meet the first operation of a kind (operation and kind of file), the others any one of a kind.

A command that met a fault must end with exit status 1, an error that names the disk's trouble and what to do, and no
traceback; or with 0, and then everything must be as undisturbed (a line in a log is not worth a stage). Whatever else
was in the run must be whole, and the stage's manifest must not be there unless its files are. The first of a kind meets
what the last fault left. At the end the same command, undisturbed, must complete and leave no temporary file; its files
must be the undisturbed run's, byte for byte; of predictions all but the seconds; of a training the losses within 1e-4.
Figures: benchmarks/results/disk_faults.json. Exit status 1 if anything was lost.
"""

import argparse
import errno
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import small_run

from orion_triage.dataset.records import image_path, read_split
from orion_triage.errors import OrionError
from orion_triage.flight import bundle
from orion_triage.mission.mission import default_mission
from orion_triage.pipeline import Stage, stages, verify
from orion_triage.runs import manifest
from orion_triage.runs.run import SETTINGS_FILE, WORK_FOLDER, Run, open_run
from orion_triage.safe.children import tied
from orion_triage.safe.files import sha256_of_file, write_text

MISSION = default_mission()

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "disk_faults.json"
FRAMES = 6  # that are triaged
LIMIT_SECONDS = 900  # of one command
GONE_SECONDS = 10  # within which a command's children must be gone
# Stages with a command of their own; 'orion run' does the others, with all else finished.
COMMANDS = {
    "dataset": "dataset",
    "evaluate base": "ablation",
    "fine-tune": "fine-tune",
    "fuse": "fuse",
    "quantize": "quantize",
    "evaluate fine-tuned": "evaluate",
    "evaluate quantized": "evaluate --gguf",
}
VERDICTS = "verdicts.jsonl"
REPORTS = ("results.json", "report.md", "report.html", "report.png")
SPOKEN = re.compile("No space left on device|Input/output error|a write failed: the disk is full or faulty")


# --- the disk -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """The `at`-th operation of the kind `like` (of all, if empty) fails with `number`; `stays`: so do all after it."""

    like: str
    at: int
    number: int
    stays: bool

    def __str__(self) -> str:
        return f"{errno.errorcode[self.number]}{' for good' if self.stays else ''} at {self.like} ({self.at})"


class Disk:
    """A folder whose disk fails for the programs that are started here; `work` is a folder outside of it."""

    def __init__(self, folder: Path, work: Path) -> None:
        self.folder = folder.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        work.mkdir(parents=True, exist_ok=True)
        self.library, self.counter, self.log = (work / name for name in ("failing_disk.so", "counter", "operations"))
        source = HERE / "failing_disk.c"
        words = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-O2", "-o", self.library, source, "-ldl"]
        subprocess.run(words, check=True)

    def run(
        self, command: Sequence[object], fault: Fault | None = None, **environment: str
    ) -> tuple["subprocess.CompletedProcess[str]", list[str]]:
        """Run a command to its end: (what came of it, the operations that failed, or all when there is no fault)."""
        self.counter.write_bytes(bytes(16))
        self.log.write_bytes(b"")
        settings = {
            "LD_PRELOAD": str(self.library),
            "ORION_FAILING_DISK_FOLDER": str(self.folder),
            "ORION_FAILING_DISK_COUNTER": str(self.counter),
            "ORION_FAILING_DISK_LOG": str(self.log),
        }
        if fault:
            settings |= {
                "ORION_FAILING_DISK_AT": str(fault.at),
                "ORION_FAILING_DISK_LIKE": fault.like,
                "ORION_FAILING_DISK_ERRNO": str(fault.number),
                "ORION_FAILING_DISK_STAYS": str(int(fault.stays)),
            }
        done = start(command, **settings, **environment)
        return done, self.log.read_text(encoding="utf-8", errors="replace").splitlines()


def start(command: Sequence[object], **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run a command to its end, or to ours."""
    words, variables = tied([str(word) for word in command]), {**os.environ, "COLUMNS": "200", **environment}
    try:
        return subprocess.run(
            words, env=variables, capture_output=True, text=True, errors="replace", timeout=LIMIT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(words, 124, "", f"it did not end within {LIMIT_SECONDS} s")


def kind_of(operation: str) -> str:
    """The pattern (fnmatch) of all operations like this one: numbers, drawn suffixes and pictures' names left open."""
    kind = re.sub(r"[\[\]?*\\]", "?", operation)
    kind = re.sub(r"(?<=[.-])[a-z0-9_]{8}(?=(\.partial)?(/|$))|(?<= tmp/)(tmp)?[a-z0-9_]{8}(?=/|$)", "*", kind)
    kind = re.sub(r"(?<=/\.tmp)\w{6}(?=/|$)", "*", kind)  # safetensors'
    kind = re.sub(r"[^/ ]*\.png", "*.png", kind)
    return re.sub(r"\d+", "*", kind)


def family_of(kind: str) -> str:
    """The kind, whichever model an evaluation is of: one code writes them all."""
    return re.sub(r"(?<=/evaluation/test/)\.?[\w*-]+", "MODEL", kind)


def draw_faults(operations: Sequence[str], count: int, seen: set[str], choice: random.Random) -> list[Fault]:
    """`count` faults for a command that does these operations, in their order; kinds not in `seen` come first."""
    places: dict[str, list[int]] = {}
    for index, operation in enumerate(operations):
        places.setdefault(kind_of(operation), []).append(index)
    kinds = choice.sample(list(places), len(places))
    first = sorted(kinds, key=lambda kind: family_of(kind) in seen)[: count - count // 3]
    seen.update(map(family_of, first))
    drawn = {(places[kind][0], kind, 1) for kind in first}
    again = [kind for kind in kinds if len(places[kind]) > 1]
    while again and len(drawn) < min(count, len(operations)):
        kind = choice.choice(again)
        number = choice.randrange(len(places[kind]))
        drawn.add((places[kind][number], kind, number + 1))
        again = [kind for kind in again if any((at, kind, n) not in drawn for n, at in enumerate(places[kind], 1))]
    turn = choice.randrange(2)
    return [Fault(kind, at, *_MANNERS[(turn + number) % 2]) for number, (_, kind, at) in enumerate(sorted(drawn))]


_MANNERS = ((errno.ENOSPC, True), (errno.EIO, False))


# --- what is done on it ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One command: `product` is what it makes, `keeps` whether an earlier one is there when it starts.

    `differences` compares two products: (undisturbed, disturbed).
    """

    name: str
    words: Callable[[Run], Sequence[object]]
    product: Callable[[Run], list[Path]]
    differences: Callable[[Run, Run], list[str]]
    stage: Stage | None = None
    keeps: bool = False


def steps(settings: Any) -> list[Step]:
    return [
        *(_of_stage(stage) for stage in stages(settings)),
        Step(
            "bundle",
            # The default time-out depends on how busy the machine is, and two bundles are compared.
            lambda run: [
                *small_run.ORION,
                "bundle",
                run.folder,
                "--accept-risk",
                "a run of 6 test frames",
                "--time-out",
                "60",
            ],
            _in_run("bundle"),
            _bundle_differences,
            keeps=True,
        ),
        Step("triage", _triage, _in_run(VERDICTS), _file_differences(VERDICTS)),
        Step(
            "report",
            lambda run: [*small_run.ORION, "report", "--run", run.folder],
            _in_run(*REPORTS),
            _file_differences(*REPORTS),
            keeps=True,
        ),
    ]


def _triage(run: Run) -> list[object]:
    return [*small_run.ORION, "triage", frames_of(run), "--run", run.folder, "--out", run.folder / VERDICTS]


def frames_of(run: Run) -> Path:
    return run.folder.parent / "frames"


def _in_run(*names: str) -> Callable[[Run], list[Path]]:
    return lambda run: [run.folder / name for name in names]


def _of_stage(stage: Stage) -> Step:
    def product(run: Run) -> list[Path]:
        return [stage.folder(run), *([run.folder / WORK_FOLDER] if stage.name == "fine-tune" else [])]

    return Step(
        stage.name,
        lambda run: small_run.command(COMMANDS.get(stage.name, "run"), run),
        product,
        lambda before, after: stage_differences(stage, before, after),
        stage,
    )


def stage_differences(stage: Stage, before: Run, after: Run) -> list[str]:
    """What is not as undisturbed in the product of a stage that has finished."""
    expected, found = (manifest.read_manifest(stage.folder(run)) for run in (before, after))
    assert expected is not None
    if found is None:
        return [f"{stage.name} has no manifest"]
    names = sorted(expected.outputs.keys() | found.outputs.keys())
    return [
        f"{stage.name}: {name} differs"
        for name in names
        if expected.outputs.get(name) != found.outputs.get(name)
        and not small_run.same_but_for_time(*(stage.folder(run) / name for run in (before, after)))
    ] + manifest.damaged(stage.folder(after))


def _file_differences(*names: str) -> Callable[[Run, Run], list[str]]:
    def differences(before: Run, after: Run) -> list[str]:
        return [
            f"{name} differs"
            for name in names
            if not (after.folder / name).is_file()
            or (before.folder / name).read_bytes() != (after.folder / name).read_bytes()
        ]

    return differences


def _bundle_differences(before: Run, after: Run) -> list[str]:
    """A bundle is whole when its list has its hash and every file its own; the list says when it was made."""
    folder = after.folder / "bundle"
    if not folder.is_dir():
        return ["there is no bundle"]
    lists = [json.loads((run.folder / "bundle" / bundle.LIST).read_text()) for run in (before, after)]
    wrong = [f"bundle.json: {key} differs" for key in lists[0] if key != "times" and lists[0][key] != lists[1].get(key)]
    found = manifest.hash_outputs(folder, without=bundle.LIST)
    if found.pop(bundle.LIST_HASH, None) is None or found != lists[1]["files"]:
        wrong.append("the bundle's files are not those of its list")
    elif (folder / bundle.LIST_HASH).read_text().split()[0] != sha256_of_file(folder / bundle.LIST):
        wrong.append("the bundle's list has not its hash")
    return wrong


# --- looking at what is left ----------------------------------------------------------------------------------------


def left_behind(disk: Path) -> list[str]:
    """Temporary files and folders."""
    found = [*small_run.leftovers(disk), *small_run.left_in(disk / "tmp")]
    return [f"{path.relative_to(disk)} was left behind" for path in found]


def alive_in(folder: Path) -> list[str]:
    """The command lines of processes that name the folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            words = (entry / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
            state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:  # gone meanwhile
            continue
        if f"{folder}/" in words and state != "Z":
            found.append(words)
    return found


def still_alive(folder: Path) -> list[str]:
    deadline = time.monotonic() + GONE_SECONDS
    while (found := alive_in(folder)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return [f"still alive: {words[:200]}" for words in found]


def untold(done: "subprocess.CompletedProcess[str]") -> list[str]:
    """What is missing in the words of a command that failed, or should not be there."""
    wrong = [f"exit status {done.returncode}"] if done.returncode != 1 else []
    error = re.search(r"^error: .*", done.stderr, re.MULTILINE)
    if not error:
        wrong.append("no 'error:'")
    elif not SPOKEN.search(error[0]):
        wrong.append("the error does not name the disk's trouble")
    if not re.search(r"^ *fix: .*", done.stderr, re.MULTILINE):
        wrong.append("no 'fix:'")
    return [f"{line}: {done.stderr.strip()[-1500:]}" for line in wrong]


@dataclass
class Account:
    """What came of the faults of one step."""

    operations: int
    kinds: set[str]
    tried: set[str]
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[dict[str, str]] = field(default_factory=list)
    recoveries: int = 0
    losses: list[str] = field(default_factory=list)


class Trial:
    """One step on the failing disk, again and again."""

    def __init__(self, step: Step, undisturbed: Run, disk: Disk) -> None:
        self.step, self.undisturbed, self.disk = step, undisturbed, disk
        self.run = Run(disk.folder / "run", undisturbed.settings)
        self.temporary = disk.folder / "tmp"
        self.command = step.words(self.run)

    def reset(self) -> None:
        """The finished run on the disk, without the step's product."""
        shutil.rmtree(self.disk.folder)
        skipped = shutil.ignore_patterns("logs", WORK_FOLDER)
        shutil.copytree(self.undisturbed.folder, self.run.folder, ignore=skipped)
        shutil.copytree(frames_of(self.undisturbed), frames_of(self.run))
        self.temporary.mkdir()
        for path in [] if self.step.keeps else self.step.product(self.run):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def count(self) -> list[str]:
        """The operations of the step, undisturbed; its product becomes the measure where the run has none."""
        self.reset()
        done, operations = self.disk.run(self.command, TMPDIR=str(self.temporary))
        if done.returncode:
            raise OrionError(f"{self.step.name} failed undisturbed: {done.stderr[-1500:]}")
        for ours, measure in zip(self.step.product(self.run), self.step.product(self.undisturbed), strict=True):
            if self.step.stage is None:
                shutil.rmtree(measure, ignore_errors=True)
                (shutil.copytree if ours.is_dir() else shutil.copyfile)(ours, measure)
        if wrong := [*self.finished(), *self.whole()]:
            raise OrionError(f"{self.step.name} is not the same when done again undisturbed: {wrong}.")
        self.reset()
        return operations

    def whole(self) -> list[str]:
        """What is wrong in the run now that a command has failed: nothing else may have changed."""
        step, run = self.step, self.run
        wrong = [line for lines in verify(run).values() for line in lines]
        for stage in stages(run.settings):
            had, has = (manifest.read_manifest(stage.folder(one)) for one in (self.undisturbed, run))
            if stage.name != step.name and had and has is None:
                wrong.append(f"{stage.name} has lost its manifest")
        if open_run(run.folder).settings != run.settings:
            wrong.append(f"{SETTINGS_FILE} differs")
        if step.keeps:
            wrong += step.differences(self.undisturbed, run)
        return wrong

    def finished(self) -> list[str]:
        """What is wrong in the run now that the command has ended with exit status 0."""
        return self.step.differences(self.undisturbed, self.run) + left_behind(self.disk.folder)

    def meet(self, fault: Fault, account: Account) -> str:
        """One command and one fault: refused, harmless or not reached."""
        if fault.at > 1:
            self.reset()  # what was done before the last fault would not be done again
        done, failed = self.disk.run(self.command, fault, TMPDIR=str(self.temporary))
        wrong = [f"{fault}: {line}" for line in (self.judge(done) if done.returncode or failed else self.finished())]
        outcome = "not reached" if not failed else "refused" if done.returncode else "harmless"
        error = re.search(r"^error: .*", done.stderr, re.MULTILINE)
        said = error[0].replace(str(self.disk.folder), "DISK")[:300] if error and done.returncode else ""
        account.faults.append({"fault": str(fault), "outcome": outcome, "said": said})
        account.outcomes[outcome] += 1
        account.losses += wrong
        if not done.returncode:
            account.recoveries += 1
        if not done.returncode or wrong:
            self.reset()
        return "LOST" if wrong else outcome

    def judge(self, done: "subprocess.CompletedProcess[str]") -> list[str]:
        wrong = untold(done) if done.returncode else self.finished()
        if "Traceback" in done.stderr:
            wrong.append(f"a traceback: {done.stderr.strip()[-1500:]}")
        return wrong + still_alive(self.disk.folder) + self.whole()

    def recover(self, account: Account) -> None:
        """The same command on a disk that works."""
        done = start(self.command, TMPDIR=str(self.temporary))
        wrong = [f"exit status {done.returncode}: {done.stderr[-1500:]}"] if done.returncode else self.finished()
        account.recoveries += 1
        account.losses += [f"rerun: {line}" for line in wrong + self.whole()]


def try_step(step: Step, undisturbed: Run, disk: Disk, count: int, seen: set[str], choice: random.Random) -> Account:
    trial = Trial(step, undisturbed, disk)
    operations = trial.count()
    faults = draw_faults(operations, count, seen, choice)
    kinds, tried = {kind_of(operation) for operation in operations}, {fault.like for fault in faults}
    account = Account(len(operations), set(map(family_of, kinds)), set(map(family_of, tried)))
    for fault in faults:
        began = time.monotonic()
        outcome = trial.meet(fault, account)
        print(f"{step.name}: {fault}: {outcome}, {time.monotonic() - began:.1f} s", flush=True)
        if outcome == "LOST":
            print(f"  {account.losses[-1]}", flush=True)
    if account.outcomes and account.faults[-1]["outcome"] == "refused":
        trial.recover(account)
    outcomes = ", ".join(f"{count} {outcome}" for outcome, count in account.outcomes.items())
    print(f"{step.name}: {len(operations)} operations, {outcomes}, {len(account.losses)} losses", flush=True)
    return account


# --- the undisturbed run --------------------------------------------------------------------------------------------


def make_undisturbed(folder: Path) -> Run:
    run = Run(folder / "undisturbed" / "run", small_run.prepare_places(folder))
    done = start(small_run.command("run", run))
    if done.returncode:
        raise OrionError(f"the undisturbed run failed: {done.stderr[-1500:]}")
    return run


def prepare(folder: Path, finished: Path | None) -> Run:
    """An undisturbed run in the folder, made here or copied, with frames to triage beside it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if finished is None:
        run = make_undisturbed(folder)
    else:
        run = Run(folder / "undisturbed" / "run", open_run(finished).settings)
        shutil.copytree(finished, run.folder, ignore=shutil.ignore_patterns("logs", WORK_FOLDER))
    frames_of(run).mkdir()
    for record in read_split(run.dataset, "test", MISSION)[:FRAMES]:
        path = image_path(run.dataset, record)
        shutil.copyfile(path, frames_of(run) / path.name)
    return run


def as_json(accounts: dict[str, Account], arguments: argparse.Namespace, seconds: float) -> dict[str, Any]:
    values: Iterable[Account] = accounts.values()
    outcomes: Counter[str] = sum((account.outcomes for account in values), Counter())
    return {
        "seed": arguments.seed,
        "faults": outcomes.total(),
        "refused": outcomes["refused"],
        "harmless": outcomes["harmless"],
        "not_reached": outcomes["not reached"],
        "recoveries": sum(account.recoveries for account in accounts.values()),
        "operations": sum(account.operations for account in accounts.values()),
        "kinds": len(set[str]().union(*(account.kinds for account in values))),
        "kinds_tried": len(set[str]().union(*(account.tried for account in values))),
        "seconds": round(seconds),
        "losses": [f"{name}: {line}" for name, account in accounts.items() for line in account.losses],
        "by_stage": {
            name: {
                "operations": account.operations,
                "kinds": len(account.kinds),
                "tried": account.outcomes.total(),
                **{outcome: account.outcomes[outcome] for outcome in ("refused", "harmless", "not reached")},
                "recoveries": account.recoveries,
                "faults": account.faults,
            }
            for name, account in accounts.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--faults-per-stage", type=int, default=4)
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="some of the stages, bundle, triage, report")
    parser.add_argument("--folder", type=Path, default=Path("runs/disk_faults"), help="to work in; emptied first")
    parser.add_argument("--run", type=Path, help="a finished run to start from")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    began, folder = time.monotonic(), arguments.folder.resolve()
    undisturbed = prepare(folder, arguments.run)
    print(f"undisturbed run: {time.monotonic() - began:.0f} s", flush=True)
    disk, choice, seen = Disk(folder / "disk", folder / "work"), random.Random(arguments.seed), set[str]()
    every = {step.name: step for step in steps(undisturbed.settings)}
    if unknown := set(arguments.only or ()) - every.keys():
        parser.error(f"no stage {', '.join(sorted(unknown))}; there are {', '.join(every)}")
    accounts = {
        name: try_step(step, undisturbed, disk, arguments.faults_per_stage, seen, choice)
        for name, step in every.items()
        if name in (arguments.only or every)
    }
    value = as_json(accounts, arguments, time.monotonic() - began)
    write_text(arguments.results, json.dumps(value, indent=1) + "\n")
    print(f"{value['faults']} faults, {value['recoveries']} recoveries, {len(value['losses'])} losses", flush=True)
    sys.exit(bool(value["losses"]))


if __name__ == "__main__":
    main()
