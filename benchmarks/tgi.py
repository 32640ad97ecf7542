"""What serving in TGI adds: `python -m benchmarks.tgi`.

Routing: the host's work per forward with 512 adapters registered, for a decode step and for prefills.
Front door: the time of a request through it and past it, in turns, to an upstream on loopback that answers at once;
client, door and upstream share one event loop.
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import torch
from aiohttp import web
from rich.console import Console

from benchmarks.run import environment
from preft_core.adapter import save_adapter
from preft_core.config import AdapterConfig
from preft_core.layout import Site
from preft_core.source import find_adapter
from tgi_patch import engine, layers
from tgi_patch.fleet import Fleet
from tgi_patch.front import FrontDoor
from tgi_patch.places import Place
from tgi_patch.registry import Registry
from tgi_patch.routing import TICKET
from tgi_patch.settings import Settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=512)
    parser.add_argument("--requests", type=int, default=2000)
    options = parser.parse_args()
    console = Console()
    made = environment("python -m benchmarks.tgi")
    console.print(f"{made['device']}, torch {torch.__version__}, Python {sys.version.split()[0]}")
    torch.set_num_threads(1)
    for name, seconds in routing(options.adapters).items():
        low, high = statistics.quantiles(seconds, n=4)[::2]
        console.print(f"{name:58} {1e3 * statistics.median(seconds):.3f} ms ({1e3 * low:.3f} to {1e3 * high:.3f})")
    past, through = asyncio.run(front_door(options.requests))
    added = [1e3 * (b - a) for a, b in zip(past, through, strict=True)]
    low, high = statistics.quantiles(added, n=4)[::2]
    console.print(
        f"front door adds {statistics.median(added):.2f} ms ({low:.2f} to {high:.2f}) to "
        f"{1e3 * statistics.median(past):.2f} ms, {options.requests} requests one after the other"
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
        registry = Registry([Place(torch.nn.Module(), site)], settings, "base", dict.fromkeys(names, source))
        engine._Process.served = engine.Served(settings, "base", registry)
        step = layers.generate_token(lambda self, batch: None)
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
        engine._Process.served = None
        return found


async def front_door(count: int) -> tuple[list[float], list[float]]:
    """Returns the seconds of each request past the front door and through it, one after the other."""

    async def answer(request: web.Request) -> web.Response:
        await request.read()
        return web.json_response({"generated_text": "said"})

    def ask(directory: Path, rank: int, request: dict, timeout_s: float = 1.0) -> dict:
        return {"ok": True, "adapters": {f"a{i}": {"location": "x"} for i in range(512)}}

    application = web.Application()
    application.router.add_post("/generate", answer)
    runners, ports = [], []
    fleet = Fleet(Settings(adapters={"a0": "x"}), 1, {"base"}, set(), ask=ask)
    await fleet.start()
    upstream = await started(application, runners, ports)
    door = await started(FrontDoor(upstream, fleet).application(), runners, ports)
    body = json.dumps({"inputs": "x " * 1000, "parameters": {"adapter_id": "a7"}})
    times: dict[str, list[float]] = {upstream: [], door: []}
    async with aiohttp.ClientSession() as session:
        for i in range(count + 20):
            for url in ((upstream, door), (door, upstream))[i % 2]:
                start = time.perf_counter()
                async with session.post(url + "/generate", data=body) as response:
                    said = await response.json()
                took = time.perf_counter() - start
                if response.status != 200 or said != {"generated_text": "said"}:
                    raise SystemExit(f"{url} answered {response.status} {said}: nothing is timed")
                if i >= 20:
                    times[url].append(took)
    for runner in runners:
        await runner.cleanup()
    return times[upstream], times[door]


async def started(application: web.Application, runners: list[web.AppRunner], ports: list[int]) -> str:
    """Serves an application on a free port of loopback and returns its URL."""
    runner = web.AppRunner(application, handler_cancellation=True, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    runners.append(runner)
    port = runner.addresses[0][1]
    ports.append(port)
    return f"http://127.0.0.1:{port}"


if __name__ == "__main__":
    main()
