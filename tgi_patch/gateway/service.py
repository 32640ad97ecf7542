"""The whole service: adapters pinned once, TGI's launcher on an inner port, the gateway on the public one."""

import asyncio
import ctypes
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from aiohttp import web

from preft_core.format.config import AdapterError
from preft_core.hub.source import find_all
from tgi_patch.gateway.adapters import AdapterManager
from tgi_patch.gateway.connections import SERVER_OPTIONS, Limits
from tgi_patch.gateway.launcher import Plan, make_plan, normalised, public_port
from tgi_patch.gateway.proxy import Gateway
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
    gateway = Gateway(plan.upstream, adapters, settings.admin_token, Limits(body_bytes=plan.body_bytes))
    runner = web.AppRunner(gateway.application(), **SERVER_OPTIONS)
    await runner.setup()
    try:
        await web.TCPSite(runner, plan.host, plan.port).start()
        launcher = await asyncio.create_subprocess_exec(
            *plan.command, env=plan.environment, preexec_fn=_end_with_parent if sys.platform == "linux" else None
        )
    except OSError as error:
        print(f"preft: {error}", file=sys.stderr)
        await runner.cleanup()
        return 2
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    assert runner.server is not None
    watches = [asyncio.create_task(adapters.watch()), asyncio.create_task(gateway.connections.watch(runner.server))]
    ended = asyncio.create_task(launcher.wait())
    asked = asyncio.create_task(stopped.wait())
    await asyncio.wait({ended, asked}, return_when=asyncio.FIRST_COMPLETED)
    if asked.done() and not ended.done():
        if not await gateway.drained():
            print("preft: requests were still in flight when the time to finish them was over", file=sys.stderr)
        launcher.terminate()
    status = await ended
    for task in (*watches, asked):
        task.cancel()
    await runner.cleanup()
    return 0 if stopped.is_set() else status if status >= 0 else 128 - status


def _end_with_parent() -> None:
    """Has the kernel terminate the launcher when this process is killed: it would keep its port, with no gateway."""
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def _absolute(location: str) -> str:
    return str(Path(location).resolve()) if Path(location).exists() else location
