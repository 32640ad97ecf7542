"""The methods that are compared: all-token LoRA by PEFT, and the two prefill-only methods, on the same layers."""

from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from preft_hf import PreftConfig

METHODS = ("lora", "lora-p", "direft-p")
NAMES = {"lora": "all-token LoRA", "lora-p": "LoRA-P", "direft-p": "DiReFT-P"}
RANKS = (1, 4, 16, 64)
LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2)


def adapted(base: Any, method: str, rank: int, seed: int, **options: Any) -> Any:
    """Returns a PeftModel around the base with a new float32 adapter of the method.

    Args:
        options: further fields of the method's config
    Raises:
        ValueError: an unknown method.
    """
    torch.manual_seed(seed)
    if method == "lora":
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    elif method in METHODS:
        name: Any = {"lora-p": "lora", "direft-p": "direft"}[method]
        config = PreftConfig(method=name, r=rank, task_type="CAUSAL_LM", **options)
    else:
        raise ValueError(f"method is {method!r}: give one of {', '.join(METHODS)}")
    return get_peft_model(base, config)
