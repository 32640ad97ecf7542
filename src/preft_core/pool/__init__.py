"""Adapters in device memory: the layout of a slot, the slab of all slots, their names, evictions and leases.

Imports `format`, `ops`, `rule` and `orthonormal`, never `hub`.
"""
