"""TRL's preference and reinforcement trainers run real steps: the adapter alone moves, and is what generate serves."""

from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel

from preft_core.format.adapter import load_adapter
from preft_hf import PreftConfig
from preft_hf.layers.phase import ForwardPhase, PrefillRows
from tests.hf.cases import prompt
from tests.hf.oracle import adapted_copy, two_phase_greedy
from tests.hf.training.test_trainers import tokenizer
from tests.hf.zoo import make_base, make_preft

pytestmark = [
    # accelerate, transformers and trl warn of what a CPU lacks, of their own old names and of a tiny model's settings
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
PROMPT = "w05 w06 w07"
PROMPT_LENGTH = 3


def settings(path, **others: Any) -> dict[str, Any]:
    common = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-1, "logging_steps": 1}
    common |= {"output_dir": str(path), "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    return common | {"use_cpu": True, "bf16": False, "seed": 0} | others


def reward(completions: list[str], **others: Any) -> list[float]:
    return [float(text.count("w1")) + 0.1 * len(set(text.split())) for text in completions]


def dpo(path, **how: Any) -> Any:
    from trl import DPOConfig, DPOTrainer

    data = Dataset.from_list([{"prompt": PROMPT, "chosen": " w08 w09", "rejected": " w10 w11"}] * 8)
    return DPOTrainer(args=DPOConfig(max_length=32, **settings(path)), train_dataset=data, **how)


def kto(path, **how: Any) -> Any:
    from trl import KTOConfig, KTOTrainer

    rows = [{"prompt": PROMPT, "completion": f" w{8 + i:02} w09", "label": i % 2 == 0} for i in range(8)]
    return KTOTrainer(args=KTOConfig(max_length=32, **settings(path)), train_dataset=Dataset.from_list(rows), **how)


def grpo(path, **how: Any) -> Any:
    from trl import GRPOConfig, GRPOTrainer

    args = GRPOConfig(num_generations=4, max_completion_length=4, beta=0.1, **settings(path))
    data = Dataset.from_list([{"prompt": PROMPT}] * 8)
    return GRPOTrainer(args=args, train_dataset=data, reward_funcs=reward, **how)


def rloo(path, **how: Any) -> Any:
    from trl import RLOOConfig, RLOOTrainer

    args = RLOOConfig(num_generations=4, max_completion_length=4, **settings(path))
    data = Dataset.from_list([{"prompt": PROMPT}] * 8)
    return RLOOTrainer(args=args, train_dataset=data, reward_funcs=reward, **how)


TRAINERS = {"dpo": dpo, "kto": kto, "grpo": grpo, "rloo": rloo}


@pytest.fixture
def masks(monkeypatch):
    """The prefill tokens of every forward that mixes prompt and completion."""
    seen: list[torch.Tensor] = []
    begin = ForwardPhase.begin

    def spy(self: ForwardPhase, phase: Any) -> None:
        if isinstance(phase, PrefillRows):
            seen.append(phase.mask)
        begin(self, phase)

    monkeypatch.setattr(ForwardPhase, "begin", spy)
    return seen


def check(trainer: Any, masks: list[torch.Tensor], path) -> None:
    """Trains, then compares teacher-forced logits and generated tokens with the two-phase loop."""
    model: PeftModel = trainer.model
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer.train()
    moved = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    assert moved
    assert all("preft_" in name and not name.endswith(".ref") for name in moved)
    assert masks
    # prompt tokens adapted, in every row, and completion tokens never
    assert all((mask.sum(1) == PROMPT_LENGTH).all() for mask in masks)
    model.save_pretrained(path / "saved", selected_adapters=["default"])
    saved = load_adapter(path / "saved")
    base = make_base()
    loaded = PeftModel.from_pretrained(make_base(), path / "saved").eval()
    ids = prompt()
    adapted = adapted_copy(base, saved.config.method, saved.tensors, saved.config.scaling)
    tokens, logits = two_phase_greedy(adapted, base, ids, 5)
    found = loaded.generate(input_ids=ids, max_new_tokens=5, min_new_tokens=5, do_sample=False, eos_token_id=None)
    assert torch.equal(found[:, ids.shape[1] :], tokens)
    row = torch.cat([ids, tokens], 1)
    labels = row.masked_fill(torch.arange(row.shape[1]) < ids.shape[1], -100)
    with torch.no_grad():
        forced = loaded(input_ids=row, labels=labels).logits[:, ids.shape[1] - 1 : -1]
    torch.testing.assert_close(forced.log_softmax(-1), logits.log_softmax(-1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", TRAINERS)
def test_a_new_adapter(name, tmp_path, masks):
    config = PreftConfig(method="lora", r=4, task_type="CAUSAL_LM")
    trainer = TRAINERS[name](tmp_path, model=make_base(), peft_config=config, processing_class=tokenizer())
    check(trainer, masks, tmp_path)


@pytest.mark.parametrize("name", TRAINERS)
def test_an_adapter_that_was_trained_before(name, tmp_path, masks):
    model = make_preft(make_base(), "direft" if name == "dpo" else "lora")
    trainer = TRAINERS[name](tmp_path, model=model, processing_class=tokenizer())
    if "ref" in model.peft_config:
        # TRL's reference is the adapter as it was
        own = {key: tensor for key, tensor in model.named_parameters() if key.endswith(".default")}
        assert own
        for key, tensor in own.items():
            assert torch.equal(model.get_parameter(key.removesuffix("default") + "ref"), tensor)
    check(trainer, masks, tmp_path)


@pytest.mark.filterwarnings("ignore:Adapter name 'ref' should not be contained")
@pytest.mark.parametrize("method", ["lora", "direft", "loreft"])
def test_the_reference_is_a_copy_that_can_be_saved(method, tmp_path):
    model = make_preft(make_base(), method)
    model.add_adapter("ref", model.peft_config["default"])
    model.save_pretrained(tmp_path)
    one, two = load_adapter(tmp_path), load_adapter(tmp_path / "ref")
    assert one.fingerprint == two.fingerprint
    loaded = PeftModel.from_pretrained(make_base(), tmp_path / "ref", adapter_name="ref").eval()
    assert torch.equal(
        loaded.generate(input_ids=prompt(), max_new_tokens=4), model.generate(input_ids=prompt(), max_new_tokens=4)
    )
