"""One supervised run: the same loop for every method, so that only the adapter differs."""

import math
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional

from preft_hf import PreftConfig
from preft_hf.forward.labels import IGNORED_LABEL
from preft_hf.training.data import Sample, collate

BATCH = 8
# what a call of the model costs beside its tokens, in tokens
PIECE_TOKENS = 64
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def train(
    model: Any,
    samples: Sequence[Sample],
    pad: int,
    num_steps: int,
    learning_rate: float,
    seed: int,
    tick: Callable[[float], None] = lambda loss: None,
    batch_size: int = BATCH,
    loss_of: Callable[[Any, dict[str, torch.Tensor]], torch.Tensor] = lambda model, batch: model(**batch).loss,
) -> tuple[list[float], float]:
    """Trains the adapter in place: AdamW, warm-up over a tenth of the steps, then a linear fall to zero.

    Args:
        tick: called after every step with its loss
        loss_of: of a model on a batch as `collate` makes it
    Returns:
        the losses of all steps, in nats a response token, and the seconds taken; the losses end where one is not
        finite.
    """
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0)
    warm_up = max(1, num_steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (num_steps - step) / (num_steps - warm_up + 1))
    )
    rows = _order(len(samples), num_steps * batch_size, seed)
    losses, began = [], time.perf_counter()
    model.train()
    for step in range(num_steps):
        chosen = [samples[i] for i in rows[step * batch_size : (step + 1) * batch_size]]
        losses.append(_backward(model, chosen, pad, loss_of))
        if not math.isfinite(losses[-1]):
            break
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        tick(losses[-1])
    return losses, time.perf_counter() - began


@torch.no_grad()
def evaluate(model: Any, samples: Sequence[Sample], pad: int) -> dict[str, Any]:
    """Returns the mean loss over response tokens, per row and by distance from the prompt, in nats a token.

    A sample may have a prefill_mask, for prompts that are not what its labels leave out.

    Keys: loss; row_losses; by_distance, from a bucket's first distance (1 is the first response token) to
    [sum of losses, number of tokens].
    """
    model.eval()
    row_losses, total, count = [0.0] * len(samples), 0.0, 0
    by_distance = {first: [0.0, 0] for first in BUCKETS}
    by_length = sorted(range(len(samples)), key=lambda i: len(samples[i]["input_ids"]))
    for begin in range(0, len(samples), BATCH):
        numbers = by_length[begin : begin + BATCH]
        batch = _batch(model, [samples[i] for i in numbers], pad)
        logits = model(**batch).logits[:, :-1].float()
        labels = batch["labels"][:, 1:]
        losses = functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
        for i, row, target in zip(numbers, losses, labels, strict=True):
            values = row[target != -100].double().cpu()
            row_losses[i] = float(values.mean())
            total, count = total + float(values.sum()), count + len(values)
            for first, last in zip(BUCKETS, [*BUCKETS[1:], None], strict=True):
                part = values[first - 1 : None if last is None else last - 1]
                by_distance[first][0] += float(part.sum())
                by_distance[first][1] += len(part)
    return {"loss": total / count, "row_losses": row_losses, "by_distance": by_distance}


def _backward(model: Any, rows: Sequence[Sample], pad: int, loss_of: Callable[..., torch.Tensor]) -> float:
    """Adds the gradient of the rows' mean loss a token and returns that loss. Rows of like length go together."""
    total, loss = sum(map(num_targets, rows)), 0.0
    for piece in pieces(rows):
        batch = {name: tensor.to(model.device) for name, tensor in collate(piece, pad).items()}
        share = loss_of(model, batch) * (sum(map(num_targets, piece)) / total)
        loss += share.item()
        if not math.isfinite(loss):
            break
        share.backward()
    return loss


def pieces(rows: Sequence[Sample]) -> list[list[Sample]]:
    """Returns the rows by length, cut where padding would cost more than PIECE_TOKENS for another call."""
    rows = sorted(rows, key=lambda row: len(row["input_ids"]))
    # cheapest way to cut the first n rows: its cost, and where its last piece begins
    best = [(0, 0)]
    for end in range(1, len(rows) + 1):
        longest = len(rows[end - 1]["input_ids"])
        best.append(min((best[begin][0] + PIECE_TOKENS + longest * (end - begin), begin) for begin in range(end)))
    found, end = [], len(rows)
    while end:
        begin = best[end][1]
        found.insert(0, rows[begin:end])
        end = begin
    return found


def num_targets(sample: Sample) -> int:
    """Returns the response tokens of a row that a loss is over."""
    return sum(label != IGNORED_LABEL for label in sample["labels"][1:])


def _batch(model: Any, samples: Sequence[Sample], pad: int) -> dict[str, torch.Tensor]:
    batch = collate(samples, pad)
    if "prefill_mask" in samples[0] and isinstance(model.active_peft_config, PreftConfig):
        length = batch["input_ids"].shape[1]
        rows = [sample["prefill_mask"] + [0] * (length - len(sample["prefill_mask"])) for sample in samples]
        batch["prefill_mask"] = torch.tensor(rows, dtype=torch.bool)
    return {name: tensor.to(model.device) for name, tensor in batch.items()}


def _order(num_rows: int, num_wanted: int, seed: int) -> list[int]:
    """Returns row numbers: whole passes over the rows, each in an order of its own."""
    shuffle, rows = random.Random(seed), []
    while len(rows) < num_wanted:
        rows += shuffle.sample(range(num_rows), num_rows)
    return rows[:num_wanted]
