"""What the published recipe does, as plain workers: the other side of benchmarks/speed.py.

    python benchmarks/reference.py train --help     # and so for every worker

train          Trainer at batch 1 with gradient accumulation up to the preset's records a step, checkpointing, logits
               and cross entropy over the whole sequence; every use of a record opens, decodes and encodes its picture
evaluate       transformers' generate, one question after the other, each with its own picture
evaluate-gguf  llama-server as it starts by itself, one cold /completion after the other
merge          the 16-bit base in memory, PEFT's merge_and_unload, save_pretrained
frame          one frame on llama-server as it starts by itself

The recipe's faults (docs/differences.md) are not in here, since only equal results can be compared in time: the tower
keeps 16 bits, `o_proj` is the attention's output, the loss falls on the verdict, prompts and pixels are this project's.
Each worker writes result.json into --out; evaluations add answers.jsonl. `operations` counts what a record's training
takes at least and how fast the device is, `compare-weights` holds two checkpoints side by side.
"""

import argparse
import base64
import io
import json
import math
import os
import secrets
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from PIL import Image

from orion_triage.dataset.records import Record, image_path, read_split
from orion_triage.evaluate.conditions import NOISE, Question, conflict_pairs, questions
from orion_triage.imagery.frames import noise_frame, read_frame
from orion_triage.mission.mission import default_mission
from orion_triage.mission.prompt import IMAGE
from orion_triage.mission.verdict import parse_verdict
from orion_triage.settings import Settings

MISSION = default_mission()

END_OF_TURN = "<|im_end|>"
IGNORED = -100
KEPT_IN_16_BIT = ["lm_head", "model.vision_tower", "model.multi_modal_projector"]
FRAME_TOKENS = 40  # of the answer to one frame, on both sides
WARM_UP_TOKENS = 4  # of another frame, asked before the one whose time is taken: a server's first is slower


# --- one record -----------------------------------------------------------------------------------------------------


def encode(processor: Any, image: Image.Image, user_text: str, answer: str | None = None) -> dict[str, Any]:
    """One row: the user's turn with its picture, and with `answer` the verdict and labels on it."""
    import torch

    from orion_triage.models.encode import render_turn

    batch = dict(processor(images=[[image]], text=[render_turn(processor, user_text)], return_tensors="pt"))
    if answer is None:
        return batch
    verdict = processor.tokenizer(answer + END_OF_TURN, add_special_tokens=False, return_tensors="pt")["input_ids"]
    ignored = torch.full_like(batch["input_ids"], IGNORED)
    batch["input_ids"] = torch.cat([batch["input_ids"], verdict], dim=1)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["labels"] = torch.cat([ignored, verdict], dim=1)
    return batch


class EncodedRecords:
    """Records for the Trainer: nothing is kept, every use opens, decodes and encodes the picture."""

    def __init__(self, dataset: Path, records: Sequence[Record], processor: Any, size: int) -> None:
        self.dataset, self.records, self.processor, self.size = dataset, records, processor, size

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.records[index]
        image = read_frame(image_path(self.dataset, record), self.size).image
        return encode(self.processor, image, record.user_text, record.answer)


# --- training -------------------------------------------------------------------------------------------------------


def on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def precision_of(settings: Settings) -> str:
    """What the package would train in here; a base of any size is measured on a CPU too."""
    from orion_triage.train.device import choose_device

    return choose_device(settings.fine_tune, parameters=0).precision


def load_with_adapter(base: Path, settings: Settings) -> Any:
    """The base in NF4 with fresh LoRA matrices on the modules that the preset's names mean."""
    import torch
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import BitsAndBytesConfig, Lfm2VlForConditionalGeneration, set_seed

    from orion_triage.models.adapter import resolve_targets

    tuning = settings.fine_tune
    dtype = getattr(torch, precision_of(settings))
    quantization = None
    if tuning.base_weights == "nf4":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=KEPT_IN_16_BIT,
        )
    model = Lfm2VlForConditionalGeneration.from_pretrained(
        base, dtype=dtype, quantization_config=quantization, device_map={"": "cuda:0" if on_gpu() else "cpu"}
    )
    for module in model.modules():  # bitsandbytes would evaluate in bfloat16 and lose the gradient after it
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model.config.text_config.use_cache = False
    set_seed(tuning.seed)
    names, _ = resolve_targets(model, tuning.target_modules, tuning.scope)
    config = LoraConfig(
        r=tuning.rank,
        lora_alpha=tuning.alpha,
        lora_dropout=tuning.dropout,
        target_modules=names,
        task_type=TaskType.CAUSAL_LM,
    )
    return get_peft_model(model, config)


def train(base: Path, dataset: Path, settings: Settings, out: Path) -> dict[str, Any]:
    import torch
    from transformers import Trainer, TrainingArguments

    from orion_triage.models.load import load_processor

    tuning, size = settings.fine_tune, settings.base.frame_size
    processor = load_processor(base, size)
    model = load_with_adapter(base, settings)
    train_records = EncodedRecords(dataset, read_split(dataset, "train", MISSION), processor, size)
    val_records = EncodedRecords(dataset, read_split(dataset, "val", MISSION), processor, size)
    accumulation = tuning.micro_batch_size * tuning.gradient_accumulation_steps
    steps = math.ceil(len(train_records) / accumulation) * tuning.epochs
    arguments = TrainingArguments(
        output_dir=str(out / "checkpoints"),
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=accumulation,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        learning_rate=tuning.learning_rate,
        num_train_epochs=tuning.epochs,
        optim=tuning.optimizer,
        lr_scheduler_type=tuning.learning_rate_schedule,
        warmup_steps=math.ceil(tuning.warmup_fraction * steps),
        fp16=precision_of(settings) == "float16",
        bf16=precision_of(settings) == "bfloat16",
        use_cpu=not on_gpu(),
        seed=tuning.seed,
        data_seed=tuning.seed,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        prediction_loss_only=True,
        logging_steps=1,
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=True,
        report_to="none",
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        data_collator=lambda rows: rows[0],  # batch 1: a record is a batch already
        train_dataset=train_records,
        eval_dataset=val_records,
    )
    trained = trainer.train()
    model.save_pretrained(out / "adapter", save_embedding_layers=False)
    return {
        "training_seconds": trained.metrics["train_runtime"],
        "records": len(train_records) * tuning.epochs,
        "losses": [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry],
        "adapted_modules": sum(name.endswith(".lora_A") for name, _ in model.named_modules()),
        "trained_parameters": sum(value.numel() for value in model.parameters() if value.requires_grad),
        "peak_gpu_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu() else None,
    }


def peak_operations_per_second(device: str, dtype: Any) -> tuple[int, float]:
    """(Width, operations per second) of the fastest of ten products of large square matrices, or fewer in a second."""
    import torch

    width = 2048 if device == "cpu" else 8192
    first, second = (torch.randn(width, width, device=device, dtype=dtype) for _ in range(2))
    seconds: list[float] = []
    while len(seconds) < 10 and sum(seconds) < 1:
        began = time.perf_counter()
        product = first @ second
        float(product[0, 0])  # waits for a GPU
        seconds.append(time.perf_counter() - began)
    return width, 2 * width**3 / min(seconds)


def operations(base: Path, dataset: Path, settings: Settings) -> dict[str, Any]:
    """The least that training on one record takes, and what the device does at most.

    Counted by torch.utils.flop_counter in one forward and backward pass of one record: no recomputation, logits on the
    verdict only. The peak is measured: a large square matrix product, 16-bit on a GPU, float32 on a CPU.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from orion_triage.models.load import load_processor

    processor = load_processor(base, settings.base.frame_size)
    device = "cuda:0" if on_gpu() else "cpu"
    dtype = getattr(torch, precision_of(settings))
    model = load_with_adapter(base, settings).train()
    row = EncodedRecords(dataset, read_split(dataset, "train", MISSION), processor, settings.base.frame_size)[0]
    kept = int((row["labels"] != IGNORED).sum()) + 1
    row |= {"labels": row["labels"][:, -kept:], "logits_to_keep": kept}
    row = {name: value.to(device) if hasattr(value, "to") else value for name, value in row.items()}
    with (
        FlopCounterMode(display=False) as counter,
        torch.autocast(device.split(":")[0], dtype, enabled=dtype != torch.float32),
    ):
        model(**row).loss.backward()
    width, peak = peak_operations_per_second(device, dtype)
    return {
        "operations_per_record": counter.get_total_flops(),
        "operations_counted_by": "torch.utils.flop_counter: one record forward and backward, nothing recomputed, "
        "logits on the verdict only",
        "tokens_per_record": row["input_ids"].numel(),
        "peak_operations_per_second": round(peak),
        "peak_measured_by": f"the fastest of up to 10 matrix products of {width} x {width} in {dtype}".replace(
            "torch.", ""
        ),
    }


# --- evaluation -----------------------------------------------------------------------------------------------------


def asked_of(dataset: Path) -> list[Question]:
    records = read_split(dataset, "test", MISSION)
    return questions(records, conflict_pairs(records))


def picture(question: Question, dataset: Path, settings: Settings) -> Image.Image:
    """Opened, or drawn, for every question anew."""
    size = settings.base.frame_size
    if question.image == NOISE:
        return noise_frame(settings.evaluate.noise, size)
    return read_frame(image_path(dataset, question.record), size).image


def write_answers(out: Path, answers: dict[str, str]) -> None:
    rows = []
    for name, text in answers.items():
        verdict = parse_verdict(MISSION, text)
        rows.append({"id": name, "answer": text, "category": verdict.category if verdict else None})
    (out / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def evaluate(model_folder: Path, dataset: Path, settings: Settings, out: Path) -> dict[str, Any]:
    import torch
    from transformers import GenerationConfig, Lfm2VlForConditionalGeneration

    from orion_triage.models.load import load_processor

    device, dtype = ("cuda:0", torch.float16) if on_gpu() else ("cpu", torch.float32)
    processor = load_processor(model_folder, settings.base.frame_size)
    model = Lfm2VlForConditionalGeneration.from_pretrained(model_folder, dtype=dtype, device_map={"": device}).eval()
    tokenizer = processor.tokenizer
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.convert_tokens_to_ids(END_OF_TURN),
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
        max_new_tokens=settings.evaluate.max_new_tokens,
    )
    answers = {}
    began = time.monotonic()
    for question in asked_of(dataset):
        row = encode(processor, picture(question, dataset, settings), question.user_text)
        with torch.inference_mode():
            ids = model.generate(**{name: value.to(device) for name, value in row.items()})[0]
        answers[question.id] = tokenizer.decode(ids[row["input_ids"].shape[1] :], skip_special_tokens=True)
    seconds = time.monotonic() - began
    write_answers(out, answers)
    return {"asking_seconds": seconds, "questions": len(answers)}


@contextmanager
def default_server(backbone: Path, mmproj: Path, log: Path) -> Iterator[Callable[..., Any]]:
    """llama-server with no flag but its files, address and key; yields what asks it one cold, greedy question."""
    import httpx

    from orion_triage.llama_cpp.toolchain import find_toolchain

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    key = secrets.token_urlsafe(24)
    command = [str(find_toolchain().llama_server), "--model", str(backbone), "--mmproj", str(mmproj)]
    command += ["--host", "127.0.0.1", "--port", port]
    with log.open("wb") as file:
        server = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, "LLAMA_API_KEY": key}
        )
    headers = {"Authorization": f"Bearer {key}"}
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=3600) as client:
            wait_until_ready(client, server, log)
            marker = client.get("/props").json().get("media_marker") or "<__media__>"

            def ask(image: Image.Image, text: str, tokens: int, **more: Any) -> Any:
                return client.post("/completion", json=question_body(image, text, tokens, marker) | more)

            yield ask
    finally:
        server.terminate()
        server.wait()


def wait_until_ready(client: Any, server: "subprocess.Popen[bytes]", log: Path) -> None:
    import httpx

    deadline = time.monotonic() + 600
    while True:
        with suppress(httpx.ConnectError):  # not yet listening
            if client.get("/health").status_code == 200:
                return
        if server.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"llama-server did not start; its log: {log}")
        time.sleep(0.1)


def question_body(image: Image.Image, user_text: str, tokens: int, marker: str) -> dict[str, Any]:
    packed = io.BytesIO()
    image.save(packed, "PNG")
    return {
        "prompt": {
            "prompt_string": f"<|im_start|>user\n{user_text.replace(IMAGE, marker)}<|im_end|>\n<|im_start|>assistant\n",
            "multimodal_data": [base64.b64encode(packed.getvalue()).decode()],
        },
        "n_predict": tokens,
        "temperature": 0,
        "top_k": 1,
        "seed": 0,
        "cache_prompt": False,
    }


def evaluate_gguf(backbone: Path, mmproj: Path, dataset: Path, settings: Settings, out: Path) -> dict[str, Any]:
    answers, refused = {}, 0
    with default_server(backbone, mmproj, out / "server.log") as ask:
        began = time.monotonic()
        for question in asked_of(dataset):
            image = picture(question, dataset, settings)
            reply = ask(image, question.user_text, settings.evaluate.max_new_tokens)
            if reply.status_code == 500:  # an answer whose bytes are no UTF-8
                refused += 1
                answers[question.id] = f"[{reply.status_code}: {reply.text[:200]}]"
                continue
            reply.raise_for_status()
            answers[question.id] = reply.json()["content"]
        seconds = time.monotonic() - began
    write_answers(out, answers)
    return {"asking_seconds": seconds, "questions": len(answers), "refused": refused}


# --- one frame ------------------------------------------------------------------------------------------------------


def frame_requests(dataset: Path, size: int) -> list[tuple[Image.Image, str, int]]:
    """(frame, user's text, answer tokens): one whose time does not count, then the one whose time does."""
    first, second = read_split(dataset, "test", MISSION)[:2]
    return [
        (read_frame(image_path(dataset, record), size).image, record.user_text, tokens)
        for record, tokens in ((first, WARM_UP_TOKENS), (second, FRAME_TOKENS))
    ]


def peak_memory_of_children() -> int:
    """The largest peak resident memory of this process's running children, as the kernel counts it."""
    peaks = [0]
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            text = status.read_text(encoding="utf-8")
        except (FileNotFoundError, ProcessLookupError):  # ended meanwhile
            continue
        fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
        if int(fields["PPid"]) == os.getpid() and "VmHWM" in fields:
            peaks.append(int(fields["VmHWM"].split()[0]) * 1024)
    return max(peaks)


def frame(backbone: Path, mmproj: Path, dataset: Path, size: int, out: Path) -> dict[str, Any]:
    replies = []
    with default_server(backbone, mmproj, out / "server.log") as ask:
        for image, text, tokens in frame_requests(dataset, size):
            began = time.monotonic()
            reply = ask(image, text, tokens, ignore_eos=True, return_tokens=True)
            seconds = time.monotonic() - began
            reply.raise_for_status()
            replies.append((seconds, reply.json()))
        peak = peak_memory_of_children()
    return frame_result(replies, peak)


def frame_result(replies: list[tuple[float, dict[str, Any]]], peak_memory_bytes: int) -> dict[str, Any]:
    (first_seconds, _), (seconds, reply) = replies
    return {
        "first_seconds": first_seconds,
        "seconds": seconds,
        "server_peak_memory_bytes": peak_memory_bytes,
        "tokens": reply["tokens"],
        "prompt_tokens": reply["timings"]["prompt_n"],
        "answer": reply["content"],
    }


# --- merging --------------------------------------------------------------------------------------------------------


def merge(base: Path, adapter: Path, settings: Settings, out: Path) -> dict[str, Any]:
    import torch
    from peft import PeftModel
    from transformers import Lfm2VlForConditionalGeneration

    from orion_triage.models.load import load_processor

    dtype = getattr(torch, settings.fuse.dtype)
    model = Lfm2VlForConditionalGeneration.from_pretrained(base, dtype=dtype, device_map={"": "cpu"})
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    merged.save_pretrained(out / "merged")
    load_processor(base, settings.base.frame_size).save_pretrained(out / "merged")
    return {}


def compare_weights(first: Path, second: Path) -> dict[str, Any]:
    """The largest difference between two checkpoints; names that only one of them has are an error."""
    from safetensors import safe_open

    def files_of(folder: Path) -> dict[str, Path]:
        found = {}
        for path in folder.glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                found |= dict.fromkeys(file.keys(), path)
        return found

    here, there = files_of(first), files_of(second)
    if odd := sorted(set(here) ^ set(there)):
        raise SystemExit(f"{len(odd)} tensors are only in one of {first} and {second}, {odd[0]} first")
    difference = largest = 0.0
    for name in here:
        with safe_open(here[name], "pt") as one, safe_open(there[name], "pt") as other:
            a, b = one.get_tensor(name).float(), other.get_tensor(name).float()
        difference = max(difference, float((a - b).abs().max()))
        largest = max(largest, float(a.abs().max()))
    return {"tensors": len(here), "largest_difference": difference, "largest_weight": largest}


# --- command line ---------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    workers = {
        "train": (train, ("base", "dataset", "settings", "out")),
        "operations": (operations, ("base", "dataset", "settings")),
        "evaluate": (evaluate, ("model", "dataset", "settings", "out")),
        "evaluate-gguf": (evaluate_gguf, ("backbone", "mmproj", "dataset", "settings", "out")),
        "frame": (frame, ("backbone", "mmproj", "dataset", "size", "out")),
        "merge": (merge, ("base", "adapter", "settings", "out")),
        "compare-weights": (compare_weights, ("first", "second")),
    }
    commands = parser.add_subparsers(dest="worker", required=True)
    for name, (_, options) in workers.items():
        command = commands.add_parser(name)
        for option in dict.fromkeys([*options, "out"]):
            command.add_argument(f"--{option}", required=True, type=int if option == "size" else Path)
    arguments = vars(parser.parse_args())
    work, options = workers[arguments.pop("worker")]
    out: Path = arguments["out"]
    out.mkdir(parents=True, exist_ok=True)
    if "settings" in arguments:
        arguments["settings"] = Settings.model_validate_json(arguments["settings"].read_text(encoding="utf-8"))
    result = work(*(arguments[option] for option in options))
    (out / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
