"""A gateway before a small upstream on loopback, with shards that are functions."""

import asyncio
from contextlib import asynccontextmanager
from dataclasses import replace

from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from tgi_patch.gateway.adapters import AdapterManager
from tgi_patch.gateway.connections import SERVER_OPTIONS, Limits
from tgi_patch.gateway.proxy import Gateway, GatewayOptions
from tgi_patch.settings import Settings


class Shards:
    """Stands in for the control sockets: what each rank knows, and what it refuses."""

    def __init__(self, known=("acme",), world_size=2):
        self.known = [{name: {"location": f"org/{name}@1"} for name in known} for _ in range(world_size)]
        self.refuse_on = {}
        self.silent = set()
        self.broken = {}
        self.down = False
        self.calls = []

    def content(self, rank, location):
        return "sha256:1"

    def ask(self, directory, rank, request, timeout_s=1.0):
        if self.down:
            raise ConnectionRefusedError("nobody listens")
        if rank in self.silent:
            raise TimeoutError("no answer in time")
        self.calls.append((rank, request["op"]))
        if request["op"] == "faults":
            return {"ok": True, "faults": self.broken if rank == 1 else {}}
        if request["op"] == "list":
            return {"ok": True, "adapters": self.known[rank]}
        if request["op"] == "statistics":
            return {"ok": True, "statistics": {"adapters": len(self.known[rank]), "slots_used": 1}}
        if request["op"] == "add":
            if rank in self.refuse_on:
                return {"ok": False, "kind": self.refuse_on[rank], "error": "its weights are not finite"}
            known = self.known[rank].get(request["name"])
            if known is not None and known["location"] != request["location"]:
                return {"ok": False, "kind": "taken", "error": f"it stands for {known['location']} already"}
            self.known[rank][request["name"]] = {
                "location": request["location"],
                "fingerprint": self.content(rank, request["location"]),
            }
        elif request["op"] == "remove" and self.known[rank].pop(request["name"], None) is None:
            return {"ok": False, "kind": "unknown", "error": "no such adapter"}
        return {"ok": True}


@asynccontextmanager
async def gateway(shards, settings=None, limits=None, upstream=None, **options):
    seen = []

    async def answer(request):
        body = await request.read()
        seen.append((request.path, body, request.headers))
        if request.path in {"/generate_stream", "/v1/chat/completions"}:
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "X-Request-Id": "7"})
            await response.prepare(request)
            for i in range(3):
                await response.write(f"data:{i}\n\n".encode())
                await asyncio.sleep(0.01)
            return response
        return web.json_response({"generated_text": "said"}, headers={"X-Request-Id": "7"})

    application = web.Application()
    health = {"status": 200}

    async def healthy(request):
        return web.Response(**health)

    application.router.add_get("/health", healthy)
    application.router.add_route("*", "/{path:.*}", upstream or answer)
    server = TestServer(application)
    # as TGI's router, which has no limit of 8 KB
    await server.start_server(max_line_size=1 << 20, max_field_size=1 << 20)
    async with server:
        settings = settings or Settings(adapters={"acme": "org/acme"}, base_models=("meta/base",))
        adapters = AdapterManager(settings, 2, {"meta/base"}, {"all-token"}, ask=shards.ask)
        await adapters.start()
        options = GatewayOptions(**{"admin_token": "secret"} | options)
        made = Gateway(
            str(server.make_url("")).rstrip("/"), adapters, options, replace(limits or Limits(), penalty_s=0)
        )
        public = TestServer(made.application())
        # the test server sets handler_cancellation itself
        await public.start_server(**{n: v for n, v in SERVER_OPTIONS.items() if n != "handler_cancellation"})
        watch = asyncio.create_task(made.connections.watch(public.runner.server, period_s=0.05))
        async with TestClient(public) as client:
            client.seen, client.adapters, client.gateway, client.health = seen, adapters, made, health
            yield client
        watch.cancel()


def answering_after(event):
    """Returns an upstream that answers when the event has come."""

    async def answer(request):
        await event.wait()
        return web.json_response({})

    return answer


def generate(client, adapter=None, path="/generate"):
    parameters = {} if adapter is None else {"adapter_id": adapter}
    return client.post(path, json={"inputs": "x", "parameters": parameters})


def run(test):
    """Runs a coroutine with a limit, so that a lock that is never freed is a failure."""
    asyncio.run(asyncio.wait_for(test, 20))
