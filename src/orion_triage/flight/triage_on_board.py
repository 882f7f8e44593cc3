#!/usr/bin/env python3
"""Decide every raw frame that appears in a folder, once, also over crashes and power losses.

`orion bundle` copies this file beside ask_frame.py into every bundle. It needs only Python 3.9 or newer.

Each frame gets one JSON line in the log, which is on the disk before the frame moves to the folder of finished ones. So
at every moment a frame is still to be decided, or in the log and about to move, or in the log and moved. A restart
moves frames that are in the log already, and cuts off a line that was not finished. A frame that is refused, or not
answered in time, is logged with `decided_by` "no answer" and kept like the others. This program deletes no frame.

Write a frame under another name, and rename it to *.raw (or *.RAW) when it is complete. Links, hidden files and
pictures of other formats are left out; each kind is said once. A frame that cannot be read stays where it is, and is
tried again at each look.
Exit status with --once: 0, 1 if a frame got no decision, is incomplete or cannot be read. 2 for a wrong command line.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or __package__:
    from orion_triage.flight import ask_frame, check_flight, decide_frame
else:
    sys.dont_write_bytecode = True  # the bundle stays as it is
    sys.path.insert(0, str(Path(__file__).parent))  # with python3 -I, the script's folder is not on the path
    import ask_frame
    import check_flight
    import decide_frame

ATTEMPTS = 2  # a frame is asked about again after a new start of the server, which may have died of something else
START_SECONDS = 300  # until the model is loaded; a slow card reads 1.6 GB in a minute or two
RETRY_SECONDS = 10  # after a server that did not start
RAW = ".raw"  # in any case, as on the ground
LONGEST_NAME = 255  # bytes of a file's name, on all common file systems
LINE_BEGINS = b'{"file": "'  # every line of a log
OTHER_PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".jp2", ".webp")


class Stopped(BaseException):
    """SIGTERM or Ctrl-C. Ends the program between two steps; the frame in work is decided after the next start."""


class UnreadableError(Exception):
    """A frame that this program may not or cannot read."""


def may_be_cut_off(line: bytes) -> bool:
    """Whether a kill or a power loss may leave this of a log's line: its beginning, or zeros."""
    return line[: len(LINE_BEGINS)] == LINE_BEGINS[: len(line)] or not line.strip(b"\0")


def say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


# --- log ------------------------------------------------------------------------------------------------------


class Log:
    """The log of decisions, opened by one process at a time; a line is on the disk when `append` returns.

    Raises NoGoError if another process has it open, or if the file is something else.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._file)
            raise check_flight.NoGoError(f"another triage_on_board.py writes {path}") from None
        sync_folder(path.parent)
        self.moved_to: dict[tuple[str, str], str] = {}  # (file, sha256) -> name among the finished frames
        self._names: set[str] = set()
        try:
            self._size = self._read(path)
        except check_flight.NoGoError:
            os.close(self._file)
            raise
        os.ftruncate(self._file, self._size)  # a line that a power loss cut off
        os.fsync(self._file)
        os.lseek(self._file, 0, os.SEEK_END)

    def _read(self, path: Path) -> int:
        """Read the finished frames; returns the bytes of the complete lines."""
        size, cut_off = 0, b""
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n"):
                    cut_off = line
                    break
                size += len(line)
                try:
                    row = json.loads(line)
                    self._remember(row["file"], row["sha256"], row["moved_to"])
                except (ValueError, KeyError, TypeError, RecursionError):
                    say(f"warning: line {number} of {path} is damaged and was skipped")
        if not (self.moved_to or may_be_cut_off(cut_off)):  # without a line of ours, it may be another file
            raise check_flight.NoGoError(f"{path} is not a log of this program. Name another file with --log")
        return size

    def _remember(self, name: str, sha256: str, moved_to: str) -> None:
        self.moved_to[name, sha256] = moved_to
        self._names.add(moved_to)

    def has_moved(self, name: str) -> bool:
        """Whether a frame has this name among the finished ones, or is about to move there."""
        return name in self._names

    def append(self, row: dict[str, Any]) -> None:
        data = json.dumps(row).encode() + b"\n"
        try:
            left = memoryview(data)
            while left:
                left = left[os.write(self._file, left) :]
            os.fsync(self._file)
        except BaseException:  # a full disk, or a signal: no half line may stay before the next one
            with suppress(OSError):
                os.ftruncate(self._file, self._size)
                os.lseek(self._file, self._size, os.SEEK_SET)
            raise
        self._size += len(data)
        self._remember(row["file"], row["sha256"], row["moved_to"])

    def close(self) -> None:
        os.close(self._file)


def sync_folder(folder: Path) -> None:
    """Make names that were created in the folder survive a power loss."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


# --- server ---------------------------------------------------------------------------------------------------


class SavedPrompt:
    """The server's state after the prompt, as a file: after a restart, the prompt is not read again.

    The state of another model would give other answers without an error, and a power loss may leave a part of a file.
    So the file's name has the hash of what made the state (bundle and build of llama.cpp) and that of its content.
    """

    def __init__(self, state: Path, bundle_folder: Path, build: str) -> None:
        made_by = hashlib.sha256((bundle_folder / check_flight.LIST_HASH).read_bytes() + build.encode()).hexdigest()
        self._state, self._start = state, f"prompt-{made_by[:16]}-"

    def restore(self, questions: check_flight.Questions) -> bool:
        """Whether the server has the state again."""
        files = self._state.glob(f"{self._start}*.bin")
        return any(self._name(path) == path.name and questions.restore_prompt(path.name) for path in files)

    def save(self, questions: check_flight.Questions) -> None:
        """Write the file, and remove those of other bundles; raises NoGoError or OSError if it cannot be written."""
        part = self._state / "prompt.part"
        questions.save_prompt(part.name)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        for path in self._state.glob("prompt-*.bin"):
            path.unlink()
        part.rename(self._state / self._name(part))
        sync_folder(self._state)

    def _name(self, path: Path) -> str:
        return f"{self._start}{sha256_of(path)[:16]}.bin"


class Model:
    """The served model. With a program, its server is the bundle's serve.sh, which is started again if need be."""

    def __init__(self, folder: Path, bundle: dict[str, Any], options: argparse.Namespace) -> None:
        self._folder, self._bundle, self._options = folder, bundle, options
        self._state = (options.state or options.folder / "state").resolve()  # serve.sh runs in the bundle's folder
        self._times_lost = 0  # the prompt, by the server
        self._own: check_flight.OwnServer | None = None
        self._questions: check_flight.Questions | None = None

    def outcome_of(self, frame: bytes, seconds: float) -> dict[str, Any]:
        """The outcome of a raw frame of RAW_BYTES: a decision, or "no answer" after ATTEMPTS.

        Raises NoGoError if there is no server of the bundle's model, which is no fault of the frame.
        """
        outcome: dict[str, Any] = {}
        for _ in range(ATTEMPTS):
            outcome = ask_frame.ask_in_time(self._ready(), frame, self._bundle, seconds)
            if "error" not in outcome:
                if self._questions and self._questions.has_lost_prompt:
                    self._times_lost += 1
                    say(f"the server had lost the prompt, which is read again (time {self._times_lost})")
                break
            say(f"no answer: {outcome['error']}")
            self.stop()  # it hangs, or has died
        return outcome

    def _ready(self) -> check_flight.Questions:
        if self._own and not self._own.is_alive():
            say("the server has ended; it is started again")
            self.stop()
        if self._questions is None:
            if self._options.llama_server:
                of_head = self._bundle.get("variant") == "head"  # whose server reads no text alone
                state = self._state if "kept_tokens" in self._bundle["request"] and not of_head else None
                if state:
                    state.mkdir(exist_ok=True)
                self._own = check_flight.OwnServer(
                    self._folder, self._options.llama_server, self._bundle.get("variant", ""), state
                ).__enter__()
            connection = (
                self._own.connection if self._own else check_flight.Connection(self._options.url, self._options.key)
            )
            try:
                with check_flight.time_limit(START_SECONDS, "the start of the server"):
                    check_flight.wait_until_ready(connection, self._own)
                    marker, notes = check_flight.check_server(connection, self._folder, self._bundle, self._own)
                    questions = check_flight.Questions(connection, self._folder, self._bundle, marker)
                    if questions.keeps_prompt:
                        say(self._keep_prompt(connection, questions))
            except BaseException:
                self.stop()
                raise
            for note in notes:
                say(note)
            self._questions = questions
        return self._questions

    def _keep_prompt(self, connection: check_flight.Connection, questions: check_flight.Questions) -> str:
        """Let the server have its state after the prompt; how, in words."""
        if not self._own:
            questions.keep_prompt()
            return "the server has read the prompt"
        saved = SavedPrompt(self._state, self._folder, str(connection.ask("/props").get("build_info")))
        if saved.restore(questions):
            return f"the prompt's state was restored from {self._state}"
        try:
            saved.save(questions)
        except (check_flight.NoGoError, OSError) as error:  # a build without it, or a full disk: the flight continues
            questions.keep_prompt()
            return f"the server has read the prompt; its state cannot be saved: {error}"
        return f"the server has read the prompt; its state is saved in {self._state}"

    def stop(self) -> None:
        self._questions, own, self._own = None, self._own, None
        if own:
            own.__exit__()


# --- frames ---------------------------------------------------------------------------------------------------


class Frames:
    """The folder of raw frames, its log, and the folder of finished frames; for one process at a time.

    `decided_with` is the SHA-256 of the bundle's list, which stands in each new line of the log.
    """

    def __init__(self, folder: Path, log: Path, done: Path, decided_with: str) -> None:
        self._lock = os.open(folder, os.O_RDONLY)  # two clients with a log each would decide every frame twice
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise check_flight.NoGoError(f"another triage_on_board.py decides the frames in {folder}") from None
        except OSError:  # a network file system that locks no folder: the log's lock is left
            pass
        done.mkdir(exist_ok=True)
        if folder.stat().st_dev != done.stat().st_dev:
            raise check_flight.NoGoError(
                f"{done} is on another file system than {folder}, so frames cannot be moved there at once"
            )
        sync_folder(done.parent)
        self._folder, self._done, self.log = folder, done, Log(log)
        self._decided_with = decided_with
        self._said: set[str] = set()
        self.known_before = 0  # frames that were in the log already, and were only moved

    def waiting(self) -> tuple[list[Path], list[Path]]:
        """The complete frames by name, and the incomplete ones: those that are smaller than a frame."""
        named = (path for path in self._folder.iterdir() if path.suffix.lower() == RAW and path.name[0] != ".")
        files = sorted(path for path in named if path.is_file() and not path.is_symlink())
        complete = [path for path in files if path.stat().st_size >= decide_frame.RAW_BYTES]
        return complete, [path for path in files if path not in complete]

    def left_out(self) -> list[str]:
        """What is not decided, in words; each reason once, because the folder is looked at every second."""
        found: dict[str, list[str]] = {}
        for path in sorted(self._folder.iterdir()):
            if reason := why_left_out(path):
                found.setdefault(reason, []).append(path.name)
        new = {reason: names for reason, names in found.items() if reason not in self._said}
        self._said.update(new)
        return [
            f"left out: {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}: {reason}"
            for reason, names in new.items()
        ]

    def finish(self, path: Path, model: Model, bundle: dict[str, Any], seconds: float) -> dict[str, Any] | None:
        """Decide, log and move one frame; returns its new line, None if the log had one already.

        Raises NoGoError without a server, UnreadableError without its bytes: the frame stays where it is.
        """
        began = time.monotonic()
        try:
            size = path.stat().st_size
            frame = path.read_bytes() if size == decide_frame.RAW_BYTES else b""
            sha256 = hashlib.sha256(frame).hexdigest() if frame else sha256_of(path)
        except OSError as why:  # its permissions, a bad sector, or it is gone
            raise UnreadableError(f"{path} cannot be read: {why.strerror}") from None
        key, row = (path.name, sha256), None
        if key in self.log.moved_to:
            self.known_before += 1
        else:
            if frame:
                outcome = model.outcome_of(frame, seconds)
            else:
                error = f"the file has {size} bytes, not {decide_frame.RAW_BYTES} (512x512x3)"
                outcome = decide_frame.without_model(bundle, blank=False, error=error)
            row = {
                "file": path.name,
                "sha256": sha256,
                "moved_to": self._free_name(path),
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "seconds": round(time.monotonic() - began, 3),
                "bundle": self._decided_with,
                **check_flight.named(bundle),
                **outcome,
            }
            self.log.append(row)
        os.replace(path, self._done / self.log.moved_to[key])  # after the line is on the disk, not before
        return row

    def _free_name(self, path: Path) -> str:
        """The file's name, or with a number if an earlier frame had it: no frame replaces another one."""
        name, stem, number = path.name, path.stem, 1
        while self.log.has_moved(name) or (self._done / name).exists():
            number += 1
            ending = f"-{number}{path.suffix}"
            while len(os.fsencode(stem + ending)) > LONGEST_NAME:
                stem = stem[:-1]
            name = stem + ending
        return name


def why_left_out(path: Path) -> str:
    """Why a link or a picture in the folder is not decided; empty for a frame, and for what is no picture."""
    ending = path.suffix.lower()
    if ending in OTHER_PICTURES:
        return f"{ending} is not read here. Write raw RGB of 512x512x3 bytes as *.raw"
    if ending == RAW and path.name[0] == ".":
        return "a hidden file may still be written. Rename it when it is complete"
    if ending == RAW and path.is_symlink():
        return "a link is not moved. Move the frame itself into the folder"
    if ending == RAW and path.exists() and not path.is_file():
        return "it is not a regular file"
    return ""


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# --- command line ---------------------------------------------------------------------------------------------


def watch(frames: Frames, model: Model, bundle: dict[str, Any], options: argparse.Namespace) -> int:
    """Finish the frames in the folder, for ever or with `once` until none is left; returns the exit status."""
    seconds = options.time_out or bundle["seconds_per_frame_at_most"]
    counts: dict[str, int] = {}
    unreadable: set[str] = set()  # what was said of them
    while True:
        complete, incomplete = frames.waiting()
        for said in frames.left_out():
            say(said)
        stay = 0
        for path in complete:
            try:
                row = frames.finish(path, model, bundle, seconds)
            except UnreadableError as error:
                stay += 1
                if str(error) not in unreadable:
                    say(f"left where it is: {error}")
                unreadable.add(str(error))
                continue
            except check_flight.NoGoError as error:
                if options.once:
                    raise
                say(f"no server, so frames wait: {error}")
                time.sleep(RETRY_SECONDS)
                break
            if row:
                decided = row["category"] or "without a decision"
                counts[decided] = counts.get(decided, 0) + 1
        if options.once and stay == len(complete):
            for path in incomplete:
                say(f"incomplete: {path} has {path.stat().st_size} of {decide_frame.RAW_BYTES} bytes")
            if frames.known_before:
                say(f"{frames.known_before} in the log already, moved without a new decision")
            say(", ".join(f"{count} {decided}" for decided, count in sorted(counts.items())) or "no new frame")
            return int(bool(incomplete) or bool(stay) or "without a decision" in counts)
        if stay == len(complete):
            time.sleep(options.poll)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Decide every raw frame (512x512x3 bytes) that appears in a folder.")
    parser.add_argument("folder", type=Path, help="where frames appear as *.raw or *.RAW")
    parser.add_argument("--log", type=Path, help="log of decisions (default: triage.jsonl in the folder)")
    parser.add_argument("--done", type=Path, help="folder of finished frames (default: done in the folder)")
    parser.add_argument("--state", type=Path, help="folder of the saved prompt (default: state in the folder)")
    parser.add_argument("--once", action="store_true", help="end when no complete frame is left")
    parser.add_argument("--poll", type=float, default=1.0, metavar="SECONDS", help="pause (default: %(default)s)")
    check_flight.add_time_out(parser)
    check_flight.add_variant(parser)
    server = parser.add_mutually_exclusive_group(required=True)
    server.add_argument("--llama-server", type=Path, metavar="PATH", help="start serve.sh with this program")
    server.add_argument("--url", help="use a running server instead, which nobody starts again")
    parser.add_argument("--key-file", type=Path, help="file with the running server's key (default: LLAMA_API_KEY)")
    options = parser.parse_args(arguments)
    if not 0 < options.poll <= 3600:
        parser.error(f"--poll {options.poll:g} is outside 0..3600 seconds")
    if not options.folder.is_dir():
        parser.error(f"{options.folder} is not a folder")
    check_flight.read_server_options(parser, options)
    return options


def _stopped(number: int, frame: Any) -> None:
    for later in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(later, signal.SIG_IGN)  # the server is being stopped
    raise Stopped(f"stopped by signal {number}")


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _stopped)
    folder = Path(__file__).resolve().parent
    model = None
    try:
        bundle = check_flight.flown(check_flight.read_bundle(folder), options.variant)
        if bundle.get("variant") == "head":
            say("the head decides: its answers have no reason")
        frames = Frames(
            options.folder,
            options.log or options.folder / "triage.jsonl",
            options.done or options.folder / "done",
            sha256_of(folder / check_flight.LIST),
        )
        model = Model(folder, bundle, options)
        return watch(frames, model, bundle, options)
    except Stopped as stop:
        say(str(stop))
        return 0
    except (check_flight.NoGoError, OSError) as error:
        say(f"error: {error}")
        return 1
    finally:
        if model:
            model.stop()


if __name__ == "__main__":
    sys.exit(main())
