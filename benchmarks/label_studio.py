"""A labelling task of `orion review` through a real Label Studio server and back.

    python -m venv ls && ls/bin/pip install label-studio
    python benchmarks/label_studio.py ls/bin/label-studio

Starts the server on 127.0.0.1 with a folder of its own, makes a project with the task's configuration, imports the
tasks, labels all frames but one, skips another, exports JSON and JSON-MIN, and reads both with `orion_triage.review`.
Exit status 1 unless each label and reason comes back to its frame.
"""

import argparse
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from orion_triage.mission.mission import default_mission
from orion_triage.review.choose import choose, read_log
from orion_triage.review.labels import Label, read_labels, read_task
from orion_triage.review.task import CONFIG_FILE, TASKS_FILE, write
from orion_triage.safe.children import tied

MISSION = default_mission()
FRAMES, START_SECONDS = 12, 300
ODD = 'Quays "and" </script> & more.'


def make_task(folder: Path) -> Path:
    """A task of frames of noise with suggestions."""
    rows = []
    for number in range(FRAMES):
        path = folder / f"{number:02d}.png"
        pixels = np.random.default_rng(number).integers(0, 255, (512, 512, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        scores = dict(zip(MISSION.names, (0.2, 0.5, 0.3), strict=True))
        rows.append({"file": str(path), "category": MISSION.names[1], "reason": ODD, "scores": scores})
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    chosen = choose(read_log(folder / "log.jsonl", MISSION), FRAMES, random_share=0.2, blind_share=0.25, seed=1)
    write(folder / "task", chosen, MISSION, "log.jsonl")
    return folder / "task"


def start(program: Path, folder: Path, port: int, token: str) -> subprocess.Popen[bytes]:
    """The server with a data folder, a user and a token of its own; it ends with this process."""
    environment = os.environ | {
        "HOME": str(folder), "LABEL_STUDIO_BASE_DATA_DIR": str(folder / "data"), "COLLECT_ANALYTICS": "false",
        "LATEST_VERSION_CHECK": "false", "SENTRY_DSN": "", "FRONTEND_SENTRY_DSN": "",
        "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true",
    }  # fmt: skip
    (folder / "data").mkdir()
    command = [str(program), "start", "--no-browser", "--port", str(port), "--internal-host", "127.0.0.1"]
    command += ["--username", "a@example.com", "--password", secrets.token_urlsafe(12), "--user-token", token]
    with (folder / "server.log").open("wb") as log:
        return subprocess.Popen(tied(command), env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def wait(client: httpx.Client, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if client.get("/api/projects").status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(1)
    raise SystemExit(f"Label Studio did not start within {START_SECONDS} s")


def answer(reply: httpx.Response) -> Any:
    if reply.status_code >= 300:
        raise SystemExit(f"{reply.request.url.path} answered {reply.status_code}: {reply.text[:500]}")
    return reply.json()


def annotate(client: httpx.Client, project: int) -> dict[str, str | None]:
    """Label the project's tasks as a person would; returns frame -> category, None where nobody did."""
    tasks = answer(client.get("/api/tasks", params={"project": project, "page_size": 100, "fields": "all"}))["tasks"]
    said: dict[str, str | None] = {}
    for number, task in enumerate(tasks):
        category: str | None = MISSION.names[number % 3]
        result = [
            {"from_name": "category", "to_name": "image", "type": "choices", "value": {"choices": [category]}},
            {"from_name": "reason", "to_name": "image", "type": "textarea", "value": {"text": [ODD]}},
        ]
        skipped = number == 1
        if number:  # the first one is left alone
            body = {"result": [] if skipped else result, "was_cancelled": skipped, "lead_time": 2.5}
            answer(client.post(f"/api/tasks/{task['id']}/annotations/", json=body))
        said[task["data"]["frame"]] = category if number > 1 else None
    return said


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=Path, help="label-studio")
    options = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as name:
        folder, token = Path(name), secrets.token_hex(20)
        task = make_task(folder)
        process = start(options.program.absolute(), folder, port, token)
        headers = {"Authorization": f"Token {token}"}
        try:
            with httpx.Client(
                base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=120, trust_env=False
            ) as client:
                wait(client, process)
                config = (task / CONFIG_FILE).read_text(encoding="utf-8")
                project = answer(client.post("/api/projects", json={"title": "review", "label_config": config}))["id"]
                tasks = json.loads((task / TASKS_FILE).read_text(encoding="utf-8"))
                imported = answer(client.post(f"/api/projects/{project}/import", json=tasks))
                said = annotate(client, project)
                for kind in ("JSON", "JSON_MIN"):
                    reply = client.get(
                        f"/api/projects/{project}/export", params={"exportType": kind, "download_all_tasks": "true"}
                    )
                    (folder / f"{kind}.json").write_text(json.dumps(answer(reply)), encoding="utf-8")
        finally:
            process.terminate()
            process.wait(30)
        sys.stdout.write(f"imported {imported['task_count']} tasks, {imported['prediction_count']} suggestions\n")
        failed = False
        for kind in ("JSON", "JSON_MIN"):
            labels, empty = read_labels(folder / f"{kind}.json", read_task(task, MISSION), MISSION)
            wrong = differences(labels, said)
            failed |= bool(wrong)
            sys.stdout.write(f"{kind}: {len(labels)} labels, {empty} without one; {wrong or 'all as given'}\n")
    return int(failed)


def differences(labels: list[Label], said: dict[str, str | None]) -> list[str]:
    """What came back otherwise than it was given."""
    back = {label.frame: label.category for label in labels}
    given = {frame: category for frame, category in said.items() if category}
    wrong = [
        f"{frame}: {back.get(frame)} instead of {given.get(frame)}"
        for frame in back | given
        if back.get(frame) != given.get(frame)
    ]
    return wrong + [f"{label.frame}: reason {label.reason!r}" for label in labels if label.reason != ODD]


if __name__ == "__main__":
    sys.exit(main())
