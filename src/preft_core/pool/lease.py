"""A lease on adapters of a slot pool, and the errors about names and slots."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType

from preft_core.pool.layout import Bucket
from preft_core.pool.slab import Entry

BASE_NAME = "__base__"
"""The name of the base model without an adapter."""
Idle = Callable[[], None] | None
"""Called every IDLE_S seconds while `SlotPool.acquire` waits."""
IDLE_S = 0.2


@dataclass(frozen=True)
class Slot:
    """The slot of an adapter for the duration of a lease.

    Attributes:
        name: of the adapter
        bucket: of the slot
        index: of the slot within its bucket
        fingerprint: of the adapter; the key for KV computed with it
    """

    name: str
    bucket: Bucket
    index: int
    fingerprint: str


class Lease:
    """Pinned adapters, which cannot be evicted until `release` or the end of the with block.

    Attributes:
        slots: by adapter name
    """

    def __init__(self, entries: Sequence[Entry], unpin: Callable[[Sequence[Entry]], None]):
        self._unpin = unpin
        self._entries = list(entries)
        self.slots: dict[str, Slot] = {}
        for entry in entries:
            assert entry.index is not None
            assert entry.fingerprint is not None
            self.slots[entry.name] = Slot(entry.name, entry.bucket, entry.index, entry.fingerprint)

    def release(self) -> None:
        """Unpins the adapters. Call it after the last forward that reads the slots is launched. Repeats are no-ops."""
        entries, self._entries = self._entries, []
        if entries:
            self._unpin(entries)

    def __enter__(self) -> "Lease":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def unknown_names(unknown: Sequence[str], known: Iterable[str], base: str = BASE_NAME) -> str:
    """Returns the error message for unknown adapter names; lists up to 20 known ones and the base's."""
    names = sorted(known)
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return (
        f"adapter {', '.join(map(repr, unknown))} is not known; known are {', '.join(names[:20]) or 'none'}{more}, "
        f"and {base!r} for no adapter"
    )


def too_many(needed: int, bucket: Bucket, num_slots: int) -> str:
    """Returns the error message for more adapters at once than there are slots."""
    return (
        f"{needed} adapters of {bucket} at once, and the pool has {num_slots} slots for them: use fewer adapters in "
        "one batch, or create the pool with more slots"
    )
