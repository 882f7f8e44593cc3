"""The pages say what the code does: links, command reference, variables, paths."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SOURCES = sorted((ROOT / "src").rglob("*.py"))
SCRIPTS = [*(ROOT / "scripts").glob("*.sh"), ROOT / "src" / "orion_triage" / "flight" / "serve.sh.j2"]


def build(folder: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(folder), str(out)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_site_builds_with_every_link_and_asks_no_other_site(tmp_path: Path) -> None:
    result = build(DOCS, tmp_path / "site")
    assert result.returncode == 0, result.stderr
    pages = {path.stem for path in DOCS.glob("*.md")}
    assert pages == {path.stem for path in (tmp_path / "site").glob("*.html")} - {"genindex", "search"}
    for page in (tmp_path / "site").glob("*.html"):
        fetched = re.findall(r"<(?:script|link|img)\b[^>]*(?:src|href)=\"(\w+:)?//[^\"]*\"", page.read_text())
        assert fetched == [], page.name
    for style in (tmp_path / "site" / "_static").rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*['\"]?(https?:)?//", style.read_text()), style.name


def test_a_dead_link_fails_the_build(tmp_path: Path) -> None:
    dead = {
        "[x](gone.md)": "target not found: 'gone.md'",
        "[x](training.md#gone)": "local id not found in doc 'training': 'gone'",
        "[x](accelerate/gone.yaml)": "target not found: 'accelerate/gone.yaml'",
        "![x](gone.png)": "image file not readable: gone.png",
    }
    (tmp_path / "conf.py").write_text((DOCS / "conf.py").read_text())
    (tmp_path / "_static").mkdir()
    (tmp_path / "index.md").write_text("# Index\n\n" + "\n\n".join(dead) + "\n\n```{toctree}\ntraining\n```\n")
    (tmp_path / "training.md").write_text("# Training\n")
    result = build(tmp_path, tmp_path / "site")
    assert result.returncode == 1
    assert [complaint for complaint in dead.values() if complaint not in result.stderr] == []


def test_links_of_the_readme_lead_somewhere() -> None:
    tokens = [child for token in MarkdownIt().parse((ROOT / "README.md").read_text()) for child in token.children or []]
    links = [
        str(token.attrs.get("href") or token.attrs.get("src"))
        for token in tokens
        if token.type in ("link_open", "image")
    ]
    assert "docs/report.png" in links
    for link in links:
        name, _, anchor = link.partition("#")
        assert (ROOT / name).is_file(), link
        assert not anchor or anchor in anchors_of(ROOT / name), link


def anchors_of(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_pages_and_files_that_messages_name_exist() -> None:
    named = {name for path in SOURCES for name in re.findall(r"\bdocs/[\w./-]+\.\w+", path.read_text())}
    assert len(named) > 2
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def test_the_command_reference_is_the_help_of_every_command() -> None:
    result = subprocess.run([sys.executable, DOCS / "command_reference.py"], capture_output=True, text=True, check=True)
    committed = (DOCS / "commands.md").read_text()
    assert committed == result.stdout, "python docs/command_reference.py > docs/commands.md"
    sections = re.split(r"^## ", committed, flags=re.MULTILINE)[1:]
    assert [section.splitlines()[0] for section in sections if "Example: `orion " not in section] == []


def test_every_environment_variable_is_documented_and_read() -> None:
    table = re.findall(r"^\| (`[A-Z].*?) \|", (DOCS / "environment.md").read_text(), re.MULTILINE)
    documented = {name for cell in table for name in re.findall(r"\w+", cell)}
    python = "\n".join(path.read_text() for path in SOURCES)
    read = set(re.findall(r"environ(?:ment)?(?:\.get\(|\[)\s*[\"'](\w+)[\"']", python))
    read |= set(re.findall(r"envvar=\"(\w+)\"", python))
    shell = "\n".join(path.read_text() for path in SCRIPTS)
    read |= set(re.findall(r"\$\{((?:ORION|LLAMA)_\w+|SERVER)\b", shell))
    assert len(read) > 20
    assert sorted(read - documented) == []
    ours = {name for name in documented if name.startswith(("ORION_", "LLAMA_")) or name == "SERVER"}
    assert sorted(ours - read) == []


def test_the_layout_on_the_architecture_page_is_the_projects() -> None:
    tree = re.search(r"```text\n(.*?)```", (DOCS / "architecture.md").read_text(), re.DOTALL)
    assert tree is not None
    package = ROOT / "src" / "orion_triage"
    named: set[Path] = set()
    folder = package
    for line in tree[1].splitlines():
        place = package if line.startswith("  ") else ROOT
        for word in re.findall(r"[\w/]+(?:/|\.py)(?= |$)", line):
            if word.endswith("/") and line.lstrip().startswith((word, "settings.py")):  # the line's own folder
                folder = place / word
            path = place / word if word.endswith("/") or (place / word).is_file() else folder / word
            path = path if path.exists() else folder / word
            assert path.exists(), f"{word}: {line}"
            named.add(path)
    rooms = {path for path in package.iterdir() if (path / "__init__.py").is_file() or path.suffix == ".py"}
    assert sorted(path.name for path in rooms - named) == ["__init__.py"]
