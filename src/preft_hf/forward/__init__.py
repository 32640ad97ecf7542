"""Who decides the phase of a forward: the hooks on a model, its labels, its generate and its caches.

Also the adapters of each row, packed batches and continuous batching. Imports `layers`, `config` and `preft_core`.
"""
