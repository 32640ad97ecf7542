"""The quality study: its evaluation against transformers' loss, its search, and that its page is its results."""

import copy
import json
import math

import pytest
import torch

from benchmarks import training
from benchmarks.quality import distill, helps, report, report_parts, rl, study, turns
from benchmarks.quality.methods import LEARNING_RATES, METHODS, RANKS, adapted
from benchmarks.quality.sft import BUCKETS, evaluate, train
from benchmarks.quality.store import Store
from preft_hf.demo.cities import Row
from tests.hf.training.test_trainers import tokenizer
from tests.hf.zoo import make_base

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


def test_a_conversation_is_served_in_two_ways():
    """Cached: one forward over the whole equals its turns; fresh: earlier answers are prompt."""
    words = ["w04", "w05", "w06 w07", "w08", "w09 w10 w11"]
    roles = ["user", "user", "assistant", "user", "assistant"]
    messages = [{"role": role, "content": text} for role, text in zip(roles, words, strict=True)]
    words_of = tokenizer()
    turned, one = turns.expanded(messages, words_of), turns.whole(messages, words_of)
    assert [len(row["input_ids"]) for row in turned] == [7, len(one["input_ids"])]
    assert [i for i, label in enumerate(one["labels"]) if label != -100] == [4, 5, 6, 9, 10, 11, 12]
    cached = turns.split(one)
    assert [row["prefill_mask"] for row in cached] == [[1] * 4 + [0] * 3, [1] * 4 + [0] * 3 + [1, 1] + [0] * 4]
    assert cached[0]["input_ids"] == turned[0]["input_ids"]
    for method in ("lora-p", "lora"):
        model = adapted(make_base(), method, 4, 0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "_B" in name:
                    parameter.normal_(std=0.3)
        fresh, of_cache, together = (evaluate(model, rows, 0)["loss"] for rows in ([turned[1]], [cached[1]], [one]))
        first = evaluate(model, [cached[0]], 0)["loss"]
        assert together == pytest.approx((3 * first + 4 * of_cache) / 7, abs=1e-5)
        assert (fresh == pytest.approx(of_cache, abs=1e-5)) == (method == "lora")


def test_conversations_count_on():
    for messages in turns.conversations(3):
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        counts = [int(answer.split("~ ")[1].split("k;")[0]) for answer in answers]
        assert [int(answer.split("; ")[1].split("k so")[0]) for answer in answers] == [
            sum(counts[: i + 1]) for i in range(turns.NUM_TURNS)
        ]


def test_students_of_a_distillation(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFT_CACHE", str(tmp_path))
    for name, value in (("NUM_STEPS", 3), ("NUM_PROMPTS", 4), ("RATE", 3e-3), ("TEACHER_RATE", 3e-2)):
        monkeypatch.setattr(distill, name, value)

    class Bench:
        task = type("Task", (), {"name": "t", "num_steps": 40})
        base, tokenizer, pad = make_base(), tokenizer(), 0
        train = validation = test = ROWS

    store = Store(tmp_path / "r.json", {})
    found = {run[:2]: distill.run(Bench(), store, *run, lambda text: None) for run in distill.plan(1)}  # type: ignore[arg-type]
    teacher = next(
        run for key, run in json.loads((tmp_path / "r.json").read_text())["runs"].items() if "teacher" in key[:12]
    )
    converted = found[distill.CONVERSION, 4]
    assert teacher["loss"] < converted["loss"]
    assert converted["train_losses"] == []
    assert found[distill.FROM_TEACHER, 16]["train_losses"][0] == pytest.approx(
        found[distill.FROM_TEACHER, 4]["train_losses"][0]
    )
    assert found[distill.FROM_ZERO, 16]["train_losses"][0] > 0
    again = [distill.run(Bench(), store, *run, lambda text: None) for run in distill.plan(1)]  # type: ignore[arg-type]
    assert again == list(found.values())


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_reinforcement_from_one_start(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFT_CACHE", str(tmp_path))
    for name, value in (("NUM_STEPS", 2), ("WARM_STEPS", 3), ("MAX_TOKENS", 4), ("RATE", 1e-1)):
        monkeypatch.setattr(rl, name, value)
    monkeypatch.setattr(rl, "score", lambda bench, model: {"field_accuracy": 0.5})
    # a reward that random completions differ in
    monkeypatch.setattr(
        rl, "right_fields", lambda completions, expected, **others: [len(set(c)) / 9 for c in completions]
    )
    rows = [Row(f"w{i:02} w05 ", "w06") for i in range(10, 20)]

    class Bench:
        task = type("Task", (), {"name": "t", "train": rows})
        base, tokenizer, pad = make_base(), tokenizer(), 0
        train = test = ROWS

    store = Store(tmp_path / "r.json", {})
    found = [rl.run(Bench(), store, method, 0, lambda text: None) for method in rl.METHODS]  # type: ignore[arg-type]
    assert all(len(run["curve"]["reward"]) == 2 for run in found)
    # the same start, prompts and seed: the first completions are drawn from one distribution
    assert found[0]["curve"]["reward"][0] == pytest.approx(found[1]["curve"]["reward"][0])
    assert found[0]["loss"] != found[1]["loss"]
    table = report_parts.rl_table(json.loads((tmp_path / "r.json").read_text())["runs"])
    assert [line.split("|")[1].strip() for line in table[2:]] == ["warm start", "all-token LoRA, r=16", "LoRA-P, r=16"]
    report_parts.rl_plot(json.loads((tmp_path / "r.json").read_text())["runs"], tmp_path / "rl.png")


def test_the_reward_is_the_share_of_right_fields():
    expected = ["TUMBES / Peru ~ 97k"] * 3
    texts = ["TUMBES / Peru ~ 97k", "TUMBES / Chile ~ 97k", "nothing"]
    assert rl.right_fields(texts, expected) == pytest.approx([1, 2 / 3, 0])


def test_the_gap_that_a_student_closes():
    common = {"kl": 1.0, "top1": 0.5, "field_accuracy": 0.5}
    runs = {}
    for seed, (of_teacher, converted, student) in enumerate([(1.0, 3.0, 1.5), (1.0, 5.0, 2.0)]):
        runs[f"part=teacher {seed}"] = common | {"seed": seed, "rank": 4, "loss": of_teacher}
        runs[f"part=distill a{seed}"] = common | {"seed": seed, "rank": 4, "loss": converted, "start": "conversion"}
        runs[f"part=distill b{seed}"] = common | {"seed": seed, "rank": 16, "loss": student, "start": "from zero"}
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report_parts.distill_table(runs)]
    assert [row[:3] for row in rows[2:]] == [
        ["teacher, all-token LoRA", "4", "2"],
        ["conversion", "4", "2"],
        ["student from zero", "16", "2"],
    ]
    assert rows[3][4] == ""
    assert rows[4][4] == "0.750 ± 0.000"
    assert all(len(row) == len(rows[0]) for row in rows)


def test_ways_of_serving_in_a_table():
    served = {turns.FRESH: [1.0, 2.0, 3.0], turns.CACHED: [4.0, 5.0, 6.0]}
    runs = {str(i): {"method": m, "form": f, "seed": 0, "served": served} for i, (m, f) in enumerate(turns.WAYS)}
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report_parts.turns_table(runs)]
    assert [row[1:3] for row in rows[2:]] == [
        [turns.WHOLE, "either"],
        [turns.WHOLE, turns.FRESH],
        [turns.WHOLE, turns.CACHED],
        [turns.EXPANDED, turns.FRESH],
        [turns.EXPANDED, turns.CACHED],
    ]
    assert rows[4][3:] == ["1", "4.000", "5.000", "6.000"]


@pytest.mark.parametrize("variant", helps.VARIANTS)
def test_variants_are_what_they_are_called(variant, tmp_path, monkeypatch):
    made = []

    def train(model, samples, *others):
        made.append((model, samples))

    monkeypatch.setattr(helps, "train", train)
    monkeypatch.setattr(helps, "score", lambda bench, model: {})
    monkeypatch.setattr(helps, "TASK_TEXT", "w20 w21")
    monkeypatch.setitem(helps.VARIANTS, "task text at the end of the prompt", {"suffix": "w20 w21"})

    class Bench:
        task = type("Task", (), {"name": "t"})
        base, tokenizer, pad = make_base(), tokenizer(), 0
        train = test = ROWS

    store = Store(tmp_path / "r.json", {})
    result = helps.run(Bench(), store, variant, 1e-3, 0, lambda text: None)  # type: ignore[arg-type]
    assert result == helps.run(Bench(), store, variant, 1e-3, 0, lambda text: None)  # type: ignore[arg-type]
    ((model, samples),) = made
    config = model.peft_config["default"]
    assert config.lora_alpha == {"alpha = r": 16, "alpha = 4 r": 64}.get(variant, 32)
    layers = {name.split("layers.")[1][0] for name, _ in model.named_parameters() if "preft_A" in name}
    assert layers == {"first half of the layers": {"0"}, "second half of the layers": {"1"}}.get(variant, {"0", "1"})
    kinds = {name.split(".")[-3] for name, _ in model.named_parameters() if "preft_A" in name}
    assert kinds == set(
        {"attention alone": helps.ATTENTION, "MLP alone": helps.MLP}.get(variant, helps.ATTENTION + helps.MLP)
    )
    longer = 2 if variant.startswith("task text") else 0
    assert len(samples[2]["input_ids"]) == 5 + longer
    assert samples[2]["labels"] == [-100] * (2 + longer) + [7, 8, 9]


def test_a_variant_is_shown_at_its_best_rate():
    runs = {}
    for variant, losses in (("default", (2.0, 1.0)), ("alpha = r", (0.5, 3.0))):
        for rate, loss in zip(helps.RATES, losses, strict=True):
            for seed in range(2):
                runs[f"{variant} {rate} {seed}"] = {"variant": variant, "lr": rate, "seed": seed, "loss": loss}
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report_parts.helps_table(runs)]
    assert rows[2:] == [
        ["default", "0.003", "2", "1.000 ± 0.000", ""],
        ["alpha = r", "0.001", "2", "0.500 ± 0.000", "-0.500 ± 0.000"],
    ]


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
