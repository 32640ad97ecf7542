"""The adapters of all shards, as the gateway sees them: ready, on their way, refused, or leaving."""

import asyncio
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from preft_core.format.config import AdapterError
from preft_core.hub.manifest import name_fault
from preft_core.hub.source import find_adapter, hub_id, same_place
from preft_core.pool.lease import unknown_names
from tgi_patch.gateway.errors import RETRY_AFTER_S, ErrorResponse, RequestRejected, load_error, rejection, shard_error
from tgi_patch.gateway.shards import Shards
from tgi_patch.server.control import ask
from tgi_patch.settings import BASE_IDS, Settings

HUB_ID = re.compile(r"([\w][\w.-]*)/[\w][\w.-]*")
REFUSED_FOR_S = 60.0
"""Seconds that a refusal is remembered, so that a bad adapter is not downloaded for every request."""
FAILED_FOR_S = 5.0
"""Seconds that a failure which may pass, as of the network, is remembered."""
WATCH_S = 2.0
"""Seconds between two looks at what the shards hold."""


class AdapterManager:
    """Which adapters a request may name. All methods run in one event loop; the shards are asked in threads.

    Args:
        settings: limits and where adapters may come from
        world_size: number of shards
        base_ids: names of the base model
        others: ids of TGI's own LORA_ADAPTERS
        ask: sends a request to a shard, as `control.ask`
    """

    def __init__(
        self,
        settings: Settings,
        world_size: int,
        base_ids: set[str],
        others: set[str],
        ask: Callable[..., dict[str, Any]] = ask,
    ):
        self._settings = settings
        self._shards = Shards(settings.control, world_size, ask)
        self.base_ids = {*BASE_IDS, *base_ids}
        self._others = others
        self.ready: dict[str, dict[str, Any]] = {}
        self.started = False
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._refused: dict[str, tuple[float, ErrorResponse]] = {}
        self._in_flight: Counter[str] = Counter()
        self._leaving: set[str] = set()
        # names under which some shard may still hold an adapter that is no longer served
        self._unclear: set[str] = set()
        self._idle = asyncio.Condition()
        self._changes = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        # loaded because a request named them: id -> when it was last used
        self._lazy: dict[str, float] = {}
        # downloads have threads of their own, so that a slow Hub does not keep the shards from being asked
        self._downloads = ThreadPoolExecutor(4, thread_name_prefix="preft-download")

    async def start(self) -> bool:
        """Asks the shards what they know. Returns whether they are up."""
        if self.started or not self._settings.active:
            self.started = True
            return True
        listed = await self._shards.adapters()
        if listed is not None and not self.started:
            self.ready, differing = listed
            for name in differing:
                self._lose(name, "the shards hold different weights of it: add it again")
            self.started = True
        return self.started

    async def watch(self) -> None:
        """Waits for the shards, then takes adapters out whose files can no longer be read. Does not end."""
        while not await self.start():
            await asyncio.sleep(0.5)
        while self._settings.active:
            await asyncio.sleep(WATCH_S)
            for name, fault in (await self._shards.faults()).items():
                if name in self.ready and name not in self._leaving:
                    self._lose(name, f"{fault}; add it again")

    @contextmanager
    def using(self, name: str | None) -> Iterator[str | None]:
        """Holds an adapter for one request, having checked that it can be served.

        Yields: the adapter's id, None for the base model.
        Raises:
            RequestRejected: 404 unknown, 422 refused, 503 on its way.
        """
        if name is None or name in self.base_ids:
            yield None
            return
        self._check(name)
        self._in_flight[name] += 1
        if name in self._lazy:
            self._lazy[name] = time.monotonic()
        try:
            yield name
        finally:
            self._in_flight[name] -= 1
            if not self._in_flight[name]:
                del self._in_flight[name]
                if name in self._leaving:
                    self._spawn(self._notify())

    async def add(self, name: str, location: str) -> None:
        """Makes an adapter known to all shards, or to none.

        Raises:
            RequestRejected: 404, 409, 422 or 503.
        """
        reason = name_fault(name)
        if reason is not None or name in self.base_ids | self._others:
            raise rejection(422, f"adapter id {name!r}: {reason or 'it stands for something else already'}")
        if name in self._leaving:
            leaving = "is leaving, its requests have not ended: ask again"
            raise rejection(409, f"adapter {name!r} {leaving}", RETRY_AFTER_S)
        if name in self.ready:
            await self._compare(name, location)
        elif name not in self._loading:
            self._refused.pop(name, None)
            self._loading[name] = asyncio.create_task(self._load(name, location))
        if name in self._loading:
            await asyncio.shield(self._loading[name])
        if name not in self.ready:
            refused = self._refused.get(name)
            gone = ErrorResponse(503, f"adapter {name!r} was removed meanwhile: ask again", RETRY_AFTER_S)
            raise RequestRejected(refused[1] if refused is not None else gone)
        known = str(self.ready[name].get("location", location))
        if not same_place(location, known):
            raise rejection(409, f"adapter {name!r} is {known} already: remove it first")

    async def remove(self, name: str) -> bool:
        """Takes no more requests for an adapter, and has the shards forget it when its last request has ended.

        Returns: whether that was at once.
        Raises:
            RequestRejected: 404.
        """
        if name not in self.ready or name in self._leaving:
            raise RequestRejected(self._unknown(name))
        self._leaving.add(name)
        at_once = not self._in_flight[name]
        task = self._spawn(self._forget(name))
        if at_once:
            await task
        return at_once

    def names(self) -> list[str]:
        """Returns the ids that may be asked for: the base model's own, then those of adapters."""
        return [*sorted(self.base_ids - BASE_IDS), *sorted((self.ready.keys() - self._leaving) | self._others)]

    async def statistics(self) -> dict[str, float]:
        """Returns the counts of the first shard; empty while it is not up."""
        return await self._shards.statistics()

    async def close(self) -> None:
        """Ends what is under way."""
        for task in [*self._tasks, *self._loading.values()]:
            task.cancel()
        await asyncio.gather(*self._tasks, *self._loading.values(), return_exceptions=True)
        self._downloads.shutdown(wait=False, cancel_futures=True)

    def _check(self, name: str) -> None:
        if name in self._others:
            return
        if not self.started:
            raise rejection(503, "the server is starting: ask again", RETRY_AFTER_S)
        if name in self.ready and name not in self._leaving:
            return
        if name in self._loading:
            raise rejection(503, f"adapter {name!r} is being loaded: ask again", RETRY_AFTER_S)
        refused = self._refused.get(name)
        if refused is not None and time.monotonic() < refused[0]:
            raise RequestRejected(refused[1])
        match = HUB_ID.fullmatch(name)
        allowed = self._settings.organisations
        if not self._settings.lazy or match is None or hub_id(name) is None:
            raise RequestRejected(self._unknown(name))
        if "*" not in allowed and match[1] not in allowed:
            raise rejection(
                404, f"adapter {name!r} is not known, and adapters of {match[1]!r} are not loaded from the Hub"
            )
        if name in self._leaving:
            raise rejection(503, f"adapter {name!r} is leaving: ask again", RETRY_AFTER_S)
        if len(self._loading) >= self._settings.max_adapters:
            raise rejection(503, f"{len(self._loading)} adapters are being loaded: ask again", RETRY_AFTER_S)
        self._lazy[name] = time.monotonic()
        self._loading[name] = asyncio.create_task(self._load(name, name))
        raise rejection(503, f"adapter {name!r} is being loaded: ask again", RETRY_AFTER_S)

    async def _make_room(self, name: str) -> None:
        """Lets adapters go that were loaded on demand, are in no request, and were not used for longest."""
        while len(self.ready) >= self._settings.max_adapters:
            idle = [n for n in self._lazy if n in self.ready and n not in self._leaving and not self._in_flight[n]]
            if not idle:
                raise rejection(503, f"adapter {name!r}: no more adapters are taken now", RETRY_AFTER_S)
            await self._drop(min(idle, key=self._lazy.__getitem__))

    async def _load(self, name: str, location: str) -> None:
        """Downloads an adapter, hands it to all shards, and remembers the outcome. Never raises."""
        try:
            loop = asyncio.get_running_loop()
            source = await loop.run_in_executor(self._downloads, find_adapter, location)
            await loop.run_in_executor(self._downloads, source.fetch)
            async with self._changes:
                if name in self._lazy:
                    await self._make_room(name)
                self.ready[name] = await self._handed(name, source.location)
            self._refused.pop(name, None)
        except AdapterError as error:
            self._remember(name, load_error(name, error))
        except RequestRejected as error:
            self._remember(name, error.response)
        except (OSError, ValueError, KeyError) as error:
            self._remember(name, ErrorResponse(503, f"adapter {name!r} cannot be loaded now: {error}", RETRY_AFTER_S))
        finally:
            self._loading.pop(name, None)

    async def _handed(self, name: str, location: str) -> dict[str, Any]:
        """Hands an adapter to all shards, or to none, and returns its facts."""
        # a request in flight may still be resolved under the old weights
        if name in self._unclear and (self._in_flight[name] or not await self._drop(name)):
            raise rejection(503, f"adapter {name!r} has not left all shards: ask again", RETRY_AFTER_S)
        bad = await self._shards.add(name, location)
        alike, _ = (await self._shards.adapters() if bad is None else None) or ({}, set())
        if name in alike:
            return alike[name]
        await self._drop(name)
        if bad is not None and bad["kind"] != "taken":
            raise RequestRejected(shard_error(name, bad))
        # the folder changed between two shards' reads, or a shard had another adapter under this name
        raise rejection(503, f"adapter {name!r}: the shards took different ones: ask again", RETRY_AFTER_S)

    async def _compare(self, name: str, location: str) -> None:
        """Has the shards compare a directory, given again, with what they hold: it may have other content by now."""
        known = self.ready[name].get("location", location)
        if hub_id(known) is None and same_place(location, known):
            async with self._changes:
                bad = await self._shards.add(name, location)
            if bad is not None:
                raise RequestRejected(shard_error(name, bad))

    async def _forget(self, name: str) -> None:
        async with self._idle:
            await self._idle.wait_for(lambda: not self._in_flight[name])
        async with self._changes:
            try:
                await self._drop(name)
            finally:
                self._leaving.discard(name)

    async def _drop(self, name: str) -> bool:
        """Has the shards forget an adapter that is in no request. Returns whether all of them confirmed it."""
        self.ready.pop(name, None)
        self._lazy.pop(name, None)
        self._unclear.add(name)
        done = await self._shards.remove(name)
        if done:
            self._unclear.discard(name)
        return done

    def _lose(self, name: str, reason: str) -> None:
        """Takes no more requests for an adapter that the shards cannot serve."""
        self.ready.pop(name, None)
        self._unclear.add(name)
        self._remember(name, ErrorResponse(422, f"adapter {name!r}: {reason}"))

    async def _notify(self) -> None:
        async with self._idle:
            self._idle.notify_all()

    def _remember(self, name: str, response: ErrorResponse) -> None:
        for_s = FAILED_FOR_S if response.status == 503 else REFUSED_FOR_S
        now = time.monotonic()
        self._lazy.pop(name, None)
        self._refused = {n: entry for n, entry in self._refused.items() if entry[0] > now}
        if len(self._refused) < 10_000:
            self._refused[name] = (now + for_s, response)

    def _unknown(self, name: str) -> ErrorResponse:
        return ErrorResponse(404, unknown_names([name], set(self.ready) - self._leaving | self._others, "tgi"))

    def _spawn(self, work: Any) -> "asyncio.Task[None]":
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
