"""The contract between ground and flight: categories, prompt, coordinate format, verdict.

Datasets, adapters and flight software in the field use these exact bytes, so this module is their only
owner. Prompts are rendered from fields; nothing in the project edits a finished prompt.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from orion_triage.errors import OrionError


class Category(StrEnum):
    """What happens to a frame: HIGH is sent now, MEDIUM stored and sent in bulk, LOW dropped."""

    HIGH = "HIGH"
    MEDIUM = "MEDIUM"
    LOW = "LOW"


CATEGORIES: tuple[Category, ...] = (Category.HIGH, Category.MEDIUM, Category.LOW)


@dataclass(frozen=True)
class Verdict:
    """The model's answer for one frame."""

    reason: str
    category: Category

    def to_json(self) -> str:
        """The answer's bytes: `reason` first, one space after each colon and comma."""
        return json.dumps({"reason": self.reason, "category": self.category.value})


CATEGORY_CUE = '"category": "'  # after it, an answer's next letter decides
# What an answer without a reason begins with: the model reads it as its own, and is asked for the category alone.
VERDICT_START = Verdict("", Category.HIGH).to_json().partition(CATEGORY_CUE)[0] + CATEGORY_CUE


def category_tokens(tokenize: Callable[[str], list[int]]) -> list[int]:
    """The token that each of CATEGORIES begins with after the cue, in their order.

    `tokenize` adds no special tokens. Raises OrionError when a label's first token runs into the cue, or two labels
    begin alike: then one token cannot say which of them an answer means.
    """
    head = Verdict("x", Category.HIGH).to_json().partition(CATEGORY_CUE)[0] + CATEGORY_CUE
    start, tokens = tokenize(head), [tokenize(head + category) for category in CATEGORIES]
    if any(ids[: len(start)] != start for ids in tokens) or len({ids[len(start)] for ids in tokens}) < len(CATEGORIES):
        raise OrionError(
            "the model's tokenizer does not tell the three labels apart by their first token.",
            "Class scores need an LFM2 tokenizer; use a base of the LFM2-VL family.",
        )
    return [ids[len(start)] for ids in tokens]


LONGEST_REASON = 160  # characters; the catalogue's longest has 88
# No token is shorter than a character, and the rest of a verdict has 36: an answer under the grammar is never cut.
ANSWER_TOKENS = LONGEST_REASON + 40
# llama.cpp's form. Exactly the bytes of a verdict, so the answer stays on the tokens of training: one space after
# colon and comma, printable ASCII without quote and backslash.
_LABELS = " | ".join(f'"{category}"' for category in CATEGORIES)
GRAMMAR = (
    f'root ::= "{{\\"reason\\": \\"" reason "\\", \\"category\\": \\"" category "\\"}}"\n'
    f"reason ::= [ !#-\\[\\]-~]{{1,{LONGEST_REASON}}}\n"
    f"category ::= {_LABELS}\n"
)
CATEGORY_GRAMMAR = f'root ::= category "\\"}}"\ncategory ::= {_LABELS}\n'  # of what comes after the cue
# What the tokenizer reads as the end of a turn, an image or a thought, and never as text.
_CONTROL = re.compile(r"<\|[^<>|]*\|>|<image>|</?think>")


def reason_fault(reason: str) -> str:
    """Why a reason must not be taught, in words; empty when nothing stands against it."""
    if found := _CONTROL.search(reason):
        return f"holds the model's control token {found[0][:40]!r}"
    if odd := next((character for character in reason if not character.isprintable()), ""):
        return f"holds the unprintable character {odd!a}"
    return ""


_FENCE = "```"


def parse_verdict(answer: str) -> Verdict | None:
    """The verdict in a model's answer, or None when it has none.

    Accepted: one JSON object with a string `reason` and a `category` that is exactly one of the three
    labels, alone or in a Markdown code fence (instruction-tuned bases like to add one). A verdict-only answer has
    the empty reason; of a key given twice the last counts, as everywhere in JSON. Everything else, a cut-off object
    included, is unparsable and counted as such by the evaluation.
    """
    text = answer.strip()
    # By hand: the pattern for it takes time by the square of the blanks that somebody's server may send.
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
