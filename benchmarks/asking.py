"""What asking otherwise than in training costs: the published recipe's prompts, noise and JPEG, on a run's flight pair.

    python benchmarks/asking.py                      # 2 minutes on 2 cores, the newest finished run
    python benchmarks/asking.py --run runs/tiny

Every test frame is asked about as this project does, and as the published recipe did:

prompt B     without coordinates, by a substitution that also takes the full stop: "... image captured\\nStrictly use"
coordinates  with six decimals, as in the published flight: -120.620000
newline      without the newline between image and prompt, as in the published flight
JPEG         the frame through JPEG at quality 90
noise        uniform noise instead of Gaussian noise

Answers are greedy and free. A change counts frames whose answer is right here and wrong there, and the other way round.
"""

import argparse
import io
import json
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from orion_triage.dataset.records import Record, image_path, read_split
from orion_triage.evaluate.backends import LlamaCppBackend
from orion_triage.evaluate.statistics import mcnemar
from orion_triage.export import quantize
from orion_triage.imagery.frames import noise_frame, read_frame
from orion_triage.llama_cpp.server import Server
from orion_triage.llama_cpp.toolchain import find_toolchain
from orion_triage.mission.answer import Answer
from orion_triage.mission.mission import default_mission
from orion_triage.mission.prompt import user_text
from orion_triage.mission.verdict import parse_verdict
from orion_triage.models.family import turn_of
from orion_triage.runs.run import newest_run, open_run
from orion_triage.safe.files import write_text

MISSION = default_mission()

RESULTS = Path(__file__).parent / "results" / "asking.json"
Asked = Callable[[Image.Image, str], Answer]


def published_b(record: Record) -> str:
    return user_text(MISSION, None).replace(" satellite image.\n", " satellite image captured\n", 1)


def six_decimals(record: Record) -> str:
    assert record.coordinates is not None
    lon, lat = record.coordinates.lon, record.coordinates.lat
    return record.user_text.replace(
        f"Longitude: {lon}, Latitude: {lat}.", f"Longitude: {lon:.6f}, Latitude: {lat:.6f}.", 1
    )


def through_jpeg(image: Image.Image) -> Image.Image:
    packed = io.BytesIO()
    image.save(packed, "JPEG", quality=90)
    return Image.open(packed).convert("RGB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path)
    run = open_run(parser.parse_args().run or newest_run(Path("runs"), "quantize"))
    records, size = read_split(run.dataset, "test", MISSION), run.settings.base.frame_size
    truth = [record.verdict.category for record in records]
    frames = [read_frame(image_path(run.dataset, record), size).image for record in records]
    with_coordinates, without = [record.user_text for record in records], [user_text(MISSION, None)] * len(records)
    assert all(published_b(r) != b and six_decimals(r) != r.user_text for r, b in zip(records, without, strict=True))
    noise = {kind: [noise_frame(kind, size)] * len(records) for kind in ("gaussian", "uniform")}
    pair = (run.gguf / quantize.QUANTIZED, run.gguf / quantize.MMPROJ)
    log = run.folder / "logs" / "asking-server.log"
    with Server(find_toolchain(), *pair, log=log, turn=turn_of(pair[0])) as server:
        backend = LlamaCppBackend(server.client, MISSION, max_new_tokens=run.settings.evaluate.max_new_tokens)
        chat = server.client.chat

        def ask(images: list[Image.Image], texts: list[str]) -> list[str | None]:
            verdicts = [parse_verdict(MISSION, answer.text) for answer in backend.answer(images, texts)]
            return [verdict.category if verdict else None for verdict in verdicts]

        a, b, c = ask(frames, with_coordinates), ask(frames, without), ask(noise["gaussian"], with_coordinates)
        asked = {
            "prompt B": (b, ask(frames, [published_b(record) for record in records])),
            "coordinates": (a, ask(frames, [six_decimals(record) for record in records])),
            "JPEG": (a, ask([through_jpeg(frame) for frame in frames], with_coordinates)),
            "noise": (c, ask(noise["uniform"], with_coordinates)),
        }
        server.client.chat = lambda text, image: chat(text, image).replace(f"{image}\n", image, 1)  # type: ignore
        asked["newline"] = (a, ask(frames, with_coordinates))
    figures = {}
    for name, answers in asked.items():
        here, there = ([answer == right for answer, right in zip(row, truth, strict=True)] for row in answers)
        gained = sum(t and not h for h, t in zip(here, there, strict=True))
        lost = sum(h and not t for h, t in zip(here, there, strict=True))
        figures[name] = {
            "count": len(truth),
            "right_here": sum(here),
            "right_there": sum(there),
            "other_answers": sum(one != other for one, other in zip(*answers, strict=True)),
            "unparsable_there": answers[1].count(None),
            "exact_p": mcnemar(gained, lost).exact_p,
        }
        print(name, figures[name], flush=True)
    write_text(RESULTS, json.dumps({"preset": run.settings.preset} | figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
