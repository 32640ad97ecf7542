"""Early stopping in the study: the adapter that is judged is the one with the lowest validation loss on the way."""

import copy
import json
import math
from types import SimpleNamespace

import pytest
import torch

from benchmarks.quality import report, study
from benchmarks.quality.methods import METHODS, adapted
from benchmarks.quality.sft import evaluate, train
from benchmarks.quality.store import Store
from tests.benchmarks.test_quality_batches import row
from tests.hf.zoo import make_base


class Bench:
    pad = 0
    train = [row(length) for length in (5, 6, 7, 9)]
    validation = train[:2]
    test = [row(8), row(12)]


@pytest.mark.parametrize("method", METHODS)
def test_the_best_adapter_on_the_way_is_judged(method, monkeypatch):
    """Against a copy of every step. The run learns the rows at first and then unlearns them."""
    monkeypatch.setattr(study, "EVERY", 3)
    model = adapted(make_base("llama"), method, 4, 0)
    unwatched = copy.deepcopy(model)
    stopping, passed = study.EarlyStopping(model, Bench()), []  # type: ignore[arg-type]

    def tick(loss):
        stopping(loss)
        assert model.training, "a look leaves the model in eval mode"
        passed.append(copy.deepcopy(model))

    def run(trained, tick):
        # one row a step, so that each call of the loss is a step
        steps = iter(range(31))
        return train(
            trained,
            Bench.train,
            0,
            31,
            3e-2,
            0,
            tick,
            batch_size=1,
            loss_of=lambda model, batch: model(**batch).loss * (1 if next(steps) < 14 else -1),
        )[0]

    assert run(model, tick) == run(unwatched, lambda loss: None)
    looked_at = {step: evaluate(passed[step - 1], Bench.validation, 0)["loss"] for step in range(3, 31, 3)}
    assert stopping.losses == pytest.approx(list(looked_at.values()))
    step = min(looked_at, key=looked_at.__getitem__)
    assert 3 < step < 30, "the case has its best step at an end"
    result, expected = stopping.result({}), evaluate(passed[step - 1], Bench.test, 0)
    assert result == {"step": step, "loss": expected["loss"], "by_distance": expected["by_distance"]}
    assert expected["loss"] != evaluate(passed[-1], Bench.test, 0)["loss"]


def test_a_run_whose_end_is_its_best_step_is_judged_once(monkeypatch):
    monkeypatch.setattr(study, "EVERY", 2)
    model = adapted(make_base("llama"), "lora-p", 4, 0)
    stopping = study.EarlyStopping(model, Bench())  # type: ignore[arg-type]
    train(model, Bench.train, 0, 4, 1e-2, 0, stopping)
    assert stopping.losses[1] < stopping.losses[0]
    at_end = evaluate(model, Bench.test, 0)
    monkeypatch.setattr(study, "evaluate", None)
    assert stopping.result(at_end) == {"step": 4, "loss": at_end["loss"], "by_distance": at_end["by_distance"]}


def test_a_run_that_finds_no_finite_loss_has_no_best_adapter(monkeypatch):
    monkeypatch.setattr(study, "EVERY", 1)
    model = adapted(make_base("llama"), "lora", 4, 0)
    stopping = study.EarlyStopping(model, Bench())  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    stopping(math.nan)
    assert stopping.losses == [math.inf]
    assert stopping.result({}) is None


def test_the_table_tells_both_losses():
    base = {"num_test_rows": 9, "loss": 5.0}
    runs = []
    for method, loss, early in (("lora", 3.0, 2.0), ("lora-p", 2.5, 2.25)):
        for seed in range(3):
            stopped = {"step": 25 * seed, "loss": early} if seed else None
            runs.append({"method": method, "rank": 4, "lr": 0.1, "seed": seed, "loss": loss, "early_stopped": stopped})
            runs[-1] |= {"row_losses": [loss, loss - seed], "row_tokens": [1, 1]}
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.rank_table(runs, base, "")[2:]]
    assert rows[0][-3:] == ["stopped early, at step", "its held-out loss", "against LoRA of this r"]
    assert rows[2][3:] == ["3", "3.000 ± 0.000", "", "", "", "25, 50", "2.000 ± 0.000", ""]
    against = ["-0.500 ± 0.000; rows ± 0.000", "-0.500 ± 0.000", ""]
    assert rows[3][3:] == ["3", "2.500 ± 0.000", *against, "25, 50", "2.250 ± 0.000", "+0.250 ± 0.000"]
    plain = [run | {"early_stopped": None} for run in runs]
    assert "stopped early" not in report.rank_table(plain, base, "")[2]


def test_the_page_says_what_was_run_in_the_other_dtype():
    runs = [{"rank": 16, "seed": 0}, {"rank": 4, "seed": 0, "dtype": "bfloat16"}]
    assert report.in_float32(runs, "rank") == ""
    runs += [{"rank": rank, "seed": seed, "dtype": "float32"} for rank, seed in ((64, 0), (1, 0), (1, 2))]
    assert report.in_float32(runs, "rank", {"loss": 2.5}) == " Arithmetic in float32 (base model 2.500): rank 1, 64."
    # a warm start, which all seeds share
    runs.append({"rank": 16, "dtype": "float32"})
    assert report.in_float32(runs, "seed") == " Arithmetic in float32: seed 0, 2."


def test_a_rank_comes_from_the_device_that_has_most_of_its_runs():
    def runs(rank, seeds, **facts):
        return [{"task": "devil", "method": "lora", "rank": rank, "seed": seed} | facts for seed in range(seeds)]

    tokens = {"row_tokens": [3, 4]}
    main = [run | tokens for run in runs(1, 1) + runs(4, 2) + runs(16, 3)]
    other = runs(1, 3, there=True) + runs(4, 2, there=True) + runs(16, 1, there=True)
    other += [{"task": "devil", "method": "lora", "rank": 64, "lr": 0.1}, *runs(1, 9, task="cities")]
    where = {"device": "a GPU", "torch": "9"}
    full = {"cpu": {}, "gpu": {"environment": where, "runs": dict(enumerate(other))}}
    full["cpu"] = {"environment": {}, "runs": dict(enumerate(main))}
    found, said = report.with_other_devices(main, full, "devil")
    assert said == " On a GPU, torch 9: rank 1."
    assert [(run["rank"], run.get("there", False)) for run in found] == [(4, False)] * 2 + [(16, False)] * 3 + [
        (1, True)
    ] * 3
    assert all(run["row_tokens"] == [3, 4] for run in found)


def test_the_base_model_is_judged_once_in_each_dtype(tmp_path):
    class Judged(Bench):
        base = make_base("llama")
        task = SimpleNamespace(name="rows")

    for environment in ({}, {"dtype": "float32"}, {}):
        study.base_result(Judged(), Store(tmp_path / "r.json", environment))  # type: ignore[arg-type]
    runs = json.loads((tmp_path / "r.json").read_text())["runs"]
    dtypes = {key: run["dtype"] for key, run in runs.items()}
    assert dtypes == {"part=base task=rows": "bfloat16", "part=base task=rows dtype=float32": "float32"}


def test_the_gain_by_distance_of_both():
    base = {"by_distance": {"1": [100.0, 50], "2": [9.0, 3]}}
    run = {"method": "lora", "rank": 4, "by_distance": {"1": [50.0, 50], "2": [9.0, 3]}}
    other = run | {"early_stopped": {"step": 25, "loss": 0.0, "by_distance": {"1": [25.0, 50], "2": [9.0, 3]}}}
    short = run | {"steps": 64, "by_distance": {"1": [75.0, 50], "2": [9.0, 3]}}
    gains = {"": "1.00", ", stopped early": "1.50", ", 64 steps": "0.50"}
    lines = report.distance_table([run, other], base, [short])
    assert lines[2:] == [f"| all-token LoRA{note} | 4 | {gain} |" for note, gain in gains.items()]
    assert report.distance_table([run, other], base, []) == lines[:-1]
