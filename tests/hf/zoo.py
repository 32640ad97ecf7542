"""Tiny random models, one per architecture, and adapters for them that change what they say."""

import warnings

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import preft_hf

VOCABULARY = 64
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SPECIFIC: dict[str, dict[str, object]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 6, "head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "phi3": {},
    "gpt2": {},
    "gpt_neox": {"num_key_value_heads": 4},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "decoder_sparse_step": 1,
    },
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
    "falcon_h1": {
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_n_groups": 1,
        "mamba_d_state": 8,
        "mamba_chunk_size": 4,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_ff_dim": 48, "block_multiple_of": 8},
}
ARCHITECTURES = list(SPECIFIC)
# no attention at all: their caches have no length
STATE_SPACE: dict[str, dict[str, object]] = {
    "mamba": {"state_size": 4},
    "falcon_mamba": {"state_size": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8, "chunk_size": 4, "expand": 2},
}
# further ones that TGI serves
OTHERS: dict[str, dict[str, object]] = {
    "granite": {
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.4,
        "logits_scaling": 2.0,
    },
    "starcoder2": {
        "sliding_window": None,
        "residual_dropout": 0.0,
        "embedding_dropout": 0.0,
        "mlp_type": "default",
        "norm_type": "layer_norm",
    },
}
# attention beside layers that keep a state instead of keys and values
HYBRID = {"falcon_h1", "lfm2"}
METHODS = ["lora", "direft", "loreft"]


def make_base(architecture: str = "llama", **overrides: object) -> PreTrainedModel:
    """Returns a random float32 model in eval mode, the same for the same arguments."""
    common = GPT2 if architecture == "gpt2" else COMMON
    config = AutoConfig.for_model(
        architecture, **(common | (SPECIFIC | STATE_SPACE | OTHERS)[architecture] | overrides)
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    # Larger weights than the initialisation's, so that logits are far apart and greedy choices are not ties.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and "norm" not in name:
                parameter.mul_(3.0)
    return model


def make_config(method: str = "lora", **overrides: object) -> preft_hf.PreftConfig:
    """Returns a config whose new adapter is random instead of a no-op."""
    defaults: dict[str, object] = {"method": method, "r": 4, "init_weights": False, "task_type": "CAUSAL_LM"}
    return preft_hf.PreftConfig(**(defaults | overrides))  # type: ignore[arg-type]


def make_preft(
    base: PreTrainedModel, method: str = "lora", seed: int = 1, adapter_name: str = "default", **overrides: object
) -> PeftModel:
    """Returns the model with a random adapter attached, in eval mode; without the warning of experts left out."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "target_modules leaves out the experts", UserWarning)
        return get_peft_model(base, make_config(method, **overrides), adapter_name=adapter_name).eval()
