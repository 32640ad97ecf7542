"""Every way to load an adapter runs every check, and loads all of it or leaves the model as it was."""

import pytest
import torch
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from transformers.core_model_loading import WeightRenaming

from preft_core.format.adapter import AdapterError, load_adapter, save_adapter
from preft_hf import PreftConfig
from tests.hf.cases import GREEDY, prompt
from tests.hf.tuner.test_failed_loads import state
from tests.hf.zoo import make_base, make_preft

TARGETS = ["q_proj", "v_proj"]


def tokens_of(model) -> torch.Tensor:
    return model.generate(input_ids=prompt(), **GREEDY).sequences


def config_of(method: str) -> PreftConfig:
    return PreftConfig(method=method, r=4, target_modules=TARGETS if method == "lora" else None)


def adapter(method: str) -> PeftModel:
    return make_preft(make_base(), method, **({"target_modules": TARGETS} if method == "lora" else {}))  # type: ignore


def first(weights, leaf="preft_A"):
    return min(name for name in weights if name.endswith(leaf))


def with_nan(weights):
    weights[first(weights)][0, 0] = float("nan")


def without_one(weights):
    del weights[first(weights)]


def with_another(weights):
    weights[first(weights).replace("layers.0", "layers.7")] = weights[first(weights)].clone()


def of_a_lora(weights):
    for name in list(weights):
        weights[name.replace("preft_", "lora_") + ".weight"] = weights.pop(name)


def of_another_shape(weights):
    weights[first(weights)] = weights[first(weights)][:, :-1].clone()


def dependent(weights):
    name = first(weights, "preft_R")
    weights[name][1] = weights[name][0]


FAULTS = [
    ("lora", with_nan, "NaN"),
    ("lora", without_one, "missing"),
    ("direft", without_one, "missing"),
    ("lora", with_another, "unexpected"),
    ("lora", of_a_lora, r"missing.*preft_A.*unexpected.*lora_A"),
    ("lora", of_another_shape, "has shape"),
    ("loreft", dependent, "linearly dependent rows"),
]


def load_into_base(base, config, weights):
    base.load_adapter(adapter_state_dict=weights, peft_config=config)


def load_into_base_again(base, config, weights):
    base.load_adapter(adapter_state_dict=weights, peft_config=config, adapter_name="another")


def set_injected(base, config, weights):
    inject_adapter_in_model(config, base)
    set_peft_model_state_dict(base, weights)


def set_wrapped(base, config, weights):
    set_peft_model_state_dict(get_peft_model(base, config), weights)


@pytest.mark.parametrize("way", [load_into_base, load_into_base_again, set_injected, set_wrapped])
@pytest.mark.parametrize(("method", "fault", "message"), FAULTS, ids=lambda value: getattr(value, "__name__", None))
def test_weights_in_memory_are_checked(method, fault, message, way):
    weights = get_peft_model_state_dict(adapter(method), save_embedding_layers=False)
    weights = {name: tensor.clone() for name, tensor in weights.items()}
    expected = tokens_of(adapter(method))
    base = make_base()
    way(base, config_of(method), dict(weights))
    assert torch.equal(tokens_of(base.eval()), expected)
    fault(weights)
    base = make_base()
    before = state(base)
    with pytest.raises(AdapterError, match=message):
        way(base, config_of(method), weights)
    if way in (load_into_base, load_into_base_again):
        # injecting was the caller's own step in the others
        assert state(base) == before


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PreftConfig(r=4), r"missing .*k_proj.preft_A"),
        (
            PreftConfig(r=8),
            r"cannot be loaded with this (peft_)?config: r is 4 there and 8 here.*leave (peft_)?config out",
        ),
        (PreftConfig(r=4, lora_alpha=5), "lora_alpha is 8 there and 5 here"),
        (PreftConfig(method="direft", r=4, lora_alpha=8), "method is 'lora' there and 'direft' here"),
    ],
)
def test_a_config_that_the_caller_gives(config, message, tmp_path):
    adapter("lora").save_pretrained(tmp_path)
    for load in (
        lambda base: PeftModel.from_pretrained(base, tmp_path, config=config),
        lambda base: base.load_adapter(str(tmp_path), peft_config=config),
    ):
        base = make_base()
        before = state(base)
        with pytest.raises(AdapterError, match=message):
            load(base)
        assert state(base) == before
    same = config_of("lora")
    expected = tokens_of(adapter("lora"))
    assert torch.equal(tokens_of(PeftModel.from_pretrained(make_base(), tmp_path, config=same)), expected)
    base = make_base()
    base.load_adapter(str(tmp_path), peft_config=config_of("lora"))
    assert torch.equal(tokens_of(base), expected)


def renamed(tmp_path, old: str, new: str) -> torch.Tensor:
    """Saves an adapter under the module names of an older version of its base model; returns the model's tokens."""
    model = adapter("lora")
    model.save_pretrained(tmp_path)
    saved = load_adapter(tmp_path)
    save_adapter(tmp_path, saved.config, {name.replace(new, old): t for name, t in saved.tensors.items()})
    return tokens_of(model)


def test_modules_that_were_renamed_through_peft(tmp_path, monkeypatch):
    expected = renamed(tmp_path, "model.old_layers", "model.layers")
    with pytest.raises(AdapterError, match=r"unexpected model\.old_layers"):
        PeftModel.from_pretrained(make_base(), tmp_path)
    mapping = {r"^model\.old_layers": "model.layers"}
    assert torch.equal(tokens_of(PeftModel.from_pretrained(make_base(), tmp_path, key_mapping=mapping)), expected)
    base = make_base()
    monkeypatch.setattr(type(base), "_checkpoint_conversion_mapping", mapping, raising=False)
    assert torch.equal(tokens_of(PeftModel.from_pretrained(base, tmp_path)), expected)
    model = PeftModel.from_pretrained(make_base(), tmp_path, "other", key_mapping=mapping)
    model.load_adapter(tmp_path, "second", key_mapping=mapping)
    # over an adapter that is there
    model.load_adapter(tmp_path, "second", key_mapping=mapping)
    model.set_adapter("second")
    assert torch.equal(tokens_of(model), expected)


def test_modules_that_were_renamed_through_transformers(tmp_path):
    expected = renamed(tmp_path, "model.old_layers", "model.layers")
    with pytest.raises(AdapterError, match=r"unexpected model\.old_layers"):
        make_base().load_adapter(str(tmp_path))
    base = make_base()
    base.load_adapter(str(tmp_path), weight_mapping=[WeightRenaming("old_layers", "layers")])
    assert torch.equal(tokens_of(base), expected)
