"""The supervised study: a search of the learning rate, the same for all methods, then full runs over seeds."""

import copy
import gc
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.quality.methods import LEARNING_RATES, adapted
from benchmarks.quality.sft import evaluate, train
from benchmarks.quality.store import Result, Store
from benchmarks.quality.tasks import Task
from preft_hf.data import Sample
from preft_hf.demo.answer import answer
from preft_hf.demo.cities import field_accuracy

NUM_SCORED = 96
# Successive halving: after so many steps, so many of the rates go on.
SEARCH = ((24, 4), (64, 2))


@dataclass
class Bench:
    """The base model, its tokenizer and a task's samples."""

    base: Any
    tokenizer: Any
    task: Task

    def __post_init__(self) -> None:
        self.pad: int = self.tokenizer.pad_token_id
        self.train = self._samples("train")
        self.validation = self._samples("validation")
        self.test = self._samples("test")

    def _samples(self, part: str) -> list[Sample]:
        return self.task.samples(getattr(self.task, part), self.tokenizer)

    def fresh(self, method: str, rank: int, seed: int) -> Any:
        """Returns a copy of the base with a new adapter: PEFT changes the model that it is given."""
        gc.collect()
        return adapted(copy.deepcopy(self.base), method, rank, seed)


def base_result(bench: Bench, store: Store) -> Result:
    """Returns what the base model scores on the task."""
    key = store.key(part="base", task=bench.task.name)
    found = store.get(key)
    if found is not None:
        return found
    result = evaluate(bench.base, bench.test, bench.pad) | {"num_test_rows": len(bench.test)}
    return store.put(key, result | score(bench, bench.base))


def chosen_rate(bench: Bench, store: Store, method: str, rank: int, report: Callable[[str], None]) -> float:
    """Returns the learning rate with the lowest validation loss, by successive halving over LEARNING_RATES."""
    rates: Sequence[float] = LEARNING_RATES
    losses: dict[float, float] = {}
    for num_steps, num_kept in SEARCH:
        rates = sorted(rates, key=lambda rate: losses.get(rate, 0.0))[:num_kept]
        for rate in rates:
            key = store.key(part="search", task=bench.task.name, method=method, rank=rank, lr=rate, steps=num_steps)
            found = store.get(key)
            if found is None:
                report(key)
                model = bench.fresh(method, rank, seed=1000)
                train_losses, seconds = train(model, bench.train, bench.pad, num_steps, rate, seed=1000)
                loss = evaluate(model, bench.validation, bench.pad)["loss"]
                found = store.put(key, {"loss": loss, "last_train_loss": train_losses[-1], "seconds": seconds})
            losses[rate] = found["loss"] if math.isfinite(found["loss"]) else math.inf
    return min(rates, key=lambda rate: losses[rate])


def full_run(
    bench: Bench, store: Store, method: str, rank: int, rate: float, seed: int, report: Callable[[str], None]
) -> Result:
    """Returns a full run's result: the curve, the test loss by distance, the task's score."""
    num_steps = bench.task.num_steps
    facts = {"task": bench.task.name, "method": method, "rank": rank, "lr": rate, "steps": num_steps, "seed": seed}
    key = store.key(part="sft", **facts)
    found = store.get(key)
    if found is not None:
        return found
    report(key)
    model = bench.fresh(method, rank, seed)
    losses, seconds = train(model, bench.train, bench.pad, num_steps, rate, seed)
    curve = [statistics.fmean(losses[i : i + 10]) for i in range(0, len(losses), 10)]
    result = facts | {"train_curve": curve, "seconds": seconds} | evaluate(model, bench.test, bench.pad)
    return store.put(key, result | score(bench, model))


def plan(tasks: Sequence[str], methods: Sequence[str], ranks: Sequence[int], seeds: int) -> Iterator[tuple[Any, ...]]:
    """Yields (task, method, rank, seed) in the order that makes an unfinished study the most useful."""
    for seed in range(seeds):
        for task in tasks:
            for rank in ranks:
                for method in methods:
                    yield task, method, rank, seed


def score(bench: Bench, model: Any) -> dict[str, float]:
    """Returns the share of right fields of generated city cards; nothing for tasks without a score."""
    if bench.task.name != "cities":
        return {}
    rows = bench.task.test[:NUM_SCORED]
    with torch.no_grad():
        texts = answer(model.eval(), bench.tokenizer, [row.prompt for row in rows], 28)
    return {"field_accuracy": field_accuracy(texts, rows)}
