"""Every refusal says what was found, what is allowed and what to do next."""

import copy

import accelerate
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForTokenClassification,
)

from preft_hf import PrefillMaskCollator, PreftConfig, PreftPool, expand_turns, preft_phase
from preft_hf.forward.caches import cache_argument, cache_of
from tests.hf.cases import GREEDY, NEW_TOKENS, prompt
from tests.hf.oracle import adapted_copy, two_phase_greedy
from tests.hf.zoo import make_base, make_preft


@pytest.mark.filterwarnings("ignore:Adapter name .* should not be contained:UserWarning")
@pytest.mark.parametrize(
    "name", ["a.b", "", "preft", "preft_x", "layers", "q_proj", "weight", "keys", "-a", "mlp", "0"]
)
def test_adapter_names_that_break_key_parsing(name):
    with pytest.raises(ValueError, match="adapter name"):
        get_peft_model(make_base(), PreftConfig(), adapter_name=name)


@pytest.mark.parametrize("name", ["default", "customer-7", "Tone_2", "10"])
def test_adapter_names_that_work(name):
    model = make_preft(make_base(), adapter_name=name)
    model.add_adapter("another", PreftConfig())
    assert model.generate(input_ids=prompt(), **GREEDY).sequences.shape == (2, 17)


def test_encoder_decoder():
    config = AutoConfig.for_model(
        "t5", d_model=16, d_kv=4, d_ff=16, num_layers=1, num_decoder_layers=1, num_heads=2, vocab_size=32
    )
    with pytest.raises(ValueError, match=r"T5ForConditionalGeneration is an encoder-decoder.*use LoRA"):
        get_peft_model(AutoModelForSeq2SeqLM.from_config(config), PreftConfig())


@pytest.mark.parametrize("method", ["lora", "direft"])
def test_merging(method):
    model = make_preft(make_base(), method)
    layer = next(m for m in model.modules() if hasattr(m, "preft_A"))
    for call in (
        model.merge_and_unload,
        model.merge_adapter,
        model.unmerge_adapter,
        layer.merge,
        layer.unmerge,
    ):
        with pytest.raises(ValueError, match=r"cannot be merged.*unload"):
            call()
    with pytest.raises(ValueError, match="weighted"):
        model.add_weighted_adapter(["default"], [1.0], "mixed")
    assert not model.supports_lora_conversion()


def test_train_mode_without_labels_or_mask():
    model = make_preft(make_base()).train()
    with pytest.raises(ValueError, match=r"neither labels nor prefill_mask.*PrefillMaskCollator"):
        model(input_ids=prompt())
    with model.disable_adapter():
        model(input_ids=prompt())


def test_rows_without_a_prompt_are_named():
    ids = prompt(3)
    labels = ids.clone()
    labels[1, :4] = -100
    with pytest.raises(ValueError, match=r"rows \[0, 2\].*no prompt token"):
        make_preft(make_base()).train()(input_ids=ids, labels=labels)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 8, dtype=torch.bool), r"torch.bool \(2, 8\).*\(2, 9\)"),
        (torch.ones(2, 9), r"torch.float32 \(2, 9\).*torch.bool"),
        (torch.ones(9, dtype=torch.bool), r"torch.bool \(9,\)"),
        ([True], "prefill_mask is list"),
    ],
)
def test_prefill_mask_of_the_wrong_kind(mask, message):
    with pytest.raises(ValueError, match=message):
        make_preft(make_base())(input_ids=prompt(), prefill_mask=mask)


def test_labels_of_another_shape():
    with pytest.raises(ValueError, match=r"labels have shape \(2,\)"):
        make_preft(make_base())(input_ids=prompt(), labels=torch.tensor([0, 1]))


def test_calls_that_bypass_the_phase():
    model = make_preft(make_base())
    inner = model.get_base_model()
    for call in (inner.model, inner.forward):
        with pytest.raises(RuntimeError, match=r"outside of its model's forward.*preft_phase"):
            call(input_ids=prompt())
    with preft_phase("decode"):
        expected = inner.model(input_ids=prompt()).last_hidden_state
    assert torch.equal(expected, make_base().model(input_ids=prompt()).last_hidden_state)


def test_a_failed_forward_leaves_no_phase_behind():
    model = make_preft(make_base())
    with pytest.raises(IndexError):
        model(input_ids=torch.full((1, 3), 10_000))
    with pytest.raises(RuntimeError, match="outside of its model's forward"):
        model.get_base_model().model(input_ids=prompt())


def test_several_tokens_on_a_cache_are_ambiguous():
    model = make_preft(make_base())
    cache = cache_of(model(input_ids=prompt(), use_cache=True))
    with pytest.raises(ValueError, match=r"3 tokens on a cache of 9 tokens.*preft_phase"):
        model(input_ids=prompt(2, 3), **cache_argument(cache))


def test_preft_phase_takes_two_words_and_does_not_nest():
    with pytest.raises(ValueError, match=r"'generate'.*prefill.*decode"), preft_phase("generate"):  # type: ignore[arg-type]
        pass
    with preft_phase("prefill"), pytest.raises(ValueError, match="inside preft_phase"), preft_phase("decode"):
        pass
    with pytest.raises(ZeroDivisionError), preft_phase("prefill"):
        raise ZeroDivisionError
    with preft_phase("decode"):
        pass


def test_preft_phase_around_generate_or_labels_is_refused():
    model, ids = make_preft(make_base()), prompt()
    with preft_phase("prefill"):
        with pytest.raises(ValueError, match="generate was called inside preft_phase"):
            model.generate(input_ids=ids, **GREEDY)
        with pytest.raises(ValueError, match="labels were given inside preft_phase"):
            model(input_ids=ids, labels=ids)


def test_a_decoding_loop_that_skips_prepare_inputs_is_refused():
    def loop(model, input_ids, **kwargs):
        return model(input_ids=input_ids).logits.argmax(-1)

    model = make_preft(make_base())
    with pytest.raises(RuntimeError, match="without prepare_inputs_for_generation"):
        model.generate(input_ids=prompt(), custom_generate=loop, max_new_tokens=2)
    # its logits processor runs the model on a prompt of its own
    with pytest.raises(RuntimeError, match="leave guidance_scale out"):
        model.generate(input_ids=prompt(), guidance_scale=1.5, max_new_tokens=2)
    with model.disable_adapter():
        model.generate(input_ids=prompt(), guidance_scale=1.5, max_new_tokens=2, pad_token_id=0)


def test_layers_that_see_reordered_tokens_are_refused_in_mixed_forwards():
    class Reorder(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x[:, ::2]).repeat_interleave(2, 1)[:, : x.shape[1]]

    base = make_base()
    base.model.layers[0].mlp.gate_proj = Reorder(base.model.layers[0].mlp.gate_proj)
    model, ids = make_preft(base), prompt()
    with pytest.raises(RuntimeError, match=r"cannot tell them apart.*exclude_modules"):
        model(input_ids=ids, labels=ids.masked_fill(torch.arange(9) < 4, -100))


def test_layers_read_past_the_module_are_left_out_and_refused_by_name():
    base = make_base("falcon_h1")
    with pytest.raises(ValueError, match=r"out_proj is bypassed by falcon_h1"):
        get_peft_model(base, PreftConfig(target_modules=["out_proj", "q_proj"]))
    assert "out_proj" not in make_preft(base).peft_config["default"].target_modules


def test_a_layer_whose_adapter_never_runs_is_reported():
    class Past(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return nn.functional.linear(x, self.inner.weight)

    base = make_base()
    base.model.layers[1].self_attn.o_proj = Past(base.model.layers[1].self_attn.o_proj)
    model = make_preft(base)
    with pytest.warns(UserWarning, match=r"1 layers, such as model.layers.1.self_attn.o_proj.inner"):
        model(input_ids=prompt())


def test_expand_turns_and_collator():
    with pytest.raises(ValueError, match=r"message 1 has no 'role'.*no message has the role 'assistant'"):
        expand_turns([{"role": "user", "content": "a"}, {"content": "b"}])
    with pytest.raises(ValueError, match="nothing before it"):
        expand_turns([{"role": "assistant", "content": "a"}])
    with pytest.raises(ValueError, match="no labels tensor"):
        PrefillMaskCollator(lambda rows: {"input_ids": prompt()})([])


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT:UserWarning")
@pytest.mark.parametrize("method", ["lora", "direft"])
def test_a_peft_model_as_the_base(method):
    settings = {"r": 4, "init_lora_weights": False, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    inner = get_peft_model(make_base(), LoraConfig(**settings), adapter_name="plain").eval()
    with pytest.raises(ValueError, match=r"is a PeftModelForCausalLM: pass model\.get_base_model\(\)"):
        get_peft_model(inner, PreftConfig(method=method))
    assert list(inner.peft_config) == ["plain"]
    merged = copy.deepcopy(inner).merge_and_unload()
    model = make_preft(inner.get_base_model(), method)
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    weights = {name.replace(".base_layer", ""): tensor for name, tensor in weights.items()}
    adapted = adapted_copy(merged, method, weights, model.peft_config["default"].scaling)
    expected = two_phase_greedy(adapted, merged, prompt(), NEW_TOKENS)[0]
    assert torch.equal(model.generate(input_ids=prompt(), **GREEDY).sequences[:, 9:], expected)


@pytest.mark.parametrize("kind", [AutoModelForMaskedLM, AutoModelForTokenClassification])
def test_models_that_generate_nothing(kind):
    config = AutoConfig.for_model(
        "bert", hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )
    with pytest.raises(ValueError, match=r"BertFor\w+ generates no text.*use LoRA"):
        get_peft_model(kind.from_config(config), PreftConfig())


@pytest.mark.parametrize("kind", [AutoModel, AutoModelForCausalLM])
@pytest.mark.parametrize("family", ["bert", "roberta", "electra"])
def test_models_that_read_in_both_directions(family, kind):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(family, **sizes, vocab_size=32)
    with pytest.raises(ValueError, match=r"reads its text in both directions.*is_decoder=True.*use LoRA"):
        get_peft_model(kind.from_config(config), PreftConfig())
    config.is_decoder = True
    get_peft_model(AutoModelForCausalLM.from_config(config), PreftConfig())


@pytest.mark.parametrize("method", ["lora", "direft"])
def test_an_adapter_without_memory_says_that_its_weights_were_not_loaded(method):
    model = get_peft_model(make_base(), PreftConfig(method=method, r=4), low_cpu_mem_usage=True).eval()
    with pytest.raises(RuntimeError, match=r"with low_cpu_mem_usage=True, and its weights were not loaded"):
        model(input_ids=prompt())
    saved = make_preft(make_base(), method)
    weights = get_peft_model_state_dict(saved, save_embedding_layers=False)
    set_peft_model_state_dict(model, weights, low_cpu_mem_usage=True)
    with torch.no_grad():
        assert torch.equal(model(input_ids=prompt()).logits, saved(input_ids=prompt()).logits)


def offloaded(model):
    accelerate.cpu_offload(model, execution_device="cpu")
    return model


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")
@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter:UserWarning")
@pytest.mark.parametrize("method", ["lora", "direft", "loreft"])
def test_offloaded_adapters(method, tmp_path):
    make_preft(make_base(), method).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_base(), tmp_path).eval()
    for model in (
        offloaded(loaded.get_base_model()),
        PeftModel.from_pretrained(offloaded(make_base()), tmp_path).eval().get_base_model(),
    ):
        for names in ({}, {"adapter_names": ["default"] * 2}):
            with pytest.raises(RuntimeError, match=r"adapter's weights are on the meta device.*load the base model"):
                model(input_ids=prompt(), **names)
            with pytest.raises(RuntimeError, match="adapter's weights are on the meta device"):
                model.generate(input_ids=prompt(), **names, **GREEDY)
        assert torch.equal(
            model(input_ids=prompt(), prefill_mask=False).logits, make_base()(input_ids=prompt()).logits
        )
    with pytest.raises(ValueError, match="layers are offloaded"):
        PreftPool.from_pretrained(offloaded(make_base()), {"one": tmp_path})
