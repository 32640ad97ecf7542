"""Which tokens of a forward pass are prefill, and of which adapter slot. Position decides, never the shape."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from preft_core.rule.tiles import (
    BASE,
    TILE_ROWS,
    checked_tile_rows,
    choose_tile_rows,
    consecutive,
    sum_runs,
    tiles_of,
    tiles_on_device,
)

__all__ = ["BASE", "TILE_ROWS", "Group", "Segments", "Span", "choose_tile_rows", "prefill_span"]


def prefill_span(first_position: int, num_tokens: int, prompt_length: int, start: int = 0) -> tuple[int, int]:
    """Returns the range of rows, within one forward of one request, that the adapter applies to.

    Row i has the token at position `first_position + i` and is adapted iff

        start <= first_position + i < prompt_length

    So a chunk of the prompt is adapted, rows that verify speculated tokens are not, and a forward that recomputes
    prompt and generated tokens together is adapted up to the end of the prompt.

    Args:
        first_position: position of the first row in its request, >= 0; padding counts
        num_tokens: rows of this forward, >= 0
        prompt_length: tokens of the request's prompt, >= 0; padding counts
        start: first adapted position, >= 0; 0 adapts the whole prompt
    Returns: (begin, end), half-open, 0 <= begin <= end <= num_tokens; begin == end if nothing is adapted.
    Raises:
        ValueError: a negative argument.
    Source: arXiv 2605.14217, section 3, which has no start.
    """
    arguments = {
        "first_position": first_position,
        "num_tokens": num_tokens,
        "prompt_length": prompt_length,
        "start": start,
    }
    negative = [f"{name} is {value}" for name, value in arguments.items() if value < 0]
    if negative:
        raise ValueError(f"{', '.join(negative)}: positions and numbers of tokens are 0 or more")
    end = min(max(prompt_length - first_position, 0), num_tokens)
    begin = min(max(start - first_position, 0), end)
    return begin, end


@dataclass(frozen=True)
class Span:
    """Consecutive rows of a packed batch, begin <= row < end, and the slot of their adapter (BASE for none)."""

    slot: int
    begin: int
    end: int


@dataclass(frozen=True)
class Group:
    """All rows of one slot in a batch: a slice if they are consecutive, otherwise an int64 index (rows,)."""

    slot: int
    rows: slice | Tensor


@dataclass(frozen=True)
class Segments:
    """The adapted rows of a packed ragged batch, grouped by adapter slot. All layers of a forward share one object.

    Decode rows, and rows of a request without an adapter, are in no tile, so no op touches them. Rows of one slot are
    grouped across requests, so an op reads each adapter once per tile of rows, not once per request.

    Attributes:
        num_rows: rows of the packed batch, T
        rows: int32, (capacity,), the adapted rows sorted by slot, in batch order within a slot
        tiles: int32, (num_tiles, 3): for each tile the index of its first row in `rows`, its number of rows (0 if the
            tile is unused) and its slot
        tile_rows: maximum rows of a tile: 16, 32 or 64
        spans: the adapted spans in batch order, without empty ones; None if only the device knows them
    """

    num_rows: int
    rows: Tensor
    tiles: Tensor
    tile_rows: int
    spans: tuple[Span, ...] | None

    @classmethod
    def of_spans(
        cls, spans: Sequence[Span], num_rows: int, device: torch.device | str = "cpu", tile_rows: int | None = None
    ) -> "Segments":
        """Returns the segments of spans on the host. One asynchronous copy, no synchronisation.

        Args:
            spans: in any order; rows in no span, and spans of slot BASE, are not adapted
            num_rows: rows of the packed batch
            device: of `rows` and `tiles`
            tile_rows: 16, 32 or 64; None chooses by the rows per slot
        Raises:
            ValueError: spans that overlap, exceed the batch or have a slot below BASE.
        """
        _check_spans(spans, num_rows)
        adapted = sorted((s for s in spans if s.slot != BASE and s.end > s.begin), key=lambda span: span.begin)
        grouped = sorted(adapted, key=lambda span: span.slot)
        begins = torch.tensor([span.begin for span in grouped], dtype=torch.int32)
        lengths = torch.tensor([span.end - span.begin for span in grouped], dtype=torch.int32)
        rows = consecutive(begins, lengths)
        slots, counts = sum_runs([(span.slot, span.end - span.begin) for span in grouped])
        tile_rows = checked_tile_rows(tile_rows) or choose_tile_rows(rows.numel(), len(slots))
        tiles = tiles_of(slots, counts, tile_rows)
        packed = torch.cat([rows, tiles.flatten()])
        if torch.device(device).type == "cuda":
            packed = packed.pin_memory().to(device, non_blocking=True)
        rows, tiles = packed[: rows.numel()], packed[rows.numel() :].view(-1, 3)
        return cls(num_rows, rows, tiles, tile_rows, tuple(adapted))

    @classmethod
    def of_lengths(
        cls,
        slots: Sequence[int],
        lengths: Sequence[int],
        device: torch.device | str = "cpu",
        tile_rows: int | None = None,
    ) -> "Segments":
        """Returns the segments of consecutive requests: request i has lengths[i] rows of slot slots[i].

        Args:
            slots: one per request, BASE for none
            lengths: rows of each request, >= 0
            device, tile_rows: as in `of_spans`
        Raises:
            ValueError: different numbers of slots and lengths, a negative length, or a slot below BASE.
        """
        if len(slots) != len(lengths):
            raise ValueError(f"{len(slots)} slots and {len(lengths)} lengths: give one of each per request")
        spans, begin = [], 0
        for slot, length in zip(slots, lengths, strict=True):
            spans.append(Span(slot, begin, begin + length))
            begin += length
        return cls.of_spans(spans, begin, device, tile_rows)

    @classmethod
    def of_mask(cls, mask: Tensor, slots: Sequence[int], tile_rows: int | None = None) -> "Segments":
        """Returns the segments of a (batch, length) batch, flattened, adapted where the mask is True.

        A mask on the CPU gives spans. For a mask on another device, tiles are computed there without synchronising,
        in a table large enough for any mask.

        Args:
            mask: bool, (batch, length), True on the tokens to adapt. Padding may be True or False
            slots: one per row of the mask, BASE for none
            tile_rows: as in `of_spans`
        Raises:
            ValueError: a mask of another dtype or shape, another number of slots, or a slot below BASE.
        """
        if mask.dtype != torch.bool or mask.dim() != 2 or mask.shape[0] != len(slots):
            raise ValueError(
                f"mask is {mask.dtype} {tuple(mask.shape)} with {len(slots)} slots: give torch.bool (batch, length) "
                "and one slot per row"
            )
        if mask.device.type != "cpu":
            return cls(mask.numel(), *tiles_on_device(mask, slots, tile_rows), None)
        length = mask.shape[1]
        edges = torch.nn.functional.pad(mask.to(torch.int8), (1, 1)).diff(dim=1)
        begins, ends = (edges == 1).nonzero().tolist(), (edges == -1).nonzero().tolist()
        spans = [
            Span(slots[row], row * length + begin, row * length + end)
            for (row, begin), (_, end) in zip(begins, ends, strict=True)
        ]
        return cls.of_spans(spans, mask.numel(), "cpu", tile_rows)

    @classmethod
    def buffer(cls, num_rows: int, max_tiles: int, tile_rows: int, device: torch.device | str) -> "Segments":
        """Returns segments without an adapted row, as a fixed-address target of `copy_into` for CUDA graphs.

        Args:
            num_rows: rows of the packed batch
            max_tiles: the most tiles that will be copied into it
            tile_rows: 16, 32 or 64
            device: of `rows` and `tiles`
        """
        rows = torch.zeros(num_rows, dtype=torch.int32, device=device)
        return cls(num_rows, rows, torch.zeros(max_tiles, 3, dtype=torch.int32, device=device), tile_rows, None)

    def copy_into(self, target: "Segments") -> None:
        """Copies these segments into a buffer that a captured graph reads. Asynchronous.

        Args:
            target: of `buffer`, changed in place
        Raises:
            ValueError: the target has fewer rows or tiles, or another tile_rows.
        """
        if (
            self.tile_rows != target.tile_rows
            or self.tiles.shape[0] > target.tiles.shape[0]
            or self.rows.numel() > target.rows.numel()
        ):
            raise ValueError(
                f"{self.tiles.shape[0]} tiles of {self.tile_rows} and {self.rows.numel()} rows do not fit a buffer of "
                f"{target.tiles.shape[0]} tiles of {target.tile_rows} and {target.rows.numel()} rows: make it larger"
            )
        target.rows[: self.rows.numel()].copy_(self.rows, non_blocking=True)
        target.tiles.zero_()[: self.tiles.shape[0]].copy_(self.tiles, non_blocking=True)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The rows of each slot. Synchronises if only the device knows them."""
        slots, counts = sum_runs([(slot, count) for _, count, slot in self.tiles.tolist() if count])
        found, first = [], 0
        for slot, count in zip(slots, counts, strict=True):
            rows = self.rows[first : first + count].long()
            begin = int(rows[0])
            consecutive = int(rows[-1]) - begin == count - 1
            found.append(Group(slot, slice(begin, begin + count) if consecutive else rows))
            first += count
        return tuple(found)

    @cached_property
    def covers_all(self) -> bool:
        """True if every row of the batch has an adapter; False also if only the device knows that."""
        return self.spans is not None and sum(span.end - span.begin for span in self.spans) == self.num_rows

    @cached_property
    def runs(self) -> tuple[Span, ...] | None:
        """The spans, with adjacent spans of the same slot merged; None if only the device knows them."""
        if self.spans is None:
            return None
        joined: list[Span] = []
        for span in self.spans:
            if joined and joined[-1].end == span.begin and joined[-1].slot == span.slot:
                joined[-1] = Span(span.slot, joined[-1].begin, span.end)
            else:
                joined.append(span)
        return tuple(joined)

    @cached_property
    def even(self) -> tuple[int, int, Tensor] | None:
        """(first row, rows per span, slots: int64, (num_spans,)) if spans have equal length and no gaps, else None."""
        if not self.spans:
            return None
        length = self.spans[0].end - self.spans[0].begin
        for before, span in pairwise(self.spans):
            if span.begin != before.end or span.end - span.begin != length:
                return None
        return self.spans[0].begin, length, torch.tensor([span.slot for span in self.spans])


def _check_spans(spans: Sequence[Span], num_rows: int) -> None:
    faults = [
        f"{span} is outside the batch's {num_rows} rows, or has a slot below {BASE}"
        for span in spans
        if not 0 <= span.begin <= span.end <= num_rows or span.slot < BASE
    ]
    if not faults:
        inside = sorted((span for span in spans if span.end > span.begin), key=lambda span: span.begin)
        faults = [f"{a} and {b} overlap" for a, b in pairwise(inside) if b.begin < a.end]
    if faults:
        raise ValueError("; ".join(faults[:5]) + ": each row of a batch belongs to one request")
