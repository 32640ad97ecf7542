"""What an operator sees: metrics for Prometheus, and log lines in JSON for adapter events and requests."""

import json
import logging
import re
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

MAX_ADAPTER_LABELS = 200
"""Adapters that get their own label; the requests of all others are counted together as "other"."""
GAUGES = {
    "adapters": "Registered adapters",
    "slots": "Slots for adapters on the device",
    "slots_used": "Slots that hold an adapter",
    "slot_bytes": "Bytes of the slots",
    "host_bytes": "Bytes of packed adapters in host memory",
    "loads": "Adapters copied into a slot since the start",
    "hits": "Adapters found in a slot since the start",
    "evictions": "Adapters that lost their slot since the start",
    "streamed": "Forwards that read an adapter from the host, as no slot was free",
    "load_seconds": "Seconds spent on loads since the start",
    "loaded_bytes": "Bytes copied into slots since the start",
    "prefix_units": "Units of prompt KV that the prefix cache can keep",
    "prefix_units_used": "Units of prompt KV that it keeps",
    "prefix_asked_tokens": "Prompt tokens that were looked for in it since the start",
    "prefix_hit_tokens": "Prompt tokens that were found in it since the start",
    "prefix_evictions": "Units that made room since the start",
}
LOGGER = logging.getLogger("preft.events")
_REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
_ID = re.compile(r"[\w.:-]{1,128}")


class Metrics:
    """The gateway's own metrics. `text` adds those of the first shard."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._forwarded = Counter("preft_requests", "Requests forwarded to TGI", ["adapter"], registry=self._registry)
        self._rejected = Counter("preft_refused", "Requests rejected here", ["status"], registry=self._registry)
        self.in_flight = Gauge("preft_requests_in_flight", "Requests in flight", registry=self._registry)
        self._shard = {name: Gauge(f"preft_{name}", text, registry=self._registry) for name, text in GAUGES.items()}
        self._labels: set[str] = set()

    def forwarded(self, adapter: str | None) -> None:
        """Counts a request that is forwarded to TGI. None is the base model."""
        label = adapter or "__base__"
        if label not in self._labels:
            if len(self._labels) >= MAX_ADAPTER_LABELS:
                label = "other"
            else:
                self._labels.add(label)
        self._forwarded.labels(label).inc()

    def rejected(self, status: str) -> None:
        """Counts a request that the gateway rejected."""
        self._rejected.labels(status).inc()

    def text(self, statistics: dict[str, float]) -> bytes:
        """Returns all metrics in Prometheus' text format."""
        for name, gauge in self._shard.items():
            if name in statistics:
                gauge.set(statistics[name])
        return generate_latest(self._registry)


@contextmanager
def request_id(given: str | None) -> Iterator[str]:
    """Sets the request id of the log lines of this context and of the tasks that it starts.

    Args:
        given: a client's X-Request-Id; replaced if it is missing or no plain id
    Yields: the request id.
    """
    token = _REQUEST_ID.set(given if given and _ID.fullmatch(given) else uuid.uuid4().hex)
    try:
        yield _REQUEST_ID.get()
    finally:
        _REQUEST_ID.reset(token)


def log(event: str, **fields: str | float | None) -> None:
    """Writes one log line: the time, the event, the request id if there is one, and the fields that are not None."""
    line = {"time": round(time.time(), 3), "event": event, "request_id": _REQUEST_ID.get() or None, **fields}
    LOGGER.info(json.dumps({name: value for name, value in line.items() if value is not None}))


def to_stderr() -> None:
    """Writes the log lines of this process to stderr."""
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False
    LOGGER.addHandler(logging.StreamHandler(sys.stderr))
