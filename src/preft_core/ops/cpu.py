"""The grouped ops as a few large matrix products: for CPUs, and for devices without Triton."""

from functools import partial

import torch
from torch import Tensor

from preft_core.ops import reference
from preft_core.rule.tokens import Segments

MIN_SPANS_FOR_BMM = 4
MAX_RANK_FOR_BMM = 32
MIN_ROWS_PER_RUN = 16
"""Measured on two cores, float32, 576 x 1536 and 1536 x 576: with 4 spans or more and rank 32 or less, one bmm takes
0.70 to 0.85 of the time of a loop over spans; otherwise 1.0 to 1.4. Gathering rows pays off below about 16 rows per
run."""


def add_lora_(
    output_TN: Tensor, x_TD: Tensor, a_SLRD: Tensor, b_SNR: Tensor, widths: tuple[int, ...], segments: Segments
) -> None:
    """See `reference.add_lora_`. The R intermediate values of a row are rounded to x's dtype."""
    num_parts, rank, width_in = a_SLRD.shape[1:]
    even = _even(segments, rank)
    if even is not None:
        first, length, slots = even
        rows = slice(first, first + length * len(slots))
        x = x_TD[rows].unflatten(0, (-1, length))
        low = torch.bmm(x, a_SLRD[slots].flatten(1, 2).transpose(1, 2))
        for part, columns in enumerate(_columns(widths)):
            output = output_TN[rows, columns].unflatten(0, (-1, length))
            output.baddbmm_(low[..., part * rank : (part + 1) * rank], b_SNR[slots, columns].transpose(1, 2))
        return
    for rows, slot in _runs(segments):
        low = x_TD[rows] @ a_SLRD[slot].reshape(num_parts * rank, width_in).T
        for part, columns in enumerate(_columns(widths)):
            _addmm_(output_TN[:, columns], rows, low[:, part * rank : (part + 1) * rank], b_SNR[slot, columns].T)


lora_linear = partial(reference.lora_linear, add=add_lora_)


def add_direft_(hidden_TD: Tensor, a_SRD: Tensor, b_SDR: Tensor, bias_SR: Tensor, segments: Segments) -> None:
    """See `reference.add_direft_`. The R intermediate values of a row are rounded to hidden's dtype."""
    even = _even(segments, a_SRD.shape[1])
    if even is not None:
        first, length, slots = even
        hidden = hidden_TD[first : first + length * len(slots)].unflatten(0, (-1, length))
        low = torch.baddbmm(bias_SR[slots].unsqueeze(1), hidden, a_SRD[slots].transpose(1, 2))
        hidden.baddbmm_(low, b_SDR[slots].transpose(1, 2))
        return
    for rows, slot in _runs(segments):
        low = torch.addmm(bias_SR[slot], hidden_TD[rows], a_SRD[slot].T)
        _addmm_(hidden_TD, rows, low, b_SDR[slot].T)


def _even(segments: Segments, rank: int) -> tuple[int, int, Tensor] | None:
    """Returns `Segments.even` where one batched product is faster than a loop, else None."""
    spans = segments.spans
    if spans is None or len(spans) < MIN_SPANS_FOR_BMM or rank > MAX_RANK_FOR_BMM:
        return None
    # spans that `runs` joins would read their slot's weights once each
    return segments.even if segments.runs == spans else None


def _runs(segments: Segments) -> list[tuple[slice | Tensor, int]]:
    """Returns what to loop over: runs of consecutive rows, or, where runs are short, all rows of each slot."""
    runs = segments.runs
    if runs is not None and sum(run.end - run.begin for run in runs) >= MIN_ROWS_PER_RUN * len(runs):
        return [(slice(run.begin, run.end), run.slot) for run in runs]
    return [(group.rows, group.slot) for group in segments.groups]


def _columns(widths: tuple[int, ...]) -> list[slice]:
    columns, begin = [], 0
    for width in widths:
        columns.append(slice(begin, begin + width))
        begin += width
    return columns


def _addmm_(output: Tensor, rows: slice | Tensor, low: Tensor, weight: Tensor) -> None:
    if isinstance(rows, slice):
        output[rows].addmm_(low, weight)
    else:
        output.index_copy_(0, rows, torch.addmm(output[rows], low, weight))
