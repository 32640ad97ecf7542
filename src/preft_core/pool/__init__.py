"""Adapters in device memory: the layout of a slot, the slab of all slots, their names, evictions and leases.

Imports `format`, `ops`, `rule` and `orthonormal`, never `hub`.
"""

from preft_core.pool.layout import RANKS, Bucket, Layout, Site, bucket_of
from preft_core.pool.slots import BASE_NAME, Counters, Lease, Slot, SlotPool

__all__ = [
    "BASE_NAME",
    "RANKS",
    "Bucket",
    "Counters",
    "Layout",
    "Lease",
    "Site",
    "Slot",
    "SlotPool",
    "bucket_of",
]
