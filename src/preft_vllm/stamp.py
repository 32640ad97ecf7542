"""The stamp of a request's adapter: its fingerprint and location, which every process of the engine reads.

The API server process resolves an adapter once and writes the stamp into the request's `lora_path`. The scheduler keys
KV by it, and the worker loads exactly that content or refuses. Nothing here imports vLLM.
"""

import copy
import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from huggingface_hub import hf_hub_download

from preft_core.format.adapter import WEIGHTS_NAME
from preft_core.format.config import CONFIG_NAME, MAX_CONFIG_BYTES, AdapterError, parse_json, read_limited
from preft_core.hub.source import find_adapter, hub_id

PREFIX = "preft:"
KV_CONNECTORS = ("OffloadingConnector", "SimpleCPUOffloadConnector")
"""Connectors that key KV by vLLM's block hashes, which include the adapter's content."""
logger = logging.getLogger("vllm.preft")


@dataclass(frozen=True)
class Stamp:
    """A prefill-only adapter.

    Attributes:
        fingerprint: of config and weights, see docs/explain/format.md
        location: a directory, or "org/name@commit"
    """

    fingerprint: str
    location: str

    @property
    def path(self) -> str:
        """The value of `LoRARequest.lora_path` for this adapter."""
        return f"{PREFIX}{self.fingerprint.removeprefix('sha256:')}:{self.location}"


def stamp_of(lora_request: Any) -> Stamp | None:
    """Returns the stamp of a request's adapter; None for no adapter and for an all-token LoRA."""
    path = "" if lora_request is None else lora_request.lora_path
    if not path.startswith(PREFIX):
        return None
    fingerprint, _, location = path.removeprefix(PREFIX).partition(":")
    return Stamp(f"sha256:{fingerprint}", location)


def is_stamped(lora_request: Any) -> bool:
    """Returns whether a request's adapter is prefill-only: cheaper than `stamp_of`, for loops over a batch."""
    return lora_request is not None and lora_request.lora_path.startswith(PREFIX)


class Directory:
    """The adapters of one API server process: the content of each location, and the adapter of each id.

    Args:
        base_models: accepted names of the base model; empty accepts all
        kv_connector: the name of vLLM's KV connector, or None
    """

    def __init__(self, base_models: Iterable[str] = (), kv_connector: str | None = None):
        self._base_models = tuple(base_models)
        self._kv_connector = kv_connector
        # (id, location) -> signature, stamp. An id keeps its commit when another id looks the repository up again
        self._seen: dict[tuple[int, str], tuple[object, Stamp | None]] = {}
        self._ids: dict[int, str] = {}
        self._loaded: set[tuple[int, str]] = set()
        # adapters are looked up in threads of the server
        self._lock = Lock()

    def stamped(self, lora_request: Any, *, fresh: bool = False) -> Any:
        """Returns a request like this one whose `lora_path` is the adapter's stamp; itself for an all-token LoRA.

        Args:
            lora_request: vLLM's LoRARequest, or None; it is not changed
            fresh: looks up a Hub id again, even if it was resolved before
        Raises:
            ValueError: a PreFT adapter that cannot be read or was trained on another model, an id that another adapter
                has, a path in the form of a stamp, or a KV connector that may mix the KV of adapters.
        """
        if lora_request is None:
            return None
        if lora_request.lora_path.startswith(PREFIX):
            raise ValueError(
                f"lora_path is {lora_request.lora_path!r}: give a directory or org/name[@revision]; the prefix "
                f"{PREFIX} is reserved for the plugin"
            )
        number, location = lora_request.lora_int_id, _absolute(lora_request.lora_path)
        seen = self._find(number, location, fresh or lora_request.load_inplace)
        stamp = None if seen is None else seen[1]
        path = lora_request.lora_path if stamp is None else stamp.path
        self._keep(number, path, seen is not None)
        if seen is not None:
            self._seen[number, location] = seen
        if stamp is None:
            return lora_request
        if self._kv_connector is not None and self._kv_connector not in KV_CONNECTORS:
            raise ValueError(
                f"adapter {lora_request.lora_name!r} is prefill-only and the KV connector is {self._kv_connector}: it "
                "may mix the KV of adapters and of the base model; start vLLM without it, or with "
                f"{' or '.join(KV_CONNECTORS)}"
            )
        changed = copy.copy(lora_request)
        changed.lora_path, changed.load_inplace = path, False
        return changed

    def is_preft(self, lora_request: Any) -> bool:
        """Returns whether a request, stamped or not, names a prefill-only adapter. Its weights are not read."""
        if lora_request is None:
            return False
        return stamp_of(lora_request) is not None or _peft_type(_absolute(lora_request.lora_path)) == "PREFT"

    def is_read(self, lora_request: Any) -> bool:
        """Returns whether `stamped` could read the config of a request's adapter, of any type."""
        return (lora_request.lora_int_id, _absolute(lora_request.lora_path)) in self._seen

    def loaded(self, stamped: Any) -> None:
        """Records that the engine has loaded a stamped request's adapter."""
        self._loaded.add((stamped.lora_int_id, stamped.lora_path))

    def is_loaded(self, stamped: Any) -> bool:
        """Returns whether the engine has loaded this adapter under this id."""
        return (stamped.lora_int_id, stamped.lora_path) in self._loaded

    def forget(self, stamped: Any) -> None:
        """Frees an id whose adapter the engine could not load. A no-op if it was loaded before."""
        with self._lock:
            if not self.is_loaded(stamped):
                self._ids.pop(stamped.lora_int_id, None)

    def _keep(self, number: int, path: str, known: bool) -> None:
        """Records the adapter of an id, if it is known. Raises ValueError if the id has another one."""
        with self._lock:
            before = self._ids.get(number, path)
            if before != path and PREFIX in (before[: len(PREFIX)], path[: len(PREFIX)]):
                raise ValueError(
                    f"lora_int_id {number} stands for {before} and the request has {path}: one id is one adapter; use "
                    "another id, or on a server unload the old adapter first"
                )
            if known:
                self._ids[number] = path

    def _find(self, number: int, location: str, fresh: bool) -> tuple[object, Stamp | None] | None:
        """Returns the signature and the stamp of a location; None, which is not cached, if it has no config."""
        signature = _signature(location)
        known = self._seen.get((number, location))
        if known is not None and known[0] == signature and not (fresh and signature is None):
            return known
        peft_type = _peft_type(location)
        return None if peft_type is None else (signature, self._read(location) if peft_type == "PREFT" else None)

    def _check_base(self, location: str, base: str | None) -> None:
        """Raises ValueError if an adapter was trained on another model. Warns if the names cannot tell."""
        if not self._base_models or not base or base in self._base_models:
            return
        served, trained = {_hub_name(name) for name in self._base_models} - {None}, _hub_name(base)
        if not served or trained is None:
            logger.warning(
                "adapter %s was trained on %s and the server has %s: a directory's name does not say whether these "
                "are the same model, so only shapes are compared",
                location,
                base,
                ", ".join(self._base_models),
            )
        elif trained not in served:
            raise ValueError(
                f"adapter {location} was trained on {base} and the server has {', '.join(self._base_models)}: if the "
                "weights are the same, start vLLM with PREFT_BASE_MODEL set to the name that the adapter has"
            )

    def _read(self, location: str) -> Stamp:
        source = find_adapter(location)
        self._check_base(location, source.config.base_model_name_or_path)
        # all content is checked here: an error of a worker inside a step ends the engine
        return Stamp(source.load().fingerprint, source.location)


_SNAPSHOT = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/")


def _hub_name(model: str) -> str | None:
    """Returns org/name of a Hub id or of a snapshot in the Hub's cache; None for any other directory."""
    snapshot = _SNAPSHOT.search(model)
    if snapshot is not None:
        return f"{snapshot[1]}/{snapshot[2]}"
    repository = hub_id(model)
    return None if repository is None else repository[0]


def base_models(model: str) -> tuple[str, ...]:
    """Returns the names of the base model: vLLM's, and those in PREFT_BASE_MODEL, separated by commas."""
    return model, *[name for name in os.environ.get("PREFT_BASE_MODEL", "").split(",") if name]


def _absolute(path: str) -> str:
    """Returns the absolute path of a file or directory that exists; any other path, such as a Hub id, unchanged."""
    path = os.path.expanduser(path)
    return os.path.abspath(path) if os.path.exists(path) else path


def _signature(location: str) -> object:
    """Returns a value that changes with the files of a directory; None for a Hub id."""
    if hub_id(location) is not None:
        return None
    found = []
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        try:
            status = os.stat(os.path.join(location, name))
        except OSError:
            found.append(None)
        else:
            found.append((status.st_mtime_ns, status.st_size, status.st_ino))
    return tuple(found)


def _peft_type(location: str) -> object:
    """Returns the peft_type in an adapter's config; None if there is no readable config."""
    repository = hub_id(location)
    file = Path(location) / CONFIG_NAME
    if repository is not None:
        try:
            file = Path(hf_hub_download(repository[0], CONFIG_NAME, revision=repository[1]))
        except Exception:
            # no config, or no Hub: vLLM's own loading reports it
            return None
    if not file.is_file():
        return None
    try:
        config = parse_json(read_limited(file, MAX_CONFIG_BYTES), str(file))
    except AdapterError:
        return None
    return config.get("peft_type") if isinstance(config, dict) else None
