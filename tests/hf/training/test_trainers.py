"""Trainer and TRL's SFTTrainer run real steps."""

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast, Trainer, TrainingArguments

from preft_hf import PrefillMaskCollator, PreftConfig
from tests.hf.zoo import VOCABULARY, make_base, make_preft

pytestmark = [
    # accelerate and transformers warn of what a CPU lacks and of their own old names
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + ' w02 ' }}"
    "{% endgeneration %}{% else %}{{ m['content'] + ' w03 ' }}{% endif %}{% endfor %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i:02}": i for i in range(VOCABULARY)}
    plain = Tokenizer(WordLevel(words, unk_token="w00"))
    plain.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="w00", eos_token="w02", unk_token="w00")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def samples(num: int = 16) -> list[dict[str, list[int]]]:
    """The response repeats the prompt's last token: something to learn."""
    source = torch.Generator().manual_seed(0)
    made = []
    for _ in range(num):
        ids = torch.randint(4, VOCABULARY, (5,), generator=source).tolist()
        made.append({"input_ids": [*ids, ids[-1], ids[-1], 2], "labels": [-100] * 5 + [ids[-1], ids[-1], 2]})
    return made


def arguments(path, **others: object) -> TrainingArguments:
    defaults: dict[str, object] = {
        "output_dir": str(path),
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
    }
    return TrainingArguments(**(defaults | others))  # type: ignore[arg-type]


def train(model, args: TrainingArguments, collator=None, **others: Any) -> Trainer:
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=samples(),
        data_collator=collator or DataCollatorForSeq2Seq(tokenizer()),
        **others,
    )
    trainer.train()
    return trainer


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("method", ["lora", "direft", "loreft"])
def test_trainer_moves_the_adapter_and_nothing_else(method, tmp_path):
    model = make_preft(make_base(), method, init_weights=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = train(model, arguments(tmp_path, max_steps=25), eval_dataset=samples(4))
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.5
    assert trainer.evaluate()["eval_loss"] < losses(trainer)[0]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != ("preft_" in name), name


def test_resume_gives_the_losses_of_an_uninterrupted_run(tmp_path):
    whole = train(make_preft(make_base(), init_weights=True), arguments(tmp_path / "whole"))
    first = make_preft(make_base(), init_weights=True)
    train(first, arguments(tmp_path / "cut", save_strategy="steps", save_steps=4))
    again = Trainer(
        model=make_preft(make_base(), init_weights=True, seed=9),
        args=arguments(tmp_path / "cut", save_strategy="steps", save_steps=4),
        train_dataset=samples(),
        data_collator=DataCollatorForSeq2Seq(tokenizer()),
    )
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-4"))
    assert losses(again) == pytest.approx(losses(whole), abs=1e-6)


def summed_loss(outputs, labels, num_items_in_batch=None):
    return torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize("way", ["label smoothing", "compute_loss_func"])
def test_labels_that_are_withheld_need_the_mask(way, tmp_path):
    settings = arguments(tmp_path, label_smoothing_factor=0.1 if way == "label smoothing" else 0.0)
    others = {} if way == "label smoothing" else {"compute_loss_func": summed_loss}
    with pytest.raises(ValueError, match=rf"neither labels nor prefill_mask.*{way}.*PrefillMaskCollator"):
        train(make_preft(make_base(), init_weights=True), settings, **others)
    collator = PrefillMaskCollator(DataCollatorForSeq2Seq(tokenizer()))
    trainer = train(make_preft(make_base(), init_weights=True), settings, collator, **others)
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_checkpointing_bf16_and_best_model(tmp_path):
    settings = arguments(
        tmp_path,
        gradient_checkpointing=True,
        bf16=True,
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=4,
        save_strategy="steps",
        save_steps=4,
        load_best_model_at_end=True,
    )
    trainer = train(make_preft(make_base(), init_weights=True), settings, eval_dataset=samples(4))
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert trainer.state.best_model_checkpoint is not None


def sft(tmp_path, rows: list[dict[str, object]], model=None, **others: object):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    settings: dict[str, object] = {
        "output_dir": str(tmp_path),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "max_length": 64,
    }
    trainer = SFTTrainer(
        model=model if model is not None else make_base(),
        args=SFTConfig(**(settings | others)),  # type: ignore[arg-type]
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        peft_config=None if model is not None else PreftConfig(r=4, task_type="CAUSAL_LM"),
    )
    trainer.train()
    return trainer


def words(row: list[int]) -> str:
    return " ".join(f"w{i:02}" for i in row)


PAIRS = [{"prompt": words(s["input_ids"][:5]), "completion": " " + words(s["input_ids"][5:7])} for s in samples()]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": words(s["input_ids"][:5])},
            {"role": "assistant", "content": words(s["input_ids"][5:7])},
        ]
    }
    for s in samples()
]


@pytest.mark.parametrize(
    ("rows", "settings"),
    [
        (PAIRS, {}),
        (PAIRS, {"packing": True, "packing_strategy": "bfd", "max_length": 24}),
        (PAIRS, {"gradient_checkpointing": True}),
        (CHATS, {"assistant_only_loss": True}),
    ],
    ids=["pairs", "packing", "checkpointing", "assistant-only"],
)
# TRL warns of packing without flash attention, which is what the test is about
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_sft_trainer(tmp_path, rows, settings):
    trainer = sft(tmp_path, rows, **settings)
    assert losses(trainer)[-1] < losses(trainer)[0]
    moved = [p for name, p in trainer.model.named_parameters() if "preft_B" in name]
    assert all(p.abs().max() > 0 for p in moved)


def test_sft_trainer_with_a_wrapped_model(tmp_path):
    trainer = sft(tmp_path, PAIRS, model=make_preft(make_base(), "direft", init_weights=True))
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_sft_on_plain_text_is_refused(tmp_path):
    rows: list[dict[str, object]] = [{"text": words(s["input_ids"])} for s in samples()]
    with pytest.raises(ValueError, match="no prompt token"):
        sft(tmp_path, rows)
