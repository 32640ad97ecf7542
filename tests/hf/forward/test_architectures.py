"""More architectures, each with a cache that it makes itself: generate against the two-phase loop."""

import copy
import functools

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict
from transformers import AutoConfig, AutoModelForCausalLM, OpenAIGPTConfig, OpenAIGPTLMHeadModel, PreTrainedModel

from preft_hf import PreftConfig
from tests.hf.cases import GREEDY, prompt
from tests.hf.oracle import adapted_copy, greedy_from
from tests.hf.zoo import COMMON, make_config

TOLERANCE = 1e-4
# of models with experts, the adapter goes on the other layers
pytestmark = pytest.mark.filterwarnings("ignore:target_modules leaves out the experts:UserWarning")

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}
# keys and values of low rank
MLA = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
MLA |= {"num_key_value_heads": 4, "first_k_dense_replace": 1}
# linear attention beside attention
GATED = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
GATED |= {"num_hidden_layers": 4, "head_dim": 8}
SPECIFIC: dict[str, dict[str, object]] = {
    "bloom": {"n_layer": 2, "n_head": 4},
    "cohere2": {"head_dim": 8, "sliding_window": 6},
    "deepseek_v3": MLA | ROUTED,
    "deepseek_v4": MLA | ROUTED | {"head_dim": 8},
    "falcon": {},
    "gemma3n_text": {
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention"] * 4 + ["full_attention"] * 2,
        "num_kv_shared_layers": 1,
        "activation_sparsity_pattern": [0.0] * 6,
        "intermediate_size": [48] * 6,
        "laurel_rank": 4,
        "altup_num_inputs": 2,
        "head_dim": 8,
        "sliding_window": 6,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 64,
    },
    "gemma4_text": {
        "head_dim": 8,
        "sliding_window": 6,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 64,
    },
    "gpt_oss": LOCAL_EXPERTS | {"head_dim": 8, "sliding_window": 6},
    "jamba": EXPERTS
    | {"num_hidden_layers": 8, "attn_layer_offset": 4, "attn_layer_period": 8, "mamba_d_state": 8, "mamba_dt_rank": 4},
    "llama4_text": LOCAL_EXPERTS | {"head_dim": 8},
    "minimax": LOCAL_EXPERTS | {"head_dim": 8},
    "modernbert-decoder": {},
    "olmo2": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "phimoe": LOCAL_EXPERTS,
    "qwen3_5_text": GATED,
    "qwen3_moe": EXPERTS | {"head_dim": 8},
    "qwen3_next": GATED | EXPERTS | {"shared_expert_intermediate_size": 16},
    "rwkv": {},
}


def make(architecture: str) -> PreTrainedModel:
    config = AutoConfig.for_model(architecture, **(COMMON | SPECIFIC[architecture]))
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).float().eval()


@pytest.mark.parametrize("method", ["lora", "direft"])
@pytest.mark.parametrize("architecture", SPECIFIC)
def test_generate_equals_the_two_phase_loop(architecture, method):
    base, ids = make(architecture), prompt()
    torch.manual_seed(1)
    model = get_peft_model(copy.deepcopy(base), make_config(method)).eval()
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    adapted = adapted_copy(base, method, weights, model.peft_config["default"].scaling)
    output = model.generate(input_ids=ids, **GREEDY)
    with torch.no_grad():
        tokens, logits = greedy_from(adapted(input_ids=ids, use_cache=True), base, len(output.logits))
        assert (base(input_ids=ids).logits[:, -1] - logits[:, 0]).abs().max() > 0.01, "an adapter that does nothing"
    assert torch.equal(output.sequences[:, ids.shape[1] :], tokens)
    assert (torch.stack(output.logits, 1) - logits).abs().max() <= TOLERANCE


@pytest.mark.parametrize(
    ("architecture", "name", "kind"),
    [
        ("llama4_text", "router", "Llama4Router"),
        ("phimoe", "router", "PhimoeTopKRouter"),
        ("deepseek_v4", "o_a_proj", "DeepseekV4GroupedLinear"),
    ],
)
def test_linear_subclasses_that_are_not_linear_layers_are_left_out_and_refused_by_name(architecture, name, kind):
    with pytest.raises(ValueError, match=f"{name} is a {kind}, which does not compute a linear layer"):
        get_peft_model(make(architecture), PreftConfig(target_modules=[name, "q_proj"]))
    model = get_peft_model(make(architecture), PreftConfig())
    assert not any(f".{name}.preft" in parameter for parameter, _ in model.named_parameters())


@pytest.mark.parametrize("method", ["lora", "direft"])
def test_a_model_without_a_cache_adapts_the_prompt_in_every_forward(method):
    torch.manual_seed(0)
    base = OpenAIGPTLMHeadModel(
        OpenAIGPTConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2)
    ).eval()
    ids = prompt()
    torch.manual_seed(1)
    model = get_peft_model(copy.deepcopy(base), make_config(method)).eval()
    scaling, weights = model.peft_config["default"].scaling, model.state_dict()

    def adapt(module, args, output, prefix):
        tensor = output if method == "lora" else output[0]
        a, b, bias = (weights.get(f"{prefix}.{leaf}.default") for leaf in ("preft_A", "preft_B", "preft_bias"))
        inputs = (args[0] if method == "lora" else tensor)[:, : ids.shape[1]]
        low = inputs @ a.T if bias is None else inputs @ a.T + bias
        tensor = torch.cat([tensor[:, : ids.shape[1]] + scaling * low @ b.T, tensor[:, ids.shape[1] :]], 1)
        return tensor if method == "lora" else [tensor, *output[1:]]

    for prefix in {key.rpartition(".preft_A")[0] for key in weights if "preft_A" in key}:
        path = prefix.removeprefix("base_model.model.").removesuffix(".preft")
        base.get_submodule(path).register_forward_hook(functools.partial(adapt, prefix=prefix))
    output = model.generate(input_ids=ids, **GREEDY)
    with torch.no_grad():
        for step, logits in enumerate(output.logits):
            seen = output.sequences[:, : ids.shape[1] + step]
            assert (base(input_ids=seen).logits[:, -1] - logits).abs().max() <= TOLERANCE
        bare = model(input_ids=seen, prefill_mask=False).logits[:, -1]
    assert (bare - logits).abs().max() > 20 * TOLERANCE, "an adapter that does nothing"
