"""What one hostile client costs the others at TGI's gateway: `python -m benchmarks.gateway`.

The gateway and an upstream that responds at once run in processes of their own. A client sends one request after the
other; another process keeps 20 connections busy with one kind of hostile request. Quiet turns alternate with turns
under attack. The ratio of a kind is its median latency over the quiet median. Exit status 1 if one is above --bar.
"""

import argparse
import asyncio
import contextlib
import gzip
import json
import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
from aiohttp import web
from rich.console import Console

from tgi_patch.gateway.adapters import AdapterManager
from tgi_patch.gateway.connections import SERVER_OPTIONS
from tgi_patch.gateway.proxy import Gateway
from tgi_patch.settings import Settings

CONNECTIONS = 20
HEAD = "POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
Attack = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def with_body(body: bytes, header: str = "") -> bytes:
    """Returns a request with a body."""
    return f"{HEAD}{header}Content-Length: {len(body)}\r\n\r\n".encode() + body


def sending(request: bytes) -> Attack:
    """Returns an attack that sends a request and reads the response."""

    async def attack(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(request)
        await writer.drain()
        await reader.read(65_536)

    return attack


async def half_requests(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Sends half of the headers, and waits to be disconnected."""
    writer.write(HEAD.encode())
    await reader.read()


async def slow_bodies(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Sends a body byte by byte."""
    writer.write(f"{HEAD}Content-Length: 100000\r\n\r\n".encode())
    while not writer.is_closing():
        writer.write(b" ")
        await asyncio.sleep(0.01)


ATTACKS: dict[str, Attack] = {
    # 2 MB that would be 2 GB
    "compressed bodies": sending(with_body(gzip.compress(bytes(1 << 20)) * 1900, "Content-Encoding: gzip\r\n")),
    "half requests": half_requests,
    "slow bodies": slow_bodies,
    "huge headers": sending(f"{HEAD}X-Huge: {'x' * (1 << 20)}\r\n\r\n".encode()),
    "large bodies": sending(with_body(b" " * 1_900_000 + b"{}")),
    # much work for a parser: 600,000 empty arrays
    "nested bodies": sending(with_body(b'{"inputs": [' + b"[]," * 600_000 + b"[]]}")),
}


async def attack_with(kind: str, port: int) -> None:
    """Keeps connections busy until the process is terminated."""

    async def one() -> None:
        while True:
            with contextlib.suppress(OSError):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                try:
                    await ATTACKS[kind](reader, writer)
                finally:
                    writer.close()

    await asyncio.gather(*(one() for _ in range(CONNECTIONS)))


def attacker(kind: str, port: int) -> None:
    asyncio.run(attack_with(kind, port))


async def listening(runner: web.AppRunner) -> int:
    """Serves on a free port of loopback and returns it."""
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return runner.addresses[0][1]


def serve_upstream(ports: Any) -> None:
    """Runs a server that responds at once, and sends its port."""

    async def respond(request: web.Request) -> web.Response:
        await request.read()
        return web.json_response({"generated_text": "x"})

    async def run() -> None:
        application = web.Application(client_max_size=1 << 30)
        application.router.add_post("/generate", respond)
        ports.send(await listening(web.AppRunner(application)))
        await asyncio.Event().wait()

    asyncio.run(run())


def serve_gateway(ports: Any, upstream: int) -> None:
    """Runs the gateway, and sends its port."""

    def ask(directory: Any, rank: int, request: dict[str, Any], timeout_s: float = 1.0) -> dict[str, Any]:
        return {"ok": True, "adapters": {"a": {"location": "x"}}, "faults": {}}

    async def run() -> None:
        adapters = AdapterManager(Settings(adapters={"a": "x"}), 1, {"base"}, set(), ask=ask)
        await adapters.start()
        gateway = Gateway(f"http://127.0.0.1:{upstream}", adapters)
        runner = web.AppRunner(gateway.application(), **SERVER_OPTIONS)
        await runner.setup()
        assert runner.server is not None
        server = await gateway.connections.listen(runner.server, "127.0.0.1", 0)
        ports.send(server.sockets[0].getsockname()[1])
        await gateway.connections.watch(runner.server)

    asyncio.run(run())


async def latencies(port: int, seconds: float) -> list[float]:
    """Returns the milliseconds of requests of one client, one after the other."""
    body = {"inputs": "x " * 200, "parameters": {"adapter_id": "a"}}
    found = []
    async with aiohttp.ClientSession() as session:
        end = time.perf_counter() + seconds
        while (began := time.perf_counter()) < end:
            async with session.post(f"http://127.0.0.1:{port}/generate", json=body) as response:
                await response.read()
                if response.status != 200:
                    raise SystemExit(f"status {response.status}: nothing is timed")
            found.append(1e3 * (time.perf_counter() - began))
            await asyncio.sleep(0.005)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--bar", type=float, default=3.0, help="highest ratio that is accepted")
    options = parser.parse_args()
    processes = multiprocessing.get_context("fork")
    here, there = processes.Pipe()
    servers = [processes.Process(target=serve_upstream, args=(there,), daemon=True)]
    servers[0].start()
    servers.append(processes.Process(target=serve_gateway, args=(there, here.recv()), daemon=True))
    servers[1].start()
    port = here.recv()
    console = Console()
    versions = f"Python {platform.python_version()}, aiohttp {aiohttp.__version__}"
    console.print(f"{platform.processor() or platform.machine()}, {versions}, {CONNECTIONS} hostile connections")
    worst = 0.0
    try:
        asyncio.run(latencies(port, 1.0))
        for kind in ATTACKS:
            quiet, loud = [], []
            for _ in range(options.turns):
                quiet += asyncio.run(latencies(port, options.seconds))
                process = processes.Process(target=attacker, args=(kind, port), daemon=True)
                process.start()
                # the attack is under way
                time.sleep(1.0)
                loud += asyncio.run(latencies(port, options.seconds))
                process.terminate()
                process.join()
            ratio = statistics.median(loud) / statistics.median(quiet)
            worst = max(worst, ratio)
            low, middle, high = statistics.quantiles(loud, n=4) if len(loud) > 1 else loud * 3
            console.print(
                f"{kind:<18} {middle:7.2f} ms ({low:.2f} to {high:.2f}), quiet {statistics.median(quiet):.2f} ms: "
                f"ratio {ratio:.2f}"
            )
    finally:
        for server in servers:
            server.terminate()
            server.join()
    console.print(json.dumps({"worst_ratio": round(worst, 2), "bar": options.bar}))
    sys.exit(worst > options.bar)


if __name__ == "__main__":
    main()
