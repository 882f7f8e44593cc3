#!/usr/bin/env python3
"""Ask the served model of a bundle about frames, and decide as the ground does; the smallest flight client.

`orion bundle` copies this file beside check_flight.py into every bundle. It needs only Python 3.9 or newer.
One JSON line per frame, with the keys of `orion triage --json`, the action, and the error of a frame that was refused
or not answered. Exit status: 0, 1 if a frame got no decision.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or __package__:
    from orion_triage.flight import check_flight, decide_frame
else:
    sys.dont_write_bytecode = True  # the bundle stays as it is
    sys.path.insert(0, str(Path(__file__).parent))  # with python3 -I, the script's folder is not on the path
    import check_flight
    import decide_frame


def ask(questions: check_flight.Questions, frame: bytes, bundle: dict[str, Any]) -> dict[str, Any]:
    """The outcome for one raw RGB frame of 512x512, already stretched where the bundle has a stretch.

    Raises NoGoError for a frame of another size, or if the server's reply is not an answer.
    """
    if len(frame) != decide_frame.RAW_BYTES:
        raise check_flight.NoGoError(
            f"the frame has {len(frame)} bytes, not {decide_frame.RAW_BYTES} (512x512x3). "
            "Give it raw RGB: PNG and JPEG are not read here."
        )
    if bundle.get("variant") == "head":
        return check_flight.ask_head(questions, "the frame", frame, bundle)
    picture, unlike = decide_frame.picture_for(bundle, frame)
    if picture is None:
        return decide_frame.without_model(bundle, blank=True)
    outcome = decide_frame.with_model(bundle, *questions.ask_with_fields("the frame", picture), unlike=unlike)
    reused = questions.reused_tokens
    return outcome if reused is None else {**outcome, "prompt_tokens_reused": reused}


def ask_in_time(
    questions: check_flight.Questions, frame: bytes, bundle: dict[str, Any], seconds: float
) -> dict[str, Any]:
    """The same within `seconds`; whatever goes wrong, the outcome is that of the step "no answer".

    Uses SIGALRM, so call it from the main thread.
    """
    try:
        with check_flight.time_limit(seconds, "the answer"):
            return ask(questions, frame, bundle)
    except check_flight.NoGoError as error:
        return decide_frame.without_model(bundle, blank=False, error=str(error))
    except Exception as error:  # no reply, however wrong, may end a flight's client
        return decide_frame.without_model(bundle, blank=False, error=f"{type(error).__name__} {error}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Ask about raw RGB frames of 512x512x3 bytes; needs a running server.")
    parser.add_argument("frames", type=Path, nargs="+", help="raw frames: rows from the top, red, green, blue")
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="the server of serve.sh (default: %(default)s)")
    parser.add_argument("--key-file", type=Path, help="file with the server's key (default: LLAMA_API_KEY)")
    check_flight.add_time_out(parser)
    check_flight.add_variant(parser)
    options = parser.parse_args()
    status = 0
    try:
        key = options.key_file.read_text(encoding="utf-8") if options.key_file else os.environ.get("LLAMA_API_KEY", "")
        folder = Path(__file__).resolve().parent
        bundle = check_flight.flown(check_flight.read_bundle(folder), options.variant)
        connection = check_flight.Connection(options.url, key.strip())
        seconds = options.time_out or bundle["seconds_per_frame_at_most"]
        with check_flight.time_limit(seconds, "asking the server what it is"):
            marker, notes = check_flight.check_server(connection, folder, bundle)
            questions = check_flight.Questions(connection, folder, bundle, marker)
            questions.keep_prompt()
        for note in notes:
            sys.stderr.write(f"{note}\n")
    except (check_flight.NoGoError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    for path in options.frames:
        try:
            outcome = ask_in_time(questions, path.read_bytes(), bundle, seconds)
        except OSError as error:
            why = f"the frame cannot be read: {error.strerror}"
            outcome = decide_frame.without_model(bundle, blank=False, error=why)
        if "error" in outcome:
            sys.stderr.write(f"error: {path}: {outcome['error']}\n")
        sys.stdout.write(json.dumps({"file": str(path), **check_flight.named(bundle), **outcome}) + "\n")
        sys.stdout.flush()
        status = status or int(outcome["category"] is None)
    return status


if __name__ == "__main__":
    sys.exit(main())
