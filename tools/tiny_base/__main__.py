"""Rebuild the shipped base from nothing: python -m tools.tiny_base (about two hours on 2 cores)."""

import argparse
import json
import sys
from pathlib import Path

from orion_triage.cli.terminal import progress_bar
from tools.tiny_base.build import build

parser = argparse.ArgumentParser(prog="python -m tools.tiny_base", description=__doc__)
parser.add_argument(
    "--work", type=Path, default=Path(".cache/tiny-base"), help="intermediate state (3 GB); a rerun goes on"
)
parser.add_argument(
    "--out", type=Path, default=Path("src/orion_triage/tiny_base/weights"), help="where the checkpoint goes"
)
arguments = parser.parse_args()
with progress_bar() as progress:
    record = build(arguments.work, arguments.out, progress=progress)
sys.stdout.write(json.dumps(record, indent=2) + "\n")
