#!/usr/bin/env python3
"""Ask the served model of a bundle about frames, and decide as the ground does; the smallest flight client.

`orion bundle` copies this file beside check_flight.py into every bundle. It needs only Python 3.9 or newer.
One JSON line per frame, with the keys of `orion triage --json`. Exit status: 0, 1 if a frame got no decision.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import struct
import sys
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or __package__:
    from orion_triage.flight.check_flight import Connection, NoGoError, Questions, check_server, read_bundle
else:
    sys.path.insert(0, str(Path(__file__).parent))  # with python3 -I, the script's folder is not on the path
    from check_flight import Connection, NoGoError, Questions, check_server, read_bundle

CAMERA_SIZE = 512
BANDS = 3
PRECISION_BITS = 22  # of the weights, as in Pillow, so that every value is rounded alike


def grey(frame: bytes) -> list[bytes]:
    """The grey levels of an RGB frame by rows (ITU-R 601, in Pillow's fixed point)."""
    levels = bytes(
        (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16
        for red, green, blue in zip(frame[0::BANDS], frame[1::BANDS], frame[2::BANDS])  # noqa: B905 - Python 3.9
    )
    return [levels[row : row + CAMERA_SIZE] for row in range(0, len(levels), CAMERA_SIZE)]


def is_blank(frame: bytes) -> bool:
    """The blank rule on rows 16 to 479: entropy below 4.0 bits, and mean |dx| + mean |dy| below 1."""
    rows = grey(frame)[16:480]
    pixels = b"".join(rows)
    shares = [pixels.count(level) / len(pixels) for level in range(256)]
    entropy = -sum(share * math.log2(share) for share in shares if share)
    across = sum(abs(a - b) for row in rows for a, b in zip(row, row[1:]))  # noqa: B905, RUF007 - Python 3.9
    down = sum(abs(a - b) for above, row in zip(rows, rows[1:]) for a, b in zip(above, row))  # noqa: B905, RUF007
    gradient = across / (len(rows) * (CAMERA_SIZE - 1)) + down / ((len(rows) - 1) * CAMERA_SIZE)
    return entropy < 4.0 and gradient < 1.0


def shrink(frame: bytes, size: int) -> bytes:
    """The frame averaged down to `size` x `size` RGB pixels: first along the rows, then along the columns."""
    if size == CAMERA_SIZE:
        return frame
    weights = [_box(place, size) for place in range(size)]
    half, narrow = 1 << (PRECISION_BITS - 1), []
    for row in range(0, len(frame), CAMERA_SIZE * BANDS):
        line = frame[row : row + CAMERA_SIZE * BANDS]
        narrow.append(
            bytes(
                (sum(line[(first + n) * BANDS + band] * weight for n, weight in enumerate(of)) + half) >> PRECISION_BITS
                for first, of in weights
                for band in range(BANDS)
            )
        )
    return b"".join(
        bytes(
            (sum(narrow[first + n][place] * weight for n, weight in enumerate(of)) + half) >> PRECISION_BITS
            for place in range(size * BANDS)
        )
        for first, of in weights
    )


def _box(place: int, size: int) -> tuple[int, list[int]]:
    """The first input pixel of an output pixel, and the weights of the inputs whose centres lie in its box."""
    scale = CAMERA_SIZE / size
    centre = (place + 0.5) * scale
    first, last = int(centre - scale / 2 + 0.5), min(CAMERA_SIZE, int(centre + scale / 2 + 0.5))
    inside = [float(-0.5 < (pixel - centre + 0.5) / scale <= 0.5) for pixel in range(first, last)]
    return first, [int(0.5 + one / sum(inside) * (1 << PRECISION_BITS)) for one in inside]


def png(pixels: bytes, size: int) -> bytes:
    """RGB pixels as a PNG file."""
    width = size * BANDS
    lines = b"".join(b"\0" + pixels[row : row + width] for row in range(0, len(pixels), width))
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(lines)),
        (b"IEND", b""),
    )
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def decide(
    said: str | None,
    scores: dict[str, float] | None,
    threshold: float | None,
    mission: dict[str, Any],
    field_scores: dict[str, dict[str, float]] | None = None,
) -> tuple[str | None, str]:
    """The decision about a frame that is not blank, and what decided it; the README's steps in their order."""
    if said is None:
        return mission["unparsable"] or None, "no verdict"
    for field in mission.get("fields", []):
        if (
            field.get("when")
            and (field_scores or {}).get(field["name"], {}).get(field["when"], 0.0) >= field["probability"]
        ):
            return field["then"], f"{field['name']} is {field['when']}"
    if threshold is None or scores is None:
        return said, "model"
    kept = {category["name"]: category["action"] != "drop" for category in mission["categories"]}
    drops = sum(scores[name] for name in kept if not kept[name]) >= threshold
    return max((name for name in kept if kept[name] != drops), key=scores.__getitem__), f"threshold {threshold:.3f}"


def fits(field: dict[str, Any], value: object) -> bool:
    """Whether a value of the answer is one of the mission's field."""
    kind = field["kind"]
    if kind == "whole number":
        return type(value) is int and field["from"] <= value <= field["to"]
    if kind == "short text":
        return isinstance(value, str) and len(value) <= field["longest"]
    return isinstance(value, str) and value in words(field)


def words(field: dict[str, Any]) -> list[str]:
    """The values of a yes/no or choice, in their order."""
    return field["choices"] if field["kind"] == "choice" else ["yes", "no"]


def ask(questions: Questions, frame: bytes, bundle: dict[str, Any]) -> dict[str, Any]:
    """The outcome for one raw RGB frame of 512x512, already stretched where the bundle has a stretch.

    Raises NoGoError if the server's reply is not an answer.
    """
    mission = bundle["mission"]
    fields = mission.get("fields", [])
    if mission["blank"] and is_blank(frame):
        return {
            "category": mission["blank"],
            "decided_by": "blank rule",
            "model_category": None,
            "scores": None,
            **({"fields": None, "field_scores": {}} if fields else {}),
            "blank": True,
        }
    size = bundle["frame_size"]
    answer, found, of_fields = questions.ask_with_fields("the frame", png(shrink(frame, size), size))
    field_scores = {
        field["name"]: dict(zip(words(field), of_fields[field["name"]]))  # noqa: B905 - Python 3.9
        for field in fields
        if field["name"] in of_fields
    }
    weights = {label: math.exp(value) for label, value in found.items()}
    mass = sum(weights.values())
    scores = {label: weight / mass for label, weight in weights.items()}
    try:
        verdict = json.loads(answer)
        said, reason = verdict["category"], verdict["reason"]
        values = {field["name"]: verdict[field["name"]] for field in fields}
        if said not in scores or not all(fits(field, values[field["name"]]) for field in fields):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        said, reason, values = None, None, None
    point = bundle["operating_point"]
    category, by = decide(said, scores, point["drop_threshold"] if point else None, mission, field_scores)
    return {
        "answer": answer, "category": category, "decided_by": by, "model_category": said, "reason": reason,
        "scores": scores, "label_mass": mass, **({"fields": values, "field_scores": field_scores} if fields else {}),
        "blank": False,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description="Ask about raw RGB frames of 512x512x3 bytes; needs a running server.")
    parser.add_argument("frames", type=Path, nargs="+", help="raw frames: rows from the top, red, green, blue")
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="the server of serve.sh (default: %(default)s)")
    parser.add_argument("--key-file", type=Path, help="file with the server's key (default: LLAMA_API_KEY)")
    options = parser.parse_args()
    status = 0
    try:
        key = options.key_file.read_text(encoding="utf-8") if options.key_file else os.environ.get("LLAMA_API_KEY", "")
        folder = Path(__file__).resolve().parent
        bundle, connection = read_bundle(folder), Connection(options.url, key.strip())
        marker, _ = check_server(connection, folder, bundle)
        questions = Questions(connection, folder, bundle, marker)
        for path in options.frames:
            frame = path.read_bytes()
            if len(frame) != CAMERA_SIZE * CAMERA_SIZE * BANDS:
                raise NoGoError(
                    f"{path} has {len(frame)} bytes, not {CAMERA_SIZE * CAMERA_SIZE * BANDS} (512x512x3). "
                    "Give it raw RGB: PNG and JPEG are not read here."
                )
            outcome = {"file": str(path), **ask(questions, frame, bundle)}
            sys.stdout.write(json.dumps(outcome) + "\n")
            sys.stdout.flush()
            status = status or int(outcome["category"] is None)
    except (NoGoError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
