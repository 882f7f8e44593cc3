"""What a model learns of a mission, and the file by which datasets, adapters, pairs and bundles carry it.

A product without the file is of the published mission.
"""

import json
from pathlib import Path
from typing import Any

from orion_triage.errors import OrionError
from orion_triage.mission.load import checked
from orion_triage.mission.mission import Mission, default_mission
from orion_triage.mission.prompt import Coordinates, user_text
from orion_triage.mission.verdict import grammar
from orion_triage.safe.files import sha256_of_text, write_text
from orion_triage.safe.reading import read_object

FILE_NAME = "mission.json"
_SHOWN = 120  # characters of what differs, in an error


def contract(mission: Mission) -> dict[str, Any]:
    """The parts of a mission that a dataset shows and a model answers; values, costs and actions are not among them."""
    return {
        "categories": list(mission.names),
        "prompt": user_text(mission, None),
        "prompt with coordinates": user_text(mission, Coordinates(-120.62, 34.0)),
        "answer": grammar(mission),
    }


def contract_sha256(mission: Mission) -> str:
    return sha256_of_text(json.dumps(contract(mission)))


def contract_of(mission: Mission) -> dict[str, str]:
    """The mission as a stage's manifest names it."""
    return {"name": mission.name, "contract": contract_sha256(mission)}


def write_mission(folder: Path, mission: Mission) -> None:
    """Write the mission into a product's folder; nothing for the published one, whose products never had the file."""
    if mission != default_mission():
        write_text(folder / FILE_NAME, portable(mission).model_dump_json(indent=1) + "\n")


def portable(mission: Mission) -> Mission:
    """The mission without paths of this machine."""
    return mission.model_copy(update={"places": ""})


def mission_of(folder: Path) -> Mission:
    """The mission of a dataset, adapter or pair; raises OrionError if its file is damaged."""
    path = folder / FILE_NAME
    if not path.is_file():
        return default_mission()
    mission, faults = checked(read_object(path))
    if mission is None:
        raise OrionError(f"{path} is damaged: {faults[0][1]}.", "Copy the folder again.")
    return mission


def require_mission(folder: Path, mission: Mission) -> None:
    """Raise OrionError unless the product in the folder is of a mission with the same contract."""
    own = mission_of(folder)
    if differing := differences(own, mission):
        raise OrionError(
            f"{folder} is of the mission {own.name}, and this run is of {mission.name}. They differ in "
            f"{'; '.join(differing)}.",
            "Name the mission of both with --mission FILE, or use a product of this mission.",
        )


def differences(first: Mission, second: Mission) -> list[str]:
    """What differs in the contracts of two missions, in words; empty if a model of one is a model of the other."""
    ours, theirs = contract(first), contract(second)
    return [f"{part}: {_first_difference(ours[part], theirs[part])}" for part in ours if ours[part] != theirs[part]]


def _first_difference(one: Any, two: Any) -> str:
    if not isinstance(one, str):
        return f"{', '.join(one)} and {', '.join(two)}"
    place = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
    start = max(0, place - 20)
    return " and ".join(ascii(text[start : start + _SHOWN // 2]) for text in (one, two))
