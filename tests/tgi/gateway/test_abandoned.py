"""Clients that leave: the router may still send the prefill of their request, which names the adapter."""

import asyncio

import pytest

from preft_core.pool.layout import Bucket
from tests.tgi.gateways import Shards, gateway, generate, run
from tgi_patch.gateway import adapters as adapters_module
from tgi_patch.gateway.connections import Limits
from tgi_patch.settings import Settings

SECRET = {"Authorization": "Bearer secret"}


class Router:
    """Sends a request's prefill some time after its client left, as a router that has taken it from its queue."""

    def __init__(self, shards):
        self.shards = shards
        self.received = asyncio.Event()
        self.prefills = asyncio.Queue()

    async def answer(self, request):
        name = (await request.json())["parameters"]["adapter_id"]
        self.received.set()
        try:
            await asyncio.sleep(60)
        finally:
            asyncio.get_running_loop().call_later(0.1, self.prefill, name)

    def prefill(self, name):
        self.prefills.put_nowait([name in known for known in self.shards.known])


class Source:
    def __init__(self, location):
        self.location = location

    def fetch(self):
        return None


@pytest.fixture
def router(monkeypatch):
    monkeypatch.setattr(adapters_module, "ABANDONED_FOR_S", 0.4)
    monkeypatch.setattr(adapters_module, "find_adapter", Source)
    return Router(Shards(("acme", "other")))


async def leave(client, router, name):
    """Sends a request and leaves before its response."""
    running = asyncio.ensure_future(generate(client, name))
    await router.received.wait()
    running.cancel()


def test_a_removed_adapter_stays_on_the_shards_until_no_prefill_can_name_it(router):
    async def check():
        async with gateway(router.shards, upstream=router.answer) as client:
            await leave(client, router, "acme")
            response = await client.delete("/preft/adapters/acme", headers=SECRET)
            assert await router.prefills.get() == [True, True]
            assert response.status == 202
            assert (await generate(client, "acme")).status == 404
            while "acme" in router.shards.known[0]:
                await asyncio.sleep(0.01)
            # its name is free then
            body = {"id": "acme", "location": "/data/new"}
            while (response := await client.post("/preft/adapters", json=body, headers=SECRET)).status == 409:
                await asyncio.sleep(0.01)
            assert response.status == 201

    run(check())


def test_a_request_that_tgi_is_too_slow_for_is_abandoned_too(router):
    async def check():
        async with gateway(router.shards, upstream=router.answer, limits=Limits(upstream_s=0.1)) as client:
            assert (await generate(client, "acme")).status == 504
            assert (await client.delete("/preft/adapters/acme", headers=SECRET)).status == 202
            assert await router.prefills.get() == [True, True]

    run(check())


def test_an_adapter_of_an_abandoned_request_is_not_evicted(router):
    settings = Settings(
        adapters={"acme": "org/acme", "other": "org/other"},
        reserve=(Bucket("linear", 16),),
        lazy=True,
        organisations=("acme",),
        max_adapters=3,
    )

    async def check():
        async with gateway(router.shards, settings, upstream=router.answer) as client:
            assert (await generate(client, "acme/one")).status == 503
            while "acme/one" not in router.shards.known[0]:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)
            await leave(client, router, "acme/one")
            await generate(client, "acme/two")
            assert await router.prefills.get() == [True, True]
            response = await generate(client, "acme/two")
            assert (response.status, "no room" in await response.text()) == (503, True)

    run(check())
