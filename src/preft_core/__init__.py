"""The parts of PreFT that need neither transformers nor peft.

`orthonormal`, `seam` and `plots` import nothing else of this package. Above them stand `rule` (which rows of a batch
are prefill) and `format` (the adapter on disk), then `ops` (arithmetic) and `hub` (sources, push and pull), then
`pool` (adapters in device memory), then `planner`.
"""
