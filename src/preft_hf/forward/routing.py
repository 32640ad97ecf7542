"""One adapter per row: from the names given with a batch to the rows of each of its forwards."""

import hashlib
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from preft_core.pool.layout import Bucket
from preft_core.pool.slots import BASE_NAME, Lease, Slot, SlotPool, unknown_names
from preft_core.rule.tokens import BASE, Segments, Span
from preft_hf.layers.calls import Calls
from preft_hf.layers.linear import PreftLayer
from preft_hf.layers.per_thread import PerThread, untraced
from preft_hf.layers.phase import Phase, RoutedRows, SharedPhase


class _ThreadState(PerThread):
    def __init__(self) -> None:
        self.declared: list[str] | None = None


@dataclass(frozen=True)
class RoutedSpan:
    """Consecutive prefill tokens of a packed forward, begin <= token < end, and the name of their adapter."""

    name: str
    begin: int
    end: int


def routed_rows(
    spans: Sequence[RoutedSpan], pinned: Mapping[str, Slot], shape: tuple[int, int], device: torch.device
) -> RoutedRows:
    """Returns the phase of a packed forward of (1, length) tokens. Adapters that are not pinned are in the layers."""

    def segments(numbers: Mapping[str, int], device: torch.device | str) -> Segments:
        found = [Span(numbers.get(span.name, BASE), span.begin, span.end) for span in spans]
        return Segments.of_spans(found, shape[0] * shape[1], device)

    held = sorted({span.name for span in spans} - set(pinned))
    groups = segments({name: i for i, name in enumerate(held)}, "cpu").groups
    rows = {held[g.slot]: g.rows if isinstance(g.rows, slice) else g.rows.to(device) for g in groups}
    pooled = {
        bucket: segments({slot.name: slot.index for slot in pinned.values() if slot.bucket == bucket}, device)
        for bucket in sorted({slot.bucket for slot in pinned.values()})
    }
    return RoutedRows(shape, rows, pooled)


class RowAdapters:
    """The adapters of one batch of prompts.

    Adapters of a pool are pinned from the first forward that needs them until `release`, which a generation calls when
    its prompts are in the cache. Pinning them again after that gets the same adapters or an error.

    Args:
        expands: True where a batch may have several rows per name: generate repeats prompts for beams and for
            returned sequences
    """

    def __init__(self, names: Sequence[str], routing: "Routing", expands: bool):
        self.names = list(names)
        self._routing, self._pool, self._expands = routing, routing.pool, expands
        held = routing.held()
        self._pooled = {name for name in names if name not in held and name != BASE_NAME}
        self._lease: Lease | None = None
        self._fingerprints: dict[str, str] | None = None

    def phase(self, prefill: SharedPhase, shape: tuple[int, int], device: torch.device) -> Phase:
        """Returns the phase of a forward of (batch, length) tokens, given which of them are prefill.

        Raises:
            ValueError: not one name per row, or, where generate repeats prompts, batch is no multiple of the names.
        """
        batch, length = shape
        names = self._names_of_rows(batch)
        if prefill is False or all(name == BASE_NAME for name in names):
            return False
        self._pin()
        mask = None if prefill is True else prefill.mask
        pinned = self._lease.slots if self._lease is not None else {}
        held = sorted(set(names) - self._pooled - {BASE_NAME})
        numbers = {name: i for i, name in enumerate(held)}
        groups = _segments([numbers.get(name, BASE) for name in names], mask, length, torch.device("cpu")).groups
        rows = {held[g.slot]: g.rows if isinstance(g.rows, slice) else g.rows.to(device) for g in groups}
        pooled = {}
        for bucket in sorted({slot.bucket for slot in pinned.values()}):
            slots = [_index(pinned, name, bucket) for name in names]
            pooled[bucket] = _segments(slots, mask, length, device)
        return RoutedRows((batch, length), rows, pooled)

    def owners(self, batch: int) -> tuple[bytes | None, ...]:
        """Returns the key of each row's adapter, None for the base model. Pins them, as `phase` does."""
        self._pin()
        pinned = self._lease.slots if self._lease is not None else {}
        keys: dict[str, bytes | None] = {name: pool_key(slot) for name, slot in pinned.items()}
        for name in set(self.names) - set(keys):
            keys[name] = None if name == BASE_NAME else self._routing.adapter_key(name)
        return tuple(keys[name] for name in self._names_of_rows(batch))

    def _names_of_rows(self, batch: int) -> list[str]:
        copies, rest = divmod(batch, len(self.names))
        if rest or (copies != 1 and not self._expands):
            raise ValueError(
                f"adapter_names has {len(self.names)} names for a batch of {batch} rows: give one name per row"
            )
        return [name for name in self.names for _ in range(copies)]

    def release(self) -> None:
        """Unpins the adapters; a no-op if none is pinned."""
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.release()

    def _pin(self) -> None:
        if self._lease is not None or not self._pooled:
            return
        assert self._pool is not None
        lease = self._pool.acquire(self._pooled, idle=self._routing.calls.sweep)
        found = {name: slot.fingerprint for name, slot in lease.slots.items()}
        if self._fingerprints not in (None, found):
            lease.release()
            raise RuntimeError(
                f"one of the adapters {', '.join(sorted(found))} was replaced while a generation used it: two "
                "adapters would read its prompt; generate again"
            )
        self._lease, self._fingerprints = lease, found


class Routing:
    """Looks up a model's adapters by name: those in its layers and those of its pool.

    Attributes:
        calls: the model's running forwards, which pin adapters
        pool: set and removed by PreftPool
    """

    def __init__(self, layers: list[PreftLayer], calls: Calls):
        self._layers = layers
        self.calls = calls
        self._thread = _ThreadState()
        self._lock = threading.Lock()
        self._num_declaring = 0
        self.pool: SlotPool | None = None

    @property
    def disabled(self) -> bool:
        """True while the model's adapters are disabled, including those of a pool and those named per row."""
        return bool(self._layers) and all(layer.disable_adapters for layer in self._layers)

    @property
    def declared(self) -> list[str] | None:
        """The adapter_names that PEFT's forward or generate was given in this thread."""
        # Names read in traced code would become a guard, so the graph breaks here while any thread declares some.
        return self._read() if self._num_declaring else None

    @contextmanager
    def declare(self, names: list[str] | None) -> Iterator[None]:
        """Sets the adapter of each row for the call inside, where PEFT passes no argument on."""
        if names is None and not self._num_declaring:
            yield
            return
        before = self._write(names)
        try:
            yield
        finally:
            self._write(before)

    @untraced
    def _read(self) -> list[str] | None:
        return self._thread.declared

    @untraced
    def _write(self, names: list[str] | None) -> list[str] | None:
        before, self._thread.declared = self._thread.declared, names
        with self._lock:
            self._num_declaring += (names is not None) - (before is not None)
        return before

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self._layers, "pool": self.pool, "calls": self.calls}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # In two steps, since layers and model refer to each other.
        self.__init__(state["layers"], state["calls"])
        self.pool = state["pool"]

    def held(self) -> set[str]:
        """Returns the names of the adapters in the model's layers."""
        return {name for layer in self._layers for name in layer.preft_A}

    def of(self, names: Sequence[str], training: bool, expands: bool = False) -> RowAdapters:
        """Returns the adapters of a batch after checking their names.

        Args:
            expands: whether generate may repeat the rows

        Raises:
            TypeError: names is no list or tuple of strings.
            ValueError: an unknown name, no name at all, or a model in train mode.
        """
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"adapter_names is {names!r}: give a list with one name per prompt")
        if not names:
            raise ValueError(f"adapter_names is empty: give one name per prompt, {BASE_NAME!r} for the base model")
        if training:
            raise ValueError("adapter_names was given in train mode, and is for inference: call model.eval() first")
        held = self.held()
        known = held | set(self.pool.names() if self.pool is not None else ())
        unknown = sorted(set(names) - known - {BASE_NAME})
        if unknown:
            raise ValueError(unknown_names(unknown, known))
        return RowAdapters(names, self, expands)

    def live(self) -> list[str]:
        """Returns the adapters that act on rows without a name: those that are active and not disabled."""
        return sorted({name for layer in self._layers for name in layer.live_adapters()})

    def owners(self, adapters: RowAdapters | None, batch: int) -> tuple[bytes | None, ...]:
        """Returns whose keys and values a forward of prompt tokens makes: the key of each row's adapter."""
        if adapters is not None and not self.disabled:
            return adapters.owners(batch)
        keys = [self.adapter_key(name) for name in self.live()]
        return (b"".join(keys) or None,) * batch

    def for_requests(self, names: Sequence[str] | None, num_requests: int, training: bool) -> list[str]:
        """Returns the adapter of each request after checking the names; by default the model's active adapter.

        Raises:
            TypeError, ValueError: as in `of`; not as many names as requests; no names where several are active.
        """
        if names is not None:
            self.of(names, training)
            if len(names) != num_requests:
                raise ValueError(
                    f"adapter_names has {len(names)} names for {num_requests} prompts: give one per prompt"
                )
            return list(names)
        active = self.live()
        if len(active) > 1:
            raise ValueError(
                f"adapters {', '.join(active)} are active at once: continuous batching takes one adapter per "
                "request; name it with adapter_names, or choose one with set_adapter"
            )
        return (active or [BASE_NAME]) * num_requests

    def adapter_key(self, name: str) -> bytes:
        """Returns the key of the KV that an adapter makes, 16 bytes. It changes with the adapter's weights.

        Writes that `version_of` does not see do not change the key of an adapter in the layers.
        """
        if self.disabled:
            return hashlib.blake2b(b"disabled", digest_size=16).digest()
        if name not in self.held():
            assert self.pool is not None
            with self.pool.acquire([name], idle=self.calls.sweep) as lease:
                return pool_key(lease.slots[name])
        state = [layer.state_of(name) for layer in self._layers]
        return hashlib.blake2b(repr((name, state)).encode(), digest_size=16).digest()


def pool_key(slot: Slot) -> bytes:
    """Returns the key of the KV that an adapter of a pool makes, 16 bytes."""
    return hashlib.blake2b(f"pool {slot.fingerprint}".encode(), digest_size=16).digest()


def _index(pinned: dict, name: str, bucket: Bucket) -> int:
    slot = pinned.get(name)
    return slot.index if slot is not None and slot.bucket == bucket else BASE


def _segments(slots: Sequence[int], mask: Tensor | None, length: int, device: torch.device) -> Segments:
    if mask is not None:
        return Segments.of_mask(mask.to(device), slots)
    spans: Iterable[Span] = (Span(slot, i * length, (i + 1) * length) for i, slot in enumerate(slots))
    return Segments.of_spans(list(spans), len(slots) * length, device)
