"""The parts of a slot pool: entries of adapters, slabs of slots on the device, packed copies on the host."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from preft_core.format.adapter import Adapter
from preft_core.pool.layout import Bucket, Layout, Site


@dataclass(eq=False)
class Entry:
    """An adapter that is registered in a pool.

    Attributes:
        name: unique in the pool
        bucket: of its slot
        source: returns the checked adapter
        fingerprint: of its content, None until it is known
        index: its slot in the slab of its bucket, or None
        loading: a thread is copying it into its slot
        pins: leases on it
        used: the pool's clock at its last use
        removed: unregistered; only existing leases use it
    """

    name: str
    bucket: Bucket
    source: Callable[[], Adapter]
    fingerprint: str | None = None
    index: int | None = None
    loading: bool = False
    pins: int = 0
    used: int = 0
    removed: bool = False


class Slab:
    """The slots of one bucket: memory at a fixed address, and the owner of each slot.

    On a GPU, a copy into a slot waits for the streams that may still read it, and a reader waits for the copy.
    """

    def __init__(
        self, sites: Sequence[Site], bucket: Bucket, num_slots: int, device: torch.device, dtype: torch.dtype
    ):
        self.layout = Layout(sites, bucket)
        self.memory = torch.zeros(num_slots, self.layout.num_elements, dtype=dtype, device=device)
        self.weights = self.layout.views(self.memory)
        self.owners: list[Entry | None] = [None] * num_slots
        self._on_gpu = device.type == "cuda"
        # per slot: stream -> event after its last use there
        self._events: list[dict[int, Any]] = [{} for _ in range(num_slots)]

    def num_usable(self) -> int:
        """Returns the number of slots that are empty or whose adapter may be evicted."""
        return sum(owner is None or (owner.pins == 0 and not owner.loading) for owner in self.owners)

    def give(self, entry: Entry) -> bool:
        """Assigns the entry an empty slot, or evicts the least recently used adapter. Returns whether one was evicted.

        At least one slot must be usable.
        """
        index = next((i for i, owner in enumerate(self.owners) if owner is None), None)
        victim = None
        if index is None:
            idle = [(o.used, i) for i, o in enumerate(self.owners) if o is not None and o.pins == 0 and not o.loading]
            index = min(idle)[1]
            victim = self.owners[index]
            assert victim is not None
            victim.index = None
        self.owners[index], entry.index = entry, index
        return victim is not None

    def vacate(self, entry: Entry) -> None:
        """Frees the entry's slot, if it has one."""
        if entry.index is not None:
            self.owners[entry.index] = None
            entry.index = None

    def write(self, index: int, row: Tensor) -> None:
        """Copies a packed adapter into a slot, after all work that was launched to read it."""
        self.order_after(index)
        self.memory[index].copy_(row, non_blocking=self._on_gpu)
        self.used(index, only=True)

    def order_after(self, index: int) -> None:
        """Makes the current stream wait for the work that other streams launched on a slot."""
        if self._on_gpu:
            for event in self._events[index].values():
                torch.cuda.current_stream(self.memory.device).wait_event(event)

    def used(self, index: int, only: bool = False) -> None:
        """Records that the current stream uses a slot up to this point. only: it has waited for the other streams."""
        if self._on_gpu:
            stream = torch.cuda.current_stream(self.memory.device)
            if only:
                self._events[index] = {}
            self._events[index] = self._events[index] | {stream.cuda_stream: stream.record_event()}


class HostCopies:
    """Packed adapters on the host, at most max_bytes; evicts the least recently used. Not thread-safe."""

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._rows: OrderedDict[Entry, Tensor] = OrderedDict()

    def get(self, entry: Entry) -> Tensor | None:
        """Returns an entry's row and marks it as recently used, or None."""
        row = self._rows.get(entry)
        if row is not None:
            self._rows.move_to_end(entry)
        return row

    def put(self, entry: Entry, row: Tensor) -> None:
        """Stores a row, replacing one that another thread stored meanwhile. A no-op for a row above max_bytes."""
        self.drop(entry)
        if row.nbytes > self.max_bytes:
            return
        self._rows[entry] = row
        self.num_bytes += row.nbytes
        while self.num_bytes > self.max_bytes:
            self.num_bytes -= self._rows.popitem(last=False)[1].nbytes

    def drop(self, entry: Entry) -> None:
        """Deletes an entry's row, if there is one."""
        row = self._rows.pop(entry, None)
        if row is not None:
            self.num_bytes -= row.nbytes
