"""Atomic writes: temporary file, flush, rename.

Temporary files and folders have a hidden name that ends in `.partial`, so leftovers of a killed process can be found.
"""

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from orion_triage.errors import DISK_ERRORS, DISK_FIX, OrionError, disk_words_of


def cache_folder() -> Path:
    """ORION_CACHE, or the user's cache folder; everything in it can be fetched or built again."""
    if chosen := os.environ.get("ORION_CACHE"):
        return Path(chosen).resolve()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "orion-triage"


_hashes: dict[tuple[int, ...], str] = {}
# File times can have a resolution of 10 ms: a file written within the last 50 ms may change without a new time.
_SETTLED_NANOSECONDS = 50_000_000


def sha256_of_file(path: Path) -> str:
    """The file's sha256, cached per process: a run needs the same hashes many times, and a merged model has 3 GB."""
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        changed = max(status.st_mtime_ns, status.st_ctime_ns)
        key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        if key not in _hashes or time.time_ns() - changed < _SETTLED_NANOSECONDS:
            _hashes[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _hashes[key]


def sha256_of_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


PARTIAL = ".partial"
_PROBE_BYTES = 1_000_000  # larger than the free space that a failed small write can leave


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add `path` to disk errors raised in the block: errors of write() and of libraries do not name the file."""
    try:
        yield
    except OrionError:
        raise
    except OSError as error:
        named = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
        if Path(named).name.startswith(f".{path.name}.") or (not named and error.errno in DISK_ERRORS):
            error.filename, error.filename2 = str(path), None
        raise
    except Exception as error:
        if reason := disk_words_of(error):
            raise OrionError(f"{path}: {reason}.", DISK_FIX) from error
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Replace the content of `path` by `data` in one step; a reader sees either the old bytes or the new ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path):
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PARTIAL)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


@contextmanager
def appending(out: Path | None) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Appends and flushes one JSON line a call, so an interruption loses only the current one; no-op without a file.

    The file is locked during the block; the system releases it when the process ends. Raises OrionError when another
    command has it.
    """
    if out is None:
        yield lambda row: None
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with naming(out), out.open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the file itself: a lock file beside it would stay there
        except BlockingIOError:
            raise OrionError(
                f"{out} is in use by another command.", "Wait until it ends, or write to another file."
            ) from None

        def write(row: dict[str, Any]) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()

        yield write


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that replaces it when the block ends without an error.

    After an error, `folder` is unchanged.
    """
    temporary, old = (folder.with_name(f".{folder.name}{suffix}") for suffix in (PARTIAL, ".old"))
    shutil.rmtree(temporary, ignore_errors=True)
    if old.exists() and not folder.exists():  # an earlier process ended between the two renames below
        os.replace(old, folder)
    shutil.rmtree(old, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with naming(folder):
            yield temporary
        if not (folder.exists() and _exchanged(temporary, folder)):
            if folder.exists():
                os.replace(folder, old)
            os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists() and not folder.exists():
            with suppress(OSError):  # the first error is reported; the next call restores the folder
                os.replace(old, folder)
        raise
    shutil.rmtree(temporary, ignore_errors=True)  # after an exchange, this is the old folder
    shutil.rmtree(old, ignore_errors=True)


_WORKING_FOLDER, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE


def _exchanged(one: Path, other: Path) -> bool:
    """Swap two folders atomically; False if the system or the file system does not support it."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    if rename(_WORKING_FOLDER, os.fsencode(one), _WORKING_FOLDER, os.fsencode(other), _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


@contextmanager
def temporary_folder(parent: Path, name: str) -> Iterator[Path]:
    """A folder in `parent` that is deleted when the block ends."""
    with tempfile.TemporaryDirectory(dir=parent, prefix=f".{name}-", suffix=PARTIAL) as folder:
        yield Path(folder)


def _clear_leftovers(folder: Path) -> None:
    """Delete the temporary files of killed processes; the caller must hold the folder's lock."""
    for path in [path for path in folder.rglob(f".*{PARTIAL}") if not path.is_symlink()]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


_held: set[Path] = set()


@contextmanager
def locked(folder: Path, purpose: str) -> Iterator[None]:
    """Hold an exclusive lock on the folder during the block; the system releases it when the process ends.

    Deletes the temporary files of earlier owners first. Blocks of one process can be nested. A folder that was made for
    the lock, and got no file, is deleted at the end. Raises OrionError when another process holds the lock.
    """
    path = folder.resolve() / ".lock"
    if path in _held:
        yield
        return
    is_new = not path.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not filelock: it empties the file with the owner's name
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise OrionError(
                f"{folder} is in use by {owner}.", "Wait until it ends, or choose another folder with --run."
            ) from None
        with suppress(OSError):  # the owner's name is only information: 'orion clean' must work on a full disk
            os.truncate(path, 0)
            os.write(file.fileno(), f"{purpose} (process {os.getpid()})\n".encode())
        _held.add(path)
        try:
            _clear_leftovers(path.parent)
            yield
        finally:
            _held.remove(path)
            if is_new and all(file == path or file.is_dir() for file in path.parent.rglob("*")):
                shutil.rmtree(path.parent, ignore_errors=True)


def refusal_of_disk(folder: Path) -> str:
    """The system's error message for a write of 1 MB into `folder`; empty if it succeeds."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror or str(error)
    return ""


def require_free_space(folder: Path, needed_bytes: int, purpose: str) -> None:
    """Raise OrionError when the disk of `folder` has less than `needed_bytes` free; call it before the work starts."""
    existing = folder
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise OrionError(
            f"{purpose} needs {needed_bytes / 1e6:,.0f} MB in {folder}, but only {free / 1e6:,.0f} MB are free.",
            "Free some space, or choose another run folder with --run.",
        )
