"""The hooks that set the phase of each forward, and all else that PreFT attaches to a model besides its layers."""

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from preft_core.pool.slots import SlotPool
from preft_hf.forward.cache_record import Owners, check_owners, drop_if_emptied, record_owners
from preft_hf.forward.caches import cache_of, cache_of_output
from preft_hf.forward.decision import given_phase, inferred_phase
from preft_hf.forward.generation import PromptBoundary
from preft_hf.forward.labels import LabelsRule
from preft_hf.forward.packed import PackedAdapters
from preft_hf.forward.routing import Routing, RowAdapters
from preft_hf.layers.calls import Calls
from preft_hf.layers.checkpointing import checkpointed_modules, keep_phase_in_checkpoints
from preft_hf.layers.linear import PreftLayer
from preft_hf.layers.per_thread import PerThread, untraced
from preft_hf.layers.phase import ForwardPhase, Phase, SharedPhase

ATTRIBUTE = "_preft_attachment"


class _ThreadState(PerThread):
    def __init__(self) -> None:
        self.owners: Owners | None = None


class Attachment:
    """What PreFT attaches to one model: hooks, replaced methods, and the state that they and the layers share.

    Attributes:
        phase: the phase of the running forward, shared by all adapter layers of the model
        layers: the model's adapter layers
        calls: the running forwards of all threads
        routing: the model's adapters by name, for batches whose rows have different ones
        boundary: the replaced methods, such as generate
        awaiting: adapters whose saved weights are not loaded yet; they must not run
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.phase = ForwardPhase()
        self.layers: list[PreftLayer] = []
        self.awaiting: set[str] = set()
        self.calls = Calls(model, self.phase)
        self.routing = Routing(self.layers, self.calls)
        self.boundary = PromptBoundary(model, self.routing, self.phase)
        self.labels = LabelsRule(model)
        self._thread = _ThreadState()
        self._checked_reach = False
        self._layer_handles: list[tuple[PreftLayer, Any]] = []
        self._parameter_names = [name for name in inspect.signature(type(model).forward).parameters if name != "self"]
        self._checkpointed = checkpointed_modules(model)
        self._handles = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True, prepend=True),
            model.register_forward_hook(self._after_forward, with_kwargs=True, always_call=True),
        ]

    def add_layer(self, layer: PreftLayer, handle: Any = None) -> None:
        """Registers an adapter layer, and the handle of its hook, which is removed with it.

        If the model's adapters are disabled, so are those of the new layer.
        """
        if self.routing.disabled:
            layer.enable_adapters(False)
        self.layers.append(layer)
        self._checked_reach = False
        if handle is not None:
            self._layer_handles.append((layer, handle))

    def drop_layer(self, layer: PreftLayer) -> None:
        """Unregisters an adapter layer that was removed from the model."""
        self.layers[:] = [kept for kept in self.layers if kept is not layer]
        for owner, handle in self._layer_handles:
            if owner is layer:
                handle.remove()
        self._layer_handles = [pair for pair in self._layer_handles if pair[0] is not layer]

    def remove(self) -> None:
        """Removes the hooks and gives the model its own methods back."""
        for handle in (*self._handles, *(handle for _, handle in self._layer_handles)):
            handle.remove()
        self.boundary.remove()
        del self.model.__dict__[ATTRIBUTE]

    def _before_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        is_traced = torch.compiler.is_compiling()
        if not is_traced:
            self.calls.begin()
            keep_phase_in_checkpoints(self._checkpointed, self.phase)
        mask = kwargs.pop("prefill_mask", None)
        adapters = self._row_adapters(module, kwargs.pop("adapter_names", None))
        if self.awaiting:
            self._check_arrived(adapters)
        values = {**dict(zip(self._parameter_names[: len(args)], args, strict=False)), **kwargs}
        phase = self._phase_of(module, values, mask, adapters)
        if not is_traced:
            self._watch(module, values, phase, adapters)
        self.phase.begin(phase)
        return (args, kwargs) if is_traced else self.calls.arguments(args, kwargs)

    def _phase_of(
        self, module: nn.Module, values: Mapping[str, Any], mask: Any, adapters: RowAdapters | PackedAdapters | None
    ) -> Phase:
        """Returns the phase of a forward; if adapters were named, that of each row's adapter."""
        if adapters is not None and self.routing.disabled:
            return False
        tokens = values.get("input_ids")
        tokens = values.get("inputs_embeds") if tokens is None else tokens
        if tokens is None:
            raise ValueError("neither input_ids nor inputs_embeds was given: a PreFT model needs one of them")
        shape = tuple(tokens.shape[:2])
        if mask is not None:
            prefill = given_phase(mask, values, shape)
        elif adapters is None and not any(layer.is_live() for layer in self.layers):
            return False
        else:
            prefill = inferred_phase(values, shape, module.training, self.boundary.active, self.labels)
        return prefill if adapters is None else _routed(adapters, prefill, shape, tokens.device)

    def _watch(
        self,
        module: nn.Module,
        values: Mapping[str, Any],
        phase: Phase,
        adapters: RowAdapters | PackedAdapters | None,
    ) -> None:
        """Checks the owner of the cache, and sets what `_after_forward` needs, if the forward has prompt tokens."""
        self.phase.reached = self._thread.owners = None
        tokens = values.get("input_ids")
        tokens = values.get("inputs_embeds") if tokens is None else tokens
        if tokens is None:
            return
        cache = cache_of(values)
        if phase is not False or (tokens.shape[1] > 1 and not self.boundary.active):
            # not in decode: a static cache counts on the device
            drop_if_emptied(cache)
        if phase is False:
            return
        # the layers of DataParallel's replicas are copies, which this attachment does not know
        if not (self._checked_reach or self.boundary.drafting or getattr(module, "_is_replica", False)):
            self.phase.reached = set()
        is_step = module.training and torch.is_grad_enabled()
        if is_step or isinstance(adapters, PackedAdapters) or values.get("use_cache") is False:
            return
        owners = self.routing.owners(adapters, tokens.shape[0])
        if set(owners) != {None}:
            check_owners(cache, owners)
            self._thread.owners = owners

    def _after_forward(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        self.phase.end()
        if self.calls.is_holding:
            self.calls.unpin()
        if not torch.compiler.is_compiling():
            self._finish(kwargs, output)

    def _finish(self, kwargs: dict[str, Any], output: Any) -> None:
        """Records whose prompt the cache holds now, and which adapter layers ran."""
        owners, self._thread.owners = self._thread.owners, None
        if owners is not None and output is not None:
            cache = cache_of_output(output)
            cache = cache_of(kwargs) if cache is None else cache
            if cache is not None:
                record_owners(cache, owners)
        if self.phase.reached is not None:
            self._check_reach(self.phase.reached, completed=output is not None)

    def _check_reach(self, reached: set[int], completed: bool) -> None:
        """Warns, after the first prefill, of adapter layers that did not run: the model reads their weights itself."""
        self.phase.reached = None
        if not completed:
            return
        self._checked_reach = True
        skipped = [layer for layer in self.layers if not layer.disable_adapters and id(layer) not in reached]
        if skipped:
            names = {id(module): name for name, module in self.model.named_modules()}
            warnings.warn(
                f"the forward did not run the adapters of {len(skipped)} layers, such as "
                f"{names.get(id(skipped[0]))}: the model bypasses them, so they have no effect; leave "
                "these layers out with exclude_modules or layers_to_transform",
                stacklevel=2,
            )

    def _check_arrived(self, adapters: RowAdapters | PackedAdapters | None) -> None:
        names = adapters.names if adapters is not None else {n for layer in self.layers for n in layer.live_adapters()}
        missing = self.awaiting & self.routing.held() & set(names)
        if missing:
            raise RuntimeError(
                f"adapter {', '.join(sorted(missing))} was made from a saved config or with low_cpu_mem_usage=True, "
                "and its weights were not loaded: load them with load_adapter or set_peft_model_state_dict, or make a "
                "new adapter from a new PreftConfig, without low_cpu_mem_usage"
            )

    def _row_adapters(self, module: nn.Module, given: Any) -> RowAdapters | PackedAdapters | None:
        """Returns the adapters of the rows, passed on by generate or given to this forward."""
        if isinstance(given, RowAdapters):
            return given
        given = self.routing.declared if given is None else given
        if given is None:
            return None
        return self._take(given, module.training)

    @untraced
    def _take(self, given: Any, training: bool) -> RowAdapters | PackedAdapters:
        """Returns the adapters of this forward, which are unpinned at its end."""
        self.boundary.unpin()
        adapters = given if isinstance(given, PackedAdapters) else self.routing.of(given, training)
        self.calls.hold(adapters)
        return adapters


def attachment_of(model: nn.Module) -> Attachment:
    """Returns the model's attachment, made at the first call."""
    attachment = model.__dict__.get(ATTRIBUTE)
    if attachment is None:
        attachment = Attachment(model)
        model.__dict__[ATTRIBUTE] = attachment
    return attachment


def pool_of(model: nn.Module) -> SlotPool | None:
    """Returns the slots of the model's PreftPool, if it has one."""
    attachment = model.__dict__.get(ATTRIBUTE)
    return None if attachment is None else attachment.routing.pool


@untraced
def _routed(
    adapters: RowAdapters | PackedAdapters, prefill: SharedPhase, shape: tuple[int, int], device: torch.device
) -> Phase:
    return adapters.phase(prefill, shape, device)
