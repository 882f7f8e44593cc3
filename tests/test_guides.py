"""Every command block of the guides is run, page by page and in order, each page on a copy of the tests' finished run.

A block under the comment <!-- not run: REASON --> is left out. The reasons are REASONS, "see PLACE" and "minutes, see
PLACE", where PLACE is the file or the test that runs it instead, or checks what it made. If it is a page, the commands
stand there in the same words.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from orion_triage.llama_cpp.toolchain import find_toolchain

from . import warm
from .conftest import run_command

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
GENERATED = {"commands.md"}  # from the command line's own help, which is not for copying
REASONS = {"GPU", "network", "Raspberry Pi", "server"}
SECONDS_OF_A_PAGE = 1800  # it ends a page that hangs: one that runs takes seconds, or minutes on a busy machine
MOST_NOT_RUN = 43  # may only fall
UNSET = ("ORION_SERVER", "LLAMA_")  # of the environment: a reader has none of them
KEPT = ("LLAMA_ARG_THREADS",)  # beside another worker, two threads that wait for each other take six times as long

# A guide's run has 360 places and five epochs, the tests' 36 and two. These commands make the stages of a run.
# The program is the one of search_path, even where a page activates the environment: only --help starts that one's own.
STAGES = "run|dataset|ablation|fine-tune|fuse|quantize|evaluate"
PREAMBLE = f"""
set -euo pipefail
program=$(command -v orion || true)
orion() {{
    case "$1 ${{2:-}}" in
        "--help ") command orion "$@" ;;
        "dataset check" | "dataset new" | "dataset view") "$program" "$@" ;;
        *) case "$1" in
            {STAGES}) "$program" "$1" {shlex.join(run_command()[3:])} "${{@:2}}" ;;
            *) "$program" "$@" ;;
        esac ;;
    esac
}}
"""


@dataclass(frozen=True)
class Block:
    """One `sh` fence: its page, the line of its first command, and why it is not run, if it is not."""

    page: str
    line: int
    text: str
    not_run: str = ""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


class GuideError(Exception):
    """A page that the test cannot vouch for."""


def blocks_of(page: str, text: str) -> list[Block]:
    """The page's command blocks; raises GuideError for an unknown reason, and for commands in another block."""
    found = []
    above = ""
    for token in MarkdownIt().parse(text):
        if token.type == "html_block":
            above = token.content.strip()
            continue
        if token.type in ("fence", "code_block"):
            assert token.map is not None
            block = Block(page, token.map[0] + 2, token.content, _reason(page, above))
            if token.info == "sh":
                found.append(block)
            elif re.search(r"^\s*(\$ |orion |make |scripts/\w|python|pip |sudo |git )", token.content, re.MULTILINE):
                raise GuideError(f"{block}: commands in a block of {token.info or 'no language'} instead of sh")
        if token.level == 0:
            above = ""
    return found


def _reason(page: str, comment: str) -> str:
    if not comment.startswith("<!-- not run"):
        return ""
    match = re.fullmatch(r"<!-- not run: (.+) -->", comment)
    reason = match[1] if match else comment
    place = re.fullmatch(r"(?:minutes, )?see ([\w./-]+?)(?:::(\w+))?", reason)
    if place:
        path = ROOT / place[1]
        if not path.is_file() or (place[2] and f"def {place[2]}(" not in path.read_text(encoding="utf-8")):
            raise GuideError(f"{page}: {reason}: there is no such test")
    elif reason not in REASONS:
        raise GuideError(f"{page}: {reason!r} is no known reason for not running a block")
    return reason


def pages() -> list[Path]:
    """README.md and every page of docs/, in the order of the site's menu."""
    menu = re.findall(r"^[\w-]+$", (DOCS / "index.md").read_text(encoding="utf-8"), re.MULTILINE)
    return [ROOT / "README.md", *(DOCS / f"{name}.md" for name in menu if f"{name}.md" not in GENERATED)]


def blocks_of_page(path: Path) -> list[Block]:
    return blocks_of(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))


def run_on(path: Path) -> list[Block]:
    """The blocks of a page that the tests run."""
    return [block for block in blocks_of_page(path) if not block.not_run]


def commands_of(blocks: Iterable[Block]) -> set[str]:
    """The lines of the blocks, without comments."""
    return {line.partition(" #")[0].strip() for block in blocks for line in block.text.splitlines()}


def run_blocks(blocks: list[Block], folder: Path, path: str) -> tuple[int, str]:
    """Exit status and output of the blocks that are run, in one shell, which ends at the first failure."""
    script = [PREAMBLE, *(f"echo '=== {block}' >&2\n{block.text}" for block in blocks if not block.not_run)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(UNSET) or name in KEPT}
    process = subprocess.Popen(
        ["bash", "-c", "\n".join(script)],
        cwd=folder,
        env=environment | {"PATH": path, "COLUMNS": "120"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=SECONDS_OF_A_PAGE)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what a block left running
    return process.returncode, output


@pytest.fixture
def search_path(tmp_path: Path) -> str:
    """PATH of a reader who has activated the environment, and to whom 'orion toolchain' has named llama-server."""
    own = [Path(sys.executable).parent, find_toolchain().llama_server.parent]
    if warm.is_possible():
        own.insert(0, warm.shim(tmp_path / "bin").parent)
    return os.pathsep.join([*map(str, own), os.environ["PATH"]])


@pytest.fixture
def readers_folder(finished: Path, tmp_path: Path) -> Path:
    """What a reader has at the start of a page: the project, a finished run in runs/tiny, runs beside it, pictures."""
    folder = tmp_path / "reader"
    run = folder / "runs" / "tiny"
    shutil.copytree(finished / "runs" / "small", run)
    shutil.copy(finished / "places.csv", folder)
    for name in ("seed-43", "seed-44"):
        shutil.copytree(run, folder / "runs" / name)
    for picture in sorted((run / "dataset" / "orion_dataset" / "images").iterdir())[::3]:  # four of each category
        own = folder / "my-frames" / picture.name.split("_")[0].upper()
        own.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, own)
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / "scripts").symlink_to(ROOT / "scripts")
    return folder


@pytest.mark.llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in pages() if run_on(path)], ids=lambda path: path.stem)
def test_every_command_of_the_guides_runs(path: Path, readers_folder: Path, search_path: str) -> None:
    status, output = run_blocks(blocks_of_page(path), readers_folder, search_path)
    assert status == 0, output[-3000:]
    assert not re.search(r"^(fine-tune|fuse|quantize): done in", output, re.MULTILINE), "a guide trains again"
    shutil.rmtree(readers_folder)  # 50 MB


def test_blocks_that_are_not_run_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    left_out = [block for path in pages() for block in blocks_of_page(path) if block.not_run]
    lines = [f"  {block} ({block.not_run}): {block.text.splitlines()[0]}" for block in left_out]
    with capsys.disabled():
        sys.stdout.write("\n".join(["", "command blocks of the guides that are not run:", *lines, ""]))
    assert {block.not_run for block in left_out} >= REASONS
    assert len(left_out) <= MOST_NOT_RUN, "run the new block, or another one instead"


def test_what_another_page_runs_stands_there_in_the_same_words() -> None:
    pointers = [
        (block, ROOT / place[1])
        for path in pages()
        for block in blocks_of_page(path)
        if (place := re.fullmatch(r"see (\S+\.md)", block.not_run))
    ]
    assert [str(block) for block, other in pointers if not commands_of([block]) <= commands_of(run_on(other))] == []
    assert {block.page for block, _ in pointers} == {"README.md"}


def test_a_wrong_command_in_a_guide_fails_and_is_named(tmp_path: Path) -> None:
    good, left_out, bad = "true", "<!-- not run: GPU -->\n```sh\nexit 7", "ls gone\ntouch reached"
    text = f"# Page\n\n```sh\n{good}\n```\n\n{left_out}\n```\n\n```sh\n{bad}\n```\n"
    status, output = run_blocks(blocks_of("page.md", text), tmp_path, os.environ["PATH"])
    assert status != 0
    assert "=== page.md:4\n=== page.md:13\n" in output
    assert not (tmp_path / "reached").exists()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("<!-- not run: later -->\n```sh\ntrue\n```", "'later' is no known reason"),
        ("<!-- not run -->\n```sh\ntrue\n```", "no known reason"),
        ("<!-- not run: minutes, see tests/test_cli.py::test_gone -->\n```sh\ntrue\n```", "no such test"),
        ("<!-- not run: minutes, see tests/gone.py -->\n```sh\ntrue\n```", "no such test"),
        ("```\norion run\n```", "page.md:2: commands in a block of no language"),
        ("1. First\n\n   ```bash\n   make run\n   ```", "commands in a block of bash"),
        ("    orion run\n", "commands in a block of no language"),
    ],
)
def test_a_page_that_hides_commands_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(GuideError, match=re.escape(complaint)):
        blocks_of("page.md", text)


def test_a_reason_holds_for_the_next_block_only() -> None:
    comment, block = "<!-- not run: GPU -->\n", "```sh\ntrue\n```\n\n"
    text = f"{comment}{block}{block}{comment}\ntext\n\n{block}"
    assert [block.not_run for block in blocks_of("page.md", text)] == ["GPU", "", ""]
