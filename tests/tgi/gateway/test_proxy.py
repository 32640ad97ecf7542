"""The gateway and the adapters without TGI: a small upstream on loopback, shards that are functions."""

import asyncio
import json

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from preft_core.format.config import AdapterError
from preft_core.pool.layout import Bucket
from tests.tgi.gateways import Shards, answering_after, gateway, generate, run
from tgi_patch.gateway import adapters as adapters_module
from tgi_patch.gateway.connections import Limits
from tgi_patch.settings import Settings


def test_what_is_known_passes_unchanged():
    async def check():
        async with gateway(Shards()) as client:
            for adapter in (None, "", "tgi", "meta/base", "acme", "all-token"):
                response = await generate(client, adapter)
                assert (response.status, await response.json()) == (200, {"generated_text": "said"})
                assert response.headers["X-Request-Id"] == "7"
            assert json.loads(client.seen[-1][1]) == {"inputs": "x", "parameters": {"adapter_id": "all-token"}}
            response = await generate(client, "acme", "/generate_stream")
            assert await response.text() == "data:0\n\ndata:1\n\ndata:2\n\n"
            assert response.content_type == "text/event-stream"
            response = await client.post("/v1/chat/completions", json={"model": "acme", "messages": []})
            assert response.status == 200
            assert (await client.options("/generate")).status == 200
            models = await (await client.get("/v1/models")).json()
            assert [model["id"] for model in models["data"]] == ["meta/base", "acme", "all-token"]

    run(check())


def test_what_is_unknown_is_answered_in_the_form_of_its_route():
    async def check():
        async with gateway(Shards()) as client:
            for path in ("/generate", "/", "/generate_stream", "/invocations"):
                response = await generate(client, "nobody", path)
                assert response.status == 404
                assert "known are acme, all-token" in (await response.json())["error"]
            response = await client.post("/v1/completions", json={"model": "nobody", "prompt": "x"})
            assert (response.status, (await response.json())["error"]["type"]) == (404, "not_found")
            assert (await client.post("/generate", data=b"{")).status == 400
            response = await client.post("/generate", json={"inputs": "", "parameters": {"adapter_id": ["a"]}})
            assert response.status == 422
            assert (await client.post("/secret", json={})).status == 404
            assert client.seen == []

    run(check())


def test_limits():
    held = asyncio.Event()

    async def check():
        limits = Limits(body_bytes=100, in_flight=1, upstream_s=0.3, drain_s=0.2)
        async with gateway(Shards(), limits=limits, upstream=answering_after(held)) as client:
            assert (await client.post("/generate", data=b"x" * 200)).status == 413
            first = asyncio.ensure_future(generate(client, "acme"))
            await asyncio.sleep(0.05)
            assert (await generate(client, "acme")).status == 429
            assert (await first).status == 504
            first = asyncio.ensure_future(generate(client, "acme"))
            await asyncio.sleep(0.05)
            assert not await client.gateway.drained()
            assert (await generate(client, "acme")).status == 503
            assert (await client.get("/health")).status == 503
            first.cancel()

    run(check())


def test_an_upstream_that_breaks_off_breaks_the_stream_off():
    async def broken(request):
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"data:0\n\n")
        request.transport.abort()
        return response

    async def check():
        async with gateway(Shards(), upstream=broken) as client:
            response = await generate(client, "acme", "/generate_stream")
            with pytest.raises(Exception, match=r"payload|closed|reset|disconnected"):
                await response.text()

    run(check())


def test_shards_that_are_not_up_yet():
    async def check():
        shards = Shards()
        shards.down = True
        async with gateway(shards) as client:
            assert (await client.get("/health")).status == 503
            response = await generate(client, "acme")
            assert (response.status, response.headers["Retry-After"]) == (503, "2")
            # the base model needs no adapter
            assert (await generate(client)).status == 200
            shards.down = False
            assert (await client.get("/health")).status == 200
            assert (await generate(client, "acme")).status == 200

    run(check())


class Source:
    def __init__(self, location):
        self.location = f"{location}@1"

    def fetch(self):
        return None


def lazy(**others):
    settings = {"adapters": {"acme": "org/acme"}, "reserve": (Bucket("linear", 16),), "lazy": True}
    return Settings(**(settings | {"organisations": ("acme",)} | others))


def test_adapters_of_allowed_organisations_are_loaded_when_they_are_asked_for(monkeypatch):
    asked = []

    def find(location):
        asked.append(location)
        if "gone" in location:
            raise AdapterError("no such repository") from FileNotFoundError("x")
        if "offline" in location:
            raise AdapterError("cannot be had from the Hub") from ConnectionError("no way")
        return Source(location)

    monkeypatch.setattr(adapters_module, "find_adapter", find)

    async def check():
        shards = Shards()
        async with gateway(shards, lazy(max_adapters=4)) as client:
            responses = await asyncio.gather(*(generate(client, "acme/new") for _ in range(5)))
            assert {response.status for response in responses} <= {503, 200}
            assert responses[0].headers["Retry-After"] == "2"
            while (response := await generate(client, "acme/new")).status == 503:
                await asyncio.sleep(0.01)
            assert response.status == 200
            assert asked == ["acme/new"]
            assert all("acme/new" in known for known in shards.known)
            assert (await generate(client, "other/new")).status == 404
            for name, status in (("acme/gone", 422), ("acme/offline", 503)):
                await generate(client, name)
                await asyncio.sleep(0.1)
                assert (await generate(client, name)).status == status
            assert asked.count("acme/gone") == 1
            # refused by one shard: the other gives it back
            shards.refuse_on = {1: "refused"}
            await generate(client, "acme/nan")
            await asyncio.sleep(0.1)
            response = await generate(client, "acme/nan")
            assert (response.status, "not finite" in await response.text()) == (422, True)
            assert all("acme/nan" not in known for known in shards.known)

    run(check())


def test_the_longest_unused_goes_when_there_are_too_many(monkeypatch):
    monkeypatch.setattr(adapters_module, "find_adapter", Source)

    async def check():
        shards = Shards()
        async with gateway(shards, lazy(max_adapters=3)) as client:
            for name in ("acme/one", "acme/two", "acme/one", "acme/three"):
                while (await generate(client, name)).status == 503:
                    await asyncio.sleep(0.01)
            # the listed one and the one that was used again stay
            assert sorted(shards.known[0]) == ["acme", "acme/one", "acme/three"]
            assert (await generate(client, "acme/one")).status == 200

    run(check())


def test_admin_routes(monkeypatch):
    monkeypatch.setattr(adapters_module, "find_adapter", Source)
    held = asyncio.Event()

    async def slow(request):
        await held.wait()
        return web.json_response({"generated_text": "said"})

    async def check():
        shards = Shards()
        async with gateway(shards, upstream=answering_after(held)) as client:
            route, key = "/preft/adapters", {"Authorization": "Bearer secret"}
            assert (await client.get(route)).status == 401
            assert (await client.get(route, headers={"Authorization": "Bearer no"})).status == 401
            assert list((await (await client.get(route, headers=key)).json())["adapters"]) == ["acme"]
            response = await client.post(route, headers=key, json={"id": "late", "location": "org/late"})
            assert response.status == 201
            for body in ([], {}, {"id": 3}, {"id": "x", "location": 3}):
                assert (await client.post(route, headers=key, json=body)).status == 422
            for taken in ("meta/base", "all-token", "__base__"):
                assert (await client.post(route, headers=key, json={"id": taken, "location": "o/x"})).status == 422
            # in use: it leaves when the request has ended
            running = asyncio.ensure_future(generate(client, "late"))
            await asyncio.sleep(0.05)
            assert (await client.delete(route + "/late", headers=key)).status == 202
            assert (await generate(client, "late")).status == 404
            assert "late" in shards.known[0]
            held.set()
            assert (await running).status == 200
            await asyncio.sleep(0.1)
            assert all("late" not in known for known in shards.known)
            assert (await client.delete(route + "/late", headers=key)).status == 404
            assert (await client.delete(route + "/acme", headers=key)).status == 200
        async with gateway(Shards(), admin_token="") as client:
            assert (await client.get("/preft/adapters")).status == 403

    run(check())


def test_metrics_are_bounded():
    async def check():
        shards = Shards(known=[f"a{i}" for i in range(300)])
        async with gateway(shards) as client:
            for i in range(300):
                await generate(client, f"a{i}")
            await generate(client, "nobody")
            text = await (await client.get("/metrics")).text()
            assert text.count("preft_requests_total{") == 201
            assert 'preft_requests_total{adapter="other"} 100.0' in text
            assert 'preft_refused_total{status="404"} 1.0' in text
            assert "preft_adapters 300.0" in text

    run(check())


def test_without_the_key_a_request_gets_no_adapter_no_names_and_no_download(monkeypatch):
    """As TGI's router compares --api-key, and before anything else."""
    loaded = []

    def find(location):
        loaded.append(location)
        return Source(location)

    monkeypatch.setattr(adapters_module, "find_adapter", find)

    async def check():
        async with gateway(Shards(), lazy(), api_key="Key-1") as client:
            for path in (
                "/",
                "/generate",
                "/generate_stream",
                "/invocations",
                "/v1/completions",
                "/vertex",
                "/tokenize",
            ):
                for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": "Key-1"}):
                    response = await client.post(path, json={"model": "acme/new", "inputs": "x"}, headers=headers)
                    assert response.status == 401
                    assert "acme" not in await response.text()
            assert loaded == client.seen == []
            # the router asks none for these
            assert (await client.post("/chat_tokenize", json={})).status == 200
            assert [model["id"] for model in (await (await client.get("/v1/models")).json())["data"]] == ["meta/base"]
            for key in ("Bearer Key-1", "bearer key-1"):
                headers = {"Authorization": key}
                body = {"inputs": "x", "parameters": {"adapter_id": "acme"}}
                assert (await client.post("/generate", json=body, headers=headers)).status == 200
                assert "acme" in await (await client.get("/v1/models", headers=headers)).text()
                assert 'adapter="acme"' in await (await client.get("/metrics", headers=headers)).text()
            text = await (await client.get("/metrics")).text()
            assert ("acme" in text, "preft_requests_in_flight" in text) == (False, True)

    run(check())


def test_no_adapter_is_added_before_tgi_is_ready(monkeypatch):
    """The router comes up last: an adapter added while TGI captures its CUDA graphs can break the start."""
    monkeypatch.setattr(adapters_module, "find_adapter", Source)

    async def check():
        shards = Shards()
        async with gateway(shards) as client:
            client.health["status"] = 503
            key = {"Authorization": "Bearer secret"}
            response = await client.post("/preft/adapters", json={"id": "new", "location": "org/new"}, headers=key)
            assert (response.status, response.headers["Retry-After"]) == (503, "2")
            assert all("new" not in known for known in shards.known)
            for path in ("/health", "/ping", "/", "/preft/ready"):
                assert (await client.get(path)).status == 503
            # the process lives: it need not be restarted
            assert (await client.get("/preft/live")).status == 200
            client.health["status"] = 200
            for path in ("/health", "/ping", "/", "/preft/ready"):
                assert (await client.get(path)).status == 200

    run(check())


def test_admin_routes_on_another_port():
    async def check():
        async with gateway(Shards(), admin_apart=True) as client:
            key = {"Authorization": "Bearer secret"}
            assert (await client.get("/preft/adapters", headers=key)).status == 404
            async with TestClient(TestServer(client.gateway.admin_application())) as admin:
                assert (await admin.get("/preft/adapters", headers=key)).status == 200
                assert (await admin.get("/preft/adapters")).status == 401
                assert (await admin.post("/generate", json={})).status == 404

    run(check())


def test_adapter_events_and_requests_are_logged_with_the_request_id(monkeypatch, caplog):
    monkeypatch.setattr(adapters_module, "find_adapter", Source)
    caplog.set_level("INFO", logger="preft.events")

    async def check():
        async with gateway(Shards(), lazy(max_adapters=2), access_log=True) as client:
            key = {"Authorization": "Bearer secret"}
            for name in ("acme/one", "acme/two"):
                body = {"inputs": "x", "parameters": {"adapter_id": name}}
                headers = {"X-Request-Id": f"first-{name[5:]}"}
                response = await client.post("/generate", json=body, headers=headers)
                assert response.headers["X-Request-Id"] == headers["X-Request-Id"]
                while (await generate(client, name)).status == 503:
                    await asyncio.sleep(0.01)
            await client.delete("/preft/adapters/acme/two", headers=key | {"X-Request-Id": "a b\t"})

    run(check())
    lines = [json.loads(record.message) for record in caplog.records]
    events = [(line["event"], line["adapter"], line["request_id"]) for line in lines if line["event"] != "request"]
    assert events[:3] == [
        ("adapter_loaded", "acme/one", "first-one"),
        ("adapter_evicted", "acme/one", "first-two"),
        ("adapter_loaded", "acme/two", "first-two"),
    ]
    assert [event[:2] for event in events[3:]] == [("adapter_removed", "acme/two")]
    # an id that could break a log line is replaced
    assert events[3][2] != "a b"
    requests = [line for line in lines if line["event"] == "request"]
    assert (requests[0]["status"], requests[0]["path"], requests[0]["adapter"]) == (503, "/generate", "acme/one")
    assert requests[-1]["method"] == "DELETE"
