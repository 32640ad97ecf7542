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
_REQUEST: ContextVar[dict[str, str]] = ContextVar("request")
_ID = re.compile(r"[\w.:-]{1,128}")


class Metrics:
    """The gateway's own metrics. `text` adds those of the first shard."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        # adapter ids, which not everybody may see
        self._by_adapter = CollectorRegistry()
        self._forwarded = Counter("preft_requests", "Forwarded requests", ["adapter"], registry=self._by_adapter)
        self._rejected = Counter("preft_refused", "Requests rejected here", ["status"], registry=self._registry)
        self.in_flight = Gauge("preft_requests_in_flight", "Requests in flight", registry=self._registry)
        self._shard = {name: Gauge(f"preft_{name}", text, registry=self._registry) for name, text in GAUGES.items()}
        self._labels: set[str] = set()

    def forwarded(self, adapters: set[str]) -> None:
        """Counts a request that is forwarded to TGI, for each adapter that it names, or for the base model."""
        for adapter in adapters or {"__base__"}:
            label = adapter if adapter in self._labels or len(self._labels) < MAX_ADAPTER_LABELS else "other"
            if label != "other":
                self._labels.add(label)
            self._forwarded.labels(label).inc()

    def rejected(self, status: str) -> None:
        """Counts a request that the gateway rejected."""
        self._rejected.labels(status).inc()

    def text(self, statistics: dict[str, float], names: bool = True) -> bytes:
        """Returns all metrics in Prometheus' text format.

        Args:
            statistics: of the first shard
            names: with those that have adapter ids in their labels
        """
        for name, gauge in self._shard.items():
            if name in statistics:
                gauge.set(statistics[name])
        return (generate_latest(self._by_adapter) if names else b"") + generate_latest(self._registry)


@contextmanager
def request_fields(given_id: str | None) -> Iterator[dict[str, str]]:
    """Sets fields of all log lines of this context and of the tasks that it starts.

    Args:
        given_id: a client's X-Request-Id; replaced if it is missing or not a plain id
    Yields: the fields, at first "request_id".
    """
    fields = {"request_id": given_id if given_id and _ID.fullmatch(given_id) else uuid.uuid4().hex}
    token = _REQUEST.set(fields)
    try:
        yield fields
    finally:
        _REQUEST.reset(token)


def annotate(**fields: str) -> None:
    """Adds fields to the further log lines of the request."""
    _REQUEST.get({}).update(fields)


def log(event: str, **fields: str | float) -> None:
    """Writes one log line: the time, the event, the fields of the request if there is one, and further fields."""
    LOGGER.info(json.dumps({"time": round(time.time(), 3), "event": event, **_REQUEST.get({}), **fields}))


def to_stderr() -> None:
    """Writes the log lines of this process to stderr."""
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False
    LOGGER.addHandler(logging.StreamHandler(sys.stderr))
