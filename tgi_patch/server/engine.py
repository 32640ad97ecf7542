"""The state of one patched server process: its settings, the loaded model's places, the adapters that it knows."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from preft_core.hub.source import find_all
from tgi_patch.server.base_model import check_model, check_rope
from tgi_patch.server.control import ControlServer
from tgi_patch.server.known import Ticket
from tgi_patch.server.prefixes import OWNER, Found, PrefixCache, num_blocks
from tgi_patch.server.registry import Registry, UnknownAdapter
from tgi_patch.server.routing import (
    TICKET,
    compile_kernels,
    current,
    edit_block,
    prefill_rows,
    routed,
    visible,
    warm_route,
)
from tgi_patch.server.target_modules import SITE, find_places, modules_of
from tgi_patch.settings import BASE_IDS, Settings, check_ids


class Served:
    """A model that is being served.

    Args:
        settings: of this process
        model_id: what TGI was told to serve
        registry: of PreFT adapters; None where none are served
    """

    def __init__(self, settings: Settings, model_id: str, registry: Registry | None):
        self.settings = settings
        self.registry = registry
        self._base_ids = {*BASE_IDS, model_id, *settings.base_models}
        self._warming = False
        self._model: Any = None

    def reserve_prefixes(self, model: Any) -> None:
        """Allocates the blocks of the prefix cache, if one is wanted, before TGI sizes its own from what is left.

        Raises:
            RuntimeError: they do not fit.
        """
        if self.registry is None or not self.settings.prefix_tokens:
            return
        from text_generation_server.models.globals import BLOCK_SIZE  # pyright: ignore[reportMissingImports]

        blocks = num_blocks(self.settings.prefix_tokens, BLOCK_SIZE)
        sizes = (model.num_layers, model.num_kv_heads, model.head_size)
        try:
            model.init_kv_cache(blocks, *sizes, model.kv_cache_dtype, model.device)
        except torch.OutOfMemoryError as error:
            raise RuntimeError(
                f"the KV of PREFT_PREFIX_TOKENS={self.settings.prefix_tokens} tokens does not fit beside the model: "
                "lower it"
            ) from error
        self._model = model
        layers, model.kv_cache = [(layer.key, layer.value) for layer in model.kv_cache], []
        self.registry.prefixes = PrefixCache(layers, BLOCK_SIZE)

    def owner(self, request: Any, ticket: Ticket | None) -> str:
        """Returns whose KV a request's prompt makes. Keys of the pool are never used again for another adapter."""
        if ticket is not None:
            return f"preft:{ticket.key}"
        return "base" if request.adapter_id in self._base_ids else f"lora:{request.adapter_id}"

    def find_prefixes(self, requests: Sequence[Any], tickets: Sequence[Ticket | None], inputs: Any) -> list[Found]:
        """Finds the beginnings of prompts in the prefix cache, and tells the requests that they need not be computed.

        Not for a request that wants the prompt's log-probabilities, nor for one without blocks, as in warm-up.

        Args:
            inputs: the token ids of each request
        """
        prefixes = None if self.registry is None else self.registry.prefixes
        if prefixes is None:
            return []
        everything = []
        for request, ticket, tokens in zip(requests, tickets, inputs, strict=True):
            found = Found()
            if request.blocks and not request.prefill_logprobs:
                found = prefixes.find(self.owner(request, ticket), tokens)
                request.cache_len = found.num_tokens
                if request.HasField("chunk_len"):
                    request.chunk_len = min(request.chunk_len, len(tokens) - found.num_tokens)
            everything.append(found)
        return everything

    def fill_prefixes(self, batch: Any, found: Sequence[Found]) -> None:
        """Copies what was found into the blocks of a batch's requests."""
        if self.registry is not None and self.registry.prefixes is not None:
            for beginning, blocks in zip(found, batch.block_tables, strict=True):
                self.registry.prefixes.fill(beginning, self._model.kv_cache, blocks)

    def keep_prefixes(self, batch: Any, before: Sequence[bool]) -> None:
        """Keeps the prompts that a forward finished.

        Args:
            before: which requests of the batch were in prefill before the forward
        """
        if self._warming or self.registry is None or self.registry.prefixes is None:
            return
        for i, (began, goes_on) in enumerate(zip(before, batch.prefilling_mask, strict=True)):
            owner = getattr(batch.stopping_criterias[i], OWNER, None)
            if began and not goes_on and owner is not None:
                tokens = batch.all_input_ids[i][: batch.prompt_lengths[i]]
                self.registry.prefixes.keep(owner, tokens, self._model.kv_cache, batch.block_tables[i])

    def ticket(self, request: Any) -> Ticket | None:
        """Returns a hold on a request's PreFT adapter; None for the base model and TGI's own adapters.

        Raises:
            UnknownAdapter: nobody knows this id. TGI would serve the base model.
            ValueError: the request's prompt was found in a prefix cache, which may hold another adapter's KV.
        """
        if self.registry is not None and request.cache_len > 0:
            raise ValueError(
                "the router found this prompt in its prefix cache, which does not keep adapters apart: start it with "
                "PREFIX_CACHING=0, as `python -m tgi_patch serve` does"
            )
        if self.registry is not None:
            self.registry.requests += 1
        name = request.adapter_id
        if name in self._base_ids or name in _own_adapters():
            return None
        if self.registry is not None:
            return self.registry.ticket(name)
        if "unknown" in self.settings.fixes:
            raise UnknownAdapter(f"adapter {name!r} is not known; known are {', '.join(sorted(_own_adapters()))}")
        return None

    def route(self, batch: Any) -> AbstractContextManager[Any]:
        """Returns a context in which the layers see the route of a batch's next forward."""
        if self.registry is None:
            return nullcontext()
        if self._warming:
            return visible(warm_route(self.registry, sum(batch.input_lengths)))
        tickets = [getattr(criterion, TICKET, None) for criterion in batch.stopping_criterias]
        rows = prefill_rows(tickets, batch.cache_lengths, batch.input_lengths, batch.prompt_lengths)
        return routed(self.registry, rows, sum(batch.input_lengths)) if rows else nullcontext()

    @contextmanager
    def warming(self) -> Iterator[None]:
        """For TGI's warm-up, whose prefill measures the memory of a forward. Compiles the kernels before it."""
        if self.registry is not None:
            began = time.monotonic()
            if done := compile_kernels(self.registry):
                seconds = time.monotonic() - began
                print(f"preft: compiled the kernels by {done} ops in {seconds:.0f} s", file=sys.stderr, flush=True)
        self._warming = True
        try:
            yield
        finally:
            self._warming = False


class _Process:
    settings = Settings()
    served: Served | None = None
    control: ControlServer | None = None


def configure(settings: Settings) -> None:
    """Sets what this process was asked to do, before the model is loaded."""
    _Process.settings = settings


def served() -> Served | None:
    """Returns the model that this process serves, None before it is loaded."""
    return _Process.served


def fixes(name: str) -> bool:
    """Returns whether a fault of TGI is to be mended."""
    return name in _Process.settings.fixes


def attach(model: Any) -> Served:
    """Finds a loaded TGI model's places, allocates the slots, checks the listed adapters, opens the control socket.

    Args:
        model: what `get_model_with_lora_adapters` returns
    Raises:
        AdapterError, UnsupportedModel, SettingsError: the model cannot serve what was asked for. Nothing is attached.
    """
    settings = _Process.settings
    check_rope(getattr(model, "config", None), model.model_id)
    registry = None
    if settings.active:
        check_model(model, settings)
        check_ids(settings.adapters, {model.model_id, *settings.base_models}, _own_adapters())
        places = find_places(model.model, model.config, model.rank, model.world_size)
        sources = find_all(settings.adapters)
        registry = Registry(places, settings, model.model_id, sources, device=model.device, dtype=model.dtype)
        for module, site in modules_of(places):
            setattr(module, SITE, site)
            if site.endswith(".preft"):
                module.register_forward_hook(block_hook)
        _Process.control = ControlServer(settings.control, model.rank, registry)
        _Process.control.start()
    _Process.served = Served(settings, model.model_id, registry)
    return _Process.served


def block_hook(module: Any, args: Any, output: Any) -> Any:
    """A forward hook of decoder layers: DiReFT-P edits of the residual stream."""
    route = current()
    return None if route is None else edit_block(route, getattr(module, SITE), output)


def detach() -> None:
    """Forgets the model and closes the control socket."""
    control, _Process.control = _Process.control, None
    _Process.served = None
    if control is not None:
        control.close()


def _own_adapters() -> set[str]:
    """Returns the ids of TGI's LORA_ADAPTERS."""
    from text_generation_server.models.globals import get_adapter_to_index  # pyright: ignore[reportMissingImports]

    return set(get_adapter_to_index() or ())
