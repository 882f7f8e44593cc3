"""Missions of two and of eight categories from their file to a bundle that its own checker calls GO."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from orion_triage.dataset.catalogue import COLUMNS, load_catalogue
from orion_triage.llama_cpp.toolchain import find_toolchain
from tests.conftest import orion

PLACES = {2: 6, 8: 3}  # of each category, by their number: one for val, one for test, the others for training
NAMES = {  # a drawn morphology each; SEA begins SEAPORT; the last two part at their second letter
    "SEA": "ocean_water", "ICE": "desert_ice_canopy", "STREETS": "urban_grid", "FIELDS": "geological",
    "SEAPORT": "mega_port", "RUNWAYS": "mega_airport", "DAMS": "energy_dam", "DIGS": "mega_mine_industry",
}  # fmt: skip
ACTIONS = ("drop", "drop", "store", "drop", "send", "send", "store", "store")


def write_mission(folder: Path, count: int, *lines: str) -> Path:
    """A mission of the first categories and its places, all of drawn tiles."""
    names = list(NAMES)[:count] if count > 2 else ["STREETS", "SEAPORT"]
    actions = dict(zip(NAMES, ACTIONS, strict=True))
    text = [
        f'name = "of {count}"',
        'places = "places.csv"',
        'prompt = "Look down{coordinates}. Choose:\\n{categories}\\nAnswer in JSON."',
        'coordinates = " at {longitude}, {latitude}"',
        *lines,
    ]
    for place, name in enumerate(names):
        text += [
            "[[categories]]",
            f'name = "{name}"',
            f'definition = "What is drawn as number {place}."',
            f'action = "{actions[name]}"',
            f"value = {place}",
            f"prior = {1 / count}",
        ]
    path = folder / "mission.toml"
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    with (folder / "places.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for name in names:
            for target in [one for one in load_catalogue() if one.morphology == NAMES[name]][: PLACES[count]]:
                where = target.coordinates
                assert where is not None
                table.writerow([target.name, name, target.morphology, where.lon, where.lat, f"Number {target.name}."])
    return path


@pytest.mark.slow
@pytest.mark.llama_cpp
@pytest.mark.parametrize(
    ("count", "lines", "requests"),
    [
        (2, ('image = "after the text"',), 2),
        (8, ('keys = ["category", "reason"]', 'unparsable = "STREETS"'), 4),
    ],
)
def test_a_mission_from_its_file_to_go(count: int, lines: tuple[str, ...], requests: int, tmp_path: Path) -> None:
    mission = write_mission(tmp_path, count, *lines)
    checked = orion("mission", "check", mission, "--json")
    assert checked.returncode == 0, checked.stderr
    assert json.loads(checked.stdout)["scoring_requests"] == requests
    sets = ["dataset.split_distance_km=20", "fine_tune.epochs=1", "fuse.check_records=4", "variants.all=false"]
    sets += ["evaluate.max_new_tokens=40"]
    words = [word for value in sets for word in ("--set", value)]
    # The larger one stage by stage, without the evaluations by transformers, of which those of one mission are enough.
    stages = [(name,) for name in ("dataset", "fine-tune", "fuse", "quantize")] + [("evaluate", "--gguf"), ("report",)]
    run = tmp_path / "runs" / f"tiny-of-{count}"
    for number, command in enumerate(stages if count == 8 else [("run",)]):
        more = words if command != ("report",) else []
        made = orion(*command, *(["--mission", mission] if number == 0 else ["--run", run]), *more, cwd=tmp_path)
        assert made.returncode == 0, made.stderr
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    names = [category["name"] for category in results["settings"]["mission"]["categories"]]
    assert len(names) == count
    rates = results["models"]["quantized"]["B"]
    assert list(rates["confusion"]) == names
    assert rates["scored"] == rates["count"] > 0
    assert {f"always {name}" for name in names} <= set(results["baselines"])
    report = (run / "report.html").read_text(encoding="utf-8")
    said = re.sub(r'<tr><th scope="row">mission\..*?</tr>', "", report)  # the settings that differ, with their defaults
    assert re.findall(r".{30}\b(?:HIGH|MEDIUM|LOW)\b.{30}", said) == []
    assert results["outdated"] == {}
    for product in ("dataset", "orion_lora_weights", "orion_merged", "gguf"):
        assert json.loads((run / product / "mission.json").read_text())["name"] == f"of {count}"
    if count == 2:
        again = orion("run", *words, "--run", run, cwd=tmp_path)  # without --mission: the run has its own
        assert again.returncode == 0, again.stderr
        assert "to do" not in again.stderr
    bundled = orion("bundle", run, "--out", tmp_path / "bundle", "--accept-risk", "a test", cwd=tmp_path)
    assert bundled.returncode == 0, bundled.stderr
    server = find_toolchain().llama_server
    check = [sys.executable, str(tmp_path / "bundle/check_flight.py"), "--llama-server", str(server)]
    said = subprocess.run(check, capture_output=True, text=True, check=False)
    assert said.stdout.splitlines()[-1] == "GO", said.stdout
    frame = next((run / "dataset/orion_dataset/images").glob("*.png"))
    on_ground = orion("triage", "--run", run, frame, "--json", cwd=tmp_path)
    with_bundle = orion("triage", "--bundle", tmp_path / "bundle", frame, "--json", cwd=tmp_path)
    assert json.loads(on_ground.stdout) == json.loads(with_bundle.stdout)
    assert set(json.loads(on_ground.stdout)[0]["scores"]) == set(names)
