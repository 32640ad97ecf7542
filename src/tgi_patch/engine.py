"""The state of one patched server process: its settings, the loaded model's places, the adapters that it knows."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from preft_core.config import AdapterError
from preft_core.source import AdapterSource, find_adapter
from tgi_patch.control import ControlServer
from tgi_patch.places import SITE, UnsupportedModel, find_places, modules_of
from tgi_patch.registry import Registry, Ticket, UnknownAdapter
from tgi_patch.routing import TICKET, current, edit_block, prefill_rows, routed, visible, warm_route
from tgi_patch.settings import Settings, SettingsError

BASE_IDS = {"", "tgi", "__base_model__"}
"""Adapter ids that stand for the base model, beside the served model's own."""


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
        """For TGI's warm-up, whose prefill measures the memory that a forward needs."""
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
    registry = None
    if settings.active:
        _check_model(model)
        places = find_places(model.model, model.config, model.rank, model.world_size)
        sources = _sources(settings)
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


def _sources(settings: Settings) -> dict[str, AdapterSource]:
    """Reads the configs of the listed adapters, several at once, and says all faults together."""

    def find(item: tuple[str, str]) -> AdapterSource | str:
        try:
            return find_adapter(item[1])
        except AdapterError as error:
            return f"{item[0]!r}: {error}"

    with ThreadPoolExecutor(8) as threads:
        found = dict(zip(settings.adapters, threads.map(find, settings.adapters.items()), strict=True))
    faults = [fault for fault in found.values() if isinstance(fault, str)]
    if faults:
        raise AdapterError("adapters that cannot be had: " + "; ".join(faults))
    return {name: source for name, source in found.items() if isinstance(source, AdapterSource)}


def _check_model(model: Any) -> None:
    kind = type(model).__name__
    if kind != "FlashCausalLM":
        raise UnsupportedModel(
            f"TGI serves this model as {kind}, where PreFT adapters have no path: they are for text models that TGI "
            "serves as FlashCausalLM; unset PREFT_ADAPTERS, or PREFT_DISABLE=1 to serve the model alone"
        )
    from text_generation_server.models.globals import PREFIX_CACHING  # pyright: ignore[reportMissingImports]

    if PREFIX_CACHING:
        raise SettingsError(
            "PREFIX_CACHING is on, and TGI's prefix cache does not keep adapters apart: start with PREFIX_CACHING=0 "
            "in the launcher's environment, as `python -m tgi_patch serve` does"
        )
