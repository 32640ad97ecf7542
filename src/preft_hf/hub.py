"""Push and pull of adapters. `push_model` takes a PEFT model; the rest works on folders, from preft_core.hub."""

from preft_core.hub.push_pull import Pulled, Pushed, pinned, pull_adapter, pull_adapters, push_adapter
from preft_hf.tuner.saving import push_model

__all__ = ["Pulled", "Pushed", "pinned", "pull_adapter", "pull_adapters", "push_adapter", "push_model"]
