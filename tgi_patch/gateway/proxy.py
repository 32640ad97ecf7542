"""The gateway: a small proxy on the public port that answers for bad adapters before TGI's router sees them.

TGI has no error for one request of a batch: what fails in a prefill fails for every request in it. So an id is checked
here. Everything else, streams included, passes through unchanged.
"""

import asyncio
import hmac
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
from aiohttp import web
from multidict import CIMultiDict

from tgi_patch.gateway.adapters import AdapterManager
from tgi_patch.gateway.errors import ErrorResponse, RequestRejected, rejection
from tgi_patch.gateway.metrics import Metrics
from tgi_patch.gateway.request_body import EITHER, GENERATE, OPENAI, adapter_of

ALONGSIDE = ("/tokenize", "/chat_tokenize")
PASSED_GET = ("/info", "/ping", "/docs", "/docs/{tail:.*}", "/api-doc/openapi.json")
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
ADMIN = "/preft/adapters"


@dataclass(frozen=True)
class Limits:
    """What one client cannot take from the others.

    Attributes:
        body_bytes: of a request, as TGI's own limit
        in_flight: requests at once; more are answered with 429
        upload_s: seconds that a request may take to arrive
        silence_s: seconds without a byte from TGI, after which a request is given up
        drain_s: seconds that requests have to end when the service is stopped
    """

    body_bytes: int = 2 << 20
    in_flight: int = 4096
    upload_s: float = 60.0
    silence_s: float = 600.0
    drain_s: float = 60.0


class Gateway:
    """The proxy's application.

    Args:
        upstream: URL of TGI's router, without a slash at its end
        adapters: which adapters may be asked for
        admin_token: for the routes under /preft; empty turns them off
        limits: see Limits
    """

    def __init__(self, upstream: str, adapters: AdapterManager, admin_token: str = "", limits: Limits | None = None):
        self._upstream = upstream
        self._adapters = adapters
        self._admin_token = admin_token
        self._limits = limits or Limits()
        self.metrics = Metrics()
        self._session: aiohttp.ClientSession | None = None
        self._in_flight = 0
        self.stopping = False

    def application(self) -> web.Application:
        """Returns the aiohttp application. Run it with handler_cancellation, so that a client that goes away frees
        its request in TGI."""
        application = web.Application(client_max_size=self._limits.body_bytes)
        for path in (*GENERATE, *OPENAI, *EITHER):
            application.router.add_post(path, self._counted(self._adapted))
        for path in ALONGSIDE:
            application.router.add_post(path, self._counted(self._passed))
        for path in PASSED_GET:
            application.router.add_get(path, self._answering(self._passed))
        # a browser's question before a request to another origin: the router answers it
        for path in (*GENERATE, *OPENAI, *EITHER, *ALONGSIDE):
            application.router.add_route("OPTIONS", path, self._answering(self._passed))
        application.router.add_get("/v1/models", self._models)
        application.router.add_get("/health", self._health)
        application.router.add_get("/metrics", self._metrics)
        application.router.add_get(ADMIN, self._admin(self._list))
        application.router.add_post(ADMIN, self._admin(self._add))
        application.router.add_delete(ADMIN + "/{name:.+}", self._admin(self._remove))
        application.cleanup_ctx.append(self._connected)
        return application

    async def drained(self) -> bool:
        """Takes no new requests and waits for those in flight. Returns whether all ended in time."""
        self.stopping = True
        deadline = asyncio.get_running_loop().time() + self._limits.drain_s
        while self._in_flight and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.05)
        return self._in_flight == 0

    async def _connected(self, application: web.Application) -> AsyncIterator[None]:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=self._limits.silence_s)
        connector = aiohttp.TCPConnector(limit=0)
        # what TGI compresses stays compressed
        self._session = aiohttp.ClientSession(timeout=timeout, connector=connector, auto_decompress=False)
        yield
        await self._session.close()
        await self._adapters.close()

    def _answering(self, handle: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> Any:
        """Returns a handler whose RequestRejected is the answer."""

        async def answering(request: web.Request) -> web.StreamResponse:
            try:
                return await handle(request)
            except RequestRejected as error:
                return self._refused(request, error.response)

        return answering

    def _counted(self, handle: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> Any:
        """Returns a handler that answers, and holds one of the places for requests meanwhile."""

        async def counted(request: web.Request) -> web.StreamResponse:
            with self._place():
                return await handle(request)

        return self._answering(counted)

    @contextmanager
    def _place(self) -> Iterator[None]:
        if self.stopping:
            raise rejection(503, "the server is stopping", 5)
        if self._in_flight >= self._limits.in_flight:
            busy = f"{self._in_flight} requests are in flight, as many as are taken: ask again"
            raise rejection(429, busy, 1)
        self._in_flight += 1
        self.metrics.in_flight.set(self._in_flight)
        try:
            yield
        finally:
            self._in_flight -= 1
            self.metrics.in_flight.set(self._in_flight)

    async def _adapted(self, request: web.Request) -> web.StreamResponse:
        text = await self._body(request)
        with self._adapters.using(adapter_of(request.path, text)) as adapter:
            self.metrics.asked(adapter)
            return await self._forwarded(request, text)

    async def _passed(self, request: web.Request) -> web.StreamResponse:
        return await self._forwarded(request, await self._body(request))

    async def _body(self, request: web.Request) -> bytes:
        try:
            async with asyncio.timeout(self._limits.upload_s):
                return await request.read()
        except web.HTTPRequestEntityTooLarge as error:
            raise rejection(413, f"the request has more than {self._limits.body_bytes} bytes") from error
        except TimeoutError as error:
            late = f"the request was not here whole after {self._limits.upload_s:g} s"
            raise rejection(408, late) from error

    def _refused(self, request: web.Request, error: ErrorResponse, status: str = "") -> web.Response:
        """Returns an error in place of TGI's answer, and counts it."""
        self.metrics.answered(status or str(error.status))
        return _error_response(request, error)

    async def _forwarded(self, request: web.Request, text: bytes) -> web.StreamResponse:
        """Returns TGI's answer, passed on piece by piece as it comes."""
        assert self._session is not None
        headers = _kept(request.headers)
        url = self._upstream + request.path_qs
        response: web.StreamResponse | None = None
        try:
            async with self._session.request(
                request.method, url, data=text or None, headers=headers, allow_redirects=False
            ) as answer:
                if not answer.content_type.startswith("text/event-stream"):
                    return web.Response(status=answer.status, body=await answer.read(), headers=_kept(answer.headers))
                response = web.StreamResponse(status=answer.status, headers=_kept(answer.headers))
                await response.prepare(request)
                async for piece in answer.content.iter_any():
                    await response.write(piece)
                await response.write_eof()
                return response
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            if response is not None:
                self.metrics.answered("upstream")
                # the answer has begun: end the connection, so that the client does not take it for whole
                if request.transport is not None:
                    request.transport.abort()
                return response
            late = isinstance(error, asyncio.TimeoutError)
            if late:
                silent = ErrorResponse(504, f"TGI said nothing for {self._limits.silence_s:g} s")
                return self._refused(request, silent, "upstream")
            return self._refused(request, ErrorResponse(502, f"TGI's router does not answer: {error}", 5), "upstream")

    async def _models(self, request: web.Request) -> web.StreamResponse:
        models = [
            {"id": name, "object": "model", "created": 0, "owned_by": "preft"} for name in self._adapters.names()
        ]
        return web.json_response({"object": "list", "data": models})

    async def _health(self, request: web.Request) -> web.StreamResponse:
        if self.stopping:
            return _error_response(request, ErrorResponse(503, "the server is stopping"))
        if not await self._adapters.start():
            return _error_response(request, ErrorResponse(503, "the server is starting", 2))
        return await self._forwarded(request, b"")

    async def _metrics(self, request: web.Request) -> web.StreamResponse:
        assert self._session is not None
        ours = self.metrics.text(await self._adapters.statistics())
        try:
            async with self._session.get(self._upstream + "/metrics") as answer:
                theirs = await answer.read() if answer.status == 200 else b""
        except (TimeoutError, aiohttp.ClientError, OSError):
            theirs = b""
        return web.Response(body=theirs + ours, headers={"Content-Type": "text/plain; version=0.0.4"})

    def _admin(self, handle: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> Any:
        async def checked(request: web.Request) -> web.StreamResponse:
            if not self._admin_token:
                return _error_response(
                    request, ErrorResponse(403, "set PREFT_ADMIN_TOKEN to manage adapters while the server runs")
                )
            given = request.headers.get("Authorization", "").removeprefix("Bearer ")
            # a header may have bytes that are no UTF-8
            if not hmac.compare_digest(given.encode(errors="surrogateescape"), self._admin_token.encode()):
                return _error_response(request, ErrorResponse(401, "give PREFT_ADMIN_TOKEN as a bearer token"))
            try:
                return await handle(request)
            except RequestRejected as error:
                return _error_response(request, error.response)

        return checked

    async def _list(self, request: web.Request) -> web.StreamResponse:
        await self._adapters.start()
        return web.json_response({"adapters": self._adapters.ready})

    async def _add(self, request: web.Request) -> web.StreamResponse:
        try:
            body = await request.json()
            name, location = body["id"], body.get("location") or body["id"]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            name = location = None
        if not isinstance(name, str) or not isinstance(location, str):
            return _error_response(
                request, ErrorResponse(422, 'give {"id": "acme", "location": "org/name@revision or a directory"}')
            )
        if not await self._adapters.start():
            return _error_response(request, ErrorResponse(503, "the server is starting", 2))
        await self._adapters.add(name, location)
        return web.json_response({"id": name, **self._adapters.ready.get(name, {})}, status=201)

    async def _remove(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        at_once = await self._adapters.remove(name)
        state = "removed" if at_once else "leaving when its requests have ended"
        return web.json_response({"id": name, "state": state}, status=200 if at_once else 202)


def _kept(headers: Mapping[str, str]) -> CIMultiDict[str]:
    """Returns the headers that are passed on, repeated ones too: those of the connection itself are not."""
    named = {name.strip().lower() for name in headers.get("Connection", "").split(",")}
    return CIMultiDict((n, v) for n, v in headers.items() if n.lower() not in HOP_BY_HOP | named)


def _error_response(request: web.Request, error: ErrorResponse) -> web.Response:
    """Returns an error in the form of the route: OpenAI's, or TGI's."""
    kinds = {401: "authentication", 404: "not_found", 422: "validation", 429: "overloaded", 503: "overloaded"}
    kind = kinds.get(error.status, "generation")
    if request.path.startswith("/v1/"):
        body: dict[str, Any] = {"error": {"message": error.message, "type": kind, "code": error.status}}
    else:
        body = {"error": error.message, "error_type": kind}
    headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
    return web.json_response(body, status=error.status, headers=headers)
