"""Nothing is deleted or overwritten on the server that was not fetched from there or sent from here."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from orion_triage.runs.manifest import write_manifest
from tests.remote.place import Place, Tree, commit, git, make_dataset, make_repository, make_weights, tree
from tests.remote.sshd import Server, program

IGNORED = "/runs/\n__pycache__/\n.venv/\n*.egg-info/\n.ruff_cache/\n/secrets/\n"


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def copy_dataset(place: Place, source: str = "directory") -> Path:
    """What `orion dataset` makes of the server's dataset in the run: the files, and a manifest with the settings."""
    folder = place.repository / "runs" / "tiny" / "dataset"
    shutil.copytree(place.data, folder, ignore=shutil.ignore_patterns(".orion-sha256sums"))
    settings = {"dataset": {"source": source, "folder": str(place.data) if source == "directory" else ""}}
    write_manifest(folder, stage="dataset", settings=settings, inputs={}, seconds=1.0, figures={"source": "directory"})
    return folder


@pytest.fixture(scope="module")
def template(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A server after an upload, a set-up and a training of the run "tiny"."""
    place = Place(server, tmp_path_factory.mktemp("template"), server.home / "cleanup")
    make_repository(place.source)
    (place.source / ".gitignore").write_text(IGNORED)
    commit(place.source, "what is ignored")
    place.trained()
    put(
        place.repository,
        ".venv/bin/python", ".venv/lib/new\nline", ".ruff_cache/0/a", "src/orion_triage/__pycache__/a.pyc",
        "src/orion_triage.egg-info/PKG-INFO", "runs/training-job/log", "runs/training-job/own.toml",
        "runs/tiny/.lock", "runs/tiny/settings.json", "runs/tiny/logs/a.log", "runs/tiny/fine_tune_work/tensorboard/a",
        "runs/tiny/fine_tune_work/checkpoints/checkpoint-9/optimizer.pt", "runs/tiny/fine_tune_work/fingerprint.txt",
    )  # fmt: skip
    copy_dataset(place)
    return Path(shutil.move(place.there, place.here / "there"))


@pytest.fixture
def there(place: Place, template: Path) -> Place:
    """The same server, with the paths of this test."""
    shutil.copytree(template, place.there, symlinks=True)
    return place


def test_what_was_fetched_and_what_can_be_made_again_goes(there: Place) -> None:
    weights = tree(there.weights)
    there.download()
    assert tree(there.local_weights) == weights
    assert list(there.there.iterdir()) == []


def exclude(place: Place, patterns: str) -> None:
    """Let git ignore more in this clone than its .gitignore says."""
    (place.repository / ".git" / "info" / "exclude").write_text(patterns)


def own_files(repository: Path) -> Tree:
    """All but what git keeps for itself."""
    return {name: value for name, value in tree(repository).items() if not name.startswith(".git/")}


def nested(place: Place, name: str, *words: str) -> None:
    (place.repository / name).mkdir(parents=True)
    git(place.repository / name, "init", "-q", *words)


def edited_copy(place: Place) -> None:
    path = place.repository / "runs" / "tiny" / "dataset" / "train_dataset.jsonl"
    path.write_text(path.read_text().replace("1", "2"))


def drawn_dataset(place: Place) -> None:
    shutil.rmtree(place.repository / "runs" / "tiny" / "dataset")
    copy_dataset(place, source="simsat")


def tag(place: Place) -> None:
    commit(place.repository, "mine")
    git(place.repository, "tag", "mine")
    git(place.repository, "reset", "-q", "--hard", "HEAD~1")


def hide_untracked(place: Place) -> None:
    git(place.repository, "config", "status.showUntrackedFiles", "no")
    put(place.repository, "notes.txt")


def hide(place: Place, how: str) -> None:
    (place.repository / "pyproject.toml").write_text('name = "orion-triage"\nedited')
    git(place.repository, "update-index", how, "pyproject.toml")


def hide_by_a_monitor(place: Place) -> None:
    """A program that watches the files for git, and missed a change."""
    monitor = place.here / "monitor"
    monitor.write_text("#!/bin/sh\nprintf 'now\\0'\n")
    monitor.chmod(0o755)
    git(place.repository, "config", "core.fsmonitor", str(monitor))
    git(place.repository, "update-index", "--fsmonitor")
    for _ in "ab":  # until git trusts it
        git(place.repository, "status")
    (place.repository / "pyproject.toml").write_text('name = "orion-triage"\nedited')


def hide_by_case(place: Place) -> None:
    git(place.repository, "config", "core.ignoreCase", "true")
    put(place.repository, "CODE.py")


def look_elsewhere(place: Place) -> None:
    shutil.copytree(place.repository, place.here / "other", ignore=shutil.ignore_patterns(".git"))
    git(place.repository, "config", "core.worktree", str(place.here / "other"))
    put(place.repository, "notes.txt")


def step_back(place: Place) -> None:
    commit(place.repository, "mine")
    git(place.repository, "reset", "-q", "--hard", "HEAD~1")


def stash(place: Place) -> None:
    (place.repository / "code.py").write_text("mine")
    git(place.repository, "stash", "-q")


def stage_elsewhere(place: Place) -> None:
    other = place.here / "other"
    git(place.repository, "worktree", "add", "-q", "--detach", str(other))
    put(other, "staged")
    git(other, "add", "staged")
    (other / "staged").write_text("again")


def leave_a_submodule(place: Place) -> None:
    """Once part of it, with commits of its own, which git keeps for the next time."""
    inner = make_repository(place.here / "inner")
    git(place.repository, "-c", "protocol.file.allow=always", "submodule", "add", "-q", str(inner), "inner")
    commit(place.repository / "inner", "mine")
    git(place.repository, "submodule", "deinit", "-q", "-f", "inner")
    git(place.repository, "rm", "-q", "-f", "inner", ".gitmodules")
    assert git(place.repository, "status", "--porcelain") == ""


def stop_a_rebase(place: Place) -> None:
    (place.repository / "code.py").write_text("mine")
    git(place.repository, "-c", "sequence.editor=echo break >", "rebase", "-q", "-i", "--autostash", "HEAD")
    assert git(place.repository, "status", "--porcelain") == ""


def many(place: Place) -> None:
    put(place.repository, *(f"runs/{number}/gguf/pair.gguf" for number in range(12)))


ONLY_COPIES: dict[str, tuple[Callable[[Place], object], tuple[str, ...]]] = {
    "checkpoints of another run": (
        lambda p: put(p.repository, "runs/b/fine_tune_work/checkpoints/checkpoint-1/optimizer.pt"),
        ("were not fetched and may exist nowhere else (1 in all)", "1 runs/b/fine_tune_work", "--keep-remote"),
    ),
    "weights of another run": (
        lambda p: make_weights(p.repository / "runs" / "b" / "orion_lora_weights", 2),
        ("(3 in all)", "3 runs/b/orion_lora_weights"),
    ),
    "settings of another run": (lambda p: put(p.repository, "runs/b/settings.json"), ("runs/b/settings.json",)),
    "dataset of another run": (
        lambda p: make_dataset(p.repository / "runs" / "b" / "dataset", 2),
        ("7 runs/b/dataset",),
    ),
    "merged model, pair and evaluation of this run": (
        lambda p: put(
            p.repository / "runs" / "tiny",
            *("orion_merged/model.safetensors", "gguf/pair.json", "gguf/a.gguf", "evaluation/test/a/scores.json"),
        ),
        ("(4 in all)", "2 runs/tiny/gguf", "1 runs/tiny/orion_merged", "1 runs/tiny/evaluation"),
    ),
    "a bundle of this run": (lambda p: put(p.repository / "runs" / "tiny", "bundle/serve.sh"), ("runs/tiny/bundle",)),
    "a user's file in this run": (lambda p: put(p.repository / "runs" / "tiny", "notes.txt"), ("runs/tiny/notes.txt",)),
    "beside its checkpoints": (
        lambda p: put(p.repository / "runs" / "tiny", "fine_tune_work/best/a.pt"),
        ("1 runs/tiny/fine_tune_work",),
    ),
    "a name that begins like an expendable one": (
        lambda p: put(p.repository, "runs/tiny/settings.json.old", "runs/training-job-2/log"),
        ("(2 in all)", "settings.json.old", "runs/training-job-2"),
    ),
    "an ignored folder": (lambda p: put(p.repository, "secrets/key"), ("1 secrets/key",)),
    "ignored by this clone only": (
        lambda p: (put(p.repository, "mine.bin"), exclude(p, "*.bin\n")),
        ("1 mine.bin",),
    ),
    "odd names": (
        lambda p: put(p.repository, "runs/-a b/é\nx", "runs/*/f", "runs/tiny/dataset\n/f", "runs/月/f"),
        ("(4 in all)", r"runs/-a b/é\nx", "runs/*/f", r"runs/tiny/dataset\n", "runs/月/f"),
    ),
    "a nested repository": (lambda p: nested(p, "runs/b"), ("another repository in it: ./runs/b/.git",)),
    "a nested repository in a cache": (lambda p: nested(p, ".venv/src/x"), ("./.venv/src/x/.git",)),
    "a nested repository among checkpoints": (
        lambda p: nested(p, "runs/tiny/fine_tune_work/checkpoints/x"),
        ("another repository in it",),
    ),
    "a bare repository": (lambda p: nested(p, "runs/b.git", "--bare"), ("runs/b.git/HEAD",)),
    "a dataset kept in the clone": (lambda p: make_dataset(p.repository / "runs" / "data", 2), ("(7 in all)",)),
    "the run's dataset, corrected there": (edited_copy, ("8 runs/tiny/dataset",)),
    "the run's dataset, made there": (drawn_dataset, ("8 runs/tiny/dataset",)),
    "a file in the run's dataset": (lambda p: put(p.repository, "runs/tiny/dataset/notes"), ("9 runs/tiny/dataset",)),
    "untracked, where git is set to list none": (hide_untracked, ("uncommitted changes: ?? notes.txt",)),
    "an edit that git was told not to expect": (
        lambda p: hide(p, "--assume-unchanged"),
        ("a file whose changes git was told to overlook: pyproject.toml",),
    ),
    "an edit that git was told to skip": (lambda p: hide(p, "--skip-worktree"), ("to overlook: pyproject.toml",)),
    "an edit that a monitor missed": (hide_by_a_monitor, ("uncommitted changes:  M pyproject.toml",)),
    "a name that differs by case": (hide_by_case, ("uncommitted changes: ?? CODE.py",)),
    "files that git does not look at": (look_elsewhere, ("whose files lie elsewhere (core.worktree)",)),
    "a run that is named like build products": (
        lambda p: put(p.repository, "runs/b.egg-info/w.safetensors", "x.egg-info/PKG-INFO"),
        ("(2 in all)", "1 runs/b.egg-info/w.safetensors"),
    ),
    "a file among compiled ones": (
        lambda p: put(p.repository, "x/__pycache__/a.pyc", "x/__pycache__/notes.txt"),
        ("(1 in all)", "1 x/__pycache__/notes.txt"),
    ),
    "a commit that was stepped back from": (step_back, ("commits that only its reflog still names",)),
    "a stash": (stash, ("commits that exist nowhere else",)),
    "what is staged in another worktree": (stage_elsewhere, (".git/worktrees",)),
    "commits of a former submodule": (leave_a_submodule, (".git/modules",)),
    "what a rebase has put away": (stop_a_rebase, (".git/rebase-merge",)),
    "a tag on commits of its own": (tag, ("commits that exist nowhere else",)),
    "more than fit on the screen": (many, ("(12 in all)", "1 runs/10/gguf", "  ...")),
    "a file added to the dataset": (lambda p: put(p.data, "labels.csv"), ("DATA_PATH", "(1 in all)", " labels.csv")),
    "a corrected label in the dataset": (
        lambda p: (p.data / "val_dataset.jsonl").write_text("corrected\n"),
        ("DATA_PATH", "no upload brought, or that changed since", " val_dataset.jsonl"),
    ),
    "a dataset that was made there": (
        lambda p: (p.data / ".orion-sha256sums").unlink(),
        ("since (7 in all)",),
    ),
}


@pytest.mark.parametrize(("add", "says"), ONLY_COPIES.values(), ids=ONLY_COPIES)
def test_what_exists_nowhere_else_is_named_and_stays(
    there: Place, add: Callable[[Place], object], says: tuple[str, ...]
) -> None:
    add(there)
    before = tree(there.there)
    there.refused("download_weights.sh", *says)
    assert tree(there.there) == before


@pytest.mark.parametrize("where", ["runs/tiny/final", "secrets/orion_lora_weights", "outside"])
def test_weights_elsewhere_do_not_make_the_rest_of_a_run_expendable(there: Place, where: str) -> None:
    weights = there.there / "orion_lora_weights" if where == "outside" else there.repository / where
    weights.parent.mkdir(exist_ok=True)
    there.weights.rename(weights)
    there.variables["ORION_SERVER_WEIGHTS_PATH"] = str(weights)
    there.refused(
        "download_weights.sh", "3 runs/tiny/fine_tune_work", "1 runs/tiny/settings.json", "8 runs/tiny/dataset"
    )
    shutil.rmtree(there.repository / "runs" / "tiny", ignore_errors=where == "outside")
    if where.startswith("runs"):
        make_weights(weights, 1)
    there.download()
    assert [path.name for path in there.there.iterdir()] == (["orion_lora_weights"] if where == "outside" else [])


def test_the_name_of_the_fetched_run_is_no_pattern(there: Place) -> None:
    run = there.repository / "runs" / "*"
    (there.repository / "runs" / "tiny").rename(run)
    put(there.repository, "runs/b/settings.json")
    there.variables["ORION_SERVER_WEIGHTS_PATH"] = str(run / "orion_lora_weights")
    there.refused("download_weights.sh", "(1 in all)", "1 runs/b/settings.json")
    (there.repository / "runs" / "b" / "settings.json").unlink()
    there.download()
    assert list(there.there.iterdir()) == []


@pytest.mark.parametrize(
    ("added", "says"),
    [
        ("runs/tiny/orion_lora_weights/README.md", "has changed since it was downloaded"),
        ("runs/tiny/notes.txt", "were not fetched and may exist nowhere else (1 in all)"),
    ],
)
def test_what_comes_while_the_weights_are_fetched_is_not_deleted(there: Place, added: str, says: str) -> None:
    shim = there.server.tools / "rsync"
    shim.write_text(f'#!/bin/sh\n{program("rsync")} "$@"\necho mine >{there.repository}/{added}\n')
    shim.chmod(0o755)
    there.refused("download_weights.sh", says)
    assert (there.repository / added).read_text() == "mine\n"
    assert there.data.is_dir()
    shim.unlink()
    (there.repository / added).unlink()
    there.download()
    assert list(there.there.iterdir()) == []


def test_weights_that_changed_after_a_first_download_are_fetched_again(there: Place) -> None:
    there.download("--keep-remote")
    (there.weights / "README.md").write_text("measured on the server")
    there.download()
    assert (there.local_weights / "README.md").read_text() == "measured on the server"
    assert list(there.there.iterdir()) == []


def test_commits_that_a_later_upload_replaced_do_not_keep_the_checkout(place: Place) -> None:
    """They are in the reflog of the checkout; but an upload brought them."""
    make_repository(place.source)
    make_dataset(place.local_data, 1)
    for text in ("first", "rewritten"):
        git(place.source, "commit", "-q", "--amend", "-m", text)
        place.upload()
    make_weights(place.weights, 1)
    place.download()
    assert list(place.there.iterdir()) == []


def test_a_new_revision_does_not_overwrite_edits_that_git_was_told_to_overlook(prepared: Place) -> None:
    prepared.upload()
    hide(prepared, "--assume-unchanged")
    (prepared.source / "pyproject.toml").write_text('name = "orion-triage"\n')
    commit(prepared.source, "newer")
    prepared.refused("upload_to_server.sh", "ORION_REPO_DIR", "told to overlook: pyproject.toml")
    assert "edited" in (prepared.repository / "pyproject.toml").read_text()
    git(prepared.repository, "update-index", "--no-assume-unchanged", "pyproject.toml")
    prepared.refused("upload_to_server.sh", "uncommitted changes:  M pyproject.toml")


def test_a_new_dataset_does_not_replace_what_was_added_to_the_old_one(place: Place) -> None:
    make_repository(place.source)
    make_dataset(place.local_data, 1)
    place.upload()
    labels = place.data / "train_dataset.jsonl"
    sent = labels.read_text()
    labels.write_text("corrected there")
    before = tree(place.there)
    place.refused("upload_to_server.sh", "ORION_SERVER_DATA_PATH", "(1 in all)", " train_dataset.jsonl")
    make_dataset(place.local_data, 2)
    place.refused("upload_to_server.sh", " train_dataset.jsonl")
    assert tree(place.there) == before
    labels.write_text(sent)
    place.upload()
    assert tree(place.data) == tree(place.local_data)


def test_a_new_revision_does_not_overwrite_files_that_git_does_not_track(place: Place) -> None:
    make_repository(place.source)
    put(place.source, "tracked/a", "b")
    commit(place.source, "a folder and a file that change places")
    make_dataset(place.local_data, 1)
    place.upload()
    exclude(place, "*.bin\nmine/\ninner/\n")
    put(place.repository, "a.bin", "new/b\n.bin", "mine/kept/c", "x.bin", "stays")
    (place.repository / "l.bin").symlink_to(place.here)
    nested(place, "inner")
    put(place.repository, "inner/f")
    git(place.source, "rm", "-q", "-r", "tracked", "b")
    put(place.source, "tracked", "b/c", "fresh/g")
    put(place.source, "a.bin", "new/b\n.bin", "mine", "x.bin/deeper/d", "l.bin/e", "inner/f")
    git(place.source, "add", "-f", ".")
    git(place.source, "commit", "-q", "-m", "tracks what lies there")
    files = own_files(place.repository)
    said = place.refused("upload_to_server.sh", "has files that the new revision would overwrite")
    lines = said.partition("overwrite:\n")[2].partition("  fix: ")[0].splitlines()
    assert sorted(lines) == [".bin", "a.bin", "inner/f", "l.bin", "mine/kept/c", "new/b", "x.bin"]
    assert own_files(place.repository) == files
    for name in ("a.bin", "new", "mine", "x.bin", "l.bin", "inner"):
        (place.repository / name).rename(place.here / name)
    place.upload()
    assert git(place.repository, "status", "--porcelain") == "?? stays"
    assert (place.repository / "b" / "c").is_file()
