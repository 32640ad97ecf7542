"""Which rows of a packed batch are prefill, and of which slot: `tokens` has the rule, `tiles` its integer work.

Imports torch only.
"""

from preft_core.rule.tokens import BASE, TILE_ROWS, Group, Segments, Span, choose_tile_rows, prefill_span

__all__ = ["BASE", "TILE_ROWS", "Group", "Segments", "Span", "choose_tile_rows", "prefill_span"]
