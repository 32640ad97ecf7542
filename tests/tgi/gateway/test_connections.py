"""What one client cannot take from the others: compressed and large bodies, headers, connections that stall."""

import asyncio
import gzip
import time

import pytest
from aiohttp import ConnectionTimeoutError, web

from tests.tgi.gateways import Shards, answering_after, gateway, generate, run
from tgi_patch.gateway.connections import LARGE_BODY, Connections, Limits

HEAD = b"POST /generate HTTP/1.1\r\nHost: x\r\n"


async def raw(client, text):
    """Opens a connection, sends bytes and returns its streams."""
    reader, writer = await asyncio.open_connection("127.0.0.1", client.server.port)
    writer.write(text)
    return reader, writer


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "GZIP", "identity, gzip"])
@pytest.mark.parametrize("path", ["/generate", "/tokenize", "/preft/adapters"])
def test_a_compressed_body_is_refused_unread(encoding, path):
    async def check():
        async with gateway(Shards()) as client:
            # never sent whole: a response can only come from the headers
            head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Encoding: {encoding}\r\nContent-Length: 999\r\n"
            reader, writer = await raw(client, f"{head}Authorization: Bearer secret\r\n\r\nnot compressed".encode())
            assert b" 415 " in await reader.readline()
            writer.close()
            assert client.seen == []

    run(check())


def test_a_body_is_never_inflated():
    async def check():
        async with gateway(Shards(), limits=Limits(body_bytes=5000)) as client:
            bomb = gzip.compress(bytes(4_000_000))
            assert len(bomb) < 5000
            response = await client.post("/generate", data=bomb, headers={"Content-Encoding": "gzip"})
            assert (response.status, "uncompressed" in await response.text()) == (415, True)
            # the value says that it is not compressed
            plain = await client.post("/generate", data=b'{"inputs": "x"}', headers={"Content-Encoding": "identity"})
            assert plain.status == 200

    run(check())


def test_a_body_that_says_it_is_too_large_is_refused_unread():
    async def check():
        async with gateway(Shards(), limits=Limits(body_bytes=100)) as client:
            reader, writer = await raw(client, HEAD + b"Content-Length: 101\r\n\r\n")
            assert b" 413 " in await reader.readline()
            writer.close()
            for size, status in ((100, 200), (101, 413)):
                body = b'{"inputs": "' + b"x" * (size - 14) + b'"}'
                assert (await client.post("/generate", data=body)).status == status

                async def parts(body=body):
                    yield body

                assert (await client.post("/generate", data=parts())).status == status

    run(check())


@pytest.mark.parametrize("head", [b"", b"POST /gen", HEAD, HEAD + b"X-Half: 1"])
def test_a_connection_that_sends_no_whole_headers_is_closed(head):
    async def check():
        async with gateway(Shards(), limits=Limits(header_s=0.2, idle_s=0.2)) as client:
            reader, writer = await raw(client, head)
            assert await reader.read() == b""
            writer.close()
            # likewise after a first request
            reader, writer = await raw(client, b"GET /info HTTP/1.1\r\nHost: x\r\n\r\n" + head)
            assert (await reader.read()).startswith(b"HTTP/1.1 200")
            writer.close()

    run(check())


def test_a_request_that_takes_long_is_not_closed():
    ended = asyncio.Event()

    async def check():
        limits = Limits(header_s=0.1, idle_s=0.1)
        async with gateway(Shards(), limits=limits, upstream=answering_after(ended)) as client:
            running = asyncio.ensure_future(generate(client, "acme"))
            await asyncio.sleep(0.5)
            ended.set()
            assert (await running).status == 200

    run(check())


def test_a_client_that_does_not_read_its_stream_frees_its_request():
    left = asyncio.Event()

    async def endless(request):
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        try:
            while True:
                await response.write(b"data:" + b"x" * 65_536 + b"\n\n")
        finally:
            left.set()

    async def check():
        async with gateway(Shards(), limits=Limits(download_s=0.2), upstream=endless) as client:
            body = b'{"inputs": "x"}'
            head = b"POST /generate_stream HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
            _, writer = await raw(client, head + body)
            await left.wait()
            writer.close()

    run(check())


def test_headers_of_more_than_8_kilobytes_pass():
    async def check():
        async with gateway(Shards()) as client:
            long = "a" * 50_000
            response = await client.post("/generate", json={"inputs": "x"}, headers={"X-Long": long})
            assert response.status == 200
            assert client.seen[-1][2]["X-Long"] == long

    run(check())


def test_a_malformed_request_leaves_no_traceback_in_the_log(caplog):
    async def check():
        async with gateway(Shards()) as client:
            reader, writer = await raw(client, b"no http\r\n\r\n")
            assert b" 400 " in await reader.readline()
            writer.close()

    run(check())
    assert not caplog.records


@pytest.mark.parametrize("first", [b"", b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}"])
def test_headers_without_end_close_the_connection(first):
    async def check():
        async with gateway(Shards(), limits=Limits(body_bytes=200_000)) as client:
            connections, server = Connections(Limits(penalty_s=0.3)), client.server.runner.server
            async with await connections.listen(server, "127.0.0.1", 0) as listening:
                reader, writer = await asyncio.open_connection(*listening.sockets[0].getsockname())
                writer.write(first)
                if first:
                    assert b" 200 " in await reader.readuntil(b"\r\n")
                    await reader.readuntil(b"}")
                # many headers, each of them small
                for i in range(70):
                    writer.write(f"X-{i}: {'x' * 1000}\r\n".encode() if i else HEAD)
                    await asyncio.sleep(0)
                assert b" 431 " in await reader.readline()
                writer.close()
                # a body is not taken for headers, and a stream and the next request pass
                reader, writer = await asyncio.open_connection(*listening.sockets[0].getsockname())
                for _ in range(2):
                    body = b'{"inputs": "' + b"x" * 150_000 + b'"}'
                    writer.write(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
                    assert b" 200 " in await reader.readuntil(b"\r\n")
                    await reader.readuntil(b"}")
                writer.close()

    run(check())


def test_large_bodies_leave_the_event_loop_to_others():
    """2 MB of nested arrays take 0.1 s to parse: twenty at once must not be parsed one right after the other."""

    async def check():
        connections = Connections(Limits())
        order = []

        def parse(body):
            order.append("large")
            time.sleep(0.02)

        async def small():
            while order.count("large") < 3:
                order.append("small")
                await asyncio.sleep(0.001)

        large = [connections.parsed(bytes(LARGE_BODY), parse) for _ in range(3)]
        await asyncio.gather(small(), *large)
        # between two large bodies the others had the loop many times
        first, second, third = (i for i, what in enumerate(order) if what == "large")
        assert order[first + 1 : second].count("small") > 2
        assert order[second + 1 : third].count("small") > 2

    run(check())


def test_a_hostile_request_waits_for_its_error_response():
    async def check():
        async with gateway(Shards()) as client:
            client.gateway._limits = Limits(penalty_s=60)
            bad = asyncio.ensure_future(client.post("/generate", data=b"x", headers={"Content-Encoding": "gzip"}))
            assert (await generate(client)).status == 200
            await asyncio.sleep(0.1)
            assert not bad.done()
            # other errors come at once
            assert (await generate(client, "nobody")).status == 404
            bad.cancel()

    run(check())


def test_an_upstream_that_accepts_no_connection_is_a_502():
    async def check():
        async with gateway(Shards()) as client:

            def late(*arguments, **options):
                raise ConnectionTimeoutError("no connection in 5 s")

            client.gateway._session.request = late
            response = await generate(client)
            assert (response.status, "router does not respond" in await response.text()) == (502, True)

    run(check())
