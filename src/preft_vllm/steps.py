"""Replacements of vLLM's functions that every step calls: scheduler, block hashes, model runners.

Each takes the original function and returns the new one; `patches` is the table. Arguments are duck-typed and vLLM is
not imported, so that this logic is tested without it.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from preft_vllm.rule import prefill_rows, sampled_ids, token_ids
from preft_vllm.stamp import is_stamped, stamp_of

ACTIVE, STATES = "__preft_active__", "__preft_states__"
PREFILL_ONLY, UNCOUNTED = "__preft_only__", "__preft_uncounted__"


def schedule(original: Callable[..., Any]) -> Callable[..., Any]:
    """Counts an adapter against max_loras only during prefill.

    During the call, a decoding request has a stand-in for its adapter with id 0, which vLLM does not count. All other
    attributes, such as the name in KV events, are the adapter's.
    """

    @functools.wraps(original)
    def scheduled(self: Any, *args: Any, **kwargs: Any) -> Any:
        hidden = [
            request
            for request in self.running
            if request.num_computed_tokens >= request.num_prompt_tokens and is_stamped(request.lora_request)
        ]
        for request in hidden:
            request.lora_request = _uncounted(request)
        try:
            return original(self, *args, **kwargs)
        finally:
            for request in hidden:
                request.lora_request = request.lora_request.counted

    return scheduled


class _Uncounted:
    """An adapter that does not count against max_loras. vLLM's events take the id from `adapter_id`."""

    lora_int_id = 0

    def __init__(self, lora_request: Any):
        self.counted = lora_request

    def __getattr__(self, name: str) -> Any:
        return getattr(self.counted, name)


def _uncounted(request: Any) -> _Uncounted:
    """Returns the stand-in for a request's adapter, made once."""
    found = getattr(request, UNCOUNTED, None)
    if found is None or found.counted is not request.lora_request:
        found = _Uncounted(request.lora_request)
        setattr(request, UNCOUNTED, found)
    return found


def block_keys(original: Callable[..., Any]) -> Callable[..., Any]:
    """Keys a block of KV by the adapter's content and by the number of its prefill tokens.

    A block that decode wrote, in part or whole, is never reused for a prompt with the same tokens.
    """

    @functools.wraps(original)
    def keys(request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int) -> tuple[Any, int]:
        stamp = stamp_of(request.lora_request)
        if stamp is None:
            return original(request, start_token_idx, end_token_idx, start_mm_idx)
        found, next_mm_idx = original(request, start_token_idx, end_token_idx, start_mm_idx)
        others = [key for key in found or () if key[0] != "lora"]
        own: list[tuple[str, ...]] = [("lora", request.lora_request.lora_name, stamp.fingerprint)]
        if end_token_idx > request.num_prompt_tokens:
            rows = max(request.num_prompt_tokens - start_token_idx, 0)
            own.append(("preft", f"{rows} prefill rows"))
        return (*own, *others), next_mm_idx

    return keys


def make_lora_inputs_v1(original: Callable[..., Any]) -> Callable[..., Any]:
    """The position rule in the V1 runner: adapter ids of tokens and sampled rows, and the adapters to load."""

    @functools.wraps(original)
    def inputs(self: Any, num_scheduled_tokens: Any, num_sampled_tokens: Any) -> Any:
        requests = self.lora_id_to_lora_request
        stamped = {number for number, request in requests.items() if is_stamped(request)}
        if not stamped:
            setattr(self, ACTIVE, None)
            return original(self, num_scheduled_tokens, num_sampled_tokens)
        n = self.num_reqs
        mapping = self.request_lora_mapping[:n]
        only = [number in stamped for number in mapping.tolist()]
        scheduled = np.asarray(num_scheduled_tokens)[:n]
        prefill = prefill_rows(scheduled, self.num_computed_tokens_cpu[:n], self.num_prompt_tokens[:n])
        tokens = token_ids(mapping, only, scheduled, prefill)
        sampled = sampled_ids(mapping, only, scheduled, prefill, np.asarray(num_sampled_tokens)[:n])
        # not a set, where requests of one name are equal: a name may have two contents while one is replaced
        active = [requests[number] for number in sorted(set(tokens.tolist())) if number]
        setattr(self, ACTIVE, len(active))
        return tuple(sampled.tolist()), tuple(tokens.tolist()), active

    return inputs


def dispatch_v1(original: Callable[..., Any]) -> Callable[..., Any]:
    """Dispatches a step without adapted rows to the CUDA graph without LoRA."""

    @functools.wraps(original)
    def dispatched(self: Any, *args: Any, **kwargs: Any) -> Any:
        active = getattr(self.input_batch, ACTIVE, None)
        # graphs without LoRA are captured only with this setting
        separate = getattr(self.compilation_config, "cudagraph_specialize_lora", False)
        if active is not None and separate and kwargs.get("force_num_active_loras") is None:
            kwargs["force_num_active_loras"] = active
        return original(self, *args, **kwargs)

    return dispatched


def add_request_v2(original: Callable[..., Any]) -> Callable[..., Any]:
    """Records in the V2 runner, by a request's index, whether its adapter is prefill-only."""

    @functools.wraps(original)
    def added(self: Any, req_id: Any, req_index: Any, lora_request: Any) -> None:
        original(self, req_id, req_index, lora_request)
        _prefill_only(self)[req_index] = is_stamped(lora_request)

    return added


def make_lora_inputs_v2(original: Callable[..., Any]) -> Callable[..., Any]:
    """The position rule in the V2 runner. `prompt_len` decides: `prefill_len` includes recomputed generated tokens."""

    @functools.wraps(original)
    def inputs(self: Any, req_ids: Any, idx_mapping: Any, num_scheduled_tokens: Any) -> Any:
        index = np.asarray(idx_mapping)[: len(req_ids)]
        only = _prefill_only(self)[index]
        if not only.any():
            return original(self, req_ids, idx_mapping, num_scheduled_tokens)
        states, scheduled = _states(self), np.asarray(num_scheduled_tokens)[: len(req_ids)]
        prefill = prefill_rows(scheduled, states.num_computed_tokens_np[index], states.prompt_len.np[index])
        ids = self.lora_ids[index]
        tokens = token_ids(ids, only, scheduled, prefill)
        sampled = sampled_ids(ids, only, scheduled, prefill, np.ones_like(scheduled))
        return tuple(sampled.tolist()), tuple(tokens.tolist()), _active_v2(self, req_ids, index)

    return inputs


def active_loras_v2(original: Callable[..., Any]) -> Callable[..., Any]:
    """The adapters of a step of the V2 runner: prefill-only ones only during prefill."""

    @functools.wraps(original)
    def active(self: Any, req_ids: Any) -> Any:
        if not _prefill_only(self).any():
            return original(self, req_ids)
        number = _states(self).req_id_to_index
        return _active_v2(self, req_ids, np.fromiter((number[req_id] for req_id in req_ids), np.int64, len(req_ids)))

    return active


def _active_v2(lora_state: Any, req_ids: Any, index: Any) -> list[Any]:
    states = _states(lora_state)
    decodes = states.num_computed_tokens_np[index] >= states.prompt_len.np[index]
    rows = np.flatnonzero((lora_state.lora_ids[index] > 0) & ~(decodes & _prefill_only(lora_state)[index]))
    requests = [lora_state.lora_requests[req_ids[row]] for row in rows.tolist()]
    # by id, since requests of one name are equal
    return list({request.lora_int_id: request for request in requests}.values())


def _prefill_only(lora_state: Any) -> Any:
    """Returns whether the adapter of each request is prefill-only: bool, (requests,), by the request's index."""
    found = getattr(lora_state, PREFILL_ONLY, None)
    if found is None:
        found = np.zeros(len(lora_state.lora_ids), bool)
        setattr(lora_state, PREFILL_ONLY, found)
    return found


def _states(lora_state: Any) -> Any:
    states = getattr(lora_state, STATES, None)
    if states is None:
        raise RuntimeError(
            "the model runner's request states are unknown, and with them the end of a prompt: this runner cannot "
            "serve PreFT adapters"
        )
    return states
