"""The adapters of all shards, as requests may name them. `states` has the table of their transitions."""

import asyncio
import re
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from preft_core.format.config import AdapterError
from preft_core.hub.manifest import name_fault
from preft_core.hub.source import find_adapter, hub_id, same_place
from preft_core.pool.lease import unknown_names
from tgi_patch.gateway.errors import RETRY_AFTER_S, ErrorResponse, RequestRejected, load_error, rejection
from tgi_patch.gateway.shards import Shards
from tgi_patch.gateway.states import Adapter, State
from tgi_patch.gateway.telemetry import log
from tgi_patch.server.control import ask
from tgi_patch.settings import BASE_IDS, Settings

HUB_ID = re.compile(r"([\w][\w.-]*)/[\w][\w.-]*")
REJECTED_FOR_S = 60.0
"""Seconds that a rejection is remembered, so that a bad adapter is not downloaded for every request."""
FAILED_FOR_S = 5.0
"""Seconds that a failure which may pass is remembered."""
ABANDONED_FOR_S = 30.0
"""Seconds that a request without a complete response still counts as in flight: its prefill may be under way."""
WATCH_S = 2.0
"""Seconds between two checks for lost adapters."""
MAX_REJECTED = 10_000


class AdapterManager:
    """Which adapters a request may name. All methods run in one event loop; the shards are asked in threads.

    Args:
        settings: limits, and where adapters may come from
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
        self.started = False
        self._adapters: dict[str, Adapter] = {}
        # one change of the shards' adapters at a time
        self._changes = asyncio.Lock()
        # downloads have their own threads, so that a slow Hub does not delay requests to the shards
        self._downloads = ThreadPoolExecutor(4, thread_name_prefix="preft-download")

    async def start(self) -> bool:
        """Asks the shards for their adapters. Returns whether they are up."""
        if self.started or not self._settings.active:
            self.started = True
            return True
        listed = await self._shards.adapters()
        if listed is not None and not self.started:
            ready, differing = listed
            for name, facts in ready.items():
                self._adapters[name] = Adapter(name, State.READY, facts)
            for name in differing:
                self._lose(
                    self._adapters.setdefault(name, Adapter(name)),
                    "the shards hold different weights of it: add it again",
                )
            self.started = True
        return self.started

    async def watch(self) -> None:
        """Rejects adapters whose files the shards can no longer read. Does not return."""
        while self._settings.active:
            await asyncio.sleep(WATCH_S)
            for name, fault in (await self._shards.faults()).items():
                adapter = self._adapters.get(name)
                if adapter is not None and adapter.state is State.READY:
                    self._lose(adapter, f"{fault}; add it again")

    @contextmanager
    def lease(self, names: Iterable[str]) -> Iterator[None]:
        """Counts a request as in flight for adapters, having checked that they can be served.

        Leave it without an exception only if the router has sent a complete response.

        Raises:
            RequestRejected: 404 unknown, 422 rejected, 503 being loaded.
        """
        adapters = [self._serving(name) for name in names if name not in self.base_ids | self._others]
        for adapter in adapters:
            adapter.in_flight += 1
            adapter.last_used = adapter.last_used and time.monotonic()
        try:
            yield
        except BaseException:
            asyncio.get_running_loop().call_later(ABANDONED_FOR_S, self._release, adapters)
            raise
        self._release(adapters)

    async def add(self, name: str, location: str) -> dict[str, Any]:
        """Registers an adapter on all shards, or on none. Returns its facts.

        Raises:
            RequestRejected: 404, 409, 422 or 503.
        """
        reason = name_fault(name)
        if reason is not None or name in self.base_ids | self._others:
            raise rejection(
                422, f"adapter id {name!r}: {reason or 'it names another model already'}: choose another id"
            )
        adapter = self._adapters.setdefault(name, Adapter(name))
        if adapter.state is State.REMOVING:
            raise rejection(409, f"adapter {name!r} is being removed: try again", RETRY_AFTER_S)
        if adapter.state is State.READY:
            known = str(adapter.facts.get("location", location))
            if hub_id(known) is None and same_place(location, known):
                # a directory may have other content than when it was added
                async with self._changes:
                    await self._shards.compare(name, location)
        elif adapter.state is not State.LOADING:
            self._start_loading(adapter, location)
        if adapter.state is State.LOADING and adapter.task is not None:
            await asyncio.shield(adapter.task)
        if adapter.state is not State.READY:
            gone = ErrorResponse(503, f"adapter {name!r} was removed meanwhile: try again", RETRY_AFTER_S)
            raise RequestRejected(adapter.error or gone)
        known = str(adapter.facts.get("location", location))
        if not same_place(location, known):
            raise rejection(409, f"adapter {name!r} is {known} already: remove it first")
        return adapter.facts

    async def remove(self, name: str) -> bool:
        """Accepts no more requests for an adapter, and unregisters it when its last request has finished.

        Returns: whether that was at once.
        Raises:
            RequestRejected: 404.
        """
        adapter = self._adapters.get(name)
        if adapter is None or adapter.state is not State.READY:
            raise rejection(404, self._unknown(name))
        adapter.state = State.REMOVING
        adapter.task = asyncio.create_task(self._remove(adapter))
        at_once = not adapter.in_flight
        if at_once:
            await adapter.task
        return at_once

    def base_names(self) -> list[str]:
        """Returns the base model's ids."""
        return sorted(self.base_ids - BASE_IDS)

    def names(self) -> list[str]:
        """Returns the ids that requests may name: the base model's, then those of adapters."""
        return [*self.base_names(), *sorted({a.name for a in self._in(State.READY)} | self._others)]

    def listed(self) -> dict[str, dict[str, Any]]:
        """Returns id -> facts and state of the adapters that are being loaded, served or removed."""
        adapters = self._in(State.LOADING, State.READY, State.REMOVING)
        return {a.name: {**a.facts, "state": a.state.value, "in_flight": a.in_flight} for a in adapters}

    async def statistics(self) -> dict[str, float]:
        """Returns the counters of the first shard; empty while it is not up."""
        return await self._shards.statistics()

    async def close(self) -> None:
        """Cancels loading and removing."""
        tasks = [adapter.task for adapter in self._adapters.values() if adapter.task and adapter.task.cancel()]
        await asyncio.gather(*tasks, return_exceptions=True)
        self._downloads.shutdown(wait=False, cancel_futures=True)

    def _in(self, *states: State) -> list[Adapter]:
        return [adapter for adapter in self._adapters.values() if adapter.state in states]

    def _serving(self, name: str) -> Adapter:
        """Returns an adapter that can be served, or starts to load it.

        Raises:
            RequestRejected: it cannot be served now.
        """
        if not self.started:
            raise rejection(503, "the server is starting: try again", RETRY_AFTER_S)
        adapter = self._adapters.get(name, Adapter(name))
        if adapter.state is State.READY:
            return adapter
        if adapter.state is not State.LOADING:
            self._check_loadable(adapter)
            adapter.last_used = time.monotonic()
            self._start_loading(self._adapters.setdefault(name, adapter), name)
        raise rejection(503, f"adapter {name!r} is being loaded: try again", RETRY_AFTER_S)

    def _check_loadable(self, adapter: Adapter) -> None:
        """Raises RequestRejected if a request must not load an adapter."""
        name = adapter.name
        if adapter.state is State.REJECTED and adapter.error is not None and time.monotonic() < adapter.error_until:
            raise RequestRejected(adapter.error)
        match = HUB_ID.fullmatch(name)
        allowed = self._settings.organisations
        if not self._settings.lazy or match is None or hub_id(name) is None:
            raise rejection(404, self._unknown(name))
        if "*" not in allowed and match[1] not in allowed:
            raise rejection(
                404, f"adapter {name!r} is unknown, and adapters of {match[1]!r} are not loaded from the Hub"
            )
        if adapter.state is State.REMOVING:
            raise rejection(503, f"adapter {name!r} is being removed: try again", RETRY_AFTER_S)
        loading = len(self._in(State.LOADING))
        if loading >= self._settings.max_adapters:
            raise rejection(503, f"{loading} adapters are being loaded: try again", RETRY_AFTER_S)

    def _start_loading(self, adapter: Adapter, location: str) -> None:
        adapter.state, adapter.error = State.LOADING, None
        adapter.task = asyncio.create_task(self._load(adapter, location))

    async def _load(self, adapter: Adapter, location: str) -> None:
        """Downloads an adapter and registers it on all shards. It is READY or REJECTED then."""
        loop = asyncio.get_running_loop()
        name, began = adapter.name, loop.time()
        try:
            source = await loop.run_in_executor(self._downloads, find_adapter, location)
            await loop.run_in_executor(self._downloads, source.fetch)
            async with self._changes:
                if adapter.last_used is not None:
                    await self._make_room(name)
                if adapter.in_flight and self._shards.is_stale(name):
                    # these requests may still be resolved to the old weights
                    raise rejection(503, f"adapter {name!r} is still in requests: try again", RETRY_AFTER_S)
                adapter.facts = await self._shards.add(name, source.location)
                adapter.state = State.READY
            log("adapter_loaded", adapter=name, location=source.location, seconds=round(loop.time() - began, 3))
        except (AdapterError, RequestRejected, OSError, ValueError, KeyError) as error:
            self._reject(adapter, load_error(name, error))

    async def _make_room(self, name: str) -> None:
        """Evicts adapters that were loaded by requests, are in no request, and were not used for longest."""
        while len(self._in(State.READY, State.REMOVING)) >= self._settings.max_adapters:
            idle = [a for a in self._in(State.READY) if a.last_used is not None and not a.in_flight]
            if not idle:
                raise rejection(503, f"adapter {name!r}: no room, all adapters are in use: try again", RETRY_AFTER_S)
            oldest = min(idle, key=lambda adapter: adapter.last_used or 0.0)
            await self._unregister(oldest)
            log("adapter_evicted", adapter=oldest.name)

    async def _remove(self, adapter: Adapter) -> None:
        while adapter.in_flight:
            adapter.finished.clear()
            await adapter.finished.wait()
        async with self._changes:
            await self._unregister(adapter)
        log("adapter_removed", adapter=adapter.name)

    async def _unregister(self, adapter: Adapter) -> None:
        """Unregisters an adapter that is in no request."""
        # a request is rejected from here on
        adapter.state, adapter.facts, adapter.last_used = State.REMOVING, {}, None
        await self._shards.remove(adapter.name)
        adapter.state = State.ABSENT
        self._discard(adapter)

    def _lose(self, adapter: Adapter, reason: str) -> None:
        """Rejects requests for an adapter that the shards cannot serve."""
        self._shards.mark_stale(adapter.name)
        self._reject(adapter, ErrorResponse(422, f"adapter {adapter.name!r}: {reason}"))

    def _reject(self, adapter: Adapter, error: ErrorResponse) -> None:
        now = time.monotonic()
        adapter.state, adapter.error, adapter.facts, adapter.last_used = State.REJECTED, error, {}, None
        adapter.error_until = now + (FAILED_FOR_S if error.status == 503 else REJECTED_FOR_S)
        log("adapter_rejected", adapter=adapter.name, status=error.status, reason=error.message)
        rejected = self._in(State.REJECTED)
        for other in rejected:
            if other.error_until <= now or (len(rejected) > MAX_REJECTED and other is adapter):
                other.state = State.ABSENT
                self._discard(other)

    def _release(self, adapters: list[Adapter]) -> None:
        for adapter in adapters:
            adapter.in_flight -= 1
            if not adapter.in_flight:
                adapter.finished.set()
                self._discard(adapter)

    def _discard(self, adapter: Adapter) -> None:
        """Removes an adapter of which nothing has to be remembered."""
        if adapter.state is State.ABSENT and not adapter.in_flight:
            self._adapters.pop(adapter.name, None)

    def _unknown(self, name: str) -> str:
        return unknown_names([name], {adapter.name for adapter in self._in(State.READY)} | self._others, "tgi")
