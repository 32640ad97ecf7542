"""The quality study: its evaluation against transformers' loss, its resumption, and that its page is its results."""

import copy
import math

import pytest
import torch
from benchmarks import training
from benchmarks.quality import report, study
from benchmarks.quality.methods import LEARNING_RATES, METHODS, RANKS, adapted
from benchmarks.quality.sft import BUCKETS, evaluate, train
from benchmarks.quality.store import Store

from .hf.zoo import make_base

ROWS = [{"input_ids": [5, 6, 7, 8, 9][:n], "labels": [-100, -100, 7, 8, 9][:n]} for n in (3, 4, 5)] * 5


def test_the_evaluation_is_the_mean_over_response_tokens():
    base = make_base("llama")
    found = evaluate(base, ROWS, pad=0)
    sums = []
    for row in ROWS:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.no_grad():
            sums.append((base(input_ids=ids, labels=labels).loss.item(), len(row["input_ids"]) - 2))
    assert found["loss"] == pytest.approx(sum(a * n for a, n in sums) / sum(n for _, n in sums), abs=1e-5)
    assert found["row_losses"] == pytest.approx([a for a, _ in sums], abs=1e-5)
    assert sum(total for total, _ in found["by_distance"].values()) == pytest.approx(sum(a * n for a, n in sums), 1e-5)
    counts = {first: count for first, (_, count) in found["by_distance"].items()}
    assert counts == dict.fromkeys(BUCKETS, 0) | {1: 15, 2: 15}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_and_the_seed_decides(method):
    base = make_base("llama")
    ends = []
    for seed in (1, 1, 2):
        model = adapted(copy.deepcopy(base), method, 4, seed)
        losses, _ = train(model, ROWS, 0, 12, 1e-2, seed)
        assert losses[-1] < losses[0]
        ends.append(losses[-1])
    assert ends[0] == ends[1] != ends[2]


def test_a_run_that_is_there_is_not_done_again(tmp_path, monkeypatch):
    store = Store(tmp_path / "r.json", {})
    key = store.key(part="sft", rank=1)
    assert store.get(key) is None
    store.put(key, {"loss": 1.0})
    assert Store(tmp_path / "r.json", {}).get(key) == {"loss": 1.0}
    assert not list(tmp_path.glob("*.partial"))


def test_the_search_keeps_the_best_rates(tmp_path, monkeypatch):
    """Halving: four rates briefly, the best two for longer, the best of those; a loss that is not finite loses."""
    asked = []
    # at first 1e-3 is best and 3e-3 second; longer runs turn that round
    losses = {24: {3e-4: 5.0, 1e-3: 1.0, 3e-3: 2.0, 1e-2: math.nan}, 64: {1e-3: 0.9, 3e-3: 0.5}}

    def trained(model, samples, pad, num_steps, rate, seed):
        asked.append((num_steps, rate))
        return [1.0], 0.0

    monkeypatch.setattr(study, "train", trained)
    monkeypatch.setattr(study, "evaluate", lambda *args: {"loss": losses[asked[-1][0]][asked[-1][1]]})

    class Bench:
        task = type("Task", (), {"name": "t"})
        train = validation = ()
        pad = 0

        def fresh(self, *args, **kwargs):
            return None

    for _ in range(2):
        store = Store(tmp_path / "r.json", {})
        assert study.chosen_rate(Bench(), store, "lora", 1, lambda text: None) == 3e-3
    assert asked == [*((24, rate) for rate in LEARNING_RATES), (64, 1e-3), (64, 3e-3)]


def test_the_plan_does_a_whole_seed_before_the_next():
    runs = list(study.plan(["a", "b"], METHODS, RANKS, 2))
    assert len(set(runs)) == len(runs) == 2 * 2 * len(METHODS) * len(RANKS)
    assert [run[3] for run in runs] == sorted(run[3] for run in runs)


def test_the_page_is_what_the_results_say(tmp_path, monkeypatch):
    page, committed = tmp_path / "quality.md", report.PAGE.read_text()
    page.write_text(committed)
    monkeypatch.setattr(report, "PAGE", page)
    monkeypatch.setattr(report, "IMAGES", tmp_path / "images")
    report.main()
    assert page.read_text() == committed
    for image in (tmp_path / "images").iterdir():
        assert (report.ROOT / "docs" / "images" / image.name).exists()
    with pytest.raises(ValueError, match="has no mark"):
        report.replaced("nothing", "cpu cities rank", [])


def test_training_is_timed_only_when_it_is_the_same_model():
    base = make_base("llama")
    models = {method: adapted(copy.deepcopy(base), method, 4, 0).train() for method in METHODS}
    found = training.measure(base, models, (2, 4, 4), 5)
    assert found["lora"]["step_ratio"] == found["lora"]["activation_ratio"] == 1.0
    assert all(found[method]["activation_bytes"] > 0 for method in METHODS)
    with pytest.raises(RuntimeError, match="not timed"):
        training.measure(make_base("qwen2"), models, (2, 4, 4), 5)
