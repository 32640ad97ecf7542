"""The parts of PreFT that need neither transformers nor peft.

On the ground floor, which import nothing else of this package: `rule` (which rows of a batch are prefill), `format`
(the adapter on disk), `orthonormal` and `seam`. Above them `ops` (arithmetic), then `pool` (adapters in device memory)
and `hub` (sources, push and pull), then `planner`.
"""
