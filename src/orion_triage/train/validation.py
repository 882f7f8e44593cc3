"""What a validation measures: each val record asked as in flight, without coordinates, and with them.

Averages are over tokens or records, so they do not depend on the batches and processes that the records are shared out
over. `chosen_step` says which epoch is kept.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import transformers

from orion_triage.dataset.records import Record
from orion_triage.mission.verdict import CATEGORY_CUE
from orion_triage.models.encode import IGNORED

WITHOUT, WITH = "", "_with_coordinates"  # ends of the names of the two forms' figures


def asked_twice(records: Sequence[Record]) -> list[Record]:
    """Each record without its coordinates, followed by the record with them if it has any: one image, two rows."""
    return [
        row
        for record in records
        for row in ([record.without_coordinates(), record] if record.coordinates else [record])
    ]


CHOSEN_BY = "lowest eval_loss within one standard error of the lowest eval_loss_category"


def chosen_step(log: Sequence[Mapping[str, float]]) -> int:
    """The step of the epoch to keep, out of a training's log.

    The flight uses the category, but 60 records do not distinguish late epochs by it. Among the epochs within one
    standard error of the best (rule of Breiman and others, 1984), the loss of the whole verdict decides, of which the
    category is a small part. Both without coordinates. The earlier epoch wins a tie.
    """
    epochs = [entry for entry in log if "eval_loss_category" in entry]
    best = min(epochs, key=lambda entry: entry["eval_loss_category"])
    limit = best["eval_loss_category"] + best["eval_loss_category_error"]
    near = [entry for entry in epochs if entry["eval_loss_category"] <= limit]
    return int(min(near, key=lambda entry: entry["eval_loss"])["step"])


class ValidatingTrainer(transformers.Trainer):  # type: ignore[misc]
    """transformers' Trainer with another validation: sums per row instead of a mean of the batches' means.

    `train_order` is a sampler of the training records; None: Trainer's random order.
    """

    def __init__(
        self,
        *arguments: Any,
        val_records: Sequence[Record],
        tokenizer: Any,
        train_order: Any = None,
        **options: Any,
    ) -> None:
        rows = asked_twice(val_records)

        def compute_metrics(result: Any) -> dict[str, float]:
            return metrics(rows, np.asarray(result.predictions))

        super().__init__(*arguments, eval_dataset=rows, compute_metrics=compute_metrics, **options)
        self._train_order = train_order
        self._place = lru_cache(maxsize=None)(lambda answer: category_place(tokenizer, answer))

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return super()._get_train_sampler(train_dataset) if self._train_order is None else self._train_order

    def _determine_best_metric(self, metrics: Mapping[str, float], trial: Any) -> bool:
        """Whether the epoch to keep is another one than before; it may be an earlier one."""
        before = self.state.best_global_step
        self.state.best_global_step = chosen_step(self.state.log_history)
        self.state.best_metric = next(
            entry["eval_loss"]
            for entry in self.state.log_history
            if entry["step"] == self.state.best_global_step and "eval_loss" in entry
        )
        return bool(self.state.best_global_step != before)

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        """(No loss, `row_sums` of the batch, the rows' numbers of tokens)."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(**inputs).logits
        labels = inputs["labels"]
        is_category = torch.zeros_like(labels, dtype=torch.bool)
        for row, ids in enumerate(labels.tolist()):
            supervised = [place for place, label in enumerate(ids) if label != IGNORED]
            for place in self._place(tuple(ids[place] for place in supervised)):
                is_category[row, supervised[place]] = True
        sums = row_sums(logits, labels, is_category)
        return None, sums, sums[:, 1]


def row_sums(logits: torch.Tensor, labels: torch.Tensor, is_category: torch.Tensor) -> torch.Tensor:
    """Per row [rows, 3]: nats of the answer, its number of tokens, nats of the category's tokens.

    `logits` [rows, tokens, vocabulary] predict the next token's `labels` [rows, tokens]; `is_category` marks labels.
    """
    wanted, marked = labels[:, 1:], is_category[:, 1:]
    nats = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), wanted, ignore_index=IGNORED, reduction="none"
    )
    return torch.stack([nats.sum(1), (wanted != IGNORED).sum(1).to(nats.dtype), (nats * marked).sum(1)], dim=1)


def category_place(tokenizer: Any, answer: Sequence[int]) -> range:
    """The places of the tokens that spell the category in an answer's token ids."""
    text = tokenizer.decode(answer)
    begin = text.index(CATEGORY_CUE) + len(CATEGORY_CUE)
    end = text.index('"', begin)
    ends = [len(tokenizer.decode(answer[: count + 1])) for count in range(len(answer))]
    touched = [place for place, after in enumerate(ends) if after > begin and (ends[place - 1] if place else 0) < end]
    return range(touched[0], touched[-1] + 1)


def metrics(rows: Sequence[Record], sums: np.ndarray) -> dict[str, float]:
    """`loss` (nats a token) and `loss_category` (nats a record), for rows without and with coordinates.

    `loss_category_error` is the standard error of the category's loss without coordinates. `sums` [rows, 3] is
    `row_sums` of the rows. A form without rows has no figures.
    """
    found: dict[str, float] = {}
    for name, of_form in (
        (WITHOUT, [record.coordinates is None for record in rows]),
        (WITH, [record.coordinates is not None for record in rows]),
    ):
        part = sums[np.array(of_form, dtype=bool)].astype(np.float64)
        if len(part):
            found[f"loss{name}"] = float(part[:, 0].sum() / part[:, 1].sum())
            found[f"loss_category{name}"] = float(part[:, 2].mean())
            if name == WITHOUT:
                found["loss_category_error"] = float(part[:, 2].std() / np.sqrt(max(len(part) - 1, 1)))
    return found
