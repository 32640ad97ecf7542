"""The slot pool: some adapters on the device, recently used ones on the host, the rest on disk."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NoReturn

import torch
from torch import Tensor

from preft_core.format.adapter import Adapter
from preft_core.format.config import AdapterConfig
from preft_core.ops.weights import Weights
from preft_core.pool.counters import Counters
from preft_core.pool.layout import Bucket, Site, bucket_of
from preft_core.pool.lease import BASE_NAME, IDLE_S, Idle, Lease, Slot, too_many, unknown_names
from preft_core.pool.slab import Entry, HostCopies, Slab

__all__ = ["BASE_NAME", "Counters", "Lease", "Slot", "SlotPool", "unknown_names"]


class SlotPool:
    """Adapters by name, loaded into a fixed number of slots on use.

    All memory of the slots is allocated at creation. Adding or evicting an adapter copies into a slot and changes no
    address, so CUDA graphs and compiled code that read a slot stay valid. A pool is thread-safe. Acquisitions that
    wait for slots are served in order, so large ones are not starved. A thread with a lease should acquire another
    only with a timeout: two such threads may deadlock.

    Args:
        sites: the sites of the model that adapters may target
        num_slots: slots of each bucket
        device, dtype: of the slots
        max_host_bytes: most bytes of packed copies on the host, in pinned memory if the device is a GPU; the least
            recently used are dropped. 0 reads an adapter from its source at each load
    Raises:
        ValueError: fewer than 1 slot, a bucket without a site, a negative max_host_bytes. All faults in one message.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        num_slots: Mapping[Bucket, int],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        max_host_bytes: int = 4 << 30,
    ):
        kinds = {site.kind for site in sites}
        faults = [f"num_slots of {bucket} is {count}: 1 or more" for bucket, count in num_slots.items() if count < 1]
        faults += [
            f"{bucket} has slots but no site is a {bucket.kind}" for bucket in num_slots if bucket.kind not in kinds
        ]
        if max_host_bytes < 0:
            faults.append(f"max_host_bytes is {max_host_bytes}: 0 or more")
        if faults:
            raise ValueError("SlotPool: " + "; ".join(faults))
        self.sites = tuple(sites)
        self.device, self.dtype = torch.device(device), dtype
        self._slabs = {
            bucket: Slab(self.sites, bucket, count, self.device, dtype) for bucket, count in num_slots.items()
        }
        self._entries: dict[str, Entry] = {}
        self._host = HostCopies(max_host_bytes)
        self._changed = threading.Condition()
        self._queue: deque[object] = deque()
        self._clock = 0
        self._counters = Counters()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a slot pool cannot be copied or pickled: close it first, and create another for the copy")

    def add(self, name: str, config: AdapterConfig, source: Callable[[], Adapter]) -> None:
        """Registers an adapter. It is loaded on first use.

        Args:
            name, config: of the adapter; the name is unique in the pool
            source: returns the checked adapter
        Raises:
            ValueError: the name is taken or "__base__", or the pool has no slot of the adapter's bucket.
        """
        bucket = bucket_of(config)
        with self._changed:
            if name == BASE_NAME or name in self._entries:
                raise ValueError(f"adapter name {name!r} is taken: remove that adapter first, or use another name")
            if bucket not in self._slabs:
                have = ", ".join(f"{count} of {other}" for other, count in self.buckets.items()) or "none"
                raise ValueError(
                    f"adapter {name!r} needs a slot of {bucket} and the pool has {have}: create it with such slots"
                )
            self._entries[name] = Entry(name, bucket, source, config.fingerprint)

    def remove(self, name: str) -> None:
        """Unregisters an adapter. Forwards that pinned it finish, then its slot is freed.

        Raises:
            ValueError: an unknown name.
        """
        with self._changed:
            entry = self._known([name])[0]
            del self._entries[name]
            entry.removed = True
            self._host.drop(entry)
            if entry.pins == 0:
                self._slabs[entry.bucket].vacate(entry)
            self._changed.notify_all()

    def acquire(self, names: Iterable[str], timeout_s: float | None = None, idle: Idle = None) -> Lease:
        """Pins adapters, all or none, and loads those that are not in a slot. Waits for enough unpinned slots.

        Args:
            names: of adapters; duplicates count once, "__base__" is ignored
            timeout_s: most seconds to wait for slots; None waits without limit. Loading does not count
            idle: called every 0.2 s while waiting; may release leases whose owner is gone
        Returns: the lease. Release it after the last forward that reads the slots was launched.
        Raises:
            ValueError: an unknown name, or more adapters of a bucket than it has slots: waiting cannot help.
            TimeoutError: other leases pinned the slots for timeout_s.
            AdapterError: an adapter cannot be loaded. Nothing stays pinned.
        """
        wanted = sorted(set(names) - {BASE_NAME})
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        ticket = object()
        with self._changed:
            self._queue.append(ticket)
            try:
                entries = self._wait(wanted, ticket, deadline, idle)
            finally:
                self._queue.remove(ticket)
                self._changed.notify_all()
            missing = self._claim(entries)
        try:
            for entry in missing:
                self._load(entry)
            for entry in entries:
                assert entry.index is not None
                self._slabs[entry.bucket].order_after(entry.index)
            return Lease(entries, self._unpin)
        except BaseException:
            self._undo(entries, missing)
            raise

    def packed(self, name: str) -> Tensor:
        """Returns an adapter as one slot's row on the host; reads it from its source if there is no packed copy.

        Returns: (num_elements,) as in `Layout`, the pool's dtype, on the CPU. Not a copy: do not change it.
        Raises:
            ValueError: an unknown name.
            AdapterError: the adapter cannot be loaded.
        """
        with self._changed:
            entry = self._known([name])[0]
        return self._packed(entry)

    def weights(self, bucket: Bucket) -> dict[str, Weights]:
        """Returns the weights of a bucket's slots by site name: views at fixed addresses."""
        return self._slabs[bucket].weights

    @property
    def buckets(self) -> dict[Bucket, int]:
        """The number of slots of each bucket."""
        return {bucket: len(slab.owners) for bucket, slab in self._slabs.items()}

    @property
    def num_bytes(self) -> int:
        """Bytes of all slots on the device. Constant."""
        return sum(slab.memory.nbytes for slab in self._slabs.values())

    @property
    def host_bytes(self) -> int:
        """Bytes of the packed copies on the host, at most max_host_bytes."""
        return self._host.num_bytes

    def names(self) -> list[str]:
        """Returns the sorted names of all registered adapters."""
        with self._changed:
            return sorted(self._entries)

    def bucket(self, name: str) -> Bucket:
        """Returns an adapter's bucket. Raises ValueError for an unknown name."""
        with self._changed:
            return self._known([name])[0].bucket

    def resident(self) -> dict[str, int]:
        """Returns the adapters that are in a slot, with their numbers of pins."""
        with self._changed:
            return {e.name: e.pins for e in self._entries.values() if e.index is not None and not e.loading}

    def counters(self) -> Counters:
        """Returns a copy of the counters."""
        with self._changed:
            return replace(self._counters)

    def _known(self, names: Sequence[str]) -> list[Entry]:
        unknown = [name for name in names if name not in self._entries]
        if unknown:
            raise ValueError(unknown_names(unknown, self._entries))
        return [self._entries[name] for name in names]

    def _wait(self, wanted: Sequence[str], ticket: object, deadline: float | None, idle: Idle) -> list[Entry]:
        """Returns the entries once this acquisition is first in the queue, no entry is loading, and slots suffice."""
        waited = False
        while True:
            entries = self._known(wanted)
            for bucket, slab in self._slabs.items():
                needed = sum(entry.bucket == bucket for entry in entries)
                if needed > len(slab.owners):
                    raise ValueError(too_many(needed, bucket, len(slab.owners)))
            if self._queue[0] is ticket and self._suffice(entries):
                return entries
            self._counters.waits += not waited
            waited = True
            remaining = None if deadline is None else deadline - time.monotonic()
            if remaining is not None and remaining <= 0:
                raise TimeoutError(
                    f"no slots for {', '.join(wanted[:5])} within timeout_s: forwards in prefill pin them; create the "
                    "pool with more slots, or send fewer requests at once"
                )
            if idle is not None:
                idle()
                remaining = IDLE_S if remaining is None else min(remaining, IDLE_S)
            self._changed.wait(remaining)

    def _suffice(self, entries: Sequence[Entry]) -> bool:
        if any(entry.loading for entry in entries):
            return False
        for bucket, slab in self._slabs.items():
            mine = [entry for entry in entries if entry.bucket == bucket]
            hits_to_pin = sum(entry.index is not None and entry.pins == 0 for entry in mine)
            if sum(entry.index is None for entry in mine) > slab.num_usable() - hits_to_pin:
                return False
        return True

    def _claim(self, entries: Sequence[Entry]) -> list[Entry]:
        """Pins the entries, assigns slots to those without one, and returns these, which must be loaded."""
        self._clock += 1
        for entry in entries:
            entry.pins += 1
            entry.used = self._clock
        missing = [entry for entry in entries if entry.index is None]
        self._counters.hits += len(entries) - len(missing)
        for entry in missing:
            entry.loading = True
            self._counters.evictions += self._slabs[entry.bucket].give(entry)
        return missing

    def _load(self, entry: Entry) -> None:
        start = time.monotonic()
        row = self._packed(entry)
        assert entry.index is not None
        self._slabs[entry.bucket].write(entry.index, row)
        with self._changed:
            entry.loading = False
            self._counters.loads += 1
            self._counters.bytes_loaded += row.nbytes
            self._counters.load_seconds += time.monotonic() - start
            self._changed.notify_all()

    def _packed(self, entry: Entry) -> Tensor:
        with self._changed:
            row = self._host.get(entry)
            if row is not None:
                self._counters.host_hits += 1
                return row
        adapter = entry.source()
        with self._changed:
            if bucket_of(adapter.config) != entry.bucket or entry.fingerprint not in (None, adapter.fingerprint):
                raise ValueError(
                    f"adapter {entry.name!r} has changed since it was added, from {entry.bucket}, {entry.fingerprint} "
                    f"to {bucket_of(adapter.config)}, {adapter.fingerprint}: remove it and add it again"
                )
            entry.fingerprint = adapter.fingerprint
        row = self._slabs[entry.bucket].layout.pack(adapter, self.dtype)
        row = row.pin_memory() if self.device.type == "cuda" else row
        with self._changed:
            if not entry.removed:
                self._host.put(entry, row)
        return row

    def _undo(self, entries: Sequence[Entry], missing: Sequence[Entry]) -> None:
        with self._changed:
            for entry in missing:
                if entry.loading:
                    entry.loading = False
                    self._slabs[entry.bucket].vacate(entry)
        self._unpin(entries)

    def _unpin(self, entries: Sequence[Entry]) -> None:
        with self._changed:
            for entry in entries:
                slab = self._slabs[entry.bucket]
                entry.pins -= 1
                if entry.index is not None:
                    slab.used(entry.index)
                if entry.removed and entry.pins == 0:
                    slab.vacate(entry)
            self._changed.notify_all()
