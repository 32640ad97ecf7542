"""Which adapter a request names, said in the request itself: every process of the engine reads it there.

The process that takes requests resolves an adapter once and writes its fingerprint and its place into the request's
`lora_path`. The scheduler keys KV by it, the worker loads exactly that content or refuses. Nothing here imports vLLM.
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
"""Those that find KV by the hashes of vLLM's blocks, which the plugin makes of an adapter's content."""
logger = logging.getLogger("vllm.preft")


@dataclass(frozen=True)
class Stamp:
    """A prefill-only adapter.

    Attributes:
        fingerprint: of config and weights, as docs/format.md gives it
        location: a directory, or "org/name@commit"
    """

    fingerprint: str
    location: str

    @property
    def path(self) -> str:
        """The text that stands for this adapter in `LoRARequest.lora_path`."""
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
    """What one front process knows of adapters: what each place had for each id, and for what an id stands.

    Args:
        base_models: names of the served model that an adapter may have been trained on; none accepts all
        kv_connector: vLLM's name of what KV is exchanged with, None for nothing
    """

    def __init__(self, base_models: Iterable[str] = (), kv_connector: str | None = None):
        self._base_models = tuple(base_models)
        self._kv_connector = kv_connector
        # (id, place) -> signature, stamp. An id keeps the commit that it was loaded at when another id looks again
        self._seen: dict[tuple[int, str], tuple[object, Stamp | None]] = {}
        self._ids: dict[int, str] = {}
        self._loaded: set[tuple[int, str]] = set()
        # adapters are looked up in threads of the server
        self._lock = Lock()

    def stamped(self, lora_request: Any, *, fresh: bool = False) -> Any:
        """Returns a request like this one whose `lora_path` is the adapter's stamp; itself for an all-token LoRA.

        Args:
            lora_request: vLLM's LoRARequest, or None; it is not changed
            fresh: looks a Hub id up again, where it was found before
        Raises:
            ValueError: a PreFT adapter that cannot be had or was trained on another model; an id that stands for
                another adapter; a path in the stamp's form; a KV connector that was not read.
        """
        if lora_request is None:
            return None
        if lora_request.lora_path.startswith(PREFIX):
            raise ValueError(
                f"lora_path is {lora_request.lora_path!r}: give a directory or org/name[@revision]; {PREFIX} is what "
                "the plugin writes for itself"
            )
        number, place = lora_request.lora_int_id, _place(lora_request.lora_path)
        seen = self._find(number, place, fresh or lora_request.load_inplace)
        stamp = None if seen is None else seen[1]
        path = lora_request.lora_path if stamp is None else stamp.path
        self._keep(number, path, seen is not None)
        if seen is not None:
            self._seen[number, place] = seen
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
        return stamp_of(lora_request) is not None or _peft_type(_place(lora_request.lora_path)) == "PREFT"

    def is_read(self, lora_request: Any) -> bool:
        """Returns whether `stamped` found a config where a request's adapter is, of whatever type."""
        return (lora_request.lora_int_id, _place(lora_request.lora_path)) in self._seen

    def loaded(self, stamped: Any) -> None:
        """Notes that the engine has loaded a stamped request's adapter."""
        self._loaded.add((stamped.lora_int_id, stamped.lora_path))

    def is_loaded(self, stamped: Any) -> bool:
        """Returns whether the engine has loaded this adapter before, under this id."""
        return (stamped.lora_int_id, stamped.lora_path) in self._loaded

    def forget(self, stamped: Any) -> None:
        """Frees an id whose adapter the engine could not load. One that was loaded before stays."""
        with self._lock:
            if not self.is_loaded(stamped):
                self._ids.pop(stamped.lora_int_id, None)

    def _keep(self, number: int, path: str, known: bool) -> None:
        """Notes what an id stands for, if that is known. Raises ValueError if it stands for something else."""
        with self._lock:
            before = self._ids.get(number, path)
            if before != path and PREFIX in (before[: len(PREFIX)], path[: len(PREFIX)]):
                raise ValueError(
                    f"lora_int_id {number} stands for {before} and the request says {path}: KV of one adapter would "
                    "be answered with another's; give the new adapter an id of its own, or on a server unload the old "
                    "one first"
                )
            if known:
                self._ids[number] = path

    def _find(self, number: int, place: str, fresh: bool) -> tuple[object, Stamp | None] | None:
        """Returns the signature and the stamp of a place; None, which is not kept, if its config cannot be read."""
        signature = _signature(place)
        known = self._seen.get((number, place))
        if known is not None and known[0] == signature and not (fresh and signature is None):
            return known
        peft_type = _peft_type(place)
        return None if peft_type is None else (signature, self._read(place) if peft_type == "PREFT" else None)

    def _check_base(self, place: str, base: str | None) -> None:
        """Raises ValueError if an adapter was trained on another model. Names of directories cannot tell."""
        if not self._base_models or not base or base in self._base_models:
            return
        served, trained = {_hub_name(name) for name in self._base_models} - {None}, _hub_name(base)
        if not served or trained is None:
            logger.warning(
                "adapter %s was trained on %s and the server has %s: a directory's name does not say whether these "
                "are the same model, so only shapes are compared",
                place,
                base,
                ", ".join(self._base_models),
            )
        elif trained not in served:
            raise ValueError(
                f"adapter {place} was trained on {base} and the server has {', '.join(self._base_models)}: if the "
                "weights are the same, start vLLM with PREFT_BASE_MODEL set to the name that the adapter has"
            )

    def _read(self, place: str) -> Stamp:
        source = find_adapter(place)
        self._check_base(place, source.config.base_model_name_or_path)
        # all of it is checked here: a fault that a worker finds in the middle of a step ends the engine
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
    """Returns the names of the served model: vLLM's, and those in PREFT_BASE_MODEL, commas between."""
    return model, *[name for name in os.environ.get("PREFT_BASE_MODEL", "").split(",") if name]


def _place(path: str) -> str:
    """Returns an absolute path of what exists, else the path as it is: a Hub id, or nothing."""
    path = os.path.expanduser(path)
    return os.path.abspath(path) if os.path.exists(path) else path


def _signature(place: str) -> object:
    """Returns what changes with the files of a directory; None for a Hub id."""
    if hub_id(place) is not None:
        return None
    found = []
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        try:
            status = os.stat(os.path.join(place, name))
        except OSError:
            found.append(None)
        else:
            found.append((status.st_mtime_ns, status.st_size, status.st_ino))
    return tuple(found)


def _peft_type(place: str) -> object:
    """Returns what an adapter's config says of its type; None where there is no config to read."""
    repository = hub_id(place)
    file = Path(place) / CONFIG_NAME
    if repository is not None:
        try:
            file = Path(hf_hub_download(repository[0], CONFIG_NAME, revision=repository[1]))
        except Exception:
            # a repository without a config, or no Hub: vLLM's own loading says what is wrong
            return None
    if not file.is_file():
        return None
    try:
        config = parse_json(read_limited(file, MAX_CONFIG_BYTES), str(file))
    except AdapterError:
        return None
    return config.get("peft_type") if isinstance(config, dict) else None
