"""Limits on what one client can take from the others: sizes, times, and connections that send no request."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from tgi_patch.gateway.errors import rejection

LOGGER = logging.getLogger("preft.http")
# a client's malformed request is no error of the server: without this, each costs a traceback in the log
LOGGER.addFilter(lambda record: not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError)))
Parsed = TypeVar("Parsed")
LARGE_BODY = 64 << 10
"""Bytes. 2 MB of nested JSON arrays take 0.1 s to parse, 64 KiB 3 ms."""
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
SERVER_OPTIONS: dict[str, Any] = {
    # a client that disconnects frees its request in TGI
    "handler_cancellation": True,
    # bodies are never inflated: 2 MB of gzip can be 2 GB
    "auto_decompress": False,
    # bytes of the request line and of one header; aiohttp's default of 8190 is below what TGI's router accepts
    "max_line_size": 32 << 10,
    "max_field_size": 32 << 10,
    "access_log": None,
    "logger": LOGGER,
}
"""Options of `web.AppRunner`."""


@dataclass(frozen=True)
class Limits:
    """What one client cannot take from the others.

    Attributes:
        body_bytes: size of a request body; TGI's --payload-limit
        in_flight: concurrent requests; further ones get a 429
        header_s: seconds until a new connection has sent the headers of its first request
        idle_s: seconds until a connection has sent the headers of its next request
        upload_s: seconds until a request body is complete
        penalty_s: seconds until a malformed, large or compressed request gets its error, so that a client cannot send
            one after the other
        download_s: seconds until a client has read a part of a stream
        upstream_s: seconds without a byte from TGI until a request gets a 504; None is no limit
        drain_s: seconds that requests have to finish when the service stops
    """

    body_bytes: int = 2_000_000
    in_flight: int = 4096
    header_s: float = 20.0
    idle_s: float = 75.0
    upload_s: float = 60.0
    penalty_s: float = 1.0
    download_s: float = 120.0
    upstream_s: float | None = None
    drain_s: float = 60.0


class Connections:
    """Limits of one client's connections. aiohttp itself waits an hour or more for the headers of a request."""

    def __init__(self, limits: Limits):
        self._limits = limits
        # large bodies are parsed one at a time
        self._parsing = asyncio.Lock()
        # connection -> when it has to have sent the headers of a request; infinity while a request is processed
        self._deadlines: dict[web.RequestHandler[web.Request], float] = {}

    async def watch(self, server: web.Server, period_s: float = 1.0) -> None:
        """Closes late connections of a server. Does not return."""
        now = asyncio.get_running_loop().time
        while True:
            await asyncio.sleep(period_s)
            for connection in server.connections:
                if self._deadlines.setdefault(connection, now() + self._limits.header_s) <= now():
                    connection.force_close()
            self._deadlines = {c: deadline for c, deadline in self._deadlines.items() if c.transport is not None}

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Suspends the deadline of a connection while its request is processed."""
        self._deadlines[request.protocol] = float("inf")
        try:
            return await handler(request)
        finally:
            self._deadlines[request.protocol] = asyncio.get_running_loop().time() + self._limits.idle_s

    async def body(self, request: web.Request) -> bytes:
        """Returns the body of a request.

        Raises:
            RequestRejected: 415 for a compressed body, 413 for a large one, 408 for a late one.
        """
        encoding = request.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in {"", "identity"}:
            raise rejection(415, f"Content-Encoding is {encoding!r}: send the request body uncompressed")
        too_large = (
            f"the request body is larger than {self._limits.body_bytes} bytes: shorten it, or raise --payload-limit"
        )
        if (request.content_length or 0) > self._limits.body_bytes:
            raise rejection(413, too_large)
        try:
            async with asyncio.timeout(self._limits.upload_s):
                body = await request.read()
        except web.HTTPRequestEntityTooLarge as error:
            raise rejection(413, too_large) from error
        except TimeoutError as error:
            late = f"the request body was not complete after {self._limits.upload_s:g} s: send it faster"
            raise rejection(408, late) from error
        except web.RequestPayloadError as error:
            raise rejection(400, f"the request body is malformed: {error}") from error
        if len(body) > self._limits.body_bytes:
            raise rejection(413, too_large)
        return body

    async def parsed(self, body: bytes, parse: Callable[[bytes], Parsed]) -> Parsed:
        """Returns the result of a parser. Large bodies get at most a quarter of the event loop's time."""
        if len(body) < LARGE_BODY:
            return parse(body)
        now = asyncio.get_running_loop().time
        async with self._parsing:
            began = now()
            try:
                return parse(body)
            finally:
                await asyncio.sleep(3 * (now() - began))
