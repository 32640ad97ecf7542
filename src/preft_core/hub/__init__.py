"""Adapters on the Hub: sources of adapters, push and pull, model cards, manifests of many adapters.

Imports `format`, never `pool` or `ops`.
"""

from preft_core.hub.push_pull import Pulled, Pushed, pinned, pull_adapter, pull_adapters, push_adapter

__all__ = ["Pulled", "Pushed", "pinned", "pull_adapter", "pull_adapters", "push_adapter"]
