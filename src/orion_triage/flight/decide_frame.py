"""From a raw frame to the picture of the request, and from an answer to the decision, as on the ground.

Reads no files and asks no server.

`orion bundle` copies this file beside check_flight.py into every bundle. It needs only Python 3.9 or newer.
"""

from __future__ import annotations

import base64
import json
import math
import struct
import zlib
from operator import sub
from typing import Any

CAMERA_SIZE = 512
BANDS = 3
RAW_BYTES = CAMERA_SIZE * CAMERA_SIZE * BANDS
PRECISION_BITS = 22  # of the weights, as in Pillow, so that every value is rounded alike

# --- frame ----------------------------------------------------------------------------------------------------


def grey(frame: bytes) -> list[bytes]:
    """The grey levels of an RGB frame by rows (ITU-R 601, in Pillow's fixed point).

    Every band is one number with four bytes for each pixel, which multiplies all pixels at once.
    """
    weighted = int.from_bytes((0x8000).to_bytes(4, "little") * (CAMERA_SIZE * CAMERA_SIZE), "little")
    for band, weight in enumerate((19595, 38470, 7471)):
        wide = bytearray(4 * CAMERA_SIZE * CAMERA_SIZE)
        wide[::4] = frame[band::BANDS]
        weighted += int.from_bytes(wide, "little") * weight
    levels = weighted.to_bytes(4 * CAMERA_SIZE * CAMERA_SIZE, "little")[2::4]  # the third byte: divided by 2^16
    return [levels[row : row + CAMERA_SIZE] for row in range(0, len(levels), CAMERA_SIZE)]


def is_blank(measures: dict[str, float], rule: dict[str, Any]) -> bool:
    """Whether a frame is below both limits of the step "blank rule": entropy, and mean |dx| + mean |dy|."""
    return bool(measures["entropy_bits"] < rule["entropy_bits_below"] and measures["gradient"] < rule["gradient_below"])


def is_unlike(measures: dict[str, float], step: dict[str, Any]) -> bool:
    """Whether a measure of the frame is outside its range in the step "unlike training"."""
    return any(not low <= measures[name] <= high for name, (low, high) in step["ranges"].items())


def appearance(frame: bytes, between: list[int]) -> dict[str, float]:
    """The measures of a frame on these rows: grey levels that 1, 50 and 99 % of the pixels reach, and others."""
    first, last = between
    rows = grey(frame)[first : last + 1]
    pixels = b"".join(rows)
    counts = [pixels.count(level) for level in range(256)]
    shares = [count / len(pixels) for count in counts]
    entropy = -sum(share * math.log2(share) for share in shares if share)
    across = sum(sum(map(abs, map(sub, row, row[1:]))) for row in rows)
    down = sum(sum(map(abs, map(sub, above, row))) for above, row in zip(rows, rows[1:]))  # noqa: B905, RUF007
    gradient = across / (len(rows) * (CAMERA_SIZE - 1)) + down / ((len(rows) - 1) * CAMERA_SIZE)
    dark, middle, bright = (_level(counts, share * len(pixels)) for share in (1, 50, 99))
    return {
        "dark": dark, "middle": middle, "bright": bright, "contrast": bright - dark,
        "entropy_bits": round(entropy, 6), "gradient": round(gradient, 6),
    }  # fmt: skip


def _level(counts: list[int], hundredths: int) -> int:
    """The smallest grey level up to which there are as many pixels, in hundredths."""
    seen = 0
    for level, count in enumerate(counts):
        seen += 100 * count
        if seen >= hundredths:
            return level
    return len(counts) - 1


def shrink(frame: bytes, size: int, width: int = CAMERA_SIZE) -> bytes:
    """The frame of `width` averaged to `size` x `size` RGB pixels: first along the rows, then along the columns."""
    if size % width == 0:  # each pixel several times, or once: much quicker than the sums below
        times, row = size // width, width * BANDS
        pixels = (frame[at : at + BANDS] * times for at in range(0, len(frame), BANDS))
        wide = b"".join(pixels) if times > 1 else frame
        return b"".join(wide[at : at + row * times] * times for at in range(0, len(wide), row * times))
    boxes, narrow = [_box(place, size, width) for place in range(size)], bytearray(width * size * BANDS)
    for place, inside in enumerate(boxes):
        for band in range(BANDS):
            columns = [frame[pixel * BANDS + band :: width * BANDS] for pixel in inside]
            narrow[place * BANDS + band :: size * BANDS] = _means(columns)
    row = size * BANDS
    return b"".join(_means([bytes(narrow[at * row : (at + 1) * row]) for at in inside]) for inside in boxes)


def _means(lines: list[bytes]) -> bytes:
    """The mean of the lines' values at each place, rounded as Pillow does.

    Two lines are added as one number each, forty times as fast: the mean of two bytes is (a | b) - ((a ^ b) >> 1).
    """
    if len(lines) == 1:
        return lines[0]
    if len(lines) == 2:
        one, other = (int.from_bytes(line, "big") for line in lines)
        without_last_bits = int.from_bytes(b"\xfe" * len(lines[0]), "big")
        means = (one | other) - (((one ^ other) & without_last_bits) >> 1)
        return means.to_bytes(len(lines[0]), "big")
    weight, half = int(0.5 + 1 / len(lines) * (1 << PRECISION_BITS)), 1 << (PRECISION_BITS - 1)
    return bytes((sum(values) * weight + half) >> PRECISION_BITS for values in zip(*lines))  # noqa: B905 - Python 3.9


def quarters(frame: bytes, size: int) -> list[bytes]:
    """The four quarters of a frame of the camera's size, by rows, each of `size` x `size` RGB pixels."""
    half, row = CAMERA_SIZE // 2, CAMERA_SIZE * BANDS
    cut = []
    for top in (0, half):
        for left in (0, half * BANDS):
            lines = range(top * row + left, (top + half) * row, row)
            cut.append(b"".join(frame[at : at + half * BANDS] for at in lines))
    return [shrink(one, size, half) for one in cut]


def _box(place: int, size: int, width: int) -> list[int]:
    """The input pixels whose centres lie in the box of an output pixel, which is their mean.

    Where pixels are more than before, the box is one input pixel wide: the nearest one.
    """
    scale = width / size
    centre, wide = (place + 0.5) * scale, max(scale, 1.0)
    first, last = int(centre - wide / 2 + 0.5), min(width, int(centre + wide / 2 + 0.5))
    return [pixel for pixel in range(first, last) if -0.5 < (pixel - centre + 0.5) / wide <= 0.5]


def png(pixels: bytes, size: int) -> bytes:
    """RGB pixels as a PNG file, each line without a filter, so that `pixels_of` needs no decoder."""
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


def pixels_of(data: bytes) -> bytes:
    """The RGB pixels of a golden frame at the camera's size: of a PNG file that `png` wrote.

    Raises ValueError for any other.
    """
    start = 8 + 12 + 13  # the signature, and IHDR with its length, kind and checksum
    width, height = struct.unpack(">II", data[16:24])
    (length,) = struct.unpack(">I", data[start : start + 4])
    if (width, height, data[start + 4 : start + 8]) != (CAMERA_SIZE, CAMERA_SIZE, b"IDAT"):
        raise ValueError("not a golden frame")
    lines, line = zlib.decompress(data[start + 8 : start + 8 + length]), 1 + CAMERA_SIZE * BANDS
    if len(lines) != CAMERA_SIZE * line or any(lines[::line]):
        raise ValueError("not a golden frame")
    return b"".join(lines[at + 1 : at + line] for at in range(0, len(lines), line))


# --- decision -------------------------------------------------------------------------------------------------


def step_of(bundle: dict[str, Any], name: str) -> dict[str, Any] | None:
    """The step of the bundle's decision with this name, or None."""
    return next((step for step in bundle["decision"] if step["step"] == name), None)


def decide(
    steps: list[dict[str, Any]],
    said: str | None,
    scores: dict[str, float] | None,
    field_scores: dict[str, dict[str, float]] | None = None,
    *,
    blank: bool = False,
    answered: bool = True,
    unlike: bool = False,
) -> tuple[str | None, str]:
    """The category and what decided it: the first of the bundle's steps that applies.

    `said` is the category of the answer, None without a verdict. Raises ValueError for a step of another version.
    """
    guard: dict[str, Any] | None = None
    for step in steps:
        name = step["step"]
        if name == "blank rule":
            if blank:
                return step["category"], name
        elif name == "no answer":
            if not answered:
                return step["category"], name
        elif name == "no verdict":
            if said is None:
                return step["category"], name
        elif name == "field rule":
            probability = (field_scores or {}).get(step["field"], {}).get(step["value"], 0.0)
            if probability >= step["probability_at_least"]:
                return step["category"], f"{step['field']} is {step['value']}"
        elif name == "unlike training":
            guard = step if unlike else None
        elif name == "threshold":
            if scores is not None:
                limit = step["drop_probability_at_least"]
                drops = sum(scores[label] for label in step["dropped"]) >= limit
                among = step["dropped"] if drops else step["kept"]
                return guarded(guard, max(among, key=scores.__getitem__), f"threshold {limit:.3f}", scores)
        elif name == "model":
            return guarded(guard, said, name, scores)
        else:
            raise ValueError(f"the step {name} is not known")
    raise ValueError("no step decides")


def guarded(
    guard: dict[str, Any] | None, category: str | None, by: str, scores: dict[str, float] | None
) -> tuple[str | None, str]:
    """The decision, or that of the step "unlike training" if it would drop an unlike frame."""
    if guard is None or category not in guard["dropped"]:
        return category, by
    return max(guard["instead"], key=lambda name: scores[name] if scores else 0.0), "unlike training"


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


def action_of(bundle: dict[str, Any], category: str | None) -> str:
    """What happens to a frame: send, store or drop; a frame without a category is stored."""
    actions = {one["name"]: one["action"] for one in bundle["mission"]["categories"]}
    return actions[category] if category else "store"


def without_model(bundle: dict[str, Any], *, blank: bool, error: str = "") -> dict[str, Any]:
    """The outcome of a frame that the model did not judge: blank, or with the `error` refused or not answered."""
    category, by = decide(bundle["decision"], None, None, blank=blank, answered=not error)
    return {
        "category": category,
        "decided_by": by,
        "model_category": None,
        "scores": None,
        **({"fields": None, "field_scores": {}} if bundle["mission"].get("fields") else {}),
        "blank": blank,
        "action": action_of(bundle, category),
        **({"error": " ".join(error.split())} if error else {}),
    }


def with_model(
    bundle: dict[str, Any],
    answer: str,
    log_probabilities: dict[str, float],
    of_fields: dict[str, list[float]],
    *,
    unlike: bool = False,
) -> dict[str, Any]:
    """The outcome of a frame by its answer, the log-probabilities of the categories, and the probabilities of fields.

    `of_fields` has those of the values of each yes/no and choice field, in their order.
    """
    fields = bundle["mission"].get("fields", [])
    field_scores = {
        field["name"]: dict(zip(words(field), of_fields[field["name"]]))  # noqa: B905 - Python 3.9
        for field in fields
        if field["name"] in of_fields
    }
    weights = {label: math.exp(value) for label, value in log_probabilities.items()}
    mass = sum(weights.values())
    scores = {label: weight / mass for label, weight in weights.items()}
    try:
        verdict = json.loads(answer)
        said, reason = verdict["category"], verdict["reason"]
        values = {field["name"]: verdict[field["name"]] for field in fields}
        if said not in scores or not all(fits(field, values[field["name"]]) for field in fields):
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError):
        said, reason, values = None, None, None
    category, by = decide(bundle["decision"], said, scores, field_scores, unlike=unlike)
    return {
        "answer": answer, "category": category, "decided_by": by, "model_category": said, "reason": reason,
        "scores": scores, "label_mass": mass, **({"fields": values, "field_scores": field_scores} if fields else {}),
        "blank": False, "action": action_of(bundle, category),
    }  # fmt: skip


def with_head(
    bundle: dict[str, Any], head: dict[str, Any], states: list[list[float]], *, unlike: bool = False
) -> dict[str, Any]:
    """The outcome of a frame by the head (the content of head.json) and the states after its four quarters.

    A head gives no reason: its reason, and the mission's short texts, are empty.
    """
    mission = bundle["mission"]
    scores = head_scores(head, states)
    said = max(scores, key=scores.__getitem__)
    values = {field["name"]: "" for field in mission.get("fields", [])}
    answer = {"reason": "", "category": said, **values}
    category, by = decide(bundle["decision"], said, scores, unlike=unlike)
    return {
        "answer": json.dumps({key: answer[key] for key in mission["keys"]}), "category": category, "decided_by": by,
        "model_category": said, "reason": "", "scores": scores, "label_mass": 1.0,
        **({"fields": values, "field_scores": {}} if values else {}),
        "blank": False, "action": action_of(bundle, category),
    }  # fmt: skip


def head_scores(head: dict[str, Any], states: list[list[float]]) -> dict[str, float]:
    """The probabilities of the categories: a logistic regression on the mean and the spread of the states.

    Raises ValueError for states of another width than the head's.
    """
    names, width = head["categories"], head["width"]
    if any(2 * len(state) != width for state in states):
        raise ValueError(f"a hidden state has {len(states[0])} numbers, of which the head takes {width // 2}")
    means = [sum(values) / len(values) for values in zip(*states)]  # noqa: B905 - Python 3.9
    spreads = [
        math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
        for values, mean in zip(zip(*states), means)  # noqa: B905
    ]
    described, count = means + spreads, len(names) * width
    weights = struct.unpack(f"<{count}f", base64.b64decode(head["weights"]))
    logits = [
        sum(weight * value for weight, value in zip(weights[row * width : (row + 1) * width], described)) + bias  # noqa: B905
        for row, bias in enumerate(head["bias"])
    ]
    powers = [math.exp(logit - max(logits)) for logit in logits]
    return {name: power / sum(powers) for name, power in zip(names, powers)}  # noqa: B905


def picture_for(bundle: dict[str, Any], frame: bytes) -> tuple[bytes | None, bool]:
    """The PNG file that the model is asked about for a raw frame of RAW_BYTES, and whether the frame is unlike.

    There is no picture if the frame is blank. Unlike: outside the ranges of the step "unlike training".
    """
    blank, unlike = by_rules(bundle, frame)
    size = bundle["frame_size"]
    return (None if blank else png(shrink(frame, size), size)), unlike


def pictures_for(bundle: dict[str, Any], frame: bytes) -> tuple[list[bytes] | None, bool]:
    """The same for a head, which looks at the four quarters of the frame."""
    blank, unlike = by_rules(bundle, frame)
    size = bundle["frame_size"]
    return (None if blank else [png(quarter, size) for quarter in quarters(frame, size)]), unlike


def by_rules(bundle: dict[str, Any], frame: bytes) -> tuple[bool, bool]:
    """Whether a raw frame is blank, and whether it is unlike the training, by the steps of the decision."""
    rule, kind = step_of(bundle, "blank rule"), step_of(bundle, "unlike training")
    between = (rule or kind or {}).get("rows")
    measures = appearance(frame, between) if between else {}
    if rule and is_blank(measures, rule):
        return True, False
    return False, bool(kind and is_unlike(measures, kind))
