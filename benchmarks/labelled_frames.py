"""How a run's quantized pair does on frames that a person has labelled.

    python benchmarks/labelled_frames.py FOLDER [--run runs/tiny]

FOLDER has frames and labels.csv (columns frame, category; frame is the file's name without its suffix). The
frames go through `orion triage`, as on board: no coordinates, blank frames LOW by rule.
"""

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path

from orion_triage.evaluate.metrics import Prediction, summarize
from orion_triage.mission.mission import default_mission

MISSION = default_mission()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--run", type=Path, default=Path("runs/tiny"))
    arguments = parser.parse_args()
    with (arguments.folder / "labels.csv").open(encoding="utf-8") as file:
        labels = {row["frame"]: row["category"] for row in csv.DictReader(file)}
    files = sorted(path for path in arguments.folder.iterdir() if path.suffix in {".png", ".jpg", ".raw"})
    command = [
        sys.executable,
        "-m",
        "orion_triage.cli",
        "triage",
        "--json",
        "--run",
        str(arguments.run),
        *map(str, files),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    sys.stderr.write(result.stderr)
    answers = {Path(answer["file"]).stem: answer for answer in json.loads(result.stdout)}
    predictions = [
        Prediction("B", name, truth, answers[name]["category"] if name in answers else None)
        for name, truth in labels.items()
    ]
    for name, truth in labels.items():
        answer = answers.get(name, {"category": "-", "reason": "no answer"})
        mark = " " if answer["category"] == truth else "x"
        print(f"{mark} {name:<32} {truth:<7} {answer['category']:<7} {answer['reason']}")
    rates = summarize(predictions, MISSION)["B"]
    print(
        f"\naccuracy {rates['right']}/{rates['count']} = {100 * rates['accuracy']:.0f} % "
        f"(95 % {100 * rates['accuracy_low']:.0f}-{100 * rates['accuracy_high']:.0f}), "
        f"balanced {100 * rates['balanced_accuracy']:.0f} %, no answer {rates['unparsable']}"
    )
    for category in MISSION.names:
        always = sum(truth == category for truth in labels.values())
        print(f"always {category}: {always}/{len(labels)}")
    print("\ntruth \\ answer " + "".join(f"{category:>8}" for category in MISSION.names))
    for truth in MISSION.names:
        row = rates["confusion"][truth]
        print(f"{truth:<14} " + "".join(f"{row[category]:>8}" for category in MISSION.names))


if __name__ == "__main__":
    main()
