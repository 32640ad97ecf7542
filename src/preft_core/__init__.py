"""The parts of PreFT that need neither transformers nor peft.

On the ground floor, which import nothing else of this package: `rule` (which rows of a batch are prefill), `format`
(the adapter on disk), `orthonormal`, `seam` and `plots`. Above them `ops` (arithmetic) and `hub` (sources, push and
pull), then `pool` (adapters in device memory), then `planner`.
"""
