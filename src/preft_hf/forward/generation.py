"""`generate`: tells every forward of a generation which of its tokens are prompt, whatever the decoding method."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from preft_core.pool.slots import BASE_NAME
from preft_hf.forward.cache_record import check_owners, drop_if_emptied, record_generated
from preft_hf.forward.caches import cache_of, cache_of_output, cached_length
from preft_hf.forward.continuous import ContinuousBatching
from preft_hf.forward.positions import Generation, WholePrefill, first_position, generation_of
from preft_hf.forward.routing import Routing, RowAdapters
from preft_hf.layers.per_thread import PerThread
from preft_hf.layers.phase import ForwardPhase, declared

PATCHES = {
    "generate": "records where the prompt ends, which tokens of it the model has generated into a cache that is "
    "continued, and the adapter of each prompt; afterwards records in the cache what was generated",
    "prepare_inputs_for_generation": "adds prefill_mask and adapter_names to a forward by the positions of its tokens",
    "heal_tokens": "moves the end of the prompt, and passes on the adapter to the generate calls inside",
    "generate_batch": "takes one adapter name per request",
    "init_continuous_batching": "returns a manager whose requests have adapters; refuses compiled prefill",
}
"""The methods of a model that are replaced on the instance, and what each replacement adds. `remove` undoes all.

The replacements of a continuous batching manager's methods are in `continuous.Requests`.
"""


class _ThreadState(PerThread):
    def __init__(self) -> None:
        self.generation: Generation | None = None


class PromptBoundary:
    """Replaces the methods of one model that PATCHES lists, and keeps the state of each running generation.

    `generate` records the length of the prompt. `prepare_inputs_for_generation`, which every decoding method calls
    before every forward, then adds `prefill_mask` by the positions of the forward's tokens. A generate inside a
    generate, as a streamer or a stopping criterion may call it, has its own prompt and adapters. Only where the model
    drafts for itself (early exit), the prompt is that of the outer generate.
    """

    def __init__(self, model: nn.Module, routing: Routing, phase: ForwardPhase):
        self.model = model
        self.routing = routing
        self._phase = phase
        self._thread = _ThreadState()
        self._own_methods: dict[str, Any] = {}
        batching = ContinuousBatching(model, routing, self.original)
        for name in PATCHES:
            if hasattr(model, name):
                if name in model.__dict__:
                    self._own_methods[name] = model.__dict__[name]
                model.__dict__[name] = getattr(batching, name) if hasattr(batching, name) else Replacement(self, name)

    def remove(self) -> None:
        """Gives the model its own methods back."""
        for name in PATCHES:
            self.model.__dict__.pop(name, None)
        self.model.__dict__.update(self._own_methods)

    def original(self, name: str) -> Callable[..., Any]:
        """Returns the method that a replacement stands in for."""
        return self._own_methods.get(name) or getattr(type(self.model), name).__get__(self.model)

    @property
    def active(self) -> bool:
        """True while this thread is inside the model's generate; False while torch.compile traces."""
        return not torch.compiler.is_compiling() and self._thread.generation is not None

    @property
    def drafting(self) -> bool:
        """True while the model drafts for its own generate in this thread: early exit runs some layers only."""
        return self._thread.generation is not None and self._thread.generation.drafting

    def unpin(self) -> None:
        """Unpins the adapters of this thread's generation; its next forward of prompt tokens pins them again.

        Another call of the model inside that generation may need their slots.
        """
        generation = self._thread.generation
        if generation is not None and generation.adapters is not None:
            generation.adapters.release()

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        if declared() is not None:
            raise ValueError(
                "generate was called inside preft_phase or preft_scoring: generate itself tells prompt tokens from "
                "generated ones; call it outside"
            )
        if kwargs.get("cache_implementation") == "paged":
            raise ValueError(
                'cache_implementation="paged" packs the prompts of this call for continuous batching: call '
                "generate_batch, which takes adapter_names"
            )
        outer = self._thread.generation
        generation = self._begin(outer, inputs, args, kwargs)
        kwargs.pop("adapter_names", None)
        self._thread.generation = generation
        try:
            # The generation has the names now. Compiled decode steps must not look for declared ones.
            with self.routing.declare(None):
                output = self.original("generate")(inputs, *args, **kwargs)
        finally:
            # After a KeyboardInterrupt no hook has ended the forward's phase.
            self._phase.end()
            self._thread.generation = outer
            if generation.adapters is not None and not generation.drafting:
                generation.adapters.release()
        cache = cache_of_output(output)
        cache = cache_of(kwargs) if cache is None else cache
        if cache is not None and not generation.drafting:
            record_generated(cache, output, generation.first_id, generation.prompt_length, generation.num_seen)
        return output

    def _begin(
        self, outer: Generation | None, inputs: Tensor | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Generation:
        """Returns the state of a generation that starts now."""
        cache = cache_of(kwargs)
        drop_if_emptied(cache)
        if outer is not None and _is_draft(args, kwargs):
            seen = outer.first_id + (cached_length(cache) or 0)
            return Generation(outer.prompt_length, seen, outer.first_id, outer.starts, True, outer.adapters)
        self.unpin()
        adapters = self._row_adapters(inputs, kwargs)
        if cache is not None and not self._adapts(adapters):
            check_owners(cache, None)
        return generation_of(cache, kwargs.get("input_ids") if inputs is None else inputs, kwargs, adapters)

    def _adapts(self, adapters: RowAdapters | None) -> bool:
        """True if prompt tokens get an adapter."""
        if adapters is None:
            return bool(self.routing.live())
        return not self.routing.disabled and set(adapters.names) != {BASE_NAME}

    def heal_tokens(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Follows token healing, which changes the prompt's length and calls generate for each row's last token."""
        generation = self._thread.generation
        if generation is None:
            return self.original("heal_tokens")(input_ids, *args, **kwargs)
        names = generation.adapters.names if generation.adapters is not None else None
        if names is not None and len(set(names)) > 1:
            raise ValueError(
                f"token_healing with adapter_names {', '.join(sorted(set(names)))}: transformers heals row by row and "
                "does not say which; call generate once for each adapter, or leave token_healing out"
            )
        with self.routing.declare(None if names is None else names[:1]):
            healed = self.original("heal_tokens")(input_ids, *args, **kwargs)
        generation.prompt_length += healed.shape[1] - input_ids.shape[1]
        return healed

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        model_inputs = self.original("prepare_inputs_for_generation")(*args, **kwargs)
        generation = self._thread.generation
        if generation is None:
            return model_inputs
        tokens = model_inputs.get("inputs_embeds")
        tokens = model_inputs["input_ids"] if tokens is None else tokens
        batch_size, num_tokens = tokens.shape[:2]
        ids = args[0] if args else kwargs.get("input_ids")
        num_ids = 0 if ids is None else ids.shape[1]
        first = first_position(model_inputs, num_ids, num_tokens, generation)
        mask = generation.prefill(first, batch_size, num_tokens, tokens.device)
        model_inputs["prefill_mask"] = (
            WholePrefill(first, num_tokens, cached_length(cache_of(model_inputs))) if mask is True else mask
        )
        generation.num_seen = first + num_tokens
        if generation.adapters is not None:
            if mask is not False:
                model_inputs["adapter_names"] = generation.adapters
            else:
                generation.adapters.release()
        return model_inputs

    def _row_adapters(self, inputs: Tensor | None, kwargs: Mapping[str, Any]) -> RowAdapters | None:
        """Returns the adapters of the prompts, if they were named.

        Raises:
            ValueError: names that are unknown, or not as many as prompts.
        """
        names = kwargs.get("adapter_names")
        names = self.routing.declared if names is None else names
        if names is None:
            return None
        adapters = self.routing.of(names, self.model.training, expands=True)
        prompts = next(
            (p for p in (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if p is not None), None
        )
        if prompts is not None and len(prompts) != len(names):
            raise ValueError(
                f"adapter_names has {len(names)} names for {len(prompts)} prompts: give one name per prompt"
            )
        return adapters


class Replacement:
    """An instance attribute that replaces a model's method and has the method's signature."""

    def __init__(self, boundary: PromptBoundary, name: str):
        self.boundary = boundary
        self.name = name

    @property
    def __signature__(self) -> inspect.Signature:
        # transformers reads it to learn which arguments the method takes.
        return inspect.signature(self.boundary.original(self.name))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.boundary, self.name)(*args, **kwargs)


def _is_draft(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Returns True for the generate by which transformers drafts candidates, which it marks in the config."""
    config = kwargs.get("generation_config", args[0] if args else None)
    return bool(getattr(config, "is_assistant", False))
