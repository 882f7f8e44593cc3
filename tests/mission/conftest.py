"""What the tests of missions share."""

from pathlib import Path

import pytest

from orion_triage.errors import OrionError
from orion_triage.mission.load import load_mission


def assert_named(said: str, line: str, text: str, folder: Path) -> list[str]:
    """One mistake of this mission file says `said`, at the line that begins with `line`; returns the whole message."""
    path = folder / "mission.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(OrionError) as caught:
        load_mission(path)
    (found,) = [one for one in caught.value.message.splitlines() if said in one]
    number = int(found.removeprefix(f"{path}:").partition(":")[0])
    assert text.splitlines()[number - 1].lstrip().startswith(line)
    return caught.value.message.splitlines()
