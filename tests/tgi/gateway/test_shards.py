"""Ranks that do not hold the same, do not answer, or lose an adapter: no request reaches an adapter that some lack."""

import asyncio
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from preft_core.format.config import AdapterError, HubError
from tests.tgi.gateways import Shards, answering_after, gateway, generate, run
from tgi_patch.gateway import adapters as adapters_module
from tgi_patch.gateway.connections import Limits
from tgi_patch.server.control import ControlServer, ask
from tgi_patch.server.registry import AdapterTaken, UnknownAdapter
from tgi_patch.settings import Settings

SECRET = {"Authorization": "Bearer secret"}


class Source:
    def __init__(self, location):
        self.location = location

    def fetch(self):
        return None


@pytest.fixture(autouse=True)
def found(monkeypatch):
    monkeypatch.setattr(adapters_module, "find_adapter", Source)


def post(client, name, location):
    return client.post("/preft/adapters", json={"id": name, "location": location}, headers=SECRET)


def delete(client, name):
    return client.delete(f"/preft/adapters/{name}", headers=SECRET)


class Rewritten(Shards):
    """A folder that is rewritten between the reads of two ranks."""

    rewritten = True

    def content(self, rank, location):
        return f"sha256:{rank if self.rewritten else 0}"


def test_ranks_with_different_weights_serve_neither():
    async def check():
        shards = Rewritten()
        async with gateway(shards) as client:
            response = await post(client, "new", "/data/new")
            assert (response.status, "read different weights" in await response.text()) == (503, True)
            assert (await generate(client, "new")).status == 503
            assert all("new" not in known for known in shards.known)
            shards.rewritten = False
            assert (await post(client, "new", "/data/new")).status == 201
            assert (await generate(client, "new")).status == 200

    run(check())


def test_ranks_that_differ_at_the_start():
    async def check():
        shards = Shards(("acme", "other"))
        shards.known[1]["other"] = {"location": "org/other@2"}
        shards.known[0]["alone"] = {"location": "org/alone@1"}
        async with gateway(shards) as client:
            assert (await generate(client, "acme")).status == 200
            for name in ("other", "alone"):
                assert (await generate(client, name)).status == 422
            assert (await post(client, "other", "org/other@2")).status == 201
            assert (await generate(client, "other")).status == 200
            assert shards.known[0]["other"]["location"] == shards.known[1]["other"]["location"] == "org/other@2"

    run(check())


def test_a_rank_that_is_late_holds_no_name_for_ever():
    async def check():
        shards = Shards()
        async with gateway(shards) as client:
            shards.silent = {1}
            assert (await post(client, "new", "/data/old")).status == 503
            # rank 0 took it, rank 1 answers to nothing
            assert (await post(client, "new", "/data/new")).status == 503
            shards.silent = set()
            shards.known[1]["new"] = {"location": "/data/old", "fingerprint": "sha256:1"}
            assert (await post(client, "new", "/data/new")).status == 201
            assert [known["new"]["location"] for known in shards.known] == ["/data/new"] * 2
            # a removal that one rank does not hear
            shards.silent = {1}
            assert (await delete(client, "new")).status == 200
            assert (await generate(client, "new")).status == 404
            shards.silent = set()
            assert (await post(client, "new", "/data/newer")).status == 201
            assert [known["new"]["location"] for known in shards.known] == ["/data/newer"] * 2

    run(check())


def test_an_adapter_that_is_being_removed_is_not_added_as_if_it_were_there():
    held = asyncio.Event()

    async def check():
        async with gateway(Shards(), upstream=answering_after(held)) as client:
            first = asyncio.ensure_future(generate(client, "acme"))
            await asyncio.sleep(0.05)
            assert (await delete(client, "acme")).status == 202
            response = await post(client, "acme", "/data/new")
            assert (response.status, response.headers["Retry-After"]) == (409, "2")
            held.set()
            assert (await first).status == 200
            while (response := await post(client, "acme", "/data/new")).status == 409:
                await asyncio.sleep(0.01)
            assert response.status == 201
            await asyncio.sleep(0.05)
            assert (await generate(client, "acme")).status == 200

    run(check())


def test_an_adapter_whose_files_are_gone_fails_nobody_else(monkeypatch):
    monkeypatch.setattr(adapters_module, "WATCH_S", 0.01)

    async def check():
        shards = Shards(("acme", "other"))
        async with gateway(shards) as client:
            watch = asyncio.create_task(client.adapters.watch())
            shards.broken = {"acme": "its file has changed"}
            while (response := await generate(client, "acme")).status == 200:
                await asyncio.sleep(0.01)
            assert (response.status, "its file has changed" in await response.text()) == (422, True)
            assert (await generate(client, "other")).status == 200
            shards.broken = {}
            assert (await post(client, "acme", "org/acme@1")).status == 201
            assert (await generate(client, "acme")).status == 200
            watch.cancel()

    run(check())


def test_names_of_nothing_evict_nobody(monkeypatch):
    def find(location):
        if "made-up" in location:
            raise adapters_module.AdapterError("no such repository") from FileNotFoundError("x")
        return Source(location)

    monkeypatch.setattr(adapters_module, "find_adapter", find)
    settings = Settings(adapters={"acme": "org/acme"}, lazy=True, organisations=("*",), max_adapters=3)

    async def check():
        async with gateway(Shards(), settings) as client:
            for name in ("a/1", "a/2"):
                while (await generate(client, name)).status == 503:
                    await asyncio.sleep(0.01)
            await asyncio.gather(*(generate(client, f"a/made-up-{i}") for i in range(9)))
            await asyncio.sleep(0.1)
            for name in ("acme", "a/1", "a/2"):
                assert (await generate(client, name)).status == 200

    run(check())


def test_a_request_never_loads_a_folder_of_the_server(monkeypatch, tmp_path):
    (tmp_path / "data" / "private").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    settings = Settings(adapters={"acme": "org/acme"}, lazy=True, organisations=("*",))

    async def check():
        shards = Shards()
        async with gateway(shards, settings) as client:
            for _ in range(3):
                assert (await generate(client, "data/private")).status == 404
                await asyncio.sleep(0.02)
            assert "data/private" not in shards.known[0]

    run(check())


def test_an_upload_that_never_ends_frees_its_place():
    async def check():
        async with gateway(Shards(), limits=Limits(in_flight=2, upload_s=0.2)) as client:
            port = client.server.port
            writers = []
            for _ in range(2):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")
                writers.append(writer)
            await asyncio.sleep(0.05)
            assert (await generate(client)).status == 429
            while (response := await generate(client)).status == 429:
                await asyncio.sleep(0.05)
            assert response.status == 200
            metrics = await (await client.get("/metrics")).text()
            assert 'preft_refused_total{status="408"} 2.0' in metrics
            for writer in writers:
                writer.close()

    run(check())


def test_repeated_headers_pass_and_those_of_the_connection_do_not():
    async def check():
        async with gateway(Shards()) as client:
            headers = [("X-Forwarded-For", "1"), ("X-Forwarded-For", "2"), ("Connection", "X-Mine"), ("X-Mine", "3")]
            await client.post("/generate", json={"inputs": "x"}, headers=headers)
            _, _, passed = client.seen[-1]
            assert passed.getall("X-Forwarded-For") == ["1", "2"]
            assert "X-Mine" not in passed
            for path in ("/docs", "/docs/", "/docs/swagger-ui.css", "/api-doc/openapi.json"):
                assert (await client.get(path)).status == 200

    run(check())


def test_what_is_no_utf8_and_too_deep_on_admin_routes():
    async def check():
        async with gateway(Shards()) as client:
            _, writer = reader_and_writer = await asyncio.open_connection("127.0.0.1", client.server.port)
            writer.write(b"GET /preft/adapters HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer \xff\r\n\r\n")
            assert b" 401 " in await reader_and_writer[0].readline()
            writer.close()
            response = await client.post("/preft/adapters", data=b"[" * 100_000, headers=SECRET)
            assert response.status == 422

    run(check())


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (AdapterError("no"), "refused"),
        (HubError("no way"), "failed"),
        (UnknownAdapter("who"), "unknown"),
        (AdapterTaken("twice"), "taken"),
        (UnicodeError("?"), "refused"),
        (OSError("full"), "failed"),
    ],
)
def test_every_error_of_a_rank_is_an_answer(error, kind):
    def add(name, location):
        raise error

    with tempfile.TemporaryDirectory(prefix="preft-") as root:
        server = ControlServer(Path(root) / "c", 0, SimpleNamespace(add=add))
        server.start()
        try:
            answer = ask(Path(root) / "c", 0, {"op": "add", "name": "x", "location": "y"})
        finally:
            server.close()
    assert (answer["ok"], answer["kind"]) == (False, kind)
