"""Ten thousand frames through `orion triage`: memory and disk over time, and a kill on the way.

    python benchmarks/long_haul.py                  # the newest finished run, 20 minutes on 2 cores
    python benchmarks/long_haul.py --frames 500

The frames are the run's own, turned, mirrored and shifted: each is another picture, none is blank. At a moment drawn
with the seed the command gets SIGKILL, and is given again. Reported: resident memory of the command and of its server
ten times a second, and what of it grows per thousand frames, the first tenth left out; bytes on disk beside frames and
results; that every frame has one line, and the same one as without a kill in a sample. Figures:
benchmarks/results/long_haul.json.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import small_run
from PIL import Image

from orion_triage.dataset.records import IMAGES_FOLDER
from orion_triage.errors import OrionError
from orion_triage.runs.run import newest_run, open_run
from orion_triage.safe.files import write_text

RESULTS = Path(__file__).parent / "results" / "long_haul.json"
SECONDS_BETWEEN_SAMPLES = 0.1  # within which few frames are answered, so that the kill comes in time
SAMPLE = 100  # frames that are asked about once more, in one go
LARGEST_GROWTH = 2_000_000  # bytes of memory per thousand frames: a few per cent of what the command holds
LARGEST_DISK = 1_000_000  # bytes beside frames and results


def make_frames(source: Path, folder: Path, count: int, choice: random.Random) -> None:
    """`count` JPEG files, each another view of one of the run's frames."""
    if folder.exists() and len(list(folder.iterdir())) == count:  # of an earlier time
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    pictures = sorted(source.glob("*.png"))
    for number in range(count):
        with Image.open(pictures[number % len(pictures)]) as opened:
            pixels = np.asarray(opened.convert("RGB"))
        pixels = np.roll(np.rot90(pixels, number), (choice.randrange(512), choice.randrange(512)), (0, 1))
        picture = pixels[:, ::-1] if number % 2 else pixels
        Image.fromarray(np.ascontiguousarray(picture)).save(folder / f"frame_{number:05}.jpg", quality=90)


def resident_bytes(process: int) -> int:
    """0 when it is gone."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:")), 0)


def children_of(process: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []


def disk_bytes(*folders: Path) -> int:
    return sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())


def lines_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def watch(words: list[str], out: Path, stop_at: int | None) -> list[dict[str, int]]:
    """Run to the end, or kill when `stop_at` lines are written; samples on the way: frames, bytes of both processes."""
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    samples = []
    while process.poll() is None:
        time.sleep(SECONDS_BETWEEN_SAMPLES)
        done = lines_in(out)
        server = sum(resident_bytes(child) for child in children_of(process.pid))
        own = resident_bytes(process.pid)
        if server and own and done:
            samples.append({"frames": done, "command_bytes": own, "server_bytes": server})
        if stop_at is not None and done >= stop_at:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return samples
    if process.returncode:
        raise SystemExit(f"orion triage ended with status {process.returncode}.")
    return samples


def growth_per_thousand(samples: list[dict[str, int]], what: str) -> float:
    """Bytes per thousand frames, by a straight line through all samples but the first tenth."""
    kept = samples[len(samples) // 10 :]
    frames, values = ([sample[key] for sample in kept] for key in ("frames", what))
    return float(np.polyfit(frames, values, 1)[0] * 1000)


def newest() -> Path:
    """The newest finished run in runs/, else the one that kills.py left: 'make torture' needs no run of before."""
    try:
        return newest_run(Path("runs"), "quantize")
    except OrionError:
        return newest_run(Path("runs/kills"), "quantize")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--run", type=Path, help="a finished run (default: the newest in runs/, else in runs/kills/)")
    parser.add_argument("--folder", type=Path, default=Path("runs/long_haul"), help="what is worked in")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    run = open_run(arguments.run or newest())
    folder: Path = arguments.folder.resolve()
    choice = random.Random(arguments.seed)
    print("making frames", flush=True)
    make_frames(run.dataset / IMAGES_FOLDER, folder / "frames", arguments.frames, random.Random(arguments.seed))

    def triage(out: Path, *what: Path) -> list[str]:
        return [*small_run.ORION, "triage", *map(str, what), "--run", str(run.folder), "--out", str(out)]

    out, again, before = folder / "verdicts.jsonl", folder / "again.jsonl", disk_bytes(run.folder)
    out.unlink(missing_ok=True)
    again.unlink(missing_ok=True)
    words, began = triage(out, folder / "frames"), time.monotonic()
    stop_at = choice.randrange(arguments.frames // 10, arguments.frames // 3)
    print(f"{arguments.frames} frames, killed after {stop_at}", flush=True)
    watch(words, out, stop_at)
    samples = watch(words, out, None)
    seconds = time.monotonic() - began
    rows = small_run.answers(out)
    names = [row["file"] for row in rows]
    picked = sorted(choice.sample(sorted(names), min(SAMPLE, len(names))))
    subprocess.run(triage(again, *map(Path, picked)), check=True, stderr=subprocess.DEVNULL)
    known = {row["file"]: row for row in rows}
    differing = [row["file"] for row in small_run.answers(again) if known[row["file"]] != row]
    growth = {what: round(growth_per_thousand(samples, f"{what}_bytes")) for what in ("command", "server")}
    disk = max(0, disk_bytes(run.folder) - before)  # its logs begin anew
    losses = [f"{len(names)} lines, {len(set(names))} files, {arguments.frames} frames"] * (
        len(names) != arguments.frames or len(set(names)) != arguments.frames
    )
    losses += [f"{name} is answered otherwise alone" for name in differing]
    losses += [f"{row['file']}: {row['error']}" for row in rows if row["error"]]
    losses += [
        f"the {what}'s memory grows by {bytes_:,} bytes per thousand frames"
        for what, bytes_ in growth.items()
        if bytes_ > LARGEST_GROWTH
    ]
    losses += [f"{disk:,} bytes on disk beside frames and results"] * (disk > LARGEST_DISK)
    value: dict[str, Any] = {
        "frames": arguments.frames,
        "seed": arguments.seed,
        "killed_after_frames": stop_at,
        "seconds_per_frame": round(seconds / arguments.frames, 4),
        "blank": sum(row["blank"] for row in rows),
        "peak_bytes": {what: max(s[f"{what}_bytes"] for s in samples) for what in ("command", "server")},
        "growth_bytes_per_thousand_frames": growth,
        "results_bytes_per_frame": round(out.stat().st_size / arguments.frames),
        "other_bytes_on_disk": disk,
        "asked_again": len(picked),
        "losses": losses,
        "seconds": round(seconds),
        "samples": samples[:: max(1, len(samples) // 50)],
    }
    write_text(arguments.results, json.dumps(value, indent=1) + "\n")
    for line in losses:
        print(line)
    print(f"{json.dumps({key: value[key] for key in list(value)[3:10]})} -> {arguments.results}")
    sys.exit(bool(losses))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
