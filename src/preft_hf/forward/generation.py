"""`generate`: where the prompt ends, told to every forward of one generation, whatever its decoding method."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from preft_core.rule.tokens import prefill_span
from preft_hf.forward.caches import cache_of, cached_length
from preft_hf.forward.continuous import ContinuousBatching
from preft_hf.forward.per_thread import PerThread
from preft_hf.forward.routing import Routing, RowAdapters
from preft_hf.layers.phase import ForwardPhase, declared_phase

CONTINUOUS_BATCHING = ("generate_batch", "init_continuous_batching")


@dataclass
class Generation:
    """One call of generate. Positions count every slot of a row, padding included, from the start of its cache.

    Attributes:
        prompt_length: tokens of the prompt, which are prefill
        num_seen: tokens that the request has had so far: those in its cache at the start, plus those of each forward
        first_id: position of the first of generate's token ids, above 0 where they continue a cache without its tokens
        drafting: True for the generate by which an assisted generation has this same model draft its tokens
        adapters: one adapter per prompt, or None where the active ones act on all
    """

    prompt_length: int
    num_seen: int
    first_id: int
    drafting: bool
    adapters: RowAdapters | None


@dataclass(frozen=True)
class WholePrefill:
    """The prefill_mask of one forward whose tokens are all prefill. A bool would fit a later forward just as well.

    Attributes:
        first: position of the forward's first token
        num_tokens: tokens of a row
        cached: length of the forward's cache, None where it has none
    """

    first: int
    num_tokens: int
    cached: int | None

    def check(self, cached: int | None, num_tokens: int) -> None:
        """Raises a RuntimeError for another forward: one of other tokens, or whose cache has changed since."""
        if (cached, num_tokens) == (self.cached, self.num_tokens):
            return
        raise RuntimeError(
            f"prefill_mask is from the prepare_inputs_for_generation of a forward of {self.num_tokens} tokens from "
            f"position {self.first} on, all of the prompt, and this one has {num_tokens} tokens"
            + ("" if cached is None else f" after {cached} in the cache")
            + ": in a custom loop call prepare_inputs_for_generation before every forward, or set prefill_mask"
        )


class _ThreadState(PerThread):
    def __init__(self) -> None:
        self.generation: Generation | None = None


class PromptBoundary:
    """Stands in for one model's `generate` and `prepare_inputs_for_generation`.

    `generate` records the length of the prompt. `prepare_inputs_for_generation`, which every decoding method calls
    before every forward, then adds `prefill_mask` by the positions of the forward's tokens. A generate inside a
    generate, as a streamer or a stopping criterion may call it, has a prompt and adapters of its own. Only where the
    model drafts for itself (early exit), the prompt is the outer one's.
    """

    def __init__(self, model: nn.Module, routing: Routing, phase: ForwardPhase):
        self.model = model
        self.routing = routing
        self._phase = phase
        self._thread = _ThreadState()
        self._own_methods: dict[str, Any] = {}
        if hasattr(model, "generate"):
            self._replace("generate", Replacement(self, "generate"))
            self._replace("prepare_inputs_for_generation", Replacement(self, "prepare_inputs_for_generation"))
        if hasattr(model, "heal_tokens"):
            self._replace("heal_tokens", Replacement(self, "heal_tokens"))
        if hasattr(model, "generate_batch"):
            batching = ContinuousBatching(model, routing, self.original)
            for name in CONTINUOUS_BATCHING:
                self._replace(name, getattr(batching, name))

    def _replace(self, name: str, replacement: Callable[..., Any]) -> None:
        if name in self.model.__dict__:
            self._own_methods[name] = self.model.__dict__[name]
        self.model.__dict__[name] = replacement

    def remove(self) -> None:
        """Gives the model its own methods back."""
        for name in ("generate", "prepare_inputs_for_generation", "heal_tokens", *CONTINUOUS_BATCHING):
            self.model.__dict__.pop(name, None)
        self.model.__dict__.update(self._own_methods)

    def original(self, name: str) -> Callable[..., Any]:
        """Returns the method that a replacement stands in for."""
        return self._own_methods.get(name) or getattr(type(self.model), name).__get__(self.model)

    @property
    def active(self) -> bool:
        """True while this thread is inside the model's generate."""
        return self._thread.generation is not None

    @property
    def drafting(self) -> bool:
        """True while the model drafts for a generate of its own in this thread: early exit runs some layers only."""
        return self._thread.generation is not None and self._thread.generation.drafting

    def unpin(self) -> None:
        """Lets go of the adapters of this thread's generation, whose next forward of prompt tokens pins them again.

        Another call of the model inside that generation may need their slots.
        """
        generation = self._thread.generation
        if generation is not None and generation.adapters is not None:
            generation.adapters.release()

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        if declared_phase() is not None:
            raise ValueError(
                "generate was called inside preft_phase: generate itself tells prompt tokens from generated ones; "
                "call it outside, and keep preft_phase for forwards of your own"
            )
        if kwargs.get("cache_implementation") == "paged":
            raise ValueError(
                'cache_implementation="paged" packs the prompts of this call for continuous batching: call '
                "generate_batch, which takes adapter_names"
            )
        outer = self._thread.generation
        cached = cached_length(cache_of(kwargs)) or 0
        if outer is not None and _is_draft(args, kwargs):
            first_id = outer.first_id
            generation = Generation(outer.prompt_length, first_id + cached, first_id, True, outer.adapters)
        else:
            self.unpin()
            adapters = self._row_adapters(inputs, kwargs)
            prompt_length, num_ids = _lengths(inputs, kwargs, cached)
            generation = Generation(prompt_length, cached, prompt_length - num_ids, False, adapters)
        kwargs.pop("adapter_names", None)
        self._thread.generation = generation
        try:
            # the names are with the generation now; compiled decode steps must not look for declared ones
            with self.routing.declare(None):
                return self.original("generate")(inputs, *args, **kwargs)
        finally:
            # after a KeyboardInterrupt no hook has ended the forward's phase
            self._phase.end()
            self._thread.generation = outer
            if generation.adapters is not None and not generation.drafting:
                generation.adapters.release()

    def heal_tokens(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Token healing makes a prompt of another length, and calls generate for the last token of each row."""
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
        first = _first_position(model_inputs, num_ids, num_tokens, generation)
        begin, end = prefill_span(first, num_tokens, generation.prompt_length)
        if end == begin:
            model_inputs["prefill_mask"] = False
        elif end - begin == num_tokens:
            model_inputs["prefill_mask"] = WholePrefill(first, num_tokens, cached_length(cache_of(model_inputs)))
        else:
            row = torch.arange(num_tokens, device=tokens.device)
            model_inputs["prefill_mask"] = ((row >= begin) & (row < end)).expand(batch_size, num_tokens)
        generation.num_seen = first + num_tokens
        if generation.adapters is not None:
            if end > begin:
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
        adapters = self.routing.of(names, self.model.training)
        prompts = next(
            (p for p in (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if p is not None), None
        )
        if prompts is not None and len(prompts) != len(names):
            raise ValueError(
                f"adapter_names has {len(names)} names for {len(prompts)} prompts: give one name per prompt"
            )
        return adapters


class Replacement:
    """An instance attribute that takes the place of a model's method and shows the method's signature."""

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
    """True for the generate that transformers calls to have candidates drafted, which it marks in the config."""
    config = kwargs.get("generation_config", args[0] if args else None)
    return bool(getattr(config, "is_assistant", False))


def _lengths(inputs: Tensor | None, kwargs: Mapping[str, Any], cached: int) -> tuple[int, int]:
    """Returns the prompt's length with what is cached, and the token ids among it, as transformers reads arguments.

    `inputs_embeds` always holds the whole prompt. Token ids hold only the new tokens if the attention mask is longer
    than they are, else the whole prompt. Neither means a prompt of one BOS token.
    """
    ids = kwargs.get("input_ids") if inputs is None else inputs
    embeds = kwargs.get("inputs_embeds")
    if embeds is not None:
        return embeds.shape[1], 0 if ids is None else ids.shape[1]
    num_ids = 1 if ids is None else ids.shape[1]
    mask = kwargs.get("attention_mask")
    only_new = mask is not None and mask.shape[1] != num_ids
    return cached + num_ids if only_new else num_ids, num_ids


def _first_position(model_inputs: Mapping[str, Any], num_ids: int, num_tokens: int, generation: Generation) -> int:
    """Returns the position of a forward's first token.

    Two counts must agree: the tokens that the request has had, and the place of the forward's tokens among the ids.
    The cache's length decides only where they do not, as after rejected candidates: it may evict or compress, so what
    it holds is not what the request has had.

    Args:
        num_ids: token ids that prepare_inputs_for_generation was given; the forward's tokens are the last of them
        num_tokens: tokens of the forward
    Raises:
        RuntimeError: the forward has no cache, and not the prompt and more tokens than the forward before: its cache
            must be one that is not known here. Or counts and cache disagree.
    """
    cache = cache_of(model_inputs)
    if cache is None:
        if num_tokens < generation.prompt_length or num_tokens <= generation.num_seen:
            raise RuntimeError(
                f"generate called the model with {num_tokens} tokens, for a prompt of {generation.prompt_length}, and "
                f"none of its arguments ({', '.join(model_inputs)}) is a cache that preft-hf knows, so nothing tells "
                f"prompt tokens from generated ones: `preft doctor` says which transformers fits"
            )
        # without a cache every forward starts from the prompt's first token
        return 0
    counted, by_ids = generation.num_seen, generation.first_id + num_ids - num_tokens
    if counted == by_ids:
        return counted
    if num_ids == num_tokens and counted + num_tokens <= generation.prompt_length:
        # a chunk of the prompt comes without the ids before it
        return counted
    length = cached_length(cache)
    if length in (counted, by_ids):
        return length
    raise RuntimeError(
        f"the position of a forward's {num_tokens} tokens is {counted} as counted, {by_ids} by the ids given to "
        f"prepare_inputs_for_generation, and the cache holds {length} tokens, so nothing tells prompt tokens from "
        "generated ones: use a cache that keeps every token with assisted decoding and custom decoding loops"
    )
