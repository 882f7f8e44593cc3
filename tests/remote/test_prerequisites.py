"""What the server needs for `make setup` and a training is checked before anything is sent, and before it trains.

A server without a tool is this one with another PATH: a folder of links to everything but that tool, which a wrapper
around ssh sets there. A Python without ensurepip (Debian's without python3-venv) or of another version is a real one
in which a module says so.
"""

import os
import sys
from pathlib import Path

from tests.remote.place import Place, tree

COMPILERS = ("c++", "g++", "clang++")


def without(place: Place, *names: str) -> Path:
    """Let the server's PATH have everything but these programs and every Python; returns its only folder."""
    folder = place.here / "bin"
    folder.mkdir()
    for directory in os.environ["PATH"].split(":"):
        for path in Path(directory).glob("*"):
            link = folder / path.name
            if path.name not in names and not path.name.startswith("python") and not link.is_symlink():
                link.symlink_to(path)
    wrapper = place.here / "ssh-to-it"
    # `ssh HOST COMMAND...`, as scripts and rsync call it
    wrapper.write_text(f'#!/bin/sh\nhost=$1\nshift\nexec {place.server.ssh} "$host" "PATH={folder} exec $*"\n')
    wrapper.chmod(0o755)
    place.variables["ORION_SSH"] = str(wrapper)
    return folder


def add_python(place: Path, name: str, **modules: str) -> None:
    """A Python of that name in the folder, with these modules before its own."""
    library = place / f"lib-{name}"
    library.mkdir()
    for module, text in modules.items():
        (library / f"{module}.py").write_text(text)
    path = place / name
    path.write_text(f'#!/bin/sh\nPYTHONPATH={library} exec {sys.executable} "$@"\n')
    path.chmod(0o755)


def old(version: str) -> str:
    return f"import sys\nsys.version_info = ({', '.join(version.split('.'))}, 'final', 0)\n"


def refused(place: Place, *words: str) -> None:
    place.refused("upload_to_server.sh", "the server cannot run 'make setup'", *words)
    assert not place.there.exists()  # nothing was sent


def test_a_server_without_make_and_python_is_refused(prepared: Place) -> None:
    folder = without(prepared, "make")
    refused(
        prepared, "no make", "Python 3.11 or newer, and python3 is not there", "apt install make python3.11 python3.11"
    )
    prepared.variables["ORION_SERVER_SETUP"] = "another command"
    prepared.upload()
    prepared.variables["ORION_SERVER_SETUP"] = "make setup"
    add_python(folder, "python3")
    prepared.refused("upload_to_server.sh", "It has no make.\n  fix: Run apt install make on the server.")


def test_a_python_that_cannot_make_environments_is_refused(prepared: Place) -> None:
    folder = without(prepared, *COMPILERS)
    add_python(folder, "python3", ensurepip="raise ImportError")
    refused(prepared, "its module ensurepip does not work", "apt install python3-venv on")
    (folder / "lib-python3" / "ensurepip.py").unlink()
    assert "no C++ compiler. Training needs none" in prepared.upload()


def test_an_old_python_is_refused_and_a_newer_one_is_named(prepared: Place) -> None:
    folder = without(prepared)
    add_python(folder, "python3", sitecustomize=old("3.9.2"))
    refused(prepared, "Python 3.11 or newer, and python3 is 3.9.2", "python3.11-venv", "PYTHON=python3.11'")
    add_python(folder, "python3.12", sitecustomize=old("3.12.1"))
    refused(
        prepared,
        "apt install python3.12-venv on the server. Then set ORION_SERVER_SETUP='make setup PYTHON=python3.12'",
    )


def test_a_server_without_zstd_gets_a_gz(prepared: Place) -> None:
    add_python(without(prepared, "zstd"), "python3")
    prepared.variables["ORION_ARCHIVE_NAME"] = "data.tar.zst"
    prepared.refused("upload_to_server.sh", "the server has no zstd", "end ORION_ARCHIVE_NAME in .gz")
    assert not prepared.data.exists()
    del prepared.variables["ORION_ARCHIVE_NAME"]
    prepared.upload()
    assert tree(prepared.data) == tree(prepared.local_data)


def test_an_environment_that_is_there_already_needs_no_other_python(prepared: Place) -> None:
    folder = without(prepared)
    add_python(folder, "python3")
    prepared.upload()
    (folder / "python3").unlink()
    refusal = prepared.refused("upload_to_server.sh", "python3 is not there")
    assert "make." not in refusal
    (prepared.repository / ".venv" / "bin").mkdir(parents=True)
    add_python(prepared.repository / ".venv" / "bin", "python")
    prepared.upload()
