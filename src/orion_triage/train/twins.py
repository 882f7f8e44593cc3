"""The two records of a frame, with and without coordinates, beside each other in the order of the training.

A micro batch then has half as many images as records, and what its rows share is computed once: the vision tower per
image, and the language model up to the coordinates (see `models.shared_image`).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from orion_triage.dataset.records import Record
from orion_triage.errors import OrionError

if TYPE_CHECKING:
    from transformers import BatchFeature

# Of a token's logits, by norm. Rounding: below 1e-5 on a CPU, also in 16 bits. The smallest fault that was tried (the
# image upside down, shipped base) changes them by 0.10, one layer's convolution that forgets the prefix by 0.23.
LARGEST_LOGIT_CHANGE = 0.05


def twins_of(records: Sequence[Record]) -> list[tuple[int, ...]]:
    """The indices of the records, in twos of the same image; a record without a twin is alone."""
    of_image: dict[str, list[int]] = {}
    for index, record in enumerate(records):
        of_image.setdefault(record.image, []).append(index)
    return [tuple(found[start : start + 2]) for found in of_image.values() for start in range(0, len(found), 2)]


class TwinsSampler:
    """The order of an epoch: the twins shuffled as one, every record once.

    Two records without twins take the place of twins, so that no micro batch of even size cuts twins in two. If one is
    left, it is the last. The order depends on the seed and the epoch only: not on a resume, nor on the number of
    processes, whose micro batches accelerate takes from it in turn.
    """

    def __init__(self, records: Sequence[Record], seed: int) -> None:
        groups = twins_of(records)
        self._twins = [group for group in groups if len(group) == 2]
        self._alone = [index for group in groups if len(group) == 1 for index in group]
        self._seed, self._epoch, self._length = seed, 0, len(records)

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng([self._seed, self._epoch])
        alone = random.permutation(self._alone).astype(int).tolist()
        couples = [*self._twins, *zip(alone[::2], alone[1::2], strict=False)]
        for place in random.permutation(len(couples)):
            yield from couples[place]
        yield from alone[len(alone) // 2 * 2 :]


def costliest_first(records: Sequence[Record]) -> list[Record]:
    """Records without twins, which need an image each, then twins beside each other; otherwise in the given order."""
    return [records[index] for group in sorted(twins_of(records), key=len) for index in group]


def check_shared_prefix(
    model: Any, collate: "Callable[[list[Record]], BatchFeature]", records: Sequence[Record], precision: str
) -> None:
    """Raise OrionError unless two records get the same logits, at every token after the prefix, as without it.

    They are the first twins, or without twins the first two records, if these have a prefix.

    The prefix is carried over in transformers' cache. Before version 5.15, short convolutions read only one token
    after a cache, and gave all following tokens the result of one, without an error.
    """
    import torch

    two = next((group for group in twins_of(records) if len(group) == 2), (0, 1))
    batch = collate([records[index] for index in two if index < len(records)]).to(model.device)
    if not batch["shared_tokens"]:
        return
    del batch["labels"]
    batch["logits_to_keep"] = batch["input_ids"].shape[1] - batch["shared_tokens"]
    model.eval()
    with (
        torch.inference_mode(),
        torch.autocast(model.device.type, getattr(torch, precision), enabled=model.device.type != "cpu"),
    ):
        shared = model(**batch).logits.float()
        plain = model(**{**batch, "shared_tokens": 0}).logits.float()
    spread = (plain - plain.mean(dim=-1, keepdim=True)).norm(dim=-1)
    change = float(((shared - plain).norm(dim=-1) / spread).max())
    if not change <= LARGEST_LOGIT_CHANGE:
        raise OrionError(
            f"sharing the start of two prompts changes a token's logits by {change:.1%} "
            f"(rounding: at most {LARGEST_LOGIT_CHANGE:.0%}).",
            "Use transformers 5.15 or newer. With the image before the text, fine_tune.twins_together=false is enough.",
        )
