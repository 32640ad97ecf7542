"""Decides the phase each time a model is called, and carries what PreFT puts on a model besides its layers."""

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from preft_core.pool.slots import SlotPool
from preft_hf.forward.caches import cache_of, cached_length
from preft_hf.forward.calls import Calls
from preft_hf.forward.checkpointing import checkpointed_modules, keep_phase_in_checkpoints
from preft_hf.forward.generation import PromptBoundary, WholePrefill
from preft_hf.forward.label_checks import check_loss
from preft_hf.forward.labels import LabelsRule, trainer_of_step
from preft_hf.forward.packed import PackedAdapters
from preft_hf.forward.routing import Routing, RowAdapters
from preft_hf.layers.linear import PreftLayer
from preft_hf.layers.phase import ForwardPhase, Phase, SharedPhase, declared_phase, phase_of_mask

ATTRIBUTE = "_preft_attachment"


class Attachment:
    """What PreFT puts on one model: the phase its layers read, the hooks that set it, its generate.

    Attributes:
        phase: the phase of the running forward, shared by all adapter layers of the model
        layers: the model's adapter layers
        calls: the forwards under way, in every thread
        routing: the adapters of each row, where a batch has several
        awaiting: adapters made for saved weights that have not arrived; they must not run
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
        self._checked_reach = False
        self._layer_handles: list[tuple[PreftLayer, Any]] = []
        self._parameter_names = [name for name in inspect.signature(type(model).forward).parameters if name != "self"]
        self._checkpointed = checkpointed_modules(model)
        self._handles = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True, prepend=True),
            model.register_forward_hook(self._after_forward, with_kwargs=True, always_call=True),
        ]

    def add_layer(self, layer: PreftLayer, handle: Any = None) -> None:
        """Takes an adapter layer into account, and the handle of its hook along, to be removed with it.

        While the model's adapters are disabled, those of a new layer are too.
        """
        if self.routing.disabled:
            layer.enable_adapters(False)
        self.layers.append(layer)
        self._checked_reach = False
        if handle is not None:
            self._layer_handles.append((layer, handle))

    def drop_layer(self, layer: PreftLayer) -> None:
        """Forgets an adapter layer that was taken out of the model."""
        self.layers[:] = [kept for kept in self.layers if kept is not layer]
        for owner, handle in self._layer_handles:
            if owner is layer:
                handle.remove()
        self._layer_handles = [pair for pair in self._layer_handles if pair[0] is not layer]

    def remove(self) -> None:
        """Takes the hooks and the wrapped methods off the model."""
        for handle in (*self._handles, *(handle for _, handle in self._layer_handles)):
            handle.remove()
        self.boundary.remove()
        del self.model.__dict__[ATTRIBUTE]

    def _before_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if not torch.compiler.is_compiling():
            self.calls.begin()
        mask = kwargs.pop("prefill_mask", None)
        adapters = self._row_adapters(module, kwargs.pop("adapter_names", None))
        values = {**dict(zip(self._parameter_names[: len(args)], args, strict=False)), **kwargs}
        if self.awaiting:
            self._check_arrived(adapters)
        if not torch.compiler.is_compiling():
            keep_phase_in_checkpoints(self._checkpointed, self.phase)
        phase = self._decide(module, values, mask, adapters)
        self.phase.begin(phase)
        if not self._checked_reach and phase is not False and not torch.compiler.is_compiling():
            self.phase.reached = None if self.boundary.drafting else set()
        return (args, kwargs) if torch.compiler.is_compiling() else self.calls.arguments(args, kwargs)

    def _after_forward(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.phase.end()
        if self.calls.is_holding:
            self.calls.let_go()  # pyright: ignore[reportAttributeAccessIssue]
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
                f"{names.get(id(skipped[0]))}: the model takes another way past them, so they have no effect; leave "
                "these layers out with exclude_modules or layers_to_transform",
                stacklevel=2,
            )

    def _check_arrived(self, adapters: RowAdapters | PackedAdapters | None) -> None:
        names = adapters.names if adapters is not None else {n for layer in self.layers for n in layer.live_adapters()}
        missing = self.awaiting & self.routing.held() & set(names)
        if missing:
            raise RuntimeError(
                f"adapter {', '.join(sorted(missing))} was made from a saved config but its weights were not "
                "loaded: load them with load_adapter, or train from a new PreftConfig"
            )

    def _has_live_adapter(self) -> bool:
        return any(layer.is_live() for layer in self.layers)

    def _row_adapters(self, module: nn.Module, given: Any) -> RowAdapters | PackedAdapters | None:
        """Returns the adapters of the rows: those that generate passes on, or that this forward was given itself."""
        if isinstance(given, RowAdapters):
            return given
        given = self.routing.declared if given is None else given
        if given is None:
            return None
        return self._take(given, module.training)  # pyright: ignore[reportAttributeAccessIssue]

    @torch.compiler.disable
    def _take(self, given: Any, training: bool) -> RowAdapters | PackedAdapters:
        """Returns the adapters of this forward alone, which are let go at its end."""
        self.boundary.unpin()
        adapters = given if isinstance(given, PackedAdapters) else self.routing.of(given, training)
        self.calls.hold(adapters)  # pyright: ignore[reportAttributeAccessIssue]
        return adapters

    def _decide(
        self,
        module: nn.Module,
        values: Mapping[str, Any],
        mask: Tensor | bool | WholePrefill | None,
        adapters: RowAdapters | PackedAdapters | None,
    ) -> Phase:
        """Returns the phase, of each row's own adapter if they were named."""
        if adapters is not None and self.routing.disabled:
            return False
        tokens = values.get("input_ids")
        tokens = values.get("inputs_embeds") if tokens is None else tokens
        if tokens is None:
            raise ValueError("neither input_ids nor inputs_embeds was given: a PreFT model needs one of them")
        phase = self._prefill(module, values, mask, adapters is not None, tuple(tokens.shape[:2]))
        if adapters is None:
            return phase
        return _routed(adapters, phase, tuple(tokens.shape[:2]), tokens.device)  # pyright: ignore[reportCallIssue]

    def _prefill(
        self,
        module: nn.Module,
        values: Mapping[str, Any],
        mask: Tensor | bool | WholePrefill | None,
        named: bool,
        shape: tuple[int, ...],
    ) -> SharedPhase:
        """Explicit mask, else labels, else preft_phase, else (in eval mode) an empty cache."""
        if isinstance(mask, WholePrefill):
            if not torch.compiler.is_compiling():
                mask.check(cached_length(cache_of(values)), shape[1])
            return True
        if mask is not None:
            return _explicit_phase(mask, shape, values)
        if not named and not self._has_live_adapter():
            return False
        if not torch.compiler.is_compiling() and self.boundary.active:
            raise RuntimeError(
                "generate called the model without prepare_inputs_for_generation, so nothing tells which tokens are "
                "prompt tokens: this decoding method is not supported with a PreFT adapter; leave guidance_scale out, "
                "and pass prefill_mask in a loop or logits processor of your own"
            )
        if values.get("labels") is not None:
            return self.labels.phase(values, shape)
        declared = declared_phase()
        if declared is not None:
            return declared
        if module.training:
            raise ValueError(
                "a PreFT model in train mode was given neither labels nor prefill_mask, so it cannot tell prompt from "
                "response tokens: pass labels with -100 on the prompt, or, where the trainer withholds labels from "
                "the model (label smoothing, compute_loss_func), pass prefill_mask with PrefillMaskCollator"
            )
        trainer = trainer_of_step()
        if trainer is not None:
            raise ValueError(
                f"{trainer} gave the model neither labels nor prefill_mask in evaluation, where rows of prompt and "
                "response would all count as prompt: pass prefill_mask with PrefillMaskCollator, leave out what "
                "withholds the labels (compute_metrics in TRL's trainers, label smoothing, compute_loss_func), or, "
                'if the rows are prompts alone, evaluate inside preft_phase("prefill")'
            )
        return _phase_of_cache(values, shape)


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


@torch.compiler.disable
def _routed(
    adapters: RowAdapters | PackedAdapters, prefill: SharedPhase, shape: tuple[int, int], device: torch.device
) -> Phase:
    return adapters.phase(prefill, shape, device)


def _explicit_phase(mask: Tensor | bool, shape: tuple[int, ...], values: Mapping[str, Any]) -> SharedPhase:
    if isinstance(mask, bool):
        return mask
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != shape:
        found = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"prefill_mask is {found}: give torch.bool of shape {shape} (batch, length), True on the tokens to adapt, "
            "or True or False for all of them"
        )
    return phase_of_mask(check_loss(mask, values))


def _phase_of_cache(values: Mapping[str, Any], shape: tuple[int, ...]) -> SharedPhase:
    length = cached_length(cache_of(values))
    if length == 0:
        return True
    if length is not None and shape[1] == 1:
        return False
    raise ValueError(
        f"a forward of {shape[1]} tokens on a cache "
        + ("without a length" if length is None else f"of {length} tokens")
        + ' may be the next chunk of a prompt or generated tokens: say which with preft_phase("prefill") or '
        'preft_phase("decode"), or pass prefill_mask'
    )
