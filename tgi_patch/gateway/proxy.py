"""The gateway: a proxy on the public port that rejects requests for bad adapters before TGI's router sees them.

TGI has no error for one request of a batch: an error in a prefill fails every request in it. So adapter ids are
checked here. Everything else, streams included, is forwarded unchanged.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import aiohttp
from aiohttp import web
from multidict import CIMultiDict

from tgi_patch.gateway.adapters import AdapterManager
from tgi_patch.gateway.admin import AdminRoutes
from tgi_patch.gateway.connections import Connections, Handler, Limits
from tgi_patch.gateway.errors import ErrorResponse, RequestRejected, rejection
from tgi_patch.gateway.request_body import ANY, GENERATE, OPENAI, VERTEX, adapters_of
from tgi_patch.gateway.telemetry import Metrics

NO_ADAPTER = ("/tokenize", "/chat_tokenize")
FORWARDED_GET = ("/info", "/ping", "/docs", "/docs/{tail:.*}", "/api-doc/openapi.json")
HOP_BY_HOP = {
    "connection",
    "content-length",
    "date",
    "host",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "server",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
}


class Gateway:
    """The proxy's application.

    Args:
        upstream: URL of TGI's router, without a slash at its end
        adapters: which adapters a request may name
        admin_token: for the routes under /preft; empty turns them off
        limits: see Limits
    """

    def __init__(self, upstream: str, adapters: AdapterManager, admin_token: str = "", limits: Limits | None = None):
        self._upstream = upstream
        self._adapters = adapters
        self._limits = limits or Limits()
        self.connections = Connections(self._limits)
        self._admin = AdminRoutes(adapters, admin_token, self.connections)
        self.metrics = Metrics()
        self._session: aiohttp.ClientSession | None = None
        self._in_flight = 0
        self.stopping = False

    def application(self) -> web.Application:
        """Returns the aiohttp application. Run it with `connections.SERVER_OPTIONS`."""
        # one byte more: `body` has the exact limit
        application = web.Application(
            client_max_size=self._limits.body_bytes + 1, middlewares=[self._errors, self.connections.middleware]
        )
        for path in (*GENERATE, *OPENAI, *ANY, *VERTEX):
            application.router.add_post(path, self._generate)
        for path in NO_ADAPTER:
            application.router.add_post(path, self._tokenize)
        for path in FORWARDED_GET:
            application.router.add_get(path, self._get)
        # a browser's preflight request: the router answers it
        for path in (*GENERATE, *OPENAI, *ANY, *VERTEX, *NO_ADAPTER):
            application.router.add_route("OPTIONS", path, self._get)
        application.router.add_get("/v1/models", self._models)
        application.router.add_get("/health", self._health)
        application.router.add_get("/metrics", self._metrics)
        self._admin.add_to(application)
        application.cleanup_ctx.append(self._connected)
        return application

    async def drained(self) -> bool:
        """Rejects new requests and waits for those in flight. Returns whether all finished in time."""
        self.stopping = True
        deadline = asyncio.get_running_loop().time() + self._limits.drain_s
        while self._in_flight and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.05)
        return self._in_flight == 0

    async def _connected(self, application: web.Application) -> AsyncIterator[None]:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=self._limits.upstream_s)
        connector = aiohttp.TCPConnector(limit=0)
        # what TGI compresses stays compressed
        self._session = aiohttp.ClientSession(timeout=timeout, connector=connector, auto_decompress=False)
        yield
        await self._session.close()
        await self._adapters.close()

    @web.middleware
    async def _errors(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Turns RequestRejected into a response, and counts it."""
        try:
            return await handler(request)
        except RequestRejected as error:
            self.metrics.rejected(str(error.response.status))
            return _error_response(request, error.response)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Counts a request as in flight.

        Raises:
            RequestRejected: 429 for too many, 503 if the service is stopping.
        """
        if self.stopping:
            raise rejection(503, "the server is stopping", 5)
        if self._in_flight >= self._limits.in_flight:
            raise rejection(429, f"{self._in_flight} requests are in flight, which is the limit: try again", 1)
        self._in_flight += 1
        self.metrics.in_flight.set(self._in_flight)
        try:
            yield
        finally:
            self._in_flight -= 1
            self.metrics.in_flight.set(self._in_flight)

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        with self._counted():
            body = await self.connections.body(request)
            names = adapters_of(request.path, body)
            with self._adapters.lease(names):
                for name in (names - self._adapters.base_ids) or {None}:
                    self.metrics.forwarded(name)
                return await self._forward(request, body)

    async def _tokenize(self, request: web.Request) -> web.StreamResponse:
        with self._counted():
            return await self._forward(request, await self.connections.body(request))

    async def _get(self, request: web.Request) -> web.StreamResponse:
        return await self._forward(request, b"")

    async def _forward(self, request: web.Request, body: bytes) -> web.StreamResponse:
        """Returns TGI's response; a stream is forwarded part by part.

        Raises:
            RequestRejected: 502 or 504 if TGI's router does not respond.
            CancelledError: the stream broke, and the client's connection was aborted.
        """
        assert self._session is not None
        url = self._upstream + request.path_qs
        response: web.StreamResponse | None = None
        try:
            async with self._session.request(
                request.method, url, data=body or None, headers=_end_to_end(request.headers), allow_redirects=False
            ) as upstream:
                headers = _end_to_end(upstream.headers)
                if not upstream.content_type.startswith("text/event-stream"):
                    return web.Response(status=upstream.status, body=await upstream.read(), headers=headers)
                response = web.StreamResponse(status=upstream.status, headers=headers)
                await response.prepare(request)
                async for part in upstream.content.iter_any():
                    async with asyncio.timeout(self._limits.download_s):
                        await response.write(part)
                await response.write_eof()
                return response
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            if response is not None:
                # the response has begun: abort the connection, so that the client does not take it for complete
                self.metrics.rejected("upstream")
                if request.transport is not None:
                    request.transport.abort()
                raise asyncio.CancelledError from error
            if isinstance(error, TimeoutError):
                raise rejection(504, f"TGI sent nothing for {self._limits.upstream_s:g} s") from error
            raise rejection(502, f"TGI's router does not respond: {error}", 5) from error

    async def _models(self, request: web.Request) -> web.StreamResponse:
        names = self._adapters.names()
        models = [{"id": name, "object": "model", "created": 0, "owned_by": "preft"} for name in names]
        return web.json_response({"object": "list", "data": models})

    async def _health(self, request: web.Request) -> web.StreamResponse:
        if self.stopping:
            raise rejection(503, "the server is stopping")
        if not await self._adapters.start():
            raise rejection(503, "the server is starting", 2)
        return await self._forward(request, b"")

    async def _metrics(self, request: web.Request) -> web.StreamResponse:
        assert self._session is not None
        own = self.metrics.text(await self._adapters.statistics())
        try:
            async with self._session.get(self._upstream + "/metrics") as response:
                upstream = await response.read() if response.status == 200 else b""
        except (TimeoutError, aiohttp.ClientError, OSError):
            upstream = b""
        return web.Response(body=upstream + own, headers={"Content-Type": "text/plain; version=0.0.4"})


def _end_to_end(headers: Mapping[str, str]) -> CIMultiDict[str]:
    """Returns the headers that are forwarded, repeated ones too: all but those of the connection itself."""
    named = {name.strip().lower() for name in headers.get("Connection", "").split(",")}
    return CIMultiDict((n, v) for n, v in headers.items() if n.lower() not in HOP_BY_HOP | named)


def _error_response(request: web.Request, error: ErrorResponse) -> web.Response:
    """Returns an error in the format of the route: OpenAI's, or TGI's."""
    kinds = {401: "authentication", 404: "not_found", 422: "validation", 429: "overloaded", 503: "overloaded"}
    kind = kinds.get(error.status, "generation")
    if request.path.startswith("/v1/"):
        body: dict[str, Any] = {"error": {"message": error.message, "type": kind, "code": error.status}}
    else:
        body = {"error": error.message, "error_type": kind}
    headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
    return web.json_response(body, status=error.status, headers=headers)
