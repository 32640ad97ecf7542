"""The whole service: adapters pinned once, TGI's launcher on an inner port, the gateway on the public one."""

import asyncio
import ctypes
import json
import os
import signal
import sys
from collections.abc import Coroutine, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from aiohttp import web

from preft_core.format.config import AdapterError
from preft_core.hub.source import find_all
from tgi_patch.gateway.adapters import AdapterManager
from tgi_patch.gateway.connections import SERVER_OPTIONS, Limits
from tgi_patch.gateway.launcher import Plan, make_plan, normalised, public_port
from tgi_patch.gateway.proxy import Gateway, GatewayOptions
from tgi_patch.gateway.telemetry import to_stderr
from tgi_patch.settings import Settings, SettingsError, control_directory, private_directory, read_settings


def serve(arguments: Sequence[str]) -> int:
    """Runs the service until the launcher exits or a signal comes, and returns the launcher's exit status."""
    try:
        arguments, environment = normalised(arguments, os.environ)
        settings = read_settings()
        if not environment.get("PREFT_CONTROL_DIR"):
            settings = replace(settings, control=control_directory(public_port(arguments, environment)))
        plan = make_plan(settings, arguments, pinned(settings, environment))
    except (SettingsError, AdapterError, OSError) as error:
        print(f"preft: {error}", file=sys.stderr)
        return 2
    return asyncio.run(_run(settings, plan))


def pinned(settings: Settings, environment: dict[str, str]) -> dict[str, str]:
    """Returns the environment with every listed adapter downloaded at one commit, so that all shards agree.

    Raises:
        AdapterError: adapters that cannot be loaded, all in one message.
    """
    if not settings.active:
        return environment
    found = find_all(settings.adapters, fetch=True)
    environment = {n: v for n, v in environment.items() if n not in {"PREFT_ADAPTERS", "PREFT_ADAPTERS_FILE"}}
    if found:
        file = private_directory(settings.control) / "adapters.json"
        locations = {name: _absolute(source.location) for name, source in found.items()}
        file.write_text(json.dumps({"adapters": locations}))
        environment["PREFT_ADAPTERS_FILE"] = str(file)
    return environment


async def _run(settings: Settings, plan: Plan) -> int:
    adapters = AdapterManager(settings, plan.world_size, plan.base_ids, plan.others)
    options = GatewayOptions(
        admin_token=settings.admin_token,
        admin_apart=settings.admin_port is not None,
        api_key=plan.api_key,
        access_log=settings.access_log,
    )
    limits = Limits(body_bytes=plan.body_bytes, upstream_s=settings.timeout_s)
    gateway = Gateway(plan.upstream, adapters, options, limits)
    to_stderr()
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    async with AsyncExitStack() as stack:
        try:
            await _listen(stack, gateway, gateway.application(), plan.host, plan.port)
            if settings.admin_port is not None:
                await _listen(stack, gateway, gateway.admin_application(), plan.host, settings.admin_port)
            launcher = await asyncio.create_subprocess_exec(
                *plan.command,
                env=plan.environment,
                # a signal to this process group, such as Ctrl-C, must not stop TGI before requests have finished
                start_new_session=True,
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )
        except OSError as error:
            print(f"preft: {error}", file=sys.stderr)
            return 2
        _background(stack, gateway.watch())
        status = await _until_stopped(gateway, launcher, stopped)
    return 0 if stopped.is_set() else status if status >= 0 else 128 - status


async def _listen(stack: AsyncExitStack, gateway: Gateway, application: web.Application, host: str, port: int) -> None:
    runner = web.AppRunner(application, **SERVER_OPTIONS)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    assert runner.server is not None
    listening = await gateway.connections.listen(runner.server, host, port)
    stack.callback(listening.close)
    _background(stack, gateway.connections.watch(runner.server))


def _background(stack: AsyncExitStack, work: Coroutine[Any, Any, None]) -> None:
    """Runs a coroutine until the stack is closed."""
    stack.callback(asyncio.create_task(work).cancel)


async def _until_stopped(gateway: Gateway, launcher: asyncio.subprocess.Process, stopped: asyncio.Event) -> int:
    """Waits for the launcher to exit, or for a signal and then for the requests in flight. Returns its exit status."""
    ended = asyncio.create_task(launcher.wait())
    signalled = asyncio.create_task(stopped.wait())
    await asyncio.wait({ended, signalled}, return_when=asyncio.FIRST_COMPLETED)
    signalled.cancel()
    if stopped.is_set():
        if not await gateway.drained():
            print("preft: requests were still in flight when the time to finish them was over", file=sys.stderr)
        # the launcher may have had the signal too, and have exited
        with suppress(ProcessLookupError):
            launcher.terminate()
    return await ended


def _end_with_parent() -> None:
    """Has the kernel terminate the launcher when this process is killed: it would keep its port, with no gateway."""
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def _absolute(location: str) -> str:
    return str(Path(location).resolve()) if Path(location).exists() else location
