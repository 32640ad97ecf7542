"""Replacements of vLLM's functions in the API server process, where an adapter is resolved and loaded.

Each takes the original function and returns the new one; `patches` is the table. Arguments are duck-typed and vLLM is
not imported, so that this logic is tested without it.
"""

import asyncio
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from preft_vllm.stamp import Directory, base_models, stamp_of

DIRECTORY = "__preft_directory__"


def process_inputs(original: Callable[..., Any]) -> Callable[..., Any]:
    """Resolves a request's adapter before it reaches the engine."""

    @functools.wraps(original)
    def processed(
        self: Any,
        request_id: Any,
        prompt: Any,
        params: Any,
        supported_tasks: Any,
        arrival_time: Any = None,
        lora_request: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        stamped = directory_of(self).stamped(lora_request)
        if stamp_of(stamped) is not None and (kwargs.get("resumable") or (len(args) > 4 and args[4])):
            raise ValueError(
                f"adapter {stamped.lora_name!r} is prefill-only and the request is resumable, which makes generated "
                "tokens part of the prompt: send one request per turn"
            )
        return original(self, request_id, prompt, params, supported_tasks, arrival_time, stamped, *args, **kwargs)

    return processed


def add_lora(original: Callable[..., Any]) -> Callable[..., Any]:
    """Resolves an adapter that is loaded before any request names it; looks up a Hub id again.

    In the server, whose function is a coroutine, a thread does this, so that a download blocks no other request.
    """

    def resolved(engine: Any, lora_request: Any) -> Any:
        return directory_of(engine.input_processor).stamped(lora_request, fresh=True)

    @functools.wraps(original)
    async def added_aside(self: Any, lora_request: Any) -> Any:
        with _loading(self, await asyncio.to_thread(resolved, self, lora_request)) as stamped:
            return await original(self, stamped)

    @functools.wraps(original)
    def added(self: Any, lora_request: Any) -> Any:
        with _loading(self, resolved(self, lora_request)) as stamped:
            return original(self, stamped)

    return added_aside if inspect.iscoroutinefunction(original) else added


def add_request(original: Callable[..., Any]) -> Callable[..., Any]:
    """Loads an adapter when a request first names it, so that one that cannot be served is an error of this call.

    The same error inside a step would end the engine.
    """

    def unloaded(engine: Any, lora_request: Any) -> Any:
        directory = directory_of(engine.input_processor)
        stamped = directory.stamped(lora_request)
        # an all-token LoRA is left to vLLM, but not a location that could not be read: a typo, or no Hub
        own = stamp_of(stamped) is not None or not directory.is_read(lora_request)
        return None if directory.is_loaded(stamped) or not own else stamped

    @functools.wraps(original)
    async def added_aside(self: Any, *args: Any, **kwargs: Any) -> Any:
        lora_request = _fifth(args, kwargs)
        try:
            new = None if lora_request is None else await asyncio.to_thread(unloaded, self, lora_request)
        except ValueError as error:
            raise _refusal(error) from error
        if new is not None:
            with _loading(self, new):
                await self.engine_core.add_lora_async(new)
        return await original(self, *args, **kwargs)

    @functools.wraps(original)
    def added(self: Any, *args: Any, **kwargs: Any) -> Any:
        lora_request = _fifth(args, kwargs)
        new = None if lora_request is None else unloaded(self, lora_request)
        if new is not None:
            with _loading(self, new):
                self.engine_core.add_lora(new)
        return original(self, *args, **kwargs)

    return added_aside if inspect.iscoroutinefunction(original) else added


def beam_search(original: Callable[..., Any]) -> Callable[..., Any]:
    """Refuses prefill-only adapters: vLLM's beam search sends generated tokens back as a prompt."""

    @functools.wraps(original)
    def searched(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = [*args, *kwargs.values()]
        for value in given:
            for request in value if isinstance(value, (list, tuple)) else [value]:
                if hasattr(request, "lora_int_id") and Directory().is_preft(request):
                    raise ValueError(
                        f"adapter {request.lora_name!r} is prefill-only, and vLLM's beam search turns generated "
                        "tokens into prompts, where the adapter would act on them: use sampling with n > 1"
                    )
        return original(self, *args, **kwargs)

    return searched


def directory_of(input_processor: Any) -> Directory:
    """Returns the adapter directory of an API server process, created on first use."""
    found = getattr(input_processor, DIRECTORY, None)
    if found is None:
        config = input_processor.vllm_config
        transfer = getattr(config, "kv_transfer_config", None)
        found = Directory(base_models(config.model_config.model), transfer and transfer.kv_connector)
        setattr(input_processor, DIRECTORY, found)
    return found


def _refusal(error: ValueError) -> Exception:
    """Returns an error for which vLLM's server responds 400 with its message; for others it responds an empty 500."""
    from vllm.exceptions import VLLMValidationError  # pyright: ignore[reportMissingImports]

    return VLLMValidationError(str(error))


def _fifth(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Returns the lora_request, the fifth argument of `add_request`."""
    return args[4] if len(args) > 4 else kwargs.get("lora_request")


@contextmanager
def _loading(engine: Any, stamped: Any) -> Iterator[Any]:
    """Yields a request whose adapter the engine loads. Registers its id, or frees it on failure."""
    directory = directory_of(engine.input_processor)
    try:
        yield stamped
    except BaseException:
        directory.forget(stamped)
        raise
    directory.loaded(stamped)
