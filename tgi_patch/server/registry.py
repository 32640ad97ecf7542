"""The adapters of one server process, by id: added, checked, removed."""

import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from preft_core.format.adapter import WEIGHTS_NAME, Adapter, AdapterConfig, AdapterError
from preft_core.format.header import HEADER_START_BYTES, header_length
from preft_core.hub.source import AdapterSource, find_adapter, hub_id, same_place
from preft_core.pool.layout import Bucket, Layout, bucket_of, check_sites
from preft_core.pool.lease import unknown_names
from preft_core.pool.slots import SlotPool
from tgi_patch.server.known import KnownAdapter, RemovedAdapters, Ticket
from tgi_patch.server.prefixes import PrefixCache
from tgi_patch.server.target_modules import TargetModule, shard_adapter
from tgi_patch.settings import Settings

MAX_HEADER_BYTES = 1 << 20
"""Of an adapter's safetensors file. Parsing 50 MB kept the interpreter lock, and all requests, for 0.7 s."""


class UnknownAdapter(ValueError):
    """No adapter has this id. A ValueError, because a RuntimeError ends TGI's server."""


class AdapterTaken(ValueError):
    """The id is taken by an adapter of another location."""


class Registry:
    """Adapters by id, in a slot pool. Thread-safe: control threads add and remove while the event loop serves.

    Args:
        targets: target modules of the served model
        settings: slots, limits, names of the base model
        model_id: of the served model
        sources: id -> source of the adapters listed at start
        device, dtype: of the model
    Attributes:
        requests: number of requests since the start, with and without an adapter
        streamed: how often a forward found no free slot for an adapter and read it from host memory
        prefixes: the prefix cache; None if it is off
    Raises:
        AdapterError: listed adapters do not fit the model; all faults in one message.
    """

    def __init__(
        self,
        targets: Sequence[TargetModule],
        settings: Settings,
        model_id: str,
        sources: Mapping[str, AdapterSource],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.targets = tuple(targets)
        self._settings = settings
        self._model_id = model_id
        self._whole = tuple(target.whole for target in targets)
        kinds = {site.kind for site in self._whole}
        counts: dict[Bucket, int] = dict.fromkeys(settings.reserve, 0)
        for source in sources.values():
            bucket = bucket_of(source.config)
            counts[bucket] = counts.get(bucket, 0) + 1
        missing = [str(bucket) for bucket in counts if bucket.kind not in kinds]
        if missing:
            raise AdapterError(
                f"{', '.join(missing)}: this model takes no DiReFT-P adapters in TGI; llama, phi3, granite, mistral, "
                "qwen2, gemma2 and gemma3 do: serve LoRA-P adapters, or another model"
            )
        self.pool = SlotPool(
            [target.local for target in targets],
            {bucket: settings.slots or min(max(count, 8), 64) for bucket, count in sorted(counts.items())},
            device=device,
            dtype=dtype,
            max_host_bytes=settings.host_bytes,
        )
        self.layouts = {bucket: Layout(self.pool.sites, bucket) for bucket in self.pool.buckets}
        self._known: dict[str, KnownAdapter] = {}
        self._removed = RemovedAdapters(settings.max_adapters)
        self._number = 0
        self.requests = 0
        self.streamed = 0
        self.prefixes: PrefixCache | None = None
        self._lock = threading.RLock()
        faults = []
        for name, source in sources.items():
            try:
                self._add(name, source)
            except (AdapterError, AdapterTaken) as error:
                faults.append(f"{name!r}: {error}")
        if faults:
            raise AdapterError("adapters that cannot be served: " + "; ".join(faults))

    def add(self, name: str, location: str) -> None:
        """Reads, checks and registers an adapter. Adding the same location and content again is a no-op.

        Raises:
            AdapterError: it cannot be loaded, breaks the format, or does not fit the model.
            AdapterTaken: the id is taken by another location, or the directory's content has changed.
        """
        with self._lock:
            known = self._known.get(name)
        if known is None or not same_place(location, known.location):
            self._add(name, find_adapter(location))
        elif hub_id(known.location) is None and find_adapter(location).load().fingerprint != known.fingerprint:
            raise AdapterTaken(f"{name!r}: {location} has other content than when it was added: remove it first")

    def remove(self, name: str) -> None:
        """Removes an adapter. It is kept for requests that were sent before, see `RemovedAdapters`.

        Raises:
            UnknownAdapter: no adapter has this id.
        """
        with self._lock:
            known = self._known.pop(name, None)
            if known is None:
                raise UnknownAdapter(self._unknown(name))
            self._removed.add(known, self.requests)
            self._sweep()

    def ticket(self, name: str) -> Ticket:
        """Returns a ticket that keeps an adapter, and reads its weights to the host if they are not there.

        A removed adapter counts as known during its grace period: an error would fail every request of the batch.

        Raises:
            UnknownAdapter: no adapter has this id.
            AdapterError: its weights cannot be read again.
        """
        with self._lock:
            self._sweep()
            known = self._known.get(name) or self._removed.find(name)
            if known is None:
                raise UnknownAdapter(self._unknown(name))
            ticket = known.ticket()
        if known.key not in self.pool.resident():
            try:
                self.pool.packed(known.key)
            except (ValueError, OSError) as error:
                # the whole batch fails; the gateway reads `faults` and refuses further requests
                known.fault = str(error)
                raise
        return ticket

    def adapters(self) -> dict[str, dict[str, Any]]:
        """Returns id -> location, method, rank, base model and fingerprint of the known adapters."""
        with self._lock:
            self._sweep()
            known = dict(self._known)
        return {
            name: {
                "location": entry.location,
                "method": entry.config.method,
                "rank": entry.config.r,
                "base_model": entry.config.base_model_name_or_path,
                "fingerprint": entry.fingerprint,
            }
            for name, entry in sorted(known.items())
        }

    def faults(self) -> dict[str, str]:
        """Returns id -> reason of the adapters whose files could not be read again."""
        with self._lock:
            return {name: known.fault for name, known in self._known.items() if known.fault}

    def statistics(self) -> dict[str, float]:
        """Returns counts since the start and current sizes, by metric name."""
        counters = self.pool.counters()
        resident = self.pool.resident()
        return {
            "adapters": len(self._known),
            "slots": sum(self.pool.buckets.values()),
            "slots_used": len(resident),
            "slot_bytes": self.pool.num_bytes,
            "host_bytes": self.pool.host_bytes,
            "loads": counters.loads,
            "hits": counters.hits,
            "evictions": counters.evictions,
            "streamed": self.streamed,
            "load_seconds": counters.load_seconds,
            "loaded_bytes": counters.bytes_loaded,
            **({} if self.prefixes is None else self.prefixes.statistics()),
        }

    def _add(self, name: str, source: AdapterSource) -> None:
        with self._lock:
            if name in self._known:
                raise AdapterTaken(
                    f"{name!r} stands for {self._known[name].location} already: remove that adapter first"
                )
            if len(self._known) >= self._settings.max_adapters:
                raise AdapterError(
                    f"{len(self._known)} adapters are known, as many as PREFT_MAX_ADAPTERS allows: remove one"
                )
        self._check_base(source.config)
        bucket = bucket_of(source.config)
        if bucket not in self.pool.buckets:
            have = ", ".join(map(str, self.pool.buckets))
            raise AdapterError(f"it needs slots for {bucket} and the server has {have}: set PREFT_RESERVE and restart")
        first = [self._load(source)]
        fingerprint = first[0].fingerprint

        def load() -> Adapter:
            return first.pop() if first else self._load(source)

        with self._lock:
            if name in self._known:
                raise AdapterTaken(f"{name!r} was added by another request meanwhile: send this one again")
            self._number += 1
            known = KnownAdapter(name, f"{name}#{self._number}", source.location, source.config, fingerprint)
            self.pool.add(known.key, source.config, load)
        try:
            self.pool.packed(known.key)
        except BaseException:
            self.pool.remove(known.key)
            raise
        with self._lock:
            self._known[name] = known

    def _load(self, source: AdapterSource) -> Adapter:
        """Returns this shard's part of an adapter, checked.

        Runs in a thread beside the event loop that serves gRPC, so it must not hold the interpreter lock for long: the
        header, which is parsed under the lock, is limited; tensors are read and checked without it.
        """
        file = Path(source.fetch()) / WEIGHTS_NAME
        if file.exists():
            self._check_size(file)
        adapter = source.load()
        modules = adapter.modules().items()
        shapes = {path: {leaf: tuple(tensor.shape) for leaf, tensor in leaves.items()} for path, leaves in modules}
        check_sites(adapter.config, shapes, self._whole)
        return shard_adapter(adapter, self.targets)

    def _check_size(self, file: Path) -> None:
        with file.open("rb") as reader:
            size = os.fstat(reader.fileno()).st_size
            header_bytes = header_length(reader.read(HEADER_START_BYTES), size, str(file))
        if size > self._settings.max_bytes:
            raise AdapterError(
                f"{file} has {size} bytes and PREFT_MAX_ADAPTER_BYTES is {self._settings.max_bytes}: raise it, or "
                "train a smaller adapter"
            )
        if header_bytes > MAX_HEADER_BYTES:
            raise AdapterError(
                f"{file} has a header of {header_bytes} bytes and a shard reads at most {MAX_HEADER_BYTES}: save the "
                "adapter without metadata, or train it on fewer modules"
            )

    def _check_base(self, config: AdapterConfig) -> None:
        """Refuses an adapter of another base model, even if its shapes fit."""
        base = config.base_model_name_or_path
        accepted = (self._model_id, *self._settings.base_models)
        if base is None or base in accepted:
            return
        raise AdapterError(
            f"it was trained on {base!r} and the server has {', '.join(map(repr, accepted))}: set PREFT_BASE_MODEL to "
            "it if the served weights are the same"
        )

    def _sweep(self) -> None:
        """Takes removed adapters that no request can name any more out of the pool."""
        for known in self._removed.pop_expired(self.requests):
            self.pool.remove(known.key)

    def _unknown(self, name: str) -> str:
        return unknown_names([name], self._known, "tgi")
