"""Which rows of a packed batch are prefill, and of which slot: `tokens` has the rule, `tiles` its integer work.

Ground floor: imports torch alone.
"""
