"""A trainer's evaluation sees prompt tokens adapted and response tokens base, or is refused."""

from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import DataCollatorForSeq2Seq, DynamicCache, Trainer

from preft_hf import PrefillMaskCollator, preft_phase
from preft_hf.forward.caches import cache_argument
from preft_hf.training.trl import check_trainer
from tests.hf.cases import case
from tests.hf.training.test_trainers import PAIRS, arguments, samples, summed_loss, tokenizer
from tests.hf.training.test_trl import kto, settings
from tests.hf.zoo import make_base, make_preft

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
NEITHER = "gave the model neither labels nor prefill_mask in evaluation.*PrefillMaskCollator"


class Predictions:
    """A compute_metrics that keeps what it was given."""

    logits: Tensor
    labels: Tensor

    def __call__(self, given: Any) -> dict[str, float]:
        self.logits, self.labels = torch.tensor(given.predictions), torch.tensor(given.label_ids)
        return {}


def check_logits(logits: Tensor, ids: Tensor, num_prompt: int) -> None:
    """Compares the logits of the response with those of an adapted prompt and a base decode of each row."""
    c = case("llama", "lora")
    for found, row in zip(logits, ids, strict=True):
        cache = DynamicCache(config=c.base.config)
        with torch.no_grad():
            first = c.adapted(input_ids=row[None, :num_prompt], **cache_argument(cache), use_cache=True).logits[:, -1:]
            rest = c.base(input_ids=row[None, num_prompt:], **cache_argument(cache), use_cache=True).logits
            wrong = c.adapted(input_ids=row[None]).logits[0, num_prompt - 1 :]
        expected = torch.cat([first, rest], 1)[0]
        assert (found[num_prompt - 1 :] - expected).abs().max() < 1e-4
        assert (wrong - expected).abs().max() > 1e-3


def sft(path, **how: Any) -> Any:
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(max_length=64, per_device_eval_batch_size=4, **settings(path))
    data = Dataset.from_list(PAIRS[:4])
    return SFTTrainer(
        make_preft(make_base()), args, train_dataset=data, eval_dataset=data, processing_class=tokenizer(), **how
    )


def dpo(path, **how: Any) -> Any:
    from trl import DPOConfig, DPOTrainer

    rows = [{"prompt": f"w05 w06 w{i + 20}", "chosen": f" w{8 + i:02} w09", "rejected": " w10 w11"} for i in range(4)]
    args = DPOConfig(max_length=32, per_device_eval_batch_size=4, **settings(path))
    data = Dataset.from_list(rows)
    return DPOTrainer(
        make_preft(make_base()),
        args=args,
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer(),
        **how,
    )


def check_refused_without_mask(trainer, collator):
    with pytest.raises(ValueError, match=rf"compute_metrics is set.*PrefillMaskCollator.*{collator}"):
        check_trainer(trainer)
    with pytest.raises(ValueError, match=rf"{type(trainer).__name__} {NEITHER}"):
        trainer.evaluate()


def test_sft_with_metrics(tmp_path):
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    check_trainer(sft(tmp_path))
    check_refused_without_mask(sft(tmp_path, compute_metrics=Predictions()), "DataCollatorForLanguageMod")
    metrics = Predictions()
    collator = PrefillMaskCollator(DataCollatorForLanguageModeling(pad_token_id=0))
    trainer = sft(tmp_path, compute_metrics=metrics, data_collator=collator)
    check_trainer(trainer)
    trainer.evaluate()
    ids = torch.tensor([row["input_ids"] for row in samples(4)])
    assert torch.equal(metrics.labels[:, 5:], ids[:, 5:])
    check_logits(metrics.logits, ids, num_prompt=5)


def test_dpo_with_metrics(tmp_path):
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    check_refused_without_mask(dpo(tmp_path, compute_metrics=Predictions()), "DataCollatorForPreference")
    metrics = Predictions()
    collator = PrefillMaskCollator(DataCollatorForPreference(pad_token_id=0))
    trainer = dpo(tmp_path, compute_metrics=metrics, data_collator=collator)
    check_trainer(trainer)
    loss = trainer.evaluate()["eval_loss"]
    check_logits(metrics.logits, metrics.labels, num_prompt=3)
    assert loss == dpo(tmp_path).evaluate()["eval_loss"]
    trainer.train()


def test_kto_with_metrics_is_refused(tmp_path):
    data = Dataset.from_list([{"prompt": "w05 w06", "completion": f" w{8 + i:02}", "label": i < 2} for i in range(4)])
    how = {"model": make_preft(make_base()), "processing_class": tokenizer()}
    trainer = kto(tmp_path, **how, compute_metrics=Predictions(), eval_dataset=data)
    with pytest.raises(ValueError, match=r"compute_metrics is set: KTOTrainer.*omit it"):
        check_trainer(trainer)
    with pytest.raises(ValueError, match=rf"KTOTrainer {NEITHER}"):
        trainer.evaluate()


def test_a_trainer_that_knows_no_labels_is_refused(tmp_path):
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    data = Dataset.from_list([{"prompt": "w05 w06", "chosen": " w08", "rejected": " w10"}] * 4)
    args = ORPOConfig(max_length=32, **settings(tmp_path))
    trainer = ORPOTrainer(
        make_preft(make_base()), args, train_dataset=data, eval_dataset=data, processing_class=tokenizer()
    )
    with pytest.raises(ValueError, match=r"ORPOTrainer gives the model neither labels nor a mask.*use SFTTrainer"):
        check_trainer(trainer)
    with pytest.raises(ValueError, match=f"ORPOTrainer {NEITHER}"):
        trainer.evaluate()
    with pytest.raises(ValueError, match="neither labels nor prefill_mask"):
        trainer.train()


def plain(path, collator: Any = None, settings: dict[str, Any] | None = None, **how: Any) -> Trainer:
    args = arguments(path, per_device_eval_batch_size=4, **(settings or {}))
    collator = collator or DataCollatorForSeq2Seq(tokenizer())
    return Trainer(make_preft(make_base()), args, eval_dataset=samples(4), data_collator=collator, **how)


COMPILED = {"torch_compile": True, "torch_compile_backend": "eager"}
WITHHELD: dict[str, dict[str, Any]] = {
    "label smoothing": {"settings": {"label_smoothing_factor": 0.1}},
    "label smoothing, compiled": {"settings": {"label_smoothing_factor": 0.1} | COMPILED},
    "compute_loss_func": {"compute_loss_func": summed_loss},
}


@pytest.mark.parametrize("how", WITHHELD.values(), ids=WITHHELD)
def test_withheld_labels(how, tmp_path):
    torch._dynamo.reset()
    with pytest.raises(ValueError, match=f"Trainer {NEITHER}"):
        plain(tmp_path, **how).evaluate()
    metrics = Predictions()
    trainer = plain(tmp_path, PrefillMaskCollator(DataCollatorForSeq2Seq(tokenizer())), compute_metrics=metrics, **how)
    trainer.evaluate()
    ids = torch.tensor([row["input_ids"] for row in samples(4)])
    check_logits(metrics.logits, ids, num_prompt=5)
    torch._dynamo.reset()


def test_metrics_of_a_plain_trainer_work(tmp_path):
    metrics = Predictions()
    trainer = plain(tmp_path, compute_metrics=metrics)
    check_trainer(trainer)
    trainer.evaluate()
    check_logits(metrics.logits, torch.tensor([row["input_ids"] for row in samples(4)]), num_prompt=5)


def test_prompts_alone_can_be_predicted_on(tmp_path):
    rows = [{"input_ids": row["input_ids"][:5]} for row in samples(4)]
    trainer = plain(tmp_path)
    with pytest.raises(ValueError, match=r'evaluate inside preft_phase\("prefill"\)'):
        trainer.predict(rows)  # type: ignore[arg-type]
    with preft_phase("prefill"):
        found = torch.tensor(trainer.predict(rows).predictions)  # type: ignore[arg-type]
    with torch.no_grad():
        expected = case("llama", "lora").adapted(input_ids=torch.tensor([row["input_ids"] for row in rows])).logits
    assert (found - expected).abs().max() < 1e-4


def test_a_forward_by_hand_in_metrics_and_callbacks_is_inference(tmp_path):
    """Only a trainer's own steps are asked for labels."""
    ids = torch.tensor([samples(1)[0]["input_ids"][:5]])
    found = []

    def metrics(given: Any) -> dict[str, float]:
        with torch.no_grad():
            found.append(trainer.model(input_ids=ids).logits)  # type: ignore[misc]
        return {}

    trainer = plain(tmp_path, compute_metrics=metrics)
    trainer.evaluate()
    with torch.no_grad():
        assert torch.allclose(found[0], case("llama", "lora").adapted(input_ids=ids).logits, atol=1e-4)
