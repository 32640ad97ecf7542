"""The study's shorter runs: their rate is the search's, and each is compared with LoRA's of its task and seed."""

import json
from types import SimpleNamespace

import pytest
from benchmarks.quality import report_parts, short
from benchmarks.quality.methods import LEARNING_RATES, METHODS
from benchmarks.quality.sft import evaluate
from benchmarks.quality.store import RESULTS, Store
from benchmarks.quality.study import Bench

from preft_hf.demo.cities import Row

from .hf.zoo import make_base


@pytest.mark.parametrize("task", short.TASKS)
@pytest.mark.parametrize("method", METHODS)
def test_the_rate_is_what_the_search_found_for_runs_of_this_length(task, method):
    runs = json.loads((RESULTS / "cpu.json").read_text())["runs"]
    start, end = f"part=search task={task} method={method} rank={short.RANK} lr=", f" steps={short.NUM_STEPS}"
    losses = {rate: runs[f"{start}{rate}{end}"]["loss"] for rate in LEARNING_RATES if f"{start}{rate}{end}" in runs}
    assert len(losses) == 2
    assert min(losses, key=lambda rate: losses[rate]) == short.RATE


def test_a_task_is_whole_before_the_next():
    planned = list(short.plan(2))
    assert planned[:4] == [("chatterbot", method, 0) for method in METHODS] + [("chatterbot", METHODS[0], 1)]
    assert [task for task, _, _ in planned] == ["chatterbot"] * 6 + ["devil"] * 6


def test_a_short_run_learns_and_is_done_once(tmp_path, monkeypatch):
    monkeypatch.setattr(short, "NUM_STEPS", 12)
    rows = [Row(str(i), str(i)) for i in range(16)]
    samples = lambda rows, tokenizer: [  # noqa: E731
        {"input_ids": [3 + i % 4, 9, 20 + i % 4, 1], "labels": [-100, -100, 20 + i % 4, 1]} for i in range(len(rows))
    ]
    task = SimpleNamespace(name="chatterbot", samples=samples, train=rows, validation=rows[:4], test=rows[:8])
    bench = Bench(make_base("llama"), SimpleNamespace(pad_token_id=0), task)  # type: ignore[arg-type]
    store, told = Store(tmp_path / "r.json", {}), []
    found = short.run(bench, store, "lora", 0, told.append)
    assert found["loss"] < evaluate(bench.base, bench.test, 0)["loss"]
    assert (found["steps"], found["seed"], found["method"]) == (12, 0, "lora")
    assert short.run(bench, store, "lora", 0, told.append) == found
    assert told == ["part=short task=chatterbot method=lora rank=16 lr=0.003 steps=12 seed=0"]


def test_a_task_is_compared_with_its_own_lora():
    losses = {("chatterbot", "lora"): [1.0, 2.0], ("chatterbot", "lora-p"): [1.5, 2.5], ("devil", "lora"): [7.0]}
    losses["devil", "direft-p"] = [6.0]
    runs = {
        f"{task} {method} {seed}": {"task": task, "method": method, "rank": 16, "seed": seed, "loss": loss}
        | {"row_losses": [loss, loss], "row_tokens": [1, 1]}
        for (task, method), values in losses.items()
        for seed, loss in enumerate(values)
    }
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report_parts.short_table(runs)]
    assert [[row[0], row[1], row[3], *row[5:]] for row in rows[2:]] == [
        ["chatterbot", "all-token LoRA", "2", "", ""],
        ["chatterbot", "LoRA-P", "2", "+0.500 ± 0.000; rows ± 0.000", "+0.500 ± 0.000"],
        ["devil", "all-token LoRA", "1", "", ""],
        ["devil", "DiReFT-P", "1", "-1.000; rows ± 0.000", "-1.000 ± 0.000"],
    ]
