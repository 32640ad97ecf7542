"""Limits on what one client can take from the others: sizes, times, and connections that send no request."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from tgi_patch.gateway.errors import rejection

HEADER_BYTES = 64 << 10
"""Size limit of all headers of a request together."""
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
    # aiohttp's default of 8190 is below what TGI's router accepts
    "max_line_size": HEADER_BYTES,
    "max_field_size": HEADER_BYTES,
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
        self._deadlines: dict[web.RequestHandler, float] = {}

    async def listen(self, server: web.Server, host: str, port: int) -> asyncio.Server:
        """Accepts connections for a server of aiohttp, and limits the size of their headers."""

        def protocol() -> asyncio.Protocol:
            return _HeaderLimiter(server(), self._limits.penalty_s)

        return await asyncio.get_running_loop().create_server(protocol, host, port)

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
            limiter = None if request.transport is None else request.transport.get_protocol()
            if isinstance(limiter, _HeaderLimiter) and request.content.is_eof():
                limiter.expect_headers()

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


class _HeaderLimiter(asyncio.Protocol):
    """Stands between a connection and aiohttp, and closes the connection if the headers of a request are too large.

    aiohttp responds to them at once, so a client that sends one such request after the other takes its whole time.
    """

    def __init__(self, inner: web.RequestHandler, penalty_s: float):
        self._inner = inner
        self._penalty_s = penalty_s
        self._transport: asyncio.Transport | None = None
        # the headers so far; None while a body is read or a response is written
        self._headers: bytearray | None = bytearray()
        self._rejected = False

    def expect_headers(self) -> None:
        """Limits what comes next, as the request before is complete."""
        self._headers = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._inner.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        if self._headers is not None and not self._rejected:
            self._headers += data
            end = self._headers.find(b"\r\n\r\n")
            if end >= 0 and end <= HEADER_BYTES:
                self._headers = None
            elif len(self._headers) > HEADER_BYTES:
                self._reject()
        if not self._rejected:
            self._inner.data_received(data)

    def _reject(self) -> None:
        assert self._transport is not None
        self._rejected, self._headers = True, None
        self._transport.pause_reading()
        asyncio.get_running_loop().call_later(self._penalty_s, self._close, self._transport)

    def _close(self, transport: asyncio.Transport) -> None:
        if not transport.is_closing():
            status = b"431 Request Header Fields Too Large"
            transport.write(b"HTTP/1.1 " + status + b"\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
            # closing with unread data would reset the connection before the client has read the response
            with suppress(OSError):
                transport.write_eof()
            asyncio.get_running_loop().call_later(self._penalty_s, transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self._inner.connection_lost(exc)

    def eof_received(self) -> bool | None:
        return self._inner.eof_received()

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()
