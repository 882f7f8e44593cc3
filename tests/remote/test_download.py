"""download_weights.sh against a real sshd: cut off anywhere, it loses nothing, and the same command goes on."""

import resource
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.remote.cutting import CUTS, calls_to_interrupt, cuts, interrupt_before, run_and_cut
from tests.remote.place import SCRIPTS, Place, Tree, tree


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


DAMAGES: dict[str, Callable[[Path], object]] = {
    "adapter_config.json is missing": lambda weights: (weights / "adapter_config.json").unlink(),
    "does not have the sha256 in the manifest": lambda weights: (weights / "adapter_model.safetensors").write_bytes(
        b"x"
    ),
    "is not finished": lambda weights: (weights / "manifest.json").unlink(),
    "manifest.json is damaged": lambda weights: (weights / "manifest.json").write_text("{"),
    "manifest of fuse": lambda weights: (weights / "manifest.json").write_text('{"stage": "fuse", "outputs": {}}'),
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
