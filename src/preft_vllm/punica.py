"""LoRA of many adapters on a CPU: grouped matrix products instead of vLLM's gathering row by row.

vLLM's CPU kernels copy an adapter's weights for every row, and use the last slot for rows without an adapter
(index -1). vLLM imports this module by name.
"""

from typing import Any

import torch
from torch import Tensor
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU  # pyright: ignore[reportMissingImports]

from preft_core.ops import add_lora_
from preft_core.rule.tokens import BASE, Segments


def segments_of(index: Tensor) -> Segments:
    """Returns the segments of rows.

    Args:
        index: int64, (rows,), the slot of each row, -1 for none
    """
    slots, lengths = torch.unique_consecutive(index, return_counts=True)
    return Segments.of_lengths(slots.tolist(), lengths.tolist())


class GroupedPunicaCPU(PunicaWrapperCPU):
    """vLLM's interface of LoRA kernels. A no-op for steps without an adapted row.

    Attributes:
        segments: of the tokens of a step
        sampled: of the rows whose logits are computed
    """

    segments: Segments
    sampled: Segments

    def update_metadata(self, mapping: Any, lora_index_to_id: Any, max_loras: int, vocab_size: int, **kwargs: Any):
        super().update_metadata(mapping, lora_index_to_id, max_loras, vocab_size, **kwargs)
        self.segments = segments_of(self.token_lora_indices)
        self.sampled = segments_of(self.sampler_indices)

    def add_shrink(self, y: Any, x: Tensor, lora_a_stacked: tuple[Tensor, ...], scale: float, **kwargs: Any) -> None:
        x = x.view(-1, x.shape[-1])
        for i, a in enumerate(lora_a_stacked):
            low = y[i].view(-1, y[i].shape[-1])
            for group in self.segments.groups:
                update = scale * (x[group.rows] @ a[group.slot].squeeze(0).T)
                low[group.rows, : update.shape[1]] = update.to(low.dtype)

    def add_expand(
        self,
        y: Tensor,
        x: Any,
        lora_b_stacked: tuple[Tensor, ...],
        output_slices: tuple[int, ...],
        offset_start: int = 0,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        y = y.view(-1, y.shape[-1])
        begin = offset_start
        for i, (b, width) in enumerate(zip(lora_b_stacked, output_slices, strict=True)):
            self._expand(y[:, begin : begin + width], x[i], b, add_inputs)
            begin += width

    def add_lora_embedding(
        self, y: Tensor, x: Tensor, lora_b_stacked: Tensor, add_inputs: bool = True, **kwargs: Any
    ) -> None:
        self._expand(y.view(-1, y.shape[-1]), x, lora_b_stacked, add_inputs)

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: Any = None,
        **kwargs: Any,
    ) -> None:
        y, x, begin = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1]), 0
        for a, b, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
            _add(y[:, begin : begin + width], x, a, b, scale, self.segments)
            begin += width

    def add_lora_logits(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: Tensor,
        lora_b_stacked: Tensor,
        scale: float,
        *,
        buffer: Any = None,
        **kwargs: Any,
    ) -> None:
        y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        _add(y, x, lora_a_stacked, lora_b_stacked, scale, self._rows_of_logits(x.shape[0], lora_b_stacked))

    def _rows_of_logits(self, num_rows: int, b: Tensor) -> Segments:
        """Returns the segments of the rows whose logits are computed: the sampled ones, or rows of one prompt.

        For prompt_logprobs vLLM passes rows of one request without saying which. This matters only to a LoRA of
        lm_head, which prefill-only adapters never have.
        """
        if num_rows == self.sampled.num_rows:
            return self.sampled
        slots = set(self.sampler_indices.tolist())
        if len(slots) == 1:
            return Segments.of_lengths([slots.pop()], [num_rows])
        if any(b[slot].any() for slot in slots - {BASE}):
            raise ValueError(
                "prompt_logprobs in a batch with several adapters, one of them a LoRA of lm_head: the rows cannot be "
                "told apart; send such requests one at a time, or serve a LoRA without lm_head"
            )
        return Segments.of_lengths([BASE], [num_rows])

    def _expand(self, y: Tensor, x: Tensor, b: Tensor, add_inputs: bool) -> None:
        for group in self.segments.groups:
            weight = b[group.slot].squeeze(0)
            width = min(weight.shape[0], y.shape[1])
            update = (x[group.rows].to(weight.dtype) @ weight[:width].T).to(y.dtype)
            y[group.rows, :width] = y[group.rows, :width] + update if add_inputs else update


def _add(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, segments: Segments) -> None:
    """Adds scale * B A x to the adapted rows of y. Shapes: a (slots, 1, rank, in), b (slots, 1, out, rank)."""
    if not segments.spans:
        return
    rows, b = segments.num_rows, b.squeeze(1)
    width = min(b.shape[1], y.shape[1])
    b = b[:, :width] if scale == 1.0 else b[:, :width] * scale
    add_lora_(y[:rows, :width], x[:rows], a, b, (width,), segments)
