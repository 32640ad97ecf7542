"""An adapter that a server process knows, the requests that need it, and how long it is kept after its removal."""

import time
import weakref
from dataclasses import dataclass, field

from preft_core.format.adapter import AdapterConfig

GRACE_S = 60.0
"""Seconds that a removed adapter is kept: the router may send a request that it queued before the removal."""
GRACE_REQUESTS = 256
"""Requests that must also have come since the removal: after a stall, older ones may still wait for any time."""


class Ticket:
    """A request's hold on its adapter until its prompt is in the cache. Freed with the request that it lies on."""

    __slots__ = ("__weakref__", "key")

    def __init__(self, key: str):
        self.key = key


@dataclass(eq=False)
class KnownAdapter:
    """An adapter that was checked.

    Attributes:
        name: its id
        key: its name in the pool, another one each time that an id is added
        fingerprint: of the whole adapter, the same on all shards
        fault: why its files could not be read again; empty while they could
        tickets: of the requests that need it
    """

    name: str
    key: str
    location: str
    config: AdapterConfig
    fingerprint: str
    fault: str = ""
    tickets: "weakref.WeakSet[Ticket]" = field(default_factory=weakref.WeakSet)

    def ticket(self) -> Ticket:
        ticket = Ticket(self.key)
        self.tickets.add(ticket)
        return ticket


@dataclass
class _Removed:
    adapter: KnownAdapter
    time_s: float
    num_requests: int


class RemovedAdapters:
    """Adapters that were removed and that a request may still name.

    TGI's router queues requests, and an error in one fails all requests of its batch. So a removed adapter is kept
    for `GRACE_S` seconds and `GRACE_REQUESTS` requests, and until the last request with a ticket is done.

    Args:
        capacity: how many are kept after `GRACE_S` while fewer requests come
    """

    def __init__(self, capacity: int):
        self._capacity = capacity
        self._removed: list[_Removed] = []

    def add(self, adapter: KnownAdapter, num_requests: int) -> None:
        """Keeps an adapter.

        Args:
            num_requests: that have come since the start
        """
        self._removed.append(_Removed(adapter, time.monotonic(), num_requests))

    def find(self, name: str) -> KnownAdapter | None:
        """Returns the adapter that had this id last."""
        return next((one.adapter for one in reversed(self._removed) if one.adapter.name == name), None)

    def pop_expired(self, num_requests: int) -> list[KnownAdapter]:
        """Returns the adapters that no request can name any more, and forgets them."""
        now_s, kept, expired = time.monotonic(), [], []
        for i, one in enumerate(self._removed):
            surplus = len(self._removed) - i > self._capacity
            passed = now_s - one.time_s >= GRACE_S
            counted = num_requests - one.num_requests >= GRACE_REQUESTS or surplus
            done = passed and counted and not len(one.adapter.tickets)
            (expired if done else kept).append(one)
        self._removed = kept
        return [one.adapter for one in expired]
