"""What a slot pool counts."""

from dataclasses import dataclass


@dataclass
class Counters:
    """What a pool has done since it was made.

    Attributes:
        hits, loads: adapters asked for that were in a slot, or were copied into one
        host_hits: loads that found a packed copy on the host
        evictions: adapters that lost their slot to another
        waits: requests that had to wait for slots, or for another's load
        bytes_loaded, load_seconds: of all loads
    """

    hits: int = 0
    loads: int = 0
    host_hits: int = 0
    evictions: int = 0
    waits: int = 0
    bytes_loaded: int = 0
    load_seconds: float = 0.0
