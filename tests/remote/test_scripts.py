"""The two scripts against a real sshd: cut off anywhere, they lose nothing, and the same command goes on."""

import os
import random
import resource
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.remote.place import SCRIPTS, Place, Tree, commit, git, make_dataset, make_repository, make_weights, tree
from tests.remote.sshd import Server, program, wait_until

STRANGE = "-a b'c\"d$HOME\n*\\é;`x`&"
EVERYWHERE = os.environ.get("HYPOTHESIS_PROFILE") == "torture"  # else at some places, spread over the whole
CUTS = 21 if EVERYWHERE else 6  # of each script
INTERRUPTIONS = 99 if EVERYWHERE else 4  # of each script, before a rename or within a deletion
SIDES = ("connection", "client", "server")


def run_and_cut(place: Place, script: str, at_bytes: int, side: str, delay_seconds: float) -> bool:
    """Run a script; once so many bytes have passed, and a moment later, its connection breaks, or it or the server's
    half is killed. Returns whether it had finished before."""
    process = place.popen(script)

    def cut() -> None:
        if side == "connection":
            place.server.wire.cut()
        elif side == "server":
            place.server.kill_sessions()
        else:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(delay_seconds, cut)
    place.server.wire.at_bytes(at_bytes, timer.start)
    process.communicate(timeout=60)
    if timer.is_alive():
        timer.join()
    place.server.wire.leave_alone()
    place.server.wait_until_quiet()
    return process.returncode == 0


def cuts(place: Place, script: str, seed: int) -> Iterator[tuple[int, str, float]]:
    """Where, which side, and how many seconds later; the whole script passes `place.server.wire.bytes` bytes.

    Each in a part of its own of these bytes.
    """
    source = random.Random(seed)
    total = place.server.wire.bytes
    for number in range(CUTS):
        at_bytes = int(total * (number + source.random()) / CUTS)
        yield at_bytes, SIDES[number % 3], source.choice((0, 0, 0.02, 0.05, 0.1))


# --- upload ----------------------------------------------------------------------------------------------------


def assert_whole_dataset(place: Place, *versions: Tree) -> None:
    """One complete dataset is on the server; between the two renames of a swap it has the old one's other name."""
    found = place.data if place.data.exists() else place.there / ".orion_data.orion-previous"
    assert tree(found) in versions
    if not place.data.exists():
        assert tree(found) == versions[0]


def test_an_upload_brings_dataset_and_repository_and_leaves_nothing_else(place: Place) -> None:
    make_repository(place.source)
    make_dataset(place.local_data, 1)
    (place.local_data / "notes.txt").write_text("mine")
    assert "not sent, because it is not part of a dataset: notes.txt" in place.upload()
    (place.local_data / "notes.txt").unlink()
    assert tree(place.data) == tree(place.local_data)
    head = git(place.source, "rev-parse", "HEAD")
    assert git(place.repository, "rev-parse", "HEAD") == head
    assert git(place.repository, "status", "--porcelain") == ""
    place.assert_nothing_partial()

    sent = place.server.wire.bytes
    assert "already has the complete dataset" in place.upload()
    assert place.server.wire.bytes - sent < sent - 40_000  # no frame travelled again
    make_dataset(place.local_data, 2)
    head = commit(place.source, "second")
    place.upload()
    assert tree(place.data) == tree(place.local_data)
    assert git(place.repository, "rev-parse", "HEAD") == head
    place.assert_nothing_partial()


def test_an_upload_can_be_cut_off_anywhere(place: Place) -> None:
    make_repository(place.source)
    new = tree(make_dataset(place.local_data, 0))
    place.server.wire.leave_alone()
    place.upload()
    finished = 0
    for number, (at_bytes, side, delay) in enumerate(cuts(place, "upload_to_server.sh", seed=6), start=1):
        old, new = new, tree(make_dataset(place.local_data, number))
        head = commit(place.source, str(number))
        finished += run_and_cut(place, "upload_to_server.sh", at_bytes, side, delay)
        assert_whole_dataset(place, old, new)
        place.upload()
        assert tree(place.data) == new
        assert git(place.repository, "rev-parse", "HEAD") == head
        assert git(place.repository, "status", "--porcelain") == ""
        place.assert_nothing_partial()
    assert finished <= CUTS // 4


def interrupt_before(folder: Path, call: int) -> None:
    """Put `mv` and `rm` into `folder` that kill their caller before the so-many-th call of either; the 0th never comes.

    A deletion is interrupted in its middle instead: it has taken one file when its caller dies.
    """
    (folder / "calls").write_text("0")
    for name in ("mv", "rm"):
        real = program(name)
        path = folder / name
        path.write_text(
            f"""#!/bin/bash
read -r calls <{folder}/calls
echo $((++calls)) >{folder}/calls
if ((calls == {call})); then
    if [[ ${{0##*/}} == rm ]]; then
        find "${{@: -1}}" -type f -print0 2>/dev/null | head -z -n 1 | xargs -0 -r {real} -f --
    fi
    kill -9 $PPID
    exit 1
fi
exec {real} "$@"
"""
        )
        path.chmod(0o755)


def calls_to_interrupt(place: Place, script: str, folder: Path, first_on_path: Path | None = None) -> list[int]:
    """Run `script` with the tools of `interrupt_before` in `folder`: which of its calls to interrupt, from 1."""
    interrupt_before(folder, 0)
    status, output = place.call(script, first_on_path=first_on_path)
    assert status == 0, output
    calls = int((folder / "calls").read_text())
    parts = min(calls, INTERRUPTIONS)
    chosen = [1 + (2 * part + 1) * calls // (2 * parts) for part in range(parts)]  # the middle one of each part
    assert 5 < max(chosen) <= calls
    return chosen


def test_an_upload_can_be_cut_off_before_any_rename_and_within_any_deletion_on_the_server(place: Place) -> None:
    make_repository(place.source)
    make_dataset(place.local_data, 0)
    place.upload()
    commit(place.source, "second")
    new = tree(make_dataset(place.local_data, 99))
    tools = place.server.tools
    for call in calls_to_interrupt(place, "upload_to_server.sh", tools):
        old, new = new, tree(make_dataset(place.local_data, call))
        head = commit(place.source, str(call))
        interrupt_before(tools, call)
        status, output = place.call("upload_to_server.sh")
        place.server.wait_until_quiet()
        assert status != 0
        assert output.count("error: ") == 1
        assert_whole_dataset(place, old, new)
        for tool in tools.iterdir():
            tool.unlink()
        place.upload()
        assert tree(place.data) == new
        assert git(place.repository, "rev-parse", "HEAD") == head
        place.assert_nothing_partial()


def limit_file_size(folder: Path, tool: str, size_bytes: int) -> None:
    """Writes of `tool` fail beyond so many bytes, as on a full disk."""
    path = folder / tool
    path.write_text(f"#!/bin/sh\ntrap '' XFSZ\nulimit -f {size_bytes // 512}\nexec {program(tool)} \"$@\"\n")
    path.chmod(0o755)


@pytest.mark.parametrize(("tool", "says"), [("rsync", "rsync failed"), ("tar", "the old dataset is unchanged")])
def test_a_full_disk_on_the_server_leaves_the_old_dataset(place: Place, tool: str, says: str) -> None:
    make_repository(place.source)
    old = tree(make_dataset(place.local_data, 1))
    place.upload()
    new = tree(make_dataset(place.local_data, 2, frame_bytes=30_000))
    limit_file_size(place.server.tools, tool, 20_480)
    place.refused("upload_to_server.sh", says)
    assert tree(place.data) == old
    (place.server.tools / tool).unlink()
    place.upload()
    assert tree(place.data) == new
    place.assert_nothing_partial()


def test_what_the_server_loses_is_sent_again(place: Place) -> None:
    make_repository(place.source)
    new = tree(make_dataset(place.local_data, 1))
    place.upload()
    (place.data / "orion_dataset" / "images" / "place 2.png").unlink()
    place.upload()
    assert tree(place.data) == new
    shutil.rmtree(place.repository)
    place.upload()
    assert tree(place.data) == new
    assert git(place.repository, "status", "--porcelain") == ""
    # The archive is damaged between two attempts: longer than ours, so that rsync leaves it alone.
    new = tree(make_dataset(place.local_data, 2))
    run_and_cut(place, "upload_to_server.sh", 40_000, "connection", 0)
    archive = place.there / ".orion_data.orion-incoming" / "orion_data.tar.zst"
    archive.parent.mkdir(exist_ok=True)
    archive.write_bytes(bytes(200_000))
    status, output = place.call("upload_to_server.sh")
    if status:
        assert "arrived damaged" in output
        place.upload()
    assert tree(place.data) == new
    place.assert_nothing_partial()


def test_the_servers_half_of_a_cut_upload_is_waited_for(place: Place) -> None:
    make_repository(place.source)
    new = tree(make_dataset(place.local_data, 1))
    shim = place.server.tools / "tar"
    shim.write_text(
        f"#!/bin/sh\ntouch {place.here}/unpacking\nuntil [ -e {place.here}/go ]; do sleep 0.05; done\n"
        f'exec {program("tar")} "$@"\n'
    )
    shim.chmod(0o755)
    process = place.popen("upload_to_server.sh")
    wait_until((place.here / "unpacking").exists)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    shim.unlink()
    second = place.popen("upload_to_server.sh")
    wait_until(lambda: any("flock" in command for command in place.server.commands()))
    (place.here / "go").touch()
    output = second.communicate(timeout=60)[0]
    assert second.returncode == 0, output
    assert "already has the complete dataset" in output  # the first one's work was done by then
    assert tree(place.data) == new
    place.assert_nothing_partial()


def test_a_transfer_goes_on_where_it_was_cut(place: Place) -> None:
    make_repository(place.source)
    make_dataset(place.local_data, 1, frame_bytes=500_000)
    place.server.wire.leave_alone()
    process = place.popen("upload_to_server.sh")

    archive = place.there / ".orion_data.orion-incoming" / "orion_data.tar.zst"

    def cut() -> None:
        wait_until(lambda: any(path.stat().st_size > 1_000_000 for path in archive.parent.rglob("*")))
        place.server.wire.cut()

    place.server.wire.at_bytes(1_500_000, cut)
    process.communicate(timeout=60)
    place.server.wait_until_quiet()
    place.server.wire.leave_alone()
    arrived = archive.stat().st_size
    assert arrived > 1_000_000
    place.upload()
    assert place.server.wire.bytes < 2_000_000 - arrived + 150_000
    assert tree(place.data) == tree(place.local_data)


@pytest.mark.parametrize("how", ["folder", "bundle", "address"])
def test_the_repository_comes_from_a_folder_a_bundle_or_an_address(place: Place, how: str) -> None:
    make_repository(place.source)
    make_dataset(place.local_data, 1)
    git(place.source, "checkout", "-q", "-b", "other")
    wanted = commit(place.source, "on another branch")
    git(place.source, "checkout", "-q", "main")
    address = {
        "folder": str(place.source),
        "bundle": str(place.here / "it.bundle"),
        "address": f"file://{place.source}",
    }
    git(place.source, "bundle", "create", "-q", str(place.here / "it.bundle"), "--all")
    place.variables = {"ORION_REPO_URL": address[how], "ORION_REPO_REF": "other"}
    place.upload()
    assert git(place.repository, "rev-parse", "HEAD") == wanted
    place.variables["ORION_REPO_REF"] = "main"  # an older state, which is in the history already
    place.upload()
    assert git(place.repository, "rev-parse", "HEAD") == git(place.source, "rev-parse", "main")
    place.variables["ORION_REPO_REF"] = "nowhere"
    place.refused("upload_to_server.sh", "nowhere", "ORION_REPO_REF")


def test_commits_and_changes_on_the_server_are_not_overwritten(place: Place) -> None:
    make_repository(place.source)
    make_dataset(place.local_data, 1)
    place.upload()
    commit(place.source, "newer")
    (place.repository / "pyproject.toml").write_text('name = "orion-triage"\n')
    place.refused("upload_to_server.sh", "uncommitted changes", "pyproject.toml")
    commit(place.repository, "made there")
    before = tree(place.repository)
    place.refused("upload_to_server.sh", "commits that exist nowhere else")
    assert {name for name in tree(place.repository).items() ^ before.items() if not name[0].startswith(".git")} == set()


def test_an_update_of_the_checkout_that_was_cut_off_is_finished(place: Place) -> None:
    make_repository(place.source)
    make_dataset(place.local_data, 1)
    place.upload()
    head = commit(place.source, "newer")
    shim = place.server.tools / "git"
    shim.write_text(
        f"""#!/bin/sh
case "$*" in *"reset -q --hard"*)
    touch '{place.repository}/.git/index.lock'
    echo half >'{place.repository}/code.py'
    kill -9 $PPID ;;
esac
exec {program("git")} "$@"
"""
    )
    shim.chmod(0o755)
    assert place.call("upload_to_server.sh")[0] == 1
    place.server.wait_until_quiet()
    shim.unlink()
    assert (place.repository / "code.py").read_text() == "half\n"
    place.upload()
    assert git(place.repository, "rev-parse", "HEAD") == head
    assert git(place.repository, "status", "--porcelain") == ""
    place.assert_nothing_partial()


@pytest.mark.parametrize("command", [["bash", "upload_to_server.sh"], ["./upload_to_server.sh"]])
def test_the_scripts_can_be_called_from_anywhere(place: Place, command: list[str]) -> None:
    make_repository(place.source)
    make_dataset(place.local_data, 1)
    subprocess.run(command, env=place.environment(), cwd=SCRIPTS, check=True)
    assert tree(place.data) == tree(place.local_data)


def test_no_password_of_an_address_is_printed_or_stored(place: Place) -> None:
    make_dataset(place.local_data, 1)
    make_repository(place.source)
    place.variables["ORION_REPO_URL"] = "http://me:hunter2@127.0.0.1:9/orion.git"
    assert "hunter2" not in place.refused("upload_to_server.sh", "git failed", "127.0.0.1")
    assert "hunter2" not in place.call("upload_to_server.sh", "--dry-run")[1]
    assert not [path for path in place.there.rglob("*") if path.is_file() and b"hunter2" in path.read_bytes()]


# --- download --------------------------------------------------------------------------------------------------


def test_a_download_fetches_keeps_the_previous_and_scorches(place: Place) -> None:
    new = tree(place.trained().weights)
    assert "kept on the server" in place.download("--keep-remote")
    assert tree(place.local_weights) == new
    assert place.data.is_dir()
    assert ", and complete" in place.download()
    assert tree(place.local_weights) == new
    assert not place.local_weights.with_name("orion_lora_weights.previous").exists()
    assert list(place.there.iterdir()) == []
    assert place.there.is_dir()
    place.refused("download_weights.sh", "there are no weights")

    old, new = new, tree(place.trained(2).weights)
    place.download()
    assert tree(place.local_weights) == new
    assert tree(place.local_weights.with_name("orion_lora_weights.previous")) == old
    place.assert_nothing_partial()


def assert_weights_safe(place: Place, old: Tree, new: Tree) -> None:
    previous = place.local_weights.with_name("orion_lora_weights.previous")
    found = tree(place.local_weights if place.local_weights.exists() else previous)
    assert found in (old, new)
    whole = place.weights.exists() and place.repository.exists() and place.data.exists()
    if not whole or tree(place.weights) != new:
        assert found == new


def test_a_download_can_be_cut_off_anywhere(place: Place) -> None:
    new = tree(place.trained(0).weights)
    place.server.wire.leave_alone()
    place.download()
    finished = 0
    for number, (at_bytes, side, delay) in enumerate(cuts(place, "download_weights.sh", seed=7), start=1):
        old, new = new, tree(place.trained(number).weights)
        finished += run_and_cut(place, "download_weights.sh", at_bytes, side, delay)
        assert_weights_safe(place, old, new)
        assert_downloaded(place, old, new)
    assert finished <= CUTS // 4


def assert_downloaded(place: Place, old: Tree, new: Tree) -> None:
    """The same command again completes, unless the first one had come to its very end."""
    status, output = place.call("download_weights.sh")
    if status:
        assert "there are no weights" in output
    assert tree(place.local_weights) == new
    assert tree(place.local_weights.with_name("orion_lora_weights.previous")) == old
    assert list(place.there.iterdir()) == []
    place.assert_nothing_partial()


@pytest.mark.parametrize("side", ["here", "there"])
def test_a_download_can_be_cut_off_before_any_rename_and_within_any_deletion(place: Place, side: str) -> None:
    for seed in (97, 98):
        place.trained(seed)
        place.download()
    tools, first_on_path = place.server.tools, None
    if side == "here":
        tools = first_on_path = place.here / "tools"
        tools.mkdir()
    new = tree(place.trained(99).weights)
    for call in calls_to_interrupt(place, "download_weights.sh", tools, first_on_path):
        old, new = new, tree(place.trained(call).weights)
        interrupt_before(tools, call)
        status, _ = place.call("download_weights.sh", first_on_path=first_on_path)
        place.server.wait_until_quiet()
        for tool in tools.iterdir():
            tool.unlink()
        assert status != 0
        assert_weights_safe(place, old, new)
        assert_downloaded(place, old, new)


def test_a_full_disk_here_keeps_the_old_weights_and_the_server(place: Place) -> None:
    old = tree(place.trained(1).weights)
    place.download()
    new = tree(place.trained(2).weights)
    process = subprocess.run(
        [SCRIPTS / "download_weights.sh"],
        env=place.environment(),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000)),
        restore_signals=False,  # SIGXFSZ stays ignored: writes fail instead
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert process.returncode == 1
    assert "File too large" in process.stderr
    assert "rsync failed" in process.stderr
    assert tree(place.local_weights) == old
    assert tree(place.weights) == new
    place.download()
    assert tree(place.local_weights) == new


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda weights: (weights / "adapter_config.json").unlink(), "adapter_config.json is missing"),
        (
            lambda weights: (weights / "adapter_model.safetensors").write_bytes(b"x"),
            "does not have the sha256 in the manifest",
        ),
        (lambda weights: (weights / "manifest.json").unlink(), "is not finished"),
        (lambda weights: (weights / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (
            lambda weights: (weights / "manifest.json").write_text('{"stage": "fuse", "outputs": {}}'),
            "manifest of fuse",
        ),
        (lambda weights: shutil.rmtree(weights), "there are no weights"),
    ],
)
def test_weights_that_are_not_whole_are_not_taken_and_nothing_is_deleted(
    place: Place, damage: Callable[[Path], None], says: str
) -> None:
    old = tree(place.trained(1).weights)
    place.download()
    place.trained(2)
    kept = shutil.copytree(place.weights, place.here / "kept")
    damage(place.weights)
    before = tree(place.there)
    place.refused("download_weights.sh", says)
    assert tree(place.there) == before
    assert tree(place.local_weights) == old
    shutil.rmtree(place.weights, ignore_errors=True)
    shutil.copytree(kept, place.weights)
    place.download()
    assert tree(place.local_weights) == tree(kept)


# --- refusals --------------------------------------------------------------------------------------------------


def _link(place: Place, name: str, target: Path) -> str:
    (place.there / name).symlink_to(target)
    return str(place.there / name)


def _moved_into(folder: Path, parent: Path) -> str:
    parent.mkdir(parents=True, exist_ok=True)
    return str(folder.rename(parent / folder.name))


def _images(place: Place) -> Path:
    return place.data / "orion_dataset" / "images"


def _dirty(place: Place, path: str, text: str) -> str:
    (place.repository / path).parent.mkdir(parents=True, exist_ok=True)
    (place.repository / path).write_text(text)
    return str(place.repository)


def _stashed(place: Place) -> str:
    _dirty(place, "pyproject.toml", 'name = "orion-triage"\n')
    git(place.repository, "stash", "-q")
    return str(place.repository)


def _other_weights(place: Place) -> str:
    make_weights(place.repository / "runs" / "other" / "orion_lora_weights", 9)
    return str(place.repository)


def _in_a_home(place: Place) -> str:
    """The session's home is made recognisable as a checkout."""
    for name in (".git", "pyproject.toml", ".gitignore"):
        source = place.repository / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, place.server.home / name)
    return str(place.server.home)


def _also_a_dataset(place: Place, folder: Path) -> str:
    shutil.copytree(place.data, folder, dirs_exist_ok=True)
    return str(folder)


REPOSITORY, DATA, WEIGHTS = "ORION_SERVER_REPO_PATH", "ORION_SERVER_DATA_PATH", "ORION_SERVER_WEIGHTS_PATH"
REFUSALS: list[tuple[str, str, Callable[[Place], str], str]] = [
    *(
        (f"{variable} {name}", variable, lambda place, path=path: path, says)
        for variable in (REPOSITORY, DATA)
        for name, path, says in (
            ("root", "/", "is not a plain path"),
            ("relative", "orion-triage", "is not an absolute path"),
            ("tilde", "~/orion-triage", "is not an absolute path"),
            ("blank", " ", "is not an absolute path"),
            ("upwards", "/data/../orion-triage", "is not a plain path"),
            ("double slash", "//data", "is not a plain path"),
            ("slash at the end", "/data/", "is not a plain path"),
            ("system folder", "/usr", ""),
            ("homes", "/home", ""),
        )
    ),
    ("repository is a home", REPOSITORY, _in_a_home, "is or contains the home folder"),
    ("dataset is a home", DATA, lambda p: _also_a_dataset(p, p.server.home), "is or contains the home"),
    ("dataset holds a home", DATA, lambda p: _also_a_dataset(p, p.server.folder), "contains the home"),
    ("repository is a link", REPOSITORY, lambda p: _link(p, "r", p.repository), "is a link"),
    ("dataset is a link", DATA, lambda p: _link(p, "d", p.data), "is a link"),
    ("repository through a link", REPOSITORY, lambda p: _link(p, "l", p.there) + "/orion-triage", "through a link"),
    ("dataset through a link", DATA, lambda p: _link(p, "l", p.there) + "/orion_data", "through a link"),
    ("repository is a dataset", REPOSITORY, lambda p: str(p.data), "not a checkout of ORION"),
    ("dataset is a repository", DATA, lambda p: str(p.repository), "not an ORION dataset"),
    ("no git", REPOSITORY, lambda p: (p.repository / ".git").rename(p.there / "git") and str(p.repository), "checkout"),
    ("another project", REPOSITORY, lambda p: _dirty(p, "pyproject.toml", 'name = "orion"\n'), "not a checkout"),
    ("changed", REPOSITORY, lambda p: _dirty(p, "pyproject.toml", 'name = "orion-triage"\n#'), "uncommitted changes"),
    ("untracked", REPOSITORY, lambda p: _dirty(p, "notes.txt", "mine"), "uncommitted changes"),
    ("unpublished", REPOSITORY, lambda p: commit(p.repository, "mine") and str(p.repository), "exist nowhere else"),
    ("stashed", REPOSITORY, _stashed, "exist nowhere else"),
    ("other weights", REPOSITORY, _other_weights, "runs/other/orion_lora_weights"),
    ("half a dataset", DATA, lambda p: (p.data / "val_dataset.jsonl").unlink() or str(p.data), "not an ORION dataset"),
    ("no frames", DATA, lambda p: shutil.rmtree(p.data / "orion_dataset") or str(p.data), "not an ORION dataset"),
    ("more than a dataset", DATA, lambda p: (p.data / "thesis.tex").write_text("x") and str(p.data), "thesis.tex"),
    ("hidden in a dataset", DATA, lambda p: (p.data / ".ssh").mkdir() or str(p.data), ".ssh"),
    ("dataset holds the repository", REPOSITORY, lambda p: _moved_into(p.repository, _images(p)), "contains"),
    ("repository holds the dataset", DATA, lambda p: _moved_into(p.data, p.repository / "runs"), "contains"),
    ("dataset holds the weights", WEIGHTS, lambda p: _moved_into(p.weights, _images(p)), "contains"),
    ("weights hold the repository", WEIGHTS, lambda p: str(p.there), "contains"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("variable", "path", "says"), [case[1:] for case in REFUSALS], ids=[case[0] for case in REFUSALS]
)
def test_what_could_hit_something_else_is_refused(
    trained_server: tuple[Server, Path], tmp_path: Path, variable: str, path: Callable[[Place], str], says: str
) -> None:
    server, template = trained_server
    place = Place(server, tmp_path, server.home / "one")
    shutil.copytree(template, place.there, symlinks=True)
    home = set(server.home.iterdir()) | set(server.folder.iterdir())
    try:
        place.variables[variable] = path(place)
        before = tree(server.home)
        place.refused("download_weights.sh", says, variable)
        assert tree(server.home) == before
        assert not place.local_weights.exists()
    finally:
        shutil.rmtree(place.there)
        for path_made in {*server.home.iterdir(), *server.folder.iterdir()} - home:
            (shutil.rmtree if path_made.is_dir() else Path.unlink)(path_made)


@pytest.fixture(scope="module")
def trained_server(server: Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[Server, Path]:
    """The server, and a folder as it is after an upload and a training, to be copied."""
    place = Place(server, tmp_path_factory.mktemp("template"), server.home / "template").trained()
    return server, Path(shutil.move(place.there, place.here / "there"))


def test_a_repository_in_which_a_process_works_is_not_deleted(place: Place) -> None:
    before = tree(place.trained().there)
    with subprocess.Popen(["sleep", "60"], cwd=place.repository / "runs") as process:
        place.refused("download_weights.sh", "a process works in", "/runs")
        process.kill()
    assert tree(place.there) == before
    place.download()


def test_an_upload_replaces_only_a_dataset(place: Place) -> None:
    make_repository(place.source)
    make_dataset(place.local_data, 1)
    place.data.mkdir(parents=True)
    (place.data / "thesis.tex").write_text("x")
    before = tree(place.there)
    place.refused("upload_to_server.sh", "ORION_SERVER_DATA_PATH", "not an ORION dataset")
    assert tree(place.there) == before
    place.variables = {"ORION_SERVER_DATA_PATH": str(place.server.home)}
    place.refused("upload_to_server.sh", "is or contains the home")
    place.variables = {"ORION_REPO_DIR": str(place.data)}
    place.refused("upload_to_server.sh", "contains")
    place.variables = {"ORION_SERVER_HDD_PATH": _link(place, "link", place.there)}
    place.refused("upload_to_server.sh", "reached through a link", str(place.data))


def test_folders_here_that_are_no_weights_are_left_alone(place: Place) -> None:
    place.trained()
    for name in ("orion_lora_weights", "orion_lora_weights.previous"):
        (place.here / name).mkdir()
        (place.here / name / "mine.txt").write_text("x")
        place.refused("download_weights.sh", f"{name} exists and contains no weights")
        shutil.rmtree(place.here / name)
    place.variables["ORION_LOCAL_WEIGHTS_DIR"] = "/"
    place.refused("download_weights.sh", "is not the name of a folder")


@pytest.mark.parametrize("script", ["upload_to_server.sh", "download_weights.sh"])
def test_a_wrong_key_a_wrong_host_key_and_an_odd_server_are_refused(place: Place, script: str) -> None:
    place.trained(1)
    make_dataset(place.local_data, 2)
    before = tree(place.there)
    place.variables["ORION_SSH"] = place.server.ssh_with("other")
    place.refused(script, "Permission denied", "the connection to 127.0.0.1 failed")
    place.variables.clear()
    place.server.trust("other")
    place.refused(script, "Host key verification failed", "the connection to 127.0.0.1 failed")
    place.server.trust("host")
    for odd in ("", "-oProxyCommand=touch x", "host; touch x", "a b"):
        place.variables["SERVER"] = odd
        place.refused(script, "SERVER")
    assert tree(place.there) == before
    assert not (place.here / "x").exists()
    place.variables.clear()
    assert place.call(script)[0] == 0


# --- the rest --------------------------------------------------------------------------------------------------


def test_strange_paths_and_words_work(place: Place) -> None:
    strange = Place(place.server, place.here / STRANGE, place.there / STRANGE)
    strange.variables = {
        "ORION_SERVER_DATA_PATH": str(strange.there / f"data {STRANGE}"),
        "ORION_REPO_DIR": str(strange.there / f"repo {STRANGE}"),
        "ORION_ARCHIVE_NAME": f"x {STRANGE}.gz",
    }
    make_repository(strange.source)
    make_dataset(strange.local_data, 1)
    os.utime(strange.local_data / "val_dataset.jsonl", (1, 1))
    (strange.local_data / "orion_dataset" / "images" / STRANGE).write_bytes(b"frame")
    strange.upload()
    data, repository = (Path(strange.variables[name]) for name in ("ORION_SERVER_DATA_PATH", "ORION_REPO_DIR"))
    assert tree(data) == tree(strange.local_data)
    weights = make_weights(repository / "runs" / STRANGE / "orion_lora_weights", 1)
    (weights / STRANGE).write_bytes(b"more")
    expected = tree(weights)
    strange.variables["ORION_SERVER_WEIGHTS_PATH"] = str(weights)
    strange.variables["ORION_LOCAL_WEIGHTS_DIR"] = f"{STRANGE}/weights"
    strange.download()
    assert tree(strange.here / STRANGE / "weights") == expected
    assert list(strange.there.iterdir()) == []
    assert list(place.there.iterdir()) == [strange.there]


def test_a_dry_run_prints_every_command_and_changes_nothing(place: Place) -> None:
    place.trained()
    make_dataset(place.local_data, 2)
    names = ("mv", "rm", "tar", "git", "sha256sum", "mkdir", "flock")
    before = tree(place.there), tree(place.here), place.server.log()
    printed = {}
    for script in ("upload_to_server.sh", "download_weights.sh"):
        status, printed[script] = place.call(script, "--dry-run")
        assert status == 0
        assert "rsync --protect-args --partial" in printed[script]
    assert (tree(place.there), tree(place.here), place.server.log()) == before  # the server was not even asked
    for script, output in printed.items():
        for name in names:
            path = place.server.tools / name
            path.write_text(f'#!/bin/sh\necho {name} >>{place.here}/called\nexec {program(name)} "$@"\n')
            path.chmod(0o755)
        (place.here / "called").write_text("")
        assert place.call(script)[0] == 0
        for name in set((place.here / "called").read_text().split()) - {"flock"}:
            assert f" {name} " in output, (script, name)
    assert "zstd\\ -T0" in printed["upload_to_server.sh"]
    assert str(place.repository) in printed["download_weights.sh"]


@pytest.mark.parametrize("script", ["upload_to_server.sh", "download_weights.sh"])
def test_help_and_mistakes(place: Place, script: str) -> None:
    status, output = place.call(script, "--help")
    assert status == 0
    assert "Example: " in output
    for variable in ("SERVER", "ORION_SERVER_HDD_PATH", "ORION_SERVER_DATA_PATH", "ORION_SSH"):
        assert f"\n{variable} " in output
    status, output = place.call(script, "--nothing")
    assert status == 2
    assert "there is no option '--nothing'" in output
    for variable, value in (("ORION_SERVER_HDD_PATH", "here"), ("ORION_SSH", "no-ssh-of-that-name")):
        place.variables = {variable: value}
        make_dataset(place.local_data, 1)
        place.refused(script, value)


def test_a_dataset_that_is_not_whole_is_not_sent(place: Place) -> None:
    make_repository(place.source)
    make_dataset(place.local_data, 1)
    shutil.rmtree(place.local_data / "orion_dataset" / "images")
    place.refused("upload_to_server.sh", "has no orion_dataset/images", "orion dataset")
    (place.local_data / "orion_dataset" / "images").mkdir()
    place.refused("upload_to_server.sh", "is empty")
    (place.local_data / "test_dataset.jsonl").unlink()
    place.refused("upload_to_server.sh", "has no test_dataset.jsonl")
    for name, says in (
        ("a/b.gz", "is not a file name"),
        ("-x.gz", "is not a file name"),
        ("x.tar", "does not end in .gz or .zst"),
    ):
        make_dataset(place.local_data, 1)
        place.variables["ORION_ARCHIVE_NAME"] = name
        place.refused("upload_to_server.sh", says)
    assert not place.there.exists()


def test_frames_that_are_links_arrive_as_files(place: Place) -> None:
    make_repository(place.source)
    make_dataset(place.here / "blobs", 1)
    make_dataset(place.local_data, 1)
    expected = tree(place.local_data)
    for frame in (place.local_data / "orion_dataset" / "images").iterdir():
        frame.unlink()
        frame.symlink_to(place.here / "blobs" / "orion_dataset" / "images" / frame.name)
    place.upload()
    assert tree(place.data) == expected


def test_the_scripts_are_clean() -> None:
    shellcheck = program("shellcheck", "apt-get update && apt-get install -y shellcheck")
    result = subprocess.run([shellcheck, "-x", *SCRIPTS.glob("*.sh")], capture_output=True, text=True, check=False)
    assert result.stdout == ""
    assert result.returncode == 0
