"""Continuous batching: `generate_batch`, whose forwards pack prompt and generated tokens of many requests."""

import copy
import functools
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from transformers.generation.continuous_batching.requests import RequestStatus

from preft_core.pool.layout import Bucket
from preft_core.pool.slots import BASE_NAME
from preft_core.rule.tokens import prefill_span
from preft_hf.forward.packed import PackedAdapters, SaltedTokens, changed
from preft_hf.forward.routing import RoutedSpan, Routing

WARMUP = "__warmup_"
"""Prefix of the ids of transformers' own requests, made to capture CUDA graphs. They have no adapter."""


class _Collected(threading.local):
    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] | None = None


class ContinuousBatching:
    """Replaces one model's `generate_batch` and `init_continuous_batching`."""

    def __init__(self, model: nn.Module, routing: Routing, original: Callable[[str], Callable[..., Any]]):
        self._model = model
        self._routing = routing
        self._original = original

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Returns transformers' manager. Its add_request takes adapter_name, its add_requests adapter_names.

        Raises:
            NotImplementedError: a compiled forward, or tensor parallel.
            RuntimeError: the model keeps a manager from before it had a PreFT adapter.
        """
        cached = self._model.__dict__.get("_cached_continuous_batching_manager")
        if cached is not None:
            if not isinstance(getattr(cached.add_request, "__self__", None), Requests):
                raise RuntimeError(
                    "the model keeps a continuous batching manager from before it had a PreFT adapter: call "
                    "destroy_cached_continuous_batching_manager() first"
                )
            return self._original("init_continuous_batching")(*args, **kwargs)
        given = kwargs.get("continuous_batching_config")
        if given is None and len(args) > 1:
            given = args[1]
        _check_config(given)
        manager = self._original("init_continuous_batching")(*args, **kwargs)
        if manager.distributed_helper.tp_size > 1:
            raise NotImplementedError("continuous batching with tensor parallel is not supported with a PreFT model")
        config = copy.copy(manager.continuous_batching_config)
        # A graph replays the rows that were prefill when it was captured. A decode graph has the base model only.
        config.use_cuda_graph = (False, config.cuda_graph_booleans[1])
        config.varlen_compile_config = config.decode_compile_config = None
        manager.continuous_batching_config = config
        Requests(manager, self._routing)
        return manager

    def generate_batch(
        self, inputs: list[list[int]], *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> Any:
        """Returns transformers' outputs by request id; adapter_names gives one name per prompt, in their order.

        Raises:
            ValueError: unknown names, or not as many as prompts.
        """
        names = self._routing.for_requests(adapter_names, len(inputs), self._model.training) if inputs else []
        with self._routing.declare(names or None):
            return self._original("generate_batch")(inputs, *args, **kwargs)


class Requests:
    """Passes the adapter of each request of one manager to its forwards and to the prefix cache.

    Replaces methods of the manager and of its parts:

        add_request, add_requests        take and check the adapter of each request
        _create_batch_processor          replaces the methods below on each new processor
        schedule_batch                   keeps a last chunk of one prompt token out of the graph of decode forwards
        _get_waiting_candidates          starts requests only if their adapters fit into the pool's slots
        prepare_batch_tensors            notes which tokens of the batch are prompt, and of which adapter
        get_model_kwargs                 passes that to the forward
        search_prefix_match,
        mark_complete_blocks             hash blocks together with the adapter
    """

    def __init__(self, manager: Any, routing: Routing):
        self._manager, self._routing = manager, routing
        self._add_request, self._add_requests = manager.add_request, manager.add_requests
        self._create = manager._create_batch_processor
        self._collected = _Collected()
        self._processor: Any = None
        self._packed: PackedAdapters | None = None
        # A request carries its adapter's name where its forks and retries find it.
        manager.logit_processor.supported_keys["adapter_name"] = str
        manager.add_request, manager.add_requests = self.add_request, self.add_requests
        manager._create_batch_processor = self.create_batch_processor

    def add_request(self, input_ids: list[int], *args: Any, adapter_name: str | None = None, **kwargs: Any) -> Any:
        """Adds a request with its adapter, by default the model's active one."""
        if self._collected.calls is not None:
            self._collected.calls.append({"input_ids": input_ids, **kwargs})
            return None
        if str(kwargs.get("request_id", args[0] if args else "")).startswith(WARMUP):
            raise ValueError(f"request ids that begin with {WARMUP!r} are transformers' own: choose another")
        names = None if adapter_name is None else [adapter_name]
        (name,) = self._routing.for_requests(names, 1, self._manager.model.training)
        return self._add_request(input_ids, *args, adapter_name=name, **kwargs)

    def add_requests(
        self, inputs: list[list[int]], *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> list[str]:
        """Adds requests with one adapter name per prompt."""
        given = self._routing.declared if adapter_names is None else adapter_names
        names = self._routing.for_requests(given, len(inputs), self._manager.model.training) if inputs else []
        # transformers numbers the prompts, sorts them and adds them one by one.
        self._collected.calls = []
        try:
            ids = self._add_requests(inputs, *args, **kwargs)
            calls = self._collected.calls
        finally:
            self._collected.calls = None
        name_of = dict(zip(ids, names, strict=True))
        for call in calls:
            self._add_request(adapter_name=name_of[call["request_id"]], **call)
        return ids

    def create_batch_processor(self) -> Any:
        """Returns a batch processor whose scheduler, inputs and cache know the adapters of the requests."""
        processor = self._create()
        if processor is self._processor:
            return processor
        self._processor = processor
        ios, cache = processor.inputs_and_outputs, processor.cache
        _wrap(processor.scheduler, "schedule_batch", self._schedule)
        _wrap(processor.scheduler, "_get_waiting_candidates", self._fitting)
        _wrap(ios, "prepare_batch_tensors", self._prepare)
        _wrap(ios, "get_model_kwargs", self._model_arguments)
        _wrap(cache, "search_prefix_match", self._search)
        for allocator in cache.cache_allocators.values():
            _wrap(allocator, "mark_complete_blocks", self._mark)
        return processor

    def _schedule(self, original: Callable[..., Any], *args: Any) -> Any:
        requests, decode_only, num_tokens, num_read = original(*args)
        # The graph of decode forwards has no adapter, so a last chunk of one prompt token must not use it.
        decode_only = decode_only and not any(_span(request) for request in requests or [])
        return requests, decode_only, num_tokens, num_read

    def _fitting(self, original: Callable[..., Any]) -> list[Any]:
        """Returns the waiting requests whose adapters fit into the slots beside those of the running prefills."""
        pool, held = self._routing.pool, self._routing.held()
        active = self._processor.scheduler.active_requests.values()
        taken = {_name(state) for state in active if state.status == RequestStatus.PREFILLING} - held - {BASE_NAME}
        fitting = []
        for state in original():
            name = _name(state)
            if name not in held and name != BASE_NAME and name not in taken:
                try:
                    bucket = self._bucket(name)
                except ValueError as error:
                    self._fail(state, error)
                    continue
                assert pool is not None
                if sum(pool.bucket(other) == bucket for other in taken) >= pool.buckets[bucket]:
                    continue
                taken.add(name)
            fitting.append(state)
        return fitting

    def _bucket(self, name: str) -> Bucket:
        if self._routing.pool is None:
            raise ValueError(f"adapter {name!r} was removed with the PreftPool while its request waited")
        return self._routing.pool.bucket(name)

    def _fail(self, state: Any, error: Exception) -> None:
        """Ends one waiting request with an error; the others continue."""
        scheduler = self._processor.scheduler
        scheduler.waiting_requests.pop(state.request_id, None)
        scheduler.waiting_requests_order.remove(state.request_id)
        self._processor._handle_request_error(error, state)

    def _prepare(self, original: Callable[..., Any], requests_in_batch: list[Any], *args: Any, **kwargs: Any) -> None:
        spans, keys, first = [], {}, 0
        for request in requests_in_batch:
            name, span = _name(request.state), _span(request)
            if span is not None and name != BASE_NAME:
                key = keys.setdefault(name, self._routing.adapter_key(name))
                if request.state.__dict__.setdefault("preft_key", key) != key:
                    raise RuntimeError(changed(name))
                spans.append(RoutedSpan(name, first + span[0], first + span[1]))
            first += request.query_length
        self._packed = PackedAdapters(spans, keys, self._routing) if spans else None
        original(requests_in_batch, *args, **kwargs)

    def _model_arguments(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        arguments, packed = original(*args, **kwargs), self._packed
        if packed is None:
            return {**arguments, "prefill_mask": False}
        return {**arguments, "prefill_mask": True, "adapter_names": packed}

    def _search(self, original: Callable[..., Any], request_id: str, prompt_ids: list[int]) -> int:
        return original(request_id, self._salted(request_id, prompt_ids))

    def _mark(self, original: Callable[..., Any], request_id: str, token_ids: list[int], num_new: int) -> None:
        original(request_id, self._salted(request_id, token_ids), num_new)

    def _salted(self, request_id: str, tokens: list[int]) -> SaltedTokens:
        scheduler = self._processor.scheduler
        state = scheduler.active_requests.get(request_id) or scheduler.waiting_requests[request_id]
        name = _name(state)
        key = b"" if name == BASE_NAME else state.__dict__.get("preft_key")
        if key is None:
            key = state.__dict__["preft_key"] = self._routing.adapter_key(name)
        return SaltedTokens(tokens, key, _prompt_length(state))


def _check_config(config: Any) -> None:
    if config is None:
        return
    if config.varlen_compile_config is not None or config.decode_compile_config is not None:
        raise NotImplementedError(
            "continuous batching with a compile config is not supported with a PreFT model: leave "
            "varlen_compile_config and decode_compile_config out"
        )
    if config.cuda_graph_booleans[0]:
        warnings.warn(
            "use_cuda_graph is used for decode forwards only: a graph of a forward with prompt tokens would fix "
            "their adapters",
            stacklevel=4,
        )


def _wrap(owner: Any, name: str, replacement: Callable[..., Any]) -> None:
    setattr(owner, name, functools.partial(replacement, getattr(owner, name)))


def _name(state: Any) -> str:
    return BASE_NAME if state.request_id.startswith(WARMUP) else state.logit_processor_kwargs["adapter_name"]


def _prompt_length(state: Any) -> int:
    # A preempted request keeps what it has generated after its prompt.
    return state._true_initial_tokens or len(state.initial_tokens)


def _span(request: Any) -> tuple[int, int] | None:
    """Returns which of a request's tokens in the next forward are prompt tokens, if any, by their position."""
    state = request.state
    if state.request_id.startswith(WARMUP):
        return None
    begin, end = prefill_span(state.position_offset, request.query_length, _prompt_length(state))
    return (begin, end) if end > begin else None
