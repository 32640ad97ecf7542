"""Experts of mixture-of-experts models: left out with a warning, refused by name."""

import pytest
from peft import PeftModel, get_peft_model
from torch import nn

from preft_hf import PreftConfig, PreftPool
from tests.hf.zoo import make_base, make_preft

FUSED = ["qwen3_moe", "mixtral", "qwen2_moe"]


def with_linear_experts():
    base = make_base()
    for layer in base.model.layers:
        layer.mlp.experts = nn.ModuleList([nn.Linear(32, 32), nn.Linear(32, 32)])
    return base


@pytest.mark.parametrize("architecture", FUSED)
def test_all_linear_says_how_many_layers_it_leaves_out(architecture, tmp_path):
    message = r"leaves out the experts of 2 layers \(4 weights, such as model.layers.0.mlp.experts.gate_up_proj\)"
    with pytest.warns(UserWarning, match=message) as caught:
        model = get_peft_model(make_base(architecture), PreftConfig())
    assert len([one for one in caught if "experts" in str(one.message)]) == 1
    assert not any("experts." in name for name, _ in model.named_parameters() if "preft" in name)
    model.save_pretrained(tmp_path)
    # loading says nothing again: warnings are errors here
    PeftModel.from_pretrained(make_base(architecture), tmp_path)
    PreftPool.from_pretrained(make_base(architecture), {"one": tmp_path}).close()


def test_linear_experts_are_left_out_too():
    base = with_linear_experts()
    with pytest.warns(UserWarning, match=r"experts of 2 layers \(4 weights, such as model.layers.0.mlp.experts.0\)"):
        model = get_peft_model(base, PreftConfig())
    assert not any("experts." in name for name, _ in model.named_parameters() if "preft" in name)


# warnings are errors here
@pytest.mark.parametrize(
    "fields",
    [
        {"exclude_modules": ".*experts.*"},
        {"exclude_modules": ["experts.gate_up_proj", "experts.down_proj"]},
        {"target_modules": ".*_proj", "exclude_modules": ".*experts.*"},
        {"target_modules": ["q_proj"]},
        {"method": "direft"},
    ],
)
def test_whoever_excludes_them_knows(fields):
    get_peft_model(make_base("qwen3_moe"), PreftConfig(**fields))


@pytest.mark.parametrize(
    ("make", "targets", "message"),
    [
        (with_linear_experts, ["experts.0"], r"entries \['experts.0'\] name experts alone"),
        (with_linear_experts, r".*experts\..*", "matches 4 weights of experts, such as .*experts.0.*exclude_modules"),
        (lambda: make_base("qwen3_moe"), ["gate_up_proj", "q_proj"], r"\['gate_up_proj'\] name experts alone"),
        (lambda: make_base("qwen3_moe"), r".*(q_proj|experts.*)", "matches 4 weights of experts"),
        (lambda: make_base("qwen3_moe"), r".*_proj", "matches 4 weights of experts"),
    ],
)
def test_experts_are_refused_by_name(make, targets, message):
    base = make()
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, PreftConfig(target_modules=targets))
    assert not any("preft" in name for name, _ in base.named_modules())


def test_an_entry_that_names_other_layers_too():
    # the shared expert is an ordinary linear layer
    base = make_base("qwen2_moe")
    with pytest.warns(UserWarning, match=r"experts of 2 layers \(2 weights, such as .*experts.down_proj"):
        model = get_peft_model(base, PreftConfig(target_modules=["down_proj"]))
    assert any("shared_expert.down_proj.preft_A" in name for name, _ in model.named_parameters())


def test_decoding_is_the_base_model():
    from tests.hf.cases import GREEDY, case, prompt

    model = make_preft(make_base("qwen3_moe"))
    found = model.generate(input_ids=prompt(), **GREEDY).sequences[:, 9:]
    assert found.tolist() == case("qwen3_moe", "lora").oracle(prompt())[0].tolist()
