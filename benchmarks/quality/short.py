"""Runs of the search's length: does a method still win if the schedule ends before rows are recalled?

A run that is stopped early stops while its learning rate is high. Here the rate falls to zero by the step at which the
search judged it.
"""

from collections.abc import Callable, Iterator

from benchmarks.quality.methods import METHODS
from benchmarks.quality.prompts import CHAT, PLAIN, TEXT, in_form
from benchmarks.quality.sft import evaluate, train
from benchmarks.quality.store import Result, Store
from benchmarks.quality.study import SEARCH, Bench

# those whose rows a full run passes over several times
TASKS = ("chatterbot", "devil")
RANK = 16
# what the search chose at this rank for each method and task
RATE = 3e-3
NUM_STEPS = SEARCH[-1][0]
# the task whose prompts are put in other forms too
FORMED = "chatterbot"


def plan(seeds: int) -> Iterator[tuple[str, str, int, str]]:
    """Yields (task, method, seed, form of the prompts), a whole task before the next and other forms last."""
    for task in TASKS:
        for seed in range(seeds):
            for method in METHODS:
                yield task, method, seed, PLAIN
    for seed in range(seeds):
        for form in (TEXT, CHAT):
            for method in METHODS:
                yield FORMED, method, seed, form


def run(bench: Bench, store: Store, method: str, seed: int, form: str, report: Callable[[str], None]) -> Result:
    """Returns the test loss of a run of NUM_STEPS, whose facts name the form of its prompts if it is not PLAIN."""
    facts = {"task": bench.task.name, "method": method, "rank": RANK, "lr": RATE, "steps": NUM_STEPS, "seed": seed}
    facts |= {} if form == PLAIN else {"form": form}

    def make() -> Result:
        model = bench.fresh(method, RANK, seed)
        rows, test = (in_form(samples, form, bench.tokenizer) for samples in (bench.train, bench.test))
        losses, seconds = train(model, rows, bench.pad, NUM_STEPS, RATE, seed)
        return {"last_train_loss": losses[-1], "seconds": seconds} | evaluate(model, test, bench.pad)

    return store.once("short", facts, report, make)
