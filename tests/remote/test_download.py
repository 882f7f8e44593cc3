"""download_weights.sh against a real sshd: cut off anywhere, it loses nothing, and the same command goes on."""

import json
import resource
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.remote.cutting import CUTS, calls_to_interrupt, cuts, interrupt_before, run_and_cut
from tests.remote.place import SCRIPTS, Place, Tree, tree
from tests.remote.sshd import program


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


def test_what_an_earlier_attempt_left_is_not_among_the_weights(place: Place) -> None:
    new = tree(place.trained().weights)
    incoming = place.here / ".orion_lora_weights.incoming"
    incoming.mkdir()
    (incoming / "adapter_model.bin").write_bytes(b"of another training")
    place.download()
    assert tree(place.local_weights) == new


def test_weights_that_change_while_they_are_fetched_are_not_taken(place: Place) -> None:
    place.trained()
    shim = place.server.tools / "rsync"
    shim.write_text(f'#!/bin/sh\necho measured >{place.weights}/README.md\nexec {program("rsync")} "$@"\n')
    shim.chmod(0o755)
    place.refused("download_weights.sh", "changed during the download")
    assert not place.local_weights.exists()
    assert place.data.is_dir()
    shim.unlink()
    place.download()
    assert (place.local_weights / "README.md").read_text() == "measured\n"


def test_the_receipt_of_one_download_is_not_that_of_another(place: Place) -> None:
    place.trained()
    shim = place.server.tools / "mv"
    shim.write_text("#!/bin/sh\nexit 1\n")
    shim.chmod(0o755)
    place.refused("download_weights.sh", "the operation 'scorch' failed on the server")
    shim.unlink()
    place.variables["ORION_SERVER_HDD_PATH"] = str(place.there / "other")
    place.refused("download_weights.sh", "there are no weights in")
    place.variables.clear()
    assert "the weights are already in" in place.download()
    assert list(place.there.iterdir()) == []
    place.assert_nothing_partial()


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


def _rewrite_outputs(weights: Path) -> None:
    """A manifest that has a file of the weights that are here already."""
    record = json.loads((weights / "manifest.json").read_text())
    record["outputs"]["../orion_lora_weights/adapter_config.json"] = record["outputs"].pop("adapter_config.json")
    (weights / "manifest.json").write_text(json.dumps(record))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "adapter_config.json is missing": lambda weights: (weights / "adapter_config.json").unlink(),
    "does not have the sha256 in the manifest": lambda weights: (weights / "adapter_model.safetensors").write_bytes(
        b"x"
    ),
    "is not finished": lambda weights: (weights / "manifest.json").unlink(),
    "manifest.json is damaged": lambda weights: (weights / "manifest.json").write_text("{"),
    "manifest of fuse": lambda weights: (weights / "manifest.json").write_text('{"stage": "fuse", "outputs": {}}'),
    "is outside the folder": lambda weights: _rewrite_outputs(weights),
    "there are no weights": lambda weights: shutil.rmtree(weights),
}


def test_weights_that_are_not_whole_are_not_taken_and_nothing_is_deleted(place: Place) -> None:
    old = tree(place.trained(1).weights)
    place.download()
    place.trained(2)
    kept = shutil.copytree(place.weights, place.here / "kept")
    for says, damage in DAMAGES.items():
        damage(place.weights)
        before = tree(place.there)
        place.refused("download_weights.sh", says)
        assert tree(place.there) == before, says
        assert tree(place.local_weights) == old, says
        shutil.rmtree(place.weights, ignore_errors=True)
        shutil.copytree(kept, place.weights)
    place.download()
    assert tree(place.local_weights) == tree(kept)
