"""Hundreds of adapters for one model in a fixed number of slots, chosen by name for each prompt of a batch."""

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from preft_core import ops
from preft_core.format.adapter import Adapter, AdapterConfig, AdapterError, check_shapes
from preft_core.format.config import HubError
from preft_core.hub.manifest import read_manifest
from preft_core.hub.source import AdapterSource, find_adapter
from preft_core.pool.layout import Bucket, Site, bucket_of
from preft_core.pool.slots import Counters, SlotPool
from preft_hf.config import PreftConfig, core_config, full_config
from preft_hf.forward.hooks import ATTRIBUTE, attachment_of
from preft_hf.layers.linear import PreftLayer, device_of
from preft_hf.tuner.attach import block_at, linear_at, take_out
from preft_hf.tuner.model import check_model
from preft_hf.tuner.names import plain_name, submodule, unwrapped
from preft_hf.tuner.targets import features_of, resolve


class PreftPool:
    """Adapters of one model, by name: `model.generate(..., adapter_names=[one name per prompt])`.

    An adapter is registered by its config. On first use its weights are read, checked and copied into a slot, and
    the least recently used adapter is evicted. A name may repeat in a batch, "__base__" stands for the base model, and
    adapters of different method, rank and target modules can share a batch. Adapters are pinned until the batch's
    prompts are in the cache, so decoding needs none of them.

    Calls without adapter_names are not changed. `close`, or the end of a with block, removes the adapter layers.

        pool = PreftPool.from_pretrained(model, {"acme": "org/acme-tone", "tax": "adapters/tax"})
        model.generate(**inputs, adapter_names=["acme", "tax", "__base__"])

    Args:
        model: a causal language model of transformers, or a PeftModel of PreFT, on one device
        configs: configs whose rank, method and target modules the slots must hold
        num_slots: slots of each kind and rank that occurs, or a number for each of them
        max_host_bytes: most bytes of host copies, from which a slot is filled without reading the disk
        dtype: of the slots; the model's by default
    Raises:
        ValueError: the model has a pool already, lies on several devices, or a config does not fit it.
    """

    def __init__(
        self,
        model: nn.Module,
        configs: Iterable[PreftConfig | AdapterConfig],
        *,
        num_slots: int | Mapping[Bucket, int] = 64,
        max_host_bytes: int = 4 << 30,
        dtype: torch.dtype | None = None,
    ):
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        self.model: nn.Module = unwrapped(base)
        attachment = self.model.__dict__.get(ATTRIBUTE)
        if attachment is not None and attachment.routing.pool is not None:
            raise ValueError("the model has a PreftPool already: add the adapters to it, or close() it first")
        check_model(self.model)
        self.closed = False
        self._paths: dict[tuple[Any, ...], list[str]] = {}
        self._hub_options: dict[str, Any] = {}
        configs = list(configs)
        if not configs:
            raise ValueError("PreftPool was given no adapter and no config: give at least one, with `reserve`")
        buckets = sorted({bucket_of(core_config(config)) for config in configs})
        sites: dict[str, Site] = {}
        for config in configs:
            for path in self._resolve(config):
                sites.setdefault(path, self._site(path, config.method))
        modules = dict.fromkeys(plain_name(name) for name, _ in self.model.named_modules())
        names = [name for name in modules if name in sites or f"{name}.preft" in sites]
        ordered = [sites[key] for name in names for key in (name, f"{name}.preft") if key in sites]
        self.slots = SlotPool(
            ordered,
            num_slots if isinstance(num_slots, Mapping) else dict.fromkeys(buckets, num_slots),
            device=self._device(names),
            dtype=dtype or getattr(self.model, "dtype", torch.float32),
            max_host_bytes=max_host_bytes,
        )
        self._attach()

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        adapters: Mapping[str, str | os.PathLike[str]] | str | os.PathLike[str],
        *,
        num_slots: int | Mapping[Bucket, int] = 64,
        max_host_bytes: int = 4 << 30,
        dtype: torch.dtype | None = None,
        reserve: Iterable[PreftConfig] = (),
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> "PreftPool":
        """Returns a pool of saved adapters. Reads their configs now and their weights on first use.

        Args:
            model: as in PreftPool
            adapters: name -> directory, "org/name" or "org/name@revision" on the Hub, pinned to the commit found now;
                or the path of a manifest, preft.toml
            num_slots, max_host_bytes, dtype: as in PreftPool
            reserve: configs of adapters to add later whose rank, method or target modules differ
            token, cache_dir, local_files_only: as in huggingface_hub
        Raises:
            AdapterError: an adapter that cannot be read. The model is left as it was.
            ValueError: as in PreftPool.
        """
        options = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        adapters = adapters if isinstance(adapters, Mapping) else read_manifest(os.fspath(adapters))
        found: dict[str, AdapterSource] = {}
        for name, location in adapters.items():
            try:
                found[name] = find_adapter(location, **options)
            except AdapterError as error:
                place = "" if str(location) in str(error) else f" of {location}"
                raise type(error)(f"adapter {name!r}{place}: {error}") from error
        configs = [*(source.config for source in found.values()), *reserve]
        pool = cls(model, configs, num_slots=num_slots, max_host_bytes=max_host_bytes, dtype=dtype)
        pool._hub_options = options
        try:
            for name, source in found.items():
                pool._add(name, source)
        except BaseException:
            pool.close()
            raise
        return pool

    def add(self, name: str, location: str | os.PathLike[str]) -> None:
        """Registers another saved adapter, from a directory or the Hub, with the options of from_pretrained.

        Raises:
            AdapterError: the adapter cannot be read, or does not fit the model.
            ValueError: the name is taken, or the pool has no slots of its kind and rank or for its target modules.
        """
        self._check_open("add")
        self._add(name, find_adapter(location, **self._hub_options))

    def remove(self, name: str) -> None:
        """Unregisters an adapter. Batches that pinned it finish, then its slot is freed.

        Raises:
            ValueError: no adapter has this name.
        """
        self._check_open("remove")
        self.slots.remove(name)

    def preload(self, names: Iterable[str]) -> None:
        """Loads adapters into slots ahead of the first request.

        Raises:
            ValueError: an unknown name, or more adapters than there are slots.
            AdapterError: an adapter that cannot be loaded.
        """
        self._check_open("preload")
        self.slots.acquire(names, idle=attachment_of(self.model).routing.calls.sweep).release()

    def warm_up(self) -> int:
        """Compiles the kernels that batches of this pool can need on a CUDA device; returns how many ops it ran.

        Without it, kernels compile on first use, about a second each. Triton caches them on disk.
        """
        self._check_open("warm_up")
        return ops.warm_up(one for bucket in self.slots.buckets for one in self.slots.weights(bucket).values())

    def names(self) -> list[str]:
        """Returns the names of all known adapters."""
        return self.slots.names()

    def counters(self) -> Counters:
        """Returns the pool's counters: hits, loads, evictions, waits, bytes, seconds."""
        return self.slots.counters()

    def close(self) -> None:
        """Removes the pool from the model; adapters in the model's own layers stay. Calling it again is a no-op.

        Raises:
            RuntimeError: a forward is using the pool.
        """
        attachment = self.model.__dict__.get(ATTRIBUTE)
        if attachment is not None and attachment.routing.pool is self.slots:
            attachment.calls.sweep()
            if any(self.slots.resident().values()):
                raise RuntimeError("PreftPool.close: generate still uses adapters of the pool: wait for it to finish")
            attachment.routing.pool = None
            for layer in attachment.layers:
                layer.pooled = {}
            take_out(self.model, lambda layer: not layer.preft_A)
        self.closed = True

    def __repr__(self) -> str:
        if self.closed:
            return "PreftPool(closed)"
        names, megabytes = self.names(), self.slots.num_bytes / 2**20
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        slots = ", ".join(f"{count} of {bucket}" for bucket, count in self.slots.buckets.items())
        resident = f"{len(self.slots.resident())} in {slots} slots of {megabytes:.1f} MiB on {self.slots.device}"
        return f"PreftPool({len(names)} adapters: {shown or 'none'}; {resident})"

    def _check_open(self, method: str) -> None:
        if self.closed:
            raise ValueError(f"PreftPool.{method}: the pool is closed; make another with PreftPool.from_pretrained")

    def __enter__(self) -> "PreftPool":
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    def _add(self, name: str, source: AdapterSource) -> None:
        held = attachment_of(self.model).routing.held()
        if not isinstance(name, str) or not name or name in held:
            reason = "the model's layers have an adapter of this name" if name in held else "not a non-empty string"
            raise ValueError(f"adapter name {name!r} cannot be used in the pool: {reason}; choose another")
        paths = self._resolve(source.config)
        missing = [path for path in paths if path not in {site.name for site in self.slots.sites}]
        if missing:
            raise ValueError(
                f"adapter {name!r} changes {len(missing)} layers that the pool has no slots for, such as "
                f"{missing[0]}: pass its config as `reserve` when you make the pool"
            )

        def load() -> Adapter:
            try:
                adapter = source.load()
                modules = adapter.modules().items()
                found = {path: {leaf: tuple(t.shape) for leaf, t in leaves.items()} for path, leaves in modules}
                check_shapes(adapter.config, found, self._expected(source.config, paths))
            except HubError:
                raise  # a retry may help
            except AdapterError as error:
                raise AdapterError(f"adapter {name!r} of {source.location}: {error}") from error
            return adapter

        self.slots.add(name, source.config, load)

    def _resolve(self, config: PreftConfig | AdapterConfig) -> list[str]:
        """Returns the adapter's module paths, cached by what the config chooses."""
        full = config if isinstance(config, PreftConfig) else full_config(config)
        chosen_by = (full.target_modules, full.exclude_modules, full.layers_to_transform)
        key = (full.method == "lora", *map(str, chosen_by))
        if key not in self._paths:
            names = resolve(full, self.model)
            self._paths[key] = names if full.method == "lora" else [f"{name}.preft" for name in names]
        return self._paths[key]

    def _site(self, path: str, method: str) -> Site:
        if method == "lora":
            features = features_of(submodule(self.model, path))
            assert features is not None
            return Site(path, "linear", (path,), features[0], (features[1],))
        hidden = self.model.config.get_text_config().hidden_size  # pyright: ignore
        return Site(path, "block", (path,), hidden, (hidden,))

    def _expected(self, config: AdapterConfig, paths: list[str]) -> dict[str, dict[str, tuple[int, ...]]]:
        sites = {site.name: site for site in self.slots.sites}
        shapes = {}
        for path in paths:
            width_in, width_out, rank = sites[path].in_features, sites[path].out_features, config.r
            leaves: dict[str, tuple[int, ...]] = {"preft_A": (rank, width_in)}
            if config.method == "loreft":
                leaves["preft_R"] = (rank, width_in)
            else:
                leaves["preft_B"] = (width_out, rank)
            if config.method != "lora":
                leaves["preft_bias"] = (rank,)
            shapes[path] = leaves
        return shapes

    def _device(self, names: Iterable[str]) -> torch.device:
        devices = {device_of(submodule(self.model, name)) for name in names}
        if any(device.type == "meta" for device in devices):
            raise ValueError(
                "some of the model's adapted layers are offloaded, on the meta device: a PreftPool needs them on one "
                "device; load the model without cpu_offload, disk_offload or a device_map with disk"
            )
        if len(devices) != 1:
            raise ValueError(
                f"the model's adapted layers lie on {', '.join(sorted(map(str, devices)))}: a PreftPool needs them on "
                "one device; load the model without device_map"
            )
        return devices.pop()

    def _attach(self) -> None:
        for site in self.slots.sites:
            layer: PreftLayer
            if site.kind == "linear":
                layer = linear_at(self.model, site.name)
            else:
                layer = block_at(self.model, site.name.removesuffix(".preft"))
            for bucket in self.slots.buckets:
                if bucket.kind == site.kind:
                    layer.pooled[bucket] = self.slots.weights(bucket)[site.name]
        attachment_of(self.model).routing.pool = self.slots
