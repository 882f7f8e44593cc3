"""Writing without half-written results: temporary file, flush, rename.

What is temporary has a hidden name that ends in `.partial`, so that what a kill leaves behind can be told apart.
"""

import ctypes
import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from orion_triage.errors import DISK_ERRORS, DISK_FIX, OrionError, disk_words_of


def cache_folder() -> Path:
    """ORION_CACHE, or the user's cache folder: what can be fetched or built again."""
    if chosen := os.environ.get("ORION_CACHE"):
        return Path(chosen).resolve()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "orion-triage"


_hashes: dict[tuple[int, ...], str] = {}
_SETTLED_NANOSECONDS = 50_000_000  # file times may stand still for 10 ms: what was just written can change unseen


def sha256_of_file(path: Path) -> str:
    """Read once in a process: a run asks for the same files' hashes many times, and a merged model has 3 GB."""
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
_PROBE_BYTES = 1_000_000  # more than what is left when a write of less has just failed


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let a disk's trouble in the block be told of `path`: the errors of writes, and of libraries, name no file."""
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
        if said := disk_words_of(error):
            raise OrionError(f"{path}: {said}.", DISK_FIX) from error
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data` in one step; a reader sees the old bytes or the new ones."""
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
def replaced_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place when the block ends without an error.

    After an error, `folder` is as it was.
    """
    temporary, old = (folder.with_name(f".{folder.name}{suffix}") for suffix in (PARTIAL, ".old"))
    shutil.rmtree(temporary, ignore_errors=True)
    if old.exists() and not folder.exists():  # ended between the two renames below
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
            with suppress(OSError):  # what has gone wrong already is said; the next one puts it back
                os.replace(old, folder)
        raise
    shutil.rmtree(temporary, ignore_errors=True)  # what was there, after an exchange
    shutil.rmtree(old, ignore_errors=True)


_WORKING_FOLDER, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE


def _exchanged(one: Path, other: Path) -> bool:
    """Let two folders take each other's place in one step; False where the system or the file system cannot."""
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
    """A folder in `parent` for the length of the block."""
    with tempfile.TemporaryDirectory(dir=parent, prefix=f".{name}-", suffix=PARTIAL) as folder:
        yield Path(folder)


def _clear_leftovers(folder: Path) -> None:
    """Delete what killed owners of the folder were writing; nobody else may be writing there now."""
    for path in [path for path in folder.rglob(f".*{PARTIAL}") if not path.is_symlink()]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


_held: set[Path] = set()


@contextmanager
def locked(folder: Path, purpose: str) -> Iterator[None]:
    """Have the folder to ourselves for the length of the block; the lock goes with its process, however that ends.

    What an owner before us left half-written is deleted first. Blocks of one process may stand inside each other.
    Raises OrionError when another process has the folder.
    """
    path = folder.resolve() / ".lock"
    if path in _held:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # filelock empties the file, which names its owner
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise OrionError(
                f"{folder} is in use by {owner}.", "Wait for it, stop it, or take another folder with --run."
            ) from None
        with suppress(OSError):  # it only tells others who we are: a full disk must not keep 'orion clean' away
            os.truncate(path, 0)
            os.write(file.fileno(), f"{purpose} (process {os.getpid()})\n".encode())
        _held.add(path)
        try:
            _clear_leftovers(path.parent)
            yield
        finally:
            _held.remove(path)


def refusal_of_disk(folder: Path) -> str:
    """What the system says when a little is written into `folder` now; empty when it goes well."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror or str(error)
    return ""


def require_free_space(folder: Path, needed_bytes: int, purpose: str) -> None:
    """Raise OrionError when the disk of `folder` cannot take `needed_bytes`; asked before work starts."""
    existing = folder
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise OrionError(
            f"{purpose} needs {needed_bytes / 1e6:,.0f} MB in {folder}, but {free / 1e6:,.0f} MB are free.",
            "Free some space, or choose another run folder with --run.",
        )
