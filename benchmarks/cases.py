"""The cases: forwards of the base model, and of the same model with a prefill-only adapter."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor
from transformers import DynamicCache

from preft_hf import PreftConfig
from preft_hf.forward.caches import cache_argument

TOLERANCE = 1e-3
"""Largest allowed difference of logits to the oracle: float32 over 30 layers. The adapter changes them far more."""


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        phase: "prefill" (one forward of the prompts), "decode" (num_steps forwards of one token a row) or "generate"
        prompt_length, batch_size: tokens and rows, random token ids
        num_steps: decode forwards in one timing
        repeat_factor: short timings are repeated more often
    """

    name: str
    phase: str
    method: str
    rank: int
    batch_size: int
    prompt_length: int
    num_steps: int = 0
    repeat_factor: int = 1


CASES = [
    Case("decode, batch 1", "decode", "lora", 16, 1, 128, 2, 8),
    Case("decode, batch 16", "decode", "lora", 16, 16, 128, 1, 8),
    Case("decode, batch 1, DiReFT-P", "decode", "direft", 16, 1, 128, 2, 8),
    Case("decode, batch 16, DiReFT-P", "decode", "direft", 16, 16, 128, 1, 8),
    Case("prefill, 1 x 512", "prefill", "lora", 16, 1, 512),
    Case("prefill, 16 x 64", "prefill", "lora", 16, 16, 64),
    Case("prefill, 1 x 512, DiReFT-P", "prefill", "direft", 16, 1, 512),
    Case("prefill, 16 x 64, DiReFT-P", "prefill", "direft", 16, 16, 64),
    Case("generate 1 x (128 + 32)", "generate", "lora", 16, 1, 128, 32),
]


def models(base: Any, method: str, rank: int) -> tuple[Any, Any]:
    """Returns the PreFT model, with a random adapter on a copy of the base, and an oracle with it on every token.

    The oracle shares no code with preft_hf: LoRA merged into the weights, DiReFT as plain forward hooks.
    """
    torch.manual_seed(0)
    config = PreftConfig(method=method, r=rank, init_weights=False, task_type="CAUSAL_LM")  # type: ignore[arg-type]
    model = get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "preft_B" in name:
                parameter.mul_(0.05)
    oracle = copy.deepcopy(base)
    scaling = config.scaling
    for path, module in model.get_base_model().named_modules():
        if "preft_A" not in module._modules:
            continue
        a, b = module.preft_A["default"], module.preft_B["default"]
        if method == "lora":
            oracle.get_submodule(path).weight.data += scaling * b.data @ a.data
        else:
            bias = module.preft_bias["default"].data
            oracle.get_submodule(path.removesuffix(".preft")).register_forward_hook(
                _edit(a.data, b.data, bias, scaling)
            )
    return model, oracle


def _edit(a: Tensor, b: Tensor, bias: Tensor, scaling: float) -> Callable[..., Tensor]:
    def hook(module: Any, args: Any, output: Tensor) -> Tensor:
        return output + scaling * (output @ a.T + bias) @ b.T

    return hook


@torch.no_grad()
def prepared(case: Case, base: Any, model: Any, oracle: Any) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Compares the results with the oracle and returns the callables to time, base first.

    Raises:
        RuntimeError: a wrong result, which is not timed.
    """
    ids = torch.randint(0, base.config.vocab_size, (case.batch_size, case.prompt_length))
    tokens = torch.randint(0, base.config.vocab_size, (case.batch_size, 1))
    cache = DynamicCache(config=base.config)
    expected = oracle(input_ids=ids, **cache_argument(cache), use_cache=True).logits[:, -1]
    found = model(input_ids=ids, use_cache=True).logits[:, -1]
    _compare(found, expected, "prefill")
    if (found - base(input_ids=ids).logits[:, -1]).abs().max() < 100 * TOLERANCE:
        raise RuntimeError("the adapter changes nothing, so the comparison would prove nothing")
    decoded = model(input_ids=tokens, **cache_argument(copy.deepcopy(cache)), prefill_mask=False).logits
    _compare(decoded, base(input_ids=tokens, **cache_argument(copy.deepcopy(cache))).logits, "decode", 0.0)
    if case.phase == "prefill":
        return (lambda: base(input_ids=ids, use_cache=True)), (lambda: model(input_ids=ids, use_cache=True))
    if case.phase == "generate":
        settings = {"max_new_tokens": case.num_steps, "min_new_tokens": case.num_steps, "do_sample": False}
        mask = torch.ones_like(ids)
        return (
            lambda: base.generate(input_ids=ids, attention_mask=mask, **settings),
            lambda: model.generate(input_ids=ids, attention_mask=mask, **settings),
        )
    return _decoding(base, cache, tokens, case.num_steps), _decoding(
        model, cache, tokens, case.num_steps, prefill_mask=False
    )


def _decoding(model: Any, cache: DynamicCache, tokens: Tensor, num_steps: int, **inputs: Any) -> Callable[[], None]:
    length = cache.get_seq_length()
    own = copy.deepcopy(cache)

    def run() -> None:
        for _ in range(num_steps):
            model(input_ids=tokens, **cache_argument(own), use_cache=True, **inputs)
        own.crop(-(own.get_seq_length() - length))

    return run


def _compare(found: Tensor, expected: Tensor, phase: str, tolerance: float = TOLERANCE) -> None:
    difference = float((found - expected).abs().max())
    if difference > tolerance:
        raise RuntimeError(
            f"{phase} logits differ by {difference:.2e} (allowed {tolerance}): a wrong result is not timed"
        )
