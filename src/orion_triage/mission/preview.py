"""What a mission makes of a model's task, for `orion mission check`: prompt, grammar, requests per frame."""

from collections.abc import Callable
from typing import Any

from orion_triage.mission.contract import contract_sha256
from orion_triage.mission.fields import allowed
from orion_triage.mission.mission import Mission, listed
from orion_triage.mission.prompt import IMAGE, Coordinates, user_text
from orion_triage.mission.scoring import field_cues, label_tree
from orion_triage.mission.verdict import answer_schema, grammar


def preview(mission: Mission, tokenize: Callable[[str], list[int]]) -> dict[str, Any]:
    """All that follows from the mission with a model's tokenizer (`tokenize` adds no special tokens).

    Raises OrionError if the tokenizer cannot score the names, or a field that has a rule.
    """
    nodes = label_tree(mission, tokenize)
    scored = {one.field for one in field_cues(mission, tokenize)}
    in_flight, with_place = user_text(mission, None), user_text(mission, Coordinates(-120.62, 34.0))
    return {
        "name": mission.name,
        "categories": [
            category.model_dump(mode="json") | {"costs": costs}
            for category, costs in zip(mission.categories, mission.costs, strict=True)
        ],
        "fields": [field.model_dump(mode="json") | {"allowed": allowed(field)} for field in mission.fields],
        "blank": mission.blank,
        "unparsable": mission.unparsable,
        "reasons_for": list(mission.reasons_for or ()),
        "contract_sha256": contract_sha256(mission),
        "prompt": in_flight,
        "prompt_tokens": len(tokenize(in_flight)),
        "tokens_before_image": len(tokenize(before)) if (before := in_flight.partition(IMAGE)[0]) else 0,
        "prompt_with_coordinates": with_place,
        "prompt_with_coordinates_tokens": len(tokenize(with_place)),
        "name_tokens": {name: len(tokenize(name)) for name in mission.names},
        "grammar": grammar(mission),
        "json_schema": answer_schema(mission),
        "scoring_requests": 1 + sum(bool(node.text) for node in nodes),
        "notes": [
            f"{listed([mission.names[index] for group in node.names for index in group])} begin alike ({node.text}): "
            "one request more per frame"
            for node in nodes
            if node.text
        ]
        + [
            f"values of {field.name} begin alike: their probabilities are not read"
            for field in mission.fields
            if field.words and field.name not in scored
        ],
    }
