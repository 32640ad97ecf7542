"""What stands in for functions of vLLM in the process that takes requests: an adapter is resolved and loaded there.

Each takes the original and returns its replacement; `patches` is the table. Arguments are duck-typed and vLLM is not
imported, so that this logic is tested without it.
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
                f"adapter {stamped.lora_name!r} is prefill-only and the request is resumable: each part of its input "
                "would make the answer before it part of the prompt; send one request per turn"
            )
        return original(self, request_id, prompt, params, supported_tasks, arrival_time, stamped, *args, **kwargs)

    return processed


def add_lora(original: Callable[..., Any]) -> Callable[..., Any]:
    """Resolves an adapter that is loaded ahead of requests, looking a Hub id up again.

    In the server, whose function is a coroutine, a thread does it: a download stops no other request's answer.
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
    """Loads an adapter that no request has named before, so that one that does not fit is an error of this call.

    A worker that finds it in the middle of a step ends the engine.
    """

    def unloaded(engine: Any, lora_request: Any) -> Any:
        directory = directory_of(engine.input_processor)
        stamped = directory.stamped(lora_request)
        # an all-token LoRA is left to vLLM, but not a place of which nothing could be read: a typing error, or no Hub
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
                        f"adapter {request.lora_name!r} is prefill-only, and vLLM's beam search gives every generated "
                        "token back as a prompt, where the adapter would act on it: use sampling with n > 1"
                    )
        return original(self, *args, **kwargs)

    return searched


def directory_of(input_processor: Any) -> Directory:
    """Returns the directory of a front process, made at its first use."""
    found = getattr(input_processor, DIRECTORY, None)
    if found is None:
        config = input_processor.vllm_config
        transfer = getattr(config, "kv_transfer_config", None)
        found = Directory(base_models(config.model_config.model), transfer and transfer.kv_connector)
        setattr(input_processor, DIRECTORY, found)
    return found


def _refusal(error: ValueError) -> Exception:
    """Returns an error that vLLM's server answers with 400 and its message; of another one it answers an empty 500."""
    from vllm.exceptions import VLLMValidationError  # pyright: ignore[reportMissingImports]

    return VLLMValidationError(str(error))


def _fifth(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Returns the lora_request among the arguments of `add_request`, where it is the fifth."""
    return args[4] if len(args) > 4 else kwargs.get("lora_request")


@contextmanager
def _loading(engine: Any, stamped: Any) -> Iterator[Any]:
    """Yields a request for the engine to load its adapter. Its id stands for that then, or for nothing on failure."""
    directory = directory_of(engine.input_processor)
    try:
        yield stamped
    except BaseException:
        directory.forget(stamped)
        raise
    directory.loaded(stamped)
