#!/usr/bin/env python3
"""The server's flags that tune.py measured on this machine, and whether they may be used here.

`orion bundle` copies this file into every bundle. It needs only Python 3.9 or newer.

tune.py writes server_flags.json beside bundle.json. The bundle's hash list does not have it, because it is made on
board. These rules stand in its place: the file has the sha256 of its own content, belongs to one bundle, machine and
llama-server, and has no flag but those of ALLOWED. No path, port or key can be a flag.

serve.sh runs this file: python3 -I server_flags.py LLAMA_SERVER FILE VARIANT
It prints the mmproj and the flags in one line. If they do not apply, it prints nothing, and the reason on standard
error; serve.sh then uses its own flags. Exit status 0.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import sys
from pathlib import Path
from typing import Any

FILE, NONE = "server_flags.json", "none"  # NONE instead of a file: serve.sh's own flags
SCHEMA_VERSION = 1
MMPROJ, THREADS, FLASH_ATTENTION = "--mmproj", "--threads", "--flash-attn"
_TOKENS = r"[1-9]\d{1,3}"
ALLOWED = {  # flag -> pattern of its value; None: it has none
    THREADS: r"[1-9]\d{0,2}",
    FLASH_ATTENTION: r"on|off",
    "--batch-size": _TOKENS,
    "--ubatch-size": _TOKENS,
    "--load-mode": r"none|mmap",
    "--no-repack": None,
    MMPROJ: r"[A-Za-z0-9][A-Za-z0-9_.-]*\.gguf",  # a name in the bundle's hash list, so no path
}
LARGEST_BYTES = 100_000


class FlagsError(Exception):
    """Why server_flags.json is not valid, in one line."""


class OtherPlaceError(FlagsError):
    """The file is valid, but was measured for another bundle, machine or llama-server."""


def flags_of(words: list[str]) -> dict[str, str]:
    """Flag -> value ("" for a flag without one); raises FlagsError for any that is not allowed."""
    flags: dict[str, str] = {}
    left = list(words)
    while left:
        flag = left.pop(0)
        if not isinstance(flag, str) or flag not in ALLOWED:
            raise FlagsError(f"{flag!r} is not an allowed flag (allowed: {', '.join(ALLOWED)})")
        if flag in flags:
            raise FlagsError(f"{flag} stands there twice")
        pattern = ALLOWED[flag]
        value = left.pop(0) if pattern and left else ""
        if pattern and not (isinstance(value, str) and re.fullmatch(pattern, value)):
            raise FlagsError(f"{value!r} is not an allowed value of {flag}")
        flags[flag] = value
    return flags


def words_of(flags: dict[str, str]) -> list[str]:
    """The words of a command line, in the order of ALLOWED."""
    return [word for flag in ALLOWED if flag in flags for word in (flag, flags[flag]) if word]


def mmprojs_of(bundle: dict[str, Any]) -> list[str]:
    """The vision towers in the bundle's hash list; first the one that flies by default."""
    others = (name for name in bundle["files"] if "mmproj" in name and re.fullmatch(str(ALLOWED[MMPROJ]), name))
    return [bundle["mmproj"], *(name for name in others if name != bundle["mmproj"])]


# --- what the flags were measured on --------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """The processor, its architecture, and the cores that this process may use."""
    name = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:  # a Pi has its name in "Model", a PC its processor in "model name"
        if line.startswith(("model name", "Model")):
            name = line.partition(":")[2].strip()
            break
    return {"processor": name, "architecture": platform.machine(), "cores": len(os.sched_getaffinity(0))}


def sha256_of_server(program: Path) -> str:
    """The hash of llama-server and of the libraries beside it; raises OSError if it cannot be read."""
    program = program.resolve()
    digest = hashlib.sha256()
    for path in [program, *sorted(program.parent.glob("lib*.so*"))]:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def place(folder: Path, program: Path, variant: str) -> dict[str, Any]:
    """What flags belong to: the bundle, the variant of it that flies, llama-server, and the machine."""
    return {
        "bundle_sha256": hashlib.sha256((folder / "bundle.json").read_bytes()).hexdigest(),
        "variant": variant,
        "server_sha256": sha256_of_server(program),
        "machine": machine(),
    }


_OF_PLACE = {  # key of `place` -> what an error calls it
    "bundle_sha256": "another bundle",
    "variant": "another variant of the bundle",
    "server_sha256": "another llama-server",
    "machine": "another machine",
}

# --- file -----------------------------------------------------------------------------------------------------


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """The record with the hash of its content."""
    content = {key: value for key, value in record.items() if key != "sha256"}
    return {**content, "sha256": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}


def write(path: Path, record: dict[str, Any]) -> None:
    """Write a JSON file so that a power loss leaves the old one or the new one."""
    part = path.with_name(f"{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(json.dumps(record, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    opened = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def read(path: Path, folder: Path, program: Path, variant: str) -> dict[str, Any]:
    """The flags file for this bundle; `flags` of it are valid (see `flags_of`), and `mmproj` is the tower's name.

    Raises OtherPlaceError if it was measured elsewhere, and FlagsError if it is damaged or has a flag that is not
    allowed.
    """
    record = _content(path)
    flags = flags_of(record["flags"])
    try:
        bundle, here = json.loads((folder / "bundle.json").read_bytes()), place(folder, program, variant)
        towers = mmprojs_of(bundle)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FlagsError(f"bundle.json or llama-server cannot be read ({error})") from None
    for key, other in _OF_PLACE.items():
        if record.get(key) != here[key]:
            seen = f": {_in_words(record.get(key))}, not {_in_words(here[key])}" if key == "machine" else ""
            raise OtherPlaceError(f"it was measured for {other}{seen}. Run tune.py again, or delete it")
    if lacking := [flag for flag in (THREADS, FLASH_ATTENTION) if flag not in flags]:
        raise FlagsError(f"it has no {lacking[0]}")
    tower = flags.pop(MMPROJ, towers[0])
    if tower not in towers:
        raise FlagsError(f"{tower} is no mmproj of this bundle")
    return {**record, "mmproj": tower, "flags": flags}


def _content(path: Path) -> dict[str, Any]:
    """The JSON object of a flags file; raises FlagsError if it is not one, or was changed."""
    try:
        with path.open("rb") as file:
            record = json.loads(file.read(LARGEST_BYTES))
    except OSError as error:
        raise FlagsError(f"it cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise FlagsError("it is damaged: not JSON") from None
    if not isinstance(record, dict) or not isinstance(record.get("flags"), list):
        raise FlagsError("it is damaged: no list of flags")
    flags_of(record["flags"])  # the better reason for a file that someone wrote by hand
    if sealed(record) != record:
        raise FlagsError("it was changed after tune.py wrote it")
    if record.get("schema_version") != SCHEMA_VERSION:
        raise FlagsError(f"it has schema version {record.get('schema_version')} instead of {SCHEMA_VERSION}")
    return record


def _in_words(found: Any) -> str:
    if not isinstance(found, dict):
        return repr(found)[:80]
    return f"{found.get('processor')} ({found.get('architecture')}, {found.get('cores')} cores)"


# --- the running server ---------------------------------------------------------------------------------------


def served(process: Path) -> dict[str, str]:
    """The allowed flags in the command line of a process, a folder in /proc; raises OSError if it cannot be read."""
    words = [os.fsdecode(word) for word in (process / "cmdline").read_bytes().split(b"\0")]
    return {
        word: words[number + 1] if ALLOWED[word] and number + 1 < len(words) else ""
        for number, word in enumerate(words)
        if word in ALLOWED and word != MMPROJ
    }


def used(
    folder: Path, process: Path | None, program: Path | None, variant: str, file: str = ""
) -> tuple[str, str, str]:
    """How a running server uses the flags file: the mmproj of it (or ""), a line about it, and a fault.

    `process` is the server's folder in /proc, None if it cannot be seen; `program` its llama-server, by default what
    that process runs. `file` is as for serve.sh: "" for the bundle's own file, NONE for none. The fault says why the
    file is not valid, or which flags the server lacks.
    """
    path = Path(file) if file else folder / FILE
    if file == NONE or not (file or path.exists()):
        return "", "", ""
    unseen = "", f"note: whether the server runs with the flags of {path.name} cannot be seen from here", ""
    if process is None:
        return unseen
    try:
        program, flags = program or (process / "exe").resolve(strict=True), served(process)
    except OSError:
        return unseen
    try:
        record = read(path, folder, program, variant)
    except OtherPlaceError as error:
        return "", f"warning: serve.sh does not use {path.name}: {error}", ""
    except FlagsError as error:
        return "", f"warning: serve.sh does not use {path.name}: {error}", f"{path.name}: {error}"
    wanted = record["flags"]
    other = {flag for flag in ALLOWED if flag != MMPROJ and flags.get(flag) != wanted.get(flag)}
    if other:
        why = f"the server runs with {' '.join(words_of(flags))} instead of {' '.join(words_of(wanted))} of {path.name}"
        fault = "" if other == {THREADS} else f"{why}: start serve.sh again"  # ORION_THREADS changes no answer
        return record["mmproj"], f"warning: {why}", fault
    seconds = [f"{record[key]:.3g}" for key in ("seconds_per_frame", "seconds_per_frame_before")]
    line = " ".join([*words_of(wanted), MMPROJ, record["mmproj"]])
    return record["mmproj"], f"server flags, measured here: {line} ({seconds[0]} s per frame, {seconds[1]} before)", ""


# --- for serve.sh ---------------------------------------------------------------------------------------------


def main(arguments: list[str]) -> int:
    program, file, variant = arguments
    try:
        record = read(Path(file), Path(), Path(shutil.which(program) or program), variant)
    except FlagsError as error:
        sys.stderr.write(f"serve.sh: {file} is not used: {error}\n")
        return 0
    threads = os.environ.get("ORION_THREADS", "")
    if threads:
        sys.stderr.write(f"serve.sh: ORION_THREADS={threads} replaces the measured threads\n")
    flags = {**record["flags"], **({THREADS: threads} if threads else {})}
    try:
        words = words_of(flags_of(words_of(flags)))
    except FlagsError as error:
        sys.stderr.write(f"serve.sh: ORION_THREADS: {error}\n")
        return 0
    sys.stdout.write(" ".join([record["mmproj"], *words]) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
