"""The routes under /preft: adapters are listed, added and removed while the server runs."""

import hmac
import json
from collections.abc import Awaitable, Callable

from aiohttp import web

from tgi_patch.gateway.adapters import AdapterManager
from tgi_patch.gateway.connections import Connections, Handler
from tgi_patch.gateway.errors import rejection

PATH = "/preft/adapters"


class AdminRoutes:
    """Handlers of the admin routes. Each checks the token first.

    Args:
        adapters: what they manage
        token: the bearer token that a request has to have; empty turns the routes off
        connections: reads request bodies
        ready: returns why no adapter can be added now; empty if one can
    """

    def __init__(
        self, adapters: AdapterManager, token: str, connections: Connections, ready: Callable[[], Awaitable[str]]
    ):
        self._adapters = adapters
        self._token = token
        self._connections = connections
        self._ready = ready

    def add_to(self, application: web.Application) -> None:
        """Adds the routes to an application."""
        application.router.add_get(PATH, self._checked(self._list))
        application.router.add_post(PATH, self._checked(self._add))
        application.router.add_delete(PATH + "/{name:.+}", self._checked(self._remove))

    def _checked(self, handle: Handler) -> Handler:
        async def checked(request: web.Request) -> web.StreamResponse:
            if not self._token:
                raise rejection(403, "the admin routes are off: set PREFT_ADMIN_TOKEN")
            given = request.headers.get("Authorization", "").removeprefix("Bearer ")
            # a header may have bytes that are no UTF-8
            if not hmac.compare_digest(given.encode(errors="surrogateescape"), self._token.encode()):
                raise rejection(401, "send PREFT_ADMIN_TOKEN as a bearer token")
            return await handle(request)

        return checked

    async def _list(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"adapters": self._adapters.listed()})

    async def _add(self, request: web.Request) -> web.StreamResponse:
        text = await self._connections.body(request)
        try:
            body = json.loads(text)
            name, location = body["id"], body.get("location") or body["id"]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            name = location = None
        if not isinstance(name, str) or not isinstance(location, str):
            raise rejection(422, 'the body must be {"id": "acme", "location": "org/name@revision or a directory"}')
        # an adapter that is added while TGI captures its CUDA graphs can break the start
        reason = await self._ready()
        if reason:
            raise rejection(503, f"{reason}: try again", 2)
        facts = await self._adapters.add(name, location)
        return web.json_response({"id": name, **facts}, status=201)

    async def _remove(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        at_once = await self._adapters.remove(name)
        state = "removed" if at_once else "removed when its requests have finished"
        return web.json_response({"id": name, "state": state}, status=200 if at_once else 202)
