"""The counters of a slot pool."""

from dataclasses import dataclass


@dataclass
class Counters:
    """The activity of a pool since it was created.

    Attributes:
        hits: requested adapters that were already in a slot
        loads: requested adapters that were copied into a slot
        host_hits: loads that found a packed copy on the host
        evictions: adapters whose slot was given to another
        waits: acquisitions that waited for slots or for another thread's load
        bytes_loaded: bytes of all loads
        load_seconds: wall time of all loads, seconds
    """

    hits: int = 0
    loads: int = 0
    host_hits: int = 0
    evictions: int = 0
    waits: int = 0
    bytes_loaded: int = 0
    load_seconds: float = 0.0
