"""Settings that would train something else than what is served are found before training."""

from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, Trainer

from preft_hf import PrefillMaskCollator, PreftConfig
from preft_hf.training.trl import check_trainer
from tests.hf.training.test_trainers import arguments, samples, summed_loss, tokenizer
from tests.hf.training.test_trl import TRAINERS, reward, settings
from tests.hf.zoo import make_base, make_preft

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.mark.parametrize("name", TRAINERS)
def test_what_works_passes(name, tmp_path):
    config = PreftConfig(method="lora", r=4, task_type="CAUSAL_LM")
    check_trainer(TRAINERS[name](tmp_path, model=make_base(), peft_config=config, processing_class=tokenizer()))


def plain(path, collator: Any = None, smoothing: float = 0.0, **others: Any) -> Trainer:
    args = arguments(path, label_smoothing_factor=smoothing)
    collator = collator or DataCollatorForSeq2Seq(tokenizer())
    return Trainer(make_preft(make_base()), args, train_dataset=samples(), data_collator=collator, **others)


def test_withheld_labels(tmp_path):
    check_trainer(plain(tmp_path))
    with pytest.raises(ValueError, match=r"label_smoothing_factor is 0\.1.*PrefillMaskCollator"):
        check_trainer(plain(tmp_path, smoothing=0.1))
    with pytest.raises(ValueError, match="compute_loss_func is set"):
        check_trainer(plain(tmp_path, compute_loss_func=summed_loss))
    check_trainer(plain(tmp_path, PrefillMaskCollator(DataCollatorForSeq2Seq(tokenizer())), 0.1))


def grpo(path, **how: Any) -> Any:
    from trl import GRPOConfig, GRPOTrainer

    args = GRPOConfig(num_generations=4, max_completion_length=4, **settings(path))
    return GRPOTrainer(
        make_preft(make_base()),
        args=args,
        train_dataset=Dataset.from_list([{"prompt": "w05 w06"}] * 8),
        reward_funcs=reward,
        processing_class=tokenizer(),
        **how,
    )


def test_generation_that_is_not_what_is_served(tmp_path):
    with pytest.raises(ValueError, match="rollout_func"):
        check_trainer(grpo(tmp_path, rollout_func=lambda *args: {}))
    trainer = grpo(tmp_path)
    trainer.args.use_vllm = True
    trainer.tools = [len]
    with pytest.raises(ValueError, match=r"use_vllm is True.*set it to False.*; tools or an environment"):
        check_trainer(trainer)


def test_reward_models_are_refused(tmp_path):
    class RewardTrainer(SimpleNamespace):
        """Stands for TRL's, which cannot be made with a PreFT config of its task."""

    with pytest.raises(ValueError, match=r"reward model.*peft\.LoraConfig"):
        check_trainer(RewardTrainer(args=arguments(tmp_path), data_collator=None))
    with pytest.raises(ValueError, match="task_type is 'SEQ_CLS'"):
        PreftConfig(task_type="SEQ_CLS")
