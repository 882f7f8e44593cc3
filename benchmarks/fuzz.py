#!/usr/bin/env python3
"""Coverage-guided fuzzing of everything that parses what strangers made: python benchmarks/fuzz.py [--seconds 20]

Each target gets bytes and may return a value or raise OrionError; anything else is a finding, as are an input that
takes more than 10 s and one that takes more than 2 GiB. A finding is printed with the bytes that show it, in hex. Exit
status: 0 without findings, 1 with, 2 where it cannot run here. Only temporary files are written, and --results FILE.
"""

import argparse
import contextlib
import io
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from orion_triage.mission.mission import default_mission

MISSION = default_mission()

MEMORY_MIB, LONGEST_SECONDS, LARGEST_INPUT = 2048, 10, 8192
# What is watched branch by branch: our parsers, and those below them that are written in Python.
WATCHED = [
    *(
        f"orion_triage.{name}"
        for name in (
            "dataset.catalogue", "dataset.records", "dataset.sources.simsat", "errors", "export.quantize",
            "imagery.frames", "llama_cpp.client", "llama_cpp.gguf_header", "mission.prompt", "mission.verdict",
            "models.checkpoint", "runs.manifest", "safe.reading", "settings",
        )
    ),
    "PIL.JpegImagePlugin", "PIL.PngImagePlugin", "tomllib",
]  # fmt: skip

Target = Callable[[bytes], Any]


@dataclass
class Outcome:
    """One target's figures; `coverage` counts the edges of the watched code that its inputs reached."""

    target: str
    executions: int = 0
    coverage: int = 0
    corpus: int = 0
    seconds: int = 0
    findings: list[dict[str, str]] = field(default_factory=list)


def _file(suffix: str, read: Callable[[Path], Any]) -> Target:
    """A target that reads a file: its bytes are put into one of this process's own."""
    path = Path(tempfile.mkdtemp(dir=_memory_folder())) / f"input{suffix}"

    def target(data: bytes) -> Any:
        path.write_bytes(data)
        return read(path)

    return target


def _memory_folder() -> str | None:
    return os.environ.get("ORION_FUZZ_FOLDER")


def records() -> Target:
    from orion_triage.dataset.records import read_records

    return _file(".jsonl", lambda path: read_records(path, MISSION))


def catalogue() -> Target:
    """The first byte says which of the three formats the others are."""
    from orion_triage.dataset.catalogue import load_catalogue

    forms = [_file(suffix, lambda path: load_catalogue(path, drawable=False)) for suffix in (".csv", ".jsonl", ".json")]
    return lambda data: forms[data[0] % 3](data[1:]) if data else None


def preset() -> Target:
    from orion_triage.settings import load_settings

    return _file(".toml", lambda path: load_settings(str(path)))


def assignment() -> Target:
    from orion_triage.settings import load_settings

    return lambda data: load_settings("tiny", data.decode("utf-8", "surrogateescape").split("\0"))


def verdict() -> Target:
    from orion_triage.mission.prompt import parse_prompt
    from orion_triage.mission.verdict import parse_verdict

    def target(data: bytes) -> Any:
        text = data.decode("utf-8", "surrogateescape")
        return parse_verdict(MISSION, text) or parse_prompt(MISSION, text)

    return target


def gguf() -> Target:
    from orion_triage.llama_cpp.gguf_header import read_integers

    return _file(".gguf", read_integers)


def safetensors() -> Target:
    from orion_triage.models.checkpoint import check_names
    from orion_triage.models.lfm2_vl import LANDMARKS

    return _file(".safetensors", lambda path: check_names(path.parent, LANDMARKS))


def pair() -> Target:
    from orion_triage.export.quantize import PAIR, find_pair

    target = _file("", lambda path: find_pair(path.with_name(PAIR).parent))
    folder = Path(tempfile.mkdtemp(dir=_memory_folder()))

    def with_list(data: bytes) -> Any:
        (folder / PAIR).write_bytes(data)
        return find_pair(folder)

    return lambda data: with_list(data) if data[:1] == b"{" else target(data)


def stage_manifest() -> Target:
    from orion_triage.runs.manifest import FILE_NAME, read_manifest

    folder = Path(tempfile.mkdtemp(dir=_memory_folder()))

    def target(data: bytes) -> Any:
        (folder / FILE_NAME).write_bytes(data)
        return read_manifest(folder)

    return target


def simsat() -> Target:
    """Status, four headers and the body of an answer, one a line; the body is the rest."""
    from orion_triage.dataset.sources import simsat

    def target(data: bytes) -> Any:
        status, metadata, later, place, *body = data.split(b"\n", 4)
        headers = {
            name: value.decode("latin-1")
            for name, value in (("mapbox_metadata", metadata), ("retry-after", later), ("location", place))
            if value
        }
        answer = simsat._judged(int(status) if status.isdigit() else 200, headers, b"".join(body))
        return simsat._damage(answer) if isinstance(answer, bytes) else answer.why.encode()

    def whole(data: bytes) -> Any:
        return target(data) if data.count(b"\n") >= 3 and len(data.split(b"\n", 1)[0]) < 4 else None

    return whole


def llama_server() -> Target:
    """The whole conversation of an evaluation with a server that answers everything with the same bytes."""
    import httpx
    from PIL import Image

    from orion_triage.evaluate.backends import LlamaCppBackend
    from orion_triage.llama_cpp.client import Client
    from orion_triage.mission.scoring import FieldCue, LabelNode, Scoring
    from orion_triage.models import lfm2_vl
    from orion_triage.safe.bounded_http import BoundedHttp

    class Answer(httpx.BaseTransport):
        data = b""

        def handle_request(self, request: httpx.Request) -> httpx.Response:
            return httpx.Response(200, content=self.data, headers={"content-type": "application/json"})

    answer, picture = Answer(), Image.new("RGB", (32, 32))
    labels = (LabelNode("", (1, 2, 3), ((0,), (1,), (2,))),)
    scoring = Scoring(MISSION, labels, (FieldCue("smoke", '"smoke": "', (1, 2)),))
    client = Client("http://127.0.0.1:1", turn=lfm2_vl.TURN)
    client._http = BoundedHttp(client.base_url, base_url=client.base_url, transport=answer)

    def target(data: bytes) -> Any:
        answer.data = data
        client._marker, client._primed = "", b""
        for ask in (client.served_models, lambda: client.tokenize("x"), lambda: client.chat_completion("x", [], 1)[0]):
            with contextlib.suppress(_orion_error()):
                ask()
        backend = LlamaCppBackend.__new__(LlamaCppBackend)  # its labels are asked for first, and would end it here
        state = {"_primed": True, "_packed": None, "_grammars": {}, "_options": {}, "_max_new_tokens": 9}
        backend.__dict__.update(state, _client=client, _scoring=scoring)
        return backend.answer([picture], ["<image>\nx"])

    return target


def picture() -> Target:
    from orion_triage.imagery.frames import decode_frame

    return lambda data: decode_frame(data, "a.png", 256, resize=True)


def planted() -> Target:
    """Not a parser: a fault that the tests want found."""

    def target(data: bytes) -> Any:
        if data[:2] == b"{!":
            raise KeyError("planted")

    return target


TARGETS: dict[str, Callable[[], Target]] = {
    "records": records,
    "catalogue": catalogue,
    "preset": preset,
    "assignment": assignment,
    "verdict": verdict,
    "gguf": gguf,
    "safetensors": safetensors,
    "pair": pair,
    "manifest": stage_manifest,
    "simsat": simsat,
    "llama-server": llama_server,
    "picture": picture,
}
HIDDEN = {"planted": planted}


def seeds(target: str) -> list[bytes]:
    """Valid inputs, from which the fuzzer starts."""
    from PIL import Image

    from orion_triage.dataset.records import Record
    from orion_triage.mission.prompt import Coordinates, render_prompt
    from orion_triage.mission.verdict import Verdict, answer_text

    said = Verdict("Long quays.", "HIGH")
    record = Record("orion_dataset/images/a.png", Coordinates(1.5, -2.25), said, MISSION)
    place = {"name": "a", "category": "HIGH", "morphology": "mega_port", "lon": 1.5, "lat": 2, "reason": "Long quays."}
    point = {"type": "Feature", "geometry": {"type": "Point", "coordinates": [1.5, 2]}, "properties": place}
    reply = {
        "content": '{"reason": "x", "category": "', "stopping_word": '"category": "', "tokens_predicted": 3,
        "tokens": [1],
        "completion_probabilities": [{"top_logprobs": [{"id": 1, "logprob": -0.1}, {"id": 2, "logprob": -3}]}],
        "media_marker": "<__media__>", "data": [{"id": "m"}], "choices": [{"message": {"content": "x"}}],
    }  # fmt: skip
    header = json.dumps({"a": {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]}}).encode()
    made = {"stage": "fuse", "settings": {}, "inputs": {}, "outputs": {"a": "0"}, "versions": {}, "seconds": 1}
    pictures = []
    for mode, kind in (("RGB", "PNG"), ("P", "PNG"), ("LA", "PNG"), ("RGB", "JPEG"), ("CMYK", "JPEG")):
        buffer = io.BytesIO()
        Image.new(mode, (16, 16)).save(buffer, kind)
        pictures.append(buffer.getvalue())
    found = {
        "records": [(record.to_line() + "\n").encode(), record.without_coordinates().to_line().encode()],
        "catalogue": [
            b"\0" + f"{','.join(place)}\n{','.join(map(str, place.values()))}\n".encode(),
            b"\1" + json.dumps(place).encode(),
            b"\2" + json.dumps({"type": "FeatureCollection", "features": [point]}).encode(),
        ],
        "preset": [b'preset = "a"\n[fine_tune]\nrank = 8\n[mission]\nprior = [0.1, 0.2, 0.7]\n'],
        "assignment": [b"fine_tune.rank=8", b"variants.quantizations=Q8_0,Q6_K\0base.frame_size=256"],
        "verdict": [
            answer_text(MISSION, said).encode(),
            f"```json\n{answer_text(MISSION, said)}\n```".encode(),
            render_prompt(MISSION, None).encode(),
        ],
        "gguf": [_gguf()],
        "safetensors": [struct.pack("<Q", len(header)) + header + bytes(4)],
        "pair": [b'{"files": {"orion-q4_k_m.gguf": "0", "orion-mmproj-f16.gguf": "0"}}'],
        "manifest": [json.dumps(made).encode()],
        "simsat": [b"200\n{}\n\n\n" + pictures[-1], b'503\n\n7\n\n{"detail": "busy"}', b"302\n\n\n/a\n"],
        "llama-server": [json.dumps(reply).encode()],
        "picture": [*pictures, _text_chunk(pictures[0])],
        "planted": [b"{}"],
    }
    return found[target]


def _gguf() -> bytes:
    """A header with a number, a text, an array of numbers and one of texts."""

    def text(value: bytes) -> bytes:
        return struct.pack("<Q", len(value)) + value

    fields = [
        text(b"lfm2.embedding_length") + struct.pack("<II", 4, 192),
        text(b"general.architecture") + struct.pack("<I", 8) + text(b"lfm2"),
        text(b"a") + struct.pack("<IIQ", 9, 5, 2) + bytes(8),
        text(b"b") + struct.pack("<IIQ", 9, 8, 2) + text(b"x") + text(b"yz"),
    ]
    return b"GGUF" + struct.pack("<IQQ", 3, 0, len(fields)) + b"".join(fields)


def _text_chunk(png: bytes) -> bytes:
    chunk = b"zTXta\0\0" + zlib.compress(b"b" * 100)
    return png[:33] + struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + png[33:]


def _orion_error() -> type[Exception]:
    from orion_triage.errors import OrionError

    return OrionError


def fuzz(name: str, options: list[str]) -> None:
    """The child: fuzz one target until the time is up or something is found; ends the process."""
    import atheris

    with atheris.instrument_imports(include=WATCHED):
        target = (TARGETS | HIDDEN)[name]()
    if name in HIDDEN:
        target = atheris.instrument_func(target)
    allowed = _orion_error()

    def one(data: bytes) -> None:
        with contextlib.suppress(allowed):
            target(data)

    atheris.Setup([sys.argv[0], *options], one)
    atheris.Fuzz()


def run(name: str, seconds: int, seed: int) -> Outcome:
    """One target in a process of its own, since libFuzzer ends the process that it runs in."""
    outcome = Outcome(name, seconds=seconds)
    memory = Path("/dev/shm")  # a file an input: many times faster than on a disk
    with tempfile.TemporaryDirectory(prefix="orion-fuzz-", dir=memory if memory.is_dir() else None) as folder:
        corpus, found = Path(folder) / "corpus", Path(folder) / "found"
        corpus.mkdir()
        found.mkdir()
        for number, data in enumerate(seeds(name)):
            (corpus / f"seed-{number}").write_bytes(data)
        options = [
            str(corpus), f"-max_total_time={seconds}", f"-seed={seed}", f"-rss_limit_mb={MEMORY_MIB}",
            f"-timeout={LONGEST_SECONDS}", f"-artifact_prefix={found}/", f"-max_len={LARGEST_INPUT}",
            "-print_final_stats=1",
        ]  # fmt: skip
        done = subprocess.run(
            [sys.executable, __file__, "--child", name, *options],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False,
            env={**os.environ, "ORION_FUZZ_FOLDER": folder},
        )  # fmt: skip
        said = done.stdout
        for path in sorted(found.iterdir()):
            kind = path.name.partition("-")[0]  # crash, timeout, oom, slow
            outcome.findings.append({"kind": kind, "input_hex": path.read_bytes().hex(), "error": _error(said)})
    if done.returncode and not outcome.findings:  # it did not even start
        outcome.findings.append({"kind": "no start", "input_hex": "", "error": _error(said) or said[-300:]})
    told = re.findall(r"#(\d+)\s.*?(?:cov: (\d+))?(?: ft: \d+)? corp: (\d+)", said)
    steps = [int(number) for number in re.findall(r"^#(\d+)\s", said, re.MULTILINE)]
    executed = re.search(r"stat::number_of_executed_units:\s*(\d+)", said)
    outcome.executions = int(executed[1]) if executed else max(steps, default=0)
    outcome.coverage = max((int(edges) for _, edges, _ in told if edges), default=0)
    outcome.corpus = max((int(corpus) for *_, corpus in told), default=0)
    return outcome


def _error(said: str) -> str:
    """The last line of a Python traceback, or libFuzzer's word."""
    python = re.findall(r"^ *([\w.]*(?:Error|Exception|Exit|Panic)\w*\b.*)", said, re.MULTILINE)
    libfuzzer = re.findall(r"ERROR: libFuzzer.*", said)
    return str((python[-1:] or libfuzzer or [""])[0])[:300]


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        fuzz(sys.argv[2], sys.argv[3:])
        return 0
    parser = argparse.ArgumentParser(description="Fuzz the parsers of what strangers made.")
    parser.add_argument("--only", nargs="+", choices=[*TARGETS, *HIDDEN], metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--seconds", type=int, default=20, help="of each target (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--results", type=Path, metavar="FILE", help="write the figures there")
    options = parser.parse_args()
    try:
        import atheris  # noqa: F401
    except ImportError as error:
        sys.stderr.write(
            f"fuzzing needs atheris, which is not here ({error}). It comes with 'make setup-dev' on Linux with an "
            "x86-64 processor.\n"
        )
        return 2
    print(f"{'target':14}{'executions':>12}{'per second':>12}{'coverage':>10}{'corpus':>8}{'findings':>10}", flush=True)
    outcomes = []
    for name in options.only or TARGETS:
        outcome = run(name, options.seconds, options.seed)
        outcomes.append(outcome)
        each = outcome.executions // max(1, options.seconds)
        counts = f"{outcome.coverage:10,}{outcome.corpus:8,}{len(outcome.findings):10}"
        print(f"{name:14}{outcome.executions:12,}{each:12,}{counts}", flush=True)
        for finding in outcome.findings:
            print(f"  {finding['kind']}: {finding['error']}\n  input: {finding['input_hex'] or '-'}", flush=True)
    if options.results:
        figures = {
            "seed": options.seed,
            "seconds": sum(outcome.seconds for outcome in outcomes),
            "targets": [asdict(outcome) for outcome in outcomes],
            "losses": [
                f"{outcome.target}: {finding['kind']}: {finding['error']}"
                for outcome in outcomes
                for finding in outcome.findings
            ],
        }
        options.results.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 1 if any(outcome.findings for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
