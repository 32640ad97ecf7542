"""Adapters on the Hub: sources of adapters, push and pull, model cards, manifests of many adapters.

Imports `format`, never `pool` or `ops`.
"""

from preft_core.hub.card import model_card
from preft_core.hub.manifest import read_manifest, write_manifest
from preft_core.hub.push_pull import Pulled, Pushed, pinned, pull_adapter, pull_adapters, push_adapter
from preft_core.hub.source import AdapterSource, find_adapter, find_all, hub_id

__all__ = [
    "AdapterSource",
    "Pulled",
    "Pushed",
    "find_adapter",
    "find_all",
    "hub_id",
    "model_card",
    "pinned",
    "pull_adapter",
    "pull_adapters",
    "push_adapter",
    "read_manifest",
    "write_manifest",
]
