"""Counts the operations of a forward that reach PyTorch's dispatcher."""

import collections
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from preft_hf.forward.caches import cache_argument, cache_of


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def operations_of(model: Any, **inputs: Any) -> tuple[dict[str, int], Any]:
    """Returns the count of each operation in a forward of the model, by name, and the forward's output."""
    with torch.no_grad(), _Counting() as counting:
        output = model(**inputs, use_cache=True)
    return dict(counting.counts), output


def compare_operations(model: Any, input_ids: torch.Tensor) -> dict[str, int | bool]:
    """Returns operation counts of prefill and decode, adapted and base, and whether decode runs what the base runs.

    Args:
        model: a PreFT PeftModel in eval mode, with its adapter enabled
        input_ids: a prompt, int64 (1, length)
    """
    token = input_ids[:, -1:]
    prefill, output = operations_of(model, input_ids=input_ids)
    decode, _ = operations_of(model, input_ids=token, **cache_argument(cache_of(output)))
    with model.disable_adapter():
        base_prefill, output = operations_of(model, input_ids=input_ids)
        base_decode, _ = operations_of(model, input_ids=token, **cache_argument(cache_of(output)))
    return {
        "prefill": sum(prefill.values()),
        "prefill_base": sum(base_prefill.values()),
        "decode": sum(decode.values()),
        "decode_base": sum(base_decode.values()),
        "decode_is_base": decode == base_decode,
    }
