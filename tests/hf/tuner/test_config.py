"""PreftConfig: what it refuses, alone and for a model, and how it is shown."""

import copy
import pickle
import re

import pytest
from peft import XLoraConfig, get_peft_model, initialize_lora_eva_weights

from preft_hf import PreftConfig
from preft_hf.config import OF_OTHER_METHODS
from tests.hf.cases import prompt
from tests.hf.zoo import make_base, make_preft


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, r"\br\b.*0"),
        ({"r": 2.5}, r"\br\b.*2.5"),
        ({"method": "dora"}, "method.*dora.*lora.*direft.*loreft"),
        ({"lora_dropout": 1.5}, "lora_dropout.*1.5"),
        ({"method": "loreft", "lora_alpha": 8}, "lora_alpha.*loreft"),
        ({"method": "direft", "target_modules": ["q_proj"]}, "target_modules.*layers_to_transform"),
        ({"use_dora": True}, "unknown field 'use_dora'"),
        ({"lora_alpa": 3}, "did you mean 'lora_alpha'"),
        ({"layers_to_transform": [-1]}, "layers_to_transform.*-1"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "task_type.*SEQ_2_SEQ_LM"),
        ({"format_version": 99}, "format_version.*99.*upgrade"),
    ],
)
def test_config(fields, message):
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        PreftConfig(**fields)


def test_all_faults_of_a_config_come_together():
    with pytest.raises(ValueError, match=re.compile(r"(?=.*\br\b.*0)(?=.*method)(?=.*lora_dropout)", re.DOTALL)):
        PreftConfig(r=0, method="x", lora_dropout=-1.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["q_proj", "v_porj"]}, "'v_porj'.*did you mean 'v_proj'"),
        ({"target_modules": "nothing.*"}, "'nothing.*' matches no linear layer"),
        ({"exclude_modules": ["head"]}, "exclude_modules entry 'head' matches no"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "leave no layer to adapt"),
        ({"layers_to_transform": [0, 7]}, r"layers_to_transform has \[7\].*0 to 1"),
        ({"method": "direft", "layers_to_transform": [5]}, r"layers_to_transform has \[5\]"),
        ({"target_modules": ["lm_head"]}, "lm_head is the output embedding"),
        ({"target_modules": ["embed_tokens"]}, "'embed_tokens' matches no linear layer"),
    ],
)
def test_config_that_does_not_fit_the_model(fields, message):
    base = make_base()
    before = {name for name, _ in base.named_modules()}
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        get_peft_model(base, PreftConfig(**fields))
    assert {name for name, _ in base.named_modules()} == before


def test_faults_of_targets_come_together():
    with pytest.raises(ValueError, match=re.compile(r"(?=.*v_porj)(?=.*o_porj)(?=.*\[9\])", re.DOTALL)):
        get_peft_model(make_base(), PreftConfig(target_modules=["v_porj", "o_porj"], layers_to_transform=[9]))


def test_long_lists_give_short_messages():
    with pytest.raises(ValueError, match=r"has \[5, 6, .* and 89985 more: the decoder layers are 0 to 1") as caught:
        get_peft_model(make_base(), PreftConfig(layers_to_transform=list(range(5, 90_000))))
    assert len(str(caught.value)) < 400
    with pytest.raises(ValueError, match=r"entry 'x0' matches no linear layer.*and 49990 more") as caught:
        get_peft_model(make_base(), PreftConfig(target_modules=[f"x{i}" for i in range(50_000)]))
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("error", [TypeError, ValueError])
def test_an_unknown_argument_is_a_type_error_and_a_value_error(error):
    with pytest.raises(error, match=r"unknown field 'lora_alpa' \(did you mean 'lora_alpha'\?\).*upgrade preft-hf"):
        PreftConfig(lora_alpa=3)  # type: ignore[call-arg]
    # PEFT drops the fields of a TypeError that reads like Python's own
    with pytest.raises(error, match="unknown field"):
        PreftConfig.from_peft_type(peft_type="PREFT", task_type=None, use_fancy=True)


@pytest.mark.parametrize("name", OF_OTHER_METHODS)
def test_fields_of_loras_say_why_there_is_none(name):
    with pytest.raises(TypeError, match=re.escape(f"unknown field {name!r}: {OF_OTHER_METHODS[name]}")) as caught:
        PreftConfig(**{name: 1})
    assert "upgrade" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_code_for_loras_says_that_it_takes_no_preft_adapter(tmp_path):
    model = make_preft(make_base())
    message = "field of LoRA's: EVA initialisation, X-LoRA and other code for LoRA do not take a PreFT adapter"
    with pytest.raises(AttributeError, match=f"no init_lora_weights.*{message}"):
        initialize_lora_eva_weights(model, dataloader=[{"input_ids": prompt()}])
    model.save_pretrained(tmp_path)
    base = make_base()
    base.config.use_cache = False
    experts = XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, xlora_depth=1, adapters={"a": str(tmp_path)})  # type: ignore
    with pytest.raises(AttributeError, match=message):
        get_peft_model(base, experts)
    with pytest.raises(AttributeError, match="object has no attribute 'nothing'"):
        _ = PreftConfig().nothing  # type: ignore[attr-defined]


def test_the_repr_shows_what_was_chosen():
    assert repr(PreftConfig(r=8)) == "PreftConfig(method='lora', r=8, lora_alpha=16)"
    config = PreftConfig(method="direft", layers_to_transform=[1, 0], task_type="CAUSAL_LM")
    assert eval(repr(config)) == config
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
    assert "r (default 16): Rank of the update, 1 or more." in (PreftConfig.__doc__ or "")
