"""What serving in TGI adds: `python -m benchmarks.tgi`.

Routing: the host's work per forward with 512 adapters registered, for a decode step and for prefills.
Gateway: the time of a request through it and past it, in turns, to an upstream on loopback that answers at once;
client, gateway and upstream share one event loop. With --wrk the tool of that name asks from a process of its own.
"""

import argparse
import asyncio
import json
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import torch
from aiohttp import web
from rich.console import Console

from benchmarks.run import environment
from preft_core.format.adapter import save_adapter
from preft_core.format.config import AdapterConfig
from preft_core.hub.source import find_adapter
from preft_core.pool.layout import Site
from tgi_patch.gateway.adapters import AdapterManager
from tgi_patch.gateway.proxy import Gateway
from tgi_patch.server import layers
from tgi_patch.server.registry import Registry
from tgi_patch.server.routing import TICKET
from tgi_patch.server.shard import Shard
from tgi_patch.server.target_modules import TargetModule
from tgi_patch.settings import Settings

SAID = {"generated_text": "said"}
AskBoth = Callable[[str, str, str], Awaitable[tuple[list[float], list[float]]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=512)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--wrk", action="store_true", help="ask the gateway with wrk, which has to be installed")
    options = parser.parse_args()
    if options.wrk and shutil.which("wrk") is None:
        parser.error("--wrk: there is no wrk on the PATH; apt-get install wrk")
    console = Console()
    made = environment("python -m benchmarks.tgi")
    console.print(f"{made['device']}, torch {torch.__version__}, Python {sys.version.split()[0]}")
    torch.set_num_threads(1)
    for name, seconds in routing(options.adapters).items():
        low, high = statistics.quantiles(seconds, n=4)[::2]
        console.print(f"{name:58} {1e3 * statistics.median(seconds):.3f} ms ({1e3 * low:.3f} to {1e3 * high:.3f})")
    past, through = asyncio.run(through_gateway(by_wrk if options.wrk else one_by_one(options.requests)))
    added = [1e3 * (b - a) for a, b in zip(past, through, strict=True)]
    low, high = statistics.quantiles(added, n=4)[::2]
    how = f"{len(added)} turns of wrk, medians" if options.wrk else f"{len(added)} requests one after the other"
    console.print(
        f"gateway adds {statistics.median(added):.2f} ms ({low:.2f} to {high:.2f}) to "
        f"{1e3 * statistics.median(past):.2f} ms, {how}"
    )


def routing(num_adapters: int) -> dict[str, list[float]]:
    """Returns the seconds that our functions around `generate_token` take, TGI's own work left out."""
    with tempfile.TemporaryDirectory() as folder:
        width = 64
        site = Site("model.layers.0.mlp.down_proj", "linear", ("model.layers.0.mlp.down_proj",), width, (width,))
        tensors = {
            f"base_model.model.{site.name}.preft_A": torch.randn(8, width),
            f"base_model.model.{site.name}.preft_B": torch.randn(width, 8),
        }
        config = AdapterConfig(method="lora", r=8, lora_alpha=16, target_modules=("down_proj",))
        save_adapter(Path(folder) / "a", config, tensors)
        source = find_adapter(Path(folder) / "a")
        names = [f"a{i}" for i in range(num_adapters)]
        settings = Settings(adapters=dict.fromkeys(names, folder), slots=num_adapters)
        registry = Registry([TargetModule(torch.nn.Module(), site)], settings, "base", dict.fromkeys(names, source))
        shard = Shard(settings)
        shard.registry = registry
        step = layers.generate_token(shard, lambda self, batch: None)
        found = {}
        for label, size, prefilling in (
            ("decode step, 64 requests", 64, False),
            ("prefill of 1 request", 1, True),
            ("prefill of 8 requests, 8 adapters", 8, True),
            ("prefill of 64 requests, 64 adapters", 64, True),
        ):
            batch = SimpleNamespace(
                prefilling=prefilling,
                stopping_criterias=[SimpleNamespace() for _ in range(size)],
                cache_lengths=[0] * size,
                input_lengths=[256] * size,
                prompt_lengths=[256] * size,
                prefilling_mask=[True] * size,
            )
            for criterion, name in zip(batch.stopping_criterias, names, strict=False):
                setattr(criterion, TICKET, registry.ticket(name))
            for _ in range(20):
                step(None, batch)
            times = []
            for _ in range(500):
                start = time.perf_counter()
                step(None, batch)
                times.append(time.perf_counter() - start)
            found[f"{label}, {num_adapters} adapters registered"] = times
        return found


async def through_gateway(ask_both: AskBoth) -> tuple[list[float], list[float]]:
    """Returns the seconds of each request past the gateway and through it."""

    async def answer(request: web.Request) -> web.Response:
        await request.read()
        return web.json_response(SAID)

    def ask(directory: Path, rank: int, request: dict, timeout_s: float = 1.0) -> dict:
        return {"ok": True, "adapters": {f"a{i}": {"location": "x"} for i in range(512)}}

    application = web.Application()
    application.router.add_post("/generate", answer)
    runners: list[web.AppRunner] = []
    adapters = AdapterManager(Settings(adapters={"a0": "x"}), 1, {"base"}, set(), ask=ask)
    await adapters.start()
    upstream = await started(application, runners)
    gateway = await started(Gateway(upstream, adapters).application(), runners)
    body = json.dumps({"inputs": "x " * 1000, "parameters": {"adapter_id": "a7"}})
    try:
        return await ask_both(upstream, gateway, body)
    finally:
        for runner in runners:
            await runner.cleanup()


def one_by_one(count: int) -> AskBoth:
    """Returns a client of this process that asks both in turns, one request at a time."""

    async def ask_both(upstream: str, gateway: str, body: str) -> tuple[list[float], list[float]]:
        times: dict[str, list[float]] = {upstream: [], gateway: []}
        async with aiohttp.ClientSession() as session:
            for i in range(count + 20):
                for url in ((upstream, gateway), (gateway, upstream))[i % 2]:
                    start = time.perf_counter()
                    async with session.post(url + "/generate", data=body) as response:
                        said = await response.json()
                    took = time.perf_counter() - start
                    if response.status != 200 or said != SAID:
                        raise SystemExit(f"{url} answered {response.status} {said}: nothing is timed")
                    if i >= 20:
                        times[url].append(took)
        return times[upstream], times[gateway]

    return ask_both


async def by_wrk(upstream: str, gateway: str, body: str) -> tuple[list[float], list[float]]:
    """Has wrk ask both in turns, two seconds each over one connection. Returns the median of each turn."""
    await one_by_one(1)(upstream, gateway, body)
    times: dict[str, list[float]] = {upstream: [], gateway: []}
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "post.lua"
        lines = ("wrk.method = 'POST'", f"wrk.body = [[{body}]]", "wrk.headers['Content-Type'] = 'application/json'")
        script.write_text("\n".join(lines))
        for i in range(10):
            for url in ((upstream, gateway), (gateway, upstream))[i % 2]:
                command = ["wrk", "-t1", "-c1", "-d2s", "--latency", "-s", str(script), url + "/generate"]
                process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
                shown = (await process.communicate())[0].decode()
                median = re.search(r"50%\s+([\d.]+)(us|ms|s)", shown)
                if median is None or "Non-2xx" in shown or "Socket errors" in shown:
                    raise SystemExit(f"{url}: {shown}: nothing is timed")
                times[url].append(float(median[1]) * {"us": 1e-6, "ms": 1e-3, "s": 1.0}[median[2]])
    return times[upstream], times[gateway]


async def started(application: web.Application, runners: list[web.AppRunner]) -> str:
    """Serves an application on a free port of loopback and returns its URL."""
    runner = web.AppRunner(application, handler_cancellation=True, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    runners.append(runner)
    return f"http://127.0.0.1:{runner.addresses[0][1]}"


if __name__ == "__main__":
    main()
