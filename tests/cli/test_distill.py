"""Distillation of an all-token LoRA: the loss is what its name says, and the student ends nearer than it began."""

import json
import signal

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from preft_cli.app import app
from preft_core.format.adapter import load_adapter
from preft_core.format.config import AdapterError
from preft_core.format.plain_lora import from_lora
from preft_hf.forward.caches import cache_argument, cache_of
from preft_hf.training import distill_run as distillation
from preft_hf.training.data import collate, encode_prompts
from preft_hf.training.distill import (
    agreement,
    distillation_loss,
    divergence,
    load_teacher,
    response_logits,
    responses,
    widened,
)
from preft_hf.training.turns import DataError, Turn, read_turns
from tests.hf.training.test_trainers import tokenizer
from tests.hf.zoo import VOCABULARY, make_base, make_preft

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore:.*pin_memory.*")]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny base model, a LoRA for it that says other things, and prompts."""
    path = tmp_path_factory.mktemp("distill")
    sharp_base().save_pretrained(path / "base")
    tokenizer().save_pretrained(path / "base")
    save_lora(path / "lora", path / "base")
    rows = [{"prompt": f"w{i:02} w{j:02} " * 4} for i in range(4, 24) for j in range(24, 44)]
    (path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return path


def sharp_base():
    """A base model whose predictions are far from uniform, so that a divergence has something to show."""
    base = make_base()
    with torch.no_grad():
        base.get_output_embeddings().weight.mul_(8.0)
    return base


def save_lora(path, base_path=None, **options: object) -> None:
    torch.manual_seed(3)
    settings = {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    model = get_peft_model(make_base(), LoraConfig(**(settings | options), task_type="CAUSAL_LM"))  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    model.peft_config["default"].base_model_name_or_path = base_path and str(base_path)
    model.save_pretrained(path)


def distill(place, output, *others: object) -> list[str]:
    fixed = ["distill", place / "lora", "--data", place / "rows.jsonl", "--output", place / output, "--lr", 1e-2]
    return [str(one) for one in (*fixed, "--max-new-tokens", 6, "--scored-rows", 4, *others)]


def samples(num: int = 5) -> list[dict[str, list[int]]]:
    source = torch.Generator().manual_seed(1)
    made = []
    for i in range(num):
        ids = torch.randint(4, VOCABULARY, (4 + i,), generator=source).tolist()
        made.append({"input_ids": ids, "labels": [-100] * (2 + i // 2) + ids[2 + i // 2 :]})
    return made


def two_phase(model, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Logits of each response token: the prompt with the adapter, then the base model on its cache, token by token."""
    ids = torch.tensor([prompt])
    output = model(input_ids=ids, prefill_mask=torch.ones_like(ids, dtype=torch.bool), use_cache=True)
    rows, cache = [output.logits[0, -1]], cache_of(output)
    with model.disable_adapter():
        for token in response[:-1]:
            output = model(input_ids=torch.tensor([[token]]), **cache_argument(cache), use_cache=True)
            cache = cache_of(output)
            rows.append(output.logits[0, -1])
    return torch.stack(rows)


@torch.no_grad()
def test_the_figures_are_those_of_the_two_phase_loop(place):
    base = make_base()
    teacher = load_teacher(base, place / "lora")
    student = make_preft(base, "lora")
    kl, same, count = 0.0, 0, 0
    for sample in samples():
        prompt = [t for t, label in zip(sample["input_ids"], sample["labels"], strict=True) if label == -100]
        response = sample["input_ids"][len(prompt) :]
        own = two_phase(student, prompt, response)
        whole = PeftModel.from_pretrained(make_base(), place / "lora").eval()
        target = whole(input_ids=torch.tensor([sample["input_ids"]])).logits[0, len(prompt) - 1 : -1]
        p, q = target.double().softmax(-1), own.double().softmax(-1)
        kl += float((p * (p.log() - q.log())).sum())
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        count += len(response)
    found = agreement(teacher, student, samples(), pad_token_id=0)
    assert found.kl == pytest.approx(kl / count, abs=1e-5)
    assert found.top1 == same / count
    assert found.kl > 0.01
    itself = response_logits(teacher, collate(samples(), 0), is_student=False)
    assert float(divergence(itself, itself)) == pytest.approx(0.0, abs=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"target_modules": "all-linear"}])
def test_a_student_from_the_teacher_starts_as_its_conversion(options, tmp_path):
    save_lora(tmp_path / "lora", **options)
    from_lora(tmp_path / "lora", tmp_path / "converted")
    plain = PeftModel.from_pretrained(make_base(), tmp_path / "converted").eval()
    student = widened(make_base(), tmp_path / "lora", rank=8).eval()
    assert student.peft_config["default"].r == 8
    batch = collate(samples(), 0)
    one, two = (response_logits(model, batch, is_student=True) for model in (plain, student))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-4)


@torch.no_grad()
def test_the_teacher_leaves_the_base_as_it_is(place):
    base = make_base()
    ids = torch.tensor([samples()[0]["input_ids"]])
    before = base(input_ids=ids).logits
    teacher = load_teacher(base, place / "lora")
    assert torch.equal(base(input_ids=ids).logits, before)
    assert not torch.equal(teacher(input_ids=ids).logits, before)
    shared = {id(parameter) for parameter in base.parameters()}
    own = [name for name, parameter in teacher.named_parameters() if id(parameter) not in shared]
    assert own
    assert all("lora_" in name for name in own)
    assert not any(parameter.requires_grad for parameter in teacher.parameters() if id(parameter) not in shared)
    make_preft(base, "lora")
    assert not torch.equal(teacher(input_ids=ids).logits, before)


def test_responses_of_a_ragged_batch_are_those_of_single_rows(place):
    teacher = load_teacher(make_base(), place / "lora")
    prompts = [sample["input_ids"] for sample in samples()]
    together = responses(teacher, tokenizer(), prompts, 8, temperature=0.0)
    for prompt, found in zip(prompts, together, strict=True):
        alone = teacher.generate(input_ids=torch.tensor([prompt]), max_new_tokens=8, do_sample=False)
        assert found == alone[0, len(prompt) :].tolist()
    teacher.generation_config.eos_token_id = [2, together[0][0]]
    assert responses(teacher, tokenizer(), prompts, 8, temperature=0.0)[0] == together[0][:1]


@pytest.mark.parametrize("asked_for", [{"repetition_penalty": 1.3}, {"suppress_tokens": list(range(4, 40))}])
def test_responses_are_what_the_model_predicts_whatever_its_generation_config_asks_for(place, asked_for):
    plain, asking = load_teacher(sharp_base(), place / "lora"), load_teacher(sharp_base(), place / "lora")
    asking.generation_config.update(**asked_for)
    for temperature in (0.0, 1.0):
        found = []
        for teacher in (plain, asking):
            torch.manual_seed(0)
            found.append(responses(teacher, tokenizer(), [[5, 6, 7], [8, 9]], 8, temperature))
        assert found[0] == found[1]
        assert asking.generation_config.to_diff_dict().items() >= asked_for.items()


@pytest.mark.parametrize(
    ("others", "share"),
    [(("--lr", 3e-3), 0.95), (("--start", "zero", "--rank", 4, "--method", "direft"), 0.7)],
    ids=["wide", "zero"],
)
def test_the_command(place, capsys, others, share):
    output = f"student-{len(others)}"
    with pytest.raises(SystemExit) as stop:
        app(distill(place, output, "--epochs", 3, "--temperature", 0.5, *others))
    assert stop.value.code == 0, capsys.readouterr().err
    metrics = json.loads((place / output / "metrics.json").read_text())
    assert metrics["after"]["kl"] < share * metrics["before"]["kl"]
    assert metrics["after"]["top1"] > metrics["before"]["top1"]
    assert metrics["teacher_same_answers"] == 1.0
    assert (metrics["num_train_rows"], metrics["num_eval_rows"]) == (360, 40)
    adapter = load_adapter(place / output)
    assert (adapter.config.method, adapter.config.r) == (("direft", 4) if "direft" in others else ("lora", 8))
    # What was saved is what was judged: the best, not the last.
    history = json.loads((place / output / "history.json").read_text())["eval_losses"]
    assert metrics["after"]["kl"] == pytest.approx(min(loss for _, loss in history), rel=0.05)


def test_a_rate_that_does_harm_stops_early_and_keeps_the_start(place, capsys):
    with pytest.raises(SystemExit):
        app(distill(place, "early", "--steps", 100, "--patience", 2, "--eval-every", 1, "--lr", 5))
    metrics = json.loads((place / "early" / "metrics.json").read_text())
    assert metrics["num_steps"] < 100
    assert metrics["after"] == metrics["before"]
    assert "the initial student is kept" in capsys.readouterr().out
    saved, start = load_adapter(place / "early"), widened(sharp_base(), place / "lora", 8)
    for name, layer in start.named_modules():
        if name.endswith("down_proj"):
            assert torch.equal(saved.tensors[f"{name}.preft_B"], layer.preft_B["default"])


def test_it_can_be_stopped_and_resumed(place, monkeypatch, capsys):
    settings = ("--steps", 24, "--eval-every", 6)
    with pytest.raises(SystemExit):
        app(distill(place, "whole", *settings))
    calls = []

    def stopped(teacher):
        loss = distillation_loss(teacher)

        def stopping(student, batch):
            calls.append(student.training)
            if calls.count(True) == 9 and student.training:
                signal.raise_signal(signal.SIGINT)
            return loss(student, batch)

        return stopping

    with monkeypatch.context() as patch:
        patch.setattr(distillation, "distillation_loss", stopped)
        with pytest.raises(SystemExit) as stop:
            app(distill(place, "cut", *settings))
    assert stop.value.code == 130
    assert "Stopped at step 9 of 24" in capsys.readouterr().out
    assert not (place / "cut" / "metrics.json").exists()
    with pytest.raises(ValueError, match=r"learning_rate was 0\.01 and is 0\.02"):
        app([*distill(place, "cut", *settings), "--resume", "--lr", "0.02"])
    with pytest.raises(ValueError, match="checkpoints of another run"):
        app(distill(place, "cut", *settings))
    with pytest.raises(SystemExit) as stop:
        app([*distill(place, "cut", *settings), "--resume"])
    assert stop.value.code == 0
    whole, cut = (json.loads((place / name / "metrics.json").read_text()) for name in ("whole", "cut"))
    assert cut["after"]["kl"] == pytest.approx(whole["after"]["kl"], abs=1e-6)
    assert cut["num_steps"] == 24


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (("--rank", 1), "rank is 1 and the teacher's is 2"),
        (("--method", "direft"), "--method is direft.*--start zero"),
        (("--eval-split", 0), "--eval-split is 0"),
        (("--max-length", 2), "no row of .* is left"),
    ],
)
def test_options_that_do_not_work(place, others, message):
    with pytest.raises(ValueError, match=message):
        app(distill(place, "wrong", *others))
    assert not (place / "wrong").exists()


def test_teachers_that_do_not_work(place, tmp_path):
    make_preft(make_base()).save_pretrained(tmp_path / "preft")
    with pytest.raises(ValueError, match="already a prefill-only adapter"):
        load_teacher(make_base(), tmp_path / "preft")
    with pytest.raises(ValueError, match="does not fit the base model"):
        load_teacher(make_base(hidden_size=64), place / "lora")
    save_lora(tmp_path / "dora", use_dora=True)
    load_teacher(make_base(), tmp_path / "dora")
    with pytest.raises(AdapterError, match="use_dora is True"):
        widened(make_base(), tmp_path / "dora", 8)
    with pytest.raises(ValueError, match="is not an adapter"):
        app(["distill", str(tmp_path), "--data", str(place / "rows.jsonl"), "--output", str(tmp_path / "out")])


def test_given_responses_are_kept_and_drawn_again_on_demand(place, capsys):
    rows = [{"prompt": f"w{i:02} ", "response": "w05 w06"} if i % 2 else {"prompt": f"w{i:02} "} for i in range(4, 44)]
    file = place / "mixed.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    options = distill(place, "mixed", "--data", file, "--steps", 1, "--scored-rows", 50, "--eval-split", 0.5)
    for others, expected in (((), 0.5), (("--sample", "--output", str(place / "drawn")), 1.0)):
        with pytest.raises(SystemExit):
            app([*options, *others])
        folder = place / ("drawn" if others else "mixed")
        metrics = json.loads((folder / "metrics.json").read_text())
        assert metrics["num_eval_rows"] == 20
        assert metrics["teacher_same_answers"] == pytest.approx(expected, abs=0.25)
        assert (metrics["teacher_same_answers"] == 1.0) == bool(others)


def test_prompts_alone(tmp_path):
    user, assistant = {"role": "user", "content": "w05"}, {"role": "assistant", "content": "w06"}
    rows = [{"prompt": "w05 "}, {"prompt": "w05 ", "response": "w06"}, {"messages": [user]}]
    rows.append({"messages": [user, assistant, user]})
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    turns = read_turns(file, prompts_alone=True)
    assert turns == [
        Turn("w05 ", "", 1),
        Turn("w05 ", "w06", 2),
        Turn([user], "", 3),
        Turn([user], assistant, 4),
        Turn([user, assistant, user], "", 4),
    ]
    assert encode_prompts([turns[0], turns[2]], tokenizer(), 64) == ([[5], [5, 3]], 0)
    assert encode_prompts([turns[0], turns[2]], tokenizer(), 2) == ([[5], None], 1)
    with pytest.raises(DataError, match=r"line 1: has no text in response"):
        read_turns(file)
    file.write_text(json.dumps({"prompt": "w05", "response": 3}))
    with pytest.raises(DataError, match=r"line 1: has no text in response"):
        read_turns(file, prompts_alone=True)
