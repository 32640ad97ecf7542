"""The state of one adapter, as the gateway knows it.

| from | event | to |
|---|---|---|
| ABSENT, REJECTED | it is added, or a request names it and it may be loaded from the Hub | LOADING |
| LOADING | all shards report the same weights | READY |
| LOADING | it cannot be loaded, or a shard does not take it | REJECTED |
| READY | it is removed | REMOVING |
| READY | it is evicted: loaded by a request, in no request now, and not used for longest | ABSENT |
| READY | a shard cannot read its files any more, or the shards hold different weights | REJECTED |
| REMOVING | its last request has finished | ABSENT |
| REJECTED | the time to remember it is over | ABSENT |

Its requests in flight outlast its state. A name is given to other weights only after they have finished and all shards
confirmed that they have no adapter of this name.
"""

import asyncio
import enum
from dataclasses import dataclass, field
from typing import Any

from tgi_patch.gateway.errors import ErrorResponse


class State(enum.Enum):
    ABSENT = "absent"
    LOADING = "loading"
    READY = "ready"
    REMOVING = "removing"
    REJECTED = "rejected"


@dataclass
class Adapter:
    """One adapter.

    Attributes:
        facts: what the shards report of it; set while READY or REMOVING
        error: the response to requests for it, and when it is forgotten; set while REJECTED
        task: loads or removes it
        in_flight: requests that the router may still send a prefill of
        finished: set while that is none
        last_used: when a request last named it; None if it was not loaded by a request and is never evicted
    """

    name: str
    state: State = State.ABSENT
    facts: dict[str, Any] = field(default_factory=dict)
    error: ErrorResponse | None = None
    error_until: float = 0.0
    task: "asyncio.Task[None] | None" = None
    in_flight: int = 0
    finished: asyncio.Event = field(default_factory=asyncio.Event)
    last_used: float | None = None
