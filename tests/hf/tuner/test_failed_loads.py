"""Loading an adapter brings all of it or leaves the model as it was, also where an adapter of that name is there."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments

from preft_core.format.adapter import AdapterError, load_adapter
from preft_hf import PreftConfig
from tests.hf.cases import GREEDY, NEW_TOKENS, prompt
from tests.hf.oracle import adapted_copy, two_phase_greedy
from tests.hf.zoo import make_base, make_preft

BREAKS = ["torn", "gone"]
METHODS = ["lora", "direft"]
# said by peft whenever transformers adds a second adapter
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")


def tokens_of(model, **settings) -> torch.Tensor:
    return model.generate(input_ids=prompt(), **settings, **GREEDY).sequences[:, prompt().shape[1] :]


def oracle(place: Path) -> torch.Tensor:
    base, adapter = make_base(), load_adapter(place)
    adapted = adapted_copy(base, adapter.config.method, adapter.tensors, adapter.config.scaling)
    return two_phase_greedy(adapted, base, prompt(), NEW_TOKENS)[0]


def save(place: Path, method: str = "lora", seed: int = 1, **fields) -> Path:
    make_preft(make_base(), method, seed, **fields).save_pretrained(place)
    return place


def broken(place: Path, how: str) -> Path:
    """Returns a copy of an adapter with other weights than its config was saved with, or with none."""
    copy = place.with_name(f"{place.name}-{how}")
    shutil.copytree(place, copy)
    file = copy / "adapter_model.safetensors"
    weights = {name: tensor * 1.5 for name, tensor in load_file(file).items()}
    file.unlink()
    if how == "torn":
        save_file(weights, file, {"format": "pt"})
    return copy


def state(model) -> tuple[object, ...]:
    """What a failed load must not change: modules, their adapters and activity, what is trained, hooks, generate."""
    layers = [m for m in model.modules() if hasattr(m, "preft_A")]
    return (
        [name for name, _ in model.named_modules()],
        [(sorted(m.preft_A), m.active_adapters, m.disable_adapters) for m in layers],
        [(name, p.requires_grad) for name, p in model.named_parameters()],
        [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        sorted(model.__dict__.get("peft_config", {})),
        "generate" in model.__dict__,
        "_load_pretrained_model" in model.__dict__,
    )


@pytest.mark.parametrize("how", BREAKS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("first", [None, "lora", "direft"])
def test_transformers_load_adapter(tmp_path, method, how, first):
    place, model = save(tmp_path / "b", method, 2), make_base()
    if first is not None:
        model.load_adapter(str(save(tmp_path / "a", first)), "good")
    before, tokens = state(model), tokens_of(model)
    for _ in range(2):
        with pytest.raises((AdapterError, OSError)):
            model.load_adapter(str(broken(place, how)), "bad")
        shutil.rmtree(tmp_path / f"b-{how}")
    assert state(model) == before
    assert torch.equal(tokens_of(model), tokens)
    if first is not None:
        assert torch.equal(tokens_of(model, adapter_names=["good"] * 2), oracle(tmp_path / "a"))
        with pytest.raises(ValueError, match="'bad' is not known"):
            tokens_of(model, adapter_names=["bad"] * 2)
    model.load_adapter(str(place), "bad")
    model.set_adapter("bad")
    assert torch.equal(tokens_of(model), oracle(place))


def test_another_method_loads_after_a_failure(tmp_path):
    place, model = save(tmp_path / "b"), make_base()
    lora = get_peft_model(make_base(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    lora.save_pretrained(tmp_path / "lora")
    with pytest.raises(AdapterError):
        model.load_adapter(str(broken(place, "torn")), "bad")
    model.load_adapter(str(tmp_path / "lora"), "plain")
    assert torch.equal(tokens_of(model), tokens_of(lora))


@pytest.mark.parametrize("how", BREAKS)
@pytest.mark.parametrize("method", METHODS)
def test_peft_load_adapter(tmp_path, method, how):
    place = save(tmp_path / "b", method, 2)
    model = PeftModel.from_pretrained(make_base(), save(tmp_path / "a"), "good", is_trainable=True).eval()
    before = state(model.get_base_model())
    for low_cpu_mem_usage in (False, True):
        with pytest.raises((AdapterError, ValueError, OSError)):
            model.load_adapter(broken(place, how), "bad", low_cpu_mem_usage=low_cpu_mem_usage)
        shutil.rmtree(tmp_path / f"b-{how}")
    assert state(model.get_base_model()) == before
    assert list(model.peft_config) == ["good"]
    with pytest.raises(ValueError, match="bad"):
        model.set_adapter("bad")
    assert torch.equal(tokens_of(model), oracle(tmp_path / "a"))
    model.save_pretrained(tmp_path / "all")
    assert sorted(path.parent.name for path in (tmp_path / "all").rglob("adapter_config.json")) == ["good"]
    model.load_adapter(place, "bad")
    model.set_adapter("bad")
    assert torch.equal(tokens_of(model), oracle(place))


@pytest.mark.parametrize("how", BREAKS)
@pytest.mark.parametrize("method", METHODS)
def test_peft_from_pretrained(tmp_path, method, how):
    place, base = save(tmp_path / "b", method), make_base()
    before = state(base)
    with pytest.raises((AdapterError, ValueError, OSError)):
        PeftModel.from_pretrained(base, broken(place, how))
    assert state(base) == before
    assert torch.equal(tokens_of(PeftModel.from_pretrained(base, place)), oracle(place))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora_alpha": 32}, "lora_alpha is 32 there and 8 here"),
        ({"use_rslora": True}, "use_rslora is True there and False here"),
        ({"r": 6, "lora_alpha": 8}, "r is 6 there and 4 here"),
        ({"method": "direft"}, "method is 'direft' there and 'lora' here; lora_alpha is 4 there"),
    ],
)
def test_an_adapter_that_computes_something_else_is_not_loaded_over_another(tmp_path, fields, message):
    first = save(tmp_path / "a")
    model = PeftModel.from_pretrained(make_base(), first)
    with pytest.raises(AdapterError, match=rf"cannot be loaded over the adapter 'default'.*{message}.*another name"):
        model.load_adapter(save(tmp_path / "b", seed=2, **fields), "default")
    assert torch.equal(tokens_of(model), oracle(first))


def test_weights_that_are_loaded_over_others_are_those_of_their_config(tmp_path):
    first, second = save(tmp_path / "a"), save(tmp_path / "b", seed=2)
    model = PeftModel.from_pretrained(make_base(), first)
    with pytest.raises(AdapterError, match="fingerprint"):
        model.load_adapter(broken(second, "torn"), "default")
    assert torch.equal(tokens_of(model), oracle(first))
    model.load_adapter(second, "default")
    assert torch.equal(tokens_of(model.eval()), oracle(second))
    with pytest.raises((ValueError, OSError)):
        model.load_adapter(broken(second, "gone"), "default")
    model.load_adapter(first, "default")
    assert torch.equal(tokens_of(model.eval()), oracle(first))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", METHODS)
def test_a_new_adapter_from_a_saved_config_trains_saves_and_comes_back(tmp_path, method):
    config = PreftConfig.from_pretrained(str(save(tmp_path / "old", method)))
    config.inference_mode = False
    model = get_peft_model(make_base(), config)
    rows = [{"input_ids": row, "labels": row.where(torch.arange(9) >= 5, -100)} for row in prompt(4)]
    settings = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        save_steps=1,
        eval_steps=1,
        eval_strategy="steps",
        load_best_model_at_end=True,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model, settings, train_dataset=rows, eval_dataset=rows)  # type: ignore[arg-type]
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best is not None
    assert torch.equal(tokens_of(model.eval()), oracle(Path(best)))
    assert sorted(os.listdir(tmp_path / "run")) == ["checkpoint-1", "checkpoint-2"]
