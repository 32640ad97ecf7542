"""The KV cache among a forward's arguments and outputs: transformers 5.24 renamed it."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

# of 5.24 and later, before, of state-space models before, and of RWKV
_NAMES = ("cache", "past_key_values", "cache_params", "state")
_NAME = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"


def cache_of(values: Mapping[str, Any]) -> Any:
    """Returns the cache among a model's arguments or outputs, None if there is none.

    Without its cache every forward of a custom loop would look like the first of a prompt. So a cache under an unknown
    name is found by its class.
    """
    for name in _NAMES:
        if values.get(name) is not None:
            return values[name]
    return next((value for value in values.values() if isinstance(value, Cache)), None)


def cache_of_output(output: Any) -> Any:
    """Returns the cache among what a model or its generate returns, None if there is none."""
    if isinstance(output, Mapping):
        return cache_of(output)
    return next((value for value in output if isinstance(value, Cache)), None) if isinstance(output, tuple) else None


def cache_argument(cache: Any) -> dict[str, Any]:
    """Returns the keyword argument that gives a model a cache, by the name that the installed transformers has."""
    return {_NAME: cache}


def cached_length(cache: Any) -> int | None:
    """Returns the tokens that a KV cache holds; 0 for no cache, None for one without a length. May wait for a device.

    Not the tokens that the request has had: caches evict and compress.
    """
    if cache is None:
        return 0
    if not hasattr(cache, "get_seq_length"):
        # RWKV's list of tensors
        return None
    try:
        return int(cache.get_seq_length())
    except ValueError:
        # transformers' answer for a cache of state-space layers alone
        return None
