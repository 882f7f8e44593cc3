"""The importance matrix of a calibrated quantization: which columns of each matrix the task needs most.

llama-quantize weighs the rounding error of a column by the mean square of the values that it is multiplied with.
llama-imatrix measures these on text alone. Here the merged model reads records that it was trained on, with image,
prompt and answer, and every token counts. The file is a GGUF in llama-imatrix's format: for each matrix, NAME.in_sum2
(the sums of squares of its columns) and NAME.counts (the number of tokens), in float32.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from orion_triage.dataset.dataset import Dataset
from orion_triage.dataset.records import Record
from orion_triage.errors import OrionError
from orion_triage.export.convert import matrices
from orion_triage.models.encode import encode
from orion_triage.models.family import Family, family_in
from orion_triage.models.load import float32_compute, load_model, load_processor
from orion_triage.progress import Progress, silent

if TYPE_CHECKING:
    import torch

RECORDS = 48  # 15,000 tokens at 256 px, 25,000 at 512
TOKEN_EMBEDDING, HEAD = "token_embd.weight", "output.weight"


@dataclass
class Columns:
    """What the columns of one matrix were multiplied with: sums of squares, float64 [row width], over `tokens`."""

    sums_of_squares: NDArray[np.float64]
    tokens: int


def run(
    merged: Path,
    f16: Path,
    dataset: Dataset,
    out: Path,
    frame_size: int,
    progress: Progress = silent,
    *,
    count: int = RECORDS,
) -> dict[str, Any]:
    """Measure the importance matrix of the model in `merged`, whose F16 backbone is `f16`, and write it to `out`.

    It reads up to `count` training records, in float32; weights stay in 16 bits.

    Returns the numbers of records, tokens and entries. Raises OrionError for a dataset without training records, and
    for a matrix that does not fit the backbone (see `check`).
    """
    import torch

    records = training_records(dataset, count)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    processor = load_processor(merged, frame_size)
    model = load_model(merged, dtype="auto", device=device)
    longest = 0
    with float32_compute(model), counted(model, family_in(merged)) as seen, torch.inference_mode():
        for done, record in enumerate(records, start=1):
            # One record at a time: without padding, which would count as tokens.
            batch = encode(processor, [dataset.frame(record, frame_size)], [record.user_text], [record.answer])
            longest = max(longest, batch["input_ids"].shape[1])
            batch.pop("labels")
            model(**batch.to(model.device), use_cache=False)
            progress("calibrating", done, len(records))
    entries = named(seen, f16, family_in(merged))
    write(out, entries, records, longest)
    check(out, f16, family_in(merged))
    return {"records": len(records), "tokens": max(one.tokens for one in entries.values()), "entries": len(entries)}


def training_records(dataset: Dataset, count: int = RECORDS) -> list[Record]:
    """Up to `count` frames spread over the training split, every second one without its coordinates.

    Neither val nor test is read: a pair that is calibrated on the frames that judge it would look better than it is.
    """
    first: dict[str, Record] = {}  # of a frame's two records, the one with coordinates
    for record in dataset.records("train"):
        first.setdefault(record.name, record)
    frames = list(first.values())
    if not frames:
        raise OrionError(f"{dataset.folder} has no training records.", "Set quantize.calibrate=none.")
    used = min(count, len(frames))
    spread = [frames[index * len(frames) // used] for index in range(used)]
    return [record.without_coordinates() if index % 2 else record for index, record in enumerate(spread)]


@contextmanager
def counted(model: Any, family: Family) -> "Iterator[dict[str, Columns]]":
    """While it is open, add up the inputs of the language model's linear layers: module name -> its columns."""
    from torch import nn

    (language,) = (part for part, tower in family.TOWERS.items() if tower == "text")
    seen: dict[str, Columns] = {}

    def add(name: str, inputs: "torch.Tensor") -> None:
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).double()
        columns = seen.setdefault(name, Columns(np.zeros(rows.shape[1]), 0))
        columns.sums_of_squares += rows.square().sum(0).cpu().numpy()
        columns.tokens += len(rows)

    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: add(name, inputs[0]))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and (language in name.split(".") or name == "lm_head")
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def named(seen: Mapping[str, Columns], f16: Path, family: Family) -> dict[str, Columns]:
    """The columns by the names of the backbone's tensors.

    The token embedding gets those of the head that is tied to it. With a head of its own, it is only looked up, so its
    columns are all as important.
    """
    import gguf

    reader = gguf.GGUFReader(f16)
    widths = {tensor.name: int(tensor.shape[0]) for tensor in matrices(reader, family)}
    field = reader.get_field("general.architecture")
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if field and name == field.contents())
    table = gguf.get_tensor_name_map(kind, _layers(widths))
    (language,) = (part for part, tower in family.TOWERS.items() if tower == "text")
    entries = {}
    for name, columns in seen.items():
        plain = ".".join(part for part in name.split(".") if part != language)
        entries[f"{table.get_name(plain) or plain}.weight"] = columns
    if HEAD not in widths and HEAD in entries:
        entries[TOKEN_EMBEDDING] = entries.pop(HEAD)
    elif TOKEN_EMBEDDING in widths and HEAD in entries:
        tokens = entries[HEAD].tokens
        entries[TOKEN_EMBEDDING] = Columns(np.full(widths[TOKEN_EMBEDDING], float(tokens)), tokens)
    return entries


def _layers(names: Mapping[str, Any]) -> int:
    return 1 + max(int(name.split(".")[1]) for name in names if name.startswith("blk."))


def write(path: Path, entries: Mapping[str, Columns], records: Sequence[Record], longest: int) -> None:
    """Write the matrix as GGUF; `longest` is the number of tokens of the longest record.

    `imatrix.datasets` names what was read. llama-quantize writes the first of it into the quantized file's header.
    """
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    what = f"{len(records)} records of the training split of ORION triage, image and text"
    writer.add_array("imatrix.datasets", [what, *(record.name for record in records)])
    writer.add_uint32("imatrix.chunk_count", len(records))
    writer.add_uint32("imatrix.chunk_size", longest)
    for name in sorted(entries):
        writer.add_tensor(f"{name}.in_sum2", entries[name].sums_of_squares.astype(np.float32)[None])
        writer.add_tensor(f"{name}.counts", np.array([[entries[name].tokens]], dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check(path: Path, f16: Path, family: Family) -> None:
    """Raise OrionError unless each matrix of the backbone has its entry, and each entry its matrix.

    Entries are as wide as the matrix's rows, finite, and counted over at least one token. llama-quantize quantizes
    a matrix without an entry all the same, and says so in a line that nobody reads.
    """
    from gguf import GGUFReader

    widths = {tensor.name: int(tensor.shape[0]) for tensor in matrices(GGUFReader(f16), family)}
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(path).tensors}
    entries = {name.removesuffix(".in_sum2") for name in tensors if name.endswith(".in_sum2")}
    wrong = [f"{name} has no entry" for name in widths.keys() - entries]
    wrong += [f"{name} is not a matrix of {f16.name}" for name in entries - widths.keys()]
    for name in sorted(widths.keys() & entries):
        values, counts = tensors[f"{name}.in_sum2"], tensors.get(f"{name}.counts")
        if values.size != widths[name]:
            wrong.append(f"{name} has {values.size} values for rows of {widths[name]}")
        elif counts is None or not np.all(counts > 0):
            wrong.append(f"{name} was never used")
        elif not np.all(np.isfinite(values)):
            wrong.append(f"{name} has values that are not finite")
    if wrong:
        raise OrionError(
            f"the importance matrix {path.name} does not fit the model: {sorted(wrong)[0]}"
            f"{f', and {len(wrong) - 1} more' if len(wrong) > 1 else ''}.",
            "Set quantize.calibrate=none, and report the base.",
        )
