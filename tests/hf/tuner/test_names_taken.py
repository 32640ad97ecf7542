"""An adapter's name is taken once, and what is saved is what the config says."""

import pytest
import torch
from peft import PeftModel, get_peft_model

from preft_core.format.adapter import load_adapter
from preft_hf import PreftConfig
from preft_hf.verify import try_adapter
from tests.hf.cases import GREEDY, prompt
from tests.hf.zoo import make_base, make_preft

# said by peft whenever a base model gets a second adapter
pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning"),
    pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT:UserWarning"),
]


def tokens_of(model) -> torch.Tensor:
    return model.generate(input_ids=prompt(), **GREEDY).sequences


@pytest.mark.parametrize("method", ["lora", "direft"])
def test_a_second_adapter_of_the_same_name_is_refused(method, tmp_path):
    base = make_base()
    model = make_preft(base, method)
    before, expected = [name for name, _ in base.named_parameters()], tokens_of(model)
    with pytest.raises(ValueError, match=r"adapter name 'default' is taken: \d+ layers.*delete_adapter.*unload"):
        get_peft_model(base, PreftConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="'default' is taken"):
        model.base_model.inject_adapter(base, "default")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'default' is taken"):
        PeftModel.from_pretrained(base, tmp_path)
    assert [name for name, _ in base.named_parameters()] == before
    assert base.peft_config["default"] is model.peft_config["default"]
    assert model.peft_config["default"].method == method
    assert torch.equal(tokens_of(model), expected)
    another = make_preft(base, method, adapter_name="second")
    another.save_pretrained(tmp_path)
    assert load_adapter(tmp_path / "second").config.method == method


def test_a_config_that_does_not_fit_leaves_no_trace():
    base = make_base()
    model = make_preft(base)
    with pytest.raises(ValueError, match="matches no linear layer"):
        get_peft_model(base, PreftConfig(target_modules=["nothing"]), adapter_name="bad")
    assert list(base.peft_config) == ["default"]
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("lora", {"target_modules": ["q_proj"]}, r"12 modules that its config does not choose, such as model\.layers"),
        ("lora", {"target_modules": ["q_proj", "nothing"]}, "does not fit the base model.*'nothing'"),
        ("lora", {"exclude_modules": ["q_proj"]}, "2 modules that its config does not choose"),
        ("direft", {"layers_to_transform": [1]}, r"1 modules that its config does not choose.*layers\.0"),
        ("lora", {"lora_alpha": 64}, r"scaling of its config is 16\.0 and its layers compute with 2\.0"),
        ("lora", {"use_rslora": True}, r"scaling of its config is 4\.0 and its layers compute with 2\.0"),
        ("lora", {"r": 8, "lora_alpha": 16}, "do not match method lora with r = 8"),
    ],
)
def test_weights_that_are_not_their_configs_are_not_saved(method, change, message, tmp_path):
    model = make_preft(make_base(), method)
    model.save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    for name, value in change.items():
        setattr(model.peft_config["default"], name, value)
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_weights_that_a_config_chooses_and_that_are_not_there_are_not_saved(tmp_path):
    model = make_preft(make_base(), target_modules=["q_proj"])
    model.peft_config["default"].target_modules = ["q_proj", "k_proj"]
    with pytest.raises(ValueError, match=r"no weights of 2 modules that its config chooses, such as .*k_proj"):
        model.save_pretrained(tmp_path / "a")
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("held", [None, "default"])
def test_a_base_model_is_as_it_was_after_an_adapter_was_tried_on_it(held, tmp_path):
    make_preft(make_base()).save_pretrained(tmp_path)
    base = make_base()
    if held is not None:
        make_preft(base, "direft")
    before = [name for name, _ in base.named_modules()], sorted(base.__dict__), tokens_of(base)
    for _ in range(2):
        assert try_adapter(tmp_path, base)["largest_change_of_a_logit"] > 0
    assert [name for name, _ in base.named_modules()] == before[0]
    assert sorted(base.__dict__) == before[1]
    assert torch.equal(tokens_of(base), before[2])
