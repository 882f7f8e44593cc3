"""One user's folders here and on the server: what the tests of the scripts and of `orion remote` build and look at."""

import hashlib
import os
import random
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from orion_triage.runs.manifest import write_manifest
from tests.remote.sshd import Server

SCRIPTS = Path(__file__).parents[2] / "scripts"
Tree = dict[str, str]


def tree(folder: Path, *, without: tuple[str, ...] = (".orion-sha256sums",)) -> Tree:
    """Relative path -> sha256, link target or "folder" of all that is in it."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.name in without:
            continue
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
    return found


def make_dataset(folder: Path, seed: int, *, frames: int = 4, frame_bytes: int = 12_000) -> Path:
    """Lines and incompressible frames; what they say is not the scripts' business."""
    source = random.Random(seed)
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "orion_dataset" / "images").mkdir(parents=True)
    for split in ("train", "val", "test"):
        (folder / f"{split}_dataset.jsonl").write_text(f'{{"image": "{split}", "seed": {seed}}}\n')
    for number in range(frames):
        (folder / "orion_dataset" / "images" / f"place {number}.png").write_bytes(source.randbytes(frame_bytes))
    return folder


def mark_as_sent(dataset: Path) -> Path:
    """The listing that an upload leaves in a dataset."""
    files = sorted(path for path in dataset.rglob("*") if path.is_file() and path.name != ".orion-sha256sums")
    lines = (f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(dataset)}\n" for path in files)
    (dataset / ".orion-sha256sums").write_text("".join(lines))
    return dataset


def make_weights(folder: Path, seed: int, *, weight_bytes: int = 60_000) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(random.Random(seed).randbytes(weight_bytes))
    (folder / "adapter_config.json").write_text("{}")
    write_manifest(folder, stage="fine-tune", settings={}, inputs={}, seconds=1.0)
    return folder


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *identity, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def make_repository(folder: Path) -> Path:
    folder.mkdir(parents=True)
    git(folder, "init", "-q", "-b", "main")
    (folder / "pyproject.toml").write_text('[project]\nname = "orion-triage"\n')
    (folder / ".gitignore").write_text("runs/\n.venv/\n")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "first")
    return folder


def commit(repository: Path, text: str) -> str:
    (repository / "code.py").write_text(text)
    git(repository, "add", ".")
    git(repository, "commit", "-q", "-m", text)
    return git(repository, "rev-parse", "HEAD")


@dataclass
class Place:
    """One user's folder here and on the server, with the variables that the scripts read."""

    server: Server
    here: Path
    there: Path
    variables: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.here.mkdir(parents=True, exist_ok=True)

    @property
    def local_data(self) -> Path:
        return self.here / "dataset"

    @property
    def local_weights(self) -> Path:
        return self.here / "orion_lora_weights"

    @property
    def source(self) -> Path:
        return self.here / "source"

    @property
    def data(self) -> Path:
        return self.there / "orion_data"

    @property
    def repository(self) -> Path:
        return self.there / "orion-triage"

    @property
    def weights(self) -> Path:
        return self.repository / "runs" / "tiny" / "orion_lora_weights"

    def environment(self) -> dict[str, str]:
        return {
            **{name: value for name, value in os.environ.items() if not name.startswith(("ORION_", "SERVER"))},
            "SERVER": self.server.address,
            "ORION_SSH": self.server.ssh,
            "ORION_CACHE": str(self.here / "cache"),
            "ORION_SERVER_HDD_PATH": str(self.there),
            "ORION_LOCAL_DATA_DIR": str(self.local_data),
            "ORION_LOCAL_WEIGHTS_DIR": str(self.local_weights),
            "ORION_REPO_URL": str(self.source),
            **self.variables,
        }

    def popen(self, script: str, *options: str, first_on_path: Path | None = None) -> subprocess.Popen[str]:
        environment = self.environment()
        if first_on_path:
            environment["PATH"] = f"{first_on_path}:{environment['PATH']}"
        return subprocess.Popen(
            [SCRIPTS / script, *options],
            env=environment,
            cwd=self.here,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def call(self, script: str, *options: str, first_on_path: Path | None = None) -> tuple[int, str]:
        """Exit status and all output."""
        process = self.popen(script, *options, first_on_path=first_on_path)
        output = process.communicate(timeout=600)[0]
        return process.returncode, output

    def upload(self) -> str:
        status, output = self.call("upload_to_server.sh")
        assert status == 0, output
        return output

    def download(self, *options: str) -> str:
        status, output = self.call("download_weights.sh", *options)
        assert status == 0, output
        return output

    def refused(self, script: str, *words: str, status: int = 1) -> str:
        found, output = self.call(script)
        assert found == status, output
        assert len(re.findall("^error: ", output, re.MULTILINE)) == 1, output
        assert len(re.findall("^  fix: ", output, re.MULTILINE)) == 1, output
        for word in words:
            assert word in output, output
        return output

    def trained(self, seed: int = 1) -> "Place":
        """A server with dataset, checkout and finished weights, as after an upload and a training."""
        if not self.source.exists():
            make_repository(self.source)
        self.there.mkdir(parents=True, exist_ok=True)
        mark_as_sent(make_dataset(self.data, seed))
        if not self.repository.exists():
            git(self.here, "clone", "-q", str(self.source), str(self.repository))
        make_weights(self.weights, seed)
        return self

    def assert_nothing_partial(self) -> None:
        assert not [path.name for path in self.there.glob(".*")]
        assert not list((self.here / "cache" / "upload").glob("*"))
        assert not list(self.here.glob(".*"))
