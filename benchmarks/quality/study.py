"""The supervised study: a search of the learning rate, the same for all methods, then full runs over seeds."""

import copy
import gc
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.quality.methods import LEARNING_RATES, adapted
from benchmarks.quality.sft import evaluate, num_targets, train
from benchmarks.quality.store import Result, Store
from benchmarks.quality.tasks import Task
from preft_hf.demo.answer import answer
from preft_hf.demo.cities import field_accuracy
from preft_hf.training.data import Sample

NUM_SCORED = 96
# Successive halving: after so many steps, so many of the rates go on.
SEARCH = ((24, 4), (64, 2))
# steps between two looks at the validation rows in a full run
EVERY = 25


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


class EarlyStopping:
    """Remembers the adapter with the lowest validation loss, which a full run passes while it goes on.

    Attributes:
        losses: on the validation rows, every EVERY steps
    """

    def __init__(self, model: Any, bench: Bench):
        self.losses: list[float] = []
        self._model, self._bench = model, bench
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._kept: list[torch.Tensor] = []
        self._num_steps = 0

    def __call__(self, loss: float) -> None:
        self._num_steps += 1
        if self._num_steps % EVERY:
            return
        found = evaluate(self._model, self._bench.validation, self._bench.pad)["loss"]
        found = found if math.isfinite(found) else math.inf
        self._model.train()
        if found < min(self.losses, default=math.inf):
            self._kept = [parameter.detach().clone() for parameter in self._trained]
        self.losses.append(found)

    @torch.no_grad()
    def result(self, at_end: Result) -> Result | None:
        """Returns the step of the lowest validation loss and the test loss there. The model has those weights then.

        None if no look found a finite loss.

        Args:
            at_end: what `evaluate` found on the test rows at the end of the run
        """
        if not self._kept:
            return None
        for parameter, kept in zip(self._trained, self._kept, strict=True):
            parameter.copy_(kept)
        step = EVERY * (1 + self.losses.index(min(self.losses)))
        found = at_end
        if step < self._num_steps:
            found = evaluate(self._model, self._bench.test, self._bench.pad)
        return {"step": step, "loss": found["loss"], "by_distance": found["by_distance"]}


def base_result(bench: Bench, store: Store) -> Result:
    """Returns what the base model scores on the task."""
    dtype = {} if store.dtype == "bfloat16" else {"dtype": store.dtype}
    key = store.key(part="base", task=bench.task.name, **dtype)
    found = store.get(key)
    if found is not None:
        return found
    facts = {
        "task": bench.task.name,
        "num_test_rows": len(bench.test),
        "row_tokens": list(map(num_targets, bench.test)),
    }
    return store.put(key, facts | evaluate(bench.base, bench.test, bench.pad) | score(bench, bench.base))


def chosen_rate(bench: Bench, store: Store, method: str, rank: int, report: Callable[[str], None]) -> float:
    """Returns the learning rate with the lowest validation loss, by successive halving over LEARNING_RATES."""
    rates: Sequence[float] = LEARNING_RATES
    losses: dict[float, float] = {}
    for num_steps, num_kept in SEARCH:
        rates = sorted(rates, key=lambda rate: losses.get(rate, 0.0))[:num_kept]
        for rate in rates:
            facts = {"task": bench.task.name, "method": method, "rank": rank, "lr": rate, "steps": num_steps}
            found = store.once("search", facts, report, partial(_searched, bench, method, rank, rate, num_steps))
            losses[rate] = found["loss"] if math.isfinite(found["loss"]) else math.inf
    return min(rates, key=lambda rate: losses[rate])


def _searched(bench: Bench, method: str, rank: int, rate: float, num_steps: int) -> Result:
    model = bench.fresh(method, rank, seed=1000)
    train_losses, seconds = train(model, bench.train, bench.pad, num_steps, rate, seed=1000)
    loss = evaluate(model, bench.validation, bench.pad)["loss"]
    return {"loss": loss, "last_train_loss": train_losses[-1], "seconds": seconds}


def full_run(
    bench: Bench, store: Store, method: str, rank: int, rate: float, seed: int, report: Callable[[str], None]
) -> Result:
    """Returns a full run's result: the curves, the test loss by distance, the same at the best step, the score."""
    num_steps = bench.task.num_steps
    facts = {"task": bench.task.name, "method": method, "rank": rank, "lr": rate, "steps": num_steps, "seed": seed}

    def make() -> Result:
        model = bench.fresh(method, rank, seed)
        stopping = EarlyStopping(model, bench)
        losses, seconds = train(model, bench.train, bench.pad, num_steps, rate, seed, tick=stopping)
        curve = [statistics.fmean(losses[i : i + 10]) for i in range(0, len(losses), 10)]
        at_end = evaluate(model, bench.test, bench.pad)
        result = {"train_curve": curve, "seconds": seconds} | at_end | score(bench, model)
        return result | {"validation_curve": stopping.losses, "early_stopped": stopping.result(at_end)}

    return store.once("sft", facts, report, make)


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
