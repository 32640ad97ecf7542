"""The study's shorter runs: their rate is the search's, and each is compared with LoRA's of its task and seed."""

import json
from types import SimpleNamespace
from unittest.mock import ANY

import pytest

from benchmarks.quality import report_parts, short
from benchmarks.quality.methods import LEARNING_RATES, METHODS
from benchmarks.quality.prompts import CHAT, FORMS, PLAIN, TASK_TEXT, TEXT, in_form
from benchmarks.quality.sft import evaluate
from benchmarks.quality.store import RESULTS, Store
from benchmarks.quality.study import Bench
from preft_hf.demo.cities import Row
from tests.hf.zoo import make_base


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
    first = [("chatterbot", method, 0, PLAIN) for method in METHODS]
    assert planned[:4] == [*first, ("chatterbot", METHODS[0], 1, PLAIN)]
    assert [task for task, *_ in planned] == ["chatterbot"] * 6 + ["devil"] * 6 + ["chatterbot"] * 12
    assert [form for *_, form in planned] == [PLAIN] * 12 + 2 * ([TEXT] * 3 + [CHAT] * 3)


def test_a_short_run_learns_and_is_done_once(tmp_path, monkeypatch):
    monkeypatch.setattr(short, "NUM_STEPS", 12)
    rows = [Row(str(i), str(i)) for i in range(16)]
    samples = lambda rows, tokenizer: [  # noqa: E731
        {"input_ids": [3 + i % 4, 9, 20 + i % 4, 1], "labels": [-100, -100, 20 + i % 4, 1]} for i in range(len(rows))
    ]
    task = SimpleNamespace(name="chatterbot", samples=samples, train=rows, validation=rows[:4], test=rows[:8])
    bench = Bench(make_base("llama"), SimpleNamespace(pad_token_id=0), task)  # type: ignore[arg-type]
    store, told = Store(tmp_path / "r.json", {}), []
    found = short.run(bench, store, "lora", 0, PLAIN, told.append)
    assert found["loss"] < evaluate(bench.base, bench.test, 0)["loss"]
    assert (found["steps"], found["seed"], found["method"]) == (12, 0, "lora")
    assert short.run(bench, store, "lora", 0, PLAIN, told.append) == found
    assert told == ["part=short task=chatterbot method=lora rank=16 lr=0.003 steps=12 seed=0"]
    formed = []
    monkeypatch.setattr(short, "in_form", lambda samples, form, _: formed.append((len(samples), form)) or samples)
    assert short.run(bench, store, "lora", 0, CHAT, told.append) == found | {"form": CHAT, "seconds": ANY}
    assert told[1:] == [f"{told[0]} form={CHAT}"]
    assert formed == [(16, CHAT), (8, CHAT)]


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


def test_a_form_is_compared_with_lora_in_that_form_and_the_others_leave_it_out():
    runs = {}
    for form, losses in ((PLAIN, (1.0, 1.25)), (TEXT, (2.0, 1.5)), (CHAT, (4.0, 4.125))):
        for method, loss in zip(("lora", "lora-p"), losses, strict=True):
            run = {"task": short.FORMED, "method": method, "rank": 16, "seed": 0, "loss": loss}
            run |= {"row_losses": [loss, loss], "row_tokens": [1, 1]} | ({} if form == PLAIN else {"form": form})
            runs[f"{form} {method}"] = run
    runs["another task"] = runs[f"{PLAIN} lora"] | {"task": "devil"}
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report_parts.prompts_table(runs)[2:]]
    assert [row[0] for row in rows] == [form for form in FORMS for _ in range(2)]
    assert [row[6] for row in rows] == ["", "+0.250 ± 0.000", "", "-0.500 ± 0.000", "", "+0.125 ± 0.000"]
    assert [row for row in report_parts.short_table(runs)[2:] if row.startswith("| chatterbot")] == [
        "| " + " | ".join(["chatterbot", *row[1:]]) + " |" for row in rows[:2]
    ]


class Words:
    """A tokenizer of words, with a chat template."""

    pad_token_id = 0

    def __init__(self) -> None:
        self.words = ["<pad>"]

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        assert not add_special_tokens
        self.words += [word for word in text.split() if word not in self.words]
        return {"input_ids": [self.words.index(word) for word in text.split()]}

    def decode(self, ids: list[int]) -> str:
        return " ".join(self.words[i] for i in ids).replace(" A:", "\nA:")

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert (tokenize, add_generation_prompt) == (False, True)
        return " ".join(f"<{message['role']}> {message['content']} <assistant>" for message in messages)


def test_a_form_changes_the_prompt_and_leaves_the_response():
    tokenizer = Words()
    prompts = ["Q: what is it\nA:", "Q: who\nA:"]
    samples = []
    for prompt in prompts:
        ids, response = tokenizer(prompt, add_special_tokens=False)["input_ids"], [91, 92, 93]
        samples.append({"input_ids": ids + response, "labels": [-100] * len(ids) + response})
    expected = {
        PLAIN: prompts,
        TEXT: [prompt + TASK_TEXT for prompt in prompts],
        CHAT: ["<user> what is it <assistant>", "<user> who <assistant>"],
    }
    assert set(expected) == set(FORMS)
    for form, texts in expected.items():
        made = in_form(samples, form, tokenizer)
        assert [sample["labels"][-3:] for sample in made] == [[91, 92, 93]] * 2
        assert [tokenizer.decode(sample["input_ids"][:-3]) for sample in made] == texts
        assert all(sample["labels"][:-3] == [-100] * (len(sample["input_ids"]) - 3) for sample in made)
