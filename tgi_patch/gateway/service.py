"""The whole service: adapters looked up once, TGI's launcher on an inner port, the gateway on the public one."""

import asyncio
import ctypes
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from aiohttp import web

from preft_core.format.config import AdapterError
from preft_core.hub.source import find_all
from tgi_patch.gateway.adapters import AdapterManager
from tgi_patch.gateway.connections import SERVER_OPTIONS
from tgi_patch.gateway.proxy import Gateway
from tgi_patch.settings import (
    Settings,
    SettingsError,
    check_ids,
    check_prefix_caching,
    control_directory,
    parse_adapters,
    private_directory,
    read_settings,
)

LAUNCHER = "text-generation-launcher"
READ = {"--model-id", "--num-shard", "--sharded", "--lora-adapters"}
"""Arguments of the launcher that the gateway goes by as well."""


@dataclass(frozen=True)
class Plan:
    """How the service is started.

    Attributes:
        command: the launcher's, with an inner port on loopback
        environment: the launcher's
        host, port: of the gateway
        upstream: URL of the router
        base_ids: names of the base model
        others: ids of TGI's own LORA_ADAPTERS
        world_size: number of shards
    """

    command: list[str]
    environment: dict[str, str]
    host: str
    port: int
    upstream: str
    base_ids: set[str]
    others: set[str]
    world_size: int


def serve(arguments: Sequence[str]) -> int:
    """Runs the service until the launcher ends or a signal comes, and returns the launcher's exit status.

    With PREFT_DISABLE=1 it becomes the launcher.
    """
    arguments = [argument for argument in arguments if argument != "--"]
    try:
        settings = read_settings()
        if settings.disabled:
            os.execvp(LAUNCHER, [LAUNCHER, *arguments])
        if not os.environ.get("PREFT_CONTROL_DIR"):
            port = _public_port(_split(arguments)[1], os.environ)
            settings = replace(settings, control=control_directory(port))
        environment = pinned(settings, dict(os.environ))
        plan = make_plan(settings, arguments, environment)
    except (SettingsError, AdapterError, OSError) as error:
        print(f"preft: {error}", file=sys.stderr)
        return 2
    return asyncio.run(_run(settings, plan))


def make_plan(settings: Settings, arguments: Sequence[str], environment: dict[str, str]) -> Plan:
    """Returns how to start the launcher behind the gateway.

    Raises:
        SettingsError: arguments or variables that cannot be followed.
    """
    rest, given = _split(arguments)
    port = _public_port(given, environment)
    inner = _port(
        environment.get("PREFT_ROUTER_PORT") or str(port + 10_000 if port < 50_000 else port - 10_000), "inner"
    )
    model = given.get("--model-id") or environment.get("MODEL_ID") or "bigscience/bloom-560m"
    shards = given.get("--num-shard") or environment.get("NUM_SHARD") or ""
    sharded = given.get("--sharded") or environment.get("SHARDED") or ""
    others = set(parse_adapters(given.get("--lora-adapters") or environment.get("LORA_ADAPTERS") or ""))
    environment = dict(environment, PORT=str(inner))
    if settings.active:
        check_ids(settings.adapters, {model, *settings.base_models}, others)
        check_prefix_caching(environment.get("PREFIX_CACHING", ""))
        environment |= {"PREFIX_CACHING": "0", "PREFT_CONTROL_DIR": str(settings.control)}
    command = [LAUNCHER, *rest, "--port", str(inner), "--hostname", "127.0.0.1"]
    return Plan(
        command=command,
        environment=environment,
        host=given.get("--hostname") or environment.get("PREFT_FRONT_HOST") or "0.0.0.0",
        port=port,
        upstream=f"http://127.0.0.1:{inner}",
        base_ids={model, *settings.base_models},
        others=others,
        world_size=_num_shards(sharded, shards, environment),
    )


def pinned(settings: Settings, environment: dict[str, str]) -> dict[str, str]:
    """Returns the environment with every listed adapter at one commit and downloaded, so that all shards agree.

    Raises:
        AdapterError: adapters that cannot be had, all in one message.
    """
    if not settings.active:
        return environment
    found = find_all(settings.adapters, fetch=True)
    environment = {n: v for n, v in environment.items() if n not in {"PREFT_ADAPTERS", "PREFT_ADAPTERS_FILE"}}
    if found:
        file = private_directory(settings.control) / "adapters.json"
        places = {name: _absolute(source.location) for name, source in found.items()}
        file.write_text(json.dumps({"adapters": places}))
        environment["PREFT_ADAPTERS_FILE"] = str(file)
    return environment


async def _run(settings: Settings, plan: Plan) -> int:
    adapters = AdapterManager(settings, plan.world_size, plan.base_ids, plan.others)
    gateway = Gateway(plan.upstream, adapters, settings.admin_token)
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
            print("preft: requests were still in flight when the time to end them was over", file=sys.stderr)
        launcher.terminate()
    status = await ended
    for task in (*watches, asked):
        task.cancel()
    await runner.cleanup()
    return 0 if stopped.is_set() else status if status >= 0 else 128 - status


def _end_with_parent() -> None:
    """Has the kernel end the launcher when this process is killed: its port would stay taken, with no gateway."""
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def _split(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Returns the launcher's arguments without those that are ours to say, and the values of some."""
    rest: list[str] = []
    given: dict[str, str] = {}
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        name, sign, value = argument.partition("=")
        if argument.startswith("-p") and not sign and len(argument) > 2:
            name, sign, value = "-p", "=", argument[2:]
        name = {"-p": "--port"}.get(name, name)
        if name not in {"--port", "--hostname", *READ}:
            rest.append(argument)
            continue
        if not sign:
            if not waiting:
                raise SettingsError(f"{name} has no value")
            value = waiting.pop(0)
        given[name] = value
        if name in READ:
            rest += [name, value]
    return rest, given


def _port(text: str, name: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 1 << 16:
        raise SettingsError(f"{name} is {text!r}: a port from 1 to 65535")
    return int(text)


def _public_port(given: Mapping[str, str], environment: Mapping[str, str]) -> int:
    return _port(given.get("--port") or environment.get("PORT") or "3000", "--port")


def _num_shards(sharded: str, num_shard: str, environment: Mapping[str, str]) -> int:
    """Returns how many shards the launcher starts, by itself one per visible GPU."""
    if num_shard.isdecimal():
        return int(num_shard)
    if sharded.lower() == "false":
        return 1
    visible: Any = environment.get("CUDA_VISIBLE_DEVICES") or environment.get("NVIDIA_VISIBLE_DEVICES")
    if visible and visible not in {"all", "void", "none"}:
        return len([device for device in visible.split(",") if device])
    import torch

    return max(torch.cuda.device_count(), 1)


def _absolute(location: str) -> str:
    return str(Path(location).resolve()) if Path(location).exists() else location
