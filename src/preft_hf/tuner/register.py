"""The only file that touches PEFT's tables and classes. `register` runs at import of preft_hf and is idempotent."""

from collections.abc import Callable
from typing import Any

from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from transformers.integrations.peft import PeftAdapterMixin

from preft_hf.config import PreftConfig, PreftType
from preft_hf.tuner.model import PreftModel
from preft_hf.tuner.pending import checked_and_undone_on_failure, made_or_undone, undone_on_failure
from preft_hf.tuner.saving import push_in_one_commit, save_in_one_step


def register() -> None:
    """Makes PEFT know the type PREFT, and makes saving and loading an adapter of this type all or nothing."""
    PEFT_TYPE_TO_CONFIG_MAPPING[PreftType.PREFT] = PreftConfig  # pyright: ignore[reportArgumentType]
    PEFT_TYPE_TO_TUNER_MAPPING[PreftType.PREFT] = PreftModel  # pyright: ignore[reportArgumentType]
    PEFT_TYPE_TO_PREFIX_MAPPING[PreftType.PREFT] = PreftModel.prefix  # pyright: ignore[reportArgumentType]
    _wrap(PeftModel, "save_pretrained", save_in_one_step)
    _wrap(PeftModel, "push_to_hub", push_in_one_commit)
    _wrap(PeftModel, "load_adapter", checked_and_undone_on_failure)
    _wrap(PeftModel, "from_pretrained", made_or_undone)
    _wrap(PeftAdapterMixin, "load_adapter", undone_on_failure)


def _wrap(owner: type, name: str, wrapped: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Puts our function around a method, or a class method, of a class; once."""
    method = getattr(owner, name)
    function = getattr(method, "__func__", method)
    if getattr(function, "__preft_original__", None) is None:
        ours = wrapped(function)
        setattr(owner, name, ours if method is function else classmethod(ours))
