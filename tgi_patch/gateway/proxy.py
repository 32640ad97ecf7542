"""The gateway: a proxy on the public port that rejects requests for bad adapters before TGI's router sees them.

TGI has no error for one request of a batch: an error in a prefill fails every request in it. So adapter ids are
checked here. Everything else, streams included, is forwarded unchanged.
"""

import asyncio
import hmac
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import aiohttp
from aiohttp import web
from multidict import CIMultiDict

from tgi_patch.gateway.adapters import AdapterManager
from tgi_patch.gateway.admin import AdminRoutes
from tgi_patch.gateway.connections import Connections, Handler, Limits
from tgi_patch.gateway.errors import RequestRejected, http_response, rejection
from tgi_patch.gateway.request_body import ANY, GENERATE, OPENAI, VERTEX, adapters_of
from tgi_patch.gateway.telemetry import Metrics, annotate, log, request_fields

FORWARDED_GET = ("/info", "/docs", "/docs/{tail:.*}", "/api-doc/openapi.json")
HEALTH = aiohttp.ClientTimeout(total=10)
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


@dataclass(frozen=True)
class GatewayOptions:
    """What an operator chose.

    Attributes:
        admin_token: for the routes under /preft/adapters; empty turns them off
        admin_apart: those routes are on another port, see `Gateway.admin_application`
        api_key: TGI's --api-key; empty is none
        access_log: writes one log line for each request
    """

    admin_token: str = field(default="", repr=False)
    admin_apart: bool = False
    api_key: str = field(default="", repr=False)
    access_log: bool = False


class Gateway:
    """The proxy's application.

    Args:
        upstream: URL of TGI's router, without a slash at its end
        adapters: which adapters a request may name
        options: see GatewayOptions
        limits: see Limits
    """

    def __init__(
        self,
        upstream: str,
        adapters: AdapterManager,
        options: GatewayOptions | None = None,
        limits: Limits | None = None,
    ):
        self._upstream = upstream
        self._options = options or GatewayOptions()
        self._adapters = adapters
        self._limits = limits or Limits()
        self.connections = Connections(self._limits)
        self._admin = AdminRoutes(adapters, self._options.admin_token, self.connections, self.ready)
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
        application.router.add_post("/tokenize", self._tokenize)
        application.router.add_post("/chat_tokenize", self._chat_tokenize)
        for path in FORWARDED_GET:
            application.router.add_get(path, self._get)
        for path in (*GENERATE, *OPENAI, *ANY, *VERTEX, "/tokenize", "/chat_tokenize"):
            application.router.add_route("OPTIONS", path, self._get)
        application.router.add_get("/v1/models", self._models)
        # TGI's router serves its health under three names; SageMaker asks /ping
        for path in ("/health", "/ping", "/"):
            application.router.add_get(path, self._health)
        application.router.add_get("/preft/live", self._live)
        application.router.add_get("/preft/ready", self._ready)
        application.router.add_get("/metrics", self._metrics)
        if not self._options.admin_apart:
            self._admin.add_to(application)
        application.cleanup_ctx.append(self._connected)
        return application

    def admin_application(self) -> web.Application:
        """Returns an application with the admin routes alone, for another port."""
        application = web.Application(middlewares=[self._errors, self.connections.middleware])
        self._admin.add_to(application)
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
        """Turns RequestRejected into a response. Sets the request id, and writes the access log."""
        began = asyncio.get_running_loop().time()
        status = 499  # as other servers log a client that left
        with request_fields(request.headers.get("X-Request-Id")) as fields:
            try:
                response = await handler(request)
                status = response.status
                return response
            except RequestRejected as error:
                status = error.response.status
                self.metrics.rejected(str(status))
                if status in {400, 408, 413, 415}:
                    await asyncio.sleep(self._limits.penalty_s)
                return http_response(error.response, request.path, fields["request_id"])
            except web.HTTPException as error:
                status = error.status
                raise
            finally:
                if self._options.access_log:
                    seconds = round(asyncio.get_running_loop().time() - began, 4)
                    log("request", method=request.method, path=request.path, status=status, seconds=seconds)

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

    def _has_key(self, request: web.Request) -> bool:
        """Returns whether a request has the API key, compared as TGI's router does: in any case, ASCII alone."""
        given = request.headers.get("Authorization", "")
        wanted = f"Bearer {self._options.api_key}".lower().encode()
        return not self._options.api_key or (given.isascii() and hmac.compare_digest(given.lower().encode(), wanted))

    def _check_key(self, request: web.Request) -> None:
        if not self._has_key(request):
            raise rejection(401, "send the server's API key as a bearer token")

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        self._check_key(request)
        with self._counted():
            body = await self.connections.body(request)
            names = await self.connections.parsed(body, partial(adapters_of, request.path))
            annotate(adapter=",".join(sorted(names)))
            with self._adapters.lease(names):
                self.metrics.forwarded(names - self._adapters.base_ids)
                return await self._forward(request, body)

    async def _tokenize(self, request: web.Request) -> web.StreamResponse:
        self._check_key(request)
        return await self._chat_tokenize(request)

    async def _chat_tokenize(self, request: web.Request) -> web.StreamResponse:
        # TGI's router asks no key for it
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
            if isinstance(error, aiohttp.SocketTimeoutError):
                raise rejection(504, f"TGI sent nothing for {self._limits.upstream_s} s") from error
            raise rejection(502, f"TGI's router does not respond: {error}", 5) from error

    async def _models(self, request: web.Request) -> web.StreamResponse:
        # adapter ids are for those that may use them
        names = self._adapters.names() if self._has_key(request) else self._adapters.base_names()
        models = [{"id": name, "object": "model", "created": 0, "owned_by": "preft"} for name in names]
        return web.json_response({"object": "list", "data": models})

    async def ready(self) -> str:
        """Returns why no request with an adapter can be served now; empty if it can."""
        assert self._session is not None
        if self.stopping:
            return "the server is stopping"
        try:
            async with self._session.get(self._upstream + "/health", timeout=HEALTH) as response:
                up = response.status == 200
        except (TimeoutError, aiohttp.ClientError, OSError):
            up = False
        if not up:
            return "TGI is not ready"
        return "" if await self._adapters.start() else "the adapters are not loaded yet"

    async def watch(self) -> None:
        """Waits until the service is ready, then watches its adapters. Does not return."""
        while await self.ready():
            await asyncio.sleep(0.5)
        await self._adapters.watch()

    async def _health(self, request: web.Request) -> web.StreamResponse:
        if reason := await self.ready():
            raise rejection(503, reason, 2)
        return web.Response()

    async def _live(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"live": True})

    async def _ready(self, request: web.Request) -> web.StreamResponse:
        reason = await self.ready()
        body = {"ready": not reason, "reason": reason, "in_flight": self._in_flight}
        return web.json_response(body, status=503 if reason else 200)

    async def _metrics(self, request: web.Request) -> web.StreamResponse:
        assert self._session is not None
        own = self.metrics.text(await self._adapters.statistics(), names=self._has_key(request))
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
