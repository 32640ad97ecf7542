"""Which rows of a forward take which adapter. Computed once per forward, read by all layers."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from preft_core import ops
from preft_core.ops import add_direft_, add_lora_
from preft_core.ops.weights import Weights
from preft_core.pool.layout import Bucket, Layout
from preft_core.pool.lease import Lease
from preft_core.pool.slots import SlotPool
from preft_core.rule.tokens import BASE, Segments, Span, prefill_span
from tgi_patch.server.known import Ticket
from tgi_patch.server.registry import Registry

TICKET = "__preft_ticket__"
"""Attribute of a request's stopping criterion, the object that TGI carries through filter and concatenate."""


@dataclass(frozen=True)
class PrefillRows:
    """Rows begin <= row < end of a forward: prefill of a request with this adapter."""

    key: str
    begin: int
    end: int


@dataclass(frozen=True)
class RouteGroup:
    """The rows of one forward whose adapters lie in the same slab of slots: weights by site, and segments."""

    weights: Mapping[str, Weights]
    segments: Segments

    @cached_property
    def is_adapted(self) -> Tensor:
        """Bool, (rows, 1), on the device of the segments. Made once per forward."""
        mask = torch.zeros(self.segments.num_rows, 1, dtype=torch.bool, device=self.segments.rows.device)
        return mask.index_fill_(0, self.segments.rows.long(), True)


@dataclass(frozen=True)
class Route:
    """The adapted rows of one forward."""

    groups: tuple[RouteGroup, ...]


class _Current(threading.local):
    route: Route | None = None


_CURRENT = _Current()


def prefill_rows(
    tickets: Sequence[Ticket | None],
    cache_lengths: Sequence[int],
    input_lengths: Sequence[int],
    prompt_lengths: Sequence[int],
) -> list[PrefillRows]:
    """Returns the adapted rows of a forward in which request i has input_lengths[i] rows after cache_lengths[i].

    Position decides: a row of a decoding request has its position at or past its prompt's end.
    """
    found, row = [], 0
    for ticket, cached, length, prompt in zip(tickets, cache_lengths, input_lengths, prompt_lengths, strict=True):
        if ticket is not None:
            begin, end = prefill_span(cached, length, prompt)
            if end > begin:
                found.append(PrefillRows(ticket.key, row + begin, row + end))
        row += length
    return found


@contextmanager
def routed(registry: Registry, rows: Sequence[PrefillRows], num_rows: int) -> Iterator[Route]:
    """Pins the adapters of a forward and makes its route current while the forward is launched.

    Adapters that find no free slot are read from host memory, target module by target module: slower, same result.
    """
    leases, slots, rest = _pin(registry.pool, list(dict.fromkeys(row.key for row in rows)))
    registry.streamed += len(rest)
    try:
        device = registry.pool.device
        groups = []
        for bucket in sorted({bucket for bucket, _ in slots.values()}):
            index = {key: slot for key, (owner, slot) in slots.items() if owner == bucket}
            groups.append(RouteGroup(registry.pool.weights(bucket), _segments(rows, index, num_rows, device)))
        for key in rest:
            layout = registry.layouts[registry.pool.bucket(key)]
            weights = _FromHost(layout, registry.pool.packed(key), device)
            groups.append(RouteGroup(weights, _segments(rows, {key: 0}, num_rows, device)))
        with visible(Route(tuple(groups))) as route:
            yield route
    finally:
        for lease in leases:
            lease.release()


@contextmanager
def visible(route: Route) -> Iterator[Route]:
    """Makes a route current in this thread."""
    before, _CURRENT.route = _CURRENT.route, route
    try:
        yield route
    finally:
        _CURRENT.route = before


def current() -> Route | None:
    """Returns this thread's current route; None if the forward has no adapted row, as in every decode step."""
    return _CURRENT.route


def warm_route(registry: Registry, num_rows: int) -> Route:
    """Returns a route of all rows through empty slots, with the cost of an adapted prefill and no effect."""
    segments = Segments.of_spans([Span(0, 0, num_rows)], num_rows, registry.pool.device)
    last_of_kind = {bucket.kind: bucket for bucket in sorted(registry.pool.buckets)}
    return Route(tuple(RouteGroup(registry.pool.weights(bucket), segments) for bucket in last_of_kind.values()))


def compile_kernels(registry: Registry) -> int:
    """Compiles the kernels that this registry's adapters can need. Returns the number of ops run for it."""
    pool = registry.pool
    return ops.warm_up(one for bucket in pool.buckets for one in pool.weights(bucket).values())


def add_linear(route: Route, site: str, output: Tensor, x: Tensor) -> None:
    """Adds the LoRA-P updates of a route to a linear layer's output, in place.

    Args:
        site: name of the layer's site
        output: (rows, width) of this shard; changed in place
        x: (rows, width_in) of this shard
    """
    for group in route.groups:
        found = group.weights.get(site)
        if found is not None and found.bias is None:
            add_lora_(output, x, found.a, found.b, found.widths, group.segments)


def edit_block(route: Route, site: str, output: Any) -> Any:
    """Returns a decoder layer's output with the DiReFT-P edits of a route on the residual stream.

    If the layer returns (hidden, residual), whose sum is the stream, the edited rows become (stream, 0): the sum is
    exactly the edited stream. Other rows keep both parts and their rounding. A single tensor is changed in place.
    """
    for group in route.groups:
        found = group.weights.get(site)
        if found is None or found.bias is None or not group.segments.spans:
            continue
        if isinstance(output, Tensor):
            add_direft_(output, found.a[:, 0], found.b, found.bias, group.segments)
            continue
        hidden, residual = output
        stream = hidden + residual
        add_direft_(stream, found.a[:, 0], found.b, found.bias, group.segments)
        # two launches for all rows: a copy per span took thousands in a forward of 64 requests
        output = torch.where(group.is_adapted, stream, hidden), residual.masked_fill(group.is_adapted, 0)
    return output


class _FromHost(Mapping[str, Weights]):
    """The weights of one adapter by site, copied to the device when a layer reads them."""

    def __init__(self, layout: Layout, row: Tensor, device: torch.device):
        self._views = layout.views(row[None])
        self._device = device

    def __getitem__(self, site: str) -> Weights:
        parts = self._views[site]
        a, b = (part.to(self._device, non_blocking=True) for part in (parts.a, parts.b))
        bias = None if parts.bias is None else parts.bias.to(self._device, non_blocking=True)
        return Weights(a, b, bias, parts.widths)

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)


def _pin(pool: SlotPool, keys: list[str]) -> tuple[list[Lease], dict[str, tuple[Bucket, int]], list[str]]:
    """Returns leases, key -> (bucket, slot), and the keys without a free slot. Does not wait."""
    leases: list[Lease] = []
    rest: list[str] = []
    try:
        leases.append(pool.acquire(keys, timeout_s=0))
    except (ValueError, TimeoutError):
        # more adapters than slots: resident ones first, so that the others do not evict them
        resident = pool.resident()
        for key in sorted(keys, key=lambda key: key not in resident):
            try:
                leases.append(pool.acquire([key], timeout_s=0))
            except TimeoutError:
                rest.append(key)
            except BaseException:
                for lease in leases:
                    lease.release()
                raise
    slots = {slot.name: (slot.bucket, slot.index) for lease in leases for slot in lease.slots.values()}
    return leases, slots, rest


def _segments(rows: Sequence[PrefillRows], index: Mapping[str, int], num_rows: int, device: torch.device) -> Segments:
    return Segments.of_spans([Span(index.get(r.key, BASE), r.begin, r.end) for r in rows], num_rows, device)
