"""The contract between ground and flight: categories, verdict and grammar.

Datasets, adapters and deployed flight software use these exact bytes. Only this module defines them.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from orion_triage.errors import OrionError


class Category(StrEnum):
    """The action for a frame: HIGH is sent now, MEDIUM is stored and sent in bulk, LOW is dropped."""

    HIGH = "HIGH"
    MEDIUM = "MEDIUM"
    LOW = "LOW"


CATEGORIES: tuple[Category, ...] = (Category.HIGH, Category.MEDIUM, Category.LOW)


@dataclass(frozen=True)
class Verdict:
    """The model's verdict on one frame."""

    reason: str
    category: Category

    def to_json(self) -> str:
        """The answer's bytes: `reason` first, one space after each colon and comma."""
        return json.dumps({"reason": self.reason, "category": self.category.value})


CATEGORY_CUE = '"category": "'  # the next letter of the answer determines the category
# The beginning of an answer without a reason; the model continues it with the category.
VERDICT_START = Verdict("", Category.HIGH).to_json().partition(CATEGORY_CUE)[0] + CATEGORY_CUE


def category_tokens(tokenize: Callable[[str], list[int]]) -> list[int]:
    """The first token of each of CATEGORIES after the cue, in their order.

    `tokenize` adds no special tokens. Raises OrionError if a label's first token merges with the cue, or if two labels
    have the same first token: one token would then not determine the category.
    """
    head = Verdict("x", Category.HIGH).to_json().partition(CATEGORY_CUE)[0] + CATEGORY_CUE
    start, tokens = tokenize(head), [tokenize(head + category) for category in CATEGORIES]
    first = {ids[len(start)] for ids in tokens if ids[: len(start)] == start and len(ids) > len(start)}
    if len(first) < len(CATEGORIES):
        raise OrionError(
            "the model's tokenizer does not give the three labels different first tokens, so they cannot be scored.",
            "Use a base of the LFM2-VL family.",
        )
    return [ids[len(start)] for ids in tokens]


LONGEST_REASON = 160  # characters; the catalogue's longest has 88
# A token has at least one character, and a verdict has 36 characters besides the reason, so an answer that follows the
# grammar is never cut.
ANSWER_TOKENS = LONGEST_REASON + 40
# In llama.cpp's GBNF. Exactly the bytes of a verdict, so the answer has the tokens of training: one space after colon
# and comma, printable ASCII without quote and backslash.
_LABELS = " | ".join(f'"{category}"' for category in CATEGORIES)
GRAMMAR = (
    f'root ::= "{{\\"reason\\": \\"" reason "\\", \\"category\\": \\"" category "\\"}}"\n'
    f"reason ::= [ !#-\\[\\]-~]{{1,{LONGEST_REASON}}}\n"
    f"category ::= {_LABELS}\n"
)
CATEGORY_GRAMMAR = f'root ::= category "\\"}}"\ncategory ::= {_LABELS}\n'  # for the text after the cue
# The tokenizer reads these as the end of a turn, an image or a thought, not as text.
_CONTROL = re.compile(r"<\|[^<>|]*\|>|<image>|</?think>")


def reason_fault(reason: str) -> str:
    """The fault of a reason that must not be used in training, as text; empty if it has none."""
    if found := _CONTROL.search(reason):
        return f"contains the model's control token {found[0][:40]!r}"
    if odd := next((character for character in reason if not character.isprintable()), ""):
        return f"contains the unprintable character {odd!a}"
    return ""


_FENCE = "```"


def parse_verdict(answer: str) -> Verdict | None:
    """The verdict in a model's answer, or None.

    Accepted: one JSON object with a string `reason` and a `category` that is exactly one of the three labels, alone or
    in a Markdown code fence, which instruction-tuned bases often add. A verdict-only answer has an empty reason. If a
    key appears twice, the last value counts, as usual in JSON. Any other text, including a truncated object, is
    unparsable and counted as such by the evaluation.
    """
    text = answer.strip()
    # Not a regular expression: its time would grow with the square of the number of blanks in a server's answer.
    if len(text) >= 2 * len(_FENCE) and text.startswith(_FENCE) and text.endswith(_FENCE):
        text = text[len(_FENCE) : -len(_FENCE)].removeprefix("json").strip()
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or set(value) != {"reason", "category"}:
        return None
    reason, category = value["reason"], value["category"]
    if not isinstance(reason, str) or not isinstance(category, str) or category not in CATEGORIES:
        return None
    return Verdict(reason, Category(category))
