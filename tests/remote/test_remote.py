"""`orion remote train` against a real sshd: it survives its connection, and a real training comes back."""

import ctypes
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orion_triage.errors import OrionError
from orion_triage.pipeline import FINE_TUNE, run_stage
from orion_triage.runs.manifest import read_manifest
from orion_triage.runs.run import open_run
from orion_triage.settings import load_settings
from orion_triage.train import remote
from tests import warm
from tests.conftest import orion
from tests.remote.place import SCRIPTS, Place, make_repository, make_weights, tree

ORION = [sys.executable, "-c", "import orion_triage.cli.remote; from orion_triage.cli import main; main()"]
INSTALLED = Path(sys.executable).with_name("orion")
_SECONDS = 900


@pytest.fixture(autouse=True, scope="module")
def _orphans_stay() -> Iterator[None]:
    """As in a container whose first process waits for no orphan: a job that has ended keeps its process id."""
    libc, subreaper = ctypes.CDLL(None), 36
    libc.prctl(subreaper, 1, 0, 0, 0)
    yield
    libc.prctl(subreaper, 0, 0, 0, 0)


def popen(
    place: Place, *arguments: str, setup: str = "", streams: tuple[Any, Any] = (subprocess.PIPE, subprocess.PIPE)
) -> subprocess.Popen[str]:
    environment = place.environment() | {"ORION_SERVER_SETUP": setup, "COLUMNS": "200"}
    del environment["ORION_LOCAL_WEIGHTS_DIR"]
    return subprocess.Popen(
        [*ORION, "remote", "train", *arguments],
        env=environment,
        cwd=place.here,
        stdin=subprocess.DEVNULL,
        stdout=streams[0],
        stderr=streams[1],
        text=True,
        start_new_session=True,
    )


def train(place: Place, *arguments: str, setup: str = "", status: int = 0) -> tuple[str, str]:
    """Both output streams of the command: the training's log, and what the command says."""
    process = popen(place, *arguments, setup=setup)
    output, said = process.communicate(timeout=_SECONDS)
    assert process.returncode == status, output + said
    assert "Traceback" not in said
    return output, said


def wait_for(path: Path, text: str = "") -> None:
    deadline = time.monotonic() + _SECONDS
    while not path.is_file() or text not in path.read_text():
        assert time.monotonic() < deadline, f"{path} does not come to hold {text!r}"
        time.sleep(0.05)


def job_file(place: Place, name: str) -> Path:
    return place.repository / "runs" / "training-job" / name


def stand_in(place: Place, *commands: str) -> str:
    """A setup after which the server's `orion` does nothing but note its arguments; the weights are there already."""
    ready = make_weights(place.here / "made", 5)
    return "; ".join(
        [
            "echo setting up",
            f"echo >>{place.here}/setups",
            "mkdir -p .venv/bin runs/tiny",
            f'printf "#!/bin/sh\\nprintf \'%%s\\\\\\\\n\' \\"\\$@\\" >>{place.here}/arguments\\n" >.venv/bin/orion',
            "chmod +x .venv/bin/orion",
            f"rm -rf runs/tiny/orion_lora_weights; cp -r {ready} runs/tiny/orion_lora_weights",
            *commands,
        ]
    )


def test_a_real_training_survives_a_killed_client_and_a_cut_wire(
    place: Place, small_base: Path, small_dataset: Path
) -> None:
    make_repository(place.source)
    values = ("dataset.source=directory", f"dataset.folder={small_dataset}", f"base.model={small_base}")
    sets = [word for value in values for word in ("--set", value)]
    done = orion("dataset", "--run", "runs/small", *sets, cwd=place.here)
    assert done.returncode == 0, done.stderr
    installed = warm.shim(place.here / "bin") if warm.is_possible() else INSTALLED
    place.variables["ORION_LOCAL_DATA_DIR"] = ""
    outside = place.here / "outside"
    outside.mkdir()
    setup = (
        f"ln runs/training-job/log {outside}/log; echo >>{outside}/setups; echo set up; "
        f"mkdir -p .venv/bin; ln -s {installed} .venv/bin/orion"
    )
    command = ["--run", "runs/small", *sets, "--set", "fine_tune.epochs=1"]

    first = popen(place, *command, setup=setup)
    assert first.stdout
    assert first.stdout.readline() == "set up\n"
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    pid = int(job_file(place, "pid").read_text())
    assert os.getsid(pid) == pid

    with (place.here / "output").open("wb") as output, (place.here / "said").open("wb") as said:
        second = popen(place, *command, setup=setup, streams=(output, said))
        wait_for(place.here / "output", "set up\n")
        place.server.trust("other")  # nobody is let in for a moment
        place.server.wire.cut()
        wait_for(place.here / "said", "next attempt in 1 s")
        place.server.trust("host")
        assert second.wait(_SECONDS) == 0, (place.here / "said").read_text()
    assert "already has this training: it is running" in (place.here / "said").read_text()
    log = (outside / "log").read_text()
    assert (place.here / "output").read_text() == log  # every byte once, over two connections
    assert "fine-tune: done in" in log
    assert (outside / "setups").read_text() == "\n"

    weights = place.here / "runs" / "small" / "orion_lora_weights"
    stage_manifest = read_manifest(weights)
    assert stage_manifest is not None
    assert stage_manifest.stage == "fine-tune"
    assert tree(weights, without=("manifest.json",)) == stage_manifest.outputs
    assert list(place.there.iterdir()) == []
    # The run goes on here: its own fine-tuning stage finds nothing left to do.
    run = open_run(place.here / "runs" / "small")
    assert run_stage(FINE_TUNE, run)[1]


def test_a_training_that_fails_says_why_and_can_be_started_again(prepared: Place) -> None:
    setup = f"echo >>{prepared.here}/setups; echo no compiler; exit 7"
    for attempt in (1, 2):
        output, said = train(prepared, setup=setup, status=1)
        assert output == "no compiler\n"
        assert "failed with exit status 7" in said
        assert len(re.findall("^error: ", said, re.MULTILINE)) == 1
        assert (prepared.here / "setups").read_text() == "\n" * attempt
    assert prepared.data.is_dir()
    assert not (prepared.here / "runs" / "tiny" / "orion_lora_weights").exists()


def test_a_server_that_the_doctor_refuses_trains_nothing_and_says_so_last(prepared: Place) -> None:
    refusing = """printf '#!/bin/sh\\necho "$1" >>runs/called; echo GPU missing; exit 4\\n' >.venv/bin/orion"""
    output, said = train(prepared, setup=stand_in(prepared, refusing), status=1)
    assert output.splitlines()[:2] == ["setting up", "GPU missing"]
    assert re.fullmatch("error: not trained, .*orion doctor.* missing .*", output.splitlines()[-1])
    assert "failed with exit status 4" in said
    assert (prepared.repository / "runs" / "called").read_text() == "doctor\n"


def test_a_training_that_vanishes_is_started_again(prepared: Place) -> None:
    setup = f"echo >>{prepared.here}/setups; [ $(wc -l <{prepared.here}/setups) = 2 ] || sleep 100; exit 7"
    process = popen(prepared, setup=setup)
    wait_for(prepared.here / "setups")
    os.killpg(int(job_file(prepared, "pid").read_text()), signal.SIGKILL)
    _, said = process.communicate(timeout=_SECONDS)
    assert process.returncode == 1
    assert "ended without an exit status" in said
    _, said = train(prepared, setup=setup, status=1)
    assert "resuming from its last checkpoint" in said
    assert "failed with exit status 7" in said


def test_one_training_at_a_time_and_an_interrupted_command_says_that_it_goes_on(prepared: Place) -> None:
    process = popen(prepared, setup="echo begun; sleep 100")
    wait_for(job_file(prepared, "log"), "begun")
    _, said = train(prepared, "--set", "fine_tune.epochs=9", setup="echo begun; sleep 100", status=1)
    pid = int(job_file(prepared, "pid").read_text())
    assert "another training is running on 127.0.0.1: --preset tiny" in said
    assert f"kill -- -{pid}" in said
    for script in ("upload_to_server.sh", "download_weights.sh"):
        make_weights(prepared.weights, 1)
        prepared.refused(script, "a training is running in")
    deadline = time.monotonic() + _SECONDS
    while process.stdout and process.stdout.readline() != "begun\n":
        assert time.monotonic() < deadline
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=_SECONDS)
    assert process.returncode == 130
    assert "the training on 127.0.0.1 continues" in said
    os.kill(pid, 0)
    os.killpg(pid, signal.SIGKILL)


def test_a_training_that_ended_meanwhile_is_fetched_and_kept_ones_are_trained_anew(prepared: Place) -> None:
    setup = stand_in(prepared, "sleep 1")
    process = popen(prepared, setup=setup)
    wait_for(job_file(prepared, "log"), "setting up")
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    wait_for(job_file(prepared, "status"))
    _, said = train(prepared, "--set", "fine_tune.epochs=9", setup=setup, status=1)
    assert "has weights of another training that were not fetched" in said
    output, said = train(prepared, "--keep-remote", setup=setup)
    assert output == "setting up\n"
    assert "already has this training: it has ended" in said
    assert (prepared.here / "setups").read_text() == "\n"
    weights = prepared.here / "runs" / "tiny" / "orion_lora_weights"
    assert tree(weights) == tree(prepared.weights)
    assert prepared.data.is_dir()
    train(prepared, setup=setup)
    assert (prepared.here / "setups").read_text() == "\n\n"
    assert list(prepared.there.iterdir()) == []


def test_again_trains_anew_instead_of_fetching(prepared: Place) -> None:
    setup = stand_in(prepared, "rm -f runs/tiny/orion_lora_weights/adapter_config.json")
    _, said = train(prepared, setup=setup, status=1)
    assert "adapter_config.json is missing" in said
    assert len(re.findall("^error: ", said, re.MULTILINE)) == 1
    _, said = train(prepared, setup=setup, status=1)
    assert (prepared.here / "setups").read_text() == "\n"
    train(prepared, "--again", setup=stand_in(prepared))
    assert (prepared.here / "setups").read_text() == "\n\n"
    assert list(prepared.there.iterdir()) == []


def test_a_cleanup_that_was_cut_off_is_finished_before_anything_else(prepared: Place) -> None:
    setup = stand_in(prepared)
    shim = prepared.server.tools / "rm"
    shim.write_text('#!/bin/sh\ncase "$*" in *orion-triage.orion-deleting) kill -9 $PPID ;; esac\nexec /bin/rm "$@"\n')
    shim.chmod(0o755)
    train(prepared, setup=setup, status=1)
    shim.unlink()
    assert not prepared.data.exists()
    _, said = train(prepared, setup=setup)
    assert "is not cleaned up yet" in said
    assert (prepared.here / "setups").read_text() == "\n"
    assert list(prepared.there.iterdir()) == []


def test_the_server_gets_the_settings_and_a_preset_of_ones_own(prepared: Place) -> None:
    text = '# it\'s "mine": $HOME\n[base]\nmodel = "orion-tiny"\nframe_size = 256\n'
    (prepared.here / "own.toml").write_text(text)
    prepared.variables["ORION_SERVER_DATA_PATH"] = str(prepared.there / 'it\'s "the" data $x')
    setup = stand_in(prepared, f"cp runs/training-job/own.toml {prepared.here}/arrived.toml", "mv runs/tiny runs/own")
    train(prepared, "--preset", "own.toml", "--set", "fine_tune.epochs=2", setup=setup)
    assert (prepared.here / "arrived.toml").read_text() == text
    arguments = (prepared.here / "arguments").read_text().splitlines()
    count = (len(arguments) - 2) // 3
    doctor, dataset, fine_tune = arguments[: count + 2], arguments[count + 2 : -count], arguments[-count:]
    assert (dataset[0], fine_tune[0]) == ("dataset", "fine-tune")
    assert doctor == ["doctor", "--for", "fine-tune", *dataset[1:]]
    assert dataset[1:] == fine_tune[1:]
    folder = json.dumps(prepared.variables["ORION_SERVER_DATA_PATH"])
    assert dataset[1:] == [
        "--preset", str(job_file(prepared, "own.toml")), "--run", "runs/own", "--set", "fine_tune.epochs=2",
        "--set", "dataset.source=directory", "--set", f"dataset.folder={folder}",
    ]  # fmt: skip
    assert (prepared.here / "runs" / "own" / "orion_lora_weights" / "manifest.json").is_file()


def test_mistakes_are_named_before_anything_is_sent(prepared: Place) -> None:
    prepared.variables["SERVER"] = "-oProxyCommand=touch x"
    assert "is not a host or user@host" in train(prepared, status=1)[1]
    prepared.variables["SERVER"] = prepared.server.address
    assert "there is no preset 'huge'" in train(prepared, "--preset", "huge", status=1)[1]
    prepared.variables["ORION_SSH"] = prepared.server.ssh_with("other")
    assert "Permission denied" in train(prepared, status=1)[1]
    assert not prepared.there.exists()
    assert not (prepared.here / "x").exists()


def test_a_base_in_a_relative_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def base_folder(model: str) -> str:
        sets = [f"base.model={model}"]
        return remote.training_of("tiny", sets, "run", load_settings("tiny", sets)).base_folder

    assert [base_folder(name) for name in ("orion-tiny", "owner/base", "owner/base@v1")] == ["", "", ""]
    assert [base_folder(path) for path in ("/data/base", "~/base")] == ["/data/base", "~/base"]
    (tmp_path / "owner" / "base").mkdir(parents=True)  # the server would take its name for a Hub id
    for relative in ("owner/base", "./owner/base", "base"):
        with pytest.raises(OrionError, match=f"base.model={relative} is a folder of this machine"):
            base_folder(relative)


def test_a_base_that_the_server_has_not_is_named_before_anything_is_sent(prepared: Place) -> None:
    said = train(prepared, "--set", f"base.model={prepared.here}/base", setup=stand_in(prepared), status=1)[1]
    assert f"base.model={prepared.here}/base is no folder on the server" in said
    assert not prepared.there.exists()
    (prepared.here / "at home").mkdir()
    for name, status in (("at home", 0), ("nowhere", 3)):
        call = ["sh", "-c", '. "$1"; operate require_base "$2"', "sh", str(SCRIPTS / "on_server.sh"), f"~/{name}"]
        assert subprocess.run(call, env={**os.environ, "HOME": str(prepared.here)}, check=False).returncode == status


def test_the_server_folder_must_be_absolute() -> None:
    with pytest.raises(OrionError, match="ORION_SERVER_HDD_PATH ~/data is not an absolute path"):
        remote.server_of("me@gpu", {"ORION_SERVER_HDD_PATH": "~/data"})
    with pytest.raises(OrionError, match="--server-folder data is not an absolute path"):
        remote.server_of("me@gpu", {}, "data")


def test_without_a_folder_the_server_is_asked_for_its_home(prepared: Place) -> None:
    server = remote.server_of(prepared.server.address, {"ORION_SSH": prepared.server.ssh})
    home = prepared.server.home.resolve()
    assert (server.repository, server.data) == (f"{home}/orion/orion-triage", f"{home}/orion/orion_data")
    named = remote.server_of(prepared.server.address, {"ORION_SERVER_HDD_PATH": "/data"}, "/mine")
    assert named.repository == "/mine/orion-triage"


@pytest.mark.parametrize("named", [True, False])
def test_a_training_needs_no_variable_for_its_folder(prepared: Place, named: bool) -> None:
    """As README and --server-folder say; the scripts by themselves want ORION_SERVER_HDD_PATH."""
    prepared.variables["ORION_SERVER_HDD_PATH"] = ""
    _, said = train(prepared, *(["--server-folder", str(prepared.there)] if named else []), setup=stand_in(prepared))
    home = prepared.server.home.resolve()
    assert f"the dataset is in {prepared.there if named else home / 'orion'}/orion_data" in said
    assert (prepared.here / "runs" / "tiny" / "orion_lora_weights" / "manifest.json").is_file()


def test_paths_come_from_the_scripts_variables() -> None:
    server = remote.server_of("me@gpu", {"ORION_SERVER_HDD_PATH": "/data"})
    assert (server.repository, server.data, server.setup) == ("/data/orion-triage", "/data/orion_data", "make setup")
    named = {
        "ORION_SERVER_HDD_PATH": "/data",
        "ORION_REPO_DIR": "/r",
        "ORION_SERVER_DATA_PATH": "/d",
        "ORION_SSH": "ssh -p 2",
    }
    server = remote.server_of("me@gpu", named)
    assert (server.repository, server.data, shlex.join(server.ssh)) == ("/r", "/d", "ssh -p 2")


def test_help_has_an_example() -> None:
    result = subprocess.run([*ORION, "remote", "train", "--help"], capture_output=True, text=True, check=True)
    assert "Example: orion remote train" in result.stdout
