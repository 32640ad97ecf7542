"""A minimal decoder with random weights: the matrix products, attention and cache of a served model.

It stands in for a serving engine: linear layers that share an input are one matrix, and a decode step does not
synchronise with the host, so that it can be captured in a CUDA graph, with or without adapters.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear, rms_norm, scaled_dot_product_attention, silu

from preft_core.ops import add_direft_, lora_linear
from preft_core.ops.weights import Weights
from preft_core.planner import Shape
from preft_core.pool.layout import Bucket, Layout, Site
from preft_core.rule.tokens import Segments


@dataclass(frozen=True)
class Adapters:
    """Random adapters in slots: weights by layer and group, and the bytes of one slot."""

    weights: dict[str, Weights]
    slot_bytes: int

    @classmethod
    def random(cls, shape: Shape, method: str, rank: int, num_slots: int, like: Tensor) -> "Adapters":
        kind = "block" if method == "direft" else "linear"
        sites = [site for layer in range(shape.num_layers) for site in sites_of(shape, layer, kind)]
        layout = Layout(sites, Bucket(kind, rank))
        slab = torch.empty(num_slots, layout.num_elements, dtype=like.dtype, device=like.device)
        # an update of about a third of what it is added to: it changes every output, and sums stay finite
        std = (0.3 / (shape.hidden_size * rank) ** 0.5) ** 0.5
        for row in slab:
            row.normal_(std=std)
        return cls(layout.views(slab), layout.num_elements * slab.element_size())


def sites_of(shape: Shape, layer: int, kind: str) -> list[Site]:
    """Returns the adapter sites of one layer, grouped by shared input."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    queries, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    if kind == "block":
        return [Site(f"{layer}.block", "block", (f"{layer}",), hidden, (hidden,))]
    return [
        Site(f"{layer}.qkv", "linear", (f"{layer}.q", f"{layer}.k", f"{layer}.v"), hidden, (queries, kv, kv)),
        Site(f"{layer}.o", "linear", (f"{layer}.o",), queries, (hidden,)),
        Site(f"{layer}.gate_up", "linear", (f"{layer}.gate", f"{layer}.up"), hidden, (inner, inner)),
        Site(f"{layer}.down", "linear", (f"{layer}.down",), inner, (hidden,)),
    ]


class Decoder:
    """A decoder of a given shape. Its cache is one tensor per layer, (2, rows, kv heads, length, head dim).

    Args:
        shape: widths and layers
        num_rows, length: of the cache
    """

    def __init__(self, shape: Shape, num_rows: int, length: int, device: str, dtype: torch.dtype):
        self.shape, self.length = shape, length
        hidden, inner = shape.hidden_size, shape.intermediate_size
        queries, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim

        def made(*size: int) -> Tensor:
            return torch.empty(size, dtype=dtype, device=device).normal_(std=size[-1] ** -0.5)

        self.embedding = made(shape.vocab_size, hidden)
        self.head = self.embedding if shape.tied else made(shape.vocab_size, hidden)
        self.layers = [
            {
                "qkv": made(queries + 2 * kv, hidden),
                "o": made(hidden, queries),
                "gate_up": made(2 * inner, hidden),
                "down": made(hidden, inner),
            }
            for _ in range(shape.num_layers)
        ]
        size = (2, num_rows, shape.num_kv_heads, length, shape.head_dim)
        self.cache = [torch.zeros(size, dtype=dtype, device=device) for _ in range(shape.num_layers)]
        self.slots = torch.arange(length, device=device)

    def prefill(self, ids: Tensor, first_row: int, adapters: Adapters | None, segments: Segments | None) -> Tensor:
        """Fills the cache of rows first_row... with prompts (rows, length); returns the last tokens' logits."""
        rows, length = ids.shape
        hidden = embedding(ids, self.embedding).flatten(0, 1)
        for i, cache in enumerate(self.cache):
            query, key, value = self._heads(i, hidden, rows, adapters, segments)
            cache[0, first_row : first_row + rows, :, :length] = key
            cache[1, first_row : first_row + rows, :, :length] = value
            mixed = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
            hidden = self._rest(i, hidden, mixed, adapters, segments)
        return self._logits(hidden.unflatten(0, (rows, length))[:, -1])

    def decode(self, ids: Tensor, position: Tensor, adapters: Adapters | None, segments: Segments | None) -> Tensor:
        """Adds one token to each row of the cache, (rows,) at a position () on the device; returns its logits."""
        hidden = embedding(ids, self.embedding)
        mask = (self.slots <= position).view(1, 1, 1, -1)
        for i, cache in enumerate(self.cache):
            query, key, value = self._heads(i, hidden, len(ids), adapters, segments)
            cache[0].index_copy_(2, position.view(1), key)
            cache[1].index_copy_(2, position.view(1), value)
            # the heads that share keys stand in the place of positions: with enable_gqa, keys would be copied for each
            grouped = query.unflatten(1, (self.shape.num_kv_heads, -1)).squeeze(3)
            mixed = scaled_dot_product_attention(grouped, cache[0], cache[1], attn_mask=mask)
            hidden = self._rest(i, hidden, mixed.flatten(1, 2).unsqueeze(2), adapters, segments)
        return self._logits(hidden)

    def _heads(
        self, i: int, hidden: Tensor, rows: int, adapters: Adapters | None, segments: Segments | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        shape = self.shape
        packed = self._linear(i, "qkv", _norm(hidden), adapters, segments).unflatten(0, (rows, -1))
        counts = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
        parts = packed.split([count * shape.head_dim for count in counts], dim=-1)
        query, key, value = (p.unflatten(-1, (-1, shape.head_dim)).transpose(1, 2) for p in parts)
        return query, key, value

    def _rest(
        self, i: int, hidden: Tensor, mixed: Tensor, adapters: Adapters | None, segments: Segments | None
    ) -> Tensor:
        mixed = mixed.transpose(1, 2).flatten(2).flatten(0, 1)
        hidden = hidden + self._linear(i, "o", mixed, adapters, segments)
        gate, up = self._linear(i, "gate_up", _norm(hidden), adapters, segments).chunk(2, dim=-1)
        hidden = hidden + self._linear(i, "down", silu(gate) * up, adapters, segments)
        if adapters is not None and segments is not None and f"{i}.block" in adapters.weights:
            weights = adapters.weights[f"{i}.block"]
            assert weights.bias is not None
            add_direft_(hidden, weights.a[:, 0], weights.b, weights.bias, segments)
        return hidden

    def _linear(self, i: int, name: str, x: Tensor, adapters: Adapters | None, segments: Segments | None) -> Tensor:
        if adapters is None or segments is None or f"{i}.{name}" not in adapters.weights:
            return linear(x, self.layers[i][name])
        weights = adapters.weights[f"{i}.{name}"]
        return lora_linear(x, self.layers[i][name], weights.a, weights.b, weights.widths, segments)

    def _logits(self, hidden: Tensor) -> Tensor:
        return linear(_norm(hidden), self.head)


def _norm(x: Tensor) -> Tensor:
    return rms_norm(x, x.shape[-1:])
