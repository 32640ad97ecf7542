"""Settings that would train something else than what is served are found before training."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import DataCollatorForSeq2Seq, Trainer

from preft_hf import PrefillMaskCollator, PreftConfig
from preft_hf.trl import check_trainer, create_loraplus_optimizer
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


def tpo(path, wrap: bool) -> Any:
    from trl.experimental.tpo import TPOConfig, TPOTrainer

    row = {"prompt": "w05 w06", "chosen": " w08", "rejected": " w10", "reference": " w11"}
    trainer = TPOTrainer(
        make_preft(make_base()),
        args=TPOConfig(max_length=32, **settings(path)),
        train_dataset=Dataset.from_list([row] * 8),
        processing_class=tokenizer(),
    )
    if wrap:
        trainer.data_collator = PrefillMaskCollator(trainer.data_collator)
    return trainer


def test_tpo_needs_the_mask_and_trains_with_it(tmp_path):
    with pytest.raises(ValueError, match=r"TPOTrainer gives the model no labels.*PrefillMaskCollator\(collator\)"):
        check_trainer(tpo(tmp_path, wrap=False))
    trainer = tpo(tmp_path, wrap=True)
    check_trainer(trainer)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    moved = [name for name, parameter in trainer.model.named_parameters() if not torch.equal(parameter, before[name])]
    assert moved
    assert all("preft_" in name for name in moved)


def best(path, name: str) -> Trainer:
    model = get_peft_model(make_base(), PreftConfig(r=4, task_type="CAUSAL_LM"), adapter_name=name)
    every: dict[str, Any] = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 1, "eval_steps": 1}
    # the worst is not the last
    best: dict[str, Any] = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    args = arguments(path, max_steps=3, learning_rate=0.1, **every, **best)
    collator = DataCollatorForSeq2Seq(tokenizer())
    return Trainer(model, args, train_dataset=samples(), eval_dataset=samples(4), data_collator=collator)


def test_the_best_weights_of_an_adapter_that_is_not_the_default(tmp_path):
    with pytest.raises(ValueError, match=r"load_best_model_at_end with the adapter 'other': .*subfolder other"):
        check_trainer(best(tmp_path / "other", "other"))
    trainer = best(tmp_path / "default", "default")
    check_trainer(trainer)
    trainer.train()
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert evaluated[-1] < max(evaluated) - 1e-3
    assert trainer.evaluate()["eval_loss"] == pytest.approx(max(evaluated), abs=1e-5)


def test_optimizers_that_look_for_lora_names(tmp_path):
    from peft.optimizers import create_lorafa_optimizer
    from peft.optimizers import create_loraplus_optimizer as of_peft

    def trainer(make: Any) -> Trainer:
        model = make_preft(make_base())
        return Trainer(
            model, arguments(tmp_path), train_dataset=samples(), data_collator=DataCollatorForSeq2Seq(tokenizer()),
            optimizers=(make(model), None),
        )  # fmt: skip

    plus = {"optimizer_cls": torch.optim.AdamW, "lr": 1e-3, "loraplus_lr_ratio": 16}
    with pytest.raises(ValueError, match=r"group without parameters.*preft_hf\.trl\.create_loraplus_optimizer"):
        check_trainer(trainer(lambda model: of_peft(model, **plus)))
    with pytest.raises(ValueError, match=r"LoraFAOptimizer finds no lora_A.*torch\.optim\.AdamW"):
        check_trainer(trainer(lambda model: create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-3)))
    check_trainer(trainer(lambda model: create_loraplus_optimizer(model, **plus)))
    check_trainer(trainer(lambda model: torch.optim.AdamW(model.parameters())))


def test_loraplus_steps_b_further_than_a():
    model = make_preft(make_base()).train()
    row = samples(1)[0]
    optimizer = create_loraplus_optimizer(model, torch.optim.SGD, lr=0.1, loraplus_lr_ratio=8, momentum=0.5)
    model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    expected = {
        name: p.detach() - 0.1 * (8 if ".preft_B." in name else 1) * p.grad
        for name, p in trained.items()
        if p.grad is not None
    }
    optimizer.step()
    assert len(expected) == len(trained)
    assert any(p.grad is not None and p.grad.abs().max() > 1e-4 for name, p in trained.items() if ".preft_A." in name)
    for name, parameter in trained.items():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=0, atol=1e-6)
    for method in ("direft", "loreft"):
        with pytest.raises(ValueError, match=rf"method lora.*default \({method}\)"):
            create_loraplus_optimizer(make_preft(make_base(), method), torch.optim.SGD, lr=0.1, loraplus_lr_ratio=8)
    with pytest.raises(ValueError, match=r"loraplus_lr_ratio is 0\.5"):
        create_loraplus_optimizer(model, torch.optim.SGD, lr=0.1, loraplus_lr_ratio=0.5)


@pytest.mark.parametrize("text", ["prompt and completion columns", "assistant_only_loss=True", "expand_turns"])
def test_labels_without_a_prompt_name_the_remedies(text):
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(ValueError, match=text):
        make_preft(make_base()).train()(input_ids=ids, labels=ids)
