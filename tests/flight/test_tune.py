"""tune.py and server_flags.py: flags measured with a real server, and who may use them."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from orion_triage.cli import app
from orion_triage.errors import OrionError
from orion_triage.flight import bundle as bundles
from orion_triage.flight import check_flight, server_flags, tune
from orion_triage.llama_cpp.toolchain import find_toolchain
from orion_triage.runs.run import open_run
from tests import warm
from tests.flight.bundles import sign

pytestmark = pytest.mark.llama_cpp

# The server is stopped for three quarters of the time: no noise hides that gain.
SLOW = """
(while kill -STOP $$; do sleep 0.12; kill -CONT $$; sleep 0.04; done) 2>/dev/null &
"""
SLOW_TODAY = f"""
case " $* " in *" --flash-attn on "* | *" --no-repack "*) ;; *) {SLOW.strip()} ;; esac
"""


@pytest.fixture(scope="session")
def made(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tune") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(sys, "executable", warm.python())  # for llama.cpp's converter, as in warm_python
        run = open_run(finished / "runs" / "small")
        bundles.run(run, out, accepted_risk="a test", time_out=60, second_tower=True)
    return out


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "my $bundle")


@pytest.fixture(autouse=True)
def one_core(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For this process and its servers: threads that wait for each other are slow beside other tests."""
    monkeypatch.setattr(tune, "PLENTY", float("inf"))
    monkeypatch.setattr(tune, "BUSY_SECONDS", 0.1)
    monkeypatch.setattr(tune, "BUSY", float("inf"))  # other tests use the cores
    monkeypatch.setattr(tune, "CHANGES", ({"--no-repack": ""},))
    for name in ("OMP_NUM_THREADS", "ORION_THREADS"):
        monkeypatch.delenv(name, raising=False)
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


def program(folder: Path, before: str = "") -> Path:
    """The real llama-server, behind a script that notes each start, and does something before it."""
    path = folder / "llama-server"
    real = find_toolchain().llama_server
    path.write_text(f'#!/bin/sh\necho "$*" >>"{folder}/started"\n{before}\nexec "{real}" "$@"\n')
    path.chmod(0o755)
    return path


def rewrite(path: Path, change: Callable[[dict[str, Any]], object], *, seal: bool = True) -> None:
    """Change the results in their file, with the hash of the new content unless `seal` is false."""
    record = json.loads(path.read_text())
    change(record)
    server_flags.write(path, server_flags.sealed(record) if seal else record)


def started(folder: Path) -> list[str]:
    return (folder / "started").read_text().splitlines()


def write_flags(folder: Path, server: Path, words: list[str], **changes: Any) -> None:
    record = {
        "schema_version": server_flags.SCHEMA_VERSION, "flags": words, "seconds_per_frame": 1.0,
        "seconds_per_frame_before": 2.0, **server_flags.place(folder, server, ""), **changes,
    }  # fmt: skip
    server_flags.write(folder / server_flags.FILE, server_flags.sealed(record))


@pytest.mark.slow
def test_the_fastest_flags_are_written_and_served(folder: Path, tmp_path: Path) -> None:
    server = program(tmp_path, SLOW_TODAY)
    tuning = tune.Tuning(folder, server, folder / tune.RESULTS)
    report = tuning.run()
    tuning.write_flags(report)
    flags = report["flags"]
    assert flags is not None, report
    tower = flags[flags.index("--mmproj") + 1] if "--mmproj" in flags else "orion-mmproj-f16.gguf"
    line = " ".join(flags).partition(" --mmproj")[0]
    assert "--no-repack" in line or "--flash-attn on" in line
    assert report["seconds_per_frame"] < 0.5 * report["seconds_per_frame_before"]
    rows = {row["change"]: row for row in report["rows"]}
    assert next(iter(rows)) == report["rows"][0]["change"]
    assert {tune.TODAY, f"{tune.TODAY}, again"} < set(rows)
    assert all(row["peak_bytes"] > 20e6 for row in rows.values() if not row["why"])
    (best,) = [row for row in rows.values() if row.get("best")]
    asked = [golden for golden in json.loads((folder / "bundle.json").read_text())["golden"] if golden["answer"]]
    assert best["frames_checked"] == len(asked) > rows[tune.TODAY]["frames_checked"] == 2
    assert len(tune.table(report)) == len(rows)
    again = next(row for change, row in rows.items() if change == f"{tune.TODAY}, again")
    assert report["seconds_per_frame_before"] == min(again["seconds_per_frame"], rows[tune.TODAY]["seconds_per_frame"])

    with check_flight.OwnServer(folder, server) as own, check_flight.time_limit(60, "the start"):
        check_flight.wait_until_ready(own.connection, own)
        words = (own.process / "cmdline").read_bytes().decode().split("\0")
        assert line in " ".join(words)
        assert words[words.index("--mmproj") + 1] == str(folder / tower)
        assert words.count("--flash-attn") == words.count("--threads") == words.count("--mmproj") == 1
    known = len(started(tmp_path))
    told = subprocess.run(
        [sys.executable, "-I", "-S", folder / "check_flight.py", "--llama-server", server],
        capture_output=True, text=True, check=False, cwd="/",
    )  # fmt: skip
    assert (told.returncode, told.stderr) == (0, ""), told.stdout
    assert f"server flags, measured here: {line} --mmproj {tower} (" in told.stdout
    (served,) = started(tmp_path)[known:]
    assert f"{line} --parallel 1" in served
    # Measured already: the same command starts no server.
    known = len(started(tmp_path))
    again = tune.Tuning(folder, server, folder / tune.RESULTS).run()
    assert (again["flags"], len(started(tmp_path))) == (flags, known)


@pytest.mark.slow
def test_flags_that_move_a_golden_verdict_are_rejected(folder: Path, tmp_path: Path) -> None:
    """Flash attention rounds otherwise: with tolerances below that, it is another model."""
    tight = {"category_nats": 2e-4, "other_labels_nats": 2e-4, "other_words": 0}
    sign(folder, lambda record: record.update(tolerances=tight))
    server = program(tmp_path, SLOW_TODAY)
    (folder / server_flags.FILE).write_text("{}")
    tuning = tune.Tuning(folder, server, folder / tune.RESULTS)
    tuning._asked = tuning._asked[:2]
    report = tuning.run()
    rows = {row["change"]: row for row in report["rows"]}
    flash_attention = rows["--flash-attn on"]
    assert flash_attention["why"].startswith("verdict moved: golden/")
    assert flash_attention["seconds_per_frame"] == 0
    assert "--flash-attn on" not in " ".join(report["flags"] or [])
    assert next(line for line in tune.table(report) if "MOVED" in line)[0] == "--flash-attn on"


def test_nothing_is_measured_where_the_flags_of_today_move_a_verdict(folder: Path, tmp_path: Path) -> None:
    def other(record: dict[str, Any]) -> None:
        golden = record["golden"][0]
        golden["category"] = next(name for name in ("HIGH", "MEDIUM", "LOW") if name != golden["category"])

    sign(folder, other)
    told = subprocess.run(
        [sys.executable, "-I", "-S", folder / "tune.py", "--llama-server", program(tmp_path)],
        capture_output=True, text=True, check=False, cwd="/",
    )  # fmt: skip
    assert (told.returncode, told.stdout) == (1, "")
    last = told.stderr.splitlines()[-1]
    assert last.startswith("error: the default flags fail already: verdict moved: golden/1-")
    assert "Every change is rejected" in last
    assert len(started(tmp_path)) == 1
    assert not (folder / server_flags.FILE).exists()


@pytest.mark.slow
def test_after_a_kill_only_what_is_missing_is_measured(folder: Path, tmp_path: Path) -> None:
    server = program(tmp_path)
    command = [sys.executable, "-I", "-S", str(folder / "tune.py"), "--llama-server", str(server)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (folder / tune.RESULTS).exists() or len(started(tmp_path)) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    first = json.loads((folder / tune.RESULTS).read_text())["measured"]
    assert next(iter(first)) == tune.TODAY
    known = len(started(tmp_path))
    tuning = tune.Tuning(folder, server, folder / tune.RESULTS)
    assert f"{len(first)} measurements are in" in " ".join(tuning.notes)
    report = tuning.run()
    measured = json.loads((folder / tune.RESULTS).read_text())["measured"]
    assert {key: measured[key] for key in first} == first
    assert len(started(tmp_path)) - known == len(measured) - len(first)
    assert "flash-attn off" not in " ".join(started(tmp_path)[known : known + 1])
    assert {row["change"] for row in report["rows"]} >= {tune.TODAY, "--flash-attn on", "--no-repack"}
    # Another machine: nothing of it counts.
    rewrite(folder / tune.RESULTS, lambda record: record["identity"]["machine"].update(processor="another"))
    assert "is of another machine: everything is measured anew" in " ".join(
        tune.Tuning(folder, server, folder / tune.RESULTS).notes
    )


def test_without_time_the_changes_are_listed_as_not_measured(folder: Path, tmp_path: Path) -> None:
    server = program(tmp_path)
    tune.Tuning(folder, server, folder / tune.RESULTS)._measured(tune.TODAY, None, None)
    rewrite(  # a slow card: ten minutes are too short for two starts
        folder / tune.RESULTS, lambda record: record["measured"][tune.TODAY].update(start_seconds=400.0)
    )
    report = tune.Tuning(folder, server, folder / tune.RESULTS).run()
    assert [one["change"] for one in report["not_measured"]] == [
        "--flash-attn on", "--mmproj orion-mmproj-q8_0.gguf", "--no-repack",
    ]  # fmt: skip
    assert (report["flags"], len(started(tmp_path))) == (None, 1)
    (folder / tune.RESULTS).unlink()
    with pytest.raises(tune.TuneError, match="were not measured within"):
        tune.Tuning(folder, server, folder / tune.RESULTS, minutes=0.001).run()
    assert not (folder / tune.RESULTS).exists()


TODAYS = ["--threads", "1", "--flash-attn", "off"]
TUNED = ["--threads", "1", "--flash-attn", "on", "--no-repack"]


@pytest.mark.parametrize(
    ("words", "changes", "reason"),
    [
        (TUNED, {}, ""),
        (TUNED, {"machine": {"processor": "Raspberry Pi 5", "architecture": "aarch64", "cores": 4}}, "another machine"),
        (TUNED, {"server_sha256": "0" * 64}, "another llama-server"),
        (TUNED, {"bundle_sha256": "0" * 64}, "another bundle"),
        ([*TUNED, "--port", "80"], {}, "'--port' is not an allowed flag"),
        ([*TUNED, "--api-key", "x"], {}, "'--api-key' is not an allowed flag"),
        ([*TUNED, "--mmproj", "../other.gguf"], {}, "'../other.gguf' is not an allowed value of --mmproj"),
        ([*TUNED, "--mmproj", "other.gguf"], {}, "other.gguf is no mmproj of this bundle"),
        (["--threads", "1 --port 80", "--flash-attn", "on"], {}, "'1 --port 80' is not an allowed value of --threads"),
        (["--threads", "1\n", "--flash-attn", "on"], {}, "is not an allowed value of --threads"),
        (["--threads", "*", "--flash-attn", "on"], {}, "'*' is not an allowed value of --threads"),
        (["--threads", "2", "--threads", "1"], {}, "--threads stands there twice"),
        (["--threads", "2"], {}, "it has no --flash-attn"),
        (["--threads"], {}, "'' is not an allowed value of --threads"),
        ([3], {}, "3 is not an allowed flag"),
    ],
)
def test_serve_sh_uses_only_flags_of_this_place(
    folder: Path, tmp_path: Path, words: list[str], changes: dict[str, Any], reason: str
) -> None:
    """The program shows its arguments instead of serving."""
    show = tmp_path / "show"
    show.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    show.chmod(0o755)
    write_flags(folder, show, words, **changes)
    environment = {"PATH": os.environ["PATH"], "LLAMA_SERVER": str(show), "LLAMA_API_KEY": "k"}

    def served(**more: str) -> tuple[str, str]:
        command = ["sh", str(folder / "serve.sh")]
        ran = subprocess.run(command, capture_output=True, text=True, env={**environment, **more}, check=True)
        return " ".join(ran.stdout.splitlines()), ran.stderr

    line, said = served()
    used = TODAYS if reason else TUNED
    assert f"--port 8080 {' '.join(used)} --parallel 1" in line
    assert f"--mmproj {folder}/orion-mmproj-f16.gguf" in line
    assert (f"serve.sh: server_flags.json is not used: it was measured for {reason}" in said) or (reason in said)
    assert bool(said) == bool(reason)
    if not reason:
        assert " ".join(TODAYS) in served(ORION_SERVER_FLAGS="none")[0]
        other = served(ORION_THREADS="2")
        assert "--threads 2 --flash-attn on --no-repack" in other[0]
        assert "ORION_THREADS=2 replaces the measured threads" in other[1]


def test_serve_sh_uses_all_cores_whatever_the_shell_says_of_openmp(folder: Path, tmp_path: Path) -> None:
    """nproc obeys these variables; llama-server would run with one thread."""
    show = tmp_path / "show"
    show.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    show.chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "LLAMA_SERVER": str(show), "LLAMA_API_KEY": "k"}
    other = {"OMP_NUM_THREADS": "7", "OMP_THREAD_LIMIT": "5"}  # this test has one core
    ran = subprocess.run(
        ["sh", str(folder / "serve.sh")], capture_output=True, text=True, env=environment | other, check=True
    )
    assert " --threads 1 " in " ".join(ran.stdout.splitlines())


def test_a_damaged_or_forbidden_file_is_no_go_and_no_end_of_the_flight(folder: Path) -> None:
    """Of a running server; in flight the same is a warning, because serve.sh's own flags are as good."""
    me = Path(f"/proc/{os.getpid()}")
    assert server_flags.used(folder, me, None, "") == ("", "", "")
    write_flags(folder, Path(sys.executable), [*TUNED, "--port", "80"])
    tower, line, fault = server_flags.used(folder, me, None, "")
    assert (tower, line.startswith("warning: serve.sh does not use server_flags.json: '--port' is not")) == ("", True)
    assert fault.startswith("server_flags.json: '--port' is not an allowed flag")
    write_flags(folder, Path(sys.executable), TUNED, machine={"processor": "another"})
    _, line, fault = server_flags.used(folder, me, None, "")
    assert ("it was measured for another machine" in line, fault) == (True, "")
    write_flags(folder, Path(sys.executable), TUNED)
    _, line, fault = server_flags.used(folder, me, None, "")
    assert "start serve.sh again" in fault  # this process is no server with these flags
    path = folder / server_flags.FILE
    for place in range(0, path.stat().st_size, 37):
        data = bytearray(path.read_bytes())
        data[place] ^= 1
        path.write_bytes(data)
        with pytest.raises(server_flags.FlagsError):
            server_flags.read(path, folder, Path(sys.executable), "")
        data[place] ^= 1
        path.write_bytes(data)
    # The checker itself: a forbidden flag is NO-GO, though serve.sh does not use it.
    write_flags(folder, find_toolchain().llama_server, [*TUNED, "--port", "80"])
    told = subprocess.run(
        [sys.executable, "-I", "-S", folder / "check_flight.py", "--llama-server", find_toolchain().llama_server],
        capture_output=True, text=True, check=False, cwd="/",
    )  # fmt: skip
    assert told.returncode == 1
    assert told.stdout.splitlines()[-1].startswith("NO-GO: server_flags.json: '--port' is not an allowed flag")


def planted(
    folder: Path, tmp_path: Path, first: float, second: float, checked: int, *, busy: float = 0.0, **options: Any
) -> tune.Tuning:
    """A search with all its results: flash attention takes 5 s, the default flags `first` and then `second` seconds."""
    server = program(tmp_path)
    tuning = tune.Tuning(folder, server, folder / tune.RESULTS)

    def measured(words: list[str], seconds: float, frames_checked: int = 2) -> dict[str, Any]:
        return {
            "flags": server_flags.flags_of(words), "seconds_per_frame": seconds, "spread_seconds": 0.1,
            "seconds": {"golden/1.png": [seconds, seconds + 0.1]}, "start_seconds": 1.0, "peak_bytes": 10_000_000,
            "frames_checked": frames_checked, "why": "",
        }  # fmt: skip

    every = len(tuning._asked) - 8 + checked
    changed = [[*TUNED[:4]], [*TODAYS, "--mmproj", "orion-mmproj-q8_0.gguf"], [*TODAYS, "--no-repack"]]
    changed += [[*TUNED[:4], "--mmproj", "orion-mmproj-q8_0.gguf"], TUNED]
    rows = {" ".join(server_flags.words_of(server_flags.flags_of(words))): measured(words, 20.0) for words in changed}
    rows |= {tune.TODAY: measured(TODAYS, first), " ".join(TUNED[:4]): measured(TUNED[:4], 5.0, every)}
    rows[f"{tune.TODAY}, again, after {' '.join(TUNED[:4])}"] = measured(TODAYS, second)
    plan = {"frames": 2, "rounds": 2}
    record = {**tuning._record, "plan": plan, "build": "b1", "busy_cores": busy, "measured": rows}
    server_flags.write(folder / tune.RESULTS, server_flags.sealed(record))
    return tune.Tuning(folder, server, folder / tune.RESULTS, **options)


def test_figures_of_a_busy_machine_are_shown_and_not_used(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As where nothing else runs: results that say 1.4 cores are beyond it.
    monkeypatch.setattr(tune, "BUSY", 0.5)
    (folder / server_flags.FILE).write_text("{}")
    tuning = planted(folder, tmp_path, 10.0, 8.0, 8, busy=1.4)
    report = tuning.run()
    tuning.write_flags(report)
    assert (folder / server_flags.FILE).read_text() == "{}"  # of an earlier tuning, on an idle machine
    assert (report["usable"], report["busy_cores"], report["flags"]) == (False, 1.4, TUNED[:4])
    last = list(tune.lines_of(report))[-1]
    assert last.startswith("not to be used: other programs used 1.4 cores while this was measured.")
    assert f"delete {folder / tune.RESULTS} and run again" in last
    assert " s per frame instead of " not in "\n".join(tune.lines_of(report))
    results = [line[-1] for line in tune.table(report)]
    assert ("fastest under load" in results, "best" in results) == (True, False)

    tuning = planted(folder, tmp_path, 10.0, 8.0, 8, busy=1.4, busy_anyway=True)
    report = tuning.run()
    tuning.write_flags(report)
    assert json.loads((folder / server_flags.FILE).read_text())["flags"] == TUNED[:4]
    assert list(tune.lines_of(report))[-1].startswith("5.000 s per frame instead of 8.000: ")


def test_cores_that_others_use_at_the_end_stay_with_the_results(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuning = tune.Tuning(folder, program(tmp_path), folder / tune.RESULTS)
    tuning._measured(tune.TODAY, None, None)
    tuning._record["busy_cores"] = 0.0  # whatever other tests used at the start
    # Long enough that a program that always runs is seen beside a busy test machine.
    monkeypatch.setattr(tune, "BUSY_SECONDS", 0.5)
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as spinning:
        try:
            assert tuning._busy_since_the_start() > 0.5
        finally:
            spinning.kill()
    assert json.loads((folder / tune.RESULTS).read_text())["busy_cores"] > 0.5
    assert tune.Tuning(folder, tmp_path / "llama-server", folder / tune.RESULTS)._busy_since_the_start() > 0.5


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record["measured"][tune.TODAY].update(seconds_per_frame=-5),
        lambda record: record["measured"].update({tune.TODAY: {}}),
        lambda record: record.update(plan={"frames": "x"}),
        lambda record: record.pop("sha256"),  # of an earlier version
        lambda record: record.pop("identity"),
    ],
)
def test_damaged_results_are_refused(folder: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    planted(folder, tmp_path, 10.0, 8.0, 8)
    rewrite(folder / tune.RESULTS, change, seal=False)
    with pytest.raises(tune.TuneError, match=r"tuning\.json is damaged, or of an earlier version.*: delete it"):
        tune.Tuning(folder, tmp_path / "llama-server", folder / tune.RESULTS)


@pytest.mark.parametrize("text", ["", "[]", "{", "\xff"])
def test_results_that_are_no_object_are_refused(folder: Path, tmp_path: Path, text: str) -> None:
    (folder / tune.RESULTS).write_bytes(text.encode("latin-1"))
    with pytest.raises(tune.TuneError, match="delete it"):
        tune.Tuning(folder, program(tmp_path), folder / tune.RESULTS)


def test_the_table_shows_a_spread_only_of_several_rounds(folder: Path, tmp_path: Path) -> None:
    report = planted(folder, tmp_path, 10.0, 8.0, 8).run()
    hopeless = next(row for row in report["rows"] if row["change"] == "--no-repack")
    hopeless["spread_seconds"] = None  # stopped after its first round
    lines = {line[0]: dict(zip(tune.COLUMNS, line, strict=True)) for line in tune.table(report)}
    assert (lines["--no-repack"]["spread"], lines[tune.TODAY]["spread"]) == ("-", "0.100")
    assert lines[tune.TODAY]["verdicts"] == "2 of 2 unchanged"
    assert f"default flags: {' '.join(TODAYS)}" in tune.lines_of(report)


@pytest.mark.parametrize(
    ("first", "second", "checked", "flags", "why"),
    [
        (10.0, 8.0, 8, TUNED[:4], ""),
        (10.0, 5.0, 8, None, "within the noise (default flags took 5 s the second time)"),
        (5.0, 5.0, 8, None, "within the noise"),
        (10.0, 8.0, 3, None, "not confirmed: not every golden frame was asked. Delete the results and measure again"),
    ],
)
def test_a_gain_is_confirmed_by_a_second_measurement(
    folder: Path, tmp_path: Path, first: float, second: float, checked: int, flags: list[str] | None, why: str
) -> None:
    """Of results that are there already: no server starts."""
    tuning = planted(folder, tmp_path, first, second, checked)
    (folder / server_flags.FILE).write_text("{}")
    report = tuning.run()
    tuning.write_flags(report)
    assert not (tmp_path / "started").exists()
    assert report["flags"] == flags
    assert next(one for one in report["rows"] if one["change"] == "--flash-attn on")["why"] == why
    assert (folder / server_flags.FILE).exists() == bool(flags)  # the file of an earlier tuning does not stay
    if flags:
        assert (report["seconds_per_frame"], report["seconds_per_frame_before"]) == (5.0, 8.0)


def row(seconds: dict[str, list[float]], spread: float) -> dict[str, Any]:
    return {"seconds": seconds, "spread_seconds": spread, "seconds_per_frame": tune._median(seconds)}


def test_a_gain_is_larger_than_the_noise() -> None:
    best = row({"a": [1.0, 1.1], "b": [2.0, 2.1]}, 0.1)
    assert tune._is_faster(row({"a": [0.8, 0.9], "b": [1.8, 1.9]}, 0.1), best)
    assert not tune._is_faster(row({"a": [0.98, 1.05], "b": [1.96, 2.02]}, 0.07), best)  # within the spread
    assert not tune._is_faster(row({"a": [0.99, 0.99], "b": [1.99, 1.99]}, 0.0), row(best["seconds"], 0.0) | {
        "seconds_per_frame": 1.5})  # less than 2 %  # fmt: skip
    noisy = row({"a": [1.0, 9.0], "b": [2.0, 9.0]}, 7.5)
    assert tune._is_faster(row({"a": [0.5, 0.6], "b": [0.5, 0.6]}, 0.1), noisy)  # every answer is faster
    assert not tune._is_faster(row({"a": [0.5, 1.1], "b": [0.5, 0.6]}, 0.6), noisy)


def test_what_is_tried_comes_in_the_order_of_its_value() -> None:
    assert tune.thread_counts(4) == [4, 3, 2, 1]
    assert tune.thread_counts(1) == [1]
    assert tune.thread_counts(16) == [16, 15, 14, 12, 10, 8, 6, 4, 2]
    found = tune.changes({"--threads": "2", "--flash-attn": "off"}, 2, ["f16.gguf", "q8.gguf"])
    assert found[:3] == [{"--threads": "1"}, {"--flash-attn": "on"}, {"--mmproj": "q8.gguf"}]
    for flags in found:
        assert server_flags.flags_of(server_flags.words_of(flags)) == flags


@pytest.mark.slow
def test_the_ground_measures_with_the_same_core(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "CHANGES", ())
    monkeypatch.setenv("COLUMNS", "120")
    run = shutil.copytree(finished / "runs" / "small", tmp_path / "small")
    for path in (run / "orion_merged").glob("*.safetensors"):
        path.unlink()

    def bench_frame(*words: object) -> str:
        result = CliRunner().invoke(app, ["bench-frame", str(run), "--tune", *map(str, words)], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    report = json.loads(bench_frame("--json"))
    assert {row["change"] for row in report["rows"]} >= {tune.TODAY, "--flash-attn on"}
    assert report["not_measured"] == [
        {
            "change": "--mmproj orion-mmproj-q8_0.gguf",
            "why": "orion_merged has no weights (removed by 'orion clean'?)",
        }
    ]
    measured = (run / tune.RESULTS).read_bytes()
    shown = bench_frame("--minutes", "0.01")  # no time for more, and nothing is measured again
    assert (run / tune.RESULTS).read_bytes() == measured
    assert re.search(rf"│ {tune.TODAY} +│ +\d", shown)
    assert "not measured: --mmproj orion-mmproj-q8_0.gguf: orion_merged has no weights" in shown
    assert not [path for path in run.iterdir() if path.name.startswith(".tune-")]
    with pytest.raises(OrionError, match=r"were not measured within 0\.01 minutes"):
        (run / tune.RESULTS).unlink()
        bench_frame("--minutes", "0.01")
