"""What hostile input may end in, and what it is made of."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from orion_triage.errors import OrionError

# The same cases every time in the suite; HYPOTHESIS_PROFILE=torture draws others, many more of them. Not in
# conftest.py: the tests for a GPU also run where hypothesis is not installed.
hypothesis_settings.register_profile(
    "suite", max_examples=60, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
hypothesis_settings.register_profile(
    "torture", hypothesis_settings.get_profile("suite"), max_examples=500, derandomize=False, print_blob=True
)
hypothesis_settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))

COMPUTING_SECONDS = 5.0  # of one input; the machine's other work does not count
WAITING_SECONDS = 120  # after which something waits for what never comes
LONGEST_ERROR = 6000  # characters: 20 mistakes with a cut value each

CONTROL_TOKENS = ("<|im_end|>", "<|im_start|>assistant", "<|endoftext|>", "<image>", "<|image_start|>", "</think>")
WAYS_OUT = ("../a.png", "a/../../b.png", "/etc/passwd", "..\\a.png", "C:\\a.png", "a\0.png", "//server/a.png")
NUMBERS = ("1e999", "-1e999", "NaN", "Infinity", "-Infinity", "9" * 5000, "-" + "9" * 100_000, "0x1p3", "1_0", "٣.٣")
NASTY = (
    *CONTROL_TOKENS, *WAYS_OUT, *NUMBERS, "", " ", "\0", "\ufeff", "\ud800", "\x1b[2J", "\u202e", "\u2028", "\xa0",
    "x" * 3000, '"', "'", "=cmd|' /C calc'!A1", "{{ 7*7 }}", "%s%n", "[" * 3000, "null", "true", "__class__", "HIGH",
)  # fmt: skip

texts = st.one_of(st.text(max_size=40), st.sampled_from(NASTY))
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=10,
)
DEEP = "[" * 100_000


@st.composite
def mutated(draw: Any, whole: bytes) -> bytes:
    """`whole` with up to four places cut, doubled or overwritten."""
    data = whole
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.integers(0, 16)))
        new = draw(st.one_of(st.binary(max_size=16), texts.map(lambda text: text.encode("utf-8", "surrogatepass"))))
        data = data[:start] + new + data[draw(st.sampled_from([start, end])) :]
    return data


@st.composite
def replaced(draw: Any, value: Any) -> Any:
    """A JSON value with one of its parts, however deep, in another's place."""
    if isinstance(value, dict) and value and draw(st.integers(0, 4)):
        key = draw(st.sampled_from(sorted(value)))
        return {**value, key: draw(replaced(value[key]))}
    if isinstance(value, list) and value and draw(st.integers(0, 4)):
        place = draw(st.integers(0, len(value) - 1))
        return [*value[:place], draw(replaced(value[place])), *value[place + 1 :]]
    return draw(json_values)


def outcome(function: Callable[..., Any], *arguments: Any, named: object = "", **options: Any) -> Any:
    """What the function returns, or the OrionError that it raises: one that names `named`, in bounded time.

    Everything else that it raises is the test's failure.
    """
    began = time.process_time()
    try:
        with alarm():
            result = function(*arguments, **options)
    except OrionError as error:
        result = error
    if isinstance(result, OrionError):
        assert result.message
        assert result.fix
        assert str(named) in result.message
        assert len(str(result)) < LONGEST_ERROR
        assert str(result).replace("\n", "").isprintable()
    assert time.process_time() - began < COMPUTING_SECONDS
    return result


@contextmanager
def alarm() -> Iterator[None]:
    """An end for what waits: a pipe nobody writes into would stop the suite."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"still waiting after {WAITING_SECONDS} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(WAITING_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def to_bytes(value: Any) -> bytes:
    """JSON as strangers write it: with NaN and lone surrogates where the value has them."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
