"""The two scripts against a real sshd: what they refuse and print. What they do: test_upload.py, test_download.py."""

import fcntl
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.remote.place import SCRIPTS, Place, commit, git, make_dataset, make_repository, make_weights, tree
from tests.remote.sshd import Server, program

STRANGE = "-a b'c\"d$HOME\n*\\é;`x`&"


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


def _with_a_link(folder: Path, part: str) -> str:
    (folder / part).rename(folder.with_name("elsewhere"))
    (folder / part).symlink_to(folder.with_name("elsewhere"))
    return str(folder)


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
    ("git behind a link", REPOSITORY, lambda p: _with_a_link(p.repository, ".git"), "not a checkout"),
    ("another project", REPOSITORY, lambda p: _dirty(p, "pyproject.toml", 'name = "orion"\n'), "not a checkout"),
    ("changed", REPOSITORY, lambda p: _dirty(p, "pyproject.toml", 'name = "orion-triage"\n#'), "uncommitted changes"),
    ("untracked", REPOSITORY, lambda p: _dirty(p, "notes.txt", "mine"), "uncommitted changes"),
    ("unpublished", REPOSITORY, lambda p: commit(p.repository, "mine") and str(p.repository), "exist nowhere else"),
    ("stashed", REPOSITORY, _stashed, "exist nowhere else"),
    ("other weights", REPOSITORY, _other_weights, "runs/other/orion_lora_weights"),
    ("half a dataset", DATA, lambda p: (p.data / "val_dataset.jsonl").unlink() or str(p.data), "not an ORION dataset"),
    ("no frames", DATA, lambda p: shutil.rmtree(p.data / "orion_dataset") or str(p.data), "not an ORION dataset"),
    ("frames behind a link", DATA, lambda p: _with_a_link(p.data, "orion_dataset/images"), "not an ORION dataset"),
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
    shim = place.server.tools / "sleep"
    shim.write_text(f"#!/bin/sh\necho $1 >>{place.here}/waits\n")  # no time passes there
    shim.chmod(0o755)
    with subprocess.Popen([program("sleep"), "60"], cwd=place.repository / "runs") as process:
        place.refused("download_weights.sh", "a process works in", "/runs")
        process.kill()
    assert (place.here / "waits").read_text() == "1\n" * 5  # for an rsync that has not noticed its end
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


@pytest.mark.parametrize(
    ("script", "folder", "says"),
    [
        ("upload_to_server.sh", "cache/upload", "another upload is running on this machine"),
        ("download_weights.sh", "", "another download to"),
    ],
)
def test_a_second_script_at_a_time_is_refused(place: Place, script: str, folder: str, says: str) -> None:
    place.trained()
    make_dataset(place.local_data, 2)
    (place.here / folder).mkdir(parents=True, exist_ok=True)
    before = tree(place.there)
    held = os.open(place.here / folder, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    try:
        place.refused(script, says)
    finally:
        os.close(held)
    assert tree(place.there) == before
    assert place.call(script)[0] == 0


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
