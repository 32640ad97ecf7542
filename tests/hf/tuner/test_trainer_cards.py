"""The card beside an adapter after a trainer wrote its own: both are in it."""

from pathlib import Path

import pytest
from datasets import Dataset
from huggingface_hub import ModelCard
from transformers import Trainer, TrainingArguments

from tests.hf.cases import prompt
from tests.hf.training.test_trainers import tokenizer
from tests.hf.zoo import make_base, make_preft

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
SETTINGS = {"max_steps": 1, "per_device_train_batch_size": 2, "report_to": [], "disable_tqdm": True, "use_cpu": True}


def card_of(folder: Path) -> tuple[str, set[str], ModelCard]:
    card = ModelCard.load(folder / "README.md")
    return card.text, set(card.data.tags or []), card


def adapted(name: str | None):
    model = make_preft(make_base())
    model.peft_config["default"].base_model_name_or_path = name
    return model


def check_ours(folder: Path) -> None:
    text, tags, card = card_of(folder)
    assert text.count("import preft_hf") == 1
    assert {"preft", "prefill-only", "peft", "base_model:adapter:org/base"} <= tags
    assert card.data.library_name == "peft"
    assert card.data.base_model == "org/base"


def test_the_card_of_trainer(tmp_path):
    rows = [{"input_ids": row, "labels": row.where(row > 20, -100)} for row in prompt(4)]
    arguments = TrainingArguments(output_dir=str(tmp_path), save_strategy="no", **SETTINGS)  # type: ignore[arg-type]
    trainer = Trainer(adapted("org/base"), arguments, train_dataset=rows)  # type: ignore[arg-type]
    trainer.train()
    trainer.save_model()
    check_ours(tmp_path)
    assert "transformers" in card_of(tmp_path)[1]
    for _ in range(2):
        trainer.create_model_card(tags=["mine"], dataset="org/data")
        check_ours(tmp_path)
        text, tags, _ = card_of(tmp_path)
        assert {"mine", "generated_from_trainer"} <= tags
        assert "Training procedure" in text
    trainer.save_model()
    check_ours(tmp_path)
    assert {"mine", "generated_from_trainer"} <= card_of(tmp_path)[1]


def test_the_card_of_trl(tmp_path):
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_list([{"prompt": "w05 w06 w07", "completion": " w08 w09"}] * 4)
    arguments = SFTConfig(output_dir=str(tmp_path), save_strategy="steps", save_steps=1, bf16=False, **SETTINGS)  # type: ignore
    trainer = SFTTrainer(adapted("org/base"), args=arguments, train_dataset=data, processing_class=tokenizer())
    trainer.train()
    check_ours(tmp_path / "checkpoint-1")
    assert {"trl", "sft", "transformers"} <= card_of(tmp_path / "checkpoint-1")[1]
    trainer.save_model()
    trainer.create_model_card(model_name="mine")
    check_ours(tmp_path)
    text, tags, _ = card_of(tmp_path)
    assert {"trl", "sft", "generated_from_trainer"} <= tags
    assert "Model Card for mine" in text


def test_a_base_model_on_this_machine_is_in_no_card(tmp_path):
    make_base().save_pretrained(tmp_path / "base")
    model = make_preft(make_base().from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    model.create_or_update_model_card(str(tmp_path / "adapter"))
    assert str(tmp_path) not in (tmp_path / "adapter" / "README.md").read_text()
    assert "import preft_hf" in (tmp_path / "adapter" / "README.md").read_text()
