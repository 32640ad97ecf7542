"""Tries a saved adapter on its base model: it fits, it changes the prompt, and decoding is the base model's."""

import contextlib
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from preft_core.format.adapter import AdapterError
from preft_hf.forward.caches import cache_argument, cache_of
from preft_hf.training.plain import plain_generation
from preft_hf.tuner.pending import borrowed

NUM_TOKENS = 8
TRIAL_NAME = "on-trial"


@torch.no_grad()
def try_adapter(directory: str | Path, base: nn.Module) -> dict[str, Any]:
    """Returns what the adapter does to a random prompt. The base model is as it was afterwards.

    Compares the tokens of `generate` with a loop that runs the prompt with the adapter and the rest without it. Both
    decode greedily, whatever the base model's generation_config.json says.

    Args:
        base: the causal language model in eval mode
    Raises:
        AdapterError: the adapter does not fit the base, gives values that are not finite, or leaks into decoding.
    """
    with borrowed(base):
        model: Any = PeftModel.from_pretrained(base, directory, TRIAL_NAME)  # pyright: ignore[reportArgumentType]
        return _tried(model.eval(), directory)


def _tried(model: Any, directory: str | Path) -> dict[str, Any]:
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (1, 16), generator=torch.Generator().manual_seed(0)).to(model.device)
    with model.disable_adapter():
        plain = model(input_ids=ids).logits
    adapted = model(input_ids=ids, prefill_mask=True).logits
    if not torch.isfinite(adapted).all():
        raise AdapterError(f"{directory}: the adapter makes logits that are not finite on this base model")
    with plain_generation(model):
        found = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NUM_TOKENS,
            min_new_tokens=NUM_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0, ids.shape[1] :]
    expected = _two_phases(model, ids)
    if found.tolist() != expected:
        raise AdapterError(
            f"{directory}: generate gave tokens {found.tolist()} and the two-phase loop {expected}: the adapter acts "
            "on decode tokens; do not serve it, and report this"
        )
    return {"largest_change_of_a_logit": float((adapted - plain).abs().max()), "tokens_compared": NUM_TOKENS}


def _two_phases(model: Any, ids: Tensor) -> list[int]:
    output = model(input_ids=ids, prefill_mask=True, use_cache=True)
    tokens = [int(output.logits[0, -1].argmax())]
    for _ in range(NUM_TOKENS - 1):
        with contextlib.ExitStack() as without:
            without.enter_context(model.disable_adapter())
            last = torch.tensor([[tokens[-1]]], device=ids.device)
            output = model(input_ids=last, **cache_argument(cache_of(output)), use_cache=True)
        tokens.append(int(output.logits[0, -1].argmax()))
    return tokens
