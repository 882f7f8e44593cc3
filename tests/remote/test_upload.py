"""upload_to_server.sh against a real sshd: cut off anywhere, it loses nothing, and the same command goes on."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.remote.cutting import CUTS, calls_to_interrupt, cuts, interrupt_before, run_and_cut
from tests.remote.place import SCRIPTS, Place, Tree, commit, git, make_dataset, make_repository, tree
from tests.remote.sshd import program, wait_until


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


def test_a_frame_that_changes_while_it_is_packed_is_not_taken(prepared: Place) -> None:
    old = tree(prepared.local_data)
    prepared.upload()
    new = make_dataset(prepared.local_data, 2)
    shim = prepared.here / "tools" / "tar"
    shim.parent.mkdir()
    shim.write_text(f"#!/bin/sh\necho changed >>'{new}/val_dataset.jsonl'\nexec {program('tar')} \"$@\"\n")
    shim.chmod(0o755)
    status, output = prepared.call("upload_to_server.sh", first_on_path=shim.parent)
    assert (status, output.count("error: ")) == (1, 1)
    assert "the old dataset is unchanged" in output
    assert tree(prepared.data) == old
    prepared.upload()
    assert tree(prepared.data) == tree(new)


def test_what_arrived_before_a_cut_is_verified(prepared: Place) -> None:
    shim = prepared.server.tools / "tar"
    shim.write_text("#!/bin/sh\nexit 1\n")
    shim.chmod(0o755)
    prepared.refused("upload_to_server.sh", "could not be unpacked")
    shim.unlink()
    archive = prepared.there / ".orion_data.orion-incoming" / "orion_data.tar.zst"
    arrived = bytearray(archive.read_bytes())
    arrived[100] ^= 1
    archive.write_bytes(arrived[: len(arrived) // 2])
    prepared.upload()
    assert tree(prepared.data) == tree(prepared.local_data)


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
    output = second.communicate(timeout=600)[0]
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
    process.communicate(timeout=600)
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
    if how != "folder":  # what follows is git's work in the checkout, wherever it came from
        return
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
