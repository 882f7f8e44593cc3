"""Does the grammar hold whatever is sampled? Many seeds at temperature 2, one frame each, on a run's flight pair.

    python benchmarks/grammar_seeds.py                      # 500 seeds, the newest finished run
    python benchmarks/grammar_seeds.py --seeds 50 --run runs/tiny

Every answer must parse, and be exactly the bytes that a verdict of training has. Without the grammar, the same
seeds show what it prevents. Exit status 1 when one fails.
"""

import argparse
import json
import sys
from pathlib import Path

from orion_triage.dataset.records import image_path, read_split
from orion_triage.evaluate.backends import LlamaCppBackend
from orion_triage.export import quantize
from orion_triage.imagery.frames import read_frame
from orion_triage.llama_cpp.server import Server
from orion_triage.llama_cpp.toolchain import find_toolchain
from orion_triage.mission.mission import default_mission
from orion_triage.mission.verdict import answer_text, parse_verdict
from orion_triage.models.family import turn_of
from orion_triage.runs.run import newest_run, open_run
from orion_triage.safe.files import write_text

MISSION = default_mission()

RESULTS = Path(__file__).parent / "results" / "grammar_seeds.json"
WILD = {"temperature": 2.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=500)
    parser.add_argument("--run", type=Path)
    arguments = parser.parse_args()
    run = open_run(arguments.run or newest_run(Path("runs"), "quantize"))
    records, size = read_split(run.dataset, "test", MISSION), run.settings.base.frame_size
    figures = {"seeds": arguments.seeds, "sampling": WILD}
    with Server(
        find_toolchain(),
        run.gguf / quantize.QUANTIZED,
        run.gguf / quantize.MMPROJ,
        log=run.folder / "logs" / "grammar-server.log",
        turn=turn_of(run.gguf / quantize.QUANTIZED),
    ) as server:
        for name, constrained in (("under the grammar", True), ("free", False)):
            parsed = exact = longest = 0
            for seed in range(arguments.seeds if constrained else min(50, arguments.seeds)):
                record = records[seed % len(records)]
                options = WILD | {"seed": seed}
                backend = LlamaCppBackend(
                    server.client, MISSION, max_new_tokens=96, constrained=constrained, options=options
                )
                image = read_frame(image_path(run.dataset, record), size).image
                text = backend.answer([image], [record.user_text])[0].text
                verdict = parse_verdict(MISSION, text)
                parsed += verdict is not None
                exact += verdict is not None and answer_text(MISSION, verdict) == text
                longest = max(longest, len(text))
            figures[name] = {"asked": seed + 1, "parsed": parsed, "exact": exact, "longest_characters": longest}
            print(
                f"{name}: {parsed} of {seed + 1} parse, {exact} byte for byte, at most {longest} characters", flush=True
            )
    write_text(RESULTS, json.dumps(figures, indent=1) + "\n")
    constrained_figures = figures["under the grammar"]
    sys.exit(constrained_figures["exact"] < constrained_figures["asked"])


if __name__ == "__main__":
    main()
