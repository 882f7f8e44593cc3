"""The probabilities behind an answer: where they are read in its tokens, and what they mean for the mission."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from orion_triage.errors import OrionError
from orion_triage.mission.fields import examples
from orion_triage.mission.mission import FieldOfAnswer, Mission
from orion_triage.mission.verdict import Verdict, answer_text, around, cue_of

FieldScores = Mapping[str, Mapping[str, float]]  # field -> value -> its probability; they sum to 1


@dataclass(frozen=True)
class LabelNode:
    """A place where names of categories part: after `text` of the name, `tokens` continue different ones.

    `names` has the indices of the categories that each token leads to.
    """

    text: str
    tokens: tuple[int, ...]
    names: tuple[tuple[int, ...], ...]


def label_tree(mission: Mission, tokenize: Callable[[str], list[int]]) -> tuple[LabelNode, ...]:
    """Where the names of the categories part in tokens, the first place first; one request scores each place.

    Mostly the first tokens of all names differ: there is one place, and the text before it is empty. `tokenize` adds no
    special tokens. Raises OrionError if a name cannot be scored: if its first token merges with the cue, or if the
    name's beginning is tokenized differently without its end.
    """
    before, after = around(mission, "x")
    start = tokenize(before)
    paths = []
    for name in mission.names:
        ids = tokenize(before + name + after)
        if ids[: len(start)] != start or len(ids) <= len(start):
            raise OrionError(
                f"the model's tokenizer merges the category {name} with the text before it, so it cannot be scored.",
                "Rename it, or use a base with another tokenizer.",
            )
        paths.append(ids[len(start) :])
    nodes: list[LabelNode] = []
    waiting = [(tuple(range(len(paths))), 0)]  # categories with the same first tokens, and how many
    while waiting:
        group, depth = waiting.pop(0)
        if any(len(paths[index]) <= depth for index in group):
            raise OrionError(
                f"the model's tokenizer does not tell the categories {' and '.join(mission.names[i] for i in group)} "
                "apart, so they cannot be scored.",
                "Rename one of them, or use a base with another tokenizer.",
            )
        following: dict[int, list[int]] = {}
        for index in group:
            following.setdefault(paths[index][depth], []).append(index)
        waiting += [(tuple(names), depth + 1) for names in following.values() if len(names) > 1]
        if len(following) > 1:
            name = mission.names[group[0]]
            common = [*start, *paths[group[0]][:depth]]
            beginnings = (name[:count] for count in range(len(name) + 1))
            text = next((begun for begun in beginnings if tokenize(before + begun) == common), None)
            if text is None:
                raise OrionError(
                    f"the categories {' and '.join(mission.names[index] for index in group[:2])} begin with the same "
                    "tokens, and the tokenizer writes their common beginning differently when it stands alone.",
                    "Rename one of them.",
                )
            nodes.append(LabelNode(text, tuple(following), tuple(tuple(names) for names in following.values())))
    return tuple(nodes)


@dataclass(frozen=True)
class FieldCue:
    """Where a yes/no or choice is decided in the answer: after `cue`, `tokens` begin the values, in their order."""

    field: str
    cue: str
    tokens: tuple[int, ...]


def field_cues(mission: Mission, tokenize: Callable[[str], list[int]]) -> tuple[FieldCue, ...]:
    """The cues of the mission's yes/no and choices, whose probabilities are read from the answer at no request more.

    A choice whose values begin with the same token has none. Raises OrionError if such a field has a rule.
    """
    found = []
    for field in mission.fields:
        if not field.words:
            continue
        begins = [_first_token(mission, field, word, tokenize) for word in field.words]
        if None not in begins and len(set(begins)) == len(begins):
            found.append(
                FieldCue(field.name, cue_of(field.name), tuple(token for token in begins if token is not None))
            )
        elif field.when:
            raise OrionError(
                f"the rule of {field.name} cannot be applied: with the model's tokenizer, its values do not begin with "
                "different tokens, so their probabilities are not read.",
                "Choose values that begin with different letters, or remove when and then.",
            )
    return tuple(found)


def _first_token(mission: Mission, field: FieldOfAnswer, word: str, tokenize: Callable[[str], list[int]]) -> int | None:
    """The first token of a value in the answer; None if it merges with the text before it."""
    values = tuple((name, word if name == field.name else value) for name, value in examples(mission, "x"))
    before, cue, after = answer_text(mission, Verdict("x", mission.names[0], values)).partition(cue_of(field.name))
    start, whole = tokenize(before + cue), tokenize(before + cue + after)
    return whole[len(start)] if whole[: len(start)] == start else None


@dataclass(frozen=True)
class Scoring:
    """What a client asks for and reads: the places where categories part, and the cues of the fields."""

    mission: Mission
    nodes: tuple[LabelNode, ...]
    field_cues: tuple[FieldCue, ...]

    @classmethod
    def of(cls, mission: Mission, tokenize: Callable[[str], list[int]]) -> "Scoring":
        """With a model's tokenizer; raises OrionError as `label_tree` and `field_cues` do."""
        return cls(mission, label_tree(mission, tokenize), field_cues(mission, tokenize))

    @property
    def after_cue(self) -> list[tuple[str, tuple[int, ...]]]:
        """The text after the category's cue, mostly none, and the tokens that may come next, for each node."""
        return [(node.text, node.tokens) for node in self.nodes]

    @property
    def further(self) -> dict[str, tuple[int, ...]]:
        """The cue of each field, and the tokens that may come next."""
        return {one.cue: one.tokens for one in self.field_cues}

    def of_categories(self, found: Sequence[Sequence[float]] | None) -> list[float] | None:
        """The log-probability of each category, from those of the tokens of each node; None without them."""
        if found is None:
            return None
        scores = [0.0] * len(self.mission.names)
        for node, values in zip(self.nodes, found, strict=True):
            for indices, value in zip(node.names, values, strict=True):
                for index in indices:
                    scores[index] += value
        return scores

    def of_fields(self, found: Mapping[str, Sequence[float]]) -> FieldScores:
        """The probabilities of the values of each field whose cue is in `found` (cue -> log-probabilities)."""
        words = {field.name: field.words for field in self.mission.fields}
        return {
            one.field: dict(zip(words[one.field], normalized(found[one.cue])[0], strict=True))
            for one in self.field_cues
            if one.cue in found
        }


def normalized(log_probabilities: Sequence[float]) -> tuple[tuple[float, ...], float]:
    """The probabilities divided by their sum, and that sum."""
    weights = [math.exp(value) for value in log_probabilities]
    mass = sum(weights)
    return tuple(weight / mass for weight in weights), mass
