"""The only file that changes PEFT and transformers: the type PREFT in PEFT's tables, and the table of our patches.

`register` runs at import of preft_hf and is idempotent; `unregister` restores what it replaced.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from preft_hf.config import PreftConfig, PreftType
from preft_hf.tuner.model import PreftModel
from preft_hf.tuner.pending import checked_and_undone_on_failure, made_or_undone, undone_on_failure
from preft_hf.tuner.reading import checked_config, checked_weights
from preft_hf.tuner.saving import card_kept, push_in_one_commit, save_in_one_step

_ORIGINAL = "__preft_original__"
_TABLES: tuple[tuple[dict[Any, Any], Any], ...] = (
    (PEFT_TYPE_TO_CONFIG_MAPPING, PreftConfig),
    (PEFT_TYPE_TO_TUNER_MAPPING, PreftModel),
    (PEFT_TYPE_TO_PREFIX_MAPPING, PreftModel.prefix),
)


@dataclass(frozen=True)
class Patch:
    """One function of PEFT or transformers that is wrapped; other adapter types pass through unchanged.

    Attributes:
        target: "package.module:Class.function" or "package.module:function"
        wrap: takes the original function and returns the one that stands in for it
        why: one sentence
    """

    target: str
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
    why: str


PATCHES = (
    Patch(
        "peft.peft_model:PeftModel.save_pretrained",
        save_in_one_step,
        "PEFT writes weights and config in place, one after the other: a killed save leaves one without the other.",
    ),
    Patch(
        "peft.peft_model:PeftModel.push_to_hub",
        push_in_one_commit,
        "transformers' push writes a card without a base model over the one that was saved.",
    ),
    Patch(
        "peft.peft_model:PeftModel.from_pretrained",
        made_or_undone,
        "PEFT adds the adapter before it reads the weights: a refused file would leave a random adapter that runs.",
    ),
    Patch(
        "peft.peft_model:PeftModel.load_adapter",
        checked_and_undone_on_failure,
        "The same; and over an adapter that is there, PEFT loads weights without reading their config.",
    ),
    Patch(
        "transformers.integrations.peft:PeftAdapterMixin.load_adapter",
        undone_on_failure,
        "The same; and transformers only logs missing and unexpected weights.",
    ),
    Patch(
        "huggingface_hub.repocard:RepoCard.save",
        card_kept,
        "Trainer and TRL write a card without the import line over the one that was saved beside the adapter.",
    ),
    Patch(
        "peft.config:PeftConfigMixin.from_json_file",
        checked_config,
        "PEFT takes any JSON for a config and drops fields that it does not know.",
    ),
    Patch(
        "peft.utils.save_and_load:safe_load_file",
        checked_weights,
        "PEFT maps the file before anything was checked, and renames weights before the fingerprint can be checked.",
    ),
)
"""What is replaced, besides the instance attributes of adapted models that `forward` documents."""


def register() -> None:
    """Makes PEFT know the type PREFT, and makes saving and loading an adapter of this type all or nothing."""
    for table, entry in _TABLES:
        table[PreftType.PREFT] = entry
    for patch in PATCHES:
        owner, name = _place(patch.target)
        method = vars(owner)[name] if name in vars(owner) else getattr(owner, name)
        function = getattr(method, "__func__", method)
        if not hasattr(function, _ORIGINAL):
            wrapped = patch.wrap(function)
            # what the class itself had under this name; None where it was inherited
            setattr(wrapped, _ORIGINAL, vars(owner).get(name))
            setattr(owner, name, classmethod(wrapped) if isinstance(method, classmethod) else wrapped)


def unregister() -> None:
    """Restores every original function and takes the type PREFT out of PEFT's tables."""
    for table, _ in _TABLES:
        table.pop(PreftType.PREFT, None)
    for patch in PATCHES:
        owner, name = _place(patch.target)
        method = vars(owner).get(name)
        function = getattr(method, "__func__", method)
        if not hasattr(function, _ORIGINAL):
            continue
        original = getattr(function, _ORIGINAL)
        if original is None:
            delattr(owner, name)
        else:
            setattr(owner, name, original)


def _place(target: str) -> tuple[Any, str]:
    """Returns the module or class that has the target as an attribute, and the attribute's name."""
    module, _, path = target.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    return owner, name
