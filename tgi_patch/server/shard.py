"""The state of one patched server process: settings, adapters, prefix cache, control socket."""

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from preft_core.hub.source import find_all
from tgi_patch.server.base_model import check_model, check_rope
from tgi_patch.server.control import ControlServer
from tgi_patch.server.known import Ticket
from tgi_patch.server.prefix_reuse import PrefixReuse, reserve_prefixes
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
from tgi_patch.server.target_modules import SITE, find_target_modules, modules_of
from tgi_patch.settings import BASE_IDS, Settings, check_ids


class Shard:
    """One server process of TGI. The functions of `layers`, which replace TGI's, call it.

    Args:
        settings: of this process
    Attributes:
        registry: of PreFT adapters; None before a model is attached, and if no adapters are served
        prefixes: None before warm-up, and if the prefix cache is off
    """

    def __init__(self, settings: Settings):
        self.settings = settings
        self.registry: Registry | None = None
        self.prefixes: PrefixReuse | None = None
        self._control: ControlServer | None = None
        self._base_ids = {*BASE_IDS, *settings.base_models}
        self._warming = False

    def attach(self, model: Any) -> None:
        """Finds a loaded model's target modules, allocates the slots and loads the listed adapters.

        Args:
            model: what TGI's `get_model_with_lora_adapters` returns
        Raises:
            AdapterError, UnsupportedModel, SettingsError: the model cannot serve the adapters.
        """
        settings = self.settings
        check_rope(getattr(model, "config", None), model.model_id)
        self._base_ids.add(model.model_id)
        if not settings.active:
            return
        check_model(model, settings)
        check_ids(settings.adapters, {model.model_id, *settings.base_models}, own_adapters())
        targets = find_target_modules(model.model, model.config, model.rank, model.world_size)
        sources = find_all(settings.adapters)
        registry = Registry(targets, settings, model.model_id, sources, device=model.device, dtype=model.dtype)
        for module, site in modules_of(targets):
            setattr(module, SITE, site)
            if site.endswith(".preft"):
                module.register_forward_hook(block_hook)
        self._control = ControlServer(settings.control, model.rank, registry)
        self.registry = registry

    def fixes(self, name: str) -> bool:
        """Returns whether a fault of TGI's all-token LoRA is fixed, see PREFT_LORA_FIXES."""
        return name in self.settings.fixes

    def ticket(self, request: Any) -> Ticket | None:
        """Returns a ticket for a request's PreFT adapter; None for the base model and TGI's own adapters.

        Raises:
            UnknownAdapter: no adapter has this id. TGI would serve the base model.
            ValueError: the router found the prompt in its prefix cache, which may hold another adapter's KV.
        """
        name, registry = request.adapter_id, self.registry
        if registry is not None:
            registry.requests += 1
            if request.cache_len > 0:
                raise ValueError(
                    "the router found this prompt in its prefix cache, which does not keep adapters apart: start it "
                    "with PREFIX_CACHING=0, as `python -m tgi_patch serve` does"
                )
        if name in self._base_ids or name in own_adapters():
            return None
        if registry is not None:
            return registry.ticket(name)
        if self.fixes("unknown"):
            raise UnknownAdapter(f"adapter {name!r} is not known; known are {', '.join(sorted(own_adapters()))}")
        return None

    def owner(self, request: Any, ticket: Ticket | None) -> str:
        """Returns the owner of the KV of a request's prompt. A key of the pool is never used for another adapter."""
        if ticket is not None:
            return f"preft:{ticket.key}"
        return "base" if request.adapter_id in self._base_ids else f"lora:{request.adapter_id}"

    def route(self, batch: Any) -> AbstractContextManager[Any]:
        """Returns a context for a batch's next forward, in which its route is current."""
        if self.registry is None:
            return nullcontext()
        if self._warming:
            return visible(warm_route(self.registry, sum(batch.input_lengths)))
        tickets = [getattr(criterion, TICKET, None) for criterion in batch.stopping_criterias]
        rows = prefill_rows(tickets, batch.cache_lengths, batch.input_lengths, batch.prompt_lengths)
        return routed(self.registry, rows, sum(batch.input_lengths)) if rows else nullcontext()

    @contextmanager
    def warming(self, model: Any) -> Iterator[None]:
        """A context for TGI's warm-up, which measures the memory of a prefill and captures CUDA graphs.

        Compiles the kernels and reserves the prefix cache first. Serves the control socket only afterwards: adding an
        adapter allocates pinned memory, which breaks a CUDA graph capture in another thread.
        """
        registry = self.registry
        if registry is None:
            yield
            return
        began = time.monotonic()
        if done := compile_kernels(registry):
            seconds = time.monotonic() - began
            print(f"preft: compiled the kernels by {done} ops in {seconds:.0f} s", file=sys.stderr, flush=True)
        if self.settings.prefix_tokens:
            self.prefixes = reserve_prefixes(model, self.settings.prefix_tokens)
            registry.prefixes = self.prefixes.cache
        self._warming = True
        try:
            yield
        finally:
            self._warming = False
        if self._control is not None:
            self._control.start()

    def keep_prefixes(self, batch: Any, before: list[bool]) -> None:
        """Caches the prompts whose prefill a forward finished.

        Args:
            before: which requests of the batch were in prefill before the forward
        """
        if self.prefixes is not None and not self._warming:
            self.prefixes.keep(batch, before)

    def close(self) -> None:
        """Closes the control socket."""
        if self._control is not None:
            self._control.close()


def block_hook(module: Any, args: Any, output: Any) -> Any:
    """A forward hook of decoder layers: DiReFT-P edits of the residual stream."""
    route = current()
    return None if route is None else edit_block(route, getattr(module, SITE), output)


def own_adapters() -> set[str]:
    """Returns the ids of TGI's LORA_ADAPTERS."""
    from text_generation_server.models.globals import get_adapter_to_index  # pyright: ignore[reportMissingImports]

    return set(get_adapter_to_index() or ())
